"""Lookups, sums and addresses of an index with many regions, against brute force over the truth."""

from __future__ import annotations

import bisect
import itertools
import random
from collections import defaultdict
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from coreheap.kernels import (
    MMAPPED,
    ChunkGeometry,
    ChunkIndex,
    ChunkIndexBuilder,
    ChunkState,
    MmappedChunks,
    no_mmapped_chunks,
    words_for,
)
from tests.heap_builder import MACHINE_64, MACHINES, BuiltHeap, HeapBuilder, Machine, Mix
from tests.unit.kernels.support import geometry_of, index_of, mmapped_table, random_heap, walk_segment

each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


def many_regions(machine: Machine, seed: int, regions: int = 60, mmapped: int = 30) -> BuiltHeap:
    """Small and large regions, near and far from each other, with mmapped chunks in between."""
    rng = random.Random(seed)
    builder = HeapBuilder(machine, rng)
    address = 0x1_0000
    for number in range(regions + mmapped):
        address += rng.choice([0, 4096, 1 << 16, 1 << 20] if machine.word_bytes == 4 else [0, 4096, 1 << 22, 1 << 33])
        pages = rng.choice([1, 1, 2, 5])
        if number % 3 == 2 and len(builder.heap.mmapped) < mmapped:
            builder.add_mmapped(address, pages * 4096, lead=rng.choice([0, 0, 2048 - machine.header_bytes]))
        else:
            builder.add_segment(address, pages * 4096, ending=rng.choice(["top", "main_fence"]), mix=Mix(largest=2048))
        address += pages * 4096
    return builder.heap


