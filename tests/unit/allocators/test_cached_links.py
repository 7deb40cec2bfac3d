"""tcache lists with a link that leads wrong: what lies behind it is kept, and the block that was written to is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from coreheap.damage import DamagedPlace, DamageKind
from coreheap.evidence import Confidence
from tests.heap_builder import IN_USE, TCACHE, BuiltChunk, BuiltList
from tests.unit.allocators.built_process import BuiltProcess, states_of
from tests.unit.allocators.test_integrity import analyzed, built, only

SAFE_LINKING = ("2.36 x86_64", "2.36 i386", "2.41 aarch64", "2.44 x86_64")
each_release = pytest.mark.parametrize("case", ["2.31 x86_64", *SAFE_LINKING])


def head_of(process: BuiltProcess, least: int = 2) -> tuple[BuiltList, int, int]:
    """A tcache list, where its head lies, and where its count (2 bytes) does."""
    word, offsets = process.machine.word_bytes, process.release.offsets("tcache_perthread_struct")
    counts = offsets.get("counts", offsets.get("num_slots", 0))
    return next(
        (row, thread.tcache + offsets["entries"] + word * row.number, thread.tcache + counts + 2 * row.number)
        for row in process.lists
        for thread in process.threads
        if row.state == TCACHE
        and len(row.chunks) >= least
        and process.get(thread.tcache + offsets["entries"] + word * row.number) == row.head
    )


def one_more(process: BuiltProcess, count_place: int, blocks: int) -> None:
    """Count so many blocks more: 2.42 counts the slots that are left."""
    counts_slots = "num_slots" in process.release.offsets("tcache_perthread_struct")
    count = process.builder.memory.get(count_place, 2)
    process.put(count_place, count - blocks if counts_slots else count + blocks, 2)


def stored(process: BuiltProcess, place: int, pointer: int) -> int:
    return pointer ^ place >> 12 if process.builder.heap.safe_linking else pointer


def popped(process: BuiltProcess, text: bytes) -> BuiltChunk:
    """Writes to a cached block and takes it off its list, as malloc does."""
    row, head_place, count_place = head_of(process)
    machine, block = process.machine, row.chunks[0]
    place = block.payload_address(machine)
    assert place == row.head
    process.builder.memory.write(place, text[: machine.word_bytes])
    process.put(head_place, stored(process, place, process.get(place)))
    process.put(place + machine.word_bytes, 0)
    one_more(process, count_place, -1)
    return block


@each_release
def test_head_that_came_from_a_block_that_was_written_to(case: str, tmp_path: Path) -> None:
    process = built(case)
    block = popped(process, b"freed?!?")
    report = analyzed(process, tmp_path)
    (anomaly,) = report.anomalies
    place = block.payload_address(process.machine)
    assert (anomaly.word_address, anomaly.header_address) == (place, block.header_address)
    (damage,) = report.damages
    assert (damage.kind, damage.place, damage.bytes.start) == (
        DamageKind.USE_AFTER_FREE,
        DamagedPlace.TCACHE_LINK,
        place,
    )
    assert damage.culprit is not None
    assert damage.culprit.header_address == block.header_address
    # Had it been freed twice, its owner's content would look the same. Without safe linking the head is the very word: the
    # program itself may have it twice.
    assert damage.confidence is (Confidence.PLAUSIBLE if case in SAFE_LINKING else Confidence.WEAK)


@each_release
def test_head_that_no_block_tells_of_is_in_doubt(case: str, tmp_path: Path) -> None:
    process = built(case)
    block = popped(process, b"freed?!?")
    # The block's new owner has filled it.
    process.put(block.payload_address(process.machine), 0x1234567)
    (damage,) = analyzed(process, tmp_path).damages
    assert damage.place is DamagedPlace.TCACHE_STRUCTURE
    assert damage.confidence.rank <= Confidence.PLAUSIBLE.rank
    assert damage.culprit is None


@each_release
@pytest.mark.parametrize("key", [True, False])
def test_list_goes_on_behind_a_node_that_is_no_chunk(case: str, key: bool, tmp_path: Path) -> None:
    """free was called with a pointer into a live block: glibc follows the link that it left there."""
    process = built(case)
    machine, word = process.machine, process.machine.word_bytes
    row, head_place, count_place = head_of(process)
    own = {chunk.header_address for chunk in process.caches}
    live = next(
        chunk
        for arena in process.arenas
        for segment in arena.segments
        for chunk in segment.of_state(IN_USE)
        if chunk.chunk_bytes >= 12 * word and chunk.header_address not in own
    )
    node = live.payload_address(machine) + 4 * word
    process.put(node - word, row.chunks[0].chunk_bytes | 1)
    process.put(node, stored(process, node, row.head))
    if key:
        process.put(node + word, process.get(row.head + word))
    process.put(head_place, node)
    one_more(process, count_place, 1)
    report = analyzed(process, tmp_path)
    assert only(report, "list_not_a_chunk_start").address == node
    assert states_of(report.heap) == process.truth


@each_release
@pytest.mark.parametrize("key", [True, False])
def test_sound_link_that_a_block_given_out_still_holds_is_no_write_after_free(
    case: str, key: bool, tmp_path: Path
) -> None:
    """A pointer into a live block was freed, then the block that was freed after it was given out again."""
    process = built(case)
    machine, word = process.machine, process.machine.word_bytes
    row, head_place, _count_place = head_of(process)
    own = {chunk.header_address for chunk in process.caches}
    live = next(
        chunk
        for arena in process.arenas
        for segment in arena.segments
        for chunk in segment.of_state(IN_USE)
        if chunk.chunk_bytes >= 12 * word and chunk.header_address not in own
    )
    node, given_out = live.payload_address(machine) + 4 * word, row.chunks[0].payload_address(machine)
    second = row.chunks[1].payload_address(machine)
    process.put(node - word, row.chunks[0].chunk_bytes | 1)
    process.put(node, stored(process, node, second))
    if key:
        process.put(node + word, process.get(second + word))
    process.put(given_out, stored(process, given_out, node))
    process.put(given_out + word, 0)
    process.put(head_place, node)
    (damage,) = analyzed(process, tmp_path).damages
    assert damage.kind is DamageKind.INVALID_FREE or damage.confidence.rank <= Confidence.PLAUSIBLE.rank


@each_release
def test_old_content_behind_a_foreign_node_is_not_followed(case: str, tmp_path: Path) -> None:
    """It leads to a live block, which has no key: no list goes there."""
    process = built(case)
    machine, word = process.machine, process.machine.word_bytes
    row, head_place, count_place = head_of(process)
    size = row.chunks[0].chunk_bytes
    own = {chunk.header_address for chunk in process.caches}
    live = [
        chunk
        for arena in process.arenas
        for segment in arena.segments
        for chunk in segment.of_state(IN_USE)
        if chunk.header_address not in own
    ]
    holder = next(chunk for chunk in live if chunk.chunk_bytes >= 12 * word)
    target = next(chunk for chunk in live if chunk.chunk_bytes == size and chunk is not holder)
    node, block = holder.payload_address(machine) + 4 * word, target.payload_address(machine)
    process.put(node, stored(process, node, block))
    process.put(block, stored(process, block, 0))
    process.put(block + word, 0x1234567)
    process.put(head_place, node)
    for _ in range(len(row.chunks) - 2):
        one_more(process, count_place, -1)
    report = analyzed(process, tmp_path)
    assert block in states_of(report.heap)[IN_USE]


@each_release
def test_one_bit_of_an_mmapped_chunks_size(case: str, tmp_path: Path) -> None:
    """The header still fits its mapping's start, and what is left of the mapping is what mp_ counts too much."""
    process = built(case)
    victims = process.builder.heap.mmapped
    page = 4096
    victim, bit = next(
        (chunk, bit)
        for chunk in victims
        for bit in (page << shift for shift in range(8))
        if chunk.chunk_bytes & bit and chunk.chunk_bytes - bit > 0
    )
    place = victim.header_address + process.machine.word_bytes
    right = process.get(place)
    process.put(place, right ^ bit)
    report = analyzed(process, tmp_path)
    anomaly = only(report, "mmapped_header_damaged")
    assert (anomaly.word_address, anomaly.observed_word, anomaly.expected_word) == (place, right ^ bit, right)
    assert states_of(report.heap) == process.truth
    assert [damage.kind for damage in report.damages] == [DamageKind.BIT_FLIP]


