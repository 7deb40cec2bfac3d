# Heap structures in plain memory, where nothing points to them: the twin of reference/searching.py.
# Part of _compiled.pyx, which imports all names.


cdef struct Numbers:
    uint64_t *data
    int64_t count
    int64_t room


cdef int _append(Numbers *numbers, uint64_t value) except -1 nogil:
    cdef uint64_t *data
    if numbers.count == numbers.room:
        data = <uint64_t *>realloc(numbers.data, <size_t>(2 * numbers.room + 512) * sizeof(uint64_t))
        if data == NULL:
            with gil:
                raise MemoryError()
        numbers.data = data
        numbers.room = 2 * numbers.room + 512
    numbers.data[numbers.count] = value
    numbers.count += 1
    return 0


cdef object _as_array(const Numbers *numbers):
    """A copy as uint64 array."""
    result = np.empty(numbers.count, np.uint64)
    cdef uint64_t[::1] target = result
    if numbers.count:
        memcpy(&target[0], numbers.data, <size_t>numbers.count * sizeof(uint64_t))
    return result


cdef int _check_start(object start_address) except -1:
    if not 0 <= start_address < ADDRESS_LIMIT:
        raise ValueError(f"no process has memory at {start_address:#x}")
    return 0


cdef int _find_chunk_runs(
    const Region *region,
    uint64_t first_header,
    int64_t candidate,
    int64_t step_bytes,
    int64_t minimum_chunks,
    int64_t capacity,
    uint64_t *leads_nowhere,
    Numbers *rows,
) except -1 nogil:
    """Appends start, end, reason and count of each run; returns whether there were more than ``capacity``."""
    cdef int64_t spare = region.alignment - 2 * region.word
    cdef int64_t offset, end_offset, chunk_count, granule, beyond_header, undo, _undone
    cdef int reason
    cdef Step step
    while _header_is_saved(region, candidate):
        offset = candidate
        end_offset = candidate
        chunk_count = 0
        reason = STOP_BROKEN
        if _size_word(region, candidate) & PREV_INUSE:
            while True:
                # Every offset here comes from a step whose next header was saved, or is the end.
                granule = offset >> region.granule_shift
                if leads_nowhere[granule >> 6] >> (granule & 63) & 1:
                    reason = STOP_BROKEN
                    break
                step = _follow(region, offset)
                reason = step.reason
                end_offset = step.end_offset
                if reason == GOES_ON and _size_word(region, offset) & NON_MAIN_ARENA:
                    reason = STOP_BROKEN
                if reason != GOES_ON:
                    break
                # Marked in advance; taken back where the chain comes to a good end after too few chunks.
                leads_nowhere[granule >> 6] |= <uint64_t>1 << (granule & 63)
                chunk_count += 1
                offset = end_offset
        if reason == STOP_TOP or reason == STOP_FENCEPOSTS_MAIN:
            if chunk_count >= minimum_chunks:
                if rows.count == 4 * capacity:
                    return 1
                if reason == STOP_TOP and not _top_is_possible(region):
                    beyond_header = offset + 2 * region.word
                    end_offset = beyond_header + _to_next(first_header + <uint64_t>beyond_header, step_bytes)
                    end_offset = min(end_offset, region.bytes)
                if (
                    reason == STOP_FENCEPOSTS_MAIN
                    and _to_next(first_header + <uint64_t>(end_offset + spare), step_bytes) == 0
                    and end_offset + spare <= region.bytes
                ):
                    end_offset += spare
                _append(rows, <uint64_t>candidate)
                _append(rows, <uint64_t>end_offset)
                _append(rows, <uint64_t>reason)
                _append(rows, <uint64_t>chunk_count)
                candidate += (end_offset - candidate + step_bytes - 1) // step_bytes * step_bytes
                continue
            undo = candidate
            for _undone in range(chunk_count):
                granule = undo >> region.granule_shift
                leads_nowhere[granule >> 6] &= ~(<uint64_t>1 << (granule & 63))
                undo += <int64_t>(_size_word(region, undo) & ~<uint64_t>FLAGS)
        candidate += step_bytes
    return 0


