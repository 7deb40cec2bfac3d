"""The live chunks that keep free memory from going back: pins.

Knows: that a heap shrinks from its end only, so that whatever is live above free memory keeps it. Does not know: why it is live.

A pin is all that lies between two runs of free memory that hold whole pages. All of it is arithmetic on the columns of runs; single
chunks are looked at for the few pins that are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from coreheap.free_memory import Pin, PinChain
from coreheap.heap import ChunkState, ChunkTable, HeapSnapshot
from coreheap.kernels import chunk_extents
from coreheap.leaks import Verdict
from coreheap.retention.runs import JOINED_STATES, RegionRuns, RunColumns

Int64s = npt.NDArray[np.int64]

PINS_OF_A_HEAP = 5
PINS_IN_ALL = 20

MOST = 0.75
"""Share of the free memory below live chunks that freeing a PinChain would join to the end."""

MOST_LOOKED_AT = 1 << 16
"""Chunks of a PinChain that are looked at one by one."""

SMALL_SHARE = 16
"""Free bytes for each live byte of a sub-heap from which its live chunks are pins though nothing free lies below them."""

_BATCH = 1 << 20
_LIVE = (ChunkState.IN_USE, ChunkState.ALLOCATOR_OWN, ChunkState.TCACHE)
_NEITHER = [state for state in ChunkState if state not in (*_LIVE, *JOINED_STATES)]
"""Neither live nor known to be free: free chunks on no list, fenceposts, damage."""
_MOST_FENCEPOSTS = 3


@dataclass(frozen=True, slots=True)
class Gaps:
    """What lies between the runs of heaps, by address in each; int64 columns of equal length.

    ``first_chunk``, ``end_chunk``: its chunks; ``bytes``: of those that are not free; ``below``, ``above``: bytes of the runs beside it, 0 where
    there is none; ``pages_below``: whole pages of the run below.
    """

    address: Int64s
    first_chunk: Int64s
    end_chunk: Int64s
    count: Int64s
    bytes: Int64s
    below: Int64s
    above: Int64s
    pages_below: Int64s

    def __len__(self) -> int:
        return len(self.address)

    def between(self, first: int, end: int) -> Gaps:
        """Those of the rows [first, end)."""
        columns = (self.address, self.first_chunk, self.end_chunk, self.count, self.bytes)
        beside = (self.below, self.above, self.pages_below)
        return Gaps(*(column[first:end] for column in (*columns, *beside)))


def gaps_of(table: ChunkTable, parts: Sequence[RegionRuns], runs: RunColumns) -> tuple[Gaps, Int64s]:
    """The gaps of many regions, without the fenceposts at a region's end, and where each region's begin, int64[regions + 1].

    ``runs``: those of the regions as columns.
    """
    # A region of n runs has n + 1 gaps: one below each run, and one above the last.
    first_row = runs.rows[:-1] + np.arange(len(parts))
    last_row = runs.rows[1:] + np.arange(len(parts))
    count = len(runs.start) + len(parts)
    is_below = np.ones(count, np.bool_)
    is_below[last_row] = False
    below = np.flatnonzero(is_below)
    above = below + 1

    def beginning(values: npt.NDArray[np.generic], at_edge: Sequence[int] | int) -> Int64s:
        """A column that has a value of each run in the gap above it, and one of each region in its first gap."""
        column = np.empty(count, np.int64)
        column[above] = values.astype(np.int64)
        column[first_row] = np.array(at_edge, np.uint64).astype(np.int64)
        return column

    def ending(values: npt.NDArray[np.generic], at_edge: Sequence[int] | int) -> Int64s:
        """A column that has a value of each run in the gap below it, and one of each region in its last gap."""
        column = np.empty(count, np.int64)
        column[below] = values.astype(np.int64)
        column[last_row] = np.array(at_edge, np.uint64).astype(np.int64)
        return column

    regions = [part.region for part in parts]
    size = runs.end - runs.start
    start = beginning(runs.end, [region.range.start for region in regions])
    end = ending(runs.start, [region.range.end for region in regions])
    first = beginning(runs.end_chunk, [region.first_chunk for region in regions])
    last = ending(runs.first_chunk, [region.first_chunk + region.chunk_count for region in regions])
    # Small free chunks inside of a gap: all free bytes below its end less those below its start.
    free = ending(runs.free_bytes_before, [part.runs.free_bytes for part in parts])
    free -= beginning(runs.free_bytes_before + size, 0)
    free_count = ending(runs.free_count_before, [part.runs.free_count for part in parts])
    free_count -= beginning(runs.free_count_before + runs.end_chunk - runs.first_chunk, 0)
    _leave_fenceposts_out(table, last_row, first, last, end)
    keep = last > first
    columns = (
        start,
        first,
        last,
        last - first - free_count,
        end - start - free,
        beginning(size, 0),
        ending(size, 0),
        beginning(runs.page_end - runs.page_start, 0),
    )
    rows = np.concatenate(([0], np.cumsum(keep)))[np.append(first_row, count)]
    return Gaps(*(column[keep] for column in columns)), rows


def _leave_fenceposts_out(table: ChunkTable, rows: Int64s, first: Int64s, last: Int64s, end: Int64s) -> None:
    """Let some gaps end before the fenceposts that their chunks [first, last) end in, if they do."""
    state = table.index.state
    for _ in range(_MOST_FENCEPOSTS):
        rows = rows[last[rows] > first[rows]]
        rows = rows[state[last[rows] - 1] == ChunkState.FENCEPOST]
        if not len(rows):
            return
        last[rows] -= 1
        end[rows] -= chunk_extents(table.index, last[rows])[1].astype(np.int64)


def pin_chain(table: ChunkTable, gaps: Gaps) -> PinChain:
    """What would have to go for most of the free memory below it to join the heap's end."""
    if not gaps.pages_below.any():
        return PinChain()
    gained = np.cumsum(gaps.pages_below[::-1])
    last = int(np.searchsorted(gained, MOST * gained[-1]))
    return PinChain(
        free_below_bytes=int(gained[-1]),
        gained_bytes=int(gained[last]),
        chunk_count=int(gaps.count[::-1][: last + 1].sum()),
        chunk_bytes=int(gaps.bytes[::-1][: last + 1].sum()),
        cached_count=_cached(table, gaps.first_chunk[::-1][: last + 1], gaps.end_chunk[::-1][: last + 1]),
    )


