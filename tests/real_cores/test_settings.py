"""The settings of processes that were started with some, made some, and had some made by malloc itself."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import coreheap
from coreheap.checks.threshold_ratchet import SMALLEST_BYTES
from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.render.json_document import SchemaName, json_text, schema_text
from coreheap.report import Finding, Report
from coreheap.settings import Effect, Reason, SetBy
from tests.real_cores.cases import CASES, MATRIX
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.test_matrix import analyse
from tests.real_cores.truth import Truth, load_truth

RATCHETED = [name for name in (*CASES, *MATRIX) if name.rpartition("/")[2] == "ratchet"]
GIVEN = [name for name in (*CASES, *MATRIX) if name.rpartition("/")[2] == "ratchet@given"]


def analysed(name: str, empty: Path) -> tuple[Report, Truth]:
    if name in MATRIX:
        return analyse(name, "core_alone", empty)
    paths = core_or_skip(name)
    with coreheap.open(paths.core) as core:
        return coreheap.analyze(core), load_truth(paths.truth)


def note(truth: Truth, name: str) -> int:
    (value,) = truth.notes[name]
    return int(value)


def values(report: Report) -> dict[str, tuple[int | None, SetBy, str]]:
    assert report.settings is not None
    return {
        setting.name: (setting.value, setting.set_by, setting.source) for setting in report.settings.malloc[0].values
    }


def ratchet_of(report: Report) -> Finding | None:
    return next((finding for finding in report.findings if finding.code == "THRESHOLD-RATCHET"), None)


@pytest.mark.parametrize("name", RATCHETED)
def test_malloc_raised_its_own_thresholds(name: str, tmp_path: Path) -> None:
    report, truth = analysed(name, tmp_path)
    chunk = note(truth, "mmapped_chunk")
    shown = values(report)
    assert shown.pop("mmap_threshold") == (chunk, SetBy.RATCHET, "")
    assert shown.pop("trim_threshold") == (2 * chunk, SetBy.RATCHET, "")
    # With large pages by default, as on arm64 from 2.43 on, nobody can be named.
    assert shown.pop("thp_pagesize", (0, SetBy.DEFAULT, ""))[1:] in {(SetBy.DEFAULT, ""), (SetBy.UNKNOWN, "")}
    assert {set_by for _, set_by, _ in shown.values()} == {SetBy.DEFAULT}
    assert report.settings is not None
    assert report.settings.environment == ()
    # The blocks came from the heap, as the program saw by their size words, and what it freed of them is still there.
    assert note(truth, "mmapped_blocks") == 0
    finding = ratchet_of(report)
    assert finding is not None
    assert finding.confidence is Confidence.STRONG
    assert finding.quantity("mmap_threshold") == chunk
    assert finding.quantity("large_live_chunks") == note(truth, "kept_blocks")
    assert finding.quantity("large_live_bytes") == note(truth, "kept_bytes")
    free = [finding.quantity("large_free_bytes"), finding.quantity("merged_free_bytes")]
    # The blocks between two that are kept grow together; beside them the block that raised the threshold may be free.
    assert note(truth, "freed_bytes") <= sum(int(part or 0) for part in free) <= note(truth, "freed_bytes") + 6 * chunk


@pytest.mark.parametrize("name", GIVEN)
def test_settings_are_what_the_environment_and_the_program_asked_for(name: str, tmp_path: Path) -> None:
    report, truth = analysed(name, tmp_path)
    shown = values(report)
    assert shown["arena_max"] == (4, SetBy.ENVIRONMENT, "MALLOC_ARENA_MAX")
    assert shown["mmap_threshold"] == (0x20000, SetBy.ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_")
    assert shown["tcache_count"] == (5, SetBy.TUNABLE, "glibc.malloc.tcache_count")
    assert shown["arena_test"] == (3, SetBy.TUNABLE, "glibc.malloc.arena_test")
    assert shown["n_mmaps_max"] == (note(truth, "mallopt_n_mmaps_max"), SetBy.MALLOPT, "M_MMAP_MAX")
    assert shown["no_dyn_threshold"] == (1, SetBy.ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_")
    assert shown["trim_threshold"][:2] == shown["top_pad"][:2] == (0x20000, SetBy.DEFAULT)
    assert report.settings is not None
    assert report.settings.environment is not None
    assert {(wish.name, wish.value, wish.effect, wish.reason) for wish in report.settings.environment} == {
        ("MALLOC_ARENA_MAX", "4", Effect.OBEYED, None),
        ("MALLOC_MMAP_THRESHOLD_", "0x20000", Effect.OBEYED, None),
        ("MALLOC_TOP_PAD", "1234", Effect.IGNORED, Reason.UNKNOWN_NAME),
        ("MALLOC_PERTURB_", "0", Effect.NOT_VISIBLE, None),
        ("glibc.malloc.tcache_count", "5", Effect.OBEYED, None),
        ("glibc.malloc.trim_treshold", "4096", Effect.IGNORED, Reason.UNKNOWN_NAME),
        ("glibc.malloc.arena_test", "3", Effect.OBEYED, None),
    }
    assert report.settings.at_secure is False
    # The threshold is fixed: large blocks had mappings of their own, and nothing of them stays.
    assert note(truth, "mmapped_blocks") > 0
    assert ratchet_of(report) is None


def test_the_program_has_the_last_word() -> None:
    paths = core_or_skip("ratchet@late")
    with coreheap.open(paths.core) as core:
        report, truth = coreheap.analyze(core), load_truth(paths.truth)
    assert values(report)["arena_max"] == (note(truth, "mallopt_arena_max"), SetBy.MALLOPT, "M_ARENA_MAX")
    assert report.settings is not None
    (wish,) = report.settings.environment or ()
    assert (wish.value, wish.requested, wish.effect, wish.reason) == ("7", 7, Effect.DIFFERS, Reason.CHANGED_LATER)
    # Two blocks of 20,000,000 bytes at the end of the heap were freed, and the end stays below the raised threshold.
    finding = ratchet_of(report)
    assert finding is not None
    assert report.heap is not None
    assert report.heap.totals[ChunkState.TOP].chunk_bytes - 0x20000 == finding.quantity("top_bytes")
    assert 40_000_000 <= int(finding.quantity("top_bytes") or 0) < 40_000_000 + 0x21000


def test_without_the_stack_nothing_is_claimed() -> None:
    with coreheap.open(core_or_skip("threads_kept@filter_nothing").core) as core:
        report = coreheap.analyze(core)
    assert report.settings is not None
    assert report.settings.environment is None
    assert report.settings.malloc == ()
    assert "initial_stack_missing" in {gap.cause for gap in report.gaps}


@pytest.mark.parametrize("name", ["ratchet", "ratchet@given", "threads_kept@filter_nothing"])
def test_the_json_document_is_valid(name: str) -> None:
    with coreheap.open(core_or_skip(name).core) as core:
        document = json.loads(json_text(coreheap.analyze(core)))
    jsonschema.validate(document, json.loads(schema_text(SchemaName.REPORT)))
    assert document["settings"]["malloc"] or name == "threads_kept@filter_nothing"


def test_little_is_not_worth_a_word() -> None:
    """Threads of random blocks raise the threshold too; what stays because of it is a few MB."""
    with coreheap.open(core_or_skip("threads_kept").core) as core:
        report = coreheap.analyze(core)
    assert report.settings is not None
    assert report.settings.malloc[0].is_ratcheted
    assert ratchet_of(report) is None
    assert report.heap is not None
    assert sum(total.chunk_bytes for total in report.heap.totals.values()) > SMALLEST_BYTES


def test_an_environment_that_was_written_over_tells_nothing() -> None:
    """As nginx, sshd and PostgreSQL do to show a title in ps: nobody called mallopt because MALLOC_ARENA_MAX is gone."""
    report = report_on(core_or_skip("retitled").core)
    assert report.settings is not None
    assert report.settings.environment is None
    assert "environment_overwritten" in {gap.cause for gap in report.gaps}
    setting = report.settings.malloc[0].setting("arena_max")
    assert setting is not None
    assert (setting.value, setting.set_by) == (2, SetBy.UNKNOWN)
