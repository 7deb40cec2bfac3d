"""What follows from references: marks, leaders, referrers, paths, dominators, sums; against brute force on small graphs."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coreheap.kernels import CHUNK_MASK, INTERIOR, ChunkState, Edges, LostChunks, reference
from tests.heap_builder import MACHINES, Machine
from tests.unit.kernels.support import index_of, random_heap

UInt64s = npt.NDArray[np.uint64]
Rows = Sequence[Sequence[int]]
compare = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
each_width = pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])


def edges_of(rows: Rows, wide: bool = False) -> Edges:
    counts = [0, *map(len, rows)]
    first = np.cumsum(counts, dtype=np.uint64) if wide else np.cumsum(counts, dtype=np.uint32)
    return Edges(first, np.array([target for row in rows for target in row], np.uint32))


def rows_of(edges: Edges) -> list[list[int]]:
    return [edges.of(chunk).tolist() for chunk in range(edges.chunk_count)]


def bits_of(chunks: Iterable[int], count: int) -> UInt64s:
    column = np.zeros((count + 63) // 64 * 64, np.bool_)
    column[list(chunks)] = True
    return np.packbits(column, bitorder="little").view(np.uint64)


def positions(bits: UInt64s) -> list[int]:
    return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little")).tolist()


def numbers(*values: int) -> npt.NDArray[np.uint32]:
    return np.array(values, np.uint32)


def reached(rows: Rows, starts: Iterable[int], *, interior: bool, without: int | None = None) -> set[int]:
    """All that the starts lead to, themselves included; never through ``without``."""
    found = {start for start in starts if start != without}
    waiting = list(found)
    while waiting:
        for target in rows[waiting.pop()]:
            chunk = target & CHUNK_MASK
            if (interior or not target & INTERIOR) and chunk not in found and chunk != without:
                found.add(chunk)
                waiting.append(chunk)
    return found


def random_graph(rng: random.Random) -> list[list[int]]:
    """Small, of any density; some references are interior, some lead to their own chunk or twice to another."""
    count = rng.choice([1, 2, 5, 12, 64, 65, 90])
    density = rng.choice([0.3, 1.0, 1.5, 4.0])
    rows: list[list[int]] = [[] for _ in range(count)]
    for _ in range(int(count * density)):
        rows[rng.randrange(count)].append(rng.randrange(count) | rng.choice([0, 0, 0, INTERIOR]))
    return rows


graphs = given(seed=st.integers(0, 1 << 30), wide=st.booleans())


def list_of(count: int, order: Sequence[int] | None = None) -> Edges:
    """One list through all chunks, in the order given."""
    if order is None:
        first = np.minimum(np.arange(count + 1, dtype=np.uint32), count - 1)
        return Edges(first, np.arange(1, count, dtype=np.uint32))
    rows: list[list[int]] = [[] for _ in range(count)]
    for one, other in itertools.pairwise(order):
        rows[one] = [other]
    return edges_of(rows)


def deep(kernels: ModuleType) -> int:
    """Nodes of a deep graph: as many as the implementation does in a second or so."""
    return 1_000_000 if "compiled" in kernels.__name__ else 20_000


# Marks


@each_width
def test_marks_follow_exact_references(kernels: ModuleType, wide: bool) -> None:
    edges = edges_of([[1, 2 | INTERIOR], [3], [4], [0], [], [0]], wide)
    marked, interior = bits_of([], 6), bits_of([], 6)
    assert kernels.mark_reachable(edges, numbers(0), marked, interior, False) == 3
    assert positions(marked) == [0, 1, 3]
    assert positions(interior) == [2]
    assert kernels.mark_reachable(edges, numbers(2 | INTERIOR, 0, 2), marked, interior, True) == 2
    assert positions(marked) == [0, 1, 2, 3, 4]
    # Not visited again: 5 leads to 0, which was marked.
    assert kernels.mark_reachable(edges, numbers(5), marked, interior, False) == 1
    assert positions(interior) == []


@each_width
def test_what_is_marked_before_is_a_border(kernels: ModuleType, wide: bool) -> None:
    edges = edges_of([[1], [2], []], wide)
    marked = bits_of([1], 3)
    assert kernels.mark_reachable(edges, numbers(0, 1), marked, bits_of([], 3), True) == 1
    assert positions(marked) == [0, 1]


@compare
@graphs
def test_marks_of_random_graphs(compiled: ModuleType, seed: int, wide: bool) -> None:
    rng = random.Random(seed)
    rows = random_graph(rng)
    count = len(rows)
    seeds = [rng.randrange(count) for _ in range(rng.choice([0, 1, 3]))]
    pointed_into = {rng.randrange(count)}
    for follow in (False, True):
        expected = reached(rows, seeds, interior=follow)
        inside = pointed_into | {
            target & CHUNK_MASK for chunk in expected for target in rows[chunk] if target & INTERIOR
        }
        for kernels in (reference, compiled):
            marked, interior = bits_of([], count), bits_of(pointed_into, count)
            arguments = (numbers(*seeds), marked, interior, follow)
            assert kernels.mark_reachable(edges_of(rows, wide), *arguments) == len(expected)
            assert positions(marked) == sorted(expected)
            assert positions(interior) == sorted(pointed_into if follow else inside - expected)


# Leaders


def leaders(found: LostChunks) -> tuple[list[int], list[int]]:
    assert found.leader.dtype == found.leader_of.dtype == np.uint32
    return found.leader.tolist(), found.leader_of.tolist()


@each_width
@pytest.mark.parametrize(
    ("rows", "lost", "leader", "leader_of"),
    [
        ([[1], [2], []], [0, 1, 2], [0], [1, 1, 1]),  # a chain
        ([[], [0], [1]], [0, 1, 2], [2], [1, 1, 1]),  # a chain backwards
        ([[1], [2], [0]], [0, 1, 2], [0], [1, 1, 1]),  # a cycle
        ([[1], [0], [0]], [0, 1, 2], [2], [1, 1, 1]),  # a cycle behind a source that comes later
        ([[1], [0], [3], [2, 1]], [0, 1, 2, 3], [2], [1, 1, 1, 1]),  # a cycle behind a cycle
        ([[2], [2], [3], [2]], [0, 1, 2, 3], [0, 1], [1, 2, 2, 2]),  # two leaders share: the last has them
        ([[1 | INTERIOR], []], [0, 1], [0], [1, 1]),  # interior references lead too
        ([[0], []], [0, 1], [0, 1], [1, 2]),  # oneself is nobody else
        ([[1], [2], []], [0, 2], [0, 2], [1, 0, 2]),  # what is not lost leads nobody
        ([[1], []], [], [], [0, 0]),
        ([], [], [], []),
    ],
)
def test_leaders(
    kernels: ModuleType, rows: Rows, lost: list[int], leader: list[int], leader_of: list[int], wide: bool
) -> None:
    edges = edges_of(rows, wide)
    assert leaders(kernels.find_leaders(edges, bits_of(lost, len(rows)))) == (leader, leader_of)


@compare
@graphs
def test_leaders_of_random_graphs(compiled: ModuleType, seed: int, wide: bool) -> None:
    """One leader for each strongly connected component that no other one leads to: its first chunk."""
    rng = random.Random(seed)
    rows = random_graph(rng)
    count = len(rows)
    share = rng.choice([0.3, 0.9, 1.0])
    lost = {chunk for chunk in range(count) if rng.random() < share}
    among = [[target for target in row if target & CHUNK_MASK in lost] for row in rows]
    led_by = {chunk: reached(among, [chunk], interior=True) for chunk in lost}
    expected = []
    for chunk in sorted(lost):
        leads_here = {other for other in lost if chunk in led_by[other]}
        component = leads_here & led_by[chunk]
        if leads_here == component and chunk == min(component):
            expected.append(chunk)
    owner = [
        max((number for number, leader in enumerate(expected, 1) if chunk in led_by[leader]), default=0)
        if chunk in lost
        else 0
        for chunk in range(count)
    ]
    for kernels in (reference, compiled):
        found = kernels.find_leaders(edges_of(rows, wide), bits_of(lost, count))
        assert leaders(found) == (expected, owner), kernels.__name__
        assert all(number > 0 for chunk, number in enumerate(owner) if chunk in lost)


# Backwards


@each_width
def test_referrers(kernels: ModuleType, wide: bool) -> None:
    edges = edges_of([[2, 1 | INTERIOR, 2], [0], [], [2 | INTERIOR]], wide)
    turned = kernels.reverse_edges(edges)
    assert turned.first.dtype == edges.first.dtype
    assert rows_of(turned) == [[1], [0 | INTERIOR], [0, 0, 3 | INTERIOR], []]
    assert rows_of(kernels.reverse_edges(edges_of([], wide))) == []


@compare
@graphs
def test_referrers_of_random_graphs(compiled: ModuleType, seed: int, wide: bool) -> None:
    rows = random_graph(random.Random(seed))
    expected: list[list[int]] = [[] for _ in rows]
    for source, row in enumerate(rows):
        for target in row:
            expected[target & CHUNK_MASK].append(source | target & INTERIOR)
    for kernels in (reference, compiled):
        assert rows_of(kernels.reverse_edges(edges_of(rows, wide))) == expected


@each_width
def test_shortest_paths(kernels: ModuleType, wide: bool) -> None:
    rows = [[1], [4], [3], [4, 5 | INTERIOR], [5], [], [2 | INTERIOR]]
    referrers = kernels.reverse_edges(edges_of(rows, wide))

    def path(chunk: int, goals: list[int], interior: bool = True) -> list[int]:
        found = kernels.shortest_path(referrers, chunk, bits_of(goals, 7), interior)
        assert found.dtype == np.int64
        chunks: list[int] = found.tolist()
        return chunks

    assert path(5, [5, 0]) == [5]
    assert path(5, [0]) == [0, 1, 4, 5]
    assert path(5, [2]) == [2, 3, 5]
    assert path(5, [2], interior=False) == [2, 3, 4, 5]
    assert path(5, [1, 3]) == [3, 5]
    assert path(5, [6], interior=False) == []
    assert path(0, [5]) == []
    assert path(5, []) == []
    # Both are two steps away: of the referrers the first wins.
    assert path(4, [0, 2]) == [0, 1, 4]
    for chunk in (-1, 7, 1 << 31, 1 << 40):
        with pytest.raises(IndexError, match="there is no chunk"):
            path(chunk, [0])


@compare
@graphs
def test_paths_of_random_graphs(compiled: ModuleType, seed: int, wide: bool) -> None:
    rng = random.Random(seed)
    rows = random_graph(rng)
    count = len(rows)
    goals = {rng.randrange(count) for _ in range(rng.choice([1, 3]))}
    chunk = rng.randrange(count)
    for interior in (False, True):
        distance, ring = 0, set(goals)
        met = set(goals)
        while chunk not in met and ring:
            ring = {target & CHUNK_MASK for one in ring for target in rows[one] if interior or not target & INTERIOR}
            ring -= met
            met |= ring
            distance += 1
        paths = []
        for kernels in (reference, compiled):
            referrers = kernels.reverse_edges(edges_of(rows, wide))
            paths.append(kernels.shortest_path(referrers, chunk, bits_of(goals, count), interior).tolist())
        path = paths[0]
        assert paths[1] == path
        assert len(path) == (distance + 1 if chunk in met else 0)
        if path:
            assert path[0] in goals
            assert path[-1] == chunk
            for one, other in itertools.pairwise(path):
                assert other in rows[one] or (interior and other | INTERIOR in rows[one])


# Dominators


@each_width
def test_dominators(kernels: ModuleType, wide: bool) -> None:
    """A diamond behind one root, shared by a second root's list."""
    rows = [[1, 2], [3], [3], [4 | INTERIOR], [], [6], [4], [0]]
    edges = edges_of(rows, wide)
    tree = kernels.find_dominators(edges, kernels.reverse_edges(edges), numbers(0, 5 | INTERIOR, 0))
    assert tree.chunk.dtype == tree.dominator.dtype == np.uint32
    assert tree.chunk.tolist() == [0, 0, 1, 3, 4, 2, 5, 6]
    assert tree.dominator.tolist() == [0, 0, 1, 1, 0, 1, 0, 6]
    own = np.array([0, 1, 10, 100, 1000, 10000, 100000, 1000000], np.uint64)
    kernels.add_up_retained(tree.dominator, own)
    assert own.tolist() == [1111111, 10111, 10, 100, 1000, 10000, 1100000, 1000000]


