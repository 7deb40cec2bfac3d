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
from coreheap.corefile.notes import records_at
from coreheap.evidence import Strength

BATCH_BYTES = 1 << 23
"""Bytes looked at at a time."""
JOINED_BYTES = 1 << 15
"""Holes shorter than this are read as the zeros that they are: to go round each would take longer."""
ZEROS_SOUGHT_IN = 1 << 30
"""Bytes of the core that are searched for stored zeros, beside the first and the last page of each extent."""
EXTENTS_TRIED = 1 << 14
PROBE_BYTES = 1 << 18
STEP_BYTES = 1 << 20
LARGEST_BLOCK_BYTES = 1 << 22
"""No tool that makes holes of zeros has larger blocks: st_blksize of Lustre and CephFS."""

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


def kernels_holes(memory: AddressSpace) -> Strength | None:
    """What speaks for it that holes stand for pages that were not there, and for nothing else; None where nothing does.

    The kernel stores a page of zeros that was there as it stores any other. A tool that copies a core (``cp
    --sparse=always``, ``zstd -d``, ``coredumpctl dump``, ``fallocate -d``) makes holes of zeros, in blocks of its own: a page up to
    some MiB (st_blksize). Zeros that it would have left out speak against each:

    - PROOF, an extent between two holes that holds nothing but zeros. Extents of such a copy begin and end where the tool's blocks do
      or where the original's extents did, so all of its blocks would have been zeros;
    - PROOF, zeros that hold a block of any size, however blocks lie;
    - SOLID, zeros that hold a block as large as the shortest hole. Only a tool that keeps the holes that it finds can have larger
      blocks: cp --sparse=always onto a file system with blocks of more than a page (NFS, ZFS, Lustre).

    A process that has no such pages leaves no proof.
    """
    if memory.hole_meaning is not HoleMeaning.NEVER_POPULATED:
        return None
    start, end = memory.data_extents
    if _has_extent_of_zeros(memory, start, end) or _has_blocks_of_zeros(memory, start, end):
        return Strength.PROOF
    return Strength.SOLID if _has_zeros_longer_than_holes(memory, start, end) else None


def _has_extent_of_zeros(memory: AddressSpace, start: Words, end: Words) -> bool:
    """Whether one of the file's extents, with holes on both sides, holds nothing but zeros."""
    between = (start > 0) & (end < np.uint64(len(memory.file)))
    low, high = start[between].astype(np.int64), end[between].astype(np.int64)
    if not len(low):
        return False
    # Most have content on their first page or on their last.
    probe = int(min(memory.page_bytes, (high - low).min()))
    for is_first in (True, False):
        zeros = ~_have_content(memory, low if is_first else high - probe, probe)
        low, high = low[zeros], high[zeros]
    # The shortest of the others are the likeliest.
    order = np.argsort(high - low, kind="stable")[:EXTENTS_TRIED]
    left = ZEROS_SOUGHT_IN
    for first, last in zip(low[order].tolist(), high[order].tolist(), strict=True):
        left -= last - first
        if left < 0:
            return False
        if _is_zero(memory, first, last):
            return True
    return False


def _have_content(memory: AddressSpace, offsets: npt.NDArray[np.int64], byte_count: int) -> Bools:
    """For each offset into the file whether any of so many bytes there differs from zero."""
    at_once = BATCH_BYTES // byte_count
    unit = 8 if byte_count % 8 == 0 else 1
    content = np.dtype([("units", f"<u{unit}", (byte_count // unit,))])
    found: list[Bools] = [np.zeros(0, np.bool_)]
    for first in range(0, len(offsets), at_once):
        rows = records_at(memory.file, offsets[first : first + at_once].astype(np.intp), content)
        found.append(np.any(rows["units"], axis=1))
    return np.concatenate(found)


def _has_blocks_of_zeros(memory: AddressSpace, start: Words, end: Words) -> bool:
    """Whether some extent holds zeros for twice the largest block of any tool: however its blocks lie, one is in there."""
    needed = 2 * LARGEST_BLOCK_BYTES // STEP_BYTES
    long = end - start >= np.uint64(2 * LARGEST_BLOCK_BYTES)
    left = ZEROS_SOUGHT_IN
    for low, high in zip(start[long].tolist(), end[long].tolist(), strict=True):
        zeros = 0
        for step in range(low, high - STEP_BYTES + 1, STEP_BYTES):
            is_zero = not memory.file[step : step + memory.page_bytes].any()
            if is_zero:
                left -= STEP_BYTES
                is_zero = _is_zero(memory, step, step + STEP_BYTES)
            zeros = zeros + 1 if is_zero else 0
            if zeros >= needed:
                return True
            if left < 0:
                return False
    return False


def _has_zeros_longer_than_holes(memory: AddressSpace, start: Words, end: Words) -> bool:
    """Whether some extent holds zeros for about twice the shortest hole: however blocks of that size lie, one is in there."""
    if len(start) < 2:
        return False
    page = memory.page_bytes
    needed = max(1, (2 * int((start[1:] - end[:-1]).min()) - page) // page)
    first = -(-start.astype(np.int64) // page) * page
    last = end.astype(np.int64) // page * page
    order = np.argsort(first - last, kind="stable")[:EXTENTS_TRIED]
    left = ZEROS_SOUGHT_IN
    for low, high in zip(first[order].tolist(), last[order].tolist(), strict=True):
        if high - low < needed * page or left <= 0:
            return False
        zeros = 0
        for part in range(low, high, BATCH_BYTES):
            pages = memory.file[part : min(part + BATCH_BYTES, high)].reshape(-1, page)
            filled = np.flatnonzero(pages.any(axis=1))
            edges = np.concatenate(([-1 - zeros], filled, [len(pages)]))
            lengths = np.diff(edges) - 1
            if int(lengths.max()) >= needed:
                return True
            zeros = int(lengths[-1])
            left -= len(pages) * page
    return False


def _is_zero(memory: AddressSpace, start: int, end: int) -> bool:
    """Whether the file has nothing but zeros from ``start`` to ``end``."""
    return not any(memory.file[low : min(low + PROBE_BYTES, end)].any() for low in range(start, end, PROBE_BYTES))


def pages_with_content(memory: AddressSpace, pieces: StoredPieces) -> ByteRuns:
    """The pages of the pieces that hold any byte but zero, joined where they touch.

    Reads all of it, some GB a second; needs 16 bytes for each stretch of such pages.
    """
    starts: list[Words] = []
    ends: list[Words] = []
    page_bytes = memory.page_bytes
    for offset, filled, rows in _batches(memory, pieces):
        numbers = np.flatnonzero(filled)
        if not len(numbers):
            continue
        breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
        first = numbers[np.concatenate(([0], breaks))]
        last = numbers[np.concatenate((breaks - 1, [len(numbers) - 1]))]
        # The first page may begin before the file does: what segments hold begins behind the headers.
        low = (offset + first * page_bytes).clip(0).astype(np.uint64)
        high = (offset + (last + 1) * page_bytes).astype(np.uint64)
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
