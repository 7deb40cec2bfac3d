"""RETAINED-FREE: memory that the program freed and malloc keeps."""

from __future__ import annotations

from collections.abc import Iterator

from coreheap.checks.free_memory_causes import (
    SMALLEST_BYTES,
    SMALLEST_SHARE,
    WARNING_BYTES,
    WARNING_SHARE,
    Cause,
    FreeMemory,
    has_cause,
    trim_evidence,
    trim_quantities,
    trim_step,
)
from coreheap.checks.protocol import Case
from coreheap.doubts import heap_doubts
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.free_memory import HeapFreeMemory, TopStays
from coreheap.heap import BINNED_STATES, ChunkState, sum_of_totals
from coreheap.report import Finding, Quantity, Severity, Unit

TOP_SHARE = 0.25
"""Of what malloc keeps: from it on, top is worth a setting of its own."""


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all arenas: free bytes in lists and tops, the largest arena named.

    Where free memory was surveyed, only where no other finding names its cause (``free_memory_causes``).
    """
    heap = case.heap
    if heap is None:
        return ()
    memory = has_cause(case, Cause.RETAINED)
    if case.free_memory is not None and memory is None:
        return ()  # another finding says it better, or it was given back already
    arenas = heap.arenas if memory is None else memory.arenas
    totals = sum_of_totals(arena.totals for arena in arenas)
    walked = sum(total.chunk_bytes for total in totals.values())
    binned = sum(totals[state].chunk_bytes for state in BINNED_STATES)
    unlisted = totals[ChunkState.FREE_UNLISTED].chunk_bytes
    tcache = totals[ChunkState.TCACHE].chunk_bytes
    fastbin = totals[ChunkState.FASTBIN].chunk_bytes
    top = totals[ChunkState.TOP].chunk_bytes
    free = binned + unlisted + tcache + fastbin + top
    if free < SMALLEST_BYTES or free < SMALLEST_SHARE * walked:
        return ()
    largest = max(
        arenas,
        key=lambda arena: sum(arena.bytes_in(state) for state in (*BINNED_STATES, ChunkState.TOP)),
    )
    parameters, report = heap.parameters, case.free_memory
    if memory is not None:
        severity = memory.severity
    else:
        severe = free >= WARNING_BYTES and free >= WARNING_SHARE * walked
        severity = Severity.WARNING if severe else Severity.INFO
    doubts = heap_doubts(heap)
    evidence = (
        Evidence(
            "free chunks counted on their lists and by their headers", "chunk walk and free lists", Strength.PROOF
        ),
        *(doubt.fact for doubt in doubts),
        *((trim_evidence(memory.trim, report.basis),) if memory is not None and report is not None else ()),
    )
    return (
        Finding(
            code="RETAINED-FREE",
            severity=severity,
            confidence=confidence_from(evidence),
            subject=f"{len(arenas)} arenas",
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
                *(trim_quantities(memory.trim) if memory is not None else ()),
                *(_kept(memory) if memory is not None else ()),
            ),
            evidence=evidence,
            next_steps=(
                trim_step(memory.trim)
                if memory is not None
                else "malloc_trim(0), called in the process, gives back whole free pages (glibc 2.8+); it walks all arenas"
                " and blocks allocation meanwhile",
                *_shrinking(memory),
                "look for the long-lived blocks among short-lived ones: they keep free memory from becoming whole pages",
            ),
            weakened_by=(
                "free memory that was already given back by MADV_DONTNEED counts here but costs no memory",
                "a core taken right after a peak shows retention that the next peak would use again",
                *(doubt.text for doubt in doubts),
            ),
        ),
    )


def _main_heap(memory: FreeMemory) -> HeapFreeMemory | None:
    return next((heap for heap in memory.heaps if heap.sub_heap is None), None)


def _kept(memory: FreeMemory) -> Iterator[Quantity]:
    """Why free() left the end of the main arena as it is, and how much of the free memory was given back already."""
    main = _main_heap(memory)
    yield Quantity("main_top_stays", main.top_stays.value if main is not None else None, Unit.TEXT)
    yield Quantity("given_back_bytes", memory.trim.given_back_bytes, Unit.BYTES)
    yield Quantity("kept_bytes", memory.kept_bytes, Unit.BYTES)


def _shrinking(memory: FreeMemory | None) -> Iterator[str]:
    """The setting by which free() itself would give top back, where top is much of it and a setting keeps it."""
    main = _main_heap(memory) if memory is not None else None
    if memory is None or main is None or main.top_bytes < TOP_SHARE * memory.kept_bytes:
        return
    if main.top_stays is TopStays.BELOW_THRESHOLD:
        yield (
            "lower M_TRIM_THRESHOLD (MALLOC_TRIM_THRESHOLD_): free then returns the top of a heap sooner, at the price of more"
            " system calls"
        )
    elif main.top_stays is TopStays.KEPT_BY_TOP_PAD:
        yield (
            "lower M_TOP_PAD (MALLOC_TOP_PAD_), which keeps that much at the top on purpose, at the price of more system calls"
        )
