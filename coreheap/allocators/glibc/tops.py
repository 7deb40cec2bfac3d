"""Where an arena's top is when malloc_state's pointer to it is wrong.

Knows: top is the last chunk of its heap and ends where that ends. Does not know: any other chunk.
"""

from __future__ import annotations

from dataclasses import replace

from coreheap.allocators.glibc.arenas import ArenaFacts, ArenaSurvey
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import FLAGS, PREV_INUSE
from coreheap.corefile import Core
from coreheap.evidence import Anomaly
from coreheap.kernels import StopReason, chain_reaches
from coreheap.quantities import format_address

NO_TOP = -1
SUPERSEDED = ("top_damaged", "top_not_at_end_of_brk")
"""What is known of a wrong top before the chunks of its heap are looked at."""


def with_true_tops(core: Core, layout: Layout, survey: ArenaSurvey) -> ArenaSurvey:
    """The survey with every top put right that the chunks before it prove to be elsewhere in its heap, and an anomaly for each.

    Only where the pointer leads between the chunks: where it leads to one, it may be that chunk's size that is wrong.
    """
    arenas, anomalies = list(survey.arenas), list(survey.anomalies)
    for number, facts in enumerate(arenas):
        place = _heap_of_top(layout, facts)
        if facts.state is None or place is None or facts.top_bytes == place[1] - facts.state.top:
            continue
        top = _last_chunk(core, layout, *place, facts.state.top)
        if top is None:
            continue
        anomalies = [other for other in anomalies if other.code not in SUPERSEDED or other.arena != facts.index]
        anomalies.append(
            Anomaly(
                "top_damaged",
                facts.state.address,
                f"top at {format_address(top)}, the last chunk of its heap",
                f"{format_address(facts.state.top)}, where no chunk starts",
                facts.index,
                word_address=facts.state.address + layout.state.offset("top"),
                observed_word=facts.state.top,
                expected_word=top,
            )
        )
        arenas[number] = replace(facts, state=replace(facts.state, top=top), top_bytes=place[1] - top)
    return replace(survey, arenas=tuple(arenas), anomalies=tuple(anomalies))


def _heap_of_top(layout: Layout, facts: ArenaFacts) -> tuple[int, int] | None:
    """First header and end of the heap that top points into, else of the newest one."""
    top = facts.state.top if facts.state is not None else 0
    if facts.brk_range is not None:
        return layout.aligned_header(facts.brk_range.start), facts.brk_range.end
    if not top or not facts.sub_heaps:
        return None
    inside = [heap for heap in facts.sub_heaps if heap.address <= top < heap.address + heap.size]
    heap = (inside or facts.sub_heaps)[-1]
    is_first = heap.address + layout.heap_info_bytes == facts.address
    overhead = layout.first_chunk_in_arena_heap if is_first else layout.heap_info_bytes
    return heap.address + overhead, heap.address + heap.size


def _last_chunk(core: Core, layout: Layout, start: int, end: int, top: int) -> int | None:
    """The chunk that ends with the heap, when all before it are sound and none starts at ``top``."""
    memory, geometry = core.memory, layout.geometry
    if end <= start or not memory.is_saved(start, end) or len(memory.saved_runs_within(start, end)) != 1:
        return None
    view = memory.view(start, end)
    is_inside = 0 <= top - start < end - start and not (top - start) % geometry.alignment
    if is_inside and chain_reaches(view, geometry, 0, top - start, end - start).stop_reason is StopReason.TOP:
        return None
    chain = chain_reaches(view, geometry, 0, NO_TOP, end - start)
    offset = chain.end_offset
    if chain.stop_reason is StopReason.END and chain.chunk_count:
        offset = chain_reaches(view, geometry, 0, NO_TOP, chain.chunk_count - 1).end_offset
    elif chain.stop_reason is not StopReason.BROKEN:
        return None
    if offset <= 0 or offset + geometry.header_bytes > end - start:
        return None
    size_word = memory.read_word(start + offset + geometry.word_bytes)
    # With 4-byte words and 16-byte alignment no other chunk can have top's size.
    return start + offset if size_word & ~FLAGS == end - start - offset and size_word & FLAGS == PREV_INUSE else None
