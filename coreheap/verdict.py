"""The answer to "where did the memory go", part by part, each as sure as what it rests on.

Knows: which parts there are, and which doubts touch which part. Does not know: how doubts are found (``doubts``), or how a
part is shown (``render``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.doubts import Doubt, doubt, heap_doubts, map_doubts, thread_doubts
from coreheap.evidence import Confidence, Gap, Strength, lowered
from coreheap.free_memory import FreeMemoryReport
from coreheap.heap import LISTED_FREE_STATES, Arena, ChunkState, HeapSnapshot
from coreheap.leaks import LeakReport, Verdict
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.quantities import format_bytes
from coreheap.report import Finding, VerdictItem

TOPICS: Final = {
    "thread_stacks": (
        MappingKind.MAIN_STACK,
        MappingKind.THREAD_STACK,
        MappingKind.SIGNAL_STACK,
        MappingKind.ENDED_STACK,
        MappingKind.UNJOINED_STACK,
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
    "foreign_sbrk": (MappingKind.FOREIGN_SBRK,),
    "written_files": (MappingKind.MAPPED_FILE,),
}
"""The parts that mappings make up by themselves."""
UNJOINED: Final = (MappingKind.UNJOINED_STACK,)
"""A part of its own where a finding says that they matter."""
WRITABLE_PRIVATE: Final = (
    *(kind for kinds in TOPICS.values() for kind in kinds),
    *(MappingKind.UNEXPLAINED, MappingKind.MAIN_ARENA, MappingKind.ARENA_HEAP, MappingKind.MMAPPED_CHUNK),
)
"""All that the parts are made of."""
FOREIGN: Final = "foreign_sbrk"
"""The cause of what another caller of sbrk took between the main arena's pieces: neither malloc's nor unknown."""
WRITE: Final = 2
"""PF_W, as in MappingTable.flags."""
MUCH: Final = 0.05
"""Share of all that may have been in memory from which a part that surely was tells more than one that may have been; and of all that
the program could write from which memory that it shares is worth an item."""
MUCH_APART: Final = 0.1
"""Share by which bounds have to differ to be a doubt."""
SUSPECTED_BYTES: Final = 1 << 20
SUSPECTED_SHARE: Final = 0.1
"""Of the live bytes, what nothing leads to in a core that lacks something is worth a word from here on."""
FREE_STATES: Final = (*LISTED_FREE_STATES, ChunkState.TOP, ChunkState.FREE_UNLISTED)


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes that the program may access, how many of them were in memory (None: not known), and what speaks against both."""

    byte_count: int
    resident: tuple[int, int] | None
    doubts: tuple[Doubt, ...]

    @property
    def surely(self) -> int:
        """What was in memory at least; where that is not known, what could have been."""
        return self.byte_count if self.resident is None else self.resident[0]

    @property
    def perhaps(self) -> int:
        """What was in memory at most."""
        return self.byte_count if self.resident is None else self.resident[1]