@compare
@graphs
def test_dominators_of_random_graphs(compiled: ModuleType, seed: int, wide: bool) -> None:
    """A node dominates those that no path reaches without it; the nearest one is dominated by all others."""
    rng = random.Random(seed)
    rows = random_graph(rng)
    roots = [rng.randrange(len(rows)) for _ in range(rng.choice([0, 1, 3]))]
    everything = reached(rows, roots, interior=True)
    dominated = {chunk: everything - reached(rows, roots, interior=True, without=chunk) for chunk in everything}
    edges = edges_of(rows, wide)
    results = []
    for kernels in (reference, compiled):
        tree = kernels.find_dominators(edges, kernels.reverse_edges(edges), numbers(*roots))
        results.append((tree.chunk.tolist(), tree.dominator.tolist()))
        sizes = np.array([0, *(chunk + 1 for chunk in tree.chunk.tolist()[1:])], np.uint64)
        kernels.add_up_retained(tree.dominator, sizes)
        for chunk, retained in zip(tree.chunk.tolist()[1:], sizes.tolist()[1:], strict=True):
            assert retained == sum(other + 1 for other in dominated[chunk])
        assert int(sizes[0]) == sum(chunk + 1 for chunk in everything)
    assert results[0] == results[1]
    chunks, dominators = results[0]
    assert chunks[0] == dominators[0] == 0
    assert sorted(chunks[1:]) == sorted(everything)
    for node, (chunk, dominator) in enumerate(zip(chunks, dominators, strict=True)):
        above = {other for other in everything if other != chunk and chunk in dominated[other]}
        if node == 0:
            continue
        assert dominator < node
        nearest = {other for other in above if all(other in dominated[one] for one in above)}
        assert nearest == ({chunks[dominator]} if dominator else set())


