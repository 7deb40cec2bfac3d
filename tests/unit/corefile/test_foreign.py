"""Dumps that are not of one Linux process: refused by what they are, with a next step; nothing of them is shown as a process's."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from coreheap.cli import main
from coreheap.corefile import open_core
from coreheap.errors import InputNotUsable, UnsupportedCore
from tests.core_builder import CoreBuilder

PAGE = 4096
DIRECT_MAP = 0xFFFF_8880_0000_0000
"""Where Linux maps all physical memory on x86-64."""
GUEST_TEXT = b"guest memory, nobody's command line\0"


def machine(elf_class: int = 64, name: str = "x86_64") -> CoreBuilder:
    """A dump without what the kernel writes of a process."""
    builder = CoreBuilder(elf_class, name)
    builder.with_process_info = builder.with_signal_info = builder.with_auxv = False
    return builder


def qemu_guest(elf_class: int = 64, name: str = "x86_64") -> CoreBuilder:
    """dump-guest-memory: a status and qemu's own state for each processor, memory by physical address."""
    builder = machine(elf_class, name).add_thread(1).add_thread(2)
    builder.add_note(b"QEMU", 0, bytes(440)).add_note(b"QEMU", 0, bytes(440))
    builder.add_segment(0, GUEST_TEXT.ljust(PAGE, b"\0"))
    return builder.add_segment(0xFFFC0000, bytes(PAGE), physical=0xFFFC0000)


def guest_of_aarch64() -> CoreBuilder:
    """There qemu has no notes of its own."""
    return (
        machine(64, "aarch64").add_thread(1).add_segment(0x40000000, GUEST_TEXT.ljust(PAGE, b"\0"), physical=0x40000000)
    )


def guest_with_paging() -> CoreBuilder:
    builder = machine().add_thread(1).add_note(b"QEMU", 0, bytes(440))
    return builder.add_segment(0x7F0000000000, bytes(PAGE), physical=0x1000).add_segment(DIRECT_MAP, bytes(PAGE))


def vmcore() -> CoreBuilder:
    """/proc/vmcore, and makedumpfile -E: VMCOREINFO, memory at the kernel's addresses."""
    builder = machine().add_thread(0).add_note(b"VMCOREINFO", 0, b"OSRELEASE=6.1.0\nPAGESIZE=4096\n")
    return builder.add_segment(DIRECT_MAP, bytes(PAGE), physical=0x100000)


def vmcore_without_information() -> CoreBuilder:
    return machine().add_thread(0).add_segment(DIRECT_MAP, bytes(PAGE), physical=0x100000)


def kcore() -> CoreBuilder:
    """/proc/kcore has a process's notes: of the one that read it."""
    builder = CoreBuilder().add_thread(1)
    builder.name, builder.arguments = b"vmlinux", b"BOOT_IMAGE=/vmlinuz root=/dev/sda1"
    return builder.add_segment(DIRECT_MAP, bytes(PAGE)).add_segment(0xFFFFFFFF81000000, bytes(PAGE))


def netbsd() -> CoreBuilder:
    """No EI_OSABI tells it: sys/kern/core_elf32.c leaves that at System V."""
    builder = machine().add_note(b"NetBSD-CORE", 1, GUEST_TEXT.ljust(160, b"\0"))
    return builder.add_note(b"NetBSD-CORE@1", 33, bytes(208)).add_segment(0x400000, bytes(PAGE))


def freebsd() -> CoreBuilder:
    builder = machine().add_note(b"FreeBSD", 3, GUEST_TEXT.ljust(120, b"\0")).add_note(b"FreeBSD", 1, bytes(224))
    return builder.add_segment(0x400000, bytes(PAGE))


def openbsd() -> CoreBuilder:
    return (
        machine().add_note(b"OpenBSD", 10, bytes(120)).add_note(b"OpenBSD@1", 20, bytes(208)).add_segment(0x1000, b"x")
    )


def solaris() -> CoreBuilder:
    """CORE owns the notes there too; pstatus, psinfo, lwpstatus have types that Linux has not."""
    builder = machine()
    for kind, size in ((3, 336), (1, 824), (13, 416), (10, 1680), (16, 1296)):
        builder.add_note(b"CORE", kind, bytes(size))
    return builder.add_segment(0x400000, bytes(PAGE))


def virtualbox() -> CoreBuilder:
    return (
        machine()
        .add_note(b"VBCORE", 0xB00, bytes(24))
        .add_note(b"VBCPU", 0xB01, bytes(900))
        .add_segment(0, bytes(PAGE))
    )


def of_nobody() -> CoreBuilder:
    return machine().add_note(b"ACME", 1, bytes(100)).add_segment(0x400000, bytes(PAGE))


