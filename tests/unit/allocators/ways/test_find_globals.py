"""All ways together on real cores: with files and debug files, with the core alone, with files that are wrong."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from coreheap.allocators.glibc import ways
from coreheap.allocators.glibc.identify import Identification, arena_score, identify, layouts_for
from coreheap.allocators.glibc.locate import Sighting
from coreheap.allocators.glibc.tcache import wanted_tcache
from coreheap.allocators.glibc.thread_storage import ThreadStorage
from coreheap.allocators.glibc.threads import wanted_arena
from coreheap.allocators.glibc.ways import Globals
from coreheap.corefile import Core, ElfFile, open_core
from coreheap.evidence import Confidence, Evidence, Strength, confidence_from
from tests.real_cores.conftest import core_or_skip
from tests.unit.allocators.ways.libraries import NATIVE, library

DEBUG_DIRECTORY = Path("/usr/lib/debug")


def globals_of(core: Core) -> tuple[Globals, ...]:
    return ways.find_globals(core, layouts_for(core), arena_score)


def identified(core: Core) -> Identification:
    found = identify(core)
    assert found is not None
    return found


def addresses(sightings: Iterable[Sighting]) -> set[int]:
    return {sighting.address for sighting in sightings}


def sources(sightings: Iterable[Sighting]) -> list[str]:
    """The first word of each source: the way."""
    return [sighting.evidence.source.split()[0] for sighting in sightings]


def thread_locals_of(
    core: Core, found: Globals, truth: Identification
) -> tuple[tuple[ways.ThreadLocal, ...], tuple[ways.ThreadLocal, ...]]:
    """thread_arena and tcache among libc's slots."""
    storage = ThreadStorage(core)
    tcache = wanted_tcache(core.memory, truth.layout)
    assert tcache is not None
    arenas = ways.find_thread_locals(storage, found.thread_slots, wanted_arena(truth.ring.members, ()))
    return arenas, ways.find_thread_locals(storage, found.thread_slots, tcache)


def with_libc(folder: Path, core: Path, content: bytes | None) -> Path:
    """A sysroot that has only a libc of this content, at its place in the core; an empty one for None."""
    folder.mkdir()
    with open_core(core, sysroot=folder) as opened:
        (path,) = {module.path for module in opened.modules if module.name == "libc.so.6"}
    if content is not None:
        place = folder / path.lstrip("/")
        place.parent.mkdir(parents=True)
        place.write_bytes(content)
    return folder


class TestAllWaysAgree:
    def test_with_libc_and_its_debug_file(self) -> None:
        library(NATIVE)
        with open_core(core_or_skip("threads_kept").core, debug_directories=[DEBUG_DIRECTORY]) as core:
            (found,) = globals_of(core)
            truth = identified(core)
            assert addresses(found.main_arena) == {truth.ring.main}
            assert sources(found.main_arena) == ["symbol", "DWARF", "relocations", "machine"]
            assert truth.parameters is not None
            assert addresses(found.parameters) == {truth.parameters.address}
            assert sources(found.parameters) == ["symbol", "DWARF", "initial", "machine"]
            assert {variable.offset for variable in found.tcache} == {truth.thread_words.tcache_offset}
            assert {variable.offset for variable in found.thread_arena} == {truth.thread_words.arena_offset}
            assert all(truth.layout in sighting.layouts for sighting in found.layouts)
            facts = ways.evidence_for(found.main_arena, truth.ring.main or 0)
            assert confidence_from(facts) is Confidence.CERTAIN

    @pytest.mark.parametrize(
        "case", ["threads_kept", "threads_gone", "fork_child", "non_pie", "static_exe", "static_pie"]
    )
    def test_the_slots_lead_to_the_threads_words(self, case: str) -> None:
        with open_core(core_or_skip(case).core) as core:
            (found,) = globals_of(core)
            truth = identified(core)
            assert addresses(found.main_arena) == {truth.ring.main}
            arenas, caches = thread_locals_of(core, found, truth)
            assert [variable.offset for variable in arenas][:1] == [truth.thread_words.arena_offset]
            assert [variable.offset for variable in caches][:1] == [truth.thread_words.tcache_offset]


