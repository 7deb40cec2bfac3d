"""Wrong frees that glibc noticed, and objects that were used after they were freed: which block, what it is, how sure that is.

The programs say in advance what they give to free. Held against it with all files at hand, without the program's, and with the core
alone; and near misses, of which nothing may be said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import coreheap
from coreheap.analysis import AnalysisOptions
from coreheap.crash import CrashContext, StaleUseKind, WrongFree, WrongFreeKind
from coreheap.damage import DamagedPlace, DamageKind
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.render.integrity import Soundness, integrity_of
from coreheap.render.json_document import json_text
from coreheap.report import Finding, Report
from tests.real_cores.cases import CPLUSPLUS, Case, Linking
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.crash_cores import Crash, crash_of
from tests.real_cores.damage_cases import DAMAGE
from tests.real_cores.targets import MATRIX_TARGETS

FLAGS = ("-fPIE", "-pie", "-fomit-frame-pointer")
FREES = Case("wrong_free", "wrong_free", linking=Linking("wrong", FLAGS), log_bytes=0, support=())
STATIC_FREES = replace(FREES, linking=Linking("static", ("-fno-pie", "-no-pie", "-static"), is_static=True))
OBJECTS = Case("stale_object", "stale_object", linking=CPLUSPLUS, log_bytes=0, support=())
BY_KERNEL = tuple(name for name in MATRIX_TARGETS if not name.endswith("arm64"))
OLDER = ("native", *(name for name in BY_KERNEL if name.split("-")[0] in ("bullseye", "bookworm", "trixie")))
NEWER = tuple(name for name in BY_KERNEL if name not in OLDER)
EVERY = (*OLDER, *NEWER)

TWICE, INSIDE = WrongFreeKind.FREED_TWICE, WrongFreeKind.INSIDE_LIVE_BLOCK
FOREIGN, NOWHERE = WrongFreeKind.NOT_FROM_MALLOC, WrongFreeKind.NOT_MAPPED
KINDS = {
    "cached": TWICE,
    "fast": TWICE,
    "binned": TWICE,
    "top": TWICE,
    "moved_on": INSIDE,
    "inside": INSIDE,
    "inside_number": INSIDE,
    "realloc_inside": INSIDE,
    "variable": FOREIGN,
    "stack": FOREIGN,
    "stack_large": FOREIGN,
    "foreign": FOREIGN,
    "text": NOWHERE,
    "mapped_twice": NOWHERE,
}
CALLERS = {"realloc_inside": "grow", "realloc_moved_on": "grow"}
PROVEN_BY_LISTS = ("fast", "top")
"""Kinds of which malloc's lists alone may tell the block: one head of a fastbin, one top."""

