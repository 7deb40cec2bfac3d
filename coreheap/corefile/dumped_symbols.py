"""Exported symbols of a module as its own memory has them: .dynsym by the hash table that the dynamic linker uses.

Knows: DT_GNU_HASH (its layout is binutils' and glibc's, elf/dl-lookup.c), DT_HASH of the generic ABI, Elf_Sym. Does not
know: files. For modules whose file is not at hand and whose text was dumped; what is missing is just not found.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from coreheap.corefile import elf
from coreheap.corefile.relocations import Image
from coreheap.corefile.symbols import DYNSYM, Symbol

CHAIN_LIMIT: Final = 1 << 12
"""Symbols of one hash bucket that are looked at; a libc's fullest has about ten."""
_DT_HASH, _DT_GNU_HASH = 4, 0x6FFFFEF5
_SHN_UNDEF, _SHN_LORESERVE = 0, 0xFF00
_SYMBOL: Final = {8: struct.Struct("<IBBHQQ"), 4: struct.Struct("<IIIBBH")}


class DumpedSymbols:
    """The defined symbols of a module's .dynsym, read through its dynamic section."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._dynamic = image.dynamic
        self._layout = _SYMBOL[image.word_bytes]

    def find(self, name: str) -> Symbol | None:
        """The symbol of that name, of several versions any one; None where it or a table is not in the core."""
        raw = name.encode()
        numbers = self._by_gnu_hash(raw) if _DT_GNU_HASH in self._dynamic else self._by_hash(raw)
        for number in numbers:
            symbol = self._symbol(number, raw)
            if symbol is not None:
                return symbol
        return None

    def _by_gnu_hash(self, name: bytes) -> Iterator[int]:
        """Numbers of the symbols in the name's bucket whose hash is the name's."""
        table = self._dynamic[_DT_GNU_HASH]
        head = self._numbers(table, 0, 4)
        if head is None or not head[0]:
            return
        bucket_count, first_number, bloom_words, _ = head
        wanted = 5381
        for byte in name:
            wanted = wanted * 33 + byte & 0xFFFFFFFF
        buckets_at = 16 + bloom_words * self._image.word_bytes
        bucket = self._numbers(table, buckets_at + wanted % bucket_count * 4, 1)
        if bucket is None or bucket[0] < first_number:
            return
        chains_at = buckets_at + 4 * bucket_count
        for number in range(bucket[0], bucket[0] + CHAIN_LIMIT):
            found = self._numbers(table, chains_at + (number - first_number) * 4, 1)
            if found is None:
                return
            # The lowest bit of the hash is spent on marking the chain's end.
            if found[0] | 1 == wanted | 1:
                yield number
            if found[0] & 1:
                return

    def _by_hash(self, name: bytes) -> Iterator[int]:
        table = self._dynamic.get(_DT_HASH)
        head = None if table is None else self._numbers(table, 0, 2)
        if table is None or head is None or not head[0]:
            return
        wanted = 0
        for byte in name:
            wanted = (wanted << 4) + byte
            wanted = (wanted ^ wanted >> 24 & 0xF0) & 0x0FFFFFFF
        at = 8 + wanted % head[0] * 4
        for _ in range(CHAIN_LIMIT):
            number = self._numbers(table, at, 1)
            if number is None or not number[0]:
                return
            yield number[0]
            at = 8 + (head[0] + number[0]) * 4

    def _symbol(self, number: int, name: bytes) -> Symbol | None:
        """The symbol of that number if it is defined and has the name."""
        table, strings = self._dynamic.get(elf.DT_SYMTAB), self._dynamic.get(elf.DT_STRTAB)
        if table is None or strings is None:
            return None
        row = self._image.read(self._image.unmoved(table) + number * self._layout.size, self._layout.size)
        if row is None:
            return None
        if self._image.word_bytes == 8:
            name_at, info, _, section, value, byte_count = self._layout.unpack(row)
        else:
            name_at, value, byte_count, info, _, section = self._layout.unpack(row)
        if section == _SHN_UNDEF or section >= _SHN_LORESERVE:
            return None
        if self._image.read(self._image.unmoved(strings) + name_at, len(name) + 1) != name + b"\0":
            return None
        return Symbol(name.decode(), value, byte_count, info & 0xF, DYNSYM)

    def _numbers(self, table: int, offset: int, count: int) -> tuple[int, ...] | None:
        """32-bit numbers of a table that the dynamic section names."""
        content = self._image.read(self._image.unmoved(table) + offset, 4 * count)
        return None if content is None else struct.unpack(f"<{count}I", content)
