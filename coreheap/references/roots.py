"""Where a process keeps pointers outside of its heap: the roots of reachability.

Knows: stacks, thread-local storage, registers, module data and other memory, each with its kind. Does not know: chunks,
or what a pointer leads to.

Ranges are columns. Whatever the heap claims (``heap_ranges``) is cut out, with malloc's own structures: free lists and
arena headers anchor nothing. Below a stack pointer, less the red zone, a stack holds nothing that is alive; that
is believed only where the stack ends at a guard, else the words there count as those of an old stack. The stacks of
threads that have ended stay mapped (glibc keeps up to 40 MiB of them): they are told by the shape of their mapping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile import AddressSpace, Backing, Core
from coreheap.corefile.kinds import RegionLabel, region_labels
from coreheap.corefile.notes import NT_ARM_TLS, NT_FPREGSET, NT_PRSTATUS, NT_X86_XSTATE
from coreheap.errors import MemoryFault
from coreheap.leaks import RootKind
from coreheap.references.thread_stacks import DESCRIPTOR_BYTES, ThreadStack, ended_stacks, stacks_of_threads

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

RED_ZONE_BYTES = {"x86_64": 128}
"""System V ABI for x86-64, 3.2.2; i386 and AAPCS64 (Linux) have none."""
TLS_BELOW_THREAD_POINTER = {"x86_64": True, "i386": True, "aarch64": False}
"""TLS variant II against I (Drepper, ELF Handling For Thread-Local Storage, section 3)."""
TLS_LIMIT = 1 << 20
"""Static TLS blocks further from the thread pointer are not believed."""
MODULES_WITH_TLS_LIMIT = 4096
NOTE_BYTES = 1 << 14
"""Read of one register note at most; XSAVE with all of AVX-512 and AMX has about 11,000."""
ADDRESS_LIMIT = 1 << 63
INITIAL_STACK_TAGS = (25, 31)
"""AT_RANDOM and AT_EXECFN point into the stack that a program begins with (include/uapi/linux/auxvec.h)."""
PT_LOAD, PF_W = 1, 2
KINDS = tuple(RootKind)
_CODE = {kind: code for code, kind in enumerate(KINDS)}


@dataclass(frozen=True, slots=True)
class RootRanges:
    """Memory to look for pointers in; columns of equal length, sorted by address, without overlap.

    ``start``, ``end``: uint64; ``kind``: uint8, an index into KINDS; ``thread``: int32, -1 where it belongs to none.
    """

    start: UInt64s
    end: UInt64s
    kind: npt.NDArray[np.uint8]
    thread: npt.NDArray[np.int32]

    def of(self, kind: RootKind) -> tuple[UInt64s, UInt64s]:
        rows = self.kind == _CODE[kind]
        return self.start[rows], self.end[rows]

    def bytes_of(self, kind: RootKind) -> int:
        start, end = self.of(kind)
        return int((end - start).sum())

    def at(self, address: int) -> tuple[RootKind, int | None] | None:
        """Kind and thread of the range that holds an address."""
        row = int(np.searchsorted(self.start, np.uint64(address), side="right")) - 1
        if row < 0 or address >= int(self.end[row]):
            return None
        thread = int(self.thread[row])
        return KINDS[int(self.kind[row])], thread if thread >= 0 else None


@dataclass(frozen=True, slots=True)
class RootValues:
    """Words that are roots by themselves: registers, and pointers of ld.so that lead into a block at a known distance.

    Columns: ``value`` uint64, ``thread`` int32, ``note`` uint32 (type of the ELF note, NT_PRSTATUS for general
    registers, 0 for a dtv), ``number`` uint32: which word of it.
    """

    value: UInt64s
    thread: npt.NDArray[np.int32]
    note: npt.NDArray[np.uint32]
    number: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Roots:
    """All roots of a process. ``thread_words`` are strong (dtv), ``registers`` weak."""

    ranges: RootRanges
    registers: RootValues
    thread_words: RootValues
    missing_bytes: int
    """Bytes of such memory that the core does not hold."""


@dataclass(frozen=True, slots=True)
class ThreadStorage:
    """Where a thread's static TLS and descriptor lie: [start, end) around the thread pointer, ``dtv`` None if unknown."""

    thread: int
    start: int
    end: int
    dtv: int | None


