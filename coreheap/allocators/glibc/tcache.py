"""tcache structures: recognising one, and finding those of threads that run or ran.

Knows: what a tcache_perthread_struct must look like under a layout. Does not know: which layout is right, nor what the
cached blocks are in the chunk index (``overlay``).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.gathering import Bools, UInt64s, columns_at, words_at
from coreheap.allocators.glibc.locate import WRITABLE, mapped_for_data
from coreheap.allocators.glibc.records import Layout, TcacheState, read_tcache
from coreheap.allocators.glibc.structures import SAFE_LINKING_SHIFT, TcacheKey
from coreheap.allocators.glibc.thread_storage import Wanted
from coreheap.corefile import AddressSpace, Core
from coreheap.errors import MemoryFault
from coreheap.heap import ChunkTable
from coreheap.kernels import ChunkState

Int64s = npt.NDArray[np.int64]

TCACHES_BY_STRUCTURE_LIMIT = 1 << 16
"""tcache structures that are told without a thread; each becomes an object."""
ROWS_AT_ONCE = 1 << 12
TCACHE_NODES_SAMPLED = 64
EMPTY_LISTS_OF_A_DAMAGED_ONE = 3
LINKS_OF_A_DAMAGED_ONE = 4
"""Links that must lead on where a structure's own counts do not bear it out."""


@dataclass(frozen=True, slots=True)
class Cache:
    """One tcache structure: payload address, owner (None: no running thread), and what it says."""

    address: int
    thread: int | None
    state: TcacheState


def have_tcache_size(memory: AddressSpace, layout: Layout, addresses: UInt64s) -> Bools:
    """For each payload address, whether there is a chunk of a tcache structure's size; bool[n]."""
    word_class = layout.word_class
    fits: Bools = (addresses % np.uint64(word_class.alignment) == 0) & mapped_for_data(memory, addresses)
    fits &= addresses >= np.uint64(word_class.header_bytes)
    size_word, saved = words_at(memory, addresses[fits] - np.uint64(word_class.word_bytes))
    sizes = np.array(layout.tcache_chunk_bytes, np.uint64)
    fits[fits] = saved & np.isin(size_word & ~np.uint64(7), sizes) & (size_word & np.uint64(2) == 0)
    return fits


def has_tcache_size(memory: AddressSpace, layout: Layout, address: int) -> bool:
    """As ``have_tcache_size``, for one."""
    return bool(have_tcache_size(memory, layout, np.array([address], np.uint64))[0])


def are_tcaches(memory: AddressSpace, layout: Layout, addresses: UInt64s) -> Bools:
    """For each payload address, whether a tcache structure may be there: its chunk's size, and counts that agree with the
    lists; bool[n]."""
    fits = have_tcache_size(memory, layout, addresses)
    rows = np.flatnonzero(fits)
    for first in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[first : first + ROWS_AT_ONCE]
        counts, entries, saved = _lists_at(memory, layout, addresses[some])
        fits[some] = saved & _counts_agree(layout, counts, entries)
    return fits


def wanted_tcache(memory: AddressSpace, layout: Layout) -> Wanted | None:
    """What a thread's tcache pointer leads to under a layout; None where the layout has no tcache.

    From 2.43 it leads to a dummy in read-only memory until the first free.
    """
    if layout.tcache is None:
        return None

    def is_dummy(addresses: UInt64s) -> Bools:
        if layout.generation.tcache_is_never_null:
            return mapped_read_only(memory, addresses)
        return np.zeros(len(addresses), np.bool_)

    return Wanted(
        "a tcache",
        lambda addresses: are_tcaches(memory, layout, addresses),
        lambda addresses: have_tcache_size(memory, layout, addresses),
        is_dummy,
    )


def tcache_kind(layout: Layout) -> Hashable:
    """Equal for layouts under which the same words lead to a tcache: what ``wanted_tcache`` asks of a layout."""
    generation = layout.generation
    return (
        layout.word_class.name,
        generation.tcache,
        generation.tcache_counts_free_slots,
        generation.tcache_is_never_null,
        layout.tcache_chunk_bytes,
    )


def mapped_read_only(memory: AddressSpace, addresses: UInt64s) -> Bools:
    """For each address whether it lies in a region of the process that cannot be written; bool[n]."""
    position = np.searchsorted(memory.region_start, addresses, side="right") - 1
    mapped: Bools = position >= 0
    position = np.maximum(position, 0)
    if len(memory.region_start):
        mapped &= (addresses < memory.region_end[position]) & (memory.region_flags[position] & WRITABLE == 0)
    return mapped


