"""The address space by kind, as values: what every mapped byte is used for, and by whom.

Knows: the words and the shape of the table. Does not know: how any of it was found (``accounting``), nor how it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from coreheap.evidence import Confidence

UInt64s = npt.NDArray[np.uint64]


class MappingKind(Enum):
    """What a stretch of the address space is used for. New kinds may be added; none changes its meaning."""

    MAIN_ARENA = "main_arena"
    """The main arena's memory, from brk or by mmap."""
    ARENA_HEAP = "arena_heap"
    """The committed part of a sub-heap (heap_info.size)."""
    ARENA_RESERVE = "arena_reserve"
    """What a sub-heap has reserved beyond that."""
    MMAPPED_CHUNK = "mmapped_chunk"
    FOREIGN_SBRK = "foreign_sbrk"
    """What somebody other than malloc took from the break: between the main arena's pieces, or before and after all of it."""
    MAIN_STACK = "main_stack"
    THREAD_STACK = "thread_stack"
    STACK_GUARD = "stack_guard"
    SIGNAL_STACK = "signal_stack"
    """A stack of sigaltstack's."""
    ENDED_STACK = "ended_stack"
    """A stack that glibc keeps of a thread that has ended."""
    UNJOINED_STACK = "unjoined_stack"
    """The stack of a thread that has ended and that nobody joined or detached so far."""
    TLS = "tls"
    """Thread-local storage and thread descriptor."""
    MODULE_TEXT = "module_text"
    MODULE_RODATA = "module_rodata"
    MODULE_DATA = "module_data"
    MODULE_BSS = "module_bss"
    MAPPED_FILE = "mapped_file"
    SHARED_MEMORY = "shared_memory"
    """Memory shared without a file that lasts: shmget, memfd, /dev/shm, anonymous MAP_SHARED."""
    KERNEL_PAGES = "kernel_pages"
    """The vDSO and its data."""
    JAVA_HEAP = "java_heap"
    JAVA_METASPACE = "java_metaspace"
    JAVA_CODE_CACHE = "java_code_cache"
    JAVA_GC = "java_gc"
    """The collector's own tables: cards, mark bitmaps, remembered sets."""
    OTHER_ALLOCATOR = "other_allocator"
    """Memory that looks like another allocator's; the owner says whose."""
    TOOL_MEMORY = "tool_memory"
    """Shadow memory and reserves of a tool that watches the program (a sanitizer); the owner says whose."""
    NO_ACCESS = "no_access"
    """Reserved address space that nothing above explains."""
    UNEXPLAINED = "unexplained"
    """Anonymous memory that nothing explains."""


KINDS = tuple(MappingKind)
"""The kinds by the number that columns have for them."""


UNKNOWN_FLAGS = 8
"""The flags of memory that no program header tells of, only the list of mapped files."""


class ResidencyBasis(Enum):
    """What is known of which pages were in memory."""

    HOLES = "holes"
    """The kernel wrote the core and left out every anonymous page that was not there: exact, swapped pages included."""
    ZERO_PAGES = "zero_pages"
    """Pages with content were there; pages of zeros may have been: bounds."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class MappingTable:
    """Every mapped byte in exactly one row; rows are sorted by address and do not overlap. Columns of equal length.

    ``start``, ``end``: uint64; ``kind``: uint8, a row of KINDS; ``flags``: uint8 (4 read, 2 write, 1 execute; UNKNOWN_FLAGS);
    ``thread`` and ``arena``: int32, -1 for none; ``name``: int32, a row of ``names`` (a module, a file, another allocator), -1 for
    none. All else uint64: ``committed_bytes``, what the program may access, and of what it may not the pages that hold something
    all the same; ``saved_bytes``, what the core holds; ``resident_low`` and ``resident_high``: at least and at most so many bytes
    were in memory (or swapped out) at the dump, equal where that is known exactly.

    Stretches side by side of one kind, owner and flags are one row, except that each mmapped chunk has its own.
    """

    start: UInt64s
    end: UInt64s
    kind: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    thread: npt.NDArray[np.int32]
    arena: npt.NDArray[np.int32]
    name: npt.NDArray[np.int32]
    committed_bytes: UInt64s
    saved_bytes: UInt64s
    resident_low: UInt64s
    resident_high: UInt64s
    names: tuple[str, ...]
    basis: ResidencyBasis
    residency_confidence: Confidence = Confidence.CERTAIN
    """How sure it is that holes of the file are pages that were not there; bounds that rest on no hole are certain."""
    supposed_bytes: Mapping[MappingKind, int] = field(default_factory=dict)
    """Of which kinds how many committed bytes are told by their place alone: a mapping that a stack pointer lies in, what follows a
    module's data where its program headers are not in the core. They may be something else. Kinds without any are left out."""

    def __len__(self) -> int:
        return len(self.start)

    def bytes_of(self, *kinds: MappingKind) -> int:
        """Mapped bytes of some kinds."""
        rows = np.isin(self.kind, [KINDS.index(kind) for kind in kinds])
        return int((self.end[rows] - self.start[rows]).sum())
