"""The memory of the dumped process: which bytes the core holds, which it does not, and why.

Knows: address ranges, their backing, and how to read them. Does not know: what lies in them.

Bytes between p_filesz and p_memsz of a core are not zero: the kernel left them out
(fs/binfmt_elf.c, vma_dump_size), so they are unknown. Only in an executable does that difference
mean zeros. Reading them raises MemoryFault (tests/unit/corefile/test_memory.py, TestUnsavedMemory).
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile.elf import Bytes, Words, buffer_of
from coreheap.corefile.holes import FileExtents, HoleMeaning
from coreheap.corefile.mapped_files import MappedFiles
from coreheap.corefile.regions import Backing, Regions, SavedRuns
from coreheap.errors import MemoryFault

TEXT_LIMIT: Final = 4096
HUGE_PAGES: Final = b"/anon_hugepage"
"""How the names of MAP_HUGETLB without a file begin: fs/hugetlbfs/inode.c, hugetlb_file_setup."""


@dataclass(frozen=True, slots=True)
class Region:
    """One row of the address space, for callers that look at few of them."""

    start: int
    end: int
    flags: int
    backing: Backing
    file_index: int
    segment: int


@dataclass(frozen=True, slots=True)
class FileBytes:
    """Bytes of a verified file that stand in for memory that was not saved."""

    start: int
    end: int
    content: Bytes
    """The bytes of [start, end)."""


class AddressSpace:
    """All regions of the process in the order of their addresses, and the ways to read them.

    Columns, one row a region: ``region_start``, ``region_end`` uint64, ``region_flags`` uint8 (4
    read, 2 write, 1 execute; where the core has no program header those of the module's, once modules
    are known, else 0), ``region_backing`` uint8 (``Backing``), ``region_file_index`` int32 (row of ``mapped_files``, -1 for anonymous memory),
    ``region_segment`` int32 (program header, -1 where only NT_FILE names the region). Regions do
    not overlap.

    For the kernels: ``run_start``, ``run_end``, ``run_file_offset`` uint64, the maximal runs of
    saved bytes that are contiguous in memory and in the file, and ``file``, the whole core file,
    read-only.
    """

    def __init__(
        self,
        file: Bytes,
        regions: Regions,
        runs: SavedRuns,
        mapped_files: MappedFiles,
        *,
        machine: str,
        word_bytes: int,
        page_bytes: int,
        extents: FileExtents,
    ) -> None:
        self.file = file
        self.mapped_files = mapped_files
        self.machine = machine
        self.word_bytes = word_bytes
        self.page_bytes = page_bytes
        self.region_start = regions.start
        self.region_end = regions.end
        self.region_flags = regions.flags
        self.region_backing = regions.backing
        self.region_file_index = regions.file_index
        self.region_segment = regions.segment
        self.run_start = runs.start
        self.run_end = runs.end
        self.run_file_offset = runs.file_offset
        self._extents = extents
        self._populated_runs: tuple[Words, Words, Words] | None = None
        self._buffer = buffer_of(file)
        self._file_bytes: list[FileBytes] = []
        self._file_bytes_source: Callable[[], Sequence[FileBytes]] | None = None
        self._unpack_word = struct.Struct("<Q" if word_bytes == 8 else "<I").unpack_from
        # bisect takes Python's integers as they are; np.searchsorted would make floats of them. One item of a buffer is
        # also had in a third of the time that one of an array takes.
        self._run_starts, self._run_ends = buffer_of(runs.start), buffer_of(runs.end)
        self._run_file_offsets = buffer_of(runs.file_offset)
        self._region_starts, self._region_ends = buffer_of(regions.start), buffer_of(regions.end)

    @property
    def saved_bytes(self) -> int:
        """Bytes of the process that the core holds."""
        return int((self.run_end - self.run_start).sum())

    def writable_bytes_not_saved(self) -> int:
        """Bytes of writable memory that the core could hold and does not: anonymous, or cut off with the file's end.

        Mappings of files that were left out do not count; the files hold them.
        """
        missing = ((self.region_flags & 2) != 0) & (
            (self.region_backing == Backing.TRUNCATED)
            | ((self.region_backing == Backing.NOT_SAVED) & (self.region_file_index < 0))
        )
        return int((self.region_end[missing] - self.region_start[missing]).sum())

    @property
    def region_count(self) -> int:
        return len(self.region_start)

    def region(self, index: int) -> Region:
        return Region(
            int(self.region_start[index]),
            int(self.region_end[index]),
            int(self.region_flags[index]),
            Backing(int(self.region_backing[index])),
            int(self.region_file_index[index]),
            int(self.region_segment[index]),
        )

    def region_index(self, address: int) -> int | None:
        """The row of the region that holds an address; None when none is known to."""
        if not 0 <= address < 1 << 64:
            return None
        index = bisect_right(self._region_starts, address) - 1
        return index if index >= 0 and address < self._region_ends[index] else None

    def region_indices(self, addresses: Words) -> npt.NDArray[np.intp]:
        """As ``region_index`` for many addresses, -1 where no region is known; intp[n]."""
        index = np.searchsorted(self.region_start, addresses, side="right") - 1
        if len(self.region_start):
            index[addresses >= self.region_end[index]] = -1
        return index

    def cause_missing(self, address: int) -> str:
        """Why the byte at an address cannot be read: a Backing in lower case, or "unmapped"."""
        index = self.region_index(address)
        if index is None:
            return "unmapped"
        return Backing(int(self.region_backing[index])).name.lower()

    @cached_property
    def region_is_anonymous(self) -> npt.NDArray[np.bool_]:
        """For each region whether it shows no file, bool[regions]; NT_FILE has a name for some anonymous memory, too."""
        named = [path.startswith(HUGE_PAGES) for path in self.mapped_files.raw_paths]
        is_named: npt.NDArray[np.bool_] = np.array([*named, True])[self.region_file_index]  # -1, no file, is the last
        return is_named

    # Saved bytes

    def saved_runs_within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The saved parts of [start, end), in order; runs that touch are not joined."""
        return [(low, high) for low, high, _ in self._pieces(start, end)]

    def saved_bytes_within(self, start: int, end: int) -> int:
        return sum(high - low for low, high, _ in self._pieces(start, end))

    def is_saved(self, start: int, end: int) -> bool:
        """Whether the core holds every byte of [start, end); true for an empty range."""
        return self._first_missing(start, end) is None

    def view(self, start: int, end: int) -> Bytes:
        """The bytes of [start, end) as uint8[end - start]: zero-copy where one run holds them, else
        joined.

        Only bytes of the core itself. Raises MemoryFault with the first address that is missing.
        """
        if end <= start:
            return self.file[:0]
        offset = self._file_offset(start, end - start)
        if offset is not None:
            return self.file[offset : offset + end - start]
        missing = self._first_missing(start, end)
        if missing is not None:
            raise MemoryFault(missing, self.cause_missing(missing), end - start)
        pieces = self._pieces(start, end)
        return np.concatenate([self.file[at : at + high - low] for low, high, at in pieces])

    # Saved bytes, else bytes of a file whose build-id matched

    def read(self, address: int, byte_count: int) -> bytes:
        """``byte_count`` bytes from the core, and where it has none from a verified file
        (``use_file_bytes``).

        Raises MemoryFault with the first address that neither holds.
        """
        offset = self._file_offset(address, byte_count)
        if offset is not None:
            return self.file[offset : offset + byte_count].tobytes()
        parts: list[bytes] = []
        position, end = address, address + max(byte_count, 0)
        while position < end:
            part = self._part_at(position, end)
            parts.append(part.tobytes())
            position += len(part)
        return b"".join(parts)

    def read_word(self, address: int) -> int:
        """The word of the machine at an address, which need not be aligned."""
        offset = self._file_offset(address, self.word_bytes)
        if offset is None:
            return int.from_bytes(self.read(address, self.word_bytes), "little")
        word: int = self._unpack_word(self._buffer, offset)[0]
        return word

    def read_words(self, address: int, count: int) -> Words:
        """``count`` words from an address as uint64[count], always a copy."""
        byte_count = count * self.word_bytes
        offset = self._file_offset(address, byte_count)
        if offset is None:
            raw = np.frombuffer(self.read(address, byte_count), np.uint8)
        else:
            raw = self.file[offset : offset + byte_count]
        words: Words = raw.view("<u8" if self.word_bytes == 8 else "<u4").astype(np.uint64)
        return words

    def read_text(self, address: int, limit: int = TEXT_LIMIT) -> bytes:
        """The bytes at an address up to a NUL, at most ``limit``; cut where readable memory ends.

        Raises MemoryFault when the first byte is missing.
        """
        text = b""
        while len(text) < limit:
            position = address + len(text)
            try:
                part = self._part_at(position, position + min(limit - len(text), 256)).tobytes()
            except MemoryFault:
                if text:
                    break
                raise
            before, nul, _ = part.partition(b"\0")
            text += before
            if nul:
                break
        return text

    def use_file_bytes(self, source: Callable[[], Sequence[FileBytes]]) -> None:
        """Let ``read`` take unsaved memory from files that were verified by their build-id.

        ``source`` is called once, when memory is first read that the core does not hold.
        """
        self._file_bytes_source = source

    # Holes of the core file

    @property
    def hole_meaning(self) -> HoleMeaning:
        """What the holes of the core file tell about memory."""
        return self._extents.meaning

    @property
    def holes_known(self) -> bool:
        """Whether the file tells which saved pages had no content at all."""
        return self._extents.meaning is not HoleMeaning.UNKNOWN

    @property
    def data_extents(self) -> tuple[Words, Words]:
        """(start, end) of the parts of the core file that are no holes, by offset; all of it where holes are unknown."""
        return self._extents.all()

    @property
    def hole_granularity(self) -> int:
        """What the borders of all holes of the core file are multiples of: at least the file system's blocks."""
        return self._extents.granularity

    def populated_extents(self, start: int, end: int) -> list[tuple[int, int]]:
        """The saved parts of [start, end) that are no holes of the file.

        All saved parts where holes are unknown.
        """
        if not self.holes_known:
            return self.saved_runs_within(start, end)
        populated: list[tuple[int, int]] = []
        for low, high, offset in self._pieces(start, end):
            for data_start, data_end in self._extents.within(offset, offset + high - low):
                part = (low + data_start - offset, low + data_end - offset)
                if populated and populated[-1][1] == part[0]:
                    part = (populated.pop()[0], part[1])
                populated.append(part)
        return populated

    def populated_runs(self) -> tuple[Words, Words, Words]:
        """The saved runs without the holes of the file: start, end, file offset, uint64 columns by address.

        All saved runs where holes are unknown.
        """
        if not self.holes_known:
            return self.run_start, self.run_end, self.run_file_offset
        if self._populated_runs is None:
            file_end = self.run_file_offset + (self.run_end - self.run_start)
            row, low, high = self._extents.clip(self.run_file_offset, file_end)
            distance = self.run_start[row] - self.run_file_offset[row]
            self._populated_runs = low + distance, high + distance, low
        return self._populated_runs

    def populated_bytes(self, start: int, end: int) -> int:
        """The sum of ``populated_extents``."""
        pieces = self._pieces(start, end)
        if not self.holes_known:
            return sum(high - low for low, high, _ in pieces)
        low, high, offset = np.array(pieces, np.uint64).reshape(-1, 3).T
        before = self._extents.data_bytes_before(offset)
        return int((self._extents.data_bytes_before(offset + (high - low)) - before).sum())

    def untagged(self, address: int) -> int:
        """The address without the tag that aarch64 ignores in its top byte; elsewhere the address
        itself.

        arch/arm64, "Tagged virtual addresses": bit 55 tells user from kernel space and stays.
        """
        if self.machine != "aarch64":
            return address
        return address | 0xFF << 56 if address >> 55 & 1 else address & ~(0xFF << 56)

    def release(self) -> None:
        """Let go of the file; views handed out before stay usable, reading faults."""
        self.file = np.zeros(0, np.uint8)
        self._buffer = buffer_of(self.file)
        self.run_start = self.run_end = self.run_file_offset = np.zeros(0, np.uint64)
        self._run_starts = self._run_ends = self._run_file_offsets = buffer_of(self.run_start)
        self._populated_runs = None
        self._file_bytes, self._file_bytes_source = [], None

    def _file_offset(self, address: int, byte_count: int) -> int | None:
        """Where the file holds these bytes in one run; None when it does not."""
        if not 0 <= address < 1 << 64:
            return None
        run = bisect_right(self._run_starts, address) - 1
        if run < 0 or address + byte_count > self._run_ends[run] or byte_count < 0:
            return None
        return address - self._run_starts[run] + self._run_file_offsets[run]

    def _pieces(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """(start, end, file offset) of the saved parts of [start, end)."""
        start, end = max(start, 0), min(end, 1 << 64)
        if end <= start:
            return []
        first = max(bisect_right(self._run_starts, start) - 1, 0)
        last = bisect_right(self._run_starts, end - 1)
        rows = slice(first, last)
        pieces: list[tuple[int, int, int]] = []
        for low, high, offset in zip(
            self.run_start[rows].tolist(),
            self.run_end[rows].tolist(),
            self.run_file_offset[rows].tolist(),
            strict=True,
        ):
            clipped = max(low, start)
            if clipped < min(high, end):
                pieces.append((clipped, min(high, end), offset + clipped - low))
        return pieces

    def _first_missing(self, start: int, end: int) -> int | None:
        position = start
        if end <= start:
            return None
        for low, high, _ in self._pieces(start, end):
            if low != position:
                return position
            position = high
        return None if position >= end else position

    def _part_at(self, position: int, end: int) -> Bytes:
        """The longest part of [position, end) from ``position`` on that one source holds."""
        if 0 <= position < 1 << 64:
            run = bisect_right(self._run_starts, position) - 1
            if run >= 0 and position < int(self.run_end[run]):
                offset = position - int(self.run_start[run]) + int(self.run_file_offset[run])
                return self.file[offset : offset + min(end, int(self.run_end[run])) - position]
        next_run = bisect_right(self._run_starts, position) if position >= 0 else 0
        if next_run < len(self._run_starts):
            end = min(end, int(self.run_start[next_run]))
        part = self._file_bytes_at(position)
        if part is None:
            raise MemoryFault(position, self.cause_missing(position), max(end - position, 1))
        return part.content[position - part.start : min(end, part.end) - part.start]

    def _file_bytes_at(self, position: int) -> FileBytes | None:
        source, self._file_bytes_source = self._file_bytes_source, None
        if source is not None:
            self._file_bytes = sorted(source(), key=lambda part: part.start)
        row = bisect_right(self._file_bytes, position, key=lambda part: part.start) - 1
        if row < 0 or position >= self._file_bytes[row].end:
            return None
        return self._file_bytes[row]
