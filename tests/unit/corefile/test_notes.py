"""Threads, process, signal, auxiliary vector and mapped files out of the notes, and notes that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from coreheap.corefile import AUXV_NAMES, Core, open_core
from tests.core_builder import CoreBuilder, note

MACHINES = [(64, "x86_64"), (32, "i386"), (64, "aarch64")]


def opened(builder: CoreBuilder, tmp_path: Path) -> Core:
    return open_core(builder.add_segment(0x10000, b"x" * 4096).write(tmp_path / "core"))


def causes(core: Core) -> list[str]:
    return [gap.cause for gap in core.gaps]


@pytest.mark.parametrize(("elf_class", "machine"), MACHINES)
def test_threads(tmp_path: Path, elf_class: int, machine: str) -> None:
    builder = CoreBuilder(elf_class, machine)
    first = {"x86_64": "r12", "i386": "esi", "aarch64": "x19"}[machine]
    builder.add_thread(
        100,
        registers={first: 0xABCD},
        stack_pointer=0x7000,
        program_counter=0x8000,
        thread_pointer=0x9000,
    )
    builder.add_thread(101, stack_pointer=0x7100, program_counter=0x8100, thread_pointer=0x9100)
    core = opened(builder, tmp_path)
    one, two = core.threads
    assert (one.index, one.lwp, one.signal) == (0, 100, 6)
    assert (one.stack_pointer, one.program_counter, one.thread_pointer) == (0x7000, 0x8000, 0x9000)
    assert one.registers[first] == 0xABCD
    assert (two.index, two.lwp, two.signal) == (1, 101, None)
    assert (two.stack_pointer, two.program_counter, two.thread_pointer) == (0x7100, 0x8100, 0x9100)
    assert core.thread_table.registers.shape == (2, len(one.registers))
    assert core.thread_table.registers.dtype == np.uint64


@pytest.mark.parametrize(("elf_class", "machine"), MACHINES)
def test_a_thread_pointer_that_is_not_recorded_is_unknown(tmp_path: Path, elf_class: int, machine: str) -> None:
    builder = CoreBuilder(elf_class, machine).add_thread(100).add_thread(101, thread_pointer=0x9100)
    one, two = opened(builder, tmp_path).threads
    assert one.thread_pointer is None
    assert two.thread_pointer == 0x9100


@pytest.mark.parametrize(("elf_class", "machine"), MACHINES)
def test_the_workers_of_io_uring_are_no_threads_of_the_program(tmp_path: Path, elf_class: int, machine: str) -> None:
    """All their registers are 0, and the thread pointer is a copy; without one, or with one of its own, it is any thread."""
    builder = CoreBuilder(elf_class, machine)
    builder.add_thread(100, stack_pointer=0x7000, program_counter=0x8000, thread_pointer=0x9000)
    builder.add_thread(101, thread_pointer=0x9000)
    builder.add_thread(102, stack_pointer=0x7100, program_counter=0x8100, thread_pointer=0x9100)
    builder.add_thread(103, thread_pointer=0x9100).add_thread(104, thread_pointer=0x9000)
    builder.add_thread(105, thread_pointer=0x9200).add_thread(106)
    core = opened(builder, tmp_path)
    assert [(thread.index, thread.lwp) for thread in core.threads] == [(0, 100), (1, 102), (2, 105), (3, 106)]
    assert [thread.thread_pointer for thread in core.threads] == [0x9000, 0x9100, 0x9200, None]


def test_the_notes_of_each_thread_are_where_they_are(tmp_path: Path) -> None:
    builder = CoreBuilder()
    builder.add_thread(100, extra_notes=[(b"LINUX", 0x202, b"first state")])
    builder.add_thread(101, extra_notes=[(b"LINUX", 0x202, b"second state")])
    core = opened(builder, tmp_path)
    raw = core.path.read_bytes()
    for thread, content in zip(core.threads, (b"first state", b"second state"), strict=True):
        kinds = [found.kind for found in thread.notes]
        assert kinds == [2, 0x202]
        state = thread.notes[1]
        assert raw[state.file_offset : state.file_offset + state.byte_count] == content
        assert state.owner == "LINUX"
    rows, owner = core.thread_table.other_notes()
    table = [
        (number, core.thread_table.notes.row(row)) for row, number in zip(rows.tolist(), owner.tolist(), strict=True)
    ]
    assert table == [(thread.index, found) for thread in core.threads for found in thread.notes]


def test_a_status_of_unknown_size_is_left_out_with_its_notes(tmp_path: Path) -> None:
    builder = CoreBuilder().add_thread(100)
    builder.add_note(b"CORE", 1, b"short").add_note(b"LINUX", 0x202, b"belongs to the lost thread")
    core = opened(builder, tmp_path)
    assert len(core.threads) == 1
    assert [found.kind for found in core.threads[0].notes] == [2]
    assert "thread_notes_unusable" in causes(core)


def test_the_tls_note_of_a_thread_that_is_left_out_belongs_to_no_other(tmp_path: Path) -> None:
    builder = CoreBuilder(64, "aarch64").add_thread(100, thread_pointer=0x9000)
    builder.add_note(b"CORE", 1, b"short").add_note(b"LINUX", 0x401, struct.pack("<Q", 0x9999))
    assert [thread.thread_pointer for thread in opened(builder, tmp_path).threads] == [0x9000]


@pytest.mark.parametrize(("elf_class", "machine"), MACHINES)
def test_the_process(tmp_path: Path, elf_class: int, machine: str) -> None:
    builder = CoreBuilder(elf_class, machine)
    builder.pid, builder.parent_pid, builder.uid = 77, 7, 1001
    builder.name, builder.arguments = b"name\xff\x1b[31m", b"name --flag value "
    core = opened(builder.add_thread(77), tmp_path)
    process = core.process
    assert (process.pid, process.parent_pid, process.uid) == (77, 7, 1001)
    assert process.name == "name\\xff\x1b[31m"
    assert process.command_line == "name --flag value"
    process.name.encode("utf-8")


@pytest.mark.parametrize(("elf_class", "machine"), MACHINES)
@pytest.mark.parametrize(
    ("number", "code", "address"),
    [(11, 1, 0xDEAD0), (11, 0x80, None), (6, -6, None), (11, 0, None), (7, 2, 0xDEAD0)],
)
def test_the_fault_address_where_the_signal_has_one(
    tmp_path: Path, elf_class: int, machine: str, number: int, code: int, address: int | None
) -> None:
    builder = CoreBuilder(elf_class, machine)
    builder.signal, builder.signal_code, builder.fault_address = number, code, 0xDEAD0
    process = opened(builder.add_thread(), tmp_path).process
    assert (process.signal, process.signal_code, process.fault_address) == (number, code, address)


def test_the_siginfo_of_gdbs_own_stop_is_no_signal(tmp_path: Path) -> None:
    builder = CoreBuilder()
    builder.writer, builder.section_header_count = "gdb", 5
    builder.signal = 0
    builder.add_thread()
    builder.signal, builder.signal_code = 19, 0x80
    process = opened(builder, tmp_path).process
    assert (process.signal, process.signal_code, process.fault_address) == (None, None, None)


def test_a_siginfo_of_another_signal_is_not_believed(tmp_path: Path) -> None:
    builder = CoreBuilder().add_thread(signal=6)
    builder.signal, builder.signal_code, builder.fault_address = 11, 1, 0xDEAD0
    process = opened(builder, tmp_path).process
    assert (process.signal, process.signal_code, process.fault_address) == (6, None, None)


def test_the_auxiliary_vector(tmp_path: Path) -> None:
    builder = CoreBuilder().add_thread()
    builder.auxv = {6: 4096, 9: 0x1234, 25: 0xFFFF_FFFF_FFFF_FFF0}
    core = opened(builder, tmp_path)
    assert core.auxv == {6: 4096, 9: 0x1234, 25: 0xFFFF_FFFF_FFFF_FFF0}
    assert AUXV_NAMES[9] == "AT_ENTRY"


def test_missing_notes_are_gaps(tmp_path: Path) -> None:
    builder = CoreBuilder()
    builder.with_auxv = builder.with_process_info = builder.with_signal_info = False
    core = opened(builder, tmp_path)
    assert core.threads == ()
    assert core.process.pid is None
    assert {
        "auxiliary_vector_missing",
        "threads_missing",
        "process_note_missing",
        "mapped_files_missing",
        "page_size_unknown",
    } <= set(causes(core))


@pytest.mark.parametrize(("elf_class", "machine"), MACHINES)
def test_mapped_files(tmp_path: Path, elf_class: int, machine: str) -> None:
    builder = CoreBuilder(elf_class, machine).add_thread()
    builder.add_file_mapping(0x10000, 0x11000, 0, "/bin/one").add_file_mapping(
        0x20000, 0x22000, 0x3000, b"/data/\xfftwo"
    )
    files = opened(builder, tmp_path).memory.mapped_files
    assert [(f.start, f.end, f.file_offset, f.path) for f in files] == [
        (0x10000, 0x11000, 0, "/bin/one"),
        (0x20000, 0x22000, 0x3000, "/data/\\xfftwo"),
    ]
    assert files.raw_paths[1] == b"/data/\xfftwo"
    assert files[0:1] == (files[0],)


@pytest.mark.parametrize("count", [1, 2, 1000, (1 << 64) - 1])
def test_a_count_of_mapped_files_that_lies(tmp_path: Path, count: int) -> None:
    table = struct.pack("<5Q", count, 4096, 0x10000, 0x11000, 0) + b"/one\0"
    core = opened(CoreBuilder().add_thread().add_note(b"CORE", 0x46494C45, table), tmp_path)
    files = core.memory.mapped_files
    if count == 1:
        assert [f.path for f in files] == ["/one"]
    else:
        assert len(files) == 0
        assert "mapped_files_cut" in causes(core)


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("<3I", 5, 0xFFFFFFFF, 1) + b"CORE\0\0\0\0",
        struct.pack("<3I", 0xFFFFFFFF, 4, 1) + b"CORE\0\0\0\0",
        struct.pack("<3I", 5, 400, 1) + b"CORE\0\0\0\0" + bytes(100),
    ],
)
def test_a_note_that_is_larger_than_its_segment(tmp_path: Path, raw: bytes) -> None:
    core = opened(CoreBuilder().add_thread(100).add_raw_notes(raw), tmp_path)
    assert [thread.lwp for thread in core.threads] == [100]
    assert "notes_damaged" in causes(core)


def test_zeros_end_the_notes(tmp_path: Path) -> None:
    builder = CoreBuilder().add_thread(100).add_raw_notes(bytes(4096))
    core = opened(builder, tmp_path)
    assert len(core.threads) == 1
    assert "notes_damaged" not in causes(core)


def test_notes_of_other_owners_are_not_linux(tmp_path: Path) -> None:
    foreign = note(b"FreeBSD", 1, bytes(336)) + note(b"CORE\0x", 6, bytes(16))
    core = opened(CoreBuilder().add_thread(100).add_raw_notes(foreign), tmp_path)
    assert [thread.lwp for thread in core.threads] == [100]


def test_notes_that_the_file_does_not_hold(tmp_path: Path) -> None:
    builder = CoreBuilder().add_threads(50)
    raw = builder.build()
    path = tmp_path / "core"
    path.write_bytes(raw[:8000])
    with open_core(path) as core:
        assert 0 < len(core.threads) < 50
        assert "notes_truncated" in causes(core)


def test_many_threads_come_out_in_order(tmp_path: Path) -> None:
    core = opened(CoreBuilder().add_threads(1000, first_lwp=5), tmp_path)
    assert [thread.lwp for thread in core.threads] == list(range(5, 1005))
    assert [thread.stack_pointer for thread in core.threads] == [16 * lwp for lwp in range(5, 1005)]
    assert [thread.thread_pointer for thread in core.threads] == [256 * lwp for lwp in range(5, 1005)]


@pytest.mark.parametrize("word_bytes", [4, 8])
def test_arguments_and_environment_from_the_initial_stack(tmp_path: Path, word_bytes: int) -> None:
    base = 0x7FFF0000 if word_bytes == 4 else 0x7FFF_FFFF_0000
    strings = b"program\0--flag\0\0MALLOC_ARENA_MAX=2\0EMPTY=\0ODD\0MALLOC_ARENA_MAX=9\0"
    at = {name: base + 0x800 + strings.index(name) for name in (b"program", b"--flag", b"EMPTY", b"ODD")}
    first = base + 0x800 + strings.index(b"MALLOC")
    second = base + 0x800 + strings.rindex(b"MALLOC")
    random = base + 0x700
    auxv = {33: 0x7FFF1000, 6: 4096, 25: random}
    words = [0, 0x1234, 2, at[b"program"], at[b"--flag"], 0]
    words += [first, at[b"EMPTY"], at[b"ODD"], second, 0]
    words += [word for pair in auxv.items() for word in pair] + [0, 0]
    stack = bytearray(4096)
    raw = struct.pack(f"<{len(words)}{'Q' if word_bytes == 8 else 'I'}", *words)
    stack[0x400 : 0x400 + len(raw)] = raw
    stack[0x800 : 0x800 + len(strings)] = strings
    builder = CoreBuilder(word_bytes * 8, "x86_64" if word_bytes == 8 else "i386").add_thread()
    builder.auxv = auxv
    builder.add_segment(base, bytes(stack))
    found = opened(builder, tmp_path).initial_stack
    assert found is not None
    assert found.arguments == ("program", "--flag")
    assert found.environment == {"MALLOC_ARENA_MAX": "2", "EMPTY": "", "ODD": ""}


def test_an_initial_stack_that_is_not_saved_is_unknown(tmp_path: Path) -> None:
    builder = CoreBuilder().add_thread().add_segment(0x7FFF0000, None, 8192)
    builder.auxv = {6: 4096, 25: 0x7FFF0100}
    assert opened(builder, tmp_path).initial_stack is None
