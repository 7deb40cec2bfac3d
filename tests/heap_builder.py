"""Builds images of glibc heaps whose every chunk is known.

Nothing here is taken from the product: sizes, flags, bins and links are written down once more, from the fact sheet, so
that a wrong constant in the product cannot agree with itself. Layouts of structures that changed between releases
(malloc_state, heap_info, tcache, mp_) are given by the caller as ``{field: offset}``.

From small to large: ``ImageMemory`` holds bytes at addresses; ``lay_out_segment`` fills a stretch with chunks of given
sizes and kinds; ``link_singly`` and ``link_ring`` put chunks on lists; ``write_malloc_state`` and its siblings write the
allocator's structures; ``HeapBuilder`` does all of it for random heaps and keeps the truth.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

PAGE = 4096

IN_USE = "in_use"
TCACHE = "tcache"
FASTBIN = "fastbin"
UNSORTED_BIN = "unsorted_bin"
SMALL_BIN = "small_bin"
LARGE_BIN = "large_bin"
TOP = "top"
FENCEPOST = "fencepost"

STATE_NUMBERS = {
    IN_USE: 0,
    TCACHE: 1,
    FASTBIN: 2,
    UNSORTED_BIN: 3,
    SMALL_BIN: 4,
    LARGE_BIN: 5,
    TOP: 6,
    FENCEPOST: 7,
}
BINNED = (UNSORTED_BIN, SMALL_BIN, LARGE_BIN)
LOOKS_FREE = BINNED
"""Kinds whose successor has PREV_INUSE clear."""

P_BIT, M_BIT, A_BIT = 1, 2, 4


@dataclass(frozen=True)
class Machine:
    """One of glibc's three chunk geometries."""

    name: str
    word_bytes: int
    alignment: int
    minimum: int
    phase: int
    sub_heap_reserve: int

    @property
    def header_bytes(self) -> int:
        return 2 * self.word_bytes

    @property
    def word_mask(self) -> int:
        return (1 << 8 * self.word_bytes) - 1

    def chunk_bytes_for(self, request: int) -> int:
        """request2size."""
        padded = (request + self.word_bytes + self.alignment - 1) // self.alignment * self.alignment
        return max(padded, self.minimum)

    def first_header(self, address: int) -> int:
        """The first possible chunk header at or above an address."""
        return address + (self.phase - address) % self.alignment

    @property
    def small_limit(self) -> int:
        """Sizes below go to small bins."""
        return {"64": 1024, "32a8": 512, "32a16": 1008}[self.name]

    def bin_number(self, chunk_bytes: int) -> int:
        """The bin (2 to 126) that a size belongs to."""
        if chunk_bytes < self.small_limit:
            return chunk_bytes // self.alignment + (1 if self.name == "32a16" else 0)
        first_shift, first_most, first_base = {
            "64": (6, 48, 48),
            "32a8": (6, 38, 56),
            "32a16": (6, 45, 49),
        }[self.name]
        steps = ((first_shift, first_most, first_base), (9, 20, 91), (12, 10, 110), (15, 4, 119), (18, 2, 124))
        for shift, most, base in steps:
            if chunk_bytes >> shift <= most:
                return base + (chunk_bytes >> shift)
        return 126

    def fastbin_number(self, chunk_bytes: int) -> int:
        return (chunk_bytes >> (4 if self.word_bytes == 8 else 3)) - 2

    def tcache_number(self, chunk_bytes: int) -> int:
        return (chunk_bytes - self.minimum) // self.alignment


MACHINE_64 = Machine("64", 8, 16, 32, 0, 64 << 20)
MACHINE_32A8 = Machine("32a8", 4, 8, 16, 0, 1 << 20)
MACHINE_32A16 = Machine("32a16", 4, 16, 16, 8, 1 << 20)
MACHINES = (MACHINE_64, MACHINE_32A8, MACHINE_32A16)


