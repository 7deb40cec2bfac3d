"""Chunks of a heap for forensics: what lies where, which chunk comes before, what a header should say.

Knows: the chunk table, the flags of a size word. Does not know: what is damaged.
"""

from __future__ import annotations

import numpy as np

from coreheap.corefile import Core
from coreheap.damage import ChunkPlace
from coreheap.errors import MemoryFault
from coreheap.heap import BINNED_STATES, NO_INDEX, ChunkRegion, ChunkState, HeapSnapshot, RegionKind
from coreheap.kernels import chunk_extents

PREV_INUSE, IS_MMAPPED, NON_MAIN_ARENA, FLAGS = 1, 2, 4, 7


class Places:
    """Finds chunks of one heap and reads their words."""

    def __init__(self, core: Core, heap: HeapSnapshot) -> None:
        self._core = core
        self.memory = core.memory
        self.word_bytes = core.word_bytes
        self.page_bytes = core.page_bytes
        self.header_bytes = 2 * core.word_bytes
        self.heap = heap
        self.index = heap.chunks.index

    def word(self, address: int) -> int | None:
        """The word at an address, None where it was not saved."""
        try:
            return self.memory.read_word(address)
        except MemoryFault:
            return None

    def bytes_at(self, address: int, length: int) -> bytes:
        """The bytes at an address, none where one of them was not saved."""
        try:
            return self.memory.read(address, length)
        except MemoryFault:
            return b""

    def is_heap_like(self, address: int) -> bool:
        """Whether memory is mapped at an address that is no module's and no thread's stack."""
        region = self.memory.region_index(address)
        if region is None or self._core.module_at(address) is not None:
            return False
        return all(self.memory.region_index(thread.stack_pointer) != region for thread in self._core.threads[:1024])

    def chunk_at(self, header: int) -> int | None:
        """The number of the chunk with a header address, None without."""
        chunk = self.index.chunk_starting_at(header)
        return chunk if chunk >= 0 else None

    def chunk_holding(self, address: int) -> int | None:
        """The chunk whose bytes, header included, hold an address; None without."""
        chunk = self.index.chunk_containing(address)
        return chunk if chunk >= 0 else None

    def chunk_using(self, address: int) -> int | None:
        """The chunk whose block may hold a byte; None without.

        A chunk's first word, prev_size, is the last usable one of the block before (glibc malloc.c, malloc_chunk, 2.12-2.44).
        """
        chunk = self.chunk_holding(address)
        if chunk is None or address >= self.extent(chunk)[0] + self.word_bytes:
            return chunk
        return self.before(chunk)

    def state(self, chunk: int) -> ChunkState:
        return ChunkState(int(self.index.state[chunk]))

    def extent(self, chunk: int) -> tuple[int, int]:
        """Header address and bytes of a chunk."""
        header, chunk_bytes = chunk_extents(self.index, np.array([chunk], np.int64))
        return int(header[0]), int(chunk_bytes[0])

    def region_of(self, chunk: int) -> ChunkRegion | None:
        """The region of a chunk, None for an mmapped one."""
        if chunk >= self.index.region_chunks:
            return None
        number = int(np.searchsorted(self.index.region_first_chunk, chunk, side="right")) - 1
        return self.heap.chunks.regions[number]

    def mapped_before(self, chunk: int) -> int | None:
        """The mmapped chunk whose mapping ends where this mmapped one's header lies; None without."""
        header = self.extent(chunk)[0]
        other = self.chunk_holding(header - 1)
        return other if other is not None and other >= self.index.region_chunks else None

    def before(self, chunk: int) -> int | None:
        """The chunk directly before in the same region, None without."""
        region = self.region_of(chunk)
        return chunk - 1 if region is not None and chunk > region.first_chunk else None

    def behind(self, chunk: int) -> int | None:
        """The chunk directly behind in the same region, None without."""
        region = self.region_of(chunk)
        last = region is None or chunk + 1 >= region.first_chunk + region.chunk_count
        return None if last else chunk + 1

    def place(self, chunk: int) -> ChunkPlace:
        """The chunk for people, without its holder."""
        header, chunk_bytes = self.extent(chunk)
        table, state, region = self.heap.chunks, self.state(chunk), self.region_of(chunk)
        overhead = table.mmapped_overhead_bytes if region is None else table.word_bytes
        unusable = state in (ChunkState.FENCEPOST, ChunkState.DAMAGED)
        arena = None if region is None or region.arena == NO_INDEX else region.arena
        return ChunkPlace(
            header_address=header,
            payload_address=header + self.header_bytes,
            chunk_bytes=chunk_bytes,
            usable_bytes=0 if unusable else chunk_bytes - overhead,
            state=state,
            arena=arena,
            is_mmapped=region is None,
        )

    def expected_size_word(self, chunk: int) -> int | None:
        """What the size word of a chunk should be, by the walk and the free lists; None where its size is not known."""
        state, region = self.state(chunk), self.region_of(chunk)
        if region is None or state in (ChunkState.DAMAGED, ChunkState.FENCEPOST):
            return None
        before = self.before(chunk)
        word = self.extent(chunk)[1]
        word |= PREV_INUSE if before is None or not self.is_binned(before) else 0
        looks_free = state in (*BINNED_STATES, ChunkState.FREE_UNLISTED, ChunkState.TOP)
        return word | (NON_MAIN_ARENA if region.kind is RegionKind.ARENA_HEAP and not looks_free else 0)

    def end_of_top(self, header: int) -> int | None:
        """Where the memory ends that an arena's top reaches to, by heap_info or mp_ and system_mem; None where none tells."""
        for arena in self.heap.arenas:
            if arena.top_address != header:
                continue
            for sub_heap in arena.sub_heaps:
                if header in sub_heap.range:
                    return sub_heap.range.end
            parameters = self.heap.copies[arena.copy].parameters if arena.copy < len(self.heap.copies) else None
            base = parameters.value("sbrk_base") if parameters is not None else None
            if arena.is_main and arena.is_contiguous and base and arena.system_mem:
                end = base + arena.system_mem
                return end if base <= header < end else None
            region = self.memory.region_index(header)
            if arena.is_main and arena.is_contiguous and region is not None:
                # The break is where the mapping ends.
                return int(self.memory.region_end[region])
        return None

    def is_binned(self, chunk: int) -> bool:
        """Whether the chunk behind has to say that this one is free."""
        return self.state(chunk) in (*BINNED_STATES, ChunkState.FREE_UNLISTED)
