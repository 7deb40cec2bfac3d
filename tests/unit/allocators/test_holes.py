"""A stretch of chunks with holes: what of it is malloc's own, and where the chunk before a hole leads."""

from __future__ import annotations

from pathlib import Path

import pytest

from coreheap.allocators.glibc.holes import OTHER_MAPPING, Holes, Stretch, holes_within
from coreheap.corefile import Core, open_core
from coreheap.heap import NO_INDEX, RegionKind
from coreheap.kernels import ChunkGeometry
from tests.core_builder import CoreBuilder

PAGE = 4096
HEAP = 0x555500000000
PAGES = 16
GEOMETRY = ChunkGeometry(8, 16, 32, 0)
TOP = 0x400


def heap_of(sizes: list[int]) -> bytearray:
    """Chunks in use one behind the other, and top up to the end; its size is a chunk's as well."""
    content = bytearray(PAGES * PAGE)
    at = 0
    for size in [*sizes, PAGES * PAGE - sum(sizes)]:
        content[at + 8 : at + 16] = (size | 1).to_bytes(8, "little")
        at += size
    assert at == len(content)
    return content


def core_of(tmp_path: Path, content: bytes, holes: dict[int, str]) -> Core:
    """The heap of which some pages are ``unmapped``, ``left_out`` of the core, ``protected``, or show another ``file``."""
    builder = CoreBuilder().add_thread()
    rights = {"protected": "---", "left_out": "rw-", "file": "rw-"}
    for page in range(PAGES):
        start, kind = HEAP + page * PAGE, holes.get(page, "")
        if kind == "unmapped":
            continue
        own = content[page * PAGE : (page + 1) * PAGE]
        other = {"left_out": None, "file": b"\x11" * PAGE}
        builder.add_segment(start, other.get(kind, own), PAGE, rights.get(kind, "rw-"))
        if kind == "file":
            builder.add_file_mapping(start, start + PAGE, 0, "/memfd:window (deleted)")
    return open_core(builder.write(tmp_path / "core"))


def holes_of(core: Core, top: int) -> Holes:
    stretch = Stretch(RegionKind.BRK, 0, NO_INDEX, HEAP, HEAP + PAGES * PAGE, HEAP + top, True)
    return Holes(core.memory, GEOMETRY, stretch)


SIZES = [*[0x100] * 20, 0x3000, *[0x90] * 40, 0x2000, *[0x40] * 200]
"""The two large ones have pages of their own: 2 and 3; 7."""
LARGE, SECOND = 20 * 0x100, 20 * 0x100 + 0x3000 + 40 * 0x90


@pytest.mark.parametrize("kind", ["unmapped", "left_out", "file"])
def test_the_chunk_before_a_hole_says_where_the_next_one_is(tmp_path: Path, kind: str) -> None:
    core = core_of(tmp_path, heap_of(SIZES), {2: kind, 3: kind})
    holes = holes_of(core, sum(SIZES))
    assert holes.parts == [(HEAP, HEAP + 2 * PAGE), (HEAP + 4 * PAGE, HEAP + PAGES * PAGE)]
    assert holes.end_of_chunk(HEAP + LARGE) == HEAP + LARGE + 0x3000
    causes = {"unmapped": "unmapped", "left_out": "not_saved", "file": OTHER_MAPPING}
    assert holes.cause_at(HEAP + 2 * PAGE) == causes[kind]
    named = list(holes_within(core.memory, HEAP, HEAP + PAGES * PAGE))
    assert {hole.cause for hole in named} == {causes[kind]}
    assert sum(hole.range.byte_count for hole in named) == 2 * PAGE


def test_protected_pages_that_were_saved_are_no_hole(tmp_path: Path) -> None:
    core = core_of(tmp_path, heap_of(SIZES), {2: "protected", 3: "protected"})
    assert holes_of(core, sum(SIZES)).parts == [(HEAP, HEAP + PAGES * PAGE)]


def test_a_size_that_leads_to_no_chunk_is_not_believed(tmp_path: Path) -> None:
    content = heap_of(SIZES)
    content[LARGE + 0x3000 : LARGE + 0x3000 + 40 * 0x90] = b"\x55" * (40 * 0x90)
    core = core_of(tmp_path, content, {2: "unmapped"})
    assert holes_of(core, sum(SIZES)).end_of_chunk(HEAP + LARGE) is None


def test_a_free_chunk_over_a_hole_needs_its_size_behind_it(tmp_path: Path) -> None:
    content = heap_of(SIZES)
    behind = LARGE + 0x3000
    content[behind + 8 : behind + 16] = (0x90).to_bytes(8, "little")
    core = core_of(tmp_path, content, {2: "left_out"})
    assert holes_of(core, sum(SIZES)).end_of_chunk(HEAP + LARGE) is None
    content[behind : behind + 8] = (0x3000).to_bytes(8, "little")
    core = core_of(tmp_path, content, {2: "left_out"})
    assert holes_of(core, sum(SIZES)).end_of_chunk(HEAP + LARGE) == HEAP + behind


def test_a_chunk_that_ends_in_a_hole_is_believed_with_a_size_that_chunks_have(tmp_path: Path) -> None:
    core = core_of(tmp_path, heap_of(SIZES), {4: "unmapped"})
    holes = holes_of(core, sum(SIZES))
    assert LARGE + 0x3000 - 4 * PAGE in range(PAGE)
    assert holes.part_holding(HEAP + LARGE + 0x3000) is None
    assert holes.end_of_chunk(HEAP + LARGE) == HEAP + LARGE + 0x3000


def test_a_few_chunks_between_two_holes_are_found(tmp_path: Path) -> None:
    """Fewer than prove each other elsewhere; the last of them leads over the second hole."""
    core = core_of(tmp_path, heap_of(SIZES), {4: "unmapped", 7: "unmapped"})
    holes = holes_of(core, sum(SIZES))
    start, end = holes.parts[1]
    assert (start, end) == (HEAP + 5 * PAGE, HEAP + 7 * PAGE)
    first = holes.first_chunk(core.memory.view(start, end), start)
    starts, at = set(), HEAP
    for size in SIZES:
        starts.add(at)
        at += size
    assert first == min(chunk for chunk in starts if chunk >= start)


def test_a_chunk_right_behind_a_hole_is_the_first(tmp_path: Path) -> None:
    sizes = [*[0x100] * 32, *[0x40] * 256]
    core = core_of(tmp_path, heap_of(sizes), {1: "unmapped"})
    holes = holes_of(core, sum(sizes))
    start, end = holes.parts[1]
    assert holes.first_chunk(core.memory.view(start, end), start) == HEAP + 2 * PAGE