cdef inline int64_t _to_next(uint64_t address, int64_t step_bytes) noexcept nogil:
    """Bytes from an address up to the next multiple of ``step_bytes``, 0 on one."""
    cdef uint64_t beyond = address % <uint64_t>step_bytes
    return 0 if beyond == 0 else step_bytes - <int64_t>beyond


def find_chunk_runs(
    const uint8_t[::1] memory not None,
    start_address,
    geometry,
    int64_t step_bytes,
    top_offset,
    int64_t minimum_chunks,
    int64_t capacity=4096,
):
    """See ``reference.find_chunk_runs``."""
    cdef Geometry numbers = _read_geometry(geometry)
    cdef Region region
    cdef Numbers rows = Numbers(NULL, 0, 0)
    cdef uint64_t *leads_nowhere = NULL
    cdef uint64_t first_header
    cdef int64_t shift, candidate
    cdef int truncated
    if step_bytes < numbers.alignment or step_bytes % numbers.alignment:
        raise ValueError(f"steps of {step_bytes} bytes are no multiple of {numbers.alignment}")
    if step_bytes > OFFSET_LIMIT or not 0 <= capacity <= OFFSET_LIMIT >> 3:
        raise ValueError("steps or capacity are too large")
    _check_start(start_address)
    shift = (numbers.phase - start_address) % numbers.alignment
    first_header = start_address + shift
    region = _open_region(memory, shift, numbers, top_offset - shift, -1, 0)
    candidate = (numbers.phase - (start_address + shift)) % step_bytes
    try:
        leads_nowhere = <uint64_t *>calloc((region.saved >> region.granule_shift >> 6) + 1, sizeof(uint64_t))
        if leads_nowhere == NULL:
            raise MemoryError()
        with nogil:
            truncated = _find_chunk_runs(
                &region, first_header, candidate, step_bytes, minimum_chunks, capacity, leads_nowhere, &rows
            )
        table = _as_array(&rows).reshape(-1, 4)
    finally:
        free(leads_nowhere)
        free(rows.data)
    return ChunkRuns(
        table[:, 0].astype(np.int64) + shift,
        table[:, 1].astype(np.int64) + shift,
        table[:, 2].astype(np.uint8),
        table[:, 3].astype(np.int64),
        bool(truncated),
    )


ctypedef fused Word:
    uint32_t
    uint64_t

cdef extern from *:
    """
    /* Whether any word of a block points backwards by two words, or by low to low + (1 << shift) - 1 bytes: nearly no
       block has one, and this is all that is done with the others. Without branches, for the vector unit; once more for
       AVX2, which is three times as fast as what every x86-64 has, chosen at run time as popcnt is. */
    #define COREHEAP_BLOCK_WORDS 64
    #define COREHEAP_MAY_HOLD_ANY(name, word_type) \
        static int name(const uint8_t *data, word_type address, word_type low, int shift) { \
            word_type seen = 0; \
            for (int number = 0; number < COREHEAP_BLOCK_WORDS; number++) { \
                word_type word; \
                memcpy(&word, data + number * sizeof word, sizeof word); \
                word_type distance = address + (word_type) (number * sizeof word) - word; \
                seen |= (word_type) ((distance == 2 * sizeof word) | ((word_type) (distance - low) >> shift == 0)); \
            } \
            return seen != 0; \
        }
    COREHEAP_MAY_HOLD_ANY(coreheap_any_of_block_32, uint32_t)
    COREHEAP_MAY_HOLD_ANY(coreheap_any_of_block_64, uint64_t)
    #if defined(__x86_64__) && defined(__GNUC__)
    __attribute__((target("avx2"))) COREHEAP_MAY_HOLD_ANY(coreheap_any_of_block_32_avx2, uint32_t)
    __attribute__((target("avx2"))) COREHEAP_MAY_HOLD_ANY(coreheap_any_of_block_64_avx2, uint64_t)
    static int coreheap_has_avx2 = 0;
    static void coreheap_detect_vectors(void) {
        __builtin_cpu_init();
        coreheap_has_avx2 = __builtin_cpu_supports("avx2") != 0;
    }
    #define COREHEAP_CHOOSE(name, ...) (coreheap_has_avx2 ? name ## _avx2(__VA_ARGS__) : name(__VA_ARGS__))
    #else
    static void coreheap_detect_vectors(void) {}
    #define COREHEAP_CHOOSE(name, ...) name(__VA_ARGS__)
    #endif
    static inline int coreheap_any_of_block(
        const uint8_t *data, uint64_t address, uint64_t low, int shift, int word_bytes
    ) {
        if (word_bytes == 8) return COREHEAP_CHOOSE(coreheap_any_of_block_64, data, address, low, shift);
        return COREHEAP_CHOOSE(coreheap_any_of_block_32, data, (uint32_t) address, (uint32_t) low, shift);
    }
    """
    enum: BLOCK_WORDS "COREHEAP_BLOCK_WORDS"
    void detect_vectors "coreheap_detect_vectors"() nogil
    bint any_of_block "coreheap_any_of_block"(
        const uint8_t *data, uint64_t address, uint64_t low, int shift, int word_bytes
    ) noexcept nogil

