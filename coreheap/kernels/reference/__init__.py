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
from coreheap.kernels.reference.dominators import (
    add_up_retained,
    chunk_sizes,
    count_by_verdict,
    find_dominators,
)
from coreheap.kernels.reference.free_runs import find_free_runs
from coreheap.kernels.reference.lists import overlay_free_lists
from coreheap.kernels.reference.lookups import find_encoded, find_pointers_to
from coreheap.kernels.reference.pointers import collect_edges, find_root_references, mark_reachable_directly
from coreheap.kernels.reference.references import find_leaders, mark_reachable, reverse_edges, shortest_path
from coreheap.kernels.reference.searching import find_arena_candidates, find_chunk_runs, find_mmapped_chunks
from coreheap.kernels.reference.walking import chain_reaches, resynchronise, walk_region

__all__ = [
    "add_up_retained",
    "chain_reaches",
    "chunk_extents",
    "chunk_sizes",
    "collect_edges",
    "count_by_verdict",
    "fill_ranks",
    "find_arena_candidates",
    "find_chunk_runs",
    "find_chunks",
    "find_dominators",
    "find_encoded",
    "find_free_runs",
    "find_leaders",
    "find_mmapped_chunks",
    "find_pointers_to",
    "find_root_references",
    "mark_reachable",
    "mark_reachable_directly",
    "overlay_free_lists",
    "resynchronise",
    "reverse_edges",
    "shortest_path",
    "size_histogram",
    "state_totals",
    "unpack_chunks",
    "walk_region",
]
