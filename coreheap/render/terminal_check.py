"""What ``check`` says to people: whether the heap is sound, how the process ended, what is damaged, and what was looked at.

Knows: the order of that page. Does not know: the parts that it shares with ``analyze`` (``terminal``, ``terminal_damage``).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from rich.text import Text

from coreheap.evidence import Anomaly, Confidence
from coreheap.heap import HeapSnapshot
from coreheap.quantities import format_address, format_count
from coreheap.render.damage_wording import damage_sentence
from coreheap.render.escaping import printable, shortened
from coreheap.render.integrity import (
    Integrity,
    Soundness,
    integrity_of,
    is_about_integrity,
    last_words,
    surest_damage,
    wrong_free_of,
)
from coreheap.render.page import Page, PageStyle, counted, part_of_all
from coreheap.render.terminal import SEVERITY_STYLES, add_gaps, add_headline, add_phases
from coreheap.render.terminal_damage import add_crash, add_damages
from coreheap.render.verdict_text import is_damage, is_grave_damage, uncapitalized
from coreheap.render.wording import LONGEST_TEXT, anomaly_sentence, finding_sentence, humanized
from coreheap.render.wrong_free_wording import wrong_free_sentence
from coreheap.report import Finding, Report

REASONS_SHOWN = 5
EXAMPLES_OF_A_CODE = 3
"""Contradictions of one kind that are shown; all that the report holds with -v."""
CODES_SHOWN = 12
ARENAS_NAMED = 12
STEPS_SHOWN = 8

_VERDICT_STYLES = {
    Soundness.SOUND: "bold green",
    Soundness.WRONG_FREE: "bold red",
    Soundness.DAMAGED: "bold red",
    Soundness.UNKNOWN: "bold yellow",
}
_NOT_DAMAGED = (Soundness.SOUND, Soundness.WRONG_FREE)


def check_text(report: Report, style: PageStyle) -> str:
    """The page of ``check``; ends in a newline."""
    page = Page(style)
    integrity = integrity_of(report)
    findings = tuple(finding for finding in report.findings if is_about_integrity(finding))
    add_headline(page, report)
    _verdict(page, report, integrity, findings)
    if report.crash is not None:
        add_crash(page, report.crash, report.process.pid, brief=False)
    if report.damages:
        add_damages(page, report.damages, brief=False)
    _findings(page, findings)
    _anomalies(page, report)
    if report.heap is not None:
        _checked(page, report, report.heap, integrity)
    add_gaps(page, report)
    if style.verbose:
        add_phases(page, report)
    return page.text()


def _verdict(page: Page, report: Report, integrity: Integrity, findings: tuple[Finding, ...]) -> None:
    page.heading("Verdict")
    confidence = "" if integrity.confidence is None else f" ({integrity.confidence.value})"
    answer = f"The heap is {integrity.verdict.value}{confidence}"
    if integrity.verdict is Soundness.UNKNOWN:
        answer = "Whether the heap is sound is unknown"
    grave = next((finding for finding in findings if is_grave_damage(finding)), None)
    sure = surest_damage(report)
    if integrity.verdict is Soundness.DAMAGED and grave is not None:
        text = f"{answer}: {uncapitalized(finding_sentence(grave))}"
    elif sure is not None:
        is_plain = sure.confidence.rank >= Confidence.STRONG.rank
        doubt = "" if is_plain else f" what happened is {sure.confidence.value} only:"
        text = f"{answer}:{doubt} {uncapitalized(damage_sentence(sure))}"
    elif integrity.verdict is Soundness.DAMAGED:
        text = f"{answer}: malloc found it and stopped the process: {shortened(last_words(report), LONGEST_TEXT)}"
    elif integrity.verdict is Soundness.WRONG_FREE and (wrong := wrong_free_of(report)) is not None:
        text = f"malloc's data is consistent ({Confidence.STRONG.value}). {wrong_free_sentence(wrong)}"
    elif integrity.verdict is Soundness.SOUND:
        text = f"{answer}: nothing in {_looked_at(integrity)} contradicts malloc's own rules."
    elif integrity.reasons and integrity.verdict is Soundness.UNKNOWN:
        text = f"{answer}, because {shortened(integrity.reasons[0], 2 * LONGEST_TEXT)}."
    else:
        text = f"{answer}."
    page.add(Text(text, style=_VERDICT_STYLES[integrity.verdict]), indent=1)
    is_unknown = integrity.verdict is Soundness.UNKNOWN
    reasons = integrity.reasons[1:] if is_unknown else integrity.reasons
    shown = reasons if page.style.verbose else reasons[:REASONS_SHOWN]
    for reason in shown:
        opening = "weakened by: " if integrity.verdict in _NOT_DAMAGED else "also: "
        page.bullet(Text.assemble((opening, "bold"), shortened(reason, 2 * LONGEST_TEXT)), sign="?", indent=1)
    _rest(page, len(shown), len(reasons), "reasons")
    others = integrity.certain_damages - 1
    if others > 0:
        page.bullet(f"{counted(others, 'more damage is', 'more damages are')} as sure.", sign="*", indent=1)
    if report.is_partial:
        page.bullet("Partial: not all that this rests on is known; see the gaps below.", "!", "yellow", indent=1)
    for defect in report.defects:
        text = f"A part of this failed, a defect of coreheap: {shortened(defect, LONGEST_TEXT)}"
        page.bullet(text, sign="!", style="bold red", indent=1)


def _looked_at(integrity: Integrity) -> str:
    return (
        f"{counted(integrity.chunks_checked, 'chunk', 'chunks')}, "
        f"{counted(integrity.lists_checked, 'free list', 'free lists')} and "
        f"{counted(integrity.arenas_checked, 'arena', 'arenas')}"
    )


def _findings(page: Page, findings: tuple[Finding, ...]) -> None:
    """Each finding in a sentence, then what to do, each step once."""
    if not findings:
        return
    page.heading("Findings")
    for finding in findings:
        line = Text()
        line.append(printable(finding.code), style=SEVERITY_STYLES[finding.severity])
        line.append(f" ({finding.severity.value}, {finding.confidence.value})  ", style="dim")
        # Damage has a part of its own above: here its subject says which finding it is.
        line.append(shortened(finding.subject, LONGEST_TEXT) if is_damage(finding) else finding_sentence(finding))
        page.bullet(line, sign="*")
    steps = tuple(dict.fromkeys(step for finding in findings for step in finding.next_steps))
    shown = steps if page.style.verbose else steps[:STEPS_SHOWN]
    for step in shown:
        page.bullet(Text.assemble(("next: ", "bold"), shortened(step, 2 * LONGEST_TEXT)))
    _rest(page, len(shown), len(steps), "steps", indent=2)


def _anomalies(page: Page, report: Report) -> None:
    """Contradictions by their kind, with the first few of each."""
    if not report.anomaly_count:
        return
    page.heading("Where the heap contradicts itself", counted(report.anomaly_count, "place", "places"))
    by_code = _by_code(report.anomalies)
    kinds = by_code if page.style.verbose else by_code[:CODES_SHOWN]
    for code, anomalies in kinds:
        locked = sum(anomaly.arena_locked is True for anomaly in anomalies)
        note = f", {format_count(locked)} of them in arenas that were locked" if locked else ""
        if locked == len(anomalies):
            note = ", in an arena that was locked" if locked == 1 else ", all in arenas that were locked"
        page.bullet(f"{humanized(code)}: {counted(len(anomalies), 'place', 'places')}{note}", sign="!")
        examples = anomalies if page.style.verbose else anomalies[:EXAMPLES_OF_A_CODE]
        for anomaly in examples:
            page.bullet(_anomaly_text(anomaly), indent=4)
        _rest(page, len(examples), len(anomalies), "places", indent=4)
    _rest(page, len(kinds), len(by_code), "kinds", indent=2)
    told = len(report.anomalies)
    if rest := part_of_all(told, report.anomaly_count, "places", "counted only; the report holds the first of them"):
        page.add(Text(rest, style="dim"), indent=2)


def _by_code(anomalies: Iterable[Anomaly]) -> list[tuple[str, list[Anomaly]]]:
    ordered = sorted(anomalies, key=lambda anomaly: anomaly.code)
    groups = [(code, list(group)) for code, group in groupby(ordered, lambda anomaly: anomaly.code)]
    return sorted(groups, key=lambda group: -max(anomaly.confidence.rank for anomaly in group[1]))


def _anomaly_text(anomaly: Anomaly) -> str:
    text = anomaly_sentence(anomaly).partition(" at ")[2]
    message = f'; glibc says "{shortened(anomaly.message, LONGEST_TEXT)}"' if anomaly.message else ""
    return f"{text}{message} ({anomaly.confidence.value})"


def _checked(page: Page, report: Report, heap: HeapSnapshot, integrity: Integrity) -> None:
    """What was looked at, so that "sound" says something; and the locks, which tell what was in motion."""
    page.heading("What was checked")
    mmapped = f", {counted(heap.mmapped_count, 'mmapped one', 'mmapped ones')} among them" if heap.mmapped_count else ""
    page.bullet(f"{counted(integrity.chunks_checked, 'chunk', 'chunks')}{mmapped}: size, flags, neighbours, lists")
    broken = sum(bool(free_list.error) for free_list in heap.free_lists)
    blocks = sum(free_list.count for free_list in heap.free_lists)
    cut = f"; {counted(broken, 'list', 'lists')} could not be followed to the end" if broken else ""
    lists = counted(integrity.lists_checked, "free list", "free lists")
    page.bullet(f"{lists} with {counted(blocks, 'chunk', 'chunks')} (tcaches, fastbins, bins){cut}")
    heaps = sum(len(arena.sub_heaps) for arena in heap.arenas)
    page.bullet(
        f"{counted(integrity.arenas_checked, 'arena', 'arenas')}, {counted(heaps, 'sub-heap', 'sub-heaps')}, "
        f"{counted(len(heap.thread_caches), 'tcache structure', 'tcache structures')}: their structures and tops"
    )
    locked = [arena.index for arena in heap.arenas if arena.locked]
    unknown = sum(arena.locked is None for arena in heap.arenas)
    if locked:
        named = ", ".join(str(index) for index in locked[:ARENAS_NAMED])
        more = f" and {len(locked) - ARENAS_NAMED:,} more" if len(locked) > ARENAS_NAMED else ""
        noun = "arena" if len(locked) == 1 else "arenas"
        page.bullet(
            f"{noun} {named}{more} locked: a thread was inside malloc there, which leaves odd states for a moment", "!"
        )
    else:
        unsure = f"; of {counted(unknown, 'arena', 'arenas')} this is not known" if unknown else ""
        page.bullet(f"no arena was locked{unsure}")
    if heap.identity.main_arena is not None:
        page.add(
            Text(
                f"{printable(heap.identity.name)} {printable(heap.identity.libc_version or '')}, "
                f"main_arena {format_address(heap.identity.main_arena)}".replace(" ,", ","),
                style="dim",
            ),
            indent=2,
        )


def _rest(page: Page, shown: int, total: int, what: str, indent: int = 1) -> None:
    if rest := part_of_all(shown, total, what, "-v"):
        page.add(Text(rest, style="dim"), indent=indent)
