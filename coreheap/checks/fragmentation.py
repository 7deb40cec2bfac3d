"""FRAGMENTATION: free memory shares its pages with live chunks, so that nothing can give it back."""

from __future__ import annotations

from collections.abc import Iterator

from coreheap.checks.free_memory_causes import (
    Cause,
    FreeMemory,
    can_trim,
    has_cause,
    trim_evidence,
    trim_quantities,
    trim_step,
    walk_evidence,
)
from coreheap.checks.protocol import Case
from coreheap.evidence import confidence_from
from coreheap.quantities import format_bytes
from coreheap.report import Finding, Quantity, Unit


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all arenas."""
    memory = has_cause(case, Cause.FRAGMENTED)
    if memory is None or case.heap is None or case.free_memory is None:
        return ()
    worst = max(memory.heaps, key=lambda heap: heap.shared_page_bytes)
    statement = f"{format_bytes(memory.shared_page_bytes)} of {format_bytes(memory.free_bytes)} free memory share a page with chunks that are in use or cached"
    evidence, doubts = walk_evidence(statement, case.heap)
    return (
        Finding(
            code="FRAGMENTATION",
            severity=memory.severity,
            confidence=confidence_from(evidence),
            subject=f"{len(memory.arenas)} arenas",
            quantities=(
                Quantity("free_bytes", memory.free_bytes, Unit.BYTES),
                Quantity("shared_page_bytes", memory.shared_page_bytes, Unit.BYTES),
                Quantity("shared_page_share", memory.shared_page_bytes / max(memory.free_bytes, 1), Unit.SHARE),
                Quantity("free_share", memory.free_bytes / max(memory.walked_bytes, 1), Unit.SHARE),
                Quantity("largest_free_bytes", max(heap.largest_free_bytes for heap in memory.heaps), Unit.BYTES),
                Quantity("worst_arena", worst.arena, Unit.COUNT),
                *trim_quantities(memory.trim),
            ),
            evidence=(*evidence, trim_evidence(memory.trim, case.free_memory.basis)),
            next_steps=(
                "coreheap chunks CORE --state in_use --csv lists what lies between the free chunks: put long-lived small blocks"
                " into pools or arenas of their own, so that pages become free as a whole; costs a change of the program",
                "an allocator that keeps sizes apart (jemalloc, tcmalloc, mimalloc by LD_PRELOAD) wastes other memory and spreads less:"
                " compare Pss of both in /proc/PID/smaps_rollup under the same load",
                *_lowering(memory),
            ),
            weakened_by=(
                "free chunks that the program will use again are no loss: compare two cores, or mallinfo2().fordblks over time",
                *(doubt.text for doubt in doubts),
            ),
        ),
    )


def _lowering(memory: FreeMemory) -> Iterator[str]:
    """What lowers RSS of the process as it is."""
    restart = "a restart, or handing work to processes that end, is the only way to"
    if can_trim(memory):
        yield trim_step(memory.trim)
        yield f"{restart} give back the rest, {format_bytes(memory.shared_page_bytes)} on shared pages"
    else:
        yield f"{restart} lower RSS now: malloc_trim does not help here"
