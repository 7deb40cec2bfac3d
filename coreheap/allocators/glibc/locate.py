"""Where glibc's arenas may be: every way that needs no knowledge of the release.

Knows: symbols, the headers of sub-heaps at aligned addresses, bins that point to themselves, the arena ring.
Does not decide: ``identify`` scores what is found here and picks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.gathering import columns_at
from coreheap.allocators.glibc.records import (
    BIN_COUNT,
    FREE_LIST_LIMIT,
    HeapInfo,
    Layout,
    heap_info_is_plausible,
)
from coreheap.corefile import AddressSpace, Core
from coreheap.corefile.regions import PROCESS_END, Backing
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength
from coreheap.kernels import (
    ArenaCandidates,
    StopReason,
    chain_reaches,
    find_arena_candidates,
)
from coreheap.quantities import format_address

UInt64s = npt.NDArray[np.uint64]

WRITABLE = 2
PLACES_BEHIND_PROGRAM = 2
"""Writable anonymous mappings behind the program that may be the brk heap: its bss comes first."""

CHUNKS_THAT_PROVE = 16
"""Consistent chunks from the first byte of a mapping on that make it a heap."""

RUNS_TRIED_IN_FULL = 4
"""Of so many runs of empty bins every bin may be the first; each costs 127 looks at a malloc_state."""
SELF_PAIR_RUN = 8
"""Empty bins in a row that make a place worth a look; a heap of any size leaves most of the 63 large bins empty."""

BSS_REACH = 1 << 20
"""Bytes of a module's bss that are looked at: libc's has 0x28c8 to 0xd770 in fifteen Debian libraries."""

SCANNED_WITHOUT_FILES = 1 << 28
"""Bytes that are scanned for other copies of malloc in a core that does not tell which memory is a file's."""

CANDIDATE_LIMIT = 4096
"""Places a scan may hand on. More means a hostile core; the strongest routes do not scan."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A place where an arena may be, and what says so."""

    address: int
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class ArenaRing:
    """The arenas that hang together by ``next``.

    ``main`` is the member that lies in no sub-heap, None where no saved pointer reaches it. ``others`` are in ring
    order. ``is_closed`` is False where a member was not saved or led out of the ring; what lay behind it may be missing.
    """

    main: int | None
    others: tuple[int, ...]
    is_closed: bool

    @property
    def members(self) -> tuple[int, ...]:
        return self.others if self.main is None else (self.main, *self.others)


def mapped_for_data(memory: AddressSpace, addresses: UInt64s) -> npt.NDArray[np.bool_]:
    """For each address whether malloc may have it: it lies in writable memory, saved or not, or in anonymous memory that was saved
    and that nobody may write any more (mprotect); bool[n]."""
    position = np.searchsorted(memory.region_start, addresses, side="right") - 1
    inside: npt.NDArray[np.bool_] = position >= 0
    position = np.maximum(position, 0)
    if len(memory.region_start):
        inside &= addresses < memory.region_end[position]
        is_own = memory.region_is_anonymous[position] & (memory.region_backing[position] == Backing.SAVED)
        inside &= ((memory.region_flags[position] & WRITABLE) != 0) | is_own
    return inside


