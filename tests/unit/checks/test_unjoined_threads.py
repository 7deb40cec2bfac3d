"""UNJOINED-THREADS by rings of descriptors as nptl/descr.h has them: fires, nearly fires, and what of them may be missing."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

import coreheap
from coreheap.checks import Case, unjoined_threads
from coreheap.checks.unjoined_threads import findings
from coreheap.corefile import thread_lists
from coreheap.corefile.thread_lists import ListedStacks, listed_stacks
from coreheap.evidence import Confidence, Strength
from coreheap.report import Finding, LedgerNode, Severity
from tests.core_builder import CoreBuilder, elf_image

PAGE = 4096
LIBRARY, MAIN, STACKS = 0x7F00_0000_0000, 0x7E00_0000_0000, 0x7D00_0000_0000
USED, USER, CACHE = (LIBRARY + PAGE + 0x100 + 16 * number for number in range(3))
STACK_BYTES, BETWEEN = 32 << 10, 1 << 20
LIST, STACKBLOCK = 0x2C0, 0x690
"""Of glibc 2.36 on x86-64."""
DESCRIPTOR_BEFORE_END = 0x940
PID = 4242


class Process:
    """Rings of descriptors around heads in a library's data; the program's first thread is in the second ring."""

    def __init__(self, unjoined: int, cached: int = 0, running: int = 0) -> None:
        self.data = bytearray(PAGE)
        self.first = bytearray(PAGE)
        self.stacks = [bytearray(STACK_BYTES) for _ in range(unjoined + cached + running)]
        self.running = range(unjoined + cached, unjoined + cached + running)
        for number in range(len(self.stacks)):
            start = STACKS + number * BETWEEN
            self.put(self.descriptor(number) + STACKBLOCK, struct.pack("<QQQ", start, STACK_BYTES, 0))
            self.put(
                self.descriptor(number) + LIST + 16, struct.pack("<i", PID + number if number in self.running else 0)
            )
        self.put(MAIN + LIST + 16, struct.pack("<i", PID))
        used = [self.descriptor(number) for number in (*range(unjoined), *self.running)]
        self.link(USED, used)
        self.link(USER, [MAIN])
        self.link(CACHE, [self.descriptor(number) for number in range(unjoined, unjoined + cached)])
        self.put(CACHE + 16, struct.pack("<Q", cached * STACK_BYTES))

    @staticmethod
    def descriptor(number: int) -> int:
        return STACKS + number * BETWEEN + STACK_BYTES - DESCRIPTOR_BEFORE_END

    def put(self, address: int, content: bytes) -> None:
        for start, block in (
            (LIBRARY + PAGE, self.data),
            (MAIN, self.first),
            *((STACKS + number * BETWEEN, stack) for number, stack in enumerate(self.stacks)),
        ):
            if start <= address < start + len(block):
                block[address - start : address - start + len(content)] = content
                return
        raise KeyError(hex(address))

    def link(self, head: int, descriptors: list[int]) -> None:
        ring = [head, *(descriptor + LIST for descriptor in descriptors)]
        for place, at in enumerate(ring):
            self.put(at, struct.pack("<QQ", ring[(place + 1) % len(ring)], ring[place - 1]))

    def write(self, folder: Path, *, with_data: bool = True, with_first: bool = True) -> Path:
        image = elf_image(total_bytes=2 * PAGE, data_bytes=PAGE)
        builder = CoreBuilder()
        builder.add_segment(LIBRARY, image[:PAGE], flags="r-x")
        builder.add_segment(LIBRARY + PAGE, bytes(self.data) if with_data else None, PAGE)
        builder.add_segment(MAIN, bytes(self.first))
        for number, stack in enumerate(self.stacks):
            builder.add_segment(STACKS + number * BETWEEN, bytes(stack))
        builder.add_file_mapping(LIBRARY, LIBRARY + PAGE, 0, "/opt/lib.so")
        builder.add_file_mapping(LIBRARY + PAGE, LIBRARY + 2 * PAGE, PAGE, "/opt/lib.so")
        if with_first:
            builder.add_thread(PID, thread_pointer=MAIN, stack_pointer=MAIN + 8)
        for number in self.running:
            pointer = self.descriptor(number)
            builder.add_thread(PID + number, thread_pointer=pointer, stack_pointer=pointer - 64)
        return builder.write(folder / "core")


@pytest.fixture(autouse=True)
def small_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unjoined_threads, "LEAST_BYTES", 5 * STACK_BYTES)


def asked(path: Path) -> tuple[ListedStacks | None, tuple[Finding, ...]]:
    with coreheap.open(path) as core:
        return listed_stacks(core), findings(Case(core, None, LedgerNode("address_space", 0), core.gaps))


def test_fires_with_no_second_thread(tmp_path: Path) -> None:
    listed, found = asked(Process(unjoined=6, cached=2).write(tmp_path))
    assert listed is not None
    assert [stack.start for stack in listed.unjoined] == [STACKS + number * BETWEEN for number in range(6)]
    assert listed.descriptors == tuple(Process.descriptor(number) for number in range(6))
    assert len(listed.cached) == 2
    (finding,) = found
    assert (finding.severity, finding.confidence) == (Severity.WARNING, Confidence.CERTAIN)
    assert finding.quantity("threads") == 6
    assert finding.quantity("stack_bytes") == 6 * STACK_BYTES
    assert finding.quantity("ids_in_memory") == 0


def test_the_first_thread_may_have_ended_before_the_others(tmp_path: Path) -> None:
    listed, (finding,) = asked(Process(unjoined=6, cached=2, running=1).write(tmp_path, with_first=False))
    assert listed is not None
    assert (len(listed.unjoined), len(listed.cached), listed.strength) == (6, 2, Strength.PROOF)
    assert finding.confidence is Confidence.CERTAIN


def test_ids_that_are_kept_may_be_joined_later(tmp_path: Path) -> None:
    process = Process(unjoined=6)
    for number in range(6):
        process.put(MAIN + 0x800 + 8 * number, struct.pack("<Q", Process.descriptor(number)))
    _, (finding,) = asked(process.write(tmp_path))
    assert finding.quantity("ids_in_memory") == 6
    assert (finding.severity, finding.confidence) == (Severity.INFO, Confidence.STRONG)


@pytest.mark.parametrize(("unjoined", "cached", "running"), [(5, 0, 0), (0, 40, 0), (0, 40, 3), (0, 0, 12)])
def test_nearly_fires(tmp_path: Path, unjoined: int, cached: int, running: int) -> None:
    """As much as glibc would keep; a cache of any size, as a fork leaves it; threads that run."""
    listed, found = asked(Process(unjoined, cached, running).write(tmp_path))
    assert listed is not None
    assert (len(listed.unjoined), len(listed.cached)) == (unjoined, cached)
    assert found == ()


def test_threads_that_did_not_end_and_are_not_in_the_core_are_not_accused(tmp_path: Path) -> None:
    process = Process(unjoined=8)
    for number in range(8):
        process.put(Process.descriptor(number) + LIST + 16, struct.pack("<i", PID + 1 + number))
    listed, found = asked(process.write(tmp_path))
    assert listed is not None
    assert len(listed.vanished) == 8
    assert found == ()


def test_without_the_librarys_data_nothing_is_said(tmp_path: Path) -> None:
    assert asked(Process(unjoined=8).write(tmp_path, with_data=False)) == (None, ())


def test_without_the_count_of_what_is_cached_it_is_less_sure(tmp_path: Path) -> None:
    process = Process(unjoined=8)
    process.put(CACHE, struct.pack("<QQ", 0, 0))
    listed, (finding,) = asked(process.write(tmp_path))
    assert listed is not None
    assert listed.strength is Strength.SOLID
    assert finding.confidence is Confidence.STRONG


@pytest.mark.parametrize("at", [0, 8])
def test_a_ring_that_does_not_close_is_none(tmp_path: Path, at: int) -> None:
    process = Process(unjoined=8)
    process.put(Process.descriptor(3) + LIST + at, struct.pack("<Q", Process.descriptor(3) + LIST))
    listed, found = asked(process.write(tmp_path))
    assert listed is None or listed.unjoined == ()
    assert found == ()


def test_rings_without_end_cost_no_more_than_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_lists, "LINKS_LIMIT", 16)
    listed, found = asked(Process(unjoined=40, cached=3).write(tmp_path))
    assert listed is None or listed.unjoined == ()
    assert found == ()


def test_sizes_that_no_number_of_the_machine_holds(tmp_path: Path) -> None:
    """Blocks of which each claims most of the address space, and a descriptor at its very beginning."""
    process = Process(unjoined=8)
    for number in range(8):
        place = process.descriptor(number) + STACKBLOCK
        process.put(place, struct.pack("<QQQ", 1 << 40, (1 << 64) - (1 << 41), 0))
    listed, found = asked(process.write(tmp_path))
    assert listed is None or listed.unjoined == ()
    assert found == ()
