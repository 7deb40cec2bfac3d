"""malloc's own structures, damaged one word at a time: the word is named, with what it should hold, and what glibc says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import coreheap
from coreheap.allocators.glibc.layouts import GENERATIONS
from coreheap.allocators.glibc.messages import MESSAGES, RELEASES, RULES, Said, messages_for
from coreheap.evidence import Anomaly, Confidence
from coreheap.report import Report
from tests.heap_builder import IN_USE, LARGE_BIN, PAGE, SMALL_BIN, TCACHE
from tests.unit.allocators.built_process import BuiltProcess, Shape, build_process, release, states_of

CASES = ("2.22 x86_64", "2.31 x86_64", "2.36 x86_64", "2.36 i386", "2.41 aarch64", "2.44 x86_64", "2.44 i386")
each_release = pytest.mark.parametrize("case", CASES)


def built(case: str) -> BuiltProcess:
    name, machine = case.split()
    return build_process(release(name, machine), Shape(sub_heaps=(3, 1), mmapped_leads=(0, 0, 0)))


def analyzed(process: BuiltProcess, folder: Path) -> Report:
    with coreheap.open(process.write(folder)) as core:
        report = coreheap.analyze(core, coreheap.AnalysisOptions(leaks=False))
    assert report.defects == ()
    return report


def only(report: Report, code: str) -> Anomaly:
    """The one anomaly, which is of a code."""
    assert [anomaly.code for anomaly in report.anomalies] == [code]
    assert report.anomaly_count == 1
    return report.anomalies[0]


def bins_of(process: BuiltProcess, state: str) -> tuple[int, list[int]]:
    """Number and chunks (header addresses) of the main arena's longest bin of a kind."""
    rows = [row for row in process.lists if row.state == state and len(row.chunks) and row.sentinel]
    in_main = [
        row
        for row in rows
        if process.main_arena <= row.sentinel < process.main_arena + process.release.byte_count("malloc_state")
    ]
    row = max(in_main, key=lambda row: len(row.chunks))
    return row.number, [chunk.header_address for chunk in row.chunks]


