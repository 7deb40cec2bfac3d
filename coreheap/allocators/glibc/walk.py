"""From arenas to chunks: walks every stretch of heap memory and collects the chunk index.

Knows: how a walk goes on behind fenceposts, damage and unsaved memory. Does not know: where an arena's chunks lie
(``stretches``), or free lists (``overlay``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.holes import Hole, Holes, Stretch
from coreheap.allocators.glibc.leads import ListedChunks, PayloadPointers, no_listed_chunks
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.recovery import (
    RECOVERIES,
    SUSPECTS,
    Boundary,
    Listed,
    Recovery,
)
from coreheap.allocators.glibc.structures import FLAGS, NON_MAIN_ARENA, PREV_INUSE
from coreheap.corefile import AddressSpace, Core
from coreheap.errors import MemoryFault
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

HOLES_KEPT = 1000
"""Holes of known chunks that are named."""

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
    holes: list[Hole]
    """In known chunks; other memory that is missing is ``unattributed``."""


class HeapWalker:
    """Walks stretches in the order of their addresses. One use: ``walk`` all, then ``finish``."""

    def __init__(
        self,
        core: Core,
        layout: Layout,
        stretches: list[Stretch],
        listed: Listed = no_listed_chunks,
        hidden: tuple[int, ...] = (),
    ) -> None:
        """``listed`` is asked only where something is damaged: what free lists lead to. ``hidden``: header
        addresses on lists that an earlier walk found inside of other chunks.
        """
        self.hidden = hidden
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
        self.holes: list[Hole] = []
        self._listed = listed
        self._listed_chunks: ListedChunks | None = None
        self._pointers = PayloadPointers(core, self.geometry, saved)
        self._recoveries = RECOVERIES
        self._states: list[tuple[int, ChunkState]] = []
        self._reached = 0
        self._anomaly_rows = np.zeros((ANOMALIES_KEPT, 2), np.int64)

    def walk(self, stretch: Stretch) -> None:
        """Walk one stretch; what cannot be walked is recorded as unattributed or as a damaged chunk."""
        if stretch.start < self._reached:
            self._leave_out(stretch, stretch.start, stretch.end, "overlaps_another_heap")
            return
        self._reached = stretch.end
        holes = self._holes = Holes(self.memory, self.geometry, stretch)
        position, trusted = stretch.start, True
        before = stretch.start
        for start, end in holes.parts:
            self._note_hole(holes, before, min(start, position))
            before = end
            if start > position:
                self._leave_out(stretch, position, start, holes.cause_at(position))
                trusted = False
            position = max(position, start)
            if position < end:
                position = self._walk_saved(stretch, position, end, trusted)
                # A chunk that leads over the hole ends where the next one is.
                trusted = position > end
        self._note_hole(holes, before, position)
        if position < stretch.end:
            saved = bool(holes.parts) and holes.parts[-1][1] == stretch.end
            self._leave_out(stretch, position, stretch.end, "unproven" if saved else holes.cause_at(stretch.end - 1))

    def leave_out(self, arena: int, start: int, end: int, cause: str) -> None:
        """Record memory of an arena that no chunk can be assigned to."""
        if end > start:
            self.unattributed.setdefault(arena, []).append(UnattributedRange(AddressRange(start, end), cause))

    def _note_hole(self, holes: Holes, start: int, end: int) -> None:
        """Record that a chunk has [start, end), which is no saved memory of malloc's; what top has of it says nothing."""
        if start < end and not holes.stretch.start <= holes.stretch.top <= start and len(self.holes) < HOLES_KEPT:
            self.holes.append(Hole(AddressRange(start, end), holes.cause_at(start), holes.stretch.arena))

    def _leave_out(self, stretch: Stretch, start: int, end: int, cause: str) -> None:
        self.leave_out(stretch.arena, start, end, cause)

    def _walk_saved(self, stretch: Stretch, start: int, end: int, trusted: bool) -> int:
        """Walk saved memory [start, end) of a stretch; returns up to where every byte is accounted for."""
        view = self.memory.view(start, end)
        base = self.layout.aligned_header(start)
        view = view[base - start :]
        position = base
        if not trusted:
            found = self._holes.first_chunk(view, base)
            if found < 0:
                return start
            self._leave_out(stretch, start, found, "unproven")
            position = found
        behind_hole = start != stretch.start
        while position < end:
            stop, reason = self._walk_region(stretch, view[position - base :], position, behind_hole)
            behind_hole = False
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

    def _walk_region(
        self, stretch: Stretch, view: npt.NDArray[np.uint8], start: int, behind_hole: bool
    ) -> tuple[int, StopReason]:
        """Walk one region of the index from a proven chunk on; returns where it ends and why.

        Only the very first chunk of a heap has none before it; before one that is ``behind_hole`` a free one may lie.
        """
        missing = min(stretch.end - start - len(view), self._room_for_missing)
        self._room_for_missing -= missing
        region_bytes = len(view) + missing
        top_offset = stretch.top - start if stretch.is_top_heap else -1
        self.builder.open_region(start, region_bytes)
        recovery = Recovery(
            view,
            start,
            self.geometry,
            top_offset,
            region_bytes,
            self._pointers,
            lambda: self._all_listed,
            stretch.kind is RegionKind.ARENA_HEAP,
        )
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
            rows = self._anomaly_rows[: min(outcome.anomaly_count, ANOMALIES_KEPT)].copy()
            anomaly_count = outcome.anomaly_count
            if behind_hole and len(rows) and rows[0].tolist() == [WalkAnomaly.FIRST_CHUNK_PREVIOUS_FREE, 0]:
                rows, anomaly_count = rows[1:], anomaly_count - 1
            walked_from = offset
            offset, reason = outcome.end_offset, outcome.stop_reason
            if reason is StopReason.BROKEN and self._is_top_by_size(stretch, start + offset, region_bytes - offset):
                self.builder.mark(offset, region_bytes, ChunkState.TOP)
                offset, reason = region_bytes, StopReason.TOP
            at_end = stretch.kind is RegionKind.ARENA_HEAP and start + offset == stretch.end
            if reason is StopReason.FENCEPOSTS_HEAP and not at_end:
                # The end marker of a retired sub-heap can only be at its end: here it is a damaged size.
                reason = StopReason.BROKEN
            boundary = self._hidden_damage(recovery, rows, walked_from, offset)
            if boundary is None and reason is StopReason.CUT:
                offset = self._over_hole(start, offset, region_bytes)
            if boundary is None and reason is StopReason.BROKEN:
                boundary = self._behind_break(recovery, offset)
            elif boundary is None:
                self._note_anomalies(stretch, recovery, rows, anomaly_count)
                break
            if boundary is None:
                self._note_anomalies(stretch, recovery, rows, anomaly_count)
                self._note_broken(stretch, recovery, offset, None)
                damaged_end = len(view) - len(view) % self.geometry.alignment
                proven = False
                if damaged_end > offset:
                    self.builder.mark(offset, damaged_end, ChunkState.DAMAGED)
                    offset = damaged_end
                break
            # What was found behind the damaged header was read at wrong places.
            rows = rows[rows[:, 1] < boundary.damaged_offset]
            self._note_anomalies(stretch, recovery, rows, len(rows))
            offset = self._step_over(stretch, recovery, boundary)
        end = start + offset
        proven = proven and reason is not StopReason.CUT
        self._room_for_missing += missing - max(0, offset - len(view))
        expected_top = stretch.is_top_heap and top_offset >= 0
        if reason is StopReason.END and expected_top:
            self._note(Anomaly("top_not_reached", stretch.top, "top as the last chunk", "other chunks", stretch.arena))
        if self.builder.close_region():
            self.regions.append(WalkedRegion(stretch, start, end, proven, reason))
        return end, reason

    def _over_hole(self, start: int, offset: int, region_bytes: int) -> int:
        """Record the chunk at an offset whose size leads into memory that is missing or over it; returns where it ends.

        Top's header may be missing as well: its place is known, and that it reaches to the end.
        """
        header = start + offset
        stretch = self._holes.stretch
        end = self._holes.end_of_chunk(header) if self._holes.part_holding(header) is not None else None
        if end is not None and end - start <= region_bytes:
            self.builder.mark(offset, end - start, self._state_before(header, end))
            offset = end - start
        if start + offset == stretch.top and stretch.is_top_heap and self._holes.part_holding(stretch.top) is None:
            self.builder.mark(offset, region_bytes, ChunkState.TOP)
            offset = region_bytes
        return offset

    def _state_before(self, header: int, end: int) -> ChunkState:
        """Whether a chunk is free by the header where it ends; where that is missing, by its own links."""
        if self._holes.part_holding(end) is not None:
            is_free = not self.memory.read_word(end + self.geometry.word_bytes) & PREV_INUSE
        else:
            is_free = self._is_linked(header)
        return ChunkState.FREE_UNLISTED if is_free else ChunkState.IN_USE

    @property
    def has_asked_lists(self) -> bool:
        """Whether something was so damaged that what free lists lead to was weighed."""
        return self._listed_chunks is not None

    @property
    def _all_listed(self) -> ListedChunks:
        if self._listed_chunks is None:
            self._listed_chunks = self._listed()
        return self._listed_chunks

    def _behind_break(self, recovery: Recovery, broken: int) -> Boundary | None:
        """Where the walk goes on that broke at an offset; None where nothing behind it is proven."""
        if self._recoveries > 0:
            self._recoveries -= 1
            return recovery.behind_break(broken, self.builder.starts_before(broken, SUSPECTS))
        found = resynchronise(
            recovery.view, self.geometry, broken, recovery.top_offset, region_bytes=recovery.region_bytes
        )
        return Boundary(broken, found, None, False, ()) if found >= 0 else None

    def _hidden_damage(self, recovery: Recovery, rows: npt.NDArray[np.int64], first: int, end: int) -> Boundary | None:
        """The first damaged header between two offsets that the walk followed to a real boundary: it hides chunks.

        A prev_size that names another chunk before it tells so, where that chunk is there, and so does a chunk that is on
        a free list.
        """
        for offset in sorted(header - recovery.start for header in self.hidden):
            if not first < offset < end or offset % self.geometry.alignment or self._recoveries <= 0:
                continue
            before = self.builder.starts_before(offset + self.geometry.alignment, 1)
            if not before or before[0] in (offset, recovery.top_offset):
                continue
            self._recoveries -= 1
            behind = before[0] + (recovery.word(before[0] + self.geometry.word_bytes) & ~FLAGS)
            found = recovery.swallowed(before[0], behind, offset) if offset < behind <= recovery.region_bytes else None
            if found is not None:
                return found
        for code, offset in rows.tolist():
            if code != WalkAnomaly.PREV_SIZE_MISMATCH or self._recoveries <= 0 or not first <= offset < end:
                continue
            self._recoveries -= 1
            behind = offset + (recovery.word(offset + self.geometry.word_bytes) & ~FLAGS)
            inner = behind - recovery.word(behind)
            if not offset < inner < behind or inner % self.geometry.alignment:
                continue
            found = recovery.swallowed(offset, behind, inner)
            if found is not None:
                return found
        return None

    def _step_over(self, stretch: Stretch, recovery: Recovery, boundary: Boundary) -> int:
        """Make the damaged header one chunk up to the proven boundary; returns that boundary's offset."""
        damaged, behind = boundary.damaged_offset, boundary.next_offset
        self.builder.rewind(damaged)
        state = ChunkState.DAMAGED
        if boundary.size_is_repaired:
            in_use = recovery.word(behind + self.geometry.word_bytes) & PREV_INUSE
            state = ChunkState.IN_USE if in_use else ChunkState.FREE_UNLISTED
        self.builder.mark(damaged, behind, state)
        self._note_broken(stretch, recovery, damaged, boundary)
        return behind

    def _note_broken(self, stretch: Stretch, recovery: Recovery, offset: int, boundary: Boundary | None) -> None:
        """The anomaly of a damaged size word, with the one that would be right where that is known."""
        expected: int | None = None
        header, place = recovery.start + offset, recovery.start + offset + self.geometry.word_bytes
        saved = self.memory.is_saved(place, place + self.geometry.word_bytes)
        said = "the size of a chunk"
        if boundary is not None and boundary.expected_size is not None:
            is_free = not recovery.word(boundary.next_offset + self.geometry.word_bytes) & PREV_INUSE
            expected = boundary.expected_size
            expected |= NON_MAIN_ARENA if recovery.non_main and not is_free else 0
            expected |= PREV_INUSE if is_free or not self._free_before(recovery, offset) else 0
            said = f"the size of a chunk, {boundary.expected_size:#x}: {'; '.join(boundary.reasons)}"
        self._note(
            Anomaly(
                "broken_chunk",
                header,
                said,
                self._size_word(header),
                stretch.arena,
                word_address=place if saved else None,
                observed_word=self.memory.read_word(place) if saved else None,
                expected_word=expected,
                header_address=header,
            )
        )

    def _free_before(self, recovery: Recovery, offset: int) -> bool:
        """Whether the chunk before a damaged header is in a bin: its size behind it, and neighbours that lead back."""
        before = self.builder.starts_before(offset, 1)
        if not before or recovery.word(offset) != offset - before[0]:
            return False
        return self._is_linked(recovery.start + before[0])

    def _is_linked(self, header: int) -> bool:
        """Whether the words of a chunk where fd and bk would be lead to places that lead back to it."""
        word = self.geometry.word_bytes
        try:
            fd, bk = (self.memory.read_word(header + number * word) for number in (2, 3))
        except MemoryFault:
            return False
        back = []
        for place in (fd + 3 * word, bk + 2 * word):
            saved = self.memory.is_saved(place, place + word)
            back.append(saved and self.memory.read_word(place) == header)
        return any(back)

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

    def _note_anomalies(self, stretch: Stretch, recovery: Recovery, rows: npt.NDArray[np.int64], count: int) -> None:
        """Record what a walk stepped over; ``count`` may be more than there are rows."""
        for code, offset in rows.tolist():
            anomaly = WalkAnomaly(code)
            expected, observed = ANOMALY_TEXTS[anomaly]
            header = recovery.start + offset
            if anomaly is WalkAnomaly.PREV_SIZE_MISMATCH and not self._is_linked(header):
                # In no bin, and nothing behind it says that it is free but one bit: that bit is wrong.
                self._states.append((header, ChunkState.IN_USE))
            self._note(
                Anomaly(
                    anomaly.name.lower(),
                    header,
                    expected,
                    observed,
                    stretch.arena,
                    header_address=header,
                )
            )
        self.anomaly_count += max(0, count - len(rows))

    def finish(self, mmapped: MmappedChunks) -> HeapWalk:
        """The index over everything walked, and ``mmapped`` beside it."""
        index = self.builder.finish(mmapped)
        for header, state in self._states:
            chunk = index.chunk_starting_at(header)
            if chunk >= 0 and index.state[chunk] == ChunkState.FREE_UNLISTED:
                index.state[chunk] = state
        return HeapWalk(
            index,
            self.regions,
            self.unattributed,
            self.anomalies,
            self.anomaly_count,
            self.holes,
        )
