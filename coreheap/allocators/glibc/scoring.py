"""How well one layout fits what a core holds: each part of a generation's score, by invariants of malloc itself.

Knows: what must hold in every intact malloc_state, sub-heap and tcache. Does not know: which layouts are in question,
nor what their scores lead to (``identify``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc import locate
from coreheap.allocators.glibc.gathering import Bools, UInt64s, columns_at, words_at
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


@dataclass(frozen=True, slots=True)
class _ArenaColumns:
    """Fields of many malloc_states: uint64[n], of ``fastbins`` and ``bins`` a row each; ``attached_threads`` 0 where there is none."""

    address: UInt64s
    mutex: UInt64s
    flags: UInt64s
    top: UInt64s
    next: UInt64s
    system_mem: UInt64s
    max_system_mem: UInt64s
    attached_threads: UInt64s
    fastbins: UInt64s
    bins: UInt64s


_NUMBERS = ("mutex", "flags", "top", "next", "system_mem", "max_system_mem", "attached_threads")


def arena_score(memory: AddressSpace, state: ArenaState, layout: Layout) -> float:
    """Share of the invariants of one malloc_state that hold under a layout, between 0 and 1."""
    numbers = {name: np.array([getattr(state, name) or 0], np.uint64) for name in _NUMBERS}
    address = np.array([state.address], np.uint64)
    states = _ArenaColumns(address=address, **numbers, fastbins=state.fastbins[None], bins=state.bins[None])
    return float(_scores(memory, states, layout)[0])


def arena_scores(memory: AddressSpace, addresses: Sequence[int], layout: Layout) -> dict[int, float]:
    """As ``arena_score`` for many arenas, by address; those that are in the core as a whole."""
    fields = layout.state
    present = tuple(name for name in (*_NUMBERS, "fastbinsY", "bins") if name in fields)
    values, saved = columns_at(memory, np.array(addresses, np.uint64), fields, present)
    column = dict(zip(present, (value[saved] for value in values), strict=True))
    address = np.array(addresses, np.uint64)[saved]
    nothing = np.zeros((len(address), 1), np.uint64)
    numbers = {name: column.get(name, nothing)[:, 0] for name in _NUMBERS}
    fastbins = column.get("fastbinsY", nothing)
    states = _ArenaColumns(address=address, **numbers, fastbins=fastbins, bins=column["bins"])
    return dict(zip(address.tolist(), _scores(memory, states, layout).tolist(), strict=True))


def _scores(memory: AddressSpace, states: _ArenaColumns, layout: Layout) -> npt.NDArray[np.float64]:
    """Share of the invariants of each malloc_state that hold under a layout.

    Source: malloc_init_state, sysmalloc, arena_get2 (glibc 2.12-2.44). Half of it are the 127 bins.
    """
    word_class = layout.word_class
    flags_allowed = np.uint64(0b111 if layout.generation.flags_hold_fastchunks else 0b010)
    phase, mask = np.uint64(word_class.granule_phase), np.uint64(word_class.alignment - 1)

    def may_be_chunk(addresses: UInt64s) -> Bools:
        held: Bools = (addresses & mask) == phase
        held[held] = locate.mapped_for_data(memory, addresses[held])
        return held

    first_bin = states.address + np.uint64(layout.bin_header(0, 1) % (1 << 64))
    header = first_bin[:, None] + np.arange(BIN_COUNT, dtype=np.uint64) * np.uint64(word_class.header_bytes)
    fd, bk = states.bins[:, 0::2], states.bins[:, 1::2]
    is_held = (fd == header) & (bk == header)
    leads_off = (fd != header) & (bk != header)
    is_held[leads_off] = may_be_chunk(fd[leads_off]) & may_be_chunk(bk[leads_off])
    has_no_top = states.top == first_bin
    checks = [
        states.mutex <= np.uint64(2),
        states.flags & ~flags_allowed == 0,
        states.system_mem <= states.max_system_mem,
        has_no_top | may_be_chunk(states.top),
        (states.system_mem > 0) | has_no_top,
        states.attached_threads < np.uint64(1 << 20),
        ((states.fastbins == 0) | may_be_chunk(states.fastbins)).all(axis=1),
        (states.next != 0) & locate.mapped_for_data(memory, states.next),
    ]
    held = np.count_nonzero(checks, axis=0) / len(checks)
    scores: npt.NDArray[np.float64] = 0.5 * (np.count_nonzero(is_held, axis=1) / BIN_COUNT) + 0.5 * held
    is_unused = (states.top == 0) & (states.system_mem == 0)
    for row in np.flatnonzero(is_unused).tolist():
        is_empty = not states.bins[row].any() and not states.fastbins[row].any()
        scores[row] = is_empty and _leads_on_unused(memory, int(states.address[row]), int(states.next[row]), layout)
    return scores


def _leads_on_unused(memory: AddressSpace, address: int, following: int, layout: Layout) -> bool:
    """Whether a main_arena that no malloc has initialised leads to itself, or to the arena of a sub-heap.

    free needs no initialised main_arena: it makes its tcache in an arena of its own, which is linked in (arena.c,
    arena_get2 and _int_new_arena, 2.26-2.41).
    """
    if following == address:
        return True
    try:
        return memory.read_word(following - layout.heap_info_bytes) == following
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
    offset = layout.state.offset("system_mem")
    held = asked = 0
    words, saved = words_at(memory, np.array(ring.others, np.uint64) + np.uint64(offset))
    for address, system_mem, is_saved in zip(ring.others, words.tolist(), saved.tolist(), strict=True):
        if not is_saved:
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
