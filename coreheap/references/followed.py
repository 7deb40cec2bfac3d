"""References of some chunks alone, numbered anew, and what lies in them: for searches among the few that are in question.

Knows: columns of references and addresses. Does not know: why chunks are in question.
"""

from __future__ import annotations

from copy import copy

import numpy as np
import numpy.typing as npt

from coreheap.heap import ChunkState
from coreheap.kernels import CHUNK_MASK, INTERIOR, ChunkIndex, Edges, MemoryMap, chunk_extents, mark_reachable
from coreheap.references.bits import BATCH_CHUNKS, bits_of, unpacked

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]
UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]

EXACT_SIZE_CLASSES = 1024


def only_in_use(index: ChunkIndex, chunks: UInt64s) -> UInt64s:
    """Of a set of chunks those in use."""
    return chunks & bits_of(index.state == ChunkState.IN_USE)


def with_only(index: ChunkIndex, chunks: UInt64s) -> ChunkIndex:
    """The index as if no other chunks were in use."""
    narrowed = copy(index)
    wanted = unpacked(chunks, 0, index.chunk_count)
    narrowed.state = np.where(wanted, np.uint8(ChunkState.IN_USE), np.uint8(ChunkState.FREE_UNLISTED))
    return narrowed


def payload_ranges(index: ChunkIndex, chunks: Int64s) -> tuple[UInt64s, UInt64s]:
    """Start and end of what the owners of chunks may write; a mmapped chunk reaches to the end of its mapping."""
    header, chunk_bytes = chunk_extents(index, chunks)
    start = header + np.uint64(index.geometry.header_bytes)
    end = header + chunk_bytes + np.uint64(index.geometry.word_bytes)
    mapped = chunks >= index.region_chunks
    if mapped.any():
        rows = chunks[mapped] - index.region_chunks
        end[mapped] = index.mmapped.mapping_start[rows] + index.mmapped.mapping_bytes[rows]
    return start, end


def edges_within(edges: Edges, chunks: UInt32s, row_of: Int64s, *, exact_only: bool) -> Edges:
    """References from some chunks to others of them, by their rows in ``chunks``; ``row_of``: -1 for all other chunks."""
    sources, targets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for begin in range(0, len(chunks), BATCH_CHUNKS):
        part = chunks[begin : begin + BATCH_CHUNKS].astype(np.int64)
        first = edges.first[part].astype(np.int64)
        count = edges.first[part + 1].astype(np.int64) - first
        source = np.repeat(np.arange(begin, begin + len(part)), count)
        place = np.arange(len(source)) + np.repeat(first - (np.cumsum(count) - count), count)
        word = edges.target[place]
        target = row_of[word & np.uint32(CHUNK_MASK)]
        wanted = target >= 0
        if exact_only:
            wanted &= word < np.uint32(INTERIOR)
        sources.append(source[wanted])
        targets.append(target[wanted])
    return edges_from(np.concatenate(sources), np.concatenate(targets), len(chunks))


def edges_from(source: Int64s, target: Int64s, count: int) -> Edges:
    """References among ``count`` chunks from pairs of them."""
    order = np.argsort(source, kind="stable")
    first = np.zeros(count + 1, np.uint64)
    np.cumsum(np.bincount(source, minlength=count), out=first[1:])
    return Edges(first, target[order].astype(np.uint32))


def sources_of(edges: Edges) -> Int64s:
    """The source of each reference."""
    return np.repeat(np.arange(edges.chunk_count), np.diff(edges.first).astype(np.int64))


def both(one: Edges, other: Edges) -> Edges:
    """The references of two sets among the same chunks."""
    return edges_from(
        np.concatenate([sources_of(one), sources_of(other)]),
        np.concatenate([one.target, other.target]).astype(np.int64),
        one.chunk_count,
    )


def marked_from(edges: Edges, starts: Int64s) -> npt.NDArray[np.bool_]:
    """Which of the chunks are among the starts, or are led to from there."""
    marked, interior = (np.zeros((edges.chunk_count + 63) // 64, np.uint64) for _ in range(2))
    mark_reachable(edges, starts.astype(np.uint32), marked, interior, True)
    return unpacked(marked, 0, edges.chunk_count)


def size_classes(granules: UInt32s) -> Int64s:
    """As in ``size_histogram``."""
    classes = granules.astype(np.int64)
    large = classes >= EXACT_SIZE_CLASSES
    classes[large] = EXACT_SIZE_CLASSES + np.log2(classes[large].astype(np.float64)).astype(np.int64) - 10
    return classes


def bytes_at(memory: MemoryMap, address: UInt64s, byte_count: int) -> UInt8s:
    """Bytes at addresses, uint8[addresses, byte_count]; zeros where not all of them are saved."""
    found = np.zeros((len(address), byte_count), np.uint8)
    if not len(memory.run_start):
        return found
    row = np.maximum(np.searchsorted(memory.run_start, address, side="right").astype(np.int64) - 1, 0)
    distance = address - memory.run_start[row]
    size = memory.run_end[row] - memory.run_start[row]
    saved = (address >= memory.run_start[row]) & (distance < size) & (size - distance >= np.uint64(byte_count))
    place = (memory.run_file_offset[row] + distance)[saved].astype(np.int64)
    within = place + byte_count <= len(memory.file)
    saved[np.flatnonzero(saved)[~within]] = False
    found[saved] = memory.file[place[within][:, None] + np.arange(byte_count)]
    return found
