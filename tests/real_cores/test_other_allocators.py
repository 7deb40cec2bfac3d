"""Processes whose memory is another allocator's: named, its bytes found, and nothing of it taken for glibc's.

The witnesses are the processes themselves: every live block (`fixtures/programs/other_blocks.c` writes them down), what the
allocator says of its own memory just before the end, and /proc/PID/maps.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import coreheap
from coreheap.accounting.other_allocators import other_allocators
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.mappings import KINDS, MappingKind
from coreheap.report import Finding, Report, Severity
from tests.conftest import skip_unless_ci
from tests.real_cores import cores, real_programs
from tests.real_cores.cores import PROGRAMS as SOURCES

LIBRARIES = Path("/usr/lib/x86_64-linux-gnu")
SECONDS = 60
MIB = 1 << 20
REDIS_KEYS, REDIS_VALUE_BYTES = 100_000, 300
THREADS = 6

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the packages' paths are those of amd64")


@dataclass(frozen=True, slots=True)
class Looked:
    """What coreheap says of a core, what the process said, and its /proc/PID/maps."""

    report: Report
    blocks: NDArray[np.uint64]
    """(address, bytes) of each live block; none where the process did not say."""
    said: dict[str, int]
    maps: list[tuple[int, int, str]]
    """start, end, permissions and name."""

    def finding(self) -> Finding:
        (found,) = [finding for finding in self.report.findings if finding.code == "OTHER-ALLOCATOR"]
        return found

    def ranges(self, name: str) -> NDArray[np.uint64]:
        """(start, end) of the rows of an allocator's in the table of mappings, those that touch joined."""
        table = self.report.mappings
        assert table is not None
        rows = (table.kind == KINDS.index(MappingKind.OTHER_ALLOCATOR)) & (table.name == table.names.index(name))
        start, end = table.start[rows], table.end[rows]
        first = np.concatenate(([True], start[1:] != end[:-1]))
        last = np.concatenate((first[1:], [True]))
        return np.stack([start[first], end[last]], axis=1)

    def bytes(self, name: str) -> int:
        ranges = self.ranges(name)
        return int((ranges[:, 1] - ranges[:, 0]).sum())

    def writable_bytes(self, name: str) -> int:
        """Of an allocator's bytes those that /proc/PID/maps calls writable."""
        return sum(
            max(0, min(int(end), high) - max(int(start), low))
            for start, end in self.ranges(name)
            for low, high, words in self.maps
            if words.startswith("rw")
        )

    def blocks_outside(self, name: str) -> NDArray[np.uint64]:
        """The live blocks that do not lie in the allocator's ranges."""
        ranges = self.ranges(name)
        row = np.searchsorted(ranges[:, 0], self.blocks[:, 0], side="right") - 1
        held = (row >= 0) & (self.blocks.sum(axis=1) <= ranges[np.maximum(row, 0), 1])
        return self.blocks[~held]

    def only_anonymous(self, name: str) -> bool:
        """Whether nothing that is claimed is a file, a stack that the kernel names, or not mapped."""
        own = {"", "[heap]"}
        covered = sum(
            max(0, min(int(end), high) - max(int(start), low))
            for start, end in self.ranges(name)
            for low, high, words in self.maps
            if words[4:].strip() in own
        )
        return covered == self.bytes(name)


def parsed_maps(text: str) -> list[tuple[int, int, str]]:
    rows = []
    for line in text.splitlines():
        words = line.split(None, 5)
        start, end = (int(word, 16) for word in words[0].split("-"))
        rows.append((start, end, words[1] + " " + (words[5] if len(words) > 5 else "")))
    return rows


