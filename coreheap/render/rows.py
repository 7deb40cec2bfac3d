"""Chunks as rows: filtered, written as CSV or JSON lines, or the largest of them picked out.

Knows: how to turn columns of numbers into lines of text with no Python object for a chunk. A batch is laid out as
a matrix of bytes of fixed width; what a line does not need is NUL there, and one pass drops all NULs.
Does not know: where chunks come from; it takes batches of columns.

``tests/unit/render/test_rows.py`` holds every line equal to what plain Python formatting writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from coreheap.heap import NO_INDEX, Arena, ChunkBatch, ChunkState
from coreheap.leaks import Verdict
from coreheap.quantities import format_address

UInt8s = npt.NDArray[np.uint8]
UInt16s = npt.NDArray[np.uint16]
UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]
Int32s = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]

CHUNK_COLUMNS = (
    "header_address",
    "payload_address",
    "chunk_bytes",
    "usable_bytes",
    "state",
    "is_mmapped",
    "arena",
    "sub_heap",
)
VERDICT_COLUMN = "verdict"
"""Stands behind CHUNK_COLUMNS where leaks were looked for."""
LEAK_COLUMNS = ("payload_address", "usable_bytes", "verdict", "arena", "group")

GroupNumbers = Callable[[int, int], Int32s]
"""For chunks [first, end) the number of the leak group that each counts in, -1 for none: int32[end - first]."""

_KNOWN_LABELS = {int(state): state.label for state in ChunkState}
STATE_LABELS = tuple(_KNOWN_LABELS.get(number, f"state_{number}") for number in range(256))
"""The label of each value of a state column; a state of no known name is shown by its number."""

BLOCK_ROWS = 1 << 13
"""Rows laid out at a time: their matrix (about 1 MiB) stays in the processor's cache."""


class RowFormat(Enum):
    """How rows are written."""

    CSV = "csv"
    JSON_LINES = "json"


@dataclass(frozen=True, slots=True)
class ChunkFilter:
    """Which chunks are wanted; every condition that is set must hold.

    ``states`` None takes all. ``arena`` is an arena's index and leaves mmapped chunks out. The byte limits are
    inclusive and apply to chunk_bytes. ``verdicts`` takes nothing where leaks were not looked for.
    """

    states: frozenset[ChunkState] | None = None
    arena: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    verdicts: frozenset[Verdict] | None = None

    def mask(self, batch: ChunkBatch) -> Bools | None:
        """Which rows of a batch are wanted: bool[n], or None where all are."""
        conditions: list[Bools] = []
        if self.arena is not None and batch.arena != self.arena:
            return np.zeros(len(batch), dtype=np.bool_)
        if self.verdicts is not None and batch.verdict is None:
            return np.zeros(len(batch), dtype=np.bool_)
        if self.states is not None:
            conditions.append(_is_one_of(batch.state, self.states))
        if self.verdicts is not None and batch.verdict is not None:
            conditions.append(_is_one_of(batch.verdict, self.verdicts))
        if self.min_bytes is not None:
            conditions.append(np.asarray(batch.chunk_bytes >= _as_uint64(self.min_bytes)))
        if self.max_bytes is not None:
            conditions.append(np.asarray(batch.chunk_bytes <= _as_uint64(self.max_bytes)))
        if not conditions:
            return None
        mask = np.logical_and.reduce(conditions)
        return None if mask.all() else mask


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """A batch's wanted rows, or single rows picked from several batches, with what all of them share.

    Columns as in ``ChunkBatch``; ``sub_heap`` is the address of the sub-heap, None where the chunk is in none;
    ``arena`` is None for mmapped chunks; ``verdict`` where leaks were not looked for; ``group`` (int32, -1 for none)
    where nobody asked for it.
    """

    header_address: UInt64s
    payload_address: UInt64s
    chunk_bytes: UInt64s
    usable_bytes: UInt64s
    state: UInt8s
    is_mmapped: bool
    arena: int | None
    sub_heap: int | None
    verdict: UInt8s | None = None
    group: Int32s | None = None

    def __len__(self) -> int:
        return len(self.header_address)

    def only(self, selection: Bools | npt.NDArray[np.intp]) -> ChunkRows:
        """The rows that a mask or indexes select."""
        return ChunkRows(
            self.header_address[selection],
            self.payload_address[selection],
            self.chunk_bytes[selection],
            self.usable_bytes[selection],
            self.state[selection],
            self.is_mmapped,
            self.arena,
            self.sub_heap,
            None if self.verdict is None else self.verdict[selection],
            None if self.group is None else self.group[selection],
        )


