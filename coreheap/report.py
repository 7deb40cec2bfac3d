"""The one value that every analysis ends in and every rendering starts from.

Knows: the shape of a report. Does not know: terminals, JSON, HTML, or how any number came about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from coreheap.evidence import Anomaly, Confidence, Evidence, Gap
from coreheap.heap import HeapSnapshot, StateTotals
from coreheap.leaks import LeakReport, RetainedReport


class Severity(Enum):
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"

    @property
    def rank(self) -> int:
        return {"info": 0, "warning": 1, "error": 2}[self.value]


class Unit(Enum):
    """What a quantity counts; decides how it is shown, never what it is."""

    BYTES = "bytes"
    COUNT = "count"
    SHARE = "share"
    ADDRESS = "address"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Quantity:
    """A named number of a finding. ``value`` None means unknown. Shares are between 0 and 1."""

    name: str
    value: int | float | str | None
    unit: Unit


@dataclass(frozen=True, slots=True)
class Finding:
    """A statement about the process that someone may act on; ``render`` puts it into a sentence.

    ``code`` never changes meaning; docs/findings/CODE.md explains it.
    ``next_steps`` say what to do and what it costs, ``weakened_by`` what would refute the finding or lowers it here.
    """

    code: str
    severity: Severity
    confidence: Confidence
    subject: str
    quantities: tuple[Quantity, ...]
    evidence: tuple[Evidence, ...]
    next_steps: tuple[str, ...] = ()
    weakened_by: tuple[str, ...] = ()

    def quantity(self, name: str) -> int | float | str | None:
        """The value of a quantity by name; KeyError where the finding has none of that name."""
        for quantity in self.quantities:
            if quantity.name == name:
                return quantity.value
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class LedgerNode:
    """Bytes under a name; a node with children is exactly their sum, by construction (``of``)."""

    name: str
    bytes: int
    children: tuple[LedgerNode, ...] = ()

    @classmethod
    def of(cls, name: str, *children: LedgerNode) -> LedgerNode:
        """A node whose bytes are the sum of its children's."""
        return cls(name, sum(child.bytes for child in children), children)

    def child(self, *path: str) -> LedgerNode:
        """The descendant by names; KeyError names the missing one."""
        node = self
        for name in path:
            for candidate in node.children:
                if candidate.name == name:
                    node = candidate
                    break
            else:
                raise KeyError(f"{node.name} has no {name}")
        return node


@dataclass(frozen=True, slots=True)
class CoreSummary:
    """The file. ``coverage`` is the share of the promised bytes that the file holds; ``compression`` None when plain."""

    path: str
    file_bytes: int
    saved_bytes: int
    truncated: bool
    coverage: float
    compression: str | None
    made_by: str
    segment_count: int
    not_saved_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessSummary:
    """The process. Fields are None where the core does not say."""

    pid: int | None
    command_line: str | None
    executable: str | None
    architecture: str
    word_bytes: int
    page_bytes: int
    signal: int | None
    signal_name: str | None
    fault_address: int | None
    thread_count: int


@dataclass(frozen=True, slots=True)
class ThreadSummary:
    """One thread: its arena and tcache where they could be found (None: not found), and its stack pointer."""

    index: int
    lwp: int
    signal: int | None
    stack_pointer: int | None
    program_counter: int | None
    thread_pointer: int | None
    arena: int | None
    thread_cache: int | None
    tcache_count: int | None
    tcache_bytes: int | None


@dataclass(frozen=True, slots=True)
class Phase:
    """What one step of the analysis cost. ``peak_anonymous_bytes`` is of the whole process so far, None where the system does not say."""

    name: str
    cpu_seconds: float
    wall_seconds: float
    peak_anonymous_bytes: int | None


@dataclass(frozen=True, slots=True)
class VerdictItem:
    """One answer to "where did the memory go", most important first.

    ``topic`` is a lower snake case word (``in_use``, ``retained_free``, ``arena_bloat``, ``mmapped_chunks``,
    ``not_malloc``, ``unknown``, ...); ``bytes`` of ``of_bytes``, which ``whole`` names.
    """

    topic: str
    bytes: int
    of_bytes: int
    whole: str
    confidence: Confidence


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that ``analyze`` found. ``heap`` is None where there is no glibc heap that could be read.

    ``verdict`` has the most important item first. ``is_partial`` says that gaps touch the heap's numbers, or that a
    part which was asked for is missing. ``leaks`` is None where leaks were not looked for, or could not be;
    ``retained`` where retained sizes were not asked for.
    """

    tool_version: str
    kernels: str
    core: CoreSummary
    process: ProcessSummary
    threads: tuple[ThreadSummary, ...]
    heap: HeapSnapshot | None
    totals: StateTotals
    ledger: LedgerNode
    findings: tuple[Finding, ...]
    verdict: tuple[VerdictItem, ...]
    anomalies: tuple[Anomaly, ...]
    anomaly_count: int
    gaps: tuple[Gap, ...]
    phases: tuple[Phase, ...]
    is_partial: bool
    other_allocators: tuple[str, ...] = field(default=())
    defects: tuple[str, ...] = field(default=())
    """Checks that failed because of a defect of coreheap itself; the report is still valid without them."""
    leaks: LeakReport | None = None
    retained: RetainedReport | None = None
