"""Damages and the crash as parts of a page for people: in full for ``check``, in a few lines for ``analyze``.

Knows: what fits 80 columns. Does not know: the words (``damage_wording``), nor how any of it was found.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from coreheap.crash import CrashContext, Frame
from coreheap.damage import Damage, DamageKind
from coreheap.evidence import Confidence, Evidence
from coreheap.quantities import format_address, format_bytes
from coreheap.render.damage_wording import (
    bytes_text,
    chunk_text,
    damage_sentence,
    damage_title,
    frames_end_text,
    function_text,
    module_text,
    place_text,
    reach_text,
    repair_text,
    signal_text,
    source_text,
)
from coreheap.render.discretion import without_content
from coreheap.render.escaping import printable, shortened
from coreheap.render.page import Page, counted, part_of_all, plain_table
from coreheap.render.wording import LONGEST_TEXT
from coreheap.render.wrong_free_wording import stale_use_text, wrong_free_text

DAMAGES_SHOWN = 10
"""Damages that ``check`` tells of; ``analyze`` tells of fewer."""
DAMAGES_IN_BRIEF = 3
FRAMES_SHOWN = 20
FRAMES_IN_BRIEF = 10
REGISTERS_SHOWN = 8
EVIDENCE_SHOWN = 6
LABEL_CELLS = 11
NOTHING_FOREIGN = frozenset({DamageKind.DOUBLE_FREE, DamageKind.INVALID_FREE, DamageKind.IN_TRANSITION})
"""Kinds whose bytes are malloc's own, in a place or a moment that is wrong."""

_CONFIDENCE_STYLES = {Confidence.CERTAIN: "bold red", Confidence.STRONG: "bold red", Confidence.PLAUSIBLE: "yellow"}


def add_crash(page: Page, crash: CrashContext, pid: int | None, *, brief: bool) -> None:
    """How the process with that id ended. In brief: without registers and with the first frames alone."""
    page.heading("Crash", signal_text(crash, pid))
    message = crash.abort_message
    if message is not None:
        _labelled(page, "message", shortened(message.text.strip(), LONGEST_TEXT))
        if not brief:
            _labelled(page, "", f"{message.kind.value.replace('_', ' ')}, {message.confidence.value}", style="dim")
    if crash.handled_signal is not None:
        name = crash.handled_signal_name or f"signal {crash.handled_signal}"
        _labelled(
            page, "came first", f"{printable(name)}: the process ended in its handler; the fault is that signal's"
        )
    if crash.fault is not None:
        _labelled(page, "fault at", place_text(crash.fault))
    if crash.wrong_free is not None:
        _labelled(page, "wrong free", wrong_free_text(crash.wrong_free))
    if crash.stale_use is not None:
        _labelled(page, "stale use", stale_use_text(crash.stale_use))
    if crash.inside_malloc:
        _labelled(page, "inside", "malloc: the thread was in one of malloc's functions")
    if not brief:
        shown = crash.registers if page.style.verbose else crash.registers[:REGISTERS_SHOWN]
        for note in shown:
            place = f"{printable(note.name)} = {place_text(note.place)}"
            _labelled(page, "register" if note is shown[0] else "", place)
        _rest(page, len(shown), len(crash.registers), "registers", "-v")
    if crash.frames:
        _backtrace(page, crash, brief=brief)
    _labelled(page, "signature", f"{printable(crash.signature)}")
    if page.style.verbose and not brief:
        _labelled(page, "", ", ".join(shortened(part, LONGEST_TEXT) for part in crash.signature_parts), style="dim")


def is_worth_telling(crash: CrashContext) -> bool:
    """Whether there is more to say of a crash than its signal: a fault, glibc's words, registers of note, or a thread inside malloc."""
    return bool(crash.fault or crash.abort_message or crash.registers or crash.inside_malloc)


def add_damages(page: Page, damages: tuple[Damage, ...], *, brief: bool) -> None:
    """What is damaged, the gravest first. In brief: where, and the blocks, without evidence."""
    page.heading("Damage", counted(len(damages), "place", "places"))
    limit = DAMAGES_IN_BRIEF if brief else DAMAGES_SHOWN
    shown = damages if page.style.verbose and not brief else damages[:limit]
    for number, damage in enumerate(shown, 1):
        if not brief:
            page.add()
        _damage(page, number, damage, brief=brief)
    _rest(page, len(shown), len(damages), "damages", "coreheap check" if brief else "-v")


