"""Heaps that were damaged in one known way: found, located to the byte, the culprit right, the rest of the report exact.

Each core's program wrote down what it changed and what malloc's next operation would make of it (damage.c). The same program
without the damage has no finding of damage at all.
"""

from __future__ import annotations

import numpy as np
import pytest

from coreheap.damage import Damage, DamageKind
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.report import Finding, Report, Severity
from tests.real_cores import cores, targets
from tests.real_cores.comparison import compare_all, compare_arena, ledger_errors, payloads
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.damage_cases import DAMAGE, KINDS
from tests.real_cores.damage_truth import CORRUPTION, EXPECTED, EXPECTED_MET, LOCKED, Account, Expected, account_of
from tests.real_cores.truth import Truth, load_truth

DAMAGED = [name for name in DAMAGE if name.rpartition("/")[2].startswith("damaged_")]
UNDAMAGED = [name for name in DAMAGE if name.rpartition("/")[2].startswith("undamaged_")]
MET = [name for name in DAMAGE if name.rpartition("/")[2].startswith("met_")]


def kind_of(name: str) -> str:
    return name.rpartition("/")[2].partition("_")[2].partition("@")[0]


def analysed(name: str) -> tuple[Report, Truth]:
    target = DAMAGE[name].target
    paths = core_or_skip(name)
    sysroot = None
    if target.release is not None:
        sysroot = targets.files_of(target, cores.default_directory()).sysroot
    return report_on(paths.core, sysroot), load_truth(paths.truth)


def test_every_kind_has_its_expectation() -> None:
    assert set(EXPECTED) == set(KINDS)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_found_where_it_is(name: str) -> None:
    report, truth = analysed(name)
    expected, account = EXPECTED[kind_of(name)], account_of(truth)
    differences = [
        *findings_otherwise(report, expected, account),
        *damages_otherwise(report, expected, account),
        *blocks_otherwise(report, truth, expected, account),
        *figures_otherwise(report, truth, expected, account),
        *messages_otherwise(report, account),
        *ledger_errors(report.ledger),
        *report.defects,
    ]
    assert differences == []


@pytest.mark.parametrize("name", MET)
def test_damage_that_malloc_met_is_found_where_it_is(name: str) -> None:
    report, truth = analysed(name)
    expected, account = EXPECTED_MET[kind_of(name)], account_of(truth)
    differences = [
        *findings_otherwise(report, expected, account, met=True),
        *damages_otherwise(report, expected, account, met=True),
        *ledger_errors(report.ledger),
        *report.defects,
    ]
    said = [finding.quantity("message") for finding in report.findings if finding.code == "ALLOCATOR-ABORT"]
    if said != ([account.said] if account.said and "assertion" not in account.said else said):
        differences.append(f"malloc said {account.said!r}, the report {said}")
    if said and report.damages and said[0] in report.damages[0].messages and report.damages[0].message != said[0]:
        differences.append(f"malloc said {said}, and of the damage it is {report.damages[0].message!r}")
    assert differences == []


@pytest.mark.parametrize("name", UNDAMAGED)
def test_without_the_damage_nothing_is_found(name: str) -> None:
    report, truth = analysed(name)
    assert {finding.code for finding in report.findings} & CORRUPTION == set()
    assert report.damages == ()
    assert report.anomalies == ()
    assert compare_all(report, truth) == []


# --------------------------------------------------------------------------------- the differences


def surer_than_plausible(confidence: Confidence) -> bool:
    return confidence.rank > Confidence.PLAUSIBLE.rank


def findings_otherwise(report: Report, expected: Expected, account: Account, met: bool = False) -> list[str]:
    """One finding, of the right code, or of one that the bytes allow and then in doubt; its severity.

    Where malloc met the damage, it may have carried it on before it died: more may be said, in doubt.
    """
    differences = [] if met else [f"finding {f.code}" for f in report.findings if f.code == LOCKED]
    found = [finding for finding in report.findings if finding.code in CORRUPTION - {LOCKED}]
    right = [finding for finding in found if finding.code in expected.codes]
    others = [finding for finding in found if finding not in right[:1]]
    if met:
        others = [finding for finding in others if surer_than_plausible(finding.confidence)]
    differences += [f"also {finding.code}, {finding.confidence.value}" for finding in others]
    if not right:
        return [*differences, f"no finding of {expected.codes}"]
    finding = right[0]
    if finding.code != expected.codes[0] and surer_than_plausible(finding.confidence) and not both_true(expected):
        differences.append(f"{finding.code} is {finding.confidence.value}, and wrong")
    return [*differences, *severity_otherwise(finding, expected, account)]


def both_true(expected: Expected) -> bool:
    return expected.codes[:2] == ("CORRUPTION-ALLOCATOR-DATA", "CORRUPTION-FREE-LIST")


def severity_otherwise(finding: Finding, expected: Expected, account: Account) -> list[str]:
    allowed = frozenset((Severity.ERROR,)) if account.signal else expected.severities
    if finding.severity in allowed:
        return []
    return [f"{finding.code} is a {finding.severity.value}, expected {sorted(s.value for s in allowed)}"]


