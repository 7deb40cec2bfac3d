"""Which thread uses which arena and tcache: two thread-local words of libc, told by names and by what they hold.

Knows: how what libc says of its variables (``ways``) and what the threads' storage looks like are joined, and what each
says for or against the choice. Does not know: what a tcache holds (``walk``) or which release it is (``identify``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.gathering import Bools, UInt64s
from coreheap.allocators.glibc.records import HeapInfo
from coreheap.allocators.glibc.thread_storage import Fit, ThreadStorage, Wanted, describe
from coreheap.allocators.glibc.ways import (
    Globals,
    ThreadBlock,
    ThreadLocal,
    ThreadSlot,
    evidence_for_offset,
    find_thread_locals,
)
from coreheap.corefile import Core
from coreheap.evidence import Evidence, Strength

TLS_WINDOWS = (0x400, 0x4000, 0x40000)
"""Bytes of static TLS to look at, nearest the thread pointer first: libc's block lies behind those of the executable
and of the libraries loaded before it, most of which are small."""

BLOCK_LIMIT = TLS_WINDOWS[-1]
"""Larger blocks of libc are none (0x54 to 0x90 bytes in fifteen Debian libraries)."""

PAIR_REACH = 0x200
"""Bytes between thread_arena and tcache: at most 0x30 in fifteen Debian libraries; more in static programs from 2.43 on,
where one lies in .tdata and the other in .tbss."""

PAIR_SCAN_LIMIT = 4 << 30
"""Bytes of other memory that are searched for the storage of threads whose thread pointer is unknown."""

PAIR_BLOCK_WORDS = 1 << 20

SOURCE = "thread-local storage"


@dataclass(frozen=True, slots=True, eq=False)
class ThreadWords:
    """What each thread's TLS says. Arrays by thread index, uint64; ``known`` is False where TLS was not saved.

    ``arena`` and ``tcache`` are 0 where the thread has none. ``arena_offset`` and ``tcache_offset`` are relative to
    the thread pointer, None where the variable could not be told from others; the hits are threads whose word is sound,
    ``tcache_damaged`` those whose tcache is not.
    ``pair_distance`` is how far tcache lies behind thread_arena in every thread; None where that is unknown.
    """

    known: npt.NDArray[np.bool_]
    arena: UInt64s
    tcache: UInt64s
    arena_offset: int | None
    tcache_offset: int | None
    arena_hits: int
    tcache_hits: int
    tcache_damaged: int
    pair_distance: int | None
    evidence: tuple[Evidence, ...]


def wanted_arena(members: Collection[int], headers: Iterable[HeapInfo]) -> Wanted:
    """What thread_arena leads to: a member of the ring. An arena that a sub-heap names may be missing in a damaged ring."""
    arenas = np.array(sorted(members), np.uint64)
    possible = np.array(sorted({header.ar_ptr for header in headers}), np.uint64)

    def nothing(words: UInt64s) -> Bools:
        return np.zeros(len(words), np.bool_)

    return Wanted("an arena", lambda words: np.isin(words, arenas), lambda words: np.isin(words, possible), nothing)


def copy_of(core: Core, copies: tuple[Globals, ...], main_arena: int | None) -> Globals | None:
    """What is known of the copy of malloc that a main_arena belongs to; None where that cannot be told from another."""
    if main_arena is None:
        return copies[0] if len(copies) == 1 else None
    module = core.module_at(main_arena)
    own = [copy for copy in copies if copy.module is module]
    own = own or [copy for copy in copies if any(sighting.address == main_arena for sighting in copy.main_arena)]
    if len(own) == 1:
        return own[0]
    # A .bss may lie behind all that is known of its module; another module's data is another copy's.
    return copies[0] if module is None and len(copies) == 1 and not copies[0].main_arena else None


def find_thread_words(
    storage: ThreadStorage, arena: Wanted, tcache: Wanted | None, libc: Globals | None
) -> ThreadWords:
    """Locate thread_arena and tcache in the threads' TLS; ``tcache`` is None where the layout has none.

    A column (an offset from the thread pointer) is the variable when some thread has there what is wanted and the others
    0. ``libc`` is what the copy of malloc that the arenas belong to says of its variables, None where it says nothing.

    tcache is looked for in libc's own TLS block, or where that is unknown no further than PAIR_REACH from thread_arena:
    a program's own pointer to a block of the same size lies in another module's block.
    """
    blocks = () if libc is None else libc.thread_blocks
    anywhere = tuple(_window(storage, size) for size in TLS_WINDOWS)
    arena_choice = _choose(
        storage,
        arena,
        _best_columns(storage, arena, (*_ranges_of(blocks), *anywhere), 0),
        () if libc is None else libc.thread_arena,
        _own_variables(storage, arena, libc),
        blocks,
        Strength.SOLID,
    )
    tcache_choice = NO_CHOICE
    if tcache is not None:
        near, beside = 0, anywhere
        if arena_choice.fit is not None:
            near = arena_choice.fit.offset
            beside = ((near - PAIR_REACH, near + PAIR_REACH + storage.word_bytes),)
        tcache_choice = _choose(
            storage,
            tcache,
            _best_columns(storage, tcache, (*_ranges_of(blocks), *beside), near)
            or (_damaged_column(storage, tcache, beside[0]) if arena_choice.fit is not None else ()),
            () if libc is None else libc.tcache,
            _own_variables(storage, tcache, libc),
            blocks,
            # An empty tcache is mostly zeros: the structures say less than arenas do.
            Strength.HINT,
        )
    return _thread_words(storage, arena_choice.fit, tcache_choice.fit, libc, arena_choice, tcache_choice)


def leads_nowhere(storage: ThreadStorage, wanted: Wanted) -> bool:
    """Whether every thread's storage is in the core, and no word of it leads to what may be wanted, damaged or not.

    Then no thread has it. A process that called memalign alone has no tcache: up to 2.41 only malloc and free make it.
    All static TLS is looked at, so it is asked of the layout that was chosen, not of each.
    """
    if not len(storage.pointers) or not storage.known.all():
        return False
    return all(len(storage.offsets_with(*_window(storage, size), wanted.resembles)) == 0 for size in TLS_WINDOWS)


def _own_variables(storage: ThreadStorage, wanted: Wanted, libc: Globals | None) -> tuple[ThreadLocal, ...]:
    """libc's own words that are what is wanted: its slots; where these are unknown, every word of its block."""
    if libc is None:
        return ()
    if libc.thread_slots:
        return find_thread_locals(storage, libc.thread_slots, wanted)
    word = storage.word_bytes
    for block in libc.thread_blocks[:1]:
        for start, end in _ranges_of((block,)):
            slots = [ThreadSlot(offset, block.source) for offset in range(start + -start % word, end, word)]
            found = find_thread_locals(storage, slots, wanted)
            # Around a slot its neighbours are looked at, and those of the first and the last are another module's.
            return tuple(variable for variable in found if block.holds(variable.offset))
    return ()


