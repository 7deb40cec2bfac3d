"""Leaks, explanations, owners, retained sizes: documents validate, tables say the same, pages obey nothing."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from rich.cells import cell_len

from coreheap.leaks import Explanation, LeakReport, OwnerNode, RetainedReport, Verdict
from coreheap.render import tables, terminal_leaks
from coreheap.render.escaping import printable
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.render.leak_documents import explanation_line, owners_line
from coreheap.render.leak_tables import leak_groups_table, retained_table
from coreheap.render.page import PageStyle
from tests.unit import report_samples
from tests.unit.report_samples import HOSTILE, explanation, group, hostile_explanation, leaks, owner_nodes, suspects

SCHEMA = json.loads(schema_text(SchemaName.ROW))
HOSTILE_REPORT = report_samples.damaged_report()
GROUP_TABLES = {
    "suspects": leak_groups_table(suspects()),
    "hostile": leak_groups_table(HOSTILE_REPORT.leaks),
    "none": leak_groups_table(None),
}
RETAINED_TABLES = {
    "retained": retained_table(report_samples.retained()),
    "hostile": retained_table(HOSTILE_REPORT.retained),
    "none": retained_table(None),
}
NOWHERE = Explanation(0x10, "not mapped", "", is_saved=False)


def validate(definition: str, line: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(line)
    Draft202012Validator(SCHEMA).validate(row)
    Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{definition}"}]}).validate(row)
    assert set(row) == set(SCHEMA["$defs"][definition]["properties"])
    return row


@pytest.mark.parametrize(
    ("definition", "table"),
    [
        *(("leak_group", table) for table in GROUP_TABLES.values()),
        *(("retained", table) for table in RETAINED_TABLES.values()),
    ],
)
def test_rows_validate_and_csv_says_the_same(definition: str, table: tables.Table) -> None:
    rows = [validate(definition, line) for line in tables.json_lines(table).splitlines()]
    spoken = list(csv.DictReader(io.StringIO(tables.csv_text(table))))
    assert len(spoken) == len(rows)
    for cells, row in zip(spoken, rows, strict=True):
        # CSV has no escapes of its own: what a terminal would obey is written out.
        assert cells == {name: "" if value is None else printable(str(value)) for name, value in row.items()}


def test_groups_of_some_verdicts() -> None:
    table = leak_groups_table(suspects(), {Verdict.WEAKLY_HELD, Verdict.POSSIBLY_LOST})
    assert [row[:2] for row in table.rows] == [(1, "possibly_lost"), (2, "weakly_held")]
    row = next(tables.json_rows(leak_groups_table(suspects())))
    assert row["arenas"] == "3:3990 mmapped:10"
    assert row["samples"] == "0x7f3a140008d0 0x7f3a14000ce0"


def test_accumulation_points_stand_behind_the_chunks_that_retain_most() -> None:
    rows = list(tables.json_rows(RETAINED_TABLES["retained"]))
    assert [row["kind"] for row in rows] == ["chunk", "chunk", "accumulation", "accumulation"]
    assert rows[0]["retained_count"] == 120_001
    assert rows[2]["payload_address"] == "0x7f3a14010010"
    assert rows[3]["payload_address"] is None
    assert rows[3]["holder"] == "libfoo.so cache"


@pytest.mark.parametrize("told", [explanation(), hostile_explanation(), NOWHERE], ids=["told", "hostile", "nowhere"])
def test_explanations_and_owners_validate(told: Explanation) -> None:
    line = explanation_line(told)
    assert line.isascii()
    assert line.count("\n") == 1
    row = validate("explanation", line)
    assert row["address"] == hex(told.address)
    assert (row["chunk"] is None) == (told.chunk is None)
    assert len(row["path"]) == len(told.path)
    validate("owners", owners_line(told, owner_nodes() if told.chunk else ()))


def test_references_say_who_holds_and_where() -> None:
    row = json.loads(explanation_line(explanation()))
    register, table = row["holders"]
    assert register["source_chunk"] is None
    assert register["source_place"] == {"kind": "register", "address": None, "name": "thread 0 rdi", "thread": 0}
    assert (register["target_chunk"]["payload_address"], register["target_offset"]) == ("0x7f3a140008d0", 16)
    assert table["source_place"] is None
    assert (table["source_chunk"]["payload_address"], table["source_offset"]) == ("0x7f3a14010010", 24)
    tree = json.loads(owners_line(explanation(), owner_nodes()))
    assert tree["omitted"] == 38
    assert tree["owners"][1]["owners"][1]["seen_before"] is True


PAGES: dict[str, Callable[[PageStyle], str]] = {
    "leaks": lambda style: terminal_leaks.leaks_text(suspects(), style),
    "leaks_none": lambda style: terminal_leaks.leaks_text(None, style),
    "leaks_hostile": lambda style: terminal_leaks.leaks_text(HOSTILE_REPORT.leaks, style),
    "explain": lambda style: terminal_leaks.explanations_text([explanation(), NOWHERE], style),
    "explain_hostile": lambda style: terminal_leaks.explanations_text([hostile_explanation()], style),
    "owners": lambda style: terminal_leaks.owners_text([(explanation(), owner_nodes()), (NOWHERE, ())], style),
    "owners_hostile": lambda style: terminal_leaks.owners_text(
        [(hostile_explanation(), tuple(OwnerNode(step) for step in hostile_explanation().path[:3]))], style
    ),
    "top": lambda style: terminal_leaks.retained_text(report_samples.retained(), style),
    "top_none": lambda style: terminal_leaks.retained_text(None, style),
    "top_hostile": lambda style: terminal_leaks.retained_text(HOSTILE_REPORT.retained, style),
}


@pytest.mark.parametrize("name", ["leaks", "explain", "owners", "top"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_page_is_what_it_was(name: str, width: int, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}_{width}.txt", PAGES[name](PageStyle(width=width)))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_no_line_is_wider_than_the_page_and_nothing_is_obeyed(page: Callable[[PageStyle], str], width: int) -> None:
    text = page(PageStyle(width=width, top=50))
    # Below 80 columns a table keeps its numbers whole and is wider than the page.
    assert max(cell_len(line) for line in text.splitlines()) <= max(width, 80)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_an_output_that_knows_only_ascii_gets_only_ascii(page: Callable[[PageStyle], str]) -> None:
    text = page(PageStyle(encoding="ascii"))
    assert text.translate(dict.fromkeys(map(ord, "…–"))).isascii()


def test_a_long_way_is_shown_from_both_ends() -> None:
    text = PAGES["explain_hostile"](PageStyle(width=200))
    assert "- 189 steps\n" in text
    assert text.count("at +1099511627776") == 11


def test_what_is_not_shown_is_counted() -> None:
    many = leaks(*(group(number) for number in range(30)), group_count=1000)
    assert "+995 more groups" in terminal_leaks.leaks_text(many, PageStyle(top=5))
    assert "no group of suspects" in terminal_leaks.leaks_text(suspects(), PageStyle(), {Verdict.STILL_REACHABLE})
    assert "no group of suspects" in terminal_leaks.leaks_text(leaks(), PageStyle())
    assert "held by (40)" in PAGES["explain"](PageStyle())
    assert "+38 more (--limit N)" in PAGES["explain"](PageStyle())


def test_missing_memory_is_said() -> None:
    report: LeakReport = leaks(group(verdict=Verdict.POSSIBLY_LOST), missing_root_bytes=1 << 20)
    text = terminal_leaks.leaks_text(report, PageStyle())
    assert "1.00 MiB of writable memory are not in the core: nothing is definitely lost" in text
    assert "4.00 MiB of writable mapped files" in PAGES["leaks"](PageStyle(width=120))


def test_hostile_names_are_written_out() -> None:
    assert HOSTILE not in PAGES["explain_hostile"](PageStyle(width=200))
    assert "[bold]x[/bold]" in PAGES["explain_hostile"](PageStyle(width=200))


def test_no_accumulation_points_is_said() -> None:
    text = terminal_leaks.retained_text(RetainedReport((), (), 0), PageStyle())
    assert "Accumulation points  none" in text
