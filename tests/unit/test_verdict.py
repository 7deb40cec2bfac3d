"""Where the memory went is as sure as the heap is whole: damage, gaps and missing bytes lower it, and say so."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import coreheap
from coreheap.checks import Case
from coreheap.doubts import GAPS_NAMED, gap_consequences, heap_doubts
from coreheap.evidence import Anomaly, Confidence, Gap, Strength
from coreheap.heap import UnattributedRange
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.quantities import AddressRange
from coreheap.report import VerdictItem
from coreheap.verdict import memory_verdict
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.cases import arena_of, totals_of, with_arenas, without_heap
from tests.unit.checks.conftest import CaseOf, case_of

MIB = 1 << 20
PROCESS = build_process(release("2.36"))
COUNTED_BY_CHUNKS = {"in_use", "retained_free", "mmapped_chunks", "unknown", "not_malloc"}
CERTAIN, STRONG, PLAUSIBLE, WEAK = Confidence.CERTAIN, Confidence.STRONG, Confidence.PLAUSIBLE, Confidence.WEAK

__all__ = ["case_of"]  # a fixture


@pytest.fixture
def sound(case_of: CaseOf) -> Case:
    """A whole heap of one arena, found for certain, in the core of a built process."""
    case = with_arenas(case_of(PROCESS), arena_of(1, in_use=8 * MIB, top=2 * MIB))
    assert case.mappings is not None
    # The arena is larger than the built process: what was in memory is asked for in tests of their own.
    mappings = dataclasses.replace(case.mappings, basis=ResidencyBasis.UNKNOWN, supposed_bytes={})
    case = dataclasses.replace(case, mappings=mappings)
    return changed(
        case, gaps=(), anomaly_count=0, identity=dataclasses.replace(heap_of(case).identity, confidence=CERTAIN)
    )


def heap_of(case: Case) -> coreheap.HeapSnapshot:
    assert case.heap is not None
    return case.heap


def changed(case: Case, **changes: Any) -> Case:
    """The case with fields of its heap changed; the case's gaps are those of the heap."""
    heap = dataclasses.replace(heap_of(case), **changes)
    return dataclasses.replace(case, heap=heap, gaps=heap.gaps)


def verdict_on(case: Case) -> dict[str, VerdictItem]:
    assert case.mappings is not None
    return {item.topic: item for item in memory_verdict(case.core, case.mappings, case.heap, (), case.gaps)}


def by_chunks(case: Case) -> set[Confidence]:
    """How sure the parts that are counted by chunks are; the others must not have changed."""
    items = verdict_on(case)
    assert {"in_use", "retained_free", "thread_stacks", "module_data"} <= set(items)
    for topic, item in items.items():
        assert (item.confidence is CERTAIN) == (not item.weakened_by), topic
        assert item.confidence is CERTAIN or topic in COUNTED_BY_CHUNKS
    return {item.confidence for topic, item in items.items() if topic in COUNTED_BY_CHUNKS}


def hole(byte_count: int, cause: str = "unproven") -> UnattributedRange:
    return UnattributedRange(AddressRange(0x1000, 0x1000 + byte_count), cause)


def test_of_a_sound_heap_all_is_certain(sound: Case) -> None:
    assert by_chunks(sound) == {CERTAIN}


def test_what_is_no_damage_lowers_nothing(sound: Case) -> None:
    """A thread inside malloc, and memory between the arena's pieces that another caller of sbrk took."""
    arena = dataclasses.replace(
        arena_of(1, in_use=8 * MIB, top=2 * MIB), locked=True, unattributed=(hole(MIB, "foreign_sbrk"),)
    )
    assert by_chunks(with_arenas(sound, arena)) == {CERTAIN}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"anomaly_count": 1}, "1 contradictions"),
        ({"gaps": (Gap("arena_not_saved", "its free lists are unknown"),)}, "arena_not_saved"),
        ({"gaps": (Gap("sub_heap_not_saved", "older heaps are unknown"),)}, "sub_heap_not_saved"),
        ({"gaps": (Gap("heap_unproven", "chunks cannot be told"),)}, "heap_unproven"),
        ({"gaps": (Gap("tcache_not_found", "cached blocks may count as in use"),)}, "tcache_not_found"),
    ],
)
def test_each_doubt_costs_a_step_and_is_said(sound: Case, changes: dict[str, Any], said: str) -> None:
    case = changed(sound, **changes)
    assert by_chunks(case) == {STRONG}
    assert any(said in reason for reason in verdict_on(case)["in_use"].weakened_by)


