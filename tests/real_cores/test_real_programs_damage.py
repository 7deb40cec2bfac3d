"""Sound programs that die in the middle of their work, inside malloc too: nothing is called damage that is a moment's state.

Real programs are killed at random moments of work that allocates without end. And a program is taken through malloc, free and
realloc by single steps, with a core every few instructions: with one thread glibc takes no lock, so nothing but where the
thread stands tells that the heap is being changed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import coreheap
from tests.conftest import skip_unless_ci
from tests.real_cores import cores, real_programs
from tests.real_cores.comparison import sure_damage
from tests.real_cores.real_programs import CannotRun, tool
from tests.real_cores.workers import Worker, killed

TIMES = int(os.environ.get("COREHEAP_KILLS", "3"))
"""How often each program is killed; more by hand."""

# ----------------------------------------------------------------------------------- the programs


PYTHON = """
import json, random, zlib, threading, sys
random.seed(4)
def work(n):
    kept = {}
    while True:
        text = json.dumps({"k%d" % i: list(range(i % 90)) for i in range(random.randrange(60))})
        kept[random.randrange(300)] = (json.loads(text), zlib.compress(text.encode()), bytearray(random.randrange(9000)))
for n in range(int(sys.argv[1])): threading.Thread(target=work, args=(n,), daemon=True).start()
work(0)
"""
PERL = """
my (%h, @a); srand 3;
while (1) {
  my $k = int rand 500; my $s = "x" x int rand 3000; $h{$k} = [map { "$_$s" } 1 .. rand 9]; delete $h{int rand 500};
  push @a, join ",", sort keys %h; splice @a, 0, 30 if @a > 60; $a[0] =~ s/(\\d)(\\d)/$2$1/g;
}
"""
SQL = (
    "create table if not exists t (a integer primary key, b text);\n"
    "insert or replace into t select n * 7919 % 2003, hex(randomblob(n % 200)) from "
    "(with recursive c(n) as (select 1 union all select n + 1 from c where n < 900) select n from c);\n"
    "select count(*), max(s) from (select substr(b, 1, 2) g, group_concat(b) s from t group by g);\n"
    "delete from t where a % 3 = 1;\nselect json_group_array(b) from (select b from t order by b limit 90);\n"
)
POSTGRES_SQL = (
    "select count(*), length(string_agg(n::text, ',')) from generate_series(1, 3000) n group by n % 40 order by 1;\n"
    "select jsonb_agg(n), array_agg(repeat('x', n)) from generate_series(1, 90) n;\n"
    "create temp table x as select n, md5(n::text) m from generate_series(1, 500) n;\n"
    "select a.m, b.n from x a join x b on a.n = b.n * 2 order by 1;\ndrop table x;\n"
)
AWK = """BEGIN { srand(2); while (1) { k = int(rand() * 700); a[k] = a[k] sprintf("%s-%d", k, rand() * 1e6);
  if (length(a[k]) > 900) { n = split(a[k], parts, "-"); a[k] = parts[n] } if (rand() < .2) delete a[int(rand() * 700)] } }"""
BASH = 'a=(); while :; do a+=("$RANDOM$RANDOM"); t="${a[*]}"; t="${t//1/xyz}"; ((${#a[@]} > 90)) && a=("${a[@]:50}"); declare -A m; m[$RANDOM]=$t; ((${#m[@]} > 60)) && unset m; done'


def _file(name: str, content: str, *command: str) -> Callable[[Path], Sequence[str]]:
    def prepare(directory: Path) -> Sequence[str]:
        (directory / name).write_text(content)
        return [tool(command[0], command[0]), *command[1:]]

    return prepare


def _source(directory: Path, functions: int = 1500) -> str:
    parts = ["#include <stdio.h>\n#include <stdlib.h>\n"]
    for n in range(functions):
        parts.append(
            f"struct s{n} {{ int a[{n % 30 + 1}]; struct s{n} *next; }};\n"
            f"int f{n}(struct s{n} *p, int k) {{ int s = 0; for (; p; p = p->next) for (int i = 0; i < {n % 30 + 1}; i++)"
            f' s += p->a[i] * k > {n} ? printf("{n}%d", s) : k - i; return s; }}\n'
        )
    source = directory / "work.c"
    source.write_text("".join(parts))
    return str(source)


def _compiler(directory: Path) -> Sequence[str]:
    gcc = tool("gcc", "gcc")
    asked = subprocess.run([gcc, "-print-prog-name=cc1"], capture_output=True, text=True, check=True)
    # The compiler proper does not know where headers are.
    preprocessed = str(directory / "work.i")
    subprocess.run([gcc, "-E", _source(directory, 6000), "-o", preprocessed], check=True)
    return [asked.stdout.strip(), "-fpreprocessed", "-quiet", "-O2", "-g", preprocessed, "-o", "work.s"]


def _gdb(directory: Path) -> Sequence[str]:
    object_file = str(directory / "work.o")
    subprocess.run([tool("gcc", "gcc"), "-g3", "-O0", "-c", _source(directory), "-o", object_file], check=True)
    commands = ["set pagination off", "set debuginfod enabled off", f"file {object_file}"]
    commands += ["info functions", "info types", "info scope f7", "disassemble /s f9", "ptype struct s20"] * 50
    return [tool("gdb", "gdb"), "-nx", "-q", "-batch", *(word for line in commands for word in ("-ex", line))]


def _git(directory: Path) -> Sequence[str]:
    return real_programs.PROGRAMS["git-cat-file"].prepare(directory)


def _postgres(directory: Path) -> Sequence[str]:
    return real_programs.PROGRAMS["postgres"].prepare(directory)


def _xz(directory: Path) -> Sequence[str]:
    return [tool("xz", "xz-utils"), "-0", "-T3", "--block-size=20000", "-c"]


def _openssl(directory: Path) -> Sequence[str]:
    return [tool("openssl", "openssl"), "genrsa", "16384"]


def _sort(directory: Path) -> Sequence[str]:
    lines = (f"{n * 7919 % 100003} {'y' * (n % 70)}\n" for n in range(300000))
    (directory / "lines").write_text("".join(lines))
    return [
        tool("sort", "coreutils"),
        "-R",
        "--parallel=3",
        "-S",
        "9M",
        "lines",
        "lines",
        "lines",
        "lines",
        "-o",
        "sorted",
    ]


def _linker(directory: Path) -> Sequence[str]:
    object_file = str(directory / "work.o")
    flags = ["-g3", "-O0", "-c", "-ffunction-sections", "-fdata-sections"]
    subprocess.run([tool("gcc", "gcc"), *flags, _source(directory), "-o", object_file], check=True)
    copies = [shutil.copy(object_file, directory / f"copy{n}.o") for n in range(30)]
    return [tool("ld", "binutils"), "-r", "-o", "joined.o", *map(str, copies)]


WORKERS = {
    "python3": Worker("python3", _file("work.py", PYTHON, "python3", "-S", "work.py", "0")),
    "python3-malloc": Worker(
        "python3", _file("work.py", PYTHON, "python3", "-S", "work.py", "0"), environment={"PYTHONMALLOC": "malloc"}
    ),
    "python3-threads": Worker(
        "python3", _file("work.py", PYTHON, "python3", "-S", "work.py", "3"), environment={"PYTHONMALLOC": "malloc"}
    ),
    "perl": Worker("perl", _file("work.pl", PERL, "perl", "work.pl")),
    "sqlite3": Worker("sqlite3", _file("empty", "", "sqlite3", "-batch", "work.db"), feed=SQL),
    "git": Worker("git", _git, feed=real_programs.GIT_CAT_FILE.replace("nothing\nflush\n", "")),
    "gdb": Worker("gdb", _gdb),
    "cc1": Worker("gcc", _compiler, signal=signal.SIGXCPU),
    "ld": Worker("binutils", _linker, starts_in=0.02),
    "postgres": Worker("postgresql", _postgres, feed=POSTGRES_SQL, user="postgres", starts_in=0.4),
    "awk": Worker("mawk", _file("work.awk", AWK, "awk", "-f", "work.awk")),
    "bash": Worker("bash", _file("work.sh", BASH, "bash", "work.sh")),
    "xz": Worker("xz-utils", _xz, feed="".join(f"{n * n * 31} is a number\n" for n in range(3000))),
    "openssl": Worker("openssl", _openssl),
    "sort": Worker("coreutils", _sort, starts_in=0.1),
}


@pytest.mark.parametrize("name", WORKERS)
def test_killed_at_any_moment_it_is_no_damage(name: str, tmp_path: Path) -> None:
    if not cores.kernel_writes_cores_here():
        skip_unless_ci("to run this test: sysctl kernel.core_pattern=core, ulimit -H -c unlimited")
    worker, work = WORKERS[name], tmp_path / "work"
    work.mkdir()
    try:
        if worker.user is not None:
            if os.geteuid() != 0:
                raise CannotRun(f"{name} runs as the user {worker.user}: be root")
            open_to_others(tmp_path)
        command = worker.prepare(work)
    except CannotRun as problem:
        skip_unless_ci(str(problem))
    moments = random.Random(name)
    done = 0
    for number in range(4 * TIMES):
        moment = worker.starts_in + moments.random() * 0.7 / (1 + number // TIMES)
        found = killed(worker, command, work, moment)
        if found is None:
            continue
        with coreheap.open(found[0]) as opened:
            report = coreheap.analyze(opened)
        assert report.heap is not None
        assert sure_damage(report) == []
        assert report.defects == ()
        done += 1
        if done == TIMES:
            return
    pytest.fail(f"{name} ended too early: killed {done} times only")


def open_to_others(directory: Path) -> None:
    """The folders that pytest makes are this user's alone."""
    for folder in (directory, *directory.parents):
        if folder.stat().st_uid == os.geteuid() and folder.name.startswith(("pytest-", "popen-", "test_")):
            folder.chmod(0o755)


