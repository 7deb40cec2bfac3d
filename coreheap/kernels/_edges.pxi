# References of chunks and roots: the twin of reference/pointers.py.
# Part of _compiled.pyx, which imports all names.


cdef enum:
    # Smaller heaps are read before a second thread has begun.
    TWO_THREADS_FROM_BYTES = 1 << 28


@cython.final
cdef class _EdgeCollector(_Pointers):
    """Writes down which chunk refers to which, for chunks [first_chunk, end_chunk)."""

    cdef ChunkNumbers found
    # One of them: where the references begin of the chunk behind the one that was last met.
    cdef uint32_t *first32
    cdef uint64_t *first64
    cdef int64_t first_chunk, end_chunk
    # Where those of them that lie in regions begin and end
    cdef uint64_t low, high

    def __dealloc__(self):
        free(self.found.data)

    def read(self):
        """The words of the chunks in use, in the order of the chunks."""
        with nogil:
            self.read_all()

    cdef int settle(self, int kept) except -1 nogil:
        cdef Candidate *candidate
        cdef uint64_t target
        cdef bint exact = False
        _make_room(&self.found, self.held)
        while self.held > kept:
            candidate = self.next_candidate()
            target = self.target_of(candidate, &exact)
            if target >= self.chunk_count:
                self.bad_rank = True
                continue
            # A self reference is written too, but does not count.
            self.found.data[self.found.count] = <uint32_t>target | (0 if exact else INTERIOR)
            self.found.count += target != <uint64_t>candidate.source
            if self.first32 != NULL:
                self.first32[candidate.source + 1] = <uint32_t>self.found.count
            else:
                self.first64[candidate.source + 1] = <uint64_t>self.found.count
        return 0

    cdef int read_all(self) except -1 nogil:
        cdef int64_t number, chunk
        if self.span == 0:
            return 0
        # About as many as there are chunks, on the average of heaps; what is not needed is never touched. The first
        # part takes over what the second one finds.
        _make_room(&self.found, <int64_t>self.chunk_count - self.first_chunk)
        for number in range(self.region_count):
            self.read_region(number, self.low, self.high)
        for number in range(self.index.mmapped_count):
            chunk = self.index.region_chunks + number
            if self.first_chunk <= chunk < self.end_chunk and self.states[chunk] == IN_USE:
                self.read_mmapped(number)
        return self.settle(0)

    cdef int take_over(self, _EdgeCollector behind) except -1 nogil:
        """Adds what was found of the chunks behind these."""
        _make_room(&self.found, behind.found.count)
        if behind.found.count:
            memcpy(
                self.found.data + self.found.count, behind.found.data, <size_t>behind.found.count * sizeof(uint32_t)
            )
        self.found.count += behind.found.count
        free(behind.found.data)
        behind.found.data = NULL
        behind.found.room = behind.found.count = 0
        return 0


@cython.final
cdef class _RootCollector(_Pointers):
    """Writes down the first word that leads to each chunk."""

    cdef ChunkNumbers found
    # Addresses, each as its low and its high half.
    cdef ChunkNumbers holders
    cdef uint64_t[::1] seen_exact, seen_interior

    def __dealloc__(self):
        free(self.found.data)
        free(self.holders.data)

    cdef int settle(self, int kept) except -1 nogil:
        cdef Candidate *candidate
        cdef uint64_t target
        cdef bint exact = False
        while self.held > kept:
            candidate = self.next_candidate()
            target = self.target_of(candidate, &exact)
            if target >= self.chunk_count:
                self.bad_rank = True
            else:
                self.note_root(<uint64_t>candidate.source, target, exact)
        return 0

    cdef int note_root(self, uint64_t address, uint64_t target, bint exact) except -1 nogil:
        cdef int64_t row = <int64_t>(target >> 6)
        cdef uint64_t bit = <uint64_t>1 << (target & 63)
        if self.seen_exact[row] & bit:
            return 0
        if exact:
            self.seen_exact[row] |= bit
        else:
            if self.seen_interior[row] & bit:
                return 0
            self.seen_interior[row] |= bit
        _put(&self.found, <uint32_t>target if exact else <uint32_t>target | INTERIOR)
        _put(&self.holders, <uint32_t>(address & RANK_MASK))
        return _put(&self.holders, <uint32_t>(address >> 32))


