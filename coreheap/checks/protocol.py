"""What a check is: one question about a process, answered by findings.

A check reads plain values and returns plain values. It prints nothing and raises nothing on purpose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coreheap.corefile import Core
from coreheap.crash import CrashContext
from coreheap.damage import Damage
from coreheap.evidence import Gap
from coreheap.free_memory import FreeMemoryReport
from coreheap.heap import HeapSnapshot
from coreheap.leaks import LeakReport, RetainedReport
from coreheap.mappings import MappingTable
from coreheap.report import Finding, LedgerNode, ThreadSummary
from coreheap.settings import Settings


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that checks may look at. ``heap`` is None where no glibc heap was found.

    ``gaps`` are all gaps of the core and of the heap together. ``leaks`` is None where leaks were not looked for,
    ``retained`` where retained sizes were not.
    """

    core: Core
    heap: HeapSnapshot | None
    ledger: LedgerNode
    gaps: tuple[Gap, ...]
    leaks: LeakReport | None = None
    retained: RetainedReport | None = None
    settings: Settings | None = None
    free_memory: FreeMemoryReport | None = None
    mappings: MappingTable | None = None
    threads: tuple[ThreadSummary, ...] = ()
    damages: tuple[Damage, ...] = ()
    crash: CrashContext | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One question: its name for progress and defects, and the function that answers it."""

    name: str
    findings: Callable[[Case], tuple[Finding, ...]]
