"""Every command on every core that ships: documents and rows validate, and say the same."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from coreheap.cli import main
from coreheap.render.json_document import SchemaName, schema_text

CORES = sorted(Path(__file__).parents[3].joinpath("fixtures", "cores").glob("*.core.zst"))
REPORT = Draft202012Validator(json.loads(schema_text(SchemaName.REPORT)))
ROW = Draft202012Validator(json.loads(schema_text(SchemaName.ROW)))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words, "-q"]) == 0
    return capsys.readouterr().out


def rows(capsys: pytest.CaptureFixture[str], command: str, core: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in said(capsys, command, str(core), "--json").splitlines()]


def test_cores_are_shipped() -> None:
    assert CORES


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.name)
def test_the_report_validates_and_its_sums_come_out(core: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = json.loads(said(capsys, "analyze", str(core), "--json"))
    REPORT.validate(report)
    chunks = rows(capsys, "chunks", core)
    for row in chunks[:50]:
        ROW.validate(row)
    for state in {str(row["state"]) for row in chunks}:
        of_state = [row for row in chunks if row["state"] == state]
        assert report["totals"][state] == {
            "count": len(of_state),
            "chunk_bytes": sum(int(str(row["chunk_bytes"])) for row in of_state),
            "usable_bytes": sum(int(str(row["usable_bytes"])) for row in of_state),
        }
    assert len(chunks) == sum(report["totals"][state]["count"] for state in {str(row["state"]) for row in chunks})


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.name)
@pytest.mark.parametrize("command", ["arenas", "heaps", "chunks", "bins", "threads", "maps"])
def test_tables_validate_and_csv_says_the_same(core: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = rows(capsys, command, core)
    assert made
    for row in made[:50]:
        ROW.validate(row)
    spoken = list(csv.DictReader(io.StringIO(said(capsys, command, str(core), "--csv"))))
    for cells, row in zip(spoken, made, strict=True):
        for column, value in row.items():
            expected = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            assert cells[column] == expected
    assert said(capsys, command, str(core)).strip()


VERDICTS = ("definitely_lost", "indirectly_lost", "possibly_lost", "weakly_held", "still_reachable")


@pytest.mark.parametrize("core", CORES, ids=lambda core: core.name)
def test_leaks_add_up_and_their_chunks_can_be_asked_about(core: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaks = json.loads(said(capsys, "analyze", str(core), "--json"))["leaks"]
    every = [option for verdict in VERDICTS for option in ("--verdict", verdict)]
    listed = [json.loads(line) for line in said(capsys, "leaks", str(core), "--list", *every, "--json").splitlines()]
    for verdict in VERDICTS:
        of_verdict = [row for row in listed if row["verdict"] == verdict]
        assert leaks[verdict] == {
            "count": len(of_verdict),
            "usable_bytes": sum(row["usable_bytes"] for row in of_verdict),
        }
    for row in listed:
        ROW.validate(row)
    groups = rows(capsys, "leaks", core)
    assert [row["number"] for row in groups] == [group["number"] for group in leaks["groups"]]
    for group in leaks["groups"]:
        of_group = [row for row in listed if row["group"] == group["number"]]
        assert len(of_group) == group["count"] + group["indirect_count"]
        assert sum(row["usable_bytes"] for row in of_group) == group["usable_bytes"] + group["indirect_bytes"]
    with_verdicts = said(capsys, "chunks", str(core), "--leaks", "--json").splitlines()
    found = {row["payload_address"]: row["verdict"] for row in map(json.loads, with_verdicts)}
    assert {row["payload_address"]: row["verdict"] for row in listed} == {
        address: verdict for address, verdict in found.items() if verdict is not None
    }
    assert said(capsys, "analyze", str(core), "--no-leaks", "--json").count('"leaks": null') == 1
    for row in rows(capsys, "top", core)[:20]:
        ROW.validate(row)
    if not listed:
        return
    address = listed[0]["payload_address"]
    for command in ("explain", "owners"):
        (answer,) = (json.loads(line) for line in said(capsys, command, str(core), address, "--json").splitlines())
        ROW.validate(answer)
        assert answer["chunk"]["verdict"] == listed[0]["verdict"]
        assert address in said(capsys, command, str(core), address)
