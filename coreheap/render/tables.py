"""The tables behind a report, one row for each arena, sub-heap, free list or thread, as CSV and JSON lines.

Knows: the columns of each table and how a cell is written for programs.
Does not know: chunks, of which there may be 100 million (see ``rows``), nor terminals (see ``terminal_tables``).
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from coreheap.free_memory import FreeMemoryReport
from coreheap.heap import Arena, ChunkRegion, ChunkState, HeapSnapshot, RegionKind, StateTotal, SubHeap, ThreadCache
from coreheap.quantities import format_address
from coreheap.render.escaping import printable, without_surrogates
from coreheap.render.free_memory_document import arena_cells, heap_cells
from coreheap.report import Report

Cell = int | float | str | bool | None


class CellKind(Enum):
    """What a column holds; decides how its cells are written."""

    ADDRESS = "address"
    BYTES = "bytes"
    COUNT = "count"
    INDEX = "index"
    SHARE = "share"
    FLAG = "flag"
    WORD = "word"


@dataclass(frozen=True, slots=True)
class Column:
    """A column's name, the same in CSV and JSON, and what its cells are."""

    name: str
    kind: CellKind


FREE_MEMORY_COLUMNS = (
    Column("utilisation", CellKind.SHARE),
    Column("trimmable_bytes", CellKind.BYTES),
    Column("largest_free_bytes", CellKind.BYTES),
)
"""What ``free_memory_document`` gives cells for; of a main arena in several pieces no single piece has them."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of equal length under named columns; a cell of None is unknown, or belongs to nothing."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def column_index(self, name: str) -> int:
        """Where the column of that name stands; KeyError where there is none."""
        for index, column in enumerate(self.columns):
            if column.name == name:
                return index
        raise KeyError(name)

    def largest(self, name: str, count: int) -> Table:
        """The ``count`` rows with the most in column ``name``, largest first; ties keep their order."""
        key = self.column_index(name)

        def amount(row: tuple[Cell, ...]) -> float:
            cell = row[key]
            return float(cell) if isinstance(cell, int | float) else -1.0

        return Table(self.columns, tuple(sorted(self.rows, key=amount, reverse=True)[:count]))


def table_named(name: str, report: Report) -> Table:
    """The table that the command of that name shows: arenas, heaps, bins or threads."""
    makers = {"arenas": arenas_table, "heaps": heaps_table, "bins": bins_table, "threads": threads_table}
    return makers[name](report)


def arenas_table(report: Report) -> Table:
    """One row an arena, with the totals of each chunk state side by side."""
    columns = (
        Column("index", CellKind.INDEX),
        Column("address", CellKind.ADDRESS),
        Column("is_main", CellKind.FLAG),
        Column("is_contiguous", CellKind.FLAG),
        Column("locked", CellKind.FLAG),
        Column("on_free_list", CellKind.FLAG),
        Column("attached_threads", CellKind.COUNT),
        Column("found_threads", CellKind.COUNT),
        Column("system_mem", CellKind.BYTES),
        Column("max_system_mem", CellKind.BYTES),
        Column("reserved_bytes", CellKind.BYTES),
        Column("saved_bytes", CellKind.BYTES),
        Column("coverage", CellKind.SHARE),
        Column("foreign_bytes", CellKind.BYTES),
        Column("unattributed_bytes", CellKind.BYTES),
        Column("top_address", CellKind.ADDRESS),
        Column("top_bytes", CellKind.BYTES),
        Column("sub_heap_count", CellKind.COUNT),
        *_state_columns(),
        Column("copy", CellKind.INDEX),
        *FREE_MEMORY_COLUMNS,
    )
    rows = tuple(
        (
            arena.index,
            arena.address,
            arena.is_main,
            arena.is_contiguous,
            arena.locked,
            arena.on_free_list,
            arena.attached_threads,
            len(arena.threads),
            arena.system_mem,
            arena.max_system_mem,
            arena.reserved_bytes,
            arena.saved_bytes,
            arena.coverage,
            arena.foreign_bytes,
            sum(stretch.range.byte_count for stretch in arena.unattributed),
            arena.top_address,
            arena.top_bytes,
            len(arena.sub_heaps),
            *_state_cells(arena.totals),
            arena.copy,
            *arena_cells(report.free_memory, arena.index),
        )
        for arena in _arenas(report)
    )
    return Table(columns, rows)


def heaps_table(report: Report) -> Table:
    """One row for each stretch that an arena's chunks live in: sub-heaps, and the main arena's own pieces.

    ``kind`` tells them apart. For the main arena ``address`` is where the piece starts, and what only a sub-heap
    has is null.
    """
    columns = (
        Column("arena", CellKind.INDEX),
        Column("kind", CellKind.WORD),
        Column("address", CellKind.ADDRESS),
        Column("committed_bytes", CellKind.BYTES),
        Column("mprotect_bytes", CellKind.BYTES),
        Column("reserved_bytes", CellKind.BYTES),
        Column("overhead_bytes", CellKind.BYTES),
        Column("is_first", CellKind.FLAG),
        Column("saved_bytes", CellKind.BYTES),
        Column("populated_bytes", CellKind.BYTES),
        Column("proven_to_end", CellKind.FLAG),
        *_state_columns(),
        *FREE_MEMORY_COLUMNS,
    )
    return Table(columns, tuple(_heap_rows(report.heap, report.free_memory)) if report.heap else ())


def bins_table(report: Report) -> Table:
    """One row for each free list that was walked: fastbins, bins, and the lists of each thread's tcache."""
    columns = (
        Column("kind", CellKind.WORD),
        Column("number", CellKind.INDEX),
        Column("arena", CellKind.INDEX),
        Column("thread_cache", CellKind.INDEX),
        Column("chunk_bytes_low", CellKind.BYTES),
        Column("chunk_bytes_high", CellKind.BYTES),
        Column("count", CellKind.COUNT),
        Column("chunk_bytes", CellKind.BYTES),
        Column("recorded_count", CellKind.COUNT),
        Column("error", CellKind.WORD),
        Column("error_address", CellKind.ADDRESS),
    )
    rows = tuple(
        (
            free_list.kind.label,
            free_list.number,
            free_list.arena,
            free_list.thread_cache,
            free_list.chunk_bytes_low,
            free_list.chunk_bytes_high,
            free_list.count,
            free_list.chunk_bytes,
            free_list.recorded_count,
            free_list.error or None,
            free_list.error_address,
        )
        for free_list in (report.heap.free_lists if report.heap else ())
    )
    return Table(columns, rows)


