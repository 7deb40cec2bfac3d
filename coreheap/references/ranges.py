"""Ranges of memory with a kind each: painted one over the other, and with others taken out of them.

Knows: columns of ranges. Does not know: why memory is of a kind.

What there is one of for each region or thread is painted by ``Painter``. What there may be millions of, the heap's own
ranges, only meets arithmetic on columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile.regions import first_covering, left_of
from coreheap.leaks import RootKind

UInt64s = npt.NDArray[np.uint64]
UInt8s = npt.NDArray[np.uint8]
Int16s = npt.NDArray[np.int16]
Int32s = npt.NDArray[np.int32]

ADDRESS_LIMIT = 1 << 63
KINDS = tuple(RootKind)
NO_THREAD = -1
_NOTHING = -1
_CODE = {kind: code for code, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class RootRanges:
    """Memory to look for pointers in; columns of equal length, sorted by address, without overlap.

    ``start``, ``end``: uint64; ``kind``: uint8, an index into KINDS; ``thread``: int32, -1 where it belongs to none.
    """

    start: UInt64s
    end: UInt64s
    kind: UInt8s
    thread: Int32s

    @staticmethod
    def of_one_kind(start: UInt64s, end: UInt64s, kind: RootKind) -> RootRanges:
        """Ranges (sorted, without overlap) that belong to no thread; those that touch become one."""
        return _joined(start, end, np.full(len(start), _CODE[kind], np.uint8), np.full(len(start), NO_THREAD, np.int32))

    def without(self, start: UInt64s, end: UInt64s) -> RootRanges:
        """What other ranges (sorted, without overlap) leave of these."""
        low, high, row = left_of(self.start, self.end, start, end)
        return _joined(low, high, self.kind[row], self.thread[row])

    def without_weak(self) -> RootRanges:
        """Those of strong kinds."""
        rows = ~np.isin(self.kind, [_CODE[kind] for kind in KINDS if kind.is_weak])
        return RootRanges(self.start[rows], self.end[rows], self.kind[rows], self.thread[rows])

    def painted_over(self, above: RootRanges) -> RootRanges:
        """These, and in their place others where there are such."""
        left = self.without(above.start, above.end)
        order = np.argsort(np.concatenate([left.start, above.start]), kind="stable")
        return _joined(
            np.concatenate([left.start, above.start])[order],
            np.concatenate([left.end, above.end])[order],
            np.concatenate([left.kind, above.kind])[order],
            np.concatenate([left.thread, above.thread])[order],
        )

    def of(self, kind: RootKind) -> tuple[UInt64s, UInt64s]:
        """Start and end of the ranges of one kind."""
        rows = self.kind == _CODE[kind]
        return self.start[rows], self.end[rows]

    def bytes_of(self, kind: RootKind) -> int:
        start, end = self.of(kind)
        return int((end - start).sum())

    def at(self, address: int) -> tuple[RootKind, int | None] | None:
        """Kind and thread of the range that holds an address."""
        row = int(np.searchsorted(self.start, np.uint64(address), side="right")) - 1
        if row < 0 or address >= int(self.end[row]):
            return None
        thread = int(self.thread[row])
        return KINDS[int(self.kind[row])], thread if thread != NO_THREAD else None


def _joined(start: UInt64s, end: UInt64s, kind: UInt8s, thread: Int32s) -> RootRanges:
    """Ranges in their order, those of one kind and thread that touch as one."""
    if len(start):
        goes_on = (start[1:] == end[:-1]) & (kind[1:] == kind[:-1]) & (thread[1:] == thread[:-1])
        first = np.flatnonzero(np.concatenate(([True], ~goes_on)))
        last = np.append(first[1:], len(start)) - 1
        start, end, kind, thread = start[first], end[last], kind[first], thread[first]
    return RootRanges(start, end, kind, thread)


class Painter:
    """Paints ranges of memory with a kind, later ones over earlier ones. Single ones cost a step of Python."""

    def __init__(self) -> None:
        self._columns: list[tuple[UInt64s, UInt64s, Int16s, Int32s]] = []
        self._single: list[tuple[int, int, int, int]] = []

    def add_many(self, start: UInt64s, end: UInt64s, kind: RootKind | None, thread: int = NO_THREAD) -> None:
        """Paints [start, end), one range an element; without a kind it takes away what is there."""
        self._gather()
        code = np.full(len(start), _code(kind), np.int16)
        self._columns.append((start, end, code, np.full(len(start), thread, np.int32)))

    def add(self, start: int, end: int, kind: RootKind | None, thread: int = NO_THREAD) -> None:
        """Paints what of [start, end) is addresses."""
        start, end = max(start, 0), min(end, ADDRESS_LIMIT)
        if start < end:
            self._single.append((start, end, _code(kind), thread))

    def ranges(self) -> RootRanges:
        """What is painted."""
        self._gather()
        start, end, kind, thread = (np.concatenate(column) for column in zip(*self._columns, strict=True))
        cuts = np.unique(np.concatenate([start, end]))
        # Of the last range on top first.
        kind, thread = kind[::-1], thread[::-1]
        painted = first_covering(cuts, start[::-1], end[::-1])[: max(len(cuts) - 1, 0)]
        held = painted >= 0
        held[held] = kind[painted[held]] != _NOTHING
        painted = painted[held]
        return _joined(cuts[:-1][held], cuts[1:][held], kind[painted].astype(np.uint8), thread[painted])

    def _gather(self) -> None:
        """Makes columns of the single ranges so far."""
        if self._single or not self._columns:
            start, end, kind, thread = zip(*self._single, strict=True) if self._single else ((), (), (), ())
            self._columns.append(
                (
                    np.array(start, np.uint64),
                    np.array(end, np.uint64),
                    np.array(kind, np.int16),
                    np.array(thread, np.int32),
                )
            )
            self._single = []


def _code(kind: RootKind | None) -> int:
    return _NOTHING if kind is None else _CODE[kind]
