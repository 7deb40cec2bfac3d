"""From verdicts to suspects: chunks of one verdict, size class and type as one group.

Knows: how groups are formed and what is said of each. Does not know: findings, or how a group is shown.

Everything is arithmetic on columns; Python sees groups, never chunks.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coreheap.heap import NO_INDEX, ChunkTable
from coreheap.kernels import chunk_extents, chunk_sizes, count_by_verdict
from coreheap.leaks import VERDICTS, ChunkTypes, Heuristic, LeakGroup, LeakReport, Verdict, VerdictTotal
from coreheap.references.bits import BATCH_CHUNKS
from coreheap.references.followed import size_classes
from coreheap.references.graph import ReferenceGraph
from coreheap.references.naming import Namer

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]
UInt32s = npt.NDArray[np.uint32]

GROUPS_REPORTED = 100
SAMPLES = 5
ARENAS_PER_GROUP = 4


def summarise_leaks(graph: ReferenceGraph, types: ChunkTypes | None = None) -> LeakReport:
    """Totals by verdict, and the suspects, the largest first."""
    granules = chunk_sizes(graph.index)
    found = sorted(_Suspects(graph, granules, types).groups, key=_rank)
    leaders = [group for group in found if group.is_of_leaders]
    by_heuristic: dict[Heuristic, list[_Group]] = defaultdict(list)
    for group in found:
        by_heuristic[group.heuristic].append(group)
    inside = None if graph.inside is None else graph.inside[graph.verdict[graph.inside] == Verdict.POSSIBLY_LOST]
    return LeakReport(
        totals=_totals(graph, granules),
        groups=_groups(graph, found[:GROUPS_REPORTED], types),
        group_count=len(found),
        roots=graph.summaries,
        edge_count=graph.edge_count,
        missing_root_bytes=graph.missing_root_bytes,
        missing_shared_bytes=graph.missing_shared_bytes,
        unreachable=_sum_of(leaders),
        unreachable_possible=_sum_of(
            group for group in leaders if group.verdict is Verdict.POSSIBLY_LOST and not group.heuristic.is_encoding
        ),
        held_inside=None
        if inside is None
        else VerdictTotal(len(inside), int(usable_bytes(graph.heap.chunks, inside.astype(np.int64), granules).sum())),
        heuristics=tuple(
            sorted(
                ((name, _sum_of(groups)) for name, groups in by_heuristic.items() if name is not Heuristic.NONE),
                key=lambda row: (-row[1].usable_bytes, row[0]),
            )
        ),
    )


def _sum_of(groups: Iterable[_Group]) -> VerdictTotal:
    """All chunks of some groups, with what leaders lead to."""
    parts = [(group.count + group.indirect_count, group.bytes + group.indirect_bytes) for group in groups]
    return VerdictTotal(sum(count for count, _ in parts), sum(byte_count for _, byte_count in parts))


def _totals(graph: ReferenceGraph, granules: UInt32s) -> dict[Verdict, VerdictTotal]:
    index, table = graph.index, graph.heap.chunks
    alignment, border = index.geometry.alignment, index.region_chunks
    totals: dict[Verdict, VerdictTotal] = {verdict: VerdictTotal() for verdict in VERDICTS}
    for rows, overhead in ((slice(0, border), table.word_bytes), (slice(border, None), table.mmapped_overhead_bytes)):
        counts, sums = count_by_verdict(graph.verdict[rows], index.state[rows], granules[rows])
        for verdict in VERDICTS:
            count = int(counts[verdict].sum())
            usable = int(sums[verdict].sum()) * alignment - count * overhead
            before = totals[verdict]
            totals[verdict] = VerdictTotal(before.count + count, before.usable_bytes + usable)
    return totals


@dataclass(slots=True)
class _Group:
    """A group while it is counted. ``key``: verdict, whether it is of leaders, size class, heuristic, type code."""

    key: tuple[int, int, int, int, int]
    count: int = 0
    bytes: int = 0
    smallest: int = 1 << 62
    largest: int = 0
    indirect_count: int = 0
    indirect_bytes: int = 0
    samples: list[int] = field(default_factory=list)
    arenas: Counter[int] = field(default_factory=Counter)

    @property
    def verdict(self) -> Verdict:
        return Verdict(self.key[0])

    @property
    def is_of_leaders(self) -> bool:
        return bool(self.key[1])

    @property
    def heuristic(self) -> Heuristic:
        return Heuristic(self.key[3])


class _Suspects:
    """Groups of the chunks of interest: leaders of the lost, what is possibly lost or weakly held, and what is reachable by a
    heuristic.

    Indirectly lost chunks count with their leaders; what is reachable otherwise is no suspect. Chunks are looked at a batch at a time.
    """

    def __init__(self, graph: ReferenceGraph, granules: UInt32s, types: ChunkTypes | None) -> None:
        self.groups: list[_Group] = []
        self._numbers: dict[int, int] = {}
        self._graph = graph
        self._table = graph.heap.chunks
        self._granules = granules
        self._types = types
        self._arena_of_region = np.array([*(region.arena for region in self._table.regions), NO_INDEX], np.int64)
        self._group_of_leader = np.zeros(len(graph.lost.leader), np.int32)
        for first in range(0, graph.index.chunk_count, BATCH_CHUNKS):
            self._add_batch(first, min(first + BATCH_CHUNKS, graph.index.chunk_count))
        if len(graph.lost.leader):
            for first in range(0, graph.index.chunk_count, BATCH_CHUNKS):
                self._add_led(first, min(first + BATCH_CHUNKS, graph.index.chunk_count))

    def _add_batch(self, first: int, end: int) -> None:
        lost = self._graph.lost
        low, high = np.searchsorted(lost.leader, np.array([first, end], np.uint32)).tolist()
        leaders = lost.leader[low:high].astype(np.int64)
        held = self._held(first, end)
        # What nothing leads to because roots are missing is possibly lost too, but it counts with its leader.
        held = held[lost.leader_of[held] == 0]
        group = self._add(leaders, is_leader=1)
        self._group_of_leader[low:high] = group
        self._add(held, is_leader=0)

    def _held(self, first: int, end: int) -> Int64s:
        """Chunks of [first, end) that something leads to and that are of interest all the same."""
        verdict = self._graph.verdict[first:end]
        wanted = (verdict == Verdict.POSSIBLY_LOST) | (verdict == Verdict.WEAKLY_HELD)
        if self._graph.heuristic is not None:
            wanted |= (verdict == Verdict.STILL_REACHABLE) & (self._graph.heuristic[first:end] != Heuristic.NONE)
        return np.flatnonzero(wanted) + first

    def _add(self, chunks: Int64s, is_leader: int) -> Int64s:
        """Counts chunks of one batch; the group of each."""
        if not len(chunks):
            return np.empty(0, np.int64)
        usable = usable_bytes(self._table, chunks, self._granules)
        keys, group, counts = np.unique(self._keys(chunks), return_inverse=True, return_counts=True)
        # Stable: the samples of a group are its first chunks. Numbers of few bits are sorted by radix.
        order = np.argsort(group.astype(np.min_scalar_type(len(keys))), kind="stable")
        begins = np.cumsum(counts) - counts
        sums = _sums(group, usable, len(keys))
        smallest = np.full(len(keys), 1 << 62, np.int64)
        largest = np.zeros(len(keys), np.int64)
        np.minimum.at(smallest, group, usable)
        np.maximum.at(largest, group, usable)
        arenas = self._arenas(chunks)
        # One number for a group and an arena (NO_INDEX is -1): bincount is many times faster than unique.
        width = int(self._arena_of_region.max(initial=0)) + 2
        by_pair = np.bincount(group * width + arenas + 1, minlength=len(keys) * width)
        numbers = np.array([self._number(int(value), is_leader) for value in keys.tolist()], np.int64)
        for position, number in enumerate(numbers.tolist()):
            found = self.groups[number]
            found.count += int(counts[position])
            found.bytes += int(sums[position])
            found.smallest = min(found.smallest, int(smallest[position]))
            found.largest = max(found.largest, int(largest[position]))
            wanted = min(SAMPLES - len(found.samples), int(counts[position]))
            found.samples += chunks[order[begins[position] :][:wanted]].tolist()
        for pair in np.flatnonzero(by_pair).tolist():
            position, arena = divmod(pair, width)
            self.groups[int(numbers[position])].arenas[arena - 1] += int(by_pair[pair])
        return numbers[group]

    def _keys(self, chunks: Int64s) -> npt.NDArray[np.unsignedinteger]:
        """What chunks of one group have in common: verdict, size class, heuristic, type code."""
        keys: npt.NDArray[np.unsignedinteger] = (
            self._graph.verdict[chunks].astype(np.uint16) << np.uint16(12)
        ) | size_classes(self._granules[chunks]).astype(np.uint16)
        if self._graph.heuristic is not None:
            keys = keys | (self._graph.heuristic[chunks].astype(np.uint32) << np.uint32(16))
        if self._types is not None:
            keys = keys | (self._types.code[chunks].astype(np.uint64) << np.uint64(20))
        return keys

    def positions(self, first: int, end: int) -> Int32s:
        """The place in ``groups`` of each chunk of [first, end), lost chunks with their leader; -1 for none."""
        lost = self._graph.lost
        leader = lost.leader_of[first:end].astype(np.int64) - 1
        found = np.full(end - first, -1, np.int32)
        led = np.flatnonzero(leader >= 0)
        found[led] = self._group_of_leader[leader[led]]
        held = self._held(first, end)
        held = held[lost.leader_of[held] == 0]
        keys, group = np.unique(self._keys(held), return_inverse=True)
        found[held - first] = np.array([self._number(int(key), 0) for key in keys.tolist()], np.int32)[group]
        return found

    def _number(self, key: int, is_leader: int) -> int:
        whole = key * 2 + is_leader
        if whole not in self._numbers:
            self._numbers[whole] = len(self.groups)
            self.groups.append(_Group((key >> 12 & 0xF, is_leader, key & 0xFFF, key >> 16 & 0xF, key >> 20)))
        return self._numbers[whole]

    def _arenas(self, chunks: Int64s) -> Int64s:
        index = self._table.index
        region = np.searchsorted(index.region_first_chunk, chunks, side="right") - 1
        region[chunks >= index.region_chunks] = -1
        arenas: Int64s = self._arena_of_region[region]
        return arenas

    def _add_led(self, first: int, end: int) -> None:
        lost = self._graph.lost
        led = np.flatnonzero(lost.leader_of[first:end]) + first
        number = lost.leader_of[led].astype(np.int64) - 1
        is_led = lost.leader[number] != led
        led, number = led[is_led], number[is_led]
        if not len(led):
            return
        groups = self._group_of_leader[number].astype(np.int64)
        counts = np.bincount(groups, minlength=len(self.groups))
        sums = _sums(groups, usable_bytes(self._table, led, self._granules), len(self.groups))
        for position in np.flatnonzero(counts).tolist():
            self.groups[position].indirect_count += int(counts[position])
            self.groups[position].indirect_bytes += int(sums[position])


def _groups(graph: ReferenceGraph, found: list[_Group], types: ChunkTypes | None) -> tuple[LeakGroup, ...]:
    """Groups as they are told, numbered in their order."""
    header_bytes = np.uint64(graph.index.geometry.header_bytes)
    # Nothing holds leaders.
    held = [np.array([] if group.is_of_leaders else group.samples, np.int64) for group in found]
    holders = Namer(graph).typical_holders(held)
    groups = []
    for number, group in enumerate(found):
        samples = np.array(group.samples, np.int64)
        header, _ = chunk_extents(graph.index, samples)
        code = group.key[4]
        groups.append(
            LeakGroup(
                number=number,
                verdict=group.verdict,
                type=(types.names[code] or None) if types is not None else None,
                smallest_bytes=group.smallest,
                largest_bytes=group.largest,
                count=group.count,
                usable_bytes=group.bytes,
                indirect_count=group.indirect_count,
                indirect_bytes=group.indirect_bytes,
                arenas=tuple(
                    (None if arena == NO_INDEX else arena, count)
                    for arena, count in group.arenas.most_common(ARENAS_PER_GROUP)
                ),
                samples=tuple((header + header_bytes).tolist()),
                holder=holders[number],
                heuristic=group.heuristic,
            )
        )
    return tuple(groups)


def _rank(group: _Group) -> tuple[int, int, tuple[int, int, int, int, int]]:
    """Sorts groups: the surest verdict first, its largest group first."""
    return (-group.key[0], -(group.bytes + group.indirect_bytes), group.key)


def find_group_numbers(graph: ReferenceGraph, types: ChunkTypes | None = None) -> Callable[[int, int], Int32s]:
    """For chunks [first, end) the number of the group that each counts in, -1 for none: int32[end - first].

    Numbers are those of ``summarise_leaks`` and go on behind the groups that are told in full.
    """
    suspects = _Suspects(graph, chunk_sizes(graph.index), types)
    groups = suspects.groups
    # One number more: -1, which chunks in no group have, leads to it.
    number = np.full(len(groups) + 1, -1, np.int32)
    number[sorted(range(len(groups)), key=lambda position: _rank(groups[position]))] = np.arange(len(groups))

    def numbers(first: int, end: int) -> Int32s:
        found: Int32s = number[suspects.positions(first, end)]
        return found

    return numbers


def usable_bytes(table: ChunkTable, chunks: Int64s, granules: UInt32s) -> Int64s:
    """What malloc_usable_size says for chunks of a heap, int64; ``granules`` of all chunks."""
    overhead = np.where(chunks < table.index.region_chunks, table.word_bytes, table.mmapped_overhead_bytes)
    sizes: Int64s = granules[chunks].astype(np.int64) * table.index.geometry.alignment - overhead
    return sizes


def _sums(group: Int64s, amount: Int64s, groups: int) -> Int64s:
    """Sums by group in whole numbers (bincount's weights are floats, exact up to 2**53)."""
    sums = np.zeros(groups, np.int64)
    low, high = amount & 0xFFFF, amount >> 16
    for part, shift in ((low, 0), (high, 16)):
        sums += np.bincount(group, weights=part, minlength=groups).astype(np.int64) << shift
    return sums
