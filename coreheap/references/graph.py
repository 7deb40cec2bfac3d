"""The reference graph of a heap: who points to whom, what the roots lead to, and the verdict on every chunk in use.

Knows: chunks, roots, reachability. Does not know: allocators, or what a chunk holds.

Four searches, each after what is left by the one before: from strong roots along pointers to payload starts
(still reachable), from registers and stacks in the same way (weakly held), from strong roots along any pointers (possibly
lost), from registers and stacks along any (weakly held). What none meets is lost.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from coreheap.allocators.protocol import Progress
from coreheap.corefile import Backing, Core
from coreheap.corefile.regions import row_holding, without_overlap
from coreheap.evidence import Gap
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.kernels import (
    CHUNK_MASK,
    INTERIOR,
    ChunkIndex,
    DominatorTree,
    Edges,
    LostChunks,
    MemoryMap,
    RootReferences,
    chunk_extents,
    collect_edges,
    find_chunks,
    find_leaders,
    find_root_references,
    mark_reachable,
    mark_reachable_directly,
    reverse_edges,
)
from coreheap.leaks import OPTIONAL_HEURISTICS, Heuristic, RootKind, RootSummary, Verdict
from coreheap.references.bits import BATCH_CHUNKS, bits_of, positions_of, unpacked
from coreheap.references.followed import with_only
from coreheap.references.patterns import HeldByPatterns, Reached, held_by_patterns
from coreheap.references.ranges import ADDRESS_LIMIT, RootRanges
from coreheap.references.roots import Roots, RootValues, find_roots, missing_bytes_within
from coreheap.references.unseen import Unseen, may_be_held

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]
UInt8s = npt.NDArray[np.uint8]

ADDRESS_MASKS = {"aarch64": (1 << 56) - 1}
"""The top byte of a pointer is the program's own there (arch/arm64, Tagged virtual addresses); other machines compare all bits."""


@dataclass(frozen=True, slots=True)
class HeldByValue:
    """Chunks that root values lead to: ``row`` in the values, ``target`` as in Edges."""

    row: npt.NDArray[np.int64]
    target: UInt32s


@dataclass(frozen=True, slots=True)
class RetainedSizes:
    """The dominator tree with ``own`` and ``retained`` usable bytes and ``count`` of retained chunks, uint64[nodes] each.

    Roots of the tree are whatever roots lead to, and the leaders of the lost.
    """

    tree: DominatorTree
    own: UInt64s
    retained: UInt64s
    count: UInt64s

    def node_of(self, chunk: int) -> int | None:
        """The node of a chunk; None for a chunk that nothing reaches and that is not lost (free chunks)."""
        found = np.flatnonzero(self.tree.chunk[1:] == chunk)
        return int(found[0]) + 1 if len(found) else None


@dataclass(slots=True)
class ReferenceGraph:
    """References of one heap. ``verdict``: uint8[chunks], a ``Verdict`` each; ``lost`` says who leads the lost.

    ``strong`` and ``weak``: for each chunk that such roots lead to the first word that does. ``missing_root_bytes``: see
    ``LeakReport``. ``edges`` (collected already, unless low memory was asked for) and ``referrers`` are made when they are first asked for.
    """

    core: Core
    heap: HeapSnapshot
    index: ChunkIndex
    memory: MemoryMap
    collected_edges: Edges | None
    roots: Roots
    strong: RootReferences
    weak: RootReferences
    registers: HeldByValue
    thread_words: HeldByValue
    verdict: UInt8s
    lost: LostChunks
    summaries: tuple[RootSummary, ...]
    missing_root_bytes: int
    missing_shared_bytes: int
    gaps: tuple[Gap, ...]
    heuristic: UInt8s | None = None
    """uint8[chunks], a ``Heuristic`` each; None where none applied."""
    inside: UInt32s | None = None
    """Chunks that are pointed into with nothing better leading to them; None where it was not looked for."""
    _referrers: Edges | None = None
    retained: RetainedSizes | None = None
    """Filled in by ``references.retained`` when it is first asked for."""

    @property
    def edges(self) -> Edges:
        """All references between chunks. Raises OverflowError and MemoryError where they cannot be held."""
        if self.collected_edges is None:
            self.collected_edges = collect_edges(self.index, self.memory, self.address_mask)
        return self.collected_edges

    @property
    def edge_count(self) -> int | None:
        """How many references there are; None where they were not collected."""
        return None if self.collected_edges is None else len(self.collected_edges.target)

    @property
    def referrers(self) -> Edges:
        if self._referrers is None:
            self._referrers = reverse_edges(self.edges)
        return self._referrers

    def seeds(self, *, strong: bool) -> UInt32s:
        """Targets of all strong or all weak roots, as in Edges."""
        if strong:
            return np.concatenate([self.strong.target, self.thread_words.target])
        return np.concatenate([self.weak.target, self.registers.target])

    @property
    def address_mask(self) -> int:
        return address_mask_of(self.core)