Make = Callable[..., Crash]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``crashed(case, target, *arguments)``: a core of a program of these; made once."""
    made: dict[tuple[str, ...], Crash] = {}

    def make(case: Case, target: str, *arguments: str) -> Crash:
        key = (case.name, case.linking.name, target, *arguments)
        if key not in made:
            of_target = case if target == "native" else replace(case, target=MATRIX_TARGETS[target])
            made[key] = crash_of(of_target, arguments, tmp_path_factory.mktemp("wrong"))
        return made[key]

    return make


def crash_in(report: Report) -> CrashContext:
    assert not report.defects
    assert report.crash is not None
    return report.crash


def wrong_free_in(report: Report) -> WrongFree:
    wrong = crash_in(report).wrong_free
    assert wrong is not None
    return wrong


def accusations(report: Report) -> list[Finding]:
    """The findings that say what the program did wrong with a block."""
    codes = ("DOUBLE-FREE", "USE-AFTER-FREE")
    return [finding for finding in report.findings if finding.code in codes or finding.code.startswith("CORRUPTION")]


def assert_right(made: Crash, kind: str, expected: WrongFreeKind) -> None:
    report = made.report(leaks=True)
    wrong = wrong_free_in(report)
    assert (wrong.kind, wrong.address) == (expected, made.truth["freed"])
    assert wrong.confidence is Confidence.STRONG
    assert wrong.function == ("realloc" if kind.startswith("realloc") else "free")
    crash = crash_in(report)
    assert wrong.caller is not None
    assert crash.frames[wrong.caller].symbol == CALLERS.get(kind, "release_again")
    assert (wrong.message is None) == (crash.signal_name == "SIGSEGV")
    if expected is INSIDE or (expected is TWICE and kind != "top"):
        assert wrong.place is not None
        assert wrong.place.chunk is not None
        assert wrong.place.chunk.payload_address == made.truth["block"]
    integrity = integrity_of(report)
    assert (integrity.verdict, integrity.confidence) == (Soundness.WRONG_FREE, Confidence.STRONG)
    code = "DOUBLE-FREE" if expected is TWICE else "CORRUPTION-INVALID-FREE"
    found = accusations(report)
    assert [finding.code for finding in found] == [code]
    assert found[0].quantity("place") == "call"
    assert not report.damages


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pointer_of_a_wrong_free_is_found(crashed: Make, kind: str, target: str) -> None:
    assert_right(crashed(FREES, target, kind), kind, KINDS[kind])


@pytest.mark.parametrize("target", ["native", "bookworm-i386", "experimental-amd64"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_found_in_a_thread_with_an_arena_of_its_own(crashed: Make, kind: str, target: str) -> None:
    assert_right(crashed(FREES, target, kind, "thread"), kind, KINDS[kind])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "variable"])
def test_it_is_found_in_a_static_program(crashed: Make, kind: str) -> None:
    assert_right(crashed(STATIC_FREES, "native", kind), kind, KINDS[kind])


@pytest.mark.parametrize("target", OLDER)
def test_what_looks_like_a_mapping_of_its_own_is_told(crashed: Make, target: str) -> None:
    assert_right(crashed(FREES, target, "mapped_inside"), "mapped_inside", INSIDE)


@pytest.mark.parametrize("target", ["native", "bullseye-amd64", "bullseye-i386"])
def test_realloc_of_a_pointer_that_moved_on_is_told(crashed: Make, target: str) -> None:
    """Newer releases read the next size before they look, and fault."""
    assert_right(crashed(FREES, target, "realloc_moved_on"), "realloc_moved_on", INSIDE)


LISTED = {
    "cached": ChunkState.TCACHE,
    "fast": ChunkState.FASTBIN,
    "binned": ChunkState.UNSORTED_BIN,
    "top": ChunkState.TOP,
}


@pytest.mark.parametrize("kind", LISTED)
def test_where_the_block_is_as_a_free_one(crashed: Make, kind: str) -> None:
    wrong = wrong_free_in(crashed(FREES, "native", kind).report())
    assert wrong.listed_in is LISTED[kind]
    assert wrong.listed_thread == (0 if kind == "cached" else None)


@pytest.mark.parametrize("target", EVERY)
@pytest.mark.parametrize("kind", KINDS)
def test_with_the_core_alone_nothing_wrong_is_said(crashed: Make, tmp_path: Path, kind: str, target: str) -> None:
    """Words near the stack pointer make plausible at most; lists that leave one block alone prove it."""
    made = crashed(FREES, target, kind)
    with coreheap.open(made.core, sysroot=tmp_path) as core:
        wrong = crash_in(coreheap.analyze(core, AnalysisOptions(leaks=False))).wrong_free
    if wrong is None or wrong.confidence is Confidence.WEAK:
        assert kind not in PROVEN_BY_LISTS or target in NEWER or target.endswith("i386")
        return
    if wrong.kind is WrongFreeKind.UNKNOWN_BLOCK:
        assert made.truth["freed"] in wrong.others
        return
    assert (wrong.address, wrong.kind) == (made.truth["freed"], KINDS[kind])
    assert kind in PROVEN_BY_LISTS or wrong.confidence is Confidence.PLAUSIBLE


@pytest.mark.parametrize("target", [name for name in EVERY if name != "native"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_the_programs_file_nothing_wrong_is_said(crashed: Make, kind: str, target: str) -> None:
    made = crashed(FREES, target, kind)
    with coreheap.open(made.core, sysroot=made.sysroot) as core:
        wrong = crash_in(coreheap.analyze(core, AnalysisOptions(leaks=False))).wrong_free
    if wrong is None:
        # No register of malloc's has it, and a value of the caller's alone is not looked for where stacks are full of such.
        assert KINDS[kind] in (INSIDE, FOREIGN, NOWHERE)
        return
    if wrong.confidence.rank >= Confidence.PLAUSIBLE.rank:
        assert (wrong.address, wrong.kind) == (made.truth["freed"], KINDS[kind])


def test_text_as_a_pointer_is_never_shown(crashed: Make) -> None:
    for target in ("native", "experimental-amd64"):
        report = crashed(FREES, target, "text").report()
        wrong_free_in(report)
        assert "0x6161616161616161" not in json_text(report)


@pytest.mark.parametrize("arguments", [(), ("thread",)])
@pytest.mark.parametrize("target", ["native", "bookworm-amd64", "trixie-amd64", "bookworm-i386", "trixie-i386"])
def test_what_was_on_a_fastbin_that_malloc_took_off_its_head(
    crashed: Make, target: str, arguments: tuple[str, ...]
) -> None:
    made = crashed(FREES, target, "counted", *arguments)
    report = made.report(leaks=True)
    crash = crash_in(report)
    assert crash.abort_message is not None
    assert "malloc_consolidate(): unaligned fastbin chunk detected" in crash.abort_message.text
    assert crash.wrong_free is None
    first = report.damages[0]
    assert (first.kind, first.place) == (DamageKind.USE_AFTER_FREE, DamagedPlace.FASTBIN_LINK)
    assert first.bytes.start == made.truth["block"]
    assert sorted(first.listed_blocks) == sorted(made.truth[f"listed{number}"] for number in range(5))
    assert first.confidence is Confidence.STRONG
    assert integrity_of(report).verdict is Soundness.DAMAGED


@pytest.mark.parametrize("name", [name for name in DAMAGE if name.startswith("met_") and "double" not in name])
def test_a_right_call_that_met_damage_is_not_accused(name: str) -> None:
    """The block is hidden by a damaged header, or malloc itself followed a foreign link."""
    with coreheap.open(core_or_skip(name).core) as core:
        crash = coreheap.analyze(core, AnalysisOptions(leaks=False)).crash
    assert crash is None or (crash.wrong_free, crash.stale_use) == (None, None)


# ------------------------------------------------------------------------------------------------- C++

DELETES = {"delete_twice": TWICE, "delete_second_base": INSIDE, "delete_of_array": INSIDE}
WITH_CPLUSPLUS = ("native", "trixie-amd64", "forky-amd64", "experimental-amd64")


@pytest.mark.parametrize("target", WITH_CPLUSPLUS)
@pytest.mark.parametrize("kind", DELETES)
def test_a_wrong_delete_is_told_as_the_free_that_it_is(crashed: Make, kind: str, target: str) -> None:
    made = crashed(OBJECTS, target, kind)
    report = made.report()
    wrong = wrong_free_in(report)
    assert (wrong.kind, wrong.address, wrong.confidence) == (DELETES[kind], made.truth["freed"], Confidence.STRONG)
    assert wrong.place is not None
    assert wrong.place.chunk is not None
    assert wrong.place.chunk.payload_address == made.truth["block"]
    assert integrity_of(report).verdict is Soundness.WRONG_FREE


STALE = {
    "virtual_free": (StaleUseKind.VIRTUAL_TABLE, 0, Confidence.STRONG),
    "virtual_binned": (StaleUseKind.VIRTUAL_TABLE, 0, Confidence.STRONG),
    "delete_virtual_twice": (StaleUseKind.VIRTUAL_TABLE, 0, Confidence.STRONG),
    "callback_free": (StaleUseKind.FUNCTION_POINTER, 16, Confidence.STRONG),
    "member_free": (StaleUseKind.POINTER, 0, Confidence.PLAUSIBLE),
}


@pytest.mark.parametrize("arguments", [(), ("thread",)])
@pytest.mark.parametrize("target", WITH_CPLUSPLUS)
@pytest.mark.parametrize("kind", STALE)
def test_the_use_of_a_freed_object_is_told(crashed: Make, kind: str, target: str, arguments: tuple[str, ...]) -> None:
    made = crashed(OBJECTS, target, kind, *arguments)
    report = made.report(leaks=True)
    stale = crash_in(report).stale_use
    assert stale is not None
    assert stale.chunk.payload_address == made.truth["block"]
    assert (stale.kind, stale.offset, stale.confidence) == STALE[kind]
    assert not stale.is_given_again
    assert [finding.code for finding in accusations(report)] == ["USE-AFTER-FREE"]
    # Nothing of malloc's is damaged.
    assert integrity_of(report).verdict is Soundness.SOUND
    assert not report.damages


@pytest.mark.parametrize("target", WITH_CPLUSPLUS)
def test_a_block_that_was_given_out_again_is_told_by_its_likes(crashed: Make, target: str) -> None:
    made = crashed(OBJECTS, target, "virtual_given")
    report = made.report(leaks=True)
    stale = crash_in(report).stale_use
    assert stale is not None
    assert stale.chunk.payload_address == made.truth["block"]
    assert (stale.kind, stale.offset) == (StaleUseKind.VIRTUAL_TABLE, 0)
    assert (stale.is_given_again, stale.confidence) == (True, Confidence.PLAUSIBLE)
    # The vector that still has it, not the text's owner.
    assert stale.holders[0].startswith("block ")
    assert integrity_of(report).verdict is Soundness.SOUND


@pytest.mark.parametrize("kind", [*STALE, "virtual_given"])
def test_without_code_the_use_of_a_freed_object_is_plausible_at_most(crashed: Make, tmp_path: Path, kind: str) -> None:
    made = crashed(OBJECTS, "native", kind)
    with coreheap.open(made.core, sysroot=tmp_path) as core:
        stale = crash_in(coreheap.analyze(core)).stale_use
    if stale is not None:
        assert stale.chunk.payload_address == made.truth["block"]
        assert stale.confidence.rank <= Confidence.PLAUSIBLE.rank


@pytest.mark.parametrize("target", WITH_CPLUSPLUS)
@pytest.mark.parametrize("kind", ["null_member", "bad_member", "callback_given", "abort"])
def test_what_was_not_freed_is_not_accused(crashed: Make, tmp_path: Path, kind: str, target: str) -> None:
    """What malloc gave out again may always have been what it is: a bad pointer in it says nothing of a free."""
    made = crashed(OBJECTS, target, kind)
    with coreheap.open(made.core, sysroot=tmp_path) as core:
        alone = coreheap.analyze(core)
    for report in (made.report(leaks=True), alone):
        crash = crash_in(report)
        assert (crash.wrong_free, crash.stale_use) == (None, None)
        assert integrity_of(report).verdict is Soundness.SOUND


def test_what_never_was_an_object_is_no_more_than_weak(crashed: Make) -> None:
    stale = crash_in(crashed(OBJECTS, "native", "never_an_object").report(leaks=True)).stale_use
    assert stale is None or stale.confidence is Confidence.WEAK
