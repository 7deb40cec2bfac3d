"""Files appear whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from coreheap.cli.output import check_output, opened_output
from coreheap.errors import OutputNotWritten, UsageError


def write(path: Path, *pieces: bytes) -> None:
    with opened_output(str(path)) as output:
        for piece in pieces:
            output.write(piece)


def test_a_file_gets_its_name_when_everything_is_in_it(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")
    with opened_output(str(target)) as output:
        output.write(b"new ")
        assert target.read_text() == "old"
        output.write(bytearray(b"text"))
    assert target.read_text() == "new text"
    assert os.listdir(tmp_path) == ["report.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OutputNotWritten])
def test_nothing_half_written_is_left(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")

    def fail() -> None:
        with opened_output(str(target)) as output:
            output.write(b"half")
            raise error("stop")

    with pytest.raises(error):
        fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
from contextlib import contextmanager
from coreheap.cli import main, commands, pipeline
@contextmanager
def analyzed(request, progress):
    yield None
def document(report, request, output, explorer):
    yield b"half"
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
pipeline.analyzed = analyzed
commands._document = document
sys.argv = ["coreheap", "analyze", "core", "-o", {str(tmp_path / "out")!r}]
sys.exit(main())
"""
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], timeout=60, check=False, capture_output=True, text=True
    )
    assert ended.stderr == ""
    assert ended.returncode == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_a_link_stays_a_link_and_a_mode_stays_a_mode(tmp_path: Path) -> None:
    target = tmp_path / "real"
    target.write_text("old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    write(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_new_file_has_the_usual_mode(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "new", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_devices_and_pipes_are_written_to_not_replaced(tmp_path: Path) -> None:
    write(Path(os.devnull), b"x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write(pipe, b"one ", b"two")
    reader.join(10)
    assert read == [b"one two"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_full_device_is_an_error() -> None:
    with pytest.raises(OutputNotWritten, match="No space left"):
        write(Path("/dev/full"), b"x")


def test_the_core_is_never_replaced(tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.write_text("precious")
    (tmp_path / "link").symlink_to(core)
    for path in (core, tmp_path / "link"):
        with pytest.raises(UsageError, match="replace the core"):
            check_output(str(path), str(core))


def test_a_place_that_cannot_be_written_to_is_found_out_early(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        check_output(str(tmp_path / "missing" / "x"), "core")
    with pytest.raises(UsageError, match="is a directory"):
        check_output(str(tmp_path), "core")
    check_output(None, "core")
    check_output(os.devnull, "core")
    check_output(str(tmp_path / "x"), "core")
