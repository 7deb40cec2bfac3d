"""Threads that ended, as they wrote down their own stacks: whose nobody joined, whose glibc keeps, and who is accused."""

from __future__ import annotations

import numpy as np
import pytest

import coreheap
from coreheap.corefile.thread_lists import ListedStacks, listed_stacks
from coreheap.evidence import Confidence, Strength
from coreheap.mappings import KINDS, MappingKind
from coreheap.report import Finding, Report, Severity
from tests.real_cores import cores
from tests.real_cores.cases import CASES, MATRIX
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.truth import Truth, load_truth

MIB = 1 << 20
NAMES = tuple(name for name, case in (*CASES.items(), *MATRIX.items()) if case.program == "unjoined")


def analysed(name: str) -> tuple[Report, ListedStacks, Truth]:
    paths = core_or_skip(name)
    with coreheap.open(paths.core) as core:
        listed = listed_stacks(core)
        report = coreheap.analyze(core)
    assert listed is not None
    return report, listed, load_truth(paths.truth)


def arguments_of(name: str) -> dict[str, str]:
    return dict(word.split("=") for word in cores.case_named(name).arguments)


def found_in(report: Report) -> list[Finding]:
    return [finding for finding in report.findings if finding.code == "UNJOINED-THREADS"]


@pytest.mark.parametrize("name", NAMES)
def test_ended_threads_are_told_by_the_librarys_lists(name: str) -> None:
    report, listed, truth = analysed(name)
    arguments = arguments_of(name)
    # pthread_getattr_np tells the stack without its guard.
    ended = {int(line.split()[0], 16) for line in truth.notes["ended_stack"]}
    unjoined = {stack.start + stack.guard_bytes for stack in listed.unjoined}
    cached = {stack.start + stack.guard_bytes for stack in listed.cached}
    is_child = arguments.get("fork") == "1"
    stays = arguments["how"] in ("lost", "kept", "joining") and not is_child
    if is_child:
        # A fork puts all that its parent's threads had into the cache, and more than it would ever keep.
        assert ended < cached
        assert len(cached) == len(ended) + int(arguments["live"])
    if arguments.get("fork") == "2":
        # The parent joined its own, so these ended in the child, one after the other on stacks of their own.
        assert len(unjoined) == 30
        assert unjoined <= ended
    else:
        assert unjoined == (ended if stays else set())
        assert stays or ended <= cached
    assert listed.strength >= Strength.SOLID
    assert (listed.strength is Strength.PROOF) == ("bullseye" not in name and "static" not in name)
    assert listed.vanished == ()
    assert listed.someone_joins == (arguments["how"] == "joining")
    table = report.mappings
    assert table is not None
    rows = table.kind == KINDS.index(MappingKind.UNJOINED_STACK)
    claimed = table.end[rows] - table.start[rows]
    assert int(claimed.sum()) == sum(one.end - one.start - one.guard_bytes for one in listed.unjoined)
    assert np.isin(table.start[rows], np.array(sorted(unjoined), np.uint64)).all() or not unjoined


@pytest.mark.parametrize("name", NAMES)
def test_the_finding(name: str) -> None:
    report, listed, truth = analysed(name)
    arguments = arguments_of(name)
    found = found_in(report)
    topics = [item.topic for item in report.verdict]
    is_sound = arguments["how"] in ("joined", "detached", "joining") and arguments.get("fork") != "2"
    if arguments.get("fork") == "1" or is_sound or name.endswith("@four"):
        assert found == []
        assert "unjoined_threads" not in topics
        return
    (finding,) = found
    count = 30 if "fork" in arguments else int(arguments.get("threads", 60))
    notes = truth.notes["ended_stack"][-count:]
    assert finding.quantity("threads") == count == len(notes)
    kib = int(arguments.get("stack", 8192))
    # What pthread_getattr_np tells is without the guards.
    noted = sum(int(line.split()[1], 16) for line in notes)
    assert finding.quantity("stack_bytes") == noted + sum(one.guard_bytes for one in listed.unjoined)
    resident = finding.quantity("resident_bytes")
    assert isinstance(resident, int)
    assert count * 4096 <= resident < count * (64 << 10)
    held = finding.quantity("ids_in_memory")
    assert isinstance(held, int)
    if arguments["how"] == "kept":
        assert held == count
        assert finding.severity is (Severity.WARNING if count >= 100 else Severity.INFO)
        assert finding.confidence.rank <= Confidence.STRONG.rank
        assert finding.weakened_by
    else:
        # What is left of calls on a stack or in registers is no more than a few of them.
        assert held <= 3
        assert finding.severity is Severity.WARNING
        assert finding.confidence is (Confidence.CERTAIN if listed.strength is Strength.PROOF else Confidence.STRONG)
    assert str(finding.quantity("start_routine")).split("+")[0].split()[0] in ("leave", "unjoined")
    (item,) = [item for item in report.verdict if item.topic == "unjoined_threads"]
    # The guards are no memory that a program may write.
    assert item.bytes == noted
    assert report.verdict[0] is item or kib < 1024