def _thread_words(
    storage: ThreadStorage,
    arena: Fit | None,
    tcache: Fit | None,
    libc: Globals | None,
    *choices: _Choice,
) -> ThreadWords:
    known = storage.known.copy()
    for fit in (arena, tcache):
        known &= True if fit is None else fit.saved
    nothing = np.zeros(len(known), np.uint64)
    return ThreadWords(
        known=known,
        arena=nothing if arena is None else arena.values,
        tcache=nothing if tcache is None else tcache.values,
        arena_offset=None if arena is None else arena.offset,
        tcache_offset=None if tcache is None else tcache.offset,
        arena_hits=0 if arena is None else arena.hits,
        tcache_hits=0 if tcache is None else tcache.hits,
        tcache_damaged=0 if tcache is None else tcache.damaged,
        pair_distance=_pair_distance(arena, tcache, libc),
        evidence=tuple(fact for choice in choices for fact in choice.evidence),
    )


def _pair_distance(arena: Fit | None, tcache: Fit | None, libc: Globals | None) -> int | None:
    """How far tcache lies behind thread_arena, as threads show it, else as libc names both."""
    if arena is not None and tcache is not None and arena.hits and tcache.hits:
        return tcache.offset - arena.offset
    if libc is not None and libc.thread_arena and libc.tcache:
        return libc.tcache[0].offset - libc.thread_arena[0].offset
    return None


def _window(storage: ThreadStorage, size: int) -> tuple[int, int]:
    return (0, size) if storage.is_above_pointer else (-size, 0)


def _ranges_of(blocks: Iterable[ThreadBlock]) -> Iterator[tuple[int, int]]:
    for block in blocks:
        if block.byte_count is not None and block.byte_count <= BLOCK_LIMIT:
            yield block.start, block.start + block.byte_count


def _best_columns(
    storage: ThreadStorage, wanted: Wanted, ranges: Iterable[tuple[int, int]], near: int
) -> tuple[Fit, ...]:
    """The consistent columns with the most hits in the first range that has one, the nearest to ``near`` first."""
    for start, end in ranges:
        offsets = storage.offsets_with(start, end, wanted.accepts)
        offsets = offsets[np.argsort(np.abs(offsets - near), kind="stable")]
        fits = [storage.fit(offset, wanted) for offset in offsets.tolist()]
        fits = [fit for fit in fits if fit.is_consistent]
        if fits:
            most = max(fit.hits for fit in fits)
            return tuple(fit for fit in fits if fit.hits == most)
    return ()


