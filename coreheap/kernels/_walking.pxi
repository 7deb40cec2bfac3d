# From the bytes of a region to its chunks: the twin of reference/walking.py.
# Part of _compiled.pyx, which imports all names.


cdef struct WalkState:
    int64_t chunk_count
    int64_t anomaly_count
    int64_t end_offset
    int reason


cdef inline int _report(
    int64_t[:, ::1] anomalies, WalkState *walk, int anomaly, int64_t offset
) except -1 nogil:
    if walk.anomaly_count < anomalies.shape[0]:
        anomalies[walk.anomaly_count, 0] = anomaly
        anomalies[walk.anomaly_count, 1] = offset
    walk.anomaly_count += 1
    return 0


cdef inline int _set_chunk(
    const Region *region,
    uint64_t[:, ::1] start_bits,
    uint8_t[::1] states,
    WalkState *walk,
    int64_t offset,
    int state,
) except -1 nogil:
    cdef int64_t granule = offset >> region.granule_shift
    start_bits[granule >> 6, 0] |= <uint64_t>1 << (granule & 63)
    states[walk.chunk_count] = <uint8_t>state
    walk.chunk_count += 1
    return 0


cdef inline int _walk(
    Region region,
    int word,
    uint64_t[:, ::1] start_bits,
    uint8_t[::1] states,
    uint64_t arena_flag,
    int64_t[:, ::1] anomalies,
    int64_t offset,
    WalkState *walk,
) except -1 nogil:
    """``walk_region`` from an offset whose header is saved. ``word`` is the region's, a constant for the compiler."""
    cdef uint64_t size_word, size, next_word, previous_word = 0, is_free
    cdef int64_t next_offset, second, marker_end
    cdef int64_t capacity = states.shape[0]
    cdef int64_t last_header = region.saved - 2 * word
    cdef int64_t limit = region.bytes if region.stop_offset < 0 else region.stop_offset
    cdef uint64_t off_granule = region.alignment - 1
    cdef int fenceposts, needed
    cdef bint after_fencepost
    walk.end_offset = offset

    while True:
        # The loop over ordinary chunks: the header at ``offset`` is saved, offset <= limit.
        size_word = load(region.data + offset + word, word)
        while True:
            size = size_word & ~<uint64_t>FLAGS
            if size < region.minimum or size & off_granule or size > <uint64_t>(limit - offset):
                break
            next_offset = offset + <int64_t>size
            if next_offset > last_header or walk.chunk_count >= capacity:
                break
            prefetch(region.data + next_offset, PREFETCH_BYTES)
            next_word = load(region.data + next_offset + word, word)
            is_free = ~next_word & PREV_INUSE
            if (
                (is_free and load(region.data + next_offset, word) != size)
                or is_free & ~size_word
                or size_word & IS_MMAPPED
                or (not is_free and (size_word ^ arena_flag) & NON_MAIN_ARENA)
            ):
                if is_free:
                    if load(region.data + next_offset, word) != size:
                        _report(anomalies, walk, PREV_SIZE_MISMATCH, offset)
                    if previous_word and not size_word & PREV_INUSE:
                        _report(anomalies, walk, ADJACENT_FREE, offset)
                if size_word & IS_MMAPPED:
                    _report(anomalies, walk, MMAPPED_FLAG_INSIDE, offset)
                if (
                    not is_free
                    and (size_word ^ arena_flag) & NON_MAIN_ARENA
                    and not (next_word == END_MARKER and _is_short_fencepost(&region, size_word))
                ):
                    _report(anomalies, walk, ARENA_FLAG_MISMATCH, offset)
            _set_chunk(&region, start_bits, states, walk, offset, FREE_UNLISTED if is_free else IN_USE)
            previous_word = size_word
            size_word = next_word
            offset = next_offset

        # Whatever is not an ordinary chunk with a successor.
        walk.end_offset = offset
        if offset == region.stop_offset:
            if walk.chunk_count >= capacity:
                walk.reason = STOP_NO_ROOM
                return 0
            if previous_word and not size_word & PREV_INUSE:
                _report(anomalies, walk, FREE_BEFORE_TOP, offset - <int64_t>(previous_word & ~<uint64_t>FLAGS))
            if size != <uint64_t>(region.bytes - offset):
                _report(anomalies, walk, TOP_SIZE_MISMATCH, offset)
            _set_chunk(&region, start_bits, states, walk, offset, TOP)
            walk.end_offset = _top_end(&region)
            walk.reason = STOP_TOP
            return 0

        if not _size_is_possible(&region, offset, size):
            fenceposts = _fenceposts_at(&region, offset)
            if fenceposts != GOES_ON:
                second = offset + 2 * word
                needed = 1 if <uint64_t>second & off_granule else 2
                if walk.chunk_count + needed > capacity:
                    walk.reason = STOP_NO_ROOM
                    return 0
                _set_chunk(&region, start_bits, states, walk, offset, FENCEPOST)
                if needed == 2:
                    _set_chunk(&region, start_bits, states, walk, second, FENCEPOST)
                walk.end_offset = _end_of_fenceposts(&region, second + 2 * word)
                walk.reason = fenceposts
                return 0
            if size_word == END_MARKER:
                marker_end = _end_of_fenceposts(&region, offset + 2 * word)
                after_fencepost = _is_short_fencepost(&region, previous_word)
                if after_fencepost or marker_end == region.bytes:
                    if walk.chunk_count >= capacity:
                        walk.reason = STOP_NO_ROOM
                        return 0
                    if after_fencepost:
                        states[walk.chunk_count - 1] = FENCEPOST
                    else:
                        _report(anomalies, walk, MARKER_WITHOUT_FENCEPOST, offset)
                    _set_chunk(&region, start_bits, states, walk, offset, FENCEPOST)
                    walk.end_offset = marker_end
                    walk.reason = STOP_FENCEPOSTS_HEAP
                    return 0
            walk.reason = STOP_BROKEN
            return 0

        if walk.chunk_count >= capacity:
            walk.reason = STOP_NO_ROOM
            return 0
        next_offset = offset + <int64_t>size
        if next_offset != region.bytes:
            walk.reason = STOP_CUT
            return 0
        # The last chunk of a region without top: nothing says that it is free.
        if size_word & IS_MMAPPED:
            _report(anomalies, walk, MMAPPED_FLAG_INSIDE, offset)
        if (size_word ^ arena_flag) & NON_MAIN_ARENA:
            _report(anomalies, walk, ARENA_FLAG_MISMATCH, offset)
        _set_chunk(&region, start_bits, states, walk, offset, IN_USE)
        walk.end_offset = next_offset
        walk.reason = STOP_END
        return 0