def find_roots(core: Core, heap_start: UInt64s, heap_end: UInt64s, remainder: Sequence[tuple[int, int]]) -> Roots:
    """All roots outside of the heap's ranges (sorted, without overlap), and the ``remainder`` of the heap that no chunk has."""
    storage = [found for number in range(len(core.threads)) if (found := _thread_storage(core, number)) is not None]
    marks = _Marks()
    labels = region_labels(core)
    _mark_regions(core, labels, marks)
    _mark_old_stacks(core, labels, marks)
    known = stacks_of_threads(core, TLS_BELOW_THREAD_POINTER[core.machine])
    _mark_stacks(core, labels, marks, storage, known, (heap_start, heap_end))
    for block in storage:
        stack = known.get(block.thread)
        marks.add(block.start, block.end if stack is None else min(block.end, stack.end), RootKind.TLS, block.thread)
    marks.cut_out(heap_start, heap_end)
    for start, end in remainder:
        marks.add(start, end, RootKind.HEAP_REMAINDER)
    ranges = marks.ranges()
    word = core.word_bytes
    dtvs = [(block.dtv - 2 * word, block.thread) for block in storage if block.dtv is not None]
    return Roots(
        ranges,
        _registers(core),
        RootValues(
            np.array([value for value, _ in dtvs], np.uint64),
            np.array([thread for _, thread in dtvs], np.int32),
            np.zeros(len(dtvs), np.uint32),
            np.zeros(len(dtvs), np.uint32),
        ),
        missing_bytes_within(core, ranges.start, ranges.end),
    )


def missing_bytes_within(core: Core, start: UInt64s, end: UInt64s) -> int:
    """Bytes of ranges (sorted, without overlap) that could hold pointers and are not in the core: cut off, or anonymous and
    left out.

    The kernel leaves out anonymous memory that was never written (fs/coredump.c, vma_dump_size: no anon_vma), as it does
    what madvise(MADV_DONTDUMP) excludes; nothing tells them apart. A module's bss is not excluded by anyone, so where
    other private memory was saved, bss that was not saved was never written. Memory of any other use may follow a
    module's data directly: only what the module's program headers cover is believed to be its bss.
    """
    memory, labels = core.memory, region_labels(core)
    writable = (memory.region_flags & 2) != 0
    saved = memory.region_backing == Backing.SAVED
    left_out = (memory.region_backing == Backing.NOT_SAVED) & (memory.region_file_index < 0) & writable
    private = (labels == RegionLabel.THREAD_STACKS) | (labels == RegionLabel.OTHER_ANONYMOUS)
    if core.made_by == "kernel" and bool((saved & private & writable).any()):
        left_out &= ~((labels == RegionLabel.MODULE_BSS) & _within_modules(core))
    rows = left_out | (memory.region_backing == Backing.TRUNCATED)
    before = np.concatenate(([np.uint64(0)], np.cumsum(end - start, dtype=np.uint64)))

    def bytes_below(address: UInt64s) -> UInt64s:
        row = np.searchsorted(start, address, side="right")
        inside = np.zeros(len(address), np.uint64)
        held = row > 0
        last = row[held] - 1
        inside[held] = np.minimum(address[held], end[last]) - start[last]
        below: UInt64s = before[np.maximum(row - 1, 0)] + inside
        return below

    return int((bytes_below(memory.region_end[rows]) - bytes_below(memory.region_start[rows])).sum())


def _within_modules(core: Core) -> npt.NDArray[np.bool_]:
    """For each region whether it ends within a module whose program headers are known: bool[regions]."""
    known = [module for module in core.modules if module.program_headers is not None]
    # Sorted by start: a region in a module ends at most where the last one that starts at or below it does.
    start = np.array([module.start for module in known], np.uint64)
    end = np.array([0, *(module.end for module in known)], np.uint64)
    row = np.searchsorted(start, core.memory.region_start, side="right")
    within: npt.NDArray[np.bool_] = core.memory.region_end <= end[row]
    return within


