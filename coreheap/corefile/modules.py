"""The ELF objects that were mapped, and the local files that prove to be theirs.

Knows: NT_FILE, the link map, ELF headers in memory, and how a file on this machine is verified by
build-id before a byte of it is believed. Does not know: what the modules do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from coreheap.corefile import elf
from coreheap.corefile.elf import ElfHeader, ProgramHeaders
from coreheap.corefile.link_map import LinkedObject, find_r_debug, linked_objects
from coreheap.corefile.local_files import FileFinder, FoundFile
from coreheap.corefile.mapped_files import MappedFile
from coreheap.corefile.memory import AddressSpace, FileBytes
from coreheap.corefile.notes import records_at, text_of
from coreheap.corefile.process import AT_ENTRY, AT_EXECFN, AT_PHDR, AT_SYSINFO_EHDR
from coreheap.corefile.regions import Backing
from coreheap.corefile.symbols import STT_TLS, ElfFile, Symbol
from coreheap.errors import MemoryFault
from coreheap.evidence import Gap
from coreheap.quantities import AddressRange

MODULE_LIMIT: Final = 20_000
PROGRAM_HEADER_LIMIT: Final = 512
DYNAMIC_LIMIT: Final = 1 << 16
NOTE_LIMIT: Final = 1 << 14
_DT_TEXTREL, _DT_FLAGS, _DF_TEXTREL = 22, 30, 4
_ADDRESS_MASK: Final = (1 << 64) - 1


@dataclass(slots=True, eq=False)
class Module:
    """One ELF object in the process; ``path`` and ``soname`` are its own text, not escaped."""

    path: str
    start: int
    end: int
    load_bias: int | None
    """What is added to an address in the ELF file; None when its headers are not in the core."""
    build_id: bytes | None
    """The build-id in memory; None when it is not in the core."""
    soname: str
    mapped_files: tuple[MappedFile, ...]
    """Its rows of NT_FILE; empty for the vDSO and where the core has no NT_FILE."""
    program_headers: ProgramHeaders | None
    dynamic: Mapping[int, int]
    """tag -> value of the dynamic section as the dynamic linker left it; empty when not saved."""
    is_executable: bool = False
    """Whether this is the program itself, not a library."""
    file_status: str = "no_file"
    """matched, no_file, build_id_differs, or not_verifiable: no build-id to compare with."""
    elf_file: ElfFile | None = None
    debug_file: ElfFile | None = None
    raw_path: bytes = field(default=b"", repr=False)

    @property
    def file(self) -> Path | None:
        """The local file that has the same build-id; None when there is none."""
        return None if self.elf_file is None else self.elf_file.path

    @property
    def name(self) -> str:
        """The last part of the path, else the soname."""
        return self.path.rpartition("/")[2] or self.soname

    @property
    def file_title(self) -> str:
        """What reports call its file: the module's name, and where the file came from if it was fetched."""
        name = self.name or "the program"
        return f"{name} from {self.elf_file.origin}" if self.elf_file is not None and self.elf_file.origin else name

    @property
    def debug_file_title(self) -> str:
        """What reports call its debug file; "" without one."""
        file = self.debug_file
        if file is None:
            return ""
        return f"debug file from {file.origin}" if file.origin else f"debug file {file.path.name}"

    @property
    def mapped_ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of what is mapped from its file, else all of it; never its .bss."""
        if not self.mapped_files:
            return ((self.start, self.end),)
        return tuple((mapped.start, mapped.end) for mapped in self.mapped_files)

    def symbol(self, name: str) -> Symbol | None:
        """A symbol of the verified file or of its debug file."""
        for source in (self.elf_file, self.debug_file):
            symbol = source.find_symbol(name) if source is not None else None
            if symbol is not None:
                return symbol
        return None

    def symbol_address(self, name: str) -> int | None:
        """Where a function or object is in the process; None if unknown or thread-local."""
        symbol = self.symbol(name)
        if symbol is None or self.load_bias is None or symbol.kind == STT_TLS:
            return None
        return self.load_bias + symbol.value & _ADDRESS_MASK

    def symbol_containing(self, address: int) -> tuple[Symbol, int] | None:
        """The function or object that holds an address, and the distance from its start."""
        if self.load_bias is None:
            return None
        value = address - self.load_bias & _ADDRESS_MASK
        for source in (self.debug_file, self.elf_file):
            symbol = source.symbol_containing(value) if source is not None else None
            if symbol is not None:
                return symbol, value - symbol.value
        return None


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What the ELF header of a module in memory tells."""

    header: ElfHeader
    segments: ProgramHeaders
    load_bias: int
    end: int


