"""Stacks told by their descriptors, in mappings that hold more than one stack and other memory as well."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.leaks import RootKind
from coreheap.references.ranges import RootRanges
from coreheap.references.roots import find_roots
from tests.core_builder import CoreBuilder

PAGE = 4096
STACK = 0x10000
BASE = {"x86_64": 0x7F0000100000, "i386": 0xF7100000, "aarch64": 0x7F0000100000}
FIRST_STACK = {"x86_64": 0x7FFF00000000, "i386": 0xFF000000, "aarch64": 0x7FFF00000000}
# From the end of the stack to the thread pointer, and from there to stackblock: as on Debian's 2.41, but for roundness.
TO_POINTER = {"x86_64": 0x940, "i386": 0x4C0, "aarch64": 0x900}
TO_BLOCK = {"x86_64": 0x690, "i386": 0x360, "aarch64": -0x80}
NOTHING = np.zeros(0, np.uint64)


class Memory:
    """One mapping: pages of the program's own, then for each thread a stack, with a page of the program's behind each."""

    def __init__(self, machine: str, threads: int) -> None:
        self.machine = machine
        self.word = 4 if machine == "i386" else 8
        self.start = BASE[machine]
        self.content = bytearray(PAGE + threads * (STACK + PAGE))

    def block(self, thread: int) -> int:
        return self.start + PAGE + thread * (STACK + PAGE)

    def pointer(self, thread: int) -> int:
        return self.block(thread) + STACK - TO_POINTER[self.machine]

    def put(self, address: int, *words: int) -> None:
        packed = struct.pack(f"<{len(words)}{'I' if self.word == 4 else 'Q'}", *words)
        at = address - self.start
        self.content[at : at + len(packed)] = packed

    def describe(self, thread: int, start: int | None = None, size: int = STACK) -> None:
        place = self.pointer(thread) + TO_BLOCK[self.machine]
        self.put(place, self.block(thread) if start is None else start, size, PAGE)

    def roots(self, path: Path, running: dict[int, int]) -> RootRanges:
        """``running``: the stack pointers by thread."""
        builder = CoreBuilder(32 if self.word == 4 else 64, self.machine)
        first = FIRST_STACK[self.machine]
        builder.add_segment(self.start, bytes(self.content))
        builder.add_segment(first, bytes(STACK))
        builder.add_thread(100, stack_pointer=first + STACK - 256)
        for thread, stack_pointer in running.items():
            builder.add_thread(101 + thread, stack_pointer=stack_pointer, thread_pointer=self.pointer(thread))
        with coreheap.open(builder.write(path / "core")) as core:
            return find_roots(core, (NOTHING, NOTHING), (NOTHING, NOTHING)).ranges


@pytest.fixture(params=["x86_64", "i386", "aarch64"])
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param, 4)


def test_stacks_side_by_side(memory: Memory, tmp_path: Path) -> None:
    for thread in range(4):
        memory.describe(thread)
    pointers = {thread: memory.block(thread) + STACK - 0x2000 for thread in (0, 2)}
    roots = memory.roots(tmp_path, pointers)
    for thread in range(4):
        block = memory.block(thread)
        if thread in pointers:
            assert roots.at(block + 64) is None
            assert roots.at(block + STACK - 0x1800) == (RootKind.STACK, 1 + thread // 2)
            assert roots.at(memory.pointer(thread)) == (RootKind.TLS, 1 + thread // 2)
        else:
            assert roots.at(block) == roots.at(memory.pointer(thread)) == (RootKind.OLD_STACK, None)
        # What lies between them is the program's own.
        assert roots.at(block - 1) == roots.at(block + STACK) == (RootKind.ANONYMOUS, None)


def test_a_thread_on_another_stack(memory: Memory, tmp_path: Path) -> None:
    for thread in (0, 1):
        memory.describe(thread)
    roots = memory.roots(tmp_path, {0: memory.block(2) + 0x800, 1: memory.block(1) + 0x8000})
    assert roots.at(memory.block(0)) == (RootKind.STACK, 1)
    assert roots.at(memory.block(2) + 0x900) == (RootKind.STACK, 1)


@pytest.mark.parametrize(
    ("start", "size"),
    [(0, 0), (1, -1), (0, STACK), (None, 1 << 31), (None, PAGE), (None, STACK + 3 * PAGE), (-(64 << 20), STACK)],
)
def test_descriptors_that_lie_kill_nothing(memory: Memory, tmp_path: Path, start: int | None, size: int) -> None:
    """With nonsense in the descriptor the mapping counts as before: words of a stack are weak, none is left out."""
    limit = (1 << 8 * memory.word) - 1
    for thread in range(4):
        where = start if start is None or start >= 0 else memory.block(thread) + start
        memory.describe(thread, where, size & limit)
    roots = memory.roots(tmp_path, {0: memory.block(0) + 0x8000, 1: memory.block(1) + 0x8000})
    for address in range(memory.start, memory.start + len(memory.content), 64):
        assert roots.at(address) is not None


def test_a_stack_that_is_not_of_whole_pages_is_not_believed_to_be_dead_below(memory: Memory, tmp_path: Path) -> None:
    for thread in (0, 1):
        memory.describe(thread, memory.block(thread) + 0x1010, STACK - 0x1010)
    roots = memory.roots(tmp_path, {0: memory.block(0) + 0x8000, 1: memory.block(1) + 0x8000})
    assert roots.at(memory.block(0) + 0x2000) == (RootKind.OLD_STACK, 1)
    assert roots.at(memory.block(0) + 0x8000) == (RootKind.STACK, 1)
