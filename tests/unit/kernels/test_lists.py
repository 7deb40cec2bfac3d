"""Free lists laid over walks: sound ones find every chunk, broken ones end with the right error."""

from __future__ import annotations

import random
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from coreheap.kernels import NO_WORD, ChunkIndex, ChunkState, ListError, ListKind, MemoryMap, OverlayOutcome
from tests.heap_builder import (
    FASTBIN,
    IN_USE,
    LARGE_BIN,
    MACHINE_64,
    MACHINES,
    TCACHE,
    UNSORTED_BIN,
    BuiltHeap,
    BuiltList,
    HeapBuilder,
    Machine,
    link_ring,
    link_singly,
)
from tests.unit.kernels.support import geometry_of, index_of, memory_map_of, random_heap

each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
UNBOUNDED = (0, (1 << 64) - 1)


def kind_of(state: str) -> ListKind:
    return {TCACHE: ListKind.SINGLY_PAYLOAD, FASTBIN: ListKind.SINGLY_HEADER}.get(state, ListKind.DOUBLY)


def overlay(
    kernels: ModuleType,
    heap: BuiltHeap,
    index: ChunkIndex,
    lists: list[BuiltList],
    kind: ListKind,
    *,
    memory_map: MemoryMap | None = None,
    sizes: tuple[int, int] | None = None,
    expected: list[int] | None = None,
    error_capacity: int = 64,
    keys: list[int] | None = None,
    size_links_from: int = 0,
) -> OverlayOutcome:
    rows = [
        sizes
        or (min((c.chunk_bytes for c in row.chunks), default=0), max((c.chunk_bytes for c in row.chunks), default=0))
        for row in lists
    ]
    result: OverlayOutcome = kernels.overlay_free_lists(
        memory_map or memory_map_of(heap),
        index,
        np.array([row.head for row in lists], np.uint64),
        np.array([ChunkState[row.state.upper()] for row in lists], np.uint8),
        np.array([low for low, _ in rows], np.uint64),
        np.array([high for _, high in rows], np.uint64),
        np.array([row.sentinel for row in lists], np.uint64),
        np.array(expected or [-1] * len(lists), np.int64),
        kind,
        heap.safe_linking,
        geometry_of(heap.machine),
        error_capacity,
        None if keys is None else np.array(keys, np.uint64),
        size_links_from,
    )
    return result