def find_modules(
    memory: AddressSpace, auxv: Mapping[int, int], finder: FileFinder, gaps: list[Gap]
) -> tuple[Module, ...]:
    """All modules in the order of their addresses, each with the local file that is proven to be
    its own.

    From NT_FILE; without it from ELF headers at the starts of saved regions, named by the link map.
    """
    if len(memory.mapped_files):
        modules = list(_modules_of_mapped_files(memory))
    else:
        modules = list(_modules_of_headers(memory, auxv))
    vdso = auxv.get(AT_SYSINFO_EHDR)
    if vdso and not any(module.start == vdso for module in modules):
        loaded = _loaded_at(memory, vdso)
        if loaded is not None:
            modules.append(_module(memory, b"[vdso]", vdso, loaded.end, loaded, ()))
    modules.sort(key=lambda module: module.start)
    if len(modules) > MODULE_LIMIT:
        gaps.append(Gap("modules_too_many", f"only the first {MODULE_LIMIT} modules are looked at"))
        modules = modules[:MODULE_LIMIT]
    main = _main_module(modules, auxv)
    if main is not None:
        main.is_executable = True
    for module in modules:
        if module.raw_path.startswith(b"["):
            continue
        found = finder.find(module.raw_path, module.build_id, is_executable=module is main)
        module.file_status, module.elf_file = found.status, found.file
        _note_refused(module, found, "mismatched_module", gaps)
        if module.build_id is not None:
            separate = finder.find_debug_file(module.raw_path, module.build_id, found.file)
            module.debug_file = separate.file or found.debug_file
            _note_refused(module, separate, "mismatched_debug_file", gaps)
        if found.file is not None and module.dynamic and not module.soname:
            module.soname = found.file.soname
    unverifiable = sum(module.file_status == "not_verifiable" for module in modules)
    if unverifiable:
        gaps.append(
            Gap(
                "modules_not_verifiable",
                f"the build-ids of {unverifiable} modules are not in the core (coredump_filter bit 4; qemu-user saves "
                "none); local files are not used for them, not even one given by --exe",
            )
        )
    return tuple(modules)


def _note_refused(module: Module, found: FoundFile, cause: str, gaps: list[Gap]) -> None:
    if found.refused is None or module.build_id is None:
        return
    gaps.append(
        Gap(
            cause,
            f"{found.refused.path} has build-id {found.refused.build_id.hex()}, "
            f"{module.name or 'the module'} in the core {module.build_id.hex()}: another build, not used",
            AddressRange(module.start, module.end),
        )
    )


def fetch_symbols(module: Module, finder: FileFinder, gaps: list[Gap]) -> bool:
    """Ask debuginfod servers, where the user allowed them, for a module's debug file, and for its own file where none
    is here. Whether its own file came.

    What they do not give is a gap with the server's name.
    """
    if not finder.may_fetch:
        return False
    name, came = module.name or "the program", False
    problems: list[tuple[str, str]] = []
    if module.build_id is None:
        problems = [
            ("debuginfod_not_asked", f"the build-id of {name} is not in the core; no server can be asked for it")
        ]
    else:
        if module.debug_file is None:
            fetched = finder.fetch(module.build_id, "debuginfo")
            module.debug_file = fetched.file
            if fetched.file is None:
                problems.append(
                    ("debuginfod_failed", f"no debug file of {name}: {fetched.problem}; --debug-dir names local ones")
                )
        if module.elf_file is None:
            fetched = finder.fetch(module.build_id, "executable")
            if fetched.file is None:
                problems.append(
                    ("debuginfod_failed", f"no file of {name}: {fetched.problem}; --sysroot names local ones")
                )
            else:
                module.elf_file, module.file_status, came = fetched.file, "matched", True
    for cause, consequence in problems:
        gap = Gap(cause, consequence, AddressRange(module.start, module.end))
        if gap not in gaps:
            gaps.append(gap)
    return came


