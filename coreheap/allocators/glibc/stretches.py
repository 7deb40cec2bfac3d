"""Where the chunks of all arenas should be: sub-heaps, the main arena's break, pieces from mmap, of every copy of malloc.

Knows: how a main arena's memory is found where nothing links it, and what proves whose it is. Does not know: what the
chunks are (``walk``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.gathering import UInt64s
from coreheap.allocators.glibc.holes import Stretch
from coreheap.allocators.glibc.leads import followed
from coreheap.allocators.glibc.locate import (
    anonymous_ranges,
    heap_behind_program,
    joined,
    mapping_end,
)
from coreheap.allocators.glibc.records import ArenaState, Layout
from coreheap.allocators.glibc.torn_pieces import TornPieces
from coreheap.corefile import Core
from coreheap.evidence import Gap
from coreheap.heap import NO_INDEX, RegionKind
from coreheap.kernels import StopReason, chain_reaches, find_chunk_runs
from coreheap.quantities import AddressRange, format_address

NO_TOP = -1
"""Stands for a top whose address is unknown; lies in no stretch."""

CHUNKS_OF_A_START = 4
"""Consistent chunks that make the memory before a run of chunks a damaged part of a heap, not foreign memory."""

SUM_LIMIT = 1 << 28
"""Bits that the search for pieces that add up may use."""

CachedBlocks = Callable[[int], UInt64s]
"""Payload addresses at the heads of all tcache lists of a copy, by its number."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """Memory that an arena's system_mem counts and that no copy of malloc has: another caller of sbrk, or alignment."""

    arena: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Stretches:
    """All stretches by address, what is known to lie between them, and what could not be assigned with proof."""

    stretches: tuple[Stretch, ...]
    foreign: tuple[Foreign, ...]
    gaps: tuple[Gap, ...]


def stretches_of(core: Core, layout: Layout, arenas: tuple[ArenaFacts, ...], cached: CachedBlocks) -> Stretches:
    """Where the chunks of all arenas should be; what nothing points to is searched for.

    ``cached`` is asked only when several main arenas have memory that nothing but chunks in their free lists tells apart.
    """
    finder = _MainMemory(core, layout, arenas, cached)
    for arena in arenas:
        top = arena.state.top if arena.state is not None else 0
        for number, heap in enumerate(arena.sub_heaps):
            is_first = heap.address + layout.heap_info_bytes == arena.address
            overhead = layout.first_chunk_in_arena_heap if is_first else layout.heap_info_bytes
            if overhead < heap.size:
                finder.stretches.append(
                    Stretch(
                        RegionKind.ARENA_HEAP,
                        arena.index,
                        number,
                        heap.address + overhead,
                        heap.address + heap.size,
                        top,
                        heap.address <= top < heap.address + heap.size,
                    )
                )
    finder.find()
    ordered = sorted(finder.stretches, key=lambda stretch: stretch.start)
    return Stretches(tuple(ordered), tuple(finder.foreign), tuple(finder.gaps))


@dataclass(frozen=True, slots=True)
class _Main:
    """A main arena whose malloc_state was saved and that holds memory."""

    facts: ArenaFacts
    state: ArenaState

    @property
    def top_end(self) -> int:
        return self.state.top + (self.facts.top_bytes or 0)

    def chunks(self, core: Core, layout: Layout, cached: UInt64s) -> UInt64s:
        """Places in chunks that the arena's lists lead to: bins from both ends, fastbins, and ``cached`` blocks."""
        word, safe_linking = core.word_bytes, layout.generation.safe_linking
        singles = np.array([self.state.top, self.state.last_remainder], np.uint64)
        own = AddressRange(self.state.address, self.state.address + layout.state.byte_count)
        lists = (
            (self.state.bins[0::2], 2 * word, False),
            (self.state.bins[1::2], 3 * word, False),
            (self.state.fastbins, 2 * word, safe_linking),
            (cached, 0, safe_linking),
        )
        return np.concatenate([singles, *(followed(core.memory, *each, own)[0] for each in lists)])


