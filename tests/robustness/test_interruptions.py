"""Ctrl-C and SIGTERM at any moment: the conventional end, one line at most, nothing half-written left behind.

No clock decides about the moment: the child sends itself the signal at its n-th import, call or write.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "fixtures" / "cores" / "plain_small.core.zst"
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])


def _set_signals(of_interrupt: signal.Handlers) -> None:
    """What runs in the background or by nohup has others."""
    signal.signal(signal.SIGINT, of_interrupt)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def ended(
    program: str, folder: Path, *, disposition: signal.Handlers = signal.SIG_DFL
) -> subprocess.CompletedProcess[str]:
    """A child that runs a program after ``sys.argv`` is that of an analysis into a folder."""
    arguments = ["coreheap", "analyze", str(CORE), "--json", "-o", str(folder / "report.json")]
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import sys\nsys.argv = {arguments!r}\n{program}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=partial(_set_signals, disposition),
    )


def is_conventional(done: subprocess.CompletedProcess[str], number: int, folder: Path) -> None:
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == ("coreheap: interrupted\n" if number == signal.SIGINT else "")
    assert done.stdout == ""
    assert os.listdir(folder) == []


@SIGNALS
@pytest.mark.parametrize("moment", [1, 2, 7, 30, 100, 220])
def test_while_something_is_imported(tmp_path: Path, moment: int, number: int) -> None:
    """The handler is there before anything of size is imported; an import is no place for an exception."""
    program = f"""
import os, signal
from coreheap.cli import main
import coreheap.cli.signals
count = 0
def note(event, arguments):
    global count
    if event == "import":
        count += 1
        if count == {moment}:
            os.kill(os.getpid(), {int(number)})
coreheap.cli.signals.end_on_signals()
sys.addaudithook(note)
sys.exit(main())
"""
    is_conventional(ended(program, tmp_path), number, tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995])
def test_at_any_call(tmp_path: Path, share: float) -> None:
    """In the middle of what it may be: a destructor, a callback from C, a context that is being left."""
    program = """
import os, signal
from coreheap.cli import main
count, last = 0, LAST
def note(frame, event, argument):
    global count
    if event == "call":
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGINT)
sys.setprofile(note)
code = main()
sys.setprofile(None)
print(count)
sys.exit(code)
"""
    whole = tmp_path / "whole"
    whole.mkdir()
    # The first one finds out how many calls there are; it is not interrupted.
    counted = ended(program.replace("LAST", "-1"), whole)
    assert counted.returncode == 0, counted.stderr
    folder = tmp_path / "folder"
    folder.mkdir()
    done = ended(program.replace("LAST", str(int(int(counted.stdout) * share))), folder)
    assert done.returncode == 130
    assert done.stderr == "coreheap: interrupted\n"
    # The last calls of all come after the file got its name.
    assert os.listdir(folder) in ([], ["report.json"])


@SIGNALS
@pytest.mark.parametrize("moment", ["made", "written", "renamed"])
def test_while_the_result_is_written(tmp_path: Path, moment: str, number: int) -> None:
    replaced = {"made": "open", "written": "write", "renamed": "replace"}[moment]
    program = f"""
import os
from coreheap.cli import main, output
done = os.{replaced}
def interrupted(*words):
    result = done(*words) if {moment != "renamed"} else None
    if {moment != "made"} or str(words[0]).endswith(".part"):
        os.kill(os.getpid(), {int(number)})
    return result
class System:
    def __getattr__(self, name):
        return getattr(os, name)
    {replaced} = staticmethod(interrupted)
output.os = System()
sys.exit(main())
"""
    is_conventional(ended(program, tmp_path), number, tmp_path)


def test_a_result_that_was_there_is_there_still(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("old")
    program = """
import os, signal
from coreheap.cli import main, output
def interrupted(descriptor):
    os.kill(os.getpid(), signal.SIGINT)
class System:
    def __getattr__(self, name):
        return getattr(os, name)
    fsync = staticmethod(interrupted)
output.os = System()
sys.exit(main())
"""
    done = ended(program, tmp_path)
    assert (done.returncode, done.stderr) == (130, "coreheap: interrupted\n")
    assert os.listdir(tmp_path) == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


@pytest.mark.parametrize("name", ["coreheap.cli", "coreheap.cli.signals", "coreheap.cli.application"])
def test_before_the_handler_is_there(tmp_path: Path, name: str) -> None:
    """``python -m coreheap``. What Python imports before it, it does by itself."""
    program = f"""
import os, runpy, signal
def note(event, arguments):
    if event == "import" and arguments[0] == {name!r}:
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(note)
runpy.run_module("coreheap.__main__")
"""
    done = ended(program, tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr in ("", "coreheap: interrupted\n")
    assert os.listdir(tmp_path) == []


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """nohup, and what a shell runs in the background."""
    program = """
import os, signal
from coreheap.cli import main
from coreheap.cli import output
done = os.fsync
def interrupted(descriptor):
    os.kill(os.getpid(), signal.SIGINT)
    done(descriptor)
class System:
    def __getattr__(self, name):
        return getattr(os, name)
    fsync = staticmethod(interrupted)
output.os = System()
sys.exit(main())
"""
    done = ended(program, tmp_path, disposition=signal.SIG_IGN)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_terminal_gets_its_cursor_back(tmp_path: Path) -> None:
    """rich hides it while the line of progress is shown."""
    program = """
import os, signal
from coreheap.cli import signals, progress
signals.end_on_signals()
progress.PATIENCE_SECONDS = 0
reporter = progress.ProgressReporter(True)
reporter("reading", 1, 2)
sys.stderr.flush()
os.kill(os.getpid(), signal.SIGINT)
"""
    done = ended(program, tmp_path)
    assert done.returncode == 130
    assert done.stderr.endswith("\x1b[?25hcoreheap: interrupted\n")
