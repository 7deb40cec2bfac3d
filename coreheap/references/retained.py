"""What would go with a chunk: retained sizes by the dominator tree, and containers that grew.

Knows: dominators, sizes, size classes. Does not know: types, findings.

A chunk retains what every path from the roots to it passes through. An accumulation point is a holder below which
very many like chunks hang: the slots of a table, the nodes of a list or tree. Like means: of one size class. Nodes
that hang below each other and are like each other (a list, a tree) count together for the holder of the first.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coreheap.kernels import CHUNK_MASK, add_up_retained, chunk_sizes, find_dominators
from coreheap.leaks import Accumulation, RetainedChunk, RetainedReport
from coreheap.references.graph import ReferenceGraph, RetainedSizes
from coreheap.references.naming import Namer
from coreheap.references.suspects import SAMPLES, size_classes, usable_bytes

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]
Int64s = npt.NDArray[np.int64]

LIKE_CHILDREN = 100
"""Fewer like chunks are no accumulation."""
ACCUMULATION_SHARE = 0.01
"""Of all that is reachable, an accumulation holds at least this share."""
ACCUMULATIONS = 10


def retained_sizes(graph: ReferenceGraph) -> RetainedSizes:
    """Retained sizes of all chunks that anything leads to; computed once for each graph."""
    if graph.retained is None:
        graph.retained = _retained_sizes(graph)
    return graph.retained


def _retained_sizes(graph: ReferenceGraph) -> RetainedSizes:
    seeds = np.concatenate(
        [graph.seeds(strong=True) & np.uint32(CHUNK_MASK), graph.seeds(strong=False) & np.uint32(CHUNK_MASK),
         graph.lost.leader]
    )  # fmt: skip
    tree = find_dominators(graph.edges, graph.referrers, seeds)
    # Free chunks that a stale pointer leads to are in the tree, and hold nothing.
    in_use = graph.verdict[tree.chunk] != 0
    own = usable_bytes(graph.heap.chunks, tree.chunk.astype(np.int64), chunk_sizes(graph.index)).astype(np.uint64)
    own[~in_use] = 0
    own[0] = 0
    retained, count = own.copy(), in_use.astype(np.uint64)
    count[0] = 0
    add_up_retained(tree.dominator, retained)
    add_up_retained(tree.dominator, count)
    return RetainedSizes(tree, own, retained, count)


def find_retained(graph: ReferenceGraph, top: int = 20) -> RetainedReport:
    """The chunks under the roots that retain most, and the accumulation points, the largest first."""
    if not len(graph.verdict):
        # Arenas whose chunks are all missing or past recognition.
        return RetainedReport((), (), 0)
    sizes = retained_sizes(graph)
    namer = Namer(graph)
    under_roots = np.flatnonzero(sizes.tree.dominator == 0)[1:]
    is_lost = graph.lost.leader_of[sizes.tree.chunk] != 0
    reachable_bytes = int(sizes.retained[under_roots[~is_lost[under_roots]]].sum())
    order = np.argsort(sizes.retained[under_roots], kind="stable")[::-1][: max(top, 0)]
    nodes = under_roots[order]
    chunks = sizes.tree.chunk[nodes].astype(np.int64)
    holders = namer.typical_holders(np.split(chunks, len(chunks)) if len(chunks) else [])
    rows = [
        RetainedChunk(namer.chunk(chunk), int(sizes.retained[node]), int(sizes.count[node]), holder)
        for chunk, node, holder in zip(chunks.tolist(), nodes.tolist(), holders, strict=True)
    ]
    return RetainedReport(tuple(rows), _accumulations(graph, sizes, namer), reachable_bytes)


def _accumulations(graph: ReferenceGraph, sizes: RetainedSizes, namer: Namer) -> tuple[Accumulation, ...]:
    tree = sizes.tree
    if len(tree.chunk) < 2:
        return ()
    granules = chunk_sizes(graph.index)[tree.chunk]
    like = size_classes(granules)
    above = tree.dominator
    same = (like == like[above]) & (above != 0)
    # Nodes of one kind below each other count for the first of them.
    alike = np.ones(len(above), np.uint64)
    add_up_retained(np.where(same, above, 0).astype(np.uint32), alike)
    firsts = np.flatnonzero(~same)[1:]
    # Lost chunks hang from nothing: they are no accumulation of anyone's.
    firsts = firsts[(sizes.own[firsts] > 0) & ((above[firsts] != 0) | (graph.lost.leader_of[tree.chunk[firsts]] == 0))]
    key = above[firsts].astype(np.uint64) << np.uint64(12) | like[firsts].astype(np.uint64)
    keys, group = np.unique(key, return_inverse=True)
    count = np.bincount(group, weights=alike[firsts], minlength=len(keys))
    held = np.bincount(group, weights=sizes.retained[firsts], minlength=len(keys))
    threshold = max(1.0, ACCUMULATION_SHARE * float(sizes.retained[0]))
    wanted = np.flatnonzero((count >= LIKE_CHILDREN) & (held >= threshold))
    wanted = wanted[np.argsort(-held[wanted], kind="stable")][:ACCUMULATIONS]
    found = []
    children_of = [firsts[group == number] for number in wanted.tolist()]
    samples_of = [tree.chunk[children[:SAMPLES]].astype(np.int64) for children in children_of]
    roots_of = namer.typical_holders(samples_of)
    for number, children, samples, root in zip(wanted.tolist(), children_of, samples_of, roots_of, strict=True):
        views = [namer.chunk(chunk) for chunk in samples.tolist()]
        holder_node = int(keys[number] >> np.uint64(12))
        holder_chunk = int(tree.chunk[holder_node])
        found.append(
            Accumulation(
                holder=namer.chunk(holder_chunk) if holder_node else root or "the roots",
                retained_bytes=int(sizes.retained[holder_node]),
                children=int(count[number]),
                child_bytes=views[0].usable_bytes,
                child_retained_bytes=int(sizes.retained[children].sum()),
                samples=tuple(view.payload_address for view in views),
            )
        )
    return tuple(found)
