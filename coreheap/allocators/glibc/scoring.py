"""How well one layout fits what a core holds: each part of a generation's score, by invariants of malloc itself.

Knows: what must hold in every intact malloc_state, sub-heap and tcache. Does not know: which layouts are in question,
nor what their scores lead to (``identify``).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc import locate
from coreheap.allocators.glibc.gathering import words_at
from coreheap.allocators.glibc.locate import ArenaRing
from coreheap.allocators.glibc.records import BIN_COUNT, ArenaState, HeapInfo, Layout, read_arena, read_tcache
from coreheap.allocators.glibc.structures import SAFE_LINKING_SHIFT
from coreheap.allocators.glibc.tcache import counts_agree, links_of_tcache
from coreheap.corefile import AddressSpace
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength

ARENA_ACCEPTED = 0.9
"""Share of an arena's invariants that must hold before a place counts as an arena at all."""

ARENAS_SAMPLED = 64

FASTBINS_SAMPLED, FAST_CHUNKS_SAMPLED = 16, 64
"""Arenas whose fastbins are asked how they are linked, and chunks of each list."""


def arena_score(memory: AddressSpace, state: ArenaState, layout: Layout) -> float:
    """Share of the invariants of one malloc_state that hold under a layout, between 0 and 1.

    Source: malloc_init_state, sysmalloc, arena_get2 (glibc 2.12-2.44). Half of it are the 127 bins.
    """
    word_class = layout.word_class
    flags_allowed = 0b111 if layout.generation.flags_hold_fastchunks else 0b010
    if state.is_unused:
        is_empty = not state.bins.any() and not state.fastbins.any()
        return float(is_empty and _leads_on_unused(memory, state, layout))
    first_bin = layout.bin_header(state.address, 1)
    header = np.uint64(first_bin) + np.arange(BIN_COUNT, dtype=np.uint64) * np.uint64(word_class.header_bytes)
    phase = np.uint64(word_class.granule_phase)
    mask = np.uint64(word_class.alignment - 1)
    fd, bk = state.bins[0::2], state.bins[1::2]
    leads_off = (fd != header) & (bk != header)
    filled = np.flatnonzero(leads_off)
    fast = state.fastbins[state.fastbins != 0]
    # All that has to be mapped, in one question.
    mapped = locate.mapped_for_data(
        memory, np.concatenate((fd[filled], bk[filled], fast, np.array([state.top, state.next], np.uint64)))
    )
    aligned = ((fd[filled] & mask) == phase) & ((bk[filled] & mask) == phase)
    linked = int((aligned & mapped[: len(filled)] & mapped[len(filled) : 2 * len(filled)]).sum())
    empty = int(((fd == header) & (bk == header)).sum())
    bins_share = (empty + linked) / BIN_COUNT
    top_mapped, next_mapped = mapped[-2:].tolist()
    checks: list[bool] = [
        state.mutex in (0, 1, 2),
        state.flags & ~flags_allowed == 0,
        state.system_mem <= state.max_system_mem,
        state.top == first_bin or ((state.top & (word_class.alignment - 1)) == word_class.granule_phase and top_mapped),
        state.system_mem > 0 or state.top == first_bin,
        state.attached_threads is None or state.attached_threads < 1 << 20,
        bool((((fast & mask) == phase) & mapped[2 * len(filled) : -2]).all()),
        state.next != 0 and next_mapped,
    ]
    return 0.5 * bins_share + 0.5 * sum(checks) / len(checks)


def _leads_on_unused(memory: AddressSpace, state: ArenaState, layout: Layout) -> bool:
    """Whether a main_arena that no malloc has initialised leads to itself, or to the arena of a sub-heap.

    free needs no initialised main_arena: it makes its tcache in an arena of its own, which is linked in (arena.c,
    arena_get2 and _int_new_arena, 2.26-2.41).
    """
    if state.next == state.address:
        return True
    try:
        return memory.read_word(state.next - layout.heap_info_bytes) == state.next
    except MemoryFault:
        return False


