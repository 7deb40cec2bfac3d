"""What each region of the address space is, as far as the core says without knowing any allocator.

Knows: modules, mapped files, stacks that a thread's stack pointer lies in, the vDSO. Does not know: heaps.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt

from coreheap.corefile.core import Core
from coreheap.corefile.process import AT_SYSINFO_EHDR

READ, WRITE, EXECUTE = 4, 2, 1


class RegionLabel(IntEnum):
    """What a region is; the ledger's leaves for what no heap claims have these names in lower case."""

    MODULE_TEXT = 0
    MODULE_RODATA = 1
    MODULE_DATA = 2
    MODULE_BSS = 3
    MAPPED_FILES = 4
    KERNEL_PAGES = 5
    """The vDSO."""
    THREAD_STACKS = 6
    NO_ACCESS = 7
    OTHER_ANONYMOUS = 8


def region_labels(core: Core) -> npt.NDArray[np.int64]:
    """For each region of the address space its RegionLabel, int64[regions].

    A stack is the region that holds a thread's stack pointer; bss is the anonymous memory that directly follows a
    module's data. What cannot be told is OTHER_ANONYMOUS.
    """
    memory = core.memory
    flags, files = memory.region_flags, memory.region_file_index
    kinds = np.full(len(flags), RegionLabel.OTHER_ANONYMOUS, np.int64)
    kinds[flags & (READ | WRITE | EXECUTE) == 0] = RegionLabel.NO_ACCESS
    has_file = files >= 0
    in_module = np.zeros(len(flags), bool)
    for module in core.modules:
        first, last = np.searchsorted(memory.region_start, np.array([module.start, module.end], np.uint64)).tolist()
        in_module[first:last] = True
    kinds[has_file] = RegionLabel.MAPPED_FILES
    of_module = has_file & in_module
    kinds[of_module] = RegionLabel.MODULE_RODATA
    kinds[of_module & ((flags & EXECUTE) != 0)] = RegionLabel.MODULE_TEXT
    kinds[of_module & ((flags & WRITE) != 0)] = RegionLabel.MODULE_DATA
    if len(flags) > 1:
        follows = np.concatenate(([False], memory.region_start[1:] == memory.region_end[:-1]))
        behind_data = np.concatenate(([False], kinds[:-1] == RegionLabel.MODULE_DATA))
        bss = follows & behind_data & ~has_file & ((flags & WRITE) != 0)
        kinds[bss] = RegionLabel.MODULE_BSS
    vdso = memory.region_index(core.auxv.get(AT_SYSINFO_EHDR, 0))
    if vdso is not None:
        kinds[vdso] = RegionLabel.KERNEL_PAGES
    for thread in core.threads:
        if thread.stack_pointer:
            index = memory.region_index(thread.stack_pointer)
            if index is not None and not has_file[index]:
                kinds[index] = RegionLabel.THREAD_STACKS
    return kinds
