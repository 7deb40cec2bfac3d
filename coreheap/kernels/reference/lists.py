"""The allocator's free lists, laid over the chunks that a walk found.

Knows: how lists are linked, and what a chunk on a list has to be. Does not know: which list is which bin.
"""

from __future__ import annotations

import bisect

import numpy as np

from coreheap.kernels.codes import ChunkState, ListError, ListKind
from coreheap.kernels.index import ChunkIndex
from coreheap.kernels.values import (
    ChunkGeometry,
    Int64Array,
    MemoryMap,
    OverlayOutcome,
    UInt8Array,
    UInt64Array,
)

LISTED_STATES = (
    ChunkState.TCACHE,
    ChunkState.FASTBIN,
    ChunkState.UNSORTED_BIN,
    ChunkState.SMALL_BIN,
    ChunkState.LARGE_BIN,
)
SAFE_LINKING_SHIFT = 12
"""glibc 2.32: the stored pointer is xored with its own address shifted by this, on every page size."""


def read_word(memory_map: MemoryMap, address: int, word_bytes: int) -> int | None:
    """The word at an address, None where it is not saved."""
    run = bisect.bisect_right(memory_map.run_start, address) - 1
    if run < 0 or address + word_bytes > int(memory_map.run_end[run]):
        return None
    offset = int(memory_map.run_file_offset[run]) + address - int(memory_map.run_start[run])
    if offset + word_bytes > len(memory_map.file):
        return None
    return int.from_bytes(memory_map.file[offset : offset + word_bytes].tobytes(), "little")


def overlay_free_lists(
    memory_map: MemoryMap,
    index: ChunkIndex,
    heads: UInt64Array,
    list_state: UInt8Array,
    minimum_bytes: UInt64Array,
    maximum_bytes: UInt64Array,
    sentinel: UInt64Array,
    expected_count: Int64Array,
    kind: ListKind,
    safe_linking: bool,
    geometry: ChunkGeometry,
    error_capacity: int = 64,
) -> OverlayOutcome:
    """Follows free lists and writes ``list_state`` into the state of the chunks on them.

    Columns, one row a list: ``heads`` the first pointer; ``list_state`` one of TCACHE to LARGE_BIN; chunk sizes from
    ``minimum_bytes`` to ``maximum_bytes`` belong on the list; ``sentinel`` the address that ends it, which is the
    bin's header address for DOUBLY and 0 for the others; ``expected_count`` -1 where the allocator keeps no count.
    ``safe_linking`` applies to the pointers in chunks (not to heads, not to DOUBLY).

    The lists are followed in the order given. A chunk joins a list when it starts exactly where the pointer leads and
    its state is still what the walk gave it: IN_USE for the singly linked, FREE_UNLISTED for DOUBLY. So each chunk is
    visited at most once, which ends every cycle. ``ListError`` says what is recorded and what ends a list.

    Raises ValueError where columns differ in length or a ``list_state`` is none of a list.
    """
    lists = len(heads)
    columns = (list_state, minimum_bytes, maximum_bytes, sentinel, expected_count)
    if any(len(column) != lists for column in columns):
        raise ValueError("the columns of free lists differ in length")
    if any(state not in LISTED_STATES for state in list_state.tolist()):
        raise ValueError("a free list cannot give its chunks that state")
    if geometry != index.geometry:
        raise ValueError("the index has another geometry")
    kind = ListKind(kind)
    word = geometry.word_bytes
    doubly = kind == ListKind.DOUBLY
    to_header = 2 * word if kind == ListKind.SINGLY_PAYLOAD else 0
    linkable = ChunkState.FREE_UNLISTED if doubly else ChunkState.IN_USE

    count = np.zeros(lists, np.int64)
    byte_count = np.zeros(lists, np.uint64)
    error_code = np.zeros(lists, np.uint8)
    error_address = np.zeros(lists, np.uint64)
    stop_code = np.zeros(lists, np.uint8)
    error_count = np.zeros(lists, np.int64)
    errors: list[tuple[int, int, int, int, int]] = []

    def report(number: int, code: ListError, address: int, stored_at: int) -> None:
        if error_count[number] == 0:
            error_code[number], error_address[number] = code, address
        error_count[number] += 1
        if len(errors) < error_capacity:
            errors.append((number, code, address, stored_at, int(count[number])))

    for number in range(lists):
        end = int(sentinel[number])
        pointer = int(heads[number])
        stored_at = 0
        predecessor = end
        while pointer != end:
            # The pointer was read from ``stored_at``; nothing about it is known.
            stop = ListError.NONE
            header = pointer - to_header
            chunk = -1
            if header < 0 or header % geometry.alignment != geometry.granule_phase:
                stop = ListError.MISALIGNED
            else:
                chunk = index.chunk_starting_at(header)
                if chunk < 0:
                    stop = ListError.NOT_A_CHUNK_START
                elif index.state[chunk] in LISTED_STATES:
                    stop = ListError.ALREADY_LISTED
                elif index.state[chunk] != linkable:
                    stop = ListError.WRONG_STATE
            if stop != ListError.NONE:
                located = stop in (ListError.ALREADY_LISTED, ListError.WRONG_STATE)
                report(number, stop, header if located else pointer, stored_at)
                stop_code[number] = stop
                break

            chunk_bytes = index.bytes_of_chunk_at(header)
            index.state[chunk] = list_state[number]
            if not int(minimum_bytes[number]) <= chunk_bytes <= int(maximum_bytes[number]):
                report(number, ListError.WRONG_SIZE, header, stored_at)

            link_address = header + 2 * word
            link = read_word(memory_map, link_address, word)
            if link is not None and doubly:
                back_link = read_word(memory_map, link_address + word, word)
                if back_link is None:
                    link, link_address = None, link_address + word
                elif back_link != predecessor:
                    report(number, ListError.BROKEN_BACK_LINK, header, stored_at)
            if link is None:
                report(number, ListError.NOT_SAVED, link_address, stored_at)
                stop_code[number] = ListError.NOT_SAVED
            count[number] += 1
            byte_count[number] += np.uint64(chunk_bytes)
            if link is None:
                break
            predecessor, stored_at = header, link_address
            pointer = link ^ (link_address >> SAFE_LINKING_SHIFT) if safe_linking and not doubly else link
            pointer &= (1 << 8 * word) - 1

        if stop_code[number] == ListError.NONE:
            if doubly:
                back_link = read_word(memory_map, end + 3 * word, word)
                if back_link is not None and back_link != predecessor:
                    report(number, ListError.BROKEN_BACK_LINK, end, stored_at)
            if expected_count[number] >= 0 and expected_count[number] != count[number]:
                report(number, ListError.COUNT_MISMATCH, int(heads[number]), 0)

    return OverlayOutcome(
        count,
        byte_count,
        error_code,
        error_address,
        stop_code,
        error_count,
        np.array(errors, np.uint64).reshape(len(errors), 5),
        int(error_count.sum()),
    )
