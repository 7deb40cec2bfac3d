"""The allocator's free lists, laid over the chunks that a walk found.

Knows: how lists are linked, and what a chunk on a list has to be. Does not know: which list is which bin.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable

import numpy as np

from coreheap.kernels.codes import ChunkState, ListError, ListKind
from coreheap.kernels.index import ChunkIndex
from coreheap.kernels.values import (
    NO_WORD,
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
    if address > NO_WORD:
        return None
    run = bisect.bisect_right(memory_map.run_start, address) - 1
    if run < 0 or address + word_bytes > int(memory_map.run_end[run]):
        return None
    offset = int(memory_map.run_file_offset[run]) + address - int(memory_map.run_start[run])
    if offset + word_bytes > len(memory_map.file):
        return None
    return int.from_bytes(memory_map.file[offset : offset + word_bytes].tobytes(), "little")


class _List:
    """One list on its way through the heap: the rules that both directions share."""

    def __init__(
        self,
        memory_map: MemoryMap,
        index: ChunkIndex,
        number: int,
        kind: ListKind,
        state: int,
        sizes: tuple[int, int],
        end: int,
        report: _Reporter,
    ) -> None:
        self.memory_map = memory_map
        self.index = index
        self.number = number
        self.doubly = kind == ListKind.DOUBLY
        self.linkable = ChunkState.FREE_UNLISTED if self.doubly else ChunkState.IN_USE
        self.state = state
        self.sizes = sizes
        self.end = end
        self.report = report
        self.word = index.geometry.word_bytes
        self.count = 0
        self.byte_count = 0

    def read(self, address: int) -> int | None:
        return read_word(self.memory_map, address, self.word)

    def find(self, header: int) -> tuple[int, ListError]:
        """The chunk at a header and what speaks against it; LOOKS_IN_USE and LOOKS_FREE only where its links do not."""
        geometry = self.index.geometry
        if header < 0 or header % geometry.alignment != geometry.granule_phase:
            return -1, ListError.MISALIGNED
        chunk = self.index.chunk_starting_at(header)
        if chunk < 0:
            return -1, ListError.NOT_A_CHUNK_START
        state = int(self.index.state[chunk])
        if state == self.linkable:
            return chunk, ListError.NONE
        if state in LISTED_STATES:
            return chunk, ListError.ALREADY_LISTED
        if self.doubly and state == ChunkState.IN_USE:
            return chunk, ListError.LOOKS_IN_USE
        if not self.doubly and state == ChunkState.FREE_UNLISTED:
            return chunk, ListError.LOOKS_FREE
        return chunk, ListError.WRONG_STATE

    def claim(self, chunk: int, header: int, doubt: ListError, stored_at: int) -> int:
        """Give a chunk the list's state; returns its size."""
        chunk_bytes = self.index.bytes_of_chunk_at(header)
        self.index.state[chunk] = self.state
        if doubt != ListError.NONE:
            self.report(self, doubt, header, stored_at, header + chunk_bytes + self.word, NO_WORD)
        if not self.sizes[0] <= chunk_bytes <= self.sizes[1]:
            self.report(self, ListError.WRONG_SIZE, header, stored_at, stored_at, NO_WORD)
        return chunk_bytes

    def add(self, chunk_bytes: int) -> None:
        self.count += 1
        self.byte_count += chunk_bytes

    def follow_back(self, last: int, silent: bool) -> int:
        """Claim what is reached from the list's end along ``bk`` up to ``last``; the chunk behind ``last``, -1 if it is not met."""
        successor, stored_at = self.end, self.end + 3 * self.word
        pointer = self.read(stored_at)
        while pointer != last:
            if pointer is None:
                return -1
            chunk, doubt = self.find(pointer)
            if doubt != ListError.NONE:
                if not silent or successor != self.end:
                    address = successor
                    self.report(self, ListError.BROKEN_BACK_LINK, address, stored_at, stored_at, NO_WORD)
                return -1
            forward, back = self.read(pointer + 2 * self.word), self.read(pointer + 3 * self.word)
            if forward is None or back is None:
                return -1
            if forward != successor and self.read(forward + 3 * self.word) == pointer:
                if not silent or successor != self.end:
                    self.report(self, ListError.BROKEN_BACK_LINK, successor, stored_at, stored_at, NO_WORD)
                return -1
            chunk_bytes = self.claim(chunk, pointer, ListError.NONE, stored_at)
            if forward != successor:
                place = pointer + 2 * self.word
                self.report(self, ListError.BROKEN_FORWARD_LINK, pointer, stored_at, place, successor)
            self.add(chunk_bytes)
            successor, stored_at, pointer = pointer, pointer + 3 * self.word, back
        return successor


