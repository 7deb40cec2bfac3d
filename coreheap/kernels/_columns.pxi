# Columns about the chunks of an index: the twin of reference/columns.py and of ChunkIndex's lookups.
# Part of _compiled.pyx, which imports all names.


@cython.final
cdef class _Index:
    """The columns of a ``ChunkIndex`` as memoryviews."""

    cdef const uint64_t[::1] region_start
    cdef const uint64_t[::1] region_end
    cdef const int64_t[::1] region_first_word
    cdef const int64_t[::1] region_first_chunk
    cdef const uint64_t[:, ::1] lookup
    cdef const int32_t[::1] block_first_region
    cdef const uint64_t[::1] mmapped_header
    cdef const uint64_t[::1] mmapped_start
    cdef const uint64_t[::1] mmapped_bytes
    cdef const uint64_t[::1] mmapped_chunk_bytes
    cdef int block_shift
    cdef int64_t first_block
    cdef int64_t region_count
    cdef int64_t region_chunks
    cdef int64_t mmapped_count
    cdef Geometry geometry

    def __cinit__(self, index):
        self.geometry = _read_geometry(index.geometry)
        self.region_start = index.region_start
        self.region_end = index.region_end
        self.region_first_word = index.region_first_word
        self.region_first_chunk = index.region_first_chunk
        self.lookup = index.lookup
        self.block_first_region = index.block_first_region
        self.block_shift = index.block_shift
        self.first_block = index.first_block
        self.mmapped_header = index.mmapped.header_address
        self.mmapped_start = index.mmapped.mapping_start
        self.mmapped_bytes = index.mmapped.mapping_bytes
        self.mmapped_chunk_bytes = index.mmapped.chunk_bytes
        self.region_count = self.region_start.shape[0]
        self.region_chunks = index.region_chunks
        self.mmapped_count = self.mmapped_header.shape[0]
        if self.lookup.shape[1] != 2 or not 0 <= self.block_shift < 64:
            raise ValueError("not a ChunkIndex")

    cdef int64_t words_of(self, int64_t region) except -1 nogil:
        """Lookup rows of a region."""
        cdef int shift = self.geometry.granule_shift + 6
        return <int64_t>((self.region_end[region] - self.region_start[region] - 1) >> shift) + 1

    cdef int64_t region_containing(self, uint64_t address) except -2 nogil:
        cdef int64_t block = <int64_t>(address >> self.block_shift) - self.first_block
        cdef int64_t low, high, middle
        if block < 0 or block >= self.block_first_region.shape[0] - 1:
            return -1
        low = self.block_first_region[block]
        high = min(<int64_t>self.block_first_region[block + 1] + 1, self.region_count)
        while low < high:
            middle = (low + high) >> 1
            if self.region_start[middle] <= address:
                low = middle + 1
            else:
                high = middle
        low -= 1
        # Regions before the block's first end before it: finding one of them means that none fits.
        return low if low >= 0 and address < self.region_end[low] else -1

    cdef int64_t find(self, uint64_t address, bint exact, int64_t *region_found) except -2 nogil:
        """The chunk at or around an address, -1 without; its region, -1 for a mmapped one."""
        cdef int64_t region = self.region_containing(address)
        cdef uint64_t distance, granule, start_bits
        cdef int64_t row
        cdef int bit
        region_found[0] = region
        if region < 0:
            return self.find_mmapped(address, exact)
        distance = address - self.region_start[region]
        granule = distance >> self.geometry.granule_shift
        bit = granule & 63
        row = self.region_first_word[region] + <int64_t>(granule >> 6)
        start_bits = self.lookup[row, 0]
        if exact and (distance & <uint64_t>(self.geometry.alignment - 1) or not start_bits >> bit & 1):
            return -1
        return (
            <int64_t>(self.lookup[row, 1] & RANK_MASK) + popcount(start_bits & ((<uint64_t>2 << bit) - 1)) - 1
        )

    cdef int64_t find_mmapped(self, uint64_t address, bint exact) except -2 nogil:
        cdef int64_t low = 0, high = self.mmapped_count, middle
        cdef bint found
        while low < high:
            middle = (low + high) >> 1
            if self.mmapped_header[middle] <= address:
                low = middle + 1
            else:
                high = middle
        low -= 1
        if low < 0:
            return -1
        if exact:
            found = self.mmapped_header[low] == address
        else:
            found = address < self.mmapped_start[low] + self.mmapped_bytes[low]
        return self.region_chunks + low if found else -1

    cdef uint64_t end_of(self, int64_t region, uint64_t granule) except? 0 nogil:
        """Where the chunk ends that starts at a granule of a region: at the next start, or at the region's end."""
        cdef int64_t first_row = self.region_first_word[region]
        cdef int64_t words = self.words_of(region)
        cdef int64_t row = <int64_t>(granule >> 6)
        cdef uint64_t start_bits = self.lookup[first_row + row, 0] & ~((<uint64_t>2 << (granule & 63)) - 1)
        while start_bits == 0:
            row += 1
            if row >= words:
                return self.region_end[region]
            start_bits = self.lookup[first_row + row, 0]
        granule = (<uint64_t>row << 6) + <uint64_t>lowest_bit(start_bits)
        return self.region_start[region] + (granule << self.geometry.granule_shift)


