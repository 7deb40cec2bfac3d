"""What ``malloc_trim(0)`` would return, page by page.

Knows: what malloc_trim does in all releases from 2.12 on (mtrim, systrim in malloc.c). Does not know: chunks one by one.

First fastbins are consolidated. Of every chunk in the unsorted and the larger bins the pages behind its first six words are
given back by MADV_DONTNEED. Then the main arena's top, and only that one, is cut in whole pages (or in huge ones, where mp_.thp_pagesize
is set) as long as more than MINSIZE stays, and only where it ends at the break. Tcaches keep what they have.
tests/real_cores/test_trim.py holds all of it against what real releases did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.corefile.residency import ByteRuns, pages_with_content, saved_runs, stored_pieces
from coreheap.free_memory import TrimEstimate
from coreheap.heap import Arena, HeapSnapshot, RegionKind
from coreheap.mappings import ResidencyBasis
from coreheap.retention.runs import HEADER_WORDS, RegionRuns, round_down, round_up, sums_between

UInt64s = npt.NDArray[np.uint64]

_NONE = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True)
class TrimSpans:
    """Pages that would be given back, disjoint and by address: [start, end), uint64 columns.

    ``top``: the span of the main arena's top, None where it keeps all; ``top_is_unsure`` where the core does not show whether
    it ends at the break.
    """

    start: UInt64s
    end: UInt64s
    top: tuple[int, int] | None
    top_is_unsure: bool = False


def trim_spans(core: Core, heap: HeapSnapshot, arena: Arena, parts: Sequence[RegionRuns]) -> TrimSpans:
    """The spans of some regions of an arena."""
    starts, ends = [_NONE], [_NONE]
    top: tuple[int, int] | None = None
    unsure = False
    header = np.uint64(HEADER_WORDS * heap.chunks.word_bytes)
    for part in parts:
        binned = ~part.runs.has_top
        if binned.any():
            start = round_up(part.runs.start[binned] + header, part.page_bytes)
            end = round_down(part.runs.end[binned], part.page_bytes)
            starts.append(start[end > start])
            ends.append(end[end > start])
        if arena.is_main and part.runs.has_top.any():
            at_break = ends_at_break(core, part)
            if at_break is not False:
                top = _top_span(core, heap, arena, part)
                unsure = at_break is None
    if len(starts) == 1:
        return TrimSpans(_NONE, _NONE, top, unsure)
    start, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(start, kind="stable")
    return TrimSpans(start[order], end[order], top, unsure)


def ends_at_break(core: Core, part: RegionRuns) -> bool | None:
    """Whether a region of the main arena that ends in top ends where the break is; None where the core does not show it.

    The kernel's mapping for brk ends at the break, rounded up to a page. Who has moved the break since made it larger.
    """
    if part.region.kind is not RegionKind.BRK:
        return False
    end = part.region.range.end
    number = core.memory.region_index(end - 1)
    if number is None or not len(core.image.segments):
        return None
    return core.memory.region(number).end == -(-end // part.page_bytes) * part.page_bytes


def _top_span(core: Core, heap: HeapSnapshot, arena: Arena, part: RegionRuns) -> tuple[int, int] | None:
    """What systrim(0) would cut off."""
    parameters = heap.copies[arena.copy].parameters if heap.copies else heap.parameters
    unit = (parameters.value("thp_pagesize") if parameters else None) or core.page_bytes
    start, end = int(part.runs.start[-1]), int(part.runs.end[-1])
    cut = (end - start - heap.chunks.index.geometry.minimum_chunk_bytes - 1) // unit * unit
    # A value of the core's: it cannot make more of it than there is.
    return (end - cut, end) if 0 < cut < end - start else None


class PageResidency:
    """Which bytes of given pages were in memory: at least, and at most."""

    def __init__(self, core: Core, basis: ResidencyBasis) -> None:
        self._memory = core.memory
        self._saved = saved_runs(core.memory)
        start, end, _ = core.memory.populated_runs()
        self._in_file = ByteRuns(start, end)
        self.basis = basis

    def of_each(self, start: UInt64s, end: UInt64s) -> tuple[UInt64s, UInt64s]:
        """Bytes of each of disjoint spans that were in memory, at least and at most; uint64 columns."""
        whole: UInt64s = end - start
        if self.basis is ResidencyBasis.UNKNOWN or not whole.any():
            return np.zeros(len(whole), np.uint64), whole
        if self.basis is ResidencyBasis.HOLES:
            in_file = self._in_file.bytes_within(start, end)
            return in_file, in_file + whole - self._saved.bytes_within(start, end)
        order = np.argsort(start, kind="stable")
        stored = stored_pieces(self._memory, start[order], end[order])
        return pages_with_content(self._memory, stored).bytes_within(start, end), whole


def estimates(spans: Sequence[TrimSpans], residency: PageResidency) -> list[TrimEstimate]:
    """The spans of each heap as numbers."""
    start = np.concatenate([_NONE, *(span.start for span in spans)])
    end = np.concatenate([_NONE, *(span.end for span in spans)])
    rows = np.cumsum([0, *(len(span.start) for span in spans)], dtype=np.int64)
    of_bins = [sums_between(column, rows) for column in (end - start, *residency.of_each(start, end))]
    return [
        _estimate(residency, span, bins_bytes, low, high)
        for span, bins_bytes, low, high in zip(spans, *of_bins, strict=True)
    ]


def _estimate(residency: PageResidency, spans: TrimSpans, bins_bytes: int, low: int, high: int) -> TrimEstimate:
    top_bytes = unsure = 0
    if spans.top is not None:
        of_top = residency.of_each(*(np.array([address], np.uint64) for address in spans.top))
        top_bytes = spans.top[1] - spans.top[0]
        high += int(of_top[1][0])
        if spans.top_is_unsure:
            top_bytes, unsure = 0, top_bytes
        else:
            low += int(of_top[0][0])
    return TrimEstimate(bins_bytes, top_bytes, low, high, unsure)
