"""RETAINED-FREE fires when a quarter of the arenas' memory, and at least a MiB, is free."""

from __future__ import annotations

import dataclasses

import pytest

from coreheap.checks.retained_free import findings
from coreheap.evidence import Confidence
from coreheap.report import Severity
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.cases import arena_of, with_arenas, without_heap
from tests.unit.checks.conftest import CaseOf

MIB = 1 << 20


def test_free_memory_in_lists_and_tops_is_retained(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    small = arena_of(1, in_use=MIB, tcache=MIB, fastbin=MIB)
    large = arena_of(2, in_use=4 * MIB, unsorted_bin=MIB, small_bin=MIB, large_bin=MIB, top=MIB, free_unlisted=MIB)
    (finding,) = findings(with_arenas(case, small, large))
    assert finding.code == "RETAINED-FREE"
    assert finding.severity is Severity.INFO
    assert finding.confidence is Confidence.CERTAIN
    assert finding.quantity("free_bytes") == 7 * MIB
    assert finding.quantity("free_share") == pytest.approx(7 / 12)
    assert finding.quantity("binned_bytes") == 3 * MIB
    assert finding.quantity("top_bytes") == MIB
    assert finding.quantity("tcache_bytes") == MIB
    assert finding.quantity("fastbin_bytes") == MIB
    assert finding.quantity("unlisted_bytes") == MIB
    assert finding.quantity("largest_arena") == 2
    assert finding.quantity("trim_threshold") == 0x20000


@pytest.mark.parametrize(
    ("in_use", "free", "expected"),
    [
        (3 * MIB, MIB, Severity.INFO),
        (3 * MIB - 16, MIB - 16, None),  # a quarter, but not a MiB
        (3 * MIB + 16, MIB, None),  # a MiB, but not a quarter
        (64 * MIB, 64 * MIB, Severity.WARNING),
        (64 * MIB + 16, 64 * MIB, Severity.INFO),
        (0, 64 * MIB - 16, Severity.INFO),
    ],
)
def test_thresholds(case_of: CaseOf, in_use: int, free: int, expected: Severity | None) -> None:
    case = case_of(build_process(release("2.36")))
    found = findings(with_arenas(case, arena_of(1, in_use=in_use, large_bin=free)))
    assert [finding.severity for finding in found] == ([] if expected is None else [expected])


def test_missing_memory_and_contradictions_take_away_certainty(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    partial = with_arenas(case, arena_of(1, coverage=0.9, in_use=MIB, top=MIB))
    (finding,) = findings(partial)
    assert finding.confidence is Confidence.STRONG
    assert partial.heap is not None
    contradictory = dataclasses.replace(partial, heap=dataclasses.replace(partial.heap, anomaly_count=3))
    (finding,) = findings(contradictory)
    assert finding.confidence is Confidence.PLAUSIBLE
    assert findings(without_heap(case)) == ()


def test_unknown_parameters_stay_unknown(case_of: CaseOf) -> None:
    case = with_arenas(case_of(build_process(release("2.36"))), arena_of(1, in_use=MIB, top=MIB))
    assert case.heap is not None
    (finding,) = findings(dataclasses.replace(case, heap=dataclasses.replace(case.heap, parameters=None)))
    assert finding.quantity("trim_threshold") is None
    assert finding.quantity("top_pad") is None
