"""coreheap: what a process's native heap looked like, from its core file alone.

``open(path)`` gives a ``Core`` (a context manager), ``analyze(core)`` a ``Report``, ``analyze_with_references(core)`` the
same with a ``References`` object that says who holds what while the core is open. Names are imported when they are
first used, so that ``coreheap --help`` answers at once.
"""

from __future__ import annotations

# Not imported from typing: until the command has a handler for Ctrl-C, every import is a moment without one.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from coreheap.analysis import AnalysisOptions, analyze, analyze_with_references
    from coreheap.corefile import Core
    from coreheap.corefile import open_core as open
    from coreheap.errors import CoreheapError, FailedHere, InputNotUsable, MemoryFault, UnsupportedCore
    from coreheap.heap import ChunkBatch, ChunkState, ChunkTable, HeapSnapshot
    from coreheap.leak_search import References
    from coreheap.leaks import Explanation, LeakGroup, LeakReport, OwnerNode, RetainedReport, Verdict
    from coreheap.report import Finding, LedgerNode, Report

_PLACES = {
    "AnalysisOptions": "coreheap.analysis",
    "ChunkBatch": "coreheap.heap",
    "ChunkState": "coreheap.heap",
    "ChunkTable": "coreheap.heap",
    "Core": "coreheap.corefile",
    "CoreheapError": "coreheap.errors",
    "Explanation": "coreheap.leaks",
    "FailedHere": "coreheap.errors",
    "Finding": "coreheap.report",
    "HeapSnapshot": "coreheap.heap",
    "InputNotUsable": "coreheap.errors",
    "LeakGroup": "coreheap.leaks",
    "LeakReport": "coreheap.leaks",
    "LedgerNode": "coreheap.report",
    "MemoryFault": "coreheap.errors",
    "OwnerNode": "coreheap.leaks",
    "References": "coreheap.leak_search",
    "Report": "coreheap.report",
    "RetainedReport": "coreheap.leaks",
    "UnsupportedCore": "coreheap.errors",
    "Verdict": "coreheap.leaks",
    "analyze": "coreheap.analysis",
    "analyze_with_references": "coreheap.analysis",
    "open": "coreheap.corefile",
}

__all__ = [
    "AnalysisOptions",
    "ChunkBatch",
    "ChunkState",
    "ChunkTable",
    "Core",
    "CoreheapError",
    "Explanation",
    "FailedHere",
    "Finding",
    "HeapSnapshot",
    "InputNotUsable",
    "LeakGroup",
    "LeakReport",
    "LedgerNode",
    "MemoryFault",
    "OwnerNode",
    "References",
    "Report",
    "RetainedReport",
    "UnsupportedCore",
    "Verdict",
    "analyze",
    "analyze_with_references",
    "open",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), {"open": "open_core"}.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
