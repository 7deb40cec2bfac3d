"""From a core to a report: the whole pipeline on one screen."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from coreheap.accounting import account_for_memory, no_account
from coreheap.accounting.java import named_by_java
from coreheap.allocators.glibc import GlibcAllocator
from coreheap.allocators.protocol import Progress
from coreheap.checks import CHECKS, Case
from coreheap.corefile import Core
from coreheap.corefile.stacks import NO_STACKS, find_stacks
from coreheap.crashes import Holders, find_crash
from coreheap.crashes.abort_message import plain_message
from coreheap.damage import Damage
from coreheap.errors import failure_here
from coreheap.evidence import Gap
from coreheap.forensics import DamageSurvey, find_damages, find_interrupted_consolidation, held_against
from coreheap.free_memory import FreeMemoryReport
from coreheap.heap import NOTHING_LEFT_OUT, HeapSnapshot, StateTotals, sum_of_totals
from coreheap.kernels import active_name
from coreheap.knobs import read_settings
from coreheap.leaks import OPTIONAL_HEURISTICS, Heuristic
from coreheap.mappings import ResidencyBasis
from coreheap.report import (
    CoreSummary,
    Finding,
    Phase,
    ProcessSummary,
    Report,
)
from coreheap.retention import survey_free_memory
from coreheap.thread_summaries import thread_summaries
from coreheap.verdict import leak_verdict, memory_verdict
from coreheap.version import VERSION

if TYPE_CHECKING:
    from coreheap.leak_search import LeakSearch, References

ALLOCATORS = (GlibcAllocator(),)

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class AnalysisOptions:
    """What ``analyze`` should do. ``progress`` is told what is being done; it must not print to stdout.

    ``leaks`` looks for leaks: every pointer in the core is followed. ``retained`` computes as well what each chunk
    keeps alive, which may take longer than all else together; None: where it takes less, and live memory leads. It is of no use
    without ``leaks``. ``low_memory`` looks for leaks
    without holding all references in memory, which takes longer. Without ``residency`` nothing is read only to learn which pages
    were in memory. ``heuristics`` are those that may make a verdict on a chunk milder than plain pointers do.
    """

    progress: Progress = lambda phase, done, total: None
    leaks: bool = True
    retained: bool | None = None
    low_memory: bool = False
    residency: bool = True
    heuristics: frozenset[Heuristic] = OPTIONAL_HEURISTICS


def analyze(core: Core, options: AnalysisOptions | None = None) -> Report:
    """Everything that coreheap can say about a core.

    Raises nothing for damaged or missing heap data: that is in the report's anomalies, gaps and defects. Raises InputNotUsable
    where the core, or a file of a module, was cut while it was read.
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
        core.check_files()
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
    stacks = _answer("stacks", partial(find_stacks, core), defects) or NO_STACKS
    progress("accounting for all memory", 0, None)

    def attempt(name: str, claim: Callable[[], None]) -> None:
        _answer(f"accounting for {name}", claim, defects)

    account_for = partial(account_for_memory, core, heap, attempt=attempt)
    account = _answer("accounting", partial(account_for, residency=options.residency), defects)
    if account is None:
        account = _answer("accounting without residency", partial(account_for, residency=False), defects)
    account = account or no_account()
    ledger = account.ledger
    threads = _answer(
        "threads", partial(thread_summaries, core, heap, stacks, account.mappings.basis), defects
    ) or thread_summaries(core, heap, NO_STACKS, ResidencyBasis.UNKNOWN)
    threads = _answer("Java's threads", partial(named_by_java, core, threads), defects) or threads
    settings = _answer("settings", partial(read_settings, core, heap), defects)
    free_memory = _survey_free_memory(core, heap, account.mappings.basis, search, defects)
    gaps = (*core.gaps, *(heap.gaps if heap else ()), *(search.gaps if search else ()))
    gaps += settings.gaps if settings else ()
    gaps += account.gaps
    damage = _find_damages(core, heap, search, defects)
    holders = search.references.holders if search is not None and search.references is not None else None
    crash = _answer("crash", partial(find_crash, core, heap, stacks, damage.damages, holders), defects)
    if crash is not None and crash.abort_message is not None:
        said = plain_message(crash.abort_message.text)
        damage = replace(damage, damages=held_against(damage.damages, said))
        interrupted = _interrupted_consolidation(core, heap, said, holders, defects)
        if interrupted is not None:
            damage = DamageSurvey((interrupted, *damage.damages), damage.damage_count + 1)
    findings = _run_checks(
        Case(
            core,
            heap,
            ledger,
            gaps,
            leaks,
            retained,
            settings=settings,
            free_memory=free_memory,
            mappings=account.mappings,
            threads=threads,
            damages=damage.damages,
            crash=crash,
        ),
        progress,
        defects,
    )
    of_memory = (
        _answer("verdict", partial(memory_verdict, core, account.mappings, heap, findings, gaps, free_memory), defects)
        or ()
    )
    clock.stop()
    core.check_files()
    change = core.change
    if change:
        gaps += (Gap("core_changed", f"the core changed while it was read, {change}: numbers may not fit together"),)
    left_out = heap is not None and any(gap.cause not in NOTHING_LEFT_OUT for gap in heap.gaps)
    is_partial = bool(change) or core.truncated or left_out or bool(defects)
    report = Report(
        tool_version=VERSION,
        kernels=active_name,
        core=_core_summary(core),
        process=_process_summary(core),
        threads=threads,
        heap=heap,
        totals=_totals(heap),
        ledger=ledger,
        findings=findings,
        verdict=(*of_memory, *leak_verdict(leaks, findings)),
        anomalies=heap.anomalies if heap else (),
        anomaly_count=heap.anomaly_count if heap else 0,
        gaps=(*gaps, *(Gap("check_failed", defect) for defect in defects)),
        phases=tuple(clock.phases),
        is_partial=is_partial
        or (search is not None and (leaks is None or (bool(options.retained) and retained is None))),
        other_allocators=tuple(finding.subject for finding in findings if finding.code == "OTHER-ALLOCATOR"),
        defects=tuple(defects),
        leaks=leaks,
        retained=retained,
        mappings=account.mappings,
        settings=settings,
        free_memory=free_memory,
        damages=damage.damages,
        damage_count=damage.damage_count,
        crash=crash,
    )
    return report, search.references if search else None


