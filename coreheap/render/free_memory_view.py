"""Free memory on the page for people: what malloc_trim(0) would give back, heap by heap, and the largest pins.

Knows: what is worth a line. Does not know: how any of it was found. Text out of the core is made printable here.
"""

from __future__ import annotations

from rich.text import Text

from coreheap.free_memory import FreeMemoryReport, Pin, TopStays
from coreheap.quantities import format_address, format_bounds, format_bytes, format_count
from coreheap.render.escaping import shortened
from coreheap.render.page import Page, part_of_all, plain_table

HEAPS_SHOWN = 8
"""Heaps on the page, those with most to give back first; all of them with -v."""
PINS_SHOWN = 5
LONGEST_HOLDER = 60

_TOP_STAYS = {
    TopStays.BELOW_THRESHOLD: "below threshold",
    TopStays.NO_LARGE_FREE: "no large free",
    TopStays.KEPT_BY_TOP_PAD: "top_pad",
    TopStays.NOT_AT_BREAK: "not at break",
    TopStays.NO_TOP: "older heap",
    TopStays.UNKNOWN: "unknown",
}


def add_free_memory(page: Page, report: FreeMemoryReport) -> None:
    """What malloc_trim(0) would give back, heap by heap, and the largest pins; nothing where there is nothing to give."""
    trim = report.trim
    heaps = [heap for arena in report.arenas for heap in arena.heaps if heap.trim.bytes or heap.pins.free_below_bytes]
    if not heaps:
        return
    page.heading(
        "Free memory",
        f"malloc_trim(0) would return {format_bytes(trim.bytes)}, RSS would drop by {format_bounds(trim.resident_low, trim.resident_high)}",
    )
    heaps.sort(key=lambda heap: (-heap.trim.bytes, heap.arena, heap.sub_heap or 0))
    shown = heaps if page.style.verbose else heaps[:HEAPS_SHOWN]
    table = plain_table(
        [
            ("arena", True),
            ("in use", True),
            ("free", True),
            ("whole pages", True),
            ("trim", True),
            ("in RSS", True),
            ("end stays", False),
        ],
        wide_column=6,
    )
    for heap in shown:
        table.add_row(
            str(heap.arena),
            format_bytes(heap.live_bytes),
            format_bytes(heap.free_bytes),
            format_bytes(heap.whole_page_bytes),
            format_bytes(heap.trim.bytes),
            format_bounds(heap.trim.resident_low, heap.trim.resident_high),
            _TOP_STAYS[heap.top_stays],
        )
    page.add(table, indent=2)
    more = part_of_all(len(shown), len(heaps), "heaps", "-v shows all")
    if more:
        page.add(Text(more, style="dim"), indent=2)
    _pins(page, report.pins)


def _pins(page: Page, pins: tuple[Pin, ...]) -> None:
    held = [pin for pin in pins if pin.pages_below_bytes]
    for pin in held if page.style.verbose else held[:PINS_SHOWN]:
        one = pin.live_count == 1
        chunks = f"{format_count(pin.live_count)} live {'chunk' if one else 'chunks'}"
        holder = f", held by {shortened(pin.holder, LONGEST_HOLDER)}" if pin.holder else ""
        page.bullet(
            f"{chunks} of {format_bytes(pin.live_bytes)} at {format_address(pin.header_address)} (arena {pin.arena})"
            f" {'keeps' if one else 'keep'} {format_bytes(pin.pages_below_bytes)} of free pages{holder}"
        )
