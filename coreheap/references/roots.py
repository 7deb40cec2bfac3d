"""Where a process keeps pointers outside of its heap: the roots of reachability.

Knows: stacks, thread-local storage, registers, module data and other memory, each with its kind. Does not know: chunks,
or what a pointer leads to.

What there is one of for each region, module or thread is painted, later kinds over earlier ones. Whatever the heap claims
is taken out, with malloc's own structures: free lists and arena headers anchor nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Backing, Core
from coreheap.corefile.kinds import RegionLabel, region_labels
from coreheap.corefile.notes import NT_ARM_TLS, NT_FPREGSET, NT_PRSTATUS, NT_X86_XSTATE, records_at
from coreheap.corefile.thread_stacks import stacks_of_threads
from coreheap.corefile.thread_storage import thread_storages
from coreheap.leaks import RootKind
from coreheap.references.ranges import ADDRESS_LIMIT, Painter, RootRanges
from coreheap.references.stack_roots import mark_old_stacks, mark_stacks

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]
_RegisterColumns = tuple[UInt64s, npt.NDArray[np.int32], npt.NDArray[np.uint32], npt.NDArray[np.uint32]]

NOTE_BYTES = 1 << 14
"""Read of one register note at most; XSAVE with all of AVX-512 and AMX has about 11,000."""
WORDS_AT_ONCE = 1 << 22
"""Words of notes that are looked at together."""
PT_LOAD, PF_W = 1, 2


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


def find_roots(core: Core, heap: tuple[UInt64s, UInt64s], remainder: tuple[UInt64s, UInt64s]) -> Roots:
    """All roots outside of the heap, and the ``remainder`` of it that no chunk has.

    ``heap`` and ``remainder``: start and end of ranges, sorted and without overlap.
    """
    storage = tuple(thread_storages(core).values())
    painter = Painter()
    labels = region_labels(core)
    _mark_regions(core, labels, painter)
    mark_old_stacks(core, labels, painter)
    known = stacks_of_threads(core)
    mark_stacks(core, labels, painter, storage, known, heap)
    for block in storage:
        stack = known.get(block.thread)
        painter.add(block.start, block.end if stack is None else min(block.end, stack.end), RootKind.TLS, block.thread)
    unclaimed = RootRanges.of_one_kind(*remainder, RootKind.HEAP_REMAINDER)
    ranges = painter.ranges().without(*heap).painted_over(unclaimed)
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


def _mark_regions(core: Core, labels: Int64s, painter: Painter) -> None:
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
        painter.add_many(memory.region_start[rows], memory.region_end[rows], kind)
    for start, end in _module_data(core):
        painter.add(start, end, RootKind.MODULE_DATA)


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


def _registers(core: Core) -> RootValues:
    """General registers of all threads, and every aligned word of their other register notes that is not 0."""
    table = core.thread_table
    threads, per_thread = table.registers.shape
    columns: list[_RegisterColumns] = [
        (
            table.registers.reshape(-1),
            np.repeat(np.arange(threads, dtype=np.int32), per_thread),
            np.full(threads * per_thread, NT_PRSTATUS, np.uint32),
            np.tile(np.arange(per_thread, dtype=np.uint32), threads),
        )
    ]
    columns += _words_of_notes(core)
    value, thread_number, note_kind, number = (np.concatenate(column) for column in zip(*columns, strict=True))
    return RootValues(value, thread_number, note_kind, number)


def _words_of_notes(core: Core) -> Iterator[_RegisterColumns]:
    """Columns of ``RootValues`` for the words that are not 0 of all threads' other register notes, in the order of the notes."""
    table, word = core.thread_table, core.word_bytes
    notes, owner = table.other_notes()
    word_count = np.minimum(table.notes.byte_count[notes], NOTE_BYTES) // word
    found: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], UInt64s]] = []
    # Most threads have notes of the same few sizes.
    for count in np.unique(word_count).tolist():
        record = np.dtype([("words", f"<u{word}", (count,))])
        rows = np.flatnonzero(word_count == count)
        at_once = max(1, WORDS_AT_ONCE // max(count, 1))
        for first in range(0, len(rows), at_once) if count else ():
            some = rows[first : first + at_once]
            words = records_at(core.memory.file, table.notes.file_offset[notes[some]].astype(np.intp), record)["words"]
            row, column = np.nonzero(words)
            found.append((some[row], column, words[row, column].astype(np.uint64)))
    if not found:
        return
    row, column, value = (np.concatenate(part) for part in zip(*found, strict=True))
    order = np.argsort(row, kind="stable")
    row, column, value = row[order], column[order], value[order]
    yield value, owner[row].astype(np.int32), table.notes.kind[notes[row]], column.astype(np.uint32)


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