def walk_region(
    const uint8_t[::1] memory not None,
    geometry,
    stop_offset,
    uint64_t[:, ::1] start_bits not None,
    uint8_t[::1] states not None,
    bint non_main,
    int64_t[:, ::1] anomalies not None,
    first_offset=0,
    region_bytes=-1,
):
    """See ``reference.walk_region``."""
    cdef Geometry numbers = _read_geometry(geometry)
    cdef Region region = _open_region(memory, 0, numbers, stop_offset, region_bytes, first_offset)
    cdef int64_t offset = first_offset
    cdef WalkState walk = WalkState(0, 0, offset, STOP_CUT)
    cdef uint64_t arena_flag = NON_MAIN_ARENA if non_main else 0
    if start_bits.shape[0] * GRANULES_PER_WORD * numbers.alignment < region.bytes:
        raise ValueError("the lookup has too few rows for the region")
    if start_bits.shape[1] != 2 or (anomalies.shape[0] and anomalies.shape[1] != 2):
        raise ValueError("rows of the lookup and of anomalies have two columns")
    if offset == region.bytes:
        walk.reason = STOP_END
    elif offset < region.bytes and _header_is_saved(&region, offset):
        with nogil:
            if offset == 0 and not _size_word(&region, 0) & PREV_INUSE:
                _report(anomalies, &walk, FIRST_CHUNK_PREVIOUS_FREE, 0)
            if region.word == 8:
                _walk(region, 8, start_bits, states, arena_flag, anomalies, offset, &walk)
            else:
                _walk(region, 4, start_bits, states, arena_flag, anomalies, offset, &walk)
    return WalkOutcome(walk.chunk_count, walk.end_offset, _STOP_REASONS[walk.reason], walk.anomaly_count)


