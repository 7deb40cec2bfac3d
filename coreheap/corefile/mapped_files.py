"""NT_FILE: which parts of which files were mapped where.

Knows: fs/binfmt_elf.c, fill_files_note. Does not know: whether a file is an ELF object, or here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, overload

import numpy as np

from coreheap.corefile.elf import Bytes, Words, words_in
from coreheap.corefile.notes import NT_FILE, NoteTable, text_of
from coreheap.evidence import Gap

NOTE_BYTES: Final = 64 << 20
"""Bytes read of NT_FILE; the kernel writes at most 4 MiB (16 by sysctl), gdb as many as there
are."""
ROW_LIMIT: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A range of addresses and the part of a file that it shows; ``path`` is not escaped."""

    start: int
    end: int
    file_offset: int
    path: str


class MappedFiles(Sequence[MappedFile]):
    """NT_FILE as columns (uint64), in the order of the note."""

    def __init__(self, start: Words, end: Words, file_offset: Words, raw_paths: Sequence[bytes]) -> None:
        self.start = start
        self.end = end
        self.file_offset = file_offset
        self.raw_paths = raw_paths
        """The paths as the core has them: bytes of a process, not to be trusted or shown."""

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, index: int) -> MappedFile: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[MappedFile, ...]: ...
    def __getitem__(self, index: int | slice) -> MappedFile | tuple[MappedFile, ...]:
        if isinstance(index, slice):
            return tuple(self[row] for row in range(*index.indices(len(self))))
        start, end, offset = self.start[index], self.end[index], self.file_offset[index]
        return MappedFile(int(start), int(end), int(offset), text_of(self.raw_paths[index]))

    def __iter__(self) -> Iterator[MappedFile]:
        return (self[index] for index in range(len(self)))


_NO_WORDS: Final[Words] = np.zeros(0, np.uint64)
NO_MAPPED_FILES: Final = MappedFiles(_NO_WORDS, _NO_WORDS, _NO_WORDS, ())


def read_mapped_files(data: Bytes, notes: NoteTable, word_bytes: int, gaps: list[Gap]) -> MappedFiles:
    """The rows of NT_FILE: count, page size, start, end, page offset of each, then the names."""
    content = notes.first(data, NT_FILE, NOTE_BYTES)
    if content is None:
        gaps.append(Gap("mapped_files_missing", "no NT_FILE note; modules are searched for in memory"))
        return NO_MAPPED_FILES
    head_bytes = 2 * word_bytes
    if len(content) < head_bytes:
        gaps.append(Gap("mapped_files_cut", "the NT_FILE note is cut before its first file"))
        return NO_MAPPED_FILES
    count, page_bytes = words_in(content[:head_bytes], word_bytes).tolist()
    usable = min(count, (len(content) - head_bytes) // (3 * word_bytes), ROW_LIMIT)
    table_end = head_bytes + 3 * count * word_bytes
    names = content[table_end:].split(b"\0", usable)[:usable]
    if names and table_end >= len(content):
        names = []
    if len(names) < count:
        gaps.append(Gap("mapped_files_cut", f"NT_FILE names {len(names)} of the {count} files it counts"))
    rows = content[head_bytes : head_bytes + 3 * len(names) * word_bytes]
    table = words_in(rows, word_bytes).reshape(-1, 3)
    # The kernel counts offsets in pages and says so by the page size; other writers put 1 there.
    offsets = table[:, 2] * np.uint64(page_bytes)
    return MappedFiles(table[:, 0].copy(), table[:, 1].copy(), offsets, names)