@each_machine
@pytest.mark.parametrize("safe_linking", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_lists_give_every_chunk_its_state(kernels: ModuleType, machine: Machine, safe_linking: bool, seed: int) -> None:
    heap = random_heap(machine, seed, safe_linking=safe_linking)
    index = index_of(kernels, heap)
    for kind in ListKind:
        lists = [row for row in heap.lists if kind_of(row.state) is kind]
        assert lists
        outcome = overlay(
            kernels,
            heap,
            index,
            lists,
            kind,
            expected=[len(row.chunks) for row in lists],
            size_links_from=machine.small_limit,
        )
        assert outcome.count.tolist() == [len(row.chunks) for row in lists]
        assert outcome.byte_count.tolist() == [sum(chunk.chunk_bytes for chunk in row.chunks) for row in lists]
        assert not outcome.error_code.any()
        assert not outcome.stop_code.any()
        assert outcome.error_total == 0
        assert outcome.closed.all()
        assert outcome.errors.shape == (0, 7)
    assert index.state.tolist() == [chunk.state_number for chunk in heap.all_chunks()]
    assert any(chunk.mmapped and chunk.state == TCACHE for chunk in heap.all_chunks())


class Scene:
    """A segment of equal chunks in use, except that ``free`` of them look free, ready to be put on lists."""

    def __init__(self, machine: Machine, *, free: bool = False, safe_linking: bool = True) -> None:
        builder = HeapBuilder(machine, random.Random(1), safe_linking=safe_linking)
        size = 6 * machine.alignment
        plan = [(size, UNSORTED_BIN if free and number % 2 else IN_USE) for number in range(40)]
        self.segment = builder.add_segment(0x40000, 1 << 14, plan=plan)
        self.sentinel = 0x10000
        builder.memory.add(self.sentinel, 4096)
        self.machine = machine
        self.heap = builder.heap
        self.size = size
        self.chunks = self.segment.chunks[1::2] if free else self.segment.chunks[:-1]

    def singly(self, count: int = 5, state: str = TCACHE) -> BuiltList:
        chunks = self.chunks[:count]
        head = link_singly(
            self.heap.memory,
            self.machine,
            chunks,
            to_payload=state == TCACHE,
            safe_linking=self.heap.safe_linking,
        )
        return BuiltList(state, 0, head, 0, chunks)

    def ring(self, count: int = 5) -> BuiltList:
        chunks = self.chunks[:count]
        word = self.machine.word_bytes
        first, last = link_ring(self.heap.memory, self.machine, self.sentinel, chunks)
        self.heap.memory.put(self.sentinel + 2 * word, first, word)
        self.heap.memory.put(self.sentinel + 3 * word, last, word)
        return BuiltList(UNSORTED_BIN, 1, first, self.sentinel, chunks)

    def store_next(self, number: int, pointer: int) -> int:
        """Overwrites the next pointer of a listed chunk; returns where."""
        place = self.chunks[number].payload_address(self.machine)
        stored = pointer ^ (place >> 12) if self.heap.safe_linking else pointer
        self.heap.memory.put(place, stored, self.machine.word_bytes)
        return place

    def payload(self, number: int) -> int:
        return self.chunks[number].payload_address(self.machine)


def only_error(outcome: OverlayOutcome, code: ListError, address: int, *, stops: bool = True) -> list[Any]:
    """Checks that a single list had one error, and returns its details."""
    assert outcome.error_total == 1
    assert outcome.error_count.tolist() == [1]
    assert ListError(int(outcome.error_code[0])) is code
    assert int(outcome.error_address[0]) == address
    assert int(outcome.stop_code[0]) == (code if stops else ListError.NONE)
    (row,) = outcome.errors.tolist()
    assert row[:3] == [0, code, address]
    return list(row[3:5])


@each_machine
@pytest.mark.parametrize("state", [TCACHE, FASTBIN])
def test_cycle_ends(kernels: ModuleType, machine: Machine, state: str) -> None:
    scene = Scene(machine)
    row = scene.singly(5, state)
    back = scene.chunks[2]
    place = scene.store_next(4, scene.payload(2) if state == TCACHE else back.header_address)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], kind_of(state))
    assert outcome.count.tolist() == [5]
    assert only_error(outcome, ListError.ALREADY_LISTED, back.header_address) == [place, 5]


@each_machine
def test_misaligned_pointer(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine)
    row = scene.singly()
    place = scene.store_next(2, scene.payload(3) + 4)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.SINGLY_PAYLOAD)
    assert outcome.count.tolist() == [3]
    assert only_error(outcome, ListError.MISALIGNED, scene.payload(3) + 4) == [place, 3]


@each_machine
@pytest.mark.parametrize("where", ["inside", "outside", "beyond"])
def test_pointer_to_no_chunk(kernels: ModuleType, machine: Machine, where: str) -> None:
    scene = Scene(machine)
    row = scene.singly()
    pointer = {
        "inside": scene.payload(3) + machine.alignment,
        "outside": 0x90000 + machine.phase + machine.header_bytes,
        "beyond": (machine.word_mask - 0xFFF) + machine.phase + machine.header_bytes,
    }[where]
    place = scene.store_next(0, pointer)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.SINGLY_PAYLOAD)
    assert outcome.count.tolist() == [1]
    assert only_error(outcome, ListError.NOT_A_CHUNK_START, pointer) == [place, 1]


@each_machine
@pytest.mark.parametrize("pointer", [1, 2, 7, 8, 15])
def test_pointer_below_any_header(kernels: ModuleType, machine: Machine, pointer: int) -> None:
    scene = Scene(machine)
    row = replace(scene.singly(), head=pointer)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.SINGLY_PAYLOAD)
    assert outcome.count.tolist() == [0]
    aligned = pointer % machine.alignment == (machine.phase + machine.header_bytes) % machine.alignment
    below = pointer < machine.header_bytes
    code = ListError.NOT_A_CHUNK_START if aligned and not below else ListError.MISALIGNED
    assert only_error(outcome, code, pointer) == [0, 0]


