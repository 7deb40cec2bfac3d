"""Where every byte of the address space is: the ledger, from the same pieces as the table of mappings.

Each mapped byte is in exactly one piece, and each piece in exactly one leaf. Chunk states divide the heap's leaves further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from coreheap.accounting.claims import NOBODY, Claims
from coreheap.accounting.heap_claims import CHUNKS, MAIN, OTHER, UNEXPLAINED, break_claims, heap_claims
from coreheap.accounting.java import java_claims
from coreheap.accounting.mapping_table import LabelledPieces, labelled_pieces, mapping_table
from coreheap.accounting.other_allocators import other_allocator_claims
from coreheap.accounting.region_owners import bss_claims
from coreheap.accounting.stacks import stack_claims
from coreheap.corefile import Core
from coreheap.evidence import Gap
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.quantities import format_bytes
from coreheap.report import LedgerNode

UInt64s = npt.NDArray[np.uint64]

CHUNK_STATES_IN_ORDER = (
    ChunkState.IN_USE,
    ChunkState.ALLOCATOR_OWN,
    ChunkState.TCACHE,
    ChunkState.FASTBIN,
    ChunkState.UNSORTED_BIN,
    ChunkState.SMALL_BIN,
    ChunkState.LARGE_BIN,
    ChunkState.TOP,
    ChunkState.FREE_UNLISTED,
    ChunkState.FENCEPOST,
    ChunkState.DAMAGED,
)

NODES: tuple[tuple[str, tuple[MappingKind, ...]], ...] = (
    ("module_text", (MappingKind.MODULE_TEXT,)),
    ("module_rodata", (MappingKind.MODULE_RODATA,)),
    ("module_data", (MappingKind.MODULE_DATA,)),
    ("module_bss", (MappingKind.MODULE_BSS,)),
    ("mapped_files", (MappingKind.MAPPED_FILE, MappingKind.SHARED_MEMORY)),
    ("kernel_pages", (MappingKind.KERNEL_PAGES,)),
    (
        "thread_stacks",
        (
            MappingKind.MAIN_STACK,
            MappingKind.THREAD_STACK,
            MappingKind.STACK_GUARD,
            MappingKind.SIGNAL_STACK,
            MappingKind.ENDED_STACK,
            MappingKind.UNJOINED_STACK,
            MappingKind.TLS,
        ),
    ),
    (
        "java",
        (
            MappingKind.JAVA_HEAP,
            MappingKind.JAVA_METASPACE,
            MappingKind.JAVA_CODE_CACHE,
            MappingKind.JAVA_GC,
        ),
    ),
    ("other_allocators", (MappingKind.OTHER_ALLOCATOR,)),
    ("tool_memory", (MappingKind.TOOL_MEMORY,)),
    ("no_access", (MappingKind.NO_ACCESS,)),
    ("other_anonymous", (MappingKind.UNEXPLAINED,)),
)
"""The ledger's nodes beside malloc and the kinds below each; a node of one kind has no children, but for other allocators."""


Claimant = tuple[str, Callable[[Core, Claims], None]]
"""Who claims memory: what it claims, for people, and the function that does."""
Attempt = Callable[[str, Callable[[], None]], object]

CLAIMANTS: tuple[Claimant, ...] = (
    # A JVM protects the ends of stacks itself, and Go's stacks lie in its heap: what their own structures say goes first.
    ("Java", java_claims),
    ("other allocators", other_allocator_claims),
    ("stacks", stack_claims),
    ("modules", bss_claims),
)
"""Who claims memory after the heap; the earlier one wins where two claim the same."""


def attempt_all(name: str, claim: Callable[[], None]) -> None:
    """Let a claimant claim, and let its failure be seen."""
    claim()


@dataclass(frozen=True, slots=True)
class Account:
    """The same bytes twice: row by row, and summed up.

    ``gaps``: where the heap's own sums do not fit into what is mapped, and the ledger has less than they say.
    """

    mappings: MappingTable
    ledger: LedgerNode
    gaps: tuple[Gap, ...] = ()


def account_for_memory(
    core: Core,
    heap: HeapSnapshot | None,
    *,
    residency: bool = True,
    claimants: tuple[Claimant, ...] = CLAIMANTS,
    attempt: Attempt = attempt_all,
) -> Account:
    """Every mapped byte of a core.

    Without ``residency`` the memory's content is not read, and what was in memory is unknown. ``claimants`` say, after the heap
    and one after the other, what they know of all other memory; ``attempt`` calls each, by name, and may catch its failure:
    then that memory is unexplained.
    """
    claims = Claims()
    if heap is not None:
        heap_claims(heap, claims)
    for name, claimant in claimants:
        attempt(name, partial(claimant, core, claims))
    if heap is not None:
        attempt("the break", partial(break_claims, core, heap, claims))
    labelled = labelled_pieces(core, claims, residency=residency)
    too_many = _TooMany()
    ledger = _ledger(labelled, heap, too_many)
    return Account(mapping_table(labelled), ledger, tuple(too_many.gaps()))


def no_account() -> Account:
    """Where nothing could be accounted for."""
    words, numbers, narrow = np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.uint8)
    columns = (words, words, narrow, narrow, numbers, numbers, numbers, words, words, words, words)
    nodes = (LedgerNode(name, 0) for name, _ in NODES)
    return Account(MappingTable(*columns, (), ResidencyBasis.UNKNOWN), LedgerNode.of("address_space", *nodes))


