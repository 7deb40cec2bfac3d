"""What fewer arenas would have saved: bounds, with the reasoning.

Knows: that arenas keep free memory apart from each other. Does not know: what the threads would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coreheap.free_memory import ArenaFreeMemory, ArenaMaxEstimate
from coreheap.heap import Arena
from coreheap.quantities import format_bytes, format_count

CHOICES = (1, 2, 4, 8)


def arena_max_estimates(arenas: Sequence[Arena], free: Sequence[ArenaFreeMemory]) -> tuple[ArenaMaxEstimate, ...]:
    """An estimate for each number of arenas below the one there is; arenas of the program's own malloc only."""
    pairs = [(arena, memory) for arena, memory in zip(arenas, free, strict=True) if arena.copy == 0]
    others = [_held(arena, memory) for arena, memory in pairs if not arena.is_main]
    others.sort(key=lambda held: -held.not_live_bytes)
    return tuple(_estimate(number, others) for number in CHOICES if number < len(others) + 1)


@dataclass(frozen=True, slots=True)
class _Held:
    """What an arena holds. ``not_live_bytes``: committed and not taken by live chunks, what it could give up at most."""

    live_bytes: int
    not_live_bytes: int
    reserved_bytes: int


def _held(arena: Arena, memory: ArenaFreeMemory) -> _Held:
    live = memory.total("live_bytes")
    not_live = memory.total("committed_bytes") - live - memory.total("tcache_bytes")
    return _Held(live, max(not_live, 0), arena.reserved_bytes or 0)


def _estimate(number: int, others: Sequence[_Held]) -> ArenaMaxEstimate:
    gone = others[: len(others) - (number - 1)]
    high = sum(held.not_live_bytes for held in gone)
    reserved = sum(held.reserved_bytes for held in gone)
    live = sum(held.live_bytes for held in gone)
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
