# Free chunks that lie side by side: the twin of reference/free_runs.py.
# Part of _compiled.pyx, which imports all names.


@cython.final
cdef class _FreeRunColumns:
    """The runs that were found, and the one that is being followed."""

    cdef uint64_t[::1] start
    cdef uint64_t[::1] end
    cdef int64_t[::1] first_chunk
    cdef int64_t[::1] end_chunk
    cdef uint64_t[::1] bytes_before
    cdef int64_t[::1] count_before
    cdef uint8_t[::1] has_top
    cdef int64_t rows
    cdef const uint8_t[::1] state
    cdef uint64_t state_mask
    cdef uint64_t page_bytes
    cdef uint64_t region_end
    cdef uint64_t free_bytes
    cdef uint64_t largest
    cdef int64_t free_count
    cdef int64_t run_count
    cdef bint is_in_run
    cdef bint run_has_top
    cdef uint64_t run_start
    cdef uint64_t run_bytes_before
    cdef int64_t run_chunk
    cdef int64_t run_count_before

    cdef inline int add(self, int64_t chunk, uint64_t header, uint64_t chunk_bytes) except -1 nogil:
        cdef int state = self.state[chunk] & (STATE_SLOTS - 1)
        if not self.state_mask >> state & 1:
            if self.is_in_run:
                self.close(header, chunk)
            return 0
        if not self.is_in_run:
            self.is_in_run = True
            self.run_has_top = False
            self.run_start = header
            self.run_chunk = chunk
            self.run_bytes_before = self.free_bytes
            self.run_count_before = self.free_count
            self.run_count += 1
        self.free_bytes += chunk_bytes
        self.free_count += 1
        if state == TOP:
            self.run_has_top = True
        elif chunk_bytes > self.largest:
            self.largest = chunk_bytes
        return 0

    cdef int close(self, uint64_t end, int64_t end_chunk) except -1 nogil:
        cdef uint64_t page_mask = self.page_bytes - 1
        self.is_in_run = False
        if ((self.run_start + page_mask) & ~page_mask) + self.page_bytes > end:
            if not self.run_has_top or end != self.region_end:
                return 0
        self.start[self.rows] = self.run_start
        self.end[self.rows] = end
        self.first_chunk[self.rows] = self.run_chunk
        self.end_chunk[self.rows] = end_chunk
        self.bytes_before[self.rows] = self.run_bytes_before
        self.count_before[self.rows] = self.run_count_before
        self.has_top[self.rows] = self.run_has_top
        self.rows += 1
        return 0


def find_free_runs(index, int64_t region, state_mask, page_bytes):
    """See ``reference.find_free_runs``."""
    cdef _Index columns = _Index(index)
    cdef _FreeRunColumns runs = _FreeRunColumns.__new__(_FreeRunColumns)
    cdef int64_t row, words, first_row, chunk
    cdef uint64_t start_bits, granule, region_start, previous = 0
    cdef int shift = columns.geometry.granule_shift
    cdef const uint8_t[::1] state = index.state
    cdef uint64_t mask = state_mask & 0xFFFF
    cdef bint is_in_run = False
    if not 1 << 9 <= page_bytes <= 1 << 30 or page_bytes & (page_bytes - 1):
        raise ValueError(f"a page cannot have {page_bytes} bytes")
    _check_rows(columns, region, 0, 0)
    # Each run but the last holds a page of its own. What is not written to is not allocated by the system.
    room = int((columns.region_end[region] - columns.region_start[region]) // page_bytes) + 1
    unsigned = [np.empty(room, np.uint64) for _ in range(3)]
    signed = [np.empty(room, np.int64) for _ in range(3)]
    tops_in = np.empty(room, np.uint8)
    runs.start, runs.end, runs.bytes_before = unsigned
    runs.first_chunk, runs.end_chunk, runs.count_before = signed
    runs.has_top = tops_in
    runs.state = index.state
    runs.state_mask = mask
    runs.page_bytes = page_bytes
    runs.region_end = columns.region_end[region]
    with nogil:
        words = columns.words_of(region)
        first_row = columns.region_first_word[region]
        region_start = columns.region_start[region]
        # Chunk ``chunk`` starts at granule ``previous``; it is added when the next start is found.
        chunk = <int64_t>(columns.lookup[first_row, 1] & RANK_MASK) - 1
        for row in range(words):
            start_bits = columns.lookup[first_row + row, 0]
            while start_bits:
                granule = (<uint64_t>row << 6) + <uint64_t>lowest_bit(start_bits)
                start_bits &= start_bits - 1
                # Most chunks are in use behind others in use: nothing is to be done for them.
                if granule and (is_in_run or mask >> (state[chunk] & (STATE_SLOTS - 1)) & 1):
                    runs.add(chunk, region_start + (previous << shift), (granule - previous) << shift)
                    is_in_run = runs.is_in_run
                chunk += 1
                previous = granule
        previous = region_start + (previous << shift)
        runs.add(chunk, previous, columns.region_end[region] - previous)
        if runs.is_in_run:
            runs.close(columns.region_end[region], chunk + 1)
    rows = slice(0, runs.rows)
    # Copies: the room was for the worst case.
    return FreeRuns(
        start=unsigned[0][rows].copy(),
        end=unsigned[1][rows].copy(),
        first_chunk=signed[0][rows].copy(),
        end_chunk=signed[1][rows].copy(),
        free_bytes_before=unsigned[2][rows].copy(),
        free_count_before=signed[2][rows].copy(),
        has_top=tops_in[rows].astype(np.bool_),
        run_count=runs.run_count,
        free_count=runs.free_count,
        free_bytes=runs.free_bytes,
        largest_bytes=runs.largest,
    )
