"""The small numbers that kernels write into their columns.

Knows: what each number means. Does not know: which glibc writes what, or how anything is printed.
``_compiled.pyx`` repeats these numbers as C constants; ``test_codes`` holds the two together.
"""

from __future__ import annotations

from enum import IntEnum


class ChunkState(IntEnum):
    """What a chunk is, in the ``state`` column of a ``ChunkIndex``.

    The walk writes IN_USE, FREE_UNLISTED, TOP and FENCEPOST; the overlay of the free lists turns the first
    two into TCACHE to LARGE_BIN; ALLOCATOR_OWN and DAMAGED are written by the caller.
    """

    IN_USE = 0
    TCACHE = 1
    FASTBIN = 2
    UNSORTED_BIN = 3
    SMALL_BIN = 4
    LARGE_BIN = 5
    TOP = 6
    FENCEPOST = 7
    ALLOCATOR_OWN = 8
    FREE_UNLISTED = 9
    DAMAGED = 10

    @property
    def label(self) -> str:
        """The name in JSON, CSV and filters: lower snake case."""
        return self.name.lower()


STATE_SLOTS = 16
"""Length of arrays that count per state: room for every ``ChunkState``, a power of two."""


class StopReason(IntEnum):
    """Why a walk or a chain of chunks ended."""

    TOP = 0
    """At the top chunk, which was given as ``stop_offset``."""
    END = 1
    """Exactly at the region's end, without top or fenceposts."""
    FENCEPOSTS_HEAP = 2
    """At the end marker of a retired sub-heap (a size word of exactly 1)."""
    FENCEPOSTS_MAIN = 3
    """At two chunks of two words each, the end of a piece of the main arena."""
    BROKEN = 4
    """At a header that cannot be one: the end offset is that header's."""
    CUT = 5
    """Before a chunk whose own header or whose successor's header was not saved."""
    NO_ROOM = 6
    """The ``states`` buffer is full; the walk can go on from the end offset."""
    LIMIT = 7
    """After as many chunks as the caller asked for."""


class WalkAnomaly(IntEnum):
    """Contradictions that a walk reports and steps over; the offset is the named chunk's header."""

    PREV_SIZE_MISMATCH = 1
    """A free chunk; the prev_size behind it is not its size."""
    MMAPPED_FLAG_INSIDE = 2
    """A chunk inside a region carries IS_MMAPPED."""
    ARENA_FLAG_MISMATCH = 3
    """A chunk in use; its NON_MAIN_ARENA is not that of the region."""
    FIRST_CHUNK_PREVIOUS_FREE = 4
    """The region's first chunk says that a free chunk lies before it."""
    ADJACENT_FREE = 5
    """A free chunk directly behind a free chunk: free would have joined them."""
    FREE_BEFORE_TOP = 6
    """A free chunk directly before top: free would have joined them."""
    TOP_SIZE_MISMATCH = 7
    """Top does not end at the region's end."""
    MARKER_WITHOUT_FENCEPOST = 8
    """A sub-heap's end marker that no fencepost precedes."""


class ListKind(IntEnum):
    """How the chunks of a free list are linked."""

    SINGLY_PAYLOAD = 0
    """Pointers lead to payloads, the next pointer is the payload's word 0 (tcache)."""
    SINGLY_HEADER = 1
    """Pointers lead to headers, the next pointer is ``fd`` (fastbins)."""
    DOUBLY = 2
    """Pointers lead to headers, ``fd`` and ``bk`` close a ring through the bin's header (bins)."""


class ListError(IntEnum):
    """What is wrong with a free list. Those up to COUNT_MISMATCH, and those that say so, do not stop its walk."""

    NONE = 0
    WRONG_SIZE = 1
    """The chunk's size does not belong on this list. Address: its header."""
    BROKEN_BACK_LINK = 2
    """``bk`` is not the chunk before. Address: header of the node (or bin header) that holds it."""
    COUNT_MISMATCH = 3
    """The list reached its end with another count than expected. Address: the list's head pointer."""
    MISALIGNED = 4
    """The decoded pointer cannot be a chunk's. Address: that pointer."""
    NOT_A_CHUNK_START = 5
    """No chunk starts where the pointer leads. Address: that pointer."""
    WRONG_STATE = 6
    """The chunk cannot be on such a list (in use on a bin, top, fencepost, ...). Address: its header."""
    ALREADY_LISTED = 7
    """The chunk is on this list (a cycle) or another one already. Address: its header."""
    NOT_SAVED = 8
    """The link of the last counted chunk is not in the core. Address: the word that is missing."""
    NOT_SORTED = 9
    """Goes on. A chunk of a sorted list is out of its order of sizes. Address: its header."""
    BROKEN_SIZE_RING = 10
    """Goes on. fd_nextsize or bk_nextsize of the first chunk of its size is not the neighbour's. Address: its header."""
    STRAY_SIZE_LINK = 11
    """Goes on. fd_nextsize or bk_nextsize is set in a chunk that is not the first of its size, or unsorted. Address: its header."""
    WRONG_KEY = 12
    """Goes on. Word 1 of a cached block is not the key. Address: its header."""
    LOOKS_IN_USE = 13
    """Goes on. A chunk is linked from both sides of a bin, but the next chunk's PREV_INUSE is set. Address: its header."""
    LOOKS_FREE = 14
    """Goes on. A chunk of a singly linked list whose successor's PREV_INUSE is clear. Address: its header."""
    BROKEN_FORWARD_LINK = 15
    """``fd`` is not the chunk behind. Address: header of the node (or bin header) that holds it. Stops the walk along
    ``fd`` where the chunk that it leads to belongs to another list; goes on where it was met along ``bk``."""


class PointerForm(IntEnum):
    """In which form a word holds an address, where it is not the address itself."""

    HIGH_TAG = 1
    """A counter or a tag in the upper 16 bits (lock-free lists, NaN boxing)."""
    LOW_TAG = 2
    """The address in the upper 48 bits."""
    SHIFTED = 3
    """Shifted by one to four bits, to either side."""
    BYTE_SWAPPED = 4
    UNALIGNED = 5
    """The address itself, across two words (packed structures)."""
    COMPRESSED = 6
    """In 32 bits, shifted by up to four; of 8-byte words alone."""
    HALVES = 7
    """As two 32-bit halves, apart from each other or the high one first; of 8-byte words alone."""
