"""What unwinding takes as given of each machine: numbers of registers, the kernel's signal frames, the bytes of calls.

Data, from the psABIs and the kernel's headers. Does not know: stacks, or call frame information.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Machine:
    """Registers of one machine by their DWARF numbers (its psABI), and which of them a call preserves."""

    numbers: dict[str, int]
    stack_pointer: int
    frame_pointer: int
    program_counter: int
    """Where rules keep the return address; on aarch64 that is x30."""
    preserved: frozenset[int]


_X86_64_NAMES: Final = "rax rdx rcx rbx rsi rdi rbp rsp r8 r9 r10 r11 r12 r13 r14 r15 rip"
_I386_NAMES: Final = "eax ecx edx ebx esp ebp esi edi eip"
MACHINES: Final = {
    "x86_64": Machine(
        {name: number for number, name in enumerate(_X86_64_NAMES.split())}, 7, 6, 16, frozenset((3, 6, 12, 13, 14, 15))
    ),
    "i386": Machine(
        {name: number for number, name in enumerate(_I386_NAMES.split())}, 4, 5, 8, frozenset((3, 5, 6, 7))
    ),
    "aarch64": Machine(
        {**{f"x{number}": number for number in range(31)}, "sp": 31}, 31, 29, 30, frozenset(range(19, 30))
    ),
}


@dataclass(frozen=True, slots=True)
class Trampoline:
    """Code that a signal handler returns to, and where the kernel's frame then has the interrupted registers.

    ``context``: from the stack pointer to ucontext; ``is_pointer``: there lies its address. ``registers``: (number, offset).
    ``signal_info``: from the stack pointer to siginfo_t, or to its address; None where the frame has none, then ``signal_number``
    and ``fault_address`` are where it has these.
    """

    code: bytes
    context: int
    is_pointer: bool
    registers: tuple[tuple[int, int], ...]
    program_counter: int
    signal_info: int | None
    signal_number: int = 0
    fault_address: int = 0


def _row(first: int, word: int, names: str, machine: str) -> tuple[tuple[int, int], ...]:
    numbers = MACHINES[machine].numbers
    return tuple(
        (numbers[name], first + row * word)
        for row, name in enumerate(names.split())
        if name in numbers and name != "rip"
    )


# arch/*/include/uapi/asm/{ucontext,sigcontext}.h; the code is that of rt_sigreturn (15, 173 and 139) and sigreturn (119).
_X86_64_CONTEXT: Final = _row(40, 8, "r8 r9 r10 r11 r12 r13 r14 r15 rdi rsi rbp rbx rdx rax rcx rsp", "x86_64")
_I386_CONTEXT: Final = "- - - - edi esi ebp esp ebx edx ecx eax"
TRAMPOLINES: Final[dict[str, tuple[Trampoline, ...]]] = {
    "x86_64": (Trampoline(bytes.fromhex("48c7c00f0000000f05"), 0, False, _X86_64_CONTEXT, 168, 304),),
    "i386": (
        Trampoline(bytes.fromhex("b8ad000000cd80"), 8, True, _row(20, 4, _I386_CONTEXT, "i386"), 76, 4),
        Trampoline(bytes.fromhex("58b877000000cd80"), 4, False, _row(0, 4, _I386_CONTEXT, "i386"), 56, None, 0, 88),
    ),
    "aarch64": (
        Trampoline(
            bytes.fromhex("681180d2010000d4"),
            128,
            False,
            (*((number, 184 + 8 * number) for number in range(31)), (31, 432)),
            440,
            0,
        ),
    ),
}


def is_indirect_call(code: bytes, is_32_bit: bool) -> bool:
    """Whether these bytes are one call through a register or memory (opcode ff, second operation)."""
    if code[0] != 0xFF or code[1] >> 3 & 7 != 2:
        return False
    mode, base = code[1] >> 6, code[1] & 7
    length = 2 if mode == 3 else 2 + (base == 4) + {0: 0, 1: 1, 2: 4}[mode]
    if mode == 0 and (base == 5 or (base == 4 and length == 3 and len(code) > 2 and code[2] & 7 == 5)):
        length += 4
    return length == len(code) and (mode != 0 or base != 5 or not is_32_bit or len(code) == 6)
