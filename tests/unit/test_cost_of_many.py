"""What there may be thousands of costs no step each, or one: counted in calls, which are the same on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coreheap.allocators.glibc import identify, locate
from coreheap.allocators.glibc.thread_storage import ThreadStorage
from coreheap.corefile import ElfFile, open_core
from coreheap.corefile.thread_storage import thread_storages
from coreheap.leaks import RootKind
from coreheap.references.ranges import Painter
from tests.conftest import calls_of
from tests.core_builder import CoreBuilder, elf_image
from tests.unit.allocators.built_process import Shape, build_process, release

WORD = 8


def test_a_name_and_an_address_in_a_large_symbol_table(tmp_path: Path) -> None:
    names = {f"name_{number}": 0x1000 + 16 * number for number in range(20_000)}
    (tmp_path / "large").write_bytes(elf_image(symbols=names))
    file = ElfFile.open(tmp_path / "large")
    assert file is not None
    by_name, calls = calls_of(lambda: file.find_symbol("name_19999"))
    assert by_name is not None
    assert by_name.value == names["name_19999"]
    assert calls < 1_000
    by_address, calls = calls_of(lambda: file.symbol_containing(names["name_777"]))
    assert by_address is not None
    assert by_address.name == "name_777"
    assert calls < 1_000


def calls_for_threads(folder: Path, count: int) -> tuple[int, int]:
    """Calls for the static TLS of so many threads, and for a word of theirs that all have."""
    storage = bytearray(count * 0x1000)
    builder = CoreBuilder()
    for number in range(count):
        pointer = number * 0x1000 + 0x800
        storage[pointer - 0x10 : pointer - 0x8] = (0x1234).to_bytes(WORD, "little")
        builder.add_thread(1 + number, stack_pointer=0x100100, thread_pointer=0x100000 + pointer)
    folder.mkdir()
    with open_core(builder.add_segment(0x100000, bytes(storage)).write(folder / "core")) as core:
        _ = core.threads
        found, of_storage = calls_of(lambda: thread_storages(core))
        assert len(found) == count
        held = ThreadStorage(core)
        offsets, of_words = calls_of(lambda: held.offsets_with(-0x400, 0, lambda words: words == np.uint64(0x1234)))
        assert offsets.tolist() == [-0x10]
        return of_storage, of_words


def test_the_storage_of_many_threads(tmp_path: Path) -> None:
    few, many = (calls_for_threads(tmp_path / str(count), count) for count in (100, 3_000))
    # A few calls a thread make the objects; words are read and looked for in columns.
    assert many[0] - few[0] < 30 * 2_900
    assert many[1] < few[1] + 100


def test_single_ranges_are_painted_together() -> None:
    painter = Painter()

    def paint(count: int) -> int:
        for number in range(count):
            painter.add(number * 16, number * 16 + 40, None if number % 3 else RootKind.STACK)
        return calls_of(painter.ranges)[1]

    assert paint(10_000) < 2_000


def test_arenas_that_all_lead_into_one_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hostile: each arena's ring would be followed anew, which with ten thousand of them took three minutes."""
    process = build_process(release("2.36"), Shape(sub_heaps=(1,) * 8, filled_bytes=0x1000))
    others = [arena.state_address for arena in process.arenas if arena.state_address != process.main_arena]
    head, tail = others[-1], others[-2]
    for address in (process.main_arena, *others):
        process.put_field("malloc_state", address, "next", tail if address == head else head)
    walks = 0
    original = locate.ring_from

    def counted(*arguments: object) -> locate.ArenaRing:
        nonlocal walks
        walks += 1
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(locate, "ring_from", counted)
    with open_core(process.write(tmp_path)) as core:
        found = identify.identify(core)
        assert found is not None
        unbounded, walks = walks, 0
        monkeypatch.setattr(identify, "RING_STEPS_LIMIT", 3)
        found = identify.identify(core)
    assert found is not None
    assert 0 < walks < unbounded
