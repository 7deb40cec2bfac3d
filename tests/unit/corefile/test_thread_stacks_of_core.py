"""Stacks of built cores: descriptors, the mapping where there are none, guards, signal frames, and how long many threads take."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import coreheap
from coreheap.accounting.claims import Claims
from coreheap.accounting.stacks import stack_claims
from coreheap.corefile.stacks import Stacks, StackSource, find_stacks, stack_residency
from coreheap.corefile.thread_storage import thread_storages
from coreheap.mappings import KINDS, MappingKind
from tests.conftest import calls_of
from tests.core_builder import CoreBuilder

PAGE = 4096
STACK = 0x10000
BLOCK = STACK + PAGE
CALLS_EACH = 400
"""Functions that may be called for a thread: 96 to 246 were."""
BASE = {"x86_64": 0x7F0000100000, "i386": 0xB7100000, "aarch64": 0x7F0000100000}
CODE = {"x86_64": 0x550000000000, "i386": 0x8048000, "aarch64": 0x550000000000}
INITIAL = {"x86_64": 0x7FFF00000000, "i386": 0xBF000000, "aarch64": 0x7FFF00000000}
# As on Debian's 2.41, from the end of the block: thread pointer, stackblock, and start_routine before that.
TO_POINTER = {"x86_64": 0x940, "i386": 0x4C0, "aarch64": 0x100}
TO_BLOCK = {"x86_64": 0x690, "i386": 0x260, "aarch64": 0x490 - 0x720}
TO_ROUTINE = {"x86_64": 88, "i386": 56, "aarch64": 88}
# ucontext up to uc_stack, and from uc_stack to the interrupted stack pointer.
FRAME = {"x86_64": (16, 144), "i386": (8, 40), "aarch64": (16, 416)}
MACHINES = ("x86_64", "i386", "aarch64")


class Process:
    """The initial stack, code, and one mapping with a block for each thread: guard, stack, descriptor."""

    def __init__(self, machine: str, threads: int) -> None:
        self.machine = machine
        self.word = 4 if machine == "i386" else 8
        self.start = BASE[machine]
        self.content = bytearray(threads * BLOCK)
        self.builder = CoreBuilder(self.word * 8, machine)
        self.initial = INITIAL[machine]
        self.builder.auxv[25] = self.initial + STACK - 64
        self.builder.add_segment(CODE[machine], bytes(PAGE), flags="r-x")
        self.builder.add_thread(4242, stack_pointer=self.initial + STACK - 512)

    def block(self, thread: int) -> int:
        return self.start + thread * BLOCK

    def pointer(self, thread: int) -> int:
        return self.block(thread) + BLOCK - TO_POINTER[self.machine]

    def put(self, address: int, *words: int) -> None:
        packed = struct.pack(f"<{len(words)}{'I' if self.word == 4 else 'Q'}", *words)
        self.content[address - self.start : address - self.start + len(packed)] = packed

    def describe(self, thread: int, routine: int = 0, guard: int = PAGE) -> None:
        place = self.pointer(thread) + TO_BLOCK[self.machine]
        self.put(place, self.block(thread), BLOCK, guard, guard)
        self.put(place - TO_ROUTINE[self.machine], CODE[self.machine] + routine, 0x1234)

    def run(self, thread: int, stack_pointer: int | None = None, *, with_pointer: bool = True) -> None:
        self.builder.add_thread(
            5000 + thread,
            stack_pointer=self.block(thread) + BLOCK - 0x2000 if stack_pointer is None else stack_pointer,
            thread_pointer=self.pointer(thread) if with_pointer else None,
        )

    def write(self, path: Path) -> Path:
        if self.content:
            self.builder.add_segment(self.start, bytes(self.content))
        self.builder.add_segment(self.initial, bytes(STACK))
        return self.builder.write(path / "core")

    def stacks(self, path: Path) -> Stacks:
        with coreheap.open(self.write(path)) as core:
            return find_stacks(core)


@pytest.mark.parametrize("with_pointer", [True, False])
@pytest.mark.parametrize("machine", MACHINES)
def test_descriptors_tell_guard_and_start(machine: str, with_pointer: bool, tmp_path: Path) -> None:
    process = Process(machine, 4)
    for thread, guard in enumerate((PAGE, PAGE, 0, 4 * PAGE)):
        process.describe(thread, routine=16 * (thread // 2), guard=guard)
        process.run(thread, with_pointer=with_pointer)
    stacks = process.stacks(tmp_path)
    assert stacks.initial == (process.initial, process.initial + STACK)
    assert stacks.by_thread[0].source is StackSource.INITIAL_STACK
    assert stacks.by_thread[0].used_bytes == 512
    for thread, guard in enumerate((PAGE, PAGE, 0, 4 * PAGE)):
        stack = stacks.by_thread[1 + thread]
        assert (stack.start, stack.end) == (process.block(thread) + guard, process.block(thread) + BLOCK)
        assert stack.guard_bytes == guard
        assert stack.source is StackSource.DESCRIPTOR
        assert stack.used_bytes == 0x2000
        assert stack.start_routine == CODE[machine] + 16 * (thread // 2)


@pytest.mark.parametrize("machine", MACHINES)
def test_an_argument_that_is_code_is_no_start_routine(machine: str, tmp_path: Path) -> None:
    process = Process(machine, 3)
    for thread in range(3):
        process.describe(thread, routine=32)
        process.put(
            process.pointer(thread) + TO_BLOCK[machine] - TO_ROUTINE[machine] + process.word, CODE[machine] + 640
        )
        process.run(thread)
    stacks = process.stacks(tmp_path)
    assert {stacks.by_thread[1 + thread].start_routine for thread in range(3)} == {CODE[machine] + 32}


@pytest.mark.parametrize("machine", MACHINES)
def test_without_code_no_start_routine_is_told(machine: str, tmp_path: Path) -> None:
    process = Process(machine, 2)
    for thread in range(2):
        process.describe(thread, routine=PAGE)  # behind the code
        process.run(thread)
    stacks = process.stacks(tmp_path)
    assert [stacks.by_thread[1 + thread].start_routine for thread in range(2)] == [None, None]


@pytest.mark.parametrize("machine", MACHINES)
def test_a_handler_on_a_signal_stack(machine: str, tmp_path: Path) -> None:
    process = Process(machine, 3)
    for thread in (0, 1):
        process.describe(thread)
    # The third block of the mapping is the signal stack; its mapping holds more than that.
    low = process.block(2) + 0x3000
    to_stack, to_pointer = FRAME[machine]
    interrupted = process.block(0) + BLOCK - 0x5000
    frame = low + 0x2000
    process.put(frame + to_stack, low, 0, 0x4000)
    process.put(frame + to_stack + to_pointer, interrupted)
    process.run(0, low + 0x1800)
    process.run(1)
    stacks = process.stacks(tmp_path)
    stack = stacks.by_thread[1]
    assert (stack.start, stack.end) == (process.block(0) + PAGE, process.block(0) + BLOCK)
    assert stack.signal_stack == (low, low + 0x4000)
    assert stack.used_bytes == 0x5000
    assert not stacks.elsewhere


@pytest.mark.parametrize("machine", MACHINES)
def test_on_another_stack_without_a_frame_depth_is_unknown(machine: str, tmp_path: Path) -> None:
    process = Process(machine, 3)
    for thread in (0, 1):
        process.describe(thread)
    process.run(0, process.block(2) + 0x1800)
    process.run(1)
    stacks = process.stacks(tmp_path)
    assert stacks.by_thread[1].used_bytes is None
    assert stacks.by_thread[1].signal_stack is None
    assert list(stacks.elsewhere) == [1]


def test_without_descriptors_the_mapping_is_the_stack(tmp_path: Path) -> None:
    process = Process("x86_64", 0)
    for thread, guard in enumerate((PAGE, 0, 64 << 20)):
        start = 0x7E0000000000 + thread * (1 << 32)
        if guard:
            process.builder.add_segment(start - guard, memory_bytes=guard, flags="---")
        process.builder.add_segment(start, bytes(STACK))
        process.builder.add_thread(6000 + thread, stack_pointer=start + STACK - 0x800)
    stacks = process.stacks(tmp_path)
    # A large reserve below is no guard: who knows what it is.
    guards: tuple[int | None, ...] = (PAGE, None, None)
    for thread, known in enumerate(guards):
        stack = stacks.by_thread[1 + thread]
        assert stack.source is StackSource.MAPPING
        assert stack.end - stack.start == STACK
        assert stack.guard_bytes == known
        assert stack.used_bytes == 0x800


def test_two_threads_in_one_mapping_without_descriptors(tmp_path: Path) -> None:
    process = Process("x86_64", 2)
    for thread in (0, 1):
        process.run(thread)
    with coreheap.open(process.write(tmp_path)) as core:
        stacks = find_stacks(core)
        assert list(stacks.by_thread) == [0]
        claims = Claims()
        stack_claims(core, claims, stacks)
        columns = claims.columns()
    rows = columns.kind == KINDS.index(MappingKind.THREAD_STACK)
    assert columns.start[rows].tolist() == [process.start]
    assert columns.thread[rows].tolist() == [-1]


def test_stacks_of_ended_threads_are_claimed(tmp_path: Path) -> None:
    process = Process("x86_64", 5)
    for thread in range(5):
        process.describe(thread)
    for thread in (0, 3):
        process.run(thread)
    with coreheap.open(process.write(tmp_path)) as core:
        claims = Claims()
        stack_claims(core, claims)
        columns = claims.columns()
    ended = columns.kind == KINDS.index(MappingKind.ENDED_STACK)
    assert sorted(columns.start[ended].tolist()) == [process.block(thread) for thread in (1, 2, 4)]
    guards = columns.kind == KINDS.index(MappingKind.STACK_GUARD)
    assert sorted(columns.start[guards].tolist()) == [process.block(thread) for thread in range(5)]


def test_residency_is_unknown_of_a_stack_that_is_not_saved_whole(tmp_path: Path) -> None:
    process = Process("x86_64", 2)
    for thread in (0, 1):
        process.describe(thread)
        process.run(thread)
    process.put(process.block(0) + 0x8000, 1)
    process.put(process.block(1) + 0x6000, 1)
    process.builder.add_segment(0x7E0000000000, bytes(PAGE), memory_bytes=STACK)
    process.builder.add_thread(7000, stack_pointer=0x7E0000000800)
    with coreheap.open(process.write(tmp_path)) as core:
        stacks = find_stacks(core)
        pages = stack_residency(core.memory, stacks, holes_are_exact=False)
    assert stacks.by_thread[3].end - stacks.by_thread[3].start == STACK
    assert 3 not in pages
    # The page that was written, and the descriptor's.
    assert (pages[1].resident_bytes, pages[1].peak_bytes) == (2 * PAGE, BLOCK - 0x8000)
    assert (pages[2].resident_bytes, pages[2].peak_bytes) == (2 * PAGE, BLOCK - 0x6000)


def test_many_threads_are_no_more_work_each(tmp_path: Path) -> None:
    process = Process("x86_64", 4000)
    for thread in range(4000):
        process.describe(thread)
        process.run(thread)
    with coreheap.open(process.write(tmp_path)) as core:

        def question() -> Stacks:
            stacks = find_stacks(core)
            stack_claims(core, Claims(), stacks)
            stack_residency(core.memory, stacks, holes_are_exact=False)
            return stacks

        stacks, calls = calls_of(question)
    assert len(stacks.descriptors) == 4000
    assert calls < 4000 * CALLS_EACH


def test_a_stack_at_the_top_of_the_address_space(tmp_path: Path) -> None:
    """No block ends behind the last address."""
    process = Process("x86_64", 1)
    process.describe(0)
    process.run(0, with_pointer=False)
    top = (1 << 64) - (1 << 16)
    process.builder.add_segment(top, bytes(1 << 16))
    process.builder.add_thread(6000, stack_pointer=(1 << 64) - 0x800)
    assert process.stacks(tmp_path).by_thread[1].source is StackSource.DESCRIPTOR


def test_a_mapping_in_thousands_of_parts_is_not_gone_through_by_each(tmp_path: Path) -> None:
    """8,000 files are said to be in one segment; each thread has its stack pointer between two of them."""
    builder = CoreBuilder()
    start, parts = 0x7F0000000000, 8000
    builder.add_segment(start, b"x" * 64, 2 * parts * PAGE)
    for number in range(parts):
        builder.add_file_mapping(start + 2 * number * PAGE, start + (2 * number + 1) * PAGE, 0, "/f")
    for number in range(2000):
        builder.add_thread(5000 + number, stack_pointer=start + (8 * number + 1) * PAGE + 64)
    with coreheap.open(builder.write(tmp_path / "core")) as core:
        stacks, calls = calls_of(lambda: find_stacks(core))
    assert len(stacks.by_thread) == 2000
    assert calls < 2000 * CALLS_EACH  # every thread through all parts: 16 million


def test_threads_without_descriptors_share_the_search(tmp_path: Path) -> None:
    """200 have one; 2,000 stack pointers lie in a mapping that has none, each on another page."""
    process = Process("x86_64", 200)
    for thread in range(200):
        process.describe(thread)
        process.run(thread, with_pointer=False)
    start, size = 0x7E0000000000, 48 << 20
    process.builder.add_segment(start, bytes(size))
    for number in range(2000):
        process.builder.add_thread(6000 + number, stack_pointer=start + PAGE * number)
    with coreheap.open(process.write(tmp_path)) as core:
        stacks, calls = calls_of(lambda: find_stacks(core))
    assert list(stacks.descriptors) == list(range(1, 201))
    assert calls < 2200 * CALLS_EACH


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("has_flag", [False, True])
def test_static_tls_by_both_kinds_of_dtv(machine: str, has_flag: bool, tmp_path: Path) -> None:
    """Before 2.25 a slot's second word is is_static, later what is to be freed."""
    process = Process(machine, 1)
    process.describe(0)
    pointer, word = process.pointer(0), process.word
    is_below = machine != "aarch64"
    near = [pointer - 0x300, pointer - 0x180] if is_below else [pointer + 0x10, pointer + 0x60]
    dynamic = process.block(0) + 0x4000
    dtv = process.block(0) + 0x3000
    unused = (1 << (8 * word)) - 1
    slots = [
        *((block, 1 if has_flag else 0) for block in near),
        (dynamic, 0 if has_flag else dynamic),
        (unused, 0),
    ]
    process.put(dtv - 2 * word, len(slots), 0, 7, 0, *(number for slot in slots for number in slot))
    process.put(pointer + word if is_below else pointer, dtv)
    process.run(0)
    with coreheap.open(process.write(tmp_path)) as core:
        storage = thread_storages(core)[1]
    assert storage.dtv == dtv
    if is_below:
        assert storage.start == min(near)
    else:
        assert storage.end >= max(near)