def sampled(members: tuple[int, ...]) -> tuple[int, ...]:
    """Members of a ring, evenly spread and no more than twice ARENAS_SAMPLED: enough to judge a layout by."""
    return members[:: max(1, len(members) // ARENAS_SAMPLED)]


def sub_heap_score(
    memory: AddressSpace, layout: Layout, ring: ArenaRing, headers: tuple[HeapInfo, ...]
) -> tuple[float | None, Evidence]:
    """Share of non-main arenas that lie right behind a heap_info and whose sub-heaps add up to system_mem, to the byte.

    None without such arenas.
    """
    committed: dict[int, int] = {}
    for header in headers:
        committed[header.ar_ptr] = committed.get(header.ar_ptr, 0) + header.size
    places = {header.address + layout.heap_info_bytes for header in headers}
    system_mem_offset = layout.state.offset("system_mem")
    held = asked = 0
    for address in ring.others:
        try:
            system_mem = memory.read_word(address + system_mem_offset)
        except MemoryFault:
            continue
        asked += 1
        held += address in places and committed.get(address) == system_mem
    evidence = Evidence(
        f"sub-heap sizes add up to system_mem, to the byte, in {held} of {asked} arenas",
        "sub-heap headers",
        Strength.PROOF if held == asked else Strength.HINT,
        speaks_against=held < asked,
    )
    return (held / asked if asked else None), evidence


def fastbin_heads(memory: AddressSpace, layout: Layout, members: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    """The first chunks of the fastbins of some arenas of a ring, as uint64 header addresses."""
    heads: list[npt.NDArray[np.uint64]] = [np.zeros(0, np.uint64)]
    for address in members[:FASTBINS_SAMPLED]:
        try:
            heads.append(read_arena(memory, address, layout).fastbins)
        except MemoryFault:
            continue
    joined = np.concatenate(heads)
    first_chunks: npt.NDArray[np.uint64] = joined[joined != 0]
    return first_chunks


def fastbin_links(memory: AddressSpace, layout: Layout, heads: npt.NDArray[np.uint64]) -> tuple[int, int]:
    """Of the first chunks of fastbins: how many links decode to aligned memory (or the end), and how many were read.

    Links are plain up to 2.31 and mangled from 2.32 on (PROTECT_PTR); all lists are followed in step, to their first bad link.
    """
    word_class = layout.word_class
    good = seen = 0
    header = heads
    for _ in range(FAST_CHUNKS_SAMPLED):
        if not len(header):
            break
        place = header + np.uint64(2 * word_class.word_bytes)
        stored, saved = words_at(memory, place)
        place, stored = place[saved], stored[saved]
        following = stored ^ (place >> np.uint64(SAFE_LINKING_SHIFT)) if layout.generation.safe_linking else stored
        is_aligned = following % np.uint64(word_class.alignment) == word_class.granule_phase
        fits = (following == 0) | (is_aligned & locate.mapped_for_data(memory, following))
        seen += len(fits)
        good += int(fits.sum())
        header = following[fits & (following != 0)]
    return good, seen


def tcache_score(
    memory: AddressSpace, layout: Layout, addresses: list[int], heads: npt.NDArray[np.uint64]
) -> tuple[float | None, float | None]:
    """How well tcache structures fit (counts against lists) and how well links decode, those of fastbins from ``heads`` on
    included; None where there is nothing to ask."""
    link_held, link_asked = fastbin_links(memory, layout, heads)
    held = asked = 0
    if layout.tcache is None:
        addresses = []
    for address in addresses:
        try:
            state = read_tcache(memory, address, layout)
        except MemoryFault:
            continue
        asked += 1
        held += counts_agree(layout, state)
        good, seen = links_of_tcache(memory, layout, state.entries, address)
        link_held += good
        link_asked += seen
    return (
        held / asked if asked else None,
        link_held / link_asked if link_asked else None,
    )
