"""Compressed cores: recognised by their first bytes, unpacked once into a sparse temporary file.

Knows: zst, lz4, xz and gz streams, cut or damaged ones too, and how to keep a bomb from filling the
disk. Does not know: what is inside. zstandard and lz4 are imported only when such a core is opened.
"""

from __future__ import annotations

import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Final

import numpy as np

from coreheap.corefile import elf
from coreheap.errors import InputNotUsable
from coreheap.quantities import GIB, format_bytes

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how far it is, and the end where it is known."""

MAGICS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x28\xb5\x2f\xfd", "zst"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x1f\x8b\x08", "gz"),
)
UNPACKED_LIMIT: Final = 1024 * GIB
"""Bytes a core may unpack to, holes included; a real core has the size of an address space at
most."""
_READ_BYTES: Final = 1 << 18
_BLOCK_BYTES: Final = 1 << 22
_PAGE_BYTES: Final = 4096
_DISK_RESERVE: Final = 256 << 20
_XZ_MEMORY: Final = 512 << 20


@dataclass(frozen=True, slots=True)
class UnpackedCore:
    """The unpacked core: a file without a name, gone when its descriptor is closed."""

    descriptor: int
    file_bytes: int
    damage: str
    """"" when the stream was whole, else what was wrong; then the file holds what came before."""


class _StreamDamagedError(Exception):
    """The stream is cut or broken; what came before is good."""


def compression_of(head: bytes) -> str | None:
    """The compression of a file with these first bytes; None for none that is known."""
    for magic, name in MAGICS:
        if head.startswith(magic):
            return name
    return None


def unpack(
    file: IO[bytes],
    kind: str,
    where: str,
    *,
    progress: Progress | None = None,
    unpacked_limit: int = UNPACKED_LIMIT,
    directory: Path | None = None,
) -> UnpackedCore:
    """Unpack a core into a sparse temporary file; pages of zeros become holes.

    Raises InputNotUsable when nothing can be unpacked, when the package for it is missing, when the
    core unpacks to more than ``unpacked_limit`` bytes or when the disk cannot hold it.
    """
    compressed_bytes = os.fstat(file.fileno()).st_size
    folder = directory or _roomy_directory()
    blocks = _reader(kind, where)(file)
    temporary = _temporary_file(folder, where)
    damage = ""
    needed_bytes: int | None = None
    with temporary:
        writer = _SparseWriter(temporary.fileno(), folder, where)
        try:
            for block in blocks:
                if writer.position == 0:
                    needed_bytes = _bytes_of_core(block, kind, where)
                writer.write(block)
                if writer.position > unpacked_limit:
                    raise InputNotUsable(
                        "the core unpacks to more than is allowed",
                        where=where,
                        expected=f"at most {format_bytes(unpacked_limit)}",
                        found=f"more, from {format_bytes(compressed_bytes)} of {kind}",
                        next_step="if it is really that large, unpack it by hand and open that",
                    )
                if progress is not None:
                    progress("unpacking", min(file.tell(), compressed_bytes), compressed_bytes)
                # A little more, to see whether the stream ends as it should.
                if needed_bytes is not None and writer.position >= needed_bytes + _BLOCK_BYTES:
                    break
        except _StreamDamagedError as error:
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
        return UnpackedCore(os.dup(temporary.fileno()), writer.position, damage)


def _temporary_file(folder: Path, where: str) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder, prefix="coreheap-")
    except OSError as error:
        raise InputNotUsable(
            f"the core cannot be unpacked into {folder}",
            where=where,
            expected="a folder for a temporary file",
            found=error.strerror or str(error),
            next_step="set TMPDIR to a folder that you may write to, on a disk with room",
        ) from None


def _bytes_of_core(head: bytes, kind: str, where: str) -> int | None:
    """How long the core is that begins with ``head``, by its headers; None where they do not tell.

    What is behind would be unpacked for nothing. Raises InputNotUsable at once where it is no ELF file: a bomb need not
    burn down before that is said.
    """
    if len(head) >= len(elf.ELF_MAGIC) and not head.startswith(elf.ELF_MAGIC):
        raise InputNotUsable(
            f"what the {kind} stream holds is not an ELF core",
            where=where,
            expected="the magic bytes 7f 45 4c 46 (ELF) after unpacking",
            found=head[:8].hex(" "),
            next_step="give the compressed core itself; an archive (tar, zip) has to be taken apart first",
        )
    header = elf.header_of(head[:64])
    if header is None or header.kind != elf.ET_CORE or header.program_header_count == elf.PN_XNUM:
        return None
    data = np.frombuffer(head, np.uint8)
    segments = elf.program_headers_of(data, header, header.program_header_count)
    if len(segments) < header.program_header_count:
        return None
    ends: list[int] = [
        offset + byte_count
        for offset, byte_count in zip(segments.file_offset.tolist(), segments.file_bytes.tolist(), strict=True)
    ]
    return max(*ends, header.program_header_offset, len(head)) if ends else None


class _SparseWriter:
    """Writes blocks one after the other and leaves out pages of zeros."""

    def __init__(self, descriptor: int, folder: Path, where: str) -> None:
        self.position = 0
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
        breaks = np.flatnonzero(np.diff(filled) != 1) + 1
        for run in np.split(filled, breaks):
            low, high = int(run[0]) * _PAGE_BYTES, (int(run[-1]) + 1) * _PAGE_BYTES
            self._put(content[low:high], start + low)

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

    def _disk_full(self, free: int) -> InputNotUsable:
        return InputNotUsable(
            f"no room to unpack the core in {self._folder}",
            where=self._where,
            expected=f"{format_bytes(self.position)} and more",
            found=f"{format_bytes(free)} free",
            next_step="set TMPDIR to a folder on a larger disk",
        )


def _roomy_directory() -> Path:
    """TMPDIR, else /var/tmp, where large files belong (file-hierarchy(7)); /tmp is often memory."""
    for folder in (os.environ.get("TMPDIR"), "/var/tmp"):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK):
            return Path(folder)
    return Path(tempfile.gettempdir())


def _reader(kind: str, where: str) -> Callable[[IO[bytes]], Iterator[bytes]]:
    if kind == "zst":
        package = _package("zstandard", where)
        return lambda file: _zst_blocks(file, package)
    if kind == "lz4":
        package = _package("lz4.frame", where)
        return lambda file: _blocks(file, package.LZ4FrameDecompressor, RuntimeError)
    if kind == "xz":
        return lambda file: _blocks(file, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY), lzma.LZMAError)
    return lambda file: _blocks(file, _GzipMember, zlib.error)


def _package(name: str, where: str) -> ModuleType:
    try:
        return __import__(name, fromlist=["*"])
    except ImportError:
        distribution = name.partition(".")[0]
        raise InputNotUsable(
            f"the core is compressed and the Python package {distribution} is missing",
            where=where,
            expected=f"{distribution} to be installed",
            found="no such package",
            next_step=f"pip install {distribution}",
        ) from None


class _GzipMember:
    """One gzip member with the interface of lzma.LZMADecompressor."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail and not self._inner.eof

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


