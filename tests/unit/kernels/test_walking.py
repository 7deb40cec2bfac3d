"""Walks over regions whose every chunk is known, sound and damaged."""

from __future__ import annotations

import mmap
import random
from types import ModuleType

import numpy as np
import pytest

from coreheap.kernels import StopReason, WalkAnomaly
from tests.heap_builder import (
    BINNED,
    ENDINGS,
    IN_USE,
    MACHINE_32A8,
    MACHINE_32A16,
    MACHINE_64,
    MACHINES,
    UNSORTED_BIN,
    BuiltHeap,
    HeapBuilder,
    Machine,
    fence_bytes,
)
from tests.unit.kernels.support import ENDING_REASONS, Walked, geometry_of, walk_segment, walked_state

BASE = 0x1000_0000
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
HUGE_SIZES = (0xFFFF_FFFF_FFFF_FFFF, 0x8000_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFF1, 0xFFFF_FFFF_FFFF_FFE1, 1 << 62)


def one_segment(
    machine: Machine,
    ending: str = "top",
    plan: list[tuple[int, str]] | None = None,
    *,
    seed: int = 1,
    non_main: bool = False,
    block_bytes: int = 1 << 15,
    fill: bool = True,
) -> BuiltHeap:
    """``fill``: up to the block's end; else the block is as long as the plan."""
    builder = HeapBuilder(machine, random.Random(seed))
    if plan is not None and not fill:
        block_bytes = machine.phase + sum(size for size, _ in plan)
    builder.add_segment(BASE, block_bytes, ending=ending, non_main=non_main, plan=plan)
    return builder.heap


def units(machine: Machine, *granules: int, kind: str = IN_USE) -> list[tuple[int, str]]:
    return [(granule * machine.alignment, kind) for granule in granules]


