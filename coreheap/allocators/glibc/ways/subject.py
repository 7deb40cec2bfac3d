"""One module that may hold a malloc: what several ways need of it, each made once.

Knows: where an address of the module's file lies in the process, and how like an arena the memory there is. Does not
know: any way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from coreheap.allocators.glibc.records import ArenaState, Layout, read_arena
from coreheap.allocators.glibc.ways import code, tls
from coreheap.allocators.glibc.ways.found import ThreadBlock
from coreheap.corefile import AddressSpace, Core, Module
from coreheap.corefile.dumped_symbols import DumpedSymbols
from coreheap.corefile.elf import PF_W, PT_LOAD, ProgramHeaders
from coreheap.corefile.relocations import FileImage, MemoryImage, Relocations, relocations_of
from coreheap.errors import MemoryFault

ArenaScore = Callable[[AddressSpace, ArenaState, Layout], float]
"""Share of the invariants of one malloc_state that hold under a layout, between 0 and 1 (``identify.arena_score``)."""

ARENA_ACCEPTED = 0.9


class Subject:
    """One module of a core under the layouts in question, and what several ways need of it."""

    def __init__(self, core: Core, module: Module, layouts: Sequence[Layout], arena_score: ArenaScore) -> None:
        self.core = core
        self.module = module
        self.layouts = tuple(layouts)
        self._arena_score = arena_score
        self._scores: dict[int, float | None] = {}

    @cached_property
    def file_image(self) -> FileImage | None:
        """The module's file, whose build-id is the core's."""
        file = self.module.elf_file
        return None if file is None else FileImage(file)

    @cached_property
    def dumped_image(self) -> MemoryImage | None:
        """The module as the core's own memory has it; None where its place is unknown."""
        return None if self.module.load_bias is None else MemoryImage(self.core.memory, self.module)

    @cached_property
    def relocations(self) -> Relocations | None:
        """From the file; None without one, or where it has none."""
        return None if self.file_image is None else relocations_of(self.file_image, self.core.machine)

    @cached_property
    def dumped_relocations(self) -> Relocations | None:
        """From the core's own memory; None where the tables were not dumped."""
        return None if self.dumped_image is None else relocations_of(self.dumped_image, self.core.machine)

    @property
    def any_relocations(self) -> Relocations | None:
        return self.relocations or self.dumped_relocations

    @cached_property
    def slots(self) -> tuple[tuple[int, int, int | None], ...]:
        """As ``tls.slots_of``."""
        relocations = self.any_relocations
        return () if relocations is None else tuple(tls.slots_of(self.core, self.module, relocations))

    @cached_property
    def thread_blocks(self) -> tuple[ThreadBlock, ...]:
        """As ``tls.blocks_of``."""
        return tls.blocks_of(self.core, self.module, self.segments, self.slots)

    @property
    def thread_block(self) -> int | None:
        """The start of the module's TLS block, relative to the thread pointer."""
        return self.thread_blocks[0].start if self.thread_blocks else None

    @cached_property
    def references(self) -> code.References:
        """What the code of malloc's exported functions names: in the file, else in the core, where text and symbol table
        were dumped. Empty without both."""
        if self.file_image is not None:
            return code.references_of_functions(self.file_image, self.module.symbol, self.core.machine)
        if self.dumped_image is None:
            return {}
        find = DumpedSymbols(self.dumped_image).find
        return code.references_of_functions(self.dumped_image, find, self.core.machine)

    @property
    def code_source(self) -> str:
        """Where ``references`` were read, for evidence."""
        return f"machine code of {self.file_name}" + ("" if self.file_image is not None else " in the core")

    @property
    def name(self) -> str:
        return self.module.name or "the program"

    @property
    def file_name(self) -> str:
        """As ``name``, of the file: it says so where the file was fetched."""
        return self.module.file_title

    def in_process(self, address: int) -> int | None:
        """Where an address of the file lies in the process."""
        if self.module.load_bias is None:
            return None
        return self.module.load_bias + address & (1 << 8 * self.core.word_bytes) - 1

    def is_writable(self, address: int) -> bool:
        """Whether the module's writable segments hold an address (before relocation)."""
        segments = self.segments
        if segments is None:
            return False
        return any(
            0 <= address - int(segments.address[row]) < int(segments.memory_bytes[row])
            for row in segments.rows_of_kind(PT_LOAD).tolist()
            if int(segments.flags[row]) & PF_W
        )

    @property
    def segments(self) -> ProgramHeaders | None:
        """The module's program headers, from its file or from the core; None where neither has them."""
        file = self.module.elf_file
        return self.module.program_headers if file is None else file.segments

    def arena_score(self, address: int) -> float | None:
        """The best score of a malloc_state at an address of the process; None where it was not saved."""
        if address not in self._scores:
            scores = [self.arena_score_under(address, layout) for layout in self.arena_layouts]
            self._scores[address] = max((score for score in scores if score is not None), default=None)
        return self._scores[address]

    def arena_score_under(self, address: int, layout: Layout) -> float | None:
        """As ``arena_score``, under one layout."""
        try:
            return self._arena_score(self.core.memory, read_arena(self.core.memory, address, layout), layout)
        except MemoryFault:
            return None

    @cached_property
    def arena_layouts(self) -> tuple[Layout, ...]:
        """One layout of each kind of malloc_state."""
        kinds = {
            (layout.generation.malloc_state, layout.generation.flags_hold_fastchunks, layout.word_class.name): layout
            for layout in self.layouts
        }
        return tuple(kinds.values())

    def thread_offset(self, offset: int) -> int | None:
        """An offset of the module's TLS block relative to the thread pointer; None where the block's place is unknown."""
        start = self.thread_block
        return None if start is None or not 0 <= offset < tls.STATIC_TLS_REACH else start + offset
