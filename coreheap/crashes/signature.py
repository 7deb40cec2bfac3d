"""What makes two crashes one kind: parts that do not change with addresses, runs, or thread ids, and their hash.

Knows: which frames every abort and every uncaught C++ exception have in common, and what a recursion without end is. Does not know:
how frames, faults and damage were found.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from coreheap.crash import AbortMessage, FaultKind, Frame, FrameSource, PlaceNote
from coreheap.crashes.abort_message import plain_message
from coreheap.crashes.backtrace import is_malloc_function
from coreheap.damage import Damage

FRAME_COUNT = 5
"""Frames that count: deeper ones tell what the program was about, not where it went wrong."""
RECURSIONS = 3
"""So often a function must be on the stack to be part of a recursion without end."""
CYCLE_COUNT = 16
"""Functions of a recursion that count."""
DIGITS = 16

_ABORT_NAMES = (
    "raise gsignal abort pthread_kill tgkill __kernel_vsyscall __assert_fail __assert_fail_base __assert_perror_fail __assert"
    " __stack_chk_fail __stack_chk_fail_local __fortify_fail __fortify_fail_abort __chk_fail __libc_message __libc_fatal"
    " __libc_assert_fail __libc_message_impl __libc_message_wrapper __restore_rt __sigreturn kill"
    " __pthread_kill __pthread_kill_implementation __pthread_kill_internal"
)
_ABORTING = frozenset(_ABORT_NAMES.split())
_LIBC_FILES = ("libc.so", "libc-2", "libpthread", "libc_malloc_debug")
_CXX_FILES = ("libstdc++.so", "libgcc_s.so", "libc++.so", "libc++abi.so", "libunwind.so")
"""Run-time libraries of C++: between an abort and the program they only say that an exception was not caught."""
_CXX_LIST = (
    "_ZSt9terminatev _ZSt10unexpectedv _ZN10__cxxabiv111__terminateEPFvvE _ZN10__cxxabiv112__unexpectedEPFvvE"
    " _ZN9__gnu_cxx27__verbose_terminate_handlerEv __cxa_throw __cxa_rethrow __cxa_bad_cast __cxa_bad_typeid"
    " __cxa_throw_bad_array_new_length __cxa_call_terminate __cxa_call_unexpected __cxa_pure_virtual __cxa_deleted_virtual"
    " __gxx_personality_v0 _Unwind_RaiseException _Unwind_RaiseException_Phase2 _Unwind_Resume _Unwind_Resume_or_Rethrow"
    " _Unwind_ForcedUnwind _Znwm _Znam _Znwj _Znaj _ZnwmSt11align_val_t _ZnamSt11align_val_t"
)
_CXX_NAMES = frozenset(_CXX_LIST.split())
_CXX_THROWER = re.compile(r"_ZSt[0-9]+__throw_")
_UNCAUGHT = frozenset(
    ("_ZSt9terminatev", "_ZN10__cxxabiv111__terminateEPFvvE", "__gxx_personality_v0", "__cxa_throw", "__cxa_rethrow")
)
"""What is below a program's own handler for std::terminate; the second has no name where libstdc++ is a shared library."""
_NUMBERS = re.compile(r"0x[0-9a-fA-F]+|\b[0-9]{5,}\b")
"""In messages of programs: addresses, process ids."""


def signature_parts(
    signal_name: str | None,
    fault: PlaceNote | None,
    message: AbortMessage | None,
    damages: Iterable[Damage],
    frames: Sequence[Frame],
    build_ids: Mapping[str, str],
    handled_name: str | None = None,
    program: str | None = None,
) -> tuple[str, ...]:
    """What a crash is known by, in order: signal, the one that was being handled, kind of fault, message, kinds of damage, frames.

    ``program`` counts where no frame names a module: else crashes of all programs there would be one.
    """
    parts = [f"signal {signal_name or 'none'}"]
    if handled_name is not None:
        parts.append(f"handled {handled_name}")
    if fault is not None:
        parts.append(f"fault {fault.kind.value}")
    if message is not None:
        parts.append(f"message {_NUMBERS.sub('#', plain_message(message.text))}")
    parts += [f"damage {kind}" for kind in sorted({f"{damage.kind.value} {damage.place.value}" for damage in damages})]
    names = cycle_of(frames, build_ids) if fault is not None and fault.kind is FaultKind.STACK_GUARD else ()
    telling = telling_frames(frames)
    names = names or tuple(_frame(frame, build_ids) for frame in telling)
    parts += [f"frame {name}" for name in names]
    if program and all(frame.module is None for frame in telling):
        parts.append(f"program {program}")
    return tuple(parts)


