"""Local ELF files of modules: build-id, sections and symbol tables.

Knows: how to open a file that may be anything, and how to look up names in .dynsym and .symtab.
Does not know: whether the file belongs to a core (``modules`` verifies that by build-id first).

A lookup finds the name's bytes in the string table and compares offsets in one numpy column: about
1 ms for libc with 40,000 symbols and no import, where pyelftools takes 0.2 s and lief 0.5 s for its
import alone.
"""

from __future__ import annotations

import lzma
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile import elf
from coreheap.corefile.elf import Bytes, ElfHeader, ProgramHeaders, Words

STT_OBJECT, STT_FUNC, STT_TLS, STT_GNU_IFUNC = 1, 2, 6, 10
_SHT_SYMTAB, _SHT_STRTAB, _SHT_NOTE, _SHT_NOBITS, _SHT_DYNSYM = 2, 3, 7, 8, 11
_SHF_COMPRESSED: Final = 0x800
SECTION_LIMIT: Final = 1 << 16
MINI_DEBUG_INFO_LIMIT: Final = 256 << 20

_SECTION: Final[dict[int, np.dtype[np.void]]] = {
    bits: np.dtype(
        [
            ("name", "<u4"),
            ("kind", "<u4"),
            ("flags", word),
            ("address", word),
            ("offset", word),
            ("byte_count", word),
            ("link", "<u4"),
            ("info", "<u4"),
            ("alignment", word),
            ("entry_bytes", word),
        ]
    )
    for bits, word in ((64, "<u8"), (32, "<u4"))
}
_SYMBOL: Final[dict[int, np.dtype[np.void]]] = {
    64: np.dtype(
        [
            ("name", "<u4"),
            ("info", "u1"),
            ("other", "u1"),
            ("section", "<u2"),
            ("value", "<u8"),
            ("byte_count", "<u8"),
        ]
    ),
    32: np.dtype(
        [
            ("name", "<u4"),
            ("value", "<u4"),
            ("byte_count", "<u4"),
            ("info", "u1"),
            ("other", "u1"),
            ("section", "<u2"),
        ]
    ),
}


@dataclass(frozen=True, slots=True)
class Symbol:
    """A defined symbol; ``value`` is an address before relocation, of STT_TLS a TLS offset."""

    name: str
    value: int
    byte_count: int
    kind: int
    """STT_OBJECT, STT_FUNC, STT_TLS, …"""


@dataclass(frozen=True, slots=True)
class Section:
    """One section header with its name."""

    name: bytes
    kind: int
    flags: int
    address: int
    file_offset: int
    byte_count: int
    link: int


class SymbolTable:
    """The defined symbols of one .dynsym or .symtab, as columns."""

    def __init__(
        self, table: npt.NDArray[np.void], strings: bytes | mmap.mmap, start: int, end: int
    ) -> None:
        # SHN_UNDEF is 0; SHN_ABS (0xfff1) has no address that moves with the module.
        defined = table[(table["section"] != 0) & (table["section"] < 0xFF00)]
        self.name_offset: npt.NDArray[np.uint32] = defined["name"]
        self.value: Words = defined["value"].astype(np.uint64)
        self.byte_count: Words = defined["byte_count"].astype(np.uint64)
        self.kind: npt.NDArray[np.uint8] = (defined["info"] & 15).astype(np.uint8)
        self._strings = strings
        self._start = start
        self._end = end

    def __len__(self) -> int:
        return len(self.value)

    def find(self, name: str) -> Symbol | None:
        """The symbol of that name, of several versions the default one (``@@``)."""
        raw = name.encode()
        for ending in (b"\0", b"@@"):
            rows = self._rows_named(raw + ending)
            if len(rows):
                return self._symbol(int(rows[0]), name)
        return None

    def with_prefix(self, prefix: str) -> Iterator[Symbol]:
        """All symbols whose names begin with ``prefix``."""
        for row in self._rows_named(prefix.encode()).tolist():
            yield self._symbol(row, self._name(row))

    def containing(self, value: int) -> Symbol | None:
        """The function or object that holds a value; None between symbols."""
        order, values = self._by_value
        row = int(np.searchsorted(values, np.uint64(value), side="right")) - 1
        if row < 0:
            return None
        index = int(order[row])
        if value >= int(self.value[index]) + max(int(self.byte_count[index]), 1):
            return None
        return self._symbol(index, self._name(index))

    @cached_property
    def _by_value(self) -> tuple[npt.NDArray[np.intp], Words]:
        rows = np.flatnonzero(np.isin(self.kind, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC)))
        order = rows[np.argsort(self.value[rows], kind="stable")]
        return order, self.value[order]

    def _rows_named(self, raw: bytes) -> npt.NDArray[np.intp]:
        """Rows whose name begins with ``raw``; in a string table names may share their ends."""
        offsets: list[int] = []
        position = self._strings.find(raw, self._start, self._end)
        while position >= 0:
            offsets.append(position - self._start)
            position = self._strings.find(raw, position + 1, self._end)
        return np.flatnonzero(np.isin(self.name_offset, np.array(offsets, np.int64)))

    def _name(self, row: int) -> str:
        start = self._start + int(self.name_offset[row])
        end = self._strings.find(b"\0", start, self._end)
        return bytes(self._strings[start : end if end >= 0 else self._end]).decode(
            "utf-8", "backslashreplace"
        )

    def _symbol(self, row: int, name: str) -> Symbol:
        return Symbol(name, int(self.value[row]), int(self.byte_count[row]), int(self.kind[row]))