def address_mask_of(core: Core) -> int:
    """What of a word is compared with addresses."""
    return ADDRESS_MASKS.get(core.machine, (1 << 64) - 1)


def build_graph(
    core: Core,
    heap: HeapSnapshot,
    progress: Progress = lambda phase, done, total: None,
    *,
    low_memory: bool = False,
    heuristics: Collection[Heuristic] = OPTIONAL_HEURISTICS,
) -> ReferenceGraph:
    """All references of a heap, and the verdicts. Raises OverflowError for more than 2**31 - 1 chunks.

    ``heuristics`` are those that may soften a verdict, of those that can be switched off.
    With ``low_memory`` references are followed in the core itself and not collected: the same verdicts with about two
    thirds less memory, in two to four times the time.
    """
    index = heap.chunks.index
    mask = address_mask_of(core)
    memory = _memory_with_content(core)
    edges = None
    if not low_memory:
        progress("collecting references", 0, None)
        edges = collect_edges(index, memory, mask)
    progress("searching roots", 0, None)
    roots = find_roots(core, _claimed(heap), _remainder(heap))
    strong, weak, summaries = _root_references(roots.ranges, index, memory, mask)
    registers, thread_words = (_held_by(values, index, mask) for values in (roots.registers, roots.thread_words))
    summaries = (
        *summaries,
        RootSummary(RootKind.REGISTER, 0, len(np.unique(registers.target & np.uint32(CHUNK_MASK)))),
    )
    progress("marking reachable chunks", 0, None)
    # What a chunk holds that was cut off is as unknown as a root that is missing.
    mapped = index.mmapped
    missing = roots.missing_bytes + missing_bytes_within(core, *_blocks_of(index))
    missing += missing_bytes_within(core, mapped.mapping_start, mapped.mapping_start + mapped.mapping_bytes)
    no_registers = not len(core.thread_table)
    follower = _Follower(index, memory, mask, edges)
    reached = _reach(
        follower,
        np.concatenate([strong.target, thread_words.target]),
        np.concatenate([weak.target, registers.target]),
    )
    missing_shared = _missing_shared_bytes(core)
    heuristic = np.zeros(index.chunk_count, np.uint8)
    by_pattern: HeldByPatterns | None = None
    if heuristics:
        progress("looking for known patterns", 0, None)
        ranges = roots.ranges.without_weak()
        by_pattern = held_by_patterns(
            Reached(core, index, memory, mask, edges, ranges.start, ranges.end, reached.strong, reached.any_strong),
            heuristics,
        )
        heuristic[by_pattern.chunks] = by_pattern.heuristic
    lost = follower.leaders(reached.lost)
    progress("looking for other holders", 0, None)
    unseen = Unseen(
        core, index, memory, roots.ranges.start, roots.ranges.end, reached.lost,
        partial(follower.edges_of, reached.lost), missing_shared,
    )  # fmt: skip
    perhaps = may_be_held(unseen, lost, heuristics)
    heuristic[perhaps.chunks] = perhaps.heuristic
    lost = perhaps.lost
    verdict = _verdicts(index.state, reached, lost, roots_are_missing=bool(missing) or no_registers)
    verdict[perhaps.chunks] = Verdict.POSSIBLY_LOST
    if by_pattern is not None:
        verdict[by_pattern.chunks] = Verdict.STILL_REACHABLE
    gaps = []
    if missing or no_registers:
        gaps.append(
            Gap(
                "roots_missing",
                f"{missing} bytes of writable memory"
                + (" and all registers" if no_registers else "")
                + " are not in the core; a pointer there could hold any chunk, so nothing is called definitely lost",
            )
        )
    return ReferenceGraph(
        core, heap, index, memory, edges, roots, strong, weak, registers, thread_words, verdict, lost, summaries,
        missing, missing_shared, tuple(gaps), heuristic if heuristic.any() else None,
        by_pattern.inside if by_pattern is not None else None,
    )  # fmt: skip


