"""Results and temporary files where there is no room, or no permission: one clear error, nothing half-written."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from coreheap.corefile import open_core
from coreheap.errors import InputNotUsable
from tests.core_builder import CoreBuilder

PAGE = 4096


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def without_privileges() -> None:
    """Let the program that is started next be refused what the modes of files refuse, root's too (capabilities(7))."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        # Fails for who is not root, and needs it not.
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def large_core() -> bytes:
    return CoreBuilder().add_thread().add_segment(0x100000, os.urandom(600 * PAGE)).build()


def run(*arguments: str, file_limit: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """coreheap, in a process whose files may not grow beyond ``file_limit``: as on a full disk, writes fail."""

    def limit() -> None:
        without_privileges()
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run(
        [sys.executable, "-m", "coreheap", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        preexec_fn=limit,
    )


def one_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "defect" not in done.stderr
    assert done.stderr.count("coreheap: error: ") == 1
    assert "next step: " in done.stderr
    return done.stderr


def test_a_disk_without_room_for_the_result(tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.write_bytes(large_core())
    output = tmp_path / "report.json"
    output.write_text("kept")
    message = one_error(run("analyze", str(core), "--json", "-o", str(output), file_limit=1000), 2)
    assert "could not be written" in message
    assert output.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["core", "report.json"]


def test_a_device_without_room(tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.write_bytes(large_core())
    assert "could not be written" in one_error(run("analyze", str(core), "-o", "/dev/full"), 2)


@pytest.mark.parametrize("folder", ["/proc/self", "/sys/kernel"])
def test_a_folder_that_nobody_may_write_to(tmp_path: Path, folder: str) -> None:
    core = tmp_path / "core"
    core.write_bytes(large_core())
    one_error(run("analyze", str(core), "-o", f"{folder}/report.json"), 2)


def test_a_disk_without_room_for_the_unpacked_core(tmp_path: Path) -> None:
    core, folder = tmp_path / "core.zst", tmp_path / "temporary"
    core.write_bytes(zstandard.compress(large_core()))
    folder.mkdir()
    message = one_error(run("analyze", str(core), file_limit=1 << 20, TMPDIR=str(folder)), 3)
    assert "no room to unpack the core" in message
    assert "TMPDIR" in message
    assert not list(folder.iterdir())


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that os.access thinks well of: nobody can make files in /proc."""
    core = tmp_path / "core.zst"
    core.write_bytes(zstandard.compress(large_core()))
    monkeypatch.setattr("coreheap.corefile.compression._roomy_directory", lambda: Path("/proc/self"))
    with pytest.raises(InputNotUsable, match="cannot be unpacked into /proc/self") as caught:
        open_core(core)
    assert "TMPDIR" in caught.value.next_step


def test_a_read_only_folder(tmp_path: Path) -> None:
    core, folder = tmp_path / "core", tmp_path / "folder"
    core.write_bytes(large_core())
    folder.mkdir()
    folder.chmod(0o500)
    message = one_error(run("analyze", str(core), "-o", str(folder / "report")), 2)
    assert "may not write to this folder" in message
    assert not list(folder.iterdir())


def test_a_core_that_may_not_be_read(tmp_path: Path) -> None:
    core = tmp_path / "core"
    core.write_bytes(large_core())
    core.chmod(0)
    assert "no permission" in one_error(run("analyze", str(core)), 3)
