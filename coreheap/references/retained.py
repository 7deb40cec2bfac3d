"""What would go with a chunk: retained sizes by the dominator tree, and containers that grew.

Knows: dominators, sizes, size classes. Does not know: types, findings.

A chunk retains what every path from the roots to it passes through. An accumulation point is a holder below which
very many like chunks hang: the slots of a table, the nodes of a list or tree. Like means: of one size class. Nodes
that hang below each other and are like each other (a list, a tree) count together for the holder of the first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from coreheap.kernels import CHUNK_MASK, add_up_retained, chunk_sizes, find_dominators, mark_reachable
from coreheap.leaks import Accumulation, ChunkView, RetainedChunk, RetainedReport
from coreheap.references.followed import size_classes
from coreheap.references.graph import ReferenceGraph, RetainedSizes
from coreheap.references.naming import Namer
from coreheap.references.suspects import SAMPLES, usable_bytes

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]
Int64s = npt.NDArray[np.int64]

LIKE_CHILDREN = 100
"""Fewer like chunks are no accumulation."""
ACCUMULATION_SHARE = 0.01
"""Of all that is reachable, an accumulation holds at least this share."""
ACCUMULATIONS = 10
HOLDERS_SAMPLED = 64
HOLDERS_TRIED = 4
"""Of the roots that lead to like chunks without a common holder, so many are named, and so many names followed."""
OFFSET = re.compile(r"\+0x[0-9a-f]+$")
"""In a variable, or in a module without symbols: there all its variables count together."""


def retained_sizes(graph: ReferenceGraph) -> RetainedSizes:
    """Retained sizes of all chunks that anything leads to; computed once for each graph."""
    if graph.retained is None:
        graph.retained = _retained_sizes(graph)
    return graph.retained


def _retained_sizes(graph: ReferenceGraph) -> RetainedSizes:
    seeds = np.concatenate([*_seeds(graph), graph.lost.leader])
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


def _seeds(graph: ReferenceGraph) -> Iterator[UInt32s]:
    """What roots lead to, of weaker ones only what no stronger one leads to in any way: strong roots, stacks, registers.

    A leftover in a register leads to a node of a list as well as the list's head does. Were both roots, the node would hang from none
    of them, and the rest of the list would be nobody's.
    """
    marked, interior = (np.zeros((graph.index.chunk_count + 63) // 64, np.uint64) for _ in range(2))
    for target in (graph.seeds(strong=True), graph.weak.target, graph.registers.target):
        chunks = target & np.uint32(CHUNK_MASK)
        chunks = chunks[
            marked[chunks >> np.uint32(6)] >> (chunks & np.uint32(63)).astype(np.uint64) & np.uint64(1) == 0
        ]
        yield chunks
        mark_reachable(graph.edges, chunks, marked, interior, True)


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
    threshold = max(1.0, ACCUMULATION_SHARE * float(sizes.retained[0]))
    of_one = above[firsts].astype(np.uint64) << np.uint64(12) | like[firsts].astype(np.uint64)
    found = [
        _accumulation(graph, sizes, namer, children, alike[children])
        for children in _most(of_one, firsts, alike, sizes.retained, threshold)
    ]
    # The same children of many like holders, none of which needs to have many.
    below_chunk = firsts[above[firsts] != 0]
    of_like = like[above[below_chunk]].astype(np.uint64) << np.uint64(12) | like[below_chunk].astype(np.uint64)
    for children in _most(of_like, below_chunk, alike, sizes.retained, threshold):
        holders = np.unique(above[children])
        if len(holders) > 1:
            found.append(_accumulation(graph, sizes, namer, children, alike[children]))
    return tuple(sorted(found, key=lambda point: -point.child_retained_bytes)[:ACCUMULATIONS])


def _most(key: UInt64s, nodes: Int64s, alike: UInt64s, retained: UInt64s, threshold: float) -> Iterator[Int64s]:
    """The nodes of each key that has many like ones, which retain much together; those that retain most first."""
    keys, group = np.unique(key, return_inverse=True)
    count = np.bincount(group, weights=alike[nodes], minlength=len(keys))
    held = np.bincount(group, weights=retained[nodes], minlength=len(keys))
    wanted = np.flatnonzero((count >= LIKE_CHILDREN) & (held >= threshold))
    for number in wanted[np.argsort(-held[wanted], kind="stable")][:ACCUMULATIONS].tolist():
        yield nodes[group == number]


def _accumulation(
    graph: ReferenceGraph, sizes: RetainedSizes, namer: Namer, children: Int64s, weight: UInt64s
) -> Accumulation:
    """What is said of like children, ``weight`` like ones each."""
    tree = sizes.tree
    holders, of_holder = np.unique(tree.dominator[children], return_inverse=True)
    by_holder = np.bincount(of_holder, weights=sizes.retained[children], minlength=len(holders))
    node = int(holders[int(np.argmax(by_holder))])
    views = [namer.chunk(chunk) for chunk in tree.chunk[children[:SAMPLES]].astype(np.int64).tolist()]
    holder: ChunkView | str
    if node:
        holder = namer.chunk(int(tree.chunk[node]))
        (root,) = namer.typical_holders([np.array([tree.chunk[_uppermost(tree.dominator, node)]], np.int64)])
    else:
        root = _root_of_most(graph, namer, tree.chunk[children].astype(np.int64), weight)
        holder = root or "the roots"
    return Accumulation(
        holder=holder,
        retained_bytes=int(sizes.retained[holders].sum()),
        children=int(weight.sum()),
        child_bytes=views[0].usable_bytes,
        child_retained_bytes=int(sizes.retained[children].sum()),
        samples=tuple(view.payload_address for view in views),
        below=int(sizes.count[children].sum()),
        holders=len(holders),
        root=root,
    )


def _uppermost(dominator: UInt32s, node: int) -> int:
    """The node right under the roots that a node hangs from. Dominators are smaller than their nodes."""
    while dominator[node]:
        node = int(dominator[node])
    return node


def _root_of_most(graph: ReferenceGraph, namer: Namer, chunks: Int64s, weight: UInt64s) -> str | None:
    """The variable or stack from which most of some chunks hang, ``weight`` like ones each; None where no place has half of them.

    The nodes of a container and any other block of their size are like chunks: the first that a root leads to may be the other.
    """
    direct, sampled = namer.direct_holders(chunks, HOLDERS_SAMPLED)
    held_by: dict[str, list[int]] = defaultdict(list)
    first_name: dict[str, str] = {}
    for chunk, name in sampled:
        variable = OFFSET.sub("", name)
        held_by[variable].append(chunk)
        first_name.setdefault(variable, name)
    most, best = 0, None
    for variable in sorted(held_by, key=lambda name: -len(held_by[name]))[:HOLDERS_TRIED]:
        own, name = held_by[variable], first_name[variable]
        marked, interior = (np.zeros((graph.index.chunk_count + 63) // 64, np.uint64) for _ in range(2))
        mark_reachable(graph.edges, np.array(own, np.uint32), marked, interior, True)
        is_marked = marked[chunks >> 6] >> (chunks & 63).astype(np.uint64) & np.uint64(1) != 0
        # Of a table only some slots are followed: the others are as many as the sample says.
        held = max(int(weight[is_marked].sum()), direct * len(own) // len(sampled))
        # Of equals the first one: that of strong roots.
        if held > most:
            most, best = held, name if len(own) == 1 else variable if " " in variable else f"{name} and others"
    return best if 2 * most >= int(weight.sum()) else None
