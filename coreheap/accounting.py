"""Where every byte of the address space is: the ledger.

Each mapped byte gets exactly one label. The heap claims its ranges first, thread stacks and modules get what is left of
their regions, and what nobody claims has a leaf of its own. All of it is arithmetic on columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.corefile.kinds import RegionLabel, region_labels
from coreheap.heap import ChunkState, HeapSnapshot, RegionKind
from coreheap.report import LedgerNode

UInt64s = npt.NDArray[np.uint64]

CHUNK_STATES_IN_ORDER = (
    ChunkState.IN_USE,
    ChunkState.ALLOCATOR_OWN,
    ChunkState.TCACHE,
    ChunkState.FASTBIN,
    ChunkState.UNSORTED_BIN,
    ChunkState.SMALL_BIN,
    ChunkState.LARGE_BIN,
    ChunkState.TOP,
    ChunkState.FREE_UNLISTED,
    ChunkState.FENCEPOST,
    ChunkState.DAMAGED,
)


@dataclass(slots=True)
class Claims:
    """Ranges under labels. Labels added first win where ranges of different labels meet."""

    ranges: dict[str, tuple[list[UInt64s], list[UInt64s]]] = field(default_factory=dict)

    def add(self, label: str, start: UInt64s | list[int], end: UInt64s | list[int]) -> None:
        """Claim [start, end) under ``label``, one range an element."""
        starts, ends = self.ranges.setdefault(label, ([], []))
        starts.append(np.asarray(start, dtype=np.uint64))
        ends.append(np.asarray(end, dtype=np.uint64))

    def sorted_ranges(self, label: str) -> tuple[UInt64s, UInt64s]:
        """The ranges of one label, sorted and without overlap."""
        starts, ends = self.ranges[label]
        start, end = np.concatenate(starts), np.concatenate(ends)
        order = np.argsort(start, kind="stable")
        start, end = start[order], end[order]
        reach = np.zeros(len(start), np.uint64)
        if len(start) > 1:
            reach[1:] = np.maximum.accumulate(end)[:-1]
        start = np.maximum(start, reach)
        keep = end > start
        return start[keep], end[keep]


def inside(start: UInt64s, end: UInt64s, address: UInt64s) -> npt.NDArray[np.intp]:
    """For each address which of the sorted disjoint ranges holds it, -1 where none does."""
    if not len(start):
        return np.full(len(address), -1, np.intp)
    position = np.searchsorted(start, address, side="right") - 1
    held = (position >= 0) & (address < end[np.maximum(position, 0)])
    return np.where(held, position, -1)


def build_ledger(core: Core, heap: HeapSnapshot | None) -> LedgerNode:
    """The whole address space by kind; every node is the sum of its children, to the byte.

    Cuts the address space at every border of a region or a claim and gives each piece one label.
    """
    memory = core.memory
    claims = Claims()
    if heap is not None:
        _claim_heap(claims, heap)
    labels = list(claims.ranges)
    ranges = [claims.sorted_ranges(label) for label in labels]
    cuts = np.unique(
        np.concatenate([memory.region_start, memory.region_end, *(edge for pair in ranges for edge in pair)])
    )
    piece_start, piece_bytes = cuts[:-1], np.diff(cuts)
    region = inside(memory.region_start, memory.region_end, piece_start)
    mapped = region >= 0
    piece_start, piece_bytes, region = piece_start[mapped], piece_bytes[mapped], region[mapped]
    label_of_piece = len(labels) + region_labels(core)[region]
    for number in reversed(range(len(labels))):
        label_of_piece[inside(*ranges[number], piece_start) >= 0] = number
    sums = np.zeros(len(labels) + len(RegionLabel), np.uint64)
    np.add.at(sums, label_of_piece, piece_bytes)
    by_claim = dict(zip(labels, sums.tolist(), strict=False))
    others = [
        LedgerNode(label.name.lower(), byte_count)
        for label, byte_count in zip(RegionLabel, sums[len(labels) :].tolist(), strict=True)
    ]
    if heap is None:
        return LedgerNode.of("address_space", *others)
    return LedgerNode.of("address_space", _malloc_node(heap, by_claim), *others)


def _claim_heap(claims: Claims, heap: HeapSnapshot) -> None:
    """The heap's ranges, the most particular first: what an arena spans is unexplained where nothing else claims it."""
    for region in heap.chunks.regions:
        label = "arena_chunks" if region.kind is RegionKind.ARENA_HEAP else "main_chunks"
        claims.add(label, [region.range.start], [region.range.end])
    mmapped = heap.chunks.index.mmapped
    claims.add("mmapped_chunks", mmapped.mapping_start, mmapped.mapping_start + mmapped.mapping_bytes)
    for arena in heap.arenas:
        for part in arena.unattributed:
            claims.add(
                f"{'main' if arena.is_main else 'arena'}_{part.cause}",
                [part.range.start],
                [part.range.end],
            )
    sub_heaps = [sub_heap for arena in heap.arenas for sub_heap in arena.sub_heaps]
    address = [sub_heap.address for sub_heap in sub_heaps]
    for label, spans in (
        ("arena_headers", [sub_heap.overhead_bytes for sub_heap in sub_heaps]),
        ("arena_unexplained", [sub_heap.committed_bytes for sub_heap in sub_heaps]),
        ("arena_reserve", [sub_heap.reserved_bytes for sub_heap in sub_heaps]),
    ):
        claims.add(label, address, [start + span for start, span in zip(address, spans, strict=True)])
    for arena in heap.arenas:
        if arena.brk_range is not None:
            # The first header is where the payload behind it is aligned: 8 bytes into the page with 4-byte words.
            start = arena.brk_range.start
            headers = heap.chunks.index.geometry
            skipped = (headers.granule_phase - start) % headers.alignment
            claims.add("main_alignment", [start], [start + skipped])
            claims.add("main_unexplained", [arena.brk_range.start], [arena.brk_range.end])


