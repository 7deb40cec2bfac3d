"""Every Debian release of libc6 on every platform: the same sets and figures whatever files are at hand.

The cores are made by scripts/make_cores --matrix; what is not made, and why, is in cases.EXCLUSIONS.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.heap import ChunkState
from coreheap.report import Report
from tests.real_cores import cores, targets
from tests.real_cores.cases import CASES, EXCLUSIONS, MATRIX, MATRIX_ARGUMENTS, Case, exclusion_for
from tests.real_cores.comparison import (
    compare_all,
    compare_malloc_info,
    ledger_errors,
    payloads,
    set_difference,
)
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.truth import Truth, load_truth

# What is at hand beside the core: libc's file (or the static program) and its symbols, the same stripped, nothing.
STATES = ("symbols", "stripped", "core_alone")
DAMAGE_CODES = {
    "how=top": "top_size_mismatch",
    "how=unsorted": "list_broken_back_link",
    "how=next_size": "broken_chunk",
}
DAMAGED = tuple(name for name in MATRIX if MATRIX[name].program == "crash_in_malloc")
INTACT = tuple(name for name in MATRIX if name not in DAMAGED and MATRIX[name].program != "splits")


@dataclass(frozen=True, slots=True)
class Files:
    """What one state hands to ``coreheap.open``."""

    executable: Path | None
    sysroot: Path
    debug_directories: tuple[Path, ...]


def files_for(case: Case, executable: Path, state: str, empty: Path) -> Files:
    """A sysroot in every state: nothing of the machine that runs the tests is looked at."""
    if state == "core_alone":
        return Files(None, empty, ())
    if case.linking.is_static:
        return Files(executable if state == "symbols" else cores.stripped(case, executable), empty, ())
    unpacked = targets.files_of(case.target, cores.default_directory())
    return Files(None, unpacked.sysroot, (unpacked.debug,) if state == "symbols" else ())


def analyse(name: str, state: str, empty: Path) -> tuple[Report, Truth]:
    paths = core_or_skip(name)
    files = files_for(MATRIX[name], paths.executable, state, empty)
    with coreheap.open(
        paths.core,
        executable=files.executable,
        sysroot=files.sysroot,
        debug_directories=files.debug_directories,
    ) as core:
        return coreheap.analyze(core), load_truth(paths.truth)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", INTACT)
def test_everything_is_as_the_process_knew_it(name: str, state: str, tmp_path: Path) -> None:
    report, truth = analyse(name, state, tmp_path)
    assert compare_all(report, truth) == []


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_costs_what_it_hit_and_no_more(name: str, state: str, tmp_path: Path) -> None:
    report, truth = analyse(name, state, tmp_path)
    assert report.heap is not None
    (damage,) = truth.damage
    word = 4 if MATRIX[name].target.is_32_bit else 8
    # A block whose size was overwritten is lost; the words of other structures belong to no block.
    lost = np.array([damage.address + word] if name.endswith("next_size") else [], np.uint64)
    spared = np.setdiff1d(truth.live_payload_address, lost)
    cached = np.union1d(truth.cached_payload_address, truth.orphan_cached_payload_address)
    assert set_difference("in use", payloads(report.heap, ChunkState.IN_USE), spared) == []
    assert set_difference("tcache", payloads(report.heap, ChunkState.TCACHE), cached) == []
    assert payloads(report.heap, ChunkState.DAMAGED).tolist() == lost.tolist()
    assert compare_malloc_info(report.heap, truth) == []
    assert ledger_errors(report.ledger) == []
    assert [anomaly.code for anomaly in report.anomalies] == [DAMAGE_CODES[MATRIX[name].arguments[0]]]
    assert abs(report.anomalies[0].address - damage.address) <= 3 * word


def test_no_case_is_forgotten() -> None:
    for target in targets.MATRIX_TARGETS:
        for name in CASES:
            assert (f"{target}/{name}" in MATRIX) is (exclusion_for(name, target) is None)
    assert set(MATRIX_ARGUMENTS) <= set(CASES)
    for exclusion in EXCLUSIONS:
        assert exclusion.reason
