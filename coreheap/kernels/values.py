"""What kernels take and return: plain frozen values over numpy arrays.

Knows: shapes, dtypes and units. Does not know: glibc's versions, arenas, or files.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coreheap.kernels.codes import StopReason

UInt64Array: TypeAlias = NDArray[np.uint64]
Int64Array: TypeAlias = NDArray[np.int64]
UInt8Array: TypeAlias = NDArray[np.uint8]
UInt32Array: TypeAlias = NDArray[np.uint32]
Memory: TypeAlias = bytes | bytearray | memoryview | mmap.mmap | UInt8Array
"""Contiguous bytes, read-only or not, of any alignment."""


ADDRESS_LIMIT = 1 << 63
"""Memory of a Linux process lies below; kernels refuse starts of memory at or above, so that sums cannot wrap."""
OFFSET_LIMIT = 1 << 62
"""No region is larger, so that sums of two offsets cannot wrap."""


NO_WORD: Final = (1 << 64) - 1
"""Stands for a word that is not known; no address and no link of a list is that."""


@dataclass(frozen=True, slots=True)
class ChunkGeometry:
    """The sizes that malloc chunks of one process are made of, all in bytes.

    ``alignment`` is MALLOC_ALIGNMENT, also called a granule; header addresses are ``granule_phase`` modulo it.
    The size word lies ``word_bytes`` into a chunk, its low three bits are flags.
    """

    word_bytes: int
    alignment: int
    minimum_chunk_bytes: int
    granule_phase: int

    def __post_init__(self) -> None:
        if self.word_bytes not in (4, 8):
            raise ValueError(f"a word has 4 or 8 bytes, not {self.word_bytes}")
        if self.alignment not in (8, 16) or self.alignment < 2 * self.word_bytes:
            raise ValueError(f"chunks cannot be aligned to {self.alignment} bytes")
        if self.minimum_chunk_bytes <= 2 * self.word_bytes or self.minimum_chunk_bytes % self.alignment:
            raise ValueError(f"the smallest chunk cannot have {self.minimum_chunk_bytes} bytes")
        if self.granule_phase not in range(0, self.alignment, self.word_bytes):
            raise ValueError(f"chunk headers cannot lie at {self.granule_phase} modulo {self.alignment}")

    @property
    def header_bytes(self) -> int:
        """Bytes from a chunk's header to its payload: prev_size and size."""
        return 2 * self.word_bytes


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """Which bytes of the address space a buffer holds.

    ``file``: uint8[any]; ``run_start``, ``run_end``: uint64[n], sorted, without overlap; ``run_file_offset``:
    uint64[n], where the run's first byte lies in ``file``. Kernels check every read against both. A word that crosses
    from one run to the next counts as not saved.
    """

    file: UInt8Array
    run_start: UInt64Array
    run_end: UInt64Array
    run_file_offset: UInt64Array

    def __post_init__(self) -> None:
        starts, ends = self.run_start, self.run_end
        if not len(starts) == len(ends) == len(self.run_file_offset):
            raise ValueError("the columns of a memory map differ in length")
        if np.any(ends < starts) or np.any(starts[1:] < ends[:-1]):
            raise ValueError("the runs of a memory map are not sorted, or they overlap")


@dataclass(frozen=True, slots=True)
class WalkOutcome:
    """How a walk over a region ended.

    ``chunk_count`` counts chunks set by this call, fenceposts and top included. ``end_offset`` is where the last of
    them ends, and where a BROKEN, CUT or NO_ROOM chunk would begin. ``anomaly_count`` may exceed the rows that the
    anomaly buffer had room for.
    """

    chunk_count: int
    end_offset: int
    stop_reason: StopReason
    anomaly_count: int


@dataclass(frozen=True, slots=True)
class ChainOutcome:
    """How far a chain of consistent chunks reaches; ``chunk_count`` counts neither fenceposts nor top."""

    end_offset: int
    stop_reason: StopReason
    chunk_count: int


@dataclass(frozen=True, slots=True)
class OverlayOutcome:
    """What laying free lists over a walk found; arrays have one row a list unless said otherwise.

    ``count`` (int64) and ``byte_count`` (uint64): chunks that got the list's state. ``error_code`` (uint8, a
    ``ListError``) and ``error_address`` (uint64): the first error, NONE and 0 for a sound list. ``stop_code`` (uint8):
    the error that ended the walk of the list, NONE where it reached its proper end. ``error_count``: int64.

    ``closed`` (bool): whether every chunk of the list was found, along ``bk`` where ``fd`` is broken.

    ``errors``: uint64[k, 7], the first errors of all lists in the order found, with the columns list, code, address,
    address of the word that held the pointer (0: the head), position within the list (0: the first chunk), address of the
    word that is wrong (0: the head; NO_WORD: no single one), what it should hold (NO_WORD: unknown).
    ``error_total`` may exceed k.
    """

    count: Int64Array
    byte_count: UInt64Array
    error_code: UInt8Array
    error_address: UInt64Array
    stop_code: UInt8Array
    error_count: Int64Array
    errors: UInt64Array
    error_total: int
    closed: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ArenaCandidates:
    """Words that look like parts of a malloc_state; addresses, uint64, ascending.

    ``self_pairs``: x where the words at x and x + word both hold x - 2 words (the list head of an empty bin).
    ``next_hits``: x where x minus the word at x is one of the asked distances. ``truncated``: a list was full.
    """

    self_pairs: UInt64Array
    next_hits: UInt64Array
    truncated: bool


