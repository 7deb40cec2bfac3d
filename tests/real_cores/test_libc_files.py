"""Where libc's symbols may come from, and that a wrong libc is never believed: real cores of the matrix.

Whatever is at hand, the blocks are those that the process itself recorded.
"""

from __future__ import annotations

import lzma
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

import coreheap
from coreheap.cli import main
from coreheap.evidence import Confidence, Gap
from coreheap.render.json_document import json_text
from coreheap.report import Report
from tests.conftest import skip_unless_ci
from tests.debuginfod_server import Server, content, files
from tests.real_cores import cores, targets
from tests.real_cores.cases import MATRIX
from tests.real_cores.comparison import compare_all
from tests.real_cores.conftest import core_or_skip, need_packages
from tests.real_cores.truth import load_truth

DYNAMIC = ("bullseye-amd64/threads_kept", "trixie-amd64/threads_kept", "bookworm-i386/plain_small")
STATIC = ("forky-amd64/static_exe", "trixie-i386/static_pie")
Tool = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Package:
    """A core of the matrix and the files of the libc that it ran with."""

    core: Path
    executable: Path
    build_id: str
    """Of libc; of a static program, its own."""
    file: Path
    """libc as packaged, stripped; of a static program its stripped copy."""
    debug_file: Path
    path: Path
    """Where libc was, as the core names it."""
    truth: Path

    def differences(self, report: Report) -> list[str]:
        return compare_all(report, load_truth(self.truth))


def files_of(name: str) -> targets.TargetFiles:
    """The unpacked packages of a target; skips with the remedy where they are not downloaded."""
    target = targets.MATRIX_TARGETS[name]
    need_packages(target)
    return targets.files_of(target, cores.default_directory())


def build_id_of(file: Path) -> str:
    notes = subprocess.run(["readelf", "-n", file], capture_output=True, text=True, check=True).stdout
    match = re.search(r"Build ID: ([0-9a-f]+)", notes)
    assert match is not None
    return match.group(1)


def by_build_id(folder: Path, build_id: str) -> Path:
    return folder / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"


def package(name: str, require_tool: Tool) -> Package:
    require_tool("readelf", "apt install binutils")
    unpacked = files_of(MATRIX[name].target.name)
    paths = core_or_skip(name)
    if MATRIX[name].linking.is_static:
        file = cores.stripped(MATRIX[name], paths.executable)
        # Named by its own folder: a debug file is one whatever else it holds.
        return Package(paths.core, paths.executable, build_id_of(file), file, paths.executable, file, paths.truth)
    file = unpacked.libraries / "libc.so.6"
    build_id = build_id_of(file)
    debug_file = by_build_id(unpacked.debug, build_id)
    # Up to 2.33 libc.so.6 is a link, and the kernel names what it leads to.
    return Package(paths.core, paths.executable, build_id, file, debug_file, file.resolve(), paths.truth)


def analysed(
    core: Path,
    sysroot: Path | None,
    *,
    debuginfod: bool = False,
    debug_directories: tuple[Path, ...] = (),
    executable: Path | None = None,
) -> Report:
    with coreheap.open(
        core,
        sysroot=sysroot,
        debuginfod=debuginfod,
        debug_directories=debug_directories,
        executable=executable,
    ) as opened:
        return coreheap.analyze(opened)


def sources(report: Report) -> list[str]:
    assert report.heap is not None
    return [fact.source for fact in report.heap.identity.evidence]


def symbol_sources(report: Report) -> set[str]:
    return {source for source in sources(report) if source.startswith("symbol table (")}


def gaps_of(report: Report, cause: str) -> list[Gap]:
    return [gap for gap in report.gaps if gap.cause == cause]


