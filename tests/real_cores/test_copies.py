"""Several copies of malloc in one process: each copy's arenas, blocks, figures and threads are its own."""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.allocators.glibc import leads
from coreheap.evidence import Confidence
from coreheap.heap import BINNED_STATES, NO_INDEX, ChunkState, HeapSnapshot
from coreheap.report import Report
from tests.real_cores import cores
from tests.real_cores.comparison import (
    Addresses,
    compare_all,
    compare_sets,
    copies_of,
    ledger_errors,
    mapped_bytes,
    payloads,
)
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth, load_truth

Analysed = Callable[[str], tuple[Report, Truth]]

COPIES = {
    "namespace": 2,
    "namespaces": 3,
    "namespaces_main_only": 3,
    "namespaces_gone": 3,
    "malloc_debug": 2,
    "side_by_side": 2,
}
MMAPPED = -1


def copy_by_address(heap: HeapSnapshot, addresses: Addresses) -> Addresses:
    """For each payload address the copy whose arena has it, MMAPPED for blocks with a mapping of their own; -2: no chunk."""
    copy_of_arena = {arena.index: arena.copy for arena in heap.arenas}
    result = np.full(len(addresses), -2, np.int64)
    for batch in heap.chunks.batches():
        hit = np.isin(addresses, batch.payload_address)
        result[hit] = MMAPPED if batch.arena == NO_INDEX else copy_of_arena[batch.arena]
    return result


