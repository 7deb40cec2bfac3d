"""PINNED-HEAP, FRAGMENTATION, TCACHE-HOARD and RETAINED-FREE: each fires on its own cause, nearly fires, and never two for one."""

from __future__ import annotations

import dataclasses

import pytest

from coreheap.checks import Case, arena_bloat, fragmentation, pinned_heap, retained_free, tcache_hoard
from coreheap.evidence import Confidence
from coreheap.free_memory import (
    ArenaFreeMemory,
    ArenaMaxEstimate,
    FreeMemoryReport,
    HeapFreeMemory,
    Pin,
    PinChain,
    TopStays,
    TrimEstimate,
)
from coreheap.mappings import ResidencyBasis
from coreheap.report import Finding, Severity
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.cases import arena_of, with_arenas, without_heap
from tests.unit.checks.conftest import CaseOf

MIB = 1 << 20
EMPTY = ArenaFreeMemory(0, ())


def heap_of(arena: int, *, live: int, free: int, tcache: int = 0, **more: object) -> HeapFreeMemory:
    """A sub-heap whose free memory is whole pages that are in memory, unless said otherwise."""
    plain = HeapFreeMemory(
        arena=arena,
        sub_heap=0,
        address=0x7F0000000000,
        committed_bytes=live + free + tcache,
        live_count=1,
        live_bytes=live,
        tcache_bytes=tcache,
        free_bytes=free,
        unlisted_bytes=0,
        top_bytes=0,
        largest_free_bytes=free,
        whole_page_bytes=free,
        shared_page_bytes=0,
        trim=TrimEstimate(free, 0, free, free),
        top_stays=TopStays.BELOW_THRESHOLD,
        pins=PinChain(),
    )
    return dataclasses.replace(plain, **more)  # type: ignore[arg-type]


def case_with(case: Case, *heaps: HeapFreeMemory) -> Case:
    """The case with an arena for each heap, and their survey."""
    arenas = [
        arena_of(heap.arena, in_use=heap.live_bytes, large_bin=heap.free_bytes, tcache=heap.tcache_bytes)
        for heap in heaps
    ]
    survey = FreeMemoryReport(
        4096,
        (EMPTY, *(ArenaFreeMemory(heap.arena, (heap,)) for heap in heaps)),
        pins=(Pin(1, 0, 0x7F0000001000, 5, 1, 48, 0, MIB, 0, MIB, is_highest=True, holder="libfoo.so cache"),),
        arena_max=(ArenaMaxEstimate(2, 1, 0, MIB, MIB, ("at most: x", "at least: y", "reserved: z")),),
        basis=ResidencyBasis.HOLES,
    )
    return dataclasses.replace(with_arenas(case, *arenas), free_memory=survey)


def all_findings(case: Case) -> list[Finding]:
    checks = (arena_bloat, retained_free, pinned_heap, fragmentation, tcache_hoard)
    return [finding for check in checks for finding in check.findings(case)]


def codes(case: Case) -> list[str]:
    return [finding.code for finding in all_findings(case)]


@pytest.fixture
def plain(case_of: CaseOf) -> Case:
    return case_of(build_process(release("2.36")))


