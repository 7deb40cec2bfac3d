"""Processes that died inside malloc: what is broken is named, everything else is exact."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from coreheap.heap import ChunkState
from coreheap.report import Report
from tests.real_cores.comparison import (
    compare_malloc_info,
    compare_sets,
    ledger_errors,
    payloads,
    set_difference,
)
from tests.real_cores.truth import Truth

Analysed = Callable[[str], tuple[Report, Truth]]


@pytest.mark.parametrize(
    ("case", "code"),
    [("crash_in_malloc_top", "top_size_mismatch"), ("crash_in_malloc_unsorted", "list_broken_back_link")],
)
def test_damage_that_costs_no_chunk(analysed: Analysed, case: str, code: str) -> None:
    report, truth = analysed(case)
    assert report.heap is not None
    assert compare_sets(report.heap, truth) == []
    assert compare_malloc_info(report.heap, truth) == []
    assert ledger_errors(report.ledger) == []
    assert [anomaly.code for anomaly in report.anomalies] == [code]
    (damage,) = truth.damage
    assert abs(report.anomalies[0].address - damage.address) <= 24


def test_a_smashed_size_costs_its_chunk_alone(analysed: Analysed) -> None:
    report, truth = analysed("crash_in_malloc_next_size")
    assert report.heap is not None
    (damage,) = truth.damage
    payload = damage.address + 8
    spared = truth.live_payload_address[truth.live_payload_address != np.uint64(payload)]
    assert set_difference("in use", payloads(report.heap, ChunkState.IN_USE), spared) == []
    assert payloads(report.heap, ChunkState.DAMAGED).tolist() == [payload]
    assert compare_malloc_info(report.heap, truth) == []
    assert ledger_errors(report.ledger) == []
    assert [anomaly.code for anomaly in report.anomalies] == ["broken_chunk"]
    assert report.anomalies[0].address + 8 == damage.address


@pytest.mark.parametrize("case", ["crash_in_malloc_top", "crash_in_malloc_unsorted", "crash_in_malloc_next_size"])
def test_the_lock_that_was_held_is_seen(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    assert report.heap is not None
    locked = [arena.address for arena in report.heap.arenas if arena.locked]
    if truth.signal == "SIGSEGV":
        crashed = next(thread for thread in report.threads if thread.index == 0)
        assert locked == [report.heap.arenas[crashed.arena or 0].address]
    else:
        # From 2.26 malloc_printerr is called with the lock held or not, by message; never more than one arena.
        assert len(locked) <= 1


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("abort_double_free", "free(): double free detected in tcache 2"),
        ("crash_in_malloc_top", "malloc(): corrupted top size"),
        ("crash_in_malloc_next_size", "free(): invalid next size (normal)"),
    ],
)
def test_glibcs_own_message(analysed: Analysed, case: str, message: str) -> None:
    report, _ = analysed(case)
    (finding,) = [finding for finding in report.findings if finding.code == "ALLOCATOR-ABORT"]
    assert finding.quantity("message") == message
    assert finding.quantity("from_malloc") == "true"


@pytest.mark.parametrize("case", ["threads_kept", "crash_in_malloc_unsorted", "fork_child", "plain_small"])
def test_no_message_where_malloc_did_not_abort(analysed: Analysed, case: str) -> None:
    report, _ = analysed(case)
    assert [finding for finding in report.findings if finding.code == "ALLOCATOR-ABORT"] == []