def damages_otherwise(report: Report, expected: Expected, account: Account, met: bool = False) -> list[str]:
    """One damage, from the first byte that differs, with its victim and its culprit; as with the findings where malloc met it."""
    others = report.damages[1:]
    if met:
        others = tuple(damage for damage in others if surer_than_plausible(damage.confidence))
    differences = [f"also {d.kind.value} {d.place.value} at {d.bytes.start:#x}, {d.confidence.value}" for d in others]
    if not report.damages:
        return [f"no damage, expected at {account.start or 0:#x}"]
    return [*differences, *one_damage_otherwise(report.damages[0], expected, account)]


def one_damage_otherwise(damage: Damage, expected: Expected, account: Account) -> list[str]:
    differences = []
    sure = surer_than_plausible(damage.confidence)
    if damage.kind not in expected.kinds:
        differences.append(f"kind {damage.kind.value}, expected {[kind.value for kind in expected.kinds]}")
    elif not is_true(damage.kind, expected, account) and sure:
        differences.append(f"kind {damage.kind.value} is {damage.confidence.value}, and wrong")
    if account.start is not None and account.end is not None:
        if damage.bytes.start != account.start and (sure or not expected.may_be_elsewhere):
            differences.append(f"starts at {damage.bytes.start:#x}, the first wrong byte is {account.start:#x}")
        word_end = (account.end + 7) & ~7
        if damage.bytes.start == account.start and damage.bytes.end > word_end:
            differences.append(f"ends at {damage.bytes.end:#x}, the last wrong byte is before {account.end:#x}")
    victim = damage.victim.payload_address if damage.victim else None
    if damage.kind is DamageKind.INVALID_FREE:
        # What malloc never gave out is no chunk: where it is must do.
        if damage.bytes.start not in account.victims:
            differences.append(f"starts at {damage.bytes.start:#x}, expected {account.victims}")
    elif account.victims and victim not in account.victims and (sure or damage.kind is expected.kinds[0]):
        differences.append(f"victim {victim or 0:#x}, expected {[hex(address) for address in account.victims]}")
    culprit = damage.culprit.payload_address if damage.culprit else None
    if expected.names_culprit and culprit != account.culprit and (sure or damage.kind is expected.kinds[0]):
        differences.append(f"culprit {culprit or 0:#x}, expected {account.culprit or 0:#x}")
    if not expected.names_culprit and culprit not in (None, account.culprit) and sure:
        differences.append(f"culprit {culprit:#x} is {damage.confidence.value}, and nothing tells")
    return differences


def messages_otherwise(report: Report, account: Account) -> list[str]:
    """What malloc's next operation said in a child of the process is among what this release may say of the damage."""
    told = {text for damage in report.damages for text in damage.messages}
    if not account.said or "assert" in account.said.lower() or account.said in told:
        return []
    return [f"malloc says {account.said!r}, expected one of {sorted(told)}"]


def is_true(kind: DamageKind, expected: Expected, account: Account) -> bool:
    """The true kind; of words that were overwritten with one other bit, that they have one other bit is as true."""
    overwritten = expected.kinds[0] is DamageKind.OVERWRITE
    return kind is expected.kinds[0] or (overwritten and account.one_bit and kind is DamageKind.BIT_FLIP)


def blocks_otherwise(report: Report, truth: Truth, expected: Expected, account: Account) -> list[str]:
    """At most the damaged chunk and a neighbour are not what the process knew; behind a cut list what was on it."""
    if report.heap is None:
        return ["no heap was found"]
    live = payloads(report.heap, ChunkState.IN_USE)
    missing = np.setdiff1d(truth.live_payload_address, live).tolist()
    differences = []
    # Of several that were written over, each; and the neighbour.
    if len(missing) > max(1, len(account.victims)) + 1:
        differences.append(f"{len(missing)} live blocks are missing: {[hex(address) for address in missing[:5]]}")
    cached = np.union1d(truth.cached_payload_address, truth.orphan_cached_payload_address)
    allowed = np.union1d(cached, truth.freed_payload_address) if expected.cuts else np.zeros(0, np.uint64)
    own = np.union1d(truth.tcache_payload_address, truth.orphan_tcache_payload_address)
    extra = np.setdiff1d(live, truth.live_payload_address)
    if len(np.setdiff1d(extra, allowed)) > 1 or len(np.intersect1d(extra, own)):
        differences.append(f"in use, and the process did not say so: {[hex(a) for a in extra.tolist()[:5]]}")
    if len(extra) > expected.cuts + 1:
        differences.append(f"{len(extra)} blocks are said to be in use that are not")
    lost_cached = np.setdiff1d(cached, payloads(report.heap, ChunkState.TCACHE))
    if len(lost_cached) > expected.cuts + 1:
        differences.append(f"{len(lost_cached)} cached blocks are missing")
    return differences


def figures_otherwise(report: Report, truth: Truth, expected: Expected, account: Account) -> list[str]:
    """malloc_info of each arena, but for figures that the damage itself changes."""
    heap, info = report.heap, truth.malloc_info
    if heap is None or info is None:
        return ["nothing to compare"]
    if len(heap.arenas) != len(info.heaps):
        return [f"{len(heap.arenas)} arenas, the process had {len(info.heaps)}"]
    differences = []
    for arena, said in zip(heap.arenas, info.heaps, strict=True):
        if expected.moves_figures and arena.address == account.arena_address:
            continue
        # Numbered along the ring on both sides, which may be what is damaged.
        if all(compare_arena(arena, other) for other in info.heaps):
            differences += compare_arena(arena, said)
    return differences
