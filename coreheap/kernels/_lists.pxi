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


cdef uint64_t NO_WORD = UINT64_MAX


@cython.final
cdef class _Overlay:
    """The result columns of an overlay while it is made."""

    cdef int64_t[::1] count
    cdef uint64_t[::1] byte_count
    cdef uint8_t[::1] error_code
    cdef uint64_t[::1] error_address
    cdef uint8_t[::1] stop_code
    cdef int64_t[::1] error_count
    cdef uint8_t[::1] closed
    cdef uint64_t[:, ::1] errors
    cdef int64_t error_rows
    cdef int64_t error_total

    cdef int report(
        self, int64_t number, int code, uint64_t address, uint64_t stored_at, uint64_t place, uint64_t expected
    ) except -1 nogil:
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
            self.errors[self.error_rows, 5] = place
            self.errors[self.error_rows, 6] = expected
            self.error_rows += 1
        return 0


cdef struct FreeListRow:
    int64_t number
    uint64_t end
    uint64_t minimum_bytes
    uint64_t maximum_bytes
    uint64_t size_links_from
    uint64_t key
    int kind
    uint8_t state
    uint8_t linkable
    bint safe_linking


cdef struct SizeRing:
    uint64_t previous_bytes
    uint64_t first
    uint64_t first_back
    uint64_t leader
    uint64_t leader_forward
    bint is_known


