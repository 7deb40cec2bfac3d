"""What is no usable core is refused with what was expected, what was found and the next step."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from coreheap.corefile import open_core
from coreheap.errors import InputNotUsable, UnsupportedCore
from tests.core_builder import CoreBuilder, elf_image


def small_core() -> CoreBuilder:
    return CoreBuilder().add_segment(0x10000, b"abc" * 1000).add_thread()


def refused(path: Path | str, kind: type[InputNotUsable] = InputNotUsable) -> InputNotUsable:
    with pytest.raises(InputNotUsable) as caught:
        open_core(path)
    error = caught.value
    assert type(error) is kind
    assert error.where == str(path)
    assert error.expected
    assert error.found
    assert error.next_step
    return error


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "input"
    path.write_bytes(content)
    return path


def test_an_empty_file(tmp_path: Path) -> None:
    assert "empty" in refused(write(tmp_path, b"")).message


def test_a_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "nothing").found == "no such file"


def test_a_directory(tmp_path: Path) -> None:
    assert refused(tmp_path).found == "a directory"


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert refused(tmp_path / "fifo").found == "a fifo"


def test_a_device() -> None:
    assert refused("/dev/zero").found == "a character device"


def test_a_file_without_permission(tmp_path: Path) -> None:
    path = small_core().write(tmp_path / "core")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        assert "permission" in refused(path).found
    finally:
        os.seteuid(user)


def test_a_path_with_a_nul() -> None:
    assert refused("core\0name").expected == "a readable file"


def test_bytes_that_are_no_elf_file(tmp_path: Path) -> None:
    assert refused(write(tmp_path, b"hello, world" * 100)).found == "68 65 6c 6c 6f 2c 20 77"


@pytest.mark.parametrize("kept", [4, 5, 6, 16, 40, 63])
def test_a_cut_header(tmp_path: Path, kept: int) -> None:
    assert "header" in refused(write(tmp_path, small_core().build()[:kept])).message


@pytest.mark.parametrize(
    ("elf_type", "found"),
    [(2, "executable"), (3, "shared library"), (1, "object file"), (77, "77")],
)
def test_other_elf_files(tmp_path: Path, elf_type: int, found: str) -> None:
    assert found in refused(write(tmp_path, elf_image(elf_type=elf_type))).found


def test_a_big_endian_core(tmp_path: Path) -> None:
    builder = small_core()
    builder.elf_data = 2
    path = builder.write(tmp_path / "core")
    assert refused(path, UnsupportedCore).found == "machine 15872, 64 bits, big-endian"


@pytest.mark.parametrize(
    ("elf_class", "machine_number", "found"),
    [
        (64, 21, "ppc64le"),
        (64, 243, "riscv64"),
        (32, 62, "x32"),
        (32, 40, "arm"),
        (64, 4711, "4711"),
    ],
)
def test_machines_that_are_not_supported(tmp_path: Path, elf_class: int, machine_number: int, found: str) -> None:
    builder = CoreBuilder(elf_class, "x86_64" if elf_class == 64 else "i386")
    builder.add_segment(0x10000, b"abc").add_thread()
    builder.machine_number = machine_number
    assert found in refused(builder.write(tmp_path / "core"), UnsupportedCore).found


def test_a_core_of_another_system(tmp_path: Path) -> None:
    builder = small_core()
    builder.os_abi = 9
    assert "FreeBSD" in refused(builder.write(tmp_path / "core"), UnsupportedCore).found


def test_a_core_without_program_headers(tmp_path: Path) -> None:
    raw = bytearray(small_core().build())
    raw[56:58] = b"\0\0"  # e_phnum
    assert "program headers" in refused(write(tmp_path, bytes(raw))).message


def test_program_headers_that_are_too_small(tmp_path: Path) -> None:
    builder = small_core()
    builder.program_header_entry_bytes = 8
    assert "impossible size" in refused(builder.write(tmp_path / "core")).message


def test_closing_releases_the_file_but_not_the_views(tmp_path: Path) -> None:
    with open_core(small_core().write(tmp_path / "core")) as core:
        view = core.memory.view(0x10000, 0x10003)
    assert view.tobytes() == b"abc"
    assert len(core.memory.file) == 0
    core.close()


@pytest.mark.parametrize("machine", ["x86_64", "i386", "aarch64"])
def test_what_the_header_says(tmp_path: Path, machine: str) -> None:
    builder = CoreBuilder(32 if machine == "i386" else 64, machine)
    builder.add_segment(0x10000, bytes(8192)).add_thread()
    builder.auxv = {6: 65536}
    with open_core(builder.write(tmp_path / "core")) as core:
        assert core.machine == machine
        assert core.word_bytes == (4 if machine == "i386" else 8)
        assert core.page_bytes == 65536
        assert core.coverage == 1.0
        assert not core.truncated
        assert core.compression is None
        assert core.saved_bytes == 8192
        assert core.file_bytes == core.bytes_on_disk == (tmp_path / "core").stat().st_size


@pytest.mark.parametrize("page_bytes", [0, 3, 100, 1 << 40])
def test_an_unusable_page_size_is_a_gap(tmp_path: Path, page_bytes: int) -> None:
    builder = small_core()
    builder.auxv = {6: page_bytes}
    with open_core(builder.write(tmp_path / "core")) as core:
        assert core.page_bytes == 4096
        assert "page_size_unknown" in [gap.cause for gap in core.gaps]


@pytest.mark.parametrize("elf_class", [32, 64])
def test_the_extended_segment_count(tmp_path: Path, elf_class: int) -> None:
    builder = CoreBuilder(elf_class, "x86_64" if elf_class == 64 else "i386")
    builder.add_segment(0x10000, b"abc").add_segment(0x20000, b"def").add_thread()
    builder.force_extended_count = True
    with open_core(builder.write(tmp_path / "core")) as core:
        assert core.memory.read(0x20000, 3) == b"def"
        assert core.made_by == "kernel"
        assert not core.truncated


def test_a_lost_extended_segment_count_is_worked_out_from_the_notes(tmp_path: Path) -> None:
    count = 70_000
    builder = CoreBuilder().add_segment(0x10000, b"abc").add_thread()
    addresses = np.arange(count, dtype=np.uint64) * np.uint64(8192) + np.uint64(1 << 32)
    builder.add_empty_segments(addresses, np.full(count, 4096, np.uint64))
    raw = builder.build()
    with open_core(write(tmp_path, raw)) as core:
        assert core.memory.region_count == count + 1
        assert core.coverage == 1.0
    with open_core(write(tmp_path, raw[:-64])) as core:
        assert core.memory.region_count == count + 1
        assert core.truncated
        assert core.coverage < 1.0
        assert "segment_count_cut" in [gap.cause for gap in core.gaps]


@pytest.mark.parametrize("writer", ["kernel", "gdb", "qemu"])
def test_who_wrote_the_core(tmp_path: Path, writer: str) -> None:
    builder = CoreBuilder().add_segment(0x10000, b"abc")
    builder.writer = writer
    builder.add_thread(floating_point=writer != "qemu")
    if writer == "gdb":
        builder.section_header_count = 5
    with open_core(builder.write(tmp_path / "core")) as core:
        assert core.made_by == writer


def test_a_writer_that_is_not_known(tmp_path: Path) -> None:
    builder = CoreBuilder().add_segment(0x10000, b"abc").add_thread()
    builder.with_process_info = False
    with open_core(builder.write(tmp_path / "core")) as core:
        assert core.made_by == "unknown"