detect_vectors()

cdef enum:
    BINMAP_BYTES = 16


cdef inline Word _distance(const uint8_t *data, int64_t number, Word address) noexcept nogil:
    """How far word ``number``, which lies at ``address``, points backwards."""
    cdef Word value
    memcpy(&value, data + number * <int64_t>sizeof(Word), sizeof(Word))
    return address - value


cdef inline uint64_t _interesting(const uint8_t *data, int count, Word address, Word low, Word span) noexcept nogil:
    """A bit for each word of a block that points backwards by two words, or by ``low`` to ``low + span`` bytes."""
    cdef uint64_t found = 0
    cdef Word distance
    cdef int number
    for number in range(count):
        distance = _distance[Word](data, number, address + number * sizeof(Word))
        found |= <uint64_t>((distance == 2 * sizeof(Word)) | (<Word>(distance - low) <= span)) << number
    return found


cdef inline bint _is_pair(const uint8_t *data, int64_t words, int64_t number, Word address) noexcept nogil:
    """Whether two words from ``number`` on, the first at ``address``, both point two words before the first."""
    return (
        0 <= number < words - 1
        and _distance[Word](data, number, address) == 2 * sizeof(Word)
        and _distance[Word](data, number + 1, address) == 2 * sizeof(Word)
    )


cdef inline bint _last_bin_is_empty(const uint8_t *data, int64_t number, Word address) noexcept nogil:
    """Whether the bin before binmap and ``next`` (the word ``number``, at ``address``) is empty or was never set."""
    cdef int64_t last = number - BINMAP_BYTES // <int64_t>sizeof(Word) - 2
    cdef Word bin_address = address - BINMAP_BYTES - 2 * sizeof(Word)
    if last < 0 or _is_pair[Word](data, number, last, bin_address):
        return True
    return (
        _distance[Word](data, last, bin_address) == bin_address
        and _distance[Word](data, last + 1, bin_address) == bin_address
    )