@each_machine
def test_top_cannot_be_in_tcache(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine, free=True)
    top = scene.segment.chunks[-1]
    row = BuiltList(TCACHE, 0, top.payload_address(machine), 0, [])
    outcome = overlay(
        kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.SINGLY_PAYLOAD, sizes=UNBOUNDED
    )
    assert only_error(outcome, ListError.WRONG_STATE, top.header_address) == [0, 0]


@each_machine
def test_cached_chunk_that_looks_free_keeps_its_list(kernels: ModuleType, machine: Machine) -> None:
    """PREV_INUSE behind it was cleared: the list still has it, and goes on."""
    scene = Scene(machine, free=True)
    row = scene.singly(3)
    assert all(chunk.state == UNSORTED_BIN for chunk in row.chunks)
    index = index_of(kernels, scene.heap)
    outcome = overlay(kernels, scene.heap, index, [row], ListKind.SINGLY_PAYLOAD, expected=[3])
    assert outcome.count.tolist() == [3]
    assert outcome.errors[:, 1].tolist() == [ListError.LOOKS_FREE] * 3
    word = machine.word_bytes
    assert outcome.errors[:, 5].tolist() == [chunk.header_address + scene.size + word for chunk in row.chunks]
    assert bool(outcome.closed[0])


@each_machine
def test_chunk_in_use_cannot_be_on_a_bin(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine, free=True)
    row = scene.ring()
    in_use = scene.segment.chunks[4]
    place = scene.chunks[1].header_address + 2 * machine.word_bytes
    scene.heap.memory.put(place, in_use.header_address, machine.word_bytes)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.DOUBLY)
    assert outcome.count.tolist() == [5]
    assert only_error(outcome, ListError.WRONG_STATE, in_use.header_address) == [place, 2]


@each_machine
def test_chunk_on_two_lists(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine)
    row = scene.singly(4)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row, replace(row)], ListKind.SINGLY_PAYLOAD)
    assert outcome.count.tolist() == [4, 0]
    assert outcome.error_code.tolist() == [ListError.NONE, ListError.ALREADY_LISTED]
    assert outcome.error_address.tolist() == [0, scene.chunks[0].header_address]


@each_machine
def test_wrong_size_and_count_do_not_stop(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine)
    row = scene.singly(4)
    index = index_of(kernels, scene.heap)
    outcome = overlay(
        kernels, scene.heap, index, [row], ListKind.SINGLY_PAYLOAD, sizes=(0, scene.size - 1), expected=[3]
    )
    assert outcome.count.tolist() == [4]
    assert outcome.byte_count.tolist() == [4 * scene.size]
    assert int(outcome.error_code[0]) == ListError.WRONG_SIZE
    assert int(outcome.stop_code[0]) == ListError.NONE
    assert outcome.errors[:, 1].tolist() == [ListError.WRONG_SIZE] * 4 + [ListError.COUNT_MISMATCH]
    assert outcome.errors[:, 2].tolist() == [chunk.header_address for chunk in row.chunks] + [row.head]
    assert outcome.errors[:, 4].tolist() == [0, 1, 2, 3, 4]
    few = overlay(
        kernels,
        scene.heap,
        index_of(kernels, scene.heap),
        [row],
        ListKind.SINGLY_PAYLOAD,
        sizes=(scene.size + 1, 1 << 40),
        error_capacity=2,
    )
    assert few.error_total == 4
    assert few.errors.tolist() == outcome.errors[:2].tolist()


@each_machine
def test_broken_back_links(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine, free=True)
    row = scene.ring()
    word = machine.word_bytes
    victim = scene.chunks[2].header_address
    scene.heap.memory.put(victim + 3 * word, victim, word)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.DOUBLY)
    assert outcome.count.tolist() == [5]
    stored_at = scene.chunks[1].header_address + 2 * word
    assert only_error(outcome, ListError.BROKEN_BACK_LINK, victim, stops=False) == [stored_at, 2]

    scene = Scene(machine, free=True)
    row = scene.ring()
    scene.heap.memory.put(scene.sentinel + 3 * word, scene.chunks[0].header_address, word)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.DOUBLY)
    assert outcome.count.tolist() == [5]
    only_error(outcome, ListError.BROKEN_BACK_LINK, scene.sentinel, stops=False)