CORES: dict[str, tuple[Callable[[], CoreBuilder], str]] = {
    "qemu": (qemu_guest, "guest"),
    "qemu of 32 bits": (lambda: qemu_guest(32, "i386"), "guest"),
    "qemu of aarch64": (guest_of_aarch64, "machine or guest"),
    "qemu with paging": (guest_with_paging, "guest"),
    "vmcore": (vmcore, "Linux machine"),
    "vmcore without VMCOREINFO": (vmcore_without_information, "memory of a kernel"),
    "kcore": (kcore, "/proc/kcore"),
    "VirtualBox": (virtualbox, "VirtualBox"),
    "NetBSD": (netbsd, "NetBSD"),
    "FreeBSD": (freebsd, "FreeBSD"),
    "OpenBSD": (openbsd, "OpenBSD"),
    "Solaris": (solaris, "Solaris"),
    "an unknown system": (of_nobody, "'ACME'"),
}


@pytest.mark.parametrize("name", list(CORES))
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_core_that_is_not_of_a_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, is_packed: bool
) -> None:
    build, what = CORES[name]
    raw = build().build()
    path = tmp_path / "core"
    path.write_bytes(gzip.compress(raw) if is_packed else raw)
    with pytest.raises(UnsupportedCore, match="not a core of a Linux process") as caught:
        open_core(path)
    assert what in caught.value.found
    assert main(["analyze", str(path)]) == 3
    told = capsys.readouterr()
    assert told.out == ""
    assert "next step: " in told.err
    assert "guest memory" not in told.err


def test_a_core_of_sections_alone_as_xen_writes_it(tmp_path: Path) -> None:
    head = bytearray(machine().build()[:64])
    struct.pack_into("<HHHHH", head, 54, 56, 0, 64, 7, 6)
    path = tmp_path / "core"
    path.write_bytes(bytes(head) + bytes(PAGE))
    with pytest.raises(UnsupportedCore, match="not a core of a Linux process") as caught:
        open_core(path)
    assert "Xen" in caught.value.found


FILES = {
    "kdump": (b"KDUMP   \x06\0\0\0Linux\0", "kdump"),
    "diskdump": (b"DISKDUMP\x06\0\0\0", "diskdump"),
    "flattened": (b"makedumpfile\0\0\0\0" + bytes(16), "flattened"),
    "LiME": (b"EMiL\x01\0\0\0", "LiME"),
    "qemu's state": (b"QEVM\0\0\0\x03", "qemu"),
    "Windows": (b"PAGEDU64", "Windows"),
    "minidump": (b"MDMP\x93\xa7", "minidump"),
    "macOS": (b"\xcf\xfa\xed\xfe\x07\0\0\x01\x03\0\0\0\x04\0\0\0", "macOS"),
    "Java": (b"JAVA PROFILE 1.0.2\0", "Java"),
    "apport": (b"ProblemType: Crash\nArchitecture: amd64\n", "apport"),
    "tar": (b"core.1234".ljust(257, b"\0") + b"ustar\0", "tar"),
    "bzip2": (b"BZh91AY&SY", "bzip2"),
}


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_file_that_is_no_elf_file_is_named(tmp_path: Path, name: str, is_packed: bool) -> None:
    head, what = FILES[name]
    path = tmp_path / "core"
    content = head + bytes(PAGE)
    path.write_bytes(gzip.compress(content) if is_packed else content)
    with pytest.raises(InputNotUsable, match="not an ELF core") as caught:
        open_core(path)
    assert what in caught.value.found
    assert caught.value.next_step


@pytest.mark.parametrize("physical", [0, 0x100000])
@pytest.mark.parametrize("writer", ["kernel", "gdb", "qemu"])
def test_a_process_stays_a_process(tmp_path: Path, writer: str, physical: int) -> None:
    """Also where a writer puts the address into p_paddr, and a page of the kernel's half (vsyscall) is in the core."""
    builder = CoreBuilder().add_thread(4242)
    builder.writer = writer
    builder.add_segment(0x100000, bytes(PAGE), physical=physical).add_segment(
        0xFFFFFFFFFF600000, bytes(PAGE), flags="r-x"
    )
    path = tmp_path / "core"
    path.write_bytes(builder.build())
    with open_core(path) as core:
        assert core.process.command_line == "program --option value"


def test_a_core_that_lost_its_notes_is_still_tried(tmp_path: Path) -> None:
    """gdb writes them at the end of the file."""
    path = tmp_path / "core"
    path.write_bytes(machine().add_segment(0x100000, b"x" * PAGE).build())
    with open_core(path) as core:
        assert core.memory.read(0x100000, 1) == b"x"