def looked_at(directory: Path, record: str = "", **said: int) -> Looked:
    (core,) = directory.glob("core*")
    rows = [line.split() for line in record.splitlines()]
    blocks = np.array([(int(row[0], 16), int(row[1])) for row in rows if row[0] != "stat"], np.uint64).reshape(-1, 2)
    with coreheap.open(core) as opened:
        report = coreheap.analyze(opened, coreheap.AnalysisOptions(leaks=False))
    core.unlink()
    said |= {row[1]: int(row[2]) for row in rows if row[0] == "stat"}
    return Looked(report, blocks, said, parsed_maps((directory / "maps").read_text()))


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, require_cores: None) -> Callable[..., Looked]:
    """``ran(name, compiler, flags, preload)``: other_blocks, built and run once for each name."""
    done: dict[str, Looked] = {}

    def run(name: str, *flags: str, compiler: str = "gcc", preload: str | None = None, package: str = "gcc") -> Looked:
        if name not in done:
            directory = tmp_path_factory.mktemp(name)
            environment = {"PATH": "/usr/bin:/bin"}
            for tool in ("ASAN", "TSAN", "MSAN", "LSAN"):
                # They turn cores off, which would be of terabytes with their shadow memory.
                environment[f"{tool}_OPTIONS"] = "disable_coredump=0:use_madv_dontdump=1"
            if preload is not None:
                if not (LIBRARIES / preload).exists():
                    skip_unless_ci(f"no {preload}: apt-get install {package}")
                environment["LD_PRELOAD"] = str(LIBRARIES / preload)
            try:
                cc = real_programs.tool(compiler, package)
            except real_programs.CannotRun as problem:
                skip_unless_ci(str(problem))
            subprocess.run(
                [cc, "-O1", "-g", *flags, "-pthread", "-o", "other_blocks", SOURCES / "other_blocks.c"],
                cwd=directory, check=True,
            )  # fmt: skip
            command = ["prlimit", "--core=unlimited", "--", "./other_blocks", "record", str(THREADS), "2000", "8"]
            ended = subprocess.run(command, cwd=directory, env=environment, check=False, timeout=SECONDS)
            assert ended.returncode == -signal.SIGABRT
            done[name] = looked_at(directory, (directory / "record").read_text())
        return done[name]

    return run


@pytest.fixture(scope="module")
def require_cores() -> None:
    if not cores.kernel_writes_cores_here():
        skip_unless_ci("core_pattern sends cores elsewhere; to run this test: sysctl kernel.core_pattern=core")


def assert_glibc_has_next_to_nothing(report: Report) -> None:
    if report.heap is not None:
        assert report.totals[ChunkState.IN_USE].chunk_bytes < MIB
        assert len(report.heap.arenas) == 1
        assert report.anomalies == ()


def test_bytes_in_memory_are_no_more_than_the_part_has(ran: Callable[..., Looked]) -> None:
    """mimalloc's segments are partly reserved alone."""
    report = ran("mimalloc", preload="libmimalloc.so.2", package="libmimalloc2.0").report
    item = next(item for item in report.verdict if item.topic == "other_allocator")
    assert item.resident_low is not None
    assert item.resident_high is not None
    assert 16 * MIB < item.resident_low <= item.resident_high <= item.bytes


def test_jemalloc(ran: Callable[..., Looked]) -> None:
    looked = ran("jemalloc", preload="libjemalloc.so.2", package="libjemalloc2")
    finding = looked.finding()
    assert (finding.subject, finding.severity, finding.confidence) == ("jemalloc", Severity.WARNING, Confidence.CERTAIN)
    assert len(looked.blocks_outside("jemalloc")) == 0
    # All that it has mapped and not given back: to the byte.
    assert looked.bytes("jemalloc") == looked.said["stats.mapped"] + looked.said["stats.retained"]
    assert finding.quantity("allocator_bytes") == looked.bytes("jemalloc")
    assert looked.only_anonymous("jemalloc")
    assert_glibc_has_next_to_nothing(looked.report)


def test_tcmalloc(ran: Callable[..., Looked]) -> None:
    looked = ran("tcmalloc", preload="libtcmalloc_minimal.so.4", package="libtcmalloc-minimal4")
    finding = looked.finding()
    assert (finding.subject, finding.severity) == ("tcmalloc", Severity.WARNING)
    assert finding.confidence in (Confidence.CERTAIN, Confidence.STRONG)
    assert len(looked.blocks_outside("tcmalloc")) == 0
    heap = looked.said["generic.heap_size"] + looked.said["tcmalloc.pageheap_unmapped_bytes"]
    # Its heap, and its own tables beside: at most 8 MiB are taken for these at a time.
    assert heap <= looked.bytes("tcmalloc") <= heap + 9 * MIB
    assert looked.only_anonymous("tcmalloc")
    assert_glibc_has_next_to_nothing(looked.report)


def test_mimalloc(ran: Callable[..., Looked]) -> None:
    looked = ran("mimalloc", preload="libmimalloc.so.2", package="libmimalloc2.0")
    finding = looked.finding()
    assert (finding.subject, finding.severity, finding.confidence) == ("mimalloc", Severity.WARNING, Confidence.CERTAIN)
    assert len(looked.blocks_outside("mimalloc")) == 0
    # Its counter of committed bytes is not kept for what it gives back early; segments are whole, with what is only reserved.
    assert 0.75 < looked.writable_bytes("mimalloc") / looked.said["current_commit"] < 1.1
    assert looked.only_anonymous("mimalloc")
    assert_glibc_has_next_to_nothing(looked.report)


