"""The reference graph of a heap: who points to whom, what the roots lead to, and the verdict on every chunk in use.

Knows: chunks, roots, reachability. Does not know: allocators, or what a chunk holds.

Four searches, each after what is left by the one before: from strong roots along pointers to payload starts
(still reachable), from registers and stacks in the same way (weakly held), from strong roots along any pointers (possibly
lost), from registers and stacks along any (weakly held). What none meets is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

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
from coreheap.leaks import RootKind, RootSummary, Verdict
from coreheap.references.ranges import ADDRESS_LIMIT, RootRanges
from coreheap.references.roots import Roots, RootValues, find_roots, missing_bytes_within

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]
UInt8s = npt.NDArray[np.uint8]

ADDRESS_MASKS = {"aarch64": (1 << 56) - 1}
"""The top byte of a pointer is the program's own there (arch/arm64, Tagged virtual addresses); other machines compare all bits."""
BATCH_CHUNKS = 1 << 20


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
) -> ReferenceGraph:
    """All references of a heap, and the verdicts. Raises OverflowError for more than 2**31 - 1 chunks.

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
    verdict, lost = _verdicts(
        _Follower(index, memory, mask, edges),
        np.concatenate([strong.target, thread_words.target]),
        np.concatenate([weak.target, registers.target]),
        roots_are_missing=bool(missing) or no_registers,
    )
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
        missing, _missing_shared_bytes(core), tuple(gaps),
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

    def leaders(self, lost: UInt64s) -> LostChunks:
        """Who leads the lost; only their own references are collected for it."""
        if self.edges is not None:
            return find_leaders(self.edges, lost)
        of_lost = copy(self.index)
        is_lost = _unpacked(lost, 0, self.index.chunk_count)
        of_lost.state = np.where(is_lost, np.uint8(ChunkState.IN_USE), np.uint8(ChunkState.FREE_UNLISTED))
        return find_leaders(collect_edges(of_lost, self.memory, self.mask), lost)


def _verdicts(
    follower: _Follower, strong: UInt32s, weak: UInt32s, *, roots_are_missing: bool
) -> tuple[UInt8s, LostChunks]:
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
    lost_bits = bits_of(state == ChunkState.IN_USE) & ~any_weak
    lost = follower.leaders(lost_bits)
    verdict = np.empty(len(state), np.uint8)
    # In use and met by no search, a chunk is lost; what a later one of these says outweighs the earlier.
    lost_as = Verdict.POSSIBLY_LOST if roots_are_missing else Verdict.INDIRECTLY_LOST
    met_as = (
        (any_weak, Verdict.WEAKLY_HELD),
        (any_strong, Verdict.POSSIBLY_LOST),
        (held, Verdict.WEAKLY_HELD),
        (reachable, Verdict.STILL_REACHABLE),
    )
    for first in range(0, len(state), BATCH_CHUNKS):
        part = verdict[first : first + BATCH_CHUNKS]
        part.fill(lost_as)
        for bits, meaning in met_as:
            np.copyto(part, np.uint8(meaning), where=_unpacked(bits, first, len(part)))
        part *= state[first : first + BATCH_CHUNKS] == ChunkState.IN_USE
    if not roots_are_missing:
        verdict[lost.leader] = Verdict.DEFINITELY_LOST
    return verdict, lost


def _exact(targets: UInt32s) -> UInt32s:
    return targets[targets < np.uint32(INTERIOR)]


def _interior(targets: UInt32s) -> UInt32s:
    return targets[targets >= np.uint32(INTERIOR)] & np.uint32(CHUNK_MASK)


def bits_of(column: npt.NDArray[np.bool_]) -> UInt64s:
    """One bit a row, uint64[rows / 64, rounded up]."""
    packed = np.packbits(column, bitorder="little")
    padded = np.zeros((len(column) + 63) // 64 * 8, np.uint8)
    padded[: len(packed)] = packed
    return padded.view(np.uint64)


def bits_of_positions(positions: UInt32s, rows: int) -> UInt64s:
    """One bit a row, set at the positions."""
    bits = np.zeros((rows + 63) // 64, np.uint64)
    np.bitwise_or.at(bits, positions >> np.uint32(6), np.uint64(1) << (positions & np.uint32(63)).astype(np.uint64))
    return bits


def _unpacked(bits: UInt64s, first: int, count: int) -> npt.NDArray[np.bool_]:
    """The bits of rows [first, first + count) as bools; ``first`` is a multiple of 64."""
    part = bits[first // 64 : (first + count + 63) // 64]
    return np.unpackbits(part.view(np.uint8), count=count, bitorder="little").view(np.bool_)


def positions_of(bits: UInt64s) -> UInt32s:
    """The rows whose bit is set, ascending."""
    words = np.flatnonzero(bits)
    parts = [np.empty(0, np.uint32)]
    for batch in _batches(words):
        set_bits = np.unpackbits(bits[batch].view(np.uint8), bitorder="little").reshape(-1, 64)
        row, bit = np.nonzero(set_bits)
        parts.append((batch[row] * 64 + bit).astype(np.uint32))
    return np.concatenate(parts)


def _batches(rows: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    for first in range(0, len(rows), BATCH_CHUNKS // 64):
        yield rows[first : first + BATCH_CHUNKS // 64]
