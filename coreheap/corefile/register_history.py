"""Where a register's value came from: followed back over the instructions that ran before, in a line.

Knows: copies, loads, address sums and stack operations of x86-64 and i386, and what a call preserves. Does not know: why it is asked.
Memory is read as the core has it, which is how it was when the thread stopped there a few instructions later. None of capstone's
types leaves this file; it is imported with the first question.

A jump into the middle of the line is not seen. So an answer is one way to the end, and whoever asks must hold it against what else is
known of the value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from coreheap.corefile.core import Core
from coreheap.errors import MemoryFault

CODE_BEFORE: Final = 160
"""Bytes of code before a place that are looked at."""
CODE_BEHIND: Final = 64
"""Bytes of code at a place that are looked at."""
STARTS_TRIED: Final = 48
"""Where instructions begin is not known; decoding falls into step after a few of them wherever it starts."""
LAST_COMPARED: Final = 4
DEPTH_LIMIT: Final = 12
"""Loads and copies that one value is followed back over."""


def _parts(whole: str, machine: str) -> Iterator[str]:
    """The names of the parts of a register: what writes to one changes the whole."""
    letters = whole[1:]
    if letters.isdigit():
        yield from (f"{whole}{suffix}" for suffix in "bwd")
        return
    yield letters
    yield f"{letters}l"
    if letters.endswith("x"):
        yield from (f"{letters[0]}l", f"{letters[0]}h")
    if machine == "x86_64":
        yield f"e{letters}"


_REGISTERS: Final = {
    "x86_64": ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{number}" for number in range(8, 16))),
    "i386": ("eax", "ebx", "ecx", "edx", "esi", "edi", "ebp", "esp"),
}
_WHOLE: Final = {
    machine: {part: whole for whole in wholes for part in _parts(whole, machine)}
    for machine, wholes in _REGISTERS.items()
}
"""The register that a name is a part of."""
_KEPT: Final = {
    "x86_64": frozenset(("rbx", "rbp", "rsp", "r12", "r13", "r14", "r15")),
    "i386": frozenset(("ebx", "ebp", "esp", "esi", "edi")),
}
"""What a call preserves (psABI)."""


_ENDS: Final = ("jmp", "ret", "ud2", "hlt")
"""What lies behind these was not reached from before."""


@dataclass(frozen=True, slots=True)
class Load:
    """A word that was read from memory on the way of a value: where it lay, and the word."""

    address: int
    word: int


@dataclass(frozen=True, slots=True)
class Accessed:
    """What an instruction is about: the registers of the address that it accesses, or that it calls; ``is_call``: whether it calls or
    jumps, or reads what is called next. ``target``: the word in memory that a call or jump goes to; ``goes_to_register``: it goes to
    what its register holds."""

    registers: tuple[str, ...]
    is_call: bool
    target: Load | None = None
    goes_to_register: bool = False


class RegisterHistory:
    """The line of instructions that ends at one place, with the registers there.

    ``registers``: by name; after a call those that it preserves. ``behind_call``: the place is what a call returns to; else it is an
    instruction that was about to run.
    """

    def __init__(self, core: Core, place: int, registers: Mapping[str, int], *, behind_call: bool) -> None:
        self._core = core
        self._mask = (1 << 8 * core.word_bytes) - 1
        self._registers = registers
        self._behind_call = behind_call
        self._line = list(_line_before(core, place, behind_call)) if core.machine in _KEPT else []
        self._end = len(self._line) - behind_call

    @property
    def is_known(self) -> bool:
        """Whether the code could be read and decoded."""
        return bool(self._line)

    def call_target(self) -> tuple[int, tuple[Load, ...]] | None:
        """Where the call at the end went, and the loads that led there, the last one first; None where its target is no register or
        memory that can be followed."""
        if not self._behind_call or not self._line:
            return None
        return self._operand(self._line[-1].operands[0], self._end, DEPTH_LIMIT)

    def value(self, name: str) -> tuple[int, tuple[Load, ...]] | None:
        """A register's value at the end, and the loads that it came from, the last one first; None where it cannot be followed."""
        return self._value(name, self._end, DEPTH_LIMIT)

    def pushed(self) -> tuple[int, tuple[Load, ...]] | None:
        """What lay on top of the stack at the call at the end, as the code put it there; None where that cannot be followed."""
        from capstone import x86_const as x86

        for row in range(self._end - 1, -1, -1):
            instruction = self._line[row]
            operands = instruction.operands
            if instruction.mnemonic == "push":
                return self._operand(operands[0], row, DEPTH_LIMIT)
            is_store = instruction.mnemonic == "mov" and operands[0].type == x86.X86_OP_MEM
            memory = operands[0].mem if is_store else None
            if memory is not None and memory.base == x86.X86_REG_ESP and not memory.index and not memory.disp:
                return self._operand(operands[1], row, DEPTH_LIMIT)
            if "esp" in _written(self._core, instruction) or instruction.mnemonic in _ENDS:
                return None
        return None

    def way(self, name: str) -> tuple[Load, ...]:
        """The loads that a register's value at the end came from, the last one first, though the value is known; empty where they
        do not come to that value."""
        found = self._written_before(name, self._end, DEPTH_LIMIT)
        return found[1] if found is not None and found[0] == self._registers.get(name) else ()

    def _value(self, name: str, before: int, depth: int) -> tuple[int, tuple[Load, ...]] | None:
        """A register before an instruction of the line."""
        followed = self._written_before(name, before, depth)
        if followed is not None:
            return followed
        if name not in self._registers or any(
            name in _written(self._core, line) for line in self._line[before : self._end]
        ):
            return None
        # Nothing wrote to it since; behind a call only what is preserved is given.
        return self._registers[name], ()

    def _written_before(self, name: str, before: int, depth: int) -> tuple[int, tuple[Load, ...]] | None:
        """A register's value by the last instruction before that wrote it."""
        for row in range(before - 1, -1, -1):
            instruction = self._line[row]
            if name in _written(self._core, instruction):
                return self._result(instruction, name, row, depth - 1) if depth else None
            is_lost = instruction.mnemonic == "call" and name not in _KEPT[self._core.machine]
            if is_lost or instruction.mnemonic in _ENDS:
                return None
        return None

    def _result(self, instruction: Any, name: str, row: int, depth: int) -> tuple[int, tuple[Load, ...]] | None:
        operands = instruction.operands
        if (
            len(operands) != 2
            or operands[0].size != self._core.word_bytes
            or _name(self._core, instruction, operands[0]) != name
        ):
            return None
        if instruction.mnemonic == "mov":
            return self._operand(operands[1], row, depth)
        if instruction.mnemonic == "lea":
            return self._address(operands[1], row, depth)
        from capstone import x86_const as x86

        if instruction.mnemonic in ("add", "sub") and operands[1].type == x86.X86_OP_IMM:
            before = self._value(name, row, depth)
            change = operands[1].imm if instruction.mnemonic == "add" else -operands[1].imm
            return None if before is None else (before[0] + change & self._mask, before[1])
        return None

    def _operand(self, operand: Any, row: int, depth: int) -> tuple[int, tuple[Load, ...]] | None:
        """What an operand of a line's instruction was: a register's value, or the word in memory."""
        from capstone import x86_const as x86

        if operand.type == x86.X86_OP_REG:
            return self._value(_name(self._core, self._line[row], operand), row, depth)
        if operand.type != x86.X86_OP_MEM:
            return None
        address = self._address(operand, row, depth)
        if address is None:
            return None
        try:
            word = self._core.memory.read_word(address[0])
        except MemoryFault:
            return None
        return word, (Load(address[0], word), *address[1])

    def _address(self, operand: Any, row: int, depth: int) -> tuple[int, tuple[Load, ...]] | None:
        instruction, memory = self._line[row], operand.mem
        if memory.index or memory.segment or not memory.base:
            return None
        name = instruction.reg_name(memory.base)
        if name == "rip":
            return instruction.address + instruction.size + memory.disp & self._mask, ()
        base = self._value(name, row, depth)
        return None if base is None else (base[0] + memory.disp & self._mask, base[1])


