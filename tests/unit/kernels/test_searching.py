"""Heap structures found without pointers: empty bins, mmapped chunks, pieces of the main arena."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import pytest

from coreheap.kernels import ChunkRuns, MmappedChunks, StopReason, reference
from tests.heap_builder import (
    MACHINE_32A16,
    MACHINE_64,
    MACHINES,
    HeapBuilder,
    ImageMemory,
    Machine,
    Mix,
    bin_header,
    write_malloc_state,
    write_mmapped_chunk,
)
from tests.unit.kernels.support import geometry_of, state_offsets

PAGE = 4096
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


# Arenas


@each_machine
@pytest.mark.parametrize("shift", [0, 1, 3, 8])
def test_empty_bins_and_ring_pointers_are_found(kernels: ModuleType, machine: Machine, shift: int) -> None:
    memory = ImageMemory()
    base = 0x7000_0000
    block = memory.add(base, 1 << 14)
    block[:] = random.Random(1).randbytes(len(block))
    state = base + 0x1230
    offsets = state_offsets(machine)
    write_malloc_state(memory, machine, state, offsets, bins={}, fastbins={}, values={"next": state})
    view = memoryview(bytes(block))[shift:]
    deltas = np.array([offsets["next"], offsets["next"] + 8], np.uint64)
    found = kernels.find_arena_candidates(view, base + shift, machine.word_bytes, deltas)
    first = bin_header(machine, state, offsets, 1) + 2 * machine.word_bytes
    assert found.self_pairs.tolist() == [first + number * 2 * machine.word_bytes for number in range(127)]
    # Bins point backwards too: those whose distance is asked for would be hits, none here is.
    assert found.next_hits.tolist() == [state + offsets["next"]]
    assert not found.truncated
    assert found.self_pairs.dtype == np.uint64

    few = kernels.find_arena_candidates(view, base + shift, machine.word_bytes, deltas, 5)
    assert few.truncated
    assert few.self_pairs.tolist() == found.self_pairs.tolist()[:5]
    assert few.next_hits.tolist() == found.next_hits.tolist()


@each_machine
def test_arena_search_on_odd_inputs(kernels: ModuleType, machine: Machine) -> None:
    none = np.empty(0, np.uint64)
    for size in range(3 * machine.word_bytes):
        found = kernels.find_arena_candidates(bytes(size), 0x1001, machine.word_bytes, none)
        assert len(found.self_pairs) == len(found.next_hits) == 0
    with pytest.raises(ValueError, match="no field that far"):
        kernels.find_arena_candidates(bytes(64), 0, machine.word_bytes, np.array([1 << 16], np.uint64))
    with pytest.raises(ValueError, match="4 or 8 bytes"):
        kernels.find_arena_candidates(bytes(64), 0, 2, none)
    for start in (-1, 1 << 63, 1 << 64):
        with pytest.raises(ValueError, match="no process has memory"):
            kernels.find_arena_candidates(bytes(64), start, machine.word_bytes, none)


@each_machine
def test_objects_of_programs_are_no_arenas(kernels: ModuleType, machine: Machine) -> None:
    """An object that points back to its slab, at the distance of next, and the head of a list that is empty."""
    word, base = machine.word_bytes, 0x7000_0000
    next_offset = state_offsets(machine)["next"]
    memory = ImageMemory()
    memory.add(base, 1 << 14)[:] = random.Random(2).randbytes(1 << 14)
    place, last_bin = base + next_offset, base + next_offset - 16 - 2 * word
    memory.put(place, base, word)
    for number in (100, 103, 107):
        pair = base + 0x2000 + number * word
        for at in (pair, pair + word):
            memory.put(at, pair - 2 * word, word)

    def found() -> tuple[list[int], list[int]]:
        deltas = np.array([next_offset], np.uint64)
        result = kernels.find_arena_candidates(bytes(memory.blocks[base]), base, word, deltas)
        return result.self_pairs.tolist(), result.next_hits.tolist()

    assert found() == ([], [])
    # An arena that was never used has zeros there, any other its last bin, which no chunk gets into.
    for value, hits in ((0, [place]), (last_bin - 2 * word, [place]), (last_bin, [])):
        for at in (last_bin, last_bin + word):
            memory.put(at, value, word)
        assert found() == ([], hits)
    memory.put(last_bin, 0, word)
    assert found() == ([], [])
    second = base + 0x2000 + 105 * word
    for at in (second, second + word):
        memory.put(at, second - 2 * word, word)
    assert found() == ([base + 0x2000 + number * word for number in (103, 105, 107)], [])


@each_machine
def test_next_counts_where_the_memory_before_it_is_missing(kernels: ModuleType, machine: Machine) -> None:
    word, base, next_offset = machine.word_bytes, 0x7000_0000, state_offsets(machine)["next"]
    block = bytearray(random.Random(3).randbytes(1 << 13))
    block[next_offset : next_offset + word] = base.to_bytes(word, "little")
    deltas = np.array([next_offset], np.uint64)
    for cut, hits in ((next_offset - 16 - 2 * word, []), (next_offset - 16 - word, [base + next_offset])):
        found = kernels.find_arena_candidates(bytes(block[cut:]), base + cut, word, deltas)
        assert found.next_hits.tolist() == hits


@each_machine
@pytest.mark.parametrize("block_words", [16, 17, 64])
def test_blocks_of_the_reference_do_not_show(
    machine: Machine, block_words: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = ImageMemory()
    base = 0x7000_0000
    block = memory.add(base, 1 << 13)
    offsets = state_offsets(machine)
    for state in (base + 0x230, base + 0x1230):
        write_malloc_state(memory, machine, state, offsets, bins={}, fastbins={}, values={"next": state})
    arguments = (bytes(block), base, machine.word_bytes, np.array([offsets["next"]], np.uint64))
    whole = reference.find_arena_candidates(*arguments)
    assert (len(whole.self_pairs), len(whole.next_hits)) == (254, 2)
    monkeypatch.setattr("coreheap.kernels.reference.searching._BLOCK_WORDS", block_words)
    parts = reference.find_arena_candidates(*arguments)
    assert parts.self_pairs.tolist() == whole.self_pairs.tolist()
    assert parts.next_hits.tolist() == whole.next_hits.tolist()


# Mmapped chunks


def rows_of(table: MmappedChunks) -> list[tuple[int, int, int, int]]:
    columns = (table.header_address, table.mapping_start, table.mapping_bytes, table.chunk_bytes)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def trailers(machine: Machine) -> tuple[int, int]:
    """Bytes behind an mmapped chunk before glibc 2.43, and since."""
    return 0, 2 * machine.word_bytes


@each_machine
@pytest.mark.parametrize("new_kind", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mmapped_chunks_back_to_back(kernels: ModuleType, machine: Machine, new_kind: bool, seed: int) -> None:
    """One mapping of the core with many chunks, plain and by memalign, between zeros and other data."""
    rng = random.Random(seed)
    trailer = trailers(machine)[new_kind]
    memory = ImageMemory()
    base = 0x6000_0000
    block = memory.add(base, 200 * PAGE)
    expected = []
    page = 0
    while page < 180:
        pages = rng.choice([1, 2, 3, 8])
        start = base + page * PAGE
        kind = rng.choice(["plain", "memalign", "zeros", "noise"])
        if kind in ("plain", "memalign"):
            mapping = pages * PAGE
            write_mmapped_chunk(memory, machine, start, mapping, trailer=trailer)
            chunk = None
            if kind == "memalign":
                # Where memalign puts a payload: at a multiple of its alignment behind the plain one.
                plain = start + machine.phase + machine.header_bytes
                alignment = rng.choice([2 * machine.alignment, 64, 256, 2048, 4096, 8192])
                lead = plain + -plain % alignment - machine.header_bytes - start
                if lead - machine.phase < machine.minimum:
                    lead += alignment
                if lead + machine.minimum + trailer + 64 < mapping:
                    huge = new_kind and rng.random() < 0.5
                    chunk = write_mmapped_chunk(memory, machine, start, mapping, lead=lead, trailer=trailer, huge=huge)
            if chunk is None:
                chunk = write_mmapped_chunk(memory, machine, start, mapping, trailer=trailer)
            expected.append((chunk.header_address, start, mapping, chunk.chunk_bytes))
        elif kind == "noise":
            memory.write(start, rng.randbytes(pages * PAGE))
        page += pages
    found = kernels.find_mmapped_chunks(bytes(block), base, geometry_of(machine), PAGE, trailer)
    assert rows_of(found) == expected
    assert not found.truncated
    everything = kernels.find_mmapped_chunks(bytes(block), base, geometry_of(machine), PAGE, trailer, True)
    assert set(expected) <= set(rows_of(everything))
    assert len(everything) >= len(expected)
    few = kernels.find_mmapped_chunks(bytes(block), base, geometry_of(machine), PAGE, trailer, capacity=2)
    assert few.truncated
    assert rows_of(few) == expected[:2]


@pytest.mark.parametrize(
    ("machine", "mapping_bytes", "lead", "trailer", "size_word", "prev_size"),
    [
        # The examples measured in the fact sheet, section 4.1.
        (MACHINE_64, 0x101000, 0, 0, 0x101002, 0),
        (MACHINE_64, 0x101000, 0, 16, 0x100FF2, 0),
        (MACHINE_32A16, 0x101000, 8, 0, 0x100FFA, 8),
        (MACHINE_32A16, 0x101000, 8, 8, 0x100FF2, 8),
        (MACHINE_64, 0x111000, 0x7FF0, 0, 0x109012, 0x7FF0),
        (MACHINE_64, 0x111000, 0xAFF0, 16, 0x106002, 0xAFF0),
    ],
)
def test_measured_headers(
    kernels: ModuleType,
    machine: Machine,
    mapping_bytes: int,
    lead: int,
    trailer: int,
    size_word: int,
    prev_size: int,
) -> None:
    block = bytearray(mapping_bytes)
    word = machine.word_bytes
    block[lead : lead + word] = prev_size.to_bytes(word, "little")
    block[lead + word : lead + 2 * word] = size_word.to_bytes(word, "little")
    found = kernels.find_mmapped_chunks(block, 0x4000_0000, geometry_of(machine), PAGE, trailer)
    assert rows_of(found) == [(0x4000_0000 + lead, 0x4000_0000, mapping_bytes, size_word & ~7)]


@each_machine
def test_mapping_must_lie_inside(kernels: ModuleType, machine: Machine) -> None:
    memory = ImageMemory()
    base = 0x6000_0000
    block = memory.add(base, 4 * PAGE)
    chunk = write_mmapped_chunk(memory, machine, base + PAGE, 2 * PAGE)
    geometry = geometry_of(machine)
    row = [(chunk.header_address, base + PAGE, 2 * PAGE, chunk.chunk_bytes)]
    assert rows_of(kernels.find_mmapped_chunks(block, base, geometry, PAGE, 0)) == row
    assert rows_of(kernels.find_mmapped_chunks(block[: 3 * PAGE], base, geometry, PAGE, 0)) == row
    assert rows_of(kernels.find_mmapped_chunks(block[: 3 * PAGE - 1], base, geometry, PAGE, 0)) == []
    # The rest of the mapping was not saved, but is known to exist.
    saved = block[: PAGE + 64]
    assert rows_of(kernels.find_mmapped_chunks(saved, base, geometry, PAGE, 0, region_bytes=3 * PAGE)) == row
    assert rows_of(kernels.find_mmapped_chunks(saved, base, geometry, PAGE, 0, region_bytes=3 * PAGE - 1)) == []
    # A start inside a page, and one behind the header.
    assert rows_of(kernels.find_mmapped_chunks(block[100:], base + 100, geometry, PAGE, 0)) == row
    assert rows_of(kernels.find_mmapped_chunks(block[PAGE + 1 :], base + PAGE + 1, geometry, PAGE, 0)) == []
    for other_flags in (0, 1, 3, 4, 5, 6, 7):
        memory.put(chunk.header_address + machine.word_bytes, chunk.chunk_bytes | other_flags, machine.word_bytes)
        assert rows_of(kernels.find_mmapped_chunks(block, base, geometry, PAGE, 0)) == []


@each_machine
@pytest.mark.parametrize("size", [0, 8, 1 << 62, (1 << 63) - 4096, (1 << 64) - 4096, (1 << 64) - 8, (1 << 32) - 4096])
@pytest.mark.parametrize("lead", [0, 4096, (1 << 64) - 4096, (1 << 63), (1 << 32) - 4096])
def test_hostile_mmapped_headers(kernels: ModuleType, machine: Machine, size: int, lead: int) -> None:
    memory = ImageMemory()
    base = 0x6000_0000
    block = memory.add(base, 4 * PAGE)
    header = base + PAGE + machine.phase
    memory.put(header, lead, machine.word_bytes)
    memory.put(header + machine.word_bytes, size & ~7 | 2, machine.word_bytes)
    for trailer in trailers(machine):
        for everything in (False, True):
            found = kernels.find_mmapped_chunks(block, base, geometry_of(machine), PAGE, trailer, everything)
            assert len(found) == 0


@each_machine
@pytest.mark.parametrize("pages", [2, 3, 1 << 19, 1 << 51, -1, -2, -(1 << 19), -(1 << 51)])
def test_mapping_must_begin_inside(kernels: ModuleType, machine: Machine, pages: int) -> None:
    """A sound size with a prev_size that leads out of the memory, by far or around the end of the numbers."""
    memory = ImageMemory()
    base = 0x6000_0000
    block = memory.add(base, 4 * PAGE)
    header = base + PAGE + machine.phase
    for trailer in trailers(machine):
        for lead, count in ((machine.phase + PAGE, 1), (machine.phase + pages * PAGE, 0)):
            memory.put(header, lead, machine.word_bytes)
            size = 2 * PAGE - machine.phase - trailer
            memory.put(header + machine.word_bytes, size | 2, machine.word_bytes)
            # A prev_size of -2**51 pages is that of 0 pages on 32 bit, and so on.
            plain = lead & machine.word_mask == machine.phase
            for everything in (False, True):
                found = kernels.find_mmapped_chunks(block, base, geometry_of(machine), PAGE, trailer, everything)
                assert len(found) == (1 if plain else count)


@each_machine
def test_deepest_header_of_a_mapping_counts(kernels: ModuleType, machine: Machine) -> None:
    memory = ImageMemory()
    base = 0x6000_0000
    block = memory.add(base, 16 * PAGE)
    for payload_offset in (machine.phase + machine.header_bytes, 256, 2048, 8 * PAGE):
        chunk = write_mmapped_chunk(memory, machine, base, 16 * PAGE, lead=payload_offset - machine.header_bytes)
    found = kernels.find_mmapped_chunks(block, base, geometry_of(machine), PAGE, 0)
    assert rows_of(found) == [(base + 8 * PAGE - machine.header_bytes, base, 16 * PAGE, chunk.chunk_bytes)]


@each_machine
def test_trailer_must_lie_inside(kernels: ModuleType, machine: Machine) -> None:
    memory = ImageMemory()
    base = 0x6000_0000
    block = memory.add(base, 4 * PAGE)
    write_mmapped_chunk(memory, machine, base + 3 * PAGE, PAGE)
    for trailer in (PAGE, PAGE - machine.phase):
        assert len(kernels.find_mmapped_chunks(block, base, geometry_of(machine), PAGE, trailer)) == 0
    assert len(kernels.find_mmapped_chunks(block, base, geometry_of(machine), PAGE, 0)) == 1


def test_mmapped_arguments(kernels: ModuleType) -> None:
    geometry = geometry_of(MACHINE_64)
    for page_bytes in (0, 512, 4097, -4096):
        with pytest.raises(ValueError, match="a page cannot"):
            kernels.find_mmapped_chunks(bytes(8), 0, geometry, page_bytes, 0)
    with pytest.raises(ValueError, match="trailer"):
        kernels.find_mmapped_chunks(bytes(8), 0, geometry, PAGE, -8)
    with pytest.raises(ValueError, match="region"):
        kernels.find_mmapped_chunks(bytes(8), 0, geometry, PAGE, 0, region_bytes=4)
    assert len(kernels.find_mmapped_chunks(b"", 0x1000, geometry, PAGE, 0)) == 0


# Pieces of the main arena


def runs_of(runs: ChunkRuns) -> list[tuple[int, int, StopReason, int]]:
    return [
        (start, end, StopReason(reason), count)
        for start, end, reason, count in zip(
            runs.start_offset.tolist(),
            runs.end_offset.tolist(),
            runs.stop_reason.tolist(),
            runs.chunk_count.tolist(),
            strict=True,
        )
    ]


@each_machine
@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_the_main_arena(kernels: ModuleType, machine: Machine, seed: int) -> None:
    """Fenced pieces, the piece with top, a thread's heap, and noise, in one stretch."""
    rng = random.Random(seed)
    builder = HeapBuilder(machine, rng)
    base = 0x7000_0000
    block = builder.memory.add(base, 64 * PAGE)
    block[:] = rng.randbytes(len(block))
    expected = []
    top_offset = -1
    for page, pages, ending, non_main in (
        (2, 4, "main_fence", False),
        (6, 3, "top", False),
        (12, 8, "heap_fence", True),
        (30, 1, "main_fence", False),
        (31, 7, "main_fence", False),
    ):
        piece = ImageMemory()
        builder.heap.memory = piece
        segment = builder.add_segment(
            base + page * PAGE, pages * PAGE, ending=ending, non_main=non_main, mix=Mix(largest=1024)
        )
        block[page * PAGE : (page + pages) * PAGE] = piece.blocks[base + page * PAGE]
        if segment.top_address is not None:
            top_offset = segment.top_address - base
        ordinary = [chunk for chunk in segment.chunks if chunk.state not in ("top", "fencepost")]
        if not non_main:
            reason = StopReason.TOP if ending == "top" else StopReason.FENCEPOSTS_MAIN
            # Top reaches to the end of the stretch that was given: nothing else says where it ends.
            expected.append((segment.start - base, segment.end - base, reason, len(ordinary)))
    content = bytes(block)
    found = kernels.find_chunk_runs(content, base, geometry_of(machine), PAGE, top_offset, 1)
    assert runs_of(found) == expected
    assert not found.truncated
    many = kernels.find_chunk_runs(content, base, geometry_of(machine), PAGE, top_offset, 1000)
    assert runs_of(many) == []
    few = kernels.find_chunk_runs(content, base, geometry_of(machine), PAGE, top_offset, 1, 2)
    assert few.truncated
    assert runs_of(few) == expected[:2]
    # From an odd start the same pieces are found, at other offsets.
    odd = kernels.find_chunk_runs(content[5:], base + 5, geometry_of(machine), PAGE, top_offset - 5, 1)
    assert runs_of(odd) == [(start - 5, end - 5, reason, count) for start, end, reason, count in expected]


