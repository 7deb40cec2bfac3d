"""A core that is cut, grows or is written to while it is read: one clear error or a gap, never SIGBUS."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import coreheap
from coreheap.analysis import AnalysisOptions
from coreheap.corefile.file_guard import FileGuard, check_all_files, is_guarding
from coreheap.errors import InputNotUsable
from tests.fuzzing import seeds

needs_guard = pytest.mark.skipif(not is_guarding, reason="coreheap was installed without a C compiler")

# Runs coreheap's command line, and another process on the core when a phase begins.
AT_PHASE = """
import subprocess, sys
import coreheap.analysis
from coreheap.cli import main
phase, command, *arguments = sys.argv[1:]
enter = coreheap.analysis._Clock.enter
def entering(clock, name):
    if name == phase:
        subprocess.run(command, shell=True, check=True)
    enter(clock, name)
coreheap.analysis._Clock.enter = entering
sys.exit(main(arguments))
"""
PHASES = (
    "reading modules",
    "walking heaps",
    "following free lists",
    "collecting references",
    "accounting for all memory",
)


@pytest.fixture
def core(tmp_path: Path) -> Path:
    """A core of its own, that the test may destroy."""
    [seed] = [seed for seed in seeds.available() if seed.name == "fixture/threads_small"]
    path = tmp_path / "core"
    path.write_bytes(seeds.unpacked(seed))
    (tmp_path / "empty").mkdir()
    return path


def run_with(core: Path, phase: str, command: str, *words: str) -> subprocess.CompletedProcess[str]:
    arguments = ["analyze", str(core), "--sysroot", str(core.parent / "empty"), *words]
    return subprocess.run(
        [sys.executable, "-P", "-c", AT_PHASE, phase, command, *arguments], capture_output=True, text=True, timeout=120
    )


@needs_guard
@pytest.mark.parametrize("phase", PHASES)
def test_a_core_that_another_process_cuts_is_one_error(core: Path, phase: str) -> None:
    output = core.parent / "report.json"
    output.write_text("kept")
    done = run_with(core, phase, f"truncate -s 4096 {core}", "--json", "-o", str(output))
    assert done.returncode == 3, done.stderr
    assert "changed while it was read" in done.stderr
    assert "expected: " in done.stderr
    assert "next step: copy the file" in done.stderr
    assert "Traceback" not in done.stderr
    assert output.read_text() == "kept"
    assert sorted(path.name for path in core.parent.iterdir()) == ["core", "empty", "report.json"]


@pytest.mark.parametrize("command", ["printf x >> {}", "printf '\\177' 1<> {}"])
def test_a_core_that_grows_or_is_written_to_is_a_partial_report(core: Path, command: str) -> None:
    done = run_with(core, "walking heaps", command.format(core), "--json", "--strict")
    assert done.returncode == 4, done.stderr
    document = json.loads(done.stdout)
    assert document["is_partial"]
    assert "core_changed" in {gap["cause"] for gap in document["gaps"]}


def test_a_core_that_nobody_touches_has_no_such_gap(core: Path) -> None:
    done = run_with(core, "walking heaps", "true", "--json")
    assert "core_changed" not in {gap["cause"] for gap in json.loads(done.stdout)["gaps"]}


@needs_guard
def test_cut_at_any_moment(core: Path) -> None:
    """Without any agreement between the two processes."""
    kept = core.with_name("kept")
    shutil.copy(core, kept)
    source = random.Random(5)
    codes = set()
    for _ in range(6):
        shutil.copy(kept, core)
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "coreheap", "analyze", str(core), "--json"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        time.sleep(source.uniform(0.1, 0.9))
        os.truncate(core, source.choice((0, 4096, 100_000)))
        _, errors = process.communicate(timeout=120)
        assert b"Traceback" not in errors
        codes.add(process.returncode)
    assert codes <= {0, 3}


@needs_guard
def test_a_module_file_that_is_cut_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "libc.so"
    path.write_bytes(b"\x7fELF" + bytes(20_000))
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        guard = FileGuard(mapping, file.fileno(), str(path))
    assert mapping[:4] == b"\x7fELF"
    guard.check()
    os.truncate(path, 0)
    assert mapping[9000] == 0
    with pytest.raises(InputNotUsable, match="changed while it was read") as caught:
        check_all_files()
    assert caught.value.where == str(path)
    assert "byte 8192" in caught.value.found
    # Once lost, the rest is zeros and stays so.
    assert mapping[-1] == 0
    guard.release()
    check_all_files()


@needs_guard
@pytest.mark.parametrize(
    "reader", ["outside = mmap.mmap(-1, 4096); outside.close(); ctypes.string_at(cut, 1)", "os.kill(os.getpid(), 7)"]
)
def test_any_other_bus_error_ends_the_process_as_ever(tmp_path: Path, reader: str) -> None:
    """A page of a file that nobody guards, and a signal that was sent."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    program = (
        "import ctypes, mmap, os, sys\n"
        "from coreheap.corefile.file_guard import FileGuard\n"
        "file = open(sys.argv[1], 'r+b')\n"
        "own = mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ)\n"
        "guard = FileGuard(own, file.fileno(), 'own')\n"
        "foreign = mmap.mmap(file.fileno(), 8192)\n"
        "cut = ctypes.addressof(ctypes.c_char.from_buffer(foreign)) + 4096\n"
        "os.truncate(sys.argv[1], 0)\n"
        "assert own[0] == 0\n" + reader
    )
    done = subprocess.run([sys.executable, "-P", "-c", program, str(path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS, done.stderr


@needs_guard
def test_the_handler_is_gone_with_the_last_file(core: Path) -> None:
    """An earlier handler gets its signals back; here Python's own."""
    caught = []
    earlier = signal.signal(signal.SIGBUS, lambda number, frame: caught.append(number))
    try:
        with coreheap.open(core, sysroot=core.parent / "empty") as opened:
            coreheap.analyze(opened, AnalysisOptions(leaks=False))
        del opened
        os.kill(os.getpid(), signal.SIGBUS)
        assert caught == [signal.SIGBUS]
    finally:
        signal.signal(signal.SIGBUS, earlier)


@needs_guard
def test_a_handler_that_was_replaced_is_set_again(tmp_path: Path) -> None:
    """By whoever else is in the process, while a file is open."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with path.open("rb") as file:
        first, second = (mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) for _ in range(2))
        guards = [FileGuard(first, file.fileno(), "first")]
        earlier = signal.signal(signal.SIGBUS, signal.SIG_DFL)
        try:
            guards.append(FileGuard(second, file.fileno(), "second"))
            os.truncate(path, 0)
            assert first[5000] == second[5000] == 0
        finally:
            for guard in guards:
                guard.release()
            signal.signal(signal.SIGBUS, earlier)


@needs_guard
def test_views_that_outlive_the_core_stay_guarded(core: Path) -> None:
    opened = coreheap.open(core, sysroot=core.parent / "empty")
    start, end = opened.memory.saved_runs_within(0, 1 << 64)[-1]
    view = opened.memory.view(start, min(end, start + 65536))
    opened.close()
    os.truncate(core, 0)
    assert int(view.sum()) == 0
