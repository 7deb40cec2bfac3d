"""The words of all threads' static TLS, and how well one of them fits what is looked for.

Knows: where static TLS lies relative to the thread pointer on each machine, and that a variable has the same offset
in every thread. Does not know: which variables there are, nor what an arena or a tcache looks like (it is told).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.gathering import Bools, UInt64s, places_in_file, words_at
from coreheap.corefile import Core
from coreheap.corefile.notes import records_at

Int64s = npt.NDArray[np.int64]

TLS_ABOVE_POINTER = {"aarch64": True, "x86_64": False, "i386": False}
"""Whether static TLS lies above the thread pointer (variant I) or below it (variant II); ELF TLS ABI."""

DAMAGED_ONE_IN = 5
"""One word in so many may be neither what is looked for nor nothing: a damaged process."""

WORDS_AT_ONCE = 1 << 22
"""Words of storage that are held at a time; of more threads than go into that a part is looked at first."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A thread-local variable that is looked for by what it holds. All predicates take uint64[n] and give bool[n].

    ``resembles`` accepts a structure that is damaged, ``is_neutral`` what says nothing for or against. 0 is neutral, too.
    """

    what: str
    accepts: Callable[[UInt64s], Bools]
    resembles: Callable[[UInt64s], Bools]
    is_neutral: Callable[[UInt64s], Bools]


@dataclass(frozen=True, slots=True, eq=False)
class Fit:
    """What the threads have at one offset. ``values`` uint64 and ``saved`` bool by thread index; 0 where not saved.

    ``hits`` are words that are what was looked for, ``damaged`` those that resemble it, ``misses`` those that are something
    else, ``zeros`` those that are 0.
    """

    offset: int
    values: UInt64s
    saved: Bools
    hits: int
    damaged: int
    misses: int
    zeros: int

    @property
    def rank(self) -> tuple[int, int]:
        """What is compared between columns: sound words before damaged ones."""
        return self.hits, self.damaged

    @property
    def known(self) -> int:
        """Threads whose word was saved."""
        return int(self.saved.sum())

    @property
    def is_consistent(self) -> bool:
        """Whether the threads' words allow that the variable lies here."""
        return self.misses * DAMAGED_ONE_IN <= self.hits + self.misses


def describe(fit: Fit, wanted: Wanted) -> str:
    """What the threads have at an offset, in one sentence."""
    parts = [f"the word at thread pointer {fit.offset:+#x} is {wanted.what} in {fit.hits} of {fit.known} threads"]
    if fit.damaged:
        parts.append(f"like a damaged one in {fit.damaged}")
    others = fit.known - fit.hits - fit.damaged
    return ", ".join(parts) + (" and 0 in the others" if fit.zeros == others else f" and 0 in {fit.zeros}")


def accepted(words: UInt64s, accepts: Callable[[UInt64s], Bools]) -> Bools:
    """For each word, of any shape, whether it is accepted; 0 never is. Each value is asked for once."""
    return _one_of(words, _accepted_of(_different(words), accepts))


def _different(words: UInt64s) -> UInt64s:
    """Each value once, sorted, without 0."""
    # np.unique of numpy 2.3 and later takes several times as long as sorting.
    values: UInt64s = np.sort(words, axis=None)
    is_new = values != 0
    is_new[1:] &= values[1:] != values[:-1]
    different: UInt64s = values[is_new]
    return different


def _accepted_of(values: UInt64s, accepts: Callable[[UInt64s], Bools]) -> UInt64s:
    found: UInt64s = values[accepts(values)]
    return found


def _one_of(words: UInt64s, values: UInt64s) -> Bools:
    """For each word whether it is one of some sorted values; most are tested against the first and the last alone."""
    found = np.zeros(words.shape, np.bool_)
    if len(values):
        near = (words >= values[0]) & (words <= values[-1])
        candidates = words[near]
        found[near] = values[np.searchsorted(values, candidates)] == candidates
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Window:
    """Words of many threads between two offsets, uint64[threads, offsets], and each different value of them once, sorted."""

    offsets: Int64s
    words: UInt64s
    values: UInt64s


