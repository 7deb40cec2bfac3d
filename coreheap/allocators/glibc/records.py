"""Reading glibc's structures out of a core: malloc_state, malloc_par, heap_info, tcache_perthread_struct.

Knows: how to decode a structure whose offsets are given. Does not know which layout is right, or what to conclude.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.layouts import (
    HEAP_INFO,
    MALLOC_PAR,
    MALLOC_STATE,
    TCACHE_PERTHREAD,
)
from coreheap.allocators.glibc.structures import (
    Generation,
    Structure,
    TcacheKey,
    WordClass,
    heap_info_bytes,
    structure,
)
from coreheap.corefile import AddressSpace
from coreheap.kernels import ChunkGeometry

UInt64s = npt.NDArray[np.uint64]

BIN_COUNT = 127
"""Bins 1 to 127 (NBINS is 128, bin 0 does not exist)."""

NONCONTIGUOUS_BIT = 2
FREE_LIST_LIMIT = 1 << 16
"""More arenas than any setting of glibc makes; ends the walk of a damaged ring."""

_UNSIGNED: dict[int, str] = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


@dataclass(frozen=True, slots=True)
class Layout:
    """One generation for one word class: everything that is needed to read a heap.

    All that follows from the two is worked out once: it is asked for at each arena and each sub-heap.
    """

    generation: Generation
    word_class: WordClass
    state: Structure = field(init=False, repr=False, compare=False)
    parameters: Structure = field(init=False, repr=False, compare=False)
    heap_info: Structure = field(init=False, repr=False, compare=False)
    heap_info_bytes: int = field(init=False, repr=False, compare=False)
    tcache: Structure | None = field(init=False, repr=False, compare=False)
    tcache_chunk_bytes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Sizes that the chunk of a tcache structure can have; empty before 2.26.

    A chunk may be larger than asked for by less than MINSIZE, when what is left over could not be a chunk.
    """

    def __post_init__(self) -> None:
        generation, word_class = self.generation, self.word_class
        tcache = structure(TCACHE_PERTHREAD[generation.tcache], word_class) if generation.tcache else None
        heap_info = HEAP_INFO[generation.heap_info]
        for name, value in (
            ("state", structure(MALLOC_STATE[generation.malloc_state], word_class)),
            ("parameters", structure(MALLOC_PAR[generation.malloc_par], word_class)),
            ("heap_info", structure(heap_info, word_class)),
            ("heap_info_bytes", heap_info_bytes(heap_info, word_class)),
            ("tcache", tcache),
            ("tcache_chunk_bytes", _tcache_chunk_bytes(generation, word_class, tcache)),
        ):
            object.__setattr__(self, name, value)

    @property
    def without_tcache(self) -> Layout:
        """The same release's malloc as libc_malloc_debug has it; itself before 2.26."""
        row = self.generation
        if row.tcache is None:
            return self
        without = replace(
            row,
            malloc_par=f"{row.malloc_par} without tcache",
            tcache=None,
            tcache_key=TcacheKey.NONE,
            tcache_counts_free_slots=False,
            tcache_may_be_padded_twice=False,
            tcache_is_never_null=False,
        )
        return Layout(without, self.word_class)

    @property
    def first_chunk_in_arena_heap(self) -> int:
        """Offset of the first chunk in the heap that holds its malloc_state: the payload is aligned, not the chunk."""
        header = self.word_class.header_bytes
        end = self.heap_info_bytes + self.state.byte_count + header
        return -(-end // self.word_class.alignment) * self.word_class.alignment - header

    @property
    def geometry(self) -> ChunkGeometry:
        """The chunk sizes as the kernels take them."""
        word_class = self.word_class
        return ChunkGeometry(
            word_class.word_bytes,
            word_class.alignment,
            word_class.minimum_chunk_bytes,
            word_class.granule_phase,
        )

    def aligned_header(self, address: int) -> int:
        """The first possible chunk header at or behind an address."""
        word_class = self.word_class
        return address + (word_class.granule_phase - address) % word_class.alignment

    @property
    def mmapped_trailer_bytes(self) -> int:
        return self.generation.mmapped_trailer_words * self.word_class.word_bytes

    def bin_header(self, arena: int, number: int) -> int:
        """Address that bin ``number``'s list uses as its chunk: fd and bk fall on the bin's two words."""
        word = self.word_class.word_bytes
        return arena + self.state.offset("bins") + 2 * word * (number - 1) - 2 * word


def _tcache_chunk_bytes(generation: Generation, word_class: WordClass, tcache: Structure | None) -> tuple[int, ...]:
    if tcache is None:
        return ()
    asked = [word_class.chunk_bytes_for(tcache.byte_count)]
    if generation.tcache_may_be_padded_twice:
        asked.append(word_class.chunk_bytes_for(asked[0]))
    surplus = range(0, word_class.minimum_chunk_bytes, word_class.alignment)
    return tuple(sorted({size + more for size in asked for more in surplus}))


def scalar(raw: bytes, fields: Structure, name: str) -> int:
    """One field of a structure's bytes as an unsigned integer."""
    field = fields.fields[name]
    return int.from_bytes(raw[field.offset : field.offset + field.element_bytes], "little")


def column(raw: bytes, fields: Structure, name: str) -> UInt64s:
    """An array field of a structure's bytes, widened to uint64."""
    field = fields.fields[name]
    values: UInt64s = np.frombuffer(raw, _UNSIGNED[field.element_bytes], field.count, field.offset).astype(np.uint64)
    return values


@dataclass(frozen=True, slots=True)
class ArenaState:
    """A malloc_state as it was saved. ``bins`` is uint64[254], ``fastbins`` uint64[NFASTBINS] (empty from 2.43).

    ``next_free`` and ``attached_threads`` are None in releases that have no such field.
    """

    address: int
    mutex: int
    flags: int
    top: int
    last_remainder: int
    next: int
    next_free: int | None
    attached_threads: int | None
    system_mem: int
    max_system_mem: int
    fastbins: UInt64s
    bins: UInt64s

    @property
    def is_contiguous(self) -> bool:
        return not self.flags & NONCONTIGUOUS_BIT

    @property
    def is_unused(self) -> bool:
        """main_arena before the first malloc: no top, no bins (up to 2.41)."""
        return self.top == 0 and self.system_mem == 0


def read_arena(memory: AddressSpace, address: int, layout: Layout) -> ArenaState:
    """The malloc_state at ``address``. Raises MemoryFault where a part was not saved."""
    fields = layout.state
    raw = memory.read(address, fields.byte_count)
    return ArenaState(
        address=address,
        mutex=scalar(raw, fields, "mutex"),
        flags=scalar(raw, fields, "flags"),
        top=scalar(raw, fields, "top"),
        last_remainder=scalar(raw, fields, "last_remainder"),
        next=scalar(raw, fields, "next"),
        next_free=scalar(raw, fields, "next_free") if "next_free" in fields else None,
        attached_threads=(scalar(raw, fields, "attached_threads") if "attached_threads" in fields else None),
        system_mem=scalar(raw, fields, "system_mem"),
        max_system_mem=scalar(raw, fields, "max_system_mem"),
        fastbins=(column(raw, fields, "fastbinsY") if "fastbinsY" in fields else np.zeros(0, np.uint64)),
        bins=column(raw, fields, "bins"),
    )


@dataclass(frozen=True, slots=True)
class HeapInfo:
    """A heap_info as it was saved: ``size`` is what the arena may use, ``mprotect_size`` what was ever accessible."""

    address: int
    ar_ptr: int
    prev: int
    size: int
    mprotect_size: int


def read_heap_info(memory: AddressSpace, address: int, layout: Layout) -> HeapInfo:
    """The heap_info at ``address``. Raises MemoryFault where a part was not saved."""
    fields = layout.heap_info
    raw = memory.read(address, fields.byte_count)
    return HeapInfo(address, *(scalar(raw, fields, name) for name in ("ar_ptr", "prev", "size", "mprotect_size")))


def heap_info_is_plausible(info: HeapInfo, heap_max: int, page_bytes: int) -> bool:
    """Whether the numbers of a heap_info fit together, whoever it belongs to."""
    return (
        info.ar_ptr != 0
        and 0 < info.size <= heap_max
        and info.size % page_bytes == 0
        and info.size <= info.mprotect_size <= heap_max
        and info.prev % heap_max == 0
        and info.prev != info.address
    )


def read_parameters(memory: AddressSpace, address: int, layout: Layout) -> dict[str, int]:
    """Every field of the malloc_par at ``address`` by name. Raises MemoryFault where a part was not saved."""
    fields = layout.parameters
    raw = memory.read(address, fields.byte_count)
    return {name: scalar(raw, fields, name) for name in fields.fields}


@dataclass(frozen=True, slots=True)
class TcacheState:
    """A tcache_perthread_struct as it was saved: one count and one list head (payload address) a bin.

    ``counts`` are blocks cached up to 2.41, free slots from 2.42.
    """

    address: int
    counts: UInt64s
    entries: UInt64s


def read_tcache(memory: AddressSpace, address: int, layout: Layout) -> TcacheState:
    """The tcache_perthread_struct at payload address ``address``. Raises MemoryFault; the layout must have a tcache."""
    fields = layout.tcache
    if fields is None:
        raise ValueError(f"{layout.generation.name} has no tcache")
    raw = memory.read(address, fields.byte_count)
    return TcacheState(address, column(raw, fields, "counts"), column(raw, fields, "entries"))
