"""Sound processes that are killed while their threads are inside malloc: what is half done is in transition, nothing is damage.

Every core is of another moment. What malloc had written and what not is different in each of them; most hold contradictions.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

import coreheap
from coreheap.damage import DamageKind
from tests.conftest import skip_unless_ci
from tests.real_cores import cores, targets
from tests.real_cores.cases import Case
from tests.real_cores.conftest import need_packages
from tests.real_cores.real_programs import tool

TIMES = 3 * int(os.environ.get("COREHEAP_KILLS", "3"))
"""How often each of them is killed; more by hand."""
DAMAGE_CODES = ("CORRUPTION-", "DOUBLE-FREE", "USE-AFTER-FREE")
LONGEST_SPIN = 3_000_000
SIGNALS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGQUIT)

WAYS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "threads": (("threads=3",), {}),
    "one_thread": (("threads=1",), {}),
    "one_arena": (("threads=4",), {"MALLOC_ARENA_MAX": "1"}),
    "filled": (("threads=2",), {"MALLOC_PERTURB_": "85"}),
    "no_tcache": (("threads=2",), {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
    "handled": (("threads=1", "handled=1"), {}),
    "handled_threads": (("threads=3", "handled=1"), {}),
}
OTHER_LIBCS = [name for name, target in targets.MATRIX_TARGETS.items() if not target.is_emulated]


def case_for(target: targets.Target) -> Case:
    return Case(f"{target.name}/churning", "churning", support=(), log_bytes=0, target=target)


def killed(target: targets.Target, arguments: tuple[str, ...], environment: dict[str, str], work: Path) -> Path:
    """The core of the program's child, killed as its parent says."""
    directory = cores.default_directory()
    case = case_for(target)
    try:
        command = [*cores.runner(case, directory), str(cores.build(case, directory)), *arguments]
    except cores.CannotMake as problem:
        skip_unless_ci(str(problem))
    unlimited = [tool("prlimit", "util-linux"), "--core=unlimited", "--"]
    subprocess.run([*unlimited, *command], cwd=work, check=True, env=os.environ | environment)
    (core,) = work.glob("core*")
    return core


def hold(
    target: targets.Target, arguments: tuple[str, ...], environment: dict[str, str], name: str, work: Path
) -> None:
    """Kill it so many times; nothing is damaged in any of the cores."""
    if not cores.kernel_writes_cores_here():
        skip_unless_ci("to run this test: sysctl kernel.core_pattern=core, ulimit -H -c unlimited")
    moments = random.Random(name)
    sysroot = None if target.release is None else targets.files_of(target, cores.default_directory()).sysroot
    wrong: list[str] = []
    for number in range(TIMES):
        spin, of = moments.randrange(LONGEST_SPIN), SIGNALS[number % 3]
        core = killed(target, (*arguments, f"spin={spin}", f"signal={int(of)}"), environment, work)
        with coreheap.open(core, sysroot=sysroot) as opened:
            report = coreheap.analyze(opened)
        core.unlink()
        assert report.heap is not None
        assert report.defects == ()
        found = [f"{f.code} {f.severity.value}" for f in report.findings if f.code.startswith(DAMAGE_CODES)]
        found += [d.kind.value for d in report.damages if d.kind is not DamageKind.IN_TRANSITION]
        wrong += [f"spin={spin} {of.name}: {word}" for word in found]
    assert wrong == []


@pytest.mark.parametrize("way", WAYS)
def test_killed_inside_malloc_it_is_in_transition(way: str, tmp_path: Path) -> None:
    hold(targets.NATIVE, *WAYS[way], way, tmp_path)


@pytest.mark.parametrize("name", OTHER_LIBCS)
def test_every_libc_leaves_its_own_moments(name: str, tmp_path: Path) -> None:
    target = targets.MATRIX_TARGETS[name]
    need_packages(target)
    hold(target, ("threads=3",), {}, name, tmp_path)
