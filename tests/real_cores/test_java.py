"""A real Java process: what coreheap says of its memory against what the VM says of itself (NMT) and the kernel (smaps).

`docs/java.md` shows the two side by side; `python -m tests.real_cores.test_java DIRECTORY` makes its table anew.
"""

from __future__ import annotations

import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.accounting.java import JavaMemory, java_memory
from coreheap.evidence import Confidence
from coreheap.mappings import KINDS, MappingKind, ResidencyBasis
from coreheap.report import Report
from tests.conftest import skip_unless_ci
from tests.real_cores import cores, real_programs
from tests.real_cores.cores import PROGRAMS as SOURCES

PACKAGE = "openjdk-17-jdk-headless"
SECONDS = 120
MIB = 1 << 20
HEAP_BYTES = 256 * MIB
THREADS = 24
DIRECT_BYTES = 40 * MIB
"""What Bloat.java has in direct buffers; its THREADS are those above."""
METASPACE = ("Class", "Metaspace", "Shared class space")
STACKS = (MappingKind.THREAD_STACK, MappingKind.STACK_GUARD, MappingKind.TLS, MappingKind.SIGNAL_STACK)

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class JavaRun:
    """A Java process at its end: the core, and what was asked just before. ``reserved``: NMT's word for each range."""

    core: Path
    reserved: list[tuple[int, int, str]]
    text: str
    smaps: list[tuple[int, int, int, bool]]
    """start, end, Rss in bytes, and whether it is anonymous."""

    def of_kind(self, *names: str) -> list[Range]:
        return joined((start, end) for start, end, name in self.reserved if name in names)

    def resident(self, ranges: list[Range]) -> int:
        """Rss of the mappings that lie inside the ranges."""
        return sum(
            rss for start, end, rss, _ in self.smaps if any(low <= start and end <= high for low, high in ranges)
        )


def joined(ranges: object) -> list[Range]:
    result: list[Range] = []
    for start, end in sorted(ranges):  # type: ignore[call-overload]
        if result and result[-1][1] >= start:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def overlap(first: list[Range], second: list[Range]) -> int:
    return sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)


def rows_of(report: Report, *kinds: MappingKind) -> list[Range]:
    table = report.mappings
    assert table is not None
    rows = np.isin(table.kind, [KINDS.index(kind) for kind in kinds])
    return joined(zip(table.start[rows].tolist(), table.end[rows].tolist(), strict=True))


def run_java(directory: Path, collector: str) -> JavaRun:
    """Bloat.java under a collector, looked at by jcmd and through /proc, and killed at rest."""
    java, javac, jcmd = (real_programs.tool(name, PACKAGE) for name in ("java", "javac", "jcmd"))
    subprocess.run([javac, "-d", ".", SOURCES / "Bloat.java"], cwd=directory, check=True)
    options = [f"-Xmx{HEAP_BYTES // MIB}m", f"-XX:+Use{collector}GC", "-XX:NativeMemoryTracking=detail", "-cp", "."]
    with (directory / "said").open("wb") as said:
        process = subprocess.Popen(
            ["prlimit", "--core=unlimited", "--", java, *options, "Bloat"], cwd=directory, stdout=said,
            stderr=subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"},
        )  # fmt: skip
    try:
        end = time.monotonic() + SECONDS
        while b"ready" not in (directory / "said").read_bytes():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.1)
        # The compilers finish what they have begun.
        time.sleep(1)
        told = subprocess.run(
            [jcmd, str(process.pid), "VM.native_memory", "detail", "scale=KB"],
            capture_output=True, text=True, check=True, timeout=SECONDS,
        )  # fmt: skip
        smaps = Path(f"/proc/{process.pid}/smaps").read_text()
        process.send_signal(signal.SIGABRT)
        process.wait(SECONDS)
    finally:
        process.kill()
        process.wait()
    (core,) = directory.glob("core*")
    reserved = [
        (int(row[1], 16), int(row[2], 16), row[3])
        for row in re.finditer(
            r"^\[(0x\w+) - (0x\w+)\] reserved (?:and committed )?\d+KB for (.+?)(?: from)?$", told.stdout, re.M
        )
    ]
    return JavaRun(core, reserved, told.stdout, parsed_smaps(smaps))


