"""What malloc_trim(0) would return, against what it did return: page by page, measured by the process itself.

The program (fixtures/programs/trim.c) forks a child with the same heap at the same addresses. The child notes by
/proc/self/pagemap which pages were there before and not after; the core is of the parent, which did not trim.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.allocators.glibc import GlibcAllocator
from coreheap.corefile import Core
from coreheap.corefile.residency import stored_pieces
from coreheap.free_memory import FreeMemoryReport, TopStays
from coreheap.heap import HeapSnapshot
from coreheap.mappings import ResidencyBasis
from coreheap.retention import survey_free_memory
from coreheap.retention.runs import runs_of
from coreheap.retention.trim import trim_spans
from tests.real_cores.cases import MATRIX
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.truth import load_truth

UNTRIMMED = ("trim", "trim@before", "trim@behind", "trim@huge")
NATIVE_AND_MATRIX = [
    *UNTRIMMED,
    *(name for name in MATRIX if name.split("/")[1] in UNTRIMMED),
]
TRIMMED = ["trim@trimmed", *(name for name in MATRIX if name.endswith("/trim@trimmed"))]
PAGE = 4096
FEWEST_PAGES = 40
"""That a trim must have given back for the comparison to mean anything."""


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for start, end in ranges for page in range(start, end, PAGE)}


def predicted_pages(core: Core, heap: HeapSnapshot) -> tuple[set[int], set[int]]:
    """Pages that malloc_trim would give back, and those of them that the core says were in memory."""
    whole: set[int] = set()
    there: set[int] = set()
    for arena in heap.arenas:
        spans = trim_spans(core, heap, arena, runs_of(heap, arena.regions, core.page_bytes))
        ranges = list(zip(spans.start.tolist(), spans.end.tolist(), strict=True))
        if spans.top is not None:
            assert not spans.top_is_unsure
            ranges.append(spans.top)
        whole |= pages(ranges)
        for start, end in ranges:
            stored = stored_pieces(core.memory, np.array([start], np.uint64), np.array([end], np.uint64))
            there |= pages(list(zip(stored.start.tolist(), stored.end.tolist(), strict=True)))
    return whole, there


def surveyed(path: Path) -> tuple[FreeMemoryReport, set[int], set[int]]:
    with coreheap.open(path) as core:
        heap = GlibcAllocator().snapshot(core, lambda phase, done, total: None)
        assert heap is not None
        basis = ResidencyBasis.HOLES if core.memory.holes_known else ResidencyBasis.ZERO_PAGES
        whole, there = predicted_pages(core, heap)
        return survey_free_memory(core, heap, basis), whole, there


@pytest.mark.parametrize("name", NATIVE_AND_MATRIX)
def test_the_what_if_is_what_malloc_trim_did(name: str) -> None:
    paths = core_or_skip(name)
    truth = load_truth(paths.truth)
    if truth.made_by != "kernel":
        pytest.skip("only the kernel's cores tell which pages were in memory; set core_pattern to core")
    report, whole, there = surveyed(paths.core)
    numbers = truth.note_numbers("gone")
    gone = pages(list(zip(numbers[::2], numbers[1::2], strict=True)))
    assert gone == there, f"{len(gone - there)} pages went that were not foreseen, {len(there - gone)} did not go"
    assert len(gone) > FEWEST_PAGES
    assert report.basis is ResidencyBasis.HOLES
    assert report.trim.resident_low == report.trim.resident_high == len(gone) * PAGE
    assert report.trim.bytes == len(whole) * PAGE
    main = report.arenas[0].heaps[0]
    if name.endswith("@behind"):
        assert main.top_stays is TopStays.NOT_AT_BREAK
        assert main.trim.top_bytes == 0
        # What could not go was in memory.
        assert main.top_bytes > 4 * PAGE
    elif not name.endswith("@huge"):
        assert main.trim.top_bytes > 0
    assert truth.note_numbers("returned") == [1]


@pytest.mark.parametrize("name", TRIMMED)
def test_a_trimmed_heap_has_nothing_left_to_give(name: str) -> None:
    """The second core of the same program, which did trim: what is free there has no page in memory any more."""
    paths = core_or_skip(name)
    if load_truth(paths.truth).made_by != "kernel":
        pytest.skip("only the kernel's cores tell which pages were in memory; set core_pattern to core")
    report, _, there = surveyed(paths.core)
    assert there == set()
    assert report.trim.resident_high == 0
    assert report.trim.bins_bytes > FEWEST_PAGES * PAGE
    assert report.trim.top_bytes == 0


def test_two_cores_of_one_program_differ_by_what_was_foreseen() -> None:
    """Untrimmed and trimmed, in sum: the heap's pages in the one less those in the other."""
    in_memory = []
    for name in ("trim", "trim@trimmed"):
        paths = core_or_skip(name)
        if load_truth(paths.truth).made_by != "kernel":
            pytest.skip("only the kernel's cores tell which pages were in memory; set core_pattern to core")
        with coreheap.open(paths.core) as core:
            heap = GlibcAllocator().snapshot(core, lambda phase, done, total: None)
            assert heap is not None
            ranges = [(part.range.start // PAGE * PAGE, part.range.end) for part in heap.chunks.regions]
            in_memory.append(sum(core.memory.populated_bytes(start, end) for start, end in ranges))
            if name == "trim":
                foreseen = survey_free_memory(core, heap, ResidencyBasis.HOLES).trim.resident_low
    assert in_memory[0] - in_memory[1] == foreseen
