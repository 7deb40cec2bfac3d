"""Words that lead to some chunks, and addresses in other forms: against what was planted, and both implementations alike."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreheap.kernels import CHUNK_MASK, INTERIOR, ChunkIndex, MemoryMap, PointerForm, reference
from tests.heap_builder import IN_USE, MACHINE_32A8, MACHINE_64, MACHINES, BuiltHeap, Machine
from tests.unit.kernels.support import index_of, memory_map_of, random_heap
from tests.unit.kernels.test_pointers import ALL_BITS, Truth, heap_of, pieces, put, random_pointers

compare = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
DATA = 0x0700_0000
heaps = given(machine=st.sampled_from(MACHINES), seed=st.integers(0, 1 << 30))


def columns(ranges: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    start, end = (np.array([row[column] for row in ranges], np.uint64) for column in range(2))
    return start, end


def bits_of(index: ChunkIndex, chunks: list[int]) -> np.ndarray:
    bits = np.zeros((index.chunk_count + 63) // 64, np.uint64)
    for chunk in chunks:
        bits[chunk >> 6] |= np.uint64(1 << (chunk & 63))
    return bits


# Words that lead to some chunks


@compare
@heaps
def test_words_that_lead_to_some_chunks(compiled: ModuleType, machine: Machine, seed: int) -> None:
    rng = random.Random(seed)
    heap = random_heap(machine, seed, segment_bytes=2048, mmapped=rng.randrange(3))
    random_pointers(heap, rng, 200)
    index, memory = index_of(reference, heap), pieces(heap, rng)
    mask = rng.choice([ALL_BITS, (1 << 56) - 1])
    truth = Truth(heap, index, memory, mask)
    chunks = [chunk for chunk in range(index.chunk_count) if rng.random() < 0.5]
    starts = memory.run_start.tolist() or [0]
    ranges = []
    for _ in range(rng.randrange(4)):
        low = rng.choice(starts) + rng.randrange(-40, 2000)
        ranges.append((max(low, 0), max(low + rng.randrange(-10, 3000), 0)))
    expected = [
        (address, target)
        for low, high in ranges
        for address, target in truth.targets_in(low, high)
        if target & CHUNK_MASK in chunks
    ]
    for kernels in (reference, compiled):
        found = kernels.find_pointers_to(index, memory, *columns(ranges), mask, bits_of(index, chunks))
        assert list(zip(found.holder_address.tolist(), found.target.tolist(), strict=True)) == expected
        assert [truth.target_of(word) for word in found.word.tolist()] == found.target.tolist()
        assert (found.holder_address.dtype, found.word.dtype, found.target.dtype) == (np.uint64, np.uint64, np.uint32)


def test_a_word_is_told_each_time(kernels: ModuleType) -> None:
    heap = heap_of(MACHINE_64, [(4, IN_USE)] * 3)
    heap.memory.add(DATA, 4096)
    one, two, _ = (chunk.payload_address(MACHINE_64) for chunk in heap.segments[0].chunks[:3])
    for number, value in enumerate((one + 8, two, one + 8, one, 3)):
        put(heap, DATA + 8 * number, value)
    index = index_of(kernels, heap)
    found = kernels.find_pointers_to(
        index, memory_map_of(heap), *columns([(DATA, DATA + 40)]), ALL_BITS, bits_of(index, [0])
    )
    assert found.holder_address.tolist() == [DATA, DATA + 16, DATA + 24]
    assert found.word.tolist() == [one + 8, one + 8, one]
    assert found.target.tolist() == [INTERIOR, INTERIOR, 0]


# Other forms

ENCODINGS: dict[str, tuple[PointerForm, Callable[[int], int]]] = {
    "counter above": (PointerForm.HIGH_TAG, lambda address: address | 0x5A17 << 48),
    "NaN": (PointerForm.HIGH_TAG, lambda address: address | 0xFFFE << 48),
    "counter below": (PointerForm.LOW_TAG, lambda address: address << 16 | 0x5A17),
    "shifted down": (PointerForm.SHIFTED, lambda address: address >> 3),
    "shifted up": (PointerForm.SHIFTED, lambda address: address << 2),
    "other order of bytes": (
        PointerForm.BYTE_SWAPPED,
        lambda address: int.from_bytes(address.to_bytes(8, "little"), "big"),
    ),
    "halves in the other order": (PointerForm.HALVES, lambda address: address >> 32 | (address & 0xFFFFFFFF) << 32),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_each_form_of_a_word(kernels: ModuleType, name: str) -> None:
    form, encode = ENCODINGS[name]
    heap, address = planted(MACHINE_64)
    put(heap, DATA + 16, encode(address))
    # With zeros behind it, a counter below looks like an unaligned address as well.
    assert forms(kernels, heap, [address])[0] == (DATA + 16, 0, form)


@pytest.mark.parametrize("offset", range(1, 8))
def test_across_two_words(kernels: ModuleType, offset: int) -> None:
    heap, address = planted(MACHINE_64)
    heap.memory.write(DATA + 16 + offset, address.to_bytes(8, "little"))
    assert (DATA + 16, 0, PointerForm.UNALIGNED) in forms(kernels, heap, [address])


@pytest.mark.parametrize("offset", range(1, 4))
def test_across_two_short_words(kernels: ModuleType, offset: int) -> None:
    heap, address = planted(MACHINE_32A8)
    heap.memory.write(DATA + 16 + offset, address.to_bytes(4, "little"))
    assert (DATA + 16, 0, PointerForm.UNALIGNED) in forms(kernels, heap, [address])


@pytest.mark.parametrize("apart", [-4, -3, -2, -1, 2, 3, 4])
def test_halves_apart(kernels: ModuleType, apart: int) -> None:
    heap, address = planted(MACHINE_64)
    heap.memory.write(DATA + 32, (address & 0xFFFFFFFF).to_bytes(4, "little"))
    heap.memory.write(DATA + 32 + 4 * apart, (address >> 32).to_bytes(4, "little"))
    assert forms(kernels, heap, [address]) == [(DATA + 32, 0, PointerForm.HALVES)]


@pytest.mark.parametrize("shift", range(5))
def test_compressed_to_32_bits(kernels: ModuleType, shift: int) -> None:
    address = 0x4_5678_9AB0 if shift > 2 else 0x5678_9AB0
    heap, _ = planted(MACHINE_64)
    heap.memory.write(DATA + 20, (address >> shift).to_bytes(4, "little"))
    assert (DATA + 16, 0, PointerForm.COMPRESSED) in forms(kernels, heap, [address])


def test_an_address_as_it_is_is_no_other_form(kernels: ModuleType) -> None:
    heap, address = planted(MACHINE_64)
    put(heap, DATA + 8, address)
    put(heap, DATA + 24, address + 1)
    assert forms(kernels, heap, [address]) == []


def planted(machine: Machine) -> tuple[BuiltHeap, int]:
    """A heap beside which zeros lie, and an address as a heap's of such a machine."""
    heap = heap_of(machine, [(4, IN_USE)] * 2)
    heap.memory.add(DATA, 4096)
    return heap, 0x7F3A_1C00_5670 if machine.word_bytes == 8 else 0x5678_9AB0


