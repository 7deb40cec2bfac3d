"""From arenas to chunks: walks every stretch of heap memory and collects the chunk index.

Knows: how a walk goes on behind fenceposts, damage and unsaved memory. Does not know: where an arena's chunks lie
(``stretches``), or free lists (``overlay``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.locate import joined
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.stretches import Stretch
from coreheap.corefile import AddressSpace, Core
from coreheap.evidence import Anomaly
from coreheap.heap import RegionKind, UnattributedRange
from coreheap.kernels import (
    ChunkIndex,
    ChunkIndexBuilder,
    ChunkState,
    MmappedChunks,
    StopReason,
    WalkAnomaly,
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

    def leave_out(self, arena: int, start: int, end: int, cause: str) -> None:
        """Record memory of an arena that no chunk can be assigned to."""
        if end > start:
            self.unattributed.setdefault(arena, []).append(UnattributedRange(AddressRange(start, end), cause))

    def _leave_out(self, stretch: Stretch, start: int, end: int, cause: str) -> None:
        self.leave_out(stretch.arena, start, end, cause)

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