def with_file(root: Path, path: Path, content: bytes) -> Path:
    """``content`` below ``root`` at an absolute path."""
    place = root / path.relative_to("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A server that has nothing yet, named by DEBUGINFOD_URLS."""
    running = Server(content(b"", status=404))
    # A proxy of the environment must not be asked for 127.0.0.1.
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("DEBUGINFOD_URLS", running.url)
    monkeypatch.setenv("DEBUGINFOD_CACHE_PATH", str(tmp_path / "cache"))
    for name in ("DEBUGINFOD_TIMEOUT", "DEBUGINFOD_MAXSIZE"):
        monkeypatch.delenv(name, raising=False)
    yield running
    running.close()


def offer(server: Server, of: Package, **kinds: Path) -> None:
    known: Mapping[tuple[str, str], Path] = {(of.build_id, kind): path for kind, path in kinds.items()}
    server.answer = files(known)


class TestDebuginfod:
    @pytest.mark.parametrize("name", [*DYNAMIC, *STATIC])
    def test_libcs_symbols_come_from_the_server_and_nothing_else_is_asked_for(
        self, name: str, server: Server, empty: Path, require_tool: Tool
    ) -> None:
        of = package(name, require_tool)
        offer(server, of, debuginfo=of.debug_file, executable=of.file)
        report = analysed(of.core, empty, debuginfod=True)
        assert server.paths == [f"/buildid/{of.build_id}/{kind}" for kind in ("debuginfo", "executable")]
        assert symbol_sources(report) == {f"symbol table (.symtab) of debug file from debuginfod ({server.url})"}
        in_files = [source for source in sources(report) if source.startswith(("relocations in", "machine code"))]
        assert in_files
        assert all(f"from debuginfod ({server.url})" in source for source in in_files)
        assert report.heap is not None
        assert report.heap.identity.confidence is Confidence.CERTAIN
        assert not [gap for gap in report.gaps if gap.cause.startswith("debuginfod")]
        assert of.differences(report) == []

        again = analysed(of.core, empty, debuginfod=True)
        assert len(server.paths) == 2
        assert symbol_sources(again) == {
            "symbol table (.symtab) of debug file from debuginfod (kept from an earlier request)"
        }

    @pytest.mark.parametrize("name", [*DYNAMIC, *STATIC])
    def test_nothing_is_asked_unless_the_user_says_so(
        self, name: str, server: Server, empty: Path, require_tool: Tool
    ) -> None:
        of = package(name, require_tool)
        offer(server, of, debuginfo=of.debug_file, executable=of.file)
        report = analysed(of.core, empty)
        assert server.paths == []
        assert symbol_sources(report) == set()
        assert of.differences(report) == []

    def test_local_files_come_first(self, server: Server, empty: Path, tmp_path: Path, require_tool: Tool) -> None:
        of = package(DYNAMIC[1], require_tool)
        offer(server, of, debuginfo=of.debug_file, executable=of.file)
        debug = files_of("trixie-amd64").debug
        report = analysed(of.core, empty, debuginfod=True, debug_directories=(debug,))
        assert server.paths == []
        assert symbol_sources(report) == {f"symbol table (.symtab) of debug file {of.debug_file.name}"}

        with_file(tmp_path / "root", of.path, of.file.read_bytes())
        report = analysed(of.core, tmp_path / "root", debuginfod=True)
        assert server.paths == [f"/buildid/{of.build_id}/debuginfo"]
        assert "machine code of libc.so.6" in sources(report)
        assert of.differences(report) == []

    def test_an_unstripped_static_program_needs_no_server(
        self, server: Server, empty: Path, require_tool: Tool
    ) -> None:
        of = package(STATIC[0], require_tool)
        report = analysed(of.core, empty, debuginfod=True, executable=of.executable)
        assert server.paths == []
        assert symbol_sources(report) == {"symbol table (.symtab) of threads"}

    def test_the_command_line(
        self, server: Server, empty: Path, require_tool: Tool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        of = package(DYNAMIC[1], require_tool)
        offer(server, of, debuginfo=of.debug_file, executable=of.file)
        assert main(["arenas", str(of.core), "--sysroot", str(empty), "--json"]) == 0
        without = capsys.readouterr().out
        assert server.paths == []
        assert main(["analyze", str(of.core), "--sysroot", str(empty), "--debuginfod", "-v"]) == 0
        assert "debug file from debuginfod" in " ".join(capsys.readouterr().out.split())
        assert len(server.paths) == 2
        assert main(["arenas", str(of.core), "--sysroot", str(empty), "--debuginfod", "--json"]) == 0
        assert capsys.readouterr().out == without


class TestServersThatFail:
    """Each is a gap with the server's name and the problem; the analysis goes on as without a server."""

    def check(self, report: Report, of: Package, *words: str, count: int = 2) -> None:
        found = gaps_of(report, "debuginfod_failed")
        assert len(found) == count
        for gap in found:
            assert gap.range is not None
            for word in (*words, of.path.name if of.path.name.startswith("libc") else "threads"):
                assert word in gap.consequence
        assert symbol_sources(report) == set()
        assert not any("debuginfod" in source for source in sources(report))
        assert not report.is_partial
        assert of.differences(report) == []

    @pytest.mark.parametrize("name", [DYNAMIC[2], STATIC[0]])
    def test_a_file_of_another_build_is_refused(
        self, name: str, server: Server, empty: Path, require_tool: Tool, tmp_path: Path
    ) -> None:
        of, other = package(name, require_tool), package(DYNAMIC[1], require_tool)
        offer(server, of, debuginfo=other.debug_file, executable=other.file)
        report = analysed(of.core, empty, debuginfod=True)
        self.check(report, of, server.url, of.build_id, "refused")
        assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []

    def test_a_debug_file_is_no_executable(self, server: Server, empty: Path, require_tool: Tool) -> None:
        of = package(DYNAMIC[1], require_tool)
        offer(server, of, debuginfo=of.debug_file, executable=of.debug_file)
        report = analysed(of.core, empty, debuginfod=True)
        (gap,) = gaps_of(report, "debuginfod_failed")
        assert f"{server.url}: a debug file, without the code; refused" in gap.consequence
        assert not any(source.startswith(("relocations in", "machine code")) for source in sources(report))
        assert of.differences(report) == []

    def test_a_server_without_the_file(self, server: Server, empty: Path, require_tool: Tool) -> None:
        of = package(DYNAMIC[1], require_tool)
        self.check(analysed(of.core, empty, debuginfod=True), of, server.url, "does not have the file")

    def test_no_server_there(
        self, server: Server, empty: Path, require_tool: Tool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        of = package(DYNAMIC[1], require_tool)
        nobody = Server(content(b""))
        nobody.close()
        monkeypatch.setenv("DEBUGINFOD_URLS", nobody.url)
        self.check(analysed(of.core, empty, debuginfod=True), of, nobody.url, "not reached")

    def test_a_server_that_says_nothing(
        self, server: Server, empty: Path, require_tool: Tool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        of = package(DYNAMIC[1], require_tool)
        over = threading.Event()
        server.answer = lambda request: over.wait(30) and None
        monkeypatch.setenv("DEBUGINFOD_TIMEOUT", "1")
        try:
            self.check(analysed(of.core, empty, debuginfod=True), of, server.url)
        finally:
            over.set()

    def test_a_file_that_is_too_large(
        self, server: Server, empty: Path, require_tool: Tool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        of = package(DYNAMIC[1], require_tool)
        offer(server, of, debuginfo=of.debug_file, executable=of.file)
        monkeypatch.setenv("DEBUGINFOD_MAXSIZE", "100000")
        self.check(analysed(of.core, empty, debuginfod=True), of, server.url, "the limit is 100000")

    def test_a_libc_whose_build_id_is_not_in_the_core(self, server: Server, empty: Path, require_tool: Tool) -> None:
        """As qemu writes its cores."""
        of = package("trixie-arm64/plain_small", require_tool)
        report = analysed(of.core, empty, debuginfod=True)
        assert server.paths == []
        (gap,) = gaps_of(report, "debuginfod_not_asked")
        assert "build-id of libc.so.6 is not in the core" in gap.consequence
        assert of.differences(report) == []


class TestDebugFiles:
    """Separate debug files by build-id and by .gnu_debuglink, in the places where gdb looks."""

    @pytest.mark.parametrize(
        "place",
        [
            "usr/lib/debug/.build-id/{first}/{rest}.debug",
            "{folder}/{link}",
            "{folder}/.debug/{link}",
            "usr/lib/debug/{folder}/{link}",
        ],
    )
    def test_below_the_sysroot(self, place: str, tmp_path: Path, require_tool: Tool) -> None:
        of = package(DYNAMIC[1], require_tool)
        root = tmp_path / "root"
        with_file(root, of.path, of.file.read_bytes())
        assert symbol_sources(analysed(of.core, root)) == set()
        words = {
            "first": of.build_id[:2],
            "rest": of.build_id[2:],
            "folder": str(of.path.parent).lstrip("/"),
            # Debian names the link by the build-id as well.
            "link": of.debug_file.name,
        }
        debug_file = with_file(root, Path("/", place.format(**words)), of.debug_file.read_bytes())
        report = analysed(of.core, root)
        assert symbol_sources(report) == {f"symbol table (.symtab) of debug file {debug_file.name}"}
        assert of.differences(report) == []

    @pytest.mark.parametrize("name", ["usr/lib/debug", "."])
    def test_below_a_debug_directory_or_the_root_of_an_unpacked_package(
        self, name: str, empty: Path, tmp_path: Path, require_tool: Tool
    ) -> None:
        of = package(DYNAMIC[1], require_tool)
        place = by_build_id(tmp_path / "debug" / name, of.build_id)
        place.parent.mkdir(parents=True)
        place.symlink_to(of.debug_file)
        report = analysed(of.core, empty, debug_directories=(tmp_path / "debug",))
        assert symbol_sources(report) == {f"symbol table (.symtab) of debug file {of.debug_file.name}"}

    @pytest.mark.parametrize("below_sysroot", [True, False])
    def test_one_of_another_build_is_refused_by_name(
        self, below_sysroot: bool, empty: Path, tmp_path: Path, require_tool: Tool
    ) -> None:
        of, other = package(DYNAMIC[1], require_tool), package(DYNAMIC[0], require_tool)
        folder = empty / "usr/lib/debug" if below_sysroot else tmp_path / "debug"
        wrong = by_build_id(folder, of.build_id)
        wrong.parent.mkdir(parents=True)
        wrong.write_bytes(other.debug_file.read_bytes())
        report = analysed(of.core, empty, debug_directories=() if below_sysroot else (folder,))
        (gap,) = gaps_of(report, "mismatched_debug_file")
        for word in (str(wrong), of.build_id, other.build_id, "libc.so.6"):
            assert word in gap.consequence
        assert symbol_sources(report) == set()
        assert of.differences(report) == []

    def test_a_debug_file_in_the_place_of_libc_gives_symbols_and_no_bytes(
        self, tmp_path: Path, require_tool: Tool
    ) -> None:
        of = package(DYNAMIC[1], require_tool)
        with_file(tmp_path / "root", of.path, of.debug_file.read_bytes())
        report = analysed(of.core, tmp_path / "root")
        assert symbol_sources(report) == {"symbol table (.symtab) of debug file libc.so.6"}
        assert not any(source.startswith(("relocations in", "machine code")) for source in sources(report))
        assert of.differences(report) == []


class TestMiniDebugInfo:
    """.gnu_debugdata in the stripped libc: an xz of its symbol table."""

    @pytest.fixture
    def of(self, require_tool: Tool) -> Package:
        return package(DYNAMIC[1], require_tool)

    @staticmethod
    def library(of: Package, folder: Path, *keep: str) -> bytes:
        """libc with MiniDebugInfo of all symbols, or of those to keep."""
        small, packed, library = folder / "small", folder / "packed", folder / "libc.so.6"
        options = ["--strip-debug"] if not keep else ["--strip-all", *(f"--keep-symbol={name}" for name in keep)]
        subprocess.run(["objcopy", *options, of.debug_file, small], check=True)
        packed.write_bytes(lzma.compress(small.read_bytes(), preset=0))
        command = ["objcopy", "--add-section", f".gnu_debugdata={packed}", of.file, library]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return library.read_bytes()

    def test_it_is_told_from_other_tables(self, of: Package, tmp_path: Path, require_tool: Tool) -> None:
        require_tool("objcopy", "apt install binutils")
        root = tmp_path / "root"
        with_file(root, of.path, self.library(of, tmp_path))
        report = analysed(of.core, root)
        mini = "symbol table (MiniDebugInfo) of libc.so.6"
        assert symbol_sources(report) == {mini}
        assert report.heap is not None
        assert report.heap.identity.confidence is Confidence.CERTAIN
        assert of.differences(report) == []

        report = analysed(of.core, root, debug_directories=(files_of("trixie-amd64").debug,))
        separate = f"symbol table (.symtab) of debug file {of.debug_file.name}"
        assert symbol_sources(report) == {mini, separate}
        assert of.differences(report) == []

    def test_one_of_functions_alone_as_fedora_has_it_names_no_arena(
        self, of: Package, tmp_path: Path, server: Server, require_tool: Tool
    ) -> None:
        require_tool("objcopy", "apt install binutils")
        root = tmp_path / "root"
        with_file(root, of.path, self.library(of, tmp_path, "_int_malloc", "_int_free", "sysmalloc"))
        report = analysed(of.core, root, debuginfod=True)
        # So the debug file is still needed, and libc's own file is not.
        assert server.paths == [f"/buildid/{of.build_id}/debuginfo"]
        assert symbol_sources(report) == set()
        assert of.differences(report) == []


class TestTheWrongLibc:
    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("trixie-amd64/threads_kept", "bookworm-amd64"),
            ("bullseye-amd64/threads_kept", "forky-amd64"),
            ("forky-amd64/threads_kept", "trixie-amd64"),
            ("bookworm-i386/plain_small", "experimental-i386"),
        ],
    )
    def test_another_release_in_the_sysroot_is_refused_by_name(
        self, name: str, wrong: str, tmp_path: Path, empty: Path, require_tool: Tool
    ) -> None:
        of = package(name, require_tool)
        other = files_of(wrong).libraries / "libc.so.6"
        place = with_file(tmp_path / "root", of.path, other.read_bytes())
        report = analysed(of.core, tmp_path / "root")
        (gap,) = gaps_of(report, "mismatched_module")
        for word in (str(place), build_id_of(other), of.build_id, of.path.name, "not used"):
            assert word in gap.consequence
        assert gap.range is not None
        assert build_id_of(other) in json_text(report)
        # By structure, as from the core alone.
        alone = analysed(of.core, empty)
        assert report.heap is not None
        assert alone.heap is not None
        assert report.heap.identity == alone.heap.identity
        assert report.heap.identity.confidence is Confidence.CERTAIN
        assert not report.is_partial
        assert of.differences(report) == []

    def test_the_report_for_people_says_so(
        self, tmp_path: Path, require_tool: Tool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        of = package("trixie-amd64/threads_kept", require_tool)
        other = files_of("bookworm-amd64").libraries / "libc.so.6"
        with_file(tmp_path / "root", of.path, other.read_bytes())
        assert main(["analyze", str(of.core), "--sysroot", str(tmp_path / "root")]) == 0
        text = "".join(capsys.readouterr().out.split())
        assert build_id_of(other) in text
        assert f"libc.so.6inthecore{of.build_id}" in text


RECORDER = """
import os, sys, sysconfig
import numpy
import coreheap
from coreheap.cli import main
own = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
own = tuple(os.path.realpath(path) + "/" for path in [*own, *filter(None, sys.path), coreheap.__path__[0]])
seen = open(sys.argv[1], "w", buffering=1)
def record(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "ctypes.dlopen") and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not (path + "/").startswith(own):
            print(event, path, file=seen)
    elif event.startswith(("socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.system", "os.fork")):
        print(event, file=seen)
sys.addaudithook(record)
sys.exit(main(sys.argv[2:]))
"""


class TestTheAnalysingHost:
    """Every file that is opened during an analysis, as Python's audit events tell."""

    def recorded(self, tmp_path: Path, *words: str) -> tuple[set[str], str]:
        script, seen, report = tmp_path / "recorder.py", tmp_path / "seen", tmp_path / "report.json"
        script.write_text(RECORDER)
        command = [sys.executable, str(script), str(seen), *words, "--json"]
        with report.open("w") as output:
            subprocess.run(command, cwd=tmp_path, stdout=output, check=True, timeout=300)
        lines = set(seen.read_text().splitlines())
        # Its own memory use, for the list of what the analysis cost; /proc/self is a link.
        own_status = {line for line in lines if re.fullmatch(r"open /proc/\d+/status", line)}
        assert len(own_status) <= 1
        return lines - own_status, report.read_text()

    @pytest.mark.parametrize("name", [*DYNAMIC, *STATIC])
    def test_with_an_empty_sysroot_nothing_but_the_core_is_opened(
        self, name: str, tmp_path: Path, empty: Path, require_tool: Tool
    ) -> None:
        of = package(name, require_tool)
        lines, report = self.recorded(tmp_path, "analyze", str(of.core), "--sysroot", str(empty))
        assert lines == {f"open {of.core}"}
        assert '"mismatched_module"' not in report

    def test_the_hosts_libc_at_the_cores_path_is_refused(self, tmp_path: Path, empty: Path, require_tool: Tool) -> None:
        """Without a sysroot, where the core's libc and ld.so have the paths of this machine's own."""
        host_libc = Path(f"/lib/{platform.machine()}-linux-gnu/libc.so.6")
        loader = Path(f"/lib/{platform.machine()}-linux-gnu/ld-linux-x86-64.so.2")
        if not (host_libc.exists() and loader.exists()):
            skip_unless_ci(
                f"no {host_libc} and {loader.name} there; to run this test: use Debian or Ubuntu on x86-64, where these are"
            )
        # At most one of two releases is this machine's own.
        packages = (package(f"{release}-amd64/threads_kept", require_tool) for release in ("forky", "trixie"))
        of = next(of for of in packages if of.build_id != build_id_of(host_libc))
        core = with_paths(of.core, tmp_path / "core", {"libc.so.6": host_libc, loader.name: loader})
        lines, _ = self.recorded(tmp_path, "analyze", str(core))
        opened = {line.removeprefix("open ") for line in lines}
        # It is looked at, to compare the build-ids.
        assert os.path.realpath(host_libc) in opened
        assert not [path for path in opened if path.startswith(("/proc", "/sys", "/dev"))]
        report = analysed(core, None)
        refused = {gap.consequence for gap in gaps_of(report, "mismatched_module")}
        for file in (host_libc, loader):
            (text,) = [text for text in refused if file.name in text]
            assert build_id_of(file) in text
            assert "not used" in text
        assert of.build_id in "".join(refused)
        alone = analysed(core, empty)
        assert report.heap is not None
        assert alone.heap is not None
        assert report.heap.identity == alone.heap.identity
        assert of.differences(report) == []


def with_paths(core: Path, copy: Path, paths: Mapping[str, Path]) -> Path:
    """A copy of a 64-bit core whose NT_FILE has other paths for files of these names, made equally long by slashes."""
    shutil.copyfile(core, copy)
    with copy.open("r+b") as file:
        head = file.read(64)
        (table,) = struct.unpack_from("<Q", head, 32)
        entry_bytes, count = struct.unpack_from("<HH", head, 54)
        for row in range(count):
            file.seek(table + row * entry_bytes)
            kind, _, offset, _, _, size = struct.unpack("<IIQQQQ", file.read(40))
            if kind != 4:
                continue
            file.seek(offset)
            notes = file.read(size)
            for name, path in paths.items():
                pattern = re.compile(rb"(?<=\0)/[^\0]*/" + re.escape(name.encode()) + rb"(?=\0)")
                assert pattern.search(notes)
                notes = pattern.sub(lambda old, path=path: padded(path, len(old.group())), notes)
            file.seek(offset)
            file.write(notes)
    return copy


def padded(path: Path, byte_count: int) -> bytes:
    folder, name = os.fsencode(path.parent), os.fsencode(path.name)
    slashes = byte_count - len(folder) - len(name)
    assert slashes > 0
    return folder + b"/" * slashes + name
