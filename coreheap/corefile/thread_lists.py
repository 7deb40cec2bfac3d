"""The stacks that the thread library itself lists: those in use, joined or not, and those that it keeps for later threads.

Knows: every struct pthread is a link (``list``, and ``tid`` right after it) of one of three rings (nptl/descr.h): stacks in use
that the library made, stacks that the program brought (the first thread's is one of them), and cached ones. Their heads lie side
by side in the data of ld.so (_rtld_global, glibc 2.34 and later), of libpthread before that, of the program where it is static.
Does not know: offsets. They are learned: a link whose neighbours point back to it, three words at one distance from all links that
describe the block around them.

A thread that ended and was not joined stays in the ring of stacks in use with tid 0: the kernel clears it at the thread's end
(CLONE_CHILD_CLEARTID), pthread_join sets it to -1, and the end of a detached thread takes it out. A fork moves the stacks of the
parent's threads to the cache of the child, whatever their number (nptl/allocatestack.c, reclaim_stacks).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from coreheap.corefile.core import Core
from coreheap.corefile.gathering import rows_at
from coreheap.corefile.kinds import WRITE
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.regions import LAST_ADDRESS
from coreheap.corefile.thread_stacks import (
    ABOVE_LIMIT,
    LEAST_STACK_BYTES,
    TLS_BELOW_THREAD_POINTER,
    ThreadStack,
    descriptor_words,
    scanned_stacks,
    stack_at,
)
from coreheap.errors import MemoryFault
from coreheap.evidence import Strength

UInt64s = npt.NDArray[np.uint64]

LINKS_LIMIT = 1 << 17
"""Links that are followed in all: more stacks than a process may map by default (vm.max_map_count is 65,530)."""
WINDOW_BYTES = 1 << 20
"""So far around one head the others are looked for: the writable data of ld.so, of libpthread and of most programs are smaller."""
HEADS_TRIED = 1 << 12
THREADS_TRIED = 4
PADDING_WORDS = 24
LINKS_ASKED = 16
"""So many links of a ring tell where descriptors describe their block."""


@dataclass(frozen=True, slots=True)
class ListedStacks:
    """Stacks that the library's rings hold and on which no thread of the core runs.

    ``unjoined``: in use, of threads that ended and that nobody joined or detached. ``vanished``: in use, of threads that did not
    end and are not in the core. ``cached``: kept for later threads. ``descriptors`` are the addresses of ``unjoined`` ones' struct
    pthread (what pthread_t is), in the same order. `
    """

    unjoined: tuple[ThreadStack, ...]
    descriptors: tuple[int, ...]
    vanished: tuple[ThreadStack, ...]
    cached: tuple[ThreadStack, ...]
    strength: Strength
    someone_joins: bool = False
    """Whether a thread waits in pthread_join: a register of its holds where a tid is."""

    @property
    def ended(self) -> tuple[ThreadStack, ...]:
        """All on which no thread runs any more."""
        return (*self.unjoined, *self.vanished, *self.cached)


_found: WeakKeyDictionary[Core, ListedStacks | None] = WeakKeyDictionary()


def listed_stacks(core: Core) -> ListedStacks | None:
    """What the rings tell; None where they were not found or do not close."""
    if core not in _found:
        _found[core] = _listed_stacks(core)
    return _found[core]


def ended_stacks(core: Core, running: Iterable[ThreadStack], start: UInt64s, end: UInt64s) -> Iterator[ThreadStack]:
    """Stacks in ranges of memory (sorted, without overlap) whose thread does not run any more: what the library lists, and
    where that is not proven what looks like one.
    """
    listed = listed_stacks(core)
    seen = set()
    for stack in listed.ended if listed is not None else ():
        row = int(np.searchsorted(start, np.uint64(stack.stackblock_at), side="right")) - 1
        if row >= 0 and stack.stackblock_at < int(end[row]):
            seen.add(stack.stackblock_at)
            yield stack
    if listed is None or listed.strength is not Strength.PROOF:
        yield from (stack for stack in scanned_stacks(core, running, start, end) if stack.stackblock_at not in seen)


def _listed_stacks(core: Core) -> ListedStacks | None:
    own = _own_link(core)
    if own is None:
        return None
    link, offset, own_head = own
    window = _window(core, own_head)
    low, words = window.start, window.words
    links = _Links(core, offset)
    # The first thread's own descriptor may lie beside the module's data: its ring is that of the head all the same.
    rings = [links.ring(own_head)]
    seen = set(rings[0])
    for head in _heads(core, low, words):
        ring = () if head in seen else links.ring(head)
        seen.update(ring)
        if ring:
            rings.append(ring)
    distance = _distance_to_stackblock(core.memory, [ring[1:] for ring in rings], link)
    return None if distance is None else _told(core, links, rings, distance, window)


def _own_link(core: Core) -> tuple[int, int, int] | None:
    """A link in the descriptor of a thread, how far it lies from the thread's pointer, and the head of its ring.

    The first thread's ring is short: it has the stacks that the program brought.
    """
    memory, word = core.memory, core.word_bytes
    threads = sorted(
        (thread for thread in core.threads if thread.thread_pointer), key=lambda one: one.lwp != core.process.pid
    )
    links = _Links(core, None)
    for thread in threads[:THREADS_TRIED]:
        pointer = thread.thread_pointer or 0
        low, words = descriptor_words(memory, pointer, TLS_BELOW_THREAD_POINTER[core.machine])
        if len(words) < 2:
            continue
        place = np.uint64(low) + np.arange(len(words) - 1, dtype=np.uint64) * np.uint64(word)
        for row in np.flatnonzero(_may_be_links(memory, place, words[:-1], words[1:])).tolist():
            link = int(place[row])
            ring = links.ring(link)
            heads = [one for one in ring if core.module_at(one) is not None]
            if len(heads) == 1:
                return link, link - pointer, heads[0]
    return None


class _Links:
    """The links of rings; those of threads in the core are read all at once."""

    def __init__(self, core: Core, offset: int | None) -> None:
        """``offset``: how far a thread's link lies from its thread pointer, None where that is not known yet."""
        self.offset = offset or 0
        self.memory = core.memory
        self.first = 0
        """The link of the process's first thread, 0 where it is not in the core."""
        self._known: dict[int, tuple[int, int]] = {}
        self._left = LINKS_LIMIT
        if offset is None:
            return
        first = next((thread for thread in core.threads if thread.lwp == core.process.pid), None)
        if first is not None and first.thread_pointer:
            self.first = first.thread_pointer + offset & LAST_ADDRESS
        pointers = np.array([thread.thread_pointer or 0 for thread in core.threads], np.uint64)
        place = pointers[pointers != 0] + np.uint64(offset & LAST_ADDRESS)
        rows, saved = rows_at(core.memory, place, 2)
        for at, (following, previous) in zip(place[saved].tolist(), rows[saved].tolist(), strict=True):
            self._known[at] = following, previous

    def is_running(self, link: int) -> bool:
        """Whether the link is that of a thread in the core."""
        return link in self._known

    def ring(self, first: int) -> tuple[int, ...]:
        """The links of a ring from ``first`` on; empty where it does not close or a neighbour does not point back."""
        links, at = [first], first
        try:
            following, last = self._at(first)
            while following != first:
                at = following
                following, previous = self._at(at)
                self._left -= 1
                if previous != links[-1] or self._left < 0:
                    return ()
                links.append(at)
        except MemoryFault:
            return ()
        return tuple(links) if last == links[-1] else ()

    def _at(self, link: int) -> tuple[int, int]:
        found = self._known.get(link)
        if found is None:
            following, previous = self.memory.read_words(link, 2).tolist()
            return following, previous
        return found


def _may_be_links(memory: AddressSpace, place: UInt64s, following: UInt64s, previous: UInt64s) -> npt.NDArray[np.bool_]:
    """Where two words are aligned addresses of mapped memory, other than their own."""
    fits: npt.NDArray[np.bool_] = (following != place) & (previous != place)
    fits &= (following % np.uint64(memory.word_bytes) == 0) & (previous % np.uint64(memory.word_bytes) == 0)
    for column in (following, previous):
        row = np.maximum(np.searchsorted(memory.region_start, column, side="right") - 1, 0)
        fits &= (column >= memory.region_start[row]) & (column < memory.region_end[row])
    return fits


@dataclass(frozen=True, slots=True)
class _Window:
    """Words of a module's data from ``start`` on; ``is_whole``: all of it."""

    start: int
    words: UInt64s
    is_whole: bool


def _window(core: Core, around: int) -> _Window:
    """The words of the writable mappings around an address that touch."""
    memory, word = core.memory, core.word_bytes
    nothing = _Window(around, np.zeros(0, np.uint64), False)
    first = memory.region_index(around)
    if first is None or not int(memory.region_flags[first]) & WRITE:
        return nothing
    last = first
    # Data and bss may be two mappings.
    while (
        first > 0 and _goes_on(memory, first - 1, first) and int(memory.region_end[first - 1]) > around - WINDOW_BYTES
    ):
        first -= 1
    limit = around + WINDOW_BYTES
    while last + 1 < memory.region_count and _goes_on(memory, last, last + 1) and int(memory.region_end[last]) < limit:
        last += 1
    start, end = int(memory.region_start[first]), int(memory.region_end[last])
    low, high = max(start, around - WINDOW_BYTES), min(end, around + WINDOW_BYTES)
    low += -low % word
    try:
        return _Window(low, memory.read_words(low, (high - low) // word), low == start and high == end)
    except MemoryFault:
        return nothing


def _goes_on(memory: AddressSpace, region: int, following: int) -> bool:
    flags = int(memory.region_flags[region]) & int(memory.region_flags[following])
    return bool(flags & WRITE) and int(memory.region_end[region]) == int(memory.region_start[following])


def _heads(core: Core, low: int, words: UInt64s) -> Iterator[int]:
    """Where words of a module's data may be the head of a ring that is not empty."""
    if len(words) < 2:
        return
    memory, word = core.memory, core.word_bytes
    place = np.uint64(low) + np.arange(len(words) - 1, dtype=np.uint64) * np.uint64(word)
    for row in np.flatnonzero(_may_be_links(memory, place, words[:-1], words[1:]))[:HEADS_TRIED].tolist():
        head = int(place[row])
        try:
            if memory.read_word(int(words[row]) + word) == head == memory.read_word(int(words[row + 1])):
                yield head
        except MemoryFault:
            continue


def _distance_to_stackblock(memory: AddressSpace, rings: Iterable[tuple[int, ...]], first: int) -> int | None:
    """How far after the links of most descriptors the words lie that describe the block around them.

    ``first``: the link of the first thread, whose stack the kernel made.
    """
    votes: Counter[int] = Counter()
    asked, word = 0, memory.word_bytes
    for ring in rings:
        for link in ring[:LINKS_ASKED]:
            if link == first:
                continue
            asked += 1
            _, words = descriptor_words(memory, link, is_above=True)
            start, size = words[:-2], words[1:-1]
            end = start + size
            fits = (start < np.uint64(link)) & (end > np.uint64(link)) & (size >= np.uint64(LEAST_STACK_BYTES))
            fits &= end - np.uint64(link) <= np.uint64(ABOVE_LIMIT)
            for row in np.flatnonzero(fits).tolist():
                if stack_at(memory, link + row * word) is not None:
                    votes[row * word] += 1
    if not votes:
        return None
    ((distance, count),) = votes.most_common(1)
    return distance if 2 * count > asked else None


def _told(core: Core, links: _Links, rings: list[tuple[int, ...]], distance: int, window: _Window) -> ListedStacks:
    """The stacks of all rings by what the library does with them."""
    memory = core.memory
    # Of a thread whose pointer the core does not tell, the stack pointer lies in its block.
    inside = np.array(sorted(thread.stack_pointer for thread in core.threads if not thread.thread_pointer), np.uint64)
    unjoined: list[tuple[ThreadStack, int]] = []
    vanished: list[ThreadStack] = []
    cached: list[ThreadStack] = []
    used_head, user_head, runs_in_use = 0, 0, False
    # In the child of a fork the thread that forked is the first one, and may have a stack of the library's.
    is_kernels = bool(links.first) and stack_at(memory, links.first + distance) is None
    for head, *ring in rings:
        if is_kernels and links.first in ring:
            # What the program brought it has to free itself.
            user_head = head
            continue
        idle = [link for link in ring if not links.is_running(link)]
        stacks = [(link, stack_at(memory, link + distance)) for link in idle]
        known = [(link, stack) for link, stack in stacks if stack is not None]
        if len(known) < len(stacks):
            # No ring of descriptors, or that of a first thread which has ended before the others.
            continue
        total = sum(stack.end - stack.start for _, stack in known)
        if len(idle) == len(ring) and total <= LAST_ADDRESS and bool((window.words == np.uint64(total)).any()):
            cached += [stack for _, stack in known]
            continue
        used_head, runs_in_use = head, len(idle) < len(ring)
        for link, stack in known:
            if _holds_any(stack, inside):
                runs_in_use = True
            elif _thread_id(memory, link) == 0:
                unjoined.append((stack, link))
            else:
                vanished.append(stack)
    cached_bytes = sum(stack.end - stack.start for stack in cached)
    if _is_side_by_side(window, memory.word_bytes, used_head, user_head, cached_bytes):
        strength = Strength.PROOF
    else:
        # In the whole data the count of what is cached would have been seen.
        strength = Strength.SOLID if runs_in_use or window.is_whole else Strength.HINT
    # What pthread_t is: struct pthread begins at the thread pointer, or with 24 words before its link (nptl/descr.h).
    before = links.offset if TLS_BELOW_THREAD_POINTER[core.machine] else PADDING_WORDS * memory.word_bytes
    return ListedStacks(
        tuple(stack for stack, _ in unjoined),
        tuple(max(link - before, 0) for _, link in unjoined),
        tuple(vanished),
        tuple(cached),
        strength,
        _someone_joins(core, [link for ring in rings for link in ring]),
    )


def _someone_joins(core: Core, links: list[int]) -> bool:
    """Whether a thread waits for a tid to become 0: the first argument of futex stays in its register on x86."""
    places = np.array(links, np.uint64) + np.uint64(2 * core.word_bytes)
    register = {"x86_64": "rdi", "i386": "ebx"}.get(core.machine)
    return register is not None and bool(np.isin(core.thread_table.register(register), places).any())


def _holds_any(stack: ThreadStack, addresses: UInt64s) -> bool:
    row = int(np.searchsorted(addresses, np.uint64(stack.start)))
    return row < len(addresses) and int(addresses[row]) < stack.end


def _thread_id(memory: AddressSpace, link: int) -> int | None:
    """tid, which follows the link: an int."""
    try:
        return int.from_bytes(memory.read(link + 2 * memory.word_bytes, 4), "little")
    except MemoryFault:
        return None


def _is_side_by_side(window: _Window, word: int, used: int, user: int, cached_bytes: int) -> bool:
    """Whether the heads lie as in _rtld_global: used, user, cache, and then the bytes that the cache has.

    ``used`` and ``user``: heads of rings that are not empty, 0 where none was found.
    """
    head = used or user - 2 * word
    words, place = window.words, (head - window.start) // word
    if place < 0 or place + 7 > len(words) or user not in (0, head + 2 * word):
        return False

    def is_empty(number: int) -> bool:
        at = place + 2 * number
        return bool((words[at : at + 2] == np.uint64(head + 2 * number * word)).all())

    return is_empty(0) == (not used) and is_empty(2) == (not cached_bytes) and int(words[place + 6]) == cached_bytes