@pytest.mark.parametrize(
    ("byte_count", "expected"),
    [(16, STRONG), (MIB, STRONG), (10 * MIB // 9, STRONG), (10 * MIB // 9 + 16, PLAUSIBLE), (90 * MIB, PLAUSIBLE)],
)
def test_much_without_chunks_weighs_more(sound: Case, byte_count: int, expected: Confidence) -> None:
    """From a tenth of the heap on: 10 MiB are in chunks."""
    arena = dataclasses.replace(arena_of(1, in_use=8 * MIB, top=2 * MIB), unattributed=(hole(byte_count),))
    assert by_chunks(with_arenas(sound, arena)) == {expected}


def test_much_damage_weighs_more(sound: Case) -> None:
    little, much = (
        totals_of(in_use=8 * MIB, top=2 * MIB, damaged=MIB),
        totals_of(in_use=8 * MIB, top=MIB, damaged=2 * MIB),
    )
    assert by_chunks(changed(sound, totals=little, anomaly_count=1)) == {STRONG}
    assert by_chunks(changed(sound, totals=much, anomaly_count=1)) == {PLAUSIBLE}


def test_arenas_of_unknown_coverage(sound: Case) -> None:
    for coverage in (None, 0.999):
        case = with_arenas(sound, arena_of(1, coverage=coverage, in_use=8 * MIB, top=2 * MIB))
        assert by_chunks(case) == {STRONG}


def test_doubts_add_up_and_none_is_worse_than_weak(sound: Case) -> None:
    gap = Gap("arena_not_saved", "its free lists are unknown")
    assert by_chunks(changed(sound, anomaly_count=9, gaps=(gap,))) == {PLAUSIBLE}
    everything = with_arenas(sound, arena_of(1, coverage=None, in_use=8 * MIB, top=2 * MIB))
    assert by_chunks(changed(everything, anomaly_count=9, gaps=(gap, gap))) == {WEAK}


def test_a_heap_that_was_found_less_surely_caps_all(sound: Case) -> None:
    identity = dataclasses.replace(heap_of(sound).identity, confidence=STRONG)
    case = changed(sound, identity=identity)
    assert {item.confidence for item in verdict_on(case).values()} == {STRONG}
    lower = verdict_on(changed(case, anomaly_count=1))
    assert (lower["in_use"].confidence, lower["thread_stacks"].confidence) == (PLAUSIBLE, STRONG)
    assert {item.confidence for item in verdict_on(without_heap(sound)).values()} == {WEAK}


def test_gaps_of_the_core_lower_what_they_touch(sound: Case) -> None:
    def confidence(cause: str) -> dict[str, Confidence]:
        case = dataclasses.replace(sound, gaps=(Gap(cause, "x"),))
        return {topic: item.confidence for topic, item in verdict_on(case).items()}

    assert set(confidence("segments_overlap").values()) == {STRONG}
    of_threads = confidence("threads_missing")
    assert {topic for topic, found in of_threads.items() if found is STRONG} == {"thread_stacks", "not_malloc"}
    assert set(confidence("process_note_missing").values()) == {CERTAIN}


def test_doubts_are_counter_evidence(sound: Case) -> None:
    assert heap_doubts(heap_of(sound)) == ()
    anomaly = Anomaly("broken_chunk", 0x5000, "a size", "0")
    doubts = heap_doubts(heap_of(changed(sound, anomalies=(anomaly,), anomaly_count=1)))
    assert [(doubt.fact.speaks_against, doubt.fact.strength) for doubt in doubts] == [(True, Strength.HINT)]


def test_consequences_of_gaps_are_few_whatever_their_number(sound: Case) -> None:
    gaps = tuple(Gap("heap_not_saved", f"{number} bytes") for number in range(1000))
    said = list(gap_consequences(heap_of(changed(sound, gaps=(*gaps, *gaps)))))
    assert len(said) == GAPS_NAMED + 1
    assert said[-1] == "and 995 more gaps of the heap"
    assert list(gap_consequences(heap_of(changed(sound, gaps=gaps[:GAPS_NAMED])))) == [f"{n} bytes" for n in range(5)]


def of_mappings(
    *parts: tuple[MappingKind, int, int, int], supposed: dict[MappingKind, int] | None = None
) -> MappingTable:
    """Mappings by kind with committed bytes, and at least and at most so many in memory."""
    kinds, committed, low, high = zip(*parts, strict=True)
    start = np.arange(len(parts), dtype=np.uint64) << np.uint64(40)
    size = np.array(committed, np.uint64)
    nobody = np.full(len(parts), -1, np.int32)
    return MappingTable(
        start=start,
        end=start + size,
        kind=np.array([KINDS.index(kind) for kind in kinds], np.uint8),
        flags=np.full(len(parts), 6, np.uint8),
        thread=nobody,
        arena=nobody,
        name=nobody,
        committed_bytes=size,
        saved_bytes=size,
        resident_low=np.array(low, np.uint64),
        resident_high=np.array(high, np.uint64),
        names=(),
        basis=ResidencyBasis.ZERO_PAGES,
        supposed_bytes=supposed or {},
    )


def items_of(case: Case, mappings: MappingTable) -> tuple[VerdictItem, ...]:
    return memory_verdict(case.core, mappings, None, (), ())


STACK, DATA, OTHER = MappingKind.THREAD_STACK, MappingKind.MODULE_DATA, MappingKind.UNEXPLAINED


def test_what_surely_was_in_memory_leads(sound: Case) -> None:
    """200 idle threads: their stacks are reserved, and a core without holes tells no more than bounds."""
    reserved = (STACK, 1600 * MIB, 2 * MIB, 1600 * MIB)
    first, second, *_ = items_of(sound, of_mappings(reserved, (DATA, 200 * MIB, 200 * MIB, 200 * MIB)))
    assert (first.topic, second.topic) == ("module_data", "thread_stacks")
    assert any("which part took most is not certain" in reason for reason in first.weakened_by)
    assert (first.of_resident_low, first.of_resident_high) == (202 * MIB, 1800 * MIB)


def test_nothing_doubts_the_first_where_no_other_can_have_more(sound: Case) -> None:
    first, *_ = items_of(sound, of_mappings((STACK, 90 * MIB, MIB, 90 * MIB), (DATA, 200 * MIB, 190 * MIB, 200 * MIB)))
    assert (first.topic, first.weakened_by) == ("module_data", ())


def test_where_hardly_anything_is_known_what_may_have_been_decides(sound: Case) -> None:
    parts = (DATA, 100 * MIB, 0, 100 * MIB), (OTHER, 40 * MIB, 4096, 40 * MIB), (STACK, 900 * MIB, 8192, 900 * MIB)
    order = [item.topic for item in items_of(sound, of_mappings(*parts))]
    assert order[0] == "module_data"  # of stacks most is only reserved
    assert order.index("unknown" if "unknown" in order else "not_malloc") < order.index("thread_stacks")


def test_a_reservation_that_nobody_touched_does_not_hide_what_is_known(sound: Case) -> None:
    """80 GiB of MAP_NORESERVE, of which a page was there: 2 MiB that surely were in memory lead, not bounds of 0 to 3 MiB."""
    reserved = (OTHER, 80 << 30, 4096, 4096)
    live, perhaps = (STACK, 2 * MIB, 2 * MIB, 2 * MIB), (DATA, 3 * MIB, 0, 3 * MIB)
    first, *_ = items_of(sound, of_mappings(reserved, live, perhaps))
    assert first.topic == "thread_stacks"


def test_a_large_reservation_that_may_have_been_used_leads_with_doubt(sound: Case) -> None:
    """Go's runtime, dumped by gdb: 630 MiB of which 1 MiB surely was in memory, beside 14 MiB that surely were."""
    reserved, known, other = (
        (OTHER, 630 * MIB, MIB, 630 * MIB),
        (DATA, 16 * MIB, 14 * MIB, 16 * MIB),
        (STACK, 64 * MIB, 8192, 63 * MIB),
    )
    first, second, *_ = items_of(sound, of_mappings(reserved, known, other))
    assert first.bytes == 630 * MIB
    assert any("which part took most is not certain" in reason for reason in first.weakened_by)
    assert second.topic == "module_data"


FILE, SHARED = MappingKind.MAPPED_FILE, MappingKind.SHARED_MEMORY


def test_written_copies_of_files_are_memory_of_the_program(sound: Case) -> None:
    parts = (FILE, 300 * MIB, 0, 300 * MIB), (DATA, 3 * MIB, MIB, 3 * MIB)
    table = of_mappings(*parts)
    first, *_ = items_of(sound, table)
    assert (first.topic, first.bytes, first.of_bytes) == ("written_files", 300 * MIB, 303 * MIB)
    assert any("does not tell private mappings" in reason for reason in first.weakened_by)
    # What the core does not hold nobody wrote to, or is the file's; what is not writable is no copy.
    for unwritten in (
        dataclasses.replace(table, saved_bytes=np.array([0, 3 * MIB], np.uint64)),
        dataclasses.replace(table, flags=np.array([4, 6], np.uint8)),
        dataclasses.replace(table, flags=np.array([8, 6], np.uint8)),
    ):
        items = items_of(sound, unwritten)
        assert [(item.topic, item.of_bytes) for item in items] == [("module_data", 3 * MIB)]


def test_much_shared_memory_is_a_whole_of_its_own(sound: Case) -> None:
    data = DATA, 100 * MIB, 100 * MIB, 100 * MIB
    little, much = (of_mappings(data, (SHARED, count * MIB, 0, count * MIB)) for count in (4, 400))
    assert [item.topic for item in items_of(sound, little)] == ["module_data"]
    first, shared = items_of(sound, much)
    assert (first.topic, first.of_bytes, first.of_resident_high) == ("module_data", 100 * MIB, 100 * MIB)
    assert (shared.topic, shared.whole, shared.bytes, shared.of_bytes) == (
        "shared_memory",
        "writable_shared",
        400 * MIB,
        400 * MIB,
    )
    assert (shared.resident_low, shared.resident_high) == (0, 400 * MIB)
    assert items_of(sound, dataclasses.replace(much, flags=np.array([6, 4], np.uint8)))[1:] == ()


def test_what_is_told_by_its_place_alone_is_doubted(sound: Case) -> None:
    def confidence(supposed: int) -> Confidence:
        case = dataclasses.replace(sound, gaps=())
        part = of_mappings((STACK, 100 * MIB, 100 * MIB, 100 * MIB), supposed={STACK: supposed})
        return memory_verdict(case.core, part, case.heap, (), ())[0].confidence

    assert (confidence(0), confidence(MIB), confidence(50 * MIB)) == (CERTAIN, STRONG, PLAUSIBLE)