def file_bytes_of(modules: Iterable[Module]) -> list[FileBytes]:
    """The bytes of verified files that memory must have held.

    Only what no relocation and no program could write: ranges of segments without PF_W (RELRO lies
    in a writable one), of files without text relocations.
    """
    parts: list[FileBytes] = []
    for module in modules:
        file = module.elf_file
        if file is None or _has_text_relocations(module.dynamic):
            continue
        segments = file.segments
        for row in segments.rows_of_kind(elf.PT_LOAD)[:PROGRAM_HEADER_LIMIT].tolist():
            if int(segments.flags[row]) & elf.PF_W:
                continue
            low = int(segments.file_offset[row]) & ~0xFFF
            high = int(segments.file_offset[row]) + int(segments.file_bytes[row]) + 0xFFF & ~0xFFF
            high = min(high, len(file.data))
            for mapped in module.mapped_files:
                first = max(low, mapped.file_offset)
                end = min(high, mapped.file_offset + mapped.end - mapped.start)
                if first < end:
                    start = mapped.start + first - mapped.file_offset
                    parts.append(FileBytes(start, start + end - first, file.data[first:end]))
    return parts


def _modules_of_mapped_files(memory: AddressSpace) -> Iterable[Module]:
    files = memory.mapped_files
    order = np.argsort(files.start, kind="stable").tolist()
    group: list[int] = []
    group_end = 0
    loaded: _Loaded | None = None

    def finish() -> Iterable[Module]:
        if not group:
            return
        raw_path = files.raw_paths[group[0]]
        if loaded is None and not _may_be_module(memory, group, raw_path):
            return
        rows = tuple(files[row] for row in group)
        end = max(max(row.end for row in rows), loaded.end if loaded else 0)
        yield _module(memory, raw_path, rows[0].start, end, loaded, rows)

    for row in order:
        start, offset = int(files.start[row]), int(files.file_offset[row])
        same = bool(group) and files.raw_paths[row] == files.raw_paths[group[0]]
        if same and (start < group_end or (loaded is None and offset != 0)):
            group.append(row)
            continue
        yield from finish()
        group = [row]
        loaded = _loaded_at(memory, start) if offset == 0 else None
        group_end = loaded.end if loaded else int(files.end[row])
    yield from finish()


def _may_be_module(memory: AddressSpace, rows: Sequence[int], raw_path: bytes) -> bool:
    """Whether a mapped file whose header is not saved is likely an ELF object."""
    files = memory.mapped_files
    for row in rows:
        start = int(files.start[row])
        if files.file_offset[row] == 0 and memory.is_saved(start, start + 4):
            return False
        index = memory.region_index(start)
        if index is not None and int(memory.region_flags[index]) & elf.PF_X:
            return True
    return raw_path.endswith(b".so") or b".so." in raw_path


def _modules_of_headers(memory: AddressSpace, auxv: Mapping[int, int]) -> Iterable[Module]:
    saved = np.flatnonzero(
        (memory.region_backing == Backing.SAVED) & (memory.region_end - memory.region_start >= np.uint64(64))
    )
    starts = memory.region_start[saved]
    run = np.searchsorted(memory.run_start, starts, side="right") - 1
    offsets = (starts - memory.run_start[run] + memory.run_file_offset[run]).astype(np.intp)
    magic = records_at(memory.file, offsets, np.dtype([("magic", "<u4")]))["magic"]
    found: list[tuple[int, _Loaded]] = []
    for start in starts[magic == int.from_bytes(elf.ELF_MAGIC, "little")][:MODULE_LIMIT].tolist():
        loaded = _loaded_at(memory, start)
        # The same file's header may show again in its data segment: those addresses are taken
        # already.
        if loaded is not None and not (found and start < found[-1][1].end):
            found.append((start, loaded))
    modules = [_module(memory, b"", start, loaded.end, loaded, ()) for start, loaded in found]
    main = _main_module(modules, auxv)
    r_debug = main.dynamic.get(elf.DT_DEBUG, 0) if main is not None else 0
    linked = list(linked_objects(memory, r_debug or find_r_debug(memory, auxv)))
    paths = {entry.load_bias: entry.raw_path for entry in linked}
    program_path = _text_or_empty(memory, auxv.get(AT_EXECFN, 0))
    if main is not None or linked:
        bias = linked[0].load_bias if main is None else main.load_bias or 0
        paths[bias] = paths.get(bias) or program_path
    for module in modules:
        module.raw_path = paths.pop(module.load_bias or 0, b"")
        module.path = text_of(module.raw_path)
    for entry in linked:
        if entry.load_bias in paths:
            modules.extend(_module_of_link_map(memory, entry, paths.pop(entry.load_bias)))
    if main is None and not linked and AT_PHDR in auxv:
        modules.extend(_module_around(memory, auxv[AT_PHDR], program_path))
    return modules


