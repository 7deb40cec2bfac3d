"""What a contradiction means: glibc's message for it, whether a thread held the arena's lock, how sure it is damage.

Knows: ``messages`` (data), locks, and where threads stand. Does not know: how contradictions are found (``walk``, ``overlay``,
``integrity``), or who made them (``forensics``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.free_checks import (
    REALLOC,
    Freed,
    arena_of,
    first_failing,
)
from coreheap.allocators.glibc.identify import Identification
from coreheap.allocators.glibc.locate import WRITABLE
from coreheap.allocators.glibc.messages import RULES, UNKNOWN_RULE, Moment, Said, messages_for, releases_of
from coreheap.allocators.glibc.standing import SIGABRT, Standing, Standings, touched
from coreheap.allocators.glibc.structures import FLAGS, IS_MMAPPED, NON_MAIN_ARENA, PREV_INUSE, WORDS_OF_A_FREE_CHUNK
from coreheap.corefile import Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Anomaly, Confidence
from coreheap.kernels import ChunkIndex, ChunkState, WalkAnomaly, chunk_extents

NO_SUSPECTS, DEAD_SUSPECTS, LIVING_SUSPECTS = "none", "died there", "living"

WRITTEN_TOGETHER = frozenset(
    {
        "broken_chunk",
        "size_leads_into_a_chunk",
        "prev_size_mismatch",
        "arena_flag_mismatch",
        "top_size_mismatch",
        "top_damaged",
        "top_not_at_end_of_brk",
        "free_before_top",
    }
)
"""Codes of sizes and flags, which malloc writes when all its checks are done."""

OF_THE_ARENA = frozenset(
    {
        "top_size_mismatch",
        "top_damaged",
        "top_not_at_end_of_brk",
        "top_not_reached",
        "free_before_top",
        "more_than_system_mem",
        "marker_without_fencepost",
        "sub_heap_not_linked",
        "heap_info_damaged",
        "sub_heap_header_damaged",
        "fencepost_damaged",
    }
)
"""Codes of what malloc changes when it grows or shrinks an arena: it holds the arena then, not always the chunk."""

MET_BY_FREE = frozenset(
    {
        "broken_chunk",
        "size_leads_into_a_chunk",
        "mmapped_flag_inside",
        "arena_flag_mismatch",
        "prev_size_mismatch",
        "free_unlisted",
    }
)
"""Codes of headers that free reads, of a chunk or of the next one."""

OF_THE_CHUNK_BEHIND = frozenset({"prev_size_mismatch", "free_unlisted"})
"""Codes that the header behind a chunk makes."""

MAY_BE_FREED = (ChunkState.IN_USE, ChunkState.DAMAGED, ChunkState.FREE_UNLISTED)

BELONGS_TO_CHUNK = (ChunkState.UNSORTED_BIN, ChunkState.SMALL_BIN, ChunkState.LARGE_BIN)
LABELS_OF_BINS = frozenset(state.label for state in BELONGS_TO_CHUNK)

WALK_CODES = frozenset({"broken_chunk", "top_not_reached", *(anomaly.name.lower() for anomaly in WalkAnomaly)})

FLAG_OF_CODE = {
    "mmapped_flag_inside": IS_MMAPPED,
    "arena_flag_mismatch": NON_MAIN_ARENA,
    "first_chunk_previous_free": PREV_INUSE,
    "free_before_top": PREV_INUSE,
}
"""The one flag of a size word that is wrong."""

NOBODY = -1
"""The thread of a tcache whose thread is not in the core."""


class Judge:
    """Completes anomalies of one process's heap."""

    def __init__(
        self,
        core: Core,
        copies: tuple[Identification, ...],
        arenas: tuple[ArenaFacts, ...],
        index: ChunkIndex | None = None,
    ) -> None:
        self.core = core
        self.memory = core.memory
        self.layout = copies[0].layout
        self.release = copies[0].libc_version.release if copies[0].libc_version is not None else None
        self.arenas = arenas
        self.index = index
        self.open_arenas: set[int] = set()
        """Arenas whose unsorted list is broken: malloc may have died of that while it was putting a chunk on it."""
        self._mallocs = [core.module_at(copy.ring.main) for copy in copies if copy.ring.main is not None]
        self.has_one_thread = len(core.threads) <= 1
        self._glibc_stopped_itself = core.process.signal == SIGABRT and not self._has_no_last_words()

    @cached_property
    def _standings(self) -> Standings:
        """Threads inside malloc; asked for only where something contradicts itself."""
        return Standings(self.core, self._mallocs, self._glibc_stopped_itself, self._heap_was_barred())

    def _heap_was_barred(self) -> bool:
        """Whether the process ended where malloc may not write to memory of an arena: malloc itself never protects or unmaps that."""
        place = self.core.process.fault_address
        if place is None:
            return False
        ranges = [(arena.brk_range.start, arena.brk_range.end) for arena in self.arenas if arena.brk_range is not None]
        heaps = [heap for arena in self.arenas for heap in arena.sub_heaps]
        ranges += [(heap.address, heap.address + min(heap.size, heap.mprotect_size)) for heap in heaps]
        region = self.memory.region_index(place)
        is_writable = region is not None and bool(self.memory.region_flags[region] & WRITABLE)
        return not is_writable and any(start <= place < end for start, end in ranges)

    # What a contradiction means

    def judged(
        self, anomaly: Anomaly, place: str = "", thread: int | None = None, moment: Moment | None = None
    ) -> Anomaly:
        """The anomaly with glibc's message, its arena's lock and its confidence; ``place`` as in ``messages``.

        ``thread``: whose tcache it is about, which no lock guards; NOBODY for a thread that is not in the core. ``moment``: when
        malloc could leave this very contradiction, where its words say more than its code does.
        """
        rule = RULES.get(anomaly.code, UNKNOWN_RULE)
        facts = self.arenas[anomaly.arena] if anomaly.arena is not None else None
        locked = facts.state.mutex != 0 if facts is not None and facts.state is not None else None
        confidence = min(rule.confidence, anomaly.confidence, key=lambda level: level.rank)
        suspects = self._suspects(anomaly, moment or rule.moment, locked, thread)
        if suspects is not NO_SUSPECTS:
            confidence = min(confidence, Confidence.PLAUSIBLE, key=lambda level: level.rank)
        said = (Said(anomaly.message),) if anomaly.message else self._messages(anomaly, place)
        return replace(
            anomaly,
            message=next((one.text for one in said if not one.is_later), None),
            messages=tuple(dict.fromkeys(one.text for one in said)),
            arena_locked=locked,
            confidence=confidence,
            may_be_of_the_moment=suspects is LIVING_SUSPECTS,
        )

    def _messages(self, anomaly: Anomaly, place: str) -> tuple[Said, ...]:
        """What glibc may say of an anomaly, the likeliest first.

        Of chunks in use free's own checks are asked in their order: first with the block before, which a header's writer often
        is, then with the chunk itself.
        """
        of_code = messages_for(anomaly.code, place, self.layout.generation, self.release)
        if self.index is None or anomaly.code not in MET_BY_FREE or place in LABELS_OF_BINS:
            return of_code
        header = anomaly.header_address if anomaly.header_address is not None else anomaly.address
        chunk = self.index.chunk_starting_at(header)
        if anomaly.code in OF_THE_CHUNK_BEHIND:
            chunk = chunk + 1 if chunk >= 0 else -1
        if not 0 <= chunk < self.index.region_chunks or anomaly.arena is None:
            return of_code
        by_free = (self._said_by_free(chunk - 1, anomaly.arena), self._said_by_free(chunk, anomaly.arena))
        by_realloc = REALLOC if anomaly.code == "broken_chunk" else ()
        return (*(Said(text) for text in by_free if text is not None), *of_code, *by_realloc)

    def _said_by_free(self, chunk: int, arena: int) -> str | None:
        """What glibc says when it frees a chunk that is in use now; None for others, and where it says nothing."""
        assert self.index is not None
        if chunk < 0 or self.index.state[chunk] not in MAY_BE_FREED:
            return None
        header = int(chunk_extents(self.index, np.array([chunk], np.int64))[0][0])
        size_word = self.word_at(header + self.memory.word_bytes)
        if size_word is None:
            return None
        facts = self.arenas[arena]
        main = next((other for other in self.arenas if other.is_main and other.copy == facts.copy), None)
        asked = arena_of(size_word, facts, main)
        freed = Freed(self.memory, self.layout.geometry, self.core.page_bytes, header, size_word, asked)
        return first_failing(freed, releases_of(self.layout.generation, self.release)[0])

    def _suspects(self, anomaly: Anomaly, moment: Moment, locked: bool | None, thread: int | None) -> str:
        """Whether threads inside malloc may have left a contradiction for a moment: none, one that died there, or others."""
        if moment is Moment.NEVER:
            return NO_SUSPECTS
        if thread == NOBODY:
            # fork waits for no tcache: the child has those of the parent's other threads as they were just then.
            return LIVING_SUSPECTS
        standings = self._standings
        if not standings.are_all_known:
            return LIVING_SUSPECTS
        if thread is None and anomaly.arena is not None:
            if not locked and not self.has_one_thread:
                return NO_SUSPECTS
            if locked and not standings.inside:
                # Somebody has the lock whom the core does not show inside.
                return LIVING_SUSPECTS
        # With one thread malloc takes no lock (2.26 on), and nothing ever locks a tcache or mp_'s counters.
        suspects = [standing for standing in standings.inside if standing.covers(moment)]
        if thread is not None:
            suspects = [standing for standing in suspects if standing.thread == thread]
        elif anomaly.arena is not None:
            places = self._places_of(anomaly)
            suspects = [
                standing
                for standing in suspects
                if self._may_write(standing, anomaly) and (not places or touched(standing, places))
            ]
        if not suspects:
            return NO_SUSPECTS
        return DEAD_SUSPECTS if all(standing.died_here for standing in suspects) else LIVING_SUSPECTS

    def _may_write(self, standing: Standing, anomaly: Anomaly) -> bool:
        """Whether malloc could have been between the stores of a contradiction when what it met ended the process.

        It stops, and follows pointers, before it writes sizes; only a broken unsorted list is met in between (_int_free,
        malloc_consolidate, 2.12-2.44).
        """
        return not standing.died_here or anomaly.code not in WRITTEN_TOGETHER or anomaly.arena in self.open_arenas

    def _places_of(self, anomaly: Anomaly) -> set[int]:
        """Addresses of which malloc must hold one to leave a contradiction: of its chunk, of neighbours, of the arena."""
        words = {
            anomaly.address,
            anomaly.header_address,
            anomaly.word_address,
            anomaly.observed_word,
            anomaly.expected_word,
        }
        places = {word for word in words if word}
        facts = self.arenas[anomaly.arena] if anomaly.arena is not None else None
        state = facts.state if facts is not None else None
        if state is not None:
            end = state.address + self.layout.state.byte_count
            if anomaly.code in OF_THE_ARENA or any(state.address <= word < end for word in places):
                places.update(range(state.address, end, self.memory.word_bytes))
        if anomaly.header_address is not None and anomaly.observed_word is not None:
            # A chunk that is being split: what is left of it begins where its new size ends.
            places.update(self._words_from(anomaly.header_address + (anomaly.observed_word & ~FLAGS)))
        if self.index is None:
            return places
        for word in tuple(places):
            for chunk in self._chunks_around(word):
                header = int(chunk_extents(self.index, np.array([chunk], np.int64))[0][0])
                places.update(self._words_from(header))
        return places

    def _words_from(self, header: int) -> range:
        """Where malloc may write in a chunk."""
        return range(header, header + WORDS_OF_A_FREE_CHUNK * self.memory.word_bytes, self.memory.word_bytes)

    def _chunks_around(self, address: int) -> range:
        """The chunk that holds an address, and its neighbours."""
        assert self.index is not None
        chunk = self.index.chunk_containing(address)
        if chunk < 0:
            return range(0)
        return range(max(0, chunk - 1), min(chunk + 2, self.index.region_chunks))

    def _has_no_last_words(self) -> bool:
        """Whether __abort_msg is known to be empty: then it was the program that aborted, not glibc (2.14-2.44)."""
        for module in self._mallocs:
            place = module.symbol_address("__abort_msg") if module is not None else None
            if place is None or self.word_at(place) != 0:
                return False
        return bool(self._mallocs)

    # The walk's anomalies

    def completed(self, anomaly: Anomaly, index: ChunkIndex) -> Anomaly:
        """An anomaly of the walk or the survey with the word that is wrong, and judged."""
        place = ""
        header = anomaly.address
        if anomaly.code in WALK_CODES and anomaly.expected_word is None and index.chunk_starting_at(header) >= 0:
            anomaly = self._with_words(anomaly, header, index)
        header_address = anomaly.header_address
        if header_address is not None:
            chunk = index.chunk_starting_at(header_address)
            if chunk >= 0 and index.state[chunk] in BELONGS_TO_CHUNK:
                place = ChunkState(int(index.state[chunk])).label
        moment = None
        if anomaly.code == "prev_size_mismatch" and place:
            # A chunk is put on a list and then gets its last words; glibc checks nothing in between.
            moment = Moment.BETWEEN_STORES
        if anomaly.code in ("broken_chunk", "top_size_mismatch", "top_not_at_end_of_brk", "top_damaged"):
            place = self._place_by_size(anomaly)
            if anomaly.code == "top_size_mismatch" and (place or (anomaly.observed_word or 0) & FLAGS != PREV_INUSE):
                # No size that top ever has: what lies there before malloc writes it.
                moment = Moment.BETWEEN_STORES
        if anomaly.code == "system_mem_damaged" and (anomaly.observed_word or 0) < (anomaly.expected_word or 0):
            place = "too_small"
        return self.judged(anomaly, place, moment=moment)

    def _with_words(self, anomaly: Anomaly, header: int, index: ChunkIndex) -> Anomaly:
        """An anomaly of a chunk with the word that is wrong, what it holds and what it should hold."""
        word = self.memory.word_bytes
        size = int(chunk_extents(index, np.array([index.chunk_starting_at(header)], np.int64))[1][0])
        place: int | None = header + word
        if anomaly.code == "prev_size_mismatch":
            place = header + size
        elif anomaly.code == "free_before_top":
            place = header + size + word
        elif anomaly.code == "adjacent_free":
            place = None
        observed = self.word_at(place) if place is not None else None
        expected: int | None = None
        if anomaly.code == "prev_size_mismatch":
            expected = size
        elif anomaly.code == "top_size_mismatch":
            end = self._end_of_top(anomaly, header)
            expected = None if end is None else (end - header) | PREV_INUSE
        elif observed is not None and anomaly.code in FLAG_OF_CODE:
            expected = observed ^ FLAG_OF_CODE[anomaly.code]
        return replace(
            anomaly, header_address=header, word_address=place, observed_word=observed, expected_word=expected
        )

    def _end_of_top(self, anomaly: Anomaly, header: int) -> int | None:
        """Where the heap ends that an arena's top lies in."""
        facts = self.arenas[anomaly.arena] if anomaly.arena is not None else None
        if facts is None:
            return None
        if facts.brk_range is not None and header in facts.brk_range:
            return facts.brk_range.end
        ends = [
            heap.address + heap.size for heap in facts.sub_heaps if heap.address <= header < heap.address + heap.size
        ]
        return ends[0] if ends else None

    def _place_by_size(self, anomaly: Anomaly) -> str:
        """What is wrong with a size word: ``too_small``, ``misaligned``, ``too_large`` (beyond system_mem), or "" for none."""
        word = anomaly.observed_word
        facts = self.arenas[anomaly.arena] if anomaly.arena is not None else None
        if anomaly.code in ("top_not_at_end_of_brk", "top_damaged"):
            word = self.word_at((word or 0) + self.memory.word_bytes)
        if word is None:
            return ""
        size = word & ~FLAGS
        if facts is not None and facts.state is not None and size > facts.state.system_mem:
            return "too_large"
        if size < self.layout.geometry.minimum_chunk_bytes:
            return "too_small"
        return "misaligned" if size % self.layout.geometry.alignment else ""

    def word_at(self, address: int) -> int | None:
        """The word at an address, None where it was not saved."""
        try:
            return self.memory.read_word(address)
        except MemoryFault:
            return None
