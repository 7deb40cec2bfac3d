"""Columns about the chunks of an index: ranks, addresses, sums.

Knows: start bits and states. Does not know: the memory behind them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from coreheap.kernels.codes import STATE_SLOTS
from coreheap.kernels.index import GRANULES_PER_WORD, MMAPPED, RANK_MASK, ChunkIndex
from coreheap.kernels.values import Int64Array, UInt64Array


def fill_ranks(lookup: UInt64Array) -> int:
    """Writes into column 1 how many start bits lie in the rows before; returns the number of all.

    The upper half of column 1 becomes 0. Raises OverflowError beyond 2**32 - 1 chunks.
    """
    if not len(lookup):
        return 0
    ends = np.cumsum(_bit_counts(lookup[:, 0]), dtype=np.uint64)
    if int(ends[-1]) > RANK_MASK:
        raise OverflowError(f"{int(ends[-1])} chunks are more than a rank can count")
    lookup[0, 1] = 0
    lookup[1:, 1] = ends[:-1]
    return int(ends[-1])


def _bit_counts(words: UInt64Array) -> UInt64Array:
    """Set bits of each word. numpy has bitwise_count only from 2.0 on."""

    def every(pattern: int) -> np.uint64:
        return np.uint64(pattern * 0x0101010101010101)

    pairs = words - ((words >> np.uint64(1)) & every(0x55))
    nibbles = (pairs & every(0x33)) + ((pairs >> np.uint64(2)) & every(0x33))
    octets = (nibbles + (nibbles >> np.uint64(4))) & every(0x0F)
    counts: UInt64Array = (octets * every(0x01)) >> np.uint64(56)
    return counts


def _region_chunks(index: ChunkIndex, region: int, first_word: int, last_word: int) -> Iterator[tuple[int, int, int]]:
    """Chunk index, header address and bytes of the chunks that start in rows [first_word, last_word) of a region."""
    if not 0 <= region < index.region_count:
        raise IndexError(f"there is no region {region}")
    words = index.word_count(region)
    if not 0 <= first_word <= last_word <= words:
        raise IndexError(f"region {region} has {words} rows, not {first_word} to {last_word}")
    alignment = index.geometry.alignment
    region_start, region_end = int(index.region_start[region]), int(index.region_end[region])
    region_row = int(index.region_first_word[region])

    def starts() -> Iterator[tuple[int, int]]:
        for word in range(first_word, words):
            bits = int(index.lookup[region_row + word, 0])
            while bits:
                bit = (bits & -bits).bit_length() - 1
                yield word, region_start + (word * GRANULES_PER_WORD + bit) * alignment
                bits &= bits - 1

    chunk = int(index.lookup[region_row + first_word, 1]) & RANK_MASK if first_word < words else 0
    remaining = starts()
    current = next(remaining, None)
    while current is not None and current[0] < last_word:
        following = next(remaining, None)
        end = region_end if following is None else following[1]
        yield chunk, current[1], end - current[1]
        chunk += 1
        current = following


def unpack_chunks(index: ChunkIndex, region: int, first_word: int, last_word: int) -> tuple[UInt64Array, UInt64Array]:
    """Header addresses and bytes (uint64) of the chunks that start in rows [first_word, last_word) of a region.

    Rows are counted from the region's first. A chunk that begins in the last row is given its whole length.
    Raises IndexError for rows that the region does not have.
    """
    chunks = list(_region_chunks(index, region, first_word, last_word))
    addresses = np.array([header for _, header, _ in chunks], np.uint64)
    return addresses, np.array([chunk_bytes for _, _, chunk_bytes in chunks], np.uint64)


def _all_chunks(index: ChunkIndex, region: int) -> Iterator[tuple[int, int]]:
    """Chunk index and bytes of all chunks of a region, or of all mmapped ones with their whole mappings."""
    if region == MMAPPED:
        for row, mapping_bytes in enumerate(index.mmapped.mapping_bytes.tolist()):
            yield index.region_chunks + row, mapping_bytes
    else:
        for chunk, _, chunk_bytes in _region_chunks(index, region, 0, index.word_count(region)):
            yield chunk, chunk_bytes


def state_totals(index: ChunkIndex, region: int) -> tuple[Int64Array, UInt64Array]:
    """How many chunks of a region there are in each state, and their bytes: int64[16], uint64[16].

    ``region`` MMAPPED (-1) counts the mmapped chunks, each with the bytes of its whole mapping. States beyond 15,
    which nobody writes, are counted as their low four bits.
    """
    counts = np.zeros(STATE_SLOTS, np.int64)
    totals = np.zeros(STATE_SLOTS, np.uint64)
    for chunk, chunk_bytes in _all_chunks(index, region):
        state = int(index.state[chunk]) % STATE_SLOTS
        counts[state] += 1
        totals[state] += np.uint64(chunk_bytes)
    return counts, totals


EXACT_SIZE_CLASSES = 1024
SIZE_CLASSES = EXACT_SIZE_CLASSES + 54


def size_class_of(granules: int) -> int:
    """The size class of a chunk of so many granules; see ``size_histogram``."""
    if granules < EXACT_SIZE_CLASSES:
        return granules
    return EXACT_SIZE_CLASSES + min(granules.bit_length() - EXACT_SIZE_CLASSES.bit_length(), 53)


def size_histogram(index: ChunkIndex, region: int, state_mask: int) -> tuple[Int64Array, UInt64Array]:
    """Counts (int64) and bytes (uint64) by size class of the chunks whose state has its bit in ``state_mask``.

    Class k < 1024 holds the chunks of k granules (rounded down), class 1024 + k those of 2**(10 + k) granules and
    more, up to twice as many; 1078 classes. ``region`` as for ``state_totals``.
    """
    counts = np.zeros(SIZE_CLASSES, np.int64)
    totals = np.zeros(SIZE_CLASSES, np.uint64)
    for chunk, chunk_bytes in _all_chunks(index, region):
        if state_mask >> (int(index.state[chunk]) % STATE_SLOTS) & 1:
            size_class = size_class_of(chunk_bytes // index.geometry.alignment)
            counts[size_class] += 1
            totals[size_class] += np.uint64(chunk_bytes)
    return counts, totals


def find_chunks(index: ChunkIndex, addresses: UInt64Array, exact: bool) -> Int64Array:
    """Chunk indexes (int64) of many addresses, -1 where there is none.

    ``exact``: only chunks whose header lies at the address; else those whose bytes, header included, hold it.
    """
    find = index.chunk_starting_at if exact else index.chunk_containing
    return np.array([find(address) for address in addresses.tolist()], np.int64)


def chunk_extents(index: ChunkIndex, chunks: Int64Array) -> tuple[UInt64Array, UInt64Array]:
    """Header addresses and bytes (uint64) of chunks given by index, in the order given.

    The bytes of a mmapped chunk are those of its header's size field. Raises IndexError for an index without chunk.
    """
    headers: list[int] = []
    sizes: list[int] = []
    for chunk in chunks.tolist():
        if not 0 <= chunk < index.chunk_count:
            raise IndexError(f"there is no chunk {chunk}")
        if chunk >= index.region_chunks:
            headers.append(int(index.mmapped.header_address[chunk - index.region_chunks]))
            sizes.append(int(index.mmapped.chunk_bytes[chunk - index.region_chunks]))
            continue
        region = int(np.searchsorted(index.region_first_chunk, chunk, side="right")) - 1
        row = int(index.region_first_word[region])
        ranks = index.lookup[row : row + index.word_count(region), 1] & np.uint64(RANK_MASK)
        word = int(np.searchsorted(ranks, chunk, side="right")) - 1
        for found, header, chunk_bytes in _region_chunks(index, region, word, word + 1):
            if found == chunk:
                headers.append(header)
                sizes.append(chunk_bytes)
    return np.array(headers, np.uint64), np.array(sizes, np.uint64)