@dataclass(frozen=True, slots=True)
class LargestChunks:
    """The largest wanted chunks, each as rows of length 1, largest first, and how much was wanted in all."""

    rows: tuple[ChunkRows, ...]
    wanted_count: int
    wanted_bytes: int


def wanted_rows(
    batches: Iterable[ChunkBatch],
    arenas: Sequence[Arena],
    wanted: ChunkFilter,
    group_numbers: GroupNumbers | None = None,
) -> Iterator[ChunkRows]:
    """The rows that pass the filter, a batch at a time, in the table's order. Empty batches are left out."""
    arena_of = {arena.index: arena for arena in arenas}
    for batch in batches:
        mask = wanted.mask(batch)
        arena = arena_of.get(batch.arena)
        has_sub_heap = arena is not None and 0 <= batch.sub_heap < len(arena.sub_heaps)
        rows = ChunkRows(
            batch.header_address,
            batch.payload_address,
            batch.chunk_bytes,
            batch.usable_bytes,
            batch.state,
            batch.is_mmapped,
            None if batch.arena == NO_INDEX else batch.arena,
            arena.sub_heaps[batch.sub_heap].address if arena is not None and has_sub_heap else None,
            batch.verdict,
            None if group_numbers is None else group_numbers(batch.first_chunk, batch.first_chunk + len(batch)),
        )
        if mask is not None:
            rows = rows.only(mask)
        if len(rows):
            yield rows


def largest_chunks(rows: Iterable[ChunkRows], count: int) -> LargestChunks:
    """The ``count`` rows with the most chunk_bytes; of equals the lower address first. Memory is bounded by count."""
    best: list[tuple[int, int, ChunkRows]] = []
    wanted_count = 0
    wanted_bytes = 0
    for part in rows:
        wanted_count += len(part)
        wanted_bytes += int(part.chunk_bytes.sum(dtype=np.uint64))
        if len(best) >= count:
            if not count:
                continue
            smallest = -best[-1][0]
            part = part.only(np.asarray(part.chunk_bytes >= _as_uint64(smallest)))
        if len(part) > count:
            order = np.lexsort((part.header_address, np.iinfo(np.uint64).max - part.chunk_bytes))[:count]
            part = part.only(order)
        for index in range(len(part)):
            one = part.only(np.array([index], dtype=np.intp))
            best.append((-int(one.chunk_bytes[0]), int(one.header_address[0]), one))
        best.sort(key=lambda entry: entry[:2])
        del best[count:]
    return LargestChunks(tuple(entry[2] for entry in best), wanted_count, wanted_bytes)


def header_line(row_format: RowFormat, columns: Sequence[str] = CHUNK_COLUMNS) -> bytes:
    """What stands before the first row: CSV's header line, nothing for JSON lines."""
    return (",".join(columns) + "\n").encode() if row_format is RowFormat.CSV else b""


def row_texts(
    rows: Iterable[ChunkRows], row_format: RowFormat, columns: Sequence[str] = CHUNK_COLUMNS
) -> Iterator[bytearray]:
    """The rows as text, in blocks of at most ``BLOCK_ROWS`` lines."""
    for part in rows:
        layout = _line_layout(part, row_format, columns)
        for first in range(0, len(part), BLOCK_ROWS):
            yield layout.lines(first, min(len(part), first + BLOCK_ROWS))


@dataclass(frozen=True, slots=True)
class _Field:
    """A part of a line that differs from row to row: ``width`` bytes, written by ``fill(first, end)``.

    ``fill`` gives an array of ``end - first`` items of ``width`` bytes each, NUL where nothing shall stand.
    """

    width: int
    fill: Callable[[int, int], npt.NDArray[np.generic]]


