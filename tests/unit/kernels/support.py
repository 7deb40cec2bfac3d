"""From built heaps to what kernels take, and the truth in the kernels' shapes."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from coreheap.kernels import ChunkGeometry, ChunkIndex, MemoryMap, MmappedChunks, StopReason, WalkOutcome, words_for
from tests.heap_builder import BuiltHeap, BuiltSegment, HeapBuilder, Machine, Mix

STATE_OFFSETS_64 = {"mutex": 0, "flags": 4, "fastbinsY": 16, "top": 96, "bins": 112, "binmap": 2144, "next": 2160}
STATE_OFFSETS_32 = {"mutex": 0, "flags": 4, "fastbinsY": 12, "top": 56, "bins": 64, "binmap": 1080, "next": 1096}

ENDING_REASONS = {
    "top": StopReason.TOP,
    "open": StopReason.END,
    "heap_fence": StopReason.FENCEPOSTS_HEAP,
    "short_heap_fence": StopReason.FENCEPOSTS_HEAP,
    "main_fence": StopReason.FENCEPOSTS_MAIN,
}


def geometry_of(machine: Machine) -> ChunkGeometry:
    return ChunkGeometry(machine.word_bytes, machine.alignment, machine.minimum, machine.phase)


def state_offsets(machine: Machine) -> dict[str, int]:
    return STATE_OFFSETS_64 if machine.word_bytes == 8 else STATE_OFFSETS_32


def random_heap(
    machine: Machine,
    seed: int,
    *,
    segment_bytes: int = 1 << 15,
    segments: int = 4,
    mmapped: int = 3,
    safe_linking: bool = True,
) -> BuiltHeap:
    """A heap of one arena with several segments, all kinds of lists, and mmapped chunks of which one is in a tcache."""
    rng = random.Random(seed)
    builder = HeapBuilder(machine, rng, safe_linking=safe_linking)
    base = 0x5555_0000_0000 if machine.word_bytes == 8 else 0x0804_0000
    far = 0x7F00_0000_0000 if machine.word_bytes == 8 else 0xB000_0000
    endings = ["top", "main_fence", "heap_fence", "short_heap_fence"]
    for number in range(segments):
        address = base + number * 4 * segment_bytes if number % 2 == 0 else far + number * 4 * segment_bytes
        ending = endings[number % len(endings)]
        builder.add_segment(address, segment_bytes, ending=ending, non_main=ending in endings[2:], mix=Mix())
    for number in range(mmapped):
        mapping = far + 0x0100_0000 + number * 0x40000
        builder.add_mmapped(mapping, 0x20000, lead=0x1000 - machine.header_bytes if number == 1 else 0)
    state_address = base - 0x10000
    builder.memory.add(state_address, 0x3000)
    builder.link_arena(state_address, state_offsets(machine), builder.heap.segments)
    cached = [chunk for segment in builder.heap.segments for chunk in segment.of_state("tcache")]
    half = len(cached) // 2
    builder.link_thread_cache(cached[:half] + builder.heap.mmapped[:1], key=0x1234)
    builder.link_thread_cache(cached[half:])
    return builder.heap


def memory_map_of(heap: BuiltHeap) -> MemoryMap:
    """The heap's memory as one file, its runs at odd offsets so that no word of it is aligned."""
    file = bytearray(b"\xff" * 3)
    rows = []
    for address, block in heap.memory.runs():
        rows.append((address, address + len(block), len(file)))
        file += block + b"\xee" * 5
    columns = np.array(rows, np.uint64).reshape(len(rows), 3)
    content = np.frombuffer(bytes(file), np.uint8)
    assert not content.flags.writeable
    return MemoryMap(content, *(np.ascontiguousarray(columns[:, column]) for column in range(3)))


