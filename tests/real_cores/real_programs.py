"""Programs that nobody wrote for us: each works for real, comes to rest, and is killed there, or looked at by memcheck.

Knows how each program is started, fed and found at rest, and what memcheck's leak search says of it then. Knows nothing
of the product.

At rest all threads of a process sleep and use no CPU: what a core has of it natively and what memcheck sees of it under
valgrind is the same moment of the same work. `python -m tests.real_cores.real_programs PROGRAM DIRECTORY` does both.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.needs import Missing
from tests.real_cores.cores import kernel_writes_cores_here

TIMEOUT_SECONDS = 240
"""For a program to come to rest; valgrind makes it some 30 times slower."""
QUIET_SECONDS = 0.25


class CannotRun(Missing):
    """This machine lacks what a program takes; the text says how to get it."""


class RunFailed(Exception):
    """A program did not do what it should."""


# ----------------------------------------------------------------------------------- the programs


@dataclass(frozen=True, slots=True)
class Program:
    """A program with its work.

    ``prepare`` puts its files into an empty directory and gives the command, to be run there. ``stdin`` is written to it
    and left open. It has done its work when ``says`` stands in its output, or where that is empty as soon as it is at rest
    (a pipe that nobody reads stops it); ``ask`` then may talk to it, through connections that stay open to its end.
    """

    name: str
    package: str
    prepare: Callable[[Path], Sequence[str]]
    stdin: str = ""
    says: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    signal: signal.Signals = signal.SIGSEGV
    valgrind_options: tuple[str, ...] = ()
    ask: Callable[[Path, ExitStack], None] | None = None
    user: str | None = None
    settles_in: float | None = None
    """Seconds, for a program that never rests."""


def tool(name: str, package: str) -> str:
    # Debian's own: what another PATH has may be a script, or bring an allocator.
    found = shutil.which(name, path="/usr/bin:/bin:/usr/sbin:/sbin")
    if found is None:
        raise CannotRun(f"no {name}: apt-get install {package}")
    return found


DONE = "work is done"

PYTHON_WORK = """
import json, re, signal, sqlite3, xml.dom.minidom, zlib, ctypes, decimal, pickle, collections
kept = [json.loads(json.dumps({"k%d" % i: list(range(i % 50)) for i in range(40)})) for _ in range(10)]
trees = [xml.dom.minidom.parseString("<a>" + "<b c='%d'/>" % i * 20 + "</a>") for i in range(20)]
patterns = [re.compile("a%db*c" % i) for i in range(50)]
database = sqlite3.connect(":memory:")
database.execute("create table t (a integer primary key, b text)")
database.executemany("insert into t values (?, ?)", ((i, "x" * (i % 100)) for i in range(500)))
rows = database.execute("select a, length(b) from t order by b").fetchmany(100)
packed = zlib.compressobj(); packed.compress(b"abc" * 10000)
point = collections.namedtuple("point", "x y"); points = [point(i, decimal.Decimal(i)) for i in range(200)]
del kept[::2], trees[::3]
libc = ctypes.CDLL(None); libc.calloc.restype = ctypes.c_void_p; libc.calloc.argtypes = [ctypes.c_size_t] * 2
for i in range(12): libc.calloc(1, 7000 + 16 * i)
libc.calloc(1, 50)
"""
PYTHON_THREADS = """
import threading, queue, hashlib
done = queue.Queue(); rest = threading.Event()
def work(n):
    mine = {i: hashlib.sha256(b"%d" % i).digest() * 40 for i in range(n, n + 200)}
    done.put(len(mine)); rest.wait()