def _memory_with_content(core: Core) -> MemoryMap:
    """The saved runs without the holes of the file, where no pointer can be and reading would fill the page cache."""
    memory = core.memory
    start, end, offset = memory.populated_runs()
    return MemoryMap(memory.file, start, end, offset)


def _blocks_of(index: ChunkIndex) -> tuple[UInt64s, UInt64s]:
    """Start and end of the regions without their top, in which nothing points anywhere."""
    end = index.region_end.copy()
    last = index.region_first_chunk + index.region_chunk_count - 1
    at_top = np.flatnonzero(index.state[last] == ChunkState.TOP)
    end[at_top] = chunk_extents(index, last[at_top])[0]
    return index.region_start, end


def _claimed(heap: HeapSnapshot) -> tuple[UInt64s, UInt64s]:
    """All ranges that are the heap's, sorted and without overlap."""
    index = heap.chunks.index
    sub_heaps = [sub_heap for arena in heap.arenas for sub_heap in arena.sub_heaps]
    others = [(heap_.address, heap_.address + heap_.reserved_bytes) for heap_ in sub_heaps]
    others += [(arena.brk_range.start, arena.brk_range.end) for arena in heap.arenas if arena.brk_range is not None]
    others += [(own.start, own.end) for own in heap.own_ranges]
    column = np.array(others, np.uint64).reshape(-1, 2)
    start = np.concatenate([index.region_start, index.mmapped.mapping_start, column[:, 0]])
    end = np.concatenate([index.region_end, index.mmapped.mapping_start + index.mmapped.mapping_bytes, column[:, 1]])
    return without_overlap(start, end)


def _remainder(heap: HeapSnapshot) -> tuple[UInt64s, UInt64s]:
    """Heap memory without chunks, and what damaged chunks cover: it may hold pointers of chunks that are not known.

    Sorted and without overlap.
    """
    parts = [(part.range.start, part.range.end) for arena in heap.arenas for part in arena.unattributed]
    column = np.array(parts, np.uint64).reshape(-1, 2)
    damaged = np.flatnonzero(heap.chunks.index.state == ChunkState.DAMAGED)
    header, chunk_bytes = chunk_extents(heap.chunks.index, damaged.astype(np.int64))
    start, end = np.concatenate([column[:, 0], header]), np.concatenate([column[:, 1], header + chunk_bytes])
    return without_overlap(start, np.minimum(end, np.uint64(ADDRESS_LIMIT)))


def _root_references(
    ranges: RootRanges, index: ChunkIndex, memory: MemoryMap, mask: int
) -> tuple[RootReferences, RootReferences, tuple[RootSummary, ...]]:
    words = (index.chunk_count + 63) // 64
    found: dict[bool, list[RootReferences]] = {False: [], True: []}
    summaries = []
    seen = {is_weak: (np.zeros(words, np.uint64), np.zeros(words, np.uint64)) for is_weak in (False, True)}
    for kind in RootKind:
        start, end = ranges.of(kind)
        if kind is RootKind.REGISTER:
            continue
        part = find_root_references(index, memory, start, end, mask, *seen[kind.is_weak])
        found[kind.is_weak].append(part)
        summaries.append(RootSummary(kind, ranges.bytes_of(kind), len(part.target)))
    strong, weak = (
        RootReferences(
            np.concatenate([part.holder_address for part in found[is_weak]]),
            np.concatenate([part.target for part in found[is_weak]]),
        )
        for is_weak in (False, True)
    )
    return strong, weak, tuple(summaries)


def _held_by(values: RootValues, index: ChunkIndex, mask: int) -> HeldByValue:
    header_bytes = np.uint64(index.geometry.header_bytes)
    place = values.value & np.uint64(mask)
    rows = np.flatnonzero(place >= header_bytes)
    place = place[rows] - header_bytes
    chunk = find_chunks(index, place, False)
    exact = find_chunks(index, place, True) == chunk
    held = chunk >= 0
    target = chunk[held].astype(np.uint32)
    target[~exact[held]] |= np.uint32(INTERIOR)
    return HeldByValue(rows[held], target)


