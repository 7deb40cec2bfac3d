"""ARENA-BLOAT: many arenas, each reserving 64 MiB at a time, that hold little."""

from __future__ import annotations

from collections.abc import Iterator

from coreheap.checks.protocol import Case
from coreheap.doubts import gap_consequences
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.free_memory import ArenaMaxEstimate, TrimEstimate
from coreheap.heap import Arena, ChunkState, HeapSnapshot
from coreheap.quantities import GIB, MIB, format_bytes
from coreheap.report import Finding, Quantity, Severity, Unit

SUGGESTED_ARENA_MAX = 2
"""The usual setting for services: the main arena, and one more to go to when it is locked."""

ARENAS_WORTH_A_WORD = 8
"""Non-main arenas from which the number itself is a question; 8 is glibc's arena_test on 64-bit."""

RESERVED_PER_USED = 16
"""Reserved bytes for each byte in use from which reservation counts as bloat. A single full sub-heap has about 1."""

FREE_SHARE = 0.5
"""Share of committed memory that is free from which committed memory counts as bloat."""

HOARD_BYTES = 4 * MIB
HOARD_SHARE = 0.5
"""Of what the arenas hold free, as much in tcaches is a matter of the tcaches (TCACHE-HOARD), however many arenas there are."""

WARNING_FREE_BYTES = 64 * MIB
WARNING_RESERVED_BYTES = 1 * GIB


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all non-main arenas."""
    heap = case.heap
    if heap is None:
        return ()
    arenas = [arena for arena in heap.arenas if not arena.is_main]
    if len(arenas) < ARENAS_WORTH_A_WORD:
        return ()
    sub_heaps = [sub_heap for arena in arenas for sub_heap in arena.sub_heaps]
    reserved = sum(sub_heap.reserved_bytes for sub_heap in sub_heaps)
    committed = sum(sub_heap.committed_bytes for sub_heap in sub_heaps)
    in_use = sum(arena.bytes_in(ChunkState.IN_USE, ChunkState.ALLOCATOR_OWN) for arena in arenas)
    free = sum(
        arena.bytes_in(
            ChunkState.TCACHE,
            ChunkState.FASTBIN,
            ChunkState.UNSORTED_BIN,
            ChunkState.SMALL_BIN,
            ChunkState.LARGE_BIN,
            ChunkState.TOP,
            ChunkState.FREE_UNLISTED,
        )
        for arena in arenas
    )
    if reserved < RESERVED_PER_USED * max(in_use, 1) and free < FREE_SHARE * committed:
        return ()
    cached = sum(arena.bytes_in(ChunkState.TCACHE) for arena in arenas)
    if cached >= HOARD_BYTES and cached >= HOARD_SHARE * free:
        return ()
    without_thread = sum(not arena.threads for arena in arenas)
    threads = len(case.core.threads)
    # Address space is short only where there are 4 GiB of it.
    crowded = case.core.word_bytes == 4 and reserved >= WARNING_RESERVED_BYTES
    severe = _kept_bytes(case, arenas, free) >= WARNING_FREE_BYTES or crowded
    return (
        Finding(
            code="ARENA-BLOAT",
            severity=Severity.WARNING if severe else Severity.INFO,
            confidence=confidence_from(_evidence(heap, len(arenas), len(sub_heaps), committed)),
            subject=f"{len(arenas)} non-main arenas",
            quantities=(
                Quantity("arenas", len(arenas), Unit.COUNT),
                Quantity("sub_heaps", len(sub_heaps), Unit.COUNT),
                Quantity("reserved_bytes", reserved, Unit.BYTES),
                Quantity("committed_bytes", committed, Unit.BYTES),
                Quantity("in_use_bytes", in_use, Unit.BYTES),
                Quantity("free_bytes", free, Unit.BYTES),
                Quantity("arenas_without_thread", without_thread, Unit.COUNT),
                Quantity("threads", threads, Unit.COUNT),
                Quantity("arena_limit", heap.narenas_limit, Unit.COUNT),
                Quantity("arena_limit_reason", heap.limit_reason, Unit.TEXT),
                *_what_if(case, arenas),
            ),
            evidence=(*_evidence(heap, len(arenas), len(sub_heaps), committed), *_reasoning(case)),
            next_steps=(
                *_fewer_arenas(heap, severe=severe),
                "on a live process compare the 64 MiB blocks in pmap -x PID: RSS, not the mapped size, is what counts",
                "malloc_trim(0), called in the process, gives back whole free pages of every arena (glibc 2.8+)",
            ),
            weakened_by=(
                "reserved address space costs no memory by itself; only committed pages that were touched do",
                *gap_consequences(heap),
            ),
        ),
    )


def _kept_bytes(case: Case, arenas: list[Arena], free: int) -> int:
    """What of the free bytes was not given back already, as far as the core shows."""
    report = case.free_memory
    if report is None:
        return free
    heaps = [heap for arena in arenas for heap in report.arenas[arena.index].heaps]
    return sum(heap.free_resident_high + heap.tcache_bytes + heap.unlisted_bytes for heap in heaps)


def _fewer_arenas(heap: HeapSnapshot, *, severe: bool) -> Iterator[str]:
    """The setting that makes fewer arenas, where the release has it and memory is at stake."""
    if heap.parameters is not None and heap.parameters.value("arena_max") is None:
        yield "this release of glibc has no limit of arenas: fewer threads that allocate, or a newer release"
    elif severe:
        yield (
            "set MALLOC_ARENA_MAX=2 (or the tunable glibc.malloc.arena_max) and restart; threads then share arenas"
            " and may wait for each other's locks: compare throughput"
        )
    else:
        yield (
            "nothing has to be done as long as address space is not limited (ulimit -v): MALLOC_ARENA_MAX=2 and a restart would make"
            " fewer arenas, at the price of threads that wait for each other's locks"
        )


def _what_if(case: Case, arenas: list[Arena]) -> Iterator[Quantity]:
    """What malloc_trim would return of these arenas, and what two arenas instead of all would have saved."""
    report = case.free_memory
    if report is None:
        return
    trim = TrimEstimate.sum_of(report.arenas[arena.index].trim for arena in arenas)
    yield Quantity("trim_bytes", trim.bytes, Unit.BYTES)
    yield Quantity("trim_resident_low_bytes", trim.resident_low, Unit.BYTES)
    yield Quantity("trim_resident_high_bytes", trim.resident_high, Unit.BYTES)
    estimate = _suggested(case)
    if estimate is not None:
        yield Quantity("arena_max_2_saves_low_bytes", estimate.saved_low, Unit.BYTES)
        yield Quantity("arena_max_2_saves_high_bytes", estimate.saved_high, Unit.BYTES)


def _suggested(case: Case) -> ArenaMaxEstimate | None:
    estimates = case.free_memory.arena_max if case.free_memory is not None else ()
    return next((estimate for estimate in estimates if estimate.arena_max == SUGGESTED_ARENA_MAX), None)


def _reasoning(case: Case) -> Iterator[Evidence]:
    """How much of the committed memory that would save, and why no more is known."""
    estimate = _suggested(case)
    if estimate is not None:
        yield Evidence(
            f"with {estimate.arena_max} arenas between {format_bytes(estimate.saved_low)} and"
            f" {format_bytes(estimate.saved_high)} less would be committed: {'; '.join(estimate.reasoning[:2])}",
            "free memory of each arena",
            Strength.HINT,
        )


def _evidence(heap: HeapSnapshot, arenas: int, sub_heaps: int, committed: int) -> tuple[Evidence, ...]:
    covered = all(arena.coverage == 1.0 for arena in heap.arenas if not arena.is_main)
    return (
        Evidence(
            f"{sub_heaps} sub-heaps of {arenas} arenas commit {format_bytes(committed)}",
            "sub-heap headers",
            Strength.PROOF if covered else Strength.SOLID,
        ),
        *(
            ()
            if covered
            else (
                Evidence(
                    "not every sub-heap could be walked to its end",
                    "chunk walk",
                    Strength.HINT,
                    speaks_against=True,
                ),
            )
        ),
    )
