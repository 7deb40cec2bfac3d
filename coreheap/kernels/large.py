"""The large chunks of a heap, found without looking at the small ones.

Knows: that a large chunk leaves whole rows of the lookup without a start bit. Does not know: what anyone calls large.

A look at each row, 64 granules, instead of at each chunk: a hundredth of a nanosecond a chunk and less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.kernels.index import GRANULES_PER_WORD, RANK_MASK, ChunkIndex
from coreheap.kernels.values import Int64Array, UInt8Array, UInt64Array

_ROWS_AT_A_TIME: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class LargeChunks:
    """Chunks of one region by address: ``header_address``, ``chunk_bytes`` (uint64), ``state`` (uint8, ``ChunkState``)."""

    header_address: UInt64Array
    chunk_bytes: UInt64Array
    state: UInt8Array

    def __len__(self) -> int:
        return len(self.header_address)


def large_chunks(index: ChunkIndex, region: int, smallest_bytes: int) -> LargeChunks:
    """The chunks of a region with at least ``smallest_bytes``.

    Raises ValueError for sizes below two rows of the lookup (2 KiB where a granule has 16 bytes): such chunks need not leave
    a row empty.
    """
    alignment = index.geometry.alignment
    row_bytes = alignment * GRANULES_PER_WORD
    if smallest_bytes < 2 * row_bytes:
        raise ValueError(f"chunks of {smallest_bytes} bytes are not large; at least {2 * row_bytes}")
    first_row = int(index.region_first_word[region])
    row_count = index.word_count(region)
    # A chunk that spans this many rows, from its own to the next one with a start, can be large enough.
    rows_apart = (smallest_bytes - 1) // row_bytes
    befores: list[Int64Array] = []
    afters: list[Int64Array] = []
    last = np.zeros(0, np.int64)
    for start in range(0, row_count, _ROWS_AT_A_TIME):
        bits = index.lookup[first_row + start : first_row + min(start + _ROWS_AT_A_TIME, row_count), 0]
        used = np.concatenate((last, np.flatnonzero(bits) + start))
        is_wide = np.flatnonzero(np.diff(used) >= rows_apart)
        befores.append(used[is_wide])
        afters.append(used[is_wide + 1])
        last = used[-1:]
    before, after = np.concatenate(befores), np.concatenate(afters)
    base = index.region_start[region]
    granule = np.uint64(alignment)
    header = base + _granules(index, first_row, before, highest=True) * granule
    end = base + _granules(index, first_row, after, highest=False) * granule
    chunk = (index.lookup[first_row + after, 1] & np.uint64(RANK_MASK)).astype(np.int64) - 1
    # The region's last chunk ends where the region does.
    header = np.concatenate((header, base + _granules(index, first_row, last, highest=True) * granule))
    end = np.append(end, index.region_end[region])
    chunk = np.append(chunk, index.region_first_chunk[region] + index.region_chunk_count[region] - 1)
    chunk_bytes = end - header
    is_large = chunk_bytes >= np.uint64(smallest_bytes)
    return LargeChunks(header[is_large], chunk_bytes[is_large], index.state[chunk[is_large]])


def _granules(index: ChunkIndex, first_row: int, rows: Int64Array, *, highest: bool) -> UInt64Array:
    """The number of the highest, or of the lowest granule with a start bit in each of these rows, from the region's start."""
    bits = index.lookup[first_row + rows, 0].copy()
    if highest:
        for shift in (1, 2, 4, 8, 16, 32):
            bits |= bits >> np.uint64(shift)
        bits ^= bits >> np.uint64(1)
    else:
        bits &= ~bits + np.uint64(1)
    # One bit is left: a power of two, exact as a float.
    number = np.log2(bits.astype(np.float64)).astype(np.uint64)
    result: UInt64Array = rows.astype(np.uint64) * np.uint64(GRANULES_PER_WORD) + number
    return result
