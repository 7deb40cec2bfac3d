"""Every copy of malloc in a process: libc in the program's own namespace and in those of dlmopen, libc_malloc_debug.

Knows: that copies share no arena, and how one copy's tcaches are told from another's. Does not know: how one copy is read
(``identify``), or where its chunks are (``stretches``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from coreheap.allocators.glibc import locate
from coreheap.allocators.glibc.gathering import Bools, UInt64s, words_at
from coreheap.allocators.glibc.identify import (
    Identification,
    Search,
    best_identification,
    identification,
    search_of,
    with_words_of_libc,
)
from coreheap.allocators.glibc.locate import Sighting
from coreheap.allocators.glibc.records import ArenaState, Layout, read_arena
from coreheap.allocators.glibc.scoring import ARENA_ACCEPTED, arena_score, sampled
from coreheap.allocators.glibc.structures import NON_MAIN_ARENA
from coreheap.allocators.glibc.tcache import wanted_tcache
from coreheap.allocators.glibc.threads import ThreadWords, copy_of, find_thread_words, wanted_arena
from coreheap.corefile import AddressSpace, Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Gap, Strength
from coreheap.quantities import format_address

COPY_LIMIT = 32
"""More copies than glibc has namespaces (16), each with a debug malloc; ends the search in a hostile core."""

PLACES_SCORED = 4096
"""Places found by scanning whose malloc_state is read; more mean a hostile core."""

PIECE_BYTES = 1 << 20
"""What a main arena takes from mmap at least when it may not use brk (sysmalloc, MMAP_AS_MORECORE_SIZE)."""


FOUND_BY_HEADER = "a heap_info at an aligned address leads to this arena, which is in no other copy's ring"


@dataclass(frozen=True, slots=True)
class Copies:
    """All copies of malloc that hold memory, the program's own first; ``gaps`` name copies that could not be read."""

    found: tuple[Identification, ...]
    gaps: tuple[Gap, ...]


def identify_copies(core: Core) -> Copies | None:
    """Every copy of malloc in a core; None when nothing in it is an arena.

    First comes the copy whose main arena grows by brk, which the loader's own namespace alone may do; of several, or none,
    the one that holds most. All have the layout of the one with the most arenas, or that layout without tcache.
    """
    search = search_of(core)
    best = best_identification(search)
    if best is None:
        return None
    found = [best]
    claimed = set(best.ring.members)
    for sightings in _other_sightings(search, best, claimed):
        if len(found) == COPY_LIMIT:
            break
        copy = _copy_at(search, best, sightings)
        if copy is not None and claimed.isdisjoint(copy.ring.members):
            claimed.update(copy.ring.members)
            found.append(copy)
    # A copy that was only loaded is none of the heap's; where all are such, the one that was found first stands for them.
    in_use = [copy for copy in found if _held_bytes(core.memory, copy)] or [best]
    if len(in_use) > 1:
        in_use.sort(key=lambda copy: (not _grows_by_brk(core.memory, copy), -_held_bytes(core.memory, copy)))
        in_use = [_with_own_threads(search, copy, in_use) for copy in in_use]
    return Copies(tuple(in_use), (*_unread_copies(search, claimed), *_arenas_of_no_copy(search, found, claimed)))


def _other_sightings(search: Search, best: Identification, claimed: set[int]) -> Iterator[list[Sighting]]:
    """Places that may be an arena of another copy, those of which one is to be taken together: what a libc names, owners of
    sub-heaps, and bins in modules' data. ``claimed`` are the arenas of the copies found so far; it grows meanwhile."""
    for sighting in search.symbols:
        if sighting.address not in claimed:
            yield [sighting]
    owners = [
        Sighting(header.ar_ptr, Evidence(FOUND_BY_HEADER, "sub-heap headers", Strength.SOLID, header.ar_ptr))
        for header in best.headers
        if header.ar_ptr == header.address + best.layout.heap_info_bytes and header.prev == 0
    ]
    before = -1
    while len(claimed) != before:
        # From all that are left, because a ring that is not closed has more members seen from some than from others.
        before = len(claimed)
        left = [sighting for sighting in owners if sighting.address not in claimed]
        if left:
            yield left
    memory, state_bytes, scored = search.core.memory, best.layout.state.byte_count, 0
    heaps = [(header.address, header.address + header.size) for header in best.headers]
    for hits in locate.scan_module_data(search.core, best.layout, heaps):
        for arenas_of in (locate.arenas_of_next_hits, locate.arenas_of_empty_bins):
            for sighting in arenas_of(search.core, hits, best.layout):
                place = sighting.evidence.address or 0
                if any(arena <= place < arena + state_bytes for arena in claimed):
                    continue
                if scored < PLACES_SCORED and _leads_somewhere(memory, sighting.address, best.layout):
                    scored += 1
                    yield [sighting]


