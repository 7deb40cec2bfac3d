"""Call frame information of modules: for an address of code, how the caller's registers are found.

Knows: .eh_frame_hdr's sorted table, the headers of CIE and FDE (LSB Core, "Exception Frames"), and how to have one CIE and one
FDE decoded by pyelftools. Does not know: registers, stacks, or whether memory agrees.

Only the two entries that an address needs are read: parsing libc's .eh_frame as a whole takes seconds. The entries' headers are
read here and handed on in the plain form of .debug_frame, so that no pointer in them is ever followed by anybody else.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from io import BytesIO
from typing import Any, Final

PT_GNU_EH_FRAME: Final = 0x6474E550
ENTRY_LIMIT: Final = 1 << 14
"""Bytes of one CIE or FDE; the largest of libc and libstdc++ have some 500."""
TABLE_LIMIT: Final = 1 << 24
"""Rows of a sorted table; chromium's has 1.2 million."""
SECTION_LIMIT: Final = 8 << 20
ENTRY_COUNT_LIMIT: Final = 1 << 16
"""Entries of a section without a sorted table that are gone through, 0.1 s; a static libc adds some 5,000."""
PROGRAM_BYTES_LIMIT: Final = 1 << 16
"""Bytes of CFA programs that one trace may have decoded, some 0.5 s; 128 frames of ordinary code need 4,000."""
EXPRESSION_LIMIT: Final = 256

_OMIT: Final = 0xFF
_PC_RELATIVE, _DATA_RELATIVE = 0x10, 0x30
_SORTED_TABLE: Final = 0x3B
"""DW_EH_PE_datarel | DW_EH_PE_sdata4: what linkers write, and all that unwinders search."""


class CallFrameError(Exception):
    """Call frame information that contradicts itself or cannot be read; ``reason`` is a lower snake case word."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RuleKind(Enum):
    """How a register of the caller is found (DWARF 5, section 6.4.1)."""

    UNDEFINED = "undefined"
    SAME = "same"
    SAVED = "saved"
    """In memory at CFA + argument."""
    VALUE = "value"
    """It is CFA + argument."""
    REGISTER = "register"
    SAVED_AT_EXPRESSION = "saved_at_expression"
    VALUE_OF_EXPRESSION = "value_of_expression"


Expression = tuple[tuple[str, tuple[int, ...]], ...]
"""Operations by their DWARF names, with their arguments."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Where one register of the caller is: ``number`` is an offset or a register, ``expression`` for kinds that have one."""

    kind: RuleKind
    number: int = 0
    expression: Expression = ()


@dataclass(frozen=True, slots=True)
class FrameRules:
    """How to go from a place in a function to its caller.

    The canonical frame address (CFA), the stack pointer before the call, is ``cfa_register`` + ``cfa_offset``, or
    ``cfa_expression`` where the former is None. Registers are numbered as in the machine's psABI.
    """

    cfa_register: int | None
    cfa_offset: int
    cfa_expression: Expression
    registers: Mapping[int, Rule]
    return_register: int
    is_signal_frame: bool
    """Augmentation "S": the caller was interrupted, its program counter is exact."""


@dataclass(frozen=True, slots=True)
class _Cie:
    code_factor: bytes
    data_factor: bytes
    """The alignment factors as their LEB128 stands in the file."""
    return_register: int
    pointer_encoding: int
    has_augmentation: bool
    is_signal_frame: bool
    program: bytes


class CallFrames:
    """The call frame information of one module. ``read(address, byte_count)`` gives None where a byte is missing."""

    def __init__(self, read: Callable[[int, int], bytes | None], header_address: int, word_bytes: int) -> None:
        self._read = read
        self._header = header_address
        self._word_bytes = word_bytes
        self._mask = (1 << 8 * word_bytes) - 1
        self._row_count: int | None = None

    def rules_at(self, address: int, budget: list[int]) -> FrameRules | None:
        """The rules for an address of code; None where none covers it or the core does not have them.

        ``budget[0]`` is how many bytes of programs may still be decoded. Raises CallFrameError.
        """
        place = self._entry_for(address)
        if place is None:
            return None
        content = self._entry_at(place)
        if content is None:
            return None
        cie_distance = int.from_bytes(content[:4], "little")
        cie_content = self._entry_at(place + 4 - cie_distance & self._mask) if cie_distance else None
        if cie_content is None:
            raise CallFrameError("damaged_unwind_information")
        cie = _cie_of(cie_content, self._word_bytes)
        position = 4
        start, position = _pointer(content, position, cie.pointer_encoding, place + 4, self._word_bytes)
        size, position = _pointer(content, position, cie.pointer_encoding & 0x0F, 0, self._word_bytes)
        if not start <= address < start + (size & self._mask):
            return None
        if cie.has_augmentation:
            length, position = _unsigned(content, position)
            position += length
        budget[0] -= len(cie.program) + len(content)
        if budget[0] < 0:
            raise CallFrameError("unwind_information_too_long")
        return _decoded(cie, content[position:], start, size & self._mask, address, self._word_bytes)

    def _entry_for(self, address: int) -> int | None:
        """Where the FDE lies that the sorted table has for an address."""
        rows = self._rows()
        low, high = 0, rows
        found: int | None = None
        while low < high:
            middle = (low + high) // 2
            row = self._read(self._header + 12 + 8 * middle, 8)
            if row is None:
                return None
            location, entry = struct.unpack("<ii", row)
            if self._header + location & self._mask <= address:
                found, low = self._header + entry & self._mask, middle + 1
            else:
                high = middle
        return found

    def _rows(self) -> int:
        """Rows of the sorted table; 0 where there is none of the usual form."""
        if self._row_count is None:
            head = self._read(self._header, 12)
            is_usual = head is not None and head[0] == 1 and head[1] & 0x0F in (0x03, 0x0B) and head[2] == 0x03
            usable = head is not None and is_usual and head[3] == _SORTED_TABLE
            self._row_count = min(int.from_bytes(head[8:], "little"), TABLE_LIMIT) if head and usable else 0
        return self._row_count

    def _entry_at(self, place: int) -> bytes | None:
        """The bytes of an entry behind its length; None where they are not in the core."""
        head = self._read(place, 4)
        if head is None:
            return None
        length = int.from_bytes(head, "little")
        if not 4 < length <= ENTRY_LIMIT:
            raise CallFrameError("damaged_unwind_information")
        return self._read(place + 4, length)


