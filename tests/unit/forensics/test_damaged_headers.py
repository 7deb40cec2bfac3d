"""A header that was hit: the walk goes on at the true boundary, and what is said of the write is what was done.

Built heaps, whose every chunk is known. ``referenced`` gives most blocks a pointer, as a program has them: then pointers tell
where chunks start, and an old header in a payload does not win.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

import coreheap
from coreheap.damage import Damage, DamagedPlace, DamageKind, PatternKind
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.report import Report, Severity
from tests.heap_builder import IN_USE, BuiltChunk
from tests.unit.allocators.built_process import BuiltProcess, Shape, build_process, release, states_of

WORD = 8
LEAST_BYTES = 0x60


def built() -> BuiltProcess:
    return build_process(release("2.36"), Shape(sub_heaps=(2,)))


def analyze(process: BuiltProcess, folder: Path) -> Report:
    with coreheap.open(process.write(folder)) as core:
        return coreheap.analyze(core)


def blocks(process: BuiltProcess) -> list[BuiltChunk]:
    return [chunk for arena in process.arenas for part in arena.segments for chunk in part.of_state(IN_USE)]


def referenced(process: BuiltProcess) -> BuiltChunk:
    """Put pointers to all live blocks into the largest one, which is returned."""
    table = max(blocks(process), key=lambda chunk: chunk.chunk_bytes)
    place = table.payload_address(process.machine)
    end = place + table.chunk_bytes - 2 * WORD
    for chunk in blocks(process):
        if place + WORD > end:
            break
        process.put(place, chunk.payload_address(process.machine))
        place += WORD
    return table


def pair(process: BuiltProcess, table: BuiltChunk, least: int = LEAST_BYTES) -> tuple[BuiltChunk, BuiltChunk]:
    """Two live blocks side by side of the main arena's first segment, the second of at least so many bytes."""
    chunks = process.arenas[0].segments[0].chunks
    for first, second in pairwise(chunks[12:]):
        both = first.state == second.state == IN_USE and table not in (first, second)
        if both and second.chunk_bytes >= least and first.chunk_bytes >= 0x40:
            return first, second
    raise AssertionError("the built heap has no such pair")


def only_damage(report: Report) -> Damage:
    assert report.defects == ()
    assert len(report.damages) == report.damage_count == 1
    return report.damages[0]


def test_a_sound_heap_has_no_damage(tmp_path: Path) -> None:
    process = built()
    referenced(process)
    report = analyze(process, tmp_path)
    assert (report.anomalies, report.damages, report.damage_count) == ((), (), 0)


def test_one_zero_behind_a_block_is_an_overflow_to_the_byte(tmp_path: Path) -> None:
    process = built()
    first, second = pair(process, referenced(process), 0x110)
    place = second.header_address + WORD
    size_word = process.get(place)
    process.put(place, size_word & ~0xFF)
    report = analyze(process, tmp_path)
    damage = only_damage(report)
    assert (damage.kind, damage.place) == (DamageKind.OVERFLOW, DamagedPlace.CHUNK_HEADER)
    assert (damage.bytes.start, damage.bytes.end) == (place, place + 1)
    assert damage.culprit is not None
    assert damage.victim is not None
    assert damage.culprit.header_address == first.header_address
    assert damage.culprit.state is ChunkState.IN_USE
    assert damage.victim.header_address == second.header_address
    assert damage.repair is not None
    assert damage.repair.expected == size_word
    assert damage.lost_bytes == 0
    assert states_of(report.heap) == process.truth
    (finding,) = [finding for finding in report.findings if finding.code == "CORRUPTION-OVERFLOW"]
    assert finding.severity is Severity.ERROR
    assert finding.quantity("address") == place
    assert finding.quantity("culprit_address") == first.payload_address(process.machine)


@pytest.mark.parametrize("bit", [1, 2, 4, 9, 20, 40, 63])
def test_one_flipped_bit_is_put_back(bit: int, tmp_path: Path) -> None:
    process = built()
    _, second = pair(process, referenced(process))
    place = second.header_address + WORD
    size_word = process.get(place)
    process.put(place, size_word ^ 1 << bit)
    report = analyze(process, tmp_path)
    damage = only_damage(report)
    assert damage.kind is DamageKind.BIT_FLIP
    assert damage.repair is not None
    assert (damage.repair.bit, damage.repair.expected) == (bit, size_word)
    assert damage.bytes.start == place + bit // 8
    assert damage.culprit is None
    assert states_of(report.heap) == process.truth


