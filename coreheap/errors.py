"""The errors that coreheap raises on purpose.

Knows: what went wrong, where, what was expected, what was found and what to do next.
Does not know: exit codes, colours, or how a message is printed (``cli`` does that at one place).
"""

from __future__ import annotations

import errno
import os

from coreheap.quantities import format_address


class CoreheapError(Exception):
    """Root of every error that coreheap raises on purpose.

    ``where`` names a file or an address, ``next_step`` says what the user can do; each may be empty.
    """

    def __init__(
        self,
        message: str,
        *,
        where: str = "",
        expected: str = "",
        found: str = "",
        next_step: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.expected = expected
        self.found = found
        self.next_step = next_step

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.found:
            parts.append(f"found {self.found}")
        return "; ".join(parts)


class UsageError(CoreheapError):
    """The caller asked for something that does not exist or does not fit together."""


class InputNotUsable(CoreheapError):
    """The input cannot be analysed at all: not a core, of no known kind, or unreadable."""


class UnsupportedCore(InputNotUsable):
    """A well-formed core of a kind that coreheap does not analyse (byte order, machine)."""


class FailedHere(CoreheapError):
    """This machine lacks what the work takes (room, memory, open files, a package); elsewhere the same input may do."""


class OutputNotWritten(CoreheapError):
    """The result could not be written; nothing half-written is left behind."""


class MemoryFault(CoreheapError):
    """Bytes were asked for that the core does not hold. They are unknown, not zero.

    ``address`` is the first byte that is missing, ``cause`` one of ``corefile.memory.Backing``'s names
    in lower case, or ``unmapped``.
    """

    def __init__(self, address: int, cause: str, byte_count: int = 1) -> None:
        super().__init__(
            f"memory at {format_address(address)} is not in the core ({cause})",
            where=format_address(address),
            expected=f"{byte_count} saved bytes",
            found=cause,
        )
        self.address = address
        self.cause = cause


_LACKING: dict[int, tuple[str, str]] = {
    errno.ENOMEM: (
        "memory",
        "raise ulimit -v or the container's limit, try --low-memory or --no-leaks, or a machine with more memory",
    ),
    errno.EMFILE: ("open files", "raise ulimit -n, or close other files of this process"),
    errno.ENFILE: ("open files", "raise fs.file-max, or try again when other programs have ended"),
    errno.ENOSPC: ("room on a disk", "make room, or set TMPDIR to a folder on a larger disk"),
    errno.EDQUOT: ("room in the disk quota", "make room, or set TMPDIR to a folder on another disk"),
    errno.EROFS: ("a folder that can be written to", "set TMPDIR to a folder that you may write to"),
}
"""errno -> what a machine lacks that answers with it, and what helps."""
_LOADER_WORDS = {
    "failed to map segment": errno.ENOMEM,
    "cannot allocate memory": errno.ENOMEM,
    "too many open files": errno.EMFILE,
}
"""Words of ld.so (elf/dl-load.c), which Python hands on as ImportError without a number, in lower case."""
_DEEPEST_CAUSE = 8


def failure_here(error: BaseException, where: str = "") -> FailedHere | None:
    """The failure of this machine that an exception, or what led to it, tells of; None where it is none."""
    cause: BaseException | None = error
    for _ in range(_DEEPEST_CAUSE):
        if cause is None:
            return None
        number = _errno_of(cause)
        if number in _LACKING:
            lacking, next_step = _LACKING[number]
            return FailedHere(
                f"this machine lacks {lacking}",
                where=where,
                expected="an analysis within this machine's limits",
                found=os.strerror(number).lower(),
                next_step=next_step,
            )
        cause = cause.__cause__ or cause.__context__
    return None


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, ImportError):
        said = str(error).lower()
        return next((number for words, number in _LOADER_WORDS.items() if words in said), None)
    return None
