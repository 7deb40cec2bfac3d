"""The whole of a glibc heap on one screen: identify, survey the arenas, walk, lay the lists over it, add up."""

from __future__ import annotations

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts, ArenaSurvey, survey_arenas
from coreheap.allocators.glibc.identify import Identification, identify
from coreheap.allocators.glibc.layouts import GENERATIONS
from coreheap.allocators.glibc.locate import anonymous_ranges
from coreheap.allocators.glibc.mmapped import MmappedFindings, find_mmapped
from coreheap.allocators.glibc.overlay import Overlay, mark_own
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.tcache import (
    Cache,
    cache_at,
    caches_by_structure,
    caches_of_threads,
    possible_tcaches,
)
from coreheap.allocators.glibc.threads import find_pairs
from coreheap.allocators.glibc.walk import (
    HeapWalk,
    HeapWalker,
    stretches_of,
)
from coreheap.allocators.protocol import Progress
from coreheap.corefile import Core
from coreheap.evidence import Anomaly, Evidence, Gap, Strength, confidence_from
from coreheap.heap import (
    AllocatorIdentity,
    Arena,
    ChunkRegion,
    ChunkTable,
    HeapSnapshot,
    MallocParameters,
    RegionKind,
    StateTotal,
    StateTotals,
    SubHeap,
    ThreadCache,
    UnattributedRange,
    sum_of_totals,
)
from coreheap.kernels import ChunkState, StopReason, chunk_extents, state_totals
from coreheap.quantities import AddressRange, format_address

STATES_WITHOUT_USABLE_BYTES = (ChunkState.FENCEPOST, ChunkState.DAMAGED)


class GlibcAllocator:
    """Reads glibc heaps out of cores."""

    name = "glibc"

    def snapshot(self, core: Core, progress: Progress) -> HeapSnapshot | None:
        """The glibc heap of a process; None when no malloc_state of any known release is in the core."""
        progress("finding malloc's globals", 0, None)
        found = identify(core)
        if found is None:
            return None
        survey = survey_arenas(core, found)
        parameters = found.parameters.values if found.parameters else {}
        stretches = stretches_of(core, found.layout, survey.arenas, parameters.get("sbrk_base", 0))
        walker = HeapWalker(core, found.layout, stretches)
        for number, stretch in enumerate(stretches):
            progress("walking heaps", number, len(stretches))
            walker.walk(stretch)
        progress("finding mmapped chunks", 0, None)
        excluded = [(stretch.start, stretch.end) for stretch in stretches]
        excluded += [
            (heap.address, heap.address + arena.heap_max) for arena in survey.arenas for heap in arena.sub_heaps
        ]
        mmapped = find_mmapped(
            core,
            found.layout,
            excluded,
            parameters.get("n_mmaps"),
            parameters.get("mmapped_mem"),
        )
        walk = walker.finish(mmapped.chunks)
        overlay = Overlay(core, found.layout, walk)
        progress("following free lists", 0, None)
        overlay.bins(survey.arenas)
        overlay.fastbins(survey.arenas)
        caches, cache_gaps = _caches(core, found, walk, excluded)
        own_chunks = mark_own(walk.index, found.layout, caches)
        overlay.tcaches(caches, parameters.get("tcache_count"))
        _mark_unlisted_top(survey, walk)
        progress("adding up", 0, None)
        assembly = _Assembly(core, found, survey, walk, overlay, caches, own_chunks)
        return assembly.snapshot(mmapped, cache_gaps)


