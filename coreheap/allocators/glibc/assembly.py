"""Puts the parts of the analysis into the values of ``heap``: totals, coverage, gaps, identity.

Knows: what each figure of the result is made of. Does not know: how any part was found.
"""

from __future__ import annotations

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts, ArenaSurvey
from coreheap.allocators.glibc.copies import Copies
from coreheap.allocators.glibc.identify import Identification
from coreheap.allocators.glibc.integrity import Integrity
from coreheap.allocators.glibc.judgement import Judge
from coreheap.allocators.glibc.layouts import GENERATIONS
from coreheap.allocators.glibc.mmapped import MmappedFindings
from coreheap.allocators.glibc.overlay import Overlay
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.tcache import Cache
from coreheap.allocators.glibc.walk import HeapWalk
from coreheap.corefile import Core
from coreheap.evidence import Anomaly, Evidence, Gap, Strength, confidence_from
from coreheap.heap import (
    BINNED_STATES,
    AllocatorIdentity,
    Arena,
    ChunkRegion,
    ChunkTable,
    HeapSnapshot,
    MallocCopy,
    MallocParameters,
    StateTotal,
    StateTotals,
    SubHeap,
    ThreadCache,
    UnattributedRange,
    sum_of_totals,
)
from coreheap.kernels import ChunkState, state_totals
from coreheap.quantities import AddressRange

STATES_WITHOUT_USABLE_BYTES = (ChunkState.FENCEPOST, ChunkState.DAMAGED)


def chunk_table(layout: Layout, walk: HeapWalk, regions: tuple[ChunkRegion, ...]) -> ChunkTable:
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


