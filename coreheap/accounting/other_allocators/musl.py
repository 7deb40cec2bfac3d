"""musl's memory: the groups of slots that its meta structures describe, and the pages of these structures.

Knows: mallocng (musl 1.2.1 and later, src/malloc/mallocng/meta.h): a meta area is a page that begins with a secret of malloc's
context, a group points back to its meta. Does not know: the older malloc, of which nothing is found.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory, Bools, UInt64s
from coreheap.corefile import Module
from coreheap.evidence import Evidence, Strength

AREA_BYTES: Final = 4096
"""A meta area is found from any of its metas by masking the address."""
AREA_HEAD_WORDS: Final = 3
"""check, next, nslots."""
META_WORDS: Final = 5
"""prev, next, mem, two masks in one word, and the bit field."""
LENGTH_SHIFT: Final = 12
"""maplen, in pages of 4 KiB, is all of the bit field above: last_idx 5, freeable 1, sizeclass 6."""
SIZE_CLASS_SHIFT: Final = 6
SIZE_CLASS_MASK: Final = 63
SECRET_LEAST: Final = 1 << 20
"""A secret is random; smaller words of the data are counts."""
AREA_LIMIT: Final = 1 << 20


def musl_ranges(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
    """Groups with a mapping of their own, and meta areas; empty where no meta area is recognised.

    Groups without one lie inside of another group's slot, or in memory of modules that musl has given to malloc.
    """
    if anonymous.word_bytes != 8:
        return ()
    _, values = anonymous.module_words(module)
    areas = _areas(anonymous, np.unique(values[values >= np.uint64(SECRET_LEAST)]))
    if not len(areas):
        return ()
    count = (AREA_BYTES // 8 - AREA_HEAD_WORDS) // META_WORDS
    rows, saved = anonymous.rows_at(areas, AREA_BYTES // 8)
    areas, rows = areas[saved], rows[saved]
    metas = rows[:, AREA_HEAD_WORDS : AREA_HEAD_WORDS + count * META_WORDS].reshape(-1, META_WORDS)
    place = (
        areas[:, None] + np.arange(count, dtype=np.uint64) * np.uint64(META_WORDS * 8) + np.uint64(AREA_HEAD_WORDS * 8)
    )
    group, bits = metas[:, 2], metas[:, 4]
    own = (group != 0) & _leads_back(anonymous, group, place.reshape(-1))
    length = (bits >> np.uint64(LENGTH_SHIFT)) * np.uint64(AREA_BYTES)
    start, end = group[own], group[own] + length[own]
    mapped = (length[own] > 0) & anonymous.holds(start, end)
    start, end = start[mapped] & ~np.uint64(anonymous.memory.page_bytes - 1), end[mapped]
    if not own.any():
        return ()
    fact = Evidence(
        f"{len(areas)} meta areas begin with malloc's secret; {int(own.sum())} groups lead back to their meta",
        "anonymous memory",
        Strength.PROOF,
        int(areas[0]),
    )
    both = anonymous.union(np.concatenate([start, areas]), np.concatenate([end, areas + np.uint64(AREA_BYTES)]))
    return (Ranges(*both, (fact,)),)


def _areas(anonymous: AnonymousMemory, secrets: UInt64s) -> UInt64s:
    """Pages that begin with a word that the module has, the same for the most of them, and a next area or none."""
    candidates = [
        np.arange(low + -low % AREA_BYTES, high - AREA_BYTES + 1, AREA_BYTES, dtype=np.uint64)
        for start, end in zip(*(column.tolist() for column in anonymous.writable), strict=True)
        for low, high in anonymous.memory.populated_extents(start, end)
    ]
    address = np.concatenate(candidates) if candidates else np.zeros(0, np.uint64)
    found = []
    for first in range(0, len(address), AREA_LIMIT):
        rows, saved = anonymous.rows_at(address[first : first + AREA_LIMIT], AREA_HEAD_WORDS)
        known = saved & np.isin(rows[:, 0], secrets)
        found.append(np.concatenate([address[first : first + AREA_LIMIT][known, None], rows[known]], axis=1))
    rows = np.concatenate(found) if found else np.zeros((0, 4), np.uint64)
    following = rows[:, 2]
    rows = rows[(following == 0) | ((following % np.uint64(AREA_BYTES) == 0) & np.isin(following, rows[:, 0]))]
    # Pointers of the data occur at the start of pages, too; a secret is no address.
    rows = rows[~anonymous.holds(rows[:, 1], rows[:, 1] + np.uint64(1))]
    if not len(rows):
        return np.zeros(0, np.uint64)
    values, counts = np.unique(rows[:, 1], return_counts=True)
    areas: UInt64s = np.sort(rows[rows[:, 1] == values[counts.argmax()], 0])
    return areas


def _leads_back(anonymous: AnonymousMemory, group: UInt64s, meta: UInt64s) -> Bools:
    rows, saved = anonymous.rows_at(group, 1)
    leads: Bools = saved & (rows[:, 0] == meta)
    return leads
