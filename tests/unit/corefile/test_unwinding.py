"""Backtraces of built processes, whose code, call frame information and stacks are written here byte by byte."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import coreheap
from coreheap.corefile.unwinding import Step, unwind
from coreheap.crash import FrameSource
from tests.core_builder import CoreBuilder

MODULE, STACK, STACK_BYTES = 0x40_0000, 0x70_0000, 0x4000
TEXT, TABLE, ENTRIES = 0x800, 0x1400, 0x1600
FUNCTION_BYTES = 0x100
REGISTERS, CFI = FrameSource.REGISTERS, FrameSource.CALL_FRAME_INFORMATION
FRAME_POINTER, SCAN = FrameSource.FRAME_POINTER, FrameSource.STACK_SCAN
RETURN_ADDRESS = FrameSource.RETURN_ADDRESS
CALL = {"x86_64": b"\xe8\x10\x00\x00\x00", "i386": b"\xe8\x10\x00\x00\x00", "aarch64": b"\x04\x00\x00\x94"}
# Register numbers of the psABIs: stack pointer, frame pointer, return address.
NUMBERS = {"x86_64": (7, 6, 16), "i386": (4, 5, 8), "aarch64": (31, 29, 30)}
NAMES = {"x86_64": ("rsp", "rbp", "rip"), "i386": ("esp", "ebp", "eip"), "aarch64": ("sp", "x29", "pc")}
MACHINES = tuple(NUMBERS)


def function(number: int) -> int:
    """Where the code of a function begins in the process."""
    return MODULE + TEXT + number * FUNCTION_BYTES


def behind_call(number: int) -> int:
    """The return address of the call that every function has."""
    return function(number) + 0x40


@dataclass
class Process:
    """A module with functions of FUNCTION_BYTES each, a stack, one thread."""

    machine: str
    programs: dict[int, bytes] = field(default_factory=dict)
    """By number of the function: the CFA program of its FDE; functions that are not in it have no FDE."""
    augmentation: bytes = b"zR"
    stack: dict[int, int] = field(default_factory=dict)
    registers: dict[str, int] = field(default_factory=dict)
    code: dict[int, bytes] = field(default_factory=dict)
    change: Callable[[bytearray], None] = lambda image: None

    @property
    def word(self) -> int:
        return 4 if self.machine == "i386" else 8

    def entries(self) -> tuple[bytes, dict[int, int]]:
        """.eh_frame and where in it each function's FDE is."""
        sp, _, ra = NUMBERS[self.machine]
        on_arrival = bytes((0x0C, sp, 0)) if self.machine == "aarch64" else bytes((0x0C, sp, self.word, 0x80 | ra, 1))
        data_factor = {4: 0x7C, 8: 0x78}[self.word]
        body = bytes(4) + b"\x01" + self.augmentation + b"\0" + bytes((1, data_factor, ra, 1, 0x1B)) + on_arrival
        content = struct.pack("<I", len(body)) + body
        places = {}
        for number, program in self.programs.items():
            places[number] = len(content)
            start = function(number) - (MODULE + ENTRIES + len(content) + 8)
            rest = struct.pack("<Iii", len(content) + 4, start, FUNCTION_BYTES) + b"\0" + program
            content += struct.pack("<I", len(rest)) + rest
        return content + bytes(4), places

    def image(self) -> bytes:
        is_64 = self.word == 8
        machine = {"x86_64": 62, "i386": 3, "aarch64": 183}[self.machine]
        image = bytearray(0x2000)
        head = b"\x7fELF" + bytes((2 if is_64 else 1, 1, 1)) + bytes(9)
        entry = "<2I6Q" if is_64 else "<8I"
        size, row = (64, 56) if is_64 else (52, 32)
        word = "Q" if is_64 else "I"
        head += struct.pack(f"<HHI3{word}I6H", 3, machine, 1, 0, size, 0, 0, size, row, 2, 0, 0, 0)

        def header(kind: int, flags: int, at: int, length: int) -> bytes:
            if is_64:
                return struct.pack(entry, kind, flags, at, at, at, length, length, 4096 if kind == 1 else 4)
            return struct.pack(entry, kind, at, at, at, length, length, flags, 4096 if kind == 1 else 4)

        content, places = self.entries()
        rows = sorted((function(number), MODULE + ENTRIES + at) for number, at in places.items())
        table = struct.pack("<4BiI", 1, 0x1B, 0x03, 0x3B, ENTRIES - TABLE - 4, len(rows))
        table += b"".join(struct.pack("<ii", a - MODULE - TABLE, b - MODULE - TABLE) for a, b in rows)
        image[: size + 2 * row] = head + header(1, 5, 0, len(image)) + header(0x6474E550, 4, TABLE, len(table))
        image[TABLE : TABLE + len(table)] = table
        image[ENTRIES : ENTRIES + len(content)] = content
        for number in range(10):
            at = TEXT + number * FUNCTION_BYTES + 0x40
            image[at - len(CALL[self.machine]) : at] = CALL[self.machine]
        for at, code in self.code.items():
            image[at - MODULE : at - MODULE + len(code)] = code
        self.change(image)
        return bytes(image)

    def write(self, path: Path, *, with_code: bool = True) -> Path:
        builder = CoreBuilder(8 * self.word, self.machine)
        stack = bytearray(STACK_BYTES)
        for at, value in self.stack.items():
            stack[at : at + self.word] = value.to_bytes(self.word, "little")
        image = self.image()
        builder.add_segment(MODULE, image if with_code else None, len(image), "r-x")
        builder.add_segment(STACK, bytes(stack))
        builder.add_file_mapping(MODULE, MODULE + len(image), 0, "/opt/program")
        builder.add_thread(registers=self.registers)
        return builder.write(path)


