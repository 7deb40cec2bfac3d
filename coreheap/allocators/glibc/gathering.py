"""Reading many places of a core at once: words and structures at arrays of addresses, without an object for each.

Knows: runs of saved bytes. Does not know: what lies at the places. Only bytes that the core itself holds are read; what
it does not hold is marked, never 0 by silence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.structures import Structure
from coreheap.corefile import AddressSpace
from coreheap.corefile.notes import records_at
from coreheap.errors import MemoryFault

UInt64s = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


def places_in_file(memory: AddressSpace, addresses: UInt64s, byte_count: int) -> tuple[npt.NDArray[np.intp], Bools]:
    """File offset of ``byte_count`` bytes at each address, and whether one run of saved bytes holds them all."""
    if not len(memory.run_start):
        return np.zeros(len(addresses), np.intp), np.zeros(len(addresses), np.bool_)
    run = np.searchsorted(memory.run_start, addresses, side="right") - 1
    inside = run >= 0
    run = np.maximum(run, 0)
    end = memory.run_end[run]
    inside &= addresses < end
    # Where it is not inside the difference wraps round, which then does not matter.
    inside &= end - addresses >= np.uint64(byte_count)
    offset = addresses - memory.run_start[run] + memory.run_file_offset[run]
    return np.where(inside, offset, np.uint64(0)).astype(np.intp), inside


def words_at(memory: AddressSpace, addresses: UInt64s) -> tuple[UInt64s, Bools]:
    """The machine's word at each address as uint64[n], and whether it was saved; 0 where it was not."""
    word = np.dtype([("value", "<u8" if memory.word_bytes == 8 else "<u4")])
    offset, saved = places_in_file(memory, addresses, word.itemsize)
    values = np.zeros(len(addresses), np.uint64)
    values[saved] = records_at(memory.file, offset[saved], word)["value"]
    return values, saved


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
