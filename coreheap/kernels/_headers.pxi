# Chunk headers of one region, and the rules that all walks share: the twin of reference/_region.py.
# Part of _compiled.pyx, which imports all names.


cdef struct Geometry:
    int word
    int64_t alignment
    int granule_shift
    uint64_t minimum
    uint64_t phase


cdef struct Region:
    const uint8_t *data
    int64_t saved
    int64_t bytes
    int64_t stop_offset
    int word
    int64_t alignment
    int granule_shift
    uint64_t minimum


cdef struct Step:
    int reason
    int64_t end_offset


cdef Geometry _read_geometry(object geometry) except *:
    """The numbers of a ``ChunkGeometry``, which has checked them."""
    cdef Geometry numbers
    numbers.word = geometry.word_bytes
    numbers.alignment = geometry.alignment
    numbers.minimum = geometry.minimum_chunk_bytes
    numbers.phase = geometry.granule_phase
    if numbers.word not in (4, 8) or numbers.alignment not in (8, 16):
        raise ValueError("not a ChunkGeometry")
    numbers.granule_shift = 3 if numbers.alignment == 8 else 4
    return numbers


cdef Region _open_region(
    const uint8_t[::1] memory,
    int64_t shift,
    Geometry geometry,
    object stop_offset,
    object region_bytes,
    object first_offset,
) except *:
    """The headers of a region whose memory begins ``shift`` bytes into ``memory``."""
    cdef Region region
    region.saved = max(memory.shape[0] - shift, 0)
    region.data = NULL
    if region.saved:
        region.data = &memory[shift]
    if region_bytes > OFFSET_LIMIT:
        raise ValueError(f"a region cannot have {region_bytes} bytes")
    region.bytes = region.saved if region_bytes < 0 else region_bytes
    if region.saved > region.bytes:
        raise ValueError(f"{region.saved} bytes of memory for a region of {region.bytes}")
    if not 0 <= first_offset <= OFFSET_LIMIT or first_offset % geometry.alignment:
        raise ValueError(f"no chunk header can lie at offset {first_offset}")
    region.stop_offset = -1
    if first_offset <= stop_offset < region.bytes and stop_offset % geometry.alignment == 0:
        region.stop_offset = stop_offset
    region.word = geometry.word
    region.alignment = geometry.alignment
    region.granule_shift = geometry.granule_shift
    region.minimum = geometry.minimum
    return region


cdef inline bint _header_is_saved(const Region *region, int64_t offset) noexcept nogil:
    return offset <= region.saved - 2 * region.word


cdef inline uint64_t _size_word(const Region *region, int64_t offset) noexcept nogil:
    return load(region.data + offset + region.word, region.word)


cdef inline bint _size_is_possible(const Region *region, int64_t offset, uint64_t size) noexcept nogil:
    cdef int64_t limit = region.stop_offset if offset <= region.stop_offset else region.bytes
    return (
        size >= region.minimum
        and size & <uint64_t>(region.alignment - 1) == 0
        and offset <= limit
        and size <= <uint64_t>(limit - offset)
    )


cdef inline int64_t _end_of_fenceposts(const Region *region, int64_t offset) noexcept nogil:
    cdef int64_t spare = region.alignment - 2 * region.word
    return offset + spare if offset + spare == region.bytes else offset


cdef inline int _fenceposts_at(const Region *region, int64_t offset) noexcept nogil:
    """FENCEPOSTS_HEAP, FENCEPOSTS_MAIN, or GOES_ON where there are none."""
    cdef uint64_t two_words = 2 * region.word
    cdef uint64_t second
    if _size_word(region, offset) & ~<uint64_t>FLAGS != two_words:
        return GOES_ON
    if not _header_is_saved(region, offset + 2 * region.word):
        return GOES_ON
    second = _size_word(region, offset + 2 * region.word)
    if second == END_MARKER:
        return STOP_FENCEPOSTS_HEAP
    return STOP_FENCEPOSTS_MAIN if second & ~<uint64_t>FLAGS == two_words else GOES_ON


cdef inline bint _is_short_fencepost(const Region *region, uint64_t size_word) noexcept nogil:
    cdef uint64_t size = 2 * region.word + region.alignment
    return size_word & ~<uint64_t>FLAGS == size and not size_word & NON_MAIN_ARENA


cdef inline bint _top_is_possible(const Region *region) noexcept nogil:
    cdef uint64_t size = _size_word(region, region.stop_offset) & ~<uint64_t>FLAGS
    return size >= <uint64_t>(2 * region.word) and size <= <uint64_t>(region.bytes - region.stop_offset)


cdef inline int64_t _top_end(const Region *region) noexcept nogil:
    if not _top_is_possible(region):
        return region.bytes
    return region.stop_offset + <int64_t>(_size_word(region, region.stop_offset) & ~<uint64_t>FLAGS)


cdef inline Step _follow(const Region *region, int64_t offset) noexcept nogil:
    """One step of a chain, as in the reference; GOES_ON stands for its None."""
    cdef Step step
    cdef uint64_t size_word, size, next_word
    cdef int64_t next_offset
    cdef int fenceposts
    step.end_offset = offset
    if offset == region.bytes:
        step.reason = STOP_END
        return step
    if not _header_is_saved(region, offset):
        step.reason = STOP_CUT
        return step
    if offset == region.stop_offset:
        step.reason = STOP_TOP
        step.end_offset = _top_end(region)
        return step
    size_word = _size_word(region, offset)
    size = size_word & ~<uint64_t>FLAGS
    if not _size_is_possible(region, offset, size):
        fenceposts = _fenceposts_at(region, offset)
        if fenceposts != GOES_ON:
            step.reason = fenceposts
            step.end_offset = _end_of_fenceposts(region, offset + 4 * region.word)
            return step
        next_offset = _end_of_fenceposts(region, offset + 2 * region.word)
        if size_word == END_MARKER and next_offset == region.bytes:
            step.reason = STOP_FENCEPOSTS_HEAP
            step.end_offset = next_offset
            return step
        step.reason = STOP_BROKEN
        return step
    if size_word & IS_MMAPPED:
        step.reason = STOP_BROKEN
        return step
    next_offset = offset + <int64_t>size
    if next_offset != region.bytes:
        if not _header_is_saved(region, next_offset):
            step.reason = STOP_CUT
            return step
        prefetch(region.data + next_offset, PREFETCH_BYTES)
        next_word = _size_word(region, next_offset)
        if not next_word & PREV_INUSE and load(region.data + next_offset, region.word) != size:
            step.reason = STOP_BROKEN
            return step
        if next_word == END_MARKER and _is_short_fencepost(region, size_word):
            step.reason = STOP_FENCEPOSTS_HEAP
            step.end_offset = _end_of_fenceposts(region, next_offset + 2 * region.word)
            return step
    step.reason = GOES_ON
    step.end_offset = next_offset
    return step
