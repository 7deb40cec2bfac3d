"""The threads of a core: registers, signal, thread pointer.

Knows: include/linux/elfcore.h (elf_prstatus), the register order of arch/x86/include/asm/user_64.h
and user_32.h and of arch/arm64/include/uapi/asm/ptrace.h. Does not know: stacks, or what a thread
did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile.elf import Bytes, Words, words_in
from coreheap.corefile.notes import (
    NT_386_TLS,
    NT_ARM_TLS,
    NT_AUXV,
    NT_FILE,
    NT_PRPSINFO,
    NT_PRSTATUS,
    NT_SIGINFO,
    NT_X86_XSAVE_LAYOUT,
    Note,
    NoteTable,
    records_at,
)
from coreheap.evidence import Gap

_NOTES_OF_THE_PROCESS: Final = frozenset((NT_PRPSINFO, NT_AUXV, NT_SIGINFO, NT_FILE, NT_X86_XSAVE_LAYOUT))
"""They stand among the threads' notes: the kernel writes most right behind the first
NT_PRSTATUS."""


@dataclass(frozen=True, slots=True)
class StatusLayout:
    """Where elf_prstatus of one machine keeps its fields; offsets in bytes."""

    byte_count: int
    lwp_offset: int
    registers_offset: int
    word_bytes: int
    register_names: tuple[str, ...]
    stack_pointer: str
    program_counter: str

    @property
    def record(self) -> np.dtype[np.void]:
        word = "<u8" if self.word_bytes == 8 else "<u4"
        return np.dtype(
            {
                "names": ["signal", "lwp", "registers"],
                "formats": ["<i2", "<i4", (word, (len(self.register_names),))],
                "offsets": [12, self.lwp_offset, self.registers_offset],
                "itemsize": self.byte_count,
            }
        )


# fmt: off
_X86_64_REGISTERS: Final = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi",
    "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs",
    "gs",
)
_I386_REGISTERS: Final = (
    "ebx", "ecx", "edx", "esi", "edi", "ebp", "eax", "ds", "es", "fs", "gs", "orig_eax", "eip",
    "cs", "eflags", "esp", "ss",
)
# fmt: on
_AARCH64_REGISTERS: Final = (*(f"x{number}" for number in range(31)), "sp", "pc", "pstate")

STATUS_LAYOUTS: Final[dict[str, StatusLayout]] = {
    "x86_64": StatusLayout(336, 32, 112, 8, _X86_64_REGISTERS, "rsp", "rip"),
    "i386": StatusLayout(144, 24, 72, 4, _I386_REGISTERS, "esp", "eip"),
    "aarch64": StatusLayout(392, 32, 112, 8, _AARCH64_REGISTERS, "sp", "pc"),
}


class ThreadTable:
    """All threads as columns, in the order of the core.

    ``lwp`` int32, ``signal`` int16 (0 for none), ``registers`` uint64[threads, registers] in the
    order of ``register_names``, ``thread_pointer`` uint64, valid where ``has_thread_pointer``.
    """

    def __init__(self, layout: StatusLayout, rows: npt.NDArray[np.void], notes: NoteTable) -> None:
        self.layout = layout
        self.notes = notes
        self.lwp: npt.NDArray[np.int32] = rows["lwp"]
        self.signal: npt.NDArray[np.int16] = rows["signal"]
        self.registers: Words = rows["registers"].astype(np.uint64)
        self.thread_pointer: Words = np.zeros(len(rows), np.uint64)
        self.has_thread_pointer: npt.NDArray[np.bool_] = np.zeros(len(rows), np.bool_)
        self.note_rows: npt.NDArray[np.intp] = np.zeros((len(rows), 2), np.intp)
        """First and end of the rows of ``notes`` that follow each thread's NT_PRSTATUS."""

    def __len__(self) -> int:
        return len(self.lwp)

    def other_notes(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """As ``Thread.notes`` of all threads: rows of ``notes`` in their order, and the thread's index of each."""
        first, end = self.note_rows[:, 0], self.note_rows[:, 1]
        owner = np.repeat(np.arange(len(self)), end - first)
        rows = np.arange(len(owner)) + (first - np.concatenate(([0], np.cumsum(end - first)[:-1])))[owner]
        kept = ~np.isin(self.notes.kind[rows], list(_NOTES_OF_THE_PROCESS))
        return rows[kept], owner[kept]

    @property
    def register_names(self) -> tuple[str, ...]:
        return self.layout.register_names

    def register(self, name: str) -> Words:
        """One register of all threads."""
        return self.registers[:, self.layout.register_names.index(name)]


@dataclass(frozen=True, slots=True, eq=False)
class Thread:
    """One thread at the moment of the dump. Index 0 is the one that the core was written for."""

    index: int
    lwp: int
    signal: int | None
    """pr_cursig; the kernel gives every thread the signal that the core was written for."""
    stack_pointer: int
    program_counter: int
    thread_pointer: int | None
    """fs_base on x86_64, the gs segment's base on i386, tpidr_el0 on aarch64; None if unknown."""
    table: ThreadTable

    @property
    def registers(self) -> Mapping[str, int]:
        """name -> value of the general registers."""
        values = self.table.registers[self.index].tolist()
        return dict(zip(self.table.register_names, values, strict=True))

    @property
    def notes(self) -> tuple[Note, ...]:
        """This thread's other notes (floating point, XSAVE, TLS), by their place in the file."""
        first, end = self.table.note_rows[self.index].tolist()
        notes = (self.table.notes.row(row) for row in range(first, end))
        return tuple(note for note in notes if note.kind not in _NOTES_OF_THE_PROCESS)


def read_threads(data: Bytes, machine: str, notes: NoteTable, gaps: list[Gap]) -> ThreadTable:
    """The thread of every NT_PRSTATUS that is whole."""
    layout = STATUS_LAYOUTS[machine]
    rows = notes.rows(NT_PRSTATUS)
    whole = rows[notes.byte_count[rows] >= layout.byte_count]
    if len(whole) < len(rows):
        gaps.append(
            Gap(
                "thread_notes_unusable",
                f"{len(rows) - len(whole)} threads have a status of an unknown size; "
                "their registers and stacks are unknown",
            )
        )
    if len(whole) == 0:
        gaps.append(Gap("threads_missing", "no thread can be read; stacks and TLS are unknown"))
    table = _table_of(data, machine, notes, whole)
    is_own = _runs_in_the_program(table)
    return table if is_own.all() else _table_of(data, machine, notes, whole[is_own])


def _table_of(data: Bytes, machine: str, notes: NoteTable, whole: npt.NDArray[np.intp]) -> ThreadTable:
    """``whole``: rows of the NT_PRSTATUS of the threads that the table is to have."""
    layout = STATUS_LAYOUTS[machine]
    offsets = notes.file_offset[whole].astype(np.intp)
    table = ThreadTable(layout, records_at(data, offsets, layout.record), notes)
    # A status that cannot be used, or is left out, still ends the notes of the thread before it.
    rows = notes.rows(NT_PRSTATUS)
    ends = np.append(rows, len(notes))
    table.note_rows[:, 0] = whole + 1
    table.note_rows[:, 1] = ends[np.searchsorted(ends, whole, side="right")]
    if machine == "x86_64":
        table.thread_pointer = table.register("fs_base")
        # No thread of glibc has 0 there; qemu-user 7.2 writes 0 because it keeps fs_base elsewhere.
        table.has_thread_pointer = table.thread_pointer != 0
    elif machine == "aarch64":
        _aarch64_thread_pointers(data, table, whole)
    else:
        _i386_thread_pointers(data, table, whole)
    return table


def _runs_in_the_program(table: ThreadTable) -> npt.NDArray[np.bool_]:
    """False for the kernel's own threads in the process: the workers of io_uring, since Linux 5.12 (create_io_thread).

    They never run the program's code, so their registers are 0; the thread pointer alone is a copy of that of the thread that
    they were made for, whose TLS and tcache they would seem to have a second time.
    """
    in_kernel: npt.NDArray[np.bool_] = table.has_thread_pointer & (table.register(table.layout.stack_pointer) == 0)
    in_kernel &= table.register(table.layout.program_counter) == 0
    if in_kernel.any():
        of_others = table.thread_pointer[table.has_thread_pointer & ~in_kernel]
        in_kernel &= np.isin(table.thread_pointer, of_others)
    return ~in_kernel


def threads_of(table: ThreadTable) -> tuple[Thread, ...]:
    """The rows of the table as objects."""
    columns = zip(
        table.lwp.tolist(),
        table.signal.tolist(),
        table.register(table.layout.stack_pointer).tolist(),
        table.register(table.layout.program_counter).tolist(),
        table.thread_pointer.tolist(),
        table.has_thread_pointer.tolist(),
        strict=True,
    )
    return tuple(
        Thread(index, lwp, signal or None, stack, counter, pointer if known else None, table)
        for index, (lwp, signal, stack, counter, pointer, known) in enumerate(columns)
    )


def _aarch64_thread_pointers(data: Bytes, table: ThreadTable, status_rows: npt.NDArray[np.intp]) -> None:
    """NT_ARM_TLS: tpidr_el0, since Linux 6.3 followed by tpidr2_el0."""
    rows, owner = _notes_of_threads(table, NT_ARM_TLS, 8, status_rows)
    offsets = table.notes.file_offset[rows].astype(np.intp)
    table.thread_pointer[owner] = records_at(data, offsets, np.dtype([("base", "<u8")]))["base"]
    table.has_thread_pointer[owner] = True


def _i386_thread_pointers(data: Bytes, table: ThreadTable, status_rows: npt.NDArray[np.intp]) -> None:
    """NT_386_TLS: struct user_desc {entry_number, base_addr, limit, flags}; gs selects one."""
    rows, owner = _notes_of_threads(table, NT_386_TLS, 16, status_rows)
    selected = (table.register("gs") >> np.uint64(3)).tolist()
    for thread, row in zip(owner.tolist(), rows.tolist(), strict=True):
        entries = words_in(table.notes.descriptor(data, row, 256), 4).tolist()
        for at in range(0, len(entries) - 3, 4):
            if entries[at] == selected[thread]:
                table.thread_pointer[thread] = entries[at + 1]
                table.has_thread_pointer[thread] = True


def _notes_of_threads(
    table: ThreadTable, kind: int, least_bytes: int, status_rows: npt.NDArray[np.intp]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Rows of the notes of a type that belong to a thread, and the thread's index of each."""
    rows = table.notes.rows(kind)
    rows = rows[table.notes.byte_count[rows] >= least_bytes]
    owner = np.searchsorted(status_rows, rows, side="right") - 1
    belongs = owner >= 0
    belongs[belongs] = rows[belongs] < table.note_rows[owner[belongs], 1]
    return rows[belongs], owner[belongs]
