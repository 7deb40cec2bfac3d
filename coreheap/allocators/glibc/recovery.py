"""Where a walk goes on behind a damaged header: boundaries that independent evidence proves.

Knows: what speaks for a chunk's start besides the header before it (free lists, prev_size footers, pointers to its
payload, a size that differs in one bit or in its lowest byte), and how these weigh against each other. Does not know:
how the walk is done (``walk``), or whose fault the damage is (``forensics``).

Old headers lie in the payloads of live blocks, and lead to real boundaries. So a chain of chunks alone does not say
where the first of them starts; only where nothing else speaks is the first chain believed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.leads import ListedChunks, PayloadPointers
from coreheap.allocators.glibc.structures import FLAGS, IS_MMAPPED, NON_MAIN_ARENA, PREV_INUSE
from coreheap.kernels import ChunkGeometry, StopReason, chain_reaches, resynchronise

UInt64s = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

SUSPECTS = 6
"""Headers before the one that breaks the walk that may be the damaged one: what follows a wrong size is read wrongly."""

NODES = 16
"""Boundaries on a proven chain that are weighed."""
REACH_BYTES = 1 << 24
POINTERS_WEIGHED = 64
MOST_PASSED = 16

PROVEN_BY = (StopReason.LIMIT, StopReason.TOP, StopReason.END, StopReason.FENCEPOSTS_HEAP, StopReason.FENCEPOSTS_MAIN)
CHAIN = 64
SHORT_CHAIN = 8
"""Chunks of a chain that ends at more damage: likely a real one, but old headers may make one as well."""
PROVEN, LIKELY = 2, 1

FEW, MOSTLY = 4, 0.75
"""Of so many chunks around damage so many must be led to before lists and pointers say where the next one starts."""

RECOVERIES = 64
"""Breaks of a heap that are weighed by all evidence; a heap in pieces goes on at the first chain behind each."""

ONE_BIT, LOW_BYTE, SHORT_LOW_BYTE, FOOTER, LIST_SIZE, LISTED, POINTED_TO = 5, 4, 3, 5, 6, 4, 3
"""What the kinds of evidence for a boundary weigh."""

WELL_FORMED, ILL_FORMED = -4, 2
IS_POINTED_TO, IS_NOT_POINTED_TO, PASSED_OVER, SAME_FOREIGN_BYTES = 3, -3, -2, 2
PROVEN_SCORE = 3


@dataclass(frozen=True, slots=True)
class Boundary:
    """Where the walk goes on: offsets of the damaged header and of the next one that is proven.

    ``expected_size`` is the size that the damaged header had, None where that is not proven. ``size_is_repaired``: what the
    header still says goes with it (one bit, its lowest byte, or a footer); else only other words tell it.
    """

    damaged_offset: int
    next_offset: int
    expected_size: int | None
    size_is_repaired: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A chunk whose header may be the damaged one."""

    offset: int
    size_word: int
    score: int
    """What speaks for and against it, whatever its right size."""
    listed_size: int
    """The size of the chunks on the free list that leads to it; as ``ListedChunks.size_at``."""
    starts_behind: list[int]
    """Offsets of proven chunks behind it that something leads to, ascending."""


