"""What makes two crashes one kind: parts that do not change with addresses, runs, or thread ids, and their hash.

Knows: which frames every abort has in common. Does not know: how frames, faults and damage were found.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from coreheap.crash import AbortMessage, Frame, FrameSource, PlaceNote
from coreheap.crashes.abort_message import plain_message
from coreheap.crashes.backtrace import is_malloc_function
from coreheap.damage import Damage

FRAME_COUNT = 5
"""Frames that count: deeper ones tell what the program was about, not where it went wrong."""
DIGITS = 16

_ABORT_NAMES = (
    "raise gsignal abort pthread_kill tgkill __kernel_vsyscall __assert_fail __assert_fail_base __assert_perror_fail __assert"
    " __stack_chk_fail __stack_chk_fail_local __fortify_fail __fortify_fail_abort __chk_fail __libc_message __libc_fatal"
    " __libc_assert_fail __libc_message_impl __libc_message_wrapper __restore_rt __sigreturn kill"
    " __pthread_kill __pthread_kill_implementation __pthread_kill_internal"
)
_ABORTING = frozenset(_ABORT_NAMES.split())
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
) -> tuple[str, ...]:
    """What a crash is known by, in order: signal, the one that was being handled, kind of fault, message, kinds of damage, frames."""
    parts = [f"signal {signal_name or 'none'}"]
    if handled_name is not None:
        parts.append(f"handled {handled_name}")
    if fault is not None:
        parts.append(f"fault {fault.kind.value}")
    if message is not None:
        parts.append(f"message {_NUMBERS.sub('#', plain_message(message.text))}")
    parts += [f"damage {kind}" for kind in sorted({f"{damage.kind.value} {damage.place.value}" for damage in damages})]
    parts += [f"frame {_frame(frame, build_ids)}" for frame in telling_frames(frames)]
    return tuple(parts)


def signature_of(parts: Iterable[str]) -> str:
    """16 hexadecimal digits of the parts' SHA-256."""
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]


def telling_frames(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """The first frames that say where it went wrong.

    Of what every abort has on top (raise, abort, the message's writer, malloc's own functions) only the function is kept that
    the program called. Frames that only look like callers are left out: what is left over on a stack differs from run to run.
    """
    known: list[Frame] = []
    for frame in frames:
        if frame.source is FrameSource.STACK_SCAN:
            break
        known.append(frame)
    count = 0
    while count < len(known) and _is_of_libc(known[count]):
        count += 1
    inner = known[:count]
    if any(frame.symbol is not None and _is_of_abort(frame.symbol) for frame in inner):
        known = known[count - 1 :]
    return tuple(known[:FRAME_COUNT])


def _is_of_libc(frame: Frame) -> bool:
    """Whether a frame is libc's or the vDSO's, by its module, in static programs by its function."""
    if frame.module is not None and (
        frame.module == "[vdso]" or frame.module.startswith(("libc.so", "libc-2", "libpthread", "libc_malloc_debug"))
    ):
        return True
    return frame.symbol is not None and _is_of_abort(frame.symbol)


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
