"""What the regions are that nobody claims, their kind and the file that they belong to; and the bss of modules, as claims.

Knows: labels of regions (``corefile.kinds``) and how the kernel names memory that is shared without a lasting file. Does not
know: what others claim, stacks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.accounting.claims import NOBODY, Claims
from coreheap.corefile import Core
from coreheap.corefile.bss import module_bss
from coreheap.corefile.kinds import RegionLabel, region_labels
from coreheap.corefile.memory import HUGE_PAGES
from coreheap.corefile.notes import text_of
from coreheap.mappings import KINDS, MappingKind

Int32s = npt.NDArray[np.int32]

KIND_OF_LABEL = {
    RegionLabel.MODULE_TEXT: MappingKind.MODULE_TEXT,
    RegionLabel.MODULE_RODATA: MappingKind.MODULE_RODATA,
    RegionLabel.MODULE_DATA: MappingKind.MODULE_DATA,
    RegionLabel.MODULE_BSS: MappingKind.MODULE_BSS,
    RegionLabel.MAPPED_FILES: MappingKind.MAPPED_FILE,
    RegionLabel.KERNEL_PAGES: MappingKind.KERNEL_PAGES,
    RegionLabel.NO_ACCESS: MappingKind.NO_ACCESS,
    RegionLabel.OTHER_ANONYMOUS: MappingKind.UNEXPLAINED,
}

SHARED_FILES = (b"/SYSV", b"/memfd:", b"/dev/zero (deleted)", b"/dev/shm/", b"/run/shm/")
"""How the names of shared memory begin: ipc/shm.c, mm/memfd.c, mm/shmem.c (shmem_zero_setup), and glibc's shm_open."""
ZERO_DEVICE = b"/dev/zero"
"""A private mapping of the device is anonymous memory and keeps its file; a shared one gets a file of its own, which is shown as
deleted (drivers/char/mem.c, mmap_zero)."""


@dataclass(frozen=True, slots=True)
class RegionOwners:
    """For each region its kind (uint8, a row of KINDS) and name (int32, NOBODY for none)."""

    kind: npt.NDArray[np.uint8]
    name: Int32s


def region_owners(core: Core, claims: Claims) -> RegionOwners:
    """What every region is without the claims; names become rows of ``claims.names``.

    No region is a stack here: where stacks begin and end, claims say.
    """
    memory = core.memory
    labels = region_labels(core, with_stacks=False)
    kind = np.zeros(len(labels), np.uint8)
    for label, meant in KIND_OF_LABEL.items():
        kind[labels == label] = KINDS.index(meant)
    files = memory.region_file_index
    name_of_file = np.full(len(memory.mapped_files) + 1, NOBODY, np.int32)
    kind_of_file = np.full(len(name_of_file), KINDS.index(MappingKind.MAPPED_FILE), np.uint8)
    for row, path in enumerate(memory.mapped_files.raw_paths):
        name_of_file[row] = claims.name_number(text_of(path))
        if path.startswith(SHARED_FILES):
            kind_of_file[row] = KINDS.index(MappingKind.SHARED_MEMORY)
        elif path == ZERO_DEVICE or path.startswith(HUGE_PAGES):
            kind_of_file[row] = KINDS.index(MappingKind.UNEXPLAINED)
    name = name_of_file[files]  # -1, no file, is the last entry: nobody
    plain_file = labels == RegionLabel.MAPPED_FILES
    kind[plain_file] = kind_of_file[files[plain_file]]
    return RegionOwners(kind, name)


def bss_claims(core: Core, claims: Claims) -> None:
    """Claim the bss of each module under its name: its mapping may hold more than that."""
    bss = module_bss(core)
    modules = core.modules
    claims.add(
        MappingKind.MODULE_BSS,
        bss.start,
        bss.end,
        name=[claims.name_number(modules[row].path or None) for row in bss.module.tolist()],
        is_supposed=bss.is_supposed,
    )
