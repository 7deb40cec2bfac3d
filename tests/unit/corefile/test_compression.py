"""Compressed cores: recognised by content, unpacked sparse and bounded, cut streams used as far as they go."""

from __future__ import annotations

import gzip
import itertools
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coreheap.corefile import compression, open_core
from coreheap.errors import FailedHere, InputNotUsable, UnsupportedCore
from tests.core_builder import CoreBuilder, elf_image

PAGE = 4096
NOISE = bytes((index * 2654435761 >> 7) & 0xFF for index in range(64 * PAGE))


def _zst(raw: bytes) -> bytes:
    return bytes(pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(raw))


def _lz4(raw: bytes) -> bytes:
    return bytes(pytest.importorskip("lz4.frame").compress(raw))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "zst": _zst,
    "lz4": _lz4,
    "xz": lzma.compress,
    "gz": gzip.compress,
}
kinds = pytest.mark.parametrize("kind", list(PACKERS))


def built() -> bytes:
    builder = CoreBuilder().add_thread()
    builder.add_segment(0x100000, NOISE + bytes(200 * PAGE) + b"end of it")
    return builder.build()


@kinds
def test_a_compressed_core_reads_like_the_plain_one(tmp_path: Path, kind: str) -> None:
    raw = built()
    path = tmp_path / "core.some.name"
    path.write_bytes(PACKERS[kind](raw))
    calls: list[tuple[str, int, int | None]] = []
    with open_core(path, progress=lambda *call: calls.append(call)) as core:
        assert core.compression == kind
        assert core.file_bytes == len(raw)
        assert core.bytes_on_disk == path.stat().st_size
        assert core.memory.file.tobytes() == raw
        assert core.memory.read(0x100000, len(NOISE)) == NOISE
        assert not core.truncated
        assert "compressed_stream_damaged" not in [gap.cause for gap in core.gaps]
        assert core.memory.hole_meaning.value in ("zero_pages", "unknown")
        if core.memory.holes_known:
            assert core.memory.populated_bytes(0x100000, 0x100000 + 264 * PAGE) == len(NOISE)
    assert calls
    assert all(phase == "unpacking" and total == path.stat().st_size for phase, _, total in calls)


@kinds
def test_streams_of_several_members(tmp_path: Path, kind: str) -> None:
    raw = built()
    pack = PACKERS[kind]
    path = tmp_path / "core"
    path.write_bytes(pack(raw[:5000]) + pack(raw[5000:]))
    with open_core(path) as core:
        assert core.memory.file.tobytes() == raw
        assert "compressed_stream_damaged" not in [gap.cause for gap in core.gaps]


SKIPPED = b"\x53\x2a\x4d\x18\x05\0\0\0hello"
"""A frame that zst and lz4 pass over (RFC 8878, 3.1.2): magic number, length, content."""
PADDINGS = {
    "a zero": bytes(1),
    "seven zeros": bytes(7),
    "zeros": bytes(9 * PAGE),
    "more zeros than are read at once": bytes(1 << 19),
    "text": b"nothing of a core\n" * 100,
    "zeros, then text": bytes(700) + b"nothing of a core\n",
    "one letter": b"n",
}


def causes_of(path: Path, raw: bytes) -> list[str]:
    """The causes of the gaps of a core whose content is ``raw``."""
    with open_core(path) as core:
        assert core.memory.file.tobytes() == raw
        assert core.coverage == 1.0
        return [gap.cause for gap in core.gaps]


@kinds
@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize("members", [1, 2])
def test_what_follows_a_whole_stream_is_told_and_costs_nothing(
    tmp_path: Path, kind: str, padding: str, members: int
) -> None:
    raw = built()
    path = tmp_path / "core"
    cut = [0, 70000, len(raw)] if members == 2 else [0, len(raw)]
    stream = b"".join(PACKERS[kind](raw[low:high]) for low, high in itertools.pairwise(cut))
    path.write_bytes(stream + PADDINGS[padding])
    causes = causes_of(path, raw)
    assert "compressed_stream_damaged" not in causes
    assert "compressed_stream_padded" in causes
    with open_core(path) as core:
        (told,) = (gap.consequence for gap in core.gaps if gap.cause == "compressed_stream_padded")
    assert told.startswith(
        f"{len(PADDINGS[padding])} {'bytes' if 'n' in PADDINGS[padding].decode() else 'zeros'} after"
    )


@kinds
def test_zeros_between_members_are_passed_over(tmp_path: Path, kind: str) -> None:
    raw = built()
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](raw[:70000]) + bytes(512) + PACKERS[kind](raw[70000:]))
    assert not {"compressed_stream_damaged", "compressed_stream_padded"} & set(causes_of(path, raw))


