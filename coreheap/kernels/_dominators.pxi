# Dominators and sums over chunks: the twin of reference/dominators.py.
# Part of _compiled.pyx, which imports all names.

cdef enum:
    VERDICT_SLOTS = 8


cdef int64_t _number_nodes(
    const offset_t[::1] first,
    const uint32_t[::1] target,
    const uint32_t[::1] roots,
    uint32_t[::1] node_of,
    uint32_t[::1] chunk_of,
    uint32_t[::1] parent,
    uint64_t[::1] next_edge,
) except -1 nogil:
    """ChunkNumbers chunks in the order of a depth-first search; ``parent`` of a node serves as the way back."""
    cdef int64_t number
    cdef uint32_t count = 0, node, chunk
    cdef uint64_t position, end
    for number in range(roots.shape[0]):
        chunk = roots[number] & CHUNK_MASK
        if node_of[chunk]:
            continue
        count += 1
        node_of[chunk] = count
        chunk_of[count] = chunk
        parent[count] = 0
        next_edge[count] = first[chunk]
        node = count
        while node:
            chunk = chunk_of[node]
            position = next_edge[node]
            end = first[chunk + 1]
            while position < end and node_of[target[position] & CHUNK_MASK]:
                position += 1
            next_edge[node] = position + 1
            if position >= end:
                node = parent[node]
                continue
            chunk = target[position] & CHUNK_MASK
            count += 1
            node_of[chunk] = count
            chunk_of[count] = chunk
            parent[count] = node
            next_edge[count] = first[chunk]
            node = count
    return count


cdef uint32_t _lowest_on_path(
    uint32_t node, uint32_t linked_from, uint32_t[::1] ancestor, uint32_t[::1] lowest, _Stack path
) except? 0 nogil:
    """The lowest semidominator between ``node`` and the first ancestor that is not linked yet; shortens the way."""
    cdef uint32_t above
    if node < linked_from or ancestor[node] < linked_from:
        return lowest[node]
    path.waiting.count = 0
    while ancestor[node] >= linked_from:
        _put(&path.waiting, node)
        node = ancestor[node]
    while path.waiting.count:
        path.waiting.count -= 1
        above = node
        node = path.waiting.data[path.waiting.count]
        lowest[node] = min(lowest[node], lowest[above])
        ancestor[node] = ancestor[above]
    return lowest[node]


cdef int _dominate(
    const offset_t[::1] referrers_first,
    const uint32_t[::1] referrers,
    const uint64_t[::1] is_root,
    int64_t count,
    const uint32_t[::1] node_of,
    const uint32_t[::1] chunk_of,
    const uint32_t[::1] parent,
    uint32_t[::1] ancestor,
    uint32_t[::1] lowest,
    uint32_t[::1] semidominator,
    uint32_t[::1] dominator,
    _Stack path,
) except -1 nogil:
    """Semi-NCA: semidominators backwards, then the nearest dominator at or above each (Georgiadis and Tarjan, 2005)."""
    cdef int64_t number
    cdef uint32_t node, chunk, other, semi, candidate
    cdef uint64_t position
    for number in range(count + 1):
        ancestor[number] = parent[number]
        lowest[number] = <uint32_t>number
    for number in range(count, 0, -1):
        node = <uint32_t>number
        chunk = chunk_of[node]
        semi = parent[node]
        if _is_set(is_root, chunk):
            semi = 0
        else:
            for position in range(referrers_first[chunk], referrers_first[chunk + 1]):
                other = node_of[referrers[position] & CHUNK_MASK]
                if other:
                    candidate = other
                    if other > node:
                        candidate = _lowest_on_path(other, node + 1, ancestor, lowest, path)
                    semi = min(semi, candidate)
        semidominator[node] = semi
        lowest[node] = semi
    dominator[0] = 0
    for number in range(1, count + 1):
        node = parent[number]
        while node > semidominator[number]:
            node = dominator[node]
        dominator[number] = node
    return 0