def _answer(name: str, question: Callable[[], Answer], defects: list[str]) -> Answer | None:
    """What a part of the analysis answers. One that fails becomes a defect, and the others still run."""
    try:
        return question()
    except Exception as error:  # the one broad except: a defect must not cost the report
        if failure_here(error) is not None:
            raise
        defects.append(f"{name}: {type(error).__name__}: {error}")
        return None


def _search_leaks(
    core: Core, heap: HeapSnapshot, options: AnalysisOptions, progress: Progress, defects: list[str]
) -> LeakSearch | None:
    # Imported here: without leaks nothing of it is needed.
    from coreheap.leak_search import search_leaks

    search = partial(
        search_leaks,
        core,
        heap,
        progress,
        retained=options.retained,
        low_memory=options.low_memory,
        heuristics=options.heuristics,
    )
    return _answer("leak search", search, defects)


def _survey_free_memory(
    core: Core, heap: HeapSnapshot | None, basis: ResidencyBasis, search: LeakSearch | None, defects: list[str]
) -> FreeMemoryReport | None:
    """What malloc holds free; with the names of who holds the pins where references are known."""
    if heap is None:
        return None
    references = search.references if search is not None else None
    holders = references.typical_holders if references is not None else None
    return _answer("free memory", partial(survey_free_memory, core, heap, basis, holders), defects)


def _find_damages(core: Core, heap: HeapSnapshot | None, search: LeakSearch | None, defects: list[str]) -> DamageSurvey:
    """What the heap's contradictions come to; with the names of who holds the culprits where references are known."""
    nothing = DamageSurvey((), 0)
    if heap is None or not heap.anomalies:
        return nothing
    references = search.references if search is not None else None
    holders = references.typical_holders if references is not None else None
    return _answer("damage", partial(find_damages, core, heap, holders), defects) or nothing


def _interrupted_consolidation(
    core: Core, heap: HeapSnapshot | None, said: str, holders: Holders | None, defects: list[str]
) -> Damage | None:
    """The list that malloc_consolidate was joining when it stopped, with who holds the block whose link was overwritten."""
    if heap is None:
        return None
    found = _answer("consolidation", partial(find_interrupted_consolidation, core, heap, said), defects)
    if found is None or found.victim is None or holders is None:
        return found
    block = found.bytes.start
    names = [holder.name for holder in holders(block)]
    named = replace(found.victim, holder=names[0]) if names else found.victim
    return replace(found, victim=named, culprit=named)


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


def _totals(heap: HeapSnapshot | None) -> StateTotals:
    """Totals of all chunks, mmapped ones included."""
    return sum_of_totals(iter((heap.totals, heap.mmapped_totals) if heap else ()))
