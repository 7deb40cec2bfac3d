"""Reports on processes with several copies of malloc; with one copy a page says nothing of copies."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from jsonschema import Draft202012Validator

from coreheap.evidence import Confidence, Evidence, Strength
from coreheap.heap import MallocCopy, MallocParameters, ThreadCache
from coreheap.render.json_document import SchemaName, json_text, schema_text
from coreheap.render.page import PageStyle
from coreheap.render.tables import arenas_table, json_rows, threads_table
from coreheap.render.terminal import report_text
from coreheap.report import Report
from tests.unit import report_samples

OTHER_MAIN = 0x7F3A40001C80


def copy_of_malloc(number: int, **changes: Any) -> MallocCopy:
    made = MallocCopy(
        number=number,
        main_arena=OTHER_MAIN,
        module="/usr/lib/x86_64-linux-gnu/libc.so.6",
        parameters=MallocParameters(OTHER_MAIN - 0x920, "2.35", {"n_mmaps": 2, "sbrk_base": 0x7F3A50000000}),
        arena_count=1,
        system_mem=1 << 20,
        evidence=(Evidence("next pointers close a ring", "arena ring", Strength.SOLID, OTHER_MAIN),),
        confidence=Confidence.STRONG,
    )
    return dataclasses.replace(made, **changes)


def report_with_two_copies() -> Report:
    report = report_samples.report()
    assert report.heap is not None
    arenas = list(report.heap.arenas)
    arenas[-1] = dataclasses.replace(arenas[-1], copy=1, threads=(0,))
    caches = (*report.heap.thread_caches, ThreadCache(1, 0x7F3A50000010, 0, arenas[-1].index, 5, 160, copy=1))
    copies = (copy_of_malloc(0), copy_of_malloc(1, parameters=None, module=None))
    heap = dataclasses.replace(report.heap, arenas=tuple(arenas), copies=copies, thread_caches=caches)
    return dataclasses.replace(report, heap=heap)


def test_the_document_has_each_copy_with_what_threads_have_of_it() -> None:
    report = report_with_two_copies()
    document = json.loads(json_text(report))
    Draft202012Validator(json.loads(schema_text(SchemaName.REPORT))).validate(document)
    first, second = document["allocator"]["copies"]
    assert (first["copy"], first["mp"], first["parameters"]["sbrk_base"]) == (0, "0x7f3a40001360", "0x7f3a50000000")
    assert first["threads"] is None
    assert (second["copy"], second["module"], second["mp"], second["parameters"]) == (1, None, None, None)
    assert second["threads"] == [
        {
            "index": 0,
            "arena": document["arenas"][-1]["index"],
            "thread_cache_address": "0x7f3a50000010",
            "tcache_count": 5,
            "tcache_bytes": 160,
        }
    ]
    assert [arena["copy"] for arena in document["arenas"]] == [0] * (len(document["arenas"]) - 1) + [1]


def test_rows_of_arenas_name_their_copy_and_rows_of_threads_the_first() -> None:
    report = report_with_two_copies()
    schema = Draft202012Validator(json.loads(schema_text(SchemaName.ROW)))
    rows = [dict(row) for row in json_rows(arenas_table(report))]
    for row in rows:
        schema.validate(row)
    assert {row["copy"] for row in rows} == {0, 1}
    (of_first,) = [row for row in json_rows(threads_table(report)) if row["thread_cache_address"]]
    assert of_first["thread_cache_address"] == "0x5599e0000010"


def test_the_page_names_copies_where_there_are_several() -> None:
    text = report_text(report_with_two_copies(), PageStyle(width=100, top=99))
    assert "of 2 copies of malloc" in text
    assert "copy 1" in text
    assert "0x7f3a40001c80" in text
    assert "copies" not in report_text(report_samples.report(), PageStyle(width=100))
