"""Which test of free fails first on a chunk as it is in the core: the order of glibc's tests in every release, as data.

Knows: what free looks at, in which order, from 2.12 to 2.44 (malloc.c: __libc_free, _int_free, munmap_chunk), and the texts. Does not
know: how a header came to be wrong. A tcache that has room takes a block without a look at its neighbours: here it is full.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.messages import FIRST, LAST, Said
from coreheap.allocators.glibc.structures import FLAGS, IS_MMAPPED, NON_MAIN_ARENA, PREV_INUSE
from coreheap.corefile import AddressSpace
from coreheap.errors import MemoryFault
from coreheap.kernels import ChunkGeometry

WORDS_OF_THE_LARGEST_FAST_CHUNK = 16
"""global_max_fast as every process begins with it: 128 bytes, with 4-byte words 64 (malloc.c, DEFAULT_MXFAST)."""


@dataclass(frozen=True, slots=True)
class Freed:
    """A chunk that free is asked to take, with what free reads around it.

    ``arena`` is the one that free would find by the chunk's own flag; None where that flag leads to no arena.
    """

    memory: AddressSpace
    geometry: ChunkGeometry
    page_bytes: int
    header: int
    size_word: int
    arena: ArenaFacts | None

    @property
    def size(self) -> int:
        return self.size_word & ~FLAGS

    @property
    def next_header(self) -> int:
        return (self.header + self.size) % (1 << 8 * self.geometry.word_bytes)

    def word(self, address: int) -> int | None:
        """A word of memory; None where reading it ends the process, or where it was not saved."""
        try:
            return int(self.memory.read_word(address))
        except MemoryFault:
            return None

    @property
    def next_size_word(self) -> int | None:
        return self.word(self.next_header + self.geometry.word_bytes)


def _is_mapped_and_odd(freed: Freed) -> bool:
    prev_size = freed.word(freed.header) or 0
    places = (freed.header - prev_size) | (prev_size + freed.size)
    return bool(freed.size_word & IS_MMAPPED) and places % freed.page_bytes != 0


def _is_mapped(freed: Freed) -> bool:
    return bool(freed.size_word & IS_MMAPPED)


def _has_no_arena(freed: Freed) -> bool:
    return freed.arena is None or freed.arena.state is None


def _wraps(freed: Freed) -> bool:
    # As C has it: p > -size, which is true of every chunk of no size.
    return freed.header > -freed.size % (1 << 8 * freed.geometry.word_bytes)


def _is_small(freed: Freed) -> bool:
    return freed.size < freed.geometry.minimum_chunk_bytes


def _is_small_or_uneven(freed: Freed) -> bool:
    return _is_small(freed) or freed.size % freed.geometry.alignment != 0


def _is_small_or_wraps(freed: Freed) -> bool:
    return _is_small(freed) or freed.header + freed.size > 1 << 8 * freed.geometry.word_bytes


def _is_fast(freed: Freed) -> bool:
    return freed.size <= WORDS_OF_THE_LARGEST_FAST_CHUNK * freed.geometry.word_bytes


def _next_is_bad(freed: Freed) -> bool:
    word, state = freed.next_size_word, freed.arena.state if freed.arena is not None else None
    if word is None or state is None:
        return False
    # The lower limit is asked of the size with its flags (chunksize_nomask).
    return bool(word <= 2 * freed.geometry.word_bytes or word & ~FLAGS >= state.system_mem)


def _is_fast_with_bad_next(freed: Freed) -> bool:
    return _is_fast(freed) and _next_is_bad(freed)


def _is_top(freed: Freed) -> bool:
    state = freed.arena.state if freed.arena is not None else None
    return state is not None and state.top == freed.header


def _is_out(freed: Freed) -> bool:
    arena = freed.arena
    if arena is None or arena.state is None or not arena.state.is_contiguous:
        return False
    top_word = freed.word(arena.state.top + freed.geometry.word_bytes)
    return top_word is not None and freed.next_header >= arena.state.top + (top_word & ~FLAGS)


def _next_is_nowhere(freed: Freed) -> bool:
    return freed.next_size_word is None


def _next_says_free(freed: Freed) -> bool:
    word = freed.next_size_word
    return word is not None and not word & PREV_INUSE


def _before_is_nowhere(freed: Freed) -> bool:
    return not freed.size_word & PREV_INUSE and _size_before(freed) is None


def _before_has_another_size(freed: Freed) -> bool:
    return not freed.size_word & PREV_INUSE and _size_before(freed) != freed.word(freed.header)


def _size_before(freed: Freed) -> int | None:
    prev_size = freed.word(freed.header)
    if prev_size is None:
        return None
    before = (freed.header - prev_size) % (1 << 8 * freed.geometry.word_bytes)
    word = freed.word(before + freed.geometry.word_bytes)
    return None if word is None else word & ~FLAGS


@dataclass(frozen=True, slots=True)
class Check:
    """One look of free: what makes it fail, and what glibc says then; None where free faults or goes another way."""

    fails: Callable[[Freed], bool]
    text: str | None
    first: str = FIRST
    last: str = LAST


CHECKS: tuple[Check, ...] = (
    Check(_is_mapped_and_odd, "munmap_chunk(): invalid pointer", last="2.41"),
    Check(_is_mapped, None, last="2.41"),
    Check(_has_no_arena, None),
    Check(_wraps, "free(): invalid pointer", last="2.41"),
    Check(_is_small_or_uneven, "free(): invalid size", last="2.41"),
    Check(_is_small_or_wraps, "free(): invalid size", first="2.42"),
    Check(_is_fast_with_bad_next, "free(): invalid next size (fast)", last="2.42"),
    Check(_is_fast, None, last="2.42"),
    Check(_is_mapped_and_odd, "munmap_chunk(): invalid pointer", first="2.42"),
    Check(_is_mapped, None, first="2.42"),
    Check(_is_top, "double free or corruption (top)"),
    Check(_is_out, "double free or corruption (out)"),
    Check(_next_is_nowhere, None),
    Check(_next_says_free, "double free or corruption (!prev)"),
    Check(_next_is_bad, "free(): invalid next size (normal)"),
    Check(_before_is_nowhere, None),
    Check(_before_has_another_size, "corrupted size vs. prev_size while consolidating", first="2.29"),
    Check(_before_has_another_size, "corrupted size vs. prev_size", first="2.26", last="2.28"),
)
"""In the order in which free asks."""


def first_failing(freed: Freed, release: str) -> str | None:
    """What glibc of a release says when it is asked to free a chunk; None where it says nothing."""
    for check in CHECKS:
        if Said(check.text or "", check.first, check.last).is_said_in(release) and check.fails(freed):
            return check.text
    return None


def arena_of(size_word: int, arena: ArenaFacts, main: ArenaFacts | None) -> ArenaFacts | None:
    """The arena that free finds by a chunk's flag: main_arena without it, else what heap_info says (arena_for_chunk)."""
    if not size_word & NON_MAIN_ARENA:
        return main
    return None if arena.is_main else arena


REALLOC = (Said("realloc(): invalid next size"), Said("realloc(): invalid old size"))
"""What realloc says of the block before a chunk whose size is wrong, and of itself (all releases)."""
