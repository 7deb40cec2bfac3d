"""coreheap: what a process's native heap looked like, from its core file alone.

``open(path)`` gives a ``Core`` (a context manager), ``analyze(core)`` a ``Report``. Names are imported when they are
first used, so that ``coreheap --help`` answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coreheap.analysis import AnalysisOptions, analyze
    from coreheap.corefile import Core
    from coreheap.corefile import open_core as open
    from coreheap.errors import CoreheapError, InputNotUsable, MemoryFault, UnsupportedCore
    from coreheap.heap import ChunkBatch, ChunkState, ChunkTable, HeapSnapshot
    from coreheap.report import Finding, LedgerNode, Report

_PLACES = {
    "AnalysisOptions": "coreheap.analysis",
    "ChunkBatch": "coreheap.heap",
    "ChunkState": "coreheap.heap",
    "ChunkTable": "coreheap.heap",
    "Core": "coreheap.corefile",
    "CoreheapError": "coreheap.errors",
    "Finding": "coreheap.report",
    "HeapSnapshot": "coreheap.heap",
    "InputNotUsable": "coreheap.errors",
    "LedgerNode": "coreheap.report",
    "MemoryFault": "coreheap.errors",
    "Report": "coreheap.report",
    "UnsupportedCore": "coreheap.errors",
    "analyze": "coreheap.analysis",
    "open": "coreheap.corefile",
}

__all__ = [
    "AnalysisOptions",
    "ChunkBatch",
    "ChunkState",
    "ChunkTable",
    "Core",
    "CoreheapError",
    "Finding",
    "HeapSnapshot",
    "InputNotUsable",
    "LedgerNode",
    "MemoryFault",
    "Report",
    "UnsupportedCore",
    "analyze",
    "open",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), {"open": "open_core"}.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
