"""THRESHOLD-RATCHET fires when raised thresholds keep 8 MiB and a tenth of the heaps, and not because they are raised."""

from __future__ import annotations

import dataclasses

import pytest

from coreheap.checks import Case
from coreheap.checks.threshold_ratchet import findings
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState, ChunkTable
from coreheap.report import Severity
from coreheap.settings import MallocSettings, SetBy, Setting, Settings, SettingUnit
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.cases import arena_of, totals_of, with_arenas, without_heap
from tests.unit.checks.conftest import CaseOf
from tests.unit.kernels.test_large import index_of

KIB, MIB = 1 << 10, 1 << 20
LIVE, LARGE, TOP = int(ChunkState.IN_USE), int(ChunkState.LARGE_BIN), int(ChunkState.TOP)


def setting(name: str, value: int, default: int, set_by: SetBy) -> Setting:
    return Setting(name, SettingUnit.BYTES, value, default, value == default, set_by)


def settings_of(mmap_threshold: int, set_by: SetBy = SetBy.RATCHET, top_pad: int = 128 * KIB) -> Settings:
    values = (
        setting("trim_threshold", 2 * mmap_threshold, 128 * KIB, set_by),
        setting("top_pad", top_pad, 128 * KIB, SetBy.DEFAULT),
        setting("mmap_threshold", mmap_threshold, 128 * KIB, set_by),
    )
    return Settings((MallocSettings(0, None, values, None, ""),), (), False, 4096, None)


def case_with(case: Case, chunks: list[tuple[int, int]], settings: Settings, top: int = 0) -> Case:
    """The case with one arena of these chunks (bytes, state)."""
    index = index_of([chunks])
    labels: dict[str, int] = {}
    for byte_count, state in chunks:
        labels[ChunkState(state).label] = labels.get(ChunkState(state).label, 0) + byte_count
    arena = dataclasses.replace(arena_of(1), totals=totals_of(**labels), regions=(0,), top_bytes=top)
    made = with_arenas(case, arena)
    assert made.heap is not None
    # The arena in front is empty and has no region.
    main = dataclasses.replace(made.heap.arenas[0], regions=(), top_bytes=0)
    table = ChunkTable(index, (), 8, 16)
    heap = dataclasses.replace(made.heap, arenas=(main, arena), chunks=table)
    return dataclasses.replace(made, heap=heap, settings=settings)


def test_large_free_blocks_and_the_top_stay(case_of: CaseOf) -> None:
    chunks = [(200 * KIB, LIVE), (300 * KIB, LARGE), (64 * KIB, LARGE), (9 * MIB, LARGE), (MIB, LIVE), (3 * MIB, TOP)]
    case = case_with(case_of(build_process(release("2.36"))), chunks, settings_of(2 * MIB), top=3 * MIB)
    (finding,) = findings(case)
    assert finding.code == "THRESHOLD-RATCHET"
    assert finding.severity is Severity.INFO
    assert finding.quantity("large_free_bytes") == 300 * KIB
    assert finding.quantity("large_free_chunks") == 1
    assert finding.quantity("merged_free_bytes") == 9 * MIB
    assert finding.quantity("top_bytes") == 3 * MIB - 128 * KIB
    assert finding.quantity("large_live_chunks") == 2
    assert finding.quantity("large_live_bytes") == 200 * KIB + MIB
    assert finding.quantity("kept_bytes") == 300 * KIB + 9 * MIB + 3 * MIB - 128 * KIB
    assert finding.confidence is Confidence.STRONG
    assert any("MALLOC_MMAP_THRESHOLD_=131072" in step for step in finding.next_steps)


@pytest.mark.parametrize(
    ("free_mib", "live_mib", "expected"),
    [
        (9, 20, Severity.INFO),
        (7, 20, None),  # little
        (9, 90, None),  # not a tenth
        (70, 100, Severity.WARNING),
        (70, 300, Severity.INFO),
    ],
)
def test_limits(case_of: CaseOf, free_mib: int, live_mib: int, expected: Severity | None) -> None:
    chunks = [(MIB, LIVE)] * live_mib + [(MIB, LARGE), (48, LIVE)] * free_mib
    case = case_with(case_of(build_process(release("2.36"))), chunks, settings_of(2 * MIB))
    assert [finding.severity for finding in findings(case)] == ([] if expected is None else [expected])


def test_nothing_is_said_where_the_thresholds_were_not_raised_by_malloc(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    chunks = [(MIB, LIVE), (20 * MIB, LARGE)]
    assert findings(case_with(case, chunks, settings_of(2 * MIB)))
    assert findings(case_with(case, chunks, settings_of(2 * MIB, SetBy.MALLOPT))) == ()
    assert findings(case_with(case, chunks, settings_of(128 * KIB, SetBy.DEFAULT))) == ()


def test_large_free_memory_among_small_blocks_is_not_blamed_on_the_threshold(case_of: CaseOf) -> None:
    """What grew together from small blocks is larger than any block that comes from the heap."""
    case = case_of(build_process(release("2.36")))
    assert findings(case_with(case, [(1024, LIVE), (50 * MIB, LARGE), (1024, LIVE)], settings_of(256 * KIB))) == ()
    in_range = [(1024, LIVE), (200 * KIB, LARGE)] * 60
    (finding,) = findings(case_with(case, in_range, settings_of(256 * KIB)))
    assert finding.confidence is Confidence.PLAUSIBLE


def test_what_is_missing_is_never_a_default(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36")))
    chunks = [(MIB, LIVE), (20 * MIB, LARGE)]
    whole = case_with(case, chunks, settings_of(2 * MIB))
    assert findings(dataclasses.replace(whole, settings=None)) == ()
    assert findings(without_heap(whole)) == ()
    no_mp = Settings((MallocSettings(0, None, (), None, ""),), None, None, None, None)
    assert findings(dataclasses.replace(whole, settings=no_mp)) == ()
    assert whole.heap is not None
    damaged = dataclasses.replace(whole, heap=dataclasses.replace(whole.heap, anomaly_count=2))
    (finding,) = findings(damaged)
    assert finding.confidence is Confidence.PLAUSIBLE