def _blocks(file: IO[bytes], new_decompressor: Callable[[], Any], error: type[Exception]) -> Iterator[bytes]:
    """The content of a stream of one or more members, in blocks of bounded size.

    Raises _StreamDamagedError where it is cut or broken.
    """
    member, member_fresh = new_decompressor(), False
    pending, members_done = b"", 0
    while True:
        if not pending and member.needs_input:
            pending = file.read(_READ_BYTES)
            if not pending:
                # A last member that got no byte at all was never there.
                if members_done and member_fresh:
                    return
                raise _StreamDamagedError("the stream is cut")
        try:
            block = member.decompress(pending, max_length=_BLOCK_BYTES)
        except (error, EOFError) as problem:
            # Padding behind the last member (gzip -t: "trailing garbage ignored") is no damage.
            if members_done and member_fresh:
                return
            raise _StreamDamagedError(f"the stream is damaged ({problem})") from problem
        member_fresh, pending = False, b""
        if block:
            yield block
        if member.eof:
            pending = (member.unused_data or b"").lstrip(b"\0")
            member, member_fresh = new_decompressor(), True
            members_done += 1


def _zst_blocks(file: IO[bytes], package: ModuleType) -> Iterator[bytes]:
    """As ``_blocks``; zstandard's reader bounds its output, but is silent about a cut stream."""
    whole = zst_frames_are_whole(file)
    file.seek(0)
    reader = package.ZstdDecompressor().stream_reader(file, read_across_frames=True, closefd=False)
    try:
        while block := reader.read(_BLOCK_BYTES):
            yield block
    except package.ZstdError as problem:
        raise _StreamDamagedError(f"the stream is damaged ({problem})") from problem
    if not whole:
        raise _StreamDamagedError("the stream is cut")


def zst_frames_are_whole(file: IO[bytes]) -> bool:
    """Whether every block of every zstd frame is there, by their headers (RFC 8878, 3.1)."""
    size = os.fstat(file.fileno()).st_size
    position = 0

    def at(offset: int, byte_count: int) -> int:
        file.seek(offset)
        return int.from_bytes(file.read(byte_count), "little")

    while position + 8 <= size:
        magic = at(position, 4)
        if 0x184D2A50 <= magic <= 0x184D2A5F:
            position += 8 + at(position + 4, 4)
            continue
        if magic != 0xFD2FB528:
            return position > 0
        descriptor = at(position + 4, 1)
        single = descriptor >> 5 & 1
        content_size = (single, 2, 4, 8)[descriptor >> 6]
        position += 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + content_size
        while True:
            if position + 3 > size:
                return False
            block = at(position, 3)
            position += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
            if block & 1:
                break
        position += 4 if descriptor & 4 else 0
    return position == size
