"""Whether a heap is sound, as one answer: from a report's own damages, contradictions and gaps.

Knows: what a damage, a contradiction or missing memory means for the answer, and which findings are about a heap's integrity.
Does not know: how damage is found, nor terminals. "Sound" is said only of a heap that was read to its last byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from coreheap.crash import AbortKind, WrongFree
from coreheap.damage import Damage, DamageKind
from coreheap.evidence import Confidence, Gap
from coreheap.heap import IN_KNOWN_BLOCKS, Arena, HeapSnapshot
from coreheap.quantities import format_bytes, format_count
from coreheap.report import Finding, Report

INTEGRITY_CODES = frozenset(
    {
        "ALLOCATOR-ABORT",
        "ALLOCATOR-LOCKED",
        "DOUBLE-FREE",
        "MISMATCHED-MODULE",
        "OTHER-ALLOCATOR",
        "PARTIAL-CORE",
        "USE-AFTER-FREE",
    }
)
"""Findings that ``check`` gives beside all whose code begins with CORRUPTION: damage, and what limits the look for it."""

ABOUT_A_CALL = ("double free", "invalid pointer")
"""Parts of glibc's messages that are about what free or realloc was given (malloc.c, 2.12-2.44): they refuse it in time."""

PERHAPS_ABOUT_A_CALL = ("free(): invalid", "realloc(): invalid")
"""Of these, what free was given may be wrong, a variable for example, or the heap around a right pointer."""

HARMLESS_GAPS = frozenset({"release_unknown"})
"""Causes of the heap's gaps that keep nothing of it from being looked at."""

FOREIGN_CAUSE = "foreign_sbrk"
"""The cause of an ``UnattributedRange`` that is somebody else's memory: nothing of malloc's is missing there."""


class Soundness(Enum):
    """The answer of ``check``."""

    SOUND = "sound"
    """All that is known of malloc's data was looked at, and nothing contradicts it."""
    DAMAGED = "damaged"
    """Something is damaged, certainly or with strong confidence, or malloc itself found it; who did it may be less sure."""
    WRONG_FREE = "wrong_free"
    """Sound as well, and the process was stopped because free or realloc was given a wrong pointer."""
    UNKNOWN = "unknown"
    """Not all could be looked at, or what looks wrong may have another reason."""


@dataclass(frozen=True, slots=True)
class Integrity:
    """The answer, how sure it is (None for ``unknown``), why, and what it rests on.

    ``reasons``: of ``unknown`` why nothing can be said, of ``sound`` what makes it less sure. ``certain_damages``: places
    that are damaged with certain or strong confidence. ``lists_checked`` counts free lists, empty ones too.
    """

    verdict: Soundness
    confidence: Confidence | None
    reasons: tuple[str, ...]
    chunks_checked: int
    lists_checked: int
    arenas_checked: int
    anomaly_count: int
    certain_damages: int


def is_about_integrity(finding: Finding) -> bool:
    """Whether a finding is about damage of the heap, how the process ended, or what limits knowing it."""
    return finding.code.startswith("CORRUPTION") or finding.code in INTEGRITY_CODES


def sureness(damage: Damage, report: Report) -> Confidence:
    """How sure it is that something is damaged there, which may be surer than what happened and who did it.

    That is what the contradictions say that the damage rests on, if no solid fact spoke against the damage itself.
    """
    if damage.kind is DamageKind.IN_TRANSITION:
        return Confidence.WEAK
    heap = report.heap
    is_known_heap = heap is not None and heap.identity.confidence.rank >= Confidence.STRONG.rank
    levels = [damage.confidence]
    if is_known_heap and damage.confidence.rank >= Confidence.PLAUSIBLE.rank:
        levels += [report.anomalies[index].confidence for index in damage.anomalies if index < len(report.anomalies)]
    return max(levels, key=lambda level: level.rank)


def surest_damage(report: Report) -> Damage | None:
    """The first damage that is more than a suspicion; None where none is."""
    return next((damage for damage in report.damages if sureness(damage, report).rank >= Confidence.STRONG.rank), None)


def integrity_of(report: Report) -> Integrity:
    """The answer for a report."""
    heap = report.heap
    if heap is None:
        reason = "no heap of glibc's malloc could be read from this core"
        return Integrity(Soundness.UNKNOWN, None, (reason,), 0, 0, 0, report.anomaly_count, 0)
    sure = [level for damage in report.damages if (level := sureness(damage, report)).rank >= Confidence.STRONG.rank]
    verdict, confidence, reasons = _verdict(report, heap, sure)
    return Integrity(
        verdict,
        confidence,
        reasons,
        len(heap.chunks),
        len(heap.free_lists),
        len(heap.arenas),
        report.anomaly_count,
        len(sure),
    )