class ElfFile:
    """An ELF file on this machine; not trusted either: what is damaged is just not found."""

    def __init__(self, path: Path, content: bytes | mmap.mmap, header: ElfHeader) -> None:
        self.path = path
        self.header = header
        self._content = content
        self.data: Bytes = np.frombuffer(content, np.uint8)
        self.segments: ProgramHeaders = elf.program_headers_of(
            self.data, header, header.program_header_count
        )

    @classmethod
    def open(cls, path: Path) -> ElfFile | None:
        """The ELF file at ``path``; None when there is none or it cannot be read.

        Only regular files of real file systems: a path that a core names must not make coreheap
        wait for a fifo or /proc/kmsg.
        """
        if os.path.realpath(path).startswith(("/proc/", "/sys/", "/dev/")):
            return None
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError):
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < 52:
                return None
            header = elf.header_of(os.pread(descriptor, 64, 0))
            if header is None:
                return None
            return cls(path, mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), header)
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)

    def bytes_at(self, file_offset: int, byte_count: int) -> bytes:
        """The bytes at a place of the file, fewer where it ends."""
        return self.data[file_offset : file_offset + max(byte_count, 0)].tobytes()

    @cached_property
    def build_id(self) -> bytes | None:
        """The GNU build-id from a note segment, or in a debug file from a note section."""
        for row in self.segments.rows_of_kind(elf.PT_NOTE).tolist():
            offset, byte_count = (
                int(self.segments.file_offset[row]),
                int(self.segments.file_bytes[row]),
            )
            alignment = int(self.segments.alignment[row])
            found = elf.build_id_of_notes(
                self.bytes_at(offset, min(byte_count, 1 << 16)), alignment
            )
            if found:
                return found
        for section in self.sections:
            if section.kind == _SHT_NOTE:
                content = self.bytes_at(section.file_offset, min(section.byte_count, 1 << 16))
                found = elf.build_id_of_notes(content)
                if found:
                    return found
        return None

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The section headers, none when the table is damaged."""
        header, layout = self.header, _SECTION[self.header.bits]
        count = min(header.section_header_count, SECTION_LIMIT)
        room = len(self.data) - header.section_header_offset
        if (
            header.section_header_bytes != layout.itemsize
            or room < count * layout.itemsize
            or not count
        ):
            return ()
        table = np.ndarray((count,), layout, buffer=self.data, offset=header.section_header_offset)
        names = b""
        if header.section_names_index < count:
            row = table[header.section_names_index]
            names = self.bytes_at(int(row["offset"]), min(int(row["byte_count"]), 1 << 22))
        columns = (
            table[name].tolist()
            for name in ("name", "kind", "flags", "address", "offset", "byte_count", "link")
        )
        return tuple(
            Section(_name_at(names, name), kind, flags, address, offset, byte_count, link)
            for name, kind, flags, address, offset, byte_count, link in zip(*columns, strict=True)
        )

    def section(self, name: bytes) -> Section | None:
        """The first section of that name that has content in this file."""
        for section in self.sections:
            if section.name == name and section.kind != _SHT_NOBITS:
                return section
        return None

    @cached_property
    def symbol_tables(self) -> tuple[SymbolTable, ...]:
        """.symtab, .dynsym and the .symtab in .gnu_debugdata, as far as the file has them, in that
        order."""
        tables = [
            table
            for kind in (_SHT_SYMTAB, _SHT_DYNSYM)
            for section in self.sections
            if section.kind == kind and (table := self._symbols_of(section)) is not None
        ]
        mini = self._mini_debug_info()
        if mini is not None:
            tables.extend(mini.symbol_tables)
        return tuple(tables)

    def find_symbol(self, name: str) -> Symbol | None:
        for table in self.symbol_tables:
            symbol = table.find(name)
            if symbol is not None:
                return symbol
        return None

    @cached_property
    def debug_link(self) -> str:
        """The file name in .gnu_debuglink, "" when there is none or it is more than a name."""
        section = self.section(b".gnu_debuglink")
        if section is None:
            return ""
        raw = self.bytes_at(section.file_offset, min(section.byte_count, 4096)).partition(b"\0")[0]
        name = os.fsdecode(raw)
        return "" if "/" in name or name in ("", ".", "..") else name

    def _symbols_of(self, section: Section) -> SymbolTable | None:
        layout = _SYMBOL[self.header.bits]
        if section.link >= len(self.sections) or section.flags & _SHF_COMPRESSED:
            return None
        strings = self.sections[section.link]
        size = len(self.data)
        if strings.kind != _SHT_STRTAB or strings.file_offset + strings.byte_count > size:
            return None
        if section.file_offset > size:
            return None
        count = min(section.byte_count, size - section.file_offset) // layout.itemsize
        table = np.ndarray((count,), layout, buffer=self.data, offset=section.file_offset)
        start = strings.file_offset
        return SymbolTable(table, self._content, start, start + strings.byte_count)

    def _mini_debug_info(self) -> ElfFile | None:
        """The ELF file in .gnu_debugdata, an xz stream as Fedora's packages have it
        (MiniDebugInfo)."""
        section = self.section(b".gnu_debugdata")
        if section is None:
            return None
        try:
            unpacked = lzma.LZMADecompressor(memlimit=MINI_DEBUG_INFO_LIMIT).decompress(
                self.bytes_at(section.file_offset, section.byte_count), MINI_DEBUG_INFO_LIMIT
            )
        except lzma.LZMAError:
            return None
        header = elf.header_of(unpacked)
        return None if header is None else ElfFile(self.path, unpacked, header)


def _name_at(names: bytes, offset: int) -> bytes:
    end = names.find(b"\0", offset)
    return names[offset:end] if end >= 0 else b""