@pytest.mark.parametrize("case", COPIES)
def test_everything_is_as_the_process_knew_it(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    assert compare_all(report, truth) == []
    assert report.heap is not None
    assert report.heap.identity.confidence is Confidence.CERTAIN
    assert [copy.confidence for copy in report.heap.copies] == [Confidence.CERTAIN] * COPIES[case]
    assert report.ledger.bytes == mapped_bytes(truth)


@pytest.mark.parametrize("case", COPIES)
def test_nothing_of_this_machine_is_needed(case: str, tmp_path: Path) -> None:
    paths = core_or_skip(case)
    report = report_on(paths.core, sysroot=tmp_path)
    assert compare_all(report, load_truth(paths.truth)) == []
    assert report.heap is not None
    assert len(report.heap.copies) == COPIES[case]
    assert all(copy.confidence is Confidence.CERTAIN for copy in report.heap.copies)
    assert not any("symbol" in fact.source for copy in report.heap.copies for fact in copy.evidence)


@pytest.mark.parametrize("case", COPIES)
def test_each_copy_has_its_own_blocks_and_figures(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    heap = report.heap
    assert heap is not None
    said_of = copies_of(truth)
    assert len(said_of) == len(heap.copies) == COPIES[case]
    matched = set()
    for said in said_of:
        found = copy_by_address(heap, said.live_payload_address)
        (number,) = set(found.tolist()) - {MMAPPED}
        assert number not in matched
        matched.add(number)
        assert (said.number == 0) is (number == 0)
        copy = heap.copies[number]
        assert copy.system_mem == said.system_mem
        assert copy.parameters is not None
        assert copy.parameters.value("n_mmaps") == said.mmapped_count
        assert copy.parameters.value("mmapped_mem") == said.mmapped_bytes
        arenas = [arena for arena in heap.arenas if arena.copy == number]
        assert [arena.is_main for arena in arenas] == [True] + [False] * (len(arenas) - 1)
        assert arenas[0].address == copy.main_arena
        assert copy.arena_count == len(arenas)
        free = (*BINNED_STATES, ChunkState.TOP, ChunkState.FASTBIN)
        assert sum(arena.bytes_in(*free) for arena in arenas) == said.free_bytes


@pytest.mark.parametrize("case", ["namespace", "namespaces", "namespaces_main_only", "side_by_side"])
def test_threads_have_an_arena_and_a_tcache_in_each_copy(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    heap = report.heap
    assert heap is not None
    index_of = {thread.lwp: thread.index for thread in report.threads}
    said_of = {thread.number: thread for thread in truth.live_threads}
    caches = {(cache.thread, cache.address) for cache in heap.thread_caches}
    noted = [tuple(int(word) for word in line.split()) for line in truth.notes["thread_of_copy"]]
    assert noted
    assert len(caches) == len(truth.live_threads)
    for number, _, tid in noted:
        said = said_of[number]
        assert said.tid == tid
        assert (index_of[tid], said.tcache_address) in caches
        if said.arena_address:
            (arena,) = [arena for arena in heap.arenas if arena.address == said.arena_address]
            assert index_of[tid] in arena.threads


def test_tcaches_of_threads_that_ended_stay_in_the_copies(analysed: Analysed) -> None:
    report, truth = analysed("namespaces_gone")
    assert report.heap is not None
    lwps = {thread.lwp for thread in report.threads}
    ended = [thread for thread in truth.live_threads if thread.tid not in lwps]
    assert ended
    without_thread = {cache.address for cache in report.heap.thread_caches if cache.thread is None}
    assert {thread.tcache_address for thread in ended} == without_thread


def test_the_copies_of_a_namespace_never_use_the_break(analysed: Analysed) -> None:
    report, _ = analysed("namespaces_main_only")
    assert report.heap is not None
    mains = [arena for arena in report.heap.arenas if arena.is_main]
    assert [arena.is_contiguous for arena in mains] == [True, False, False]
    assert [arena.brk_range is None for arena in mains] == [False, True, True]
    # Their pieces lie among each other.
    order = [region.arena for region in report.heap.chunks.regions if region.arena in (mains[1].index, mains[2].index)]
    assert sum(before != after for before, after in pairwise(order)) > 10


def test_a_break_that_two_mallocs_share_is_divided_to_the_byte(analysed: Analysed) -> None:
    report, _ = analysed("malloc_debug")
    assert report.heap is not None
    first, second = [arena for arena in report.heap.arenas if arena.is_main]
    assert first.brk_range is not None
    assert second.brk_range is not None
    assert max(first.brk_range.start, second.brk_range.start) < min(first.brk_range.end, second.brk_range.end)
    assert len(first.regions) > 2
    for arena in (first, second):
        own = sum(report.heap.chunks.regions[number].range.byte_count for number in arena.regions)
        assert own + arena.foreign_bytes == arena.system_mem
        assert arena.coverage == 1.0
    assert [copy.parameters.layout for copy in report.heap.copies if copy.parameters] == [
        "2.35",
        "2.35 without tcache",
    ]


def test_another_allocator_beside_two_of_glibc(analysed: Analysed) -> None:
    report, truth = analysed("side_by_side")
    assert report.heap is not None
    assert compare_sets(report.heap, truth) == []
    assert ledger_errors(report.ledger) == []
    (finding,) = [finding for finding in report.findings if finding.code == "OTHER-ALLOCATOR"]
    assert finding.subject == "jemalloc"
    # glibc's heaps hold much, so that nobody is told that malloc is jemalloc's alone.
    assert finding.quantity("glibc_heap_nearly_empty") == "false"
    assert finding.severity.value == "info"


def test_pieces_without_proof_are_a_gap_and_still_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    # With nothing but the ends of free lists some pieces say nothing of their arena.
    monkeypatch.setattr(leads, "LIST_STEPS", 1)
    paths = core_or_skip("namespaces_main_only")
    report = report_on(paths.core)
    assert report.heap is not None
    assert compare_sets(report.heap, load_truth(paths.truth)) == []
    assert ledger_errors(report.ledger) == []
    (gap,) = report.heap.gaps
    assert gap.cause == "piece_of_unknown_copy"
    assert [arena.coverage for arena in report.heap.arenas] == [1.0, 1.0, 1.0]
    assert not report.anomalies


# What looks like another arena: offsets of malloc_state of 2.27-2.42 on 64-bit machines (fact sheet, section 1).
TOP, BINS, NEXT, SYSTEM_MEM, STATE_BYTES = 0x60, 0x70, 0x870, 0x888, 2200


def planted(core: Path, directory: Path, state: bytes, at: int) -> Path:
    """A copy of a core with ``state`` in its memory."""
    copy = directory / core.name
    copy.write_bytes(core.read_bytes())
    with coreheap.open(core) as opened:
        run = int(np.searchsorted(opened.memory.run_start, at, side="right")) - 1
        offset = at - int(opened.memory.run_start[run]) + int(opened.memory.run_file_offset[run])
    with copy.open("r+b") as file:
        file.seek(offset)
        file.write(state)
    return copy


def zeros_in_data_of_libc(core: Path) -> int:
    """Where libc's own writable data has room that nothing uses."""
    with coreheap.open(core) as opened:
        memory = opened.memory
        for region in np.flatnonzero((memory.region_flags & 2 != 0) & (memory.region_file_index < 0)).tolist():
            start, end = int(memory.region_start[region]), int(memory.region_end[region])
            before = memory.region_file_index[region - 1] if region else -1
            if before < 0 or int(memory.region_end[region - 1]) != start or not memory.is_saved(start, end):
                continue
            data = memory.read(start, end - start)
            place = data.find(bytes(STATE_BYTES + 64))
            if place >= 0:
                return start + place + -(start + place) % 32 + 32
    # libc keeps tens of KiB of buffers and tables in its bss, most of them never used by this program.
    pytest.fail("no bss of this core has room")


def malloc_state(address: int, top: int, following: int) -> bytes:
    """An arena that is consistent in itself: all bins empty, some memory, its ring closed where ``following`` is itself."""
    state = bytearray(STATE_BYTES)
    struct.pack_into("<Q", state, TOP, top)
    for number in range(127):
        header = address + BINS + 16 * number - 16
        struct.pack_into("<QQ", state, BINS + 16 * number, header, header)
    struct.pack_into("<Q", state, NEXT, following)
    struct.pack_into("<QQ", state, SYSTEM_MEM, 0x21000, 0x21000)
    return bytes(state)


@pytest.mark.parametrize("what", ["stale", "led_into_the_ring", "copied"])
def test_data_that_only_looks_like_an_arena_is_no_copy(what: str, tmp_path: Path) -> None:
    paths = core_or_skip("plain_small")
    truth = load_truth(paths.truth)
    at = zeros_in_data_of_libc(paths.core)
    with coreheap.open(paths.core) as core:
        heap = coreheap.analyze(core).heap
        assert heap is not None
        (main,) = [arena.address for arena in heap.arenas]
        assert main is not None
        image = core.memory.read(main, STATE_BYTES)
    live = int(truth.live_payload_address[0])
    state = {
        # Its heap is something else by now: top is no chunk that ends a heap.
        "stale": malloc_state(at, live + 16, at),
        "led_into_the_ring": malloc_state(at, live + 16, main),
        # A program keeps the bytes of the real one.
        "copied": image,
    }[what]
    report = report_on(planted(paths.core, tmp_path, state, at), sysroot=tmp_path)
    assert compare_all(report, truth) == []
    assert report.heap is not None
    assert [copy.main_arena for copy in report.heap.copies] == [main]


@pytest.mark.parametrize("share", [0.6, 0.97])
def test_copies_whose_main_arenas_were_cut_off_keep_their_arenas(share: float, tmp_path: Path) -> None:
    paths = core_or_skip("namespaces")
    truth = load_truth(paths.truth)
    report = report_on(cores.truncated(paths.core, share, tmp_path), sysroot=tmp_path)
    assert report.heap is not None
    assert len(report.heap.copies) == COPIES["namespaces"]
    assert report.heap.identity.confidence is not Confidence.CERTAIN
    known = np.concatenate([truth.live_payload_address, truth.cached_payload_address, truth.tcache_payload_address])
    in_use = payloads(report.heap, ChunkState.IN_USE)
    assert len(in_use) > 500
    assert np.setdiff1d(in_use, known).tolist() == []
    assert report.heap.gaps
    assert ledger_errors(report.ledger) == []
