"""The free memory of one heap as runs of free chunks.

Knows: which states malloc joins when it consolidates. Does not know: what is made of the runs.

malloc_consolidate (glibc up to 2.42) joins each fastbin chunk with free neighbours, other fastbin chunks and top. So a maximal
run of such chunks is what the bins hold afterwards; from 2.43 on there are no fastbins, and a run is one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.heap import BINNED_STATES, ChunkRegion, ChunkState, HeapSnapshot
from coreheap.kernels import FreeRuns, find_free_runs

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

_NO_ADDRESS = np.zeros(0, np.uint64)
_NO_CHUNK = np.zeros(0, np.int64)

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


@dataclass(frozen=True, slots=True)
class RunColumns:
    """The runs of many regions one behind the other, columns of equal length; ``rows``, int64[regions + 1]: where each region's begin.

    ``page_start``, ``page_end``: the first whole page of each run, and where its last one ends; a run that holds none has both alike.
    """

    rows: Int64s
    start: UInt64s
    end: UInt64s
    first_chunk: Int64s
    end_chunk: Int64s
    free_bytes_before: UInt64s
    free_count_before: Int64s
    page_start: UInt64s
    page_end: UInt64s

    @classmethod
    def of(cls, parts: Sequence[RegionRuns]) -> RunColumns:
        runs = [part.runs for part in parts]
        start = np.concatenate([_NO_ADDRESS, *(run.start for run in runs)])
        end = np.concatenate([_NO_ADDRESS, *(run.end for run in runs)])
        page_start, page_end = start[:0], end[:0]
        if parts:
            page_start = round_up(start, parts[0].page_bytes)
            page_end = np.maximum(round_down(end, parts[0].page_bytes), page_start)
        return cls(
            np.cumsum([0, *(len(run) for run in runs)], dtype=np.int64),
            start,
            end,
            np.concatenate([_NO_CHUNK, *(run.first_chunk for run in runs)]),
            np.concatenate([_NO_CHUNK, *(run.end_chunk for run in runs)]),
            np.concatenate([_NO_ADDRESS, *(run.free_bytes_before for run in runs)]),
            np.concatenate([_NO_CHUNK, *(run.free_count_before for run in runs)]),
            page_start,
            page_end,
        )


def sums_between(values: UInt64s, rows: Int64s) -> list[int]:
    """The sums of a column's rows [rows[i], rows[i + 1])."""
    before = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values, out=before[1:])
    sums: list[int] = (before[rows[1:]] - before[rows[:-1]]).tolist()
    return sums


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