@each_machine
@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("kind", ["misaligned", "no chunk", "in use", "another bin", "itself"])
def test_a_ring_with_a_wrong_fd_is_followed_from_its_other_end(
    kernels: ModuleType, machine: Machine, number: int, kind: str
) -> None:
    """All its chunks are found, and the one value that was right is told."""
    scene = Scene(machine, free=True)
    row = scene.ring()
    word = machine.word_bytes
    other = scene.chunks[6:9]
    other_bin = scene.sentinel + 64
    first, last = link_ring(scene.heap.memory, machine, other_bin, other)
    scene.heap.memory.put(other_bin + 2 * word, first, word)
    scene.heap.memory.put(other_bin + 3 * word, last, word)
    place = scene.chunks[number].header_address + 2 * word
    right = scene.heap.memory.get(place, word)
    wrong, code = {
        "misaligned": (0x41414141, ListError.MISALIGNED),
        "no chunk": (scene.chunks[0].header_address + machine.alignment, ListError.NOT_A_CHUNK_START),
        "in use": (scene.segment.chunks[4].header_address, ListError.WRONG_STATE),
        "another bin": (other[1].header_address, ListError.BROKEN_FORWARD_LINK),
        "itself": (scene.chunks[number].header_address, ListError.ALREADY_LISTED),
    }[kind]
    scene.heap.memory.put(place, wrong, word)
    index = index_of(kernels, scene.heap)
    rows = [row, BuiltList(UNSORTED_BIN, 2, first, other_bin, other)]
    outcome = overlay(kernels, scene.heap, index, rows, ListKind.DOUBLY)
    assert outcome.count.tolist() == [5, 3]
    assert outcome.closed.all()
    assert outcome.error_count.tolist() == [1, 0]
    (error,) = outcome.errors.tolist()
    assert error[1] == code
    assert error[5:] == [place, right]


@each_machine
def test_a_ring_that_is_broken_twice_is_not_closed(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine, free=True)
    row = scene.ring()
    word = machine.word_bytes
    scene.heap.memory.put(scene.chunks[0].header_address + 2 * word, 0x41414141, word)
    scene.heap.memory.put(scene.chunks[3].header_address + 3 * word, 0x42424242, word)
    outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.DOUBLY)
    assert outcome.count.tolist() == [3]
    assert not outcome.closed[0]
    assert outcome.errors[:, 1].tolist() == [ListError.MISALIGNED, ListError.BROKEN_BACK_LINK]


@each_machine
def test_chunk_of_a_bin_that_looks_in_use(kernels: ModuleType, machine: Machine) -> None:
    """Its own links are right: it is the next chunk's PREV_INUSE that is wrong."""
    scene = Scene(machine, free=True)
    row = scene.ring()
    word = machine.word_bytes
    victim = scene.chunks[2].header_address
    index = index_of(kernels, scene.heap)
    index.state[index.chunk_starting_at(victim)] = ChunkState.IN_USE
    outcome = overlay(kernels, scene.heap, index, [row], ListKind.DOUBLY)
    assert outcome.count.tolist() == [5]
    only_error(outcome, ListError.LOOKS_IN_USE, victim, stops=False)
    assert outcome.errors[0, 5] == victim + scene.size + word
    assert index.state[index.chunk_starting_at(victim)] == ChunkState.UNSORTED_BIN


class LargeBin(Scene):
    """A bin of large chunks of three sizes, two of each, with a sound nextsize ring."""

    def __init__(self, machine: Machine) -> None:
        builder = HeapBuilder(machine, random.Random(1))
        sizes = [machine.small_limit + step * machine.alignment for step in (4, 4, 2, 2, 0, 0)]
        plan = [part for size in sizes for part in ((size, LARGE_BIN), (4 * machine.alignment, IN_USE))]
        self.segment = builder.add_segment(0x40000, 1 << 16, plan=plan)
        self.sentinel = 0x10000
        builder.memory.add(self.sentinel, 4096)
        self.machine = machine
        self.heap = builder.heap
        self.chunks = self.segment.of_state(LARGE_BIN)
        self.word = machine.word_bytes
        first, last = link_ring(self.heap.memory, machine, self.sentinel, self.chunks, with_nextsize=True)
        self.heap.memory.put(self.sentinel + 2 * self.word, first, self.word)
        self.heap.memory.put(self.sentinel + 3 * self.word, last, self.word)
        self.row = BuiltList(LARGE_BIN, 64, first, self.sentinel, self.chunks)

    def followed(self, kernels: ModuleType) -> OverlayOutcome:
        index = index_of(kernels, self.heap)
        return overlay(kernels, self.heap, index, [self.row], ListKind.DOUBLY, size_links_from=self.machine.small_limit)


