"""Which addresses one instruction would access, from the registers at it.

Knows: capstone's decoding of memory operands. Does not know: what lies there. None of capstone's types leaves this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

INSTRUCTION_BYTES: Final = 15
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Operand:
    """An address that an instruction accesses or goes to, and the registers that it is made of."""

    address: int
    registers: tuple[str, ...]


def x86_64_operands(code: bytes, address: int, registers: Mapping[str, int]) -> tuple[Operand, ...] | None:
    """What the instruction at ``address`` accesses: its memory operands, what a stack operation uses, where an indirect call or
    jump goes. None where the bytes are no instruction.

    Operands relative to the program counter or to a segment are left out: they are addresses.
    """
    import capstone
    from capstone import x86_const as x86

    decoder: Any = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    instruction: Any = next(decoder.disasm(code[:INSTRUCTION_BYTES], address, 1), None)
    if instruction is None:
        return None
    found: list[Operand] = []
    for operand in instruction.operands:
        if operand.type == x86.X86_OP_MEM and operand.mem.segment not in (x86.X86_REG_FS, x86.X86_REG_GS):
            memory = operand.mem
            names = [instruction.reg_name(number) for number in (memory.base, memory.index) if number]
            if not names or any(name not in registers for name in names):
                continue
            base = registers[instruction.reg_name(memory.base)] if memory.base else 0
            index = registers[instruction.reg_name(memory.index)] * memory.scale if memory.index else 0
            found.append(Operand(base + index + memory.disp & _MASK, tuple(names)))
        elif operand.type == x86.X86_OP_REG and instruction.id in (x86.X86_INS_CALL, x86.X86_INS_JMP):
            name = instruction.reg_name(operand.reg)
            if name in registers:
                found.append(Operand(registers[name], (name,)))
    if any(instruction.group(group) for group in (x86.X86_GRP_CALL, x86.X86_GRP_RET)) or instruction.id in (
        x86.X86_INS_PUSH,
        x86.X86_INS_POP,
        x86.X86_INS_LEAVE,
    ):
        found.append(Operand(registers["rsp"], ("rsp",)))
    return tuple(found)
