"""Where thread stacks begin and end, as struct pthread says: of threads that run, and of those that have ended.

Knows: stackblock, stackblock_size and guardsize, and start_routine a few words before them (nptl/descr.h), in this order in
every glibc from 2.12 to 2.44. Where in the descriptor they lie differs by release and machine, and is learned from the threads
themselves. Does not know: what a stack holds.

The mappings of the core do not tell that much: they join what lies side by side, and since glibc 2.42 on Linux 6.13 a guard
is no mapping of its own (MADV_GUARD_INSTALL). glibc keeps the stacks of ended threads, up to 40 MiB, with their descriptors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from coreheap.corefile.core import Core
from coreheap.corefile.gathering import rows_at
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.notes import records_at
from coreheap.corefile.regions import LAST_ADDRESS
from coreheap.corefile.residency import stored_pieces
from coreheap.errors import MemoryFault

UInt64s = npt.NDArray[np.uint64]

TLS_BELOW_THREAD_POINTER = {"x86_64": True, "i386": True, "aarch64": False}
"""TLS variant II against I (Drepper, ELF Handling For Thread-Local Storage, section 3).

With variant II struct pthread begins at the thread pointer, with variant I it ends there (sysdeps, tls.h).
"""
DESCRIPTOR_BYTES = 2560
"""At least sizeof (struct pthread) of every glibc from 2.12 to 2.44: 2368 and less."""
ABOVE_LIMIT = 1 << 20
"""Between stackblock and the end of the stack's block lie the rest of the descriptor and static TLS: no more than that."""
LEAST_STACK_BYTES = 1 << 14
"""PTHREAD_STACK_MIN is no smaller on any machine (sysdeps, bits/local_lim.h)."""
PAGES_AT_ONCE = 1 << 14
THREADS_ASKED = 64
"""So many threads, or half of that, are enough to learn from."""
GUARD_LIMIT = 1 << 20
"""So far the block may begin before the mapping that holds its descriptor, besides the guard: a JVM's zones, another library's."""
SEARCHED_BYTES = 1 << 20
"""Of a stack in use, searched for its descriptor where nothing tells the thread pointer."""
PLACES_TRIED = 1 << 10
"""Places of one thread's that may hold its descriptor's words, the last ones; of a real one there are a few."""
PAGES_SEARCHED = 1 << 22
"""So many pages are looked at for all threads together: those of 8,000 stacks of 2 MiB."""
PAGES_OF_A_PLACE = 1 << 8
LARGEST_STACK_BYTES = 1 << 26
"""Where nothing tells the thread pointer, so far above a stack pointer its descriptor is looked for."""
DISTANCES_TRIED = 4
"""All blocks that glibc made have one; a program's own may differ by their alignment."""
START_ROUTINE_WORDS = range(8, 21)
"""So many words before stackblock lies start_routine: 10 or 11 with 8-byte words, 14 or 15 with 4-byte ones."""
EXECUTE = 1


@dataclass(frozen=True, slots=True)
class ThreadStack:
    """The block [start, end) that holds a thread's guard, stack, TLS and descriptor; ``thread`` None where it has ended.

    ``guard_bytes``: the first of them, that nothing may touch. ``stackblock_at``: the address of the descriptor's field.
    ``start_routine``: the function that the thread began with, None where the descriptor's field could not be told.
    """

    thread: int | None
    start: int
    end: int
    guard_bytes: int
    stackblock_at: int
    start_routine: int | None = None


