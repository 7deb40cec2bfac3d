"""DWARF of one compilation unit: where its variables are, how its structures are laid out.

Knows: how to get from an address to the unit by .debug_aranges, and from there to the names that are asked for, without a
walk over the other units (libc has 678,000 entries; its unit malloc.c some 4,000). Does not know: what the names mean.

pyelftools does the reading, imported with the first question; none of its types leaves this file. A damaged file gives
None or less, never an error.
"""

from __future__ import annotations

import itertools
import mmap
import os
import struct
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from coreheap.corefile.file_guard import FileGuard
from coreheap.corefile.symbols import ElfFile

ENTRY_LIMIT: Final = 200_000
"""Entries of one unit that are looked at; at 10 us each that is 2 s."""
SECTION_BYTES_LIMIT: Final = 512 << 20
"""Bytes of one DWARF section, unpacked."""
TYPE_DEPTH_LIMIT: Final = 16
NAME_LIMIT: Final = 256
_READ_LIMIT: Final = 1 << 24
_SECTION_LIMIT: Final = 1 << 12
_DW_OP_ADDR: Final = 0x03
_THREAD_OPERATIONS: Final = {0x9B, 0xE0}
"""DW_OP_form_tls_address and DW_OP_GNU_push_tls_address."""
_CONSTANT_BYTES: Final = {0x08: 1, 0x0A: 2, 0x0C: 4, 0x0E: 8}
"""DW_OP_const1u, const2u, const4u, const8u."""

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class DwarfVariable:
    """A variable: exactly one of ``address`` (before relocation) and ``thread_offset`` (in the module's TLS block)."""

    name: str
    address: int | None
    thread_offset: int | None


@dataclass(frozen=True, slots=True)
class DwarfStructure:
    """A structure: its sizeof, and the offset of each named member."""

    name: str
    byte_count: int
    offsets: dict[str, int]


@dataclass(frozen=True, slots=True)
class DwarfUnit:
    """What a unit says of the names that were asked for; what it does not define is missing."""

    name: str
    variables: dict[str, DwarfVariable]
    structures: dict[str, DwarfStructure]


def unit_at(file: ElfFile, address: int, variables: Collection[str], structures: Collection[str]) -> DwarfUnit | None:
    """The unit whose code holds an address (before relocation), as far as names are asked for.

    A structure is found by its tag or by a typedef. None when the file has no DWARF for the address.
    """
    if not file.has_debug_information:
        return None
    content, guard = _content(file)
    if content is None or guard is None:
        return None
    stream = _BoundedStream(content, _READ_LIMIT)
    unit = _ask(lambda: _unit_at(stream, address, frozenset(variables), frozenset(structures)))
    guard.check()
    return unit


def _content(file: ElfFile) -> tuple[mmap.mmap | None, FileGuard | None]:
    """The file once more: ``ElfFile`` keeps its own mapping to itself."""
    try:
        descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None, None
    try:
        mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        return mapping, FileGuard(mapping, descriptor, os.fspath(file.path))
    except (OSError, ValueError):
        return None, None
    finally:
        os.close(descriptor)


def _ask(question: Callable[[], _Answer]) -> _Answer | None:
    """What pyelftools answers; None where it trips over a damaged file, by its own error or for want of a check."""
    from elftools.common.exceptions import DWARFError, ELFError

    try:
        return question()
    except (ELFError, DWARFError, _TooMuchToRead, _zlib_error()):
        return None
    # Numbers of the file that it takes as they are: abbreviations and forms that do not exist (KeyError), offsets past a table
    # (IndexError) or below zero (ValueError), sizes of 0 (ArithmeticError), attributes without their section (TypeError,
    # AttributeError), and its own asserts on all of these.
    except (ArithmeticError, LookupError, ValueError, TypeError, AttributeError, AssertionError):
        return None
    # Too few bytes for a field, entries that are nested without end, a length that nobody can have (the limits bound what is
    # read, not what is asked for), and what DWARF allows but pyelftools does not read, such as segmented address ranges.
    except (struct.error, RecursionError, MemoryError, NotImplementedError):
        return None


def _zlib_error() -> type[Exception]:
    """The error of a damaged compressed section."""
    import zlib

    return zlib.error