def sub_heap_headers(core: Core, layout: Layout, heap_max: int) -> tuple[HeapInfo, ...]:
    """Every plausible heap_info at a multiple of ``heap_max`` in saved memory with content that malloc may have, by address.

    The first four fields are alike in all releases (2.12-2.44), so the layout decides nothing here.
    """
    memory = core.memory
    # Not in holes of the file: reading there would fill the page cache, and a reservation of terabytes has many multiples.
    start, end, _ = memory.populated_runs()
    first = (start + np.uint64(heap_max - 1)) & ~np.uint64(heap_max - 1)
    hit = (first < end) & (first >= start)
    first, count = first[hit], (end[hit] - first[hit] + np.uint64(heap_max - 1)) // np.uint64(heap_max)
    before = np.cumsum(count) - count
    row = np.repeat(np.arange(len(first)), count.astype(np.intp))
    multiples = first[row] + (np.arange(len(row), dtype=np.uint64) - before[row]) * np.uint64(heap_max)
    multiples = multiples[mapped_for_data(memory, multiples)]
    columns, saved = columns_at(memory, multiples, layout.heap_info, ("ar_ptr", "prev", "size", "mprotect_size"))
    owner, _, size, _ = columns
    may_be = saved & (owner[:, 0] != 0) & (size[:, 0] != 0) & (size[:, 0] <= np.uint64(heap_max))
    headers: list[HeapInfo] = []
    fields = [multiples[may_be], *(column[may_be, 0] for column in columns)]
    for numbers in zip(*(field.tolist() for field in fields), strict=True):
        info = HeapInfo(*numbers)
        if heap_info_is_plausible(info, heap_max, core.page_bytes):
            headers.append(info)
        if len(headers) > FREE_LIST_LIMIT:
            break
    return tuple(headers)


def ring_from(
    memory: AddressSpace,
    start: int,
    layout: Layout,
    heap_max: int,
    may_be_arena: Callable[[int], bool] = lambda address: True,
) -> ArenaRing:
    """The ring of arenas by ``next`` from one member; main is the one that does not lie right behind a heap_info.

    ``may_be_arena`` is asked of members that could be main: a damaged ``next`` may lead anywhere, and ends the ring.

    New arenas are linked in behind main_arena, so the ring is main, newest, ..., oldest (arena.c, all releases).
    """
    members: list[int] = []
    seen: set[int] = set()
    address, is_closed = start, False
    next_offset = layout.state.offset("next")
    while len(members) < FREE_LIST_LIMIT:
        if address in seen:
            is_closed = address == start
            break
        if address % heap_max != layout.heap_info_bytes and not may_be_arena(address):
            break
        try:
            following = memory.read_word(address + next_offset)
        except MemoryFault:
            # A member that was not saved still has an address; what comes behind it is unknown.
            if members and memory.region_index(address) is not None:
                members.append(address)
            break
        members.append(address)
        seen.add(address)
        address = following
    # A sub-heap's own arena lies right behind heap_info at a multiple of heap_max (arena.c, _int_new_arena).
    outside = [member for member in members if member % heap_max != layout.heap_info_bytes]
    main = outside[0] if len(outside) == 1 else (start if start in outside else None)
    if main is None:
        return ArenaRing(None, tuple(members), False)
    position = members.index(main)
    others = (*members[position + 1 :], *members[:position])
    return ArenaRing(main, others, is_closed)


def next_arenas(memory: AddressSpace, start: int, layout: Layout, count: int) -> list[int]:
    """So many places along ``next`` from an arena on, itself included; fewer where a word is not in the core."""
    places, offset = [start], layout.state.offset("next")
    while len(places) < count:
        try:
            places.append(memory.read_word(places[-1] + offset))
        except MemoryFault:
            break
    return places


def _scan_order(core: Core) -> list[tuple[int, int]]:
    """Saved writable ranges, those of mapped files (libc's .data) first, then by size."""
    memory = core.memory
    writable = np.flatnonzero((memory.region_flags & WRITABLE) != 0)
    size = memory.region_end[writable] - memory.region_start[writable]
    order = np.lexsort((size, memory.region_file_index[writable] < 0))
    chosen = writable[order]
    return list(zip(memory.region_start[chosen].tolist(), memory.region_end[chosen].tolist(), strict=True))


def scan(core: Core, layouts: Iterable[Layout]) -> Iterator[ArenaCandidates]:
    """Scan writable memory for arenas, most likely places first; the caller stops when it is content.

    A lone main_arena's ``next`` points to its own start: the distance is offsetof(malloc_state, next). An empty bin's
    two words both point 2 * SIZE_SZ before themselves.
    """
    return _scan_ranges(core, layouts, _scan_order(core))