def stacks_of_threads(core: Core, interrupted: Mapping[int, Sequence[int]] | None = None) -> dict[int, ThreadStack]:
    """The stacks of running threads, by thread; those whose descriptor does not tell are left out.

    That of the first thread never tells: the kernel made its stack. ``interrupted``: stack pointers that a thread may have had
    before a signal handler; they count where the core does not tell its thread pointer.
    """
    before = interrupted or {}
    distance = _distance_from_thread_pointer(core)
    before_end = _distance_before_end(core)
    found: dict[int, ThreadStack] = {}
    search = _DescriptorSearch(core, before_end or 0)
    told = {} if distance is None else _stacks_behind_pointers(core, distance)
    for thread in core.threads:
        pointer = thread.thread_pointer
        stack: ThreadStack | None = None
        if pointer and distance is not None:
            stack = told.get(thread.index)
        elif not pointer and before_end is not None:
            pointers = (thread.stack_pointer, *before.get(thread.index, ()))
            candidates = (search.stack_around(pointer) for pointer in pointers)
            stack = next((found for found in candidates if found is not None), None)
        if stack is not None:
            found[thread.index] = stack if stack.thread == thread.index else replace(stack, thread=thread.index)
    by_start = sorted(found.values(), key=lambda stack: stack.start)
    for stack, following in pairwise(by_start):
        if following.start < stack.end:
            # Two threads have no stack in common: neither descriptor is believed.
            found.pop(stack.thread or 0, None)
            found.pop(following.thread or 0, None)
    return with_start_routines(core.memory, found)


def _stacks_behind_pointers(core: Core, distance: int) -> dict[int, ThreadStack]:
    """The stacks that descriptors at the threads' own pointers tell, by thread."""
    threads = [
        thread
        for thread in core.threads
        if thread.thread_pointer and 0 <= thread.thread_pointer + distance <= LAST_ADDRESS
    ]
    places = [(thread.thread_pointer or 0) + distance for thread in threads]
    words, saved = rows_at(core.memory, np.array(places, np.uint64), 3)
    found: dict[int, ThreadStack] = {}
    for thread, place, fields, is_saved in zip(threads, places, words.tolist(), saved.tolist(), strict=True):
        stack = _stack(core.memory, place, *fields, thread=thread.index) if is_saved else None
        if stack is not None:
            found[thread.index] = stack
    return found


def scanned_stacks(core: Core, running: Iterable[ThreadStack], start: UInt64s, end: UInt64s) -> Iterator[ThreadStack]:
    """Stacks in ranges of memory (sorted, without overlap) whose thread does not run any more, by the look of each page.

    glibc puts every descriptor at the same distance from the end of its block, and blocks consist of whole pages.
    """
    page = core.page_bytes
    stacks = tuple(running)
    counts = Counter(stack.end - stack.stackblock_at for stack in stacks if stack.start % page == stack.end % page == 0)
    distances = [distance for distance, _ in counts.most_common(DISTANCES_TRIED)]
    in_use = {stack.stackblock_at for stack in stacks}
    # Between mmapped chunks there may be millions of ranges; few are large enough.
    large = end - start >= np.uint64(LEAST_STACK_BYTES)
    for distance in distances:
        for place in _places_in_pages(core, start[large], end[large], distance):
            stack = stack_at(core.memory, place)
            if stack is not None and stack.end == place + distance and place not in in_use:
                yield stack


