"""Reading malloc's structures at many places of a core at once, without an object for each.

Knows: fields of structures. Does not know: what lies at the places. Only bytes that the core itself holds are read; what
it does not hold is marked, never 0 by silence (``corefile.gathering``).
"""

from __future__ import annotations

import numpy as np

from coreheap.allocators.glibc.structures import Structure
from coreheap.corefile import AddressSpace
from coreheap.corefile.gathering import Bools, UInt64s, places_in_file, words_at
from coreheap.corefile.notes import records_at
from coreheap.errors import MemoryFault

__all__ = ["Bools", "UInt64s", "columns_at", "places_in_file", "words_at"]


def columns_at(
    memory: AddressSpace, addresses: UInt64s, fields: Structure, names: tuple[str, ...]
) -> tuple[tuple[UInt64s, ...], Bools]:
    """Array fields of a structure at each address, uint64[n, elements] for each name, and whether it was saved whole."""
    record = np.dtype(
        {
            "names": list(names),
            "formats": [(f"<u{fields.fields[name].element_bytes}", (fields.fields[name].count,)) for name in names],
            "offsets": [fields.fields[name].offset for name in names],
            "itemsize": fields.byte_count,
        }
    )
    offset, saved = places_in_file(memory, addresses, record.itemsize)
    rows = np.zeros(len(addresses), record)
    rows[saved] = records_at(memory.file, offset[saved], record)
    # Across two runs of the file; at most one structure of a heap lies across the end of one.
    for row in np.flatnonzero(~saved & places_in_file(memory, addresses, 1)[1]).tolist():
        content = _across_runs(memory, int(addresses[row]), record.itemsize)
        if content is not None:
            rows[row] = np.frombuffer(content, record)[0]
            saved[row] = True
    return tuple(rows[name].astype(np.uint64) for name in names), saved


def _across_runs(memory: AddressSpace, address: int, byte_count: int) -> bytes | None:
    try:
        return memory.read(address, byte_count)
    except MemoryFault:
        return None
