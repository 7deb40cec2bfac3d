"""The memory in which another allocator's structures are looked for: anonymous memory, and the data of its module.

Knows: which ranges are anonymous, and how to read many words that may be missing. Does not know: any allocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core, Module
from coreheap.corefile.gathering import rows_at
from coreheap.corefile.kinds import WRITE
from coreheap.corefile.regions import LAST_ADDRESS, left_of, row_holding, without_overlap

UInt64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

MODULE_WORDS_LIMIT: Final = 1 << 23
"""Words of a module's data that are looked at: 64 MiB."""


class AnonymousMemory:
    """Writable anonymous memory of a core outside of modules, as stretches that touch."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.memory = core.memory
        self.word_bytes = core.word_bytes
        self._word_kind = "<u8" if core.word_bytes == 8 else "<u4"

    @cached_property
    def stretches(self) -> tuple[UInt64s, UInt64s]:
        """(start, end) of the maximal stretches of anonymous memory, whatever its access, modules' bss left out."""
        start, end = self._outside_of_modules(self.memory.region_file_index < 0)
        if not len(start):
            return start, end
        begins = np.concatenate(([True], start[1:] != end[:-1]))
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(start)) - 1
        return start[first].copy(), end[last].copy()

    @cached_property
    def writable(self) -> tuple[UInt64s, UInt64s]:
        """(start, end) of the regions that are writable."""
        memory = self.memory
        return self._outside_of_modules((memory.region_file_index < 0) & (memory.region_flags & WRITE != 0))

    def _outside_of_modules(self, wanted: Bools) -> tuple[UInt64s, UInt64s]:
        """(start, end) of some regions without what modules have of them: the kernel joins bss and what is mapped behind it."""
        memory, page = self.memory, self.core.page_bytes
        modules = [(module.start, min(module.end + -module.end % page, LAST_ADDRESS)) for module in self.core.modules]
        columns = np.array(modules, np.uint64).reshape(-1, 2)
        taken = without_overlap(columns[:, 0], columns[:, 1])
        start, end, _ = left_of(memory.region_start[wanted], memory.region_end[wanted], *taken)
        return start, end

    def holds(self, start: UInt64s, end: UInt64s) -> Bools:
        """For each range whether it lies in one anonymous stretch, and is not empty."""
        low, high = self.stretches
        if not len(low):
            return np.zeros(len(start), bool)
        row = np.searchsorted(low, start, side="right").astype(np.int64) - 1
        known = row >= 0
        row = np.maximum(row, 0)
        return known & (start < end) & (end <= high[row])

    def multiples_of(self, byte_count: int) -> UInt64s:
        """The addresses in writable memory with saved content that are multiples of ``byte_count``, sorted.

        Content alone: a header may claim a segment of any size, and in a hole of the file, where reading would fill the page
        cache, there is no structure.
        """
        found = [np.zeros(0, np.uint64)]
        start, end, _ = self.memory.populated_runs()
        taken = without_overlap(*self.writable)
        first = start + (~start + np.uint64(1)) % np.uint64(byte_count)
        hit = (first < end) & (first >= start)
        for low, high in zip(first[hit].tolist(), end[hit].tolist(), strict=True):
            found.append(np.arange(low, high, byte_count, dtype=np.uint64))
        address = np.concatenate(found)
        return address[row_holding(address, *taken)[1]]

    def words(self, start: int, end: int) -> Iterator[tuple[int, UInt64s]]:
        """(address, words) of the saved parts of [start, end) that have content; addresses are multiples of a word."""
        word = self.word_bytes
        for low, high in self.memory.populated_extents(start, end):
            low += -low % word
            count = (high - low) // word
            if count > 0:
                yield low, self.memory.view(low, low + count * word).view(self._word_kind).astype(np.uint64, copy=False)

    def module_words(self, module: Module) -> tuple[UInt64s, UInt64s]:
        """Address and value of each word of the module's writable memory that is not 0, its bss included."""
        memory = self.memory
        first, last = np.searchsorted(memory.region_start, np.array([module.start, module.end], np.uint64)).tolist()
        places, values, left = [], [], MODULE_WORDS_LIMIT
        for row in range(first, last):
            if not int(memory.region_flags[row]) & WRITE:
                continue
            end = min(int(memory.region_end[row]), module.end + -module.end % self.core.page_bytes)
            for address, words in self.words(int(memory.region_start[row]), end):
                words = words[:left]
                left -= len(words)
                at = np.flatnonzero(words)
                places.append(at.astype(np.uint64) * np.uint64(self.word_bytes) + np.uint64(address))
                values.append(words[at])
        if not places:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        return np.concatenate(places), np.concatenate(values)

    def rows_at(self, addresses: UInt64s, count: int) -> tuple[UInt64s, Bools]:
        """``count`` words at each of many addresses, uint64[addresses, count], and which of them were saved whole."""
        return rows_at(self.memory, addresses, count)

    def union(self, start: UInt64s, end: UInt64s) -> tuple[UInt64s, UInt64s]:
        """The ranges joined where they touch or overlap, sorted."""
        start, end = without_overlap(start, end)
        if not len(start):
            return start, end
        begins = np.concatenate(([True], start[1:] != end[:-1]))
        first = np.flatnonzero(begins)
        return start[first].copy(), end[np.append(first[1:], len(start)) - 1].copy()
