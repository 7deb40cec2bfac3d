"""Which of the findings about free memory a process gets: one for one cause, never three that say the same.

Knows: how the causes are told apart. Does not know: what is said about each.

Arenas that ARENA-BLOAT speaks of are left to it: fewer arenas is the remedy there. Of what the others hold free, and what of
that was not given back already, the first of these that explains half decides: tcaches (TCACHE-HOARD), pages that live chunks
share (FRAGMENTATION), whole pages below few live chunks (PINNED-HEAP); else it is RETAINED-FREE. Fragments come before pins because malloc_trim
helps against pins and not against fragments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from coreheap.checks import arena_bloat
from coreheap.checks.protocol import Case
from coreheap.doubts import Doubt, heap_doubts
from coreheap.evidence import Evidence, Strength
from coreheap.free_memory import FreeMemoryReport, HeapFreeMemory, PinChain, TopStays, TrimEstimate
from coreheap.heap import Arena, HeapSnapshot
from coreheap.mappings import ResidencyBasis
from coreheap.quantities import MIB, format_bounds, format_bytes
from coreheap.report import Quantity, Severity, Unit

SMALLEST_BYTES = 1 * MIB
SMALLEST_SHARE = 0.25
"""Free memory from which it is worth a word: as much, and this share of what the arenas hold. What was given back counts in neither."""
WARNING_BYTES = 64 * MIB
WARNING_SHARE = 0.5
"""Free share of the arenas' memory from which, with WARNING_BYTES, it is a warning and not a remark."""

WORTH_A_TRIM = 0.05
"""Share of the kept memory from which a trim is advised although another cause explains most of it."""

DOMINATES = 0.5
"""Share of the free memory that a cause has to explain to give the finding."""

HOARD_BYTES = arena_bloat.HOARD_BYTES
"""A full tcache of the default settings has about 230 KiB (540 KiB from 2.43 on): some eight of them are nothing odd."""

FEW_PINS = 64
"""Live chunks that someone can look at one by one."""
SMALL_PINS = 16
"""Free bytes that each live byte of a pin keeps, from which the live chunks are the reason and not the use of the memory."""


class Cause(Enum):
    CACHED = "TCACHE-HOARD"
    FRAGMENTED = "FRAGMENTATION"
    PINNED = "PINNED-HEAP"
    RETAINED = "RETAINED-FREE"


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """The free memory that no other finding explains, and its cause.

    ``free_bytes`` without tcaches; ``kept_bytes``: of both together what was not given back already, as far as the core shows.
    ``walked_bytes``: all chunks of these arenas. ``pins``: the chains of the heaps that few chunks pin, in sum.
    """

    cause: Cause
    arenas: tuple[Arena, ...]
    heaps: tuple[HeapFreeMemory, ...]
    walked_bytes: int
    free_bytes: int
    tcache_bytes: int
    shared_page_bytes: int
    kept_bytes: int
    trim: TrimEstimate
    pins: PinChain
    pinned_heaps: int

    @property
    def held_bytes(self) -> int:
        """All chunks of these arenas, less what was given back."""
        return self.walked_bytes - self.trim.given_back_bytes

    @property
    def severity(self) -> Severity:
        severe = self.kept_bytes >= WARNING_BYTES and self.kept_bytes >= WARNING_SHARE * self.held_bytes
        return Severity.WARNING if severe else Severity.INFO


def free_memory_of(case: Case) -> FreeMemory | None:
    """What is to be said about free memory; None where nothing is, or where it was not surveyed."""
    heap, report = case.heap, case.free_memory
    if heap is None or report is None:
        return None
    bloated = bool(arena_bloat.findings(case))
    arenas = tuple(arena for arena in heap.arenas if arena.is_main or not bloated)
    memory = _sums(report, arenas)
    if memory.kept_bytes < SMALLEST_BYTES or memory.kept_bytes < SMALLEST_SHARE * memory.held_bytes:
        return None
    return memory


def has_cause(case: Case, cause: Cause) -> FreeMemory | None:
    """The free memory, where this is its cause."""
    memory = free_memory_of(case)
    return memory if memory is not None and memory.cause is cause else None


