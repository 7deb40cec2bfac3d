"""mimalloc's memory: segments at multiples of their size, each with the same secret mixed with its address.

Knows: mimalloc 1 and 2 (mi_segment_t has a ``cookie`` that is the segment's address xor the secret of the main heap,
_mi_ptr_cookie in include/mimalloc-internal.h). Does not know: what of a segment is in use.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory, UInt64s
from coreheap.corefile import Module
from coreheap.corefile.regions import LAST_ADDRESS
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import MIB

SEGMENT_BYTES: Final = (32 * MIB, 4 * MIB, 64 * MIB)
"""MI_SEGMENT_SIZE of 2.0, 1.x, and of 2.1 on some machines."""
HEADER_WORDS: Final = 64
SECRET_LEAST: Final = 1 << 48
"""Secrets are random; below are addresses, counts, and what both make when they are mixed."""
CANDIDATE_LIMIT: Final = 1 << 20
MAPPED_LEAST: Final = 1 << 32
"""mimalloc maps its segments, and the kernel maps high. An address of few bits hardly changes a word that is mixed with it: in the
break of a program that is not PIE two like words of any kind (Python's bytecode) would be a segment and its secret."""


def mimalloc_ranges(anonymous: AnonymousMemory, module: Module) -> tuple[Ranges, ...]:
    """The segments; empty where none is recognised.

    A segment that is larger than the others holds one block; it reaches to the end of its mapping or to the next segment.
    """
    if anonymous.word_bytes != 8:
        return ()
    _, secrets = anonymous.module_words(module)
    secrets = np.unique(secrets[secrets >= np.uint64(SECRET_LEAST)])
    for size in SEGMENT_BYTES:
        found = _segments(anonymous, secrets, size)
        if len(found):
            start, end = _extents(anonymous, found, size)
            fact = Evidence(
                f"{len(found)} segments of {size // MIB} MiB have its secret mixed with their address",
                "anonymous memory",
                Strength.PROOF,
                int(found[0]),
            )
            return (Ranges(*anonymous.union(start, end), (fact,)),)
    return ()


def _segments(anonymous: AnonymousMemory, secrets: UInt64s, size: int) -> UInt64s:
    """Addresses of the segments: all those where the same word of the header gives the same secret."""
    address = anonymous.multiples_of(size)
    address = address[address >= np.uint64(MAPPED_LEAST)][:CANDIDATE_LIMIT]
    rows, saved = anonymous.rows_at(address, HEADER_WORDS)
    mixed = rows ^ address[:, None]
    known = np.isin(mixed, secrets) & saved[:, None]
    if not known.any():
        return address[:0]
    column = int(known.sum(axis=0).argmax())
    values, counts = np.unique(mixed[known[:, column], column], return_counts=True)
    segments: UInt64s = address[known[:, column] & (mixed[:, column] == values[counts.argmax()])]
    return segments


def _extents(anonymous: AnonymousMemory, segment: UInt64s, size: int) -> tuple[UInt64s, UInt64s]:
    low, high = anonymous.stretches
    limit = high[np.maximum(np.searchsorted(low, segment, side="right") - 1, 0)]
    following = np.append(segment[1:], np.uint64(LAST_ADDRESS))
    usual = segment + np.uint64(size)
    # Only the writable region that the header lies in: behind a large block there may be others' memory.
    writable_low, writable_high = anonymous.writable
    own = writable_high[np.maximum(np.searchsorted(writable_low, segment, side="right") - 1, 0)]
    # Stacks of threads may follow without a gap.
    for thread in anonymous.core.threads:
        if thread.stack_pointer:
            own = np.where(
                (own > np.uint64(thread.stack_pointer)) & (usual <= np.uint64(thread.stack_pointer)), usual, own
            )
    return segment, np.minimum(np.minimum(np.maximum(usual, own), limit), following)