# ------------------------------------------------------------------------- by single steps through malloc

STEPPED = r"""
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static void *volatile kept[400];
static unsigned long state = 7;
static unsigned long next(void) { state = state * 6364136223846793005ul + 1442695040888963407ul; return state >> 33; }
__attribute__((noinline)) void about_to(int what) { __asm__ volatile("" :: "r"(what) : "memory"); }
static void *wait_for_ever(void *none) { (void)none; for (;;) pause(); return none; }
static void step(unsigned long turn) {
    void *volatile *slot = &kept[next() % 400];
    size_t size = next() % 100 < 70 ? next() % 900 : 1000 + next() % 9000;
    about_to(turn % 5);
    switch (turn % 5) {
    case 0: case 1: free(*slot); *slot = malloc(size); break;
    case 2: *slot = realloc(*slot, size + 1); break;
    case 3: free(*slot); *slot = NULL; break;
    case 4: free(*slot); *slot = turn % 25 == 4 ? malloc(70000) : memalign(256, size); break;
    }
}
int main(int count, char **values) {
    pthread_t thread;
    (void)values;
    if (count > 1) pthread_create(&thread, NULL, wait_for_ever, NULL);
    for (unsigned long turn = 0;; turn++) step(turn);
}
"""
WALK = """
import gdb
gdb.execute("set pagination off")
gdb.execute("set confirm off")
start = gdb.Breakpoint("about_to")
gdb.execute("run")
number = 0
for turn, (skipped, every, cores) in enumerate(TURNS):
    start.ignore_count = skipped
    gdb.execute("continue")
    start.enabled = False
    for _ in range(cores):
        gdb.execute("stepi %d" % every)
        gdb.execute("generate-core-file core.%d" % number)
        number += 1
    start.enabled = True
gdb.execute("kill")
"""
# So many turns on, a core every so many instructions, so many cores: other operations, at other depths.
TURNS = ((1000, 23, 8), (3, 41, 8), (1, 37, 8), (7, 61, 8), (501, 29, 8), (4, 83, 8), (20, 47, 8), (24, 97, 8))


