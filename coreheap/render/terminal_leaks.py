"""Leaks, explanations, owners and retained sizes as text for people.

Knows: what fits 80 columns. Does not know: how anything was found. Every text out of the core goes through
``escaping``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from rich.text import Text
from rich.tree import Tree

from coreheap.leaks import (
    VERDICTS,
    Accumulation,
    ChunkView,
    Explanation,
    Heuristic,
    LeakGroup,
    LeakReport,
    OwnerNode,
    Reference,
    RetainedReport,
    Verdict,
)
from coreheap.quantities import format_address, format_bytes, format_count, format_share
from coreheap.render.escaping import printable, shortened
from coreheap.render.leak_tables import arenas_text
from coreheap.render.page import Page, PageStyle, counted, part_of_all, plain_table
from coreheap.render.wording import humanized

VERDICT_STYLES = {
    Verdict.DEFINITELY_LOST: "bold red",
    Verdict.INDIRECTLY_LOST: "red",
    Verdict.POSSIBLY_LOST: "yellow",
    Verdict.WEAKLY_HELD: "",
    Verdict.STILL_REACHABLE: "green",
}
HEURISTIC_WORDS = {
    Heuristic.NEW_ARRAY: "reachable: pointed to just after the count of new[]",
    Heuristic.SECOND_BASE: "reachable: pointed to at the virtual table of a second base, or at constants",
    Heuristic.CONSTANT_OFFSET: "reachable: all pointed to at one distance (a header before them, a list linked by a member)",
    Heuristic.LENGTH_PREFIX: "reachable: pointed to just after a length that fits (strings)",
    Heuristic.EXCEPTION_POINTER: "reachable: thrown C++ objects, pointed to just after their header",
    Heuristic.HIGH_TAG: "possibly lost: held by addresses with a tag in the upper 16 bits",
    Heuristic.LOW_TAG: "possibly lost: held by addresses in the upper 48 bits of words",
    Heuristic.SHIFTED: "possibly lost: held by addresses that are shifted by some bits",
    Heuristic.BYTE_SWAPPED: "possibly lost: held by addresses in the other byte order",
    Heuristic.UNALIGNED: "possibly lost: held by addresses at unaligned places",
    Heuristic.COMPRESSED: "possibly lost: held by addresses in 32 bits",
    Heuristic.HALVES: "possibly lost: held by addresses in two halves",
    Heuristic.SIGNAL_STACK: "possibly lost: of the size of a signal stack, whose address only the kernel has",
    Heuristic.MISSING_SHARED_MEMORY: "possibly lost: shared memory that is not in the core could hold them",
}
"""What is said of the chunks that a heuristic concerns, after their count."""
SUSPECTS_IN_REPORT = 5
STEPS_AT_AN_END = 6
"""Of a long way to a chunk so many steps are shown from each end."""
NAME_CELLS = 60
WIDE = 112


def add_leaks(page: Page, leaks: LeakReport) -> None:
    """The section of the report: totals of each verdict, and the first groups."""
    followed = "every pointer" if leaks.edge_count is None else counted(leaks.edge_count, "pointer", "pointers")
    page.heading("Leaks", f"{followed} between chunks followed")
    _totals(page, leaks)
    if leaks.groups:
        page.add()
    _groups(page, leaks.groups, SUSPECTS_IN_REPORT, leaks.group_count, "coreheap leaks")


def leaks_text(leaks: LeakReport | None, style: PageStyle, verdicts: Collection[Verdict] | None = None) -> str:
    """The page of ``coreheap leaks``: totals, groups (of some verdicts), and where pointers were looked for."""
    page = Page(style)
    if leaks is None:
        page.add("Nothing can be said about leaks.")
        return page.text()
    _totals(page, leaks)
    groups = [group for group in leaks.groups if not verdicts or group.verdict in verdicts]
    # Groups behind those that the report tells of have an unknown verdict.
    total = leaks.group_count if not verdicts else len(groups)
    page.add()
    _groups(page, groups, style.top, total, "--top N, or --csv / --json; --list for every chunk")
    if not groups:
        page.add(Text("no group of suspects", style="dim"), indent=2)
    _roots(page, leaks)
    return page.text()


def explanations_text(explanations: Sequence[Explanation], style: PageStyle) -> str:
    """The page of ``coreheap explain``: one paragraph an address."""
    page = Page(style)
    for number, explanation in enumerate(explanations):
        if number:
            page.add()
        _explanation(page, explanation)
    return page.text()


def owners_text(asked: Sequence[tuple[Explanation, tuple[OwnerNode, ...]]], style: PageStyle) -> str:
    """The page of ``coreheap owners``: one tree an address, owners below what they hold."""
    page = Page(style)
    for number, (explanation, nodes) in enumerate(asked):
        if number:
            page.add()
        if explanation.chunk is None:
            page.add(f"{format_address(explanation.address)}: {_place_words(explanation)}; no chunk is there")
            continue
        tree = Tree(_chunk_text(explanation.chunk), guide_style="dim")
        for node in nodes:
            _grow(tree, node)
        _omitted(tree, explanation.holder_count - len(nodes))
        page.add(tree)
        if not nodes:
            page.add(Text("nothing leads to it", style="dim"), indent=2)
    return page.text()


def retained_text(retained: RetainedReport | None, style: PageStyle) -> str:
    """The page of ``coreheap top``: the chunks that retain most, and the accumulation points."""
    page = Page(style)
    if retained is None:
        page.add("Nothing can be said about retained sizes.")
        return page.text()
    page.add(Text("Retained sizes", style="bold cyan").append(_of(retained), style="not bold dim"))
    table = plain_table(
        (("retained", True), ("share", True), ("chunks", True), ("own", True), ("address", False), ("held by", False)),
        5,
    )
    for entry in retained.top[: style.top]:
        table.add_row(
            format_bytes(entry.retained_bytes),
            format_share(entry.retained_bytes, retained.reachable_bytes),
            format_count(entry.retained_count),
            format_bytes(entry.chunk.usable_bytes),
            format_address(entry.chunk.payload_address),
            "-" if entry.holder is None else shortened(entry.holder, NAME_CELLS),
        )
    page.add(table, indent=2)
    page.heading("Accumulation points", "" if retained.accumulations else "none")
    if retained.accumulations:
        table = plain_table((("chunks", True), ("of", True), ("with all below", True), ("below", False)), 3)
        for point in retained.accumulations[: style.top]:
            table.add_row(
                format_count(point.children),
                format_bytes(point.child_bytes),
                format_bytes(point.child_retained_bytes),
                _holder_text(point),
            )
        page.add(table, indent=2)
    page.add()
    page.add(Text("coreheap owners CORE ADDRESS shows who keeps one of them.", style="dim"))
    return page.text()


def _totals(page: Page, leaks: LeakReport) -> None:
    whole = leaks.total().usable_bytes
    table = plain_table((("verdict", False), ("chunks", True), ("bytes", True), ("share", True)))
    for verdict in reversed(VERDICTS):
        total = leaks.totals[verdict]
        table.add_row(
            Text(humanized(verdict.name.lower()), style=VERDICT_STYLES[verdict] if total.count else "dim"),
            format_count(total.count),
            format_bytes(total.usable_bytes),
            format_share(total.usable_bytes, whole),
        )
    page.add(table, indent=2)
    for heuristic, total in leaks.heuristics:
        words = HEURISTIC_WORDS[heuristic]
        page.bullet(
            f"{counted(total.count, 'chunk', 'chunks')}, {format_bytes(total.usable_bytes)}, {words} ({heuristic.label})",
            sign="-",
            indent=2,
        )
    if leaks.missing_root_bytes:
        page.add(
            f"{format_bytes(leaks.missing_root_bytes)} of writable memory are not in the core: nothing is definitely "
            "lost, because a pointer there could hold it.",
            indent=2,
        )


def _groups(page: Page, groups: Sequence[LeakGroup], count: int, total: int, rest: str) -> None:
    if not groups:
        return
    wide = page.width >= WIDE
    columns = [("no.", True), ("verdict", False), ("size", True), ("chunks", True), ("bytes", True)]
    columns += [("lead to", True), ("sample", False)]
    if wide:
        columns += [("arena:chunks", False), ("type, holder", False)]
    table = plain_table(columns, len(columns) - 1 if wide else None)
    for group in groups[:count]:
        cells: list[str | Text] = [
            str(group.number),
            Text(humanized(group.verdict.name.lower()), style=VERDICT_STYLES.get(group.verdict, "")),
            _sizes(group),
            format_count(group.count),
            format_bytes(group.usable_bytes),
            format_bytes(group.indirect_bytes) if group.indirect_count else "-",
            format_address(group.samples[0]) if group.samples else "-",
        ]
        if wide:
            names = [name for name in (group.type, group.holder, group.heuristic.label) if name]
            cells += [arenas_text(group.arenas[:2]), ", ".join(shortened(name, NAME_CELLS) for name in names) or "-"]
        table.add_row(*cells)
    page.add(table, indent=2)
    more = part_of_all(min(count, len(groups)), total, "groups", rest)
    if more:
        page.add(Text(more, style="dim"), indent=2)


def _sizes(group: LeakGroup) -> str:
    """The sizes of a group: one, or from-to with the common unit said once."""
    smallest, largest = format_bytes(group.smallest_bytes), format_bytes(group.largest_bytes)
    if smallest == largest:
        return largest
    number, _, unit = smallest.rpartition(" ")
    return f"{number if largest.endswith(' ' + unit) else smallest}-{largest}"


def _roots(page: Page, leaks: LeakReport) -> None:
    page.heading("Where pointers to chunks were looked for")
    table = plain_table((("kind", False), ("bytes", True), ("first found chunks", True)))
    for root in leaks.roots:
        if root.byte_count or root.held_chunks:
            size = format_bytes(root.byte_count) if root.byte_count else "-"
            table.add_row(humanized(root.kind.value), size, format_count(root.held_chunks))
    page.add(table, indent=2)
    if leaks.missing_shared_bytes:
        page.add(
            f"Not in the core: {format_bytes(leaks.missing_shared_bytes)} of writable mapped files and shared memory.",
            indent=2,
        )


def _explanation(page: Page, explanation: Explanation) -> None:
    page.add(
        Text(format_address(explanation.address), style="bold cyan").append(f"  {_place_words(explanation)}", "none")
    )
    chunk = explanation.chunk
    if chunk is not None:
        for title, body in _facts_of_chunk(explanation, chunk):
            page.bullet(Text.assemble((f"{title:<9}", "dim"), body), sign="", indent=1)
        _references(
            page,
            "way from a root" if _starts_at_root(explanation) else "way",
            explanation.path,
            None,
            explanation.path_omitted,
        )
        _references(page, "held by", explanation.holders, explanation.holder_count)
        _targets(page, explanation)
    for note in explanation.notes:
        page.bullet(shortened(note, 4 * NAME_CELLS), sign="!")


def _place_words(explanation: Explanation) -> str:
    parts = [shortened(explanation.region, NAME_CELLS)]
    if explanation.symbol and explanation.symbol != explanation.region:
        parts.append(shortened(explanation.symbol, NAME_CELLS))
    if explanation.permissions:
        parts.append(explanation.permissions)
        if not explanation.is_saved:
            parts.append("not in the core")
    return ", ".join(parts)


def _facts_of_chunk(explanation: Explanation, chunk: ChunkView) -> Iterator[tuple[str, str | Text]]:
    yield "chunk", _chunk_text(chunk)
    yield "header", f"{format_address(chunk.header_address)}, {format_count(chunk.chunk_bytes)} bytes with it"
    if explanation.offset < 0:
        yield "points", "at the header"
    elif explanation.offset:
        yield "points", f"{format_count(explanation.offset)} bytes into the payload"
    if explanation.retained_bytes is not None:
        others = counted(explanation.retained_count or 0, "chunk", "chunks")
        yield "retains", f"{format_bytes(explanation.retained_bytes)} in {others}, itself included"
    if explanation.before is not None:
        yield "before", _chunk_text(explanation.before)
    if explanation.behind is not None:
        yield "behind", _chunk_text(explanation.behind)


def _chunk_text(chunk: ChunkView) -> Text:
    """``0x55..10  2,616 bytes, in use, definitely lost, type Foo``."""
    text = Text(f"{format_address(chunk.payload_address)}  {format_count(chunk.usable_bytes)} bytes, ")
    text.append(f"{'mmapped, ' if chunk.is_mmapped else ''}{humanized(chunk.state)}")
    if chunk.verdict is not Verdict.NONE:
        text.append(", ").append(humanized(chunk.verdict.name.lower()), VERDICT_STYLES[chunk.verdict])
    if chunk.type:
        text.append(f", {shortened(chunk.type, NAME_CELLS)}")
    return text


def _starts_at_root(explanation: Explanation) -> bool:
    return bool(explanation.path) and not isinstance(explanation.path[0].source, ChunkView)


def _references(page: Page, title: str, references: Sequence[Reference], total: int | None, omitted: int = 0) -> None:
    if total is None and not references:
        return
    page.add(Text(f" {title}" if total is None else f" {title} ({format_count(total)})", style="dim"))
    for reference in _both_ends(references) if total is None else references:
        page.bullet(
            f"{len(references) - 2 * STEPS_AT_AN_END + omitted:,} steps"
            if reference is None
            else _source_text(reference),
            sign="-",
            indent=3,
        )
    if total is not None and total > len(references):
        page.add(Text(f"+{total - len(references):,} more (--limit N)", style="dim"), indent=3)


def _both_ends(steps: Sequence[Reference]) -> Iterator[Reference | None]:
    """The steps of a way; of a long one the first and the last, with None between."""
    if len(steps) <= 2 * STEPS_AT_AN_END + 1:
        yield from steps
        return
    yield from steps[:STEPS_AT_AN_END]
    yield None
    yield from steps[-STEPS_AT_AN_END:]


def _targets(page: Page, explanation: Explanation) -> None:
    page.add(Text(f" leads to ({format_count(explanation.target_count)})", style="dim"))
    for reference in explanation.targets:
        text = Text(f"+{reference.source_offset}: ").append_text(_chunk_text(reference.target))
        page.bullet(text.append(_inside(reference)), sign="-", indent=3)
    if explanation.target_count > len(explanation.targets):
        more = explanation.target_count - len(explanation.targets)
        page.add(Text(f"+{more:,} more (--limit N)", style="dim"), indent=3)


def _source_text(reference: Reference) -> Text:
    """Who holds the pointer, where in it, and how far into the target it points."""
    source = reference.source
    if isinstance(source, ChunkView):
        text = _chunk_text(source).append(f", at +{reference.source_offset}")
    else:
        place = "" if source.address is None else f" at {format_address(source.address)}"
        text = Text(f"{shortened(source.name, NAME_CELLS)} ({humanized(source.kind.value)}{place})", style="cyan")
    return text.append(_inside(reference), "none")


def _inside(reference: Reference) -> str:
    return f", {format_count(reference.target_offset)} bytes into it" if reference.target_offset else ""


def _grow(tree: Tree, node: OwnerNode) -> None:
    label = _source_text(node.reference)
    if node.seen_before:
        label.append(" (shown already)", "dim")
    branch = tree.add(label)
    for above in node.owners:
        _grow(branch, above)
    if not node.seen_before:
        _omitted(branch, node.omitted)


def _omitted(tree: Tree, count: int) -> None:
    if count > 0:
        tree.add(Text(f"+{count:,} more (--limit N, --depth N)", style="dim"))


def _of(retained: RetainedReport) -> str:
    return f"  of {format_bytes(retained.reachable_bytes)} that anything leads to"


def _holder_text(point: Accumulation) -> str:
    holder = point.holder
    if isinstance(holder, ChunkView):
        of = f", {shortened(holder.type, NAME_CELLS)}" if holder.type else ""
        many = f"{format_count(point.holders)} like " if point.holders > 1 else ""
        root = f", {shortened(point.root, NAME_CELLS)}" if point.root else ""
        return printable(
            f"{many}{format_address(holder.payload_address)} ({format_bytes(holder.usable_bytes)}{of}){root}"
        )
    return printable(shortened(holder, NAME_CELLS))
