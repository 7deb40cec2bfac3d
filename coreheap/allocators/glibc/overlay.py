"""Lays the free lists over the walk: bins, fastbins and every thread's tcache.

Knows: where each list's head is and which sizes belong on it. Does not know: how chunks were found (``walk``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.records import BIN_COUNT, Layout
from coreheap.allocators.glibc.structures import bin_numbers, tcache_bin_sizes
from coreheap.allocators.glibc.tcache import Cache
from coreheap.allocators.glibc.walk import HeapWalk
from coreheap.corefile import Core
from coreheap.evidence import Anomaly, Gap
from coreheap.heap import FreeList
from coreheap.kernels import (
    ChunkIndex,
    ChunkState,
    ListError,
    ListKind,
    MemoryMap,
    OverlayOutcome,
    chunk_extents,
    find_chunks,
    overlay_free_lists,
)
from coreheap.quantities import AddressRange, format_address

FIRST_LARGE_BIN = 64
TCACHE_SMALL_BINS = 64
MOST_CACHED = 1 << 16
"""More blocks than a tcache bin can count."""

LIST_ERROR_TEXTS = {
    ListError.WRONG_SIZE: ("a chunk of the list's sizes", "another size"),
    ListError.BROKEN_BACK_LINK: ("bk that names the chunk before", "another bk"),
    ListError.COUNT_MISMATCH: ("as many chunks as the counter says", "another number"),
    ListError.MISALIGNED: ("an aligned pointer", "a misaligned one"),
    ListError.NOT_A_CHUNK_START: ("a pointer to a chunk", "a pointer to no chunk's start"),
    ListError.WRONG_STATE: ("a free chunk", "a chunk that cannot be on such a list"),
    ListError.ALREADY_LISTED: ("each chunk on one list once", "a chunk listed twice"),
    ListError.NOT_SAVED: ("the next pointer", "memory that was not saved"),
}


@dataclass(slots=True)
class ListColumns:
    """Free lists to be followed, as columns; ``origin`` says for each where it belongs (arena or cache, number)."""

    heads: list[int]
    state: list[int]
    low: list[int]
    high: list[int]
    sentinel: list[int]
    expected: list[int]
    origin: list[tuple[int | None, int | None, int]]

    @classmethod
    def empty(cls) -> ListColumns:
        return cls([], [], [], [], [], [], [])

    def add(
        self,
        head: int,
        state: ChunkState,
        low: int,
        high: int,
        sentinel: int,
        expected: int,
        origin: tuple[int | None, int | None, int],
    ) -> None:
        self.heads.append(head)
        self.state.append(int(state))
        self.low.append(low)
        self.high.append(min(high, (1 << 63) - 1))
        self.sentinel.append(sentinel)
        self.expected.append(expected)
        self.origin.append(origin)


class Overlay:
    """Follows all free lists of a process and writes their states into the index."""

    def __init__(self, core: Core, layout: Layout, walk: HeapWalk) -> None:
        self.layout = layout
        self.index = walk.index
        self.geometry = layout.geometry
        self.left_out = [part.range for parts in walk.unattributed.values() for part in parts]
        memory = core.memory
        self.memory = memory
        self.map = MemoryMap(memory.file, memory.run_start, memory.run_end, memory.run_file_offset)
        self.lists: list[FreeList] = []
        self.anomalies: list[Anomaly] = []
        self.anomaly_count = 0
        self.gaps: list[Gap] = []

    def bins(self, arenas: tuple[ArenaFacts, ...]) -> None:
        """Unsorted, small and large bins of every arena whose malloc_state was saved."""
        lowest, highest = bin_numbers(self.layout.word_class)
        columns = ListColumns.empty()
        for arena in arenas:
            if arena.state is None:
                continue
            for number in range(1, BIN_COUNT + 1):
                head, tail = (int(word) for word in arena.state.bins[2 * (number - 1) : 2 * number])
                sentinel = self.layout.bin_header(arena.state.address, number)
                if head == tail == sentinel:
                    continue
                if head in (0, sentinel):
                    self._note_lost_head(arena, number, sentinel, head, tail)
                    continue
                kind = (
                    ChunkState.UNSORTED_BIN
                    if number == 1
                    else ChunkState.SMALL_BIN
                    if number < FIRST_LARGE_BIN
                    else ChunkState.LARGE_BIN
                )
                columns.add(
                    head,
                    kind,
                    int(lowest[number]),
                    int(highest[number]),
                    sentinel,
                    -1,
                    (arena.index, None, number),
                )
        self._follow(columns, ListKind.DOUBLY, False)

    def _note_lost_head(self, arena: ArenaFacts, number: int, sentinel: int, head: int, tail: int) -> None:
        """A bin whose fd says empty and whose bk does not; an arena that was never used has all its bins 0."""
        if arena.state is None or not arena.state.bins.any():
            return
        self.anomaly_count += 1
        self.anomalies.append(
            Anomaly(
                "bin_head_damaged",
                sentinel,
                f"bin {number}: fd and bk of its own address, or of chunks",
                f"fd {format_address(head)}, bk {format_address(tail)}",
                arena.index,
            )
        )

    def fastbins(self, arenas: tuple[ArenaFacts, ...]) -> None:
        """Fastbins of every arena whose malloc_state was saved (up to 2.42)."""
        columns = ListColumns.empty()
        for arena in arenas:
            heads = arena.state.fastbins.tolist() if arena.state is not None else []
            for number, head in enumerate(heads):
                if head:
                    size = self.layout.word_class.fastbin_chunk_bytes(number)
                    columns.add(head, ChunkState.FASTBIN, size, size, 0, -1, (arena.index, None, number))
        self._follow(columns, ListKind.SINGLY_HEADER, self.layout.generation.safe_linking)

    def tcaches(self, caches: list[Cache], tcache_count: int | None, first_number: int = 0) -> None:
        """The lists of every tcache; ``tcache_count`` is mp_'s, which tells used slots from free ones (2.42+).

        The caches are numbered from ``first_number`` on.
        """
        columns = ListColumns.empty()
        counted_from_one_less = self._tcaches_count_from_one_less(caches)
        for number, cache in enumerate(caches, first_number):
            low, high = tcache_bin_sizes(len(cache.state.entries), self.layout.word_class, counted_from_one_less)
            for bin_number in np.flatnonzero(cache.state.entries).tolist():
                count = int(cache.state.counts[bin_number])
                if self.layout.generation.tcache_counts_free_slots:
                    used = tcache_count - count if tcache_count is not None else -1
                    count = used if 0 <= used < MOST_CACHED else -1
                columns.add(
                    int(cache.state.entries[bin_number]),
                    ChunkState.TCACHE,
                    int(low[bin_number]),
                    int(high[bin_number]),
                    0,
                    count,
                    (None, number, bin_number),
                )
        self._follow(columns, ListKind.SINGLY_PAYLOAD, self.layout.generation.safe_linking)

    def _tcaches_count_from_one_less(self, caches: list[Cache]) -> bool:
        """Which of a generation's two numberings of large tcache bins more of the first blocks in them fit."""
        if not self.layout.generation.tcache_may_count_from_one_less or not caches:
            return False
        entries = np.array([cache.state.entries for cache in caches])
        entries[:, :TCACHE_SMALL_BINS] = 0
        number = np.nonzero(entries)[1]
        headers = entries[entries != 0] - np.uint64(self.geometry.header_bytes)
        chunks = find_chunks(self.index, headers, True)
        number, chunks = number[chunks >= 0], chunks[chunks >= 0]
        sizes = chunk_extents(self.index, chunks)[1].astype(np.int64)
        fits = {}
        for counted_so in (False, True):
            low, high = tcache_bin_sizes(entries.shape[1], self.layout.word_class, counted_so)
            fits[counted_so] = int(((low[number] <= sizes) & (sizes <= high[number])).sum())
        return fits[True] > fits[False]

    def _follow(self, columns: ListColumns, kind: ListKind, safe_linking: bool) -> None:
        if not columns.heads:
            return
        outcome = overlay_free_lists(
            self.map,
            self.index,
            np.array(columns.heads, np.uint64),
            np.array(columns.state, np.uint8),
            np.array(columns.low, np.uint64),
            np.array(columns.high, np.uint64),
            np.array(columns.sentinel, np.uint64),
            np.array(columns.expected, np.int64),
            kind,
            safe_linking,
            self.geometry,
        )
        self._record(columns, outcome)

    def _record(self, columns: ListColumns, outcome: OverlayOutcome) -> None:
        for row, (arena, cache, number) in enumerate(columns.origin):
            error = ListError(int(outcome.error_code[row]))
            self.lists.append(
                FreeList(
                    ChunkState(columns.state[row]),
                    number,
                    arena,
                    cache,
                    columns.low[row],
                    columns.high[row],
                    int(outcome.count[row]),
                    int(outcome.byte_count[row]),
                    columns.expected[row] if columns.expected[row] >= 0 else None,
                    "" if error is ListError.NONE else error.name.lower(),
                    int(outcome.error_address[row]) if error is not ListError.NONE else None,
                )
            )
        self.anomaly_count += outcome.error_total
        for row, code, address, holder, _position in outcome.errors.tolist():
            error = ListError(code)
            expected, observed = LIST_ERROR_TEXTS[error]
            arena, _cache, number = columns.origin[row]
            where = f"{ChunkState(columns.state[row]).label} {number}"
            if self._leads_to_unknown_memory(error, address):
                self.anomaly_count -= 1
                self.gaps.append(
                    Gap(
                        "free_list_cut",
                        f"{where} of {'a tcache' if arena is None else f'arena {arena}'} goes on in memory that is not in"
                        " the core: its later blocks count as in_use or free_unlisted, by their headers",
                        AddressRange(address, address),
                    )
                )
                continue
            source = f", pointer at {format_address(holder)}" if holder else ""
            self.anomalies.append(
                Anomaly(
                    f"list_{error.name.lower()}",
                    address,
                    f"{where}: {expected}",
                    f"{observed}{source}",
                    arena,
                )
            )

    def _leads_to_unknown_memory(self, error: ListError, address: int) -> bool:
        """Whether an error only says that the list's next chunk is where the core holds nothing that could be walked."""
        if error is ListError.NOT_SAVED:
            return True
        return error is ListError.NOT_A_CHUNK_START and (
            any(address in part for part in self.left_out)
            or not self.memory.is_saved(address, address + self.geometry.word_bytes)
        )


def mark_own(index: ChunkIndex, layout: Layout, caches: list[Cache]) -> list[int]:
    """Turn the chunks that hold tcache structures into ALLOCATOR_OWN; returns the chunk index of each, -1 where none is."""
    chunks = []
    for cache in caches:
        chunk = index.chunk_starting_at(cache.address - layout.word_class.header_bytes)
        if chunk >= 0 and index.state[chunk] == ChunkState.IN_USE:
            index.state[chunk] = ChunkState.ALLOCATOR_OWN
        chunks.append(chunk)
    return chunks
