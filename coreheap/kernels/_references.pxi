# What follows from references: the twin of reference/references.py.
# Part of _compiled.pyx, which imports all names.

cdef enum:
    FEW_VISITS = 4
    SAMPLE_SHIFT = 9
    VISITS_AHEAD = 32
    TARGETS_AHEAD = 64

ctypedef fused offset_t:
    uint32_t
    uint64_t


@cython.final
cdef class _Stack:
    """Chunks that are still to be visited; memory comes as it is needed."""

    cdef ChunkNumbers waiting

    def __dealloc__(self):
        free(self.waiting.data)


@cython.final
cdef class _Search:
    """What a search through references reads and writes.

    Plain pointers, whose arrays the caller keeps. Every number from the references is compared with ``chunk_count``
    before it is followed, and every offset with ``target_count``: the arrays have at least so many elements.
    """

    cdef const uint32_t *first32
    cdef const uint64_t *first64
    # Every 512th of ``first``, and the last: few enough to stay in the cache.
    cdef const uint32_t[::1] samples32
    cdef const uint64_t[::1] samples64
    cdef const uint32_t *target
    cdef uint64_t target_count
    cdef uint32_t chunk_count
    cdef bint follow_interior
    cdef uint64_t *marked
    cdef uint64_t *interior
    # The chunks that are met get this number there, where it is not NULL.
    cdef uint32_t *number_of
    cdef uint32_t number
    cdef int64_t count
    cdef ChunkNumbers waiting

    def __dealloc__(self):
        free(self.waiting.data)

    cdef int set_up(self, edges, uint64_t[::1] marked) except -1:
        """Takes references and marks, one bit a chunk; raises ValueError where they do not fit."""
        cdef const uint32_t[::1] target = edges.target, narrow
        cdef const uint64_t[::1] wide
        _check_edges(edges)
        _check_bits(edges, marked)
        if edges.first.dtype == np.uint32:
            narrow = edges.first
            self.first32 = &narrow[0]
            self.samples32 = np.append(edges.first[:: 1 << SAMPLE_SHIFT], edges.first[-1:])
        else:
            wide = edges.first
            self.first64 = &wide[0]
            self.samples64 = np.append(edges.first[:: 1 << SAMPLE_SHIFT], edges.first[-1:])
        self.chunk_count = edges.chunk_count
        self.target_count = target.shape[0]
        if self.target_count:
            self.target = &target[0]
        if self.chunk_count:
            self.marked = &marked[0]
        return 0

    cdef inline int meet(self, uint32_t word) except -1 nogil:
        """Marks the chunk that a reference leads to, and has it wait for its visit."""
        cdef uint32_t chunk = word & CHUNK_MASK
        cdef uint64_t bit = <uint64_t>1 << (chunk & 63)
        if chunk >= self.chunk_count:
            with gil:
                raise IndexError(f"there is no chunk {chunk}")
        if self.marked[chunk >> 6] & bit:
            return 0
        if word & INTERIOR and not self.follow_interior:
            self.interior[chunk >> 6] |= bit
            return 0
        self.marked[chunk >> 6] |= bit
        self.count += 1
        if self.number_of != NULL:
            self.number_of[chunk] = self.number
        return _put(&self.waiting, chunk)

    cdef int visit_all(self) except -1 nogil:
        """Visits what waits, and all that it leads to."""
        if self.first32 != NULL:
            return _visit_all[uint32_t](self, self.first32, &self.samples32[0])
        return _visit_all[uint64_t](self, self.first64, &self.samples64[0])


