"""Runs of free chunks that hold whole pages, against a page-by-page look at the truth; and both implementations."""

from __future__ import annotations

import random
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.kernels import STATE_SLOTS, ChunkIndex, ChunkState, words_for
from tests.heap_builder import MACHINES, Machine
from tests.unit.kernels.support import geometry_of, index_of, random_heap
from tests.unit.kernels.test_properties import compare, machines, same

FREE = (ChunkState.FASTBIN, ChunkState.UNSORTED_BIN, ChunkState.SMALL_BIN, ChunkState.LARGE_BIN, ChunkState.TOP)
MASK = sum(1 << state for state in FREE)
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)


def index_with(machine: Machine, chunks: list[tuple[int, int]], lead: int = 0) -> ChunkIndex:
    """One region of chunks: (granules, state) each, ``lead`` granules behind a page's start."""
    base = 0x40_0000 + machine.phase + lead * machine.alignment
    size = sum(granules for granules, _ in chunks) * machine.alignment
    lookup = np.zeros((words_for(size, machine.alignment), 2), np.uint64)
    at = 0
    for granules, _ in chunks:
        lookup[at // 64, 0] |= np.uint64(1 << at % 64)
        at += granules
    counts = [int(word).bit_count() for word in lookup[:, 0].tolist()]
    lookup[:, 1] = np.cumsum([0, *counts])[:-1]
    return ChunkIndex(
        geometry_of(machine),
        np.array([base], np.uint64),
        np.array([base + size], np.uint64),
        np.zeros(1, np.int64),
        lookup,
        np.array([state for _, state in chunks], np.uint8),
    )


@each_machine
def test_neighbours_make_one_run(kernels: ModuleType, machine: Machine) -> None:
    page = 4096 // machine.alignment
    fast, large, live = ChunkState.FASTBIN, ChunkState.LARGE_BIN, ChunkState.IN_USE
    # Neither free chunk holds a page alone; the last one is top, smaller than a page.
    chunks = [(page // 2, live), (page // 4, fast), (page + page // 2, large), (4, live), (5, large), (4, live)]
    index = index_with(machine, [*chunks, (6, ChunkState.TOP)])
    runs = kernels.find_free_runs(index, 0, MASK, 4096)
    start = int(index.region_start[0])
    unit = machine.alignment
    assert runs.start.tolist() == [start + page // 2 * unit, int(index.region_end[0]) - 6 * unit]
    assert runs.end.tolist() == [start + (2 * page + page // 4) * unit, int(index.region_end[0])]
    assert (runs.first_chunk.tolist(), runs.end_chunk.tolist()) == ([1, 6], [3, 7])
    assert runs.free_bytes_before.tolist() == [0, (page + page // 4 + page // 2 + 5) * unit]
    assert runs.free_count_before.tolist() == [0, 3]
    assert runs.has_top.tolist() == [False, True]
    assert (runs.run_count, runs.free_count) == (3, 4)
    assert runs.free_bytes == (page // 4 + page + page // 2 + 11) * unit
    assert runs.largest_bytes == (page + page // 2) * unit


@each_machine
@pytest.mark.parametrize("seed", range(4))
def test_every_page_without_another_chunk_is_in_a_run(kernels: ModuleType, machine: Machine, seed: int) -> None:
    heap = random_heap(machine, seed)
    index = index_of(kernels, heap)
    rng = random.Random(seed)
    index.state[:] = np.where(
        np.array([rng.random() < 0.9 for _ in range(len(index.state))]), ChunkState.LARGE_BIN, index.state
    )
    for region in range(index.region_count):
        runs = kernels.find_free_runs(index, region, MASK, 512)
        first, count = int(index.region_first_chunk[region]), int(index.region_chunk_count[region])
        start, end = int(index.region_start[region]), int(index.region_end[region])
        held = {
            address
            for low, high in zip(runs.start.tolist(), runs.end.tolist(), strict=True)
            for address in range(-(-low // 512) * 512, high // 512 * 512, 512)
        }
        headers, sizes = kernels.unpack_chunks(index, region, 0, index.word_count(region))
        others = set()
        free_bytes = 0
        for header, size, state in zip(
            headers.tolist(), sizes.tolist(), index.state[first : first + count].tolist(), strict=True
        ):
            if state in FREE:
                free_bytes += size
            else:
                others.update(range(header // 512 * 512, header + size, 512))
        assert held == set(range(-(-start // 512) * 512, end // 512 * 512, 512)) - others
        assert runs.free_bytes == free_bytes


@given(
    machine=machines,
    chunks=st.lists(st.tuples(st.integers(2, 300), st.integers(0, STATE_SLOTS - 1)), min_size=1, max_size=80),
    lead=st.integers(0, 255),
    mask=st.integers(0, 0xFFFF),
    page_bytes=st.sampled_from([512, 1024, 4096]),
)
@compare
def test_both_agree(
    compiled: ModuleType,
    machine: Machine,
    chunks: list[tuple[int, int]],
    lead: int,
    mask: int,
    page_bytes: int,
) -> None:
    same(compiled, "find_free_runs", index_with(machine, chunks, lead), 0, mask, page_bytes)


def test_wrong_arguments_are_refused(kernels: ModuleType) -> None:
    index = index_with(MACHINES[0], [(4, 0)])
    for region in (-1, 1):
        with pytest.raises(IndexError):
            kernels.find_free_runs(index, region, MASK, 4096)
    for page_bytes in (0, 1, 4095, 1 << 31, -4096):
        with pytest.raises(ValueError, match="page"):
            kernels.find_free_runs(index, 0, MASK, page_bytes)