def fill_ranks(uint64_t[:, ::1] lookup not None):
    """See ``reference.fill_ranks``."""
    cdef int64_t row
    cdef uint64_t total = 0
    if lookup.shape[0] and lookup.shape[1] != 2:
        raise ValueError("a lookup has two columns")
    with nogil:
        for row in range(lookup.shape[0]):
            lookup[row, 1] = total & RANK_MASK
            total += <uint64_t>popcount(lookup[row, 0])
    if total > RANK_MASK:
        raise OverflowError(f"{total} chunks are more than a rank can count")
    return total


cdef int _check_rows(_Index columns, int64_t region, int64_t first_word, int64_t last_word) except -1:
    cdef int64_t words
    if not 0 <= region < columns.region_count:
        raise IndexError(f"there is no region {region}")
    words = columns.words_of(region)
    if not 0 <= first_word <= last_word <= words:
        raise IndexError(f"region {region} has {words} rows, not {first_word} to {last_word}")
    return 0


def unpack_chunks(index, int64_t region, int64_t first_word, int64_t last_word):
    """See ``reference.unpack_chunks``."""
    cdef _Index columns = _Index(index)
    cdef int64_t row, first_row, count = 0, chunk = 0
    cdef uint64_t start_bits, region_start, header = 0
    cdef uint64_t[::1] headers, sizes
    _check_rows(columns, region, first_word, last_word)
    first_row = columns.region_first_word[region]
    region_start = columns.region_start[region]
    for row in range(first_row + first_word, first_row + last_word):
        count += popcount(columns.lookup[row, 0])
    header_address = np.empty(count, np.uint64)
    chunk_bytes = np.empty(count, np.uint64)
    headers = header_address
    sizes = chunk_bytes
    with nogil:
        for row in range(first_word, last_word):
            start_bits = columns.lookup[first_row + row, 0]
            while start_bits:
                header = region_start + (
                    ((<uint64_t>row << 6) + <uint64_t>lowest_bit(start_bits)) << columns.geometry.granule_shift
                )
                headers[chunk] = header
                if chunk:
                    sizes[chunk - 1] = header - headers[chunk - 1]
                chunk += 1
                start_bits &= start_bits - 1
        if chunk:
            header -= region_start
            sizes[chunk - 1] = columns.end_of(region, header >> columns.geometry.granule_shift) - region_start - header
    return header_address, chunk_bytes


cdef class _Sums:
    """Adds up chunks by a class that depends on state and size."""

    cdef int64_t[::1] counts
    cdef uint64_t[::1] totals
    cdef const uint8_t[::1] state
    cdef int granule_shift

    cdef int by_state(self, int64_t chunk, uint64_t chunk_bytes) except -1 nogil:
        cdef int state = self.state[chunk] & (STATE_SLOTS - 1)
        self.counts[state] += 1
        self.totals[state] += chunk_bytes
        return 0

    cdef int by_size(self, int64_t chunk, uint64_t chunk_bytes, uint64_t state_mask) except -1 nogil:
        cdef uint64_t granules = chunk_bytes >> self.granule_shift
        cdef int64_t size_class
        if not state_mask >> (self.state[chunk] & (STATE_SLOTS - 1)) & 1:
            return 0
        if granules < EXACT_SIZE_CLASSES:
            size_class = <int64_t>granules
        else:
            size_class = EXACT_SIZE_CLASSES + min(bit_length(granules) - 11, 53)
        self.counts[size_class] += 1
        self.totals[size_class] += chunk_bytes
        return 0


