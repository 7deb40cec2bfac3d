"""From arenas to chunks: walks every stretch of heap memory and collects the chunk index.

Knows: where an arena's chunks lie, how a walk goes on behind fenceposts, damage and unsaved memory. Does not know:
free lists (``overlay``), or how the arenas were found (``identify``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.arenas import ArenaFacts
from coreheap.allocators.glibc.locate import (
    anonymous_ranges,
    heap_behind_program,
    joined,
    mapping_end,
)
from coreheap.allocators.glibc.records import Layout
from coreheap.corefile import AddressSpace, Core
from coreheap.evidence import Anomaly
from coreheap.heap import NO_INDEX, RegionKind, UnattributedRange
from coreheap.kernels import (
    ChunkIndex,
    ChunkIndexBuilder,
    ChunkState,
    MmappedChunks,
    StopReason,
    WalkAnomaly,
    chain_reaches,
    find_chunk_runs,
    resynchronise,
    walk_region,
)
from coreheap.quantities import AddressRange

UInt64s = npt.NDArray[np.uint64]

ANOMALIES_KEPT = 1000
"""Anomalies that are described; all are counted."""

MISSING_ROOM_FLOOR = 1 << 30
MISSING_ROOM_PER_SAVED = 4
"""Bytes that were not saved and still get room in the index: a hostile core may promise any number of them."""

NO_TOP = -1
"""Stands for a top whose address is unknown; lies in no stretch."""

SEGMENT_LIMIT = 1 << 16
"""Stretches that unsaved memory, damage or foreign sbrk may cut the heap into."""

ANOMALY_TEXTS = {
    WalkAnomaly.PREV_SIZE_MISMATCH: ("a free chunk's size in the next prev_size", "another value"),
    WalkAnomaly.MMAPPED_FLAG_INSIDE: ("no IS_MMAPPED inside a heap", "IS_MMAPPED"),
    WalkAnomaly.ARENA_FLAG_MISMATCH: ("NON_MAIN_ARENA as in its arena", "the opposite"),
    WalkAnomaly.FIRST_CHUNK_PREVIOUS_FREE: ("PREV_INUSE in the first chunk", "PREV_INUSE clear"),
    WalkAnomaly.ADJACENT_FREE: ("free neighbours joined", "a free chunk behind a free chunk"),
    WalkAnomaly.FREE_BEFORE_TOP: ("a free chunk joined with top", "a free chunk before top"),
    WalkAnomaly.TOP_SIZE_MISMATCH: ("top up to the end of its heap", "another size"),
    WalkAnomaly.MARKER_WITHOUT_FENCEPOST: ("a fencepost before the end marker", "none"),
}


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


@dataclass(frozen=True, slots=True)
class WalkedRegion:
    """A region of the index and where it came from; numbered like the index's regions."""

    stretch: Stretch
    start: int
    end: int
    proven_to_end: bool
    stop_reason: StopReason


@dataclass(slots=True)
class HeapWalk:
    """What the walk of all stretches gave."""

    index: ChunkIndex
    regions: list[WalkedRegion]
    unattributed: dict[int, list[UnattributedRange]]
    """By arena index."""
    anomalies: list[Anomaly]
    anomaly_count: int


