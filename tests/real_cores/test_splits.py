"""Sound heaps with pages that the program protected, advised, covered or unmapped: every block is found, each hole has its name.

The truth is the process's own (splits.c): a block with such a page in it is one block, and what lies before and behind is all there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from coreheap.damage import DamageKind
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.leaks import Verdict
from coreheap.report import Report
from tests.real_cores import cores, targets
from tests.real_cores.cases import CASES, MATRIX, Case
from tests.real_cores.comparison import (
    DAMAGE_CODES,
    compare_malloc_info,
    compare_sets,
    damage_of_a_sound_heap,
    ledger_errors,
    payloads,
    set_difference,
    verdicts_at,
)
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth, load_truth

Analysed = Callable[[str], tuple[Report, Truth]]

OF_ALL = {**CASES, **MATRIX}
SPLIT = tuple(name for name, case in OF_ALL.items() if case.program == "splits")
WITH_HEADERS = tuple(name for name in SPLIT if "at=headers" in OF_ALL[name].arguments)
LOST = tuple(name for name in SPLIT if "where=lost" in OF_ALL[name].arguments)
BARRED = tuple(name for name in SPLIT if "at=barred" in OF_ALL[name].arguments)
WHOLE = tuple(name for name in SPLIT if name not in (*WITH_HEADERS, *BARRED))

HOLE_CAUSES = {
    "dump": "block_not_saved",
    "shared": "block_other_mapping",
    "file": "block_other_mapping",
    "private": "block_other_mapping",
    "unmap": "block_unmapped",
    "remap": "block_unmapped",
}
"""By what happened to the pages; what else happened left malloc's own bytes in the core."""


def analysed(name: str) -> tuple[Report, Truth]:
    target = OF_ALL[name].target
    paths = core_or_skip(name)
    sysroot = None
    if target.release is not None:
        sysroot = targets.files_of(target, cores.default_directory()).sysroot
    return report_on(paths.core, sysroot), load_truth(paths.truth)


def argument(case: Case, name: str, otherwise: str) -> str:
    return next((text.partition("=")[2] for text in case.arguments if text.startswith(f"{name}=")), otherwise)


def holes_of(truth: Truth) -> list[tuple[int, int]]:
    """Start and end of the pages that were changed."""
    rows = [line.split() for line in truth.notes.get("hole", [])]
    return [(int(start, 16), int(start, 16) + int(length)) for start, length in rows]


def holes_to_name(case: Case, truth: Truth) -> dict[tuple[int, int], str]:
    """The pages that are not malloc's or not in the core, and the cause that the report has to give."""
    how = argument(case, "how", "")
    if argument(case, "at", "inside") == "top":
        return {}
    return dict.fromkeys(holes_of(truth), HOLE_CAUSES[how]) if how in HOLE_CAUSES else {}


def differences(case: Case, report: Report, truth: Truth) -> list[str]:
    heap = report.heap
    if heap is None:
        return ["no heap was found"]
    found = [*ledger_errors(report.ledger), *damage_of_a_sound_heap(report), *report.defects]
    found += [f"anomaly {anomaly}" for anomaly in report.anomalies]
    return found


@pytest.mark.parametrize("name", WHOLE)
def test_every_block_is_found_around_the_pages(name: str) -> None:
    report, truth = analysed(name)
    case, heap = OF_ALL[name], report.heap
    assert heap is not None
    assert differences(case, report, truth) == []
    assert compare_sets(heap, truth) == []
    assert compare_malloc_info(heap, truth) == []
    named = {(gap.range.start, gap.range.end): gap.cause for gap in heap.gaps if gap.range is not None}
    assert len(named) == len(heap.gaps)
    if case.made_by == "gcore" and argument(case, "how", "") == "none":
        # gdb leaves some of the pages out that nobody may access, as if they were not mapped.
        assert named.items() <= dict.fromkeys(holes_of(truth), "block_unmapped").items()
    else:
        assert named == holes_to_name(case, truth)


@pytest.mark.parametrize("name", WITH_HEADERS)
def test_pages_with_headers_cost_the_blocks_in_them_and_no_others(name: str) -> None:
    report, truth = analysed(name)
    case, heap = OF_ALL[name], report.heap
    assert heap is not None
    assert differences(case, report, truth) == []
    holes = holes_of(truth) if argument(case, "how", "") != "none" else []
    word = 4 if case.target.is_32_bit else 8
    spared = without_headers_in(truth.live_payload_address, holes, word)
    found = payloads(heap, ChunkState.IN_USE)
    assert set_difference("in use", found, spared) == []
    cached = np.union1d(truth.cached_payload_address, truth.orphan_cached_payload_address)
    assert set_difference("tcache", payloads(heap, ChunkState.TCACHE), cached) == []
    causes = {gap.cause for gap in heap.gaps}
    if not holes:
        assert causes == set()
        return
    # A block before the pages ends in them; one behind them whose header was in them has an end that no header tells.
    cause = "unmapped" if "how=unmap" in case.arguments else "other_mapping"
    assert {f"heap_{cause}"} <= causes <= {f"heap_{cause}", f"block_{cause}", "heap_unproven"}


def without_headers_in(blocks: NDArray[np.uint64], holes: list[tuple[int, int]], word: int) -> NDArray[np.uint64]:
    """Of blocks those whose size word is in no hole."""
    size_word = blocks - np.uint64(word)
    inside = np.zeros(len(blocks), bool)
    for start, end in holes:
        inside |= (size_word >= start) & (size_word < end)
    return blocks[~inside]


@pytest.mark.parametrize("name", BARRED)
def test_malloc_that_died_at_a_protected_page_accuses_nobody(name: str) -> None:
    report, truth = analysed(name)
    assert report.heap is not None
    freed = np.array(truth.note_numbers("barred"), np.uint64)
    found = payloads(report.heap, ChunkState.IN_USE)
    assert set_difference("in use", np.union1d(found, freed), truth.live_payload_address) == []
    assert [damage.kind for damage in report.damages if damage.kind is not DamageKind.IN_TRANSITION] == []
    assert [finding.code for finding in report.findings if finding.code.startswith(DAMAGE_CODES)] == []
    assert report.defects == ()


@pytest.mark.parametrize("name", LOST)
def test_lost_arrays_are_lost_and_what_hangs_from_them_too(name: str) -> None:
    report, truth = analysed(name)
    heap = report.heap
    assert heap is not None
    for kind, verdict in (("definite", Verdict.DEFINITELY_LOST), ("indirect", Verdict.INDIRECTLY_LOST)):
        meant = truth.leaks_of(kind)
        assert len(meant)
        assert verdicts_at(heap, meant).tolist() == [int(verdict)] * len(meant)
    assert is_mmapped(heap, truth.leaks_of("definite"))
    (leak,) = [finding for finding in report.findings if finding.code == "LEAK"]
    assert leak.quantity("definite_count") == len(truth.leaks_of("definite"))


def is_mmapped(heap: HeapSnapshot, blocks: NDArray[np.uint64]) -> bool:
    word = heap.chunks.index.geometry.word_bytes
    return bool(np.isin(blocks, heap.chunks.index.mmapped.header_address + np.uint64(2 * word)).all())
