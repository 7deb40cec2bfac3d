"""Builds whole cores of processes with a glibc heap of a chosen release, and keeps what is true about them.

Layouts and constants come from the facts file (compiled from glibc's sources, checked against Debian's debug
information) and from ``heap_builder``; none from the product. What the facts do not say (TLS offsets, where the tcache
structure is made) is written down here from the fact sheet's sections 6.2 and 7.2.

    process = build_process(release("2.36"), THREADS)
    report = process.analyze(tmp_path)
    assert states_of(report.heap) == process.truth
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import coreheap
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.report import LedgerNode, Report
from tests import glibc_facts
from tests.core_builder import CoreBuilder, elf_image
from tests.heap_builder import (
    BINNED,
    FASTBIN,
    IN_USE,
    LARGE_BIN,
    MACHINES,
    PAGE,
    SMALL_BIN,
    TCACHE,
    TOP,
    UNSORTED_BIN,
    BuiltChunk,
    BuiltList,
    BuiltSegment,
    HeapBuilder,
    Machine,
    Mix,
    bin_header,
    random_plan,
    write_fields,
    write_heap_info,
    write_tcache,
)

NAME_OF_MACHINE = {"x86_64": "amd64", "i386": "i386", "aarch64": "arm64"}

OWN = "allocator_own"
STATE_NAMES = (IN_USE, TCACHE, FASTBIN, UNSORTED_BIN, SMALL_BIN, LARGE_BIN, OWN, TOP, "fencepost")


# What a release is like


@dataclass(frozen=True)
class Release:
    """One entry of the facts: a release (``2.27-branch``) for one machine of cores."""

    name: str
    machine_name: str
    entry: glibc_facts.Entry

    @property
    def minor(self) -> int:
        return int(self.name.removeprefix("2.").partition("-")[0])

    @property
    def constants(self) -> Mapping[str, Any]:
        return self.entry.constants

    @property
    def machine(self) -> Machine:
        constants = self.constants
        (found,) = [
            machine
            for machine in MACHINES
            if (machine.word_bytes, machine.alignment) == (constants["SIZE_SZ"], constants["MALLOC_ALIGNMENT"])
        ]
        return found

    @property
    def has_tcache(self) -> bool:
        return bool(self.constants["tcache"])

    @property
    def has_fastbins(self) -> bool:
        return bool(self.constants["NFASTBINS"])

    @property
    def keeps_key(self) -> str:
        """What cached blocks hold in their second word: nothing, ``struct`` or ``random``."""
        text = self.constants["tcache_key"] or ""
        return "struct" if text.startswith("pointer") else "random" if text else ""

    @property
    def counts_free_slots(self) -> bool:
        return (self.constants["tcache_count_direction"] or "").startswith("down")

    def tcache_number(self, chunk_bytes: int) -> int:
        """The tcache bin of a size; of the large ones (2.42+) by the rule that the facts give for the release."""
        small = self.machine.tcache_number(chunk_bytes)
        if small < 64:
            return small
        start, base = str(self.constants["tcache_large_index_base"]).split(" + bitlen(chunk_size) - ")
        return int(start) + chunk_bytes.bit_length() - int(base)

    @property
    def has_dummy_tcache(self) -> bool:
        """2.43+: the tcache pointer is never NULL, and the structure is made by the first free."""
        return self.minor >= 43

    @property
    def mmapped_trailer(self) -> int:
        return 2 * self.machine.word_bytes if self.constants["mmapped_chunk_layout"].startswith("new") else 0

    @property
    def tls_offsets(self) -> tuple[int, int]:
        """Offsets of tcache and thread_arena in libc's TLS block (Debian's builds; section 7.2)."""
        rows: tuple[tuple[int, int, int], ...]
        if self.machine_name == "aarch64":
            rows = ((43, 0x20, 0x50), (38, 0x50, 0x58), (32, 0x50, 0x48), (0, 0x40, 0x48))
        elif self.machine.word_bytes == 8:
            rows = ((43, 0x20, 0x50), (32, 0x48, 0x58), (0, 0x40, 0x50))
        else:
            rows = ((43, 0x10, 0x28), (32, 0x24, 0x2C), (0, 0x20, 0x28))
        return next((tcache, arena) for first, tcache, arena in rows if self.minor >= first)

    def offsets(self, structure: str) -> dict[str, int]:
        """Field offsets of malloc_state, malloc_par, heap_info or tcache_perthread_struct."""
        return self.entry.offsets(structure)

    def byte_count(self, structure: str) -> int:
        return int(self.entry.structs[structure]["size"])


@cache
def releases(machine_name: str) -> tuple[Release, ...]:
    """Every release and variant of one machine, oldest first; ``2.36-no-tunables`` and its like included."""
    entries = glibc_facts.entries()
    return tuple(
        Release(entry.release, machine_name, entry)
        for entry in entries
        if entry.machine == NAME_OF_MACHINE[machine_name]
    )


def release(name: str, machine_name: str = "x86_64") -> Release:
    """One release by name."""
    (found,) = [item for item in releases(machine_name) if item.name == name]
    return found


# What a process is like


@dataclass(frozen=True)
class Shape:
    """What to build. ``sub_heaps``: how many each non-main arena has; thread 1 uses the first arena and so on.

    ``idle_threads`` use the main arena and have no tcache. ``interruption``: what comes in the middle of the main arena,
    ``foreign_sbrk`` or ``mmap_fallback``. ``mmapped_leads``: for each mmapped chunk the bytes before its header, 0 for
    malloc's own. ``huge_page_bytes``: those that glibc.malloc.hugetlb names, which heaps are then made of (2.35+). No heap
    is built larger than LARGEST_BUILT, so of pages beyond it the heaps only have the alignment. ``filled_bytes`` of each
    stretch hold small chunks.
    """

    sub_heaps: tuple[int, ...] = ()
    idle_threads: int = 0
    mmapped_leads: tuple[int, ...] = (0,)
    interruption: str = ""
    arenas_without_thread: int = 0
    main_bytes: int = 0x6000
    sub_heap_bytes: int = 0x8000
    huge_page_bytes: int = 0
    filled_bytes: int = 1 << 40
    mix: Mix = field(default_factory=lambda: Mix(largest=3000, typical=200))


ALONE = Shape()
THREADS = Shape(sub_heaps=(3, 1), mmapped_leads=(0, 0x1000, 0))
IDLE = Shape(sub_heaps=(3, 1), idle_threads=1)


@dataclass(frozen=True)
class AddressMap:
    """Where the parts of a process go."""

    program: int
    brk: int
    newest_heap: int
    mappings: int
    stacks: int
    libc: int
    main_tls: int
    main_stack: int


ADDRESSES = {
    "x86_64": AddressMap(
        0x5555_5555_4000,
        0x5555_5557_9000,
        0x7FFF_F000_0000,
        0x7FFF_F500_0000,
        0x7FFF_F600_0000,
        0x7FFF_F7C0_0000,
        0x7FFF_F7F0_0000,
        0x7FFF_FFFD_E000,
    ),
    "i386": AddressMap(
        0x0804_8000,
        0x0805_A000,
        0xF5F0_0000,
        0xF600_0000,
        0xF700_0000,
        0xF7C0_0000,
        0xF7F0_0000,
        0xFFFD_D000,
    ),
    "aarch64": AddressMap(
        0xAAAA_AAAA_0000,
        0xAAAA_AAAC_0000,
        0xFFFF_8C00_0000,
        0xFFFF_9500_0000,
        0xFFFF_9600_0000,
        0xFFFF_97C0_0000,
        0xFFFF_97F0_0000,
        0xFFFF_FFFD_E000,
    ),
}
LIBC_TEXT_BYTES = 0x2000
LIBC_DATA_BYTES = 0x2000
LIBC_BSS_BYTES = 0x2000
TLS_BLOCK_BYTES = 0x80
STACK_BYTES = 0x4000
MAPPED_BYTES = 0x22000
LARGEST_BUILT = 2 << 20
TCACHE_KEY = {8: 0x5A3C_96E1_0F87_B42D, 4: 0x5A3C_96E1}


@dataclass
class BuiltArena:
    """One arena: where its malloc_state is, its chunk segments, its sub-heaps oldest first."""

    state_address: int
    segments: list[BuiltSegment]
    sub_heaps: list[int]
    system_mem: int
    threads: int = 0

    @property
    def top(self) -> int:
        return next(segment.top_address for segment in reversed(self.segments) if segment.top_address is not None)


@dataclass
class BuiltThread:
    """One thread; ``tcache`` is the payload address of its structure, 0 for none."""

    thread_pointer: int
    stack_pointer: int
    arena: int
    tcache: int
    mapping: tuple[int, int]


@dataclass
class BuiltProcess:
    """A process before it becomes a core: change ``memory``, leave parts out, then ``write`` or ``analyze``."""

    release: Release
    builder: HeapBuilder
    main_arena: int
    mp: int
    arenas: list[BuiltArena]
    threads: list[BuiltThread]
    caches: list[BuiltChunk]
    flags: dict[int, str]
    files: list[tuple[int, int, int, str]]
    unsaved: list[tuple[int, int, str]]
    program: int
    signal: int = 11
    tells_thread_pointers: bool = True

    @property
    def machine(self) -> Machine:
        return self.release.machine

    @property
    def truth(self) -> dict[str, set[int]]:
        """Payload addresses by state, of all chunks."""
        found: dict[str, set[int]] = {name: set() for name in STATE_NAMES}
        own = {chunk.header_address for chunk in self.caches}
        for chunk in self.builder.heap.all_chunks():
            state = OWN if chunk.header_address in own else chunk.state
            found[state].add(chunk.payload_address(self.machine))
        return found

    @property
    def tcache_key(self) -> int:
        """The random word that marks cached blocks (2.34+)."""
        return TCACHE_KEY[self.machine.word_bytes]

    @property
    def lists(self) -> list[BuiltList]:
        return self.builder.heap.lists

    def put(self, address: int, value: int, byte_count: int = 0) -> None:
        """Overwrite a word (or ``byte_count`` bytes)."""
        self.builder.memory.put(address, value, byte_count or self.machine.word_bytes)

    def get(self, address: int) -> int:
        return self.builder.memory.get(address, self.machine.word_bytes)

    def field(self, structure: str, address: int, name: str) -> int:
        """Address of a structure's field."""
        return address + self.release.offsets(structure)[name]

    def put_field(self, structure: str, address: int, name: str, value: int) -> None:
        write_fields(self.builder.memory, self.machine, address, self.release.offsets(structure), {name: value})

    def core(self, left_out: Collection[int] = ()) -> CoreBuilder:
        """The core; blocks that start at an address of ``left_out`` are there, but not saved."""
        core = CoreBuilder(8 * self.machine.word_bytes, self.release.machine_name)
        core.signal = self.signal
        core.auxv[9] = self.program + 0x900
        core.auxv[3] = self.program + (64 if self.machine.word_bytes == 8 else 52)
        for start, end, offset, path in self.files:
            core.add_file_mapping(start, end, offset, path)
        segments: list[tuple[int, bytes | None, int, str]] = [
            (address, None if address in left_out else bytes(block), len(block), self.flags.get(address, "rw-"))
            for address, block in self.builder.memory.runs()
        ]
        segments += [(start, None, end - start, flags) for start, end, flags in self.unsaved]
        for address, content, byte_count, flags in sorted(segments, key=lambda row: row[0]):
            core.add_segment(address, content, byte_count, flags)
        for number, thread in enumerate(self.threads):
            pointer = thread.thread_pointer if self.tells_thread_pointers else None
            core.add_thread(4242 + number, stack_pointer=thread.stack_pointer, thread_pointer=pointer)
        return core

    def write(self, folder: Path, left_out: Collection[int] = ()) -> Path:
        return self.core(left_out).write(folder / "core")

    def analyze(self, folder: Path, left_out: Collection[int] = ()) -> Report:
        """coreheap's report on the process."""
        with coreheap.open(self.write(folder, left_out)) as core:
            return coreheap.analyze(core)


