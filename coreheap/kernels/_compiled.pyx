# cython: language_level=3, boundscheck=True, wraparound=False, initializedcheck=False, cdivision=True
# cython: embedsignature=True, binding=True
"""The kernels of ``reference`` in Cython: the same names, arguments and results.

Knows and does not know: as ``reference``, which specifies every function here; look there for what they compute.

Offsets are signed and below 2**62, addresses of memory below 2**63, so sums of two of them cannot wrap. A size read
from the memory is compared with the bytes that are left before it is added. Headers are loaded with memcpy behind
explicit checks (the memory may be unaligned and read-only), everything else goes through bounds-checked memoryviews.
"""

import mmap
import sys

import numpy as np

cimport cython
from cython cimport view as cython_view
from libc.stdint cimport UINT64_MAX, int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from coreheap.kernels.codes import ListKind as _ListKind
from coreheap.kernels.codes import StopReason as _StopReason
from coreheap.kernels.values import (
    ArenaCandidates,
    ChainOutcome,
    ChunkRuns,
    DominatorTree,
    Edges,
    EncodedPointers,
    FreeRuns,
    LostChunks,
    MmappedChunks,
    OverlayOutcome,
    PointersFound,
    RootReferences,
    WalkOutcome,
)

if sys.byteorder != "little":
    raise ImportError("the compiled kernels need a little-endian machine")

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    /* The popcnt instruction, where the processor has it. Compiling with -mpopcnt would kill the process with SIGILL on
       the x86-64 machines that lack it, and function multiversioning needs ifunc support of the C library; a flag
       that is always predicted right costs nothing that could be measured. Elsewhere the compiler knows best. */
    #if defined(__x86_64__) && defined(__GNUC__)
    static int coreheap_has_popcnt = 0;
    static void coreheap_detect_processor(void) {
        __builtin_cpu_init();
        coreheap_has_popcnt = __builtin_cpu_supports("popcnt") != 0;
    }
    static inline int coreheap_popcount(uint64_t bits) {
        if (__builtin_expect(coreheap_has_popcnt, 1)) {
            uint64_t count;
            __asm__("popcnt %1, %0" : "=r"(count) : "r"(bits) : "cc");
            return (int) count;
        }
        return __builtin_popcountll(bits);
    }
    #else
    static void coreheap_detect_processor(void) {}
    static inline int coreheap_popcount(uint64_t bits) { return __builtin_popcountll(bits); }
    #endif
    static inline void coreheap_prefetch(const uint8_t *from, int64_t distance) {
        __builtin_prefetch((const void *) ((uintptr_t) from + (uintptr_t) distance));
    }
    static inline int coreheap_lowest_bit(uint64_t bits) { return __builtin_ctzll(bits); }
    static inline int coreheap_bit_length(uint64_t bits) { return bits ? 64 - __builtin_clzll(bits) : 0; }
    static inline uint64_t coreheap_load(const uint8_t *at, int word_bytes) {
        if (word_bytes == 8) { uint64_t word; memcpy(&word, at, 8); return word; }
        else { uint32_t word; memcpy(&word, at, 4); return word; }
    }
    """
    void detect_processor "coreheap_detect_processor"() nogil
    void prefetch "coreheap_prefetch"(const uint8_t *start, int64_t distance) noexcept nogil
    int popcount "coreheap_popcount"(uint64_t bits) noexcept nogil
    int lowest_bit "coreheap_lowest_bit"(uint64_t bits) noexcept nogil
    int bit_length "coreheap_bit_length"(uint64_t bits) noexcept nogil
    uint64_t load "coreheap_load"(const uint8_t *at, int word_bytes) noexcept nogil

detect_processor()

# The numbers of codes.py; test_codes holds them together.

cdef enum:
    IN_USE = 0
    LARGE_BIN = 5
    TOP = 6
    FENCEPOST = 7
    FREE_UNLISTED = 9
    STATE_SLOTS = 16

cdef enum:
    STOP_TOP = 0
    STOP_END = 1
    STOP_FENCEPOSTS_HEAP = 2
    STOP_FENCEPOSTS_MAIN = 3
    STOP_BROKEN = 4
    STOP_CUT = 5
    STOP_NO_ROOM = 6
    STOP_LIMIT = 7
    GOES_ON = -1

cdef enum:
    PREV_SIZE_MISMATCH = 1
    MMAPPED_FLAG_INSIDE = 2
    ARENA_FLAG_MISMATCH = 3
    FIRST_CHUNK_PREVIOUS_FREE = 4
    ADJACENT_FREE = 5
    FREE_BEFORE_TOP = 6
    TOP_SIZE_MISMATCH = 7
    MARKER_WITHOUT_FENCEPOST = 8

cdef enum:
    LIST_SINGLY_PAYLOAD = 0
    LIST_SINGLY_HEADER = 1
    LIST_DOUBLY = 2

cdef enum:
    ERROR_NONE = 0
    ERROR_WRONG_SIZE = 1
    ERROR_BROKEN_BACK_LINK = 2
    ERROR_COUNT_MISMATCH = 3
    ERROR_MISALIGNED = 4
    ERROR_NOT_A_CHUNK_START = 5
    ERROR_WRONG_STATE = 6
    ERROR_ALREADY_LISTED = 7
    ERROR_NOT_SAVED = 8
    ERROR_NOT_SORTED = 9
    ERROR_BROKEN_SIZE_RING = 10
    ERROR_STRAY_SIZE_LINK = 11
    ERROR_WRONG_KEY = 12
    ERROR_LOOKS_IN_USE = 13
    ERROR_LOOKS_FREE = 14
    ERROR_BROKEN_FORWARD_LINK = 15

cdef enum:
    FORM_HIGH_TAG = 1
    FORM_LOW_TAG = 2
    FORM_SHIFTED = 3
    FORM_BYTE_SWAPPED = 4
    FORM_UNALIGNED = 5
    FORM_COMPRESSED = 6
    FORM_HALVES = 7

CODES = {
    "ChunkState": {
        "IN_USE": IN_USE, "LARGE_BIN": LARGE_BIN, "TOP": TOP, "FENCEPOST": FENCEPOST, "FREE_UNLISTED": FREE_UNLISTED,
    },
    "StopReason": {
        "TOP": STOP_TOP, "END": STOP_END, "FENCEPOSTS_HEAP": STOP_FENCEPOSTS_HEAP,
        "FENCEPOSTS_MAIN": STOP_FENCEPOSTS_MAIN, "BROKEN": STOP_BROKEN, "CUT": STOP_CUT, "NO_ROOM": STOP_NO_ROOM,
        "LIMIT": STOP_LIMIT,
    },
    "WalkAnomaly": {
        "PREV_SIZE_MISMATCH": PREV_SIZE_MISMATCH, "MMAPPED_FLAG_INSIDE": MMAPPED_FLAG_INSIDE,
        "ARENA_FLAG_MISMATCH": ARENA_FLAG_MISMATCH, "FIRST_CHUNK_PREVIOUS_FREE": FIRST_CHUNK_PREVIOUS_FREE,
        "ADJACENT_FREE": ADJACENT_FREE, "FREE_BEFORE_TOP": FREE_BEFORE_TOP, "TOP_SIZE_MISMATCH": TOP_SIZE_MISMATCH,
        "MARKER_WITHOUT_FENCEPOST": MARKER_WITHOUT_FENCEPOST,
    },
    "ListKind": {
        "SINGLY_PAYLOAD": LIST_SINGLY_PAYLOAD, "SINGLY_HEADER": LIST_SINGLY_HEADER, "DOUBLY": LIST_DOUBLY,
    },
    "ListError": {
        "NONE": ERROR_NONE, "WRONG_SIZE": ERROR_WRONG_SIZE, "BROKEN_BACK_LINK": ERROR_BROKEN_BACK_LINK,
        "COUNT_MISMATCH": ERROR_COUNT_MISMATCH, "MISALIGNED": ERROR_MISALIGNED,
        "NOT_A_CHUNK_START": ERROR_NOT_A_CHUNK_START, "WRONG_STATE": ERROR_WRONG_STATE,
        "ALREADY_LISTED": ERROR_ALREADY_LISTED, "NOT_SAVED": ERROR_NOT_SAVED, "NOT_SORTED": ERROR_NOT_SORTED,
        "BROKEN_SIZE_RING": ERROR_BROKEN_SIZE_RING, "STRAY_SIZE_LINK": ERROR_STRAY_SIZE_LINK,
        "WRONG_KEY": ERROR_WRONG_KEY, "LOOKS_IN_USE": ERROR_LOOKS_IN_USE, "LOOKS_FREE": ERROR_LOOKS_FREE,
        "BROKEN_FORWARD_LINK": ERROR_BROKEN_FORWARD_LINK,
    },
    "PointerForm": {
        "HIGH_TAG": FORM_HIGH_TAG, "LOW_TAG": FORM_LOW_TAG, "SHIFTED": FORM_SHIFTED,
        "BYTE_SWAPPED": FORM_BYTE_SWAPPED, "UNALIGNED": FORM_UNALIGNED, "COMPRESSED": FORM_COMPRESSED,
        "HALVES": FORM_HALVES,
    },
}
"""The numbers that this module was compiled with, by enum and name of ``codes``."""

cdef enum:
    PREV_INUSE = 1
    IS_MMAPPED = 2
    NON_MAIN_ARENA = 4
    FLAGS = 7
    END_MARKER = 1
    GRANULES_PER_WORD = 64
    EXACT_SIZE_CLASSES = 1024
    SIZE_CLASSES = 1024 + 54
    SAFE_LINKING_SHIFT = 12
    PREFETCH_BYTES = 8192

cdef uint64_t RANK_MASK = 0xFFFFFFFF
cdef uint64_t ADDRESS_LIMIT = <uint64_t>1 << 63
cdef int64_t OFFSET_LIMIT = <int64_t>1 << 62

_STOP_REASONS = tuple(_StopReason)

include "_headers.pxi"
include "_walking.pxi"
include "_searching.pxi"
include "_columns.pxi"
include "_free_runs.pxi"
include "_lists.pxi"
include "_chunk_numbers.pxi"
include "_pointers.pxi"
include "_edges.pxi"
include "_lookups.pxi"
include "_marking.pxi"
include "_references.pxi"
include "_dominators.pxi"
