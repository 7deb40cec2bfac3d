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

from coreheap.allocators.glibc.judgement import FLAGS, Judge
from coreheap.allocators.glibc.records import Layout
from coreheap.corefile import Core
from coreheap.evidence import Anomaly
from coreheap.heap import BINNED_STATES, ChunkBatch, ChunkTable
from coreheap.kernels import ChunkState
from coreheap.quantities import format_address

VARIABLE = "MALLOC_PERTURB_"
TUNABLE = "glibc.malloc.perturb"
IS_MMAPPED = 2
WORDS_OF_A_FREE_CHUNK = 6
"""prev_size, size, fd, bk, fd_nextsize, bk_nextsize: what malloc writes into a chunk that is free."""

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
        foreign = content != np.uint8(fill)
        first, last = _content_of(layout, batch, rows, start, len(content))
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(foreign, dtype=np.int64)])
        count = before[last] - before[first]
        suspect = (count > 0) & (count <= MOSTLY * (last - first))
        for row in np.flatnonzero(suspect).tolist():
            looked_into += 1
            if looked_into > MOST_LOOKED_INTO:
                return
            chunk = int(rows[row])
            header = int(batch.header_address[chunk]) - start
            size = int(batch.chunk_bytes[chunk])
            is_fast = batch.state[chunk] == ChunkState.FASTBIN
            for begin, stop in _stretches(foreign, int(first[row]), int(last[row]), layout.word_class.word_bytes):
                if not is_fast and _is_mallocs_own(core, layout, content, start, header, size, begin, stop, fill):
                    continue
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
    last = np.minimum(header + sizes, byte_count)
    return np.minimum(header + links * word, last), last


def _stretches(foreign: npt.NDArray[np.bool_], first: int, last: int, gap: int) -> Iterator[tuple[int, int]]:
    """Stretches of foreign bytes; what was written may hold the fill byte by chance, so short gaps do not part them."""
    places = first + np.flatnonzero(foreign[first:last])
    if not len(places):
        return
    cuts = np.flatnonzero(np.diff(places) > gap)
    begins = places[np.concatenate([[0], cuts + 1])]
    ends = places[np.concatenate([cuts, [len(places) - 1]])] + 1
    yield from zip(begins.tolist(), ends.tolist(), strict=True)


def _is_mallocs_own(
    core: Core,
    layout: Layout,
    content: npt.NDArray[np.uint8],
    start: int,
    header: int,
    size: int,
    begin: int,
    stop: int,
    fill: int,
) -> bool:
    """Whether malloc itself left a stretch: the header and links of a chunk that was merged, pages that were given back, or what
    malloc fills new blocks with."""
    geometry = layout.geometry
    word = geometry.word_bytes
    part = content[begin:stop]
    if (part == np.uint8(fill ^ 0xFF)).all():
        return True
    page = core.page_bytes
    if not part.any() and (start + begin) % page == 0 and stop - begin >= page:
        return True
    reach = WORDS_OF_A_FREE_CHUNK * word
    old = begin - (start + begin - geometry.granule_phase) % geometry.alignment
    while old > header and old + reach >= stop:
        size_word = int.from_bytes(content[old + word : old + 2 * word].tobytes(), "little")
        old_size = size_word & ~FLAGS
        fits = geometry.minimum_chunk_bytes <= old_size <= header + size - old and not old_size % geometry.alignment
        if fits and not size_word & IS_MMAPPED:
            return True
        old -= geometry.alignment
    return False
