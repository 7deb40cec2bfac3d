"""Cores whose text was dumped, with no file at hand: exported symbols, machine code and the TLS image from memory.

The truth is what readelf and pyelftools say of the library's file, and of its debug file; the core is analysed without them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from coreheap.allocators.glibc.identify import layouts_for
from coreheap.allocators.glibc.scoring import arena_score
from coreheap.allocators.glibc.ways.code import ARENA_FUNCTIONS
from coreheap.allocators.glibc.ways.signatures import by_code, by_relocations
from coreheap.allocators.glibc.ways.subject import Subject
from coreheap.corefile import Core, Module, open_core
from coreheap.corefile.dumped_symbols import DumpedSymbols
from coreheap.corefile.relocations import MemoryImage
from coreheap.corefile.symbols import ElfFile
from coreheap.evidence import Strength
from tests.core_builder import CoreBuilder
from tests.real_cores.cases import exclusion_for
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.targets import MATRIX_TARGETS
from tests.unit.allocators.ways.libraries import NATIVE, Library, library

PAGE = 4096
CASE = "threads_kept@filter_all"
NAMES = (NATIVE, *(name for name in MATRIX_TARGETS if exclusion_for(CASE, name) is None))


@pytest.fixture(params=NAMES)
def dumped(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Core, Module, Library]]:
    """A core that holds libc's text, opened where no file of libc is; libc in it; what is known of that libc."""
    known = library(request.param)
    core_path = core_or_skip(CASE if request.param == NATIVE else f"{request.param}/{CASE}").core
    with open_core(core_path, sysroot=tmp_path) as core:
        # Up to 2.33 libc.so.6 is a link, and the core names libc-2.31.so.
        (libc,) = (module for module in core.modules if module.name.startswith(("libc.so", "libc-2")))
        assert libc.elf_file is None
        assert libc.debug_file is None
        yield core, libc, known


def test_symbols_are_those_of_the_file(dumped: tuple[Core, Module, Library]) -> None:
    core, libc, known = dumped
    file = ElfFile.open(known.file)
    assert file is not None
    symbols = DumpedSymbols(MemoryImage(core.memory, libc))
    for name in (*ARENA_FUNCTIONS, "environ", "qsort", "no_such_function"):
        ours, theirs = symbols.find(name), file.find_symbol(name)
        assert (ours is None) is (theirs is None), name
        if ours is not None and theirs is not None:
            assert (ours.value, ours.byte_count, ours.kind) == (theirs.value, theirs.byte_count, theirs.kind), name


def test_machine_code_names_the_globals(dumped: tuple[Core, Module, Library]) -> None:
    core, libc, known = dumped
    subject = Subject(core, libc, layouts_for(core), arena_score)
    found = by_code(subject)
    bias = libc.load_bias
    assert bias is not None
    assert [sighting.address for sighting in found.main_arena] == [bias + known.truth["main_arena"]]
    assert [sighting.address for sighting in found.parameters] == [bias + known.truth["mp_"]]
    for sighting in (*found.main_arena, *found.parameters):
        assert sighting.evidence.strength is Strength.SOLID
        assert sighting.evidence.source == f"machine code of {libc.name} in the core"
    block = subject.thread_block
    assert block is not None
    assert block + known.truth["tcache"] in {slot.offset for slot in found.thread_slots}


def test_the_thread_image_names_tcache_where_it_has_an_initial_value(dumped: tuple[Core, Module, Library]) -> None:
    core, libc, known = dumped
    subject = Subject(core, libc, layouts_for(core), arena_score)
    variables = by_relocations(subject).tcache
    block = subject.thread_block
    assert block is not None
    starts_as_pointer = known.release in ("2.43", "2.44")
    assert [variable.offset for variable in variables] == ([block + known.truth["tcache"]] if starts_as_pointer else [])
    for variable in variables:
        assert variable.evidence.source == f"TLS image of {libc.name} in the core"


@pytest.mark.parametrize("name", [name for name, target in MATRIX_TARGETS.items() if target.is_emulated])
def test_aarch64_text_laid_out_as_the_dynamic_linker_does(name: str, tmp_path: Path) -> None:
    """qemu-user saves no text, so these cores are built: the library's segments at a base, as nothing has yet run."""
    known = library(name)
    raw, base = known.file.read_bytes(), 0x55_0000_0000
    (table,), (entry_bytes, count) = struct.unpack_from("<Q", raw, 32), struct.unpack_from("<2H", raw, 54)
    builder = CoreBuilder(64, "aarch64").add_thread()
    for row in range(count):
        kind, flags, offset, address, _, file_bytes, memory_bytes, _ = struct.unpack_from(
            "<2I6Q", raw, table + row * entry_bytes
        )
        if kind != 1:
            continue
        head = address % PAGE
        content = raw[offset - head : offset + file_bytes].ljust(head + memory_bytes, b"\0")
        letters = "".join(letter if flags & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        builder.add_segment(base + address - head, content + bytes(-len(content) % PAGE), flags=letters)
        builder.add_file_mapping(base + address - head, base + address + file_bytes, offset - head, "/lib/libc.so.6")
    with open_core(builder.write(tmp_path / "core"), sysroot=tmp_path) as core:
        (libc,) = core.modules
        assert libc.elf_file is None
        subject = Subject(core, libc, layouts_for(core), arena_score)
        found = by_code(subject)
        # Before the first allocation main_arena is no arena yet, and evidence says so.
        assert base + known.truth["main_arena"] in {sighting.address for sighting in found.main_arena}
        assert [sighting.address for sighting in found.parameters] == [base + known.truth["mp_"]]
