"""Which words lead to which chunks.

Knows: chunks by number, words that may be pointers. Does not know: allocators, or what a root is.

A word leads to the chunk in whose payload it falls: from the payload's first byte to one word past the chunk's own end,
where the payload ends (a chunk lends its first word to the chunk before). The address one past a payload's end counts as
inside, but for mmapped chunks, behind which another mapping begins. Only chunks in use are read. Unaligned and encoded pointers are not seen.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator

import numpy as np

from coreheap.kernels.codes import ChunkState
from coreheap.kernels.index import ChunkIndex
from coreheap.kernels.reference._region import byte_view
from coreheap.kernels.reference.columns import _region_chunks
from coreheap.kernels.values import (
    ADDRESS_LIMIT,
    CHUNK_MASK,
    INTERIOR,
    Edges,
    MemoryMap,
    RootReferences,
    UInt32Array,
    UInt64Array,
)

MOST_NARROW = (1 << 32) - 1
"""References that a uint32 can count."""


class _Words:
    """The saved aligned words of ranges of memory."""

    def __init__(self, memory: MemoryMap, word_bytes: int) -> None:
        self._view = byte_view(memory.file)
        self._unpack = struct.Struct("<Q" if word_bytes == 8 else "<I").unpack_from
        self._word = word_bytes
        self._start = memory.run_start.tolist()
        self._end = memory.run_end.tolist()
        self._offset = memory.run_file_offset.tolist()

    def within(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """(address, word) of each word of [start, end) that one run holds whole."""
        word = self._word
        first = max(bisect_right(self._start, start) - 1, 0)
        for low, high, offset in zip(self._start[first:], self._end[first:], self._offset[first:], strict=True):
            if low >= end:
                return
            address = -(-max(low, start) // word) * word
            while address + word <= min(high, end) and offset + address - low + word <= len(self._view):
                yield address, self._unpack(self._view, offset + address - low)[0]
                address += word


class _Pointers:
    """Says which chunk a word leads to."""

    def __init__(self, index: ChunkIndex, address_mask: int) -> None:
        if index.chunk_count > CHUNK_MASK:
            raise OverflowError(f"{index.chunk_count} chunks are more than references can tell apart")
        self.index = index
        self.mask = address_mask & ((1 << 8 * index.geometry.word_bytes) - 1)
        self.header_bytes = index.geometry.header_bytes

    def target_of(self, word: int) -> int | None:
        """A chunk index, with INTERIOR where the word is not its payload's address; None for no chunk."""
        place = (word & self.mask) - self.header_bytes
        chunk = self.index.chunk_containing(place) if place >= 0 else -1
        if chunk < 0:
            return None
        if chunk >= self.index.chunk_count:
            raise ValueError("the ranks of the index lead to chunks that it does not have")
        if chunk >= self.index.region_chunks and self._is_behind_mapping(chunk, place + self.header_bytes):
            return None
        return chunk if self.index.chunk_starting_at(place) == chunk else chunk | INTERIOR

    def _is_behind_mapping(self, chunk: int, address: int) -> bool:
        mapped, row = self.index.mmapped, chunk - self.index.region_chunks
        return address >= int(mapped.mapping_start[row]) + int(mapped.mapping_bytes[row])


def _chunks_in_use(index: ChunkIndex) -> Iterator[tuple[int, int, int]]:
    """Chunk index, start and end of the payload."""
    word, in_use = index.geometry.word_bytes, int(ChunkState.IN_USE)
    for region in range(index.region_count):
        for chunk, header, chunk_bytes in _region_chunks(index, region, 0, index.word_count(region)):
            if index.state[chunk] == in_use:
                yield chunk, header + 2 * word, header + chunk_bytes + word
    mapped = index.mmapped
    for row, header in enumerate(mapped.header_address.tolist()):
        if index.state[index.region_chunks + row] == in_use:
            end = int(mapped.mapping_start[row]) + int(mapped.mapping_bytes[row])
            yield index.region_chunks + row, header + 2 * word, end


def collect_edges(
    index: ChunkIndex, memory: MemoryMap, address_mask: int, wide: bool = False, second_from: int | None = None
) -> Edges:
    """All references from chunks in use to chunks, in one pass over their words.

    ``address_mask`` takes tags off a word before it is compared (aarch64). What a word of a chunk says about that chunk
    itself is left out. ``first`` is uint64 where ``wide`` is asked for, or where 32 bits cannot count the references.
    The compiled kernel reads large heaps with two threads; ``second_from`` is the chunk with which the second one begins,
    if not that in the middle, and changes nothing in the result. Raises OverflowError for more than 2**31 - 1 chunks,
    IndexError for a second thread from a chunk that there is not.
    """
    pointers, words = _Pointers(index, address_mask), _Words(memory, index.geometry.word_bytes)
    if second_from is not None and not 0 <= second_from <= index.chunk_count:
        raise IndexError(f"there is no chunk {second_from} to begin with")
    targets: list[int] = []
    counts = np.zeros(index.chunk_count + 1, np.uint64)
    for chunk, start, end in _chunks_in_use(index):
        before = len(targets)
        for _, word in words.within(start, end):
            target = pointers.target_of(word)
            if target is not None and target & CHUNK_MASK != chunk:
                targets.append(target)
        counts[chunk + 1] = len(targets) - before
    first = np.cumsum(counts, dtype=np.uint64)
    narrow = not wide and len(targets) <= MOST_NARROW
    return Edges(first.astype(np.uint32) if narrow else first, np.array(targets, np.uint32))


