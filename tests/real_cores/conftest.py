"""Cores for tests: made on first use, kept in the cache, analysed once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import coreheap
from coreheap.report import Report
from tests.conftest import skip_unless_ci
from tests.real_cores import cores, targets
from tests.real_cores.truth import Truth, load_truth


def core_or_skip(name: str) -> cores.CorePaths:
    """The core of a case; skips with the remedy where it cannot be made, fails under CI=true."""
    need_packages(cores.case_named(name).target)
    try:
        return cores.core_for(name)
    except cores.CannotMake as problem:
        skip_unless_ci(str(problem))


def need_packages(target: targets.Target) -> None:
    """Skips what needs Debian packages that were not downloaded yet; under CI=true they are downloaded.

    Nobody who runs the tests for the first time should wait for those of 15 machines.
    """
    is_here = target.release is None or targets.are_unpacked(target, cores.default_directory())
    if not is_here and os.environ.get("CI") != "true":
        pytest.skip(f"not downloaded yet; to run this test: scripts/make_cores --matrix --target {target.name}")


@pytest.fixture(scope="session")
def analysed() -> Callable[[str], tuple[Report, Truth]]:
    """``analysed(case)``: the report on a case's core and its truth; each core is analysed once.

    The reports of all cases are kept: their chunk tables hold no memory of the core, only bitmaps.
    """
    done: dict[str, tuple[Report, Truth]] = {}

    def analyse(name: str) -> tuple[Report, Truth]:
        if name not in done:
            paths = core_or_skip(name)
            done[name] = (report_on(paths.core), load_truth(paths.truth))
        return done[name]

    return analyse


def report_on(path: Path, sysroot: Path | None = None) -> Report:
    """A report on a core file; with ``sysroot`` no file of this machine outside it is looked at."""
    with coreheap.open(path, sysroot=sysroot) as core:
        return coreheap.analyze(core)