@pytest.mark.parametrize("threads", [1, 2])
def test_stepped_through_malloc_it_is_no_damage(
    threads: int, tmp_path: Path, require_tool: Callable[[str, str], str]
) -> None:
    compiler = require_tool("gcc", "apt-get install gcc libc6-dev")
    gdb = require_tool("gdb", "apt-get install gdb")
    (tmp_path / "stepped.c").write_text(STEPPED)
    (tmp_path / "walk.py").write_text(WALK.replace("TURNS", repr(TURNS)))
    command = [compiler, "-O1", "-g", "-pthread", "-o", "stepped", "stepped.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    arguments = ["./stepped", *(["threads"] if threads > 1 else [])]
    walked = subprocess.run(
        [gdb, "-nx", "-batch", "-x", "walk.py", "--args", *arguments],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    cores = sorted(tmp_path.glob("core.*"), key=lambda path: int(path.suffix[1:]))
    if not cores and "ptrace" in walked.stderr:
        skip_unless_ci("gdb may not trace here; to run this test: sysctl kernel.yama.ptrace_scope=0")
    assert len(cores) == sum(count for _, _, count in TURNS), walked.stderr[-500:]
    wrong, inside = {}, 0
    for core in cores:
        with coreheap.open(core) as opened:
            report = coreheap.analyze(opened)
        assert report.heap is not None
        inside += report.crash is not None and bool(report.crash.inside_malloc)
        if found := sure_damage(report):
            wrong[core.name] = found
    assert wrong == {}
    # What this is about; and it is known of them.
    assert inside > len(cores) // 2
