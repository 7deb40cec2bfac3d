"""What lies at an address, for every chunk of built processes and for what lies beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import coreheap
from coreheap.corefile import Core
from coreheap.corefile.stacks import find_stacks
from coreheap.crash import FaultKind
from coreheap.crashes.places import Places, is_canonical
from coreheap.damage import ChunkPlace, Damage, DamagedPlace, DamageKind
from coreheap.evidence import Confidence
from coreheap.quantities import AddressRange
from coreheap.report import Report
from tests.unit.allocators.built_process import THREADS, BuiltProcess, build_process, release

KINDS = {
    "in_use": FaultKind.LIVE_CHUNK,
    "tcache": FaultKind.FREED_CHUNK,
    "fastbin": FaultKind.FREED_CHUNK,
    "unsorted_bin": FaultKind.FREED_CHUNK,
    "small_bin": FaultKind.FREED_CHUNK,
    "large_bin": FaultKind.FREED_CHUNK,
    "top": FaultKind.ALLOCATOR_DATA,
    "allocator_own": FaultKind.ALLOCATOR_DATA,
}


@pytest.fixture(params=["x86_64", "i386", "aarch64"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[BuiltProcess, Core, Report]]:
    process = build_process(release("2.36", request.param), THREADS)
    with coreheap.open(process.write(tmp_path), sysroot=tmp_path) as core:
        yield process, core, coreheap.analyze(core)


def places_of(core: Core, report: Report, damages: tuple[Damage, ...] = ()) -> Places:
    return Places(core, report.heap, find_stacks(core), damages)


Built = tuple[BuiltProcess, Core, Report]


def test_every_chunk_is_named_by_its_state(built: Built) -> None:
    process, core, report = built
    places = places_of(core, report)
    word = core.word_bytes
    checked = 0
    for state, kind in KINDS.items():
        for payload in sorted(process.truth[state])[:200]:
            for offset in (0, word, 2 * word - 1, -word):
                note = places.in_heap(payload + offset)
                assert note is not None
                assert note.kind is kind, (state, hex(payload), offset)
                assert (note.offset, note.chunk and note.chunk.payload_address) == (offset, payload)
                checked += 1
    assert checked > 500


def test_the_word_that_a_chunk_lends_belongs_to_the_chunk_before(built: Built) -> None:
    """malloc_usable_size counts the next chunk's prev_size word."""
    process, core, report = built
    places = places_of(core, report)
    word = core.word_bytes
    seen = 0
    for payload in process.truth["in_use"]:
        note = places.in_heap(payload)
        assert note is not None
        assert note.chunk is not None
        if note.chunk.is_mmapped:
            continue
        last = places.in_heap(payload + note.chunk.usable_bytes - 1)
        assert last is not None
        assert last.chunk is not None
        assert last.chunk.payload_address == payload
        seen += 1
    assert seen > 20
    assert word in (4, 8)


def test_malloc_state_is_malloc_s_own_data(built: Built) -> None:
    process, core, report = built
    places = places_of(core, report)
    for address in (process.main_arena, process.mp, *(arena.state_address for arena in process.arenas)):
        note = places.in_heap(address + 8)
        assert note is not None
        assert note.kind is FaultKind.ALLOCATOR_DATA


def test_behind_an_mmapped_chunk_at_the_end_of_its_mapping(built: Built) -> None:
    _, core, report = built
    places = places_of(core, report)
    assert report.heap is not None
    mmapped = report.heap.chunks.index.mmapped
    ends = (mmapped.mapping_start + mmapped.mapping_bytes).tolist()
    found = [places.fault(end + 24, was_denied=False) for end in ends if core.memory.region_index(end + 24) is None]
    assert found
    for note in found:
        assert note.kind is FaultKind.PAST_CHUNK_END
        assert note.chunk is not None
        assert note.chunk.is_mmapped
        assert note.description.startswith("24 bytes behind")


def test_null_pointers_have_offsets_in_both_directions(built: Built) -> None:
    _, core, report = built
    places = places_of(core, report)
    for address, offset in ((0, 0), (0x1234, 0x1234), ((1 << 8 * core.word_bytes) - 0x18, -0x18)):
        note = places.fault(address, was_denied=False)
        assert (note.kind, note.offset) == (FaultKind.NULL, offset)


def test_a_damaged_chunk_is_called_so(built: Built) -> None:
    process, core, report = built
    payload = sorted(process.truth["in_use"])[3]
    note = places_of(core, report).in_heap(payload)
    assert note is not None
    assert note.chunk is not None
    damage = damage_of(note.chunk)
    after = places_of(core, report, (damage,)).in_heap(payload + 1)
    assert after is not None
    assert after.kind is FaultKind.DAMAGED_CHUNK


def damage_of(victim: ChunkPlace) -> Damage:
    return Damage(
        DamageKind.OVERFLOW,
        DamagedPlace.CHUNK_HEADER,
        AddressRange(victim.header_address, victim.header_address + 8),
        victim,
        None,
        None,
        None,
        (),
        0,
        0,
        None,
        (),
        Confidence.STRONG,
    )


def test_modules_and_unmapped_memory(built: Built) -> None:
    process, core, report = built
    places = places_of(core, report)
    assert places.fault(process.program + 0x10, was_denied=True).kind is FaultKind.READ_ONLY
    assert places.fault(process.program + 0x10, was_denied=False).kind is FaultKind.MODULE
    nowhere = 0x1000_0000 if core.word_bytes == 4 else 0x1000_0000_0000
    assert places.fault(nowhere, was_denied=False).kind is FaultKind.UNMAPPED


def test_without_a_heap_nothing_is_in_it(built: Built) -> None:
    process, core, _ = built
    places = Places(core, None, find_stacks(core), ())
    assert places.in_heap(process.main_arena) is None
    assert places.fault(0x18, was_denied=False).kind is FaultKind.NULL


def test_addresses_of_x86_64() -> None:
    for address in (0, 0x7FFF_FFFF_FFFF, 0xFFFF_8000_0000_0000, (1 << 64) - 1):
        assert is_canonical(address, "x86_64")
    for address in (0x8000_0000_0000, 0x4141414141414141, 0xFFFF_7FFF_FFFF_FFFF):
        assert not is_canonical(address, "x86_64")
        assert is_canonical(address, "aarch64")
