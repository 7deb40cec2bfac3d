"""CORRUPTION-*, DOUBLE-FREE, USE-AFTER-FREE: each damage of the heap as something to act on.

Knows: which damage is which finding, how grave it is, and what to do next. Does not know: how damage is found
(``forensics``). Damage that malloc itself may have left for a moment is no finding here, see ``allocator_locked``.
"""

from __future__ import annotations

from collections import Counter

from coreheap.checks.protocol import Case
from coreheap.damage import Damage, DamagedPlace, DamageKind
from coreheap.heap import HeapSnapshot
from coreheap.quantities import format_address
from coreheap.report import Finding, Quantity, Severity, Unit

FINDINGS_OF_A_CODE = 10
"""The gravest damages of a code are findings of their own; the last one says how many there are more."""

_BY_KIND = {
    DamageKind.OVERFLOW: "CORRUPTION-OVERFLOW",
    DamageKind.DOUBLE_FREE: "DOUBLE-FREE",
    DamageKind.USE_AFTER_FREE: "USE-AFTER-FREE",
    DamageKind.INVALID_FREE: "CORRUPTION-INVALID-FREE",
}

_BY_PLACE = {
    DamagedPlace.CHUNK_HEADER: "CORRUPTION-HEADER",
    DamagedPlace.PREV_SIZE: "CORRUPTION-HEADER",
    DamagedPlace.TOP: "CORRUPTION-HEADER",
    DamagedPlace.MMAPPED_HEADER: "CORRUPTION-MMAPPED",
    DamagedPlace.TCACHE_STRUCTURE: "CORRUPTION-ALLOCATOR-DATA",
    DamagedPlace.MALLOC_STATE: "CORRUPTION-ALLOCATOR-DATA",
    DamagedPlace.HEAP_INFO: "CORRUPTION-ALLOCATOR-DATA",
    DamagedPlace.MALLOC_PAR: "CORRUPTION-ALLOCATOR-DATA",
}

NOT_NOTICED = frozenset(
    {
        "list_wrong_key",
        "list_count_mismatch",
        "list_not_sorted",
        "binmap_bit_missing",
        "last_remainder_damaged",
        "more_than_system_mem",
        "malloc_par_damaged",
        "mmapped_count_mismatch",
        "fastbin_content_changed",
        "bin_content_changed",
        "tcache_entry_without_count",
        "free_unlisted",
    }
)
"""Contradictions that malloc neither aborts on nor follows into other memory."""


WRITTEN_BY_MALLOC = (DamagedPlace.MALLOC_STATE, DamagedPlace.TCACHE_STRUCTURE)
"""Where a watchpoint stops inside malloc."""


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding for each of the gravest damages, at most FINDINGS_OF_A_CODE of one code."""
    heap = case.heap
    if heap is None:
        return ()
    told = [(code_of(damage), damage) for damage in case.damages if damage.kind is not DamageKind.IN_TRANSITION]
    totals = Counter(code for code, _ in told)
    seen: Counter[str] = Counter()
    made = []
    for code, damage in told:
        seen[code] += 1
        if seen[code] <= FINDINGS_OF_A_CODE:
            more = totals[code] - FINDINGS_OF_A_CODE if seen[code] == FINDINGS_OF_A_CODE else 0
            made.append(_finding(heap, code, damage, more))
    return tuple(made)


def code_of(damage: Damage) -> str:
    """The finding that a damage is."""
    if damage.place is DamagedPlace.MMAPPED_HEADER:
        return "CORRUPTION-MMAPPED"
    return _BY_KIND.get(damage.kind) or _BY_PLACE.get(damage.place, "CORRUPTION-FREE-LIST")


def severity_of(heap: HeapSnapshot, damage: Damage) -> Severity:
    """Error where glibc stops the process or follows the damage into other memory, else warning."""
    codes = {heap.anomalies[number].code for number in damage.anomalies}
    unnoticed = damage.message is None and codes <= NOT_NOTICED
    return Severity.WARNING if unnoticed or damage.place is DamagedPlace.FREE_CONTENT else Severity.ERROR


def _finding(heap: HeapSnapshot, code: str, damage: Damage, more: int) -> Finding:
    victim, culprit = damage.victim, damage.culprit
    quantities = [
        Quantity("address", damage.bytes.start, Unit.ADDRESS),
        Quantity("byte_count", damage.bytes.byte_count, Unit.BYTES),
        Quantity("place", damage.place.value, Unit.TEXT),
        Quantity("victim_address", victim.payload_address if victim else None, Unit.ADDRESS),
        Quantity("culprit_address", culprit.payload_address if culprit else None, Unit.ADDRESS),
        Quantity("culprit_usable_bytes", culprit.usable_bytes if culprit else None, Unit.BYTES),
        Quantity("culprit_holder", culprit.holder if culprit else None, Unit.TEXT),
        Quantity("lost_bytes", damage.lost_bytes, Unit.BYTES),
        Quantity("message", damage.message, Unit.TEXT),
        Quantity("pattern", damage.pattern.kind.value if damage.pattern else None, Unit.TEXT),
        Quantity("arena", damage.arena, Unit.COUNT),
    ]
    if more:
        quantities.append(Quantity("further_damages", more, Unit.COUNT))
    return Finding(
        code=code,
        severity=severity_of(heap, damage),
        confidence=damage.confidence,
        subject=_subject(damage),
        quantities=tuple(quantities),
        evidence=damage.evidence,
        next_steps=_next_steps(damage),
        weakened_by=damage.weakened_by,
    )


def _subject(damage: Damage) -> str:
    culprit = damage.culprit
    if culprit is not None:
        return f"block {format_address(culprit.payload_address)}"
    return f"memory at {format_address(damage.bytes.start)}"


def _next_steps(damage: Damage) -> tuple[str, ...]:
    address = format_address(damage.bytes.start)
    steps = []
    if damage.culprit is not None:
        block = format_address(damage.culprit.payload_address)
        steps.append(f"coreheap owners CORE {block} and coreheap explain CORE {block} name who holds the block")
    if damage.kind is DamageKind.BIT_FLIP:
        steps.append("one wrong bit: test the machine's memory (memtest86+, EDAC counters) before looking for a bug")
    if damage.kind in (DamageKind.DOUBLE_FREE, DamageKind.INVALID_FREE):
        steps.append("run the workload under valgrind or with -fsanitize=address: both name the calls of free")
    else:
        steps.append(
            "run the workload with -fsanitize=address (twice the time) or under valgrind (20 times and more): both stop at"
            " the write itself"
        )
    if damage.place in WRITTEN_BY_MALLOC:
        steps.append(
            "malloc itself writes this word all the time: watch the first words of the blocks named, from their free on"
        )
    else:
        steps.append(f"where addresses repeat (setarch -R): gdb, watch *(long*){address}, stops at the write")
    return tuple(steps)
