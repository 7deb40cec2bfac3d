"""A Java VM's memory without its tables: what only a VM's reservations look like.

Knows: options of the command line and the environment, and the shape that HotSpot's reservations have in the address space.
Does not know: anything that the VM keeps of them, so nothing here is certain, and what has no shape of its own (metaspace, the
collector's tables) is not found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.accounting.java.found import JavaPart
from coreheap.corefile import Core
from coreheap.corefile.kinds import EXECUTE, READ, WRITE
from coreheap.evidence import Evidence, Strength
from coreheap.mappings import MappingKind
from coreheap.quantities import MIB, AddressRange, format_bytes

OPTION_VARIABLES: Final = ("JDK_JAVA_OPTIONS", "JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS")
"""Variables whose options the launcher or the VM takes; the last wins over the command line."""
CODE_CACHE_BYTES: Final = 240 * MIB
CLASS_SPACE_BYTES: Final = 1024 * MIB
"""Defaults of ReservedCodeCacheSize and CompressedClassSpaceSize on 64-bit machines."""
LARGEST_HEAP_UNIT: Final = 32 * MIB
"""Heaps are rounded up to the collector's regions; 32 MiB is the largest of G1's."""
LOW_ADDRESSES: Final = 32 << 30
ARCHIVE_ALIGNMENT: Final = 16 * MIB
_SIZE: Final = re.compile(r"([0-9]{1,19})([kmgt]?)", re.IGNORECASE)
_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE_OPTIONS: Final = (
    ("MaxHeapSize", "-Xmx"),
    ("MaxHeapSize", "-XX:MaxHeapSize="),
    ("ReservedCodeCacheSize", "-XX:ReservedCodeCacheSize="),
    ("CompressedClassSpaceSize", "-XX:CompressedClassSpaceSize="),
    ("MaxDirectMemorySize", "-XX:MaxDirectMemorySize="),
)


def sizes_asked_for(core: Core) -> dict[str, int]:
    """Sizes in bytes that the command line and the environment give, by the name of the VM's option."""
    stack = core.initial_stack
    if stack is None:
        return {}
    words = (
        stack.environment.get(OPTION_VARIABLES[0], "").split() + stack.environment.get(OPTION_VARIABLES[1], "").split()
    )
    words += [*stack.arguments, *stack.environment.get(OPTION_VARIABLES[2], "").split()]
    found = {}
    for word in words:
        for name, prefix in _SIZE_OPTIONS:
            size = _SIZE.fullmatch(word.removeprefix(prefix)) if word.startswith(prefix) else None
            if size is not None:
                found[name] = int(size[1]) * _UNITS[size[2].lower()]
    return found