def scan_module_data(core: Core, layout: Layout, excluded: list[tuple[int, int]]) -> Iterator[ArenaCandidates]:
    """As ``scan``, only where libraries and programs have their globals: a main_arena is one.

    A core that does not tell files has these anywhere: all of its writable memory is looked at but the ``excluded`` ranges,
    the smallest mappings first, SCANNED_WITHOUT_FILES bytes at most.
    """
    memory = core.memory
    writable = (memory.region_flags & WRITABLE) != 0
    is_file = memory.region_file_index >= 0
    if not is_file.any():
        return _scan_ranges(core, [layout], _smallest_first(anonymous_ranges(core, excluded)))
    follows = np.zeros(len(writable), bool)
    # A module's bss is the anonymous memory that directly follows its data (main_arena's place up to 2.14).
    follows[1:] = ~is_file[1:] & (is_file & writable)[:-1] & (memory.region_start[1:] == memory.region_end[:-1])
    chosen = np.flatnonzero(writable & (is_file | follows))
    starts = memory.region_start[chosen]
    ends = np.where(is_file[chosen], memory.region_end[chosen], starts + np.uint64(BSS_REACH))
    ends = np.minimum(ends, memory.region_end[chosen])
    return _scan_ranges(core, [layout], list(zip(starts.tolist(), ends.tolist(), strict=True)))


