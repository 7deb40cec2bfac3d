"""Sound processes that are killed while their threads are inside malloc: what is half done is in transition, nothing is damage.

Every core is of another moment. What malloc had written and what not is different in each of them; most hold contradictions.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import coreheap
from coreheap.damage import DamageKind
from tests.conftest import require_tool, skip_unless_ci
from tests.real_cores import cores
from tests.real_cores.real_programs import tool

PROGRAM = Path(__file__).resolve().parents[2] / "fixtures" / "programs" / "churning.c"
TIMES = 3 * int(os.environ.get("COREHEAP_KILLS", "3"))
"""How often each of them is killed; more by hand."""
DAMAGE_CODES = ("CORRUPTION-", "DOUBLE-FREE", "USE-AFTER-FREE")
LONGEST_SPIN = 3_000_000

WAYS: dict[str, tuple[int, dict[str, str]]] = {
    "threads": (3, {}),
    "one_thread": (1, {}),
    "one_arena": (4, {"MALLOC_ARENA_MAX": "1"}),
    "filled": (2, {"MALLOC_PERTURB_": "85"}),
    "no_tcache": (2, {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0"}),
}


@pytest.fixture(scope="module")
def churning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not cores.kernel_writes_cores_here():
        skip_unless_ci("to run this test: sysctl kernel.core_pattern=core, ulimit -H -c unlimited")
    built = tmp_path_factory.mktemp("churning") / "churning"
    compiler = require_tool("gcc", "apt-get install gcc libc6-dev")
    subprocess.run([compiler, "-O1", "-g", "-pthread", "-o", built, PROGRAM], check=True)
    return built


@pytest.mark.parametrize("way", WAYS)
def test_killed_inside_malloc_it_is_in_transition(way: str, churning: Path, tmp_path: Path) -> None:
    threads, environment = WAYS[way]
    moments = random.Random(way)
    unlimited = [tool("prlimit", "util-linux"), "--core=unlimited", "--"]
    wrong: list[str] = []
    seen: Counter[str] = Counter()
    for number in range(TIMES):
        spin, of = moments.randrange(LONGEST_SPIN), (signal.SIGSEGV, signal.SIGABRT, signal.SIGQUIT)[number % 3]
        arguments = [str(churning), f"threads={threads}", f"spin={spin}", f"signal={int(of)}"]
        subprocess.run([*unlimited, *arguments], cwd=tmp_path, check=True, env=os.environ | environment)
        (core,) = tmp_path.glob("core*")
        with coreheap.open(core) as opened:
            report = coreheap.analyze(opened)
        core.unlink()
        assert report.heap is not None
        assert report.defects == ()
        seen["inside"] += report.crash is not None and bool(report.crash.inside_malloc)
        found = [f"{f.code} {f.severity.value}" for f in report.findings if f.code.startswith(DAMAGE_CODES)]
        found += [d.kind.value for d in report.damages if d.kind is not DamageKind.IN_TRANSITION]
        wrong += [f"spin={spin} {of.name}: {word}" for word in found]
    assert wrong == []
    # What this is about; and it is known of them.
    assert seen["inside"] > 0
