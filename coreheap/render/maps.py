"""The address space as rows, grouped by kind or one row a mapping, for CSV, JSON lines and the report's key ``mappings``.

Knows: the columns, how to sort and to filter them. Does not know: terminals (``terminal_maps``), nor how a byte got its kind.
There may be millions of mappings: they are sorted as columns, and made into rows a batch at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.mappings import KINDS, UNKNOWN_FLAGS, MappingTable, ResidencyBasis
from coreheap.render.escaping import printable
from coreheap.render.json_values import Json
from coreheap.render.tables import Cell, CellKind, Column, Table, json_rows
from coreheap.report import Report, ThreadSummary

Rows = npt.NDArray[np.intp]

BATCH_ROWS = 1 << 13
"""Mappings that are made into rows at a time."""

_SUMS = (
    Column("reserved_bytes", CellKind.BYTES),
    Column("committed_bytes", CellKind.BYTES),
    Column("saved_bytes", CellKind.BYTES),
    Column("resident_low_bytes", CellKind.BYTES),
    Column("resident_high_bytes", CellKind.BYTES),
)
KIND_COLUMNS = (Column("kind", CellKind.WORD), Column("count", CellKind.COUNT), *_SUMS)
"""One row a kind. ``count`` is that of its mappings."""
MAPPING_COLUMNS = (
    Column("address", CellKind.ADDRESS),
    Column("end_address", CellKind.ADDRESS),
    Column("permissions", CellKind.WORD),
    Column("kind", CellKind.WORD),
    Column("thread", CellKind.INDEX),
    Column("lwp", CellKind.INDEX),
    Column("arena", CellKind.INDEX),
    Column("name", CellKind.WORD),
    *_SUMS,
)
"""One row a mapping."""


@dataclass(frozen=True, slots=True)
class MapsOrder:
    """Which mappings, in which order, and how many of them at most.

    ``kinds`` empty takes all. ``column`` is the name of one of the columns, None for the order that is of most use: kinds by
    their size, mappings by their addresses, where ``top`` takes the largest.
    """

    kinds: Collection[str] = ()
    column: str | None = None
    descending: bool = False
    top: int | None = None


def kinds_table(report: Report, order: MapsOrder = MapsOrder()) -> Table:
    """The sums of each kind that has any mapping."""
    mappings = report.mappings
    if mappings is None:
        return Table(KIND_COLUMNS, ())
    kind = mappings.kind.astype(np.intp)
    count = np.bincount(kind, minlength=len(KINDS))
    sums = np.zeros((len(_SUMS), len(KINDS)), np.uint64)
    for number, column in enumerate(_sum_columns(mappings)):
        np.add.at(sums[number], kind, column)
    rows = [
        (KINDS[row].value, int(count[row]), *_known(sums[:, row].tolist(), mappings.basis))
        for row in np.flatnonzero(count).tolist()
        if not order.kinds or KINDS[row].value in order.kinds
    ]
    table = Table(KIND_COLUMNS, tuple(rows))
    place = table.column_index(order.column or "reserved_bytes")

    def rank(row: tuple[Cell, ...]) -> tuple[bool, Cell]:
        return (row[place] is not None, row[place])

    rows.sort(key=rank, reverse=order.descending or order.column is None)
    return Table(KIND_COLUMNS, tuple(rows[: order.top]))


def total_row(table: Table) -> tuple[Cell, ...]:
    """The sums over the rows of ``kinds_table``."""
    sums = [
        None if any(row[place] is None for row in table.rows) else sum(int(row[place] or 0) for row in table.rows)
        for place in range(1, len(KIND_COLUMNS))
    ]
    return ("total", *sums)


def mapping_tables(report: Report, order: MapsOrder, *, is_text: bool = False) -> Iterator[Table]:
    """The mappings in tables of at most ``BATCH_ROWS`` rows; one without rows where there is none.

    ``is_text``: names are made printable, for outputs that do not escape by themselves.
    """
    mappings = report.mappings
    if mappings is None:
        yield Table(MAPPING_COLUMNS, ())
        return
    rows = ordered_rows(mappings, report.threads, order)
    names = [printable(name) for name in mappings.names] if is_text else list(mappings.names)
    lwp_of = {thread.index: thread.lwp for thread in report.threads}
    for first in range(0, max(len(rows), 1), BATCH_ROWS):
        yield _mappings(mappings, rows[first : first + BATCH_ROWS], names, lwp_of)


def ordered_rows(mappings: MappingTable, threads: tuple[ThreadSummary, ...], order: MapsOrder) -> Rows:
    """The rows of the wanted mappings in the wanted order; equal ones by address."""
    rows: Rows = np.arange(len(mappings))
    if order.kinds:
        wanted = [number for number, kind in enumerate(KINDS) if kind.value in order.kinds]
        rows = np.flatnonzero(np.isin(mappings.kind, wanted))
    if order.column is None:
        if order.top is not None and order.top < len(rows):
            size = (mappings.end - mappings.start)[rows]
            rows = np.sort(rows[np.argsort(~size, kind="stable")[: order.top]])
        return rows
    rank = np.unique(_sort_key(mappings, threads, order.column)[rows], return_inverse=True)[1].reshape(-1)
    return rows[np.argsort(-rank if order.descending else rank, kind="stable")][: order.top]


def mappings_value(report: Report) -> Json:
    """The report's key ``mappings``: on what residency rests, and the sums of each kind."""
    if report.mappings is None:
        return None
    return {
        "residency": report.mappings.basis.value,
        "residency_confidence": report.mappings.residency_confidence.value,
        "kinds": [dict(row) for row in json_rows(kinds_table(report))],
    }


