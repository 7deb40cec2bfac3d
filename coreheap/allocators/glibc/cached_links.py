"""Links of tcache lists that lead wrong: where the list goes on behind them, and which block a bad head was taken from.

Knows: how a link is stored in a cached block, and what malloc leaves of it in a block that it gives out. Does not know:
lists that are sound (``overlay``), or who wrote (``forensics``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coreheap.allocators.glibc.gathering import UInt64s, words_at
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import SAFE_LINKING_SHIFT, TcacheKey
from coreheap.corefile import AddressSpace
from coreheap.errors import MemoryFault
from coreheap.kernels import NO_WORD, ChunkIndex, ChunkState, chunk_extents

MOST_FOLLOWED = 4096
"""Blocks behind a node that is no chunk's start; more than any tunable lets a list have by default, fewer than a loop costs."""
MOST_SEARCHES = 8
"""Bad heads for which all blocks in use are looked through; with more of them the structure itself was written over."""
MOST_POPPED = 8
"""Blocks that one head may have come from; with more of them their word tells nothing."""
ROWS_AT_ONCE = 1 << 20
KEY_SAMPLES = 3
"""Cached blocks that must agree on a key that nothing else tells."""
KEY_STEPS = 16
MIGHT_HAVE_BEEN_CACHED = (ChunkState.IN_USE, ChunkState.DAMAGED)


@dataclass(frozen=True, slots=True)
class Popped:
    """A block that malloc gave out and whose link became the list's head: its header, and the link's place and word."""

    header: int
    place: int
    word: int


class CachedLinks:
    """Reads links of tcache lists in one process."""

    def __init__(self, memory: AddressSpace, index: ChunkIndex, layout: Layout) -> None:
        self.memory = memory
        self.index = index
        self.word = layout.geometry.word_bytes
        self.header_bytes = layout.geometry.header_bytes
        self.alignment = layout.geometry.alignment
        self.safe_linking = layout.generation.safe_linking
        self._searches = 0
        self.leaves_a_key = layout.generation.tcache_key is not TcacheKey.NONE

    def blocks_behind(self, node: int, sizes: tuple[int, int], key: int, count: int) -> list[int]:
        """Chunks that glibc would come to behind a node of a list, which must be exactly ``count``; else none.

        Each must be a chunk that the walk took for one in use, have a size of the list, and the key where it is known. Where
        neither a key nor safe linking protects the links, old content may look like a list, and nothing is followed.
        """
        if not 0 < count <= MOST_FOLLOWED or (key == NO_WORD and not self.safe_linking):
            return []
        chunks: dict[int, None] = {}
        for _ in range(count):
            pointer = self._next(node)
            chunk = self._chunk_of(pointer, sizes, key) if pointer else -1
            if pointer is None or chunk < 0 or chunk in chunks:
                return []
            chunks[chunk] = None
            node = pointer
        return list(chunks) if self._next(node) == 0 else []

    def popped_blocks(self, head: int, sizes: tuple[int, int], of_tcache: bool) -> list[Popped]:
        """Blocks given out whose first word is the link that a list's head came from, at most MOST_POPPED.

        malloc stores the link of the block that it takes as the new head; tcache_get also clears the key in it. Where the link
        led to memory that is no list's, and malloc took that as well, the head is what safe linking makes of the 0 there: the
        number of its page.
        """
        self._searches += 1
        if self._searches > MOST_SEARCHES:
            return []
        page = head << SAFE_LINKING_SHIFT
        is_page = self.safe_linking and page < 1 << 8 * self.word and self.memory.region_index(page) is not None
        found: list[Popped] = []
        for first in range(0, len(self.index.state), ROWS_AT_ONCE):
            states = self.index.state[first : first + ROWS_AT_ONCE]
            chunks = first + np.flatnonzero(np.isin(states, MIGHT_HAVE_BEEN_CACHED)).astype(np.int64)
            chunks = chunks[chunks < self.index.region_chunks]
            headers, byte_counts = chunk_extents(self.index, chunks)
            fits = (byte_counts >= sizes[0]) & (byte_counts <= sizes[1])
            fits |= self.index.state[chunks] == ChunkState.DAMAGED
            headers = headers[fits]
            payloads = headers + np.uint64(self.header_bytes)
            links, saved = words_at(self.memory, payloads)
            keys, keys_saved = words_at(self.memory, payloads + np.uint64(self.word))
            following = links ^ (payloads >> np.uint64(SAFE_LINKING_SHIFT)) if self.safe_linking else links
            fits = following == np.uint64(head)
            if is_page:
                fits |= following >> np.uint64(SAFE_LINKING_SHIFT) == np.uint64(head)
            fits &= saved
            if of_tcache and self.leaves_a_key:
                fits &= keys_saved & (keys == 0)
            found += [
                Popped(header, header + self.header_bytes, link)
                for header, link in zip(
                    headers[fits][:MOST_POPPED].tolist(), links[fits][:MOST_POPPED].tolist(), strict=True
                )
            ]
            if len(found) >= MOST_POPPED:
                break
        return found[:MOST_POPPED]

    def _next(self, node: int) -> int | None:
        try:
            stored = self.memory.read_word(node)
        except MemoryFault:
            return None
        return stored ^ (node >> SAFE_LINKING_SHIFT) if self.safe_linking else stored

    def _chunk_of(self, pointer: int, sizes: tuple[int, int], key: int) -> int:
        header = pointer - self.header_bytes
        chunk = self.index.chunk_starting_at(header) if header >= 0 else -1
        if chunk < 0 or self.index.state[chunk] != ChunkState.IN_USE:
            return -1
        if not sizes[0] <= self.index.bytes_of_chunk_at(header) <= sizes[1]:
            return -1
        try:
            is_cached = key == NO_WORD or self.memory.read_word(pointer + self.word) == key
        except MemoryFault:
            return -1
        return chunk if is_cached else -1


def common_key(memory: AddressSpace, entries: UInt64s) -> int:
    """What most blocks behind heads of tcache lists hold in their second word (2.34+); 0 where too few agree."""
    words: list[UInt64s] = [np.zeros(0, np.uint64)]
    nodes = entries
    for _ in range(KEY_STEPS):
        nodes = nodes[nodes != 0]
        links, saved = words_at(memory, nodes)
        key, key_saved = words_at(memory, nodes + np.uint64(memory.word_bytes))
        words.append(key[saved & key_saved])
        nodes = np.unique(links[saved] ^ (nodes[saved] >> np.uint64(SAFE_LINKING_SHIFT)))
    values, counts = np.unique(np.concatenate(words), return_counts=True)
    if len(values):
        most = int(counts.argmax())
        if counts[most] >= KEY_SAMPLES and 2 * counts[most] > counts.sum() and values[most]:
            return int(values[most])
    return 0
