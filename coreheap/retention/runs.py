"""The free memory of one heap as runs of free chunks.

Knows: which states malloc joins when it consolidates. Does not know: what is made of the runs.

malloc_consolidate (glibc up to 2.42) joins each fastbin chunk with free neighbours, other fastbin chunks and top. So a maximal
run of such chunks is what the bins hold afterwards; from 2.43 on there are no fastbins, and a run is one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.heap import BINNED_STATES, ChunkRegion, ChunkState, HeapSnapshot
from coreheap.kernels import FreeRuns, find_free_runs

UInt64s = npt.NDArray[np.uint64]

JOINED_STATES = (ChunkState.FASTBIN, *BINNED_STATES, ChunkState.TOP)
JOINED_MASK = sum(1 << state for state in JOINED_STATES)

HEADER_WORDS = 6
"""malloc_chunk: prev_size, size, fd, bk, fd_nextsize, bk_nextsize. malloc_trim leaves these of a free chunk alone."""


@dataclass(frozen=True, slots=True)
class RegionRuns:
    """The runs of free chunks of one region that hold a whole page, or end in top."""

    region: ChunkRegion
    runs: FreeRuns
    page_bytes: int

    @property
    def page_start(self) -> UInt64s:
        """The first whole page of each run, uint64; may lie above ``page_end`` where a run holds none."""
        return round_up(self.runs.start, self.page_bytes)

    @property
    def page_end(self) -> UInt64s:
        """Where the last whole page of each run ends, uint64."""
        return round_down(self.runs.end, self.page_bytes)

    @property
    def whole_pages(self) -> tuple[UInt64s, UInt64s]:
        """The whole pages of the runs that hold any, as disjoint spans by address."""
        start, end = self.page_start, self.page_end
        has_any = end > start
        return start[has_any], end[has_any]

    @property
    def whole_page_bytes(self) -> UInt64s:
        """Bytes of whole pages of each run, uint64."""
        return span_bytes(self.page_start, self.page_end)


def runs_of(heap: HeapSnapshot, regions: tuple[int, ...], page_bytes: int) -> tuple[RegionRuns, ...]:
    """The runs of some regions, one pass over their chunks."""
    table = heap.chunks
    return tuple(
        RegionRuns(table.regions[region], find_free_runs(table.index, region, JOINED_MASK, page_bytes), page_bytes)
        for region in regions
    )


def round_up(address: UInt64s, page_bytes: int) -> UInt64s:
    mask = np.uint64(page_bytes - 1)
    rounded: UInt64s = (address + mask) & ~mask
    return rounded


def round_down(address: UInt64s, page_bytes: int) -> UInt64s:
    rounded: UInt64s = address & ~np.uint64(page_bytes - 1)
    return rounded


def span_bytes(start: UInt64s, end: UInt64s) -> UInt64s:
    """end - start, 0 where a span would be negative."""
    size: UInt64s = np.where(end > start, end - start, np.uint64(0))
    return size
