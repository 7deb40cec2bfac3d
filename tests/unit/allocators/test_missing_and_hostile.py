"""What is missing or damaged costs only itself: no exception, no hang, gaps and anomalies that name it, sums that hold."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import coreheap
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.report import Report
from tests.heap_builder import IN_USE, LARGE_BIN, PAGE, SMALL_BIN, TCACHE, TOP, UNSORTED_BIN, BuiltChunk
from tests.unit.allocators.built_process import (
    OWN,
    THREADS,
    BuiltProcess,
    Shape,
    bin_header,
    build_process,
    leaves_of,
    mapped_bytes_of,
    release,
    states_of,
)

MOST_SECONDS = 20.0
"""For a core of less than a megabyte; a sound one takes a tenth of a second."""


def machines(*names: str) -> pytest.MarkDecorator:
    """Parameters ``name`` and ``machine_name``, given as ``2.36 i386``."""
    return pytest.mark.parametrize(("name", "machine_name"), [tuple(name.split()) for name in names])


MACHINES = machines("2.22 i386", "2.36 x86_64", "2.44 x86_64", "2.36 i386")


def analyze(process: BuiltProcess, folder: Path, left_out: tuple[int, ...] = ()) -> Report:
    """A report that kept what holds of every report, whatever the core."""
    began = time.monotonic()
    with coreheap.open(process.write(folder, left_out)) as core:
        report = coreheap.analyze(core)
        mapped = mapped_bytes_of(core)
    assert time.monotonic() - began < MOST_SECONDS
    assert report.defects == ()
    assert report.ledger.bytes == mapped
    assert sum(leaf.bytes for leaf in leaves_of(report.ledger)) == mapped
    assert all(leaf.bytes >= 0 for leaf in leaves_of(report.ledger))
    if report.heap is not None:
        assert_regions_are_tiled(report.heap)
    return report


def assert_regions_are_tiled(heap: HeapSnapshot) -> None:
    """Chunks follow each other from the first byte of each region to the last."""
    starting_at = {region.first_chunk: region for region in heap.chunks.regions}
    by_region: dict[int, int] = {}
    number, end = -1, 0
    for batch in heap.chunks.batches():
        if batch.is_mmapped:
            continue
        region = starting_at.get(batch.first_chunk)
        if region is not None:
            number, end = region.index, region.range.start
        assert int(batch.header_address[0]) == end
        assert np.all(batch.header_address[:-1] + batch.chunk_bytes[:-1] == batch.header_address[1:])
        end = int(batch.header_address[-1] + batch.chunk_bytes[-1])
        by_region[number] = by_region.get(number, 0) + int(batch.chunk_bytes.sum())
    assert by_region == {region.index: region.range.byte_count for region in heap.chunks.regions}
    for region in heap.chunks.regions:
        assert sum(total.chunk_bytes for total in region.totals.values()) == region.range.byte_count


def heap_of(report: Report) -> HeapSnapshot:
    assert report.heap is not None
    return report.heap


def causes(report: Report) -> set[str]:
    return {gap.cause for gap in report.gaps}


def codes(report: Report) -> set[str]:
    return {anomaly.code for anomaly in report.anomalies}


def block_of(process: BuiltProcess, address: int) -> int:
    """Start of the block that holds an address."""
    return next(start for start, block in process.builder.memory.runs() if start <= address < start + len(block))


def usable_truth(process: BuiltProcess, *states: str) -> set[int]:
    return set().union(*(process.truth[state] for state in states))


# Memory that was not saved


@MACHINES
def test_tls_of_one_thread_missing_is_a_gap_and_its_cache_is_proven_by_its_lists(
    name: str, machine_name: str, tmp_path: Path
) -> None:
    process = build_process(release(name, machine_name), THREADS)
    report = analyze(process, tmp_path, (process.threads[1].mapping[0],))
    heap = heap_of(report)
    assert report.anomalies == ()
    if process.release.has_tcache:
        assert "thread_storage_not_saved" in causes(report)
    assert states_of(heap) == process.truth
    assert process.threads[1].tcache not in {cache.address for cache in heap.thread_caches if cache.thread is not None}


@MACHINES
def test_tls_of_all_threads_missing(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), THREADS)
    report = analyze(process, tmp_path, tuple(thread.mapping[0] for thread in process.threads))
    heap = heap_of(report)
    assert states_of(heap) == process.truth
    assert {arena.threads for arena in heap.arenas} == {()}
    if process.release.has_tcache:
        assert "thread_storage_not_saved" in causes(report)


@machines("2.22 i386", "2.36 x86_64", "2.44 x86_64", "2.36 aarch64", "2.26 i386", "2.36 i386", "2.44 i386")
def test_main_arena_missing_leaves_its_chunks_unlisted_and_the_others_whole(
    name: str, machine_name: str, tmp_path: Path
) -> None:
    process = build_process(release(name, machine_name), THREADS)
    report = analyze(process, tmp_path, (block_of(process, process.main_arena),))
    heap = heap_of(report)
    assert {"arena_not_saved", "main_arena_unknown"} & causes(report)
    assert heap.identity.confidence is not Confidence.CERTAIN or heap.identity.main_arena is not None
    found, truth = states_of(heap), process.truth
    in_others = {
        chunk.payload_address(process.machine)
        for arena in process.arenas[1:]
        for segment in arena.segments
        for chunk in segment.chunks
    }
    for state, addresses in truth.items():
        assert found[state] & in_others == addresses & in_others, state
    # What was on the lists of the main arena looks free, and says so, or looks in use; it is never on a list.
    assert found.get("free_unlisted", set()) == usable_truth(process, UNSORTED_BIN, SMALL_BIN, LARGE_BIN) - in_others
    assert found["fastbin"] <= in_others


@machines("2.22 i386", "2.36 x86_64", "2.42 x86_64", "2.44 x86_64", "2.26 i386", "2.36 i386", "2.44 i386")
def test_main_arena_missing_in_a_process_of_one_thread(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name))
    report = analyze(process, tmp_path, (block_of(process, process.main_arena),))
    heap = heap_of(report)
    assert "main_arena_unknown" in causes(report)
    assert heap.identity.confidence is not Confidence.CERTAIN
    # Nothing tells 2.42 from later ones here, which write mmapped chunks in another way. What is missed is a gap.
    assert ("release_unknown" in causes(report)) == (process.release.minor >= 42)
    mmapped = {chunk.payload_address(process.machine) for chunk in process.builder.heap.mmapped}
    missed = mmapped if name == "2.42" else set()
    assert heap.mmapped_count == len(mmapped - missed)
    found, truth = states_of(heap), process.truth
    assert found[TOP] == truth[TOP]
    assert found.get("free_unlisted", set()) == usable_truth(process, UNSORTED_BIN, SMALL_BIN, LARGE_BIN)
    assert found[IN_USE] | found[TCACHE] | found[OWN] == usable_truth(process, IN_USE, TCACHE, OWN, "fastbin") - missed


@MACHINES
def test_sub_heap_in_the_middle_missing_is_a_gap_and_no_chunk_is_invented(
    name: str, machine_name: str, tmp_path: Path
) -> None:
    process = build_process(release(name, machine_name), THREADS)
    arena = process.arenas[1]
    missing = arena.segments[1]
    report = analyze(process, tmp_path, (arena.sub_heaps[1],))
    heap = heap_of(report)
    assert {"sub_heap_not_saved", "sub_heaps_missing"} <= causes(report)
    found = states_of(heap)
    everything = set().union(*found.values())
    assert not {address for address in everything if missing.start <= address < missing.end}
    # The first sub-heap is found by its header, though the chain to it is broken.
    assert {heap.address for heap in heap.arenas[2].sub_heaps} | {
        sub.address for other in heap.arenas for sub in other.sub_heaps
    } >= {arena.sub_heaps[0], arena.sub_heaps[2]}
    elsewhere = {
        chunk.payload_address(process.machine)
        for other in process.arenas
        for segment in other.segments
        if segment is not missing
        for chunk in segment.of_state(IN_USE)
    }
    assert elsewhere - process.truth[OWN] <= found[IN_USE]
    damaged = next(item for item in heap.arenas if item.address == arena.state_address)
    assert damaged.coverage is not None
    assert damaged.coverage < 1.0


@MACHINES
def test_heap_cut_in_the_middle_covers_the_rest(name: str, machine_name: str, tmp_path: Path) -> None:
    """The file of a truncated core ends inside the main arena's segment."""
    process = build_process(release(name, machine_name), THREADS)
    core = process.core()
    brk = process.arenas[0].segments[0].start & ~0xFFF
    for segment in core._segments:
        if segment.address == brk:
            segment.content = segment.content[: 2 * PAGE]
    path = core.write(tmp_path / "core")
    with coreheap.open(path) as opened:
        report = coreheap.analyze(opened)
    heap = heap_of(report)
    assert_regions_are_tiled(heap)
    found = states_of(heap)
    for state in (IN_USE, TCACHE):
        before = {address for address in process.truth[state] if brk <= address < brk + 2 * PAGE - 0x1000}
        assert before <= found[IN_USE] | found[TCACHE]
    assert any(cause.startswith("heap_") for cause in causes(report))
    assert heap.main_arena is not None
    assert heap.main_arena.coverage is not None
    assert heap.main_arena.coverage < 1.0