def _verdict(
    report: Report, heap: HeapSnapshot, sure: list[Confidence]
) -> tuple[Soundness, Confidence | None, tuple[str, ...]]:
    if sure:
        return Soundness.DAMAGED, max(sure, key=lambda level: level.rank), ()
    if _malloc_confirms(report):
        # What malloc looked at in the living process was damaged, wherever it was.
        found = () if report.damages else ("where the damage is was not found here",)
        return Soundness.DAMAGED, Confidence.STRONG, (*_suspicions(report), *found)
    wrong = wrong_free_of(report)
    doubts = (*_suspicions(report), *_not_looked_at(report, heap))
    if doubts:
        return Soundness.UNKNOWN, None, doubts
    harmless = tuple(gap.consequence for gap in heap.gaps if _is_harmless(gap))
    if wrong is not None:
        return Soundness.WRONG_FREE, Confidence.STRONG, (*wrong.weakened_by, *harmless)
    # Never certain: a write that left malloc's own data alone is not seen.
    return Soundness.SOUND, Confidence.STRONG, (*_refused(report), *harmless)


def wrong_free_of(report: Report) -> WrongFree | None:
    """The wrong call that stopped the process, where it is more than a suspicion."""
    wrong = report.crash.wrong_free if report.crash is not None else None
    return wrong if wrong is not None and wrong.confidence.rank >= Confidence.STRONG.rank else None


def last_words(report: Report) -> str:
    """malloc's own message, where it surely was what stopped the process; else empty."""
    crash = report.crash
    message = crash.abort_message if crash is not None and crash.signal_name == "SIGABRT" else None
    is_sure = message is not None and message.confidence.rank >= Confidence.STRONG.rank
    return message.text.strip() if message is not None and message.kind is AbortKind.MALLOC and is_sure else ""


def _malloc_confirms(report: Report) -> bool:
    """Whether malloc's last words are about the heap, and not perhaps about a wrong pointer."""
    words = last_words(report)
    if any(damage.message is not None and damage.message in words for damage in report.damages) and words:
        return True
    if wrong_free_of(report) is not None:
        return False
    return bool(words) and not any(part in words for part in (*ABOUT_A_CALL, *PERHAPS_ABOUT_A_CALL))


def _refused(report: Report) -> Iterator[str]:
    """What malloc noticed before it did any harm."""
    words = last_words(report)
    if words:
        yield f"glibc stopped the process ({words}): it was given a wrong pointer, or one that was free, and refused it"


def _suspicions(report: Report) -> Iterator[str]:
    """What looks wrong without being proven damage."""
    moments = sum(damage.kind is DamageKind.IN_TRANSITION for damage in report.damages)
    unsure = len(report.damages) - moments
    if unsure:
        places = "one place looks" if unsure == 1 else f"{format_count(unsure)} places look"
        first = next(damage for damage in report.damages if damage.kind is not DamageKind.IN_TRANSITION)
        word = first.kind.value.replace("_", " ")
        yield f"{places} damaged ({word}, {first.confidence.value}), but another reason could not be ruled out"
    if moments:
        places = "one place looks" if moments == 1 else f"{format_count(moments)} places look"
        yield f"{places} as malloc itself leaves it for a moment, and a thread was inside malloc"
    words = last_words(report)
    is_open = any(part in words for part in PERHAPS_ABOUT_A_CALL) and not any(part in words for part in ABOUT_A_CALL)
    if is_open and wrong_free_of(report) is None:
        yield f"glibc stopped the process ({words}): the pointer it was given was wrong, or damage that was not found here"
    told = len(report.anomalies)
    explained = {index for damage in report.damages for index in damage.anomalies if index < told}
    left = report.anomaly_count - len(explained)
    if left > 0:
        contradictions = "one contradiction" if left == 1 else f"{format_count(left)} contradictions"
        yield f"the heap's own data has {contradictions} that no damage found here explains"


def _not_looked_at(report: Report, heap: HeapSnapshot) -> Iterator[str]:
    """What was not looked at, and so may be damaged."""
    if not heap.arenas:
        yield "no arena could be read"
    if heap.identity.confidence.rank < Confidence.STRONG.rank:
        yield f"what was read as malloc's heap is it with {heap.identity.confidence.value} confidence only"
    cut = [arena.index for arena in heap.arenas if _is_cut(arena)]
    if cut:
        lost = sum(
            part.range.byte_count for arena in heap.arenas for part in arena.unattributed if part.cause != FOREIGN_CAUSE
        )
        which = f"arena {cut[0]}" if len(cut) == 1 else f"{format_count(len(cut))} arenas"
        amount = f"; {format_bytes(lost)} could not be read as chunks" if lost else ""
        yield f"not all of {which} could be looked at{amount}"
    for gap in heap.gaps:
        if not _is_harmless(gap):
            yield gap.consequence
    for defect in report.defects[:3]:
        yield f"a part of the analysis failed, a defect of coreheap: {defect}"


def _is_harmless(gap: Gap) -> bool:
    return gap.cause in HARMLESS_GAPS or gap.cause.startswith(IN_KNOWN_BLOCKS)


def _is_cut(arena: Arena) -> bool:
    is_partial = arena.coverage is None or arena.coverage < 1
    return is_partial or any(part.cause != FOREIGN_CAUSE for part in arena.unattributed)
