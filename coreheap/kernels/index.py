"""From an address to the chunk that holds it, in constant time, at two bytes a chunk.

Knows: regions that chunks tile without holes, start bits, ranks, a state for each chunk, mmapped chunks.
Does not know: how chunks are found (``walk_region``), or which arena a region belongs to.

A region's granules (MALLOC_ALIGNMENT bytes each) are numbered from its first header. ``lookup`` holds a row for each
64 granules: their start bits, and in the low half of column 1 the rank, the number of chunks before the row over all
regions. A chunk's index is its rank. It ends where the next chunk of its region starts, the last one at the region's
end: sizes need no column, and the bytes of a region are conserved by construction.
"""

from __future__ import annotations

import bisect
from typing import Final

import numpy as np

from coreheap.kernels.values import (
    ADDRESS_LIMIT,
    ChunkGeometry,
    Int64Array,
    MmappedChunks,
    UInt8Array,
    UInt64Array,
    no_mmapped_chunks,
)

RANK_MASK: Final = 0xFFFFFFFF
"""The part of a lookup row's column 1 that is the rank; the rest is spare."""
GRANULES_PER_WORD: Final = 64
MMAPPED: Final = -1
"""Stands for all mmapped chunks where a function takes a region's number."""

_SMALLEST_BLOCK_SHIFT = 26
_MOST_BLOCKS = 1 << 21


def words_for(region_bytes: int, alignment: int) -> int:
    """Lookup rows that a region of ``region_bytes`` takes."""
    row_bytes = alignment * GRANULES_PER_WORD
    return (region_bytes + row_bytes - 1) // row_bytes


