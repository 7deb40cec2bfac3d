"""The rules about chunk headers that all walks of the reference share.

Knows: size words, flags, fenceposts, top. Does not know: what is done with the chunks.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import cast

from coreheap.kernels.codes import StopReason
from coreheap.kernels.values import OFFSET_LIMIT, ChunkGeometry, Memory

PREV_INUSE = 1
IS_MMAPPED = 2
NON_MAIN_ARENA = 4
FLAGS = 7

END_MARKER = PREV_INUSE
"""Size word at the end of a retired sub-heap: size 0, PREV_INUSE (glibc sysmalloc, all releases)."""


def byte_view(memory: Memory) -> memoryview:
    """The memory as bytes, without a copy."""
    # numpy's annotations know arrays as buffers from Python 3.12 on only.
    return memoryview(cast("bytes", memory)).cast("B")


def word_reader(memory: Memory, word_bytes: int) -> tuple[Callable[[int], int], int]:
    """A function that reads the word at an offset, and the number of bytes there are."""
    view = byte_view(memory)
    unpack_from = struct.Struct("<Q" if word_bytes == 8 else "<I").unpack_from

    def read(offset: int) -> int:
        word: int = unpack_from(view, offset)[0]
        return word

    return read, len(view)


class Region:
    """The headers of one region, with the rules that all walks share.

    ``saved`` bytes of it are readable; ordinary chunks have to end at top, or at the region's end.
    """

    def __init__(
        self, memory: Memory, geometry: ChunkGeometry, stop_offset: int, region_bytes: int, first_offset: int
    ) -> None:
        self.read, self.saved = word_reader(memory, geometry.word_bytes)
        self.geometry = geometry
        self.word = geometry.word_bytes
        self.bytes = self.saved if region_bytes < 0 else region_bytes
        if not self.saved <= self.bytes <= OFFSET_LIMIT:
            raise ValueError(f"{self.saved} bytes of memory for a region of {self.bytes}")
        if not 0 <= first_offset <= OFFSET_LIMIT or first_offset % geometry.alignment:
            raise ValueError(f"no chunk header can lie at offset {first_offset}")
        has_top = first_offset <= stop_offset < self.bytes and stop_offset % geometry.alignment == 0
        self.stop_offset = stop_offset if has_top else -1

    def header_is_saved(self, offset: int) -> bool:
        return offset + 2 * self.word <= self.saved

    def size_word(self, offset: int) -> int:
        return self.read(offset + self.word)

    def size_is_possible(self, offset: int, size: int) -> bool:
        geometry = self.geometry
        limit = self.stop_offset if offset <= self.stop_offset else self.bytes
        return size >= geometry.minimum_chunk_bytes and size % geometry.alignment == 0 and offset + size <= limit

    def end_of_fenceposts(self, offset: int) -> int:
        """Where fenceposts that end at ``offset`` leave off: 32-bit glibc with 16-byte alignment has 8 bytes to spare."""
        spare = self.geometry.alignment - 2 * self.word
        return offset + spare if offset + spare == self.bytes else offset

    def fenceposts_at(self, offset: int) -> StopReason | None:
        """Whether two headers of two words each lie here, the second ending a sub-heap or a piece of the main arena."""
        if self.size_word(offset) & ~FLAGS != 2 * self.word or not self.header_is_saved(offset + 2 * self.word):
            return None
        second = self.size_word(offset + 2 * self.word)
        if second == END_MARKER:
            return StopReason.FENCEPOSTS_HEAP
        return StopReason.FENCEPOSTS_MAIN if second & ~FLAGS == 2 * self.word else None

    def is_short_fencepost(self, size_word: int) -> bool:
        """A retired top too small to be freed: a chunk of 2 words + 1 granule, directly before the end marker."""
        size = 2 * self.word + self.geometry.alignment
        return size_word & ~FLAGS == size and not size_word & NON_MAIN_ARENA

    def top_is_possible(self) -> bool:
        size = self.size_word(self.stop_offset) & ~FLAGS
        return size >= 2 * self.word and self.stop_offset + size <= self.bytes

    def top_end(self) -> int:
        """Where the top chunk ends: at its size, or at the region's end where its size is impossible."""
        if not self.top_is_possible():
            return self.bytes
        return self.stop_offset + (self.size_word(self.stop_offset) & ~FLAGS)


def follow(region: Region, offset: int) -> tuple[StopReason | None, int]:
    """One step of a chain: None and the next header, or why it ends and where.

    A chain is stricter than a walk: whatever a walk would call an anomaly of a chunk's size breaks it.
    """
    if offset == region.bytes:
        return StopReason.END, offset
    if not region.header_is_saved(offset):
        return StopReason.CUT, offset
    if offset == region.stop_offset:
        return StopReason.TOP, region.top_end()
    size_word = region.size_word(offset)
    size = size_word & ~FLAGS
    if not region.size_is_possible(offset, size):
        fenceposts = region.fenceposts_at(offset)
        if fenceposts is not None:
            return fenceposts, region.end_of_fenceposts(offset + 4 * region.word)
        marker_end = region.end_of_fenceposts(offset + 2 * region.word)
        if size_word == END_MARKER and marker_end == region.bytes:
            return StopReason.FENCEPOSTS_HEAP, marker_end
        return StopReason.BROKEN, offset
    if size_word & IS_MMAPPED:
        return StopReason.BROKEN, offset
    next_offset = offset + size
    if next_offset != region.bytes:
        if not region.header_is_saved(next_offset):
            return StopReason.CUT, offset
        next_word = region.size_word(next_offset)
        if not next_word & PREV_INUSE and region.read(next_offset) != size:
            return StopReason.BROKEN, offset
        if next_word == END_MARKER and region.is_short_fencepost(size_word):
            return StopReason.FENCEPOSTS_HEAP, region.end_of_fenceposts(next_offset + 2 * region.word)
    return None, next_offset
