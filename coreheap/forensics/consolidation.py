"""A fastbin that malloc_consolidate had taken off its head when it met a link that leads nowhere: what was on it, and whose link it was.

Knows: that malloc_consolidate empties each list's head first and joins the chunks one by one (malloc.c, 2.32-2.42, where links are mangled).
Does not know: how lists are found in a heap at rest (``allocators``).

The chunks that were not reached yet are on no list and look as if they were in use. Their links still lead from one to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.corefile.gathering import words_at
from coreheap.damage import Damage, DamagedPlace, DamageKind
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.forensics.places import Places
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.quantities import AddressRange

MESSAGE = "malloc_consolidate(): unaligned fastbin chunk detected"
LARGEST_FAST_WORDS = 22
"""Words of the largest chunk that M_MXFAST lets into a fastbin (malloc.c, MAX_FAST_SIZE and its header)."""
LINK_SHIFT = 12
LISTED_TOLD = 16
STRUCTURE_BYTES = 2200
"""malloc_state, 64-bit; the unsorted bin's head is inside."""
SEARCHED_WORDS = 1 << 12
NEAR = 1 << 12
"""A link that was counted up or had a byte written over still leads near."""

LINKED_LIMIT = 1 << 16
"""Chunks that are linked; blocks that were given out from a list and never written to are as well."""

UInt64s = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class _Chain:
    """Chunks of one size that lead from one to the next, by their headers; the last one ends a list."""

    headers: tuple[int, ...]
    chunk_bytes: int
    arena: int


def find_interrupted_consolidation(core: Core, heap: HeapSnapshot, message: str | None) -> Damage | None:
    """The damage that stopped malloc_consolidate; None where its message is another one, or nothing is left of the list."""
    if message is None or MESSAGE not in message:
        return None
    chain = _longest_chain(core, heap)
    if chain is None:
        return None
    places = Places(core, heap)
    header = 2 * core.word_bytes
    blocks = tuple(start + header for start in chain.headers)
    victim, link = _victim(core, places, chain)
    count = f"{len(blocks)} blocks of {chain.chunk_bytes - core.word_bytes} bytes" if len(blocks) > 1 else "one block"
    evidence = [
        Evidence("a fastbin led to what is no chunk", "glibc's message", Strength.SOLID),
        Evidence(
            f"{count} are linked as a fastbin links them, and are on no list",
            "links of chunks",
            Strength.HINT,
            blocks[0],
        ),
    ]
    weakened = ["the blocks that were on the list count as in use"]
    if link is not None:
        evidence.append(
            Evidence("its link leads near the first of them", "content of a free chunk", Strength.HINT, link)
        )
    elif victim is not None:
        evidence.append(Evidence("it was joined last, and stood before them", "unsorted bin", Strength.HINT, victim))
        weakened.append("the link itself was overwritten when the block was joined with its neighbours")
    else:
        weakened.append("which block's link was overwritten is not known: it was joined with its neighbours")
    at = link if link is not None else victim + header if victim is not None else blocks[0]
    number = places.chunk_holding(at)
    holding = places.place(number) if number is not None and (link is not None or victim is not None) else None
    return Damage(
        kind=DamageKind.USE_AFTER_FREE,
        place=DamagedPlace.FASTBIN_LINK,
        bytes=AddressRange(at, at + core.word_bytes),
        victim=holding,
        culprit=holding,
        pattern=None,
        repair=None,
        anomalies=(),
        lost_bytes=0,
        arena=chain.arena,
        message=MESSAGE,
        evidence=tuple(evidence),
        confidence=confidence_from(evidence),
        weakened_by=tuple(weakened),
        listed_blocks=blocks[:LISTED_TOLD],
    )


def _longest_chain(core: Core, heap: HeapSnapshot) -> _Chain | None:
    """The longest list of chunks that look in use and are linked as a fastbin links them, first to last."""
    best: _Chain | None = None
    for arena in heap.arenas:
        headers, sizes, links = _linked(core, heap, arena.index)
        for size in np.unique(sizes).tolist():
            of_size = sizes == np.uint64(size)
            # Each chunk by the one that it leads to; what two lead to is no list's.
            before = dict(zip(links[of_size].tolist(), headers[of_size].tolist(), strict=True))
            ends = headers[of_size & (links == 0)]
            for end in ends.tolist():
                found = [end]
                while (previous := before.get(found[-1])) is not None and previous not in found[:1]:
                    if len(found) >= SEARCHED_WORDS:
                        break
                    found.append(previous)
                if len(found) > 1 and (best is None or len(found) > len(best.headers)):
                    best = _Chain(tuple(reversed(found)), size, arena.index)
    return best


def _linked(core: Core, heap: HeapSnapshot, arena: int) -> tuple[UInt64s, UInt64s, UInt64s]:
    """Chunks of an arena that look in use and whose first word leads, unmangled, to another one's header or to nothing: headers,
    sizes, and where they lead."""
    largest = np.uint64(LARGEST_FAST_WORDS * core.word_bytes)
    parts: list[tuple[UInt64s, UInt64s, UInt64s]] = []
    for batch in heap.chunks.batches():
        if batch.arena != arena or batch.is_mmapped:
            continue
        fits = (batch.state == ChunkState.IN_USE) & (batch.chunk_bytes <= largest)
        words, saved = words_at(core.memory, batch.payload_address[fits])
        links = words ^ (batch.payload_address[fits] >> np.uint64(LINK_SHIFT))
        parts.append((batch.header_address[fits][saved], batch.chunk_bytes[fits][saved], links[saved]))
    if not parts:
        empty = np.zeros(0, np.uint64)
        return empty, empty, empty
    headers, sizes, links = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(headers)
    headers, sizes, links = headers[order], sizes[order], links[order]
    place = np.searchsorted(headers, links)
    is_chunk = (place < len(headers)) & (headers[np.minimum(place, len(headers) - 1)] == links)
    same = is_chunk & (sizes[np.minimum(place, len(headers) - 1)] == sizes)
    kept = np.flatnonzero(same | (links == 0))[:LINKED_LIMIT]
    return headers[kept], sizes[kept], links[kept]


def _victim(core: Core, places: Places, chain: _Chain) -> tuple[int | None, int | None]:
    """The header of the chunk that was joined last, and the address of its link where that is still there."""
    arena = places.heap.arenas[chain.arena]
    if arena.address is None:
        return None, None
    first: int | None = None
    unsorted = np.flatnonzero(places.index.state[: places.index.region_chunks] == ChunkState.UNSORTED_BIN)
    for number in unsorted[:SEARCHED_WORDS].tolist():
        start, _ = places.extent(number)
        back = places.word(start + 3 * core.word_bytes)
        if back is not None and arena.address <= back < arena.address + STRUCTURE_BYTES:
            first = start
            break
    if first is None:
        return None, None
    number_of_first = places.chunk_at(first)
    assert number_of_first is not None
    end = first + places.extent(number_of_first)[1]
    step = places.heap.chunks.index.geometry.alignment
    count = min((end - first) // step, SEARCHED_WORDS)
    candidates = np.uint64(first + 2 * core.word_bytes) + np.arange(count, dtype=np.uint64) * np.uint64(step)
    words, saved = words_at(core.memory, candidates)
    targets = words ^ (candidates >> np.uint64(LINK_SHIFT))
    near = (
        saved & ((targets ^ np.uint64(chain.headers[0])) < np.uint64(NEAR)) & (targets != np.uint64(chain.headers[0]))
    )
    found = candidates[near].tolist()
    return (found[0] - 2 * core.word_bytes, found[0]) if len(found) == 1 else (first, None)