def _cached(table: ChunkTable, first: Int64s, end: Int64s) -> int | None:
    """How many of the chunks of some gaps lie in a tcache; None where there are too many chunks to look at."""
    counts = end - first
    whole = int(counts.sum())
    if whole > MOST_LOOKED_AT:
        return None
    chunks = np.repeat(first - np.concatenate(([0], np.cumsum(counts)[:-1])), counts) + np.arange(whole)
    return int(np.count_nonzero(table.index.state[chunks] == ChunkState.TCACHE))


def largest_pins(arena: int, sub_heap: int | None, gaps: Gaps) -> Iterator[tuple[Pin, int]]:
    """The pins of a heap that most whole free pages end at, and its highest one; with the end of each one's chunks."""
    if not len(gaps) or not (gaps.pages_below.any() or gaps.above.any()):
        return
    highest = len(gaps) - 1
    rows: list[int] = []
    if gaps.pages_below.any():
        order = np.argsort(-gaps.pages_below, kind="stable")[:PINS_OF_A_HEAP].tolist()
        rows = [row for row in order if gaps.pages_below[row]]
    # All that is live in a sub-heap, if it is little, keeps what is free above it as well.
    is_alone = sub_heap is not None and not rows and gaps.bytes.sum() * SMALL_SHARE <= gaps.above[highest]
    if rows or is_alone:
        rows.append(highest)
    for row in dict.fromkeys(rows):
        yield (
            Pin(
                arena=arena,
                sub_heap=sub_heap,
                header_address=int(gaps.address[row]),
                first_chunk=int(gaps.first_chunk[row]),
                live_count=int(gaps.count[row]),
                live_bytes=int(gaps.bytes[row]),
                cached_count=0,
                free_below_bytes=int(gaps.below[row]),
                free_above_bytes=int(gaps.above[row]),
                pages_below_bytes=int(gaps.pages_below[row]),
                is_highest=row == highest,
            ),
            int(gaps.end_chunk[row]),
        )


def reported_pins(heap: HeapSnapshot, candidates: Iterable[tuple[Pin, int]]) -> tuple[Pin, ...]:
    """The most important pins of all heaps, looked at closely; those that most free memory ends at first."""
    ranked = sorted(
        candidates, key=lambda pin: (-pin[0].pages_below_bytes, -pin[0].free_above_bytes, pin[0].header_address)
    )
    return tuple(_in_full(heap.chunks, pin, end_chunk) for pin, end_chunk in ranked[:PINS_IN_ALL])


def _in_full(table: ChunkTable, pin: Pin, end_chunk: int) -> Pin:
    """The pin with what its chunks' states and verdicts say; a byte a chunk is read."""
    counts = np.zeros(len(ChunkState), np.int64)
    other_bytes = 0
    first_in_use: int | None = None
    for start in range(pin.first_chunk, end_chunk, _BATCH):
        states = table.index.state[start : min(start + _BATCH, end_chunk)]
        counts += np.bincount(states, minlength=len(ChunkState))[: len(ChunkState)]
        if first_in_use is None and counts[ChunkState.IN_USE]:
            first_in_use = start + int(np.argmax(states == ChunkState.IN_USE))
        others = np.flatnonzero(np.isin(states, _NEITHER)) + start
        other_bytes += int(chunk_extents(table.index, others.astype(np.int64))[1].sum())
    verdict = table.verdict
    return replace(
        pin,
        first_chunk=pin.first_chunk if first_in_use is None else first_in_use,
        live_count=int(sum(counts[state] for state in _LIVE)),
        live_bytes=pin.live_bytes - other_bytes,
        cached_count=int(counts[ChunkState.TCACHE]),
        verdict=None if verdict is None or first_in_use is None else Verdict(int(verdict[first_in_use])),
    )