@dataclass(slots=True)
class Recovery:
    """Weighs what a damaged stretch of one region can have been. ``view`` are the region's saved bytes from ``start`` on."""

    view: Bytes
    start: int
    geometry: ChunkGeometry
    top_offset: int
    region_bytes: int
    pointers: PayloadPointers
    _listed: Callable[[], ListedChunks]
    non_main: bool
    _proven: dict[int, int] = field(default_factory=dict)
    _chains: dict[int, tuple[int, ...]] = field(default_factory=dict)
    _near: dict[int, dict[int, tuple[int, str]]] = field(default_factory=dict)
    _tells: bool = False
    """Whether lists and pointers lead to most chunks here, so that a start that nothing leads to is doubtful."""

    @property
    def listed(self) -> UInt64s:
        """Header addresses that free lists lead to."""
        return self._listed().header_address

    def behind_break(self, broken: int, trail: list[int]) -> Boundary | None:
        """Where the walk goes on that broke at an offset; ``trail`` are the starts before it, the nearest first.

        None where no chain of chunks is proven behind it.
        """
        if self._is_where_fenceposts_are(broken):
            return None
        suspects = [broken, *trail[:SUSPECTS]]
        after = self._chain_behind(broken)
        farthest = min(self.region_bytes, (after[0] if after else broken) + REACH_BYTES)
        pointed_to = self._pointed_to(suspects[-1], farthest)
        led_to = [self._is_led_to(node, pointed_to) for node in (*trail, *after)]
        self._tells = len(led_to) >= FEW and sum(led_to) >= MOSTLY * len(led_to)
        best: tuple[int, Boundary] | None = None
        broken_is_a_chunk = self._is_led_to(broken, pointed_to)
        for distance, offset in enumerate(suspects):
            suspect = self._suspected(offset, distance, broken_is_a_chunk, pointed_to)
            for candidate in self._candidates(offset, broken, pointed_to):
                score, boundary = self._weigh(suspect, candidate, pointed_to)
                if best is None or score > best[0]:
                    best = score, boundary
        if best is None:
            return None
        return best[1]

    def swallowed(self, damaged: int, end: int, inner: int) -> Boundary | None:
        """The right size of a chunk [damaged, end) in which a real chunk starts at ``inner``; None where no one change of
        one bit or of the lowest byte leads there."""
        observed = self.word(damaged + self.geometry.word_bytes)
        joins = chain_reaches(self.view, self.geometry, inner, end, CHAIN, self.region_bytes)
        if joins.stop_reason is not StopReason.TOP and end != self.region_bytes:
            return None
        best: tuple[int, int, str] | None = None
        for size, weight, reason in self._variants(observed):
            after = damaged + size
            if not damaged < after <= inner:
                continue
            chain = chain_reaches(self.view, self.geometry, after, inner, CHAIN, self.region_bytes)
            if chain.stop_reason is StopReason.TOP and (best is None or weight > best[0]):
                best = weight, size, reason
        if best is None:
            return None
        return Boundary(damaged, damaged + best[1], best[1], True, (best[2], "a chunk that starts inside of it"))

    def _is_where_fenceposts_are(self, offset: int) -> bool:
        """Whether an offset is so near to the end of a retired sub-heap that only its fenceposts have room."""
        word = self.geometry.word_bytes
        room = 4 * word + self.geometry.alignment - 2 * word
        return self.non_main and self.top_offset < 0 and self.region_bytes - offset <= room

    # Candidates

    def _candidates(self, suspect: int, broken: int, pointed_to: UInt64s | None) -> Iterator[int]:
        """Offsets at which the chunk of a suspect's header may end, each once, the nearest first."""
        geometry = self.geometry
        observed = self.word(suspect + geometry.word_bytes)
        found = {suspect + size for size in self._near_sizes(observed)}
        found.add(suspect + self._listed().size_at(self.start + suspect))
        nodes = self._chain_behind(suspect)
        reach = (nodes[0] if nodes else suspect) + REACH_BYTES
        found.update(self._chain_behind(suspect))
        listed = self.listed[
            (self.listed > np.uint64(self.start + suspect))
            & (self.listed < np.uint64(self.start + min(reach, self.region_bytes)))
        ]
        for column in (pointed_to, listed):
            if column is not None:
                offsets = column.astype(np.int64) - self.start
                found.update(offsets[offsets > suspect][:POINTERS_WEIGHED].tolist())
        if self.top_offset >= 0:
            found.add(self.top_offset)
        for offset in sorted(found):
            size = offset - suspect
            in_place = offset < self.region_bytes and offset % geometry.alignment == 0
            if size >= geometry.minimum_chunk_bytes and in_place and self._is_proven(offset):
                yield offset

    def _chain_behind(self, offset: int) -> tuple[int, ...]:
        """The first chunks that are proven behind an offset."""
        if offset not in self._chains:
            nodes = {*self._nodes_from(self._resynchronised(offset, CHAIN))}
            nodes.update(self._nodes_from(self._resynchronised(offset, SHORT_CHAIN)))
            self._chains[offset] = tuple(sorted(nodes))
        return self._chains[offset]

    def _nodes_from(self, offset: int) -> Iterator[int]:
        """The first chunks of the chain from an offset on; none from -1."""
        for _ in range(NODES):
            if not 0 <= offset < self.region_bytes:
                return
            yield offset
            step = chain_reaches(self.view, self.geometry, offset, self.top_offset, 1, self.region_bytes)
            offset = step.end_offset if step.stop_reason is StopReason.LIMIT else -1

    def _near_sizes(self, observed: int) -> dict[int, tuple[int, str]]:
        """The sizes of ``_variants`` with the weight and the reason of each."""
        if observed not in self._near:
            self._near[observed] = {size: (weight, reason) for size, weight, reason in self._variants(observed)}
        return self._near[observed]

    def _variants(self, observed: int) -> Iterator[tuple[int, int, str]]:
        """(size, weight, reason): sizes that differ from a size word in one bit, or in its lowest byte."""
        size, alignment = observed & ~FLAGS, self.geometry.alignment
        for bit in range(alignment.bit_length() - 1, 8 * self.geometry.word_bytes):
            other = size ^ 1 << bit
            if self.geometry.minimum_chunk_bytes <= other < self.region_bytes and not other % alignment:
                yield other, ONE_BIT, f"its size word differs from that in bit {bit} alone"
        high = observed & ~0xFF
        if high < self.region_bytes:
            weight = LOW_BYTE if high else SHORT_LOW_BYTE
            for low in range(0, 256, alignment):
                if high + low >= self.geometry.minimum_chunk_bytes and (high + low ^ size).bit_count() != 1:
                    yield high + low, weight, "its size word differs from that in the lowest byte alone"

    def _suspected(self, offset: int, distance: int, broken_is_a_chunk: bool, pointed_to: UInt64s | None) -> _Suspect:
        observed, score = self.word(offset + self.geometry.word_bytes), -distance
        if distance:
            score += WELL_FORMED if self._is_well_formed(observed) else ILL_FORMED
            score += PASSED_OVER * 2 if broken_is_a_chunk else 0
            score += 1 if self._is_pointed_to(offset, pointed_to) else 0
        elif broken_is_a_chunk:
            score += IS_POINTED_TO
        elif self._tells:
            # Other chunks here are pointed to, this one is not: perhaps it is none.
            score += IS_NOT_POINTED_TO
        if not distance and self._goes_on_from_before(offset):
            score += SAME_FOREIGN_BYTES
        return _Suspect(
            offset,
            observed,
            score,
            self._listed().size_at(self.start + offset),
            self._starts_behind(offset, pointed_to),
        )

    def _weigh(self, suspect: _Suspect, candidate: int, pointed_to: UInt64s | None) -> tuple[int, Boundary]:
        """How much speaks for: the header of ``suspect`` is damaged, and the next chunk starts at ``candidate``."""
        word = self.geometry.word_bytes
        observed, size = suspect.size_word, candidate - suspect.offset
        score, for_size, repaired = suspect.score - (PROVEN - self._proof(candidate)), 0, False
        reasons: list[str] = []
        matching = self._near_sizes(observed).get(size)
        if observed & ~FLAGS == size:
            matching = ONE_BIT, "its size is right, its flags are not"
        if matching:
            weight, reason = matching
            for_size, repaired = weight, weight >= LOW_BYTE
            reasons.append(reason)
        next_word, before = self.word(candidate + word), self.word(candidate)
        if not next_word & PREV_INUSE:
            if before != size:
                for_size -= FOOTER
            else:
                for_size, repaired = for_size + FOOTER, True
                reasons.append("the prev_size behind it says so")
        if suspect.listed_size == size:
            for_size, repaired = for_size + LIST_SIZE, True
            reasons.append("it is on a free list of that size")
        if self._tells and self._is_listed(candidate):
            for_size += LISTED
            reasons.append("a free list leads to the next chunk")
        if self._tells and self._is_pointed_to(candidate, pointed_to):
            for_size += POINTED_TO
            reasons.append("pointers lead to the next chunk's payload")
        for_size += PASSED_OVER * min(bisect_left(suspect.starts_behind, candidate), MOST_PASSED)
        nodes = self._chain_behind(suspect.offset)
        if not self._tells:
            for_size -= sum(node < candidate for node in nodes)
        proven = for_size >= PROVEN_SCORE
        if not repaired:
            # Something may start between: then this is not one chunk but several, or old headers in its payload.
            proven = proven and not any(node < candidate for node in nodes)
            proven = proven and not self._led_to_between(suspect.offset, candidate, pointed_to)
        return score + for_size, Boundary(
            suspect.offset, candidate, size if proven else None, repaired and proven, tuple(reasons) if proven else ()
        )

    # Facts

    def word(self, offset: int) -> int:
        """The word at an offset; 0 where it was not saved."""
        return int.from_bytes(self.view[offset : offset + self.geometry.word_bytes].tobytes(), "little")

    def _resynchronised(self, offset: int, proof_chunks: int) -> int:
        return resynchronise(
            self.view, self.geometry, offset, self.top_offset, region_bytes=self.region_bytes, proof_chunks=proof_chunks
        )

    def _proof(self, offset: int) -> int:
        """How well a chain proves that a chunk starts here: PROVEN, LIKELY where it breaks at more damage, else 0."""
        known = self._proven.get(offset)
        if known is None:
            if offset + self.geometry.header_bytes > len(self.view):
                return 0
            chain = chain_reaches(self.view, self.geometry, offset, self.top_offset, CHAIN, self.region_bytes)
            at_fence = chain.stop_reason in (StopReason.FENCEPOSTS_HEAP, StopReason.FENCEPOSTS_MAIN)
            is_whole = chain.stop_reason in PROVEN_BY and (
                not at_fence or chain.chunk_count > 0 or chain.end_offset == self.region_bytes
            )
            is_long = chain.stop_reason is StopReason.BROKEN and chain.chunk_count >= SHORT_CHAIN
            known = PROVEN if is_whole else LIKELY if is_long else 0
            self._proven[offset] = known
        return known

    def _is_proven(self, offset: int) -> bool:
        return self._proof(offset) > 0

    def _pointed_to(self, first: int, last: int) -> UInt64s | None:
        """Header addresses between two offsets that words of the core lead to the payloads of."""
        return self.pointers.headers_within(self.start + first, self.start + last)

    def _is_led_to(self, offset: int, pointed_to: UInt64s | None) -> bool:
        return self._is_pointed_to(offset, pointed_to) or self._is_listed(offset)

    def _is_pointed_to(self, offset: int, pointed_to: UInt64s | None) -> bool:
        return pointed_to is not None and _holds(pointed_to, self.start + offset)

    def _is_listed(self, offset: int) -> bool:
        return _holds(self.listed, self.start + offset)

    def _starts_behind(self, suspect: int, pointed_to: UInt64s | None) -> list[int]:
        """Offsets of the next proven chunks that something leads to, ascending; twice what a pointer and a list lead to."""
        found: list[int] = []
        for column in (pointed_to, self.listed):
            if column is not None:
                first = np.searchsorted(column, np.uint64(self.start + suspect), side="right")
                last = np.searchsorted(column, np.uint64(self.start + self.region_bytes), side="left")
                offsets = (column[first:last][:POINTERS_WEIGHED].astype(np.int64) - self.start).tolist()
                found += [at for at in offsets if not at % self.geometry.alignment and self._is_proven(at)]
        return sorted(found)

    def _led_to_between(self, suspect: int, candidate: int, pointed_to: UInt64s | None) -> bool:
        for column in (pointed_to, self.listed):
            if column is not None:
                first, last = np.searchsorted(
                    column, np.array([suspect + 1, candidate], np.uint64) + np.uint64(self.start)
                )
                if last > first:
                    return True
        return False

    def _is_well_formed(self, size_word: int) -> bool:
        bad_flag = size_word & IS_MMAPPED or bool(size_word & NON_MAIN_ARENA) != self.non_main
        return not bad_flag and bool(size_word & PREV_INUSE) and not (size_word & ~FLAGS) % self.geometry.alignment

    def _goes_on_from_before(self, offset: int) -> bool:
        """Whether the bytes of a header look like those directly before it: all text, or all one byte."""
        word = self.geometry.word_bytes
        part = self.view[max(offset, 0) : offset + 2 * word]
        if len(part) < 2 * word:
            return False
        before, inside = part[:word], part[word:]
        if (before == before[0]).all() and before[0] not in (0, 255):
            return bool((inside[:2] == before[0]).all())
        return bool(((before >= 0x20) & (before < 0x7F)).all() and ((inside[:2] >= 0x20) & (inside[:2] < 0x7F)).all())


def _holds(column: UInt64s, address: int) -> bool:
    row = int(np.searchsorted(column, np.uint64(address)))
    return row < len(column) and int(column[row]) == address


Listed = Callable[[], ListedChunks]
"""``listed_chunks``, asked for only where something is damaged."""
