"""The verdict as one paragraph: the answer that a reader takes away, from a report's own numbers.

Knows: which sentence leads, and which follow from which part of the report. Does not know: terminals. A part that is not
known here is named by its topic.
"""

from __future__ import annotations

from collections.abc import Iterator

from coreheap.evidence import Confidence
from coreheap.quantities import format_bounds, format_bytes, format_share
from coreheap.render.escaping import shortened
from coreheap.render.wording import LONGEST_TEXT, finding_sentence, humanized
from coreheap.report import Finding, Report, Severity, VerdictItem

LEADS = {
    "in_use": "are live chunks: the program asked for them and has not freed them",
    "retained_free": "are free inside malloc: not a leak, but memory that was freed and not given back",
    "arena_bloat": "are free in arenas beside the main one: not a leak, but many arenas that each keep what they freed",
    "mmapped_chunks": "are large live blocks, each in a mapping of its own",
    "thread_stacks": "are thread stacks, not malloc's",
    "unjoined_threads": "are stacks of threads that have ended and that nobody joined or detached",
    "module_data": "are variables of the program and its libraries, not malloc's",
    "java": "are the Java virtual machine's own, not malloc's",
    "other_allocator": "belong to another allocator: glibc's numbers are not the whole",
    "foreign_sbrk": "were taken from the break (sbrk) by the program itself or a library, beside malloc",
    "not_malloc": "are anonymous memory that is not malloc's and that nothing in the core explains",
    "written_files": "are mapped files that the program wrote to, not malloc's: written pages of private mappings are copies of its own",
    "unknown": "are not known: missing from the core, or damaged",
}
"""What is said of the part that took the most memory."""
NOT_OF_THE_HEAP = ("call", "use")
"""Values of a finding's quantity ``place`` that are about a call of free, or the use of a freed object."""
WORTH_A_WORD = 0.05
"""Share of all from which a part that does not lead is named: live bytes, or what a trim gives back."""


def verdict_paragraph(report: Report) -> str:
    """The answer in a few sentences; empty where the report has no verdict."""
    items = [item for item in report.verdict if item.whole == "writable_private"]
    memory = (*_memory(report, items), *_shared(report), *_leaks(report), *_remedies(report, items)) if items else ()
    return " ".join((*_damage(report), *memory))


def _damage(report: Report) -> Iterator[str]:
    """What comes before all else: damage that is more than a suspicion."""
    grave = [finding for finding in report.findings if is_grave_damage(finding)]
    if grave:
        rest = "" if len(grave) == 1 else f" (the gravest of {len(grave)} such findings)"
        yield f"The heap is damaged: {uncapitalized(finding_sentence(grave[0]))}".removesuffix(".") + f"{rest}."
        return
    wrong = next((finding for finding in report.findings if is_about_a_call(finding)), None)
    if wrong is not None and wrong.confidence.rank >= Confidence.STRONG.rank:
        yield f"malloc's data is consistent. {finding_sentence(wrong)}"


def is_grave_damage(finding: Finding) -> bool:
    """Whether a finding says, more than as a suspicion, that malloc will stop or follow into foreign memory."""
    return (
        finding.severity is Severity.ERROR and finding.confidence.rank >= Confidence.STRONG.rank and is_damage(finding)
    )


def is_damage(finding: Finding) -> bool:
    """Whether a finding is a damage of the heap."""
    is_of_heap = finding.code.startswith("CORRUPTION") or finding.code in ("DOUBLE-FREE", "USE-AFTER-FREE")
    return is_of_heap and not is_about_a_call(finding)


def is_about_a_call(finding: Finding) -> bool:
    """Whether a finding is about what the program did with a pointer, and nothing of malloc's is damaged."""
    return any(quantity.name == "place" and quantity.value in NOT_OF_THE_HEAP for quantity in finding.quantities)


def uncapitalized(sentence: str) -> str:
    """A sentence that goes on behind a colon; names keep their capitals."""
    return sentence[:1].lower() + sentence[1:] if sentence[1:2].islower() or sentence[1:2] == " " else sentence


def _memory(report: Report, items: list[VerdictItem]) -> Iterator[str]:
    first = items[0]
    if report.heap is None:
        yield "No heap of glibc's malloc was found in this core."
    if first.of_resident_low is not None and first.of_resident_high is not None:
        in_memory = format_bounds(first.of_resident_low, first.of_resident_high)
        of_which = f", of which {in_memory} were in memory or swapped out" if first.of_resident_high else ""
        yield f"The program could write {format_bytes(first.of_bytes)}{of_which}."
    else:
        yield f"The program could write {format_bytes(first.of_bytes)}; how much of it was in memory is not known."
    lead = LEADS.get(first.topic, f"are {humanized(first.topic)}")
    amount = format_bytes(first.bytes)
    if first.resident_low is not None and first.resident_high is not None:
        resident = format_bounds(first.resident_low, first.resident_high)
        amount += f" ({resident} in memory)" if resident != amount else ""
    sure = {Confidence.CERTAIN: "", Confidence.STRONG: "", Confidence.PLAUSIBLE: "Probably, "}.get(
        first.confidence, "Perhaps, "
    )
    yield f"{sure}{amount}, {format_share(first.bytes, first.of_bytes)} of it, {lead}."
    live = next((item for item in items if item.topic == "in_use"), None)
    if live is not None and live is not first and live.bytes >= WORTH_A_WORD * live.of_bytes:
        yield f"Live chunks hold {format_bytes(live.bytes)}."


def _shared(report: Report) -> Iterator[str]:
    shared = next((item for item in report.verdict if item.topic == "shared_memory"), None)
    if shared is not None:
        yield (
            f"Beside that it maps {format_bytes(shared.bytes)} of shared memory, of which what was touched counts to its RSS and"
            " its memory cgroup."
        )


def _leaks(report: Report) -> Iterator[str]:
    lost = next((item for item in report.verdict if item.topic == "lost"), None)
    possibly = next((item for item in report.verdict if item.topic == "possibly_lost"), None)
    if lost is not None:
        yield f"{format_bytes(lost.bytes)} of live chunks are leaked ({lost.confidence.value})."
    if possibly is not None:
        yield f"{format_bytes(possibly.bytes)} may be leaked ({possibly.confidence.value})."
    if lost is None and possibly is None and report.leaks is not None and report.leaks.total().count:
        yield "No leak that matters was found among glibc's live chunks."


def _remedies(report: Report, items: list[VerdictItem]) -> Iterator[str]:
    free = report.free_memory
    if free is not None and free.trim.resident_high >= WORTH_A_WORD * items[0].of_bytes:
        saved = format_bounds(free.trim.resident_low, free.trim.resident_high)
        yield f"malloc_trim(0) would give back {saved}."
    leads = items[0].topic in ("in_use", "mmapped_chunks")
    if leads and report.leaks is not None and report.leaks.total().count and report.retained is None:
        yield "What keeps them alive was not looked for: coreheap top CORE."
    named = [finding for finding in report.findings if finding.severity is not Severity.INFO]
    if named:
        yield f"See {_codes(named)} below."


def _codes(findings: list[Finding]) -> str:
    codes = list(dict.fromkeys(shortened(finding.code, LONGEST_TEXT) for finding in findings))
    return codes[0] if len(codes) == 1 else f"{', '.join(codes[:-1])} and {codes[-1]}"
