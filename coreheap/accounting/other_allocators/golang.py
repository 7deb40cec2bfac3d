"""The Go run time's heap: arenas of 64 MiB, from an address on where nobody else maps.

Knows: where runtime/malloc.go (mallocinit) asks the kernel for arenas on 64-bit Linux, and how they are reserved. Does not
know: what of an arena is in use, nor the run time's own tables, which lie elsewhere.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.corefile import Module
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import MIB

FIRST_ARENA: Final = 0xC000000000
HINTS_END: Final = 0x80C000000000
"""Hints are 1 TiB apart, 0x00C0 << 32 to 0x7FC0 << 32; programs rarely leave the first."""
ARENA_BYTES: Final = 64 * MIB


def go_ranges(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
    """Anonymous stretches that begin at one of the addresses where Go asks for its arenas, and are whole arenas."""
    low, high = anonymous.stretches
    hint = (low % np.uint64(1 << 40) == np.uint64(FIRST_ARENA)) & (low < np.uint64(HINTS_END))
    found = hint & ((high - low) % np.uint64(ARENA_BYTES) == 0)
    if not found.any():
        return ()
    fact = Evidence(
        f"arenas of {ARENA_BYTES // MIB} MiB begin at {int(low[found][0]):#x}, where Go asks for them",
        "address space",
        Strength.SOLID,
        int(low[found][0]),
    )
    return (Ranges(low[found], high[found], (fact,), is_estimate=True),)
