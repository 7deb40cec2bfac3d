"""Chunk rows: the vectorised text equals plain Python formatting, whatever the numbers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from coreheap.heap import NO_INDEX, Arena, ChunkBatch, ChunkState
from coreheap.leaks import Verdict
from coreheap.render import rows
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.render.rows import ChunkFilter, RowFormat
from tests.unit.report_samples import batch, main_arena, thread_arena

TOP = (1 << 64) - 1
NUMBERS = st.one_of(
    st.integers(0, 300),
    st.integers(0, TOP),
    st.sampled_from([0, 9, 10, 9_999, 10_000, 99_999_999, 100_000_000, (1 << 32) - 1, 1 << 32, 10**16, TOP]),
)
ARENAS: tuple[Arena, ...] = (main_arena(), thread_arena(1))


@st.composite
def batches(draw: st.DrawFn) -> ChunkBatch:
    count = draw(st.integers(1, 40))

    def column() -> np.ndarray:
        return np.array(draw(st.lists(NUMBERS, min_size=count, max_size=count)), dtype=np.uint64)

    states = draw(st.lists(st.integers(0, 255), min_size=count, max_size=count))
    is_mmapped = draw(st.booleans())
    arena, sub_heap = (NO_INDEX, NO_INDEX) if is_mmapped else draw(st.sampled_from([(0, NO_INDEX), (1, 0), (1, 7)]))
    verdicts = np.array(draw(st.lists(st.integers(0, 7), min_size=count, max_size=count)), dtype=np.uint8)
    return ChunkBatch(
        draw(st.integers(0, 1000)),
        column(),
        column(),
        column(),
        column(),
        np.array(states, dtype=np.uint8),
        arena,
        sub_heap,
        is_mmapped,
        verdicts,
    )


VERDICTS = (None, "still_reachable", "weakly_held", "possibly_lost", "indirectly_lost", "definitely_lost")


def group_numbers(first: int, end: int) -> np.ndarray:
    """Groups of chunks by their index: none for every third, else numbers of one to ten digits."""
    chunks = np.arange(first, end, dtype=np.int64)
    return np.where(chunks % 3 == 0, -1, chunks**3 % ((1 << 31) - 1)).astype(np.int32)


def plain_rows(parts: list[ChunkBatch]) -> Iterator[dict[str, object]]:
    """The rows as a reader of the contract would write them, one at a time, with every column."""
    for part in parts:
        in_sub_heap = part.arena == 1 and part.sub_heap == 0
        groups = group_numbers(part.first_chunk, part.first_chunk + len(part)).tolist()
        for index in range(len(part)):
            number = int(part.state[index])
            yield {
                "header_address": hex(int(part.header_address[index])),
                "payload_address": hex(int(part.payload_address[index])),
                "chunk_bytes": int(part.chunk_bytes[index]),
                "usable_bytes": int(part.usable_bytes[index]),
                "state": ChunkState(number).label if number <= 10 else f"state_{number}",
                "is_mmapped": part.is_mmapped,
                "arena": None if part.arena == NO_INDEX else part.arena,
                "sub_heap": hex(ARENAS[1].sub_heaps[0].address) if in_sub_heap else None,
                "verdict": None if part.verdict is None else verdict_label(int(part.verdict[index])),
                "group": None if groups[index] < 0 else groups[index],
            }


def verdict_label(number: int) -> str | None:
    return VERDICTS[number] if number < len(VERDICTS) else f"verdict_{number}"


def plain_csv(parts: list[ChunkBatch], columns: Sequence[str] = rows.CHUNK_COLUMNS) -> str:
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\n")
    writer.writerow(columns)
    for row in plain_rows(parts):
        cells = [row[column] for column in columns]
        writer.writerow("" if cell is None else str(cell).lower() if isinstance(cell, bool) else cell for cell in cells)
    return page.getvalue()


def written(
    parts: list[ChunkBatch],
    row_format: RowFormat,
    columns: Sequence[str] = rows.CHUNK_COLUMNS,
    wanted: ChunkFilter = ChunkFilter(),  # noqa: B008
) -> str:
    texts = rows.row_texts(rows.wanted_rows(parts, ARENAS, wanted, group_numbers), row_format, columns)
    return (rows.header_line(row_format, columns) + b"".join(texts)).decode("ascii")


COLUMNS = pytest.mark.parametrize(
    "columns",
    [rows.CHUNK_COLUMNS, (*rows.CHUNK_COLUMNS, rows.VERDICT_COLUMN), rows.LEAK_COLUMNS],
    ids=["chunks", "verdicts", "leaks"],
)


@COLUMNS
@given(parts=st.lists(batches(), max_size=3))
def test_csv_equals_plain_formatting(columns: tuple[str, ...], parts: list[ChunkBatch]) -> None:
    assert written(parts, RowFormat.CSV, columns) == plain_csv(parts, columns)


@COLUMNS
@given(parts=st.lists(batches(), max_size=3))
def test_json_lines_equal_plain_formatting(columns: tuple[str, ...], parts: list[ChunkBatch]) -> None:
    lines = written(parts, RowFormat.JSON_LINES, columns)
    plain = ({column: row[column] for column in columns} for row in plain_rows(parts))
    assert lines == "".join(json.dumps(row) + "\n" for row in plain)


def test_columns_that_nobody_computed_are_unknown() -> None:
    part = batch(0x1000, [32], [0])
    (found,) = rows.wanted_rows([part], ARENAS, ChunkFilter())
    lines = rows.row_texts([found], RowFormat.JSON_LINES, rows.LEAK_COLUMNS)
    assert json.loads(b"".join(lines)) == {
        "payload_address": "0x1010",
        "usable_bytes": 24,
        "verdict": None,
        "arena": 0,
        "group": None,
    }
    lost = ChunkFilter(verdicts=frozenset({Verdict.DEFINITELY_LOST}))
    assert list(rows.wanted_rows([part], ARENAS, lost)) == []


def test_verdicts_and_groups_follow_their_rows_through_filters() -> None:
    parts = [
        batch(0x1000, [32, 48, 64, 80], [0, 0, 0, 0], verdicts=[5, 1, 3, 5], first_chunk=1),
        batch(0x9000, [4096], [0], arena=NO_INDEX, is_mmapped=True, verdicts=[5], first_chunk=5),
    ]
    wanted = ChunkFilter(min_bytes=48, verdicts=frozenset({Verdict.DEFINITELY_LOST, Verdict.POSSIBLY_LOST}))
    lines = written(parts, RowFormat.CSV, rows.LEAK_COLUMNS, wanted).splitlines()
    assert lines == [
        "payload_address,usable_bytes,verdict,arena,group",
        "0x1060,56,possibly_lost,0,",
        "0x10a0,72,definitely_lost,0,64",
        "0x9010,4080,definitely_lost,,125",
    ]
    largest = rows.largest_chunks(rows.wanted_rows(parts, ARENAS, wanted, group_numbers), 2)
    assert [int(row.group[0]) for row in largest.rows if row.group is not None] == [125, 64]
    assert [int(row.verdict[0]) for row in largest.rows if row.verdict is not None] == [5, 5]


@settings(max_examples=20)
@given(st.integers(1, 3), st.integers(0, 2**32))
def test_blocks_join_without_seams(blocks: int, seed: int) -> None:
    count = rows.BLOCK_ROWS * blocks + seed % 7
    random = np.random.default_rng(seed)
    header = np.sort(random.integers(1, 1 << 48, count, dtype=np.uint64))
    chunk_bytes = random.integers(0, 1 << 20, count, dtype=np.uint64)
    state = random.integers(0, 11, count).astype(np.uint8)
    part = ChunkBatch(0, header, header + np.uint64(16), chunk_bytes, chunk_bytes, state, 0, NO_INDEX, False)
    assert written([part], RowFormat.CSV) == plain_csv([part])


def test_every_row_validates_and_fits_one_definition() -> None:
    schema = json.loads(schema_text(SchemaName.ROW))
    validator = Draft202012Validator(schema)
    chunk = Draft202012Validator({**schema, "anyOf": [{"$ref": "#/$defs/chunk"}]})
    parts = [batch(0x1000, [32, 48], [0, 10], arena=1, sub_heap=0), batch(0x9000, [4096], [0], is_mmapped=True)]
    for line in written(parts, RowFormat.JSON_LINES).splitlines():
        validator.validate(json.loads(line))
        chunk.validate(json.loads(line))
        assert tuple(json.loads(line)) == rows.CHUNK_COLUMNS
        assert set(json.loads(line)) == set(schema["$defs"]["chunk"]["properties"]) - {"verdict"}
    with_verdicts = [batch(0x1000, [32, 48], [0, 1], verdicts=[5, 0])]
    for line in written(with_verdicts, RowFormat.JSON_LINES, (*rows.CHUNK_COLUMNS, rows.VERDICT_COLUMN)).splitlines():
        chunk.validate(json.loads(line))
        assert set(json.loads(line)) == set(schema["$defs"]["chunk"]["properties"])
    leak = Draft202012Validator({**schema, "anyOf": [{"$ref": "#/$defs/leak"}]})
    for line in written(with_verdicts, RowFormat.JSON_LINES, rows.LEAK_COLUMNS).splitlines():
        leak.validate(json.loads(line))
        assert set(json.loads(line)) == set(schema["$defs"]["leak"]["properties"])


@pytest.mark.parametrize(
    ("wanted", "sizes"),
    [
        (ChunkFilter(), [32, 48, 64, 4096, 1040, 80, 135168]),
        (ChunkFilter(states=frozenset({ChunkState.IN_USE})), [32, 64, 1040, 135168]),
        (ChunkFilter(states=frozenset({ChunkState.TCACHE, ChunkState.LARGE_BIN})), [48, 4096]),
        (ChunkFilter(arena=1), [1040, 80]),
        (ChunkFilter(arena=0, min_bytes=64), [64, 4096]),
        (ChunkFilter(min_bytes=64, max_bytes=1040), [64, 1040, 80]),
        (ChunkFilter(min_bytes=1 << 70), []),
        (ChunkFilter(max_bytes=1 << 70, states=frozenset({ChunkState.FASTBIN})), [80]),
    ],
)
def test_filters_are_inclusive_and_all_must_hold(wanted: ChunkFilter, sizes: list[int]) -> None:
    parts = [
        batch(0x1000, [32, 48, 64, 4096], [0, 1, 0, 5]),
        batch(0x5000, [1040, 80], [0, 2], arena=1, sub_heap=0),
        batch(0x9000, [135168], [0], arena=NO_INDEX, is_mmapped=True),
    ]
    found = [int(size) for part in rows.wanted_rows(parts, ARENAS, wanted) for size in part.chunk_bytes]
    assert found == sizes


@given(st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=20), max_size=6), st.integers(0, 25))
def test_the_largest_are_picked_across_batches(sizes: list[list[int]], count: int) -> None:
    parts = [batch(0x1000 * (index + 1), part, [0] * len(part)) for index, part in enumerate(sizes)]
    largest = rows.largest_chunks(rows.wanted_rows(parts, ARENAS, ChunkFilter()), count)
    everything = [
        (int(size), int(address))
        for part in parts
        for size, address in zip(part.chunk_bytes, part.header_address, strict=True)
    ]
    expected = sorted(everything, key=lambda entry: (-entry[0], entry[1]))[:count]
    assert [(int(row.chunk_bytes[0]), int(row.header_address[0])) for row in largest.rows] == expected
    assert largest.wanted_count == len(everything)
    assert largest.wanted_bytes == sum(size for size, _ in everything)
