"""How a row of ``layouts`` becomes offsets, sizes and bin numbers.

Knows: C's layout rules and glibc's formulas for bins. Does not know: which release a core has, nor any memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

import numpy as np
import numpy.typing as npt

PREV_INUSE, IS_MMAPPED, NON_MAIN_ARENA, FLAGS = 1, 2, 4, 7
"""The lowest bits of a chunk's size word, and all of them (glibc malloc.c, SIZE_BITS, 2.12-2.44)."""
WORDS_OF_A_FREE_CHUNK = 6
"""prev_size, size, fd, bk, fd_nextsize, bk_nextsize: what malloc writes into a chunk that is free."""

SAFE_LINKING_SHIFT = 12
"""A link in a tcache or fastbin is its target ^ (its own address >> 12) (glibc malloc.c, PROTECT_PTR, 2.32-2.44)."""


@dataclass(frozen=True, slots=True)
class LargeBinStep:
    """Sizes with ``size >> shift`` at most ``limit`` go to bin ``first + (size >> shift)``."""

    shift: int
    limit: int
    first: int


@dataclass(frozen=True, slots=True)
class BinRule:
    """Which bin a chunk size belongs to (glibc malloc.c, bin_index; unchanged 2.16-2.44)."""

    small_limit: int
    small_shift: int
    small_correction: int
    large: tuple[LargeBinStep, ...]
    last: int


