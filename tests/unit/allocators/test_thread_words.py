"""thread_arena and tcache of each thread: what libc says of them, what the threads' words look like, and who wins.

Real cores, some with words of the threads' storage changed; the truth is what each thread recorded of itself. Knows
nothing of how the product joins its ways.
"""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import coreheap
from coreheap.allocators.glibc import ways
from coreheap.allocators.glibc.identify import Identification, identify
from coreheap.allocators.glibc.tcache import wanted_tcache
from coreheap.allocators.glibc.thread_storage import ThreadStorage, Wanted
from coreheap.allocators.glibc.threads import copy_of, find_thread_words, wanted_arena
from coreheap.corefile import Core, open_core
from coreheap.evidence import Confidence, Evidence, Strength
from coreheap.report import Report
from tests.core_builder import CoreBuilder
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.truth import Truth, load_truth
from tests.unit.allocators.ways.libraries import NATIVE, library

STATES = ("symbols", "stripped", "core_alone")
WORD = 8


def opened(core: Path, state: str, folder: Path) -> Core:
    """The core with libc's file and its debug file, with libc's file, with nothing."""
    empty = folder / "empty"
    empty.mkdir(exist_ok=True)
    if state == "core_alone":
        return open_core(core, sysroot=empty)
    library(NATIVE)
    return open_core(core, debug_directories=[Path("/usr/lib/debug") if state == "symbols" else empty])


def changed(core: Path, words: Mapping[int, int], folder: Path) -> Path:
    """A copy of a core with other words at some addresses."""
    copy = folder / "changed.core"
    shutil.copyfile(core, copy)
    with open_core(core) as original, copy.open("r+b") as file:
        memory = original.memory
        for address, value in words.items():
            run = int(np.searchsorted(memory.run_start, np.uint64(address), side="right")) - 1
            assert address + WORD <= int(memory.run_end[run])
            file.seek(address - int(memory.run_start[run]) + int(memory.run_file_offset[run]))
            file.write(value.to_bytes(WORD, "little"))
    return copy


def pointers_of(core: Path) -> dict[int, int]:
    """lwp -> thread pointer."""
    with open_core(core) as original:
        return {thread.lwp: thread.thread_pointer or 0 for thread in original.threads}