def slots_of_empty_lists(layout: Layout, caches: list[Cache], tcache_count: int | None) -> int | None:
    """How many slots each list of a copy's tcaches has (2.42+): what most empty lists say, else mp_.tcache_count.

    The setting is read when a structure is made; so where most lists contradict mp_, it is mp_ that was changed.
    """
    if not layout.generation.tcache_counts_free_slots or not caches:
        return tcache_count
    empty = np.concatenate([cache.state.counts[cache.state.entries == 0] for cache in caches])
    values, numbers = np.unique(empty, return_counts=True)
    if len(values) and 2 * int(numbers.max()) > len(empty):
        return int(values[numbers.argmax()])
    return tcache_count


def counts_agree(layout: Layout, state: TcacheState) -> bool:
    """Whether the counts of a tcache structure go with its list heads.

    Up to 2.41 a count is 0 exactly where the list is empty. From 2.42 empty lists have all slots free, which is the
    most that any count says, and lists with blocks have fewer.
    """
    return bool(_counts_agree(layout, state.counts[None, :], state.entries[None, :])[0])


def _counts_agree(layout: Layout, counts: UInt64s, entries: UInt64s) -> Bools:
    """As ``counts_agree``, for each row."""
    has_entry = entries != 0
    fits: Bools = (entries % np.uint64(layout.word_class.alignment) == 0).all(axis=1)
    if not layout.generation.tcache_counts_free_slots:
        fits &= ((counts > 0) == has_entry).all(axis=1)
        return fits
    most = counts.max(axis=1)
    is_full = counts == most[:, None]
    all_used = has_entry.all(axis=1)
    fits &= (most > 0) | all_used
    fits &= (has_entry | is_full).all(axis=1)
    fits &= ~(has_entry & is_full).any(axis=1) | all_used
    return fits


