"""Symbol tables as columns, without an object for each symbol: the rows of a file's tables, and which function an address is in.

Knows: Elf_Sym, section headers, the dynamic symbol table as memory has it. Does not know: which file belongs to a module.

Few questions are asked of tables with up to some 100,000 rows: numpy reads them in a few milliseconds.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile import elf
from coreheap.corefile.elf import Bytes

ROW_LIMIT: Final = 1 << 22
NAME_LIMIT: Final = 512
ALIAS_LIMIT: Final = 32
"""Symbols with one address, and symbols nested in others, that are looked at."""
LARGEST_LABEL: Final = 4096
"""So far a function reaches at most whose symbol has no size, as assembly's often have."""
_FUNCTION_KINDS: Final = (2, 10)
"""STT_FUNC, STT_GNU_IFUNC."""
_SHN_LORESERVE: Final = 0xFF00
"""Section numbers from here on are no sections: SHN_ABS (0xfff1) has no address that moves."""
_ROWS: Final[dict[int, np.dtype[np.void]]] = {
    8: np.dtype(
        [("name", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2"), ("value", "<u8"), ("size", "<u8")]
    ),
    4: np.dtype(
        [("name", "<u4"), ("value", "<u4"), ("size", "<u4"), ("info", "u1"), ("other", "u1"), ("section", "<u2")]
    ),
}


def row_bytes(word_bytes: int) -> int:
    """sizeof(Elf64_Sym) or sizeof(Elf32_Sym)."""
    return _ROWS[word_bytes].itemsize


def defined_rows(rows: Bytes, word_bytes: int) -> npt.NDArray[np.void]:
    """The symbols of a table that have an address, as records ``name``, ``info``, ``section``, ``value``, ``size``."""
    layout = _ROWS[word_bytes]
    count = min(len(rows) // layout.itemsize, ROW_LIMIT)
    table: npt.NDArray[np.void] = np.frombuffer(rows[: count * layout.itemsize].tobytes(), layout)
    defined: npt.NDArray[np.void] = table[(table["section"] != 0) & (table["section"] < _SHN_LORESERVE)]
    return defined


class FunctionTable:
    """The functions of one symbol table, by their addresses before relocation."""

    def __init__(self, rows: Bytes, strings: Bytes, word_bytes: int) -> None:
        table = defined_rows(rows, word_bytes)
        table = table[np.isin(table["info"] & 0xF, _FUNCTION_KINDS)]
        table = table[np.argsort(table["value"], kind="stable")]
        self._value = table["value"].astype(np.uint64)
        self._size = table["size"].astype(np.uint64)
        self._name_at = table["name"]
        self._strings = strings

    def __len__(self) -> int:
        return len(self._value)

    def at(self, value: int) -> tuple[str, int] | None:
        """Name of the function that holds an address, without its version, and where it starts; None between functions.

        Of names for one address the one with the fewest underscores in front, then the shortest: what a program calls it.
        """
        if not 0 <= value < 1 << 64:
            return None
        end = int(np.searchsorted(self._value, np.uint64(value), side="right"))
        start: int | None = None
        names: list[str] = []
        for row in range(end - 1, max(end - 1 - ALIAS_LIMIT, -1), -1):
            begin, size = int(self._value[row]), int(self._size[row])
            if start is not None and begin != start:
                break
            reach = size or (LARGEST_LABEL if row == end - 1 or begin == int(self._value[end - 1]) else 0)
            if value - begin < reach:
                name = self._name(row)
                if name:
                    start = begin
                    names.append(name)
        if start is None:
            return None
        return min(names, key=lambda name: (len(name) - len(name.lstrip("_")), len(name), name)), start

    def _name(self, row: int) -> str:
        at = int(self._name_at[row])
        raw = self._strings[at : at + NAME_LIMIT].tobytes().partition(b"\0")[0]
        return raw.decode("utf-8", "replace").partition("@")[0]


def tables_of(data: Bytes) -> list[FunctionTable]:
    """The tables of an ELF image with section headers, .symtab first; those without a function are left out."""
    header = elf.header_of(data[:64].tobytes())
    if header is None:
        return []
    sections = elf.section_headers_of(data, header)
    tables: list[FunctionTable] = []
    for kind in (elf.SHT_SYMTAB, elf.SHT_DYNSYM):
        place = sections.place_of_kind(kind)
        names = None if place is None else sections.place_of_strings(place[2])
        if place is not None and names is not None:
            table = FunctionTable(_part(data, *place[:2]), _part(data, *names), header.word_bytes)
            if len(table):
                tables.append(table)
    return tables


def _part(data: Bytes, start: int, byte_count: int) -> Bytes:
    return data[start : start + byte_count] if start < len(data) else data[:0]
