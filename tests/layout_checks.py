"""Holds the rows of ``layouts`` against what is known of glibc: the facts file, and DWARF of Debian's libc6-dbg.

``scripts/verify_layouts`` is the command of this module. Expected is what the facts or the DWARF say, found is what coreheap
would read a core by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coreheap.allocators.glibc.layouts import GENERATIONS, WORD_CLASSES
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import Structure, TcacheKey
from coreheap.corefile import ElfFile
from coreheap.corefile.dwarf import DwarfUnit, unit_at
from tests.glibc_facts import Entry, document

WORD_CLASS_OF_DEBIAN = {"amd64": "64", "arm64": "64", "i386": "32a16"}
"""Of the releases whose packages can still be had (2.31 and later)."""

NAME_IN_DWARF = {"heap_info": "_heap_info"}
OUR_NAME = {"tcache_small_bins": "tcache_bins", "num_slots": "counts"}
CHUNK_WORDS = ("prev_size", "size", "fd", "bk", "fd_nextsize", "bk_nextsize")
"""malloc_chunk: no row is for it, the kernels take these words for granted (called mchunk_ from 2.25 on)."""

MALLOC_NAMES = ("malloc", "__libc_malloc")
WITHOUT_THREAD_LOCAL_PLACES = ("arm64",)
"""Where gcc names thread-local variables in DWARF and does not say where they are; their symbols do."""

GLOBALS = ("main_arena", "mp_")
THREAD_LOCALS = ("thread_arena", "tcache")

KEY_BEGINS = {
    TcacheKey.NONE: None,
    TcacheKey.STRUCT_ADDRESS: "pointer to the tcache_perthread_struct",
    TcacheKey.RANDOM_WORD: "process-wide random word tcache_key",
}


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be; ``subject`` names it, as ``malloc_state.top`` or ``sizeof(malloc_par)``."""

    subject: str
    expected: object
    found: object

    def __str__(self) -> str:
        return f"{self.subject}: expected {_shown(self.expected)}, found {_shown(self.found)}"


def _shown(value: object) -> str:
    return f"{value:#x}" if type(value) is int else str(value)


class NoDebugFile(Exception):
    """What a DWARF check needs is not there; the message says what."""


def layout_of(release: str, word_class: str) -> Layout | None:
    """The row for a release (``2.27-branch``) and a word class; None when no generation has it."""
    for generation in GENERATIONS:
        if release in generation.releases:
            return Layout(generation, WORD_CLASSES[word_class])
    return None


def layout_of_debian(version: tuple[int, int], debian: str) -> tuple[str, Layout | None]:
    """Release and row for a Debian libc6: distributions ship release branches, where these differ from their tags."""
    release = ".".join(map(str, version))
    branch = layout_of(f"{release}-branch", WORD_CLASS_OF_DEBIAN[debian])
    if branch is not None:
        return f"{release}-branch", branch
    return release, layout_of(release, WORD_CLASS_OF_DEBIAN[debian])


def _our_structures(layout: Layout) -> dict[str, tuple[dict[str, int], int] | None]:
    """Field offsets and sizeof of every structure that coreheap reads, under a layout; None where it has none."""
    word = layout.word_class.word_bytes

    def row(structure: Structure, byte_count: int) -> tuple[dict[str, int], int]:
        return {name: place.offset for name, place in structure.fields.items()}, byte_count

    entry = None
    if layout.tcache is not None:
        # A cached block: next in its first word, and in its second the key, where the generation has one.
        has_key = layout.generation.tcache_key is not TcacheKey.NONE
        entry = ({"next": 0, "key": word}, 2 * word) if has_key else ({"next": 0}, word)
    return {
        "malloc_state": row(layout.state, layout.state.byte_count),
        "malloc_par": row(layout.parameters, layout.parameters.byte_count),
        "heap_info": row(layout.heap_info, layout.heap_info_bytes),
        "tcache_perthread_struct": None if layout.tcache is None else row(layout.tcache, layout.tcache.byte_count),
        "tcache_entry": entry,
        "malloc_chunk": ({name: word * number for number, name in enumerate(CHUNK_WORDS)}, 6 * word),
    }


