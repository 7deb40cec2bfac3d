"""Damages become findings: which code, how grave, in what order; what malloc may have left for a moment becomes none."""

from __future__ import annotations

import dataclasses

import pytest

from coreheap.checks import Case, allocator_locked, corruption
from coreheap.damage import ChunkPlace, Damage, DamagedPlace, DamageKind, Pattern, PatternKind
from coreheap.evidence import Anomaly, Confidence, Evidence, Strength
from coreheap.heap import ChunkState
from coreheap.quantities import AddressRange
from coreheap.report import Severity
from tests.unit.allocators.built_process import Shape, build_process, release
from tests.unit.checks.cases import arena_of, with_arenas
from tests.unit.checks.conftest import CaseOf


@pytest.fixture
def case(case_of: CaseOf) -> Case:
    return case_of(build_process(release("2.36"), Shape(sub_heaps=(2,))))


BLOCK = ChunkPlace(0x7F0000001000, 0x7F0000001010, 0x60, 0x58, ChunkState.IN_USE, 0, False, "libfoo.so table")


def damage(kind: DamageKind, place: DamagedPlace, start: int = 0x7F0000001068, message: str | None = "said") -> Damage:
    return Damage(
        kind=kind,
        place=place,
        bytes=AddressRange(start, start + 3),
        victim=None,
        culprit=BLOCK,
        pattern=Pattern(PatternKind.TEXT, 3),
        repair=None,
        anomalies=(0,),
        lost_bytes=0,
        arena=0,
        message=message,
        evidence=(Evidence("seen", "here", Strength.SOLID),),
        confidence=Confidence.STRONG,
    )


def with_damages(case: Case, *damages: Damage, code: str = "broken_chunk") -> Case:
    assert case.heap is not None
    heap = dataclasses.replace(case.heap, anomalies=(Anomaly(code, 1, "this", "that"),), anomaly_count=1)
    return dataclasses.replace(case, heap=heap, damages=damages)


@pytest.mark.parametrize(
    ("kind", "place", "code"),
    [
        (DamageKind.OVERFLOW, DamagedPlace.CHUNK_HEADER, "CORRUPTION-OVERFLOW"),
        (DamageKind.OVERFLOW, DamagedPlace.TOP, "CORRUPTION-OVERFLOW"),
        (DamageKind.UNDERFLOW, DamagedPlace.CHUNK_HEADER, "CORRUPTION-HEADER"),
        (DamageKind.BIT_FLIP, DamagedPlace.PREV_SIZE, "CORRUPTION-HEADER"),
        (DamageKind.OVERWRITE, DamagedPlace.FREE_LIST, "CORRUPTION-FREE-LIST"),
        (DamageKind.OVERWRITE, DamagedPlace.BIN_LINK, "CORRUPTION-FREE-LIST"),
        (DamageKind.OVERWRITE, DamagedPlace.TCACHE_STRUCTURE, "CORRUPTION-ALLOCATOR-DATA"),
        (DamageKind.BIT_FLIP, DamagedPlace.HEAP_INFO, "CORRUPTION-ALLOCATOR-DATA"),
        (DamageKind.OVERFLOW, DamagedPlace.MMAPPED_HEADER, "CORRUPTION-MMAPPED"),
        (DamageKind.INVALID_FREE, DamagedPlace.FREE_LIST, "CORRUPTION-INVALID-FREE"),
        (DamageKind.DOUBLE_FREE, DamagedPlace.FREE_LIST, "DOUBLE-FREE"),
        (DamageKind.USE_AFTER_FREE, DamagedPlace.TCACHE_LINK, "USE-AFTER-FREE"),
    ],
)
def test_each_kind_of_damage_has_its_finding(case: Case, kind: DamageKind, place: DamagedPlace, code: str) -> None:
    (finding,) = corruption.findings(with_damages(case, damage(kind, place)))
    assert finding.code == code
    assert finding.severity is Severity.ERROR
    assert finding.quantity("address") == 0x7F0000001068
    assert finding.quantity("culprit_address") == BLOCK.payload_address
    assert finding.quantity("culprit_holder") == "libfoo.so table"
    assert finding.quantity("message") == "said"
    assert finding.confidence is Confidence.STRONG
    assert any("0x7f0000001010" in step for step in finding.next_steps)


def test_what_glibc_would_not_notice_is_a_warning(case: Case) -> None:
    key = damage(DamageKind.USE_AFTER_FREE, DamagedPlace.TCACHE_LINK, message=None)
    (finding,) = corruption.findings(with_damages(case, key, code="list_wrong_key"))
    assert finding.severity is Severity.WARNING
    link = damage(DamageKind.USE_AFTER_FREE, DamagedPlace.TCACHE_LINK, message=None)
    (finding,) = corruption.findings(with_damages(case, link, code="list_not_a_chunk_start"))
    assert finding.severity is Severity.ERROR


def test_a_moments_state_is_no_finding_of_damage(case: Case) -> None:
    assert corruption.findings(with_damages(case, damage(DamageKind.IN_TRANSITION, DamagedPlace.BIN_LINK))) == ()


def test_many_damages_of_a_code_are_told_up_to_a_limit_and_counted(case: Case) -> None:
    many = [damage(DamageKind.OVERFLOW, DamagedPlace.CHUNK_HEADER, 0x7F0000001008 + 0x60 * row) for row in range(30)]
    found = corruption.findings(with_damages(case, *many))
    assert len(found) == corruption.FINDINGS_OF_A_CODE
    assert found[-1].quantity("further_damages") == 30 - corruption.FINDINGS_OF_A_CODE


def test_nothing_is_said_of_a_sound_heap(case: Case) -> None:
    assert corruption.findings(case) == ()
    assert allocator_locked.findings(with_arenas(case, arena_of(1, in_use=4096))) == ()


def test_a_locked_arena_is_told(case: Case) -> None:
    locked = dataclasses.replace(arena_of(1, in_use=4096), locked=True)
    (finding,) = allocator_locked.findings(with_arenas(case, arena_of(2, in_use=4096), locked))
    assert (finding.code, finding.severity) == ("ALLOCATOR-LOCKED", Severity.INFO)
    assert finding.quantity("locked_arenas") == 1
    assert "1" in finding.subject


def test_without_a_heap_nothing_is_said(case: Case) -> None:
    empty = dataclasses.replace(case, heap=None)
    assert corruption.findings(empty) == ()
    assert allocator_locked.findings(empty) == ()
