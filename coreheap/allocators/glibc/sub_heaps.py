"""The sub-heaps of an arena: their chain from top along prev, with what is damaged in it named and put right where it can be.

Knows: heap_info, and that every sub-heap names its arena. Does not know: arenas as a whole (``arenas``), or chunks.
"""

from __future__ import annotations

from dataclasses import replace

from coreheap.allocators.glibc.identify import Identification
from coreheap.allocators.glibc.records import (
    FREE_LIST_LIMIT,
    ArenaState,
    HeapInfo,
    Layout,
    heap_info_is_plausible,
    read_heap_info,
)
from coreheap.corefile import Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Anomaly, Gap
from coreheap.quantities import AddressRange, format_address

END_MARKER = 1
"""The size word behind the last fencepost of a retired sub-heap: size 0 and PREV_INUSE."""


def chain_of(
    core: Core,
    found: Identification,
    state: ArenaState,
    index: int,
    by_header: dict[int, HeapInfo],
    anomalies: list[Anomaly],
    gaps: list[Gap],
) -> dict[int, HeapInfo]:
    """Sub-heaps from the one that holds top along prev; by address. ``by_header`` are those that name this arena themselves."""
    chain: dict[int, HeapInfo] = {}
    at = state.top & ~(found.heap_max - 1)
    pointer = state.address + found.layout.state.offset("top"), state.top
    while at and at not in chain and len(chain) < FREE_LIST_LIMIT:
        try:
            heap = read_heap_info(core.memory, at, found.layout)
        except MemoryFault as fault:
            if core.memory.region_index(at) is None and by_header:
                anomalies.append(_wrong_pointer(pointer, index, "unmapped memory", by_header, chain))
                break
            gaps.append(
                Gap(
                    "sub_heap_not_saved",
                    f"the heap_info at {format_address(at)} of arena {index} is not in the core ({fault.cause}): older"
                    " sub-heaps may be missing",
                    AddressRange(at, at + found.layout.heap_info_bytes),
                )
            )
            break
        is_plausible = heap_info_is_plausible(heap, found.heap_max, core.page_bytes)
        is_others = heap.ar_ptr in found.ring.members or not _names_one_field(heap, state, found, core)
        if heap.ar_ptr != state.address and is_others and by_header and at not in by_header:
            anomalies.append(_wrong_pointer(pointer, index, "no sub-heap of the arena", by_header, chain))
            break
        if heap.ar_ptr != state.address or not is_plausible:
            anomalies.append(_damaged_header(heap, state, found, core, index))
            repaired = _repaired(heap, state, found, core)
            if repaired is None:
                break
            heap = repaired
        chain[at] = heap
        pointer = at + found.layout.heap_info.offset("prev"), heap.prev
        at = heap.prev
    return chain


def _wrong_pointer(
    pointer: tuple[int, int], index: int, observed: str, by_header: dict[int, HeapInfo], chain: dict[int, HeapInfo]
) -> Anomaly:
    """top or a prev that leads to no sub-heap of its arena, though there are some."""
    place, word = pointer
    left = sorted(set(by_header) - set(chain))
    return Anomaly(
        "heap_info_damaged" if chain else "top_damaged",
        place,
        "prev of a sub-heap, to an older one of its arena" if chain else "top inside the arena's newest sub-heap",
        f"{format_address(word)}, {observed}",
        index,
        word_address=place,
        observed_word=word,
        expected_word=left[0] if chain and len(left) == 1 else None,
    )


def _names_one_field(heap: HeapInfo, state: ArenaState, found: Identification, core: Core) -> bool:
    """Whether a heap_info is its arena's own but for ar_ptr."""
    repaired = replace(heap, ar_ptr=state.address)
    return heap_info_is_plausible(repaired, found.heap_max, core.page_bytes)


