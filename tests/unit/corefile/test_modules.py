"""Modules, and the local files that may stand in for them: only those that prove to be the same build."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from coreheap.corefile import Core, Module, open_core
from coreheap.corefile.local_files import resolve_inside
from coreheap.errors import MemoryFault
from tests.core_builder import CoreBuilder, elf_image

PAGE = 4096
BUILD_ID, OTHER_ID = b"\x11" * 20, b"\x22" * 20
LIBRARY = "/usr/lib/libsample.so.1"
BASE = 0x7F0000000000


def library(build_id: bytes | None = BUILD_ID) -> bytes:
    return elf_image(
        build_id=build_id,
        text=b"text of the library",
        symbols={"alpha": 0x800, "beta": 0x810},
    )


def core_with_library(
    tmp_path: Path,
    *,
    sysroot: Path | None = None,
    path: str = LIBRARY,
    header_saved: bool = True,
    build_id: bytes | None = BUILD_ID,
    executable: Path | None = None,
    debug_directories: tuple[Path, ...] = (),
) -> Core:
    """A core with one library: its header (up to the text) and its written data are saved."""
    image = library(build_id)
    builder = CoreBuilder().add_thread()
    builder.auxv = {6: PAGE, 9: BASE + 0x800}
    builder.add_segment(BASE, image[:0x600] if header_saved else None, PAGE, "r-x")
    builder.add_segment(BASE + PAGE, b"written".ljust(PAGE, b"\0"), PAGE, "rw-")
    builder.add_file_mapping(BASE, BASE + PAGE, 0, path)
    builder.add_file_mapping(BASE + PAGE, BASE + 2 * PAGE, PAGE, path)
    return open_core(
        builder.write(tmp_path / "core"),
        sysroot=sysroot,
        executable=executable,
        debug_directories=debug_directories,
    )


def with_file(root: Path, content: bytes, path: str = LIBRARY) -> Path:
    place = root / path.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def only_module(core: Core) -> Module:
    (module,) = core.modules
    return module


def causes(core: Core) -> list[str]:
    return [gap.cause for gap in core.gaps]


class TestFiles:
    def test_a_matching_file(self, tmp_path: Path) -> None:
        place = with_file(tmp_path / "root", library())
        core = core_with_library(tmp_path, sysroot=tmp_path / "root")
        module = only_module(core)
        assert (module.path, module.start, module.end) == (LIBRARY, BASE, BASE + 2 * PAGE)
        assert module.load_bias == BASE
        assert module.build_id == BUILD_ID
        assert module.file_status == "matched"
        assert module.file == place
        assert module.mapped_ranges == ((BASE, BASE + PAGE), (BASE + PAGE, BASE + 2 * PAGE))
        assert module.name == "libsample.so.1"
        assert "mismatched_module" not in causes(core)

    def test_symbols(self, tmp_path: Path) -> None:
        with_file(tmp_path / "root", library())
        module = only_module(core_with_library(tmp_path, sysroot=tmp_path / "root"))
        assert module.symbol_address("alpha") == BASE + 0x800
        assert module.symbol_address("beta") == BASE + 0x810
        assert module.symbol_address("lpha") is None
        assert module.symbol_address("gamma") is None
        found = module.symbol_containing(BASE + 0x813)
        assert found is not None
        assert (found[0].name, found[1]) == ("beta", 3)
        assert module.symbol_containing(BASE + 0x700) is None

    def test_unsaved_text_is_read_from_a_matching_file(self, tmp_path: Path) -> None:
        with_file(tmp_path / "root", library())
        memory = core_with_library(tmp_path, sysroot=tmp_path / "root").memory
        assert memory.read(BASE + 0x800, 19) == b"text of the library"
        assert memory.read_text(BASE + 0x800) == b"text of the library"
        assert memory.read(BASE + 0x5FC, 8) == bytes(8)
        assert not memory.is_saved(BASE + 0x800, BASE + 0x801)
        with pytest.raises(MemoryFault):
            memory.view(BASE + 0x800, BASE + 0x801)

    @pytest.mark.parametrize(("told_pages", "expected"), [(1, 5), (2, 0)])
    def test_rights_of_what_the_core_has_no_program_header_for(
        self, tmp_path: Path, told_pages: int, expected: int
    ) -> None:
        """gdb leaves text to the file: the module's own program header tells, where one has the whole region."""
        image = elf_image(build_id=BUILD_ID, text=b"text", total_bytes=3 * PAGE)
        builder = CoreBuilder().add_thread()
        builder.add_segment(BASE, image[:PAGE], PAGE, "r--")
        builder.add_file_mapping(BASE, BASE + PAGE, 0, LIBRARY)
        builder.add_file_mapping(BASE + PAGE, BASE + (1 + told_pages) * PAGE, PAGE, LIBRARY)
        core = open_core(builder.write(tmp_path / "core"))
        assert only_module(core).program_headers is not None
        region = core.memory.region_index(BASE + PAGE)
        assert region is not None
        assert int(core.memory.region_flags[region]) == expected

    def test_written_memory_is_never_read_from_a_file(self, tmp_path: Path) -> None:
        image = library()
        with_file(tmp_path / "root", image)
        builder = CoreBuilder().add_thread().add_segment(BASE, image[:0x600], PAGE, "r-x")
        builder.add_segment(BASE + PAGE, None, PAGE, "r--")  # RELRO: read-only now, but it was relocated
        builder.add_file_mapping(BASE, BASE + PAGE, 0, LIBRARY)
        builder.add_file_mapping(BASE + PAGE, BASE + 2 * PAGE, PAGE, LIBRARY)
        core = open_core(builder.write(tmp_path / "core"), sysroot=tmp_path / "root")
        assert only_module(core).file_status == "matched"
        with pytest.raises(MemoryFault) as caught:
            core.memory.read(BASE + PAGE, 8)
        assert caught.value.cause == "mapped_file"

    def test_another_build_is_refused(self, tmp_path: Path) -> None:
        with_file(tmp_path / "root", library(OTHER_ID))
        core = core_with_library(tmp_path, sysroot=tmp_path / "root")
        module = only_module(core)
        assert module.file_status == "build_id_differs"
        assert module.file is None
        assert module.symbol_address("alpha") is None
        gap = next(gap for gap in core.gaps if gap.cause == "mismatched_module")
        assert gap.range is not None
        assert gap.range.start == BASE
        assert LIBRARY in gap.consequence
        with pytest.raises(MemoryFault):
            core.memory.read(BASE + 0x800, 1)

    def test_no_file(self, tmp_path: Path) -> None:
        assert only_module(core_with_library(tmp_path)).file_status == "no_file"

    def test_without_a_build_id_in_the_core_no_file_is_trusted(self, tmp_path: Path) -> None:
        with_file(tmp_path / "root", library())
        core = core_with_library(tmp_path, sysroot=tmp_path / "root", header_saved=False)
        module = only_module(core)
        assert module.file_status == "not_verifiable"
        assert module.file is None
        assert module.load_bias is None
        assert "modules_not_verifiable" in causes(core)

    def test_a_file_without_a_build_id_is_not_trusted(self, tmp_path: Path) -> None:
        with_file(tmp_path / "root", library(None))
        module = only_module(core_with_library(tmp_path, sysroot=tmp_path / "root"))
        assert module.file_status == "not_verifiable"

    @pytest.mark.parametrize("content", [b"", b"no elf", b"\x7fELF" + bytes(100), library()[:300]])
    def test_damaged_files(self, tmp_path: Path, content: bytes) -> None:
        with_file(tmp_path / "root", content)
        assert only_module(core_with_library(tmp_path, sysroot=tmp_path / "root")).file is None

    def test_a_fifo_in_the_place_of_a_file_does_not_block(self, tmp_path: Path) -> None:
        place = tmp_path / "root" / LIBRARY.lstrip("/")
        place.parent.mkdir(parents=True)
        os.mkfifo(place)
        assert only_module(core_with_library(tmp_path, sysroot=tmp_path / "root")).file is None

    def test_a_deleted_file_is_found_under_its_name(self, tmp_path: Path) -> None:
        with_file(tmp_path / "root", library())
        core = core_with_library(tmp_path, sysroot=tmp_path / "root", path=LIBRARY + " (deleted)")
        assert only_module(core).file_status == "matched"

    def test_a_file_at_its_own_path_counts_when_the_build_id_is_equal(self, tmp_path: Path) -> None:
        place = with_file(tmp_path, library())
        assert only_module(core_with_library(tmp_path, path=str(place))).file == place
        place.write_bytes(library(OTHER_ID))
        assert only_module(core_with_library(tmp_path, path=str(place))).file is None

    def test_an_executable_that_was_given(self, tmp_path: Path) -> None:
        place = with_file(tmp_path, library(), "elsewhere/program")
        module = only_module(core_with_library(tmp_path, executable=place))
        assert module.is_executable
        assert module.file == place

    def test_a_wrong_executable_that_was_given_is_reported(self, tmp_path: Path) -> None:
        wrong = with_file(tmp_path, library(OTHER_ID), "elsewhere/program")
        right = with_file(tmp_path, library())
        core = core_with_library(tmp_path, executable=wrong, path=str(right))
        assert only_module(core).file == right
        gap = next(gap for gap in core.gaps if gap.cause == "mismatched_module")
        assert str(wrong) in gap.consequence

    def test_a_debug_file_by_build_id(self, tmp_path: Path) -> None:
        with_file(tmp_path / "root", elf_image(text=b"text of the library"))
        debug = tmp_path / "debug"
        with_file(debug, library(), f".build-id/11/{'11' * 19}.debug")
        core = core_with_library(tmp_path, sysroot=tmp_path / "root", debug_directories=(debug,))
        assert only_module(core).symbol_address("alpha") == BASE + 0x800

    def test_a_debug_file_of_another_build_is_not_used(self, tmp_path: Path) -> None:
        debug = tmp_path / "debug"
        with_file(debug, library(OTHER_ID), f".build-id/11/{'11' * 19}.debug")
        core = core_with_library(tmp_path, debug_directories=(debug,))
        assert only_module(core).symbol_address("alpha") is None