class _MainMemory:
    """Finds the main arenas' memory beside the sub-heaps that are known."""

    def __init__(self, core: Core, layout: Layout, arenas: tuple[ArenaFacts, ...], cached: CachedBlocks) -> None:
        self.core = core
        self.layout = layout
        self.arenas = arenas
        self.cached = cached
        self.stretches: list[Stretch] = []
        self.foreign: list[Foreign] = []
        self.gaps: list[Gap] = []

    def find(self) -> None:
        """Add what the main arenas of all copies have: one range from brk each, parts of a shared break, pieces from mmap,
        or what can be recognised without a malloc_state."""
        mains = [
            _Main(arena, arena.state)
            for arena in self.arenas
            if arena.is_main and arena.state is not None and arena.state.system_mem
        ]
        stateless = [arena for arena in self.arenas if arena.is_main and arena.state is None]
        if stateless and not any(main.facts.brk_range for main in mains):
            for start, end in heap_behind_program(self.core, self.layout):
                self._add(RegionKind.BRK, stateless[0].index, start, end, NO_TOP)
        for group in _sharing_groups([main for main in mains if main.facts.brk_range is not None]):
            if len(group) == 1:
                place = group[0].facts.brk_range
                assert place is not None
                start = self.layout.aligned_header(place.start)
                self._add(RegionKind.BRK, group[0].facts.index, start, place.end, group[0].state.top)
            else:
                self._share_break(group)
        in_pieces = [main for main in mains if main.facts.brk_range is None]
        for main in in_pieces:
            self._add_first_memory(main, in_pieces)
        if in_pieces:
            self._add_pieces(in_pieces)

    def _add(self, kind: RegionKind, arena: int, start: int, end: int, top: int) -> None:
        self.stretches.append(Stretch(kind, arena, NO_INDEX, start, end, top, start <= top < end))

    # Pieces from mmap

    def _add_first_memory(self, main: _Main, others: list[_Main]) -> None:
        """What an arena that does not grow by brk (any more) has from sbrk_base on: its break, or its first piece."""
        sbrk_base, top = main.facts.sbrk_base, main.state.top
        if not sbrk_base or main.state.is_contiguous:
            return
        memory = self.core.memory
        start = self.layout.aligned_header(sbrk_base)
        end = mapping_end(memory, start)
        for run_start, run_end in joined(memory.saved_runs_within(start, end))[:1]:
            chain = chain_reaches(
                memory.view(run_start, run_end),
                self.layout.geometry,
                0,
                top - start if start <= top < run_end else -1,
                1 << 62,
                region_bytes=end - start,
            )
            if run_start == start and chain.stop_reason in (StopReason.FENCEPOSTS_MAIN, StopReason.TOP):
                end = start + chain.end_offset
            elif (torn_end := TornPieces(self.core, self.layout, main.facts).end_of(start)) is not None:
                end = torn_end
            elif len(others) > 1:
                # Pieces of several arenas lie in one mapping: what is not proven must not take another's.
                limits = [other.facts.sbrk_base for other in others if other.facts.sbrk_base > start]
                end = min([end, sbrk_base + main.state.system_mem, *limits])
            if end > start:
                kind = RegionKind.BRK if self._is_break(main) else RegionKind.MMAP_PIECE
                self._add(kind, main.facts.index, start, end, top)

    def _is_break(self, main: _Main) -> bool:
        """Whether an arena's first memory came from brk: it lies in the mapping of a break that is known; without one the
        program's own arena is the one that began there."""
        known = [arena.brk_range for arena in self.arenas if arena.brk_range is not None]
        if not known:
            return main.facts.copy == 0
        end = mapping_end(self.core.memory, main.facts.sbrk_base)
        return any(mapping_end(self.core.memory, place.start) == end for place in known)

    def _add_pieces(self, mains: list[_Main]) -> None:
        """Pieces that main arenas got from mmap when brk failed or must not be used (sysmalloc, MMAP_AS_MORECORE_SIZE, all
        releases).

        Nothing links them; they are found as runs of chunks that begin at a page and end at fenceposts or at a top.
        """
        excluded = [(stretch.start, stretch.end) for stretch in self.stretches]
        excluded += [(heap.address, heap.address + arena.heap_max) for arena in self.arenas for heap in arena.sub_heaps]
        excluded += [(arena.brk_range.start, arena.brk_range.end) for arena in self.arenas if arena.brk_range]
        pieces = [
            run
            for start, end in anonymous_ranges(self.core, excluded)
            for saved_start, saved_end in joined(self.core.memory.saved_runs_within(start, end))
            for run in self._runs(saved_start, saved_end, mains)
        ]
        known = [*pieces, *((stretch.start, stretch.end) for stretch in self.stretches)]
        held = sum(main.state.system_mem for main in mains)
        held -= sum(end - start for start, end in known if not self._lies_in_sub_heap(start))
        for main in mains:
            torn = TornPieces(self.core, self.layout, main.facts).within([*excluded, *pieces], held)
            held -= sum(end - start for start, end in torn)
            pieces += torn
        pieces += self._bare_tops(mains, pieces)
        owners = [mains[0]] * len(pieces) if len(mains) == 1 else self._owners_of_pieces(pieces, mains)
        for (start, end), owner in zip(pieces, owners, strict=True):
            self._add(RegionKind.MMAP_PIECE, owner.facts.index, start, end, owner.state.top)

    def _runs(self, start: int, end: int, mains: list[_Main]) -> list[tuple[int, int]]:
        """Runs of chunks from a page on in saved memory. Behind each top another arena's memory may begin."""
        tops = sorted((main.state.top, main.top_end) for main in mains if start <= main.state.top < end)
        cuts = [min(top_end, end) for _, top_end in tops[:-1]]
        found: list[tuple[int, int]] = []
        for number, (low, high) in enumerate(zip([start, *cuts], [*cuts, end], strict=True)):
            if low >= high:
                continue
            top_offset = tops[number][0] - low if tops else -1
            runs = find_chunk_runs(
                self.core.memory.view(low, high),
                low,
                self.layout.geometry,
                self.core.page_bytes,
                top_offset if top_offset >= 0 else -1,
                1,
            )
            found += [
                (low + begin, low + stop)
                for begin, stop in zip(runs.start_offset.tolist(), runs.end_offset.tolist(), strict=True)
            ]
        return found

    def _lies_in_sub_heap(self, address: int) -> bool:
        heaps = ((heap.address, arena.heap_max) for arena in self.arenas for heap in arena.sub_heaps)
        return any(start <= address < start + most for start, most in heaps)

    def _bare_tops(self, mains: list[_Main], pieces: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Pieces that are nothing but top: no chunk was cut from them yet."""
        known = [*pieces, *((stretch.start, stretch.end) for stretch in self.stretches)]
        bare = []
        for main in mains:
            top, end = main.state.top, main.top_end
            begins_page = top == self.layout.aligned_header(top - top % self.core.page_bytes)
            if not main.facts.top_bytes or not begins_page or any(start <= top < stop for start, stop in known):
                continue
            if end <= mapping_end(self.core.memory, top):
                bare.append((top, end))
        return bare

    def _owners_of_pieces(self, pieces: list[tuple[int, int]], mains: list[_Main]) -> list[_Main]:
        """Which main arena has each piece: the one whose top or free chunks lie in it; then the one whose system_mem leaves
        room for it."""
        owners: list[_Main | None] = list(self._by_free_chunks(pieces, mains))
        page = self.core.page_bytes
        spans = [-(-end // page) * page - start // page * page for start, end in pieces]
        missing = {main.facts.index: main.state.system_mem for main in mains}
        for stretch in self.stretches:
            if stretch.arena in missing and stretch.kind is not RegionKind.ARENA_HEAP:
                missing[stretch.arena] -= -(-stretch.end // page) * page - stretch.start // page * page
        for owner, span in zip(owners, spans, strict=True):
            if owner is not None:
                missing[owner.facts.index] -= span
        undecided = [number for number, owner in enumerate(owners) if owner is None]
        while undecided:
            fits = {
                number: [main for main in mains if missing[main.facts.index] >= spans[number]] for number in undecided
            }
            clear = [number for number in undecided if len(fits[number]) == 1]
            if not clear:
                break
            owners[clear[0]] = fits[clear[0]][0]
            missing[fits[clear[0]][0].facts.index] -= spans[clear[0]]
            undecided.remove(clear[0])
        if undecided:
            self._share_out(undecided, pieces, spans, owners, mains, missing)
        return [owner or mains[0] for owner in owners]

    def _share_out(
        self,
        undecided: list[int],
        pieces: list[tuple[int, int]],
        spans: list[int],
        owners: list[_Main | None],
        mains: list[_Main],
        missing: dict[int, int],
    ) -> None:
        """Pieces in which every chunk is in use say nothing of their arena. They go where system_mem has room for them, so that
        all arenas add up where they can; that it could be otherwise is a gap."""
        self.gaps.append(
            Gap(
                "piece_of_unknown_copy",
                f"{len(undecided)} pieces of main arenas, {sum(spans[number] for number in undecided)} bytes, have no free"
                " chunk that tells which of several copies of malloc they belong to: their arenas and copies may be exchanged",
                AddressRange(pieces[undecided[0]][0], pieces[undecided[0]][1]),
            )
        )
        rest = list(undecided)
        for main in sorted(mains, key=lambda main: missing[main.facts.index]):
            chosen = _adding_up(
                [spans[number] // self.core.page_bytes for number in rest],
                missing[main.facts.index] // self.core.page_bytes,
            )
            for place in chosen:
                owners[rest[place]] = main
                missing[main.facts.index] -= spans[rest[place]]
            rest = [number for place, number in enumerate(rest) if place not in chosen]
        for number in rest:
            owner = max(mains, key=lambda main: missing[main.facts.index])
            owners[number] = owner
            missing[owner.facts.index] -= spans[number]

    def _by_free_chunks(self, pieces: list[tuple[int, int]], mains: list[_Main]) -> list[_Main | None]:
        """The one main arena whose own pointers, and blocks cached by its copy's threads, lie in each piece."""
        votes = np.zeros((len(mains), len(pieces)), np.int64)
        if pieces:
            order = np.argsort([start for start, _ in pieces])
            starts = np.array([pieces[number][0] for number in order], np.uint64)
            ends = np.array([pieces[number][1] for number in order], np.uint64)
            for row, main in enumerate(mains):
                words = main.chunks(self.core, self.layout, self.cached(main.facts.copy))
                at = np.searchsorted(starts, words, side="right") - 1
                held = (at >= 0) & (words < ends[np.maximum(at, 0)])
                np.add.at(votes[row], order[at[held]], 1)
        return [
            mains[int(column.argmax())] if np.count_nonzero(column) == 1 else None
            for column in np.ascontiguousarray(votes.T)
        ]

    # A break that several copies share

    def _share_break(self, group: list[_Main]) -> None:
        """Several main arenas grow by the same break (libc_malloc_debug beside libc): each has parts of it in turn.

        A part ends at fenceposts, which malloc sets where it finds the break moved by somebody else, or at a top. So
        parts that touch are never of the same arena.
        """
        ranges = [main.facts.brk_range for main in group if main.facts.brk_range is not None]
        low, high = min(place.start for place in ranges), max(place.end for place in ranges)
        parts = [
            run
            for start, end in joined(self.core.memory.saved_runs_within(low, high))
            for run in self._runs(start, end, group)
        ]
        parts += self._bare_tops(group, parts)
        parts, between = self._with_damaged_parts(sorted(parts), low, high)
        owners = self._by_free_chunks(parts, group)
        for number, (start, end) in enumerate(parts):
            inside = [main for main in group if _holds(main, start, end)]
            begins = [main for main in group if self.layout.aligned_header(main.facts.sbrk_base) == start]
            for choice in (begins, inside):
                if owners[number] is None and len(choice) == 1:
                    owners[number] = choice[0]
        self._alternate(parts, owners, group)
        for number, (start, end) in enumerate(parts):
            owner = owners[number]
            if owner is None:
                owner = next((main for main in group if _holds(main, start, end)), group[0])
                self.gaps.append(
                    Gap(
                        "piece_of_unknown_copy",
                        f"chunks from {format_address(start)} on belong to one of several copies of malloc; which one could"
                        f" not be proven, they are counted with arena {owner.facts.index}",
                        AddressRange(start, end),
                    )
                )
            self._add(RegionKind.BRK, owner.facts.index, start, end, owner.state.top)
        # What lies before an arena's very first header is its own alignment, and counted as that.
        own = {place.start for place in ranges}
        for start, end in between:
            if start not in own or end - start >= self.layout.word_class.alignment:
                around = [main for main in group if _holds(main, start, end)]
                self.foreign.append(Foreign((around or group)[0].facts.index, start, end))

    def _with_damaged_parts(
        self, parts: list[tuple[int, int]], low: int, high: int
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Parts of a break in order with those that damage hides from the search, and what lies between all of them."""
        memory, geometry = self.core.memory, self.layout.geometry
        result: list[tuple[int, int]] = []
        between: list[tuple[int, int]] = []
        position = low
        for start, end in [*parts, (high, high)]:
            header = self.layout.aligned_header(position)
            if start > header:
                runs = memory.saved_runs_within(header, start)
                view = memory.view(*runs[0]) if runs and runs[0][0] == header else None
                chain = chain_reaches(view, geometry, 0, -1, CHUNKS_OF_A_START) if view is not None else None
                if chain is None or chain.chunk_count >= CHUNKS_OF_A_START:
                    result.append((header, start))
                    start_of_gap = start
                    if header > position:
                        between.append((position, header))
                else:
                    start_of_gap = position
            else:
                start_of_gap = position
            if start > start_of_gap:
                between.append((start_of_gap, start))
            if end > start:
                result.append((start, end))
            position = max(position, end)
        return result, between

    def _alternate(self, parts: list[tuple[int, int]], owners: list[_Main | None], group: list[_Main]) -> None:
        """Fill in owners that are unknown from neighbours that touch: of two arenas it is the other one."""
        if len(group) != 2:
            return
        reach = self.core.page_bytes

        def fill(number: int, neighbour: int) -> None:
            (first, second) = sorted((parts[number], parts[neighbour]))
            known = owners[neighbour]
            if owners[number] is None and known is not None and second[0] - first[1] < reach:
                owners[number] = group[1] if known is group[0] else group[0]

        for number in range(1, len(parts)):
            fill(number, number - 1)
        for number in reversed(range(len(parts) - 1)):
            fill(number, number + 1)


def _adding_up(sizes: list[int], total: int) -> set[int]:
    """Positions of sizes that add up to ``total`` exactly; empty where none do, or where the search would be too large."""
    if total <= 0 or len(sizes) * total > SUM_LIMIT:
        return set()
    # Bit n of an entry: the sizes before it can add up to n.
    mask, reachable = (1 << total + 1) - 1, [1]
    for size in sizes:
        reachable.append((reachable[-1] | reachable[-1] << size) & mask)
    if not reachable[-1] >> total & 1:
        return set()
    chosen = set()
    for position in range(len(sizes) - 1, -1, -1):
        if not reachable[position] >> total & 1:
            chosen.add(position)
            total -= sizes[position]
    return chosen


def _holds(main: _Main, start: int, end: int) -> bool:
    place = main.facts.brk_range
    return place is not None and place.start <= start and end <= place.end


def _sharing_groups(mains: list[_Main]) -> list[list[_Main]]:
    """Main arenas with a break, those together whose ranges overlap."""
    groups: list[list[_Main]] = []
    reached = 0
    for main in sorted(mains, key=lambda main: main.facts.brk_range.start if main.facts.brk_range else 0):
        place = main.facts.brk_range
        assert place is not None
        if groups and place.start < reached:
            groups[-1].append(main)
        else:
            groups.append([main])
        reached = max(reached, place.end)
    return groups