@each_machine
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("non_main", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_walk_finds_every_chunk(kernels: ModuleType, machine: Machine, ending: str, non_main: bool, seed: int) -> None:
    heap = one_segment(machine, ending, seed=seed, non_main=non_main)
    segment = heap.segments[0]
    walked = walk_segment(kernels, heap, segment)
    assert walked.offsets == [chunk.header_address - segment.start for chunk in segment.chunks]
    assert walked.state_list == [walked_state(chunk.state) for chunk in segment.chunks]
    assert walked.anomalies == []
    assert walked.outcome.stop_reason is ENDING_REASONS[ending]
    assert walked.outcome.end_offset == segment.end - segment.start
    assert walked.outcome.chunk_count == len(segment.chunks)


def test_both_fenceposts_share_a_granule_with_32_bit_words_and_16_byte_alignment(kernels: ModuleType) -> None:
    heap = one_segment(MACHINE_32A16, "heap_fence", units(MACHINE_32A16, 3))
    walked = walk_segment(kernels, heap, heap.segments[0])
    assert walked.state_list == [0, 7]
    assert walked.outcome.end_offset - walked.offsets[-1] == 24


def test_fenceposts_inside_a_region_leave_their_spare_bytes(kernels: ModuleType) -> None:
    """Behind a foreign sbrk the region goes on, and only the caller knows where the page ends."""
    heap = one_segment(MACHINE_32A16, "main_fence", units(MACHINE_32A16, 3))
    segment = heap.segments[0]
    memory = heap.segment_bytes(segment) + bytes(4096)
    walked = Walked(kernels, memory, geometry_of(MACHINE_32A16))
    assert walked.outcome.stop_reason is StopReason.FENCEPOSTS_MAIN
    assert walked.outcome.end_offset == segment.end - segment.start - 8


@each_machine
@pytest.mark.parametrize("kind", ["bytes", "memoryview", "array", "writable array", "mmap"])
def test_memory_may_be_unaligned_and_read_only(kernels: ModuleType, machine: Machine, kind: str) -> None:
    heap = one_segment(machine)
    segment = heap.segments[0]
    content = heap.segment_bytes(segment)
    shifted = b"\xa5" * 3 + content
    memory: object = {
        "bytes": content,
        "memoryview": memoryview(shifted)[3:],
        "array": np.frombuffer(shifted, np.uint8)[3:],
        "writable array": np.frombuffer(bytearray(shifted), np.uint8)[3:],
    }.get(kind)
    if kind == "mmap":
        memory = mmap.mmap(-1, len(content))
        memory[:] = content
    assert segment.top_address is not None
    walked = Walked(kernels, memory, geometry_of(machine), segment.top_address - segment.start)
    assert walked.outcome.chunk_count == len(segment.chunks)


@each_machine
def test_walk_can_be_resumed_at_any_chunk(kernels: ModuleType, machine: Machine) -> None:
    heap = one_segment(machine, block_bytes=1 << 13)
    segment = heap.segments[0]
    memory = heap.segment_bytes(segment)
    assert segment.top_address is not None
    stop = segment.top_address - segment.start
    whole = Walked(kernels, memory, geometry_of(machine), stop)
    for room in range(len(segment.chunks)):
        first = Walked(kernels, memory, geometry_of(machine), stop, room=room)
        assert first.outcome.stop_reason is StopReason.NO_ROOM
        assert first.outcome.chunk_count == room
        assert first.outcome.end_offset == whole.offsets[room]
        second = Walked(kernels, memory, geometry_of(machine), stop, first_offset=first.outcome.end_offset)
        assert first.state_list + second.state_list == whole.state_list
        assert first.offsets + second.offsets == whole.offsets
        assert second.anomalies == []


@each_machine
@pytest.mark.parametrize("ending", ENDINGS)
def test_unsaved_rest_cuts_the_walk(kernels: ModuleType, machine: Machine, ending: str) -> None:
    heap = one_segment(machine, ending, block_bytes=1 << 12)
    segment = heap.segments[0]
    memory = heap.segment_bytes(segment)
    stop = -1 if segment.top_address is None else segment.top_address - segment.start
    starts = [chunk.header_address - segment.start for chunk in segment.chunks]
    header = machine.header_bytes
    ordinary_end = len(memory) - fence_bytes(machine, ending)
    for saved in range(len(memory)):
        walked = Walked(kernels, memory[:saved], geometry_of(machine), stop, region_bytes=len(memory))
        readable = [start for start in starts if start + header <= saved]
        assert walked.offsets == starts[: len(walked.offsets)]
        if ending == "top" and stop + header <= saved:
            assert walked.outcome.stop_reason is StopReason.TOP
            assert walked.outcome.end_offset == len(memory)
        elif saved < ordinary_end + header:
            # The last chunk needs its successor's header, except one that ends the region.
            ends_region = ending == "open" and len(readable) == len(starts)
            assert walked.outcome.stop_reason is (StopReason.END if ends_region else StopReason.CUT)
            counted = len(readable) if ends_region else max(0, len(readable) - 1)
            assert walked.outcome.chunk_count == counted
            assert walked.outcome.end_offset == [*starts, len(memory)][counted]


@each_machine
@pytest.mark.parametrize("size_word", [0, 1, 2, 7, 8, 0x11, 0x19, *HUGE_SIZES], ids=hex)
def test_impossible_size_breaks_the_walk(kernels: ModuleType, machine: Machine, size_word: int) -> None:
    heap = one_segment(machine, plan=units(machine, 4, 6, 8, 10))
    segment = heap.segments[0]
    victim = segment.chunks[2]
    if machine is not MACHINE_64:
        size_word &= ~0x30  # 16 and 24 are sizes on 32 bit
    heap.memory.put(victim.header_address + machine.word_bytes, size_word | 1, machine.word_bytes)
    walked = walk_segment(kernels, heap, segment)
    assert walked.outcome.stop_reason is StopReason.BROKEN
    assert walked.outcome.end_offset == victim.header_address - segment.start
    assert walked.outcome.chunk_count == 2


@each_machine
def test_chunk_that_overlaps_top_is_broken(kernels: ModuleType, machine: Machine) -> None:
    heap = one_segment(machine, plan=units(machine, 4, 6))
    segment = heap.segments[0]
    last = segment.chunks[1]
    heap.memory.put(
        last.header_address + machine.word_bytes, last.chunk_bytes + machine.alignment | 1, machine.word_bytes
    )
    walked = walk_segment(kernels, heap, segment)
    assert walked.outcome.stop_reason is StopReason.BROKEN
    assert walked.outcome.end_offset == last.header_address - segment.start


@each_machine
@pytest.mark.parametrize("stop_offset", [-1, -16, 8, 1 << 15, (1 << 64) - 16, -(1 << 80), 1 << 80])
def test_impossible_top_is_no_top(kernels: ModuleType, machine: Machine, stop_offset: int) -> None:
    heap = one_segment(machine, "open", units(machine, 4, 6))
    if stop_offset == 8 and machine is MACHINE_32A8:
        stop_offset = 12
    walked = Walked(kernels, heap.segment_bytes(heap.segments[0]), geometry_of(machine), stop_offset)
    assert walked.outcome.stop_reason is StopReason.END
    assert walked.state_list == [0, 0]


@each_machine
@pytest.mark.parametrize("size", [0, 1, 8, *HUGE_SIZES], ids=hex)
def test_impossible_top_size_takes_the_rest(kernels: ModuleType, machine: Machine, size: int) -> None:
    heap = one_segment(machine, plan=units(machine, 4, 6))
    segment = heap.segments[0]
    assert segment.top_address is not None
    heap.memory.put(segment.top_address + machine.word_bytes, size & ~7 | 1, machine.word_bytes)
    walked = walk_segment(kernels, heap, segment)
    # 8 is two words on 32 bit: a top so small ends where it says, all others at the region's end.
    end = segment.top_address + 8 if size == 8 and machine.word_bytes == 4 else segment.end
    assert walked.outcome.stop_reason is StopReason.TOP
    assert walked.outcome.end_offset == end - segment.start
    assert walked.anomalies == [(WalkAnomaly.TOP_SIZE_MISMATCH, segment.top_address - segment.start)]


@each_machine
def test_anomalies_are_reported_and_stepped_over(kernels: ModuleType, machine: Machine) -> None:
    plan = [(4, IN_USE), (6, UNSORTED_BIN), (8, IN_USE), (10, UNSORTED_BIN), (12, IN_USE), (14, IN_USE), (16, IN_USE)]
    heap = one_segment(machine, plan=[(granules * machine.alignment, kind) for granules, kind in plan])
    segment = heap.segments[0]
    word = machine.word_bytes
    chunks = segment.chunks
    offsets = [chunk.header_address - segment.start for chunk in chunks]

    def change_flags(number: int, *, set_bits: int = 0, clear_bits: int = 0) -> None:
        place = chunks[number].header_address + word
        heap.memory.put(place, heap.memory.get(place, word) & ~clear_bits | set_bits, word)

    change_flags(0, clear_bits=1)
    heap.memory.put(chunks[2].header_address, 5 * machine.alignment, word)  # prev_size of chunk 1
    heap.memory.put(chunks[3].header_address, chunks[2].chunk_bytes, word)
    change_flags(3, clear_bits=1)  # chunk 2 becomes free, between two free ones
    change_flags(4, set_bits=2)
    change_flags(5, set_bits=4)
    change_flags(7, clear_bits=1)
    heap.memory.put(chunks[7].header_address, chunks[6].chunk_bytes, word)
    walked = walk_segment(kernels, heap, segment)
    assert walked.anomalies == [
        (WalkAnomaly.FIRST_CHUNK_PREVIOUS_FREE, 0),
        (WalkAnomaly.PREV_SIZE_MISMATCH, offsets[1]),
        (WalkAnomaly.ADJACENT_FREE, offsets[2]),
        (WalkAnomaly.ADJACENT_FREE, offsets[3]),
        (WalkAnomaly.MMAPPED_FLAG_INSIDE, offsets[4]),
        (WalkAnomaly.ARENA_FLAG_MISMATCH, offsets[5]),
        (WalkAnomaly.FREE_BEFORE_TOP, offsets[6]),
    ]
    assert walked.state_list == [0, 9, 9, 9, 0, 0, 9, 6]
    few = Walked(kernels, heap.segment_bytes(segment), geometry_of(machine), offsets[-1], anomaly_rows=2)
    assert few.outcome == walked.outcome
    assert few.anomalies == walked.anomalies[:2]
    none = Walked(kernels, heap.segment_bytes(segment), geometry_of(machine), offsets[-1], anomaly_rows=0)
    assert none.outcome == walked.outcome


@each_machine
def test_wrong_arena_flag_of_a_non_main_heap(kernels: ModuleType, machine: Machine) -> None:
    heap = one_segment(machine, "heap_fence", units(machine, 4, 6, 8), non_main=True)
    segment = heap.segments[0]
    walked = Walked(kernels, heap.segment_bytes(segment), geometry_of(machine), non_main=False)
    assert [code for code, _ in walked.anomalies] == [WalkAnomaly.ARENA_FLAG_MISMATCH] * 3


@each_machine
def test_marker_at_the_end_without_fencepost(kernels: ModuleType, machine: Machine) -> None:
    heap = one_segment(machine, "open", units(machine, 4, 6), non_main=True)
    segment = heap.segments[0]
    memory = bytearray(heap.segment_bytes(segment))
    spare = machine.alignment - machine.header_bytes
    marker = bytearray(machine.header_bytes + spare)
    marker[machine.word_bytes] = 1
    walked = Walked(kernels, bytes(memory + marker), geometry_of(machine), non_main=True)
    if (len(memory)) % machine.alignment:
        assert walked.outcome.stop_reason is StopReason.BROKEN
        return
    assert walked.outcome.stop_reason is StopReason.FENCEPOSTS_HEAP
    assert walked.anomalies == [(WalkAnomaly.MARKER_WITHOUT_FENCEPOST, len(memory))]
    assert walked.state_list == [0, 0, 7]
    assert walked.outcome.end_offset == len(memory) + len(marker)
    # Further inside, a size word of 1 is no end.
    inside = Walked(kernels, bytes(memory + marker) + bytes(64), geometry_of(machine), non_main=True)
    assert inside.outcome.stop_reason is StopReason.BROKEN


@pytest.mark.parametrize("machine", [MACHINE_64, MACHINE_32A8], ids=lambda machine: machine.name)
@pytest.mark.parametrize("arena_flag", [0, 4])
def test_smallest_chunk_before_the_end_marker(kernels: ModuleType, machine: Machine, arena_flag: int) -> None:
    """The fencepost that a small rest of top makes has the size of a small chunk; only the flag tells them apart.

    With 32-bit words and 16-byte alignment there is no chunk of that size.
    """
    size = machine.header_bytes + machine.alignment
    heap = one_segment(machine, "open", [(4 * machine.alignment, IN_USE), (size, IN_USE)], non_main=True, fill=False)
    segment = heap.segments[0]
    last = segment.chunks[1].header_address
    heap.memory.put(last + machine.word_bytes, size | 1 | arena_flag, machine.word_bytes)
    marker = bytearray(machine.alignment)
    marker[machine.word_bytes] = 1
    memory = heap.segment_bytes(segment) + marker
    walked = Walked(kernels, memory, geometry_of(machine), non_main=True)
    chain = kernels.chain_reaches(memory, geometry_of(machine), 0, -1, 100)
    assert walked.outcome.stop_reason is chain.stop_reason is StopReason.FENCEPOSTS_HEAP
    assert walked.outcome.end_offset == chain.end_offset == len(memory)
    if arena_flag:
        assert walked.state_list == [0, 0, 7]
        assert [code for code, _ in walked.anomalies] == [WalkAnomaly.MARKER_WITHOUT_FENCEPOST]
        assert chain.chunk_count == 2
    else:
        assert walked.state_list == [0, 7, 7]
        assert walked.anomalies == []
        assert chain.chunk_count == 1


@each_machine
def test_arguments_that_contradict_each_other(kernels: ModuleType, machine: Machine) -> None:
    geometry = geometry_of(machine)
    lookup = np.zeros((1, 2), np.uint64)
    states = np.zeros(4, np.uint8)
    anomalies = np.zeros((4, 2), np.int64)
    with pytest.raises(ValueError, match="too few rows"):
        kernels.walk_region(bytes(64 * machine.alignment + 1), geometry, -1, lookup, states, False, anomalies)
    for first_offset in (-machine.alignment, 1, 1 << 70):
        with pytest.raises(ValueError, match="no chunk header"):
            kernels.walk_region(bytes(64), geometry, -1, lookup, states, False, anomalies, first_offset)
    with pytest.raises(ValueError, match="region of 32"):
        kernels.walk_region(bytes(64), geometry, -1, lookup, states, False, anomalies, 0, 32)
    assert kernels.walk_region(b"", geometry, -1, lookup, states, False, anomalies).stop_reason is StopReason.END
    beyond = kernels.walk_region(bytes(64), geometry, -1, lookup, states, False, anomalies, 128)
    assert (beyond.stop_reason, beyond.chunk_count) == (StopReason.CUT, 0)


# Chains and resynchronising


@each_machine
@pytest.mark.parametrize("ending", ENDINGS)
def test_chain_reaches_the_end_from_every_chunk(kernels: ModuleType, machine: Machine, ending: str) -> None:
    heap = one_segment(machine, ending, block_bytes=1 << 13)
    segment = heap.segments[0]
    memory = heap.segment_bytes(segment)
    stop = -1 if segment.top_address is None else segment.top_address - segment.start
    ordinary = [chunk for chunk in segment.chunks if chunk.state not in ("top", "fencepost")]
    for number, chunk in enumerate(ordinary):
        chain = kernels.chain_reaches(memory, geometry_of(machine), chunk.header_address - segment.start, stop, 1 << 40)
        assert chain.stop_reason is ENDING_REASONS[ending]
        assert chain.end_offset == len(memory)
        assert chain.chunk_count == len(ordinary) - number
    limited = kernels.chain_reaches(memory, geometry_of(machine), 0, stop, 3)
    assert limited.stop_reason is StopReason.LIMIT
    assert limited.chunk_count == 3
    assert limited.end_offset == ordinary[3].header_address - segment.start


@each_machine
def test_chain_is_stricter_than_a_walk(kernels: ModuleType, machine: Machine) -> None:
    plan = [(4, IN_USE), (6, UNSORTED_BIN), (8, IN_USE)]
    heap = one_segment(machine, plan=[(granules * machine.alignment, kind) for granules, kind in plan])
    segment = heap.segments[0]
    third = segment.chunks[2].header_address
    heap.memory.put(third, 5 * machine.alignment, machine.word_bytes)
    assert segment.top_address is not None
    stop = segment.top_address - segment.start
    chain = kernels.chain_reaches(heap.segment_bytes(segment), geometry_of(machine), 0, stop, 100)
    assert chain.stop_reason is StopReason.BROKEN
    assert chain.end_offset == segment.chunks[1].header_address - segment.start
    assert walk_segment(kernels, heap, segment).outcome.stop_reason is StopReason.TOP


@each_machine
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("seed", range(4))
def test_resynchronise_finds_the_chunk_behind_a_broken_one(
    kernels: ModuleType, machine: Machine, ending: str, seed: int
) -> None:
    heap = one_segment(machine, ending, seed=seed)
    segment = heap.segments[0]
    stop = -1 if segment.top_address is None else segment.top_address - segment.start
    ordinary = [number for number, chunk in enumerate(segment.chunks) if chunk.state not in ("top", "fencepost")]
    # The last chunk's successor is top or a fencepost; in an open segment it has none.
    victims = ordinary[1:-1] if ending == "open" else ordinary[1:]
    victim = victims[-1] if seed == 0 else random.Random(seed).choice(victims)
    memory = bytearray(heap.segment_bytes(segment))
    offset = segment.chunks[victim].header_address - segment.start
    memory[offset + machine.word_bytes : offset + 2 * machine.word_bytes] = b"\xff" * machine.word_bytes
    walked = Walked(kernels, memory, geometry_of(machine), stop, non_main=segment.non_main)
    assert walked.outcome.stop_reason is StopReason.BROKEN
    assert walked.outcome.end_offset == offset
    found = kernels.resynchronise(memory, geometry_of(machine), offset, stop)
    assert found == segment.chunks[victim + 1].header_address - segment.start


@each_machine
def test_resynchronise_proves_by_number_of_chunks(kernels: ModuleType, machine: Machine) -> None:
    """Without an end in sight so many consistent chunks are proof; one less is not."""
    geometry = geometry_of(machine)
    for chunks in (63, 64, 65, 130):
        segment_heap = one_segment(machine, "open", units(machine, *[4] * chunks, 5))
        segment = segment_heap.segments[0]
        last = segment.chunks[-1].header_address - segment.start
        # All ones: no chunk can start here, but the chunk before counts as one in use.
        memory = b"\xff" * machine.alignment + segment_heap.segment_bytes(segment)[:last] + b"\xff" * 256
        for proof_chunks in (63, 64, 65, 129, 131):
            found = kernels.resynchronise(memory, geometry, 0, -1, proof_chunks=proof_chunks)
            assert found == (machine.alignment if chunks >= proof_chunks else -1)


@each_machine
def test_chains_that_share_their_end_add_up(kernels: ModuleType, machine: Machine) -> None:
    """A failed chain's chunks count for whoever meets it later, and so on."""
    granule = machine.alignment
    run = [4 * granule] * 70
    heap = one_segment(machine, "open", [(16 * granule, IN_USE), *[(size, IN_USE) for size in run]], fill=False)
    segment = heap.segments[0]
    memory = bytearray(heap.segment_bytes(segment) + b"\xff" * 256)
    starts = [chunk.header_address - segment.start for chunk in segment.chunks[1:]]
    word = machine.word_bytes
    memory[: 16 * granule] = b"\xff" * (16 * granule)
    for stray, target in ((2 * granule, starts[40]), (4 * granule, starts[38]), (6 * granule, starts[35])):
        memory[stray + word : stray + 2 * word] = (target - stray | 1).to_bytes(word, "little")
    assert kernels.resynchronise(memory, geometry_of(machine), 0, -1, proof_chunks=70) == starts[0]
    assert kernels.resynchronise(memory, geometry_of(machine), 0, -1, proof_chunks=36) == 6 * granule
    assert kernels.resynchronise(memory, geometry_of(machine), 0, -1, proof_chunks=71) == -1


@each_machine
def test_resynchronise_gives_up_without_proof(kernels: ModuleType, machine: Machine) -> None:
    memory = random.Random(1).randbytes(1 << 14)
    assert kernels.resynchronise(bytes(1 << 14), geometry_of(machine), 0, -1) == -1
    assert kernels.resynchronise(memory, geometry_of(machine), 0, -1) == -1
    assert kernels.resynchronise(b"", geometry_of(machine), 0, -1) == -1
    with pytest.raises(ValueError, match="cannot be asked for"):
        kernels.resynchronise(memory, geometry_of(machine), 0, -1, -1, 251)


def test_resynchronise_does_not_take_forever(compiled: ModuleType) -> None:
    """Every granule starts a chain that fails in the end: without notes this would be quadratic."""
    geometry = geometry_of(MACHINE_64)
    words = np.zeros((1 << 20, 2), np.uint64)
    words[:, 1] = 0x21  # chunks of two granules: two interleaved chains, both broken every 120 granules
    words[::120, 1] = words[1::120, 1] = HUGE_SIZES[0]
    words[-2:, 1] = HUGE_SIZES[0]
    assert compiled.resynchronise(words.tobytes(), geometry, 0, -1) == -1


@each_machine
def test_free_chunks_are_told_by_their_successor(kernels: ModuleType, machine: Machine) -> None:
    heap = one_segment(machine, seed=5)
    segment = heap.segments[0]
    walked = walk_segment(kernels, heap, segment)
    free = [number for number, chunk in enumerate(segment.chunks) if chunk.state in BINNED]
    assert [number for number, state in enumerate(walked.state_list) if state == 9] == free
    assert free