for n in range(4): threading.Thread(target=work, args=(n,), daemon=True).start()
for n in range(4): done.get()
"""
PYTHON_END = f'''
print("{DONE}", flush=True)
signal.pause()
'''


def _python(work: str) -> Callable[[Path], Sequence[str]]:
    def prepare(directory: Path) -> Sequence[str]:
        (directory / "work.py").write_text(work + PYTHON_END)
        return [tool("python3", "python3"), "-S", "-B", "work.py"]

    return prepare


PERL_WORK = f'''
use strict; use POSIX (); $| = 1;
my (%words, @rows, @code);
for my $i (1 .. 3000) {{
  my $k = "w" . ($i * 7919 % 1013); $words{{$k}}{{$i % 7}} += $i; push @rows, [$i, "x" x ($i % 90)];
}}
@rows = sort {{ $a->[1] cmp $b->[1] || $a->[0] <=> $b->[0] }} @rows;
my $text = join ",", map {{ "$_->[0]=$_->[1]" }} @rows; my $n = 0;
$n++ while $text =~ /(\\d+)=(x*)/g;
push @code, eval "sub {{ my \\$x = shift; return \\$x + $_ }}" for 1 .. 100;
$_->(1) for @code;
# Cycles that nothing leads to: perl counts references, so they stay.
for my $i (1 .. 50) {{ my $a = {{ n => $i }}; my $b = [$a]; $a->{{b}} = $b; }}
splice @rows, 0, 1500;
my $s = sprintf "%s", POSIX::strftime("%Y", gmtime 0);
print "{DONE}\\n";
POSIX::pause();
'''


def _perl(directory: Path) -> Sequence[str]:
    (directory / "work.pl").write_text(PERL_WORK)
    return [tool("perl", "perl"), "work.pl"]


SQLITE_WORK = f"""
.open work.db
pragma journal_mode = memory;
create table a (id integer primary key, name text, value real);
create index byname on a (name);
with recursive c (n) as (select 1 union all select n + 1 from c where n < 3000)
  insert into a select n, 'name ' || (n * 7919 % 1013), n / 7.0 from c;
