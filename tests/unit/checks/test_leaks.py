"""LEAK fires from a KiB that nothing leads to, POSSIBLE-LEAK from a MiB and a tenth of what is live."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from coreheap.checks import Case
from coreheap.checks.leaks import findings
from coreheap.evidence import Confidence, Gap
from coreheap.heap import UnattributedRange
from coreheap.leaks import Heuristic, LeakGroup, LeakReport, Verdict, VerdictTotal
from coreheap.quantities import AddressRange
from coreheap.report import Finding, Severity
from coreheap.verdict import leak_verdict
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.cases import arena_of, with_arenas, without_heap
from tests.unit.checks.conftest import CaseOf
from tests.unit.report_samples import group, leaks

KIB, MIB = 1 << 10, 1 << 20
PROCESS = build_process(release("2.36"))


def lost(
    byte_count: int, *, count: int = 1, indirect: int = 0, verdict: Verdict = Verdict.DEFINITELY_LOST
) -> LeakGroup:
    return group(
        verdict=verdict, count=count, usable_bytes=byte_count, indirect_count=int(indirect > 0), indirect_bytes=indirect
    )


def with_live(report: LeakReport, byte_count: int) -> LeakReport:
    """The same with another number of bytes that are still reachable."""
    reachable = VerdictTotal(1, byte_count)
    return dataclasses.replace(report, totals={**report.totals, Verdict.STILL_REACHABLE: reachable})


def sound(case: Case) -> Case:
    """A heap of one arena that is whole and that was found for certain."""
    case = with_arenas(case, arena_of(1, in_use=MIB))
    assert case.heap is not None
    identity = dataclasses.replace(case.heap.identity, confidence=Confidence.CERTAIN)
    heap = dataclasses.replace(case.heap, identity=identity, gaps=(), anomaly_count=0)
    return dataclasses.replace(case, heap=heap, gaps=())


def found(case: Case, report: LeakReport | None) -> dict[str, Finding]:
    return {finding.code: finding for finding in findings(dataclasses.replace(case, leaks=report))}


def test_what_nothing_leads_to_is_a_leak(case_of: CaseOf) -> None:
    report = leaks(
        group(), group(1, smallest_bytes=3000, largest_bytes=3000, count=1, indirect_count=0, usable_bytes=3000)
    )
    finding = found(sound(case_of(PROCESS)), report)["LEAK"]
    # Never certain: pointers may be encoded, or in the kernel's hands.
    assert finding.confidence is Confidence.STRONG
    assert finding.subject == "12,001 chunks"
    assert finding.quantity("lost_bytes") == 288_000 + 3000 + 2 * 896_000
    assert finding.quantity("definite_count") == 4001
    assert finding.quantity("definite_bytes") == 291_000
    assert finding.quantity("indirect_count") == 8000
    assert finding.quantity("indirect_bytes") == 2 * 896_000
    assert finding.quantity("lost_share") == pytest.approx(2_083_000 / (2_083_000 + 100 * MIB))
    assert finding.quantity("largest_group_bytes") == 288_000 + 896_000
    assert finding.quantity("largest_group_count") == 4000
    assert finding.quantity("sample_address") == 0x7F3A140008D0
    assert any("coreheap explain CORE 0x7f3a140008d0" in step for step in finding.next_steps)
    assert any("epoll" in reason for reason in finding.weakened_by)


@pytest.mark.parametrize(
    ("live", "definite", "indirect", "severity"),
    [
        (100 * MIB, KIB - 1, 0, None),
        (100 * MIB, 24, KIB - 24, Severity.INFO),
        (100 * MIB, MIB, 3 * MIB, Severity.INFO),  # a MiB, but not a twentieth
        (100 * KIB, MIB - 1, 0, Severity.INFO),  # nearly all, but not a MiB
        (19 * MIB, MIB, 0, Severity.WARNING),
        (1000 * MIB, 15 * MIB, MIB - 1, Severity.INFO),
        (1000 * MIB, 15 * MIB, MIB, Severity.WARNING),
        (192 * MIB, 64 * MIB, 0, Severity.ERROR),
        (192 * MIB + 16, 64 * MIB, 0, Severity.WARNING),
        (0, 64 * MIB - 1, 0, Severity.WARNING),
    ],
)
def test_how_grave_a_leak_is(
    case_of: CaseOf, live: int, definite: int, indirect: int, severity: Severity | None
) -> None:
    report = with_live(leaks(lost(definite, indirect=indirect)), live)
    finding = found(sound(case_of(PROCESS)), report).get("LEAK")
    assert (finding.severity if finding else None) is severity


def test_nothing_is_lost_and_nothing_was_looked_for(case_of: CaseOf) -> None:
    case = sound(case_of(PROCESS))
    assert found(case, leaks()) == {}
    assert found(case, None) == {}
    assert found(without_heap(case), leaks(group())) == {}
    # Only indirectly lost chunks without a leader: nothing a finding could name.
    alone = dataclasses.replace(leaks(), totals={**leaks().totals, Verdict.INDIRECTLY_LOST: VerdictTotal(3, 64 * MIB)})
    assert found(case, alone) == {}


def test_what_is_doubtful_takes_away_strength(case_of: CaseOf) -> None:
    case = sound(case_of(PROCESS))
    assert case.heap is not None
    report = leaks(group())

    def confidence(**changes: Any) -> Confidence:
        assert case.heap is not None
        heap = dataclasses.replace(case.heap, **changes)
        finding = found(dataclasses.replace(case, heap=heap), report)["LEAK"]
        against = [fact.statement for fact in finding.evidence if fact.speaks_against]
        assert against
        # Each is said with what follows from it.
        assert all(any(text.startswith(f"{fact}: ") for text in finding.weakened_by) for fact in against)
        return finding.confidence

    partial = arena_of(1, coverage=0.9, in_use=MIB)
    locked = dataclasses.replace(arena_of(1, in_use=MIB), locked=True)
    identity = dataclasses.replace(case.heap.identity, confidence=Confidence.STRONG)
    assert confidence(arenas=(partial,)) is Confidence.PLAUSIBLE
    assert confidence(arenas=(locked,)) is Confidence.PLAUSIBLE
    assert confidence(anomaly_count=1) is Confidence.PLAUSIBLE
    assert confidence(identity=identity) is Confidence.PLAUSIBLE
    assert confidence(gaps=(Gap("tcache_not_found", "cached blocks may count as in use"),)) is Confidence.PLAUSIBLE
    holes = (UnattributedRange(AddressRange(0x1000, 0x1000 + MIB // 16), "unproven"),)
    little = dataclasses.replace(arena_of(1, in_use=MIB), unattributed=holes)
    assert confidence(arenas=(little,)) is Confidence.PLAUSIBLE
    # More than a tenth of the heap: two steps.
    much = dataclasses.replace(little, unattributed=holes * 2)
    assert confidence(arenas=(much,)) is Confidence.WEAK
    assert confidence(arenas=(locked,), anomaly_count=1) is Confidence.WEAK
    assert confidence(arenas=(partial, locked), anomaly_count=1, identity=identity) is Confidence.WEAK
    threads = dataclasses.replace(case, gaps=(Gap("threads_missing", "one thread has no note"),))
    assert found(threads, report)["LEAK"].confidence is Confidence.PLAUSIBLE
    overlapping = dataclasses.replace(case, gaps=(Gap("segments_overlap", "2 segments overlap an earlier one"),))
    assert found(overlapping, report)["LEAK"].confidence is Confidence.PLAUSIBLE
    harmless = dataclasses.replace(case, gaps=(Gap("process_note_missing", "the process's name is unknown"),))
    assert found(harmless, report)["LEAK"].confidence is Confidence.STRONG


def test_memory_between_that_is_not_mallocs_is_no_doubt(case_of: CaseOf) -> None:
    foreign = (UnattributedRange(AddressRange(0x1000, 0x1000 + MIB), "foreign_sbrk"),)
    case = with_arenas(sound(case_of(PROCESS)), dataclasses.replace(arena_of(1, in_use=MIB), unattributed=foreign))
    assert found(case, leaks(group()))["LEAK"].confidence is Confidence.STRONG


def test_a_weak_leak_is_no_warning(case_of: CaseOf) -> None:
    case = sound(case_of(PROCESS))
    assert case.heap is not None
    doubtful = dataclasses.replace(
        case,
        heap=dataclasses.replace(
            case.heap,
            anomaly_count=9,
            gaps=(Gap("top_not_saved", "x"),),
            arenas=(dataclasses.replace(arena_of(1, coverage=None, in_use=MIB), locked=True),),
        ),
    )
    finding = found(doubtful, leaks(lost(900 * MIB)))["LEAK"]
    assert (finding.severity, finding.confidence) == (Severity.INFO, Confidence.WEAK)
    assert "x" in finding.weakened_by


def test_shared_memory_that_is_missing_is_said_and_makes_it_less_sure(case_of: CaseOf) -> None:
    report = dataclasses.replace(leaks(group()), missing_shared_bytes=3 * MIB)
    finding = found(sound(case_of(PROCESS)), report)["LEAK"]
    assert finding.confidence is Confidence.PLAUSIBLE
    assert any("3.00 MiB of writable mapped files" in reason for reason in finding.weakened_by)


def test_a_core_of_gdb_is_less_sure(case_of: CaseOf) -> None:
    case = sound(case_of(PROCESS))
    case.core.made_by = "gdb"
    finding = found(case, leaks(group()))["LEAK"]
    assert finding.confidence is Confidence.PLAUSIBLE
    assert any("MADV_DONTDUMP" in fact.statement for fact in finding.evidence if fact.speaks_against)


@pytest.mark.parametrize(
    ("live", "byte_count", "severity"),
    [
        (9 * MIB, MIB, Severity.INFO),
        (9 * MIB - 16, MIB - 1, None),  # a tenth, but not a MiB
        (9 * MIB + 16, MIB, None),  # a MiB, but not a tenth
        (500 * MIB, 60 * MIB, Severity.INFO),
    ],
)
def test_interior_pointers_alone_are_a_weak_possible_leak(
    case_of: CaseOf, live: int, byte_count: int, severity: Severity | None
) -> None:
    report = with_live(leaks(lost(byte_count, verdict=Verdict.POSSIBLY_LOST)), live)
    finding = found(sound(case_of(PROCESS)), report).get("POSSIBLE-LEAK")
    assert (finding.severity if finding else None) is severity
    if finding is not None:
        assert finding.confidence is Confidence.WEAK
        assert finding.quantity("unreachable_bytes") == 0
        assert any("several bases" in reason for reason in finding.weakened_by)
        # What is held so stays out of the answer.
        assert list(leak_verdict(report, (finding,))) == []


def test_what_hangs_from_a_block_that_is_pointed_into_does_not_count(case_of: CaseOf) -> None:
    """nginx: one pointer into a pool holds all that hangs from it."""
    report = with_live(leaks(lost(60 * MIB, count=900, verdict=Verdict.POSSIBLY_LOST)), MIB)
    case = sound(case_of(PROCESS))
    assert set(found(case, dataclasses.replace(report, held_inside=VerdictTotal(1, 16 * KIB)))) == set()
    many = found(case, dataclasses.replace(report, held_inside=VerdictTotal(800, 50 * MIB)))["POSSIBLE-LEAK"]
    assert (many.severity, many.confidence) == (Severity.INFO, Confidence.WEAK)
    assert many.quantity("inside_bytes") == 50 * MIB


def test_addresses_in_another_form_are_no_sign_of_a_leak(case_of: CaseOf) -> None:
    report = dataclasses.replace(
        with_live(leaks(lost(80 * MIB, verdict=Verdict.POSSIBLY_LOST)), MIB),
        unreachable=VerdictTotal(1, 80 * MIB),
        heuristics=((Heuristic.HIGH_TAG, VerdictTotal(1, 80 * MIB)),),
    )
    result = found(sound(case_of(PROCESS)), report)
    assert set(result) == {"POSSIBLE-LEAK"}
    finding = result["POSSIBLE-LEAK"]
    assert (finding.severity, finding.confidence) == (Severity.INFO, Confidence.WEAK)
    assert finding.quantity("encoded_bytes") == 80 * MIB
    assert any("high_tag" in fact.statement for fact in finding.evidence)
    assert list(leak_verdict(report, (finding,))) == []


@pytest.mark.parametrize("heuristic", [Heuristic.MISSING_SHARED_MEMORY, Heuristic.SIGNAL_STACK])
def test_what_something_out_of_sight_may_hold_is_weak(case_of: CaseOf, heuristic: Heuristic) -> None:
    report = dataclasses.replace(
        with_live(leaks(lost(80 * MIB, verdict=Verdict.POSSIBLY_LOST)), MIB),
        missing_shared_bytes=8 * MIB,
        unreachable=VerdictTotal(1, 80 * MIB),
        unreachable_possible=VerdictTotal(1, 80 * MIB),
        heuristics=((heuristic, VerdictTotal(1, 80 * MIB)),),
    )
    result = found(sound(case_of(PROCESS)), report)
    assert set(result) == {"POSSIBLE-LEAK"}
    finding = result["POSSIBLE-LEAK"]
    assert (finding.severity, finding.confidence) == (Severity.INFO, Confidence.WEAK)
    (item,) = leak_verdict(report, (finding,))
    assert (item.topic, item.bytes) == ("possibly_lost", 80 * MIB)


@pytest.mark.parametrize(
    ("missing", "expected"),
    [(1, (Severity.WARNING, Confidence.PLAUSIBLE)), (1 << 40, (Severity.INFO, Confidence.WEAK))],
)
def test_without_all_roots_nothing_is_more_than_possibly_lost(
    case_of: CaseOf, missing: int, expected: tuple[Severity, Confidence]
) -> None:
    report = dataclasses.replace(
        with_live(leaks(lost(80 * MIB, verdict=Verdict.POSSIBLY_LOST)), 100 * MIB),
        missing_root_bytes=missing,
        unreachable=VerdictTotal(1, 80 * MIB),
        unreachable_possible=VerdictTotal(1, 80 * MIB),
    )
    result = found(sound(case_of(PROCESS)), report)
    assert set(result) == {"POSSIBLE-LEAK"}
    finding = result["POSSIBLE-LEAK"]
    assert (finding.severity, finding.confidence) == expected
    assert finding.quantity("unreachable_bytes") == 80 * MIB
    assert finding.quantity("missing_root_bytes") == missing
    assert any(fact.speaks_against and "of writable memory" in fact.statement for fact in finding.evidence)


def test_without_registers_what_nothing_leads_to_is_weak(case_of: CaseOf) -> None:
    report = dataclasses.replace(
        with_live(leaks(lost(80 * MIB, verdict=Verdict.POSSIBLY_LOST)), MIB),
        unreachable=VerdictTotal(1, 80 * MIB),
        unreachable_possible=VerdictTotal(1, 80 * MIB),
    )
    finding = found(sound(case_of(PROCESS)), report)["POSSIBLE-LEAK"]
    assert finding.confidence is Confidence.WEAK
    assert any("no registers" in fact.statement for fact in finding.evidence)
