"""Leaks as a part of the analysis: what is asked for, what is missing, and who may be asked afterwards."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import coreheap
from coreheap import leak_search
from coreheap.analysis import AnalysisOptions, analyze_with_references
from coreheap.heap import ChunkState
from coreheap.leak_search import explain_place
from coreheap.leaks import ChunkView, Place, RootKind, Verdict, VerdictTotal
from coreheap.report import Report
from tests.core_builder import CoreBuilder
from tests.heap_builder import IN_USE, PAGE
from tests.unit.allocators.built_process import BuiltProcess, build_process, release


def process_with_pointers() -> tuple[BuiltProcess, list[int]]:
    """A process of which a variable leads to chunk 0, that to 1; nothing leads to 2, which leads to 3."""
    process = build_process(release("2.36"))
    blocks = [
        chunk.payload_address(process.machine)
        for chunk in process.builder.heap.all_chunks()
        if chunk.state == IN_USE
        and chunk.chunk_bytes >= 48
        and chunk.header_address not in {cache.header_address for cache in process.caches}
    ][:4]
    process.put(process.program + PAGE + 0x800, blocks[0])
    process.put(blocks[0] + 8, blocks[1])
    process.put(blocks[2] + 16, blocks[3])
    return process, blocks


def verdicts_of(report: Report) -> dict[int, Verdict]:
    assert report.heap is not None
    found = {}
    for batch in report.heap.chunks.batches():
        assert batch.verdict is not None
        for payload, verdict in zip(batch.payload_address.tolist(), batch.verdict.tolist(), strict=True):
            found[payload] = Verdict(verdict)
    return found


def test_every_chunk_in_use_has_a_verdict(tmp_path: Path) -> None:
    process, blocks = process_with_pointers()
    report = process.analyze(tmp_path)
    assert report.leaks is not None
    assert report.heap is not None
    assert [verdicts_of(report)[block] for block in blocks] == [
        Verdict.STILL_REACHABLE,
        Verdict.STILL_REACHABLE,
        Verdict.DEFINITELY_LOST,
        Verdict.INDIRECTLY_LOST,
    ]
    whole = report.leaks.total()
    in_use = report.totals[ChunkState.IN_USE]
    assert (whole.count, whole.usable_bytes) == (in_use.count, in_use.usable_bytes)
    verdicts = np.array(list(verdicts_of(report).values()))
    for verdict, total in report.leaks.totals.items():
        assert int((verdicts == verdict).sum()) == total.count
    assert report.retained is None
    assert report.defects == ()
    assert "grouping suspects" in [phase.name for phase in report.phases]


def test_without_leaks_nothing_of_it_is_done(tmp_path: Path) -> None:
    process, _ = process_with_pointers()
    with coreheap.open(process.write(tmp_path)) as core:
        report, references = analyze_with_references(core, AnalysisOptions(leaks=False, retained=True))
    assert report.leaks is None
    assert report.retained is None
    assert references is None
    assert report.heap is not None
    assert report.heap.chunks.verdict is None
    assert not {finding.code for finding in report.findings} & {"LEAK", "POSSIBLE-LEAK", "ACCUMULATION"}


def test_without_leaks_nothing_of_it_is_imported(tmp_path: Path) -> None:
    process, _ = process_with_pointers()
    program = f"""
import sys, coreheap
with coreheap.open({str(process.write(tmp_path))!r}) as core:
    coreheap.analyze(core, coreheap.AnalysisOptions(leaks=False))
assert not [name for name in sys.modules if name.startswith("coreheap.references")], sys.modules
"""
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False, timeout=60)
    assert ended.returncode == 0


def test_roots_that_are_missing_are_a_gap_and_lower_the_verdict(tmp_path: Path) -> None:
    process, blocks = process_with_pointers()
    stack, stack_bytes = main_stack(process)
    report = process.analyze(tmp_path, left_out=[stack])
    assert report.leaks is not None
    assert report.leaks.missing_root_bytes == stack_bytes
    assert "roots_missing" in {gap.cause for gap in report.gaps}
    # The heap's own numbers do not rest on it.
    assert not report.is_partial
    assert report.leaks.totals[Verdict.DEFINITELY_LOST] == VerdictTotal()
    assert verdicts_of(report)[blocks[2]] is Verdict.POSSIBLY_LOST
    assert verdicts_of(report)[blocks[1]] is Verdict.STILL_REACHABLE
    assert report.leaks.unreachable.count > 0


def main_stack(process: BuiltProcess) -> tuple[int, int]:
    """Where the main thread's stack begins, and its bytes."""
    pointer = process.threads[0].stack_pointer
    (found,) = [
        (address, len(block))
        for address, block in process.builder.memory.runs()
        if address <= pointer < address + len(block)
    ]
    return found


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("more than 2**31 - 1 chunks")])
def test_a_graph_that_does_not_fit_is_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(leak_search, "build_graph", fail)
    process, _ = process_with_pointers()
    with coreheap.open(process.write(tmp_path)) as core:
        report, references = analyze_with_references(core)
    (gap,) = [gap for gap in report.gaps if gap.cause == "leak_check_impossible"]
    assert "nothing is said about leaks" in gap.consequence
    assert str(error) in gap.consequence
    assert (report.leaks, references, report.defects) == (None, None, ())
    assert report.is_partial
    assert report.heap is not None
    assert report.heap.chunks.verdict is None


