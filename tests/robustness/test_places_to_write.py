"""Results and temporary files where there is no room, or no permission: one clear error, nothing half-written."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from coreheap.cli.output import opened_output
from coreheap.corefile import open_core
from coreheap.errors import FailedHere, OutputNotWritten, failure_here
from tests.core_builder import CoreBuilder

PAGE = 4096
FIXTURES = Path(__file__).parents[2] / "fixtures" / "cores"


PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2


def without_privileges() -> None:
    """Let the program that is started next be refused what the modes of files refuse, root's too (capabilities(7))."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        # Fails for who is not root, and needs it not.
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


ROW_COMMANDS = (["chunks", "--csv"], ["chunks", "--json"], ["maps", "--csv"], ["analyze", "--json"], ["analyze"])


def large_core() -> bytes:
    return CoreBuilder().add_thread().add_segment(0x100000, os.urandom(600 * PAGE)).build()


def run(*arguments: str, file_limit: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """coreheap, in a process whose files may not grow beyond ``file_limit``: as on a full disk, writes fail."""

    def limit() -> None:
        without_privileges()
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.run(
        [sys.executable, "-P", "-m", "coreheap", *arguments],
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


@pytest.mark.parametrize("words", ROW_COMMANDS, ids=" ".join)
@pytest.mark.parametrize("file_limit", [0, 300])
def test_a_disk_that_is_full_at_any_moment(tmp_path: Path, words: list[str], file_limit: int) -> None:
    """Some documents are smaller than a buffer: then it is the last write, or the closing, that finds no room."""
    core, folder = tmp_path / "core", tmp_path / "folder"
    core.write_bytes(zstandard.ZstdDecompressor().decompress((FIXTURES / "plain_small.core.zst").read_bytes()))
    folder.mkdir()
    output = folder / "result"
    arguments = (words[0], str(core), *words[1:], "-o", str(output))
    message = one_error(run(*arguments, file_limit=file_limit), 2)
    assert "could not be written" in message
    assert not list(folder.iterdir())


def test_a_file_system_that_says_at_close_that_it_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS and quotas do."""
    output, closed = tmp_path / "result", os.close

    def close(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        closed(descriptor)
        if name.endswith(".part"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("coreheap.cli.output.os.close", close)
    with pytest.raises(OutputNotWritten, match="quota"), opened_output(str(output)) as file:
        file.write(b"all of it")
    assert not list(tmp_path.iterdir())


def test_a_write_that_ends_early_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, written = tmp_path / "result", os.write
    monkeypatch.setattr("coreheap.cli.output.os.write", lambda descriptor, data: written(descriptor, data[:3]))
    with opened_output(str(output)) as file:
        file.write(b"all of it")
    assert output.read_bytes() == b"all of it"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["chunks", "--help"], ["analyze", "CORE", "--json"]])
def test_standard_output_without_room(tmp_path: Path, words: list[str]) -> None:
    core = tmp_path / "core"
    core.write_bytes(large_core())
    words = [str(core) if word == "CORE" else word for word in words]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "coreheap", *words],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines() == [
        "coreheap: error: standard output: the result could not be written: No space left on device"
    ]


@pytest.mark.parametrize(
    ("limit", "amount", "lacking"),
    [("RLIMIT_NOFILE", 3, "open files"), ("RLIMIT_AS", 1 << 20, "memory"), ("RLIMIT_DATA", 1 << 20, "memory")],
)
def test_a_machine_without_files_or_memory_is_told_apart_from_a_core_that_is_none(
    tmp_path: Path, limit: str, amount: int, lacking: str
) -> None:
    """The limit is set where the core is opened: Python itself needs more to start."""
    core = tmp_path / "core"
    core.write_bytes(zstandard.compress(large_core()))
    program = f"""
import resource, sys
from coreheap.cli import main
from coreheap.corefile import core
opened = core._open_regular_file
def limited(where):
    number = resource.{limit}
    resource.setrlimit(number, ({amount}, resource.getrlimit(number)[1]))
    return opened(where)
core._open_regular_file = limited
sys.exit(main(["analyze", {str(core)!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    message = one_error(done, 75)
    assert f"lacks {lacking}" in message


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (MemoryError(), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.ENFILE, "Too many open files in system"), "open files"),
        (OSError(errno.EROFS, "Read-only file system"), "a folder that can be written to"),
        (ImportError("libx.so: failed to map segment from shared object"), "memory"),
        (ImportError("libx.so: cannot open shared object file: Too many open files"), "open files"),
        (OSError(errno.ENOENT, "No such file"), None),
        (ImportError("No module named numpy"), None),
        (ValueError("surprise"), None),
    ],
)
def test_what_this_machine_lacks(error: Exception, lacking: str | None) -> None:
    wrapper = RuntimeError("what numpy says about it")
    wrapper.__cause__ = error
    for raised in (error, wrapper):
        failure = failure_here(raised, "core")
        assert (None if failure is None else failure.message) == (lacking and f"this machine lacks {lacking}")
        assert failure is None or (failure.next_step and failure.found and failure.expected and failure.where == "core")


def test_no_folder_at_all_to_unpack_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = tmp_path / "core.zst"
    core.write_bytes(zstandard.compress(large_core()))
    monkeypatch.setattr("coreheap.corefile.compression.os.access", lambda *_: False)

    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("coreheap.corefile.compression.tempfile.gettempdir", nowhere)
    with pytest.raises(FailedHere, match="no folder to unpack it into"):
        open_core(core)


@pytest.mark.parametrize("folder", ["/proc/self", "/sys/kernel"])
def test_a_folder_that_nobody_may_write_to(tmp_path: Path, folder: str) -> None:
    core = tmp_path / "core"
    core.write_bytes(large_core())
    one_error(run("analyze", str(core), "-o", f"{folder}/report.json"), 2)


def test_a_disk_without_room_for_the_unpacked_core(tmp_path: Path) -> None:
    core, folder = tmp_path / "core.zst", tmp_path / "temporary"
    core.write_bytes(zstandard.compress(large_core()))
    folder.mkdir()
    message = one_error(run("analyze", str(core), file_limit=1 << 20, TMPDIR=str(folder)), 75)
    assert "no room to unpack the core" in message
    assert "TMPDIR" in message
    assert not list(folder.iterdir())


def test_no_folder_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that os.access thinks well of: nobody can make files in /proc."""
    core = tmp_path / "core.zst"
    core.write_bytes(zstandard.compress(large_core()))
    monkeypatch.setattr("coreheap.corefile.compression._roomy_directory", lambda where: Path("/proc/self"))
    with pytest.raises(FailedHere, match="cannot be unpacked into /proc/self") as caught:
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
