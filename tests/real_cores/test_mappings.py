"""Every byte of /proc/PID/maps has a kind, and what was in memory is what /proc/PID/smaps said just before the dump."""

from __future__ import annotations

import gzip
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.accounting import Claims, account_for_memory
from coreheap.accounting.mapping_table import labelled_pieces
from coreheap.corefile.residency import kernels_holes
from coreheap.evidence import Confidence, Strength
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.report import Report
from tests.real_cores import cases, cores
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.truth import Truth, load_truth

CASES = (
    "threads_kept",
    "threads_kept@filter_all",
    "threads_kept@filter_no_files",
    "threads_kept@filter_anonymous",
    "threads_kept@segv",
    "threads_gone",
    "one_arena",
    "static_exe",
    "static_pie",
    "non_pie",
    "fork_child_grows",
    "many_sub_heaps",
    "every_list",
    "foreign_sbrk",
    "mmapped",
    "bloat",
    "retained_small",
    "namespaces",
)
KERNEL_NAMES = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")
HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+) *(.*)$")
OF_ARENAS = (MappingKind.MAIN_ARENA, MappingKind.ARENA_HEAP, MappingKind.ARENA_RESERVE)
IN_THE_BREAK = (*OF_ARENAS, MappingKind.UNEXPLAINED, MappingKind.FOREIGN_SBRK)
BREAK_CASES = tuple(
    name for name, case in (*cases.CASES.items(), *cases.MATRIX.items()) if case.program == "main_arena"
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """One mapping of /proc/PID/smaps; ``resident_bytes`` are Rss and Swap."""

    start: int
    end: int
    permissions: str
    inode: int
    name: str
    resident_bytes: int

    @property
    def is_private_anonymous(self) -> bool:
        return self.inode == 0 and self.permissions[3] == "p" and self.name not in KERNEL_NAMES


def mappings_of(truth: Truth) -> list[Mapping]:
    """The mappings of the process as it wrote them down when all was in place."""
    found: list[Mapping] = []
    resident: dict[int, int] = {}
    for line in truth.smaps.splitlines():
        header = HEADER.match(line)
        if header:
            start, end, permissions, inode, name = header.groups()
            found.append(Mapping(int(start, 16), int(end, 16), permissions, int(inode), name, 0))
        elif line.startswith(("Rss:", "Swap:")):
            resident[found[-1].start] = resident.get(found[-1].start, 0) + int(line.split()[1]) * 1024
    return [
        Mapping(one.start, one.end, one.permissions, one.inode, one.name, resident.get(one.start, 0)) for one in found
    ]


def resident_bounds(core: coreheap.Core, mappings: list[Mapping]) -> tuple[ResidencyBasis, list[tuple[int, int]]]:
    """At least and at most how many bytes of each mapping were in memory; a mapping is whole pieces when nobody claims."""
    pieces = labelled_pieces(core, Claims())
    first = np.searchsorted(pieces.pieces.start, np.array([one.start for one in mappings], np.uint64))
    last = np.searchsorted(pieces.pieces.start, np.array([one.end for one in mappings], np.uint64))
    sums = [np.concatenate(([0], np.cumsum(column))) for column in (pieces.resident_low, pieces.resident_high)]
    low, high = ((column[last] - column[first]).astype(int).tolist() for column in sums)
    return pieces.basis, list(zip(low, high, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_pages_that_were_in_memory_are_those_of_smaps(case: str) -> None:
    """Page for page, for every private anonymous mapping; the dump itself adds no page to these."""
    paths = core_or_skip(case)
    mappings = mappings_of(load_truth(paths.truth))
    private = [one for one in mappings if one.is_private_anonymous]
    assert len(private) > 3
    with coreheap.open(paths.core) as core:
        basis, bounds = resident_bounds(core, private)
        _, of_others = resident_bounds(core, mappings)
    assert basis is ResidencyBasis.HOLES
    exact = [low for low, high in bounds if low == high]
    # Bounds are left to memory that nobody ever wrote to, which the kernel does not save.
    unsure = [one for one, (low, high) in zip(private, bounds, strict=True) if low != high]
    assert len(exact) + len(unsure) == len(private)
    assert [one for one in unsure if one.resident_bytes] == []
    told = {one.start: low for one, (low, high) in zip(private, bounds, strict=True) if low == high}
    assert told == {one.start: one.resident_bytes for one in private if one.start in told}
    for one, (low, high) in zip(mappings, of_others, strict=True):
        assert low <= one.resident_bytes <= high or one.name in KERNEL_NAMES, one


def copied_in_blocks(source: Path, target: Path, block: int) -> None:
    """What ``cp --sparse=always`` does where st_blksize is ``block``: it keeps holes, and makes more of blocks of zeros."""
    with source.open("rb") as reading, target.open("wb") as writing:
        position = 0
        size = source.stat().st_size
        while position < size:
            try:
                position = os.lseek(reading.fileno(), position, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(reading.fileno(), position, os.SEEK_HOLE)
            for low in range(position, end, block):
                content = os.pread(reading.fileno(), min(block, end - low), low)
                if any(content):
                    os.pwrite(writing.fileno(), content, low)
            position = end
        writing.truncate(size)


@pytest.mark.parametrize("block", [4 << 10, 64 << 10, 1 << 20, 4 << 20])
@pytest.mark.parametrize("case", ["mapped_memory", "threads_kept", "retained_small"])
def test_a_copy_in_blocks_is_never_taken_for_exact(case: str, block: int, tmp_path: Path) -> None:
    paths = core_or_skip(case)
    private = [one for one in mappings_of(load_truth(paths.truth)) if one.is_private_anonymous]
    copy = tmp_path / "core"
    copied_in_blocks(paths.core, copy, block)
    with coreheap.open(copy) as core:
        basis, bounds = resident_bounds(core, private)
        if basis is ResidencyBasis.HOLES:
            # Larger blocks than the shortest hole of the original leave zeros that another tool would not: not told from the kernel's
            # own work, and so not said to be.
            assert block > core.page_bytes
            assert labelled_pieces(core, Claims()).residency_confidence is Confidence.PLAUSIBLE
            return
    assert basis is ResidencyBasis.ZERO_PAGES
    for one, (low, high) in zip(private, bounds, strict=True):
        assert low <= one.resident_bytes <= high, one


def test_zeros_between_holes_prove_the_kernels_holes() -> None:
    """The program wrote zeros to some pages far apart: such pages are in no copy that makes holes of zeros."""
    paths = core_or_skip("mapped_memory")
    with coreheap.open(paths.core) as core:
        assert kernels_holes(core.memory) is Strength.PROOF
        pieces = labelled_pieces(core, Claims())
        assert (pieces.basis, pieces.residency_confidence) == (ResidencyBasis.HOLES, Confidence.CERTAIN)


@pytest.mark.parametrize("case", ["threads_kept", "mmapped"])
def test_after_compression_there_are_bounds(case: str, tmp_path: Path) -> None:
    paths = core_or_skip(case)
    private = [one for one in mappings_of(load_truth(paths.truth)) if one.is_private_anonymous]
    packed = tmp_path / "core.gz"
    packed.write_bytes(gzip.compress(paths.core.read_bytes(), 1))
    with coreheap.open(paths.core) as core:
        _, exact = resident_bounds(core, private)
    with coreheap.open(packed) as core:
        basis, bounds = resident_bounds(core, private)
    assert basis is ResidencyBasis.ZERO_PAGES
    for one, (low, high), (known, _) in zip(private, bounds, exact, strict=True):
        assert low <= one.resident_bytes <= high, one
        assert low <= known <= high
    assert sum(low for low, _ in bounds) > 0


def test_what_gdb_wrote_gives_bounds() -> None:
    paths = core_or_skip("threads_kept@gcore")
    private = [one for one in mappings_of(load_truth(paths.truth)) if one.is_private_anonymous]
    with coreheap.open(paths.core) as core:
        # The process went on to the abort between gdb's core and the dump: no page less was there when gdb looked.
        basis, bounds = resident_bounds(core, private)
    assert basis is ResidencyBasis.ZERO_PAGES
    assert sum(low for low, _ in bounds) > 0
    assert all(low <= one.resident_bytes <= high for one, (low, high) in zip(private, bounds, strict=True))


GDBS = ("threads_kept@gcore", "stacks@gcore", "split_lost@gcore")


@pytest.mark.parametrize("case", GDBS)
def test_rights_that_gdb_leaves_out_are_those_of_the_program_headers(case: str) -> None:
    """gdb writes no program header for text and read-only data of files."""
    paths = core_or_skip(case)
    told = 0
    with coreheap.open(paths.core) as core:
        _ = core.modules
        for one in mappings_of(load_truth(paths.truth)):
            region = core.memory.region_index(one.start)
            is_left_out = region is not None and int(core.memory.region_segment[region]) < 0
            if region is not None and is_left_out and any(m.start <= one.start < m.end for m in core.modules):
                asked = sum(bit for name, bit in (("r", 4), ("w", 2), ("x", 1)) if name in one.permissions)
                assert (int(core.memory.region_flags[region]), one) == (asked, one)
                told += 1
    assert told >= 2


def table_and_truth(case: str) -> tuple[MappingTable, Report, Truth]:
    paths = core_or_skip(case)
    with coreheap.open(paths.core) as core:
        report = coreheap.analyze(core, coreheap.AnalysisOptions(leaks=False))
        again = account_for_memory(core, report.heap)
    assert report.mappings is not None
    assert again.ledger == report.ledger
    assert report.defects == ()
    return report.mappings, report, load_truth(paths.truth)


def bytes_within(table: MappingTable, one: Mapping, *kinds: MappingKind) -> int:
    """Bytes of some kinds in a mapping."""
    rows = np.isin(table.kind, [KINDS.index(kind) for kind in kinds])
    low = np.maximum(table.start[rows].astype(object), one.start)
    high = np.minimum(table.end[rows].astype(object), one.end)
    return int(sum(max(int(b) - int(a), 0) for a, b in zip(low, high, strict=True)))


@pytest.mark.parametrize("case", CASES)
def test_sums_are_those_of_maps_to_the_byte(case: str) -> None:
    """The kernel has a program header for every mapping, also for those that it does not save (vvar, vsyscall)."""
    table, report, truth = table_and_truth(case)
    mappings = mappings_of(truth)
    whole = sum(one.end - one.start for one in mappings)
    assert int((table.end - table.start).sum()) == report.ledger.bytes == whole
    assert bool((table.start[1:] >= table.end[:-1]).all())
    for number in ("committed_bytes", "saved_bytes", "resident_low", "resident_high"):
        assert getattr(report.ledger, number) == int(getattr(table, number).sum())
    assert report.ledger.saved_bytes == report.core.saved_bytes
    readable = sum(one.end - one.start for one in mappings if one.permissions[:3] != "---")
    assert report.ledger.committed_bytes == readable


@pytest.mark.parametrize("case", ["threads_kept", "threads_gone", "static_pie", "non_pie", "bloat", "namespaces"])
def test_kinds_are_what_the_kernel_calls_them(case: str) -> None:
    table, report, truth = table_and_truth(case)
    mappings = mappings_of(truth)
    of_kernel = [one for one in mappings if one.name in KERNEL_NAMES]
    assert table.bytes_of(MappingKind.KERNEL_PAGES) == sum(one.end - one.start for one in of_kernel)
    (stack,) = (one for one in mappings if one.name == "[stack]")
    assert bytes_within(table, stack, MappingKind.MAIN_STACK) == stack.end - stack.start
    assert table.bytes_of(MappingKind.MAIN_STACK) == stack.end - stack.start
    for one in mappings:
        size = one.end - one.start
        if one.name == "[heap]":
            # What the dynamic linker took with brk before malloc began is not malloc's.
            assert size - 0x2000 <= bytes_within(table, one, *IN_THE_BREAK) <= size
            assert bytes_within(table, one, *OF_ARENAS) > 0.9 * size
        if one.inode and one.permissions.startswith("r-x"):
            assert bytes_within(table, one, MappingKind.MODULE_TEXT) == size, one
            row = int(np.searchsorted(table.start, np.uint64(one.start), side="right")) - 1
            assert table.names[int(table.name[row])] == one.name
        if one.inode and one.permissions.startswith("rw-p"):
            assert bytes_within(table, one, MappingKind.MODULE_DATA) == size, one
    assert report.heap is not None
    reserve = sum(
        sub_heap.reserved_bytes - sub_heap.committed_bytes
        for arena in report.heap.arenas
        for sub_heap in arena.sub_heaps
    )
    assert table.bytes_of(MappingKind.ARENA_RESERVE) == reserve
    live = {thread.index for thread in report.threads}
    stacks = np.isin(table.kind, [KINDS.index(MappingKind.THREAD_STACK), KINDS.index(MappingKind.MAIN_STACK)])
    assert set(table.thread[stacks].tolist()) >= live


def test_what_lies_beside_is_not_taken_along() -> None:
    """A mapping behind a module's bss, a signal stack in bss, a coroutine in a large mapping: each is what it is, to the byte."""
    table, report, truth = table_and_truth("neighbours")
    mappings = {name: Mapping(*noted(truth, name), "rw-p", 0, "", 0) for name in ("foreign", "array", "pool")}
    array, foreign, pool = mappings["array"], mappings["foreign"], mappings["pool"]
    # The kernel has one mapping of the bss and what is mapped behind it.
    assert any(one.start <= array.start and foreign.end <= one.end for one in mappings_of(truth))
    start, end = noted(truth, "signal_stack")
    rows = table.kind == KINDS.index(MappingKind.SIGNAL_STACK)
    assert list(zip(table.start[rows].tolist(), table.end[rows].tolist(), strict=True)) == [(start, end)]
    assert bytes_within(table, array, MappingKind.MODULE_BSS) == array.end - array.start
    row = int(np.searchsorted(table.start, np.uint64(array.start), side="right")) - 1
    assert table.names[int(table.name[row])].endswith("/neighbours")
    assert bytes_within(table, foreign, MappingKind.UNEXPLAINED) == foreign.end - foreign.start
    # Which part of it is the coroutine's stack nothing tells.
    assert bytes_within(table, pool, MappingKind.UNEXPLAINED) == pool.end - pool.start
    assert table.supposed_bytes == {}
    assert all(thread.stack_source in ("descriptor", "initial_stack") for thread in report.threads)
    by_topic = {item.topic: item.bytes for item in report.verdict}
    assert by_topic["not_malloc"] >= foreign.end - foreign.start + pool.end - pool.start
    assert by_topic["thread_stacks"] < 64 << 20


@pytest.mark.parametrize("case", BREAK_CASES)
def test_what_others_took_from_the_break(case: str) -> None:
    """Between malloc's pieces, before and after them: each byte is theirs, with the pages that were in memory."""
    table, report, truth = table_and_truth(case)
    areas = sorted((int(line.split()[0], 16), int(line.split()[1])) for line in truth.notes.get("foreign", ()))
    found = table.kind == KINDS.index(MappingKind.FOREIGN_SBRK)
    items = {item.topic: item for item in report.verdict}
    # An emulator keeps pages of a break that went down: after the arena nothing is said there.
    if not areas or ("around" in case and cores.case_named(case).target.is_emulated):
        assert not found.any()
        assert "foreign_sbrk" not in items
        return
    starts, ends = table.start[found].tolist(), table.end[found].tolist()
    item = items["foreign_sbrk"]
    assert item.bytes == sum(end - start for start, end in zip(starts, ends, strict=True))
    if "around" in case:
        (first,) = (int(line) for line in truth.notes["first"])
        (start, size) = areas[0]
        # malloc's top ends at a page; what lies after the area is less than one.
        assert (starts[-1], ends[-1]) == (start, start + size)
        # The dynamic linker may have taken a little before.
        assert 0 <= ends[0] - starts[0] - first < 0x3000
        assert item.resident_low is None or size <= item.resident_low < size + 0x4000
        assert item.confidence.rank <= Confidence.STRONG.rank
        assert any("place alone" in reason for reason in item.weakened_by)
        # Where libc's file tells the end of the break, only what lies before malloc's part is told by its place.
        assert table.supposed_bytes[MappingKind.FOREIGN_SBRK] in (ends[0] - starts[0], item.bytes)
        assert report.verdict[0] is item
    else:
        # What malloc skips to align its fencepost and its next chunk goes with the area.
        assert report.heap is not None
        arena_end = max(arena.brk_range.end for arena in report.heap.arenas if arena.brk_range is not None)
        seen = [area for area in joined(areas) if area[0] < arena_end or not cores.case_named(case).target.is_emulated]
        for low, high, (start, end) in zip(starts, ends, seen, strict=True):
            assert 0 <= start - low < 16
            assert 0 <= high - end < 16
        assert item.resident_high is None or item.resident_low <= item.resident_high <= item.bytes


def joined(areas: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Start and end of areas of (start, size); those that touch are one."""
    ranges: list[tuple[int, int]] = []
    for start, size in areas:
        if ranges and ranges[-1][1] == start:
            ranges[-1] = ranges[-1][0], start + size
        else:
            ranges.append((start, start + size))
    return ranges


def noted(truth: Truth, name: str) -> tuple[int, int]:
    """Where the program said a mapping of its own is."""
    start, size = truth.note_numbers(name)
    return start, start + size


@pytest.mark.parametrize("case", ["mapped_memory", "mapped_memory@filter_all"])
def test_mappings_that_malloc_knows_nothing_of(case: str) -> None:
    """One in five of 64 pages was written: 13."""
    table, report, truth = table_and_truth(case)
    assert sum(one.end - one.start for one in mappings_of(truth)) == report.ledger.bytes
    page = report.process.page_bytes

    def kind(name: str) -> MappingKind:
        row = int(np.searchsorted(table.start, np.uint64(noted(truth, name)[0]), side="right")) - 1
        return KINDS[int(table.kind[row])]

    for name in ("shared_anonymous", "memory_file", "system_v"):
        assert kind(name) is MappingKind.SHARED_MEMORY
    for name in ("reserve", "closed", "hidden_and_closed"):
        assert kind(name) is MappingKind.NO_ACCESS
    for name in ("written", "zeros", "only_read", "untouched", "given_back", "hidden"):
        assert kind(name) is MappingKind.UNEXPLAINED
    assert kind("file") is MappingKind.MAPPED_FILE

    # The kernel joins neighbours that are alike: claims cut them where the program knows that they end.
    claims = Claims()
    names = (
        "written",
        "zeros",
        "only_read",
        "given_back",
        "closed",
        "hidden",
        "hidden_and_closed",
        "reserve",
        "untouched",
    )
    for name in (*names, "shared_anonymous", "memory_file", "system_v"):
        claims.add(MappingKind.OTHER_ALLOCATOR, *noted(truth, name), name=name)
    with coreheap.open(core_or_skip(case).core) as core:
        pieces = labelled_pieces(core, claims)
        private = [one for one in mappings_of(truth) if one.is_private_anonymous]
        _, bounds = resident_bounds(core, private)
    numbers = {}
    for name in claims.names:
        if name in (*names, "shared_anonymous", "memory_file", "system_v"):
            rows = (pieces.kind == KINDS.index(MappingKind.OTHER_ALLOCATOR)) & (pieces.name == claims.name_number(name))
            columns = (pieces.committed_bytes, pieces.resident_low, pieces.resident_high)
            numbers[name] = tuple(int(column[rows].sum()) // page for column in columns)
    assert numbers == {
        "written": (64, 13, 13),
        "zeros": (64, 13, 13),  # a page that a zero was written to is a page
        "only_read": (64, 0, 0),  # one that was only read is none
        "given_back": (64, 6, 6),
        "closed": (13, 13, 13),
        "hidden": (64, 0, 64),
        "hidden_and_closed": (0, 0, 64),
        "reserve": (0, 0, 1024),
        # Saved, as a whole with its neighbours, or not at all.
        "untouched": numbers["untouched"],
        # The dump reads every page of these in: what it saved says nothing.
        "shared_anonymous": (64, 0, 64),
        "memory_file": (64, 0, 64),
        "system_v": (64, 0, 64),
    }
    assert numbers["untouched"] in ((64, 0, 0), (64, 0, 64))
    for one, (low, high) in zip(private, bounds, strict=True):
        assert low <= one.resident_bytes <= high


def test_what_the_program_shares_or_copied_of_files_is_in_the_verdict() -> None:
    """It wrote to one of two pages of a private mapping of its own file, and mapped 3 x 64 pages of shared memory."""
    _, report, truth = table_and_truth("mapped_memory")
    items = {item.topic: item for item in report.verdict}
    page = report.process.page_bytes
    assert items["written_files"].bytes == noted(truth, "file")[1] - noted(truth, "file")[0] == 2 * page
    assert items["written_files"].whole == "writable_private"
    shared = items["shared_memory"]
    assert (shared.bytes, shared.whole) == (3 * 64 * page, "writable_shared")
    private = [item for item in report.verdict if item.whole == "writable_private"]
    # Each part of the whole once: headers of malloc's own mappings alone are nobody's.
    assert 0 <= private[0].of_bytes - sum(item.bytes for item in private) < page
