"""ARENA-BLOAT fires on arenas that reserve much and hold little, from eight arenas on."""

from __future__ import annotations

import pytest

from coreheap.checks.arena_bloat import findings
from coreheap.evidence import Confidence
from coreheap.report import Severity
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.cases import HEAP_MAX, arena_of, with_arenas, without_heap
from tests.unit.checks.conftest import CaseOf

KIB = 1 << 10
SIXTEENTH = HEAP_MAX // 16


def test_many_arenas_that_hold_little_are_bloat(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    arenas = [arena_of(number, in_use=20 * KIB, top=100 * KIB) for number in range(1, 9)]
    (finding,) = findings(with_arenas(case, *arenas))
    assert finding.code == "ARENA-BLOAT"
    assert finding.severity is Severity.INFO  # half a GiB of address space and little memory
    assert finding.confidence is Confidence.CERTAIN
    assert finding.quantity("arenas") == 8
    assert finding.quantity("reserved_bytes") == 8 * HEAP_MAX
    assert finding.quantity("in_use_bytes") == 8 * 20 * KIB
    assert finding.quantity("free_bytes") == 8 * 100 * KIB
    assert finding.quantity("arenas_without_thread") == 0


@pytest.mark.parametrize(("machine", "severity"), [("x86_64", Severity.INFO), ("i386", Severity.WARNING)])
def test_address_space_alone_is_a_warning_only_where_it_is_short(
    case_of: CaseOf, machine: str, severity: Severity
) -> None:
    case = case_of(build_process(release("2.36", machine)))
    for count, expected in ((15, Severity.INFO), (16, severity)):
        arenas = [arena_of(number, in_use=20 * KIB, top=KIB) for number in range(1, count + 1)]
        (finding,) = findings(with_arenas(case, *arenas))
        assert finding.severity is expected
    advice = " ".join(finding.next_steps)
    assert ("nothing has to be done" in advice) == (severity is Severity.INFO)


def test_free_memory_alone_is_bloat_though_the_reservation_is_used(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    arenas = [arena_of(number, in_use=2 * SIXTEENTH, large_bin=2 * SIXTEENTH) for number in range(1, 9)]
    (finding,) = findings(with_arenas(case, *arenas))
    assert finding.severity is Severity.WARNING  # 64 MiB and more are free


def test_seven_arenas_are_none(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    arenas = [arena_of(number, in_use=20 * KIB, top=100 * KIB) for number in range(1, 8)]
    assert findings(with_arenas(case, *arenas)) == ()


def test_arenas_just_used_enough_are_none(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    used = SIXTEENTH + 16  # a little more than a sixteenth of the reservation
    nearly = [arena_of(number, in_use=used, top=used - 16) for number in range(1, 9)]
    assert findings(with_arenas(case, *nearly)) == ()
    as_much_free = [arena_of(number, in_use=used, top=used) for number in range(1, 9)]
    assert len(findings(with_arenas(case, *as_much_free))) == 1
    reserved = [arena_of(number, in_use=SIXTEENTH, top=KIB) for number in range(1, 9)]
    assert len(findings(with_arenas(case, *reserved))) == 1


def test_unwalked_sub_heaps_take_away_certainty(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    arenas = [arena_of(number, in_use=20 * KIB, top=100 * KIB) for number in range(1, 8)]
    for coverage in (0.5, None):
        (finding,) = findings(with_arenas(case, *arenas, arena_of(8, coverage=coverage, in_use=KIB)))
        assert finding.confidence is Confidence.PLAUSIBLE
        assert any(fact.speaks_against for fact in finding.evidence)
    assert findings(without_heap(case)) == ()