PINNED = PinChain(8 * MIB, 8 * MIB, 64, MIB // 2)


@pytest.mark.parametrize(
    ("pins", "code"),
    [
        (PINNED, "PINNED-HEAP"),
        (dataclasses.replace(PINNED, chunk_count=65), "RETAINED-FREE"),  # more than anyone looks at
        (dataclasses.replace(PINNED, chunk_bytes=MIB // 2 + 16), "RETAINED-FREE"),  # they are the use of the memory
        (dataclasses.replace(PINNED, gained_bytes=4 * MIB - 4096, chunk_bytes=1), "RETAINED-FREE"),  # less than half
    ],
)
def test_few_small_pins_below_the_end(plain: Case, pins: PinChain, code: str) -> None:
    case = case_with(plain, heap_of(1, live=MIB, free=8 * MIB, pins=pins))
    assert codes(case) == [code]


def test_pins_in_numbers(plain: Case) -> None:
    case = case_with(plain, heap_of(1, live=MIB, free=8 * MIB, pins=PINNED))
    (finding,) = all_findings(case)
    assert finding.severity is Severity.INFO
    assert finding.confidence is Confidence.CERTAIN
    assert finding.quantity("pinned_bytes") == 8 * MIB
    assert finding.quantity("pin_count") == 64
    assert finding.quantity("largest_pin") == 0x7F0000001000
    assert finding.quantity("largest_pin_holder") == "libfoo.so cache"
    assert finding.quantity("trim_resident_high_bytes") == 8 * MIB
    assert any("0x7f0000001000" in step for step in finding.next_steps)


def test_fragments_win_over_pins(plain: Case) -> None:
    for shared, code in ((4 * MIB, "FRAGMENTATION"), (4 * MIB - 16, "PINNED-HEAP")):
        heap = heap_of(1, live=MIB, free=8 * MIB, pins=PINNED, shared_page_bytes=shared)
        assert codes(case_with(plain, heap)) == [code]


@pytest.mark.parametrize(
    ("cached", "free", "found"),
    [
        (4 * MIB, 4 * MIB, ["TCACHE-HOARD"]),
        (4 * MIB, 4 * MIB + 16, ["RETAINED-FREE"]),  # not half of what is kept
        (4 * MIB - 16, MIB, ["RETAINED-FREE"]),  # what a few full tcaches have
        (4 * MIB, 0, ["TCACHE-HOARD"]),
    ],
)
def test_hoards(plain: Case, cached: int, free: int, found: list[str]) -> None:
    assert codes(case_with(plain, heap_of(1, live=MIB, free=free, tcache=cached))) == found


def test_what_was_given_back_is_no_reason_to_speak(plain: Case) -> None:
    free = 8 * MIB
    for left, found in ((MIB, ["RETAINED-FREE"]), (MIB - 4096, [])):
        heap = heap_of(1, live=3 * MIB, free=free, trim=TrimEstimate(free, 0, left, left))
        assert codes(case_with(plain, heap)) == found
    # Where the core does not tell, all of it may still be there.
    unknown = heap_of(1, live=3 * MIB, free=free, trim=TrimEstimate(free, 0, 0, free))
    assert codes(case_with(plain, unknown)) == ["RETAINED-FREE"]


def test_arena_bloat_speaks_for_its_arenas(plain: Case) -> None:
    heaps = [heap_of(number, live=20000, free=8 * MIB, pins=PINNED) for number in range(1, 9)]
    (finding,) = all_findings(case_with(plain, *heaps))
    assert finding.code == "ARENA-BLOAT"
    assert finding.quantity("trim_bytes") == finding.quantity("trim_resident_low_bytes") == 64 * MIB
    assert (finding.quantity("arena_max_2_saves_low_bytes"), finding.quantity("arena_max_2_saves_high_bytes")) == (
        0,
        MIB,
    )
    assert any("at most: x" in fact.statement for fact in finding.evidence)
    assert codes(case_with(plain, *heaps[:7])) == ["PINNED-HEAP"]


def test_many_hoarding_arenas_are_a_hoard(plain: Case) -> None:
    heaps = [heap_of(number, live=20000, free=4096, tcache=MIB) for number in range(1, 9)]
    assert codes(case_with(plain, *heaps)) == ["TCACHE-HOARD"]


def test_severity_follows_what_is_kept(plain: Case) -> None:
    for free, severity in ((64 * MIB, Severity.WARNING), (64 * MIB - 16, Severity.INFO)):
        (finding,) = all_findings(case_with(plain, heap_of(1, live=MIB, free=free)))
        assert finding.severity is severity


def test_missing_memory_takes_away_certainty(plain: Case) -> None:
    case = case_with(plain, heap_of(1, live=MIB, free=8 * MIB, pins=PINNED))
    assert case.heap is not None
    main, arena = case.heap.arenas
    heap = dataclasses.replace(case.heap, arenas=(main, dataclasses.replace(arena, coverage=0.9)))
    (finding,) = all_findings(dataclasses.replace(case, heap=heap))
    assert finding.code == "PINNED-HEAP"
    assert finding.confidence is Confidence.STRONG
    assert codes(without_heap(case)) == []
    # Without a survey nothing but the plain sum is known.
    assert codes(dataclasses.replace(case, free_memory=None)) == ["RETAINED-FREE"]
