"""What was damaged in a heap, by whom as far as the bytes tell, as plain values.

Knows: kinds and patterns of damage. Does not know: how any of it was found (``forensics``) or how it is shown (``render``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coreheap.evidence import Confidence, Evidence
from coreheap.heap import ChunkState
from coreheap.quantities import AddressRange


class DamageKind(Enum):
    """What happened, as far as the damaged bytes tell."""

    OVERFLOW = "overflow"
    """A live block was written past its end, into what malloc keeps behind it."""
    UNDERFLOW = "underflow"
    """A live block was written before its start, into its own header."""
    USE_AFTER_FREE = "use_after_free"
    """A freed block was written to: the words that malloc keeps in it, or the fill of M_PERTURB, are not malloc's."""
    DOUBLE_FREE = "double_free"
    """One block is free twice: on two lists, twice on one, or on a list while its memory is another block's."""
    INVALID_FREE = "invalid_free"
    """A list holds what malloc never gave out: free was called with another pointer."""
    BIT_FLIP = "bit_flip"
    """One bit of a header differs from the only value that fits: memory that failed, or a flag set in the wrong place."""
    OVERWRITE = "overwrite"
    """malloc's data was changed; nothing says from where."""
    IN_TRANSITION = "in_transition"
    """A thread was inside malloc with the arena locked: what looks wrong is what malloc itself leaves for a moment."""


class DamagedPlace(Enum):
    """Which of malloc's data is damaged."""

    CHUNK_HEADER = "chunk_header"
    PREV_SIZE = "prev_size"
    TOP = "top"
    TCACHE_LINK = "tcache_link"
    FASTBIN_LINK = "fastbin_link"
    BIN_LINK = "bin_link"
    FREE_CONTENT = "free_content"
    TCACHE_STRUCTURE = "tcache_structure"
    MALLOC_STATE = "malloc_state"
    HEAP_INFO = "heap_info"
    MALLOC_PAR = "malloc_par"
    MMAPPED_HEADER = "mmapped_header"
    FREE_LIST = "free_list"


class PatternKind(Enum):
    """What the foreign bytes look like; never the bytes themselves."""

    TEXT = "text"
    FILL_BYTE = "fill_byte"
    ZEROS = "zeros"
    POINTER = "pointer"
    SHIFTED_POINTER = "shifted_pointer"
    SMALL_NUMBER = "small_number"
    ONE_BIT = "one_bit"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Pattern:
    """What the foreign bytes look like, and what can be said of them without showing them.

    ``byte_count`` is how many bytes fit the pattern. ``target`` is where a pointer leads, in words (a module, a thread's stack,
    a chunk), None for other kinds.
    """

    kind: PatternKind
    byte_count: int
    target: str | None = None


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """One chunk, for people: where it is, what it is, who has it.

    ``arena`` is None for an mmapped chunk. ``holder`` names what points to it (a symbol, a thread's stack, another chunk), None
    where nothing does or references were not searched.
    """

    header_address: int
    payload_address: int
    chunk_bytes: int
    usable_bytes: int
    state: ChunkState
    arena: int | None
    is_mmapped: bool
    holder: str | None = None


@dataclass(frozen=True, slots=True)
class Repair:
    """A word that would make the heap right again: ``expected`` in place of ``observed``; ``bit`` where they differ in one."""

    address: int
    observed: int
    expected: int
    bit: int | None = None


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage of the heap with all that follows from it.

    ``bytes`` are the foreign bytes as far as they can be told from malloc's own; at least the first one is foreign.
    ``victim`` is the chunk whose header or links they are in (None for malloc's own structures), ``culprit`` the live
    chunk that was written past or the freed block that was written to, None where nothing tells. ``anomalies`` are indexes of
    ``Report.anomalies``. ``lost_bytes``: what the walk could assign to no chunk because of it.
    """

    kind: DamageKind
    place: DamagedPlace
    bytes: AddressRange
    victim: ChunkPlace | None
    culprit: ChunkPlace | None
    pattern: Pattern | None
    repair: Repair | None
    anomalies: tuple[int, ...]
    lost_bytes: int
    arena: int | None
    message: str | None
    """What glibc of this release says when it meets the damage, None where it would not notice."""
    evidence: tuple[Evidence, ...]
    confidence: Confidence
    weakened_by: tuple[str, ...] = ()
    listed_blocks: tuple[int, ...] = ()
    """Blocks that were on the list that the damage is about, where malloc had taken it off its head: free, and on no list now."""
    messages: tuple[str, ...] = ()
    """All that glibc of this release may say, by which operation meets the damage first."""
