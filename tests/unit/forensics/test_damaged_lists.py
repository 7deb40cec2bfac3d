"""Lists that were hit: written after free, freed twice, never given out."""

from __future__ import annotations

from pathlib import Path

from coreheap.damage import DamageKind
from coreheap.evidence import Confidence
from tests.heap_builder import IN_USE, SMALL_BIN, TCACHE, UNSORTED_BIN, BuiltList
from tests.unit.allocators.built_process import BuiltProcess
from tests.unit.forensics.test_damaged_headers import analyze, built, only_damage

WORD = 8


def long_list(process: BuiltProcess, *states: str, least: int = 2) -> BuiltList:
    return next(item for item in process.lists if item.state in states and len(item.chunks) >= least)


def test_text_in_a_cached_blocks_link_is_a_write_after_free(tmp_path: Path) -> None:
    process = built()
    block = long_list(process, TCACHE).chunks[0]
    place = block.payload_address(process.machine)
    process.builder.memory.write(place, b"freed?!!")
    damage = only_damage(analyze(process, tmp_path))
    assert damage.kind is DamageKind.USE_AFTER_FREE
    assert damage.culprit is not None
    assert damage.culprit.payload_address == place
    assert damage.bytes.start == place


def test_a_number_in_bk_is_a_write_after_free(tmp_path: Path) -> None:
    process = built()
    block = long_list(process, SMALL_BIN, UNSORTED_BIN).chunks[0]
    place = block.payload_address(process.machine) + WORD
    process.put(place, 0x1234)
    damage = only_damage(analyze(process, tmp_path))
    assert damage.kind is DamageKind.USE_AFTER_FREE
    assert damage.bytes.start == place
    assert damage.victim == damage.culprit
    assert damage.message is not None


def test_a_list_that_leads_back_with_one_more_counted_is_a_double_free(tmp_path: Path) -> None:
    process = built()
    cached = long_list(process, TCACHE)
    last = cached.chunks[-1].payload_address(process.machine)
    process.put(last, cached.head ^ (last >> 12))
    report = analyze(process, tmp_path)
    damage = only_damage(report)
    # As many as are counted are there: then nothing was freed once more, and the link itself was changed.
    assert damage.kind is DamageKind.USE_AFTER_FREE
    assert damage.confidence is not Confidence.CERTAIN


def test_a_pointer_inside_a_live_block_that_was_freed(tmp_path: Path) -> None:
    process = built()
    cached = long_list(process, TCACHE)
    live = next(
        chunk
        for part in process.arenas[0].segments
        for chunk in part.of_state(IN_USE)[8:]
        if chunk.chunk_bytes > cached.chunks[0].chunk_bytes + 0x80
    )
    inside = live.payload_address(process.machine) + 0x40
    last = cached.chunks[-1].payload_address(process.machine)
    process.put(inside - WORD, cached.chunks[0].chunk_bytes | 1)
    process.put(inside, inside >> 12)
    process.put(inside + WORD, process.tcache_key)
    process.put(last, inside ^ (last >> 12))
    damage = only_damage(analyze(process, tmp_path))
    assert damage.kind is DamageKind.INVALID_FREE
    assert damage.culprit is not None
    assert damage.culprit.header_address == live.header_address
    assert damage.bytes.start == inside


def test_text_over_a_link_ends_before_a_key_that_begins_with_a_letter_by_chance(tmp_path: Path) -> None:
    process = built()
    for item in process.lists:
        for chunk in item.chunks if item.state == TCACHE else ():
            process.put(chunk.payload_address(process.machine) + WORD, 0xF7A1_0983_BD61_4241)
    place = long_list(process, TCACHE).chunks[0].payload_address(process.machine)
    process.builder.memory.write(place, b"freed?!!")
    damage = only_damage(analyze(process, tmp_path))
    assert (damage.bytes.start, damage.bytes.end) == (place, place + WORD)
