"""The survey of free memory against a look at every page and every chunk, on built processes of several releases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.free_memory import FreeMemoryReport, TopStays
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.mappings import ResidencyBasis
from coreheap.report import Report
from coreheap.retention import survey_free_memory
from coreheap.retention.pins import MOST
from tests.heap_builder import Mix
from tests.unit.allocators.built_process import Shape, build_process, release

PAGE = 4096
LARGE_CHUNKS = Shape(sub_heaps=(3, 1), main_bytes=0x40000, sub_heap_bytes=0x40000, mix=Mix(largest=30000, typical=6000))
"""Free chunks with whole pages inside, and main arenas, newest and older sub-heaps."""
FREE = {"fastbin", "unsorted_bin", "small_bin", "large_bin", "top"}
SHAPES = [("2.36", "x86_64"), ("2.31", "i386"), ("2.43", "x86_64"), ("2.12", "x86_64")]


def chunks_of(heap: HeapSnapshot, arena: int, sub_heap: int | None) -> list[tuple[int, int, str]]:
    """Start, end and state of the chunks of one heap."""
    wanted = -1 if sub_heap is None else sub_heap
    return [
        (start, start + size, ChunkState(state).label)
        for batch in heap.chunks.batches()
        if not batch.is_mmapped and (batch.arena, batch.sub_heap) == (arena, wanted)
        for start, size, state in zip(
            batch.header_address.tolist(), batch.chunk_bytes.tolist(), batch.state.tolist(), strict=True
        )
    ]


def surveyed(report: Report) -> tuple[HeapSnapshot, FreeMemoryReport]:
    assert report.heap is not None
    assert report.free_memory is not None
    return report.heap, report.free_memory


@pytest.mark.parametrize(("name", "machine"), SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_every_page_is_counted_once(tmp_path: Path, name: str, machine: str, seed: int) -> None:
    process = build_process(release(name, machine), LARGE_CHUNKS, seed)
    heap, free = surveyed(process.analyze(tmp_path))
    assert free.total("whole_page_bytes") > 5 * PAGE
    for arena in free.arenas:
        for memory in arena.heaps:
            chunks = chunks_of(heap, memory.arena, memory.sub_heap)
            others = {
                page
                for start, end, state in chunks
                if state not in FREE
                for page in range(start // PAGE * PAGE, end, PAGE)
            }
            free_bytes = sum(end - start for start, end, state in chunks if state in FREE)
            pages = {
                page for start, end, state in chunks if state in FREE for page in range(start // PAGE * PAGE, end, PAGE)
            }
            low, high = chunks[0][0], chunks[-1][1]
            whole = {page for page in pages - others if low <= page and page + PAGE <= high}
            assert memory.free_bytes == free_bytes
            assert memory.whole_page_bytes == len(whole) * PAGE
            assert memory.shared_page_bytes == free_bytes - len(whole) * PAGE
            assert memory.live_bytes == sum(e - s for s, e, state in chunks if state in ("in_use", "allocator_own"))
            assert memory.tcache_bytes == sum(e - s for s, e, state in chunks if state == "tcache")
            largest = max((e - s for s, e, state in chunks if state in FREE - {"top"}), default=0)
            assert memory.largest_free_bytes == largest
            assert memory.trim.bytes <= memory.whole_page_bytes
            assert memory.top_stays in (TopStays.NO_TOP, TopStays.BELOW_THRESHOLD, TopStays.NOT_AT_BREAK)
        assert arena.total("free_bytes") == sum(
            heap.arenas[arena.arena].totals[ChunkState[state.upper()]].chunk_bytes for state in FREE
        )


@pytest.mark.parametrize(("name", "machine"), SHAPES)
def test_the_chain_of_pins_is_the_shortest_from_the_end(tmp_path: Path, name: str, machine: str) -> None:
    process = build_process(release(name, machine), LARGE_CHUNKS, 5)
    heap, free = surveyed(process.analyze(tmp_path))
    assert sum(memory.pins.chunk_count > 0 for arena in free.arenas for memory in arena.heaps) > 2
    for arena in free.arenas:
        for memory in arena.heaps:
            if len({region.sub_heap for region in heap.chunks.regions if region.arena == memory.arena}) != len(
                [region for region in heap.chunks.regions if region.arena == memory.arena]
            ):
                continue  # pieces
            gains, live = [], 0
            run_end: int | None = None
            start_of_run = 0
            for start, end, state in [*reversed(chunks_of(heap, memory.arena, memory.sub_heap)), (0, 0, "in_use")]:
                if state in FREE:
                    run_end = end if run_end is None else run_end
                    start_of_run = start
                    continue
                if run_end is not None:
                    pages = run_end // PAGE - -(-start_of_run // PAGE)
                    if live and pages > 0:
                        gains.append((pages * PAGE, live))
                    run_end = None
                live += state != "fencepost" and end > 0
            total = sum(gain for gain, _ in gains)
            gained = count = 0
            for gain, live_above in gains:
                if gained >= MOST * total:
                    break
                gained, count = gained + gain, live_above
            chain = memory.pins
            assert (chain.free_below_bytes, chain.gained_bytes, chain.chunk_count) == (total, gained, count)


def test_without_residency_nothing_is_claimed_of_it(tmp_path: Path) -> None:
    process = build_process(release("2.36"))
    with coreheap.open(process.write(tmp_path)) as core:
        report = coreheap.analyze(core)
        assert report.heap is not None
        free = survey_free_memory(core, report.heap, ResidencyBasis.UNKNOWN)
        assert free.trim.resident_low == 0
        assert free.trim.resident_high >= free.trim.bytes
        looked = survey_free_memory(core, report.heap, ResidencyBasis.ZERO_PAGES)
        assert free.trim.bytes == looked.trim.bytes
        assert 0 <= looked.trim.resident_low <= looked.trim.resident_high


def test_holders_are_asked_for_reported_pins_only(tmp_path: Path) -> None:
    process = build_process(release("2.36"), LARGE_CHUNKS, 5)
    asked: list[int] = []

    def holders(groups: object) -> list[str | None]:
        assert isinstance(groups, list)
        asked.extend(int(group[0]) for group in groups)
        return ["someone"] * len(groups)

    with coreheap.open(process.write(tmp_path)) as core:
        heap = coreheap.analyze(core).heap
        assert heap is not None
        free = survey_free_memory(core, heap, holders=holders)
    assert asked == [pin.first_chunk for pin in free.pins]
    assert all(pin.holder == "someone" for pin in free.pins)
    states = heap.chunks.index.state[np.array(asked, np.int64)]
    assert set(states.tolist()) <= {ChunkState.IN_USE, ChunkState.ALLOCATOR_OWN, ChunkState.TCACHE}


def test_memory_that_was_not_saved_leaves_bounds(tmp_path: Path) -> None:
    """Without the sub-heaps' memory nothing is said of their pages, and what is said of the others stays."""
    process = build_process(release("2.36"), LARGE_CHUNKS, 5)
    whole = surveyed(process.analyze(tmp_path))[1]
    newest = process.arenas[1].sub_heaps[-1]
    heap, free = surveyed(process.analyze(tmp_path, {newest}))
    assert free.arenas[0].total("free_bytes") == whole.arenas[0].total("free_bytes")
    assert free.total("free_bytes") < whole.total("free_bytes")
    assert len(free.arenas) == len(heap.arenas)
    assert free.trim.resident_low <= free.trim.resident_high <= free.trim.bytes + free.trim.top_unsure_bytes


@pytest.mark.parametrize("huge", [1, PAGE, 1 << 21, (1 << 64) - PAGE])
def test_no_page_size_of_the_core_gives_more_than_there_is(tmp_path: Path, huge: int) -> None:
    process = build_process(release("2.36"))
    process.put_field("malloc_par", process.mp, "thp_pagesize", huge)
    report = process.analyze(tmp_path)
    assert report.defects == ()
    heap, free = surveyed(report)
    main = free.arenas[0].heaps[0]
    assert 0 <= main.trim.top_bytes < (heap.arenas[0].top_bytes or 0)
    assert main.trim.top_bytes == 0 or huge <= PAGE
