"""Where the structures of a sound core lie in its file: what structure-aware mutation aims at.

ELF headers, program headers and notes are read here, by a parser of its own; places inside the process (arenas, sub-heaps,
chunks, tcaches, TLS, link map, dynamic sections) are taken from the report on the sound core.
"""

from __future__ import annotations

import struct
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import coreheap
from coreheap.analysis import AnalysisOptions
from coreheap.corefile import Core
from coreheap.report import Report

PT_LOAD, PT_DYNAMIC, PT_NOTE = 1, 2, 4
NT_PRPSINFO, NT_FILE = 3, 0x46494C45
DT_DEBUG = 21
CHUNKS_PER_STATE = 400
LINK_MAP_LIMIT = 64
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Structure:
    """One structure in the file: ``fields`` are (offset in the file, bytes) of its words."""

    offset: int
    byte_count: int
    fields: tuple[tuple[int, int], ...]
    address: int | None = None


@dataclass(slots=True)
class SoundCore:
    """A core before it is damaged."""

    name: str
    content: bytes
    word_bytes: int
    sysroot: Path | None
    groups: dict[str, list[Structure]] = field(default_factory=dict)
    boundaries: list[int] = field(default_factory=list)
    """Offsets where a structure begins or ends, and where one of its fields does."""
    addresses: list[int] = field(default_factory=list)
    """Addresses that mean something: of structures, and of the ends of mappings."""
    segments: list[tuple[int, int, int]] = field(default_factory=list)
    """(first address, file offset, bytes in the file) of PT_LOAD, by address."""

    def add(self, group: str, offset: int, byte_count: int, word_bytes: int, address: int | None = None) -> None:
        """A structure of equal words, cut at the end of the file."""
        byte_count = min(byte_count, len(self.content) - offset)
        if offset < 0 or byte_count < word_bytes:
            return
        fields = tuple((offset + at, word_bytes) for at in range(0, byte_count - word_bytes + 1, word_bytes))
        self.add_fields(group, offset, byte_count, fields, address)

    def add_fields(
        self, group: str, offset: int, byte_count: int, fields: tuple[tuple[int, int], ...], address: int | None = None
    ) -> None:
        self.groups.setdefault(group, []).append(Structure(offset, byte_count, fields, address))
        if address is not None:
            self.addresses.append(address)

    def offset_of(self, address: int) -> int | None:
        """Where the byte at an address lies in the file; None where it is not saved."""
        number = bisect_right(self.segments, (address, 1 << 64, 0)) - 1
        if number < 0:
            return None
        start, offset, byte_count = self.segments[number]
        return offset + address - start if address < start + byte_count else None

    def add_at(self, group: str, address: int | None, byte_count: int) -> None:
        """A structure in the process's memory; nothing happens where it is not saved."""
        offset = None if address is None else self.offset_of(address)
        if offset is not None:
            self.add(group, offset, byte_count, self.word_bytes, address)

    def word(self, address: int) -> int | None:
        offset = self.offset_of(address)
        if offset is None:
            return None
        return int.from_bytes(self.content[offset : offset + self.word_bytes], "little")


def sound_core(name: str, path: Path, sysroot: Path | None) -> SoundCore:
    """The structures of the core at ``path``; files of its modules are looked for below ``sysroot`` only."""
    content = path.read_bytes()
    core = SoundCore(name, content, 8 if content[4:5] == b"\2" else 4, sysroot)
    _add_headers(core)
    with tempfile.TemporaryDirectory() as nothing, coreheap.open(path, sysroot=sysroot or Path(nothing)) as opened:
        report = coreheap.analyze(opened, AnalysisOptions(leaks=False))
        _add_modules(core, opened)
        _add_threads(core, opened)
        _add_heap(core, report)
    edges = {0, len(content)}
    for structures in core.groups.values():
        for structure in structures:
            edges.update((structure.offset, structure.offset + structure.byte_count))
            edges.update(offset for offset, _ in structure.fields[:8])
    core.boundaries = sorted(edge for edge in edges if edge < len(content))
    core.addresses = sorted({address for address in core.addresses if 0 < address < 1 << (8 * core.word_bytes)})
    return core


def packed_core(name: str, path: Path) -> SoundCore:
    """A compressed core, of which only its first bytes have a structure that is known here."""
    core = SoundCore(name, path.read_bytes(), 8, None)
    core.add("packed", 0, 64, 1)
    core.boundaries = list(range(min(64, len(core.content))))
    return core


# ------------------------------------------------------------------------------------- ELF


def _unpacked(core: SoundCore, offset: int, layout: str) -> tuple[int, ...]:
    return struct.unpack_from("<" + layout, core.content, offset)


def _fields(offset: int, layout: Iterable[int]) -> tuple[tuple[int, int], ...]:
    found = []
    for byte_count in layout:
        found.append((offset, byte_count))
        offset += byte_count
    return tuple(found)


