"""The content of free chunks where free fills them (M_PERTURB): what is not the fill was written after free.

Knows: which free chunks hold nothing but the fill and what malloc itself leaves in them. Does not know: who wrote it
(``forensics``); and never shows a byte.

free fills a block that goes to a fastbin or a bin (malloc.c, free_perturb, all releases); a tcache takes blocks as they
are. A binned chunk may have grown from several: then the words that malloc kept in each are still inside it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.judgement import Judge
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import FLAGS, IS_MMAPPED, SAFE_LINKING_SHIFT, WORDS_OF_A_FREE_CHUNK
from coreheap.corefile import Core
from coreheap.evidence import Anomaly
from coreheap.heap import BINNED_STATES, ChunkBatch, ChunkTable
from coreheap.kernels import ChunkState
from coreheap.quantities import format_address

Bytes = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]

VARIABLE = "MALLOC_PERTURB_"
TUNABLE = "glibc.malloc.perturb"
WORDS_NEAR_A_HEADER = 16
"""How far behind an old header links of others may be left that began before it: they lie over one another."""

MOST_BYTES_OF_A_CHUNK = 1 << 24
"""So much of a free chunk is looked at from its start on."""

MOST_STRETCHES = 64
"""Stretches of a chunk that are told."""

MOSTLY = 0.5
"""The share of a chunk that must be the fill: one that was freed before M_PERTURB was set has none of it."""

MOST_LOOKED_INTO = 4096
"""Chunks with other bytes that are looked at one by one; merged chunks are many, written ones few."""


def fill_byte(core: Core) -> int | None:
    """What free fills blocks with; None where nothing is set, or nothing says what.

    perturb_byte itself where libc's symbols are at hand (mallopt may have set it), else the environment.
    """
    for module in core.modules:
        place = module.symbol_address("perturb_byte")
        if place is not None and core.memory.is_saved(place, place + 4):
            return core.memory.read(place, 1)[0] or None
    environment = core.initial_stack.environment if core.initial_stack is not None else {}
    texts = [environment.get(VARIABLE, "")]
    for setting in environment.get("GLIBC_TUNABLES", "").split(":"):
        name, _, value = setting.partition("=")
        if name == TUNABLE:
            texts.append(value)
    for text in texts:
        if text.isascii() and text.isdigit() and len(text) <= 10:
            return int(text) & 0xFF or None
    return None


def changed_content(core: Core, layout: Layout, chunks: ChunkTable, judge: Judge, fill: int) -> Iterator[Anomaly]:
    """An anomaly for each stretch of other bytes in a free chunk that nothing of malloc's explains."""
    looked_into = 0
    leftovers = _Leftovers(core, layout, chunks, judge, fill)
    for batch in chunks.batches():
        if batch.is_mmapped or not len(batch):
            continue
        rows = np.flatnonzero(np.isin(batch.state, [ChunkState.FASTBIN, *BINNED_STATES]))
        if not len(rows):
            continue
        start, end = int(batch.header_address[0]), int(batch.header_address[-1] + batch.chunk_bytes[-1])
        runs = core.memory.saved_runs_within(start, end)
        if len(runs) != 1 or runs[0][0] != start:
            continue
        content = core.memory.view(*runs[0])
        first, last = _content_of(layout, batch, rows, start, len(content))
        content = content[: int(last[-1])]
        foreign = content != np.uint8(fill)
        count = _count_between(foreign, first, last)
        suspect = (count > 0) & (count <= MOSTLY * (last - first))
        for row in np.flatnonzero(suspect).tolist():
            looked_into += 1
            if looked_into > MOST_LOOKED_INTO:
                return
            chunk = int(rows[row])
            header, end_of_it = int(batch.header_address[chunk]) - start, int(last[row])
            is_fast = batch.state[chunk] == ChunkState.FASTBIN
            written = foreign[int(first[row]) : end_of_it]
            if not is_fast:
                own = leftovers.of_malloc(content[header:end_of_it], start + header, int(batch.chunk_bytes[chunk]))
                written = written & ~own[int(first[row]) - header :]
            for begin, stop in _stretches(written, int(first[row]), layout.word_class.word_bytes):
                code = "fastbin_content_changed" if is_fast else "bin_content_changed"
                yield judge.judged(
                    Anomaly(
                        code,
                        start + begin,
                        f"the fill of M_PERTURB ({fill:#04x}) in a free chunk",
                        f"other bytes from {format_address(start + begin)} to {format_address(start + stop - 1)}",
                        batch.arena,
                        header_address=start + header,
                        foreign_bytes=stop - begin,
                    )
                )