@each_machine
def test_sound_large_bin(kernels: ModuleType, machine: Machine) -> None:
    outcome = LargeBin(machine).followed(kernels)
    assert outcome.count.tolist() == [6]
    assert outcome.error_total == 0


@each_machine
@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("words", [4, 5])
def test_each_nextsize_link_is_checked(kernels: ModuleType, machine: Machine, number: int, words: int) -> None:
    scene = LargeBin(machine)
    place = scene.chunks[number].header_address + words * scene.word
    right = scene.heap.memory.get(place, scene.word)
    is_leader = number % 2 == 0
    assert bool(right) == is_leader
    scene.heap.memory.put(place, 0x41414140, scene.word)
    outcome = scene.followed(kernels)
    assert outcome.count.tolist() == [6]
    code = ListError.BROKEN_SIZE_RING if is_leader else ListError.STRAY_SIZE_LINK
    only_error(outcome, code, scene.chunks[number].header_address, stops=False)
    assert outcome.errors[0, 5:].tolist() == [place, right]


@each_machine
def test_large_bin_out_of_order(kernels: ModuleType, machine: Machine) -> None:
    scene = LargeBin(machine)
    order = [scene.chunks[number] for number in (0, 1, 4, 5, 2, 3)]
    first, last = link_ring(scene.heap.memory, machine, scene.sentinel, order)
    scene.heap.memory.put(scene.sentinel + 3 * scene.word, last, scene.word)
    leaders = [chunk.header_address for chunk in order[::2]]
    for number, leader in enumerate(leaders):
        scene.heap.memory.put(leader + 4 * scene.word, leaders[(number + 1) % 3], scene.word)
        scene.heap.memory.put(leader + 5 * scene.word, leaders[number - 1], scene.word)
    assert first == scene.row.head
    outcome = scene.followed(kernels)
    assert outcome.count.tolist() == [6]
    only_error(outcome, ListError.NOT_SORTED, scene.chunks[2].header_address, stops=False)


@each_machine
@pytest.mark.parametrize("words", [4, 5])
def test_large_unsorted_chunks_have_no_nextsize_links(kernels: ModuleType, machine: Machine, words: int) -> None:
    scene = LargeBin(machine)
    for chunk in scene.chunks:
        for place in (4, 5):
            scene.heap.memory.put(chunk.header_address + place * scene.word, 0, scene.word)
    scene.row = replace(scene.row, state=UNSORTED_BIN)
    assert scene.followed(kernels).error_total == 0
    victim = scene.chunks[3].header_address
    scene.heap.memory.put(victim + words * scene.word, 7, scene.word)
    outcome = scene.followed(kernels)
    only_error(outcome, ListError.STRAY_SIZE_LINK, victim, stops=False)
    assert outcome.errors[0, 5:].tolist() == [victim + words * scene.word, 0]


@each_machine
def test_keys_of_cached_blocks(kernels: ModuleType, machine: Machine) -> None:
    scene = Scene(machine)
    row = scene.singly()
    for number in range(5):
        place = scene.payload(number) + machine.word_bytes
        scene.heap.memory.put(place, 0x1234 if number != 2 else 0, machine.word_bytes)
    index = index_of(kernels, scene.heap)
    outcome = overlay(kernels, scene.heap, index, [row], ListKind.SINGLY_PAYLOAD, keys=[0x1234])
    assert outcome.count.tolist() == [5]
    victim = scene.chunks[2].header_address
    only_error(outcome, ListError.WRONG_KEY, victim, stops=False)
    assert outcome.errors[0, 5:].tolist() == [scene.payload(2) + machine.word_bytes, 0x1234]
    index = index_of(kernels, scene.heap)
    unknown = overlay(kernels, scene.heap, index, [row], ListKind.SINGLY_PAYLOAD, keys=[NO_WORD])
    assert unknown.error_total == 0