create virtual table f using fts5 (body);
insert into f select name || ' ' || value from a where id % 5 = 0;
select count(*) from f where f match 'name';
create view v as select name, sum(value) s from a group by name;
select count(*), max(s) from v;
update a set value = value * 2 where id % 3 = 0;
delete from a where id % 4 = 0;
select json_group_array(id) from a where id < 5;
.schema a
.print {DONE}
"""


def _sqlite(directory: Path) -> Sequence[str]:
    return [tool("sqlite3", "sqlite3"), "-batch"]


def _repository(directory: Path) -> str:
    """A git repository with 60 commits; the name of git."""
    git = tool("git", "git")
    stream = []
    for number in range(1, 61):
        text = "".join(f"line {line} of {number * 7919 % 31 if line % 5 == 0 else line}\n" for line in range(80))
        message = f"change {number}\n"
        stream.append(
            f"commit refs/heads/main\nmark :{number}\ncommitter A <a@b> {1700000000 + number} +0000\n"
            f"data {len(message)}\n{message}"
            + (f"from :{number - 1}\n" if number > 1 else "")
            + "".join(f"M 644 inline d{d}/f{number % 9}\ndata {len(text)}\n{text}\n" for d in range(3))
        )
    subprocess.run([git, "init", "-q", "-b", "main", "."], cwd=directory, check=True, env=_environment(directory, {}))
    (directory / "stream").write_text("".join(stream))
    with (directory / "stream").open() as source:
        subprocess.run(
            [git, "fast-import", "--quiet"], stdin=source, cwd=directory, check=True, env=_environment(directory, {})
        )
    subprocess.run([git, "reset", "-q", "--hard", "main"], cwd=directory, check=True, env=_environment(directory, {}))
    return git


def _git_cat_file(directory: Path) -> Sequence[str]:
    return [_repository(directory), "cat-file", "--batch", "--buffer"]


GIT_CAT_FILE = "".join(f"main~{n}:d{n % 3}/f{n % 9}\nmain~{n}\n" for n in range(1, 59)) + "nothing\nflush\n"


def _git_pack(directory: Path) -> Sequence[str]:
    # Two threads look for deltas and end; then the output stops in a full pipe.
    return [_repository(directory), "pack-objects", "--all", "--threads=2", "--no-reuse-delta", "--stdout", "-q"]


def _git_log(directory: Path) -> Sequence[str]:
    return [_repository(directory), "--no-pager", "log", "-p", "--stat", "-M"]


def _gdb(directory: Path) -> Sequence[str]:
    compiler = tool("gcc", "gcc")
    (directory / "work.c").write_text(
        "#include <stdio.h>\n#include <math.h>\n#include <time.h>\n"
        "struct list { struct list *next; double value; union { int i; char c[8]; } u; };\n"
        "enum kind { one, two, three }; typedef int (*call)(struct list *, enum kind);\n"
        "static int f(struct list *l, enum kind k) { return l ? f(l->next, k) + (int) l->value : (int) k; }\n"
        "int main(int n, char **v) { struct list a = {0, 1.5, {n}}; call c = f; (void) v; return c(&a, two); }\n"
    )
    subprocess.run([compiler, "-g3", "-O1", "-o", "work", "work.c"], cwd=directory, check=True)
    commands = [
        "set pagination off", "set debuginfod enabled off", "set auto-load no", "maint set worker-threads 2", "file ./work",
        "info functions", "ptype struct list", "info line main", "disassemble /s main", "break f if l->value > 1",
        "info scope f", "info macros main", "print sizeof(struct list)", "info types", "macro expand NULL",
        "python x = [gdb.lookup_type('struct list')]", "tbreak main", "info breakpoints", "delete", "list f",
        f"echo {DONE}\\n",
    ]  # fmt: skip
    # Its own -ex, and then it waits for more.
    return [tool("gdb", "gdb"), "-nx", "-q", *(word for command in commands for word in ("-ex", command))]


NGINX_CONFIG = """
daemon off; master_process off; error_log error.log notice; pid nginx.pid;
events { worker_connections 64; }
http { access_log access.log; client_body_temp_path t1; proxy_temp_path t2; fastcgi_temp_path t3; uwsgi_temp_path t4;
  scgi_temp_path t5; types { text/html html; } gzip on;
  map $uri $kind { ~^/a one; default two; }
  server { listen unix:work.sock; location / { root www; } location ~ ^/x(.*)$ { return 200 "$1 $kind"; }
    location /p { rewrite ^/p(.*)$ /$1 last; } } }
