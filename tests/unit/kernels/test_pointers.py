"""Which words lead to which chunks, against brute force over built heaps."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreheap.kernels import CHUNK_MASK, INTERIOR, ChunkIndex, ChunkState, Edges, MemoryMap, reference
from tests.heap_builder import (
    FENCEPOST,
    IN_USE,
    MACHINE_32A8,
    MACHINE_32A16,
    MACHINE_64,
    MACHINES,
    UNSORTED_BIN,
    BuiltHeap,
    HeapBuilder,
    Machine,
    Mix,
)
from tests.unit.kernels.support import index_of, memory_map_of, random_heap

each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
compare = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
ALL_BITS = (1 << 64) - 1
BASE = 0x0804_8000


def clear(heap: BuiltHeap) -> None:
    """Zeros in all payloads, so that words point only where a test says."""
    for chunk in heap.all_chunks():
        if chunk.state != FENCEPOST:
            start, end = payload_of(heap, chunk.header_address)
            for block_start, block in heap.memory.runs():
                if block_start <= start < block_start + len(block):
                    end = min(end, block_start + len(block))
                    block[start - block_start : end - block_start] = bytes(end - start)


def payload_of(heap: BuiltHeap, header: int) -> tuple[int, int]:
    """[start, end) of what a chunk's owner may write; a mmapped chunk reaches to the end of its mapping."""
    for chunk, (start, length) in zip(heap.mmapped, heap.mmapped_mappings, strict=True):
        if chunk.header_address == header:
            return header + heap.machine.header_bytes, start + length
    for segment in heap.segments:
        for chunk in segment.chunks:
            if chunk.header_address == header:
                end = min(header + chunk.chunk_bytes, segment.end)
                return header + heap.machine.header_bytes, end + heap.machine.word_bytes
    raise KeyError(header)


