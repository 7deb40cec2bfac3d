# From words to the chunks that they lead to: the twin of reference/pointers.py.
# Part of _compiled.pyx, which imports all names.

cdef extern from *:
    """
    #if defined(__SSE2__)
    #include <emmintrin.h>
    #endif
    /* Which of up to 64 words may lead to a chunk: bit k for word k. A word leads nowhere that is not in [lowest,
       lowest + span) once masked; the SSE2 way for 8 bytes compares the high halves alone, so it lets some pass that
       are beyond the end. With ``ahead`` bytes, what lies so far behind is asked for meanwhile: the processor's own
       prefetching ends at each page. */
    static inline uint64_t coreheap_words_in_span(
        const uint8_t *at, int64_t words, int word_bytes, uint64_t mask, uint64_t lowest, uint64_t span, int64_t ahead)
    {
        uint64_t found = 0;
        int64_t k = 0, asked;
        for (asked = 0; ahead != 0 && asked < words * word_bytes; asked += 64)
            coreheap_prefetch(at, asked + ahead);
    #if defined(__SSE2__)
        if (word_bytes == 8) {
            int bits = coreheap_bit_length(span - 1);
            __m128i shift = _mm_cvtsi32_si128(bits > 32 ? bits - 32 : 0), zero = _mm_setzero_si128();
            __m128i masks = _mm_set1_epi64x((int64_t) mask), base = _mm_set1_epi64x((int64_t) lowest);
            for (; k + 4 <= words; k += 4) {
                __m128i low = _mm_loadu_si128((const __m128i *) (at + 8 * k));
                __m128i high = _mm_loadu_si128((const __m128i *) (at + 8 * k + 16));
                low = _mm_sub_epi64(_mm_and_si128(low, masks), base);
                high = _mm_sub_epi64(_mm_and_si128(high, masks), base);
                low = _mm_castps_si128(_mm_shuffle_ps(_mm_castsi128_ps(low), _mm_castsi128_ps(high), 0xDD));
                low = _mm_cmpeq_epi32(_mm_srl_epi32(low, shift), zero);
                found |= (uint64_t) _mm_movemask_ps(_mm_castsi128_ps(low)) << k;
            }
        }
        else {
            /* Compared as signed numbers, with the sign bit of both turned. */
            __m128i sign = _mm_set1_epi32((int32_t) 0x80000000);
            __m128i masks = _mm_set1_epi32((int32_t) mask), base = _mm_set1_epi32((int32_t) lowest);
            __m128i last = _mm_xor_si128(_mm_set1_epi32((int32_t) (span - 1)), sign);
            for (; k + 4 <= words; k += 4) {
                __m128i four = _mm_loadu_si128((const __m128i *) (at + 4 * k));
                four = _mm_xor_si128(_mm_sub_epi32(_mm_and_si128(four, masks), base), sign);
                found |= (uint64_t) (15 ^ _mm_movemask_ps(_mm_castsi128_ps(_mm_cmpgt_epi32(four, last)))) << k;
            }
        }
    #endif
        for (; k < words; k++)
            found |= (uint64_t) ((coreheap_load(at + k * word_bytes, word_bytes) & mask) - lowest < span) << k;
        return found;
    }
    """
    uint64_t words_in_span "coreheap_words_in_span"(
        const uint8_t *at, int64_t words, int word_bytes, uint64_t mask, uint64_t lowest, uint64_t span, int64_t ahead
    ) noexcept nogil

cdef enum:
    WORDS_AT_ONCE = 64
    # After each block of words at most CANDIDATES_FULL wait, so the ring always has room for another block.
    CANDIDATES_KEPT = 64
    CANDIDATES_FULL = 128
    CANDIDATE_RING = CANDIDATES_FULL + WORDS_AT_ONCE

cdef uint32_t INTERIOR = <uint32_t>1 << 31
cdef uint32_t CHUNK_MASK = ((<uint32_t>1) << 31) - 1


cdef struct Candidate:
    # Of a mmapped chunk ``row`` is NULL, and ``region`` its number among them.
    const uint64_t *row
    int64_t source
    int32_t region
    uint8_t bit
    uint8_t aligned


