"""A real process, its core by the kernel or by gdb, and three independent witnesses.

The process itself writes down where its data are before it dies, readelf and pyelftools read the same core.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from coreheap.corefile import Backing, Core, open_core
from coreheap.errors import MemoryFault

SOURCE = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
int marker = 0x1234abcd;
const char constant[] = "text in the read-only data";
static pthread_barrier_t ready;
static FILE *truth;
static void *thread(void *argument) {
    volatile char local[64] = "a thread's stack";
    fprintf(truth, "thread %d %p %p\n", gettid(), (void *)pthread_self(), (void *)local);
    pthread_barrier_wait(&ready);
    for (;;) pause();
    return argument;
}
int main(int count, char **arguments) {
    truth = fopen(arguments[1], "w");
    pthread_barrier_init(&ready, 0, 4);
    fprintf(truth, "main %d %p 0\n", gettid(), (void *)pthread_self());
    fprintf(truth, "marker %p 0 0\nconstant %p 0 0\n", (void *)&marker, (void *)constant);
    char *sparse = mmap(0, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(sparse, 64 << 20, MADV_NOHUGEPAGE);
    sparse[16 << 20] = 1;
    sparse[48 << 20] = 2;
    char *hidden = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    strcpy(hidden, "not in the core");
    madvise(hidden, 8192, MADV_DONTDUMP);
    fprintf(truth, "sparse %p 0 0\nhidden %p 0 0\n", (void *)sparse, (void *)hidden);
    for (int index = 0; index < 3; index++) {
        pthread_t one;
        pthread_create(&one, 0, thread, 0);
    }
    pthread_barrier_wait(&ready);
    fclose(truth);
    if (count > 2 && !strcmp(arguments[2], "wait")) { puts("ready"); fflush(stdout); for (;;) pause(); }
    if (count > 2 && !strcmp(arguments[2], "fault")) *(volatile int *)0xdead0 = 1;
    abort();
}
"""
Tool = Callable[[str, str], str]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        _missing("a C compiler is missing; to run this test: apt install gcc libc6-dev")
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.c").write_text(SOURCE)
    command = [compiler, "-g", "-pthread", "-Wl,--build-id", "program.c", "-o", "program"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "program"


def _missing(reason: str) -> None:
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def kernel_core(program: Path, folder: Path, *arguments: str, coredump_filter: int = 0x33) -> Path:
    """The core that the kernel writes of the program."""
    if Path("/proc/sys/kernel/core_pattern").read_text().startswith(("|", "/")):
        _missing("cores go elsewhere; to run this test: sysctl kernel.core_pattern=core")
    if resource.getrlimit(resource.RLIMIT_CORE)[1] not in (resource.RLIM_INFINITY,):
        _missing("cores are limited; to run this test: ulimit -H -c unlimited")

    def prepare() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY,) * 2)
        Path("/proc/self/coredump_filter").write_text(hex(coredump_filter))

    subprocess.run([program, folder / "truth", *arguments], cwd=folder, preexec_fn=prepare, check=False)
    return next(path for path in folder.iterdir() if path.name.startswith("core"))


def truth_of(folder: Path) -> dict[str, list[list[int]]]:
    """name -> the numbers that the process wrote down under it."""
    truth: dict[str, list[list[int]]] = {}
    for line in (folder / "truth").read_text().splitlines():
        name, *numbers = line.split()
        truth.setdefault(name, []).append([int(number, 0) for number in numbers])
    return truth


