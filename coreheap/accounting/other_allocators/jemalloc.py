"""jemalloc's memory: the blocks of its base allocator, and the extents that structures in them describe.

Knows: jemalloc 5 (base_block_t in src/base.c, extent_t of 5.0-5.2 and edata_t from 5.3 on begin alike: bits, address, size).
Does not know: older ones, whose chunks begin otherwise: of those nothing is found.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.corefile import Module
from coreheap.corefile.regions import without_overlap
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import MIB

BLOCK_ALIGNMENT: Final = 2 * MIB
"""HUGEPAGE: blocks begin at multiples of it and have a multiple of it."""
ARENA_MASK: Final = 0xFFF
"""The arena's number is in the lowest 12 bits; base blocks have the highest (1 << MALLOCX_ARENA_BITS) - 1."""
EXTENT_STEP_BYTES: Final = 64
EXTENT_PAGE_BYTES: Final = 4096
"""Below it, a size word keeps a serial number."""
CACHE_LINE_BYTES: Final = 64
BITS_END: Final = 1 << 50
"""The bits of an extent end with the count of free regions and the bin's shard, well below."""
BLOCK_LIMIT: Final = 1 << 16
BLOCKS_BYTES_LIMIT: Final = 1 << 31
"""So many bytes of blocks are read: they describe some 100 GB and more."""


def jemalloc_ranges(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
    """The base blocks and the extents; empty where no base block is recognised."""
    if anonymous.word_bytes != 8:
        return ()
    blocks = _base_blocks(anonymous)
    if not len(blocks):
        return ()
    starts, ends = [blocks[:, 0]], [blocks[:, 0] + blocks[:, 1]]
    count, left = 0, BLOCKS_BYTES_LIMIT
    per_row = EXTENT_STEP_BYTES // 8
    for block, size in blocks.tolist():
        for address, words in anonymous.words(block, block + min(size, left)):
            left -= words.nbytes
            skipped = -address % EXTENT_STEP_BYTES // 8
            rows = words[skipped : skipped + (len(words) - skipped) // per_row * per_row].reshape(-1, per_row)
            page = np.uint64(EXTENT_PAGE_BYTES - 1)
            # A large allocation begins at a random cache line of its first page (cache_oblivious).
            low = rows[:, 1] & ~page
            high = low + (rows[:, 2] & ~page)
            fits = (rows[:, 1] % np.uint64(CACHE_LINE_BYTES) == 0) & (rows[:, 0] < np.uint64(BITS_END))
            fits &= (rows[:, 0] != 0) & (rows[:, 0] & np.uint64(ARENA_MASK) != ARENA_MASK) & anonymous.holds(low, high)
            count += int(fits.sum())
            starts.append(low[fits])
            ends.append(high[fits])
    if not count:
        # Anything may look like a block; without an extent none of them is.
        return ()
    start, end = anonymous.union(np.concatenate(starts), np.concatenate(ends))
    fact = Evidence(
        f"{len(blocks)} blocks of its base allocator hold descriptions of {count} extents",
        "anonymous memory",
        Strength.PROOF,
        int(blocks[0, 0]),
    )
    return (Ranges(start, end, (fact,)),)


def _base_blocks(anonymous: AnonymousMemory) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
    """(address, bytes) of each block: size, next block, and an extent that ends where the block does.

    Blocks do not lie in each other: of those that would, the first one counts.
    """
    align = np.uint64(BLOCK_ALIGNMENT)
    address = anonymous.multiples_of(BLOCK_ALIGNMENT)
    rows, saved = anonymous.rows_at(address, 5)
    size, following, bits, begins, rest = rows.T
    fits = (
        saved
        & (size > 0)
        & (size % align == 0)
        & (following % align == 0)
        & (bits & np.uint64(ARENA_MASK) == ARENA_MASK)
    )
    fits &= (begins > address) & (begins + rest == address + size) & anonymous.holds(address, address + size)
    start, end = without_overlap(address[fits], address[fits] + size[fits])
    return np.stack([start, end - start], axis=1)[:BLOCK_LIMIT]
