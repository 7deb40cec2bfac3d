"""What every kernel computes, in Python that is meant to be read. It is the specification of ``_compiled``.

Knows: chunk headers, flags, lists as plain numbers. Does not know: versions of glibc, arenas, files.

Everything read from the memory is hostile: each size is compared before it is used, every loop ends by its own count.
Python's integers cannot overflow, so a comparison here is the plain statement of a rule; ``_compiled`` orders its
comparisons such that no sum wraps.
"""

from coreheap.kernels.reference.columns import (
    chunk_extents,
    fill_ranks,
    find_chunks,
    size_histogram,
    state_totals,
    unpack_chunks,
)
from coreheap.kernels.reference.lists import overlay_free_lists
from coreheap.kernels.reference.searching import find_arena_candidates, find_chunk_runs, find_mmapped_chunks
from coreheap.kernels.reference.walking import chain_reaches, resynchronise, walk_region

__all__ = [
    "chain_reaches",
    "chunk_extents",
    "fill_ranks",
    "find_arena_candidates",
    "find_chunk_runs",
    "find_chunks",
    "find_mmapped_chunks",
    "overlay_free_lists",
    "resynchronise",
    "size_histogram",
    "state_totals",
    "unpack_chunks",
    "walk_region",
]