@dataclass(frozen=True, slots=True)
class MmappedChunks:
    """Chunks that have a mapping of their own; uint64 columns, ascending by header address.

    ``chunk_bytes`` is the size in the header, ``mapping_bytes`` the length of the whole mapping.
    """

    header_address: UInt64Array
    mapping_start: UInt64Array
    mapping_bytes: UInt64Array
    chunk_bytes: UInt64Array
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.header_address)


@dataclass(frozen=True, slots=True)
class ChunkRuns:
    """Stretches of memory that consistent chunks tile; columns of equal length, ascending.

    ``start_offset`` and ``end_offset`` (int64) count from the start of the memory, ``stop_reason`` is uint8,
    ``chunk_count`` (int64) counts neither fenceposts nor top.
    """

    start_offset: Int64Array
    end_offset: Int64Array
    stop_reason: UInt8Array
    chunk_count: Int64Array
    truncated: bool

    def __len__(self) -> int:
        return len(self.start_offset)


@dataclass(frozen=True, slots=True)
class FreeRuns:
    """Runs of consecutive free chunks of one region that hold a whole page or top; columns of equal length, ascending.

    ``start``, ``end``: uint64 addresses; ``first_chunk``, ``end_chunk``: int64, the chunks [first, end) of the index;
    ``free_bytes_before`` (uint64), ``free_count_before`` (int64): free bytes and chunks of the region below the run, in
    runs that are not listed too; ``has_top``: bool. ``run_count``, ``free_count``, ``free_bytes`` are of all runs,
    ``largest_bytes`` of the largest free chunk but top.
    """

    start: UInt64Array
    end: UInt64Array
    first_chunk: Int64Array
    end_chunk: Int64Array
    free_bytes_before: UInt64Array
    free_count_before: Int64Array
    has_top: NDArray[np.bool_]
    run_count: int
    free_count: int
    free_bytes: int
    largest_bytes: int

    def __len__(self) -> int:
        return len(self.start)


def no_mmapped_chunks() -> MmappedChunks:
    """An empty table of mmapped chunks."""
    empty = np.empty(0, np.uint64)
    return MmappedChunks(empty, empty, empty, empty)


INTERIOR: Final = 1 << 31
"""Set in a reference's target where the pointer leads into a chunk, not to its payload's start."""
CHUNK_MASK: Final = INTERIOR - 1
"""The part of a reference's target that is a chunk index; graphs end at 2**31 chunks."""


@dataclass(frozen=True, slots=True)
class Edges:
    """References between chunks, one row a chunk (CSR): those of chunk c are ``target[first[c]:first[c + 1]]``.

    ``first``: uint32[chunks + 1], or uint64 where there are too many. ``target``: uint32[references], a chunk index,
    with INTERIOR where it is not the payload's start that is pointed to.
    """

    first: UInt32Array | UInt64Array
    target: UInt32Array

    @property
    def chunk_count(self) -> int:
        return len(self.first) - 1

    def of(self, chunk: int) -> UInt32Array:
        """The targets of one chunk, in the order of the words that hold them."""
        return self.target[int(self.first[chunk]) : int(self.first[chunk + 1])]


@dataclass(frozen=True, slots=True)
class RootReferences:
    """Words outside of all chunks that lead to chunks, in the order in which they were found.

    ``holder_address``: uint64[n], where the word lies; ``target``: uint32[n] as in ``Edges``.
    """

    holder_address: UInt64Array
    target: UInt32Array


@dataclass(frozen=True, slots=True)
class PointersFound:
    """Words that lead to some chunks, in the order in which they were found; columns of equal length.

    ``holder_address``: uint64, where the word lies; ``word``: uint64, its value without a tag; ``target``: uint32 as in ``Edges``.
    """

    holder_address: UInt64Array
    word: UInt64Array
    target: UInt32Array


@dataclass(frozen=True, slots=True)
class EncodedPointers:
    """Where addresses are kept in another form; columns of equal length, in the order in which they were found.

    ``holder_address``: uint64, the aligned word in which the form begins; ``number``: uint32, which of the addresses; ``form``:
    uint32, a ``PointerForm``.
    """

    holder_address: UInt64Array
    number: UInt32Array
    form: UInt32Array


@dataclass(frozen=True, slots=True)
class LostChunks:
    """Who leads the lost: ``leader``: uint32[n], ascending chunk indexes that no lost chunk outside of their own cycle
    leads to; ``leader_of``: uint32[chunks], for each lost chunk the number of its leader in ``leader`` plus one, 0 for
    all others.
    """

    leader: UInt32Array
    leader_of: UInt32Array


@dataclass(frozen=True, slots=True)
class DominatorTree:
    """Which chunk every path from the roots to a chunk passes last.

    Nodes are numbered as a depth-first search meets them; node 0 stands for all roots together. ``chunk``:
    uint32[nodes], chunk index of each node (0 for node 0, which is none); ``dominator``: uint32[nodes], the immediate
    dominator's node, smaller than the node itself (0 for node 0).
    """

    chunk: UInt32Array
    dominator: UInt32Array
