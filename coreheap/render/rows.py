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
from coreheap.quantities import format_address

UInt8s = npt.NDArray[np.uint8]
UInt16s = npt.NDArray[np.uint16]
UInt32s = npt.NDArray[np.uint32]
UInt64s = npt.NDArray[np.uint64]
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
    inclusive and apply to chunk_bytes.
    """

    states: frozenset[ChunkState] | None = None
    arena: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None

    def mask(self, batch: ChunkBatch) -> Bools | None:
        """Which rows of a batch are wanted: bool[n], or None where all are."""
        conditions: list[Bools] = []
        if self.arena is not None and batch.arena != self.arena:
            return np.zeros(len(batch), dtype=np.bool_)
        if self.states is not None:
            wanted = np.zeros(256, dtype=np.bool_)
            wanted[[int(state) for state in self.states]] = True
            conditions.append(wanted[batch.state])
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
    ``arena`` is None for mmapped chunks.
    """

    header_address: UInt64s
    payload_address: UInt64s
    chunk_bytes: UInt64s
    usable_bytes: UInt64s
    state: UInt8s
    is_mmapped: bool
    arena: int | None
    sub_heap: int | None

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
        )


@dataclass(frozen=True, slots=True)
class LargestChunks:
    """The largest wanted chunks, each as rows of length 1, largest first, and how much was wanted in all."""

    rows: tuple[ChunkRows, ...]
    wanted_count: int
    wanted_bytes: int


def wanted_rows(batches: Iterable[ChunkBatch], arenas: Sequence[Arena], wanted: ChunkFilter) -> Iterator[ChunkRows]:
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


def header_line(row_format: RowFormat) -> bytes:
    """What stands before the first row: CSV's header line, nothing for JSON lines."""
    return (",".join(CHUNK_COLUMNS) + "\n").encode() if row_format is RowFormat.CSV else b""


def row_texts(rows: Iterable[ChunkRows], row_format: RowFormat) -> Iterator[bytearray]:
    """The rows as text, in blocks of at most ``BLOCK_ROWS`` lines."""
    for part in rows:
        layout = _line_layout(part, row_format)
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


def _line_layout(rows: ChunkRows, row_format: RowFormat) -> _LineLayout:
    """The layout of the lines of ``rows``: what all of them share stands in it as constant bytes."""
    fields = {
        "header_address": _hexadecimal(rows.header_address),
        "payload_address": _hexadecimal(rows.payload_address),
        "chunk_bytes": _decimal(rows.chunk_bytes),
        "usable_bytes": _decimal(rows.usable_bytes),
        "state": _label(rows.state),
    }
    sub_heap = None if rows.sub_heap is None else format_address(rows.sub_heap)
    pieces: list[bytes | _Field] = []
    if row_format is RowFormat.CSV:
        flag = "true" if rows.is_mmapped else "false"
        arena = "" if rows.arena is None else str(rows.arena)
        pieces += [b"0x", fields["header_address"], b",0x", fields["payload_address"]]
        pieces += [b",", fields["chunk_bytes"], b",", fields["usable_bytes"], b",", fields["state"]]
        pieces.append(f",{flag},{arena},{sub_heap or ''}\n".encode())
    else:
        pieces += [b'{"header_address": "0x', fields["header_address"]]
        pieces += [b'", "payload_address": "0x', fields["payload_address"]]
        pieces += [b'", "chunk_bytes": ', fields["chunk_bytes"], b', "usable_bytes": ', fields["usable_bytes"]]
        pieces += [b', "state": "', fields["state"]]
        shared = json.dumps({"is_mmapped": rows.is_mmapped, "arena": rows.arena, "sub_heap": sub_heap})
        pieces.append(b'", ' + shared[1:].encode() + b"\n")
    return _LineLayout(pieces, len(rows))


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


def _label_column() -> npt.NDArray[np.void]:
    """The labels, NUL-padded to a common width."""
    width = max(len(label) for label in STATE_LABELS)
    return np.frombuffer(b"".join(label.encode().ljust(width, b"\0") for label in STATE_LABELS), dtype=f"V{width}")


_LABELS = _label_column()


def _label(states: UInt8s) -> _Field:
    """The states' labels."""
    return _Field(_LABELS.dtype.itemsize, lambda first, end: _LABELS[states[first:end]])


def _as_uint64(value: int) -> np.uint64:
    """A Python number as uint64, held within what one can say."""
    return np.uint64(min(max(value, 0), (1 << 64) - 1))
