"""A Java VM's memory as its own tables tell it: heap, code cache, metaspace, the collector's tables, threads.

Knows: which fields of HotSpot's lead to which reservation, by name; what a release does not have is just not found.
Does not know: objects, or what any reservation is worth.

The tables do not name the reservations of metaspace and of the collector's side tables. Those are recognised by the
records that the VM keeps of them: a pair or quadruple of page-aligned addresses that frame anonymous memory, beside words
that only such a record has, and near the heap's own record, because the VM makes them all when it starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.accounting.java.found import JavaPart, JavaThread
from coreheap.accounting.java.names import ThreadNames
from coreheap.accounting.java.tables import VmTables
from coreheap.corefile import Core, Module
from coreheap.corefile.regions import without_overlap
from coreheap.corefile.stacks import find_stacks
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength
from coreheap.mappings import MappingKind
from coreheap.quantities import MIB, AddressRange, format_address, format_bytes

UInt64s = npt.NDArray[np.uint64]

FLAGS: Final = (
    "MaxHeapSize", "MaxMetaspaceSize", "CompressedClassSpaceSize", "ReservedCodeCacheSize", "MaxDirectMemorySize",
    "ThreadStackSize", "VMThreadStackSize", "CompilerThreadStackSize",
    "StackYellowPages", "StackRedPages", "StackReservedPages", "MarkStackSizeMax",
)  # fmt: skip
"""Options that size a reservation; the first five in bytes, stack sizes in KiB, zones in units of 4 KiB."""
STACK_ZONES: Final = ("StackYellowPages", "StackRedPages", "StackReservedPages")
STACK_ZONE_BYTES: Final = 4096
"""HotSpot counts zones in units of 4 KiB, whatever the page is (JDK-8139864), and rounds each up to pages."""
THREAD_LIMIT: Final = 1 << 20
LOADER_LIMIT: Final = 1 << 20
CODE_HEAP_LIMIT: Final = 16
NEAR_BYTES: Final = 64 * MIB
"""How far from the heap's record others are looked for, either way: the size of a sub-heap of glibc's."""
METASPACE_ALIGNMENT: Final = 4 * MIB
"""A node of metaspace is made of root chunks of 4 MiB at multiples of it (JDK-8251158, JDK 16)."""
PAGE_SIZES: Final = (1 << 12, 1 << 14, 1 << 16, 1 << 21, 1 << 25, 1 << 29, 1 << 30)
MARK_CHUNK_ENTRIES: Final = 1024
"""Entries of a chunk of G1's mark stack, of a word each, the chunk's link among them (JDK-8057003)."""
TABLE_ALIGNMENT: Final = 2 * MIB
"""Tables are rounded up to pages, large ones where the VM uses them."""
TABLES: Final = "the VM's tables"
NEAR: Final = "memory near the heap's record"


class ToldMemory:
    """The parts of one VM, read through its tables."""

    def __init__(self, core: Core, libjvm: Module, tables: VmTables) -> None:
        self._core = core
        self._memory = core.memory
        self._libjvm = libjvm
        self._tables = tables
        self.flags = tables.flags(*FLAGS)
        self._heap_object = tables.static_word(("Universe", "_collectedHeap")) or 0

    def parts(self) -> tuple[JavaPart, ...]:
        """The most particular first: where two meet, the first one is right."""
        found = [*self._heap(), *self._code(), *self._card_table(), *self._metaspace()]
        for part in self._collector():
            if self._meets_stack(part.range):
                continue
            if not any(other.range.start <= part.range.start and part.range.end <= other.range.end for other in found):
                found.append(part)
        return tuple(found)

    def _meets_stack(self, found: AddressRange) -> bool:
        """Whether a thread's stack lies in a range: the VM has records of the stacks of its threads, too, framed alike."""
        start, end = self._stacks
        row = int(np.searchsorted(end, np.uint64(found.start), side="right"))
        return row < len(start) and int(start[row]) < found.end

    @cached_property
    def _stacks(self) -> tuple[UInt64s, UInt64s]:
        """(start, end) of what is a stack: by descriptors, by the VM's own records, and the word at every stack pointer."""
        ranges = [(stack.start, stack.end) for stack in find_stacks(self._core).descriptors.values()]
        ranges += [(thread.stack.start, thread.stack.end) for thread in self.threads()]
        ranges += [(thread.stack_pointer, thread.stack_pointer + 1) for thread in self._core.threads]
        columns = np.array([(low, high) for low, high in ranges if 0 <= low < high < 1 << 64], np.uint64).reshape(-1, 2)
        return without_overlap(columns[:, 0], columns[:, 1])

    # The heap, and what is told as plainly

    def _heap(self) -> Iterator[JavaPart]:
        reserved = self._tables.place(self._heap_object, ("CollectedHeap", "_reserved"))
        start = self._tables.member(reserved, ("MemRegion", "_start"))
        words = self._tables.member(reserved, ("MemRegion", "_word_size"))
        if start and words:
            yield from self._part(
                MappingKind.JAVA_HEAP,
                "reserved",
                start,
                start + words * self._core.word_bytes,
                "CollectedHeap::_reserved",
            )

    def _code(self) -> Iterator[JavaPart]:
        low = self._tables.static_word(("CodeCache", "_low_bound"))
        high = self._tables.static_word(("CodeCache", "_high_bound"))
        if low and high:
            yield from self._part(MappingKind.JAVA_CODE_CACHE, "code", low, high, "CodeCache::_low_bound, _high_bound")
        for heap in self._code_heaps():
            for field, part in (("_memory", "code"), ("_segmap", "segment_map")):
                space = self._tables.place(heap, ("CodeHeap", field))
                low = self._tables.member(space, ("VirtualSpace", "_low_boundary")) or 0
                high = self._tables.member(space, ("VirtualSpace", "_high_boundary")) or 0
                yield from self._part(MappingKind.JAVA_CODE_CACHE, part, low, high, f"CodeHeap::{field}")

    def _code_heaps(self) -> Iterator[int]:
        """The CodeHeap structures: a growable array of them since JDK 9, one before."""
        only = self._tables.static_word(("CodeCache", "_heap"))
        if only:
            yield only
        array = self._tables.static_word(("CodeCache", "_heaps"))
        length_at = self._tables.offset(("GrowableArrayBase", "_len"), ("GenericGrowableArray", "_len"))
        data = self._tables.member(array, ("GrowableArray<int>", "_data"))
        if not array or length_at is None or not data:
            return
        count = (self._tables.word(array + length_at) or 0) & 0xFFFFFFFF
        for number in range(min(count, CODE_HEAP_LIMIT)):
            heap = self._tables.word(data + number * self._core.word_bytes)
            if heap:
                yield heap

    def _card_table(self) -> Iterator[JavaPart]:
        barriers = self._tables.static_word(("BarrierSet", "_barrier_set"))
        table = self._tables.member(barriers, ("CardTableBarrierSet", "_card_table"))
        start = self._tables.member(table, ("CardTable", "_byte_map")) or 0
        byte_count = self._tables.member(table, ("CardTable", "_byte_map_size")) or 0
        heap_start = self._tables.member(
            self._tables.place(table, ("CardTable", "_whole_heap")), ("MemRegion", "_start")
        )
        reserved = self._tables.place(self._heap_object, ("CollectedHeap", "_reserved"))
        # Only a collector with cards has that structure behind the pointer.
        if start and heap_start and heap_start == self._tables.member(reserved, ("MemRegion", "_start")):
            end = start + byte_count
            page = self._memory.page_bytes
            yield from self._part(
                MappingKind.JAVA_GC, "card_table", start & -page, end + -end % page, "CardTable::_byte_map"
            )

    # Metaspace

    def _metaspace(self) -> Iterator[JavaPart]:
        low = self._tables.static_word(("MetaspaceObj", "_shared_metaspace_base")) or 0
        high = self._tables.static_word(("MetaspaceObj", "_shared_metaspace_top")) or 0
        yield from self._part(
            MappingKind.JAVA_METASPACE, "shared_archive", low, high, "MetaspaceObj::_shared_metaspace_base, _top"
        )
        size = self.flags.get("CompressedClassSpaceSize", 0)
        seen: set[tuple[int, int]] = set()
        classes, others = self._metadata()
        records = self._reserved_spaces()
        for part, pointers, source in (
            ("class_space", classes, "Klass structures of ClassLoaderDataGraph"),
            ("metadata", others, "InstanceKlass::_constants of ClassLoaderDataGraph"),
        ):
            if not pointers:
                continue
            addresses = np.unique(np.array(sorted(pointers), np.uint64))
            addresses = addresses[(addresses < np.uint64(low)) | (addresses >= np.uint64(high))]
            for start, end, count, recorded in _holders(addresses, records):
                if (start, end) in seen:
                    continue
                seen.add((start, end))
                # Without a record of the reservation only that some of it is metaspace is proven, not how far it reaches.
                strength = Strength.PROOF if recorded else Strength.SOLID
                facts = [Evidence(f"{count} structures of classes lie there", source, strength, start)]
                if recorded:
                    what = f"the VM has a record of {format_bytes(end - start)} at {format_address(start)}"
                    facts.append(Evidence(what, NEAR, Strength.SOLID, start))
                # Without a class space of their own classes lie among the other metadata.
                word = part if end - start == size else "metadata"
                if self._is_anonymous(start, end):
                    yield JavaPart(MappingKind.JAVA_METASPACE, word, AddressRange(start, end), tuple(facts))
        rest = [base for base, length in records if length == size and (base, base + length) not in seen]
        for base in rest if size and high else ():
            # No class outside of the archive: its space is still reserved.
            what = "a record of CompressedClassSpaceSize bytes"
            yield from self._part(
                MappingKind.JAVA_METASPACE, "class_space", base, base + size, what, Strength.SOLID, NEAR
            )
        if low and high:
            # The archive's reservation ends where the class space begins.
            following = [base for base, length in records if length == size and high <= base <= high + 16 * MIB]
            if following:
                end, what = min(following), "between archive and class space"
                yield from self._part(
                    MappingKind.JAVA_METASPACE, "shared_archive", high, end, what, Strength.SOLID, NEAR
                )

    def _metadata(self) -> tuple[set[int], set[int]]:
        """Addresses of Klass structures, and of constant pools: of all class loaders."""
        tables = self._tables
        classes: set[int] = set()
        pools: set[int] = set()
        loader, seen = tables.static_word(("ClassLoaderDataGraph", "_head")), set[int]()
        # An array's class has no constant pool: what lies there is told apart by where it leads, or not at all.
        while loader and loader not in seen and len(seen) < LOADER_LIMIT:
            seen.add(loader)
            klass = tables.member(loader, ("ClassLoaderData", "_klasses"))
            while klass and klass not in classes and len(classes) < LOADER_LIMIT:
                if tables.member(klass, ("Klass", "_class_loader_data")) not in (loader, None):
                    break
                classes.add(klass)
                pool = tables.member(klass, ("InstanceKlass", "_constants"))
                holder_at = tables.offset(("ConstantPool", "_pool_holder"))
                if pool and holder_at is not None and tables.word(pool + holder_at) == klass:
                    pools.add(pool)
                klass = tables.member(klass, ("Klass", "_next_link"))
            loader = tables.member(loader, ("ClassLoaderData", "_next"))
        return classes, pools

    def _reserved_spaces(self) -> list[tuple[int, int]]:
        """What looks like a ReservedSpace of metaspace's: base and size, both multiples of its root chunk's size, nothing that is
        not accessible in front, and the alignment."""
        words, _ = self._near
        if len(words) < 4:
            return []
        base, size, prefix, alignment = words[:-3], words[1:-2], words[2:-1], words[3:]
        mask, page = np.uint64(METASPACE_ALIGNMENT - 1), np.uint64(self._memory.page_bytes)
        fits = (base & mask == 0) & (size & mask == 0) & (size > 0) & (size <= np.uint64(1 << 36)) & (base > size)
        fits &= (
            (prefix == 0)
            & (alignment >= page)
            & (alignment & (alignment - np.uint64(1)) == 0)
            & (base % np.maximum(alignment, page) == 0)
        )
        pairs = {(int(base[row]), int(size[row])) for row in np.flatnonzero(fits).tolist()}
        return sorted(pair for pair in pairs if self._is_anonymous(pair[0], pair[0] + pair[1]))

    # The collector's side tables

    def _collector(self) -> Iterator[JavaPart]:
        """Records of reservations that no field leads to: of G1's page-based spaces, of bitmaps over the heap, of VirtualSpace."""
        words, places = self._near
        if len(words) < 8:
            return
        page = self._memory.page_bytes
        mask = np.uint64(page - 1)
        aligned = (words & mask == 0) & (words >= np.uint64(1 << 16))
        library = (words >= np.uint64(self._libjvm.start)) & (words < np.uint64(self._libjvm.end))
        count = len(words) - 7
        w = [words[number : number + count] for number in range(8)]
        a = [aligned[number : number + count] for number in range(8)]
        # A mapper: its own virtual functions, a listener, then low and high, the bytes of a last page, a page size.
        mapper = (
            library[:count]
            & a[2]
            & a[3]
            & (w[3] > w[2])
            & (w[4] < np.uint64(page))
            & np.isin(w[5], np.array(PAGE_SIZES, np.uint64))
        )
        # low_boundary, high_boundary, low, high.
        space = a[0] & a[1] & a[2] & a[3] & (w[0] < w[1]) & (w[0] <= w[2]) & (w[2] < w[3]) & (w[3] <= w[1])
        space &= w[1] - w[0] <= np.uint64(self._largest_table())
        for rows, at, what in ((mapper, 2, "a page-based space of G1's"), (space, 0, "a VirtualSpace")):
            for row in np.flatnonzero(rows).tolist():
                low, high = int(words[row + at]), int(words[row + at + 1])
                if not self._is_anonymous(low, high):
                    continue
                fact = Evidence(f"{what} frames it", NEAR, Strength.SOLID, int(places[row + at]))
                yield JavaPart(MappingKind.JAVA_GC, "side_table", AddressRange(low, high), (fact,))
        # G1's mark stack: how many chunks at most, where the first is, and for how many there is room.
        most = self.flags.get("MarkStackSizeMax", 0) // MARK_CHUNK_ENTRIES
        stack = (w[0] == np.uint64(most)) & a[1] & (w[2] > 0) & (w[2] <= w[0])
        for row in np.flatnonzero(stack).tolist() if most else ():
            low = int(words[row + 1])
            high = low + int(words[row + 2]) * MARK_CHUNK_ENTRIES * 8
            if self._is_anonymous(low, high):
                fact = Evidence(
                    f"a mark stack of at most MarkStackSizeMax entries frames {format_bytes(high - low)}",
                    NEAR,
                    Strength.SOLID,
                    int(places[row]),
                )
                yield JavaPart(MappingKind.JAVA_GC, "mark_stack", AddressRange(low, high), (fact,))

    def _largest_table(self) -> int:
        """The bytes of the largest side table that a heap of this size has, two bits for each of its words (ParMarkBitMap)."""
        heap = sum(part.range.byte_count for part in self._heap())
        table = 2 * heap // (8 * self._core.word_bytes)
        return table + -table % TABLE_ALIGNMENT if heap else (1 << 64) - 1

    @cached_property
    def _near(self) -> tuple[UInt64s, UInt64s]:
        """The words around the heap's own record that are saved, and their addresses."""
        index = self._memory.region_index(self._heap_object) if self._heap_object else None
        if index is None:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        region = self._memory.region(index)
        low = max(region.start, self._heap_object - NEAR_BYTES) & -8
        high = min(region.end, self._heap_object + NEAR_BYTES) & -8
        word = self._core.word_bytes
        pieces, places = [], []
        for start, end in self._memory.populated_extents(low, high):
            start += -start % word
            count = max(end - start, 0) // word
            try:
                pieces.append(self._memory.read_words(start, count))
            except MemoryFault:
                continue
            places.append(np.arange(start, start + count * word, word, dtype=np.uint64))
        if not pieces:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        return np.concatenate(pieces), np.concatenate(places)

    # Threads

    def threads(self) -> tuple[JavaThread, ...]:
        """The threads of the VM's list that the core has."""
        tables = self._tables
        zones = [self.flags.get(name, -1) for name in STACK_ZONES]
        page = self._memory.page_bytes
        guard = sum(-(-zone * STACK_ZONE_BYTES // page) * page for zone in zones if 0 <= zone < 1 << 16)
        lwps = {thread.lwp for thread in self._core.threads}
        found: list[JavaThread] = []
        objects: dict[int, int] = {}
        for thread in self._thread_structures():
            os_thread = tables.member(thread, ("JavaThread", "_osthread"), ("Thread", "_osthread"))
            lwp = tables.member(os_thread, ("OSThread", "_thread_id"))
            base = tables.member(thread, ("JavaThread", "_stack_base"), ("Thread", "_stack_base"))
            size = tables.member(thread, ("JavaThread", "_stack_size"), ("Thread", "_stack_size"))
            if lwp is None or not base or not size or size >= base:
                continue
            if lwp & 0xFFFFFFFF in lwps and self._regions(base - size, base):
                stack = AddressRange(base - size, base)
                found.append(JavaThread(lwp & 0xFFFFFFFF, stack, guard if guard < size else 0))
                objects[lwp & 0xFFFFFFFF] = tables.member(thread, ("JavaThread", "_threadObj")) or 0
        names = ThreadNames(self._memory, tables).of_objects(objects)
        return tuple(replace(thread, name=names.get(thread.lwp)) for thread in found)

    def _thread_structures(self) -> Iterator[int]:
        """The JavaThread structures: an array of them since JDK 10, a chain before."""
        tables = self._tables
        threads = tables.static_word(("ThreadsSMRSupport", "_java_thread_list"))
        length_at = tables.offset(("ThreadsList", "_length"))
        first = tables.member(threads, ("ThreadsList", "_threads"))
        if threads and length_at is not None and first:
            count = (tables.word(threads + length_at) or 0) & 0xFFFFFFFF
            for number in range(min(count, THREAD_LIMIT)):
                thread = tables.word(first + number * self._core.word_bytes)
                if thread is None:
                    return
                yield thread
            return
        thread, seen = tables.static_word(("Threads", "_thread_list")), set[int]()
        while thread and thread not in seen and len(seen) < THREAD_LIMIT:
            seen.add(thread)
            yield thread
            thread = tables.member(thread, ("JavaThread", "_next"))

    # Ranges

    def _part(
        self,
        kind: MappingKind,
        part: str,
        start: int,
        end: int,
        what: str,
        strength: Strength = Strength.PROOF,
        source: str = TABLES,
    ) -> Iterator[JavaPart]:
        """One part, if it is a range of mapped memory that no module lies in."""
        if not 0 < start < end < 1 << 64 or not self._regions(start, end):
            return
        if any(start < module.end and module.start < end for module in self._core.modules if not _is_archive(module)):
            return
        fact = Evidence(f"{what}: {format_bytes(end - start)}", source, strength, start)
        yield JavaPart(kind, part, AddressRange(start, end), (fact,))

    def _regions(self, start: int, end: int) -> range:
        first = int(np.searchsorted(self._memory.region_end, np.uint64(start), side="right"))
        last = int(np.searchsorted(self._memory.region_start, np.uint64(end), side="left"))
        return range(first, last)

    def _is_anonymous(self, start: int, end: int) -> bool:
        """Whether the range begins in mapped memory, and nothing of it is a file's.

        It may have gaps: gdb leaves out what is only reserved.
        """
        if not 0 < start < end < 1 << 64:
            return False
        rows = self._regions(start, end)
        if not rows or int(self._memory.region_start[rows[0]]) > start:
            return False
        return not (self._memory.region_file_index[rows.start : rows.stop] >= 0).any()


def _is_archive(module: Module) -> bool:
    """Whether it is a class archive, part of which is mapped into the heap: writable and executable as libraries are."""
    return module.path.endswith(".jsa")


def _holders(addresses: UInt64s, records: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, bool]]:
    """The reservations that hold addresses: start, end, how many of them, and whether a record names it.

    Where no record does, the root chunks that hold them: less than what was reserved.
    """
    rest = addresses
    for base, size in sorted(records, key=lambda record: record[1]):
        held = (rest >= np.uint64(base)) & (rest < np.uint64(base + size))
        if held.any():
            yield base, base + size, int(held.sum()), True
            rest = rest[~held]
    blocks, counts = np.unique(rest // np.uint64(METASPACE_ALIGNMENT), return_counts=True)
    for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
        start = block * METASPACE_ALIGNMENT
        yield start, start + METASPACE_ALIGNMENT, count, False