# Structures that lie


def built(sub_heaps: tuple[int, ...] = (3, 1)) -> BuiltProcess:
    return build_process(release("2.36"), Shape(sub_heaps=sub_heaps, mmapped_leads=(0, 0x1000, 0)))


@pytest.mark.parametrize(
    ("target", "liar"),
    [
        (target, liar)
        for target in ("itself", "newest", "oldest", "nowhere", "zero", "middle_of_a_chunk")
        for liar in (0, 1, 2)
    ],
)
def test_arena_ring_that_does_not_close(target: str, liar: int, tmp_path: Path) -> None:
    process = built()
    arenas = process.arenas
    values = {
        "itself": arenas[liar].state_address,
        "newest": arenas[2].state_address,
        "oldest": arenas[1].state_address,
        "nowhere": 0x4141_4141_4141,
        "zero": 0,
        "middle_of_a_chunk": arenas[0].segments[0].chunks[3].header_address + 8,
    }
    process.put_field("malloc_state", arenas[liar].state_address, "next", values[target])
    ring = [0, 2, 1]
    is_sound = values[target] == arenas[ring[(ring.index(liar) + 1) % 3]].state_address
    report = analyze(process, tmp_path)
    heap = heap_of(report)
    if is_sound:
        assert states_of(heap) == process.truth
        return
    assert causes(report) & {"arena_ring_open", "main_arena_unknown"} or report.anomalies
    assert heap.identity.main_arena in (None, process.main_arena)
    # What sub-heap headers name is found all the same.
    found = set().union(*(states_of(heap)[state] for state in (IN_USE, OWN, TCACHE)))
    for arena in arenas[1:]:
        for segment in arena.segments:
            assert {chunk.payload_address(process.machine) for chunk in segment.of_state(IN_USE)} <= found


