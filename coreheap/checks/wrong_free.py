"""DOUBLE-FREE, CORRUPTION-INVALID-FREE, USE-AFTER-FREE where malloc's data is sound: a call that glibc refused, an object that was used
after it was freed.

Knows: which finding a wrong call or a stale use is, and what to do next. Does not know: how either is found (``crashes``). Damage of the
heap is another check's (``corruption``), and has the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator

from coreheap.checks.protocol import Case
from coreheap.crash import CrashContext, FaultKind, StaleUse, WrongFree, WrongFreeKind
from coreheap.evidence import Confidence
from coreheap.quantities import format_address
from coreheap.report import Finding, Quantity, Severity, Unit

OF_A_CALL = "call"
"""The quantity ``place`` of a finding about what free or realloc was given: nothing of malloc's is damaged."""
OF_A_USE = "use"
"""... about a freed object that was used."""
_TWICE = (WrongFreeKind.FREED_TWICE, WrongFreeKind.UNKNOWN_BLOCK)


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding of each: a process ends once."""
    crash = case.crash
    if crash is None:
        return ()
    made = []
    if crash.wrong_free is not None:
        made.append(_wrong_free(crash, crash.wrong_free))
    if crash.stale_use is not None:
        made.append(_stale_use(crash.stale_use))
    return tuple(made)


def _wrong_free(crash: CrashContext, wrong: WrongFree) -> Finding:
    place = wrong.place
    chunk = place.chunk if place is not None else None
    is_address = place is not None and place.kind is not FaultKind.NON_CANONICAL
    caller = crash.frames[wrong.caller] if wrong.caller is not None else None
    block = chunk.payload_address if chunk is not None else None
    quantities = (
        Quantity("address", wrong.address if is_address else None, Unit.ADDRESS),
        Quantity("place", OF_A_CALL, Unit.TEXT),
        Quantity("kind", wrong.kind.value, Unit.TEXT),
        Quantity("function", wrong.function, Unit.TEXT),
        Quantity("victim_address", block, Unit.ADDRESS),
        Quantity("victim_usable_bytes", chunk.usable_bytes if chunk is not None else None, Unit.BYTES),
        Quantity("offset_bytes", place.offset if place is not None else None, Unit.BYTES),
        Quantity("what", place.description if place is not None else None, Unit.TEXT),
        Quantity("listed_in", wrong.listed_in.label if wrong.listed_in is not None else None, Unit.TEXT),
        Quantity("thread", wrong.listed_thread, Unit.COUNT),
        Quantity("arena", chunk.arena if chunk is not None else None, Unit.COUNT),
        Quantity("caller", caller.symbol if caller is not None else None, Unit.TEXT),
        Quantity("holder", wrong.holders[0] if wrong.holders else None, Unit.TEXT),
        Quantity("other_candidates", len(wrong.others), Unit.COUNT),
        Quantity("message", wrong.message, Unit.TEXT),
    )
    subject = f"{wrong.function} of an unknown block"
    if block is not None and is_address:
        subject = f"block {format_address(block)}"
    elif wrong.address is not None:
        subject = (
            f"{wrong.function} of {format_address(wrong.address)}" if is_address else f"{wrong.function} of no address"
        )
    return Finding(
        code="DOUBLE-FREE" if wrong.kind in _TWICE else "CORRUPTION-INVALID-FREE",
        severity=Severity.ERROR if wrong.confidence.rank >= Confidence.PLAUSIBLE.rank else Severity.WARNING,
        confidence=wrong.confidence,
        subject=subject,
        quantities=quantities,
        evidence=wrong.evidence,
        next_steps=tuple(
            _next_steps(wrong, block, crash.frames[wrong.caller].symbol if wrong.caller is not None else None)
        ),
        weakened_by=wrong.weakened_by,
    )


def _next_steps(wrong: WrongFree, block: int | None, caller: str | None) -> Iterator[str]:
    if caller is not None:
        yield f"look at the call of {wrong.function} in {caller}: the backtrace names it"
    if block is not None:
        address = format_address(block)
        yield f"coreheap explain CORE {address} names what the block is and who points to it"
    if wrong.kind in _TWICE:
        yield "run the workload with -fsanitize=address or under valgrind: both name the first call of free as well"
    else:
        yield "run the workload with -fsanitize=address or under valgrind: both name where the block was allocated"


def _stale_use(stale: StaleUse) -> Finding:
    chunk = stale.chunk
    address = format_address(chunk.payload_address)
    return Finding(
        code="USE-AFTER-FREE",
        severity=Severity.ERROR if stale.confidence.rank >= Confidence.PLAUSIBLE.rank else Severity.WARNING,
        confidence=stale.confidence,
        subject=f"block {address}",
        quantities=(
            Quantity("address", chunk.payload_address + stale.offset, Unit.ADDRESS),
            Quantity("place", OF_A_USE, Unit.TEXT),
            Quantity("kind", stale.kind.value, Unit.TEXT),
            Quantity("victim_address", chunk.payload_address, Unit.ADDRESS),
            Quantity("victim_usable_bytes", chunk.usable_bytes, Unit.BYTES),
            Quantity("offset_bytes", stale.offset, Unit.BYTES),
            Quantity("state", chunk.state.label, Unit.TEXT),
            Quantity("given_again", str(stale.is_given_again).lower(), Unit.TEXT),
            Quantity("holder", stale.holders[0] if stale.holders else None, Unit.TEXT),
            Quantity("arena", chunk.arena, Unit.COUNT),
        ),
        evidence=stale.evidence,
        next_steps=(
            f"coreheap owners CORE {address} and coreheap explain CORE {address} name who still points to the block",
            "run the workload with -fsanitize=address or under valgrind: both name the free and the use",
        ),
        weakened_by=stale.weakened_by,
    )
