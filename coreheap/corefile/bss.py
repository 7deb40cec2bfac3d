"""The bss of each module: anonymous memory behind its data that its program headers ask for.

Knows: PT_LOAD, whose p_memsz beyond p_filesz is bss, up to the end of its last page (fs/binfmt_elf.c and ld.so map whole pages).
Does not know: what else is anonymous. Memory of any other use may follow a module's data directly, and the kernel makes one
mapping of it and the bss: only what program headers ask for is bss for sure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from coreheap.corefile.core import Core
from coreheap.corefile.elf import PF_W, PT_LOAD, Words
from coreheap.corefile.modules import PROGRAM_HEADER_LIMIT, Module
from coreheap.corefile.regions import LAST_ADDRESS

ACCESS: Final = 7
WRITE: Final = 2
SUPPOSED_LIMIT: Final = 1 << 20
"""Without program headers what follows a module's data is taken for its bss up to this size; more is somebody else's."""

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ModuleBss:
    """Sorted disjoint ranges of mapped anonymous memory: ``module`` is a row of ``core.modules``.

    ``is_supposed``: where a module's program headers are not in the core, for what follows its data.
    """

    start: Words
    end: Words
    module: npt.NDArray[np.intp]
    is_supposed: Bools

    def meets(self, start: int, end: int) -> bool:
        """Whether any byte of [start, end) is bss."""
        row = int(np.searchsorted(self.end, np.uint64(start), side="right"))
        return row < len(self.start) and int(self.start[row]) < end

    def row_holding_all(self, start: Words, end: Words) -> npt.NDArray[np.intp]:
        """For each range the row that it lies in as a whole; -1 for none."""
        if not len(self.start):
            return np.full(len(start), -1, np.intp)
        row = np.searchsorted(self.start, start, side="right") - 1
        held = (row >= 0) & (end <= self.end[np.maximum(row, 0)])
        return np.where(held, row, -1)


# Labels, stacks and claims ask for the same; an open core does not change.
_known: WeakKeyDictionary[Core, ModuleBss] = WeakKeyDictionary()


def module_bss(core: Core) -> ModuleBss:
    """The bss of all modules, as far as it is mapped."""
    if core not in _known:
        _known[core] = _module_bss(core)
    return _known[core]


def _module_bss(core: Core) -> ModuleBss:
    memory = core.memory
    anonymous = (memory.region_file_index < 0) & (memory.region_flags & ACCESS != 0)
    touches = memory.region_end[:-1] == memory.region_start[1:]
    stretch_end = _ends_of_stretches(memory.region_end, anonymous[:-1] & anonymous[1:] & touches)
    same_mapping = touches & (memory.region_segment[:-1] == memory.region_segment[1:])
    mapping_end = _ends_of_stretches(memory.region_end, anonymous[:-1] & anonymous[1:] & same_mapping)
    rows = []
    for number, module in enumerate(core.modules):
        told = module.program_headers is not None and module.load_bias is not None
        wanted = _asked_for(module, core.page_bytes) if told else _behind_data(core, module, anonymous, mapping_end)
        rows += [(start, end, number, not told) for start, end in wanted]
    rows.sort()
    start = np.array([row[0] for row in rows], np.uint64)
    end = np.array([row[1] for row in rows], np.uint64)
    module_row = np.array([row[2] for row in rows], np.intp)
    is_supposed = np.array([row[3] for row in rows], np.bool_)
    if len(rows) > 1:
        # What two modules would have goes to the one that begins first.
        start[1:] = np.maximum(start[1:], np.maximum.accumulate(end)[:-1])
    region = np.searchsorted(memory.region_start, start, side="right") - 1
    if memory.region_count:
        mapped = (region >= 0) & anonymous[region] & (start < memory.region_end[region])
        end = np.where(mapped, np.minimum(end, stretch_end[region]), start)
    kept = end > start
    return ModuleBss(start[kept], end[kept], module_row[kept], is_supposed[kept])


def _ends_of_stretches(end: Words, goes_on: Bools) -> Words:
    """For each region where the stretch that it is in ends; ``goes_on``: of each but the last whether the next one is in it, too."""
    last = np.ones(len(end), np.bool_)
    last[:-1] = ~goes_on
    ends = np.flatnonzero(last)
    ending: Words = end[ends[np.searchsorted(ends, np.arange(len(end)))]]
    return ending


def _asked_for(module: Module, page_bytes: int) -> Iterator[tuple[int, int]]:
    """What the program headers ask for behind the data of each writable segment, in whole pages."""
    headers, bias = module.program_headers, module.load_bias or 0
    if headers is None:
        return
    for row in headers.rows_of_kind(PT_LOAD)[:PROGRAM_HEADER_LIMIT].tolist():
        begin = bias + int(headers.address[row])
        file_bytes, memory_bytes = int(headers.file_bytes[row]), int(headers.memory_bytes[row])
        start = -(-(begin + file_bytes) // page_bytes) * page_bytes if file_bytes else begin - begin % page_bytes
        end = -(-(begin + memory_bytes) // page_bytes) * page_bytes
        if int(headers.flags[row]) & PF_W and module.start <= start < end <= LAST_ADDRESS:
            yield start, end


def _behind_data(core: Core, module: Module, anonymous: Bools, mapping_end: Words) -> Iterator[tuple[int, int]]:
    """The writable anonymous mapping right behind a module's last writable file mapping, if it is no larger than bss often is."""
    memory = core.memory
    first, last = np.searchsorted(memory.region_start, np.array([module.start, module.end], np.uint64)).tolist()
    is_data = (memory.region_file_index[first:last] >= 0) & (memory.region_flags[first:last] & WRITE != 0)
    data = first + np.flatnonzero(is_data)
    behind = data[data + 1 < memory.region_count] + 1
    behind = behind[anonymous[behind] & (memory.region_flags[behind] & WRITE != 0)]
    behind = behind[memory.region_start[behind] == memory.region_end[behind - 1]]
    for region in behind[-1:].tolist():
        start, end = int(memory.region_start[region]), int(mapping_end[region])
        if end - start <= SUPPOSED_LIMIT:
            yield start, end
