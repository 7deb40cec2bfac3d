"""The ledger: every mapped byte in exactly one leaf, whatever the heap claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coreheap
import coreheap.analysis
from coreheap.accounting import Claims, account_for_memory, build_ledger
from coreheap.accounting.ledger import NODES
from coreheap.accounting.pieces import NO_CLAIM, cut_into_pieces
from coreheap.heap import Arena, ChunkState, HeapSnapshot, UnattributedRange
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
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

# Claims and pieces


def pieces_of(regions: list[tuple[int, int]], claims: Claims) -> list[tuple[int, int, int, int]]:
    """Start, end, region and claim of each piece."""
    start, end = (np.array([region[side] for region in regions], np.uint64) for side in (0, 1))
    pieces = cut_into_pieces(start, end, claims.columns())
    columns = (pieces.start, pieces.end, pieces.region, pieces.claim)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def test_the_earlier_claim_keeps_the_bytes() -> None:
    claims = Claims()
    claims.add(MappingKind.TLS, [100, 10], [200, 50], thread=[3, 4])
    claims.add(MappingKind.JAVA_HEAP, 0, 150, name="vm")
    assert pieces_of([(0, 120), (120, 300)], claims) == [
        (0, 10, 0, 2),
        (10, 50, 0, 1),
        (50, 100, 0, 2),
        (100, 120, 0, 0),
        (120, 150, 1, 0),
        (150, 200, 1, 0),
        (200, 300, 1, NO_CLAIM),
    ]
    columns = claims.columns()
    assert columns.thread.tolist() == [3, 4, -1]
    assert [KINDS[kind] for kind in columns.kind] == [MappingKind.TLS, MappingKind.TLS, MappingKind.JAVA_HEAP]
    assert (columns.name.tolist(), claims.names) == ([-1, -1, 0], ["vm"])


def test_empty_claims_are_none_and_any_number_is_an_address() -> None:
    claims = Claims()
    claims.add(MappingKind.TLS, [], [])
    claims.add(MappingKind.TLS, [7, 9], [7, 5], thread=[1, 2])
    claims.add(MappingKind.TLS, -5, 1 << 70)
    columns = claims.columns()
    assert columns.start.tolist() == [0]
    assert columns.end.tolist() == [(1 << 64) - 1]


ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=12)
gaps_and_sizes = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 20)), max_size=8)


@given(gaps_and_sizes, st.lists(ranges, max_size=4))
def test_pieces_tile_the_regions_and_name_the_first_claim(
    layout: list[tuple[int, int]], calls: list[list[tuple[int, int]]]
) -> None:
    regions, position = [], 0
    for gap, size in layout:
        regions.append((position + gap, position + gap + size))
        position += gap + size
    claims = Claims()
    for rows in calls:
        claims.add(MappingKind.TLS, [start for start, _ in rows], [start + size for start, size in rows])
    made = [(start, start + size) for rows in calls for start, size in rows if size]
    pieces = pieces_of(regions, claims)
    assert all(before[1] <= after[0] for before, after in pairwise(pieces))
    told = {byte: (region, claim) for start, end, region, claim in pieces for byte in range(start, end)}
    expected = {
        byte: (
            number,
            next((row for row, (low, high) in enumerate(made) if low <= byte < high), NO_CLAIM),
        )
        for number, (start, end) in enumerate(regions)
        for byte in range(start, end)
    }
    assert told == expected


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
        assert current.bytes >= 0, current.name
        if current.children:
            assert current.bytes == sum(child.bytes for child in current.children)
            names = [child.name for child in current.children]
            assert len(set(names)) == len(names)
            pending += current.children
            for number in ("committed_bytes", "saved_bytes", "resident_low", "resident_high"):
                parts = [getattr(child, number) for child in current.children]
                if None not in parts:
                    assert getattr(current, number) == sum(parts)
    assert sum(leaf.bytes for leaf in leaves_of(node)) == mapped


def assert_same_bytes(table: MappingTable, ledger: LedgerNode) -> None:
    """The table has no overlap, and by kind the bytes that the ledger has."""
    assert bool((table.start < table.end).all())
    assert bool((table.start[1:] >= table.end[:-1]).all())
    assert bool((table.resident_low <= table.resident_high).all())
    assert bool((table.resident_high <= table.end - table.start).all())
    sums = {
        "bytes": table.end - table.start,
        "committed_bytes": table.committed_bytes,
        "saved_bytes": table.saved_bytes,
        "resident_low": table.resident_low,
        "resident_high": table.resident_high,
    }
    nodes = [(ledger.child(name), kinds) for name, kinds in NODES]
    if ledger.children[0].name == "malloc":
        nodes.append((ledger.child("malloc"), tuple(KINDS[:5])))
    for node, kinds in nodes:
        rows = np.isin(table.kind, [KINDS.index(kind) for kind in kinds])
        assert table.bytes_of(*kinds) == node.bytes
        for number, column in sums.items():
            assert getattr(node, number) == int(column[rows].sum()), (node.name, number)


# The address space without a heap


def test_each_kind_of_memory_has_its_leaf(tmp_path: Path) -> None:
    process = build_process(release("2.36"), THREADS)
    with coreheap.open(process.write(tmp_path)) as core:
        ledger = build_ledger(core, None)
        assert_sums(ledger, mapped_bytes_of(core))
    assert [child.name for child in ledger.children] == [name for name, _ in NODES]
    assert sorted((kind for _, kinds in NODES for kind in kinds), key=KINDS.index) == list(KINDS[5:])
    assert ledger.child("module_text").bytes == 0x1000 + 0x2000  # program and libc
    assert ledger.child("module_data").bytes == 0x1000 + 0x2000
    assert ledger.child("module_bss").bytes == 0x2000
    threads = len(process.threads)
    stacks = ledger.child("thread_stacks")
    guards = PAGE * (threads - 1)
    assert stacks.child("stack_guard").bytes == guards
    # The main thread's descriptor lies in a mapping of the dynamic linker's, those of the others in their stacks.
    assert stacks.bytes == 0x4000 * threads + guards + stacks.child("tls").bytes // threads
    tails = sum(end - start for start, end, flags in process.unsaved if flags == "---") - guards
    assert ledger.child("no_access").bytes == tails


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        # As /proc/self/maps and NT_FILE show them: mmap(MAP_PRIVATE) and mmap(MAP_SHARED) of the device.
        ("/dev/zero", MappingKind.UNEXPLAINED),
        ("/dev/zero (deleted)", MappingKind.SHARED_MEMORY),
        ("/memfd:buffers (deleted)", MappingKind.SHARED_MEMORY),
        ("/anon_hugepage (deleted)", MappingKind.UNEXPLAINED),
        ("/dev/zeroes", MappingKind.MAPPED_FILE),
    ],
)
def test_memory_that_the_kernel_names_a_file_for(path: str, kind: MappingKind, tmp_path: Path) -> None:
    builder = CoreBuilder().add_segment(0x10000, b"\x11" * PAGE).add_thread()
    builder.add_file_mapping(0x10000, 0x10000 + PAGE, 0, path)
    with coreheap.open(builder.write(tmp_path / "core")) as core:
        table = account_for_memory(core, None).mappings
    assert [KINDS[row] for row in table.kind.tolist()] == [kind]


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


def test_what_others_took_after_the_last_chunk_is_theirs_if_mallocs_sum_says_so(
    opened: tuple[coreheap.Core, HeapSnapshot],
) -> None:
    core, heap = opened
    main = heap.arenas[0]
    assert main.brk_range is not None
    shorter = AddressRange(main.brk_range.start, main.brk_range.end - 2 * PAGE)
    region = heap.chunks.regions[main.regions[0]]
    cut = dataclasses.replace(region, range=AddressRange(region.range.start, shorter.end))
    others = tuple(other for other in heap.chunks.regions if other is not region)
    chunks = dataclasses.replace(heap.chunks, regions=(cut, *others))

    def foreign_bytes(system_mem: int | None) -> tuple[int, int]:
        arena = dataclasses.replace(main, brk_range=shorter, system_mem=system_mem)
        changed = dataclasses.replace(heap, arenas=(arena, *heap.arenas[1:]), chunks=chunks)
        account = account_for_memory(core, changed)
        assert_sums(account.ledger, mapped_bytes_of(core))
        kinds = account.mappings.bytes_of(MappingKind.FOREIGN_SBRK)
        return kinds, account.mappings.supposed_bytes.get(MappingKind.FOREIGN_SBRK, 0)

    assert foreign_bytes(shorter.byte_count) == (2 * PAGE, 2 * PAGE)
    # Here malloc says that the two pages are its own, or nothing.
    assert foreign_bytes(main.system_mem) == (0, 0)
    assert foreign_bytes(None) == (0, 0)


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


def test_chunks_that_are_not_mapped_have_no_leaf(opened: tuple[coreheap.Core, HeapSnapshot]) -> None:
    """No leaf is below zero: the states are cut to what is mapped, and a gap has the difference."""
    core, heap = opened
    main = heap.arenas[0]
    assert main.brk_range is not None
    half = AddressRange(main.brk_range.start, main.brk_range.end - THREADS.main_bytes // 2)
    chunks = dataclasses.replace(heap.chunks, regions=heap.chunks.regions[1:])
    changed = dataclasses.replace(
        heap, arenas=(dataclasses.replace(main, brk_range=half), *heap.arenas[1:]), chunks=chunks
    )
    account = account_for_memory(core, changed)
    assert_sums(account.ledger, mapped_bytes_of(core))
    kept = account.ledger.child("malloc", "main_arena")
    assert kept.bytes == THREADS.main_bytes // 2
    assert kept.child("unexplained").bytes == 0
    (gap,) = account.gaps
    assert gap.cause == "chunks_not_mapped"
    assert account_for_memory(core, heap).gaps == ()


def test_mmapped_chunks_that_are_not_mapped_have_no_leaf(opened: tuple[coreheap.Core, HeapSnapshot]) -> None:
    core, heap = opened
    in_use = heap.mmapped_totals[ChunkState.IN_USE]
    more = dataclasses.replace(in_use, usable_bytes=in_use.usable_bytes + (1 << 40))
    account = account_for_memory(core, dataclasses.replace(heap, mmapped_totals={ChunkState.IN_USE: more}))
    assert_sums(account.ledger, mapped_bytes_of(core))
    assert [gap.cause for gap in account.gaps] == ["chunks_not_mapped"]


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
    account = account_for_memory(core, dataclasses.replace(heap, arenas=arenas))
    assert_sums(account.ledger, mapped_bytes_of(core))
    assert_same_bytes(account.mappings, account.ledger)


def test_each_mmapped_chunk_is_a_row_and_neighbours_of_one_kind_are_one(
    process: BuiltProcess, opened: tuple[coreheap.Core, HeapSnapshot]
) -> None:
    core, heap = opened
    table = account_for_memory(core, heap).mappings
    chunks = np.flatnonzero(table.kind == KINDS.index(MappingKind.MMAPPED_CHUNK))
    rows = list(zip(table.start[chunks].tolist(), (table.end - table.start)[chunks].tolist(), strict=True))
    assert rows == sorted(process.builder.heap.mmapped_mappings)
    sub_heaps = np.flatnonzero(table.kind == KINDS.index(MappingKind.ARENA_HEAP))
    assert len(sub_heaps) == sum(len(arena.sub_heaps) for arena in process.arenas)
    # What every other row and the next share they do not share all of.
    for row in range(len(table) - 1):
        if row not in chunks and table.start[row + 1] == table.end[row]:
            ours, next_ones = (
                [column[place] for column in (table.kind, table.flags, table.thread, table.arena, table.name)]
                for place in (row, row + 1)
            )
            assert ours != next_ones


def test_a_claimant_that_fails_costs_only_what_it_would_have_claimed(
    opened: tuple[coreheap.Core, HeapSnapshot],
) -> None:
    core, heap = opened
    failed = []

    def fail(core: coreheap.Core, claims: Claims) -> None:
        raise ValueError("a defect")

    def attempt(name: str, claim: Callable[[], None]) -> None:
        try:
            claim()
        except ValueError:
            failed.append(name)

    account = account_for_memory(core, heap, claimants=(("nothing", fail),), attempt=attempt)
    assert failed == ["nothing"]
    assert_sums(account.ledger, mapped_bytes_of(core))


@pytest.mark.parametrize("part", ["find_stacks", "account_for_memory", "thread_summaries"])
def test_a_part_that_fails_does_not_cost_the_report(
    part: str, process: BuiltProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {name: getattr(coreheap.analysis, name) for name in ("account_for_memory", "thread_summaries")}
    calls = []

    def fail(*arguments: object, **options: object) -> object:
        calls.append(options)
        if len(calls) > 1 and part in answers:
            return answers[part](*arguments, **options)
        raise OverflowError("a defect")

    monkeypatch.setattr(coreheap.analysis, part, fail)
    with coreheap.open(process.write(tmp_path)) as core:
        report = coreheap.analyze(core, coreheap.AnalysisOptions(leaks=False))
        mapped = mapped_bytes_of(core)
    assert len(report.defects) == 1
    assert "OverflowError" in report.defects[0]
    assert report.is_partial
    assert report.heap is not None
    assert report.ledger.bytes == mapped
    assert len(report.threads) == len(process.threads)


def test_without_residency_nothing_is_known_of_it(opened: tuple[coreheap.Core, HeapSnapshot]) -> None:
    core, heap = opened
    table = account_for_memory(core, heap, residency=False).mappings
    assert table.basis is ResidencyBasis.UNKNOWN
    assert int(table.resident_low.sum()) == 0
    assert table.resident_high.tolist() == (table.end - table.start).tolist()
