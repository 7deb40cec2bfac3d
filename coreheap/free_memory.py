"""What malloc holds free, page by page, and what keeps it: as values.

Knows: the words and the shape. Does not know: how any of it was found (``retention``), nor how it is shown.

*Free* are chunks in fastbins and bins, and tops. Blocks in a tcache are in use for malloc itself: it neither joins them with
their neighbours nor gives their pages back, so they count apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from coreheap.leaks import Verdict
from coreheap.mappings import ResidencyBasis


@dataclass(frozen=True, slots=True)
class TrimEstimate:
    """What ``malloc_trim(0)`` would do at this moment. Whole pages, in bytes.

    ``bins_bytes``: inside of free chunks, by MADV_DONTNEED; ``top_bytes``: from the main arena's end, by sbrk. ``resident_low`` and
    ``resident_high``: at least and at most so many of both were still in memory (or swapped out), so that this is what RSS
    (and swap) would drop by; the rest was given back, or never touched. ``top_unsure_bytes`` come on top where the core does not
    show whether the main arena ends at the break.
    """

    bins_bytes: int = 0
    top_bytes: int = 0
    resident_low: int = 0
    resident_high: int = 0
    top_unsure_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.bins_bytes + self.top_bytes

    @property
    def given_back_bytes(self) -> int:
        """What of these pages was given back already, or never touched, as far as the core shows."""
        return self.bytes - min(self.resident_high, self.bytes)

    @classmethod
    def sum_of(cls, parts: Iterable[TrimEstimate]) -> TrimEstimate:
        several = tuple(parts)
        return cls(
            sum(part.bins_bytes for part in several),
            sum(part.top_bytes for part in several),
            sum(part.resident_low for part in several),
            sum(part.resident_high for part in several),
            sum(part.top_unsure_bytes for part in several),
        )


class TopStays(Enum):
    """Why free() has not given the end of a heap back by itself. New ones may be added; none changes its meaning."""

    BELOW_THRESHOLD = "below_threshold"
    """Top is smaller than trim_threshold. (For sub-heaps that counts from glibc 2.22 on.)"""
    NO_LARGE_FREE = "no_large_free"
    """Top is large enough, but free() looks at it only when it has just made a free chunk of 64 KiB or more."""
    KEPT_BY_TOP_PAD = "kept_by_top_pad"
    """What top has beyond top_pad is less than a page: free() leaves that much on purpose (systrim)."""
    NOT_AT_BREAK = "not_at_break"
    """Someone else's memory lies behind the main arena, or its end did not come from brk: it cannot be given back."""
    NO_TOP = "no_top"
    """An older sub-heap: malloc gives it back only when it is free from end to end and every newer one is gone."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class HeapFreeMemory:
    """One heap: the main arena's whole memory (``sub_heap`` None), or one sub-heap.

    ``live_bytes``: chunks in use and malloc's own. ``free_bytes``: as the module says; ``whole_page_bytes`` of them make up pages that
    hold nothing else, ``shared_page_bytes`` share a page with other chunks or headers. ``unlisted_bytes`` look free and
    are on no list that was read: not part of ``free_bytes``. At least ``free_resident_low`` and at most ``free_resident_high`` of the
    free bytes were in memory (or swapped out). ``largest_free_bytes``: the largest free chunk but top. ``pins``: see ``PinChain``.
    """

    arena: int
    sub_heap: int | None
    address: int | None
    committed_bytes: int
    live_count: int
    live_bytes: int
    tcache_bytes: int
    free_bytes: int
    unlisted_bytes: int
    top_bytes: int
    largest_free_bytes: int
    whole_page_bytes: int
    shared_page_bytes: int
    trim: TrimEstimate
    top_stays: TopStays
    pins: PinChain
    free_resident_low: int = 0
    free_resident_high: int = 0

    @property
    def utilisation(self) -> float | None:
        """The share of the committed memory that is in use; None where nothing is committed."""
        return self.live_bytes / self.committed_bytes if self.committed_bytes else None


@dataclass(frozen=True, slots=True)
class PinChain:
    """The fewest live chunks from the end of a heap downwards that would have to go for most of it to go back.

    ``free_below_bytes``: all whole free pages of the heap that lie below a live chunk. Freeing ``chunk_count`` chunks of
    ``chunk_bytes``, everything live above the lowest of them included, would join ``gained_bytes`` of these to the end.
    Blocks in a tcache keep memory as live ones do; ``cached_count`` of the chunks are such (None: too many to look at each). All 0
    where nothing is pinned.
    """

    free_below_bytes: int = 0
    gained_bytes: int = 0
    chunk_count: int = 0
    chunk_bytes: int = 0
    cached_count: int | None = 0


@dataclass(frozen=True, slots=True)
class ArenaFreeMemory:
    """One arena: the sums over its heaps. ``sub_heap`` of each heap is an index of ``Arena.sub_heaps``."""

    arena: int
    heaps: tuple[HeapFreeMemory, ...]

    def total(self, name: str) -> int:
        """The sum of a number over the heaps, by its name."""
        return sum(int(getattr(heap, name)) for heap in self.heaps)

    @property
    def largest_free_bytes(self) -> int:
        return max((heap.largest_free_bytes for heap in self.heaps), default=0)

    @property
    def trim(self) -> TrimEstimate:
        return TrimEstimate.sum_of(heap.trim for heap in self.heaps)

    @property
    def utilisation(self) -> float | None:
        committed = self.total("committed_bytes")
        return self.total("live_bytes") / committed if committed else None


@dataclass(frozen=True, slots=True)
class Pin:
    """A run of live chunks that whole free pages end at.

    ``header_address``: of its first chunk. ``live_count`` and ``live_bytes`` count chunks in use, malloc's own, and tcache blocks
    (``cached_count`` of them). ``free_below_bytes`` and ``free_above_bytes``: free memory directly beside it; of the former
    ``pages_below_bytes`` are whole pages. ``is_highest``: nothing live lies above it in its heap. ``verdict``: of the first
    chunk in use; None where leaks were not looked for. ``holder``: what leads to it, where a root does so directly. ``type``:
    what it holds, where that is known.
    """

    arena: int
    sub_heap: int | None
    header_address: int
    first_chunk: int
    live_count: int
    live_bytes: int
    cached_count: int
    free_below_bytes: int
    free_above_bytes: int
    pages_below_bytes: int
    is_highest: bool
    verdict: Verdict | None = None
    holder: str | None = None
    type: str | None = None


@dataclass(frozen=True, slots=True)
class ArenaMaxEstimate:
    """What at most ``arena_max`` arenas would have saved of the committed memory: bounds, and the reasoning behind each."""

    arena_max: int
    arenas_gone: int
    saved_low: int
    saved_high: int
    reserved_gone: int
    reasoning: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FreeMemoryReport:
    """Free memory of all arenas, the arenas in the order of ``HeapSnapshot.arenas``.

    ``basis`` says how it is known which of the pages were in memory.
    """

    page_bytes: int
    arenas: tuple[ArenaFreeMemory, ...]
    pins: tuple[Pin, ...]
    arena_max: tuple[ArenaMaxEstimate, ...]
    basis: ResidencyBasis

    def total(self, name: str) -> int:
        """The sum of a number over all heaps, by its name."""
        return sum(arena.total(name) for arena in self.arenas)

    @property
    def trim(self) -> TrimEstimate:
        return TrimEstimate.sum_of(arena.trim for arena in self.arenas)