def _structure_differences(layout: Layout, truth: Mapping[str, tuple[dict[str, int], int]]) -> Iterator[Difference]:
    """``truth``: name -> (field offsets, sizeof) of the structures that the release has."""
    for name, ours in _our_structures(layout).items():
        theirs = truth.get(name)
        if ours is None or theirs is None:
            if ours is not theirs:
                yield Difference(name, "none" if theirs is None else "a structure", "none" if ours is None else "a row")
            continue
        expected = {OUR_NAME.get(field, field).removeprefix("mchunk_"): place for field, place in theirs[0].items()}
        for field in (*expected, *(field for field in ours[0] if field not in expected)):
            if expected.get(field) != ours[0].get(field):
                yield Difference(f"{name}.{field}", expected.get(field, "none"), ours[0].get(field, "none"))
        if theirs[1] != ours[1]:
            yield Difference(f"sizeof({name})", theirs[1], ours[1])


# --- The facts file ------------------------------------------------------------------------------------------------


def differences_from_facts(entry: Entry) -> list[Difference]:
    """Where the row for a release is not as the facts are: structures and constants."""
    layout = layout_of(entry.release, entry.word_class)
    if layout is None:
        return [Difference("release", entry.release, "in no generation")]
    truth = {name: (entry.offsets(name), int(struct["size"])) for name, struct in entry.structs.items()}
    return [*_structure_differences(layout, truth), *_constant_differences(layout, entry.constants)]


def _constant_differences(layout: Layout, facts: Mapping[str, Any]) -> Iterator[Difference]:
    word_class, generation = layout.word_class, layout.generation
    pairs: dict[str, tuple[object, object]] = {
        "SIZE_SZ": (facts["SIZE_SZ"], word_class.word_bytes),
        "MALLOC_ALIGNMENT": (facts["MALLOC_ALIGNMENT"], word_class.alignment),
        "MINSIZE": (facts["MINSIZE"], word_class.minimum_chunk_bytes),
        "CHUNK_HDR_SZ": (facts["CHUNK_HDR_SZ"], word_class.header_bytes),
        "first chunk behind the brk's start": (facts["first_chunk_offset_at_brk_start"], word_class.granule_phase),
        "HEAP_MAX_SIZE": (facts["HEAP_MAX_SIZE"], word_class.default_heap_max),
        "MIN_LARGE_SIZE": (facts["MIN_LARGE_SIZE"], word_class.bins.small_limit),
        "SMALLBIN_CORRECTION": (facts["SMALLBIN_CORRECTION"], word_class.bins.small_correction),
        "first chunk in an arena's heap": (
            facts["first_chunk_offset_in_arena_heap"],
            layout.first_chunk_in_arena_heap,
        ),
        "first chunk in a later sub-heap": (facts["first_chunk_offset_in_sub_heap"], layout.heap_info_bytes),
        "NFASTBINS": (facts["NFASTBINS"], word_class.fastbin_count if "fastbinsY" in layout.state else 0),
        "safe-linking": (facts["safe_linking"], generation.safe_linking),
        "tcache key": (facts["tcache_key"], KEY_BEGINS[generation.tcache_key]),
        "heap maximum follows hugetlb": (facts["heap_max_follows_hugetlb"], generation.heap_max_follows_hugetlb),
        "fastchunks bit in flags": (facts["fastbin_flag_bit0_in_flags"], generation.flags_hold_fastchunks),
        "tcache counts free slots": (
            (facts["tcache_count_direction"] or "").startswith("down"),
            generation.tcache_counts_free_slots,
        ),
        "mmapped chunks have a trailer": (
            facts["mmapped_chunk_layout"].startswith("new"),
            generation.mmapped_trailer_words > 0,
        ),
        "main_arena.next is set statically": (facts["main_arena_static_next_reloc"], generation.next_is_static),
        "arena_test": (facts["arena_test_default"] or word_class.default_arena_test, word_class.default_arena_test),
    }
    for subject, (expected, found) in pairs.items():
        if expected != found:
            yield Difference(subject, expected, found)
    for name in ("tcache_struct_chunk_size", "tcache_struct_chunk_size_alt"):
        if facts[name] is not None and facts[name] not in layout.tcache_chunk_bytes:
            yield Difference("chunk of a tcache structure", facts[name], layout.tcache_chunk_bytes)
    limit = {"per_cpu": f"{word_class.arenas_per_cpu}*cores", "cpus": "max(cores", "none": "none"}
    if limit[generation.arena_limit] not in facts["NARENAS_rule"]:
        yield Difference("arena limit", facts["NARENAS_rule"], generation.arena_limit)


