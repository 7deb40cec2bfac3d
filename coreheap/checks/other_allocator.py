"""OTHER-ALLOCATOR: malloc is not glibc's, or not only, or a run time keeps memory of its own."""

from __future__ import annotations

import numpy as np

from coreheap.accounting.other_allocators import OtherAllocator, other_allocators
from coreheap.checks.protocol import Case
from coreheap.corefile.kinds import WRITE
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.heap import ChunkState
from coreheap.mappings import KINDS, MappingKind
from coreheap.quantities import format_bytes
from coreheap.report import Finding, Quantity, Severity, Unit

NEARLY_EMPTY_SHARE = 0.1
"""glibc's share of anonymous memory below which another allocator is taken for the real one."""
LEAST_BYTES = 1 << 20
"""Of memory beside glibc's heap: less is what any process has, and nothing to look for elsewhere."""

STATISTICS = {
    "jemalloc": "malloc_stats_print(), or MALLOC_CONF=stats_print:true at the process's end",
    "tcmalloc": "MALLOCSTATS=2 at the process's end, MallocExtension_GetStats(), or its heap profiler (HEAPPROFILE)",
    "mimalloc": "MIMALLOC_SHOW_STATS=1, or mi_stats_print()",
    "musl": "none: musl keeps no statistics; heaptrack and valgrind see its malloc",
    "Go": "runtime.ReadMemStats, GODEBUG=gctrace=1, or a heap profile (net/http/pprof)",
    "AddressSanitizer": "ASAN_OPTIONS=atexit=1 at the process's end, or __asan_print_accumulated_stats()",
    "valgrind": "valgrind --tool=massif, or its own summary at the end",
    "pymalloc": "sys._debugmallocstats(), or PYTHONMALLOC=malloc to give all objects to malloc; tracemalloc says who allocates",
}
"""How each allocator is asked on a live process."""


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding for each allocator beside glibc's that left a trace."""
    heap = case.heap
    in_use = 0
    if heap is not None:
        in_use = sum(heap.totals[state].chunk_bytes for state in (ChunkState.IN_USE, ChunkState.TCACHE))
        in_use += heap.mmapped_bytes
    unexplained = case.ledger.child("other_anonymous").bytes
    return tuple(_finding(case, allocator, in_use, unexplained) for allocator in other_allocators(case.core))


def _finding(case: Case, allocator: OtherAllocator, in_use: int, unexplained: int) -> Finding:
    theirs = bytes_claimed(case, allocator)
    elsewhere = unexplained + theirs
    is_known = bool(allocator.ranges)
    # A run time of which nothing was found may never have been started.
    nearly_empty = elsewhere >= LEAST_BYTES and (is_known or allocator.replaces_malloc)
    nearly_empty &= case.heap is None or in_use < NEARLY_EMPTY_SHARE * elsewhere
    evidence = list(allocator.evidence)
    evidence += [fact for ranges in allocator.ranges if ranges.is_estimate for fact in ranges.evidence]
    if nearly_empty:
        evidence.append(
            Evidence(
                f"glibc's heap holds {format_bytes(in_use)} beside {format_bytes(theirs)} of {allocator.name}'s and"
                f" {format_bytes(unexplained)} of other anonymous memory",
                "address space ledger",
                Strength.HINT,
            )
        )
    elif allocator.replaces_malloc:
        evidence.append(
            Evidence(
                f"glibc's heap holds {format_bytes(in_use)}, more than a remainder",
                "address space ledger",
                Strength.HINT,
                speaks_against=True,
            )
        )
    if not is_known and allocator.is_searched:
        evidence.append(_against("none of its structures were found in memory"))
    elif not is_known and not allocator.replaces_malloc:
        evidence.append(_against("whether it was ever started is not known: not all of its memory can be looked at"))
    weakened_by = []
    missing = case.core.memory.writable_bytes_not_saved() - _of_tools_not_saved(case)
    if is_known and missing:
        weakened_by.append(
            f"{format_bytes(missing)} of writable memory are not in the core, and what they describe is not counted: its bytes"
            " are the least"
        )
    if allocator.replaces_malloc and not nearly_empty:
        weakened_by.append("the library may be there and serve a part of the program only")
    if not is_known:
        weakened_by.append(
            "its structures were not found in the core: its memory counts as other anonymous memory, which also holds what"
            " the program mapped itself"
        )
    elif allocator.is_estimate:
        weakened_by.append("a part of its bytes is told by where it lies, not by the allocator's own structures")
    steps = (
        [f"ask {allocator.name} itself on a live process: {STATISTICS[allocator.name]}"]
        if allocator.name in STATISTICS
        else []
    )
    if allocator.replaces_malloc:
        steps.append(
            "to see glibc's view, run the workload once without this allocator (LD_PRELOAD, or how it is linked)"
        )
    return Finding(
        code="OTHER-ALLOCATOR",
        severity=Severity.WARNING if nearly_empty else Severity.INFO,
        confidence=confidence_from(evidence),
        subject=allocator.name,
        quantities=_quantities(
            allocator.name, theirs if is_known else None, allocator.is_estimate, in_use, unexplained, nearly_empty
        ),
        evidence=tuple(evidence),
        next_steps=tuple(steps),
        weakened_by=tuple(weakened_by),
    )


def _against(statement: str) -> Evidence:
    return Evidence(statement, "anonymous memory", Strength.HINT, speaks_against=True)


def _of_tools_not_saved(case: Case) -> int:
    """Bytes of shadow memory and reserves that the core leaves out: they describe no allocator's blocks."""
    table = case.mappings
    if table is None:
        return 0
    rows = (table.kind == KINDS.index(MappingKind.TOOL_MEMORY)) & (table.flags & WRITE != 0)
    return int((table.committed_bytes[rows] - np.minimum(table.saved_bytes[rows], table.committed_bytes[rows])).sum())


def bytes_claimed(case: Case, allocator: OtherAllocator) -> int:
    """Mapped bytes that the table of mappings gives to an allocator: what nobody with a better claim has."""
    table = case.mappings
    if table is None or allocator.name not in table.names:
        return 0 if table is not None else allocator.bytes
    rows = (table.kind == KINDS.index(MappingKind.OTHER_ALLOCATOR)) & (table.name == table.names.index(allocator.name))
    return int((table.end[rows] - table.start[rows]).sum(dtype=np.uint64))


def _quantities(
    name: str, theirs: int | None, is_estimate: bool, in_use: int, unexplained: int, nearly_empty: bool
) -> tuple[Quantity, ...]:
    return (
        Quantity("allocator", name, Unit.TEXT),
        Quantity("allocator_bytes", theirs, Unit.BYTES),
        Quantity("allocator_bytes_are_estimated", str(is_estimate).lower(), Unit.TEXT),
        Quantity("glibc_in_use_bytes", in_use, Unit.BYTES),
        Quantity("other_anonymous_bytes", unexplained, Unit.BYTES),
        Quantity("glibc_heap_nearly_empty", str(nearly_empty).lower(), Unit.TEXT),
    )
