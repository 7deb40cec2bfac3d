"""The checks, one question a file. To add one: a module here, an entry in CHECKS, three tests."""

from __future__ import annotations

from coreheap.checks import (
    accumulation,
    allocator_abort,
    allocator_locked,
    arena_bloat,
    corruption,
    fragmentation,
    leaks,
    other_allocator,
    partial_core,
    pinned_heap,
    retained_free,
    stack_memory,
    tcache_hoard,
    threshold_ratchet,
    unjoined_threads,
    wrong_free,
)
from coreheap.checks.protocol import Case, Check

CHECKS = (
    Check("partial core", partial_core.findings),
    Check("other allocator", other_allocator.findings),
    Check("allocator abort", allocator_abort.findings),
    Check("wrong free", wrong_free.findings),
    Check("corruption", corruption.findings),
    Check("allocator locked", allocator_locked.findings),
    Check("arena bloat", arena_bloat.findings),
    Check("retained free", retained_free.findings),
    Check("pinned heap", pinned_heap.findings),
    Check("fragmentation", fragmentation.findings),
    Check("tcache hoard", tcache_hoard.findings),
    Check("threshold ratchet", threshold_ratchet.findings),
    Check("stack memory", stack_memory.findings),
    Check("unjoined threads", unjoined_threads.findings),
    Check("leaks", leaks.findings),
    Check("accumulation", accumulation.findings),
)

__all__ = ["CHECKS", "Case", "Check"]
