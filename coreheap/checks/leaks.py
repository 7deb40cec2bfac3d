"""LEAK and POSSIBLE-LEAK: live chunks that the program can no longer free, or perhaps cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from coreheap.checks.protocol import Case
from coreheap.doubts import Doubt, doubt, gap_consequences, heap_doubts, identity_doubts, map_doubts, thread_doubts
from coreheap.evidence import Confidence, Evidence, Strength, confidence_from
from coreheap.heap import HeapSnapshot
from coreheap.leaks import Heuristic, LeakGroup, LeakReport, Verdict, VerdictTotal
from coreheap.quantities import KIB, MIB, format_bytes, format_count
from coreheap.report import Finding, Quantity, Severity, Unit

SMALLEST_BYTES = 1 * KIB
"""Lost bytes below which nothing is said: programs that run for long lose a few small blocks once and never again."""
WARNING_BYTES, WARNING_SHARE = 1 * MIB, 0.05
WARNING_BYTES_ALONE = 16 * MIB
ERROR_BYTES, ERROR_SHARE = 64 * MIB, 0.25
"""Lost bytes and share of the live bytes from which a leak is a warning (or by bytes alone), and an error."""

POSSIBLE_BYTES, POSSIBLE_SHARE = 1 * MIB, 0.1
POSSIBLE_WARNING_BYTES, POSSIBLE_WARNING_SHARE = 64 * MIB, 0.25
"""The same for what is possibly lost; perl, for one, keeps a seventh of its heap by interior pointers alone."""

MANY_LIKE_CHUNKS = 100
GROUPS_NAMED = 3
SAVED_PER_MISSING = 100
"""Missing roots of more than one byte in so many saved ones speak strongly against a verdict on all roots."""

LEFT_OUT_BY_WRITERS = {
    "gdb": "gdb wrote this core, and leaves out without a trace what a program excludes from dumps (MADV_DONTDUMP)",
    "qemu": "qemu-user wrote this core, and leaves out memory that the program made inaccessible (PROT_NONE)",
}
"""What a core lacks by who wrote it (gdb 13, gcore; qemu 7.2, linux-user/elfload.c, vma_dump_size)."""
UNSEEN_POINTERS = (
    "pointers that are kept encoded or compressed, at unaligned addresses, in files or inside the kernel (epoll_data,"
    " timers) are not seen: what only they hold counts as lost"
)


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding of each code."""
    if case.heap is None or case.leaks is None:
        return ()
    return (*_leak(case, case.heap, case.leaks), *_possible_leak(case, case.heap, case.leaks))


def _leak(case: Case, heap: HeapSnapshot, leaks: LeakReport) -> Iterator[Finding]:
    leaders = leaks.total(Verdict.DEFINITELY_LOST)
    led = leaks.total(Verdict.INDIRECTLY_LOST)
    lost = leaders.usable_bytes + led.usable_bytes
    if not leaders.count or lost < SMALLEST_BYTES:
        return
    share = lost / leaks.total().usable_bytes
    groups = [group for group in leaks.groups if group.verdict is Verdict.DEFINITELY_LOST]
    doubts = _doubts(case, heap, leaks)
    evidence = [
        Evidence(
            f"no register, no root and no other live chunk leads to {format_count(leaders.count)} chunks",
            "reference graph",
            # Never a proof: a pointer may be encoded, or in the kernel's hands.
            Strength.SOLID,
        ),
        *_group_evidence(groups),
        *(each.fact for each in doubts),
    ]
    confidence = confidence_from(evidence)
    yield Finding(
        code="LEAK",
        severity=_severity_of_leak(lost, share, confidence),
        confidence=confidence,
        subject=f"{format_count(leaders.count + led.count)} chunks",
        quantities=(
            Quantity("lost_bytes", lost, Unit.BYTES),
            Quantity("lost_share", share, Unit.SHARE),
            Quantity("definite_count", leaders.count, Unit.COUNT),
            Quantity("definite_bytes", leaders.usable_bytes, Unit.BYTES),
            Quantity("indirect_count", led.count, Unit.COUNT),
            Quantity("indirect_bytes", led.usable_bytes, Unit.BYTES),
            *_largest_group(groups),
        ),
        evidence=tuple(evidence),
        next_steps=(
            *_next_steps(groups),
            "to see who allocates, run the workload under LeakSanitizer (-fsanitize=leak), valgrind"
            " --leak-check=full or heaptrack; each costs speed",
        ),
        weakened_by=(UNSEEN_POINTERS, *_weakened_by(heap, doubts)),
    )


