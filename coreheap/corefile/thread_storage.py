"""Where each thread keeps its static TLS and its descriptor.

Knows: thread pointers, dtvs, the two variants of TLS. Does not know: stacks, or what a block holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coreheap.corefile import Core
from coreheap.corefile.elf import Words
from coreheap.corefile.gathering import rows_at, words_at
from coreheap.corefile.thread_stacks import DESCRIPTOR_BYTES, TLS_BELOW_THREAD_POINTER

TLS_LIMIT = 1 << 20
"""Static TLS blocks further from the thread pointer are not believed."""
MODULES_WITH_TLS_LIMIT = 4096
WORDS_AT_ONCE = 1 << 22
"""Words of dtvs that are held at a time."""


@dataclass(frozen=True, slots=True)
class ThreadStorage:
    """Where a thread's static TLS and descriptor lie: [start, end) around the thread pointer, ``dtv`` None if unknown."""

    thread: int
    start: int
    end: int
    dtv: int | None


def thread_storages(core: Core) -> dict[int, ThreadStorage]:
    """Static TLS and descriptor of each thread whose thread pointer is known: from its dtv, which says where each module's
    block lies.

    glibc 2.12-2.44: the TCB's word 1 (word 0 on aarch64) is the dtv; its slots are {block, block to free}, slot -1 counts
    them, slot 0 is the generation. Unallocated blocks are -1, static ones have nothing to free (elf/dl-tls.c). Before 2.25 the
    second word is a bool, is_static: 1 for these.
    """
    memory, word = core.memory, core.word_bytes
    is_below = TLS_BELOW_THREAD_POINTER[core.machine]
    threads = [thread for thread in core.threads if thread.thread_pointer]
    pointers = np.array([thread.thread_pointer for thread in threads], np.uint64)
    dtvs, is_known = words_at(memory, pointers + np.uint64(word if is_below else 0))
    slots, is_saved = words_at(memory, dtvs - np.uint64(2 * word))
    is_known &= is_saved & (slots > 0) & (slots <= MODULES_WITH_TLS_LIMIT)
    farthest = pointers.copy()
    for count in np.unique(slots[is_known]).tolist():
        rows = np.flatnonzero(is_known & (slots == count))
        at_once = max(1, WORDS_AT_ONCE // (2 * count))
        for first in range(0, len(rows), at_once):
            some = rows[first : first + at_once]
            entries, is_known[some] = rows_at(memory, dtvs[some] + np.uint64(2 * word), 2 * count)
            farthest[some] = _farthest_blocks(entries.reshape(-1, count, 2), pointers[some], is_below)
    found: dict[int, ThreadStorage] = {}
    columns = zip(threads, pointers.tolist(), dtvs.tolist(), is_known.tolist(), farthest.tolist(), strict=True)
    for thread, pointer, dtv, knows, block in columns:
        low, high = pointer, pointer + DESCRIPTOR_BYTES
        if not is_below:
            low, high = pointer - DESCRIPTOR_BYTES, pointer + 2 * word
        if knows and block != pointer:
            low, high = (block, high) if is_below else (low, _end_of_tls(core, pointer, block))
        region = memory.region_index(pointer)
        if region is not None:
            low = max(low, int(memory.region_start[region]))
            high = min(high, int(memory.region_end[region]))
        found[thread.index] = ThreadStorage(thread.index, low, max(high, low), dtv if knows else None)
    return found


def _farthest_blocks(slots: Words, pointers: Words, is_below: bool) -> Words:
    """The static TLS block of each thread that lies farthest from its thread pointer, which stands for none; ``slots`` are
    {block, block to free} of each thread's dtv: uint64[threads, slots, 2]."""
    blocks, to_free, pointer = slots[:, :, 0], slots[:, :, 1], pointers[:, None]
    # A block to free is a chunk's payload, never odd: where one slot has a bool, all have.
    is_static = to_free & np.uint64(0xFF) == 1
    is_static = np.where(is_static.any(axis=1)[:, None], is_static, to_free == 0)
    distance = pointer - blocks if is_below else blocks - pointer
    is_near = is_static & ((blocks < pointer) if is_below else (blocks > pointer)) & (distance < np.uint64(TLS_LIMIT))
    farthest = np.where(is_near, distance, np.uint64(0)).max(axis=1, initial=0)
    found: Words = pointers - farthest if is_below else pointers + farthest
    return found


def _end_of_tls(core: Core, pointer: int, last_block: int) -> int:
    """On aarch64 TLS goes up to the end of the stack's mapping; elsewhere a page behind the last block."""
    region = core.memory.region_index(pointer)
    if region is None:
        return last_block
    end = int(core.memory.region_end[region])
    return end if end - last_block <= TLS_LIMIT else last_block + core.page_bytes
