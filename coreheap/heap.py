"""The heap of one process as plain values: arenas, sub-heaps, chunks, lists, and their sums.

Knows: the words of glibc's malloc and the shape of the data. Does not know: how any of it was found
(``allocators``) or how it is shown (``render``).

Chunks are columns, never objects: see ``ChunkTable``. Objects exist per arena, sub-heap, region and thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from coreheap.evidence import Anomaly, Confidence, Evidence, Gap
from coreheap.kernels import ChunkIndex, unpack_chunks
from coreheap.kernels import ChunkState as ChunkState
from coreheap.quantities import AddressRange

UInt64s = npt.NDArray[np.uint64]
UInt8s = npt.NDArray[np.uint8]

NO_INDEX = -1
"""An arena or sub-heap index of a chunk that belongs to none (mmapped chunks; the main arena has no sub-heaps)."""

BATCH_WORDS = 1 << 14
"""Lookup words a batch: at most about a million granules, some hundred thousand chunks."""

BATCH_ROWS = 1 << 18
"""Mmapped chunks a batch."""

IN_KNOWN_BLOCKS = "block_"
"""How the causes of gaps begin that are holes in known blocks: no chunk is missing there, and nothing of malloc's own data."""
NOTHING_LEFT_OUT = ("block_unmapped", "block_other_mapping")
"""Those where the process itself has no memory of malloc's any more."""


LISTED_FREE_STATES = (
    ChunkState.TCACHE,
    ChunkState.FASTBIN,
    ChunkState.UNSORTED_BIN,
    ChunkState.SMALL_BIN,
    ChunkState.LARGE_BIN,
)
BINNED_STATES = (ChunkState.UNSORTED_BIN, ChunkState.SMALL_BIN, ChunkState.LARGE_BIN)


@dataclass(frozen=True, slots=True)
class StateTotal:
    """How many chunks of one state, and their bytes.

    ``chunk_bytes`` counts headers, ``usable_bytes`` what malloc_usable_size would say in sum
    (0 for fenceposts and damaged stretches, which nobody can use).
    """

    count: int = 0
    chunk_bytes: int = 0
    usable_bytes: int = 0

    def __add__(self, other: StateTotal) -> StateTotal:
        return StateTotal(
            self.count + other.count,
            self.chunk_bytes + other.chunk_bytes,
            self.usable_bytes + other.usable_bytes,
        )


StateTotals = dict[ChunkState, StateTotal]


def sum_of_totals(parts: Iterator[StateTotals]) -> StateTotals:
    """Totals of several heaps added up; every state is present, with zeros where nothing has it."""
    nothing = StateTotal()
    totals = dict.fromkeys(ChunkState, nothing)
    for part in parts:
        for state, total in part.items():
            # Most heaps have chunks of few states, and there may be many heaps.
            if total.count:
                held = totals[state]
                totals[state] = total if held is nothing else held + total
    return totals


class RegionKind(IntEnum):
    """How a stretch of chunks came from the system."""

    BRK = 0
    MMAP_PIECE = 1
    """The main arena's continuation by mmap, or its whole in a namespace that must not use brk."""
    ARENA_HEAP = 2
    """The chunks of one sub-heap of a non-main arena."""


@dataclass(frozen=True, slots=True)
class ChunkRegion:
    """A stretch of memory that chunks tile without holes, [range.start, range.end).

    ``sub_heap`` is the index within the arena's ``sub_heaps``, NO_INDEX for the main arena.
    ``proven_to_end`` is False when the walk had to stop early (unsaved memory, damage).
    """

    index: int
    kind: RegionKind
    arena: int
    sub_heap: int
    range: AddressRange
    first_chunk: int
    chunk_count: int
    totals: StateTotals
    proven_to_end: bool = True


@dataclass(frozen=True, slots=True)
class SubHeap:
    """One reservation of a non-main arena (glibc's heap_info).

    ``committed_bytes`` is heap_info.size: what the arena may use. ``mprotect_bytes`` is the part ever made
    accessible, at least committed_bytes. ``reserved_bytes`` is the address space taken (64 MiB on 64-bit by default).
    ``overhead_bytes`` are heap_info, and in the first heap malloc_state, up to the first chunk.
    """

    address: int
    committed_bytes: int
    mprotect_bytes: int
    reserved_bytes: int
    overhead_bytes: int
    is_first: bool
    saved_bytes: int
    populated_bytes: int | None

    @property
    def range(self) -> AddressRange:
        return AddressRange(self.address, self.address + self.committed_bytes)


@dataclass(frozen=True, slots=True)
class UnattributedRange:
    """Heap memory that no chunk could be assigned to, and why (``not_saved``, ``truncated``, ``unproven``, ``foreign_sbrk``)."""

    range: AddressRange
    cause: str