class _SizeRing:
    """Order and nextsize ring of a large bin; of unsorted chunks only that both words are 0."""

    def __init__(self, owner: _List, from_bytes: int) -> None:
        self.list = owner
        self.from_bytes = from_bytes
        self.is_known = True
        self.previous_bytes = 0
        self.first = self.first_back = self.leader = self.leader_forward = 0

    def check(self, header: int, chunk_bytes: int, stored_at: int) -> None:
        row, word = self.list, self.list.word
        is_first, before = self.previous_bytes == 0, self.previous_bytes
        self.previous_bytes = chunk_bytes
        if row.state == ChunkState.LARGE_BIN and not is_first and chunk_bytes > before:
            row.report(row, ListError.NOT_SORTED, header, stored_at, NO_WORD, NO_WORD)
        if chunk_bytes < self.from_bytes:
            return
        forward, back = row.read(header + 4 * word), row.read(header + 5 * word)
        if forward is None or back is None:
            self.is_known = False
            return
        if row.state != ChunkState.LARGE_BIN or (not is_first and chunk_bytes == before):
            if forward or back:
                place = header + (4 if forward else 5) * word
                row.report(row, ListError.STRAY_SIZE_LINK, header, stored_at, place, 0)
            return
        if not self.first:
            self.first, self.first_back = header, back
        elif self.is_known:
            self._compare(self.leader, 4, self.leader_forward, header, stored_at)
            self._compare(header, 5, back, self.leader, stored_at)
        self.leader, self.leader_forward = header, forward

    def close(self, stored_at: int) -> None:
        if self.first and self.is_known:
            self._compare(self.leader, 4, self.leader_forward, self.first, stored_at)
            self._compare(self.first, 5, self.first_back, self.leader, stored_at)

    def _compare(self, header: int, words: int, observed: int, expected: int, stored_at: int) -> None:
        if observed != expected:
            place = header + words * self.list.word
            self.list.report(self.list, ListError.BROKEN_SIZE_RING, header, stored_at, place, expected)


