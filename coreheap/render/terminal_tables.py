"""The table commands as text for people: the largest rows, and a line that says how many there are.

Knows: which columns of a table help a reader at which width. Does not know: how rows are made (``tables``, ``rows``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from coreheap.quantities import format_address, format_bytes, format_count
from coreheap.render.escaping import printable
from coreheap.render.page import Page, PageStyle, counted, part_of_all, plain_table
from coreheap.render.rows import STATE_LABELS, VERDICT_LABELS, LargestChunks
from coreheap.render.tables import Cell, CellKind, Table
from coreheap.render.wording import humanized, share_text
from coreheap.report import Report

BOUNDLESS = 1 << 60
"""Bytes from which a list's upper limit is none: no process has that much."""
ARENAS_NAMED = 10


@dataclass(frozen=True, slots=True)
class _View:
    """How a table is shown: (column, title) pairs, those added from 100 columns on, the order, and what a row is."""

    one: str
    many: str
    columns: tuple[tuple[str, str], ...]
    wide_columns: tuple[tuple[str, str], ...]
    largest_by: str | None
    nonzero: str | None = None
    """Rows where this column is 0 are left out."""
    wrapped: str | None = None
    """The column that may take more than one line."""


_VIEWS = {
    "arenas": _View(
        "arena",
        "arenas",
        (
            ("index", "arena"),
            ("address", "address"),
            ("system_mem", "held"),
            ("in_use_chunk_bytes", "in use"),
            ("in_use_count", "chunks"),
            ("top_bytes", "top"),
            ("sub_heap_count", "heaps"),
            ("attached_threads", "threads"),
        ),
        (
            ("max_system_mem", "peak"),
            ("reserved_bytes", "reserved"),
            ("coverage", "covered"),
            ("locked", "locked"),
        ),
        "system_mem",
    ),
    "heaps": _View(
        "stretch",
        "stretches",
        (
            ("arena", "arena"),
            ("kind", "kind"),
            ("address", "address"),
            ("committed_bytes", "committed"),
            ("reserved_bytes", "reserved"),
            ("in_use_count", "in use"),
            ("in_use_chunk_bytes", "bytes"),
        ),
        (("top_chunk_bytes", "top"), ("saved_bytes", "saved"), ("populated_bytes", "populated")),
        "committed_bytes",
    ),
    "bins": _View(
        "list that holds chunks",
        "lists that hold chunks",
        (
            ("kind", "kind"),
            ("number", "no."),
            ("arena", "arena"),
            ("thread_cache", "tcache"),
            ("chunk_bytes_low", "from"),
            ("chunk_bytes_high", "to"),
            ("count", "chunks"),
            ("chunk_bytes", "bytes"),
        ),
        (("recorded_count", "recorded"), ("error", "error")),
        "chunk_bytes",
        "count",
    ),
    "threads": _View(
        "thread",
        "threads",
        (
            ("index", "thread"),
            ("lwp", "lwp"),
            ("arena", "arena"),
            ("tcache_bytes", "tcache"),
            ("stack_used_bytes", "used"),
            ("stack_resident_bytes", "resident"),
            ("stack_reserved_bytes", "stack"),
            ("name|start_routine", "name or start"),
        ),
        (("guard_bytes", "guard"), ("stack_pointer", "stack pointer"), ("signal", "signal")),
        None,
        wrapped="name|start_routine",
    ),
}


def table_text(name: str, table: Table, style: PageStyle, notes: Sequence[str] = ()) -> str:
    """The table of the command ``name`` for people; at most ``style.top`` rows, the largest first; ``notes`` below it.

    A view's column ``a|b`` shows the first of these columns that is known.
    """
    view = _VIEWS[name]
    page = Page(style)
    if view.nonzero is not None:
        held = table.column_index(view.nonzero)
        error = table.column_index("error")
        table = Table(table.columns, tuple(row for row in table.rows if row[held] or row[error]))
    total = len(table.rows)
    shown = table.largest(view.largest_by, style.top) if view.largest_by else _first(table, style.top)
    columns = view.columns + (view.wide_columns if page.width >= 112 else ())
    places = [[table.column_index(one) for one in column.split("|")] for column, _ in columns]
    kinds = [table.columns[place[0]].kind for place in places]
    drawn = plain_table(
        [(title, _is_number(kind)) for (_, title), kind in zip(columns, kinds, strict=True)],
        next((number for number, (column, _) in enumerate(columns) if column == view.wrapped), None),
    )
    for row in shown.rows:
        cells = (next((row[one] for one in place if row[one] is not None), None) for place in places)
        drawn.add_row(*(_cell_text(cell, kind) for cell, kind in zip(cells, kinds, strict=True)))
    if total:
        page.add(drawn)
    rest = part_of_all(len(shown.rows), total, view.many, "--top N, or --csv / --json for all")
    page.add(Text(rest or counted(total, view.one, view.many), style="dim"))
    for note in notes:
        page.add(Text(note, style="dim"))
    return page.text()


