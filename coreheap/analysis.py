"""From a core to a report: the whole pipeline on one screen."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from coreheap.accounting import build_ledger
from coreheap.allocators.glibc import GlibcAllocator
from coreheap.allocators.protocol import Progress
from coreheap.checks import CHECKS, Case
from coreheap.corefile import Core
from coreheap.evidence import Confidence, Gap
from coreheap.heap import LISTED_FREE_STATES, ChunkState, HeapSnapshot, StateTotals, sum_of_totals
from coreheap.kernels import active_name
from coreheap.leaks import LeakReport, Verdict
from coreheap.report import (
    CoreSummary,
    Finding,
    LedgerNode,
    Phase,
    ProcessSummary,
    Report,
    ThreadSummary,
    VerdictItem,
)

if TYPE_CHECKING:
    from coreheap.leak_search import LeakSearch, References

ALLOCATORS = (GlibcAllocator(),)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """What ``analyze`` should do. ``progress`` is told what is being done; it must not print to stdout.

    ``leaks`` looks for leaks: every pointer in the core is followed. ``retained`` computes as well what each chunk
    keeps alive, which takes longer than all else together; it is of no use without ``leaks``. ``low_memory`` looks for leaks
    without holding all references in memory, which takes longer.
    """

    progress: Progress = lambda phase, done, total: None
    leaks: bool = True
    retained: bool = False
    low_memory: bool = False


def analyze(core: Core, options: AnalysisOptions | None = None) -> Report:
    """Everything that coreheap can say about a core.

    Raises nothing for damaged or missing heap data: that is in the report's anomalies, gaps and defects.
    """
    report, _ = analyze_with_references(core, options)
    return report


def analyze_with_references(core: Core, options: AnalysisOptions | None = None) -> tuple[Report, References | None]:
    """The report of ``analyze``, and an object to ask who holds what, as long as the core is open.

    The latter is None without a heap, without ``options.leaks``, and where the report has the gap
    ``leak_check_impossible``.
    """
    options = options or AnalysisOptions()
    clock = _Clock()

    def progress(phase: str, done: int, total: int | None) -> None:
        clock.enter(phase)
        options.progress(phase, done, total)

    progress("reading modules", 0, None)
    _ = core.modules  # found on first use: this phase's work
    heap: HeapSnapshot | None = None
    for allocator in ALLOCATORS:
        heap = heap or allocator.snapshot(core, progress)
    defects: list[str] = []
    search = _search_leaks(core, heap, options, progress, defects) if heap is not None and options.leaks else None
    if search is not None:
        heap = search.heap
    leaks, retained = (search.leaks, search.retained) if search else (None, None)
    progress("accounting for all memory", 0, None)
    ledger = build_ledger(core, heap)
    gaps = (*core.gaps, *(heap.gaps if heap else ()), *(search.gaps if search else ()))
    findings = _run_checks(Case(core, heap, ledger, gaps, leaks, retained), progress, defects)
    clock.stop()
    is_partial = core.truncated or bool(heap is not None and heap.gaps) or bool(defects)
    report = Report(
        tool_version=tool_version(),
        kernels=active_name,
        core=_core_summary(core),
        process=_process_summary(core),
        threads=_thread_summaries(core, heap),
        heap=heap,
        totals=_totals(heap),
        ledger=ledger,
        findings=findings,
        verdict=(*_verdict(core, ledger, heap, findings), *_leak_verdict(leaks, findings)),
        anomalies=heap.anomalies if heap else (),
        anomaly_count=heap.anomaly_count if heap else 0,
        gaps=(*gaps, *(Gap("check_failed", defect) for defect in defects)),
        phases=tuple(clock.phases),
        is_partial=is_partial or (search is not None and (leaks is None or (options.retained and retained is None))),
        other_allocators=tuple(finding.subject for finding in findings if finding.code == "OTHER-ALLOCATOR"),
        defects=tuple(defects),
        leaks=leaks,
        retained=retained,
    )
    return report, search.references if search else None


def tool_version() -> str:
    """The installed version of coreheap; ``unknown`` when it runs from a source tree that was never installed."""
    try:
        return version("coreheap")
    except PackageNotFoundError:
        return "unknown"


def _answer(name: str, question: Callable[[], Answer], defects: list[str]) -> Answer | None:
    """What a part of the analysis answers. One that fails becomes a defect, and the others still run."""
    try:
        return question()
    except Exception as error:  # noqa: BLE001 - the one broad except: a defect must not cost the report
        defects.append(f"{name}: {type(error).__name__}: {error}")
        return None


def _search_leaks(
    core: Core, heap: HeapSnapshot, options: AnalysisOptions, progress: Progress, defects: list[str]
) -> LeakSearch | None:
    # Imported here: without leaks nothing of it is needed.
    from coreheap.leak_search import search_leaks

    search = partial(search_leaks, core, heap, progress, retained=options.retained, low_memory=options.low_memory)
    return _answer("leak search", search, defects)


def _run_checks(case: Case, progress: Progress, defects: list[str]) -> tuple[Finding, ...]:
    """All findings, the gravest first."""
    findings: list[Finding] = []
    for number, check in enumerate(CHECKS):
        progress("checking", number, len(CHECKS))
        findings.extend(_answer(f"check {check.name!r}", partial(check.findings, case), defects) or ())
    findings.sort(key=lambda finding: (-finding.severity.rank, -finding.confidence.rank, finding.code))
    return tuple(findings)


class _Clock:
    """Measures phases: CPU and wall seconds of each, and the process's anonymous memory at its end."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._name = ""
        self._cpu = self._wall = 0.0
        self._peak: int | None = None

    def enter(self, name: str) -> None:
        """Begin a phase, which ends the one before; nothing happens when it goes on."""
        if name != self._name:
            self.stop()
            self._name, self._cpu, self._wall = name, time.process_time(), time.monotonic()

    def stop(self) -> None:
        """End the phase that runs, if one does."""
        if not self._name:
            return
        cpu, wall = time.process_time() - self._cpu, time.monotonic() - self._wall
        self._note_memory()
        self.phases.append(Phase(self._name, cpu, wall, self._peak))
        self._name = ""

    def _note_memory(self) -> None:
        """RssAnon of /proc/self/status: memory that is coreheap's own, without the pages of the mapped core."""
        try:
            with Path("/proc/self/status").open(encoding="ascii") as status:
                for line in status:
                    if line.startswith("RssAnon:"):
                        self._peak = max(self._peak or 0, int(line.split()[1]) * 1024)
        except OSError:
            self._peak = None