class Walked:
    """One ``walk_region`` call with fresh buffers, as plain values that can be compared."""

    def __init__(
        self,
        kernels: ModuleType,
        memory: Any,
        geometry: ChunkGeometry,
        stop_offset: int = -1,
        *,
        non_main: bool = False,
        first_offset: int = 0,
        region_bytes: int = -1,
        room: int | None = None,
        anomaly_rows: int = 100,
    ) -> None:
        size = max(len(memory), region_bytes)
        self.geometry = geometry
        self.lookup = np.zeros((words_for(size, geometry.alignment), 2), np.uint64)
        self.states = np.full(size // geometry.alignment + 2 if room is None else room, 255, np.uint8)
        self.anomaly_buffer = np.zeros((anomaly_rows, 2), np.int64)
        self.outcome: WalkOutcome = kernels.walk_region(
            memory,
            geometry,
            stop_offset,
            self.lookup,
            self.states,
            non_main,
            self.anomaly_buffer,
            first_offset,
            region_bytes,
        )

    @property
    def offsets(self) -> list[int]:
        return start_offsets(self.lookup, self.geometry.alignment)

    @property
    def state_list(self) -> list[int]:
        assert np.all(self.states[self.outcome.chunk_count :] == 255)
        states: list[int] = self.states[: self.outcome.chunk_count].tolist()
        return states

    @property
    def anomalies(self) -> list[tuple[int, int]]:
        rows = min(self.outcome.anomaly_count, len(self.anomaly_buffer))
        assert not self.anomaly_buffer[rows:].any()
        return [(int(code), int(offset)) for code, offset in self.anomaly_buffer[:rows]]

    def everything(self) -> tuple[object, ...]:
        return self.outcome, self.offsets, self.state_list, self.anomalies, self.lookup.tobytes()


def start_offsets(lookup: npt.NDArray[np.uint64], alignment: int) -> list[int]:
    """Offsets of all start bits."""
    bits = np.unpackbits(np.ascontiguousarray(lookup[:, 0]).view(np.uint8), bitorder="little")
    return (np.flatnonzero(bits) * alignment).tolist()


def walked_state(state: str) -> int:
    """What a walk alone can say of a chunk in that state."""
    return {"in_use": 0, "tcache": 0, "fastbin": 0, "top": 6, "fencepost": 7}.get(state, 9)


def walk_segment(kernels: ModuleType, heap: BuiltHeap, segment: BuiltSegment) -> Walked:
    stop = -1 if segment.top_address is None else segment.top_address - segment.start
    return Walked(kernels, heap.segment_bytes(segment), geometry_of(heap.machine), stop, non_main=segment.non_main)


def mmapped_table(heap: BuiltHeap) -> MmappedChunks:
    rows = sorted(zip(heap.mmapped, heap.mmapped_mappings, strict=True), key=lambda row: row[0].header_address)
    columns = [
        [chunk.header_address for chunk, _ in rows],
        [mapping[0] for _, mapping in rows],
        [mapping[1] for _, mapping in rows],
        [chunk.chunk_bytes for chunk, _ in rows],
    ]
    return MmappedChunks(*(np.array(column, np.uint64) for column in columns))


def index_of(kernels: ModuleType, heap: BuiltHeap) -> ChunkIndex:
    """The index of a built heap: all segments walked, ranks filled in, mmapped chunks added, no lists."""
    segments = sorted(heap.segments, key=lambda segment: segment.start)
    walks = [walk_segment(kernels, heap, segment) for segment in segments]
    lookup = np.concatenate([walk.lookup for walk in walks]) if walks else np.zeros((0, 2), np.uint64)
    kernels.fill_ranks(lookup)
    first_words = np.cumsum([0] + [len(walk.lookup) for walk in walks])[:-1]
    states = [walk.states[: walk.outcome.chunk_count] for walk in walks]
    return ChunkIndex(
        geometry_of(heap.machine),
        np.array([segment.start for segment in segments], np.uint64),
        np.array([segment.end for segment in segments], np.uint64),
        first_words.astype(np.int64),
        lookup,
        np.concatenate([*states, np.zeros(len(heap.mmapped), np.uint8)]),
        mmapped_table(heap),
    )
