"""Which chunk keeps which others alive, and sums over chunks by verdict.

Knows: chunks by number, who refers to whom. Does not know: memory, allocators, or what a verdict means.
"""

from __future__ import annotations

import numpy as np

from coreheap.kernels.codes import ChunkState
from coreheap.kernels.index import ChunkIndex
from coreheap.kernels.reference.columns import SIZE_CLASSES, _region_chunks, size_class_of
from coreheap.kernels.values import (
    CHUNK_MASK,
    DominatorTree,
    Edges,
    Int64Array,
    UInt8Array,
    UInt32Array,
    UInt64Array,
)

VERDICT_SLOTS = 8
GRANULE_LIMIT = (1 << 32) - 1


def find_dominators(edges: Edges, referrers: Edges, roots: UInt32Array) -> DominatorTree:
    """The dominator tree of all that the roots lead to, interior references included.

    Here by the definition's own iteration (Cooper, Harvey and Kennedy, 2001); the compiled twin uses Semi-NCA.
    """
    if referrers.chunk_count != edges.chunk_count or referrers.first.dtype != edges.first.dtype:
        raise ValueError("the referrers are not of the same references")
    root_chunks = list(dict.fromkeys((roots & np.uint32(CHUNK_MASK)).tolist()))
    chunk_of, node_of = [0], dict[int, int]()
    finished: list[int] = []
    for root in root_chunks:
        if root in node_of:
            continue
        node_of[root] = len(chunk_of)
        chunk_of.append(root)
        path = [(root, iter((edges.of(root) & np.uint32(CHUNK_MASK)).tolist()))]
        while path:
            chunk, targets = path[-1]
            for target in targets:
                if target not in node_of:
                    node_of[target] = len(chunk_of)
                    chunk_of.append(target)
                    path.append((target, iter((edges.of(target) & np.uint32(CHUNK_MASK)).tolist())))
                    break
            else:
                finished.append(node_of[chunk])
                path.pop()
    place = {node: number for number, node in enumerate([*finished, 0])}
    dominator: dict[int, int] = {0: 0}
    is_root = {node_of[root] for root in root_chunks}

    def common(one: int, other: int) -> int:
        while one != other:
            while place[one] < place[other]:
                one = dominator[one]
            while place[other] < place[one]:
                other = dominator[other]
        return one

    changed = True
    while changed:
        changed = False
        for node in reversed(finished):
            before = [0] if node in is_root else []
            before += [
                node_of[referrer]
                for referrer in (referrers.of(chunk_of[node]) & np.uint32(CHUNK_MASK)).tolist()
                if referrer in node_of
            ]
            known = [other for other in before if other in dominator]
            nearest = known[0]
            for other in known[1:]:
                nearest = common(nearest, other)
            if dominator.get(node) != nearest:
                dominator[node] = nearest
                changed = True
    column = [dominator[node] for node in range(len(chunk_of))]
    return DominatorTree(np.array(chunk_of, np.uint32), np.array(column, np.uint32))


def add_up_retained(dominator: UInt32Array, bytes_of_node: UInt64Array) -> None:
    """Turns the own bytes of each node (uint64, written) into its retained bytes: its own and those of all it dominates."""
    if len(dominator) != len(bytes_of_node):
        raise ValueError("the columns of nodes differ in length")
    for node in range(len(dominator) - 1, 0, -1):
        if dominator[node] >= node:
            raise ValueError(f"node {node} cannot be dominated by {dominator[node]}")
        bytes_of_node[dominator[node]] += bytes_of_node[node]


def chunk_sizes(index: ChunkIndex) -> UInt32Array:
    """Granules of each chunk, uint32[chunks]; 2**32 - 1 stands for that and more (64 GiB)."""
    sizes = np.zeros(index.chunk_count, np.uint32)
    for region in range(index.region_count):
        for chunk, _, chunk_bytes in _region_chunks(index, region, 0, index.word_count(region)):
            sizes[chunk] = min(chunk_bytes // index.geometry.alignment, GRANULE_LIMIT)
    for row, chunk_bytes in enumerate(index.mmapped.chunk_bytes.tolist()):
        sizes[index.region_chunks + row] = min(chunk_bytes // index.geometry.alignment, GRANULE_LIMIT)
    return sizes


def count_by_verdict(verdict: UInt8Array, state: UInt8Array, granules: UInt32Array) -> tuple[Int64Array, UInt64Array]:
    """Counts (int64) and granules (uint64) of the chunks in use, by verdict and size class: [8, 1078].

    Size classes as in ``size_histogram``. Verdicts beyond 7, which nobody writes, count as their low three bits.
    """
    if not len(verdict) == len(state) == len(granules):
        raise ValueError("the columns of chunks differ in length")
    counts = np.zeros((VERDICT_SLOTS, SIZE_CLASSES), np.int64)
    totals = np.zeros((VERDICT_SLOTS, SIZE_CLASSES), np.uint64)
    for number in np.flatnonzero(state == ChunkState.IN_USE).tolist():
        slot, size_class = int(verdict[number]) % VERDICT_SLOTS, size_class_of(int(granules[number]))
        counts[slot, size_class] += 1
        totals[slot, size_class] += np.uint64(granules[number])
    return counts, totals