def _distance_from_thread_pointer(core: Core) -> int | None:
    """The distance at which most of some threads have a block that holds both their descriptor and their stack pointer."""
    memory, word = core.memory, core.word_bytes
    votes: Counter[int] = Counter()
    for thread in core.threads[:: len(core.threads) // THREADS_ASKED + 1]:
        pointer = thread.thread_pointer
        if not pointer:
            continue
        low, words = descriptor_words(memory, pointer, TLS_BELOW_THREAD_POINTER[core.machine])
        for place in range(len(words) - 2):
            at = low + place * word
            stack = _stack(memory, at, *words[place : place + 3].tolist())
            if stack is not None and stack.start <= thread.stack_pointer < pointer < stack.end:
                votes[at - pointer] += 1
    return votes.most_common(1)[0][0] if votes else None


def descriptor_words(memory: AddressSpace, pointer: int, is_above: bool) -> tuple[int, UInt64s]:
    """Where a thread's descriptor begins at the earliest, and the words from there on that may be it.

    Its stack may begin or end, and with it what is saved, before DESCRIPTOR_BYTES do.
    """
    region = memory.region_index(pointer if is_above else pointer - 1)
    if region is None:
        return pointer, np.zeros(0, np.uint64)
    low, high = (pointer, pointer + DESCRIPTOR_BYTES) if is_above else (pointer - DESCRIPTOR_BYTES, pointer)
    low, high = max(low, int(memory.region_start[region])), min(high, int(memory.region_end[region]))
    low += (pointer - low) % memory.word_bytes
    return low, _words_or_none(memory, low, (high - low) // memory.word_bytes)


def _words_or_none(memory: AddressSpace, address: int, count: int) -> UInt64s:
    try:
        return memory.read_words(address, max(count, 0))
    except MemoryFault:
        return np.zeros(0, np.uint64)


def _distance_before_end(core: Core) -> int | None:
    """For threads whose thread pointer the core does not tell: how far before the end of its block stackblock lies in most."""
    memory, word, page = core.memory, core.word_bytes, np.uint64(core.page_bytes)
    votes: Counter[int] = Counter()
    without = [thread for thread in core.threads if not thread.thread_pointer]
    for thread in without[:: len(without) // THREADS_ASKED + 1]:
        pointer = thread.stack_pointer
        region = memory.region_index(pointer)
        if region is None:
            continue
        low = pointer - pointer % word
        words = _words_or_none(memory, low, (min(int(memory.region_end[region]), low + SEARCHED_BYTES) - low) // word)
        if len(words) < 3:
            continue
        start, size = words[:-2], words[1:-1]
        fits = (start % page == 0) & (size % page == 0) & (start <= np.uint64(pointer)) & (size > 0)
        # The descriptor lies above all frames: of copies of its words the last one counts.
        for place in reversed(np.flatnonzero(fits)[-PLACES_TRIED:].tolist()):
            stack = _stack(memory, low + place * word, *words[place : place + 3].tolist())
            if stack is not None and stack.start <= pointer:
                votes[stack.end - stack.stackblock_at] += 1
                break
    return votes.most_common(1)[0][0] if votes else None


class _DescriptorSearch:
    """Looks for the stacks that hold stack pointers, by descriptors so far before the ends of their blocks.

    Many pointers may lie in one mapping, and anything may be above them: each page is asked about once, and of all pages
    only so many.
    """

    def __init__(self, core: Core, distance: int) -> None:
        self._core = core
        self._distance = distance
        self._answers: dict[int, ThreadStack | None] = {}
        self._pages_left = PAGES_SEARCHED

    def stack_around(self, pointer: int) -> ThreadStack | None:
        """The stack that holds a stack pointer."""
        page = pointer // self._core.page_bytes
        if page not in self._answers:
            self._answers[page] = self._stack_around(pointer)
        stack = self._answers[page]
        return stack if stack is not None and stack.start <= pointer < stack.end else None

    def _stack_around(self, pointer: int) -> ThreadStack | None:
        core, distance = self._core, self._distance
        region = core.memory.region_index(pointer)
        if region is None:
            return None
        page = core.page_bytes
        low = pointer - pointer % page
        end = min(int(core.memory.region_end[region]), low + min(LARGEST_STACK_BYTES, self._pages_left * page))
        reached = low
        start = max(low, int(core.memory.region_start[region]))
        places = _places_in_pages(core, np.array([start], np.uint64), np.array([end], np.uint64), distance)
        for place in places:
            stack = stack_at(core.memory, place)
            # What looks like a descriptor and is none takes as long as many pages.
            self._pages_left -= PAGES_OF_A_PLACE
            if stack is not None and stack.end == place + distance and stack.start <= pointer and place >= pointer:
                self._pages_left -= (place - reached) // page
                return stack
            if self._pages_left <= 0:
                return None
        self._pages_left -= max(end - low, 0) // page
        return None


def stack_at(memory: AddressSpace, place: int) -> ThreadStack | None:
    """The stack that a descriptor tells whose stackblock would be at ``place``; None where there is none."""
    try:
        return _stack(memory, place, *memory.read_words(place, 3).tolist())
    except MemoryFault:
        return None


def _stack(
    memory: AddressSpace, place: int, start: int, size: int, guard: int, *, thread: int | None = None
) -> ThreadStack | None:
    """The stack, if three words of the descriptor at ``place`` can be its start, its size and its guard's."""
    end = start + size
    if not (start < place < end <= place + ABOVE_LIMIT and size >= LEAST_STACK_BYTES):
        return None
    region = memory.region_index(place)
    if region is None or end > int(memory.region_end[region]):
        return None
    low = int(memory.region_start[region])
    # The lowest part of the block is the guard (allocatestack.c, setup_stack_prot); a program's own stack has none.
    if guard % memory.page_bytes or start + guard >= place:
        # Not glibc's field: what is not part of the mapping, directly below.
        guard = low - start if 0 < low - start <= GUARD_LIMIT else 0
    return ThreadStack(thread, start, end, guard, place) if start + guard >= low - GUARD_LIMIT else None


def with_start_routines(memory: AddressSpace, stacks: dict[int, ThreadStack]) -> dict[int, ThreadStack]:
    """The same stacks with the functions that their threads began with, where the descriptors tell.

    Between arg and stackblock a descriptor has what events, exceptions and cancellation need: zeros in a thread that has
    none of these. start_routine is the lowest word before those zeros that is code in most threads; arg follows it.
    """
    farthest, word = START_ROUTINE_WORDS[-1], memory.word_bytes
    places = [max(stack.stackblock_at - farthest * word, 0) for stack in stacks.values()]
    words, saved = rows_at(memory, np.array(places, np.uint64), farthest)
    words = words[saved]
    numbers = [number for number, is_saved in zip(stacks, saved.tolist(), strict=True) if is_saved]
    if not numbers:
        return stacks
    is_code = _is_code(memory, words)
    chosen: int | None = None
    for distance in START_ROUTINE_WORDS:
        column = farthest - distance
        votes = is_code[:, column] & ~words[:, column + 2 :].any(axis=1)
        if 2 * int(votes.sum()) > len(numbers):
            chosen = column
    if chosen is None:
        return stacks
    found = dict(stacks)
    for row in np.flatnonzero(is_code[:, chosen]).tolist():
        number = numbers[row]
        found[number] = replace(stacks[number], start_routine=int(words[row, chosen]))
    return found


def _is_code(memory: AddressSpace, words: UInt64s) -> npt.NDArray[np.bool_]:
    """Which words are addresses that the process may execute; gdb does not say it of what it leaves to files."""
    if memory.region_count == 0:
        return np.zeros(words.shape, np.bool_)
    row = np.maximum(np.searchsorted(memory.region_start, words, side="right") - 1, 0)
    inside = (words >= memory.region_start[row]) & (words < memory.region_end[row])
    flags = memory.region_flags[row]
    held: npt.NDArray[np.bool_] = inside & (
        ((flags & EXECUTE) != 0) | ((flags == 0) & (memory.region_file_index[row] >= 0))
    )
    return held


def _places_in_pages(core: Core, start: UInt64s, end: UInt64s, distance: int) -> Iterator[int]:
    """Where a stackblock may be that lies ``distance`` before the end of its block, in ranges (sorted, without overlap): one
    place of each page is looked at."""
    memory, page, word = core.memory, core.page_bytes, core.word_bytes
    pieces = stored_pieces(memory, start, end)
    low = pieces.start.astype(np.int64)
    before = (-distance - low) % page
    first = pieces.start + before.astype(np.uint64)
    room = (pieces.end - pieces.start).astype(np.int64) - before - 2 * word
    pages = np.where(room >= 0, room // page + 1, 0)
    numbered = np.concatenate(([0], np.cumsum(pages)))
    record = np.dtype([("words", f"<u{word}", (2,))])
    for number in range(0, int(numbered[-1]), PAGES_AT_ONCE):
        numbers = np.arange(number, min(number + PAGES_AT_ONCE, int(numbered[-1])))
        piece = np.searchsorted(numbered, numbers, side="right") - 1
        places = first[piece] + ((numbers - numbered[piece]) * page).astype(np.uint64)
        offsets = pieces.file_offset[piece] + (places - pieces.start[piece])
        words = records_at(memory.file, offsets.astype(np.intp), record)["words"].astype(np.uint64)
        ends = places + np.uint64(distance)
        # Of a block that would end behind the last address there is none.
        fits = (words[:, 1] >= np.uint64(LEAST_STACK_BYTES)) & (words[:, 0] + words[:, 1] == ends) & (ends > places)
        yield from places[fits].tolist()