def _smallest_first(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    chosen, total = [], 0
    for start, end in sorted(ranges, key=lambda place: place[1] - place[0]):
        total += end - start
        if total > SCANNED_WITHOUT_FILES:
            break
        chosen.append((start, end))
    return chosen


def _scan_ranges(core: Core, layouts: Iterable[Layout], ranges: list[tuple[int, int]]) -> Iterator[ArenaCandidates]:
    deltas = np.array(sorted({layout.state.offset("next") for layout in layouts}), dtype=np.uint64)
    for start, end in ranges:
        # Holes of the file are zeros, and zero points to nothing.
        for data_start, data_end in core.memory.populated_extents(start, end):
            run_start, run_end = _whole_pairs(core, data_start, data_end)
            hits = find_arena_candidates(
                core.memory.view(run_start, run_end),
                run_start,
                core.word_bytes,
                deltas,
                capacity=CANDIDATE_LIMIT,
            )
            if len(hits.self_pairs) or len(hits.next_hits):
                yield hits


def _whole_pairs(core: Core, start: int, end: int) -> tuple[int, int]:
    """The range without pairs of words that its borders cut: gdb's segments lie at any offset, so its holes at any address."""
    pair = 2 * core.word_bytes
    low, high = start - start % pair, end + -end % pair
    return (low, high) if core.memory.is_saved(low, high) else (start, end)


def arenas_of_next_hits(core: Core, hits: ArenaCandidates, layout: Layout) -> Iterator[Sighting]:
    """Arenas whose ``next`` leads to themselves: a main_arena that is alone in its ring."""
    memory = core.memory
    offset = layout.state.offset("next")
    for place in hits.next_hits.tolist():
        try:
            value = memory.read_word(place)
        except MemoryFault:
            continue
        if place - value == offset:
            yield Sighting(
                value,
                Evidence(
                    "a word at offset of next points to its own structure: an arena alone in its ring",
                    "scan of writable memory",
                    Strength.HINT,
                    place,
                ),
            )


def arenas_of_empty_bins(core: Core, hits: ArenaCandidates, layout: Layout) -> Iterator[Sighting]:
    """Arenas around runs of empty bins, for rings whose other members are not in the core.

    Bin 127 is never used, so a run normally ends with it; only around the longest runs every other place is tried.
    """
    bin_bytes = 2 * core.word_bytes
    runs = _runs_of_pairs(hits.self_pairs, bin_bytes)
    longest = set(sorted(runs, key=lambda run: run[0] - run[1])[:RUNS_TRIED_IN_FULL])
    for run in runs:
        first, end = run
        numbers = [BIN_COUNT + 1 - (end - first) // bin_bytes]
        if run in longest:
            numbers += range(1, BIN_COUNT + 1)
        for number in dict.fromkeys(numbers):
            address = first - layout.state.offset("bins") - bin_bytes * (number - 1)
            yield Sighting(
                address,
                Evidence(
                    "a run of empty bins, each pointing to itself",
                    "scan of writable memory",
                    Strength.SOLID,
                    first,
                ),
            )


def _runs_of_pairs(pairs: UInt64s, step: int) -> list[tuple[int, int]]:
    """Start and end of each run of at least SELF_PAIR_RUN pairs that follow each other directly."""
    if not len(pairs):
        return []
    breaks = np.flatnonzero(np.diff(pairs) != step) + 1
    edges = np.concatenate(([0], breaks, [len(pairs)]))
    firsts = edges[:-1][np.diff(edges) >= SELF_PAIR_RUN]
    lasts = edges[1:][np.diff(edges) >= SELF_PAIR_RUN] - 1
    return [(int(pairs[first]), int(pairs[last]) + step) for first, last in zip(firsts, lasts, strict=True)]


def joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs that touch, as one."""
    result: list[tuple[int, int]] = []
    for start, end in runs:
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


def heap_behind_program(core: Core, layout: Layout) -> list[tuple[int, int]]:
    """The brk heap when main_arena is not in the core: behind the program, chunks from its first byte to its last.

    A chain that the file's end cuts off counts as well, when it is long enough not to be chance.
    """
    program = core.main_module
    if program is None:
        return []
    starts, ends = anonymous_mappings(core.memory)
    behind = np.flatnonzero(starts >= np.uint64(program.end))[:PLACES_BEHIND_PROGRAM]
    places = [
        (place, place_end)
        for place, own_end in zip(starts[behind].tolist(), ends[behind].tolist(), strict=True)
        for place_end in dict.fromkeys((own_end, mapping_end(core.memory, place)))
    ]
    for start, end in places:
        runs = joined(core.memory.saved_runs_within(start, end))
        base = layout.aligned_header(start)
        if not runs or runs[0][0] != start or runs[0][1] <= base:
            continue
        chain = chain_reaches(
            core.memory.view(base, runs[0][1]),
            layout.geometry,
            0,
            -1,
            1 << 62,
            region_bytes=end - base,
        )
        reaches_end = chain.stop_reason in (StopReason.END, StopReason.CUT)
        if chain.stop_reason is StopReason.BROKEN:
            # With 4-byte words and 16-byte alignment top's size is no chunk's; it reaches to the end all the same.
            header = base + chain.end_offset
            size_at = header + core.word_bytes
            reaches_end = core.memory.is_saved(size_at, size_at + core.word_bytes) and (
                core.memory.read_word(size_at) & ~7 == end - header
            )
        if reaches_end and chain.chunk_count >= CHUNKS_THAT_PROVE:
            return [(base, end)]
    return []


def anonymous_memory(memory: AddressSpace) -> tuple[UInt64s, UInt64s]:
    """Starts and ends of the stretches of anonymous memory that a program wrote or may write, by address.

    What touches is one: the kernel makes a mapping of its own wherever protection, advice, a lock or a name differ, and joins
    what is alike, whoever asked for it (mm/vma.c, vma_merge). So a border of a mapping is no border of what malloc asked for, and
    a page that nobody may write (any more) is malloc's all the same where its content was saved.
    """
    return _joined_rows(memory, lambda start, end, segment: start[1:] != end[:-1])


def anonymous_mappings(memory: AddressSpace) -> tuple[UInt64s, UInt64s]:
    """As ``anonymous_memory``, cut at the borders of the kernel's mappings; saved and missing parts of one are one."""
    return _joined_rows(memory, lambda start, end, segment: (start[1:] != end[:-1]) | (segment[1:] != segment[:-1]))


def _joined_rows(
    memory: AddressSpace, separates: Callable[[UInt64s, UInt64s, npt.NDArray[np.int32]], npt.NDArray[np.bool_]]
) -> tuple[UInt64s, UInt64s]:
    has_content = ((memory.region_flags & WRITABLE) != 0) | (memory.region_backing == Backing.SAVED)
    chosen = np.flatnonzero(has_content & memory.region_is_anonymous & (memory.region_end <= np.uint64(PROCESS_END)))
    start, end = memory.region_start[chosen], memory.region_end[chosen]
    if not len(chosen):
        return start, end
    begins = np.ones(len(chosen), bool)
    begins[1:] = separates(start, end, memory.region_segment[chosen])
    first = np.flatnonzero(begins)
    return start[first], end[np.append(first[1:], len(start)) - 1]


def windows_within(memory: AddressSpace, start: int, end: int) -> list[tuple[int, int]]:
    """The parts of [start, end) that show a file or shared memory: mapped over what was there (MAP_FIXED)."""
    first, last = (
        np.searchsorted(memory.region_end, np.uint64(start), side="right"),
        np.searchsorted(memory.region_start, np.uint64(end)),
    )
    rows = slice(int(first), int(last))
    shows = ~memory.region_is_anonymous[rows]
    low, high = memory.region_start[rows][shows], memory.region_end[rows][shows]
    return joined([(max(a, start), min(b, end)) for a, b in zip(low.tolist(), high.tolist(), strict=True)])


def mapping_end(memory: AddressSpace, address: int) -> int:
    """Where anonymous memory without a gap ends, from an address on; the address itself where it is in none."""
    starts, ends = anonymous_memory(memory)
    if not 0 <= address < 1 << 64:
        return address
    row = int(np.searchsorted(starts, np.uint64(address), side="right")) - 1
    return max(address, int(ends[row])) if row >= 0 else address


def mappings_up_to(memory: AddressSpace, address: int) -> list[int]:
    """Starts of the mappings of the stretch of anonymous memory that holds an address, up to it; empty where none does."""
    if not 0 <= address < 1 << 64:
        return []
    starts, ends = anonymous_memory(memory)
    row = int(np.searchsorted(starts, np.uint64(address), side="right")) - 1
    if row < 0 or address >= int(ends[row]):
        return []
    all_starts = anonymous_mappings(memory)[0]
    return list(map(int, all_starts[(all_starts >= starts[row]) & (all_starts <= np.uint64(address))]))


def anonymous_ranges(core: Core, excluded: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Stretches of anonymous memory less the excluded ranges, by address."""
    starts, ends = (column.tolist() for column in anonymous_memory(core.memory))
    cuts = sorted(excluded)
    result: list[tuple[int, int]] = []
    position = 0
    for start, end in zip(starts, ends, strict=True):
        while position and position < len(cuts) and cuts[position - 1][1] > start:
            position -= 1
        while position < len(cuts) and cuts[position][1] <= start:
            position += 1
        at, scan = start, position
        while scan < len(cuts) and cuts[scan][0] < end:
            if cuts[scan][0] > at:
                result.append((at, cuts[scan][0]))
            at = max(at, cuts[scan][1])
            scan += 1
        if at < end:
            result.append((at, end))
    return result


def describe_ring(ring: ArenaRing) -> Evidence:
    """The ring as a fact: closed rings are solid, open ones speak against completeness."""
    if ring.is_closed:
        return Evidence(
            f"next pointers close a ring; arenas in it: {len(ring.members)}",
            "arena ring",
            Strength.SOLID,
            ring.main,
        )
    place = format_address(ring.members[-1]) if ring.members else "its start"
    return Evidence(
        f"the arena ring does not close behind {place}",
        "arena ring",
        Strength.HINT,
        ring.main,
        speaks_against=True,
    )
