"""The fuzzer itself: repeatable, notices what it should, undoes what it did; and a few hundred trials of it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from coreheap.errors import InputNotUsable
from tests.fuzzing import runner, seeds, trial
from tests.fuzzing.mutations import EXTREMES, Mutation, extreme_mutations, mutation_of
from tests.fuzzing.structures import SoundCore

COUNT = 60
CHUNK_GROUPS = ("chunks_", "mmapped_")


@pytest.fixture(scope="module")
def cores() -> tuple[SoundCore, ...]:
    names = ("fixture/plain_small", "fixture/threads_small", "packed/abort_double_free")
    return tuple(seeds.loaded(seed) for seed in seeds.available() if seed.name in names)


def test_the_structures_of_a_core_are_found(cores: tuple[SoundCore, ...]) -> None:
    groups = set(cores[0].groups) | set(cores[1].groups)
    assert groups >= {
        "elf_header", "program_headers", "note_headers", "notes", "file_note", "text", "module_headers", "dynamic",
        "link_map", "tls", "stacks", "malloc_state", "heap_info", "mp_", "tcache", "top", "chunks_in_use", "chunks_tcache",
    }  # fmt: skip
    assert all(offset < len(core.content) for core in cores for offset in core.boundaries)


def test_a_trial_is_its_number(cores: tuple[SoundCore, ...]) -> None:
    plan, other = runner.Plan(3, cores), runner.Plan(4, cores)
    drawn = [plan.trial(number)[1] for number in range(40)]
    assert drawn == [plan.trial(number)[1] for number in range(40)]
    assert drawn != [other.trial(number)[1] for number in range(40)]
    assert Mutation.from_json(drawn[7].as_json()) == drawn[7]


def test_a_mutation_is_undone(cores: tuple[SoundCore, ...], tmp_path: Path) -> None:
    for core in cores:
        file = runner.MutatedFile(core, tmp_path)
        source = random.Random(1)
        for _ in range(100):
            mutation = mutation_of(core, source)
            with file.with_mutation(mutation) as path:
                assert path.read_bytes() == mutation.applied_to(core.content)
            assert file.path.read_bytes() == core.content


def results_of(core: SoundCore, monkeypatch: pytest.MonkeyPatch, behaviour: Any, count: int = 3) -> runner.Result:
    """Trials of a coreheap that behaves in a certain way; children inherit it."""
    calls: list[int] = []

    def analysed(*arguments: object) -> str:
        calls.append(1)
        # The first two are what a child does to be warm.
        return behaviour(*arguments) if len(calls) > 2 else "whole"

    monkeypatch.setattr(trial, "_analysed", analysed)
    monkeypatch.setattr(runner, "CPU_SECONDS", 1)
    return runner.run(runner.Plan(1, (core,)), count=count)


def test_a_traceback_is_a_failure(cores: tuple[SoundCore, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def behaviour(*_: object) -> str:
        return {}["missing"]  # type: ignore[no-any-return]

    result = results_of(cores[0], monkeypatch, behaviour)
    [failure] = result.failures.values()
    assert failure["kind"] == "traceback"
    assert "KeyError: 'missing'" in failure["detail"]
    assert result.failure_counts == {failure["signature"]: 3}


def test_a_hang_is_a_failure_and_the_rest_goes_on(
    cores: tuple[SoundCore, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def behaviour(*_: object) -> str:
        while True:
            pass

    result = results_of(cores[0], monkeypatch, behaviour, count=2)
    assert {failure["kind"] for failure in result.failures.values()} == {"hang"}
    assert result.trials == 2


def test_too_much_memory_is_a_failure(cores: tuple[SoundCore, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def behaviour(*_: object) -> str:
        return str(len(bytearray(400 << 20)))

    result = results_of(cores[0], monkeypatch, behaviour)
    assert {failure["signature"].split()[1] for failure in result.failures.values()} == {"MemoryError"}


def test_a_death_is_a_failure(cores: tuple[SoundCore, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def behaviour(*_: object) -> str:
        import ctypes

        return str(ctypes.string_at(8))

    result = results_of(cores[0], monkeypatch, behaviour)
    assert {failure["kind"] for failure in result.failures.values()} == {"death"}
    assert result.trials == 3


def test_a_failure_is_made_smaller_and_repeated(cores: tuple[SoundCore, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    core = cores[0]

    def behaviour(path: Path, sysroot: object, source: random.Random) -> str:
        if path.read_bytes()[100] == 0xEE:
            raise ZeroDivisionError
        raise InputNotUsable("no", where="x", expected="x", found="x", next_step="x")

    monkeypatch.setattr(trial, "_analysed", behaviour)
    monkeypatch.setattr(trial, "_check_error", lambda error, path: None)
    writes = tuple((at, b"\xee") for at in range(80, 110))
    kept = {"seed": 1, "number": 0, "core": core.name, "sysroot": False, "kind": "traceback", "signature": ""}
    kept |= Mutation(writes, 5000).as_json()
    [(signature, _)] = runner.repeat(kept, core).failures.items()
    kept["signature"] = signature
    assert Mutation.from_json(runner.minimised(kept, core)) == Mutation(((100, b"\xee"),))


def test_control_characters_and_unclear_errors_are_failures(tmp_path: Path) -> None:
    with pytest.raises(trial.Failure) as caught:
        trial._check_characters("fine\nbad\x1b[2J", "analyze")
    assert caught.value.kind == "characters"
    with pytest.raises(trial.Failure) as caught:
        trial._check_error(InputNotUsable("bad", where="core"), tmp_path)
    assert caught.value.kind == "unclear error"


def test_mutated_cores(cores: tuple[SoundCore, ...]) -> None:
    """Some of what scripts/fuzz does for hours."""
    result = runner.run(runner.Plan(20, cores), count=COUNT, jobs=2)
    assert not result.failures, "\n".join(failure["detail"] for failure in result.failures.values())
    assert result.trials == COUNT
    assert result.outcomes["whole"] + result.outcomes["partial"] > COUNT / 4


def test_extreme_values_in_mp_(cores: tuple[SoundCore, ...]) -> None:
    """sbrk_base as the last address but 15, once one trial of 100,000: what is said of an allocation is sought without TLS."""
    core = cores[0]
    [parameters] = core.groups["mp_"]
    without_tls = tuple((structure.offset, bytes(structure.byte_count)) for structure in core.groups["tls"])
    offsets = {offset for offset, _ in parameters.fields}
    chosen = [
        Mutation((*without_tls, *mutation.writes))
        for mutation in extreme_mutations(core)
        if mutation.writes[0][0] in offsets
    ]
    assert len(chosen) == len(offsets) * len(EXTREMES)
    plan = runner.ExtremesPlan(1, (core,), mutations=(chosen,))
    result = runner.run(plan, count=len(chosen), jobs=2)
    assert not result.failures, "\n".join(failure["detail"] for failure in result.failures.values())
    assert result.outcomes["whole"] + result.outcomes["partial"] == len(chosen)


def test_extremes_are_drawn_from_every_group(cores: tuple[SoundCore, ...]) -> None:
    plan = runner.ExtremesPlan.of(1, cores)
    assert plan.count == len(cores) * max(len(extreme_mutations(core)) for core in cores)
    drawn = {plan.trial(number)[1] for number in range(plan.count)}
    assert drawn == {mutation for core in cores for mutation in extreme_mutations(core)}
    for core in cores:
        places = {mutation.writes[0][0] for mutation in extreme_mutations(core)}
        for structures in core.groups.values():
            assert places & {offset for structure in structures for offset, _ in structure.fields}


class _Cuts(runner.Plan):
    """Trial ``number`` cuts the file at its boundary of that number."""

    cuts: tuple[int, ...] = ()

    def trial(self, number: int) -> tuple[SoundCore, Mutation, random.Random, Path | None]:
        return self.cores[0], Mutation((), self.cuts[number]), random.Random(number), None


def test_truncation_at_the_boundary_of_every_structure(cores: tuple[SoundCore, ...]) -> None:
    """Of chunks, of which there are thousands, at some."""
    core = cores[1]
    structures = [
        structure
        for group, members in sorted(core.groups.items())
        for structure in (members[:: max(1, len(members) // 4)] if group.startswith(CHUNK_GROUPS) else members)
    ]
    edges = {edge for s in structures for edge in (s.offset, s.offset + s.byte_count)}
    plan = _Cuts(1, (core,))
    object.__setattr__(plan, "cuts", tuple(sorted(edge for edge in edges if edge < len(core.content))))
    result = runner.run(plan, count=len(plan.cuts), jobs=2)
    assert not result.failures, "\n".join(failure["detail"] for failure in result.failures.values())
    assert result.outcomes["whole"] == 0
    assert result.outcomes["partial"] > 0
    assert result.outcomes["refused"] > 0
