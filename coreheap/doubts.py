"""What a core's own data speaks against statements that rest on every chunk, as counter-evidence with its consequence.

Knows: which recorded facts of a heap and of a core are doubts, and how much each weighs. Does not know: which statement is
made from the heap, or how sure it would be without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from coreheap.evidence import Confidence, Evidence, Gap, Strength
from coreheap.heap import IN_KNOWN_BLOCKS, ChunkState, HeapSnapshot, UnattributedRange
from coreheap.quantities import format_bytes, format_count

MUCH_SHARE = 0.1
"""Share of a heap's bytes without a known chunk from which sums over chunks are far off, and not just a little."""

GAPS_NAMED = 5
"""Gaps whose consequences are said beside a finding; the report lists all of them."""

THREADS_MISSING = ("threads_missing", "notes_truncated", "notes_damaged", "notes_too_many", "thread_notes_unusable")
"""Gaps of the core after which threads may be missing, with their registers and stacks."""

FILES_MISSING = "mapped_files_missing"
"""The gap of a core without NT_FILE (qemu's, old kernels', some writers of their own)."""

MAP_DOUBTED = (
    "program_headers_cut",
    "segment_count_cut",
    "segment_wraps",
    "segments_overlap",
    "segments_share_bytes",
    "mapped_files_cut",
    "mapped_files_contradict",
    "modules_too_many",
)
"""Gaps of the core after which its regions, or what they are, are not sure."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """Counter-evidence, and what follows from it for statements about chunks."""

    fact: Evidence
    consequence: str

    @property
    def text(self) -> str:
        """The fact and what follows, one line."""
        return f"{self.fact.statement}: {self.consequence}"


def doubt(statement: str, source: str, consequence: str, strength: Strength = Strength.HINT) -> Doubt:
    return Doubt(Evidence(statement, source, strength, speaks_against=True), consequence)


def heap_doubts(heap: HeapSnapshot) -> tuple[Doubt, ...]:
    """What of a heap speaks against sums and verdicts over all its chunks; empty for a whole heap without contradiction."""
    return tuple(_heap_doubts(heap))


def _heap_doubts(heap: HeapSnapshot) -> Iterator[Doubt]:
    unattributed = bytes_without_chunk(heap)
    damaged = heap.totals[ChunkState.DAMAGED].chunk_bytes
    whole = unattributed + sum(total.chunk_bytes for total in heap.totals.values())
    partial = sum(
        arena.coverage is None or arena.coverage < 1.0 or _unattributed_bytes(arena.unattributed) > 0
        for arena in heap.arenas
    )
    if partial:
        yield doubt(
            f"{format_count(partial)} of {format_count(len(heap.arenas))} arenas are not whole in the core or could not be"
            f" walked to their end; {format_bytes(unattributed)} of known heaps belong to no known chunk",
            "chunk walk",
            "chunks there, and the pointers in them, are unknown",
            _weight(unattributed, whole),
        )
    if heap.anomaly_count:
        extent = f"; {format_bytes(damaged)} of chunks are damaged" if damaged else ""
        yield doubt(
            f"{format_count(heap.anomaly_count)} contradictions in the heap's own data{extent}",
            "chunk walk and free lists",
            "the borders and states of chunks around them are not sure",
            _weight(damaged, whole),
        )
    gaps = [gap for gap in heap.gaps if not gap.cause.startswith(IN_KNOWN_BLOCKS)]
    if gaps:
        causes = sorted({gap.cause for gap in gaps})
        named = ", ".join(causes[:GAPS_NAMED]) + (", ..." if len(causes) > GAPS_NAMED else "")
        yield doubt(
            f"{format_count(len(gaps))} parts of the heap's own data are not in the core or unknown ({named})",
            "gaps",
            "chunks may be missing, or have another state",
        )


def identity_doubts(heap: HeapSnapshot) -> tuple[Doubt, ...]:
    """That how the heap was found is not certain; for statements that do not begin with that confidence anyway."""
    if heap.identity.confidence is Confidence.CERTAIN:
        return ()
    return (
        doubt(
            f"how the heap was found is only {heap.identity.confidence.value}",
            "identification of the heap",
            "chunks may be read wrongly",
        ),
    )


def map_doubts(gaps: Iterable[Gap]) -> tuple[Doubt, ...]:
    """What of a core's gaps speaks against its regions and their kinds: at most one doubt."""
    found = {gap.cause for gap in gaps}
    causes = sorted(found.intersection(MAP_DOUBTED))
    if FILES_MISSING in found and not causes:
        return (
            doubt(
                "the core does not say which memory is mapped from files (no NT_FILE note)",
                "notes of the core",
                "private memory cannot be told from shared memory",
            ),
        )
    if not causes:
        return ()
    return (
        doubt(
            f"the memory map of the core is not sound ({', '.join(causes)})",
            "program headers and notes",
            "memory may be missing, or count as something else",
        ),
    )


def thread_doubts(gaps: Iterable[Gap]) -> tuple[Doubt, ...]:
    """What of a core's gaps speaks against its list of threads: at most one doubt."""
    if not {gap.cause for gap in gaps}.intersection(THREADS_MISSING):
        return ()
    return (
        doubt(
            "the registers of some threads may be missing",
            "notes of the core",
            "a pointer may be in them, and their stacks may count as other memory",
        ),
    )


def gap_consequences(heap: HeapSnapshot) -> Iterator[str]:
    """What follows from the heap's gaps, the first few, and how many more there are."""
    consequences = list(dict.fromkeys(gap.consequence for gap in heap.gaps))
    yield from consequences[:GAPS_NAMED]
    if len(consequences) > GAPS_NAMED:
        yield f"and {format_count(len(consequences) - GAPS_NAMED)} more gaps of the heap"


def bytes_without_chunk(heap: HeapSnapshot) -> int:
    """Heap memory that no chunk could be assigned to, without what other callers of sbrk own."""
    return sum(_unattributed_bytes(arena.unattributed) for arena in heap.arenas)


def _unattributed_bytes(parts: Iterable[UnattributedRange]) -> int:
    return sum(part.range.byte_count for part in parts if part.cause != "foreign_sbrk")


def _weight(unknown: int, whole: int) -> Strength:
    return Strength.SOLID if unknown > MUCH_SHARE * whole else Strength.HINT