class ListedCallFrames(CallFrames):
    """The call frame information of a module without a sorted table, as static programs have it: all of .eh_frame is gone
    through once, ``section_address`` and ``section_bytes`` say where it is."""

    def __init__(
        self, read: Callable[[int, int], bytes | None], section_address: int, section_bytes: int, word_bytes: int
    ) -> None:
        super().__init__(read, section_address, word_bytes)
        self._section_bytes = min(section_bytes, SECTION_LIMIT)
        self._found: tuple[list[int], list[int]] | None = None

    def _entry_for(self, address: int) -> int | None:
        if self._found is None:
            listed = sorted(self._listed())
            self._found = [start for start, _ in listed], [place for _, place in listed]
        starts, places = self._found
        row = bisect_right(starts, address) - 1
        return places[row] if row >= 0 else None

    def _listed(self) -> Iterator[tuple[int, int]]:
        """(start of the code, address) of each FDE, up to the first entry that cannot be read."""
        content = self._read(self._header, self._section_bytes)
        if content is None:
            return
        encodings: dict[int, int] = {}
        position = 0
        for _ in range(ENTRY_COUNT_LIMIT):
            if position + 8 > len(content):
                return
            length, distance = struct.unpack_from("<II", content, position)
            end = position + 4 + length
            if not 4 < length <= ENTRY_LIMIT or end > len(content):
                return
            if distance:
                cie_at = position + 4 - distance
                try:
                    if cie_at not in encodings:
                        size = int.from_bytes(content[cie_at : cie_at + 4], "little") if cie_at >= 0 else 0
                        cie = _cie_of(content[max(cie_at, 0) + 4 :][: min(size, ENTRY_LIMIT)], self._word_bytes)
                        encodings[cie_at] = cie.pointer_encoding
                    start, _ = _pointer(content, position + 8, encodings[cie_at], self._header, self._word_bytes)
                except CallFrameError:
                    return
                yield start, self._header + position
            position = end


def _cie_of(content: bytes, word_bytes: int) -> _Cie:
    """A CIE from its bytes behind the length."""
    end = content.find(b"\0", 5)
    if len(content) < 6 or content[:4] != bytes(4) or content[4] not in (1, 3) or not 0 <= end - 5 <= 8:
        raise CallFrameError("damaged_unwind_information")
    letters = content[5:end].decode("latin-1")
    if letters and not letters.startswith("z"):
        raise CallFrameError("unknown_unwind_information")
    _, data_at = _unsigned(content, end + 1)
    code_factor = content[end + 1 : data_at]
    _, position = _unsigned(content, data_at)
    data_factor = content[data_at:position]
    if content[4] == 1:
        return_register, position = _byte(content, position), position + 1
    else:
        return_register, position = _unsigned(content, position)
    encoding, is_signal_frame = 0, False
    if letters:
        length, position = _unsigned(content, position)
        program_at = position + length
        for letter in letters[1:]:
            if letter == "S":
                is_signal_frame = True
            elif letter == "R":
                encoding, position = _byte(content, position), position + 1
            elif letter == "L":
                position += 1
            elif letter == "P":
                personality = _byte(content, position)
                _, position = _pointer(content, position + 1, personality & 0x0F, 0, word_bytes)
            elif (
                letter not in "BG"
            ):  # keys of aarch64's pointer authentication, and of memory tagging: they have no data
                raise CallFrameError("unknown_unwind_information")
        position = program_at
    return _Cie(code_factor, data_factor, return_register, encoding, bool(letters), is_signal_frame, content[position:])


