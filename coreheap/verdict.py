"""The answer to "where did the memory go", part by part, each as sure as what it rests on.

Knows: which parts there are, and which doubts touch which part. Does not know: how doubts are found (``doubts``), or how a
part is shown (``render``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.corefile import Core
from coreheap.doubts import Doubt, heap_doubts, map_doubts, thread_doubts
from coreheap.evidence import Confidence, Gap, lowered
from coreheap.heap import LISTED_FREE_STATES, ChunkState, HeapSnapshot
from coreheap.leaks import LeakReport, Verdict
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.report import Finding, VerdictItem

TOPICS: Final = {
    "thread_stacks": (
        MappingKind.MAIN_STACK,
        MappingKind.THREAD_STACK,
        MappingKind.SIGNAL_STACK,
        MappingKind.ENDED_STACK,
        MappingKind.TLS,
    ),
    "module_data": (MappingKind.MODULE_DATA, MappingKind.MODULE_BSS),
    "java": (
        MappingKind.JAVA_HEAP,
        MappingKind.JAVA_METASPACE,
        MappingKind.JAVA_CODE_CACHE,
        MappingKind.JAVA_GC,
    ),
    "other_allocator": (MappingKind.OTHER_ALLOCATOR,),
}
"""The parts that mappings make up by themselves."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes that the program may access, how many of them were in memory (None: not known), and what speaks against both."""

    byte_count: int
    resident: tuple[int, int] | None
    doubts: tuple[Doubt, ...]


def memory_verdict(
    core: Core,
    mappings: MappingTable,
    heap: HeapSnapshot | None,
    findings: tuple[Finding, ...],
    gaps: tuple[Gap, ...],
) -> tuple[VerdictItem, ...]:
    """Where the writable private memory went, what took the most memory first. ``gaps`` are those of the core and of the heap.

    Each part is at best as sure as how the heap was found. What contradicts the heap or is missing of it lowers all that
    is counted by chunks, and what is left beside the heap: chunks that were not found lie there.
    """
    another_is_used = any(
        finding.code == "OTHER-ALLOCATOR" and finding.quantity("glibc_heap_nearly_empty") == "true"
        for finding in findings
    )
    elsewhere = "other_allocator" if another_is_used else "not_malloc"
    if heap is None and core.memory.writable_bytes_not_saved():
        elsewhere = "unknown"
    of_map = map_doubts(gaps)
    of_chunks = (*of_map, *(heap_doubts(heap) if heap is not None else ()))
    parts = {topic: _mapped(mappings, kinds, of_map) for topic, kinds in TOPICS.items()}
    parts["thread_stacks"] = _mapped(mappings, TOPICS["thread_stacks"], (*of_map, *thread_doubts(gaps)))
    parts[elsewhere] = _joined(
        parts.get(elsewhere), _mapped(mappings, (MappingKind.UNEXPLAINED,), (*of_chunks, *thread_doubts(gaps)))
    )
    if heap is not None:
        bloated = any(finding.code == "ARENA-BLOAT" for finding in findings)
        parts |= _heap_parts(mappings, heap, of_chunks, bloated=bloated)
    whole = sum(part.byte_count for part in parts.values())
    found = heap.identity.confidence if heap else Confidence.WEAK
    items = [
        VerdictItem(
            topic,
            part.byte_count,
            whole,
            "writable_private",
            lowered(found, (each.fact for each in part.doubts)),
            tuple(each.text for each in part.doubts),
            *(part.resident or (None, None)),
        )
        for topic, part in parts.items()
        if part.byte_count
    ]
    return tuple(sorted(items, key=_weight, reverse=True))


def _weight(item: VerdictItem) -> tuple[int, int]:
    """What was in memory counts; where that is not known, what could have been."""
    known = item.bytes if item.resident_high is None else item.resident_high
    return known, item.bytes


def _mapped(mappings: MappingTable, kinds: Iterable[MappingKind], doubts: tuple[Doubt, ...]) -> _Part:
    """What the program may write of some kinds of mappings."""
    rows = np.isin(mappings.kind, [KINDS.index(kind) for kind in kinds])
    resident = int(mappings.resident_low[rows].sum()), int(mappings.resident_high[rows].sum())
    committed = int(mappings.committed_bytes[rows].sum())
    return _Part(committed, None if mappings.basis is ResidencyBasis.UNKNOWN else resident, doubts)


def _joined(first: _Part | None, second: _Part) -> _Part:
    if first is None:
        return second
    resident = None
    if first.resident is not None and second.resident is not None:
        resident = first.resident[0] + second.resident[0], first.resident[1] + second.resident[1]
    return _Part(first.byte_count + second.byte_count, resident, tuple(dict.fromkeys((*first.doubts, *second.doubts))))


def _heap_parts(
    mappings: MappingTable, heap: HeapSnapshot, doubts: tuple[Doubt, ...], *, bloated: bool
) -> Iterator[tuple[str, _Part]]:
    """The arenas' memory by the state of its chunks, and the mmapped chunks.

    Which pages of an arena were in memory is known, not whose they are: what is in memory beyond the free bytes must be live,
    and the other way round.
    """
    free_states = (*LISTED_FREE_STATES, ChunkState.TOP, ChunkState.FREE_UNLISTED)
    live = sum(heap.totals[state].chunk_bytes for state in (ChunkState.IN_USE, ChunkState.ALLOCATOR_OWN))
    of_bloat = sum(arena.bytes_in(*free_states) for arena in heap.arenas if not arena.is_main) if bloated else 0
    retained = sum(arena.bytes_in(*free_states) for arena in heap.arenas) - of_bloat
    missing = heap.totals[ChunkState.DAMAGED].chunk_bytes + sum(
        part.range.byte_count for arena in heap.arenas for part in arena.unattributed
    )
    of_arenas = _mapped(mappings, (MappingKind.MAIN_ARENA, MappingKind.ARENA_HEAP), doubts).resident
    whole = live + of_bloat + retained + missing
    for topic, byte_count in (
        ("in_use", live),
        ("arena_bloat", of_bloat),
        ("retained_free", retained),
        ("unknown", missing),
    ):
        resident = None
        if of_arenas is not None:
            low, high = of_arenas
            resident = max(0, low - (whole - byte_count)), min(byte_count, high)
            resident = min(resident), resident[1]
        yield topic, _Part(byte_count, resident, doubts)
    mmapped = _mapped(mappings, (MappingKind.MMAPPED_CHUNK,), doubts)
    yield "mmapped_chunks", _Part(heap.mmapped_bytes, mmapped.resident, doubts)


def leak_verdict(leaks: LeakReport | None, findings: tuple[Finding, ...]) -> Iterator[VerdictItem]:
    """What of the live chunks is lost, where a finding says that it matters."""
    parts = {
        "LEAK": ("lost", (Verdict.DEFINITELY_LOST, Verdict.INDIRECTLY_LOST)),
        "POSSIBLE-LEAK": ("possibly_lost", (Verdict.POSSIBLY_LOST,)),
    }
    for finding in findings:
        if leaks is None or finding.code not in parts:
            continue
        topic, verdicts = parts[finding.code]
        part, whole = leaks.total(*verdicts).usable_bytes, leaks.total().usable_bytes
        against = tuple(fact.statement for fact in finding.evidence if fact.speaks_against)
        yield VerdictItem(topic, part, whole, "live_chunks", finding.confidence, against)
