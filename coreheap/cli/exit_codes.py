"""What the process says to its caller when it ends."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes that pipelines hold on to; they never change their meaning."""

    DONE = 0
    FINDINGS = 1
    """Findings at or above ``--fail-on``."""
    USAGE = 2
    """A command line that makes no sense, or an output that cannot be written."""
    INPUT_NOT_USABLE = 3
    PARTIAL = 4
    """A partial result, under ``--strict``."""
    DEFECT = 70
    """A defect of coreheap itself."""
    FAILED_HERE = 75
    """This machine lacks room, memory or files; elsewhere the same input may do (EX_TEMPFAIL of sysexits.h)."""
    INTERRUPTED = 130
    """Ended by Ctrl-C, as shells count it."""