def parsed_smaps(text: str) -> list[tuple[int, int, int, bool]]:
    rows = []
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        words = block.splitlines()[0].split()
        start, end = (int(word, 16) for word in words[0].split("-"))
        rss = re.search(r"^Rss: +(\d+) kB", block, re.M)
        assert rss is not None
        rows.append((start, end, int(rss[1]) << 10, len(words) == 5))
    return rows


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[JavaRun, Report, JavaMemory]]:
    """``ran(collector)``: the process, the report, and what was recognised of the VM."""
    done: dict[str, tuple[JavaRun, Report, JavaMemory]] = {}

    def run(collector: str) -> tuple[JavaRun, Report, JavaMemory]:
        if collector not in done:
            if not cores.kernel_writes_cores_here():
                skip_unless_ci("core_pattern sends cores elsewhere; to run this test: sysctl kernel.core_pattern=core")
            try:
                found = run_java(tmp_path_factory.mktemp(collector), collector)
            except real_programs.CannotRun as problem:
                skip_unless_ci(str(problem))
            with coreheap.open(found.core) as core:
                memory = java_memory(core)
                assert memory is not None
                done[collector] = found, coreheap.analyze(core, coreheap.AnalysisOptions(leaks=False)), memory
        return done[collector]

    return run


COLLECTORS = ("G1", "Parallel")
Ran = Callable[[str], tuple[JavaRun, Report, JavaMemory]]


@pytest.mark.parametrize("collector", COLLECTORS)
def test_reservations_are_the_vms_own(ran: Ran, collector: str) -> None:
    """Heap, code cache and metaspace to the byte; of the collector's tables all but a few pages."""
    run, report, memory = ran(collector)
    assert memory.from_tables
    assert memory.flags["MaxHeapSize"] == HEAP_BYTES
    assert rows_of(report, MappingKind.JAVA_HEAP) == run.of_kind("Java Heap")
    assert rows_of(report, MappingKind.JAVA_CODE_CACHE) == run.of_kind("Code")
    assert rows_of(report, MappingKind.JAVA_METASPACE) == run.of_kind(*METASPACE)
    ours, theirs = rows_of(report, MappingKind.JAVA_GC), run.of_kind("GC")
    size = sum(end - start for start, end in ours)
    assert overlap(ours, theirs) == size
    # G1 keeps a byte for each region of the heap in a mapping that nothing else leads to.
    assert 0 <= sum(end - start for start, end in theirs) - size <= 64 << 10
    assert memory.parts[0].confidence is Confidence.CERTAIN


@pytest.mark.parametrize("collector", COLLECTORS)
def test_stacks_are_the_vms_own(ran: Ran, collector: str) -> None:
    run, report, memory = ran(collector)
    stacks = [(start, end) for start, end, name in run.reserved if name == "Thread Stack"]
    assert len(stacks) > THREADS
    assert overlap(rows_of(report, *STACKS), stacks) == sum(end - start for start, end in stacks)
    # Each Java thread's is one of NMT's, and its zones are what the kernel calls not accessible.
    assert len(memory.threads) > THREADS
    protected = {(start, end) for start, end, rss, is_anonymous in run.smaps if is_anonymous and not rss}
    for thread in memory.threads:
        if (thread.stack.start, thread.stack.end) in stacks:
            assert (thread.stack.start, thread.stack.start + thread.guard_bytes) in protected
    table = report.mappings
    assert table is not None
    zones = table.name == table.names.index("java_zones")
    assert int(zones.sum()) >= THREADS
    assert (table.flags[zones] == 0).all()
    assert (table.thread[zones] >= 0).all()


@pytest.mark.parametrize("collector", COLLECTORS)
def test_threads_have_the_names_that_the_program_gave(ran: Ran, collector: str) -> None:
    _, report, _ = ran(collector)
    names = [thread.name for thread in report.threads if thread.name_source == "java"]
    assert {name for name in names if name and name.startswith("worker-")} == {f"worker-{n}" for n in range(THREADS)}
    assert {"main", "Finalizer", "Signal Dispatcher"} < set(names)


@pytest.mark.parametrize("collector", COLLECTORS)
def test_what_was_in_memory_is_smaps_word(ran: Ran, collector: str) -> None:
    run, report, _ = ran(collector)
    table = report.mappings
    assert table is not None
    if table.basis is not ResidencyBasis.HOLES:
        pytest.skip("the file system of the temporary directory does not keep holes page by page")
    for kind, names in ((MappingKind.JAVA_HEAP, ("Java Heap",)), (MappingKind.JAVA_CODE_CACHE, ("Code",))):
        rows = table.kind == KINDS.index(kind)
        low, high = int(table.resident_low[rows].sum()), int(table.resident_high[rows].sum())
        resident = run.resident(run.of_kind(*names))
        # The VM writes between the look and the end. Of the archive's objects in the heap, a file's pages, nothing is known.
        assert low - 2 * MIB <= resident <= high + 2 * MIB
        assert high - low <= 2 * MIB


@pytest.mark.parametrize("collector", COLLECTORS)
def test_direct_buffers_are_malloc_s(ran: Ran, collector: str) -> None:
    """NMT counts them as Other: they are blocks of malloc's, so they stand with malloc's mmapped chunks."""
    run, report, _ = ran(collector)
    other = re.search(r"Other \(reserved=(\d+)KB", run.text)
    assert other is not None
    assert int(other[1]) << 10 >= DIRECT_BYTES
    assert report.heap is not None
    assert report.heap.mmapped_bytes >= DIRECT_BYTES
    assert report.anomalies == ()
    assert all(finding.code != "OTHER-ALLOCATOR" for finding in report.findings)


