"""Symbols of local files: built by gcc and taken apart by objcopy, witnessed by nm, then damaged."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from coreheap.corefile import ElfFile, function_symbols, symbols
from coreheap.corefile.local_files import FileFinder
from tests.core_builder import elf_image

Tool = Callable[[str, str], str]

SOURCE = """
int alpha = 3;
static int only_here[4] = {4};
__thread int local_to_thread = 1;
__attribute__((noinline)) static int inner(int value) { return value + only_here[value]; }
int beta(int value) { return inner(value) + alpha + local_to_thread; }
"""
EXPORTED = ("alpha", "beta")
PRIVATE = ("only_here", "inner")
SHT_SYMTAB, SHT_HASH, SHT_DYNAMIC, SHT_GNU_HASH = 2, 5, 6, 0x6FFFFFF6


class Workshop:
    """A folder with gcc, objcopy and strip in it."""

    def __init__(self, folder: Path, tool: Tool) -> None:
        self.folder = folder
        self.gcc = tool("gcc", "apt install gcc libc6-dev")
        self.objcopy, self.strip_tool, self.nm = (
            tool(name, "apt install binutils") for name in ("objcopy", "strip", "nm")
        )

    def library(self, *options: str, name: str = "libsample.so") -> Path:
        (self.folder / "sample.c").write_text(SOURCE)
        command = [self.gcc, "-shared", "-fPIC", "-O1", "-g", "-Wl,--build-id,-soname,libsample.so.1", *options]
        self._run([*command, "sample.c", "-o", name])
        return self.folder / name

    def stripped(self, library: Path, *options: str) -> Path:
        place = library.with_suffix(".stripped")
        self._run([self.strip_tool, "--strip-all", *options, "-o", place, library])
        return place

    def debug_file(self, library: Path, name: str = "libsample.so.debug") -> Path:
        self._run([self.objcopy, "--only-keep-debug", library, name])
        return self.folder / name

    def with_section(self, file: Path, name: str, content: bytes) -> Path:
        (self.folder / "content").write_bytes(content)
        self._run([self.objcopy, "--add-section", f"{name}=content", file])
        return file

    def with_debug_link(self, file: Path, debug_file: Path) -> Path:
        self._run([self.objcopy, f"--add-gnu-debuglink={debug_file}", file])
        return file

    def values(self, library: Path) -> dict[str, int]:
        """name -> value as nm reads them."""
        lines = subprocess.run([self.nm, library], capture_output=True, text=True, check=True).stdout.splitlines()
        rows = [line.split() for line in lines]
        return {row[2]: int(row[0], 16) for row in rows if len(row) == 3}

    def _run(self, command: list[str | Path]) -> None:
        subprocess.run(command, cwd=self.folder, check=True)


@pytest.fixture
def workshop(tmp_path: Path, require_tool: Tool) -> Workshop:
    return Workshop(tmp_path, require_tool)


def opened(path: Path) -> ElfFile:
    file = ElfFile.open(path)
    assert file is not None
    return file


def of_bytes(folder: Path, content: bytes) -> ElfFile:
    (folder / "damaged").write_bytes(content)
    return opened(folder / "damaged")


def value(file: ElfFile, name: str) -> int | None:
    symbol = file.find_symbol(name)
    return None if symbol is None else symbol.value


def section_header(image: bytes, kind: int) -> int:
    """Where the Elf64_Shdr of the first section of a kind stands."""
    (table,) = struct.unpack_from("<Q", image, 40)
    (count,) = struct.unpack_from("<H", image, 60)
    return next(at for at in range(table, table + 64 * count, 64) if struct.unpack_from("<I", image, at + 4)[0] == kind)


def content_of(image: bytes, kind: int) -> int:
    return int(struct.unpack_from("<Q", image, section_header(image, kind) + 24)[0])


class TestLookup:
    @pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
    def test_exported_names_of_a_stripped_library(self, workshop: Workshop, style: str) -> None:
        library = workshop.library(f"-Wl,--hash-style={style}")
        truth, file = workshop.values(library), opened(workshop.stripped(library))
        assert {name: value(file, name) for name in EXPORTED} == {name: truth[name] for name in EXPORTED}
        assert [value(file, name) for name in (*PRIVATE, "absent", "alph", "")] == [None] * 5

    def test_without_a_hash_table_the_exported_symbols_are_walked(self, workshop: Workshop) -> None:
        library = workshop.stripped(workshop.library("-Wl,--hash-style=gnu"), "--remove-section=.gnu.hash")
        assert value(opened(library), "alpha") == workshop.values(workshop.folder / "libsample.so")["alpha"]

    def test_private_names(self, workshop: Workshop) -> None:
        library = workshop.library()
        truth, file = workshop.values(library), opened(library)
        for name in (*EXPORTED, *PRIVATE):
            assert value(file, name) == truth[name]

    def test_kinds_and_sizes(self, workshop: Workshop) -> None:
        file = opened(workshop.library())
        alpha, inner, thread = (file.find_symbol(name) for name in ("alpha", "inner", "local_to_thread"))
        assert alpha is not None
        assert inner is not None
        assert thread is not None
        assert (alpha.kind, alpha.byte_count) == (symbols.STT_OBJECT, 4)
        assert (inner.kind, thread.kind) == (symbols.STT_FUNC, symbols.STT_TLS)
        assert inner.byte_count > 1

    @pytest.mark.parametrize("strip", [False, True])
    def test_the_symbol_that_holds_an_address(self, workshop: Workshop, strip: bool) -> None:
        library = workshop.library()
        file = opened(workshop.stripped(library) if strip else library)
        truth = workshop.values(library)
        for name in ("beta", "alpha"):
            found = file.symbol_containing(truth[name] + 3)
            assert found is not None
            assert found.name == name
        inner = file.symbol_containing(truth["inner"] + 1)
        assert (inner.name if inner is not None else None) == (None if strip else "inner")
        assert file.symbol_containing(0) is None

    def test_the_soname(self, workshop: Workshop) -> None:
        assert opened(workshop.library()).soname == "libsample.so.1"
        assert of_bytes(workshop.folder, elf_image()).soname == ""

    def test_names_that_share_their_endings(self, tmp_path: Path) -> None:
        names = {"main": 0x900, "domain": 0x910, "ain": 0x920}
        file = of_bytes(tmp_path, elf_image(symbols=names))
        assert [value(file, name) for name in ("main", "domain", "ain", "in", "omain")] == [
            0x900,
            0x910,
            0x920,
            None,
            None,
        ]

    @pytest.mark.parametrize("elf_class", [32, 64])
    def test_versioned_names(self, tmp_path: Path, elf_class: int) -> None:
        names = {"old@V1": 0x900, "old@@V2": 0x910, "plain@@V1": 0x920, "plain": 0x930, "gone@V1": 0x940}
        machine = "x86_64" if elf_class == 64 else "i386"
        file = of_bytes(tmp_path, elf_image(elf_class=elf_class, machine=machine, symbols=names))
        assert [value(file, name) for name in ("old", "plain", "gone", "old@V1")] == [0x910, 0x930, None, 0x900]


class TestMiniDebugInfo:
    """.gnu_debugdata as rpm makes it: the symbol table of the debug file, in xz, in the stripped library."""

    def test_names_and_addresses(self, workshop: Workshop) -> None:
        library = workshop.library()
        file = opened(self.library_with(workshop, library, lzma.compress(self.symbols_of(workshop, library))))
        truth = workshop.values(library)
        assert {name: value(file, name) for name in PRIVATE} == {name: truth[name] for name in PRIVATE}
        assert value(file, "alpha") == truth["alpha"]
        found = file.symbol_containing(truth["only_here"] + 5)
        assert found is not None
        assert found.name == "only_here"

    @pytest.mark.parametrize("packed", [b"", b"no xz", lzma.compress(b"no ELF file"), lzma.compress(b"\x7fELF\2\1")])
    def test_what_is_none(self, workshop: Workshop, packed: bytes) -> None:
        library = workshop.library()
        file = opened(self.library_with(workshop, library, packed or b"\0"))
        assert value(file, "inner") is None
        assert value(file, "alpha") is not None

    def test_a_cut_stream(self, workshop: Workshop) -> None:
        library = workshop.library()
        packed = lzma.compress(self.symbols_of(workshop, library))
        file = opened(self.library_with(workshop, library, packed[: len(packed) // 2]))
        assert value(file, "inner") is None

    def test_more_than_the_limit_is_not_unpacked(self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        library = workshop.library()
        packed = lzma.compress(self.symbols_of(workshop, library) + bytes(1 << 24))
        monkeypatch.setattr(symbols, "MINI_DEBUG_INFO_LIMIT", 1 << 20)
        assert value(opened(self.library_with(workshop, library, packed)), "inner") is None

    def test_one_in_another_is_not_looked_into(self, workshop: Workshop) -> None:
        library = workshop.library()
        inner = self.library_with(workshop, library, lzma.compress(self.symbols_of(workshop, library)))
        outer = self.library_with(workshop, library, lzma.compress(inner.read_bytes()), name="outer")
        assert value(opened(inner), "inner") is not None
        assert value(opened(outer), "inner") is None

    @staticmethod
    def symbols_of(workshop: Workshop, library: Path) -> bytes:
        debug = workshop.debug_file(library, "mini")
        subprocess.run([workshop.strip_tool, "--strip-debug", debug], check=True)
        return debug.read_bytes()

    @staticmethod
    def library_with(workshop: Workshop, library: Path, packed: bytes, name: str = "with_mini") -> Path:
        place = shutil.copy(workshop.stripped(library), workshop.folder / name)
        return workshop.with_section(Path(place), ".gnu_debugdata", packed)


class TestDebugLink:
    PATH = b"/usr/lib/libsample.so"

    @pytest.mark.parametrize("folder", ["", "usr/lib"])
    def test_the_file_that_it_names(self, workshop: Workshop, folder: str) -> None:
        library, debug, stripped = self.separated(workshop)
        place = workshop.folder / "debug" / folder
        place.mkdir(parents=True)
        debug.rename(place / debug.name)
        found = self.find(workshop, stripped)
        assert found is not None
        assert found.path == place / debug.name
        assert found.build_id == opened(library).build_id
        assert value(found, "inner") == workshop.values(library)["inner"]
        assert found.soname == ""

    def test_another_build_is_refused(self, workshop: Workshop) -> None:
        _, debug, stripped = self.separated(workshop)
        debug.unlink()
        (workshop.folder / "debug").mkdir()
        other = workshop.debug_file(workshop.library("-DOTHER", "-O2", name="other.so"), "other.debug")
        other.rename(workshop.folder / "debug" / debug.name)
        assert self.find(workshop, stripped) is None

    @pytest.mark.parametrize("name", ["../libsample.so.debug", "/etc/passwd", "..", ".", ""])
    def test_more_than_a_name_is_no_link(self, workshop: Workshop, name: str) -> None:
        stripped = workshop.stripped(workshop.library())
        workshop.with_section(stripped, ".gnu_debuglink", name.encode().ljust(32, b"\0"))
        assert opened(stripped).debug_link == ""

    @staticmethod
    def separated(workshop: Workshop) -> tuple[Path, Path, Path]:
        """The whole library, its debug file, and the stripped library with a link to it."""
        library = workshop.library()
        debug = workshop.debug_file(library)
        stripped = workshop.with_debug_link(workshop.stripped(library), debug)
        assert opened(stripped).debug_link == debug.name
        return library, debug, stripped

    def find(self, workshop: Workshop, stripped: Path) -> ElfFile | None:
        file = opened(stripped)
        assert file.build_id is not None
        finder = FileFinder(debug_directories=(workshop.folder / "debug",))
        return finder.find_debug_file(self.PATH, file.build_id, file).file


class TestDamage:
    """Tables that lie: nothing is raised, and what does not lie is found."""

    def test_no_hash_buckets(self, workshop: Workshop) -> None:
        image = self.image(workshop, "gnu")
        struct.pack_into("<I", image, content_of(image, SHT_GNU_HASH), 0)
        self.use(workshop, image)

    def test_no_bloom_filter(self, workshop: Workshop) -> None:
        image = self.image(workshop, "gnu")
        struct.pack_into("<I", image, content_of(image, SHT_GNU_HASH) + 8, 0)
        self.use(workshop, image)

    def test_a_hash_chain_outside_of_the_file(self, workshop: Workshop) -> None:
        image = self.image(workshop, "gnu")
        at = content_of(image, SHT_GNU_HASH)
        buckets, _, bloom_words, _ = struct.unpack_from("<4I", image, at)
        image[at + 16 : at + 16 + 8 * bloom_words + 4 * buckets] = b"\xff" * (8 * bloom_words + 4 * buckets)
        self.use(workshop, image)

    def test_more_hash_buckets_than_the_file_can_hold(self, workshop: Workshop) -> None:
        image = self.image(workshop, "gnu")
        struct.pack_into("<I", image, content_of(image, SHT_GNU_HASH), 0xFFFFFFFF)
        assert value(of_bytes(workshop.folder, image), "alpha") is not None

    @pytest.mark.parametrize("beyond", [1, 1 << 30])
    def test_a_hash_bucket_without_a_chain(self, workshop: Workshop, beyond: int) -> None:
        image = self.image(workshop, "sysv")
        at = content_of(image, SHT_HASH)
        buckets, chains = struct.unpack_from("<2I", image, at)
        struct.pack_into(f"<{buckets}I", image, at + 8, *[chains + beyond] * buckets)
        self.use(workshop, image)

    def test_a_hash_chain_in_a_circle(self, workshop: Workshop) -> None:
        image = self.image(workshop, "sysv")
        at = content_of(image, SHT_HASH)
        buckets, chains = struct.unpack_from("<2I", image, at)
        struct.pack_into(f"<{buckets + chains}I", image, at + 8, *[1] * (buckets + chains))
        file = of_bytes(workshop.folder, image)
        assert value(file, "absent") is None
        assert value(file, "inner") is not None

    def test_dynamic_entries_without_strings(self, workshop: Workshop) -> None:
        image = self.image(workshop, "gnu")
        struct.pack_into("<I", image, section_header(image, SHT_DYNAMIC) + 40, 0)
        assert of_bytes(workshop.folder, image).soname == ""

    def test_names_outside_of_their_table(self, workshop: Workshop) -> None:
        image = self.image(workshop, "gnu")
        at, size = (
            content_of(image, SHT_SYMTAB),
            struct.unpack_from("<Q", image, section_header(image, SHT_SYMTAB) + 32)[0],
        )
        for row in range(at, at + size, 24):
            struct.pack_into("<I", image, row, 0xFFFFFFF0)
        file = of_bytes(workshop.folder, image)
        assert value(file, "inner") is None
        assert value(file, "beta") is not None
        found = file.symbol_containing(workshop.values(workshop.folder / "libsample.so")["inner"])
        assert found is not None
        assert found.name == ""

    @pytest.mark.parametrize("link", [0, 1 << 30])
    def test_a_symbol_table_without_names(self, workshop: Workshop, link: int) -> None:
        image = self.image(workshop, "gnu")
        struct.pack_into("<I", image, section_header(image, SHT_SYMTAB) + 40, link)
        file = of_bytes(workshop.folder, image)
        assert value(file, "inner") is None
        assert value(file, "beta") is not None

    def test_a_symbol_table_beyond_the_file_gives_what_is_there(self, workshop: Workshop) -> None:
        image = self.image(workshop, "gnu")
        struct.pack_into("<Q", image, section_header(image, SHT_SYMTAB) + 32, 24 << 40)
        assert value(of_bytes(workshop.folder, image), "inner") is not None

    def test_rows_beyond_the_limit_are_left_out(self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(function_symbols, "ROW_LIMIT", 2)
        assert value(of_bytes(workshop.folder, self.image(workshop, "gnu")), "inner") is None

    @pytest.mark.parametrize("count", [0, 0xFFFF])
    def test_a_wrong_count_of_sections(self, workshop: Workshop, count: int) -> None:
        image = self.image(workshop, "gnu")
        struct.pack_into("<H", image, 60, count)
        self.use(workshop, image)

    def test_a_file_cut_anywhere(self, workshop: Workshop) -> None:
        image = self.image(workshop, "both")
        for size in range(64, len(image), 509):
            self.use(workshop, image[:size])

    def test_every_byte_of_the_section_headers(self, workshop: Workshop) -> None:
        image = self.image(workshop, "both")
        (table,) = struct.unpack_from("<Q", image, 40)
        for at in range(table, len(image), 7):
            damaged = bytearray(image)
            damaged[at] ^= 0xFF
            self.use(workshop, damaged)

    @staticmethod
    def image(workshop: Workshop, style: str) -> bytearray:
        return bytearray(workshop.library(f"-Wl,--hash-style={style}").read_bytes())

    @staticmethod
    def use(workshop: Workshop, image: bytes) -> None:
        """Ask it everything; that nothing is raised is the test."""
        file = of_bytes(workshop.folder, image)
        _ = file.build_id, file.soname, file.debug_link
        _ = [file.find_symbol(name) for name in (*EXPORTED, *PRIVATE, "absent")]
        _ = file.symbol_containing(0x1120)
