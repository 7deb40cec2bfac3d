"""Compressed cores: recognised by content, unpacked sparse and bounded, cut streams used as far as they go."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coreheap.corefile import open_core
from coreheap.errors import InputNotUsable
from tests.core_builder import CoreBuilder

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
    with pytest.raises(InputNotUsable) as caught:
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