def find_dominators(edges, referrers, const uint32_t[::1] roots not None):
    """See ``reference.find_dominators``."""
    cdef const uint32_t[::1] target = edges.target, back_target = referrers.target
    cdef const uint32_t[::1] first32, back_first32
    cdef const uint64_t[::1] first64, back_first64
    cdef _Stack path = _Stack()
    cdef int64_t count, number
    _check_edges(edges)
    if referrers.chunk_count != edges.chunk_count or referrers.first.dtype != edges.first.dtype:
        raise ValueError("the referrers are not of the same references")
    room = edges.chunk_count + 1
    node_column = np.zeros(edges.chunk_count, np.uint32)
    chunk_column = np.zeros(room, np.uint32)
    parent_column = np.zeros(room, np.uint32)
    edge_column = np.empty(room, np.uint64)
    root_column = np.zeros((edges.chunk_count + 63) // 64, np.uint64)
    cdef uint32_t[::1] node_of = node_column, chunk_of = chunk_column, parent = parent_column
    cdef uint32_t[::1] ancestor, lowest, semidominator, dominator
    cdef uint64_t[::1] next_edge = edge_column, is_root = root_column
    is_narrow = edges.first.dtype == np.uint32
    for number in range(roots.shape[0]):
        _set(is_root, roots[number] & CHUNK_MASK)
    if is_narrow:
        first32 = edges.first
        back_first32 = referrers.first
        with nogil:
            count = _number_nodes[uint32_t](first32, target, roots, node_of, chunk_of, parent, next_edge)
    else:
        first64 = edges.first
        back_first64 = referrers.first
        with nogil:
            count = _number_nodes[uint64_t](first64, target, roots, node_of, chunk_of, parent, next_edge)
    next_edge = None
    del edge_column
    ancestor = np.empty(count + 1, np.uint32)
    lowest = np.empty(count + 1, np.uint32)
    semidominator = np.zeros(count + 1, np.uint32)
    dominator_column = np.zeros(count + 1, np.uint32)
    dominator = dominator_column
    if is_narrow:
        with nogil:
            _dominate[uint32_t](
                back_first32, back_target, is_root, count, node_of, chunk_of, parent, ancestor, lowest,
                semidominator, dominator, path,
            )
    else:
        with nogil:
            _dominate[uint64_t](
                back_first64, back_target, is_root, count, node_of, chunk_of, parent, ancestor, lowest,
                semidominator, dominator, path,
            )
    return DominatorTree(chunk_column[: count + 1].copy(), dominator_column)


def add_up_retained(const uint32_t[::1] dominator not None, uint64_t[::1] bytes_of_node not None):
    """See ``reference.add_up_retained``."""
    cdef int64_t node
    if dominator.shape[0] != bytes_of_node.shape[0]:
        raise ValueError("the columns of nodes differ in length")
    with nogil:
        for node in range(dominator.shape[0] - 1, 0, -1):
            if dominator[node] >= <uint64_t>node:
                with gil:
                    raise ValueError(f"node {node} cannot be dominated by {dominator[node]}")
            bytes_of_node[dominator[node]] += bytes_of_node[node]


# Sums


def chunk_sizes(index):
    """See ``reference.chunk_sizes``."""
    cdef _Index columns = _Index(index)
    cdef int64_t region, row, words, first_row, chunk
    cdef uint64_t start_bits, granule, previous = 0, granules
    sizes = np.zeros(index.chunk_count, np.uint32)
    cdef uint32_t[::1] column = sizes
    with nogil:
        for region in range(columns.region_count):
            words = columns.words_of(region)
            first_row = columns.region_first_word[region]
            chunk = columns.region_first_chunk[region] - 1
            for row in range(words):
                start_bits = columns.lookup[first_row + row, 0]
                while start_bits:
                    granule = (<uint64_t>row << 6) + <uint64_t>lowest_bit(start_bits)
                    start_bits &= start_bits - 1
                    if granule:
                        column[chunk] = <uint32_t>min(granule - previous, RANK_MASK)
                    chunk += 1
                    previous = granule
            granules = (columns.region_end[region] - columns.region_start[region]) >> columns.geometry.granule_shift
            column[chunk] = <uint32_t>min(granules - previous, RANK_MASK)
        for row in range(columns.mmapped_count):
            granules = columns.mmapped_chunk_bytes[row] >> columns.geometry.granule_shift
            column[columns.region_chunks + row] = <uint32_t>min(granules, RANK_MASK)
    return sizes


def count_by_verdict(
    const uint8_t[::1] verdict not None, const uint8_t[::1] state not None, const uint32_t[::1] granules not None
):
    """See ``reference.count_by_verdict``."""
    cdef int64_t chunk
    cdef int slot, size_class
    counts = np.zeros((VERDICT_SLOTS, SIZE_CLASSES), np.int64)
    totals = np.zeros((VERDICT_SLOTS, SIZE_CLASSES), np.uint64)
    cdef int64_t[:, ::1] count = counts
    cdef uint64_t[:, ::1] total = totals
    if not verdict.shape[0] == state.shape[0] == granules.shape[0]:
        raise ValueError("the columns of chunks differ in length")
    with nogil:
        for chunk in range(verdict.shape[0]):
            if state[chunk] != IN_USE:
                continue
            slot = verdict[chunk] & (VERDICT_SLOTS - 1)
            size_class = _class_of(granules[chunk])
            count[slot, size_class] += 1
            total[slot, size_class] += granules[chunk]
    return counts, totals


cdef inline int _class_of(uint32_t granules) noexcept nogil:
    if granules < EXACT_SIZE_CLASSES:
        return <int>granules
    return EXACT_SIZE_CLASSES + min(bit_length(granules) - 11, 53)
