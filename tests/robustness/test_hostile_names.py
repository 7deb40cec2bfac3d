"""Paths and texts of a core: nothing is opened because a core names it, nothing is obeyed because a core says it."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

import coreheap
from coreheap.cli import main
from coreheap.corefile import open_core
from tests.core_builder import CoreBuilder, elf_image
from tests.robustness.test_places_to_write import without_privileges

PAGE = 4096
BUILD_ID = bytes(range(20))
TEXTS = {
    "escape sequences": "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b1m",
    "markup": "<script>alert(1)</script>&lt;[bold red]x[/][link=file:///etc]y[/link]",
    "directions": "\u202etxt.exe\u2066\u200b\u2028z",
    "lines": "one\ntwo\r\nthree\tfour\x00five",
    "broken UTF-8": "\udcff\udcc0\udc80\udced\udca0\udc80",
    "formats": "%s%n{0}{x!r}${HOME}$(id)`id`",
    "quotes": "\",'=1+1\\",
    "long": "/" + "y" * 4000,
}
COMMANDS = (
    "analyze",
    "analyze -v",
    "analyze --json",
    "threads",
    "threads --json",
    "threads --csv",
    "maps --flat --top 100",
    "maps --flat --json",
    "maps --flat --csv",
    "explain 0x10000 0x50010",
    "explain --json 0x10000 0x50010",
)


def hostile_core(text: str) -> CoreBuilder:
    """A core that says ``text`` wherever a core has text: command line, names of files, program and threads."""
    raw = os.fsencode(text)
    builder = CoreBuilder()
    # The first thread has the process's number, and so its name.
    builder.pid, builder.name, builder.arguments = 100, raw[:15], raw[:79]
    image = elf_image()
    builder.add_thread(100, stack_pointer=0x50010, thread_pointer=0x50020)
    builder.auxv = {6: PAGE, 9: 0x10800, 31: 0x50200}
    builder.add_segment(0x10000, image[:PAGE], PAGE, "r-x")
    builder.add_segment(0x50000, (bytes(0x200) + raw).ljust(2 * PAGE, b"\0")[: 2 * PAGE])
    path = b"/" + raw.replace(b"\0", b"")
    builder.add_file_mapping(0x10000, 0x11000, 0, path)
    builder.add_file_mapping(0x90000, 0x91000, 0, path + b" (deleted)")
    return builder


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", TEXTS)
def test_no_output_is_obeyed(
    tmp_path: Path, kind: str, command: str, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = hostile_core(TEXTS[kind]).write(tmp_path / "core")
    (tmp_path / "empty").mkdir()
    name, *words = command.split()
    code = main([name, str(path), "--sysroot", str(tmp_path / "empty"), *words])
    captured = capfdbinary.readouterr()
    assert code == 0, captured.err
    for raw in (captured.out, captured.err):
        for character in set(raw.decode()) - {"\n"}:
            assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp"), (character, command)
    text = captured.out.decode()
    if command == "analyze --json":
        assert json.loads(text)["findings"] is not None
    elif "--json" in words:
        assert all(json.loads(line) for line in text.splitlines())
    elif "--csv" in words:
        rows = list(csv.reader(io.StringIO(text)))
        assert {len(row) for row in rows} == {len(rows[0])}


def opened_by(program: str, *arguments: str) -> tuple[list[str], str]:
    """What a process opens while it analyses a core, by Python's own audit hook."""
    watcher = (
        "import sys\n"
        "names = []\n"
        "sys.addaudithook(lambda event, arguments: names.append(arguments[0]) if event == 'open' else None)\n"
        "from coreheap.cli import main\n"
        "from coreheap.corefile import open_core\n" + program + "\n"
        "for name in names:\n"
        "    print(name if isinstance(name, str) else repr(name))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", watcher, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines(), done.stderr


def core_of_modules(paths: list[bytes], build_id: bytes = BUILD_ID) -> CoreBuilder:
    """A core with a module for each path; all claim the same build-id."""
    builder = CoreBuilder().add_thread()
    image = elf_image(build_id=build_id)
    for number, path in enumerate(paths):
        start = 0x100000 * (number + 1)
        builder.add_segment(start, image[:PAGE], PAGE, "r-x")
        builder.add_file_mapping(start, start + PAGE, 0, path)
    return builder


def test_a_sysroot_is_never_left(tmp_path: Path) -> None:
    """Dots, absolute paths, and links of the sysroot that lead out of it, to files that would fit."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "lib").mkdir(parents=True)
    outside.mkdir()
    secret = outside / "secret.so"
    secret.write_bytes(elf_image(build_id=BUILD_ID))
    (root / "lib" / "absolute.so").symlink_to(secret)
    (root / "lib" / "relative.so").symlink_to("../../outside/secret.so")
    (root / "folder").symlink_to(outside)
    (root / "round").symlink_to("round")
    (root / "up").symlink_to("../../../../../../../..")
    paths = [
        b"/../outside/secret.so",
        b"/lib/../../outside/secret.so",
        b"/lib/absolute.so",
        b"/lib/relative.so",
        b"/folder/secret.so",
        b"/round/secret.so",
        b"/up" + bytes(secret),
        bytes(secret),
        b"/lib/./././absolute.so",
        b"/" + b"../" * 60 + bytes(secret)[1:],
    ]
    path = core_of_modules(paths).write(tmp_path / "core")
    with open_core(path, sysroot=root) as core:
        assert len(core.modules) == len(paths)
        assert {module.file for module in core.modules} == {None}
    names, _ = opened_by(
        "main(['analyze', sys.argv[1], '--sysroot', sys.argv[2], '-o', '/dev/null'])", str(path), str(root)
    )
    assert str(root / "lib") or names
    assert not [name for name in names if name.startswith(str(outside)) or "secret.so" in name]


def test_files_that_are_none_or_would_block(tmp_path: Path) -> None:
    """FIFOs, devices, sockets' like, folders, /proc, names that are too long: no module file, and no waiting."""
    fifo, folder, sparse = tmp_path / "fifo", tmp_path / "folder", tmp_path / "huge"
    os.mkfifo(fifo)
    folder.mkdir()
    (tmp_path / "to_mem").symlink_to("/proc/self/mem")
    (tmp_path / "to_zero").symlink_to("/dev/zero")
    with sparse.open("wb") as file:
        file.write(elf_image(build_id=bytes(20))[:PAGE])
        file.truncate(1 << 40)
    named = [
        fifo,
        folder,
        tmp_path / "to_mem",
        tmp_path / "to_zero",
        sparse,
        "/proc/self/mem",
        "/proc/kmsg",
        "/dev/zero",
    ]
    named += ["/dev/stdin", "/dev/tty", "/sys/kernel/debug", "/proc/self/fd/0", "/" + "n" * 300, "/" + "a/" * 2040]
    paths = [os.fsencode(name) for name in named]
    for build_id in (BUILD_ID, b""):
        path = core_of_modules(paths, build_id).write(tmp_path / "core")
        with open_core(path) as core:
            assert len(core.modules) == len(paths)
            assert {module.file for module in core.modules} == {None}
    names, _ = opened_by("main(['analyze', sys.argv[1], '-o', '/dev/null'])", str(path))
    assert not [
        name for name in names if name.startswith(("/dev/z", "/dev/t", "/dev/s", "/proc/k", "/proc/self/m", "/sys"))
    ]


def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "lib.so").write_bytes(elf_image(build_id=BUILD_ID))
    (tmp_path / "lib.so").write_bytes(elf_image(build_id=BUILD_ID))
    (tmp_path / "lib.so").chmod(0)
    hidden.chmod(0)
    try:
        paths = [bytes(hidden / "lib.so"), bytes(tmp_path / "lib.so")]
        for build_id in (BUILD_ID, b""):
            path = core_of_modules(paths, build_id).write(tmp_path / "core")
            done = subprocess.run(
                [sys.executable, "-m", "coreheap", "analyze", str(path), "--json"],
                capture_output=True,
                text=True,
                preexec_fn=without_privileges,
            )
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["core"]["saved_bytes"] == 2 * PAGE
    finally:
        hidden.chmod(0o700)


def test_names_without_a_build_id_are_looked_at_without_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a user who may not enter the folder; root may enter all."""
    refused = PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "stat", lambda self, **_: (_ for _ in ()).throw(refused))
    builder = CoreBuilder().add_thread()
    builder.add_segment(0x100000, elf_image(build_id=None)[:0x600], PAGE, "r-x")
    builder.add_file_mapping(0x100000, 0x101000, 0, b"/closed/" + b"n" * 300)
    path = builder.write(tmp_path / "core")
    with coreheap.open(path) as core:
        assert [module.file for module in core.modules] == [None]
