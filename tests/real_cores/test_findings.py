"""Findings on processes that were made to have them, with the numbers that the process knew, and on none else."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import pytest

from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.render.json_document import SchemaName, json_text, schema_text
from coreheap.report import Finding, Report, Severity
from tests.real_cores import cores
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth

Analysed = Callable[[str], tuple[Report, Truth]]

BLOAT, RETAINED, ABORT, OTHER, PARTIAL = (
    "ARENA-BLOAT",
    "RETAINED-FREE",
    "ALLOCATOR-ABORT",
    "OTHER-ALLOCATOR",
    "PARTIAL-CORE",
)
EXPECTED = {
    "plain_small": set(),
    "threads_small": set(),
    "every_list": set(),
    "mmapped": set(),
    "foreign_sbrk": set(),
    "threads_kept": {BLOAT, RETAINED},
    "one_arena": {RETAINED},
    "bloat": {BLOAT, RETAINED},
    "bloat_small": {BLOAT, RETAINED},
    "retained": {RETAINED},
    "retained_small": {RETAINED},
    "abort_double_free": {ABORT},
    "crash_in_malloc_top": {ABORT},
    "crash_in_malloc_next_size": {ABORT},
    "crash_in_malloc_unsorted": set(),
    "other_allocator_jemalloc": {OTHER},
    "other_allocator_tcmalloc": {OTHER},
    "other_allocator_mimalloc": {OTHER},
    "other_allocator_musl": {OTHER},
    "no_glibc_heap": set(),
    "threads_kept@filter_nothing": {PARTIAL},
}
MIB = 1 << 20


@pytest.mark.parametrize("case", EXPECTED)
def test_these_findings_and_no_others(case: str) -> None:
    report = report_on(core_or_skip(case).core)
    assert {finding.code for finding in report.findings} == EXPECTED[case]
    assert report.defects == ()


@pytest.mark.parametrize("case", EXPECTED)
def test_the_json_document_is_valid(case: str) -> None:
    document = json.loads(json_text(report_on(core_or_skip(case).core)))
    jsonschema.validate(document, json.loads(schema_text(SchemaName.REPORT)))


def finding_of(report: Report, code: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.code == code]
    return finding


@pytest.mark.parametrize(("case", "severity"), [("bloat", Severity.WARNING), ("threads_kept", Severity.INFO)])
def test_arena_bloat_in_numbers(analysed: Analysed, case: str, severity: Severity) -> None:
    report, truth = analysed(case)
    finding = finding_of(report, BLOAT)
    assert truth.malloc_info is not None
    others = truth.malloc_info.heaps[1:]
    assert finding.quantity("arenas") == len(others)
    assert finding.quantity("sub_heaps") == sum(heap.subheaps or 0 for heap in others)
    assert finding.quantity("reserved_bytes") == sum(heap.subheaps or 0 for heap in others) * 64 * MIB
    assert finding.quantity("committed_bytes") == sum(heap.aspace_total for heap in others)
    assert finding.quantity("threads") == len(truth.live_threads)
    assert finding.severity is severity
    assert finding.confidence is Confidence.CERTAIN


def test_the_arena_limit_is_known_where_it_was_set(analysed: Analysed) -> None:
    report, _ = analysed("one_arena")
    assert report.heap is not None
    assert report.heap.narenas_limit == 1
    report, _ = analysed("threads_kept")
    assert report.heap is not None
    assert report.heap.narenas_limit is None


@pytest.mark.parametrize("case", ["retained", "retained_small"])
def test_retained_free_in_numbers(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    finding = finding_of(report, RETAINED)
    assert truth.malloc_info is not None
    rest, fast = truth.malloc_info.rest, truth.malloc_info.fast
    binned = rest.count - len(truth.malloc_info.heaps)
    cached = report.totals[ChunkState.TCACHE].chunk_bytes
    # Binned chunks are counted with their PREV_INUSE bit by malloc_info (comparison.compare_arena).
    assert finding.quantity("free_bytes") == rest.bytes - binned + fast.bytes + cached
    assert finding.confidence is Confidence.CERTAIN


@pytest.mark.parametrize("name", ["jemalloc", "tcmalloc", "mimalloc", "musl"])
def test_another_allocator_is_said_plainly(name: str) -> None:
    report = report_on(core_or_skip(f"other_allocator_{name}").core)
    finding = finding_of(report, OTHER)
    assert finding.subject == name
    assert finding.severity is Severity.WARNING
    assert report.other_allocators == (name,)
    assert report.verdict[0].topic == "other_allocator"
    # Nothing of the other allocator's is taken for glibc's.
    assert report.totals[ChunkState.IN_USE].count < 10


@pytest.mark.parametrize("name", cores.fixture_names())
def test_committed_fixtures_have_the_same_findings(name: str) -> None:
    report = report_on(cores.fixture(name).compressed_core)
    assert {finding.code for finding in report.findings} == EXPECTED[name]