@pytest.mark.parametrize("target", ["itself", "newest", "other_arena", "nowhere", "zero"])
def test_chain_of_sub_heaps_that_does_not_end(target: str, tmp_path: Path) -> None:
    process = built()
    oldest, middle, newest = process.arenas[1].sub_heaps
    value = {
        "itself": middle,
        "newest": newest,
        "other_arena": process.arenas[2].sub_heaps[0],
        "nowhere": 0x1234_0000_0000,
        "zero": 0,
    }[target]
    process.put_field("heap_info", middle, "prev", value)
    report = analyze(process, tmp_path)
    heap = heap_of(report)
    found = next(arena for arena in heap.arenas if arena.address == process.arenas[1].state_address)
    named = {sub.address for sub in found.sub_heaps}
    assert {oldest, newest} <= named
    assert report.anomalies or report.gaps or states_of(heap) == process.truth


@pytest.mark.parametrize(
    ("arena", "target"),
    [
        (arena, target)
        for arena in (0, 1)
        for target in ("nowhere", "zero", "other_arena", "middle_of_a_chunk", "misaligned")
    ],
)
def test_top_that_points_elsewhere(arena: int, target: str, tmp_path: Path) -> None:
    process = built()
    liar = process.arenas[arena]
    value = {
        "nowhere": 0x1234_5678_9AB0,
        "zero": 0,
        "other_arena": process.arenas[2].top,
        "middle_of_a_chunk": liar.segments[-1].chunks[2].header_address + 16,
        "misaligned": liar.top + 8,
    }[target]
    process.put_field("malloc_state", liar.state_address, "top", value)
    report = analyze(process, tmp_path)
    heap = heap_of(report)
    assert report.anomalies or causes(report)
    others = [other for other in process.arenas[1:] if other is not liar and other.top != value]
    found = states_of(heap)
    for other in others:
        assert other.top + 16 in found[TOP]