@pytest.mark.parametrize("how", ["static", "dynamic"])
def test_musl(ran: Callable[..., Looked], how: str) -> None:
    flags = ("-DNO_DLSYM", *(("-static",) if how == "static" else ()))
    looked = ran(f"musl_{how}", *flags, compiler="musl-gcc", package="musl-tools")
    finding = looked.finding()
    assert (finding.subject, finding.severity, finding.confidence) == ("musl", Severity.WARNING, Confidence.CERTAIN)
    # The rest of a module's last page is malloc's, too, and stays the module's in the table.
    outside = looked.blocks_outside("musl")
    assert len(outside) < 20
    named = [(low, high) for low, high, words in looked.maps if words[4:].strip().startswith("/")]
    for address, _ in outside.tolist():
        assert any(low - (1 << 20) <= address < high + (1 << 20) for low, high in named)
    total = int(looked.blocks[:, 1].sum())
    assert total * 0.99 < looked.bytes("musl") < total * 1.3
    assert looked.only_anonymous("musl")
    assert looked.report.heap is None


TOOLS = {
    "address": "AddressSanitizer",
    "thread": "ThreadSanitizer",
    "leak": "LeakSanitizer",
    "memory": "MemorySanitizer",
}


@pytest.mark.parametrize(
    ("compiler", "what"),
    [(compiler, what) for compiler in ("gcc", "clang") for what in TOOLS if (compiler, what) != ("gcc", "memory")],
)
def test_sanitizers(ran: Callable[..., Looked], compiler: str, what: str) -> None:
    """Every block lies in the tool's memory, and its terabytes take no part in what the program may write."""
    looked = ran(f"{compiler}_{what}", f"-fsanitize={what}", compiler=compiler, package="clang libclang-rt-14-dev")
    finding, name = looked.finding(), TOOLS[what]
    assert (finding.subject, finding.severity) == (name, Severity.WARNING)
    assert finding.confidence.rank >= Confidence.STRONG.rank
    assert looked.report.other_allocators == (name,)
    assert len(looked.blocks) > 1000
    assert len(looked.blocks_outside(name)) == 0
    blocks = int(looked.blocks[:, 1].sum())
    assert blocks < looked.bytes(name) < 3 * blocks + 64 * MIB
    assert finding.quantity("allocator_bytes") == looked.bytes(name)
    assert looked.only_anonymous(name)
    table = looked.report.mappings
    assert table is not None
    assert table.bytes_of(MappingKind.TOOL_MEMORY) > 1 << 40
    # Of the address space nothing but crumbs stays unexplained.
    assert table.bytes_of(MappingKind.NO_ACCESS) < 1 << 32
    assert table.bytes_of(MappingKind.UNEXPLAINED) < 64 * MIB
    lead = looked.report.verdict[0]
    assert lead.topic == "other_allocator"
    assert lead.of_bytes < 1 << 30
    assert lead.of_resident_high is not None
    assert lead.of_resident_high < 256 * MIB


