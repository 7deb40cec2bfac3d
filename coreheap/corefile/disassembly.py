"""Machine code of one function: which addresses of its module it names.

Knows: how compilers form addresses on x86_64, i386 and aarch64, followed through registers by capstone's decoding.
Does not know: what lies at an address.

The code is read once, in a line: behind a jump or a return goes on what was known where a jump leads there. Where two
ways meet one wins, so a value may be followed into a block that never sees it; whoever asks must test what comes out. capstone is imported with the first question; none of its types leaves this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Final

CODE_LIMIT: Final = 1 << 14
"""Bytes of one function that are looked at; malloc and its kin have at most some 4,000."""


class Use(Enum):
    """What an instruction does with the place that it names."""

    ADDRESS = "address"
    """It forms the address itself."""
    ACCESS = "access"
    """It reads or writes the memory there."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One place that an instruction names.

    ``place`` is an address of the module as its file has it. For a thread-local variable ``slot`` is the word that
    holds its offset from the thread pointer and ``place`` what is added to that; without such a word (static
    programs) ``slot`` is None, ``is_thread_local`` True and ``place`` the offset itself.
    """

    instruction: int
    place: int
    use: Use
    is_thread_local: bool = False
    slot: int | None = None


@dataclass(frozen=True, slots=True)
class _Value:
    """What a register is known to hold: ``number``, plus the thread pointer, plus the word at ``slot``."""

    number: int
    thread: bool = False
    slot: int | None = None


def references_in(code: bytes, address: int, machine: str) -> tuple[Reference, ...]:
    """Every place that the code names, in its order; ``address`` is where it begins in the module's file.

    Decoding stops at the first byte that is no instruction. Empty for an unknown machine.
    """
    reader = _READERS.get(machine)
    if reader is None:
        return ()
    return tuple(reader(code[:CODE_LIMIT], address))


@cache
def _capstone(machine: str) -> tuple[Any, Any]:
    """The decoder of a machine and the module of its names."""
    import capstone

    kinds = {
        "x86_64": (capstone.CS_ARCH_X86, capstone.CS_MODE_64, "x86"),
        "i386": (capstone.CS_ARCH_X86, capstone.CS_MODE_32, "x86"),
        "aarch64": (capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM, "arm64"),
    }
    architecture, mode, names = kinds[machine]
    decoder = capstone.Cs(architecture, mode)
    decoder.detail = True
    if names == "x86":
        from capstone import x86_const

        return decoder, x86_const
    from capstone import arm64_const

    return decoder, arm64_const


class _State:
    """What is known at a point of the code: of registers, by a name that all widths of one share, and of the stack."""

    def __init__(self, names: Callable[[int], int]) -> None:
        self._name = names
        self._values: dict[int, _Value] = {}
        self._stack: dict[int, _Value] = {}
        self._depth = 0
        self._at: dict[int, tuple[dict[int, _Value], dict[int, _Value], int]] = {}
        self._is_reached = True
        self._is_guess = False

    def get(self, register: int) -> _Value | None:
        return self._values.get(self._name(register))

    def put(self, register: int, value: _Value | None) -> None:
        if value is None:
            self._values.pop(self._name(register), None)
        else:
            self._values[self._name(register)] = value

    def forget(self, registers: Iterable[int]) -> None:
        for register in registers:
            self.put(register, None)

    def push(self, byte_count: int) -> None:
        """The stack pointer went down (up, where negative)."""
        self._depth -= byte_count

    def spilled(self, displacement: int) -> _Value | None:
        return self._stack.get(self._depth + displacement)

    def spill(self, displacement: int, value: _Value | None) -> None:
        if value is None:
            self._stack.pop(self._depth + displacement, None)
        else:
            self._stack[self._depth + displacement] = value

    def jump(self, target: int | None, *, may_stay: bool) -> None:
        """Control may go on at ``target``; behind a jump that never stays only other jumps lead."""
        if target is not None:
            self._at.setdefault(target, (dict(self._values), dict(self._stack), self._depth))
        self._is_reached = may_stay
        self._is_guess = False

    def arrive(self, address: int) -> None:
        """The next instruction. Where the one before never leads here, what is known comes from a jump to it; where
        none was seen (it is further on, or this is padding), from the last state that any jump saw."""
        if self._is_reached:
            return
        state = self._at.get(address)
        self._is_reached = state is not None
        if state is None and not self._is_guess:
            state = next(reversed(self._at.values()), None)
        self._is_guess = not self._is_reached
        if state is not None:
            self._values, self._stack, self._depth = dict(state[0]), dict(state[1]), state[2]


def _sum(left: _Value | None, right: _Value | None, mask: int) -> _Value | None:
    """The sum where it can be told: at most one side may hang on a slot."""
    if left is None or right is None or (left.slot is not None and right.slot is not None):
        return None
    slot = left.slot if left.slot is not None else right.slot
    return _Value(left.number + right.number & mask, left.thread or right.thread, slot)


def _reference(instruction: int, value: _Value, use: Use, mask: int) -> Reference | None:
    """A known address as a reference; None for what a slot holds when no thread pointer is added to it."""
    if value.thread:
        number = value.number if value.number <= mask >> 1 else value.number - mask - 1
        return Reference(instruction, number, use, True, value.slot)
    return None if value.slot is not None else Reference(instruction, value.number & mask, use)


# --- x86 -----------------------------------------------------------------------------------------------------------


def _x86(code: bytes, address: int, machine: str) -> Iterator[Reference]:
    decoder, x86 = _capstone(machine)
    is_64 = machine == "x86_64"
    mask = (1 << 64) - 1 if is_64 else (1 << 32) - 1
    thread_segment = x86.X86_REG_FS if is_64 else x86.X86_REG_GS
    state = _State(_x86_register_names(x86))
    # What a call may change, less what holds the GOT's address in i386 code by custom: callee-saved registers.
    lost_in_calls = tuple(
        getattr(x86, f"X86_REG_{name}")
        for name in (("RAX", "RCX", "RDX", "RSI", "RDI", "R8", "R9", "R10", "R11") if is_64 else ("EAX", "ECX", "EDX"))
    )
    word_bytes = 8 if is_64 else 4
    thunk_result: int | None = None
    stack_pointers = (x86.X86_REG_ESP, x86.X86_REG_RSP)

    def memory_place(instruction: Any, operand: Any) -> tuple[_Value | None, bool]:
        """(place without the index, whether the operand names its place in full)."""
        memory = operand.mem
        displacement = _Value(memory.disp & mask, thread=memory.segment == thread_segment)
        if memory.base == x86.X86_REG_RIP:
            return _Value(instruction.address + instruction.size + memory.disp & mask), True
        place: _Value | None = displacement
        if memory.base:
            place = _sum(state.get(memory.base), displacement, mask)
        elif memory.index and not memory.segment:
            # A table at a fixed address of a program that does not move.
            return displacement, False
        if memory.index:
            index = state.get(memory.index) if memory.scale == 1 else None
            with_index = _sum(place, index, mask)
            if with_index is not None:
                return with_index, True
            if place is None and index is not None:
                place = _sum(index, displacement, mask)
            return place, False
        return place, True

    for instruction in decoder.disasm(code, address):
        operands = instruction.operands
        kind = instruction.id
        written = instruction.regs_access()[1]
        state.arrive(instruction.address)
        result: _Value | None = None
        target = operands[0].reg if operands and operands[0].type == x86.X86_OP_REG else None
        for operand in operands:
            if operand.type != x86.X86_OP_MEM:
                continue
            place, _ = memory_place(instruction, operand)
            if place is not None and kind != x86.X86_INS_NOP:
                use = Use.ADDRESS if kind == x86.X86_INS_LEA else Use.ACCESS
                found = _reference(instruction.address, place, use, mask)
                if found is not None:
                    yield found
        source = operands[1] if len(operands) > 1 else None
        if target in stack_pointers and source is not None and source.type == x86.X86_OP_IMM:
            state.push({x86.X86_INS_SUB: source.imm, x86.X86_INS_ADD: -source.imm}.get(kind, 0))
        if kind == x86.X86_INS_CALL:
            # i386: call of __x86.get_pc_thunk.REG, which leaves the return address in REG; the add follows.
            thunk_result = instruction.address + instruction.size if not is_64 else None
            state.forget(lost_in_calls)
            continue
        if not is_64 and kind == x86.X86_INS_POP and thunk_result is not None and target is not None:
            # "call next; next: pop reg", as old compilers wrote the thunk in line.
            result = _Value(thunk_result) if thunk_result == instruction.address else None
        elif kind == x86.X86_INS_ADD and target is not None and source is not None:
            before = state.get(target)
            if source.type == x86.X86_OP_IMM:
                if before is None and thunk_result is not None and abs(source.imm) >= 0x1000:
                    before = _Value(thunk_result)
                result = _sum(before, _Value(source.imm & mask), mask)
                thunk_result = None
            elif source.type == x86.X86_OP_REG:
                result = _sum(before, state.get(source.reg), mask)
            elif source.type == x86.X86_OP_MEM:
                place, whole = memory_place(instruction, source)
                result = _sum(before, _loaded(place if whole else None), mask)
        elif kind == x86.X86_INS_SUB and target is not None and source is not None and source.type == x86.X86_OP_IMM:
            result = _sum(state.get(target), _Value(-source.imm & mask), mask)
        elif kind == x86.X86_INS_LEA and target is not None and source is not None:
            place, whole = memory_place(instruction, source)
            result = place if whole else None
        elif kind in (x86.X86_INS_MOV, x86.X86_INS_MOVABS) and source is not None:
            if target is not None and source.type == x86.X86_OP_REG:
                result = state.get(source.reg)
            elif target is not None and source.type == x86.X86_OP_IMM:
                result = _Value(source.imm & mask)
                yield Reference(instruction.address, source.imm & mask, Use.ADDRESS)
            elif target is not None and source.type == x86.X86_OP_MEM:
                if source.mem.base in stack_pointers and not source.mem.index:
                    result = state.spilled(source.mem.disp)
                else:
                    place, whole = memory_place(instruction, source)
                    result = _loaded(place if whole else None)
            elif operands[0].type == x86.X86_OP_MEM and operands[0].mem.base in stack_pointers:
                value = state.get(source.reg) if source.type == x86.X86_OP_REG else None
                if not operands[0].mem.index:
                    state.spill(operands[0].mem.disp, value)
        elif kind == x86.X86_INS_PUSH:
            state.push(word_bytes)
        elif kind == x86.X86_INS_POP:
            state.push(-word_bytes)
        if instruction.group(x86.X86_GRP_JUMP):
            is_direct = bool(operands) and operands[0].type == x86.X86_OP_IMM
            state.jump(operands[0].imm if is_direct else None, may_stay=kind != x86.X86_INS_JMP)
        elif instruction.group(x86.X86_GRP_RET):
            state.jump(None, may_stay=False)
        state.forget(written)
        if target is not None and result is not None:
            state.put(target, result)


def _loaded(place: _Value | None) -> _Value | None:
    """What a load from a known place gives: from the thread block's first word the thread pointer, from a word of the
    module whatever that word will hold, which matters where it is the offset of a thread-local variable."""
    if place is None or place.slot is not None:
        return None
    if place.thread:
        return _Value(0, thread=True) if place.number == 0 else None
    return _Value(0, slot=place.number)


def _x86_register_names(x86: Any) -> Callable[[int], int]:
    parts: dict[str, tuple[str, ...]] = {
        f"R{letters}": (f"E{letters}", letters) for letters in ("AX", "BX", "CX", "DX", "SI", "DI", "BP", "SP")
    }
    parts |= {f"R{number}": (f"R{number}D", f"R{number}W", f"R{number}B") for number in range(8, 16)}
    for letter in "ABCD":
        parts[f"R{letter}X"] += (f"{letter}L", f"{letter}H")
    for letters in ("SI", "DI", "BP", "SP"):
        parts[f"R{letters}"] += (f"{letters}L",)
    same = {
        getattr(x86, f"X86_REG_{part}"): getattr(x86, f"X86_REG_{whole}")
        for whole, names in parts.items()
        for part in names
    }
    return lambda register: same.get(register, register)


# --- aarch64 -------------------------------------------------------------------------------------------------------


def _aarch64(code: bytes, address: int, machine: str) -> Iterator[Reference]:
    decoder, arm = _capstone(machine)
    mask = (1 << 64) - 1
    state = _State(_aarch64_register_names(arm))
    lost_in_calls = tuple(getattr(arm, f"ARM64_REG_X{number}") for number in range(19))
    zero = (arm.ARM64_REG_XZR, arm.ARM64_REG_WZR)
    for instruction in decoder.disasm(code, address):
        operands = instruction.operands
        kind = instruction.id
        written = instruction.regs_access()[1]
        state.arrive(instruction.address)
        result: _Value | None = None
        target = operands[0].reg if operands and operands[0].type == arm.ARM64_OP_REG else None
        for operand in operands:
            if operand.type != arm.ARM64_OP_MEM:
                continue
            base = state.get(operand.mem.base)
            place = _sum(base, _Value(operand.mem.disp & mask), mask)
            if operand.mem.index:
                index = state.get(operand.mem.index) if not operand.shift.value else None
                whole = _sum(place, index, mask)
                is_whole, place = whole is not None, whole if whole is not None else place
            else:
                is_whole = True
            if place is None:
                continue
            found = _reference(instruction.address, place, Use.ACCESS, mask)
            if found is not None:
                yield found
            if kind in (arm.ARM64_INS_LDR, arm.ARM64_INS_LDUR) and len(operands) == 2 and is_whole:
                result = _loaded(place)
        if kind in (arm.ARM64_INS_BL, arm.ARM64_INS_BLR):
            state.forget(lost_in_calls)
            continue
        if kind in (arm.ARM64_INS_ADRP, arm.ARM64_INS_ADR) and len(operands) == 2:
            result = _Value(operands[1].imm & mask)
            if kind == arm.ARM64_INS_ADR:
                yield Reference(instruction.address, operands[1].imm & mask, Use.ADDRESS)
        elif kind in (arm.ARM64_INS_ADD, arm.ARM64_INS_SUB) and len(operands) == 3:
            left = state.get(operands[1].reg)
            right: _Value | None = None
            if operands[2].type == arm.ARM64_OP_IMM:
                number = operands[2].imm << operands[2].shift.value
                right = _Value((number if kind == arm.ARM64_INS_ADD else -number) & mask)
            elif kind == arm.ARM64_INS_ADD and operands[2].type == arm.ARM64_OP_REG and not operands[2].shift.value:
                right = state.get(operands[2].reg)
            result = _sum(left, right, mask)
            if result is not None:
                found = _reference(instruction.address, result, Use.ADDRESS, mask)
                if found is not None:
                    yield found
        elif kind == arm.ARM64_INS_MOV and len(operands) == 2 and operands[1].type == arm.ARM64_OP_REG:
            result = None if operands[1].reg in zero else state.get(operands[1].reg)
        elif kind == arm.ARM64_INS_MRS and "tpidr_el0" in instruction.op_str:
            result = _Value(0, thread=True)
        if instruction.group(arm.ARM64_GRP_JUMP) or kind in (arm.ARM64_INS_B, arm.ARM64_INS_BR):
            is_direct = bool(operands) and operands[-1].type == arm.ARM64_OP_IMM
            always = kind == arm.ARM64_INS_BR or (kind == arm.ARM64_INS_B and instruction.mnemonic == "b")
            state.jump(operands[-1].imm if is_direct else None, may_stay=not always)
        elif kind == arm.ARM64_INS_RET:
            state.jump(None, may_stay=False)
        state.forget(written)
        if target is not None and result is not None and target in written:
            state.put(target, result)


def _aarch64_register_names(arm: Any) -> Callable[[int], int]:
    same = {getattr(arm, f"ARM64_REG_W{number}"): getattr(arm, f"ARM64_REG_X{number}") for number in range(31)}
    return lambda register: same.get(register, register)


_READERS: Final[dict[str, Callable[[bytes, int], Iterator[Reference]]]] = {
    "x86_64": lambda code, address: _x86(code, address, "x86_64"),
    "i386": lambda code, address: _x86(code, address, "i386"),
    "aarch64": lambda code, address: _aarch64(code, address, "aarch64"),
}