@each_machine
def test_top_of_impossible_size_ends_its_piece_at_the_next_step(kernels: ModuleType, machine: Machine) -> None:
    builder = HeapBuilder(machine, random.Random(1))
    base = 0x7000_0000
    segment = builder.add_segment(base, 2 * PAGE, plan=[(machine.alignment * 4, "in_use")] * 3)
    assert segment.top_address is not None
    builder.memory.put(segment.top_address + machine.word_bytes, machine.word_mask, machine.word_bytes)
    builder.add_segment(base + 2 * PAGE, PAGE, ending="main_fence")
    content = builder.memory.read(base, 2 * PAGE) + builder.memory.read(base + 2 * PAGE, PAGE)
    found = kernels.find_chunk_runs(content, base, geometry_of(machine), PAGE, segment.top_address - base, 1)
    rows = runs_of(found)
    assert rows[0] == (machine.phase, PAGE, StopReason.TOP, 3)
    assert rows[1][:3] == (2 * PAGE + machine.phase, 3 * PAGE, StopReason.FENCEPOSTS_MAIN)


@each_machine
def test_a_run_that_is_too_short_does_not_hide_a_longer_one(kernels: ModuleType, machine: Machine) -> None:
    """Two chains share their last chunk; the one met first has too few chunks to count."""
    builder = HeapBuilder(machine, random.Random(1))
    granule = machine.alignment
    plan = [(2 * granule, "in_use"), *[(4 * granule, "in_use")] * 9]
    segment = builder.add_segment(0x7000_0000, PAGE, ending="main_fence", plan=plan)
    last = segment.chunks[9].header_address
    builder.memory.put(segment.start + machine.word_bytes, last - segment.start | 1, machine.word_bytes)
    content = builder.memory.read(0x7000_0000, PAGE)
    found = kernels.find_chunk_runs(content, 0x7000_0000, geometry_of(machine), granule, -1, 5)
    assert found.start_offset.tolist() == [segment.chunks[1].header_address - 0x7000_0000]
    assert found.chunk_count.tolist() == [9]


def test_run_arguments(kernels: ModuleType) -> None:
    geometry = geometry_of(MACHINE_64)
    for step in (0, 8, 24, -16):
        with pytest.raises(ValueError, match="no multiple"):
            kernels.find_chunk_runs(bytes(64), 0, geometry, step, -1, 1)
    for size in range(40):
        assert len(kernels.find_chunk_runs(bytes(size), 0x1003, geometry, 16, -1, 0)) == 0
