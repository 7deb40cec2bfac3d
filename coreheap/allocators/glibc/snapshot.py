"""The whole of a glibc heap on one screen: identify, survey the arenas, walk, lay the lists over it, add up."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.arenas import ArenaSurvey, survey_arenas
from coreheap.allocators.glibc.assembly import Assembly, chunk_table
from coreheap.allocators.glibc.caches import CacheSearch
from coreheap.allocators.glibc.copies import Copies, identify_copies
from coreheap.allocators.glibc.integrity import Integrity
from coreheap.allocators.glibc.judgement import Judge
from coreheap.allocators.glibc.leads import listed_chunks
from coreheap.allocators.glibc.mmapped import find_mmapped
from coreheap.allocators.glibc.overlay import Overlay, mark_own
from coreheap.allocators.glibc.stretches import stretches_of
from coreheap.allocators.glibc.tcache import Cache, caches_of_threads, slots_of_empty_lists
from coreheap.allocators.glibc.tops import with_true_tops
from coreheap.allocators.glibc.walk import HeapWalk, HeapWalker
from coreheap.allocators.protocol import Progress
from coreheap.corefile import Core
from coreheap.heap import HeapSnapshot, RegionKind
from coreheap.kernels import ChunkState, StopReason, chunk_extents


class GlibcAllocator:
    """Reads glibc heaps out of cores."""

    name = "glibc"

    def snapshot(self, core: Core, progress: Progress) -> HeapSnapshot | None:
        """The glibc heap of a process; None when no malloc_state of any known release is in the core."""
        progress("finding malloc's globals", 0, None)
        copies = identify_copies(core)
        if copies is None:
            return None
        found = copies.found
        # The layouts of all copies are alike in everything that chunks show.
        layout = found[0].layout
        survey = with_true_tops(core, layout, survey_arenas(core, found))
        memory = stretches_of(core, layout, survey.arenas, lambda copy: _cached_heads(core, copies, copy))
        progress("finding mmapped chunks", 0, None)
        excluded = [(stretch.start, stretch.end) for stretch in memory.stretches]
        excluded += [
            (heap.address, heap.address + arena.heap_max) for arena in survey.arenas for heap in arena.sub_heaps
        ]
        counts = _of_all(copies, "n_mmaps"), _of_all(copies, "mmapped_mem")
        mmapped = find_mmapped(core, layout, excluded, *counts, _counter_places(copies))
        hidden: tuple[int, ...] = ()
        # Those of threads whose storage tells them; the others are found among the chunks.
        told = [cache for copy in range(len(found)) for cache in _caches_told(core, copies, copy)]
        is_second = False
        while True:
            listed = partial(listed_chunks, core, layout, survey.arenas, told)
            walker = HeapWalker(core, layout, list(memory.stretches), listed, hidden)
            for number, stretch in enumerate(memory.stretches):
                progress("walking heaps", number, len(memory.stretches))
                walker.walk(stretch)
            for part in memory.foreign:
                walker.leave_out(part.arena, part.start, part.end, "foreign_sbrk")
            walk = walker.finish(mmapped.chunks)
            judge = Judge(core, found, survey.arenas, walk.index)
            overlay = Overlay(core, layout, walk, judge)
            progress("following free lists", 0, None)
            overlay.bins(survey.arenas)
            overlay.fastbins(survey.arenas)
            copy_of_arena = {arena.index: arena.copy for arena in survey.arenas}
            search = CacheSearch(core, found, chunk_table(layout, walk, ()), copy_of_arena, excluded)
            caches: list[list[Cache]] = []
            own_chunks: list[int] = []
            for copy, identification in enumerate(found):
                of_copy = search.find(copy)
                own_chunks += mark_own(walk.index, layout, of_copy)
                parameters = identification.parameters
                count = parameters.values.get("tcache_count") if parameters is not None else None
                count = slots_of_empty_lists(layout, of_copy, count)
                module = core.module_at(identification.ring.main) if identification.ring.main is not None else None
                key_place = module.symbol_address("tcache_key") if module is not None else None
                overlay.tcaches(of_copy, count, sum(map(len, caches)), key_place)
                caches.append(of_copy)
            known = {cache.address for cache in told}
            more = [cache for of_copy in caches for cache in of_copy if cache.address not in known]
            if is_second or not (overlay.hidden_starts or (more and walker.has_asked_lists)):
                break
            # A damaged size leads over chunks to a real boundary: only lists show that, and the size of a chunk whose header is
            # lost. Once more, with what they say.
            hidden, told, is_second = tuple(overlay.hidden_starts), [*told, *more], True
        _mark_unlisted_top(survey, walk)
        progress("checking malloc's structures", 0, None)
        integrity = Integrity(core, layout, survey, walk, overlay, judge)
        integrity.check(found, caches, chunk_table(layout, walk, ()))
        progress("adding up", 0, None)
        assembly = Assembly(core, copies, survey, walk, overlay, caches, own_chunks, judge, integrity)
        return assembly.snapshot(mmapped, [*memory.gaps, *search.gaps])


def _of_all(copies: Copies, name: str) -> int | None:
    """The sum of a counter in mp_ over all copies; None where one of them was not found."""
    known = [copy.parameters.values[name] for copy in copies.found if copy.parameters is not None]
    return sum(known) if len(known) == len(copies.found) else None


def _counter_places(copies: Copies) -> tuple[int, int] | None:
    """Where n_mmaps and mmapped_mem lie; None with several copies of malloc, of which any may be wrong."""
    parameters = copies.found[0].parameters
    if len(copies.found) != 1 or parameters is None:
        return None
    fields = copies.found[0].layout.parameters
    return parameters.address + fields.offset("n_mmaps"), parameters.address + fields.offset("mmapped_mem")


def _caches_told(core: Core, copies: Copies, copy: int) -> list[Cache]:
    """The tcaches that running threads have in a copy, as their storage tells them."""
    found = copies.found[copy]
    return [] if found.layout.tcache is None else caches_of_threads(core, found.layout, found.thread_words.tcache)


def _cached_heads(core: Core, copies: Copies, copy: int) -> npt.NDArray[np.uint64]:
    """Payload addresses at the heads of the tcache lists that running threads have in a copy; uint64[n]."""
    heads = [cache.state.entries for cache in _caches_told(core, copies, copy)]
    return np.concatenate([np.zeros(0, np.uint64), *heads])


def _mark_unlisted_top(survey: ArenaSurvey, walk: HeapWalk) -> None:
    """Where an arena's malloc_state is missing, the last chunk of a heap without fenceposts is its top.

    Only top reaches to the end of a heap that is not retired (sysmalloc). It lacks NON_MAIN_ARENA, which the walk then
    took for a contradiction.
    """
    stateless = {arena.index for arena in survey.arenas if arena.state is None}
    for number, region in enumerate(walk.regions):
        is_brk = region.stretch.kind is RegionKind.BRK and region.end == region.stretch.end
        if (region.stretch.arena in stateless or is_brk) and region.stop_reason is StopReason.END:
            first = int(walk.index.region_first_chunk[number])
            last = first + int(walk.index.region_chunk_count[number]) - 1
            walk.index.state[last] = ChunkState.TOP
            header = int(chunk_extents(walk.index, np.array([last], np.int64))[0][0])
            kept = [anomaly for anomaly in walk.anomalies if anomaly.address != header]
            walk.anomaly_count -= len(walk.anomalies) - len(kept)
            walk.anomalies = kept