cdef int _sum_up(_Index columns, _Sums sums, int64_t region, bint by_state, uint64_t state_mask) except -1:
    """Adds all chunks of a region, or all mmapped ones with their whole mappings."""
    cdef int64_t row, first_row, words, chunk
    cdef uint64_t start_bits, granule, previous = 0
    if region == -1:
        for row in range(columns.mmapped_count):
            if by_state:
                sums.by_state(columns.region_chunks + row, columns.mmapped_bytes[row])
            else:
                sums.by_size(columns.region_chunks + row, columns.mmapped_bytes[row], state_mask)
        return 0
    _check_rows(columns, region, 0, 0)
    with nogil:
        words = columns.words_of(region)
        first_row = columns.region_first_word[region]
        # Chunk ``chunk`` starts at granule ``previous``; it is added when the next start is found.
        chunk = <int64_t>(columns.lookup[first_row, 1] & RANK_MASK) - 1
        for row in range(words):
            start_bits = columns.lookup[first_row + row, 0]
            while start_bits:
                granule = (<uint64_t>row << 6) + <uint64_t>lowest_bit(start_bits)
                start_bits &= start_bits - 1
                if granule:
                    if by_state:
                        sums.by_state(chunk, (granule - previous) << columns.geometry.granule_shift)
                    else:
                        sums.by_size(chunk, (granule - previous) << columns.geometry.granule_shift, state_mask)
                chunk += 1
                previous = granule
        granule = columns.region_end[region] - columns.region_start[region]
        granule -= previous << columns.geometry.granule_shift
        if by_state:
            sums.by_state(chunk, granule)
        else:
            sums.by_size(chunk, granule, state_mask)
    return 0


cdef tuple _summed(object index, object region, bint by_state, uint64_t state_mask):
    cdef _Index columns = _Index(index)
    cdef _Sums sums = _Sums.__new__(_Sums)
    slots = STATE_SLOTS if by_state else SIZE_CLASSES
    counts = np.zeros(slots, np.int64)
    totals = np.zeros(slots, np.uint64)
    sums.counts = counts
    sums.totals = totals
    sums.state = index.state
    sums.granule_shift = columns.geometry.granule_shift
    _sum_up(columns, sums, region, by_state, state_mask)
    return counts, totals


def state_totals(index, int64_t region):
    """See ``reference.state_totals``."""
    return _summed(index, region, True, 0)


def size_histogram(index, int64_t region, state_mask):
    """See ``reference.size_histogram``."""
    return _summed(index, region, False, state_mask & 0xFFFF)


def find_chunks(index, const uint64_t[::1] addresses not None, bint exact):
    """See ``reference.find_chunks``."""
    cdef _Index columns = _Index(index)
    cdef int64_t row, region = -1
    chunks = np.empty(addresses.shape[0], np.int64)
    cdef int64_t[::1] found = chunks
    with nogil:
        for row in range(addresses.shape[0]):
            found[row] = columns.find(addresses[row], exact, &region)
    return chunks


cdef int64_t _last_not_above(const int64_t[::1] ascending, int64_t value) except -2 nogil:
    """The last position whose element is at most ``value``, -1 without one."""
    cdef int64_t low = 0, high = ascending.shape[0], middle
    while low < high:
        middle = (low + high) >> 1
        if ascending[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low - 1


def chunk_extents(index, const int64_t[::1] chunks not None):
    """See ``reference.chunk_extents``."""
    cdef _Index columns = _Index(index)
    cdef int64_t row, chunk, region, first_row, low, high, middle, left
    cdef int64_t chunk_count = columns.region_chunks + columns.mmapped_count
    cdef uint64_t start_bits, granule, header
    header_address = np.empty(chunks.shape[0], np.uint64)
    chunk_bytes = np.empty(chunks.shape[0], np.uint64)
    cdef uint64_t[::1] headers = header_address
    cdef uint64_t[::1] sizes = chunk_bytes
    for row in range(chunks.shape[0]):
        if not 0 <= chunks[row] < chunk_count:
            raise IndexError(f"there is no chunk {chunks[row]}")
    with nogil:
        for row in range(chunks.shape[0]):
            chunk = chunks[row]
            if chunk >= columns.region_chunks:
                headers[row] = columns.mmapped_header[chunk - columns.region_chunks]
                sizes[row] = columns.mmapped_chunk_bytes[chunk - columns.region_chunks]
                continue
            region = _last_not_above(columns.region_first_chunk, chunk)
            first_row = columns.region_first_word[region]
            low = 0
            high = columns.words_of(region)
            while low < high:
                middle = (low + high) >> 1
                if <int64_t>(columns.lookup[first_row + middle, 1] & RANK_MASK) <= chunk:
                    low = middle + 1
                else:
                    high = middle
            low -= 1
            start_bits = columns.lookup[first_row + low, 0]
            left = chunk - <int64_t>(columns.lookup[first_row + low, 1] & RANK_MASK)
            while left > 0 and start_bits:
                start_bits &= start_bits - 1
                left -= 1
            if start_bits == 0:
                with gil:
                    raise ValueError("the ranks of the index do not fit its start bits")
            granule = (<uint64_t>low << 6) + <uint64_t>lowest_bit(start_bits)
            header = columns.region_start[region] + (granule << columns.geometry.granule_shift)
            headers[row] = header
            sizes[row] = columns.end_of(region, granule) - header
    return header_address, chunk_bytes
