"""What malloc has of the address space, as claims; and what others took from the same break.

Knows: where a HeapSnapshot says its memory is, and that the break is one mapping. Does not know: what else is mapped.
"""

from __future__ import annotations

import numpy as np

from coreheap.accounting.claims import NOBODY, Claims
from coreheap.corefile import Core
from coreheap.errors import MemoryFault
from coreheap.heap import HeapSnapshot, RegionKind
from coreheap.mappings import MappingKind

MAIN, OTHER = "main", "arena"
"""The parts of the main arenas' memory begin with the one word, those of all other arenas with the other."""
FOREIGN = "foreign_sbrk"
"""What somebody other than malloc took from the break, as ``UnattributedRange.cause`` and as a part of the main arena."""
CURRENT_BREAK = "__curbrk"
"""Exported by every libc.so.6 (misc/brk.c); a program that is linked statically has it in its symbol table."""
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
        malloc_kind, prefix = (MappingKind.MAIN_ARENA, MAIN) if arena.is_main else (MappingKind.ARENA_HEAP, OTHER)
        for claimed, is_foreign in ((MappingKind.FOREIGN_SBRK, True), (malloc_kind, False)):
            parts = [part for part in arena.unattributed if (part.cause == FOREIGN) is is_foreign]
            if parts:
                claims.add(
                    claimed,
                    [part.range.start for part in parts],
                    [part.range.end for part in parts],
                    arena=arena.index,
                    part=[claims.part_number(f"{prefix}_{part.cause}") for part in parts],
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


def break_claims(core: Core, heap: HeapSnapshot, claims: Claims) -> None:
    """Claim what is left of the break's mapping before sbrk_base and after the end of top: sbrk was called there by others.

    To be called after all others: a program's bss may touch the break. Where libc's __curbrk tells the end of the break, what lies
    after top is known to be of the break; else nothing but its place tells what it is. Less than a page is what the kernel and
    malloc align. An emulator keeps pages of a break that went down.
    """
    memory, page = core.memory, core.page_bytes
    if core.made_by == "qemu":
        return
    break_end = _break_end(core, heap)
    found: list[tuple[int, int, int, bool]] = []
    for arena in heap.arenas:
        place = arena.brk_range
        # Where malloc's own sum says otherwise, its heap may end elsewhere.
        if place is None or not place.byte_count or place.byte_count != arena.system_mem:
            continue
        first, last = memory.region_index(place.start), memory.region_index(place.end - 1)
        if first is not None:
            found.append((int(memory.region_start[first]), place.start, arena.index, True))
        if last is not None:
            end = int(memory.region_end[last])
            found.append((place.end, end, arena.index, end != break_end))
    if not any(arena.brk_range is not None for arena in heap.arenas) and break_end is not None:
        # malloc took nothing from it.
        region = memory.region_index(break_end - 1)
        if region is not None and int(memory.region_end[region]) == break_end and memory.region_file_index[region] < 0:
            found.append((int(memory.region_start[region]), break_end, NOBODY, True))
    for low, high, index, is_supposed in found:
        if high >= low + page:
            claims.add(
                MappingKind.FOREIGN_SBRK,
                low,
                high,
                arena=index,
                part=f"{MAIN}_{FOREIGN}",
                is_supposed=is_supposed,
            )


def _break_end(core: Core, heap: HeapSnapshot) -> int | None:
    """Where the break's mapping ends, by the variable that libc's brk and sbrk keep it in; None where that is not told."""
    paths = {copy.module for copy in heap.copies}
    for module in core.modules:
        address = module.symbol_address(CURRENT_BREAK) if module.path in paths else None
        if address is None:
            continue
        try:
            end = core.memory.read_word(address)
        except MemoryFault:
            continue
        if end:
            return end + -end % core.page_bytes
    return None