def _missing_shared_bytes(core: Core) -> int:
    """Writable shared mappings of files that are not saved; the core does not tell shared from private, so all that is
    mapped from a file, writable, and no module's."""
    memory = core.memory
    is_left_out = (memory.region_backing != Backing.SAVED) & ((memory.region_flags & 2) != 0)
    is_mapped_file = memory.region_file_index >= 0
    modules = np.array([(module.start, module.end) for module in core.modules], np.uint64).reshape(-1, 2)
    in_module = row_holding(memory.region_start, *without_overlap(modules[:, 0], modules[:, 1]))[1]
    missing = is_left_out & is_mapped_file & ~in_module
    return int((memory.region_end[missing] - memory.region_start[missing]).sum())


@dataclass(frozen=True, slots=True)
class _Follower:
    """Follows references: the collected ones, or without them the words of the core."""

    index: ChunkIndex
    memory: MemoryMap
    mask: int
    edges: Edges | None

    def mark(self, seeds: UInt32s, marked: UInt64s, interior: UInt64s, *, any_pointer: bool) -> None:
        """Marks what the seeds lead to; see ``mark_reachable``."""
        if self.edges is not None:
            mark_reachable(self.edges, seeds, marked, interior, any_pointer)
        else:
            mark_reachable_directly(self.index, self.memory, self.mask, seeds, marked, interior, any_pointer)

    def edges_of(self, lost: UInt64s) -> Edges:
        """References in which at least those of the lost are."""
        if self.edges is not None:
            return self.edges
        return collect_edges(with_only(self.index, lost), self.memory, self.mask)

    def leaders(self, lost: UInt64s) -> LostChunks:
        """Who leads the lost."""
        return find_leaders(self.edges_of(lost), lost)


@dataclass(frozen=True, slots=True)
class _Reach:
    """What the four searches met, one bit a chunk: each has what the ones before met that it goes on from."""

    strong: UInt64s
    held: UInt64s
    any_strong: UInt64s
    any_weak: UInt64s
    lost: UInt64s
    """Chunks in use that none met."""


def _reach(follower: _Follower, strong: UInt32s, weak: UInt32s) -> _Reach:
    state = follower.index.state
    words = (len(state) + 63) // 64
    reachable = np.zeros(words, np.uint64)
    inside_of_reachable = np.zeros(words, np.uint64)
    follower.mark(_exact(strong), reachable, inside_of_reachable, any_pointer=False)
    held = reachable.copy()
    inside_of_held = np.zeros(words, np.uint64)
    follower.mark(_exact(weak), held, inside_of_held, any_pointer=False)
    any_strong = reachable.copy()
    seeds = np.concatenate([_interior(strong), positions_of(inside_of_reachable & ~reachable)])
    follower.mark(seeds, any_strong, inside_of_reachable, any_pointer=True)
    any_weak = held | any_strong
    seeds = np.concatenate([_interior(weak), positions_of(inside_of_held & ~any_weak)])
    follower.mark(seeds, any_weak, inside_of_held, any_pointer=True)
    return _Reach(reachable, held, any_strong, any_weak, bits_of(state == ChunkState.IN_USE) & ~any_weak)


def _verdicts(state: UInt8s, reach: _Reach, lost: LostChunks, *, roots_are_missing: bool) -> UInt8s:
    verdict = np.empty(len(state), np.uint8)
    # In use and met by no search, a chunk is lost; what a later one of these says outweighs the earlier.
    lost_as = Verdict.POSSIBLY_LOST if roots_are_missing else Verdict.INDIRECTLY_LOST
    met_as = (
        (reach.any_weak, Verdict.WEAKLY_HELD),
        (reach.any_strong, Verdict.POSSIBLY_LOST),
        (reach.held, Verdict.WEAKLY_HELD),
        (reach.strong, Verdict.STILL_REACHABLE),
    )
    for first in range(0, len(state), BATCH_CHUNKS):
        part = verdict[first : first + BATCH_CHUNKS]
        part.fill(lost_as)
        for bits, meaning in met_as:
            np.copyto(part, np.uint8(meaning), where=unpacked(bits, first, len(part)))
        part *= state[first : first + BATCH_CHUNKS] == ChunkState.IN_USE
    if not roots_are_missing:
        verdict[lost.leader] = Verdict.DEFINITELY_LOST
    return verdict


def _exact(targets: UInt32s) -> UInt32s:
    return targets[targets < np.uint32(INTERIOR)]


def _interior(targets: UInt32s) -> UInt32s:
    return targets[targets >= np.uint32(INTERIOR)] & np.uint32(CHUNK_MASK)