def chain_reaches(
    const uint8_t[::1] memory not None,
    geometry,
    offset,
    stop_offset,
    limit,
    region_bytes=-1,
):
    """See ``reference.chain_reaches``."""
    cdef Region region = _open_region(memory, 0, _read_geometry(geometry), stop_offset, region_bytes, offset)
    cdef int64_t at = offset
    cdef int64_t most = max(0, min(limit, OFFSET_LIMIT))
    cdef int64_t chunk_count = 0
    cdef Step step
    if at > region.bytes:
        return ChainOutcome(at, _STOP_REASONS[STOP_CUT], 0)
    with nogil:
        while True:
            step = _follow(&region, at)
            if step.reason != GOES_ON:
                break
            if chunk_count >= most:
                step.reason = STOP_LIMIT
                step.end_offset = at
                break
            chunk_count += 1
            at = step.end_offset
    return ChainOutcome(step.end_offset, _STOP_REASONS[step.reason], chunk_count)


cdef int64_t _resynchronise(
    const Region *region, int64_t first_offset, int proof_chunks, uint8_t *chunks_from
) noexcept nogil:
    """``chunks_from`` has a zeroed byte for each granule that is saved."""
    cdef int64_t path[256]
    cdef int64_t candidate = first_offset + region.alignment
    cdef int64_t offset
    cdef int passed, known, back
    cdef Step step
    while candidate < region.bytes and _header_is_saved(region, candidate):
        passed = 0
        offset = candidate
        while True:
            # An offset beyond the saved headers has no note: nothing can be known about it.
            known = chunks_from[offset >> region.granule_shift] if _header_is_saved(region, offset) else 0
            if known:
                break
            step = _follow(region, offset)
            if step.reason == STOP_TOP or step.reason == STOP_END:
                return candidate
            if (step.reason == STOP_FENCEPOSTS_HEAP or step.reason == STOP_FENCEPOSTS_MAIN) and (
                passed or step.end_offset == region.bytes
            ):
                return candidate
            if step.reason != GOES_ON:
                break
            path[passed] = offset
            passed += 1
            if passed >= proof_chunks:
                return candidate
            offset = step.end_offset
        if passed + known >= proof_chunks:
            return candidate
        for back in range(1, passed + 1):
            chunks_from[path[passed - back] >> region.granule_shift] = <uint8_t>(known + back)
        candidate += region.alignment
    return -1


def _without_huge_pages(pages):
    """A note here and there should not clear two megabytes each."""
    try:
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:
        pass  # a kernel without them


def resynchronise(
    const uint8_t[::1] memory not None,
    geometry,
    first_offset,
    stop_offset,
    region_bytes=-1,
    int64_t proof_chunks=64,
):
    """See ``reference.resynchronise``."""
    cdef Region region = _open_region(memory, 0, _read_geometry(geometry), stop_offset, region_bytes, first_offset)
    cdef int64_t found, first = first_offset
    cdef uint8_t[::1] chunks_from
    if not 1 <= proof_chunks <= 250:
        raise ValueError(f"a chain of {proof_chunks} chunks cannot be asked for")
    # Zero pages of the system: only notes that are taken cost time and memory, which calloc does not promise.
    pages = mmap.mmap(-1, (region.saved >> region.granule_shift) + 1)
    try:
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            _without_huge_pages(pages)
        chunks_from = pages
        with nogil:
            found = _resynchronise(&region, first, <int>proof_chunks, &chunks_from[0])
        chunks_from = None
    finally:
        pages.close()
    return found
