"""Local ELF files of modules: build-id, symbols, the name of the debug file.

Knows: how to open a file that may be anything, and how to ask pyelftools about it without trusting
what the file claims. Does not know: whether the file belongs to a core (``modules`` verifies that by
build-id first).

Segments and the build-id in them are read by ``elf``, the same code that reads them in a core's
memory: that makes the two comparable, needs no section header to be intact, and costs 0.4 ms a
candidate where pyelftools needs its import (70 ms) and 4 ms. All else is pyelftools', imported with
the first question for a symbol; none of its types leaves this file.
"""

from __future__ import annotations

import lzma
import mmap
import os
import stat
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from coreheap.corefile import elf
from coreheap.corefile.elf import Bytes, ElfHeader, ProgramHeaders
from coreheap.corefile.file_guard import FileGuard

STT_OBJECT, STT_FUNC, STT_TLS, STT_GNU_IFUNC = 1, 2, 6, 10
DYNSYM, SYMTAB, MINI_DEBUG_INFO = ".dynsym", ".symtab", "MiniDebugInfo"
"""Tables that a symbol may come from; the last is the one inside .gnu_debugdata."""
_SHN_LORESERVE: Final = 0xFF00
"""Section numbers from here on are no sections: SHN_ABS (0xfff1) has no address that moves."""
SECTION_LIMIT: Final = 1 << 14
SYMBOL_LIMIT: Final = 1 << 18
"""Rows of a table that are walked: pyelftools needs 25 us for each, so 7 s at most."""
READ_LIMIT: Final = 1 << 20
SYMBOL_READ_LIMIT: Final = 12 * SYMBOL_LIMIT
"""pyelftools reads a symbol field by field (6 reads) and its name by 64 bytes."""
NOTE_LIMIT: Final = 1 << 16
SONAME_LIMIT: Final = 256
MINI_DEBUG_INFO_LIMIT: Final = 256 << 20