"""


def _nginx(directory: Path) -> Sequence[str]:
    (directory / "www").mkdir()
    (directory / "www" / "index.html").write_text("hello " * 1000)
    (directory / "nginx.conf").write_text(NGINX_CONFIG)
    (directory / "logs").mkdir()
    return [tool("nginx", "nginx-light"), "-p", str(directory), "-c", "nginx.conf"]


def _ask_nginx(directory: Path, connections: ExitStack) -> None:
    held = []
    for number, path in enumerate(["/", "/index.html", "/xabc", "/pindex.html", "/none", "/", "/a"] * 4):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(os.path.relpath(directory / "work.sock"))
        close = "close" if number % 3 else "keep-alive"
        connection.sendall(
            f"GET {path} HTTP/1.1\r\nHost: a\r\nAccept-Encoding: gzip\r\nConnection: {close}\r\n\r\n".encode()
        )
        while b"\r\n\r\n" not in (part := connection.recv(65536)) and part:
            pass
        held.append(connection)
    for connection in held[:-2]:
        connection.close()
    for connection in held[-2:]:
        connections.enter_context(connection)


POSTGRES_WORK = f"""
create table a (id int primary key, name text, value numeric);
insert into a select n, 'name ' || n, n / 7.0 from generate_series(1, 2000) n;
create index byname on a (name);
create function f(x int) returns int language plpgsql as $$ declare s int := 0; begin for i in 1..x loop s := s + i; end loop; return s; end $$;
select f(10), count(*), sum(value) from a where name like 'name 1%';
select name, rank() over (order by value) from a where id < 5 union select 'x', 1 order by 1;
analyze a;
select jsonb_agg(id) from a where id < 9;
prepare p as select * from a where id = $1;
execute p(3);
set client_min_messages = notice;
select '{DONE}'::text;
"""


def _postgres(directory: Path) -> Sequence[str]:
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    if not binaries:
        raise CannotRun("no postgres: apt-get install postgresql")
    binary = binaries[-1]
    entry = pwd.getpwnam("postgres")
    os.chown(directory, entry.pw_uid, entry.pw_gid)
    subprocess.run(
        [str(binary.with_name("initdb")), "-D", "data", "-A", "trust", "--no-sync", "--locale=C"],
        cwd=directory, user="postgres", check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return [str(binary), "--single", "-D", "data", "-c", "shared_buffers=4MB", "-c", "fsync=off", "postgres"]


JAVA_WORK = f"""
import java.util.*; import java.util.concurrent.*; import java.util.stream.*; import java.util.zip.*; import java.nio.*;
public class Work {{ public static void main(String[] a) throws Exception {{
  Map<String, List<Integer>> m = IntStream.range(0, 20000).boxed().collect(Collectors.groupingBy(i -> "k" + i % 97));
  ByteBuffer[] b = new ByteBuffer[20]; for (int i = 0; i < 20; i++) b[i] = ByteBuffer.allocateDirect(5000 + i * 16);
  Deflater d = new Deflater(); d.setInput(new byte[10000]); d.deflate(new byte[5000]);
  ExecutorService e = Executors.newFixedThreadPool(3); List<Future<Integer>> f = new ArrayList<>();
  for (int i = 0; i < 6; i++) {{ int n = i; f.add(e.submit(() -> ("" + n).repeat(1000).hashCode())); }}
  int s = 0; for (Future<Integer> x : f) s += x.get();
  System.out.println("{DONE}"); Thread.sleep(1000000000L); }} }}