def _leads_somewhere(memory: AddressSpace, address: int, layout: Layout) -> bool:
    """Whether next and top of a malloc_state at an address could be pointers: most places fail this."""
    try:
        words = [memory.read_word(address + layout.state.offset(name)) for name in ("next", "top")]
    except MemoryFault:
        return False
    return bool(locate.mapped_for_data(memory, np.array(words, np.uint64)).all())


def _copy_at(search: Search, best: Identification, sightings: list[Sighting]) -> Identification | None:
    """The copy that arenas belong to, of several the one with the most; None where it is not accepted.

    The acceptance of the first copy holds (``identify.identification``). Beyond it libc itself must name the main arena, or
    the ring must close and either mp_ be beside it or every top be a chunk that could be one: what a program keeps of an
    old arena, or data that only looks like one, leads into memory that is something else by now. A ring that leads to a
    main arena which was not saved need not close.
    """
    core = search.core
    readings = []
    for layout in dict.fromkeys((best.layout, best.layout.without_tcache)):
        reading = identification(search, layout, best.heap_max, best.headers, sightings)
        if reading is not None:
            readings.append(reading)
    if not readings:
        return None
    copy = max(readings, key=lambda reading: reading.parts.get("parameters", 0.0))
    named = search.libc_of(copy.ring.main) is not None
    if copy.ring.main is None:
        return None
    is_cut = bool(copy.ring.others) and _state(core.memory, copy.ring.main, copy.layout) is None
    if not (named or copy.ring.is_closed or is_cut):
        return None
    has_proof = named or copy.parameters is not None
    if not has_proof and not all(_top_is_possible(core, member, copy) for member in sampled(copy.ring.members)):
        return None
    copy = replace(copy, alternatives=best.alternatives, runner_up=None, libc_version=best.libc_version)
    return with_words_of_libc(search, copy)


def _top_is_possible(core: Core, member: int, copy: Identification) -> bool:
    """Whether an arena's top lies in writable memory and ends inside it, at a page; so does that of an unused arena."""
    state = _state(core.memory, member, copy.layout)
    if state is None or not state.system_mem:
        return True
    try:
        size = core.memory.read_word(state.top + core.word_bytes) & ~7
    except MemoryFault:
        return True
    end = state.top + size
    return size > 0 and end % core.page_bytes == 0 and end <= locate.mapping_end(core.memory, state.top)


def _state(memory: AddressSpace, address: int, layout: Layout) -> ArenaState | None:
    try:
        return read_arena(memory, address, layout)
    except MemoryFault:
        return None


def _held_bytes(memory: AddressSpace, copy: Identification) -> int:
    """system_mem of all arenas of a copy that were saved."""
    offset, total = copy.layout.state.offset("system_mem"), 0
    for member in copy.ring.members:
        try:
            total += memory.read_word(member + offset)
        except MemoryFault:
            continue
    return total


def _grows_by_brk(memory: AddressSpace, copy: Identification) -> bool:
    state = _state(memory, copy.ring.main, copy.layout) if copy.ring.main is not None else None
    return state is not None and state.is_contiguous and state.system_mem > 0


def _with_own_threads(search: Search, copy: Identification, copies: list[Identification]) -> Identification:
    """A copy with the thread-local words that are its own among those of all copies, and what says so."""
    words = _own_thread_words(search, copy, copies)
    evidence = [fact for fact in copy.evidence if fact not in copy.thread_words.evidence]
    return replace(copy, thread_words=words, evidence=tuple(dict.fromkeys((*evidence, *words.evidence))))