cdef struct Stretch:
    # What is still to be read: [next, limit). What was found: words at an address, and where their bytes are.
    uint64_t next
    uint64_t limit
    uint64_t address
    int64_t words
    const uint8_t *at


cdef struct Place:
    # A chunk of a region: its granule, and the row of the lookup that has its start bit.
    int64_t region
    uint64_t granule


cdef class _Pointers:
    """Finds out which words lead to chunks; what follows from it is for subclasses to say, in ``settle``.

    Words that may be pointers wait in a ring while the lookup row of each comes from memory. The columns of the index
    are read through plain pointers: ``__cinit__`` proves once that what the blocks say are regions, and that the rows
    of each region lie in the lookup; so an address inside a region leads to a row. Ranks are not proven: what they lead
    to is compared with the number of chunks each time.
    """

    cdef _Index index
    cdef _Memory memory
    cdef const uint8_t[::1] states
    cdef uint64_t mask, lowest, span
    cdef int word
    cdef int granule_shift
    cdef uint64_t header_bytes, alignment
    # Columns of the index and of the memory
    cdef const uint64_t *rows
    cdef const uint64_t *region_start
    cdef const uint64_t *region_end
    cdef const int64_t *region_first_word
    cdef const int32_t *block_first_region
    cdef uint64_t block_count, first_block
    cdef int block_shift
    cdef int64_t region_count
    cdef const uint8_t *state
    cdef uint64_t chunk_count
    cdef const uint64_t *run_start
    cdef const uint64_t *run_end
    cdef int64_t run_count, run, ahead
    # Addresses without a mmapped chunk, as last found
    cdef uint64_t gap_start, gap_end
    # Words that may be pointers
    cdef Candidate waiting[CANDIDATE_RING]
    cdef int oldest, held
    cdef bint bad_rank

    def __cinit__(self, index, memory, address_mask):
        cdef int64_t region
        self.index = _Index(index)
        self.memory = _Memory(memory)
        self.states = index.state
        self.word = self.index.geometry.word
        self.granule_shift = self.index.geometry.granule_shift
        self.alignment = <uint64_t>self.index.geometry.alignment
        self.header_bytes = 2 * <uint64_t>self.word
        self.mask = address_mask & (UINT64_MAX if self.word == 8 else RANK_MASK)
        self.chunk_count = index.chunk_count
        self.region_count = self.index.region_count
        self.run_count = self.memory.run_count
        self.ahead = PREFETCH_BYTES
        if self.chunk_count > CHUNK_MASK:
            raise OverflowError(f"{index.chunk_count} chunks are more than references can tell apart")
        if <uint64_t>self.states.shape[0] != self.chunk_count:
            raise ValueError(f"{self.states.shape[0]} states for {index.chunk_count} chunks")
        self._prove(index)
        if self.region_count:
            self.rows = &self.index.lookup[0, 0]
            self.region_start = &self.index.region_start[0]
            self.region_end = &self.index.region_end[0]
            self.region_first_word = &self.index.region_first_word[0]
            self.block_first_region = &self.index.block_first_region[0]
        self.block_count = self.index.block_first_region.shape[0] - 1
        self.block_shift = self.index.block_shift
        self.first_block = <uint64_t>self.index.first_block
        if self.chunk_count:
            self.state = &self.states[0]
        if self.run_count:
            self.run_start = &self.memory.run_start[0]
            self.run_end = &self.memory.run_end[0]
        low, high = [], []
        for region in range(self.region_count):
            low.append(self.region_start[region])
            high.append(self.region_end[region])
        if self.index.mmapped_count:
            low.append(int(index.mmapped.mapping_start[0]))
            high.append(int((index.mmapped.mapping_start + index.mmapped.mapping_bytes).max()))
        lowest = min(low, default=0)
        span = max(high, default=0) - lowest
        lowest += self.header_bytes
        if self.word == 4:
            span = max(min(span, RANK_MASK + 1 - lowest), 0)
        self.lowest = lowest
        self.span = span

    @cython.final
    cdef _prove(self, index):
        """That everything the columns of regions lead to is there; raises ValueError."""
        cdef int64_t region, row
        cdef _Index columns = self.index
        first = index.block_first_region
        if len(first) < 1 or int(first.min()) < 0 or int(first.max()) > columns.region_count:
            raise ValueError("the blocks of the index lead to regions that it does not have")
        if not (
            columns.region_start.shape[0] == columns.region_end.shape[0]
            == columns.region_first_word.shape[0] == columns.region_first_chunk.shape[0]
        ):
            raise ValueError("the columns of regions differ in length")
        for region in range(columns.region_count):
            row = columns.region_first_word[region]
            if columns.region_end[region] <= columns.region_start[region] or not (
                0 <= row <= columns.lookup.shape[0] - columns.words_of(region)
            ):
                raise ValueError(f"the rows of region {region} are not in the lookup")
        if not (
            columns.mmapped_header.shape[0] == columns.mmapped_start.shape[0]
            == columns.mmapped_bytes.shape[0] == columns.mmapped_count
        ) or columns.region_chunks + columns.mmapped_count != index.chunk_count:
            raise ValueError("the columns of mmapped chunks differ in length")
        if not (
            self.memory.run_start.shape[0] == self.memory.run_end.shape[0]
            == self.memory.run_file_offset.shape[0] == self.memory.run_count
        ):
            raise ValueError("the columns of a memory map differ in length")

    # Words of the memory

    @cython.final
    cdef inline bint find_run(self, uint64_t address) noexcept nogil:
        """Sets ``run`` to the first run that ends behind an address, False where there is none."""
        cdef int64_t low = 0, high = self.run_count, middle
        if self.run < self.run_count and self.run_start[self.run] <= address < self.run_end[self.run]:
            return True
        while low < high:
            middle = (low + high) >> 1
            if self.run_end[middle] <= address:
                low = middle + 1
            else:
                high = middle
        self.run = low
        return low < self.run_count

    @cython.final
    cdef bint find_stretch(self, Stretch *stretch) noexcept nogil:
        """The next saved words of what is still to be read, False where there are none."""
        cdef uint64_t start, end, distance, file_offset, file_bytes = <uint64_t>self.memory.file.shape[0]
        cdef uint64_t word = <uint64_t>self.word
        while stretch.next < stretch.limit:
            if not self.find_run(stretch.next) or self.run_start[self.run] >= stretch.limit:
                return False
            start = (max(stretch.next, self.run_start[self.run]) + word - 1) & ~(word - 1)
            end = min(stretch.limit, self.run_end[self.run])
            stretch.next = end
            if end <= start:
                continue
            distance = start - self.run_start[self.run]
            file_offset = self.memory.run_file_offset[self.run]
            if file_offset > file_bytes or distance > file_bytes - file_offset:
                continue
            stretch.words = <int64_t>(min(end - start, file_bytes - file_offset - distance) // word)
            if stretch.words:
                stretch.address = start
                stretch.at = &self.memory.file[<int64_t>(file_offset + distance)]
                return True
        return False

    @cython.final
    cdef int offer_words(self, const uint8_t *at, int64_t words, int64_t source, uint64_t address) except -1 nogil:
        """Words of one chunk, or with ``source`` -1 of a root: then the words' own addresses stand for them."""
        cdef int64_t count, number
        cdef uint64_t bits, value
        while words:
            count = min(words, <int64_t>WORDS_AT_ONCE)
            bits = words_in_span(at, count, self.word, self.mask, self.lowest, self.span, self.ahead)
            while bits:
                number = lowest_bit(bits) * self.word
                bits &= bits - 1
                value = (load(at + number, self.word) & self.mask) - self.lowest
                if value < self.span:
                    value += self.lowest - self.header_bytes
                    self.push(value, source if source >= 0 else <int64_t>address + number)
            if self.held > CANDIDATES_FULL:
                self.settle(CANDIDATES_KEPT)
            at += count * self.word
            address += <uint64_t>(count * self.word)
            words -= count
        return 0

    @cython.final
    cdef int read_region(self, int64_t region, uint64_t low, uint64_t high) except -1 nogil:
        """The words of all its chunks in use whose headers lie in [low, high), two addresses where chunks begin."""
        cdef Stretch stretch
        stretch.next = max(self.region_start[region], low) + self.header_bytes
        # The last one has a word of what lies behind the region.
        stretch.limit = min(self.region_end[region] + <uint64_t>self.word, high + self.header_bytes)
        while self.find_stretch(&stretch):
            self.read_stretch(region, stretch.address - self.region_start[region], stretch.at, stretch.words)
        return 0

    @cython.final
    cdef int read_stretch(self, int64_t region, uint64_t offset, const uint8_t *at, int64_t words) except -1 nogil:
        """As many words of a region as lie behind each other in the file; ``offset`` from its start, a header at least.

        A word belongs to the chunk whose bytes hold the address a header's bytes before it: its *place*. So the words
        of a row are those whose places lie in it.
        """
        cdef const uint64_t *first_row = self.rows + 2 * self.region_first_word[region]
        cdef int row_shift = self.granule_shift + 6
        cdef int64_t region_rows = self.index.words_of(region)
        cdef uint64_t word = <uint64_t>self.word
        cdef uint64_t place = offset - self.header_bytes, end = place + <uint64_t>words * word
        cdef uint64_t row_end, starts, rank, bits, value, here, next_granule, next_starts, source
        cdef int64_t row, count
        while place < end:
            row = <int64_t>(place >> row_shift)
            row_end = min(end, <uint64_t>(row + 1) << row_shift)
            starts = first_row[2 * row]
            rank = first_row[2 * row + 1] & RANK_MASK
            if starts == 0 and (rank - 1 >= self.chunk_count or self.state[rank - 1] != IN_USE):
                # Inside of a large free chunk, whose memory need not be touched.
                at += row_end - place
                place = row_end
                continue
            while place < row_end:
                count = min(<int64_t>((row_end - place) // word), <int64_t>WORDS_AT_ONCE)
                bits = words_in_span(at, count, self.word, self.mask, self.lowest, self.span, self.ahead)
                while bits:
                    here = <uint64_t>lowest_bit(bits) * word
                    bits &= bits - 1
                    value = (load(at + here, self.word) & self.mask) - self.lowest
                    if value >= self.span:
                        continue
                    here += place
                    if (here + word) & (self.alignment - 1) == 0:
                        # A granule begins one word behind the place; if a chunk does, this is its size word.
                        next_granule = (here + word) >> self.granule_shift
                        next_starts = starts
                        if <int64_t>(next_granule >> 6) != row:
                            next_starts = first_row[2 * row + 2] if row + 1 < region_rows else 0
                        if next_starts >> (next_granule & 63) & 1:
                            continue
                    source = rank + <uint64_t>popcount(
                        starts & ((<uint64_t>2 << (here >> self.granule_shift & 63)) - 1)
                    ) - 1
                    if source >= self.chunk_count:
                        self.bad_rank = True
                    elif self.state[source] == IN_USE:
                        self.push(value + self.lowest - self.header_bytes, <int64_t>source)
                if self.held > CANDIDATES_FULL:
                    self.settle(CANDIDATES_KEPT)
                at += <uint64_t>count * word
                place += <uint64_t>count * word
        return 0

    @cython.final
    cdef int read_mmapped(self, int64_t number) except -1 nogil:
        """The words of a mmapped chunk, in use or not."""
        cdef Stretch stretch
        stretch.next = self.index.mmapped_header[number] + self.header_bytes
        stretch.limit = self.index.mmapped_start[number] + self.index.mmapped_bytes[number]
        while self.find_stretch(&stretch):
            self.offer_words(stretch.at, stretch.words, self.index.region_chunks + number, 0)
        return 0

    # Where they lead to

    @cython.final
    cdef inline bint find_region(self, uint64_t address, Place *found) noexcept nogil:
        cdef uint64_t block = (address >> self.block_shift) - self.first_block
        cdef int64_t low, high, middle
        if block >= self.block_count:
            return False
        low = self.block_first_region[block]
        high = min(<int64_t>self.block_first_region[block + 1] + 1, self.region_count)
        while low < high:
            middle = (low + high) >> 1
            if self.region_start[middle] <= address:
                low = middle + 1
            else:
                high = middle
        low -= 1
        # What lies before the block's first region fails the comparison too.
        if low < 0 or address - self.region_start[low] >= self.region_end[low] - self.region_start[low]:
            return False
        found.region = low
        found.granule = (address - self.region_start[low]) >> self.granule_shift
        return True

    @cython.final
    cdef inline const uint64_t *row_of(self, Place *place) noexcept nogil:
        return self.rows + 2 * (self.region_first_word[place.region] + <int64_t>(place.granule >> 6))

    @cython.final
    cdef inline void push(self, uint64_t place, int64_t source) noexcept nogil:
        """A place that may be a chunk's; ``source`` is the chunk that holds the word, or the word's address."""
        cdef Place found
        cdef Candidate *candidate
        cdef int position = self.oldest + self.held
        cdef int64_t number
        candidate = &self.waiting[position if position < CANDIDATE_RING else position - CANDIDATE_RING]
        if self.find_region(place, &found):
            candidate.row = self.row_of(&found)
            candidate.region = <int32_t>found.region
            candidate.bit = found.granule & 63
            # Regions begin where a header can lie.
            candidate.aligned = (place - self.region_start[found.region]) & (self.alignment - 1) == 0
            prefetch(<const uint8_t *>candidate.row, 0)
        else:
            number = self.find_mmapped(place)
            if number < 0:
                return
            candidate.row = NULL
            candidate.region = <int32_t>number
            candidate.aligned = self.index.mmapped_header[number] == place
        candidate.source = source
        self.held += 1

    @cython.final
    cdef int64_t find_mmapped(self, uint64_t address) noexcept nogil:
        """The number of the mmapped chunk around an address among them, -1 without.

        Pointers into modules between the mappings are frequent: the last gap is remembered.
        """
        cdef int64_t low = 0, high = self.index.mmapped_count, middle
        cdef uint64_t gap_start
        if address - self.gap_start < self.gap_end - self.gap_start:
            return -1
        while low < high:
            middle = (low + high) >> 1
            if self.index.mmapped_header[middle] <= address:
                low = middle + 1
            else:
                high = middle
        gap_start = 0
        if low > 0:
            # The word itself has to lie in the mapping: right behind it another one begins.
            gap_start = self.index.mmapped_start[low - 1] + self.index.mmapped_bytes[low - 1] - self.header_bytes
            if address < gap_start:
                return low - 1
        self.gap_start = gap_start
        self.gap_end = self.index.mmapped_header[low] if low < self.index.mmapped_count else UINT64_MAX
        return -1

    @cython.final
    cdef inline uint64_t target_of(self, const Candidate *candidate, bint *exact) noexcept nogil:
        """Its chunk, which a wrong rank makes one that there is not."""
        cdef uint64_t starts
        if candidate.row == NULL:
            exact[0] = candidate.aligned
            return <uint64_t>(self.index.region_chunks + candidate.region)
        starts = candidate.row[0]
        exact[0] = candidate.aligned and starts >> candidate.bit & 1
        starts &= (<uint64_t>2 << candidate.bit) - 1
        return (candidate.row[1] & RANK_MASK) + <uint64_t>popcount(starts) - 1

    @cython.final
    cdef int check_ranks(self) except -1:
        if self.bad_rank:
            raise ValueError("the ranks of the index lead to chunks that it does not have")
        return 0

    cdef int settle(self, int kept) except -1 nogil:
        """Looks at the oldest that wait, until ``kept`` are left."""
        self.held = 0
        return 0

    @cython.final
    cdef inline Candidate *next_candidate(self) noexcept nogil:
        """Takes the oldest that waits, of which there is one."""
        cdef Candidate *candidate = &self.waiting[self.oldest]
        self.oldest = self.oldest + 1 if self.oldest + 1 < CANDIDATE_RING else 0
        self.held -= 1
        return candidate