cdef int _visit_all(_Search search, const offset_t *first, const offset_t *samples) except -1 nogil:
    """A chunk goes from the stack to ``ahead`` when its row is asked for, and is visited some chunks later; then its
    targets go to ``met`` when their marks are asked for, and are looked at some targets later.

    Along a list there is never more than one to ask for. There the row is guessed from the samples, and asked for
    together with its offset: one wait for the memory instead of two.
    """
    cdef uint32_t ahead[VISITS_AHEAD]
    cdef uint32_t met[TARGETS_AHEAD]
    cdef int oldest = 0, held = 0
    cdef uint32_t oldest_met = 0, held_met = 0
    cdef uint32_t chunk, word
    cdef uint64_t position, end
    while True:
        while held < VISITS_AHEAD and search.waiting.count:
            search.waiting.count -= 1
            chunk = search.waiting.data[search.waiting.count]
            prefetch(<const uint8_t *>&first[chunk], 0)
            if held < FEW_VISITS:
                # Prefetching never faults, whatever the offset.
                position = samples[chunk >> SAMPLE_SHIFT]
                position += (<uint64_t>samples[(chunk >> SAMPLE_SHIFT) + 1] - position) * (
                    chunk & ((1 << SAMPLE_SHIFT) - 1)
                ) >> SAMPLE_SHIFT
                prefetch(<const uint8_t *>search.target, <int64_t>(position * sizeof(uint32_t)))
            ahead[(oldest + held) & (VISITS_AHEAD - 1)] = chunk
            held += 1
            if held > VISITS_AHEAD // 2:
                chunk = ahead[(oldest + held - VISITS_AHEAD // 2) & (VISITS_AHEAD - 1)]
                prefetch(<const uint8_t *>search.target, <int64_t>(<uint64_t>first[chunk] * sizeof(uint32_t)))
        if not held:
            if not held_met:
                return 0
            while held_met:
                search.meet(met[oldest_met & (TARGETS_AHEAD - 1)])
                oldest_met += 1
                held_met -= 1
            continue
        chunk = ahead[oldest]
        oldest = (oldest + 1) & (VISITS_AHEAD - 1)
        held -= 1
        position = first[chunk]
        end = first[chunk + 1]
        if end > search.target_count:
            with gil:
                raise IndexError(f"chunk {chunk} has no references up to {end}")
        while position < end:
            word = search.target[position]
            position += 1
            prefetch(<const uint8_t *>search.marked, (word & CHUNK_MASK) >> 6 << 3)
            if held_met == TARGETS_AHEAD:
                search.meet(met[oldest_met & (TARGETS_AHEAD - 1)])
                oldest_met += 1
                held_met -= 1
            met[(oldest_met + held_met) & (TARGETS_AHEAD - 1)] = word
            held_met += 1


def _check_edges(edges):
    if edges.chunk_count < 0 or edges.chunk_count > CHUNK_MASK:
        raise ValueError(f"references of {edges.chunk_count} chunks cannot be followed")


def _check_bits(edges, *bitmaps):
    for bitmap in bitmaps:
        if len(bitmap) != (edges.chunk_count + 63) // 64:
            raise ValueError(f"{len(bitmap)} words are not one bit for each of {edges.chunk_count} chunks")


def mark_reachable(
    edges,
    const uint32_t[::1] seeds not None,
    uint64_t[::1] marked not None,
    uint64_t[::1] interior not None,
    bint follow_interior,
):
    """See ``reference.mark_reachable``."""
    cdef _Search search = _Search()
    cdef int64_t number
    search.set_up(edges, marked)
    _check_bits(edges, interior)
    if search.chunk_count:
        search.interior = &interior[0]
    search.follow_interior = follow_interior
    with nogil:
        for number in range(seeds.shape[0]):
            search.meet(seeds[number] & CHUNK_MASK)
        search.visit_all()
        if not follow_interior:
            for number in range(marked.shape[0]):
                interior[number] &= ~marked[number]
    return search.count


def find_leaders(edges, const uint64_t[::1] lost not None):
    """See ``reference.find_leaders``."""
    cdef _Search search = _Search()
    cdef _Stack starts = _Stack(), leaders = _Stack()
    cdef int64_t row, number
    cdef uint64_t bits
    cdef uint32_t chunk, last
    # Chunks that are not lost count as visited.
    visited_bits = ~np.asarray(lost)
    cdef uint64_t[::1] visited = visited_bits
    search.set_up(edges, visited)
    search.follow_interior = True
    leader_of = np.zeros(edges.chunk_count, np.uint32)
    cdef uint32_t[::1] numbers = leader_of
    with nogil:
        for row in range(visited.shape[0]):
            bits = ~visited[row]
            while bits:
                chunk = <uint32_t>((row << 6) + lowest_bit(bits))
                _put(&starts.waiting, chunk)
                search.meet(chunk)
                search.visit_all()
                bits = ~visited[row]
        for row in range(visited.shape[0]):
            visited[row] = ~lost[row]
        if search.chunk_count:
            search.number_of = &numbers[0]
        number = starts.waiting.count
        while number:
            number -= 1
            chunk = starts.waiting.data[number]
            if not visited[chunk >> 6] >> (chunk & 63) & 1:
                _put(&leaders.waiting, chunk)
                search.number = <uint32_t>leaders.waiting.count
                search.meet(chunk)
                search.visit_all()
        # They were found backwards: number k becomes count + 1 - k.
        last = <uint32_t>leaders.waiting.count + 1
        for number in range(numbers.shape[0]):
            if numbers[number]:
                numbers[number] = last - numbers[number]
    return LostChunks(np.ascontiguousarray(_chunk_array(&leaders.waiting)[::-1]), leader_of)


cdef inline bint _is_set(const uint64_t[::1] bits, uint32_t position) except? -1 nogil:
    return bits[position >> 6] >> (position & 63) & 1


cdef inline int _set(uint64_t[::1] bits, uint32_t position) except -1 nogil:
    bits[position >> 6] |= <uint64_t>1 << (position & 63)
    return 0


# Backwards


cdef int _turn_round(
    const offset_t[::1] first, const uint32_t[::1] target, offset_t[::1] turned_first, uint32_t[::1] turned
) except -1 nogil:
    cdef int64_t chunks = first.shape[0] - 1, chunk
    cdef uint64_t position
    cdef offset_t total = 0, count
    cdef uint32_t other
    for position in range(<uint64_t>target.shape[0]):
        other = target[position] & CHUNK_MASK
        if other >= chunks:
            with gil:
                raise IndexError(f"there is no chunk {other}")
        turned_first[other] += 1
    for chunk in range(chunks + 1):
        count = turned_first[chunk]
        turned_first[chunk] = total
        total += count
    for chunk in range(chunks):
        for position in range(first[chunk], first[chunk + 1]):
            other = target[position] & CHUNK_MASK
            turned[turned_first[other]] = <uint32_t>chunk | (target[position] & INTERIOR)
            turned_first[other] += 1
    # Each entry now is where the next one began.
    for chunk in range(chunks, 0, -1):
        turned_first[chunk] = turned_first[chunk - 1]
    turned_first[0] = 0
    return 0


def reverse_edges(edges):
    """See ``reference.reverse_edges``."""
    cdef const uint32_t[::1] target = edges.target
    cdef const uint32_t[::1] first32
    cdef const uint64_t[::1] first64
    cdef uint32_t[::1] turned_first32
    cdef uint64_t[::1] turned_first64
    _check_edges(edges)
    turned_first = np.zeros(edges.chunk_count + 1, edges.first.dtype)
    turned_target = np.empty(target.shape[0], np.uint32)
    cdef uint32_t[::1] turned = turned_target
    if edges.first.dtype == np.uint32:
        first32 = edges.first
        turned_first32 = turned_first
        with nogil:
            _turn_round[uint32_t](first32, target, turned_first32, turned)
    else:
        first64 = edges.first
        turned_first64 = turned_first
        with nogil:
            _turn_round[uint64_t](first64, target, turned_first64, turned)
    return Edges(turned_first, turned_target)


cdef int64_t _search_back(
    const offset_t[::1] first,
    const uint32_t[::1] target,
    uint32_t start,
    const uint64_t[::1] goals,
    bint follow_interior,
    uint64_t[::1] visited,
    _Stack queue,
    _Stack comes_from,
) except -2 nogil:
    """The place in ``queue`` of the first goal that a breadth-first search meets, -1 without one."""
    cdef int64_t place = 0
    cdef uint32_t chunk, word
    cdef uint64_t position
    _set(visited, start)
    _put(&queue.waiting, start)
    _put(&comes_from.waiting, 0)
    while place < queue.waiting.count:
        chunk = queue.waiting.data[place]
        if _is_set(goals, chunk):
            return place
        for position in range(first[chunk], first[chunk + 1]):
            word = target[position]
            if word & INTERIOR and not follow_interior:
                continue
            if _is_set(visited, word & CHUNK_MASK):
                continue
            _set(visited, word & CHUNK_MASK)
            _put(&queue.waiting, word & CHUNK_MASK)
            _put(&comes_from.waiting, <uint32_t>place)
        place += 1
    return -1


def shortest_path(referrers, int64_t chunk, const uint64_t[::1] goals not None, bint follow_interior):
    """See ``reference.shortest_path``."""
    cdef const uint32_t[::1] target = referrers.target
    cdef const uint32_t[::1] first32
    cdef const uint64_t[::1] first64
    cdef _Stack queue = _Stack(), comes_from = _Stack()
    cdef int64_t place
    cdef uint32_t start
    _check_edges(referrers)
    _check_bits(referrers, goals)
    if not 0 <= chunk < referrers.chunk_count:
        raise IndexError(f"there is no chunk {chunk}")
    start = <uint32_t>chunk
    visited_bits = np.zeros(goals.shape[0], np.uint64)
    cdef uint64_t[::1] visited = visited_bits
    if referrers.first.dtype == np.uint32:
        first32 = referrers.first
        with nogil:
            place = _search_back[uint32_t](
                first32, target, start, goals, follow_interior, visited, queue, comes_from
            )
    else:
        first64 = referrers.first
        with nogil:
            place = _search_back[uint64_t](
                first64, target, start, goals, follow_interior, visited, queue, comes_from
            )
    path = []
    while place > 0:
        path.append(queue.waiting.data[place])
        place = comes_from.waiting.data[place]
    if place == 0:
        path.append(chunk)
    return np.array(path, np.int64)
