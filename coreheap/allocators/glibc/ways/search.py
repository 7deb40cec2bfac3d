"""Runs every way on every module that may hold a malloc.

Knows: which modules to ask, and the ways in the order of their strength. Does not know: what is made of the findings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.version import LIBC_NAME
from coreheap.allocators.glibc.ways.found import Found, Globals, merged
from coreheap.allocators.glibc.ways.names import by_dwarf, by_symbols
from coreheap.allocators.glibc.ways.signatures import by_code, by_initial_values, by_relocations
from coreheap.allocators.glibc.ways.subject import ArenaScore, Subject
from coreheap.corefile import Core, Module
from coreheap.corefile.elf import PT_INTERP

MODULE_LIMIT = 64
"""Modules that are asked; more copies of libc than namespaces can hold (glibc: 16) mean a hostile core."""

DEBUG_MALLOC_NAME = "libc_malloc_debug.so"
"""2.34+: has its own copy of the whole malloc."""

Way = Callable[[Subject], Found]

WAYS: tuple[Way, ...] = (by_symbols, by_dwarf, by_relocations, by_initial_values, by_code)
"""Strongest first."""


def find_globals(
    core: Core, layouts: Sequence[Layout], arena_score: ArenaScore, ways: Sequence[Way] | None = None
) -> tuple[Globals, ...]:
    """What every way says, for each module that may hold a malloc and has something to say.

    ``layouts`` are those in question (``identify.layouts_for``), ``arena_score`` tests places, ``ways`` are all by
    default. The dynamic linker's namespaces have one module each, a static program is one itself.
    """
    found: list[Globals] = []
    for module in _modules_with_malloc(core):
        if _needs_symbols(module):
            core.fetch_symbols(module)
        subject = Subject(core, module, layouts, arena_score)
        result = merged(module, [way(subject) for way in (WAYS if ways is None else ways)])
        if result.found_anything or result.thread_slots or result.thread_blocks:
            found.append(result)
    return tuple(found)


def _needs_symbols(module: Module) -> bool:
    """Whether a module is libc, or a static program that may hold it, and no file at hand names malloc's globals."""
    is_libc = LIBC_NAME.match(module.name) or LIBC_NAME.match(module.soname)
    segments = module.program_headers
    is_static = module.is_executable and segments is not None and not len(segments.rows_of_kind(PT_INTERP))
    return bool(is_libc or is_static) and module.symbol("main_arena") is None


def _modules_with_malloc(core: Core) -> Iterator[Module]:
    named = [
        module
        for module in core.modules
        if LIBC_NAME.match(module.name) or LIBC_NAME.match(module.soname) or module.name.startswith(DEBUG_MALLOC_NAME)
    ]
    other = [
        module
        for module in core.modules
        if module not in named and (module.symbol("main_arena") is not None or (module.is_executable and not named))
    ]
    yield from (named + other)[:MODULE_LIMIT]