# Building


def build_process(of: Release, shape: Shape = ALONE, seed: int = 1) -> BuiltProcess:
    """A process with a heap of the release; the same arguments give the same bytes."""
    return _Assembly(of, shape, random.Random(seed)).build()


class _Assembly:
    def __init__(self, of: Release, shape: Shape, rng: random.Random) -> None:
        self.release, self.shape, self.rng = of, shape, rng
        self.machine = of.machine
        self.places = ADDRESSES[of.machine_name]
        self.builder = HeapBuilder(self.machine, rng, safe_linking=bool(of.constants["safe_linking"]))
        self.memory = self.builder.memory
        self.flags: dict[int, str] = {}
        self.unsaved: list[tuple[int, int, str]] = []
        self.files: list[tuple[int, int, int, str]] = []
        self.caches: list[BuiltChunk] = []
        self.threads: list[BuiltThread] = []
        self.first_size = 0
        libc_data = self.places.libc + LIBC_TEXT_BYTES
        in_bss = of.constants["main_arena_section"] == ".bss"
        data = libc_data + (LIBC_DATA_BYTES if in_bss else 0)
        self.mp = data + 0x180
        self.main_arena = data + (0xAC0 if self.machine.word_bytes == 8 else 0x760)

    @property
    def heap_max(self) -> int:
        """What a sub-heap reserves, and is aligned to (fact sheet, section 3.2)."""
        if self.shape.huge_page_bytes and self.release.constants["heap_max_follows_hugetlb"]:
            return 4 * self.shape.huge_page_bytes
        return self.machine.sub_heap_reserve

    def build(self) -> BuiltProcess:
        self._program_and_libc()
        main = self._main()
        others = [self._arena(number) for number in range(len(self.shape.sub_heaps))]
        self._mmapped()
        self._threads([main, *others])
        for number in range(self.shape.arenas_without_thread):
            others[-1 - number].threads = 0
        self._write_arenas(main, others)
        self._write_parameters(main)
        return BuiltProcess(
            self.release,
            self.builder,
            self.main_arena,
            self.mp,
            [main, *others],
            self.threads,
            self.caches,
            self.flags,
            self.files,
            self.unsaved,
            self.places.program,
        )

    def _program_and_libc(self) -> None:
        for start, text_bytes, data_bytes, bss_bytes, path, tag in (
            (self.places.program, PAGE, PAGE, 0, "/opt/built/program", 0x21),
            (self.places.libc, LIBC_TEXT_BYTES, LIBC_DATA_BYTES, LIBC_BSS_BYTES, "/opt/built/lib/libc.so.6", 0x22),
        ):
            image = elf_image(
                elf_class=8 * self.machine.word_bytes,
                machine=self.release.machine_name,
                build_id=bytes([tag]) * 20,
                total_bytes=text_bytes + data_bytes,
                data_bytes=data_bytes,
                bss_bytes=bss_bytes,
            )
            self.memory.add(start, PAGE)[:] = image[:PAGE]
            self.flags[start] = "r-x"
            data = start + text_bytes
            if text_bytes > PAGE:
                self.unsaved.append((start + PAGE, data, "r-x"))
            self.memory.add(data, data_bytes)
            self.files.append((start, data, 0, path))
            self.files.append((data, data + data_bytes, text_bytes, path))
        self.memory.add(self.places.libc + LIBC_TEXT_BYTES + LIBC_DATA_BYTES, LIBC_BSS_BYTES)
        self.memory.add(self.places.main_stack, STACK_BYTES)

    def _plan(self, room: int, *, with_cache: bool, ends_at_top: bool) -> list[tuple[int, str]]:
        """Chunks for ``room`` bytes; with a tcache structure's chunk where the release puts it."""
        constants, machine = self.release.constants, self.machine
        weights = dict(self.shape.mix.weights)
        if not self.release.has_tcache:
            del weights[TCACHE]
        if not self.release.has_fastbins:
            del weights[FASTBIN]
        head: list[tuple[int, str]] = []
        if with_cache:
            size = constants[
                "tcache_struct_chunk_size_alt"
                if self.caches and self.release.minor == 43
                else "tcache_struct_chunk_size"
            ]
            if self.release.has_dummy_tcache:
                head += [(machine.chunk_bytes_for(40), IN_USE), (machine.chunk_bytes_for(300), SMALL_BIN)]
            head.append((size, IN_USE))
        room -= sum(size for size, _ in head)
        mix = Mix(weights, self.shape.mix.largest, self.shape.mix.typical)
        most = constants["tcache_default_max_chunk"] or 0
        body = [
            (size, IN_USE if state == TCACHE and size > most else state)
            for size, state in random_plan(self.rng, machine, room, mix)
        ]
        if head and body and body[0][1] in BINNED:
            body[0] = (body[0][0], IN_USE)
        if body and not ends_at_top:
            # The last chunk grows up to the fencepost: what was left of top, or a chunk in use.
            was_top = self.rng.random() < 0.5 and len(body) > 1 and body[-2][1] not in BINNED
            body[-1] = (body[-1][0], UNSORTED_BIN if was_top else IN_USE)
        return head + body

    def _segment(
        self,
        block: int,
        byte_count: int,
        *,
        skip: int = 0,
        ending: str = "top",
        non_main: bool = False,
        with_cache: bool = False,
    ) -> BuiltSegment:
        room = (
            min(byte_count, self.shape.filled_bytes)
            - skip
            - self.machine.alignment
            - (0x400 if ending == "top" else 0x40)
        )
        plan = self._plan(room, with_cache=with_cache, ends_at_top=ending == "top")
        segment = self.builder.add_segment(block, byte_count, skip=skip, ending=ending, non_main=non_main, plan=plan)
        if with_cache:
            size_of = 2 if self.release.has_dummy_tcache else 0
            self.caches.append(segment.chunks[size_of])
        return segment

    def _main(self) -> BuiltArena:
        start, size = self.places.brk, self.shape.main_bytes
        cached = self.release.has_tcache
        if self.shape.huge_page_bytes:
            # No brk then (fact sheet, section 3.6).
            start, size = self.places.mappings + 0x80_0000, min(self.shape.huge_page_bytes, LARGEST_BUILT)
        if not self.shape.interruption:
            segment = self._segment(start, size, with_cache=cached)
            return BuiltArena(self.main_arena, [segment], [], size)
        if self.shape.interruption == "foreign_sbrk":
            foreign = 0x2000
            self.memory.add(start, 2 * size + foreign)
            first = self._segment(start, size, ending="main_fence", with_cache=cached)
            self.memory.write(start + size, self.rng.randbytes(foreign))
            second = self._segment(start + size + foreign, size)
            return BuiltArena(self.main_arena, [first, second], [], 2 * size + foreign)
        first = self._segment(start, size, ending="main_fence", with_cache=cached)
        piece = self._segment(self.places.mappings + 0x80_0000, 0x10_0000)
        return BuiltArena(self.main_arena, [first, piece], [], size + 0x10_0000)

    def _arena(self, number: int) -> BuiltArena:
        """A non-main arena: its sub-heaps, all but the newest retired, and their headers."""
        reserve, machine, constants = self.heap_max, self.machine, self.release.constants
        page = min(self.shape.huge_page_bytes, LARGEST_BUILT) or PAGE
        count, size = self.shape.sub_heaps[number], max(page, self.shape.sub_heap_bytes)
        before = sum(self.shape.sub_heaps[:number])
        newest = self.places.newest_heap & ~(reserve - 1)
        if newest + reserve > self.places.mappings:
            newest -= reserve
        heaps = [newest - reserve * (before + age) for age in range(count)]
        state_address = heaps[0] + self.release.byte_count("heap_info")
        segments = []
        for age, heap in enumerate(heaps):
            is_newest = age == count - 1
            # The newest heap was shrunk once: more of it is accessible than the arena uses.
            accessible = size + (page * 2 if is_newest else 0)
            self.memory.add(heap, accessible)
            write_heap_info(
                self.memory,
                machine,
                heap,
                self.release.offsets("heap_info"),
                {
                    "ar_ptr": state_address,
                    "prev": heaps[age - 1] if age else 0,
                    "size": size,
                    "mprotect_size": accessible,
                    "pagesize": self.shape.huge_page_bytes or PAGE,
                },
            )
            self.unsaved.append((heap + accessible, heap + reserve, "---"))
            skip = constants["first_chunk_offset_in_arena_heap" if age == 0 else "first_chunk_offset_in_sub_heap"]
            ending = "top" if is_newest else ("heap_fence", "short_heap_fence")[age % 2]
            segment = self._segment(
                heap,
                size,
                skip=skip,
                ending=ending,
                non_main=True,
                with_cache=self.release.has_tcache and age == 0 and number < self._threads_with_arena,
            )
            assert segment.start == heap + skip
            segments.append(segment)
        return BuiltArena(state_address, segments, heaps, size * count)

    @property
    def _threads_with_arena(self) -> int:
        return len(self.shape.sub_heaps) - self.shape.arenas_without_thread

    def _mmapped(self) -> None:
        for number, lead in enumerate(self.shape.mmapped_leads):
            # memalign leaves the payload at a power of two in its page.
            bytes_before = lead - self.machine.header_bytes if lead else 0
            self.builder.add_mmapped(
                self.places.mappings + number * 2 * MAPPED_BYTES,
                MAPPED_BYTES,
                lead=bytes_before,
                trailer=self.release.mmapped_trailer,
            )

    def _threads(self, arenas: list[BuiltArena]) -> None:
        """Threads with their TLS, and the blocks that their tcaches hold."""
        by_thread = self._share_cached_blocks()
        with_arena = [arenas[0], *arenas[1 : 1 + self._threads_with_arena]]
        idle = [arenas[0]] * self.shape.idle_threads
        for number, arena in enumerate([*with_arena, *idle]):
            arena.threads += 1
            tcache = 0
            if self.release.has_tcache and number < len(self.caches):
                tcache = self.caches[number].payload_address(self.machine)
                self._write_tcache(tcache, by_thread[number])
            self._thread(number, arena.state_address, tcache)

    def _share_cached_blocks(self) -> list[list[BuiltChunk]]:
        """Deals the blocks in state TCACHE to the caches; what is too many for a list is in use after all."""
        dealt: list[list[BuiltChunk]] = [[] for _ in self.caches]
        held: dict[tuple[int, int], int] = {}
        for segment in self.builder.heap.segments:
            for chunk in segment.of_state(TCACHE):
                owner = self.rng.randrange(len(dealt))
                place = owner, self.machine.tcache_number(chunk.chunk_bytes)
                held[place] = held.get(place, 0) + 1
                if held[place] > self.release.constants["tcache_default_fill"]:
                    chunk.state = IN_USE
                else:
                    dealt[owner].append(chunk)
        return dealt

    def _write_tcache(self, address: int, blocks: list[BuiltChunk]) -> None:
        of, word = self.release, self.machine.word_bytes
        key = {"struct": address, "random": TCACHE_KEY[word], "": None}[of.keeps_key]
        fields = of.entry.structs["tcache_perthread_struct"]["fields"]
        name = "num_slots" if "num_slots" in fields else "counts"
        count_type, _, rest = fields[name]["type"].partition("[")
        bins, fill = int(rest.rstrip("]")), of.constants["tcache_default_fill"]
        self.memory.write(address, bytes(of.byte_count("tcache_perthread_struct")))
        counts = [0] * bins
        heads = {}
        for cached in self.builder.link_thread_cache(blocks, key=key):
            counts[cached.number] = len(cached.chunks)
            heads[cached.number] = cached.head
        if of.counts_free_slots:
            counts = [fill - count for count in counts]
        write_tcache(
            self.memory,
            self.machine,
            address,
            {"counts": fields[name]["offset"], "entries": fields["entries"]["offset"]},
            count_bytes=1 if count_type == "char" else 2,
            counts=counts,
            heads=heads,
        )

    def _thread(self, number: int, arena: int, tcache: int) -> None:
        word = self.machine.word_bytes
        above = self.release.machine_name == "aarch64"
        if number:
            mapping = self.places.stacks + number * 0x10_0000
            self.unsaved.append((mapping - PAGE, mapping, "---"))
            stack_pointer = mapping + STACK_BYTES - 0x1800
        else:
            mapping = self.places.main_tls
            stack_pointer = self.places.main_stack + 0x2800
        self.memory.add(mapping, STACK_BYTES)
        pointer = mapping + STACK_BYTES - (0x800 if above else 0x900)
        if not above:
            self.memory.put(pointer, pointer, word)
            self.memory.put(pointer + 2 * word, pointer, word)
        block = pointer + 0x10 if above else pointer - TLS_BLOCK_BYTES
        tcache_at, arena_at = self.release.tls_offsets
        dummy = self.places.libc + 0x1800 if self.release.has_dummy_tcache else 0
        if self.release.has_tcache:
            self.memory.put(block + tcache_at, tcache or dummy, word)
        self.memory.put(block + arena_at, arena, word)
        self.threads.append(BuiltThread(pointer, stack_pointer, arena, tcache, (mapping, mapping + STACK_BYTES)))

    def _write_arenas(self, main: BuiltArena, others: list[BuiltArena]) -> None:
        ring = [main, *reversed(others)]
        bit0 = self.release.constants["fastbin_flag_bit0_in_flags"]
        for position, arena in enumerate(ring):
            has_fast = any(segment.of_state(FASTBIN) for segment in arena.segments)
            flags = 1 if bit0 and not has_fast else 0
            if arena is not main or self.shape.interruption == "mmap_fallback" or self.shape.huge_page_bytes:
                flags |= 2
            self.builder.link_arena(
                arena.state_address,
                self.release.offsets("malloc_state"),
                arena.segments,
                {
                    "mutex": 0,
                    "flags": flags,
                    "have_fastchunks": int(has_fast),
                    "top": arena.top,
                    "next": ring[(position + 1) % len(ring)].state_address,
                    "next_free": 0,
                    "attached_threads": arena.threads,
                    "system_mem": arena.system_mem,
                    "max_system_mem": arena.system_mem + PAGE,
                },
            )

    def _write_parameters(self, main: BuiltArena) -> None:
        mapped = self.builder.heap.mmapped_mappings
        total = sum(size for _, size in mapped)
        constants = self.release.constants
        default_most = 0x408 if self.machine.word_bytes == 8 else 0x3FC
        newer_most = 0x411 if self.machine.word_bytes == 8 else 0x401
        write_fields(
            self.memory,
            self.machine,
            self.mp,
            self.release.offsets("malloc_par"),
            {
                "trim_threshold": 0x20000,
                "top_pad": 0x20000,
                "mmap_threshold": 0x20000,
                "arena_test": 8 if self.machine.word_bytes == 8 else 2,
                "thp_mode": 3 if self.release.minor == 43 else 0,
                "n_mmaps": len(mapped),
                "n_mmaps_max": 0x10000,
                "max_n_mmaps": len(mapped),
                "pagesize": PAGE,
                "mmapped_mem": total,
                "max_mmapped_mem": total,
                "max_total_mem": 0,
                "hp_pagesize": self.shape.huge_page_bytes,
                "sbrk_base": main.segments[0].start & ~(PAGE - 1),
                "tcache_bins": 64,
                "tcache_small_bins": 64,
                "tcache_max_bytes": newer_most
                if self.release.minor >= 43 or self.release.name == "2.42-branch"
                else default_most,
                "tcache_count": constants["tcache_default_fill"] or 0,
            },
        )
        # pagesize is an unsigned int, unlike its neighbours (2.12-2.14).
        if "pagesize" in self.release.offsets("malloc_par"):
            self.memory.put(self.mp + self.release.offsets("malloc_par")["pagesize"], PAGE, 4)


# What coreheap said


def states_of(heap: HeapSnapshot | None) -> dict[str, set[int]]:
    """Payload addresses by state, in the shape of ``BuiltProcess.truth``."""
    assert heap is not None
    found: dict[str, set[int]] = {name: set() for name in STATE_NAMES}
    for batch in heap.chunks.batches():
        for state in np.unique(batch.state).tolist():
            addresses = batch.payload_address[batch.state == state].tolist()
            found.setdefault(ChunkState(state).label, set()).update(addresses)
    return found


def leaves_of(node: LedgerNode) -> Iterator[LedgerNode]:
    if not node.children:
        yield node
    for child in node.children:
        yield from leaves_of(child)


def mapped_bytes_of(core: coreheap.Core) -> int:
    """Bytes of the address space that the core knows of."""
    memory = core.memory
    return int((memory.region_end - memory.region_start).sum())


__all__ = [
    "ALONE",
    "IDLE",
    "OWN",
    "THREADS",
    "BuiltArena",
    "BuiltProcess",
    "BuiltThread",
    "Release",
    "Shape",
    "bin_header",
    "build_process",
    "leaves_of",
    "mapped_bytes_of",
    "release",
    "releases",
    "states_of",
]
