"""ALLOCATOR-LOCKED: a thread was inside malloc when the core was written, and what it works on may be half done."""

from __future__ import annotations

from coreheap.checks.protocol import Case
from coreheap.damage import DamageKind
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.report import Finding, Quantity, Severity, Unit

ARENAS_NAMED = 8


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all arenas."""
    heap = case.heap
    locked = [arena for arena in heap.arenas if arena.locked] if heap is not None else []
    if heap is None or not locked:
        return ()
    evidence = tuple(
        Evidence(f"the mutex of arena {arena.index} is taken", "malloc_state", Strength.PROOF, arena.address)
        for arena in locked[:ARENAS_NAMED]
    )
    transitional = sum(damage.kind is DamageKind.IN_TRANSITION for damage in case.damages)
    doubted = sum(bool(anomaly.arena_locked) for anomaly in heap.anomalies)
    names = ", ".join(str(arena.index) for arena in locked[:ARENAS_NAMED])
    return (
        Finding(
            code="ALLOCATOR-LOCKED",
            severity=Severity.INFO,
            confidence=confidence_from(evidence),
            subject=f"arena {names}" + (", ..." if len(locked) > ARENAS_NAMED else ""),
            quantities=(
                Quantity("locked_arenas", len(locked), Unit.COUNT),
                Quantity("contradictions", doubted, Unit.COUNT),
                Quantity("transitional_damages", transitional, Unit.COUNT),
            ),
            evidence=evidence,
            next_steps=(
                "compare with a core of another moment: what malloc was doing is gone there, damage is not",
                "coreheap threads CORE shows which threads use the arena",
            ),
            weakened_by=("a process that died inside malloc leaves its arena locked as well",),
        ),
    )
