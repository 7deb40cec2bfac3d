"""The address space as rows and as text: columns, order, filters, and what each row promises."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Callable

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from rich.cells import cell_len

from coreheap.mappings import MappingTable, ResidencyBasis
from coreheap.render import maps, tables
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.render.maps import MapsOrder
from coreheap.render.page import PageStyle
from coreheap.render.terminal_maps import kinds_text, mappings_text
from coreheap.report import Report
from tests.unit import report_samples

REPORT = report_samples.report()
UNKNOWN = report_samples.report(mappings=report_samples.mappings(ResidencyBasis.UNKNOWN))
BARE = report_samples.report(mappings=None)
REPORTS = {"report": REPORT, "unknown": UNKNOWN, "bare": BARE}
SCHEMA = json.loads(schema_text(SchemaName.ROW))
PAGE = 4096
ALL = MapsOrder()


def flat(report: Report, order: MapsOrder = ALL) -> list[dict[str, tables.Cell]]:
    return [row for table in maps.mapping_tables(report, order) for row in tables.json_rows(table)]


def grouped(report: Report, order: MapsOrder = ALL) -> list[dict[str, tables.Cell]]:
    return list(tables.json_rows(maps.kinds_table(report, order)))


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize(("definition", "made"), [("mapping", flat), ("mapping_kind", grouped)])
def test_every_row_validates(
    report: Report, definition: str, made: Callable[[Report], list[dict[str, tables.Cell]]]
) -> None:
    validator = Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{definition}"}]})
    for row in made(report):
        validator.validate(row)
        assert set(row) == set(SCHEMA["$defs"][definition]["properties"])


def test_kinds_are_sums_of_their_mappings_the_largest_first() -> None:
    rows = grouped(REPORT)
    assert [row["kind"] for row in rows[:2]] == ["arena_reserve", "arena_heap"]
    by_kind = {row["kind"]: row for row in rows}
    chunks = by_kind["mmapped_chunk"]
    assert (chunks["count"], chunks["reserved_bytes"], chunks["resident_low_bytes"]) == (2, 1065 * PAGE, 1027 * PAGE)
    for column in ("reserved_bytes", "committed_bytes", "saved_bytes", "resident_low_bytes", "resident_high_bytes"):
        assert sum(int(row[column] or 0) for row in rows) == sum(int(row[column] or 0) for row in flat(REPORT))
        place = [kind.name for kind in maps.KIND_COLUMNS].index(column)
        assert maps.total_row(maps.kinds_table(REPORT))[place] == sum(int(row[column] or 0) for row in rows)


def test_a_mapping_says_whose_it_is() -> None:
    rows = {row["address"]: row for row in flat(REPORT)}
    stack = rows["0x7f3a70001000"]
    assert (stack["thread"], stack["lwp"], stack["arena"], stack["name"]) == (3, 4245, None, None)
    assert (stack["permissions"], stack["resident_low_bytes"]) == ("rw-", 4 * PAGE)
    assert rows["0x7f3a14000000"]["arena"] == 1
    assert rows["0x5599df000000"]["name"] == "/usr/sbin/serviced"
    assert rows["0x7f3a80000000"]["permissions"] is None
    assert rows["0x7f3a18e20000"]["end_address"] == f"{0x7F3A18E20000 + 96_000 * PAGE:#x}"


def test_what_is_not_known_is_null() -> None:
    for rows in (flat(UNKNOWN), grouped(UNKNOWN)):
        assert {row["resident_low_bytes"] for row in rows} == {row["resident_high_bytes"] for row in rows} == {None}


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("column", [column.name for column in maps.MAPPING_COLUMNS])
def test_mappings_are_sorted_by_any_column(column: str, descending: bool) -> None:
    place = {"address": "start", "end_address": "end"}
    values = [row[column] for row in flat(REPORT, MapsOrder(column=column, descending=descending))]
    if column in place:
        values = [int(str(value), 16) for value in values]
    keys = [(value is not None, value if value is not None else 0) for value in values]
    if column in ("name", "permissions"):
        keys = [(value is not None, str(value or "")) for value in values]
    assert keys == sorted(keys, reverse=descending)  # type: ignore[type-var]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("column", [column.name for column in maps.KIND_COLUMNS])
def test_kinds_are_sorted_by_any_column(column: str, descending: bool) -> None:
    for report in (REPORT, UNKNOWN):
        values = [row[column] for row in grouped(report, MapsOrder(column=column, descending=descending))]
        known = [value for value in values if value is not None]
        assert known == sorted(known, reverse=descending)  # type: ignore[type-var]


def test_filters_and_the_first_rows() -> None:
    order = MapsOrder(kinds=("mmapped_chunk", "main_stack"))
    assert [row["kind"] for row in flat(REPORT, order)] == ["mmapped_chunk", "mmapped_chunk", "main_stack"]
    assert {row["kind"] for row in grouped(REPORT, order)} == set(order.kinds)
    # The largest ones, by address.
    assert [row["kind"] for row in flat(REPORT, MapsOrder(top=3))] == ["arena_heap", "arena_reserve", "thread_stack"]
    smallest = flat(REPORT, MapsOrder(column="reserved_bytes", top=1))
    assert [row["kind"] for row in smallest] == ["stack_guard"]


def test_very_many_mappings_come_in_batches() -> None:
    few = report_samples.mappings()
    count = 2 * maps.BATCH_ROWS + 5
    columns = {
        field.name: np.resize(getattr(few, field.name), count)
        for field in dataclasses.fields(MappingTable)
        if field.name not in ("names", "basis")
    }
    columns["start"] = np.arange(count, dtype=np.uint64) * np.uint64(PAGE)
    columns["end"] = columns["start"] + np.uint64(PAGE)
    report = report_samples.report(mappings=dataclasses.replace(few, **columns))
    lengths = [len(table.rows) for table in maps.mapping_tables(report, MapsOrder())]
    assert lengths == [maps.BATCH_ROWS, maps.BATCH_ROWS, 5]
    assert [row["address"] for row in flat(report)] == [f"{number * PAGE:#x}" for number in range(count)]


def test_csv_has_no_control_characters_and_says_the_same_as_json() -> None:
    (table,) = maps.mapping_tables(REPORT, MapsOrder(), is_text=True)
    text = tables.csv_text(table)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    for cells, row in zip(csv.DictReader(io.StringIO(text)), flat(REPORT), strict=True):
        assert list(cells) == list(row)
        for column, value in row.items():
            if column != "name":
                assert cells[column] == ("" if value is None else str(value))
    assert "/tmp/\\x1b[31m,red\\n\\u202efile" in [row["name"] for row in csv.DictReader(io.StringIO(text))]


def test_the_report_has_the_same_sums() -> None:
    value = {"residency": "holes", "residency_confidence": "certain", "kinds": grouped(REPORT)}
    assert maps.mappings_value(REPORT) == value
    assert maps.mappings_value(BARE) is None


@pytest.mark.parametrize("width", [80, 120])
def test_the_pages_are_what_they_were(width: int, golden: Callable[[str, str], None]) -> None:
    style = PageStyle(width=width, top=50)
    golden(f"maps_{width}.txt", kinds_text(REPORT, MapsOrder(), style))
    golden(f"maps_flat_{width}.txt", mappings_text(REPORT, MapsOrder(), style))


@pytest.mark.parametrize("width", [60, 80, 111, 112, 160])
@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_no_line_is_wider_than_the_page_and_nothing_is_obeyed(report: Report, width: int) -> None:
    for make in (kinds_text, mappings_text):
        text = make(report, MapsOrder(), PageStyle(width=width, top=50))
        # Below 80 columns a table keeps its numbers whole and is wider than the page.
        assert max(cell_len(line) for line in text.splitlines()) <= max(width, 80)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)


def test_bounds_that_say_nothing_are_unknown() -> None:
    assert maps.permissions(0) == "---"
    text = kinds_text(REPORT, MapsOrder(), PageStyle())
    assert re.search(r"module text .* unknown$", text, re.MULTILINE)
    assert re.search(r"thread stack .* 16\.0 KiB$", text, re.MULTILINE)
    assert re.search(r"^total .* 78\.4 MiB\.\.", text, re.MULTILINE)
    assert "these kinds" in kinds_text(REPORT, MapsOrder(kinds=("main_stack",)), PageStyle())
