"""Progress is for people who wait in front of a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from coreheap.cli import progress
from coreheap.cli.progress import ProgressReporter, is_wanted


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_needs_a_terminal_and_no_wish_for_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not is_wanted(0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert is_wanted(0)
    assert not is_wanted(-1)
    monkeypatch.setattr(sys, "stderr", None)
    assert not is_wanted(1)


def test_quick_work_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressReporter(True) as reporter:
        reporter("walking", 1, 10)
    assert terminal.getvalue() == ""


def test_long_work_shows_its_phase_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
    with ProgressReporter(True) as reporter:
        reporter("reading [bold]\x1b[2J", 1, 10)
        reporter("walking", 5, None)
        reporter("walking", 6, None)
        reporter.close()
        reporter("late", 1, 1)
    assert "late" not in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()
