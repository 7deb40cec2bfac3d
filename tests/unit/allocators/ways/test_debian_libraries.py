"""Every way on real libcs, stripped and with debug files, against what readelf says of their symbols.

main_arena, mp_ and the thread-local variables are at the addresses of facts/glibc-malloc.md, section 7.2, in all of them.
"""

from __future__ import annotations

import pytest

from coreheap.allocators.glibc.layouts import GENERATIONS, WORD_CLASS_OF_MACHINE, WORD_CLASSES
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.ways import code, static_image
from coreheap.allocators.glibc.ways.names import STRUCTURES, fits_dwarf
from coreheap.corefile import ElfFile
from coreheap.corefile.dwarf import unit_at
from coreheap.corefile.elf import PF_W, PT_LOAD
from coreheap.corefile.relocations import FileImage, Relocations, relocations_of
from tests.unit.allocators.ways.libraries import NAMES, Library, library

# Layouts that the releases at hand have, written down from the facts and not from the product's tables.
GENERATION_OF = {
    "2.31": "glibc 2.28 branch, 2.29 branch, 2.30 and 2.31",
    "2.36": "glibc 2.35-2.41",
    "2.41": "glibc 2.35-2.41",
    "2.42": "glibc 2.42",
    "2.43": "glibc 2.43",
    "2.44": "glibc 2.44",
}
# Generations and word classes that no size or offset of a structure tells apart from the right one.
SAME_STRUCTURES = {
    "2.31": {
        ("glibc 2.32-2.33", "64"),
        ("glibc 2.32-2.33", "32a16"),
        ("glibc 2.34", "64"),
        ("glibc 2.34", "32a16"),
        # heap_info's new field took the place of padding.
        ("glibc 2.35-2.37 without tunables", "32a16"),
    },
    "2.43": {("glibc 2.43", "32a8")},
    "2.44": {("glibc 2.44", "32a8")},
}
WORD_CLASS_OF = {"x86_64": "64", "aarch64": "64", "i386": "32a16"}
OFFSET_OF_NEXT = {"64": {"2.43": 0x818, "2.44": 0x818}, "32a16": {"2.43": 0x418, "2.44": 0x418}}
# First instruction of malloc_trim that forms main_arena's address: facts, section 8, by build-id of what was measured.
TRIM_ANCHORS = {
    ("2.36", "x86_64"): 0x20,
    ("2.41", "x86_64"): 0x27,
    ("2.36", "i386"): 0x2E,
    ("2.41", "i386"): 0x34,
    ("2.36", "aarch64"): 0x38,
    ("2.41", "aarch64"): 0x3C,
}


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest) -> Library:
    return library(request.param)


def opened(real: Library) -> tuple[ElfFile, FileImage, Relocations]:
    file = ElfFile.open(real.file)
    assert file is not None
    image = FileImage(file)
    relocations = relocations_of(image, real.machine)
    assert relocations is not None
    return file, image, relocations


def layouts_of(real: Library) -> tuple[Layout, ...]:
    return tuple(
        Layout(generation, WORD_CLASSES[WORD_CLASS_OF_MACHINE.get(real.machine, generation.i386_word_class)])
        for generation in GENERATIONS
    )


def includes_the_truth(real: Library, layouts: tuple[Layout, ...]) -> bool:
    generation = GENERATION_OF.get(real.release)
    names = {(layout.generation.name, layout.word_class.name) for layout in layouts}
    return generation is None or (generation, WORD_CLASS_OF[real.machine]) in names


def references(real: Library, file: ElfFile, image: FileImage) -> code.References:
    found = code.references_of_functions(image, file.find_symbol, real.machine)
    assert {"malloc_trim", "malloc_stats", "mallopt", "free", "malloc"} <= found.keys()
    return found


def is_writable(file: ElfFile, address: int) -> bool:
    segments = file.segments
    return any(
        0 <= address - int(segments.address[row]) < int(segments.memory_bytes[row])
        for row in segments.rows_of_kind(PT_LOAD).tolist()
        if int(segments.flags[row]) & PF_W
    )


