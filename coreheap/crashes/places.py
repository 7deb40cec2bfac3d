"""What lies at an address: for the fault, and for what registers hold.

Knows: chunks and their states, damage, malloc's own data, stacks and their guards, modules, mappings. Does not know: why it is
asked, or what was meant to lie there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from coreheap.corefile import Core
from coreheap.corefile.stacks import Stack, Stacks
from coreheap.corefile.unwinding import ModuleMap
from coreheap.crash import FaultKind, PlaceNote
from coreheap.damage import ChunkPlace, Damage
from coreheap.heap import NO_INDEX, ChunkState, HeapSnapshot
from coreheap.kernels import chunk_extents

NULL_BYTES = 1 << 16
"""No process has memory below (vm.mmap_min_addr); an offset into an object at address 0 is seldom larger."""
BEHIND_BYTES = 1 << 16
"""So far behind the last chunk of a mapping an access counts as past that chunk's end."""
GUARD_BYTES = 1 << 20
"""So far below the program's own stack the kernel keeps free (stack_guard_gap, 256 pages)."""
NEAR_STACK_POINTER = 1 << 16
LARGEST_FRAME = 1 << 30
"""A stack pointer further below its caller's frame has been overwritten: no function has so many local variables."""
RED_ZONE = 128
"""So far below its stack pointer a function may use the stack (System V ABI, AMD64)."""
_READ, _WRITE, _EXECUTE = 4, 2, 1
_FREED = frozenset(
    (
        ChunkState.TCACHE,
        ChunkState.FASTBIN,
        ChunkState.UNSORTED_BIN,
        ChunkState.SMALL_BIN,
        ChunkState.LARGE_BIN,
        ChunkState.FREE_UNLISTED,
    )
)
_STATE_WORDS = {
    ChunkState.IN_USE: "live chunk",
    ChunkState.TCACHE: "freed chunk (in a tcache)",
    ChunkState.FASTBIN: "freed chunk (in a fastbin)",
    ChunkState.UNSORTED_BIN: "freed chunk (in the unsorted bin)",
    ChunkState.SMALL_BIN: "freed chunk (in a small bin)",
    ChunkState.LARGE_BIN: "freed chunk (in a large bin)",
    ChunkState.TOP: "top, the rest of a heap that was never given out or is free again",
    ChunkState.FENCEPOST: "fencepost at a heap's end",
    ChunkState.ALLOCATOR_OWN: "malloc's own data",
    ChunkState.FREE_UNLISTED: "freed chunk (on no list)",
    ChunkState.DAMAGED: "damaged chunk",
}


def is_canonical(address: int, machine: str) -> bool:
    """Whether x86-64 takes a number for an address, with four or five levels of page tables; True for other machines."""
    if machine != "x86_64":
        return True
    # With five levels, which a process must ask for (mmap with a hint above 2**47), 57 bits count. Such addresses are rare
    # enough: what is none with four levels is called none.
    return address >> 47 in (0, (1 << 17) - 1)