def _content_of(
    layout: Layout, batch: ChunkBatch, rows: npt.NDArray[np.intp], start: int, byte_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where the fill of each chunk begins and ends, behind the words that its list keeps in it; offsets into the batch."""
    word = layout.word_class.word_bytes
    sizes = batch.chunk_bytes[rows].astype(np.int64)
    links = np.where(batch.state[rows] == ChunkState.FASTBIN, 3, 4)
    links = np.where((links == 4) & (sizes >= layout.word_class.bins.small_limit), WORDS_OF_A_FREE_CHUNK, links)
    header = batch.header_address[rows].astype(np.int64) - start
    last = np.minimum(header + np.minimum(sizes, MOST_BYTES_OF_A_CHUNK), byte_count)
    return np.minimum(header + links * word, last), last


def _count_between(marks: Bools, first: npt.NDArray[np.int64], last: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many marks lie in each [first, last); these ascend and do not overlap."""
    counts = np.zeros(len(first), np.int64)
    rows = np.flatnonzero(last > first)
    if len(rows):
        bounds = np.stack([first[rows], last[rows]], axis=1).ravel()
        counts[rows] = np.add.reduceat(marks[: bounds[-1]], bounds[:-1], dtype=np.int64)[::2]
    return counts


def _stretches(foreign: npt.NDArray[np.bool_], first: int, gap: int) -> list[tuple[int, int]]:
    """Stretches of foreign bytes, the first MOST_STRETCHES; offsets from ``first`` on.

    What was written may hold the fill byte by chance, so short gaps do not part them.
    """
    places = first + np.flatnonzero(foreign)
    if not len(places):
        return []
    cuts = np.flatnonzero(np.diff(places) > gap)
    begins = places[np.concatenate([[0], cuts + 1])]
    ends = places[np.concatenate([cuts, [len(places) - 1]])] + 1
    return list(zip(begins[:MOST_STRETCHES].tolist(), ends[:MOST_STRETCHES].tolist(), strict=True))


class _Leftovers:
    """What malloc itself leaves in a chunk that grew from several: their headers and links, one over another's.

    The word before a size word is the last word of a block's user, which free does not fill. Where a later header lies over an
    earlier one, links of the earlier are left without it: pointers to chunks and bins, with safe linking mangled, zeros, and
    the prev_size of a chunk. So a program's pointer or zero near an old header is taken for malloc's own.
    """

    def __init__(self, core: Core, layout: Layout, chunks: ChunkTable, judge: Judge, fill: int) -> None:
        geometry, index = layout.geometry, chunks.index
        self._word, self._alignment = geometry.word_bytes, geometry.alignment
        self._least = np.uint64(geometry.minimum_chunk_bytes)
        self._page, self._fill = core.page_bytes, fill
        self._mangled = layout.generation.safe_linking
        own = [arena.state.address for arena in judge.arenas if arena.state is not None]
        starts = [*index.region_start.tolist(), *own]
        ends = [*index.region_end.tolist(), *(address + layout.state.byte_count for address in own)]
        order = np.argsort(np.array(starts, np.uint64))
        self._starts, self._ends = np.array(starts, np.uint64)[order], np.array(ends, np.uint64)[order]

    def of_malloc(self, content: Bytes, address: int, chunk_bytes: int) -> Bools:
        """For each byte of a free chunk whether malloc left it there; ``content`` may end before the chunk does."""
        word = self._word
        count = len(content) // word
        kind = np.dtype("<u8" if word == 8 else "<u4")
        words = content[: count * word].view(kind).astype(np.uint64)
        place = np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(word)
        sizes, rest = words & np.uint64(~FLAGS & (1 << 64) - 1), np.uint64(address + chunk_bytes) - place
        is_size = (sizes >= self._least) & (sizes <= rest + np.uint64(word)) & (words & np.uint64(IS_MMAPPED) == 0)
        is_size &= sizes % np.uint64(self._alignment) == 0
        is_size &= (np.arange(count) - 1) % (self._alignment // word) == 0
        is_size[: min(2, count)] = False
        of_headers = _reached(is_size, -1, WORDS_OF_A_FREE_CHUNK - 1)
        near = _reached(is_size, -1, WORDS_NEAR_A_HEADER - 1)
        near[:WORDS_NEAR_A_HEADER] = True
        is_number = (words <= np.uint64(chunk_bytes)) & (words % np.uint64(self._alignment) == 0)
        is_link = is_number | self._leads_to_the_heap(words)
        if self._mangled:
            plain = words ^ (place >> np.uint64(SAFE_LINKING_SHIFT))
            is_link |= (plain == 0) | self._leads_to_the_heap(plain)
        own: Bools = np.ones(len(content), np.bool_)
        own[: count * word] = np.repeat(of_headers | (near & is_link), word)
        # What malloc fills new blocks with, and pages that were given back.
        own |= content == np.uint8(self._fill ^ 0xFF)
        skip = -address % self._page
        pages = max(len(content) - skip, 0) // self._page
        empty = ~content[skip : skip + pages * self._page].reshape(pages, self._page).any(axis=1)
        own[skip : skip + pages * self._page] |= np.repeat(empty, self._page)
        return own

    def _leads_to_the_heap(self, words: npt.NDArray[np.uint64]) -> Bools:
        row = np.searchsorted(self._starts, words, side="right") - 1
        inside: Bools = (row >= 0) & (words < self._ends[np.maximum(row, 0)])
        leads: Bools = inside & (words % np.uint64(self._word) == 0)
        return leads


def _reached(marks: Bools, first: int, last: int) -> Bools:
    """Which words lie from ``first`` to ``last`` words behind a mark, ``last`` not among them."""
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(marks)])
    places = np.arange(len(marks))
    low = np.clip(places - last + 1, 0, len(marks))
    high = np.clip(places - first + 1, 0, len(marks))
    reached: Bools = sums[high] > sums[low]
    return reached