@each_machine
@pytest.mark.parametrize("seed", range(3))
def test_addresses_lead_to_their_chunks(kernels: ModuleType, machine: Machine, seed: int) -> None:
    heap = many_regions(machine, seed)
    index = index_of(kernels, heap)
    chunks = heap.all_chunks()
    assert index.chunk_count == len(chunks)
    ends = {}
    for segment in heap.segments:
        starts = [chunk.header_address for chunk in segment.chunks]
        ends.update(zip(starts, [*starts[1:], segment.end], strict=True))
    mapping_ends = [sum(mapping) for mapping in sorted(heap.mmapped_mappings)]
    ends.update(zip(mmapped_table(heap).header_address.tolist(), mapping_ends, strict=True))

    addresses = []
    inside = []
    exact = []
    for number, chunk in enumerate(chunks):
        start, end = chunk.header_address, ends[chunk.header_address]
        for address in (start, start + 1, start + machine.alignment - 1, end - 1, (start + end) // 2):
            addresses.append(address)
            inside.append(number)
            exact.append(number if address == start else -1)
    by_start = {chunk.header_address: number for number, chunk in enumerate(chunks)}
    rng = random.Random(seed)
    for address in [0, 1, 0xFFFF, *ends.values(), (1 << 64) - 1, 1 << 63, *(rng.getrandbits(64) for _ in range(200))]:
        holders = [by_start[start] for start, end in ends.items() if start <= address < end]
        addresses.append(address)
        inside.append(holders[0] if holders else -1)
        exact.append(by_start.get(address, -1))

    queries = np.array(addresses, np.uint64)
    assert kernels.find_chunks(index, queries, False).tolist() == inside
    assert kernels.find_chunks(index, queries, True).tolist() == exact
    assert [index.chunk_containing(address) for address in addresses] == inside
    assert [index.chunk_starting_at(address) for address in addresses] == exact


@each_machine
def test_chunks_lead_back_to_their_addresses(kernels: ModuleType, machine: Machine) -> None:
    heap = many_regions(machine, 7)
    index = index_of(kernels, heap)
    chunks = heap.all_chunks()
    order = np.random.default_rng(1).permutation(len(chunks))
    header, chunk_bytes = kernels.chunk_extents(index, order)
    assert header.tolist() == [chunks[number].header_address for number in order]
    assert chunk_bytes.tolist() == [chunks[number].chunk_bytes for number in order]
    assert [index.bytes_of_chunk_at(chunk.header_address) for chunk in chunks] == [c.chunk_bytes for c in chunks]
    with pytest.raises(KeyError):
        index.bytes_of_chunk_at(1)
    for wrong in (-1, len(chunks), 1 << 62):
        with pytest.raises(IndexError, match="there is no chunk"):
            kernels.chunk_extents(index, np.array([wrong], np.int64))


@each_machine
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_unpacked_batches_are_all_chunks(kernels: ModuleType, machine: Machine, rows: int) -> None:
    heap = many_regions(machine, 11, regions=10, mmapped=2)
    index = index_of(kernels, heap)
    for number, segment in enumerate(sorted(heap.segments, key=lambda segment: segment.start)):
        words = index.word_count(number)
        headers: list[int] = []
        sizes: list[int] = []
        for first in range(0, words, rows):
            header, chunk_bytes = kernels.unpack_chunks(index, number, first, min(words, first + rows))
            headers += header.tolist()
            sizes += chunk_bytes.tolist()
        assert headers == [chunk.header_address for chunk in segment.chunks]
        assert sizes == [chunk.chunk_bytes for chunk in segment.chunks]
        assert sum(sizes) == segment.end - segment.start
        for first, last in ((-1, 1), (0, words + 1), (2, 1), (1 << 62, (1 << 62) + 1)):
            with pytest.raises(IndexError):
                kernels.unpack_chunks(index, number, first, last)
    for region in (-1, len(heap.segments), 1 << 62):
        with pytest.raises(IndexError):
            kernels.unpack_chunks(index, region, 0, 1)


@each_machine
def test_totals_conserve_every_byte(kernels: ModuleType, machine: Machine) -> None:
    heap = many_regions(machine, 13)
    index = index_of(kernels, heap)
    rng = np.random.default_rng(13)
    index.state[:] = rng.integers(0, 11, len(index.state))
    state = index.state.tolist()
    chunk = 0
    for number, segment in enumerate(sorted(heap.segments, key=lambda segment: segment.start)):
        counts: dict[int, int] = defaultdict(int)
        totals: dict[int, int] = defaultdict(int)
        for built in segment.chunks:
            counts[state[chunk]] += 1
            totals[state[chunk]] += built.chunk_bytes
            chunk += 1
        found_counts, found_totals = kernels.state_totals(index, number)
        assert found_counts.tolist() == [counts[slot] for slot in range(16)]
        assert found_totals.tolist() == [totals[slot] for slot in range(16)]
        assert int(found_totals.sum()) == segment.end - segment.start
    counts_of_mmapped, totals_of_mmapped = kernels.state_totals(index, MMAPPED)
    assert int(counts_of_mmapped.sum()) == len(heap.mmapped)
    assert int(totals_of_mmapped.sum()) == sum(size for _, size in heap.mmapped_mappings)
    for region in (len(heap.segments), -2, 1 << 60):
        with pytest.raises(IndexError):
            kernels.state_totals(index, region)


@each_machine
def test_histogram_by_size(kernels: ModuleType, machine: Machine) -> None:
    plan = [(machine.alignment * granules, "in_use") for granules in (4, 4, 1023, 1024, 2047, 2048, 4096, 70000)]
    builder = HeapBuilder(machine, random.Random(1))
    builder.add_segment(0x10000, 2 << 20, plan=plan)
    index = index_of(kernels, builder.heap)
    counts, totals = kernels.size_histogram(index, 0, 1 << ChunkState.IN_USE)
    expected = {4: 2, 1023: 1, 1024: 2, 1025: 1, 1026: 1, 1024 + 6: 1}
    assert {size_class: count for size_class, count in enumerate(counts.tolist()) if count} == expected
    assert int(totals.sum()) == sum(size for size, _ in plan)
    assert int(totals[1024]) == (1024 + 2047) * machine.alignment
    only_top, top_bytes = kernels.size_histogram(index, 0, 1 << ChunkState.TOP)
    assert int(only_top.sum()) == 1
    assert int(top_bytes.sum()) + int(totals.sum()) == int(index.region_end[0] - index.region_start[0])


def test_ranks(kernels: ModuleType) -> None:
    rng = np.random.default_rng(1)
    for rows in (0, 1, 2, 1000):
        lookup = rng.integers(0, 1 << 64, (rows, 2), np.uint64)
        lookup[::3, 0] = 0
        lookup[1::3, 0] = (1 << 64) - 1
        bits = [int(start_bits).bit_count() for start_bits in lookup[:, 0]]
        assert kernels.fill_ranks(lookup) == sum(bits)
        assert lookup[:, 1].tolist() == np.cumsum([0, *bits])[:rows].tolist()


def test_an_empty_index_answers(kernels: ModuleType) -> None:
    geometry = geometry_of(MACHINE_64)
    none = np.empty(0, np.uint64)
    index = ChunkIndex(geometry, none, none, np.empty(0, np.int64), np.zeros((0, 2), np.uint64), np.empty(0, np.uint8))
    assert kernels.find_chunks(index, np.array([0, 5, (1 << 64) - 1], np.uint64), False).tolist() == [-1, -1, -1]
    assert index.chunk_containing(0) == -1
    assert int(kernels.state_totals(index, MMAPPED)[0].sum()) == 0


def index_parts(**changes: Any) -> ChunkIndex:
    """Two regions of 1024 bytes with one chunk each, changed."""
    lookup = np.zeros((2, 2), np.uint64)
    lookup[:, 0] = 1
    lookup[1, 1] = 1
    parts: dict[str, Any] = {
        "geometry": ChunkGeometry(8, 16, 32, 0),
        "region_start": np.array([0x1000, 0x2000], np.uint64),
        "region_end": np.array([0x1400, 0x2400], np.uint64),
        "region_first_word": np.array([0, 1], np.int64),
        "lookup": lookup,
        "state": np.zeros(2, np.uint8),
        "mmapped": no_mmapped_chunks(),
        **changes,
    }
    return ChunkIndex(**parts)


def table(*rows: tuple[int, int, int, int]) -> MmappedChunks:
    return MmappedChunks(*(np.array([row[column] for row in rows], np.uint64) for column in range(4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region_start": np.array([0x1000, 0x1300], np.uint64)}, "overlap"),
        ({"region_start": np.array([0x2000, 0x1000], np.uint64)}, "not sorted"),
        ({"region_end": np.array([0x1000, 0x2400], np.uint64)}, "empty"),
        ({"region_start": np.array([0x1008, 0x2000], np.uint64)}, "chunk header can lie"),
        ({"region_end": np.array([0x1401, 0x2400], np.uint64)}, "rows of regions overlap"),
        ({"region_end": np.array([0x1400, 0x2401], np.uint64)}, "outside the lookup"),
        ({"region_end": np.array([0x1400, (1 << 63) + 1], np.uint64)}, "no process has memory"),
        ({"region_first_word": np.array([0, 0], np.int64)}, "rows of regions overlap"),
        ({"region_first_word": np.array([-1, 1], np.int64)}, "outside the lookup"),
        ({"lookup": np.array([[1, 0], [2, 1]], np.uint64)}, "begin with a chunk"),
        ({"lookup": np.array([[1, 0], [1, 0]], np.uint64)}, "ranks are not filled in"),
        ({"lookup": np.zeros((2, 3), np.uint64)}, "uint64"),
        ({"state": np.zeros(3, np.uint8)}, "3 states"),
        ({"region_start": np.array([0x1000], np.uint64)}, "differ in length"),
        ({"mmapped": table((0x1300, 0x1300, 0x1000, 0x1000)), "state": np.zeros(3, np.uint8)}, "overlaps a region"),
        ({"mmapped": table((0x0F00, 0x0F00, 0x101, 0x100)), "state": np.zeros(3, np.uint8)}, "overlaps a region"),
        ({"mmapped": table((0x5000, 0x4000, 0x1000, 0x10)), "state": np.zeros(3, np.uint8)}, "outside its mapping"),
        ({"mmapped": table((0x4000, 0x4000, (1 << 64) - 1, 1)), "state": np.zeros(3, np.uint8)}, "overlap"),
        ({"mmapped": table((0x4000, 0x4000, 1 << 63, 1)), "state": np.zeros(3, np.uint8)}, "no process has memory"),
    ],
)
def test_contradicting_parts_are_refused(changes: dict[str, object], message: str) -> None:
    assert index_parts().chunk_count == 2
    with pytest.raises(ValueError, match=message):
        index_parts(**changes)


@each_machine
def test_block_table_of_a_whole_address_space(kernels: ModuleType, machine: Machine) -> None:
    """Regions at both ends of the address space: blocks grow so that their table stays small."""
    builder = HeapBuilder(machine, random.Random(3))
    highest = (1 << 63) - 8192 if machine.word_bytes == 8 else (1 << 32) - 8192
    for address in (0x1000, 0x100000, highest):
        builder.add_segment(address, 4096, mix=Mix(largest=512))
    index = index_of(kernels, builder.heap)
    assert len(index.block_first_region) <= (1 << 21) + 1
    chunks = builder.heap.all_chunks()
    headers = np.array([chunk.header_address for chunk in chunks], np.uint64)
    assert kernels.find_chunks(index, headers, True).tolist() == list(range(len(chunks)))


def test_regions_that_cross_blocks(kernels: ModuleType) -> None:
    """A region over the border of two blocks, one over several, and small ones beside them in the same blocks."""
    block = 1 << 26
    bounds = [block - 0x2000, block - 0x1000, block + 0x1000, block + 0x2000, 5 * block + 0x400, 5 * block + 0x800]
    starts, ends = bounds[:-1], bounds[1:]
    words = [words_for(end - start, 16) for start, end in zip(starts, ends, strict=True)]
    first_words = np.cumsum([0, *words])[:-1]
    lookup = np.zeros((sum(words), 2), np.uint64)
    chunks = []
    for start, end, first_word in zip(starts, ends, first_words, strict=True):
        for offset in sorted({0, 0x20, (end - start) // 2 // 16 * 16, end - start - 0x20}):
            row, bit = divmod(offset // 16, 64)
            lookup[first_word + row, 0] |= np.uint64(1 << bit)
            chunks.append(start + offset)
    kernels.fill_ranks(lookup)
    index = ChunkIndex(
        ChunkGeometry(8, 16, 32, 0),
        np.array(starts, np.uint64),
        np.array(ends, np.uint64),
        first_words.astype(np.int64),
        lookup,
        np.zeros(len(chunks), np.uint8),
    )
    assert index.block_shift == 26
    queries = sorted({bound + near for bound in [*bounds, *chunks, 2 * block, 3 * block] for near in (-1, 0, 1, 32)})
    limits = [*chunks, ends[-1]]
    expected = [bisect.bisect_right(limits, query) - 1 if query < ends[-1] else -1 for query in queries]
    assert kernels.find_chunks(index, np.array(queries, np.uint64), False).tolist() == expected
    assert [index.chunk_containing(query) for query in queries] == expected
    header, chunk_bytes = kernels.chunk_extents(index, np.arange(len(chunks)))
    assert header.tolist() == chunks
    assert chunk_bytes.tolist() == [end - start for start, end in itertools.pairwise(limits)]


@each_machine
def test_builder_collects_walks(kernels: ModuleType, machine: Machine) -> None:
    heap = random_heap(machine, 21)
    geometry = geometry_of(machine)
    segments = sorted(heap.segments, key=lambda segment: segment.start)
    builder = ChunkIndexBuilder(geometry, sum(segment.end - segment.start for segment in segments), len(segments))
    anomalies = np.zeros((4, 2), np.int64)
    for segment in segments:
        stop = -1 if segment.top_address is None else segment.top_address - segment.start
        memory = heap.segment_bytes(segment)
        builder.open_region(segment.start, len(memory))
        assert not builder.close_region()  # without chunks a region vanishes, and can be opened again
        builder.open_region(segment.start, len(memory))
        with pytest.raises(ValueError, match="still open"):
            builder.open_region(segment.start, len(memory))
        outcome = kernels.walk_region(
            memory, geometry, stop, builder.start_bits(), builder.free_states(), segment.non_main, anomalies
        )
        builder.take_over(outcome)
        assert builder.end_offset == segment.end - segment.start
        assert builder.close_region()
    with pytest.raises(ValueError, match="no region is open"):
        builder.close_region()
    with pytest.raises(ValueError, match="comes after"):
        builder.open_region(segments[0].start, 4096)
    index = builder.finish(mmapped_table(heap))
    plain = index_of(kernels, heap)
    assert index.region_count == len(segments)
    assert index.state.tolist() == plain.state.tolist()
    headers = np.array([chunk.header_address for chunk in heap.all_chunks()], np.uint64)
    assert kernels.find_chunks(index, headers, True).tolist() == list(range(len(headers)))


def test_builder_marks_damage(kernels: ModuleType) -> None:
    """The way of a caller around a broken chunk: walk, mark the stretch, walk on."""
    builder = HeapBuilder(MACHINE_64, random.Random(4))
    segment = builder.add_segment(0x10000, 8192)
    victim = segment.chunks[5]
    builder.memory.put(victim.header_address + 8, 0xFFFFFFFFFFFFFFFF, 8)
    memory = builder.heap.segment_bytes(segment)
    geometry = geometry_of(MACHINE_64)
    assert segment.top_address is not None
    stop = segment.top_address - segment.start
    index_builder = ChunkIndexBuilder(geometry, len(memory), 1)
    index_builder.open_region(segment.start, len(memory))
    anomalies = np.zeros((4, 2), np.int64)
    states = index_builder.free_states()
    index_builder.take_over(
        kernels.walk_region(memory, geometry, stop, index_builder.start_bits(), states, False, anomalies)
    )
    broken = index_builder.end_offset
    proven = kernels.resynchronise(memory, geometry, broken, stop)
    with pytest.raises(ValueError, match="no chunk can lie"):
        index_builder.mark(broken - 16, proven, ChunkState.DAMAGED)
    with pytest.raises(ValueError, match="no chunk can lie"):
        index_builder.mark(broken + 8, proven, ChunkState.DAMAGED)
    index_builder.mark(broken, proven, ChunkState.DAMAGED)
    states = index_builder.free_states()
    index_builder.take_over(
        kernels.walk_region(memory, geometry, stop, index_builder.start_bits(), states, False, anomalies, proven)
    )
    with pytest.raises(ValueError, match="still open"):
        index_builder.finish()
    index_builder.close_region()
    index = index_builder.finish()
    header, chunk_bytes = kernels.unpack_chunks(index, 0, 0, index.word_count(0))
    assert header.tolist() == [chunk.header_address for chunk in segment.chunks]
    assert int(chunk_bytes.sum()) == len(memory)
    assert index.state[5] == ChunkState.DAMAGED
    assert walk_segment(kernels, builder.heap, segment).outcome.chunk_count == 5
