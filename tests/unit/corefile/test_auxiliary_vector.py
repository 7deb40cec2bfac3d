"""NT_AUXV that begins late, as qemu-user writes it of a program that was run through ld.so by name.

ld.so moves the vector down on the stack by the number of its own arguments (1 to 7 words seen with glibc 2.31-2.44), and
qemu-user copies it from where the kernel would have put it.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from coreheap.corefile import Core, open_core
from tests.core_builder import CoreBuilder

AT_PHDR, AT_PHENT, AT_PHNUM, AT_PAGESZ, AT_BASE, AT_FLAGS, AT_ENTRY, AT_RANDOM = 3, 4, 5, 6, 7, 8, 9, 25
STACK, RANDOM = 0x7FFF_0000, 0x7FFF_0700
VECTOR = {
    AT_PHDR: 0x55_0285_0040,
    AT_PHENT: 56,
    AT_PHNUM: 10,
    AT_PAGESZ: 65536,
    AT_BASE: 0,
    AT_FLAGS: 0,
    AT_ENTRY: 0x55_0285_1834,
    16: 0xECFF_FFFB,
    AT_RANDOM: RANDOM,
    23: 0,
}
WORDS = [word for pair in VECTOR.items() for word in pair] + [0, 0]


def opened(folder: Path, skipped: int, stack: bytes | None) -> Core:
    """A core whose NT_AUXV lacks the vector's first words; what stands behind the vector follows instead."""
    builder = CoreBuilder(64, "aarch64").add_thread()
    builder.with_auxv = False
    words = [*WORDS[skipped:], *WORDS[len(WORDS) - skipped :]]
    builder.add_note(b"CORE", 6, struct.pack(f"<{len(words)}Q", *words))
    builder.add_segment(STACK, stack, 4096)
    return open_core(builder.write(folder / "core"))


def stack_with(vector: list[int]) -> bytes:
    """The end of an initial stack: argc, one argument, one variable, the vector, AT_RANDOM's bytes, strings."""
    words = [1, STACK + 0x800, 0, STACK + 0x810, 0, *vector]
    stack = bytearray(4096)
    stack[0x200 : 0x200 + 8 * len(words)] = struct.pack(f"<{len(words)}Q", *words)
    stack[0x800:0x808] = b"program\0"
    stack[0x810:0x824] = b"MALLOC_ARENA_MAX=2\0\0"
    return bytes(stack)


@pytest.mark.parametrize("skipped", range(8))
def test_a_vector_that_begins_late_is_completed_from_the_stack(tmp_path: Path, skipped: int) -> None:
    with opened(tmp_path, skipped, stack_with(WORDS)) as core:
        assert core.auxv == VECTOR
        assert core.page_bytes == core.memory.page_bytes == 65536
        assert not {"auxiliary_vector_cut", "page_size_unknown"} & {gap.cause for gap in core.gaps}
        assert core.initial_stack is not None
        assert core.initial_stack.arguments == ("program",)
        assert core.initial_stack.environment == {"MALLOC_ARENA_MAX": "2"}


@pytest.mark.parametrize("skipped", range(1, 7))
def test_the_page_size_is_known_without_the_stack(tmp_path: Path, skipped: int) -> None:
    with opened(tmp_path, skipped, None) as core:
        assert core.page_bytes == 65536
        known = dict(list(VECTOR.items())[(skipped + 1) // 2 :])
        assert core.auxv == known
        causes = {gap.cause for gap in core.gaps}
        assert "page_size_unknown" not in causes
        assert ("auxiliary_vector_cut" in causes) is (AT_PHDR not in known)


def test_a_stack_that_contradicts_the_note_is_not_believed(tmp_path: Path) -> None:
    other = dict(VECTOR)
    other[AT_ENTRY] += 16
    words = [word for pair in other.items() for word in pair] + [0, 0]
    with opened(tmp_path, 3, stack_with(words)) as core:
        assert AT_PHDR not in core.auxv
        assert core.auxv[AT_ENTRY] == VECTOR[AT_ENTRY]
        assert "auxiliary_vector_cut" in {gap.cause for gap in core.gaps}


def test_a_whole_vector_is_taken_as_it_is(tmp_path: Path) -> None:
    """When ld.so was run by name it rewrites the vector on the stack; the kernel's own copy in NT_AUXV stays as it was."""
    other = dict(VECTOR)
    other[AT_PHDR] += 0x1000
    words = [word for pair in other.items() for word in pair] + [0, 0]
    with opened(tmp_path, 0, stack_with(words)) as core:
        assert core.auxv == VECTOR
