"""PINNED-HEAP: a few chunks, live or cached by a thread, keep most of the free memory from going back."""

from __future__ import annotations

from collections.abc import Iterator

from coreheap.checks.free_memory_causes import (
    Cause,
    FreeMemory,
    has_cause,
    is_pinned,
    trim_evidence,
    trim_quantities,
    trim_step,
    walk_evidence,
)
from coreheap.checks.protocol import Case
from coreheap.evidence import confidence_from
from coreheap.free_memory import Pin
from coreheap.quantities import format_address, format_bytes, format_count
from coreheap.report import Finding, Quantity, Unit


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all heaps that few chunks pin; the pin that most memory ends at is named."""
    memory = has_cause(case, Cause.PINNED)
    if memory is None or case.heap is None or case.free_memory is None:
        return ()
    pinned = {(heap.arena, heap.sub_heap) for heap in memory.heaps if is_pinned(heap)}
    largest = next((pin for pin in case.free_memory.pins if (pin.arena, pin.sub_heap) in pinned), None)
    pins = memory.pins
    cached = pins.cached_count or 0
    which = (
        f"{format_count(pins.chunk_count)} live chunks"
        if not cached
        else f"{format_count(pins.chunk_count)} chunks, {format_count(cached)} of them cached in tcaches,"
    )
    statement = (
        f"{format_bytes(pins.gained_bytes)} of whole free pages lie below {which} of {format_bytes(pins.chunk_bytes)} in"
        f" {format_count(memory.pinned_heaps)} heaps"
    )
    evidence, doubts = walk_evidence(statement, case.heap)
    return (
        Finding(
            code="PINNED-HEAP",
            severity=memory.severity,
            confidence=confidence_from(evidence),
            subject=f"{memory.pinned_heaps} heap{'s' if memory.pinned_heaps != 1 else ''}",
            quantities=(
                Quantity("heaps", memory.pinned_heaps, Unit.COUNT),
                Quantity("pinned_bytes", pins.gained_bytes, Unit.BYTES),
                Quantity("pin_count", pins.chunk_count, Unit.COUNT),
                Quantity("pin_bytes", pins.chunk_bytes, Unit.BYTES),
                Quantity("cached_pins", cached, Unit.COUNT),
                Quantity("free_bytes", memory.free_bytes, Unit.BYTES),
                Quantity("given_back_bytes", memory.trim.given_back_bytes, Unit.BYTES),
                Quantity("largest_pin", largest.header_address if largest else None, Unit.ADDRESS),
                Quantity("largest_pin_keeps", largest.pages_below_bytes if largest else None, Unit.BYTES),
                Quantity("largest_pin_holder", largest.holder if largest else None, Unit.TEXT),
                *trim_quantities(memory.trim),
            ),
            evidence=(*evidence, trim_evidence(memory.trim, case.free_memory.basis)),
            next_steps=tuple(_next_steps(memory, largest)),
            weakened_by=(
                "pages given back by malloc_trim or MADV_DONTNEED are free here and cost no memory; given_back_bytes has those"
                " that the core shows",
                "a core taken right after a peak shows memory that the next peak would use again",
                *(doubt.text for doubt in doubts),
            ),
        ),
    )


def _next_steps(memory: FreeMemory, largest: Pin | None) -> Iterator[str]:
    """What to do about pins: another thing where nothing is live and threads merely cache the chunks."""
    live = memory.pins.chunk_count - (memory.pins.cached_count or 0)
    if largest is not None and live:
        yield f"coreheap explain CORE {format_address(largest.header_address)} says what the largest pin is and who holds it"
    yield trim_step(memory.trim)
    if live < memory.pins.chunk_count:
        yield (
            "chunks in a tcache go back when their thread ends or uses them again; GLIBC_TUNABLES=glibc.malloc.tcache_count=N with"
            " a smaller N (0: no tcache) and a restart keeps fewer; more calls then take an arena's lock, measure throughput"
        )
    if live:
        yield (
            "allocate what lives long before what lives short, or in a pool of its own (mmap, another arena): the end of"
            " a heap can shrink then; costs a change of the program; verify by the size of [heap] in /proc/PID/maps after a peak"
        )