def test_retained_bytes_need_a_tree(kernels: ModuleType) -> None:
    with pytest.raises(ValueError, match="cannot be dominated"):
        kernels.add_up_retained(numbers(0, 1), np.ones(2, np.uint64))
    with pytest.raises(ValueError, match="cannot be dominated"):
        kernels.add_up_retained(numbers(0, CHUNK_MASK), np.ones(2, np.uint64))
    with pytest.raises(ValueError, match="differ in length"):
        kernels.add_up_retained(numbers(0, 0), np.ones(3, np.uint64))
    nothing = np.ones(0, np.uint64)
    kernels.add_up_retained(numbers(), nothing)


# Deep graphs: nothing recurses


@pytest.mark.parametrize("shape", ["forwards", "backwards", "shuffled"])
def test_long_lists(kernels: ModuleType, shape: str) -> None:
    count = deep(kernels)
    order = list(range(count))
    if shape == "backwards":
        order.reverse()
    elif shape == "shuffled":
        random.Random(1).shuffle(order)
    edges = list_of(count, None if shape == "forwards" else order)
    marked = bits_of([], count)
    assert kernels.mark_reachable(edges, numbers(order[0]), marked, bits_of([], count), False) == count
    everything = bits_of(range(count), count)
    assert marked.tolist() == everything.tolist()
    found = kernels.find_leaders(edges, everything)
    assert found.leader.tolist() == [order[0]]
    assert set(found.leader_of.tolist()) == {1}
    referrers = kernels.reverse_edges(edges)
    path = kernels.shortest_path(referrers, order[-1], bits_of([order[0]], count), False)
    assert path.tolist() == order
    tree = kernels.find_dominators(edges, referrers, numbers(order[0]))
    assert tree.chunk.tolist() == [0, *order]
    assert tree.dominator.tolist() == [0, *range(count)]


