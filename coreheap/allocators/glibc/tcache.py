"""tcache structures: recognising one, and finding those of threads that run or ran.

Knows: what a tcache_perthread_struct must look like under a layout. Does not know: which layout is right, nor what the
cached blocks are in the chunk index (``overlay``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.locate import mapped_writable
from coreheap.allocators.glibc.records import Layout, TcacheState, read_tcache
from coreheap.allocators.glibc.structures import TcacheKey
from coreheap.corefile import AddressSpace, Core
from coreheap.errors import MemoryFault
from coreheap.heap import ChunkTable
from coreheap.kernels import ChunkState

TCACHES_BY_STRUCTURE_LIMIT = 1 << 16
ROWS_AT_ONCE = 1 << 12
TCACHE_NODES_SAMPLED = 64


@dataclass(frozen=True, slots=True)
class Cache:
    """One tcache structure: payload address, owner (None: no running thread), and what it says."""

    address: int
    thread: int | None
    state: TcacheState


def has_tcache_size(memory: AddressSpace, layout: Layout, address: int) -> bool:
    """Whether there is a chunk of a tcache structure's size at a payload address."""
    word_class = layout.word_class
    sizes = layout.tcache_chunk_bytes
    if not sizes or address % word_class.alignment:
        return False
    if not bool(mapped_writable(memory, np.array([address], dtype=np.uint64))[0]):
        return False
    try:
        size_word = memory.read_word(address - word_class.word_bytes)
    except MemoryFault:
        return False
    return size_word & ~7 in sizes and not size_word & 2


def is_tcache(memory: AddressSpace, layout: Layout, address: int) -> bool:
    """Whether a tcache structure may be at a payload address: its chunk's size, and counts that agree with the lists."""
    if not has_tcache_size(memory, layout, address):
        return False
    try:
        return counts_agree(layout, read_tcache(memory, address, layout))
    except MemoryFault:
        return False


def may_stand_for_tcache(memory: AddressSpace, layout: Layout, address: int) -> bool:
    """Whether a thread's tcache pointer may have this value though no sound structure is there.

    From 2.43 it leads to a dummy in read-only memory until the first free; a structure may be damaged.
    """
    is_writable = bool(mapped_writable(memory, np.array([address], dtype=np.uint64))[0])
    if layout.generation.tcache_is_never_null and memory.region_index(address) is not None and not is_writable:
        return True
    return has_tcache_size(memory, layout, address)


def counts_agree(layout: Layout, state: TcacheState) -> bool:
    """Whether the counts of a tcache structure go with its list heads.

    Up to 2.41 a count is 0 exactly where the list is empty. From 2.42 empty lists have all slots free, which is the
    most that any count says, and lists with blocks have fewer.
    """
    has_entry = state.entries != 0
    aligned = bool((state.entries % np.uint64(layout.word_class.alignment) == 0).all())
    if not layout.generation.tcache_counts_free_slots:
        return aligned and bool(((state.counts > 0) == has_entry).all())
    most = int(state.counts.max())
    return (
        aligned
        and (most > 0 or bool(has_entry.all()))
        and bool((has_entry | (state.counts == most)).all())
        and not bool((has_entry & (state.counts == most)).any() and not has_entry.all())
    )


def links_of_tcache(
    memory: AddressSpace, layout: Layout, entries: npt.NDArray[np.uint64], owner: int
) -> tuple[int, int]:
    """Of the first nodes of each list: how many next pointers decode to aligned memory (or the end), and how many were read."""
    word_class, good, seen = layout.word_class, 0, 0
    key = layout.generation.tcache_key
    for head in entries[entries != 0].tolist():
        node, steps = int(head), 0
        while node and steps < TCACHE_NODES_SAMPLED:
            steps += 1
            try:
                stored = memory.read_word(node)
                second = memory.read_word(node + word_class.word_bytes)
            except MemoryFault:
                break
            following = stored ^ (node >> 12) if layout.generation.safe_linking else stored
            seen += 1
            fits = following % word_class.alignment == 0 and (
                following == 0 or bool(mapped_writable(memory, np.array([following], np.uint64))[0])
            )
            if key is TcacheKey.STRUCT_ADDRESS:
                fits = fits and second == owner
            elif key is TcacheKey.RANDOM_WORD:
                fits = fits and second != owner
            good += fits
            if not fits:
                break
            node = following
    return good, seen


