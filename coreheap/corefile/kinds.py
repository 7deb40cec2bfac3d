"""What each region of the address space is, as far as the core says without knowing any allocator.

Knows: modules, mapped files, stacks that a thread's stack pointer lies in, the vDSO. Does not know: heaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from coreheap.corefile.bss import module_bss
from coreheap.corefile.core import Core
from coreheap.corefile.process import AT_SYSINFO_EHDR

READ, WRITE, EXECUTE = 4, 2, 1

VSYSCALL_PAGE = 0xFFFFFFFFFF600000
"""arch/x86/include/uapi/asm/vsyscall.h, VSYSCALL_ADDR: a part of the ABI."""
VVAR_BYTES = 1 << 16
"""More than any kernel's vvar mappings: 4 to 6 pages."""


class RegionLabel(IntEnum):
    """What a region is; the ledger's leaves for what no heap claims have these names in lower case."""

    MODULE_TEXT = 0
    MODULE_RODATA = 1
    MODULE_DATA = 2
    MODULE_BSS = 3
    MAPPED_FILES = 4
    KERNEL_PAGES = 5
    """The vDSO, its data below it, and x86's vsyscall page."""
    THREAD_STACKS = 6
    NO_ACCESS = 7
    OTHER_ANONYMOUS = 8


def region_labels(core: Core, *, with_stacks: bool = True) -> npt.NDArray[np.int64]:
    """For each region of the address space its RegionLabel, int64[regions].

    A region that lies in a module's bss as a whole is its bss (``bss``); of one that holds more than that nothing is said. With
    ``with_stacks`` a region that is nothing else and holds a thread's stack pointer is a stack, as a whole: what is known of
    stacks is in ``stacks``. What cannot be told is OTHER_ANONYMOUS.
    """
    memory = core.memory
    flags, files = memory.region_flags, memory.region_file_index
    kinds = np.full(len(flags), RegionLabel.OTHER_ANONYMOUS, np.int64)
    no_access = flags & (READ | WRITE | EXECUTE) == 0
    kinds[no_access] = RegionLabel.NO_ACCESS
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
    in_bss = module_bss(core).row_holding_all(memory.region_start, memory.region_end) >= 0
    kinds[in_bss & ~has_file & ~no_access] = RegionLabel.MODULE_BSS
    for region in _kernel_regions(core):
        kinds[region] = RegionLabel.KERNEL_PAGES
    if with_stacks:
        pointers = [thread.stack_pointer for thread in core.threads if thread.stack_pointer]
        holding = memory.region_indices(np.array(pointers, np.uint64))
        holding = holding[holding >= 0]
        is_free = np.isin(kinds[holding], (RegionLabel.OTHER_ANONYMOUS, RegionLabel.NO_ACCESS))
        kinds[holding[is_free]] = RegionLabel.THREAD_STACKS
    return kinds


def _kernel_regions(core: Core) -> Iterator[int]:
    """What the kernel maps into every process: the vDSO, its data right below (vvar), on x86-64 the vsyscall page."""
    memory = core.memory
    vsyscall = memory.region_index(VSYSCALL_PAGE) if core.machine == "x86_64" else None
    if vsyscall is not None:
        yield vsyscall
    region = memory.region_index(core.auxv.get(AT_SYSINFO_EHDR, 0))
    while region is not None:
        yield region
        below, start = region - 1, int(memory.region_start[region])
        is_data = (
            below >= 0
            and int(memory.region_end[below]) == start
            and int(memory.region_flags[below]) == READ
            and int(memory.region_file_index[below]) < 0
            and start - int(memory.region_start[below]) <= VVAR_BYTES
        )
        region = below if is_data else None
