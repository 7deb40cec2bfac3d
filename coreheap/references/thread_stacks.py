"""Where thread stacks begin and end, as struct pthread says: of threads that run, and of those that have ended.

Knows: stackblock and stackblock_size (nptl/descr.h), two words that follow each other in every glibc from 2.12 to 2.44.
Where in the descriptor they lie differs by release and machine, and is learned from the threads themselves. Does not know:
what a stack holds.

The mappings of the core do not tell that much: they join what lies side by side, and since glibc 2.42 on Linux 6.13 a guard
is no mapping of its own (MADV_GUARD_INSTALL). glibc keeps the stacks of ended threads, up to 40 MiB, with their descriptors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from coreheap.corefile import AddressSpace, Core
from coreheap.errors import MemoryFault

DESCRIPTOR_BYTES = 2560
"""At least sizeof (struct pthread) of every glibc from 2.12 to 2.44: 2304 and less."""
ABOVE_LIMIT = 1 << 20
"""Between the thread pointer and the end of the stack's block lie the descriptor or static TLS: no more than that."""
LEAST_STACK_BYTES = 1 << 14
"""PTHREAD_STACK_MIN is no smaller on any machine (sysdeps, bits/local_lim.h)."""
PAGES_AT_ONCE = 1 << 14
THREADS_ASKED = 64
"""So many threads, or half of that, are enough to learn from."""
GUARD_LIMIT = 1 << 20
"""So far the block may begin before the mapping that holds the descriptor; a guard is a mapping of its own, or none."""


@dataclass(frozen=True, slots=True)
class ThreadStack:
    """The block [start, end) that holds a thread's guard, stack, TLS and descriptor; ``thread`` None where it has ended."""

    thread: int | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Form:
    """What descriptors of one process have in common: the distance of stackblock from the thread pointer, in bytes."""

    distance: int


def stacks_of_threads(core: Core, descriptors_are_above: bool) -> dict[int, ThreadStack]:
    """The stacks of running threads, by thread; those whose descriptor does not tell are left out.

    That of the first thread never tells: the kernel made its stack.
    """
    form = _form_of(core, descriptors_are_above)
    found: dict[int, ThreadStack] = {}
    for thread in core.threads:
        if form is not None and thread.thread_pointer:
            block = _block_at(core.memory, thread.thread_pointer, form)
            if block is not None:
                found[thread.index] = ThreadStack(thread.index, *block)
    by_start = sorted(found.values(), key=lambda stack: stack.start)
    for stack, following in pairwise(by_start):
        if following.start < stack.end:
            # Two threads have no stack in common: neither descriptor is believed.
            found.pop(stack.thread or 0, None)
            found.pop(following.thread or 0, None)
    return found


def ended_stacks(
    core: Core, descriptors_are_above: bool, running: Iterable[ThreadStack], ranges: Iterable[tuple[int, int]]
) -> Iterator[ThreadStack]:
    """Stacks in ``ranges`` of memory whose thread does not run any more.

    glibc puts every descriptor at the same distance from the end of its block, and blocks consist of whole pages.
    """
    form = _form_of(core, descriptors_are_above)
    pointers = {thread.index: thread.thread_pointer or 0 for thread in core.threads}
    page = core.page_bytes
    distances = {
        stack.end - pointers[stack.thread]
        for stack in running
        if stack.thread is not None and stack.start % page == stack.end % page == 0
    }
    if form is None or not distances:
        return
    in_use = set(pointers.values())
    for start, end in ranges:
        for distance in distances if end - start >= LEAST_STACK_BYTES else ():
            for pointer in _possible_pointers(core, start, end, form, distance):
                block = _block_at(core.memory, pointer, form)
                if block is not None and block[1] == pointer + distance and pointer not in in_use:
                    yield ThreadStack(None, *block)


def _form_of(core: Core, descriptors_are_above: bool) -> _Form | None:
    """The distance at which most of some threads have a block that holds both their thread pointer and their stack pointer."""
    memory, word = core.memory, core.word_bytes
    votes: Counter[int] = Counter()
    for thread in core.threads[:: len(core.threads) // THREADS_ASKED + 1]:
        pointer = thread.thread_pointer or 0
        low = pointer if descriptors_are_above else pointer - DESCRIPTOR_BYTES
        try:
            words = memory.read_words(low, DESCRIPTOR_BYTES // word) if low > 0 else np.zeros(0, np.uint64)
        except MemoryFault:
            continue
        for place in range(len(words) - 1):
            block = _block(memory, pointer, int(words[place]), int(words[place + 1]))
            if block is not None and block[0] <= thread.stack_pointer < pointer:
                votes[low - pointer + place * word] += 1
    return _Form(votes.most_common(1)[0][0]) if votes else None


def _block_at(memory: AddressSpace, pointer: int, form: _Form) -> tuple[int, int] | None:
    """Start and end of the stack's block as the descriptor at a thread pointer says; None where there is no descriptor."""
    try:
        start, size = memory.read_words(pointer + form.distance, 2).tolist()
    except MemoryFault:
        return None
    return _block(memory, pointer, start, size)


def _block(memory: AddressSpace, pointer: int, start: int, size: int) -> tuple[int, int] | None:
    """The block of a stack, if two words of the descriptor at ``pointer`` can be its start and size."""
    end = start + size
    if not (start < pointer < end <= pointer + ABOVE_LIMIT and size >= LEAST_STACK_BYTES):
        return None
    region = memory.region_index(pointer - 1)
    if region is None or end > int(memory.region_end[region]):
        return None
    return (start, end) if start >= int(memory.region_start[region]) - GUARD_LIMIT else None


def _possible_pointers(core: Core, start: int, end: int, form: _Form, distance: int) -> Iterator[int]:
    """Addresses with a stackblock below them that ends a block ``distance`` above them: one place of each page is looked at."""
    memory, page, word = core.memory, core.page_bytes, core.word_bytes
    for low, high in memory.populated_extents(start, end):
        first = low + (form.distance - distance - low) % page
        pages = (high - first - 2 * word) // page + 1 if first + 2 * word <= high else 0
        if pages <= 0:
            continue
        for page_number in range(0, pages, PAGES_AT_ONCE):
            begin, count = first + page_number * page, min(PAGES_AT_ONCE, pages - page_number)
            content = memory.view(begin, begin + (count - 1) * page + 2 * word)
            rows = np.lib.stride_tricks.as_strided(content, (count, 2 * word), (page, 1), writeable=False).copy()
            words = rows.view(f"<u{word}").astype(np.uint64)
            ends = np.uint64(begin - form.distance + distance) + np.arange(count, dtype=np.uint64) * np.uint64(page)
            fits = (words[:, 1] >= np.uint64(LEAST_STACK_BYTES)) & (words[:, 0] + words[:, 1] == ends)
            yield from (ends[fits] - np.uint64(distance)).tolist()
