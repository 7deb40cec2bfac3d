"""A page of text for people: width, colour and the small parts that every page is made of.

Knows: rich, and how to get from its renderables to plain text. Does not know: reports.

Text is always given to rich as ``Text``, never as markup, so nothing out of a core is obeyed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

NARROWEST = 60
WIDEST = 160
BOUNDLESS = 1 << 14
LEAST_WRAPPED = 12
"""So narrow a column may become whose text takes several lines."""
LEAST_TEXT = 18
"""So narrow a column of names may become: an address, which is text as well, has no more characters."""


@dataclass(frozen=True, slots=True)
class PageStyle:
    """How a page shall look. ``encoding`` is the output's: what it cannot say is drawn in ASCII."""

    width: int = 80
    color: bool = False
    encoding: str = "utf-8"
    verbose: bool = False
    top: int = 10


class _PageFile(io.StringIO):
    """Text in memory that claims the encoding of the real output, so that rich draws only what that can say."""

    encoding = "utf-8"


class Page:
    """Collects renderables, then gives their text."""

    def __init__(self, style: PageStyle) -> None:
        self.style = style
        self.width = max(NARROWEST, min(style.width, WIDEST))
        self._file = _PageFile()
        self._file.encoding = style.encoding
        self._console = Console(
            file=self._file,
            width=self.width,
            force_terminal=style.color,
            color_system="standard" if style.color else None,
            no_color=not style.color,
            legacy_windows=False,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=False,
        )

    @property
    def is_ascii(self) -> bool:
        """Whether the output can say nothing but ASCII."""
        return not self.style.encoding.lower().startswith("utf")

    def add(self, renderable: RenderableType = "", indent: int = 0) -> None:
        """Put something below what is there.

        A table that needs more than the page's width is wider than the page: a number without its last digits is another number.
        """
        shown = Text(renderable) if isinstance(renderable, str) else renderable
        self._console.width = self.width
        if isinstance(shown, Table) and shown.box is not None:
            self._console.width = max(self.width, self._fitted(shown, self.width - indent) + indent)
        self._console.print(Padding(shown, (0, 0, 0, indent)) if indent else shown)

    def _fitted(self, table: Table, width: int) -> int:
        """Make a table's texts shorter where it is too wide, first those that may wrap, then the longest; the width that it has then."""
        wanted = self._console.measure(table, options=self._console.options.update(max_width=BOUNDLESS)).maximum
        cells = [max(map(measured_width, (column.header, *column.cells))) for column in table.columns]
        texts = [row for row, column in enumerate(table.columns) if column.justify == "left"]
        for row in sorted(texts, key=lambda row: (table.columns[row].no_wrap, -cells[row])):
            least = LEAST_TEXT if table.columns[row].no_wrap else LEAST_WRAPPED
            excess = min(wanted - width, cells[row] - least)
            if excess > 0:
                table.columns[row].width = cells[row] - excess
                wanted -= excess
        return wanted

    def heading(self, title: str, beside: str = "") -> None:
        """An empty line and a section's title, with a dim remark behind it."""
        self.add()
        line = Text(title, style="bold cyan")
        if beside:
            line.append(f"  {beside}", style="not bold dim")
        self.add(line)

    def bullet(self, text: Text | str, sign: str = "-", style: str = "", indent: int = 2) -> None:
        """A list item whose further lines are indented below its first."""
        row = Table.grid(padding=0)
        row.add_column(width=indent)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1, overflow="fold")
        body = Text(text, style=style) if isinstance(text, str) else text
        row.add_row("", Text(f"{sign} ", style=style), body)
        self.add(row)

    def bar(self, share: float, cells: int) -> Text:
        """A bar of at most ``cells`` characters that is ``share`` long; never empty for what is more than nothing."""
        share = min(max(share, 0.0), 1.0)
        eighths = round(share * cells * 8)
        if share > 0:
            eighths = max(eighths, 1)
        if self.is_ascii:
            return Text("#" * -(-eighths // 8), style="blue")
        return Text("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip(), style="blue")

    def text(self) -> str:
        """All that was added. Without colour no line ends in spaces."""
        whole = self._file.getvalue()
        if self.style.color:
            return whole
        return "".join(line.rstrip() + "\n" for line in whole.splitlines())


def plain_table(columns: Sequence[tuple[str, bool]], wide_column: int | None = None) -> Table:
    """A table with a rule below its header. A column is (title, is a number); numbers stand to the right.

    ``wide_column`` is the one that may wrap; the others keep their text on one line.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
    )
    for index, (title, is_number) in enumerate(columns):
        table.add_column(
            title,
            justify="right" if is_number else "left",
            no_wrap=index != wide_column,
            overflow="fold" if index == wide_column or is_number else "ellipsis",
        )
    return table


def measured_width(cell: RenderableType) -> int:
    """Columns that a cell takes on one line."""
    return Text(cell).cell_len if isinstance(cell, str) else cell.cell_len if isinstance(cell, Text) else 0


def counted(count: int, one: str, many: str) -> str:
    """A count with its noun: ``1 thread``, ``12,000 threads``."""
    return f"{count:,} {one if count == 1 else many}"


def part_of_all(shown: int, total: int, what: str, how_to_get_all: str) -> str:
    """The line below a table that does not show everything; empty where it does."""
    return f"+{total - shown:,} more {what} ({how_to_get_all})" if total > shown else ""