class _Marks:
    """Paints ranges of memory with a kind, later ones over earlier ones."""

    NOTHING = -1

    def __init__(self) -> None:
        self._start: list[UInt64s] = []
        self._end: list[UInt64s] = []
        self._kind: list[npt.NDArray[np.int16]] = []
        self._thread: list[npt.NDArray[np.int32]] = []

    def add_many(self, start: UInt64s, end: UInt64s, kind: RootKind | None, thread: int = -1) -> None:
        code = self.NOTHING if kind is None else _CODE[kind]
        self._start.append(start)
        self._end.append(end)
        self._kind.append(np.full(len(start), code, np.int16))
        self._thread.append(np.full(len(start), thread, np.int32))

    def add(self, start: int, end: int, kind: RootKind | None, thread: int = -1) -> None:
        start, end = max(start, 0), min(end, ADDRESS_LIMIT)
        if start < end:
            self.add_many(np.array([start], np.uint64), np.array([end], np.uint64), kind, thread)

    def cut_out(self, start: UInt64s, end: UInt64s) -> None:
        self.add_many(start, end, None)

    def ranges(self) -> RootRanges:
        """What is painted and saved, as ranges."""
        start, end = np.concatenate(self._start), np.concatenate(self._end)
        kind, thread = np.concatenate(self._kind), np.concatenate(self._thread)
        cuts = np.unique(np.concatenate([start, end]))
        low, high = cuts[:-1], cuts[1:]
        label, owner = _last_painted(start, end, kind, thread, cuts)
        held = label >= 0
        low, high, label, owner = low[held], high[held], label[held], owner[held]
        if len(low) > 1:
            same = (low[1:] == high[:-1]) & (label[1:] == label[:-1]) & (owner[1:] == owner[:-1])
            first = np.flatnonzero(np.concatenate(([True], ~same)))
            last = np.append(first[1:], len(low)) - 1
            low, high, label, owner = low[first], high[last], label[first], owner[first]
        return RootRanges(low, high, label.astype(np.uint8), owner)


