"""Findings on processes that were made to have them, with the numbers that the process knew, and on none else."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import numpy as np
import pytest

from coreheap.evidence import Confidence
from coreheap.heap import ChunkState
from coreheap.render.json_document import SchemaName, json_text, schema_text
from coreheap.report import Finding, Report, Severity
from tests.real_cores import cores
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth

Analysed = Callable[[str], tuple[Report, Truth]]

BLOAT, RETAINED, ABORT, OTHER, PARTIAL, LEAK = (
    "ARENA-BLOAT",
    "RETAINED-FREE",
    "ALLOCATOR-ABORT",
    "OTHER-ALLOCATOR",
    "PARTIAL-CORE",
    "LEAK",
)
EXPECTED = {
    "plain_small": {LEAK},
    "threads_small": {LEAK},
    "every_list": {LEAK},
    "mmapped": {LEAK},
    "foreign_sbrk": {LEAK},
    "threads_kept": {BLOAT, RETAINED, LEAK},
    "one_arena": {RETAINED, LEAK},
    "bloat": {BLOAT, RETAINED},
    "bloat_small": {BLOAT, RETAINED},
    "retained": {RETAINED},
    "retained_small": {RETAINED},
    "abort_double_free": {ABORT, LEAK},
    "crash_in_malloc_top": {ABORT, LEAK},
    "crash_in_malloc_next_size": {ABORT, LEAK},
    "crash_in_malloc_unsorted": {LEAK},
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


LEAKING = [case for case, codes in EXPECTED.items() if LEAK in codes]


@pytest.mark.parametrize("case", LEAKING)
def test_leaks_in_numbers(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    finding = finding_of(report, LEAK)
    usable = dict(
        zip(
            truth.live_payload_address.tolist(),
            ((truth.live_size_word & np.uint64(0xFFFFFFF8)) - np.uint64(8)).tolist(),
            strict=True,
        )
    )
    cycles = truth.leaks_of("cycle").tolist()
    # Of each cycle one is the leader; the program makes cycles of two.
    assert finding.quantity("definite_count") == len(truth.leaks_of("definite")) + len(cycles) // 2
    assert finding.quantity("indirect_count") == len(truth.leaks_of("indirect")) + len(cycles) // 2
    lost = [*truth.leaks_of("definite").tolist(), *truth.leaks_of("indirect").tolist(), *cycles]
    assert report.heap is not None
    mmapped_words = 8 * sum(address in mmapped_payloads(report) for address in lost)
    assert finding.quantity("lost_bytes") == sum(usable[address] for address in lost) - mmapped_words
    # A thread that stopped inside malloc lowers the confidence, and so does the damage that stopped it.
    doubts = any(arena.locked for arena in report.heap.arenas) + bool(report.anomaly_count)
    assert finding.confidence is (Confidence.STRONG, Confidence.PLAUSIBLE, Confidence.WEAK)[doubts]
    assert finding.severity is (Severity.WARNING if case == "mmapped" else Severity.INFO)


def mmapped_payloads(report: Report) -> set[int]:
    """Payloads of the mmapped chunks, whose last word the program cannot use up to glibc 2.42."""
    assert report.heap is not None
    headers = report.heap.chunks.index.mmapped.header_address
    return {address + 16 for address in headers.tolist()}


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
