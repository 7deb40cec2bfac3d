"""A few programs of the soundness campaign, whose packages are at hand nearly everywhere; scripts/campaign runs all of them."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import skip_unless_ci
from tests.real_cores import campaign, cores, witness, workers
from tests.real_cores.campaign_languages import LANGUAGES
from tests.real_cores.campaign_tools import TOOLS

SMALL = ("bc", "make", "perl-threads", "tcl", "jq", "troff", "zstd")
"""Programs of small packages."""
PROGRAMS = {**LANGUAGES, **TOOLS}


@pytest.mark.parametrize("name", SMALL)
def test_nothing_wrong_is_said_of_a_program_in_the_middle_of_its_work(name: str, tmp_path: Path) -> None:
    if not cores.kernel_writes_cores_here():
        skip_unless_ci("to run this test: sysctl kernel.core_pattern=core, ulimit -H -c unlimited")
    ends = campaign.ends_of(name, PROGRAMS[name], tmp_path / name, times=2)
    assert [end.wrong for end in ends] == [(), ()]
    assert all(end.blocks > 20 for end in ends)


def test_no_two_programs_have_one_name_and_each_names_its_package() -> None:
    assert not LANGUAGES.keys() & TOOLS.keys()
    assert all(worker.package for worker in PROGRAMS.values())


BLOCKS_ALL = """
import signal, sys
signal.signal(signal.SIGSEGV, lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
print(flush=True); sys.stdin.read()
"""


def test_a_signal_that_is_blocked_for_a_moment_ends_a_program_that_handles_the_wanted_one() -> None:
    command = [sys.executable, "-c", BLOCKS_ALL]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert workers.deadly(process.pid, signal.SIGSEGV) is signal.SIGXCPU
        assert workers.deadly(process.pid, signal.SIGTRAP) is signal.SIGTRAP


# ------------------------------------------------------------------------------ the witness itself

PROCESS = 7


def _written(path: Path, *events: tuple[str, int, int, int]) -> Path:
    """A witness's file of (kind, address, bytes, thread), numbered as they stand; of one process."""
    kinds = {"allocate": 1, "free": 2, "realloc failed": 3, "held": 4}
    rows = np.zeros((len(events), 8), "<u4")
    for number, (kind, address, size, thread) in enumerate(events):
        rows[number, :4] = np.array([~address & (1 << 64) - 1, size], np.uint64).view("<u4")
        rows[number, 4:] = (PROCESS, thread, kinds[kind], number)
    path.write_bytes(rows.tobytes())
    return path


def test_a_free_that_is_under_way_decides_nothing(tmp_path: Path) -> None:
    path = _written(
        tmp_path / "events", ("allocate", 0x1000, 8, 1), ("allocate", 0x2000, 9, 1), ("free", 0x2000, 0, 1), ("allocate", 0x3000, 7, 2)
    )  # fmt: skip
    account = witness.Events(path, PROCESS).account()
    assert account.live.tolist() == [0x1000, 0x3000]
    assert account.requested.tolist() == [8, 7]
    assert account.freeing.tolist() == [0x2000]


def test_a_realloc_that_failed_leaves_the_block(tmp_path: Path) -> None:
    path = _written(
        tmp_path / "events", ("allocate", 0x1000, 8, 1), ("free", 0x1000, 0, 1), ("realloc failed", 0x1000, 0, 1)
    )
    account = witness.Events(path, PROCESS).account()
    assert (account.live.tolist(), account.requested.tolist()) == ([0x1000], [8])


def test_what_is_freed_afterwards_was_not_lost(tmp_path: Path) -> None:
    events = (
        ("allocate", 0x1000, 8, 1), ("allocate", 0x2000, 8, 1), ("held", 0x3000, 0, 1), ("allocate", 0x4000, 8, 1),
        ("free", 0x1000, 0, 1), ("allocate", 0x1000, 8, 1), ("allocate", 0x2000, 8, 1), ("free", 0x2000, 0, 1),
    )  # fmt: skip
    path = _written(tmp_path / "events", *events)
    found = witness.Events(path, PROCESS, 4 * witness.EVENT_BYTES)
    assert found.freed_later(np.array([0x1000, 0x2000, 0x4000], np.uint64)).tolist() == [0x1000]
    assert found.held_by_the_kernel(np.array([0x3000, 0x4000], np.uint64)).tolist() == [0x3000]


def test_missing_events_are_noticed(tmp_path: Path) -> None:
    path = _written(tmp_path / "events", *(("allocate", 0x1000 * number, 8, 1) for number in range(1, 9)))
    content = path.read_bytes()
    size = witness.EVENT_BYTES
    path.write_bytes(content[: 2 * size] + content[5 * size :])
    with pytest.raises(witness.WitnessError, match="3 events are missing"):
        witness.Events(path, PROCESS).account()


def test_the_program_that_runs_now_is_what_counts(tmp_path: Path) -> None:
    first = _written(tmp_path / "first", ("allocate", 0x1000, 8, 1), ("allocate", 0x2000, 8, 1))
    then = _written(tmp_path / "then", ("allocate", 0x1000, 9, 1))
    first.write_bytes(first.read_bytes() + then.read_bytes())
    account = witness.Events(first, PROCESS).account()
    assert (account.live.tolist(), account.requested.tolist()) == ([0x1000], [9])