def trace(process: Process, folder: Path, **options: bool) -> tuple[tuple[Step, ...], str]:
    with coreheap.open(process.write(folder / "core", **options), sysroot=folder) as core:
        return unwind(core, core.threads[0])


def shown(steps: Sequence[Step]) -> list[tuple[int, FrameSource, bool]]:
    return [(step.program_counter, step.source, step.is_certain) for step in steps]


def thread(machine: str, counter: int, stack_pointer: int = STACK, frame_pointer: int = 0) -> dict[str, int]:
    sp, fp, pc = NAMES[machine]
    return {sp: stack_pointer, fp: frame_pointer, pc: counter}


def plain(machine: str) -> Process:
    """Three functions with frames of 64 bytes; the outermost says that it has no caller."""
    _, fp, ra = NUMBERS[machine]
    word = 4 if machine == "i386" else 8
    at_entry = b"\x41\x0e\x40"  # advance 1; def_cfa_offset 64
    if machine == "aarch64":
        at_entry += bytes((0x80 | fp, 2, 0x80 | ra, 1))
    process = Process(machine, {0: at_entry, 1: at_entry, 2: at_entry + bytes((0x07, ra))})
    process.registers = thread(machine, function(0) + 0x20)
    process.stack = {64 - word: behind_call(1), 128 - word: behind_call(2), 192 - word: behind_call(9)}
    return process


@pytest.mark.parametrize("machine", MACHINES)
def test_frames_follow_call_frame_information_to_the_outermost(tmp_path: Path, machine: str) -> None:
    steps, end = trace(plain(machine), tmp_path)
    assert shown(steps) == [
        (function(0) + 0x20, REGISTERS, True),
        (behind_call(1), CFI, True),
        (behind_call(2), CFI, True),
    ]
    assert end == "complete"
    assert [step.stack_pointer for step in steps] == [STACK, STACK + 64, STACK + 128]


@pytest.mark.parametrize("machine", ["x86_64", "i386"])
def test_the_row_that_counts_is_the_one_of_the_program_counter(tmp_path: Path, machine: str) -> None:
    """At the first instruction the return address is on top of the stack still."""
    process = plain(machine)
    process.registers = thread(machine, function(0))
    process.stack = {0: behind_call(1), 64: behind_call(9)}
    steps, _ = trace(process, tmp_path)
    assert shown(steps)[1] == (behind_call(1), CFI, True)
    assert steps[1].stack_pointer == STACK + process.word