class ImageMemory:
    """Bytes at addresses, in blocks that do not overlap."""

    def __init__(self) -> None:
        self.blocks: dict[int, bytearray] = {}

    def add(self, address: int, byte_count: int) -> bytearray:
        """A new block of zeros."""
        for start, block in self.blocks.items():
            if address < start + len(block) and start < address + byte_count:
                raise ValueError(f"{address:#x} is taken")
        self.blocks[address] = bytearray(byte_count)
        return self.blocks[address]

    def locate(self, address: int, byte_count: int) -> tuple[bytearray, int]:
        for start, block in self.blocks.items():
            if start <= address and address + byte_count <= start + len(block):
                return block, address - start
        raise KeyError(hex(address))

    def holds(self, address: int, byte_count: int) -> bool:
        """Whether one block has all of these bytes."""
        return any(
            start <= address and address + byte_count <= start + len(block) for start, block in self.blocks.items()
        )

    def write(self, address: int, content: bytes) -> None:
        block, offset = self.locate(address, len(content))
        block[offset : offset + len(content)] = content

    def read(self, address: int, byte_count: int) -> bytes:
        block, offset = self.locate(address, byte_count)
        return bytes(block[offset : offset + byte_count])

    def put(self, address: int, value: int, byte_count: int) -> None:
        self.write(address, (value & ((1 << 8 * byte_count) - 1)).to_bytes(byte_count, "little"))

    def get(self, address: int, byte_count: int) -> int:
        return int.from_bytes(self.read(address, byte_count), "little")

    def runs(self) -> list[tuple[int, bytearray]]:
        """All blocks by address."""
        return sorted(self.blocks.items())


@dataclass
class BuiltChunk:
    """The truth about one chunk. ``arena_flag``: it carries NON_MAIN_ARENA."""

    header_address: int
    chunk_bytes: int
    state: str
    arena_flag: bool = False
    mmapped: bool = False

    @property
    def state_number(self) -> int:
        return STATE_NUMBERS[self.state]

    def payload_address(self, machine: Machine) -> int:
        return self.header_address + machine.header_bytes


@dataclass
class BuiltSegment:
    """A stretch that chunks tile: [start, end), its chunks in address order, fenceposts and top included."""

    start: int
    end: int
    chunks: list[BuiltChunk]
    non_main: bool
    ending: str
    top_address: int | None = None

    def of_state(self, *states: str) -> list[BuiltChunk]:
        return [chunk for chunk in self.chunks if chunk.state in states]


ENDINGS = ("top", "heap_fence", "short_heap_fence", "main_fence", "open")
"""How a segment ends: with top; with a retired sub-heap's fencepost and marker, the fencepost normal or of the larger
kind that a too small rest makes; with the main arena's two fenceposts; or with an ordinary chunk."""


def fence_bytes(machine: Machine, ending: str) -> int:
    """Bytes from the first fencepost's header to the end of a segment."""
    unused = machine.alignment - machine.header_bytes
    if ending in ("heap_fence", "main_fence"):
        return 2 * machine.header_bytes + unused
    if ending == "short_heap_fence":
        # rest + 2 words: the rest is one granule where that can happen at all (see fact sheet 3.5)
        rest = machine.alignment if machine.alignment == machine.header_bytes else 0
        return 2 * machine.header_bytes + rest + unused
    return 0


def lay_out_segment(
    memory: ImageMemory,
    machine: Machine,
    start: int,
    plan: Sequence[tuple[int, str]],
    *,
    end: int,
    ending: str = "top",
    non_main: bool = False,
    rng: random.Random | None = None,
) -> BuiltSegment:
    """Writes chunks of the given (bytes, state) one after the other, and an ending that reaches to ``end``.

    What is left between the last chunk and the ending is added to the last chunk, or to top. Payloads are filled with
    random bytes. Links are left to ``link_singly`` and ``link_ring``.
    """
    if start % machine.alignment != machine.phase or ending not in ENDINGS:
        raise ValueError("a segment cannot be like that")
    rng = rng or random.Random(0)
    word = machine.word_bytes
    chunks: list[BuiltChunk] = []
    address = start
    for chunk_bytes, state in plan:
        chunks.append(BuiltChunk(address, chunk_bytes, state))
        address += chunk_bytes
    ordinary_end = end - fence_bytes(machine, ending)
    top_address = None
    if ending == "top":
        if end - address < machine.minimum:
            raise ValueError("no room for top")
        top_address = address
        chunks.append(BuiltChunk(address, end - address, TOP))
    else:
        if not chunks or address > ordinary_end:
            raise ValueError("the plan does not fit")
        chunks[-1].chunk_bytes += ordinary_end - address
    for chunk in chunks:
        keeps_flag = chunk.state in (IN_USE, TCACHE, FASTBIN)
        chunk.arena_flag = non_main and keeps_flag
    # Payloads first: an in-use chunk owns the first word of its successor.
    for chunk in chunks:
        if chunk.state == TOP:
            continue
        usable_end = min(chunk.header_address + chunk.chunk_bytes + word, end)
        payload = chunk.payload_address(machine)
        if usable_end > payload:
            memory.write(payload, rng.randbytes(usable_end - payload))
    previous_is_free = False
    previous_bytes = 0
    for chunk in chunks:
        flags = (0 if previous_is_free else P_BIT) | (A_BIT if chunk.arena_flag else 0)
        memory.put(chunk.header_address + word, chunk.chunk_bytes | flags, word)
        if previous_is_free:
            memory.put(chunk.header_address, previous_bytes, word)
        previous_is_free = chunk.state in LOOKS_FREE
        previous_bytes = chunk.chunk_bytes
    chunks += _write_fence(memory, machine, ordinary_end, end, ending, previous_bytes if previous_is_free else None)
    return BuiltSegment(start, end, chunks, non_main, ending, top_address)


