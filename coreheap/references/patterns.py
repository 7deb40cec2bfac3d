"""Pointers to the inside of a block that hold it as well as one to its start would: the patterns that programs use.

Knows: what compilers, C++'s library and wrappers of malloc put before an object. Does not know: who is lost.

memcheck has most of these (--leak-check-heuristics: newarray, multipleinheritance, length64, stdstring). A block that one of
them speaks for is still reachable, and what hangs from it too. None of them makes anything lost that was not.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.corefile.kinds import EXECUTE, WRITE
from coreheap.corefile.regions import row_holding, without_overlap
from coreheap.kernels import (
    CHUNK_MASK,
    INTERIOR,
    ChunkIndex,
    Edges,
    MemoryMap,
    chunk_extents,
    collect_edges,
    find_chunks,
    find_pointers_to,
)
from coreheap.leaks import Heuristic
from coreheap.references.bits import BATCH_CHUNKS, positions_of, unpacked
from coreheap.references.followed import (
    both,
    bytes_at,
    edges_from,
    edges_within,
    marked_from,
    only_in_use,
    payload_ranges,
    size_classes,
    with_only,
)

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]
UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

EDGES_AT_ONCE = 1 << 22
MANY_ALIKE = 8
ALIKE_SHARE = 0.9
"""So many blocks, and so much of all in question, that are pointed to at one distance are no chance."""
VERY_MANY_ALIKE = 256
"""So many are none at whatever distance (SQLite's pages: their headers lie behind them)."""
SEVERAL_SIZES = 3
HEADER_WORDS = 4
"""A header of a wrapper that has more words than these is believed before blocks of several sizes only."""
COOKIE_WORDS = (1, 2, 4, 8)
"""The count of new[] takes a word, or as much as the element's alignment asks for."""
LARGEST_HEADER_BYTES = 128
"""sizeof(__cxa_refcounted_exception) with 8-byte words: the largest header of those looked for."""
LARGEST_BASE_BYTES = 1 << 16
"""Bases before the one pointed to are hardly larger; a pool of objects with such tables may be."""
HEAD_BYTES = 32
UNWIND_HEADER_BYTES = 32
"""sizeof(_Unwind_Exception), which ends where the thrown object begins (libsupc++, unwind-cxx.h), on all machines alike."""
EXCEPTION_CLASSES = (b"GNUCC++\0", b"GNUCC++\1", b"CLNGC++\0", b"CLNGC++\1")
"""As a number, whose highest byte is the first letter; libc++'s as well."""
LENGTH_WORDS = 4
"""A length lies in the first words of a block, before what is pointed to."""
SDS_HEADERS = ((3, 1), (5, 2), (9, 4), (17, 8))
"""sds (redis): bytes of the header and of each length in it, by the type in the flags, 1 to 4."""
STRING_HEADER_WORDS = 3
"""libstdc++'s strings before C++11: length, capacity, references (_Rep)."""


@dataclass(frozen=True, slots=True)
class Reached:
    """What searches along pointers found, as far as patterns have to know it.

    ``reachable`` and ``any_strong``: bits of the chunks that strong roots lead to along pointers to starts, and along any.
    """

    core: Core
    index: ChunkIndex
    memory: MemoryMap
    mask: int
    edges: Edges | None
    root_start: UInt64s
    root_end: UInt64s
    """Strong roots."""
    reachable: UInt64s
    any_strong: UInt64s


@dataclass(frozen=True, slots=True)
class HeldByPatterns:
    """Chunks that are still reachable after all. ``chunks``: uint32, ascending; ``heuristic``: uint8 each, NONE for what hangs
    from another; ``inside``: uint32, chunks that are left with nothing but pointers to their inside."""

    chunks: UInt32s
    heuristic: UInt8s
    inside: UInt32s


def held_by_patterns(reached: Reached, wanted: Collection[Heuristic]) -> HeldByPatterns:
    """Which chunks that only pointers to insides lead to are held by a known pattern."""
    index = reached.index
    candidates = only_in_use(index, reached.any_strong & ~reached.reachable)
    chunks = positions_of(candidates)
    if not len(chunks):
        return HeldByPatterns(np.empty(0, np.uint32), np.empty(0, np.uint8), np.empty(0, np.uint32))
    source, target, word = _pointers_inside(reached, candidates)
    address, place, number = np.unique(word, return_index=True, return_inverse=True)
    linked = np.zeros(len(address), np.bool_)
    linked[number[_is_of_same_size(index, source, target)]] = True
    code = _classified(reached, address, target[place], linked, wanted)[number]
    is_held = code != Heuristic.NONE
    edges = _edges_of(reached, candidates)
    inside = np.zeros(index.chunk_count, np.bool_)
    inside[target] = True
    inside &= ~_is_pointed_to(edges, candidates, inside)
    # Numbers within the candidates: a row each.
    row_of = np.full(index.chunk_count, -1, np.int64)
    row_of[chunks] = np.arange(len(chunks))
    row_of_source = np.where(source >= 0, row_of[np.maximum(source, 0)], -1)
    row_of_target = row_of[target]
    is_start = row_of_source < 0
    if not (is_held & is_start).any():
        return HeldByPatterns(np.empty(0, np.uint32), np.empty(0, np.uint8), np.flatnonzero(inside).astype(np.uint32))
    to_starts = edges_within(edges, chunks, row_of, exact_only=True)
    goes_on = is_held & ~is_start
    by_pattern = edges_from(row_of_source[goes_on], row_of_target[goes_on], len(chunks))
    is_marked = marked_from(both(to_starts, by_pattern), row_of_target[is_held & is_start])
    # The first pointer of a chunk names its pattern.
    counted = np.flatnonzero(is_held & (is_start | is_marked[row_of_source]))[::-1]
    heuristic = np.zeros(len(chunks), np.uint8)
    heuristic[row_of_target[counted]] = code[counted]
    inside[chunks[is_marked]] = False
    return HeldByPatterns(chunks[is_marked], heuristic[is_marked], np.flatnonzero(inside).astype(np.uint32))


def _is_pointed_to(edges: Edges, candidates: UInt64s, asked: Bools) -> Bools:
    """Which of the chunks that are asked about a candidate has a pointer to the start of: bool[chunks]."""
    found = np.zeros(len(asked), np.bool_)
    is_candidate = unpacked(candidates, 0, len(asked))
    for begin in range(0, len(edges.target), EDGES_AT_ONCE):
        part = edges.target[begin : begin + EDGES_AT_ONCE]
        exact = np.flatnonzero(part < np.uint32(INTERIOR))
        exact = exact[asked[part[exact]]]
        source = np.searchsorted(edges.first, (exact + begin).astype(edges.first.dtype), side="right") - 1
        found[part[exact[is_candidate[source]]]] = True
    return found


def _is_of_same_size(index: ChunkIndex, source: Int64s, target: Int64s) -> Bools:
    """Whether the chunk that holds a pointer has the size of that which it leads to; a root never has."""
    sizes = [chunk_extents(index, np.maximum(chunks, 0))[1] for chunks in (source, target)]
    is_same: Bools = (source >= 0) & (sizes[0] == sizes[1])
    return is_same


def _edges_of(reached: Reached, candidates: UInt64s) -> Edges:
    """References in which those of the candidates are; without collected ones only theirs are collected."""
    if reached.edges is not None:
        return reached.edges
    return collect_edges(with_only(reached.index, candidates), reached.memory, reached.mask)


# Pointers to insides


def _pointers_inside(reached: Reached, candidates: UInt64s) -> tuple[Int64s, Int64s, UInt64s]:
    """Source (-1 for a root), target and value of each word of reached chunks and strong roots that leads into a candidate."""
    index, header_bytes = reached.index, np.uint64(reached.index.geometry.header_bytes)
    sources = _sources(reached, candidates)
    start, end = payload_ranges(index, sources)
    of_chunks = find_pointers_to(index, reached.memory, start, end, reached.mask, candidates)
    of_roots = find_pointers_to(index, reached.memory, reached.root_start, reached.root_end, reached.mask, candidates)
    source = np.concatenate(
        [
            find_chunks(index, of_chunks.holder_address - header_bytes, False),
            np.full(len(of_roots.target), -1, np.int64),
        ]
    )
    reference = np.concatenate([of_chunks.target, of_roots.target])
    word = np.concatenate([of_chunks.word, of_roots.word])
    target = (reference & np.uint32(CHUNK_MASK)).astype(np.int64)
    wanted = (reference >= np.uint32(INTERIOR)) & (source != target)
    return source[wanted], target[wanted], word[wanted]


def _sources(reached: Reached, candidates: UInt64s) -> Int64s:
    """Chunks in use that strong roots lead to and that point into a candidate; without collected references all of the
    former."""
    reaching = only_in_use(reached.index, reached.any_strong)
    if reached.edges is None:
        return positions_of(reaching).astype(np.int64)
    first, target = reached.edges.first, reached.edges.target
    is_candidate = unpacked(candidates, 0, reached.index.chunk_count)
    is_source = np.zeros(reached.index.chunk_count, np.bool_)
    for begin in range(0, len(target), EDGES_AT_ONCE):
        part = target[begin : begin + EDGES_AT_ONCE]
        inside = np.flatnonzero(part >= np.uint32(INTERIOR))
        inside = inside[is_candidate[part[inside] & np.uint32(CHUNK_MASK)]] + begin
        is_source[np.searchsorted(first, inside.astype(first.dtype), side="right") - 1] = True
    return np.flatnonzero(is_source & unpacked(reaching, 0, reached.index.chunk_count))


# What speaks for them


def _classified(
    reached: Reached,
    address: UInt64s,
    target: Int64s,
    linked: Bools,
    wanted: Collection[Heuristic],
) -> UInt8s:
    """For each distinct address (into ``target``) its heuristic, NONE where no pattern speaks for it. ``linked``: whether a block
    of the target's size holds the address."""
    code = np.zeros(len(address), np.uint8)
    offset = address - payload_ranges(reached.index, target)[0]
    # What compilers and libraries put before an object is small, whatever the size of the block is.
    near = np.flatnonzero(offset <= np.uint64(LARGEST_HEADER_BYTES))
    within = np.flatnonzero(offset <= np.uint64(LARGEST_BASE_BYTES))
    for rows, of_base in ((near, False), (within, True)):
        for first in range(0, len(rows), BATCH_CHUNKS):
            batch = rows[first : first + BATCH_CHUNKS]
            blocks = _Blocks(reached, address[batch], target[batch])
            for heuristic, applies in blocks.by_table() if of_base else blocks.by_header():
                if heuristic in wanted:
                    found = batch[applies]
                    code[found[code[found] == Heuristic.NONE]] = heuristic
    if Heuristic.CONSTANT_OFFSET in wanted:
        # Blocks of the same size that are held otherwise are not in question.
        is_held = np.zeros(reached.index.chunk_count, np.bool_)
        is_held[target[code != Heuristic.NONE]] = True
        left = np.flatnonzero(~is_held[target])
        if len(left):
            constant = _at_constant_offset(reached, address[left], target[left], linked[left])
            code[left[constant]] = Heuristic.CONSTANT_OFFSET
    return code


def _at_constant_offset(reached: Reached, address: UInt64s, target: Int64s, linked: Bools) -> Bools:
    """Whether nearly all blocks in question of its size are pointed to at the distance that this one is.

    That alone is no sign of a pattern: the distance is as small as a header, or the same for several sizes, or blocks of that
    size themselves point there (``linked``: a list by a member).
    """
    index = reached.index
    header, chunk_bytes = chunk_extents(index, target)
    # No process has more than 2**47 bytes of addresses in one block.
    distance = np.minimum((address - header).astype(np.int64) - index.geometry.header_bytes, (1 << 48) - 1)
    sizes = size_classes((chunk_bytes // np.uint64(index.geometry.alignment)).astype(np.uint32))
    keys, pair, blocks_at = np.unique(sizes << 48 | distance, return_inverse=True, return_counts=True)
    pairs = keys >> 48, keys & ((1 << 48) - 1)
    # A block counts once in its size, however many places of it are pointed to.
    _, first = np.unique(target, return_index=True)
    of_size, blocks_of = np.unique(sizes[first], return_counts=True)
    is_most = blocks_at >= ALIKE_SHARE * blocks_of[np.searchsorted(of_size, pairs[0])]
    distances, at = np.unique(pairs[1], return_inverse=True)
    sizes_at = np.bincount(at[is_most], minlength=len(distances))
    blocks_at_all = np.bincount(at[is_most], weights=blocks_at[is_most], minlength=len(distances))
    is_header = pairs[1] <= HEADER_WORDS * index.geometry.word_bytes
    is_list = 2 * np.bincount(pair[linked], minlength=len(blocks_at)) >= blocks_at
    of_wrapper = (sizes_at[at] >= SEVERAL_SIZES) & (blocks_at_all[at] >= MANY_ALIKE)
    constant = is_most & (
        of_wrapper | ((blocks_at >= MANY_ALIKE) & (is_header | is_list)) | (blocks_at >= VERY_MANY_ALIKE)
    )
    found: Bools = constant[pair]
    return found


class _Blocks:
    """Some blocks that are pointed into, with what lies at their beginnings and around the places pointed to."""

    def __init__(self, reached: Reached, address: UInt64s, target: Int64s) -> None:
        index = reached.index
        self._reached = reached
        self._word = index.geometry.word_bytes
        self._address = address
        start, end = payload_ranges(index, target)
        self._start = start
        self._offset = (address - start).astype(np.int64)
        self._usable = (end - start).astype(np.int64)
        # A request is rounded up to the alignment; a mapping to whole pages.
        is_mapped = target >= index.region_chunks
        spare = np.where(is_mapped, reached.core.page_bytes, index.geometry.alignment)
        self._spare = spare + self._word
        self._smallest = index.geometry.minimum_chunk_bytes - self._word
        # The smallest block has three words; what lies behind them is looked at only where the place pointed to is further on.
        self._head = bytes_at(reached.memory, start, HEAD_BYTES)

    def by_table(self) -> Iterator[tuple[Heuristic, Bools]]:
        yield Heuristic.SECOND_BASE, self._has_table()

    def by_header(self) -> Iterator[tuple[Heuristic, Bools]]:
        yield Heuristic.EXCEPTION_POINTER, self._is_thrown()
        yield Heuristic.LENGTH_PREFIX, self._has_length() | self._is_old_string() | self._is_sds()
        yield Heuristic.NEW_ARRAY, self._has_cookie()

    def _fits(self, requested: Int64s) -> Bools:
        """Whether blocks have the size that malloc gives for such a request."""
        fits: Bools = (requested <= self._usable) & (
            (self._usable - requested < self._spare) | (self._usable == self._smallest)
        )
        return fits

    def _number(self, offset: Int64s | int, byte_count: int) -> Int64s:
        """The unsigned number at an offset of each block; those above 2**62 as -1, and what is not saved as 0."""
        if isinstance(offset, int):
            raw = self._head[:, offset : offset + byte_count]
        else:
            raw = bytes_at(self._reached.memory, self._start + offset.astype(np.uint64), byte_count)
        value = np.ascontiguousarray(raw).view(f"<u{byte_count}").reshape(-1).astype(np.uint64)
        number: Int64s = np.where(value < np.uint64(1 << 62), value, np.uint64((1 << 64) - 1)).view(np.int64)
        return number

    def _has_cookie(self) -> Bools:
        applies = np.zeros(len(self._offset), np.bool_)
        count = self._number(self._offset - self._word, self._word)
        for words in COOKIE_WORDS:
            offset = words * self._word
            room = self._usable - offset
            element = np.where(count > 0, room // np.maximum(count, 1), 0)
            applies |= (self._offset == offset) & (element > 0) & self._fits(offset + count * element)
        return applies

    def _has_table(self) -> Bools:
        memory, core = self._reached.memory, self._reached.core
        aligned = self._offset % self._word == 0
        word = _words_at(memory, self._address, self._word)
        constant, code, own = _places_in_modules(core, word)
        # Without RELRO tables lie in data; then they begin with the address of a function.
        in_data = own & _places_in_modules(core, _words_at(memory, word, self._word))[1]
        applies: Bools = aligned & (constant | code | in_data)
        return applies

    def _has_length(self) -> Bools:
        """A length before the place pointed to: of what follows it, or of the block as a whole."""
        applies = np.zeros(len(self._offset), np.bool_)
        short = (self._offset >= 4) & (self._offset <= LENGTH_WORDS * self._word)
        for byte_count in {4, self._word}:
            for place in range(0, LENGTH_WORDS * self._word, byte_count):
                length = self._number(place, byte_count)
                within = short & (place + byte_count <= self._offset) & (length > 0)
                applies |= within & (self._fits(length + self._offset) | self._fits(length))
        return applies

    def _is_old_string(self) -> Bools:
        word = self._word
        length, capacity = self._number(0, word), self._number(word, word)
        in_order = (length >= 0) & (length <= capacity)
        applies: Bools = (
            (self._offset == STRING_HEADER_WORDS * word) & in_order & self._fits(self._offset + capacity + 1)
        )
        return applies

    def _is_sds(self) -> Bools:
        applies = np.zeros(len(self._offset), np.bool_)
        flags = self._number(self._offset - 1, 1)
        for kind, (header, width) in enumerate(SDS_HEADERS, start=1):
            length, room = self._number(0, width), self._number(width, width)
            end = self._number(header + np.clip(length, 0, np.maximum(self._usable - header - 1, 0)), 1)
            of_kind = (self._offset == header) & (flags & 7 == kind) & (length <= room) & (end == 0)
            applies |= of_kind & (length > 0) & self._fits(header + room + 1)
        return applies

    def _is_thrown(self) -> Bools:
        raw = bytes_at(self._reached.memory, self._address - np.uint64(UNWIND_HEADER_BYTES), 8)
        applies = np.zeros(len(raw), np.bool_)
        for name in EXCEPTION_CLASSES:
            applies |= (raw == np.frombuffer(name, np.uint8)[::-1]).all(axis=1)
        applies &= self._offset >= UNWIND_HEADER_BYTES
        return applies


def _words_at(memory: MemoryMap, address: UInt64s, word_bytes: int) -> UInt64s:
    raw = bytes_at(memory, address, word_bytes)
    words: UInt64s = np.ascontiguousarray(raw).view(f"<u{word_bytes}").reshape(-1).astype(np.uint64)
    return words


def _places_in_modules(core: Core, address: UInt64s) -> tuple[Bools, Bools, Bools]:
    """Whether addresses lie in a module's constants, its code, or what it may write."""
    memory = core.memory
    modules = np.array([(module.start, module.end) for module in core.modules], np.uint64).reshape(-1, 2)
    in_module = row_holding(address, *without_overlap(modules[:, 0], modules[:, 1]))[1]
    row, held = row_holding(address, memory.region_start, memory.region_end)
    flags = memory.region_flags[np.where(held, row, 0)] if memory.region_count else np.zeros(len(address), np.int64)
    known = in_module & held
    writable = (flags & WRITE) != 0
    code = (flags & EXECUTE) != 0
    return known & ~writable & ~code, known & code, known & writable
