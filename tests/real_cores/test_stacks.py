"""Stacks as the threads themselves know them: pthread_getattr_np of each against what the core tells, on every target."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

import coreheap
from coreheap.accounting import account_for_memory
from coreheap.accounting.claims import ClaimColumns, Claims
from coreheap.accounting.stacks import stack_claims
from coreheap.corefile import Core
from coreheap.corefile.stacks import StackSource, find_stacks, stack_residency
from coreheap.evidence import Confidence
from coreheap.mappings import KINDS, MappingKind
from coreheap.report import Report
from coreheap.thread_summaries import code_name
from tests.real_cores import cores
from tests.real_cores.cases import CASES, MATRIX
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.truth import Truth, load_truth

NAMES = tuple(name for name, case in (*CASES.items(), *MATRIX.items()) if case.program == "stacks")
BY_KERNEL = tuple(
    name
    for name in NAMES
    if cores.case_named(name).made_by == "kernel" and not cores.case_named(name).target.is_emulated
)
PAGE = 4096
FRAMES_BELOW = {"wait_deep": 4096 + 512}
"""Between the frame that a thread wrote down and its stack pointer: park and syscall, with the array of a deep one."""


@dataclass(frozen=True)
class Known:
    """What a thread wrote of its own stack."""

    lwp: int
    routine: str
    start: int
    end: int
    guard: int
    lowest_frame: int


def known_stacks(truth: Truth, note: str = "stack") -> dict[int, Known]:
    found = {}
    for line in truth.notes.get(note, ()):
        lwp, routine, start, byte_count, guard, lowest = line.split()
        known = Known(
            int(lwp), routine, int(start, 16), int(start, 16) + int(byte_count, 16), int(guard, 16), int(lowest, 16)
        )
        found[known.lwp] = known
    return found


@contextmanager
def opened(name: str) -> Iterator[tuple[Core, Truth]]:
    paths = core_or_skip(name)
    with coreheap.open(paths.core) as core:
        yield core, load_truth(paths.truth)


@pytest.mark.parametrize("name", NAMES)
def test_bounds_guard_and_depth_are_those_of_the_thread(name: str) -> None:
    with opened(name) as (core, truth):
        known, stacks = known_stacks(truth), find_stacks(core)
        assert {thread.lwp for thread in core.threads} == set(known)
        handlers = {int(line.split()[0]): line.split()[1:] for line in truth.notes["signal_stack"]}
        for thread in core.threads:
            stack, own = stacks.by_thread[thread.index], known[thread.lwp]
            if own.routine == "main":
                # Of the first thread glibc says what it may grow to.
                assert stack.source is StackSource.INITIAL_STACK
                assert own.start <= stack.start < own.lowest_frame < stack.end
                continue
            assert stack.source is StackSource.DESCRIPTOR
            assert (stack.start, stack.end) == (own.start, own.end), own.routine
            # glibc 2.32 and later makes guards of 64 KiB on arm64, whatever was asked for, and tells what was asked for.
            least = 1 << 16 if core.machine == "aarch64" and stack.guard_bytes == 1 << 16 else own.guard
            assert stack.guard_bytes == max(own.guard, least), own.routine
            assert stack.used_bytes is not None
            frames = stack.used_bytes - (own.end - own.lowest_frame)
            assert 0 < frames <= FRAMES_BELOW.get(own.routine, 512), own.routine
            if thread.lwp in handlers:
                start, byte_count = (int(word, 16) for word in handlers[thread.lwp])
                assert stack.signal_stack == (start, start + byte_count)
            else:
                assert stack.signal_stack is None
        assert not stacks.elsewhere


@pytest.mark.parametrize("name", NAMES)
def test_start_routines(name: str) -> None:
    with opened(name) as (core, truth):
        known, stacks = known_stacks(truth), find_stacks(core)
        addresses: dict[str, set[int]] = {}
        for thread in core.threads:
            stack, own = stacks.by_thread[thread.index], known[thread.lwp]
            if own.routine == "main":
                assert stack.start_routine is None
                continue
            assert stack.start_routine is not None, own.routine
            module = core.module_at(stack.start_routine)
            assert module is not None
            # qemu's cores have no build-id to verify the program's file by: no names there.
            if module.elf_file is not None:
                assert code_name(core, stack.start_routine) == f"{own.routine} in {module.name}"
            else:
                assert core.made_by == "qemu"
                assert code_name(core, stack.start_routine).startswith("stacks+0x")
            addresses.setdefault(own.routine, set()).add(stack.start_routine)
        assert all(len(found) == 1 for found in addresses.values())
        assert len(set.union(*addresses.values())) == len(addresses) == 7


@pytest.mark.parametrize("name", NAMES)
def test_peaks(name: str) -> None:
    case = CASES.get(name) or MATRIX[name]
    depth = int(dict(word.split("=") for word in case.arguments)["depth"]) << 10
    with opened(name) as (core, truth):
        known, stacks = known_stacks(truth), find_stacks(core)
        pages = stack_residency(core.memory, stacks, holes_are_exact=core.made_by == "kernel")
        of_routine: dict[str, list[tuple[int, int]]] = {}
        for thread in core.threads:
            found = pages[thread.index]
            assert found.resident_bytes <= found.peak_bytes
            if core.made_by == "kernel":
                assert found.resident_bytes >= (stacks.by_thread[thread.index].used_bytes or 0) // PAGE * PAGE
            of_routine.setdefault(known[thread.lwp].routine, []).append((found.resident_bytes, found.peak_bytes))
        # Where pages of zeros are not there, those that park cleared (scrub_stack) are not.
        least = depth if core.made_by == "kernel" else depth - (32 << 10)
        for routine in ("wait_deep", "wait_after_depth"):
            assert all(least <= low <= peak <= depth + (1 << 18) for low, peak in of_routine[routine]), routine
        # Huge pages may have come with the first touch; then all of them are there.
        assert min(peak for _, peak in of_routine["wait_shallow"]) < 1 << 18


@pytest.mark.parametrize("name", NAMES)
def test_claims(name: str) -> None:
    with opened(name) as (core, truth):
        claims = Claims()
        stack_claims(core, claims)
        columns = claims.columns()
        lwp = np.array([thread.lwp for thread in core.threads])

        def ranges(kind: MappingKind) -> dict[int, tuple[int, int]]:
            rows = np.flatnonzero(columns.kind == KINDS.index(kind)).tolist()
            return {
                int(lwp[columns.thread[row]]) if columns.thread[row] >= 0 else -1 - row: (
                    int(columns.start[row]),
                    int(columns.end[row]),
                )
                for row in rows
            }

        known = {lwp: own for lwp, own in known_stacks(truth).items() if own.routine != "main"}
        assert ranges(MappingKind.THREAD_STACK) == {lwp: (own.start, own.end) for lwp, own in known.items()}
        guards = {lwp: (low, high) for lwp, (low, high) in ranges(MappingKind.STACK_GUARD).items() if lwp >= 0}
        assert {lwp: high for lwp, (low, high) in guards.items()} == {
            lwp: own.start for lwp, own in known.items() if own.guard
        }
        storage = ranges(MappingKind.TLS)
        for number, own in known.items():
            low, high = storage[number]
            assert own.lowest_frame < low < high == own.end
            assert high - low < 2 * PAGE
        # A stack that was taken over by a later thread is no longer an ended one's.
        ended = {(own.start, own.end) for own in known_stacks(truth, "ended_stack").values()}
        found = {(low + _guard_of(low, columns), high) for low, high in ranges(MappingKind.ENDED_STACK).values()}
        assert found == ended
        assert [(low, high) for low, high in ranges(MappingKind.MAIN_STACK).values()] == [find_stacks(core).initial]
        for line in truth.notes["signal_stack"]:
            number, start, byte_count = (int(word, 0) for word in line.split())
            assert ranges(MappingKind.SIGNAL_STACK) == {number: (start, start + byte_count)}


@pytest.mark.parametrize("name", NAMES)
def test_nothing_else_counts_as_stack(name: str) -> None:
    """Not what lies beside a stack in the same mapping: the sums are the threads' own, to the byte."""
    with opened(name) as (core, truth):
        table = account_for_memory(core, None, residency=False).mappings
    known = [own for own in known_stacks(truth).values() if own.routine != "main"]
    in_blocks = np.zeros(len(table), np.bool_)
    for own in known:
        in_blocks |= (table.start >= np.uint64(own.start)) & (table.end <= np.uint64(own.end))
    is_stack = np.isin(table.kind, [KINDS.index(MappingKind.THREAD_STACK), KINDS.index(MappingKind.TLS)])
    size = table.end - table.start
    assert int(size[in_blocks & is_stack].sum()) == sum(own.end - own.start for own in known)
    assert not np.any((table.kind == KINDS.index(MappingKind.THREAD_STACK)) & ~in_blocks)


