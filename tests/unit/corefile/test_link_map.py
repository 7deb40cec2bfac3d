"""Modules of cores that hold no ELF header and no NT_FILE, as qemu-user writes them: the dynamic linker's own list.

The structures are written down here from elf/link.h (r_debug, link_map) and the generic ABI's dynamic section.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coreheap.corefile import Core, open_core
from coreheap.corefile.link_map import find_r_debug, linked_objects
from tests.core_builder import CoreBuilder, elf_image

PAGE = 4096
PROGRAM, LIBRARY, LINKER, PRIVATE = 0x5500_0000, 0x5600_0000, 0x5700_0000, 0x5800_0000
STRIDE = 0x1000
DT_NEEDED, DT_STRTAB, DT_DEBUG = 1, 5, 21


@dataclass
class Linked:
    """One object: text (not saved) at ``base``, a page with its dynamic section behind it, a writable page."""

    base: int
    name: bytes
    bias: int | None = None
    dynamic: list[int] = field(default_factory=list)

    @property
    def dynamic_address(self) -> int:
        return self.base + 4 * PAGE + 0x100

    @property
    def end(self) -> int:
        """Not at a page's end, as the dynamic linker has it."""
        return self.base + 6 * PAGE - 0x123


class Process:
    """A process whose link map lies in ld.so's private memory, entry by entry STRIDE bytes apart."""

    def __init__(self, *objects: Linked, word_bytes: int = 8, machine: str = "aarch64", tag: int = 0) -> None:
        self.objects = objects
        self.word_bytes = word_bytes
        self.machine = machine
        self.tag = tag << 56
        self.r_debug = LINKER + 5 * PAGE + 0x40
        self.version = 1
        self.next_namespace = 0
        self.with_ranges = True
        self.following = [PRIVATE + STRIDE * (number + 1) for number in range(len(objects) - 1)] + [0]
        objects[0].dynamic = [DT_NEEDED, 1, DT_DEBUG, self.r_debug, DT_STRTAB, objects[0].base + 0x200, 0, 0]
        for linked in objects[1:]:
            linked.dynamic = [DT_NEEDED, 1, DT_STRTAB, linked.base + 0x200, 0, 0]

    def words(self, *values: int) -> bytes:
        return struct.pack(f"<{len(values)}{'Q' if self.word_bytes == 8 else 'I'}", *values)

    def entry(self, number: int) -> bytes:
        linked = self.objects[number]
        at = PRIVATE + STRIDE * number
        name = at + 0x800
        bias = linked.base if linked.bias is None else linked.bias
        following = self.following[number] | (self.tag if self.following[number] else 0)
        public = self.words(bias, name | self.tag, linked.dynamic_address, following, 0)
        # l_real, l_ns, l_libname, then what differs by release; pointers into the dynamic section among it.
        private = self.words(at, 0, 0, *(linked.dynamic_address + 16 * step for step in range(60)))
        ranges = self.words(linked.base, linked.end, linked.base + PAGE) if self.with_ranges else b""
        body = (public + private + ranges).ljust(0x800, b"\0")
        return (body + linked.name + b"\0").ljust(STRIDE, b"\0")

    def builder(self) -> CoreBuilder:
        builder = CoreBuilder(8 * self.word_bytes, self.machine).add_thread()
        builder.auxv = {3: self.objects[0].base + 64, 6: PAGE, 9: self.objects[0].base + 0x800}
        builder.writer = "qemu"
        for linked in self.objects:
            builder.add_segment(linked.base, None, 4 * PAGE, "r-x")
            dynamic = bytes(0x100) + self.words(*linked.dynamic)
            builder.add_segment(linked.base + 4 * PAGE, dynamic.ljust(PAGE, b"\0"), flags="r--")
            data = bytearray(PAGE)
            if linked.base == LINKER:
                structures = self.words(self.version, PRIVATE | self.tag, 0, 0, LINKER, self.next_namespace)
                data[0x40 : 0x40 + len(structures)] = structures
            builder.add_segment(linked.base + 5 * PAGE, bytes(data))
        builder.add_segment(PRIVATE, b"".join(self.entry(number) for number in range(len(self.objects))))
        return builder

    def opened(self, folder: Path, *, sysroot: Path | None = None, executable: Path | None = None) -> Core:
        return open_core(self.builder().write(folder / "core"), sysroot=sysroot, executable=executable)


def three() -> tuple[Linked, Linked, Linked]:
    return (Linked(PROGRAM, b""), Linked(LIBRARY, b"/lib/libc.so.6"), Linked(LINKER, b"/lib/ld.so"))


def rows(core: Core) -> list[tuple[str, int, int, bool]]:
    return [(module.path, module.start, module.end, module.is_executable) for module in core.modules]


EXPECTED = [
    ("", PROGRAM, PROGRAM + 6 * PAGE, True),
    ("/lib/libc.so.6", LIBRARY, LIBRARY + 6 * PAGE, False),
    ("/lib/ld.so", LINKER, LINKER + 6 * PAGE, False),
]


@pytest.mark.parametrize("tag", [0, 0xB])
def test_modules_without_headers_have_place_name_and_dynamic_section(tmp_path: Path, tag: int) -> None:
    """A tag in the top byte: ld.so takes its later entries from malloc, which may tag memory (aarch64, MTE)."""
    process = Process(*three(), tag=tag)
    with process.opened(tmp_path, sysroot=tmp_path) as core:
        assert rows(core) == EXPECTED
        assert [module.load_bias for module in core.modules] == [PROGRAM, LIBRARY, LINKER]
        assert core.modules[0].dynamic == {
            DT_NEEDED: 1,
            DT_DEBUG: process.r_debug,
            DT_STRTAB: PROGRAM + 0x200,
        }
        assert core.modules[1].dynamic[DT_STRTAB] == LIBRARY + 0x200