def test_long_cycle_and_star(kernels: ModuleType) -> None:
    count = deep(kernels)
    ring = Edges(
        np.arange(count + 1, dtype=np.uint32),
        np.roll(np.arange(count, dtype=np.uint32), -1),
    )
    everything = bits_of(range(count), count)
    assert kernels.find_leaders(ring, everything).leader.tolist() == [0]
    tree = kernels.find_dominators(ring, kernels.reverse_edges(ring), numbers(5))
    assert tree.dominator.tolist() == [0, *range(count)]

    first = np.full(count + 1, count - 1, np.uint32)
    first[0] = 0
    star = Edges(first, np.arange(1, count, dtype=np.uint32))
    assert kernels.mark_reachable(star, numbers(0), bits_of([], count), bits_of([], count), False) == count
    assert kernels.find_leaders(star, everything).leader.tolist() == [0]
    tree = kernels.find_dominators(star, kernels.reverse_edges(star), numbers(0))
    assert tree.dominator.tolist() == [0, 0] + [1] * (count - 1)


def test_deep_dominators_with_shortcuts(kernels: ModuleType) -> None:
    """A list whose every node also refers far ahead and back: paths to the lowest ancestor are long."""
    count = deep(kernels) // 10
    rng = random.Random(3)
    rows = [[number + 1, rng.randrange(number, count), rng.randrange(number + 1)] for number in range(count - 1)] + [[]]
    edges = edges_of(rows)
    tree = kernels.find_dominators(edges, kernels.reverse_edges(edges), numbers(0))
    assert len(tree.chunk) == count + 1
    # Chunk 1 has no way around chunk 0; nobody else's dominator can be below the furthest reach of those before it.
    node_of = {chunk: node for node, chunk in enumerate(tree.chunk.tolist()) if node}
    reach, gates = 0, [0]
    for number in range(count - 1):
        if reach <= number:
            gates.append(number)
        reach = max(reach, number + 1, rows[number][1])
    # A gate is passed by every path: it dominates what follows.
    depth_of = [0] * (count + 1)
    for node in range(1, count + 1):
        depth_of[node] = depth_of[int(tree.dominator[node])] + 1
    assert depth_of[node_of[count - 1]] >= len(set(gates))


