"""Reading many places of a core at once: words and rows of words at arrays of addresses, without an object for each.

Knows: runs of saved bytes. Does not know: what lies at the places. Only bytes that the core itself holds are read; what
it does not hold is marked, never 0 by silence.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coreheap.corefile.memory import AddressSpace
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


def rows_at(memory: AddressSpace, addresses: UInt64s, count: int) -> tuple[UInt64s, Bools]:
    """``count`` words at each address as uint64[n, count], and whether they were saved; 0 where they were not."""
    record = np.dtype([("words", "<u8" if memory.word_bytes == 8 else "<u4", (count,))])
    offset, saved = places_in_file(memory, addresses, record.itemsize)
    rows = np.zeros((len(addresses), count), np.uint64)
    rows[saved] = records_at(memory.file, offset[saved], record)["words"]
    # Across two runs of the file.
    for row in np.flatnonzero(~saved & places_in_file(memory, addresses, 1)[1]).tolist():
        try:
            rows[row] = memory.read_words(int(addresses[row]), count)
        except MemoryFault:
            continue
        saved[row] = True
    return rows, saved
