"""The threads command: names or start routines, stacks, and the arenas that no thread uses."""

from __future__ import annotations

import csv
import dataclasses
import io

from coreheap.render import tables
from coreheap.render.page import PageStyle
from coreheap.render.terminal_tables import table_notes, table_text
from tests.unit.report_samples import report as sample

REPORT = sample()


def test_arenas_without_threads_and_threads_without_arena_are_said() -> None:
    assert REPORT.heap is not None
    arenas = tuple(
        dataclasses.replace(arena, threads=() if arena.index else (0,), system_mem=1 << 20)
        for arena in REPORT.heap.arenas
    )
    threads = tuple(dataclasses.replace(thread, arena=thread.index or None) for thread in REPORT.threads)
    heap = dataclasses.replace(REPORT.heap, arenas=arenas)
    report = dataclasses.replace(REPORT, heap=heap, threads=threads)
    idle = len(arenas) - 1
    first, second = table_notes("threads", report)
    assert first == "1 thread without an arena"
    assert second.startswith(f"{idle} arenas without a thread, {idle}.0")
    assert "1, 2, 3" in second
    text = table_text("threads", tables.threads_table(report), PageStyle(width=120), (first, second))
    assert first in text
    assert second in text
    assert table_notes("arenas", report) == ()
    assert table_notes("threads", dataclasses.replace(report, heap=None)) == ()


def test_of_many_arenas_some_are_named() -> None:
    assert REPORT.heap is not None
    arena = dataclasses.replace(REPORT.heap.arenas[-1], threads=())
    many = tuple(dataclasses.replace(arena, index=number) for number in range(30))
    report = dataclasses.replace(REPORT, heap=dataclasses.replace(REPORT.heap, arenas=many), threads=())
    (note,) = table_notes("threads", report)
    assert note.endswith("0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 20 more")
    # Those of another copy of malloc have threads that these rows do not show.
    copies = tuple(dataclasses.replace(arena, copy=1) for arena in many)
    other = dataclasses.replace(report, heap=dataclasses.replace(REPORT.heap, arenas=copies))
    assert table_notes("threads", other) == ()


def test_rows_have_the_stack() -> None:
    rows = list(csv.DictReader(io.StringIO(tables.csv_text(tables.threads_table(REPORT)))))
    first, worker = rows[0], rows[1]
    assert (first["name"], first["name_source"], first["start_routine"]) == ("serviced", "comm", "")
    assert (worker["name"], worker["start_routine"]) == ("", "worker_main in serviced")
    assert (first["is_main"], worker["is_main"]) == ("true", "false")
    assert int(worker["stack_end"], 16) - int(worker["stack_start"], 16) == int(worker["stack_reserved_bytes"])
    assert rows[5]["stack_used_bytes"] == ""
    assert rows[6]["stack_resident_bytes"] == rows[6]["stack_peak_bytes"] == ""
    assert rows[7]["on_signal_stack"] == "true"
