"""Sets of chunks as bitmaps: one bit a chunk, in uint64 words, bit 0 the lowest of the first.

Knows: columns and positions. Does not know: what a set is of.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]

BATCH_CHUNKS = 1 << 20


def bits_of(column: npt.NDArray[np.bool_]) -> UInt64s:
    """One bit a row, uint64[rows / 64, rounded up]."""
    packed = np.packbits(column, bitorder="little")
    padded = np.zeros((len(column) + 63) // 64 * 8, np.uint8)
    padded[: len(packed)] = packed
    return padded.view(np.uint64)


def bits_of_positions(positions: UInt32s, rows: int) -> UInt64s:
    """One bit a row, set at the positions."""
    bits = np.zeros((rows + 63) // 64, np.uint64)
    np.bitwise_or.at(bits, positions >> np.uint32(6), np.uint64(1) << (positions & np.uint32(63)).astype(np.uint64))
    return bits


def unpacked(bits: UInt64s, first: int, count: int) -> npt.NDArray[np.bool_]:
    """The bits of rows [first, first + count) as bools; ``first`` is a multiple of 64."""
    part = bits[first // 64 : (first + count + 63) // 64]
    return np.unpackbits(part.view(np.uint8), count=count, bitorder="little").view(np.bool_)


def positions_of(bits: UInt64s) -> UInt32s:
    """The rows whose bit is set, ascending."""
    words = np.flatnonzero(bits)
    parts = [np.empty(0, np.uint32)]
    for batch in _batches(words):
        set_bits = np.unpackbits(bits[batch].view(np.uint8), bitorder="little").reshape(-1, 64)
        row, bit = np.nonzero(set_bits)
        parts.append((batch[row] * 64 + bit).astype(np.uint32))
    return np.concatenate(parts)


def _batches(rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for first in range(0, len(rows), BATCH_CHUNKS // 64):
        yield rows[first : first + BATCH_CHUNKS // 64]
