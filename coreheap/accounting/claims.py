"""Claims on the address space: who says of which ranges what they are used for.

Knows: ranges, and that the earlier claim wins. Does not know: who claims, or what is mapped at all (``pieces``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coreheap.corefile.regions import LAST_ADDRESS
from coreheap.mappings import KINDS, MappingKind

Int32s = npt.NDArray[np.int32]
UInt64s = npt.NDArray[np.uint64]

Addresses = int | Sequence[int] | UInt64s
Owners = int | Sequence[int] | npt.NDArray[np.integer]


NOBODY = -1
"""Where a column of owners has none."""


@dataclass(frozen=True, slots=True)
class ClaimColumns:
    """All claims in the order in which they were made, none empty; columns of equal length.

    ``start``, ``end``: uint64; ``kind``: uint8, a row of KINDS; ``thread``, ``arena``, ``name`` and ``part``: int32, NOBODY for
    none, ``name`` a row of ``Claims.names``, ``part`` one of ``Claims.parts``; ``is_supposed``: bool, told by its place alone.
    """

    start: UInt64s
    end: UInt64s
    kind: npt.NDArray[np.uint8]
    thread: Int32s
    arena: Int32s
    name: Int32s
    part: Int32s
    is_supposed: npt.NDArray[np.bool_]


@dataclass(slots=True)
class Claims:
    """Ranges with a kind and an owner. Where ranges meet, the one that was added first keeps the bytes.

    Ranges may overlap each other and reach where nothing is mapped; bytes that are not mapped count nowhere. One call for
    many ranges costs no more than one for a single range.
    """

    names: list[str] = field(default_factory=list)
    """Every owner's name, once."""
    parts: list[str] = field(default_factory=list)
    """The finer words that the ledger has for some claims, each once."""
    _calls: list[ClaimColumns] = field(default_factory=list)
    _number_of_name: dict[str, int] = field(default_factory=dict)
    _number_of_part: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        kind: MappingKind,
        start: Addresses,
        end: Addresses,
        *,
        thread: Owners = NOBODY,
        arena: Owners = NOBODY,
        name: str | Sequence[int] | None = None,
        part: str | Sequence[int] | None = None,
        is_supposed: bool | npt.NDArray[np.bool_] = False,
    ) -> None:
        """Claim [start, end): one range, or one for each element of two columns of equal length.

        ``thread`` (an index of ``core.threads``) and ``arena`` (an index of the heap's arenas) are one for all ranges or one for
        each, -1 for none. ``name`` says whose memory it is: a module, a file, another allocator. ``part`` is a leaf of the
        ledger below the kind's. Both are one for all ranges, or a row of ``names`` or ``parts`` for each. ``is_supposed``: nothing
        but where a range lies tells what it is.
        """
        low, high = _addresses(start), _addresses(end)
        held = high > low

        def column(values: Owners) -> Int32s:
            return np.broadcast_to(np.asarray(values, dtype=np.int32), low.shape)[held]

        self._calls.append(
            ClaimColumns(
                low[held],
                high[held],
                np.full(int(held.sum()), KINDS.index(kind), np.uint8),
                column(thread),
                column(arena),
                column(self.name_number(name) if name is None or isinstance(name, str) else name),
                column(self.part_number(part) if part is None or isinstance(part, str) else part),
                np.broadcast_to(np.asarray(is_supposed, np.bool_), low.shape)[held],
            )
        )

    def name_number(self, name: str | None) -> int:
        """The row of ``names`` that has this name, added where it is new; NOBODY for None."""
        return _numbered(name, self.names, self._number_of_name)

    def part_number(self, part: str | None) -> int:
        """The row of ``parts`` that is this word, added where it is new; NOBODY for None."""
        return _numbered(part, self.parts, self._number_of_part)

    def columns(self) -> ClaimColumns:
        """All claims, the earlier before the later."""
        empty = np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.uint8)
        nobody = np.zeros(0, np.int32)
        calls = self._calls or [ClaimColumns(*empty, nobody, nobody, nobody, nobody, np.zeros(0, np.bool_))]
        joined = ClaimColumns(
            np.concatenate([call.start for call in calls]),
            np.concatenate([call.end for call in calls]),
            np.concatenate([call.kind for call in calls]),
            np.concatenate([call.thread for call in calls]),
            np.concatenate([call.arena for call in calls]),
            np.concatenate([call.name for call in calls]),
            np.concatenate([call.part for call in calls]),
            np.concatenate([call.is_supposed for call in calls]),
        )
        self._calls = [joined]
        return joined


def _addresses(values: Addresses) -> UInt64s:
    """A column of addresses; Python's numbers may be any, as a damaged heap has them."""
    if isinstance(values, np.ndarray):
        return np.atleast_1d(values).astype(np.uint64, copy=False)
    numbers = values if isinstance(values, Sequence) else (values,)
    return np.array([min(max(int(number), 0), LAST_ADDRESS) for number in numbers], np.uint64)


def _numbered(word: str | None, words: list[str], number_of: dict[str, int]) -> int:
    if word is None:
        return NOBODY
    number = number_of.setdefault(word, len(words))
    if number == len(words):
        words.append(word)
    return number