def _last_painted(
    start: UInt64s,
    end: UInt64s,
    kind: npt.NDArray[np.int16],
    thread: npt.NDArray[np.int32],
    cuts: UInt64s,
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
    """Kind and thread of the last range that covers each piece between two cuts; -1 where none does.

    Backwards, each piece is painted once: ``following`` leads over those that are painted already.
    """
    pieces = len(cuts) - 1
    label = np.full(max(pieces, 0), -1, np.int16)
    owner = np.full(max(pieces, 0), -1, np.int32)
    following = list(range(pieces + 1))

    def unpainted(piece: int) -> int:
        root = piece
        while following[root] != root:
            root = following[root]
        while following[piece] != root:
            following[piece], piece = root, following[piece]
        return root

    first, last = np.searchsorted(cuts, start).tolist(), np.searchsorted(cuts, end).tolist()
    for number in range(len(first) - 1, -1, -1):
        piece = unpainted(first[number])
        while piece < last[number]:
            label[piece], owner[piece] = kind[number], thread[number]
            following[piece] = piece + 1
            piece = unpainted(piece)
    return label, owner


def _mark_regions(core: Core, labels: Int64s, marks: _Marks) -> None:
    """What was written once and is protected by now (mprotect) counts like what is writable: if it is in the core."""
    memory = core.memory
    saved = (memory.region_backing == Backing.SAVED) | (memory.region_backing == Backing.TRUNCATED)
    wanted = (saved | ((memory.region_flags & 2) != 0)) & (memory.region_end < np.uint64(ADDRESS_LIMIT))
    for kind, of_kind in (
        (RootKind.MAPPED_FILE, (RegionLabel.MAPPED_FILES,)),
        (RootKind.ANONYMOUS, (RegionLabel.OTHER_ANONYMOUS, RegionLabel.THREAD_STACKS, RegionLabel.NO_ACCESS)),
        (RootKind.MODULE_DATA, (RegionLabel.MODULE_DATA, RegionLabel.MODULE_BSS)),
    ):
        rows = wanted & np.isin(labels, of_kind)
        marks.add_many(memory.region_start[rows], memory.region_end[rows], kind)
    for start, end in _module_data(core):
        marks.add(start, end, RootKind.MODULE_DATA)


def _module_data(core: Core) -> Iterator[tuple[int, int]]:
    """The writable segments of each module, whatever protects them by now: PT_GNU_RELRO and mprotect make parts read-only."""
    for module in core.modules:
        headers, bias = module.program_headers, module.load_bias
        if headers is None or bias is None:
            continue
        for row in headers.rows_of_kind(PT_LOAD).tolist():
            start = bias + int(headers.address[row])
            end = min(start + int(headers.memory_bytes[row]), module.end)
            if int(headers.flags[row]) & PF_W and module.start <= start < end:
                yield start, end


def _guarded(memory: AddressSpace, start: int) -> bool:
    """Whether memory that nothing may touch, or a known hole in the address space, lies directly below an address."""
    row = memory.region_index(start - 1)
    return row is not None and int(memory.region_flags[row]) & 7 == 0 and int(memory.region_file_index[row]) < 0


def _mark_stacks(
    core: Core,
    labels: Int64s,
    marks: _Marks,
    storage: Sequence[ThreadStorage],
    known: Mapping[int, ThreadStack],
    heap: tuple[UInt64s, UInt64s],
) -> None:
    """The stacks of all threads: as their descriptors tell them, else as the mappings do.

    One that lies in a chunk is the heap's, and says nothing of the memory around it.
    """
    memory = core.memory
    red_zone = RED_ZONE_BYTES.get(core.machine, 0)
    storage_of = {block.thread: block for block in storage}
    by_region: dict[int, list[int]] = {}
    for thread in core.threads:
        region = memory.region_index(thread.stack_pointer)
        is_stack = region is not None and labels[region] == RegionLabel.THREAD_STACKS
        stack = known.get(thread.index)
        if stack is not None and stack.start <= thread.stack_pointer < stack.end:
            continue
        if region is not None and is_stack and not _is_within(heap, thread.stack_pointer):
            by_region.setdefault(region, []).append(thread.index)
    for region, threads in by_region.items():
        start, end = int(memory.region_start[region]), int(memory.region_end[region])
        threads.sort(key=lambda number: core.threads[number].stack_pointer)
        lowest = core.threads[threads[0]].stack_pointer - red_zone
        is_main = _holds_initial_stack(core, start, end)
        # Memory of any other use may lie below a stack that its program made itself.
        below_is_dead = is_main or _guarded(memory, start)
        marks.add(start, lowest, None if below_is_dead else RootKind.OLD_STACK, threads[0])
        for position, number in enumerate(threads):
            low = max(core.threads[number].stack_pointer - red_zone, start)
            high = end
            if position + 1 < len(threads):
                high = max(low, core.threads[threads[position + 1]].stack_pointer - red_zone)
            block = storage_of.get(number)
            if block is not None and low < block.start < high:
                marks.add(low, block.start, RootKind.STACK, number)
                if position + 1 < len(threads):
                    marks.add(block.end, high, RootKind.OLD_STACK, threads[position + 1])
            else:
                marks.add(low, high, RootKind.STACK, number)
    _mark_stacks_left(core, labels, marks, [block for block in storage if block.thread not in known], set(by_region))
    writable = np.isin(labels, (RegionLabel.OTHER_ANONYMOUS, RegionLabel.THREAD_STACKS))
    writable &= (memory.region_flags & 7) == 6
    unclaimed = _Marks()
    unclaimed.add_many(memory.region_start[writable], memory.region_end[writable], RootKind.ANONYMOUS)
    unclaimed.cut_out(*heap)
    ranges = unclaimed.ranges()
    in_ranges = zip(ranges.start.tolist(), ranges.end.tolist(), strict=True)
    for stack in ended_stacks(core, TLS_BELOW_THREAD_POINTER[core.machine], known.values(), in_ranges):
        marks.add(stack.start, stack.end, RootKind.OLD_STACK)
    for number, stack in known.items():
        block, pointer = storage_of.get(number), core.threads[number].stack_pointer
        end = stack.end if block is None else min(block.start, stack.end)
        if stack.start <= pointer < stack.end:
            # glibc's own consist of whole pages. What a program handed over may have been a part of something else.
            is_glibc_own = stack.start % core.page_bytes == stack.end % core.page_bytes == 0
            marks.add(stack.start, pointer - red_zone, None if is_glibc_own else RootKind.OLD_STACK, number)
            marks.add(max(pointer - red_zone, stack.start), end, RootKind.STACK, number)
        else:
            marks.add(stack.start, end, RootKind.STACK, number)


def _is_within(ranges: tuple[UInt64s, UInt64s], address: int) -> bool:
    """Whether an address lies in one of some ranges, sorted and without overlap."""
    row = int(np.searchsorted(ranges[0], np.uint64(address), side="right")) - 1
    return row >= 0 and address < int(ranges[1][row])


def _mark_stacks_left(
    core: Core, labels: Int64s, marks: _Marks, storage: Sequence[ThreadStorage], in_use: set[int]
) -> None:
    """Stacks of threads that run on another one: a signal's (sigaltstack), a coroutine's. How deep they are is not known."""
    memory = core.memory
    first_thread = next((thread.index for thread in core.threads if thread.lwp == core.process.pid), None)
    initial = [memory.region_index(core.auxv.get(tag, 0)) for tag in INITIAL_STACK_TAGS]
    places: list[tuple[int | None, int | None, int | None]] = [(region, first_thread, None) for region in initial]
    # The first thread's descriptor is not on its stack.
    places += [
        (memory.region_index(block.end - 1), block.thread, block.start)
        for block in storage
        if first_thread is not None and block.thread != first_thread
    ]
    for region, thread, top in places:
        if region is not None and region not in in_use and labels[region] == RegionLabel.OTHER_ANONYMOUS:
            start, end = int(memory.region_start[region]), int(memory.region_end[region])
            marks.add(start, end if top is None else top, RootKind.STACK, -1 if thread is None else thread)


def _holds_initial_stack(core: Core, start: int, end: int) -> bool:
    """Whether the kernel made this stack for the program (fs/binfmt_elf.c)."""
    return any(start <= core.auxv.get(tag, 0) < end for tag in INITIAL_STACK_TAGS)


def _mark_old_stacks(core: Core, labels: Int64s, marks: _Marks) -> None:
    """Stacks that glibc keeps of threads that have ended.

    Anonymous memory behind a guard that is as large as a living thread's stack with its guard, and holds no thread.
    """
    memory = core.memory
    in_use: set[int] = set()
    shapes: set[tuple[int, int]] = set()
    for thread in core.threads:
        for address in (thread.stack_pointer, thread.thread_pointer or 0):
            region = memory.region_index(address)
            if region is not None:
                in_use.add(region)
        region = memory.region_index(thread.stack_pointer)
        if region is not None and _guarded(memory, int(memory.region_start[region])):
            shapes.add(_shape(memory, region))
    anonymous = np.flatnonzero((labels == RegionLabel.OTHER_ANONYMOUS) & ((memory.region_flags & 7) == 6)).tolist()
    for region in anonymous:
        start = int(memory.region_start[region])
        if region in in_use or not _guarded(memory, start):
            continue
        end = int(memory.region_end[region])
        if _shape(memory, region) in shapes or _ends_with_descriptor(core, start, end):
            marks.add(start, end, RootKind.OLD_STACK)


def _shape(memory: AddressSpace, region: int) -> tuple[int, int]:
    guard = memory.region_index(int(memory.region_start[region]) - 1)
    if guard is None:
        return 0, 0
    return (
        int(memory.region_end[guard] - memory.region_start[guard]),
        int(memory.region_end[region] - memory.region_start[region]),
    )


def _ends_with_descriptor(core: Core, start: int, end: int) -> bool:
    """Whether a struct pthread lies at the end: on x86 its words 0 and 2 (tcb, self) hold its own address (tls.h)."""
    if not TLS_BELOW_THREAD_POINTER.get(core.machine, False):
        return False
    word = core.word_bytes
    low = max(start, end - 2 * DESCRIPTOR_BYTES)
    try:
        words = core.memory.read_words(low, (end - low) // word)
    except MemoryFault:
        return False
    own = np.uint64(low) + np.arange(len(words), dtype=np.uint64) * np.uint64(word)
    return bool(np.any((words[:-2] == own[:-2]) & (words[2:] == own[:-2])))


def _thread_storage(core: Core, number: int) -> ThreadStorage | None:
    """Static TLS and descriptor of a thread: from its dtv, which says where each module's block lies.

    glibc 2.12-2.44: the TCB's word 1 (word 0 on aarch64) is the dtv; its slots are {block, block to free}, slot -1 counts
    them, slot 0 is the generation. Unallocated blocks are -1, static ones have nothing to free (elf/dl-tls.c).
    """
    thread = core.threads[number]
    pointer = thread.thread_pointer
    if not pointer:
        return None
    memory, word = core.memory, core.word_bytes
    is_below = TLS_BELOW_THREAD_POINTER[core.machine]
    low, high = (pointer, pointer + DESCRIPTOR_BYTES) if is_below else (pointer - DESCRIPTOR_BYTES, pointer + 2 * word)
    dtv: int | None = None
    try:
        dtv = memory.read_word(pointer + word if is_below else pointer)
        slots = memory.read_word(dtv - 2 * word)
        if not 0 < slots <= MODULES_WITH_TLS_LIMIT:
            raise MemoryFault(dtv, "no dtv", word)
        entries = memory.read_words(dtv + 2 * word, 2 * slots).reshape(-1, 2)
        blocks = entries[entries[:, 1] == 0, 0]
        near = blocks[(blocks < np.uint64(pointer)) if is_below else (blocks > np.uint64(pointer))]
        distance = np.uint64(pointer) - near if is_below else near - np.uint64(pointer)
        near = near[distance < np.uint64(TLS_LIMIT)]
        if len(near) and is_below:
            low = int(near.min())
        elif len(near):
            high = _end_of_tls(core, pointer, int(near.max()))
    except MemoryFault:
        dtv = None
    region = memory.region_index(pointer)
    if region is not None:
        low = max(low, int(memory.region_start[region]))
        high = min(high, int(memory.region_end[region]))
    return ThreadStorage(number, low, max(high, low), dtv)


def _end_of_tls(core: Core, pointer: int, last_block: int) -> int:
    """On aarch64 TLS goes up to the end of the stack's mapping; elsewhere a page behind the last block."""
    region = core.memory.region_index(pointer)
    if region is None:
        return last_block
    end = int(core.memory.region_end[region])
    return end if end - last_block <= TLS_LIMIT else last_block + core.page_bytes


def _registers(core: Core) -> RootValues:
    """General registers of all threads, and every aligned word of their other register notes that is not 0."""
    table, word = core.thread_table, core.word_bytes
    threads, per_thread = table.registers.shape
    columns = [
        (
            table.registers.reshape(-1),
            np.repeat(np.arange(threads, dtype=np.int32), per_thread),
            np.full(threads * per_thread, NT_PRSTATUS, np.uint32),
            np.tile(np.arange(per_thread, dtype=np.uint32), threads),
        )
    ]
    for thread in core.threads:
        for note in thread.notes:
            first = note.file_offset
            content = core.memory.file[first : first + min(note.byte_count, NOTE_BYTES) // word * word]
            words = content.view(f"<u{word}").astype(np.uint64)
            rows = np.flatnonzero(words)
            columns.append(
                (
                    words[rows],
                    np.full(len(rows), thread.index, np.int32),
                    np.full(len(rows), note.kind, np.uint32),
                    rows.astype(np.uint32),
                )
            )
    value, thread_number, note_kind, number = (np.concatenate(column) for column in zip(*columns, strict=True))
    return RootValues(value, thread_number, note_kind, number)


_NOTE_NAMES = {NT_FPREGSET: "fpregset", NT_X86_XSTATE: "xsave", 0x46E62B7F: "fxsave", NT_ARM_TLS: "tpidr", 0x405: "sve"}
"""include/uapi/linux/elf.h; 0x46E62B7F is NT_PRXFPREG."""


def name_of_value(core: Core, values: RootValues, row: int) -> str:
    """A register's name: ``rdi``, ``xsave+160``; ``dtv`` for the thread library's own."""
    note, number = int(values.note[row]), int(values.number[row])
    if note == 0:
        return "dtv"
    if note == NT_PRSTATUS:
        return core.thread_table.register_names[number]
    return f"{_NOTE_NAMES.get(note, f'note {note:#x}')}+{number * core.word_bytes}"