def _caches(
    core: Core, found: Identification, walk: HeapWalk, excluded: list[tuple[int, int]]
) -> tuple[list[Cache], list[Gap]]:
    """Every tcache that can be found: of the threads, then of threads that no longer run."""
    layout, words = found.layout, found.thread_words
    if layout.tcache is None:
        return [], []
    caches = caches_of_threads(core, layout, words.tcache)
    gaps: list[Gap] = []
    missing = int((~words.known).sum())
    if missing or not len(core.threads):
        by_pairs = _caches_by_pairs(core, found, walk, excluded, caches)
        caches += by_pairs
        if len(by_pairs) < max(1, missing):
            caches += _caches_by_lists(core, found, walk, caches)
            gaps.append(
                Gap(
                    "thread_storage_not_saved",
                    f"the thread-local storage of {missing or 'all'} threads is not in the core: blocks cached in their"
                    " tcache may count as in use",
                )
            )
    elif not words.tcache_hits and not layout.generation.tcache_is_never_null:
        caches += _caches_by_lists(core, found, walk, caches)
        if walk.index.chunk_count:
            gaps.append(
                Gap(
                    "tcache_not_found",
                    "no thread's tcache could be told from its thread-local storage: cached blocks may count as in use",
                )
            )
    if _may_have_past_threads(core, found) and _has_unclaimed_cache(core, found, walk, caches):
        caches += _caches_by_pairs(core, found, walk, excluded, caches)
        if core.truncated:
            caches += _caches_by_lists(core, found, walk, caches)
            gaps.append(
                Gap(
                    "past_threads_not_saved",
                    "the storage of threads that no longer run may be missing: their empty tcaches count as in use",
                )
            )
    return caches, gaps


def _caches_by_lists(core: Core, found: Identification, walk: HeapWalk, known: list[Cache]) -> list[Cache]:
    """Caches that are not known yet and hold blocks, proven by their lists."""
    seen = {cache.address for cache in known}
    table = _table(found.layout, walk, ())
    return [cache for cache in caches_by_structure(core, found.layout, table) if cache.address not in seen]


def _may_have_past_threads(core: Core, found: Identification) -> bool:
    """Whether arenas or threads look like those of a fork's child, where the parent's other threads vanished."""
    return len(core.threads) == 1 or bool(
        (~np.isin(np.array(found.ring.members, np.uint64), found.thread_words.arena)).any()
    )


def _has_unclaimed_cache(core: Core, found: Identification, walk: HeapWalk, caches: list[Cache]) -> bool:
    """Whether the heap has a tcache structure that no running thread has: one that holds blocks, or in a first chunk.

    Up to 2.41 a thread's first allocation makes its tcache, so a fresh arena begins with it.
    """
    layout, index = found.layout, walk.index
    if _caches_by_lists(core, found, walk, caches):
        return True
    known = {cache.address for cache in caches}
    headers, sizes = chunk_extents(index, index.region_first_chunk)
    claimed = np.array(sorted(known), np.uint64) - np.uint64(layout.word_class.header_bytes)
    fits = (
        np.isin(sizes, np.array(layout.tcache_chunk_bytes, np.uint64))
        & (index.state[index.region_first_chunk] == ChunkState.IN_USE)
        & ~np.isin(headers, claimed)
    )
    return bool(fits.any())


def _caches_by_pairs(
    core: Core,
    found: Identification,
    walk: HeapWalk,
    excluded: list[tuple[int, int]],
    known: list[Cache],
) -> list[Cache]:
    """Caches that are not known yet, by the storage of threads whose thread pointer the core does not tell."""
    layout = found.layout
    seen = {cache.address for cache in known}
    result = []
    candidates = possible_tcaches(core, layout, _table(layout, walk, ()))
    for pair in find_pairs(core, anonymous_ranges(core, excluded), found.ring.members, candidates):
        cache = cache_at(core, layout, pair.tcache, pair.thread)
        if cache is not None and pair.tcache not in seen:
            seen.add(pair.tcache)
            result.append(cache)
    return result


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