@dataclass(frozen=True, slots=True)
class WordClass:
    """What follows from SIZE_SZ and MALLOC_ALIGNMENT alone. Chunk headers are at ``granule_phase`` mod ``alignment``."""

    name: str
    word_bytes: int
    alignment: int
    minimum_chunk_bytes: int
    granule_phase: int
    default_heap_max: int
    default_arena_test: int
    arenas_per_cpu: int
    bins: BinRule

    @property
    def header_bytes(self) -> int:
        return 2 * self.word_bytes

    @property
    def fastbin_count(self) -> int:
        """NFASTBINS: fastbin_index(request2size(80 * SIZE_SZ / 4)) + 1 (2.12-2.42)."""
        return self.fastbin_index(self.chunk_bytes_for(80 * self.word_bytes // 4)) + 1

    @property
    def fastbin_shift(self) -> int:
        return 4 if self.word_bytes == 8 else 3

    def fastbin_index(self, chunk_bytes: int) -> int:
        return (chunk_bytes >> self.fastbin_shift) - 2

    def fastbin_chunk_bytes(self, index: int) -> int:
        return (index + 2) << self.fastbin_shift

    def chunk_bytes_for(self, request: int) -> int:
        """request2size: the chunk that serves a request of so many bytes."""
        rounded = (request + self.word_bytes + self.alignment - 1) & ~(self.alignment - 1)
        return max(self.minimum_chunk_bytes, rounded)


class TcacheKey(Enum):
    """What malloc stores in the second word of a cached block."""

    NONE = "none"
    STRUCT_ADDRESS = "struct_address"
    RANDOM_WORD = "random_word"


@dataclass(frozen=True, slots=True)
class Generation:
    """Releases whose heaps look alike; the first four names are keys of the tables in ``layouts``.

    ``arena_limit``: ``per_cpu`` (arenas_per_cpu x CPUs once arena_test is passed), ``cpus`` (2.44: max(CPUs,
    arena_test)) or ``none``. ``i386_word_class``: MALLOC_ALIGNMENT on i386 was 8 up to 2.25. ``mmapped_trailer_words``: words of an mmapped chunk's mapping that its size leaves out.
    ``tcache_may_count_from_one_less``: some of its releases number large tcache bins in another way (``tcache_bin_sizes``).
    ``tcache_follows_counts``: malloc takes a list with a count for one with a block, and follows a null head (2.30-2.41).
    ``thp_modes_with_pagesize``: values of mp_.thp_mode with which thp_pagesize is set, and the others; 2.44 has numbered
    them anew.
    """

    name: str
    releases: tuple[str, ...]
    malloc_state: str
    malloc_par: str
    heap_info: str
    tcache: str | None = None
    tcache_key: TcacheKey = TcacheKey.NONE
    tcache_follows_counts: bool = False
    tcache_counts_free_slots: bool = False
    tcache_may_count_from_one_less: bool = False
    tcache_may_be_padded_twice: bool = False
    tcache_is_never_null: bool = False
    safe_linking: bool = False
    flags_hold_fastchunks: bool = False
    next_is_static: bool = False
    heap_max_follows_hugetlb: bool = False
    mmapped_trailer_words: int = 0
    mmapped_mem_drifts: bool = False
    arena_limit: str = "per_cpu"
    thp_modes_with_pagesize: tuple[int, ...] = ()
    thp_modes_without_pagesize: tuple[int, ...] = ()
    i386_word_class: str = "32a16"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a structure: where it is, how wide an element is, how many elements."""

    offset: int
    element_bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Structure:
    """A C structure for one word class; ``byte_count`` is its sizeof."""

    fields: dict[str, Field]
    byte_count: int
    word_bytes: int

    def offset(self, name: str) -> int:
        return self.fields[name].offset

    def __contains__(self, name: str) -> bool:
        return name in self.fields


@cache
def structure(row: str, word_class: WordClass) -> Structure:
    """Offsets of a row's fields by C's rules: each field at a multiple of its element size, sizeof of the widest."""
    widths = {"byte": 1, "half": 2, "int": 4, "word": word_class.word_bytes}
    fields: dict[str, Field] = {}
    position, widest = 0, 1
    for item in row.split():
        name, _, kind = item.partition(":")
        kind, _, repeat = kind.partition("*")
        count = word_class.fastbin_count if repeat == "FAST" else int(repeat or 1)
        width = widths[kind]
        position = -(-position // width) * width
        fields[name] = Field(position, width, count)
        position += width * count
        widest = max(widest, width)
    return Structure(fields, -(-position // widest) * widest, word_class.word_bytes)


def heap_info_bytes(row: str, word_class: WordClass) -> int:
    """sizeof(heap_info): padded so that the first chunk of a later sub-heap has an aligned payload.

    Up to 2.34 the pad is -6 * SIZE_SZ modulo MALLOC_ALIGNMENT, from 2.35 it completes whole alignment steps; both come
    out as the smallest size at which header_bytes more is a multiple of the alignment (32a8 from 2.35: 0x18, which
    wastes 4 bytes of padding of its own).
    """
    plain = structure(row, word_class).byte_count
    aligned = plain
    while (aligned + word_class.header_bytes) % word_class.alignment:
        aligned += word_class.word_bytes
    return aligned


@cache
def bin_numbers(word_class: WordClass) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lowest and highest chunk size of each bin, int64[128] each; the highest of the last bin is 2**62.

    Bin 1 (unsorted) takes any size; bins that no size maps to have lowest > highest.
    """
    rule = word_class.bins
    sizes = np.arange(word_class.minimum_chunk_bytes, 1 << 20, word_class.alignment, dtype=np.int64)
    number = np.full(len(sizes), rule.last, dtype=np.int64)
    for step in reversed(rule.large):
        shifted = sizes >> step.shift
        number = np.where(shifted <= step.limit, shifted + step.first, number)
    small = (sizes >> rule.small_shift) + rule.small_correction
    number = np.where(sizes < rule.small_limit, small, number)
    lowest = np.full(128, 1 << 62, dtype=np.int64)
    highest = np.zeros(128, dtype=np.int64)
    np.minimum.at(lowest, number, sizes)
    np.maximum.at(highest, number, sizes)
    highest[rule.last] = 1 << 62
    lowest[1], highest[1] = word_class.minimum_chunk_bytes, 1 << 62
    return lowest, highest


@cache
def tcache_bin_sizes(
    bin_count: int, word_class: WordClass, counted_from_one_less: bool = False
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Lowest and highest chunk size of each tcache bin, int64[bin_count] each.

    The 64 small bins hold one size each. A large bin (2.42+, used when tcache_max was raised) covers one power of two,
    the first what the small ones leave of theirs. ``counted_from_one_less``: the 2.42 tag takes the power of two of the
    size before the largest small one; only on 32a16 that is another, and its first large bin stays empty (lowest > highest).
    """
    lowest = word_class.minimum_chunk_bytes + word_class.alignment * np.arange(bin_count, dtype=np.int64)
    highest = lowest.copy()
    if bin_count > 64:
        largest_small = int(lowest[63])
        first = (largest_small - (word_class.alignment if counted_from_one_less else 0)).bit_length()
        for number in range(64, bin_count):
            power = first + number - 64
            lowest[number] = max(1 << (power - 1), largest_small + word_class.alignment)
            highest[number] = (1 << power) - 1
    return lowest, highest