@pytest.mark.parametrize("kind", ["zst", "lz4"])
@pytest.mark.parametrize("place", ["first", "twice first", "between", "last", "everywhere"])
def test_skippable_frames(tmp_path: Path, kind: str, place: str) -> None:
    raw = built()
    one, two = PACKERS[kind](raw[:70000]), PACKERS[kind](raw[70000:])
    path = tmp_path / "core"
    first = {"first": SKIPPED, "twice first": SKIPPED * 2, "everywhere": SKIPPED}.get(place, b"")
    between = SKIPPED if place in ("between", "everywhere") else b""
    path.write_bytes(first + one + between + two + (SKIPPED if place in ("last", "everywhere") else b""))
    assert not {"compressed_stream_damaged", "compressed_stream_padded"} & set(causes_of(path, raw))


@kinds
@pytest.mark.parametrize("cut_bytes", [1, 3, 100])
def test_a_second_member_that_is_cut_is_no_padding(tmp_path: Path, kind: str, cut_bytes: int) -> None:
    raw = built()
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](raw[:70000]) + PACKERS[kind](raw[70000:])[:-cut_bytes])
    with open_core(path) as core:
        assert core.memory.file[:70000].tobytes() == raw[:70000]
        causes = [gap.cause for gap in core.gaps]
    assert "compressed_stream_damaged" in causes
    assert "compressed_stream_padded" not in causes


def test_nothing_but_skippable_frames_is_no_compressed_core(tmp_path: Path) -> None:
    path = tmp_path / "core"
    path.write_bytes(SKIPPED * 1000)
    with pytest.raises(InputNotUsable, match="not an ELF core"):
        open_core(path)


@kinds
def test_a_cut_stream_is_used_as_far_as_it_goes(tmp_path: Path, kind: str) -> None:
    builder = CoreBuilder().add_thread().add_segment(0x100000, os.urandom(400 * PAGE))
    packed = PACKERS[kind](builder.build())
    path = tmp_path / "core"
    path.write_bytes(packed[: len(packed) * 3 // 4])
    with open_core(path) as core:
        assert core.truncated
        assert 0 < core.coverage < 1
        assert len(core.threads) == 1
        causes = [gap.cause for gap in core.gaps]
        assert "compressed_stream_damaged" in causes
        assert "core_truncated" in causes


@kinds
def test_a_stream_that_only_lacks_its_last_byte_is_reported(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](built())[:-1])
    with open_core(path) as core:
        assert "compressed_stream_damaged" in [gap.cause for gap in core.gaps]


@kinds
def test_a_stream_that_is_damaged_in_the_middle(tmp_path: Path, kind: str) -> None:
    builder = CoreBuilder().add_thread().add_segment(0x100000, os.urandom(2000 * PAGE))
    packed = bytearray(PACKERS[kind](builder.build()))
    middle = len(packed) // 2
    packed[middle : middle + 64] = b"\xff" * 64
    path = tmp_path / "core"
    path.write_bytes(packed)
    try:
        with open_core(path) as core:
            assert core.threads
    except InputNotUsable:
        pass


@kinds
def test_the_magic_alone_is_no_core(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](built())[:10])
    with pytest.raises(InputNotUsable) as caught:
        open_core(path)
    assert caught.value.next_step


@kinds
def test_a_bomb_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    bomb = CoreBuilder().add_thread().add_segment(0x10000, b"x")
    bomb.add_segment(0, None, 0, kind=4, file_bytes=1 << 40, file_offset=PAGE)
    path.write_bytes(PACKERS[kind](bomb.build() + bytes(64 << 20)))
    with pytest.raises(InputNotUsable) as caught:
        open_core(path, unpacked_limit=16 << 20)
    assert "16.0 MiB" in caught.value.expected
    assert "unpack" in caught.value.next_step


def bomb_of(content: bytes, *, segments: int = 1) -> bytes:
    builder = CoreBuilder().add_thread()
    for index in range(segments):
        builder.add_segment(0x100000 + index * 0x1000000, content)
    return builder.build()


@kinds
def test_a_bomb_that_the_headers_promise_is_refused_where_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Pages that are no zeros need room on the disk; as many as here are in no process's compressed core."""
    monkeypatch.setattr(compression, "FILLED_BYTES", 1 << 20)
    monkeypatch.setattr(compression, "FILLED_RATIO", 16)
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](bomb_of(b"b" * (32 << 20))))
    with pytest.raises(InputNotUsable, match="unpacks to more than is allowed") as caught:
        open_core(path)
    assert "not pages of zeros" in caught.value.expected
    assert "the core's headers promise 32." in caught.value.found
    promised = int(caught.value.next_step.partition("--max-unpacked ")[2].partition(",")[0])
    with open_core(path, unpacked_limit=promised) as core:
        assert core.coverage == 1.0


@kinds
def test_pages_of_zeros_that_the_headers_promise_are_no_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """300 stacks of 8 MiB, of which a page was used: written to a pipe, they are such zeros."""
    monkeypatch.setattr(compression, "FILLED_BYTES", 1 << 20)
    monkeypatch.setattr(compression, "FILLED_RATIO", 1)
    raw = bomb_of(bytes(8 << 20) + b"used" + bytes(PAGE), segments=8)
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](raw))
    assert "compressed_stream_damaged" not in causes_of(path, raw)