def signature_of(parts: Iterable[str]) -> str:
    """16 hexadecimal digits of the parts' SHA-256."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]


def telling_frames(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """The first frames that say where it went wrong.

    Of what every abort has on top (raise, abort, the message's writer, malloc's own functions, what C++ does with an exception that
    nobody catches) only the function is kept that the program called. Frames that only look like callers are left out: what is left
    over on a stack differs from run to run.
    """
    known = _followed(frames)
    count = _leading(known, 0, is_abort=False)
    is_abort = any(frame.symbol is not None and _is_of_abort(frame.symbol) for frame in known[:count])
    if is_abort:
        count = _leading(known, count, is_abort=True)
        # A program's own handler for std::terminate comes between: what was thrown is behind it.
        ended = next((row for row, frame in enumerate(known) if frame.symbol in _UNCAUGHT), None)
        if ended is not None:
            count = max(count, _leading(known, ended, is_abort=True))
        known = known[count - 1 :]
    return tuple(known[:FRAME_COUNT])


def cycle_of(frames: Sequence[Frame], build_ids: Mapping[str, str]) -> tuple[str, ...]:
    """The functions of a recursion that used up the stack, in no order of theirs; empty where nothing recurs.

    Which of them met the stack's end, and what it had called just then, differs from run to run as the stack's place does.
    """
    counts = Counter(_frame(frame, build_ids) for frame in _followed(frames))
    return tuple(sorted(name for name, count in counts.items() if count >= RECURSIONS)[:CYCLE_COUNT])


def _followed(frames: Sequence[Frame]) -> list[Frame]:
    """The frames up to the first one that only looks like a caller."""
    return list(takewhile(lambda frame: frame.source is not FrameSource.STACK_SCAN, frames))


def _leading(frames: Sequence[Frame], start: int, *, is_abort: bool) -> int:
    """The first frame from ``start`` on that is the program's own: behind an abort C++'s run-time library is not."""
    for row in range(start, len(frames)):
        if not (_is_of_libc(frames[row]) or (is_abort and _is_of_cxx(frames[row]))):
            return row
    return len(frames)


def _is_of_libc(frame: Frame) -> bool:
    """Whether a frame is libc's or the vDSO's, by its module, in static programs by its function."""
    if frame.module is not None and (frame.module == "[vdso]" or frame.module.startswith(_LIBC_FILES)):
        return True
    return frame.symbol is not None and _is_of_abort(frame.symbol)


def _is_of_cxx(frame: Frame) -> bool:
    """Whether a frame is of the run-time library of C++, by its module, in static programs by its function."""
    if frame.module is not None and frame.module.startswith(_CXX_FILES):
        return True
    name = (frame.symbol or "").partition(".")[0]
    return name in _CXX_NAMES or _CXX_THROWER.match(name) is not None


def _is_of_abort(symbol: str) -> bool:
    """Whether a function is on every abort's stack; compilers split functions (``abort.cold``)."""
    return symbol.partition(".")[0] in _ABORTING or is_malloc_function(symbol)


def _frame(frame: Frame, build_ids: Mapping[str, str]) -> str:
    """Module and function; without a function, the build and the place in it."""
    if frame.module is None or frame.module_offset is None:
        return "outside of modules"
    if frame.symbol is not None:
        return f"{frame.module} {frame.symbol}"
    return f"{build_ids.get(frame.module) or frame.module}+{frame.module_offset:#x}"
