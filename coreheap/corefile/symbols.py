"""Local ELF files of modules: build-id, symbols, the name of the debug file.

Knows: how to open a file that may be anything, without trusting what it claims. Does not know: whether the file belongs
to a core (``modules`` verifies that by build-id first).

Segments and the build-id in them are read by ``elf``, the same code that reads them in a core's memory: that makes the
two comparable and needs no section header to be intact. Symbol tables are columns: a program's own may have 100,000 rows,
of which a few are asked for.
"""

from __future__ import annotations

import lzma
import mmap
import os
import stat
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile import elf
from coreheap.corefile.elf import Bytes, ElfHeader, ProgramHeaders, SectionHeaders, Words
from coreheap.corefile.file_guard import FileGuard
from coreheap.corefile.function_symbols import defined_rows

STT_OBJECT, STT_FUNC, STT_TLS, STT_GNU_IFUNC = 1, 2, 6, 10
DYNSYM, SYMTAB, MINI_DEBUG_INFO = ".dynsym", ".symtab", "MiniDebugInfo"
"""Tables that a symbol may come from; the last is the one inside .gnu_debugdata."""
NOTE_LIMIT: Final = 1 << 16
SONAME_LIMIT: Final = 256
DYNAMIC_LIMIT: Final = 1 << 16
MINI_DEBUG_INFO_LIMIT: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Symbol:
    """A defined symbol; ``value`` is an address before relocation, of STT_TLS a TLS offset."""

    name: str
    value: int
    byte_count: int
    kind: int
    """STT_OBJECT, STT_FUNC, STT_TLS, …"""
    table: str = SYMTAB
    """Where it was found: DYNSYM, SYMTAB or MINI_DEBUG_INFO."""


class SymbolTable:
    """The defined symbols of one table by name and by address: columns, and an object for what is asked for."""

    def __init__(
        self, rows: Bytes, word_bytes: int, content: bytes | mmap.mmap, names: tuple[int, int], table: str
    ) -> None:
        """``names``: where the table of names begins and ends in ``content``."""
        self._rows = defined_rows(rows, word_bytes)
        self._content = content
        self._names = names
        self._table = table

    def find(self, name: str) -> Symbol | None:
        """The symbol of that name, of several versions the default one (``name@@VERSION``)."""
        # Almost every module is asked for a name that it does not have.
        for behind in (b"\0", b"@@"):
            places = self._places_of(name.encode() + behind)
            rows = np.flatnonzero(np.isin(self._rows["name"], places)) if places else np.zeros(0, np.intp)
            if len(rows):
                return self._symbol(int(rows[0]))
        return None

    def containing(self, value: int) -> Symbol | None:
        """The function or object that holds a value; None between symbols."""
        if not 0 <= value < 1 << 64:
            return None
        row = int(np.searchsorted(self._values, np.uint64(value), side="right")) - 1
        if row < 0:
            return None
        symbol = self._symbol(int(self._located[row]))
        return symbol if value < symbol.value + max(symbol.byte_count, 1) else None

    @cached_property
    def _located(self) -> npt.NDArray[np.intp]:
        """Functions and objects by their values."""
        located = np.flatnonzero(np.isin(self._rows["info"] & 0xF, (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC)))
        order = np.argsort(self._rows["value"][located], kind="stable")
        return located[order]

    @cached_property
    def _values(self) -> Words:
        values: Words = self._rows["value"][self._located].astype(np.uint64)
        return values

    def _places_of(self, text: bytes) -> list[int]:
        """Where in the table of names a text stands: it may be the end of a longer name."""
        start, end = self._names
        places: list[int] = []
        at = self._content.find(text, start, end)
        while at >= 0:
            places.append(at - start)
            at = self._content.find(text, at + 1, end)
        return places

    def _symbol(self, row: int) -> Symbol:
        found = self._rows[row]
        start, end = self._names
        at = min(start + int(found["name"]), end)
        nul = self._content.find(b"\0", at, end)
        name = bytes(self._content[at : end if nul < 0 else nul]).decode("utf-8", "replace")
        return Symbol(name, int(found["value"]), int(found["size"]), int(found["info"]) & 0xF, self._table)


