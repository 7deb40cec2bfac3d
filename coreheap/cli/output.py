"""Where the document goes: standard output, or a file that appears whole or not at all.

Knows: pipes that are closed early, disks that are full, files that are replaced. Does not know: what is written.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO, Protocol

from coreheap.cli import signals
from coreheap.errors import OutputNotWritten, UsageError


class Output(Protocol):
    """Takes the document, piece by piece."""

    encoding: str
    is_terminal: bool

    def write(self, data: bytes | bytearray) -> None:
        """Append to the document. Raises OutputNotWritten."""


class _ReaderGone(Exception):
    """Whoever read standard output has seen enough (``| head``); the rest need not be made."""


class _Standard:
    def __init__(self) -> None:
        if sys.stdout is None:
            raise OutputNotWritten("standard output is closed", next_step="name a file with -o")
        self._file: BinaryIO = sys.stdout.buffer
        self.encoding = sys.stdout.encoding or "utf-8"
        self.is_terminal = sys.stdout.isatty()

    def write(self, data: bytes | bytearray) -> None:
        with self._failures_named():
            self._file.write(data)

    def finish(self) -> None:
        with self._failures_named():
            self._file.flush()

    def give_up(self) -> None:
        """The document will not be whole: what is buffered is still shown, where it can be."""
        with suppress(_ReaderGone, OutputNotWritten):
            self.finish()

    @contextmanager
    def _failures_named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._write_nowhere()
            raise _ReaderGone from None
        except OSError as error:
            self._write_nowhere()
            raise OutputNotWritten(
                f"the result could not be written: {error.strerror}", where="standard output"
            ) from None

    def _write_nowhere(self) -> None:
        """Let the interpreter's own flush at exit succeed: what is buffered goes to /dev/null."""
        # Without a descriptor to redirect (a closed or replaced stream) there is nothing to flush either.
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._file.fileno())
            finally:
                os.close(nowhere)


class _File:
    """A descriptor written to without a buffer: what could not be written is known at once, not when the file is closed."""

    encoding = "utf-8"
    is_terminal = False

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path

    def write(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        try:
            # A disk that becomes full, a pipe or a signal may end a write early.
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            raise _not_written(self._path, error) from None


def check_output(path: str | None, input_path: str) -> None:
    """Find out before the long work whether the result will have a place. None is standard output.

    Raises UsageError where the name cannot be written to, or is the input's.
    """
    if path is None:
        return
    target = os.path.realpath(path)
    # One of the two does not exist: so they are not the same, and opening them tells who is missing.
    with suppress(OSError):
        if os.path.samefile(target, input_path):
            raise UsageError(
                "the result would replace the core file", where=path, next_step="name another file with -o"
            )
    if os.path.isdir(target):
        raise UsageError("is a directory", where=path, expected="a file", next_step="name a file with -o")
    folder = os.path.dirname(target)
    if not os.path.isdir(folder):
        raise UsageError("there is no such folder", where=folder, next_step="make the folder first")
    if not _is_special(target) and not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("you may not write to this folder", where=folder, next_step="name another one with -o")


@contextmanager
def opened_output(path: str | None) -> Iterator[Output]:
    """The output to write to; ``path`` None is standard output.

    A file gets its name only when everything is in it. A reader that goes away early ends the block quietly.
    Raises OutputNotWritten.
    """
    if path is None:
        standard = _Standard()
        # Who reads no further (head, a pager that was quit) has what was wanted.
        with suppress(_ReaderGone):
            try:
                yield standard
            except BaseException:
                standard.give_up()
                raise
            standard.finish()
        return
    target = os.path.realpath(path)
    with (_written_in_place if _is_special(target) else _replaced)(target, path) as file:
        yield file


def _is_special(target: str) -> bool:
    """Whether the name is a device or a named pipe, which is written to, not replaced."""
    return os.path.exists(target) and not os.path.isfile(target)


@contextmanager
def _written_in_place(target: str, path: str) -> Iterator[_File]:
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise _not_written(path, error) from None
    with _closed_at_end(descriptor, path):
        yield _File(descriptor, path)


@contextmanager
def _replaced(target: str, path: str) -> Iterator[_File]:
    """A new file beside ``target`` that takes its name at the end, and is removed if the block fails."""
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name[:64]}.{os.urandom(8).hex()}.part")
    signals.note_unfinished(temporary)
    try:
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _not_written(path, error) from None
        try:
            with _closed_at_end(descriptor, path):
                # Only a file that is replaced has a mode to keep.
                with suppress(FileNotFoundError):
                    os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode))
                yield _File(descriptor, path)
                try:
                    os.fsync(descriptor)
                except OSError as error:
                    raise _not_written(path, error) from None
            try:
                os.replace(temporary, target)
            except OSError as error:
                raise _not_written(path, error) from None
        except BaseException:
            # The error that is on its way says more than that the temporary file stayed.
            with suppress(OSError):
                os.unlink(temporary)
            raise
    finally:
        signals.forget_unfinished(temporary)


@contextmanager
def _closed_at_end(descriptor: int, path: str) -> Iterator[None]:
    """Some file systems say only at close that there was no room (NFS, quotas): an error like any other of writing."""
    try:
        yield
    except BaseException:
        # The error that is on its way comes first.
        with suppress(OSError):
            os.close(descriptor)
        raise
    try:
        os.close(descriptor)
    except OSError as error:
        raise _not_written(path, error) from None


def _not_written(path: str, error: OSError) -> OutputNotWritten:
    return OutputNotWritten(
        f"the result could not be written: {error.strerror}",
        where=path,
        next_step="name a file in a folder with room that you may write to",
    )
