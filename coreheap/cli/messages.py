"""Everything that coreheap says on standard error: errors, warnings, log lines. One line is never two.

Knows: how a message is laid out. Does not know: when there is one.
"""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from contextlib import suppress

from coreheap.errors import CoreheapError
from coreheap.render.escaping import printable


def say(line: str) -> None:
    """Write a line to standard error; where that is closed, nobody is listening and that is no error."""
    if sys.stderr is None:
        return
    # ValueError: the stream object is closed; OSError: what it writes to is.
    with suppress(OSError, ValueError):
        print(printable(line), file=sys.stderr, flush=True)


def say_error(error: CoreheapError) -> None:
    """The one place where coreheap's own errors are shown: what, where, expected, found, what to do."""
    where = f"{error.where}: " if error.where else ""
    say(f"coreheap: error: {where}{error.message}")
    for title, text in (("expected", error.expected), ("found", error.found), ("next step", error.next_step)):
        if text:
            say(f"  {title}: {text}")


def say_defect(defect: BaseException, with_traceback: bool) -> None:
    """An exception that nobody meant to happen, on one line unless the traceback is wanted."""
    if with_traceback:
        for line in "".join(traceback.format_exception(defect)).splitlines():
            # Only the indentation is kept as it is; an exception's message may carry text from the core.
            say(line)
    hint = "please report this" if with_traceback else "-v shows the traceback; please report it"
    say(f"coreheap: defect: {type(defect).__name__}: {defect}; {hint}")


def say_warning(text: str) -> None:
    """Something the user should know that does not stop the work."""
    say(f"coreheap: warning: {text}")


class _Handler(logging.Handler):
    """Log records as lines on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        say(f"coreheap: {record.levelname.lower()}: {record.getMessage()}")


def listen(verbosity: int) -> None:
    """Show log records and Python warnings: warnings as a rule, everything with -v, errors alone with -q."""
    level = logging.DEBUG if verbosity > 1 else logging.INFO if verbosity == 1 else logging.WARNING
    logger = logging.getLogger("coreheap")
    logger.handlers[:] = [_Handler()]
    logger.propagate = False
    logger.setLevel(level if verbosity >= 0 else logging.ERROR)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: object = None,
        line: str | None = None,
    ) -> None:
        if verbosity >= 0:
            say_warning(str(message))

    warnings.showwarning = show