class Places:
    """Names addresses of one process. ``crashed``: the thread whose stack pointer tells an overflow."""

    def __init__(
        self, core: Core, heap: HeapSnapshot | None, stacks: Stacks, damages: Iterable[Damage], crashed: int = 0
    ) -> None:
        self._core = core
        self._memory = core.memory
        self._heap = heap
        self._stacks = stacks
        self._crashed = crashed
        self._modules = ModuleMap(core)
        self._victims = {damage.victim.header_address for damage in damages if damage.victim is not None}

    def fault(
        self, address: int, *, was_denied: bool, stack_pointers: Sequence[int] = (), was_past_file: bool = False
    ) -> PlaceNote:
        """What lies where an access failed. ``was_denied``: there was memory, and the access was not allowed. ``stack_pointers``: of
        the frame that failed and of its callers, as far as they are certain. ``was_past_file``: the kernel had no page for a mapping.
        """
        address = self._memory.untagged(address)
        if not is_canonical(address, self._core.machine):
            return PlaceNote(address, FaultKind.NON_CANONICAL, "no address on x86-64")
        return (
            self._near_null(address)
            or self.in_heap(address)
            or self._behind_heap(address)
            or self._below_stack(address)
            or self._in_too_large_frame(address, stack_pointers)
            or self._in_stack(address)
            or self._mapped(address, was_denied, was_past_file)
        )

    def in_heap(self, address: int) -> PlaceNote | None:
        """A chunk or malloc's own data; None for other memory."""
        if self._heap is None:
            return None
        index, word = self._heap.chunks.index, self._core.word_bytes
        found = index.chunk_containing(address)
        if found >= 0:
            # A chunk's first word belongs to the chunk before it, as malloc_usable_size says.
            before = index.chunk_containing(address - word)
            found = before if before >= 0 else found
        if found >= 0:
            return self._in_chunk(address, found)
        for own in self._heap.own_ranges:
            if own.start <= address < own.end:
                return PlaceNote(address, FaultKind.ALLOCATOR_DATA, f"malloc's own data at {own.start:#x}")
        for arena in self._heap.arenas:
            for heap in arena.sub_heaps:
                if heap.address <= address < heap.address + heap.overhead_bytes:
                    text = f"malloc's own data at the start of a heap of arena {arena.index}"
                    return PlaceNote(address, FaultKind.ALLOCATOR_DATA, text, offset=address - heap.address)
        return None

    def _in_chunk(self, address: int, number: int) -> PlaceNote:
        chunk = self.chunk(number)
        offset = address - chunk.payload_address
        kind = FaultKind.LIVE_CHUNK
        if chunk.state is ChunkState.DAMAGED or chunk.header_address in self._victims:
            kind = FaultKind.DAMAGED_CHUNK
        elif chunk.state in _FREED:
            kind = FaultKind.FREED_CHUNK
        elif chunk.state is not ChunkState.IN_USE:
            kind = FaultKind.ALLOCATOR_DATA
        words = _STATE_WORDS[chunk.state]
        if kind is FaultKind.DAMAGED_CHUNK and chunk.state is not ChunkState.DAMAGED:
            words = f"damaged chunk ({chunk.state.label})"
        where = f"{offset} bytes into" if offset >= 0 else f"{-offset} bytes before the payload of"
        return PlaceNote(
            address, kind, f"{where} a {chunk.usable_bytes} byte {words} at {chunk.payload_address:#x}", chunk, offset
        )

    def chunk(self, number: int) -> ChunkPlace:
        """One chunk by its number in the chunk table."""
        assert self._heap is not None
        table, index = self._heap.chunks, self._heap.chunks.index
        header, chunk_bytes = (int(column[0]) for column in chunk_extents(index, np.array([number], np.int64)))
        is_mmapped = number >= index.region_chunks
        state = ChunkState(int(index.state[number]))
        overhead = table.mmapped_overhead_bytes if is_mmapped else table.word_bytes
        arena: int | None = None
        if not is_mmapped:
            region = int(np.searchsorted(index.region_first_chunk, number, side="right")) - 1
            arena = table.regions[region].arena
        return ChunkPlace(
            header_address=header,
            payload_address=header + index.geometry.header_bytes,
            chunk_bytes=chunk_bytes,
            usable_bytes=0 if state in (ChunkState.FENCEPOST, ChunkState.DAMAGED) else max(chunk_bytes - overhead, 0),
            state=state,
            arena=None if arena == NO_INDEX else arena,
            is_mmapped=is_mmapped,
        )

    def _near_null(self, address: int) -> PlaceNote | None:
        """A null pointer and an offset, which may be negative."""
        limit = 1 << 8 * self._core.word_bytes
        offset = address if address < NULL_BYTES else address - limit
        if not -NULL_BYTES <= offset < NULL_BYTES or self._memory.region_index(address) is not None:
            return None
        text = "null pointer" if offset == 0 else f"null pointer {'+' if offset > 0 else '-'} {abs(offset):#x}"
        return PlaceNote(address, FaultKind.NULL, text, offset=offset)

    def _is_accessible(self, address: int) -> bool:
        region = self._memory.region_index(address)
        if region is None:
            return False
        flags = int(self._memory.region_flags[region])
        return bool(flags & (_READ | _WRITE | _EXECUTE)) or (
            flags == 0 and int(self._memory.region_file_index[region]) >= 0
        )

    def _behind_heap(self, address: int) -> PlaceNote | None:
        """Shortly behind the last chunk of a mapping, where nothing may be accessed."""
        if self._heap is None or self._is_accessible(address):
            return None
        index = self._heap.chunks.index
        row = int(np.searchsorted(index.mmapped.header_address, np.uint64(address), side="right")) - 1
        if row >= 0:
            end = int(index.mmapped.mapping_start[row]) + int(index.mmapped.mapping_bytes[row])
            if 0 <= address - end < BEHIND_BYTES:
                chunk = self.chunk(index.region_chunks + row)
                text = f"{address - end} bytes behind the {chunk.usable_bytes} byte mmapped chunk at {chunk.payload_address:#x}"
                offset = address - chunk.payload_address
                return PlaceNote(address, FaultKind.PAST_CHUNK_END, text, chunk, offset)
        row = int(np.searchsorted(index.region_start, np.uint64(address), side="right")) - 1
        if row < 0:
            return None
        region, end = self._heap.chunks.regions[row], int(index.region_end[row])
        # A region may end before its mapping does: the page that holds its end is the last one.
        if not 0 <= address - end < BEHIND_BYTES:
            return None
        last = self.chunk(region.first_chunk + region.chunk_count - 1)
        text = f"{address - end} bytes behind the end of a heap of arena {region.arena}"
        if last.state is ChunkState.IN_USE:
            text += f", whose last chunk, {last.usable_bytes} bytes at {last.payload_address:#x}, is live"
            return PlaceNote(address, FaultKind.PAST_CHUNK_END, text, last, address - last.payload_address)
        return PlaceNote(address, FaultKind.PAST_CHUNK_END, text)

    def _below_stack(self, address: int) -> PlaceNote | None:
        """In the guard of a thread's stack, or where the kernel would not let the program's own stack grow."""
        pointer = self._core.threads[self._crashed].stack_pointer
        for stack in self._stacks.by_thread.values():
            guard = self._guard_bytes(stack)
            if not stack.start - guard <= address < stack.start or self._is_accessible(address):
                continue
            text = f"{stack.start - address} bytes below the stack of thread {stack.thread}"
            if stack.thread == self._crashed and self._has_overflowed(stack, pointer):
                text += ", which has overflowed: its stack pointer is at the stack's end"
            return PlaceNote(address, FaultKind.STACK_GUARD, text, offset=address - stack.start)
        return None

    def _in_too_large_frame(self, address: int, stack_pointers: Sequence[int]) -> PlaceNote | None:
        """In the frame of a function that needs more than was left of the stack, guard included: a large array, alloca."""
        if len(stack_pointers) < 2 or self._is_accessible(stack_pointers[0]) or self._is_accessible(address):
            return None
        pointer, caller = stack_pointers[:2]
        is_frame = 0 < caller - pointer <= LARGEST_FRAME and self._is_accessible(caller)
        if not is_frame or not pointer - RED_ZONE <= address < caller:
            return None
        text = f"in a frame of {caller - pointer} bytes, for which the stack of thread {self._crashed} has no room: it has overflowed"
        return PlaceNote(address, FaultKind.STACK_GUARD, text)

    def _guard_bytes(self, stack: Stack) -> int:
        if self._stacks.initial is not None and (stack.start, stack.end) == self._stacks.initial:
            return GUARD_BYTES
        return stack.guard_bytes or 0

    def _has_overflowed(self, stack: Stack, pointer: int) -> bool:
        """Whether a thread was at the lower end of its stack: by its stack pointer, or where a signal interrupted it."""
        if stack.used_bytes is not None and stack.signal_stack is not None:
            pointer = stack.end - stack.used_bytes
        return pointer - stack.start < NEAR_STACK_POINTER and pointer < stack.end

    def _in_stack(self, address: int) -> PlaceNote | None:
        for stack in self._stacks.by_thread.values():
            if stack.start <= address < stack.end:
                text = f"{stack.end - address} bytes below the end of the stack of thread {stack.thread}"
                return PlaceNote(address, FaultKind.STACK, text, offset=address - stack.start)
        return None

    def _mapped(self, address: int, was_denied: bool, was_past_file: bool) -> PlaceNote:
        region = self._memory.region_index(address)
        if region is None:
            return PlaceNote(address, FaultKind.UNMAPPED, self._neighbours(address))
        flags, row = int(self._memory.region_flags[region]), int(self._memory.region_file_index[region])
        module = self._modules.at(address)
        if module is not None:
            where = f"{module.name or 'the program'}+{address - module.start:#x}"
        elif row >= 0:
            file = self._memory.mapped_files[row]
            where = f"the mapped file {file.path}"
            if was_past_file:
                where += f", {address - file.start + file.file_offset} bytes into it: it had no such page when it was accessed"
                where += ", as when it was cut short or its disk was full"
        else:
            where = "an anonymous mapping"
        if was_denied and flags & _READ and not flags & _WRITE:
            return PlaceNote(address, FaultKind.READ_ONLY, f"{where}, which may not be written to")
        if flags == 0 and row < 0:
            return PlaceNote(address, FaultKind.OTHER_MEMORY, f"{where}, which may not be accessed at all")
        kind = FaultKind.MODULE if module is not None else FaultKind.OTHER_MEMORY
        return PlaceNote(address, kind, where)

    def _neighbours(self, address: int) -> str:
        """What lies nearest below, where nothing is mapped."""
        memory = self._memory
        row = int(np.searchsorted(memory.region_start, np.uint64(address), side="right")) - 1
        if row < 0:
            return "not mapped, below all memory of the process"
        end = int(memory.region_end[row])
        module = self._modules.at(end - 1)
        what = f" ({module.name})" if module is not None and module.name else ""
        return f"not mapped, {address - end} bytes behind the mapping that ends at {end:#x}{what}"
