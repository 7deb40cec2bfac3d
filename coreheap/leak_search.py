"""Who is lost and who holds whom in one core: the reference graph, asked in the field's words.

Knows: in which order the graph is made and asked, and what follows when it cannot be made. Does not know: how
references are found (``references``), or what a finding is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.protocol import Progress
from coreheap.corefile import Core
from coreheap.evidence import Gap
from coreheap.heap import ChunkState, HeapSnapshot, sum_of_totals
from coreheap.leaks import (
    OPTIONAL_HEURISTICS,
    Explanation,
    Heuristic,
    Holder,
    LeakReport,
    OwnerNode,
    Place,
    RetainedReport,
)
from coreheap.quantities import format_address, format_count
from coreheap.references import (
    ReferenceGraph,
    build_graph,
    explain,
    find_group_numbers,
    find_retained,
    owners,
    summarise_leaks,
)
from coreheap.references.naming import Namer

GroupNumbers = Callable[[int, int], npt.NDArray[np.int32]]
"""For chunks [first, end) the number of the leak group that each counts in, -1 for none: int32[end - first]."""

RETAINED_ROWS = 20
SMALLEST_LIVE_BYTES = 1 << 20
RETAINED_CHUNK_SECONDS, RETAINED_EDGE_SECONDS = 0.5e-6, 0.1e-6
LEAST_SECONDS, CHUNK_SECONDS, BYTE_SECONDS = 0.25, 0.15e-6, 0.4e-9
"""What retained sizes cost, and what all else does: measured, and fixed so that every machine decides alike."""
HOLDERS_READ = 64


class References:
    """Who refers to whom in the heap of a core. Ask it while the core is open.

    Addresses may lie anywhere: in a chunk's payload or header, or outside of the heap.
    """

    def __init__(self, graph: ReferenceGraph, progress: Progress = lambda phase, done, total: None) -> None:
        self._graph = graph
        self._progress = progress
        self._leaks: LeakReport | None = None

    @property
    def leaks(self) -> LeakReport:
        """Verdicts in sum, and the groups of suspects."""
        if self._leaks is None:
            self._progress("grouping suspects", 0, None)
            self._leaks = summarise_leaks(self._graph)
        return self._leaks

    def explain(self, address: int, *, limit: int = 20, retained: bool = False) -> Explanation:
        """What an address is: its chunk, neighbours, holders and targets (``limit`` of each), and a path from a root.

        ``retained`` adds what would go with the chunk; that takes a search through the whole heap.
        """
        return explain(self._graph, address, holders=limit, targets=limit, retained=retained)

    def owners(self, address: int, *, depth: int = 3, limit: int = 10) -> tuple[OwnerNode, ...]:
        """Who refers to the chunk at an address, and who refers to them, ``depth`` levels up, ``limit`` for each.

        Empty where no chunk holds the address, or nothing refers to it.
        """
        return owners(self._graph, address, depth, limit)

    def holders(self, address: int) -> tuple[Holder, ...]:
        """Who refers to the chunk at an address; a few, those that are no words of stacks or registers first."""
        found = []
        for node in owners(self._graph, address, 1, HOLDERS_READ):
            source = node.reference.source
            if isinstance(source, Place):
                found.append((source.kind.is_weak, Holder(source.name, source.address)))
            else:
                start = source.payload_address
                found.append((False, Holder(f"block {format_address(start)}", start + node.reference.source_offset)))
        return tuple(holder for _, holder in sorted(found, key=lambda item: item[0]))

    def retained(self, count: int = RETAINED_ROWS) -> RetainedReport:
        """The ``count`` chunks that retain most, and the accumulation points, the largest first."""
        self._progress("computing retained sizes", 0, None)
        return find_retained(self._graph, count)

    def typical_holders(self, groups: Sequence[npt.NDArray[np.int64]]) -> list[str | None]:
        """For each group of chunks what holds the first of them that a root holds directly; None where no root does."""
        return Namer(self._graph).typical_holders(groups)

    def group_numbers(self) -> GroupNumbers:
        """Which group of ``leaks`` each chunk counts in; lost chunks in that of their leader."""
        self._progress("grouping suspects", 0, None)
        return find_group_numbers(self._graph)


@dataclass(frozen=True, slots=True)
class LeakSearch:
    """What a search for leaks gave. ``heap`` has the verdicts.

    Where the search is impossible the rest is None and ``gaps`` says why.
    """

    heap: HeapSnapshot
    references: References | None
    leaks: LeakReport | None
    retained: RetainedReport | None
    gaps: tuple[Gap, ...]


def search_leaks(
    core: Core,
    heap: HeapSnapshot,
    progress: Progress,
    *,
    retained: bool | None,
    low_memory: bool = False,
    heuristics: Collection[Heuristic] = OPTIONAL_HEURISTICS,
) -> LeakSearch:
    """Verdicts on all chunks of a heap. A heap that is too large for a graph gives a gap.

    Without memory for all references the verdicts are found without them, as with ``low_memory``. Where nothing was said of
    ``retained`` (None), what chunks keep alive is looked for where live memory leads and that costs less than all else.
    """
    try:
        graph = _graph(core, heap, progress, low_memory, heuristics)
        references = References(graph, progress)
        leaks = references.leaks
    except (OverflowError, MemoryError) as error:
        gap = _impossible("leak_check_impossible", heap, error, "nothing is said about leaks and holders")
        return LeakSearch(heap, None, None, None, (gap,))
    gaps = graph.gaps
    largest: RetainedReport | None = None
    if retained or (retained is None and _is_cheap(core, heap, graph)):
        try:
            largest = references.retained()
        except (OverflowError, MemoryError) as error:
            consequence = "nothing is said about what chunks keep alive"
            gaps = (*gaps, _impossible("retained_sizes_impossible", heap, error, consequence))
    with_verdicts = dataclasses.replace(heap, chunks=dataclasses.replace(heap.chunks, verdict=graph.verdict))
    return LeakSearch(with_verdicts, references, leaks, largest, gaps)


def _is_cheap(core: Core, heap: HeapSnapshot, graph: ReferenceGraph) -> bool:
    """Whether retained sizes are worth a look that nobody asked for: live memory leads, and they take less than the rest."""
    totals = sum_of_totals(iter((heap.totals, heap.mmapped_totals)))
    whole = sum(total.chunk_bytes for total in totals.values())
    live = totals[ChunkState.IN_USE].chunk_bytes
    if graph.edge_count is None or live < SMALLEST_LIVE_BYTES or 2 * live < whole:
        return False
    cost = RETAINED_CHUNK_SECONDS * len(heap.chunks) + RETAINED_EDGE_SECONDS * graph.edge_count
    return cost <= LEAST_SECONDS + CHUNK_SECONDS * len(heap.chunks) + BYTE_SECONDS * core.saved_bytes


def _graph(
    core: Core, heap: HeapSnapshot, progress: Progress, low_memory: bool, heuristics: Collection[Heuristic]
) -> ReferenceGraph:
    try:
        return build_graph(core, heap, progress, low_memory=low_memory, heuristics=heuristics)
    except MemoryError:
        if low_memory:
            raise
    return build_graph(core, heap, progress, low_memory=True, heuristics=heuristics)


def explain_place(core: Core, address: int) -> Explanation:
    """What the core alone says about an address, where there is no heap to ask about."""
    memory = core.memory
    number = memory.region_index(address)
    if number is None:
        return Explanation(address, "not mapped", "", is_saved=False)
    region = memory.region(number)
    module = core.module_at(address)
    file = int(memory.region_file_index[number])
    words = "memory of the process; no glibc heap could be read from this core"
    if module is not None:
        words = f"{module.name}+{address - module.start:#x}"
    elif file >= 0:
        words = f"mapped file {memory.mapped_files[file].path}"
    permissions = "".join(letter if region.flags & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
    return Explanation(address, words, permissions, memory.is_saved(address, address + 1))


def _impossible(cause: str, heap: HeapSnapshot, error: Exception, consequence: str) -> Gap:
    reason = "there is not enough memory" if isinstance(error, MemoryError) else str(error)
    chunks = format_count(len(heap.chunks))
    return Gap(cause, f"the references of {chunks} chunks cannot be held ({reason}): {consequence}")