@each_release
@pytest.mark.parametrize("value", [11, 0xFFFFFFFB])
def test_count_of_mmapped_chunks_that_lies_is_one_damage(case: str, value: int, tmp_path: Path) -> None:
    process = built(case)
    place = process.field("malloc_par", process.mp, "n_mmaps")
    process.put_field("malloc_par", process.mp, "n_mmaps", value)
    report = analyzed(process, tmp_path)
    (damage,) = report.damages
    assert damage.bytes.start == place
    assert damage.place is DamagedPlace.MALLOC_PAR
    assert damage.repair is not None
    assert damage.repair.expected == len(process.builder.heap.mmapped)
    assert states_of(report.heap) == process.truth


@pytest.mark.parametrize("case", ["2.31 x86_64", *SAFE_LINKING, "2.43 x86_64", "2.44 i386", "2.44 aarch64"])
@pytest.mark.parametrize("row", ["first", "last"])
def test_damaged_head_lies_in_the_tcache_structure(case: str, row: str, tmp_path: Path) -> None:
    """The last head of 2.42 and newer is the last usable word of its block: prev_size of the chunk behind it."""
    process = built(case)
    word, entries = process.machine.word_bytes, process.release.offsets("tcache_perthread_struct")["entries"]
    size_word = process.get(process.threads[0].tcache - word)
    in_next_chunk = process.threads[0].tcache - 2 * word + (size_word & ~7)
    lists = 76 if "num_slots" in process.release.offsets("tcache_perthread_struct") else 64
    place = process.threads[0].tcache + entries + word * (lists - 1 if row == "last" else 0)
    assert place < in_next_chunk + word
    process.put(place, (1 << 8 * word) - 1)
    report = analyzed(process, tmp_path)
    assert report.defects == ()
    (damage,) = report.damages
    assert (damage.kind, damage.place) == (DamageKind.OVERWRITE, DamagedPlace.TCACHE_STRUCTURE)
    assert place <= damage.bytes.start < damage.bytes.end <= place + word
