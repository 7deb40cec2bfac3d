"""The free lists of all arenas and threads as columns, ready to be followed.

Knows: where each list's head is and which sizes belong on it. Does not know: where the lists lead (``overlay``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.gathering import UInt64s
from coreheap.allocators.glibc.judgement import NOBODY
from coreheap.allocators.glibc.records import BIN_COUNT, ArenaState, Layout
from coreheap.allocators.glibc.structures import Structure, bin_numbers, tcache_bin_sizes
from coreheap.allocators.glibc.tcache import Cache
from coreheap.kernels import ChunkState

FIRST_LARGE_BIN = 64
MOST_CACHED = 1 << 16
"""More blocks than a tcache bin can count."""
NO_COUNT = 1 << 62
"""Stands for slots that no number of cached blocks leaves free: no list is so long."""


@dataclass(frozen=True, slots=True)
class ListColumns:
    """Free lists to be followed, as columns; ``origin`` says for each where it belongs (arena or cache, number).

    ``head_places``: where each list's head pointer lies. ``count_places``: where malloc's own count of each lies, 0 where it keeps
    none. ``expected``: what that count is, -1 where there is none. ``threads``: whose tcache it is, None for an arena's.
    ``keys``: what each block of a tcache's list has in its second word.
    """

    heads: list[int]
    state: list[int]
    low: list[int]
    high: list[int]
    sentinel: list[int]
    expected: list[int]
    origin: list[tuple[int | None, int | None, int]]
    head_places: list[int]
    count_places: list[int]
    threads: Sequence[int | None]
    keys: list[int]


def is_initialised(state: ArenaState) -> bool:
    """An arena that was never used has all its bins 0."""
    return bool(state.bins.any())


def bin_columns(layout: Layout, arenas: tuple[ArenaFacts, ...]) -> ListColumns:
    """Unsorted, small and large bins that are not empty, of every arena whose malloc_state was saved."""
    used = [(arena.index, arena.state) for arena in arenas if arena.state is not None and is_initialised(arena.state)]
    number = np.arange(1, BIN_COUNT + 1, dtype=np.int64)
    first = np.array([layout.bin_header(state.address, 1) for _, state in used], np.uint64)[:, None]
    sentinels = first + (number - 1).astype(np.uint64) * np.uint64(layout.word_class.header_bytes)
    bins = np.array([state.bins for _, state in used], np.uint64).reshape(-1, BIN_COUNT, 2)
    row, column = np.nonzero((bins[:, :, 0] != sentinels) | (bins[:, :, 1] != sentinels))
    kinds = np.where(number < FIRST_LARGE_BIN, ChunkState.SMALL_BIN, ChunkState.LARGE_BIN)
    kinds[0] = ChunkState.UNSORTED_BIN
    lowest, highest = bin_numbers(layout.word_class)
    sentinel = sentinels[row, column]
    return _of_arenas(
        [used[arena][0] for arena in row.tolist()],
        number[column].tolist(),
        bins[row, column, 0].tolist(),
        kinds[column].tolist(),
        (lowest[number[column]].tolist(), highest[number[column]].tolist()),
        sentinel.tolist(),
        # fd and bk of a bin fall on its two words.
        (sentinel + np.uint64(layout.word_class.header_bytes)).tolist(),
    )


def fastbin_columns(layout: Layout, arenas: tuple[ArenaFacts, ...]) -> ListColumns:
    """Fastbins that are not empty, of every arena whose malloc_state was saved (up to 2.42)."""
    found = [
        (arena.index, number, head, arena.state.address)
        for arena in arenas
        if arena.state is not None and arena.state.fastbins.any()
        for number, head in enumerate(arena.state.fastbins.tolist())
        if head
    ]
    sizes = [layout.word_class.fastbin_chunk_bytes(number) for _, number, _, _ in found]
    places = [
        address + layout.state.offset("fastbinsY") + number * layout.word_class.word_bytes
        for _, number, _, address in found
    ]
    return _of_arenas(
        [arena for arena, *_ in found],
        [number for _, number, _, _ in found],
        [head for _, _, head, _ in found],
        [int(ChunkState.FASTBIN)] * len(found),
        (sizes, sizes),
        [0] * len(found),
        places,
    )


def _of_arenas(
    arenas: list[int],
    numbers: list[int],
    heads: list[int],
    states: list[int],
    sizes: tuple[list[int], list[int]],
    sentinels: list[int],
    head_places: list[int],
) -> ListColumns:
    """Lists of arenas, of which malloc keeps no count."""
    count = len(arenas)
    return ListColumns(
        heads=heads,
        state=states,
        low=sizes[0],
        high=sizes[1],
        sentinel=sentinels,
        expected=[-1] * count,
        origin=[(arena, None, number) for arena, number in zip(arenas, numbers, strict=True)],
        head_places=head_places,
        count_places=[0] * count,
        threads=[None] * count,
        keys=[],
    )


def tcache_columns(
    layout: Layout,
    fields: Structure,
    caches: list[Cache],
    tcache_count: int | None,
    first_number: int,
    key: int | None,
    counted_from_one_less: bool,
) -> ListColumns:
    """The lists that are not empty of every tcache; ``fields`` are those of its structure.

    The caches are numbered from ``first_number`` on; ``tcache_count`` are the slots of each list, which tell used from free
    ones (2.42+). ``key``: None where it is the structure's own address.
    """
    head_field, count_field = fields.fields["entries"], fields.fields["counts"]
    heads = np.array([cache.state.entries for cache in caches], np.uint64).reshape(-1, head_field.count)
    counts = np.array([cache.state.counts for cache in caches], np.uint64).reshape(-1, head_field.count)
    row, number = np.nonzero(heads)
    address = np.array([cache.address for cache in caches], np.uint64)[row]
    threads = [NOBODY if cache.thread is None else cache.thread for cache in caches]
    expected = counts[row, number].astype(np.int64)
    if layout.generation.tcache_counts_free_slots:
        if tcache_count is None:
            expected = np.full(len(row), -1, np.int64)
        else:
            used = min(tcache_count, NO_COUNT) - expected
            expected = np.where((used >= 0) & (used < MOST_CACHED), used, NO_COUNT)
    low, high = tcache_bin_sizes(head_field.count, layout.word_class, counted_from_one_less)

    def places(first: int, element_bytes: int) -> UInt64s:
        return address + np.uint64(first) + number.astype(np.uint64) * np.uint64(element_bytes)

    return ListColumns(
        heads=heads[row, number].tolist(),
        state=[int(ChunkState.TCACHE)] * len(row),
        low=low[number].tolist(),
        high=high[number].tolist(),
        sentinel=[0] * len(row),
        expected=expected.tolist(),
        origin=[
            (None, first_number + cache, bin_number)
            for cache, bin_number in zip(row.tolist(), number.tolist(), strict=True)
        ],
        head_places=places(head_field.offset, head_field.element_bytes).tolist(),
        count_places=places(count_field.offset, count_field.element_bytes).tolist(),
        threads=[threads[cache] for cache in row.tolist()],
        keys=address.tolist() if key is None else [key] * len(row),
    )
