"""The core file as an ELF image: is it a usable core, and what do its program headers promise.

Knows: ELF headers of cores, PN_XNUM, truncated tables, and how to say what a file is when it is not
a core. Does not know: what the segments mean (``memory``) and what the notes say (``notes``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.corefile import elf
from coreheap.corefile.elf import Bytes, ElfHeader, ProgramHeaders
from coreheap.corefile.foreign import foreign_file, refuse_sections_alone
from coreheap.errors import InputNotUsable, UnsupportedCore
from coreheap.evidence import Gap

MACHINES: Final[dict[tuple[int, int], str]] = {
    (62, 64): "x86_64",
    (3, 32): "i386",
    (183, 64): "aarch64",
}
"""(e_machine, bits) -> the name of a machine whose cores can be read."""

SEGMENT_LIMIT: Final = 1 << 21
"""Program headers read at most; vm.max_map_count, 65,530 by default, bounds them in a real core."""
_OTHER_MACHINES: Final[dict[tuple[int, int], str]] = {
    (62, 32): "x86_64 with 32-bit pointers (x32)",
    (183, 32): "aarch64 with 32-bit pointers (ILP32)",
    (40, 32): "32-bit arm",
    (243, 64): "riscv64",
    (243, 32): "riscv32",
    (21, 64): "ppc64le",
    (258, 64): "loongarch64",
    (8, 32): "mips",
    (8, 64): "mips64",
}
_BIG_ENDIAN_MACHINES: Final[dict[tuple[int, int], str]] = {
    (22, 64): "s390x",
    (22, 32): "s390",
    (21, 64): "ppc64",
    (20, 32): "ppc",
    (8, 32): "mips",
    (8, 64): "mips64",
    (43, 64): "sparc64",
    (40, 32): "32-bit arm",
    (183, 64): "aarch64",
    (15, 32): "hppa",
}
_OTHER_SYSTEMS: Final[dict[int, str]] = {
    1: "HP-UX",
    2: "NetBSD",
    4: "the Hurd",
    6: "Solaris",
    7: "AIX",
    8: "IRIX",
    9: "FreeBSD",
    10: "Tru64",
    12: "OpenBSD",
    13: "OpenVMS",
    17: "CloudABI",
}
"""EI_OSABI of systems that are not Linux."""
_EXPECTED: Final = f"a little-endian Linux core of {', '.join(MACHINES.values())}"
_KNOWN_MACHINES: Final = "coreheap knows only the machines named here; analyse such a core with its own system's gdb"
_MAKE_A_CORE = (
    "give the core that the kernel wrote (ulimit -c unlimited; coredumpctl where systemd keeps "
    "them), or one of gdb's generate-core-file"
)


@dataclass(frozen=True, slots=True)
class CoreImage:
    """The header and the program header table of a core."""

    header: ElfHeader
    machine: str
    segments: ProgramHeaders
    promised_bytes: int
    """Bytes that the headers place in the file: segments, and tables that are cut off."""
    present_bytes: int
    """Those of them that the file really has."""
    gaps: tuple[Gap, ...]

    @property
    def coverage(self) -> float:
        """Share of the promised bytes that are in the file, 1.0 when nothing is cut."""
        return self.present_bytes / self.promised_bytes if self.promised_bytes else 1.0

    @property
    def truncated(self) -> bool:
        return self.present_bytes < self.promised_bytes


def read_image(data: Bytes, where: str) -> CoreImage:
    """Header and program headers of the core in ``data``, the whole file.

    Raises InputNotUsable for what is no core, UnsupportedCore for a core of another kind of
    machine.
    """
    header = core_header(data, where)
    machine = machine_of(header, where)
    count, missing_bytes, gaps = promised_count(data, header)
    entry_bytes = elf.program_header_entry_bytes(header.bits)
    if header.program_header_bytes < entry_bytes:
        raise InputNotUsable(
            "the program header table has entries of an impossible size",
            where=where,
            expected=f"{entry_bytes} bytes an entry",
            found=f"{header.program_header_bytes}",
            next_step="the file is damaged; fetch the core again",
        )
    segments = elf.program_headers_of(data, header, min(count, SEGMENT_LIMIT))
    if len(segments) == 0:
        refuse_sections_alone(header, where)
        raise InputNotUsable(
            "the core has no program headers to read",
            where=where,
            expected=f"{count} program headers at offset {header.program_header_offset}",
            found=f"a file of {len(data)} bytes",
            next_step="the file is cut right after its header; fetch the core again",
        )
    if len(segments) < count:
        gaps.append(
            Gap(
                "program_headers_cut",
                f"{count - len(segments)} of {count} program headers are missing; "
                "the memory that they describe is unknown",
            )
        )
        missing_bytes += (count - len(segments)) * header.program_header_bytes
    promised, present = _bytes_promised_and_present(segments, len(data))
    return CoreImage(
        header=header,
        machine=machine,
        segments=segments,
        promised_bytes=promised + missing_bytes,
        present_bytes=present,
        gaps=tuple(gaps),
    )


def bytes_in_file(offset: elf.Words, byte_count: elf.Words, file_bytes: int) -> elf.Words:
    """How many of ``byte_count`` bytes from ``offset`` a file holds; nothing can overflow."""
    size = np.uint64(file_bytes)
    return np.minimum(byte_count, size - np.minimum(offset, size))


def core_header(data: Bytes, where: str) -> ElfHeader:
    """The header of a core, of which ``data`` is the beginning. Raises InputNotUsable for what is no core."""
    head = data[:64].tobytes()
    if head[:4] != elf.ELF_MAGIC:
        dump = foreign_file(data)
        raise InputNotUsable(
            "this is not an ELF core",
            where=where,
            expected="the magic bytes 7f 45 4c 46 (ELF)",
            found=dump.what if dump else head[:8].hex(" ") or "an empty file",
            next_step=dump.next_step if dump else _MAKE_A_CORE,
        )
    if len(head) > 19 and head[5] == 2:
        bits = {1: 32, 2: 64}.get(head[4], 0)
        number = int.from_bytes(head[18:20], "big")
        machine = _BIG_ENDIAN_MACHINES.get((number, bits), f"machine {number}, {bits} bits")
        raise UnsupportedCore(
            "the file is of a big-endian machine",
            where=where,
            expected=_EXPECTED,
            found=f"{machine}, big-endian",
            next_step=_KNOWN_MACHINES,
        )
    header = elf.header_of(head)
    if header is None:
        raise InputNotUsable(
            "the ELF header is damaged or cut",
            where=where,
            expected="a whole header of class 32 or 64",
            found=f"{len(data)} bytes, beginning with {head[:8].hex(' ')}",
            next_step="fetch the core again",
        )
    if header.kind != elf.ET_CORE:
        kinds = {
            elf.ET_REL: "an object file",
            elf.ET_EXEC: "an executable",
            elf.ET_DYN: "an executable or a shared library",
        }
        raise InputNotUsable(
            "this ELF file is not a core",
            where=where,
            expected="e_type 4 (ET_CORE)",
            found=kinds.get(header.kind, f"e_type {header.kind}"),
            next_step="name the core first; an executable goes with --exe",
        )
    return header


def machine_of(header: ElfHeader, where: str) -> str:
    """The name of the core's machine. Raises UnsupportedCore for one whose cores cannot be read."""
    key = (header.machine, header.bits)
    if key not in MACHINES or header.os_abi in _OTHER_SYSTEMS:
        found = _OTHER_MACHINES.get(key, f"machine {header.machine}, {header.bits} bits")
        if key in MACHINES:
            found = f"a core of {_OTHER_SYSTEMS[header.os_abi]}"
        raise UnsupportedCore(
            "cores of this kind of machine are not supported",
            where=where,
            expected=_EXPECTED,
            found=found,
            next_step=_KNOWN_MACHINES,
        )
    return MACHINES[key]


