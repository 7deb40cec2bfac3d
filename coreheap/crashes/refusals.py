"""Which pointers glibc refuses to free, and with which message: each of its tests as a question about an address.

Knows: what the tests of free, realloc, munmap_chunk and mremap_chunk read (malloc.c, 2.12-2.44). Does not know: which pointer was
given, or where pointers are looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from coreheap.corefile import Core
from coreheap.errors import MemoryFault
from coreheap.heap import Arena, ChunkState, HeapSnapshot

PREV_INUSE, IS_MMAPPED, NON_MAIN_ARENA, FLAGS = 1, 2, 4, 7
ARENA_STRUCTURE_BYTES: Final = 2200
"""The largest malloc_state of any release (2.27-2.42, 64-bit); the list heads are in its first half."""
CACHE_STRUCTURE_BYTES: Final = 768
LIST_LIMIT: Final = 1 << 10
"""Blocks of one cached list that are followed; 7 or 16 are usual."""
SAFE_LINKING_SHIFT: Final = 12


@dataclass(frozen=True, slots=True)
class Refusal:
    """One message: its test, the function that says it, whether only few addresses of a process can meet it, and what it says of
    the one that does."""

    text: str
    test: Callable[[Refusals, int], bool]
    is_selective: bool
    statement: str
    function: str = "free"


class Refusals:
    """Asks glibc's tests of addresses of one process, as free and realloc are given them."""

    def __init__(self, core: Core, heap: HeapSnapshot, thread: int) -> None:
        self._memory = core.memory
        self._heap = heap
        self._index = heap.chunks.index
        self._geometry = heap.chunks.index.geometry
        self._word = core.word_bytes
        self._page = core.page_bytes
        self._limit = 1 << 8 * core.word_bytes
        self.thread = thread
        self._cached: frozenset[int] | None = None

    # What an address is

    def state_at(self, address: int) -> ChunkState | None:
        """The state of the chunk whose block begins at an address; None where none does."""
        chunk = self._index.chunk_starting_at(address - 2 * self._word)
        return ChunkState(int(self._index.state[chunk])) if chunk >= 0 else None

    def is_unwalked(self, address: int) -> bool:
        """Whether an address lies in an arena's memory that no chunk could be assigned to."""
        return any(address in part.range for arena in self._heap.arenas for part in arena.unattributed)

    def cached_blocks(self) -> frozenset[int]:
        """The blocks in the crashed thread's tcache, as far as its lists can be followed."""
        if self._cached is None:
            caches = [cache.address for cache in self._heap.thread_caches if cache.thread == self.thread]
            self._cached = frozenset(
                block for cache in caches for head in self._words(cache) for block in self._list(head)
            )
        return self._cached

    def fastbin_heads(self) -> frozenset[int]:
        """Blocks at the head of any arena's fastbins."""
        heads = set[int]()
        for arena in self._heap.arenas:
            # The structure has the addresses of headers; chunks of other states that it has are of its bins.
            blocks = (header + 2 * self._word for header in self._words(arena.address or 0, ARENA_STRUCTURE_BYTES))
            heads.update(block for block in blocks if self.state_at(block) is ChunkState.FASTBIN)
        return frozenset(heads)

    def all_that_meet(self, test: Callable[[Refusals, int], bool]) -> frozenset[int] | None:
        """All blocks that meet a test, where malloc's lists tell them; else None."""
        if test is Refusals.is_cached:
            return self.cached_blocks() or None
        if test is Refusals.is_fastbin_head:
            return self.fastbin_heads() or None
        if test is Refusals.is_top:
            tops = (arena.top_address for arena in self._heap.arenas if arena.top_address)
            return frozenset(top + 2 * self._word for top in tops) or None
        return None

    def _words(self, address: int, byte_count: int = CACHE_STRUCTURE_BYTES) -> list[int]:
        for length in (byte_count, byte_count // 2):
            try:
                words: list[int] = self._memory.read_words(address, length // self._word).tolist()
            except MemoryFault:
                continue
            return words
        return []

    def _list(self, head: int) -> list[int]:
        """A tcache's list from its head; empty where no cached block is there. Links are mangled from 2.32 on."""
        found: list[int] = []
        while self.state_at(head) is ChunkState.TCACHE and head not in found and len(found) < LIST_LIMIT:
            found.append(head)
            link = self._word_at(head)
            if link is None:
                break
            plain = self.state_at(link) is ChunkState.TCACHE
            head = link if plain else link ^ head >> SAFE_LINKING_SHIFT
        return found

    def _word_at(self, address: int) -> int | None:
        try:
            return self._memory.read_word(address)
        except MemoryFault:
            return None

    def _size_word(self, address: int) -> int | None:
        return self._word_at(address - self._word)

    def _next(self, address: int) -> tuple[int, int] | None:
        """The header behind a chunk, and its size word, where the chunk is one that free goes on with."""
        word = self._size_word(address)
        if word is None or word & IS_MMAPPED or address % self._geometry.alignment:
            return None
        size = word & ~FLAGS
        behind = address - 2 * self._word + size
        found = self._word_at(behind + self._word)
        return (behind, found) if found is not None and size >= self._geometry.minimum_chunk_bytes else None

    def _arena_at(self, address: int) -> Arena | None:
        """The arena that free believes a chunk is of: by its NON_MAIN_ARENA bit, and the place."""
        word = self._size_word(address) or 0
        if not word & NON_MAIN_ARENA:
            return self._heap.main_arena
        for arena in self._heap.arenas:
            if any(heap.address <= address < heap.address + heap.reserved_bytes for heap in arena.sub_heaps):
                return arena
        return None

    # The tests

    def is_invalid_pointer(self, address: int) -> bool:
        """p > -size or misaligned: "free(): invalid pointer", "realloc(): invalid pointer"."""
        if address % self._geometry.alignment:
            return True
        word = self._size_word(address)
        if word is None or word & IS_MMAPPED:
            return False
        size = word & ~FLAGS
        return address - 2 * self._word > (-size) % self._limit

    def is_invalid_size(self, address: int) -> bool:
        """Less than the smallest chunk, or no multiple of the alignment."""
        word = self._size_word(address)
        if word is None or word & IS_MMAPPED or address % self._geometry.alignment:
            return False
        size = word & ~FLAGS
        return size < self._geometry.minimum_chunk_bytes or bool(size % self._geometry.alignment)

    def is_cached(self, address: int) -> bool:
        """In this thread's tcache, where glibc looks for it; in any where it is not known which is this thread's."""
        if all(cache.thread != self.thread for cache in self._heap.thread_caches):
            return self.state_at(address) is ChunkState.TCACHE
        return address in self.cached_blocks()

    def is_fastbin_head(self, address: int) -> bool:
        """The last chunk that was put into its fastbin."""
        return self.state_at(address) is ChunkState.FASTBIN and address in self.fastbin_heads()

    def is_top(self, address: int) -> bool:
        """Where an arena's top begins."""
        return any(arena.top_address == address - 2 * self._word for arena in self._heap.arenas)

    def is_out(self, address: int) -> bool:
        """It would end at or behind the main arena's end, which is contiguous."""
        main, word = self._heap.main_arena, self._size_word(address)
        if main is None or main.top_address is None or not main.is_contiguous or word is None:
            return False
        is_of_main = not word & (IS_MMAPPED | NON_MAIN_ARENA) and not address % self._geometry.alignment
        end = main.top_address + (main.top_bytes or 0)
        return is_of_main and address - 2 * self._word + (word & ~FLAGS) >= end

    def is_not_in_use(self, address: int) -> bool:
        """The header behind says that it is free."""
        behind = self._next(address)
        if behind is None or behind[1] & PREV_INUSE:
            return False
        return self.state_at(address) not in (ChunkState.TCACHE, ChunkState.FASTBIN)

    def has_invalid_next_size(self, address: int) -> bool:
        """The header behind has a size that no chunk of the arena can have."""
        behind, arena = self._next(address), self._arena_at(address)
        if behind is None or arena is None or arena.system_mem is None:
            return False
        # With its flags: a fencepost's size word is one more than a header's bytes.
        return behind[1] <= 2 * self._word or behind[1] & ~FLAGS >= arena.system_mem

    def has_invalid_old_size(self, address: int) -> bool:
        """Its own size is one that no chunk of the arena can have."""
        word, arena = self._size_word(address), self._arena_at(address)
        if word is None or word & IS_MMAPPED or arena is None or arena.system_mem is None:
            return False
        is_wrong = word <= 2 * self._word or word & ~FLAGS >= arena.system_mem
        return is_wrong and not address % self._geometry.alignment

    def is_no_mapping(self, address: int) -> bool:
        """Its header says that it has a mapping of its own, but not one of whole pages, or it is at no place that malloc uses."""
        word, before = self._size_word(address), self._word_at(address - 2 * self._word)
        if word is None or before is None or not word & IS_MMAPPED:
            return False
        before &= ~1  # From 2.43 on a flag.
        # From 2.43 on the size leaves the header out (heap.ChunkTable.mmapped_overhead_bytes).
        beside = 2 * self._word if self._heap.chunks.mmapped_overhead_bytes == self._word else 0
        block, total = address - 2 * self._word - before, before + (word & ~FLAGS) + beside
        in_page = address % self._page
        return bool((block | total) % self._page or in_page & in_page - 1)


_CACHED = "the block is in the tcache of the thread that freed it again"
_HEAD = "the block is the last one that was put into its fastbin"
_NO_BLOCK = "no block of malloc can begin there, or what lies before it is no size"
_REFUSALS: Final = (
    Refusal("free(): double free detected in tcache 2", Refusals.is_cached, True, _CACHED),
    Refusal("double free or corruption (fasttop)", Refusals.is_fastbin_head, True, _HEAD),
    Refusal("double free or corruption (top)", Refusals.is_top, True, "an arena's top, its free end, begins there"),
    Refusal(
        "double free or corruption (out)",
        Refusals.is_out,
        False,
        "the size before it leads behind the end of the main arena, whose it would be",
    ),
    Refusal(
        "double free or corruption (!prev)",
        Refusals.is_not_in_use,
        True,
        "the header behind says that it is free already",
    ),
    Refusal("free(): invalid pointer", Refusals.is_invalid_pointer, False, _NO_BLOCK),
    Refusal("free(): invalid size", Refusals.is_invalid_size, False, "what lies before it is no size of a chunk"),
    Refusal(
        "free(): invalid next size (fast)",
        Refusals.has_invalid_next_size,
        False,
        "what lies before it is a size, and leads to what is none",
    ),
    Refusal(
        "free(): invalid next size (normal)",
        Refusals.has_invalid_next_size,
        False,
        "what lies before it is a size, and leads to what is none",
    ),
    Refusal(
        "munmap_chunk(): invalid pointer",
        Refusals.is_no_mapping,
        False,
        "what lies before it says that it has a mapping of its own, which it has not",
    ),
    Refusal(
        "mremap_chunk(): invalid pointer",
        Refusals.is_no_mapping,
        False,
        "what lies before it says that it has a mapping of its own, which it has not",
        "realloc",
    ),
    Refusal("realloc(): invalid pointer", Refusals.is_invalid_pointer, False, _NO_BLOCK, "realloc"),
    Refusal(
        "realloc(): invalid old size",
        Refusals.has_invalid_old_size,
        False,
        "what lies before it is no size of a chunk",
        "realloc",
    ),
    Refusal(
        "realloc(): invalid next size",
        Refusals.has_invalid_next_size,
        False,
        "what lies before it is a size, and leads to what is none",
        "realloc",
    ),
)
REFUSALS: Final[Mapping[str, Refusal]] = {refusal.text: refusal for refusal in _REFUSALS}
"""By the message's text (``abort_message.plain_message``)."""