def test_a_sanitizer_by_its_layout_alone(tmp_path: Path, require_cores: None) -> None:
    """Linked into a program whose file is not at hand."""
    try:
        compiler = real_programs.tool("clang", "clang libclang-rt-14-dev")
    except real_programs.CannotRun as problem:
        skip_unless_ci(str(problem))
    command = [
        compiler,
        "-O1",
        "-pthread",
        "-s",
        "-fsanitize=address",
        "-o",
        "other_blocks",
        SOURCES / "other_blocks.c",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = {"PATH": "/usr/bin:/bin", "ASAN_OPTIONS": "disable_coredump=0"}
    run = ["prlimit", "--core=unlimited", "--", "./other_blocks", "record", "2", "500", "3"]
    assert subprocess.run(run, cwd=tmp_path, env=environment, check=False).returncode == -signal.SIGABRT
    (core,) = tmp_path.glob("core*")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other_blocks").unlink()
    with coreheap.open(core, sysroot=tmp_path / "empty") as opened:
        (found,) = other_allocators(opened)
    assert (found.name, found.confidence) == ("AddressSanitizer", Confidence.STRONG)
    assert MIB < found.bytes < 256 * MIB


@pytest.mark.parametrize("tool", ["memcheck", "drd", "massif", "cachegrind"])
def test_cores_of_valgrind(tmp_path: Path, tool: str) -> None:
    """valgrind writes the core of its client itself; all its tools but some that count serve malloc."""
    (tmp_path / "client.c").write_text(VALGRIND_CLIENT)
    try:
        compiler, valgrind = real_programs.tool("gcc", "gcc"), real_programs.tool("valgrind", "valgrind")
    except real_programs.CannotRun as problem:
        skip_unless_ci(str(problem))
    subprocess.run([compiler, "-O0", "-o", "client", "client.c"], cwd=tmp_path, check=True)
    command = ["prlimit", "--core=unlimited", "--", valgrind, "-q", f"--tool={tool}", "./client"]
    environment = {"PATH": "/usr/bin:/bin"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, check=False, timeout=SECONDS, capture_output=True)
    assert ended.returncode == -signal.SIGSEGV
    (core,) = tmp_path.glob("vgcore.*")
    with coreheap.open(core) as opened:
        report = coreheap.analyze(opened, coreheap.AnalysisOptions(leaks=False))
    in_use = report.totals[ChunkState.IN_USE].chunk_bytes
    if tool == "cachegrind":
        assert report.other_allocators == ()
        assert in_use > 3000 * 1000
        return
    (finding,) = [finding for finding in report.findings if finding.code == "OTHER-ALLOCATOR"]
    assert (finding.subject, finding.severity, finding.confidence) == (
        "valgrind",
        Severity.WARNING,
        Confidence.CERTAIN,
    )
    blocks = 3000 * 1500 + 6_000_000
    theirs = finding.quantity("allocator_bytes")
    assert isinstance(theirs, int)
    assert blocks <= theirs < blocks + 8 * MIB
    assert in_use < MIB
    assert report.verdict[0].topic == "other_allocator"


def test_glibc_alone_is_no_other_allocator(ran: Callable[..., Looked]) -> None:
    looked = ran("glibc")
    assert [finding for finding in looked.report.findings if finding.code == "OTHER-ALLOCATOR"] == []
    assert looked.report.mappings is not None
    assert looked.report.mappings.bytes_of(MappingKind.OTHER_ALLOCATOR) == 0


# ------------------------------------------------------------------- programs that nobody wrote for us


@pytest.fixture
def redis(tmp_path: Path, require_cores: None) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    try:
        server = real_programs.tool("redis-server", "redis-server")
    except real_programs.CannotRun as problem:
        skip_unless_ci(str(problem))
    options = "--port 0 --unixsocket s --appendonly no --enable-debug-command yes --crash-log-enabled no --logfile log"
    process = subprocess.Popen(
        ["prlimit", "--core=unlimited", "--", server, *options.split(), "--save", ""], cwd=tmp_path
    )
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            end = time.monotonic() + SECONDS
            while True:
                try:
                    connection.connect(str(tmp_path / "s"))
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    assert time.monotonic() < end
                    assert process.poll() is None
                    time.sleep(0.05)
            yield process, connection
    finally:
        process.kill()
        process.wait()


def ask_redis(connection: socket.socket, *words: str) -> str:
    parts = [word.encode() for word in words]
    connection.sendall(b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts))
    answer = b""
    while True:
        answer += connection.recv(1 << 16)
        head, _, rest = answer.partition(b"\r\n")
        if head[:1] == b"+" and answer.endswith(b"\r\n"):
            return head.decode()
        if head[:1] == b"$" and len(rest) >= int(head[1:]) + 2:
            return rest.decode()
        assert head[:1] != b"-", answer


def redis_memory(connection: socket.socket) -> dict[str, int]:
    fields = re.findall(r"(\w+):(\d+)\r", ask_redis(connection, "INFO", "memory"))
    return {name: int(value) for name, value in fields}