def table_notes(name: str, report: Report) -> tuple[str, ...]:
    """What the rows of a table do not show: of threads, the arenas that none of them uses."""
    if name != "threads" or report.heap is None:
        return ()
    without_arena = sum(thread.arena is None for thread in report.threads)
    # Arenas of other copies of malloc have threads of their own, which these rows do not show.
    idle = [arena for arena in report.heap.arenas if arena.copy == 0 and not arena.threads]
    notes = [f"{counted(without_arena, 'thread', 'threads')} without an arena"] if without_arena else []
    if idle:
        named = ", ".join(str(arena.index) for arena in idle[:ARENAS_NAMED])
        more = f" and {len(idle) - ARENAS_NAMED:,} more" if len(idle) > ARENAS_NAMED else ""
        held = sum(arena.system_mem or 0 for arena in idle)
        notes.append(f"{counted(len(idle), 'arena', 'arenas')} without a thread, {format_bytes(held)}: {named}{more}")
    return tuple(notes)


def chunks_text(largest: LargestChunks, style: PageStyle) -> str:
    """The largest chunks for people, then a line that says how many passed the filters.

    Verdicts, and numbers of groups, stand in the place of sub-heaps where there is no room for all.
    """
    page = Page(style)
    wide = page.width >= 112
    has_verdict = any(row.verdict is not None for row in largest.rows)
    has_group = any(row.group is not None for row in largest.rows)
    columns = [("payload", False), ("bytes", True), ("usable", True), ("state", False), ("arena", True)]
    if wide or not has_verdict:
        columns.append(("sub-heap", False))
    if has_verdict:
        columns.append(("verdict", False))
    if has_group:
        columns.append(("group", True))
    if wide:
        columns[:0] = [("header", False)]
    drawn = plain_table(columns)
    for row in largest.rows:
        header = int(row.header_address[0])
        cells = [
            format_address(int(row.payload_address[0])),
            format_count(int(row.chunk_bytes[0])),
            format_count(int(row.usable_bytes[0])),
            STATE_LABELS[int(row.state[0])],
            "mmapped" if row.is_mmapped else _cell_text(row.arena, CellKind.INDEX),
        ]
        if wide or not has_verdict:
            cells.append(_cell_text(row.sub_heap, CellKind.ADDRESS))
        if has_verdict:
            cells.append("-" if row.verdict is None else humanized(VERDICT_LABELS[int(row.verdict[0])] or "-"))
        if has_group:
            cells.append("-" if row.group is None or row.group[0] < 0 else str(row.group[0]))
        drawn.add_row(*([format_address(header), *cells] if wide else cells))
    if largest.rows:
        page.add(drawn)
    shown = len(largest.rows)
    line = f"{counted(largest.wanted_count, 'chunk', 'chunks')}, {format_bytes(largest.wanted_bytes)}"
    if shown < largest.wanted_count:
        line += f"; the {format_count(shown)} largest are shown (--top N, or --csv / --json for all)"
    page.add(Text(line, style="dim"))
    return page.text()


def _first(table: Table, count: int) -> Table:
    return Table(table.columns, table.rows[:count])


def _is_number(kind: CellKind) -> bool:
    return kind in (CellKind.BYTES, CellKind.COUNT, CellKind.INDEX, CellKind.SHARE)


def _cell_text(cell: Cell, kind: CellKind) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return printable(cell)
    if kind is CellKind.SHARE or isinstance(cell, float):
        return share_text(cell)
    if kind is CellKind.ADDRESS:
        return format_address(cell)
    if kind is CellKind.BYTES:
        return "any" if cell >= BOUNDLESS else format_bytes(cell)
    return str(cell) if kind is CellKind.INDEX else format_count(cell)
