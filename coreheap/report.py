"""The one value that every analysis ends in and every rendering starts from.

Knows: the shape of a report. Does not know: terminals, JSON, HTML, or how any number came about.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from coreheap.crash import CrashContext
from coreheap.damage import Damage
from coreheap.evidence import Anomaly, Confidence, Evidence, Gap
from coreheap.free_memory import FreeMemoryReport
from coreheap.heap import HeapSnapshot, StateTotals
from coreheap.leaks import LeakReport, RetainedReport
from coreheap.mappings import MappingTable
from coreheap.settings import Settings


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
    """Bytes under a name; a node with children is exactly their sum, by construction (``of``).

    ``bytes`` are mapped, that is reserved. The other numbers are MappingTable's, None where they are not told apart that far
    down (states of chunks): ``committed_bytes`` of them may be accessed or hold something, the core holds ``saved_bytes``,
    and at least ``resident_low``, at most ``resident_high`` were in memory or swapped out.
    """

    name: str
    bytes: int
    children: tuple[LedgerNode, ...] = ()
    committed_bytes: int | None = None
    saved_bytes: int | None = None
    resident_low: int | None = None
    resident_high: int | None = None

    @classmethod
    def of(cls, name: str, *children: LedgerNode) -> LedgerNode:
        """A node whose numbers are the sums of its children's, None where one of them has none."""
        return cls(
            name,
            sum(child.bytes for child in children),
            children,
            _sum_if_known(child.committed_bytes for child in children),
            _sum_if_known(child.saved_bytes for child in children),
            _sum_if_known(child.resident_low for child in children),
            _sum_if_known(child.resident_high for child in children),
        )

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


def _sum_if_known(numbers: Iterable[int | None]) -> int | None:
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)


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
    """One thread: its arena and tcache where they could be found (None: not found), and its stack.

    ``name`` and ``name_source`` (``comm``, ``executable``, ``java``): a core has the name of the first thread only, a Java VM
    those of its own threads. ``start_routine``: the function that the thread began with, and its module. ``is_main``: the
    thread that the process began with. The stack is [``stack_start``, ``stack_end``) without its guard of ``guard_bytes``, as
    pthread_getattr_np says it; ``stack_source`` how it was found (``descriptor``, ``initial_stack``, ``mapping``).
    ``stack_used_bytes``: from the stack pointer to the end, of a
    thread in a signal handler on a stack of its own (``on_signal_stack``) from where it was interrupted.
    ``stack_resident_bytes``: what the core has pages for, ``stack_peak_bytes``: from the lowest of these pages to the end; at
    least so many where a core leaves out pages of zeros.
    """

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
    name: str | None = None
    name_source: str | None = None
    start_routine: str | None = None
    is_main: bool = False
    stack_start: int | None = None
    stack_end: int | None = None
    stack_source: str | None = None
    guard_bytes: int | None = None
    stack_used_bytes: int | None = None
    stack_resident_bytes: int | None = None
    stack_peak_bytes: int | None = None
    on_signal_stack: bool = False

    @property
    def stack_reserved_bytes(self) -> int | None:
        """Address space of the stack; None where its bounds are not known."""
        return None if self.stack_start is None or self.stack_end is None else self.stack_end - self.stack_start


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
    ``not_malloc``, ``unknown``, ...); ``bytes`` of ``of_bytes``, which ``whole`` names. ``weakened_by`` is what the core
    says against it, which lowered its confidence. ``resident_low`` and ``resident_high``: at least and at most so many of the
    bytes were in memory, or swapped out; None where nothing is known of that. ``of_resident_low`` and ``of_resident_high``: the same of
    ``of_bytes``.
    """

    topic: str
    bytes: int
    of_bytes: int
    whole: str
    confidence: Confidence
    weakened_by: tuple[str, ...] = ()
    resident_low: int | None = None
    resident_high: int | None = None
    of_resident_low: int | None = None
    of_resident_high: int | None = None


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
    mappings: MappingTable | None = None
    """Every mapped byte by kind and owner; None only in reports made without a core."""
    settings: Settings | None = None
    """How malloc and a JVM were set; None only where reading it failed by a defect."""
    free_memory: FreeMemoryReport | None = None
    """What malloc holds free, page by page; None without a heap."""
    damages: tuple[Damage, ...] = ()
    """What is damaged in the heap, the gravest first; at most 100."""
    damage_count: int = 0
    """How many damages there are, those that ``damages`` leaves out with them."""
    crash: CrashContext | None = None
    """How the process ended; None in a core of a living process, and where it failed by a defect."""
