"""Which test of free fails first: one row for each step in its order, in the releases where the order differs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import pytest

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.free_checks import Freed, arena_of, first_failing
from coreheap.allocators.glibc.records import ArenaState
from coreheap.corefile import AddressSpace
from coreheap.errors import MemoryFault
from coreheap.kernels import ChunkGeometry

HEAP, END, TOP = 0x10000, 0x31000, 0x30000
GEOMETRY = ChunkGeometry(word_bytes=8, alignment=16, minimum_chunk_bytes=32, granule_phase=0)


@dataclass(frozen=True, slots=True)
class Words:
    """Memory from HEAP to END: words that were put, else 0."""

    words: dict[int, int]

    def read_word(self, address: int) -> int:
        if not HEAP <= address < END:
            raise MemoryFault(address, "unmapped")
        return self.words.get(address, 0)


def arena(is_main: bool = True) -> ArenaFacts:
    nothing = np.zeros(0, np.uint64)
    flags = 0 if is_main else 2
    state = ArenaState(0x500, 0, flags, TOP, 0, 0x500, None, 1, END - HEAP, END - HEAP, nothing, nothing)
    return ArenaFacts(0, 0, 0x500, is_main, state, (), 1 << 26, None, END - TOP, None)


def said(release: str, words: dict[int, int], header: int = 0x11000, is_main: bool = True) -> str | None:
    words = {TOP + 8: (END - TOP) | 1, **words}
    facts = arena(is_main)
    size_word = words[header + 8]
    main = facts if is_main else None
    memory = cast(AddressSpace, Words(words))
    return first_failing(Freed(memory, GEOMETRY, 4096, header, size_word, arena_of(size_word, facts, main)), release)


def pair(size_word: int, next_word: int, prev_size: int = 0) -> dict[int, int]:
    """A chunk of 0x500 bytes at 0x11000 by its size word, what comes behind it, and its prev_size."""
    return {0x11000: prev_size, 0x11008: size_word, 0x11508: next_word}


TEXT = 0x6161616161616160
MUNMAP, FAST, OUT, NOT_PREVIOUS, NORMAL, CONSOLIDATING = (
    "munmap_chunk(): invalid pointer",
    "free(): invalid next size (fast)",
    "double free or corruption (out)",
    "double free or corruption (!prev)",
    "free(): invalid next size (normal)",
    "corrupted size vs. prev_size while consolidating",
)


@pytest.mark.parametrize(
    ("release", "words", "text"),
    [
        ("2.36", pair(0x501, 0x41), None),
        # !prev is asked before the size: a number with PREV_INUSE clear says that, whatever its size is.
        ("2.36", pair(0x501, 0x4068900000000000), NOT_PREVIOUS),
        ("2.36", pair(0x501, TEXT | 1), NORMAL),
        ("2.12", pair(0x501, TEXT | 1), NORMAL),
        ("2.36", pair(0x501, 0x9), NORMAL),
        # 2 * SIZE_SZ with a flag is above the limit.
        ("2.36", pair(0x501, 0x11), None),
        # Of a fast chunk only the size is asked, up to 2.42.
        ("2.36", {0x11008: 0x21, 0x11028: TEXT | 1}, FAST),
        ("2.36", {0x11008: 0x21, 0x11028: 0}, FAST),
        ("2.36", {0x11008: 0x21, 0x11028: 0x40}, None),
        ("2.42", {0x11008: 0x21, 0x11028: TEXT | 1}, FAST),
        ("2.43", {0x11008: 0x21, 0x11028: TEXT | 1}, NORMAL),
        ("2.36", {0x11008: 0x91, 0x11098: TEXT | 1}, NORMAL),
        # The chunk's own size: wrapping before smallness, and then the end of the heap.
        ("2.36", {0x11008: 0}, "free(): invalid pointer"),
        ("2.42", {0x11008: 0}, "free(): invalid size"),
        ("2.36", {0x11008: 0x11}, "free(): invalid size"),
        ("2.36", {0x11008: 0x509}, "free(): invalid size"),
        ("2.42", {0x11008: 0x509, 0x11510: 0x41}, None),
        ("2.36", {0x11008: TEXT | 1}, OUT),
        ("2.36", {0x11008: 0xFFFFFFFFFFFFFFF1}, "free(): invalid pointer"),
        # A flag for a mapping: asked first up to 2.41, behind size and fastbins from 2.42 on.
        ("2.36", pair(0x503, 0x41, prev_size=8), MUNMAP),
        ("2.42", pair(0x503, 0x41, prev_size=8), MUNMAP),
        ("2.36", {0x11000: 8, 0x11008: 0x13}, MUNMAP),
        ("2.42", {0x11000: 8, 0x11008: 0x13}, "free(): invalid size"),
        # A flag for another arena: free looks for that one, and faults.
        ("2.36", pair(0x505, TEXT), None),
        # The chunk before, by prev_size.
        ("2.36", {**pair(0x500, 0x41, prev_size=0x100), 0x10F08: 0x90}, CONSOLIDATING),
        ("2.27", {**pair(0x500, 0x41, prev_size=0x100), 0x10F08: 0x90}, "corrupted size vs. prev_size"),
        ("2.25", {**pair(0x500, 0x41, prev_size=0x100), 0x10F08: 0x90}, None),
        ("2.36", {**pair(0x500, 0x41, prev_size=0x100), 0x10F08: 0x101}, None),
        ("2.36", pair(0x500, 0x41, prev_size=TEXT), None),
    ],
)
def test_the_first_test_that_fails(release: str, words: dict[int, int], text: str | None) -> None:
    assert said(release, words) == text


def test_top_is_never_freed() -> None:
    assert said("2.36", {TOP + 8: (END - TOP) | 1}, TOP) == "double free or corruption (top)"


def test_an_arena_of_a_thread_has_no_end() -> None:
    assert said("2.36", {0x11008: 0x6161616161616165}, is_main=False) is None


def test_a_chunk_that_lost_its_arenas_flag_is_looked_for_in_main_arena() -> None:
    main, other = arena(), arena(is_main=False)
    assert arena_of(0x501, other, main) is main
    assert arena_of(0x505, other, main) is other
    assert arena_of(0x505, main, main) is None