_Answer = TypeVar("_Answer")


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
    """Defined symbols by name and by address."""

    def __init__(self, symbols: Iterable[Symbol]) -> None:
        self._by_name: dict[str, Symbol] = {}
        defaults: list[tuple[str, Symbol]] = []
        located: list[Symbol] = []
        for symbol in symbols:
            self._by_name.setdefault(symbol.name, symbol)
            name, separator, _ = symbol.name.partition("@@")
            if separator:
                defaults.append((name, symbol))
            if symbol.kind in (STT_OBJECT, STT_FUNC, STT_GNU_IFUNC):
                located.append(symbol)
        for name, symbol in defaults:
            self._by_name.setdefault(name, symbol)
        self._located = sorted(located, key=lambda symbol: symbol.value)
        self._values = [symbol.value for symbol in self._located]

    def find(self, name: str) -> Symbol | None:
        """The symbol of that name, of several versions the default one (``name@@VERSION``)."""
        return self._by_name.get(name)

    def containing(self, value: int) -> Symbol | None:
        """The function or object that holds a value; None between symbols."""
        row = bisect_right(self._values, value) - 1
        if row < 0:
            return None
        symbol = self._located[row]
        return symbol if value < symbol.value + max(symbol.byte_count, 1) else None


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
        self._stream = _BoundedStream(content)

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
        for section in self._sections:
            if section["sh_type"] == "SHT_NOTE":
                found = elf.build_id_of_notes(self._section_bytes(section, NOTE_LIMIT))
                if found:
                    return found
        return None

    @cached_property
    def soname(self) -> str:
        """DT_SONAME, "" when there is none; its own text, not escaped."""
        dynamic = self._section_of_type("SHT_DYNAMIC")
        if dynamic is None:
            return ""
        self._stream.reads_left = READ_LIMIT
        tag = self._ask(None, next, dynamic.iter_tags("DT_SONAME"), None)
        return "" if tag is None else str(tag.soname)[:SONAME_LIMIT]

    @cached_property
    def debug_link(self) -> str:
        """The file name in .gnu_debuglink, "" when there is none or it is more than a name."""
        content = elf.section_named(self.data, self._header, b".gnu_debuglink", 4096)
        name = os.fsdecode(content.partition(b"\0")[0])
        return "" if "/" in name or name in (".", "..") else name

    @cached_property
    def is_debug_file(self) -> bool:
        """Whether its code is elsewhere (objcopy --only-keep-debug): good for symbols, not for the module's bytes."""
        sections = elf.section_headers_of(self.data, self._header)
        return bool(((sections.kind == elf.SHT_NOBITS) & ((sections.flags & np.uint64(elf.SHF_EXECINSTR)) != 0)).any())

    def find_symbol(self, name: str) -> Symbol | None:
        """The symbol of that name from .dynsym, .symtab or MiniDebugInfo.

        Of an exported name with several versions it is any one.
        """
        symbol = self._exported(name)
        if symbol is None and self._may_name(self._symtab_section, name):
            symbol = self._symtab.find(name)
        if symbol is None and self._mini_debug_info is not None:
            symbol = _from_mini_debug_info(self._mini_debug_info.find_symbol(name))
        return symbol

    def symbol_containing(self, value: int) -> Symbol | None:
        """The function or object that holds an address before relocation; None between symbols."""
        symbol = self._symtab.containing(value) or self._dynsym.containing(value)
        if symbol is None and self._mini_debug_info is not None:
            symbol = _from_mini_debug_info(self._mini_debug_info.symbol_containing(value))
        return symbol

    def _exported(self, name: str) -> Symbol | None:
        """A symbol of .dynsym, by its hash table as the dynamic linker finds it."""
        for kind in ("SHT_GNU_HASH", "SHT_HASH"):
            table = self._section_of_type(kind)
            if table is not None:
                self._stream.reads_left = READ_LIMIT
                return _defined(self._ask(None, table.get_symbol, name), DYNSYM)
        return self._dynsym.find(name) if self._may_name(self._dynsym_section, name) else None

    def _may_name(self, section: Any, name: str) -> bool:
        """Whether the name's bytes occur in the string table; almost every module is asked for a
        name that it does not have, and shall not walk 100,000 symbols to say so."""
        if section is None:
            return False
        size = len(self._content)
        start = min(section.stringtable["sh_offset"], size)
        end = min(start + section.stringtable["sh_size"], size)
        # Tables share endings of names, so what comes before is open; behind may stand a version.
        return any(self._content.find(name.encode() + behind, start, end) >= 0 for behind in (b"\0", b"@"))

    @cached_property
    def _symtab_section(self) -> Any:
        return self._section_of_type("SHT_SYMTAB")

    @cached_property
    def _dynsym_section(self) -> Any:
        return self._section_of_type("SHT_DYNSYM")

    @cached_property
    def _symtab(self) -> SymbolTable:
        return self._symbols_of(self._symtab_section, SYMTAB)

    @cached_property
    def _dynsym(self) -> SymbolTable:
        return self._symbols_of(self._dynsym_section, DYNSYM)

    def _symbols_of(self, section: Any, table: str) -> SymbolTable:
        """The defined symbols of a table, up to the first that cannot be read."""
        symbols: list[Symbol] = []
        if section is not None and not section.compressed:
            self._stream.reads_left = SYMBOL_READ_LIMIT
            for number in range(min(section.num_symbols(), SYMBOL_LIMIT)):
                row = self._ask(None, section.get_symbol, number)
                if row is None:
                    break
                symbol = _defined(row, table)
                if symbol is not None:
                    symbols.append(symbol)
        return SymbolTable(symbols)

    @cached_property
    def _mini_debug_info(self) -> ElfFile | None:
        """The ELF file in .gnu_debugdata, an xz stream as Fedora's packages have it."""
        section = self._section_named(".gnu_debugdata")
        packed = self._section_bytes(section, MINI_DEBUG_INFO_LIMIT)
        if not packed:
            return None
        try:
            unpacked = lzma.LZMADecompressor(memlimit=MINI_DEBUG_INFO_LIMIT).decompress(packed, MINI_DEBUG_INFO_LIMIT)
        except lzma.LZMAError:
            return None
        header = elf.header_of(unpacked)
        return None if header is None else _MiniDebugInfo(self.path, unpacked, header)

    @cached_property
    def _sections(self) -> tuple[Any, ...]:
        """pyelftools' sections, without those that it cannot make sense of."""
        from elftools.elf.elffile import ELFFile

        stream: Any = self._stream
        stream.reads_left = READ_LIMIT
        elf_file: Any = self._ask(None, ELFFile, stream)
        if elf_file is None:
            return ()
        count = min(self._ask(0, elf_file.num_sections), SECTION_LIMIT)
        found = (self._ask(None, elf_file.get_section, number) for number in range(count))
        return tuple(section for section in found if section is not None)

    def _section_named(self, name: str) -> Any:
        """The first section of that name that has content in this file, else None."""
        return next((s for s in self._sections if s.name == name and s["sh_type"] != "SHT_NOBITS"), None)

    def _section_of_type(self, kind: str) -> Any:
        return next((section for section in self._sections if section["sh_type"] == kind), None)

    def _section_bytes(self, section: Any, limit: int) -> bytes:
        """The first ``limit`` bytes of a section.

        Not ``section.data()``: that takes the size from the file's word and unpacks what is
        compressed.
        """
        if section is None or section.compressed:
            return b""
        start = section["sh_offset"]
        return self.data[start : start + min(section["sh_size"], limit)].tobytes()

    def _ask(self, otherwise: _Answer, question: Callable[..., _Answer], *arguments: object) -> _Answer:
        """What pyelftools answers, ``otherwise`` where it trips over a damaged file.

        Beside its own error it lets pass what comes of numbers that it did not check;
        tests/unit/corefile/test_symbols.py has a file for each.
        """
        from elftools.common.exceptions import ELFError

        try:
            return question(*arguments)
        except (ELFError, _TooMuchToRead):
            return otherwise
        # Entry sizes of 0, string offsets past their table, entries cut short, and its asserts on section types.
        except (ZeroDivisionError, IndexError, struct.error, AssertionError):
            return otherwise