# --- DWARF of Debian's libc6-dbg ------------------------------------------------------------------------------------


def differences_from_dwarf(libc: Path, debug_directory: Path, debian: str, layout: Layout) -> list[Difference]:
    """Where a row is not as libc's debug information says: structures, and that malloc's globals are there.

    ``debug_directory`` has a ``.build-id`` folder, ``debian`` is the architecture. Raises NoDebugFile when it lacks libc's file, or that has no DWARF.
    """
    stripped = ElfFile.open(libc)
    build_id = stripped.build_id.hex() if stripped is not None and stripped.build_id else ""
    path = debug_directory / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    file = ElfFile.open(path) if build_id and path.exists() else None
    if file is None:
        raise NoDebugFile(f"no debug file of libc ({path})")
    unit = _malloc_unit(file, path)
    return [
        *_structure_differences(layout, _structures_of(unit)),
        *_place_differences(unit, file, debian),
        *_symbol_differences(file, build_id),
    ]


def _malloc_unit(file: ElfFile, path: Path) -> DwarfUnit:
    structures = [NAME_IN_DWARF.get(name, name) for name in _structure_names()]
    for name in MALLOC_NAMES:
        symbol = file.find_symbol(name)
        unit = None if symbol is None else unit_at(file, symbol.value, (*GLOBALS, *THREAD_LOCALS), structures)
        if unit is not None:
            return unit
    raise NoDebugFile(f"no DWARF for malloc.c in {path}")


def _structure_names() -> tuple[str, ...]:
    return tuple(_our_structures(Layout(GENERATIONS[-1], WORD_CLASSES["64"])))


def _structures_of(unit: DwarfUnit) -> dict[str, tuple[dict[str, int], int]]:
    truth = {}
    for name in _structure_names():
        described = unit.structures.get(NAME_IN_DWARF.get(name, name))
        if described is not None:
            fields = {field: place for field, place in described.offsets.items() if field != "pad"}
            truth[name] = fields, described.byte_count
    return truth


def _place_differences(unit: DwarfUnit, file: ElfFile, debian: str) -> Iterator[Difference]:
    """Whether DWARF and the symbol table have malloc's globals, and agree on where they are."""
    for name in (*GLOBALS, *THREAD_LOCALS):
        variable, symbol = unit.variables.get(name), file.find_symbol(name)
        place = None if variable is None else variable.address if name in GLOBALS else variable.thread_offset
        if place is None and name in THREAD_LOCALS and debian in WITHOUT_THREAD_LOCAL_PLACES:
            place = None if symbol is None else symbol.value
        if place is None or symbol is None or place != symbol.value:
            expected = "none" if symbol is None else symbol.value
            yield Difference(
                f"place of {name} by its symbol and by DWARF", expected, "none" if place is None else place
            )


def _symbol_differences(file: ElfFile, build_id: str) -> Iterator[Difference]:
    """Places of malloc's globals against the facts, where these were measured on this very libc."""
    for known in document()["debian_libc"].values():
        if known["build_id"] != build_id:
            continue
        for name in (*GLOBALS, *THREAD_LOCALS):
            symbol = file.find_symbol(name)
            if symbol is None or symbol.value != known["symbols"][name]["addr"]:
                found = "none" if symbol is None else symbol.value
                yield Difference(f"place of {name}", known["symbols"][name]["addr"], found)