def _repaired(heap: HeapInfo, state: ArenaState, found: Identification, core: Core) -> HeapInfo | None:
    """A damaged heap_info that the arena's own pointers lead to, as far as it can be told; None without a size.

    The chain ends at it where its prev is not to be believed; what it would have led to is still named by its own ar_ptr.
    """
    page, most = core.page_bytes, found.heap_max
    size = heap.size
    if not 0 < size <= most or size % page:
        top_bytes = size_at(core, state.top) or 0
        size = state.top + top_bytes - heap.address
        if not heap.address <= state.top < heap.address + most or not 0 < size <= most or size % page:
            return None
    prev = heap.prev if heap.prev % most == 0 and heap.prev != heap.address else 0
    return HeapInfo(heap.address, state.address, prev, size, max(size, min(heap.mprotect_size, most)))


def _damaged_header(heap: HeapInfo, state: ArenaState, found: Identification, core: Core, index: int) -> Anomaly:
    """A heap_info of an arena one of whose fields cannot be right; the first such field is named."""
    page, most = core.page_bytes, found.heap_max
    is_first = heap.address + found.layout.heap_info_bytes == state.address
    wrong = [
        (name, observed, expected)
        for name, observed, holds, expected in (
            ("ar_ptr", heap.ar_ptr, heap.ar_ptr == state.address, state.address),
            ("prev", heap.prev, heap.prev % most == 0 and heap.prev != heap.address, 0 if is_first else None),
            ("size", heap.size, 0 < heap.size <= most and heap.size % page == 0, None),
            ("mprotect_size", heap.mprotect_size, heap.size <= heap.mprotect_size <= most, None),
        )
        if not holds
    ]
    name, observed, expected = wrong[0] if wrong else ("ar_ptr", heap.ar_ptr, state.address)
    return Anomaly(
        "sub_heap_header_damaged",
        heap.address,
        f"ar_ptr {format_address(state.address)} and sizes up to {most:#x}",
        f"ar_ptr {format_address(heap.ar_ptr)}, size {heap.size:#x}, prev {format_address(heap.prev)}",
        index,
        word_address=heap.address + found.layout.heap_info.offset(name),
        observed_word=observed,
        expected_word=expected,
    )


def heap_of_another_size(
    core: Core, layout: Layout, state: ArenaState, chain: dict[int, HeapInfo], missing: int
) -> HeapInfo | None:
    """The sub-heap that ends ``missing`` bytes further on than it says, as its top or its end marker shows; None where none does.

    With that size the sub-heaps add up to system_mem, so the two agree against the one field.
    """
    top_end = state.top + (size_at(core, state.top) or 0)
    for heap in chain.values():
        end = heap.address + heap.size + missing
        if end <= heap.address:
            continue
        if heap.address <= state.top < end:
            is_right = top_end == end
        else:
            marker = end - layout.word_class.alignment
            try:
                is_right = core.memory.read_word(marker + core.word_bytes) == END_MARKER
            except MemoryFault:
                is_right = False
        if is_right:
            return replace(heap, size=heap.size + missing, mprotect_size=max(heap.mprotect_size, heap.size + missing))
    return None


def wrong_size(layout: Layout, heap: HeapInfo, size: int, index: int) -> Anomaly:
    return Anomaly(
        "sub_heap_header_damaged",
        heap.address,
        f"size {size:#x}, up to its top or its end marker",
        f"size {heap.size:#x}",
        index,
        word_address=heap.address + layout.heap_info.offset("size"),
        observed_word=heap.size,
        expected_word=size,
    )


def age_in(heap: HeapInfo, chain: dict[int, HeapInfo]) -> tuple[int, int]:
    """How many older sub-heaps the prev chain names behind this one, for an order of oldest first."""
    steps, at = 0, heap
    while at.prev in chain and steps <= len(chain):
        steps, at = steps + 1, chain[at.prev]
    return steps, heap.address


def size_at(core: Core, header: int) -> int | None:
    try:
        return core.memory.read_word(header + core.word_bytes) & ~7
    except MemoryFault:
        return None