def forms(kernels: ModuleType, heap: BuiltHeap, addresses: list[int]) -> list[tuple[int, int, int]]:
    found = kernels.find_encoded(
        index_of(kernels, heap),
        memory_map_of(heap),
        *columns([(DATA, DATA + 4096)]),
        np.array(addresses, np.uint64),
    )
    assert (found.holder_address.dtype, found.number.dtype, found.form.dtype) == (np.uint64, np.uint32, np.uint32)
    return list(zip(found.holder_address.tolist(), found.number.tolist(), found.form.tolist(), strict=True))


@compare
@heaps
def test_both_find_the_same_in_noise(compiled: ModuleType, machine: Machine, seed: int) -> None:
    """Words of few distinct bytes, so that many of the forms occur by chance."""
    rng = random.Random(seed)
    heap = heap_of(machine, [(4, IN_USE)] * 2)
    letters = rng.choice([[0, 0, 0, 16], [0, 1, 16, 32], [0, 0, 0, 0, 0, 0x7F]])
    heap.memory.add(DATA, 4096)
    heap.memory.write(DATA, bytes(rng.choice(letters) for _ in range(1024)))
    memory = pieces(heap, rng) if rng.random() < 0.5 else memory_map_of(heap)
    word = machine.word_bytes
    addresses = {int.from_bytes(bytes(rng.choice(letters) for _ in range(word)), "little") for _ in range(60)} - {0}
    index = index_of(reference, heap)
    low = DATA + rng.randrange(64)
    ranges = columns([(low, low + rng.randrange(1100)), (DATA + 512, DATA + 1024)])
    wanted = np.array(sorted(addresses), np.uint64)
    one, other = (kernels.find_encoded(index, memory, *ranges, wanted) for kernels in (reference, compiled))
    for column in ("holder_address", "number", "form"):
        assert getattr(one, column).tolist() == getattr(other, column).tolist()


def test_hostile_arguments(kernels: ModuleType) -> None:
    heap = heap_of(MACHINE_64, [(4, IN_USE)] * 2)
    index, memory = index_of(kernels, heap), memory_map_of(heap)
    none = np.empty(0, np.uint64)
    too_high = columns([(0, (1 << 63) + 1)])
    odd = (np.zeros(1, np.uint64), none)

    def encoded(ranges: tuple[np.ndarray, np.ndarray], *addresses: int, of: MemoryMap = memory) -> int:
        return len(kernels.find_encoded(index, of, *ranges, np.array(addresses, np.uint64)).form)

    assert encoded(columns([(0, 1 << 63), (9, 4)]), 0x1230) == 0
    assert encoded((none, none), 1) == encoded(columns([(0, 1 << 63)])) == 0
    for ranges, message in ((too_high, "no process has memory"), (odd, "differ in length")):
        with pytest.raises(ValueError, match=message):
            encoded(ranges, 1)
        with pytest.raises(ValueError, match=message):
            kernels.find_pointers_to(index, memory, *ranges, ALL_BITS, bits_of(index, []))
    for addresses in ((0, 5), (5, 5), (7, 5)):
        with pytest.raises(ValueError, match="do not ascend"):
            encoded(columns([(0, 100)]), *addresses)
    with pytest.raises(ValueError, match="one bit for each"):
        kernels.find_pointers_to(index, memory, none, none, ALL_BITS, np.zeros(9, np.uint64))