def test_text_over_a_header_begins_in_the_block_before_and_goes_on(tmp_path: Path) -> None:
    process = built()
    first, second = pair(process, referenced(process))
    place = second.header_address + WORD
    text = b"the quick brown fox jumps over the lazy dog"
    process.builder.memory.write(place - 20, text)
    report = analyze(process, tmp_path)
    damage = only_damage(report)
    assert damage.kind is DamageKind.OVERFLOW
    assert damage.bytes.start == place
    assert place - 20 + len(text) <= damage.bytes.end <= place - 20 + len(text) + 4
    assert damage.pattern is not None
    assert damage.pattern.kind is PatternKind.TEXT
    assert damage.culprit is not None
    assert damage.culprit.header_address == first.header_address
    assert damage.confidence is not Confidence.CERTAIN
    lost = process.truth[IN_USE] - states_of(report.heap)[IN_USE]
    assert lost == {second.payload_address(process.machine)}
    assert damage.lost_bytes == second.chunk_bytes


def test_two_numbers_that_begin_with_the_header_came_from_behind(tmp_path: Path) -> None:
    process = built()
    _, second = pair(process, referenced(process))
    process.put(second.header_address, 5)
    process.put(second.header_address + WORD, 3)
    damage = only_damage(analyze(process, tmp_path))
    assert damage.kind is DamageKind.UNDERFLOW
    assert damage.culprit == damage.victim
    assert damage.bytes.start == second.header_address + WORD
    assert damage.confidence.rank <= Confidence.PLAUSIBLE.rank


def test_an_old_header_in_a_payload_does_not_win(tmp_path: Path) -> None:
    """Its chain leads to the real boundary, and it is the first one behind the damage."""
    process = built()
    _, second = pair(process, referenced(process), 0xA0)
    stale = second.header_address + 0x40
    process.put(stale + WORD, (second.chunk_bytes - 0x40) | 1)
    process.put(second.header_address + WORD, 0x1122334455667788)
    report = analyze(process, tmp_path)
    lost = process.truth[IN_USE] - states_of(report.heap)[IN_USE]
    gained = states_of(report.heap)[IN_USE] - process.truth[IN_USE]
    assert (lost, gained) == ({second.payload_address(process.machine)}, set())
    damage = only_damage(report)
    assert damage.lost_bytes == second.chunk_bytes


def test_damage_in_several_places_is_as_many_damages(tmp_path: Path) -> None:
    process = built()
    table = referenced(process)
    victims = [
        second
        for first, second in pairwise(blocks(process))
        if first.header_address + first.chunk_bytes == second.header_address
        and table not in (first, second)
        and second.chunk_bytes >= LEAST_BYTES
    ][4:40:9]
    for victim in victims:
        place = victim.header_address + WORD
        process.put(place, process.get(place) ^ 1 << 50)
    report = analyze(process, tmp_path)
    hit = {victim.header_address for victim in victims}
    assert len(hit) > 2
    assert {damage.victim.header_address for damage in report.damages if damage.victim} == hit
    assert {damage.kind for damage in report.damages} == {DamageKind.BIT_FLIP}
    assert states_of(report.heap) == process.truth


def test_the_first_chunk_of_a_heap(tmp_path: Path) -> None:
    process = built()
    referenced(process)
    first = process.arenas[1].segments[-1].chunks[0]
    place = first.header_address + WORD
    process.put(place, process.get(place) ^ 1 << 33)
    report = analyze(process, tmp_path)
    damage = only_damage(report)
    assert damage.kind is DamageKind.BIT_FLIP
    assert damage.bytes.start == place + 4
    assert states_of(report.heap) == process.truth


def test_what_is_wrong_is_never_shown(tmp_path: Path) -> None:
    """Evidence, steps and subjects are of addresses and kinds; the foreign bytes are not among them."""
    process = built()
    _, second = pair(process, referenced(process))
    place = second.header_address + WORD
    process.builder.memory.write(place - 24, b"SECRETSECRETSECRETSECRETSECRET!!")
    report = analyze(process, tmp_path)
    for finding in report.findings:
        texts = [
            finding.subject,
            *finding.next_steps,
            *finding.weakened_by,
            *(fact.statement for fact in finding.evidence),
        ]
        texts += [str(quantity.value) for quantity in finding.quantities]
        assert not [text for text in texts if "SECRET" in text or "5443455243455" in text]
