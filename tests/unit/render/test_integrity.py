"""Whether a heap is called sound, damaged or unknown: never sound without having looked, never damaged on a suspicion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coreheap.crash import AbortKind, AbortMessage
from coreheap.damage import DamageKind
from coreheap.evidence import Anomaly, Confidence, Gap
from coreheap.heap import Arena, UnattributedRange
from coreheap.quantities import AddressRange
from coreheap.render.integrity import Soundness, integrity_of, is_about_integrity
from coreheap.report import Report
from tests.unit import report_samples

SOUND = report_samples.sound_report()
ANOMALY = Anomaly("broken_chunk", 0x1000, "a size", "none", 0)


def with_arena(**changes: Any) -> Report:
    assert SOUND.heap is not None
    (arena,) = SOUND.heap.arenas
    changed: Arena = replace(arena, **changes)
    return replace(SOUND, heap=replace(SOUND.heap, arenas=(changed,)))


def test_a_heap_that_was_read_whole_and_has_nothing_against_it_is_sound() -> None:
    integrity = integrity_of(SOUND)
    assert (integrity.verdict, integrity.confidence, integrity.reasons) == (Soundness.SOUND, Confidence.STRONG, ())
    assert (integrity.arenas_checked, integrity.lists_checked) == (1, 4)


@pytest.mark.parametrize("confidence", [Confidence.CERTAIN, Confidence.STRONG])
def test_sure_damage_is_damage_and_as_sure_as_the_surest(confidence: Confidence) -> None:
    weak = report_samples.overflow(confidence=Confidence.WEAK)
    integrity = integrity_of(replace(SOUND, damages=(weak, report_samples.overflow(confidence=confidence))))
    assert (integrity.verdict, integrity.confidence, integrity.certain_damages) == (Soundness.DAMAGED, confidence, 1)


@pytest.mark.parametrize("confidence", [Confidence.PLAUSIBLE, Confidence.WEAK])
def test_a_suspicion_is_neither_damage_nor_soundness(confidence: Confidence) -> None:
    integrity = integrity_of(replace(SOUND, damages=(report_samples.overflow(confidence=confidence),)))
    assert (integrity.verdict, integrity.confidence) == (Soundness.UNKNOWN, None)
    assert "another reason could not be ruled out" in integrity.reasons[0]


@pytest.mark.parametrize(
    ("of_damage", "of_anomaly", "verdict", "confidence"),
    [
        (Confidence.PLAUSIBLE, Confidence.CERTAIN, Soundness.DAMAGED, Confidence.CERTAIN),
        (Confidence.PLAUSIBLE, Confidence.STRONG, Soundness.DAMAGED, Confidence.STRONG),
        (Confidence.PLAUSIBLE, Confidence.PLAUSIBLE, Soundness.UNKNOWN, None),
        (Confidence.WEAK, Confidence.CERTAIN, Soundness.UNKNOWN, None),
    ],
)
def test_that_something_is_damaged_may_be_surer_than_who_did_it(
    of_damage: Confidence, of_anomaly: Confidence, verdict: Soundness, confidence: Confidence | None
) -> None:
    damage = report_samples.overflow(confidence=of_damage, anomalies=(0,))
    report = replace(SOUND, damages=(damage,), anomalies=(replace(ANOMALY, confidence=of_anomaly),), anomaly_count=1)
    assert (integrity_of(report).verdict, integrity_of(report).confidence) == (verdict, confidence)
    assert report.heap is not None
    unsure = replace(report.heap, identity=replace(report.heap.identity, confidence=Confidence.WEAK))
    assert integrity_of(replace(report, heap=unsure)).verdict is Soundness.UNKNOWN


def test_what_malloc_leaves_for_a_moment_is_no_damage_however_sure() -> None:
    moment = report_samples.overflow(kind=DamageKind.IN_TRANSITION, confidence=Confidence.CERTAIN)
    integrity = integrity_of(replace(SOUND, damages=(moment,)))
    assert integrity.verdict is Soundness.UNKNOWN
    assert "for a moment" in integrity.reasons[0]


def test_contradictions_that_nothing_explains_leave_it_open() -> None:
    assert integrity_of(replace(SOUND, anomalies=(ANOMALY,), anomaly_count=1)).verdict is Soundness.UNKNOWN


@pytest.mark.parametrize(
    "changes",
    [
        {"coverage": None},
        {"coverage": 0.5},
        {"unattributed": (UnattributedRange(AddressRange(0x1000, 0x2000), "not_saved"),)},
    ],
)
def test_a_heap_that_was_not_read_whole_is_not_called_sound(changes: dict[str, Any]) -> None:
    integrity = integrity_of(with_arena(**changes))
    assert integrity.verdict is Soundness.UNKNOWN
    assert "arena 0" in integrity.reasons[0]


def test_memory_of_other_callers_of_sbrk_takes_nothing_from_it() -> None:
    foreign = UnattributedRange(AddressRange(0x1000, 0x2000), "foreign_sbrk")
    assert integrity_of(with_arena(unattributed=(foreign,))).verdict is Soundness.SOUND


def test_a_heap_that_may_be_none_is_not_called_sound() -> None:
    assert SOUND.heap is not None
    unsure = replace(SOUND.heap, identity=replace(SOUND.heap.identity, confidence=Confidence.PLAUSIBLE))
    assert integrity_of(replace(SOUND, heap=unsure)).verdict is Soundness.UNKNOWN
    assert integrity_of(report_samples.heapless_report()).verdict is Soundness.UNKNOWN
    assert integrity_of(replace(SOUND, defects=("a check failed",))).verdict is Soundness.UNKNOWN


@pytest.mark.parametrize(
    ("cause", "verdict", "confidence"),
    [("release_unknown", Soundness.SOUND, Confidence.STRONG), ("top_not_saved", Soundness.UNKNOWN, None)],
)
def test_a_gap_of_the_heap_leaves_it_open_unless_it_hides_nothing(
    cause: str, verdict: Soundness, confidence: Confidence | None
) -> None:
    assert SOUND.heap is not None
    sure = replace(SOUND.heap.identity, confidence=Confidence.CERTAIN)
    cut = replace(SOUND.heap, identity=sure, gaps=(Gap(cause, "something is not known"),))
    integrity = integrity_of(replace(SOUND, heap=cut))
    assert (integrity.verdict, integrity.confidence) == (verdict, confidence)
    assert integrity.reasons == ("something is not known",)


def test_soundness_is_never_certain() -> None:
    """A write that left malloc's own data alone is seen by nothing."""
    assert SOUND.heap is not None
    certain = replace(SOUND.heap, identity=replace(SOUND.heap.identity, confidence=Confidence.CERTAIN))
    assert integrity_of(replace(SOUND, heap=certain)).confidence is Confidence.STRONG


