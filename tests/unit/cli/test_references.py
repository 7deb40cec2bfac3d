"""leaks, explain, owners and top: what is asked of the analysis, what is written, and what callers are told."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import coreheap
from coreheap.cli import main, pipeline
from coreheap.cli.arguments import Request, parse_arguments
from coreheap.leaks import Explanation, OwnerNode, RetainedReport
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.report import Report
from tests.unit import report_samples
from tests.unit.report_samples import explanation, owner_nodes

ROW = Draft202012Validator(json.loads(schema_text(SchemaName.ROW)))
Answer = Callable[[Report], list[dict[str, object]]]


class Explorer:
    """Stands in for ``pipeline.Explorer``: notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []

    def explain(self, address: int, *, limit: int, retained: bool = False) -> Explanation:
        self.asked.append({"explain": address, "limit": limit, "retained": retained})
        return explanation() if address > 0x1000 else Explanation(address, "not mapped", "", is_saved=False)

    def owners(self, address: int, *, depth: int, limit: int) -> tuple[OwnerNode, ...]:
        self.asked.append({"owners": address, "depth": depth, "limit": limit})
        return owner_nodes() if address > 0x1000 else ()

    def retained(self, count: int) -> RetainedReport | None:
        self.asked.append({"retained": count})
        return report_samples.retained()

    def group_numbers(self) -> Callable[[int, int], np.ndarray]:
        return lambda first, end: np.arange(first, end, dtype=np.int32) - 3


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """``answer(report)``: what the analysis will give; gives the list of what the explorer will be asked."""

    def prepare(report: Report) -> list[dict[str, object]]:
        explorer = Explorer()

        @contextmanager
        def explored(request: Request, progress: pipeline.Progress) -> Iterator[tuple[Report, Explorer]]:
            assert request.leaks
            yield report, explorer

        monkeypatch.setattr(pipeline, "explored", explored)
        return explorer.asked

    return prepare


