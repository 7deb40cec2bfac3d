# Where some chunks are pointed to, word by word: the twin of reference/lookups.py.
# Part of _compiled.pyx, which imports all names.

cdef extern from *:
    """
    static inline uint64_t coreheap_swap_bytes(uint64_t word, int word_bytes) {
        return word_bytes == 8 ? __builtin_bswap64(word) : __builtin_bswap32((uint32_t) word);
    }
    /* Whether a word of 8 bytes, with the one that follows it, may be an address in one of the forms but those of
       halves: by range and by the low bits that all addresses have in common. Without a branch: it fails for nearly
       every word. */
    static inline int coreheap_may_be_address(
        uint64_t word, uint64_t following, uint64_t least, uint64_t reach, uint64_t sample, uint64_t alike)
    {
    #define COREHEAP_FITS(value) ((((value) - least) <= reach) & ((((value) ^ sample) & alike) == 0))
    #define COREHEAP_ACROSS(shift) COREHEAP_FITS((word >> (shift)) | (following << (64 - (shift))))
        return ((word >> 48 != 0) & COREHEAP_FITS(word & (((uint64_t) 1 << 48) - 1))) | COREHEAP_FITS(word >> 16)
            | COREHEAP_FITS(word << 1) | COREHEAP_FITS(word << 2) | COREHEAP_FITS(word << 3) | COREHEAP_FITS(word << 4)
            | COREHEAP_FITS(word >> 1) | COREHEAP_FITS(word >> 2) | COREHEAP_FITS(word >> 3) | COREHEAP_FITS(word >> 4)
            | COREHEAP_FITS(__builtin_bswap64(word))
            | COREHEAP_ACROSS(8) | COREHEAP_ACROSS(16) | COREHEAP_ACROSS(24) | COREHEAP_ACROSS(32)
            | COREHEAP_ACROSS(40) | COREHEAP_ACROSS(48) | COREHEAP_ACROSS(56);
    }
    """
    bint may_be_address "coreheap_may_be_address"(
        uint64_t word, uint64_t following, uint64_t least, uint64_t reach, uint64_t sample, uint64_t alike
    ) noexcept nogil
    uint64_t swap_bytes "coreheap_swap_bytes"(uint64_t word, int word_bytes) noexcept nogil

cdef enum:
    TAG_SHIFT = 16
    MOST_SHIFTED = 4
    HALVES_APART = 4
    # Of a filter for n addresses at least 16 n bits: one in 16 words that could be one of them is looked for in vain.
    FILTER_BITS_EACH = 16
    SMALLEST_FILTER = 12
    LARGEST_FILTER = 31

cdef uint64_t TAGGED_MASK = ((<uint64_t>1) << 48) - 1
cdef uint64_t HASH_FACTOR = 0x9E3779B97F4A7C15


cdef int _check_ranges(const uint64_t[::1] start, const uint64_t[::1] end) except -1:
    cdef int64_t number
    if start.shape[0] != end.shape[0]:
        raise ValueError("the columns of ranges differ in length")
    for number in range(end.shape[0]):
        if end[number] > ADDRESS_LIMIT:
            raise ValueError(f"a range ends at {end[number]:#x}, where no process has memory")
    return 0


cdef inline int _put_wide(ChunkNumbers *numbers, uint64_t value) except -1 nogil:
    """A number of 64 bits as its low and its high half."""
    _put(numbers, <uint32_t>(value & RANK_MASK))
    return _put(numbers, <uint32_t>(value >> 32))


@cython.final
cdef class _PointerCollector(_Pointers):
    """Writes down every word that leads to a chunk of some."""

    cdef ChunkNumbers found, holders, values
    cdef const uint64_t[::1] wanted

    def __dealloc__(self):
        free(self.found.data)
        free(self.holders.data)
        free(self.values.data)

    cdef int look_at(self, const Stretch *stretch) except -1 nogil:
        """The words of a stretch, each looked up at once: they are few."""
        cdef const uint8_t *at = stretch.at
        cdef uint64_t address = stretch.address, bits, value, target
        cdef int64_t left = stretch.words, count, number
        cdef Candidate *candidate
        cdef bint exact = False
        while left:
            count = min(left, <int64_t>WORDS_AT_ONCE)
            bits = words_in_span(at, count, self.word, self.mask, self.lowest, self.span, self.ahead)
            while bits:
                number = lowest_bit(bits) * self.word
                bits &= bits - 1
                value = load(at + number, self.word) & self.mask
                if value - self.lowest >= self.span:
                    continue
                self.push(value - self.header_bytes, 0)
                if self.held == 0:
                    continue
                candidate = self.next_candidate()
                target = self.target_of(candidate, &exact)
                if target >= self.chunk_count:
                    self.bad_rank = True
                elif self.wanted[<int64_t>(target >> 6)] >> (target & 63) & 1:
                    _put(&self.found, <uint32_t>target if exact else <uint32_t>target | INTERIOR)
                    _put_wide(&self.holders, address + <uint64_t>number)
                    _put_wide(&self.values, value)
            at += count * self.word
            address += <uint64_t>(count * self.word)
            left -= count
        return 0


