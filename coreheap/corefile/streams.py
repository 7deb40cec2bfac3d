"""Compressed streams as blocks of bounded size: zst, lz4, xz and gz, cut, damaged and padded ones too.

Knows: members, frames, skippable frames, and what may follow the last one. Does not know: what is inside, or where it
goes. zstandard and lz4 are imported only when such a stream is read.
"""

from __future__ import annotations

import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import IO, Any, Final

from coreheap.errors import FailedHere, failure_here

MAGICS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x28\xb5\x2f\xfd", "zst"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x1f\x8b\x08", "gz"),
)
READ_BYTES: Final = 1 << 18
BLOCK_BYTES: Final = 1 << 22
_MOST_MEMORY: Final = 2 << 30
"""What a stream may want for its window, the most of zstd --long=31; memory is taken as it is filled."""
_USUAL_MEMORY: Final = 128 << 20
"""What every stream may want: zstd's own limit without --long."""
_FIRST_SKIPPABLE, _LAST_SKIPPABLE = 0x184D2A50, 0x184D2A5F
"""Magic numbers of frames that zst and lz4 pass over; pzstd begins its files with one (RFC 8878, 3.1.2)."""
_ZST_MAGIC: Final = 0xFD2FB528
_MOST_SKIPPED: Final = 64


class StreamDamaged(Exception):
    """The stream is cut or broken; what came before is good."""


@dataclass(slots=True)
class Padding:
    """What follows the end of the last member and is no part of the stream; filled while the stream is read."""

    byte_count: int = 0
    is_zeros: bool = True


@dataclass(slots=True)
class Stream:
    """The content of a compressed file. ``padding`` is known when ``blocks`` have ended.

    ``blocks`` raises StreamDamaged where the stream is cut or broken.
    """

    blocks: Iterator[bytes]
    padding: Padding = field(default_factory=Padding)


def compression_of(file: IO[bytes]) -> str | None:
    """The compression of a file, by its first bytes, or by those after skippable frames; None for none that is known."""
    position = 0
    for _ in range(_MOST_SKIPPED):
        file.seek(position)
        head = file.read(8)
        for magic, name in MAGICS:
            if head.startswith(magic):
                return name
        if len(head) < 8 or not _is_skippable(head):
            return None
        position += 8 + int.from_bytes(head[4:], "little")
    return None


def opened_stream(file: IO[bytes], kind: str, where: str, unpacked_limit: int | None = None) -> Stream:
    """The content of a file of this compression. Raises FailedHere where the package for it is missing.

    A window is no larger than what may be unpacked (``unpacked_limit`` bytes; None: not limited), whatever the stream asks for.
    """
    padding = Padding()
    file.seek(0)
    memory = _MOST_MEMORY if unpacked_limit is None else min(_MOST_MEMORY, max(_USUAL_MEMORY, unpacked_limit))
    if kind == "zst":
        return Stream(_zst_blocks(file, padding, _package("zstandard", where), memory), padding)
    if kind == "lz4":
        package = _package("lz4.frame", where)
        return Stream(_blocks(file, padding, kind, package.LZ4FrameDecompressor, RuntimeError), padding)
    if kind == "xz":
        new = partial(lzma.LZMADecompressor, memlimit=memory)
        return Stream(_blocks(file, padding, kind, new, lzma.LZMAError), padding)
    return Stream(_blocks(file, padding, kind, _GzipMember, zlib.error), padding)