def test_findings_about_memory_are_not_those_of_check() -> None:
    codes = ("CORRUPTION-OVERFLOW", "CORRUPTION-NEW", "DOUBLE-FREE", "ALLOCATOR-ABORT", "ARENA-BLOAT", "LEAK")
    found = [is_about_integrity(report_samples.finding(code)) for code in codes]
    assert found == [True, True, True, True, False, False]


@pytest.mark.parametrize(
    ("words", "verdict", "reason"),
    [
        ("free(): double free detected in tcache 2", Soundness.SOUND, "refused it"),
        ("*** Error in `x': munmap_chunk(): invalid pointer: 0x1 ***", Soundness.SOUND, "refused it"),
        ("free(): invalid next size (normal)", Soundness.UNKNOWN, "the pointer it was given was wrong, or damage"),
        ("realloc(): invalid old size", Soundness.UNKNOWN, "the pointer it was given was wrong, or damage"),
        ("malloc(): corrupted top size", Soundness.DAMAGED, "not found here"),
        ("corrupted double-linked list", Soundness.DAMAGED, "not found here"),
    ],
)
def test_what_malloc_said_last_is_held_against_what_was_found(words: str, verdict: Soundness, reason: str) -> None:
    """A refused pointer leaves the heap as it was; some messages are about the heap, found here or not; some are about either."""
    crash = report_samples.crash()
    assert crash.abort_message is not None
    message = replace(crash.abort_message, text=words)
    integrity = integrity_of(replace(SOUND, crash=replace(crash, abort_message=message)))
    assert integrity.verdict is verdict
    assert integrity.confidence is (None if verdict is Soundness.UNKNOWN else Confidence.STRONG)
    assert reason in integrity.reasons[0]
    others = (
        replace(crash, abort_message=replace(message, kind=AbortKind.FORTIFY)),
        replace(crash, abort_message=replace(message, confidence=Confidence.PLAUSIBLE)),
        replace(crash, abort_message=message, signal=11, signal_name="SIGSEGV"),
    )
    for other in others:
        assert integrity_of(replace(SOUND, crash=other)).verdict is Soundness.SOUND
        assert integrity_of(replace(SOUND, crash=other)).reasons == ()


def test_a_suspicion_that_malloc_itself_confirms_is_damage() -> None:
    suspected = report_samples.overflow(confidence=Confidence.PLAUSIBLE)
    integrity = integrity_of(replace(SOUND, damages=(suspected,), crash=report_samples.crash()))
    assert (integrity.verdict, integrity.confidence) == (Soundness.DAMAGED, Confidence.STRONG)
    assert "overflow, plausible" in integrity.reasons[0]


def stopped_for(confidence: Confidence, **changes: Any) -> Report:
    """A sound process that glibc stopped for a free of what is free."""
    wrong = report_samples.wrong_free(confidence=confidence, **changes)
    return replace(SOUND, crash=report_samples.crash(abort_message=MESSAGE, wrong_free=wrong))


MESSAGE = AbortMessage("free(): invalid size", AbortKind.MALLOC, 0x1000, "__abort_msg", Confidence.CERTAIN)


def test_a_wrong_free_leaves_the_heap_sound() -> None:
    integrity = integrity_of(stopped_for(Confidence.STRONG, weakened_by=("the word may be left over",)))
    assert (integrity.verdict, integrity.confidence) == (Soundness.WRONG_FREE, Confidence.STRONG)
    assert integrity.reasons == ("the word may be left over",)


def test_a_suspected_wrong_free_leaves_it_open_whether_the_heap_is_damaged() -> None:
    """The message may come from damage around a right pointer as well."""
    assert integrity_of(stopped_for(Confidence.PLAUSIBLE)).verdict is Soundness.UNKNOWN


def test_damage_comes_before_a_wrong_free() -> None:
    report = replace(stopped_for(Confidence.STRONG), damages=(report_samples.overflow(),))
    assert integrity_of(report).verdict is Soundness.DAMAGED
    cut = replace(stopped_for(Confidence.STRONG), defects=("a check failed",))
    assert integrity_of(cut).verdict is Soundness.UNKNOWN