"""


def _java(directory: Path) -> Sequence[str]:
    java = tool("java", "default-jdk-headless")
    (directory / "Work.java").write_text(JAVA_WORK)
    subprocess.run([tool("javac", "default-jdk-headless"), "Work.java"], cwd=directory, check=True)
    return [java, "-Xmx64m", "-Xint", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Xshare:auto", "-cp", ".", "Work"]


PROGRAMS = {
    program.name: program
    for program in (
        Program("python3", "python3", _python(PYTHON_WORK), says=DONE),
        Program("python3-malloc", "python3", _python(PYTHON_WORK), says=DONE, environment={"PYTHONMALLOC": "malloc"}),
        Program("python3-threads", "python3", _python(PYTHON_WORK + PYTHON_THREADS), says=DONE),
        Program("perl", "perl", _perl, says=DONE),
        Program("sqlite3", "sqlite3", _sqlite, stdin=SQLITE_WORK, says=DONE),
        Program("git-cat-file", "git", _git_cat_file, stdin=GIT_CAT_FILE, says="nothing missing"),
        Program("git-pack", "git", _git_pack),
        Program("git-log", "git", _git_log),
        Program("gdb", "gdb", _gdb, says=DONE),
        Program("nginx", "nginx-light", _nginx, ask=_ask_nginx),
        Program("postgres", "postgresql", _postgres, stdin=POSTGRES_WORK, says=DONE, user="postgres"),
        Program("java", "default-jdk-headless", _java, says=DONE, signal=signal.SIGABRT, settles_in=2,
                valgrind_options=("--smc-check=all-non-file",)),
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------ running them


def _environment(directory: Path, more: dict[str, str]) -> dict[str, str]:
    return {
        "PATH": "/usr/bin:/bin",
        "LC_ALL": "C",
        "HOME": str(directory),
        "PYTHONHASHSEED": "0",
        "PERL_HASH_SEED": "0",
        "GIT_CONFIG_NOSYSTEM": "1",
        # What valgrind would add: programs copy their environment into the heap.
        "LD_PRELOAD": "",
        "LD_LIBRARY_PATH": "",
        "VALGRIND_LAUNCHER": "",
        "PWD": str(directory),
        "GLIBCPP_FORCE_NEW": "1",
        "GLIBCXX_FORCE_NEW": "1",
        **more,
    }


@contextmanager
def at_rest(program: Program, directory: Path, runner: Sequence[str] = ()) -> Iterator[int]:
    """The process id of the program, at rest after its work and dead afterwards. ``runner`` stands before its command."""
    work = directory / "work"
    work.mkdir(parents=True)
    if program.user is not None and os.geteuid() != 0:
        raise CannotRun(f"{program.name} runs as the user {program.user}: be root")
    command = [*runner, *program.prepare(work)]
    if program.user is not None:
        subprocess.run(["chown", "-R", program.user, str(directory)], check=True)
    read_end, write_end = os.pipe() if not program.says and program.ask is None else (None, None)
    if write_end is not None:
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    said = directory / "output"
    with ExitStack() as connections, said.open("wb") as output, (directory / "errors").open("wb") as errors:
        process = subprocess.Popen(
            command, cwd=work, env=_environment(work, program.environment), stdin=subprocess.PIPE, user=program.user,
            stdout=write_end if write_end is not None else output, stderr=errors,
        )  # fmt: skip
        if write_end is not None:
            os.close(write_end)
        assert process.stdin is not None
        try:
            process.stdin.write(program.stdin.encode())
            process.stdin.flush()
            _wait(process, lambda: program.says in said.read_text(errors="replace"), directory)
            if program.settles_in is not None:
                time.sleep(program.settles_in)
            else:
                _wait_for_rest(process, directory)
            if program.ask is not None:
                program.ask(work, connections)
                _wait_for_rest(process, directory)
            yield process.pid
        finally:
            process.kill()
            process.wait()
            process.stdin.close()
            if read_end is not None:
                os.close(read_end)


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], bool], directory: Path) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            tail = (directory / "errors").read_text(errors="replace")[-1000:]
            raise RunFailed(f"{process.args!r}: ended or hangs ({process.returncode}): {tail}")
        time.sleep(0.05)


def _wait_for_rest(process: subprocess.Popen[bytes], directory: Path) -> None:
    """All threads asleep, and no CPU used for a while."""
    seen: list[tuple[float, list[str]]] = [(time.monotonic(), [])]

    def rests() -> bool:
        facts = []
        for task in sorted(Path(f"/proc/{process.pid}/task").iterdir()):
            words = (task / "stat").read_text().rpartition(")")[2].split()
            facts.append(
                f"{task.name} {words[0]} {words[11]} {words[12]}"
                + (task / "status").read_text().split("voluntary_ctxt_switches:")[1].split()[0]
            )
        asleep = all(fact.split()[1] == "S" for fact in facts)
        if not asleep or facts != seen[0][1]:
            seen[0] = (time.monotonic(), facts if asleep else [])
        return asleep and time.monotonic() - seen[0][0] > QUIET_SECONDS

    _wait(process, rests, directory)


def core_of(program: Program, directory: Path) -> Path:
    """A core of the program, killed at rest; dumped by gdb where core_pattern sends cores elsewhere."""
    core = directory / "work" / "core"
    by_kernel = kernel_writes_cores_here()
    # Not a shell, which would add variables to the environment.
    runner = [tool("prlimit", "util-linux"), f"--core={'unlimited' if by_kernel else '0'}", "--"]
    with at_rest(program, directory, runner) as pid:
        if by_kernel:
            os.kill(pid, program.signal)
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            found = sorted(path for path in (directory / "work").rglob("core*") if path.is_file())
            if len(found) != 1:
                raise RunFailed(f"{program.name}: {len(found)} cores in {directory}")
            return found[0]
        gdb = tool("gdb", "gdb")
        subprocess.run(
            [gdb, "-nx", "-batch", "-p", str(pid), "-ex", f"generate-core-file {core}"], check=True, capture_output=True
        )
    return core


# --------------------------------------------------------------------------------------- memcheck


KINDS = ("definitely lost", "indirectly lost", "possibly lost", "still reachable")
_RECORD = re.compile(r"==\d+== .* bytes? in ([\d,]+) blocks? (?:are|is) ([a-z ]+) in loss record [\d,]+ of ([\d,]+)")
_BLOCK = re.compile(r"==\d+== (0x[0-9A-Fa-f]+)\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Memcheck:
    """What memcheck's leak search says: for each of its kinds the requested sizes of the blocks; ``text`` is all of it."""

    sizes: dict[str, Counter[int]]
    text: str

    def count(self, kind: str) -> int:
        return self.sizes[kind].total()

    def bytes(self, kind: str) -> int:
        return sum(size * count for size, count in self.sizes[kind].items())