def find_root_references(
    index: ChunkIndex,
    memory: MemoryMap,
    start: UInt64Array,
    end: UInt64Array,
    address_mask: int,
    seen_exact: UInt64Array,
    seen_interior: UInt64Array,
) -> RootReferences:
    """The first word that leads to each chunk, among the words of ranges of memory in the order given.

    ``seen_exact`` and ``seen_interior`` have a bit for each chunk that a word led to, in this call or one before, and are
    written: an exact reference is told once, an interior one once and only before an exact one. Raises ValueError for
    a range that ends above 2**63, or for bitmaps of another length.
    """
    pointers, words = _Pointers(index, address_mask), _Words(memory, index.geometry.word_bytes)
    if len(start) != len(end):
        raise ValueError("the columns of ranges differ in length")
    if any(high > ADDRESS_LIMIT for high in end.tolist()):
        raise ValueError(f"a range ends at {int(end.max()):#x}, where no process has memory")
    check_bits(index.chunk_count, seen_exact, seen_interior)
    holders: list[int] = []
    targets: list[int] = []
    for low, high in zip(start.tolist(), end.tolist(), strict=True):
        for address, word in words.within(low, high):
            target = pointers.target_of(word)
            if target is None or is_set(seen_exact, target & CHUNK_MASK):
                continue
            if target & INTERIOR and is_set(seen_interior, target & CHUNK_MASK):
                continue
            set_bit(seen_interior if target & INTERIOR else seen_exact, target & CHUNK_MASK)
            holders.append(address)
            targets.append(target)
    return RootReferences(np.array(holders, np.uint64), np.array(targets, np.uint32))


def mark_reachable_directly(
    index: ChunkIndex,
    memory: MemoryMap,
    address_mask: int,
    seeds: UInt32Array,
    marked: UInt64Array,
    interior: UInt64Array,
    follow_interior: bool,
    most_waiting: int = 1 << 20,
) -> int:
    """What ``mark_reachable`` does on the references of ``collect_edges``, without them: for heaps whose references do not
    fit into memory. Slower, because it jumps about in the core itself.

    Not more than ``most_waiting`` chunks wait for their visit, of 16 bytes each. Where more would have to, the rest is found
    by going over the marks again. Raises ValueError for bitmaps of another length, IndexError for seeds without a chunk.
    """
    pointers, words = _Pointers(index, address_mask), _Words(memory, index.geometry.word_bytes)
    check_bits(index.chunk_count, marked, interior)
    if most_waiting < 1:
        raise ValueError(f"{most_waiting} chunks cannot wait")
    payloads = {chunk: (start, end) for chunk, start, end in _chunks_in_use(index)}
    visited = marked.copy()
    count = 0
    for seed in (seeds & np.uint32(CHUNK_MASK)).tolist():
        if seed >= index.chunk_count:
            raise IndexError(f"there is no chunk {seed}")
        if not is_set(marked, seed):
            set_bit(marked, seed)
            count += 1
    overflowed = True
    while overflowed:
        overflowed = False
        for first in np.flatnonzero(np.unpackbits((marked & ~visited).view(np.uint8), bitorder="little")).tolist():
            waiting = [first]
            while waiting:
                chunk = waiting.pop()
                set_bit(visited, chunk)
                for _, word in words.within(*payloads.get(chunk, (0, 0))):
                    target = pointers.target_of(word)
                    if target is None or is_set(marked, target & CHUNK_MASK):
                        continue
                    if target & INTERIOR and not follow_interior:
                        set_bit(interior, target & CHUNK_MASK)
                        continue
                    set_bit(marked, target & CHUNK_MASK)
                    count += 1
                    if len(waiting) < most_waiting:
                        waiting.append(target & CHUNK_MASK)
                    else:
                        overflowed = True
    if not follow_interior:
        interior &= ~marked
    return count


def is_set(bits: UInt64Array, position: int) -> bool:
    """Whether a bit of a bitmap is 1; bit 0 is the lowest of the first word."""
    return bool(int(bits[position >> 6]) >> (position & 63) & 1)


def set_bit(bits: UInt64Array, position: int) -> None:
    """Makes a bit of a bitmap 1."""
    bits[position >> 6] |= np.uint64(1 << (position & 63))


def check_bits(chunk_count: int, *bitmaps: UInt64Array) -> None:
    """Raises ValueError for a bitmap that has not one bit for each chunk, in whole words."""
    for bitmap in bitmaps:
        if len(bitmap) != (chunk_count + 63) // 64:
            raise ValueError(f"{len(bitmap)} words are not one bit for each of {chunk_count} chunks")