def _core_summary(core: Core) -> CoreSummary:
    memory = core.memory
    mapped = int((memory.region_end - memory.region_start).sum())
    return CoreSummary(
        path=str(core.path),
        file_bytes=core.file_bytes,
        saved_bytes=core.saved_bytes,
        truncated=core.truncated,
        coverage=core.coverage,
        compression=core.compression,
        made_by=core.made_by,
        segment_count=len(core.image.segments),
        not_saved_bytes=mapped - core.saved_bytes,
    )


def _process_summary(core: Core) -> ProcessSummary:
    process = core.process
    return ProcessSummary(
        pid=process.pid,
        command_line=process.command_line or None,
        executable=process.executable or None,
        architecture=core.machine,
        word_bytes=core.word_bytes,
        page_bytes=core.page_bytes,
        signal=process.signal,
        signal_name=_signal_name(process.signal),
        fault_address=process.fault_address,
        thread_count=len(core.threads),
    )


def _signal_name(number: int | None) -> str | None:
    """SIGSEGV for 11 and so on; None where there is no such signal."""
    if not number:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def _thread_summaries(core: Core, heap: HeapSnapshot | None) -> tuple[ThreadSummary, ...]:
    # Of several copies of malloc these are the program's own; what threads have of the others is in those (MallocCopy).
    arenas = [arena for arena in (heap.arenas if heap else ()) if arena.copy == 0]
    caches = [cache for cache in (heap.thread_caches if heap else ()) if cache.copy == 0]
    arena_of = {thread: arena.index for arena in arenas for thread in arena.threads}
    cache_of = {cache.thread: cache for cache in caches if cache.thread is not None}
    summaries = []
    for thread in core.threads:
        cache = cache_of.get(thread.index)
        summaries.append(
            ThreadSummary(
                index=thread.index,
                lwp=thread.lwp,
                signal=thread.signal,
                stack_pointer=thread.stack_pointer,
                program_counter=thread.program_counter,
                thread_pointer=thread.thread_pointer,
                arena=arena_of.get(thread.index),
                thread_cache=cache.address if cache else None,
                tcache_count=cache.count if cache else None,
                tcache_bytes=cache.chunk_bytes if cache else None,
            )
        )
    return tuple(summaries)


