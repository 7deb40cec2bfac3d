"""What libc's own file says of malloc's globals before the program ran: pointers of main_arena, initial values of mp_.

Knows: the static initialisers of main_arena and mp_ (malloc/malloc.c, 2.15-2.44), tcache's initial pointer (2.43+).
Does not know: the core. Addresses here are those of the file, before relocation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.records import Layout
from coreheap.corefile import elf
from coreheap.corefile.elf import ProgramHeaders
from coreheap.corefile.relocations import FileImage, Image, Relocations

UInt64s = npt.NDArray[np.uint64]

PLACE_LIMIT = 16
"""Places that one signature may name; more means that it is none."""

WRITABLE_BYTES_LIMIT = 64 << 20

INITIAL_PARAMETERS: Mapping[str, tuple[int, ...]] = {
    "trim_threshold": (0x20000,),
    "top_pad": (0x20000,),
    "mmap_threshold": (0x20000,),
    "arena_test": (8, 2),
    "arena_max": (0,),
    "n_mmaps": (0,),
    "n_mmaps_max": (0x10000,),
    "max_n_mmaps": (0,),
    "no_dyn_threshold": (0,),
    "mmapped_mem": (0,),
    "max_mmapped_mem": (0,),
    "sbrk_base": (0,),
    "tcache_bins": (64,),
    "tcache_count": (7, 16),
    "tcache_max_bytes": (0x408, 0x3FC, 0x411, 0x401, 0x200, 0x1FC, 0x209),
    "tcache_unsorted_limit": (0,),
    "thp_mode": (3, 0),
    "thp_pagesize": (0,),
    "hp_pagesize": (0,),
    "hp_flags": (0,),
}
"""Static initial values of mp_, any of the named (2.15-2.44; ports and branches differ)."""


@dataclass(frozen=True, slots=True)
class Place:
    """An address of the file that a signature names, and the layouts under which it does."""

    address: int
    layouts: tuple[Layout, ...]


def arenas_by_pointer(image: Image, relocations: Relocations, layouts: Iterable[Layout]) -> tuple[Place, ...]:
    """Where a word, made a pointer by a relocation, points to the structure that holds it as ``next``.

    main_arena.next is the only such word of libc (2.15+): the distance is offsetof(malloc_state, next). Where the
    layout has attached_threads, its static value 1 follows next_free. Found in 15 of 15 Debian libraries.
    """
    known = relocations.relative_known
    place, target = relocations.relative_place[known], relocations.relative_target[known]
    return _self_pointers(image, place, target, layouts)


def arenas_by_value(image: FileImage, layouts: Iterable[Layout]) -> tuple[Place, ...]:
    """As ``arenas_by_pointer`` in the file of a program that does not move: its pointers stand there as they are."""
    parts: list[tuple[UInt64s, UInt64s]] = []
    for start, words in _writable_words(image):
        place = np.uint64(start) + np.arange(len(words), dtype=np.uint64) * np.uint64(image.word_bytes)
        pointing = (words != 0) & (words < place) & (place - words < np.uint64(1 << 12))
        parts.append((place[pointing], words[pointing]))
    if not parts:
        return ()
    return _self_pointers(
        image, np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), layouts
    )


def _self_pointers(image: Image, place: UInt64s, target: UInt64s, layouts: Iterable[Layout]) -> tuple[Place, ...]:
    found: dict[int, list[Layout]] = {}
    distance = place - target
    for layout in layouts:
        if not layout.generation.next_is_static:
            continue
        fields = layout.state
        for row in np.flatnonzero(distance == np.uint64(fields.offset("next")))[:PLACE_LIMIT].tolist():
            address = int(target[row])
            if _attached_threads_is_one(image, address, layout):
                found.setdefault(address, []).append(layout)
    return tuple(Place(address, tuple(rows)) for address, rows in sorted(found.items()))[:PLACE_LIMIT]


def _attached_threads_is_one(image: Image, address: int, layout: Layout) -> bool:
    fields = layout.state
    if "attached_threads" not in fields:
        return True
    content = image.read(address + fields.offset("attached_threads"), image.word_bytes)
    return content is not None and int.from_bytes(content, "little") == 1


def parameters_by_value(image: FileImage, layouts: Iterable[Layout]) -> tuple[Place, ...]:
    """Where a file's writable data holds the static initial values of mp_, every field of the layout."""
    found: dict[int, list[Layout]] = {}
    for start, words in _writable_words(image):
        word_bytes = image.word_bytes
        raw = words.astype("<u8" if word_bytes == 8 else "<u4").view(np.uint8)
        threshold = np.uint64(INITIAL_PARAMETERS["trim_threshold"][0])
        three = (words[:-2] == threshold) & (words[1:-1] == threshold) & (words[2:] == threshold)
        for row in np.flatnonzero(three)[:PLACE_LIMIT].tolist():
            for layout in layouts:
                if _has_initial_values(raw[row * word_bytes :], layout):
                    found.setdefault(start + row * word_bytes, []).append(layout)
    return tuple(Place(address, tuple(rows)) for address, rows in sorted(found.items()))[:PLACE_LIMIT]