def _damaged_column(storage: ThreadStorage, wanted: Wanted, near: tuple[int, int]) -> tuple[Fit, ...]:
    """The one consistent column of a short range that leads to what resembles the wanted; nothing where several do."""
    offsets = storage.offsets_with(*near, wanted.resembles)
    fits = [storage.fit(offset, wanted) for offset in offsets.tolist()]
    fits = [fit for fit in fits if fit.is_consistent]
    return tuple(fits) if len(fits) == 1 else ()


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """Where a variable was found to lie, None for nowhere, and what speaks for and against that."""

    fit: Fit | None
    evidence: tuple[Evidence, ...]


NO_CHOICE = _Choice(None, ())


def _choose(
    storage: ThreadStorage,
    wanted: Wanted,
    columns: tuple[Fit, ...],
    named: tuple[ThreadLocal, ...],
    slots: tuple[ThreadLocal, ...],
    blocks: tuple[ThreadBlock, ...],
    strength: Strength,
) -> _Choice:
    """Weigh what libc's names, its slots and the threads' own words say of one variable.

    A name wins where all threads' words allow it; one that no thread bears out loses against a column that several do.
    Then come the slots, which are libc's but not named, then the column alone. What was not chosen stays in the evidence.
    """
    by_name = [fit for variable in named if (fit := storage.fit(variable.offset, wanted)).is_consistent]
    best_named = max(by_name, key=lambda fit: fit.hits - fit.misses, default=None)
    hits = columns[0].hits if columns else 0
    if best_named is not None and (best_named.hits or hits < 2):
        return _Choice(
            best_named, tuple(_evidence(storage, wanted, best_named, columns, named, slots, blocks, strength))
        )
    by_slot = [storage.fit(slot.offset, wanted) for slot in slots]
    chosen = columns[0] if columns else None
    # A slot that only leads to something damaged is beaten by what is sound, and by another such slot.
    if by_slot and (by_slot[0].hits or (not hits and [fit.rank for fit in by_slot].count(by_slot[0].rank) == 1)):
        chosen = by_slot[0]
    chosen = chosen or best_named
    return _Choice(chosen, tuple(_evidence(storage, wanted, chosen, columns, named, slots, blocks, strength)))


def _evidence(
    storage: ThreadStorage,
    wanted: Wanted,
    chosen: Fit | None,
    columns: tuple[Fit, ...],
    named: tuple[ThreadLocal, ...],
    slots: tuple[ThreadLocal, ...],
    blocks: tuple[ThreadBlock, ...],
    strength: Strength,
) -> Iterator[Evidence]:
    """What speaks for the choice of a variable's offset and against it.

    No more than ``strength`` for it: where a variable lies says little of the arenas themselves. A hint against it each.
    """
    if chosen is None:
        for variable in named:
            fit = storage.fit(variable.offset, wanted)
            statement = f"{variable.evidence.statement}, but {describe(fit, wanted)}"
            yield _hint_against(statement, variable.evidence.source)
        return
    if any(chosen.rank):
        yield Evidence(describe(chosen, wanted), SOURCE, strength if chosen.hits else Strength.HINT)
    for fact in evidence_for_offset(named, chosen.offset):
        most = strength if chosen.hits else Strength.HINT
        yield replace(fact, strength=Strength.HINT if fact.speaks_against else min(fact.strength, most))
    own_slot = next((slot for slot in slots if slot.offset == chosen.offset), None)
    if own_slot is None and slots:
        yield _hint_against(slots[0].evidence.statement, slots[0].evidence.source)
    elif own_slot is not None and all(block.source != own_slot.evidence.source for block in blocks):
        statement = f"libc has a thread-local variable at thread pointer {chosen.offset:+#x}"
        yield Evidence(statement, own_slot.evidence.source, Strength.HINT)
    for holds in (True, False):
        told = [block for block in blocks if block.holds(chosen.offset) is holds]
        if told:
            place = "the thread-local block of the module that has malloc"
            yield Evidence(
                f"thread pointer {chosen.offset:+#x} lies {'in' if holds else 'outside of'} {place}, from"
                f" {told[0].start:+#x} on",
                ", ".join(block.source for block in told),
                Strength.HINT,
                speaks_against=not holds,
            )
    # Words that fit better are a doubt; where nothing names the chosen one, those that fit as well are, too.
    is_named = any(variable.offset == chosen.offset for variable in named)
    fits = {fit.offset: fit for fit in (*columns, *(storage.fit(slot.offset, wanted) for slot in slots))}
    for offset, fit in sorted(fits.items()):
        if offset != chosen.offset and (fit.hits > chosen.hits or (not is_named and fit.rank >= chosen.rank)):
            yield _hint_against(describe(fit, wanted), SOURCE)