def memcheck_of(program: Program, directory: Path, *, stacks: bool = False) -> Memcheck:
    """memcheck's verdict on all blocks of the program at rest. ``stacks``: with where they were allocated."""
    options = [
        tool("valgrind", "valgrind"), "--tool=memcheck", "-q", "--leak-check=no", "--undef-value-errors=no",
        "--run-libc-freeres=no", "--run-cxx-freeres=no", "--vgdb=yes", "--vgdb-error=999999999",
        f"--vgdb-prefix={directory / 'vgdb'}", f"--log-file={directory / 'valgrind.log'}",
        *([] if stacks else ["--keep-stacktraces=none"]), *program.valgrind_options,
    ]  # fmt: skip
    with at_rest(program, directory, options) as pid:
        # Every pointer to a block's inside is one; no guesses.
        found = _ask_valgrind(program, directory, pid, "leak_check full kinds all heuristics none any unlimited")
        records = [int(match[3].replace(",", "")) for match in _RECORD.finditer(found)]
        if not records:
            raise RunFailed(f"{program.name}: memcheck said nothing: {found[-500:]}")
        listed = _ask_valgrind(program, directory, pid, f"block_list 1..{max(records)} unlimited")
    sizes: dict[str, Counter[int]] = {kind: Counter() for kind in KINDS}
    promised: Counter[str] = Counter()
    kind = ""
    for line in listed.splitlines():
        if record := _RECORD.match(line):
            kind = record[2]
            promised[kind] += int(record[1].replace(",", ""))
        elif block := _BLOCK.match(line):
            sizes[kind][int(block[2])] += 1
    result = Memcheck(sizes, listed)
    for kind in KINDS:
        if result.count(kind) != promised[kind]:
            raise RunFailed(f"{program.name}: memcheck lists {result.count(kind)} of {promised[kind]} blocks {kind}")
    return result


def _ask_valgrind(program: Program, directory: Path, pid: int, command: str) -> str:
    vgdb = tool("vgdb", "valgrind")
    answer = subprocess.run(
        [vgdb, f"--vgdb-prefix={directory / 'vgdb'}", f"--pid={pid}", *command.split()],
        capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS, user=program.user,
    )  # fmt: skip
    return answer.stdout


if __name__ == "__main__":
    _program, _directory = PROGRAMS[sys.argv[1]], Path(sys.argv[2]).resolve()
    print(core_of(_program, _directory / "native"))
    _found = memcheck_of(_program, _directory / "valgrind", stacks=True)
    (_directory / "memcheck.txt").write_text(_found.text)
    for _kind in KINDS:
        print(_kind, _found.count(_kind), _found.bytes(_kind), sorted(_found.sizes[_kind].items())[:10])
