"""The memory of sanitizers and of valgrind: tools that watch a program, and that serve its malloc meanwhile.

Knows: where the run times of compiler-rt and gcc's libsanitizer map shadow memory and their allocator on x86-64 Linux
(asan_mapping.h, tsan_platform.h, msan.h, lsan_allocator.h), the header of a large block (sanitizer_allocator_secondary.h), and
valgrind's superblocks (coregrind/m_mallocfree.c). Does not know: what in that memory is in use.

Shadow memory and what the allocator only reserves are terabytes of address space. The tools ask the kernel to leave most of it out
of cores (use_madv_dontdump).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory, Bools, UInt64s
from coreheap.corefile import Module
from coreheap.corefile.kinds import EXECUTE, WRITE
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import KIB, format_bytes

TIB: Final = 1 << 40
PAGE: Final = 4 * KIB
LARGE_HEADER_WORDS: Final = 4
"""map_beg, map_size, size, chunk_idx."""
LARGE_BLOCKS_LIMIT: Final = 1 << 18
"""kMaxNumChunks of the secondary allocator."""
SUPERBLOCKS_LIMIT: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a tool keeps what on 64-bit x86: ranges [start, end) of the address space.

    ``shadow``: shadow memory and the gaps between. ``space``: where the allocator's regions are, by release. ``is_exact``: the shadow
    begins and ends with the range, but for a page in front, so that no other tool's is taken for it.
    """

    shadow: tuple[tuple[int, int], ...]
    space: tuple[tuple[int, int], ...]
    is_exact: bool = False


ASAN = Layout(
    ((0x7FFF7000, 0x1000_7FFF_8000),),
    # From LLVM 17 on, and before.
    ((0x5000_0000_0000, 0x5400_0000_0000), (0x6000_0000_0000, 0x6400_0000_0000)),
    is_exact=True,
)
TSAN = Layout(
    (
        (0x80_0000_0000, 0x5500_0000_0000),
        (0x5680_0000_0000, 0x7B00_0000_0000),
        (0x7C00_0000_0000, 0x7E80_0000_0000),
    ),
    ((0x7B00_0000_0000, 0x7C00_0000_0000),),
)
MSAN = Layout(
    ((0x100_0000_0000, 0x5100_0000_0000), (0x6000_0000_0000, 0x7000_0000_0000)), ((0x7000_0000_0000, 0x7800_0000_0000),)
)
LSAN = Layout((), ((0x6000_0000_0000, 0x6400_0000_0000),))


def ranges_of(layout: Layout) -> Callable[[AnonymousMemory, Module], tuple[Ranges, ...]]:
    """What finds a tool's memory by its layout; it finds nothing where a terabyte of it is not mapped."""

    def find(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
        return _ranges(anonymous, layout)

    return find


def _ranges(anonymous: AnonymousMemory, layout: Layout) -> tuple[Ranges, ...]:
    if anonymous.core.machine != "x86_64":
        return ()
    shadow, space = _Pieces.within(anonymous, layout.shadow), _Pieces.within(anonymous, layout.space)
    told = shadow if layout.shadow else space
    reserved = int((told.end - told.start).sum())
    if reserved < TIB or (layout.shadow and not shadow.may_access.any()):
        return ()
    if layout.is_exact:
        ((low, high),) = layout.shadow
        if not (low <= int(shadow.start[0]) <= low + PAGE and int(shadow.end[-1]) == high):
            return ()
    closed = ~space.may_access
    start, end = np.append(shadow.start, space.start[closed]), np.append(shadow.end, space.end[closed])
    fact = Evidence(
        f"{format_bytes(reserved)} of address space are reserved where the tool's layout has them",
        "address space",
        Strength.SOLID,
        int(told.start[0]),
    )
    found = [Ranges(*anonymous.union(start, end), (fact,), is_reserve=True)]
    used = space.may_access
    if used.any():
        fact = Evidence(
            f"{int(used.sum())} mappings lie in its allocator's space",
            "address space",
            Strength.SOLID,
            int(space.start[used][0]),
        )
        found.append(Ranges(*anonymous.union(space.start[used], space.end[used]), (fact,)))
    large = _large_blocks(anonymous)
    if len(large[0]):
        fact = Evidence(
            f"{len(large[0])} mappings begin with the header of one of its large blocks, which tells their place and size",
            "anonymous memory",
            Strength.SOLID,
            int(large[0][0]),
        )
        found.append(Ranges(*anonymous.union(*large), (fact,)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What of anonymous regions lies in some ranges, by address, and which of it the program may access."""

    start: UInt64s
    end: UInt64s
    may_access: Bools

    @classmethod
    def within(cls, anonymous: AnonymousMemory, ranges: tuple[tuple[int, int], ...]) -> _Pieces:
        memory = anonymous.memory
        is_anonymous = memory.region_file_index < 0
        start, end, may_access = np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.bool_)
        for low, high in ranges:
            from_, to = np.maximum(memory.region_start, np.uint64(low)), np.minimum(memory.region_end, np.uint64(high))
            held = is_anonymous & (from_ < to)
            start, end = np.append(start, from_[held]), np.append(end, to[held])
            may_access = np.append(may_access, (memory.region_flags[held] & 7) != 0)
        return cls(start, end, may_access)


def _large_blocks(anonymous: AnonymousMemory) -> tuple[UInt64s, UInt64s]:
    """(start, end) of the mappings of large blocks: their first words say where they begin and how long they are."""
    address = anonymous.multiples_of(PAGE)
    rows, saved = anonymous.rows_at(address, LARGE_HEADER_WORDS)
    begins, size, asked, number = rows.T
    page = np.uint64(PAGE)
    fits = saved & (begins == address) & (size % page == 0) & (size >= np.uint64(2) * page)
    fits &= (
        (asked > 0) & (asked <= size) & (size - asked <= np.uint64(1 << 20)) & (number < np.uint64(LARGE_BLOCKS_LIMIT))
    )
    fits &= anonymous.holds(address, address + np.minimum(size, ~address))
    return address[fits], address[fits] + size[fits]


def valgrind_ranges(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
    """The client's heap: mappings that superblocks tile from their start to their end."""
    memory, word = anonymous.memory, anonymous.word_bytes
    header = 4 * word
    wanted = (memory.region_file_index < 0) & ((memory.region_flags & (WRITE | EXECUTE)) == WRITE | EXECUTE)
    found: list[tuple[int, int, int]] = []
    left = SUPERBLOCKS_LIMIT
    for low, high in zip(memory.region_start[wanted].tolist(), memory.region_end[wanted].tolist(), strict=True):
        place, count = low, 0
        while place < high and left > 0 and memory.is_saved(place, place + word):
            size = memory.read_word(place) + header
            if size % PAGE or not header < size <= high - place:
                break
            place, count, left = place + size, count + 1, left - 1
        if place == high and count:
            found.append((low, high, count))
    if not found:
        return ()
    total = sum(count for _, _, count in found)
    fact = Evidence(
        f"{total} superblocks tile {len(found)} mappings from start to end",
        "anonymous memory",
        Strength.PROOF,
        found[0][0],
    )
    columns = np.array([(low, high) for low, high, _ in found], np.uint64)
    return (Ranges(columns[:, 0], columns[:, 1], (fact,)),)