class TestRelocations:
    def test_the_signature_names_main_arena_and_nothing_else(self, real: Library) -> None:
        _, image, relocations = opened(real)
        places = static_image.arenas_by_pointer(image, relocations, layouts_of(real))
        assert [place.address for place in places] == [real.truth["main_arena"]]
        assert includes_the_truth(real, places[0].layouts)
        wanted = OFFSET_OF_NEXT[WORD_CLASS_OF[real.machine]].get(real.release)
        if wanted is not None:
            assert {layout.state.offset("next") for layout in places[0].layouts} == {wanted}

    def test_thread_local_slots_name_tcache_and_thread_arena(self, real: Library) -> None:
        _, _, relocations = opened(real)
        offsets = set(relocations.thread_addend[relocations.thread_known].tolist())
        if real.machine == "aarch64":
            offsets |= {offset + 8 for offset in offsets}
        assert {real.truth["tcache"], real.truth["thread_arena"]} <= offsets

    def test_tcache_in_the_thread_image(self, real: Library) -> None:
        file, image, relocations = opened(real)
        found = static_image.tcache_in_thread_image(image, relocations, file.segments, layouts_of(real))
        assert found == (real.truth["tcache"] if real.release in ("2.43", "2.44") else None)


class TestInitialValues:
    def test_they_name_mp_and_nothing_else(self, real: Library) -> None:
        _, image, _ = opened(real)
        places = static_image.parameters_by_value(image, layouts_of(real))
        assert [place.address for place in places] == [real.truth["mp_"]]
        assert includes_the_truth(real, places[0].layouts)


class TestCode:
    def test_most_functions_name_main_arena(self, real: Library) -> None:
        file, image, _ = opened(real)
        places = code.arenas_by_code(references(real, file, image), lambda address: is_writable(file, address))
        assert places[0].address == real.truth["main_arena"]
        assert {"malloc_trim", "malloc_stats"} <= set(places[0].functions)
        assert len(places) == 1 or len(places[1].functions) < len(places[0].functions)

    def test_malloc_trim_forms_the_address_where_it_was_seen(self, real: Library) -> None:
        file, image, _ = opened(real)
        start = file.find_symbol("malloc_trim")
        assert start is not None
        found = references(real, file, image)["malloc_trim"]
        first = min(reference.instruction for reference in found if reference.place == real.truth["main_arena"])
        expected = TRIM_ANCHORS.get((real.release, real.machine))
        assert expected is None or first - start.value == expected

    def test_the_fields_that_are_touched_name_mp(self, real: Library) -> None:
        file, image, _ = opened(real)
        place = code.parameters_by_code(
            references(real, file, image), layouts_of(real), lambda address: is_writable(file, address)
        )
        assert place is not None
        assert (place.address, place.share) == (real.truth["mp_"], 1.0)
        assert includes_the_truth(real, place.layouts)

    def test_malloc_or_free_touches_tcache(self, real: Library) -> None:
        file, image, relocations = opened(real)
        offsets = dict(zip(relocations.thread_place.tolist(), relocations.thread_addend.tolist(), strict=True))
        slots = code.slots_by_code(references(real, file, image), real.machine)
        assert all(slot.slot is not None for slot in slots)
        named = {offsets[slot.slot] + slot.addend: slot.functions for slot in slots if slot.slot in offsets}
        assert set(named[real.truth["tcache"]]) == {"malloc", "free"}


class TestDwarf:
    def test_places_and_structures(self, real: Library) -> None:
        file, debug = ElfFile.open(real.file), ElfFile.open(real.debug_file)
        assert file is not None
        assert debug is not None
        malloc = file.find_symbol("malloc")
        assert malloc is not None
        names = ("main_arena", "mp_", "tcache", "thread_arena")
        unit = unit_at(debug, malloc.value, names, (*STRUCTURES, "tcache_entry"))
        assert unit is not None
        assert unit.name.endswith("malloc.c")
        found = {
            name: variable.address if variable.thread_offset is None else variable.thread_offset
            for name, variable in unit.variables.items()
        }
        # gcc for aarch64 writes no place of thread-local variables into DWARF.
        expected = names[:2] if real.machine == "aarch64" else names
        assert found == {name: real.truth[name] for name in expected}
        fitting = {
            (layout.generation.name, layout.word_class.name)
            for layout in layouts_of(real)
            if fits_dwarf(layout, unit.structures)
        }
        if real.release in GENERATION_OF:
            right = (GENERATION_OF[real.release], WORD_CLASS_OF[real.machine])
            assert right in fitting
            assert fitting - {right} <= SAME_STRUCTURES.get(real.release, set())

    def test_a_stripped_file_has_none(self, real: Library) -> None:
        file = ElfFile.open(real.file)
        assert file is not None
        malloc = file.find_symbol("malloc")
        assert malloc is not None
        assert unit_at(file, malloc.value, ("main_arena",), ()) is None
