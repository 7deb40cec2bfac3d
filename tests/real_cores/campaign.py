"""The soundness campaign: programs of Debian packages, ended three times in the middle of their work, and what coreheap says wrongly.

Nothing of these programs is damaged, so every damage that is certain or strong is wrong. What is in use is known from
outside the process (witness.py), to the block. What a report calls lost is wrong where the program frees it later, or where a live
word of the core leads to it. ``scripts/campaign`` is the command line of this module; the programs are in campaign_programs.py.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import coreheap
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.report import Finding, Report
from tests.real_cores import calibration, live_words, witness, workers
from tests.real_cores.comparison import ledger_errors, payloads, set_difference, sure_damage, usable_bytes_at
from tests.real_cores.real_programs import CannotRun, RunFailed
from tests.real_cores.witness import Account, Events
from tests.real_cores.workers import Worker

MOST_CORE_BYTES = 300_000_000
"""Larger cores are cut by the kernel, and the program is left out."""
AFTERWARDS_SECONDS = 3.0
"""So long a program works on after gdb looked at it: what it frees then it had not lost."""
TRIES = 6
"""How often an end is tried where programs have ended by themselves before."""
TIMES = 3


@dataclass(frozen=True, slots=True)
class End:
    """One end of one program: what it had, and what coreheap said of it.

    ``how``: ``killed`` (the kernel's core) or ``dumped`` (gdb's). ``blocks``: live by the witness, which the
    report was compared with; 0 where malloc is not glibc's. ``findings``: code and confidence of each. ``lost``: blocks that are called lost
    in a finding. ``wrong``: every statement that is certain or strong and not true.
    """

    program: str
    how: str
    core_bytes: int
    blocks: int
    calls: int
    threads: int
    inside_malloc: bool
    findings: tuple[tuple[str, str], ...]
    wrong_findings: tuple[tuple[str, str], ...]
    leads: str
    lost: int
    wrong: tuple[str, ...]
    seconds: float


def ends_of(name: str, worker: Worker, directory: Path, times: int = TIMES, keep: Path | None = None) -> list[End]:
    """Ends the worker ``times`` times, each at another moment; the last one by gdb where it may. ``keep``: for cores of which
    something wrong was said; all others are deleted."""
    shutil.rmtree(directory, ignore_errors=True)
    work = directory / "work"
    work.mkdir(parents=True)
    if worker.user is not None:
        if os.geteuid() != 0:
            raise CannotRun(f"{name} runs as the user {worker.user}: be root")
        shutil.chown(work, worker.user)
    command = worker.prepare(work)
    moments = random.Random(name)
    library = witness.build(directory.parent)
    ends: list[End] = []
    for number in range(times):
        by_gdb = number == times - 1 or not worker.dies
        for attempt in range(TRIES):
            moment = (worker.starts_in + moments.random() * worker.lasts) / (1 + attempt)
            try:
                core = _end(worker, command, work, library, moment, by_gdb)
            except workers.TooLargeForGdb:
                by_gdb = False
                core = _end(worker, command, work, library, moment, by_gdb)
            if core is not None:
                break
        else:
            raise RunFailed(f"{name} ended too early {TRIES} times")
        end = _examined(name, worker, "dumped" if by_gdb else "killed", *core)
        ends.append(end)
        if end.wrong and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.move(core[0], keep / f"{name}.{number}.core")
        else:
            core[0].unlink()
    shutil.rmtree(directory, ignore_errors=True)
    return ends


def _end(
    worker: Worker, command: Sequence[str], work: Path, library: Path, moment: float, by_gdb: bool
) -> tuple[Path, Events] | None:
    log = work.parent / "events"
    log.write_bytes(b"")
    log.chmod(0o666)
    more = {"LD_PRELOAD": str(library), "COREHEAP_WITNESS": str(log)}
    if by_gdb:
        dumped = workers.dumped(worker, command, work, moment, AFTERWARDS_SECONDS, log, more)
        return None if dumped is None else (dumped[0], Events(log, dumped[1], dumped[2]))
    killed = workers.killed(worker, command, work, moment, more, MOST_CORE_BYTES)
    return None if killed is None else (killed[0], Events(log, killed[1]))


def _examined(name: str, worker: Worker, how: str, core: Path, events: Events) -> End:
    account = events.account()
    size = core.stat().st_blocks * 512
    if size > 0.99 * MOST_CORE_BYTES:
        raise RunFailed(f"{name}: its core has {size} bytes")
    before = _processor_seconds()
    with coreheap.open(core) as opened:
        report = coreheap.analyze(opened)
        stack_pointers = tuple(thread.stack_pointer for thread in opened.threads)
    seconds = _processor_seconds() - before
    sets = sets_otherwise(report, account) if worker.has_glibc_malloc else []
    wrong = [*sets, *sure_damage(report), *report.defects, *ledger_errors(report.ledger)]
    lost, refuted = lost_wrongly(report, core, stack_pointers, events)
    wrong += refuted if sure_leak(report) else []
    wrong_findings = []
    for finding in report.findings:
        if why := why_wrong(finding, report, worker, account, bool(refuted)):
            wrong_findings.append((finding.code, finding.confidence.value))
            if finding.confidence.rank > Confidence.PLAUSIBLE.rank:
                wrong.append(f"{finding.code} {finding.confidence.value}: {why}")
    return End(
        name, how, size, len(account.live) if worker.has_glibc_malloc else 0, account.calls, report.process.thread_count,
        report.crash is not None and bool(report.crash.inside_malloc),
        tuple((finding.code, finding.confidence.value) for finding in report.findings), tuple(wrong_findings),
        report.verdict[0].topic if report.verdict else "", lost, tuple(wrong), round(seconds, 2),
    )  # fmt: skip


def _processor_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime


def sets_otherwise(report: Report, account: Account) -> list[str]:
    """Blocks in use against the witness: all that are live, and no others but what each thread had under way."""
    heap = report.heap
    if heap is None:
        return ["no heap was found"]
    found = payloads(heap, ChunkState.IN_USE)
    differences = set_difference("in use", np.intersect1d(found, account.live), account.live)
    extra = np.setdiff1d(found, np.union1d(account.live, account.freeing))
    if len(extra) > report.process.thread_count:
        differences += set_difference("in use", extra, extra[:0])
    short = account.requested > usable_bytes_at(heap, account.live)
    short &= np.isin(account.live, found)
    if short.any():
        differences.append(f"{int(short.sum())} live blocks are larger than usable_bytes: {account.live[short][0]:#x}")
    return differences


def sure_leak(report: Report) -> bool:
    """Whether a finding that is strong or certain calls blocks lost."""
    return any(f.code == "LEAK" and f.confidence.rank > Confidence.PLAUSIBLE.rank for f in report.findings)


def lost_wrongly(report: Report, core: Path, stack_pointers: tuple[int, ...], events: Events) -> tuple[int, list[str]]:
    """How many blocks a finding calls lost, and what refutes that of some."""
    if report.heap is None or report.leaks is None or not any(finding.code == "LEAK" for finding in report.findings):
        return 0, []
    scan = live_words.Scan.of(core, report.heap, stack_pointers)
    lost = scan.lost_payloads()
    refuted = []
    if len(freed := events.freed_later(lost)):
        refuted.append(f"{len(freed)} blocks are called lost and were freed later: {freed[0]:#x}")
    if len(held := events.held_by_the_kernel(lost)):
        refuted.append(f"{len(held)} blocks are called lost and the kernel has their address: {held[0]:#x}")
    if led := scan.live_words_to_lost():
        refuted.append(f"{len(led)} live words lead to blocks that are called lost: {led[0][0]:#x} to {led[0][1]:#x}")
    return len(lost), refuted


DAMAGE_CODES = ("CORRUPTION-", "DOUBLE-FREE", "USE-AFTER-FREE", "ALLOCATOR-ABORT")


def why_wrong(finding: Finding, report: Report, worker: Worker, account: Account, refuted: bool) -> str:
    """Why a finding is not true of a sound program whose core is complete; empty where it is, or nothing tells."""
    if finding.code.startswith(DAMAGE_CODES):
        return "the program is sound"
    if finding.code == "PARTIAL-CORE":
        return "the core is complete"
    if finding.code == "LEAK" and refuted:
        return "not lost"
    if finding.code == "OTHER-ALLOCATOR" and finding.subject not in worker.allocators:
        return f"it has no {finding.subject}"
    return free_figures_wrong(finding, report, account)


def free_figures_wrong(finding: Finding, report: Report, account: Account) -> str:
    """What is said to be free is more than the heap holds beside the live blocks."""
    if finding.code not in calibration.FIGURES:
        return ""
    name = "tcache_bytes" if finding.code == "TCACHE-HOARD" else "free_bytes"
    free, held = finding.quantity(name), report.ledger.child("malloc").bytes
    most = held - int(account.requested.sum())
    return f"{free} bytes free, at most {most} can be" if isinstance(free, int) and free > most else ""


# --------------------------------------------------------------------------------- the results


def run(
    programs: dict[str, Worker], directory: Path, keep: Path | None, minutes: float | None
) -> tuple[list[End], dict[str, str]]:
    """All ends, and why a program has none; a line is printed for each program. ``minutes``: no program is started after so many."""
    ends: list[End] = []
    left_out: dict[str, str] = {}
    limit = time.monotonic() + minutes * 60 if minutes is not None else None
    for name, worker in programs.items():
        if limit is not None and time.monotonic() > limit:
            left_out[name] = "no time was left"
            continue
        try:
            found = ends_of(name, worker, directory / name, keep=keep)
        except (CannotRun, RunFailed, witness.WitnessError, subprocess.SubprocessError) as problem:
            left_out[name] = str(problem).strip().splitlines()[0][:200]
            shutil.rmtree(directory / name, ignore_errors=True)
            print(f"{name:16} left out: {problem}", flush=True)
            continue
        ends += found
        print(line_of(name, found), flush=True)
        for end in found:
            for word in end.wrong:
                print(f"    WRONG ({end.how}): {word}", flush=True)
    return ends, left_out


def line_of(name: str, ends: Sequence[End]) -> str:
    codes = Counter(f"{code} {confidence}" for end in ends for code, confidence in end.findings)
    said = ", ".join(f"{word} x{count}" for word, count in sorted(codes.items()))
    return (
        f"{name:16} {'/'.join(str(end.blocks) for end in ends):>24} blocks  {sum(end.inside_malloc for end in ends)} in malloc  "
        f"{max(end.core_bytes for end in ends) / 1e6:6.1f} MB {max(end.seconds for end in ends):5.2f} s  "
        f"{'/'.join(sorted({end.leads for end in ends}))}  {said}"
    )


def show(ends: Sequence[End], left_out: dict[str, str], packages: dict[str, str]) -> None:
    """The counts, what was wrong, and how to get what is missing."""
    print(f"\n{len({end.program for end in ends})} programs ended {len(ends)} times; {len(left_out)} left out")
    for code, confidence, given, wrong, _ in calibration.rows(statements(ends)):
        print(f"{code:28} {confidence:10} given {given:5}, wrong {wrong:4}")
    print(f"ends of which something wrong was said with certain or strong: {sum(bool(end.wrong) for end in ends)}")
    missing = [packages[name] for name, why in left_out.items() if "apt-get install" in why]
    if missing:
        print(
            f"for the others: apt-get install --no-install-recommends {' '.join(sorted(set(' '.join(missing).split())))}"
        )


def statements(ends: Sequence[End]) -> list[tuple[str, str, str]]:
    """(code, confidence, judgement) of every finding of every end."""
    result = []
    for end in ends:
        left = Counter(end.wrong_findings)
        for kind in end.findings:
            is_wrong = left[kind] > 0
            left[kind] -= is_wrong
            result.append((*kind, "wrong" if is_wrong else "right" if kind[0] in JUDGED else "not judged"))
    return result


JUDGED = frozenset(("LEAK", "OTHER-ALLOCATOR", "PARTIAL-CORE", *calibration.FIGURES))
"""Findings that the witness could refute, beside those of damage, all of which are wrong."""


def document(
    ends: Sequence[End], left_out: dict[str, str], packages: dict[str, str], revision: str
) -> dict[str, object]:
    """What is kept of a campaign: fixtures/facts/campaign.json. ``versions``: of each program's package."""
    versions = {name: _version(package.split()[0]) for name, package in packages.items()}
    return {
        "revision": revision, "left_out": left_out, "versions": versions, "ends": [asdict(end) for end in ends],
    }  # fmt: skip


def _version(package: str) -> str:
    asked = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", package], capture_output=True, text=True, check=False
    )
    return asked.stdout
