"""A reservation of terabytes in a sparse core costs nothing: what looks at multiples of an address skips the file's holes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import coreheap
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.allocators.glibc import identify, locate
from coreheap.allocators.glibc.records import HeapInfo, Layout, read_heap_info
from coreheap.corefile import AddressSpace
from tests.core_builder import CoreBuilder

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
    original = read_heap_info

    def counted(memory: AddressSpace, address: int, layout: Layout) -> HeapInfo:
        read.append(address)
        return original(memory, address, layout)

    monkeypatch.setattr(locate, "read_heap_info", counted)
    assert locate.sub_heap_headers(sparse, identify.layouts_for(sparse)[0], STEP) == ()
    assert read == [START, START + CONTENT]