def promised_count(data: Bytes, header: ElfHeader) -> tuple[int, int, list[Gap]]:
    """The number of program headers, the bytes missing of the table that tells it, and gaps.

    fs/binfmt_elf.c writes PN_XNUM for 65,535 segments and more, and the section header with the
    real count after all segments: the first thing that a truncated core loses. Then the offset of
    the notes tells it, as the kernel puts them right behind the table.
    """
    if header.program_header_count != elf.PN_XNUM:
        return header.program_header_count, 0, []
    count = elf.extended_program_header_count(data, header)
    if count:
        return count, 0, []
    first = elf.program_headers_of(data, header, 1)
    stride = max(1, header.program_header_bytes)
    count = 0
    if len(first) and first.kind[0] == elf.PT_NOTE:
        count = (int(first.file_offset[0]) - header.program_header_offset) // stride
    missing = Gap(
        "segment_count_cut",
        "the section header with the number of segments is missing; "
        "the number was worked out from the place of the notes",
    )
    if count < elf.PN_XNUM:
        count = elf.PN_XNUM
        missing = Gap(
            "segment_count_cut",
            f"the section header with the number of segments is missing; only the first {elf.PN_XNUM} are read",
        )
    return count, header.section_header_bytes or 1, [missing]


def _bytes_promised_and_present(segments: ProgramHeaders, file_bytes: int) -> tuple[int, int]:
    stored = np.isin(segments.kind, (elf.PT_LOAD, elf.PT_NOTE))
    byte_count = segments.file_bytes[stored]
    present = bytes_in_file(segments.file_offset[stored], byte_count, file_bytes)
    # A float sum first: 2**64 bytes a segment, as hostile headers promise, would wrap in uint64.
    if float(byte_count.astype(np.float64).sum()) < 2.0**62:
        return int(byte_count.sum()), int(present.sum())
    return sum(byte_count.tolist()), sum(present.tolist())