@pytest.mark.parametrize(
    ("arena", "value"),
    [(arena, value) for arena in (0, 1) for value in (0, 1, PAGE, 1 << 40, 1 << 63)],
)
def test_system_mem_that_lies(arena: int, value: int, tmp_path: Path) -> None:
    process = built()
    for name in ("system_mem", "max_system_mem"):
        process.put_field("malloc_state", process.arenas[arena].state_address, name, value)
    report = analyze(process, tmp_path)
    assert report.anomalies or report.gaps
    if arena == 0 and value:
        assert "system_mem_damaged" in codes(report)
    heap = heap_of(report)
    assert process.arenas[2].top + 16 in states_of(heap)[TOP]


@machines("2.31 aarch64", "2.41 aarch64", "2.44 aarch64", "2.36 x86_64", "2.36 i386")
@pytest.mark.parametrize("more", [0xC000, 0x173000])
def test_system_mem_that_lies_where_the_break_begins_inside_of_a_mapping(
    name: str, machine_name: str, more: int, tmp_path: Path
) -> None:
    """As in qemu-user, where .bss and the break are one, and behind what a program took by sbrk before malloc did."""
    process = build_process(release(name, machine_name), THREADS)
    main = process.arenas[0]
    before, blocks = 3 * PAGE, process.builder.memory.blocks
    start = main.segments[0].start & ~(PAGE - 1)
    blocks[start - before] = bytearray(before) + blocks.pop(start)
    process.put_field("malloc_par", process.mp, "arena_test", 11)
    assert "malloc_par_unknown" not in causes(analyze(process, tmp_path))
    process.put_field("malloc_state", main.state_address, "system_mem", main.system_mem + more)
    process.put_field("malloc_state", main.state_address, "max_system_mem", main.system_mem + more)
    report = analyze(process, tmp_path)
    assert "malloc_par_unknown" not in causes(report)
    assert "system_mem_damaged" in codes(report)
    assert states_of(heap_of(report)) == process.truth


@pytest.mark.parametrize("size", [0x21, PAGE | 1, 0x4141_4141_4141_4141])
def test_size_of_the_main_arenas_top_that_lies_is_one_anomaly(size: int, tmp_path: Path) -> None:
    process = built()
    sound = states_of(heap_of(analyze(process, tmp_path)))
    process.put(process.arenas[0].top + 8, size)
    report = analyze(process, tmp_path)
    assert codes(report) == {"top_size_mismatch"}
    assert states_of(heap_of(report)) == sound


@pytest.mark.parametrize("size", [0, PAGE, 1 << 26, 1 << 27, (1 << 64) - PAGE, 0x8001])
def test_sub_heap_size_that_lies(size: int, tmp_path: Path) -> None:
    process = built()
    process.put_field("heap_info", process.arenas[1].sub_heaps[1], "size", size)
    report = analyze(process, tmp_path)
    assert report.anomalies or report.gaps
    found = states_of(heap_of(report))
    assert process.arenas[2].top + 16 in found[TOP]


@pytest.mark.parametrize("count", [0, 1, 6, 7, 1000, 65535])
def test_tcache_count_that_lies_is_an_anomaly_and_the_list_counts(count: int, tmp_path: Path) -> None:
    process = built()
    (number, length) = next(
        (item.number, len(item.chunks)) for item in process.lists if item.state == TCACHE and item.chunks
    )
    owner = next(
        thread.tcache
        for thread in process.threads
        if process.get(process.field("tcache_perthread_struct", thread.tcache, "entries") + 8 * number)
    )
    process.put(process.field("tcache_perthread_struct", owner, "counts") + 2 * number, count, 2)
    report = analyze(process, tmp_path)
    if count == length:
        assert report.anomalies == ()
    elif count:
        assert {"list_count_mismatch", "tcache_count_too_high"} & set(codes(report))
        assert states_of(heap_of(report)) == process.truth


