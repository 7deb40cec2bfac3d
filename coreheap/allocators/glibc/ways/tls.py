"""Where a module's thread-local variables lie relative to the thread pointer, and which of them are malloc's.

Knows: words that hold offsets from the thread pointer (TPOFF relocations), as the core has them after the dynamic linker
filled them in; a program's own block by its PT_TLS. Does not know: what a tcache looks like (it is told).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator

from coreheap.allocators.glibc.ways.found import ThreadLocal, ThreadSlot
from coreheap.corefile import Core, Module
from coreheap.corefile.elf import PT_TLS, ProgramHeaders
from coreheap.corefile.relocations import Relocations
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength

SLOT_LIMIT = 256
"""Thread-local slots of one module that are looked at; a libc has 14 to 17."""

STATIC_TLS_REACH = 1 << 24
"""Offsets beyond this are none: static TLS is much smaller."""

THREAD_HEADER_BYTES = {"x86_64": None, "i386": None, "aarch64": 16}
"""Bytes between the thread pointer and the first block above it (variant I); None where blocks lie below (variant II)."""

ANCHORED_WORDS = {"x86_64": (0,), "i386": (0,), "aarch64": (0, 1, -1)}
"""Words around a slot's variable that may be meant: compilers for aarch64 let one slot serve neighbouring variables.
tcache and thread_arena are neighbours in 2.31, 2.36 and 2.41."""


def offset_in_slot(core: Core, module: Module, place: int, *, is_negated: bool) -> int | None:
    """The offset from the thread pointer that the word at ``place`` (before relocation) holds; None if not saved."""
    if module.load_bias is None:
        return None
    bits = 8 * core.word_bytes
    try:
        word = core.memory.read_word(module.load_bias + place & (1 << bits) - 1)
    except MemoryFault:
        return None
    offset = word - (1 << bits) if word >> (bits - 1) else word
    offset = -offset if is_negated else offset
    return offset if 0 < abs(offset) < STATIC_TLS_REACH else None


def slots_of(core: Core, module: Module, relocations: Relocations) -> Iterator[tuple[int, int, int | None]]:
    """(place, offset from the thread pointer, offset in the module's own block or None) of each slot that was saved."""
    rows = zip(
        relocations.thread_place[:SLOT_LIMIT].tolist(),
        relocations.thread_addend[:SLOT_LIMIT].tolist(),
        relocations.thread_known[:SLOT_LIMIT].tolist(),
        relocations.thread_symbol[:SLOT_LIMIT].tolist(),
        relocations.thread_is_negated[:SLOT_LIMIT].tolist(),
        strict=True,
    )
    for place, addend, is_known, symbol, is_negated in rows:
        offset = offset_in_slot(core, module, place, is_negated=is_negated)
        if offset is not None:
            yield place, offset, addend if is_known and symbol == 0 else None


def block_offset(
    core: Core, module: Module, segments: ProgramHeaders | None, slots: Iterable[tuple[int, int, int | None]]
) -> int | None:
    """Where the module's TLS block begins, relative to the thread pointer; None where that is unknown.

    Most slots must agree. The program's own block is the first one, so its PT_TLS alone tells (ELF TLS ABI).
    """
    votes = Counter(offset - addend for _, offset, addend in slots if addend is not None and addend < STATIC_TLS_REACH)
    if votes:
        start, count = votes.most_common(1)[0]
        return start if 2 * count > votes.total() else None
    if module.is_executable and segments is not None:
        for row in segments.rows_of_kind(PT_TLS)[:1].tolist():
            alignment = max(int(segments.alignment[row]), 1)
            size, header = int(segments.memory_bytes[row]), THREAD_HEADER_BYTES[core.machine]
            start = -(-(size if header is None else header) // alignment) * alignment
            return (-start if header is None else start) if start < STATIC_TLS_REACH else None
    return None


def find_thread_locals(
    core: Core,
    slots: Iterable[ThreadSlot],
    arenas: Collection[int],
    is_tcache: Callable[[int], bool],
) -> tuple[tuple[ThreadLocal, ...], tuple[ThreadLocal, ...]]:
    """(thread_arena, tcache) among the named slots, by what each thread has there; most hits first.

    ``arenas`` are the members of the ring, ``is_tcache`` says whether a payload address is a tcache. A slot counts when
    some thread has such a word there and fewer have something else: a thread that was stopped
    inside malloc may have a tcache that contradicts itself. Nothing is 0, and from 2.43 for tcache also a pointer into
    libc's read-only data.
    """
    pointers = [thread.thread_pointer for thread in core.threads if thread.thread_pointer]
    members = frozenset(arenas)
    found: tuple[list[tuple[int, ThreadLocal]], list[tuple[int, ThreadLocal]]] = ([], [])
    by_offset = {slot.offset + step * core.word_bytes: slot for slot in slots for step in ANCHORED_WORDS[core.machine]}
    # What a slot itself names comes before its neighbours.
    by_offset.update({slot.offset: slot for slot in slots})
    for offset, slot in sorted(by_offset.items()):
        words = [word for pointer in pointers if (word := _word_at(core, pointer + offset)) is not None]
        if not any(words) or offset % core.word_bytes:
            continue
        for variable, accepts, what in (
            (found[0], members.__contains__, "an arena"),
            (found[1], is_tcache, "a tcache"),
        ):
            hits = _hits(core, words, accepts)
            if not hits:
                continue
            statement = f"the word at thread pointer {offset:+#x} is {what} in {hits} of {len(words)} threads"
            variable.append((hits, ThreadLocal(offset, Evidence(statement, slot.source, Strength.SOLID))))
    by_hits = [sorted(variables, key=lambda item: -item[0]) for variables in found]
    return tuple(item[1] for item in by_hits[0]), tuple(item[1] for item in by_hits[1])


def _hits(core: Core, words: Iterable[int], accepts: Callable[[int], bool]) -> int:
    """How many words are accepted; 0 where as many are neither that nor nothing."""
    hits = misses = 0
    for word in words:
        if word == 0:
            continue
        if accepts(word):
            hits += 1
        elif not _is_read_only(core, word):
            misses += 1
    return hits if hits > misses else 0


def _is_read_only(core: Core, address: int) -> bool:
    index = core.memory.region_index(address)
    return index is not None and not int(core.memory.region_flags[index]) & 2


def _word_at(core: Core, address: int) -> int | None:
    try:
        return core.memory.read_word(address)
    except MemoryFault:
        return None
