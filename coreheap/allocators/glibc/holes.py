"""Stretches of heap memory, and where one goes on behind memory of it that the core does not hold, or that the program put something else in.

Knows: what of a stretch is malloc's own saved memory, and that a chunk before a hole says where the next one is. Does not know:
how chunks are recorded (``walk``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.locate import joined, windows_within
from coreheap.allocators.glibc.structures import FLAGS, IS_MMAPPED, PREV_INUSE
from coreheap.corefile import AddressSpace
from coreheap.evidence import Gap
from coreheap.heap import RegionKind
from coreheap.kernels import ChunkGeometry, StopReason, chain_reaches, resynchronise
from coreheap.quantities import AddressRange

OTHER_MAPPING = "other_mapping"
"""Cause of a hole that the program mapped something else over (MAP_FIXED): what is there is not malloc's."""

HOLE_TEXTS = {
    OTHER_MAPPING: "the program has mapped something else there",
    "unmapped": "not mapped, as far as the core tells",
    "mapped_file": "the program has mapped a file there",
    "not_saved": "left out of the core",
    "truncated": "cut off with the end of the file",
}

CHAIN = 8
"""Consistent chunks behind a hole that prove the size of the chunk that leads over it."""
HOPS = 64
"""Holes that such a chain may lead over."""
PROOFS = (64, 32, 16, 8, 4, 2, 1)
"""Chunks of a chain behind a hole, the longest tried first; a shorter one than the first has to lead over the next hole."""
NO_CHUNK = -1

ENDS = (StopReason.TOP, StopReason.END, StopReason.FENCEPOSTS_HEAP, StopReason.FENCEPOSTS_MAIN, StopReason.LIMIT)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Memory of one arena that chunks should tile from ``start`` on. ``top`` is the arena's top, wherever it lies."""

    kind: RegionKind
    arena: int
    sub_heap: int
    start: int
    end: int
    top: int
    is_top_heap: bool


