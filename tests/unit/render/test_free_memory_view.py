"""Free memory in the document, in the tables and on the page."""

from __future__ import annotations

import json

import jsonschema
import pytest

from coreheap.free_memory import (
    ArenaFreeMemory,
    ArenaMaxEstimate,
    FreeMemoryReport,
    HeapFreeMemory,
    Pin,
    PinChain,
    TopStays,
    TrimEstimate,
)
from coreheap.leaks import Verdict
from coreheap.mappings import ResidencyBasis
from coreheap.render.free_memory_document import arena_cells, free_memory_value, heap_cells
from coreheap.render.free_memory_view import add_free_memory
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.render.page import Page, PageStyle

MIB = 1 << 20
HOSTILE = "lib\x1b[31mfoo.so \u202e cache"


def heap(arena: int = 0, sub_heap: int | None = None, trim: TrimEstimate | None = None) -> HeapFreeMemory:
    return HeapFreeMemory(
        arena=arena,
        sub_heap=sub_heap,
        address=None if sub_heap is None else 0x7F3A14000000 + sub_heap,
        committed_bytes=16 * MIB,
        live_count=3,
        live_bytes=4 * MIB,
        tcache_bytes=MIB,
        free_bytes=11 * MIB,
        unlisted_bytes=0,
        top_bytes=MIB,
        largest_free_bytes=6 * MIB,
        whole_page_bytes=10 * MIB,
        shared_page_bytes=MIB,
        trim=trim or TrimEstimate(8 * MIB, MIB, 2 * MIB, 5 * MIB, 0),
        top_stays=TopStays.BELOW_THRESHOLD,
        pins=PinChain(8 * MIB, 7 * MIB, 2, 96),
    )


def survey(holder: str = "libfoo.so cache", heaps: int = 1) -> FreeMemoryReport:
    return FreeMemoryReport(
        page_bytes=4096,
        arenas=(ArenaFreeMemory(0, (heap(),)), ArenaFreeMemory(1, tuple(heap(1, number) for number in range(heaps)))),
        pins=(
            Pin(0, None, 0x5555000, 7, 1, 48, 0, 7 * MIB, MIB, 7 * MIB, True, Verdict.STILL_REACHABLE, holder),
            Pin(1, 0, 0x7F3A14001000, 9, 2, 96, 1, 0, 7 * MIB, 0, True),
        ),
        arena_max=(ArenaMaxEstimate(1, 1, 0, 12 * MIB, 64 * MIB, ("at most", "at least", "reserved")),),
        basis=ResidencyBasis.ZERO_PAGES,
    )


def page_of(report: FreeMemoryReport, *, verbose: bool = False, encoding: str = "utf-8") -> str:
    page = Page(PageStyle(width=100, verbose=verbose, encoding=encoding))
    add_free_memory(page, report)
    return page.text()


def test_the_document_is_valid_and_says_all() -> None:
    schema = json.loads(schema_text(SchemaName.REPORT))
    value = free_memory_value(survey(HOSTILE))
    part = {**schema, "anyOf": [{"$ref": "#/$defs/free_memory"}]}
    for key in ("type", "properties", "required", "if", "then"):
        part.pop(key, None)
    jsonschema.validate(value, part)
    assert isinstance(value, dict)

    def keys_are_named(found: object, definition: dict[str, object]) -> None:
        while "$ref" in definition or "anyOf" in definition:
            options = definition.get("anyOf", [definition])
            assert isinstance(options, list)
            definition = schema["$defs"][str(options[0].get("$ref", "")).split("/")[-1]]
        if isinstance(found, dict):
            properties = definition["properties"]
            assert isinstance(properties, dict)
            assert set(found) == set(properties)
            for name, child in found.items():
                if isinstance(child, dict):
                    keys_are_named(child, properties[name])
                elif isinstance(child, list) and child and isinstance(child[0], dict):
                    keys_are_named(child[0], properties[name]["items"])

    keys_are_named(value, {"$ref": "#/$defs/free_memory"})
    assert free_memory_value(None) is None


def test_numbers_are_those_of_the_values() -> None:
    value = json.loads(json.dumps(free_memory_value(survey())))
    assert value["residency"] == "zero_pages"
    assert value["trim"] == {
        "bytes": 18 * MIB,
        "bins_bytes": 16 * MIB,
        "top_bytes": 2 * MIB,
        "top_unsure_bytes": 0,
        "resident_low_bytes": 4 * MIB,
        "resident_high_bytes": 10 * MIB,
    }
    assert value["arenas"][1]["heaps"][0]["sub_heap"] == "0x7f3a14000000"
    assert value["arenas"][0]["heaps"][0]["sub_heap"] is None
    assert value["arenas"][0]["utilisation"] == pytest.approx(0.25)
    assert value["pins"][0]["verdict"] == "still_reachable"
    assert value["pins"][1]["verdict"] is None
    assert value["arena_max"][0]["saved_high_bytes"] == 12 * MIB


def test_cells_of_tables() -> None:
    assert arena_cells(survey(), 1) == (0.25, 9 * MIB, 6 * MIB)
    assert heap_cells(survey(), 1, 0) == (0.25, 9 * MIB, 6 * MIB)
    assert heap_cells(survey(), 0, None) == (0.25, 9 * MIB, 6 * MIB)
    assert arena_cells(None, 0) == heap_cells(None, 0, None) == heap_cells(survey(), 1, 5) == (None, None, None)


def test_the_page_says_what_a_trim_would_give() -> None:
    text = page_of(survey())
    assert "malloc_trim(0) would return 18.0 MiB, RSS would drop by 4.00 MiB to 10.0 MiB" in text
    assert "1 live chunk of 48 B at 0x5555000 (arena 0)" in text
    assert "held by libfoo.so" in text
    assert "0x7f3a14001000" not in text  # nothing free ends there


def test_many_heaps_are_cut_short_unless_asked_for() -> None:
    assert "+13 more heaps" in page_of(survey(heaps=20))
    assert "more heaps" not in page_of(survey(heaps=20), verbose=True)


def test_hostile_text_is_made_printable() -> None:
    text = page_of(survey(HOSTILE))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert page_of(survey(), encoding="ascii").isascii()


def test_nothing_to_give_is_no_section() -> None:
    empty = FreeMemoryReport(4096, (ArenaFreeMemory(0, ()),), (), (), ResidencyBasis.HOLES)
    assert page_of(empty) == ""