@dataclass(frozen=True, slots=True)
class Arena:
    """One malloc_state and everything that hangs from it.

    ``attached_threads`` is malloc_state's own counter, None where the layout has none (before glibc 2.23) or it was
    not saved; ``threads`` are indexes of threads whose thread_arena points here. ``locked`` is True when the mutex
    was taken at the dump. ``coverage`` is the share of the arena's system_mem that the core holds and the walk covered.
    Fields of malloc_state are None where the core does not hold it (``address`` too, where nothing points to it).
    """

    index: int
    address: int | None
    is_main: bool
    is_contiguous: bool | None
    locked: bool | None
    attached_threads: int | None
    threads: tuple[int, ...]
    on_free_list: bool | None
    system_mem: int | None
    max_system_mem: int | None
    top_address: int | None
    top_bytes: int | None
    sub_heaps: tuple[SubHeap, ...]
    regions: tuple[int, ...]
    totals: StateTotals
    unattributed: tuple[UnattributedRange, ...]
    brk_range: AddressRange | None
    """From sbrk_base to the end of top, for a main arena that grows by brk; None for others."""
    foreign_bytes: int
    """Bytes that system_mem counts but that other callers of sbrk own, with what malloc skips around them to align."""
    saved_bytes: int
    coverage: float | None
    copy: int = 0
    """Which copy of malloc the arena belongs to, an index of ``HeapSnapshot.copies``; 0 is the program's own."""

    @property
    def reserved_bytes(self) -> int | None:
        """Address space taken: sub-heap reservations, or system_mem for the main arena (None: unknown)."""
        return self.system_mem if self.is_main else sum(heap.reserved_bytes for heap in self.sub_heaps)

    def bytes_in(self, *states: ChunkState) -> int:
        return sum(self.totals[state].chunk_bytes for state in states)


@dataclass(frozen=True, slots=True)
class FreeList:
    """One free list of an arena (fastbin, bin) or of a thread's tcache, as it was walked.

    ``kind`` is the state its chunks got, ``number`` glibc's index within that kind of list; ``chunk_bytes_low`` and
    ``_high`` the chunk sizes that belong there. ``recorded_count`` is the allocator's own counter (tcache), None where it keeps none.
    ``error`` is "" for a list that was walked to its end, else a code of ``kernels.codes``.
    """

    kind: ChunkState
    number: int
    arena: int | None
    thread_cache: int | None
    chunk_bytes_low: int
    chunk_bytes_high: int
    count: int
    chunk_bytes: int
    recorded_count: int | None = None
    error: str = ""
    error_address: int | None = None


@dataclass(frozen=True, slots=True)
class ThreadCache:
    """One tcache_perthread_struct.

    ``thread`` is the index of the owning thread; None for one that outlived its thread (fork child), which is found by
    the thread descriptor that still points to it. ``address`` is the payload address of the struct's own chunk.
    """

    index: int
    address: int
    thread: int | None
    arena: int | None
    count: int
    chunk_bytes: int
    copy: int = 0


@dataclass(frozen=True, slots=True)
class MallocParameters:
    """glibc's malloc_par (``mp_``) as it stood. Fields that the release does not have, or that were not saved, are None."""

    address: int
    layout: str
    values: dict[str, int]

    def value(self, name: str) -> int | None:
        return self.values.get(name)


@dataclass(frozen=True, slots=True)
class MallocCopy:
    """One malloc of a process: libc's in the program's own namespace, in one of dlmopen's, or libc_malloc_debug's.

    Each has its own main arena, ring of arenas, ``mp_`` and tcaches. ``module`` is the file that ``main_arena`` lies in, None
    where that is unknown. ``system_mem`` is the sum over its arenas, None where one was not saved.
    """

    number: int
    main_arena: int | None
    module: str | None
    parameters: MallocParameters | None
    arena_count: int
    system_mem: int | None
    evidence: tuple[Evidence, ...]
    confidence: Confidence


@dataclass(frozen=True, slots=True)
class AllocatorIdentity:
    """Which allocator, where its globals are, and how that is known.

    ``layout`` names the winning set of structure layouts, ``runner_up`` the next best with both scores, for the report.
    ``libc_version`` comes from a version banner or file; None when nothing in the core or at hand says it.
    ``main_arena`` is None where no saved pointer leads to it, ``mp`` None where malloc_par was not found.
    """

    name: str
    libc_version: str | None
    layout: str
    runner_up: str | None
    main_arena: int | None
    mp: int | None
    evidence: tuple[Evidence, ...]
    confidence: Confidence


@dataclass(frozen=True, slots=True)
class ChunkBatch:
    """A stretch of rows of the chunk table, as columns of equal length.

    ``header_address``, ``payload_address``, ``chunk_bytes``, ``usable_bytes``: uint64; ``state``: uint8;
    ``arena`` and ``sub_heap`` are the same for the whole batch (NO_INDEX: none); ``is_mmapped`` likewise.
    ``first_chunk`` is the chunk index of row 0.
    """

    first_chunk: int
    header_address: UInt64s
    payload_address: UInt64s
    chunk_bytes: UInt64s
    usable_bytes: UInt64s
    state: UInt8s
    arena: int
    sub_heap: int
    is_mmapped: bool
    verdict: UInt8s | None = None

    def __len__(self) -> int:
        return len(self.header_address)


