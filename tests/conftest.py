"""What every test may use: the ``tests`` package, and tools that are demanded by name.

Tests run against the installed coreheap (``--import-mode=importlib`` keeps the checkout off sys.path), so the shared
helpers of this folder are made importable as ``tests.…`` here.
"""

from __future__ import annotations

import os
import shutil
import sys
import types
from collections.abc import Callable, Generator
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import hypothesis
import pytest

TESTS = Path(__file__).resolve().parent
Answer = TypeVar("Answer")

# How long an example takes depends on the machine; no test judges time.
hypothesis.settings.register_profile("coreheap", deadline=None, print_blob=True)
hypothesis.settings.load_profile("coreheap")

if "tests" not in sys.modules:
    _package = types.ModuleType("tests")
    _package.__path__ = [str(TESTS)]
    sys.modules["tests"] = _package

from tests import needs  # noqa: E402 - only now the package is there


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what was made over the golden files")


def require_tool(name: str, remedy: str) -> str:
    """The path of a program that a test needs.

    Where it is missing the test is skipped and says how to get it; under CI=true it fails, so nothing is skipped there.
    """
    path = shutil.which(name)
    if path is None:
        skip_unless_ci(f"{name} is missing; to run this test: {remedy}")
    return path


def skip_unless_ci(reason: str) -> NoReturn:
    """Skip a test for a reason that names the remedy; under CI=true it fails, so nothing is skipped there."""
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _problem_told(problem: BaseException) -> NoReturn:
    """Turns what a machine lacks into a skip with its remedy; raises anything else as it is."""
    if isinstance(problem, needs.Missing):
        skip_unless_ci(str(problem))
    if isinstance(problem, FileNotFoundError) and (reason := needs.missing_program(problem)):
        skip_unless_ci(reason)
    raise problem


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, None, None]:
    try:
        return (yield)
    except (needs.Missing, FileNotFoundError) as problem:
        _problem_told(problem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    try:
        return (yield)
    except (needs.Missing, FileNotFoundError) as problem:
        _problem_told(problem)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tells what was skipped; into the file that COREHEAP_SKIPPED names as well, for the end of scripts/test."""
    stats = terminalreporter.stats
    reasons = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in stats.get("skipped", ())
        if isinstance(report.longrepr, tuple)
    ]
    tests = sum(
        len(stats.get(outcome, ())) for outcome in ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
    )
    lines = needs.told(reasons, tests)
    place = os.environ.get("COREHEAP_SKIPPED")
    if place:
        Path(place).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if lines:
        terminalreporter.section("skipped, and what would run it")
        for line in lines:
            terminalreporter.line(line)


def calls_of(question: Callable[[], Answer]) -> tuple[Answer, int]:
    """An answer, and how many functions were called for it: a measure of work that is the same on every machine."""
    count = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    earlier = sys.getprofile()
    sys.setprofile(note)
    try:
        answer = question()
    finally:
        sys.setprofile(earlier)
    return answer, count


@pytest.fixture(name="require_tool")
def _require_tool() -> Callable[[str, str], str]:
    return require_tool


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden(name, text)``: the text is what tests/golden/name holds; ``pytest --update-golden`` writes it."""

    def check(name: str, text: str) -> None:
        path = TESTS / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8"), f"{path} differs; --update-golden accepts the new text"

    return check
