"""Compressed cores, unpacked once into a sparse temporary file.

Knows: how long the core is by its own headers, and how to keep a bomb from filling the disk. Does not know: how a
stream is read (``streams``), or what the core means.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import numpy as np

from coreheap.corefile import elf
from coreheap.corefile.elf import Bytes
from coreheap.corefile.foreign import foreign_file
from coreheap.corefile.image import SEGMENT_LIMIT, core_header, machine_of, promised_count
from coreheap.corefile.streams import Padding, StreamDamaged, opened_stream
from coreheap.errors import FailedHere, InputNotUsable
from coreheap.quantities import GIB, format_bytes

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how far it is, and the end where it is known."""

UNPACKED_LIMIT: Final = 1024 * GIB
"""Bytes a core may unpack to, holes included; a real core has the size of an address space at
most."""
FILLED_BYTES: Final = GIB
FILLED_RATIO: Final = 256
"""Bytes other than pages of zeros that a core may unpack to, unless the user says how many: FILLED_BYTES, and
FILLED_RATIO for each compressed byte. Cores of services shrink to a third, to a thirtieth at most where pages of
zeros do not count; gz, lz4 cannot reach the ratio by much, zst reaches 32,768 with one byte over and over."""
_BEYOND_CORE: Final = 1 << 22
"""Bytes unpacked beyond the core's own end, to see whether the stream ends as it should."""
_HEAD_BYTES: Final = 512
"""The ELF header, and the first program headers in all cores that the kernel, gdb or qemu write."""
_LARGEST_TABLE: Final = 1 << 28
_PAGE_BYTES: Final = 4096
_DISK_RESERVE: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class UnpackedCore:
    """The unpacked core: a file without a name, gone when its descriptor is closed."""

    descriptor: int
    file_bytes: int
    damage: str
    """"" when the stream was whole, else what was wrong; then the file holds what came before."""
    padding: Padding
    """What the compressed file has after its stream."""


def unpack(
    file: IO[bytes],
    kind: str,
    where: str,
    *,
    progress: Progress | None = None,
    unpacked_limit: int | None = None,
    directory: Path | None = None,
) -> UnpackedCore:
    """Unpack a core into a sparse temporary file; pages of zeros become holes.

    ``unpacked_limit`` None: UNPACKED_LIMIT with pages of zeros, FILLED_BYTES and FILLED_RATIO without.
    Raises InputNotUsable when nothing can be unpacked and when the core unpacks to more than is allowed,
    FailedHere when the package for it is missing or the disk cannot hold it.
    """
    compressed_bytes = os.fstat(file.fileno()).st_size
    bounds = _Bounds(kind, where, compressed_bytes, unpacked_limit)
    stream = opened_stream(file, kind, where, unpacked_limit)
    folder = directory or _roomy_directory(where)
    temporary = _temporary_file(folder, where)
    damage = ""
    with temporary:
        writer = _SparseWriter(temporary.fileno(), folder, where)
        length = _CoreLength(kind, where)
        try:
            for block in stream.blocks:
                writer.write(block)
                length.look(writer, block)
                bounds.check(writer, length.byte_count)
                if progress is not None:
                    progress("unpacking", min(file.tell(), compressed_bytes), compressed_bytes)
                if length.byte_count is not None and writer.position >= length.byte_count + _BEYOND_CORE:
                    break
        except StreamDamaged as error:
            damage = str(error)
        writer.finish()
        if writer.position == 0:
            raise InputNotUsable(
                f"the {kind} stream holds nothing that can be unpacked",
                where=where,
                expected="a compressed core",
                found=damage or "an empty stream",
                next_step="the file is damaged; fetch it again",
            )
        return UnpackedCore(os.dup(temporary.fileno()), writer.position, damage, stream.padding)


def _temporary_file(folder: Path, where: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder, prefix="coreheap-")
    except OSError as error:
        raise FailedHere(
            f"the core cannot be unpacked into {folder}",
            where=where,
            expected="a folder for a temporary file",
            found=error.strerror or str(error),
            next_step="set TMPDIR to a folder that you may write to, on a disk with room",
        ) from None


@dataclass(frozen=True, slots=True)
class _Bounds:
    """How much a core may unpack to."""

    kind: str
    where: str
    compressed_bytes: int
    said: int | None
    """What the user allows."""

    def check(self, writer: _SparseWriter, core_bytes: int | None) -> None:
        """Raises InputNotUsable for more than is allowed, be it there or promised by the core's own headers."""
        limit = UNPACKED_LIMIT if self.said is None else self.said
        promised = core_bytes or 0 if self.said is not None else 0
        if max(writer.position, promised) > limit:
            raise self._too_large(limit, core_bytes, "")
        # Without a length to trust, zeros are bounded as all else is.
        counted = writer.filled_bytes if core_bytes is not None else writer.position
        filled_limit = FILLED_BYTES + FILLED_RATIO * self.compressed_bytes
        if self.said is None and counted > filled_limit:
            raise self._too_large(filled_limit, core_bytes, " that are not pages of zeros" if core_bytes else "")

    def _too_large(self, limit: int, core_bytes: int | None, of_what: str) -> InputNotUsable:
        promise = f"; the core's headers promise {format_bytes(core_bytes)}" if core_bytes is not None else ""
        wanted = f"{core_bytes}" if core_bytes is not None else "SIZE"
        return InputNotUsable(
            "the core unpacks to more than is allowed",
            where=self.where,
            expected=f"at most {format_bytes(limit)}{of_what}",
            found=f"more, from {format_bytes(self.compressed_bytes)} of {self.kind}{promise}",
            next_step=f"if it is really that large, allow it with --max-unpacked {wanted}, or unpack it by hand and"
            " open that",
        )


