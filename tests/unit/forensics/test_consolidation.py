"""A fastbin without its head: its chunks are found by their links, where glibc's message says that it was joining one."""

from __future__ import annotations

from pathlib import Path

import pytest

import coreheap
from coreheap.damage import Damage
from coreheap.forensics import find_interrupted_consolidation
from tests.heap_builder import FASTBIN, BuiltList
from tests.unit.allocators.built_process import THREADS, BuiltProcess, build_process, release

MESSAGE = "malloc_consolidate(): unaligned fastbin chunk detected"


def without_head(process: BuiltProcess) -> BuiltList:
    """The longest fastbin of the process, taken off its head."""
    longest = max((chain for chain in process.lists if chain.state == FASTBIN), key=lambda chain: len(chain.chunks))
    word = process.machine.word_bytes
    for arena in process.arenas:
        first = process.field("malloc_state", arena.state_address, "fastbinsY")
        for place in range(first, first + 10 * word, word):
            if process.get(place) == longest.chunks[0].header_address:
                process.put(place, 0)
                return longest
    raise AssertionError("no arena has the list")


def found_in(process: BuiltProcess, folder: Path, message: str | None = MESSAGE) -> Damage | None:
    with coreheap.open(process.write(folder), sysroot=folder) as core:
        heap = coreheap.analyze(core).heap
        assert heap is not None
        return find_interrupted_consolidation(core, heap, message)


@pytest.mark.parametrize("machine", ["x86_64", "i386", "aarch64"])
def test_what_was_on_the_list_is_named_in_its_order(machine: str, tmp_path: Path) -> None:
    process = build_process(release("2.36", machine), THREADS)
    chain = without_head(process)
    assert len(chain.chunks) > 2
    damage = found_in(process, tmp_path)
    assert damage is not None
    assert damage.listed_blocks == tuple(chunk.payload_address(process.machine) for chunk in chain.chunks)[:16]
    assert damage.message == MESSAGE


def test_without_glibcs_message_nothing_is_said(tmp_path: Path) -> None:
    process = build_process(release("2.36"), THREADS)
    without_head(process)
    for message in (None, "malloc(): corrupted top size", "free(): invalid pointer"):
        assert found_in(process, tmp_path, message) is None


def test_a_sound_heap_has_no_such_list(tmp_path: Path) -> None:
    assert found_in(build_process(release("2.36"), THREADS), tmp_path) is None


def test_links_that_are_not_mangled_are_none_of_that_message(tmp_path: Path) -> None:
    """The message came with mangled links (2.32)."""
    process = build_process(release("2.31"), THREADS)
    without_head(process)
    assert found_in(process, tmp_path) is None