@pytest.mark.parametrize("asked_for", [True, False])
def test_without_memory_for_references_the_verdicts_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked_for: bool
) -> None:
    process, blocks = process_with_pointers()
    path = process.write(tmp_path)
    with coreheap.open(path) as core:
        usual = coreheap.analyze(core)
    if not asked_for:
        build = leak_search.build_graph

        def fail_once(*arguments: Any, low_memory: bool, **named: Any) -> Any:
            if not low_memory:
                raise MemoryError
            return build(*arguments, low_memory=True, **named)

        monkeypatch.setattr(leak_search, "build_graph", fail_once)
    with coreheap.open(path) as core:
        report, references = analyze_with_references(core, AnalysisOptions(low_memory=asked_for))
        assert references is not None
        assert report.leaks is not None
        assert usual.leaks is not None
        assert report.leaks.edge_count is None
        assert dataclasses.replace(report.leaks, edge_count=usual.leaks.edge_count) == usual.leaks
        assert verdicts_of(report) == verdicts_of(usual)
        # Whoever asks for holders gets the references collected then.
        assert [owner.reference.target.payload_address for owner in references.owners(blocks[3])] == [blocks[3]]


def test_retained_sizes_that_do_not_fit_cost_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(leak_search, "find_retained", fail)
    process, _ = process_with_pointers()
    with coreheap.open(process.write(tmp_path)) as core:
        report, references = analyze_with_references(core, AnalysisOptions(retained=True))
    assert "retained_sizes_impossible" in {gap.cause for gap in report.gaps}
    assert report.leaks is not None
    assert references is not None
    assert report.retained is None
    assert report.is_partial


def test_a_mistake_in_the_search_is_a_defect_and_costs_only_the_leaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("surprise")

    monkeypatch.setattr(leak_search, "build_graph", fail)
    report = process_with_pointers()[0].analyze(tmp_path)
    assert report.defects == ("leak search: IndexError: surprise",)
    assert report.leaks is None
    assert report.heap is not None


def test_a_core_may_be_asked_who_holds_what(tmp_path: Path) -> None:
    process, blocks = process_with_pointers()
    with coreheap.open(process.write(tmp_path)) as core:
        report, references = analyze_with_references(core, AnalysisOptions(retained=True))
        assert references is not None
        assert references.leaks is report.leaks
        told = references.explain(blocks[1] + 5, retained=True)
        owners = references.owners(blocks[1])
        numbers = references.group_numbers()(0, len(report.heap.chunks) if report.heap else 0)
        nowhere = references.explain(0x10)
    assert told.chunk is not None
    assert (told.chunk.payload_address, told.offset, told.chunk.verdict) == (blocks[1], 5, Verdict.STILL_REACHABLE)
    assert told.retained_bytes == told.chunk.usable_bytes
    first, second = told.path
    assert isinstance(first.source, Place)
    assert first.source.kind is RootKind.MODULE_DATA
    assert first.source.address == process.program + PAGE + 0x800
    assert isinstance(second.source, ChunkView)
    assert second.source.payload_address == blocks[0]
    assert second.source_offset == 8
    (owner,) = owners
    assert owner.reference.source == second.source
    assert [isinstance(above.reference.source, Place) for above in owner.owners] == [True]
    assert (nowhere.chunk, nowhere.region) == (None, "not mapped")
    assert report.retained is not None
    assert blocks[0] in [entry.chunk.payload_address for entry in report.retained.top]
    assert report.leaks is not None
    for group in report.leaks.groups:
        assert int((numbers == group.number).sum()) == group.count + group.indirect_count


def test_without_a_heap_an_address_is_still_placed(tmp_path: Path) -> None:
    builder = CoreBuilder(64, "x86_64")
    builder.add_segment(0x50000, b"x" * PAGE)
    builder.add_segment(0x60000, None, PAGE, "r-x")
    builder.add_file_mapping(0x60000, 0x61000, 0, "/opt/some file")
    with coreheap.open(builder.write(tmp_path / "core")) as core:
        report, references = analyze_with_references(core)
        assert (report.heap, report.leaks, references) == (None, None, None)
        data, text, nothing = (explain_place(core, address) for address in (0x50010, 0x60010, 0x10))
    assert (data.permissions, data.is_saved, data.chunk) == ("rw-", True, None)
    assert "no glibc heap" in data.region
    assert (text.permissions, text.is_saved) == ("r-x", False)
    assert "some file" in text.region
    assert (nothing.region, nothing.permissions) == ("not mapped", "")
