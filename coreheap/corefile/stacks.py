"""The stack of every thread: where it is, how deep it is used, how much of it was in memory.

Knows: what descriptors tell (``thread_stacks``), the stack that the kernel made for the program, signal frames, guards. Does not
know: what a stack holds, or memory that no thread runs on.

The stack of a thread ends where its block does: static TLS and the descriptor are its highest bytes, as for
pthread_getattr_np. A signal stack is known only while a handler runs on it: sigaltstack's setting is the kernel's own, and shows
in the frame that it writes for a handler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from weakref import WeakKeyDictionary

import numpy as np

from coreheap.corefile.bss import module_bss
from coreheap.corefile.core import Core
from coreheap.corefile.elf import Words
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.process import AT_EXECFN, AT_RANDOM
from coreheap.corefile.regions import LAST_ADDRESS, without_overlap
from coreheap.corefile.residency import ByteRuns, pages_with_content, saved_runs, stored_pieces
from coreheap.corefile.thread_stacks import GUARD_LIMIT, ThreadStack, stacks_of_threads
from coreheap.corefile.threads import Thread
from coreheap.errors import MemoryFault

ACCESS = 7
LEAST_SIGNAL_STACK_BYTES = 2048
"""MINSIGSTKSZ of x86, the smallest (arch/*/include/uapi/asm/signal.h)."""
FRAME_SEARCH_BYTES = 1 << 18
"""So far above a stack pointer a signal frame is looked for; handlers are shallow."""
FRAME_SEARCH_LIMIT = 1 << 29
"""Bytes that are searched for signal frames of all threads: enough for thousands of handlers."""
LARGEST_SUPPOSED_STACK_BYTES = 1 << 26
"""A mapping of which no more is known than that a thread runs in it is taken for a stack as a whole up to this size."""
LARGEST_SIGNAL_STACK_BYTES = 1 << 20
"""Mappings up to this size are taken for a signal stack as a whole where a handler runs in them and no more is known."""
SAVED_STACK_POINTER = {"x86_64": 144, "i386": 40, "aarch64": 416}
"""From uc_stack to the interrupted stack pointer in a ucontext (arch/*/include/uapi/asm/{ucontext,sigcontext}.h)."""
FRAMES_TRIED = 64
"""Places that may be a frame: stack words look like many things."""
SIGNAL_STACK_FLAGS = (0, 1)
"""ss_flags of a stack in use, but for SS_AUTODISARM (1 << 31)."""


class StackSource(Enum):
    """How the bounds of a stack are known."""

    DESCRIPTOR = "descriptor"
    """stackblock, stackblock_size and guardsize of struct pthread."""
    INITIAL_STACK = "initial_stack"
    """The mapping that the kernel made for the program: AT_RANDOM and AT_EXECFN lie in it."""
    MAPPING = "mapping"
    """The mapping that holds the stack pointer: it may hold other memory as well."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The stack [start, end) of a thread, without its guard; None where something is not known.

    ``guard_bytes``: what lies below it that nothing may touch. ``used_bytes``: from the stack pointer to the end; of a thread that
    runs a signal handler elsewhere, from where it was interrupted. ``signal_stack``: the other stack that its handler runs on.
    """

    thread: int
    start: int
    end: int
    guard_bytes: int | None
    source: StackSource
    used_bytes: int | None
    signal_stack: tuple[int, int] | None
    start_routine: int | None


@dataclass(frozen=True, slots=True)
class StackResidency:
    """Bytes of a stack on pages that were there, and from the lowest of these pages to its end: so deep it was used once."""

    resident_bytes: int
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Stacks:
    """All stacks that threads run on. ``initial``: the one that the kernel made for the program, None where it is not known.

    ``by_thread`` has no entry where nothing is known; ``descriptors`` only what descriptors tell. ``elsewhere``: regions that
    hold the stack pointer of a thread whose own stack is another one, and no signal frame says why.
    """

    initial: tuple[int, int] | None
    by_thread: Mapping[int, Stack]
    descriptors: Mapping[int, ThreadStack]
    elsewhere: Mapping[int, int]


NO_STACKS = Stacks(None, {}, {}, {})
"""Where nothing is known of any stack."""

# Reports and claims ask for the same; an open core does not change.
_found: WeakKeyDictionary[Core, Stacks] = WeakKeyDictionary()


def find_stacks(core: Core) -> Stacks:
    """The stacks of all threads of a core."""
    if core not in _found:
        _found[core] = _find_stacks(core)
    return _found[core]


def _find_stacks(core: Core) -> Stacks:
    memory = core.memory
    mappings = _Mappings(core)
    initial = _initial_stack(core, mappings)
    descriptors = _with_interrupted(core, initial)
    region_of = [memory.region_index(thread.stack_pointer) for thread in core.threads]
    threads_in = Counter(region_of)
    of_descriptors = {memory.region_index(stack.stackblock_at) for stack in descriptors.values()}
    found: dict[int, Stack] = {}
    elsewhere: dict[int, int] = {}
    searched = _FrameSearch(core)
    for thread, region in zip(core.threads, region_of, strict=True):
        pointer = thread.stack_pointer
        described = descriptors.get(thread.index)
        if described is not None:
            bounds = described.start + described.guard_bytes, described.end
            stack = _stack(thread, bounds, described.guard_bytes, StackSource.DESCRIPTOR, described.start_routine)
        elif initial is not None and (thread.lwp == core.process.pid or initial[0] <= pointer < initial[1]):
            stack = _stack(thread, initial, None, StackSource.INITIAL_STACK)
        elif region is not None and threads_in[region] == 1 and region not in of_descriptors:
            mapping = mappings.stack(region)
            if mapping is None:
                continue
            stack = _stack(thread, mapping[:2], mapping[2], StackSource.MAPPING)
        else:
            continue
        if not stack.start <= pointer < stack.end and region is not None:
            stack = _in_handler(searched, stack, pointer, region)
            if stack.signal_stack is None:
                elsewhere[thread.index] = region
        found[thread.index] = stack
    return Stacks(initial, found, descriptors, elsewhere)


def _stack(
    thread: Thread, bounds: tuple[int, int], guard: int | None, source: StackSource, routine: int | None = None
) -> Stack:
    start, end = bounds
    used = end - thread.stack_pointer if start <= thread.stack_pointer < end else None
    return Stack(thread.index, start, end, guard, source, used, None, routine)


def _initial_stack(core: Core, mappings: _Mappings) -> tuple[int, int] | None:
    """The mapping of the stack that the kernel made for the program (fs/binfmt_elf.c)."""
    for tag in (AT_RANDOM, AT_EXECFN):
        region = core.memory.region_index(core.auxv.get(tag, 0))
        if region is not None and int(core.memory.region_file_index[region]) < 0:
            return mappings.whole(region)
    return None


class _Mappings:
    """The mappings that regions are parts of: what is saved of one, cut off and left out are regions of their own."""

    def __init__(self, core: Core) -> None:
        self._core = core
        memory = core.memory
        segment = memory.region_segment
        begins = np.ones(memory.region_count, np.bool_)
        begins[1:] = (
            (segment[1:] != segment[:-1]) | (segment[1:] < 0) | (memory.region_start[1:] != memory.region_end[:-1])
        )
        self._first = np.flatnonzero(begins)

    def whole(self, region: int) -> tuple[int, int]:
        """Start and end of the mapping that a region is a part of."""
        memory = self._core.memory
        row = int(np.searchsorted(self._first, region, side="right"))
        last = int(self._first[row]) if row < len(self._first) else memory.region_count
        return int(memory.region_start[self._first[row - 1]]), int(memory.region_end[last - 1])

    def stack(self, region: int) -> tuple[int, int, int | None] | None:
        """Start, end and guard of a mapping that a stack pointer lies in; None for one that is no stack's.

        That is one of a file, one with the bss of a module, and one that is larger than stacks are.
        """
        memory = self._core.memory
        if int(memory.region_file_index[region]) >= 0:
            return None
        start, end = self.whole(region)
        if end - start > LARGEST_SUPPOSED_STACK_BYTES or module_bss(self._core).meets(start, end):
            return None
        below = memory.region_index(start - 1)
        if below is None or int(memory.region_flags[below]) & ACCESS or int(memory.region_file_index[below]) >= 0:
            return start, end, None
        guard = int(memory.region_end[below] - memory.region_start[below])
        return start, end, guard if guard <= GUARD_LIMIT else None


@dataclass(frozen=True, slots=True)
class _Interrupted:
    """Where a signal handler interrupted a thread, and the stack that it runs on; None where more than that is not told."""

    stack_pointer: int
    signal_stack: tuple[int, int] | None


@dataclass(slots=True)
class _FrameSearch:
    """A core in which signal frames are looked for, and how many bytes may still be read for that."""

    core: Core
    bytes_left: int = FRAME_SEARCH_LIMIT


def _interruptions(search: _FrameSearch, pointer: int, region: int) -> Iterator[_Interrupted]:
    """What may be signal frames above a stack pointer in its mapping, the innermost first.

    The kernel writes a ucontext for a handler, with sigaltstack's setting (uc_stack) and the interrupted registers.
    """
    core = search.core
    memory, word = core.memory, core.word_bytes
    low = pointer - pointer % word
    high = min(int(memory.region_end[region]), low + FRAME_SEARCH_BYTES, low + search.bytes_left)
    search.bytes_left -= max(high - low, 0)
    try:
        words = memory.read_words(low, (high - low) // word)
    except MemoryFault:
        return
    if len(words) < 3:
        return
    start, flags, size = words[:-2], words[1:-1] & np.uint64(0x7FFFFFFF), words[2:]
    place = np.uint64(low) + np.arange(len(start), dtype=np.uint64) * np.uint64(word)
    room = int(memory.region_end[region] - memory.region_start[region])
    fits = (start >= memory.region_start[region]) & (start <= np.uint64(pointer)) & np.isin(flags, SIGNAL_STACK_FLAGS)
    fits &= (size >= np.uint64(LEAST_SIGNAL_STACK_BYTES)) & (size <= np.uint64(room))
    fits &= (start + size > place) & (start + size <= memory.region_end[region])
    for row in np.flatnonzero(fits)[:FRAMES_TRIED].tolist():
        try:
            interrupted = memory.read_word(int(place[row]) + SAVED_STACK_POINTER[core.machine])
        except MemoryFault:
            continue
        yield _Interrupted(interrupted, (int(start[row]), int(start[row] + size[row])))
    if core.machine == "i386":
        yield from _old_frames(core, region, words)


def _old_frames(core: Core, region: int, words: Words) -> Iterator[_Interrupted]:
    """Frames of handlers without SA_SIGINFO on i386: they have registers, and no uc_stack.

    struct sigcontext has the stack pointer twice, and cs and ss of user mode (their lowest bits are 3). Of the signal stack no
    more is known than that its mapping holds it.
    """
    esp, cs, esp_again, ss = 7, 15, 17, 18
    count = len(words) - ss
    if count <= 0:
        return
    held = words[esp : esp + count]
    fits = (held == words[esp_again : esp_again + count]) & (held != 0)
    fits &= (words[cs : cs + count] & np.uint64(3) == 3) & (words[ss : ss + count] & np.uint64(3) == 3)
    start, end = int(core.memory.region_start[region]), int(core.memory.region_end[region])
    signal_stack = (start, end) if end - start <= LARGEST_SIGNAL_STACK_BYTES else None
    for stack_pointer in held[fits][:FRAMES_TRIED].tolist():
        yield _Interrupted(stack_pointer, signal_stack)


def _in_handler(search: _FrameSearch, stack: Stack, pointer: int, region: int) -> Stack:
    """The stack of a thread that does not run on it, with the signal stack that it runs on, if a frame tells that."""
    for found in _interruptions(search, pointer, region):
        if stack.start <= found.stack_pointer < stack.end:
            return replace(stack, used_bytes=stack.end - found.stack_pointer, signal_stack=found.signal_stack)
    return stack


def _with_interrupted(core: Core, initial: tuple[int, int] | None) -> dict[int, ThreadStack]:
    """What descriptors tell; of threads whose thread pointer the core does not tell, in signal handlers as well."""
    memory = core.memory
    found = stacks_of_threads(core)
    elsewhere: dict[int, list[int]] = {}
    search = _FrameSearch(core)
    for thread in core.threads:
        region = memory.region_index(thread.stack_pointer)
        is_initial = initial is not None and initial[0] <= thread.stack_pointer < initial[1]
        if thread.thread_pointer is None and thread.index not in found and region is not None and not is_initial:
            pointers = [frame.stack_pointer for frame in _interruptions(search, thread.stack_pointer, region)]
            elsewhere[thread.index] = pointers[:FRAMES_TRIED]
    return stacks_of_threads(core, elsewhere) if any(elsewhere.values()) else found


def stack_residency(memory: AddressSpace, stacks: Stacks, holes_are_exact: bool) -> dict[int, StackResidency]:
    """For each thread what of its stack was in memory; not for stacks that the core does not hold as a whole.

    ``holes_are_exact``: what the core file has no blocks for was not there (``residency``). Otherwise pages with content count.
    """
    by_start = sorted(stacks.by_thread.values(), key=lambda stack: stack.start)
    start = np.array([stack.start for stack in by_start], np.uint64)
    end = np.array([stack.end for stack in by_start], np.uint64)
    stored = stored_pieces(memory, *without_overlap(start, end))
    runs = ByteRuns(stored.start, stored.end) if holes_are_exact else pages_with_content(memory, stored)
    # The first run that reaches into a stack; behind the last run lies none.
    first = np.searchsorted(runs.end, start, side="right")
    lowest = np.maximum(np.append(runs.start, np.uint64(LAST_ADDRESS))[first], start)
    columns = zip(
        by_start,
        (saved_runs(memory).bytes_within(start, end) == end - start).tolist(),
        runs.bytes_within(start, end).tolist(),
        (end - np.minimum(lowest, end)).tolist(),
        strict=True,
    )
    return {stack.thread: StackResidency(resident, peak) for stack, is_whole, resident, peak in columns if is_whole}
