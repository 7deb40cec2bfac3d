"""Which thread uses which arena and tcache: two words in each thread's TLS block, found without symbols.

Knows: where static TLS lies relative to the thread pointer on each machine, and that a variable has the same offset
in every thread. Does not know: what a tcache holds (``walk``) or which release it is (``identify``).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core

UInt64s = npt.NDArray[np.uint64]

TLS_WINDOWS = (0x400, 0x4000, 0x40000)
"""Bytes of static TLS to look at, nearest the thread pointer first: libc's block lies behind those of the executable
and of the libraries loaded before it, most of which are small."""

TLS_ABOVE_POINTER = {"aarch64": True, "x86_64": False, "i386": False}
"""Whether static TLS lies above the thread pointer (variant I) or below it (variant II); ELF TLS ABI."""

ROWS_LOOKED_AT_FIRST = 4
DAMAGED_ONE_IN = 5

PAIR_REACH = 0x200
"""Bytes between thread_arena and tcache: at most 0x30 in fifteen Debian libraries; more in static programs from 2.43 on,
where one lies in .tdata and the other in .tbss."""

PAIR_SCAN_LIMIT = 4 << 30
"""Bytes of other memory that are searched for the storage of threads whose thread pointer is unknown."""

PAIR_BLOCK_WORDS = 1 << 20


@dataclass(frozen=True, slots=True)
class ThreadWords:
    """What each thread's TLS says. Arrays by thread index, uint64; ``known`` is False where TLS was not saved.

    ``arena`` and ``tcache`` are 0 where the thread has none. ``arena_offset`` and ``tcache_offset`` are relative to
    the thread pointer, None where the variable could not be told from others.
    """

    known: npt.NDArray[np.bool_]
    arena: UInt64s
    tcache: UInt64s
    arena_offset: int | None
    tcache_offset: int | None
    arena_hits: int
    tcache_hits: int


def find_thread_words(
    core: Core,
    arenas: Collection[int],
    is_tcache: Callable[[int], bool],
    may_stand_for_tcache: Callable[[int], bool],
) -> ThreadWords:
    """Locate thread_arena and tcache in the threads' TLS.

    A column (an offset from the thread pointer) is thread_arena when some thread has an arena there and the others 0;
    tcache likewise with ``is_tcache``, which is asked for payload addresses. ``may_stand_for_tcache`` accepts what says
    nothing for or against: the read-only dummy of 2.43+, a damaged structure. One word in five may be damaged.

    tcache is looked for no further than PAIR_REACH from thread_arena: both lie in libc's own TLS block, where a
    program's own pointer to a block of the same size lies in another module's.
    """
    pointers = [thread.thread_pointer for thread in core.threads]
    arena_column: tuple[int, int, UInt64s] | None = None
    tcache_column: tuple[int, int, UInt64s] | None = None
    known = np.zeros(len(pointers), dtype=bool)
    arena_set = np.array(sorted(arenas), dtype=np.uint64)
    verdicts: dict[int, bool] = {0: False}

    def cached_verdict(address: int) -> bool:
        if address not in verdicts:
            verdicts[address] = is_tcache(address)
        return verdicts[address]

    for window in TLS_WINDOWS:
        offsets, rows, known = _windows(core, pointers, window)
        if not known.any():
            continue
        arena_column = arena_column or _best_column(offsets, rows[known], lambda column: np.isin(column, arena_set), 0)
        near = np.ones(len(offsets), bool)
        if arena_column is not None:
            near = np.abs(offsets - arena_column[0]) <= PAIR_REACH
        tcache_column = tcache_column or _best_column(
            offsets[near],
            rows[known][:, near],
            lambda column: np.array([cached_verdict(int(value)) for value in column], dtype=bool),
            arena_column[0] if arena_column else 0,
            may_stand_for_tcache,
        )
        if arena_column and tcache_column:
            break

    def by_thread(column: tuple[int, int, UInt64s] | None) -> UInt64s:
        values = np.zeros(len(pointers), dtype=np.uint64)
        if column is not None:
            values[np.flatnonzero(known)] = column[2]
        return values

    return ThreadWords(
        known=known,
        arena=by_thread(arena_column),
        tcache=by_thread(tcache_column),
        arena_offset=arena_column[0] if arena_column else None,
        tcache_offset=tcache_column[0] if tcache_column else None,
        arena_hits=arena_column[1] if arena_column else 0,
        tcache_hits=tcache_column[1] if tcache_column else 0,
    )


def _windows(
    core: Core, pointers: list[int | None], window: int
) -> tuple[npt.NDArray[np.int64], UInt64s, npt.NDArray[np.bool_]]:
    """Offsets of the window's words, one row of words a thread, and which rows were saved in full."""
    word = core.word_bytes
    above = TLS_ABOVE_POINTER[core.machine]
    offsets = np.arange(0, window, word, dtype=np.int64) + (0 if above else -window)
    rows = np.zeros((len(pointers), len(offsets)), dtype=np.uint64)
    known = np.zeros(len(pointers), dtype=bool)
    for row, pointer in enumerate(pointers):
        if not pointer:
            continue
        start, end = (pointer, pointer + window) if above else (pointer - window, pointer)
        runs = [run for run in core.memory.saved_runs_within(max(start, 0), end) if run[1] > run[0]]
        # Words beyond the mapping's edge stay 0: no variable can lie there.
        near = runs[0] if above and runs else runs[-1] if runs else None
        if near is None or not (near[0] <= pointer <= near[1]):
            continue
        first = max(near[0], start)
        first += -first % word
        count = (min(near[1], end) - first) // word
        rows[row, (first - start) // word :][:count] = core.memory.read_words(first, count)
        known[row] = True
    return offsets, rows, known


def _best_column(
    offsets: npt.NDArray[np.int64],
    rows: UInt64s,
    accepts: Callable[[UInt64s], npt.NDArray[np.bool_]],
    near: int,
    is_neutral: Callable[[int], bool] = lambda value: False,
) -> tuple[int, int, UInt64s] | None:
    """The column with the most accepted values among those that hold little else but 0; nearest ``near`` wins ties.

    Returns (offset, hits, values by row), or None. The first rows rule out most columns before the rest is looked at.
    """
    candidates = np.flatnonzero(rows.any(axis=0))
    candidates = candidates[np.argsort(np.abs(offsets[candidates] - near), kind="stable")]
    best: tuple[int, int, UInt64s] | None = None
    for column_index in candidates.tolist():
        column = rows[:, column_index]
        nonzero = column[column != 0]
        first = nonzero[:ROWS_LOOKED_AT_FIRST]
        if not accepts(first).any() and not any(is_neutral(value) for value in first.tolist()):
            continue
        accepted = accepts(nonzero)
        hits = int(accepted.sum())
        others = sum(not is_neutral(value) for value in nonzero[~accepted].tolist())
        if hits and others * DAMAGED_ONE_IN <= hits + others and (best is None or hits > best[1]):
            best = (int(offsets[column_index]), hits, column)
    return best


@dataclass(frozen=True, slots=True)
class FoundPair:
    """A place in memory that holds thread_arena and tcache of one thread: address of the tcache word and both values.

    ``thread`` is the thread whose stack pointer lies below it in the same mapping, None where none does.
    """

    place: int
    arena: int
    tcache: int
    thread: int | None


def find_pairs(core: Core, ranges: list[tuple[int, int]], arenas: Collection[int], tcaches: UInt64s) -> list[FoundPair]:
    """thread_arena and tcache in the storage of threads whose thread pointer is unknown.

    These are all threads in qemu's cores and in gdb's of i386, and in a fork's child the parent's other threads, whose
    stacks and storage stay.

    Both variables lie in libc's TLS block, PAIR_REACH bytes apart at most and everywhere as far. A word that is an arena
    with a tcache structure's address at the distance that most such words have is such a pair: programs have no pointers
    to arenas. ``tcaches`` are payload addresses of chunks that may be tcache structures.
    """
    memory, word = core.memory, core.word_bytes
    arena_set = np.array(sorted(arenas), np.uint64)
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
            near = np.flatnonzero((words >= arena_set[0]) & (words <= arena_set[-1]))
            of_arena = near[np.isin(words[near], arena_set)]
            of_arena = of_arena[
                (low + of_arena * word >= begin) & (low + of_arena * word < begin + PAIR_BLOCK_WORDS * word)
            ]
            for distance in range(-reach, reach + 1):
                at = of_arena + distance
                inside = (at >= 0) & (at < len(words))
                matches = np.isin(words[at[inside]], tcaches)
                for position in of_arena[inside][matches].tolist():
                    place = position + distance
                    hits.setdefault(distance, []).append((low + place * word, int(words[position]), int(words[place])))
    if not hits:
        return []
    # Old stack frames of malloc hold such words, too, again and again for the same tcache: different ones count.
    distance = max(hits, key=lambda distance: (len({tcache for *_, tcache in hits[distance]}), -abs(distance)))
    best = hits[distance]
    return [FoundPair(place, arena, tcache, _thread_below(core, place)) for place, arena, tcache in best]


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
