"""A reservation of terabytes in a sparse core costs nothing: what looks at multiples of an address skips the file's holes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.allocators.glibc import identify, locate
from coreheap.corefile import AddressSpace
from coreheap.kernels.values import ArenaCandidates
from tests.core_builder import CoreBuilder

PAGE = 4096
RESERVED = 1 << 40
START = 0x7F00_0000_0000
STEP = 64 << 20
CONTENT = 5 * STEP
"""Where in the reservation something was written."""


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[coreheap.Core]:
    """A core with 1 TiB of memory, of which two pages have content: the first, and one at a multiple of 64 MiB."""
    builder = CoreBuilder().add_segment(START, b"\x11" * 4096, RESERVED, file_bytes=RESERVED).add_thread()
    path = builder.write(tmp_path / "core")
    begin = path.read_bytes().index(b"\x11" * 4096)
    os.truncate(path, begin + RESERVED)
    with path.open("r+b") as file:
        file.seek(begin + CONTENT)
        file.write(b"\x22" * 4096)
    with coreheap.open(path) as core:
        assert core.memory.saved_bytes == RESERVED
        yield core


def test_multiples_are_those_with_content(sparse: coreheap.Core) -> None:
    anonymous = AnonymousMemory(sparse)
    assert anonymous.multiples_of(STEP).tolist() == [START, START + CONTENT]
    # However large the file system's blocks are.
    assert len(anonymous.multiples_of(1 << 12)) < 1000


def test_headers_of_sub_heaps_are_not_looked_for_in_holes(
    sparse: coreheap.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    original = locate.columns_at

    def counted(memory: AddressSpace, addresses: np.ndarray, *fields: object) -> object:
        read.extend(addresses.tolist())
        return original(memory, addresses, *fields)

    monkeypatch.setattr(locate, "columns_at", counted)
    assert locate.sub_heap_headers(sparse, identify.layouts_for(sparse)[0], STEP) == ()
    assert read == [START, START + CONTENT]


def test_the_scan_for_arenas_looks_at_content_alone(sparse: coreheap.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[tuple[int, int]] = []
    find = locate.find_arena_candidates

    def noted(data: np.ndarray, start: int, *words: object, **more: object) -> ArenaCandidates:
        looked_at.append((start, start + len(data)))
        return find(data, start, *words, **more)

    monkeypatch.setattr(locate, "find_arena_candidates", noted)
    assert list(locate.scan(sparse, identify.layouts_for(sparse))) == []
    assert sum(end - start for start, end in looked_at) <= 4 * sparse.memory.hole_granularity
    assert {START, START + CONTENT} <= {start for start, _ in looked_at}


def test_an_arena_is_found_where_holes_cut_pairs_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gdb puts segments at any offset of the file: a hole ends at any address then."""
    builder = CoreBuilder().add_thread()
    bins = bytes(PAGE)
    for _ in range(300):
        place = START + len(bins)
        bins += (place - 16).to_bytes(8, "little") * 2
    builder.add_segment(START, bins + bytes(PAGE), file_bytes=len(bins) + PAGE)
    path = builder.write(tmp_path / "core")
    with coreheap.open(path) as core:
        whole = [hits.self_pairs.tolist() for hits in locate.scan(core, identify.layouts_for(core))]
        for cut in range(1, 16):
            low, high = START + PAGE - cut, START + len(bins) + cut
            monkeypatch.setattr(core.memory, "populated_extents", lambda *_, low=low, high=high: [(low, high)])
            assert [hits.self_pairs.tolist() for hits in locate.scan(core, identify.layouts_for(core))] == whole
