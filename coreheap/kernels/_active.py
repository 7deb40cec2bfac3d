"""Chooses which implementation of the kernels runs.

Knows: that there are two. The compiled one is taken when it can be imported; COREHEAP_KERNELS=reference or =compiled
forces one.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from typing import TYPE_CHECKING

ENVIRONMENT_VARIABLE = "COREHEAP_KERNELS"


def choose_implementation(wanted: str | None) -> tuple[str, ModuleType]:
    """The name and module of the implementation to use; ``wanted`` is None for the best there is.

    Warns once where the compiled one is missing. Raises ImportError when it is missing and wanted, ValueError for
    another name.
    """
    if wanted not in (None, "compiled", "reference"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE} is {wanted!r}; it can be 'compiled' or 'reference'")
    if wanted != "reference":
        try:
            return "compiled", importlib.import_module("coreheap.kernels._compiled")
        except ImportError as error:
            if wanted == "compiled":
                raise
            warnings.warn(
                f"coreheap's compiled kernels cannot be used ({error}); the slow Python ones run instead. Reinstall "
                f"coreheap where a C compiler is available, or set {ENVIRONMENT_VARIABLE}=reference to accept this.",
                RuntimeWarning,
                stacklevel=2,
            )
    return "reference", importlib.import_module("coreheap.kernels.reference")


active_name, _implementation = choose_implementation(os.environ.get(ENVIRONMENT_VARIABLE) or None)
"""``compiled`` or ``reference``: which implementation this process uses."""

if TYPE_CHECKING:
    from coreheap.kernels.reference import (
        add_up_retained,
        chain_reaches,
        chunk_extents,
        chunk_sizes,
        collect_edges,
        count_by_verdict,
        fill_ranks,
        find_arena_candidates,
        find_chunk_runs,
        find_chunks,
        find_dominators,
        find_encoded,
        find_free_runs,
        find_leaders,
        find_mmapped_chunks,
        find_pointers_to,
        find_root_references,
        mark_reachable,
        mark_reachable_directly,
        overlay_free_lists,
        resynchronise,
        reverse_edges,
        shortest_path,
        size_histogram,
        state_totals,
        unpack_chunks,
        walk_region,
    )
else:
    add_up_retained = _implementation.add_up_retained
    chain_reaches = _implementation.chain_reaches
    chunk_extents = _implementation.chunk_extents
    chunk_sizes = _implementation.chunk_sizes
    collect_edges = _implementation.collect_edges
    count_by_verdict = _implementation.count_by_verdict
    fill_ranks = _implementation.fill_ranks
    find_arena_candidates = _implementation.find_arena_candidates
    find_chunk_runs = _implementation.find_chunk_runs
    find_chunks = _implementation.find_chunks
    find_dominators = _implementation.find_dominators
    find_encoded = _implementation.find_encoded
    find_free_runs = _implementation.find_free_runs
    find_leaders = _implementation.find_leaders
    find_mmapped_chunks = _implementation.find_mmapped_chunks
    find_pointers_to = _implementation.find_pointers_to
    find_root_references = _implementation.find_root_references
    mark_reachable = _implementation.mark_reachable
    mark_reachable_directly = _implementation.mark_reachable_directly
    overlay_free_lists = _implementation.overlay_free_lists
    resynchronise = _implementation.resynchronise
    reverse_edges = _implementation.reverse_edges
    shortest_path = _implementation.shortest_path
    size_histogram = _implementation.size_histogram
    state_totals = _implementation.state_totals
    unpack_chunks = _implementation.unpack_chunks
    walk_region = _implementation.walk_region

__all__ = [
    "active_name",
    "add_up_retained",
    "chain_reaches",
    "choose_implementation",
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