def build_ledger(core: Core, heap: HeapSnapshot | None) -> LedgerNode:
    """The whole address space by kind; every node is the sum of its children, to the byte."""
    return account_for_memory(core, heap).ledger


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of pieces under some key: five numbers a row, in the order of LedgerNode's fields."""

    rows: UInt64s

    @classmethod
    def by(cls, key: npt.NDArray[np.integer], count: int, labelled: LabelledPieces) -> _Sums:
        """The sums of all pieces whose key is at least 0, for each key below ``count``."""
        rows = np.zeros((count, 5), np.uint64)
        counted = key >= 0
        columns = (
            labelled.pieces.end - labelled.pieces.start,
            labelled.committed_bytes,
            labelled.saved_bytes,
            labelled.resident_low,
            labelled.resident_high,
        )
        for number, column in enumerate(columns):
            np.add.at(rows[:, number], key[counted], column[counted])
        return cls(rows)

    def node(self, name: str, row: int) -> LedgerNode:
        """A leaf of one row."""
        mapped, committed, saved, low, high = self.rows[row].tolist()
        return LedgerNode(name, mapped, (), committed, saved, low, high)


@dataclass(slots=True)
class _TooMany:
    """Bytes of chunks that have no place in what is mapped as the heap's: it is damaged, or the core contradicts itself."""

    byte_count: int = 0

    def cut(self, leaves: Iterable[LedgerNode], room: int) -> list[LedgerNode]:
        """The leaves, each cut to what those before have left of ``room``."""
        cut = []
        for leaf in leaves:
            kept = min(leaf.bytes, room)
            self.byte_count += leaf.bytes - kept
            room -= kept
            cut.append(replace(leaf, bytes=kept))
        return cut

    def gaps(self) -> Iterator[Gap]:
        if self.byte_count:
            yield Gap(
                "chunks_not_mapped",
                f"the heap's chunks add up to {format_bytes(self.byte_count)} more than is mapped for them: the ledger leaves these"
                " out, and sums over chunks are too large",
            )


def _ledger(labelled: LabelledPieces, heap: HeapSnapshot | None, too_many: _TooMany) -> LedgerNode:
    of_part = _Sums.by(labelled.part, len(labelled.parts), labelled)
    of_kind = _Sums.by(labelled.kind.astype(np.intp), len(KINDS), labelled)
    nodes = [_node_of_kinds(name, kinds, labelled, of_kind) for name, kinds in NODES]
    if heap is None:
        return LedgerNode.of("address_space", *nodes)
    parts = [of_part.node(part, row) for row, part in enumerate(labelled.parts)]
    mmapped = of_kind.node("mmapped_chunks", KINDS.index(MappingKind.MMAPPED_CHUNK))
    return LedgerNode.of("address_space", _malloc_node(heap, parts, mmapped, too_many), *nodes)


def _node_of_kinds(name: str, kinds: tuple[MappingKind, ...], labelled: LabelledPieces, of_kind: _Sums) -> LedgerNode:
    if MappingKind.OTHER_ALLOCATOR in kinds:
        theirs = labelled.kind == KINDS.index(MappingKind.OTHER_ALLOCATOR)
        # Whose name is not known counts behind all names.
        owner = np.where(labelled.name == NOBODY, len(labelled.names), labelled.name)
        of_name = _Sums.by(np.where(theirs, owner, -1), len(labelled.names) + 1, labelled)
        return LedgerNode.of(
            name,
            *(
                of_name.node(labelled.names[row] if row < len(labelled.names) else "unknown", row)
                for row in np.unique(owner[theirs]).tolist()
            ),
        )
    if len(kinds) == 1:
        return of_kind.node(name, KINDS.index(kinds[0]))
    return LedgerNode.of(name, *(of_kind.node(kind.value, KINDS.index(kind)) for kind in kinds))


def _malloc_node(heap: HeapSnapshot, parts: list[LedgerNode], mmapped: LedgerNode, too_many: _TooMany) -> LedgerNode:
    """Below malloc: the main arenas, all other arenas together, and mmapped chunks.

    The chunk states of an arena add up to its chunk regions by construction. In a damaged or hostile core they may be less, which
    shows as unexplained, or more (regions that overlap other claims): then they are cut.
    """

    def arena_node(name: str, prefix: str, is_main: bool) -> LedgerNode:
        own = [part for part in parts if part.name.startswith(f"{prefix}_")]
        by_name = {part.name.removeprefix(f"{prefix}_"): part for part in own}
        walked = sum(by_name[word].bytes for word in (CHUNKS, UNEXPLAINED) if word in by_name)
        states = too_many.cut(
            (
                LedgerNode(
                    state.label,
                    sum(arena.totals[state].chunk_bytes for arena in heap.arenas if arena.is_main is is_main),
                )
                for state in CHUNK_STATES_IN_ORDER
            ),
            walked,
        )
        rest = [replace(part, name=word) for word, part in by_name.items() if word not in (CHUNKS, UNEXPLAINED)]
        chunk_bytes = sum(node.bytes for node in states)
        return replace(
            LedgerNode.of(name, *own), children=(*states, *rest, LedgerNode(UNEXPLAINED, walked - chunk_bytes))
        )

    in_use, cached = (
        heap.mmapped_totals[state].usable_bytes if state in heap.mmapped_totals else 0
        for state in (ChunkState.IN_USE, ChunkState.TCACHE)
    )
    of_mmapped = too_many.cut((LedgerNode("in_use", in_use), LedgerNode("tcache", cached)), mmapped.bytes)
    overhead = LedgerNode("overhead", mmapped.bytes - sum(node.bytes for node in of_mmapped))
    return LedgerNode.of(
        "malloc",
        arena_node("main_arena", MAIN, True),
        arena_node("other_arenas", OTHER, False),
        replace(mmapped, children=(*of_mmapped, overhead)),
    )