@each_machine
@pytest.mark.parametrize("kind", [ListKind.SINGLY_PAYLOAD, ListKind.DOUBLY])
def test_link_that_was_not_saved(kernels: ModuleType, machine: Machine, kind: ListKind) -> None:
    """The chunk is on the list all the same: its predecessor says so."""
    doubly = kind is ListKind.DOUBLY
    word = machine.word_bytes
    links = 2 if doubly else 1
    for missing in range(1, links * word + 1):
        scene = Scene(machine, free=doubly)
        row = scene.ring() if doubly else scene.singly()
        place = scene.payload(3)
        whole = memory_map_of(scene.heap)
        run = int(np.searchsorted(whole.run_start, place, side="right")) - 1
        ends = whole.run_end.copy()
        ends[run] = place + links * word - missing
        cut = MemoryMap(whole.file, whole.run_start, ends, whole.run_file_offset)
        outcome = overlay(kernels, scene.heap, index_of(kernels, scene.heap), [row], kind, memory_map=cut)
        assert outcome.count.tolist() == [4]
        first_missing = place + word if missing <= (links - 1) * word else place
        assert only_error(outcome, ListError.NOT_SAVED, first_missing)[1] == 3


def test_file_shorter_than_its_runs(kernels: ModuleType) -> None:
    """A truncated core: the runs promise what the file does not have."""
    scene = Scene(MACHINE_64)
    row = scene.singly()
    whole = memory_map_of(scene.heap)
    for length in (0, 3, 20, len(whole.file) - 1):
        cut = replace(whole, file=whole.file[:length])
        outcome = overlay(
            kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.SINGLY_PAYLOAD, memory_map=cut
        )
        assert outcome.error_total <= 1
    for offset in ((1 << 64) - 1, 1 << 63, (1 << 64) - 64):
        wild = replace(whole, run_file_offset=np.full(len(whole.run_start), offset, np.uint64))
        outcome = overlay(
            kernels, scene.heap, index_of(kernels, scene.heap), [row], ListKind.SINGLY_PAYLOAD, memory_map=wild
        )
        assert only_error(outcome, ListError.NOT_SAVED, scene.payload(0))


def test_bin_header_at_the_end_of_the_address_space(kernels: ModuleType) -> None:
    """Its bk would lie beyond the last address, not at the first."""
    scene = Scene(MACHINE_64)
    memory_map = MemoryMap(np.zeros(64, np.uint8), *(np.array([value], np.uint64) for value in (0, 64, 0)))
    sentinel = (1 << 64) - 16
    row = BuiltList(UNSORTED_BIN, 1, sentinel, sentinel, [])
    index = index_of(kernels, scene.heap)
    outcome = overlay(kernels, scene.heap, index, [row], ListKind.DOUBLY, memory_map=memory_map)
    assert outcome.error_total == 0


def test_arguments_that_contradict_each_other(kernels: ModuleType) -> None:
    scene = Scene(MACHINE_64)
    row = scene.singly()
    index = index_of(kernels, scene.heap)
    with pytest.raises(ValueError, match="cannot give its chunks that state"):
        overlay(kernels, scene.heap, index, [replace(row, state=IN_USE)], ListKind.SINGLY_PAYLOAD)
    with pytest.raises(ValueError, match="differ in length"):
        overlay(kernels, scene.heap, index, [row], ListKind.SINGLY_PAYLOAD, expected=[1, 2])
    with pytest.raises(ValueError, match="3"):
        # No member of ListKind: that is what is tested.
        overlay(kernels, scene.heap, index, [row], 3)  # type: ignore[arg-type]
    empty = overlay(kernels, scene.heap, index, [], ListKind.DOUBLY)
    assert len(empty.count) == 0


def test_memory_map_refuses_overlapping_runs() -> None:
    def column(*values: int) -> Any:
        return np.array(values, np.uint64)

    file = np.zeros(16, np.uint8)
    for starts, ends in (((0, 8), (9, 16)), ((8, 0), (16, 8)), ((8,), (7,))):
        with pytest.raises(ValueError, match="not sorted"):
            MemoryMap(file, column(*starts), column(*ends), column(*[0] * len(starts)))
    with pytest.raises(ValueError, match="differ in length"):
        MemoryMap(file, column(0), column(8), column())