@pytest.mark.parametrize("collector", COLLECTORS)
def test_without_the_vms_file_its_shape_remains(ran: Ran, collector: str, tmp_path: Path) -> None:
    run, _, told = ran(collector)
    with coreheap.open(run.core, sysroot=tmp_path) as core:
        memory = java_memory(core)
    assert memory is not None
    assert not memory.from_tables
    assert memory.flags == {"MaxHeapSize": HEAP_BYTES}

    def ranges(found: JavaMemory, *parts: tuple[MappingKind, str]) -> list[Range]:
        return joined((part.range.start, part.range.end) for part in found.parts if (part.kind, part.part) in parts)

    for part in (
        (MappingKind.JAVA_HEAP, "reserved"),
        (MappingKind.JAVA_CODE_CACHE, "code"),
        (MappingKind.JAVA_METASPACE, "class_space"),
        (MappingKind.JAVA_METASPACE, "shared_archive"),
    ):
        assert ranges(memory, part) == ranges(told, part)
    assert all(part.confidence in (Confidence.STRONG, Confidence.PLAUSIBLE) for part in memory.parts)


@pytest.mark.parametrize("collector", COLLECTORS)
def test_records_that_frame_a_stack_make_it_no_table(ran: Ran, collector: str, tmp_path: Path) -> None:
    """JDK 25 keeps such records of the stacks of its threads: four words written where the VM's own records are."""
    run, _, told = ran(collector)
    thread = told.threads[-1]
    table = next(part for part in told.parts if part.part == "side_table")
    copy = tmp_path / "core"
    subprocess.run(["cp", "--sparse=always", run.core, copy], check=True)
    with coreheap.open(run.core) as core:
        memory = core.memory
        place = table.evidence[0].address
        assert place is not None
        low = place & -0x1000
        index = memory.region_index(low)
        assert index is not None
        words = memory.read_words(low, min(1 << 17, int(memory.region_end[index]) - low) // 8)
        # Four words of zeros not far from a record that the VM has.
        free = [row for row in range(len(words) - 4) if not words[row : row + 4].any()]
        assert free
        run_of = int(np.searchsorted(memory.run_start, np.uint64(low), side="right")) - 1
        offset = low - int(memory.run_start[run_of]) + int(memory.run_file_offset[run_of]) + 8 * free[0]
        page = core.page_bytes
    # A table of this heap may have this size; the stack is larger than that, or not.
    start = thread.stack.end - 64 * page
    with copy.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack("<4Q", start, thread.stack.end, start, thread.stack.end))
    with coreheap.open(copy) as core:
        changed = java_memory(core)
    assert changed is not None
    assert {part.range for part in changed.parts} == {part.range for part in told.parts}


def side_by_side(run: JavaRun, report: Report) -> str:
    """The table of docs/java.md: MiB, mapped, committed and resident by coreheap, NMT's two, and Rss of smaps."""
    table = report.mappings
    assert table is not None
    lines = []
    for title, kinds, categories, names in (
        ("Java heap", (MappingKind.JAVA_HEAP,), ("Java Heap",), ("Java Heap",)),
        ("metaspace", (MappingKind.JAVA_METASPACE,), METASPACE, METASPACE),
        ("code cache", (MappingKind.JAVA_CODE_CACHE,), ("Code",), ("Code",)),
        ("collector's tables", (MappingKind.JAVA_GC,), ("GC",), ("GC",)),
        ("stacks of threads", STACKS, ("Thread",), ("Thread Stack",)),
    ):
        rows = np.isin(table.kind, [KINDS.index(kind) for kind in kinds])
        told = [
            (int(row[1]), int(row[2]))
            for name in categories
            for section in re.findall(rf"- +{name} \(.*?\n \n", run.text, re.S)
            for row in re.finditer(r"\((mmap|stack): reserved=(\d+)KB, committed=(\d+)KB", section)
            for row in [(row[1], row[2], row[3])]
        ]
        figures = [
            int((table.end[rows] - table.start[rows]).sum()),
            int(table.committed_bytes[rows].sum()),
            int(table.resident_low[rows].sum()),
            sum(reserved for reserved, _ in told) << 10,
            sum(committed for _, committed in told) << 10,
            run.resident(run.of_kind(*names)),
        ]
        lines.append(f"| {title} | " + " | ".join(f"{figure / MIB:,.2f}" for figure in figures) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    _run = run_java(Path(sys.argv[1]).resolve(), "G1")
    with coreheap.open(_run.core) as _core:
        _report = coreheap.analyze(_core, coreheap.AnalysisOptions(leaks=False))
    print(_run.text.partition("Virtual memory map")[0])
    print(side_by_side(_run, _report))
    print(_run.core)