class Truth:
    """What leads where, by definition: every word is compared with every chunk."""

    def __init__(self, heap: BuiltHeap, index: ChunkIndex, memory: MemoryMap, mask: int = ALL_BITS) -> None:
        self.machine, self.memory, self.mask = heap.machine, memory, mask
        headers = [chunk.header_address for chunk in heap.all_chunks()]
        self.payloads = [payload_of(heap, header) for header in headers]
        # A place is where a word points to, less a header: between this chunk's header and the next one's.
        # Behind a mapping another one begins: the word itself has to lie in it.
        less = (heap.machine.word_bytes, heap.machine.header_bytes)
        ends = [end - less[number >= index.region_chunks] for number, (_, end) in enumerate(self.payloads)]
        self.extents = list(zip(headers, ends, strict=True))
        self.in_use = [state == ChunkState.IN_USE for state in index.state.tolist()]

    def word_at(self, address: int) -> int | None:
        """None where no run of the memory has all of its bytes."""
        word = self.machine.word_bytes
        columns = (self.memory.run_start, self.memory.run_end, self.memory.run_file_offset)
        for start, end, offset in zip(*(column.tolist() for column in columns), strict=True):
            at = offset + address - start
            if start <= address and address + word <= end and at + word <= len(self.memory.file):
                return int.from_bytes(self.memory.file[at : at + word].tobytes(), "little")
        return None

    def target_of(self, value: int) -> int | None:
        place = (value & self.mask & self.machine.word_mask) - self.machine.header_bytes
        for number, (start, end) in enumerate(self.extents):
            if start <= place < end:
                return number if place == start else number | INTERIOR
        return None

    def targets_in(self, start: int, end: int) -> list[tuple[int, int]]:
        """(address of the word, target) of each aligned word of [start, end)."""
        word = self.machine.word_bytes
        found = []
        for address in range(-(-start // word) * word, end - word + 1, word):
            value = self.word_at(address)
            target = None if value is None else self.target_of(value)
            if target is not None:
                found.append((address, target))
        return found

    def edges(self) -> list[list[int]]:
        rows = []
        for number, (start, end) in enumerate(self.payloads):
            found = self.targets_in(start, end) if self.in_use[number] else []
            rows.append([target for _, target in found if target & CHUNK_MASK != number])
        return rows


def rows_of(edges: Edges) -> list[list[int]]:
    assert edges.target.dtype == np.uint32
    assert int(edges.first[0]) == 0
    assert int(edges.first[-1]) == len(edges.target)
    return [edges.of(chunk).tolist() for chunk in range(edges.chunk_count)]


def heap_of(machine: Machine, plan: list[tuple[int, str]], *, ending: str = "top", pages: int = 2) -> BuiltHeap:
    """One region with chunks of so many granules and states, payloads cleared."""
    builder = HeapBuilder(machine, random.Random(0))
    sizes = [(granules * machine.alignment, state) for granules, state in plan]
    builder.add_segment(BASE, pages * 4096, ending=ending, plan=sizes)
    clear(builder.heap)
    return builder.heap


def edges_of(kernels: ModuleType, heap: BuiltHeap, mask: int = ALL_BITS) -> list[list[int]]:
    """Collected edges, which are those of the truth."""
    index, memory = index_of(kernels, heap), memory_map_of(heap)
    rows = rows_of(kernels.collect_edges(index, memory, mask))
    assert rows == Truth(heap, index, memory, mask).edges()
    return rows


def put(heap: BuiltHeap, address: int, value: int) -> None:
    heap.memory.put(address, value, heap.machine.word_bytes)


# Edges


@each_machine
def test_exact_and_interior_references(kernels: ModuleType, machine: Machine) -> None:
    heap = heap_of(machine, [(4, IN_USE)] * 4)
    payloads = [chunk.payload_address(machine) for chunk in heap.segments[0].chunks]
    word = machine.word_bytes
    put(heap, payloads[0], payloads[1])
    put(heap, payloads[0] + word, payloads[2] + 1)
    put(heap, payloads[1], payloads[3] + machine.alignment)
    put(heap, payloads[1] + word, payloads[1] + word)  # within itself
    put(heap, payloads[2], payloads[0])
    rows = edges_of(kernels, heap)
    assert rows[:4] == [[1, 2 | INTERIOR], [3 | INTERIOR], [0], []]


@each_machine
def test_borders_of_payloads(kernels: ModuleType, machine: Machine) -> None:
    """A chunk's last word is the next one's prev_size; the address behind its payload still counts as its own."""
    heap = heap_of(machine, [(4, IN_USE)] * 3)
    chunks = heap.segments[0].chunks
    payloads = [chunk.payload_address(machine) for chunk in chunks]
    word = machine.word_bytes
    put(heap, chunks[1].header_address, payloads[2])  # the tail word of chunk 0
    put(heap, payloads[1], chunks[1].header_address)  # chunk 0's last word
    put(heap, payloads[1] + word, payloads[2] - 1)  # the last byte before chunk 2's payload: behind chunk 1's own
    put(heap, payloads[2], chunks[0].header_address)  # no chunk has its first header
    put(heap, payloads[2] + word, chunks[2].header_address + word)  # behind the end of chunk 1
    rows = edges_of(kernels, heap)
    assert rows[:3] == [[2], [0 | INTERIOR], [1 | INTERIOR]]


@each_machine
def test_last_chunk_of_a_region(kernels: ModuleType, machine: Machine) -> None:
    """Its last word lies behind the region's end, and so does one past its end."""
    builder = HeapBuilder(machine, random.Random(0))
    block = builder.memory.add(BASE, 8192)
    segment = builder.add_segment(BASE, 4096, ending="open", plan=[(4 * machine.alignment, IN_USE)] * 2)
    clear(builder.heap)
    heap, first = builder.heap, segment.chunks[0].payload_address(machine)
    last = segment.chunks[1].payload_address(machine)
    put(heap, segment.end, first)
    put(heap, segment.end + machine.word_bytes, first)  # not the chunk's any more
    put(heap, first, segment.end + machine.word_bytes)
    put(heap, first + machine.word_bytes, segment.end + machine.header_bytes - 1)
    put(heap, first + 2 * machine.word_bytes, segment.end + machine.header_bytes)
    assert edges_of(kernels, heap)[:2] == [[1 | INTERIOR, 1 | INTERIOR], [0]]
    assert last < segment.end
    # Where the memory ends with the region, there is no last word.
    whole = memory_map_of(heap)
    cut = replace(whole, run_end=np.array([segment.end], np.uint64))
    index = index_of(kernels, heap)
    assert rows_of(kernels.collect_edges(index, cut, ALL_BITS))[1] == []
    assert len(block) == 8192


@each_machine
def test_only_chunks_in_use_are_read(kernels: ModuleType, machine: Machine) -> None:
    heap = heap_of(machine, [(6, IN_USE), (6, UNSORTED_BIN), (6, IN_USE), (200, UNSORTED_BIN), (6, IN_USE)], pages=3)
    payloads = [chunk.payload_address(machine) for chunk in heap.segments[0].chunks]
    for payload in payloads:
        put(heap, payload, payloads[0])
    middle = payloads[3] + 90 * machine.alignment
    put(heap, middle, payloads[0])
    put(heap, payloads[0] + machine.word_bytes, payloads[1])
    rows = edges_of(kernels, heap)
    assert rows[:6] == [[1], [], [0], [], [0], []]
    index = index_of(kernels, heap)
    index.state[:] = ChunkState.DAMAGED
    assert kernels.collect_edges(index, memory_map_of(heap), ALL_BITS).target.tolist() == []


@each_machine
def test_size_words_are_no_references(kernels: ModuleType, machine: Machine) -> None:
    """Wherever a header lies among the words of a row, its size word is nobody's, even when it looks like an address."""
    heap = heap_of(machine, [(3, IN_USE)] * 60 + [(1 + machine.minimum // machine.alignment, IN_USE)] * 40, pages=3)
    index, memory = index_of(kernels, heap), None
    chunks = heap.segments[0].chunks
    for chunk in chunks:
        put(heap, chunk.header_address + machine.word_bytes, chunks[0].payload_address(machine))
    memory = memory_map_of(heap)
    edges = kernels.collect_edges(index, memory, ALL_BITS)
    assert edges.target.tolist() == []
    assert rows_of(edges) == Truth(heap, index, memory).edges()


@each_machine
@pytest.mark.parametrize("granules", [3, 63, 64, 65, 127, 128, 129, 200])
def test_chunks_full_of_pointers(kernels: ModuleType, machine: Machine, granules: int) -> None:
    """More pointers at once than wait anywhere, over the borders of lookup rows."""
    heap = heap_of(machine, [(granules, IN_USE), (5, IN_USE), (granules, IN_USE), (3, IN_USE)], pages=4)
    rng = random.Random(granules)
    payloads = [chunk.payload_address(machine) for chunk in heap.segments[0].chunks[:4]]
    for number in range(4):
        start, end = payload_of(heap, payloads[number] - machine.header_bytes)
        for address in range(start, end, machine.word_bytes):
            put(heap, address, rng.choice(payloads) + rng.choice([0, 0, 1, machine.alignment]))
    assert sum(map(len, edges_of(kernels, heap))) > granules


@each_machine
def test_mmapped_chunks(kernels: ModuleType, machine: Machine) -> None:
    builder = HeapBuilder(machine, random.Random(0))
    segment = builder.add_segment(BASE, 4096, plan=[(4 * machine.alignment, IN_USE)] * 2)
    first = builder.add_mmapped(BASE + 0x10000, 0x3000)
    aligned = builder.add_mmapped(BASE + 0x13000, 0x4000, lead=0x1000 - machine.header_bytes)
    heap = builder.heap
    clear(heap)
    small = segment.chunks[0].payload_address(machine)
    word, number = machine.word_bytes, index_of(kernels, heap).region_chunks
    one, two = first.payload_address(machine), aligned.payload_address(machine)
    put(heap, small, one)
    put(heap, small + word, two)
    put(heap, small + 2 * word, two - 1)  # before its payload: behind the end of the first one? no, in its own lead
    put(heap, segment.chunks[1].payload_address(machine), one + 0x1800)
    put(heap, segment.chunks[1].payload_address(machine) + word, BASE + 0x13000 - 1)
    put(heap, segment.chunks[1].payload_address(machine) + 2 * word, BASE + 0x13000)  # behind it: nobody's
    put(heap, one, small)
    put(heap, BASE + 0x13000 - word, two + 8)  # the last word of the first mapping
    put(heap, one + word, one + word)  # itself
    put(heap, BASE + 0x13000 + 0x800, small)  # before the aligned chunk: nobody's
    put(heap, BASE + 0x17000 - word, one)
    rows = edges_of(kernels, heap)
    assert rows[0] == [number, number + 1]
    assert rows[1] == [number | INTERIOR, number | INTERIOR]
    assert rows[number:] == [[0, (number + 1) | INTERIOR], [number]]


def test_address_mask(kernels: ModuleType) -> None:
    """The top byte of an address is the program's on aarch64."""
    heap = heap_of(MACHINE_64, [(4, IN_USE)] * 2)
    first, second = (chunk.payload_address(MACHINE_64) for chunk in heap.segments[0].chunks[:2])
    put(heap, first, second | 0xB4 << 56)
    put(heap, first + 8, second | 0x34 << 56)
    put(heap, first + 16, second | 1 << 48)
    assert edges_of(kernels, heap)[0] == []
    assert edges_of(kernels, heap, (1 << 56) - 1)[0] == [1, 1]


@pytest.mark.parametrize("machine", [MACHINE_32A8, MACHINE_32A16], ids=lambda machine: machine.name)
def test_heap_at_the_end_of_32_bit(kernels: ModuleType, machine: Machine) -> None:
    builder = HeapBuilder(machine, random.Random(0))
    start = 0xFFFF_E000
    builder.add_segment(start, 0x1000, plan=[(4 * machine.alignment, IN_USE)] * 2)
    builder.add_mmapped(start + 0x1000, 0x1000)
    clear(builder.heap)
    first, second = (chunk.payload_address(machine) for chunk in builder.heap.segments[0].chunks[:2])
    for number, value in enumerate((second, 0xFFFF_FFFF, 0, 4, first - 0x1000)):
        put(builder.heap, first + 4 * number, value)
    rows = edges_of(kernels, builder.heap)
    assert rows[0] == [1, (len(rows) - 1) | INTERIOR]


@each_machine
def test_wide_and_empty(kernels: ModuleType, machine: Machine) -> None:
    heap = heap_of(machine, [(4, IN_USE)] * 2)
    first, second = (chunk.payload_address(machine) for chunk in heap.segments[0].chunks[:2])
    put(heap, first, second)
    index, memory = index_of(kernels, heap), memory_map_of(heap)
    narrow, wide = (kernels.collect_edges(index, memory, ALL_BITS, wide) for wide in (False, True))
    assert narrow.first.dtype == np.uint32
    assert wide.first.dtype == np.uint64
    assert narrow.first.tolist() == wide.first.tolist() == [0] + [1] * index.chunk_count
    nothing = np.empty(0, np.uint64)
    unsaved = MemoryMap(np.empty(0, np.uint8), nothing, nothing, nothing)
    assert kernels.collect_edges(index, unsaved, ALL_BITS).target.tolist() == []
    nobody = BuiltHeap(machine, heap.memory, True, [], [], [])
    empty = kernels.collect_edges(index_of(kernels, nobody), memory, ALL_BITS)
    assert (empty.first.tolist(), empty.target.tolist()) == ([0], [])


@each_machine
def test_words_that_no_run_has_whole(kernels: ModuleType, machine: Machine) -> None:
    heap = heap_of(machine, [(8, IN_USE), (8, IN_USE)])
    start, second = (chunk.payload_address(machine) for chunk in heap.segments[0].chunks[:2])
    word = machine.word_bytes
    for number in range(8):
        put(heap, start + number * word, second)
    whole = memory_map_of(heap)
    index = index_of(kernels, heap)
    offset = int(whole.run_file_offset[0]) - BASE
    # The border of two runs goes through word 2; words 4 and half of 5 are missing; the file ends inside word 7.
    borders = [
        (BASE, start + 2 * word + 1),
        (start + 2 * word + 1, start + 4 * word),
        (start + 5 * word + 2, BASE + 8192),
    ]
    low, high = (np.array(column, np.uint64) for column in zip(*borders, strict=True))
    memory = MemoryMap(whole.file[: start + offset + 7 * word + 3], low, high, low + np.uint64(offset & ALL_BITS))
    rows = rows_of(kernels.collect_edges(index, memory, ALL_BITS))
    assert rows[0] == [1] * 4  # words 0, 1, 3, 6
    assert rows == Truth(heap, index, memory).edges()


def pieces(heap: BuiltHeap, rng: random.Random) -> MemoryMap:
    """The heap's memory in pieces that end anywhere, some of them missing, empty, or beyond the file."""
    file = bytearray(b"\xff" * rng.randrange(9))
    rows = []
    for start, block in heap.memory.runs():
        cuts = sorted(rng.randrange(len(block) + 1) for _ in range(rng.choice([0, 0, 1, 5])))
        for low, high in zip([0, *cuts], [*cuts, len(block)], strict=True):
            if rng.random() < 0.15:
                continue
            offset = rng.choice([len(file)] * 15 + [1 << 63, ALL_BITS - 7])
            rows.append((start + low, start + high, offset))
            file += block[low:high] + b"\xee" * rng.randrange(9)
    columns = np.array(rows, np.uint64).reshape(len(rows), 3)
    content = np.frombuffer(bytes(file), np.uint8)
    if rng.random() < 0.2:
        content = content[: rng.randrange(len(content) + 1)]
    return MemoryMap(content, *(np.ascontiguousarray(columns[:, column]) for column in range(3)))


def random_pointers(heap: BuiltHeap, rng: random.Random, count: int) -> None:
    """Pointers to every kind of place, from every kind of place."""
    machine = heap.machine
    payloads = [payload_of(heap, chunk.header_address) for chunk in heap.all_chunks() if chunk.state != FENCEPOST]
    near = (0, 0, 0, 0, 1, -1, machine.word_bytes, -machine.word_bytes, -2 * machine.word_bytes, machine.alignment)
    for _ in range(count):
        start, end = rng.choice(payloads)
        target = rng.choice(rng.choice(payloads)) + rng.choice(near)
        if rng.random() < 0.2:
            low, high = rng.choice(payloads)
            target = rng.randrange(low, max(high, low + 1))
        if rng.random() < 0.1:
            target |= 0x5A << 56
        words = max((end - start) // machine.word_bytes, 1)
        address = start + rng.choice([0, 1, words - 1, rng.randrange(words)]) * machine.word_bytes
        if heap.memory.holds(address, machine.word_bytes):
            put(heap, address, target)


def same(compiled: ModuleType, name: str, *arguments: Any) -> Any:
    """What both implementations say."""
    wanted, found = (getattr(kernels, name)(*arguments) for kernels in (reference, compiled))
    assert type(wanted) is type(found)
    for field in wanted.__dataclass_fields__:
        one, other = getattr(wanted, field), getattr(found, field)
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()
    return wanted


heaps = given(
    machine=st.sampled_from(MACHINES),
    seed=st.integers(0, 1 << 30),
    mask=st.sampled_from([ALL_BITS, (1 << 56) - 1, 0xFFFF_FFFF]),
)


@compare
@heaps
def test_random_heaps(compiled: ModuleType, machine: Machine, seed: int, mask: int) -> None:
    """Both implementations against the definition: edges, then root references of random ranges."""
    rng = random.Random(seed)
    heap = random_heap(machine, seed, segment_bytes=rng.choice([2048, 4096]), mmapped=0)
    if rng.random() < 0.5:
        far = max(segment.end for segment in heap.segments) + 0x10_0000 & ~0xFFF
        builder = HeapBuilder(machine, rng)
        builder.heap = heap
        builder.add_mmapped(far, 0x1000)
        builder.add_mmapped(far + 0x1000, 0x2000, lead=0x1000 - machine.header_bytes)
    random_pointers(heap, rng, rng.choice([20, 300]))
    index, memory = index_of(reference, heap), pieces(heap, rng)
    truth = Truth(heap, index, memory, mask)
    assert rows_of(same(compiled, "collect_edges", index, memory, mask)) == truth.edges()
    assert rows_of(same(compiled, "collect_edges", index, memory, mask, True)) == truth.edges()
    # Wherever a second thread begins, the mmapped chunks included
    for second_from in {0, 1, rng.randrange(index.chunk_count), index.region_chunks, index.chunk_count - 1}:
        for wide in (False, True):
            edges = compiled.collect_edges(index, memory, mask, wide, second_from)
            assert rows_of(edges) == truth.edges(), second_from
    check_roots(compiled, index, memory, truth, rng)


def check_roots(compiled: ModuleType, index: ChunkIndex, memory: MemoryMap, truth: Truth, rng: random.Random) -> None:
    words = (index.chunk_count + 63) // 64
    bits = {name: [np.zeros(words, np.uint64) for _ in range(2)] for name in ("exact", "interior")}
    seen: dict[str, set[int]] = {"exact": set(), "interior": set()}
    starts = memory.run_start.tolist() or [0]
    for _ in range(2):
        ranges = []
        for _ in range(rng.randrange(4)):
            low = rng.choice(starts) + rng.randrange(-40, 2000)
            ranges.append((max(low, 0), max(low + rng.randrange(-10, 3000), 0)))
        start, end = (np.array([row[column] for row in ranges], np.uint64) for column in range(2))
        expected = []
        for low, high in ranges:
            for address, target in truth.targets_in(low, high):
                chunk = target & CHUNK_MASK
                kind = "interior" if target & INTERIOR else "exact"
                if chunk not in seen["exact"] and chunk not in seen[kind]:
                    seen[kind].add(chunk)
                    expected.append((address, target))
        for number, kernels in enumerate((reference, compiled)):
            found = kernels.find_root_references(
                index, memory, start, end, truth.mask, bits["exact"][number], bits["interior"][number]
            )
            rows = list(zip(found.holder_address.tolist(), found.target.tolist(), strict=True))
            assert rows == expected, kernels.__name__
            assert found.holder_address.dtype == np.uint64
            assert found.target.dtype == np.uint32
            for kind, chunks in seen.items():
                assert positions(bits[kind][number]) == sorted(chunks)


def positions(bits: npt.NDArray[np.uint64]) -> list[int]:
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


# Roots


def bitmaps(index: ChunkIndex, count: int = 2) -> list[npt.NDArray[np.uint64]]:
    return [np.zeros((index.chunk_count + 63) // 64, np.uint64) for _ in range(count)]


@each_machine
def test_each_chunk_is_told_once(kernels: ModuleType, machine: Machine) -> None:
    heap = heap_of(machine, [(4, IN_USE)] * 3)
    word, data = machine.word_bytes, 0x0700_0000
    heap.memory.add(data, 4096)
    one, two, three = (chunk.payload_address(machine) for chunk in heap.segments[0].chunks[:3])
    for number, value in enumerate((one + 1, one + 2, one, one, one + 1, two, two + 1, three + 1, 7)):
        put(heap, data + number * word, value)
    index, memory = index_of(kernels, heap), memory_map_of(heap)
    exact, interior = bitmaps(index)

    def found(*ranges: tuple[int, int]) -> list[tuple[int, int]]:
        start, end = (np.array([row[column] for row in ranges], np.uint64) for column in range(2))
        result = kernels.find_root_references(index, memory, start, end, ALL_BITS, exact, interior)
        return [((holder - data) // word, target) for holder, target in zip(
            result.holder_address.tolist(), result.target.tolist(), strict=True)]  # fmt: skip

    # From inside word 1: it begins with word 2. A range that ends inside a word does not have it.
    assert found((data + word + 1, data + 3 * word + word - 1)) == [(2, 0)]
    assert found((data, data + word), (data, data + 9 * word)) == [(5, 1), (7, 2 | INTERIOR)]
    assert positions(exact) == [0, 1]
    assert positions(interior) == [2]
    put(heap, data, three)
    memory = memory_map_of(heap)
    assert found((data, data + 9 * word)) == [(0, 2)]
    assert found((data, data + 9 * word)) == []


def test_hostile_ranges(kernels: ModuleType) -> None:
    heap = heap_of(MACHINE_64, [(4, IN_USE)] * 2)
    index, memory = index_of(kernels, heap), memory_map_of(heap)

    def search(start: list[int], end: list[int], *bits: npt.NDArray[np.uint64]) -> int:
        arrays = (np.array(column, np.uint64) for column in (start, end))
        return len(kernels.find_root_references(index, memory, *arrays, ALL_BITS, *(bits or bitmaps(index))).target)

    assert search([ALL_BITS, ALL_BITS - 7, 5], [1 << 63, 100, 4]) == 0
    assert search([0], [1 << 63]) == 0
    with pytest.raises(ValueError, match="no process has memory"):
        search([0], [(1 << 63) + 1])
    with pytest.raises(ValueError, match="differ in length"):
        search([0], [])
    with pytest.raises(ValueError, match="one bit for each"):
        search([0], [8], np.zeros(0, np.uint64), bitmaps(index)[0])
    with pytest.raises(ValueError, match="one bit for each"):
        search([0], [8], bitmaps(index)[0], np.zeros(9, np.uint64))


def test_wrong_ranks_do_not_crash(kernels: ModuleType) -> None:
    """Nobody writes them; but columns can be written, and no number in them may lead out of an array."""
    heap = heap_of(MACHINE_64, [(4, IN_USE)] * 40)
    payloads = [chunk.payload_address(MACHINE_64) for chunk in heap.segments[0].chunks[:40]]
    for payload in payloads:
        put(heap, payload, payloads[39])
    memory = memory_map_of(heap)
    for rank in (1000, 0xFFFF_FFFF, 50):
        index = index_of(kernels, heap)
        index.lookup[1:, 1] = rank
        for name, arguments in (
            ("collect_edges", ()),
            ("mark_reachable_directly", (np.array([0], np.uint32), *bitmaps(index), False)),
        ):
            with pytest.raises((IndexError, ValueError)):
                getattr(kernels, name)(index, memory, ALL_BITS, *arguments)
    for column, value in (("block_first_region", 7), ("region_first_word", 9000), ("region_first_word", -1)):
        index = index_of(kernels, heap)
        setattr(index, column, np.full_like(getattr(index, column), value))
        if "compiled" in kernels.__name__:
            with pytest.raises(ValueError, match="region"):
                kernels.collect_edges(index, memory, ALL_BITS)


# Marking without references


@compare
@heaps
def test_marking_directly_is_marking_by_references(
    compiled: ModuleType, machine: Machine, seed: int, mask: int
) -> None:
    rng = random.Random(seed)
    builder = HeapBuilder(machine, rng)
    for number in range(rng.randint(1, 3)):
        builder.add_segment(BASE + number * 0x8000, 4096, ending="main_fence", mix=Mix(largest=rng.choice([256, 3000])))
    builder.add_mmapped(BASE + 0x10_0000, 0x1000)
    builder.add_mmapped(BASE + 0x10_1000, 0x2000, lead=0x1000 - machine.header_bytes)
    random_pointers(builder.heap, rng, rng.choice([30, 300]))
    index, memory = index_of(reference, builder.heap), pieces(builder.heap, rng)
    index.state[[rng.randrange(index.chunk_count) for _ in range(5)]] = ChunkState.SMALL_BIN
    seeds = np.array([rng.randrange(index.chunk_count) | rng.choice([0, INTERIOR]) for _ in range(4)], np.uint32)
    before = np.zeros(index.chunk_count, np.bool_)
    before[[rng.randrange(index.chunk_count) for _ in range(rng.choice([0, 3]))]] = True
    edges = reference.collect_edges(index, memory, mask)
    for follow_interior in (False, True):
        wanted = packed(before), bitmaps(index)[0]
        count = reference.mark_reachable(edges, seeds, wanted[0], wanted[1], follow_interior)
        for kernels in (reference, compiled):
            for most_waiting in (1, 2, 7, 1 << 20):
                bits = [packed(before), bitmaps(index)[0]]
                found = kernels.mark_reachable_directly(
                    index, memory, mask, seeds, *bits, follow_interior, most_waiting
                )
                assert found == count, (kernels.__name__, most_waiting)
                assert [column.tolist() for column in bits] == [column.tolist() for column in wanted]


def packed(column: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint64]:
    bits = np.zeros((len(column) + 63) // 64 * 64, np.bool_)
    bits[: len(column)] = column
    return np.packbits(bits, bitorder="little").view(np.uint64)


@each_machine
@pytest.mark.parametrize("most_waiting", [1, 3, 1000])
def test_a_large_chunk_is_found_from_far_inside(kernels: ModuleType, machine: Machine, most_waiting: int) -> None:
    """Pointers that lead many lookup rows behind the headers of their chunks, in a chain against the addresses."""
    heap = heap_of(machine, [(300, IN_USE)] * 12, pages=20)
    payloads = [chunk.payload_address(machine) for chunk in heap.segments[0].chunks[:12]]
    for number, (earlier, later) in enumerate(itertools.pairwise(payloads)):
        put(heap, later + number * 20 * machine.word_bytes, earlier + 290 * machine.alignment)
    index, memory = index_of(kernels, heap), memory_map_of(heap)
    marked, interior = bitmaps(index)
    arguments = (np.array([11], np.uint32), marked, interior)
    assert kernels.mark_reachable_directly(index, memory, ALL_BITS, *arguments, True, most_waiting) == 12
    assert positions(marked) == list(range(12))
    marked[:] = 0
    assert kernels.mark_reachable_directly(index, memory, ALL_BITS, *arguments, False, most_waiting) == 1
    assert positions(interior) == [10]


class Enormous(ChunkIndex):
    """An index that says it has one chunk more than references can tell apart."""

    __slots__ = ()

    @property
    def chunk_count(self) -> int:
        return CHUNK_MASK + 1


def test_too_many_chunks(kernels: ModuleType) -> None:
    heap = heap_of(MACHINE_64, [(4, IN_USE)] * 2)
    index, memory = index_of(kernels, heap), memory_map_of(heap)
    bits = bitmaps(index)
    index.__class__ = Enormous
    none, no_chunks = np.empty(0, np.uint64), np.empty(0, np.uint32)
    with pytest.raises(OverflowError, match="more than references can tell apart"):
        kernels.collect_edges(index, memory, ALL_BITS)
    with pytest.raises(OverflowError, match="more than references can tell apart"):
        kernels.find_root_references(index, memory, none, none, ALL_BITS, *bits)
    with pytest.raises(OverflowError, match="more than references can tell apart"):
        kernels.mark_reachable_directly(index, memory, ALL_BITS, no_chunks, *bits, False)


def test_direct_marking_refuses_wrong_arguments(kernels: ModuleType) -> None:
    heap = heap_of(MACHINE_64, [(4, IN_USE)] * 2)
    index, memory = index_of(kernels, heap), memory_map_of(heap)
    none = np.empty(0, np.uint32)
    with pytest.raises(ValueError, match="cannot wait"):
        kernels.mark_reachable_directly(index, memory, ALL_BITS, none, *bitmaps(index), False, 0)
    with pytest.raises(ValueError, match="one bit for each"):
        kernels.mark_reachable_directly(index, memory, ALL_BITS, none, bitmaps(index)[0], np.zeros(2, np.uint64), False)
    for seed in (index.chunk_count, CHUNK_MASK):
        with pytest.raises(IndexError):
            kernels.mark_reachable_directly(
                index, memory, ALL_BITS, np.array([seed], np.uint32), *bitmaps(index), False
            )
