"""A report as a page for people: the verdict first, then what it rests on.

Knows: the order of the page and what fits 80 columns. Does not know: how anything was found, nor its sentences
(``wording``). Every text out of the core goes through ``escaping``.
"""

from __future__ import annotations

from itertools import groupby

from rich.table import Table
from rich.text import Text

from coreheap.evidence import Confidence, Evidence
from coreheap.heap import BINNED_STATES, Arena, ChunkState, HeapSnapshot, StateTotal
from coreheap.quantities import format_address, format_bytes, format_count, format_share
from coreheap.render.discretion import without_content
from coreheap.render.escaping import printable, shortened
from coreheap.render.free_memory_view import add_free_memory
from coreheap.render.integrity import is_about_integrity
from coreheap.render.page import Page, PageStyle, counted, part_of_all, plain_table
from coreheap.render.terminal_damage import add_crash, add_damages, is_worth_telling
from coreheap.render.terminal_leaks import add_leaks
from coreheap.render.terminal_maps import ledger_with_residency
from coreheap.render.terminal_settings import add_settings
from coreheap.render.verdict_text import verdict_paragraph
from coreheap.render.wording import (
    LONGEST_TEXT,
    address_or_unknown,
    anomaly_sentence,
    bytes_or_unknown,
    finding_sentence,
    gap_sentence,
    humanized,
    quantity_label,
    quantity_text,
    share_text,
    verdict_text,
    verdict_whole,
)
from coreheap.report import Finding, LedgerNode, Report, Severity, Unit, VerdictItem

SEVERITY_STYLES = {Severity.INFO: "green", Severity.WARNING: "yellow", Severity.ERROR: "bold red"}
CONFIDENCE_STYLES = {
    Confidence.CERTAIN: "bold",
    Confidence.STRONG: "bold",
    Confidence.PLAUSIBLE: "",
    Confidence.WEAK: "dim",
}

LEDGER_CHILDREN = 12
"""Nodes shown below one ledger node; smaller ones are summed up in one line."""
LEDGER_DEPTH = 3
"""Levels of the ledger below its root that are shown; all of them with -v."""
LIST_LENGTH = 10
"""Gaps, anomalies and pieces of evidence that are shown of each list."""


def report_text(report: Report, style: PageStyle) -> str:
    """The whole report as text; ends in a newline."""
    page = Page(style)
    add_headline(page, report)
    _verdict(page, report)
    if report.damages:
        add_damages(page, report.damages, brief=True)
    if report.crash is not None and is_worth_telling(report.crash):
        add_crash(page, report.crash, report.process.pid, brief=True)
    _ledger(page, report.ledger)
    if report.heap is not None:
        _states(page, report, report.heap)
        _arenas(page, report.heap)
    if report.free_memory is not None:
        add_free_memory(page, report.free_memory)
    if report.leaks is not None and report.heap is not None:
        add_leaks(page, report.leaks)
    _findings(page, report)
    if report.settings is not None and report.heap is not None:
        add_settings(page, report.settings)
    add_gaps(page, report)
    _anomalies(page, report)
    if report.heap is not None:
        _allocator(page, report.heap)
    if style.verbose:
        add_phases(page, report)
    return page.text()


def add_headline(page: Page, report: Report) -> None:
    """The file, the process, and how it ended, in three or four lines."""
    core, process = report.core, report.process
    made_by = "" if core.made_by == "unknown" else f", written by {_maker(core.made_by)}"
    packed = f", {core.compression} compressed" if core.compression else ""
    complete = "complete"
    if core.truncated:
        complete = f"truncated (holds {share_text(core.coverage)} of what it promises)"
    page.add(
        Text.assemble(
            (f"coreheap {printable(report.tool_version)}", "bold"),
            f"  {shortened(core.path, LONGEST_TEXT)}",
        )
    )
    page.add(f"core     {format_bytes(core.file_bytes)}, {complete}{packed}{made_by}")
    threads = counted(process.thread_count, "thread", "threads")
    signal = f", ended by {printable(process.signal_name)}" if process.signal_name else ""
    fault = f", fault address {format_address(process.fault_address)}" if process.fault_address is not None else ""
    pid = "process" if process.pid is None else f"process {process.pid}"
    page.add(f"{pid}, {printable(process.architecture)}, {threads}{signal}{fault}")
    command = process.command_line or process.executable
    if command:
        page.add(f"command  {shortened(command, LONGEST_TEXT)}")


def _maker(made_by: str) -> str:
    return "the kernel" if made_by == "kernel" else printable(made_by)


