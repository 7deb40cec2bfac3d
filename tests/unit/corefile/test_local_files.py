"""Where separate debug files are looked for, and how often servers are asked. Real cores: test_libc_files."""

from __future__ import annotations

import re
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coreheap.corefile import ElfFile, open_core
from coreheap.corefile.debuginfod import DebuginfodClient
from coreheap.corefile.local_files import ASKED_LIMIT, FileFinder
from coreheap.errors import UsageError
from tests.core_builder import CoreBuilder, elf_image
from tests.debuginfod_server import Server, content
from tests.unit.allocators.ways.libraries import NAMES, library

PAGE = 4096
BUILD_ID, OTHER_ID = b"\x11" * 20, b"\x22" * 20
BASE = 0x7F0000000000
LINK = "sample.debug"


def with_link(image: bytes, name: str) -> bytes:
    """A 64-bit file without sections, with .gnu_debuglink and the section of names added."""
    names, link = b"\0.shstrtab\0.gnu_debuglink\0", name.encode() + b"\0"
    table_at = -(-(len(image) + len(names) + len(link)) // 8) * 8
    rows = ((0, 0, 0, 0), (1, 3, len(image), len(names)), (11, 1, len(image) + len(names), len(link)))
    table = b"".join(
        struct.pack("<2I4Q2I2Q", at, kind, 0, 0, start, size, 0, 0, 1, 0) for at, kind, start, size in rows
    )
    whole = bytearray((image + names + link).ljust(table_at, b"\0") + table)
    struct.pack_into("<Q", whole, 40, table_at)
    struct.pack_into("<3H", whole, 58, 64, len(rows), 1)
    return bytes(whole)


LINKED = with_link(elf_image(build_id=BUILD_ID), LINK)
DEBUG_FILE = elf_image(build_id=BUILD_ID, symbols={"alpha": 0x800})


def put(place: Path, image: bytes) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(image)
    return place


def debug_file(finder: FileFinder, raw_path: Path | bytes, module_file: Path) -> Path | None:
    file = ElfFile.open(module_file)
    assert file is not None
    raw_path = bytes(raw_path) if isinstance(raw_path, Path) else raw_path
    found = finder.find_debug_file(raw_path, BUILD_ID, file).file
    return None if found is None else found.path


@pytest.mark.parametrize("folder", ["", ".debug"])
class TestBesideTheModule:
    def test_at_its_own_path(self, tmp_path: Path, folder: str) -> None:
        module = put(tmp_path / "lib" / "sample.so", LINKED)
        place = put(tmp_path / "lib" / folder / LINK, DEBUG_FILE)
        assert debug_file(FileFinder(), module, module) == place

    def test_beside_what_a_link_leads_to(self, tmp_path: Path, folder: str) -> None:
        module = put(tmp_path / "real" / "sample.so", LINKED)
        place = put(tmp_path / "real" / folder / LINK, DEBUG_FILE)
        assert debug_file(FileFinder(), b"/no/such/folder/sample.so", module) == place

    def test_beside_the_executable_that_was_named(self, tmp_path: Path, folder: str) -> None:
        program = put(tmp_path / "elsewhere" / "program", LINKED)
        place = put(tmp_path / "elsewhere" / folder / LINK, DEBUG_FILE)
        (tmp_path / "root").mkdir()
        for sysroot in (None, tmp_path / "root"):
            assert debug_file(FileFinder(program, sysroot), b"/opt/program", program) == place

    def test_below_the_sysroot_and_by_its_links(self, tmp_path: Path, folder: str) -> None:
        root = tmp_path / "root"
        module = put(root / "usr" / "lib" / "sample.so", LINKED)
        place = put(root / "usr" / "lib" / folder / LINK, DEBUG_FILE)
        (root / "lib").symlink_to("/usr/lib")
        finder = FileFinder(sysroot=root)
        assert debug_file(finder, b"/lib/sample.so", module) == place
        assert debug_file(finder, b"/usr/lib/sample.so", module) == place

    def test_a_sysroot_is_never_left(self, tmp_path: Path, folder: str) -> None:
        root, outside = tmp_path / "root", tmp_path / "outside"
        module = put(root / "lib" / "sample.so", LINKED)
        put(outside / folder / LINK, DEBUG_FILE)
        for name in (LINK, f"{folder or '.debug'}/{LINK}"):
            (root / "lib" / name).parent.mkdir(exist_ok=True)
            (root / "lib" / name).symlink_to(outside / folder / LINK)
        finder = FileFinder(sysroot=root)
        assert debug_file(finder, b"/lib/sample.so", module) is None
        # Nor is the same path of this machine looked at.
        assert debug_file(finder, bytes(outside / "sample.so"), module) is None

    def test_another_build_is_refused_by_name(self, tmp_path: Path, folder: str) -> None:
        module = put(tmp_path / "sample.so", LINKED)
        wrong = put(tmp_path / folder / LINK, elf_image(build_id=OTHER_ID))
        file = ElfFile.open(module)
        found = FileFinder().find_debug_file(bytes(module), BUILD_ID, file)
        assert (found.status, found.file) == ("build_id_differs", None)
        assert found.refused is not None
        assert (found.refused.path, found.refused.build_id) == (str(wrong), OTHER_ID)


def test_paths_of_the_core_that_are_none(tmp_path: Path) -> None:
    module = put(tmp_path / "sample.so", LINKED)
    for raw_path in (b"", b"sample.so", b"/a\0b", b"/" + b"x" * 5000):
        assert debug_file(FileFinder(debug_directories=(tmp_path / "debug",)), raw_path, module) is None


@pytest.mark.parametrize("name", NAMES)
def test_links_and_debug_files_of_real_libcs_as_readelf_sees_them(name: str) -> None:
    real = library(name)
    dump = subprocess.run(
        ["readelf", "--string-dump=.gnu_debuglink", real.file],
        capture_output=True,
        check=True,
        text=True,
        errors="replace",
    ).stdout
    match = re.search(r"\[ +0\] +(\S+)", dump)
    assert match is not None
    file, separate = ElfFile.open(real.file), ElfFile.open(real.debug_file)
    assert file is not None
    assert separate is not None
    assert file.debug_link == match.group(1)
    assert file.build_id == separate.build_id
    assert (file.is_debug_file, separate.is_debug_file) == (False, True)


class TestServers:
    @pytest.fixture
    def server(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
        monkeypatch.setenv("no_proxy", "*")
        running = Server(content(b"", status=404))
        yield running
        running.close()

    def test_a_core_with_many_libcs_does_not_ask_for_ever(self, server: Server, tmp_path: Path) -> None:
        finder = FileFinder(debuginfod=DebuginfodClient((server.url,), tmp_path))
        problems = [finder.fetch(bytes([number]) * 20, "debuginfo").problem for number in range(ASKED_LIMIT + 3)]
        assert len(server.paths) == ASKED_LIMIT
        assert ["the limit" in problem for problem in problems] == [False] * ASKED_LIMIT + [True] * 3
        assert "does not have" in finder.fetch(bytes(20), "executable").problem

    def test_each_file_is_asked_for_once_and_each_gap_is_there_once(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEBUGINFOD_URLS", server.url)
        monkeypatch.setenv("DEBUGINFOD_CACHE_PATH", str(tmp_path / "cache"))
        builder = CoreBuilder().add_thread().add_segment(BASE, elf_image(build_id=BUILD_ID)[:PAGE], PAGE, "r-x")
        builder.add_file_mapping(BASE, BASE + PAGE, 0, "/no/such/libsample.so")
        phases: list[str] = []
        with open_core(
            builder.write(tmp_path / "core"), debuginfod=True, progress=lambda phase, *_: phases.append(phase)
        ) as core:
            (module,) = core.modules
            assert server.paths == []
            for _ in range(3):
                core.fetch_symbols(module)
            assert len(server.paths) == 2
            assert [gap.cause for gap in core.gaps].count("debuginfod_failed") == 2
        assert phases == ["asking debuginfod"] * 2

    def test_bytes_of_a_fetched_file_count_as_those_of_a_local_one(
        self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("DEBUGINFOD_URLS", server.url)
        monkeypatch.setenv("DEBUGINFOD_CACHE_PATH", str(tmp_path / "cache"))
        image = elf_image(build_id=BUILD_ID, text=b"text of the library", symbols={"alpha": 0x800})
        server.answer = content(image)
        builder = CoreBuilder().add_thread().add_segment(BASE, image[:0x600], PAGE, "r-x")
        builder.add_file_mapping(BASE, BASE + PAGE, 0, "/no/such/libsample.so")
        with open_core(builder.write(tmp_path / "core"), debuginfod=True) as core:
            (module,) = core.modules
            assert (module.symbol_address("alpha"), module.file_status) == (None, "no_file")
            core.fetch_symbols(module)
            assert (module.symbol_address("alpha"), module.file_status) == (BASE + 0x800, "matched")
            assert core.memory.read(BASE + 0x800, 19) == b"text of the library"
            assert server.url in module.file_title

    def test_without_servers_that_is_said_before_anything_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("DEBUGINFOD_URLS", raising=False)
        with pytest.raises(UsageError, match="DEBUGINFOD_URLS") as caught:
            open_core(tmp_path / "missing", debuginfod=True)
        assert "export DEBUGINFOD_URLS=" in caught.value.next_step
