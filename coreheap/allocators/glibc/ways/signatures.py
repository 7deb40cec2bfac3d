"""The ways without names: relocations, initial values and machine code of libc itself.

What they find are signatures and readings, sure of nothing by themselves. So each place is held against the memory of the
core: what does not look like an arena there is kept only as a hint, so that a report can show the contradiction.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from coreheap.allocators.glibc.locate import Sighting, mapped_for_data, ring_from
from coreheap.allocators.glibc.ways import code, static_image, tls
from coreheap.allocators.glibc.ways.found import NOTHING, Found, LayoutSighting, ThreadLocal, ThreadSlot
from coreheap.allocators.glibc.ways.subject import ARENA_ACCEPTED, Subject
from coreheap.corefile import AddressSpace
from coreheap.corefile.elf import ET_EXEC
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength

CANDIDATE_LIMIT = 1 << 12
"""Relocated words of writable memory that are looked at; a libc has some hundred."""


# --- Relocations and initial values --------------------------------------------------------------------------------


def by_relocations(subject: Subject) -> Found:
    """main_arena.next, the only pointer of libc at its distance from its own target; thread-local slots."""
    file = _by_file_relocations(subject)
    dumped = _by_dumped_relocations(subject)
    source = f"thread-local relocations of {subject.name}"
    return Found(
        main_arena=(*file.main_arena, *dumped.main_arena),
        tcache=_by_thread_image(subject),
        thread_slots=tuple(ThreadSlot(offset, source) for _, offset, _ in subject.slots),
        thread_blocks=subject.thread_blocks,
        layouts=file.layouts,
    )


def _by_file_relocations(subject: Subject) -> Found:
    image, relocations = subject.file_image, subject.relocations
    if image is None:
        return NOTHING
    places: tuple[static_image.Place, ...] = ()
    source = f"relocations in the file of {subject.file_name}"
    if relocations is not None:
        places = static_image.arenas_by_pointer(image, relocations, subject.layouts)
    elif image.kind == ET_EXEC:
        places = static_image.arenas_by_value(image, subject.layouts)
        source = f"initial data in the file of {subject.file_name}"
    statement = "a pointer to the structure that holds it, as main_arena.next before the first other arena"
    sightings = _tested(subject, ((place.address, statement) for place in places), source, is_unique=len(places) == 1)
    layouts: tuple[LayoutSighting, ...] = ()
    if len(places) == 1:
        statement = "distance of main_arena.next from main_arena"
        layouts = (LayoutSighting(places[0].layouts, Evidence(statement, source, Strength.SOLID)),)
    return Found(main_arena=sightings, layouts=layouts)


def _by_thread_image(subject: Subject) -> tuple[ThreadLocal, ...]:
    """tcache by its initial value in the TLS image: nothing writes that in a process either, so the core's is as good as
    the file's."""
    for image, relocations, source in (
        (subject.file_image, subject.relocations, f"TLS image of {subject.file_name}"),
        (subject.dumped_image, subject.dumped_relocations, f"TLS image of {subject.name} in the core"),
    ):
        if image is None or relocations is None or subject.segments is None:
            continue
        offset = static_image.tcache_in_thread_image(image, relocations, subject.segments, subject.layouts)
        place = None if offset is None else subject.thread_offset(offset)
        if place is not None:
            statement = "the one initial thread-local pointer to read-only zeros, as tcache starts from 2.43 on"
            return (ThreadLocal(place, Evidence(statement, source, Strength.SOLID)),)
    return ()


def _by_dumped_relocations(subject: Subject) -> Found:
    """As with the file. The words themselves may have changed since (a second arena changes main_arena.next), so every
    relocated word of writable memory may be ``next``, and the arena's invariants decide."""
    relocations = subject.dumped_relocations
    memory = subject.core.memory
    if relocations is None or subject.module.load_bias is None or not len(relocations.relative_place):
        return NOTHING
    mask = (1 << 8 * subject.core.word_bytes) - 1
    place = relocations.relative_place + np.uint64(subject.module.load_bias) & np.uint64(mask)
    place = np.unique(place[mapped_for_data(memory, place)])
    found: dict[int, bool] = {}
    for at in place[:CANDIDATE_LIMIT].tolist():
        for layout in subject.arena_layouts:
            address = at - layout.state.offset("next")
            if not layout.generation.next_is_static or address <= 0 or not _starts_like_an_arena(memory, address, at):
                continue
            if (subject.arena_score_under(address, layout) or 0.0) >= ARENA_ACCEPTED:
                # A structure read some words beside an arena has most of its invariants, and is in no ring.
                ring = ring_from(memory, address, layout, layout.word_class.default_heap_max)
                found[address] = found.get(address, False) or ring.is_closed
    statements = {
        True: ("a relocated word is next of an arena, from which a ring leads back to it", Strength.SOLID),
        False: ("a relocated word is next of a structure with an arena's invariants", Strength.HINT),
    }
    in_rings = any(found.values())
    source = f"relocations of {subject.name} in the core"
    return Found(
        main_arena=tuple(
            Sighting(address, Evidence(statements[closes][0], source, statements[closes][1], address))
            for address, closes in sorted(found.items())
            if closes == in_rings
        )
    )


