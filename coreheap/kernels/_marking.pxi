# Marking without references, for heaps whose references do not fit into memory: the twin of reference/pointers.py.
# Part of _compiled.pyx, which imports all names.

cdef enum:
    VISITS_AT_ONCE = 32


cdef struct Marked:
    uint64_t header
    uint64_t chunk


@cython.final
cdef class _Marker(_Pointers):
    """Marks what marked chunks lead to, and remembers which were visited."""

    cdef uint64_t[::1] marked, interior, visited
    cdef bint follow_interior, overflowed
    cdef int64_t count
    # A ring of chunks that are still to be visited.
    cdef Marked *queue
    cdef int64_t queue_first, queued, queue_room
    # How far the sweep is, while there is one.
    cdef uint64_t sweep_at

    def __dealloc__(self):
        free(self.queue)

    cdef int settle(self, int kept) except -1 nogil:
        cdef Candidate *candidate
        cdef uint64_t target
        cdef bint exact = False
        self.ask_for_marks(self.held - kept)
        while self.held > kept:
            candidate = self.next_candidate()
            target = self.target_of(candidate, &exact)
            if target >= self.chunk_count:
                self.bad_rank = True
            else:
                self.mark(candidate, target, exact)
        return 0

    cdef void ask_for_marks(self, int count) noexcept nogil:
        """Starts to load the marks of the ``count`` oldest that wait."""
        cdef int number, place = self.oldest
        cdef uint64_t target
        cdef bint exact = False
        for number in range(count):
            target = self.target_of(&self.waiting[place], &exact)
            if target < self.chunk_count:
                prefetch(<const uint8_t *>&self.marked[0], <int64_t>(target >> 6 << 3))
                prefetch(self.state, <int64_t>target)
            place = place + 1 if place + 1 < CANDIDATE_RING else 0

    cdef int mark(self, const Candidate *candidate, uint64_t target, bint exact) except -1 nogil:
        cdef int64_t row = <int64_t>(target >> 6), place
        cdef uint64_t bit = <uint64_t>1 << (target & 63)
        if self.marked[row] & bit:
            return 0
        if not exact and not self.follow_interior:
            self.interior[row] |= bit
            return 0
        self.marked[row] |= bit
        self.count += 1
        if target > self.sweep_at:
            # The sweep that is under way comes to it.
            return 0
        if self.queued == self.queue_room:
            self.overflowed = True
            return 0
        place = self.queue_first + self.queued
        if place >= self.queue_room:
            place -= self.queue_room
        self.queue[place].header = self.header_of(candidate, target)
        self.queue[place].chunk = target
        self.queued += 1
        return 0

    cdef uint64_t header_of(self, const Candidate *candidate, uint64_t target) noexcept nogil:
        cdef const uint64_t *rows
        cdef int64_t row, high, middle
        cdef uint64_t starts, granule
        if candidate.row == NULL:
            return self.index.mmapped_header[candidate.region]
        rows = self.rows + 2 * self.region_first_word[candidate.region]
        row = (candidate.row - rows) >> 1
        starts = candidate.row[0] & ((<uint64_t>2 << candidate.bit) - 1)
        if starts == 0:
            # The chunk begins in an earlier row: the last one that has no more than its number of chunks before it.
            high = row
            row = 0
            while row + 1 < high:
                middle = (row + high) >> 1
                if rows[2 * middle + 1] & RANK_MASK <= target:
                    row = middle
                else:
                    high = middle
            starts = rows[2 * row]
        granule = <uint64_t>row << 6
        if starts:
            granule += <uint64_t>bit_length(starts) - 1
        return self.region_start[candidate.region] + (granule << self.granule_shift)

    cdef int visit(self, uint64_t header, uint64_t chunk) except -1 nogil:
        """Reads the chunk that begins at ``header``, if it is in use."""
        cdef Place place
        cdef Stretch stretch
        cdef int64_t number
        self.visited[<int64_t>(chunk >> 6)] |= <uint64_t>1 << (chunk & 63)
        if self.state[chunk] != IN_USE:
            return 0
        stretch.next = header + self.header_bytes
        if self.find_region(header, &place):
            stretch.limit = self.index.end_of(place.region, place.granule) + <uint64_t>self.word
        else:
            number = self.find_mmapped(header)
            if number < 0:
                return 0
            stretch.limit = self.index.mmapped_start[number] + self.index.mmapped_bytes[number]
        while self.find_stretch(&stretch):
            self.offer_words(stretch.at, stretch.words, <int64_t>chunk, 0)
        return 0

    cdef int visit_queued(self) except -1 nogil:
        """Everything that waits, and all that it leads to, until more had to wait than there is room for.

        Chunks are visited in batches, whose memory is asked for at once: each access walks through the page tables, and
        a processor does so for several at a time only where not much else stands between them.
        """
        cdef Marked batch[VISITS_AT_ONCE]
        cdef const uint8_t *wanted[VISITS_AT_ONCE]
        cdef Place place
        cdef uint64_t address
        cdef int count, number
        cdef const uint8_t *file = NULL
        if self.memory.file.shape[0]:
            file = &self.memory.file[0]
        while not self.overflowed:
            if self.queued == 0:
                if self.held == 0:
                    return 0
                self.settle(0)
                continue
            count = <int>min(self.queued, <int64_t>VISITS_AT_ONCE)
            for number in range(count):
                batch[number] = self.queue[self.queue_first]
                self.queue_first = self.queue_first + 1 if self.queue_first + 1 < self.queue_room else 0
                address = batch[number].header + self.header_bytes
                wanted[number] = file
                if self.find_run(address):
                    # Not checked, because prefetching never faults.
                    wanted[number] = <const uint8_t *>(
                        <size_t>file + self.memory.run_file_offset[self.run] + address - self.run_start[self.run]
                    )
            self.queued -= count
            for number in range(count):
                prefetch(wanted[number], 0)
                prefetch(wanted[number], 64)
            for number in range(count):
                prefetch(self.state, <int64_t>batch[number].chunk)
                if self.find_region(batch[number].header, &place):
                    prefetch(<const uint8_t *>self.row_of(&place), 0)
            for number in range(count):
                if self.is_pending(batch[number].chunk):
                    self.visit(batch[number].header, batch[number].chunk)
        return 0

    cdef int sweep(self) except -1 nogil:
        """Reads every chunk that is marked and was not read, in the order of addresses."""
        cdef int64_t region, row, number, chunk
        cdef uint64_t starts, granule
        cdef const uint64_t *rows
        self.queued = 0
        self.overflowed = False
        for region in range(self.region_count):
            rows = self.rows + 2 * self.region_first_word[region]
            for row in range(self.index.words_of(region)):
                starts = rows[2 * row]
                chunk = <int64_t>(rows[2 * row + 1] & RANK_MASK)
                if chunk + popcount(starts) > <int64_t>self.chunk_count:
                    self.bad_rank = True
                    return 0
                if starts == 0 or not (
                    self.has_pending(chunk >> 6) or self.has_pending((chunk + popcount(starts) - 1) >> 6)
                ):
                    continue
                while starts:
                    self.sweep_at = <uint64_t>chunk
                    if self.is_pending(chunk):
                        granule = (<uint64_t>row << 6) + <uint64_t>lowest_bit(starts)
                        self.visit(self.region_start[region] + (granule << self.granule_shift), <uint64_t>chunk)
                    starts &= starts - 1
                    chunk += 1
        for number in range(self.index.mmapped_count):
            self.sweep_at = <uint64_t>(self.index.region_chunks + number)
            if self.is_pending(<int64_t>self.sweep_at):
                self.visit(self.index.mmapped_header[number], self.sweep_at)
        self.sweep_at = self.chunk_count
        return 0

    cdef int mark_all(self) except -1 nogil:
        """Visits what is marked and was not visited, and all that it leads to.

        Few chunks are visited in the order in which they are found, many in the order of their addresses, which is
        faster. Each sweep but the first comes after as many new marks as the queue has room for.
        """
        self.overflowed = True
        while self.overflowed and not self.bad_rank:
            self.sweep()
            self.visit_queued()
        return 0

    cdef inline bint has_pending(self, int64_t row) except? -1 nogil:
        return self.marked[row] & ~self.visited[row] != 0

    cdef inline bint is_pending(self, int64_t chunk) except? -1 nogil:
        return (self.marked[chunk >> 6] & ~self.visited[chunk >> 6]) >> (chunk & 63) & 1


