"""Intact cores of every kind: all blocks in their places, every figure of malloc_info, every byte accounted for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.report import Report
from tests.real_cores import cores
from tests.real_cores.comparison import (
    compare_all,
    compare_malloc_info,
    compare_sets,
    mapped_bytes,
    payloads,
)
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth, load_truth

Analysed = Callable[[str], tuple[Report, Truth]]

INTACT = (
    "threads_kept",
    "threads_kept@filter_all",
    "threads_kept@filter_no_files",
    "threads_kept@filter_anonymous",
    "threads_kept@segv",
    "threads_kept@gcore",
    "threads_gone",
    "one_arena",
    "static_exe",
    "static_pie",
    "non_pie",
    "threads_small",
    "plain_small",
    "fork_child",
    "fork_child_grows",
    "many_sub_heaps",
    "every_list",
    "brk_blocked",
    "foreign_sbrk",
    "mmapped",
    "bloat",
    "bloat_small",
    "retained",
    "retained_small",
    "abort_double_free",
)

# After the process wrote down its mappings, glibc mapped a page for its abort message.
MAPPED_LATER = {"abort_double_free": 4096}
# gdb leaves out mappings that it cannot read (vvar, vsyscall) and read-only ones of files.
NOT_ALL_MAPPINGS = {"threads_kept@gcore"}


@pytest.mark.parametrize("case", INTACT)
def test_everything_is_as_the_process_knew_it(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    assert compare_all(report, truth) == []
    assert report.heap is not None
    assert report.heap.identity.confidence is Confidence.CERTAIN
    assert report.heap.identity.layout == "glibc 2.35-2.41"
    assert not report.is_partial


@pytest.mark.parametrize("case", [case for case in INTACT if case not in NOT_ALL_MAPPINGS])
def test_the_ledger_is_the_whole_address_space(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    assert report.ledger.bytes == mapped_bytes(truth) + MAPPED_LATER.get(case, 0)


@pytest.mark.parametrize("case", INTACT)
def test_threads_have_the_arenas_and_caches_that_they_named(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    assert report.heap is not None
    arena_addresses = {arena.index: arena.address for arena in report.heap.arenas}
    main = report.heap.identity.main_arena
    by_lwp = {thread.lwp: thread for thread in report.threads}
    for said in truth.live_threads:
        found = by_lwp[said.tid]
        if said.tcache_address is not None:
            assert found.thread_cache == said.tcache_address
        if said.arena_address is not None:
            assert found.arena is not None
            assert arena_addresses[found.arena] == (said.arena_address or main)


@pytest.mark.parametrize("case", ["every_list"])
def test_blocks_are_on_the_lists_that_the_program_aimed_at(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    assert report.heap is not None
    for place, state in (
        ("tcache", ChunkState.TCACHE),
        ("fastbin", ChunkState.FASTBIN),
        ("unsorted", ChunkState.UNSORTED_BIN),
        ("small_bin", ChunkState.SMALL_BIN),
        ("large_bin", ChunkState.LARGE_BIN),
    ):
        meant = set(truth.blocks_meant_for(place).tolist())
        assert meant
        assert meant <= set(payloads(report.heap, state).tolist()), place


@pytest.mark.parametrize("case", ["plain_small", "threads_kept", "static_pie", "mmapped", "fork_child"])
def test_nothing_of_this_machine_is_needed(case: str, tmp_path: Path) -> None:
    paths = core_or_skip(case)
    report = report_on(paths.core, sysroot=tmp_path)
    assert compare_all(report, load_truth(paths.truth)) == []
    assert report.heap is not None
    assert report.heap.identity.confidence is Confidence.CERTAIN
    assert not any("symbol" in fact.source for fact in report.heap.identity.evidence)


def test_the_main_arena_in_pieces_is_complete(analysed: Analysed) -> None:
    report, _ = analysed("brk_blocked")
    assert report.heap is not None
    main = report.heap.main_arena
    assert main is not None
    assert main.is_contiguous is False
    assert len(main.regions) > 2
    covered = sum(report.heap.chunks.regions[number].range.byte_count for number in main.regions)
    assert covered == main.system_mem


def test_foreign_sbrk_is_named_to_the_byte(analysed: Analysed) -> None:
    report, truth = analysed("foreign_sbrk")
    assert report.heap is not None
    main = report.heap.main_arena
    assert main is not None
    areas = sorted((int(line.split()[0], 16), int(line.split()[1])) for line in truth.notes["foreign"])
    found = [(part.range.start, part.range.byte_count) for part in main.unattributed]
    # What malloc skips to align its next chunk goes with the foreign area, whose end may lie anywhere.
    assert [start for start, _ in areas] == [start for start, _ in found]
    assert [(size + 15) // 16 * 16 for _, size in areas] == [size for _, size in found]
    assert main.foreign_bytes == report.ledger.child("malloc", "main_arena", "foreign_sbrk").bytes


@pytest.mark.parametrize("case", ["threads_small", "bloat_small"])
@pytest.mark.parametrize("suffix", ["zst", "lz4", "xz", "gz"])
def test_compressed_cores(case: str, suffix: str, tmp_path: Path) -> None:
    paths = core_or_skip(case)
    report = report_on(cores.compressed(paths.core, suffix, tmp_path))
    assert compare_all(report, load_truth(paths.truth)) == []
    assert report.core.compression == suffix


@pytest.mark.parametrize("case", ["threads_small", "mmapped"])
def test_cores_whose_holes_were_filled(case: str, tmp_path: Path) -> None:
    paths = core_or_skip(case)
    report = report_on(cores.holes_filled(paths.core, tmp_path))
    assert compare_all(report, load_truth(paths.truth)) == []


def test_ten_million_chunks(analysed: Analysed) -> None:
    report, truth = analysed("big_heap")
    assert report.heap is not None
    assert compare_malloc_info(report.heap, truth) == []
    # The program counts its own blocks; libc's own few are what is more.
    in_use = report.totals[ChunkState.IN_USE]
    (live,) = truth.note_numbers("live_blocks")
    assert live <= in_use.count < live + 100
    assert not report.heap.anomaly_count


@pytest.mark.parametrize("name", cores.fixture_names())
def test_committed_fixtures(name: str) -> None:
    fixture = cores.fixture(name)
    report = report_on(fixture.compressed_core)
    truth = load_truth(fixture.truth)
    assert report.heap is not None
    assert compare_sets(report.heap, truth) == []
    assert compare_malloc_info(report.heap, truth) == []
    assert compare_all(report, truth) == []
