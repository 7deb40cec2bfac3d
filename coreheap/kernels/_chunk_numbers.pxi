# Numbers of chunks, as many as there turn out to be: what references and searches of them are collected in.
# Part of _compiled.pyx, which imports all names.

cdef extern from *:
    """
    #if defined(__linux__)
    #include <sys/mman.h>
    #include <unistd.h>
    #endif
    /* Searches jump about in the references: with small pages each jump costs a walk through the page tables as well.
       Whole pages, or realloc would find its block in two mappings and copy it each time that it grows. */
    static inline void coreheap_use_huge_pages(void *start, size_t bytes)
    {
    #if defined(__linux__) && defined(MADV_HUGEPAGE)
        uintptr_t page = (uintptr_t) sysconf(_SC_PAGESIZE), first = (uintptr_t) start & ~(page - 1);
        if (bytes >= (size_t) 4 << 20)
            madvise((void *) first, ((uintptr_t) start + bytes - first + page - 1) & ~(page - 1), MADV_HUGEPAGE);
    #endif
    }
    """
    void use_huge_pages "coreheap_use_huge_pages"(void *start, size_t bytes) noexcept nogil


cdef struct ChunkNumbers:
    uint32_t *data
    int64_t count
    int64_t room


cdef int _make_room(ChunkNumbers *numbers, int64_t more) except -1 nogil:
    """Room for ``more`` numbers behind those that are there."""
    cdef int64_t room
    cdef uint32_t *data
    if numbers.room - numbers.count >= more:
        return 0
    room = numbers.count + more + (numbers.room >> 1) + 1024
    data = <uint32_t *>realloc(numbers.data, <size_t>room * sizeof(uint32_t))
    if data == NULL:
        with gil:
            raise MemoryError(f"no room for {room} references")
    use_huge_pages(data, <size_t>room * sizeof(uint32_t))
    numbers.data = data
    numbers.room = room
    return 0


cdef inline int _put(ChunkNumbers *numbers, uint32_t value) except -1 nogil:
    if numbers.count == numbers.room:
        _make_room(numbers, 1)
    numbers.data[numbers.count] = value
    numbers.count += 1
    return 0


cdef object _chunk_array(ChunkNumbers *numbers):
    """The numbers as a numpy array, which owns their memory from now on."""
    cdef cython_view.array wrapped
    cdef uint32_t *data = numbers.data
    if numbers.count == 0:
        free(data)
        numbers.data = NULL
        numbers.room = 0
        return np.empty(0, np.uint32)
    if numbers.count < numbers.room:
        data = <uint32_t *>realloc(data, <size_t>numbers.count * sizeof(uint32_t))
        if data == NULL:
            data = numbers.data
    wrapped = <uint32_t[:numbers.count]>data
    wrapped.callback_free_data = free
    numbers.data = NULL
    numbers.count = numbers.room = 0
    return np.asarray(wrapped)