class _LineLayout:
    """Lines of text from constant bytes and fields, in a matrix of bytes that is reused from block to block."""

    def __init__(self, pieces: Sequence[bytes | _Field], row_count: int) -> None:
        offset = 0
        self._places: list[tuple[str, _Field]] = []
        names: list[str] = []
        offsets: list[int] = []
        template = bytearray()
        for piece in pieces:
            if isinstance(piece, bytes):
                template += piece
                offset += len(piece)
                continue
            names.append(f"field_{len(names)}")
            offsets.append(offset)
            self._places.append((names[-1], piece))
            template += bytes(piece.width)
            offset += piece.width
        self._width = offset
        self._buffer = bytearray(template * min(BLOCK_ROWS, row_count))
        self._matrix: npt.NDArray[np.void] = np.frombuffer(
            self._buffer,
            dtype=np.dtype(
                {
                    "names": names,
                    "formats": [f"V{field.width}" for _, field in self._places],
                    "offsets": offsets,
                    "itemsize": offset,
                }
            ),
        )

    def lines(self, first: int, end: int) -> bytearray:
        """The lines of rows [first, end); at most ``BLOCK_ROWS`` of them."""
        count = end - first
        for name, field in self._places:
            self._matrix[name][:count] = field.fill(first, end).view(f"V{field.width}").reshape(count)
        whole = self._buffer if count * self._width == len(self._buffer) else self._buffer[: count * self._width]
        return whole.translate(None, b"\0")


def _line_layout(rows: ChunkRows, row_format: RowFormat, columns: Sequence[str]) -> _LineLayout:
    """The layout of the lines of ``rows``: what all of them share stands in it as constant bytes."""
    is_json = row_format is RowFormat.JSON_LINES
    pieces: list[bytes | _Field] = []
    for number, column in enumerate(columns):
        if is_json:
            pieces.append(f'{", " if number else "{"}"{column}": '.encode())
        elif number:
            pieces.append(b",")
        pieces += _column_pieces(rows, column, is_json)
    pieces.append(b"}\n" if is_json else b"\n")
    return _LineLayout(pieces, len(rows))


def _column_pieces(rows: ChunkRows, column: str, is_json: bool) -> list[bytes | _Field]:
    """One column's part of a line."""
    quote = b'"' if is_json else b""
    if column in ("header_address", "payload_address"):
        addresses = rows.header_address if column == "header_address" else rows.payload_address
        return [quote + b"0x", _hexadecimal(addresses), quote]
    if column in ("chunk_bytes", "usable_bytes"):
        return [_decimal(rows.chunk_bytes if column == "chunk_bytes" else rows.usable_bytes)]
    if column == "state":
        return [quote, _label(rows.state, _STATES), quote]
    if column == "verdict" and rows.verdict is not None:
        return [_label(rows.verdict, _VERDICTS_IN_JSON if is_json else _VERDICTS_IN_CSV)]
    if column == "group" and rows.group is not None:
        return [_decimal_or_nothing(rows.group, b"null" if is_json else b"")]
    shared = {
        "is_mmapped": rows.is_mmapped,
        "arena": rows.arena,
        "sub_heap": None if rows.sub_heap is None else format_address(rows.sub_heap),
    }.get(column)
    if is_json or isinstance(shared, bool):
        return [json.dumps(shared).encode()]
    return [b"" if shared is None else str(shared).encode()]


_HEX_OF_BYTE: UInt16s = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), dtype=np.uint16)
"""The two hex digits of each byte value."""


def _hexadecimal(values: UInt64s) -> _Field:
    """Hex digits without leading zeros, one zero at least."""
    low_digits = len(f"{int(values.min()):x}")
    high_digits = len(f"{int(values.max()):x}")

    def fill(first: int, end: int) -> npt.NDArray[np.generic]:
        block = values[first:end]
        digits = _HEX_OF_BYTE[block.astype(">u8").view(np.uint8)].view(np.uint8).reshape(-1, 16)
        digits[:, : 16 - high_digits] = 0
        for count in range(low_digits, high_digits):
            # A row of at most ``count`` digits has a leading zero in the column before them.
            digits[block < _as_uint64(1 << (4 * count)), 16 - count - 1] = 0
        return digits

    return _Field(16, fill)


