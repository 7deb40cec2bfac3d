"""Every tcache of a process: of the threads that run, then of threads that no longer do, in every copy of malloc.

Knows: in which order what says of tcaches is believed, and what stays unknown. Does not know: how a structure is recognised
(``tcache``) or where threads keep their words (``threads``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coreheap.allocators.glibc.identify import Identification
from coreheap.allocators.glibc.locate import anonymous_ranges
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.tcache import (
    Cache,
    cache_at,
    caches_by_structure,
    caches_of_threads,
    possible_tcaches,
    wanted_tcache,
)
from coreheap.allocators.glibc.thread_storage import ThreadStorage
from coreheap.allocators.glibc.threads import find_pairs, leads_nowhere
from coreheap.corefile import Core
from coreheap.evidence import Gap
from coreheap.heap import ChunkRegion, ChunkTable
from coreheap.kernels import ChunkState, chunk_extents


class CacheSearch:
    """Finds the tcaches of all copies over the chunks that were walked. One use: ``find`` for each copy in order."""

    def __init__(
        self,
        core: Core,
        copies: tuple[Identification, ...],
        chunks: ChunkTable,
        copy_of_arena: dict[int, int],
        excluded: list[tuple[int, int]],
    ) -> None:
        self.core = core
        self.copies = copies
        # A tcache lies in an arena of its own copy, so each copy's are looked for among its own chunks.
        regions_of: dict[int, list[ChunkRegion]] = {}
        for region in chunks.regions:
            regions_of.setdefault(copy_of_arena[region.arena], []).append(region)
        self.chunks_of = [replace(chunks, regions=tuple(regions_of.get(copy, ()))) for copy in range(len(copies))]
        self.excluded = excluded
        self.gaps: list[Gap] = []
        # What running threads of any copy have is no tcache of another copy's past thread.
        self._by_threads = [
            [] if found.layout.tcache is None else caches_of_threads(core, found.layout, found.thread_words.tcache)
            for found in copies
        ]
        self._known = {cache.address for caches in self._by_threads for cache in caches}

    def find(self, copy: int) -> list[Cache]:
        """The tcaches of one copy."""
        found, caches = self.copies[copy], self._by_threads[copy]
        chunks, layout, words = self.chunks_of[copy], found.layout, found.thread_words
        if layout.tcache is None:
            return []
        missing = int((~words.known).sum())
        if missing or not len(self.core.threads):
            by_pairs = self._by_pairs(found, chunks)
            caches += by_pairs
            if len(by_pairs) < max(1, missing):
                caches += self._by_lists(found, chunks)
                self._note(
                    "thread_storage_not_saved",
                    f"the thread-local storage of {missing or 'all'} threads is not in the core: blocks cached in their"
                    " tcache may count as in use",
                )
        elif words.tcache_offset is None and not layout.generation.tcache_is_never_null:
            by_lists = self._by_lists(found, chunks)
            caches += by_lists
            if len(chunks) and (by_lists or not self._is_ruled_out(layout)):
                self._note(
                    "tcache_not_found",
                    "no thread's tcache could be told from its thread-local storage: cached blocks may count as in use",
                )
        if self._may_have_past_threads(found) and self._has_unclaimed_cache(found, chunks):
            caches += self._by_pairs(found, chunks)
            if self.core.truncated:
                caches += self._by_lists(found, chunks)
                self._note(
                    "past_threads_not_saved",
                    "the storage of threads that no longer run may be missing: their empty tcaches count as in use",
                )
        if copy and self._has_unclaimed_cache(found, chunks):
            # A thread's end is told to the libc that started it alone: its tcache in another copy stays as it was.
            caches += self._by_lists(found, chunks)
        return caches

    def _is_ruled_out(self, layout: Layout) -> bool:
        """Whether no thread has anything in its storage that leads to a tcache structure."""
        wanted = wanted_tcache(self.core.memory, layout)
        return wanted is not None and leads_nowhere(ThreadStorage(self.core), wanted)

    def _note(self, cause: str, consequence: str) -> None:
        gap = Gap(cause, consequence)
        if gap not in self.gaps:
            self.gaps.append(gap)

    def _new(self, caches: list[Cache]) -> list[Cache]:
        """Those that are not known yet; they are from now on."""
        result = []
        for cache in caches:
            if cache.address not in self._known:
                self._known.add(cache.address)
                result.append(cache)
        return result

    def _by_lists(self, found: Identification, chunks: ChunkTable) -> list[Cache]:
        """Caches that hold blocks, proven by their lists."""
        return self._new(self._unclaimed_by_lists(found, chunks))

    def _unclaimed_by_lists(self, found: Identification, chunks: ChunkTable) -> list[Cache]:
        caches = caches_by_structure(self.core, found.layout, chunks)
        return [cache for cache in caches if cache.address not in self._known]

    def _may_have_past_threads(self, found: Identification) -> bool:
        """Whether arenas or threads look like those of a fork's child, where the parent's other threads vanished."""
        return len(self.core.threads) == 1 or bool(
            (~np.isin(np.array(found.ring.members, np.uint64), found.thread_words.arena)).any()
        )

    def _has_unclaimed_cache(self, found: Identification, chunks: ChunkTable) -> bool:
        """Whether the heap has a tcache structure that no running thread has: one that holds blocks, or in a first chunk.

        Up to 2.41 a thread's first allocation makes its tcache, so a fresh arena begins with it.
        """
        if self._unclaimed_by_lists(found, chunks):
            return True
        layout, index = found.layout, chunks.index
        first = np.array([region.first_chunk for region in chunks.regions], np.int64)
        headers, sizes = chunk_extents(index, first)
        claimed = np.array(sorted(self._known), np.uint64) - np.uint64(layout.word_class.header_bytes)
        fits = (
            np.isin(sizes, np.array(layout.tcache_chunk_bytes, np.uint64))
            & (index.state[first] == ChunkState.IN_USE)
            & ~np.isin(headers, claimed)
        )
        return bool(fits.any())

    def _by_pairs(self, found: Identification, chunks: ChunkTable) -> list[Cache]:
        """Caches by the storage of threads whose thread pointer the core does not tell."""
        candidates = possible_tcaches(self.core, found.layout, chunks)
        ranges, distance = anonymous_ranges(self.core, self.excluded), found.thread_words.pair_distance
        pairs = find_pairs(self.core, ranges, found.ring.members, candidates, distance)
        caches = [cache_at(self.core, found.layout, pair.tcache, pair.thread) for pair in pairs]
        return self._new([cache for cache in caches if cache is not None])
