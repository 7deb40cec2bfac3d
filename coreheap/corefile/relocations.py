"""Relocations of an ELF module: which words hold an address of the module, which a thread-local offset.

Knows: RELA, REL with the addend in place, RELR, and where the dynamic section tells of them; read from the module's
file or, where the core has them, from its memory. Does not know: what the words are for.

One reader serves both places. lief reads files only, and measured on fifteen libcs it needs 0.7 s for its import and
3-6 ms a library where this needs 1-3 ms; tests/unit/corefile/test_relocations.py holds the two against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from coreheap.corefile import elf
from coreheap.corefile.elf import Words
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.modules import Module
from coreheap.corefile.symbols import ElfFile
from coreheap.errors import MemoryFault

RELOCATION_LIMIT: Final = 1 << 20
"""Relocations of one table that are looked at; the largest programs have some 500,000."""
DYNAMIC_LIMIT: Final = 1 << 16
_SEGMENT_LIMIT: Final = 512

_DT_PLTRELSZ, _DT_RELA, _DT_RELASZ, _DT_REL, _DT_RELSZ, _DT_PLTREL, _DT_JMPREL = 2, 7, 8, 17, 18, 20, 23
_DT_RELRSZ, _DT_RELR = 35, 36


@dataclass(frozen=True, slots=True)
class _Kinds:
    """Relocation numbers of one machine (its ELF psABI). ``tls_negated`` slots hold the offset to subtract."""

    relative: int
    tls_offset: int
    tls_negated: int | None = None


_KINDS: Final[dict[str, _Kinds]] = {
    "x86_64": _Kinds(relative=8, tls_offset=18),
    "i386": _Kinds(relative=8, tls_offset=14, tls_negated=37),
    "aarch64": _Kinds(relative=1027, tls_offset=1030),
}


class Image(Protocol):
    """Bytes of a module by the addresses of its file, before relocation."""

    word_bytes: int

    def read(self, address: int, byte_count: int) -> bytes | None:
        """All bytes of the range; None where one is missing."""

    @property
    def dynamic(self) -> dict[int, int]:
        """tag -> value of the dynamic section; empty where there is none."""

    def word_at_rest(self, place: Words) -> tuple[Words, npt.NDArray[np.bool_]]:
        """The words at some places as they were before relocation, and for each whether it is known."""

    def unmoved(self, value: int) -> int:
        """A dynamic entry's address as an address of the file."""


@dataclass(frozen=True, slots=True)
class Relocations:
    """Relocated words by address before relocation, uint64 columns.

    ``relative_target`` is what a relative relocation makes its place point to, valid where ``relative_known``: in
    memory the addend of REL and RELR is gone where the program has written another value since.
    ``thread_place`` are words that hold an offset from the thread pointer once relocated, ``thread_addend`` the offset
    in the module's own TLS block (valid where ``thread_known``), ``thread_symbol`` the number in .dynsym of the symbol
    that it counts from (0: the block's start). ``thread_is_negated``: the word is to be subtracted.
    """

    relative_place: Words
    relative_target: Words
    relative_known: npt.NDArray[np.bool_]
    thread_place: Words
    thread_addend: Words
    thread_known: npt.NDArray[np.bool_]
    thread_symbol: Words
    thread_is_negated: npt.NDArray[np.bool_]