def owner_text(name: Cell, thread: Cell, lwp: Cell, arena: Cell) -> str:
    """Whose memory a mapping is, for people; empty where nobody's is known."""
    owners = [] if thread is None else [f"thread {thread}" if lwp is None else f"thread {thread} (LWP {lwp})"]
    if arena is not None:
        owners.append(f"arena {arena}")
    if isinstance(name, str):
        owners.append(printable(name))
    return ", ".join(owners)


def permissions(flags: int) -> str | None:
    """``rw-`` and so on; None where no program header tells them."""
    if flags == UNKNOWN_FLAGS:
        return None
    return "".join(letter if flags & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))


def _sum_columns(mappings: MappingTable) -> tuple[npt.NDArray[np.uint64], ...]:
    """In the order of _SUMS."""
    return (
        mappings.end - mappings.start,
        mappings.committed_bytes,
        mappings.saved_bytes,
        mappings.resident_low,
        mappings.resident_high,
    )


def _known(sums: list[int], basis: ResidencyBasis) -> list[int | None]:
    """Sums with residency None where nothing at all is known of it."""
    return [*sums[:3], None, None] if basis is ResidencyBasis.UNKNOWN else [*sums]


def _mappings(mappings: MappingTable, rows: Rows, names: list[str], lwp_of: dict[int, int]) -> Table:
    sums = zip(*(column[rows].tolist() for column in _sum_columns(mappings)), strict=True)
    made = tuple(
        (
            start,
            end,
            permissions(flags),
            KINDS[kind].value,
            None if thread < 0 else thread,
            lwp_of.get(thread),
            None if arena < 0 else arena,
            None if name < 0 else names[name],
            *_known(list(numbers), mappings.basis),
        )
        for start, end, flags, kind, thread, arena, name, numbers in zip(
            mappings.start[rows].tolist(),
            mappings.end[rows].tolist(),
            mappings.flags[rows].tolist(),
            mappings.kind[rows].tolist(),
            mappings.thread[rows].tolist(),
            mappings.arena[rows].tolist(),
            mappings.name[rows].tolist(),
            sums,
            strict=True,
        )
    )
    return Table(MAPPING_COLUMNS, made)


def _sort_key(
    mappings: MappingTable, threads: tuple[ThreadSummary, ...], column: str
) -> npt.NDArray[np.uint64] | npt.NDArray[np.int64]:
    """Numbers in the order of a column; what is not known or belongs to nobody comes first."""
    sums = dict(zip((sum_column.name for sum_column in _SUMS), _sum_columns(mappings), strict=True))
    if column in sums:
        return sums[column]
    if column in ("address", "end_address"):
        return mappings.start if column == "address" else mappings.end
    if column == "kind":
        return _ranks([kind.value for kind in KINDS])[mappings.kind]
    if column == "name":
        return np.append(_ranks(mappings.names), -1)[mappings.name]
    if column == "permissions":
        return _ranks([permissions(flags) or "" for flags in range(UNKNOWN_FLAGS + 1)])[mappings.flags]
    if column == "lwp":
        highest = max((thread.index for thread in threads), default=-1)
        lwp = np.full(highest + 2, -1, np.int64)
        for thread in threads:
            lwp[thread.index] = thread.lwp
        return lwp[np.where(mappings.thread <= highest, mappings.thread, -1)]
    return {"thread": mappings.thread, "arena": mappings.arena}[column].astype(np.int64)


def _ranks(words: Collection[str]) -> npt.NDArray[np.int64]:
    """The place of each word in the order of the alphabet; equal words have the same."""
    place = {word: number for number, word in enumerate(sorted(set(words)))}
    return np.array([place[word] for word in words], np.int64)
