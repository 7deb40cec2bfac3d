"""What foreign bytes look like, and how far they reach.

Knows: text, fill bytes, pointers, small numbers. Does not know: whose bytes they are. The bytes themselves go no further
than this module.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from coreheap.corefile import Core
from coreheap.damage import Pattern, PatternKind
from coreheap.errors import MemoryFault
from coreheap.heap import BINNED_STATES, ChunkState, HeapSnapshot
from coreheap.kernels import chunk_extents

REACH_LIMIT = 1 << 16
"""Bytes of foreign content that are followed."""
SMALL_NUMBER_LIMIT = 1 << 16
READ_AT_ONCE = 4096
SHORTEST_TEXT = 3
"""Fewer printable bytes are as likely a number."""
KEYS_SAMPLED = 64
CONTROL_IN_TEXT = b"\t\n\r"


def is_text(byte: int) -> bool:
    """Whether a byte is a printable character or white space of ASCII."""
    return 0x20 <= byte < 0x7F or byte in CONTROL_IN_TEXT


def _equals(byte: int) -> Callable[[int], bool]:
    return byte.__eq__


@dataclass(frozen=True, slots=True)
class Foreign:
    """Foreign bytes of one word and what of the memory around looks the same, in bytes before and behind it."""

    kind: PatternKind
    before: int
    behind: int
    target: str | None = None

    def pattern(self, byte_count: int) -> Pattern:
        return Pattern(self.kind, byte_count, self.target)


class PatternReader:
    """Reads what lies around damaged words of one core."""

    def __init__(self, core: Core, heap: HeapSnapshot) -> None:
        self._core = core
        self._heap = heap
        self._memory = core.memory
        self._word = core.word_bytes

    def around(self, address: int, length: int) -> Foreign:
        """What ``length`` foreign bytes at an address look like, and how far that goes on to both sides."""
        content = self._bytes(address, length)
        if not content:
            return Foreign(PatternKind.OTHER, 0, 0)
        if not any(content):
            return Foreign(PatternKind.ZEROS, self._run(address, -1, _equals(0)), 0)
        text = content.rstrip(b"\0")
        if len(text) >= SHORTEST_TEXT and all(map(is_text, text)):
            ends_here = len(text) < len(content)
            return Foreign(
                PatternKind.TEXT,
                self._run(address, -1, is_text),
                0 if ends_here else self._run_behind(address + length, is_text),
            )
        if len(content) > 1 and len(set(content)) == 1:
            same = _equals(content[0])
            return Foreign(
                PatternKind.FILL_BYTE, self._run(address, -1, same), self._run_behind(address + length, same)
            )
        if length < self._word:
            return Foreign(PatternKind.OTHER, self._run(address, -1, _equals(content[0])), 0)
        value = int.from_bytes(content[: self._word], "little")
        target = self.target_of(value)
        if target is not None:
            before = self._run_of_words(address, lambda word: self.target_of(word) is not None)
            return Foreign(PatternKind.POINTER, before, 0, target)
        shifted = self._shifted_target(address)
        if shifted is not None:
            return Foreign(PatternKind.SHIFTED_POINTER, self._word, 0, shifted)
        if self._is_small(value):
            return Foreign(PatternKind.SMALL_NUMBER, self._run_of_words(address, self._is_small), 0)
        if len(set(content)) == 1:
            return Foreign(PatternKind.FILL_BYTE, 0, 0)
        return Foreign(PatternKind.OTHER, 0, 0)

    def is_alike(self, address: int, kind: PatternKind) -> bool:
        """Whether the word at an address is a small number or a pointer as ``kind`` says."""
        try:
            value = self._memory.read_word(address)
        except MemoryFault:
            return False
        if kind is PatternKind.SMALL_NUMBER:
            return self._is_small(value)
        return kind is PatternKind.POINTER and self.target_of(value) is not None

    def target_of(self, value: int) -> str | None:
        """Where a word leads as a pointer, in words; None where nothing is mapped there."""
        if value < self._core.page_bytes:
            return None
        value = self._memory.untagged(value)
        region = self._memory.region_index(value)
        if region is None:
            return None
        module = self._core.module_at(value)
        if module is not None:
            return f"{module.name}+{value - module.start:#x}"
        index = self._heap.chunks.index
        if index.chunk_containing(value) >= 0:
            return "a chunk"
        for thread in self._core.threads[:1024]:
            if self._memory.region_index(thread.stack_pointer) == region:
                return f"the stack of thread {thread.index}"
        return "other memory"

    def _is_small(self, value: int) -> bool:
        if self._word == 8 and value >> 32:
            # Two ints.
            return value >> 32 < SMALL_NUMBER_LIMIT and 0 < value & 0xFFFFFFFF < SMALL_NUMBER_LIMIT
        return 0 < value < SMALL_NUMBER_LIMIT

    def _shifted_target(self, address: int) -> str | None:
        """Where a pointer leads that crosses into a word from the one before; None without."""
        for shift in range(1, self._word):
            content = self._bytes(address - shift, self._word)
            if len(content) == self._word:
                value = int.from_bytes(content, "little")
                if value >> 32 and value % 4 == 0:
                    target = self.target_of(value)
                    if target is not None:
                        return target
        return None

    def _run(self, address: int, step: int, fits: Callable[[int], bool]) -> int:
        """How many bytes fit from an address on (``step`` 1) or directly before it (-1)."""
        count = 0
        while count < REACH_LIMIT:
            if step > 0:
                part = self._bytes(address + count, READ_AT_ONCE)
            else:
                part = self._bytes_before(address - count, READ_AT_ONCE)[::-1]
            fitting = next((place for place, byte in enumerate(part) if not fits(byte)), len(part))
            count += fitting
            if fitting < READ_AT_ONCE:
                break
        return count

    def _run_behind(self, address: int, fits: Callable[[int], bool]) -> int:
        """How many bytes fit from an address on, up to the first whole word that is still what malloc wrote.

        The first bytes of such a word may fit by chance.
        """
        count = self._run(address, 1, fits)
        first = address + -address % self._word
        for place in range(first, address + count, self._word):
            content = self._bytes(place, self._word)
            if len(content) == self._word and self._is_mallocs(int.from_bytes(content, "little")):
                return place - address
        return count

    def _is_mallocs(self, value: int) -> bool:
        """Whether a word is a key of cached blocks, or leads to the header of a chunk on a bin."""
        if value in self.keys:
            return True
        index = self._heap.chunks.index
        chunk = index.chunk_starting_at(value)
        return chunk >= 0 and index.state[chunk] in BINNED_STATES

    @cached_property
    def keys(self) -> frozenset[int]:
        """What word 1 of cached blocks holds in the most of them, and the addresses of tcache structures (2.29-2.33)."""
        index = self._heap.chunks.index
        rows = np.flatnonzero(index.state == ChunkState.TCACHE)[:KEYS_SAMPLED].astype(np.int64)
        places = (chunk_extents(index, rows)[0] + np.uint64(3 * self._word)).tolist()
        words = Counter(self._bytes(place, self._word) for place in places)
        common = {key for key, count in words.most_common(1) if any(key) and 2 * count > len(places) and count > 1}
        known = frozenset(int.from_bytes(key, "little") for key in common)
        return known | {cache.address for cache in self._heap.thread_caches}

    def _run_of_words(self, address: int, fits: Callable[[int], bool]) -> int:
        """How many bytes of whole words directly before an address fit."""
        count = 0
        while count < READ_AT_ONCE:
            content = self._bytes(address - count - self._word, self._word)
            if len(content) < self._word or not fits(int.from_bytes(content, "little")):
                break
            count += self._word
        return count

    def _bytes(self, address: int, length: int) -> bytes:
        """The saved bytes from an address on, at most ``length``."""
        runs = self._memory.saved_runs_within(address, address + length)
        if not runs or runs[0][0] != address:
            return b""
        return self._memory.read(address, runs[0][1] - address)

    def _bytes_before(self, address: int, length: int) -> bytes:
        runs = self._memory.saved_runs_within(address - length, address)
        if not runs or runs[-1][1] != address:
            return b""
        return self._memory.read(runs[-1][0], address - runs[-1][0])