def test_on_32_bit_machines(tmp_path: Path) -> None:
    """The same structures with words of four bytes."""
    with Process(*three(), word_bytes=4, machine="i386").opened(tmp_path, sysroot=tmp_path) as core:
        assert rows(core) == EXPECTED
        assert core.modules[1].dynamic[DT_STRTAB] == LIBRARY + 0x200


def test_a_file_without_a_build_id_to_compare_is_not_used(tmp_path: Path) -> None:
    """Neither a library of the right name below the sysroot nor a program that was given by name."""
    place = tmp_path / "root" / "lib" / "libc.so.6"
    place.parent.mkdir(parents=True)
    place.write_bytes(elf_image(machine="aarch64"))
    program = tmp_path / "program"
    program.write_bytes(elf_image(machine="aarch64"))
    with Process(*three()).opened(tmp_path, sysroot=tmp_path / "root", executable=program) as core:
        assert [(module.file_status, module.elf_file) for module in core.modules] == [
            ("not_verifiable", None),
            ("not_verifiable", None),
            ("no_file", None),
        ]
        (gap,) = (gap for gap in core.gaps if gap.cause == "modules_not_verifiable")
        assert "2 modules" in gap.consequence
        assert "--exe" in gap.consequence


def test_without_ranges_a_module_is_the_mapping_at_its_load_address(tmp_path: Path) -> None:
    process = Process(*three())
    process.with_ranges = False
    with process.opened(tmp_path, sysroot=tmp_path) as core:
        assert [(module.start, module.end) for module in core.modules] == [
            (base, base + 4 * PAGE) for base in (PROGRAM, LIBRARY, LINKER)
        ]


def test_a_program_at_fixed_addresses(tmp_path: Path) -> None:
    """Its load bias is 0, and no mapping is there."""
    program, library, linker = three()
    program.bias = 0
    with Process(program, library, linker).opened(tmp_path, sysroot=tmp_path) as core:
        assert rows(core) == EXPECTED
        assert core.modules[0].load_bias == 0


@pytest.mark.parametrize("version", [1, 2])
def test_other_namespaces(tmp_path: Path, version: int) -> None:
    """What dlmopen loaded is in a list of its own; r_next leads there from version 2 on, before it is another thing."""
    other = Linked(0x5A00_0000, b"/lib/libc.so.6")
    process = Process(*three(), other)
    process.following[2] = 0
    process.version = version
    place = 0x5B00_0000
    process.next_namespace = place
    builder = process.builder()
    # The second list's r_next leads back to the first: that ends it.
    second = process.words(version, PRIVATE + 3 * STRIDE, 0, 0, LINKER, process.r_debug)
    builder.add_segment(place, second.ljust(PAGE, b"\0"))
    with open_core(builder.write(tmp_path / "core"), sysroot=tmp_path) as core:
        found = [*EXPECTED, ("/lib/libc.so.6", other.base, other.base + 6 * PAGE, False)]
        assert rows(core) == (found if version == 2 else EXPECTED)


def test_a_list_that_goes_in_a_circle_ends(tmp_path: Path) -> None:
    process = Process(*three())
    process.following[2] = PRIVATE + STRIDE
    with process.opened(tmp_path, sysroot=tmp_path) as core:
        assert rows(core) == EXPECTED


def test_a_list_that_leads_nowhere_keeps_what_came_before(tmp_path: Path) -> None:
    process = Process(*three())
    process.following[1] = 0x1234_5678
    with process.opened(tmp_path, sysroot=tmp_path) as core:
        assert rows(core) == EXPECTED[:2]


@pytest.mark.parametrize("version", [0, 3, 0xFFFF])
def test_a_structure_of_another_version_is_not_believed(tmp_path: Path, version: int) -> None:
    process = Process(*three())
    process.version = version
    with process.opened(tmp_path, sysroot=tmp_path) as core:
        assert find_r_debug(core.memory, core.auxv) == 0
        # What the auxiliary vector tells remains: the mapping that AT_PHDR lies in.
        assert rows(core) == [("", PROGRAM, PROGRAM + 4 * PAGE, True)]


def test_data_that_looks_like_a_dynamic_section_proves_nothing(tmp_path: Path) -> None:
    """A program may hold the number 21 and a pointer to r_debug anywhere: only the list's own first entry proves."""
    process = Process(*three())
    process.objects[0].dynamic = [DT_NEEDED, 1, 0, 0]
    builder = process.builder()
    builder.add_segment(0x5900_0000, process.words(DT_DEBUG, process.r_debug) * 300)
    with open_core(builder.write(tmp_path / "core"), sysroot=tmp_path) as core:
        assert find_r_debug(core.memory, core.auxv) == 0


def test_the_search_is_bounded(tmp_path: Path) -> None:
    """More candidates than are looked at, before the right one: nothing is found, and soon."""
    process = Process(*three())
    builder = process.builder()
    builder.add_segment(PROGRAM + 0x80_0000, process.words(DT_DEBUG, process.r_debug) * 5000)
    core_path = builder.write(tmp_path / "core")
    with open_core(core_path, sysroot=tmp_path) as core:
        # The program's own section comes first: it is nearest behind the program's start.
        assert find_r_debug(core.memory, core.auxv) == process.r_debug
        assert find_r_debug(core.memory, {3: PROGRAM + 0x70_0000}) == 0


def test_no_list_at_all(tmp_path: Path) -> None:
    with Process(*three()).opened(tmp_path, sysroot=tmp_path) as core:
        assert list(linked_objects(core.memory, 0)) == []
        assert list(linked_objects(core.memory, 0x99)) == []
