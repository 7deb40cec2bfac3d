"""The small tables: columns, order, CSV and JSON lines, and what each row promises."""

from __future__ import annotations

import csv
import io
import json

import pytest
from jsonschema import Draft202012Validator

from coreheap.render import tables
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.report import Report
from tests.unit import report_samples

NAMES = ("arenas", "heaps", "bins", "threads")
REPORTS = {
    "report": report_samples.report(),
    "small": report_samples.small_report(),
    "heapless": report_samples.heapless_report(),
    "damaged": report_samples.damaged_report(),
}
SCHEMA = json.loads(schema_text(SchemaName.ROW))


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_row_validates(name: str, report: Report) -> None:
    definition = name.removesuffix("s")
    validator = Draft202012Validator({**SCHEMA, "anyOf": [{"$ref": f"#/$defs/{definition}"}]})
    for line in tables.json_lines(tables.table_named(name, report)).splitlines():
        row = json.loads(line)
        validator.validate(row)
        assert set(row) == set(SCHEMA["$defs"][definition]["properties"])


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
@pytest.mark.parametrize("name", NAMES)
def test_csv_says_the_same_as_json(name: str, report: Report) -> None:
    table = tables.table_named(name, report)
    spoken = list(csv.DictReader(io.StringIO(tables.csv_text(table))))
    for cells, row in zip(spoken, tables.json_rows(table), strict=True):
        assert list(cells) == list(row)
        for column, value in row.items():
            expected = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            assert cells[column] == expected


def test_arenas_have_the_totals_of_each_state_side_by_side() -> None:
    row = next(tables.json_rows(tables.arenas_table(REPORTS["report"])))
    assert row["address"] == "0x7f3a5bff1c80"
    assert row["in_use_count"] == 40_000
    assert row["large_bin_chunk_bytes"] == 2 << 20
    assert row["damaged_count"] == 0


def test_heaps_lists_sub_heaps_and_the_main_arenas_own_pieces() -> None:
    rows = list(tables.json_rows(tables.heaps_table(REPORTS["report"])))
    assert [row["kind"] for row in rows] == ["brk"] + ["arena_heap"] * 12
    assert rows[0]["mprotect_bytes"] is None
    assert rows[1]["reserved_bytes"] == 64 << 20
    assert rows[1]["in_use_count"] == 1_000


def test_largest_keeps_the_order_of_equals_and_puts_unknown_last() -> None:
    table = tables.Table(
        (tables.Column("name", tables.CellKind.WORD), tables.Column("bytes", tables.CellKind.BYTES)),
        (("a", 1), ("b", None), ("c", 3), ("d", 3)),
    )
    assert [row[0] for row in table.largest("bytes", 3).rows] == ["c", "d", "a"]
    with pytest.raises(KeyError):
        table.largest("weight", 1)
