"""What follows from references: reachability, leaders of the lost, referrers, paths.

Knows: chunks by number, who refers to whom. Does not know: memory, allocators, or what a root is.
"""

from __future__ import annotations

import numpy as np

from coreheap.kernels.reference.pointers import check_bits, is_set, set_bit
from coreheap.kernels.values import (
    CHUNK_MASK,
    INTERIOR,
    Edges,
    Int64Array,
    LostChunks,
    UInt32Array,
    UInt64Array,
)


def mark_reachable(
    edges: Edges, seeds: UInt32Array, marked: UInt64Array, interior: UInt64Array, follow_interior: bool
) -> int:
    """Marks the seeds and all that they lead to; returns how many chunks were not marked before.

    ``marked`` and ``interior``: uint64, one bit a chunk, written. References to payload starts are followed, interior
    ones too with ``follow_interior``. Without it, ``interior`` gets the bits of chunks that were pointed into and loses those
    of all that are marked in the end. What was marked before is not visited again. Raises ValueError for bitmaps of another
    length, IndexError where seeds or references lead to chunks that there are not.
    """
    check_bits(edges.chunk_count, marked, interior)
    waiting: list[int] = []
    count = 0
    for seed in (seeds & np.uint32(CHUNK_MASK)).tolist():
        if not is_set(marked, seed):
            set_bit(marked, seed)
            count += 1
            waiting.append(seed)
    while waiting:
        for word in edges.of(waiting.pop()).tolist():
            chunk = word & CHUNK_MASK
            if is_set(marked, chunk):
                continue
            if word & INTERIOR and not follow_interior:
                set_bit(interior, chunk)
                continue
            set_bit(marked, chunk)
            count += 1
            waiting.append(chunk)
    if not follow_interior:
        interior &= ~marked
    return count


def find_leaders(edges: Edges, lost: UInt64Array) -> LostChunks:
    """Which lost chunks lead the others: of each cycle that no other lost chunk leads to the first one.

    ``lost``: uint64, one bit a chunk. A chunk that several leaders lead to belongs to the last of them.

    Two searches. The first takes the chunks in their order; each chunk that it has to start from anew is not reached from
    a start before. So of two starts only the later one can lead to the earlier one, and a second search that takes
    the starts backwards keeps exactly those that no other leads to.
    """
    check_bits(edges.chunk_count, lost)

    def visit(start: int, visited: set[int]) -> list[int]:
        visited.add(start)
        met, waiting = [start], [start]
        while waiting:
            for chunk in (edges.of(waiting.pop()) & np.uint32(CHUNK_MASK)).tolist():
                if chunk not in visited and is_set(lost, chunk):
                    visited.add(chunk)
                    met.append(chunk)
                    waiting.append(chunk)
        return met

    visited: set[int] = set()
    starts: list[int] = []
    for chunk in np.flatnonzero(np.unpackbits(lost.view(np.uint8), bitorder="little")).tolist():
        if chunk not in visited:
            starts.append(chunk)
            visit(chunk, visited)
    visited = set()
    led: list[tuple[int, list[int]]] = []
    for start in reversed(starts):
        if start not in visited:
            led.append((start, visit(start, visited)))
    leader_of = np.zeros(edges.chunk_count, np.uint32)
    for number, (_, chunks) in enumerate(reversed(led), start=1):
        leader_of[chunks] = number
    return LostChunks(np.array([leader for leader, _ in reversed(led)], np.uint32), leader_of)


def reverse_edges(edges: Edges) -> Edges:
    """The same references by their targets: each chunk's referrers, ascending, INTERIOR kept."""
    target = edges.target & np.uint32(CHUNK_MASK)
    source = np.repeat(np.arange(edges.chunk_count, dtype=np.uint32), np.diff(edges.first).astype(np.int64))
    order = np.argsort(target, kind="stable")
    counts = np.bincount(target, minlength=edges.chunk_count)
    first = np.zeros(edges.chunk_count + 1, edges.first.dtype)
    np.cumsum(counts, out=first[1:])
    return Edges(first, (source | (edges.target & np.uint32(INTERIOR)))[order])


def shortest_path(referrers: Edges, chunk: int, goals: UInt64Array, follow_interior: bool) -> Int64Array:
    """A shortest way from one of the goals to a chunk, both included: int64 chunk indexes, none where there is no way.

    ``referrers`` as ``reverse_edges`` gives them; ``goals``: uint64, one bit a chunk. Of ways of equal length the one whose
    last referrers come first.
    """
    check_bits(referrers.chunk_count, goals)
    if not 0 <= chunk < referrers.chunk_count:
        raise IndexError(f"there is no chunk {chunk}")
    comes_from = {chunk: -1}
    queue = [chunk]
    for current in queue:
        if is_set(goals, current):
            path = []
            while current >= 0:
                path.append(current)
                current = comes_from[current]
            return np.array(path, np.int64)
        for word in referrers.of(current).tolist():
            if word & INTERIOR and not follow_interior:
                continue
            if word & CHUNK_MASK not in comes_from:
                comes_from[word & CHUNK_MASK] = current
                queue.append(word & CHUNK_MASK)
    return np.empty(0, np.int64)
