"""STACK-MEMORY fires on stacks that hold much, are deep, very many, or overflowed; not on stacks that only reserve."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from coreheap.checks import Case
from coreheap.checks.stack_memory import findings
from coreheap.evidence import Confidence
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.report import Finding, Severity, ThreadSummary
from tests.unit.allocators.built_process import build_process, release
from tests.unit.checks.conftest import CaseOf

KIB, MIB = 1 << 10, 1 << 20
FIRST_STACK = 0x7F10_0000_0000
GUARD = 4096


def thread(
    number: int,
    *,
    size: int = 8 * MIB,
    used: int | None = 4 * KIB,
    resident: int | None = 32 * KIB,
    source: str | None = "descriptor",
) -> ThreadSummary:
    start = FIRST_STACK + number * (1 << 30)
    return ThreadSummary(
        number,
        100 + number,
        None,
        start + size - (used or 0),
        None,
        None,
        None,
        None,
        None,
        None,
        start_routine="worker in app",
        stack_start=start if source else None,
        stack_end=start + size if source else None,
        stack_source=source,
        guard_bytes=GUARD,
        stack_used_bytes=used,
        stack_resident_bytes=resident,
        stack_peak_bytes=resident,
    )


def table(
    writable: int, ended: int = 0, ended_resident: int = 0, basis: ResidencyBasis = ResidencyBasis.HOLES
) -> MappingTable:
    """``writable`` bytes that were there beside those of ended stacks."""
    resident = np.array([writable, ended_resident], np.uint64)
    start = np.array([0x10000, 1 << 40], np.uint64)
    size = np.array([max(writable, 4096), max(ended, 4096)], np.uint64)
    nobody = np.full(2, -1, np.int32)
    return MappingTable(
        start=start,
        end=start + size,
        kind=np.array([KINDS.index(MappingKind.UNEXPLAINED), KINDS.index(MappingKind.ENDED_STACK)], np.uint8),
        flags=np.full(2, 6, np.uint8),
        thread=nobody,
        arena=nobody,
        name=nobody,
        committed_bytes=size,
        saved_bytes=size,
        resident_low=resident,
        resident_high=resident,
        names=(),
        basis=basis,
    )


@pytest.fixture
def case(case_of: CaseOf) -> Case:
    return case_of(build_process(release("2.36")))


def found(case: Case, *threads: ThreadSummary, mappings: MappingTable | None = None) -> tuple[Finding, ...]:
    return findings(dataclasses.replace(case, threads=threads, mappings=mappings))


def test_stacks_that_hold_much_of_the_memory(case: Case) -> None:
    for resident, others, severity in (
        (16 * MIB, 48 * MIB, Severity.INFO),
        (64 * MIB, 64 * MIB, Severity.WARNING),
        (64 * MIB, 65 * MIB, Severity.INFO),
    ):
        threads = [thread(number, resident=resident // 16) for number in range(16)]
        (finding,) = found(case, *threads, mappings=table(resident + others))
        assert finding.code == "STACK-MEMORY"
        assert finding.severity is severity
        assert finding.confidence is Confidence.CERTAIN
        assert finding.quantity("resident_bytes") == resident
        assert finding.quantity("resident_share") == resident / (resident + others)
        assert finding.quantity("reserved_bytes") == 16 * 8 * MIB
        assert finding.quantity("deep_threads") == 0


def test_stacks_of_ended_threads_count(case: Case) -> None:
    threads = [thread(number, resident=MIB) for number in range(8)]
    ended = table(24 * MIB, ended=40 * MIB, ended_resident=8 * MIB)
    (finding,) = found(case, *threads, mappings=ended)
    assert finding.quantity("resident_bytes") == 16 * MIB
    assert finding.quantity("ended_stack_bytes") == 40 * MIB
    assert any("stack_cache_size" in step for step in finding.next_steps)


def test_a_deep_stack(case: Case) -> None:
    (finding,) = found(case, thread(0), thread(1, used=MIB + 1), mappings=table(900 * MIB))
    assert finding.severity is Severity.INFO
    assert finding.quantity("deepest_thread") == 1
    assert finding.quantity("deepest_used_bytes") == MIB + 1
    assert finding.quantity("deepest_start") == "worker in app"
    assert any("backtrace" in step for step in finding.next_steps)
    (finding,) = found(case, thread(0), thread(1, used=int(7.3 * MIB)))
    assert finding.severity is Severity.WARNING
    # The kernel's stack is as large as it was ever used.
    (finding,) = found(case, thread(0, size=3 * MIB, used=int(2.9 * MIB), source="initial_stack"))
    assert finding.severity is Severity.INFO


def test_very_many_threads(case: Case) -> None:
    assert found(case, *(thread(number) for number in range(999)), mappings=table(1024 * MIB)) == ()
    (finding,) = found(case, *(thread(number) for number in range(1000)), mappings=table(1024 * MIB))
    assert finding.quantity("threads") == 1000
    assert finding.severity is Severity.INFO


def test_a_fault_in_a_guard(case_of: CaseOf) -> None:
    for distance, fires in ((1, True), (GUARD, True), (GUARD + 1, False), (0, False)):
        case = case_of(build_process(release("2.36")))
        process = dataclasses.replace(case.core.process, signal=11, fault_address=FIRST_STACK - distance)
        vars(case.core)["process"] = process
        # At its stack's end, but that alone is said of a stack that is not deep.
        result = found(case, dataclasses.replace(thread(0), stack_pointer=FIRST_STACK + 64))
        assert bool(result) is fires
        if fires:
            assert result[0].quantity("overflowed_thread") == 0
            assert result[0].severity is Severity.WARNING
        # A stray write into the guard of another thread, or by one that is nowhere near its end
        assert found(case, thread(0)) == ()
        assert found(case, thread(1, used=64), dataclasses.replace(thread(2), index=0)) == ()


def test_depth_in_a_mapping_of_anyones_is_no_depth(case: Case) -> None:
    """A stack pointer in the middle of a large mapping: coroutines, Go."""
    assert found(case, thread(0), thread(1, used=5 * MIB, source="mapping")) == ()
    (finding,) = found(case, thread(0), thread(1, used=5 * MIB))
    assert finding.quantity("deepest_thread") == 1


def test_address_space_of_32_bit(case_of: CaseOf) -> None:
    case = case_of(build_process(release("2.36", "i386")))
    threads = [thread(number) for number in range(128)]
    (finding,) = found(case, *threads, mappings=table(900 * MIB))
    assert finding.severity is Severity.WARNING
    assert found(case, *threads[:127], mappings=table(900 * MIB)) == ()


def test_stacks_that_only_reserve_are_nothing(case: Case) -> None:
    threads = [thread(number) for number in range(900)]
    assert found(case, *threads, mappings=table(900 * MIB)) == ()


def test_nearly_enough(case: Case) -> None:
    """A byte less than is asked for: of pages, of their share, of depth."""
    threads = [thread(number, resident=MIB) for number in range(16)]
    assert len(found(case, *threads, mappings=table(64 * MIB))) == 1
    assert found(case, *threads, mappings=table(64 * MIB + 1)) == ()
    fewer = [*threads[1:], thread(0, resident=MIB - 1)]
    assert found(case, *fewer, mappings=table(16 * MIB)) == ()
    assert found(case, thread(0, used=MIB), mappings=table(16 * MIB)) == ()


def test_without_memory_depth_alone_counts(case: Case) -> None:
    unsaved = [thread(number, resident=None) for number in range(16)]
    for mappings in (None, table(0, basis=ResidencyBasis.UNKNOWN)):
        assert found(case, *unsaved, mappings=mappings) == ()
        (finding,) = found(case, *unsaved[1:], thread(0, used=2 * MIB, resident=None), mappings=mappings)
        assert finding.quantity("resident_bytes") is None
        assert finding.quantity("resident_share") is None
        assert any("does not tell" in reason for reason in finding.weakened_by)
    # No thread's stack is known.
    assert found(case, thread(0, used=None, source=None), mappings=table(MIB)) == ()


def test_bounds_make_shares_less_sure(case: Case) -> None:
    threads = [thread(number, resident=2 * MIB) for number in range(16)]
    (finding,) = found(case, *threads, mappings=table(40 * MIB, basis=ResidencyBasis.ZERO_PAGES))
    assert finding.confidence is Confidence.STRONG
    guessed = [thread(number, resident=2 * MIB, source="mapping") for number in range(16)]
    (finding,) = found(case, *guessed, mappings=table(40 * MIB))
    assert finding.confidence.rank < Confidence.STRONG.rank