cdef int _scan_words(
    const uint8_t *data,
    int64_t words,
    uint64_t start,
    Word low,
    Word span,
    const uint64_t[::1] deltas,
    int64_t capacity,
    Numbers *pairs,
    Numbers *hits,
) except -1 nogil:
    """``find_arena_candidates`` from an aligned address; returns whether a list was full."""
    cdef Word address, distance
    cdef int64_t block_number, block, number, delta
    cdef uint64_t found
    cdef int count
    cdef int shift = bit_length(span)
    cdef int truncated = 0
    for block_number in range((words + BLOCK_WORDS - 1) // BLOCK_WORDS):
        block = block_number * BLOCK_WORDS
        count = <int>min(BLOCK_WORDS, words - block)
        address = <Word>(start + <uint64_t>block * sizeof(Word))
        # All that is looked for points a little backwards; nearly no word does.
        if count == BLOCK_WORDS and not any_of_block(
            data + block * <int64_t>sizeof(Word), address, low, shift, sizeof(Word)
        ):
            continue
        found = _interesting[Word](data + block * <int64_t>sizeof(Word), count, address, low, span)
        while found:
            number = block + lowest_bit(found)
            found &= found - 1
            address = <Word>(start + <uint64_t>number * sizeof(Word))
            distance = _distance[Word](data, number, address)
            if distance == 2 * sizeof(Word) and _is_pair[Word](data, words, number, address):
                if (
                    _is_pair[Word](data, words, number - 2, <Word>(address - 2 * sizeof(Word)))
                    or _is_pair[Word](data, words, number + 2, <Word>(address + 2 * sizeof(Word)))
                ):
                    if pairs.count < capacity:
                        _append(pairs, start + <uint64_t>number * sizeof(Word))
                    else:
                        truncated = 1
            for delta in range(deltas.shape[0]):
                if deltas[delta] == distance:
                    if not _last_bin_is_empty[Word](data, number, address):
                        break
                    if hits.count < capacity:
                        _append(hits, start + <uint64_t>number * sizeof(Word))
                    else:
                        truncated = 1
                    break
    return truncated


def find_arena_candidates(
    const uint8_t[::1] memory not None,
    start_address,
    int word_bytes,
    const uint64_t[::1] next_deltas not None,
    int64_t capacity=1 << 20,
):
    """See ``reference.find_arena_candidates``."""
    cdef Numbers pairs = Numbers(NULL, 0, 0)
    cdef Numbers hits = Numbers(NULL, 0, 0)
    cdef uint64_t low = 2 * word_bytes
    cdef uint64_t high = 2 * word_bytes
    cdef uint64_t address
    cdef int64_t skipped, words, delta
    cdef const uint8_t *data = NULL
    cdef int truncated = 0
    if word_bytes not in (4, 8):
        raise ValueError(f"a word has 4 or 8 bytes, not {word_bytes}")
    for delta in range(next_deltas.shape[0]):
        if next_deltas[delta] >= 1 << 16:
            raise ValueError("a malloc_state has no field that far from its start")
        low = next_deltas[delta] if delta == 0 else min(low, next_deltas[delta])
        high = next_deltas[delta] if delta == 0 else max(high, next_deltas[delta])
    _check_start(start_address)
    skipped = min(-start_address % word_bytes, memory.shape[0])
    words = (memory.shape[0] - skipped) // word_bytes
    address = start_address + skipped
    try:
        if words:
            data = &memory[skipped]
            with nogil:
                if word_bytes == 8:
                    truncated = _scan_words[uint64_t](
                        data, words, address, low, high - low, next_deltas, capacity, &pairs, &hits
                    )
                else:
                    truncated = _scan_words[uint32_t](
                        data,
                        words,
                        address,
                        <uint32_t>low,
                        <uint32_t>(high - low),
                        next_deltas,
                        capacity,
                        &pairs,
                        &hits,
                    )
        return ArenaCandidates(_as_array(&pairs), _as_array(&hits), bool(truncated))
    finally:
        free(pairs.data)
        free(hits.data)


cdef struct MmappedHeader:
    bint found
    uint64_t header
    uint64_t mapping_start
    uint64_t mapping_bytes
    uint64_t size


cdef struct MmappedSearch:
    const uint8_t *data
    uint64_t saved
    uint64_t scanned
    uint64_t start
    uint64_t end
    uint64_t page
    uint64_t trailer
    Geometry geometry


cdef inline MmappedHeader _mmapped_header_at(
    const MmappedSearch *search, uint64_t header, uint64_t lowest_start
) noexcept nogil:
    """Whether the header of an mmapped chunk lies here, and what it says."""
    cdef MmappedHeader result
    cdef uint64_t offset, size_word, lead, header_bytes = 2 * search.geometry.word
    cdef uint64_t left
    result.found = False
    if header < search.start or search.saved < header_bytes:
        return result
    offset = header - search.start
    if offset > search.saved - header_bytes:
        return result
    size_word = load(search.data + offset + search.geometry.word, search.geometry.word)
    if size_word & FLAGS != IS_MMAPPED:
        return result
    result.size = size_word & ~<uint64_t>FLAGS
    if result.size < search.geometry.minimum:
        return result
    lead = load(search.data + offset, search.geometry.word)
    if search.trailer:
        lead &= ~<uint64_t>1
    if header < lowest_start or lead > header - lowest_start:
        return result
    result.mapping_start = header - lead
    if result.mapping_start & (search.page - 1):
        return result
    left = search.end - header
    if left < search.trailer or result.size > left - search.trailer:
        return result
    result.mapping_bytes = lead + result.size + search.trailer
    if result.mapping_bytes & (search.page - 1):
        return result
    result.header = header
    result.found = True
    return result


cdef inline MmappedHeader _deepest_memaligned(const MmappedSearch *search, MmappedHeader first) noexcept nogil:
    """As in the reference."""
    cdef MmappedHeader deepest = first
    cdef MmappedHeader candidate
    cdef uint64_t header_bytes = 2 * search.geometry.word
    cdef uint64_t payload = first.header + header_bytes
    cdef uint64_t alignment = 2 * search.geometry.alignment
    cdef uint64_t aligned, header
    while alignment <= first.mapping_bytes:
        aligned = (payload + alignment - 1) & ~(alignment - 1)
        header = aligned - header_bytes
        if header > deepest.header:
            candidate = _mmapped_header_at(search, header, first.mapping_start)
            if candidate.found and candidate.mapping_start == first.mapping_start:
                deepest = candidate
        alignment *= 2
    return deepest


cdef int _find_mmapped(
    const MmappedSearch *search, bint all_candidates, int64_t capacity, Numbers *found
) except -1 nogil:
    """Appends header, mapping start, mapping bytes and size of each; returns whether ``capacity`` was too little."""
    cdef uint64_t header_bytes = 2 * search.geometry.word
    cdef uint64_t resume = search.start
    cdef uint64_t page = (search.start + search.page - 1) & ~(search.page - 1)
    cdef uint64_t payload_offset, skip_to
    cdef MmappedHeader candidate
    while page - search.start < search.scanned:
        skip_to = page + search.page
        payload_offset = search.geometry.alignment
        while payload_offset <= search.page:
            candidate = _mmapped_header_at(
                search, page + payload_offset - header_bytes, search.start if all_candidates else resume
            )
            payload_offset *= 2
            if not candidate.found:
                continue
            if not all_candidates:
                candidate = _deepest_memaligned(search, candidate)
                resume = candidate.mapping_start + candidate.mapping_bytes
                skip_to = resume
            if found.count == 4 * capacity:
                return 1
            _append(found, candidate.header)
            _append(found, candidate.mapping_start)
            _append(found, candidate.mapping_bytes)
            _append(found, candidate.size)
            if not all_candidates:
                break
        page = skip_to
    return 0


def find_mmapped_chunks(
    const uint8_t[::1] memory not None,
    start_address,
    geometry,
    int64_t page_bytes,
    int64_t trailer_bytes,
    bint all_candidates=False,
    region_bytes=-1,
    int64_t capacity=1 << 20,
    int64_t scan_bytes=-1,
):
    """See ``reference.find_mmapped_chunks``."""
    cdef MmappedSearch search
    cdef Numbers found = Numbers(NULL, 0, 0)
    cdef int truncated = 0
    if page_bytes < 1024 or page_bytes > 1 << 40 or page_bytes & (page_bytes - 1):
        raise ValueError(f"a page cannot have {page_bytes} bytes")
    if not 0 <= trailer_bytes <= page_bytes or not 0 <= capacity <= OFFSET_LIMIT >> 3:
        raise ValueError("trailer or capacity are too large")
    _check_start(start_address)
    if region_bytes > OFFSET_LIMIT:
        raise ValueError(f"a region cannot have {region_bytes} bytes")
    search.geometry = _read_geometry(geometry)
    search.saved = memory.shape[0]
    search.start = start_address
    search.end = search.start + search.saved if region_bytes < 0 else search.start + <uint64_t>region_bytes
    if search.end < search.start + search.saved:
        raise ValueError(f"{search.saved} bytes of memory for a region of {region_bytes}")
    search.scanned = search.saved if scan_bytes < 0 else min(<uint64_t>scan_bytes, search.saved)
    search.page = page_bytes
    search.trailer = trailer_bytes
    try:
        if search.saved:
            search.data = &memory[0]
            with nogil:
                truncated = _find_mmapped(&search, all_candidates, capacity, &found)
        table = _as_array(&found).reshape(-1, 4)
    finally:
        free(found.data)
    return MmappedChunks(*(np.ascontiguousarray(table[:, column]) for column in range(4)), bool(truncated))