class TestSysroot:
    def test_links_stay_inside(self, tmp_path: Path) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        outside.mkdir()
        (outside / "secret").write_text("secret")
        (root / "usr" / "lib").mkdir(parents=True)
        (root / "usr" / "lib" / "real").write_text("real")
        (root / "lib").symlink_to("usr/lib")
        (root / "usr" / "lib" / "absolute").symlink_to("/usr/lib/real")
        (root / "escape").symlink_to("../outside")
        (root / "far").symlink_to(outside)
        (root / "circle").symlink_to("circle")
        top = Path(os.path.realpath(root))
        assert resolve_inside(root, b"/lib/real") == top / "usr/lib/real"
        assert resolve_inside(root, b"/lib/absolute") == top / "usr/lib/real"
        assert resolve_inside(root, b"/../../lib/./real") == top / "usr/lib/real"
        for path in (
            b"/escape/secret",
            b"/far/secret",
            b"/../outside/secret",
            b"/circle",
            b"/no\0thing",
        ):
            assert resolve_inside(root, path) is None

    @pytest.mark.parametrize("path", ["relative/lib.so", "/proc/self/exe", "/dev/zero", "/x" * 3000])
    def test_paths_that_are_not_looked_at(self, tmp_path: Path, path: str) -> None:
        core = core_with_library(tmp_path, path=path)
        assert [module.file for module in core.modules] == [None]


