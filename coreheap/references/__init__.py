"""References between chunks: roots, edges, reachability, suspects, owners, retained sizes. Knows no allocator.

``build_graph(core, heap)`` gives a ``ReferenceGraph``; the other functions answer questions about it.
"""

from coreheap.references.graph import ReferenceGraph, build_graph
from coreheap.references.owners import explain, owners
from coreheap.references.retained import find_retained
from coreheap.references.suspects import find_group_numbers, summarise_leaks

__all__ = [
    "ReferenceGraph",
    "build_graph",
    "explain",
    "find_group_numbers",
    "find_retained",
    "owners",
    "summarise_leaks",
]
