"""Leak groups and retained sizes as rows, for CSV and JSON lines.

Knows: the columns of each. Does not know: terminals, nor single chunks, of which there may be 100 million (``rows``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from coreheap.leaks import Accumulation, ChunkView, LeakReport, RetainedReport, Verdict
from coreheap.quantities import format_address
from coreheap.render.tables import Cell, CellKind, Column, Table


def leak_groups_table(leaks: LeakReport | None, verdicts: Collection[Verdict] | None = None) -> Table:
    """One row a group of suspects, the surest verdict first; all of them where no verdicts are named.

    ``arenas`` and ``samples`` are lists in one cell: ``0:512 mmapped:3`` (arena and chunks), and addresses.
    """
    columns = (
        Column("number", CellKind.INDEX),
        Column("verdict", CellKind.WORD),
        Column("type", CellKind.WORD),
        Column("smallest_bytes", CellKind.BYTES),
        Column("largest_bytes", CellKind.BYTES),
        Column("count", CellKind.COUNT),
        Column("usable_bytes", CellKind.BYTES),
        Column("indirect_count", CellKind.COUNT),
        Column("indirect_bytes", CellKind.BYTES),
        Column("arenas", CellKind.WORD),
        Column("samples", CellKind.WORD),
        Column("holder", CellKind.WORD),
        Column("heuristic", CellKind.WORD),
    )
    rows = tuple(
        (
            group.number,
            group.verdict.label,
            group.type,
            group.smallest_bytes,
            group.largest_bytes,
            group.count,
            group.usable_bytes,
            group.indirect_count,
            group.indirect_bytes,
            arenas_text(group.arenas),
            " ".join(format_address(address) for address in group.samples),
            group.holder,
            group.heuristic.label,
        )
        for group in (leaks.groups if leaks else ())
        if not verdicts or group.verdict in verdicts
    )
    return Table(columns, rows)


def retained_table(retained: RetainedReport | None) -> Table:
    """One row for each chunk that retains much, then one for each accumulation point.

    ``kind`` tells them apart: ``chunk`` rows have no ``children``, ``accumulation`` rows of a place outside of the heap
    no chunk.
    """
    columns = (
        Column("kind", CellKind.WORD),
        Column("payload_address", CellKind.ADDRESS),
        Column("usable_bytes", CellKind.BYTES),
        Column("verdict", CellKind.WORD),
        Column("type", CellKind.WORD),
        Column("arena", CellKind.INDEX),
        Column("retained_bytes", CellKind.BYTES),
        Column("retained_count", CellKind.COUNT),
        Column("holder", CellKind.WORD),
        Column("children", CellKind.COUNT),
        Column("child_bytes", CellKind.BYTES),
        Column("child_retained_bytes", CellKind.BYTES),
        Column("samples", CellKind.WORD),
    )
    return Table(columns, tuple(_retained_rows(retained)) if retained else ())


def arenas_text(arenas: tuple[tuple[int | None, int], ...]) -> str:
    """Arenas with how many chunks are in each: ``0:512 mmapped:3``."""
    return " ".join(f"{'mmapped' if arena is None else arena}:{count}" for arena, count in arenas)


def _retained_rows(retained: RetainedReport) -> Iterator[tuple[Cell, ...]]:
    for entry in retained.top:
        yield (
            "chunk",
            *_chunk_cells(entry.chunk),
            entry.retained_bytes,
            entry.retained_count,
            entry.holder,
            None,
            None,
            None,
            None,
        )
    for point in retained.accumulations:
        yield ("accumulation", *_accumulation_cells(point))


def _accumulation_cells(point: Accumulation) -> tuple[Cell, ...]:
    holder = point.holder
    return (
        *_chunk_cells(holder if isinstance(holder, ChunkView) else None),
        point.retained_bytes,
        None,
        None if isinstance(holder, ChunkView) else holder,
        point.children,
        point.child_bytes,
        point.child_retained_bytes,
        " ".join(format_address(address) for address in point.samples),
    )


def _chunk_cells(chunk: ChunkView | None) -> tuple[Cell, ...]:
    if chunk is None:
        return (None,) * 5
    return (chunk.payload_address, chunk.usable_bytes, chunk.verdict.label, chunk.type, chunk.arena)