@dataclass(frozen=True, slots=True)
class ChunkTable:
    """Every chunk of the process, by chunk index: region chunks in address order, then mmapped chunks in address order.

    Nothing is stored per chunk but its start bit and its state; addresses and sizes are made a batch at a time.
    ``mmapped_overhead_bytes``: bytes of an mmapped chunk's size that the user cannot have (two words up to 2.42, one
    from 2.43, where the size leaves the other out).
    """

    index: ChunkIndex
    regions: tuple[ChunkRegion, ...]
    word_bytes: int
    mmapped_overhead_bytes: int
    verdict: UInt8s | None = None
    """A ``leaks.Verdict`` for each chunk, uint8[chunks]; None where leaks were not looked for."""

    def __len__(self) -> int:
        return self.index.chunk_count

    @property
    def mmapped_state(self) -> UInt8s:
        """States of the mmapped chunks, uint8[n]; in_use, or from glibc 2.43 also tcache."""
        return self.index.state[self.index.region_chunks :]

    @property
    def mmapped_usable_bytes(self) -> UInt64s:
        """What malloc_usable_size says for each mmapped chunk, uint64[n]."""
        return self.index.mmapped.chunk_bytes - np.uint64(self.mmapped_overhead_bytes)

    def batches(self) -> Iterator[ChunkBatch]:
        """All rows in index order, in batches of bounded size; a batch never spans two regions."""
        header_bytes = np.uint64(2 * self.word_bytes)
        for region in self.regions:
            row = region.first_chunk
            words = self.index.word_count(region.index)
            for first_word in range(0, words, BATCH_WORDS):
                header, chunk_bytes = unpack_chunks(
                    self.index, region.index, first_word, min(words, first_word + BATCH_WORDS)
                )
                if not len(header):
                    continue
                state = self.index.state[row : row + len(header)]
                yield ChunkBatch(
                    row,
                    header,
                    header + header_bytes,
                    chunk_bytes,
                    usable_bytes_of(chunk_bytes, state, self.word_bytes),
                    state,
                    region.arena,
                    region.sub_heap,
                    False,
                    self._verdicts(row, len(header)),
                )
                row += len(header)
        mmapped = self.index.mmapped
        for first in range(0, len(mmapped), BATCH_ROWS):
            rows = slice(first, first + BATCH_ROWS)
            header = mmapped.header_address[rows]
            yield ChunkBatch(
                self.index.region_chunks + first,
                header,
                header + header_bytes,
                mmapped.chunk_bytes[rows],
                self.mmapped_usable_bytes[rows],
                self.mmapped_state[rows],
                NO_INDEX,
                NO_INDEX,
                True,
                self._verdicts(self.index.region_chunks + first, len(header)),
            )

    def _verdicts(self, first: int, count: int) -> UInt8s | None:
        return None if self.verdict is None else self.verdict[first : first + count]


def usable_bytes_of(chunk_bytes: UInt64s, state: UInt8s, word_bytes: int) -> UInt64s:
    """What malloc_usable_size says for chunks of a heap (not mmapped): all but the size word; 0 for fenceposts and damage.

    The next chunk's prev_size word belongs to the user while the chunk is in use (glibc malloc.c, all releases).
    """
    usable = chunk_bytes - np.uint64(word_bytes)
    usable[(state == ChunkState.FENCEPOST) | (state == ChunkState.DAMAGED)] = 0
    return usable


@dataclass(frozen=True, slots=True)
class HeapSnapshot:
    """One allocator's whole heap. ``totals`` and ``mmapped_total`` are sums over all arenas and over mmapped chunks."""

    identity: AllocatorIdentity
    parameters: MallocParameters | None
    arenas: tuple[Arena, ...]
    chunks: ChunkTable
    free_lists: tuple[FreeList, ...]
    thread_caches: tuple[ThreadCache, ...]
    narenas_limit: int | None
    limit_reason: str
    anomalies: tuple[Anomaly, ...]
    anomaly_count: int
    gaps: tuple[Gap, ...]
    totals: StateTotals
    own_ranges: tuple[AddressRange, ...] = ()
    """The allocator's own globals outside of its heap (malloc_state, malloc_par): what they point to is not held by them."""
    mmapped_totals: StateTotals = field(default_factory=dict)
    mmapped_count: int = 0
    mmapped_bytes: int = 0
    copies: tuple[MallocCopy, ...] = ()
    """Every malloc of the process, the program's own first; mmapped chunks are counted against all of them together."""

    @property
    def main_arena(self) -> Arena | None:
        """The main arena of the program's own malloc; None where nothing of it could be found."""
        return next((arena for arena in self.arenas if arena.is_main), None)