def _malloc_node(heap: HeapSnapshot, claimed: dict[str, int]) -> LedgerNode:
    """Below malloc: the main arena, all other arenas together, and mmapped chunks.

    The chunk states of an arena add up to its chunk regions by construction; a difference (regions that overlap other
    claims in a hostile core) shows as unexplained.
    """

    def arena_node(name: str, prefix: str, is_main: bool) -> LedgerNode:
        states = [
            LedgerNode(
                state.label,
                sum(arena.totals[state].chunk_bytes for arena in heap.arenas if arena.is_main is is_main),
            )
            for state in CHUNK_STATES_IN_ORDER
        ]
        rest = [
            LedgerNode(key.removeprefix(f"{prefix}_"), byte_count)
            for key, byte_count in claimed.items()
            if key.startswith(f"{prefix}_") and key not in (f"{prefix}_chunks", f"{prefix}_unexplained")
        ]
        chunk_bytes = sum(node.bytes for node in states)
        difference = claimed.get(f"{prefix}_chunks", 0) - chunk_bytes
        unexplained = claimed.get(f"{prefix}_unexplained", 0) + difference
        return LedgerNode.of(name, *states, *rest, LedgerNode("unexplained", unexplained))

    mmapped_usable = heap.mmapped_totals.get(ChunkState.IN_USE)
    in_use = mmapped_usable.usable_bytes if mmapped_usable else 0
    total = claimed.get("mmapped_chunks", 0)
    cached = heap.mmapped_totals.get(ChunkState.TCACHE)
    cached_bytes = cached.usable_bytes if cached else 0
    return LedgerNode.of(
        "malloc",
        arena_node("main_arena", "main", True),
        arena_node("other_arenas", "arena", False),
        LedgerNode.of(
            "mmapped_chunks",
            LedgerNode("in_use", in_use),
            LedgerNode("tcache", cached_bytes),
            LedgerNode("overhead", total - in_use - cached_bytes),
        ),
    )