def test_redis(redis: tuple[subprocess.Popen[bytes], socket.socket], tmp_path: Path) -> None:
    process, connection = redis
    assert ask_redis(connection, "DEBUG", "POPULATE", str(REDIS_KEYS), "key", str(REDIS_VALUE_BYTES)) == "+OK"
    fields = redis_memory(connection)
    # It asks jemalloc some times a second only, and gives the last answer: wait for one of after the work.
    end = time.monotonic() + SECONDS
    while fields["allocator_allocated"] < REDIS_KEYS * REDIS_VALUE_BYTES:
        assert time.monotonic() < end, fields
        time.sleep(0.05)
        fields = redis_memory(connection)
    (tmp_path / "maps").write_text(Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGABRT)
    process.wait(SECONDS)
    looked = looked_at(tmp_path, **fields)
    finding = looked.finding()
    assert (finding.subject, finding.severity, finding.confidence) == ("jemalloc", Severity.WARNING, Confidence.CERTAIN)
    # What is resident of it, and what it keeps without pages: it grows its mappings in steps of up to an eighth.
    assert (
        looked.said["allocator_resident"]
        <= looked.bytes("jemalloc")
        <= looked.said["allocator_resident"] * 1.25 + 4 * MIB
    )
    assert looked.only_anonymous("jemalloc")
    assert_glibc_has_next_to_nothing(looked.report)


PYTHON_WORK = """
import os, sys
kept = [{"k%d" % i: [i, str(i), (i, i + 1)] for i in range(60)} for _ in range(1500)]
del kept[::3]
os.dup2(os.open("debug", os.O_WRONLY | os.O_CREAT), 2)
sys._debugmallocstats()
with open("maps", "w") as maps: maps.write(open("/proc/self/maps").read())
os.abort()
"""


VALGRIND_CLIENT = """
#include <stdlib.h>
#include <string.h>
void *kept[3000];
int main(void)
{
    for (int i = 0; i < 3000; i++)
        memset(kept[i] = malloc(1500), 1, 1500);
    memset(kept[0] = malloc(6000000), 2, 6000000);
    *(volatile int *)0 = 1;
}
"""

LINKED_WITH_PYTHON = """
#include <stdlib.h>
#include <string.h>
extern const char *Py_GetVersion(void);
const char *volatile version;
void *kept[3000];
int main(void)
{
    for (int i = 0; i < 3000; i++)
        memset(kept[i] = malloc(500), 1, 500);
    version = Py_GetVersion();
    abort();
}
"""


def test_arenas_of_python(tmp_path: Path, require_cores: None) -> None:
    try:
        python = real_programs.tool("python3", "python3")
    except real_programs.CannotRun as problem:
        skip_unless_ci(str(problem))
    command = ["prlimit", "--core=unlimited", "--", python, "-S", "-B", "-c", PYTHON_WORK]
    ended = subprocess.run(command, cwd=tmp_path, check=False, timeout=SECONDS)
    assert ended.returncode == -signal.SIGABRT
    told = re.search(r"(\d+) arenas \* (\d+) bytes/arena", (tmp_path / "debug").read_text())
    assert told is not None
    looked = looked_at(tmp_path)
    finding = looked.finding()
    assert (finding.subject, finding.confidence) == ("pymalloc", Confidence.STRONG)
    assert looked.bytes("pymalloc") == int(told[1]) * int(told[2])
    assert finding.quantity("allocator_bytes_are_estimated") == "false"
    assert looked.only_anonymous("pymalloc")
    # Its malloc is glibc's all the same.
    assert looked.report.totals[ChunkState.IN_USE].chunk_bytes > MIB


@pytest.mark.parametrize("how", ["linked", "without_pymalloc"])
def test_python_that_has_no_arenas(tmp_path: Path, require_cores: None, how: str) -> None:
    """A program that is linked with Python and never starts it, as vim is; and Python that asks malloc for all."""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONMALLOC": "malloc"}
    try:
        if how == "linked":
            libraries = sorted(LIBRARIES.glob("libpython3*.so.1.0"))
            if not libraries:
                skip_unless_ci("no libpython3: apt-get install libpython3.11")
            (tmp_path / "linked.c").write_text(LINKED_WITH_PYTHON)
            command = [real_programs.tool("gcc", "gcc"), "-o", "linked", "linked.c", str(libraries[-1])]
            subprocess.run(command, cwd=tmp_path, check=True)
            command = ["./linked"]
        else:
            command = [real_programs.tool("python3", "python3"), "-S", "-B", "-c", PYTHON_WORK]
    except real_programs.CannotRun as problem:
        skip_unless_ci(str(problem))
    run = ["prlimit", "--core=unlimited", "--", *command]
    ended = subprocess.run(run, cwd=tmp_path, env=environment, check=False, timeout=SECONDS)
    assert ended.returncode == -signal.SIGABRT
    (tmp_path / "maps").touch()
    report = looked_at(tmp_path).report
    assert report.other_allocators == ()
    assert [finding for finding in report.findings if finding.code == "OTHER-ALLOCATOR"] == []
    assert report.totals[ChunkState.IN_USE].chunk_bytes > MIB