def _table(layout: Layout, walk: HeapWalk, regions: tuple[ChunkRegion, ...]) -> ChunkTable:
    """The chunk table over a walk; with ``regions`` empty those are made without totals, for a look at the chunks."""
    word = layout.word_class.word_bytes
    if not regions:
        regions = tuple(_region(walk, number, {}) for number in range(len(walk.regions)))
    return ChunkTable(walk.index, regions, word, 2 * word - layout.mmapped_trailer_bytes // 2)


def _region(walk: HeapWalk, number: int, totals: StateTotals) -> ChunkRegion:
    walked, index = walk.regions[number], walk.index
    return ChunkRegion(
        number,
        walked.stretch.kind,
        walked.stretch.arena,
        walked.stretch.sub_heap,
        AddressRange(int(index.region_start[number]), int(index.region_end[number])),
        int(index.region_first_chunk[number]),
        int(index.region_chunk_count[number]),
        totals,
        walked.proven_to_end,
    )


class _Assembly:
    """Puts the parts of the analysis into the values of ``heap``."""

    def __init__(
        self,
        core: Core,
        found: Identification,
        survey: ArenaSurvey,
        walk: HeapWalk,
        overlay: Overlay,
        caches: list[Cache],
        own_chunks: list[int],
    ) -> None:
        self.core = core
        self.found = found
        self.survey = survey
        self.walk = walk
        self.overlay = overlay
        self.caches = caches
        self.own_chunks = own_chunks
        self.word = found.layout.word_class.word_bytes
        self.regions = tuple(_region(walk, number, self._totals(number)) for number in range(len(walk.regions)))
        self.surplus: list[Anomaly] = []
        self.regions_of: dict[int, list[ChunkRegion]] = {}
        for region in self.regions:
            self.regions_of.setdefault(region.arena, []).append(region)

    def _totals(self, region: int) -> StateTotals:
        counts, byte_counts = state_totals(self.walk.index, region)
        totals = {}
        for state in ChunkState:
            count, byte_count = int(counts[state]), int(byte_counts[state])
            usable = 0 if state in STATES_WITHOUT_USABLE_BYTES else byte_count - self.word * count
            totals[state] = StateTotal(count, byte_count, usable)
        return totals

    def _mmapped_totals(self, table: ChunkTable) -> StateTotals:
        totals = {state: StateTotal() for state in ChunkState}
        usable = table.mmapped_usable_bytes
        sizes = self.walk.index.mmapped.chunk_bytes
        for state in np.unique(table.mmapped_state).tolist():
            rows = table.mmapped_state == state
            totals[ChunkState(state)] = StateTotal(int(rows.sum()), int(sizes[rows].sum()), int(usable[rows].sum()))
        return totals

    def snapshot(self, mmapped: MmappedFindings, gaps: list[Gap]) -> HeapSnapshot:
        table = _table(self.found.layout, self.walk, self.regions)
        arenas = tuple(self._arena(facts) for facts in self.survey.arenas)
        mmapped_totals = self._mmapped_totals(table)
        mapped = self.walk.index.mmapped
        others = (*self.survey.anomalies, *self.surplus, *mmapped.anomalies)
        all_anomalies = (*others, *self.walk.anomalies, *self.overlay.anomalies)
        count = len(others) + self.walk.anomaly_count + self.overlay.anomaly_count
        limit, reason = self._arena_limit()
        return HeapSnapshot(
            identity=self._identity(arenas, count, mmapped.evidence),
            parameters=self._parameters(),
            arenas=arenas,
            chunks=table,
            free_lists=tuple(self.overlay.lists),
            thread_caches=self._thread_caches(),
            narenas_limit=limit,
            limit_reason=reason,
            anomalies=all_anomalies,
            anomaly_count=count,
            gaps=(
                *self.survey.gaps,
                *gaps,
                *self.overlay.gaps,
                *self._range_gaps(),
                *mmapped.gaps,
                *self._mmapped_gaps(),
                *self._copy_gaps(),
            ),
            totals=sum_of_totals(region.totals for region in self.regions),
            own_ranges=self._own_ranges(),
            mmapped_totals=mmapped_totals,
            mmapped_count=len(mapped),
            mmapped_bytes=int(mapped.mapping_bytes.sum()),
        )

    def _own_ranges(self) -> tuple[AddressRange, ...]:
        """malloc_state of every arena, and malloc_par: their bins, top and last_remainder hold no block."""
        state_bytes, found = self.found.layout.state.byte_count, self.found.parameters
        ranges = [
            AddressRange(facts.address, facts.address + state_bytes)
            for facts in self.survey.arenas
            if facts.address is not None
        ]
        if found is not None:
            ranges.append(AddressRange(found.address, found.address + self.found.layout.parameters.byte_count))
        return tuple(ranges)

    def _arena(self, facts: ArenaFacts) -> Arena:
        state = facts.state
        regions = tuple(self.regions_of.get(facts.index, ()))
        totals = sum_of_totals(region.totals for region in regions)
        unattributed = tuple(self.walk.unattributed.get(facts.index, ()))
        sub_heaps = tuple(self._sub_heap(facts, number) for number in range(len(facts.sub_heaps)))
        threads: tuple[int, ...] = ()
        if facts.address is not None:
            words = self.found.thread_words
            threads = tuple(
                np.flatnonzero(words.arena == np.uint64(facts.address)).tolist()
                if words.arena_offset is not None
                else ()
            )
        return Arena(
            index=facts.index,
            address=facts.address,
            is_main=facts.is_main,
            is_contiguous=state.is_contiguous if state else None,
            locked=state.mutex != 0 if state else None,
            attached_threads=state.attached_threads if state else None,
            threads=threads,
            on_free_list=facts.on_free_list,
            system_mem=state.system_mem if state else None,
            max_system_mem=state.max_system_mem if state else None,
            top_address=state.top if state else None,
            top_bytes=facts.top_bytes,
            sub_heaps=sub_heaps,
            regions=tuple(region.index for region in regions),
            totals=totals,
            unattributed=unattributed,
            brk_range=facts.brk_range,
            foreign_bytes=_bytes_of(unattributed, "foreign_sbrk"),
            saved_bytes=self._saved_bytes(facts, regions),
            coverage=self._coverage(facts, regions, unattributed, sub_heaps),
        )

    def _saved_bytes(self, facts: ArenaFacts, regions: tuple[ChunkRegion, ...]) -> int:
        memory = self.core.memory
        if facts.sub_heaps:
            return sum(memory.saved_bytes_within(heap.address, heap.address + heap.size) for heap in facts.sub_heaps)
        return sum(region.range.byte_count for region in regions)

    def _coverage(
        self,
        facts: ArenaFacts,
        regions: tuple[ChunkRegion, ...],
        unattributed: tuple[UnattributedRange, ...],
        sub_heaps: tuple[SubHeap, ...],
    ) -> float | None:
        """Share of system_mem that the walk accounts for; None where system_mem is not in the core."""
        if facts.state is None:
            return None
        if not facts.state.system_mem:
            return 1.0
        walked = sum(region.range.byte_count for region in regions)
        walked += sum(heap.overhead_bytes for heap in sub_heaps)
        walked += _bytes_of(unattributed, "foreign_sbrk")
        if facts.is_main:
            walked += self._bytes_before_first_headers(facts, regions)
        if walked > facts.state.system_mem:
            self.surplus.append(
                Anomaly(
                    "more_than_system_mem",
                    facts.state.address,
                    f"heap memory of {facts.state.system_mem} bytes (system_mem)",
                    f"{walked} bytes that look like it",
                    facts.index,
                )
            )
        return min(1.0, walked / facts.state.system_mem)

    def _bytes_before_first_headers(self, facts: ArenaFacts, regions: tuple[ChunkRegion, ...]) -> int:
        """What lies before the first header of the brk range, or of each piece, so that payloads are aligned."""
        geometry = self.found.layout.geometry
        if facts.brk_range is not None:
            return (geometry.granule_phase - facts.brk_range.start) % geometry.alignment
        before = [region.range.start % self.core.page_bytes for region in regions]
        return sum(byte_count for byte_count in before if byte_count < geometry.alignment)

    def _sub_heap(self, facts: ArenaFacts, number: int) -> SubHeap:
        heap, layout, memory = facts.sub_heaps[number], self.found.layout, self.core.memory
        is_first = heap.address + layout.heap_info_bytes == facts.address
        end = heap.address + heap.size
        return SubHeap(
            address=heap.address,
            committed_bytes=heap.size,
            mprotect_bytes=heap.mprotect_size,
            reserved_bytes=facts.heap_max,
            overhead_bytes=layout.first_chunk_in_arena_heap if is_first else layout.heap_info_bytes,
            is_first=is_first,
            saved_bytes=memory.saved_bytes_within(heap.address, end),
            populated_bytes=(memory.populated_bytes(heap.address, end) if memory.holes_known else None),
        )

    def _range_gaps(self) -> list[Gap]:
        return [
            Gap(
                f"heap_{part.cause}",
                f"{part.range.byte_count} bytes of arena {arena} belong to chunks that cannot be told",
                part.range,
            )
            for arena, parts in sorted(self.walk.unattributed.items())
            for part in parts
            if part.cause != "foreign_sbrk"
        ]

    def _mmapped_gaps(self) -> list[Gap]:
        chosen = self.found.layout.generation
        gaps = [
            Gap(
                "release_unknown",
                f"{chosen.name} is assumed; releases that fit as well store mmapped chunks in another way, so these may be"
                " missing",
            )
            for other in GENERATIONS
            if other.name in self.found.alternatives and other.mmapped_trailer_words != chosen.mmapped_trailer_words
        ][:1]
        if self.found.parameters is not None:
            return gaps
        return [
            *gaps,
            Gap(
                "malloc_par_unknown",
                "mp_ was not found: thresholds are unknown and mmapped chunks could not be counted against n_mmaps",
            ),
        ]

    def _copy_gaps(self) -> list[Gap]:
        return [
            Gap(
                "other_malloc_copy",
                f"another copy of glibc's malloc, with main_arena at {format_address(address)}, has a heap of its own that is"
                " not in these numbers",
            )
            for address in self.found.other_copies
        ]

    def _thread_caches(self) -> tuple[ThreadCache, ...]:
        index = self.walk.index
        by_cache: dict[int, tuple[int, int]] = {}
        for free_list in self.overlay.lists:
            if free_list.thread_cache is not None:
                count, size = by_cache.get(free_list.thread_cache, (0, 0))
                by_cache[free_list.thread_cache] = (
                    count + free_list.count,
                    size + free_list.chunk_bytes,
                )
        caches = []
        for number, (cache, chunk) in enumerate(zip(self.caches, self.own_chunks, strict=True)):
            region = int(np.searchsorted(index.region_first_chunk, chunk, side="right")) - 1
            count, size = by_cache.get(number, (0, 0))
            caches.append(
                ThreadCache(
                    number,
                    cache.address,
                    cache.thread,
                    self.regions[region].arena if chunk >= 0 else None,
                    count,
                    size,
                )
            )
        return tuple(caches)

    def _parameters(self) -> MallocParameters | None:
        found = self.found.parameters
        if found is None:
            return None
        return MallocParameters(found.address, self.found.layout.generation.malloc_par, found.values)

    def _arena_limit(self) -> tuple[int | None, str]:
        layout = self.found.layout
        parameters = self.found.parameters
        if parameters is not None and parameters.values.get("arena_max"):
            return parameters.values["arena_max"], "arena_max is set"
        rule = {
            "none": "this release makes an arena whenever all are locked",
            "cpus": "the number of CPUs, which the core does not tell",
            "per_cpu": f"{layout.word_class.arenas_per_cpu} x CPUs; the core does not tell their number",
        }[layout.generation.arena_limit]
        return None, rule if parameters is not None else f"arena_max is unknown; by default {rule}"

    def _identity(self, arenas: tuple[Arena, ...], anomaly_count: int, more: tuple[Evidence, ...]) -> AllocatorIdentity:
        found = self.found
        evidence = [*found.evidence, *more]
        complete = [arena for arena in arenas if arena.coverage == 1.0 and arena.regions]
        proven = all(region.proven_to_end for region in self.regions)
        if complete and proven and not anomaly_count:
            evidence.append(
                Evidence(
                    f"chunks tile all heaps from the first byte to the last in {len(complete)} of {len(arenas)} arenas",
                    "chunk walk",
                    Strength.PROOF,
                )
            )
        names = [found.layout.generation.name, *found.alternatives]
        return AllocatorIdentity(
            name="glibc",
            libc_version=str(found.libc_version) if found.libc_version else None,
            layout=" or ".join(names),
            runner_up=found.runner_up,
            main_arena=found.ring.main,
            mp=found.parameters.address if found.parameters else None,
            evidence=tuple(evidence),
            confidence=confidence_from(evidence),
        )


def _bytes_of(parts: tuple[UnattributedRange, ...], cause: str) -> int:
    return sum(part.range.byte_count for part in parts if part.cause == cause)
