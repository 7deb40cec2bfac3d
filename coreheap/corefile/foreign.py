"""Dumps that are not of one Linux process, told by what they are: of whole machines, of other systems, of other tools.

Knows: the first bytes of such files, who owns their notes, and where the memory of a machine lies in an ELF file. Does not
know: how any of it is read. A row that is wrong refuses a good core, so each stands on a name or a rule that no writer of
Linux cores shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.corefile import elf
from coreheap.corefile.elf import Bytes, ProgramHeaders
from coreheap.corefile.notes import NT_AUXV, NT_FILE, NT_PRPSINFO, NT_SIGINFO, NoteTable, text_of
from coreheap.errors import UnsupportedCore


@dataclass(frozen=True, slots=True)
class ForeignDump:
    """What a file is, and what to do to get an answer."""

    what: str
    next_step: str


_OUT_OF_MACHINE: Final = (
    "analyse it with crash or drgn; crash's gcore extension (extend gcore.so; gcore PID) writes the core of one process out"
    " of it, which coreheap reads"
)
_FIRST_FLATTENED: Final = "put it together first (makedumpfile -R DUMP < FILE), then " + _OUT_OF_MACHINE
_OF_ITS_SYSTEM: Final = "coreheap reads glibc's heap of Linux processes; analyse it with the debugger of its own system"
_OF_HYPERVISOR: Final = "take a core inside of the guest: gcore PID, or its kernel's core_pattern"
_TAKE_A_CORE: Final = "take a core of the process: gcore PID, or let it crash with ulimit -c unlimited"
_UNPACK: Final = "unpack it first, and give coreheap the core that is in it"

_FIRST_BYTES: Final[tuple[tuple[int, bytes, ForeignDump], ...]] = (
    (0, b"KDUMP   ", ForeignDump("a kdump-compressed dump of a whole machine", _OUT_OF_MACHINE)),
    (0, b"DISKDUMP", ForeignDump("a diskdump of a whole machine", _OUT_OF_MACHINE)),
    (0, b"makedumpfile\0\0\0\0", ForeignDump("makedumpfile's flattened dump of a whole machine", _FIRST_FLATTENED)),
    (0, b"\xed\x23\x8f\x61\x73\x01\x19\xa8", ForeignDump("an LKCD dump of a whole machine", _OUT_OF_MACHINE)),
    (0, b"EMiL", ForeignDump("a LiME dump of a whole machine's memory", _OUT_OF_MACHINE)),
    (0, b"AVML", ForeignDump("an AVML dump of a whole machine's memory", _OUT_OF_MACHINE)),
    (0, b"QEVM", ForeignDump("the saved state of a qemu guest", _OF_HYPERVISOR)),
    (0, b"LibvirtQemudSave", ForeignDump("libvirt's saved state of a guest", _OF_HYPERVISOR)),
    (0, b"LinuxGuestRecord", ForeignDump("the saved state of a Xen guest", _OF_HYPERVISOR)),
    (0, b"\xd0\xbe\xd2\xbe", ForeignDump("the saved state of a VMware guest", _OF_HYPERVISOR)),
    (0, b"\xd1\xba\xd1\xba", ForeignDump("the saved state of a VMware guest", _OF_HYPERVISOR)),
    (0, b"\xd2\xbe\xd2\xbe", ForeignDump("the saved state of a VMware guest", _OF_HYPERVISOR)),
    (0, b"PAGEDU64", ForeignDump("a dump of a whole Windows machine", _OF_ITS_SYSTEM)),
    (0, b"PAGEDUMP", ForeignDump("a dump of a whole Windows machine", _OF_ITS_SYSTEM)),
    (
        0,
        b"MDMP",
        ForeignDump(
            "a minidump (Windows, Breakpad, Crashpad), which holds stacks and no heap",
            "take a whole core of the process: gcore PID, or let it crash with ulimit -c unlimited",
        ),
    ),
    (0, b"\xcf\xfa\xed\xfe", ForeignDump("a Mach-O file (macOS)", _OF_ITS_SYSTEM)),
    (0, b"\xce\xfa\xed\xfe", ForeignDump("a Mach-O file (macOS)", _OF_ITS_SYSTEM)),
    (0, b"MZ", ForeignDump("a program of Windows", _OF_ITS_SYSTEM)),
    (
        0,
        b"JAVA PROFILE ",
        ForeignDump("a heap dump of Java's own objects", "analyse it with a Java heap analyser; " + _TAKE_A_CORE),
    ),
    (0, b"PERFILE2", ForeignDump("a recording of perf", "perf report shows it; " + _TAKE_A_CORE)),
    (
        0,
        b"=erl_crash_dump",
        ForeignDump("a crash dump of Erlang's own", "its crashdump_viewer shows it; " + _TAKE_A_CORE),
    ),
    (0, b"ProblemType:", ForeignDump("a crash report of apport", "apport-unpack FILE FOLDER, then FOLDER/CoreDump")),
    (0, b"\x19\x43\x56\x54", ForeignDump("an image of CRIU", "coredump from CRIU's tools makes a core of it")),
    (0, b"BZh", ForeignDump("a file that bzip2 packed", "bunzip2 FILE, and give coreheap what is in it")),
    (0, b"\x02\x21\x4c\x18", ForeignDump("a file in lz4's old format", "lz4 -d FILE CORE, and give coreheap the core")),
    (0, b"PK\x03\x04", ForeignDump("a zip archive", _UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", ForeignDump("a 7z archive", _UNPACK)),
    (0, b"!<arch>\n", ForeignDump("an archive of ar", _UNPACK)),
    (257, b"ustar", ForeignDump("a tar archive", _UNPACK)),
)
"""(offset, magic, what it is). makedumpfile's diskdump_mod.h and makedumpfile.h, qemu's migration/savevm.c, lime.h."""
HEAD_BYTES: Final = 264
"""So many first bytes decide."""

_OWNERS: Final[tuple[tuple[bytes, ForeignDump], ...]] = (
    (b"QEMU", ForeignDump("a dump of a whole guest, by qemu's dump-guest-memory or virsh dump", _OUT_OF_MACHINE)),
    (b"VMCOREINFO", ForeignDump("a dump of a whole Linux machine (vmcore)", _OUT_OF_MACHINE)),
    (b"Xen", ForeignDump("a dump of a whole Xen guest", _OF_HYPERVISOR)),
    (b".note.Xen", ForeignDump("a dump of a whole Xen guest", _OF_HYPERVISOR)),
    (b"VBCORE", ForeignDump("a dump of a whole VirtualBox guest", _OF_HYPERVISOR)),
    (b"VBCPU", ForeignDump("a dump of a whole VirtualBox guest", _OF_HYPERVISOR)),
    (b"NetBSD", ForeignDump("a core of a NetBSD process", _OF_ITS_SYSTEM)),
    (b"FreeBSD", ForeignDump("a core of a FreeBSD process", _OF_ITS_SYSTEM)),
    (b"OpenBSD", ForeignDump("a core of an OpenBSD process", _OF_ITS_SYSTEM)),
    (b"DragonFly", ForeignDump("a core of a DragonFly process", _OF_ITS_SYSTEM)),
    (b"QNX", ForeignDump("a core of a QNX process", _OF_ITS_SYSTEM)),
    (b"Haiku", ForeignDump("a core of a Haiku process", _OF_ITS_SYSTEM)),
    (b"MINIX", ForeignDump("a core of a Minix process", _OF_ITS_SYSTEM)),
)
"""The beginning of a note's owner -> what has such notes. qemu's target/i386/arch_dump.c, kernel/vmcore_info.c, the systems'
core writers."""
_SOLARIS: Final = ForeignDump("a core of a Solaris, illumos or Hurd process", _OF_ITS_SYSTEM)
_SOLARIS_KINDS: Final = (10, 13, 16)
"""NT_PSTATUS, NT_PSINFO, NT_LWPSTATUS of CORE (sys/elf.h of illumos); Linux has no such types of its own."""
_PHYSICAL: Final = ForeignDump("physical memory: a dump of a whole machine or guest", _OUT_OF_MACHINE)
_KERNEL: Final = ForeignDump("memory of a kernel: /proc/kcore, or a dump of a whole machine", _OUT_OF_MACHINE)
_LINUX: Final = (b"CORE", b"LINUX", b"GDB", b"GNU", b"")
"""Owners of notes in cores of Linux processes."""


def foreign_file(head: Bytes) -> ForeignDump | None:
    """What a file with these first bytes is that is no ELF file; None for what is not known."""
    first = head[:HEAD_BYTES].tobytes()
    return next((dump for offset, magic, dump in _FIRST_BYTES if first[offset:].startswith(magic)), None)


def refuse_foreign_core(
    notes: NoteTable, segments: ProgramHeaders, bits: int, notes_are_whole: bool, where: str
) -> None:
    """Raises UnsupportedCore for a core that is not of one Linux process."""
    dump = _by_notes(notes) or _by_memory(notes, segments, bits)
    if dump is None and notes_are_whole and len(notes) and not any(owner in _LINUX for owner in notes.owners):
        names = ", ".join(repr(text_of(owner)) for owner in notes.owners[:3])
        dump = ForeignDump(f"a core whose notes are all of {names}", _OF_ITS_SYSTEM)
    if dump is not None:
        raise UnsupportedCore(
            "this is not a core of a Linux process",
            where=where,
            expected="the core of one process, written by Linux, gdb or qemu-user",
            found=dump.what,
            next_step=dump.next_step,
        )


def refuse_sections_alone(header: elf.ElfHeader, where: str) -> None:
    """Raises UnsupportedCore for a core without segments whose content lies in sections, as Xen's dump-core writes them."""
    if header.program_header_count == 0 and header.section_header_count > 1:
        raise UnsupportedCore(
            "this is not a core of a Linux process",
            where=where,
            expected="a core with program headers",
            found="a core that consists of sections, as Xen's dump-core writes of a whole guest",
            next_step=_OF_HYPERVISOR,
        )


