"""Who is lost and who holds whom, as plain values.

Knows: the verdicts on chunks, groups of chunks, holders and paths. Does not know: how any of it was found
(``references``) or how it is shown (``render``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, IntEnum

import numpy as np
import numpy.typing as npt

UInt32s = npt.NDArray[np.uint32]


class Verdict(IntEnum):
    """Whether a chunk in use can still be freed by the program. memcheck's words, and WEAKLY_HELD; in a column as uint8."""

    NONE = 0
    """Not a chunk in use: no question of loss."""
    STILL_REACHABLE = 1
    """A chain of pointers to payload starts leads here from module data, TLS, or other memory outside of the heap."""
    WEAKLY_HELD = 2
    """Only register or stack words lead here; they may be left over from calls that have returned."""
    POSSIBLY_LOST = 3
    """Only pointers into payloads lead here, or roots are missing in the core from which a pointer could lead here."""
    INDIRECTLY_LOST = 4
    """Only lost chunks lead here."""
    DEFINITELY_LOST = 5
    """Nothing leads here; of a cycle of lost chunks, one leader."""

    @property
    def label(self) -> str | None:
        """The name in JSON, CSV and filters: lower snake case; None for NONE."""
        return None if self is Verdict.NONE else self.name.lower()


VERDICTS = tuple(verdict for verdict in Verdict if verdict is not Verdict.NONE)
"""All verdicts on chunks in use, the most harmless first."""


class Heuristic(IntEnum):
    """By which pattern a chunk is held that no plain pointer to its start holds; in a column as uint8.

    The first ones make a chunk *still reachable*, as memcheck's of the same meaning do; all others make what nothing leads to
    *possibly* lost.
    """

    NONE = 0
    NEW_ARRAY = 1
    """A pointer to the first element of ``new T[n]``, behind the count that the compiler keeps (Itanium C++ ABI, 2.7)."""
    SECOND_BASE = 2
    """A pointer to a word that is itself a pointer into a module's constants or code: the table of a base's virtual functions."""
    CONSTANT_OFFSET = 3
    """All blocks of a size, or of all sizes, are pointed to at one distance: a wrapper's header, a list linked by a member."""
    LENGTH_PREFIX = 4
    """A pointer behind a length that fits the block: strings of many libraries."""
    EXCEPTION_POINTER = 5
    """A thrown C++ object, behind the header of libsupc++ (std::exception_ptr)."""
    HIGH_TAG = 6
    LOW_TAG = 7
    SHIFTED = 8
    BYTE_SWAPPED = 9
    UNALIGNED = 10
    COMPRESSED = 11
    HALVES = 12
    """These seven: the address is kept in that form (``kernels.PointerForm``)."""
    SIGNAL_STACK = 13
    """Of the size of an alternate signal stack, whose address only the kernel has (sigaltstack)."""
    MISSING_SHARED_MEMORY = 14
    """Shared memory that the core does not hold has room for pointers to all of them."""

    @property
    def label(self) -> str | None:
        """The name in JSON, CSV and options: lower snake case; None for NONE."""
        return None if self is Heuristic.NONE else self.name.lower()

    @property
    def is_encoding(self) -> bool:
        """Whether the address was found in another form than as it is."""
        return Heuristic.HIGH_TAG <= self <= Heuristic.HALVES


OPTIONAL_HEURISTICS = frozenset(Heuristic) - {Heuristic.NONE, Heuristic.MISSING_SHARED_MEMORY}
"""Those that can be switched off. What the core does not hold is no guess."""


@dataclass(frozen=True, slots=True)
class ChunkTypes:
    """What chunks hold, where something recognised it: ``code``: uint32[chunks], an index into ``names``; names[0] is "",
    unknown."""

    code: UInt32s
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerdictTotal:
    """Chunks with one verdict: how many, and their usable bytes."""

    count: int = 0
    usable_bytes: int = 0