def _sums(report: FreeMemoryReport, arenas: tuple[Arena, ...]) -> FreeMemory:
    heaps = tuple(heap for arena in arenas for heap in report.arenas[arena.index].heaps)
    trim = TrimEstimate.sum_of(heap.trim for heap in heaps)
    free = sum(heap.free_bytes + heap.unlisted_bytes for heap in heaps)
    cached = sum(heap.tcache_bytes for heap in heaps)
    shared = sum(heap.shared_page_bytes for heap in heaps)
    pinned = [heap.pins for heap in heaps if is_pinned(heap)]
    pins = PinChain(
        sum(chain.free_below_bytes for chain in pinned),
        sum(chain.gained_bytes for chain in pinned),
        sum(chain.chunk_count for chain in pinned),
        sum(chain.chunk_bytes for chain in pinned),
        sum(chain.cached_count or 0 for chain in pinned),
    )
    kept = free - trim.given_back_bytes
    if cached >= HOARD_BYTES and cached >= DOMINATES * (kept + cached):
        cause = Cause.CACHED
    elif shared >= DOMINATES * kept:
        cause = Cause.FRAGMENTED
    elif pins.gained_bytes >= DOMINATES * free:
        cause = Cause.PINNED
    else:
        cause = Cause.RETAINED
    return FreeMemory(
        cause=cause,
        arenas=arenas,
        heaps=heaps,
        walked_bytes=sum(total.chunk_bytes for arena in arenas for total in arena.totals.values()),
        free_bytes=free,
        tcache_bytes=cached,
        shared_page_bytes=shared,
        kept_bytes=kept + cached,
        trim=trim,
        pins=pins,
        pinned_heaps=len(pinned),
    )


def is_pinned(heap: HeapFreeMemory) -> bool:
    """Whether few small live chunks keep most of a heap's free memory from its end."""
    pins = heap.pins
    if heap.top_stays is TopStays.NOT_AT_BREAK:
        return False  # Its end cannot go back, whatever is freed.
    if heap.top_stays is TopStays.NO_TOP and (
        heap.live_count > FEW_PINS or heap.live_bytes * SMALL_PINS > pins.gained_bytes
    ):
        return False  # An older sub-heap goes back only as a whole.
    return (
        0 < pins.chunk_count <= FEW_PINS
        and pins.gained_bytes >= SMALL_PINS * pins.chunk_bytes
        and pins.gained_bytes >= DOMINATES * (heap.free_bytes + heap.tcache_bytes)
    )


def trim_quantities(trim: TrimEstimate) -> Iterator[Quantity]:
    """What malloc_trim(0) would return, as quantities."""
    yield Quantity("trim_bytes", trim.bytes, Unit.BYTES)
    yield Quantity("trim_top_bytes", trim.top_bytes, Unit.BYTES)
    yield Quantity("trim_resident_low_bytes", trim.resident_low, Unit.BYTES)
    yield Quantity("trim_resident_high_bytes", trim.resident_high, Unit.BYTES)


def trim_evidence(trim: TrimEstimate, basis: ResidencyBasis) -> Evidence:
    """The what-if as a fact, with what it rests on."""
    if basis is ResidencyBasis.UNKNOWN:
        memory = "how much of that is in memory is unknown"
    else:
        memory = f"{format_bounds(trim.resident_low, trim.resident_high)} of that is in memory"
    return Evidence(
        f"malloc_trim(0) would return {format_bytes(trim.bytes)} of whole pages; {memory}",
        "free chunks page by page",
        Strength.SOLID,
    )


def can_trim(memory: FreeMemory) -> bool:
    """Whether malloc_trim(0) could lower RSS by a part of the free memory that is worth the call."""
    return memory.trim.resident_high >= WORTH_A_TRIM * memory.kept_bytes


def trim_step(trim: TrimEstimate) -> str:
    """The next step that gives memory back at once."""
    return (
        f"malloc_trim(0) in the process would lower RSS by {format_bounds(trim.resident_low, trim.resident_high)}: it holds each arena's lock while it walks that"
        " arena's bins; call it after peaks, or on a live process try gdb -p PID -batch -ex 'call (int)malloc_trim(0)' while"
        " no thread is inside malloc, and compare Rss of the heap in /proc/PID/smaps before and after"
    )


def walk_evidence(statement: str, heap: HeapSnapshot) -> tuple[tuple[Evidence, ...], tuple[Doubt, ...]]:
    """A statement that rests on the walk over all chunks, with what speaks against such statements here."""
    doubts = heap_doubts(heap)
    return (
        Evidence(statement, "chunk walk and free lists", Strength.PROOF),
        *(doubt.fact for doubt in doubts),
    ), doubts
