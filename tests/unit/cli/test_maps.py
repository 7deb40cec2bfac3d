"""``coreheap maps``: its words, and the same numbers in every form."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from coreheap.cli import main
from coreheap.cli.arguments import KIND_COLUMNS, MAPPING_COLUMNS, MAPPING_KINDS
from coreheap.mappings import KINDS
from coreheap.render import maps
from coreheap.render.json_document import SchemaName, schema_text

CORES = Path(__file__).parents[3].joinpath("fixtures", "cores")
CORE = str(CORES / "threads_small.core.zst")
ROW = json.loads(schema_text(SchemaName.ROW))
SUMS = ("reserved_bytes", "committed_bytes", "saved_bytes", "resident_low_bytes", "resident_high_bytes")


def test_names_known_to_the_parser_are_those_of_the_table() -> None:
    assert tuple(kind.value for kind in KINDS) == MAPPING_KINDS
    assert tuple(column.name for column in maps.KIND_COLUMNS) == KIND_COLUMNS
    assert tuple(column.name for column in maps.MAPPING_COLUMNS) == MAPPING_COLUMNS


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["maps", *words, "-q"]) == 0
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in said(capsys, *words, "--json").splitlines()]


def total(made: list[dict[str, object]], column: str) -> int:
    return sum(int(str(row[column])) for row in made)


def test_kinds_mappings_and_the_report_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    kinds, flat = rows(capsys, CORE), rows(capsys, CORE, "--flat")
    for definition, made in (("mapping_kind", kinds), ("mapping", flat)):
        validator = Draft202012Validator({**ROW, "anyOf": [{"$ref": f"#/$defs/{definition}"}]})
        for row in made:
            validator.validate(row)
    for kind in kinds:
        own = [row for row in flat if row["kind"] == kind["kind"]]
        assert kind["count"] == len(own)
        assert [kind[column] for column in SUMS] == [total(own, column) for column in SUMS]
        assert total(own, "reserved_bytes") == sum(
            int(str(row["end_address"]), 16) - int(str(row["address"]), 16) for row in own
        )
    assert main(["analyze", CORE, "--json", "--no-leaks", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["mappings"] == {"residency": "zero_pages", "residency_confidence": "certain", "kinds": kinds}
    ledger = report["ledger"]
    assert ledger["bytes"] == total(kinds, "reserved_bytes")
    for column in SUMS[1:]:
        assert ledger[column] == total(kinds, column)
    malloc = next(node for node in ledger["children"] if node["name"] == "malloc")
    of_malloc = [row for row in kinds if row["kind"] in MAPPING_KINDS[:4]]
    assert malloc["bytes"] == total(of_malloc, "reserved_bytes")
    assert malloc["resident_low_bytes"] == total(of_malloc, "resident_low_bytes")


def test_csv_has_the_rows_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([CORE], [CORE, "--flat"], [CORE, "--flat", "--kind", "tls,main-stack", "--sort", "thread"]):
        spoken = list(csv.DictReader(io.StringIO(said(capsys, *words, "--csv"))))
        made = rows(capsys, *words)
        assert made
        assert spoken == [
            {column: "" if value is None else str(value) for column, value in row.items()} for row in made
        ]


def test_rows_are_filtered_sorted_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    stacks = rows(capsys, CORE, "--flat", "--kind", "thread_stack", "--sort", "lwp", "--descending")
    assert [row["kind"] for row in stacks] == ["thread_stack"] * 4
    lwps = [int(str(row["lwp"])) for row in stacks]
    assert lwps == sorted(lwps, reverse=True)
    largest = rows(capsys, CORE, "--sort", "reserved_bytes", "--descending", "--top", "2")
    assert [row["kind"] for row in largest] == ["arena_reserve", "module_text"]
    assert rows(capsys, CORE, "--top", "2") == largest
    assert [row["kind"] for row in rows(capsys, CORE, "--sort", "kind")] == sorted(
        str(row["kind"]) for row in rows(capsys, CORE)
    )


def test_text_is_a_table_with_its_sum(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, CORE)
    assert text.splitlines()[0].split() == ["kind", "count", "mapped", "committed", "saved", "in", "memory"]
    assert "\ntotal " in text
    assert "pages of zeros" in " ".join(text.split())
    flat = said(capsys, CORE, "--flat", "--top", "3")
    assert "more" not in flat.splitlines()[0]
    assert "smaller mappings (--top N" in flat
    assert max(len(line) for line in (text + flat).splitlines()) <= 80


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--kind", "heap"], "there is no kind of mapping 'heap'"),
        (["--sort", "size"], "there is no column 'size'"),
        (["--sort", "address"], "there is no column 'address'"),
        (["--sort", "count", "--flat"], "there is no column 'count'"),
        (["--sort", "kind,count"], "there is no column"),
        (["--descending"], "--descending says nothing without --sort"),
        (["--top", "0"], "is not a number from 1 on"),
    ],
)
def test_mistakes_are_answered(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["maps", CORE, *words]) == 2
    assert expected in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["maps", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for word in ("coreheap maps core.1234 --flat", "address space", "RSS", *MAPPING_KINDS, *MAPPING_COLUMNS):
        assert word in text