def _module_around(memory: AddressSpace, address: int, raw_path: bytes) -> Iterable[Module]:
    """A module of which only an address is known: the readable region there."""
    index = memory.region_index(address)
    if index is not None and int(memory.region_flags[index]) & (elf.PF_R | elf.PF_X):
        region = memory.region(index)
        yield _module(memory, raw_path, region.start, region.end, None, ())


def _module_of_link_map(memory: AddressSpace, entry: LinkedObject, raw_path: bytes) -> Iterable[Module]:
    """A module whose header was not saved: what the dynamic linker kept of it."""
    for module in _module_around(memory, entry.load_bias or entry.dynamic_address, raw_path):
        if entry.mapped is not None:
            module.start, module.end = entry.mapped[0], entry.mapped[1] + -entry.mapped[1] % memory.page_bytes
        module.load_bias, module.dynamic = entry.load_bias, entry.dynamic(memory)
        yield module


def _text_or_empty(memory: AddressSpace, address: int) -> bytes:
    try:
        return memory.read_text(address) if address else b""
    except MemoryFault:
        return b""


def _loaded_at(memory: AddressSpace, start: int) -> _Loaded | None:
    """The module whose ELF header is saved at ``start``; None when there is none."""
    try:
        head = memory.view(start, start + (64 if memory.word_bytes == 8 else 52)).tobytes()
        header = elf.header_of(head)
        if header is None or header.bits != memory.word_bytes * 8 or header.kind not in (elf.ET_EXEC, elf.ET_DYN):
            return None
        count = min(header.program_header_count, PROGRAM_HEADER_LIMIT)
        size = header.program_header_offset + count * header.program_header_bytes
        if size > 1 << 20:
            return None
        segments = elf.program_headers_of(memory.view(start, start + size), header, count)
    except MemoryFault:
        return None
    loads = segments.rows_of_kind(elf.PT_LOAD)
    if len(loads) == 0:
        return None
    first = int(loads[0])
    bias = start - (int(segments.address[first]) - int(segments.file_offset[first])) & _ADDRESS_MASK
    ends = [int(segments.address[row]) + int(segments.memory_bytes[row]) for row in loads.tolist()]
    end = bias + max(ends) & _ADDRESS_MASK
    page = memory.page_bytes
    # A hostile header may end the module with the address space, whose end is no address.
    end = min(end + page - 1 & ~(page - 1), _ADDRESS_MASK & ~(page - 1))
    if memory.word_bytes == 4:
        bias &= 0xFFFFFFFF
        end = min(end, 1 << 32)
    return _Loaded(header, segments, bias, end) if end > start else None


def _module(
    memory: AddressSpace,
    raw_path: bytes,
    start: int,
    end: int,
    loaded: _Loaded | None,
    mapped_files: tuple[MappedFile, ...],
) -> Module:
    build_id: bytes | None = None
    dynamic: dict[int, int] = {}
    if loaded is not None:
        build_id = _build_id_in_memory(memory, loaded)
        dynamic = _dynamic_in_memory(memory, loaded)
    module = Module(
        path=text_of(raw_path),
        raw_path=raw_path,
        start=start,
        end=end,
        load_bias=loaded.load_bias if loaded else None,
        build_id=build_id,
        soname="",
        mapped_files=mapped_files,
        program_headers=loaded.segments if loaded else None,
        dynamic=dynamic,
    )
    if loaded is not None and elf.DT_SONAME in dynamic and elf.DT_STRTAB in dynamic:
        strings = dynamic[elf.DT_STRTAB]
        # glibc relocates DT_STRTAB in place, the vDSO's stays as in its file.
        if not start <= strings < end:
            strings += loaded.load_bias
        address = strings + dynamic[elf.DT_SONAME]
        if start <= address < end and memory.is_saved(address, address + 1):
            module.soname = text_of(_text_or_empty(memory, address))
    return module


