"""PARTIAL-CORE: what the core does not hold, and which statements that weakens."""

from __future__ import annotations

from coreheap.checks.protocol import Case
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.heap import IN_KNOWN_BLOCKS
from coreheap.quantities import format_bytes
from coreheap.report import Finding, Quantity, Severity, Unit

UNKNOWN_THOUGH_SAVED = (
    "arena_ring_open",
    "arenas_of_unknown_copy",
    "main_arena_unknown",
    "malloc_par_unknown",
    "mmapped_chunks_differ",
    "other_malloc_copy",
    "piece_of_unknown_copy",
    "release_unknown",
    "tcache_not_found",
    "thread_storage_not_saved",
)
"""Gaps of the heap that a whole core may have as well: what was saved there does not tell. An emulator's core holds the threads'
storage, and no register that leads to it (qemu-user leaves the guest's thread pointer out, linux-user/elfload.c)."""


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding when the file is cut, or when memory that the heap needs was not saved."""
    core, heap = case.core, case.heap
    left_out_bytes = core.memory.writable_bytes_not_saved()
    may_be_cut = core.truncated or left_out_bytes > 0
    heap_gaps = [
        gap
        for gap in (heap.gaps if heap else ())
        if (may_be_cut or gap.cause not in UNKNOWN_THOUGH_SAVED) and not gap.cause.startswith(IN_KNOWN_BLOCKS)
    ]
    if not may_be_cut and heap is not None and heap.anomaly_count:
        # All that the headers promise is there, and the heap contradicts itself: what cannot be read is damaged, not missing.
        heap_gaps = []
    if not core.truncated and not heap_gaps and (heap is not None or not left_out_bytes):
        return ()
    unattributed = sum(
        part.range.byte_count
        for arena in (heap.arenas if heap else ())
        for part in arena.unattributed
        if part.cause != "foreign_sbrk"
    )
    coverages = [arena.coverage for arena in (heap.arenas if heap else ()) if arena.coverage is not None]
    evidence = []
    if core.truncated:
        evidence.append(
            Evidence(
                f"the file holds {core.coverage:.1%} of the bytes that its program headers promise",
                "program headers against file size",
                Strength.PROOF,
            )
        )
    if heap_gaps:
        evidence.append(
            Evidence(
                f"{len(heap_gaps)} parts of the heap's own data are not in the core",
                "gaps",
                Strength.PROOF,
            )
        )
    if left_out_bytes:
        evidence.append(
            Evidence(
                f"{format_bytes(left_out_bytes)} of writable memory are not in the core",
                "program headers",
                Strength.PROOF,
            )
        )
    return (
        Finding(
            code="PARTIAL-CORE",
            severity=Severity.WARNING,
            confidence=confidence_from(evidence),
            subject="the core file",
            quantities=(
                Quantity("file_coverage", core.coverage, Unit.SHARE),
                Quantity("saved_bytes", core.saved_bytes, Unit.BYTES),
                Quantity("writable_bytes_not_saved", left_out_bytes, Unit.BYTES),
                Quantity("heap_bytes_not_attributed", unattributed, Unit.BYTES),
                Quantity("lowest_arena_coverage", min(coverages) if coverages else None, Unit.SHARE),
                Quantity("gaps", len(case.gaps), Unit.COUNT),
            ),
            evidence=tuple(evidence),
            next_steps=(
                "raise the limits that cut the core: ulimit -c unlimited, systemd's ProcessSizeMax and ExternalSizeMax,"
                " free disk space",
                "set /proc/PID/coredump_filter to 0x33 (the default) or 0x7f so that heap and libc data are saved",
            ),
            weakened_by=(),
        ),
    )
