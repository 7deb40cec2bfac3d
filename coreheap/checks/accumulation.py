"""ACCUMULATION: a container that holds very many like chunks, and with them much of what is reachable."""

from __future__ import annotations

from coreheap.checks.protocol import Case
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.leaks import Accumulation, ChunkView
from coreheap.quantities import MIB, format_bytes, format_count
from coreheap.report import Finding, Quantity, Severity, Unit

SMALLEST_BYTES, SMALLEST_SHARE = 1 * MIB, 0.1
WARNING_BYTES, WARNING_SHARE = 64 * MIB, 0.5
SMALLEST_CHILDREN, SMALLEST_BELOW = 100, 1000
"""Like children, and chunks that go with them: a queue of blocks of 64 jobs each has few children for its jobs."""
NEARLY_THE_SAME = 0.5
"""Of what one holder's children keep, the like children of many like holders say nothing new from this share on."""
FINDINGS = 3
SAMPLES_NAMED = 3


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding for each of the largest accumulation points; nothing where retained sizes were not looked for.

    Like chunks that hang from roots of which none has most of them are no accumulation point.
    """
    retained = case.retained
    if retained is None or not retained.reachable_bytes:
        return ()
    found: list[Finding] = []
    told: list[Accumulation] = []
    # Single holders first: they say where to look.
    for accumulation in sorted(retained.accumulations, key=lambda point: point.holders > 1):
        held = accumulation.child_retained_bytes
        share = held / retained.reachable_bytes
        is_large = held >= SMALLEST_BYTES and share >= SMALLEST_SHARE
        is_many = accumulation.children >= SMALLEST_CHILDREN and accumulation.below >= SMALLEST_BELOW
        is_one_place = isinstance(accumulation.holder, ChunkView) or accumulation.root is not None
        is_new = accumulation.holders == 1 or not any(
            held * NEARLY_THE_SAME <= other.child_retained_bytes for other in told
        )
        if is_large and is_many and is_one_place and is_new:
            told.append(accumulation)
            found.append(_finding(accumulation, share))
    return tuple(found[:FINDINGS])


def _finding(accumulation: Accumulation, share: float) -> Finding:
    held = accumulation.child_retained_bytes
    holder = accumulation.holder
    place = holder.payload_address if isinstance(holder, ChunkView) else None
    what = holder
    if isinstance(holder, ChunkView):
        of = f" of type {holder.type}" if holder.type else ""
        what = f"one chunk{of} of {format_bytes(holder.usable_bytes)}"
        if accumulation.holders > 1:
            what = f"one of {format_count(accumulation.holders)} chunks of about {format_bytes(holder.usable_bytes)}"
    evidence = (
        Evidence(
            f"every path from a root to {format_count(accumulation.children)} chunks of"
            f" {format_bytes(accumulation.child_bytes)} goes through {what}"
            if place is not None
            else f"most of {format_count(accumulation.children)} chunks of {format_bytes(accumulation.child_bytes)} hang from"
            f" {what}",
            "dominator tree",
            Strength.SOLID if place is not None else Strength.HINT,
            place,
        ),
        Evidence(
            f"{format_count(accumulation.below)} chunks go with them; each of them keeps"
            f" {format_bytes(held // accumulation.children)} on average",
            "retained sizes",
            Strength.HINT,
            place,
        ),
        Evidence(
            "one core shows a moment: it cannot tell a container that grows from one that is meant to be this large",
            "nature of a core",
            Strength.HINT,
            speaks_against=True,
        ),
    )
    samples = " ".join(f"{address:#x}" for address in accumulation.samples[:SAMPLES_NAMED])
    severe = held >= WARNING_BYTES and share >= WARNING_SHARE
    return Finding(
        code="ACCUMULATION",
        severity=Severity.WARNING if severe else Severity.INFO,
        confidence=confidence_from(evidence),
        subject=f"{format_count(accumulation.children)} like chunks below one",
        quantities=(
            Quantity("children", accumulation.children, Unit.COUNT),
            Quantity("child_bytes", accumulation.child_bytes, Unit.BYTES),
            Quantity("child_retained_bytes", held, Unit.BYTES),
            Quantity("reachable_share", share, Unit.SHARE),
            Quantity("retained_bytes", accumulation.retained_bytes, Unit.BYTES),
            Quantity("holder_address", place, Unit.ADDRESS),
            Quantity("holder_count", accumulation.holders, Unit.COUNT),
            Quantity("below_count", accumulation.below, Unit.COUNT),
            Quantity("root", accumulation.root, Unit.TEXT),
        ),
        evidence=evidence,
        next_steps=(
            *((f"coreheap owners CORE {place:#x} shows who keeps the container",) if place is not None else ()),
            f"coreheap explain CORE {samples} says what some of its elements are",
            "take a second core some time later: a container that only grows wants a limit or an expiry",
        ),
        weakened_by=(
            "retained sizes are an estimate: a stale pointer or a number that looks like one counts as a holder, and"
            " then the bytes belong to no single chunk",
            "caches and indexes are meant to be large",
        ),
    )