def collect_edges(index, memory, address_mask, bint wide=False, second_from=None):
    """See ``reference.collect_edges``."""
    cdef _EdgeCollector pointers = _EdgeCollector(index, memory, address_mask)
    cdef _EdgeCollector behind = _EdgeCollector(index, memory, address_mask)
    cdef uint32_t[::1] first32
    cdef uint64_t[::1] first64
    cdef int64_t chunk, border
    cdef uint64_t before
    border = _middle_of(index) if second_from is None else second_from
    if not 0 <= border <= <int64_t>pointers.chunk_count:
        raise IndexError(f"there is no chunk {border} to begin with")
    first = np.zeros(index.chunk_count + 1, np.uint64 if wide else np.uint32)
    if wide:
        first64 = first
        pointers.first64 = behind.first64 = &first64[0]
    else:
        first32 = first
        pointers.first32 = behind.first32 = &first32[0]
    pointers.end_chunk = behind.first_chunk = border
    behind.end_chunk = <int64_t>pointers.chunk_count
    behind.high = ADDRESS_LIMIT
    pointers.high = behind.low = _header_of(index, border)
    if 0 < border < behind.end_chunk:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as thread:
            second = thread.submit(behind.read)
            pointers.read()
            second.result()
    elif border:
        pointers.read()
    else:
        behind.read()
    pointers.check_ranks()
    behind.check_ranks()
    before = <uint64_t>pointers.found.count
    if not wide and before + <uint64_t>behind.found.count > RANK_MASK:
        del pointers, behind
        return collect_edges(index, memory, address_mask, True, second_from)
    # So far only the chunks behind one with references know where theirs begin, counted from the border.
    with nogil:
        pointers.take_over(behind)
        if wide:
            for chunk in range(1, first64.shape[0]):
                first64[chunk] = max(first64[chunk] + (before if chunk > border else 0), first64[chunk - 1])
        else:
            for chunk in range(1, first32.shape[0]):
                first32[chunk] = max(
                    first32[chunk] + <uint32_t>(before if chunk > border else 0), first32[chunk - 1]
                )
    return Edges(first, _chunk_array(&pointers.found))


def _middle_of(index):
    """The chunk from which on a second thread reads: half of the bytes lie before it. All chunks are before it where a
    second thread is not worth it."""
    sizes = np.concatenate([index.region_end - index.region_start, index.mmapped.mapping_bytes])
    ends = np.cumsum(sizes, dtype=np.uint64)
    half = int(sizes.sum()) // 2
    if 2 * half < TWO_THREADS_FROM_BYTES:
        return index.chunk_count
    row = int(np.searchsorted(ends, half, side="right"))
    if row >= index.region_count:
        return index.region_chunks + row - index.region_count
    return index.chunk_containing(int(index.region_end[row]) - (int(ends[row]) - half))


def _header_of(index, chunk):
    """Where a chunk of a region begins; the end of all memory for chunks behind those."""
    if chunk >= index.region_chunks:
        return ADDRESS_LIMIT
    return int(chunk_extents(index, np.array([chunk], np.int64))[0][0])


def _check_bits_of(index, *bitmaps):
    for bitmap in bitmaps:
        if len(bitmap) != (index.chunk_count + 63) // 64:
            raise ValueError(f"{len(bitmap)} words are not one bit for each of {index.chunk_count} chunks")


def find_root_references(
    index,
    memory,
    const uint64_t[::1] start not None,
    const uint64_t[::1] end not None,
    address_mask,
    uint64_t[::1] seen_exact not None,
    uint64_t[::1] seen_interior not None,
):
    """See ``reference.find_root_references``."""
    cdef _RootCollector pointers = _RootCollector(index, memory, address_mask)
    cdef Stretch stretch
    cdef int64_t number
    if start.shape[0] != end.shape[0]:
        raise ValueError("the columns of ranges differ in length")
    for number in range(end.shape[0]):
        if end[number] > ADDRESS_LIMIT:
            raise ValueError(f"a range ends at {end[number]:#x}, where no process has memory")
    _check_bits_of(index, seen_exact, seen_interior)
    pointers.seen_exact = seen_exact
    pointers.seen_interior = seen_interior
    with nogil:
        if pointers.span:
            for number in range(start.shape[0]):
                stretch.next = start[number]
                stretch.limit = end[number]
                while pointers.find_stretch(&stretch):
                    pointers.offer_words(stretch.at, stretch.words, -1, stretch.address)
        pointers.settle(0)
    pointers.check_ranks()
    target = _chunk_array(&pointers.found)
    return RootReferences(_chunk_array(&pointers.holders).view(np.uint64), target)
