"""Where some chunks are pointed to, word by word: by their insides, or in another form than as they are.

Knows: words, addresses, forms in which programs keep pointers. Does not know: why a chunk is asked for.
"""

from __future__ import annotations

import struct

import numpy as np

from coreheap.kernels.codes import PointerForm
from coreheap.kernels.index import ChunkIndex
from coreheap.kernels.reference.pointers import _Pointers, _Words, check_bits, is_set
from coreheap.kernels.values import (
    ADDRESS_LIMIT,
    CHUNK_MASK,
    EncodedPointers,
    MemoryMap,
    PointersFound,
    UInt64Array,
)

TAG_SHIFT = 16
"""x86-64 and arm64 programs have 48 bits of address, so the upper 16 are free; some keep the pointer in the upper 48."""
SHIFTS = (1, 2, 3, 4)
"""Alignments of 2 to 16 bytes leave that many low bits free."""
HALVES_APART = 4
"""The halves of a pointer lie at most so many 32-bit places from each other."""


def find_pointers_to(
    index: ChunkIndex,
    memory: MemoryMap,
    start: UInt64Array,
    end: UInt64Array,
    address_mask: int,
    wanted: UInt64Array,
) -> PointersFound:
    """Every aligned word of ranges of memory that leads to a chunk that is ``wanted`` (uint64, one bit a chunk).

    In the order of the ranges. Raises ValueError for a range that ends above 2**63, or for a bitmap of another length.
    """
    pointers, words = _Pointers(index, address_mask), _Words(memory, index.geometry.word_bytes)
    _check_ranges(start, end)
    check_bits(index.chunk_count, wanted)
    found: list[tuple[int, int, int]] = []
    for low, high in zip(start.tolist(), end.tolist(), strict=True):
        for address, word in words.within(low, high):
            target = pointers.target_of(word)
            if target is not None and is_set(wanted, target & CHUNK_MASK):
                found.append((address, word & pointers.mask, target))
    holders, values, targets = zip(*found, strict=True) if found else ((), (), ())
    return PointersFound(np.array(holders, np.uint64), np.array(values, np.uint64), np.array(targets, np.uint32))


def find_encoded(
    index: ChunkIndex, memory: MemoryMap, start: UInt64Array, end: UInt64Array, addresses: UInt64Array
) -> EncodedPointers:
    """Where ranges of memory hold some addresses (ascending, none of them 0) in another form than as an aligned word.

    In the order of the ranges and of the aligned words that the forms begin in. Raises ValueError for
    a range that ends above 2**63, or for addresses that do not ascend.
    """
    word_bytes = index.geometry.word_bytes
    _check_ranges(start, end)
    if len(addresses) and (not addresses[0] or np.any(addresses[1:] <= addresses[:-1])):
        raise ValueError("the addresses do not ascend")
    rows = {address: row for row, address in enumerate(addresses.tolist())}
    view = memory.file.tobytes()
    found: list[tuple[int, int, int]] = []
    for low, high in zip(start.tolist(), end.tolist(), strict=True):
        runs = zip(memory.run_start.tolist(), memory.run_end.tolist(), memory.run_file_offset.tolist(), strict=True)
        for run_start, run_end, offset in runs:
            first = -(-max(low, run_start) // word_bytes) * word_bytes
            last = min(high, run_end, run_start + max(len(view) - offset, 0))
            count = (last - first) // word_bytes
            if count > 0:
                at = offset + first - run_start
                part = view[at : at + count * word_bytes]
                found += [(first + place, rows[value], form) for place, value, form in _decoded(part, word_bytes, rows)]
    holders, numbers, forms = zip(*found, strict=True) if found else ((), (), ())
    return EncodedPointers(np.array(holders, np.uint64), np.array(numbers, np.uint32), np.array(forms, np.uint32))


def _decoded(part: bytes, word_bytes: int, wanted: dict[int, int]) -> list[tuple[int, int, int]]:
    """(offset, address, form) of every wanted address in some words that lie behind each other."""
    bits = 8 * word_bytes
    all_bits = (1 << bits) - 1
    found = []
    for at in range(0, len(part), word_bytes):
        word = int.from_bytes(part[at : at + word_bytes], "little")
        values = []
        if word_bytes == 8:
            if word >> 48:
                values.append((word & (1 << 48) - 1, PointerForm.HIGH_TAG))
            values.append((word >> TAG_SHIFT, PointerForm.LOW_TAG))
        values += [(word << shift & all_bits, PointerForm.SHIFTED) for shift in SHIFTS]
        values += [(word >> shift, PointerForm.SHIFTED) for shift in SHIFTS]
        values.append((int.from_bytes(part[at : at + word_bytes], "big"), PointerForm.BYTE_SWAPPED))
        for byte in range(1, word_bytes):
            if at + byte + word_bytes <= len(part):
                values.append((int.from_bytes(part[at + byte :][:word_bytes], "little"), PointerForm.UNALIGNED))
        if word_bytes == 8:
            values += _of_halves(part, at)
        found += [(at, value, int(form)) for value, form in values if value in wanted]
    return found


def _of_halves(part: bytes, at: int) -> list[tuple[int, PointerForm]]:
    """What the two 32-bit parts of a word stand for: compressed pointers, or low halves with a high one near."""
    values = []
    for place in (at, at + 4):
        (half,) = struct.unpack_from("<I", part, place)
        if place != at or any(part[at + 4 : at + 8]):
            values.append((half, PointerForm.COMPRESSED))
        values += [(half << shift, PointerForm.COMPRESSED) for shift in SHIFTS]
        for apart in range(-HALVES_APART, HALVES_APART + 1):
            other = place + 4 * apart
            # An aligned word with its halves in order is a pointer as it is, one across two words an unaligned one.
            if apart not in (0, 1) and 0 <= other <= len(part) - 4:
                (high,) = struct.unpack_from("<I", part, other)
                if high and half:
                    values.append((high << 32 | half, PointerForm.HALVES))
    return values


def _check_ranges(start: UInt64Array, end: UInt64Array) -> None:
    if len(start) != len(end):
        raise ValueError("the columns of ranges differ in length")
    if any(high > ADDRESS_LIMIT for high in end.tolist()):
        raise ValueError(f"a range ends at {int(end.max()):#x}, where no process has memory")
