"""What was in memory, from the holes and the zeros of core files."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.accounting import Claims, account_for_memory
from coreheap.accounting.ledger import Claimant
from coreheap.accounting.mapping_table import labelled_pieces
from coreheap.corefile import Core, open_core
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.residency import (
    BATCH_BYTES,
    JOINED_BYTES,
    LARGEST_BLOCK_BYTES,
    ByteRuns,
    StoredPieces,
    kernels_holes,
    pages_with_content,
)
from coreheap.evidence import Confidence, Strength
from coreheap.mappings import MappingKind, ResidencyBasis
from tests.conftest import skip_unless_ci
from tests.core_builder import CoreBuilder

PAGE = 4096
ANONYMOUS, FILE, RESERVE, UNTOUCHED = 0x100000, 0x200000, 0x300000, 0x400000


def words(values: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(values, np.uint64)


steps = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=8)


@given(steps, st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), max_size=8))
def test_bytes_within_counts_every_byte(layout: list[tuple[int, int]], ranges: list[tuple[int, int]]) -> None:
    runs, position = [], 0
    for gap, size in layout:
        runs.append((position + gap, position + gap + size))
        position += gap + size
    held = {byte for start, end in runs for byte in range(start, end)}
    made = ByteRuns(words([start for start, _ in runs]), words([end for _, end in runs]))
    counted = made.bytes_within(words([start for start, _ in ranges]), words([start + size for start, size in ranges]))
    assert counted.tolist() == [len(held & set(range(start, start + size))) for start, size in ranges]


pages = st.lists(st.sampled_from([0, 0, 1, 2]), min_size=1, max_size=40)


@given(st.lists(st.tuples(pages, st.integers(0, 12)), min_size=1, max_size=4), st.sampled_from([0, 8, 100]))
def test_pages_with_content_are_found_wherever_the_file_has_them(
    segments: list[tuple[list[int], int]], shift: int
) -> None:
    """Segments of pages that are zero (0), begin or end with a byte (1, 2); the file has them one behind the other, or not."""
    file = bytearray(shift)
    start, end, offset, expected = [], [], [], set()
    address = 0x10000
    for content, gap in segments:
        file += bytes(gap * PAGE)
        start.append(address)
        offset.append(len(file))
        for number, kind in enumerate(content):
            page = bytearray(PAGE)
            if kind:
                page[0 if kind == 1 else PAGE - 1] = 1
                expected |= {address + number * PAGE}
            file += page
        address += len(content) * PAGE
        end.append(address)
        address += PAGE * (1 + gap)
    memory = cast(AddressSpace, SimpleNamespace(file=np.frombuffer(bytes(file), np.uint8), page_bytes=PAGE))
    found = pages_with_content(memory, StoredPieces(words(start), words(end), words(offset)))
    assert {
        page
        for low, high in zip(found.start.tolist(), found.end.tolist(), strict=True)
        for page in range(low, high, PAGE)
    } == expected
    assert all((found.end - found.start) % PAGE == 0)


def test_more_than_a_batch_is_looked_at_whole() -> None:
    size = BATCH_BYTES + 3 * PAGE
    file = np.zeros(size, np.uint8)
    for page in (0, BATCH_BYTES // PAGE - 1, BATCH_BYTES // PAGE, size // PAGE - 1):
        file[page * PAGE + 17] = 5
    memory = cast(AddressSpace, SimpleNamespace(file=file, page_bytes=PAGE))
    found = pages_with_content(memory, StoredPieces(words([1 << 40]), words([(1 << 40) + size]), words([0])))
    assert int((found.end - found.start).sum()) == 4 * PAGE
    assert JOINED_BYTES < BATCH_BYTES


# Cores


def builder(writer: str = "kernel") -> CoreBuilder:
    """Anonymous memory of which pages 0, 3 and 7 hold something, a file, a reserve, and memory that was not saved."""
    content = bytearray(8 * PAGE)
    for page in (0, 3, 7):
        content[page * PAGE + 5] = 1
    made = CoreBuilder()
    made.writer = writer
    return (
        made.add_segment(ANONYMOUS, bytes(content))
        .add_segment(FILE, b"f" * PAGE, 4 * PAGE, "r--")
        .add_segment(RESERVE, memory_bytes=64 * PAGE, flags="---")
        .add_segment(UNTOUCHED, memory_bytes=16 * PAGE)
        .add_file_mapping(FILE, FILE + 4 * PAGE, 0, "/usr/share/file")
        .add_thread()
    )


def opened(path: Path) -> Core:
    if path.stat().st_blocks * 512 >= path.stat().st_size:
        skip_unless_ci("no holes on this file system; to run this test: set TMPDIR to ext4, xfs, btrfs or tmpfs")
    return open_core(path)


def sparse_core(folder: Path, stored_zeros: tuple[int, ...] = (), writer: str = "kernel") -> Core:
    """A core whose pages of zeros are holes, but for those of these numbers."""
    path = builder(writer).write(folder / "core", sparse=True)
    with open_core(path) as core:
        offset = int(core.memory.run_file_offset[0])
    with open(path, "r+b") as file:
        for page in stored_zeros:
            os.pwrite(file.fileno(), bytes(PAGE), offset + page * PAGE)
    return opened(path)


def claim_reserve(core: Core, claims: Claims) -> None:
    claims.add(MappingKind.ARENA_RESERVE, RESERVE, RESERVE + 64 * PAGE)


def resident(
    core: Core, claimants: tuple[Claimant, ...] = (("reserve", claim_reserve),)
) -> tuple[ResidencyBasis, dict[int, tuple[int, int]]]:
    """At least and at most how many pages of each mapping were in memory."""
    table = account_for_memory(core, None, claimants=claimants).mappings
    low, high = table.resident_low // np.uint64(PAGE), table.resident_high // np.uint64(PAGE)
    rows = zip(table.start.tolist(), low.tolist(), high.tolist(), strict=True)
    return table.basis, {start: (least, most) for start, least, most in rows}


def test_the_kernels_holes_tell_every_page(tmp_path: Path) -> None:
    with sparse_core(tmp_path, stored_zeros=(5,)) as core:
        # Page 5 was there, and full of zeros. Of files nothing is known; the reserve was never written.
        assert resident(core) == (
            ResidencyBasis.HOLES,
            {ANONYMOUS: (4, 4), FILE: (0, 4), RESERVE: (0, 0), UNTOUCHED: (0, 16)},
        )
        # Of others than malloc it may be hidden by MADV_DONTDUMP.
        assert resident(core, claimants=())[1][RESERVE] == (0, 64)


def test_a_copy_that_made_holes_of_zeros_gives_bounds(tmp_path: Path) -> None:
    with sparse_core(tmp_path) as core:
        basis, pages = resident(core)
        assert (basis, pages[ANONYMOUS]) == (ResidencyBasis.ZERO_PAGES, (3, 8))


@pytest.mark.parametrize("stored", [(1,), (4,), (6,), (1, 4), (4, 5, 6)])
def test_zeros_beside_content_are_no_proof(stored: tuple[int, ...], tmp_path: Path) -> None:
    """A tool with large blocks that keeps the original's holes stores such zeros, too; one with small blocks does not."""
    with sparse_core(tmp_path, stored_zeros=stored) as core:
        found = kernels_holes(core.memory)
        assert found is not Strength.PROOF
        basis, pages = resident(core)
        low, high = pages[ANONYMOUS]
        assert low <= 3 + len(stored) <= high
        assert (found is None) == (high == 8)
        assert (basis is ResidencyBasis.HOLES) == (low == high)
        if found is not None:
            assert labelled_pieces(core, Claims()).residency_confidence is Confidence.PLAUSIBLE


