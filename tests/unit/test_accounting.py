"""The ledger: every mapped byte in exactly one leaf, whatever the heap claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coreheap
from coreheap.accounting import Claims, build_ledger, inside
from coreheap.corefile.kinds import RegionLabel
from coreheap.heap import Arena, HeapSnapshot, UnattributedRange
from coreheap.quantities import AddressRange
from coreheap.report import LedgerNode
from tests.core_builder import CoreBuilder
from tests.heap_builder import PAGE
from tests.unit.allocators.built_process import (
    THREADS,
    BuiltProcess,
    build_process,
    leaves_of,
    mapped_bytes_of,
    release,
)

# Claims


def claimed(claims: Claims, label: str) -> list[tuple[int, int]]:
    start, end = claims.sorted_ranges(label)
    return list(zip(start.tolist(), end.tolist(), strict=True))


def test_overlapping_claims_of_one_label_are_counted_once() -> None:
    claims = Claims()
    claims.add("a", [100, 10], [200, 50])
    claims.add("a", [40, 150, 10], [120, 160, 20])
    assert claimed(claims, "a") == [(10, 50), (50, 120), (120, 200)]


def test_empty_claims_are_none() -> None:
    claims = Claims()
    claims.add("a", [], [])
    claims.add("a", [7, 9], [7, 5])
    assert claimed(claims, "a") == []


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=12)


@given(ranges)
def test_claims_cover_what_was_claimed_without_overlap(rows: list[tuple[int, int]]) -> None:
    claims = Claims()
    claims.add("a", [start for start, _ in rows], [start + size for start, size in rows])
    pieces = claimed(claims, "a")
    assert all(before[1] <= after[0] for before, after in pairwise(pieces))
    wanted = {byte for start, size in rows for byte in range(start, start + size)}
    assert {byte for start, end in pieces for byte in range(start, end)} == wanted
    assert sum(end - start for start, end in pieces) == len(wanted)


@given(ranges, st.lists(st.integers(0, 100), max_size=8))
def test_inside_names_the_range_that_holds_an_address(rows: list[tuple[int, int]], addresses: list[int]) -> None:
    claims = Claims()
    claims.add("a", [start for start, _ in rows], [start + size for start, size in rows])
    start, end = claims.sorted_ranges("a")
    found = inside(start, end, np.array(addresses, np.uint64)).tolist()
    pieces = claimed(claims, "a")
    holders = [[row for row, piece in enumerate(pieces) if piece[0] <= address < piece[1]] for address in addresses]
    assert found == [holder[0] if holder else -1 for holder in holders]


# Nodes


def test_a_node_is_the_sum_of_its_children() -> None:
    node = LedgerNode.of("all", LedgerNode("a", 3), LedgerNode.of("b", LedgerNode("c", 4), LedgerNode("d", 5)))
    assert node.bytes == 12
    assert node.child("b", "d").bytes == 5
    with pytest.raises(KeyError, match="b has no x"):
        node.child("b", "x")


def assert_sums(node: LedgerNode, mapped: int) -> None:
    assert node.bytes == mapped
    pending = [node]
    while pending:
        current = pending.pop()
        if current.children:
            assert current.bytes == sum(child.bytes for child in current.children)
            names = [child.name for child in current.children]
            assert len(set(names)) == len(names)
            pending += current.children
    assert sum(leaf.bytes for leaf in leaves_of(node)) == mapped


# The address space without a heap


def test_each_kind_of_memory_has_its_leaf(tmp_path: Path) -> None:
    process = build_process(release("2.36"), THREADS)
    with coreheap.open(process.write(tmp_path)) as core:
        ledger = build_ledger(core, None)
        assert_sums(ledger, mapped_bytes_of(core))
    assert [child.name for child in ledger.children] == [label.name.lower() for label in RegionLabel]
    assert ledger.child("module_text").bytes == 0x1000 + 0x2000  # program and libc
    assert ledger.child("module_data").bytes == 0x1000 + 0x2000
    assert ledger.child("module_bss").bytes == 0x2000
    threads = len(process.threads)
    assert ledger.child("thread_stacks").bytes == 0x4000 * threads
    guards = PAGE * (threads - 1)
    tails = sum(end - start for start, end, flags in process.unsaved if flags == "---") - guards
    assert ledger.child("no_access").bytes == guards + tails


def test_empty_core_has_an_empty_ledger(tmp_path: Path) -> None:
    with coreheap.open(CoreBuilder().write(tmp_path / "core")) as core:
        ledger = build_ledger(core, None)
    assert ledger.bytes == 0
    assert {leaf.bytes for leaf in leaves_of(ledger)} == {0}


# The heap's claims


@pytest.fixture(scope="module")
def process() -> BuiltProcess:
    return build_process(release("2.36"), THREADS)


@pytest.fixture(scope="module")
def opened(
    process: BuiltProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[coreheap.Core, HeapSnapshot]]:
    with coreheap.open(process.write(tmp_path_factory.mktemp("core"))) as core:
        heap = coreheap.analyze(core).heap
        assert heap is not None
        yield core, heap


def test_malloc_has_every_byte_of_the_built_heap(
    process: BuiltProcess, opened: tuple[coreheap.Core, HeapSnapshot]
) -> None:
    core, heap = opened
    ledger = build_ledger(core, heap)
    assert_sums(ledger, mapped_bytes_of(core))
    malloc = ledger.child("malloc")
    segments = [segment for arena in process.arenas[1:] for segment in arena.segments]
    for state in ("in_use", "tcache", "fastbin", "unsorted_bin", "small_bin", "large_bin", "top", "fencepost"):
        own = sum(chunk.chunk_bytes for chunk in process.caches[1:]) if state == "in_use" else 0
        wanted = sum(chunk.chunk_bytes for segment in segments for chunk in segment.of_state(state)) - own
        assert malloc.child("other_arenas", state).bytes == wanted, state
    sub_heaps = sum(len(arena.sub_heaps) for arena in process.arenas)
    committed = THREADS.sub_heap_bytes * sub_heaps
    chunks = sum(segment.end - segment.start for segment in segments)
    assert malloc.child("other_arenas", "headers").bytes == committed - chunks
    assert malloc.child("other_arenas", "reserve").bytes == (64 << 20) * sub_heaps - committed
    assert malloc.child("other_arenas", "unexplained").bytes == 0
    assert malloc.child("main_arena").bytes == THREADS.main_bytes
    mapped = sum(size for _, size in process.builder.heap.mmapped_mappings)
    assert malloc.child("mmapped_chunks").bytes == mapped
    usable = sum(chunk.chunk_bytes - 16 for chunk in process.builder.heap.mmapped)
    assert malloc.child("mmapped_chunks", "in_use").bytes == usable
    assert malloc.child("mmapped_chunks", "overhead").bytes == mapped - usable


def test_a_cause_that_is_unattributed_has_a_leaf_of_its_own(opened: tuple[coreheap.Core, HeapSnapshot]) -> None:
    core, heap = opened
    main = heap.arenas[0]
    region = heap.chunks.regions[main.regions[0]]
    assert main.brk_range is not None
    part = AddressRange(main.brk_range.end - PAGE, main.brk_range.end)
    # The last page has no chunks this time.
    shorter = dataclasses.replace(region, range=AddressRange(region.range.start, part.start))
    others = tuple(other for other in heap.chunks.regions if other is not region)
    for cause in ("not_saved", "truncated", "unproven", "foreign_sbrk"):
        changed = dataclasses.replace(
            heap,
            arenas=(dataclasses.replace(main, unattributed=(UnattributedRange(part, cause),)), *heap.arenas[1:]),
            chunks=dataclasses.replace(heap.chunks, regions=(shorter, *others)),
        )
        ledger = build_ledger(core, changed)
        assert_sums(ledger, mapped_bytes_of(core))
        assert ledger.child("malloc", "main_arena", cause).bytes == PAGE
        assert ledger.child("malloc", "main_arena").bytes == THREADS.main_bytes


def test_what_nothing_claims_of_the_brk_range_is_unexplained(opened: tuple[coreheap.Core, HeapSnapshot]) -> None:
    core, heap = opened
    main = heap.arenas[0]
    assert main.brk_range is not None
    # The ledger has a mapping for it only as far as memory is mapped: nothing lies behind the heap.
    longer = dataclasses.replace(main, brk_range=AddressRange(main.brk_range.start, main.brk_range.end + PAGE))
    ledger = build_ledger(core, dataclasses.replace(heap, arenas=(longer, *heap.arenas[1:])))
    assert_sums(ledger, mapped_bytes_of(core))
    assert ledger.child("malloc", "main_arena", "unexplained").bytes == 0
    without_region = dataclasses.replace(heap, chunks=dataclasses.replace(heap.chunks, regions=heap.chunks.regions[1:]))
    ledger = build_ledger(core, without_region)
    assert_sums(ledger, mapped_bytes_of(core))
    assert ledger.child("malloc", "main_arena").bytes == THREADS.main_bytes


def lying_arena(arena: Arena, cuts: list[tuple[int, int, str]], shift: int, growth: int) -> Arena:
    """The arena with unattributed ranges anywhere and sub-heaps that are elsewhere and larger than they are."""
    parts = tuple(UnattributedRange(AddressRange(start, start + size), cause) for start, size, cause in cuts)
    sub_heaps = tuple(
        dataclasses.replace(
            sub_heap,
            address=sub_heap.address + shift,
            committed_bytes=sub_heap.committed_bytes + growth,
            reserved_bytes=sub_heap.reserved_bytes + growth,
        )
        for sub_heap in arena.sub_heaps
    )
    brk = arena.brk_range and AddressRange(arena.brk_range.start + shift, arena.brk_range.end + shift + growth)
    return dataclasses.replace(arena, unattributed=parts, sub_heaps=sub_heaps, brk_range=brk)


BASES = (0x5555_5557_9000, 0x7FFF_E400_0000, 0x7FFF_E800_0000, 0x7FFF_F000_0000, 0x7FFF_F500_0000, 0)
causes = st.sampled_from(["not_saved", "truncated", "unproven", "foreign_sbrk"])
cut = st.tuples(
    st.sampled_from(BASES).flatmap(lambda base: st.integers(base, base + 0x9000)), st.integers(0, 0x20000), causes
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(cut, max_size=6), st.integers(0, 0x20000), st.integers(0, 1 << 27))
def test_leaves_add_up_whatever_the_heap_claims(
    opened: tuple[coreheap.Core, HeapSnapshot], cuts: list[tuple[int, int, str]], shift: int, growth: int
) -> None:
    core, heap = opened
    arenas = tuple(lying_arena(arena, cuts[number::3], shift, growth) for number, arena in enumerate(heap.arenas))
    ledger = build_ledger(core, dataclasses.replace(heap, arenas=arenas))
    assert_sums(ledger, mapped_bytes_of(core))
