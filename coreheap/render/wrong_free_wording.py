"""The words for a wrong call of free and for the use of a freed object, as the crash has them.

Knows: one phrase for each kind. Does not know: terminals, nor findings (``wording``). Text out of the core is made printable here.
"""

from __future__ import annotations

from coreheap.crash import FaultKind, StaleUse, StaleUseKind, WrongFree, WrongFreeKind
from coreheap.heap import ChunkState
from coreheap.quantities import format_address, format_bytes, format_count
from coreheap.render.damage_wording import chunk_text
from coreheap.render.discretion import discreet_address, without_content
from coreheap.render.escaping import shortened
from coreheap.render.wording import LONGEST_TEXT

_USED = {
    StaleUseKind.VIRTUAL_TABLE: "the address of its table of virtual functions",
    StaleUseKind.FUNCTION_POINTER: "a function pointer",
    StaleUseKind.POINTER: "a pointer",
}
HOLDERS_NAMED = 3


def wrong_free_sentence(wrong: WrongFree) -> str:
    """What was wrong with the call, in one sentence."""
    return f"{_stopped(wrong)}: {wrong_free_text(wrong)}."


def _stopped(wrong: WrongFree) -> str:
    return "glibc stopped the process" if wrong.message is not None else "The process failed"


def wrong_free_text(wrong: WrongFree) -> str:
    """What was wrong with the call, who points to the block, and what else it may have been."""
    parts = [f"{wrong.function} was given {_given(wrong)} ({wrong.confidence.value})"]
    if wrong.holders:
        parts.append(f"held by {', '.join(shortened(name, LONGEST_TEXT) for name in wrong.holders[:HOLDERS_NAMED])}")
    if wrong.others and wrong.kind is not WrongFreeKind.UNKNOWN_BLOCK:
        count = len(wrong.others)
        parts.append(f"or it was {'one other address' if count == 1 else f'one of {format_count(count)} others'}")
    return ", ".join(parts)


def _given(wrong: WrongFree) -> str:
    if wrong.address is None or wrong.place is None:
        return f"a block that is free already{_listed(wrong)}; which one is not known"
    chunk, offset = wrong.place.chunk, wrong.place.offset or 0
    address = discreet_address(wrong.address)
    pointer = "a number that is no address" if address is None else format_address(address)
    if wrong.kind is WrongFreeKind.NOT_MAPPED or chunk is None:
        if wrong.place.kind is FaultKind.NON_CANONICAL:
            return pointer
        return f"{pointer}, which is no block: {shortened(without_content(wrong.place.description), LONGEST_TEXT)}"
    size = f"{format_bytes(chunk.usable_bytes)}"
    if wrong.kind is WrongFreeKind.FREED_TWICE:
        block = f"block {pointer}" if offset == 0 else f"{pointer}, now a part of other free memory"
        size = f", {size}" if offset == 0 and chunk.state is not ChunkState.TOP else ""
        return f"{block}{size}, which is free already{_listed(wrong)}"
    return f"{pointer}, {format_bytes(offset)} into {chunk_text(chunk)}"


def _listed(wrong: WrongFree) -> str:
    """Where the block is as a free one."""
    if wrong.listed_in is None:
        return ""
    if wrong.listed_in is ChunkState.TCACHE and wrong.listed_thread is not None:
        return f" (in the tcache of thread {wrong.listed_thread})"
    return f" ({_LISTS.get(wrong.listed_in, wrong.listed_in.label)})"


_LISTS = {
    ChunkState.TCACHE: "in a tcache",
    ChunkState.FASTBIN: "in a fastbin",
    ChunkState.UNSORTED_BIN: "in the unsorted bin",
    ChunkState.SMALL_BIN: "in a small bin",
    ChunkState.LARGE_BIN: "in a large bin",
    ChunkState.TOP: "a part of top, the arena's free end",
    ChunkState.FREE_UNLISTED: "on no list",
}


def stale_use_text(stale: StaleUse) -> str:
    """Which word of which block was used."""
    where = f"{format_bytes(stale.offset)} into" if stale.offset else "the first word of"
    state = "which holds something else by now" if stale.is_given_again else "which is free"
    holders = ", ".join(shortened(name, LONGEST_TEXT) for name in stale.holders[:HOLDERS_NAMED])
    held = (
        f"; {holders} still leads to it"
        if len(stale.holders) == 1
        else f"; still led to by {holders}"
        if holders
        else ""
    )
    return (
        f"{_USED[stale.kind]} was read from {where} {chunk_text(stale.chunk)}, {state} ({stale.confidence.value}){held}"
    )
