"""The stacks of threads, their guards and their thread-local storage, as claims.

Knows: what ``corefile.stacks`` says of the threads that run, and where glibc keeps the stacks of those that have ended. Does not
know: a JVM's own zones in the stacks of its threads, or signal stacks that no handler runs on (nothing in a core tells those).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from coreheap.accounting.claims import NOBODY, Claims
from coreheap.corefile import Core
from coreheap.corefile.bss import module_bss
from coreheap.corefile.kinds import EXECUTE, READ, WRITE
from coreheap.corefile.regions import left_of, without_overlap
from coreheap.corefile.stacks import LARGEST_SUPPOSED_STACK_BYTES, Stack, Stacks, StackSource, find_stacks
from coreheap.corefile.thread_lists import ended_stacks, listed_stacks
from coreheap.corefile.thread_storage import thread_storages
from coreheap.mappings import MappingKind

Ranges = list[tuple[int, int, int]]
"""Start, end and thread of each."""


def stack_claims(core: Core, claims: Claims, stacks: Stacks | None = None) -> None:
    """Claim all stacks, guards and TLS that earlier claims (the heap's) leave. ``stacks`` saves finding them again."""
    stacks = stacks or find_stacks(core)
    own = stacks.by_thread.values()
    _claim(claims, MappingKind.STACK_GUARD, _guards(own))
    _claim(claims, MappingKind.TLS, _thread_local_storage(core, stacks))
    signal_stacks = [(*stack.signal_stack, stack.thread) for stack in own if stack.signal_stack is not None]
    _claim(claims, MappingKind.SIGNAL_STACK, signal_stacks)
    _claim(claims, MappingKind.THREAD_STACK, _of_source(own, StackSource.DESCRIPTOR))
    if stacks.initial is not None:
        owner = next((stack.thread for stack in own if stack.source is StackSource.INITIAL_STACK), NOBODY)
        _claim(claims, MappingKind.MAIN_STACK, [(*stacks.initial, owner)])
    _claim(claims, MappingKind.THREAD_STACK, _of_source(own, StackSource.MAPPING), is_supposed=True)
    _claim(claims, MappingKind.THREAD_STACK, _by_stack_pointer(core, stacks), is_supposed=True)
    _claim_ended(core, claims, stacks)


def _claim(
    claims: Claims, kind: MappingKind, ranges: Sequence[tuple[int, int, int]], *, is_supposed: bool = False
) -> None:
    start, end, thread = zip(*ranges, strict=True) if ranges else ((), (), ())
    claims.add(kind, start, end, thread=thread, is_supposed=is_supposed)


def _of_source(stacks: Iterable[Stack], source: StackSource) -> Ranges:
    return [(stack.start, stack.end, stack.thread) for stack in stacks if stack.source is source]


def _guards(stacks: Iterable[Stack]) -> Ranges:
    return [(stack.start - stack.guard_bytes, stack.start, stack.thread) for stack in stacks if stack.guard_bytes]


def _thread_local_storage(core: Core, stacks: Stacks) -> Ranges:
    """Static TLS and descriptor of each thread: all above it in a block that glibc made."""
    found: Ranges = []
    storages = thread_storages(core)
    for thread in core.threads:
        storage = storages.get(thread.index)
        stack = stacks.descriptors.get(thread.index)
        if storage is not None and stack is not None and stack.start <= storage.start < stack.end:
            found.append((storage.start, stack.end, thread.index))
        elif storage is not None:
            found.append((storage.start, storage.end, thread.index))
        elif stack is not None:
            # No thread pointer in the core. From this field on all is descriptor or TLS; what is before counts as stack.
            found.append((stack.stackblock_at, stack.end, thread.index))
    return found


def _by_stack_pointer(core: Core, stacks: Stacks) -> Ranges:
    """Mappings in which threads run, and of which no more is known: coroutines, stacks side by side without descriptors.

    Not what is larger than stacks are, or partly a module's: who knows what else lies there.
    """
    memory, bss = core.memory, module_bss(core)
    threads_of: dict[int, list[int]] = {}
    for thread in core.threads:
        if thread.index not in stacks.by_thread or thread.index in stacks.elsewhere:
            region = memory.region_index(thread.stack_pointer)
            if region is not None and int(memory.region_file_index[region]) < 0:
                threads_of.setdefault(region, []).append(thread.index)
    found: Ranges = []
    for region, threads in threads_of.items():
        start, end = int(memory.region_start[region]), int(memory.region_end[region])
        if end - start <= LARGEST_SUPPOSED_STACK_BYTES * len(threads) and not bss.meets(start, end):
            found.append((start, end, threads[0] if len(threads) == 1 else NOBODY))
    return found


def _claim_ended(core: Core, claims: Claims, stacks: Stacks) -> None:
    """Stacks of threads that have ended, in writable memory that nobody has claimed: joined and kept by glibc, or not joined."""
    listed = listed_stacks(core)
    if not stacks.descriptors and listed is None:
        return
    memory = core.memory
    is_candidate = (memory.region_flags & (READ | WRITE | EXECUTE) == READ | WRITE) & (memory.region_file_index < 0)
    claimed = claims.columns()
    start, end, _ = left_of(
        memory.region_start[is_candidate],
        memory.region_end[is_candidate],
        *without_overlap(claimed.start, claimed.end),
    )
    if not len(start):
        return
    # A block of glibc's may lie in several mappings that touch.
    goes_on = start[1:] == end[:-1]
    start, end = start[np.concatenate(([True], ~goes_on))], end[np.concatenate((~goes_on, [True]))]
    ended = list(ended_stacks(core, stacks.descriptors.values(), start, end))
    guards = [(stack.start, stack.start + stack.guard_bytes, NOBODY) for stack in ended]
    _claim(claims, MappingKind.STACK_GUARD, guards)
    unjoined = {stack.start for stack in listed.unjoined} if listed is not None else set()
    for kind, is_unjoined in ((MappingKind.UNJOINED_STACK, True), (MappingKind.ENDED_STACK, False)):
        _claim(claims, kind, [(one.start, one.end, NOBODY) for one in ended if (one.start in unjoined) is is_unjoined])
