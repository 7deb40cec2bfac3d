"""PARTIAL-CORE fires when the file is cut or memory that the heap needs is missing, and only then."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import coreheap
from coreheap.accounting import build_ledger
from coreheap.checks import Case
from coreheap.checks.partial_core import findings
from coreheap.evidence import Confidence, Gap
from coreheap.report import Severity
from tests.unit.allocators.built_process import THREADS, BuiltProcess, build_process, release
from tests.unit.checks.cases import without_heap
from tests.unit.checks.conftest import CaseOf

UNRELATED = 0x7FFF_E000_0000
"""Far from anything that a built process has."""


def test_missing_sub_heap_makes_a_core_partial(case_of: CaseOf) -> None:
    process = build_process(release("2.36"), THREADS)
    (finding,) = findings(case_of(process, (process.arenas[1].sub_heaps[1],)))
    assert finding.code == "PARTIAL-CORE"
    assert finding.severity is Severity.WARNING
    assert finding.confidence is Confidence.CERTAIN
    assert finding.quantity("writable_bytes_not_saved") == THREADS.sub_heap_bytes
    lowest = finding.quantity("lowest_arena_coverage")
    assert isinstance(lowest, float)
    assert 0.5 < lowest < 1.0
    assert finding.quantity("file_coverage") == 1.0


def test_missing_thread_storage_makes_a_core_partial(case_of: CaseOf) -> None:
    process = build_process(release("2.36"), THREADS)
    (finding,) = findings(case_of(process, (process.threads[1].mapping[0],)))
    assert finding.quantity("heap_bytes_not_attributed") == 0
    assert finding.quantity("lowest_arena_coverage") == 1.0


def test_sound_core_is_not_partial(case_of: CaseOf) -> None:
    assert findings(case_of(build_process(release("2.36"), THREADS))) == ()


@pytest.mark.parametrize(
    "cause",
    ["tcache_not_found", "thread_storage_not_saved", "release_unknown", "other_malloc_copy", "piece_of_unknown_copy"],
)
def test_what_a_whole_core_does_not_tell_is_not_missing(case_of: CaseOf, cause: str) -> None:
    """A program that called no malloc but posix_memalign has no tcache: no limit cut its core, and no other would have one."""
    gap = Gap(cause, "something is unknown")
    whole = build_process(release("2.36"), THREADS)
    case = case_of(whole)
    assert case.heap is not None
    assert findings(dataclasses.replace(case, heap=dataclasses.replace(case.heap, gaps=(gap,)))) == ()
    whole.unsaved.append((UNRELATED, UNRELATED + 0x10000, "rw-"))
    case = case_of(whole)
    assert case.heap is not None
    (finding,) = findings(dataclasses.replace(case, heap=dataclasses.replace(case.heap, gaps=(gap,))))
    assert finding.quantity("writable_bytes_not_saved") == 0x10000


def test_what_damage_made_unreadable_is_not_missing(case_of: CaseOf) -> None:
    """A top pointer of rubbish leads to no memory that the core could have had."""
    gap = Gap("top_not_saved", "top is not in the core")
    case = case_of(build_process(release("2.36"), THREADS))
    assert case.heap is not None
    unknown = dataclasses.replace(case.heap, gaps=(gap,))
    (finding,) = findings(dataclasses.replace(case, heap=unknown))
    assert finding.code == "PARTIAL-CORE"
    damaged = dataclasses.replace(unknown, anomaly_count=1)
    assert findings(dataclasses.replace(case, heap=damaged)) == ()
    whole = build_process(release("2.36"), THREADS)
    whole.unsaved.append((UNRELATED, UNRELATED + 0x10000, "rw-"))
    case = case_of(whole)
    assert case.heap is not None
    assert findings(dataclasses.replace(case, heap=dataclasses.replace(case.heap, gaps=(gap,), anomaly_count=1))) != ()


def test_unsaved_memory_beside_a_sound_heap_is_not_partial(case_of: CaseOf) -> None:
    process = build_process(release("2.36"), THREADS)
    process.unsaved.append((UNRELATED, UNRELATED + 0x10000, "rw-"))
    assert findings(case_of(process)) == ()


def test_unsaved_memory_without_a_heap_is_partial_and_unreadable_memory_is_not(case_of: CaseOf) -> None:
    process = build_process(release("2.36"))
    assert findings(without_heap(case_of(process))) == ()
    process.unsaved.append((UNRELATED, UNRELATED + 0x10000, "rw-"))
    (finding,) = findings(without_heap(case_of(process)))
    assert finding.quantity("writable_bytes_not_saved") == 0x10000
    assert finding.quantity("lowest_arena_coverage") is None


def truncated(process: BuiltProcess, folder: Path, share: float) -> Path:
    path = process.write(folder)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path


def test_cut_file_is_partial_whatever_the_heap(tmp_path: Path) -> None:
    for share in (0.999, 0.5, 0.1):
        with coreheap.open(truncated(build_process(release("2.36"), THREADS), tmp_path, share)) as core:
            heap = coreheap.analyze(core).heap
            (finding,) = findings(Case(core, heap, build_ledger(core, heap), ()))
            coverage = finding.quantity("file_coverage")
            assert isinstance(coverage, float)
            assert 0.0 <= coverage < 1.0
            assert finding.confidence is Confidence.CERTAIN