@pytest.mark.parametrize("machine", MACHINES)
def test_a_register_that_a_frame_saved_leads_on(tmp_path: Path, machine: str) -> None:
    _, fp, ra = NUMBERS[machine]
    process = plain(machine)
    word = process.word
    saved = bytes((0x0E, 64, 0x80 | fp, 2, 0x80 | ra, 1))
    by_pointer = bytes((0x0C, fp, 2 * word, 0x80 | ra, 1))
    process.programs = {0: saved, 1: by_pointer, 2: bytes((0x07, ra))}
    process.stack = {64 - 2 * word: STACK + 0x800, 64 - word: behind_call(1), 0x800 + word: behind_call(2)}
    steps, end = trace(process, tmp_path)
    assert [step.program_counter for step in steps[1:]] == [behind_call(1), behind_call(2)]
    assert steps[2].stack_pointer == STACK + 0x800 + 2 * word
    assert steps[2].is_certain
    assert end == "complete"


def test_signature_of_pointer_authentication_is_taken_off(tmp_path: Path) -> None:
    process = plain("aarch64")
    process.stack[64 - 8] |= 0x002A << 48
    assert shown(trace(process, tmp_path)[0])[1] == (behind_call(1), CFI, True)


def test_expressions_of_linkers_and_signal_frames_are_evaluated(tmp_path: Path) -> None:
    """The CFA as a PLT's entries give it: rsp + 8 + ((rip & 15) >= 11) * 8."""
    expression = bytes((0x77, 8, 0x80, 0, 0x3F, 0x1A, 0x3B, 0x2A, 0x33, 0x24, 0x22))
    process = plain("x86_64")
    process.programs[0] = bytes((0x0F, len(expression))) + expression
    for counter, place in ((function(0), 0), (function(0) + 11, 8)):
        process.registers = thread("x86_64", counter)
        process.stack = {place: behind_call(2)}
        steps, _ = trace(process, tmp_path)
        assert shown(steps)[1] == (behind_call(2), CFI, True)
        assert steps[1].stack_pointer == STACK + place + 8


@pytest.mark.parametrize("machine", MACHINES)
def test_frame_pointers_lead_where_there_is_no_information(tmp_path: Path, machine: str) -> None:
    process = plain(machine)
    process.programs = {}
    word = process.word
    process.registers = thread(machine, function(0) + 0x20, frame_pointer=STACK + 0x100)
    process.stack = {
        0x100: STACK + 0x200,
        0x100 + word: behind_call(1),
        0x200: 0,
        0x200 + word: behind_call(2),
        0x300: behind_call(3),
    }
    steps, end = trace(process, tmp_path)
    assert shown(steps) == [
        (function(0) + 0x20, REGISTERS, True),
        (behind_call(1), FRAME_POINTER, False),
        (behind_call(2), FRAME_POINTER, False),
    ]
    assert end == "frame_pointers_end"


@pytest.mark.parametrize("machine", MACHINES)
def test_what_follows_a_guess_is_never_certain(tmp_path: Path, machine: str) -> None:
    """The innermost function has no information, the next ones do."""
    process = plain(machine)
    del process.programs[0]
    process.registers = thread(machine, function(0) + 0x20, frame_pointer=1)
    # Code, but not behind a call: no return address.
    process.stack[0x10] = function(3) + 8
    steps, end = trace(process, tmp_path)
    assert shown(steps) == [
        (function(0) + 0x20, REGISTERS, True),
        (behind_call(1), SCAN, False),
        (behind_call(2), CFI, False),
    ]
    assert end == "complete"


