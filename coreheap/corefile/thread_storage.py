"""Where each thread keeps its static TLS and its descriptor.

Knows: thread pointers, dtvs, the two variants of TLS. Does not know: stacks, or what a block holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coreheap.corefile import Core
from coreheap.corefile.thread_stacks import DESCRIPTOR_BYTES, TLS_BELOW_THREAD_POINTER
from coreheap.errors import MemoryFault

TLS_LIMIT = 1 << 20
"""Static TLS blocks further from the thread pointer are not believed."""
MODULES_WITH_TLS_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class ThreadStorage:
    """Where a thread's static TLS and descriptor lie: [start, end) around the thread pointer, ``dtv`` None if unknown."""

    thread: int
    start: int
    end: int
    dtv: int | None


def thread_storage(core: Core, number: int) -> ThreadStorage | None:
    """Static TLS and descriptor of a thread: from its dtv, which says where each module's block lies.

    glibc 2.12-2.44: the TCB's word 1 (word 0 on aarch64) is the dtv; its slots are {block, block to free}, slot -1 counts
    them, slot 0 is the generation. Unallocated blocks are -1, static ones have nothing to free (elf/dl-tls.c). Before 2.25 the
    second word is a bool, is_static: 1 for these.
    """
    thread = core.threads[number]
    pointer = thread.thread_pointer
    if not pointer:
        return None
    memory, word = core.memory, core.word_bytes
    is_below = TLS_BELOW_THREAD_POINTER[core.machine]
    low, high = (pointer, pointer + DESCRIPTOR_BYTES) if is_below else (pointer - DESCRIPTOR_BYTES, pointer + 2 * word)
    dtv: int | None = None
    try:
        dtv = memory.read_word(pointer + word if is_below else pointer)
        slots = memory.read_word(dtv - 2 * word)
        if not 0 < slots <= MODULES_WITH_TLS_LIMIT:
            raise MemoryFault(dtv, "no dtv", word)
        entries = memory.read_words(dtv + 2 * word, 2 * slots).reshape(-1, 2)
        # A block to free is a chunk's payload, never odd: where one slot has a bool, all have.
        is_static = entries[:, 1] & np.uint64(0xFF) == 1
        blocks = entries[is_static if is_static.any() else entries[:, 1] == 0, 0]
        near = blocks[(blocks < np.uint64(pointer)) if is_below else (blocks > np.uint64(pointer))]
        distance = np.uint64(pointer) - near if is_below else near - np.uint64(pointer)
        near = near[distance < np.uint64(TLS_LIMIT)]
        if len(near) and is_below:
            low = int(near.min())
        elif len(near):
            high = _end_of_tls(core, pointer, int(near.max()))
    except MemoryFault:
        dtv = None
    region = memory.region_index(pointer)
    if region is not None:
        low = max(low, int(memory.region_start[region]))
        high = min(high, int(memory.region_end[region]))
    return ThreadStorage(number, low, max(high, low), dtv)


def _end_of_tls(core: Core, pointer: int, last_block: int) -> int:
    """On aarch64 TLS goes up to the end of the stack's mapping; elsewhere a page behind the last block."""
    region = core.memory.region_index(pointer)
    if region is None:
        return last_block
    end = int(core.memory.region_end[region])
    return end if end - last_block <= TLS_LIMIT else last_block + core.page_bytes