def chunks_in(process: BuiltProcess, state: str) -> list[BuiltChunk]:
    return [chunk for segment in process.arenas[0].segments for chunk in segment.of_state(state)]


@pytest.mark.parametrize("target", ["itself", "other_bin", "chunk_in_use", "top", "nowhere", "misaligned", "zero"])
def test_bin_that_leads_elsewhere_names_its_place(target: str, tmp_path: Path) -> None:
    process = built()
    binned = chunks_in(process, SMALL_BIN)
    offsets, state = process.release.offsets("malloc_state"), process.main_arena
    value = {
        "itself": binned[0].header_address,
        "other_bin": bin_header(process.machine, state, offsets, 90),
        "chunk_in_use": chunks_in(process, IN_USE)[3].header_address,
        "top": process.arenas[0].top,
        "nowhere": 0x4141_4141_4140,
        "misaligned": binned[1].header_address + 4,
        "zero": 0,
    }[target]
    process.put(binned[0].header_address + 16, value)
    report = analyze(process, tmp_path)
    heap = heap_of(report)
    assert report.anomalies or causes(report) & {"free_list_cut"}
    found = states_of(heap)
    assert found[IN_USE] == process.truth[IN_USE]
    # A chunk that lost its list still looks free.
    every_bin = (UNSORTED_BIN, SMALL_BIN, LARGE_BIN)
    listed = set().union(*(found[name] for name in every_bin), found.get("free_unlisted", set()))
    assert listed == usable_truth(process, *every_bin)


@pytest.mark.parametrize("number", [1, 2, 10, 64, 100, 126])
def test_bin_head_in_another_bin(number: int, tmp_path: Path) -> None:
    process = built()
    offsets, state = process.release.offsets("malloc_state"), process.main_arena
    header = bin_header(process.machine, state, offsets, number)
    process.put(header + 16, bin_header(process.machine, state, offsets, number + 1))
    report = analyze(process, tmp_path)
    assert report.anomalies
    assert states_of(heap_of(report))[IN_USE] == process.truth[IN_USE]


@pytest.mark.parametrize("end", ["fd", "bk"])
@pytest.mark.parametrize("value", ["zero", "empty"])
def test_bin_that_is_empty_at_one_end_only(value: str, end: str, tmp_path: Path) -> None:
    process = built()
    number = next(item.number for item in process.lists if item.state == SMALL_BIN)
    for arena in process.arenas:
        header = bin_header(process.machine, arena.state_address, process.release.offsets("malloc_state"), number)
        process.put(header + (16 if end == "fd" else 24), 0 if value == "zero" else header)
    report = analyze(process, tmp_path)
    assert report.anomalies
    if end == "fd":
        assert "bin_head_damaged" in codes(report)
    assert states_of(heap_of(report))[IN_USE] == process.truth[IN_USE]


@machines(
    "2.26 x86_64",
    "2.36 x86_64",
    "2.42 x86_64",
    "2.43 x86_64",
    "2.44 x86_64",
    "2.36 i386",
    "2.42 i386",
    "2.44 i386",
    "2.36 aarch64",
    "2.44 aarch64",
)
def test_damaged_tcache_structure_costs_no_other(name: str, machine_name: str, tmp_path: Path) -> None:
    process = build_process(release(name, machine_name), THREADS)
    victim = process.threads[1].tcache
    entries = process.field("tcache_perthread_struct", victim, "entries")
    process.put(entries + 40 * process.machine.word_bytes, 0x1232)
    report = analyze(process, tmp_path)
    assert report.gaps or report.anomalies
    found = states_of(heap_of(report))
    assert process.truth[OWN] - {victim} <= found[OWN]
    lost = process.truth[TCACHE] - found[TCACHE]
    assert lost <= found[IN_USE]
    assert len(found[TCACHE]) > len(process.truth[TCACHE]) / 2