@kinds
def test_zeros_that_no_header_promises_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The table of segments lies beyond what is there: nothing says where the core ends."""
    monkeypatch.setattr(compression, "FILLED_BYTES", 1 << 20)
    monkeypatch.setattr(compression, "FILLED_RATIO", 16)
    head = bytearray(bomb_of(b"x"))
    head[32:40] = (1 << 40).to_bytes(8, "little")
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](bytes(head) + bytes(64 << 20)))
    with pytest.raises(InputNotUsable, match="unpacks to more than is allowed"):
        open_core(path)


@kinds
def test_what_the_user_allows_is_held_against_the_headers_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](bomb_of(bytes(64 << 20))))
    calls: list[tuple[str, int, int | None]] = []
    with pytest.raises(InputNotUsable, match="unpacks to more than is allowed"):
        open_core(path, unpacked_limit=32 << 20, progress=lambda *call: calls.append(call))
    assert not calls


@kinds
def test_a_core_of_many_segments_has_its_end_too(tmp_path: Path, kind: str) -> None:
    """70,000 segments: their number stands in a section header at the end, their table fills more than one block."""
    builder = CoreBuilder().add_thread()
    for index in range(70000):
        builder.add_segment(0x10000 + index * 2 * PAGE, b"" if index else b"content")
    raw = builder.build()
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](raw + bytes(64 << 20)))
    with open_core(path, unpacked_limit=len(raw) + (16 << 20)) as core:
        assert len(core.image.segments) == 70001
        assert core.coverage == 1.0
        assert core.file_bytes < len(raw) + (16 << 20)


@kinds
def test_a_program_is_refused_after_its_first_block(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](elf_image() + bytes(64 << 20)))
    with pytest.raises(InputNotUsable, match="not a core"):
        open_core(path, unpacked_limit=16 << 20)


@kinds
def test_a_machine_that_is_not_known_is_refused_after_the_first_block(tmp_path: Path, kind: str) -> None:
    head = bytearray(bomb_of(b"x"))
    head[18:20] = (243).to_bytes(2, "little")
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](bytes(head) + bytes(64 << 20)))
    with pytest.raises(UnsupportedCore, match="not supported"):
        open_core(path, unpacked_limit=16 << 20)


@kinds
def test_little_is_unpacked_behind_the_core(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](built() + bytes(64 << 20)))
    with open_core(path, unpacked_limit=16 << 20) as core:
        assert core.coverage == 1.0
        assert core.file_bytes < 16 << 20


@kinds
def test_what_is_no_core_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](bytes(64 << 20)))
    with pytest.raises(InputNotUsable, match="not an ELF core") as caught:
        open_core(path, unpacked_limit=16 << 20)
    assert caught.value.next_step


@kinds
def test_what_is_compressed_must_be_a_core(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](b"a letter to nobody" * 1000))
    with pytest.raises(InputNotUsable) as caught:
        open_core(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize(("kind", "package"), [("zst", "zstandard"), ("lz4", "lz4.frame")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, package: str) -> None:
    path = tmp_path / "core"
    path.write_bytes(PACKERS[kind](built()))
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FailedHere) as caught:
        open_core(path)
    assert caught.value.next_step == f"pip install {package.partition('.')[0]}"


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    path = tmp_path / "core"
    path.write_bytes(gzip.compress(built()))
    before = len(os.listdir("/proc/self/fd"))
    with open_core(path):
        assert list(folder.iterdir()) == []
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before


def test_plain_cores_import_no_compression_package() -> None:
    code = (
        "import sys, coreheap.corefile; "
        "print([n for n in ('zstandard', 'lz4', 'lief', 'elftools', 'capstone') if n in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert out.stdout.strip() == "[]"


def test_a_window_of_2_gib_is_read(tmp_path: Path) -> None:
    """zstd --long=31; the window is as large as it says, however little is in it."""
    package = pytest.importorskip("zstandard")
    raw = built()
    parameters = package.ZstdCompressionParameters(window_log=31, write_content_size=False)
    packer = package.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "core"
    path.write_bytes(packer.compress(raw) + packer.flush())
    assert package.get_frame_parameters(path.read_bytes()).window_size == 2 << 30
    assert "compressed_stream_damaged" not in causes_of(path, raw)


def test_no_memory_for_the_window_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("zstandard")
    path = tmp_path / "core"
    path.write_bytes(_zst(built()))

    class Decompressor:
        def __init__(self, **_: int) -> None:
            pass

        def stream_reader(self, *_: object, **__: object) -> Decompressor:
            return self

        def read(self, _: int) -> bytes:
            raise package.ZstdError("zstd decompress error: Allocation error : not enough memory")

    monkeypatch.setattr(package, "ZstdDecompressor", Decompressor)
    with pytest.raises(MemoryError):
        open_core(path)
