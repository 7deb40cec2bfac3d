"""OTHER-ALLOCATOR: malloc is not glibc's, or not only."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coreheap.checks.protocol import Case
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.heap import ChunkState
from coreheap.quantities import format_bytes
from coreheap.report import Finding, Quantity, Severity, Unit

NEARLY_EMPTY_SHARE = 0.1
"""glibc's share of writable private memory below which another loaded allocator is taken for the real one."""


@dataclass(frozen=True, slots=True)
class KnownAllocator:
    """An allocator that replaces malloc, recognised by the path of its library."""

    name: str
    path: re.Pattern[str]


# Debian's musl is libc.so in a folder of musl's; a libc.so elsewhere may as well be Android's.
KNOWN_ALLOCATORS = (
    KnownAllocator("jemalloc", re.compile(r"/libjemalloc([.\-_][.\-_0-9a-z]*)?\.so[^/]*$")),
    KnownAllocator("tcmalloc", re.compile(r"/libtcmalloc[_a-z]*[.\-_0-9]*\.so[^/]*$")),
    KnownAllocator("mimalloc", re.compile(r"/libmimalloc([.\-_][.\-_0-9a-z]*)?\.so[^/]*$")),
    KnownAllocator("musl", re.compile(r"/(ld-musl-[^/]+|libc\.musl-[^/]+)\.so[^/]*$|musl[^/]*/libc\.so$")),
    KnownAllocator("snmalloc", re.compile(r"/libsnmallocshim[.\-_0-9a-z]*\.so[^/]*$")),
    KnownAllocator("Hoard", re.compile(r"/libhoard[.\-_0-9a-z]*\.so[^/]*$")),
    KnownAllocator("TBB malloc", re.compile(r"/libtbbmalloc_proxy[.\-_0-9a-z]*\.so[^/]*$")),
)


def allocators_loaded(case: Case) -> list[tuple[KnownAllocator, str, int]]:
    """Known allocators among the modules: which, the module's file name, and where it is mapped."""
    found = []
    for module in case.core.modules:
        file_name = module.path.rpartition("/")[2]
        for allocator in KNOWN_ALLOCATORS:
            if allocator.path.search(module.path):
                found.append((allocator, file_name, module.start))
    return found


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding for each known allocator loaded, or one when no heap of glibc's is there at all."""
    heap = case.heap
    in_use = 0
    if heap is not None:
        in_use = sum(heap.totals[state].chunk_bytes for state in (ChunkState.IN_USE, ChunkState.TCACHE))
        in_use += heap.mmapped_bytes
    elsewhere = case.ledger.child("other_anonymous").bytes
    nearly_empty = heap is None or in_use < NEARLY_EMPTY_SHARE * max(elsewhere, 1)
    loaded = allocators_loaded(case)
    result = []
    for allocator, file_name, address in loaded:
        evidence = [Evidence(f"{file_name} is mapped", "modules of the process", Strength.SOLID, address)]
        if nearly_empty:
            evidence.append(
                Evidence(
                    f"glibc's heap holds {format_bytes(in_use)} beside {format_bytes(elsewhere)} of other"
                    " anonymous memory",
                    "address space ledger",
                    Strength.HINT,
                )
            )
        else:
            evidence.append(
                Evidence(
                    f"glibc's heap holds {format_bytes(in_use)}, more than a remainder",
                    "address space ledger",
                    Strength.HINT,
                    speaks_against=True,
                )
            )
        result.append(_finding(allocator.name, evidence, in_use, elsewhere, nearly_empty))
    if not loaded and heap is None and not case.core.memory.writable_bytes_not_saved():
        result.append(
            _finding(
                "unknown",
                [
                    Evidence(
                        "no malloc_state of any glibc from 2.12 to 2.44 is in the core",
                        "symbols, sub-heap headers and a scan of writable memory",
                        Strength.SOLID,
                    )
                ],
                0,
                elsewhere,
                True,
            )
        )
    return tuple(result)


def _finding(name: str, evidence: list[Evidence], in_use: int, elsewhere: int, nearly_empty: bool) -> Finding:
    return Finding(
        code="OTHER-ALLOCATOR",
        severity=Severity.WARNING if nearly_empty else Severity.INFO,
        confidence=confidence_from(evidence),
        subject=name,
        quantities=(
            Quantity("allocator", name, Unit.TEXT),
            Quantity("glibc_in_use_bytes", in_use, Unit.BYTES),
            Quantity("other_anonymous_bytes", elsewhere, Unit.BYTES),
            Quantity("glibc_heap_nearly_empty", str(nearly_empty).lower(), Unit.TEXT),
        ),
        evidence=tuple(evidence),
        next_steps=(
            "use the allocator's own statistics on a live process (malloc_stats_print, MALLOC_CONF=stats_print:true,"
            " HEAPPROFILE, MIMALLOC_SHOW_STATS=1)",
            "to see glibc's view, run the workload once without the preloaded allocator",
        ),
        weakened_by=(
            "memory of the other allocator is counted as other anonymous memory, which also holds what the program"
            " mapped itself",
        ),
    )
