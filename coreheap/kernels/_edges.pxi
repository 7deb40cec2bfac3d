# References of chunks and roots: the twin of reference/pointers.py.
# Part of _compiled.pyx, which imports all names.


@cython.final
cdef class _EdgeCollector(_Pointers):
    """Writes down which chunk refers to which."""

    cdef ChunkNumbers found
    # One of them: where the references begin of the chunk behind the one that was last met.
    cdef uint32_t *first32
    cdef uint64_t *first64

    def __dealloc__(self):
        free(self.found.data)

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
        """The words of all chunks in use, in the order of the chunks."""
        cdef int64_t number
        if self.span == 0:
            return 0
        # About as many as there are chunks, on the average of heaps; what is not needed is never touched.
        _make_room(&self.found, <int64_t>self.chunk_count)
        for number in range(self.region_count):
            self.read_region(number)
        for number in range(self.index.mmapped_count):
            if self.states[self.index.region_chunks + number] == IN_USE:
                self.read_mmapped(number)
        return self.settle(0)


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


def collect_edges(index, memory, address_mask, bint wide=False):
    """See ``reference.collect_edges``."""
    cdef _EdgeCollector pointers = _EdgeCollector(index, memory, address_mask)
    cdef uint32_t[::1] first32
    cdef uint64_t[::1] first64
    cdef int64_t chunk
    first = np.zeros(index.chunk_count + 1, np.uint64 if wide else np.uint32)
    if wide:
        first64 = first
        pointers.first64 = &first64[0]
    else:
        first32 = first
        pointers.first32 = &first32[0]
    with nogil:
        pointers.read_all()
    pointers.check_ranks()
    if not wide and pointers.found.count > <int64_t>RANK_MASK:
        del pointers
        return collect_edges(index, memory, address_mask, True)
    # So far only the chunks behind one with references know where theirs begin.
    with nogil:
        if wide:
            for chunk in range(1, first64.shape[0]):
                first64[chunk] = max(first64[chunk], first64[chunk - 1])
        else:
            for chunk in range(1, first32.shape[0]):
                first32[chunk] = max(first32[chunk], first32[chunk - 1])
    return Edges(first, _chunk_array(&pointers.found))


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
