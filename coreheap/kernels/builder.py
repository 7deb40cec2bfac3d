"""From walks over regions to one ``ChunkIndex``.

Knows: the order in which the columns of an index are filled. Does not know: which regions there are, or what a
broken chunk means.
"""

from __future__ import annotations

import numpy as np

from coreheap.kernels._active import fill_ranks
from coreheap.kernels.codes import ChunkState
from coreheap.kernels.index import GRANULES_PER_WORD, ChunkIndex, words_for
from coreheap.kernels.values import (
    ChunkGeometry,
    MmappedChunks,
    UInt8Array,
    UInt64Array,
    WalkOutcome,
    no_mmapped_chunks,
)


class ChunkIndexBuilder:
    """Collects the walks of all regions into one ``ChunkIndex``.

    ``most_bytes`` and ``most_regions`` bound what all regions together can need. Regions come in the order of their
    addresses. For each: ``open_region``, then ``walk_region`` fills in ``start_bits`` and ``free_states``, ``take_over``
    counts what it found, ``mark`` adds a chunk by hand (a damaged stretch), and ``close_region`` ends the region where
    its last chunk does. A region without chunks vanishes.

    Memory is reserved for the worst case, but touched only as chunks are found.
    """

    def __init__(self, geometry: ChunkGeometry, most_bytes: int, most_regions: int) -> None:
        self.geometry = geometry
        # Each region starts in a lookup row of its own, which costs at most one row more than its bytes need.
        self._lookup = np.zeros((words_for(most_bytes, geometry.alignment) + most_regions, 2), np.uint64)
        self._state = np.empty(most_bytes // geometry.alignment + most_regions, np.uint8)
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._first_words: list[int] = []
        self._next_word = 0
        self._words = 0
        self._start: int | None = None
        self._chunks = 0
        self._first_chunk = 0
        self._end_offset = 0

    @property
    def chunk_count(self) -> int:
        """Chunks of all regions so far."""
        return self._chunks

    @property
    def end_offset(self) -> int:
        """Where the last chunk of the open region ends, 0 before the first."""
        return self._end_offset

    def open_region(self, start: int, most_bytes: int) -> None:
        """Begin a region at a chunk header's address, behind all regions so far.

        Raises ValueError where another is open, where it lies before an earlier one, or where no room is left.
        """
        if self._start is not None:
            raise ValueError(f"the region at {self._start:#x} is still open")
        if self._ends and start < self._ends[-1]:
            raise ValueError(f"a region at {start:#x} comes after one that ends at {self._ends[-1]:#x}")
        words = words_for(most_bytes, self.geometry.alignment)
        if self._next_word + words > len(self._lookup):
            raise ValueError(f"a region of {most_bytes} bytes does not fit")
        self._start, self._words = start, words
        self._end_offset, self._first_chunk = 0, self._chunks

    def start_bits(self) -> UInt64Array:
        """The open region's rows of the lookup: uint64[rows, 2]."""
        return self._lookup[self._next_word : self._next_word + self._words]

    def free_states(self) -> UInt8Array:
        """The part of the state column that is not taken yet; the next chunk's state is its element 0."""
        return self._state[self._chunks :]

    def take_over(self, outcome: WalkOutcome) -> None:
        """Counts the chunks that a walk over the open region wrote into ``start_bits`` and ``free_states``."""
        self._extend(outcome.chunk_count, outcome.end_offset)

    def mark(self, offset: int, end_offset: int, state: ChunkState) -> None:
        """Adds one chunk, [offset, end_offset) of the open region, behind all its chunks so far."""
        granule, beside = divmod(offset, self.geometry.alignment)
        if beside or offset < self._end_offset or end_offset <= offset:
            raise ValueError(f"no chunk can lie at offsets {offset} to {end_offset}")
        self._extend(1, end_offset)
        row, bit = divmod(granule, GRANULES_PER_WORD)
        self.start_bits()[row, 0] |= np.uint64(1 << bit)
        self._state[self._chunks - 1] = state

    def rewind(self, offset: int) -> None:
        """Forgets the open region's chunks from an offset on, at which one of them starts or the last one ends."""
        first, beside = divmod(offset, self.geometry.alignment)
        if self._start is None or beside or not 0 <= offset <= self._end_offset:
            raise ValueError(f"no chunk starts at offset {offset}")
        last = words_for(self._end_offset, self.geometry.alignment)
        row, bit = divmod(first, GRANULES_PER_WORD)
        rows = self.start_bits()[row:last]
        if len(rows):
            kept = int(rows[0, 0]) & ((1 << bit) - 1)
            forgotten = np.ascontiguousarray(rows[:, 0])
            forgotten[0] ^= np.uint64(kept)
            self._chunks -= int(np.unpackbits(forgotten.view(np.uint8)).sum())
            rows[:, 0] = 0
            rows[0, 0] = kept
        self._end_offset = offset

    def starts_before(self, offset: int, count: int) -> list[int]:
        """Offsets of the open region at which its last chunks before ``offset`` start, the nearest first."""
        granule = offset // self.geometry.alignment
        found: list[int] = []
        bits = self.start_bits()
        for row in range(min(granule // GRANULES_PER_WORD, len(bits) - 1), -1, -1):
            word = int(bits[row, 0])
            if row == granule // GRANULES_PER_WORD:
                word &= (1 << granule % GRANULES_PER_WORD) - 1
            while word and len(found) < count:
                bit = word.bit_length() - 1
                word ^= 1 << bit
                found.append((row * GRANULES_PER_WORD + bit) * self.geometry.alignment)
            if len(found) >= count:
                break
        return found

    def _extend(self, chunk_count: int, end_offset: int) -> None:
        capacity = self._words * GRANULES_PER_WORD * self.geometry.alignment
        if self._start is None or not 0 <= chunk_count <= len(self._state) - self._chunks:
            raise ValueError(f"{chunk_count} chunks do not fit")
        if chunk_count and not self._end_offset < end_offset <= capacity:
            raise ValueError(f"chunks cannot end at offset {end_offset}")
        self._chunks += chunk_count
        if chunk_count:
            self._end_offset = end_offset

    def close_region(self) -> bool:
        """End the open region where its last chunk ends; False when it has none and vanishes."""
        if self._start is None:
            raise ValueError("no region is open")
        start, self._start = self._start, None
        if self._chunks == self._first_chunk:
            return False
        self._starts.append(start)
        self._ends.append(start + self._end_offset)
        self._first_words.append(self._next_word)
        self._next_word += words_for(self._end_offset, self.geometry.alignment)
        return True

    def finish(self, mmapped: MmappedChunks | None = None) -> ChunkIndex:
        """The index of all closed regions and of ``mmapped``, whose chunks count as in use so far.

        Raises ValueError where a region is still open, or where regions or mappings overlap.
        """
        if self._start is not None:
            raise ValueError(f"the region at {self._start:#x} is still open")
        lookup = self._lookup[: self._next_word]
        total = fill_ranks(lookup)
        if total != self._chunks:
            raise ValueError(f"{total} start bits for {self._chunks} chunks")
        mmapped = mmapped if mmapped is not None else no_mmapped_chunks()
        if len(mmapped) <= len(self._state) - total:
            state = self._state[: total + len(mmapped)]
        else:
            state = np.concatenate((self._state[:total], np.empty(len(mmapped), np.uint8)))
        state[total:] = ChunkState.IN_USE
        return ChunkIndex(
            self.geometry,
            np.array(self._starts, np.uint64),
            np.array(self._ends, np.uint64),
            np.array(self._first_words, np.int64),
            lookup,
            state,
            mmapped,
        )
