"""Built cores: what of the memory behind a module's data is its bss, and stacks that lie in other memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import coreheap
from coreheap.accounting import account_for_memory
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.corefile.kinds import RegionLabel, region_labels
from coreheap.corefile.stacks import find_stacks
from coreheap.mappings import KINDS, MappingKind, MappingTable
from tests.core_builder import CoreBuilder, elf_image

PAGE = 4096
LIBRARY = 0x7F0000000000
DATA = LIBRARY + PAGE
BSS = LIBRARY + 2 * PAGE
PATH = "/opt/lib/plugin.so"


def core_with_library(bss_bytes: int, behind: int, *, with_header: bool = True, **more: int) -> CoreBuilder:
    """A library whose headers ask for ``bss_bytes``; behind its data one mapping of ``behind`` bytes."""
    image = elf_image(total_bytes=2 * PAGE, data_bytes=PAGE, bss_bytes=bss_bytes)
    builder = CoreBuilder()
    builder.add_segment(LIBRARY, image[:PAGE] if with_header else None, PAGE, "r-x")
    builder.add_segment(DATA, image[PAGE : 2 * PAGE])
    builder.add_segment(BSS, b"bss".ljust(8, b"\0"), behind)
    builder.add_file_mapping(LIBRARY, DATA, 0, PATH).add_file_mapping(DATA, BSS, PAGE, PATH)
    return builder.add_thread(stack_pointer=more.get("stack_pointer", 0))


def kinds_of(table: MappingTable, start: int) -> list[tuple[MappingKind, int, str | None]]:
    """Kind, bytes and name of each row from an address on."""
    return [
        (
            KINDS[int(table.kind[row])],
            int(table.end[row] - table.start[row]),
            table.names[int(table.name[row])] if table.name[row] >= 0 else None,
        )
        for row in range(len(table))
        if table.start[row] >= np.uint64(start)
    ]


def table_of(builder: CoreBuilder, path: Path) -> MappingTable:
    with coreheap.open(builder.write(path / "core")) as core:
        return account_for_memory(core, None).mappings


@pytest.mark.parametrize("asked", [3 * PAGE, 3 * PAGE - 100, 2 * PAGE + 1])
def test_a_mapping_behind_the_bss_is_not_the_modules(asked: int, tmp_path: Path) -> None:
    table = table_of(core_with_library(asked, 512 << 20), tmp_path)
    assert kinds_of(table, BSS) == [
        (MappingKind.MODULE_BSS, 3 * PAGE, PATH),
        (MappingKind.UNEXPLAINED, (512 << 20) - 3 * PAGE, None),
    ]
    assert table.supposed_bytes == {}


def test_without_bss_nothing_behind_the_data_is_the_modules(tmp_path: Path) -> None:
    table = table_of(core_with_library(0, 512 << 20), tmp_path)
    assert kinds_of(table, BSS) == [(MappingKind.UNEXPLAINED, 512 << 20, None)]


def test_headers_that_ask_for_everything_get_no_more_than_follows(tmp_path: Path) -> None:
    builder = core_with_library(1 << 45, 8 * PAGE)
    builder.add_segment(BSS + 16 * PAGE, b"other", 4 * PAGE)
    table = table_of(builder, tmp_path)
    assert kinds_of(table, BSS) == [
        (MappingKind.MODULE_BSS, 8 * PAGE, PATH),
        (MappingKind.UNEXPLAINED, 4 * PAGE, None),
    ]


def test_without_program_headers_a_small_mapping_is_supposed_to_be_bss(tmp_path: Path) -> None:
    table = table_of(core_with_library(0, 16 * PAGE, with_header=False), tmp_path)
    assert kinds_of(table, BSS) == [(MappingKind.MODULE_BSS, 16 * PAGE, PATH)]
    assert table.supposed_bytes == {MappingKind.MODULE_BSS: 16 * PAGE}


def test_without_program_headers_a_large_mapping_is_nobodys(tmp_path: Path) -> None:
    table = table_of(core_with_library(0, 64 << 20, with_header=False), tmp_path)
    assert kinds_of(table, BSS) == [(MappingKind.UNEXPLAINED, 64 << 20, None)]
    assert table.supposed_bytes == {}


def test_a_stack_pointer_in_bss_does_not_make_it_a_stack(tmp_path: Path) -> None:
    """A coroutine's stack in a static array: how large it is nothing tells."""
    builder = core_with_library(64 * PAGE, 64 * PAGE, stack_pointer=BSS + 32 * PAGE)
    with coreheap.open(builder.write(tmp_path / "core")) as core:
        table = account_for_memory(core, None).mappings
        labels = region_labels(core)
        assert labels[core.memory.region_index(BSS)] == RegionLabel.MODULE_BSS
        assert find_stacks(core).by_thread == {}
    assert kinds_of(table, BSS) == [(MappingKind.MODULE_BSS, 64 * PAGE, PATH)]


@pytest.mark.parametrize(("size", "kind"), [(32 << 20, MappingKind.THREAD_STACK), (512 << 20, MappingKind.UNEXPLAINED)])
def test_of_a_mapping_that_a_stack_pointer_lies_in_only_a_small_one_is_a_stack(
    size: int, kind: MappingKind, tmp_path: Path
) -> None:
    builder = CoreBuilder().add_segment(LIBRARY, b"stack", size)
    table = table_of(builder.add_thread(stack_pointer=LIBRARY + size // 2), tmp_path)
    assert kinds_of(table, LIBRARY) == [(kind, size, None)]
    assert table.supposed_bytes == ({kind: size} if kind is MappingKind.THREAD_STACK else {})


def test_other_allocators_may_have_what_lies_behind_the_bss(tmp_path: Path) -> None:
    with coreheap.open(core_with_library(3 * PAGE, 64 << 20).write(tmp_path / "core")) as core:
        anonymous = AnonymousMemory(core)
        for low, high in (anonymous.stretches, anonymous.writable):
            assert (low.tolist(), high.tolist()) == ([BSS + 3 * PAGE], [BSS + (64 << 20)])
        (module,) = core.modules
        places, values = anonymous.module_words(module)
    assert BSS in places.tolist()
    assert int.from_bytes(b"bss", "little") in values.tolist()