def _write_fence(
    memory: ImageMemory, machine: Machine, address: int, end: int, ending: str, free_before: int | None
) -> list[BuiltChunk]:
    if ending in ("top", "open"):
        if ending == "open" and free_before is not None:
            raise ValueError("an open segment cannot end with a free chunk")
        return []
    word = machine.word_bytes
    header = machine.header_bytes
    first_bytes = fence_bytes(machine, ending) - header - (machine.alignment - header)
    memory.put(address + word, first_bytes | (P_BIT if free_before is None else 0), word)
    if free_before is not None:
        memory.put(address, free_before, word)
    second = address + first_bytes
    memory.put(second, 0 if ending == "main_fence" else first_bytes, word)
    memory.put(second + word, header | P_BIT if ending == "main_fence" else P_BIT, word)
    if second % machine.alignment != machine.phase:
        # Both headers lie in one granule: one chunk to everybody who counts in granules.
        return [BuiltChunk(address, end - address, FENCEPOST)]
    return [BuiltChunk(address, first_bytes, FENCEPOST), BuiltChunk(second, end - second, FENCEPOST)]


def link_singly(
    memory: ImageMemory,
    machine: Machine,
    chunks: Sequence[BuiltChunk],
    *,
    to_payload: bool,
    safe_linking: bool,
    key: int | None = None,
) -> int:
    """Links chunks in the order given; returns the head pointer, 0 for none. ``key`` goes into the second word."""
    word = machine.word_bytes
    pointers = [chunk.payload_address(machine) if to_payload else chunk.header_address for chunk in chunks]
    for chunk, following in zip(chunks, [*pointers[1:], 0], strict=True):
        place = chunk.payload_address(machine)
        memory.put(place, following ^ (place >> 12) if safe_linking else following, word)
        if key is not None:
            memory.put(place + word, key, word)
    return pointers[0] if pointers else 0


def link_ring(
    memory: ImageMemory, machine: Machine, bin_header: int, chunks: Sequence[BuiltChunk], *, with_nextsize: bool = False
) -> tuple[int, int]:
    """Links chunks into a bin's ring, first to last; returns the bin's own fd and bk.

    ``with_nextsize``: a large bin, whose chunks must come in descending sizes.
    """
    word = machine.word_bytes
    ring = [bin_header, *(chunk.header_address for chunk in chunks)]
    for position, chunk in enumerate(chunks, start=1):
        memory.put(chunk.header_address + 2 * word, ring[(position + 1) % len(ring)], word)
        memory.put(chunk.header_address + 3 * word, ring[position - 1], word)
    if with_nextsize:
        leaders: list[BuiltChunk] = []
        for chunk in chunks:
            if leaders and leaders[-1].chunk_bytes == chunk.chunk_bytes:
                memory.put(chunk.header_address + 4 * word, 0, word)
                memory.put(chunk.header_address + 5 * word, 0, word)
                continue
            if leaders and leaders[-1].chunk_bytes < chunk.chunk_bytes:
                raise ValueError("a large bin is sorted by descending size")
            leaders.append(chunk)
        for position, chunk in enumerate(leaders):
            following = leaders[(position + 1) % len(leaders)]
            memory.put(chunk.header_address + 4 * word, following.header_address, word)
            memory.put(following.header_address + 5 * word, chunk.header_address, word)
    return ring[1 % len(ring)], ring[-1]


# The allocator's structures


BIN_POINTERS = 254
MALLOC_STATE_INTS = ("mutex", "flags", "have_fastchunks")
MALLOC_PAR_INTS = ("thp_mode", "hp_flags", "n_mmaps", "n_mmaps_max", "max_n_mmaps", "no_dyn_threshold")


