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
from coreheap.errors import MemoryFault
from coreheap.kernels import find_arena_candidates

UInt64s = npt.NDArray[np.uint64]

TLS_WINDOWS = (0x400, 0x4000, 0x40000)
"""Bytes of static TLS to look at, nearest the thread pointer first: libc's block lies behind those of the executable
and of the libraries loaded before it, most of which are small."""

TLS_ABOVE_POINTER = {"aarch64": True, "x86_64": False, "i386": False}
"""Whether static TLS lies above the thread pointer (variant I) or below it (variant II); ELF TLS ABI."""

DESCRIPTOR_SELF_WORDS = (0, 2)
"""Words of tcbhead_t that hold the descriptor's own address: tcb and self (x86-64 and i386, sysdeps/*/nptl/tls.h)."""

DESCRIPTOR_SCAN_LIMIT = 4 << 30
"""Bytes of other memory that are searched for descriptors of threads that no longer run."""


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


def find_thread_words(core: Core, arenas: Collection[int], is_tcache: Callable[[int], bool]) -> ThreadWords:
    """Locate thread_arena and tcache in the threads' TLS.

    A column (an offset from the thread pointer) is thread_arena when each thread has 0 or an arena there and some
    thread has one; tcache likewise with ``is_tcache``, which is asked for payload addresses. Of several tcache columns
    with as many hits the one nearest thread_arena wins: both lie in libc's own TLS block, at most 0x30 bytes apart in
    fifteen Debian libraries, where a program's own pointer to a block of the same size lies in another module's.
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
        tcache_column = tcache_column or _best_column(
            offsets,
            rows[known],
            lambda column: np.array([cached_verdict(int(value)) for value in column], dtype=bool),
            arena_column[0] if arena_column else 0,
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
) -> tuple[int, int, UInt64s] | None:
    """The column with the most accepted values among those that hold nothing else but 0; nearest ``near`` wins ties.

    Returns (offset, hits, values by row), or None. The first rows rule out most columns before the rest is looked at.
    """
    candidates = np.flatnonzero(rows.any(axis=0))
    candidates = candidates[np.argsort(np.abs(offsets[candidates] - near), kind="stable")]
    best: tuple[int, int, UInt64s] | None = None
    for column_index in candidates.tolist():
        column = rows[:, column_index]
        nonzero = column[column != 0]
        if not bool(accepts(nonzero[:1])[0]):
            continue
        if not bool(accepts(nonzero).all()):
            continue
        if best is None or len(nonzero) > best[1]:
            best = (int(offsets[column_index]), len(nonzero), column)
    return best


def descriptors_without_thread(core: Core, ranges: list[tuple[int, int]]) -> tuple[int, ...] | None:
    """Thread pointers of descriptors in ``ranges`` that belong to no thread of the core.

    After fork the other threads' stacks stay in the child with their descriptors and TLS. None where the machine's
    descriptor does not hold its own address (aarch64) or the ranges are too large to search.
    """
    if TLS_ABOVE_POINTER[core.machine]:
        return None
    if sum(core.memory.saved_bytes_within(start, end) for start, end in ranges) > DESCRIPTOR_SCAN_LIMIT:
        return None
    word = core.word_bytes
    running = {thread.thread_pointer for thread in core.threads}
    found: list[int] = []
    for start, end in ranges:
        for run_start, run_end in core.memory.saved_runs_within(start, end):
            own_address = np.zeros(1, np.uint64)
            hits = find_arena_candidates(core.memory.view(run_start, run_end), run_start, word, own_address)
            for address in hits.next_hits.tolist():
                second = address + DESCRIPTOR_SELF_WORDS[1] * word
                try:
                    is_descriptor = core.memory.read_word(second) == address
                except MemoryFault:
                    continue
                if is_descriptor and address not in running:
                    found.append(address)
    return tuple(found)