@dataclass(slots=True)
class Holes:
    """The saved memory of a stretch that is malloc's own, ``parts``, and what leads from one part to another."""

    memory: AddressSpace
    geometry: ChunkGeometry
    stretch: Stretch
    parts: list[tuple[int, int]] = field(init=False)
    _windows: list[tuple[int, int]] = field(init=False)
    _starts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        start, end = self.stretch.start, self.stretch.end
        saved = joined(self.memory.saved_runs_within(start, end))
        self._windows = windows_within(self.memory, start, end)
        self.parts = _without(saved, self._windows) if self._windows else saved
        self._starts = [part[0] for part in self.parts]

    def cause_at(self, address: int) -> str:
        """Why malloc's own bytes at an address are not there."""
        row = bisect_right(self._windows, (address, 1 << 64)) - 1
        if row >= 0 and address < self._windows[row][1]:
            return OTHER_MAPPING
        return self.memory.cause_missing(address)

    def end_of_chunk(self, header: int) -> int | None:
        """Where a chunk ends whose header is a proven one, the last before a hole; None where its size leads to no chunk.

        Its end may lie in the hole: then its size has to be one that a chunk can have, which is all that is left to ask.
        """
        end, word = self._target(header), self.geometry.word_bytes
        if end is None or end in (self.stretch.end, self.stretch.top):
            return end
        chunks = 0
        at = end
        for _ in range(HOPS):
            part = self.part_holding(at)
            if part is None:
                return end
            size_word = self.memory.read_word(at + word)
            if not size_word & PREV_INUSE and self.memory.read_word(at) != at - header:
                return None
            base = part[0] + (at - part[0]) % self.geometry.alignment
            chain = chain_reaches(
                self.memory.view(base, part[1]),
                self.geometry,
                at - base,
                self.stretch.top - base if self.stretch.is_top_heap else -1,
                CHAIN,
                region_bytes=self.stretch.end - base,
            )
            chunks += chain.chunk_count
            if chain.stop_reason in ENDS or chunks >= CHAIN:
                return end
            header = base + chain.end_offset
            following = self._target(header)
            if chain.stop_reason is not StopReason.CUT or following is None:
                return None
            if following in (self.stretch.end, self.stretch.top):
                return end
            at = following
        return end

    def first_chunk(self, view: npt.NDArray[np.uint8], base: int) -> int:
        """The first proven chunk in a part of the stretch, ``view`` from ``base`` on; NO_CHUNK without one.

        A part that ends at a hole may have fewer chunks than prove each other elsewhere: there the longest chain is believed that
        ends with a chunk that leads over the hole.
        """
        region_bytes = self.stretch.end - base
        top = self.stretch.top - base if self.stretch.is_top_heap else -1
        for proof in PROOFS:
            chain = chain_reaches(view, self.geometry, 0, top, proof, region_bytes=region_bytes)
            found = 0 if chain.stop_reason in ENDS and chain.chunk_count else NO_CHUNK
            if found < 0:
                found = resynchronise(view, self.geometry, 0, top, region_bytes=region_bytes, proof_chunks=proof)
            if found < 0:
                continue
            if proof == PROOFS[0]:
                return base + found
            chain = chain_reaches(view, self.geometry, found, top, 1 << 62, region_bytes=region_bytes)
            if chain.stop_reason is StopReason.CUT and self.end_of_chunk(base + chain.end_offset) is not None:
                return base + found
        return NO_CHUNK

    def end_of_piece(self, header: int) -> int | None:
        """Where the chunks from a header on end, at fenceposts of the main arena or where top begins; None where they do not.

        Holes are led over; what lies behind the last one ends the chain.
        """
        for _ in range(HOPS):
            part = self.part_holding(header)
            if part is None:
                return None
            top = self.stretch.top - header
            chain = chain_reaches(
                self.memory.view(header, part[1]),
                self.geometry,
                0,
                top if top > 0 else -1,
                1 << 62,
                region_bytes=self.stretch.end - header,
            )
            end = header + chain.end_offset
            if chain.stop_reason is StopReason.TOP:
                return self.stretch.top
            if chain.stop_reason is StopReason.FENCEPOSTS_MAIN:
                return end
            following = self._target(end) if chain.stop_reason is StopReason.CUT and self.part_holding(end) else None
            if following is None or following == self.stretch.top:
                return following
            header = following
        return None

    def part_holding(self, header: int) -> tuple[int, int] | None:
        """The part that holds a whole header."""
        row = bisect_right(self._starts, header) - 1
        if row < 0 or header + 2 * self.geometry.word_bytes > self.parts[row][1]:
            return None
        return self.parts[row]

    def _target(self, header: int) -> int | None:
        """Where a chunk whose header is saved says that it ends; None where no chunk can."""
        size_word = self.memory.read_word(header + self.geometry.word_bytes)
        size = size_word & ~FLAGS
        stretch = self.stretch
        limit = stretch.top if stretch.is_top_heap and header <= stretch.top else stretch.end
        is_possible = (
            not size_word & IS_MMAPPED
            and size >= self.geometry.minimum_chunk_bytes
            and size % self.geometry.alignment == 0
            and header + size <= limit
        )
        return header + size if is_possible else None


@dataclass(frozen=True, slots=True)
class Hole:
    """Memory that a known chunk has and that is not malloc's any more, or not in the core."""

    range: AddressRange
    cause: str
    arena: int | None = None

    @property
    def gap(self) -> Gap:
        """The hole as what a report says of it."""
        owner = "an mmapped block" if self.arena is None else f"a block of arena {self.arena}"
        said = HOLE_TEXTS.get(self.cause, self.cause)
        return Gap(f"block_{self.cause}", f"{self.range.byte_count} bytes of {owner}: {said}", self.range)


def holes_within(memory: AddressSpace, start: int, end: int) -> Iterator[Hole]:
    """The parts of an mmapped chunk's mapping that are not its own saved memory."""
    windows = windows_within(memory, start, end)
    for low, high in windows:
        yield Hole(AddressRange(low, high), OTHER_MAPPING)
    for low, high in _without([(start, end)], sorted([*windows, *memory.saved_runs_within(start, end)])):
        yield Hole(AddressRange(low, high), memory.cause_missing(low))


def _without(ranges: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """What others leave of ranges; both sorted, the ranges without overlap."""
    left: list[tuple[int, int]] = []
    first = 0
    for start, end in ranges:
        while first < len(taken) and taken[first][1] <= start:
            first += 1
        at, row = start, first
        while row < len(taken) and taken[row][0] < end:
            if taken[row][0] > at:
                left.append((at, taken[row][0]))
            at = max(at, taken[row][1])
            row += 1
        if at < end:
            left.append((at, end))
    return left