class ChunkIndex:
    """All chunks of a process, by address and by number.

    Columns of regions, sorted by address and without overlap: ``region_start``, ``region_end`` (uint64),
    ``region_first_word`` (int64, row in ``lookup``), ``region_first_chunk``, ``region_chunk_count`` (int64).
    ``lookup``: uint64[rows, 2] as the module says, ranks filled in. ``state``: uint8[chunks], ``ChunkState`` by chunk
    index. ``mmapped``: mmapped chunks by address, whose chunk indexes follow those of all regions.

    Raises ValueError where the parts contradict each other: whoever builds an index has to sort out overlaps first.
    """

    __slots__ = (
        "block_first_region",
        "block_shift",
        "first_block",
        "geometry",
        "lookup",
        "mmapped",
        "region_chunk_count",
        "region_end",
        "region_first_chunk",
        "region_first_word",
        "region_start",
        "state",
    )

    def __init__(
        self,
        geometry: ChunkGeometry,
        region_start: UInt64Array,
        region_end: UInt64Array,
        region_first_word: Int64Array,
        lookup: UInt64Array,
        state: UInt8Array,
        mmapped: MmappedChunks | None = None,
    ) -> None:
        self.geometry = geometry
        self.region_start = np.ascontiguousarray(region_start, np.uint64)
        self.region_end = np.ascontiguousarray(region_end, np.uint64)
        self.region_first_word = np.ascontiguousarray(region_first_word, np.int64)
        self.lookup = lookup
        self.state = state
        self.mmapped = mmapped if mmapped is not None else no_mmapped_chunks()
        self._check_regions()
        self._check_mmapped()
        self.region_first_chunk = (lookup[self.region_first_word, 1] & np.uint64(RANK_MASK)).astype(np.int64)
        self.region_chunk_count = np.diff(self.region_first_chunk, append=_start_bits_in(lookup))
        if self.region_count and (self.region_first_chunk[0] != 0 or np.any(self.region_chunk_count < 1)):
            raise ValueError("ranks are not filled in, or a lookup row lies outside all regions")
        if len(state) != self.region_chunks + len(self.mmapped):
            raise ValueError(f"{len(state)} states for {self.region_chunks} + {len(self.mmapped)} chunks")
        self._build_blocks()

    # Parts

    @property
    def region_count(self) -> int:
        return len(self.region_start)

    @property
    def region_chunks(self) -> int:
        """Chunks in regions; also the chunk index of the first mmapped chunk."""
        return int(self.region_chunk_count.sum())

    @property
    def chunk_count(self) -> int:
        return len(self.state)

    def word_count(self, region: int) -> int:
        """Lookup rows of a region."""
        return words_for(int(self.region_end[region]) - int(self.region_start[region]), self.geometry.alignment)

    # From addresses, one at a time; ``find_chunks`` is the way for many

    def region_containing(self, address: int) -> int:
        """The region whose [start, end) holds ``address``, -1 where none does."""
        block = (address >> self.block_shift) - self.first_block
        if not 0 <= block < len(self.block_first_region) - 1:
            return -1
        low = int(self.block_first_region[block])
        high = min(int(self.block_first_region[block + 1]) + 1, self.region_count)
        region = bisect.bisect_right(self.region_start, address, low, high) - 1
        return region if region >= low and address < int(self.region_end[region]) else -1

    def chunk_containing(self, address: int) -> int:
        """The chunk whose bytes, header included, hold ``address``; -1 where none does.

        A mmapped chunk reaches to the end of its mapping. For the chunk whose usable bytes hold an address, ask for
        the address less the header's bytes: a chunk lends its first word to the chunk before.
        """
        return self._find(address, exact=False)

    def chunk_starting_at(self, header_address: int) -> int:
        """The chunk with this header address, -1 where none has it."""
        return self._find(header_address, exact=True)

    def bytes_of_chunk_at(self, header_address: int) -> int:
        """Bytes of the chunk that starts exactly here: up to the next start, or by its header when it is mmapped."""
        region = self.region_containing(header_address)
        if region < 0:
            row = self._find_mmapped(header_address, exact=True) - self.region_chunks
            if row < 0:
                raise KeyError(header_address)
            return int(self.mmapped.chunk_bytes[row])
        first_row = int(self.region_first_word[region])
        granule = (header_address - int(self.region_start[region])) // self.geometry.alignment
        for row in range((granule + 1) // GRANULES_PER_WORD, self.word_count(region)):
            start_bits = int(self.lookup[first_row + row, 0])
            if row == (granule + 1) // GRANULES_PER_WORD:
                start_bits = start_bits >> (granule + 1) % GRANULES_PER_WORD << (granule + 1) % GRANULES_PER_WORD
            if start_bits:
                bit = (start_bits & -start_bits).bit_length() - 1
                end = int(self.region_start[region]) + (row * GRANULES_PER_WORD + bit) * self.geometry.alignment
                return end - header_address
        return int(self.region_end[region]) - header_address

    def _find(self, address: int, exact: bool) -> int:
        region = self.region_containing(address)
        if region < 0:
            return self._find_mmapped(address, exact)
        granule, beside = divmod(address - int(self.region_start[region]), self.geometry.alignment)
        row, bit = divmod(granule, GRANULES_PER_WORD)
        start_bits, rank = self.lookup[int(self.region_first_word[region]) + row].tolist()
        if exact and (beside or not start_bits >> bit & 1):
            return -1
        starts_up_to_here = int(start_bits & ((2 << bit) - 1)).bit_count()
        return int(rank & RANK_MASK) + starts_up_to_here - 1

    def _find_mmapped(self, address: int, exact: bool) -> int:
        row = bisect.bisect_right(self.mmapped.header_address, address) - 1
        if row < 0:
            return -1
        if exact:
            found = int(self.mmapped.header_address[row]) == address
        else:
            found = address < int(self.mmapped.mapping_start[row]) + int(self.mmapped.mapping_bytes[row])
        return self.region_chunks + row if found else -1

    # Construction

    def _check_regions(self) -> None:
        starts, ends, first_words = self.region_start, self.region_end, self.region_first_word
        if self.lookup.ndim != 2 or self.lookup.shape[1] != 2 or self.lookup.dtype != np.uint64:
            raise ValueError("a lookup is uint64[rows, 2]")
        if not self.lookup.flags.c_contiguous or not self.state.flags.c_contiguous or self.state.dtype != np.uint8:
            raise ValueError("lookup and state must be contiguous, state uint8")
        if not len(starts) == len(ends) == len(first_words):
            raise ValueError("the columns of regions differ in length")
        if np.any(ends <= starts) or np.any(starts[1:] < ends[:-1]):
            raise ValueError("regions are empty, not sorted, or they overlap")
        if len(ends) and int(ends[-1]) > ADDRESS_LIMIT:
            raise ValueError(f"a region ends at {int(ends[-1]):#x}, where no process has memory")
        if np.any(starts % np.uint64(self.geometry.alignment) != self.geometry.granule_phase):
            raise ValueError("a region does not start where a chunk header can lie")
        row_bytes = np.uint64(self.geometry.alignment * GRANULES_PER_WORD)
        words = ((ends - starts - np.uint64(1)) // row_bytes + np.uint64(1)).astype(np.int64)
        last_words = first_words + words
        if np.any(first_words < 0) or np.any(last_words > len(self.lookup)):
            raise ValueError("a region's rows lie outside the lookup")
        if np.any(first_words[1:] < last_words[:-1]):
            raise ValueError("the rows of regions overlap")
        if np.any(self.lookup[first_words, 0] & np.uint64(1) == 0):
            raise ValueError("a region does not begin with a chunk")

    def _check_mmapped(self) -> None:
        table = self.mmapped
        columns = (table.header_address, table.mapping_start, table.mapping_bytes, table.chunk_bytes)
        if len({len(column) for column in columns}) != 1 or any(column.dtype != np.uint64 for column in columns):
            raise ValueError("the columns of mmapped chunks differ in length or are not uint64")
        if any(not column.flags.c_contiguous for column in columns):
            raise ValueError("the columns of mmapped chunks are not contiguous")
        starts, ends = table.mapping_start, table.mapping_start + table.mapping_bytes
        if np.any(ends <= starts) or np.any(starts[1:] < ends[:-1]):
            raise ValueError("mappings are empty, not sorted, or they overlap")
        if len(ends) and int(ends[-1]) > ADDRESS_LIMIT:
            raise ValueError(f"a mapping ends at {int(ends[-1]):#x}, where no process has memory")
        if np.any(table.header_address < starts) or np.any(table.header_address >= ends):
            raise ValueError("a mmapped chunk lies outside its mapping")
        following = np.searchsorted(self.region_end, starts, side="right")
        meets_region = following < len(self.region_start)
        if np.any(self.region_start[following[meets_region]] < ends[meets_region]):
            raise ValueError("a mapping overlaps a region")

    def _build_blocks(self) -> None:
        """Fills the table that leads from ``address >> block_shift`` to the few regions in question.

        ``block_first_region[b]``: regions that end at or before the start of block b. One entry more than blocks.
        """
        if not self.region_count:
            self.block_shift, self.first_block = _SMALLEST_BLOCK_SHIFT, 0
            self.block_first_region = np.zeros(1, np.int32)
            return
        first, last = int(self.region_start[0]), int(self.region_end[-1]) - 1
        shift = _SMALLEST_BLOCK_SHIFT
        while (last >> shift) - (first >> shift) >= _MOST_BLOCKS:
            shift += 1
        self.block_shift, self.first_block = shift, first >> shift
        blocks = (last >> shift) - self.first_block + 1
        passed_from = ((self.region_end - np.uint64(1)) >> np.uint64(shift)).astype(np.int64) - self.first_block + 1
        passed = np.bincount(passed_from, minlength=blocks + 1)
        self.block_first_region = np.cumsum(passed, dtype=np.int32)


def _start_bits_in(lookup: UInt64Array) -> int:
    """How many chunks a lookup with ranks holds: the last row's rank and the bits of that row."""
    if not len(lookup):
        return 0
    return (int(lookup[-1, 1]) & RANK_MASK) + int(lookup[-1, 0]).bit_count()