def threads_table(report: Report) -> Table:
    """One row a thread: the arena and the tcache it was found to use in the program's own malloc, its name and its stack."""
    columns = (
        Column("index", CellKind.INDEX),
        Column("lwp", CellKind.INDEX),
        Column("signal", CellKind.INDEX),
        Column("arena", CellKind.INDEX),
        Column("arena_address", CellKind.ADDRESS),
        Column("thread_cache", CellKind.INDEX),
        Column("thread_cache_address", CellKind.ADDRESS),
        Column("tcache_count", CellKind.COUNT),
        Column("tcache_bytes", CellKind.BYTES),
        Column("stack_pointer", CellKind.ADDRESS),
        Column("program_counter", CellKind.ADDRESS),
        Column("thread_pointer", CellKind.ADDRESS),
        Column("is_main", CellKind.FLAG),
        Column("name", CellKind.WORD),
        Column("name_source", CellKind.WORD),
        Column("start_routine", CellKind.WORD),
        Column("stack_start", CellKind.ADDRESS),
        Column("stack_end", CellKind.ADDRESS),
        Column("stack_source", CellKind.WORD),
        Column("guard_bytes", CellKind.BYTES),
        Column("stack_reserved_bytes", CellKind.BYTES),
        Column("stack_used_bytes", CellKind.BYTES),
        Column("stack_resident_bytes", CellKind.BYTES),
        Column("stack_peak_bytes", CellKind.BYTES),
        Column("on_signal_stack", CellKind.FLAG),
    )
    address_of = {arena.index: arena.address for arena in _arenas(report)}
    caches = report.heap.thread_caches if report.heap else ()
    cache_of = {cache.thread: cache for cache in caches if cache.thread is not None and cache.copy == 0}
    rows = tuple(
        (
            thread.index,
            thread.lwp,
            thread.signal,
            thread.arena,
            None if thread.arena is None else address_of.get(thread.arena),
            *_thread_cache_cells(cache_of.get(thread.index)),
            thread.tcache_count,
            thread.tcache_bytes,
            thread.stack_pointer,
            thread.program_counter,
            thread.thread_pointer,
            thread.is_main,
            thread.name,
            thread.name_source,
            thread.start_routine,
            thread.stack_start,
            thread.stack_end,
            thread.stack_source,
            thread.guard_bytes,
            thread.stack_reserved_bytes,
            thread.stack_used_bytes,
            thread.stack_resident_bytes,
            thread.stack_peak_bytes,
            thread.on_signal_stack,
        )
        for thread in report.threads
    )
    return Table(columns, rows)