def first_argument(core: Core, return_address: int, stack_pointer: int, registers: Mapping[str, int]) -> int | None:
    """The first argument of the call that returns to an address; None where the code does not tell it or is not at hand.

    ``stack_pointer`` and ``registers`` are those of the caller, behind the call.
    """
    stack_name = "rsp" if core.machine == "x86_64" else "esp"
    history = RegisterHistory(core, return_address, {**registers, stack_name: stack_pointer}, behind_call=True)
    if history.is_known:
        found = history.value("rdi") if core.machine == "x86_64" else history.pushed()
        if found is not None:
            return found[0]
    if core.machine == "i386":
        # The caller pushed it. The place is the called function's since, but that seldom writes there.
        try:
            return core.memory.read_word(stack_pointer)
        except MemoryFault:
            return None
    return None


def accessed_at(core: Core, place: int, registers: Mapping[str, int]) -> Accessed | None:
    """What the instruction at a place accesses or calls; None where it is not at hand, or does neither through registers."""
    if core.machine not in _KEPT:
        return None
    import capstone
    from capstone import x86_const as x86

    code = _code(core, place, CODE_BEHIND) or _code(core, place, CODE_BEHIND // 4)
    line = list(_decoder(core, capstone).disasm(code, place)) if code else []
    if not line:
        return None
    first = line[0]
    goes = first.mnemonic in ("call", "jmp")
    if goes and first.operands and first.operands[0].type == x86.X86_OP_REG:
        return Accessed((first.reg_name(first.operands[0].reg),), True, goes_to_register=True)
    memory = next((operand.mem for operand in first.operands if operand.type == x86.X86_OP_MEM), None)
    if memory is None or not memory.base or memory.segment:
        return None
    names = tuple(first.reg_name(number) for number in (memory.base, memory.index) if number)
    if goes:
        return Accessed(names, True, _target(core, memory, names, registers))
    # What was read may be called after the arguments are in place.
    read = _written(core, first)
    for instruction in line[1:]:
        if instruction.mnemonic in ("call", "jmp") and instruction.operands:
            return Accessed(names, _name(core, instruction, instruction.operands[0]) in read)
        read -= _written(core, instruction)
    return Accessed(names, False)


def _target(core: Core, memory: Any, names: tuple[str, ...], registers: Mapping[str, int]) -> Load | None:
    """The word that a call or jump through memory goes to; None where the memory cannot be read."""
    if any(name not in registers for name in names):
        return None
    index = registers[names[1]] * memory.scale if len(names) > 1 else 0
    address = registers[names[0]] + index + memory.disp & (1 << 8 * core.word_bytes) - 1
    try:
        return Load(address, core.memory.read_word(address))
    except MemoryFault:
        return None


def _line_before(core: Core, place: int, behind_call: bool) -> Iterator[Any]:
    """Instructions in a line that end at a place; none where the code cannot be read.

    Of the lines that decoding from many starts gives, the one whose last instructions most starts agree on.
    """
    code = b""
    for length in (CODE_BEFORE, CODE_BEFORE // 4):
        code = code or _code(core, place - length, length)
    if not code:
        return iter(())
    import capstone

    decoder = _decoder(core, capstone)
    lines: dict[tuple[int, ...], tuple[int, list[Any]]] = {}
    for start in range(min(STARTS_TRIED, len(code))):
        found = list(decoder.disasm(code[start:], place - len(code) + start))
        if not found or found[-1].address + found[-1].size != place or (behind_call and found[-1].mnemonic != "call"):
            continue
        ending = tuple(instruction.address for instruction in found[-LAST_COMPARED:])
        count, longest = lines.get(ending, (0, found))
        lines[ending] = count + 1, longest
    return iter(max(lines.values(), key=lambda line: line[0])[1]) if lines else iter(())


def _decoder(core: Core, capstone: Any) -> Any:
    mode = capstone.CS_MODE_64 if core.word_bytes == 8 else capstone.CS_MODE_32
    decoder: Any = capstone.Cs(capstone.CS_ARCH_X86, mode)
    decoder.detail = True
    return decoder


def _code(core: Core, address: int, length: int) -> bytes:
    """The bytes of code at an address; none where one is missing."""
    try:
        return core.memory.read(address, length)
    except MemoryFault:
        return b""


def _name(core: Core, instruction: Any, operand: Any) -> str:
    """The whole register that an operand is of; empty for operands of other kinds."""
    from capstone import x86_const as x86

    name: str = instruction.reg_name(operand.reg) if operand.type == x86.X86_OP_REG else ""
    return _WHOLE[core.machine].get(name, name)


def _written(core: Core, instruction: Any) -> set[str]:
    """Registers that an instruction writes, or writes a part of."""
    _, written = instruction.regs_access()
    return {_WHOLE[core.machine].get(name, name) for name in map(instruction.reg_name, written)}