@cython.final
cdef class _Lists:
    """Everything that following one list after the other needs."""

    cdef _Memory memory
    cdef _Index index
    cdef _Overlay result
    cdef uint8_t[::1] state
    cdef int word

    cdef int find(
        self, const FreeListRow *row, uint64_t header, int64_t *chunk, int64_t *region
    ) except -1 nogil:
        """What speaks against the chunk at a header, as in the reference."""
        cdef uint8_t state
        chunk[0] = -1
        if header & <uint64_t>(self.index.geometry.alignment - 1) != self.index.geometry.phase:
            return ERROR_MISALIGNED
        self.memory.announce(header + 2 * <uint64_t>self.word)
        chunk[0] = self.index.find(header, True, region)
        if chunk[0] < 0:
            return ERROR_NOT_A_CHUNK_START
        state = self.state[chunk[0]]
        if state == row.linkable:
            return ERROR_NONE
        if 1 <= state <= LARGE_BIN:
            return ERROR_ALREADY_LISTED
        if row.kind == LIST_DOUBLY and state == IN_USE:
            return ERROR_LOOKS_IN_USE
        if row.kind != LIST_DOUBLY and state == FREE_UNLISTED:
            return ERROR_LOOKS_FREE
        return ERROR_WRONG_STATE

    cdef uint64_t claim(
        self, const FreeListRow *row, int64_t chunk, int64_t region, uint64_t header, int doubt, uint64_t stored_at
    ) except? 0 nogil:
        """Gives a chunk the list's state; returns its size, which is never 0."""
        cdef uint64_t chunk_bytes, granule
        if region < 0:
            chunk_bytes = self.index.mmapped_chunk_bytes[chunk - self.index.region_chunks]
        else:
            granule = (header - self.index.region_start[region]) >> self.index.geometry.granule_shift
            chunk_bytes = self.index.end_of(region, granule) - header
        self.state[chunk] = row.state
        if doubt != ERROR_NONE:
            self.result.report(
                row.number, doubt, header, stored_at, header + chunk_bytes + <uint64_t>self.word, NO_WORD
            )
        if chunk_bytes < row.minimum_bytes or chunk_bytes > row.maximum_bytes:
            self.result.report(row.number, ERROR_WRONG_SIZE, header, stored_at, stored_at, NO_WORD)
        return chunk_bytes

    cdef int compare_ring(
        self,
        const FreeListRow *row,
        uint64_t header,
        int words,
        uint64_t observed,
        uint64_t expected,
        uint64_t stored_at,
    ) except -1 nogil:
        if observed != expected:
            self.result.report(
                row.number,
                ERROR_BROKEN_SIZE_RING,
                header,
                stored_at,
                header + <uint64_t>(words * self.word),
                expected,
            )
        return 0

    cdef int check_ring(
        self, const FreeListRow *row, SizeRing *ring, uint64_t header, uint64_t chunk_bytes, uint64_t stored_at
    ) except -1 nogil:
        """Order and nextsize ring of a large bin, as in the reference."""
        cdef bint is_first = ring.previous_bytes == 0
        cdef uint64_t before = ring.previous_bytes, forward = 0, back = 0
        ring.previous_bytes = chunk_bytes
        if row.state == LARGE_BIN and not is_first and chunk_bytes > before:
            self.result.report(row.number, ERROR_NOT_SORTED, header, stored_at, NO_WORD, NO_WORD)
        if chunk_bytes < row.size_links_from:
            return 0
        if not (
            self.memory.read(header, 4 * <uint64_t>self.word, self.word, &forward)
            and self.memory.read(header, 5 * <uint64_t>self.word, self.word, &back)
        ):
            ring.is_known = False
            return 0
        if row.state != LARGE_BIN or (not is_first and chunk_bytes == before):
            if forward or back:
                self.result.report(
                    row.number,
                    ERROR_STRAY_SIZE_LINK,
                    header,
                    stored_at,
                    header + <uint64_t>((4 if forward else 5) * self.word),
                    0,
                )
            return 0
        if not ring.first:
            ring.first = header
            ring.first_back = back
        elif ring.is_known:
            self.compare_ring(row, ring.leader, 4, ring.leader_forward, header, stored_at)
            self.compare_ring(row, header, 5, back, ring.leader, stored_at)
        ring.leader = header
        ring.leader_forward = forward
        return 0

    cdef int follow_back(
        self, const FreeListRow *row, uint64_t last, bint silent, uint64_t *behind
    ) except -1 nogil:
        """Whether ``last`` is met from the list's end along ``bk``, and the chunk behind it."""
        cdef uint64_t step = <uint64_t>self.word
        cdef uint64_t successor = row.end, stored_at = row.end + 3 * step
        cdef uint64_t pointer = 0, forward = 0, back = 0, other = 0, chunk_bytes
        cdef int64_t chunk = -1, region = -1
        cdef int doubt
        if not self.memory.read(row.end, 3 * step, self.word, &pointer):
            return 0
        while pointer != last:
            doubt = self.find(row, pointer, &chunk, &region)
            if doubt == ERROR_NONE:
                if not (
                    self.memory.read(pointer, 2 * step, self.word, &forward)
                    and self.memory.read(pointer, 3 * step, self.word, &back)
                ):
                    return 0
                if (
                    forward != successor
                    and self.memory.read(forward, 3 * step, self.word, &other)
                    and other == pointer
                ):
                    doubt = ERROR_BROKEN_BACK_LINK
            if doubt != ERROR_NONE:
                if not silent or successor != row.end:
                    self.result.report(row.number, ERROR_BROKEN_BACK_LINK, successor, stored_at, stored_at, NO_WORD)
                return 0
            chunk_bytes = self.claim(row, chunk, region, pointer, ERROR_NONE, stored_at)
            if forward != successor:
                self.result.report(
                    row.number, ERROR_BROKEN_FORWARD_LINK, pointer, stored_at, pointer + 2 * step, successor
                )
            self.result.count[row.number] += 1
            self.result.byte_count[row.number] += chunk_bytes
            successor = pointer
            stored_at = pointer + 3 * step
            pointer = back
        behind[0] = successor
        return 1

    cdef int follow(self, const FreeListRow *row, uint64_t head, int64_t expected_count) except -1 nogil:
        """Follows one list, as in the reference."""
        cdef int word = self.word
        cdef uint64_t step = <uint64_t>word
        cdef bint doubly = row.kind == LIST_DOUBLY
        cdef uint64_t to_header = 2 * step if row.kind == LIST_SINGLY_PAYLOAD else 0
        cdef uint64_t mask = UINT64_MAX if word == 8 else <uint64_t>0xFFFFFFFF
        cdef bint with_ring = doubly and row.size_links_from != 0
        cdef uint64_t pointer = head, stored_at = 0, predecessor = row.end, previous_bytes = 0
        cdef uint64_t header, link_address, chunk_bytes, link = 0, back_link = 0, other = 0, behind = 0
        cdef int64_t chunk = -1, region = -1, stop_row = -1, number = row.number
        cdef int doubt, stop = ERROR_NONE
        cdef bint saved, joins
        cdef SizeRing ring = SizeRing(0, 0, 0, 0, 0, True)
        while pointer != row.end:
            header = pointer - to_header
            saved = False
            if pointer < to_header:
                doubt = ERROR_MISALIGNED
            else:
                doubt = self.find(row, header, &chunk, &region)
            joins = doubt == ERROR_NONE or doubt == ERROR_LOOKS_IN_USE or doubt == ERROR_LOOKS_FREE
            # A chunk's header lies below 2**63, so these sums cannot wrap where it was found.
            link_address = header + 2 * step
            if joins:
                saved = self.memory.read(header, 2 * step, word, &link)
                if saved and doubly and not self.memory.read(header, 3 * step, word, &back_link):
                    saved = False
                    link_address += step
                if doubt == ERROR_LOOKS_IN_USE and not (saved and back_link == predecessor):
                    doubt = ERROR_WRONG_STATE
                    joins = False
                elif (
                    saved
                    and doubly
                    and back_link != predecessor
                    and self.memory.read(back_link, 2 * step, word, &other)
                    and other == header
                ):
                    doubt = ERROR_BROKEN_FORWARD_LINK
                    joins = False
            if not joins:
                stop = doubt
                stop_row = self.result.error_rows
                if doubt == ERROR_BROKEN_FORWARD_LINK:
                    self.result.report(number, doubt, predecessor, stored_at, stored_at, NO_WORD)
                elif doubt == ERROR_ALREADY_LISTED or doubt == ERROR_WRONG_STATE:
                    self.result.report(number, doubt, header, stored_at, stored_at, NO_WORD)
                else:
                    self.result.report(number, doubt, pointer, stored_at, stored_at, NO_WORD)
                break

            chunk_bytes = self.claim(row, chunk, region, header, doubt, stored_at)
            if not saved:
                self.result.report(number, ERROR_NOT_SAVED, link_address, stored_at, NO_WORD, NO_WORD)
                self.result.count[number] += 1
                self.result.byte_count[number] += chunk_bytes
                stop = ERROR_NOT_SAVED
                predecessor = header
                break
            if doubly and back_link != predecessor:
                self.result.report(number, ERROR_BROKEN_BACK_LINK, header, stored_at, header + 3 * step, predecessor)
            if with_ring:
                self.check_ring(row, &ring, header, chunk_bytes, stored_at)
            if row.kind == LIST_SINGLY_PAYLOAD:
                if row.minimum_bytes != row.maximum_bytes and chunk_bytes < previous_bytes:
                    self.result.report(number, ERROR_NOT_SORTED, header, stored_at, NO_WORD, NO_WORD)
                if row.key != NO_WORD and self.memory.read(header, 3 * step, word, &other) and other != row.key:
                    self.result.report(number, ERROR_WRONG_KEY, header, stored_at, header + 3 * step, row.key)
            self.result.count[number] += 1
            self.result.byte_count[number] += chunk_bytes
            predecessor = header
            stored_at = link_address
            previous_bytes = chunk_bytes
            if row.safe_linking and not doubly:
                link ^= link_address >> SAFE_LINKING_SHIFT
            pointer = link & mask

        self.result.closed[number] = stop == ERROR_NONE
        self.result.stop_code[number] = <uint8_t>stop
        if doubly and stop != ERROR_NONE:
            if self.follow_back(row, predecessor, False, &behind):
                self.result.closed[number] = 1
                if 0 <= stop_row < self.result.errors.shape[0]:
                    self.result.errors[stop_row, 6] = behind
        elif doubly:
            if self.memory.read(row.end, 3 * step, word, &back_link) and back_link != predecessor:
                if self.follow_back(row, predecessor, True, &behind):
                    self.result.report(
                        number, ERROR_BROKEN_FORWARD_LINK, predecessor, stored_at, stored_at, behind
                    )
                else:
                    self.result.closed[number] = self.result.count[number] > 0
                    self.result.report(
                        number, ERROR_BROKEN_BACK_LINK, row.end, stored_at, row.end + 3 * step, predecessor
                    )
            elif with_ring and ring.first and ring.is_known:
                self.compare_ring(row, ring.leader, 4, ring.leader_forward, ring.first, stored_at)
                self.compare_ring(row, ring.first, 5, ring.first_back, ring.leader, stored_at)
        elif stop == ERROR_NONE and expected_count >= 0 and expected_count != self.result.count[number]:
            self.result.report(number, ERROR_COUNT_MISMATCH, head, 0, NO_WORD, NO_WORD)
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
    const uint64_t[::1] keys=None,
    uint64_t size_links_from=0,
):
    """See ``reference.overlay_free_lists``."""
    cdef int64_t lists = heads.shape[0], number
    cdef _Overlay result = _Overlay.__new__(_Overlay)
    cdef _Lists walker = _Lists.__new__(_Lists)
    cdef FreeListRow row
    cdef bint with_keys = keys is not None
    walker.memory = _Memory(memory_map)
    walker.index = _Index(index)
    walker.result = result
    walker.state = index.state
    row.kind = int(_ListKind(kind))
    if not (
        lists == list_state.shape[0] == minimum_bytes.shape[0] == maximum_bytes.shape[0] == sentinel.shape[0]
        and lists == expected_count.shape[0]
        and (not with_keys or lists == keys.shape[0])
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
    closed = np.zeros(lists, np.uint8)
    errors = np.zeros((max(error_capacity, 0), 7), np.uint64)
    result.count = count
    result.byte_count = byte_count
    result.error_code = error_code
    result.error_address = error_address
    result.stop_code = stop_code
    result.error_count = error_count
    result.closed = closed
    result.errors = errors
    walker.word = walker.index.geometry.word
    row.linkable = FREE_UNLISTED if row.kind == LIST_DOUBLY else IN_USE
    row.safe_linking = safe_linking
    row.size_links_from = size_links_from
    with nogil:
        for number in range(lists):
            row.number = number
            row.end = sentinel[number]
            row.minimum_bytes = minimum_bytes[number]
            row.maximum_bytes = maximum_bytes[number]
            row.state = list_state[number]
            row.key = keys[number] if with_keys and row.kind == LIST_SINGLY_PAYLOAD else NO_WORD
            walker.follow(&row, heads[number], expected_count[number])
    return OverlayOutcome(
        count,
        byte_count,
        error_code,
        error_address,
        stop_code,
        error_count,
        errors[: result.error_rows],
        result.error_total,
        closed.view(np.bool_),
    )