class ThreadStorage:
    """Words of every thread's static TLS by their offset from the thread pointer; each is read once, and each question
    asked once."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.word_bytes = core.word_bytes
        self.is_above_pointer = TLS_ABOVE_POINTER[core.machine]
        pointers = [thread.thread_pointer or 0 for thread in core.threads]
        self.pointers: UInt64s = np.array(pointers, np.uint64)
        self._columns: dict[int, tuple[UInt64s, Bools]] = {}
        self._windows: dict[tuple[int, int], _Window] = {}
        self._fits: dict[tuple[int, Wanted], Fit] = {}

    @property
    def known(self) -> Bools:
        """For each thread whether the storage next to its thread pointer was saved; bool[threads]."""
        return self.column(0 if self.is_above_pointer else -self.word_bytes)[1]

    def column(self, offset: int) -> tuple[UInt64s, Bools]:
        """The word of each thread at an offset, and whether it was saved; 0 where it was not."""
        if offset not in self._columns:
            self._columns[offset] = self._read(self.pointers, np.array([offset], np.int64))
        values, saved = self._columns[offset]
        return values, saved

    def offsets_with(self, start: int, end: int, accepts: Callable[[UInt64s], Bools]) -> Int64s:
        """The word offsets of [start, end) at which some thread has an accepted word; 0 never is.

        Of many threads some are looked at, evenly spread. A word counts as far as memory goes on without a break from the
        thread pointer: behind that no variable can lie.
        """
        if (start, end) not in self._windows:
            self._windows[start, end] = self._window(start, end)
        window = self._windows[start, end]
        wanted = _accepted_of(window.values, accepts)
        found: Int64s = window.offsets[_one_of(window.words, wanted).any(axis=0)] if len(wanted) else window.offsets[:0]
        return found

    def _window(self, start: int, end: int) -> _Window:
        word = self.word_bytes
        offsets = np.arange(start + -start % word, end - word + 1, word, dtype=np.int64)
        having = self.pointers[self.known]
        most = max(1, WORDS_AT_ONCE // max(len(offsets), 1))
        pointers = having[:: max(1, -(-len(having) // most))]
        words, whole = self._rows(pointers, offsets)
        for row in np.flatnonzero(~whole).tolist():
            words[row] = self._connected(int(pointers[row]), offsets)
        return _Window(offsets, words, _different(words))

    def fit(self, offset: int, wanted: Wanted) -> Fit:
        """How well the threads' words at an offset are what is looked for."""
        if (offset, wanted) not in self._fits:
            values, saved = self.column(offset)
            hits = accepted(values, wanted.accepts)
            others = values[~hits & (values != 0)]
            damaged = wanted.resembles(others)
            misses = int((~damaged & ~wanted.is_neutral(others)).sum())
            zeros = int((saved & (values == 0)).sum())
            self._fits[offset, wanted] = Fit(offset, values, saved, int(hits.sum()), int(damaged.sum()), misses, zeros)
        return self._fits[offset, wanted]

    def _rows(self, pointers: UInt64s, offsets: Int64s) -> tuple[UInt64s, Bools]:
        """The words of each thread for which one run of saved bytes holds them and all up to the thread pointer; bool[n]
        says for which."""
        word, count = self.word_bytes, len(offsets)
        words = np.zeros((len(pointers), count), np.uint64)
        if not count:
            return words, np.ones(len(pointers), np.bool_)
        first, last = int(offsets[0]), int(offsets[-1]) + word
        low, high = min(first, 0), max(last, 0)
        # Below 0 the sum wraps round to where nothing is saved.
        starts = pointers + np.array(low, np.int64).astype(np.uint64)
        place, whole = places_in_file(self.core.memory, starts, high - low)
        row = np.dtype([("words", f"<u{word}", (count,))])
        words[whole] = records_at(self.core.memory.file, place[whole] + (first - low), row)["words"]
        return words, whole

    def _read(self, pointers: UInt64s, offsets: Int64s) -> tuple[UInt64s, Bools]:
        # Below 0 the sum wraps round to where nothing is saved.
        values, saved = words_at(self.core.memory, pointers + offsets.astype(np.uint64))
        saved &= pointers != 0
        values[~saved] = 0
        return values, saved

    def _connected(self, pointer: int, offsets: Int64s) -> UInt64s:
        values, saved = self._read(np.full(len(offsets), pointer, np.uint64), offsets)
        outwards = slice(None) if self.is_above_pointer else slice(None, None, -1)
        reached = np.logical_and.accumulate(saved[outwards])[outwards]
        return np.where(reached, values, np.uint64(0))