def find_pointers_to(
    index,
    memory,
    const uint64_t[::1] start not None,
    const uint64_t[::1] end not None,
    address_mask,
    const uint64_t[::1] wanted not None,
):
    """See ``reference.find_pointers_to``."""
    cdef _PointerCollector pointers = _PointerCollector(index, memory, address_mask)
    cdef Stretch stretch
    cdef int64_t number
    _check_ranges(start, end)
    _check_bits_of(index, wanted)
    pointers.wanted = wanted
    with nogil:
        if pointers.span:
            for number in range(start.shape[0]):
                stretch.next = start[number]
                stretch.limit = end[number]
                while pointers.find_stretch(&stretch):
                    pointers.look_at(&stretch)
    pointers.check_ranks()
    return PointersFound(
        _chunk_array(&pointers.holders).view(np.uint64),
        _chunk_array(&pointers.values).view(np.uint64),
        _chunk_array(&pointers.found),
    )


@cython.final
cdef class _Decoder(_Pointers):
    """Writes down where some addresses are kept in another form."""

    cdef ChunkNumbers numbers, holders, forms
    cdef const uint64_t *addresses
    cdef int64_t address_count
    # An address is first compared with what all have in common, then looked for in two filters of bits by hash: of
    # whole addresses, and of their low halves.
    cdef uint64_t least, reach, sample, alike, low_alike
    cdef uint64_t[::1] whole_bits, low_bits
    cdef int filter_shift
    cdef bint may_be_compressed

    def __dealloc__(self):
        free(self.numbers.data)
        free(self.holders.data)
        free(self.forms.data)

    cdef prepare(self, const uint64_t[::1] addresses):
        cdef int64_t number
        cdef uint64_t differing = 0, hashed
        cdef int bits = SMALLEST_FILTER
        self.addresses = &addresses[0]
        self.address_count = addresses.shape[0]
        if addresses[0] == 0:
            raise ValueError("the addresses do not ascend")
        for number in range(1, self.address_count):
            if addresses[number] <= addresses[number - 1]:
                raise ValueError("the addresses do not ascend")
            differing |= addresses[number] ^ addresses[0]
        self.least = addresses[0]
        self.reach = addresses[self.address_count - 1] - addresses[0]
        self.sample = addresses[0]
        # The low bits in which all are alike: chunks lie at multiples of 16.
        self.alike = (differing & (~differing + 1)) - 1
        self.low_alike = self.alike & RANK_MASK
        self.may_be_compressed = self.least < <uint64_t>1 << (32 + MOST_SHIFTED)
        while bits < LARGEST_FILTER and <int64_t>1 << bits < FILTER_BITS_EACH * self.address_count:
            bits += 1
        self.filter_shift = 64 - bits
        self.whole_bits = np.zeros(1 << (bits - 6), np.uint64)
        self.low_bits = np.zeros(1 << (bits - 6), np.uint64)
        for number in range(self.address_count):
            hashed = (addresses[number] * HASH_FACTOR) >> self.filter_shift
            self.whole_bits[<int64_t>(hashed >> 6)] |= <uint64_t>1 << (hashed & 63)
            hashed = ((addresses[number] & RANK_MASK) * HASH_FACTOR) >> self.filter_shift
            self.low_bits[<int64_t>(hashed >> 6)] |= <uint64_t>1 << (hashed & 63)

    cdef inline bint may_be_low(self, uint64_t half) except? -1 nogil:
        cdef uint64_t hashed
        if half == 0 or (half ^ self.sample) & self.low_alike:
            return False
        hashed = (half * HASH_FACTOR) >> self.filter_shift
        return self.low_bits[<int64_t>(hashed >> 6)] >> (hashed & 63) & 1

    cdef inline int offer(self, uint64_t value, uint64_t holder, uint32_t form) except -1 nogil:
        cdef uint64_t hashed
        if value - self.least > self.reach or (value ^ self.sample) & self.alike:
            return 0
        hashed = (value * HASH_FACTOR) >> self.filter_shift
        if self.whole_bits[<int64_t>(hashed >> 6)] >> (hashed & 63) & 1:
            return self.put_known(value, holder, form)
        return 0

    cdef int put_known(self, uint64_t value, uint64_t holder, uint32_t form) except -1 nogil:
        cdef int64_t low = 0, high = self.address_count, middle
        while low < high:
            middle = (low + high) >> 1
            if self.addresses[middle] < value:
                low = middle + 1
            else:
                high = middle
        if low == self.address_count or self.addresses[low] != value:
            return 0
        _put(&self.numbers, <uint32_t>low)
        _put(&self.forms, form)
        return _put_wide(&self.holders, holder)

    cdef int look_at(self, const Stretch *stretch) except -1 nogil:
        cdef const uint8_t *at = stretch.at
        cdef uint64_t address = stretch.address, word, following
        cdef int64_t number
        for number in range(stretch.words):
            word = load(at, self.word)
            following = load(at + self.word, self.word) if number + 1 < stretch.words else 0
            # Most memory is zeros, which are no address in any form.
            if word | following:
                if self.word == 4 or may_be_address(
                    word, following, self.least, self.reach, self.sample, self.alike
                ):
                    self.look_at_word(word, following, address, number + 1 < stretch.words)
                if self.word == 8 and (
                    self.may_be_compressed or self.may_be_low(word & RANK_MASK) or self.may_be_low(word >> 32)
                ):
                    self.look_at_halves(stretch, number, word, address)
            at += self.word
            address += <uint64_t>self.word
        return 0

    cdef int look_at_word(self, uint64_t word, uint64_t following, uint64_t address, bint goes_on) except -1 nogil:
        cdef uint64_t all_bits = UINT64_MAX if self.word == 8 else RANK_MASK
        cdef int shift
        if self.word == 8:
            if word >> 48:
                self.offer(word & TAGGED_MASK, address, FORM_HIGH_TAG)
            self.offer(word >> TAG_SHIFT, address, FORM_LOW_TAG)
        for shift in range(1, MOST_SHIFTED + 1):
            self.offer((word << shift) & all_bits, address, FORM_SHIFTED)
        for shift in range(1, MOST_SHIFTED + 1):
            self.offer(word >> shift, address, FORM_SHIFTED)
        self.offer(swap_bytes(word, self.word), address, FORM_BYTE_SWAPPED)
        if goes_on:
            for shift in range(8, 8 * self.word, 8):
                self.offer(
                    ((word >> shift) | (following << (8 * self.word - shift))) & all_bits, address, FORM_UNALIGNED
                )
        return 0

    cdef int look_at_halves(
        self, const Stretch *stretch, int64_t number, uint64_t word, uint64_t address
    ) except -1 nogil:
        cdef uint64_t half, high
        cdef int64_t place, other
        cdef int part, shift, apart
        for part in range(2):
            half = word >> 32 if part else word & RANK_MASK
            if self.may_be_compressed:
                if part or word >> 32:
                    self.offer(half, address, FORM_COMPRESSED)
                for shift in range(1, MOST_SHIFTED + 1):
                    self.offer(half << shift, address, FORM_COMPRESSED)
            if not self.may_be_low(half):
                continue
            place = 2 * number + part
            for apart in range(-HALVES_APART, HALVES_APART + 1):
                other = place + apart
                if apart == 0 or apart == 1 or other < 0 or other >= 2 * stretch.words:
                    continue
                high = load(stretch.at + 4 * other, 4)
                if high:
                    self.offer(high << 32 | half, address, FORM_HALVES)
        return 0


def find_encoded(
    index,
    memory,
    const uint64_t[::1] start not None,
    const uint64_t[::1] end not None,
    const uint64_t[::1] addresses not None,
):
    """See ``reference.find_encoded``."""
    cdef _Decoder decoder = _Decoder(index, memory, UINT64_MAX)
    cdef Stretch stretch
    cdef int64_t number
    _check_ranges(start, end)
    if addresses.shape[0]:
        decoder.prepare(addresses)
        with nogil:
            for number in range(start.shape[0]):
                stretch.next = start[number]
                stretch.limit = end[number]
                while decoder.find_stretch(&stretch):
                    decoder.look_at(&stretch)
    return EncodedPointers(
        _chunk_array(&decoder.holders).view(np.uint64),
        _chunk_array(&decoder.numbers),
        _chunk_array(&decoder.forms),
    )
