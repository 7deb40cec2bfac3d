"""tcmalloc's memory: the spans that its page map leads to, and what lies between them.

Knows: gperftools' tcmalloc (struct Span begins with its first page and its length in pages, src/span.h; the page map's root is in
the module's data, its leaves are arrays of pointers to spans, src/pagemap.h). Does not know: Google's newer tcmalloc, of which
nothing is found.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory, UInt64s
from coreheap.corefile import Module
from coreheap.corefile.regions import row_holding
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import KIB, MIB, format_bytes

PAGE_SHIFTS: Final = (13, 12, 15, 16, 18)
"""TCMALLOC_PAGE_SIZE_SHIFT: 8 KiB unless it was built otherwise."""
LEAF_BYTES: Final = 2 * MIB
"""2 ** 18 pointers, the largest leaf of a 48-bit address space with 8 KiB pages."""
LEAVES_LIMIT: Final = 256 * MIB
SPANS_LEAST: Final = 8
"""Fewer rows that look like spans may be chance."""
TAKEN: Final = "TCMalloc_SystemTaken"
"""Exported: bytes taken from the system so far."""


def tcmalloc_ranges(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
    """The spans, then what of the same mappings lies between them; empty where no page map is recognised."""
    _, pointers = anonymous.module_words(module)
    pointers = np.unique(pointers[anonymous.holds(pointers, pointers + np.uint64(1))])
    leads_to, is_all = _words_of_leaves(anonymous, pointers)
    leads_to = leads_to[leads_to % np.uint64(anonymous.word_bytes) == 0]
    rows, saved = anonymous.rows_at(leads_to, 2)
    rows = rows[saved]
    best: tuple[UInt64s, UInt64s, int] | None = None
    for shift in PAGE_SHIFTS:
        low = rows[:, 0] << np.uint64(shift)
        high = low + (rows[:, 1] << np.uint64(shift))
        spans = (rows[:, 0] >> np.uint64(48 - shift) == 0) & (rows[:, 1] >> np.uint64(48 - shift) == 0)
        spans &= anonymous.holds(low, high)
        if best is None or int(spans.sum()) > len(best[0]):
            best = low[spans], high[spans], shift
    if best is None or len(best[0]) < SPANS_LEAST:
        return ()
    spans_are = Evidence(
        f"pointers in its data lead to {len(best[0])} spans of {format_bytes((1 << best[2]) // KIB * KIB)} pages",
        "the module's data",
        Strength.SOLID,
        module.start,
    )
    start, end = anonymous.union(best[0], best[1])
    facts = [spans_are]
    if not is_all:
        facts.append(
            Evidence(
                f"only {format_bytes(LEAVES_LIMIT)} of what its data points to were searched for its page map: spans may be missing",
                "the module's data",
                Strength.HINT,
                module.start,
                speaks_against=True,
            )
        )
    own = Ranges(start, end, tuple(facts))
    return (own, *_between(anonymous, module, own))


def _words_of_leaves(anonymous: AnonymousMemory, pointers: UInt64s) -> tuple[UInt64s, bool]:
    """All different addresses of anonymous memory that the leaves may hold, and whether all leaves were read.

    A leaf lies where a pointer leads to. What several pointers lead to is read once.
    """
    found, left, done = [pointers], LEAVES_LIMIT, 0
    for pointer in pointers.tolist():
        start, end = max(pointer, done), pointer + LEAF_BYTES
        if start >= end:
            continue
        if left <= 0:
            break
        for _, words in anonymous.words(start, min(end, start + left)):
            left -= anonymous.word_bytes * len(words)
            found.append(np.unique(words[words != 0]))
        done = end
    every = np.unique(np.concatenate(found))
    return every[anonymous.holds(every, every + np.uint64(1))], left > 0


def _between(anonymous: AnonymousMemory, module: Module, spans: Ranges) -> Iterator[Ranges]:
    """The rest of the writable regions that spans fill for the most: tcmalloc's own tables lie there."""
    low, high = anonymous.writable
    first = np.searchsorted(spans.start, low, side="left")
    last = np.searchsorted(spans.start, high, side="left")
    spanned = np.concatenate((np.zeros(1, np.uint64), np.cumsum(spans.end - spans.start, dtype=np.uint64)))
    filled = (spanned[last] - spanned[first]) * np.uint64(2) > high - low
    if not filled.any():
        return
    facts = [Evidence("its spans fill the most of these mappings", "address space", Strength.HINT, int(low[filled][0]))]
    taken = module.symbol_address(TAKEN)
    if taken is not None and anonymous.memory.is_saved(taken, taken + anonymous.word_bytes):
        size, told = int((high[filled] - low[filled]).sum()), anonymous.memory.read_word(taken)
        facts.append(
            Evidence(
                f"{TAKEN} says {format_bytes(told)}, these mappings have {format_bytes(size)}",
                "the module's data",
                Strength.PROOF if told == size else Strength.HINT,
                taken,
            )
        )
    # What is left of these mappings once the spans are cut out.
    edges = np.unique(np.concatenate([low[filled], high[filled], spans.start, spans.end]))
    start, end = edges[:-1], edges[1:]
    _, in_span = row_holding(start, spans.start, spans.end)
    _, in_mapping = row_holding(start, low[filled], high[filled])
    left = in_mapping & ~in_span
    if left.any():
        yield Ranges(start[left], end[left], tuple(facts), is_estimate=True)