def _possible_leak(case: Case, heap: HeapSnapshot, leaks: LeakReport) -> Iterator[Finding]:
    """What nothing in the core leads to where something is missing, and what is held by its inside or by an encoded pointer alone.

    Only the first is a suspicion; what hangs from a chunk that is pointed into is as sure as that chunk, and does not count.
    """
    possible = leaks.total(Verdict.POSSIBLY_LOST)
    whole = leaks.total().usable_bytes
    nothing_leads = leaks.unreachable_possible
    encoded = _total_of(leaks, lambda heuristic: heuristic.is_encoding)
    rest = possible.usable_bytes - nothing_leads.usable_bytes - encoded.usable_bytes
    inside = leaks.held_inside or VerdictTotal(possible.count - nothing_leads.count - encoded.count, rest)
    counted = nothing_leads.usable_bytes + encoded.usable_bytes + inside.usable_bytes
    if counted < POSSIBLE_BYTES or counted < POSSIBLE_SHARE * whole:
        return
    share = counted / whole
    is_severe = counted >= POSSIBLE_WARNING_BYTES and share >= POSSIBLE_WARNING_SHARE
    evidence = []
    if nothing_leads.usable_bytes:
        evidence.append(
            Evidence(
                f"nothing in the core leads to {format_count(nothing_leads.count)} chunks of"
                f" {format_bytes(nothing_leads.usable_bytes)}",
                "reference graph",
                Strength.SOLID,
            )
        )
        evidence += _what_is_missing(case, leaks)
    if encoded.count:
        forms = ", ".join(f"{name.label}" for name, _ in leaks.heuristics if name.is_encoding)
        evidence.append(
            Evidence(
                f"{format_count(encoded.count)} chunks of {format_bytes(encoded.usable_bytes)} are held only by addresses that"
                f" are kept in another form ({forms})",
                "words of the core, decoded",
                Strength.HINT,
            )
        )
    if inside.count:
        evidence.append(
            Evidence(
                f"only pointers into their payloads, not to the starts, lead to {format_count(inside.count)} chunks of"
                f" {format_bytes(inside.usable_bytes)}",
                "reference graph",
                Strength.HINT,
            )
        )
    groups = [group for group in leaks.groups if group.verdict is Verdict.POSSIBLY_LOST]
    doubts = _doubts(case, heap, leaks, of_shared_memory=False)
    evidence += [each.fact for each in doubts]
    # Neither is a sign of a leak by itself.
    confidence = confidence_from(evidence) if nothing_leads.usable_bytes else Confidence.WEAK
    yield Finding(
        code="POSSIBLE-LEAK",
        severity=Severity.WARNING if is_severe and confidence is not Confidence.WEAK else Severity.INFO,
        confidence=confidence,
        subject=f"{format_count(possible.count)} chunks",
        quantities=(
            Quantity("possible_bytes", possible.usable_bytes, Unit.BYTES),
            Quantity("possible_share", possible.usable_bytes / whole, Unit.SHARE),
            Quantity("possible_count", possible.count, Unit.COUNT),
            Quantity("unreachable_bytes", nothing_leads.usable_bytes, Unit.BYTES),
            Quantity("inside_bytes", inside.usable_bytes, Unit.BYTES),
            Quantity("encoded_bytes", encoded.usable_bytes, Unit.BYTES),
            Quantity("missing_root_bytes", leaks.missing_root_bytes, Unit.BYTES),
            *_largest_group(groups),
        ),
        evidence=tuple(evidence),
        next_steps=_next_steps(groups),
        weakened_by=(
            "C++ objects of several bases, arrays with a hidden count, trees and lists that are linked by inner"
            " members, and interpreters' objects are often held by interior pointers alone, and are no leak",
            *((UNSEEN_POINTERS,) if nothing_leads.usable_bytes else ()),
            *_weakened_by(heap, doubts),
        ),
    )


def _what_is_missing(case: Case, leaks: LeakReport) -> Iterator[Evidence]:
    """Why what nothing leads to is no more than possibly lost."""
    missing = leaks.missing_root_bytes
    of_shared = _total_of(leaks, lambda heuristic: heuristic is Heuristic.MISSING_SHARED_MEMORY)
    of_stacks = _total_of(leaks, lambda heuristic: heuristic is Heuristic.SIGNAL_STACK)
    if missing:
        much = missing * SAVED_PER_MISSING > case.core.saved_bytes
        yield Evidence(
            f"{format_bytes(missing)} of writable memory are not in the core, where pointers to them can be",
            "program headers and notes",
            Strength.SOLID if much else Strength.HINT,
            speaks_against=True,
        )
    if of_shared.count:
        yield Evidence(
            f"{format_bytes(leaks.missing_shared_bytes)} of writable mapped files and shared memory are not in the core, which is"
            f" room for pointers to all of {format_count(of_shared.count)} chunks",
            "program headers and notes",
            Strength.SOLID,
            speaks_against=True,
        )
    if of_stacks.count:
        yield Evidence(
            f"{format_count(of_stacks.count)} chunks have the size of an alternate signal stack, whose address only the kernel"
            " has",
            "sizes of chunks and their content",
            Strength.SOLID,
            speaks_against=True,
        )
    if not (missing or of_shared.count or of_stacks.count):
        yield Evidence(
            "no registers are in the core, where pointers to them can be",
            "program headers and notes",
            Strength.SOLID,
            speaks_against=True,
        )