def _verdict(page: Page, report: Report) -> None:
    page.heading("Verdict")
    if not report.verdict:
        page.bullet("Nothing can be said about where the memory went.", indent=1)
    if paragraph := verdict_paragraph(report):
        page.add(Text(paragraph, style="bold"), indent=1)
        page.add()
    for whole, group in groupby(report.verdict, verdict_whole):
        items = tuple(group)
        page.add(f" {whole}")
        with_residency = any(item.resident_high is not None for item in items)
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(justify="right", no_wrap=True)
        table.add_column(justify="right", style="bold", no_wrap=True)
        if with_residency:
            table.add_column(justify="right", no_wrap=True)
        table.add_column()
        table.add_column(no_wrap=True)
        if with_residency:
            # Behind all columns: a row before one is a cell more than that column has, and costs the last row.
            table.add_row("", "", Text("in memory", style="dim"), "", "")
        for item in items:
            table.add_row(
                f" {format_share(item.bytes, item.of_bytes):>7}",
                format_bytes(item.bytes),
                *((_in_memory(item),) if with_residency else ()),
                verdict_text(item),
                Text(item.confidence.value, style=CONFIDENCE_STYLES[item.confidence]),
            )
        page.add(table)
        for reason in dict.fromkeys(reason for item in items for reason in item.weakened_by):
            page.bullet(Text.assemble(("weakened by: ", "bold"), shortened(reason, LONGEST_TEXT)), sign="?", indent=1)
    counts = [
        f"{count} {severity.value}"
        for severity in sorted(Severity, key=lambda severity: -severity.rank)
        if (count := sum(finding.severity is severity for finding in report.findings))
    ]
    if counts:
        page.bullet(f"Findings below: {', '.join(counts)}.", sign="*", indent=1)
    if report.is_partial:
        page.bullet(
            "Partial: not all that these numbers rest on is known; see the gaps below.",
            sign="!",
            style="yellow",
            indent=1,
        )
    for defect in report.defects:
        page.bullet(
            f"A part of this report failed, a defect of coreheap: {shortened(defect, LONGEST_TEXT)}",
            sign="!",
            style="bold red",
            indent=1,
        )


def _in_memory(item: VerdictItem) -> str:
    """How much of a part was in memory; a question mark where nothing is known of it."""
    if item.resident_low is None or item.resident_high is None:
        return "?"
    least, most = format_bytes(item.resident_low), format_bytes(item.resident_high)
    return most if least == most else f"{least}..{most}"


def _ledger(page: Page, root: LedgerNode) -> None:
    page.heading("Where the memory went", f"{format_bytes(root.bytes)} of {humanized(root.name)}")
    table = Table.grid(padding=(0, 2, 0, 0))
    name_cells = 34 if page.width < 100 else 46
    if page.style.verbose:
        ledger_with_residency(page, root)
        return
    table.add_column(width=name_cells, no_wrap=True, overflow="ellipsis")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    bar_cells = max(8, page.width - name_cells - 28)
    _ledger_rows(page, table, root, root.bytes, 0, LEDGER_DEPTH, bar_cells)
    page.add(table, indent=2)


def _ledger_rows(
    page: Page, table: Table, node: LedgerNode, whole: int, level: int, depth: int, bar_cells: int
) -> None:
    children = sorted((child for child in node.children if child.bytes), key=lambda child: -child.bytes)
    # One node more takes no more room than the line that says how many are missing.
    is_cut = len(children) > LEDGER_CHILDREN + 1
    shown = children[:LEDGER_CHILDREN] if is_cut else children
    for child in shown:
        _ledger_row(page, table, humanized(child.name), child.bytes, whole, level, bar_cells)
        if level + 1 < depth:
            _ledger_rows(page, table, child, whole, level + 1, depth, bar_cells)
    rest = children[len(shown) :]
    if rest:
        name = f"{len(rest)} smaller ones"
        _ledger_row(page, table, name, sum(child.bytes for child in rest), whole, level, bar_cells)


def _ledger_row(page: Page, table: Table, name: str, byte_count: int, whole: int, level: int, bar_cells: int) -> None:
    share = byte_count / whole if whole else 0.0
    bar = page.bar(share, bar_cells)
    if level:
        bar.stylize("dim")
    label = Text("  " * level + name, style="" if level else "bold")
    table.add_row(label, format_bytes(byte_count), format_share(byte_count, whole), bar)