def csv_text(table: Table) -> str:
    """The table as CSV: a header line, flags as true and false, unknown as an empty cell."""
    page = io.StringIO()
    csv.writer(page, lineterminator="\n").writerow(column.name for column in table.columns)
    return page.getvalue() + csv_rows(table)


def csv_rows(table: Table) -> str:
    """The table's rows as CSV, without the header line."""
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\n")
    for row in table.rows:
        writer.writerow(_csv_cell(cell, column.kind) for column, cell in zip(table.columns, row, strict=True))
    return page.getvalue()


def json_lines(table: Table) -> str:
    """The table as JSON lines: one object a row."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in json_rows(table))


def json_rows(table: Table) -> Iterator[dict[str, Cell]]:
    """The rows of a table as JSON has them: addresses as hex strings, unknown as None."""
    columns = [(column.name, column.kind) for column in table.columns]
    for row in table.rows:
        yield {name: _json_cell(cell, kind) for (name, kind), cell in zip(columns, row, strict=True)}


def _json_cell(cell: Cell, kind: CellKind) -> Cell:
    if isinstance(cell, int) and kind is CellKind.ADDRESS:
        return format_address(cell)
    return without_surrogates(cell) if isinstance(cell, str) else cell


def _csv_cell(cell: Cell, kind: CellKind) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    # JSON escapes by itself what a terminal would obey; CSV has no escapes.
    return printable(cell) if isinstance(cell, str) else str(_json_cell(cell, kind))


def _arenas(report: Report) -> tuple[Arena, ...]:
    return report.heap.arenas if report.heap else ()


def _thread_cache_cells(cache: ThreadCache | None) -> tuple[Cell, Cell]:
    """The index by which ``bins`` names a tcache, and where its structure is."""
    return (None, None) if cache is None else (cache.index, cache.address)


def _state_columns() -> Iterator[Column]:
    for state in ChunkState:
        yield Column(f"{state.label}_count", CellKind.COUNT)
        yield Column(f"{state.label}_chunk_bytes", CellKind.BYTES)
        yield Column(f"{state.label}_usable_bytes", CellKind.BYTES)


def _state_cells(totals: dict[ChunkState, StateTotal] | None) -> Iterator[int | None]:
    for state in ChunkState:
        total = None if totals is None else totals.get(state, StateTotal())
        yield None if total is None else total.count
        yield None if total is None else total.chunk_bytes
        yield None if total is None else total.usable_bytes


def _heap_rows(heap: HeapSnapshot, free_memory: FreeMemoryReport | None) -> Iterable[tuple[Cell, ...]]:
    regions_of: dict[int, list[ChunkRegion]] = {}
    for region in heap.chunks.regions:
        regions_of.setdefault(region.arena, []).append(region)
    for arena in heap.arenas:
        own = regions_of.get(arena.index, [])
        for number, sub_heap in enumerate(arena.sub_heaps):
            walked = [region for region in own if region.sub_heap == number]
            totals = None
            if walked:
                totals = {
                    state: sum((region.totals.get(state, StateTotal()) for region in walked), StateTotal())
                    for state in ChunkState
                }
            proven = all(region.proven_to_end for region in walked) if walked else None
            free = heap_cells(free_memory, arena.index, number)
            yield (*_sub_heap_cells(arena.index, sub_heap), proven, *_state_cells(totals), *free)
        for region in own:
            if region.kind is not RegionKind.ARENA_HEAP:
                yield (
                    arena.index,
                    region.kind.name.lower(),
                    region.range.start,
                    region.range.byte_count,
                    None,
                    region.range.byte_count,
                    None,
                    None,
                    None,
                    None,
                    region.proven_to_end,
                    *_state_cells(region.totals),
                    *(heap_cells(free_memory, arena.index, None) if len(own) == 1 else heap_cells(None, 0, None)),
                )


def _sub_heap_cells(arena: int, sub_heap: SubHeap) -> tuple[Cell, ...]:
    return (
        arena,
        RegionKind.ARENA_HEAP.name.lower(),
        sub_heap.address,
        sub_heap.committed_bytes,
        sub_heap.mprotect_bytes,
        sub_heap.reserved_bytes,
        sub_heap.overhead_bytes,
        sub_heap.is_first,
        sub_heap.saved_bytes,
        sub_heap.populated_bytes,
    )
