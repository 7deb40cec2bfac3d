"""glibc's tests of what free is given, asked of every block of built processes; and the pointer that words of a stack tell."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import coreheap
from coreheap.corefile import Core
from coreheap.crash import WrongFree, WrongFreeKind
from coreheap.crashes.refusals import REFUSALS, Refusals
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.render.integrity import Soundness, integrity_of
from coreheap.report import Report
from tests.heap_builder import FASTBIN, PAGE, TCACHE
from tests.unit.allocators.built_process import THREADS, BuiltProcess, build_process, release

Built = tuple[BuiltProcess, Core, Report]
MESSAGE = {8: 0x7FFF_F7E0_0000, 4: 0xF7E0_0000}
ABORT_MSG_OFFSET = 0x2000 + 0x1F00
"""Of a word in libc's data that nothing else of the built process uses."""


@pytest.fixture(
    params=[("2.31", "x86_64"), ("2.36", "x86_64"), ("2.44", "x86_64"), ("2.36", "i386"), ("2.41", "aarch64")], ids=str
)
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Built]:
    process = build_process(release(*request.param), THREADS)
    with coreheap.open(process.write(tmp_path), sysroot=tmp_path) as core:
        yield process, core, coreheap.analyze(core)


def refusals_of(core: Core, report: Report, thread: int = 0) -> Refusals:
    assert report.heap is not None
    return Refusals(core, report.heap, thread)


def test_the_caches_of_all_threads_hold_all_cached_blocks(built: Built) -> None:
    process, core, report = built
    found = [refusals_of(core, report, thread).cached_blocks() for thread in range(len(core.threads))]
    assert len(frozenset().union(*found)) == sum(map(len, found)) > 0
    assert frozenset().union(*found) == process.truth[TCACHE]
    own = refusals_of(core, report)
    assert {block for block in process.truth[TCACHE] if own.is_cached(block)} == found[0]


def test_each_fastbin_has_one_head(built: Built) -> None:
    process, core, report = built
    heads = {
        chain.chunks[0].payload_address(process.machine)
        for chain in process.lists
        if chain.state == FASTBIN and chain.chunks
    }
    assert refusals_of(core, report).fastbin_heads() == heads
    assert bool(heads) == process.release.has_fastbins


def test_a_live_block_meets_no_test(built: Built) -> None:
    process, core, report = built
    asked = refusals_of(core, report)
    blocks = sorted(process.truth["in_use"])
    assert len(blocks) > 100
    for text, refusal in REFUSALS.items():
        assert not [hex(block) for block in blocks if refusal.test(asked, block)], text


def test_a_pointer_that_moved_on_meets_the_test_of_its_alignment(built: Built) -> None:
    process, core, report = built
    asked = refusals_of(core, report)
    for block in sorted(process.truth["in_use"])[:200]:
        for offset in (1, process.machine.word_bytes, process.machine.alignment - 1):
            assert asked.is_invalid_pointer(block + offset) == bool(offset % process.machine.alignment)


def test_binned_blocks_are_not_in_use_and_cached_ones_look_so(built: Built) -> None:
    process, core, report = built
    asked = refusals_of(core, report)
    binned = [block for state in ("unsorted_bin", "small_bin", "large_bin") for block in process.truth[state]]
    assert binned
    assert all(asked.is_not_in_use(block) for block in binned)
    assert not any(asked.is_not_in_use(block) for block in process.truth[TCACHE] | process.truth[FASTBIN])


def test_tops_are_where_arenas_end(built: Built) -> None:
    process, core, report = built
    asked = refusals_of(core, report)
    assert asked.all_that_meet(Refusals.is_top) == process.truth["top"]


def report_of(process: BuiltProcess, text: bytes, words: list[int], tmp_path: Path) -> tuple[Report, WrongFree | None]:
    process.signal = 6
    word = process.machine.word_bytes
    message = MESSAGE[word]
    process.builder.memory.add(message, PAGE)[: 4 + len(text)] = struct.pack("<I", PAGE) + text
    libc = next(start for start, _, offset, path in process.files if path.endswith("libc.so.6") and offset == 0)
    process.put(libc + ABORT_MSG_OFFSET, message)
    for number, value in enumerate(words):
        process.put(process.threads[0].stack_pointer + (8 + 3 * number) * word, value)
    with coreheap.open(process.write(tmp_path), sysroot=tmp_path) as core:
        report = coreheap.analyze(core)
    assert report.crash is not None
    return report, report.crash.wrong_free


