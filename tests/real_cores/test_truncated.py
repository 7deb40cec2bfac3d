"""Cores that were cut: what is there is exact, what is not is named, nothing is made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from coreheap.cli import main
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.report import Report
from tests.real_cores import cores
from tests.real_cores.comparison import compare_arena, ledger_errors, payloads
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth, load_truth

CASES = (
    "threads_kept",
    "threads_gone",
    "plain_small",
    "many_sub_heaps",
    "fork_child",
    "every_list",
    "mmapped",
    "static_exe",
)
SHARES = (0.1, 0.5, 0.9)

Addresses = NDArray[np.uint64]
Cut = Callable[[str, float], tuple[Report, Truth, Path]]


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Cut:
    """``cut(case, share)``: the report on the first part of a case's core, its truth, and the cut file."""
    directory = tmp_path_factory.mktemp("cut")
    done: dict[tuple[str, float], tuple[Report, Truth, Path]] = {}

    def analyse(case: str, share: float) -> tuple[Report, Truth, Path]:
        if (case, share) not in done:
            paths = core_or_skip(case)
            path = cores.truncated(paths.core, share, directory)
            done[case, share] = (report_on(path), load_truth(paths.truth), path)
        return done[case, share]

    return analyse


def covered(heap: HeapSnapshot, addresses: Addresses) -> Addresses:
    """Those payload addresses that lie in memory which the report says it walked."""
    inside = np.zeros(len(addresses), bool)
    for region in heap.chunks.regions:
        inside |= (addresses > np.uint64(region.range.start)) & (addresses < np.uint64(region.range.end))
    return addresses[inside]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", SHARES)
def test_what_is_covered_is_exact(
    cut: Cut, analysed: Callable[[str], tuple[Report, Truth]], case: str, share: float
) -> None:
    report, truth, _ = cut(case, share)
    assert report.core.truncated
    assert report.is_partial
    assert abs(report.core.coverage - share) < 0.02
    assert report.defects == ()
    assert ledger_errors(report.ledger) == []
    heap = report.heap
    if heap is None:
        assert not any(finding.code == "OTHER-ALLOCATOR" for finding in report.findings)
        return
    in_regions = payloads_in_regions(heap, ChunkState.IN_USE)
    cached_truth = np.union1d(truth.cached_payload_address, truth.orphan_cached_payload_address)
    own_truth = np.union1d(truth.tcache_payload_address, truth.orphan_tcache_payload_address)
    cached = payloads(heap, ChunkState.TCACHE)
    own = payloads(heap, ChunkState.ALLOCATOR_OWN)
    # Never made up: what is called cached or malloc's own is, wherever the core was cut.
    assert np.setdiff1d(cached, cached_truth).tolist() == []
    assert np.setdiff1d(own, own_truth).tolist() == []
    # What looks in use is live, or on a list that the cut took, which a gap then says.
    live = covered(heap, truth.live_payload_address)
    unknown_caches = covered(heap, np.setdiff1d(np.union1d(cached_truth, own_truth), np.union1d(cached, own)))
    assert np.setdiff1d(live, in_regions).tolist() == []
    more = np.setdiff1d(in_regions, np.union1d(live, unknown_caches))
    # realloc frees what it cuts off, which the process does not see; the intact core has that on a list (test_intact).
    whole = analysed(case)[0].heap
    assert whole is not None
    listed = payloads(whole, ChunkState.FASTBIN)
    assert np.setdiff1d(more, np.union1d(truth.freed_payload_address, listed)).tolist() == []
    causes = {gap.cause for gap in heap.gaps}
    if len(unknown_caches):
        assert causes & {"thread_storage_not_saved", "past_threads_not_saved", "free_list_cut"}
    if len(more):
        assert causes & {"free_list_cut", "main_arena_unknown", "arena_not_saved"}


def payloads_in_regions(heap: HeapSnapshot, state: ChunkState) -> Addresses:
    parts = [batch.payload_address[batch.state == state] for batch in heap.chunks.batches() if not batch.is_mmapped]
    return np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", SHARES)
def test_nothing_is_made_up(cut: Cut, analysed: Callable[[str], tuple[Report, Truth]], case: str, share: float) -> None:
    report, truth, _ = cut(case, share)
    assert report.anomalies == ()
    heap = report.heap
    if heap is None:
        return
    info = truth.malloc_info
    assert info is not None
    whole = analysed(case)[0].heap
    assert whole is not None
    # On the intact core, arenas are numbered like malloc_info's heaps (test_intact).
    said = {arena.address: info.heaps[arena.index] for arena in whole.arenas}
    for arena in heap.arenas:
        if arena.system_mem is None:
            assert arena.coverage is None
            assert arena.address is None or arena.address in said
            continue
        assert arena.system_mem == said[arena.address].system_current
        if arena.coverage == 1.0 and not arena.totals[ChunkState.FREE_UNLISTED].count:
            assert compare_arena(arena, said[arena.address]) == []
    assert {thread.lwp for thread in report.threads} <= {thread.tid for thread in truth.threads}
    mmapped = payloads(heap, ChunkState.IN_USE)
    mmapped = np.setdiff1d(mmapped, payloads_in_regions(heap, ChunkState.IN_USE))
    made_up = np.setdiff1d(mmapped, truth.live_payload_address).tolist()
    if any(gap.cause == "malloc_par_unknown" for gap in heap.gaps):
        # Without n_mmaps, the program's own mapping that mimics a header cannot be told from a chunk; the gap says so.
        made_up = [address for address in made_up if address - 16 not in truth.note_numbers("mimic")]
    assert made_up == []


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", SHARES)
def test_it_is_said_and_weakens_what_follows(cut: Cut, case: str, share: float) -> None:
    report, _, _ = cut(case, share)
    (finding,) = [finding for finding in report.findings if finding.code == "PARTIAL-CORE"]
    assert finding.quantity("file_coverage") == report.core.coverage
    assert any(gap.cause == "core_truncated" for gap in report.gaps)
    if report.heap is not None and report.heap.gaps and report.heap.main_arena is not None:
        incomplete = any(arena.coverage != 1.0 for arena in report.heap.arenas)
        assert not incomplete or report.heap.identity.confidence is not Confidence.CERTAIN


@pytest.mark.parametrize("share", SHARES)
def test_exit_codes(cut: Cut, share: float, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, path = cut("threads_kept", share)
    assert main(["analyze", str(path), "--json"]) == 0
    assert main(["analyze", str(path), "--json", "--strict"]) == 4
    assert main(["analyze", str(path), "--json", "--fail-on", "warning"]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_core_without_any_memory_says_so() -> None:
    report = report_on(core_or_skip("threads_kept@filter_nothing").core)
    assert report.heap is None
    codes = [finding.code for finding in report.findings]
    assert codes == ["PARTIAL-CORE"]
    assert report.threads