def _states(page: Page, report: Report, heap: HeapSnapshot) -> None:
    whole = sum((total.chunk_bytes for total in report.totals.values()), 0)
    page.heading("Chunks by state")
    table = plain_table((("state", False), ("chunks", True), ("bytes", True), ("usable", True), ("share", True)))
    for state in ChunkState:
        total = report.totals.get(state, StateTotal())
        if total.count:
            table.add_row(
                humanized(state.label),
                format_count(total.count),
                format_bytes(total.chunk_bytes),
                format_bytes(total.usable_bytes),
                format_share(total.chunk_bytes, whole),
            )
    page.add(table, indent=2)
    if heap.mmapped_count:
        page.add(
            f"{counted(heap.mmapped_count, 'chunk', 'chunks')} of these, with {format_bytes(heap.mmapped_bytes)}, "
            "are mmapped: large blocks with a mapping of their own.",
            indent=2,
        )


def _arenas(page: Page, heap: HeapSnapshot) -> None:
    arenas = sorted(heap.arenas, key=lambda arena: -(arena.system_mem or 0))[: page.style.top]
    total = len(heap.arenas)
    limit = "" if heap.narenas_limit is None else f", limit {heap.narenas_limit}"
    order = "by memory held" if total > 1 else ""
    several = f" of {len(heap.copies)} copies of malloc" if len(heap.copies) > 1 else ""
    page.heading("Arenas", f"{total:,}{several}{limit}{'; ' if order else ''}{order}")
    wide = page.width >= 112
    columns = [("arena", True), ("held", True), ("in use", True), ("free", True), ("top", True)]
    columns += [("heaps", True), ("threads", True), ("notes", False)]
    if wide:
        columns[2:2] = [("peak", True), ("reserved", True)]
        columns[1:1] = [("address", False)]
    table = plain_table(columns)
    for arena in arenas:
        cells = [
            str(arena.index),
            bytes_or_unknown(arena.system_mem),
            format_bytes(arena.bytes_in(ChunkState.IN_USE, ChunkState.ALLOCATOR_OWN)),
            format_bytes(_free_bytes(arena)),
            bytes_or_unknown(arena.top_bytes),
            format_count(len(arena.sub_heaps)),
            _threads_of(arena),
            _arena_notes(arena),
        ]
        if wide:
            cells[2:2] = [bytes_or_unknown(arena.max_system_mem), bytes_or_unknown(arena.reserved_bytes)]
            cells[1:1] = [address_or_unknown(arena.address)]
        table.add_row(*cells)
    page.add(table, indent=2)
    rest = part_of_all(len(arenas), total, "arenas", "coreheap arenas, or --top")
    if rest:
        page.add(Text(rest, style="dim"), indent=2)


def _free_bytes(arena: Arena) -> int:
    return arena.bytes_in(ChunkState.TCACHE, ChunkState.FASTBIN, ChunkState.FREE_UNLISTED, *BINNED_STATES)


def _threads_of(arena: Arena) -> str:
    """How many threads use the arena: malloc's own counter, else the threads that were found to."""
    if arena.attached_threads is not None:
        return format_count(arena.attached_threads)
    return format_count(len(arena.threads)) if arena.threads else "?"


def _arena_notes(arena: Arena) -> str:
    notes = (
        ("main", arena.is_main),
        (f"copy {arena.copy}", arena.copy > 0),
        ("locked", arena.locked),
        ("idle", arena.on_free_list),
        ("partial", arena.coverage is None or arena.coverage < 1),
    )
    return " ".join(note for note, holds in notes if holds)


def _findings(page: Page, report: Report) -> None:
    page.heading("Findings", "" if report.findings else "none")
    for finding in sorted(report.findings, key=lambda finding: -finding.severity.rank):
        _finding(page, finding)


def _finding(page: Page, finding: Finding) -> None:
    page.add()
    title = Text("  ")
    title.append(printable(finding.code), style=SEVERITY_STYLES[finding.severity])
    title.append(f"  {finding.severity.value}, {finding.confidence.value}", style="dim")
    title.append(f"  {shortened(finding.subject, LONGEST_TEXT)}")
    page.add(title)
    page.add(finding_sentence(finding), indent=4)
    _quantities(page, finding)
    _evidence(page, finding.evidence, discreet=is_about_integrity(finding))
    for step in finding.next_steps:
        page.bullet(Text.assemble(("next: ", "bold"), printable(step)), indent=4)
    for reason in finding.weakened_by:
        page.bullet(Text.assemble(("weakened by: ", "bold"), printable(reason)), sign="?", indent=4)