def rows(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main([*words, "--json", "-q"]) == 0
    made = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row in made:
        ROW.validate(row)
    return made


def test_every_lost_chunk_is_a_row_with_its_group(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(report_samples.report())
    listed = rows(capsys, "leaks", "core", "--list")
    assert listed == [
        {
            "payload_address": "0x5599e00002f0",
            "usable_bytes": 56,
            "verdict": "definitely_lost",
            "arena": 0,
            "group": None,
        },
        {
            "payload_address": "0x7f3a140008d0",
            "usable_bytes": 1032,
            "verdict": "indirectly_lost",
            "arena": 1,
            "group": 1,
        },
        {
            "payload_address": "0x7f3a60000010",
            "usable_bytes": 135152,
            "verdict": "possibly_lost",
            "arena": None,
            "group": 4,
        },
        {
            "payload_address": "0x7f3a60021010",
            "usable_bytes": 4198384,
            "verdict": "weakly_held",
            "arena": None,
            "group": 5,
        },
    ]
    assert rows(capsys, "leaks", "core", "--list", "--top", "1") == listed[3:]
    some = rows(capsys, "leaks", "core", "--list", "--verdict", "still-reachable,weakly_held")
    assert [row["verdict"] for row in some] == ["still_reachable", "weakly_held"]
    assert main(["leaks", "core", "--list", "--csv", "-q"]) == 0
    spoken = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [cells["group"] for cells in spoken] == ["", "1", "4", "5"]
    assert main(["leaks", "core", "--list", "-q"]) == 0
    assert "definitely lost" in capsys.readouterr().out


def test_groups_are_rows_without_list(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(report_samples.report())
    assert [row["number"] for row in rows(capsys, "leaks", "core")] == [0, 1, 2]
    assert [row["number"] for row in rows(capsys, "leaks", "core", "--top", "2")] == [0, 1]
    assert [row["number"] for row in rows(capsys, "leaks", "core", "--verdict", "weakly_held")] == [2]
    assert main(["leaks", "core", "--csv", "-q"]) == 0
    assert capsys.readouterr().out.startswith("number,verdict,type,")


def test_each_address_gets_an_answer(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    asked = answer(report_samples.report())
    made = rows(capsys, "explain", "core", "0x7F3A140008D8", "139887896037552", "16", "--limit", "3", "--retained")
    assert [row["region"] for row in made] == ["arena 3", "arena 3", "not mapped"]
    assert asked == [
        {"explain": 0x7F3A140008D8, "limit": 3, "retained": True},
        {"explain": 139887896037552, "limit": 3, "retained": True},
        {"explain": 16, "limit": 3, "retained": True},
    ]
    asked.clear()
    owned = rows(capsys, "owners", "core", "7f3a140008d8", "16")
    assert [len(row["owners"]) for row in owned] == [2, 0]
    assert [entry for entry in asked if "owners" in entry] == [
        {"owners": 0x7F3A140008D8, "depth": 3, "limit": 10},
        {"owners": 16, "depth": 3, "limit": 10},
    ]


def test_an_address_that_nobody_maps_is_no_error(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(report_samples.report())
    assert main(["explain", "core", "0x10", "-q"]) == 0
    assert capsys.readouterr().out == "0x10  not mapped\n"
    assert main(["owners", "core", "0x10", "-q"]) == 0
    assert capsys.readouterr().out == "0x10: not mapped; no chunk is there\n"


def test_top_is_computed_for_as_many_rows_as_are_shown(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    asked = answer(report_samples.report())
    assert len(rows(capsys, "top", "core")) == 4
    assert len(rows(capsys, "top", "core", "--top", "3")) == 3
    assert asked == [{"retained": 50}, {"retained": 3}]


@pytest.mark.parametrize("command", [["leaks"], ["leaks", "--list"], ["explain", "16"], ["owners", "16"], ["top"]])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_without_a_heap_the_answer_is_empty_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str], form: list[str]
) -> None:
    @contextmanager
    def opened(*_: object, **__: object) -> Iterator[object]:
        yield FakeCore()

    monkeypatch.setattr(coreheap, "open", opened)
    monkeypatch.setattr(
        coreheap, "analyze_with_references", lambda core, options: (report_samples.heapless_report(), None)
    )
    assert main([command[0], "core", *command[1:], *form]) == 0
    written = capsys.readouterr()
    assert "no glibc heap could be read" in written.err
    for line in written.out.splitlines() if form else ():
        ROW.validate(json.loads(line))


class FakeCore:
    """A core that maps nothing."""

    class memory:  # noqa: N801 - stands in for an attribute
        @staticmethod
        def region_index(address: int) -> None:
            return None


@pytest.mark.parametrize(
    "words",
    [
        ["explain", "core"],
        ["explain", "core", "here"],
        ["explain", "core", "0x12345678901234567"],
        ["explain", "core", "99999999999999999999"],
        ["explain", "core", "0x10", "--limit", "0"],
        ["explain", "core", "0x10", "--limit", "1001"],
        ["explain", "core", "0x10", "--csv"],
        ["explain", "core", "0x10", "--depth", "2"],
        ["owners", "core", "0x10", "--depth", "17"],
        ["owners", "core", "0x10", "--depth", "1" * 5000],
        ["owners", "core", "0x10", "--retained"],
        ["leaks", "core", "--verdict", "lost"],
        ["leaks", "core", "--no-leaks"],
        ["chunks", "core", "--verdict", "definitely_lost"],
        ["top", "core", "--fail-on", "info"],
        ["arenas", "core", "--retained"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(words) == 2
    written = capsys.readouterr()
    assert not written.out
    assert written.err.startswith("coreheap: error: ")
    assert "next step: " in written.err


@pytest.mark.parametrize(
    ("words", "leaks", "retained"),
    [
        (["analyze", "c"], True, None),
        (["analyze", "c", "--no-leaks"], False, None),
        (["analyze", "c", "--retained"], True, True),
        (["arenas", "c"], False, False),
        (["chunks", "c"], False, False),
        (["chunks", "c", "--leaks"], True, False),
        (["leaks", "c"], True, False),
        (["top", "c"], True, False),
        (["explain", "c", "1", "--retained"], True, False),
    ],
)
def test_only_what_is_needed_is_computed(
    monkeypatch: pytest.MonkeyPatch, words: list[str], leaks: bool, retained: bool | None
) -> None:
    seen: list[coreheap.AnalysisOptions] = []

    @contextmanager
    def opened(*_: object, **__: object) -> Iterator[object]:
        yield FakeCore()

    def analyzed(core: object, options: coreheap.AnalysisOptions) -> Report:
        seen.append(options)
        return report_samples.heapless_report()

    monkeypatch.setattr(coreheap, "open", opened)
    monkeypatch.setattr(coreheap, "analyze", analyzed)
    monkeypatch.setattr(coreheap, "analyze_with_references", lambda core, options: (analyzed(core, options), None))
    assert main([*words, "-q"]) == 0
    ((used,),) = (seen,)
    assert (used.leaks, used.retained) == (leaks, retained)


def test_addresses_are_hex_or_decimal() -> None:
    words = ["0x7f3a10000020", "7F3A10000020", "0X10", "16", "7f3a_1000_0020"]
    request = parse_arguments(["explain", "core", *words])
    assert request.addresses == (0x7F3A10000020, 0x7F3A10000020, 16, 16, 0x7F3A10000020)
