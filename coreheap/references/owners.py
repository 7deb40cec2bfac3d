"""What an address is, who holds it, and how a root leads to it.

Knows: the reference graph, and how to read the few words that answer a question about one chunk. Does not know: how
answers are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from coreheap.kernels import CHUNK_MASK, INTERIOR, find_chunks, shortest_path
from coreheap.leaks import ChunkTypes, ChunkView, Explanation, OwnerNode, Place, Reference, Verdict
from coreheap.references.bits import bits_of_positions
from coreheap.references.graph import ReferenceGraph
from coreheap.references.naming import Namer
from coreheap.references.retained import retained_sizes

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

HOLDERS = 20
TARGETS = 20
PATH_STEPS = 16
"""Steps that are told at the beginning and at the end of a long path, which a list of a million nodes makes."""
WORDS_READ = 1 << 27
"""Of one chunk at most so many words are looked at for pointers."""
_PERMISSIONS = ("---", "--x", "-w-", "-wx", "r--", "r-x", "rw-", "rwx")


def explain(
    graph: ReferenceGraph,
    address: int,
    *,
    holders: int = HOLDERS,
    targets: int = TARGETS,
    retained: bool = False,
    types: ChunkTypes | None = None,
) -> Explanation:
    """Everything about one address. At most ``holders`` and ``targets`` references are told; their numbers are whole.

    An address that nothing is mapped at is explained as that; nothing is raised for it.
    """
    reader = _Reader(graph, types)
    memory = graph.core.memory
    address &= graph.address_mask
    region = memory.region_index(address)
    chunk = reader.chunk_at(address)
    where = reader.where(address, chunk)
    thread = None
    if chunk is None:
        found = graph.roots.ranges.at(address)
        thread = found[1] if found is not None else None
    explanation = Explanation(
        address=address,
        region=where,
        permissions=_PERMISSIONS[int(memory.region_flags[region]) & 7] if region is not None else "",
        is_saved=memory.is_saved(address, address + 1),
        symbol=reader.namer.symbol_at(address) if chunk is None else None,
        thread=thread,
    )
    if chunk is None:
        return explanation
    view = reader.namer.chunk(chunk)
    way, omitted = reader.path_to(chunk)
    held_by, holder_count = reader.holders_of(chunk, holders)
    led_to, target_count = reader.targets_of(view, targets)
    before, behind = reader.neighbours(chunk)
    retained_bytes = retained_count = None
    if retained:
        sizes = retained_sizes(graph)
        node = sizes.node_of(chunk)
        if node is not None:
            retained_bytes, retained_count = int(sizes.retained[node]), int(sizes.count[node])
    return Explanation(
        address=address,
        region=where,
        permissions=explanation.permissions,
        is_saved=explanation.is_saved,
        chunk=view,
        offset=address - view.payload_address,
        before=before,
        behind=behind,
        holders=held_by,
        holder_count=holder_count,
        targets=led_to,
        target_count=target_count,
        path=way,
        path_omitted=omitted,
        retained_bytes=retained_bytes,
        retained_count=retained_count,
    )


def owners(
    graph: ReferenceGraph, address: int, depth: int = 3, limit: int = 10, types: ChunkTypes | None = None
) -> tuple[OwnerNode, ...]:
    """Who refers to the chunk at an address, and who refers to them, ``depth`` levels up, at most ``limit`` for each.

    Empty where no chunk holds the address, or nothing refers to it.
    """
    reader = _Reader(graph, types)
    chunk = reader.chunk_at(address & graph.address_mask)
    if chunk is None:
        return ()
    seen = {chunk}

    def above(of: int, levels: int) -> tuple[OwnerNode, ...]:
        references, _ = reader.holders_of(of, limit)
        nodes = []
        fresh = [
            holder.chunk
            for reference in references
            if isinstance(holder := reference.source, ChunkView) and holder.chunk not in seen
        ]
        seen.update(fresh)
        for reference in references:
            holder = reference.source
            if isinstance(holder, Place):
                nodes.append(OwnerNode(reference))
            elif holder.chunk not in fresh:
                nodes.append(OwnerNode(reference, seen_before=True))
            elif levels <= 1:
                nodes.append(OwnerNode(reference, omitted=reader.holder_count(holder.chunk)))
            else:
                higher = above(holder.chunk, levels - 1)
                nodes.append(OwnerNode(reference, higher, reader.holder_count(holder.chunk) - len(higher)))
        return tuple(nodes)

    return above(chunk, max(depth, 1))


class _Reader:
    """Reads chunks and their words, one question at a time."""

    def __init__(self, graph: ReferenceGraph, types: ChunkTypes | None) -> None:
        self.graph = graph
        self.namer = Namer(graph, types)

    def chunk_at(self, address: int) -> int | None:
        """The chunk whose header starts here, else whose payload holds the address; None without."""
        index = self.graph.index
        chunk = index.chunk_starting_at(address)
        if chunk < 0 and address >= index.geometry.header_bytes:
            chunk = index.chunk_containing(address - index.geometry.header_bytes)
        if chunk < 0:
            chunk = index.chunk_containing(address)
        return chunk if chunk >= 0 else None

    def where(self, address: int, chunk: int | None) -> str:
        graph = self.graph
        if chunk is not None:
            view = self.namer.chunk(chunk)
            if view.is_mmapped:
                return "an mmapped chunk"
            return "the main arena" if graph.heap.arenas[view.arena or 0].is_main else f"arena {view.arena}"
        for arena in graph.heap.arenas:
            for sub_heap in arena.sub_heaps:
                if sub_heap.address <= address < sub_heap.address + sub_heap.reserved_bytes:
                    committed = address < sub_heap.address + sub_heap.committed_bytes
                    return f"arena {arena.index}, " + (
                        "outside of all chunks" if committed else "address space that the arena does not use yet"
                    )
        if any(own.start <= address < own.end for own in graph.heap.own_ranges):
            return "malloc's own globals"
        if graph.roots.ranges.at(address) is not None:
            return self.namer.place(address).name
        if graph.core.memory.region_index(address) is None:
            return "not mapped"
        symbol = self.namer.symbol_at(address)
        return symbol if symbol is not None else "memory that is not searched for pointers"

    def neighbours(self, chunk: int) -> tuple[ChunkView | None, ChunkView | None]:
        """The chunks before and behind in the same region; None at its borders and for mmapped chunks."""
        index = self.graph.index
        if chunk >= index.region_chunks:
            return None, None
        region = int(np.searchsorted(index.region_first_chunk, chunk, side="right")) - 1
        first = int(index.region_first_chunk[region])
        last = first + int(index.region_chunk_count[region]) - 1
        return (
            self.namer.chunk(chunk - 1) if chunk > first else None,
            self.namer.chunk(chunk + 1) if chunk < last else None,
        )

    def holder_count(self, chunk: int) -> int:
        return len(self.graph.referrers.of(chunk)) + len(self.namer.root_holders(chunk))

    def holders_of(self, chunk: int, limit: int) -> tuple[tuple[Reference, ...], int]:
        """References to a chunk, roots first; and how many there are (of each kind of root the first is known)."""
        target = self.namer.chunk(chunk)
        roots = self.namer.root_holders(chunk)
        found = [Reference(place, 0, target, self._target_offset(place, target, word)) for place, word in roots[:limit]]
        referrers = self.graph.referrers.of(chunk)
        # A chunk that points twice stands there twice.
        distinct = np.unique(referrers & np.uint32(CHUNK_MASK))
        for source in distinct[: max(limit - len(found), 0)].tolist():
            found.append(self.reference(source, chunk))
        return tuple(found), len(roots) + len(distinct)

    def _target_offset(self, place: Place, target: ChunkView, word: int) -> int:
        if not word & INTERIOR or place.address is None:
            return 0
        value = self.graph.core.memory.read_word(place.address) & self.graph.address_mask
        return value - target.payload_address

    def reference(self, source: int, target: int) -> Reference:
        """The pointer from one chunk to another; the first exact one, else the first."""
        holder, led_to = self.namer.chunk(source), self.namer.chunk(target)
        best: tuple[int, int] | None = None
        for offset, words in self._words_of(holder):
            into = words.astype(np.int64) - led_to.payload_address
            hits = np.flatnonzero((into >= 0) & (into <= max(led_to.usable_bytes, 0)))
            exact = hits[into[hits] == 0]
            if len(exact):
                best = offset + int(exact[0]) * self.graph.index.geometry.word_bytes, 0
                break
            if len(hits) and best is None:
                best = offset + int(hits[0]) * self.graph.index.geometry.word_bytes, int(into[hits[0]])
        source_offset, target_offset = best if best is not None else (0, 0)
        return Reference(holder, source_offset, led_to, target_offset)

    def targets_of(self, view: ChunkView, limit: int) -> tuple[tuple[Reference, ...], int]:
        """What a chunk's words lead to, in their order; and how many of them lead anywhere."""
        index = self.graph.index
        header_bytes = np.uint64(index.geometry.header_bytes)
        found: list[Reference] = []
        count = 0
        for offset, words in self._words_of(view):
            places = words - header_bytes
            chunks = find_chunks(index, places, False)
            hits = np.flatnonzero((chunks >= 0) & (chunks != view.chunk) & (words >= header_bytes))
            count += len(hits)
            for row in hits[: max(limit - len(found), 0)].tolist():
                target = self.namer.chunk(int(chunks[row]))
                found.append(
                    Reference(
                        view,
                        offset + row * index.geometry.word_bytes,
                        target,
                        int(words[row]) - target.payload_address,
                    )
                )
        return tuple(found), count

    def _words_of(self, view: ChunkView) -> Iterator[tuple[int, UInt64s]]:
        """(offset in the payload, words) of the saved parts of a chunk's payload, tags taken off."""
        memory, word = self.graph.core.memory, self.graph.index.geometry.word_bytes
        start = view.payload_address
        end = start + min(view.usable_bytes, WORDS_READ * word)
        for low, high in memory.populated_extents(start, end):
            low = -(-low // word) * word
            if high - low >= word:
                words = memory.read_words(low, (high - low) // word)
                yield low - start, words & np.uint64(self.graph.address_mask)

    def path_to(self, chunk: int) -> tuple[tuple[Reference, ...], int]:
        """A shortest way to a chunk that explains its verdict: from a root, or for the lost from their leader.

        Of a long one the first and last PATH_STEPS steps, and how many lie between.
        """
        graph = self.graph
        verdict = Verdict(int(graph.verdict[chunk]))
        strong, weak = graph.seeds(strong=True), graph.seeds(strong=False)
        exact = np.uint32(INTERIOR)
        if graph.lost.leader_of[chunk]:
            leader = int(graph.lost.leader[int(graph.lost.leader_of[chunk]) - 1])
            return self._steps(self._search(chunk, np.array([leader], np.uint32), True))
        attempts = {
            # By a known pattern a pointer to the inside is enough.
            Verdict.STILL_REACHABLE: [(strong[strong < exact], False), (strong, True)],
            Verdict.WEAKLY_HELD: [(weak[weak < exact], False), (weak, True)],
            Verdict.POSSIBLY_LOST: [(strong, True)],
        }.get(verdict, [(strong, True), (weak, True)])
        for seeds, follow_interior in attempts:
            way = self._search(chunk, seeds, follow_interior)
            if len(way):
                roots = self.namer.root_holders(int(way[0]))
                is_weak = verdict is Verdict.WEAKLY_HELD
                first = [found for found in roots if found[0].kind.is_weak == is_weak] or roots
                head = self.namer.chunk(int(way[0]))
                start = [Reference(place, 0, head, self._target_offset(place, head, word)) for place, word in first[:1]]
                steps, omitted = self._steps(way)
                return (*start, *steps), omitted
        return (), 0

    def _search(self, chunk: int, seeds: npt.NDArray[np.uint32], follow_interior: bool) -> Int64s:
        goals = bits_of_positions(seeds & np.uint32(CHUNK_MASK), self.graph.index.chunk_count)
        return shortest_path(self.graph.referrers, chunk, goals, follow_interior)

    def _steps(self, way: Int64s) -> tuple[tuple[Reference, ...], int]:
        parts, omitted = [way], 0
        if len(way) > 2 * PATH_STEPS + 1:
            parts, omitted = [way[: PATH_STEPS + 1], way[-PATH_STEPS - 1 :]], len(way) - 1 - 2 * PATH_STEPS
        return (
            tuple(self.reference(source, target) for part in parts for source, target in pairwise(part.tolist())),
            omitted,
        )
