"""Free memory for programs: the JSON key ``free_memory``, and cells for the tables of arenas and heaps.

Knows: the keys, which are only ever added. Does not know: how any of it was found.
"""

from __future__ import annotations

from coreheap.free_memory import ArenaFreeMemory, FreeMemoryReport, HeapFreeMemory, Pin, TrimEstimate
from coreheap.render.json_values import Json, address_value, number_value, text_or_null

_SUMS = (
    "committed_bytes",
    "live_bytes",
    "tcache_bytes",
    "free_bytes",
    "unlisted_bytes",
    "top_bytes",
    "whole_page_bytes",
    "shared_page_bytes",
)


def free_memory_value(report: FreeMemoryReport | None) -> Json:
    """The key ``free_memory`` of the report."""
    if report is None:
        return None
    return {
        "page_bytes": report.page_bytes,
        "residency": report.basis.value,
        "trim": _trim(report.trim),
        "arenas": [_arena(arena) for arena in report.arenas],
        "pins": [_pin(pin) for pin in report.pins],
        "arena_max": [
            {
                "arena_max": estimate.arena_max,
                "arenas_gone": estimate.arenas_gone,
                "saved_low_bytes": estimate.saved_low,
                "saved_high_bytes": estimate.saved_high,
                "reserved_gone_bytes": estimate.reserved_gone,
                "reasoning": list(estimate.reasoning),
            }
            for estimate in report.arena_max
        ],
    }


def _arena(arena: ArenaFreeMemory) -> Json:
    return {
        "arena": arena.arena,
        **{name: arena.total(name) for name in _SUMS},
        "utilisation": share_or_null(arena.utilisation),
        "largest_free_bytes": arena.largest_free_bytes,
        "trim": _trim(arena.trim),
        "heaps": [_heap(heap) for heap in arena.heaps],
    }


def _heap(heap: HeapFreeMemory) -> Json:
    pins = heap.pins
    return {
        "sub_heap": address_value(heap.address),
        "live_count": heap.live_count,
        **{name: int(getattr(heap, name)) for name in _SUMS},
        "utilisation": share_or_null(heap.utilisation),
        "largest_free_bytes": heap.largest_free_bytes,
        "trim": _trim(heap.trim),
        "top_stays": heap.top_stays.value,
        "pins": {
            "free_below_bytes": pins.free_below_bytes,
            "gained_bytes": pins.gained_bytes,
            "chunk_count": pins.chunk_count,
            "chunk_bytes": pins.chunk_bytes,
        },
    }


def _trim(trim: TrimEstimate) -> Json:
    return {
        "bytes": trim.bytes,
        "bins_bytes": trim.bins_bytes,
        "top_bytes": trim.top_bytes,
        "top_unsure_bytes": trim.top_unsure_bytes,
        "resident_low_bytes": trim.resident_low,
        "resident_high_bytes": trim.resident_high,
    }


def _pin(pin: Pin) -> Json:
    return {
        "arena": pin.arena,
        "header_address": address_value(pin.header_address),
        "live_count": pin.live_count,
        "live_bytes": pin.live_bytes,
        "cached_count": pin.cached_count,
        "free_below_bytes": pin.free_below_bytes,
        "free_above_bytes": pin.free_above_bytes,
        "pages_below_bytes": pin.pages_below_bytes,
        "is_highest": pin.is_highest,
        "verdict": None if pin.verdict is None else pin.verdict.name.lower(),
        "holder": text_or_null(pin.holder),
        "type": text_or_null(pin.type),
    }


def share_or_null(share: float | None) -> float | None:
    """A share between 0 and 1, whatever a damaged heap says."""
    return None if share is None else number_value(min(share, 1.0))


def arena_cells(report: FreeMemoryReport | None, arena: int) -> tuple[float | None, int | None, int | None]:
    """Utilisation, trimmable bytes and the largest free chunk of an arena; all None where they are unknown."""
    if report is None:
        return None, None, None
    memory = report.arenas[arena]
    return share_or_null(memory.utilisation), memory.trim.bytes, memory.largest_free_bytes


def heap_cells(
    report: FreeMemoryReport | None, arena: int, sub_heap: int | None
) -> tuple[float | None, int | None, int | None]:
    """The same of one sub-heap, or of the main arena's memory (None)."""
    found = () if report is None else report.arenas[arena].heaps
    memory = next((heap for heap in found if heap.sub_heap == sub_heap), None)
    if memory is None:
        return None, None, None
    return share_or_null(memory.utilisation), memory.trim.bytes, memory.largest_free_bytes