def _package(name: str, where: str) -> ModuleType:
    try:
        return __import__(name, fromlist=["*"])
    except ImportError as error:
        failure = failure_here(error, where)
        if failure is not None:
            raise failure from None
        distribution = name.partition(".")[0]
        raise FailedHere(
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


def _blocks(
    file: IO[bytes], padding: Padding, kind: str, new_decompressor: Callable[[], Any], error: type[Exception]
) -> Iterator[bytes]:
    """The content of a stream of one or more members, in blocks of bounded size; zeros may lie between members."""
    pending = file.read(READ_BYTES)
    while True:
        member = new_decompressor()
        while not member.eof:
            if not pending and member.needs_input:
                pending = file.read(READ_BYTES)
                if not pending:
                    raise StreamDamaged("the stream is cut")
            try:
                block = member.decompress(pending, max_length=BLOCK_BYTES)
            except (error, EOFError) as problem:
                raise StreamDamaged(f"the stream is damaged ({problem})") from problem
            pending = b""
            if block:
                yield block
        pending = member.unused_data or b""
        member_end = file.tell() - len(pending)
        start = _first_filled(file, member_end)
        if start is None or not _begins_member(file, start, kind):
            # As gzip -t says: "trailing garbage ignored".
            padding.byte_count = os.fstat(file.fileno()).st_size - member_end
            padding.is_zeros = start is None
            return
        file.seek(start)
        pending = file.read(READ_BYTES)


def _begins_member(file: IO[bytes], position: int, kind: str) -> bool:
    """Whether a member begins here, be it cut in its first bytes."""
    file.seek(position)
    head = file.read(8)
    magic = next(magic for magic, name in MAGICS if name == kind)
    return head.startswith(magic) or magic.startswith(head) or (kind == "lz4" and _is_skippable(head))


def _is_skippable(head: bytes) -> bool:
    return len(head) >= 4 and _FIRST_SKIPPABLE <= int.from_bytes(head[:4], "little") <= _LAST_SKIPPABLE


class _Part:
    """Bytes ``start`` to ``end`` of a file, as a file to read from."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        file.seek(start)
        self._file = file
        self._left = end - start

    def read(self, byte_count: int = -1) -> bytes:
        wanted = self._left if byte_count < 0 else min(byte_count, self._left)
        data = self._file.read(wanted)
        self._left -= len(data)
        return data


def _zst_blocks(file: IO[bytes], padding: Padding, package: ModuleType, window: int) -> Iterator[bytes]:
    """As ``_blocks``; zstandard's reader bounds its output, but is silent about a cut stream, and loses a frame to padding."""
    frames = zst_frames(file)
    padding.byte_count, padding.is_zeros = frames.padding_bytes, frames.padding_is_zeros
    for start, end in frames.runs:
        part = _Part(file, start, end)
        decompressor = package.ZstdDecompressor(max_window_size=window)
        reader = decompressor.stream_reader(part, read_across_frames=True, closefd=False)
        try:
            while block := reader.read(BLOCK_BYTES):
                yield block
        except package.ZstdError as problem:
            if "not enough memory" in str(problem):
                raise MemoryError(str(problem)) from problem
            raise StreamDamaged(f"the stream is damaged ({problem})") from problem
    if not frames.are_whole:
        raise StreamDamaged("the stream is cut")


@dataclass(frozen=True, slots=True)
class ZstFrames:
    """Where the frames of a zst file are.

    ``runs`` are (start, end) of frames that follow one another, the last one with a cut frame where ``are_whole`` is
    false. What follows the last frame and is none has ``padding_bytes``.
    """

    runs: tuple[tuple[int, int], ...]
    are_whole: bool
    padding_bytes: int
    padding_is_zeros: bool


def zst_frames(file: IO[bytes]) -> ZstFrames:
    """The frames of a zst file, by the headers of their blocks (RFC 8878, 3.1); zeros may lie between frames."""
    size = os.fstat(file.fileno()).st_size
    runs: list[tuple[int, int]] = []
    run_start = position = 0
    are_whole, padding_is_zeros = True, True
    while position < size:
        end = _end_of_frame(file, position, size)
        if end is not None:
            position = end
            if end > size:
                are_whole, position = False, size
            continue
        if position > run_start:
            runs.append((run_start, position))
        filled = _first_filled(file, position)
        if filled is None or _end_of_frame(file, filled, size) is None:
            padding_is_zeros = filled is None
            run_start = position
            break
        run_start = position = filled
    if position > run_start:
        runs.append((run_start, position))
    end_of_frames = runs[-1][1] if runs else 0
    if not runs:
        # Not one frame that can be followed: the decompressor says what is wrong with it.
        return ZstFrames(((0, size),), False, 0, True)
    return ZstFrames(tuple(runs), are_whole, size - end_of_frames, padding_is_zeros)


def _end_of_frame(file: IO[bytes], start: int, size: int) -> int | None:
    """Where the frame at ``start`` ends, beyond ``size`` where it is cut; None where no frame begins there."""

    def at(offset: int, byte_count: int) -> int:
        file.seek(offset)
        return int.from_bytes(file.read(byte_count), "little")

    beyond = size + 1
    file.seek(start)
    head = file.read(8)
    magic = int.from_bytes(head[:4], "little")
    if _is_skippable(head):
        return start + 8 + int.from_bytes(head[4:], "little") if len(head) == 8 else beyond
    if len(head) < 4:
        # Too short for a magic number: the beginning of one is a cut frame.
        return beyond if head and _ZST_MAGIC.to_bytes(4, "little").startswith(head) else None
    if magic != _ZST_MAGIC:
        return None
    descriptor = at(start + 4, 1)
    single = descriptor >> 5 & 1
    content_size = (single, 2, 4, 8)[descriptor >> 6]
    position = start + 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3] + content_size
    while True:
        if position + 3 > size:
            return beyond
        block = at(position, 3)
        position += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)
        if block & 1:
            break
    return position + (4 if descriptor & 4 else 0)


def _first_filled(file: IO[bytes], start: int) -> int | None:
    """The first byte from ``start`` on that is not zero; None where there is none."""
    file.seek(start)
    while data := file.read(READ_BYTES):
        rest = data.lstrip(b"\0")
        if rest:
            return start + len(data) - len(rest)
        start += len(data)
    return None
