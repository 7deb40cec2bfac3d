"""The free memory of a process, heap by heap: ``survey_free_memory``.

Knows: in which order runs, trim and pins are asked, and how their numbers belong together. Does not know: how runs are found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.free_memory import ArenaFreeMemory, FreeMemoryReport, HeapFreeMemory, Pin, TopStays
from coreheap.heap import Arena, ChunkState, HeapSnapshot, StateTotals, SubHeap, sum_of_totals
from coreheap.mappings import ResidencyBasis
from coreheap.retention.arena_max import arena_max_estimates
from coreheap.retention.pins import gaps_of, largest_pins, pin_chain, reported_pins
from coreheap.retention.runs import RegionRuns, RunColumns, runs_of, sums_between
from coreheap.retention.trim import PageResidency, ends_at_break, estimates, trim_spans

HolderNames = Callable[[Sequence[npt.NDArray[np.int64]]], Sequence[str | None]]
"""For each group of chunks what holds the first of them that a root holds directly (``Namer.typical_holders``)."""


def survey_free_memory(
    core: Core,
    heap: HeapSnapshot,
    basis: ResidencyBasis = ResidencyBasis.UNKNOWN,
    holders: HolderNames | None = None,
) -> FreeMemoryReport:
    """Free memory of all arenas: one pass over all chunks.

    ``basis`` says what the core tells of pages that were in memory; UNKNOWN reads nothing for it. Without ``holders`` pins
    have none.
    """
    residency = PageResidency(core, basis)
    heaps = [
        _Heap(arena, sub_heap, runs_of(heap, regions, core.page_bytes))
        for arena in heap.arenas
        for sub_heap, regions in _heaps_of(heap, arena)
    ]
    parts = [part for each in heaps for part in each.parts]
    # Where each heap's regions begin; there may be thousands of heaps, so what can be is done for all at once.
    first_part = np.cumsum([0, *(len(each.parts) for each in heaps)], dtype=np.int64)
    runs = RunColumns.of(parts)
    gaps, gap_rows = gaps_of(heap.chunks, parts, runs)
    heap_gaps = gap_rows[first_part].tolist()
    run_rows = runs.rows[first_part]
    whole_pages = sums_between(runs.page_end - runs.page_start, run_rows)
    low, high = (sums_between(column, run_rows) for column in residency.of_each(runs.page_start, runs.page_end))
    trims = estimates([trim_spans(core, heap, each.arena, each.parts) for each in heaps], residency)
    found: dict[int, list[HeapFreeMemory]] = {arena.index: [] for arena in heap.arenas}
    candidates: list[tuple[Pin, int]] = []
    for row, each in enumerate(heaps):
        arena, own_gaps = each.arena, gaps.between(heap_gaps[row], heap_gaps[row + 1])
        candidates.extend(largest_pins(arena.index, each.sub_heap, own_gaps))
        totals = sum_of_totals(part.region.totals for part in each.parts)
        place = arena.sub_heaps[each.sub_heap] if each.sub_heap is not None else None
        free = sum(part.runs.free_bytes for part in each.parts)
        shared = free - whole_pages[row]
        found[arena.index].append(
            HeapFreeMemory(
                arena=arena.index,
                sub_heap=each.sub_heap,
                address=place.address if place is not None else None,
                committed_bytes=_committed(arena, place, each.parts),
                live_count=totals[ChunkState.IN_USE].count + totals[ChunkState.ALLOCATOR_OWN].count,
                live_bytes=totals[ChunkState.IN_USE].chunk_bytes + totals[ChunkState.ALLOCATOR_OWN].chunk_bytes,
                tcache_bytes=totals[ChunkState.TCACHE].chunk_bytes,
                free_bytes=free,
                unlisted_bytes=totals[ChunkState.FREE_UNLISTED].chunk_bytes,
                top_bytes=totals[ChunkState.TOP].chunk_bytes,
                largest_free_bytes=max((part.runs.largest_bytes for part in each.parts), default=0),
                whole_page_bytes=whole_pages[row],
                shared_page_bytes=shared,
                trim=trims[row],
                top_stays=_top_stays(core, heap, arena, each.parts, totals),
                pins=pin_chain(heap.chunks, own_gaps),
                free_resident_low=low[row],
                # A page that free memory shares with other chunks was in memory, as far as is known, or not.
                free_resident_high=high[row] + shared,
            )
        )
    arenas = [ArenaFreeMemory(arena.index, tuple(found[arena.index])) for arena in heap.arenas]
    pins = reported_pins(heap, candidates)
    if holders is not None:
        names = holders([np.array([pin.first_chunk], np.int64) for pin in pins])
        pins = tuple(replace(pin, holder=name) for pin, name in zip(pins, names, strict=True))
    return FreeMemoryReport(
        page_bytes=core.page_bytes,
        arenas=tuple(arenas),
        pins=pins,
        arena_max=arena_max_estimates(heap.arenas, arenas),
        basis=basis,
    )


@dataclass(frozen=True, slots=True)
class _Heap:
    """One heap of an arena, and the runs of each of its regions. ``sub_heap`` None: the main arena's memory."""

    arena: Arena
    sub_heap: int | None
    parts: tuple[RegionRuns, ...]


def _heaps_of(heap: HeapSnapshot, arena: Arena) -> Iterator[tuple[int | None, tuple[int, ...]]]:
    """Each heap of an arena, by its index of sub-heaps (None: the main arena's memory), and its regions by address."""
    if arena.is_main:
        yield None, arena.regions
        return
    of_heap: dict[int, list[int]] = {number: [] for number in range(len(arena.sub_heaps))}
    for region in arena.regions:
        of_heap.setdefault(heap.chunks.regions[region].sub_heap, []).append(region)
    for number in range(len(arena.sub_heaps)):
        yield number, tuple(of_heap[number])


def _committed(arena: Arena, place: SubHeap | None, parts: Sequence[RegionRuns]) -> int:
    """What the heap may use: heap_info.size, or of the main arena all that is its own."""
    if place is not None:
        return place.committed_bytes
    walked = sum(part.region.range.byte_count for part in parts)
    return max((arena.system_mem or 0) - arena.foreign_bytes, walked)


def _top_stays(
    core: Core, heap: HeapSnapshot, arena: Arena, parts: Sequence[RegionRuns], totals: StateTotals
) -> TopStays:
    """Why free() has left the heap's end as it is."""
    ends = [part for part in parts if part.runs.has_top.any()]
    if not ends:
        is_older = not arena.is_main and bool(parts) and all(part.region.proven_to_end for part in parts)
        return TopStays.NO_TOP if is_older else TopStays.UNKNOWN
    if arena.is_main and ends_at_break(core, ends[-1]) is False:
        return TopStays.NOT_AT_BREAK
    parameters = heap.copies[arena.copy].parameters if heap.copies else heap.parameters
    threshold = parameters.value("trim_threshold") if parameters else None
    if parameters is None or threshold is None:
        return TopStays.UNKNOWN
    top_bytes = totals[ChunkState.TOP].chunk_bytes
    if top_bytes < threshold:
        return TopStays.BELOW_THRESHOLD
    # systrim and heap_trim (malloc.c, all releases) leave MINSIZE and top_pad, and cut whole pages of the rest.
    beyond = top_bytes - heap.chunks.index.geometry.minimum_chunk_bytes - 1 - (parameters.value("top_pad") or 0)
    return TopStays.KEPT_BY_TOP_PAD if beyond < core.page_bytes else TopStays.NO_LARGE_FREE
