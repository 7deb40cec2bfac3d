"""The holes of a sparse core file: which parts of it hold data at all.

Knows: SEEK_DATA and SEEK_HOLE (man 2 lseek), and what a hole means by the writer of the core. Does
not know: memory.
"""

from __future__ import annotations

import errno
import os
from enum import Enum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from coreheap.corefile.elf import Words


class HoleMeaning(Enum):
    """What a hole of the core file says about the pages in it."""

    NEVER_POPULATED = "never_populated"
    """The kernel left out pages that were not there: untouched, or given back.

    fs/coredump.c, dump_user_range.
    """
    ZERO_PAGES = "zero_pages"
    """Pages full of zeros, populated or not: the core was unpacked here, or gdb wrote it."""
    UNKNOWN = "unknown"
    """The file has no holes: it was copied without them, or the file system does not tell."""


class FileExtents:
    """The data extents of a file, found on first use."""

    def __init__(self, descriptor: int | None, file_bytes: int, writer: HoleMeaning) -> None:
        self._descriptor = descriptor
        self._file_bytes = file_bytes
        self._writer = writer

    @cached_property
    def _columns(self) -> tuple[Words, Words, Words]:
        """Start and end of each extent, and the data bytes before it."""
        starts, ends = _data_extents(self._descriptor, self._file_bytes)
        before = np.zeros(len(starts) + 1, np.uint64)
        np.cumsum(ends - starts, out=before[1:])
        return starts, ends, before

    @property
    def meaning(self) -> HoleMeaning:
        starts, ends, _ = self._columns
        whole = len(starts) == 1 and int(ends[0] - starts[0]) == self._file_bytes
        return HoleMeaning.UNKNOWN if whole else self._writer

    def all(self) -> tuple[Words, Words]:
        """(start, end) of every extent."""
        starts, ends, _ = self._columns
        return starts, ends

    @property
    def granularity(self) -> int:
        """The largest power of two that all borders between data and holes are multiples of."""
        starts, ends, _ = self._columns
        borders = int(np.bitwise_or.reduce(np.concatenate([starts, ends[:-1]]), initial=np.uint64(0)))
        return borders & -borders or self._file_bytes

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The data extents in [start, end) of the file, clipped to it."""
        starts, ends, _ = self._columns
        low, high = np.uint64(start), np.uint64(end)
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(starts, high, side="left"))
        clipped_starts = np.maximum(starts[first:last], low).tolist()
        clipped_ends = np.minimum(ends[first:last], high).tolist()
        return list(zip(clipped_starts, clipped_ends, strict=True))

    def clip(self, start: Words, end: Words) -> tuple[npt.NDArray[np.intp], Words, Words]:
        """All data extents in many ranges of the file: the range's row, and the start and end of each piece."""
        starts, ends, _ = self._columns
        first = np.searchsorted(ends, start, side="right")
        pieces = np.maximum(np.searchsorted(starts, end, side="left") - first, 0)
        row = np.repeat(np.arange(len(start)), pieces)
        number = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        extent = first[row] + number
        return row, np.maximum(starts[extent], start[row]), np.minimum(ends[extent], end[row])

    def data_bytes_before(self, offsets: Words) -> npt.NDArray[np.uint64]:
        """Data bytes of the file before each offset."""
        starts, ends, before = self._columns
        row = np.searchsorted(starts, offsets, side="right")
        inside = np.zeros(len(offsets), np.uint64)
        held = row > 0
        previous = row[held] - 1
        inside[held] = np.minimum(offsets[held], ends[previous]) - starts[previous]
        return before[np.maximum(row - 1, 0)] + inside


def _data_extents(descriptor: int | None, file_bytes: int) -> tuple[Words, Words]:
    """Start and end of the data extents; the whole file as one where they cannot be told."""
    whole = np.array([0], np.uint64), np.array([file_bytes], np.uint64)
    if descriptor is None:
        return whole
    starts: list[int] = []
    ends: list[int] = []
    position = 0
    try:
        while position < file_bytes:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = min(os.lseek(descriptor, start, os.SEEK_HOLE), file_bytes)
            if start >= file_bytes or position <= start:
                break
            starts.append(start)
            ends.append(position)
    except OSError as error:
        # ENXIO: no data up to the end. Anything else: a file system that does not tell.
        if error.errno != errno.ENXIO:
            return whole
    return np.array(starts, np.uint64), np.array(ends, np.uint64)