class TestTheCoreAlone:
    def test_nothing_of_libc_was_dumped(self, tmp_path: Path) -> None:
        """What is left is the link map, which tells where libc's thread-local block lies."""
        with open_core(core_or_skip("threads_kept").core, sysroot=tmp_path) as core:
            (found,) = globals_of(core)
            assert not found.found_anything
            assert found.thread_slots == ()
            assert [block.source for block in found.thread_blocks] == ["link map of libc.so.6"]

    def test_dumped_relocations_name_main_arena_and_the_slots(self, tmp_path: Path) -> None:
        with open_core(core_or_skip("threads_kept@filter_all").core, sysroot=tmp_path) as core:
            (found,) = globals_of(core)
            truth = identified(core)
            # main_arena.next no longer points to main_arena: these programs have more arenas.
            assert len(truth.ring.members) > 1
            assert addresses(found.main_arena) == {truth.ring.main}
            # The text was dumped, too, so machine code says the same.
            assert sources(found.main_arena) == ["relocations", "machine"]
            assert [sighting.evidence.strength for sighting in found.main_arena] == [Strength.SOLID] * 2
            _, caches = thread_locals_of(core, found, truth)
            assert [variable.offset for variable in caches] == [truth.thread_words.tcache_offset]


class TestWrongFiles:
    def test_another_build_is_not_asked(self, tmp_path: Path) -> None:
        core_path = core_or_skip("threads_kept").core
        content = bytearray(library(NATIVE).file.read_bytes())
        file = ElfFile.open(library(NATIVE).file)
        assert file is not None
        assert file.build_id is not None
        at = content.index(file.build_id)
        content[at] ^= 0xFF
        with open_core(core_path, sysroot=with_libc(tmp_path / "root", core_path, bytes(content))) as core:
            assert not any(found.found_anything or found.thread_slots for found in globals_of(core))
            assert "mismatched_module" in {gap.cause for gap in core.gaps}

    @pytest.mark.parametrize("seed", range(12))
    def test_a_damaged_file_makes_no_false_claim(self, tmp_path: Path, seed: int) -> None:
        """The build-id is right and the rest of the file is not: less is found, and what is solid is true."""
        core_path = core_or_skip("threads_kept").core
        rng = random.Random(seed)
        content = bytearray(library(NATIVE).file.read_bytes())
        start = rng.randrange(0x1000, len(content) - 1)
        for _ in range(4000):
            content[rng.randrange(start, len(content))] = rng.choice((0, 1, 0xFF, rng.randrange(256)))
        with open_core(core_path, sysroot=with_libc(tmp_path / "root", core_path, bytes(content))) as core:
            truth = identified(core)
            for found in globals_of(core):
                solid = [s for s in found.main_arena if s.evidence.strength > Strength.HINT]
                assert addresses(solid) <= {truth.ring.main}
                thread_locals_of(core, found, truth)

    @pytest.mark.parametrize("share", [0.001, 0.2, 0.9, 0.999])
    def test_a_cut_file(self, tmp_path: Path, share: float) -> None:
        core_path = core_or_skip("threads_kept").core
        content = library(NATIVE).file.read_bytes()
        cut = content[: max(4096, int(len(content) * share))]
        with open_core(core_path, sysroot=with_libc(tmp_path / "root", core_path, cut)) as core:
            truth = identified(core)
            for found in globals_of(core):
                solid = [s for s in found.main_arena if s.evidence.strength > Strength.HINT]
                assert addresses(solid) <= {truth.ring.main}


class TestDisagreement:
    A = Sighting(0x1000, Evidence("symbol", "symbol table", Strength.PROOF, 0x1000))
    B = Sighting(0x2000, Evidence("signature", "relocations", Strength.SOLID, 0x2000))

    def test_both_are_shown_and_the_confidence_is_lower(self) -> None:
        facts = ways.evidence_for((self.A, self.B), 0x1000)
        assert [fact.speaks_against for fact in facts] == [False, True]
        assert "0x2000" in facts[1].statement
        assert confidence_from(facts) is Confidence.PLAUSIBLE
        assert confidence_from(ways.evidence_for((self.A,), 0x1000)) is Confidence.CERTAIN

    def test_thread_local_variables(self) -> None:
        variables = [
            ways.ThreadLocal(-0x50, Evidence("symbol", "symbol table", Strength.PROOF)),
            ways.ThreadLocal(-0x48, Evidence("word", "slots", Strength.SOLID)),
        ]
        facts = ways.evidence_for_offset(variables, -0x50)
        assert [fact.speaks_against for fact in facts] == [False, True]
        assert "-0x48" in facts[1].statement