def check_against_the_process(core: Core, folder: Path) -> None:
    truth = truth_of(folder)
    lwp, thread_pointer, _ = truth["main"][0]
    assert core.process.pid == lwp
    assert core.process.name == "program"
    assert core.process.command_line.startswith(str(folder.parent)[:20]) or core.process.command_line
    assert core.threads[0].lwp == lwp
    assert core.threads[0].thread_pointer == thread_pointer
    threads = {thread.lwp: thread for thread in core.threads}
    assert len(threads) == 4
    for lwp, thread_pointer, local in truth["thread"]:
        thread = threads[lwp]
        assert thread.thread_pointer == thread_pointer
        region = core.memory.region_index(local)
        assert region is not None
        assert core.memory.region_index(thread.stack_pointer) == region
        assert core.memory.read_text(local) == b"a thread's stack"
    main = core.main_module
    assert main is not None
    assert main.file_status == "matched"
    assert main.symbol_address("marker") == truth["marker"][0][0]
    assert main.symbol_address("constant") == truth["constant"][0][0]
    assert core.memory.read(truth["marker"][0][0], 4) == (0x1234ABCD).to_bytes(4, "little")
    assert core.memory.read_text(truth["constant"][0][0]) == b"text in the read-only data"
    assert core.process.executable == main.path
    stack = core.initial_stack
    assert stack is not None
    assert stack.arguments[1] == str(folder / "truth")
    assert stack.environment["PATH"] == os.environ["PATH"]
    names = [module.name for module in core.modules]
    assert "[vdso]" in [module.path for module in core.modules]
    assert any(name.startswith("libc.so") for name in names)
    libc = next(module for module in core.modules if module.name.startswith("libc.so"))
    assert libc.symbol_address("malloc") is not None
    assert libc.soname == "libc.so.6"


def test_a_core_of_the_kernel(program: Path, tmp_path: Path) -> None:
    with open_core(kernel_core(program, tmp_path)) as core:
        check_against_the_process(core, tmp_path)
        assert core.made_by == "kernel"
        assert core.process.signal == 6
        assert core.coverage == 1.0
        assert core.gaps == ()
        truth = truth_of(tmp_path)
        sparse, hidden = truth["sparse"][0][0], truth["hidden"][0][0]
        page = core.page_bytes
        assert core.memory.cause_missing(hidden) == "not_saved"
        with pytest.raises(MemoryFault):
            core.memory.read(hidden, 1)
        if core.memory.holes_known:
            expected = [(at, at + page) for at in (sparse + (16 << 20), sparse + (48 << 20))]
            assert core.memory.populated_extents(sparse, sparse + (64 << 20)) == expected
            assert core.memory.populated_bytes(sparse, sparse + (64 << 20)) == 2 * page


def test_the_fault_address(program: Path, tmp_path: Path) -> None:
    with open_core(kernel_core(program, tmp_path, "fault")) as core:
        assert core.process.signal == 11
        assert core.process.signal_code == 1
        assert core.process.fault_address == 0xDEAD0


@pytest.mark.parametrize("coredump_filter", [0x00, 0x01, 0x10, 0x7F])
def test_what_the_coredump_filter_leaves_out_is_never_made_up(
    program: Path, tmp_path: Path, coredump_filter: int
) -> None:
    with open_core(kernel_core(program, tmp_path, coredump_filter=coredump_filter)) as core:
        marker = truth_of(tmp_path)["marker"][0][0]
        assert len(core.threads) == 4
        if coredump_filter & 1:
            assert core.memory.read(marker, 4) == (0x1234ABCD).to_bytes(4, "little")
        else:
            assert core.memory.cause_missing(marker) == "mapped_file"
            with pytest.raises(MemoryFault):
                core.memory.read(marker, 4)
        headers_saved = bool(coredump_filter & 0x10)
        assert core.main_module is not None
        assert core.main_module.file_status == ("matched" if headers_saved else "not_verifiable")
        assert ("modules_not_verifiable" in [gap.cause for gap in core.gaps]) != headers_saved


