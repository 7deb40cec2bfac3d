"""Which other allocators are in a process, and which memory is theirs.

Knows: how modules, symbols, notes and structures in memory speak for an allocator. Does not know: any allocator's structures
(each has a module of its own here), nor glibc's heap: what that has claimed before stays its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final
from weakref import WeakKeyDictionary

from coreheap.accounting.claims import Claims
from coreheap.accounting.other_allocators.found import OtherAllocator, Ranges
from coreheap.accounting.other_allocators.known import KNOWN_ALLOCATORS, KnownAllocator
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.corefile import Core, Module
from coreheap.corefile.dumped_symbols import DumpedSymbols
from coreheap.corefile.elf import PT_NOTE
from coreheap.corefile.kinds import WRITE
from coreheap.corefile.regions import Backing
from coreheap.corefile.relocations import MemoryImage
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength
from coreheap.mappings import MappingKind

MODULE_LIMIT: Final = 1 << 10
"""Modules whose symbols are looked at."""
NOTE_LIMIT: Final = 1 << 12

# Checks and claims ask for the same; an open core does not change.
_recognised: WeakKeyDictionary[Core, tuple[OtherAllocator, ...]] = WeakKeyDictionary()


def other_allocators(core: Core) -> tuple[OtherAllocator, ...]:
    """Every allocator beside glibc's, in the order of KNOWN_ALLOCATORS; one that several modules bring counts once."""
    if core not in _recognised:
        anonymous = AnonymousMemory(core)
        _recognised[core] = tuple(_recognise(core, anonymous))
    return _recognised[core]


def other_allocator_claims(core: Core, claims: Claims) -> None:
    """Claim what looks like other allocators' memory, under their names."""
    for allocator in other_allocators(core):
        for ranges in allocator.ranges:
            kind = MappingKind.TOOL_MEMORY if ranges.is_reserve else MappingKind.OTHER_ALLOCATOR
            claims.add(kind, ranges.start, ranges.end, name=allocator.name)


def _recognise(core: Core, anonymous: AnonymousMemory) -> Iterator[OtherAllocator]:
    can_tell = _has_all_memory(core)
    modules = [module for module in core.modules if not module.path.startswith("[")][:MODULE_LIMIT]
    for known in KNOWN_ALLOCATORS:
        signs = [(module, tuple(_signs(core, known, module))) for module in modules]
        named = [each for each in signs if each[1]]
        named.sort(key=lambda each: not _is_by_path(known, each[0]))
        if not named and known.by_structure and core.main_module and not (known.static_only and len(modules) > 1):
            # Linked into the program, whose symbols are not at hand.
            named = [(core.main_module, ())]
        found: tuple[Ranges, ...] = ()
        brings = None
        for module, evidence in named:
            found = known.ranges(anonymous, module) if known.ranges is not None else ()
            brings = (module, evidence) if found or brings is None else brings
            if found:
                break
        if brings is None:
            continue
        module, evidence = brings
        is_searched = known.ranges is not None and can_tell
        if not found and not (_is_by_path(known, module) or (evidence and known.symbols_suffice)):
            continue
        if not found and is_searched and not known.replaces_malloc:
            # A run time that is linked in and was never started has no memory of its own.
            continue
        evidence += tuple(fact for ranges in found if not ranges.is_estimate for fact in ranges.evidence)
        yield OtherAllocator(known.name, module.name, module.start, known.replaces_malloc, evidence, found, is_searched)


def _has_all_memory(core: Core) -> bool:
    """Whether what is not found in a core was not there. The structures that are known are those of 64-bit processes.

    The kernel leaves out whole mappings that were never written, besides what coredump_filter and MADV_DONTDUMP say; another
    writer leaves out what it likes.
    """
    memory = core.memory
    anonymous = (memory.region_flags & WRITE != 0) & (memory.region_file_index < 0)
    if core.word_bytes != 8 or core.truncated or not (memory.region_backing[anonymous] == Backing.SAVED).any():
        return False
    return core.made_by == "kernel" or not memory.writable_bytes_not_saved()


def _is_by_path(known: KnownAllocator, module: Module) -> bool:
    return known.path is not None and known.path.search(module.path) is not None


def _signs(core: Core, known: KnownAllocator, module: Module) -> Iterator[Evidence]:
    """What of a module speaks for an allocator inside."""
    if _is_by_path(known, module):
        yield Evidence(f"{module.name} is mapped", "modules of the process", Strength.SOLID, module.start)
    if known.note and module.is_executable and _has_note(core, module, known.note.encode()):
        yield Evidence(f"a note of {known.note}'s in {module.name}", "program headers", Strength.SOLID, module.start)
    for name in known.symbols:
        defined = _defines(core, module, name)
        if defined:
            yield Evidence(f"{module.name} defines {name}", defined, Strength.SOLID, module.start)
            return


def _defines(core: Core, module: Module, name: str) -> str:
    """Where a symbol of that name is defined: a table of its verified file or of the core; "" where none does."""
    symbol = module.symbol(name)
    if symbol is not None:
        return f"{symbol.table} of {module.file_title}"
    if module.elf_file is not None or module.load_bias is None or not module.dynamic:
        return ""
    dumped = DumpedSymbols(MemoryImage(core.memory, module)).find(name)
    return f".dynsym of {module.name} in the core" if dumped is not None else ""


def _has_note(core: Core, module: Module, owner: bytes) -> bool:
    """Whether a note segment of the module has a note of that owner's."""
    segments = module.program_headers
    if segments is None or module.load_bias is None:
        return False
    for row in segments.rows_of_kind(PT_NOTE).tolist():
        start = module.load_bias + int(segments.address[row])
        try:
            notes = core.memory.read(start, min(int(segments.file_bytes[row]), NOTE_LIMIT))
        except (MemoryFault, ValueError):
            continue
        position = 0
        while position + 12 <= len(notes):
            name_bytes, content_bytes = (
                int.from_bytes(notes[at : at + 4], "little") for at in (position, position + 4)
            )
            if notes[position + 12 : position + 12 + name_bytes].rstrip(b"\0") == owner:
                return True
            position += 12 + (name_bytes + 3 & ~3) + (content_bytes + 3 & ~3)
    return False
