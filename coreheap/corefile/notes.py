"""All notes of a core in one pass, as a table of where each descriptor lies, and who wrote them.

Knows: the note format, include/uapi/linux/elf.h (NT_*), and the order in which fs/binfmt_elf.c,
gdb and qemu write notes. Does not know: what a descriptor says (``threads``, ``process``).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile.elf import Bytes, Words
from coreheap.evidence import Gap

NT_PRSTATUS, NT_FPREGSET, NT_PRPSINFO, NT_AUXV = 1, 2, 3, 6
NT_SIGINFO: Final = 0x53494749
NT_FILE: Final = 0x46494C45
NT_386_TLS, NT_X86_XSTATE, NT_X86_XSAVE_LAYOUT = 0x200, 0x202, 0x205
NT_ARM_TLS, NT_ARM_PAC_MASK = 0x401, 0x406

NOTE_LIMIT: Final = 1 << 20
"""Notes read at most; a core with 10,000 threads has about 60,000."""
DESCRIPTOR_LIMIT: Final = 1 << 16
"""Bytes read of a descriptor unless more is asked for."""
DAMAGED_NOTES: Final = frozenset(("notes_truncated", "notes_damaged", "notes_too_many"))
"""Causes of the gaps of notes that could not be read to their end."""
_NOTE = struct.Struct("<III")
_OWNERS_OF_LINUX: Final = (b"CORE", b"LINUX")


@dataclass(frozen=True, slots=True)
class Note:
    """Where one note's descriptor lies in the core file."""

    owner: str
    kind: int
    file_offset: int
    byte_count: int


@dataclass(frozen=True, slots=True)
class NoteTable:
    """All notes as columns, in the order of the file; notes that are cut are not in it."""

    owner: npt.NDArray[np.int32]
    """Index in ``owners``."""
    kind: npt.NDArray[np.uint32]
    file_offset: Words
    byte_count: Words
    owners: tuple[bytes, ...]

    def __len__(self) -> int:
        return len(self.kind)

    def row(self, index: int) -> Note:
        return Note(
            text_of(self.owners[self.owner[index]]),
            int(self.kind[index]),
            int(self.file_offset[index]),
            int(self.byte_count[index]),
        )

    def rows(self, kind: int) -> npt.NDArray[np.intp]:
        """Indexes of the notes of this type that Linux, or a writer in its name, owns."""
        ours = [index for index, owner in enumerate(self.owners) if owner in _OWNERS_OF_LINUX]
        return np.flatnonzero((self.kind == kind) & np.isin(self.owner, ours))

    def descriptor(self, data: Bytes, row: int, limit: int = DESCRIPTOR_LIMIT) -> bytes:
        """The content of one note, at most ``limit`` bytes of it."""
        start = int(self.file_offset[row])
        return data[start : start + min(int(self.byte_count[row]), limit)].tobytes()

    def first(self, data: Bytes, kind: int, limit: int = DESCRIPTOR_LIMIT) -> bytes | None:
        """The content of the first note of this type; None when there is none."""
        rows = self.rows(kind)
        return self.descriptor(data, int(rows[0]), limit) if len(rows) else None


def read_notes(data: Bytes, mapping: mmap.mmap, segments: Sequence[tuple[int, int]], gaps: list[Gap]) -> NoteTable:
    """All notes of the note segments, given as (file offset, bytes), in their order.

    ``data`` and ``mapping`` are the same file. A size that lies ends the reading of its segment,
    with a Gap.
    """
    owners: dict[bytes, int] = {}
    owner: list[int] = []
    kind: list[int] = []
    offset: list[int] = []
    sizes: list[int] = []
    unpack = _NOTE.unpack_from
    for segment_start, byte_count in segments:
        position = segment_start
        end = min(segment_start + byte_count, len(data))
        whole = end == segment_start + byte_count
        if not whole:
            gaps.append(Gap("notes_truncated", "the file ends before its notes do; threads may be missing"))
        while position + 12 <= end and len(kind) < NOTE_LIMIT:
            name_bytes, descriptor_bytes, note_kind = unpack(mapping, position)
            name_at = position + 12
            descriptor_at = name_at + ((name_bytes + 3) & ~3)
            if not (name_bytes or note_kind):
                break
            if descriptor_at + descriptor_bytes > end:
                if whole:
                    gaps.append(_oversized_note(position))
                break
            name = mapping[name_at : name_at + min(name_bytes, 32)].partition(b"\0")[0]
            owner.append(owners.setdefault(name, len(owners)))
            kind.append(note_kind)
            offset.append(descriptor_at)
            sizes.append(descriptor_bytes)
            position = descriptor_at + ((descriptor_bytes + 3) & ~3)
    if len(kind) >= NOTE_LIMIT:
        gaps.append(Gap("notes_too_many", f"only the first {NOTE_LIMIT} notes are read"))
    return NoteTable(
        np.array(owner, np.int32),
        np.array(kind, np.uint32),
        np.array(offset, np.uint64),
        np.array(sizes, np.uint64),
        tuple(owners),
    )


def writer_of(table: NoteTable, section_count: int) -> str:
    """The program that wrote the core: "kernel", "gdb", "qemu" or "unknown".

    The kernel (fs/binfmt_elf.c, fill_note_info) starts with NT_PRSTATUS, NT_PRPSINFO, since 3.7
    NT_SIGINFO, then NT_AUXV, and has no section headers but the one of PN_XNUM. gdb
    (gdb/linux-tdep.c) starts with NT_PRPSINFO, since gdb 12 adds a note of its own, and has section
    headers, as bfd makes the file; its notes stand at the end of the file, so that a truncated core
    has none. qemu-user (linux-user/elfload.c) writes NT_PRSTATUS, NT_PRPSINFO, NT_AUXV and no more.
    """
    if b"GDB" in table.owners:
        return "gdb"
    kinds = table.kind[:2].tolist()
    if section_count > 1:
        return "gdb" if kinds[:1] in ([], [NT_PRPSINFO]) else "unknown"
    present = set(np.unique(table.kind).tolist())
    if section_count == 0 and present == {NT_PRSTATUS, NT_PRPSINFO, NT_AUXV}:
        return "qemu"
    if kinds == [NT_PRSTATUS, NT_PRPSINFO]:
        return "kernel"
    return "unknown"


def records_at(data: Bytes, offsets: npt.NDArray[np.intp], layout: np.dtype[np.void]) -> npt.NDArray[np.void]:
    """The records of one structure at these file offsets, copied; each must lie inside the file."""
    if len(offsets) == 0:
        return np.zeros(0, layout)
    windows = np.lib.stride_tricks.sliding_window_view(data, layout.itemsize)
    return windows[offsets].view(layout)[:, 0]


def text_of(raw: bytes) -> str:
    """Text of the process up to its first NUL.

    Bytes that are no UTF-8 come out as backslash escapes, so that it can be written anywhere;
    control characters stay: who shows it escapes them.
    """
    return raw.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _oversized_note(position: int) -> Gap:
    return Gap(
        "notes_damaged",
        f"the note at file offset {position:#x} is larger than its segment; the notes after it are unknown",
    )
