"""ALLOCATOR-ABORT: glibc itself stopped the process and left its message in memory."""

from __future__ import annotations

from collections.abc import Iterable

from coreheap.checks.protocol import Case
from coreheap.crash import AbortKind, AbortMessage, FaultKind, WrongFree
from coreheap.crashes.abort_message import MALLOC_MESSAGE, plain_message
from coreheap.damage import Damage
from coreheap.evidence import Confidence, Evidence, Strength, confidence_from
from coreheap.report import Finding, Quantity, Severity, Unit

_NEXT_STEPS = {
    AbortKind.MALLOC: (
        "the damage happened before the abort: run the workload under valgrind or with"
        " -fsanitize=address to catch the write itself",
        "look at the chunk before the damaged one: its owner is the usual culprit",
    ),
    AbortKind.STACK_SMASHING: (
        "a function wrote past a local array: the frame behind __stack_chk_fail in the backtrace is that function",
    ),
    AbortKind.FORTIFY: (
        "a libc function was told to write more than its destination holds: its caller is in the backtrace, behind __chk_fail",
    ),
}


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding when an abort message of glibc is in the core."""
    message = case.crash.abort_message if case.crash is not None else None
    if message is None:
        return ()
    from_malloc = MALLOC_MESSAGE.search(message.text) is not None
    locked = tuple(arena.index for arena in (case.heap.arenas if case.heap else ()) if arena.locked)
    evidence = Evidence(
        "__abort_msg points to a message"
        if message.confidence is Confidence.CERTAIN
        else "a pointer in writable module data leads to a mapping shaped like an abort message",
        message.found_by,
        Strength.PROOF if message.confidence is Confidence.CERTAIN else Strength.SOLID,
        message.address,
    )
    explained = explaining_damage(message, case.damages)
    return (
        Finding(
            code="ALLOCATOR-ABORT",
            severity=Severity.ERROR if from_malloc else Severity.WARNING,
            confidence=confidence_from([evidence]),
            subject="malloc" if from_malloc else "glibc",
            quantities=(
                Quantity("message", message.text, Unit.TEXT),
                Quantity("from_malloc", str(from_malloc).lower(), Unit.TEXT),
                Quantity("message_address", message.address, Unit.ADDRESS),
                Quantity("locked_arenas", len(locked), Unit.COUNT),
                *_of_pointer(message),
                *_of_damage(explained),
                *_of_wrong_free(case.crash.wrong_free if case.crash is not None else None),
            ),
            evidence=(evidence,),
            next_steps=_next_steps(message, case.crash.wrong_free if case.crash is not None else None),
            weakened_by=("an earlier message stays in memory when the process survived it (a handler for SIGABRT)",),
        ),
    )


def _next_steps(message: AbortMessage, wrong: WrongFree | None) -> tuple[str, ...]:
    """What helps; where the pointer that glibc refused is known, the finding about it says that."""
    if wrong is not None and wrong.confidence.rank >= Confidence.STRONG.rank:
        return ()
    otherwise = ("read the message: it is from assert, fortify or the stack protector",)
    return _NEXT_STEPS.get(message.kind, otherwise)


def explaining_damage(message: AbortMessage, damages: Iterable[Damage]) -> Damage | None:
    """The damage that malloc met when it wrote its message: at the pointer that it names, else the first for which this release
    has that message; None where none fits."""
    if message.kind is not AbortKind.MALLOC:
        return None
    known = tuple(damages)
    for damage in known:
        victim = damage.victim
        # free and realloc name the pointer that the program gave; malloc the chunk that it was about to use.
        if victim is not None and message.pointer in (victim.payload_address, victim.header_address):
            return damage
    said = plain_message(message.text)
    return next((damage for damage in known if said in damage.messages), None)


def _of_pointer(message: AbortMessage) -> tuple[Quantity, ...]:
    return () if message.pointer is None else (Quantity("pointer", message.pointer, Unit.ADDRESS),)


def _of_wrong_free(wrong: WrongFree | None) -> tuple[Quantity, ...]:
    if wrong is None or wrong.place is None or wrong.place.kind is FaultKind.NON_CANONICAL:
        return ()
    return (Quantity("refused_address", wrong.address, Unit.ADDRESS),)


def _of_damage(damage: Damage | None) -> tuple[Quantity, ...]:
    if damage is None:
        return ()
    return (
        Quantity("damage", damage.kind.value, Unit.TEXT),
        Quantity("damage_address", damage.bytes.start, Unit.ADDRESS),
    )
