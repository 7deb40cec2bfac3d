"""The compiled kernels give what the reference gives: on sound heaps, damaged heaps, and on arbitrary bytes."""

from __future__ import annotations

import dataclasses
import random
from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreheap.kernels import ChunkIndexBuilder, ChunkState, ListKind, MemoryMap, StopReason, reference
from tests.heap_builder import ENDINGS, MACHINES, HeapBuilder, Machine, Mix
from tests.unit.kernels.support import Walked, geometry_of, index_of, memory_map_of, random_heap

machines = st.sampled_from(MACHINES)
settings.register_profile("kernels", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
compare = settings(settings.get_profile("kernels"), max_examples=150)

SMALL_WORDS = [0, 1, 2, 4, 7, 8, 9, 0x10, 0x11, 0x12, 0x15, 0x18, 0x19, 0x20, 0x21, 0x25, 0x30, 0x31, 0x41, 0x50, 0x81]
LARGE_WORDS = [
    0x1001, 0x1002, 0xFF2, 0x2002, 0xFFF1, 0xFFFF_FFF1, 0xFFFF_FFFF, 0x8000_0001, 0x7FFF_FFF1, 0x7FFF_FFFF_FFFF_FFF1,
    0x8000_0000_0000_0001, 0xFFFF_FFFF_FFFF_FFF1, 0xFFFF_FFFF_FFFF_FFE1, 0xFFFF_FFFF_FFFF_FFFF,
]  # fmt: skip
words = (
    st.sampled_from(SMALL_WORDS * 3 + LARGE_WORDS)
    | st.integers(0, 63).map(lambda bit: 1 << bit)
    | st.integers(0, 2**64 - 1)
)


def plain(value: object) -> object:
    """A result as something that can be compared and printed."""
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def same(compiled: ModuleType, name: str, *arguments: Any, **options: Any) -> Any:
    """Calls one kernel in both implementations, checks that results agree, and returns the reference's."""
    wanted = getattr(reference, name)(*arguments, **options)
    found = getattr(compiled, name)(*arguments, **options)
    assert plain(found) == plain(wanted), name
    assert type(found) is type(wanted)
    return wanted


def low_entropy(machine: Machine, values: list[int]) -> bytes:
    return b"".join((value & machine.word_mask).to_bytes(machine.word_bytes, "little") for value in values)


def damaged(content: bytes, machine: Machine, damage: list[tuple[int, int]]) -> bytes:
    """Some words overwritten; positions count in words and wrap."""
    result = bytearray(content)
    word = machine.word_bytes
    for position, value in damage:
        at = position % max(1, len(result) // word) * word
        result[at : at + word] = (value & machine.word_mask).to_bytes(word, "little")
    return bytes(result)


damages = st.lists(st.tuples(st.integers(0, 1 << 12), words), max_size=12)


def check_all_readers(
    compiled: ModuleType,
    machine: Machine,
    memory: bytes,
    stop_offset: int,
    non_main: bool,
    extra_bytes: int,
    first: int,
) -> None:
    """All kernels that read plain memory."""
    geometry = geometry_of(machine)
    region_bytes = len(memory) + extra_bytes if extra_bytes else -1
    first_offset = first * machine.alignment
    for offset in {0, first_offset}:
        walks = [
            Walked(
                kernels,
                memory,
                geometry,
                stop_offset,
                non_main=non_main,
                first_offset=offset,
                region_bytes=region_bytes,
                anomaly_rows=3,
            )
            for kernels in (reference, compiled)
        ]
        assert walks[1].everything() == walks[0].everything()
        check_walk(walks[0], offset, len(memory) + extra_bytes)
        for limit in (0, 1, 5, 1 << 40):
            same(compiled, "chain_reaches", memory, geometry, offset, stop_offset, limit, region_bytes)
        for proof_chunks in (1, 3, 64):
            same(compiled, "resynchronise", memory, geometry, offset, stop_offset, region_bytes, proof_chunks)
    start = 0x5000_0000 + first * machine.word_bytes
    for step_bytes, minimum_chunks in ((machine.alignment, 0), (machine.alignment, 4), (256, 1), (4096, 1)):
        same(compiled, "find_chunk_runs", memory, start, geometry, step_bytes, stop_offset, minimum_chunks)
        same(compiled, "find_chunk_runs", memory, start, geometry, step_bytes, stop_offset, minimum_chunks, 2)
    for trailer in (0, 2 * machine.word_bytes):
        for everything in (False, True):
            for size in (-1, len(memory) + extra_bytes):
                same(
                    compiled,
                    "find_mmapped_chunks",
                    memory,
                    start,
                    geometry,
                    1024,
                    trailer,
                    everything,
                    size,
                )
    for deltas in ((), (0,), (1, 16, 24, 65535)):
        same(compiled, "find_arena_candidates", memory, start, machine.word_bytes, np.array(deltas, np.uint64))
    same(compiled, "find_arena_candidates", memory, first, machine.word_bytes, np.array([0, 8, 16], np.uint64), 3)


def check_walk(walked: Walked, first_offset: int, region_bytes: int) -> None:
    """What holds for every walk, over whatever bytes: chunks tile, and end inside the region."""
    outcome = walked.outcome
    assert len(walked.offsets) == outcome.chunk_count == len(walked.state_list)
    assert first_offset <= outcome.end_offset <= max(region_bytes, first_offset)
    if walked.offsets:
        assert walked.offsets[0] == first_offset
        assert walked.offsets[-1] < outcome.end_offset
    else:
        assert outcome.end_offset == first_offset


@compare
@given(
    machine=machines,
    values=st.lists(words, max_size=400),
    stop=st.integers(-2, 100) | st.sampled_from([1 << 62, 1 << 64, -(1 << 64)]),
    non_main=st.booleans(),
    extra_bytes=st.sampled_from([0, 0, 1, 8, 16, 64, 1 << 40]),
    first=st.integers(0, 30),
)
def test_readers_agree_on_arbitrary_words(
    compiled: ModuleType,
    machine: Machine,
    values: list[int],
    stop: int,
    non_main: bool,
    extra_bytes: int,
    first: int,
) -> None:
    memory = low_entropy(machine, values)
    lookup_bytes = 1 << 16  # a lookup for 2**40 bytes would be made for nothing
    extra_bytes = min(extra_bytes, lookup_bytes)
    check_all_readers(compiled, machine, memory, stop * machine.alignment, non_main, extra_bytes, first)


@compare
@given(memory=st.binary(max_size=2000), machine=machines, stop=st.integers(-1, 2000), first=st.integers(0, 8))
def test_readers_agree_on_arbitrary_bytes(
    compiled: ModuleType, memory: bytes, machine: Machine, stop: int, first: int
) -> None:
    check_all_readers(compiled, machine, memory, stop, False, 0, first)


@compare
@given(
    machine=machines,
    seed=st.integers(0, 1 << 30),
    ending=st.sampled_from(ENDINGS),
    non_main=st.booleans(),
    damage=damages,
    cut=st.sampled_from([0, 0, 0, 1, 8, 100]),
    first=st.integers(0, 8),
)
def test_readers_agree_on_damaged_heaps(
    compiled: ModuleType,
    machine: Machine,
    seed: int,
    ending: str,
    non_main: bool,
    damage: list[tuple[int, int]],
    cut: int,
    first: int,
) -> None:
    builder = HeapBuilder(machine, random.Random(seed))
    segment = builder.add_segment(0x5000_0000, 8192, ending=ending, non_main=non_main, mix=Mix(largest=1024))
    content = builder.heap.segment_bytes(segment)
    stop = -1 if segment.top_address is None else segment.top_address - segment.start
    memory = damaged(content, machine, damage)[: len(content) - cut]
    check_all_readers(compiled, machine, memory, stop, non_main, cut, first)


@settings(settings.get_profile("kernels"), max_examples=60)
@given(
    machine=machines,
    seed=st.integers(0, 1 << 30),
    safe_linking=st.booleans(),
    damage=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1 << 12), words), max_size=12),
    heads=st.lists(st.integers(0, (1 << 64) - 1), max_size=3),
    other_offsets=st.lists(st.sampled_from([0, 3, 1 << 63, (1 << 64) - 8]), max_size=2),
)
def test_overlay_and_columns_agree(
    compiled: ModuleType,
    machine: Machine,
    seed: int,
    safe_linking: bool,
    damage: list[tuple[int, int, int]],
    heads: list[int],
    other_offsets: list[int],
) -> None:
    """The walk sees the sound heap, the lists a damaged one: any pointer may lead anywhere."""
    heap = random_heap(machine, seed, segment_bytes=4096, safe_linking=safe_linking)
    indexes = [index_of(kernels, heap) for kernels in (reference, compiled)]
    blocks = [block for _, block in heap.memory.runs()]
    for block_number, position, value in damage:
        block = blocks[block_number % len(blocks)]
        block[:] = damaged(bytes(block), machine, [(position, value)])
    memory_map = memory_map_of(heap)
    offsets = memory_map.run_file_offset.copy()
    offsets[: len(other_offsets)] = other_offsets
    memory_map = MemoryMap(memory_map.file, memory_map.run_start, memory_map.run_end, offsets)
    for kind in (ListKind.SINGLY_PAYLOAD, ListKind.DOUBLY, ListKind.SINGLY_HEADER):
        states = {ListKind.SINGLY_PAYLOAD: ("tcache",), ListKind.SINGLY_HEADER: ("fastbin",)}.get(
            kind, ("unsorted_bin", "small_bin", "large_bin")
        )
        rows = [row for row in heap.lists if row.state in states]
        all_heads = [row.head for row in rows] + heads
        arguments = (
            np.array(all_heads, np.uint64),
            np.array([ChunkState[row.state.upper()] for row in rows] + [1] * len(heads), np.uint8),
            np.array([0] * len(all_heads), np.uint64),
            np.array([256] * len(all_heads), np.uint64),
            np.array([row.sentinel for row in rows] + heads[1:] + heads[:1], np.uint64),
            np.array([len(row.chunks) if seed % 2 else -1 for row in rows] + [2] * len(heads), np.int64),
            kind,
            safe_linking,
            geometry_of(machine),
            4,
            np.array([0x1234 + seed % 2] * len(all_heads), np.uint64),
            machine.small_limit if seed % 3 else 0,
        )
        outcomes = [
            kernels.overlay_free_lists(memory_map, index, *arguments)
            for kernels, index in zip((reference, compiled), indexes, strict=True)
        ]
        assert plain(outcomes[1]) == plain(outcomes[0])
        assert indexes[1].state.tolist() == indexes[0].state.tolist()
        listed = [0] * 16
        for count, state in zip(outcomes[0].count.tolist(), arguments[1].tolist(), strict=True):
            listed[state] += count
        for state in set(arguments[1].tolist()):
            assert listed[state] <= indexes[0].state.tolist().count(state)
    check_columns(compiled, indexes[1], random.Random(seed))


