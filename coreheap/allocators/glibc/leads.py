"""What leads to chunks besides the headers before them: pointers to their payloads anywhere in the core, and free lists.

Knows: where such words are, and how lists are linked. Does not know: what it means for a walk (``recovery``), nor which of
it is damaged: each is one piece of evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.gathering import words_at
from coreheap.allocators.glibc.records import BIN_COUNT, Layout
from coreheap.allocators.glibc.structures import SAFE_LINKING_SHIFT, bin_numbers, tcache_bin_sizes
from coreheap.allocators.glibc.tcache import Cache
from coreheap.corefile import AddressSpace, Core
from coreheap.kernels import ChunkGeometry
from coreheap.quantities import AddressRange

UInt64s = npt.NDArray[np.uint64]
Indexes = npt.NDArray[np.intp]
Bytes = npt.NDArray[np.uint8]

NOWHERE = AddressRange(0, 0)

LIST_STEPS = 4096
"""Chunks of a free list that are followed from its head to learn where chunks start."""

WINDOW_BYTES = 1 << 26
WINDOWS_OF_A_HEAP = 16
SCANS = 32
"""Pointers are looked for in the whole core, for a window of the heap at a time; so often and no more."""

WORDS_AT_ONCE = 1 << 20


class PayloadPointers:
    """Which possible chunks of a heap any saved word of the core leads to; looked for when it is asked."""

    def __init__(self, core: Core, geometry: ChunkGeometry, heap_bytes: int) -> None:
        self._core = core
        self._geometry = geometry
        self._window_bytes = max(WINDOW_BYTES, heap_bytes // WINDOWS_OF_A_HEAP)
        self._scans = 0
        self._low = self._high = 0
        self._marks: Bytes = np.zeros(0, np.uint8)

    def headers_within(self, low: int, high: int) -> UInt64s | None:
        """Header addresses in [low, high) whose payload some word leads to, ascending; None where that was not looked for.

        ``high`` is cut to the window that begins at ``low``.
        """
        if not self._low <= low < high <= self._high:
            if self._scans >= SCANS:
                return None
            self._scans += 1
            self._look(low, max(min(high, low + 4 * self._window_bytes), low + self._window_bytes))
        alignment = self._geometry.alignment
        first, last = (low - self._low) // alignment, (min(high, self._high) - self._low) // alignment
        found = np.flatnonzero(self._marks[first:last]).astype(np.uint64) + np.uint64(first)
        return found * np.uint64(alignment) + np.uint64(self._low)

    def _look(self, low: int, high: int) -> None:
        """Mark every granule of [low, high), ``low`` being a header's address, that starts a chunk by some word."""
        memory, geometry = self._core.memory, self._geometry
        word, alignment = geometry.word_bytes, geometry.alignment
        self._low, self._high = low, high
        self._marks = np.zeros((high - low) // alignment + 1, np.uint8)
        payload, extent = np.uint64(low + geometry.header_bytes), np.uint64(high - low)
        kind = np.dtype("<u8" if word == 8 else "<u4")
        tagged = self._core.machine == "aarch64"
        for start, end, offset in zip(*(column.tolist() for column in memory.populated_runs()), strict=True):
            skip = -start % word
            count = (end - start - skip) // word
            for first in range(0, max(count, 0), WORDS_AT_ONCE):
                at = offset + skip + first * word
                part = memory.file[at : at + min(WORDS_AT_ONCE, count - first) * word].view(kind).astype(np.uint64)
                if tagged:
                    part &= np.uint64((1 << 56) - 1)
                part -= payload
                inside = part[part < extent]
                self._marks[inside[inside % np.uint64(alignment) == 0] // np.uint64(alignment)] = 1


@dataclass(frozen=True, slots=True)
class ListedChunks:
    """Header addresses that free lists lead to, ascending, and the one size that each list is for; uint64[n].

    0 where a list is for several sizes.
    """

    header_address: UInt64s
    chunk_bytes: UInt64s

    def size_at(self, header: int) -> int:
        """The size that its list says a chunk has; 0 where no list leads there or several sizes belong on it."""
        row = int(np.searchsorted(self.header_address, np.uint64(header)))
        is_there = row < len(self.header_address) and int(self.header_address[row]) == header
        return int(self.chunk_bytes[row]) if is_there else 0


def no_listed_chunks() -> ListedChunks:
    return ListedChunks(np.zeros(0, np.uint64), np.zeros(0, np.uint64))


def listed_chunks(core: Core, layout: Layout, arenas: tuple[ArenaFacts, ...], caches: list[Cache]) -> ListedChunks:
    """What free lists lead to: bins from both ends, fastbins, tcaches. Links may be damaged: not all of it are chunks."""
    word, linking = layout.word_class.word_bytes, layout.generation.safe_linking
    header = np.uint64(layout.word_class.header_bytes)
    lowest, highest = (np.asarray(column, np.uint64) for column in bin_numbers(layout.word_class))
    bin_bytes = np.where(lowest == highest, lowest, np.uint64(0))[1 : BIN_COUNT + 1]
    parts: list[tuple[UInt64s, UInt64s]] = [(np.zeros(0, np.uint64), np.zeros(0, np.uint64))]
    for arena in arenas:
        if arena.state is None:
            continue
        own = AddressRange(arena.state.address, arena.state.address + layout.state.byte_count)
        fast = arena.state.fastbins
        fast_bytes = np.array([layout.word_class.fastbin_chunk_bytes(number) for number in range(len(fast))], np.uint64)
        for heads, sizes, link_words, is_mangled in (
            (arena.state.bins[0::2], bin_bytes, 2, False),
            (arena.state.bins[1::2], bin_bytes, 3, False),
            (fast, fast_bytes, 2, linking),
        ):
            headers, number = followed(core.memory, heads, link_words * word, is_mangled, own)
            parts.append((headers, sizes[number]))
    for cache in caches:
        low, high = tcache_bin_sizes(len(cache.state.entries), layout.word_class, False)
        low, high = np.asarray(low, np.uint64), np.asarray(high, np.uint64)
        payloads, number = followed(core.memory, cache.state.entries, 0, linking, NOWHERE)
        sizes = np.where(low == high, low, np.uint64(0))[number]
        parts.append((payloads[payloads >= header] - header, sizes[payloads >= header]))
    headers, first = np.unique(np.concatenate([part[0] for part in parts]), return_index=True)
    return ListedChunks(headers, np.concatenate([part[1] for part in parts])[first])


def followed(
    memory: AddressSpace, heads: UInt64s, link_offset: int, safe_linking: bool, own: AddressRange
) -> tuple[UInt64s, Indexes]:
    """All addresses on lists, followed side by side, each for at most LIST_STEPS steps, and the number of each one's list;
    uint64[n], intp[n].

    A list ends at 0, in ``own`` (its arena's malloc_state), or where it comes back. Where lists join it is on one of them.
    """
    number = np.arange(len(heads), dtype=np.intp)
    found: list[tuple[UInt64s, Indexes]] = [(np.zeros(0, np.uint64), np.zeros(0, np.intp))]
    seen: UInt64s = np.zeros(0, np.uint64)
    for _ in range(LIST_STEPS):
        fresh = (heads != 0) & ((heads < np.uint64(own.start)) | (heads >= np.uint64(own.end))) & ~np.isin(heads, seen)
        heads, first = np.unique(heads[fresh], return_index=True)
        number = number[fresh][first]
        if not len(heads):
            break
        found.append((heads, number))
        # Cycles of one or two, the commonest, end here; longer ones at the limit.
        seen = np.concatenate([seen[-2 * len(heads) :], heads])
        places = heads + np.uint64(link_offset)
        following, saved = words_at(memory, places)
        if safe_linking:
            following = following ^ (places >> np.uint64(SAFE_LINKING_SHIFT))
        heads, number = following[saved], number[saved]
    return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])
