"""RETAINED-FREE: memory that the program freed and malloc keeps."""

from __future__ import annotations

from collections.abc import Iterator

from coreheap.checks.free_memory_causes import (
    SMALLEST_BYTES,
    SMALLEST_SHARE,
    WARNING_BYTES,
    WARNING_SHARE,
    Cause,
    has_cause,
    trim_evidence,
    trim_quantities,
    trim_step,
)
from coreheap.checks.protocol import Case
from coreheap.doubts import heap_doubts
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.free_memory import FreeMemoryReport
from coreheap.heap import BINNED_STATES, ChunkState
from coreheap.report import Finding, Quantity, Severity, Unit


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all arenas: free bytes in lists and tops, the largest arena named.

    Where free memory was surveyed, only where no other finding names its cause (``free_memory_causes``).
    """
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
    if case.free_memory is not None and has_cause(case, Cause.RETAINED) is None:
        return ()  # another finding says it better, or it was given back already
    largest = max(
        heap.arenas,
        key=lambda arena: sum(arena.bytes_in(state) for state in (*BINNED_STATES, ChunkState.TOP)),
    )
    parameters, report = heap.parameters, case.free_memory
    severe = free >= WARNING_BYTES and free >= WARNING_SHARE * walked
    doubts = heap_doubts(heap)
    evidence = (
        Evidence(
            "free chunks counted on their lists and by their headers", "chunk walk and free lists", Strength.PROOF
        ),
        *(doubt.fact for doubt in doubts),
        *((trim_evidence(report.trim, report.basis),) if report is not None else ()),
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
                *(trim_quantities(report.trim) if report is not None else ()),
                *(_top(report) if report is not None else ()),
            ),
            evidence=evidence,
            next_steps=(
                trim_step(report.trim)
                if report is not None
                else "malloc_trim(0), called in the process, gives back whole free pages (glibc 2.8+); it walks all arenas"
                " and blocks allocation meanwhile",
                "lower M_TRIM_THRESHOLD (MALLOC_TRIM_THRESHOLD_): free then returns the top of a heap sooner, at the"
                " price of more system calls",
                "look for the long-lived blocks among short-lived ones: they keep free memory from becoming whole pages",
            ),
            weakened_by=(
                "free memory that was already given back by MADV_DONTNEED counts here but costs no memory",
                "a core taken right after a peak shows retention that the next peak would use again",
                *(doubt.text for doubt in doubts),
            ),
        ),
    )


def _top(report: FreeMemoryReport) -> Iterator[Quantity]:
    """Why free() left the end of the main arena as it is, and how much of the free memory was given back already."""
    main = next((heap for arena in report.arenas for heap in arena.heaps if heap.sub_heap is None), None)
    yield Quantity("main_top_stays", main.top_stays.value if main is not None else None, Unit.TEXT)
    yield Quantity(
        "given_back_bytes", report.trim.bytes - min(report.trim.resident_high, report.trim.bytes), Unit.BYTES
    )