# Hostile arguments: an error, never a crash


def broken_edges() -> list[Edges]:
    return [
        Edges(numbers(0, 1, 2, 2), numbers(1, 3)),  # a chunk that there is not
        Edges(numbers(0, 1, 2, 2), numbers(1, CHUNK_MASK)),
        Edges(numbers(0, 1, 2, 2), numbers(1, ALL_ONES)),
        Edges(numbers(0, 1, 9, 9), numbers(1, 2)),  # references behind the end
        Edges(numbers(0, 1, ALL_ONES, 0), numbers(1, 2)),
        Edges(numbers(7, ALL_ONES, 2, ALL_ONES), numbers(1, 2)),
        Edges(np.array([0, 1, (1 << 64) - 1, 2], np.uint64), numbers(1, 2)),
        Edges(np.array([1 << 62, (1 << 62) + 1, (1 << 62) + 2, 2], np.uint64), numbers(1, 2)),
    ]


ALL_ONES = (1 << 32) - 1


@pytest.mark.parametrize("number", range(len(broken_edges())))
def test_broken_references(compiled: ModuleType, number: int) -> None:
    edges = broken_edges()[number]
    sound = edges_of([[1], [2], []], wide=edges.first.dtype == np.uint64)
    everything = bits_of([0, 1, 2], 3)
    calls: tuple[Callable[[], object], ...] = (
        lambda: compiled.mark_reachable(edges, numbers(0, 1), bits_of([], 3), bits_of([], 3), True),
        lambda: compiled.mark_reachable(edges, numbers(0, 1), bits_of([], 3), bits_of([], 3), False),
        lambda: compiled.find_leaders(edges, everything),
        lambda: compiled.reverse_edges(edges),
        lambda: compiled.shortest_path(edges, 0, bits_of([], 3), True),
        lambda: compiled.find_dominators(edges, sound, numbers(0, 1)),
        lambda: compiled.find_dominators(edges, edges, numbers(0, 1)),
    )
    for call in calls:
        with pytest.raises((IndexError, ValueError)):
            call()
    with contextlib.suppress(IndexError, ValueError):
        compiled.find_dominators(sound, edges, numbers(0))


