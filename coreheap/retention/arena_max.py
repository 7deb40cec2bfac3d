"""What fewer arenas would have saved: bounds, with the reasoning.

Knows: that arenas keep free memory apart from each other. Does not know: what the threads would have done.
"""

from __future__ import annotations

from collections.abc import Sequence

from coreheap.free_memory import ArenaFreeMemory, ArenaMaxEstimate
from coreheap.heap import Arena
from coreheap.quantities import format_bytes, format_count

CHOICES = (1, 2, 4, 8)


def arena_max_estimates(arenas: Sequence[Arena], free: Sequence[ArenaFreeMemory]) -> tuple[ArenaMaxEstimate, ...]:
    """An estimate for each number of arenas below the one there is; arenas of the program's own malloc only."""
    pairs = [(arena, memory) for arena, memory in zip(arenas, free, strict=True) if arena.copy == 0]
    others = sorted((pair for pair in pairs if not pair[0].is_main), key=lambda pair: -_not_live(pair[1]))
    return tuple(_estimate(number, others) for number in CHOICES if number < len(others) + 1)


def _not_live(memory: ArenaFreeMemory) -> int:
    """Committed bytes that live chunks do not take: what an arena could give up at most."""
    return max(memory.total("committed_bytes") - memory.total("live_bytes") - memory.total("tcache_bytes"), 0)


def _estimate(number: int, others: Sequence[tuple[Arena, ArenaFreeMemory]]) -> ArenaMaxEstimate:
    gone = others[: len(others) - (number - 1)]
    high = sum(_not_live(memory) for _, memory in gone)
    reserved = sum(arena.reserved_bytes or 0 for arena, _ in gone)
    live = sum(memory.total("live_bytes") for _, memory in gone)
    return ArenaMaxEstimate(
        arena_max=number,
        arenas_gone=len(gone),
        saved_low=0,
        saved_high=high,
        reserved_gone=reserved,
        reasoning=(
            f"at most: {format_count(len(gone))} arenas would not exist, and their {format_bytes(live)} of live blocks would"
            f" fit into the free memory of the others or take their own size there; the {format_bytes(high)} beside them"
            " would not have been committed",
            "at least 0: where all threads reach their peak at the same moment, shared arenas grow to the same sum",
            f"their {format_bytes(reserved)} of reserved address space would be reserved again only as far as live blocks need it",
        ),
    )