def test_a_core_of_gdb(program: Path, tmp_path: Path, require_tool: Tool) -> None:
    gdb = require_tool("gdb", "apt install gdb")
    with subprocess.Popen([program, tmp_path / "truth", "wait"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        command = [
            gdb,
            "-batch",
            "-nx",
            "-p",
            str(process.pid),
            "-ex",
            f"gcore {tmp_path / 'core'}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        process.kill()
    if not (tmp_path / "core").exists():
        _missing(f"gdb may not attach; to run this test: sysctl kernel.yama.ptrace_scope=0\n{done.stderr}")
    with open_core(tmp_path / "core") as core:
        check_against_the_process(core, tmp_path)
        assert core.made_by == "gdb"
        assert core.process.signal is None
        raw = (tmp_path / "core").read_bytes()
    (tmp_path / "cut").write_bytes(raw[: len(raw) * 3 // 4])
    with open_core(tmp_path / "cut") as core:  # gdb's notes are at the end
        assert core.made_by == "gdb"
        assert core.threads == ()
        assert "threads_missing" in [gap.cause for gap in core.gaps]


def test_readelf_sees_the_same_segments(program: Path, tmp_path: Path, require_tool: Tool) -> None:
    readelf = require_tool("readelf", "apt install binutils")
    path = kernel_core(program, tmp_path)
    lines = subprocess.run([readelf, "-lW", path], capture_output=True, text=True, check=True).stdout
    pattern = re.compile(r"^ +LOAD +(0x\S+) (0x\S+) 0x\S+ (0x\S+) (0x\S+) ([R ][W ][E ])", re.MULTILINE)
    with open_core(path) as core:
        segments = core.image.segments
        rows = segments.rows_of_kind(1).tolist()
        ours = [
            (
                int(segments.file_offset[row]),
                int(segments.address[row]),
                int(segments.file_bytes[row]),
                int(segments.memory_bytes[row]),
                int(segments.flags[row]),
            )
            for row in rows
        ]
        theirs = [
            (
                *(int(number, 16) for number in (offset, address, in_file, in_memory)),
                sum(bit for letter, bit in (("R", 4), ("W", 2), ("E", 1)) if letter in flags),
            )
            for offset, address, in_file, in_memory, flags in pattern.findall(lines)
        ]
        assert ours == theirs
        saved = core.memory.region_backing == Backing.SAVED
        saved_bytes = int((core.memory.region_end - core.memory.region_start)[saved].sum())
        assert saved_bytes == sum(row[2] for row in theirs) == core.saved_bytes


def test_pyelftools_sees_the_same_notes(program: Path, tmp_path: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile", reason="pip install pyelftools")
    path = kernel_core(program, tmp_path)
    with open(path, "rb") as file, open_core(path) as core:
        notes = [note for segment in elffile.ELFFile(file).iter_segments("PT_NOTE") for note in segment.iter_notes()]
        table = core.thread_table.notes
        assert len(table) == len(notes)
        assert table.byte_count.tolist() == [note["n_descsz"] for note in notes]
        statuses = [note for note in notes if note["n_type"] == "NT_PRSTATUS"]
        assert len(statuses) == len(core.threads)
        files = next(note for note in notes if note["n_type"] == "NT_FILE")["n_desc"]
        ours = [(row.start, row.end, row.file_offset // 4096) for row in core.memory.mapped_files]
        theirs = [(e["vm_start"], e["vm_end"], e["page_offset"]) for e in files["Elf_Nt_File_Entry"]]
        assert ours == theirs
        paths = [name.decode() for name in files["filename"]]
        assert [row.path for row in core.memory.mapped_files] == paths


I386_SOURCE = r"""
static int call(int number, int first) {
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(first) : "memory");
    return result;
}
struct user_desc { unsigned entry, base, limit, flags; };
int marker = 0x55667788;
char block[64];
void _start(void) {
    struct user_desc area = {-1, (unsigned)block, 0xfffff, 0x51};
    call(243, (int)&area);
    unsigned short selector = (area.entry << 3) | 3;
    __asm__ volatile("mov %0, %%gs" ::"r"(selector));
    *(int *)(block + 8) = 0x1234;
    *(volatile int *)0xbad0 = 1;
    for (;;) ;
}
"""


def test_a_core_of_an_i386_process(tmp_path: Path, require_tool: Tool) -> None:
    compiler = require_tool("gcc", "apt install gcc")
    (tmp_path / "program.c").write_text(I386_SOURCE)
    command = [
        compiler,
        "-m32",
        "-nostdlib",
        "-static",
        "-ffreestanding",
        "-fno-stack-protector",
        "-fno-pic",
    ]
    command += ["-Wl,--build-id", "program.c", "-o", "program"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode:
        _missing("gcc makes no i386 code; to run this test: an x86 machine with gcc")
    with open_core(kernel_core(tmp_path / "program", tmp_path)) as core:
        (thread,) = core.threads
        assert (core.machine, core.word_bytes, core.made_by) == ("i386", 4, "kernel")
        assert core.process.fault_address == 0xBAD0
        assert core.main_module is not None
        assert core.main_module.symbol_address("block") == thread.thread_pointer
        assert thread.thread_pointer is not None
        assert core.memory.read_word(thread.thread_pointer + 8) == 0x1234
        assert core.initial_stack is not None
        assert core.initial_stack.arguments == (str(tmp_path / "program"), str(tmp_path / "truth"))
