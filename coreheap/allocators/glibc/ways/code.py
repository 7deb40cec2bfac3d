"""What the machine code of malloc's exported functions names: main_arena, fields of mp_, thread-local slots.

Knows: which exported function of libc touches which global (glibc 2.12-2.44, checked in fifteen Debian libraries by
tests/unit/allocators/ways/test_debian_libraries.py). Does not know: instructions (``corefile.disassembly``) or memory.
Addresses here are those of the file, before relocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coreheap.allocators.glibc.records import Layout
from coreheap.corefile.disassembly import CODE_LIMIT, Reference, Use, references_in
from coreheap.corefile.relocations import Image
from coreheap.corefile.symbols import Symbol

ARENA_FUNCTIONS = ("malloc_trim", "malloc_stats", "mallinfo2", "mallinfo", "mallopt", "free", "malloc")
"""Functions that form the address of main_arena, the most telling first: malloc_trim names no other malloc global
that is a structure, and mallinfo from 2.33 on only calls mallinfo2."""

PARAMETER_FIELDS = {
    "malloc_stats": ("max_n_mmaps", "mmapped_mem", "max_mmapped_mem"),
    "mallopt": (
        "trim_threshold",
        "top_pad",
        "mmap_threshold",
        "arena_test",
        "arena_max",
        "n_mmaps_max",
        "no_dyn_threshold",
    ),
}
"""Fields of mp_ that a function touches: the mmap totals in malloc_stats, the settings in mallopt."""

THREAD_FUNCTIONS = ("malloc", "free")
"""Functions that ask for tcache first of all thread-local variables."""

PARAMETER_SHARE_ENOUGH = 0.8
"""Share of those fields that the code must name: all in fifteen Debian libraries."""

FIRST_STATIC_OFFSET = {"x86_64": (-(1 << 31), 0), "i386": (-(1 << 31), 0), "aarch64": (16, 1 << 31)}
"""Offsets from the thread pointer that static TLS variables can have; on the other side is the thread's descriptor."""


@dataclass(frozen=True, slots=True)
class NamedPlace:
    """An address and the exported functions that name it."""

    address: int
    functions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamedParameters:
    """A place for mp_, the layouts that fit the code best there, and the share of the expected fields that it names."""

    address: int
    layouts: tuple[Layout, ...]
    share: float
    functions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NamedSlot:
    """A thread-local variable in code: ``addend`` beyond the offset in the word at ``slot``, or beyond the thread
    pointer itself where ``slot`` is None."""

    slot: int | None
    addend: int
    functions: tuple[str, ...]


References = dict[str, tuple[Reference, ...]]


def references_of_functions(image: Image, symbol: Callable[[str], Symbol | None], machine: str) -> References:
    """function -> the places that its code names, for every function of the tables that the image has."""
    found: References = {}
    for name in dict.fromkeys((*ARENA_FUNCTIONS, *PARAMETER_FIELDS, *THREAD_FUNCTIONS)):
        function = symbol(name)
        if function is None or not 0 < function.byte_count <= CODE_LIMIT:
            continue
        code = image.read(function.value, function.byte_count)
        if code is not None:
            found[name] = references_in(code, function.value, machine)
    return found


def arenas_by_code(references: References, is_writable: Callable[[int], bool]) -> tuple[NamedPlace, ...]:
    """Places that may be main_arena, most functions first: addresses that malloc_trim or malloc_stats forms.

    Some other variables are among them; whoever asks must test them.
    """
    by_place: dict[int, list[str]] = {}
    for name in ARENA_FUNCTIONS:
        for place in dict.fromkeys(
            reference.place
            for reference in references.get(name, ())
            if reference.use is Use.ADDRESS and not reference.is_thread_local
        ):
            by_place.setdefault(place, []).append(name)
    leading = set(ARENA_FUNCTIONS[:2])
    named = [
        NamedPlace(place, tuple(names))
        for place, names in by_place.items()
        if leading & set(names) and is_writable(place)
    ]
    return tuple(sorted(named, key=lambda found: -len(found.functions)))


def parameters_by_code(
    references: References, layouts: Iterable[Layout], is_writable: Callable[[int], bool]
) -> NamedParameters | None:
    """The place from which the named addresses are the fields that each function is known to touch.

    None where too few are, or where two places are as good.
    """
    places = {
        name: {
            reference.place
            for reference in references.get(name, ())
            if not reference.is_thread_local and is_writable(reference.place)
        }
        for name in PARAMETER_FIELDS
    }
    best: dict[int, tuple[float, list[Layout]]] = {}
    for layout in layouts:
        wanted = [
            (name, layout.parameters.offset(field))
            for name, fields in PARAMETER_FIELDS.items()
            for field in fields
            if field in layout.parameters
        ]
        bases = {place - offset for name, offset in wanted for place in places[name]}
        for base in bases:
            share = sum(base + offset in places[name] for name, offset in wanted) / len(wanted)
            before = best.get(base, (0.0, []))
            if share > before[0]:
                best[base] = (share, [layout])
            elif share == before[0]:
                before[1].append(layout)
    ranked = sorted(best.items(), key=lambda item: -item[1][0])
    if not ranked or ranked[0][1][0] < PARAMETER_SHARE_ENOUGH:
        return None
    if len(ranked) > 1 and ranked[1][1][0] == ranked[0][1][0]:
        return None
    base, (share, rows) = ranked[0]
    functions = tuple(name for name in PARAMETER_FIELDS if places[name])
    return NamedParameters(base, tuple(rows), share, functions)


def slots_by_code(references: References, machine: str) -> tuple[NamedSlot, ...]:
    """Thread-local variables that malloc or free touches, those of both first."""
    lowest, highest = FIRST_STATIC_OFFSET.get(machine, (0, 0))
    by_slot: dict[tuple[int | None, int], list[str]] = {}
    for name in THREAD_FUNCTIONS:
        for reference in references.get(name, ()):
            if not reference.is_thread_local:
                continue
            if reference.slot is None and not lowest <= reference.place < highest:
                continue
            names = by_slot.setdefault((reference.slot, reference.place), [])
            if name not in names:
                names.append(name)
    slots = [NamedSlot(slot, addend, tuple(names)) for (slot, addend), names in by_slot.items()]
    return tuple(sorted(slots, key=lambda found: -len(found.functions)))