def offsets_in(core: Path, truth: Truth) -> tuple[int, int]:
    """(thread_arena, tcache) relative to the thread pointer, by looking for what the first thread said of itself."""
    thread = next(thread for thread in truth.live_threads if thread.arena_address)
    pointer = pointers_of(core)[thread.tid]
    with open_core(core) as original:
        words = original.memory.read_words(pointer - 0x200, 0x200 // WORD).tolist()
    assert words.count(thread.arena_address) == words.count(thread.tcache_address) == 1
    return tuple(words.index(address) * WORD - 0x200 for address in (thread.arena_address, thread.tcache_address))


def identified(core: Core) -> Identification:
    found = identify(core)
    assert found is not None
    return found


def said_by_threads(core: Core, truth: Truth) -> tuple[list[int], list[int]]:
    """(thread_arena, tcache) of the core's threads by the process's own account, 0 for the main arena's threads."""
    by_lwp = {thread.tid: thread for thread in truth.live_threads}
    threads = [by_lwp[thread.lwp] for thread in core.threads]
    return [thread.arena_address or 0 for thread in threads], [thread.tcache_address or 0 for thread in threads]


def against(facts: tuple[Evidence, ...]) -> list[str]:
    return [fact.statement for fact in facts if fact.speaks_against]


def sources_for(facts: tuple[Evidence, ...]) -> set[str]:
    """First words of the sources that speak for the choice; "storage" is what the threads have there."""
    sources = [source for fact in facts if not fact.speaks_against for source in fact.source.split(", ")]
    return {source.removeprefix("thread-local ").split()[0] for source in sources}


class TestWaysAgree:
    SOURCES: ClassVar[dict[str, set[str]]] = {
        "symbols": {"storage", "symbol", "DWARF", "relocations", "machine", "link"},
        "stripped": {"storage", "relocations", "machine", "link"},
        "core_alone": {"storage", "link"},
    }

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("case", ["threads_kept", "threads_small"])
    def test_every_way_that_spoke_is_evidence(self, case: str, state: str, tmp_path: Path) -> None:
        paths = core_or_skip(case)
        truth = load_truth(paths.truth)
        with opened(paths.core, state, tmp_path) as core:
            found = identified(core)
            words = found.thread_words
            assert (words.arena_offset, words.tcache_offset) == offsets_in(paths.core, truth)
            arenas, caches = said_by_threads(core, truth)
            assert [0 if at == found.ring.main else at for at in words.arena.tolist()] == arenas
            assert words.tcache.tolist() == caches
            assert sources_for(words.evidence) == self.SOURCES[state]
            assert against(words.evidence) == []

    @pytest.mark.parametrize("case", ["static_exe", "static_pie"])
    def test_static_programs(self, case: str, tmp_path: Path) -> None:
        paths = core_or_skip(case)
        truth = load_truth(paths.truth)
        empty = tmp_path / "empty"
        empty.mkdir()
        for executable in (paths.executable, None):
            with open_core(paths.core, executable=executable, sysroot=empty) as core:
                words = identified(core).thread_words
                assert (words.arena_offset, words.tcache_offset) == offsets_in(paths.core, truth)
                assert ("symbol" in sources_for(words.evidence)) is (executable is not None)
                assert "program" in sources_for(words.evidence)
                assert against(words.evidence) == []


class TestStructureAloneIsNotEnough:
    @pytest.mark.parametrize("state", STATES)
    def test_damaged_tcache_of_the_only_thread(self, state: str, tmp_path: Path) -> None:
        """No sound tcache is anywhere: the word of libc's own that leads to a chunk of its size is still the thread's."""
        paths = core_or_skip("plain_small")
        (thread,) = load_truth(paths.truth).live_threads
        assert thread.tcache_address is not None
        # 64 counts of 16 bits, then the list heads: blocks without a count.
        with open_core(paths.core) as original:
            assert any(original.memory.read_words(thread.tcache_address + 128, 4).tolist())
        core_path = changed(paths.core, {thread.tcache_address: 0}, tmp_path)
        with opened(core_path, state, tmp_path) as core:
            words = identified(core).thread_words
            report = coreheap.analyze(core)
        assert words.tcache_hits == 0
        assert any("like a damaged one" in fact.statement for fact in words.evidence)
        assert [thread.thread_cache for thread in report.threads] == [thread.tcache_address]
        assert "tcache_not_found" not in {gap.cause for gap in report.gaps}

    @pytest.mark.parametrize("state", STATES)
    def test_pointers_of_a_program_to_the_same_kind_of_block(self, state: str, tmp_path: Path) -> None:
        """Each thread has another thread's tcache in a variable that is not libc's and lies nearer to thread_arena."""
        paths = core_or_skip("threads_kept")
        truth = load_truth(paths.truth)
        arena_at, tcache_at = offsets_in(paths.core, truth)
        threads = truth.live_threads
        block = self.block_of(paths.core, tmp_path)
        decoy = block[0] - WORD
        pointers = pointers_of(paths.core)
        words = {
            pointers[thread.tid] + decoy: other.tcache_address or 0
            for thread, other in zip(threads, (*threads[1:], threads[0]), strict=True)
        }
        with opened(changed(paths.core, words, tmp_path), state, tmp_path) as core:
            found = identified(core)
            assert (found.thread_words.arena_offset, found.thread_words.tcache_offset) == (arena_at, tcache_at)
            assert found.thread_words.tcache.tolist() == said_by_threads(core, truth)[1]

    @pytest.mark.parametrize("state", STATES)
    def test_pointers_in_another_variable_of_libc(self, state: str, tmp_path: Path) -> None:
        """As before, within libc's own block: only its slots and names tell, and without them the doubt is shown."""
        paths = core_or_skip("threads_kept")
        truth = load_truth(paths.truth)
        arena_at, tcache_at = offsets_in(paths.core, truth)
        threads = truth.live_threads
        taken = self.slots_of(paths.core)
        start, end = self.block_of(paths.core, tmp_path)
        # A variable that malloc's own code does not touch, or a word that is none at all: as near to thread_arena.
        beside = [at for at in range(start, end, WORD) if abs(at - arena_at) < abs(tcache_at - arena_at)]
        free = sorted(set(beside) - taken) or sorted(set(beside) - {arena_at})
        pointers = pointers_of(paths.core)
        words = {
            pointers[thread.tid] + free[0]: other.tcache_address or 0
            for thread, other in zip(threads, (*threads[1:], threads[0]), strict=True)
        }
        with opened(changed(paths.core, words, tmp_path), state, tmp_path) as core:
            found = identified(core).thread_words
            doubts = [statement for statement in against(found.evidence) if " is a tcache " in statement]
            assert len(doubts) == (0 if state == "symbols" else 1)
            if state != "core_alone":
                assert found.tcache_offset == tcache_at
                assert found.tcache.tolist() == said_by_threads(core, truth)[1]

    @pytest.mark.parametrize("state", STATES)
    def test_threads_that_never_allocated(self, state: str, tmp_path: Path) -> None:
        paths = core_or_skip("threads_kept")
        truth = load_truth(paths.truth)
        arena_at, tcache_at = offsets_in(paths.core, truth)
        pointers = pointers_of(paths.core)
        *idle, busy = (thread for thread in truth.live_threads if thread.arena_address)
        words = {pointers[thread.tid] + at: 0 for thread in idle for at in (arena_at, tcache_at)}
        with opened(changed(paths.core, words, tmp_path), state, tmp_path) as core:
            report: Report = coreheap.analyze(core)
        by_lwp = {thread.lwp: thread for thread in report.threads}
        assert {by_lwp[thread.tid].arena for thread in idle} == {None}
        assert {by_lwp[thread.tid].thread_cache for thread in idle} == {None}
        assert by_lwp[busy.tid].thread_cache == busy.tcache_address
        assert by_lwp[busy.tid].arena is not None

    def block_of(self, core_path: Path, folder: Path) -> tuple[int, int]:
        """libc's TLS block: its slots begin and end there, as PT_TLS of the file says."""
        with opened(core_path, "stripped", folder) as core:
            (module,) = [module for module in core.modules if module.name == "libc.so.6"]
            assert module.program_headers is not None
            (row,) = module.program_headers.rows_of_kind(7).tolist()
            size = int(module.program_headers.memory_bytes[row])
        truth = library(NATIVE).truth
        arena_at, _ = offsets_in(core_path, load_truth(core_or_skip("threads_kept").truth))
        start = arena_at - truth["thread_arena"]
        return start, start + size

    def slots_of(self, core_path: Path) -> set[int]:
        library(NATIVE)
        with open_core(core_path) as core:
            (copy,) = ways.find_globals(core, (), lambda *_: 0.0)
            return {slot.offset for slot in copy.thread_slots if slot.ways > 1}


class TestDisagreement:
    def test_a_name_that_no_thread_bears_out_loses_and_is_shown(self, tmp_path: Path) -> None:
        """The words of all threads decide against a symbol that leads elsewhere."""
        paths = core_or_skip("threads_kept")
        truth = load_truth(paths.truth)
        arena_at, tcache_at = offsets_in(paths.core, truth)
        with opened(paths.core, "core_alone", tmp_path) as core:
            found = identified(core)
            proof = Evidence("a symbol", "symbol table", Strength.PROOF)
            (copy,) = ways.find_globals(core, (found.layout,), lambda *_: 0.0)
            for wrong in (arena_at - 0x100, -0x4000, tcache_at):
                lying = self.with_names(copy, ways.ThreadLocal(wrong, proof))
                words = find_thread_words(
                    ThreadStorage(core),
                    wanted_arena(found.ring.members, ()),
                    wanted_tcache(core.memory, found.layout),
                    lying,
                )
                assert words.arena_offset == arena_at
                assert any(f"{wrong:+#x}" in statement for statement in against(words.evidence))

    def test_a_hint_against_takes_certainty_away(self) -> None:
        facts = (
            Evidence("a", "symbols", Strength.PROOF),
            Evidence("b", "thread-local storage", Strength.HINT, speaks_against=True),
        )
        assert coreheap.evidence.confidence_from(facts) is Confidence.STRONG

    def with_names(self, copy: ways.Globals, *arenas: ways.ThreadLocal) -> ways.Globals:
        return ways.Globals(
            module=copy.module,
            main_arena=(),
            parameters=(),
            tcache=(),
            thread_arena=arenas,
            thread_slots=(),
            thread_blocks=copy.thread_blocks,
            layouts=(),
        )


class TestWhoseVariables:
    def test_another_copys_variables_are_not_asked(self, tmp_path: Path) -> None:
        paths = core_or_skip("threads_kept")
        with opened(paths.core, "stripped", tmp_path) as core:
            found = identified(core)
            copies = ways.find_globals(core, (found.layout,), lambda *_: 0.0)
            assert copy_of(core, copies, found.ring.main) is copies[0]
            assert copy_of(core, copies, None) is copies[0]
            other = next(module for module in core.modules if module is not copies[0].module)
            assert copy_of(core, copies, other.start + 8) is None
            assert copy_of(core, (), found.ring.main) is None


class TestHostileStorage:
    NOTHING = staticmethod(lambda words: np.zeros(len(words), np.bool_))
    ANYTHING = Wanted("a word", lambda words: words == np.uint64(0x1234), NOTHING, NOTHING)

    @pytest.mark.parametrize("pointer", [0, 1, 7, 0x2000, (1 << 64) - 8, 1 << 63])
    def test_thread_pointers_that_lead_nowhere(self, pointer: int, tmp_path: Path) -> None:
        builder = CoreBuilder().add_segment(0x1000, b"\x34\x12" * 0x800)
        builder.add_thread(1, stack_pointer=0x1100, thread_pointer=pointer)
        with open_core(builder.write(tmp_path / "core")) as core:
            words = find_thread_words(ThreadStorage(core), self.ANYTHING, None, None)
            assert words.arena_hits == 0
            assert words.arena_offset is None

    def test_many_threads_are_looked_at_in_bounded_memory(self, tmp_path: Path) -> None:
        """20,000 threads share one block of storage; the largest window is 32,768 words for each."""
        storage = bytearray(0x40000)
        storage[-0x10:-0x8] = (0x1234).to_bytes(8, "little")
        builder = CoreBuilder().add_segment(0x100000, bytes(storage))
        for number in range(20_000):
            builder.add_thread(1 + number, stack_pointer=0x100100, thread_pointer=0x140000)
        with open_core(builder.write(tmp_path / "core")) as core:
            held = ThreadStorage(core)
            tracemalloc.start()
            try:
                assert held.offsets_with(-0x40000, 0, self.ANYTHING.accepts).tolist() == [-0x10]
                assert tracemalloc.get_traced_memory()[1] <= 1 << 28
            finally:
                tracemalloc.stop()
            found = find_thread_words(held, self.ANYTHING, None, None)
            assert (found.arena_offset, found.arena_hits) == (-0x10, 20_000)
