"""The address space as text for people: by kind, or the mappings one by one.

Knows: which columns help at which width, and how bounds are written. Does not know: how rows are made (``maps``).
"""

from __future__ import annotations

from rich.text import Text

from coreheap.evidence import Confidence
from coreheap.mappings import ResidencyBasis
from coreheap.quantities import format_address, format_bytes, format_count, format_share
from coreheap.render.maps import MapsOrder, kinds_table, mapping_tables, owner_text, total_row
from coreheap.render.page import Page, PageStyle, counted, part_of_all, plain_table
from coreheap.render.tables import Cell, Table
from coreheap.render.wording import humanized
from coreheap.report import LedgerNode, Report

WIDE = 112
"""Columns of a terminal from which on all numbers of a mapping are shown."""

_BASIS_TEXT = {
    ResidencyBasis.HOLES: "In memory: private pages by the holes that the kernel left in the core, swapped ones included; of files "
    "and shared memory a core does not tell.",
    ResidencyBasis.ZERO_PAGES: "In memory: at least the private pages that hold something, at most all; this core does not tell pages "
    "of zeros from pages that were never there.",
    ResidencyBasis.UNKNOWN: "In memory: unknown; the core holds no private memory to judge by.",
}

_HOLES_UNSURE = (
    "That the holes are the kernel's is plausible: a copy made by cp --sparse=always onto NFS, ZFS or Lustre would look the same, and"
    " more was in memory then."
)

_KINDS_OF_FILES = ("module_text", "module_rodata", "module_data", "module_bss", "mapped_file")
"""Whose names are paths; the last part is enough where there is little room."""


def kinds_text(report: Report, order: MapsOrder, style: PageStyle) -> str:
    """A row for each kind, the largest first unless ``order`` says otherwise, and their sum."""
    page = Page(style)
    table = kinds_table(report, order)
    drawn = plain_table(
        (("kind", False), *((title, True) for title in ("count", "mapped", "committed", "saved", "in memory")))
    )
    whole = report.mappings is not None and int(total_row(table)[1] or 0) == len(report.mappings)
    for row in (*table.rows, total_row(table)):
        drawn.add_row(
            humanized(str(row[0]) if row[0] != "total" or whole else "these kinds"),
            format_count(int(row[1] or 0)),
            *(_bytes(cell) for cell in row[2:5]),
            resident_text(row[5], row[6], row[2]),
            style="bold" if row[0] == "total" else "",
        )
    page.add(drawn)
    _add_basis(page, report)
    page.add(Text("--flat has a row for each mapping; --kind KIND picks some", style="dim"))
    return page.text()


def mappings_text(report: Report, order: MapsOrder, style: PageStyle) -> str:
    """Mappings one by one, at most ``style.top`` of them."""
    page = Page(style)
    wide = page.width >= WIDE
    shown = MapsOrder(order.kinds, order.column, order.descending, style.top)
    columns = [("address", False), ("perm", False), ("mapped", True)]
    columns += [("committed", True), ("saved", True)] if wide else []
    columns += [("in memory", True), ("kind", False), ("owner", False)]
    drawn = plain_table(columns, wide_column=len(columns) - 1)
    count = 0
    for table in mapping_tables(report, shown, is_text=True):
        for row in table.rows:
            drawn.add_row(*_mapping_cells(table, row, wide))
            count += 1
    if count:
        page.add(drawn)
    total = sum(int(row[1] or 0) for row in kinds_table(report, MapsOrder(order.kinds)).rows)
    what = "more mappings" if order.column else "smaller mappings"
    rest = part_of_all(count, total, what.removeprefix("more "), "--top N, or --csv / --json for all")
    page.add(Text(rest or counted(total, "mapping", "mappings"), style="dim"))
    _add_basis(page, report)
    return page.text()


def ledger_with_residency(page: Page, root: LedgerNode) -> None:
    """The whole ledger with all that is known of each node; states of chunks have no numbers but their bytes."""
    wide = page.width >= WIDE
    titles = ["mapped", "share", "committed", *(["saved"] if wide else ()), "in memory"]
    drawn = plain_table((("", False), *((title, True) for title in titles)))

    def add(node: LedgerNode, level: int) -> None:
        saved = (_number(node.saved_bytes),) if wide else ()
        known = node.resident_low is not None and node.resident_high is not None
        drawn.add_row(
            Text("  " * level + humanized(node.name), style="" if level else "bold"),
            format_bytes(node.bytes),
            format_share(node.bytes, root.bytes),
            _number(node.committed_bytes),
            *saved,
            resident_text(node.resident_low, node.resident_high, node.bytes) if known else "",
        )
        for child in sorted(node.children, key=lambda child: -child.bytes):
            if child.bytes:
                add(child, level + 1)

    for top in sorted(root.children, key=lambda child: -child.bytes):
        if top.bytes:
            add(top, 0)
    page.add(drawn, indent=2)


def resident_text(low: Cell, high: Cell, mapped: Cell) -> str:
    """What was in memory: a number, bounds, or ``unknown`` where the bounds say nothing."""
    if low is None or high is None or (low == 0 and high == mapped and mapped):
        return "unknown"
    if low == high:
        return format_bytes(int(low))
    return f"{format_bytes(int(low)) if low else '0'}..{format_bytes(int(high))}"


def _mapping_cells(table: Table, row: tuple[Cell, ...], wide: bool) -> list[str]:
    cell = {column.name: value for column, value in zip(table.columns, row, strict=True)}
    name, lwp = cell["name"], cell["lwp"]
    if not wide:
        lwp = None
        if isinstance(name, str) and str(cell["kind"]) in _KINDS_OF_FILES:
            name = name.rpartition("/")[2] or name
    return [
        format_address(int(cell["address"] or 0)),
        str(cell["permissions"] or "?"),
        _bytes(cell["reserved_bytes"]),
        *([_bytes(cell["committed_bytes"]), _bytes(cell["saved_bytes"])] if wide else ()),
        resident_text(cell["resident_low_bytes"], cell["resident_high_bytes"], cell["reserved_bytes"]),
        humanized(str(cell["kind"])),
        owner_text(name, cell["thread"], lwp, cell["arena"]),
    ]


def _number(byte_count: int | None) -> str:
    return "" if byte_count is None else format_bytes(byte_count)


def _bytes(cell: Cell) -> str:
    return "unknown" if cell is None else format_bytes(int(cell))


def _add_basis(page: Page, report: Report) -> None:
    if report.mappings is not None:
        page.add(Text(_BASIS_TEXT[report.mappings.basis], style="dim"))
        if report.mappings.residency_confidence is not Confidence.CERTAIN:
            page.add(Text(_HOLES_UNSURE, style="dim"))