def _rows_in_memory(loaded: _Loaded, kind: int, limit: int, word_bytes: int) -> Iterable[tuple[int, int, int]]:
    """(address, bytes, alignment) of the segments of a kind, where they lie in the process."""
    mask = _ADDRESS_MASK if word_bytes == 8 else 0xFFFFFFFF
    segments = loaded.segments
    for row in segments.rows_of_kind(kind).tolist():
        address = loaded.load_bias + int(segments.address[row]) & mask
        yield address, min(int(segments.memory_bytes[row]), limit), int(segments.alignment[row])


def _build_id_in_memory(memory: AddressSpace, loaded: _Loaded) -> bytes | None:
    for address, byte_count, alignment in _rows_in_memory(loaded, elf.PT_NOTE, NOTE_LIMIT, memory.word_bytes):
        if memory.is_saved(address, address + byte_count):
            notes = memory.view(address, address + byte_count).tobytes()
            found = elf.build_id_of_notes(notes, alignment)
            if found:
                return found
    return None


def _dynamic_in_memory(memory: AddressSpace, loaded: _Loaded) -> dict[int, int]:
    for address, byte_count, _ in _rows_in_memory(loaded, elf.PT_DYNAMIC, DYNAMIC_LIMIT, memory.word_bytes):
        if memory.is_saved(address, address + byte_count):
            return elf.dynamic_entries(memory.view(address, address + byte_count), memory.word_bytes)
    return {}


def _main_module(modules: Sequence[Module], auxv: Mapping[int, int]) -> Module | None:
    """The program: the one whose DT_DEBUG the dynamic linker filled in, else where AT_ENTRY points.

    When ld.so was run by name, the kernel's auxiliary vector speaks of ld.so; DT_DEBUG still tells
    the program.
    """
    for module in modules:
        if module.dynamic.get(elf.DT_DEBUG):
            return module
    entry = auxv.get(AT_ENTRY) or auxv.get(AT_PHDR)
    for module in modules:
        if entry is not None and module.start <= entry < module.end:
            return module
    return None


def _has_text_relocations(dynamic: Mapping[int, int]) -> bool:
    return _DT_TEXTREL in dynamic or bool(dynamic.get(_DT_FLAGS, 0) & _DF_TEXTREL)


def rights_by_headers(memory: AddressSpace, modules: Sequence[Module]) -> npt.NDArray[np.uint8]:
    """``region_flags`` with those of regions that NT_FILE alone tells of: what the module's own program headers ask for.

    gdb leaves text and read-only data to the files and writes no program header for them. A region that is not of one segment
    alone stays as it is.
    """
    flags = memory.region_flags.copy()
    untold = np.flatnonzero((memory.region_segment < 0) & (memory.region_file_index >= 0))
    starts, ends = memory.region_start[untold], memory.region_end[untold]
    page = memory.page_bytes
    for module in modules:
        first, last = np.searchsorted(starts, np.array([module.start, module.end], np.uint64)).tolist()
        if first == last or module.program_headers is None or module.load_bias is None:
            continue
        for row in module.program_headers.rows_of_kind(elf.PT_LOAD).tolist():
            begin = module.load_bias + int(module.program_headers.address[row]) & _ADDRESS_MASK
            end = min(begin + int(module.program_headers.memory_bytes[row]), module.end)
            # The later of two segments in one page has it: the loader maps them in their order.
            within = starts[first:last] >= np.uint64(begin - begin % page)
            within &= ends[first:last] <= np.uint64(end + -end % page)
            flags[untold[first:last][within]] = int(module.program_headers.flags[row]) & 7
    return flags
