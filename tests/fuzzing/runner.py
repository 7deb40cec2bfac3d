"""Many trials in child processes: limits of time and memory, failures kept, repeated and made smaller.

A trial is its number: the same ``--seed``, number and seed cores give the same mutation.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzzing import trial
from tests.fuzzing.mutations import Mutation, extreme_mutations, mutation_of
from tests.fuzzing.structures import SoundCore

CPU_SECONDS = 10
WALL_SECONDS = 60
"""Many times more, because other work may be going on on the machine; what is measured is reported."""
PREPARING_FACTOR = 4
"""A child's first analyses import what is needed, and may take so many times as long as a trial."""
BATCH = 500
"""Trials of one child: what it imports first should cost little beside them, and little be lost when time is over."""
MEMORY_BASE = 200 << 20
MEMORY_PER_FILE_BYTE = 5
"""The design's 80 bytes a chunk, for chunks of 16 bytes."""
WITH_SYSROOT = 1 / 8
MINIMISING_ATTEMPTS = 80
DETAIL_CHARACTERS = 8000


@dataclass(slots=True)
class Result:
    """What many trials gave."""

    trials: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    failure_counts: Counter[str] = field(default_factory=Counter)
    most_cpu_seconds: float = 0.0
    most_cpu_trial: str = ""
    most_wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    most_memory_bytes: int = 0
    most_memory_share: float = 0.0
    most_memory_trial: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is tried: trial ``number`` is the same in every run with the same plan."""

    seed: int
    cores: tuple[SoundCore, ...]
    limit_memory: bool = True

    def trial(self, number: int) -> tuple[SoundCore, Mutation, random.Random, Path | None]:
        """The core, the mutation, the source of all else that is drawn, and the sysroot if one is used."""
        source = random.Random(f"{self.seed}/{number}")
        core = source.choice(self.cores)
        sysroot = core.sysroot if source.random() < WITH_SYSROOT else None
        return core, mutation_of(core, source), source, sysroot


@dataclass(frozen=True, slots=True)
class ExtremesPlan(Plan):
    """One field with one extreme value in each trial; the cores take turns."""

    mutations: tuple[list[Mutation], ...] = ()

    @classmethod
    def of(cls, seed: int, cores: tuple[SoundCore, ...], limit_memory: bool = True) -> ExtremesPlan:
        return cls(seed, cores, limit_memory, tuple(extreme_mutations(core) for core in cores))

    @property
    def count(self) -> int:
        """Trials until every core had all of its mutations."""
        return len(self.cores) * max(map(len, self.mutations))

    def trial(self, number: int) -> tuple[SoundCore, Mutation, random.Random, Path | None]:
        source = random.Random(f"{self.seed}/{number}")
        turn, row = number % len(self.cores), number // len(self.cores)
        core, mutations = self.cores[turn], self.mutations[turn]
        sysroot = core.sysroot if source.random() < WITH_SYSROOT else None
        return core, mutations[row % len(mutations)], source, sysroot


class MutatedFile:
    """A core's file that gets its mutations and loses them again: faster than a new file each time."""

    def __init__(self, core: SoundCore, folder: Path) -> None:
        self.path = folder / f"{core.name.replace('/', '+')}.core"
        self._content = core.content
        with self.path.open("wb") as file:
            for at in range(0, len(core.content), 4096):
                page = core.content[at : at + 4096]
                if page.count(0) != len(page):
                    file.seek(at)
                    file.write(page)
            file.truncate(len(core.content))
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    @contextlib.contextmanager
    def with_mutation(self, mutation: Mutation) -> Iterator[Path]:
        size = len(self._content)
        try:
            for offset, data in mutation.writes:
                os.pwrite(self._descriptor, data[: max(0, size - offset)], offset)
            if mutation.size is not None:
                os.ftruncate(self._descriptor, mutation.size)
            yield self.path
        finally:
            if mutation.size is not None:
                os.ftruncate(self._descriptor, size)
                self._restore(min(mutation.size, size), size)
            for offset, data in mutation.writes:
                self._restore(offset, offset + len(data))

    def _restore(self, start: int, end: int) -> None:
        for at in range(start, min(end, len(self._content)), 1 << 16):
            piece = self._content[at : min(end, at + (1 << 16))]
            if piece.count(0) != len(piece) or end - start < 1 << 16:
                os.pwrite(self._descriptor, piece, at)