_Reporter = Callable[[_List, ListError, int, int, int, int], None]


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
    keys: UInt64Array | None = None,
    size_links_from: int = 0,
) -> OverlayOutcome:
    """Follows free lists and writes ``list_state`` into the state of the chunks on them.

    Columns, one row a list: ``heads`` the first pointer; ``list_state`` one of TCACHE to LARGE_BIN; chunk sizes from
    ``minimum_bytes`` to ``maximum_bytes`` belong on the list; ``sentinel`` the address that ends it, which is the
    bin's header address for DOUBLY and 0 for the others; ``expected_count`` -1 where the allocator keeps no count.
    ``safe_linking`` applies to the pointers in chunks (not to heads, not to DOUBLY). ``keys``: what word 1 of each block
    of a SINGLY_PAYLOAD list holds, NO_WORD where unknown. ``size_links_from``: the size from which on chunks of a DOUBLY
    list have fd_nextsize and bk_nextsize, 0 where they are not to be looked at.

    The lists are followed in the order given. A chunk joins a list when it starts exactly where the pointer leads and
    its state is still what the walk gave it: IN_USE for the singly linked, FREE_UNLISTED for DOUBLY. One that looks the
    other way joins too where its links say that it belongs there. So each chunk is visited at most once, which ends every
    cycle. ``ListError`` says what is recorded and what ends a list. Where ``fd`` ends a DOUBLY list early, the rest is
    followed from its other end along ``bk``.

    Raises ValueError where columns differ in length or a ``list_state`` is none of a list.
    """
    lists = len(heads)
    columns = (list_state, minimum_bytes, maximum_bytes, sentinel, expected_count, heads if keys is None else keys)
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

    error_code = np.zeros(lists, np.uint8)
    error_address = np.zeros(lists, np.uint64)
    stop_code = np.zeros(lists, np.uint8)
    error_count = np.zeros(lists, np.int64)
    closed = np.zeros(lists, np.bool_)
    count, byte_count = np.zeros(lists, np.int64), np.zeros(lists, np.uint64)
    errors: list[list[int]] = []

    def report(row: _List, code: ListError, address: int, stored_at: int, place: int, expected: int) -> None:
        if error_count[row.number] == 0:
            error_code[row.number], error_address[row.number] = code, address
        error_count[row.number] += 1
        if len(errors) < error_capacity:
            errors.append([row.number, code, address, stored_at, row.count, place, expected])

    for number in range(lists):
        end, pointer = int(sentinel[number]), int(heads[number])
        sizes = int(minimum_bytes[number]), int(maximum_bytes[number])
        row = _List(memory_map, index, number, kind, int(list_state[number]), sizes, end, report)
        ring = _SizeRing(row, size_links_from) if doubly and size_links_from else None
        key = None if keys is None or kind != ListKind.SINGLY_PAYLOAD else int(keys[number])
        stored_at, predecessor, previous_bytes = 0, end, 0
        stop, stop_row = ListError.NONE, -1
        while pointer != end:
            # The pointer was read from ``stored_at``; nothing about it is known.
            header = pointer - to_header
            chunk, doubt = row.find(header)
            link_address = header + 2 * word
            link = back_link = None
            if doubt in (ListError.NONE, ListError.LOOKS_IN_USE, ListError.LOOKS_FREE):
                link = row.read(link_address)
                if link is not None and doubly:
                    back_link = row.read(link_address + word)
                    if back_link is None:
                        link, link_address = None, link_address + word
                if doubt == ListError.LOOKS_IN_USE and back_link != predecessor:
                    doubt = ListError.WRONG_STATE
                elif back_link not in (None, predecessor) and row.read((back_link or 0) + 2 * word) == header:
                    doubt = ListError.BROKEN_FORWARD_LINK
            if doubt not in (ListError.NONE, ListError.LOOKS_IN_USE, ListError.LOOKS_FREE):
                stop, stop_row = doubt, len(errors)
                address = header if doubt in (ListError.ALREADY_LISTED, ListError.WRONG_STATE) else pointer
                address = predecessor if doubt == ListError.BROKEN_FORWARD_LINK else address
                report(row, doubt, address, stored_at, stored_at, NO_WORD)
                break

            chunk_bytes = row.claim(chunk, header, doubt, stored_at)
            if link is None:
                report(row, ListError.NOT_SAVED, link_address, stored_at, NO_WORD, NO_WORD)
                row.add(chunk_bytes)
                stop, predecessor = ListError.NOT_SAVED, header
                break
            if back_link is not None and back_link != predecessor:
                report(row, ListError.BROKEN_BACK_LINK, header, stored_at, header + 3 * word, predecessor)
            if ring is not None:
                ring.check(header, chunk_bytes, stored_at)
            if kind == ListKind.SINGLY_PAYLOAD:
                if sizes[0] != sizes[1] and chunk_bytes < previous_bytes:
                    report(row, ListError.NOT_SORTED, header, stored_at, NO_WORD, NO_WORD)
                if key is not None and key != NO_WORD:
                    stored = row.read(header + 3 * word)
                    if stored is not None and stored != key:
                        report(row, ListError.WRONG_KEY, header, stored_at, header + 3 * word, key)
            row.add(chunk_bytes)
            predecessor, stored_at, previous_bytes = header, link_address, chunk_bytes
            pointer = link ^ (link_address >> SAFE_LINKING_SHIFT) if safe_linking and not doubly else link
            pointer &= (1 << 8 * word) - 1

        closed[number] = stop == ListError.NONE
        stop_code[number] = stop
        if doubly and stop != ListError.NONE:
            behind = row.follow_back(predecessor, False)
            closed[number] = behind >= 0
            if behind >= 0 and 0 <= stop_row < len(errors):
                errors[stop_row][6] = behind
        elif doubly:
            back_link = row.read(end + 3 * word)
            if back_link is not None and back_link != predecessor:
                behind = row.follow_back(predecessor, True)
                closed[number] = behind >= 0 or row.count > 0
                if behind >= 0:
                    report(row, ListError.BROKEN_FORWARD_LINK, predecessor, stored_at, stored_at, behind)
                else:
                    report(row, ListError.BROKEN_BACK_LINK, end, stored_at, end + 3 * word, predecessor)
            elif ring is not None:
                ring.close(stored_at)
        elif stop == ListError.NONE and expected_count[number] >= 0 and expected_count[number] != row.count:
            report(row, ListError.COUNT_MISMATCH, int(heads[number]), 0, NO_WORD, NO_WORD)
        count[number], byte_count[number] = row.count, row.byte_count

    return OverlayOutcome(
        count,
        byte_count,
        error_code,
        error_address,
        stop_code,
        error_count,
        np.array(errors, np.uint64).reshape(len(errors), 7),
        int(error_count.sum()),
        closed,
    )
