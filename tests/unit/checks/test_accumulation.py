"""ACCUMULATION fires when a thousand like chunks below one keep a MiB and a tenth of what anything leads to."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from coreheap.checks.accumulation import findings
from coreheap.evidence import Confidence
from coreheap.leaks import Accumulation, RetainedReport
from coreheap.report import Severity
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.conftest import CaseOf
from tests.unit.report_samples import chunk_view

MIB = 1 << 20
PROCESS = build_process(release("2.36"))
TABLE = chunk_view(0x7F3A14010010, 32_776)


def point(children: int = 60_000, held: int = 59 * MIB, **changes: Any) -> Accumulation:
    made = Accumulation(
        TABLE, 60 * MIB, children, 56, held, (0x7F3A140008D0, 0x7F3A140009D0), below=children, root="svc jobs"
    )
    return dataclasses.replace(made, **changes)


def retained(*points: Accumulation, reachable: int = 100 * MIB) -> RetainedReport:
    return RetainedReport((), points, reachable)


def test_a_table_of_very_many_like_chunks_is_an_accumulation(case_of: CaseOf) -> None:
    case = dataclasses.replace(case_of(PROCESS), retained=retained(point()))
    (finding,) = findings(case)
    assert finding.code == "ACCUMULATION"
    # A single core cannot tell growth from size: an estimate is never certain.
    assert (finding.severity, finding.confidence) == (Severity.INFO, Confidence.PLAUSIBLE)
    assert finding.quantity("children") == 60_000
    assert finding.quantity("child_bytes") == 56
    assert finding.quantity("child_retained_bytes") == 59 * MIB
    assert finding.quantity("retained_bytes") == 60 * MIB
    assert finding.quantity("reachable_share") == pytest.approx(0.59)
    assert finding.quantity("holder_address") == 0x7F3A14010010
    assert any("coreheap owners CORE 0x7f3a14010010" in step for step in finding.next_steps)
    assert any("estimate" in reason for reason in finding.weakened_by)


@pytest.mark.parametrize(
    ("children", "held", "reachable", "severity"),
    [
        (1000, MIB, 10 * MIB, Severity.INFO),
        (999, MIB, 10 * MIB, None),
        (1000, MIB - 1, 10 * MIB - 10, None),
        (1000, MIB, 10 * MIB + 16, None),
        (1000, 64 * MIB, 128 * MIB, Severity.WARNING),
        (1000, 64 * MIB, 128 * MIB + 16, Severity.INFO),
        (1000, 64 * MIB - 1, 64 * MIB, Severity.INFO),
    ],
)
def test_thresholds(case_of: CaseOf, children: int, held: int, reachable: int, severity: Severity | None) -> None:
    case = dataclasses.replace(case_of(PROCESS), retained=retained(point(children, held), reachable=reachable))
    assert [finding.severity for finding in findings(case)] == ([] if severity is None else [severity])


def test_what_hangs_below_no_chunk_and_what_nobody_asked_for_is_no_finding(case_of: CaseOf) -> None:
    case = case_of(PROCESS)
    assert findings(case) == ()
    assert findings(dataclasses.replace(case, retained=retained())) == ()
    assert findings(dataclasses.replace(case, retained=retained(point(holder="the roots", root=None)))) == ()
    assert findings(dataclasses.replace(case, retained=retained(point(held=0), reachable=0))) == ()


def test_a_variable_that_most_hang_from_is_a_place_as_well(case_of: CaseOf) -> None:
    case = dataclasses.replace(case_of(PROCESS), retained=retained(point(holder="svc jobs")))
    (finding,) = findings(case)
    assert finding.confidence is Confidence.WEAK
    assert finding.quantity("holder_address") is None
    assert finding.quantity("root") == "svc jobs"
    assert not any("coreheap owners" in step for step in finding.next_steps)


def test_few_blocks_with_many_below_each_count(case_of: CaseOf) -> None:
    """The blocks of a std::deque: 64 jobs in each."""
    case = case_of(PROCESS)
    (finding,) = findings(dataclasses.replace(case, retained=retained(point(938, below=180_000))))
    assert finding.quantity("below_count") == 180_000
    assert findings(dataclasses.replace(case, retained=retained(point(99, below=180_000)))) == ()


def test_many_like_holders_are_told_where_no_single_one_is(case_of: CaseOf) -> None:
    case = case_of(PROCESS)
    many = point(held=50 * MIB, holders=40)
    (finding,) = findings(dataclasses.replace(case, retained=retained(many)))
    assert finding.quantity("holder_count") == 40
    alone = [
        finding.quantity("holder_count")
        for finding in findings(dataclasses.replace(case, retained=retained(many, point(held=30 * MIB))))
    ]
    assert alone == [1]
    beside = [
        finding.quantity("holder_count")
        for finding in findings(dataclasses.replace(case, retained=retained(many, point(held=20 * MIB))))
    ]
    assert beside == [1, 40]


def test_only_the_largest_are_told(case_of: CaseOf) -> None:
    points = [point(held=held * MIB) for held in (30, 25, 20, 15)]
    case = dataclasses.replace(case_of(PROCESS), retained=retained(*points))
    assert [finding.quantity("child_retained_bytes") for finding in findings(case)] == [30 * MIB, 25 * MIB, 20 * MIB]
