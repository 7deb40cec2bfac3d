# Free lists, laid over the chunks that a walk found: the twin of reference/lists.py.
# Part of _compiled.pyx, which imports all names.


@cython.final
cdef class _Memory:
    """The saved runs of a ``MemoryMap``."""

    cdef const uint8_t[::1] file
    cdef const uint64_t[::1] run_start
    cdef const uint64_t[::1] run_end
    cdef const uint64_t[::1] run_file_offset
    cdef int64_t run_count
    cdef int64_t last_run

    def __cinit__(self, memory_map):
        self.file = memory_map.file
        self.run_start = memory_map.run_start
        self.run_end = memory_map.run_end
        self.run_file_offset = memory_map.run_file_offset
        self.run_count = self.run_start.shape[0]
        self.last_run = 0

    cdef int64_t run_containing(self, uint64_t address) except -2 nogil:
        """The run that holds an address, -1 without; the last answer is tried first."""
        cdef int64_t low = 0, high = self.run_count, middle
        if self.last_run < self.run_count:
            if self.run_start[self.last_run] <= address < self.run_end[self.last_run]:
                return self.last_run
        while low < high:
            middle = (low + high) >> 1
            if self.run_start[middle] <= address:
                low = middle + 1
            else:
                high = middle
        low -= 1
        if low < 0 or address >= self.run_end[low]:
            return -1
        self.last_run = low
        return low

    cdef int64_t run_behind(self, uint64_t address) except -1 nogil:
        """The first run that starts behind an address; the number of runs where none does."""
        cdef int64_t low = 0, high = self.run_count, middle
        while low < high:
            middle = (low + high) >> 1
            if self.run_start[middle] <= address:
                low = middle + 1
            else:
                high = middle
        return low

    cdef void announce(self, uint64_t address) noexcept nogil:
        """Starts to load a word into the cache that is going to be read, when it lies in the run of the last answer.

        Following a list costs one access to far memory for each chunk; so the lookup runs while that is on its way.
        """
        cdef uint64_t distance
        if self.last_run < self.run_count and self.file.shape[0]:
            distance = address - self.run_start[self.last_run]
            distance += self.run_file_offset[self.last_run]
            if distance < <uint64_t>self.file.shape[0]:
                prefetch(&self.file[0], <int64_t>distance)

    cdef int read(self, uint64_t base, uint64_t distance, int word, uint64_t *value) except -1 nogil:
        """Reads the word at base + distance; 0 where it is not saved."""
        cdef uint64_t address, offset, file_offset, file_bytes = self.file.shape[0]
        cdef int64_t run
        if base > UINT64_MAX - distance:
            return 0
        address = base + distance
        run = self.run_containing(address)
        if run < 0 or self.run_end[run] - address < <uint64_t>word:
            return 0
        offset = address - self.run_start[run]
        file_offset = self.run_file_offset[run]
        if file_offset > file_bytes or offset > file_bytes - file_offset:
            return 0
        if file_bytes - file_offset - offset < <uint64_t>word:
            return 0
        value[0] = load(&self.file[<int64_t>(file_offset + offset)], word)
        return 1


@cython.final
cdef class _Overlay:
    """The result columns of an overlay while it is made."""

    cdef int64_t[::1] count
    cdef uint64_t[::1] byte_count
    cdef uint8_t[::1] error_code
    cdef uint64_t[::1] error_address
    cdef uint8_t[::1] stop_code
    cdef int64_t[::1] error_count
    cdef uint64_t[:, ::1] errors
    cdef int64_t error_rows
    cdef int64_t error_total

    cdef int report(self, int64_t number, int code, uint64_t address, uint64_t stored_at) except -1 nogil:
        if self.error_count[number] == 0:
            self.error_code[number] = <uint8_t>code
            self.error_address[number] = address
        self.error_count[number] += 1
        self.error_total += 1
        if self.error_rows < self.errors.shape[0]:
            self.errors[self.error_rows, 0] = <uint64_t>number
            self.errors[self.error_rows, 1] = <uint64_t>code
            self.errors[self.error_rows, 2] = address
            self.errors[self.error_rows, 3] = stored_at
            self.errors[self.error_rows, 4] = <uint64_t>self.count[number]
            self.error_rows += 1
        return 0