def _total_of(leaks: LeakReport, wanted: Callable[[Heuristic], bool]) -> VerdictTotal:
    parts = [total for name, total in leaks.heuristics if wanted(name)]
    return VerdictTotal(sum(part.count for part in parts), sum(part.usable_bytes for part in parts))


def _severity_of_leak(lost: int, share: float, confidence: Confidence) -> Severity:
    if confidence is Confidence.WEAK:
        return Severity.INFO
    if lost >= ERROR_BYTES and share >= ERROR_SHARE and confidence.rank >= Confidence.STRONG.rank:
        return Severity.ERROR
    if lost >= WARNING_BYTES_ALONE or (lost >= WARNING_BYTES and share >= WARNING_SHARE):
        return Severity.WARNING
    return Severity.INFO


def _group_evidence(groups: list[LeakGroup]) -> Iterator[Evidence]:
    """The largest groups; very many like chunks are the mark of a leak that goes on."""
    for group in groups[:GROUPS_NAMED]:
        size = format_bytes(group.smallest_bytes)
        if group.largest_bytes != group.smallest_bytes:
            size += f" to {format_bytes(group.largest_bytes)}"
        what = f" of type {group.type}" if group.type else ""
        led = f", which lead to {format_bytes(group.indirect_bytes)} more" if group.indirect_bytes else ""
        yield Evidence(
            f"{format_count(group.count)} of {size}{what}, {format_bytes(group.usable_bytes)} together{led}",
            "leak groups",
            Strength.SOLID if group.count >= MANY_LIKE_CHUNKS else Strength.HINT,
            group.samples[0] if group.samples else None,
        )


def _doubts(case: Case, heap: HeapSnapshot, leaks: LeakReport, *, of_shared_memory: bool = True) -> tuple[Doubt, ...]:
    """What of this core speaks against verdicts that rest on every chunk and every pointer."""
    doubts = [*heap_doubts(heap)]
    locked = sum(bool(arena.locked) for arena in heap.arenas)
    if locked:
        doubts.append(
            doubt(
                f"{format_count(locked)} arenas were locked",
                "arenas",
                "a thread was inside malloc, and may not have handed out or taken back yet what counts as in use",
            )
        )
    doubts += identity_doubts(heap)
    if leaks.missing_shared_bytes and of_shared_memory:
        doubts.append(
            doubt(
                f"{format_bytes(leaks.missing_shared_bytes)} of writable mapped files and shared memory are not in the core",
                "program headers",
                "a pointer there would hold a chunk",
            )
        )
    left_out = LEFT_OUT_BY_WRITERS.get(case.core.made_by)
    if left_out is not None:
        doubts.append(doubt(left_out, "notes of the core", "a pointer there would hold a chunk"))
    return (*doubts, *map_doubts(case.gaps), *thread_doubts(case.gaps))


def _largest_group(groups: list[LeakGroup]) -> Iterator[Quantity]:
    if not groups:
        return
    largest = max(groups, key=lambda group: group.all_bytes)
    yield Quantity("largest_group_bytes", largest.all_bytes, Unit.BYTES)
    yield Quantity("largest_group_count", largest.count, Unit.COUNT)
    yield Quantity("sample_address", largest.samples[0] if largest.samples else None, Unit.ADDRESS)
    if largest.type:
        yield Quantity("largest_group_type", largest.type, Unit.TEXT)


def _next_steps(groups: list[LeakGroup]) -> tuple[str, ...]:
    samples = [group.samples[0] for group in groups[:GROUPS_NAMED] if group.samples]
    asked = " ".join(f"{address:#x}" for address in samples)
    explain = (
        (f"coreheap explain CORE {asked} says what these chunks are, what leads to them and what they lead to",)
        if samples
        else ()
    )
    return (
        "coreheap leaks CORE lists every group; coreheap leaks CORE --list --csv every chunk",
        *explain,
        "take a second core of the same process some time later: groups that grow are the leak",
    )


def _weakened_by(heap: HeapSnapshot, doubts: Iterable[Doubt]) -> Iterator[str]:
    """What each doubt means for these chunks, and what follows from the heap's gaps."""
    yield from (each.text for each in doubts)
    yield from gap_consequences(heap)
