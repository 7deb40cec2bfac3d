"""Large chunks found by rows are those that a look at every chunk finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.kernels import ChunkGeometry, ChunkIndex
from coreheap.kernels.large import large_chunks

START = 0x5555_0000_0000


def index_of(regions: list[list[tuple[int, int]]], alignment: int = 16) -> ChunkIndex:
    """An index of regions, each a list of (chunk bytes, state), a page apart."""
    row_bytes = 64 * alignment
    starts, ends, first_rows, rows, states = [], [], [], [], []
    address, rank = START, 0
    for chunks in regions:
        starts.append(address)
        first_rows.append(len(rows))
        offset = 0
        length = sum(size for size, _ in chunks)
        bits = [0] * -(-length // row_bytes)
        for size, state in chunks:
            bits[offset // row_bytes] |= 1 << (offset % row_bytes // alignment)
            states.append(state)
            offset += size
        for word in bits:
            rows.append((word, rank))
            rank += word.bit_count()
        address += length
        ends.append(address)
        address += 4096 - address % 4096
    word_bytes = 8 if alignment == 16 else 4
    return ChunkIndex(
        ChunkGeometry(word_bytes, alignment, 4 * word_bytes, 0),
        np.array(starts, np.uint64),
        np.array(ends, np.uint64),
        np.array(first_rows, np.int64),
        np.array(rows, np.uint64).reshape(-1, 2),
        np.array(states, np.uint8),
    )


SIZES = st.one_of(st.integers(2, 8), st.integers(60, 70), st.integers(120, 200), st.integers(500, 4000))


@given(
    regions=st.lists(st.lists(st.tuples(SIZES, st.integers(0, 10)), min_size=1, max_size=60), min_size=1, max_size=3),
    smallest=st.integers(2048, 40_000),
    alignment=st.sampled_from((8, 16)),
)
def test_they_are_those_that_a_look_at_every_chunk_finds(
    regions: list[list[tuple[int, int]]], smallest: int, alignment: int
) -> None:
    index = index_of([[(granules * alignment, state) for granules, state in chunks] for chunks in regions], alignment)
    for number, chunks in enumerate(regions):
        address = int(index.region_start[number])
        expected = []
        for granules, state in chunks:
            if granules * alignment >= smallest:
                expected.append((address, granules * alignment, state))
            address += granules * alignment
        found = large_chunks(index, number, smallest)
        columns = (found.header_address.tolist(), found.chunk_bytes.tolist(), found.state.tolist())
        assert list(zip(*columns, strict=True)) == expected


def test_batches_of_rows_do_not_lose_a_chunk_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [(32, 0), (300_000, 1), (64, 0), (2048, 2), (500_000, 3), (16 * 1024, 4)]
    chunks = [(size - size % 16, state) for size, state in chunks]
    index = index_of([chunks])
    whole = large_chunks(index, 0, 2048).chunk_bytes.tolist()
    for rows in (1, 2, 7, 64):
        monkeypatch.setattr("coreheap.kernels.large._ROWS_AT_A_TIME", rows)
        assert large_chunks(index, 0, 2048).chunk_bytes.tolist() == whole


def test_sizes_that_need_not_leave_a_row_empty_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2048"):
        large_chunks(index_of([[(4096, 0)]]), 0, 2047)
