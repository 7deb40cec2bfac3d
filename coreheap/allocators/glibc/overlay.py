"""Lays the free lists over the walk: bins, fastbins and every thread's tcache.

Knows: what a list that was followed says. Does not know: where the heads are (``list_columns``), how chunks were found
(``walk``).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.cached_links import CachedLinks, Popped, common_key
from coreheap.allocators.glibc.judgement import Judge
from coreheap.allocators.glibc.list_columns import (
    NO_COUNT,
    ListColumns,
    bin_columns,
    fastbin_columns,
    is_initialised,
    tcache_columns,
)
from coreheap.allocators.glibc.messages import Moment
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import (
    PREV_INUSE,
    SAFE_LINKING_SHIFT,
    TcacheKey,
    tcache_bin_sizes,
)
from coreheap.allocators.glibc.tcache import Cache
from coreheap.allocators.glibc.walk import ANOMALIES_KEPT, HeapWalk
from coreheap.corefile import Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Anomaly, Confidence, Gap
from coreheap.heap import FreeList
from coreheap.kernels import (
    NO_WORD,
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

TCACHE_SMALL_BINS = 64
MOST_HIDDEN = 64

LIST_ERROR_TEXTS = {
    ListError.WRONG_SIZE: ("a chunk of the list's sizes", "another size"),
    ListError.BROKEN_BACK_LINK: ("bk that names the chunk before", "another bk"),
    ListError.COUNT_MISMATCH: ("as many chunks as the counter says", "another number"),
    ListError.MISALIGNED: ("an aligned pointer", "a misaligned one"),
    ListError.NOT_A_CHUNK_START: ("a pointer to a chunk", "a pointer to no chunk's start"),
    ListError.WRONG_STATE: ("a free chunk", "a chunk that cannot be on such a list"),
    ListError.ALREADY_LISTED: ("each chunk on one list once", "a chunk listed twice"),
    ListError.NOT_SAVED: ("the next pointer", "memory that was not saved"),
    ListError.NOT_SORTED: ("chunks in the order of their sizes", "a chunk out of order"),
    ListError.BROKEN_SIZE_RING: ("nextsize links between the first chunks of each size", "another nextsize link"),
    ListError.STRAY_SIZE_LINK: ("no nextsize links but in the first chunk of each size", "a nextsize link"),
    ListError.WRONG_KEY: ("the tcache's key in each block", "another word"),
    ListError.LOOKS_IN_USE: ("PREV_INUSE clear behind a free chunk", "PREV_INUSE set"),
    ListError.LOOKS_FREE: ("PREV_INUSE set behind a chunk of the list", "PREV_INUSE clear"),
    ListError.BROKEN_FORWARD_LINK: ("fd that names the chunk behind", "another fd"),
}

LINK_ERRORS = frozenset(
    {
        ListError.BROKEN_BACK_LINK,
        ListError.BROKEN_FORWARD_LINK,
        ListError.BROKEN_SIZE_RING,
        ListError.STRAY_SIZE_LINK,
        ListError.MISALIGNED,
        ListError.NOT_A_CHUNK_START,
    }
)
"""Errors that a word makes which malloc only ever fills with addresses of its own."""

END_ERRORS = frozenset(
    {ListError.MISALIGNED, ListError.NOT_A_CHUNK_START, ListError.ALREADY_LISTED, ListError.WRONG_STATE}
)
"""Errors of a link behind which no chunk of the list follows, where malloc's own count says so."""

ODD_NODES = frozenset({ListError.NOT_A_CHUNK_START, ListError.ALREADY_LISTED, ListError.WRONG_STATE})
"""Errors of a node that is no free chunk of the list's own, but may have been put on it by a free."""


