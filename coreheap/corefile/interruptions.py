"""Where signal handlers interrupted a thread, by the registers that the kernel saved on its stack.

Knows: struct sigcontext of each machine. Does not know: which handler it was, or unwinding: this needs no file, and finds
what a core without libc's code tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.corefile.core import Core
from coreheap.corefile.elf import Words
from coreheap.corefile.threads import Thread
from coreheap.errors import MemoryFault

SEARCH_BYTES = 1 << 16
"""So far above a stack pointer frames are looked for; handlers are shallow."""
MOST_FRAMES = 8
"""Frames that are told of one thread; stack words look like many things."""
USER_MODE = 3
"""The lowest bits of cs and ss of a program (x86)."""
RESERVED_FLAGS, ALWAYS_SET = 0xFFC0802A, 2
"""Bits of eflags that no program changes (x86): all 0 but for one (bit 1)."""
FIRST_RECORD_OF_AARCH64 = 0x210 << 32 | 0x46508001
"""FPSIMD_MAGIC and its size: the record that the kernel writes first behind the registers (arch/arm64/include/uapi)."""


@dataclass(frozen=True, slots=True)
class Interruption:
    """Registers of the moment that a signal came, by name as in ``Thread.registers``; only those that are asked for here.

    ``words`` is all that the kernel saved of them, without names.
    """

    stack_pointer: int
    program_counter: int
    registers: dict[str, int]
    words: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class _Context:
    """Places in struct sigcontext as words from its first one, on x86 r8 or gs, on aarch64 fault_address."""

    stack_pointer: int
    program_counter: int
    word_count: int
    registers: dict[str, int]


# arch/*/include/uapi/asm/sigcontext.h
_CONTEXTS: Final = {
    "x86_64": _Context(15, 16, 19, {"rdi": 8, "rax": 13, "rcx": 14, "flags": 17, "selectors": 18}),
    "i386": _Context(7, 14, 19, {"selectors": 15, "flags": 16, "esp_again": 17, "ss": 18}),
    "aarch64": _Context(32, 33, 37, {"first_record": 36}),
}


def interruptions(core: Core, thread: Thread) -> tuple[Interruption, ...]:
    """What may be signal frames above a thread's stack pointer, the innermost first; at most MOST_FRAMES.

    Words that look like one and are not are rare, but possible: who asks should only be more careful for it.
    """
    context = _CONTEXTS.get(core.machine)
    memory, word = core.memory, core.word_bytes
    region = memory.region_index(thread.stack_pointer)
    if context is None or region is None:
        return ()
    low = thread.stack_pointer - thread.stack_pointer % word
    high = min(int(memory.region_end[region]), low + SEARCH_BYTES)
    try:
        words = memory.read_words(low, (high - low) // word).astype(np.uint64)
    except MemoryFault:
        return ()
    count = len(words) - context.word_count + 1
    if count <= 0:
        return ()
    fits = _fits(core.machine, context, words, count)
    found = []
    for row in np.flatnonzero(fits)[:MOST_FRAMES].tolist():
        pointer, counter = (int(words[row + place]) for place in (context.stack_pointer, context.program_counter))
        registers = {name: int(words[row + place]) for name, place in context.registers.items()}
        saved = tuple(words[row : row + context.word_count].tolist())
        found.append(Interruption(pointer, counter, registers, saved))
    return tuple(found)


def _fits(machine: str, context: _Context, words: Words, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which words may begin a saved set of registers."""

    def column(name: str) -> Words:
        first = context.registers[name]
        return words[first : first + count]

    if machine == "aarch64":
        fits: np.ndarray[tuple[int], np.dtype[np.bool_]] = column("first_record") == np.uint64(FIRST_RECORD_OF_AARCH64)
        return fits
    in_user_mode = column("selectors") & np.uint64(USER_MODE) == np.uint64(USER_MODE)
    fits = in_user_mode & (column("flags") & np.uint64(RESERVED_FLAGS) == np.uint64(ALWAYS_SET))
    fits &= column("flags") >> np.uint64(32) == 0
    if machine == "i386":
        fits &= words[context.stack_pointer : context.stack_pointer + count] == column("esp_again")
        fits &= column("ss") & np.uint64(USER_MODE) == np.uint64(USER_MODE)
    else:
        # cs, gs, fs and ss, 16 bits each: gs and fs are 0 in 64-bit programs, cs is the kernel's one selector for them.
        fits &= column("selectors") & np.uint64(0x0000FFFFFFFFFFFF) == np.uint64(0x33)
    return fits