class ElfFile:
    """An ELF file on this machine; not trusted either: what is damaged is just not found."""

    def __init__(self, path: Path, content: bytes | mmap.mmap, header: ElfHeader, origin: str = "") -> None:
        self.path = path
        self.origin = origin
        """Where the file was fetched from; "" for one that lay on this machine."""
        self.data: Bytes = np.frombuffer(content, np.uint8)
        self.segments: ProgramHeaders = elf.program_headers_of(self.data, header, header.program_header_count)
        self.guard: FileGuard | None = None
        """Watches the mapping; None for content that is in memory."""
        self._header = header
        self._content = content

    @classmethod
    def open(cls, path: Path, origin: str = "") -> ElfFile | None:
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
            mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
            file = cls(path, mapping, header, origin)
            file.guard = FileGuard(mapping, descriptor, os.fspath(path))
            return file
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)

    @cached_property
    def build_id(self) -> bytes | None:
        """The GNU build-id from a note segment, or in a debug file from a note section.

        The note segments of a debug file (objcopy --only-keep-debug) lead to bytes that it does not
        have.
        """
        segments = self.segments
        for row in segments.rows_of_kind(elf.PT_NOTE).tolist():
            start = int(segments.file_offset[row])
            end = start + min(int(segments.file_bytes[row]), NOTE_LIMIT)
            notes = self.data[start:end].tobytes()
            found = elf.build_id_of_notes(notes, int(segments.alignment[row]))
            if found:
                return found
        sections = self._sections
        for row in np.flatnonzero(sections.kind == elf.SHT_NOTE).tolist():
            found = elf.build_id_of_notes(
                self._part(int(sections.file_offset[row]), min(int(sections.byte_count[row]), NOTE_LIMIT))
            )
            if found:
                return found
        return None

    @cached_property
    def soname(self) -> str:
        """DT_SONAME, "" when there is none; its own text, not escaped."""
        dynamic = self._sections.place_of_kind(elf.SHT_DYNAMIC)
        names = None if dynamic is None else self._sections.place_of_strings(dynamic[2])
        if dynamic is None or names is None:
            return ""
        content = self._part(dynamic[0], min(dynamic[1], DYNAMIC_LIMIT))
        at = elf.dynamic_entries(content, self._header.word_bytes).get(elf.DT_SONAME)
        if at is None or at >= names[1]:
            return ""
        return self._part(names[0] + at, SONAME_LIMIT).partition(b"\0")[0].decode("utf-8", "replace")

    @cached_property
    def debug_link(self) -> str:
        """The file name in .gnu_debuglink, "" when there is none or it is more than a name."""
        content = elf.section_named(self.data, self._header, b".gnu_debuglink", 4096)
        name = os.fsdecode(content.partition(b"\0")[0])
        return "" if "/" in name or name in (".", "..") else name

    @cached_property
    def is_debug_file(self) -> bool:
        """Whether its code is elsewhere (objcopy --only-keep-debug): good for symbols, not for the module's bytes."""
        sections = self._sections
        return bool(((sections.kind == elf.SHT_NOBITS) & ((sections.flags & np.uint64(elf.SHF_EXECINSTR)) != 0)).any())

    @cached_property
    def has_debug_information(self) -> bool:
        """Whether it has DWARF, compressed or not; most libraries have none, and it takes long to see that otherwise."""
        places = (elf.section_place(self.data, self._header, name) for name in (b".debug_info", b".zdebug_info"))
        return any(place is not None for place in places)

    def find_symbol(self, name: str) -> Symbol | None:
        """The symbol of that name from .dynsym, .symtab or MiniDebugInfo.

        Of an exported name with several versions it is any one.
        """
        symbol = self._dynsym.find(name) or self._symtab.find(name)
        if symbol is None and self._mini_debug_info is not None:
            symbol = _from_mini_debug_info(self._mini_debug_info.find_symbol(name))
        return symbol

    def symbol_containing(self, value: int) -> Symbol | None:
        """The function or object that holds an address before relocation; None between symbols."""
        symbol = self._symtab.containing(value) or self._dynsym.containing(value)
        if symbol is None and self._mini_debug_info is not None:
            symbol = _from_mini_debug_info(self._mini_debug_info.symbol_containing(value))
        return symbol

    @cached_property
    def _symtab(self) -> SymbolTable:
        return self._symbols_of(elf.SHT_SYMTAB, SYMTAB)

    @cached_property
    def _dynsym(self) -> SymbolTable:
        return self._symbols_of(elf.SHT_DYNSYM, DYNSYM)

    def _symbols_of(self, kind: int, table: str) -> SymbolTable:
        """The symbols of the first table of a kind, as far as the file has it."""
        place = self._sections.place_of_kind(kind)
        names = None if place is None else self._sections.place_of_strings(place[2])
        if place is None or names is None:
            return SymbolTable(self.data[:0], self._header.word_bytes, b"", (0, 0), table)
        size = len(self._content)
        start, end = (min(offset, size) for offset in (names[0], sum(names)))
        rows = self.data[min(place[0], size) : min(sum(place[:2]), size)]
        return SymbolTable(rows, self._header.word_bytes, self._content, (start, end), table)

    @cached_property
    def _mini_debug_info(self) -> ElfFile | None:
        """The ELF file in .gnu_debugdata, an xz stream as Fedora's packages have it."""
        place = elf.section_place(self.data, self._header, b".gnu_debugdata")
        packed = b"" if place is None else self._part(place[0], min(place[1], MINI_DEBUG_INFO_LIMIT))
        if not packed:
            return None
        try:
            unpacked = lzma.LZMADecompressor(memlimit=MINI_DEBUG_INFO_LIMIT).decompress(packed, MINI_DEBUG_INFO_LIMIT)
        except lzma.LZMAError:
            return None
        header = elf.header_of(unpacked)
        return None if header is None else _MiniDebugInfo(self.path, unpacked, header)

    @cached_property
    def _sections(self) -> SectionHeaders:
        return elf.section_headers_of(self.data, self._header)

    def _part(self, start: int, byte_count: int) -> bytes:
        """So many bytes of the file from an offset, fewer where it ends before."""
        return self.data[start : start + byte_count].tobytes() if start < len(self.data) else b""


class _MiniDebugInfo(ElfFile):
    """It holds no other one: a file cannot make coreheap unpack for ever."""

    _mini_debug_info = None


def _from_mini_debug_info(symbol: Symbol | None) -> Symbol | None:
    return None if symbol is None else replace(symbol, table=MINI_DEBUG_INFO)