class FileImage:
    """A module's file (``Image``)."""

    def __init__(self, file: ElfFile) -> None:
        header = elf.header_of(file.data[:64].tobytes())
        self.word_bytes = 8 if header is None or header.bits == 64 else 4
        self.kind = 0 if header is None else header.kind
        self._data = file.data
        self.segments = file.segments
        rows = file.segments.rows_of_kind(elf.PT_LOAD)[:_SEGMENT_LIMIT].tolist()
        loads = [
            (int(file.segments.address[row]), int(file.segments.file_bytes[row]), int(file.segments.file_offset[row]))
            for row in rows
        ]
        self._loads = [(start, start + size, offset) for start, size, offset in loads if start + size < 1 << 64]

    def read(self, address: int, byte_count: int) -> bytes | None:
        for start, end, offset in self._loads:
            if start <= address and address + byte_count <= end and byte_count >= 0:
                place = offset + address - start
                content = self._data[place : place + byte_count].tobytes()
                return content if len(content) == byte_count else None
        return None

    @property
    def dynamic(self) -> dict[int, int]:
        for row in self.segments.rows_of_kind(elf.PT_DYNAMIC)[:1].tolist():
            offset = int(self.segments.file_offset[row])
            size = min(int(self.segments.file_bytes[row]), DYNAMIC_LIMIT)
            return elf.dynamic_entries(self._data[offset : offset + size], self.word_bytes)
        return {}

    def word_at_rest(self, place: Words) -> tuple[Words, npt.NDArray[np.bool_]]:
        words = np.zeros(len(place), np.uint64)
        known = np.zeros(len(place), np.bool_)
        for start, end, offset in self._loads:
            end = min(end, start + max(len(self._data) - offset, 0))
            if end - start < self.word_bytes:
                continue
            inside = (place >= np.uint64(start)) & (place <= np.uint64(end - self.word_bytes)) & ~known
            at = (place[inside] - np.uint64(start)).astype(np.intp) + offset
            words[inside] = _words_at(self._data, at, self.word_bytes)
            known |= inside
        return words, known

    def unmoved(self, value: int) -> int:
        return value


class MemoryImage:
    """A module as the core has it (``Image``): its dynamic section and tables, as far as they were dumped."""

    def __init__(self, memory: AddressSpace, module: Module) -> None:
        self.word_bytes = memory.word_bytes
        self._memory = memory
        self._module = module
        self._bias = module.load_bias or 0
        self._mask = (1 << 8 * memory.word_bytes) - 1

    def read(self, address: int, byte_count: int) -> bytes | None:
        start = address + self._bias & self._mask
        try:
            return self._memory.view(start, start + byte_count).tobytes()
        except MemoryFault:
            return None

    @property
    def dynamic(self) -> dict[int, int]:
        return dict(self._module.dynamic)

    def word_at_rest(self, place: Words) -> tuple[Words, npt.NDArray[np.bool_]]:
        words = np.zeros(len(place), np.uint64)
        known = np.zeros(len(place), np.bool_)
        mask, bias = np.uint64(self._mask), np.uint64(self._bias)
        address = (place + bias) & mask
        for low, high in self._memory.saved_runs_within(self._module.start, self._module.end):
            if high - low < self.word_bytes:
                continue
            inside = (address >= np.uint64(low)) & (address <= np.uint64(high - self.word_bytes))
            at = (address[inside] - np.uint64(low)).astype(np.intp)
            words[inside] = (_words_at(self._memory.view(low, high), at, self.word_bytes) - bias) & mask
            known |= inside
        # What does not lead into the module was written since; what does may have been, too.
        known &= (words >= np.uint64(self._module.start - self._bias & self._mask)) & (
            words < np.uint64(self._module.end - self._bias & self._mask)
        )
        return words, known

    def unmoved(self, value: int) -> int:
        """glibc relocates most addresses of the dynamic section in place (elf/get-dynamic-info.h), DT_RELR never."""
        return value - self._bias if self._module.start <= value < self._module.end else value


def relocations_of(image: Image, machine: str) -> Relocations | None:
    """The relative and thread-local relocations of a module; None where the image does not have them.

    Tables are read up to RELOCATION_LIMIT rows; one that is cut or lies outside of the image counts as empty.
    """
    kinds = _KINDS.get(machine)
    dynamic = image.dynamic
    if kinds is None or not dynamic:
        return None
    parts: list[tuple[Words, Words, Words, npt.NDArray[np.bool_]]] = []
    missing = False
    for address_tag, size_tag, explicit in (
        (_DT_RELA, _DT_RELASZ, True),
        (_DT_REL, _DT_RELSZ, False),
        (_DT_JMPREL, _DT_PLTRELSZ, dynamic.get(_DT_PLTREL) == _DT_RELA),
    ):
        if dynamic.get(address_tag) and dynamic.get(size_tag):
            part = _table(image, dynamic[address_tag], dynamic[size_tag], explicit)
            if part is None:
                missing = True
            else:
                parts.append(part)
    compact = _NO_WORDS
    if dynamic.get(_DT_RELR) and dynamic.get(_DT_RELRSZ):
        packed = _read_table(image, dynamic[_DT_RELR], dynamic[_DT_RELRSZ], image.word_bytes)
        if packed is None:
            missing = True
        else:
            compact = _places_of_relr(packed, image.word_bytes)
    if missing and not parts and not len(compact):
        return None
    place, kind, addend, known = _joined(parts)
    relative = (kind & np.uint64(_type_mask(image.word_bytes))) == np.uint64(kinds.relative)
    compact_target, compact_known = image.word_at_rest(compact)
    wanted = [kinds.tls_offset] + ([kinds.tls_negated] if kinds.tls_negated is not None else [])
    number = kind & np.uint64(_type_mask(image.word_bytes))
    thread = np.isin(number, np.array(wanted, np.uint64))
    shift = np.uint64(32 if image.word_bytes == 8 else 8)
    return Relocations(
        relative_place=np.concatenate([place[relative], compact]),
        relative_target=np.concatenate([addend[relative], compact_target]),
        relative_known=np.concatenate([known[relative], compact_known]),
        thread_place=place[thread],
        thread_addend=addend[thread],
        thread_known=known[thread],
        thread_symbol=kind[thread] >> shift,
        thread_is_negated=number[thread] != np.uint64(kinds.tls_offset),
    )