def _hint_against(statement: str, source: str) -> Evidence:
    return Evidence(statement, source, Strength.HINT, speaks_against=True)


@dataclass(frozen=True, slots=True)
class FoundPair:
    """A place in memory that holds thread_arena and tcache of one thread: address of the tcache word and both values.

    ``thread`` is the thread whose stack pointer lies below it in the same mapping, None where none does.
    """

    place: int
    arena: int
    tcache: int
    thread: int | None


def find_pairs(
    core: Core,
    ranges: list[tuple[int, int]],
    arenas: Collection[int],
    tcaches: UInt64s,
    known_distance: int | None = None,
) -> list[FoundPair]:
    """thread_arena and tcache in the storage of threads whose thread pointer is unknown.

    These are all threads in qemu's cores and in gdb's of i386, and in a fork's child the parent's other threads, whose
    stacks and storage stay.

    Both variables lie in libc's TLS block, PAIR_REACH bytes apart at most and everywhere as far. A word that is an arena
    with a tcache structure's address at the distance that most such words have is such a pair: programs have no pointers
    to arenas. ``tcaches`` are payload addresses of chunks that may be tcache structures. ``known_distance`` is the distance
    in bytes where other threads or libc itself tell it (``ThreadWords.pair_distance``).
    """
    memory, word = core.memory, core.word_bytes
    arena_set, tcache_set = np.array(sorted(arenas), np.uint64), np.unique(tcaches)
    reach = PAIR_REACH // word
    hits: dict[int, list[tuple[int, int, int]]] = {}
    if not len(arena_set) or not len(tcaches):
        return []
    if sum(memory.saved_bytes_within(start, end) for start, end in ranges) > PAIR_SCAN_LIMIT:
        return []
    for extent in (extent for start, end in ranges for extent in memory.populated_extents(start, end)):
        first, last = extent[0] + -extent[0] % word, extent[1] - extent[1] % word
        for begin in range(first, last, PAIR_BLOCK_WORDS * word):
            # Words of the next block may belong to an arena's word at the end of this one, and the other way round.
            low = max(first, begin - PAIR_REACH)
            high = min(last, begin + PAIR_BLOCK_WORDS * word + PAIR_REACH)
            words = memory.read_words(low, (high - low) // word)
            of_arena = _places_of(words, arena_set)
            of_arena = of_arena[
                (low + of_arena * word >= begin) & (low + of_arena * word < begin + PAIR_BLOCK_WORDS * word)
            ]
            if not len(of_arena):
                continue
            is_tcache = np.zeros(len(words), np.bool_)
            is_tcache[_places_of(words, tcache_set)] = True
            for distance in range(-reach, reach + 1):
                at = of_arena + distance
                inside = (at >= 0) & (at < len(words))
                for position in of_arena[inside][is_tcache[at[inside]]].tolist():
                    place = position + distance
                    hits.setdefault(distance, []).append((low + place * word, int(words[position]), int(words[place])))
    if not hits:
        return []
    # Old stack frames of malloc hold such words, too, again and again for the same tcache: different ones count.
    distance = max(hits, key=lambda distance: (len({tcache for *_, tcache in hits[distance]}), -abs(distance)))
    if known_distance is not None and known_distance // word in hits:
        distance = known_distance // word
    best = hits[distance]
    return [FoundPair(place, arena, tcache, _thread_below(core, place)) for place, arena, tcache in best]


def _places_of(words: UInt64s, values: UInt64s) -> npt.NDArray[np.int64]:
    """Where words are one of some sorted values; most words are tested against the first and the last alone."""
    near = np.flatnonzero((words >= values[0]) & (words <= values[-1]))
    return near[np.isin(words[near], values)]


def _thread_below(core: Core, place: int) -> int | None:
    """The thread whose stack ends at this TLS block: the nearest stack pointer below it in the same mapping."""
    memory = core.memory
    region = memory.region_index(place)
    below = [
        (thread.stack_pointer, thread.index)
        for thread in core.threads
        if thread.stack_pointer and thread.stack_pointer < place and memory.region_index(thread.stack_pointer) == region
    ]
    return max(below)[1] if below else None
