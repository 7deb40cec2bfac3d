"""Programs that nobody wrote for us: what is called lost is compared with memcheck's word on the same work.

Two witnesses that know nothing of coreheap: memcheck's leak search in a second run of the same work, and a scan of all
that the core holds for anything that could be a pointer to a chunk that is called lost. `docs/compared.md` explains each
difference between the two tools.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.leaks import VERDICTS, Verdict
from tests.conftest import skip_unless_ci
from tests.real_cores import cores, real_programs
from tests.real_cores.live_words import LOST, Chunks, Scan
from tests.real_cores.real_programs import PROGRAMS, CannotRun, Memcheck

CHEAP = ("python3", "python3-threads", "perl", "sqlite3", "git-cat-file", "git-pack", "gdb", "nginx")
COUNTS_MAY_DIFFER = {"gdb": 40, "python3-threads": 2}
"""Blocks by which two runs of the same work differ: what a scheduler decides. All others are equal to the block."""
PYTHON_LEAKS = {7000 + 16 * number for number in range(12)} | {50}
"""What PYTHON_WORK forgets, requested bytes."""


@dataclass(frozen=True, slots=True)
class Compared:
    core: Path
    scan: Scan
    memcheck: Memcheck

    @property
    def chunks(self) -> Chunks:
        return self.scan.chunks


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compared]:
    """``compared(program)``: its core's chunks and memcheck's word; each runs once natively, once under valgrind."""
    done: dict[str, Compared] = {}

    def compare(name: str) -> Compared:
        if name not in done:
            directory = tmp_path_factory.mktemp("program")
            try:
                # Names of one length: programs keep their paths in the heap.
                core = real_programs.core_of(PROGRAMS[name], directory / "natively")
                memcheck = real_programs.memcheck_of(PROGRAMS[name], directory / "valgrind")
            except CannotRun as problem:
                if os.environ.get("CI") == "true":
                    pytest.fail(str(problem))
                pytest.skip(str(problem))
            done[name] = _analysed(core, memcheck)
        return done[name]

    return compare


def _analysed(core: Path, memcheck: Memcheck) -> Compared:
    with coreheap.open(core) as opened:
        report = coreheap.analyze(opened)
        heap, leaks = report.heap, report.leaks
        assert heap is not None
        assert leaks is not None
        assert report.anomalies == ()
        assert leaks.missing_root_bytes == 0
        scan = Scan.of(core, heap, tuple(thread.stack_pointer for thread in opened.threads))
        return Compared(core, scan, memcheck)


def least_usable(requested: int) -> int:
    """What malloc gives for a request on x86-64, at the least."""
    return max(24, (requested + 8 + 15) // 16 * 16 - 8)


def may_be(usable: int, requested: int) -> bool:
    """Whether a chunk can be what was requested: fitting, with a rest too small for a chunk, or mmapped pages."""
    least = least_usable(requested)
    return usable in (least, least + 16) or usable == (requested + 16 + 4095) // 4096 * 4096 - 16


def unmatched(ours: Counter[int], theirs: Counter[int]) -> Counter[int]:
    """Usable sizes of ours for which no requested size of theirs is left, matched in the order of size."""
    rest = sorted(theirs.elements())
    alone: Counter[int] = Counter()
    for usable in sorted(ours.elements()):
        while rest and least_usable(rest[0]) < usable and not may_be(usable, rest[0]):
            rest.pop(0)
        if rest and may_be(usable, rest[0]):
            rest.pop(0)
        else:
            alone[usable] += 1
    return alone


def everything(memcheck: Memcheck) -> Counter[int]:
    return sum(memcheck.sizes.values(), Counter())


@pytest.mark.parametrize("name", CHEAP)
def test_the_same_blocks_are_in_use(compared: Callable[[str], Compared], name: str) -> None:
    found = compared(name)
    ours, theirs = found.chunks.sizes(*VERDICTS), everything(found.memcheck)
    allowed = COUNTS_MAY_DIFFER.get(name, 0)
    assert abs(ours.total() - theirs.total()) <= allowed
    # Sizes that hang on the processor (signal stacks), on the time of day, or on addresses.
    assert unmatched(ours, theirs).total() <= allowed + ours.total() // 200 + 3


@pytest.mark.parametrize("name", CHEAP)
def test_nothing_is_called_lost_that_memcheck_does_not(compared: Callable[[str], Compared], name: str) -> None:
    found = compared(name)
    theirs = found.memcheck.sizes["definitely lost"] + found.memcheck.sizes["indirectly lost"]
    assert unmatched(found.chunks.sizes(*LOST), theirs) == Counter()


@pytest.mark.parametrize("name", CHEAP)
def test_no_live_word_leads_to_what_is_called_lost(compared: Callable[[str], Compared], name: str) -> None:
    found = compared(name)
    assert found.scan.live_words_to_lost() == []


@pytest.mark.parametrize("name", ["python3", "python3-threads"])
def test_what_python_forgets_is_lost_or_still_held_by_a_word(compared: Callable[[str], Compared], name: str) -> None:
    found = compared(name)
    forgotten = {least_usable(size) for size in PYTHON_LEAKS if size > 50}
    rows = np.flatnonzero(np.isin(found.chunks.usable, [*forgotten]) & (found.chunks.verdict != Verdict.NONE))
    assert set(found.chunks.usable[rows].tolist()) == forgotten
    definite = rows[found.chunks.verdict[rows] == Verdict.DEFINITELY_LOST]
    others = np.setdiff1d(rows, definite)
    # zlib's stream keeps addresses of buffers that are freed; malloc has given these blocks the same memory.
    assert len(others) <= 4
    held = {target for place, target in found.scan.words_that_lead_to(others) if not found.scan.is_dead(place)}
    assert held == set(found.chunks.payload[others].tolist())


def test_the_leak_of_nginx_is_memchecks(compared: Callable[[str], Compared]) -> None:
    # A compile context of pcre2 that ngx_regex_compile made.
    found = compared("nginx")
    theirs = found.memcheck.sizes["definitely lost"]
    assert theirs.total() > 0
    expected = Counter({least_usable(size): count for size, count in theirs.items()})
    ours = found.chunks.sizes(Verdict.DEFINITELY_LOST)
    assert ours <= expected
    for size in expected - ours:
        # Where a live block's memory once was another's, a pointer to the inside may be left there: it hangs on the length
        # of paths, what malloc cut from what. memcheck knows that nobody wrote it, a core does not.
        rows = np.flatnonzero((found.chunks.usable == size) & (found.chunks.verdict == Verdict.POSSIBLY_LOST))
        assert len(rows) >= (expected - ours)[size]
        held = {target for place, target in found.scan.words_that_lead_to(rows) if not found.scan.is_dead(place)}
        assert held == set(found.chunks.payload[rows].tolist())


BEHIND_DATA = r"""
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
extern char edata, end;
int data[5000] = {1};
/* Memory that the program keeps out of its cores directly behind its data, and the only pointers to its blocks there. */
int main(void) {
    char *behind = (char *)(((uintptr_t)&edata + 4095) & ~(uintptr_t)4095);
    if (&end > behind) return 3;
    void **kept = mmap(behind, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if ((char *)kept != behind || madvise(kept, 1 << 20, MADV_DONTDUMP) != 0) return 4;
    for (int i = 0; i < 100; i++) memset(kept[i] = malloc(1000), 1, 1000);
    abort();
}
"""


def test_memory_behind_a_modules_data_is_not_its_bss(tmp_path: Path, require_tool: Callable[[str, str], str]) -> None:
    """It is missing in the core, so nothing is definitely lost; taken for bss that was never written, 100 blocks were."""
    compiler = require_tool("gcc", "apt-get install gcc libc6-dev")
    if not cores.kernel_writes_cores_here():
        skip_unless_ci(
            "gdb would save what the program excludes; to run this test: sysctl kernel.core_pattern=core, ulimit -H -c unlimited"
        )
    (tmp_path / "behind.c").write_text(BEHIND_DATA)
    command = [compiler, "-O1", "-no-pie", "-Wl,-z,norelro", "-o", "behind", "behind.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    ended = subprocess.run(["prlimit", "--core=unlimited", "--", "./behind"], cwd=tmp_path, check=False)
    assert ended.returncode == -signal.SIGABRT
    (core,) = tmp_path.glob("core*")
    with coreheap.open(core) as opened:
        leaks = coreheap.analyze(opened).leaks
        assert leaks is not None
        assert leaks.missing_root_bytes >= 1 << 20
        assert leaks.totals[Verdict.DEFINITELY_LOST].count == 0
        assert leaks.unreachable.count >= 99
