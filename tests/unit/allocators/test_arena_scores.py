"""Scores of many arenas at once are those of each by itself, under every layout and at places that are no arenas."""

from __future__ import annotations

from pathlib import Path

import pytest

import coreheap
from coreheap.allocators.glibc.identify import identify, layouts_for
from coreheap.allocators.glibc.locate import next_arenas
from coreheap.allocators.glibc.records import read_arena
from coreheap.allocators.glibc.scoring import arena_score, arena_scores
from coreheap.errors import MemoryFault
from tests.unit.allocators.built_process import Shape, build_process, release


@pytest.mark.parametrize(
    ("name", "machine"), [("2.36", "x86_64"), ("2.31", "i386"), ("2.43", "x86_64"), ("2.12", "x86_64")]
)
def test_many_are_scored_as_each(tmp_path: Path, name: str, machine: str) -> None:
    process = build_process(release(name, machine), Shape(sub_heaps=(3, 1)), 1)
    with coreheap.open(process.write(tmp_path)) as core:
        found = identify(core)
        assert found is not None
        places = [member + step for member in found.ring.members for step in (0, 8, -16, 0x40)]
        places += [0, 1 << 63, (1 << 64) - 8]
        scored = 0
        for layout in layouts_for(core):
            scores = arena_scores(core.memory, places, layout)
            for place in places:
                try:
                    state = read_arena(core.memory, place, layout)
                except MemoryFault:
                    assert place not in scores
                    continue
                scored += 1
                assert scores[place] == arena_score(core.memory, state, layout)
        assert scored >= len(found.ring.members) * len(layouts_for(core))
        assert all(
            arena_scores(core.memory, found.ring.members, found.layout)[member] > 0.9 for member in found.ring.members
        )


def test_the_ring_is_looked_along_until_a_word_is_missing(tmp_path: Path) -> None:
    process = build_process(release("2.36", "x86_64"), Shape(sub_heaps=(1, 1)), 1)
    with coreheap.open(process.write(tmp_path)) as core:
        found = identify(core)
        assert found is not None
        main, *others = found.ring.members
        assert next_arenas(core.memory, main, found.layout, 5) == [main, *others, main, others[0]]
        assert next_arenas(core.memory, 8, found.layout, 5) == [8]
