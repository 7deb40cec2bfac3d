"""The ways by name: symbol tables and DWARF, in the module's file and in a separate debug file of the same build-id.

Knows: how the globals and structures are called in malloc.c. Does not know: how the files are found and read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from coreheap.allocators.glibc.locate import Sighting
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import Structure, TcacheKey
from coreheap.allocators.glibc.ways.found import NOTHING, Found, LayoutSighting, ThreadLocal
from coreheap.allocators.glibc.ways.subject import Subject
from coreheap.corefile import ElfFile, Module, Symbol
from coreheap.corefile.dwarf import DwarfStructure, DwarfUnit, unit_at
from coreheap.corefile.symbols import STT_TLS
from coreheap.evidence import Evidence, Strength


def by_symbols(subject: Subject) -> Found:
    """.dynsym, .symtab and MiniDebugInfo of the module's file, and the separate debug file."""
    arenas: list[Sighting] = []
    parameters: list[Sighting] = []
    variables: dict[str, list[ThreadLocal]] = {"tcache": [], "thread_arena": []}
    for file, title in _symbol_files(subject.module):
        for name, sightings in (("main_arena", arenas), ("mp_", parameters)):
            symbol = file.find_symbol(name)
            if symbol is None or symbol.kind == STT_TLS:
                continue
            address, source = subject.in_process(symbol.value), _source(symbol, title)
            if address is not None:
                evidence = Evidence(f"symbol {name} of the same build-id", source, Strength.PROOF, address)
                sightings.append(Sighting(address, evidence))
        for name, locals_ in variables.items():
            symbol = file.find_symbol(name)
            if symbol is not None and symbol.kind == STT_TLS:
                statement = f"thread-local symbol {name} of the same build-id"
                locals_ += _thread_local(subject, symbol.value, statement, _source(symbol, title))
    return Found(tuple(arenas), tuple(parameters), tuple(variables["tcache"]), tuple(variables["thread_arena"]))


def _symbol_files(module: Module) -> Iterator[tuple[ElfFile, str]]:
    """The files that may name symbols, and what reports call them."""
    for file, title in ((module.elf_file, module.file_title), (module.debug_file, module.debug_file_title)):
        if file is not None:
            yield file, title


def _source(symbol: Symbol, title: str) -> str:
    """Which of a file's tables has the symbol: .symtab, MiniDebugInfo and a separate debug file are told apart."""
    return f"symbol table ({symbol.table}) of {title}"


def _thread_local(subject: Subject, offset: int, statement: str, source: str) -> list[ThreadLocal]:
    """A variable at an offset of the module's TLS block; none where the block's place is unknown."""
    place = subject.thread_offset(offset)
    return [] if place is None else [ThreadLocal(place, Evidence(statement, source, Strength.PROOF))]


# --- DWARF ---------------------------------------------------------------------------------------------------------

STRUCTURES: dict[str, tuple[str, Callable[[Layout], Structure | None], Callable[[Layout], int | None]]] = {
    "malloc_state": ("malloc_state", lambda layout: layout.state, lambda layout: layout.state.byte_count),
    "malloc_par": ("malloc_par", lambda layout: layout.parameters, lambda layout: layout.parameters.byte_count),
    "_heap_info": ("heap_info", lambda layout: layout.heap_info, lambda layout: layout.heap_info_bytes),
    "tcache_perthread_struct": (
        "tcache_perthread_struct",
        lambda layout: layout.tcache,
        lambda layout: None if layout.tcache is None else layout.tcache.byte_count,
    ),
}
"""Name in DWARF -> our name, its fields and its sizeof under a layout."""


def by_dwarf(subject: Subject) -> Found:
    """The unit of malloc.c: places of the globals, and whether its structures are those of a layout."""
    anchor = _malloc_symbol(subject.module)
    if anchor is None:
        return NOTHING
    for file, title in reversed(tuple(_symbol_files(subject.module))):
        names = ("main_arena", "mp_", "tcache", "thread_arena")
        unit = unit_at(file, anchor.value, names, (*STRUCTURES, "tcache_entry"))
        if unit is not None:
            return _found_in_unit(subject, unit, f"DWARF of {title}")
    return NOTHING


def _malloc_symbol(module: Module) -> Symbol | None:
    for name in ("malloc", "__libc_malloc"):
        symbol = module.symbol(name)
        if symbol is not None:
            return symbol
    return None


def _found_in_unit(subject: Subject, unit: DwarfUnit, source: str) -> Found:
    def sightings(name: str) -> tuple[Sighting, ...]:
        variable = unit.variables.get(name)
        address = None if variable is None or variable.address is None else subject.in_process(variable.address)
        if address is None:
            return ()
        return (Sighting(address, Evidence(f"variable {name} of malloc.c", source, Strength.PROOF, address)),)

    def thread_locals(name: str) -> tuple[ThreadLocal, ...]:
        variable = unit.variables.get(name)
        if variable is None or variable.thread_offset is None:
            return ()
        return tuple(
            _thread_local(subject, variable.thread_offset, f"thread-local variable {name} of malloc.c", source)
        )

    layouts: tuple[LayoutSighting, ...] = ()
    if unit.structures.keys() & STRUCTURES.keys():
        fitting = tuple(layout for layout in subject.layouts if fits_dwarf(layout, unit.structures))
        statement = "sizes and offsets of " + ", ".join(sorted(unit.structures))
        layouts = (LayoutSighting(fitting, Evidence(statement, source, Strength.PROOF)),)
    return Found(
        sightings("main_arena"),
        sightings("mp_"),
        thread_locals("tcache"),
        thread_locals("thread_arena"),
        layouts=layouts,
    )


def fits_dwarf(layout: Layout, structures: dict[str, DwarfStructure]) -> bool:
    """Whether every structure has the layout's size, and the members that both name lie at the same offsets."""
    for name, (_, fields_of, size_of) in STRUCTURES.items():
        described, size, fields = structures.get(name), size_of(layout), fields_of(layout)
        if described is None:
            # A libc that has malloc_state in this unit has the others there, too, unless it was built without tcache.
            if name == "tcache_perthread_struct" and size is not None and "malloc_state" in structures:
                return False
            continue
        if size != described.byte_count or fields is None:
            return False
        if any(described.offsets.get(field, place.offset) != place.offset for field, place in fields.fields.items()):
            return False
    entry = structures.get("tcache_entry")
    return entry is None or ("key" in entry.offsets) == (layout.generation.tcache_key is not TcacheKey.NONE)
