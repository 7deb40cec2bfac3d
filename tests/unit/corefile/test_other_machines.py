"""Cores of machines that coreheap does not know: refused by name, with exit code 3 and without a traceback.

The headers are written by hand here, in the byte order of their machine.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from coreheap.cli import main
from coreheap.corefile import open_core
from coreheap.errors import UnsupportedCore


def header(*, bits: int, order: str, machine: int, kind: int = 4) -> bytes:
    """An ELF header with one program header that says nothing."""
    word = "Q" if bits == 64 else "I"
    sizes = (64, 56) if bits == 64 else (52, 32)
    identity = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1, 0]) + bytes(8)
    fields = struct.pack(f"{order}2HI3{word}I6H", kind, machine, 1, 0, sizes[0], 0, 0, *sizes, 1, 0, 0, 0)
    return identity + fields + bytes(4096)


@pytest.mark.parametrize(
    ("bits", "order", "machine", "found"),
    [
        (64, ">", 22, "s390x, big-endian"),
        (64, ">", 21, "ppc64, big-endian"),
        (32, ">", 20, "ppc, big-endian"),
        (32, ">", 8, "mips, big-endian"),
        (64, ">", 183, "aarch64, big-endian"),
        (64, ">", 62, "machine 62, 64 bits, big-endian"),
        (64, "<", 21, "ppc64le"),
        (64, "<", 243, "riscv64"),
        (32, "<", 62, "x32"),
        (32, "<", 40, "32-bit arm"),
    ],
)
def test_other_machines_are_named_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int, order: str, machine: int, found: str
) -> None:
    path = tmp_path / "core"
    path.write_bytes(header(bits=bits, order=order, machine=machine))
    with pytest.raises(UnsupportedCore) as caught:
        open_core(path)
    assert found in caught.value.found
    assert caught.value.expected == "a little-endian Linux core of x86_64, i386, aarch64"
    assert main(["analyze", str(path)]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert found in said.err
    assert "x86_64, i386, aarch64" in said.err
    assert said.err.count("error:") == 1
    assert "Traceback" not in said.err


def test_a_cut_big_endian_header_is_no_crash(tmp_path: Path) -> None:
    whole = header(bits=64, order=">", machine=22)
    for length in range(4, 64):
        path = tmp_path / "core"
        path.write_bytes(whole[:length])
        assert main(["analyze", str(path)]) == 3