def _decoded(cie: _Cie, program: bytes, start: int, size: int, address: int, word_bytes: int) -> FrameRules:
    """The rules for an address that an FDE with this program covers."""
    from elftools.common.exceptions import DWARFError, ELFError
    from elftools.dwarf.callframe import CallFrameInfo
    from elftools.dwarf.structs import DWARFStructs

    word = "Q" if word_bytes == 8 else "I"
    mask = (1 << 8 * word_bytes) - 1
    head = struct.pack("<IB", 0xFFFFFFFF, 3) + b"\0" + cie.code_factor + cie.data_factor + b"\0"
    entries = _with_length(head + cie.program)
    entries += _with_length(struct.pack(f"<I{word}{word}", 0, start & mask, size) + program)
    try:
        structs: Any = DWARFStructs(little_endian=True, dwarf_format=32, address_size=word_bytes)
        information: Any = CallFrameInfo(BytesIO(entries), len(entries), 0, structs)
        parsed = information.get_entries()
        if len(parsed) != 2:
            raise CallFrameError("damaged_unwind_information")
        _refuse_what_is_decoded_otherwise(parsed)
        table = parsed[1].get_decoded().table
        row = next((row for row in reversed(table) if row["pc"] <= address), None)
        if row is None:
            raise CallFrameError("damaged_unwind_information")
        cfa = row["cfa"]
        registers = {
            number: _rule(rule, structs)
            for number, rule in row.items()
            if isinstance(number, int) and not isinstance(number, bool)
        }
        if cfa.expr is None and (cfa.reg is None or cfa.offset is None):
            raise CallFrameError("damaged_unwind_information")
        expression = () if cfa.expr is None else _operations(cfa.expr, structs)
        return FrameRules(
            cfa.reg if cfa.expr is None else None,
            cfa.offset or 0,
            expression,
            registers,
            cie.return_register,
            cie.is_signal_frame,
        )
    # What pyelftools says of a damaged program, and what comes of numbers that it did not check: an empty stack of states,
    # operations that it does not know, entries cut short.
    except (ELFError, DWARFError, AssertionError, IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise CallFrameError("damaged_unwind_information") from error


def _refuse_what_is_decoded_otherwise(entries: Any) -> None:
    """Refuse what pyelftools 0.33 takes otherwise than DWARF: def_cfa_sf's factor, and set_loc's encoded address.

    No compiler on these machines writes either.
    """
    for entry in entries:
        if any(int(instruction.opcode) in (0x01, 0x12) for instruction in entry.instructions):
            raise CallFrameError("unknown_unwind_information")


def _rule(rule: Any, structs: Any) -> Rule:
    kinds = {
        "UNDEFINED": RuleKind.UNDEFINED,
        "SAME_VALUE": RuleKind.SAME,
        "OFFSET": RuleKind.SAVED,
        "VAL_OFFSET": RuleKind.VALUE,
        "REGISTER": RuleKind.REGISTER,
        "EXPRESSION": RuleKind.SAVED_AT_EXPRESSION,
        "VAL_EXPRESSION": RuleKind.VALUE_OF_EXPRESSION,
    }
    kind = kinds[rule.type]
    if kind in (RuleKind.SAVED_AT_EXPRESSION, RuleKind.VALUE_OF_EXPRESSION):
        return Rule(kind, expression=_operations(rule.arg, structs))
    return Rule(kind, int(rule.arg) if rule.arg is not None else 0)


def _operations(expression: Any, structs: Any) -> Expression:
    from elftools.dwarf.dwarf_expr import DWARFExprParser

    if len(expression) > EXPRESSION_LIMIT:
        raise CallFrameError("unknown_unwind_information")
    parsed: Any = DWARFExprParser(structs).parse_expr(list(expression))
    return tuple((str(step.op_name), tuple(int(argument) for argument in step.args)) for step in parsed)


def _with_length(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


def _byte(content: bytes, position: int) -> int:
    if position >= len(content):
        raise CallFrameError("damaged_unwind_information")
    return content[position]


def _unsigned(content: bytes, position: int) -> tuple[int, int]:
    """The ULEB128 at a position, and where it ends."""
    value = shift = 0
    while shift < 70:
        byte = _byte(content, position)
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7
    raise CallFrameError("damaged_unwind_information")


def _pointer(content: bytes, position: int, encoding: int, content_address: int, word_bytes: int) -> tuple[int, int]:
    """The encoded pointer at a position, and where it ends; ``content_address`` is where ``content`` lies in the process."""
    forms = {0x00: "Q" if word_bytes == 8 else "I", 0x02: "H", 0x03: "I", 0x04: "Q", 0x0A: "h", 0x0B: "i", 0x0C: "q"}
    form = forms.get(encoding & 0x0F)
    if encoding == _OMIT or form is None or encoding & 0xF0 not in (0, _PC_RELATIVE):
        raise CallFrameError("unknown_unwind_information")
    size = struct.calcsize(form)
    if position + size > len(content):
        raise CallFrameError("damaged_unwind_information")
    value: int = struct.unpack_from(f"<{form}", content, position)[0]
    if encoding & 0xF0:
        value += content_address + position
    return value & (1 << 8 * word_bytes) - 1, position + size