class TestDiscovery:
    def test_data_files_are_no_modules(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_thread().add_segment(0x10000, b"data" * 1024)
        builder.add_file_mapping(0x10000, 0x11000, 0, "/var/data.db")
        builder.add_file_mapping(0x20000, 0x21000, 0, "/usr/lib/locale-archive")
        core = open_core(builder.write(tmp_path / "core"))
        assert core.modules == ()
        assert core.main_module is None

    def test_the_same_file_loaded_twice(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_thread()
        for base in (BASE, BASE + 0x100000):
            builder.add_segment(base, library()[:PAGE], PAGE, "r-x")
            builder.add_file_mapping(base, base + PAGE, 0, LIBRARY)
        core = open_core(builder.write(tmp_path / "core"))
        assert [module.start for module in core.modules] == [BASE, BASE + 0x100000]

    def test_a_header_shown_again_in_the_data_segment_is_no_second_module(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_thread()
        builder.add_segment(BASE, library()[:PAGE], PAGE, "r-x")
        builder.add_segment(BASE + PAGE, library()[:PAGE], PAGE, "rw-")
        builder.add_file_mapping(BASE, BASE + PAGE, 0, LIBRARY)
        builder.add_file_mapping(BASE + PAGE, BASE + 2 * PAGE, 0, LIBRARY)
        core = open_core(builder.write(tmp_path / "core"))
        assert [module.start for module in core.modules] == [BASE]

    def test_the_vdso(self, tmp_path: Path) -> None:
        builder = CoreBuilder().add_thread().add_segment(0x7FFF0000, library(), flags="r-x")
        builder.auxv = {6: PAGE, 33: 0x7FFF0000}
        builder.add_file_mapping(0x10000, 0x11000, 0, "/var/data.db")
        core = open_core(builder.write(tmp_path / "core"))
        assert [(module.path, module.start) for module in core.modules] == [("[vdso]", 0x7FFF0000)]

    @pytest.mark.parametrize(("elf_class", "machine"), [(64, "x86_64"), (32, "i386"), (64, "aarch64")])
    def test_without_mapped_files_headers_and_link_map_tell(self, tmp_path: Path, elf_class: int, machine: str) -> None:
        word, letter = elf_class // 8, "Q" if elf_class == 64 else "I"
        base, library_base, unsaved_base, heap = 0x400000, 0x40000000, 0x48000000, 0x50000000
        headers_at, entry = (64, 56) if elf_class == 64 else (52, 32)
        image = bytearray(elf_image(elf_class=elf_class, machine=machine, build_id=None, elf_type=2, base=base))
        # A third program header: PT_DYNAMIC at the start of the data, with DT_DEBUG.
        if elf_class == 64:
            dynamic = struct.pack("<2I6Q", 2, 6, PAGE, base + PAGE, 0, 64, 64, 8)
        else:
            dynamic = struct.pack("<8I", 2, PAGE, base + PAGE, 0, 64, 64, 6, 4)
        image[headers_at + 2 * entry : headers_at + 3 * entry] = dynamic
        count_at = 56 if elf_class == 64 else 44
        image[count_at : count_at + 2] = struct.pack("<H", 3)
        image[PAGE : PAGE + 4 * word] = struct.pack(f"<4{letter}", 21, heap, 0, 0)
        memory = bytearray(PAGE)
        entries = heap + 0x100, heap + 0x200
        memory[: 2 * word] = struct.pack(f"<2{letter}", 1, entries[0])
        name = b"/lib/libother.so\0"
        memory[0x300 : 0x300 + len(name)] = name
        first = struct.pack(f"<4{letter}", 0, heap + 0x3F0, 0, entries[1])
        second = struct.pack(f"<4{letter}", library_base, heap + 0x300, 0, heap + 0x500)
        third = struct.pack(f"<4{letter}", unsaved_base, heap + 0x380, 0, entries[0])  # a circle
        memory[0x500 : 0x500 + len(third)] = third
        memory[0x380:0x390] = b"/lib/unsaved.so\0"
        memory[0x100 : 0x100 + len(first)] = first
        memory[0x200 : 0x200 + len(second)] = second
        program = b"/opt/program\0"
        memory[0x400 : 0x400 + len(program)] = program
        builder = CoreBuilder(elf_class, machine).add_thread()
        builder.auxv = {6: PAGE, 9: base + 0x800, 31: heap + 0x400}
        builder.add_segment(base, bytes(image), flags="rwx")
        builder.add_segment(library_base, elf_image(elf_class=elf_class, machine=machine))
        builder.add_segment(unsaved_base, None, PAGE, "r-x")
        builder.add_segment(heap, bytes(memory))
        core = open_core(builder.write(tmp_path / "core"))
        assert [(m.path, m.start, m.is_executable) for m in core.modules] == [
            ("/opt/program", base, True),
            ("/lib/libother.so", library_base, False),
            ("/lib/unsaved.so", unsaved_base, False),
        ]
        assert core.modules[2].load_bias == unsaved_base
        assert core.modules[0].load_bias == 0
        assert core.modules[1].load_bias == library_base
        assert core.process.executable == "/opt/program"
        assert core.module_at(library_base + 5) is core.modules[1]
        assert core.module_at(heap) is None

    def test_a_program_without_saved_header_and_mapped_files_still_has_its_name(self, tmp_path: Path) -> None:
        """As qemu-user 7.2 writes a static aarch64 program."""
        builder = CoreBuilder(64, "aarch64").add_thread().add_segment(0x400000, None, PAGE, "r-x")
        builder.add_segment(0x500000, b"bin/program\0")
        builder.auxv = {3: 0x400040, 6: PAGE, 31: 0x500000}
        core = open_core(builder.write(tmp_path / "core"))
        module = only_module(core)
        assert (module.path, module.start, module.load_bias) == ("bin/program", 0x400000, None)
        assert module.is_executable
        assert core.process.executable == "bin/program"

    def test_the_program_that_was_run_through_ld_so(self, tmp_path: Path) -> None:
        """AT_ENTRY speaks of ld.so then; DT_DEBUG tells the program (coreheap.corefile.modules, _main_module)."""
        builder = CoreBuilder().add_thread()
        program = bytearray(elf_image(build_id=None))
        program[64 + 112 : 64 + 168] = struct.pack("<2I6Q", 2, 6, PAGE, PAGE, 0, 64, 64, 8)
        program[56:58] = struct.pack("<H", 3)
        program[PAGE : PAGE + 32] = struct.pack("<4Q", 21, 0x1234, 0, 0)
        for base, path, content in (
            (0x10000, "/opt/program", bytes(program)),
            (0x40000, "/lib64/ld.so", elf_image()),
        ):
            builder.add_segment(base, content)
            builder.add_file_mapping(base, base + 2 * PAGE, 0, path)
        builder.auxv = {6: PAGE, 9: 0x40800}
        core = open_core(builder.write(tmp_path / "core"))
        assert core.main_module is not None
        assert core.main_module.path == "/opt/program"
        assert core.process.executable == "/opt/program"