@machines("2.31 aarch64", "2.36 aarch64", "2.42 aarch64", "2.44 aarch64", "2.36 i386")
@pytest.mark.parametrize("head", [0x1238, 0x7878_7878_7878_7878])
def test_tcache_with_a_misaligned_head_is_found_where_no_thread_pointer_is_told(
    name: str, machine_name: str, head: int, tmp_path: Path
) -> None:
    process = build_process(release(name, machine_name), THREADS)
    process.tells_thread_pointers = False
    word = process.machine.word_bytes
    assert states_of(heap_of(analyze(process, tmp_path))) == process.truth
    victim = process.threads[1].tcache
    entries = process.field("tcache_perthread_struct", victim, "entries")
    used = [number for number in range(64) if process.get(entries + number * word)]
    before = process.get(entries + used[0] * word)
    lost = next(
        {c.payload_address(process.machine) for c in item.chunks} for item in process.lists if item.head == before
    )
    process.put(entries + used[0] * word, head & (1 << 8 * word) - 1)
    report = analyze(process, tmp_path)
    assert "list_misaligned" in codes(report)
    found = states_of(heap_of(report))
    assert found[OWN] == process.truth[OWN]
    assert found[TCACHE] == process.truth[TCACHE] - lost


@machines("2.31 aarch64", "2.36 aarch64", "2.44 aarch64", "2.36 i386")
def test_lost_header_of_a_cached_block_is_known_by_its_list_where_no_thread_pointer_is_told(
    name: str, machine_name: str, tmp_path: Path
) -> None:
    process = build_process(release(name, machine_name), THREADS)
    process.tells_thread_pointers = False
    (victim, *_), word = next(item for item in process.lists if item.state == TCACHE).chunks, process.machine.word_bytes
    process.put(victim.header_address + word, 0x6369_7571_2065_6874 >> 64 - 8 * word)
    report = analyze(process, tmp_path)
    (broken,) = [anomaly for anomaly in report.anomalies if anomaly.code == "broken_chunk"]
    assert broken.address == victim.header_address
    assert broken.expected_word is not None
    assert broken.expected_word & ~7 == victim.chunk_bytes
    assert states_of(heap_of(report))[TCACHE] == process.truth[TCACHE]


def test_cycle_on_a_tcache_list_ends(tmp_path: Path) -> None:
    process = built()
    cached = next(item for item in process.lists if item.state == TCACHE and len(item.chunks) > 1)
    last = cached.chunks[-1].payload_address(process.machine)
    process.put(last, cached.head ^ (last >> 12))
    report = analyze(process, tmp_path)
    assert {"list_already_listed", "list_count_mismatch", "tcache_count_too_high"} & set(codes(report))
    assert states_of(heap_of(report)) == process.truth


def test_double_free_on_two_fastbins_is_counted_once(tmp_path: Path) -> None:
    process = built()
    item = next(item for item in process.lists if item.state == "fastbin")
    last = item.chunks[-1].payload_address(process.machine)
    process.put(last, item.head ^ (last >> 12))
    report = analyze(process, tmp_path)
    assert "list_already_listed" in codes(report)
    assert states_of(heap_of(report)) == process.truth


@pytest.mark.parametrize("size_word", [0, 1, 0x11, 0x21, 0x23, 0x41414141, (1 << 64) - 15, 1 << 63])
def test_overwritten_size_word_costs_few_chunks(size_word: int, tmp_path: Path) -> None:
    process = built()
    segment = process.arenas[0].segments[0]
    victim = next(chunk for chunk in segment.chunks[8:] if chunk.state == IN_USE)
    process.put(victim.header_address + 8, size_word)
    report = analyze(process, tmp_path)
    heap = heap_of(report)
    assert report.anomaly_count > 0
    assert heap.identity.confidence is not None
    found, truth = states_of(heap), process.truth
    assert len(truth[IN_USE] - found[IN_USE]) <= 4
    assert process.arenas[0].top + 16 in found[TOP]


