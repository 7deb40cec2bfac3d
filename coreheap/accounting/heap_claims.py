"""What malloc has of the address space, as claims.

Knows: where a HeapSnapshot says its memory is. Does not know: what else is mapped.
"""

from __future__ import annotations

import numpy as np

from coreheap.accounting.claims import Claims
from coreheap.heap import HeapSnapshot, RegionKind
from coreheap.mappings import MappingKind

MAIN, OTHER = "main", "arena"
"""The parts of the main arenas' memory begin with the one word, those of all other arenas with the other."""
CHUNKS, HEADERS, ALIGNMENT, RESERVE, UNEXPLAINED = "chunks", "headers", "alignment", "reserve", "unexplained"


def heap_claims(heap: HeapSnapshot, claims: Claims) -> None:
    """Claim the heap's ranges, the most particular first: what an arena spans is unexplained where nothing else claims it."""
    regions = heap.chunks.regions
    for kind, prefix, of_sub_heaps in (
        (MappingKind.MAIN_ARENA, MAIN, False),
        (MappingKind.ARENA_HEAP, OTHER, True),
    ):
        own = [region for region in regions if (region.kind is RegionKind.ARENA_HEAP) is of_sub_heaps]
        claims.add(
            kind,
            [region.range.start for region in own],
            [region.range.end for region in own],
            arena=[region.arena for region in own],
            part=f"{prefix}_{CHUNKS}",
        )
    mmapped = heap.chunks.index.mmapped
    claims.add(
        MappingKind.MMAPPED_CHUNK,
        mmapped.mapping_start,
        mmapped.mapping_start + np.minimum(mmapped.mapping_bytes, ~mmapped.mapping_start),
    )
    for arena in heap.arenas:
        kind, prefix = (MappingKind.MAIN_ARENA, MAIN) if arena.is_main else (MappingKind.ARENA_HEAP, OTHER)
        claims.add(
            kind,
            [unattributed.range.start for unattributed in arena.unattributed],
            [unattributed.range.end for unattributed in arena.unattributed],
            arena=arena.index,
            part=[claims.part_number(f"{prefix}_{unattributed.cause}") for unattributed in arena.unattributed],
        )
    sub_heaps = [(arena.index, sub_heap) for arena in heap.arenas for sub_heap in arena.sub_heaps]
    address = [sub_heap.address for _, sub_heap in sub_heaps]
    for kind, part, spans in (
        (MappingKind.ARENA_HEAP, HEADERS, [sub_heap.overhead_bytes for _, sub_heap in sub_heaps]),
        (MappingKind.ARENA_HEAP, UNEXPLAINED, [sub_heap.committed_bytes for _, sub_heap in sub_heaps]),
        (MappingKind.ARENA_RESERVE, RESERVE, [sub_heap.reserved_bytes for _, sub_heap in sub_heaps]),
    ):
        claims.add(
            kind,
            address,
            [start + span for start, span in zip(address, spans, strict=True)],
            arena=[index for index, _ in sub_heaps],
            part=f"{OTHER}_{part}",
        )
    headers = heap.chunks.index.geometry
    by_brk = [(arena.index, arena.brk_range) for arena in heap.arenas if arena.brk_range is not None]
    for index, brk_range in by_brk:
        # The first header is where the payload behind it is aligned: 8 bytes into the page with 4-byte words.
        skipped = (headers.granule_phase - brk_range.start) % headers.alignment
        end = brk_range.start + skipped
        claims.add(MappingKind.MAIN_ARENA, brk_range.start, end, arena=index, part=f"{MAIN}_{ALIGNMENT}")
    # Last: the ranges of two copies of malloc that take turns at the break lie in each other.
    for index, brk_range in by_brk:
        claims.add(MappingKind.MAIN_ARENA, brk_range.start, brk_range.end, arena=index, part=f"{MAIN}_{UNEXPLAINED}")
