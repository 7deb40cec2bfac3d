"""Ending by a signal: at once, whatever is going on, with one line at most and nothing half-written left behind.

Knows: what has to be taken away before the process ends. Does not know: what the process was doing. KeyboardInterrupt is
not used for it: raised in the middle of an import, a destructor or a callback from C, it is lost or becomes a traceback.
"""

from __future__ import annotations

import os
import signal

# Not imported from typing: signals are not listened to yet.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_unfinished: set[str] = set()
_screen: list[bytes] = []


def end_on_signals() -> None:
    """Let Ctrl-C, SIGTERM and SIGHUP end this process with 128 and their number. Those that are ignored stay so (nohup)."""
    for number in _SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end)


def note_unfinished(path: str) -> None:
    """A file that a signal must not leave behind, from before it is made."""
    _unfinished.add(path)


def forget_unfinished(path: str) -> None:
    """The file has its name, or is gone."""
    _unfinished.discard(path)


def note_screen(restoring: bytes) -> None:
    """What a terminal on standard error has to be sent at the end; b"" for nothing."""
    _screen[:] = [restoring] if restoring else []


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    for path in tuple(_unfinished):
        try:  # noqa: SIM105 - contextlib may be in the middle of its import
            os.unlink(path)
        except OSError:  # not made yet, or renamed already
            pass
    last_words = b"".join(_screen) + (b"coreheap: interrupted\n" if number == signal.SIGINT else b"")
    try:  # noqa: SIM105
        # Not through sys.stderr, which may be in the middle of a write.
        os.write(2, last_words)
    except OSError:  # nobody listens
        pass
    os._exit(128 + number)
