"""The checks, one question a file. To add one: a module here, an entry in CHECKS, three tests."""

from __future__ import annotations

from coreheap.checks import (
    accumulation,
    allocator_abort,
    arena_bloat,
    leaks,
    other_allocator,
    partial_core,
    retained_free,
)
from coreheap.checks.protocol import Case, Check

CHECKS = (
    Check("partial core", partial_core.findings),
    Check("other allocator", other_allocator.findings),
    Check("allocator abort", allocator_abort.findings),
    Check("arena bloat", arena_bloat.findings),
    Check("retained free", retained_free.findings),
    Check("leaks", leaks.findings),
    Check("accumulation", accumulation.findings),
)

__all__ = ["CHECKS", "Case", "Check"]
