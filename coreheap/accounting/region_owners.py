"""What the regions are that nobody claims: their kind, and the thread or the file that they belong to.

Knows: labels of regions (``corefile.kinds``) and how the kernel names memory that is shared without a lasting file. Does not
know: claims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.accounting.claims import NOBODY, Claims
from coreheap.corefile import Core
from coreheap.corefile.kinds import RegionLabel, region_labels
from coreheap.corefile.notes import text_of
from coreheap.corefile.process import AT_EXECFN, AT_RANDOM
from coreheap.corefile.regions import row_holding
from coreheap.mappings import KINDS, MappingKind

Int32s = npt.NDArray[np.int32]

KIND_OF_LABEL = {
    RegionLabel.MODULE_TEXT: MappingKind.MODULE_TEXT,
    RegionLabel.MODULE_RODATA: MappingKind.MODULE_RODATA,
    RegionLabel.MODULE_DATA: MappingKind.MODULE_DATA,
    RegionLabel.MODULE_BSS: MappingKind.MODULE_BSS,
    RegionLabel.MAPPED_FILES: MappingKind.MAPPED_FILE,
    RegionLabel.KERNEL_PAGES: MappingKind.KERNEL_PAGES,
    RegionLabel.THREAD_STACKS: MappingKind.THREAD_STACK,
    RegionLabel.NO_ACCESS: MappingKind.NO_ACCESS,
    RegionLabel.OTHER_ANONYMOUS: MappingKind.UNEXPLAINED,
}

SHARED_FILES = (b"/SYSV", b"/memfd:", b"/dev/zero", b"/dev/shm/", b"/run/shm/")
"""How the names of shared memory begin: ipc/shm.c, mm/memfd.c, mm/shmem.c (shmem_zero_setup), and glibc's shm_open."""
HUGE_PAGES = b"/anon_hugepage"
"""MAP_HUGETLB without a file: fs/hugetlbfs/inode.c, hugetlb_file_setup."""


STACK_KINDS = (MappingKind.MAIN_STACK, MappingKind.THREAD_STACK, MappingKind.SIGNAL_STACK)


@dataclass(frozen=True, slots=True)
class RegionOwners:
    """For each region its kind (uint8, a row of KINDS), thread and name (int32, NOBODY for none)."""

    kind: npt.NDArray[np.uint8]
    thread: Int32s
    name: Int32s


def region_owners(core: Core, claims: Claims) -> RegionOwners:
    """What every region is without the claims; names become rows of ``claims.names``."""
    memory = core.memory
    labels = region_labels(core)
    # Where a stack is claimed its bounds are known: what else the region holds is no stack (mappings side by side are one).
    labels[_regions_with_claimed_stacks(core, claims)] = RegionLabel.OTHER_ANONYMOUS
    kind = np.zeros(len(labels), np.uint8)
    for label, meant in KIND_OF_LABEL.items():
        kind[labels == label] = KINDS.index(meant)
    files = memory.region_file_index
    name_of_file, kind_of_file = np.full(len(memory.mapped_files) + 1, NOBODY, np.int32), np.zeros(0, np.uint8)
    kind_of_file = np.full(len(name_of_file), KINDS.index(MappingKind.MAPPED_FILE), np.uint8)
    for row, path in enumerate(memory.mapped_files.raw_paths):
        name_of_file[row] = claims.name_number(text_of(path))
        if path.startswith(SHARED_FILES):
            kind_of_file[row] = KINDS.index(MappingKind.SHARED_MEMORY)
        elif path.startswith(HUGE_PAGES):
            kind_of_file[row] = KINDS.index(MappingKind.UNEXPLAINED)
    name = name_of_file[files]  # -1, no file, is the last entry: nobody
    plain_file = labels == RegionLabel.MAPPED_FILES
    kind[plain_file] = kind_of_file[files[plain_file]]
    thread = np.full(len(labels), NOBODY, np.int32)
    _give_stacks(core, labels, kind, thread)
    behind = np.flatnonzero(labels == RegionLabel.MODULE_BSS)
    name[behind] = np.where(files[behind] >= 0, name[behind], name[behind - 1])
    return RegionOwners(kind, thread, name)


def _regions_with_claimed_stacks(core: Core, claims: Claims) -> npt.NDArray[np.intp]:
    """The regions in which a stack begins that some claim tells."""
    columns, memory = claims.columns(), core.memory
    stacks = np.isin(columns.kind, [KINDS.index(kind) for kind in STACK_KINDS])
    regions, is_mapped = row_holding(columns.start[stacks], memory.region_start, memory.region_end)
    found = np.unique(regions[is_mapped])
    return found[memory.region_file_index[found] < 0]


def _give_stacks(core: Core, labels: npt.NDArray[np.int64], kind: npt.NDArray[np.uint8], thread: Int32s) -> None:
    """The stacks that threads are on, and the main stack, by what the kernel put there at the start."""
    memory = core.memory
    for owner in core.threads:
        region = memory.region_index(owner.stack_pointer) if owner.stack_pointer else None
        if region is not None and labels[region] == RegionLabel.THREAD_STACKS:
            thread[region] = owner.index
    for address in (core.auxv.get(AT_RANDOM, 0), core.auxv.get(AT_EXECFN, 0)):
        region = memory.region_index(address) if address else None
        if region is not None and labels[region] in (RegionLabel.THREAD_STACKS, RegionLabel.OTHER_ANONYMOUS):
            kind[region] = KINDS.index(MappingKind.MAIN_STACK)
            leader = next((owner.index for owner in core.threads if owner.lwp == core.process.pid), NOBODY)
            thread[region] = leader
            break