class RootKind(Enum):
    """What kind of memory outside of the heap's chunks holds a pointer."""

    MODULE_DATA = "module_data"
    TLS = "tls"
    ANONYMOUS = "anonymous"
    """Other anonymous memory: mappings of the program's own, other allocators, generated code."""
    MAPPED_FILE = "mapped_file"
    """Writable mapped files and shared memory."""
    HEAP_REMAINDER = "heap_remainder"
    """Heap memory that no chunk could be assigned to (damage, missing headers, memory of other callers of sbrk)."""
    STACK = "stack"
    OLD_STACK = "old_stack"
    """The stack of a thread that has ended, or memory below a stack pointer that cannot be told from data."""
    REGISTER = "register"

    @property
    def label(self) -> str:
        """The name in JSON."""
        return str(self.value)

    @property
    def is_weak(self) -> bool:
        """Whether its words may be left over from calls that have returned."""
        return self in (RootKind.STACK, RootKind.OLD_STACK, RootKind.REGISTER)


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the process that is not a chunk: ``address`` is None for a register.

    ``name`` says it in words: ``thread 7 stack``, ``libfoo.so .data cache+16``, ``thread 0 rdi``.
    """

    kind: RootKind
    address: int | None
    name: str
    thread: int | None = None


@dataclass(frozen=True, slots=True)
class ChunkView:
    """One chunk, for those who look at a few: see ``ChunkTable`` for the columns. ``type`` is None where unknown."""

    chunk: int
    header_address: int
    payload_address: int
    chunk_bytes: int
    usable_bytes: int
    state: str
    is_mmapped: bool
    arena: int | None
    verdict: Verdict
    type: str | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """One pointer. ``source`` is the chunk or the place that holds it, at ``source_offset`` bytes into the payload.

    ``target_offset``: how far into the target's payload it points, 0 for an exact one.
    """

    source: ChunkView | Place
    source_offset: int
    target: ChunkView
    target_offset: int


@dataclass(frozen=True, slots=True)
class Holder:
    """Who refers to a block, in words, and the address of the word that does; None for a register."""

    name: str
    address: int | None


@dataclass(frozen=True, slots=True)
class LeakGroup:
    """Chunks with the same verdict, size class and type: one suspect.

    Of lost chunks a group counts the leaders; what they lead to is ``indirect``. ``smallest_bytes`` and ``largest_bytes``
    are usable bytes. ``arenas``: (arena index, or None for mmapped chunks, chunks), the most first. ``samples``: payload
    addresses. ``holder``: the typical holder in words, None where nothing holds them or it is not known.
    """

    number: int
    verdict: Verdict
    type: str | None
    smallest_bytes: int
    largest_bytes: int
    count: int
    usable_bytes: int
    indirect_count: int
    indirect_bytes: int
    arenas: tuple[tuple[int | None, int], ...]
    samples: tuple[int, ...]
    holder: str | None = None
    heuristic: Heuristic = Heuristic.NONE
    """Why they are no more than possibly lost, or still reachable without a pointer to their start."""

    @property
    def all_bytes(self) -> int:
        """Usable bytes with what the leaders lead to."""
        return self.usable_bytes + self.indirect_bytes


@dataclass(frozen=True, slots=True)
class RootSummary:
    """Where pointers into the heap were looked for: bytes read (registers: 0) and chunks first found from there."""

    kind: RootKind
    byte_count: int
    held_chunks: int


@dataclass(frozen=True, slots=True)
class LeakReport:
    """Verdicts on all chunks in use. ``groups`` has the largest first; ``group_count`` counts those left out as well.

    ``missing_root_bytes``: writable memory of the process that the core does not hold; where it is not 0 nothing is
    definitely lost, and what nothing in the core leads to is possibly lost. ``edge_count``: pointers between
    chunks, None where they were not counted (low memory).
    """

    totals: dict[Verdict, VerdictTotal]
    groups: tuple[LeakGroup, ...]
    group_count: int
    roots: tuple[RootSummary, ...]
    edge_count: int | None
    missing_root_bytes: int
    missing_shared_bytes: int
    """Shared mappings that the core does not hold: pointers there are not seen, though programs rarely keep any."""
    unreachable: VerdictTotal = VerdictTotal()
    """What nothing in the core leads to. Where roots are missing this is a part of what is possibly lost."""
    unreachable_possible: VerdictTotal = VerdictTotal()
    """The part of it that is possibly lost, but for what encoded pointers lead to."""
    held_inside: VerdictTotal | None = None
    """Chunks that themselves are pointed into, with nothing better leading to them: what hangs from these is as sure as they
    are. None where it was not looked for."""
    heuristics: tuple[tuple[Heuristic, VerdictTotal], ...] = ()
    """By heuristic the chunks that it made possibly lost (with what these lead to) or still reachable; the largest first."""

    def total(self, *verdicts: Verdict) -> VerdictTotal:
        """Chunks of some verdicts together; of all chunks in use when none is named."""
        parts = [self.totals[verdict] for verdict in verdicts or VERDICTS]
        return VerdictTotal(sum(part.count for part in parts), sum(part.usable_bytes for part in parts))


@dataclass(frozen=True, slots=True)
class RetainedChunk:
    """A chunk and what would go with it: ``retained_bytes`` are the usable bytes of all that only it leads to."""

    chunk: ChunkView
    retained_bytes: int
    retained_count: int
    holder: str | None


@dataclass(frozen=True, slots=True)
class Accumulation:
    """One holder of very many like chunks, whose retained bytes lie in these: a container that grew.

    ``holder`` is a chunk, or the name of a place outside the heap. ``children`` like ones of ``child_bytes`` usable bytes each (the
    commonest size class), ``child_retained_bytes`` in all.
    """

    holder: ChunkView | str
    retained_bytes: int
    children: int
    child_bytes: int
    child_retained_bytes: int
    samples: tuple[int, ...]
    below: int = 0
    """Chunks that go with the children, themselves included: of a table of containers the nodes of all of these."""
    holders: int = 1
    """Like holders that have these children together; ``holder`` is the one that keeps the most."""
    root: str | None = None
    """From where the holder hangs, as a place in words; None where no root leads to the uppermost chunk above it."""


@dataclass(frozen=True, slots=True)
class RetainedReport:
    """From the dominator tree: the largest retained chunks, and accumulation points, the largest first."""

    top: tuple[RetainedChunk, ...]
    accumulations: tuple[Accumulation, ...]
    reachable_bytes: int


@dataclass(frozen=True, slots=True)
class OwnerNode:
    """A reference to a chunk with those that lead to its holder, to a depth; ``omitted`` counts further ones not shown."""

    reference: Reference
    owners: tuple[OwnerNode, ...] = ()
    omitted: int = 0
    seen_before: bool = False
    """The holder stands higher up or elsewhere in the tree already: its own owners are not repeated."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What an address is. ``region`` says the memory in words; ``chunk`` None where no chunk holds the address.

    ``offset`` counts from the payload's start (negative within the header). ``before`` and ``behind`` are the neighbours in
    memory. ``path``: a shortest way from a root to the chunk, the root's reference first; empty where there is none.
    ``retained_bytes`` None where it was not asked for.
    """

    address: int
    region: str
    permissions: str
    is_saved: bool
    symbol: str | None = None
    thread: int | None = None
    chunk: ChunkView | None = None
    offset: int = 0
    before: ChunkView | None = None
    behind: ChunkView | None = None
    holders: tuple[Reference, ...] = ()
    holder_count: int = 0
    targets: tuple[Reference, ...] = ()
    target_count: int = 0
    path: tuple[Reference, ...] = ()
    path_omitted: int = 0
    """Steps in the middle of a long path that are left out."""
    retained_bytes: int | None = None
    retained_count: int | None = None
    notes: tuple[str, ...] = field(default=())