class _MiniDebugInfo(ElfFile):
    """It holds no other one: a file cannot make coreheap unpack for ever."""

    _mini_debug_info = None


class _TooMuchToRead(Exception):
    """A table in a file claims more than the limit."""


class _BoundedStream:
    """The file as pyelftools reads it: past the end is empty, and the number of reads is limited.

    pyelftools believes counts: of sections, hash buckets, chains that may go in a circle. All its
    loops read, so this ends them.
    """

    def __init__(self, content: bytes | mmap.mmap) -> None:
        self.reads_left = 0
        self._content = content
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._content)}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, byte_count: int) -> bytes:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise _TooMuchToRead
        start = self._position
        part = self._content[start : start + max(byte_count, 0)]
        self._position = start + len(part)
        return part


def _from_mini_debug_info(symbol: Symbol | None) -> Symbol | None:
    return None if symbol is None else replace(symbol, table=MINI_DEBUG_INFO)


def _defined(symbol: Any, table: str) -> Symbol | None:
    """A symbol of pyelftools as ours; None when it is undefined or no address."""
    from elftools.elf.enums import ENUM_ST_INFO_TYPE

    # Enum fields are names where pyelftools has one (SHN_UNDEF, STT_FUNC), else numbers.
    if symbol is None:
        return None
    section, kind = symbol["st_shndx"], symbol["st_info"]["type"]
    if isinstance(section, str) or section >= _SHN_LORESERVE:
        return None
    number = ENUM_ST_INFO_TYPE.get(kind, kind)
    return Symbol(symbol.name, symbol["st_value"], symbol["st_size"], number, table)