@compare
@given(seed=st.integers(0, 1 << 30), wide=st.booleans())
def test_noise_instead_of_references(compiled: ModuleType, seed: int, wide: bool) -> None:
    """Arbitrary numbers in both columns, under every kernel: results may be nonsense."""
    rng = random.Random(seed)
    count = rng.choice([1, 3, 64, 70])
    most = rng.choice([count, count + 1, 2 * count, ALL_ONES, (1 << 64) - 1 if wide else ALL_ONES])
    offsets = [rng.randint(0, most) for _ in range(count + 1)]
    if rng.random() < 0.5:
        offsets.sort()
    first = np.array(offsets, np.uint64) if wide else np.array(offsets, np.uint32)
    largest = rng.choice([count - 1, count, 64 * ((count + 63) // 64) - 1, ALL_ONES])
    target = numbers(*(rng.randint(0, largest) for _ in range(rng.choice([0, count, 2 * count]))))
    edges = Edges(first, target)
    other = edges_of([[rng.randrange(count)] for _ in range(count)], wide)
    seeds = numbers(*(rng.randint(0, largest) for _ in range(3)))
    bits = [np.array([rng.getrandbits(64) for _ in range((count + 63) // 64)], np.uint64) for _ in range(3)]
    calls: tuple[Callable[[], object], ...] = (
        lambda: compiled.mark_reachable(edges, seeds, bits[0], bits[1], rng.random() < 0.5),
        lambda: compiled.find_leaders(edges, bits[2]),
        lambda: compiled.reverse_edges(edges),
        lambda: compiled.shortest_path(edges, rng.randrange(count), bits[2], True),
        lambda: compiled.find_dominators(edges, other, seeds),
        lambda: compiled.find_dominators(other, edges, seeds % count),
        lambda: compiled.find_dominators(edges, edges, seeds),
    )
    for call in calls:
        with contextlib.suppress(IndexError, ValueError):
            call()


def test_wrong_arguments(kernels: ModuleType) -> None:
    edges = edges_of([[1]] + [[] for _ in range(64)])
    good, short = bits_of([], 65), bits_of([], 64)
    for marked, interior in ((short, good), (good, short)):
        with pytest.raises(ValueError, match="one bit for each"):
            kernels.mark_reachable(edges, numbers(0), marked, interior, False)
    with pytest.raises(ValueError, match="one bit for each"):
        kernels.find_leaders(edges, short)
    with pytest.raises(ValueError, match="one bit for each"):
        kernels.shortest_path(edges, 0, short, True)
    for seed in (65, CHUNK_MASK):
        with pytest.raises(IndexError):
            kernels.mark_reachable(edges, numbers(seed), good.copy(), good.copy(), False)
        with pytest.raises(IndexError):
            kernels.find_dominators(edges, kernels.reverse_edges(edges), numbers(seed))
    with pytest.raises(IndexError):
        kernels.find_leaders(edges, np.array([0, 2], np.uint64))  # bit 65
    for other in (edges_of([[]]), edges_of([[]] * 65, wide=True)):
        with pytest.raises(ValueError, match="same references"):
            kernels.find_dominators(edges, other, numbers(0))


def test_wrong_types(compiled: ModuleType) -> None:
    edges, bits = edges_of([[1], []]), bits_of([], 2)
    # The wrong type is what is tested.
    signed = Edges(edges.first.astype(np.int64), edges.target)  # type: ignore[arg-type]
    strided = Edges(np.zeros(6, np.uint32)[::2], edges.target)
    for broken in (signed, strided, Edges(edges.first, edges.target.astype(np.uint64))):
        with pytest.raises(ValueError, match=r"mismatch|contiguous"):
            compiled.mark_reachable(broken, numbers(0), bits.copy(), bits.copy(), True)
    with pytest.raises(ValueError, match="mismatch"):
        compiled.mark_reachable(edges, np.zeros(1, np.int64), bits.copy(), bits.copy(), True)
    with pytest.raises(ValueError, match="mismatch"):
        compiled.mark_reachable(edges, numbers(0), bits.view(np.int64), bits.copy(), True)
    with pytest.raises(TypeError):
        compiled.mark_reachable(edges, None, bits.copy(), bits.copy(), True)
    with pytest.raises(TypeError):
        compiled.mark_reachable(edges, numbers(0), None, bits.copy(), True)


# Sums


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("seed", range(3))
def test_sizes_and_sums_by_verdict(kernels: ModuleType, machine: Machine, seed: int) -> None:
    heap = random_heap(machine, seed, segment_bytes=1 << 14)
    index = index_of(kernels, heap)
    sizes = kernels.chunk_sizes(index)
    chunks = heap.all_chunks()
    assert sizes.dtype == np.uint32
    ends = {segment.chunks[-1].header_address: segment.end for segment in heap.segments}
    for chunk, size in zip(chunks, sizes.tolist(), strict=True):
        chunk_bytes = ends.get(chunk.header_address, chunk.header_address + chunk.chunk_bytes) - chunk.header_address
        assert size == chunk_bytes // machine.alignment
    rng = random.Random(seed)
    verdict = np.array([rng.choice([0, 1, 5, 7, 8, 255]) for _ in chunks], np.uint8)
    counts, totals = kernels.count_by_verdict(verdict, index.state, sizes)
    assert counts.shape == totals.shape == (8, 1078)
    assert (counts.dtype, totals.dtype) == (np.int64, np.uint64)
    for value in range(8):
        chosen = (verdict & 7 == value) & (index.state == ChunkState.IN_USE)
        assert int(counts[value].sum()) == int(chosen.sum())
        assert int(totals[value].sum()) == int(sizes[chosen].sum())
        for size in set(sizes[chosen].tolist()):
            if size < 1024:
                assert int(counts[value, size]) == int((sizes[chosen] == size).sum())


def test_sums_of_large_chunks(kernels: ModuleType) -> None:
    sizes = numbers(1023, 1024, 2047, 2048, ALL_ONES, ALL_ONES)
    state = np.array([0, 0, 0, 0, 0, 1], np.uint8)
    counts, totals = kernels.count_by_verdict(np.zeros(6, np.uint8), state, sizes)
    assert {int(place): int(counts[0, place]) for place in np.flatnonzero(counts[0])} == {
        1023: 1,
        1024: 2,
        1025: 1,
        1045: 1,
    }
    assert int(totals.sum()) == 1023 + 1024 + 2047 + 2048 + ALL_ONES
    with pytest.raises(ValueError, match="differ in length"):
        kernels.count_by_verdict(np.zeros(5, np.uint8), state, sizes)
