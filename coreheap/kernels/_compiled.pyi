"""The compiled kernels have the signatures of the reference; ``test_codes`` compares the two at run time."""

from typing import Final

from coreheap.kernels.reference import add_up_retained as add_up_retained
from coreheap.kernels.reference import chain_reaches as chain_reaches
from coreheap.kernels.reference import chunk_extents as chunk_extents
from coreheap.kernels.reference import chunk_sizes as chunk_sizes
from coreheap.kernels.reference import collect_edges as collect_edges
from coreheap.kernels.reference import count_by_verdict as count_by_verdict
from coreheap.kernels.reference import fill_ranks as fill_ranks
from coreheap.kernels.reference import find_arena_candidates as find_arena_candidates
from coreheap.kernels.reference import find_chunk_runs as find_chunk_runs
from coreheap.kernels.reference import find_chunks as find_chunks
from coreheap.kernels.reference import find_dominators as find_dominators
from coreheap.kernels.reference import find_encoded as find_encoded
from coreheap.kernels.reference import find_free_runs as find_free_runs
from coreheap.kernels.reference import find_leaders as find_leaders
from coreheap.kernels.reference import find_mmapped_chunks as find_mmapped_chunks
from coreheap.kernels.reference import find_pointers_to as find_pointers_to
from coreheap.kernels.reference import find_root_references as find_root_references
from coreheap.kernels.reference import mark_reachable as mark_reachable
from coreheap.kernels.reference import mark_reachable_directly as mark_reachable_directly
from coreheap.kernels.reference import overlay_free_lists as overlay_free_lists
from coreheap.kernels.reference import resynchronise as resynchronise
from coreheap.kernels.reference import reverse_edges as reverse_edges
from coreheap.kernels.reference import shortest_path as shortest_path
from coreheap.kernels.reference import size_histogram as size_histogram
from coreheap.kernels.reference import state_totals as state_totals
from coreheap.kernels.reference import unpack_chunks as unpack_chunks
from coreheap.kernels.reference import walk_region as walk_region

CODES: Final[dict[str, dict[str, int]]]
