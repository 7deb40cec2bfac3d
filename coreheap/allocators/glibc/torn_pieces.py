"""Pieces of a main arena, from mmap or the old break, that have holes: pages that are not in the core or not malloc's any more.

Knows: what the first header of a piece looks like, and that its chunks lead over holes to fenceposts or to top. Does not know: which
arena a piece belongs to (``stretches``).
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.gathering import words_at
from coreheap.allocators.glibc.holes import Holes, Stretch
from coreheap.allocators.glibc.locate import anonymous_memory, anonymous_ranges, joined
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import FLAGS, PREV_INUSE
from coreheap.corefile import Core
from coreheap.heap import NO_INDEX, RegionKind

FIRST_HEADERS = 1 << 14
"""Pages that are tried as the start of a piece with holes."""


class TornPieces:
    """Looks for the pieces with holes of one main arena."""

    def __init__(self, core: Core, layout: Layout, arena: ArenaFacts) -> None:
        self._core = core
        self._layout = layout
        self._arena = arena

    def within(self, excluded: list[tuple[int, int]], most_bytes: int) -> list[tuple[int, int]]:
        """Pieces outside of ``excluded``, of ``most_bytes`` together: what system_mem counts more than was found."""
        found: list[tuple[int, int]] = []
        if most_bytes < self._core.page_bytes:
            return found
        reached = 0
        for header in self._first_headers(excluded):
            end = self.end_of(header) if header >= reached else None
            if end is not None and end - header <= most_bytes:
                found.append((header, end))
                most_bytes -= end - header
                reached = end
        return found

    def end_of(self, header: int) -> int | None:
        """Where a piece ends that begins with a chunk at an address; None where none does."""
        end, page = self._memory.end_of_piece(header), self._core.page_bytes
        top_bytes = self._arena.top_bytes
        if end is not None and self._arena.state is not None and end == self._arena.state.top:
            return end + top_bytes if top_bytes else end + -end % page
        spare = self._layout.geometry.alignment - 2 * self._core.word_bytes
        return end + spare if end is not None and (end + spare) % page == 0 else end

    @cached_property
    def _memory(self) -> Holes:
        """The whole of memory, from the first anonymous mapping to the last, as one stretch with holes."""
        memory = self._core.memory
        starts, ends = anonymous_memory(memory)
        start, end = (int(starts[0]), int(ends[-1])) if len(starts) else (0, 0)
        top = self._arena.state.top if self._arena.state is not None else start
        stretch = Stretch(RegionKind.MMAP_PIECE, self._arena.index, NO_INDEX, start, end, top, True)
        return Holes(memory, self._layout.geometry, stretch)

    def _first_headers(self, excluded: list[tuple[int, int]]) -> list[int]:
        """Addresses of what may be the first header of a piece: at the start of a page, and nothing before it is free."""
        memory, page, geometry = self._core.memory, self._core.page_bytes, self._layout.geometry
        found: list[int] = []
        for start, end in anonymous_ranges(self._core, excluded):
            for low, high in joined(memory.populated_extents(start, end)):
                phase = self._layout.aligned_header(0)
                headers = np.arange(low + -low % page + phase, high, page, dtype=np.uint64)
                size_word, saved = words_at(memory, headers + np.uint64(geometry.word_bytes))
                size = size_word & np.uint64(~FLAGS & (1 << 64) - 1)
                fits = saved & (size_word & np.uint64(FLAGS) == PREV_INUSE)
                fits &= (size >= geometry.minimum_chunk_bytes) & (size % np.uint64(geometry.alignment) == 0)
                found += headers[fits][: FIRST_HEADERS - len(found)].tolist()
        return found
