"""The JSON document: it validates, it keeps its rules, and it says what the report says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from coreheap.heap import ChunkState
from coreheap.render.json_document import (
    CHECK_KEYS,
    SchemaName,
    check_document,
    check_json_text,
    json_document,
    json_text,
    schema_text,
)
from coreheap.report import Report
from tests.unit import report_samples

REPORTS = {
    "report": report_samples.report(),
    "small": report_samples.small_report(),
    "heapless": report_samples.heapless_report(),
    "damaged": report_samples.damaged_report(),
    "corrupt": report_samples.corrupt_report(),
    "wrong_free": report_samples.wrong_free_report(),
    "stale": report_samples.stale_report(),
    "sound": report_samples.sound_report(),
}
CONTRACT_KEYS = [
    "schema_version",
    "tool",
    "core",
    "process",
    "allocator",
    "totals",
    "arenas",
    "leaks",
    "ledger",
    "findings",
    "anomalies",
    "gaps",
    "phases",
]


def written(report: Report) -> dict[str, Any]:
    """The document as its readers take it: untyped."""
    return dict(json_document(report))


@pytest.mark.parametrize("name", SchemaName)
def test_shipped_schemas_are_schemas(name: SchemaName) -> None:
    Draft202012Validator.check_schema(json.loads(schema_text(name)))


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_every_document_validates(report: Report) -> None:
    document = json.loads(json_text(report))
    Draft202012Validator(json.loads(schema_text(SchemaName.REPORT))).validate(document)
    assert set(CONTRACT_KEYS) <= set(document)


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_the_schema_names_every_key_that_is_written(report: Report) -> None:
    schema = json.loads(schema_text(SchemaName.REPORT))

    def closed(node: Any) -> Any:
        if isinstance(node, list):
            return [closed(item) for item in node]
        if not isinstance(node, dict):
            return node
        made = {key: closed(value) for key, value in node.items()}
        if "properties" in made and "allOf" not in made and made.get("type") == "object":
            made.setdefault("unevaluatedProperties", False)
        return made

    strict = closed(schema)
    # A state's totals appear alone, and with "binned" beside them.
    strict["$defs"]["states"].pop("unevaluatedProperties")
    states = strict["$defs"]["arena"]["properties"]["states"]
    states["allOf"][1].pop("unevaluatedProperties")
    states["unevaluatedProperties"] = False
    Draft202012Validator(strict).validate(json.loads(json_text(report)))


@pytest.mark.parametrize("name", ["report", "heapless"])
def test_the_document_is_what_it_was(name: str, golden: Callable[[str, str], None]) -> None:
    golden(f"{name}.json", json_text(REPORTS[name]))


def leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(node, list):
        for value in node:
            yield from leaves(value, path)
    else:
        yield path, node


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_addresses_are_hex_and_bytes_are_integers(report: Report) -> None:
    for path, value in leaves(json.loads(json_text(report))):
        key = path.rpartition("/")[2]
        if value is None or path.startswith("/findings/units"):
            continue
        if key.endswith("address") or key in {"main_arena", "mp", "start", "end", "sbrk_base"}:
            assert re.fullmatch("0x[0-9a-f]+", str(value)), path
        if key.endswith("_bytes") or key in {"bytes", "system_mem", "count"}:
            assert type(value) is int, path


def test_totals_are_those_of_the_report() -> None:
    report = REPORTS["report"]
    totals = written(report)["totals"]
    assert report.heap is not None
    for state in ChunkState:
        total = report.totals[state]
        assert totals[state.label] == {
            "count": total.count,
            "chunk_bytes": total.chunk_bytes,
            "usable_bytes": total.usable_bytes,
        }
    binned = [totals[name] for name in ("unsorted_bin", "small_bin", "large_bin")]
    assert totals["binned"] == {key: sum(part[key] for part in binned) for key in binned[0]}
    assert totals["system_mem"] == sum(arena.system_mem or 0 for arena in report.heap.arenas)


def test_unknown_is_null_never_zero() -> None:
    heapless = written(REPORTS["heapless"])
    assert heapless["allocator"] is None
    assert set(heapless["totals"].values()) == {None}
    damaged = written(REPORTS["damaged"])
    assert damaged["totals"]["system_mem"] is None
    assert damaged["arenas"][0]["top_bytes"] is None
    assert damaged["phases"][0]["cpu_seconds"] is None
    assert damaged["findings"][0]["quantities"]["nan"] is None


def test_a_ledger_node_is_the_sum_of_its_children() -> None:
    def check(node: dict[str, object]) -> None:
        children = node["children"]
        assert isinstance(children, list)
        if children:
            assert node["bytes"] == sum(child["bytes"] for child in children)
        for child in children:
            check(child)

    check(written(REPORTS["report"])["ledger"])


def test_hostile_text_stays_inside_its_string() -> None:
    text = json_text(REPORTS["damaged"])
    assert text.isascii()
    assert "\x1b" not in text
    assert json.loads(text)["process"]["command_line"].startswith("\x1b[31mred")


def test_the_same_report_gives_the_same_text() -> None:
    assert json_text(report_samples.report()) == json_text(report_samples.report())


@pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
def test_what_check_writes_is_a_part_of_the_report_and_valid(report: Report) -> None:
    part, whole = json.loads(check_json_text(report)), json.loads(json_text(report))
    Draft202012Validator(json.loads(schema_text(SchemaName.REPORT))).validate(part)
    assert tuple(part) == CHECK_KEYS == tuple(check_document(report))
    for key in set(CHECK_KEYS) - {"findings"}:
        assert part[key] == whole[key]
    assert all(finding in whole["findings"] for finding in part["findings"])


@pytest.mark.parametrize("missing", ["ledger", "leaks", "damages", "crash", "integrity"])
def test_a_report_without_one_of_its_keys_is_not_valid(missing: str) -> None:
    document = written(REPORTS["report"])
    del document[missing]
    assert not Draft202012Validator(json.loads(schema_text(SchemaName.REPORT))).is_valid(document)


def test_the_words_of_a_process_are_in_no_document() -> None:
    for name in ("corrupt", "damaged"):
        text = json_text(REPORTS[name])
        assert f"{report_samples.SECRET:x}" not in text
        assert str(report_samples.SECRET) not in text
    damages = written(REPORTS["corrupt"])["damages"]
    assert damages[0]["repair"]["observed"] is None
    assert damages[3]["repair"]["observed"] == "0x401002"


def test_damages_and_the_crash_are_told_as_the_report_has_them() -> None:
    document = written(REPORTS["corrupt"])
    first = document["damages"][0]
    assert (first["kind"], first["place"], first["byte_count"]) == ("overflow", "chunk_header", 11)
    assert first["culprit"]["payload_address"] == "0x7f3a140008d0"
    assert first["culprit"]["holder"] == "libfoo.so session_table+0x18"
    assert document["integrity"]["verdict"] == "damaged"
    assert document["integrity"]["confidence"] == "certain"
    crash = document["crash"]
    assert (crash["signal"], crash["signal_name"], crash["signature"]) == (6, "SIGABRT", "0123456789abcdef")
    assert [frame["is_certain"] for frame in crash["frames"]] == [True] * 7 + [False] * 23
    assert written(REPORTS["report"])["crash"] is None