def _own_thread_words(search: Search, copy: Identification, copies: list[Identification]) -> ThreadWords:
    """thread_arena and tcache of one copy, whose TLS block may lie beside another copy's."""
    core, members = search.core, frozenset(copy.ring.members)
    tcache = wanted_tcache(core.memory, copy.layout)
    if tcache is not None:
        is_own = _ownership(core, copy, [other for other in copies if other is not copy])
        accepts = tcache.accepts
        tcache = replace(tcache, accepts=lambda addresses: accepts(addresses) & is_own(addresses))
    return find_thread_words(
        search.storage,
        wanted_arena(members, [header for header in copy.headers if header.ar_ptr in members]),
        tcache,
        copy_of(core, search.libcs, copy.ring.main),
    )


def _ownership(core: Core, copy: Identification, others: list[Identification]) -> Callable[[UInt64s], Bools]:
    """Whether chunks, by payload address, can be of a copy: malloc takes a thread's tcache from its own arenas."""
    memory, members = core.memory, np.array(copy.ring.members, np.uint64)
    own = _first_memory(memory, copy)
    foreign = [place for other in others if (place := _first_memory(memory, other)) is not None]

    def lies_in(addresses: UInt64s, place: tuple[int, int]) -> Bools:
        return (addresses >= np.uint64(place[0])) & (addresses < np.uint64(place[1]))

    def is_own(addresses: UInt64s) -> Bools:
        size_word, _ = words_at(memory, addresses - np.uint64(core.word_bytes))
        ar_ptr, _ = words_at(memory, addresses & ~np.uint64(copy.heap_max - 1))
        is_foreign = np.zeros(len(addresses), np.bool_)
        for place in foreign:
            is_foreign |= lies_in(addresses, place)
        if own is not None:
            is_foreign &= ~lies_in(addresses, own)
        return np.where(size_word & np.uint64(NON_MAIN_ARENA) != 0, np.isin(ar_ptr, members), ~is_foreign)

    return is_own


def _first_memory(memory: AddressSpace, copy: Identification) -> tuple[int, int] | None:
    """What is surely a main arena's memory, before its chunks are known; None where nothing is."""
    start = copy.parameters.values["sbrk_base"] if copy.parameters is not None else 0
    state = _state(memory, copy.ring.main, copy.layout) if copy.ring.main is not None else None
    if not start or state is None:
        return None
    return start, start + (state.system_mem if state.is_contiguous else min(state.system_mem, PIECE_BYTES))


def _unread_copies(search: Search, claimed: set[int]) -> Iterator[Gap]:
    """Copies that libc names and that hold memory, but whose structures are not those of the first copy."""
    memory = search.core.memory
    for libc in search.libcs:
        addresses = sorted({sighting.address for sighting in libc.main_arena} - claimed)
        if not addresses or any(sighting.address in claimed for sighting in libc.main_arena):
            continue
        for address in addresses:
            if any(_is_used_arena(memory, address, other) for other in search.layouts):
                yield Gap(
                    "other_malloc_copy",
                    f"another copy of glibc's malloc, with main_arena at {format_address(address)}, has a heap of its own"
                    " that is not in these numbers: its structures could not be read as those of the first copy",
                )
                break


def _arenas_of_no_copy(search: Search, found: list[Identification], claimed: set[int]) -> Iterator[Gap]:
    """Arenas that a copy left behind, or whose main arena nothing leads to; an open ring takes those up (``arenas``)."""
    if not all(copy.ring.is_closed for copy in found):
        return
    layout = found[0].layout
    owners = {header.ar_ptr for header in found[0].headers} - claimed
    used = [address for address in sorted(owners) if _is_used_arena(search.core.memory, address, layout)]
    if used:
        held = sum(header.size for header in found[0].headers if header.ar_ptr in set(used))
        yield Gap(
            "arenas_of_unknown_copy",
            f"{len(used)} arenas with sub-heaps of {held} bytes, the first at {format_address(used[0])}, are in no copy's"
            " ring: they are not in these numbers",
        )


def _is_used_arena(memory: AddressSpace, address: int, layout: Layout) -> bool:
    state = _state(memory, address, layout)
    return state is not None and state.system_mem > 0 and arena_score(memory, state, layout) >= ARENA_ACCEPTED
