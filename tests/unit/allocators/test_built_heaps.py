"""Every release's heap, built from the facts, is read to the last chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import coreheap
from coreheap.allocators.glibc.layouts import GENERATIONS
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState, HeapSnapshot, RegionKind
from tests.heap_builder import IN_USE, TCACHE, BuiltChunk, BuiltList, Mix, link_singly
from tests.unit.allocators.built_process import (
    ALONE,
    IDLE,
    THREADS,
    BuiltProcess,
    Shape,
    build_process,
    leaves_of,
    mapped_bytes_of,
    release,
    releases,
    states_of,
)

MACHINES = ("x86_64", "i386", "aarch64")
SHAPES = {"alone": ALONE, "threads": THREADS}


def every_release() -> Iterator[Any]:
    for machine_name in MACHINES:
        for item in releases(machine_name):
            for shape in SHAPES:
                yield pytest.param(item.name, machine_name, shape, id=f"{item.name}-{machine_name}-{shape}")


ALIKE = {"glibc 2.34", "glibc 2.35-2.37 without tunables"}
"""Groups that differ in heap_info.pagesize alone: in cores without sub-heaps, or where it took the place of padding (i386),
nothing tells them apart, and both are named."""


def groups_of(process: BuiltProcess) -> set[str]:
    """The groups of releases (generations) that a report on the process has to name."""
    (own,) = [generation.name for generation in GENERATIONS if process.release.name in generation.releases]
    has_sub_heaps = any(arena.sub_heaps for arena in process.arenas)
    is_told_apart = own not in ALIKE or (has_sub_heaps and process.machine.word_bytes == 8)
    return {own} if is_told_apart else ALIKE


def list_counts(heap: HeapSnapshot) -> Counter[tuple[str, int, int]]:
    return Counter((free_list.kind.label, free_list.number, free_list.count) for free_list in heap.free_lists)


def assert_read_in_full(process: BuiltProcess, folder: Path) -> HeapSnapshot:
    """What must hold of every sound heap; gives it back for more."""
    with coreheap.open(process.write(folder)) as core:
        report = coreheap.analyze(core)
        mapped = mapped_bytes_of(core)
    heap = report.heap
    assert heap is not None
    assert heap.anomalies == () == report.defects
    assert heap.anomaly_count == 0
    assert heap.gaps == ()
    assert states_of(heap) == process.truth
    assert sorted(heap.identity.layout.split(" or ")) == sorted(groups_of(process))
    assert heap.identity.main_arena == process.main_arena
    assert heap.identity.mp == process.mp
    assert heap.identity.confidence is Confidence.CERTAIN
    assert {arena.address for arena in heap.arenas} == {arena.state_address for arena in process.arenas}
    assert {sub.address for arena in heap.arenas for sub in arena.sub_heaps} == {
        address for arena in process.arenas for address in arena.sub_heaps
    }
    assert {arena.coverage for arena in heap.arenas} == {1.0}
    assert list_counts(heap) == Counter((item.state, item.number, len(item.chunks)) for item in process.lists)
    mmapped = process.builder.heap.mmapped_mappings
    assert heap.mmapped_count == len(mmapped)
    assert heap.mmapped_bytes == sum(size for _, size in mmapped)
    assert report.ledger.bytes == mapped
    assert sum(leaf.bytes for leaf in leaves_of(report.ledger)) == mapped
    return heap


@pytest.mark.parametrize(("name", "machine_name", "shape"), list(every_release()))
def test_heap_of_every_release_is_read_in_full(name: str, machine_name: str, shape: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), SHAPES[shape])
    heap = assert_read_in_full(process, tmp_path)
    arena_of = {arena.address: set(arena.threads) for arena in heap.arenas}
    for number, thread in enumerate(process.threads):
        assert number in arena_of[thread.arena]
    owners = {cache.address: cache.thread for cache in heap.thread_caches}
    assert owners == {thread.tcache: number for number, thread in enumerate(process.threads) if thread.tcache}
    assert heap.parameters is not None
    assert heap.parameters.value("n_mmaps") == heap.mmapped_count
    assert heap.parameters.value("sbrk_base") == process.arenas[0].segments[0].start & ~0xFFF


def some(*names: str) -> pytest.MarkDecorator:
    """Parameters ``process``: releases given as ``2.36`` (x86_64) or ``2.36 i386``."""
    return pytest.mark.parametrize(
        ("name", "machine_name"),
        [
            pytest.param(*(name.split() if " " in name else (name, "x86_64")), id=name.replace(" ", "-"))
            for name in names
        ],
    )


@some(
    "2.12-stock",
    "2.22",
    "2.26",
    "2.36",
    "2.42",
    "2.43",
    "2.44",
    "2.12-stock i386",
    "2.22 i386",
    "2.26 i386",
    "2.44 i386",
)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_is_unexplained(name: str, machine_name: str, shape: str, tmp_path: Path) -> None:
    report = build_process(release(name, machine_name), SHAPES[shape]).analyze(tmp_path)
    leaves = list(leaves_of(report.ledger))
    assert sum(leaf.bytes for leaf in leaves if leaf.name == "unexplained") == 0
    assert sum(leaf.bytes for leaf in leaves if leaf.name == "mmapped_chunks") == 0


@some(
    "2.26",
    "2.31",
    "2.36",
    "2.42",
    "2.43",
    "2.44",
    "2.36 i386",
    "2.43 i386",
    "2.44 i386",
    "2.36 aarch64",
    "2.42 aarch64",
    "2.43 aarch64",
    "2.44 aarch64",
)
def test_thread_that_never_freed_hides_no_other_tcache(name: str, machine_name: str, tmp_path: Path) -> None:
    assert_read_in_full(build_process(release(name, machine_name), IDLE), tmp_path)


# Less usual heaps


@some(
    "2.12-stock",
    "2.19 i386",
    "2.23",
    "2.31",
    "2.36",
    "2.43",
    "2.26 i386",
    "2.36 i386",
    "2.42 i386",
    "2.44 i386",
    "2.17 aarch64",
    "2.36 aarch64",
    "2.44 aarch64",
)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_main_arena_goes_on_behind_memory_of_another_caller_of_sbrk(
    name: str, machine_name: str, seed: int, tmp_path: Path
) -> None:
    process = build_process(release(name, machine_name), Shape(sub_heaps=(2,), interruption="foreign_sbrk"), seed)
    heap = assert_read_in_full(process, tmp_path)
    assert heap.main_arena is not None
    # What malloc skips to align its fenceposts and its next chunk goes with the foreign area.
    machine = process.machine
    assert heap.main_arena.foreign_bytes == 0x2000 + 2 * (machine.alignment - machine.header_bytes)
    assert heap.main_arena.is_contiguous is True


@some(
    "2.12-stock",
    "2.19 i386",
    "2.23",
    "2.24",
    "2.31",
    "2.36",
    "2.43",
    "2.23 i386",
    "2.26 i386",
    "2.36 i386",
    "2.42 i386",
    "2.44 i386",
    "2.17 aarch64",
    "2.36 aarch64",
    "2.44 aarch64",
)
def test_main_arena_goes_on_in_a_mapping_when_brk_failed(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), Shape(sub_heaps=(2,), interruption="mmap_fallback"))
    heap = assert_read_in_full(process, tmp_path)
    assert heap.main_arena is not None
    assert heap.main_arena.is_contiguous is False
    kinds = [region.kind for region in heap.chunks.regions if region.arena == heap.main_arena.index]
    assert kinds == [RegionKind.BRK, RegionKind.MMAP_PIECE]


def heaps_of_huge_pages() -> Iterator[Any]:
    """Releases, machines and the huge pages that they have; from 2.42 on none larger than the heap maximum are used."""
    for machine_name, pages, names in (
        ("x86_64", (2, 1024), ("2.35", "2.38", "2.41")),
        ("x86_64", (2,), ("2.42", "2.43", "2.44")),
        ("i386", (2, 4), ("2.35", "2.41")),
        ("aarch64", (2, 32, 512, 1024), ("2.35", "2.41")),
        ("aarch64", (2, 32), ("2.42", "2.44")),
    ):
        for name in names:
            for mebibytes in pages:
                yield pytest.param(name, machine_name, mebibytes << 20, id=f"{name}-{machine_name}-{mebibytes}MiB")


@pytest.mark.parametrize(("name", "machine_name", "huge_page_bytes"), list(heaps_of_huge_pages()))
def test_heaps_of_huge_pages(name: str, machine_name: str, huge_page_bytes: int, tmp_path: Path) -> None:
    """glibc.malloc.hugetlb: the heap maximum is four huge pages from 2.35 to 2.41, constant from then on."""
    of = release(name, machine_name)
    follows = of.constants["heap_max_follows_hugetlb"]
    process = build_process(of, Shape(sub_heaps=(3, 1), huge_page_bytes=huge_page_bytes, filled_bytes=0x4000))
    heap = assert_read_in_full(process, tmp_path)
    assert heap.main_arena is not None
    assert heap.main_arena.is_contiguous is False
    reserved = {sub.reserved_bytes for arena in heap.arenas for sub in arena.sub_heaps}
    assert reserved == {4 * huge_page_bytes if follows else of.machine.sub_heap_reserve}
    assert heap.parameters is not None
    assert heap.parameters.value("hp_pagesize") == huge_page_bytes


@some("2.22", "2.22-branch", "2.36", "2.22 i386", "2.36 i386", "2.43", "2.22 aarch64", "2.44 aarch64")
def test_arena_that_no_thread_uses_is_on_the_free_list(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), Shape(sub_heaps=(2, 1), arenas_without_thread=1))
    heap = assert_read_in_full(process, tmp_path)
    unused = next(arena for arena in heap.arenas if arena.address == process.arenas[2].state_address)
    assert unused.threads == ()
    assert unused.on_free_list is (
        True if "attached_threads" in process.release.offsets("malloc_state") else None
    )  # attached_threads came with 2.23


@some("2.26", "2.31", "2.36", "2.41", "2.36 i386", "2.31 aarch64", "2.41 aarch64")
def test_caches_of_threads_that_fork_left_behind_are_found(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), Shape(sub_heaps=(2, 1)))
    vanished = process.threads.pop()
    for arena in process.arenas[1:]:
        users = sum(thread.arena == arena.state_address for thread in process.threads)
        process.put_field("malloc_state", arena.state_address, "attached_threads", users)
    heap = process.analyze(tmp_path).heap
    assert states_of(heap) == process.truth
    assert heap is not None
    assert {cache.thread for cache in heap.thread_caches if cache.address == vanished.tcache} == {None}


@some("2.22 i386", "2.36", "2.36 i386", "2.43", "2.43 i386", "2.36 aarch64", "2.44 aarch64")
def test_memalign_leaves_headers_anywhere_in_a_mapping(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), Shape(mmapped_leads=(0, 0x1000, 0x800, 0x4000)))
    assert_read_in_full(process, tmp_path)


@some("2.43", "2.44", "2.43 i386", "2.44 i386", "2.43 aarch64", "2.44 aarch64")
def test_mmapped_chunk_in_a_tcache_is_cached(name: str, machine_name: str, tmp_path: Path) -> None:
    """From 2.43 free() caches mmapped chunks, too, when tcache_max was raised (fact sheet, 4.1)."""
    process = build_process(release(name, machine_name))
    mmapped = process.builder.heap.mmapped[0]
    put_on_large_list(process, [mmapped])
    heap = assert_read_in_full(process, tmp_path)
    assert heap.mmapped_totals[ChunkState.TCACHE].count == 1
    assert heap.mmapped_count == 1


@some(
    "2.42",
    "2.42-branch",
    "2.43",
    "2.44",
    "2.42 i386",
    "2.42-branch i386",
    "2.43 i386",
    "2.44 i386",
    "2.42 aarch64",
    "2.44 aarch64",
)
def test_large_bins_of_tcaches_hold_a_range_of_sizes(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), Shape(main_bytes=0x20000, mix=Mix(largest=4000, typical=1200)))
    chunks = [chunk for segment in process.builder.heap.segments for chunk in segment.of_state(IN_USE)]
    for low, high in ((1056, 2047), (2048, 4095)):
        members = sorted((chunk for chunk in chunks if low <= chunk.chunk_bytes <= high), key=lambda c: c.chunk_bytes)
        assert members
        put_on_large_list(process, members[:5])
    assert_read_in_full(process, tmp_path)


def put_on_large_list(process: BuiltProcess, members: list[BuiltChunk]) -> None:
    """Puts chunks of one power of two, in ascending order, on a large list of the first thread's tcache (2.42+)."""
    machine, of = process.machine, process.release
    number = of.tcache_number(members[0].chunk_bytes)
    assert {of.tcache_number(chunk.chunk_bytes) for chunk in members} == {number}
    head = link_singly(
        process.builder.memory, machine, members, to_payload=True, safe_linking=True, key=process.tcache_key
    )
    fields = of.offsets("tcache_perthread_struct")
    address = process.threads[0].tcache
    process.put(address + fields["num_slots"] + 2 * number, of.constants["tcache_default_fill"] - len(members), 2)
    process.put(address + fields["entries"] + machine.word_bytes * number, head)
    process.put_field("malloc_par", process.mp, "tcache_max_bytes", 4 << 20)
    for chunk in members:
        chunk.state = TCACHE
    process.lists.append(BuiltList(TCACHE, number, head, 0, members))