@pytest.mark.parametrize("machine", MACHINES)
def test_a_call_to_nowhere_is_followed_back(tmp_path: Path, machine: str) -> None:
    process = plain(machine)
    process.registers = thread(machine, 0)
    if machine == "aarch64":
        process.registers["x30"] = behind_call(1)
    else:
        process.stack = {0: behind_call(1), 64: behind_call(2)}
    steps, _ = trace(process, tmp_path)
    assert shown(steps)[:2] == [(0, REGISTERS, True), (behind_call(1), RETURN_ADDRESS, False)]


SIGNAL_FRAMES = {
    # Code that a handler returns to; from the stack pointer to the program counter, and to the stack pointer, that it saved.
    "x86_64": (bytes.fromhex("48c7c00f0000000f05"), 168, 160),
    "aarch64": (bytes.fromhex("681180d2010000d4"), 128 + 440, 128 + 432),
}


@pytest.mark.parametrize("machine", SIGNAL_FRAMES)
def test_a_signal_frame_of_the_kernel_is_passed_with_certainty(tmp_path: Path, machine: str) -> None:
    """A handler on a stack of its own, above the interrupted one: the stack pointer goes down there."""
    code, counter_at, pointer_at = SIGNAL_FRAMES[machine]
    process = plain(machine)
    del process.programs[2]
    trampoline = function(8)
    process.code = {trampoline: code}
    process.registers = thread(machine, function(0) + 0x20, STACK + 0x2000)
    frame = 0x2000 + 64
    process.stack = {
        frame - 8: trampoline,
        frame + counter_at: function(1) + 0x30,
        frame + pointer_at: STACK + 0x400,
        0x440 - 8: behind_call(9),
    }
    steps, _ = trace(process, tmp_path)
    assert [(step.program_counter, step.is_certain, step.is_exact) for step in steps[:4]] == [
        (function(0) + 0x20, True, True),
        (trampoline, True, False),
        (function(1) + 0x30, True, True),
        (behind_call(9), True, False),
    ]
    assert steps[2].stack_pointer == STACK + 0x400


@pytest.mark.parametrize("machine", SIGNAL_FRAMES)
def test_a_handler_without_unwind_information_returns_to_the_signal_frame(tmp_path: Path, machine: str) -> None:
    """What a handler returns to lies behind no call."""
    code, counter_at, pointer_at = SIGNAL_FRAMES[machine]
    process = plain(machine)
    del process.programs[2]
    del process.programs[0]
    trampoline = function(8)
    process.code = {trampoline: code}
    process.registers = thread(machine, function(0) + 0x20, STACK + 0x2000, frame_pointer=1)
    frame = 0x2000 + 64
    process.stack = {
        frame - 8: trampoline,
        frame + 32: behind_call(9),
        frame + counter_at: function(1) + 0x30,
        frame + pointer_at: STACK + 0x400,
        0x440 - 8: behind_call(9),
    }
    steps, _ = trace(process, tmp_path)
    assert [(step.program_counter, step.source) for step in steps[:3]] == [
        (function(0) + 0x20, REGISTERS),
        (trampoline, SCAN),
        (function(1) + 0x30, REGISTERS),
    ]
    assert not any(step.is_certain for step in steps[1:])


def test_old_signal_frames_of_i386(tmp_path: Path) -> None:
    """Handlers without SA_SIGINFO: struct sigcontext lies behind the signal's number, eip at 56, esp at 28."""
    process = plain("i386")
    trampoline = function(8)
    process.code = {trampoline: bytes.fromhex("58b877000000cd80")}
    process.stack = {
        64 - 4: trampoline,
        64 + 4 + 56: function(1) + 0x30,
        64 + 4 + 28: STACK + 0x400,
        0x440 - 4: behind_call(2),
    }
    steps, end = trace(process, tmp_path)
    assert [step.program_counter for step in steps[1:]] == [trampoline, function(1) + 0x30, behind_call(2)]
    assert all(step.is_certain for step in steps)
    assert end == "complete"