def memory_verdict(
    core: Core,
    mappings: MappingTable,
    heap: HeapSnapshot | None,
    findings: tuple[Finding, ...],
    gaps: tuple[Gap, ...],
    free_memory: FreeMemoryReport | None = None,
) -> tuple[VerdictItem, ...]:
    """Where the writable private memory went, what took the most memory first; and how much memory is shared, where that is much.
    ``gaps`` are those of the core and of the heap.

    Each part is at best as sure as how the heap was found. What contradicts the heap or is missing of it lowers all that
    is counted by chunks, and what is left beside the heap: chunks that were not found lie there. Where another part may have had
    more in memory, the first one is not certain to be the first.
    """
    # Where an allocator's own memory was found, the rest is not its own.
    another_is_used = any(
        finding.code == "OTHER-ALLOCATOR"
        and finding.quantity("glibc_heap_nearly_empty") == "true"
        and finding.quantity("allocator_bytes") is None
        for finding in findings
    )
    elsewhere = "other_allocator" if another_is_used else "not_malloc"
    if heap is None and core.memory.writable_bytes_not_saved():
        elsewhere = "unknown"
    of_map = map_doubts(gaps)
    of_chunks = (*of_map, *(heap_doubts(heap) if heap is not None else ()))
    parts = {topic: _mapped(mappings, kinds, of_map) for topic, kinds in TOPICS.items()}
    parts["written_files"] = _written_files(mappings, of_map)
    # What lies between the arena's pieces is where no chunk was found: what speaks against the walk speaks against it.
    parts["foreign_sbrk"] = _mapped(mappings, TOPICS["foreign_sbrk"], of_chunks)
    of_threads = (*of_map, *thread_doubts(gaps))
    of_stacks: Collection[MappingKind] = TOPICS["thread_stacks"]
    if any(finding.code == "UNJOINED-THREADS" for finding in findings):
        of_stacks = [kind for kind in of_stacks if kind not in UNJOINED]
        parts["unjoined_threads"] = _mapped(mappings, UNJOINED, of_threads)
    parts["thread_stacks"] = _mapped(mappings, of_stacks, of_threads)
    parts[elsewhere] = _joined(
        parts.get(elsewhere), _mapped(mappings, (MappingKind.UNEXPLAINED,), (*of_chunks, *thread_doubts(gaps)))
    )
    if heap is not None:
        bloated = any(finding.code == "ARENA-BLOAT" for finding in findings)
        parts |= _heap_parts(mappings, heap, free_memory, of_chunks, bloated=bloated)
    whole = sum(part.byte_count for part in parts.values())
    parts = _in_order(parts)
    # The mappings have some bytes more: headers, and what alignment costs.
    in_memory = _mapped(mappings, WRITABLE_PRIVATE, ()).resident
    of_whole = (None, None) if in_memory is None else (min(in_memory[0], whole), min(in_memory[1], whole))
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
            *of_whole,
        )
        for topic, part in parts.items()
    ]
    shared = _mapped(mappings, (MappingKind.SHARED_MEMORY,), of_map)
    if shared.byte_count and shared.byte_count >= MUCH * whole:
        # Nothing in the core tells which of these pages the process had touched.
        against = tuple(each.text for each in shared.doubts)
        confidence = lowered(Confidence.CERTAIN, (each.fact for each in shared.doubts))
        bounds = shared.resident or (None, None)
        size = shared.byte_count
        items.append(VerdictItem("shared_memory", size, size, "writable_shared", confidence, against, *bounds, *bounds))
    return tuple(items)


def _in_order(parts: Mapping[str, _Part]) -> dict[str, _Part]:
    """The parts that have any bytes, what surely took the most memory first; the first doubted where another may have had more.

    Where hardly anything was surely in memory, what may have been decides, but for stacks, of which most is only reserved.
    """
    used = [(topic, part) for topic, part in parts.items() if part.byte_count]
    is_known = max((part.surely for _, part in used), default=0) >= MUCH * sum(part.perhaps for _, part in used)

    def weight(one: tuple[str, _Part]) -> tuple[int, int, int]:
        topic, part = one
        return (
            part.surely if is_known or topic in ("thread_stacks", "unjoined_threads") else part.perhaps,
            part.perhaps,
            part.byte_count,
        )

    order = sorted(used, key=weight, reverse=True)
    if order and order[0][1].resident is not None:
        low, _ = order[0][1].resident
        most = max((part.perhaps for _, part in order[1:]), default=0)
        # Bounds that are far apart: pages that free and live chunks share are no reason to doubt. How much the first may have had is
        # none to believe it either: a reservation of 600 MiB of which 1 MiB surely was there.
        if most - low > MUCH_APART * most:
            unsure = doubt(
                f"{format_bytes(low)} of it were surely in memory, of another part up to {format_bytes(most)} may have been",
                "pages that the core has content for",
                "which part took most is not certain",
            )
            order[0] = order[0][0], replace(order[0][1], doubts=(*order[0][1].doubts, unsure))
    return dict(order)


