"""Heap structures in plain memory, where nothing points to them.

Knows: what pieces of the main arena, mmapped chunks and empty bins look like. Does not know: which of the candidates
is real; that is for the caller, who knows the counts.
"""

from __future__ import annotations

import numpy as np

from coreheap.kernels.codes import StopReason
from coreheap.kernels.reference._region import (
    FLAGS,
    IS_MMAPPED,
    NON_MAIN_ARENA,
    PREV_INUSE,
    Region,
    byte_view,
    follow,
    word_reader,
)
from coreheap.kernels.values import (
    ADDRESS_LIMIT,
    OFFSET_LIMIT,
    ArenaCandidates,
    ChunkGeometry,
    ChunkRuns,
    Memory,
    MmappedChunks,
    UInt64Array,
)

_BLOCK_WORDS = 1 << 20
_BINMAP_BYTES = 16


def find_chunk_runs(
    memory: Memory,
    start_address: int,
    geometry: ChunkGeometry,
    step_bytes: int,
    top_offset: int,
    minimum_chunks: int,
    capacity: int = 4096,
) -> ChunkRuns:
    """Pieces of the main arena in a stretch of memory: consistent chunks from a step's boundary to fenceposts or top.

    Looked at are the addresses that are ``granule_phase`` modulo ``step_bytes``, a multiple of the alignment.
    The first chunk has PREV_INUSE set; no chunk has IS_MMAPPED or NON_MAIN_ARENA. At least ``minimum_chunks`` chunks
    besides fenceposts and top. Accepted runs are skipped. ``top_offset``: of main_arena's top, -1 when it lies
    elsewhere; a run to a top whose size is impossible ends at the next step. At most ``capacity`` runs.

    ``start_address`` is where ``memory`` begins. At most two headers are examined per granule, and ``minimum_chunks``
    more per step.
    """
    if step_bytes < geometry.alignment or step_bytes % geometry.alignment:
        raise ValueError(f"steps of {step_bytes} bytes are no multiple of {geometry.alignment}")
    if step_bytes > OFFSET_LIMIT or not 0 <= capacity <= OFFSET_LIMIT >> 3:
        raise ValueError("steps or capacity are too large")
    _check_start(start_address)
    shift = (geometry.granule_phase - start_address) % geometry.alignment
    first_header = start_address + shift
    region = Region(byte_view(memory)[shift:], geometry, top_offset - shift, -1, 0)
    spare = geometry.alignment - 2 * geometry.word_bytes
    leads_nowhere: set[int] = set()
    rows: list[tuple[int, int, StopReason, int]] = []
    candidate = (geometry.granule_phase - first_header) % step_bytes
    while region.header_is_saved(candidate):
        offset, end_offset, chunk_count = candidate, candidate, 0
        reason: StopReason | None = StopReason.BROKEN
        visited: list[int] = []
        if region.size_word(candidate) & PREV_INUSE:
            while offset not in leads_nowhere:
                reason, end_offset = follow(region, offset)
                if reason is None and region.size_word(offset) & NON_MAIN_ARENA:
                    reason = StopReason.BROKEN
                if reason is not None:
                    break
                visited.append(offset)
                chunk_count += 1
                offset = end_offset
            else:
                reason = StopReason.BROKEN
        if reason in (StopReason.TOP, StopReason.FENCEPOSTS_MAIN):
            if chunk_count >= minimum_chunks:
                if len(rows) == capacity:
                    return _chunk_runs(rows, True)
                if reason == StopReason.TOP and not region.top_is_possible():
                    beyond_header = offset + geometry.header_bytes
                    end_offset = min(beyond_header + -(first_header + beyond_header) % step_bytes, region.bytes)
                ends_step = (first_header + end_offset + spare) % step_bytes == 0
                if reason == StopReason.FENCEPOSTS_MAIN and ends_step and end_offset + spare <= region.bytes:
                    end_offset += spare
                rows.append((candidate + shift, end_offset + shift, reason, chunk_count))
                candidate += -(-(end_offset - candidate) // step_bytes) * step_bytes
                continue
        else:
            leads_nowhere.update(visited)
        candidate += step_bytes
    return _chunk_runs(rows, False)


def _chunk_runs(rows: list[tuple[int, int, StopReason, int]], truncated: bool) -> ChunkRuns:
    starts, ends, reasons, counts = zip(*rows, strict=True) if rows else ((), (), (), ())
    return ChunkRuns(
        np.array(starts, np.int64),
        np.array(ends, np.int64),
        np.array(reasons, np.uint8),
        np.array(counts, np.int64),
        truncated,
    )


def find_arena_candidates(
    memory: Memory, start_address: int, word_bytes: int, next_deltas: UInt64Array, capacity: int = 1 << 20
) -> ArenaCandidates:
    """Words that may belong to a malloc_state: empty bins, and pointers back to a structure's start.

    ``start_address``: of the memory's first byte; only words at multiples of ``word_bytes`` are looked at.
    ``next_deltas`` (uint64, each below 65536): distances from malloc_state to its ``next`` field. At most
    ``capacity`` addresses of each kind.

    Programs have such words, too, many of them where objects point back to the slab that holds them. So an empty bin
    counts beside another one only, and ``next`` only behind a last bin (127, which no size maps to) that is empty or was
    never set; between them lies binmap in all releases (2.12-2.44). What lies before the memory's start counts as if it fitted.
    """
    if word_bytes not in (4, 8):
        raise ValueError(f"a word has 4 or 8 bytes, not {word_bytes}")
    if any(delta >= 1 << 16 for delta in next_deltas.tolist()):
        raise ValueError("a malloc_state has no field that far from its start")
    view = byte_view(memory)
    _check_start(start_address)
    skipped = min(-start_address % word_bytes, len(view))
    words_there = (len(view) - skipped) // word_bytes
    start_address += skipped
    kind = np.dtype(f"<u{word_bytes}")
    deltas = next_deltas.astype(kind)
    last_bin = _BINMAP_BYTES // word_bytes + 2
    pairs: list[int] = []
    hits: list[int] = []
    for first_word in range(0, words_there, _BLOCK_WORDS):
        # Words around the block, for what reaches over its edges: a pair's neighbours, the bin before a next.
        before = min(first_word, last_bin)
        count = min(_BLOCK_WORDS + 3, words_there - first_word)
        words = np.frombuffer(view, kind, before + count, skipped + (first_word - before) * word_bytes)
        block_address = start_address + first_word * word_bytes
        # Differences wrap at the word's width, as the process's own pointer arithmetic does.
        positions = np.arange(before + count, dtype=kind) * kind.type(word_bytes)
        first_address = (block_address - before * word_bytes) & ((1 << 8 * word_bytes) - 1)
        distance = positions + np.array([first_address], kind) - words
        is_pair = np.zeros(before + count + 3, bool)  # with two more on each side
        is_pair[2:-2] = (distance[:-1] == 2 * word_bytes) & (distance[1:] == 3 * word_bytes)
        in_row = np.flatnonzero(is_pair[2:-2] & (is_pair[:-4] | is_pair[4:]))
        pointing = np.flatnonzero(np.isin(distance, deltas))
        first = np.maximum(pointing - last_bin, 0)
        second = np.minimum(first + 1, before + count - 1)
        is_empty = (distance[first] == 2 * word_bytes) & (distance[second] == 3 * word_bytes)
        is_never_set = (words[first] == 0) & (words[second] == 0)
        is_next = pointing[is_empty | is_never_set | (pointing < last_bin)]
        for addresses, found in ((pairs, in_row), (hits, is_next)):
            inside = found[(found >= before) & (found < before + _BLOCK_WORDS)][: capacity + 1 - len(addresses)]
            addresses += [block_address + (int(position) - before) * word_bytes for position in inside]
    return ArenaCandidates(
        np.array(pairs[:capacity], np.uint64),
        np.array(hits[:capacity], np.uint64),
        max(len(pairs), len(hits)) > capacity,
    )


def _check_start(start_address: int) -> None:
    if not 0 <= start_address < ADDRESS_LIMIT:
        raise ValueError(f"no process has memory at {start_address:#x}")


class _MmappedHeaders:
    """Whether there is the header of an mmapped chunk at an address."""

    def __init__(
        self, memory: Memory, start_address: int, geometry: ChunkGeometry, page_bytes: int, trailer_bytes: int, end: int
    ):
        self.read, self.saved = word_reader(memory, geometry.word_bytes)
        self.start = start_address
        self.end = start_address + (self.saved if end < 0 else end)
        self.geometry = geometry
        self.page = page_bytes
        self.trailer = trailer_bytes

    def at(self, header: int, lowest_start: int) -> tuple[int, int, int, int] | None:
        """Header, mapping start, mapping bytes, chunk bytes; None without a header there.

        The mapping has to begin at ``lowest_start`` or above.
        """
        word = self.geometry.word_bytes
        offset = header - self.start
        if offset < 0 or offset + 2 * word > self.saved:
            return None
        size_word = self.read(offset + word)
        size = size_word & ~FLAGS
        if size_word & FLAGS != IS_MMAPPED or size < self.geometry.minimum_chunk_bytes:
            return None
        lead = self.read(offset)
        if self.trailer:
            lead &= ~1  # glibc 2.43: bit 0 says that the mapping is of huge pages
        mapping_start = header - lead
        mapping_end = header + size + self.trailer
        if mapping_start < lowest_start or mapping_start % self.page:
            return None
        if mapping_end > self.end or mapping_end % self.page:
            return None
        return header, mapping_start, mapping_end - mapping_start, size


def find_mmapped_chunks(
    memory: Memory,
    start_address: int,
    geometry: ChunkGeometry,
    page_bytes: int,
    trailer_bytes: int,
    all_candidates: bool = False,
    region_bytes: int = -1,
    capacity: int = 1 << 20,
    scan_bytes: int = -1,
) -> MmappedChunks:
    """Chunks with a mapping of their own, by what their headers say.

    Flags are exactly IS_MMAPPED; mapping start (header - prev_size) and end (header + size + ``trailer_bytes``) are
    multiples of ``page_bytes`` inside the memory; the payload's offset within its page is 0 or a power of two, which
    is what munmap_chunk demands (glibc 2.29). ``trailer_bytes``: 0, or two words from glibc 2.43 on.
    ``region_bytes``: length of the stretch where less of it is saved in ``memory``. ``scan_bytes``: look for headers
    in pages that begin in so many bytes only (-1: in all), because the rest is known to hold nothing.

    Greedy: by ascending header, the first that fits is taken and its mapping skipped. memalign leaves the header of
    the chunk that it cut behind; so when a header deeper in the mapping, where memalign would have put it, names the
    same mapping start, the deepest such header counts. ``all_candidates``: every header that fits, overlapping or not.
    """
    if not 1024 <= page_bytes <= 1 << 40 or page_bytes & (page_bytes - 1):
        raise ValueError(f"a page cannot have {page_bytes} bytes")
    if not 0 <= trailer_bytes <= page_bytes or not 0 <= capacity <= OFFSET_LIMIT >> 3:
        raise ValueError("trailer or capacity are too large")
    header_bytes = geometry.header_bytes
    _check_start(start_address)
    if not len(byte_view(memory)) <= (len(byte_view(memory)) if region_bytes < 0 else region_bytes) <= OFFSET_LIMIT:
        raise ValueError(f"a region cannot have {region_bytes} bytes")
    headers = _MmappedHeaders(memory, start_address, geometry, page_bytes, trailer_bytes, region_bytes)
    payload_offsets = []
    payload_offset = geometry.alignment
    while payload_offset < page_bytes:
        payload_offsets.append(payload_offset)
        payload_offset *= 2
    payload_offsets.append(page_bytes)

    found: list[tuple[int, int, int, int]] = []
    resume = start_address
    page = start_address + -start_address % page_bytes
    scanned = headers.saved if scan_bytes < 0 else min(scan_bytes, headers.saved)
    while page - start_address < scanned:
        skip_to = page + page_bytes
        for payload_offset in payload_offsets:
            header = page + payload_offset - header_bytes
            candidate = headers.at(header, start_address if all_candidates else resume)
            if candidate is None:
                continue
            if not all_candidates:
                candidate = _deepest_memaligned(headers, candidate)
                resume = candidate[1] + candidate[2]
                skip_to = resume
            if len(found) == capacity:
                return _mmapped_chunks(found, True)
            found.append(candidate)
            if not all_candidates:
                break
        page = skip_to
    return _mmapped_chunks(found, False)


def _deepest_memaligned(headers: _MmappedHeaders, first: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The chunk that memalign cut out of the mapping of ``first``, or ``first`` itself.

    glibc's memalign moves the payload up to the next multiple of its alignment. Where the space in front would be too
    small for a chunk it takes the one after that, which is the next multiple of twice the alignment.
    """
    deepest = first
    first_header, mapping_start, mapping_bytes, _ = first
    payload = first_header + headers.geometry.header_bytes
    alignment = 2 * headers.geometry.alignment
    while alignment <= mapping_bytes:
        aligned = payload + -payload % alignment
        header = aligned - headers.geometry.header_bytes
        if header > deepest[0]:
            candidate = headers.at(header, mapping_start)
            if candidate is not None and candidate[1] == mapping_start:
                deepest = candidate
        alignment *= 2
    return deepest


def _mmapped_chunks(found: list[tuple[int, int, int, int]], truncated: bool) -> MmappedChunks:
    columns = np.array(found, np.uint64).reshape(len(found), 4).T
    header_address, mapping_start, mapping_bytes, chunk_bytes = (np.ascontiguousarray(column) for column in columns)
    return MmappedChunks(header_address, mapping_start, mapping_bytes, chunk_bytes, truncated)