def check_columns(compiled: ModuleType, index: Any, rng: random.Random) -> None:
    """All kernels over an index, and that no byte is lost."""
    for region in range(-1, index.region_count):
        _, totals = same(compiled, "state_totals", index, region)
        _, histogram = same(compiled, "size_histogram", index, region, 0xFFFF)
        same(compiled, "size_histogram", index, region, rng.getrandbits(70))
        whole = int(totals.sum())
        assert int(histogram.sum()) == whole
        if region >= 0:
            assert whole == int(index.region_end[region]) - int(index.region_start[region])
            last = rng.randint(0, index.word_count(region))
            same(compiled, "unpack_chunks", index, region, rng.randint(0, last), last)
    chunks = np.array([rng.randrange(index.chunk_count) for _ in range(20)], np.int64)
    headers, sizes = same(compiled, "chunk_extents", index, chunks)
    assert same(compiled, "find_chunks", index, headers, True).tolist() == chunks.tolist()
    assert same(compiled, "find_chunks", index, headers + sizes - np.uint64(1), False).tolist() == chunks.tolist()
    near = headers + np.array([rng.randint(-64, 64) for _ in headers], np.int64).view(np.uint64)
    for exact in (False, True):
        same(compiled, "find_chunks", index, near, exact)


@compare
@given(machine=machines, seed=st.integers(0, 1 << 30), damage=damages)
def test_a_damaged_heap_loses_no_byte(
    compiled: ModuleType, machine: Machine, seed: int, damage: list[tuple[int, int]]
) -> None:
    """Walk, resynchronise, mark, walk on: whatever the damage, the region's chunks add up to what was walked."""
    builder = HeapBuilder(machine, random.Random(seed))
    segment = builder.add_segment(0x5000_0000, 8192, mix=Mix(largest=1024))
    memory = damaged(builder.heap.segment_bytes(segment), machine, damage)
    geometry = geometry_of(machine)
    assert segment.top_address is not None
    stop = segment.top_address - segment.start
    collected = ChunkIndexBuilder(geometry, len(memory), 1)
    collected.open_region(segment.start, len(memory))
    anomalies = np.zeros((4, 2), np.int64)
    offset = 0
    while True:
        outcome = compiled.walk_region(
            memory, geometry, stop, collected.start_bits(), collected.free_states(), False, anomalies, offset
        )
        collected.take_over(outcome)
        if outcome.stop_reason is not StopReason.BROKEN:
            break
        broken = outcome.end_offset
        offset = compiled.resynchronise(memory, geometry, broken, stop)
        assert offset > broken  # top itself is always proven
        collected.mark(broken, offset, ChunkState.DAMAGED)
    collected.close_region()
    index = collected.finish()
    for kernels in (reference, compiled):
        counts, totals = kernels.state_totals(index, 0)
        assert int(totals.sum()) == outcome.end_offset
        assert int(counts.sum()) == index.chunk_count


@compare
@given(rows=st.lists(st.integers(0, (1 << 64) - 1), max_size=40))
def test_ranks_agree(compiled: ModuleType, rows: list[int]) -> None:
    lookups = [np.array([(row, row ^ 0xABC) for row in rows], np.uint64).reshape(len(rows), 2) for _ in range(2)]
    assert reference.fill_ranks(lookups[0]) == compiled.fill_ranks(lookups[1]) == sum(row.bit_count() for row in rows)
    assert lookups[0].tolist() == lookups[1].tolist()
