"""The ways to malloc's globals that ask libc itself: symbols, DWARF, relocations, initial values, machine code, TLS.

``find_globals(core, layouts, arena_score)`` runs them on every module that may hold a malloc. ``identify`` joins what
they say with what the heap's own structures say (``locate``: sub-heap headers, self-pointing bins).

Only the core and files with the core's build-id are asked; a hostile file costs its findings and nothing more.
"""

from __future__ import annotations

from coreheap.allocators.glibc.ways.found import (
    Found,
    Globals,
    LayoutSighting,
    ThreadBlock,
    ThreadLocal,
    ThreadSlot,
    evidence_for,
    evidence_for_layout,
    evidence_for_offset,
)
from coreheap.allocators.glibc.ways.search import WAYS, Way, find_globals
from coreheap.allocators.glibc.ways.subject import ArenaScore
from coreheap.allocators.glibc.ways.tls import find_thread_locals

__all__ = [
    "WAYS",
    "ArenaScore",
    "Found",
    "Globals",
    "LayoutSighting",
    "ThreadBlock",
    "ThreadLocal",
    "ThreadSlot",
    "Way",
    "evidence_for",
    "evidence_for_layout",
    "evidence_for_offset",
    "find_globals",
    "find_thread_locals",
]