@pytest.mark.parametrize("machine", MACHINES)
def test_traces_end_when_the_stack_does_not_grow(tmp_path: Path, machine: str) -> None:
    sp, _, ra = NUMBERS[machine]
    process = plain(machine)
    # Its caller is itself, with the same stack pointer.
    process.programs = {0: bytes((0x0C, sp, 0, 0x11, ra, 0x7F))}
    process.stack = {process.word: behind_call(0), 0: behind_call(0)}
    steps, end = trace(process, tmp_path)
    assert len(steps) <= 3
    assert end == "stack_does_not_grow"


@pytest.mark.parametrize("machine", MACHINES)
def test_endless_recursion_has_a_limit(tmp_path: Path, machine: str) -> None:
    process = plain(machine)
    process.stack = {at + 64 - process.word: behind_call(1) for at in range(0, STACK_BYTES, 64)}
    steps, end = trace(process, tmp_path)
    assert len(steps) == 128
    assert end == "limit"


def test_an_overwritten_return_address_ends_the_trace(tmp_path: Path) -> None:
    process = plain("x86_64")
    process.stack[64 - 8] = 0x4141414141414141
    steps, end = trace(process, tmp_path)
    assert len(steps) == 1
    assert end == "return_address_not_code"


def damaged(where: int, value: bytes) -> Callable[[bytearray], None]:
    def change(image: bytearray) -> None:
        image[where : where + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("where", "value", "end"),
    [
        (ENTRIES, b"\xff\xff\xff\xff", "damaged_unwind_information"),  # the CIE's length
        (ENTRIES + 8, b"\x09", "damaged_unwind_information"),  # its version
        (ENTRIES + 10, b"Q", "unknown_unwind_information"),  # an augmentation that nobody knows
        (TABLE + 3, b"\x00", "no_unwind_information"),  # a table of another form
        (TABLE + 8, b"\x00\x00\x00\x00", "no_unwind_information"),
    ],
)
def test_damaged_information_ends_the_trace_and_says_so(tmp_path: Path, where: int, value: bytes, end: str) -> None:
    process = plain("x86_64")
    process.stack = {}
    process.change = damaged(where, value)
    steps, reason = trace(process, tmp_path)
    assert len(steps) == 1
    assert reason == end


def test_an_entry_that_is_its_own_cie_is_refused(tmp_path: Path) -> None:
    process = plain("x86_64")
    _, places = process.entries()
    process.change = damaged(ENTRIES + places[0] + 4, b"\x04\x00\x00\x00")
    steps, end = trace(process, tmp_path)
    assert (len(steps), end) == (1, "damaged_unwind_information")


def test_a_table_that_claims_too_many_rows_is_searched_in_bounds(tmp_path: Path) -> None:
    process = plain("x86_64")
    process.change = damaged(TABLE + 8, b"\xff\xff\xff\xff")
    steps, _ = trace(process, tmp_path)
    assert len(steps) <= 128


@pytest.mark.parametrize("machine", MACHINES)
def test_no_change_of_bytes_does_more_than_end_a_trace(tmp_path: Path, machine: str) -> None:
    numbers = random.Random(machine)
    for _ in range(150):
        process = plain(machine)
        size = len(process.entries()[0])

        def change(image: bytearray, size: int = size) -> None:
            for _ in range(numbers.choice((1, 1, 2, 5))):
                place = numbers.choice((ENTRIES + numbers.randrange(size), TABLE + numbers.randrange(36)))
                image[place] = numbers.choice(
                    (numbers.randrange(256), 0, 0xFF, image[place] ^ 1 << numbers.randrange(8))
                )

        process.change = change
        steps, end = trace(process, tmp_path)
        assert 1 <= len(steps) <= 128
        assert end


@pytest.mark.parametrize("machine", MACHINES)
def test_without_code_few_words_are_taken_for_frames(tmp_path: Path, machine: str) -> None:
    process = plain(machine)
    process.registers = thread(machine, function(0) + 0x20, frame_pointer=1)
    process.stack = {at: behind_call(1) for at in range(0, STACK_BYTES, 64)}
    steps, end = trace(process, tmp_path, with_code=False)
    assert 1 < len(steps) <= 20
    assert not any(step.is_certain for step in steps[1:])
    assert end == "no_unwind_information"
