"""TCACHE-HOARD: blocks that threads keep for themselves in their tcaches."""

from __future__ import annotations

from coreheap.checks.free_memory_causes import Cause, can_trim, has_cause, trim_quantities, trim_step, walk_evidence
from coreheap.checks.protocol import Case
from coreheap.evidence import confidence_from
from coreheap.quantities import format_bytes, format_count
from coreheap.report import Finding, Quantity, Unit


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all threads."""
    memory = has_cause(case, Cause.CACHED)
    heap = case.heap
    if memory is None or heap is None:
        return ()
    caches = [cache for cache in heap.thread_caches if cache.count]
    largest = max(caches, key=lambda cache: cache.chunk_bytes, default=None)
    parameters = heap.parameters
    statement = f"tcaches hold {format_bytes(memory.tcache_bytes)} of {format_count(len(memory.arenas))} arenas"
    evidence, doubts = walk_evidence(statement, heap)
    return (
        Finding(
            code="TCACHE-HOARD",
            severity=memory.severity,
            confidence=confidence_from(evidence),
            subject=f"{len(caches)} tcaches",
            quantities=(
                Quantity("tcache_bytes", memory.tcache_bytes, Unit.BYTES),
                Quantity("tcache_share", memory.tcache_bytes / max(memory.walked_bytes, 1), Unit.SHARE),
                Quantity("caches", len(caches), Unit.COUNT),
                Quantity("blocks", sum(cache.count for cache in caches), Unit.COUNT),
                Quantity("largest_cache_bytes", largest.chunk_bytes if largest else None, Unit.BYTES),
                Quantity("largest_cache_thread", largest.thread if largest else None, Unit.COUNT),
                Quantity("tcache_count", parameters.value("tcache_count") if parameters else None, Unit.COUNT),
                Quantity("tcache_max_bytes", parameters.value("tcache_max_bytes") if parameters else None, Unit.BYTES),
                *trim_quantities(memory.trim),
            ),
            evidence=evidence,
            next_steps=(
                "GLIBC_TUNABLES=glibc.malloc.tcache_count=N with a smaller N (0: no tcache) and restart: more calls take an"
                " arena's lock, measure throughput; glibc.malloc.tcache_max=BYTES keeps large blocks out. coreheap threads CORE"
                " on a new core shows what each tcache then holds",
                "fewer threads, or threads that end: a tcache is emptied when its thread exits",
                "malloc_trim(0) does not touch tcaches: it will not help here"
                if not can_trim(memory)
                else f"{trim_step(memory.trim)}; it does not touch tcaches",
            ),
            weakened_by=(
                "threads that go on working use these blocks again; only idle ones hoard",
                *(doubt.text for doubt in doubts),
            ),
        ),
    )
