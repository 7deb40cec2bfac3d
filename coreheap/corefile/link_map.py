"""The dynamic linker's list of objects, read from memory: names, load addresses, dynamic sections.

Knows: r_debug and the public part of link_map (elf/link.h of every glibc), and how to find r_debug where no ELF header
was saved: by the executable's own dynamic section, whose DT_DEBUG leads to it and from there back. Does not know: files.

Pointers may carry a tag in aarch64's top byte: ld.so allocates with malloc once libc is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.corefile import elf
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.process import AT_ENTRY, AT_PHDR
from coreheap.corefile.regions import LAST_ADDRESS, Backing
from coreheap.errors import MemoryFault

ENTRY_LIMIT: Final = 20_000
DYNAMIC_LIMIT: Final = 1 << 16
SEARCH_BYTES: Final = 64 << 20
"""Saved memory that is searched for a dynamic section, what lies behind the program's first address first."""
CANDIDATE_LIMIT: Final = 1 << 12
_PRIVATE_WORDS: Final = 256
"""Words of a link_map behind its public ones that are looked at; the range stands some 110 words in (2.31-2.44)."""
_PUBLIC_WORDS: Final = 5
_EXTENDED: Final = 2
"""r_version of an r_debug_extended: glibc 2.35+, once there is a second namespace."""
_VERSIONS: Final = (1, _EXTENDED)
_NAMESPACE_LIMIT: Final = 64
"""glibc has 16 at most (DL_NNS)."""


@dataclass(frozen=True, slots=True)
class LinkedObject:
    """One entry of the link map; ``raw_path`` is the process's own text, empty for the program itself."""

    load_bias: int
    raw_path: bytes
    dynamic_address: int
    mapped: tuple[int, int] | None
    """(start, end) that the dynamic linker keeps of the object's segments; None where no such pair of words stands
    in its private fields."""

    def dynamic(self, memory: AddressSpace) -> dict[int, int]:
        """tag -> value of its dynamic section as far as its region was saved; empty where it was not."""
        return _dynamic_at(memory, self.dynamic_address)


def linked_objects(memory: AddressSpace, r_debug: int) -> Iterator[LinkedObject]:
    """The entries of the program's list, then of the other namespaces' (dlmopen) where r_debug leads to them.

    A list ends at an entry that cannot be read or was there before.
    """
    seen: set[int] = set()
    for namespace in _namespaces(memory, r_debug):
        try:
            entry = memory.untagged(memory.read_word(namespace + memory.word_bytes))
            while entry and entry not in seen and len(seen) < ENTRY_LIMIT:
                seen.add(entry)
                bias, name, dynamic, following = memory.read_words(entry, 4).tolist()
                mapped = _mapped_range(memory, entry, bias, dynamic)
                yield LinkedObject(bias, _text_or_empty(memory, memory.untagged(name)), dynamic, mapped)
                entry = memory.untagged(following)
        except MemoryFault:
            continue


def _namespaces(memory: AddressSpace, r_debug: int) -> Iterator[int]:
    """r_debug and, where its version says that it is an r_debug_extended, those that r_next leads to."""
    seen: set[int] = set()
    try:
        while r_debug and r_debug not in seen and len(seen) < _NAMESPACE_LIMIT:
            seen.add(r_debug)
            yield r_debug
            version = int.from_bytes(memory.read(r_debug, 4), "little")
            r_debug = memory.read_word(r_debug + 5 * memory.word_bytes) if version == _EXTENDED else 0
    except MemoryFault:
        return


def find_r_debug(memory: AddressSpace, auxv: Mapping[int, int]) -> int:
    """The address of r_debug by a dynamic section in saved memory; 0 where none is proven.

    Proven is one whose DT_DEBUG leads to a structure with r_debug's version, the first entry of whose list names this
    very dynamic section.
    """
    word = memory.word_bytes
    tested = 0
    for low, high in _places_to_search(memory, auxv):
        words = memory.read_words(low, (high - low) // word)
        for row in np.flatnonzero((words[:-1] == elf.DT_DEBUG) & (words[1:] > 4096)).tolist():
            tested += 1
            if tested > CANDIDATE_LIMIT:
                return 0
            r_debug = int(words[row + 1])
            if _is_proven(memory, r_debug, low + row * word):
                return r_debug
    return 0


def _places_to_search(memory: AddressSpace, auxv: Mapping[int, int]) -> Iterator[tuple[int, int]]:
    """Runs of saved memory, word-aligned: behind the program's start first, then the others, SEARCH_BYTES at most."""
    start = auxv.get(AT_PHDR) or auxv.get(AT_ENTRY) or 0
    saved = np.flatnonzero(memory.region_backing == Backing.SAVED)
    behind = memory.region_start[saved] >= np.uint64(min(start, LAST_ADDRESS))
    left, word = SEARCH_BYTES, memory.word_bytes
    for index in np.concatenate([saved[behind], saved[~behind]]).tolist():
        low, high = int(memory.region_start[index]), int(memory.region_end[index])
        low, high = low + -low % word, min(high, low + left)
        if high - low >= 2 * word:
            left -= high - low
            yield low, high
        if left <= 0:
            return


def _is_proven(memory: AddressSpace, r_debug: int, place: int) -> bool:
    try:
        version = int.from_bytes(memory.read(r_debug, 4), "little")
    except MemoryFault:
        return False
    if version not in _VERSIONS:
        return False
    # The program is the first of its namespace's list (elf/rtld.c): one entry tells, however long a list may pretend to be.
    program = next(linked_objects(memory, r_debug), None)
    if program is None or not program.dynamic_address <= place < program.dynamic_address + DYNAMIC_LIMIT:
        return False
    return program.dynamic(memory).get(elf.DT_DEBUG) == r_debug


def _mapped_range(memory: AddressSpace, entry: int, load_bias: int, dynamic: int) -> tuple[int, int] | None:
    """l_map_start and l_map_end: two neighbouring words around the dynamic section, the first where a mapping begins.

    Their place among the private fields differs by release; nothing else there begins at a page and ends behind it.
    """
    word = memory.word_bytes
    start = entry + _PUBLIC_WORDS * word
    runs = memory.saved_runs_within(start, start + _PRIVATE_WORDS * word)
    if not runs or runs[0][0] != start:
        return None
    words = memory.read_words(start, (runs[0][1] - start) // word)
    low, high = words[:-1], words[1:]
    fits = (low % np.uint64(4096) == 0) & (low >= load_bias) & (low <= dynamic) & (high > dynamic)
    for row in np.flatnonzero(fits).tolist():
        first, end = int(low[row]), int(high[row])
        index = memory.region_index(first)
        if index is not None and int(memory.region_start[index]) == first and memory.region_index(end - 1) is not None:
            return first, end
    return None


def _dynamic_at(memory: AddressSpace, address: int) -> dict[int, int]:
    """The entries from here to DT_NULL, within one saved run."""
    runs = memory.saved_runs_within(address, address + DYNAMIC_LIMIT)
    if not runs or runs[0][0] != address:
        return {}
    return elf.dynamic_entries(memory.view(*runs[0]), memory.word_bytes)


def _text_or_empty(memory: AddressSpace, address: int) -> bytes:
    try:
        return memory.read_text(address) if address else b""
    except MemoryFault:
        return b""
