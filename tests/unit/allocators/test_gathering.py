"""Words and structures at many addresses: the same as one by one, and what is not saved is never 0 by silence."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coreheap.allocators.glibc.gathering import columns_at, words_at
from coreheap.allocators.glibc.layouts import GENERATIONS, WORD_CLASSES
from coreheap.allocators.glibc.records import Layout, read_tcache
from coreheap.allocators.glibc.tcache import counts_agree
from coreheap.corefile import Core, open_core
from coreheap.corefile.gathering import rows_at
from coreheap.errors import MemoryFault
from tests.core_builder import CoreBuilder

BASE, PAGE = 0x10000, 0x1000
HIGH = (1 << 64) - 2 * PAGE
LAYOUT = Layout(next(row for row in GENERATIONS if row.name == "glibc 2.35-2.41"), WORD_CLASSES["64"])


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """Two runs that touch in memory and not in the file, a page that was not saved, a run near the very end."""
    noise = random.Random(5).randbytes
    builder = CoreBuilder()
    builder.add_segment(BASE + PAGE, noise(PAGE))
    builder.add_segment(BASE, noise(PAGE))
    builder.add_segment(BASE + 2 * PAGE, None, PAGE)
    builder.add_segment(HIGH, noise(PAGE))
    with open_core(builder.write(tmp_path / "core")) as opened:
        yield opened


def test_words_are_those_that_are_read_one_by_one(core: Core) -> None:
    near = [start + step for start in (BASE, BASE + PAGE, BASE + 2 * PAGE, BASE + 3 * PAGE) for step in range(-9, 10)]
    places = [0, 8, *near, HIGH, HIGH + PAGE - 8, HIGH + PAGE - 7, (1 << 64) - 8, (1 << 64) - 1]
    values, saved = words_at(core.memory, np.array(places, np.uint64))
    for place, value, is_saved in zip(places, values.tolist(), saved.tolist(), strict=True):
        in_one_run = any(start <= place and place + 8 <= start + PAGE for start in (BASE, BASE + PAGE, HIGH))
        assert is_saved is in_one_run
        assert value == (core.memory.read_word(place) if is_saved else 0)


def test_rows_of_words_are_those_that_are_read_one_by_one(core: Core) -> None:
    places = [0, *range(BASE - 24, BASE + 3 * PAGE, 40), HIGH + PAGE - 24, HIGH + PAGE - 16, (1 << 64) - 8]
    rows, saved = rows_at(core.memory, np.array(places, np.uint64), 3)
    for place, row, is_saved in zip(places, rows.tolist(), saved.tolist(), strict=True):
        try:
            expected = core.memory.read_words(place, 3).tolist()
        except MemoryFault:
            expected = None
        assert is_saved is (expected is not None)
        assert row == (expected or [0, 0, 0])


def test_structures_are_those_that_are_read_one_by_one(core: Core) -> None:
    assert LAYOUT.tcache is not None
    places = list(range(BASE - 64, BASE + 3 * PAGE, 40))
    (counts, entries), saved = columns_at(
        core.memory, np.array(places, np.uint64), LAYOUT.tcache, ("counts", "entries")
    )
    seen = set()
    for row, place in enumerate(places):
        try:
            state = read_tcache(core.memory, place, LAYOUT)
        except MemoryFault:
            assert not saved[row]
            continue
        assert saved[row]
        assert counts[row].tolist() == state.counts.tolist()
        assert entries[row].tolist() == state.entries.tolist()
        seen.add(place < BASE + PAGE < place + LAYOUT.tcache.byte_count)
    assert seen == {True, False}


def test_an_empty_core_has_no_words(tmp_path: Path) -> None:
    with open_core(CoreBuilder().add_segment(BASE, None, PAGE).write(tmp_path / "core")) as opened:
        values, saved = words_at(opened.memory, np.array([0, BASE], np.uint64))
        assert values.tolist() == [0, 0]
        assert saved.tolist() == [False, False]


@pytest.mark.parametrize(
    ("generation", "counts", "entries", "fits"),
    [
        ("glibc 2.35-2.41", {}, {}, True),
        ("glibc 2.35-2.41", {3: 2}, {3: 0x1230}, True),
        ("glibc 2.35-2.41", {3: 2}, {}, False),
        ("glibc 2.35-2.41", {}, {3: 0x1230}, False),
        ("glibc 2.35-2.41", {3: 2}, {3: 0x1238}, False),
        # Free slots: all of them where a list is empty.
        ("glibc 2.43", dict.fromkeys(range(76), 16), {}, True),
        ("glibc 2.43", dict.fromkeys(range(76), 16) | {3: 9}, {3: 0x1230}, True),
        ("glibc 2.43", dict.fromkeys(range(76), 16) | {3: 9}, {}, False),
        ("glibc 2.43", dict.fromkeys(range(76), 16), {3: 0x1230}, False),
        ("glibc 2.43", {}, {}, False),
    ],
)
def test_counts_go_with_lists(
    generation: str, counts: dict[int, int], entries: dict[int, int], fits: bool, tmp_path: Path
) -> None:
    """malloc/malloc.c, tcache_put and tcache_get: the count of a list changes with its head."""
    layout = Layout(next(row for row in GENERATIONS if row.name == generation), WORD_CLASSES["64"])
    assert layout.tcache is not None
    content = bytearray(layout.tcache.byte_count)
    for name, values in (("counts", counts), ("entries", entries)):
        field = layout.tcache.fields[name]
        for number, value in values.items():
            at = field.offset + number * field.element_bytes
            content[at : at + field.element_bytes] = value.to_bytes(field.element_bytes, "little")
    with open_core(CoreBuilder().add_segment(BASE, bytes(content)).write(tmp_path / "core")) as opened:
        assert counts_agree(layout, read_tcache(opened.memory, BASE, layout)) is fits