class UntoldMemory:
    """The parts of a VM that its tables do not tell of."""

    def __init__(self, core: Core) -> None:
        self._core = core
        memory = core.memory
        self._start, self._end, self._flags = memory.region_start, memory.region_end, memory.region_flags
        self._access = self._flags & (READ | WRITE | EXECUTE)
        archive_files = [number for number, path in enumerate(memory.mapped_files.raw_paths) if path.endswith(b".jsa")]
        self._is_archive = np.isin(memory.region_file_index, archive_files)
        self._is_anonymous = memory.region_file_index < 0
        self.flags = sizes_asked_for(core)

    def parts(self) -> tuple[JavaPart, ...]:
        return (*self._heap(), *self._code_cache(), *self._class_space())

    def _heap(self) -> Iterator[JavaPart]:
        """The one stretch without a gap that has the size which was asked for, or that has an archive's objects in it.

        Nothing in it is executable. A heap of less than 32 GiB lies below 32 GiB: HotSpot tries these places first, because
        its references then take four bytes without a base. Elsewhere a size alone would fit a sub-heap of malloc's, too.
        """
        asked = self.flags.get("MaxHeapSize")
        classes = self.flags.get("CompressedClassSpaceSize", CLASS_SPACE_BYTES)
        sized, archived = [], []
        for first, end in self._stretches((self._is_anonymous | self._is_archive) & (self._access & EXECUTE == 0)):
            low, high = int(self._start[first]), int(self._end[end - 1])
            if (high > LOW_ADDRESSES and (asked or 0) < LOW_ADDRESSES) or low % MIB or high % MIB:
                continue
            if asked and asked <= high - low < asked + LARGEST_HEAP_UNIT:
                sized.append((low, high))
            elif asked and high - low == asked + classes:
                # Without a class archive the class space is reserved behind the heap.
                sized.append((low, low + asked))
            elif not asked and self._is_archive[first + 1 : end].any() and not self._is_archive[first]:
                archived.append((low, high))
        for found, what in ((sized, "the size that -Xmx asks for"), (archived, "objects of the class archive inside")):
            if len(found) == 1:
                low, high = found[0]
                fact = Evidence(
                    f"{format_bytes(high - low)} without a gap: {what}", "address space", Strength.SOLID, low
                )
                yield JavaPart(MappingKind.JAVA_HEAP, "reserved", AddressRange(low, high), (fact,))

    def _code_cache(self) -> Iterator[JavaPart]:
        """Anonymous memory that is writable and executable at once.

        The VM reserves one stretch for all its code, of a known size, and gives its code heaps access as they grow: the stretch
        that has that size is believed, with what is reserved of it. Other compilers in the process have such memory as well
        (LuaJIT, V8, libffi), of which only that much is claimed.
        """
        code = self._is_anonymous & (self._access == READ | WRITE | EXECUTE)
        reserve = self.flags.get("ReservedCodeCacheSize", CODE_CACHE_BYTES)
        stretches = []
        for first, end in self._stretches(self._is_anonymous & (code | (self._access == 0))):
            rows = first + np.flatnonzero(code[first:end])
            if len(rows):
                low, high = int(self._start[rows[0]]), int(self._end[end - 1])
                # What is reserved behind may be somebody else's, what lies in between is not.
                fits = int(self._end[rows[-1]]) - low <= reserve <= high - low
                stretches.append((rows, low, high, fits))
        fitting = [stretch for stretch in stretches if stretch[3]]
        exact = [stretch for stretch in fitting if stretch[2] - stretch[1] == reserve]
        believed = exact if len(exact) == 1 else fitting
        for stretch in stretches:
            rows, low, _, _ = stretch
            written = int((self._end[rows] - self._start[rows]).sum())
            what = f"{format_bytes(written)} of anonymous memory are writable and executable"
            if len(believed) == 1 and stretch is believed[0]:
                what += f", and begin {format_bytes(reserve)} that are reserved without a gap"
                fact = Evidence(what, "address space", Strength.SOLID, low)
                yield JavaPart(MappingKind.JAVA_CODE_CACHE, "code", AddressRange(low, low + reserve), (fact,))
                continue
            # A mapping that is only partly saved is several regions.
            begins = np.concatenate(([True], self._start[rows[1:]] != self._end[rows[:-1]]))
            last = np.append(np.flatnonzero(begins)[1:], len(rows)) - 1
            for start, end in zip(self._start[rows[begins]].tolist(), self._end[rows[last]].tolist(), strict=True):
                fact = Evidence(what, "address space", Strength.HINT, start)
                own = AddressRange(start, end)
                yield JavaPart(MappingKind.JAVA_CODE_CACHE, "code", own, (fact,))

    def _class_space(self) -> Iterator[JavaPart]:
        """What follows the class archive: the rest of its reservation, then the class space."""
        size = self.flags.get("CompressedClassSpaceSize", CLASS_SPACE_BYTES)
        behind = self._is_anonymous & (self._access & EXECUTE == 0)
        ends = {int(self._start[first]): int(self._end[end - 1]) for first, end in self._stretches(behind)}
        for first, end in self._stretches(self._is_archive):
            low, archive_end = int(self._start[first]), int(self._end[end - 1])
            start = archive_end + -archive_end % ARCHIVE_ALIGNMENT
            if low % ARCHIVE_ALIGNMENT or low < LOW_ADDRESSES or start + size > ends.get(archive_end, 0):
                continue
            facts = (
                Evidence("the class archive is mapped at the start of the reservation", "NT_FILE", Strength.HINT, low),
                Evidence(f"{format_bytes(size)} follow the class archive", "address space", Strength.HINT, start),
            )
            for part, begins, ends_at in (("shared_archive", low, start), ("class_space", start, start + size)):
                yield JavaPart(MappingKind.JAVA_METASPACE, part, AddressRange(begins, ends_at), facts)

    def _stretches(self, rows: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
        """(first, end) of the maximal runs of such regions that touch."""
        if not len(rows):
            return []
        joined = rows[1:] & rows[:-1] & (self._start[1:] == self._end[:-1])
        starts = np.flatnonzero(rows & ~np.concatenate(([False], joined)))
        ends = np.flatnonzero(rows & ~np.concatenate((joined, [False]))) + 1
        return list(zip(starts.tolist(), ends.tolist(), strict=True))