def _unit_at(
    stream: _BoundedStream, address: int, variables: frozenset[str], structures: frozenset[str]
) -> DwarfUnit | None:
    from elftools.elf.elffile import ELFFile

    file: Any = stream
    elf_file: Any = ELFFile(file)
    if not _has_sane_sections(elf_file) or not elf_file.has_dwarf_info(strict=True):
        return None
    dwarf: Any = elf_file.get_dwarf_info(relocate_dwarf_sections=False, follow_links=False)
    aranges = dwarf.get_aranges()
    if aranges is None:
        return None
    offset = aranges.cu_offset_at_addr(address)
    if offset is None:
        return None
    unit: Any = dwarf.get_CU_at(offset)
    top = unit.get_top_DIE()
    found_variables: dict[str, DwarfVariable] = {}
    found_structures: dict[str, DwarfStructure] = {}
    aliases: dict[str, Any] = {}
    for entry in _children(unit, top):
        name = _name(entry)
        if entry.tag == "DW_TAG_variable":
            # A definition may leave the name to the declaration that it completes.
            if not name and "DW_AT_specification" in entry.attributes:
                name = _name(entry.get_DIE_from_attribute("DW_AT_specification"))
            if name in variables and name not in found_variables:
                place = _place_of(entry, unit.structs.little_endian)
                if place is not None:
                    found_variables[name] = DwarfVariable(name, *place)
        elif entry.tag == "DW_TAG_structure_type" and name in structures:
            found_structures.setdefault(name, _structure(name, entry))
        elif entry.tag == "DW_TAG_typedef" and name in structures:
            aliases.setdefault(name, entry)
        if len(found_variables) == len(variables) and len(found_structures) == len(structures):
            break
    for name, entry in aliases.items():
        target = _structure_behind(entry)
        if name not in found_structures and target is not None:
            found_structures[name] = _structure(name, target)
    return DwarfUnit(_name(top), found_variables, found_structures)


def _has_sane_sections(elf_file: Any) -> bool:
    """Whether no DWARF section claims more bytes than the limit: pyelftools unpacks them whole."""
    count = elf_file.num_sections()
    if count > _SECTION_LIMIT:
        return False
    for number in range(count):
        section = elf_file.get_section(number)
        if section["sh_type"] == "SHT_NOBITS":
            continue
        # .zdebug_: GNU's old packing, whose size stands in the packed bytes; Debian and Fedora never used it in libc.
        if section.name.startswith(".zdebug_"):
            return False
        if section.name.startswith(".debug_") and section.data_size > SECTION_BYTES_LIMIT:
            return False
    return True


def _children(unit: Any, top: Any) -> Iterator[Any]:
    """The entries right below the top of a unit."""
    yield from itertools.islice(unit.iter_DIE_children(top), ENTRY_LIMIT)


def _name(entry: Any) -> str:
    attribute = entry.attributes.get("DW_AT_name")
    if attribute is None or not isinstance(attribute.value, bytes):
        return ""
    return attribute.value[:NAME_LIMIT].decode("utf-8", "replace")


def _place_of(entry: Any, little_endian: bool) -> tuple[int | None, int | None] | None:
    """(address, offset in the TLS block) of a variable with one fixed place, one of them None."""
    attribute = entry.attributes.get("DW_AT_location")
    if attribute is None or not isinstance(attribute.value, list) or not attribute.value or not little_endian:
        return None
    expression = bytes(attribute.value)
    operation, rest = expression[0], expression[1:]
    if operation == _DW_OP_ADDR:
        size = entry.cu["address_size"]
        return (int.from_bytes(rest, "little"), None) if len(rest) == size else None
    size = _CONSTANT_BYTES.get(operation, 0)
    if size and len(rest) == size + 1 and rest[size] in _THREAD_OPERATIONS:
        return None, int.from_bytes(rest[:size], "little")
    return None


def _structure_behind(entry: Any) -> Any:
    """The structure that a typedef leads to; None when it is something else."""
    for _ in range(TYPE_DEPTH_LIMIT):
        if entry.tag == "DW_TAG_structure_type":
            return entry
        if "DW_AT_type" not in entry.attributes:
            return None
        entry = entry.get_DIE_from_attribute("DW_AT_type")
    return None


def _structure(name: str, entry: Any) -> DwarfStructure:
    size = entry.attributes.get("DW_AT_byte_size")
    offsets: dict[str, int] = {}
    for member in itertools.islice(entry.iter_children(), ENTRY_LIMIT):
        place = member.attributes.get("DW_AT_data_member_location")
        if member.tag == "DW_TAG_member" and _name(member) and place is not None and isinstance(place.value, int):
            offsets.setdefault(_name(member), place.value)
    return DwarfStructure(name, size.value if size is not None and isinstance(size.value, int) else 0, offsets)


class _TooMuchToRead(Exception):
    """The file makes pyelftools read more often than any honest one."""


class _BoundedStream:
    """The file as pyelftools reads it: past the end is empty, and the number of reads is limited."""

    def __init__(self, content: bytes | mmap.mmap, reads: int) -> None:
        self._content = content
        self._reads = reads
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}
        self._position = max(base[whence] + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, byte_count: int = -1) -> bytes:
        self._reads -= 1
        if self._reads < 0:
            raise _TooMuchToRead
        end = len(self._content) if byte_count < 0 else self._position + byte_count
        part = self._content[self._position : end]
        self._position += len(part)
        return part