def built_process(machine: str = "x86_64") -> BuiltProcess:
    return build_process(release("2.36", machine), THREADS)


def cached_of(thread: int, tmp_path: Path) -> list[int]:
    """The blocks in a thread's tcache, in the order of addresses."""
    with coreheap.open(built_process().write(tmp_path), sysroot=tmp_path) as core:
        return sorted(refusals_of(core, coreheap.analyze(core), thread).cached_blocks())


TWICE = b"free(): double free detected in tcache 2\n"


def test_one_cached_block_near_is_plausible(tmp_path: Path) -> None:
    block = cached_of(0, tmp_path)[1]
    report, wrong = report_of(built_process(), TWICE, [block - 16, block], tmp_path)
    assert wrong is not None
    assert (wrong.kind, wrong.address, wrong.confidence) == (WrongFreeKind.FREED_TWICE, block, Confidence.PLAUSIBLE)
    assert (wrong.listed_in, wrong.listed_thread) == (ChunkState.TCACHE, 0)
    # Plausible alone does not change the answer.
    assert integrity_of(report).verdict is Soundness.SOUND


def test_two_cached_blocks_near_are_less(tmp_path: Path) -> None:
    first, second = cached_of(0, tmp_path)[:2]
    _, wrong = report_of(built_process(), TWICE, [first - 16, first, second - 16, second], tmp_path)
    assert wrong is not None
    assert wrong.confidence is Confidence.WEAK
    assert {wrong.address, *wrong.others} == {first, second}


def test_another_threads_cached_block_is_not_it(tmp_path: Path) -> None:
    """The message is about this thread's tcache. Without a block the message itself proves one."""
    others = cached_of(1, tmp_path)
    report, wrong = report_of(built_process(), TWICE, [others[0] - 16, others[0]], tmp_path)
    assert wrong is not None
    assert (wrong.kind, wrong.address) == (WrongFreeKind.UNKNOWN_BLOCK, None)
    assert wrong.confidence is Confidence.STRONG
    assert integrity_of(report).verdict is Soundness.WRONG_FREE


def test_a_live_block_near_is_not_what_was_refused(tmp_path: Path) -> None:
    process = built_process()
    live = sorted(process.truth["in_use"])[5]
    report, wrong = report_of(process, b"free(): invalid pointer\n", [live - 16, live], tmp_path)
    assert wrong is None
    assert integrity_of(report).verdict is Soundness.SOUND


def test_a_place_inside_a_live_block_is_plausible_with_its_header(tmp_path: Path) -> None:
    process = built_process()
    live = sorted(process.truth["in_use"])[5]
    _, wrong = report_of(process, b"free(): invalid pointer\n", [live + 8 - 16, live + 8], tmp_path)
    assert wrong is not None
    assert (wrong.kind, wrong.address) == (WrongFreeKind.INSIDE_LIVE_BLOCK, live + 8)
    assert wrong.confidence is Confidence.PLAUSIBLE
    _, alone = report_of(built_process(), b"free(): invalid pointer\n", [live + 8], tmp_path)
    assert alone is None


def test_other_messages_accuse_nobody(tmp_path: Path) -> None:
    block = cached_of(0, tmp_path)[0]
    for text in (
        b"malloc(): corrupted top size\n",
        b"corrupted size vs. prev_size\n",
        b"corrupted double-linked list\n",
    ):
        assert report_of(built_process(), text, [block - 16, block], tmp_path)[1] is None


def test_the_pointer_in_a_message_of_2_26_is_believed(tmp_path: Path) -> None:
    process = build_process(release("2.23"), THREADS)
    block = sorted(process.truth[FASTBIN])[0]
    live = sorted(process.truth["in_use"])[7]
    text = f"*** Error in `./program': free(): invalid pointer: 0x{live + 24:016x} ***\n".encode()
    _, wrong = report_of(process, text, [block], tmp_path)
    assert wrong is not None
    assert (wrong.kind, wrong.address) == (WrongFreeKind.INSIDE_LIVE_BLOCK, live + 24)
    assert wrong.confidence is Confidence.STRONG