def mark_reachable_directly(
    index,
    memory,
    address_mask,
    const uint32_t[::1] seeds not None,
    uint64_t[::1] marked not None,
    uint64_t[::1] interior not None,
    bint follow_interior,
    int64_t most_waiting=1 << 20,
):
    """See ``reference.mark_reachable_directly``."""
    cdef _Marker marker = _Marker(index, memory, address_mask)
    cdef int64_t number
    cdef uint32_t chunk
    _check_bits_of(index, marked, interior)
    if not 0 < most_waiting <= OFFSET_LIMIT >> 4:
        raise ValueError(f"{most_waiting} chunks cannot wait")
    marker.marked = marked
    marker.interior = interior
    marker.visited = np.array(marked)
    marker.follow_interior = follow_interior
    marker.ahead = 0
    marker.queue = <Marked *>realloc(NULL, <size_t>most_waiting * sizeof(Marked))
    if marker.queue == NULL:
        raise MemoryError(f"no room for {most_waiting} chunks")
    marker.queue_room = most_waiting
    with nogil:
        for number in range(seeds.shape[0]):
            chunk = seeds[number] & CHUNK_MASK
            if chunk >= marker.chunk_count:
                with gil:
                    raise IndexError(f"there is no chunk {chunk}")
            if not marked[chunk >> 6] >> (chunk & 63) & 1:
                marked[chunk >> 6] |= <uint64_t>1 << (chunk & 63)
                marker.count += 1
        if marker.count:
            marker.mark_all()
        if not follow_interior:
            for number in range(marked.shape[0]):
                interior[number] &= ~marked[number]
    marker.check_ranks()
    return marker.count