def _has_initial_values(raw: npt.NDArray[np.uint8], layout: Layout) -> bool:
    fields = layout.parameters
    if len(raw) < fields.byte_count or "pagesize" in fields:
        return False
    for name, field in fields.fields.items():
        value = int.from_bytes(raw[field.offset : field.offset + field.element_bytes].tobytes(), "little")
        allowed = INITIAL_PARAMETERS.get(name, (0,))
        if value not in allowed:
            return False
    return True


def tcache_in_thread_image(
    image: Image, relocations: Relocations, segments: ProgramHeaders, layouts: Iterable[Layout]
) -> int | None:
    """tcache's offset in the module's own TLS block, from the one pointer of the TLS image to a block of read-only zeros.

    From 2.43 tcache starts as a pointer to __tcache_dummy; the other pointers of the image lead to tables of ctype.
    None where no or more than one such pointer is there.
    """
    sizes = {
        layout.tcache.byte_count
        for layout in layouts
        if layout.tcache is not None and layout.generation.tcache_is_never_null
    }
    found: set[int] = set()
    for row in segments.rows_of_kind(elf.PT_TLS)[:1].tolist():
        start, size = int(segments.address[row]), int(segments.file_bytes[row])
        # A place before the start wraps round to a large distance.
        inside = relocations.relative_known & (relocations.relative_place - np.uint64(start) < np.uint64(size))
        for place, target in zip(
            relocations.relative_place[inside][:256].tolist(),
            relocations.relative_target[inside][:256].tolist(),
            strict=True,
        ):
            if _is_read_only(segments, target) and any(
                content is not None and not any(content)
                for content in (image.read(target, byte_count) for byte_count in sizes)
            ):
                found.add(place - start)
    return found.pop() if len(found) == 1 else None


def _is_read_only(segments: ProgramHeaders, address: int) -> bool:
    for row in segments.rows_of_kind(elf.PT_LOAD).tolist():
        start = int(segments.address[row])
        if start <= address < start + int(segments.memory_bytes[row]):
            return not int(segments.flags[row]) & elf.PF_W
    return False


def _writable_words(image: FileImage) -> Iterable[tuple[int, UInt64s]]:
    """(address, aligned words) of each writable segment of the file."""
    segments = image.segments
    for row in segments.rows_of_kind(elf.PT_LOAD).tolist():
        size = min(int(segments.file_bytes[row]), WRITABLE_BYTES_LIMIT)
        if not int(segments.flags[row]) & elf.PF_W:
            continue
        start = int(segments.address[row])
        aligned = start + -start % image.word_bytes
        content = image.read(aligned, (size - (aligned - start)) // image.word_bytes * image.word_bytes)
        if content is not None and len(content) >= 3 * image.word_bytes:
            yield aligned, elf.words_in(content, image.word_bytes)