class Assembly:
    """Puts the parts of the analysis into the values of ``heap``."""

    def __init__(
        self,
        core: Core,
        copies: Copies,
        survey: ArenaSurvey,
        walk: HeapWalk,
        overlay: Overlay,
        caches: list[list[Cache]],
        own_chunks: list[int],
        judge: Judge,
        integrity: Integrity,
    ) -> None:
        """``caches`` by copy of malloc; ``own_chunks`` has the chunk index of each, in the same order."""
        self.judge = judge
        self.integrity = integrity
        self.core = core
        self.copies = copies
        self.found = copies.found[0]
        self.layout = self.found.layout
        self.survey = survey
        self.walk = walk
        self.overlay = overlay
        self.caches = caches
        self.own_chunks = own_chunks
        self.word = self.layout.word_class.word_bytes
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
        table = chunk_table(self.layout, self.walk, self.regions)
        arenas = tuple(self._arena(facts) for facts in self.survey.arenas)
        mmapped_totals = self._mmapped_totals(table)
        mapped = self.walk.index.mmapped
        others = (*self.survey.anomalies, *self.surplus, *mmapped.anomalies)
        walked = [anomaly for anomaly in self.walk.anomalies if not self._is_of_a_bin(anomaly)]
        self.walk.anomaly_count -= len(self.walk.anomalies) - len(walked)
        found = [self.judge.completed(anomaly, self.walk.index) for anomaly in (*others, *walked)]
        all_anomalies = (*found, *self.overlay.anomalies, *self.integrity.anomalies)
        count = len(others) + self.walk.anomaly_count + self.overlay.anomaly_count + self.integrity.anomaly_count
        limit, reason = self._arena_limit()
        more = [*mmapped.evidence, *self._tiling(arenas, count)]
        copies = tuple(self._copy(number, arenas, more) for number in range(len(self.copies.found)))
        return HeapSnapshot(
            identity=self._identity(copies, more),
            parameters=_parameters(self.found),
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
                *(hole.gap for hole in self.walk.holes),
                *mmapped.gaps,
                *self._mmapped_gaps(),
                *self.copies.gaps,
            ),
            totals=sum_of_totals(region.totals for region in self.regions),
            own_ranges=self._own_ranges(),
            mmapped_totals=mmapped_totals,
            mmapped_count=len(mapped),
            mmapped_bytes=int(mapped.mapping_bytes.sum()),
            copies=copies,
        )

    def _is_of_a_bin(self, anomaly: Anomaly) -> bool:
        """Whether an arena's flag is missing only because the chunk is on a bin, where no chunk has it, and looks in use."""
        chunk = self.walk.index.chunk_starting_at(anomaly.address) if anomaly.code == "arena_flag_mismatch" else -1
        return chunk >= 0 and self.walk.index.state[chunk] in BINNED_STATES

    def _own_ranges(self) -> tuple[AddressRange, ...]:
        """malloc_state of every arena, and malloc_par: their bins, top and last_remainder hold no chunk."""
        layout = self.found.layout
        ranges = [
            AddressRange(facts.address, facts.address + layout.state.byte_count)
            for facts in self.survey.arenas
            if facts.address is not None
        ]
        for copy in self.copies.found:
            if copy.parameters is not None:
                start = copy.parameters.address
                ranges.append(AddressRange(start, start + layout.parameters.byte_count))
        return tuple(ranges)

    def _copy(self, number: int, arenas: tuple[Arena, ...], more: list[Evidence]) -> MallocCopy:
        """One copy of malloc; ``more`` is evidence that all copies share."""
        found = self.copies.found[number]
        own = [arena for arena in arenas if arena.copy == number]
        held = [arena.system_mem for arena in own]
        main = found.ring.main
        module = None if main is None else self.core.module_at(main)
        return MallocCopy(
            number=number,
            main_arena=main,
            module=module.path or None if module is not None else None,
            parameters=_parameters(found),
            arena_count=len(own),
            system_mem=None if None in held else sum(byte_count or 0 for byte_count in held),
            evidence=found.evidence,
            confidence=confidence_from([*found.evidence, *more]),
        )

    def _arena(self, facts: ArenaFacts) -> Arena:
        state = facts.state
        regions = tuple(self.regions_of.get(facts.index, ()))
        totals = sum_of_totals(region.totals for region in regions)
        unattributed = tuple(self.walk.unattributed.get(facts.index, ()))
        sub_heaps = tuple(self._sub_heap(facts, number) for number in range(len(facts.sub_heaps)))
        threads: tuple[int, ...] = ()
        if facts.address is not None:
            words = self.copies.found[facts.copy].thread_words
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
            foreign_bytes=_bytes_of(unattributed, "foreign_sbrk") + self._bytes_of_other_copies(facts),
            saved_bytes=self._saved_bytes(facts, regions),
            coverage=self._coverage(facts, regions, unattributed, sub_heaps),
            copy=facts.copy,
        )

    def _bytes_of_other_copies(self, facts: ArenaFacts) -> int:
        """What other copies' main arenas have of a break that a main arena counts as its own from end to end."""
        place = facts.brk_range
        if place is None or len(self.copies.found) == 1:
            return 0
        total = 0
        for other in self.survey.arenas:
            if other.is_main and other.index != facts.index:
                parts = (*self.regions_of.get(other.index, ()), *self.walk.unattributed.get(other.index, ()))
                total += sum(part.range.byte_count for part in parts if part.range.start in place)
                if other.brk_range is not None and other.brk_range.start in place:
                    total += self._bytes_before_first_headers(other, ())
        return total

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
        walked += _bytes_of(unattributed, "foreign_sbrk") + self._bytes_of_other_copies(facts)
        if facts.is_main:
            walked += self._bytes_before_first_headers(facts, regions)
        # Behind a damaged header nothing says how far a heap really reaches; a damaged system_mem is told already.
        known = (*self.walk.anomalies, *self.survey.anomalies)
        is_whole = all(anomaly.arena != facts.index for anomaly in known)
        if walked > facts.state.system_mem and is_whole:
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
        geometry = self.layout.geometry
        if facts.brk_range is not None:
            return (geometry.granule_phase - facts.brk_range.start) % geometry.alignment
        before = [region.range.start % self.core.page_bytes for region in regions]
        return sum(byte_count for byte_count in before if byte_count < geometry.alignment)

    def _sub_heap(self, facts: ArenaFacts, number: int) -> SubHeap:
        heap, layout, memory = facts.sub_heaps[number], self.layout, self.core.memory
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
        if all(found.parameters is not None for found in self.copies.found):
            return gaps
        return [
            *gaps,
            Gap(
                "malloc_par_unknown",
                "mp_ was not found: thresholds are unknown and mmapped chunks could not be counted against n_mmaps",
            ),
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
        owned = [(copy, cache) for copy, of_copy in enumerate(self.caches) for cache in of_copy]
        for number, ((copy, cache), chunk) in enumerate(zip(owned, self.own_chunks, strict=True)):
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
                    copy,
                )
            )
        return tuple(caches)

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

    def _identity(self, copies: tuple[MallocCopy, ...], more: list[Evidence]) -> AllocatorIdentity:
        found = self.found
        names = [found.layout.generation.name, *found.alternatives]
        return AllocatorIdentity(
            name="glibc",
            libc_version=str(found.libc_version) if found.libc_version else None,
            layout=" or ".join(names),
            runner_up=found.runner_up,
            main_arena=found.ring.main,
            mp=found.parameters.address if found.parameters else None,
            evidence=(*found.evidence, *more),
            # The figures are sums over all copies: they are as sure as the least sure of these.
            confidence=min((copy.confidence for copy in copies), key=lambda confidence: confidence.rank),
        )

    def _tiling(self, arenas: tuple[Arena, ...], anomaly_count: int) -> list[Evidence]:
        """That the walk left no byte of any heap over, where it did not."""
        complete = [arena for arena in arenas if arena.coverage == 1.0 and arena.regions]
        proven = all(region.proven_to_end for region in self.regions)
        if not complete or not proven or anomaly_count:
            return []
        statement = f"chunks tile all heaps from the first byte to the last in {len(complete)} of {len(arenas)} arenas"
        return [Evidence(statement, "chunk walk", Strength.PROOF)]


def _parameters(found: Identification) -> MallocParameters | None:
    if found.parameters is None:
        return None
    return MallocParameters(found.parameters.address, found.layout.generation.malloc_par, found.parameters.values)


def _bytes_of(parts: tuple[UnattributedRange, ...], cause: str) -> int:
    return sum(part.range.byte_count for part in parts if part.cause == cause)
