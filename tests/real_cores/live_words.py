"""A second witness of what is called lost: the words of a core file, read anew.

Knows ELF's program headers, and of a report where the chunks are and what was said of them. Any word at any byte that could be a
pointer to a lost chunk is found, wherever the leak search looked.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.leaks import Verdict

LOST = (Verdict.DEFINITELY_LOST, Verdict.INDIRECTLY_LOST)
DEAD = (
    ChunkState.TCACHE,
    ChunkState.FASTBIN,
    ChunkState.UNSORTED_BIN,
    ChunkState.SMALL_BIN,
    ChunkState.LARGE_BIN,
    ChunkState.TOP,
    ChunkState.FREE_UNLISTED,
    ChunkState.ALLOCATOR_OWN,
)
PT_LOAD = 1
USER_SPACE_END = 1 << 47
RED_ZONE_BYTES = 128
ARENA_BYTES = 2200
"""sizeof (struct malloc_state) on x86-64, any glibc from 2.26 on, is a little less or more."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """All chunks of a core as columns, by address."""

    payload: NDArray[np.uint64]
    usable: NDArray[np.int64]
    state: NDArray[np.uint8]
    verdict: NDArray[np.uint8]

    @classmethod
    def of(cls, heap: HeapSnapshot) -> Chunks:
        parts = [
            (b.payload_address, b.usable_bytes.astype(np.int64), b.state, b.verdict) for b in heap.chunks.batches()
        ]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.argsort(columns[0])
        return cls(*(column[order] for column in columns))

    def sizes(self, *verdicts: Verdict) -> Counter[int]:
        return Counter(self.usable[np.isin(self.verdict, verdicts)].tolist())


@dataclass(frozen=True, slots=True)
class Scan:
    """A core file of x86-64 with the chunks of its process. ``arenas``: start and end of each malloc_state, which outside of
    chunks alone may hold addresses of free chunks, that is, of the end of the chunk before."""

    core: Path
    chunks: Chunks
    stack_pointers: tuple[int, ...]
    arenas: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, core: Path, heap: HeapSnapshot, stack_pointers: tuple[int | None, ...]) -> Scan:
        arenas = [arena.address for arena in heap.arenas if arena.address is not None]
        pointers = tuple(pointer for pointer in stack_pointers if pointer is not None)
        return cls(core, Chunks.of(heap), pointers, tuple((start, start + ARENA_BYTES) for start in arenas))

    def lost_payloads(self) -> NDArray[np.uint64]:
        payloads: NDArray[np.uint64] = self.chunks.payload[np.isin(self.chunks.verdict, LOST)]
        return payloads

    def live_words_to_lost(self) -> list[tuple[int, int]]:
        """(place, payload address) of each word that somebody may read and that leads to a chunk that is called lost."""
        rows = np.flatnonzero(np.isin(self.chunks.verdict, LOST))
        return [word for word in self.words_that_lead_to(rows) if not self.is_dead(word[0])]

    def words_that_lead_to(self, rows: NDArray[np.int64]) -> list[tuple[int, int]]:
        """(place, payload address) of every word in the core that is an address in one of these chunks."""
        if not len(rows):
            return []
        start = self.chunks.payload[rows]
        end = start + self.chunks.usable[rows].astype(np.uint64)
        file = np.memmap(self.core, np.uint8, "r")
        table, count = struct.unpack_from("<Q", file, 32)[0], struct.unpack_from("<H", file, 56)[0]
        words = []
        for number in range(count):
            kind, _, offset, address, _, size, _, _ = struct.unpack_from("<IIQQQQQQ", file, table + 56 * number)
            segment = file[offset : offset + size]
            if kind != PT_LOAD or address >= USER_SPACE_END:
                continue
            # Below 4 GiB four bytes before a zero are an address by chance too often: halves of hashes, for one.
            for shift in range(1 if start[0] < 1 << 32 else 8):
                stored = segment[shift : shift + (len(segment) - shift) // 8 * 8].view("<u8")
                for values in (stored, *(_decoded(stored) if shift == 0 and start[0] >= 1 << 32 else ())):
                    near = np.flatnonzero((values >= start[0]) & (values < end[-1]))
                    chunk = np.searchsorted(start, values[near], side="right") - 1
                    inside = values[near] < end[chunk]
                    places = (near[inside] * 8 + (address + shift)).tolist()
                    words += list(zip(places, start[chunk[inside]].tolist(), strict=True))
        return words

    def is_dead(self, place: int) -> bool:
        """Whether nobody will read this place: a free chunk, an arena, below a stack pointer, a lost chunk."""
        chunks = self.chunks
        row = int(np.searchsorted(chunks.payload, np.uint64(place), side="right")) - 1
        if row >= 0 and place < int(chunks.payload[row]) + int(chunks.usable[row]):
            return ChunkState(int(chunks.state[row])) in DEAD or Verdict(int(chunks.verdict[row])) in LOST
        if any(start <= place < end for start, end in self.arenas):
            return True
        return any(stack - (1 << 20) < place < stack - RED_ZONE_BYTES for stack in self.stack_pointers)


def _decoded(words: NDArray[np.uint64]) -> Iterator[NDArray[np.uint64]]:
    """What words mean where a program keeps something beside the address: a number of a Lisp or Scheme, a counter above it."""
    for bits in (1, 2, 3):
        yield words >> np.uint64(bits)
    yield words & np.uint64(USER_SPACE_END - 1)
