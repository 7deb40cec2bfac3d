"""Cases for checks: from built cores, and with arenas of chosen numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import coreheap
from coreheap.checks import Case
from tests.unit.allocators.built_process import BuiltProcess

CaseOf = Callable[..., Case]


@pytest.fixture
def case_of(tmp_path: Path) -> Iterator[CaseOf]:
    """``case_of(process, left_out, sysroot=None)``: the case of a built process; its core stays open for the test."""
    with ExitStack() as stack:

        def make(process: BuiltProcess, left_out: Collection[int] = (), *, sysroot: Path | None = None) -> Case:
            core = stack.enter_context(coreheap.open(process.write(tmp_path, left_out), sysroot=sysroot))
            report = coreheap.analyze(core)
            return Case(core, report.heap, report.ledger, report.gaps, mappings=report.mappings, crash=report.crash)

        yield make