def _by_notes(notes: NoteTable) -> ForeignDump | None:
    """By owners of notes: dumps of machines have Linux' own notes as well, cores of other systems have none of these."""
    is_linux = any(owner in _LINUX[:2] for owner in notes.owners)
    for beginning, dump in _OWNERS:
        if any(owner.startswith(beginning) for owner in notes.owners):
            return None if is_linux and dump.next_step is _OF_ITS_SYSTEM else dump
    if all(len(notes.rows(kind)) for kind in _SOLARIS_KINDS[:2]) or len(notes.rows(_SOLARIS_KINDS[2])):
        return _SOLARIS
    return None


def _by_memory(notes: NoteTable, segments: ProgramHeaders, bits: int) -> ForeignDump | None:
    """By where memory lies: a process has none in the kernel's half, and Linux, gdb and qemu-user write no physical addresses."""
    rows = segments.rows_of_kind(elf.PT_LOAD)
    rows = rows[segments.memory_bytes[rows] > 0]
    if len(rows) == 0:
        return None
    address, physical = segments.address[rows], segments.physical[rows]
    if bits == 64 and bool((address >= np.uint64(1 << 63)).all()):
        return _KERNEL
    of_process = (NT_PRPSINFO, NT_AUXV, NT_FILE, NT_SIGINFO)
    if any(len(notes.rows(kind)) for kind in of_process):
        return None
    is_physical = (address == physical) | (address == 0)
    return _PHYSICAL if bool(is_physical.all()) else None