class _CoreLength:
    """How long the core is by its own headers, as soon as they are unpacked. What follows would be unpacked for nothing."""

    def __init__(self, kind: str, where: str) -> None:
        self.byte_count: int | None = None
        """None as long as the headers were not seen, and where they do not tell."""
        self._kind = kind
        self._where = where
        self._head = b""
        self._is_known = False

    def look(self, writer: _SparseWriter, block: bytes) -> None:
        """Called after each block was written.

        Raises InputNotUsable where it is no core: a bomb need not burn down before that is said.
        """
        if self._is_known:
            return
        if len(self._head) < _HEAD_BYTES:
            self._head += block[: _HEAD_BYTES - len(self._head)]
        if len(self._head) < _HEAD_BYTES:
            return
        data = np.frombuffer(self._head, np.uint8)
        header = self._header(data)
        count, _, _ = promised_count(data, header)
        table_end = header.program_header_offset + header.program_header_bytes * count
        # What was not written yet is less than a page.
        if count > SEGMENT_LIMIT or table_end > _LARGEST_TABLE:
            self._is_known = True
        elif writer.position >= table_end + _PAGE_BYTES:
            self._is_known = True
            self.byte_count = self._length(writer.written_head(max(table_end, _HEAD_BYTES)), header, count)

    def _header(self, head: Bytes) -> elf.ElfHeader:
        if head[: len(elf.ELF_MAGIC)].tobytes() != elf.ELF_MAGIC:
            dump = foreign_file(head)
            raise InputNotUsable(
                f"what the {self._kind} stream holds is not an ELF core",
                where=self._where,
                expected="the magic bytes 7f 45 4c 46 (ELF) after unpacking",
                found=dump.what if dump else head[:8].tobytes().hex(" "),
                next_step=dump.next_step
                if dump
                else "give the compressed core itself; an archive has to be taken apart first",
            )
        header = core_header(head, self._where)
        machine_of(header, self._where)
        return header

    def _length(self, head: bytes, header: elf.ElfHeader, count: int) -> int | None:
        segments = elf.program_headers_of(np.frombuffer(head, np.uint8), header, count)
        is_extended = header.program_header_count == elf.PN_XNUM
        if len(segments) < count or (is_extended and count == elf.PN_XNUM):
            return None
        pairs = zip(segments.file_offset.tolist(), segments.file_bytes.tolist(), strict=True)
        end = max((offset + byte_count for offset, byte_count in pairs), default=0)
        if is_extended:
            # The section header with the real count comes after all segments.
            end = max(end, header.section_header_offset + header.section_header_bytes)
        return max(end, header.program_header_offset, len(head))


class _SparseWriter:
    """Writes blocks one after the other and leaves out pages of zeros."""

    def __init__(self, descriptor: int, folder: Path, where: str) -> None:
        self.position = 0
        self.filled_bytes = 0
        """Bytes of pages that are not zeros alone."""
        self._descriptor = descriptor
        self._folder = folder
        self._where = where
        self._rest = b""
        self._until_check = 0

    def write(self, block: bytes) -> None:
        content = self._rest + block if self._rest else block
        whole = len(content) // _PAGE_BYTES * _PAGE_BYTES
        start = self.position - len(self._rest)
        self.position += len(block)
        self._rest = content[whole:]
        pages = np.frombuffer(content, np.uint64, whole // 8).reshape(-1, _PAGE_BYTES // 8)
        filled = np.flatnonzero(pages.any(axis=1))
        if len(filled) == 0:
            return
        self.filled_bytes += len(filled) * _PAGE_BYTES
        breaks = np.flatnonzero(np.diff(filled) != 1) + 1
        for run in np.split(filled, breaks):
            low, high = int(run[0]) * _PAGE_BYTES, (int(run[-1]) + 1) * _PAGE_BYTES
            self._put(content[low:high], start + low)

    def written_head(self, byte_count: int) -> bytes:
        """The first bytes, of those that were written already."""
        # Holes at the end of the file are not there yet.
        return os.pread(self._descriptor, byte_count, 0).ljust(byte_count, b"\0")

    def finish(self) -> None:
        if self._rest:
            self._put(self._rest, self.position - len(self._rest))
        os.ftruncate(self._descriptor, self.position)

    def _put(self, content: bytes, offset: int) -> None:
        self._until_check -= len(content)
        if self._until_check <= 0:
            free = shutil.disk_usage(self._folder).free
            if free < _DISK_RESERVE:
                raise self._disk_full(free)
            self._until_check = min(_DISK_RESERVE // 2, free // 2)
        try:
            view = memoryview(content)
            while view:
                written = os.pwrite(self._descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._disk_full(shutil.disk_usage(self._folder).free) from error

    def _disk_full(self, free: int) -> FailedHere:
        return FailedHere(
            f"no room to unpack the core in {self._folder}",
            where=self._where,
            expected=f"{format_bytes(self.position)} and more",
            found=f"{format_bytes(free)} free",
            next_step="set TMPDIR to a folder on a larger disk",
        )


def _roomy_directory(where: str) -> Path:
    """TMPDIR, else /var/tmp, where large files belong (file-hierarchy(7)); /tmp is often memory."""
    for folder in (os.environ.get("TMPDIR"), "/var/tmp"):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK):
            return Path(folder)
    try:
        return Path(tempfile.gettempdir())
    except OSError:
        raise FailedHere(
            "the core is compressed and there is no folder to unpack it into",
            where=where,
            expected="a folder that can be written to: TMPDIR, /var/tmp or /tmp",
            found="none",
            next_step="set TMPDIR to a folder that you may write to, on a disk with room",
        ) from None