def _add_headers(core: SoundCore) -> None:
    word = core.word_bytes
    header_bytes, entry_bytes = (64, 56) if word == 8 else (52, 32)
    core.add_fields(
        "elf_header", 0, header_bytes, _fields(0, (1,) * 16 + (2, 2, 4, word, word, word, 4, 2, 2, 2, 2, 2, 2))
    )
    (table,) = _unpacked(core, 32 if word == 8 else 28, "Q" if word == 8 else "I")
    (count,) = _unpacked(core, 56 if word == 8 else 44, "H")
    for row in range(count):
        at = table + row * entry_bytes
        if word == 8:
            kind, _, offset, address, _, file_bytes, memory_bytes, _ = _unpacked(core, at, "IIQQQQQQ")
            layout = (4, 4) + (8,) * 6
        else:
            kind, offset, address, _, file_bytes, memory_bytes, _, _ = _unpacked(core, at, "8I")
            layout = (4,) * 8
        core.add_fields("program_headers", at, entry_bytes, _fields(at, layout))
        if kind == PT_LOAD:
            core.addresses += [address, address + memory_bytes]
            if file_bytes:
                core.segments.append((address, offset, file_bytes))
                core.add("segment_ends", offset + file_bytes - 64, 64, word)
        elif kind == PT_NOTE:
            _add_notes(core, offset, offset + file_bytes)
    core.segments.sort()


def _add_notes(core: SoundCore, offset: int, end: int) -> None:
    while offset + 12 <= end:
        name_bytes, byte_count, kind = _unpacked(core, offset, "III")
        content = offset + 12 + (name_bytes + 3 & ~3)
        core.add_fields("note_headers", offset, 12 + name_bytes, _fields(offset, (4, 4, 4)))
        if kind == NT_FILE:
            _add_file_note(core, content, byte_count)
        elif kind == NT_PRPSINFO:
            core.add("process_note", content, byte_count, 4)
            core.add("text", content + byte_count - 96, 96, 1)
        else:
            core.add("notes", content, byte_count, core.word_bytes)
        offset = content + (byte_count + 3 & ~3)


def _add_file_note(core: SoundCore, content: int, byte_count: int) -> None:
    word = core.word_bytes
    count = int.from_bytes(core.content[content : content + word], "little")
    names = content + (2 + 3 * count) * word
    core.add("file_note", content, names - content, word)
    for name in core.content[names : content + byte_count].split(b"\0")[:count]:
        core.add("text", names, len(name) + 1, 1)
        names += len(name) + 1


# ------------------------------------------------------------------------------------- the process


def _add_modules(core: SoundCore, opened: Core) -> None:
    for module in opened.modules:
        core.add_at("module_headers", module.start, 1024)
        headers = module.program_headers
        if headers is None or module.load_bias is None:
            continue
        for row in headers.rows_of_kind(PT_DYNAMIC).tolist():
            address = module.load_bias + int(headers.address[row])
            core.add_at("dynamic", address, int(headers.memory_bytes[row]))
        if module.is_executable:
            _add_link_map(core, module.dynamic.get(DT_DEBUG, 0))
    for kind in (25, 31, 33):  # AT_RANDOM, AT_EXECFN, AT_SYSINFO_EHDR
        core.add_at("auxv_targets", opened.auxv.get(kind), 64)
    stack = opened.initial_stack
    if stack is not None:
        core.add_at("text", opened.auxv.get(31), 64)


def _add_link_map(core: SoundCore, r_debug: int) -> None:
    word = core.word_bytes
    core.add_at("link_map", r_debug, 5 * word)
    place = core.word(r_debug + word)
    for _ in range(LINK_MAP_LIMIT):
        if not place:
            return
        core.add_at("link_map", place, 5 * word)
        name = core.word(place + word)
        offset = None if name is None else core.offset_of(name)
        if offset is not None:
            core.add("text", offset, core.content[offset : offset + 256].find(b"\0") + 1, 1)
        place = core.word(place + 3 * word)


def _add_threads(core: SoundCore, opened: Core) -> None:
    for thread in opened.threads[:32]:
        pointer = thread.thread_pointer
        if pointer is not None:
            core.add_at("tls", pointer - 0x180, 0x180)
            core.add_at("tls", pointer, 0x340)
        core.add_at("stacks", thread.stack_pointer, 0x400)


def _add_heap(core: SoundCore, report: Report) -> None:
    heap = report.heap
    if heap is None:
        raise ValueError(f"{core.name}: no heap was found in the sound core")
    word = core.word_bytes
    for arena in heap.arenas:
        core.add_at("malloc_state", arena.address, 280 * word)
        core.add_at("top", arena.top_address, 2 * word)
        for sub_heap in arena.sub_heaps:
            core.add_at("heap_info", sub_heap.address, 8 * word)
    if heap.parameters is not None:
        core.add_at("mp_", heap.parameters.address, 24 * word)
    for cache in heap.thread_caches:
        core.add_at("tcache", cache.address, 0x2A0)
    for state, address in _chunks(heap.chunks.batches()):
        core.add_at(state, address, 6 * word)


def _chunks(batches: Iterable[coreheap.heap.ChunkBatch]) -> Iterator[tuple[str, int]]:
    """(group, header address) of some chunks of each state."""
    taken: dict[str, int] = {}
    for batch in batches:
        for address, code in zip(batch.header_address.tolist(), batch.state.tolist(), strict=True):
            label = coreheap.heap.ChunkState(code).label
            group = "mmapped_chunks" if batch.is_mmapped else f"chunks_{label}"
            taken[group] = taken.get(group, 0) + 1
            if taken[group] <= CHUNKS_PER_STATE:
                yield group, address