def _mapped(mappings: MappingTable, kinds: Collection[MappingKind], doubts: tuple[Doubt, ...]) -> _Part:
    """What the program may write of some kinds of mappings."""
    rows = _rows_of(mappings, kinds)
    # What is only reserved may hold pages that the core does not tell of; it is no part of what the program may write.
    high = np.minimum(mappings.resident_high[rows], mappings.committed_bytes[rows])
    resident = int(np.minimum(mappings.resident_low[rows], high).sum()), int(high.sum())
    committed = int(mappings.committed_bytes[rows].sum())
    supposed = sum(mappings.supposed_bytes.get(kind, 0) for kind in kinds)
    if supposed:
        unsure = doubt(
            f"{format_bytes(supposed)} of it are told by their place alone",
            "stack pointers and modules",
            "they may be something else",
            Strength.SOLID if supposed > MUCH_APART * committed else Strength.HINT,
        )
        doubts = (*doubts, unsure)
    if mappings.residency_confidence is not Confidence.CERTAIN and resident[1] < committed:
        unsure = doubt(
            "holes of the file say what was in memory, and a copy in large blocks (cp --sparse=always onto NFS, ZFS or Lustre) makes"
            " more of them",
            "holes and stored zeros of the core file",
            "more may have been in memory",
        )
        doubts = (*doubts, unsure)
    return _Part(committed, None if mappings.basis is ResidencyBasis.UNKNOWN else resident, doubts)


def _rows_of(mappings: MappingTable, kinds: Collection[MappingKind]) -> npt.NDArray[np.bool_]:
    """Which rows the program may write are of some kinds: of files those that the core holds.

    The kernel saves a private mapping of a file once the program wrote to it, and shared ones only where it was told to
    (vma_dump_size). All other kinds are memory that a program writes, whatever its access was at the end.
    """
    of_files = mappings.kind == KINDS.index(MappingKind.MAPPED_FILE)
    of_shared = mappings.kind == KINDS.index(MappingKind.SHARED_MEMORY)
    is_writable = mappings.flags & WRITE != 0
    asked: npt.NDArray[np.bool_] = np.isin(mappings.kind, [KINDS.index(kind) for kind in kinds])
    asked &= is_writable | ~(of_files | of_shared)
    asked &= (mappings.saved_bytes > 0) | ~of_files
    return asked


def _written_files(mappings: MappingTable, doubts: tuple[Doubt, ...]) -> _Part:
    part = _mapped(mappings, TOPICS["written_files"], doubts)
    unsure = doubt(
        "a core does not tell private mappings of files, whose written pages are the program's own, from shared ones",
        "list of mapped files",
        "some of these pages may be the page cache's",
    )
    return replace(part, doubts=(*part.doubts, unsure))


def _joined(first: _Part | None, second: _Part) -> _Part:
    if first is None:
        return second
    resident = None
    if first.resident is not None and second.resident is not None:
        resident = first.resident[0] + second.resident[0], first.resident[1] + second.resident[1]
    return _Part(first.byte_count + second.byte_count, resident, tuple(dict.fromkeys((*first.doubts, *second.doubts))))


