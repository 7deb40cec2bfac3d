"""The frames of the crashed thread with their modules and functions, and whether one of them is malloc's.

Knows: where names of functions are: symbol tables of verified files and of dumped images. Does not know: how frames are found
(``corefile.unwinding``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from coreheap.corefile import Core, ElfFile, Module, Thread, elf
from coreheap.corefile.function_symbols import FunctionTable, row_bytes, tables_of
from coreheap.corefile.machines import MACHINES
from coreheap.corefile.stacks import Stacks
from coreheap.corefile.unwinding import HandledSignal, ModuleMap, Step, unwind
from coreheap.crash import Frame, FrameSource
from coreheap.errors import MemoryFault

IMAGE_LIMIT = 1 << 20
"""Bytes of the vDSO, and of a dynamic symbol table in memory, that are read."""

_ENTRY_NAMES = (
    "malloc free cfree calloc realloc reallocarray memalign aligned_alloc posix_memalign valloc pvalloc malloc_trim mallinfo"
    " mallinfo2 mallopt malloc_stats malloc_info malloc_usable_size free_sized free_aligned_sized"
)
MALLOC_ENTRIES = frozenset(_ENTRY_NAMES.split())
"""What programs call."""
_BETWEEN = (
    "malloc",
    "free",
    "calloc",
    "realloc",
    "memalign",
    "malloc_trim",
    "malloc_usable_size",
    "mallinfo",
    "malloc_info",
)
"""Exported functions of malloc.c: what lies between the first and the last of them is malloc.c's as well."""
_INTERNAL_NAMES = (
    "_int_malloc _int_free _int_free_chunk _int_free_merge_chunk _int_free_create_chunk _int_free_maybe_consolidate _int_realloc"
    " _int_memalign sysmalloc sysmalloc_mmap systrim mtrim heap_trim heap_shrink grow_heap new_heap unlink_chunk munmap_chunk"
    " mremap_chunk malloc_consolidate malloc_printerr tcache_thread_shutdown tcache_init tcache_double_free_verify tcache_get_n"
    " tcache_key_initialize ptmalloc_init arena_get2 arena_get_retry _int_new_arena get_free_list reused_arena musable"
    " int_mallinfo malloc_check free_check realloc_check memalign_check top_check mem2chunk_check tcache_malloc_init"
    " tcache_free_init alloc_new_heap free_perturb alloc_perturb do_check_malloc_state calloc2 malloc2 free2 aligned_alloc2"
    " __malloc_assert malloc_check_get_size tcache_calloc_init malloc_hugepage_config"
)
_INTERNALS = frozenset(_INTERNAL_NAMES.split())


def is_malloc_function(name: str) -> bool:
    """Whether a function of this name is malloc's own, by its exported or internal name (``malloc.part.0`` as well)."""
    plain = name.partition(".")[0]
    bare = plain.removeprefix("__libc_").removeprefix("__").removeprefix("__debug_")
    return plain in _INTERNALS or plain in MALLOC_ENTRIES or (plain.startswith("__") and bare in MALLOC_ENTRIES)