# ------------------------------------------------------------------------------------- in the child


def _child(plan: Plan, numbers: Sequence[int], channel: int, folder: Path) -> None:
    """Do trials and write a line of JSON about each; never returns."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    # What hangs on a sound core must not hang here for ever.
    _limit_time(PREPARING_FACTOR)
    _prepare(plan, folder)
    gc.freeze()  # what is imported need not be looked through in each trial
    files: dict[str, MutatedFile] = {}
    for number in numbers:
        core, mutation, source, sysroot = plan.trial(number)
        if core.name not in files:
            files[core.name] = MutatedFile(core, folder)
        _tell(channel, {"begin": number})
        with files[core.name].with_mutation(mutation) as path:
            _tell(channel, {"end": number, "core": core.name, **_limited(plan, core, path, sysroot or empty, source)})
    os._exit(0)


def _prepare(plan: Plan, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The first analysis imports what is needed: neither its time nor its memory belongs to a trial.
    trial.let_defects_through()
    for core in plan.cores[:: max(1, len(plan.cores) // 3)]:
        first = MutatedFile(core, folder)
        for sysroot in (core.sysroot, folder / "empty"):
            with contextlib.suppress(trial.Failure):
                trial.try_core(first.path, sysroot or folder / "empty", random.Random(0))
    roots = tuple(str(core.sysroot) for core in plan.cores if core.sysroot)
    code = (sys.prefix, sys.base_prefix, str(Path(trial.coreheap.__file__).parent), str(Path(__file__).parents[2]))
    trial.watch_opened_files(
        (str(folder), "/proc/self/", os.environ.get("TMPDIR", "/var/tmp"), "/var/tmp", *code, *roots)
    )


def _limited(plan: Plan, core: SoundCore, path: Path, sysroot: Path, source: random.Random) -> dict[str, Any]:
    """One trial under its limits: a hang ends the process with the stack on standard error."""
    budget = MEMORY_BASE + MEMORY_PER_FILE_BYTE * len(core.content)
    if plan.limit_memory:
        data = _status("VmData")
        resource.setrlimit(resource.RLIMIT_DATA, (data + budget, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = _status("VmRSS")
    _limit_time(1)
    wall, cpu = time.monotonic(), time.process_time()
    answer: dict[str, Any] = {}
    try:
        answer["outcome"] = trial.try_core(path, sysroot, source)
    except trial.Failure as failure:
        answer |= {"outcome": "failure", "kind": failure.kind, "signature": failure.signature, "detail": failure.detail}
    signal.setitimer(signal.ITIMER_PROF, 0)
    faulthandler.cancel_dump_traceback_later()
    answer |= {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu, "memory": 0, "budget": budget}
    if plan.limit_memory:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        answer["memory"] = max(0, _status("VmHWM") - before)
    return answer


def _limit_time(factor: int) -> None:
    """End this process, with its stack on standard error, when the time is over."""
    faulthandler.dump_traceback_later(factor * WALL_SECONDS, exit=True)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGPROF, chain=True)
    signal.setitimer(signal.ITIMER_PROF, factor * CPU_SECONDS)


def _status(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _tell(channel: int, message: dict[str, Any]) -> None:
    os.write(channel, json.dumps(message).encode() + b"\n")


# ------------------------------------------------------------------------------------- the parent


class _Worker:
    """A child with a batch of numbers; what it wrote last says where it was when it died."""

    def __init__(self, plan: Plan, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self.folder = Path(tempfile.mkdtemp(prefix="coreheap-fuzz-", dir=_fast_folder()))
        self.begun: int | None = None
        self.done: set[int] = set()
        self._rest = b""
        self.channel, writer = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.channel)
                errors = os.open(self.folder / "stderr", os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(errors, 2)
                faulthandler.enable()  # anew: pytest's own writes elsewhere
                _child(plan, self.numbers, writer, self.folder)
            except BaseException:  # noqa: BLE001 - a child must not go on as a second parent
                traceback.print_exc()
            finally:
                os._exit(77)
        os.close(writer)

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it says; StopIteration when there is nothing now. ``ended`` when it is gone."""
        data = os.read(self.channel, 1 << 20)
        if not data:
            self._rest = b""
            yield {"ended": True}
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        yield from (json.loads(line) for line in lines)

    def end(self) -> tuple[str, str]:
        """How it died, and what it wrote to standard error."""
        os.close(self.channel)
        _, status = os.waitpid(self.pid, 0)
        errors = (self.folder / "stderr").read_text(errors="replace")
        shutil.rmtree(self.folder, ignore_errors=True)
        code = os.waitstatus_to_exitcode(status)
        return (f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"), errors


def _fast_folder() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run(
    plan: Plan,
    *,
    count: int | None = None,
    minutes: float | None = None,
    jobs: int = 1,
    first: int = 0,
    progress: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Trials from ``first`` on, until ``count`` are done or the time is over."""
    result = Result()
    end = time.monotonic() + 60 * minutes if minutes is not None else None
    waiting: list[list[int]] = []
    following = first
    workers: dict[int, _Worker] = {}
    while True:
        over = end is not None and time.monotonic() > end
        while len(workers) < jobs and not over:
            if not waiting:
                size = BATCH if count is None else min(BATCH, first + count - following)
                if size <= 0:
                    break
                waiting.append(list(range(following, following + size)))
                following += size
            worker = _Worker(plan, waiting.pop())
            workers[worker.channel] = worker
        if not workers:
            return result
        ready, _, _ = select.select(list(workers), [], [], 1.0)
        for channel in ready:
            worker = workers[channel]
            for message in worker.messages():
                if "begin" in message:
                    worker.begun = message["begin"]
                elif "end" in message:
                    worker.done.add(message["end"])
                    _count(plan, result, message)
                    progress(result)
                elif "ended" in message:
                    del workers[channel]
                    rest = _buried(plan, result, worker)
                    if rest:
                        waiting.append(rest)


def _count(plan: Plan, result: Result, message: dict[str, Any]) -> None:
    result.trials += 1
    result.outcomes[message["outcome"]] += 1
    result.cpu_seconds += message["cpu"]
    if message["cpu"] > result.most_cpu_seconds:
        result.most_cpu_seconds, result.most_cpu_trial = message["cpu"], f"{message['end']} ({message['core']})"
    result.most_wall_seconds = max(result.most_wall_seconds, message["wall"])
    if message["memory"] > result.most_memory_bytes:
        result.most_memory_bytes, result.most_memory_trial = message["memory"], f"{message['end']} ({message['core']})"
    result.most_memory_share = max(result.most_memory_share, message["memory"] / message["budget"])
    if message["outcome"] == "failure":
        _keep(plan, result, message["end"], message["kind"], message["signature"], message["detail"])
    elif message["memory"] > message["budget"]:
        _keep(plan, result, message["end"], "memory", "memory over the budget", str(message))


def _buried(plan: Plan, result: Result, worker: _Worker) -> list[int]:
    """Note how a child died; returns the numbers that it did not get to."""
    how, errors = worker.end()
    missing = [number for number in worker.numbers if number not in worker.done]
    sanitized = "AddressSanitizer" in errors or "runtime error:" in errors or "UndefinedBehavior" in errors
    if not missing and not sanitized:
        return []
    if worker.begun is None:
        raise RuntimeError(f"a child did not begin: {how}\n{errors[-DETAIL_CHARACTERS:]}")
    number = worker.begun
    kind = "sanitizer" if sanitized else "hang" if "SIGPROF" in how or "Timeout (" in errors else "death"
    if missing:
        result.trials += 1
        result.outcomes["failure"] += 1
    _keep(plan, result, number, kind, f"{kind} {_place_in(errors) or how}", f"{how}\n{errors[-DETAIL_CHARACTERS:]}")
    return [left for left in missing if left != number]


def _place_in(errors: str) -> str:
    """The innermost function of coreheap in a dumped stack, or the first line of a sanitizer's report."""
    for line in errors.splitlines():
        if "runtime error:" in line or "ERROR: AddressSanitizer" in line:
            return line.strip()[:160]
        if line.startswith("  File ") and "/coreheap/" in line:
            place, _, function = line.rpartition(" in ")
            return f"{place.rpartition('/coreheap/')[2].split(chr(34))[0]}:{function}"
    return ""


def _keep(plan: Plan, result: Result, number: int, kind: str, signature: str, detail: str) -> None:
    result.failure_counts[signature] += 1
    if signature in result.failures:
        return
    core, mutation, _, sysroot = plan.trial(number)
    result.failures[signature] = {
        "seed": plan.seed,
        "number": number,
        "core": core.name,
        "sysroot": sysroot is not None,
        "kind": kind,
        "signature": signature,
        "detail": detail,
        **mutation.as_json(),
    }


# ------------------------------------------------------------------------------------- one failure


@dataclass(frozen=True, slots=True)
class _Repeated(Plan):
    """A plan whose only trial is a given mutation."""

    mutation: Mutation = field(default_factory=lambda: Mutation(()))
    number: int = 0
    with_sysroot: bool = False

    def trial(self, number: int) -> tuple[SoundCore, Mutation, random.Random, Path | None]:
        source = random.Random(f"{self.seed}/{self.number}")
        source.choice(range(1000))
        return self.cores[0], self.mutation, source, self.cores[0].sysroot if self.with_sysroot else None


def repeat(
    kept: dict[str, Any], core: SoundCore, mutation: Mutation | None = None, limit_memory: bool = True
) -> Result:
    """The trial of a kept failure again, with its own mutation or with a smaller one.

    What is shown of the report is drawn anew, so a failure of rendering may need several attempts.
    """
    result = Result()
    for attempt in range(1 if kept["kind"] in ("hang", "memory", "sanitizer", "death") else 6):
        plan = _Repeated(
            kept["seed"],
            (core,),
            limit_memory,
            mutation or Mutation.from_json(kept),
            kept["number"] + attempt,
            kept["sysroot"],
        )
        result = run(plan, count=1)
        if result.failures:
            break
    return result


def minimised(kept: dict[str, Any], core: SoundCore, limit_memory: bool = True) -> dict[str, Any]:
    """The failure with as few writes as still fail in the same way."""
    best = Mutation.from_json(kept)
    attempts = 0

    def still_fails(candidate: Mutation) -> bool:
        nonlocal attempts
        attempts += 1
        found = repeat(kept, core, candidate, limit_memory).failures
        return kept["signature"] in found

    if best.size is not None and best.writes and still_fails(Mutation(best.writes)):
        best = Mutation(best.writes)
    step = max(1, len(best.writes) // 2)
    while step and attempts < MINIMISING_ATTEMPTS:
        at = 0
        while at < len(best.writes) and attempts < MINIMISING_ATTEMPTS:
            fewer = Mutation(best.writes[:at] + best.writes[at + step :], best.size)
            if still_fails(fewer):
                best = fewer
            else:
                at += step
        step //= 2
    return {**kept, **best.as_json()}
