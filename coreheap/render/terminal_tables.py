"""The table commands as text for people: the largest rows, and a line that says how many there are.

Knows: which columns of a table help a reader at which width. Does not know: how rows are made (``tables``, ``rows``).
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.text import Text

from coreheap.quantities import format_address, format_bytes, format_count
from coreheap.render.escaping import printable
from coreheap.render.page import Page, PageStyle, counted, part_of_all, plain_table
from coreheap.render.rows import STATE_LABELS, VERDICT_LABELS, LargestChunks
from coreheap.render.tables import Cell, CellKind, Table
from coreheap.render.wording import humanized, share_text

BOUNDLESS = 1 << 60
"""Bytes from which a list's upper limit is none: no process has that much."""


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
            ("signal", "signal"),
            ("arena", "arena"),
            ("tcache_count", "cached"),
            ("tcache_bytes", "bytes"),
            ("stack_pointer", "stack pointer"),
        ),
        (("program_counter", "program counter"), ("thread_pointer", "thread pointer")),
        None,
    ),
}


def table_text(name: str, table: Table, style: PageStyle) -> str:
    """The table of the command ``name`` for people; at most ``style.top`` rows, the largest first."""
    view = _VIEWS[name]
    page = Page(style)
    if view.nonzero is not None:
        held = table.column_index(view.nonzero)
        error = table.column_index("error")
        table = Table(table.columns, tuple(row for row in table.rows if row[held] or row[error]))
    total = len(table.rows)
    shown = table.largest(view.largest_by, style.top) if view.largest_by else _first(table, style.top)
    columns = view.columns + (view.wide_columns if page.width >= 112 else ())
    places = [table.column_index(column) for column, _ in columns]
    kinds = [table.columns[place].kind for place in places]
    drawn = plain_table(
        [(title, _is_number(kind)) for (_, title), kind in zip(columns, kinds, strict=True)],
    )
    for row in shown.rows:
        drawn.add_row(*(_cell_text(row[place], kind) for place, kind in zip(places, kinds, strict=True)))
    if total:
        page.add(drawn)
    rest = part_of_all(len(shown.rows), total, view.many, "--top N, or --csv / --json for all")
    page.add(Text(rest or counted(total, view.one, view.many), style="dim"))
    return page.text()


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
