"""The fixed structures of ELF files: headers, program headers, sections, notes, dynamic entries.

Knows: the layouts of the ELF specification for little-endian 32 and 64 bit files, read from any
buffer (a core, a library's file, a page of a library in a core). Does not know: what a core means,
and it raises nothing of its own; a structure that is not there or is cut comes out as None or as
the rows that are there.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

ELF_MAGIC: Final = b"\x7fELF"
ET_REL, ET_EXEC, ET_DYN, ET_CORE = 1, 2, 3, 4
PT_LOAD, PT_DYNAMIC, PT_INTERP, PT_NOTE, PT_PHDR, PT_TLS = 1, 2, 3, 4, 6, 7
PF_X, PF_W, PF_R = 1, 2, 4
PN_XNUM: Final = 0xFFFF
NT_GNU_BUILD_ID: Final = 3
DT_NULL, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SONAME, DT_DEBUG = 0, 5, 6, 10, 14, 21

_HEADER_64 = struct.Struct("<HHIQQQIHHHHHH")
_HEADER_32 = struct.Struct("<HHIIIIIHHHHHH")
_IDENT_BYTES: Final = 16
SHT_SYMTAB, SHT_DYNAMIC, SHT_NOTE, SHT_NOBITS, SHT_DYNSYM = 2, 6, 7, 8, 11
SHF_EXECINSTR: Final = 4
SHF_COMPRESSED: Final = 0x800
SECTION_LIMIT: Final = 1 << 14
SECTION_NAMES_BYTES: Final = 1 << 20
_SECTION_INFO_64 = 44
"""Offset of sh_info in an Elf64_Shdr; 28 in an Elf32_Shdr."""

_PROGRAM_HEADER: Final[dict[int, np.dtype[np.void]]] = {
    64: np.dtype(
        [
            ("kind", "<u4"),
            ("flags", "<u4"),
            ("file_offset", "<u8"),
            ("address", "<u8"),
            ("physical", "<u8"),
            ("file_bytes", "<u8"),
            ("memory_bytes", "<u8"),
            ("alignment", "<u8"),
        ]
    ),
    32: np.dtype(
        [
            ("kind", "<u4"),
            ("file_offset", "<u4"),
            ("address", "<u4"),
            ("physical", "<u4"),
            ("file_bytes", "<u4"),
            ("memory_bytes", "<u4"),
            ("flags", "<u4"),
            ("alignment", "<u4"),
        ]
    ),
}

_SECTION_HEADER: Final[dict[int, np.dtype[np.void]]] = {
    64: np.dtype(
        {
            "names": ["name", "kind", "flags", "file_offset", "byte_count", "link"],
            "formats": ["<u4", "<u4", "<u8", "<u8", "<u8", "<u4"],
            "offsets": [0, 4, 8, 24, 32, 40],
            "itemsize": 64,
        }
    ),
    32: np.dtype(
        {
            "names": ["name", "kind", "flags", "file_offset", "byte_count", "link"],
            "formats": ["<u4"] * 6,
            "offsets": [0, 4, 8, 16, 20, 24],
            "itemsize": 40,
        }
    ),
}


@dataclass(frozen=True, slots=True)
class ElfHeader:
    """An ELF header, its class and byte order already checked to be ones that can be read."""

    bits: int
    """32 or 64."""
    kind: int
    """e_type: ET_CORE, ET_DYN, …"""
    machine: int
    os_abi: int
    program_header_offset: int
    program_header_bytes: int
    """e_phentsize."""
    program_header_count: int
    """e_phnum as written; PN_XNUM means that the count stands elsewhere."""
    section_header_offset: int
    section_header_bytes: int
    section_header_count: int
    section_names_index: int

    @property
    def header_bytes(self) -> int:
        return 64 if self.bits == 64 else 52

    @property
    def word_bytes(self) -> int:
        return self.bits // 8


@dataclass(frozen=True, slots=True)
class ProgramHeaders:
    """A program header table as columns, one row a segment, in the order of the table."""

    kind: npt.NDArray[np.uint32]
    flags: npt.NDArray[np.uint32]
    file_offset: Words
    address: Words
    physical: Words
    """p_paddr: 0 in the cores of processes."""
    file_bytes: Words
    memory_bytes: Words
    alignment: Words

    def __len__(self) -> int:
        return len(self.kind)

    def rows_of_kind(self, kind: int) -> npt.NDArray[np.intp]:
        """Indexes of the rows with this p_type."""
        return np.flatnonzero(self.kind == kind)


@dataclass(frozen=True, slots=True)
class SectionHeaders:
    """A section header table as columns, one row a section."""

    name: npt.NDArray[np.uint32]
    """Offsets of the names in section ``e_shstrndx``."""
    kind: npt.NDArray[np.uint32]
    flags: Words
    file_offset: Words
    byte_count: Words
    link: npt.NDArray[np.uint32]
    """sh_link: of symbols and dynamic entries the section of their names."""

    def __len__(self) -> int:
        return len(self.name)

    def place_of_kind(self, kind: int) -> tuple[int, int, int] | None:
        """Offset, bytes and sh_link of the first section of a type that is not compressed, as its header claims them."""
        rows = np.flatnonzero(self.kind == kind)[:1]
        if not len(rows) or int(self.flags[rows[0]]) & SHF_COMPRESSED:
            return None
        row = rows[0]
        return int(self.file_offset[row]), int(self.byte_count[row]), int(self.link[row])

    def place_of_strings(self, number: int) -> tuple[int, int] | None:
        """Offset and bytes of a section of names; None where it has no content in this file."""
        if number >= len(self) or int(self.kind[number]) == SHT_NOBITS:
            return None
        return int(self.file_offset[number]), int(self.byte_count[number])


def header_of(buffer: bytes | memoryview) -> ElfHeader | None:
    """The little-endian ELF header at the start of a buffer; None when there is no whole one."""
    head = bytes(buffer[:64])
    if len(head) < 52 or head[:4] != ELF_MAGIC or head[5] != 1 or head[4] not in (1, 2):
        return None
    layout, bits = (_HEADER_64, 64) if head[4] == 2 else (_HEADER_32, 32)
    if len(head) < _IDENT_BYTES + layout.size:
        return None
    fields = layout.unpack_from(head, _IDENT_BYTES)
    return ElfHeader(
        bits=bits,
        kind=fields[0],
        machine=fields[1],
        os_abi=head[7],
        program_header_offset=fields[4],
        section_header_offset=fields[5],
        program_header_bytes=fields[8],
        program_header_count=fields[9],
        section_header_bytes=fields[10],
        section_header_count=fields[11],
        section_names_index=fields[12],
    )


def program_header_entry_bytes(bits: int) -> int:
    """sizeof(Elf64_Phdr) or sizeof(Elf32_Phdr)."""
    return _PROGRAM_HEADER[bits].itemsize


def program_headers_of(data: Bytes, header: ElfHeader, count: int) -> ProgramHeaders:
    """The first ``count`` program headers, fewer when the buffer ends before.

    A table whose entries are smaller than the structure, or that lies outside of the buffer, has no
    rows.
    """
    layout = _PROGRAM_HEADER[header.bits]
    stride = header.program_header_bytes
    room = len(data) - header.program_header_offset
    rows = 0
    if stride >= layout.itemsize and room >= layout.itemsize:
        rows = min(count, (room - layout.itemsize) // stride + 1)
    table: npt.NDArray[np.void] = np.zeros(0, layout)
    if rows > 0:
        table = np.ndarray((rows,), layout, buffer=data, offset=header.program_header_offset, strides=(stride,))

    def column(name: str) -> Words:
        return table[name].astype(np.uint64)

    return ProgramHeaders(
        kind=table["kind"].astype(np.uint32),
        flags=table["flags"].astype(np.uint32),
        file_offset=column("file_offset"),
        address=column("address"),
        physical=column("physical"),
        file_bytes=column("file_bytes"),
        memory_bytes=column("memory_bytes"),
        alignment=column("alignment"),
    )


def section_headers_of(data: Bytes, header: ElfHeader) -> SectionHeaders:
    """The section headers of a file; no rows where it has none, or where the table lies outside of it."""
    layout = _SECTION_HEADER[header.bits]
    stride = header.section_header_bytes
    room = len(data) - header.section_header_offset
    rows = 0
    if header.section_header_offset and stride >= layout.itemsize and room >= layout.itemsize:
        rows = min(header.section_header_count, (room - layout.itemsize) // stride + 1, SECTION_LIMIT)
    table: npt.NDArray[np.void] = np.zeros(0, layout)
    if rows > 0:
        table = np.ndarray((rows,), layout, buffer=data, offset=header.section_header_offset, strides=(stride,))
    return SectionHeaders(
        name=table["name"].astype(np.uint32),
        kind=table["kind"].astype(np.uint32),
        flags=table["flags"].astype(np.uint64),
        file_offset=table["file_offset"].astype(np.uint64),
        byte_count=table["byte_count"].astype(np.uint64),
        link=table["link"].astype(np.uint32),
    )


def section_named(data: Bytes, header: ElfHeader, name: bytes, limit: int) -> bytes:
    """The first ``limit`` bytes of the first section of that name; empty where it has no content in this file.

    Without a library that makes an object of every section: this is asked of every module (0.03 against 2 ms).
    """
    place = section_place(data, header, name)
    return b"" if place is None else data[place[0] : place[0] + min(place[1], limit)].tobytes()


def section_place(data: Bytes, header: ElfHeader, name: bytes) -> tuple[int, int] | None:
    """Offset and bytes of the first section of that name, as its header claims them; None where it has no content here."""
    sections = section_headers_of(data, header)
    if header.section_names_index >= len(sections):
        return None
    start = int(sections.file_offset[header.section_names_index])
    size = min(int(sections.byte_count[header.section_names_index]), SECTION_NAMES_BYTES)
    # A linker may store a name as the end of another one.
    names = data[start : start + size].tobytes() + b"\0"
    rows = [
        row
        for row in np.flatnonzero(sections.kind != SHT_NOBITS).tolist()
        if names.startswith(name + b"\0", int(sections.name[row]))
    ]
    return (int(sections.file_offset[rows[0]]), int(sections.byte_count[rows[0]])) if rows else None


def extended_program_header_count(data: Bytes, header: ElfHeader) -> int | None:
    """The count that sh_info of section header 0 holds when e_phnum is PN_XNUM; None if cut."""
    offset = header.section_header_offset + (_SECTION_INFO_64 if header.bits == 64 else 28)
    if header.section_header_offset == 0 or offset + 4 > len(data):
        return None
    return int.from_bytes(data[offset : offset + 4].tobytes(), "little")


def build_id_of_notes(notes: bytes, alignment: int = 4) -> bytes | None:
    """The GNU build-id in the content of a note segment or section; None when it holds none."""
    align = 8 if alignment == 8 else 4
    position = 0
    while position + 12 <= len(notes):
        name_bytes, descriptor_bytes, kind = struct.unpack_from("<III", notes, position)
        name_at = position + 12
        descriptor_at = name_at + _aligned(name_bytes, align)
        if kind == NT_GNU_BUILD_ID and notes[name_at : name_at + name_bytes] == b"GNU\0":
            build_id = notes[descriptor_at : descriptor_at + descriptor_bytes]
            # 20 bytes by default; ld accepts any even length. An empty or absurd one identifies
            # nothing.
            return build_id if 4 <= len(build_id) == descriptor_bytes <= 64 else None
        position = descriptor_at + _aligned(descriptor_bytes, align)
    return None


def words_in(data: bytes | memoryview | Bytes, word_bytes: int) -> Words:
    """The little-endian words of a buffer as uint64; a cut word at the end is left out."""
    kind: Any = "<u8" if word_bytes == 8 else "<u4"
    count = len(data) // word_bytes
    return np.frombuffer(data, kind, count).astype(np.uint64)


def dynamic_entries(data: bytes | memoryview | Bytes, word_bytes: int) -> dict[int, int]:
    """tag -> value of a dynamic section up to DT_NULL; of tags that occur more often the first."""
    words = words_in(data, word_bytes)
    pairs = words[: len(words) // 2 * 2].reshape(-1, 2)
    end = np.flatnonzero(pairs[:, 0] == DT_NULL)
    entries: dict[int, int] = {}
    for tag, value in pairs[: end[0] if len(end) else len(pairs)].tolist():
        entries.setdefault(tag, value)
    return entries


def buffer_of(array: npt.NDArray[Any]) -> memoryview:
    """The memory of a contiguous array; its items come out as Python's integers."""
    # numpy's stubs know of the buffer protocol only from Python 3.12 on.
    items: Any = array
    return memoryview(items)


def _aligned(byte_count: int, alignment: int) -> int:
    return (byte_count + alignment - 1) & ~(alignment - 1)
