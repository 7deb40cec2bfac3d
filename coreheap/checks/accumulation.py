"""ACCUMULATION: a container that holds very many like chunks, and with them much of what is reachable."""

from __future__ import annotations

from coreheap.checks.protocol import Case
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.leaks import Accumulation, ChunkView
from coreheap.quantities import MIB, format_bytes, format_count
from coreheap.report import Finding, Quantity, Severity, Unit

SMALLEST_BYTES, SMALLEST_SHARE = 1 * MIB, 0.1
WARNING_BYTES, WARNING_SHARE = 64 * MIB, 0.5
SMALLEST_CHILDREN = 1000
FINDINGS = 3
SAMPLES_NAMED = 3


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding for each of the largest accumulation points; nothing where retained sizes were not asked for.

    Like chunks that hang below no single chunk (below several roots, say) are no accumulation point.
    """
    retained = case.retained
    if retained is None or not retained.reachable_bytes:
        return ()
    found = []
    for accumulation in retained.accumulations:
        holder = accumulation.holder
        share = accumulation.child_retained_bytes / retained.reachable_bytes
        is_large = accumulation.child_retained_bytes >= SMALLEST_BYTES and share >= SMALLEST_SHARE
        if is_large and accumulation.children >= SMALLEST_CHILDREN and isinstance(holder, ChunkView):
            found.append(_finding(accumulation, holder, share))
    return tuple(found[:FINDINGS])


def _finding(accumulation: Accumulation, holder: ChunkView, share: float) -> Finding:
    held = accumulation.child_retained_bytes
    place = holder.payload_address
    what = f" of type {holder.type}" if holder.type else ""
    evidence = (
        Evidence(
            f"every path from a root to {format_count(accumulation.children)} chunks of"
            f" {format_bytes(accumulation.child_bytes)} goes through one chunk{what} of"
            f" {format_bytes(holder.usable_bytes)}",
            "dominator tree",
            Strength.SOLID,
            place,
        ),
        Evidence(
            f"it retains {format_bytes(accumulation.retained_bytes)}, each of them"
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
        ),
        evidence=evidence,
        next_steps=(
            f"coreheap owners CORE {place:#x} shows who keeps the container",
            f"coreheap explain CORE {samples} says what some of its elements are",
            "take a second core some time later: a container that only grows wants a limit or an expiry",
        ),
        weakened_by=(
            "retained sizes are an estimate: a stale pointer or a number that looks like one counts as a holder, and"
            " then the bytes belong to no single chunk",
            "caches and indexes are meant to be large",
        ),
    )