def _one_list_is_wrong(layout: Layout, counts: UInt64s, entries: UInt64s) -> Bools:
    """For each row whether its counts would go with its list heads but for one list, whose head may be misaligned."""
    has_entry = entries != 0
    misaligned = entries % np.uint64(layout.word_class.alignment) != 0
    if not layout.generation.tcache_counts_free_slots:
        one: Bools = (misaligned | ((counts > 0) != has_entry)).sum(axis=1) == 1
        return one
    # Empty lists have all slots free: the one in the middle of theirs by size says how many that is.
    empty = (~has_entry).sum(axis=1)
    ordered = np.sort(np.where(has_entry, np.iinfo(np.uint64).max, counts), axis=1)
    slots = ordered[np.arange(len(ordered)), np.minimum(empty // 2, ordered.shape[1] - 1)][:, None]
    wrong = misaligned | np.where(has_entry, counts >= slots, counts != slots)
    fits: Bools = (empty >= EMPTY_LISTS_OF_A_DAMAGED_ONE) & (slots[:, 0] > 0)
    fits &= wrong.sum(axis=1) == 1
    return fits


def _lists_at(memory: AddressSpace, layout: Layout, addresses: UInt64s) -> tuple[UInt64s, UInt64s, Bools]:
    """counts and entries of the tcache structure at each payload address, uint64[n, bins], and whether it was saved."""
    fields = layout.tcache
    if fields is None:
        nothing = np.zeros((len(addresses), 0), np.uint64)
        return nothing, nothing, np.zeros(len(addresses), np.bool_)
    (counts, entries), saved = columns_at(memory, addresses, fields, ("counts", "entries"))
    return counts, entries, saved


def links_of_tcache(memory: AddressSpace, layout: Layout, entries: UInt64s, owner: int) -> tuple[int, int]:
    """Of the first nodes of each list: how many next pointers decode to aligned memory (or the end), and how many were read."""
    good, seen = _links_of(memory, layout, entries[None, :], np.array([owner], np.uint64))
    return int(good[0]), int(seen[0])


def _links_of(memory: AddressSpace, layout: Layout, entries: UInt64s, owners: UInt64s) -> tuple[Int64s, Int64s]:
    """As ``links_of_tcache`` for each row of list heads; all lists are followed in step, each up to its first bad link."""
    word_class, key = layout.word_class, layout.generation.tcache_key
    good, seen = np.zeros(len(entries), np.int64), np.zeros(len(entries), np.int64)
    row, column = np.nonzero(entries)
    node = entries[row, column]
    for _ in range(TCACHE_NODES_SAMPLED):
        if not len(node):
            break
        stored, first_saved = words_at(memory, node)
        second, second_saved = words_at(memory, node + np.uint64(word_class.word_bytes))
        saved = first_saved & second_saved
        row, node, stored, second = row[saved], node[saved], stored[saved], second[saved]
        following = stored ^ (node >> np.uint64(SAFE_LINKING_SHIFT)) if layout.generation.safe_linking else stored
        fits = (following % np.uint64(word_class.alignment) == 0) & (
            (following == 0) | mapped_for_data(memory, following)
        )
        if key is TcacheKey.STRUCT_ADDRESS:
            fits &= second == owners[row]
        else:  # user data or a random word: no release writes the structure's address there
            fits &= second != owners[row]
        seen += np.bincount(row, minlength=len(entries))
        good += np.bincount(row[fits], minlength=len(entries))
        goes_on = fits & (following != 0)
        row, node = row[goes_on], following[goes_on]
    return good, seen


def caches_of_threads(core: Core, layout: Layout, addresses: npt.NDArray[np.uint64]) -> list[Cache]:
    """The tcache of each thread that has one, damaged ones too; ``addresses`` by thread index, 0 for none."""
    caches: list[Cache] = []
    threads = np.flatnonzero(have_tcache_size(core.memory, layout, addresses))
    for first in range(0, len(threads), ROWS_AT_ONCE):
        some = threads[first : first + ROWS_AT_ONCE]
        counts, entries, saved = _lists_at(core.memory, layout, addresses[some])
        for row in np.flatnonzero(saved).tolist():
            thread = int(some[row])
            address = int(addresses[thread])
            caches.append(Cache(address, thread, TcacheState(address, counts[row], entries[row])))
    return caches


def cache_at(core: Core, layout: Layout, address: int, thread: int | None) -> Cache | None:
    """The tcache structure at a payload address, be it damaged; None where none can be (the dummy of 2.43+) or was saved."""
    if not has_tcache_size(core.memory, layout, address):
        return None
    try:
        return Cache(address, thread, read_tcache(core.memory, address, layout))
    except MemoryFault:
        return None


def caches_by_structure(core: Core, layout: Layout, chunks: ChunkTable) -> list[Cache]:
    """tcache structures among chunks in use, by size and content, for when TLS is not in the core.

    Only those that hold blocks: their lists prove them. An empty one looks like any zeroed block of its size.
    """
    memory = core.memory
    caches: list[Cache] = []
    for addresses in _chunks_of_tcache_size(layout, chunks):
        counts, entries, saved = _lists_at(memory, layout, addresses)
        # Most blocks of this size are a program's, and most of those do not get past this.
        proven = saved & entries.any(axis=1) & _counts_agree(layout, counts, entries)
        proven[proven] = have_tcache_size(memory, layout, addresses[proven])
        heads = entries[proven]
        good, seen = _links_of(memory, layout, heads, addresses[proven])
        # Heads that lead nowhere prove nothing: a block filled with one byte has such.
        lead_on = ((heads == 0) | mapped_for_data(memory, heads.ravel()).reshape(heads.shape)).all(axis=1)
        proven[proven] = (good == seen) & (seen > 0) & lead_on
        for row in np.flatnonzero(proven)[: TCACHES_BY_STRUCTURE_LIMIT - len(caches)].tolist():
            address = int(addresses[row])
            caches.append(Cache(address, None, TcacheState(address, counts[row].copy(), entries[row].copy())))
    return caches


def possible_tcaches(core: Core, layout: Layout, chunks: ChunkTable) -> UInt64s:
    """Payload addresses of all chunks in use that may hold a tcache structure, empty ones included.

    One with a single wrong count or misaligned head is taken, too, where its other lists lead on as such lists do.
    """
    memory = core.memory
    found = [np.zeros(0, np.uint64)]
    for addresses in _chunks_of_tcache_size(layout, chunks):
        counts, entries, saved = _lists_at(memory, layout, addresses)
        may_be = saved & _counts_agree(layout, counts, entries)
        damaged = np.flatnonzero(saved & ~may_be & entries.any(axis=1) & _one_list_is_wrong(layout, counts, entries))
        heads = entries[damaged]
        heads[heads % np.uint64(layout.word_class.alignment) != 0] = 0
        good, seen = _links_of(memory, layout, heads, addresses[damaged])
        may_be[damaged] = (good == seen) & (seen >= LINKS_OF_A_DAMAGED_ONE)
        may_be[may_be] = have_tcache_size(memory, layout, addresses[may_be])
        found.append(addresses[may_be])
    return np.concatenate(found)


def _chunks_of_tcache_size(layout: Layout, chunks: ChunkTable) -> Iterator[UInt64s]:
    """Payload addresses of the chunks in use that have a tcache structure's size, at most ROWS_AT_ONCE at a time."""
    sizes = np.array(layout.tcache_chunk_bytes, np.uint64)
    if not len(sizes):
        return
    for batch in chunks.batches():
        if batch.is_mmapped:
            continue
        addresses = batch.payload_address[np.isin(batch.chunk_bytes, sizes) & (batch.state == ChunkState.IN_USE)]
        for first in range(0, len(addresses), ROWS_AT_ONCE):
            yield addresses[first : first + ROWS_AT_ONCE]
