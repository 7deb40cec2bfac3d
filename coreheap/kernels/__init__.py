"""The loops over whole heaps, in two implementations with the same names and results.

Knows: chunk headers, free lists and addresses as plain numbers. Does not know: versions of glibc, arenas, files.

``reference`` is the specification in Python, ``_compiled`` the same in Cython; ``active_name`` says which one the
functions of this package are.
"""

from coreheap.kernels._active import (
    active_name,
    chain_reaches,
    chunk_extents,
    fill_ranks,
    find_arena_candidates,
    find_chunk_runs,
    find_chunks,
    find_mmapped_chunks,
    overlay_free_lists,
    resynchronise,
    size_histogram,
    state_totals,
    unpack_chunks,
    walk_region,
)
from coreheap.kernels.builder import ChunkIndexBuilder
from coreheap.kernels.codes import STATE_SLOTS, ChunkState, ListError, ListKind, StopReason, WalkAnomaly
from coreheap.kernels.index import GRANULES_PER_WORD, MMAPPED, ChunkIndex, words_for
from coreheap.kernels.values import (
    ArenaCandidates,
    ChainOutcome,
    ChunkGeometry,
    ChunkRuns,
    Memory,
    MemoryMap,
    MmappedChunks,
    OverlayOutcome,
    WalkOutcome,
    no_mmapped_chunks,
)

__all__ = [
    "GRANULES_PER_WORD",
    "MMAPPED",
    "STATE_SLOTS",
    "ArenaCandidates",
    "ChainOutcome",
    "ChunkGeometry",
    "ChunkIndex",
    "ChunkIndexBuilder",
    "ChunkRuns",
    "ChunkState",
    "ListError",
    "ListKind",
    "Memory",
    "MemoryMap",
    "MmappedChunks",
    "OverlayOutcome",
    "StopReason",
    "WalkAnomaly",
    "WalkOutcome",
    "active_name",
    "chain_reaches",
    "chunk_extents",
    "fill_ranks",
    "find_arena_candidates",
    "find_chunk_runs",
    "find_chunks",
    "find_mmapped_chunks",
    "no_mmapped_chunks",
    "overlay_free_lists",
    "resynchronise",
    "size_histogram",
    "state_totals",
    "unpack_chunks",
    "walk_region",
    "words_for",
]