def stretches_of(core: Core, layout: Layout, arenas: tuple[ArenaFacts, ...], sbrk_base: int) -> list[Stretch]:
    """Where the chunks of all arenas should be, by address; what nothing points to is searched for."""
    stretches: list[Stretch] = []
    for arena in arenas:
        top = arena.state.top if arena.state is not None else 0
        for number, heap in enumerate(arena.sub_heaps):
            is_first = heap.address + layout.heap_info_bytes == arena.address
            overhead = layout.first_chunk_in_arena_heap if is_first else layout.heap_info_bytes
            if overhead < heap.size:
                stretches.append(
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
    main = next((arena for arena in arenas if arena.is_main), None)
    if main is not None:
        stretches.extend(_main_stretches(core, layout, main, arenas, stretches, sbrk_base))
    return sorted(stretches, key=lambda stretch: stretch.start)


def _main_stretches(
    core: Core,
    layout: Layout,
    main: ArenaFacts,
    arenas: tuple[ArenaFacts, ...],
    others: list[Stretch],
    sbrk_base: int,
) -> list[Stretch]:
    """The main arena's memory: one range from brk, or pieces, or what can be recognised without its malloc_state."""

    def stretch(kind: RegionKind, start: int, end: int, top: int) -> Stretch:
        return Stretch(kind, main.index, NO_INDEX, start, end, top, start <= top < end)

    if main.state is None:
        return [stretch(RegionKind.BRK, start, end, NO_TOP) for start, end in heap_behind_program(core, layout)]
    if not main.state.system_mem:
        return []
    top = main.state.top
    if main.brk_range is not None:
        start = layout.aligned_header(main.brk_range.start)
        return [stretch(RegionKind.BRK, start, main.brk_range.end, top)]
    first: list[Stretch] = []
    if sbrk_base and not main.state.is_contiguous:
        start = layout.aligned_header(sbrk_base)
        end = mapping_end(core.memory, start)
        for run_start, run_end in joined(core.memory.saved_runs_within(start, end))[:1]:
            chain = chain_reaches(
                core.memory.view(run_start, run_end),
                layout.geometry,
                0,
                top - start if start <= top < run_end else -1,
                1 << 62,
                region_bytes=end - start,
            )
            if run_start == start and chain.stop_reason in (
                StopReason.FENCEPOSTS_MAIN,
                StopReason.TOP,
            ):
                end = start + chain.end_offset
            first = [stretch(RegionKind.BRK, start, end, top)]
    pieces = [*first, *_mmap_pieces(core, layout, main, arenas, [*others, *first])]
    begins_page = top == layout.aligned_header(top - top % core.page_bytes)
    if main.top_bytes and begins_page and not any(piece.is_top_heap for piece in pieces):
        # A piece that is nothing but top: no chunk was cut from it yet.
        end = top + main.top_bytes
        if end <= mapping_end(core.memory, top):
            pieces.append(stretch(RegionKind.MMAP_PIECE, top, end, top))
    return pieces


def _mmap_pieces(
    core: Core,
    layout: Layout,
    main: ArenaFacts,
    arenas: tuple[ArenaFacts, ...],
    stretches: list[Stretch],
) -> list[Stretch]:
    """Pieces that the main arena got from mmap when brk failed (sysmalloc, MMAP_AS_MORECORE_SIZE, all releases).

    Nothing links them; they are found as runs of chunks that begin at a page and end at fenceposts or at top.
    """
    assert main.state is not None
    excluded = [(stretch.start, stretch.end) for stretch in stretches]
    excluded += [(heap.address, heap.address + arena.heap_max) for arena in arenas for heap in arena.sub_heaps]
    pieces = []
    for start, end in anonymous_ranges(core, excluded):
        for run_start, run_end in joined(core.memory.saved_runs_within(start, end)):
            top_offset = main.state.top - run_start if run_start <= main.state.top < run_end else -1
            runs = find_chunk_runs(
                core.memory.view(run_start, run_end),
                run_start,
                layout.geometry,
                core.page_bytes,
                top_offset,
                1,
            )
            for begin, stop in zip(runs.start_offset.tolist(), runs.end_offset.tolist(), strict=True):
                pieces.append(
                    Stretch(
                        RegionKind.MMAP_PIECE,
                        main.index,
                        NO_INDEX,
                        run_start + begin,
                        run_start + stop,
                        main.state.top,
                        run_start + begin <= main.state.top < run_start + stop,
                    )
                )
    return pieces


class HeapWalker:
    """Walks stretches in the order of their addresses. One use: ``walk`` all, then ``finish``."""

    def __init__(self, core: Core, layout: Layout, stretches: list[Stretch]) -> None:
        self.memory: AddressSpace = core.memory
        self.layout = layout
        self.geometry = layout.geometry
        self.stretches = stretches
        # Memory that was not saved takes room in the index as well, when top or the last chunk reaches into it.
        saved = sum(self.memory.saved_bytes_within(stretch.start, stretch.end) for stretch in stretches)
        self._room_for_missing = max(MISSING_ROOM_FLOOR, MISSING_ROOM_PER_SAVED * saved)
        most_bytes = saved + self._room_for_missing
        self.builder = ChunkIndexBuilder(
            self.geometry, most_bytes, len(stretches) + min(SEGMENT_LIMIT, 1 + most_bytes // 65536)
        )
        self.regions: list[WalkedRegion] = []
        self.unattributed: dict[int, list[UnattributedRange]] = {}
        self.anomalies: list[Anomaly] = []
        self.anomaly_count = 0
        self._reached = 0
        self._anomaly_rows = np.zeros((ANOMALIES_KEPT, 2), np.int64)

    def walk(self, stretch: Stretch) -> None:
        """Walk one stretch; what cannot be walked is recorded as unattributed or as a damaged chunk."""
        if stretch.start < self._reached:
            self._leave_out(stretch, stretch.start, stretch.end, "overlaps_another_heap")
            return
        self._reached = stretch.end
        position, trusted = stretch.start, True
        for start, end in joined(self.memory.saved_runs_within(stretch.start, stretch.end)):
            if start > position:
                self._leave_out(stretch, position, start, self.memory.cause_missing(position))
                trusted = False
            position = max(position, start)
            if position < end:
                position = self._walk_saved(stretch, position, end, trusted)
                trusted = False
        if position < stretch.end:
            cause = self.memory.cause_missing(stretch.end - 1)
            saved = self.memory.is_saved(position, stretch.end)
            self._leave_out(stretch, position, stretch.end, "unproven" if saved else cause)

    def _leave_out(self, stretch: Stretch, start: int, end: int, cause: str) -> None:
        if end > start:
            self.unattributed.setdefault(stretch.arena, []).append(UnattributedRange(AddressRange(start, end), cause))

    def _walk_saved(self, stretch: Stretch, start: int, end: int, trusted: bool) -> int:
        """Walk saved memory [start, end) of a stretch; returns up to where every byte is accounted for."""
        view = self.memory.view(start, end)
        base = self.layout.aligned_header(start)
        view = view[base - start :]
        position = base
        if not trusted:
            found = self._next_chunk(stretch, view, base, -self.geometry.alignment)
            if found < 0:
                return start
            self._leave_out(stretch, start, found, "unproven")
            position = found
        while position < end:
            stop, reason = self._walk_region(stretch, view[position - base :], position)
            if reason is not StopReason.FENCEPOSTS_MAIN or stop >= end:
                return stop
            # Behind the fenceposts of the main arena comes what another caller of sbrk took, then the arena again.
            found = self._next_segment(stretch, view[stop - base :], stop)
            if found < 0:
                found = self._next_chunk(stretch, view, base, stop - base - self.geometry.alignment)
            if found < 0 or len(self.regions) >= SEGMENT_LIMIT:
                return stop
            self._leave_out(stretch, stop, found, "foreign_sbrk")
            position = found
        return position

    def _next_segment(self, stretch: Stretch, view: npt.NDArray[np.uint8], start: int) -> int:
        """Address where the arena goes on: the first chunks from which it reaches its next fenceposts or top.

        A foreign area filled with one word can look like small chunks that lead into the arena; what repeats its size
        word in every granule is left out. -1 where no such chunks are.
        """
        top_offset = stretch.top - start if stretch.is_top_heap else -1
        alignment, word = self.geometry.alignment, self.geometry.word_bytes
        runs = find_chunk_runs(view, start, self.geometry, alignment, top_offset, 1, capacity=1)
        if not len(runs):
            return -1
        offset = int(runs.start_offset[0])
        length = (int(runs.end_offset[0]) - offset) // alignment * alignment
        rows = view[offset : offset + length].reshape(-1, alignment)[:, word : 2 * word]
        same = (rows == rows[0]).all(axis=1)
        repeated = int(np.argmin(same)) * alignment if not same.all() else 0
        size = int.from_bytes(rows[0].tobytes(), "little") & ~7
        if repeated >= 2 * size:
            offset += -(-repeated // size) * size
        return start + offset

    def _next_chunk(self, stretch: Stretch, view: npt.NDArray[np.uint8], base: int, behind: int) -> int:
        """Address of the next proven chunk behind an offset of the view, -1 where none is."""
        skip = max(behind, 0)
        stop = stretch.top - base - skip if stretch.is_top_heap else -1
        found = resynchronise(view[skip:], self.geometry, 0, stop, region_bytes=stretch.end - base - skip)
        return base + skip + found if found >= 0 else -1

    def _walk_region(self, stretch: Stretch, view: npt.NDArray[np.uint8], start: int) -> tuple[int, StopReason]:
        """Walk one region of the index from a proven chunk on; returns where it ends and why."""
        missing = min(stretch.end - start - len(view), self._room_for_missing)
        self._room_for_missing -= missing
        region_bytes = len(view) + missing
        top_offset = stretch.top - start if stretch.is_top_heap else -1
        self.builder.open_region(start, region_bytes)
        offset, proven = 0, True
        while True:
            outcome = walk_region(
                view,
                self.geometry,
                top_offset,
                self.builder.start_bits(),
                self.builder.free_states(),
                stretch.kind is RegionKind.ARENA_HEAP,
                self._anomaly_rows,
                first_offset=offset,
                region_bytes=region_bytes,
            )
            self.builder.take_over(outcome)
            self._note_anomalies(stretch, start, outcome.anomaly_count)
            offset, reason = outcome.end_offset, outcome.stop_reason
            if reason is StopReason.BROKEN and self._is_top_by_size(stretch, start + offset, region_bytes - offset):
                self.builder.mark(offset, region_bytes, ChunkState.TOP)
                offset, reason = region_bytes, StopReason.TOP
            at_end = stretch.kind is RegionKind.ARENA_HEAP and start + offset == stretch.end
            if reason is StopReason.FENCEPOSTS_HEAP and not at_end:
                # The end marker of a retired sub-heap can only be at its end: here it is a damaged size.
                reason = StopReason.BROKEN
            if reason is not StopReason.BROKEN:
                break
            found = resynchronise(view, self.geometry, offset, top_offset, region_bytes=region_bytes)
            damaged_end = found if found >= 0 else len(view) - len(view) % self.geometry.alignment
            self._note(
                Anomaly(
                    "broken_chunk",
                    start + offset,
                    "the size of a chunk",
                    self._size_word(start + offset),
                    stretch.arena,
                )
            )
            if damaged_end <= offset:
                proven = False
                break
            self.builder.mark(offset, damaged_end, ChunkState.DAMAGED)
            offset = damaged_end
            if found < 0:
                proven = False
                break
        end = start + offset
        proven = proven and reason is not StopReason.CUT
        expected_top = stretch.is_top_heap and top_offset >= 0
        if reason is StopReason.END and expected_top:
            self._note(Anomaly("top_not_reached", stretch.top, "top as the last chunk", "other chunks", stretch.arena))
        if self.builder.close_region():
            self.regions.append(WalkedRegion(stretch, start, end, proven, reason))
        return end, reason

    def _is_top_by_size(self, stretch: Stretch, header: int, rest: int) -> bool:
        """Whether a header that no ordinary chunk can have is that of an unknown top: it reaches to the very end.

        With 4-byte words and 16-byte alignment top's size is 8 more than a multiple of the alignment.
        """
        place = header + self.geometry.word_bytes
        if stretch.is_top_heap or not self.memory.is_saved(place, place + self.geometry.word_bytes):
            return False
        return rest > 0 and self.memory.read_word(place) & ~7 == rest

    def _size_word(self, address: int) -> str:
        place = address + self.geometry.word_bytes
        if not self.memory.is_saved(place, place + self.geometry.word_bytes):
            return "not saved"
        return f"size word {self.memory.read_word(place):#x}"

    def _note(self, anomaly: Anomaly) -> None:
        self.anomaly_count += 1
        if len(self.anomalies) < ANOMALIES_KEPT:
            self.anomalies.append(anomaly)

    def _note_anomalies(self, stretch: Stretch, start: int, count: int) -> None:
        for code, offset in self._anomaly_rows[: min(count, ANOMALIES_KEPT)].tolist():
            anomaly = WalkAnomaly(code)
            expected, observed = ANOMALY_TEXTS[anomaly]
            self._note(Anomaly(anomaly.name.lower(), start + offset, expected, observed, stretch.arena))
        self.anomaly_count += max(0, count - ANOMALIES_KEPT)

    def finish(self, mmapped: MmappedChunks) -> HeapWalk:
        """The index over everything walked, and ``mmapped`` beside it."""
        return HeapWalk(
            self.builder.finish(mmapped),
            self.regions,
            self.unattributed,
            self.anomalies,
            self.anomaly_count,
        )