def write_fields(
    memory: ImageMemory, machine: Machine, address: int, offsets: Mapping[str, int], values: Mapping[str, int]
) -> None:
    """Writes those of ``values`` that the layout has. Ints take 4 bytes, everything else a word."""
    for name, value in values.items():
        if name in offsets:
            memory.put(
                address + offsets[name], value, 4 if name in MALLOC_STATE_INTS + MALLOC_PAR_INTS else machine.word_bytes
            )


def bin_header(machine: Machine, state_address: int, offsets: Mapping[str, int], number: int) -> int:
    """Header address of bin ``number`` (1: unsorted): its fd and bk lie where a chunk's would."""
    return state_address + offsets["bins"] + (number - 1) * 2 * machine.word_bytes - 2 * machine.word_bytes


def write_malloc_state(
    memory: ImageMemory,
    machine: Machine,
    address: int,
    offsets: Mapping[str, int],
    *,
    bins: Mapping[int, Sequence[BuiltChunk]],
    fastbins: Mapping[int, int],
    values: Mapping[str, int],
) -> None:
    """Writes one malloc_state and links its bins.

    ``offsets``: mutex, flags, top, bins, binmap, next, system_mem, ... as far as the release has them. ``bins``: number
    -> chunks first to last; bins without chunks point to themselves. ``fastbins``: number -> head pointer. ``values``:
    every other field by name.
    """
    word = machine.word_bytes
    binmap = 0
    for number in range(1, BIN_POINTERS // 2 + 1):
        chunks = bins.get(number, ())
        header = bin_header(machine, address, offsets, number)
        first, last = link_ring(
            memory, machine, header, chunks, with_nextsize=bool(chunks) and chunks[0].state == LARGE_BIN
        )
        for chunk in chunks if number == 1 else ():
            # free clears both words of what is too large for a small bin, wherever it will be put.
            if chunk.chunk_bytes >= machine.small_limit:
                memory.put(chunk.header_address + 4 * word, 0, word)
                memory.put(chunk.header_address + 5 * word, 0, word)
        memory.put(header + 2 * word, first, word)
        memory.put(header + 3 * word, last, word)
        if chunks and number > 1:
            binmap |= 1 << number
    if "binmap" in offsets:
        memory.write(
            address + offsets["binmap"], struct.pack("<4I", *((binmap >> 32 * i) & 0xFFFFFFFF for i in range(4)))
        )
    for number, head in fastbins.items():
        memory.put(address + offsets["fastbinsY"] + number * word, head, word)
    write_fields(memory, machine, address, offsets, values)


def write_heap_info(
    memory: ImageMemory, machine: Machine, address: int, offsets: Mapping[str, int], values: Mapping[str, int]
) -> None:
    """Writes a sub-heap's header: ar_ptr, prev, size, mprotect_size, pagesize as far as the layout has them."""
    write_fields(memory, machine, address, offsets, values)


def write_tcache(
    memory: ImageMemory,
    machine: Machine,
    address: int,
    offsets: Mapping[str, int],
    *,
    count_bytes: int,
    counts: Sequence[int],
    heads: Mapping[int, int],
) -> None:
    """Writes a tcache_perthread_struct at its payload address; ``counts`` as they stand in memory (cached or left)."""
    for number, count in enumerate(counts):
        memory.put(address + offsets["counts"] + number * count_bytes, count, count_bytes)
    for number, head in heads.items():
        memory.put(address + offsets["entries"] + number * machine.word_bytes, head, machine.word_bytes)


def write_mmapped_chunk(
    memory: ImageMemory,
    machine: Machine,
    mapping_start: int,
    mapping_bytes: int,
    *,
    lead: int = 0,
    trailer: int = 0,
    huge: bool = False,
) -> BuiltChunk:
    """Writes the header of a chunk with its own mapping. ``lead``: from mapping start to header (memalign)."""
    lead = lead or machine.phase
    size = mapping_bytes - lead - trailer
    word = machine.word_bytes
    memory.put(mapping_start + lead, lead | int(huge), word)
    memory.put(mapping_start + lead + word, size | M_BIT, word)
    return BuiltChunk(mapping_start + lead, size, IN_USE, mmapped=True)


# Whole random heaps


@dataclass(frozen=True)
class Mix:
    """What a random heap is made of: relative weights of kinds, and the largest ordinary chunk."""

    weights: Mapping[str, float] = field(
        default_factory=lambda: {IN_USE: 8, TCACHE: 1, FASTBIN: 1, UNSORTED_BIN: 0.5, SMALL_BIN: 1, LARGE_BIN: 0.5}
    )
    largest: int = 4096
    typical: int = 96


def random_plan(rng: random.Random, machine: Machine, budget: int, mix: Mix) -> list[tuple[int, str]]:
    """Sizes and states of chunks that together take at most ``budget`` bytes, as glibc could have left them.

    Free neighbours would have been joined, so none occur, nor one at the end. Sizes fit the lists the states name.
    """
    plan: list[tuple[int, str]] = []
    used = 0
    kinds = list(mix.weights)
    weights = list(mix.weights.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        if kind in BINNED and plan and plan[-1][1] in BINNED:
            kind = IN_USE
        size = random_size(rng, machine, kind, mix)
        if used + size > budget:
            break
        plan.append((size, kind))
        used += size
    if plan and plan[-1][1] in BINNED:
        plan[-1] = (plan[-1][0], IN_USE)
    return plan


def random_size(rng: random.Random, machine: Machine, kind: str, mix: Mix) -> int:
    """A chunk size that can be found in that state."""
    low, high = machine.minimum, machine.chunk_bytes_for(mix.largest)
    if kind == TCACHE:
        high = machine.minimum + 63 * machine.alignment
    elif kind == FASTBIN:
        high = 128 if machine.word_bytes == 8 else 64
    elif kind == SMALL_BIN:
        high = machine.small_limit - machine.alignment
    elif kind == LARGE_BIN:
        low = -(-machine.small_limit // machine.alignment) * machine.alignment
        high = max(high, 2 * low)
    size = low + int(rng.expovariate(1 / mix.typical)) // machine.alignment * machine.alignment
    return size if size <= high else rng.randrange(low, high + 1, machine.alignment)


@dataclass
class BuiltList:
    """The truth about one free list: chunks in list order, the head pointer, and the address that ends it."""

    state: str
    number: int
    head: int
    sentinel: int
    chunks: list[BuiltChunk]


@dataclass
class BuiltHeap:
    """A whole heap: what was written, and what it means."""

    machine: Machine
    memory: ImageMemory
    safe_linking: bool
    segments: list[BuiltSegment]
    mmapped: list[BuiltChunk]
    mmapped_mappings: list[tuple[int, int]]
    lists: list[BuiltList] = field(default_factory=list)

    def all_chunks(self) -> list[BuiltChunk]:
        """Region chunks by address, then mmapped chunks by address."""
        chunks = [chunk for segment in sorted(self.segments, key=lambda s: s.start) for chunk in segment.chunks]
        return chunks + sorted(self.mmapped, key=lambda chunk: chunk.header_address)

    def segment_bytes(self, segment: BuiltSegment) -> bytes:
        return self.memory.read(segment.start, segment.end - segment.start)


class HeapBuilder:
    """Builds random heaps step by step.

    ``add_segment`` fills stretches with chunks, ``add_mmapped`` makes mappings, then ``link_arena`` puts the binned and
    fastbin chunks of some segments on the lists of one malloc_state, and ``link_thread_cache`` tcache chunks on those of
    one thread. ``heap`` is the truth so far.
    """

    def __init__(self, machine: Machine, rng: random.Random, *, safe_linking: bool = True) -> None:
        self.machine = machine
        self.rng = rng
        self.heap = BuiltHeap(machine, ImageMemory(), safe_linking, [], [], [])

    @property
    def memory(self) -> ImageMemory:
        return self.heap.memory

    def add_segment(
        self,
        block_address: int,
        block_bytes: int,
        *,
        skip: int = 0,
        ending: str = "top",
        non_main: bool = False,
        plan: Sequence[tuple[int, str]] | None = None,
        mix: Mix | None = None,
        top_bytes: int = 1024,
    ) -> BuiltSegment:
        """Adds a block of memory, and chunks from its first possible header behind ``skip`` bytes to its end."""
        if not self.memory.holds(block_address, block_bytes):
            self.memory.add(block_address, block_bytes)
        start = self.machine.first_header(block_address + skip)
        end = block_address + block_bytes
        if ending == "open":
            end -= (end - self.machine.phase) % self.machine.alignment
        reserved = top_bytes if ending == "top" else fence_bytes(self.machine, ending)
        if plan is None:
            plan = random_plan(self.rng, self.machine, end - start - reserved, mix or Mix())
            if ending != "top" and plan:
                # The last chunk grows up to the ending: in a retired heap it is what was left of top.
                was_top = ending in ("heap_fence", "main_fence") and self.rng.random() < 0.5
                before = plan[-2][1] if len(plan) > 1 else IN_USE
                plan[-1] = (plan[-1][0], UNSORTED_BIN if was_top and before not in BINNED else IN_USE)
        segment = lay_out_segment(
            self.memory, self.machine, start, plan, end=end, ending=ending, non_main=non_main, rng=self.rng
        )
        self.heap.segments.append(segment)
        return segment

    def add_mmapped(
        self, mapping_start: int, mapping_bytes: int, *, lead: int = 0, trailer: int = 0, huge: bool = False
    ) -> BuiltChunk:
        """Adds a mapping with one chunk. A ``lead`` beyond the plain one leaves memalign's first header behind."""
        self.memory.add(mapping_start, mapping_bytes)
        if lead > self.machine.phase:
            write_mmapped_chunk(self.memory, self.machine, mapping_start, mapping_bytes, trailer=trailer, huge=huge)
        chunk = write_mmapped_chunk(
            self.memory, self.machine, mapping_start, mapping_bytes, lead=lead, trailer=trailer, huge=huge
        )
        self.heap.mmapped.append(chunk)
        self.heap.mmapped_mappings.append((mapping_start, mapping_bytes))
        return chunk

    def link_arena(
        self,
        state_address: int,
        offsets: Mapping[str, int],
        segments: Iterable[BuiltSegment],
        values: Mapping[str, int] | None = None,
    ) -> list[BuiltList]:
        """Writes a malloc_state whose lists hold the binned and fastbin chunks of ``segments``, in random order.

        ``values`` fills its other fields; ``top`` comes from the segment that ends with top.
        """
        machine = self.machine
        segments = list(segments)
        bins: dict[int, list[BuiltChunk]] = {}
        fast: dict[int, list[BuiltChunk]] = {}
        for segment in segments:
            for chunk in segment.of_state(*BINNED):
                number = 1 if chunk.state == UNSORTED_BIN else machine.bin_number(chunk.chunk_bytes)
                if number > 1:
                    # A last chunk may have grown past its kind.
                    chunk.state = SMALL_BIN if chunk.chunk_bytes < machine.small_limit else LARGE_BIN
                bins.setdefault(number, []).append(chunk)
            for chunk in segment.of_state(FASTBIN):
                fast.setdefault(machine.fastbin_number(chunk.chunk_bytes), []).append(chunk)
        lists: list[BuiltList] = []
        for number, chunks in bins.items():
            self.rng.shuffle(chunks)
            if chunks[0].state == LARGE_BIN:
                chunks.sort(key=lambda chunk: -chunk.chunk_bytes)
            sentinel = bin_header(machine, state_address, offsets, number)
            lists.append(BuiltList(chunks[0].state, number, chunks[0].header_address, sentinel, chunks))
        heads: dict[int, int] = {}
        for number, chunks in fast.items():
            self.rng.shuffle(chunks)
            heads[number] = link_singly(
                self.memory, machine, chunks, to_payload=False, safe_linking=self.heap.safe_linking
            )
            lists.append(BuiltList(FASTBIN, number, heads[number], 0, chunks))
        tops = [segment.top_address for segment in segments if segment.top_address is not None]
        fields = {"top": tops[0] if tops else 0, **(values or {})}
        write_malloc_state(self.memory, machine, state_address, offsets, bins=bins, fastbins=heads, values=fields)
        self.heap.lists += lists
        return lists

    def link_thread_cache(self, chunks: Sequence[BuiltChunk], *, key: int | None = None) -> list[BuiltList]:
        """Puts chunks on the lists of one thread's tcache, by size, in random order. The struct is the caller's to write.

        Chunks of segments have to be of state TCACHE already; mmapped ones become it.
        """
        by_number: dict[int, list[BuiltChunk]] = {}
        for chunk in chunks:
            chunk.state = TCACHE
            by_number.setdefault(self.machine.tcache_number(chunk.chunk_bytes), []).append(chunk)
        lists = []
        for number, members in sorted(by_number.items()):
            self.rng.shuffle(members)
            head = link_singly(
                self.memory, self.machine, members, to_payload=True, safe_linking=self.heap.safe_linking, key=key
            )
            lists.append(BuiltList(TCACHE, number, head, 0, members))
        self.heap.lists += lists
        return lists