def test_zeros_shorter_than_every_hole_say_nothing(tmp_path: Path) -> None:
    """The shortest hole has two pages: a tool with blocks of that size stores a single page of zeros."""
    made = CoreBuilder()
    made.add_segment(ANONYMOUS, b"b" + bytes(4 * PAGE - 2) + b"b").add_segment(
        1 << 30, b"c" + bytes(PAGE) + b"c"
    ).add_thread()
    path = made.write(tmp_path / "core", sparse=True)
    with opened(path) as core:
        start, end = core.memory.data_extents
        assert int((start[1:] - end[:-1]).min()) >= 2 * PAGE
        assert kernels_holes(core.memory) is None


@pytest.mark.parametrize(("blocks", "proves"), [(1, False), (3, True)])
def test_zeros_that_hold_a_block_of_any_tool_prove_it(blocks: int, proves: bool, tmp_path: Path) -> None:
    """Between two pages of content, stored as the kernel stores them; a hole is elsewhere."""
    made = CoreBuilder()
    content = b"a" * PAGE + bytes(blocks * LARGEST_BLOCK_BYTES) + b"z" * PAGE
    made.add_segment(ANONYMOUS, b"b" + bytes(3 * PAGE - 2) + b"b").add_segment(1 << 30, content).add_thread()
    path = made.write(tmp_path / "core", sparse=True)
    with open_core(path) as core:
        offset = int(core.memory.run_file_offset[-1])
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), content, offset)
    with opened(path) as core:
        assert (kernels_holes(core.memory) is Strength.PROOF) is proves


def test_a_segment_that_begins_within_the_headers(tmp_path: Path) -> None:
    """Pages then begin before the file does."""
    made = CoreBuilder().add_segment(0x50800, b"", 4 * PAGE, file_offset=0x40, file_bytes=2 * PAGE)
    made.add_file_mapping(FILE, FILE + PAGE, 0, "/usr/share/file").add_thread()
    path = made.add_segment(ANONYMOUS, b"c" * 2 * PAGE).write(tmp_path / "core")
    with open_core(path) as core:
        table = account_for_memory(core, None).mappings
    row = table.start.tolist().index(0x50800)
    assert 0 < int(table.resident_low[row]) <= 2 * PAGE <= int(table.resident_high[row])


@pytest.mark.parametrize("writer", ["kernel", "gdb"])
def test_without_holes_pages_of_zeros_may_have_been_there(tmp_path: Path, writer: str) -> None:
    with open_core(builder(writer).write(tmp_path / "core")) as core:
        basis, pages = resident(core)
        assert (basis, pages[ANONYMOUS]) == (ResidencyBasis.ZERO_PAGES, (3, 8))
        # Only the kernel is known to save what was ever written, whatever its permissions.
        assert pages[RESERVE] == ((0, 0) if writer == "kernel" else (0, 64))


def test_a_core_without_private_memory_tells_nothing(tmp_path: Path) -> None:
    made = CoreBuilder().add_segment(RESERVE, memory_bytes=64 * PAGE, flags="---")
    with open_core(made.add_segment(UNTOUCHED, memory_bytes=PAGE).add_thread().write(tmp_path / "core")) as core:
        assert resident(core) == (ResidencyBasis.UNKNOWN, {RESERVE: (0, 64), UNTOUCHED: (0, 1)})


def test_without_the_list_of_files_no_memory_is_surely_anonymous(tmp_path: Path) -> None:
    path = CoreBuilder().add_segment(ANONYMOUS, b"a" * PAGE + bytes(PAGE)).add_thread().write(tmp_path / "core")
    with open_core(path) as core:
        assert resident(core) == (ResidencyBasis.UNKNOWN, {ANONYMOUS: (0, 2)})
