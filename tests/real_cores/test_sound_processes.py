"""Sound processes that leave odd traces: nothing of them is damage, and what malloc was in the middle of is none either."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.allocators.glibc.arenas import survey_arenas
from coreheap.allocators.glibc.copies import identify_copies
from coreheap.allocators.glibc.judgement import Judge
from coreheap.damage import DamageKind
from coreheap.evidence import Anomaly, Confidence
from coreheap.report import Report
from tests.real_cores.comparison import compare_all, compare_sets
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth

Analysed = Callable[[str], tuple[Report, Truth]]


@pytest.mark.parametrize("case", ["remapped", "refilled"])
def test_nothing_is_damaged_and_every_block_is_in_its_place(case: str, analysed: Analysed) -> None:
    report, truth = analysed(case)
    assert report.heap is not None
    assert [anomaly.code for anomaly in report.heap.anomalies] == []
    assert report.damages == ()
    assert compare_all(report, truth) == []
    assert compare_sets(report.heap, truth) == []


def test_the_workers_of_io_uring_have_no_tcache_of_their_own(analysed: Analysed) -> None:
    """The kernel copies the thread pointer to them: each tcache would be found several times, and all on it freed twice."""
    report, truth = analysed("io_workers")
    assert report.heap is not None
    assert truth.note_numbers("io_workers") == [9]
    assert {thread.lwp for thread in report.threads} == {thread.tid for thread in truth.live_threads}
    addresses = [cache.address for cache in report.heap.thread_caches]
    assert len(addresses) == len(set(addresses)) == 3
    assert compare_all(report, truth) == []


@pytest.mark.parametrize(
    ("case", "confidence"),
    [
        ("interrupted_libc", Confidence.PLAUSIBLE),
        ("interrupted_call", Confidence.STRONG),
        ("interrupted_program", Confidence.STRONG),
        ("plain_small", Confidence.STRONG),
    ],
)
def test_a_handler_that_came_in_the_middle_of_malloc_leaves_doubt(case: str, confidence: Confidence) -> None:
    """With one thread malloc takes no lock: only the frame that the kernel wrote for the handler tells."""
    with coreheap.open(core_or_skip(case).core) as core:
        copies = identify_copies(core)
        assert copies is not None
        judge = Judge(core, copies.found, survey_arenas(core, copies.found).arenas)
        judged = judge.judged(Anomaly("list_looks_in_use", 0, "", "", arena=0))
        assert judged.confidence is confidence


def test_only_what_a_thread_inside_malloc_holds_is_in_doubt() -> None:
    """It was interrupted in libc: a chunk whose address it does not hold is none that it was changing."""
    with coreheap.open(core_or_skip("interrupted_libc").core) as core:
        heap = coreheap.analyze(core).heap
        copies = identify_copies(core)
        assert copies is not None
        assert heap is not None
        judge = Judge(core, copies.found, survey_arenas(core, copies.found).arenas, heap.chunks.index)
        arena = heap.arenas[0].address
        (batch,) = [batch for batch in heap.chunks.batches() if batch.arena == 0 and not batch.is_mmapped][:1]
        headers = batch.header_address.tolist()
        held = {judge.judged(Anomaly("list_looks_in_use", header, "", "", arena=0)).confidence for header in headers}
        of_the_arena = judge.judged(Anomaly("top_size_mismatch", headers[0], "", "", arena=0, word_address=arena))
    # strlen works on no block and on no arena.
    assert held == {Confidence.STRONG}
    assert of_the_arena.confidence is Confidence.CERTAIN


@pytest.mark.parametrize("of_the_past", [True, False])
def test_a_count_of_a_thread_that_fork_left_behind_is_no_damage(of_the_past: bool, tmp_path: Path) -> None:
    """fork takes the arenas' locks and waits for no tcache: the parent's other threads may have been in the middle of theirs."""
    original = core_or_skip("fork_child").core
    with coreheap.open(original) as core:
        heap = coreheap.analyze(core).heap
        assert heap is not None
        cache = next(cache for cache in heap.thread_caches if (cache.thread is None) is of_the_past and cache.count)
        place = cache.address + 2 * next(number for number, count in _counts(core, cache.address) if count)
        run = int(np.searchsorted(core.memory.run_start, np.uint64(place), side="right")) - 1
        offset = int(core.memory.run_file_offset[run]) + place - int(core.memory.run_start[run])
    content = bytearray(original.read_bytes())
    content[offset] += 1
    changed = tmp_path / "core"
    changed.write_bytes(content)

    report = report_on(changed)
    codes = {finding.code for finding in report.findings if finding.code.startswith("CORRUPTION")}
    assert codes == (set() if of_the_past else {"CORRUPTION-ALLOCATOR-DATA"})
    assert [damage.kind is DamageKind.IN_TRANSITION for damage in report.damages] == [of_the_past]


def _counts(core: coreheap.Core, address: int) -> list[tuple[int, int]]:
    """(number, count) of a tcache's lists, as 2.30 to 2.41 have them."""
    counts = np.frombuffer(core.memory.read(address, 2 * 64), "<u2")
    return list(enumerate(counts.tolist()))
