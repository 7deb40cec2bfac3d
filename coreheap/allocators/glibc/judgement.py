"""What a contradiction means: glibc's message for it, whether a thread held the arena's lock, how sure it is damage.

Knows: ``messages`` (data), locks, and where threads stand. Does not know: how contradictions are found (``walk``, ``overlay``,
``integrity``), or who made them (``forensics``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.identify import Identification
from coreheap.allocators.glibc.messages import RULES, UNKNOWN_RULE, Moment, message_for
from coreheap.allocators.glibc.structures import FLAGS, IS_MMAPPED, NON_MAIN_ARENA, PREV_INUSE
from coreheap.corefile import Core
from coreheap.corefile.interruptions import Interruption, interruptions
from coreheap.corefile.threads import Thread
from coreheap.errors import MemoryFault
from coreheap.evidence import Anomaly, Confidence
from coreheap.kernels import ChunkIndex, ChunkState, WalkAnomaly, chunk_extents

SIGABRT = 6
SIGNALS_OF_FAULTS = frozenset((4, SIGABRT, 7, 8, 11))
"""SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV."""
BELONGS_TO_CHUNK = (ChunkState.UNSORTED_BIN, ChunkState.SMALL_BIN, ChunkState.LARGE_BIN)

WALK_CODES = frozenset({"broken_chunk", "top_not_reached", *(anomaly.name.lower() for anomaly in WalkAnomaly)})

FLAG_OF_CODE = {
    "mmapped_flag_inside": IS_MMAPPED,
    "arena_flag_mismatch": NON_MAIN_ARENA,
    "first_chunk_previous_free": PREV_INUSE,
    "free_before_top": PREV_INUSE,
}
"""The one flag of a size word that is wrong."""

SYSCALLS_OF_MALLOC = {
    "x86_64": ("orig_rax", frozenset((9, 10, 11, 12, 25, 28))),
    "i386": ("orig_eax", frozenset((45, 90, 91, 125, 163, 192, 219))),
}
"""Where the number of the system call is that a thread is in, and those that malloc makes in the middle of an operation: brk,
mmap, munmap, mremap, mprotect, madvise (arch/x86/entry/syscalls). aarch64's core does not say which call it is."""

MOST_UNFINISHED_FIRST = (Moment.BETWEEN_STORES, Moment.BETWEEN_STEPS)

NOBODY = -1
"""The thread of a tcache whose thread is not in the core."""

SYSCALL_BYTES = 2
"""The length of the instruction ``syscall``, which leaves the address behind it in rcx (x86_64)."""

MOST_THREADS = 1 << 12
"""Threads that are asked where they stand; with more, every moment is possible."""


