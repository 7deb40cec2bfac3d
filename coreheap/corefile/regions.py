"""From program headers and NT_FILE to regions that do not overlap, and the runs of saved bytes.

Knows: arithmetic on columns of address ranges, hostile ones included. Does not know: how they are
read (``memory``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile import elf
from coreheap.corefile.elf import ProgramHeaders, Words
from coreheap.corefile.image import bytes_in_file
from coreheap.corefile.mapped_files import MappedFiles
from coreheap.evidence import Gap
from coreheap.quantities import AddressRange

Indexes = npt.NDArray[np.int32]

LAST_ADDRESS: Final = (1 << 64) - 1
PROCESS_END: Final = 1 << 57
"""No process of a 64-bit machine has memory there or above: five levels of page tables on x86-64 end at 1 << 56, the 52-bit
addresses of aarch64 before."""
KERNEL_PAGES: Final = 0xFFFF_FFFF_FF60_0000
"""But the kernel shows a page of its own, to be read or executed alone: x86-64's vsyscall page. What is said to lie between
PROCESS_END and it is no memory of a process (Linux: Documentation/arch/x86/x86_64/mm.rst)."""


class Backing(IntEnum):
    """Where the bytes of a region are."""

    SAVED = 0
    """In the core."""
    MAPPED_FILE = 1
    """Not in the core; the region shows a file that may be at hand."""
    NOT_SAVED = 2
    """Left out when the core was written (coredump_filter, MADV_DONTDUMP)."""
    TRUNCATED = 3
    """Promised by the program headers, but the file ends before."""


@dataclass(frozen=True, slots=True)
class Regions:
    """Columns of regions, sorted and without overlaps; ``AddressSpace`` says what each means."""

    start: Words
    end: Words
    flags: npt.NDArray[np.uint8]
    backing: npt.NDArray[np.uint8]
    file_index: Indexes
    segment: Indexes


@dataclass(frozen=True, slots=True)
class SavedRuns:
    """Saved bytes that are contiguous both in memory and in the file."""

    start: Words
    end: Words
    file_offset: Words


def regions_of(
    segments: ProgramHeaders, mapped_files: MappedFiles, file_bytes: int, bits: int
) -> tuple[Regions, SavedRuns, list[Gap]]:
    """The regions and saved runs of a core of ``file_bytes`` bytes, and what had to be left out.

    Where segments overlap, the one that starts first keeps the bytes; of those that start together
    the earlier in the table.
    """
    gaps: list[Gap] = []
    rows = segments.rows_of_kind(elf.PT_LOAD)
    start = segments.address[rows]
    memory = segments.memory_bytes[rows]
    room = _room_above(start, bits)
    wrapped = memory > room
    if wrapped.any():
        first = int(start[wrapped][0])
        gaps.append(
            Gap(
                "segment_wraps",
                f"{int(wrapped.sum())} segments reach past the end of a process's address space",
                AddressRange(first, first),
            )
        )
        memory = np.minimum(memory, room)
    keep = memory > 0
    rows, start, memory = rows[keep], start[keep], memory[keep]
    order = np.argsort(start, kind="stable")
    rows, start, memory = rows[order], start[order], memory[order]
    offset = segments.file_offset[rows]
    promised = np.minimum(segments.file_bytes[rows], memory)
    present = bytes_in_file(offset, promised, file_bytes)
    if float(present.astype(np.float64).sum()) > 2.0 * file_bytes:
        present = _without_shared_bytes(offset, present, gaps)

    skipped = _overlap_with_earlier(start, start + memory)
    if skipped.any():
        first = int(start[skipped > 0][0])
        gaps.append(
            Gap(
                "segments_overlap",
                f"{int((skipped > 0).sum())} segments overlap an earlier one, which is used",
                AddressRange(first, first + int(skipped[skipped > 0][0])),
            )
        )
        start, memory, offset = start + skipped, memory - skipped, offset + skipped
        promised = promised - np.minimum(skipped, promised)
        present = present - np.minimum(skipped, present)

    runs = _joined_runs(start, present, offset)
    flags = np.where(start < np.uint64(PROCESS_END), segments.flags[rows], segments.flags[rows] & ~np.uint32(elf.PF_W))
    regions = _split_by_backing(start, memory, promised, present, flags, rows)
    if len(mapped_files):
        regions = _with_mapped_files(regions, mapped_files, gaps)
    return regions, runs, gaps


def _room_above(start: Words, bits: int) -> Words:
    """The bytes that a mapping which begins there can have."""
    if bits == 32:
        limit = np.uint64(1 << 32)
        return limit - np.minimum(start, limit)
    below, end = np.uint64(PROCESS_END), np.uint64(LAST_ADDRESS)
    return np.where(
        start < below, below - np.minimum(start, below), np.where(start < np.uint64(KERNEL_PAGES), 0, end - start)
    ).astype(np.uint64)


def without_overlap(start: Words, end: Words) -> tuple[Words, Words]:
    """The ranges sorted by start, none empty; of bytes that several hold, the one that starts first keeps them."""
    order = np.argsort(start, kind="stable")
    start, end = start[order], end[order]
    start = start + _overlap_with_earlier(start, end)
    kept = end > start
    return start[kept], end[kept]


def _overlap_with_earlier(start: Words, end: Words) -> Words:
    """Of ranges sorted by start: how many bytes at the start of each an earlier one covers."""
    reach = np.zeros(len(start), np.uint64)
    if len(start) > 1:
        reach[1:] = np.maximum.accumulate(end)[:-1]
    return np.minimum(np.maximum(reach, start), end) - start


def _without_shared_bytes(offset: Words, present: Words, gaps: list[Gap]) -> Words:
    """The saved bytes of each segment, none where an earlier part of the file is claimed again.

    A writer gives each byte of the file one address. A core of which thousands of segments share
    the same bytes would make every pass over memory thousands of times as long as the file.
    """
    order = np.lexsort((np.arange(len(offset)), offset))
    shared = _overlap_with_earlier(offset[order], offset[order] + present[order]) > 0
    kept = present.copy()
    kept[order[shared]] = 0
    gaps.append(
        Gap(
            "segments_share_bytes",
            f"{int(shared.sum())} segments claim bytes of the file that belong to another one; they count as not saved",
        )
    )
    return kept


def _joined_runs(start: Words, byte_count: Words, file_offset: Words) -> SavedRuns:
    held = byte_count > 0
    start, byte_count, file_offset = start[held], byte_count[held], file_offset[held]
    end = start + byte_count
    breaks = np.ones(len(start), np.bool_)
    if len(start) > 1:
        follows = start[1:] == end[:-1]
        breaks[1:] = ~(follows & (file_offset[1:] == file_offset[:-1] + byte_count[:-1]))
    firsts = np.flatnonzero(breaks)
    lasts = np.append(firsts[1:], len(start)) - 1
    return SavedRuns(
        start[firsts].copy(),
        end[lasts if len(start) else firsts].copy(),
        file_offset[firsts].copy(),
    )


def _split_by_backing(
    start: Words,
    memory: Words,
    promised: Words,
    present: Words,
    flags: npt.NDArray[np.uint32],
    segment: npt.NDArray[np.intp],
) -> Regions:
    """Each segment as up to three regions: saved, cut off by truncation, left out."""
    edges = np.stack([start, start + present, start + promised, start + memory], axis=1)
    low, high = edges[:, :3].ravel(), edges[:, 1:].ravel()
    held = high > low
    backing = np.tile(np.array([Backing.SAVED, Backing.TRUNCATED, Backing.NOT_SAVED], np.uint8), len(start))
    return Regions(
        low[held],
        high[held],
        np.repeat((flags & 7).astype(np.uint8), 3)[held],
        backing[held],
        np.full(int(held.sum()), -1, np.int32),
        np.repeat(segment.astype(np.int32), 3)[held],
    )


def _with_mapped_files(regions: Regions, files: MappedFiles, gaps: list[Gap]) -> Regions:
    """Regions cut at the borders of mapped files.

    A mapped file that no segment covers becomes a region of its own.
    """
    sane = np.flatnonzero((files.end > files.start) & (files.end <= np.uint64(PROCESS_END)))
    order = sane[np.argsort(files.start[sane], kind="stable")]
    file_start, file_end = files.start[order], files.end[order]
    skipped = _overlap_with_earlier(file_start, file_end)
    if len(order) < len(files) or skipped.any():
        gaps.append(
            Gap(
                "mapped_files_contradict",
                f"{len(files) - len(order) + int((skipped > 0).sum())} rows of NT_FILE are empty or overlap others",
            )
        )
    file_start = file_start + skipped
    kept = file_end > file_start
    order, file_start, file_end = order[kept], file_start[kept], file_end[kept]
    if len(order) == 0:
        return regions
    cuts = np.unique(np.concatenate([regions.start, regions.end, file_start, file_end]))
    low, high = cuts[:-1], cuts[1:]
    region, in_region = row_holding(low, regions.start, regions.end)
    file, in_file = row_holding(low, file_start, file_end)
    known = in_region | in_file
    low, high, region, in_region = low[known], high[known], region[known], in_region[known]
    file, in_file = file[known], in_file[known]

    def of_region(column: npt.NDArray[np.generic], otherwise: int) -> npt.NDArray[np.generic]:
        if len(column) == 0:
            return np.full(len(low), otherwise, column.dtype)
        return np.where(in_region, column[region], column.dtype.type(otherwise))

    backing = of_region(regions.backing, Backing.MAPPED_FILE).astype(np.uint8)
    backing[(backing == Backing.NOT_SAVED) & in_file] = Backing.MAPPED_FILE
    file_index = np.where(in_file, order[file], -1).astype(np.int32)
    return Regions(
        low,
        high,
        of_region(regions.flags, 0).astype(np.uint8),
        backing,
        file_index,
        of_region(regions.segment, -1).astype(np.int32),
    )


def left_of(
    start: Words, end: Words, taken_start: Words, taken_end: Words
) -> tuple[Words, Words, npt.NDArray[np.intp]]:
    """What ranges have left when others are taken away: start and end of each piece, and the row that it was a part of.

    Both sorted and without overlap. A range is cut wherever another begins or ends.
    """
    # Four sorted columns: a stable sort merges them.
    cuts = np.sort(np.concatenate([start, end, taken_start, taken_end]), kind="stable")
    low, high = cuts[:-1], cuts[1:]
    row, is_here = row_holding(low, start, end)
    kept = (low < high) & is_here & ~row_holding(low, taken_start, taken_end)[1]
    return low[kept], high[kept], row[kept]


def row_holding(address: Words, start: Words, end: Words) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """For each address the row of the sorted ranges that may hold it, and whether it does."""
    if len(start) == 0:
        return np.zeros(len(address), np.intp), np.zeros(len(address), np.bool_)
    row = np.searchsorted(start, address, side="right") - 1
    holds = row >= 0
    row = np.maximum(row, 0)
    return row, holds & (address < end[row])


def first_covering(cuts: Words, start: Words, end: Words) -> npt.NDArray[np.intp]:
    """For each piece [cuts[n], cuts[n + 1]) the first range that holds it, -1 where none does; one entry a cut, the last means
    nothing. ``cuts`` are sorted and have all starts and ends.

    A range over n pieces is said of two runs of 2**k pieces that cover it, with 2**k <= n; what is said of a run is then
    handed down to its halves. So ranges may overlap as they like, and time is that of a sort.
    """
    nobody = np.iinfo(np.intp).max
    first = np.full(len(cuts), nobody, np.intp)
    if len(start):
        low = np.searchsorted(cuts, start)
        count = np.searchsorted(cuts, end) - low
        level = np.frexp(count.astype(np.float64))[1] - 1
        by_level = np.argsort(level, kind="stable")
        borders = np.searchsorted(level[by_level], np.arange(int(level.max()) + 2))
        for number in range(int(level.max()), -1, -1):
            rows = by_level[borders[number] : borders[number + 1]]
            np.minimum.at(first, low[rows], rows)
            np.minimum.at(first, low[rows] + count[rows] - (1 << number), rows)
            if number:
                half = 1 << (number - 1)
                handed_down = first.copy()
                np.minimum(first[half:], first[:-half], out=handed_down[half:])
                first = handed_down
    return np.where(first == nobody, -1, first)