class FunctionNames:
    """Names of functions by address; tables are read with the first question about a module."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._mask = (1 << 8 * core.word_bytes) - 1
        self._tables: dict[int, list[FunctionTable]] = {}
        self._asked_file: dict[int, bool] = {}

    def has_table(self, module: Module) -> bool:
        """Whether any function of a module is known."""
        return bool(self._tables_of(module))

    def at(self, module: Module, address: int) -> tuple[str, int] | None:
        """The function that holds an address, and where it begins in the process; None between functions."""
        bias = module.load_bias
        if bias is None:
            return None
        value = address - bias & self._mask
        for table in self._tables_of(module):
            found = table.at(value)
            if found is not None:
                return found[0], found[1] + bias & self._mask
        if self._has_packed_symbols(module):
            held = module.symbol_containing(address)
            return None if held is None else (held[0].name.partition("@")[0], address - held[1])
        return None

    def _tables_of(self, module: Module) -> list[FunctionTable]:
        if module.start not in self._tables:
            found = [table for file in (module.debug_file, module.elf_file) if file for table in tables_of(file.data)]
            self._tables[module.start] = found or self._tables_in_memory(module)
        return self._tables[module.start]

    def _has_packed_symbols(self, module: Module) -> bool:
        """Whether the module's file has MiniDebugInfo, as Fedora's: unpacked only for what no other table names."""
        if module.start not in self._asked_file:
            self._asked_file[module.start] = module.elf_file is not None and _has_section(
                module.elf_file, b".gnu_debugdata"
            )
        return self._asked_file[module.start]

    def _tables_in_memory(self, module: Module) -> list[FunctionTable]:
        """Tables of an image that is in the core as a whole, as the vDSO always is, else its dynamic symbol table."""
        memory = self._core.memory
        size = module.end - module.start
        if not module.mapped_files and size <= IMAGE_LIMIT and memory.is_saved(module.start, module.end):
            return tables_of(memory.view(module.start, module.end))
        symbols, strings = (self._dynamic_address(module, tag) for tag in (elf.DT_SYMTAB, elf.DT_STRTAB))
        string_bytes = min(module.dynamic.get(elf.DT_STRSZ, 0), IMAGE_LIMIT)
        # No tag tells the number of symbols; linkers put the names right behind them.
        if symbols is None or strings is None or not 0 < strings - symbols <= IMAGE_LIMIT:
            return []
        word = self._core.word_bytes
        count = (strings - symbols) // row_bytes(word)
        try:
            rows = np.frombuffer(memory.read(symbols, count * row_bytes(word)), np.uint8)
            names = np.frombuffer(memory.read(strings, string_bytes), np.uint8)
        except MemoryFault:
            return []
        table = FunctionTable(rows, names, word)
        return [table] if len(table) else []

    def _dynamic_address(self, module: Module, tag: int) -> int | None:
        value = module.dynamic.get(tag)
        if value is None or module.load_bias is None:
            return None
        # ld.so relocates the dynamic section in place, that of the vDSO stays as in its file.
        return value if module.start <= value < module.end else value + module.load_bias & self._mask


@dataclass(frozen=True, slots=True)
class Backtrace:
    """The frames of a thread, the innermost first, and why they end.

    ``handled``: the signals that interrupted frames, by the frame's number. ``stack_pointers`` and ``registers``, by name and as
    far as they are known: each frame's.
    """

    frames: tuple[Frame, ...]
    stack_pointers: tuple[int, ...]
    registers: tuple[Mapping[str, int], ...]
    end: str
    handled: Mapping[int, HandledSignal]


def backtrace(core: Core, thread: Thread, stacks: Stacks, names: FunctionNames) -> Backtrace:
    """The frames of a thread."""
    stack = stacks.by_thread.get(thread.index)
    is_on_it = stack is not None and stack.start <= thread.stack_pointer < stack.end
    steps, end = unwind(core, thread, stack.end if stack is not None and is_on_it else None)
    modules = ModuleMap(core)
    frames = tuple(_frame(number, step, modules, names) for number, step in enumerate(steps))
    handled = {number: step.interrupted_by for number, step in enumerate(steps) if step.interrupted_by is not None}
    names_of = {number: name for name, number in MACHINES[core.machine].numbers.items()}
    registers = tuple({names_of[number]: value for number, value in step.registers.items()} for step in steps)
    return Backtrace(frames, tuple(step.stack_pointer for step in steps), registers, end, handled)


def _frame(number: int, step: Step, modules: ModuleMap, names: FunctionNames) -> Frame:
    module = modules.at(step.code_address)
    found = names.at(module, step.code_address) if module is not None else None
    return Frame(
        number=number,
        program_counter=step.program_counter,
        module=(module.name or "the program") if module is not None else None,
        module_offset=step.program_counter - module.start if module is not None else None,
        symbol=found[0] if found is not None else None,
        symbol_offset=step.program_counter - found[1] if found is not None else None,
        source=step.source,
        is_certain=step.is_certain,
        is_interrupted=number > 0 and step.is_exact,
    )


def frames_of_malloc(core: Core, trace: Backtrace, *, is_refusal: bool) -> range:
    """The numbers of the first run of frames that are malloc's own, by name or by their place between malloc's functions; the last
    one is what the program called. Empty where none is known.

    ``is_refusal``: malloc called abort. Then what lies between abort and the first function that is named otherwise, or of another
    module, is malloc's: free jumps to functions without a name.
    """
    modules = ModuleMap(core)
    ranges: dict[int, tuple[int, int] | None] = {}
    first = last = None
    of_abort: Module | None = None
    for frame in trace.frames:
        module = modules.at(frame.program_counter - 1)
        if frame.source is FrameSource.STACK_SCAN or module is None:
            break
        if module.start not in ranges:
            ranges[module.start] = _range_of_malloc(module)
        between = ranges[module.start]
        is_own = between is not None and between[0] <= frame.program_counter - 1 < between[1]
        is_own |= is_refusal and module is of_abort
        if is_own if frame.symbol is None else is_malloc_function(frame.symbol):
            first, last = frame.number if first is None else first, frame.number
        elif last is not None:
            break
        if frame.symbol == "abort":
            of_abort = module
    return range(0) if first is None or last is None else range(first, last + 1)


def is_inside_malloc(core: Core, trace: Backtrace, names: FunctionNames) -> bool | None:
    """Whether a frame is in one of malloc's functions; None where that is not known.

    Words on the stack that only look like return addresses do not count.
    """
    modules = ModuleMap(core)
    ranges: dict[int, tuple[int, int] | None] = {}
    is_known = trace.end == "complete"
    for frame in trace.frames:
        if frame.source is FrameSource.STACK_SCAN:
            return None
        module = modules.at(frame.program_counter - 1)
        if module is None:
            is_known = False
            continue
        if module.start not in ranges:
            ranges[module.start] = _range_of_malloc(module)
        if frame.symbol is not None and is_malloc_function(frame.symbol):
            return True
        between = ranges[module.start]
        if between is not None and frame.symbol is None and between[0] <= frame.program_counter - 1 < between[1]:
            return True
        is_known = is_known and frame.is_certain and (names.has_table(module) or not _may_be_libc(module))
    return False if is_known else None


def _range_of_malloc(module: Module) -> tuple[int, int] | None:
    """From the first to the last exported function of malloc.c in libc; None in other modules."""
    if not _may_be_libc(module):
        return None
    places = [place for place in map(module.symbol_address, _BETWEEN) if place is not None]
    return (min(places), max(places)) if len(places) > 2 else None


def _may_be_libc(module: Module) -> bool:
    """By its name: a libc, or a program that may have one inside (whose frames are then named by its own symbols)."""
    return module.name.startswith(("libc.so", "libc-2", "libc_malloc_debug")) or module.soname.startswith("libc.so")


def _has_section(file: ElfFile, name: bytes) -> bool:
    header = elf.header_of(file.data[:64].tobytes())
    return header is not None and bool(elf.section_named(file.data, header, name, 1))
