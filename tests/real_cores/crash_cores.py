"""Cores of programs that say on standard output what is true of their crash: lines "name address".

Knows: how such a program is built, run and opened. Does not know: which kinds of crashes there are.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import coreheap
from coreheap.analysis import AnalysisOptions
from coreheap.corefile import Core
from coreheap.crash import CrashContext
from coreheap.report import Report
from tests.conftest import skip_unless_ci
from tests.real_cores import cores
from tests.real_cores.cases import Case
from tests.real_cores.conftest import need_packages


@dataclass(frozen=True)
class Crash:
    """A core, and what the program said."""

    core: Path
    truth: dict[str, int]
    sysroot: Path | None
    executable: Path

    def open(self) -> Core:
        return coreheap.open(self.core, sysroot=self.sysroot, executable=self.executable)

    def report(self, *, leaks: bool = False) -> Report:
        with self.open() as core:
            return coreheap.analyze(core, AnalysisOptions(leaks=leaks))

    def context(self) -> CrashContext:
        crash = self.report().crash
        assert crash is not None
        return crash


def crash_of(case: Case, arguments: tuple[str, ...], folder: Path) -> Crash:
    """Run a program to its death; skips where this machine lacks what it takes."""
    if not cores.kernel_writes_cores_here():
        skip_unless_ci("core_pattern sends cores elsewhere; as root: echo core > /proc/sys/kernel/core_pattern")
    need_packages(case.target)
    directory = cores.default_directory()
    try:
        executable = cores.build(case, directory)
        runner = cores.runner(case, directory)
    except cores.CannotMake as problem:
        skip_unless_ci(str(problem))
    command = cores.command_with_limits(case, [*runner, str(executable), *arguments], directory)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=60)
    # The emulator writes the program's core and dies of the same signal, with a core of its own.
    found = list(folder.glob("qemu_*.core" if case.target.is_emulated else "core*"))
    assert done.returncode < 0, (done.returncode, done.stderr)
    assert len(found) == 1, found
    truth = {name: int(value, 16) for name, value in (line.split() for line in done.stdout.splitlines())}
    sysroot = None
    if case.target.release is not None:
        sysroot = directory / "packages" / case.target.name / "sysroot"
    return Crash(found[0], truth, sysroot, executable)