def caches_of_threads(core: Core, layout: Layout, addresses: npt.NDArray[np.uint64]) -> list[Cache]:
    """The tcache of each thread that has one, damaged ones too; ``addresses`` by thread index, 0 for none."""
    caches = []
    for thread, address in enumerate(addresses.tolist()):
        if has_tcache_size(core.memory, layout, address):
            try:
                caches.append(Cache(address, thread, read_tcache(core.memory, address, layout)))
            except MemoryFault:
                continue
    return caches


def cache_at(core: Core, layout: Layout, address: int, thread: int | None) -> Cache | None:
    """The tcache structure at a payload address; None where it is not one (the dummy of 2.43+) or was not saved."""
    if not is_tcache(core.memory, layout, address):
        return None
    try:
        return Cache(address, thread, read_tcache(core.memory, address, layout))
    except MemoryFault:
        return None


def caches_by_structure(core: Core, layout: Layout, chunks: ChunkTable) -> list[Cache]:
    """tcache structures among chunks in use, by size and content, for when TLS is not in the core.

    Only those that hold blocks: their lists prove them. An empty one looks like any zeroed block of its size.
    """
    caches: list[Cache] = []
    sizes = np.array(layout.tcache_chunk_bytes, np.uint64)
    for batch in chunks.batches():
        if batch.is_mmapped:
            continue
        fits = np.isin(batch.chunk_bytes, sizes) & (batch.state == ChunkState.IN_USE)
        for address in _with_lists(core.memory, layout, batch.payload_address[fits]).tolist():
            cache = cache_at(core, layout, address, None)
            if cache is None:
                continue
            good, seen = links_of_tcache(core.memory, layout, cache.state.entries, address)
            if good == seen:
                caches.append(cache)
            if len(caches) >= TCACHES_BY_STRUCTURE_LIMIT:
                return caches
    return caches


def possible_tcaches(core: Core, layout: Layout, chunks: ChunkTable) -> npt.NDArray[np.uint64]:
    """Payload addresses of all chunks in use that may hold a tcache structure, empty ones included."""
    sizes = np.array(layout.tcache_chunk_bytes, np.uint64)
    found = [np.zeros(0, np.uint64)]
    for batch in chunks.batches():
        if not batch.is_mmapped:
            fits = np.isin(batch.chunk_bytes, sizes) & (batch.state == ChunkState.IN_USE)
            found.append(batch.payload_address[fits])
    addresses = np.concatenate(found)[:TCACHES_BY_STRUCTURE_LIMIT]
    return np.array([address for address in addresses.tolist() if is_tcache(core.memory, layout, address)], np.uint64)


def _with_lists(memory: AddressSpace, layout: Layout, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Those payload addresses at which every word where a tcache has a list head is 0 or a possible pointer, and not all 0.

    A program may have any number of blocks of a tcache structure's size; most of them do not get past this.
    """
    fields = layout.tcache
    if fields is None or not len(addresses):
        return addresses[:0]
    entries = fields.fields["entries"]
    run = np.searchsorted(memory.run_start, addresses, side="right") - 1
    saved = (run >= 0) & (addresses + np.uint64(fields.byte_count) <= memory.run_end[np.maximum(run, 0)])
    addresses, run = addresses[saved], run[saved]
    offset = (addresses - memory.run_start[run] + memory.run_file_offset[run]).astype(np.int64)
    kept = [addresses[:0]]
    columns = entries.offset + np.arange(entries.count * entries.element_bytes)
    for first in range(0, len(addresses), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        words = memory.file[offset[rows, None] + columns].view(f"<u{entries.element_bytes}")
        aligned = (words % layout.word_class.alignment == 0).all(axis=1)
        kept.append(addresses[rows][aligned & words.any(axis=1)])
    return np.concatenate(kept)
