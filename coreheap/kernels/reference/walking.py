"""From the bytes of a region to its chunks.

Knows: which headers follow each other, and what a header says about the chunk before. Does not know: lists, arenas.
"""

from __future__ import annotations

import numpy as np

from coreheap.kernels.codes import ChunkState, StopReason, WalkAnomaly
from coreheap.kernels.index import GRANULES_PER_WORD
from coreheap.kernels.reference._region import (
    END_MARKER,
    FLAGS,
    IS_MMAPPED,
    NON_MAIN_ARENA,
    PREV_INUSE,
    Region,
    follow,
)
from coreheap.kernels.values import (
    ChainOutcome,
    ChunkGeometry,
    Int64Array,
    Memory,
    UInt8Array,
    UInt64Array,
    WalkOutcome,
)


def walk_region(
    memory: Memory,
    geometry: ChunkGeometry,
    stop_offset: int,
    start_bits: UInt64Array,
    states: UInt8Array,
    non_main: bool,
    anomalies: Int64Array,
    first_offset: int = 0,
    region_bytes: int = -1,
) -> WalkOutcome:
    """Steps from chunk to chunk through a region, and writes a start bit and a state for each.

    ``memory``: the saved bytes from the region's start; ``region_bytes`` the length of the region where that is more
    (-1: it is not). ``stop_offset``: offset of the top chunk's header, -1 without; an offset outside the region or off
    the granules counts as none. ``start_bits``: uint64[rows, 2], the region's rows of the lookup, whose column 0 is
    written. ``states``: uint8, element 0 is the state of the first chunk of this call. ``anomalies``: int64[k, 2],
    rows of (``WalkAnomaly``, header offset). ``first_offset``: where to begin, a multiple of the alignment.

    States written: IN_USE, FREE_UNLISTED, TOP, FENCEPOST. A chunk is counted when its size is possible and the next
    header, which says whether it is free, is saved or would lie exactly at the region's end.

    With 16-byte alignment and 4-byte words both fenceposts lie in one granule and are one chunk.

    Raises ValueError where the arguments contradict each other, never because of the memory's content.
    """
    region = Region(memory, geometry, stop_offset, region_bytes, first_offset)
    word = region.word
    if start_bits.shape[0] * GRANULES_PER_WORD * geometry.alignment < region.bytes:
        raise ValueError("the lookup has too few rows for the region")
    chunk_count = 0
    anomaly_count = 0

    def report(anomaly: WalkAnomaly, at_offset: int) -> None:
        nonlocal anomaly_count
        if anomaly_count < len(anomalies):
            anomalies[anomaly_count] = anomaly, at_offset
        anomaly_count += 1

    def set_chunk(at_offset: int, state: ChunkState) -> None:
        nonlocal chunk_count
        row, bit = divmod(at_offset // geometry.alignment, GRANULES_PER_WORD)
        start_bits[row, 0] |= np.uint64(1 << bit)
        states[chunk_count] = state
        chunk_count += 1

    def outcome(end_offset: int, reason: StopReason) -> WalkOutcome:
        return WalkOutcome(chunk_count, end_offset, reason, anomaly_count)

    def set_fenceposts(at_offset: int, reason: StopReason) -> WalkOutcome:
        second = at_offset + 2 * word
        needed = 1 if second % geometry.alignment else 2
        if chunk_count + needed > len(states):
            return outcome(at_offset, StopReason.NO_ROOM)
        set_chunk(at_offset, ChunkState.FENCEPOST)
        if needed == 2:
            set_chunk(second, ChunkState.FENCEPOST)
        return outcome(region.end_of_fenceposts(second + 2 * word), reason)

    offset = first_offset
    previous_word = 0
    """The size word of the chunk before ``offset``, 0 where this call has not seen it."""
    if offset >= region.bytes:
        return outcome(offset, StopReason.END if offset == region.bytes else StopReason.CUT)
    if not region.header_is_saved(offset):
        return outcome(offset, StopReason.CUT)
    if offset == 0 and not region.size_word(0) & PREV_INUSE:
        report(WalkAnomaly.FIRST_CHUNK_PREVIOUS_FREE, 0)

    while offset != region.bytes:
        # Here the header at ``offset`` is saved, and the chunk before, if any, is counted and has its state.
        size_word = region.size_word(offset)
        size = size_word & ~FLAGS

        if offset == region.stop_offset:
            if chunk_count >= len(states):
                return outcome(offset, StopReason.NO_ROOM)
            if previous_word and not size_word & PREV_INUSE:
                report(WalkAnomaly.FREE_BEFORE_TOP, offset - (previous_word & ~FLAGS))
            if offset + size != region.bytes:
                report(WalkAnomaly.TOP_SIZE_MISMATCH, offset)
            set_chunk(offset, ChunkState.TOP)
            return outcome(region.top_end(), StopReason.TOP)

        if not region.size_is_possible(offset, size):
            fenceposts = region.fenceposts_at(offset)
            if fenceposts is not None:
                return set_fenceposts(offset, fenceposts)
            if size_word == END_MARKER:
                marker_end = region.end_of_fenceposts(offset + 2 * word)
                follows_fencepost = region.is_short_fencepost(previous_word)
                if follows_fencepost or marker_end == region.bytes:
                    if chunk_count >= len(states):
                        return outcome(offset, StopReason.NO_ROOM)
                    if follows_fencepost:
                        states[chunk_count - 1] = ChunkState.FENCEPOST
                    else:
                        report(WalkAnomaly.MARKER_WITHOUT_FENCEPOST, offset)
                    set_chunk(offset, ChunkState.FENCEPOST)
                    return outcome(marker_end, StopReason.FENCEPOSTS_HEAP)
            return outcome(offset, StopReason.BROKEN)

        if chunk_count >= len(states):
            return outcome(offset, StopReason.NO_ROOM)
        next_offset = offset + size
        state = ChunkState.IN_USE
        next_word = 0
        if next_offset != region.bytes:
            if not region.header_is_saved(next_offset):
                return outcome(offset, StopReason.CUT)
            next_word = region.size_word(next_offset)
            if not next_word & PREV_INUSE:
                state = ChunkState.FREE_UNLISTED
                if region.read(next_offset) != size:
                    report(WalkAnomaly.PREV_SIZE_MISMATCH, offset)
                if previous_word and not size_word & PREV_INUSE:
                    report(WalkAnomaly.ADJACENT_FREE, offset)
        if size_word & IS_MMAPPED:
            report(WalkAnomaly.MMAPPED_FLAG_INSIDE, offset)
        is_fencepost = next_word == END_MARKER and region.is_short_fencepost(size_word)
        if state == ChunkState.IN_USE and bool(size_word & NON_MAIN_ARENA) != non_main and not is_fencepost:
            report(WalkAnomaly.ARENA_FLAG_MISMATCH, offset)
        set_chunk(offset, state)
        previous_word = size_word
        offset = next_offset
    return outcome(offset, StopReason.END)


def chain_reaches(
    memory: Memory,
    geometry: ChunkGeometry,
    offset: int,
    stop_offset: int,
    limit: int,
    region_bytes: int = -1,
) -> ChainOutcome:
    """How far consistent chunks lead from ``offset``, at most ``limit`` of them.

    Consistent: possible sizes, no IS_MMAPPED, and a clear PREV_INUSE comes with a prev_size that is the size of the
    chunk before. Other arguments as for ``walk_region``. The end offset is that of the chunk that broke the chain, or
    where top or the fenceposts end.
    """
    region = Region(memory, geometry, stop_offset, region_bytes, offset)
    if offset > region.bytes:
        return ChainOutcome(offset, StopReason.CUT, 0)
    chunk_count = 0
    while True:
        reason, end_offset = follow(region, offset)
        if reason is not None:
            return ChainOutcome(end_offset, reason, chunk_count)
        if chunk_count >= limit:
            return ChainOutcome(offset, StopReason.LIMIT, chunk_count)
        chunk_count += 1
        offset = end_offset


def resynchronise(
    memory: Memory,
    geometry: ChunkGeometry,
    first_offset: int,
    stop_offset: int,
    region_bytes: int = -1,
    proof_chunks: int = 64,
) -> int:
    """The first offset behind ``first_offset`` from which a chain of chunks is proven, -1 without one.

    Proven is a chain (see ``chain_reaches``) of ``proof_chunks`` chunks (1 to 250), or one that ends at top, at the
    region's end, or at fenceposts; fenceposts before the region's end need a chunk before them.

    At most three headers are examined per granule: what a failed chain proved of its chunks is remembered.
    """
    region = Region(memory, geometry, stop_offset, region_bytes, first_offset)
    if not 1 <= proof_chunks <= 250:
        raise ValueError(f"a chain of {proof_chunks} chunks cannot be asked for")
    chunks_from: dict[int, int] = {}
    """Offset -> how many chunks a chain from there has before it fails; 0 is not worth a note."""
    for candidate in range(first_offset + geometry.alignment, region.bytes, geometry.alignment):
        if not region.header_is_saved(candidate):
            break
        path: list[int] = []
        offset = candidate
        while True:
            known = chunks_from.get(offset, 0)
            if known:
                break
            reason, end_offset = follow(region, offset)
            if reason in (StopReason.TOP, StopReason.END):
                return candidate
            at_fenceposts = reason in (StopReason.FENCEPOSTS_HEAP, StopReason.FENCEPOSTS_MAIN)
            if at_fenceposts and (path or end_offset == region.bytes):
                return candidate
            if reason is not None:
                break
            path.append(offset)
            if len(path) >= proof_chunks:
                return candidate
            offset = end_offset
        if len(path) + known >= proof_chunks:
            return candidate
        for steps, passed in enumerate(reversed(path), start=1):
            chunks_from[passed] = known + steps
    return -1
