"""CPython's own arenas for small objects, which it maps beside malloc.

Knows: struct arena_object and struct pool_header of Objects/obmalloc.c (alike in CPython 3.3 to 3.13, 64-bit), and that a pool's
header tells the pool's size: its last offset and its block size add up to it. Does not know: objects, nor which pools are free.

The array of arena_object is found from the interpreter's data (a static pointer, or one in _PyRuntime or in an interpreter state
that is allocated), so candidates are all pointers there; a row counts when what it says of its arena agrees with itself.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory, Bools, UInt64s
from coreheap.corefile import Module
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import KIB, format_bytes

ROW_WORDS: Final = 6
"""address, pool_address, nfreepools and ntotalpools, freepools, nextarena, prevarena."""
POOL_BYTES: Final = (4 * KIB, 16 * KIB)
"""Up to 3.9, and from 3.10 on where arenas are found by a radix tree (WITH_PYMALLOC_RADIX_TREE)."""
POOLS_OF_ARENA: Final = 64
"""256 KiB of 4 KiB, 1 MiB of 16 KiB; one less where the mapping is not aligned to a pool."""
POOL_HEADER_WORDS: Final = 6
"""A count, freeblock, nextpool, prevpool, arenaindex and szidx, nextoffset and maxnextoffset."""
BLOCK_ALIGNMENTS: Final = (16, 8)
"""Of 64-bit builds from 3.7.4 on, and before (bpo-27987)."""
LARGEST_BLOCK: Final = 512
ROW_BYTES: Final = 8 * ROW_WORDS
ROWS_LIMIT: Final = 1 << 20
"""Of all arrays together: arenas of 256 GiB and more."""
LEVELS: Final = 2
"""How many pointers may lie between the interpreter's data and the array."""
POINTERS_LIMIT: Final = 1 << 16
WORDS_OF_STATE: Final = 1 << 9
"""How far into a structure that data points to a pointer to the array is looked for."""


def pymalloc_ranges(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
    """The arenas; empty where no array of them is recognised."""
    if anonymous.word_bytes != 8:
        return ()
    _, pointers = anonymous.module_words(module)
    for level in range(LEVELS):
        pointers = np.unique(pointers[anonymous.holds(pointers, pointers + np.uint64(1))])[:POINTERS_LIMIT]
        array = _array(anonymous, pointers)
        if array is not None:
            return _arenas(anonymous, *array)
        if level + 1 < LEVELS:
            rows = [
                words for start in pointers.tolist() for _, words in anonymous.words(start, start + 8 * WORDS_OF_STATE)
            ]
            pointers = np.concatenate(rows) if rows else pointers[:0]
    return ()


def _array(anonymous: AnonymousMemory, pointers: UInt64s) -> tuple[int, UInt64s] | None:
    """Where the array is, and its rows; of several candidates the one with the most arenas in use."""
    rows, saved = anonymous.rows_at(pointers, ROW_WORDS)
    candidates = pointers[saved & (_is_arena(anonymous, rows) | _is_unused(rows))]
    best: tuple[int, UInt64s] | None = None
    most, left = 0, ROWS_LIMIT
    # What each of the phases that rows may have has been walked to: the same rows are not walked from their middle again.
    walked_to = dict.fromkeys(range(0, ROW_BYTES, 8), 0)
    for start in candidates.tolist():
        phase = start % ROW_BYTES
        if start < walked_to.get(phase, 0):
            continue
        array = _rows_from(anonymous, start, left)
        left -= len(array)
        walked_to[phase] = start + len(array) * ROW_BYTES
        is_arena = _is_arena(anonymous, array)
        used = int(is_arena.sum())
        if used > most and used == len(np.unique(array[is_arena, 0])):
            best, most = (start, array), used
        if left <= 0:
            break
    return best


def _rows_from(anonymous: AnonymousMemory, start: int, most: int) -> UInt64s:
    """The rows from an address up to the first that is no arena_object.

    Unused ones are chained: one of them has no next one, and zeros are no array.
    """
    limit = 16
    while True:
        addresses = np.uint64(start) + np.arange(limit, dtype=np.uint64) * np.uint64(ROW_BYTES)
        rows, saved = anonymous.rows_at(addresses, ROW_WORDS)
        unused = _is_unused(rows)
        is_last = unused & (rows[:, 4] == 0)
        good = saved & (_is_arena(anonymous, rows) | unused) & (np.cumsum(is_last) <= 1)
        count = limit if good.all() else int(good.argmin())
        if count < limit or limit >= most:
            return rows[:count]
        limit = min(limit * 4, most)


def _is_arena(anonymous: AnonymousMemory, rows: UInt64s) -> Bools:
    """Whether a row describes an arena of one of the known sizes that agrees with itself."""
    address, pool_address, counts = rows[:, 0], rows[:, 1], rows[:, 2]
    free, total = counts & np.uint64(0xFFFFFFFF), counts >> np.uint64(32)
    good: Bools = (total <= POOLS_OF_ARENA) & (total >= POOLS_OF_ARENA - 1) & (free <= total)
    good &= (address % np.uint64(4096) == 0) & (pool_address >= address)
    largest = np.uint64(POOL_BYTES[-1] * POOLS_OF_ARENA)
    good &= pool_address - address <= largest
    good &= anonymous.holds(address, address + np.uint64(POOL_BYTES[0] * POOLS_OF_ARENA))
    return good


def _is_unused(rows: UInt64s) -> Bools:
    """An arena_object without an arena: address 0, and a next one or none."""
    unused: Bools = (rows[:, 0] == 0) & (rows[:, 4] % np.uint64(8) == 0)
    return unused


def _arenas(anonymous: AnonymousMemory, start: int, rows: UInt64s) -> tuple[Ranges, ...]:
    address = rows[_is_arena(anonymous, rows), 0]
    pool_bytes, agreeing = _pool_bytes(anonymous, address)
    if not pool_bytes:
        return ()
    size = np.uint64(pool_bytes * POOLS_OF_ARENA)
    address = address[anonymous.holds(address, address + size)]
    facts = (
        Evidence(
            f"an array of {len(rows)} arena_object describes {len(address)} arenas",
            "memory of malloc",
            Strength.SOLID,
            start,
        ),
        Evidence(
            f"headers of {agreeing} pools say that a pool has {format_bytes(pool_bytes)}", "the arenas", Strength.SOLID
        ),
    )
    return (Ranges(*anonymous.union(address, address + size), facts),)


def _pool_bytes(anonymous: AnonymousMemory, arena: UInt64s) -> tuple[int, int]:
    """The size of a pool that the most pool headers tell, and how many do; 0 where none does."""
    votes: dict[int, int] = {}
    for size in POOL_BYTES:
        first = arena + (np.uint64(0) - arena) % np.uint64(size)
        pool = (first[:, None] + np.arange(POOLS_OF_ARENA - 1, dtype=np.uint64) * np.uint64(size)).reshape(-1)
        rows, saved = anonymous.rows_at(pool, POOL_HEADER_WORDS)
        last = rows[:, 5] >> np.uint64(32)
        for alignment in BLOCK_ALIGNMENTS:
            block = ((rows[:, 4] >> np.uint64(32)) + np.uint64(1)) * np.uint64(alignment)
            agreeing = int((saved & (block <= LARGEST_BLOCK) & (last + block == np.uint64(size))).sum())
            votes[size] = max(votes.get(size, 0), agreeing)
    size = max(votes, key=lambda each: votes[each])
    return (size, votes[size]) if votes[size] else (0, 0)