@pytest.mark.parametrize("value", [0, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_any_field_with_a_hopeless_value_raises_nothing(value: int, tmp_path: Path) -> None:
    process = build_process(release("2.44"), Shape(sub_heaps=(2,)))
    arena = process.arenas[1]
    structures = {
        "malloc_par": process.mp,
        "malloc_state": arena.state_address,
        "heap_info": arena.sub_heaps[0],
        "tcache_perthread_struct": process.threads[1].tcache,
    }
    for structure, address in structures.items():
        for name, offset in process.release.offsets(structure).items():
            kept = process.builder.memory.read(address + offset, 8)
            process.put_field(structure, address, name, value)
            analyze(process, tmp_path)
            process.builder.memory.write(address + offset, kept)
    assert states_of(analyze(process, tmp_path).heap) == process.truth


# Whatever is overwritten


def damageable(process: BuiltProcess) -> list[tuple[int, int]]:
    """Ranges of the heap's chunks, of every arena's structures, and of all threads' TLS."""
    ranges = [(segment.start, segment.end) for arena in process.arenas for segment in arena.segments]
    size = process.release.byte_count("malloc_state")
    ranges += [(arena.state_address, arena.state_address + size) for arena in process.arenas] * 2
    ranges += [(sub_heap, sub_heap + 0x30) for arena in process.arenas for sub_heap in arena.sub_heaps]
    ranges += [(process.mp, process.mp + process.release.byte_count("malloc_par"))]
    ranges += [(thread.thread_pointer - 0x80, thread.thread_pointer + 0x20) for thread in process.threads]
    ranges += [(thread.tcache, thread.tcache + 0x280) for thread in process.threads]
    return ranges


def telling_words(process: BuiltProcess) -> list[int]:
    """Values that mislead more than random ones: pointers into structures, sizes, limits."""
    offsets = process.release.offsets("malloc_state")
    words = [0, 1, 2, 5, 0x10, 0x11, 0x20, 0x21, 0x25, 0x91, 0x1000, 0x1002, 0x8000, 0xFFFF_FFFF, 1 << 26, 1 << 40]
    words += [(1 << 63) | 1, (1 << 64) - 1, (1 << 64) - 16, (1 << 64) - PAGE]
    for arena in process.arenas:
        words += [arena.state_address, arena.top, arena.top + 16, *arena.sub_heaps]
        words += [bin_header(process.machine, arena.state_address, offsets, number) for number in (1, 5, 70)]
        for segment in arena.segments:
            words += [
                segment.start,
                segment.end,
                segment.chunks[2].header_address,
                segment.chunks[5].header_address + 16,
            ]
    words += [thread.tcache for thread in process.threads] + [thread.thread_pointer for thread in process.threads]
    return words


VICTIM = built()
SOUND = {address: bytes(block) for address, block in VICTIM.builder.memory.runs()}
RANGES = damageable(VICTIM)
WORDS = telling_words(VICTIM)
places = st.sampled_from(RANGES).flatmap(
    lambda pair: st.integers(0, (pair[1] - pair[0]) // 8 - 1).map(lambda number: pair[0] // 8 * 8 + 8 * number)
)
words = st.sampled_from(WORDS) | st.integers(0, (1 << 64) - 1) | st.integers(0, 0x2000)


def damage(process: BuiltProcess, changes: list[tuple[int, int]]) -> None:
    """The sound process again, with some words overwritten."""
    for address, content in SOUND.items():
        process.builder.memory.write(address, content)
    for address, value in changes:
        process.put(address, value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(places, words), min_size=1, max_size=20))
def test_random_damage_raises_nothing_and_loses_no_byte(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    damage(VICTIM, changes)
    report = analyze(VICTIM, tmp_path)
    if report.heap is not None:
        assert sum(total.chunk_bytes for total in report.heap.totals.values()) == sum(
            region.range.byte_count for region in report.heap.chunks.regions
        )
        assert report.anomaly_count >= len(report.anomalies)


def test_page_of_noise_anywhere_raises_nothing(tmp_path: Path) -> None:
    rng = random.Random(7)
    for start, end in sorted(set(RANGES)):
        damage(VICTIM, [])
        begin = start // PAGE * PAGE
        VICTIM.builder.memory.write(begin, rng.randbytes(min(PAGE, end - begin)))
        report = analyze(VICTIM, tmp_path)
        if report.heap is not None:
            assert report.anomaly_count or report.gaps or states_of(report.heap) == VICTIM.truth


def test_states_are_the_truth_again_without_damage(tmp_path: Path) -> None:
    damage(VICTIM, [])
    report = analyze(VICTIM, tmp_path)
    assert states_of(report.heap) == VICTIM.truth
    assert heap_of(report).totals[ChunkState.DAMAGED].count == 0
