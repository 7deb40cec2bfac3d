"""Contradictions in malloc's own structures, and free chunks that no list has.

Knows: which values the fields of malloc_state, heap_info, malloc_par and tcache_perthread_struct can have, and what a
free chunk must be. Does not know: headers of chunks in use (``walk``), links of lists (``overlay``), the content of free
chunks (``content``), or who did it (``forensics``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts, ArenaSurvey
from coreheap.allocators.glibc.content import changed_content, fill_byte
from coreheap.allocators.glibc.identify import Identification
from coreheap.allocators.glibc.judgement import NOBODY, Judge
from coreheap.allocators.glibc.overlay import Overlay
from coreheap.allocators.glibc.records import BIN_COUNT, Layout
from coreheap.allocators.glibc.structures import FLAGS, PREV_INUSE
from coreheap.allocators.glibc.tcache import Cache, slots_of_empty_lists
from coreheap.allocators.glibc.walk import ANOMALIES_KEPT, HeapWalk
from coreheap.corefile import Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Anomaly
from coreheap.heap import ChunkTable, FreeList, RegionKind
from coreheap.kernels import ChunkState, StopReason, chunk_extents
from coreheap.quantities import format_address

BITS_OF_A_MAP_WORD = 32
FASTCHUNKS_AND_CORRUPT_BITS = 5
NONCONTIGUOUS_BIT = 2
MOST_MUTEX = 2
"""A low-level lock is 0 (free), 1 (taken) or 2 (taken, with waiters)."""

MOST_ATTACHED = 1 << 22
"""More threads than a Linux process can have (PID_MAX_LIMIT)."""

LARGEST_SETTING = 1 << 56
"""More memory than any address space has."""
WORD_BYTES_32 = 4

MOST_TCACHE_COUNT = 65535
TCACHE_SMALL_BINS = 64
LARGEST_PAGE_BYTES = 16 << 30
"""The largest huge page of any Linux architecture."""


class Integrity:
    """Checks one process's heap after its walk and its lists; ``anomalies`` are described, ``anomaly_count`` counts all."""

    def __init__(self, core: Core, layout: Layout, survey: ArenaSurvey, walk: HeapWalk, overlay: Overlay, judge: Judge):
        self.core = core
        self.layout = layout
        self.survey = survey
        self.walk = walk
        self.overlay = overlay
        self.judge = judge
        self.word = layout.word_class.word_bytes
        self.anomalies: list[Anomaly] = []
        self.anomaly_count = 0

    def check(self, copies: tuple[Identification, ...], caches: list[list[Cache]], chunks: ChunkTable) -> None:
        """Everything; ``caches`` by copy of malloc."""
        bins_of, members_of = self._filled_bins(), self._members()
        for facts in self.survey.arenas:
            fields = self._state_fields(facts, members_of[facts.copy])
            for anomaly in (*fields, *self._binmap(facts, bins_of.get(facts.index, ())), *self._last_remainder(facts)):
                self._note(anomaly)
        for anomaly in self._fenceposts():
            self._note(anomaly)
        for copy, of_copy in zip(copies, caches, strict=True):
            for anomaly in self._parameters(copy):
                self._note(anomaly)
            count = copy.parameters.values.get("tcache_count") if copy.parameters is not None else None
            slots = slots_of_empty_lists(self.layout, of_copy, count)
            if copy.parameters is not None and slots != count and count is not None:
                place = copy.parameters.address + self.layout.parameters.offset("tcache_count")
                self._note(
                    Anomaly(
                        "malloc_par_damaged",
                        copy.parameters.address,
                        f"mp_.tcache_count: {slots}, as the empty lists of tcaches have slots",
                        f"{count:#x}",
                        word_address=place,
                        observed_word=count,
                        expected_word=slots,
                    )
                )
            for cache in of_copy:
                self._tcache_counts(cache, slots)
        self._unlisted_chunks()
        fill = fill_byte(self.core)
        if fill is not None:
            for anomaly in changed_content(self.core, self.layout, chunks, self.judge, fill):
                self._keep(anomaly)

    def _keep(self, anomaly: Anomaly) -> None:
        self.anomaly_count += 1
        if len(self.anomalies) < ANOMALIES_KEPT:
            self.anomalies.append(anomaly)

    def _note(self, anomaly: Anomaly, place: str = "", thread: int | None = None) -> None:
        self._keep(self.judge.judged(anomaly, place, thread))

    # malloc_state

    def _members(self) -> dict[int, set[int | None]]:
        """The addresses of all arenas, by copy of malloc."""
        members: dict[int, set[int | None]] = {}
        for facts in self.survey.arenas:
            members.setdefault(facts.copy, set()).add(facts.address)
        return members

    def _state_fields(self, facts: ArenaFacts, members: Collection[int | None]) -> Iterator[Anomaly]:
        """Fields whose values are few: mutex, flags, attached_threads, next_free, system_mem."""
        state, fields = facts.state, self.layout.state
        if state is None or state.is_unused:
            return

        def wrong(name: str, observed: int, text: str, wanted: int | None = None) -> Anomaly:
            code = "system_mem_damaged" if name in ("system_mem", "max_system_mem") else "malloc_state_damaged"
            return Anomaly(
                code,
                facts.address or 0,
                f"{name}: {text}",
                f"{observed:#x}",
                facts.index,
                word_address=state.address + fields.offset(name),
                observed_word=observed,
                expected_word=wanted,
            )

        if state.mutex > MOST_MUTEX:
            yield wrong("mutex", state.mutex, "0, 1 or 2")
        allowed = NONCONTIGUOUS_BIT | (
            FASTCHUNKS_AND_CORRUPT_BITS if self.layout.generation.flags_hold_fastchunks else 0
        )
        if state.flags & ~allowed:
            yield wrong("flags", state.flags, "no bits that the release does not have", state.flags & allowed)
        elif not facts.is_main and not state.flags & NONCONTIGUOUS_BIT:
            yield wrong("flags", state.flags, "NONCONTIGUOUS_BIT in a non-main arena", state.flags | NONCONTIGUOUS_BIT)
        if state.attached_threads is not None and state.attached_threads > MOST_ATTACHED:
            yield wrong("attached_threads", state.attached_threads, "a number of threads")
        if state.system_mem > state.max_system_mem:
            yield wrong("max_system_mem", state.max_system_mem, f"at least system_mem, {state.system_mem:#x}")
        if state.next_free and state.next_free not in members and not self._ring_is_open(facts.copy):
            yield wrong("next_free", state.next_free, "0 or an arena")

    def _ring_is_open(self, copy: int) -> bool:
        return copy in self.survey.open_rings

    def _filled_bins(self) -> dict[int | None, list[FreeList]]:
        """The small and large bins that hold chunks, by arena."""
        found: dict[int | None, list[FreeList]] = {}
        for free_list in self.overlay.lists:
            if free_list.count and free_list.kind in (ChunkState.SMALL_BIN, ChunkState.LARGE_BIN):
                found.setdefault(free_list.arena, []).append(free_list)
        return found

    def _binmap(self, facts: ArenaFacts, bins: Sequence[FreeList]) -> Iterator[Anomaly]:
        """A bin with chunks whose bit is clear: malloc would not look into it. A set bit of an empty bin is cleared later."""
        if facts.state is None:
            return
        place = facts.state.address + self.layout.state.offset("binmap")
        try:
            raw = self.core.memory.read(place, BIN_COUNT // 8 + 1)
        except MemoryFault:
            return
        words = np.frombuffer(raw, "<u4").tolist()
        for free_list in bins:
            row, bit = divmod(free_list.number, BITS_OF_A_MAP_WORD)
            if not words[row] >> bit & 1:
                yield Anomaly(
                    "binmap_bit_missing",
                    place + 4 * row,
                    f"bit {bit} for bin {free_list.number}, which holds {free_list.count} chunks",
                    f"{words[row]:#x}",
                    facts.index,
                    word_address=place + 4 * row,
                    observed_word=words[row],
                    expected_word=words[row] | 1 << bit,
                )

    def _last_remainder(self, facts: ArenaFacts) -> Iterator[Anomaly]:
        """It is never cleared, so it may lead to what is no chunk any more; but only to where a chunk could have been."""
        state = facts.state
        if state is None or not state.last_remainder:
            return
        aligned = state.last_remainder % self.layout.word_class.alignment == self.layout.word_class.granule_phase
        place = facts.brk_range
        outside = place is not None and not (
            place.start <= state.last_remainder < place.start + max(state.max_system_mem, place.byte_count)
        )
        if not aligned or outside:
            yield Anomaly(
                "last_remainder_damaged",
                state.last_remainder,
                "a pointer to where a chunk of the arena could be",
                "a misaligned pointer" if not aligned else "a pointer out of the arena",
                facts.index,
                word_address=state.address + self.layout.state.offset("last_remainder"),
                observed_word=state.last_remainder,
            )

    # Ends of sub-heaps

    def _fenceposts(self) -> Iterator[Anomaly]:
        """The end marker of a retired sub-heap leads back to the fencepost before it; heap_trim follows that."""
        alignment = self.layout.word_class.alignment
        for region in self.walk.regions:
            if region.stop_reason is not StopReason.FENCEPOSTS_HEAP or region.stretch.kind is not RegionKind.ARENA_HEAP:
                continue
            marker = region.end - alignment
            back = self.judge.word_at(marker)
            if back is None:
                continue
            fence = marker - back
            size_word = self.judge.word_at(fence + self.word) if region.start <= fence < marker else None
            if size_word is None or size_word & ~FLAGS != back:
                yield Anomaly(
                    "fencepost_damaged",
                    marker,
                    "prev_size of the end marker leads to the fencepost before it",
                    f"prev_size {back:#x}",
                    region.stretch.arena,
                    word_address=marker,
                    observed_word=back,
                    header_address=marker,
                )

    # malloc_par

    def _parameters(self, copy: Identification) -> Iterator[Anomaly]:
        """What no setting and no order of calls makes of mp_ (mallopt, tunables, sysmalloc_mmap; 2.12-2.44)."""
        if copy.parameters is None:
            return
        values, fields, address = copy.parameters.values, self.layout.parameters, copy.parameters.address
        mapped = len(self.walk.index.mmapped)
        powers = (0, *(1 << bit for bit in range(12, LARGEST_PAGE_BYTES.bit_length())))

        def limits() -> Iterator[tuple[str, bool, str]]:
            # Of the two the one that the headers contradict is wrong.
            name = "n_mmaps" if mapped <= values["max_n_mmaps"] else "max_n_mmaps"
            yield name, values["n_mmaps"] <= values["max_n_mmaps"], "n_mmaps at most max_n_mmaps"
            yield "max_mmapped_mem", values["mmapped_mem"] <= values["max_mmapped_mem"], "at least mmapped_mem"
            yield "no_dyn_threshold", values["no_dyn_threshold"] <= 1, "0 or 1"
            for name in ("thp_pagesize", "hp_pagesize"):
                yield name, values.get(name, 0) in powers, "0 or a power of two"
            yield "tcache_bins", values.get("tcache_bins", TCACHE_SMALL_BINS) <= TCACHE_SMALL_BINS, "at most 64"
            yield "tcache_count", values.get("tcache_count", 0) <= MOST_TCACHE_COUNT, "at most 65535"

            most = (1 << 8 * self.word) - 1
            for name in ("mmap_threshold", "trim_threshold", "top_pad"):
                # -1 stands for never; between any size that a process can have and that there is nothing.
                is_size = values[name] <= LARGEST_SETTING or values[name] in (most, most >> 1)
                yield name, is_size or self.word == WORD_BYTES_32, "a size, or the largest number"

        for name, holds, text in limits():
            if not holds:
                yield Anomaly(
                    "malloc_par_damaged",
                    address,
                    f"mp_.{name}: {text}",
                    f"{values[name]:#x}",
                    word_address=address + fields.offset(name),
                    observed_word=values[name],
                )

    # tcache_perthread_struct

    def _tcache_counts(self, cache: Cache, tcache_count: int | None) -> None:
        """Counts of empty lists; those of others are compared where the lists are followed."""
        fields = self.layout.tcache
        if fields is None:
            return
        counts, entries = cache.state.counts, cache.state.entries
        follows = self.layout.generation.tcache_follows_counts
        code = "tcache_count_too_high" if follows else "tcache_entry_without_count"
        if self.layout.generation.tcache_counts_free_slots:
            if tcache_count is None:
                return
            wanted = tcache_count
            wrong = (counts != np.uint64(tcache_count)) & (entries == 0)
        else:
            wanted = 0
            wrong = (counts != 0) & (entries == 0)
        for number in np.flatnonzero(wrong).tolist():
            place = cache.address + fields.offset("counts") + number * fields.fields["counts"].element_bytes
            self._note(
                Anomaly(
                    code,
                    cache.address,
                    f"tcache {number}: {wanted}, the count of an empty list",
                    f"{int(counts[number])}",
                    word_address=place,
                    observed_word=int(counts[number]),
                    expected_word=wanted,
                    header_address=cache.address - 2 * self.word,
                ),
                thread=cache.thread if cache.thread is not None else NOBODY,
            )

    # Free chunks

    def _unlisted_chunks(self) -> None:
        """Free chunks by their headers that no list has, in arenas whose lists were all followed to their ends."""
        index = self.walk.index
        open_arenas = {arena for arena, _kind, _number in self.overlay.open_lists}
        for number, region in enumerate(self.walk.regions):
            facts = self.survey.arenas[region.stretch.arena]
            if facts.state is None or facts.index in open_arenas:
                continue
            first = int(index.region_first_chunk[number])
            states = index.state[first : first + int(index.region_chunk_count[number])]
            chunks = first + np.flatnonzero(states == ChunkState.FREE_UNLISTED)
            room = max(0, ANOMALIES_KEPT - len(self.anomalies))
            self.anomaly_count += max(0, len(chunks) - room)
            headers, sizes = chunk_extents(index, chunks[:room].astype(np.int64))
            for header, size in zip(headers.tolist(), sizes.tolist(), strict=True):
                self._note(self._unlisted(header, size, facts.index))

    def _unlisted(self, header: int, size: int, arena: int) -> Anomaly:
        place = header + size + self.word
        size_word, footer = self.judge.word_at(place), self.judge.word_at(header + size)
        looks_freed = footer == size
        return Anomaly(
            "free_unlisted",
            header,
            "a free chunk on a list, or PREV_INUSE set behind it",
            f"PREV_INUSE clear, prev_size {'is' if looks_freed else 'is not'} its size, and no list leads to"
            f" {format_address(header)}",
            arena,
            word_address=None if looks_freed else place,
            observed_word=None if looks_freed else size_word,
            expected_word=None if looks_freed or size_word is None else size_word | PREV_INUSE,
            header_address=header,
        )