def test_the_finding_has_the_numbers_of_the_process(analysed: Callable[[str], tuple[Report, Truth]]) -> None:
    report, truth = analysed("stacks")
    (finding,) = (finding for finding in report.findings if finding.code == "STACK-MEMORY")
    known = known_stacks(truth)
    of_threads = sum(own.end - own.start for own in known.values() if own.routine != "main")
    (main,) = (thread for thread in report.threads if thread.is_main)
    assert finding.confidence is Confidence.CERTAIN
    assert finding.quantity("threads") == len(known)
    assert finding.quantity("reserved_bytes") == of_threads + (main.stack_reserved_bytes or 0)
    assert finding.quantity("deep_threads") == 4
    assert finding.quantity("deepest_start") == "wait_deep in stacks"
    deepest = report.threads[int(finding.quantity("deepest_thread") or 0)]
    assert known[deepest.lwp].routine == "wait_deep"
    # Five threads touched 6 MiB each, one of them is back.
    resident = int(finding.quantity("resident_bytes") or 0)
    assert 5 * (6 << 20) <= resident < 5 * (6 << 20) + len(known) * (64 << 10)
    assert finding.quantity("ended_stack_bytes") == sum(
        own.end - own.start for own in known_stacks(truth, "ended_stack").values()
    )
    assert (main.name, main.name_source) == ("stacks", "comm")
    assert [thread.name for thread in report.threads if not thread.is_main] == [None] * (len(known) - 1)