def _damage(page: Page, number: int, damage: Damage, *, brief: bool) -> None:
    title = Text("  ")
    title.append(f"{number}. {damage_title(damage)}", style=_CONFIDENCE_STYLES.get(damage.confidence, ""))
    title.append(f"  {damage.confidence.value}", style="dim")
    page.add(title)
    page.add(damage_sentence(damage), indent=5)
    _labelled(page, "at" if damage.kind in NOTHING_FOREIGN else "foreign", bytes_text(damage), indent=5)
    if damage.culprit is not None:
        label = "block" if damage.kind in NOTHING_FOREIGN else "culprit"
        _labelled(page, label, chunk_text(damage.culprit), indent=5)
        if not brief and (reach := reach_text(damage)):
            _labelled(page, "", reach, indent=5)
    if damage.victim is not None and damage.victim != damage.culprit:
        _labelled(page, "victim", chunk_text(damage.victim), indent=5)
    if damage.listed_blocks:
        blocks = ", ".join(map(format_address, damage.listed_blocks))
        _labelled(page, "was on it", f"free, and counted as in use: {blocks}", indent=5)
    if brief:
        return
    if damage.repair is not None:
        _labelled(page, "repair", repair_text(damage.repair, damage.pattern), indent=5)
    says = f'"{shortened(damage.message, LONGEST_TEXT)}"' if damage.message else "nothing: it does not notice"
    _labelled(page, "glibc says", says, indent=5)
    if damage.lost_bytes:
        _labelled(page, "lost", f"{format_bytes(damage.lost_bytes)} that no chunk could be given", indent=5)
    _evidence(page, damage.evidence)
    told = {fact.statement for fact in damage.evidence if fact.speaks_against}
    for reason in (reason for reason in damage.weakened_by if reason not in told):
        page.bullet(Text.assemble(("weakened by: ", "bold"), shortened(reason, 2 * LONGEST_TEXT)), sign="?", indent=5)


def _evidence(page: Page, evidence: tuple[Evidence, ...]) -> None:
    shown = evidence if page.style.verbose else evidence[:EVIDENCE_SHOWN]
    for fact in shown:
        place = "" if fact.address is None else f" at {format_address(fact.address)}"
        line = Text(shortened(without_content(fact.statement), 2 * LONGEST_TEXT))
        line.append(f" ({shortened(fact.source, LONGEST_TEXT)}{place}; {fact.strength.name.lower()})", style="dim")
        page.bullet(line, sign="x" if fact.speaks_against else "+", indent=5)
    _rest(page, len(shown), len(evidence), "pieces of evidence", "-v", indent=5)


def _backtrace(page: Page, crash: CrashContext, *, brief: bool) -> None:
    limit = FRAMES_IN_BRIEF if brief else FRAMES_SHOWN
    shown = crash.frames if page.style.verbose and not brief else crash.frames[:limit]
    with_source = not brief and page.width >= 112
    columns = [("", False), ("#", True), ("address", False), ("function", False), ("module", False)]
    columns += [("found by", False)] if with_source else []
    table = plain_table(columns, wide_column=3)
    for frame in shown:
        table.add_row(*_frame_cells(frame, with_source))
    page.add(table, indent=2)
    _rest(page, len(shown), len(crash.frames), "frames", "coreheap check" if brief else "-v")
    if any(not frame.is_certain for frame in shown):
        page.bullet("not certain: a guess from frame pointers or words of the stack, which may be stale", sign="?")
    if len(shown) == len(crash.frames) and crash.frames_end != "complete":
        page.bullet(f"the backtrace ends here: {frames_end_text(crash)}", sign="-")


def _frame_cells(frame: Frame, with_source: bool) -> list[str]:
    cells = [
        "" if frame.is_certain else "?",
        str(frame.number),
        format_address(frame.program_counter),
        function_text(frame) + (" (a signal came here)" if frame.is_interrupted else ""),
        _cut(module_text(frame), 28),
    ]
    return [*cells, source_text(frame)] if with_source else cells


def _cut(text: str, cells: int) -> str:
    """The end of a text, which is what tells modules and their offsets apart."""
    return text if len(text) <= cells else f"...{text[-(cells - 3) :]}"


def _labelled(page: Page, label: str, text: str, *, indent: int = 2, style: str = "") -> None:
    """A line with a dim label in front; further lines stand below the text."""
    row = Table.grid(padding=0)
    row.add_column(width=LABEL_CELLS, no_wrap=True)
    row.add_column(ratio=1, overflow="fold")
    row.add_row(Text(label, style="dim"), Text(text, style=style))
    page.add(row, indent=indent)


def _rest(page: Page, shown: int, total: int, what: str, how: str, indent: int = 2) -> None:
    if rest := part_of_all(shown, total, what, how):
        page.add(Text(rest, style="dim"), indent=indent)