def _totals(heap: HeapSnapshot | None) -> StateTotals:
    """Totals of all chunks, mmapped ones included."""
    return sum_of_totals(iter((heap.totals, heap.mmapped_totals) if heap else ()))


def _verdict(
    core: Core, ledger: LedgerNode, heap: HeapSnapshot | None, findings: tuple[Finding, ...]
) -> tuple[VerdictItem, ...]:
    """Where the writable private memory went, the largest part first."""
    another_is_used = any(
        finding.code == "OTHER-ALLOCATOR" and finding.quantity("glibc_heap_nearly_empty") == "true"
        for finding in findings
    )
    elsewhere = "other_allocator" if another_is_used else "not_malloc"
    if heap is None and core.memory.writable_bytes_not_saved():
        elsewhere = "unknown"
    parts: dict[str, int] = {
        "thread_stacks": ledger.child("thread_stacks").bytes,
        "module_data": ledger.child("module_data").bytes + ledger.child("module_bss").bytes,
        elsewhere: ledger.child("other_anonymous").bytes,
    }
    confidence = heap.identity.confidence if heap else Confidence.WEAK
    if heap is not None:
        free = (*LISTED_FREE_STATES, ChunkState.TOP, ChunkState.FREE_UNLISTED)
        parts["in_use"] = sum(heap.totals[state].chunk_bytes for state in (ChunkState.IN_USE, ChunkState.ALLOCATOR_OWN))
        parts["retained_free"] = sum(heap.totals[state].chunk_bytes for state in free)
        parts["mmapped_chunks"] = heap.mmapped_bytes
        missing = heap.totals[ChunkState.DAMAGED].chunk_bytes + sum(
            part.range.byte_count for arena in heap.arenas for part in arena.unattributed
        )
        parts["unknown"] = parts.get("unknown", 0) + missing
    whole = sum(parts.values())
    items = [
        VerdictItem(topic, byte_count, whole, "writable_private", confidence)
        for topic, byte_count in parts.items()
        if byte_count
    ]
    return tuple(sorted(items, key=lambda item: -item.bytes))


def _leak_verdict(leaks: LeakReport | None, findings: tuple[Finding, ...]) -> Iterator[VerdictItem]:
    """What of the live chunks is lost, where a finding says that it matters."""
    parts = {
        "LEAK": ("lost", (Verdict.DEFINITELY_LOST, Verdict.INDIRECTLY_LOST)),
        "POSSIBLE-LEAK": ("possibly_lost", (Verdict.POSSIBLY_LOST,)),
    }
    for finding in findings:
        if leaks is None or finding.code not in parts:
            continue
        topic, verdicts = parts[finding.code]
        part, whole = leaks.total(*verdicts).usable_bytes, leaks.total().usable_bytes
        yield VerdictItem(topic, part, whole, "live_chunks", finding.confidence)