@pytest.mark.parametrize("name", BY_KERNEL)
def test_resident_bytes_are_those_of_smaps(name: str) -> None:
    """Rss of the mappings that hold stacks alone, taken just before the dump, while all threads were parked."""
    with opened(name) as (core, truth):
        assert core.made_by == "kernel"  # only its cores tell all pages that were there
        stacks = find_stacks(core)
        pages = stack_residency(core.memory, stacks, holes_are_exact=True)
        compared = 0
        for (low, high), measured in rss_of_mappings(truth.smaps).items():
            inside = [stack for stack in stacks.by_thread.values() if low <= stack.start and stack.end <= high]
            # From glibc 2.42 on guards are no mappings of their own, and stacks side by side are one.
            covered = sum(stack.end - max(stack.start - (stack.guard_bytes or 0), low) for stack in inside)
            if inside and covered == high - low and inside[0].source is StackSource.DESCRIPTOR:
                assert sum(pages[stack.thread].resident_bytes for stack in inside) == measured
                compared += len(inside)
    assert compared


def rss_of_mappings(smaps: str) -> dict[tuple[int, int], int]:
    found: dict[tuple[int, int], int] = {}
    mapping = (0, 0)
    for line in smaps.splitlines():
        name, *rest = line.split()
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", name):
            start, end = name.split("-")
            mapping = int(start, 16), int(end, 16)
        elif name == "Rss:":
            found[mapping] = int(rest[0]) * 1024
    return found


def _guard_of(start: int, columns: ClaimColumns) -> int:
    """The bytes of the guard that is claimed at the start of an ended thread's block."""
    guards = columns.kind == KINDS.index(MappingKind.STACK_GUARD)
    rows = np.flatnonzero(guards & (columns.start == np.uint64(start)))
    return int(columns.end[rows[0]] - columns.start[rows[0]]) if len(rows) else 0