_NO_WORDS: Final[Words] = np.zeros(0, np.uint64)


def _type_mask(word_bytes: int) -> int:
    """ELF64_R_TYPE or ELF32_R_TYPE."""
    return 0xFFFFFFFF if word_bytes == 8 else 0xFF


def _read_table(image: Image, address: int, byte_count: int, row_bytes: int) -> Words | None:
    """The words of a table of the dynamic section, whole rows only; None where the image does not have them."""
    byte_count = min(byte_count, RELOCATION_LIMIT * row_bytes) // row_bytes * row_bytes
    content = image.read(image.unmoved(address), byte_count)
    return None if content is None else elf.words_in(content, image.word_bytes)


def _table(
    image: Image, address: int, byte_count: int, explicit: bool
) -> tuple[Words, Words, Words, npt.NDArray[np.bool_]] | None:
    """(place, r_info, addend, addend known) of a REL or RELA table."""
    columns = 3 if explicit else 2
    words = _read_table(image, address, byte_count, columns * image.word_bytes)
    if words is None:
        return None
    rows = words.reshape(-1, columns)
    if explicit:
        return rows[:, 0], rows[:, 1], rows[:, 2], np.ones(len(rows), np.bool_)
    addend, known = image.word_at_rest(rows[:, 0])
    return rows[:, 0], rows[:, 1], addend, known


def _joined(
    parts: list[tuple[Words, Words, Words, npt.NDArray[np.bool_]]],
) -> tuple[Words, Words, Words, npt.NDArray[np.bool_]]:
    if not parts:
        return _NO_WORDS, _NO_WORDS, _NO_WORDS, np.zeros(0, np.bool_)
    place, kind, addend, known = zip(*parts, strict=True)
    return np.concatenate(place), np.concatenate(kind), np.concatenate(addend), np.concatenate(known)


def _places_of_relr(packed: Words, word_bytes: int) -> Words:
    """The places that a RELR table names: an even word is a place, an odd one a bitmap of the words behind the last.

    Source: the generic ABI's SHT_RELR (gabi, 2022). At most RELOCATION_LIMIT places.
    """
    mask = (1 << 8 * word_bytes) - 1
    steps = 8 * word_bytes - 1
    places: list[int] = []
    following = 0
    for entry in packed.tolist():
        if entry & 1 == 0:
            places.append(entry)
            following = entry + word_bytes
        else:
            bits = entry >> 1
            while bits:
                lowest = bits & -bits
                places.append(following + word_bytes * (lowest.bit_length() - 1) & mask)
                bits ^= lowest
            following += steps * word_bytes
        if len(places) > RELOCATION_LIMIT:
            break
    return np.array(places[:RELOCATION_LIMIT], np.uint64) & np.uint64(mask)


def _words_at(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.intp], word_bytes: int) -> Words:
    """The words at byte offsets, which need not be aligned but must lie inside."""
    words = np.zeros(len(offsets), np.uint64)
    for byte in range(word_bytes):
        words |= data[offsets + byte].astype(np.uint64) << np.uint64(8 * byte)
    return words
