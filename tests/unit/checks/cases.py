"""Heaps of chosen numbers for checks that look at sums only."""

from __future__ import annotations

import dataclasses

from coreheap.checks import Case
from coreheap.heap import Arena, ChunkState, StateTotal, StateTotals, SubHeap, sum_of_totals

HEAP_MAX = 64 << 20
FIRST_HEAP = 0x7F00_0000_0000


def totals_of(**chunk_bytes: int) -> StateTotals:
    """Totals with one chunk for each state that is given by its label."""
    totals = {state: StateTotal() for state in ChunkState}
    for label, byte_count in chunk_bytes.items():
        totals[ChunkState[label.upper()]] = StateTotal(1, byte_count, byte_count - 8)
    return totals


def arena_of(index: int, *, coverage: float | None = 1.0, committed: int | None = None, **chunk_bytes: int) -> Arena:
    """A non-main arena of one sub-heap whose chunks have so many bytes in each state; by default nothing else is in it."""
    totals = totals_of(**chunk_bytes)
    address = FIRST_HEAP + index * HEAP_MAX
    size = committed if committed is not None else sum(total.chunk_bytes for total in totals.values())
    sub_heap = SubHeap(address, size, size, HEAP_MAX, 0x8D0, True, size, None)
    return Arena(
        index=index,
        address=address + 0x30,
        is_main=False,
        is_contiguous=False,
        locked=False,
        attached_threads=1,
        threads=(index,),
        on_free_list=False,
        system_mem=size,
        max_system_mem=size,
        top_address=address + size,
        top_bytes=0,
        sub_heaps=(sub_heap,),
        regions=(),
        totals=totals,
        unattributed=(),
        brk_range=None,
        foreign_bytes=0,
        saved_bytes=size,
        coverage=coverage,
    )


def with_arenas(case: Case, *arenas: Arena) -> Case:
    """The case with other non-main arenas, and an empty main arena in front; totals follow."""
    assert case.heap is not None
    main = case.heap.main_arena
    assert main is not None
    everything = (dataclasses.replace(main, totals=totals_of()), *arenas)
    heap = dataclasses.replace(case.heap, arenas=everything, totals=sum_of_totals(arena.totals for arena in everything))
    return dataclasses.replace(case, heap=heap)


def without_heap(case: Case) -> Case:
    return dataclasses.replace(case, heap=None)
