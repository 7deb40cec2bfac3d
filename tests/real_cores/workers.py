"""Programs that nobody wrote for us, at work without end: started, fed, and killed or looked at in the middle of it.

Knows how a worker is described and how a core comes of it at any moment, of the kernel or of gdb. Knows nothing of the product.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.real_cores.real_programs import RunFailed, tool

GDB_SECONDS = 120
CORE_SECONDS = 30
MOST_MAPPED_BYTES = 4 << 30
"""gdb writes all that is mapped, whether it was ever touched or not."""
DEADLY = tuple(
    signal.Signals[f"SIG{name}"]
    for name in ["SEGV", "XCPU", "SYS", "XFSZ", "TRAP", "FPE", "QUIT", "ABRT", "ILL", "BUS"]
)
"""The signals that leave a core."""


class TooLargeForGdb(RunFailed):
    """gdb would write too much; the kernel leaves out what was never touched."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A program that allocates without end, or for long. ``feed`` is written to it again and again, ``visit`` called with its
    folder again and again while it runs: what talks to a server.

    ``dies`` False: it handles every signal that would leave a core, so gdb takes all of them. ``allocators``: those beside
    malloc that it has (in place of it, where ``has_glibc_malloc`` is False), by coreheap's names.
    """

    package: str
    prepare: Callable[[Path], Sequence[str]]
    feed: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    signal: signal.Signals = signal.SIGSEGV
    user: str | None = None
    starts_in: float = 0.2
    """Seconds before the work proper."""
    lasts: float = 0.7
    """Seconds of work from then on in which it may be ended."""
    visit: Callable[[Path], None] | None = None
    allocators: frozenset[str] = frozenset()
    dies: bool = True
    has_glibc_malloc: bool = True


@contextmanager
def running(
    worker: Worker, command: Sequence[str], work: Path, more: Mapping[str, str], most_core_bytes: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The worker at work; it and its children are dead afterwards. ``more``: variables of its environment."""
    environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": str(work), **worker.environment, **more}
    limit = "unlimited" if most_core_bytes is None else str(most_core_bytes)
    limited = [tool("prlimit", "util-linux"), f"--core={limit}", "--"]
    with (work.parent / "output").open("wb") as output:
        process = subprocess.Popen(
            [*limited, *command], cwd=work, env=environment, user=worker.user, bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=output,
        )  # fmt: skip
        is_over = threading.Event()
        helpers = [threading.Thread(target=_feed, args=(process, worker.feed.encode()), daemon=True)]
        if worker.visit is not None:
            helpers.append(threading.Thread(target=_visit, args=(worker.visit, work, is_over), daemon=True))
        for helper in helpers:
            helper.start()
        try:
            yield process
        finally:
            is_over.set()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for helper in helpers:
                helper.join()
            assert process.stdin is not None
            process.stdin.close()


def _feed(process: subprocess.Popen[bytes], text: bytes) -> None:
    assert process.stdin is not None
    rest = text
    with suppress(OSError):  # dead, as was meant
        while rest:
            rest = rest[process.stdin.write(rest) or 0 :] or text


def _visit(visit: Callable[[Path], None], work: Path, is_over: threading.Event) -> None:
    while not is_over.is_set():
        try:
            visit(work)
        except OSError:
            is_over.wait(0.02)  # not there yet, or dead as was meant


def killed(
    worker: Worker,
    command: Sequence[str],
    work: Path,
    moment: float,
    more: Mapping[str, str] | None = None,
    most_core_bytes: int | None = None,
) -> tuple[Path, int] | None:
    """The core of the worker killed so many seconds after its first malloc, and its process id; None when it had ended by itself."""
    for old in _cores_in(work):
        old.unlink()
    with running(worker, command, work, more or {}, most_core_bytes) as process:
        if not _reaches(process, moment):
            return None
        os.kill(process.pid, deadly(process.pid, worker.signal))
        try:
            process.wait(CORE_SECONDS)
        except subprocess.TimeoutExpired as problem:
            raise RunFailed(f"it does not die: {command}") from problem
    cores = _cores_in(work)
    if len(cores) != 1:
        raise RunFailed(f"{len(cores)} cores: {(work.parent / 'output').read_text(errors='replace')[-500:]}")
    return cores[0], process.pid


def dumped(
    worker: Worker,
    command: Sequence[str],
    work: Path,
    moment: float,
    afterwards: float,
    log: Path,
    more: Mapping[str, str],
) -> tuple[Path, int, int] | None:
    """A core that gdb took of the living worker, its process id, and how long the witness's file was then.

    The worker works on for ``afterwards`` seconds: what it frees then it had not lost.
    """
    core, length = work.parent / "gdb.core", work.parent / "length"
    for old in (core, length):
        old.unlink(missing_ok=True)
    with running(worker, command, work, more, 0) as process:
        if not _reaches(process, moment):
            return None
        if (mapped := _mapped_bytes(process.pid)) > MOST_MAPPED_BYTES:
            raise TooLargeForGdb(f"gdb would write {mapped} bytes")
        commands = [
            "set debuginfod enabled off", "set auto-solib-add off", "set confirm off", f"attach {process.pid}",
            f"shell stat -c %s {log} > {length}", f"generate-core-file {core}", "detach",
        ]  # fmt: skip
        arguments = [word for command in commands for word in ("-ex", command)]
        said = subprocess.run(
            [tool("gdb", "gdb"), "-nx", "-batch", *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=GDB_SECONDS,
        )  # fmt: skip
        if not core.exists():
            if process.poll() is not None:
                return None
            raise RunFailed(f"gdb made no core: {said.stderr[-500:]}")
        with suppress(subprocess.TimeoutExpired):
            process.wait(afterwards)
    # gdb writes every page. Holes read the same and take no space.
    subprocess.run([tool("fallocate", "util-linux"), "--dig-holes", str(core)], check=True)
    return core, process.pid, int(length.read_text())


def _reaches(process: subprocess.Popen[bytes], moment: float) -> bool:
    while process.poll() is None and not _has_heap(process.pid):
        time.sleep(0.005)
    time.sleep(moment)
    return process.poll() is None


def deadly(pid: int, wanted: signal.Signals) -> signal.Signals:
    """The wanted signal, or where the program handles it another one that leaves a core.

    One that is only blocked comes next: pthread_create blocks all signals for a moment.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    masks = {line[:6]: int(line.split()[1], 16) for line in lines if line.startswith("Sig") and "/" not in line}
    handled, blocked = masks["SigIgn"] | masks["SigCgt"], masks["SigBlk"]
    for mask in (handled | blocked, handled):
        for one in (wanted, *DEADLY):
            if not mask >> (one - 1) & 1:
                return one
    return wanted


def _mapped_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def _has_heap(pid: int) -> bool:
    """Whether the worker itself, no longer prlimit, has memory of brk: before that it has no heap that could be damaged."""
    try:
        is_worker = Path(f"/proc/{pid}/comm").read_text() != "prlimit\n"
        return is_worker and "[heap]" in Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _cores_in(work: Path) -> list[Path]:
    return [path for path in work.rglob("core*") if path.is_file() and path.name.rstrip("0123456789.") == "core"]
