"""Pages for people: what stands on them, at which width, and that nothing in them is obeyed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
from rich.cells import cell_len

from coreheap.heap import NO_INDEX
from coreheap.render import rows, tables
from coreheap.render.page import Page, PageStyle, plain_table
from coreheap.render.terminal import report_text
from coreheap.render.terminal_tables import chunks_text, table_text
from coreheap.report import Report
from tests.unit import report_samples

REPORTS = {
    "report": report_samples.report(),
    "small": report_samples.small_report(),
    "heapless": report_samples.heapless_report(),
    "damaged": report_samples.damaged_report(),
    "corrupt": report_samples.corrupt_report(),
    "sound": report_samples.sound_report(),
}
ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_what_it_was(name: str, width: int, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}_{width}.txt", report_text(REPORTS[name], PageStyle(width=width)))


@pytest.mark.parametrize("name", ["arenas", "heaps", "bins", "threads"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_are_what_they_were(name: str, width: int, golden: Callable[[str, str], None]) -> None:
    table = tables.table_named(name, REPORTS["report"])
    golden(f"table_{name}_{width}.txt", table_text(name, table, PageStyle(width=width, top=5)))


@pytest.mark.parametrize("name", ["arenas", "heaps", "bins", "threads"])
@pytest.mark.parametrize("width", [20, 60, 70, 80])
def test_a_narrow_terminal_cuts_no_number(name: str, width: int) -> None:
    """A size, a count or an address without its last digits would be another one."""
    table = tables.table_named(name, REPORTS["report"])
    wide, narrow = (table_text(name, table, PageStyle(width=columns, top=50)) for columns in (111, width))
    numbers = re.compile(r"0x[0-9a-f]+|[0-9][0-9,.]*(?: [KMGT]?i?B\b)?")
    assert len(numbers.findall(wide)) > len(table.rows)
    assert Counter(numbers.findall(narrow)) == Counter(numbers.findall(wide))


def test_names_are_cut_before_numbers_and_say_so() -> None:
    page = Page(PageStyle(width=60))
    table = plain_table([("name", False), ("address", False), ("bytes", True)])
    table.add_row("n" * 200, "0x7f3a10000020", "1,490,304")
    page.add(table)
    (line,) = page.text().splitlines()[2:]
    assert cell_len(line) == 60
    assert line.lstrip("n").split() == ["…", "0x7f3a10000020", "1,490,304"]


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_no_line_is_wider_than_the_page(report: Report, width: int, verbose: bool) -> None:
    text = report_text(report, PageStyle(width=width, verbose=verbose))
    assert max(cell_len(line) for line in text.splitlines()) <= width


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_without_colour_there_is_no_escape_sequence(report: Report) -> None:
    text = report_text(report, PageStyle(verbose=True))
    assert "\x1b" not in text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)


def test_with_colour_only_styles_are_added() -> None:
    styled = report_text(REPORTS["damaged"], PageStyle(color=True))
    assert "\x1b[" in styled
    bare = "".join(line.rstrip() + "\n" for line in ESCAPE_SEQUENCE.sub("", styled).splitlines())
    assert bare == report_text(REPORTS["damaged"], PageStyle())


def test_markup_in_names_is_shown_as_it_is() -> None:
    assert "[bold]x[/bold]" in report_text(REPORTS["damaged"], PageStyle())


def test_an_output_that_knows_only_ascii_gets_only_ascii() -> None:
    assert report_text(REPORTS["small"], PageStyle(encoding="ascii", verbose=True)).isascii()
    text = report_text(REPORTS["small"], PageStyle(encoding="ascii"))
    assert text.isascii()
    assert "####" in text


def test_the_verdict_comes_first() -> None:
    text = report_text(REPORTS["report"], PageStyle())
    sections = re.findall(
        r"^(Verdict|Where the memory went|Chunks by state|Arenas|Findings|What cannot|Where the heap|How the heap)",
        text,
        re.MULTILINE,
    )
    assert sections == [
        "Verdict",
        "Where the memory went",
        "Chunks by state",
        "Arenas",
        "Findings",
        "What cannot",
        "Where the heap",
        "How the heap",
    ]


def test_costs_are_shown_with_v_only() -> None:
    assert "What the analysis cost" not in report_text(REPORTS["report"], PageStyle())
    assert "What the analysis cost" in report_text(REPORTS["report"], PageStyle(verbose=True))


def test_long_lists_are_cut_and_counted() -> None:
    text = report_text(REPORTS["damaged"], PageStyle())
    assert text.count("  ! bad ") == 10
    assert "+89,990 more places" in text
    assert "+3 more arenas" in report_text(REPORTS["report"], PageStyle(top=10))


def test_the_chunk_table_says_how_many_there_are() -> None:
    heap = REPORTS["report"].heap
    assert heap is not None
    found = rows.wanted_rows(heap.chunks.batches(), heap.arenas, rows.ChunkFilter())
    text = chunks_text(rows.largest_chunks(found, 2), PageStyle())
    assert "0x7f3a60021010  4,198,400" in text
    assert "9 chunks, 4.14 MiB; the 2 largest are shown" in text


def test_a_chunk_table_of_nothing_says_so() -> None:
    part = report_samples.batch(0x1000, [32], [0], arena=NO_INDEX)
    found = rows.wanted_rows([part], (), rows.ChunkFilter(min_bytes=64))
    assert chunks_text(rows.largest_chunks(found, 5), PageStyle()) == "0 chunks, 0 B\n"