def _digits_of_ten_thousand() -> tuple[UInt32s, UInt32s]:
    """Four decimal digits as four bytes, for 0..9999: with leading zeros, and from 10000 on with NULs instead.

    The two tables differ in the last entry of "NULs instead" for zero alone: nothing, or a single 0.
    """
    padded = "".join(f"{number:04}" for number in range(10_000)).encode()
    stripped = b"".join(str(number).encode().rjust(4, b"\0") for number in range(10_000))
    with_zero = np.frombuffer(padded + stripped, dtype=np.uint32)
    without_zero = with_zero.copy()
    without_zero[10_000] = 0
    return without_zero, with_zero


_LEADING_GROUP, _LAST_GROUP = _digits_of_ten_thousand()


def _decimal(values: UInt64s) -> _Field:
    """Decimal digits without leading zeros, one zero at least, in groups of four."""
    largest = int(values.max())
    groups = max(1, -(-len(str(largest)) // 4))
    # Dividing 32-bit numbers takes half the time, and few chunks need more.
    number_type: type[np.uint32 | np.uint64] = np.uint32 if largest < 1 << 32 else np.uint64

    def fill(first: int, end: int) -> npt.NDArray[np.generic]:
        rest: npt.NDArray[np.unsignedinteger] = values[first:end].astype(number_type)
        text = np.empty((end - first, groups), dtype=np.uint32)
        for group in range(groups - 1, -1, -1):
            above = rest // number_type(10_000)
            digits = rest - above * number_type(10_000)
            leads = (above == 0) * number_type(10_000)
            table = _LAST_GROUP if group == groups - 1 else _LEADING_GROUP
            text[:, group] = table[digits + leads]
            rest = above
        return text

    return _Field(4 * groups, fill)


def _decimal_or_nothing(values: Int32s, nothing: bytes) -> _Field:
    """Decimal digits; ``nothing``, of at most four bytes, for what is negative."""
    digits = _decimal(np.maximum(values, 0).astype(np.uint64))

    def fill(first: int, end: int) -> npt.NDArray[np.generic]:
        text = digits.fill(first, end).view(np.uint8).reshape(end - first, digits.width)
        is_nothing = values[first:end] < 0
        text[is_nothing] = 0
        text[is_nothing, : len(nothing)] = np.frombuffer(nothing, np.uint8)
        return text

    return _Field(digits.width, fill)


def _label_column(labels: Sequence[str]) -> npt.NDArray[np.void]:
    """Labels of the values from 0 on, NUL-padded to a common width."""
    width = max(len(label) for label in labels)
    return np.frombuffer(b"".join(label.encode().ljust(width, b"\0") for label in labels), dtype=f"V{width}")


VERDICT_LABELS = tuple(
    next((verdict.label for verdict in Verdict if verdict == number), f"verdict_{number}") for number in range(256)
)
_STATES = _label_column(STATE_LABELS)
_VERDICTS_IN_CSV = _label_column([label or "" for label in VERDICT_LABELS])
_VERDICTS_IN_JSON = _label_column([json.dumps(label) for label in VERDICT_LABELS])


def _label(values: UInt8s, labels: npt.NDArray[np.void]) -> _Field:
    """The label of each value."""
    return _Field(labels.dtype.itemsize, lambda first, end: labels[values[first:end]])


def _is_one_of(values: UInt8s, wanted: Iterable[int]) -> Bools:
    is_wanted = np.zeros(256, dtype=np.bool_)
    is_wanted[[int(value) for value in wanted]] = True
    return is_wanted[values]


def _as_uint64(value: int) -> np.uint64:
    """A Python number as uint64, held within what one can say."""
    return np.uint64(min(max(value, 0), (1 << 64) - 1))