def _starts_like_an_arena(memory: AddressSpace, address: int, next_place: int) -> bool:
    """The cheapest of an arena's invariants: mutex and flags are small, next leads to writable memory."""
    try:
        mutex, flags = np.frombuffer(memory.read(address, 8), "<u4").tolist()
        following = memory.read_word(next_place)
    except MemoryFault:
        return False
    return mutex <= 2 and flags <= 7 and bool(mapped_for_data(memory, np.array([following], np.uint64))[0])


def by_initial_values(subject: Subject) -> Found:
    """mp_ in the file's data, by its static values."""
    if subject.file_image is None:
        return NOTHING
    places = static_image.parameters_by_value(subject.file_image, subject.layouts)
    source = f"initial data in the file of {subject.file_name}"
    strength = Strength.SOLID if len(places) == 1 else Strength.HINT
    sightings = [
        Sighting(address, Evidence("the initial values of every field of malloc_par", source, strength, address))
        for place in places
        if (address := subject.in_process(place.address)) is not None
    ]
    layouts: tuple[LayoutSighting, ...] = ()
    if len(places) == 1:
        layouts = (LayoutSighting(places[0].layouts, Evidence("initial values of malloc_par", source, Strength.HINT)),)
    return Found(parameters=tuple(sightings), layouts=layouts)


# --- Machine code --------------------------------------------------------------------------------------------------


def by_code(subject: Subject) -> Found:
    """Exported functions that name main_arena, fields of mp_ and thread-local slots."""
    references = subject.references
    if not references:
        return NOTHING
    named = code.arenas_by_code(references, subject.is_writable)
    source = subject.code_source
    arenas = _tested(
        subject,
        ((place.address, f"address formed by {', '.join(place.functions)}") for place in named),
        source,
        is_unique=True,
    )
    parameters: tuple[Sighting, ...] = ()
    layouts: tuple[LayoutSighting, ...] = ()
    place = code.parameters_by_code(references, subject.layouts, subject.is_writable)
    if place is not None and (address := subject.in_process(place.address)) is not None:
        statement = f"fields of malloc_par touched by {', '.join(place.functions)}"
        strength = Strength.SOLID if place.share == 1.0 else Strength.HINT
        parameters = (Sighting(address, Evidence(statement, source, strength, address)),)
        layouts = (LayoutSighting(place.layouts, Evidence(statement, source, Strength.HINT)),)
    return Found(
        main_arena=arenas,
        parameters=parameters,
        thread_slots=tuple(_slots_in_code(subject, references, source)),
        layouts=layouts,
    )


def _slots_in_code(subject: Subject, references: code.References, source: str) -> Iterator[ThreadSlot]:
    offsets = {place: offset for place, offset, _ in subject.slots}
    for slot in code.slots_by_code(references, subject.core.machine):
        start = 0 if slot.slot is None else offsets.get(slot.slot)
        if start is not None and 0 < abs(start + slot.addend) < tls.STATIC_TLS_REACH:
            yield ThreadSlot(start + slot.addend, source)


def _tested(
    subject: Subject, places: Iterable[tuple[int, str]], source: str, *, is_unique: bool
) -> tuple[Sighting, ...]:
    """Places of the file (address, statement) as sightings, held against the memory of the core.

    Those that look like an arena there are solid. Where none does, the first remains as a hint that says so: the arena
    may be damaged. Where the memory was not saved, the first is as strong as the signature alone.
    """
    located = [
        (address, statement) for place, statement in places if (address := subject.in_process(place)) is not None
    ]
    good = [(address, text) for address, text in located if (subject.arena_score(address) or 0.0) >= ARENA_ACCEPTED]
    if good:
        return tuple(Sighting(at, Evidence(text, source, Strength.SOLID, at)) for at, text in good)
    for at, text in located[:1]:
        if subject.arena_score(at) is None:
            strength = Strength.SOLID if is_unique and len(located) == 1 else Strength.HINT
            return (Sighting(at, Evidence(f"{text}; not saved in the core", source, strength, at)),)
        return (Sighting(at, Evidence(f"{text}; the memory there is not like an arena", source, Strength.HINT, at)),)
    return ()