def _heap_parts(
    mappings: MappingTable,
    heap: HeapSnapshot,
    free_memory: FreeMemoryReport | None,
    doubts: tuple[Doubt, ...],
    *,
    bloated: bool,
) -> Iterator[tuple[str, _Part]]:
    """The arenas' memory by the state of its chunks, and the mmapped chunks.

    Of free memory that makes up whole pages it is known what was in memory. The rest of what was must be live, or share a page with
    what is.
    """
    arenas = _mapped(mappings, (MappingKind.MAIN_ARENA, MappingKind.ARENA_HEAP), doubts)
    of_arenas = arenas.resident
    in_bloat = [arena for arena in heap.arenas if bloated and not arena.is_main]
    others = [arena for arena in heap.arenas if not (bloated and not arena.is_main)]
    live = sum(heap.totals[state].chunk_bytes for state in (ChunkState.IN_USE, ChunkState.ALLOCATOR_OWN))
    missing = heap.totals[ChunkState.DAMAGED].chunk_bytes + sum(
        part.range.byte_count for arena in heap.arenas for part in arena.unattributed if part.cause != FOREIGN
    )
    sizes = {
        "in_use": live,
        "arena_bloat": sum(arena.bytes_in(*FREE_STATES) for arena in in_bloat),
        "retained_free": sum(arena.bytes_in(*FREE_STATES) for arena in others),
        "unknown": missing,
    }
    known = {
        "arena_bloat": _free_residency(free_memory, in_bloat),
        "retained_free": _free_residency(free_memory, others),
    }
    # Headers of sub-heaps, and what else the arenas' mappings have, are nobody's part.
    beside = max(0, arenas.byte_count - sum(sizes.values()))
    bounds = {topic: known.get(topic) or (0, byte_count, byte_count) for topic, byte_count in sizes.items()}
    for topic, byte_count in sizes.items():
        resident = None
        if of_arenas is not None:
            rest = [bound for other, bound in bounds.items() if other != topic]
            low = max(bounds[topic][0], of_arenas[0] - beside - sum(proven for _, _, proven in rest))
            high = min(bounds[topic][1], byte_count, of_arenas[1] - sum(low for low, _, _ in rest))
            resident = min(low, max(high, 0)), max(high, 0)
        yield topic, _Part(byte_count, resident, doubts)
    mmapped = _mapped(mappings, (MappingKind.MMAPPED_CHUNK,), doubts)
    yield "mmapped_chunks", _Part(heap.mmapped_bytes, mmapped.resident, doubts)


def _free_residency(free_memory: FreeMemoryReport | None, arenas: Iterable[Arena]) -> tuple[int, int, int] | None:
    """At least and at most so many of the free bytes of some arenas were in memory; None where that was not surveyed.

    The third number: at most so many of them are among what the core shows to have been in memory.
    """
    if free_memory is None or free_memory.basis is ResidencyBasis.UNKNOWN:
        return None
    heaps = [heap for arena in arenas for heap in free_memory.arenas[arena.index].heaps]
    beside = sum(heap.tcache_bytes + heap.unlisted_bytes for heap in heaps)
    shared = sum(heap.shared_page_bytes for heap in heaps)
    low = sum(heap.free_resident_low for heap in heaps)
    return low, sum(heap.free_resident_high for heap in heaps) + beside, low + shared + beside


def leak_verdict(leaks: LeakReport | None, findings: tuple[Finding, ...]) -> Iterator[VerdictItem]:
    """What of the live chunks is lost, where a finding says that it matters.

    What strong roots lead into, or keep in another form, is no part of it: healthy programs keep most of their heap so. What is left
    has to matter by itself.
    """
    if leaks is None:
        return
    parts = {
        "LEAK": ("lost", leaks.total(Verdict.DEFINITELY_LOST, Verdict.INDIRECTLY_LOST).usable_bytes),
        "POSSIBLE-LEAK": ("possibly_lost", leaks.unreachable_possible.usable_bytes),
    }
    whole = leaks.total().usable_bytes
    for finding in findings:
        topic, part = parts.get(finding.code, ("", 0))
        if not part or (topic == "possibly_lost" and part < max(SUSPECTED_BYTES, SUSPECTED_SHARE * whole)):
            continue
        against = tuple(fact.statement for fact in finding.evidence if fact.speaks_against)
        yield VerdictItem(topic, part, whole, "live_chunks", finding.confidence, against)