def _quantities(page: Page, finding: Finding) -> None:
    """Numbers two to a line, then texts, which may be long, one to a line."""
    numbers = [quantity for quantity in finding.quantities if quantity.unit is not Unit.TEXT]
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True, style="dim")
        table.add_column(no_wrap=True, min_width=14)
    half = -(-len(numbers) // 2)
    for row in range(half):
        pair = [numbers[row], *numbers[row + half : row + half + 1]]
        table.add_row(*(text for quantity in pair for text in (quantity_label(quantity), quantity_text(quantity))))
    if numbers:
        page.add(table, indent=6)
    for quantity in finding.quantities:
        if quantity.unit is Unit.TEXT:
            page.bullet(Text.assemble((f"{quantity_label(quantity)}  ", "dim"), quantity_text(quantity)), "", indent=5)


def _evidence(page: Page, evidence: tuple[Evidence, ...], indent: int = 4, *, discreet: bool = False) -> None:
    for fact in evidence if page.style.verbose else evidence[:LIST_LENGTH]:
        place = "" if fact.address is None else f" at {format_address(fact.address)}"
        line = Text(shortened(without_content(fact.statement) if discreet else fact.statement, 2 * LONGEST_TEXT))
        line.append(f" ({printable(fact.source)}{place}; {fact.strength.name.lower()})", style="dim")
        page.bullet(line, sign="x" if fact.speaks_against else "+", indent=indent)
    _more(page, len(evidence), "pieces of evidence", indent)


def _more(page: Page, total: int, what: str, indent: int) -> None:
    if not page.style.verbose and total > LIST_LENGTH:
        page.add(Text(f"+{total - LIST_LENGTH:,} more {what} (-v)", style="dim"), indent=indent)


def add_gaps(page: Page, report: Report) -> None:
    """What cannot be known, bounded unless -v asks for all."""
    if not report.gaps:
        return
    page.heading("What cannot be known from this core")
    for gap in report.gaps if page.style.verbose else report.gaps[:LIST_LENGTH]:
        page.bullet(gap_sentence(gap), sign="?")
    _more(page, len(report.gaps), "gaps", 2)


def _anomalies(page: Page, report: Report) -> None:
    if not report.anomaly_count:
        return
    page.heading("Where the heap contradicts itself", counted(report.anomaly_count, "place", "places"))
    shown = report.anomalies if page.style.verbose else report.anomalies[:LIST_LENGTH]
    for anomaly in shown:
        page.bullet(anomaly_sentence(anomaly), sign="!")
    rest = part_of_all(len(shown), report.anomaly_count, "places", "-v shows all that the report holds")
    if rest:
        page.add(Text(rest, style="dim"), indent=2)


def _allocator(page: Page, heap: HeapSnapshot) -> None:
    identity = heap.identity
    version = f" {printable(identity.libc_version)}" if identity.libc_version else ""
    page.heading("How the heap was found", identity.confidence.value)
    page.add(
        f"{printable(identity.name)}{version}, layout {printable(identity.layout)}; "
        f"main_arena {address_or_unknown(identity.main_arena)}, mp_ {address_or_unknown(identity.mp)}",
        indent=2,
    )
    if len(heap.copies) > 1:
        _copies(page, heap)
    if identity.runner_up and page.style.verbose:
        page.add(f"next best layout: {printable(identity.runner_up)}", indent=2)
    _evidence(page, identity.evidence, indent=2)


def _copies(page: Page, heap: HeapSnapshot) -> None:
    """The copies of malloc, for processes that have more than one."""
    page.add("Several copies of malloc have heaps of their own; all are in these numbers:", indent=2)
    table = plain_table((("copy", True), ("main_arena", False), ("arenas", True), ("held", True), ("file", False)))
    for copy in heap.copies:
        table.add_row(
            str(copy.number),
            address_or_unknown(copy.main_arena),
            format_count(copy.arena_count),
            bytes_or_unknown(copy.system_mem),
            shortened(copy.module or "unknown", 40),
        )
    page.add(table, indent=2)


def add_phases(page: Page, report: Report) -> None:
    """What each phase of the analysis cost."""
    page.heading("What the analysis cost", f"{printable(report.kernels)} kernels")
    table = plain_table((("phase", False), ("CPU", True), ("elapsed", True), ("peak memory", True)))
    for phase in report.phases:
        table.add_row(
            shortened(phase.name, 40),
            f"{phase.cpu_seconds:.2f} s",
            f"{phase.wall_seconds:.2f} s",
            bytes_or_unknown(phase.peak_anonymous_bytes),
        )
    page.add(table, indent=2)
