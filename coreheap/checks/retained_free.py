"""RETAINED-FREE: memory that the program freed and malloc keeps."""

from __future__ import annotations

from coreheap.checks.protocol import Case
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.heap import BINNED_STATES, ChunkState
from coreheap.quantities import MIB
from coreheap.report import Finding, Quantity, Severity, Unit

SMALLEST_BYTES = 1 * MIB
SMALLEST_SHARE = 0.25
WARNING_BYTES = 64 * MIB
WARNING_SHARE = 0.5
"""Free share of the arenas' memory from which, with WARNING_BYTES, retention is a warning and not a remark."""


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all arenas: free bytes in lists and tops, the largest arena named."""
    heap = case.heap
    if heap is None:
        return ()
    walked = sum(total.chunk_bytes for total in heap.totals.values())
    binned = sum(heap.totals[state].chunk_bytes for state in BINNED_STATES)
    unlisted = heap.totals[ChunkState.FREE_UNLISTED].chunk_bytes
    tcache = heap.totals[ChunkState.TCACHE].chunk_bytes
    fastbin = heap.totals[ChunkState.FASTBIN].chunk_bytes
    top = heap.totals[ChunkState.TOP].chunk_bytes
    free = binned + unlisted + tcache + fastbin + top
    if free < SMALLEST_BYTES or free < SMALLEST_SHARE * walked:
        return ()
    largest = max(
        heap.arenas,
        key=lambda arena: sum(arena.bytes_in(state) for state in (*BINNED_STATES, ChunkState.TOP)),
    )
    parameters = heap.parameters
    severe = free >= WARNING_BYTES and free >= WARNING_SHARE * walked
    evidence = [
        Evidence(
            "free chunks counted on their lists and by their headers",
            "chunk walk and free lists",
            Strength.PROOF if all(arena.coverage == 1.0 for arena in heap.arenas) else Strength.SOLID,
        )
    ]
    if heap.anomaly_count:
        evidence.append(
            Evidence(
                f"{heap.anomaly_count} contradictions in the heap's own data",
                "chunk walk and free lists",
                Strength.HINT,
                speaks_against=True,
            )
        )
    return (
        Finding(
            code="RETAINED-FREE",
            severity=Severity.WARNING if severe else Severity.INFO,
            confidence=confidence_from(evidence),
            subject=f"{len(heap.arenas)} arenas",
            quantities=(
                Quantity("free_bytes", free, Unit.BYTES),
                Quantity("free_share", free / walked, Unit.SHARE),
                Quantity("binned_bytes", binned, Unit.BYTES),
                Quantity("top_bytes", top, Unit.BYTES),
                Quantity("tcache_bytes", tcache, Unit.BYTES),
                Quantity("fastbin_bytes", fastbin, Unit.BYTES),
                Quantity("unlisted_bytes", unlisted, Unit.BYTES),
                Quantity("largest_arena", largest.index, Unit.COUNT),
                Quantity(
                    "trim_threshold",
                    parameters.value("trim_threshold") if parameters else None,
                    Unit.BYTES,
                ),
                Quantity("top_pad", parameters.value("top_pad") if parameters else None, Unit.BYTES),
            ),
            evidence=tuple(evidence),
            next_steps=(
                "malloc_trim(0), called in the process, gives back whole free pages (glibc 2.8+); it walks all arenas"
                " and blocks allocation meanwhile",
                "lower M_TRIM_THRESHOLD (MALLOC_TRIM_THRESHOLD_): free then returns the top of a heap sooner, at the"
                " price of more system calls",
                "look for the long-lived blocks among short-lived ones: they keep free memory from becoming whole pages",
            ),
            weakened_by=(
                "free memory that was already given back by MADV_DONTNEED counts here but costs no memory",
                "a core taken right after a peak shows retention that the next peak would use again",
            ),
        ),
    )
