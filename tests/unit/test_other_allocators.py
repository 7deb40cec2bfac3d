"""Built cores whose numbers would have other allocators' structures looked for without end, or found where there are none."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import coreheap
from coreheap.accounting.other_allocators import other_allocators, tcmalloc
from coreheap.accounting.other_allocators.jemalloc import jemalloc_ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.accounting.other_allocators.mimalloc import mimalloc_ranges
from coreheap.accounting.other_allocators.pymalloc import pymalloc_ranges
from coreheap.accounting.other_allocators.sanitizers import ASAN, ranges_of, valgrind_ranges
from coreheap.accounting.other_allocators.tcmalloc import LEAF_BYTES, LEAVES_LIMIT, tcmalloc_ranges
from coreheap.evidence import Confidence, Strength
from coreheap.mappings import MappingKind
from tests.core_builder import CoreBuilder, elf_image

PAGE, MIB = 4096, 1 << 20
LIBRARY = 0x7F0000000000
MEMORY = 0x7E0000000000


@pytest.fixture
def words_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many words each question for a search's memory has read."""
    counts: list[int] = []
    words, rows_at = AnonymousMemory.words, AnonymousMemory.rows_at

    def counted_words(self: AnonymousMemory, start: int, end: int) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        for address, found in words(self, start, end):
            counts.append(len(found))
            yield address, found

    def counted_rows(
        self: AnonymousMemory, addresses: npt.NDArray[np.uint64], count: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
        counts.append(len(addresses) * count)
        return rows_at(self, addresses, count)

    monkeypatch.setattr(AnonymousMemory, "words", counted_words)
    monkeypatch.setattr(AnonymousMemory, "rows_at", counted_rows)
    return counts


def core_of(memory: bytes | bytearray, pointers: list[int], path: str = "/opt/lib.so") -> CoreBuilder:
    """A library with pointers in its data, and one anonymous mapping."""
    image = elf_image(total_bytes=PAGE + 1024 * PAGE, data_bytes=1024 * PAGE)
    data = struct.pack(f"<{len(pointers)}Q", *pointers).ljust(1024 * PAGE, b"\0")
    builder = CoreBuilder().add_segment(MEMORY, memory)
    builder.add_segment(LIBRARY, image[:PAGE], flags="r-x").add_segment(LIBRARY + PAGE, data)
    builder.add_file_mapping(LIBRARY, LIBRARY + PAGE, 0, path)
    builder.add_file_mapping(LIBRARY + PAGE, LIBRARY + 1025 * PAGE, PAGE, path)
    return builder.add_thread()


def base_block(address: int, size: int) -> bytes:
    """base_block_t: its size, the next block, and an extent that ends where the block does."""
    return struct.pack("<5Q", size, 0, 0xFFF, address + 256, size - 256)


def extent(address: int, size: int) -> bytes:
    return struct.pack("<8Q", 0x1000, address, size, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("extents", [0, 3])
def test_base_blocks_that_lie_in_each_other(extents: int, tmp_path: Path, words_read: list[int]) -> None:
    """Nested blocks were read once each: 64 MiB of them took seconds, 256 MiB half a minute."""
    size = 64 * MIB
    memory = bytearray(size)
    for place in range(0, size, 2 * MIB):
        memory[place : place + 40] = base_block(MEMORY + place, size - place)
    for number in range(extents):
        place = 4096 + 64 * number
        memory[place : place + 64] = extent(MEMORY + size + number * PAGE, PAGE)
    builder = core_of(memory, []).add_segment(MEMORY + size, bytes(16 * PAGE))
    with coreheap.open(builder.write(tmp_path / "core", sparse=False)) as core:
        found = jemalloc_ranges(AnonymousMemory(core), core.modules[0])
    assert sum(words_read) < 2 * size // 8
    if not extents:
        assert found == ()
        return
    (ranges,) = found
    assert (ranges.start.tolist(), ranges.end.tolist()) == ([MEMORY], [MEMORY + size + extents * PAGE])
    assert ranges.evidence[0].statement.startswith("1 blocks")


def test_zeros_are_no_array_of_arenas(tmp_path: Path, words_read: list[int]) -> None:
    """Each pointer into zeros was followed for a million rows."""
    size = 64 * MIB
    pointers = [MEMORY + 8 * number for number in range(4000)]
    with coreheap.open(core_of(bytes(size), pointers).write(tmp_path / "core", sparse=False)) as core:
        assert pymalloc_ranges(AnonymousMemory(core), core.modules[0]) == ()
    assert sum(words_read) < 2 * size // 8


def test_an_array_of_arenas_is_found_with_its_unused_rows(tmp_path: Path) -> None:
    """arena_object rows as obmalloc.c leaves them: two arenas, one given back, two never used, the last without a next one."""
    memory = bytearray(8 * MIB)
    array, first = MEMORY + 4 * MIB, MEMORY + MIB
    arenas = [first, first + 256 * 1024]
    row = struct.Struct("<QQIIQQQ")
    for number in range(5):
        place = 4 * MIB + number * row.size
        if number < 2:
            at = arenas[number]
            memory[place : place + row.size] = row.pack(at, at + 8 * PAGE, 56, 64, 0, 0, 0)
        else:
            following = array + (number + 1) * row.size if number < 4 else 0
            memory[place : place + row.size] = row.pack(0, 0, 0, 0, 0, following, 0)
    memory[4 * MIB + 5 * row.size] = 1  # behind the array: no row
    for at in arenas:
        for pool in range(8):
            place = at - MEMORY + pool * PAGE
            memory[place : place + 48] = struct.pack("<QQQQIIII", 1, 0, 0, 0, 0, 1, 64, PAGE - 32)
    with coreheap.open(core_of(memory, [array]).write(tmp_path / "core", sparse=False)) as core:
        (ranges,) = pymalloc_ranges(AnonymousMemory(core), core.modules[0])
    assert (ranges.start.tolist(), ranges.end.tolist()) == ([first], [first + 512 * 1024])
    assert ranges.evidence[0].statement == "an array of 5 arena_object describes 2 arenas"


def test_a_leaf_is_found_behind_many_pointers_into_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pointers to one place do not use up what may be read: a page map's leaf lies far above them."""
    monkeypatch.setattr(tcmalloc, "LEAVES_LIMIT", 8 * MIB)
    spans, leaf = MEMORY + 400 * MIB, MEMORY + 402 * MIB
    first_page = (MEMORY + 410 * MIB) >> 13
    rows = b"".join(struct.pack("<QQ", first_page + 4 * number, 4) for number in range(32))
    pointers_to_spans = b"".join(struct.pack("<Q", spans + 16 * number) for number in range(32))
    data = [MEMORY + 8 * number for number in range(2000)] + [leaf]
    builder = core_of(b"\1" + bytes(PAGE - 1), data)
    builder.add_segment(MEMORY + PAGE, bytes(16 * MIB))
    builder.add_segment(spans, rows.ljust(PAGE, b"\0")).add_segment(leaf, pointers_to_spans.ljust(PAGE, b"\0"))
    builder.add_segment(MEMORY + 410 * MIB, bytes(32 * 4 * 8192))
    with coreheap.open(builder.write(tmp_path / "core", sparse=False)) as core:
        found = tcmalloc_ranges(AnonymousMemory(core), core.modules[0])
    assert found
    assert found[0].bytes == 32 * 4 * 8192
    assert not [fact for fact in found[0].evidence if fact.speaks_against]


def test_a_search_that_was_cut_is_a_doubt(tmp_path: Path) -> None:
    """More pointers to different places than leaves are read for."""
    count = LEAVES_LIMIT // LEAF_BYTES + 8
    first_page = MEMORY >> 13
    memory = np.ones(count * LEAF_BYTES // 8, np.uint64)
    memory[:64] = np.array([[first_page + 4 * number, 4] for number in range(32)], np.uint64).reshape(-1)
    memory[64:96] = MEMORY + 16 * np.arange(32)
    pointers = [MEMORY + number * LEAF_BYTES for number in range(count)]
    with coreheap.open(core_of(memory.tobytes(), pointers).write(tmp_path / "core")) as core:
        found = tcmalloc_ranges(AnonymousMemory(core), core.modules[0])
    against = [fact for fact in found[0].evidence if fact.speaks_against]
    assert [fact.strength for fact in against] == [Strength.HINT]


@pytest.mark.parametrize(("address", "is_one"), [(0x3000000, False), (MEMORY + 4 * MIB, True)])
def test_like_words_at_a_low_address_are_no_segment_of_mimalloc(address: int, is_one: bool, tmp_path: Path) -> None:
    """Python's bytecode in the break differs in one bit from bytecode in the program's data, and so do their addresses."""
    word = 0x5F007C017C0097
    builder = core_of(bytes(PAGE), [word ^ address])
    builder.add_segment(address, struct.pack("<64Q", *[0] * 61, word, 0, 0).ljust(PAGE, b"\0"))
    with coreheap.open(builder.write(tmp_path / "core")) as core:
        (module,) = [module for module in core.modules if module.path == "/opt/lib.so"]
        found = mimalloc_ranges(AnonymousMemory(core), module)
    assert bool(found) is is_one


TIB = 1 << 40
SHADOW, SHADOW_END, SPACE = 0x7FFF7000, 0x1000_7FFF_8000, 0x6000_0000_0000


def with_reserves(*reserves: tuple[int, int, str]) -> CoreBuilder:
    """A process with ranges of address space that the core holds nothing of."""
    builder = core_of(bytes(PAGE), [], "/usr/lib/libasan.so.8")
    for start, end, flags in reserves:
        builder.add_segment(start, None, end - start, flags)
    return builder


def test_the_shadow_memory_of_a_sanitizer_is_told_by_its_place(tmp_path: Path) -> None:
    shadow = (
        (SHADOW, 0x8FFF7000, "rw-"),
        (0x8FFF7000, 0x200_8FFF_7000, "---"),
        (0x200_8FFF_7000, SHADOW_END, "rw-"),
    )
    space = (SPACE, SPACE + PAGE, "rw-"), (SPACE + PAGE, SPACE + 4 * TIB, "---")
    with coreheap.open(with_reserves(*shadow, *space).write(tmp_path / "core")) as core:
        (found,) = other_allocators(core)
        report = coreheap.analyze(core)
    assert (found.name, found.is_searched) == ("AddressSanitizer", True)
    assert found.confidence is Confidence.STRONG
    assert found.bytes == PAGE
    assert report.mappings is not None
    assert report.mappings.bytes_of(MappingKind.TOOL_MEMORY) == SHADOW_END - SHADOW + 4 * TIB - PAGE
    # What takes no memory takes no part in shares.
    assert all(item.of_bytes < TIB for item in report.verdict)


@pytest.mark.parametrize(
    "reserves",
    [
        ((SHADOW + 2 * PAGE, SHADOW_END, "rw-"),),  # begins elsewhere
        ((SHADOW, SHADOW_END - PAGE, "rw-"),),  # ends elsewhere
        ((SHADOW, SHADOW_END, "---"),),  # nobody may write there
        ((SPACE, SPACE + 4 * TIB, "rw-"),),  # no shadow
        ((0x100_0000_0000, 0x2000_0000_0000, "rw-"),),  # as ThreadSanitizer's, without its symbols
    ],
)
def test_terabytes_at_another_place_are_no_sanitizers(
    tmp_path: Path, reserves: tuple[tuple[int, int, str], ...]
) -> None:
    with coreheap.open(with_reserves(*reserves).write(tmp_path / "core")) as core:
        assert ranges_of(ASAN)(AnonymousMemory(core), core.modules[0]) == ()


@pytest.mark.parametrize("damage", ["", "size", "end"])
def test_superblocks_of_valgrind_tile_their_mapping(tmp_path: Path, damage: str) -> None:
    memory = bytearray(3 * MIB)
    for place, size in ((0, MIB), (MIB, 2 * MIB - (PAGE if damage == "end" else 0))):
        memory[place : place + 8] = struct.pack("<Q", size - 32 - (8 if damage == "size" and place else 0))
    builder = core_of(b"", []).add_segment(MEMORY + MIB, bytes(memory), flags="rwx")
    with coreheap.open(builder.write(tmp_path / "core", sparse=False)) as core:
        found = valgrind_ranges(AnonymousMemory(core), core.modules[0])
    if damage:
        assert found == ()
    else:
        assert [(one.start.tolist(), one.end.tolist()) for one in found] == [([MEMORY + MIB], [MEMORY + 4 * MIB])]