class Judge:
    """Completes anomalies of one process's heap."""

    def __init__(self, core: Core, copies: tuple[Identification, ...], arenas: tuple[ArenaFacts, ...]) -> None:
        self.core = core
        self.memory = core.memory
        self.layout = copies[0].layout
        self.release = copies[0].libc_version.release if copies[0].libc_version is not None else None
        self.arenas = arenas
        self._mallocs = [core.module_at(copy.ring.main) for copy in copies if copy.ring.main is not None]
        self.has_one_thread = len(core.threads) <= 1
        self._glibc_stopped_itself = core.process.signal == SIGABRT and not self._has_no_last_words()

    @cached_property
    def _moments(self) -> dict[int, Moment]:
        """Where threads are in malloc, by their index; asked for only where something contradicts itself."""
        return {thread.index: self._stands(thread) for thread in self.core.threads[:MOST_THREADS]}

    @cached_property
    def _between_stores(self) -> set[int]:
        return {index for index, moment in self._moments.items() if moment is Moment.BETWEEN_STORES}

    @cached_property
    def _between_steps(self) -> set[int]:
        return {index for index, moment in self._moments.items() if moment is not Moment.NEVER}

    @property
    def _died_of_itself(self) -> bool:
        """Whether what a thread met may have ended the process: then a thread inside malloc may have met the contradiction."""
        process = self.core.process
        return process.signal in SIGNALS_OF_FAULTS and process.sender_pid in (None, process.pid)

    @property
    def _nobody_between_stores(self) -> bool:
        """glibc stops itself between steps. With nobody else inside malloc, no list is half changed."""
        is_stopped = self.core.process.signal == SIGABRT and len(self.core.threads) <= MOST_THREADS
        return is_stopped and not self._between_stores

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
        is_of_the_moment = self._may_be_of_the_moment(moment or rule.moment, locked, thread, facts is not None)
        if is_of_the_moment:
            confidence = min(confidence, Confidence.PLAUSIBLE, key=lambda level: level.rank)
        message = anomaly.message or message_for(anomaly.code, place, self.layout.generation, self.release)
        return replace(
            anomaly,
            message=message,
            arena_locked=locked,
            confidence=confidence,
            may_be_of_the_moment=is_of_the_moment and (thread == NOBODY or not self._died_of_itself),
        )

    def _may_be_of_the_moment(self, moment: Moment, locked: bool | None, thread: int | None, is_of_arena: bool) -> bool:
        """Whether malloc itself may have left a contradiction of a kind, as far as locks and threads tell."""
        if moment is Moment.NEVER:
            return False
        if thread == NOBODY:
            # fork waits for no tcache: the child has those of the parent's other threads as they were just then.
            return True
        if moment is Moment.BETWEEN_STORES and self._nobody_between_stores:
            return False
        if locked:
            return True
        if is_of_arena and not self.has_one_thread:
            return False
        # With one thread malloc takes no lock (2.26 on), and nothing ever locks a tcache or mp_'s counters.
        busy = self._between_stores if moment is Moment.BETWEEN_STORES else self._between_steps
        aborting = moment is Moment.BETWEEN_STEPS and self._glibc_stopped_itself
        if thread is not None:
            return thread in busy or (aborting and thread == 0)
        return bool(busy) or aborting or len(self.core.threads) > MOST_THREADS

    def _stands(self, thread: Thread) -> Moment:
        """Where a thread may be in malloc: outside, between two steps (in a system call), or anywhere.

        A signal handler may have come in the middle of it, too.
        """
        moments = [self._stood(frame) for frame in interruptions(self.core, thread)]
        moments.append(self._stands_now(thread))
        return next((moment for moment in MOST_UNFINISHED_FIRST if moment in moments), Moment.NEVER)

    def _is_in_malloc(self, program_counter: int) -> bool:
        module = self.core.module_at(program_counter)
        return module is not None and any(module is other for other in self._mallocs)

    def _stood(self, frame: Interruption) -> Moment:
        """Where a thread was in malloc when a signal interrupted it."""
        if not self._is_in_malloc(frame.program_counter):
            return Moment.NEVER
        behind = frame.registers.get("rcx", 0) - frame.program_counter
        if behind not in (0, SYSCALL_BYTES):
            return Moment.BETWEEN_STORES
        # In a system call. Those of malloc are not restarted, and work on pages: the first argument, or what mmap returned.
        page = self.core.page_bytes
        place = frame.registers.get("rdi") or frame.registers.get("rax", 0)
        is_call_of_malloc = behind == 0 and place >= page and place % page == 0
        return Moment.BETWEEN_STEPS if is_call_of_malloc else Moment.NEVER

    def _stands_now(self, thread: Thread) -> Moment:
        if not self._is_in_malloc(thread.program_counter):
            return Moment.NEVER
        name, calls = SYSCALLS_OF_MALLOC.get(self.core.machine, ("", frozenset()))
        number = thread.registers.get(name)
        if number is None or number >= 1 << 31:
            return Moment.BETWEEN_STORES
        return Moment.BETWEEN_STEPS if number in calls else Moment.NEVER

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
