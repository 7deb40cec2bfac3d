"""DWARF expressions of call frame information: the simple ones, that signal frames and linkers' PLTs have.

Knows: stack operations without jumps (DWARF 5, section 2.5). Does not know: registers or memory; it asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from coreheap.corefile.call_frames import CallFrameError, Expression

DEPTH_LIMIT: Final = 64


def evaluated(
    expression: Expression,
    initial: int | None,
    register: Callable[[int], int],
    read_word: Callable[[int], int],
    bits: int,
) -> int:
    """The value of an expression that starts with ``initial`` on its stack.

    ``register`` gives a register by its DWARF number, ``read_word`` a word of memory; what they raise comes through. Raises
    CallFrameError for operations that are not known and for a stack that has too little or too much.
    """
    mask = (1 << bits) - 1
    values: list[int] = [] if initial is None else [initial]
    try:
        for full_name, arguments in expression:
            name = full_name.removeprefix("DW_OP_")
            if name == "bregx":
                values.append(register(arguments[0]) + arguments[1] & mask)
            elif name.startswith("breg"):
                values.append(register(int(name[4:])) + arguments[0] & mask)
            elif name.startswith("lit"):
                values.append(int(name[3:]))
            elif name in _CONSTANTS:
                values.append(arguments[0] & mask)
            elif name == "deref":
                values.append(read_word(values.pop()))
            elif name == "plus_uconst":
                values.append(values.pop() + arguments[0] & mask)
            elif name == "dup":
                values.append(values[-1])
            elif name in _OPERATIONS:
                right, left = values.pop(), values.pop()
                values.append(_OPERATIONS[name](left, right, bits) & mask)
            elif name != "nop":
                raise CallFrameError("unknown_unwind_information")
            if len(values) > DEPTH_LIMIT:
                raise CallFrameError("unknown_unwind_information")
        return values[-1] & mask
    except IndexError as error:
        raise CallFrameError("damaged_unwind_information") from error


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


_CONSTANTS: Final = (
    "const1u",
    "const1s",
    "const2u",
    "const2s",
    "const4u",
    "const4s",
    "const8u",
    "const8s",
    "constu",
    "consts",
)
_OPERATIONS: Final[dict[str, Callable[[int, int, int], int]]] = {
    "plus": lambda left, right, bits: left + right,
    "minus": lambda left, right, bits: left - right,
    "and": lambda left, right, bits: left & right,
    "or": lambda left, right, bits: left | right,
    "mul": lambda left, right, bits: left * right,
    "shl": lambda left, right, bits: left << right if right < bits else 0,
    "shr": lambda left, right, bits: left >> right if right < bits else 0,
    "ge": lambda left, right, bits: int(_signed(left, bits) >= _signed(right, bits)),
    "gt": lambda left, right, bits: int(_signed(left, bits) > _signed(right, bits)),
    "le": lambda left, right, bits: int(_signed(left, bits) <= _signed(right, bits)),
    "lt": lambda left, right, bits: int(_signed(left, bits) < _signed(right, bits)),
    "eq": lambda left, right, bits: int(left == right),
    "ne": lambda left, right, bits: int(left != right),
}
