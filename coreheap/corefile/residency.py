"""Which bytes of the process were in memory, as far as the core file tells: prefix sums over runs of addresses.

Knows: what the kernel writes for which pages (fs/coredump.c, dump_user_range: ``get_dump_page`` gives nothing for a page of
anonymous memory that was never there or was given back, and the file has a hole; for pages of files it reads them in), and how
copying a core turns zeros into holes. Does not know: what any memory is used for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from coreheap.corefile.elf import Words
from coreheap.corefile.holes import HoleMeaning
from coreheap.corefile.memory import AddressSpace

BATCH_BYTES = 1 << 23
"""Bytes looked at at a time."""
JOINED_BYTES = 1 << 15
"""Holes shorter than this are read as the zeros that they are: to go round each would take longer."""
ZEROS_SOUGHT_IN = 1 << 30
"""Bytes of the core that are searched for stored zeros; real cores have some in their first megabytes."""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class ByteRuns:
    """Disjoint runs of addresses, sorted, to ask how many of their bytes lie in many ranges: uint64 columns."""

    start: Words
    end: Words

    @cached_property
    def _before(self) -> Words:
        before = np.zeros(len(self.start) + 1, np.uint64)
        np.cumsum(self.end - self.start, out=before[1:])
        return before

    def bytes_before(self, address: Words) -> Words:
        """Bytes of the runs below each address, uint64."""
        if not len(self.start):
            return np.zeros(len(address), np.uint64)
        row = np.searchsorted(self.start, address, side="right")
        last = np.maximum(row, 1) - 1
        inside = np.minimum(np.maximum(address, self.start[last]), self.end[last]) - self.start[last]
        before: Words = self._before[last] + inside
        return before

    def bytes_within(self, start: Words, end: Words) -> Words:
        """Bytes of the runs in each range [start, end), uint64."""
        return self.bytes_before(end) - self.bytes_before(start)


@dataclass(frozen=True, slots=True)
class StoredPieces:
    """Parts of memory that the file has blocks for, by address: uint64 columns."""

    start: Words
    end: Words
    file_offset: Words


def saved_runs(memory: AddressSpace) -> ByteRuns:
    """What the core holds."""
    return ByteRuns(memory.run_start, memory.run_end)


def stored_pieces(memory: AddressSpace, start: Words, end: Words) -> StoredPieces:
    """What the core holds of sorted disjoint ranges, less the holes of the file where these are known."""
    run_start, run_end, file_offset = memory.populated_runs()
    row, run = _meetings(start, end, run_start, run_end)
    low = np.maximum(run_start[run], start[row])
    distance: Words = low - run_start[run]
    high: Words = np.minimum(run_end[run], end[row])
    offset: Words = file_offset[run] + distance
    return StoredPieces(low, high, offset)


def holes_are_the_kernels(memory: AddressSpace, pieces: StoredPieces) -> bool:
    """Whether holes stand for pages that were not there, and for nothing else.

    The kernel stores a page of zeros that was there as it stores any other. A tool that copies a core (``cp
    --sparse=always``, ``coredumpctl dump``, ``fallocate -d``) makes holes of zeros wherever they fill its blocks. So stored zeros
    that any such tool would have left out prove that none was at work. ``pieces`` is where to look. False where
    no such zeros are found: the core may be a copy.
    """
    if memory.hole_meaning is not HoleMeaning.NEVER_POPULATED or not memory.shortest_hole:
        return False
    page_bytes = memory.page_bytes
    # No hole is shorter than the tool's blocks; zeros of this length hold such a block, however they lie.
    needed = (2 * memory.shortest_hole - page_bytes) // page_bytes
    zeros = seen = follows = 0
    for offset, filled, rows in _batches(memory, pieces):
        # What is no zero that the file stores ends a run: content, and the holes that were read along.
        other = np.flatnonzero(filled | ~_pages_stored(pieces, rows, offset, len(filled), page_bytes))
        edges = np.concatenate(([-1 - (zeros if offset == follows else 0)], other, [len(filled)]))
        lengths = np.diff(edges) - 1
        if int(lengths.max()) >= needed:
            return True
        zeros, follows = int(lengths[-1]), offset + len(filled) * page_bytes
        seen += len(filled) * page_bytes
        if seen >= ZEROS_SOUGHT_IN:
            break
    return False


def _pages_stored(pieces: StoredPieces, rows: npt.NDArray[np.intp], offset: int, count: int, page_bytes: int) -> Bools:
    """Which of ``count`` pages of the file from ``offset`` on the pieces of these rows hold whole."""
    start = pieces.file_offset[rows].astype(np.int64) - offset
    end = start + (pieces.end[rows] - pieces.start[rows]).astype(np.int64)
    first = np.clip(-(-start // page_bytes), 0, count)
    last = np.maximum(np.clip(end // page_bytes, 0, count), first)
    change = np.zeros(count + 1, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last, -1)
    return np.cumsum(change[:-1]) > 0


def pages_with_content(memory: AddressSpace, pieces: StoredPieces) -> ByteRuns:
    """The pages of the pieces that hold any byte but zero, joined where they touch.

    Reads all of it, some GB a second; needs 16 bytes for each stretch of such pages.
    """
    starts: list[Words] = []
    ends: list[Words] = []
    page_bytes = np.uint64(memory.page_bytes)
    for offset, filled, rows in _batches(memory, pieces):
        numbers = np.flatnonzero(filled)
        if not len(numbers):
            continue
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        first = numbers[np.concatenate(([0], breaks))].astype(np.uint64)
        last = numbers[np.concatenate((breaks - 1, [len(numbers) - 1]))].astype(np.uint64)
        low = np.uint64(offset) + first * page_bytes
        high = np.uint64(offset) + (last + np.uint64(1)) * page_bytes
        file_start = pieces.file_offset[rows]
        file_end = file_start + (pieces.end[rows] - pieces.start[rows])
        row, run = _meetings(file_start, file_end, low, high)
        distance = pieces.start[rows][row] - file_start[row]
        starts.append(np.maximum(low[run], file_start[row]) + distance)
        ends.append(np.minimum(high[run], file_end[row]) + distance)
    if not starts:
        return ByteRuns(np.zeros(0, np.uint64), np.zeros(0, np.uint64))
    start, end = np.concatenate(starts), np.concatenate(ends)
    order = np.argsort(start, kind="stable")
    return ByteRuns(start[order], end[order])


def _batches(memory: AddressSpace, pieces: StoredPieces) -> Iterator[tuple[int, Bools, npt.NDArray[np.intp]]]:
    """The pages of the pieces as the file has them: where it has the first, whether each holds anything, and the pieces' rows.

    The kernel writes one segment behind the other, so there are few stretches even of very many segments. Pages lie in the file as
    they do in memory, or all shifted by the same: gdb aligns nothing.
    """
    page_bytes = memory.page_bytes
    phase = (pieces.file_offset - pieces.start) & np.uint64(page_bytes - 1)
    for shift in np.unique(phase).tolist():
        rows = np.flatnonzero(phase == shift)
        rows = rows[np.argsort(pieces.file_offset[rows], kind="stable")]
        file_start = pieces.file_offset[rows]
        file_end = file_start + (pieces.end[rows] - pieces.start[rows])
        # A core whose segments share bytes has none of them twice (regions_of).
        breaks = np.flatnonzero(file_start[1:] > file_end[:-1] + np.uint64(JOINED_BYTES)) + 1
        firsts, lasts = np.concatenate(([0], breaks)), np.concatenate((breaks, [len(rows)]))
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            end = int(file_end[last - 1])
            start = int(file_start[first]) - (int(file_start[first]) - shift) % page_bytes
            for low in range(start, end, BATCH_BYTES):
                high = min(low + BATCH_BYTES, end)
                part = slice(
                    first + int(np.searchsorted(file_end[first:last], np.uint64(max(low, 0)), side="right")),
                    first + int(np.searchsorted(file_start[first:last], np.uint64(high), side="left")),
                )
                yield low, _filled_pages(memory, low, high), rows[part]


def _filled_pages(memory: AddressSpace, start: int, end: int) -> Bools:
    """For each page of the file from ``start`` on whether a byte of it differs from zero; the last may be cut short."""
    lead = max(-start, 0)
    content = memory.file[start + lead : end]
    if lead:
        content = np.concatenate([np.zeros(lead, np.uint8), content])
    whole = len(content) // memory.page_bytes * memory.page_bytes
    pages = content[:whole].reshape(-1, memory.page_bytes)
    words = pages.view(np.uint64) if pages.ctypes.data % 8 == 0 else pages
    filled: Bools = np.asarray(words.any(axis=1))
    if whole < len(content):
        filled = np.append(filled, np.array([content[whole:].any()]))
    return filled


def _meetings(
    start: Words, end: Words, run_start: Words, run_end: Words
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Which of sorted disjoint ranges meets which of sorted disjoint runs: the rows of both, once for each pair."""
    first = np.searchsorted(run_end, start, side="right")
    pieces = np.maximum(np.searchsorted(run_start, end, side="left") - first, 0)
    row = np.repeat(np.arange(len(start)), pieces)
    run = first[row] + np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return row, run