@each_release
@pytest.mark.parametrize("state", [SMALL_BIN, LARGE_BIN])
def test_bit_of_a_bin_that_holds_chunks(case: str, state: str, tmp_path: Path) -> None:
    process = built(case)
    number, _ = bins_of(process, state)
    place = process.field("malloc_state", process.main_arena, "binmap") + 4 * (number // 32)
    before = process.builder.memory.get(place, 4)
    assert before >> number % 32 & 1
    process.put(place, before & ~(1 << number % 32), 4)
    anomaly = only(analyzed(process, tmp_path), "binmap_bit_missing")
    assert (anomaly.word_address, anomaly.expected_word) == (place, before)
    assert anomaly.message is None


@each_release
def test_chunk_that_was_taken_out_of_its_bin(case: str, tmp_path: Path) -> None:
    """Its neighbours no longer lead to it: a free chunk on no list."""
    process = built(case)
    word = process.machine.word_bytes
    _, chunks = bins_of(process, SMALL_BIN)
    victim = chunks[0]
    behind, before = process.get(victim + 2 * word), process.get(victim + 3 * word)
    process.put(before + 2 * word, behind)
    process.put(behind + 3 * word, before)
    anomaly = only(analyzed(process, tmp_path), "free_unlisted")
    assert anomaly.header_address == victim
    assert anomaly.message == "double free or corruption (!prev)"
    assert anomaly.confidence is Confidence.STRONG


@each_release
@pytest.mark.parametrize("in_arena", [0, 1])
def test_a_locked_arena_may_have_such_a_chunk_for_a_moment(case: str, in_arena: int, tmp_path: Path) -> None:
    process = built(case)
    word = process.machine.word_bytes
    _, chunks = bins_of(process, SMALL_BIN)
    behind, before = process.get(chunks[0] + 2 * word), process.get(chunks[0] + 3 * word)
    process.put(before + 2 * word, behind)
    process.put(behind + 3 * word, before)
    process.put_field("malloc_state", process.arenas[in_arena].state_address, "mutex", 1)
    anomaly = only(analyzed(process, tmp_path), "free_unlisted")
    assert anomaly.arena_locked is (in_arena == 0)
    assert anomaly.confidence is (Confidence.STRONG if in_arena else Confidence.PLAUSIBLE)


@each_release
def test_a_link_that_malloc_never_stores_is_damage_in_a_locked_arena_too(case: str, tmp_path: Path) -> None:
    process = built(case)
    _, chunks = bins_of(process, SMALL_BIN)
    place = chunks[0] + 3 * process.machine.word_bytes
    right = process.get(place)
    process.put(place, 0x41414141)
    process.put_field("malloc_state", process.main_arena, "mutex", 1)
    anomaly = only(analyzed(process, tmp_path), "list_broken_back_link")
    assert (anomaly.word_address, anomaly.observed_word, anomaly.expected_word) == (place, 0x41414141, right)
    assert anomaly.arena_locked
    assert anomaly.confidence is Confidence.CERTAIN
    assert anomaly.message == "malloc(): smallbin double linked list corrupted"


Damage = Callable[[BuiltProcess], tuple[int, int, int | None]]
"""Damages a process; gives the word's address, what it holds, and what it should hold where that is told."""


def field_of_arena(name: str, value: int, wanted: int | None = None, number: int = 0) -> Damage:
    def damage(process: BuiltProcess) -> tuple[int, int, int | None]:
        state = process.arenas[number].state_address
        process.put_field("malloc_state", state, name, value)
        return process.field("malloc_state", state, name), value, wanted

    return damage


def misaligned_remainder(process: BuiltProcess) -> tuple[int, int, int | None]:
    value = process.arenas[0].segments[0].chunks[2].header_address + 4
    return field_of_arena("last_remainder", value)(process)


def field_of_mp(name: str, value: int) -> Damage:
    def damage(process: BuiltProcess) -> tuple[int, int, int | None]:
        process.put_field("malloc_par", process.mp, name, value)
        return process.field("malloc_par", process.mp, name), value, None

    return damage


def field_of_heap(name: str, value: int, wanted: Callable[[BuiltProcess], int | None], heap: int) -> Damage:
    def damage(process: BuiltProcess) -> tuple[int, int, int | None]:
        address = process.arenas[1].sub_heaps[heap]
        right = wanted(process)
        process.put_field("heap_info", address, name, value)
        return process.field("heap_info", address, name), value, right

    return damage


def owner(process: BuiltProcess) -> int:
    return process.arenas[1].state_address


WORDS: dict[str, tuple[str, Damage]] = {
    "mutex": ("malloc_state_damaged", field_of_arena("mutex", 0x4141)),
    "flags": ("malloc_state_damaged", field_of_arena("flags", 0x4100 | 2, 2, 1)),
    "next_free": ("malloc_state_damaged", field_of_arena("next_free", 0x41414140)),
    "max_system_mem": ("system_mem_damaged", field_of_arena("max_system_mem", 16)),
    "last_remainder": ("last_remainder_damaged", misaligned_remainder),
    "no_dyn_threshold": ("malloc_par_damaged", field_of_mp("no_dyn_threshold", 77)),
    "ar_ptr": ("sub_heap_header_damaged", field_of_heap("ar_ptr", 0x41414141, owner, 0)),
    "prev": ("sub_heap_header_damaged", field_of_heap("prev", 0x41414141, lambda process: 0, 0)),
    "prev of a later heap": ("sub_heap_header_damaged", field_of_heap("prev", 0x41414141, lambda process: None, 2)),
}


@each_release
@pytest.mark.parametrize("name", WORDS)
def test_one_damaged_word_is_one_anomaly_and_costs_no_chunk(case: str, name: str, tmp_path: Path) -> None:
    process = built(case)
    code, damage = WORDS[name]
    place, observed, wanted = damage(process)
    report = analyzed(process, tmp_path)
    anomaly = only(report, code)
    assert (anomaly.word_address, anomaly.observed_word, anomaly.expected_word) == (place, observed, wanted)
    assert states_of(report.heap) == process.truth


@each_release
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("target", ["between chunks", "nowhere"])
def test_top_is_found_again_where_its_pointer_is_wrong(case: str, number: int, target: str, tmp_path: Path) -> None:
    process = built(case)
    arena = process.arenas[number]
    moved = arena.top + 4 * process.machine.alignment
    value = moved if target == "between chunks" else 0x41414140
    process.put_field("malloc_state", arena.state_address, "top", value)
    report = analyzed(process, tmp_path)
    anomaly = only(report, "top_damaged")
    assert anomaly.word_address == process.field("malloc_state", arena.state_address, "top")
    assert (anomaly.observed_word, anomaly.expected_word) == (value, arena.top)
    assert states_of(report.heap) == process.truth


@each_release
def test_ring_of_arenas_that_leads_nowhere(case: str, tmp_path: Path) -> None:
    process = built(case)
    state = process.arenas[1].state_address
    place = process.field("malloc_state", state, "next")
    process.put(place, 0x41414141)
    report = analyzed(process, tmp_path)
    (anomaly,) = [anomaly for anomaly in report.anomalies if anomaly.code == "arena_ring_damaged"]
    assert (anomaly.word_address, anomaly.observed_word) == (place, 0x41414141)


@each_release
@pytest.mark.parametrize("words", [0, 1])
def test_mmapped_chunk_whose_header_is_damaged_is_found_by_what_mp_counts(
    case: str, words: int, tmp_path: Path
) -> None:
    process = built(case)
    victim = process.builder.heap.mmapped[1]
    place = victim.header_address + words * process.machine.word_bytes
    right = process.get(place)
    process.put(place, 0x41414141)
    # Something must lead to the block, or be right in the header: here a word of another block does.
    own = {chunk.header_address for chunk in process.caches}
    in_use = process.arenas[0].segments[0].of_state(IN_USE)
    holder = next(chunk for chunk in in_use if chunk.header_address not in own)
    process.put(holder.payload_address(process.machine), victim.payload_address(process.machine))
    report = analyzed(process, tmp_path)
    anomaly = only(report, "mmapped_header_damaged")
    assert (anomaly.word_address, anomaly.observed_word, anomaly.expected_word) == (place, 0x41414141, right)
    assert anomaly.message == "munmap_chunk(): invalid pointer"
    assert states_of(report.heap) == process.truth


@pytest.mark.parametrize("case", ["2.31 x86_64", "2.36 x86_64", "2.36 i386", "2.44 x86_64"])
def test_tcache_list_that_lost_its_head(case: str, tmp_path: Path) -> None:
    process = built(case)
    word = process.machine.word_bytes
    entries = process.release.offsets("tcache_perthread_struct")["entries"]
    cache, number = next(
        (thread.tcache, row.number)
        for row in process.lists
        for thread in process.threads
        if row.state == TCACHE and row.chunks and process.get(thread.tcache + entries + word * row.number) == row.head
    )
    process.put(cache + entries + word * number, 0)
    report = analyzed(process, tmp_path)
    # From 2.30 on malloc follows the null head; from 2.42 on it looks at the head first.
    anomaly = only(report, "tcache_entry_without_count" if "2.44" in case else "tcache_count_too_high")
    offsets = process.release.offsets("tcache_perthread_struct")
    counts = offsets.get("counts", offsets.get("num_slots", 0))
    assert anomaly.word_address == cache + counts + 2 * number


@pytest.mark.parametrize("case", ["2.44 x86_64", "2.44 i386"])
@pytest.mark.parametrize("value", [0, 3, 0x4141])
def test_count_of_slots_that_lies_is_told_by_the_tcaches(case: str, value: int, tmp_path: Path) -> None:
    """One changed word of mp_ is one anomaly, not one for each list."""
    process = built(case)
    place = process.field("malloc_par", process.mp, "tcache_count")
    right = process.get(place)
    process.put(place, value)
    report = analyzed(process, tmp_path)
    anomaly = only(report, "malloc_par_damaged")
    assert (anomaly.word_address, anomaly.observed_word, anomaly.expected_word) == (place, value, right)
    assert states_of(report.heap) == process.truth


@pytest.mark.parametrize("case", ["2.31 x86_64", "2.36 x86_64", "2.36 i386", "2.44 x86_64"])
def test_key_of_a_cached_block_that_is_not_malloc_s(case: str, tmp_path: Path) -> None:
    """Learned from the blocks themselves from 2.34 on: no symbol tells it here."""
    process = built(case)
    row = max((row for row in process.lists if row.state == TCACHE), key=lambda row: len(row.chunks))
    place = row.chunks[0].payload_address(process.machine) + process.machine.word_bytes
    right = process.get(place)
    process.put(place, 0x41414141)
    anomaly = only(analyzed(process, tmp_path), "list_wrong_key")
    assert (anomaly.word_address, anomaly.observed_word, anomaly.expected_word) == (place, 0x41414141, right)
    assert anomaly.header_address == row.chunks[0].header_address


@each_release
def test_end_marker_of_a_retired_sub_heap(case: str, tmp_path: Path) -> None:
    process = built(case)
    segment = process.arenas[1].segments[0]
    end = process.arenas[1].sub_heaps[0] + process.get(
        process.field("heap_info", process.arenas[1].sub_heaps[0], "size")
    )
    assert segment.start < end
    marker = end - process.machine.alignment
    assert process.get(marker + process.machine.word_bytes) == 1
    process.put(marker, PAGE)
    anomaly = only(analyzed(process, tmp_path), "fencepost_damaged")
    assert anomaly.word_address == marker
    assert anomaly.message == "assertion failed in heap_trim"


# Messages


def said(code: str, place: str, version: str) -> str | None:
    (generation,) = [row for row in GENERATIONS if version in row.releases]
    return next((one.text for one in messages_for(code, place, generation, version) if not one.is_later), None)


@pytest.mark.parametrize(
    ("code", "place", "version", "text"),
    [
        ("list_broken_back_link", "unsorted_bin", "2.27", "corrupted double-linked list"),
        ("list_broken_back_link", "unsorted_bin", "2.28", "malloc(): corrupted unsorted chunks 3"),
        ("list_broken_back_link", "unsorted_bin", "2.29", "malloc(): unsorted double linked list corrupted"),
        ("list_broken_back_link", "small_bin", "2.44", "malloc(): smallbin double linked list corrupted"),
        ("list_broken_size_ring", "large_bin", "2.20", None),
        ("list_broken_size_ring", "large_bin", "2.21", "corrupted double-linked list (not small)"),
        ("list_misaligned", "tcache", "2.31", None),
        ("list_misaligned", "tcache", "2.32", "malloc(): unaligned tcache chunk detected"),
        ("list_misaligned", "fastbin", "2.31", "malloc(): memory corruption (fast)"),
        ("list_misaligned", "fastbin", "2.42", "malloc(): unaligned fastbin chunk detected"),
        ("list_wrong_size", "fastbin", "2.42", "malloc(): memory corruption (fast)"),
        ("list_wrong_size", "tcache", "2.42", None),
        ("prev_size_mismatch", "large_bin", "2.25", None),
        ("prev_size_mismatch", "large_bin", "2.26", "corrupted size vs. prev_size"),
        ("prev_size_mismatch", "in_use", "2.29", "corrupted size vs. prev_size while consolidating"),
        ("bin_head_damaged", "small_bin", "2.41", "free(): chunks in smallbin corrupted"),
        ("bin_head_damaged", "small_bin", "2.40", "malloc(): smallbin double linked list corrupted"),
        ("list_looks_in_use", "unsorted_bin", "2.29", "malloc(): invalid next->prev_inuse (unsorted)"),
        ("list_looks_in_use", "small_bin", "2.44", None),
        ("binmap_bit_missing", "", "2.44", None),
    ],
)
def test_message_of_a_release(code: str, place: str, version: str, text: str | None) -> None:
    assert said(code, place, version) == text


def test_every_text_is_in_releases_that_exist() -> None:
    rows: list[Said] = [row for places in MESSAGES.values() for texts in places.values() for row in texts]
    assert len(rows) > 40
    for row in rows:
        assert RELEASES.index(row.first) <= RELEASES.index(row.last)
    assert set(MESSAGES) <= set(RULES)
    assert {name.partition("-")[0] for row in GENERATIONS for name in row.releases} == set(RELEASES)
