"""Both implementations of the kernels make the same report of whole cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.real_cores import cores
from tests.real_cores.conftest import core_or_skip

# Cores of every kind that the slow kernels can go through in seconds.
CASES = (
    "plain_small",
    "threads_small",
    "every_list",
    "brk_blocked",
    "foreign_sbrk",
    "mmapped",
    "fork_child",
    "crash_in_malloc_top",
    "crash_in_malloc_unsorted",
    "crash_in_malloc_next_size",
    "abort_double_free",
    "static_pie",
    "hidden_pointers",
    "out_of_sight",
)


def documents(core: Path, kernels: str) -> tuple[object, str]:
    """The JSON report without what may differ (phases, kernels), and all rows of the chunk table."""
    environment = {**os.environ, "COREHEAP_KERNELS": kernels}

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "coreheap", *arguments]
        # Not from the checkout, which python -m would put before the installed package.
        return subprocess.run(command, env=environment, cwd="/", check=True, capture_output=True, text=True).stdout

    report = json.loads(run("analyze", str(core), "--json"))
    assert report["tool"].pop("kernels") == kernels
    del report["phases"]
    return report, run("chunks", str(core), "--csv")


@pytest.mark.parametrize("case", CASES)
def test_reports_and_rows_are_equal(case: str) -> None:
    core = core_or_skip(case).core
    assert documents(core, "compiled") == documents(core, "reference")


@pytest.mark.parametrize("name", cores.fixture_names())
def test_on_committed_fixtures(name: str) -> None:
    core = cores.fixture(name).compressed_core
    assert documents(core, "compiled") == documents(core, "reference")


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_on_cut_cores(share: float, tmp_path: Path) -> None:
    core = cores.truncated(core_or_skip("fork_child").core, share, tmp_path)
    assert documents(core, "compiled") == documents(core, "reference")