class Overlay:
    """Follows all free lists of a process and writes their states into the index."""

    def __init__(self, core: Core, layout: Layout, walk: HeapWalk, judge: Judge) -> None:
        self.layout = layout
        self.judge = judge
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
        self.hidden_starts: list[int] = []
        """Header addresses that lists lead to inside of what the walk took for one live chunk; at most MOST_HIDDEN."""
        self.open_lists: list[tuple[int | None, ChunkState, int]] = []
        """Lists of which chunks may be missing: arena (None: a tcache), kind, number."""
        self._own: list[tuple[int, int]] = []
        self._slots: int | None = None
        self._links = CachedLinks(core.memory, self.index, layout)

    def bins(self, arenas: tuple[ArenaFacts, ...]) -> None:
        """Unsorted, small and large bins of every arena whose malloc_state was saved."""
        columns = bin_columns(self.layout, arenas)
        self._own += [
            (arena.state.address, arena.state.address + self.layout.state.byte_count)
            for arena in arenas
            if arena.state is not None and is_initialised(arena.state)
        ]
        self._follow(columns, ListKind.DOUBLY, False, size_links_from=self.layout.word_class.bins.small_limit)

    def fastbins(self, arenas: tuple[ArenaFacts, ...]) -> None:
        """Fastbins of every arena whose malloc_state was saved (up to 2.42)."""
        columns = fastbin_columns(self.layout, arenas)
        self._follow(columns, ListKind.SINGLY_HEADER, self.layout.generation.safe_linking)

    def tcaches(
        self, caches: list[Cache], tcache_count: int | None, first_number: int = 0, key_place: int | None = None
    ) -> None:
        """The lists of every tcache; ``tcache_count`` are the slots of each, which tell used from free ones (2.42+).

        The caches are numbered from ``first_number`` on. ``key_place`` is where tcache_key lies (2.34+), None where unknown.
        """
        if self.layout.tcache is None:
            return
        self._slots = tcache_count
        by_address = self.layout.generation.tcache_key is TcacheKey.STRUCT_ADDRESS
        columns = tcache_columns(
            self.layout,
            self.layout.tcache,
            caches,
            tcache_count,
            first_number,
            None if by_address else self._random_key(caches, key_place),
            self._tcaches_count_from_one_less(caches),
        )
        first_list = len(self.lists)
        outcome = self._follow(columns, ListKind.SINGLY_PAYLOAD, self.layout.generation.safe_linking)
        if outcome is not None:
            self._go_on_behind_odd_nodes(columns, outcome, first_list)

    def _go_on_behind_odd_nodes(self, columns: ListColumns, outcome: OverlayOutcome, first_list: int) -> None:
        """As glibc does, follow a tcache list over a node that is no chunk of its own, where malloc's count bears it out."""
        for row, code, address, _holder, position, _place, _wanted in outcome.errors.tolist():
            if ListError(code) not in ODD_NODES:
                continue
            is_header = ListError(code) is not ListError.NOT_A_CHUNK_START
            node = address + (self.geometry.header_bytes if is_header else 0)
            sizes = columns.low[row], columns.high[row]
            chunks = self._links.blocks_behind(node, sizes, columns.keys[row], columns.expected[row] - position - 1)
            if chunks:
                rows = np.array(chunks, np.int64)
                self.index.state[rows] = columns.state[row]
                known = self.lists[first_list + row]
                more_bytes = int(chunk_extents(self.index, rows)[1].sum())
                self.lists[first_list + row] = replace(
                    known, count=known.count + len(chunks), chunk_bytes=known.chunk_bytes + more_bytes
                )

    def _random_key(self, caches: list[Cache], key_place: int | None) -> int:
        """tcache_key (2.34+): what most cached blocks hold in their second word, else what libc's variable holds."""
        if self.layout.generation.tcache_key is not TcacheKey.RANDOM_WORD or not caches:
            return NO_WORD
        common = common_key(self.memory, np.concatenate([cache.state.entries for cache in caches]))
        if common:
            return common
        stored = self.judge.word_at(key_place) if key_place is not None else None
        return stored or NO_WORD

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

    def _follow(
        self,
        columns: ListColumns,
        kind: ListKind,
        safe_linking: bool,
        size_links_from: int = 0,
    ) -> OverlayOutcome | None:
        if not columns.heads:
            return None
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
            ANOMALIES_KEPT,
            np.array(columns.keys, np.uint64) if columns.keys else None,
            size_links_from,
        )
        self._record(columns, outcome)
        return outcome

    def _record(self, columns: ListColumns, outcome: OverlayOutcome) -> None:
        names = {int(error): error.name.lower() for error in ListError}
        kinds = {int(state): state for state in ChunkState}
        rows = zip(
            columns.origin,
            columns.state,
            columns.low,
            columns.high,
            columns.expected,
            outcome.count.tolist(),
            outcome.byte_count.tolist(),
            outcome.error_code.tolist(),
            outcome.error_address.tolist(),
            strict=True,
        )
        self.lists += [
            FreeList(
                kinds[state],
                number,
                arena,
                cache,
                low,
                high,
                count,
                byte_count,
                expected if 0 <= expected < NO_COUNT else None,
                names[error] if error else "",
                error_address if error else None,
            )
            for (arena, cache, number), state, low, high, expected, count, byte_count, error, error_address in rows
        ]
        self.anomaly_count += outcome.error_total
        self.open_lists += [
            (columns.origin[row][0], ChunkState(columns.state[row]), columns.origin[row][2])
            for row in np.flatnonzero(~outcome.closed).tolist()
        ]
        for row, code, address, holder, position, place, wanted in outcome.errors.tolist():
            error = ListError(code)
            expected, observed = LIST_ERROR_TEXTS[error]
            arena, _cache, number = columns.origin[row]
            where = f"{ChunkState(columns.state[row]).label} {number}"
            if error is ListError.BROKEN_BACK_LINK and self._is_unknown_memory(self.judge.word_at(place)):
                # From its other end a list is followed up to what the core does not hold, as it was from this one.
                self.anomaly_count -= 1
                continue
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
            if len(self.anomalies) >= ANOMALIES_KEPT:
                continue
            if error is ListError.NOT_A_CHUNK_START and len(self.hidden_starts) < MOST_HIDDEN:
                self._note_hidden(address, ChunkState(columns.state[row]))
            source = f", pointer at {format_address(holder)}" if holder else ""
            code_name = f"list_{error.name.lower()}"
            is_bin = columns.sentinel[row] != 0
            if is_bin and holder == 0 and columns.heads[row] in (0, columns.sentinel[row]) and place == 0:
                code_name, expected = "bin_head_damaged", "fd and bk of its own address, or of chunks"
                address, observed = columns.sentinel[row], f"fd {format_address(columns.heads[row])}"
            anomaly = Anomaly(code_name, address, f"{where}: {expected}", f"{observed}{source}", arena)
            anomaly = self._with_words(anomaly, error, columns, outcome, row, position, place, wanted)
            if columns.state[row] == ChunkState.UNSORTED_BIN and arena is not None:
                self.judge.open_arenas.add(arena)
            counted = columns.expected[row]
            if (
                error is ListError.COUNT_MISMATCH
                and self.layout.generation.tcache_follows_counts
                and counted > position
            ):
                # malloc takes its word for it and goes on behind the last block.
                anomaly = replace(anomaly, code="tcache_count_too_high")
            # A link that no release ever stores is there at no moment.
            never = error in LINK_ERRORS and not self._is_own_place(anomaly, error, address)
            self.anomalies.append(
                self.judge.judged(
                    anomaly,
                    ChunkState(columns.state[row]).label,
                    columns.threads[row],
                    Moment.NEVER if never else None,
                )
            )

    def _with_words(
        self,
        anomaly: Anomaly,
        error: ListError,
        columns: ListColumns,
        outcome: OverlayOutcome,
        row: int,
        position: int,
        place: int,
        wanted: int,
    ) -> Anomaly:
        """The anomaly with the word that is wrong: a link, a head, a key, a size word's flag, or a count."""
        if error is ListError.COUNT_MISMATCH:
            return replace(
                anomaly,
                word_address=columns.count_places[row],
                observed_word=self._recorded(columns, row),
                expected_word=self._as_recorded(int(outcome.count[row])),
            )
        header = anomaly.address if self.index.chunk_starting_at(anomaly.address) >= 0 else None
        if error in (ListError.MISALIGNED, ListError.NOT_A_CHUNK_START):
            header = None
        if place == NO_WORD:
            return replace(anomaly, header_address=header)
        stored = self.judge.word_at(place or columns.head_places[row])
        expected: int | None = wanted if wanted != NO_WORD else None
        if error in (ListError.LOOKS_IN_USE, ListError.LOOKS_FREE) and stored is not None:
            expected = stored ^ PREV_INUSE
        counted = columns.expected[row]
        if expected is None and counted == position and error in END_ERRORS:
            # malloc's count says that the list ended here: a null link, which safe linking stores as the word's own place.
            safe = self.layout.generation.safe_linking and place
            expected = place >> SAFE_LINKING_SHIFT if safe else 0
        leads_nowhere = error in (ListError.MISALIGNED, ListError.NOT_A_CHUNK_START)
        if not place and leads_nowhere and columns.sentinel[row] == 0 and stored:
            of_tcache = columns.state[row] == ChunkState.TCACHE
            popped = self._links.popped_blocks(stored, (columns.low[row], columns.high[row]), of_tcache)
            if len(popped) == 1:
                return self._of_popped(anomaly, popped[0])
            if popped:
                names = ", ".join(format_address(one.header + self.geometry.header_bytes) for one in popped)
                anomaly = replace(
                    anomaly, observed=f"{anomaly.observed}; the link of one of the blocks {names}, given out since"
                )
        return replace(
            anomaly,
            word_address=place or columns.head_places[row],
            observed_word=stored,
            expected_word=expected,
            header_address=header,
        )

    def _of_popped(self, anomaly: Anomaly, popped: Popped) -> Anomaly:
        """The anomaly of a head that malloc took from a block that was written to while it was cached."""
        confidence = anomaly.confidence
        may_be_freed = anomaly.code != "list_misaligned" and self.memory.region_index(anomaly.address) is not None
        if may_be_freed or not self.layout.generation.safe_linking:
            # Freed there, it is a sound link that the block still holds; without safe linking the program may have the word twice.
            confidence = min(confidence, Confidence.PLAUSIBLE, key=lambda level: level.rank)
        return replace(
            anomaly,
            observed=f"{anomaly.observed}, as the link of a block that malloc has given out since",
            word_address=popped.place,
            observed_word=popped.word,
            header_address=popped.header,
            confidence=confidence,
        )

    def _recorded(self, columns: ListColumns, row: int) -> int | None:
        """The count of a list as the tcache holds it."""
        field = self.layout.tcache.fields["counts"] if self.layout.tcache is not None else None
        if field is None:
            return None
        try:
            return int.from_bytes(self.memory.read(columns.count_places[row], field.element_bytes), "little")
        except MemoryFault:
            return None

    def _as_recorded(self, count: int) -> int | None:
        """How the tcache would hold a count: as it is, or as the slots that are left (2.42+)."""
        if not self.layout.generation.tcache_counts_free_slots:
            return count
        return None if self._slots is None or count > self._slots else self._slots - count

    def _is_own_place(self, anomaly: Anomaly, error: ListError, address: int) -> bool:
        """Whether a link leads into heap memory, malloc's own lists or nowhere, as all that malloc stores do."""
        pointer = address if error in (ListError.MISALIGNED, ListError.NOT_A_CHUNK_START) else anomaly.observed_word
        if pointer is None or pointer == 0:
            return True
        if self.index.region_containing(pointer) >= 0:
            return pointer % self.geometry.alignment in (self.geometry.granule_phase, 0)
        return any(start <= pointer < end for start, end in self._own)

    def _note_hidden(self, pointer: int, kind: ChunkState) -> None:
        """Remember a pointer of a list that leads inside of a live chunk: that chunk's size may be wrong."""
        header = pointer - (self.geometry.header_bytes if kind is ChunkState.TCACHE else 0)
        chunk = self.index.chunk_containing(header) if header >= 0 else -1
        if 0 <= chunk < self.index.region_chunks and self.index.state[chunk] in (
            ChunkState.IN_USE,
            ChunkState.FREE_UNLISTED,
        ):
            self.hidden_starts.append(header)

    def _leads_to_unknown_memory(self, error: ListError, address: int) -> bool:
        """Whether an error only says that the list's next chunk is where the core holds nothing that could be walked."""
        return error is ListError.NOT_SAVED or (
            error is ListError.NOT_A_CHUNK_START and self._is_unknown_memory(address)
        )

    def _is_unknown_memory(self, address: int | None) -> bool:
        """Whether the process had memory at an address of which the core shows no chunks."""
        return address is not None and (
            any(address in part for part in self.left_out)
            or (
                self.memory.region_index(address) is not None
                and not self.memory.is_saved(address, address + self.geometry.word_bytes)
            )
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