def test_a_go_program(tmp_path: Path, require_cores: None) -> None:
    try:
        program = real_programs.tool("fzf", "fzf")
    except real_programs.CannotRun as problem:
        skip_unless_ci(str(problem))
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            ["prlimit", "--core=unlimited", "--", program, "-f", "9999"], cwd=tmp_path, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=errors, env={"PATH": "/usr/bin:/bin", "GOTRACEBACK": "crash"},
        )  # fmt: skip
        assert process.stdin is not None
        process.stdin.write(b"".join(b"%d\n" % number for number in range(200_000)))
        process.stdin.flush()
        time.sleep(0.5)
        (tmp_path / "maps").write_text(Path(f"/proc/{process.pid}/maps").read_text())
        process.send_signal(signal.SIGABRT)
        process.stdin.close()
        assert process.wait(SECONDS) == -signal.SIGABRT
    looked = looked_at(tmp_path)
    finding = looked.finding()
    assert (finding.subject, finding.severity) == ("Go", Severity.WARNING)
    assert finding.quantity("allocator_bytes_are_estimated") == "true"
    arenas = [(low, high) for low, high, _ in looked.maps if 0xC000000000 <= low < 0xC100000000]
    assert looked.ranges("Go").tolist() == [[arenas[0][0], arenas[-1][1]]]
    assert looked.bytes("Go") % (64 * MIB) == 0


def test_no_symbols_and_no_name_leave_what_the_structures_say(ran: Callable[..., Looked], tmp_path: Path) -> None:
    """A program with jemalloc inside, by its structures alone: the library has another name and its file is not at hand."""
    library = LIBRARIES / "libjemalloc.so.2"
    compiler = real_programs.tool("gcc", "gcc")
    if not library.exists():
        skip_unless_ci("no libjemalloc.so.2: apt-get install libjemalloc2")
    renamed = tmp_path / "libown.so"
    renamed.write_bytes(library.read_bytes())
    command = [compiler, "-O1", "-pthread", "-o", "other_blocks", SOURCES / "other_blocks.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run = ["prlimit", "--core=unlimited", "--", "./other_blocks", "record", "2", "500", "3"]
    environment = {"PATH": "/usr/bin:/bin", "LD_PRELOAD": str(renamed)}
    assert subprocess.run(run, cwd=tmp_path, env=environment, check=False).returncode == -signal.SIGABRT
    renamed.unlink()
    (core,) = tmp_path.glob("core*")
    with coreheap.open(core) as opened:
        (found,) = other_allocators(opened)
    assert found.name == "jemalloc"
    assert found.confidence is Confidence.CERTAIN
    said = dict(line.split()[1:] for line in (tmp_path / "record").read_text().splitlines() if line.startswith("stat"))
    assert found.bytes == int(said["stats.mapped"]) + int(said["stats.retained"])


@pytest.mark.parametrize("seed", range(3))
def test_damage_and_cuts_raise_nothing(tmp_path: Path, require_cores: None, seed: int) -> None:
    """Random words over all that the core holds, then half of the file: less may be found, nothing outside of memory."""
    try:
        compiler = real_programs.tool("musl-gcc", "musl-tools")
    except real_programs.CannotRun as problem:
        skip_unless_ci(str(problem))
    source = SOURCES / "other_blocks.c"
    subprocess.run(
        [compiler, "-static", "-DNO_DLSYM", "-pthread", "-o", "other_blocks", source], cwd=tmp_path, check=True
    )
    command = ["prlimit", "--core=unlimited", "--", "./other_blocks", "record", "2", "400", "2"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == -signal.SIGABRT
    (core,) = tmp_path.glob("core*")
    content = np.fromfile(core, np.uint8)
    random = np.random.default_rng(seed)
    words = content[: len(content) // 8 * 8].view("<u8")
    # The headers and notes stay: their damage has its own tests.
    places = random.integers(1 << 13, len(words), 20_000)
    words[places] = random.choice(words[words != 0], len(places))
    for length in (len(content), len(content) // 2):
        content[:length].tofile(core)
        with coreheap.open(core) as opened:
            for allocator in other_allocators(opened):
                for ranges in allocator.ranges:
                    assert (ranges.start < ranges.end).all()
                    assert (ranges.start[1:] >= ranges.end[:-1]).all()
