"""Where a module's thread-local variables lie relative to the thread pointer, and which of them are malloc's.

Knows: words that hold offsets from the thread pointer (TPOFF relocations), as the core has them after the dynamic linker
filled them in; a block's place by the link map, a program's own by its PT_TLS. Does not know: what an arena or a tcache
looks like (it is told).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.thread_storage import TLS_ABOVE_POINTER, ThreadStorage, Wanted, accepted, describe
from coreheap.allocators.glibc.ways.found import ThreadBlock, ThreadLocal, ThreadSlot
from coreheap.corefile import Core, Module
from coreheap.corefile.elf import DT_DEBUG, PT_TLS, ProgramHeaders
from coreheap.corefile.relocations import Relocations
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength

SLOT_LIMIT = 256
"""Thread-local slots of one module that are looked at; a libc has 14 to 17."""

STATIC_TLS_REACH = 1 << 24
"""Offsets beyond this are none: static TLS is much smaller."""

THREAD_HEADER_BYTES = {"x86_64": None, "i386": None, "aarch64": 16}
"""Bytes between the thread pointer and the first block above it (variant I); None where blocks lie below (variant II)."""

LINK_MAP_LIMIT = 20_000
"""Entries of the link map that are followed, and TLS modules."""
LINK_MAP_BYTES = 0x800
"""More than sizeof(struct link_map) of any release at hand (l_tls_offset: 0x25c on i386 to 0x478 on x86_64)."""
LINK_MAP_TLS_WORDS = 7

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


def blocks_of(
    core: Core, module: Module, segments: ProgramHeaders | None, slots: Iterable[tuple[int, int, int | None]]
) -> tuple[ThreadBlock, ...]:
    """Where the module's TLS block lies in every thread, by each source that tells, the strongest first.

    Slots that hold an offset of the block (most must agree); the dynamic linker's link map; for the program itself its
    program headers, because its block is the first one.
    """
    size, name = _block_bytes(segments), module.name or "the program"
    found: list[ThreadBlock] = []
    votes = Counter(offset - addend for _, offset, addend in slots if addend is not None and addend < STATIC_TLS_REACH)
    if votes:
        start, count = votes.most_common(1)[0]
        if 2 * count > votes.total():
            found.append(ThreadBlock(start, size, f"thread-local relocations of {name}"))
    mapped = _start_in_link_map(core, module, segments)
    if mapped is not None:
        found.append(ThreadBlock(mapped, size, f"link map of {name}"))
    first = _start_of_programs_block(core, module, segments)
    if first is not None:
        found.append(ThreadBlock(first, size, f"program headers of {name}"))
    return tuple(found)


def _block_bytes(segments: ProgramHeaders | None) -> int | None:
    """p_memsz of PT_TLS; None where there is none or it is no size."""
    rows = [] if segments is None else segments.rows_of_kind(PT_TLS)[:1].tolist()
    for row in rows:
        size = int(segments.memory_bytes[row]) if segments is not None else 0
        return size if 0 < size < STATIC_TLS_REACH else None
    return None


def _start_of_programs_block(core: Core, module: Module, segments: ProgramHeaders | None) -> int | None:
    """Where the program's own block begins: next to the thread pointer (ELF TLS ABI, both variants)."""
    if not module.is_executable or segments is None:
        return None
    for row in segments.rows_of_kind(PT_TLS)[:1].tolist():
        alignment = max(int(segments.alignment[row]), 1)
        size, header = int(segments.memory_bytes[row]), THREAD_HEADER_BYTES[core.machine]
        start = -(-(size if header is None else header) // alignment) * alignment
        return (-start if header is None else start) if start < STATIC_TLS_REACH else None
    return None


def _start_in_link_map(core: Core, module: Module, segments: ProgramHeaders | None) -> int | None:
    """l_tls_offset of the module's link_map, as a start relative to the thread pointer; None where it is not found.

    The place of the fields differs by release, their order does not: l_tls_initimage, l_tls_initimage_size,
    l_tls_blocksize, l_tls_align, l_tls_firstbyte_offset, l_tls_offset, l_tls_modid. PT_TLS tells the first three; they
    stand there once in all the releases at hand (2.31-2.44).
    """
    rows = [] if segments is None else segments.rows_of_kind(PT_TLS)[:1].tolist()
    if not rows or segments is None or module.load_bias is None:
        return None
    mask = (1 << 8 * core.word_bytes) - 1
    image = module.load_bias + int(segments.address[rows[0]]) & mask
    wanted = [image, int(segments.file_bytes[rows[0]]), int(segments.memory_bytes[rows[0]])]
    found: set[int] = set()
    for words in _link_map_entries(core, module):
        for at in np.flatnonzero(words[: -LINK_MAP_TLS_WORDS + 1] == np.uint64(image)).tolist():
            *sizes, _alignment, _first_byte, offset, number = words[at : at + LINK_MAP_TLS_WORDS].tolist()
            # 0 and -1 stand for a block outside of static TLS (NO_TLS_OFFSET, FORCED_DYNAMIC_TLS_OFFSET).
            if sizes == wanted and 0 < offset < STATIC_TLS_REACH and 0 < number <= LINK_MAP_LIMIT:
                found.add(offset)
    if len(found) != 1:
        return None
    (offset,) = found
    return offset if TLS_ABOVE_POINTER[core.machine] else -offset


def _link_map_entries(core: Core, module: Module) -> Iterator[npt.NDArray[np.uint64]]:
    """The words of each link_map whose l_addr is the module's load bias and whose l_ld lies in it (struct link_map)."""
    memory, word, main = core.memory, core.word_bytes, core.main_module
    r_debug = main.dynamic.get(DT_DEBUG, 0) if main is not None else 0
    seen: set[int] = set()
    try:
        # ld.so allocates with malloc: its pointers may carry a tag (aarch64).
        entry = memory.untagged(memory.read_word(r_debug + word)) if r_debug else 0
        while entry and entry not in seen and len(seen) < LINK_MAP_LIMIT:
            seen.add(entry)
            bias, _name, dynamic, following = memory.read_words(entry, 4).tolist()
            if bias == module.load_bias and module.start <= dynamic < module.end:
                _, end = memory.saved_runs_within(entry, entry + LINK_MAP_BYTES)[0]
                if end - entry >= LINK_MAP_TLS_WORDS * word:
                    yield memory.read_words(entry, (end - entry) // word)
            entry = memory.untagged(following)
    except MemoryFault:
        return


def find_thread_locals(storage: ThreadStorage, slots: Iterable[ThreadSlot], wanted: Wanted) -> tuple[ThreadLocal, ...]:
    """The named slots whose words are what is looked for; most hits first, then most ways, then what a slot itself names.

    A slot counts when some thread has such a word there, damaged or not, and the words of the others allow it
    (``Fit.is_consistent``).
    """
    word = storage.word_bytes
    steps = ANCHORED_WORDS[storage.core.machine]
    # What a slot itself names comes before its neighbours.
    by_offset: dict[int, ThreadSlot] = {}
    for step in steps:
        for slot in slots:
            by_offset.setdefault(slot.offset + step * word, slot)
    found: list[tuple[tuple[int, ...], ThreadLocal]] = []
    offsets = [offset for offset in by_offset if offset % word == 0]
    words = np.array([storage.column(offset)[0] for offset in offsets], np.uint64).reshape(
        len(offsets), len(storage.pointers)
    )
    # One question for all slots: most hold nothing of the kind.
    worth_a_look = accepted(words, lambda values: wanted.accepts(values) | wanted.resembles(values)).any(axis=1)
    for row in np.flatnonzero(worth_a_look).tolist():
        offset, slot = offsets[row], by_offset[offsets[row]]
        fit = storage.fit(offset, wanted)
        if any(fit.rank) and fit.is_consistent:
            strength = Strength.SOLID if fit.hits else Strength.HINT
            variable = ThreadLocal(offset, Evidence(describe(fit, wanted), slot.source, strength))
            found.append(((*fit.rank, slot.ways, slot.offset == offset), variable))
    return tuple(variable for _, variable in sorted(found, key=lambda item: item[0], reverse=True))