cdef int _follow_list(
    _Memory memory,
    _Index index,
    uint8_t[::1] state,
    _Overlay result,
    int64_t number,
    uint64_t head,
    uint8_t list_state,
    uint64_t minimum_bytes,
    uint64_t maximum_bytes,
    uint64_t end,
    int kind,
    bint safe_linking,
) except -1 nogil:
    """Follows one list, as in the reference."""
    cdef int word = index.geometry.word
    cdef uint64_t header_bytes = 2 * word
    cdef uint64_t to_header = header_bytes if kind == LIST_SINGLY_PAYLOAD else 0
    cdef uint64_t mask = UINT64_MAX if word == 8 else <uint64_t>0xFFFFFFFF
    cdef uint8_t linkable = FREE_UNLISTED if kind == LIST_DOUBLY else IN_USE
    cdef uint64_t pointer = head, stored_at = 0, predecessor = end
    cdef uint64_t header, link_address, chunk_bytes, granule, link = 0, back_link = 0
    cdef int64_t chunk, region = -1
    cdef int stop
    cdef bint saved, located
    while pointer != end:
        stop = ERROR_NONE
        header = pointer - to_header
        chunk = -1
        if pointer < to_header or header & <uint64_t>(index.geometry.alignment - 1) != index.geometry.phase:
            stop = ERROR_MISALIGNED
        else:
            memory.announce(header + header_bytes)
            chunk = index.find(header, True, &region)
            if chunk < 0:
                stop = ERROR_NOT_A_CHUNK_START
            elif state[chunk] != linkable:
                stop = ERROR_ALREADY_LISTED if 1 <= state[chunk] <= LARGE_BIN else ERROR_WRONG_STATE
        if stop != ERROR_NONE:
            located = stop == ERROR_ALREADY_LISTED or stop == ERROR_WRONG_STATE
            result.report(number, stop, header if located else pointer, stored_at)
            result.stop_code[number] = <uint8_t>stop
            return 0

        if region < 0:
            chunk_bytes = index.mmapped_chunk_bytes[chunk - index.region_chunks]
        else:
            granule = (header - index.region_start[region]) >> index.geometry.granule_shift
            chunk_bytes = index.end_of(region, granule) - header
        state[chunk] = list_state
        if chunk_bytes < minimum_bytes or chunk_bytes > maximum_bytes:
            result.report(number, ERROR_WRONG_SIZE, header, stored_at)

        # A chunk's header lies below 2**63, so these sums cannot wrap.
        link_address = header + header_bytes
        saved = memory.read(header, header_bytes, word, &link)
        if saved and kind == LIST_DOUBLY:
            if not memory.read(header, header_bytes + <uint64_t>word, word, &back_link):
                saved = False
                link_address += <uint64_t>word
            elif back_link != predecessor:
                result.report(number, ERROR_BROKEN_BACK_LINK, header, stored_at)
        if not saved:
            result.report(number, ERROR_NOT_SAVED, link_address, stored_at)
            result.stop_code[number] = ERROR_NOT_SAVED
        result.count[number] += 1
        result.byte_count[number] += chunk_bytes
        if not saved:
            return 0
        predecessor = header
        stored_at = link_address
        if safe_linking and kind != LIST_DOUBLY:
            link ^= link_address >> SAFE_LINKING_SHIFT
        pointer = link & mask

    if kind == LIST_DOUBLY and memory.read(end, 3 * <uint64_t>word, word, &back_link) and back_link != predecessor:
        result.report(number, ERROR_BROKEN_BACK_LINK, end, stored_at)
    return 0


def overlay_free_lists(
    memory_map,
    index,
    const uint64_t[::1] heads not None,
    const uint8_t[::1] list_state not None,
    const uint64_t[::1] minimum_bytes not None,
    const uint64_t[::1] maximum_bytes not None,
    const uint64_t[::1] sentinel not None,
    const int64_t[::1] expected_count not None,
    kind,
    bint safe_linking,
    geometry,
    int64_t error_capacity=64,
):
    """See ``reference.overlay_free_lists``."""
    cdef int64_t lists = heads.shape[0], number
    cdef _Memory memory = _Memory(memory_map)
    cdef _Index columns = _Index(index)
    cdef _Overlay result = _Overlay.__new__(_Overlay)
    cdef uint8_t[::1] state = index.state
    cdef int list_kind = int(_ListKind(kind))
    if not (
        lists == list_state.shape[0] == minimum_bytes.shape[0] == maximum_bytes.shape[0] == sentinel.shape[0]
        and lists == expected_count.shape[0]
    ):
        raise ValueError("the columns of free lists differ in length")
    for number in range(lists):
        if not 1 <= list_state[number] <= LARGE_BIN:
            raise ValueError("a free list cannot give its chunks that state")
    if geometry != index.geometry:
        raise ValueError("the index has another geometry")
    count = np.zeros(lists, np.int64)
    byte_count = np.zeros(lists, np.uint64)
    error_code = np.zeros(lists, np.uint8)
    error_address = np.zeros(lists, np.uint64)
    stop_code = np.zeros(lists, np.uint8)
    error_count = np.zeros(lists, np.int64)
    errors = np.zeros((max(error_capacity, 0), 5), np.uint64)
    result.count = count
    result.byte_count = byte_count
    result.error_code = error_code
    result.error_address = error_address
    result.stop_code = stop_code
    result.error_count = error_count
    result.errors = errors
    with nogil:
        for number in range(lists):
            _follow_list(
                memory,
                columns,
                state,
                result,
                number,
                heads[number],
                list_state[number],
                minimum_bytes[number],
                maximum_bytes[number],
                sentinel[number],
                list_kind,
                safe_linking,
            )
            if (
                result.stop_code[number] == ERROR_NONE
                and expected_count[number] >= 0
                and expected_count[number] != result.count[number]
            ):
                result.report(number, ERROR_COUNT_MISMATCH, heads[number], 0)
    return OverlayOutcome(
        count,
        byte_count,
        error_code,
        error_address,
        stop_code,
        error_count,
        errors[: result.error_rows],
        result.error_total,
    )
