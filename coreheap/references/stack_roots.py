"""Which memory is the stack of a thread, and which part of it may still be in use.

Knows: stack pointers, guards, shapes of mappings, what descriptors tell (``thread_stacks``). Does not know: other roots.

Below a stack pointer, less the red zone, a stack holds nothing that is alive; that is believed only where the stack ends at
a guard, else the words there count as those of an old stack. The stacks of threads that have ended stay mapped (glibc
keeps up to 40 MiB of them): they are told by their descriptors, or by the shape of their mapping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from coreheap.corefile import AddressSpace, Core
from coreheap.corefile.kinds import RegionLabel
from coreheap.corefile.thread_lists import ended_stacks
from coreheap.corefile.thread_stacks import DESCRIPTOR_BYTES, TLS_BELOW_THREAD_POINTER, ThreadStack
from coreheap.corefile.thread_storage import ThreadStorage
from coreheap.errors import MemoryFault
from coreheap.leaks import RootKind
from coreheap.references.ranges import Painter, RootRanges

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

RED_ZONE_BYTES = {"x86_64": 128}
"""System V ABI for x86-64, 3.2.2; i386 and AAPCS64 (Linux) have none."""
INITIAL_STACK_TAGS = (25, 31)
"""AT_RANDOM and AT_EXECFN point into the stack that a program begins with (include/uapi/linux/auxvec.h)."""


def _guarded(memory: AddressSpace, start: int) -> bool:
    """Whether memory that nothing may touch, or a known hole in the address space, lies directly below an address."""
    row = memory.region_index(start - 1)
    return row is not None and int(memory.region_flags[row]) & 7 == 0 and int(memory.region_file_index[row]) < 0


def mark_stacks(
    core: Core,
    labels: Int64s,
    painter: Painter,
    storage: Sequence[ThreadStorage],
    known: Mapping[int, ThreadStack],
    heap: tuple[UInt64s, UInt64s],
) -> None:
    """The stacks of all threads: as their descriptors tell them, else as the mappings do.

    One that lies in a chunk is the heap's, and says nothing of the memory around it.
    """
    memory = core.memory
    red_zone = RED_ZONE_BYTES.get(core.machine, 0)
    storage_of = {block.thread: block for block in storage}
    by_region: dict[int, list[int]] = {}
    for thread in core.threads:
        region = memory.region_index(thread.stack_pointer)
        is_stack = region is not None and labels[region] == RegionLabel.THREAD_STACKS
        stack = known.get(thread.index)
        if stack is not None and stack.start <= thread.stack_pointer < stack.end:
            continue
        if region is not None and is_stack and not _is_within(heap, thread.stack_pointer):
            by_region.setdefault(region, []).append(thread.index)
    for region, threads in by_region.items():
        start, end = int(memory.region_start[region]), int(memory.region_end[region])
        threads.sort(key=lambda number: core.threads[number].stack_pointer)
        lowest = core.threads[threads[0]].stack_pointer - red_zone
        is_main = _holds_initial_stack(core, start, end)
        # Memory of any other use may lie below a stack that its program made itself.
        below_is_dead = is_main or _guarded(memory, start)
        painter.add(start, lowest, None if below_is_dead else RootKind.OLD_STACK, threads[0])
        for position, number in enumerate(threads):
            low = max(core.threads[number].stack_pointer - red_zone, start)
            high = end
            if position + 1 < len(threads):
                high = max(low, core.threads[threads[position + 1]].stack_pointer - red_zone)
            block = storage_of.get(number)
            if block is not None and low < block.start < high:
                painter.add(low, block.start, RootKind.STACK, number)
                if position + 1 < len(threads):
                    painter.add(block.end, high, RootKind.OLD_STACK, threads[position + 1])
            else:
                painter.add(low, high, RootKind.STACK, number)
    _mark_stacks_left(core, labels, painter, [block for block in storage if block.thread not in known], set(by_region))
    writable = np.isin(labels, (RegionLabel.OTHER_ANONYMOUS, RegionLabel.THREAD_STACKS))
    writable &= (memory.region_flags & 7) == 6
    places = RootRanges.of_one_kind(memory.region_start[writable], memory.region_end[writable], RootKind.ANONYMOUS)
    outside = places.without(*heap)
    for stack in ended_stacks(core, known.values(), outside.start, outside.end):
        painter.add(stack.start, stack.end, RootKind.OLD_STACK)
    for number, stack in known.items():
        block, pointer = storage_of.get(number), core.threads[number].stack_pointer
        end = stack.end if block is None else min(block.start, stack.end)
        if stack.start <= pointer < stack.end:
            # glibc's own consist of whole pages. What a program handed over may have been a part of something else.
            is_glibc_own = stack.start % core.page_bytes == stack.end % core.page_bytes == 0
            painter.add(stack.start, pointer - red_zone, None if is_glibc_own else RootKind.OLD_STACK, number)
            painter.add(max(pointer - red_zone, stack.start), end, RootKind.STACK, number)
        else:
            painter.add(stack.start, end, RootKind.STACK, number)


def _is_within(ranges: tuple[UInt64s, UInt64s], address: int) -> bool:
    """Whether an address lies in one of some ranges, sorted and without overlap."""
    row = int(np.searchsorted(ranges[0], np.uint64(address), side="right")) - 1
    return row >= 0 and address < int(ranges[1][row])


def _mark_stacks_left(
    core: Core, labels: Int64s, painter: Painter, storage: Sequence[ThreadStorage], in_use: set[int]
) -> None:
    """Stacks of threads that run on another one: a signal's (sigaltstack), a coroutine's. How deep they are is not known."""
    memory = core.memory
    first_thread = next((thread.index for thread in core.threads if thread.lwp == core.process.pid), None)
    initial = [memory.region_index(core.auxv.get(tag, 0)) for tag in INITIAL_STACK_TAGS]
    places: list[tuple[int | None, int | None, int | None]] = [(region, first_thread, None) for region in initial]
    # The first thread's descriptor is not on its stack.
    places += [
        (memory.region_index(block.end - 1), block.thread, block.start)
        for block in storage
        if first_thread is not None and block.thread != first_thread
    ]
    for region, thread, top in places:
        if region is not None and region not in in_use and labels[region] == RegionLabel.OTHER_ANONYMOUS:
            start, end = int(memory.region_start[region]), int(memory.region_end[region])
            painter.add(start, end if top is None else top, RootKind.STACK, -1 if thread is None else thread)


def _holds_initial_stack(core: Core, start: int, end: int) -> bool:
    """Whether the kernel made this stack for the program (fs/binfmt_elf.c)."""
    return any(start <= core.auxv.get(tag, 0) < end for tag in INITIAL_STACK_TAGS)


def mark_old_stacks(core: Core, labels: Int64s, painter: Painter) -> None:
    """Stacks that glibc keeps of threads that have ended.

    Anonymous memory behind a guard that is as large as a living thread's stack with its guard, and holds no thread.
    """
    memory = core.memory
    in_use: set[int] = set()
    shapes: set[tuple[int, int]] = set()
    for thread in core.threads:
        for address in (thread.stack_pointer, thread.thread_pointer or 0):
            region = memory.region_index(address)
            if region is not None:
                in_use.add(region)
        region = memory.region_index(thread.stack_pointer)
        if region is not None and _guarded(memory, int(memory.region_start[region])):
            shapes.add(_shape(memory, region))
    anonymous = np.flatnonzero((labels == RegionLabel.OTHER_ANONYMOUS) & ((memory.region_flags & 7) == 6)).tolist()
    for region in anonymous:
        start = int(memory.region_start[region])
        if region in in_use or not _guarded(memory, start):
            continue
        end = int(memory.region_end[region])
        if _shape(memory, region) in shapes or _ends_with_descriptor(core, start, end):
            painter.add(start, end, RootKind.OLD_STACK)


def _shape(memory: AddressSpace, region: int) -> tuple[int, int]:
    guard = memory.region_index(int(memory.region_start[region]) - 1)
    if guard is None:
        return 0, 0
    return (
        int(memory.region_end[guard] - memory.region_start[guard]),
        int(memory.region_end[region] - memory.region_start[region]),
    )


def _ends_with_descriptor(core: Core, start: int, end: int) -> bool:
    """Whether a struct pthread lies at the end: on x86 its words 0 and 2 (tcb, self) hold its own address (tls.h)."""
    if not TLS_BELOW_THREAD_POINTER.get(core.machine, False):
        return False
    word = core.word_bytes
    low = max(start, end - 2 * DESCRIPTOR_BYTES)
    try:
        words = core.memory.read_words(low, (end - low) // word)
    except MemoryFault:
        return False
    own = np.uint64(low) + np.arange(len(words), dtype=np.uint64) * np.uint64(word)
    return bool(np.any((words[:-2] == own[:-2]) & (words[2:] == own[:-2])))
