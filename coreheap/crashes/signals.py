"""Names of signals and of their codes (include/uapi/asm-generic/siginfo.h and signal.h; the same on all machines that we read)."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Final

SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS = 4, 5, 6, 7, 8, 11, 31
SI_KERNEL: Final = 0x80
SEGV_ACCERR: Final = 2
BUS_ADRERR: Final = 2

_OF_ANY_SIGNAL: Final[Mapping[int, str]] = {
    0: "SI_USER",
    SI_KERNEL: "SI_KERNEL",
    -1: "SI_QUEUE",
    -2: "SI_TIMER",
    -3: "SI_MESGQ",
    -4: "SI_ASYNCIO",
    -5: "SI_SIGIO",
    -6: "SI_TKILL",
    -7: "SI_DETHREAD",
    -60: "SI_ASYNCNL",
}
_OF_SIGNAL: Final[Mapping[int, tuple[str, ...]]] = {
    SIGILL: (
        "ILL_ILLOPC",
        "ILL_ILLOPN",
        "ILL_ILLADR",
        "ILL_ILLTRP",
        "ILL_PRVOPC",
        "ILL_PRVREG",
        "ILL_COPROC",
        "ILL_BADSTK",
    ),
    SIGTRAP: ("TRAP_BRKPT", "TRAP_TRACE", "TRAP_BRANCH", "TRAP_HWBKPT", "TRAP_UNK", "TRAP_PERF"),
    SIGBUS: ("BUS_ADRALN", "BUS_ADRERR", "BUS_OBJERR", "BUS_MCEERR_AR", "BUS_MCEERR_AO"),
    SIGFPE: (
        "FPE_INTDIV",
        "FPE_INTOVF",
        "FPE_FLTDIV",
        "FPE_FLTOVF",
        "FPE_FLTUND",
        "FPE_FLTRES",
        "FPE_FLTINV",
        "FPE_FLTSUB",
    ),
    SIGSEGV: (
        "SEGV_MAPERR",
        "SEGV_ACCERR",
        "SEGV_BNDERR",
        "SEGV_PKUERR",
        "SEGV_ACCADI",
        "SEGV_ADIDERR",
        "SEGV_ADIPERR",
        "SEGV_MTEAERR",
        "SEGV_MTESERR",
        "SEGV_CPERR",
    ),
    SIGSYS: ("SYS_SECCOMP", "SYS_USER_DISPATCH"),
}
"""Codes of a signal from 1 on."""


def signal_name(number: int | None) -> str | None:
    """SIGSEGV for 11 and so on; None where there is no such signal."""
    if number is None:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def code_name(number: int | None, code: int | None) -> str | None:
    """SEGV_MAPERR for code 1 of SIGSEGV and so on; None where there is no such code."""
    if number is None or code is None:
        return None
    names = _OF_SIGNAL.get(number, ())
    return names[code - 1] if 0 < code <= len(names) else _OF_ANY_SIGNAL.get(code)
