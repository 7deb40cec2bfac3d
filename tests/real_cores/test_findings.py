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
from tests.real_cores.cases import MATRIX
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth

Analysed = Callable[[str], tuple[Report, Truth]]

BLOAT, RETAINED, ABORT, OTHER, PARTIAL, LEAK, RATCHET, PINNED, FRAGMENTED, HOARD = (
    "ARENA-BLOAT",
    "RETAINED-FREE",
    "ALLOCATOR-ABORT",
    "OTHER-ALLOCATOR",
    "PARTIAL-CORE",
    "LEAK",
    "THRESHOLD-RATCHET",
    "PINNED-HEAP",
    "FRAGMENTATION",
    "TCACHE-HOARD",
)
OVERFLOW, WRITTEN, LOCKED = "CORRUPTION-OVERFLOW", "USE-AFTER-FREE", "ALLOCATOR-LOCKED"
EXPECTED = {
    "plain_small": {LEAK},
    "threads_small": {LEAK},
    "every_list": {LEAK},
    "mmapped": {LEAK},
    "foreign_sbrk": {LEAK},
    "threads_kept": {BLOAT, LEAK},
    "one_arena": {RETAINED, LEAK},
    "bloat": {BLOAT},
    "bloat_small": {BLOAT},
    "retained": {PINNED},
    "retained_small": {PINNED},
    "retained_trimmed": set(),
    "pinned_sub_heaps": {PINNED},
    "fragmented": {FRAGMENTED},
    "tcache_hoards": {HOARD},
    "trim": {RETAINED},
    "trim@trimmed": {FRAGMENTED},
    "ratchet": {RETAINED, RATCHET},
    "ratchet@given": set(),
    "ratchet@late": {RATCHET},  # what it retains was never touched
    "stacks": {"STACK-MEMORY"},
    "abort_double_free": {ABORT, LEAK, "DOUBLE-FREE"},
    "crash_in_malloc_top": {ABORT, LEAK, OVERFLOW, LOCKED},
    "crash_in_malloc_next_size": {ABORT, LEAK, OVERFLOW, LOCKED},
    "crash_in_malloc_unsorted": {LEAK, WRITTEN, LOCKED},
    "other_allocator_jemalloc": {OTHER},
    "other_allocator_tcmalloc": {OTHER},
    "other_allocator_mimalloc": {OTHER},
    "other_allocator_musl": {OTHER},
    "no_glibc_heap": set(),
    "no_libc@0": set(),
    "no_libc@30": set(),
    "threads_kept@filter_nothing": {PARTIAL},
}
MIB = 1 << 20


@pytest.mark.parametrize("case", EXPECTED)
def test_these_findings_and_no_others(case: str) -> None:
    report = report_on(core_or_skip(case).core)
    assert {finding.code for finding in report.findings} == EXPECTED[case]
    assert report.defects == ()


LEADS = {
    "bloat": "arena_bloat",
    "retained": "retained_free",
    "fragmented": "retained_free",
    "mmapped": "mmapped_chunks",
    "stacks": "thread_stacks",
    "other_allocator_jemalloc": "other_allocator",
    "other_allocator_tcmalloc": "other_allocator",
}
"""What took most of the memory of each process, and so leads its verdict."""


@pytest.mark.parametrize("case", LEADS)
def test_the_verdict_begins_with_what_took_most(case: str) -> None:
    report = report_on(core_or_skip(case).core)
    items = [item for item in report.verdict if item.whole == "writable_private"]
    assert items[0].topic == LEADS[case]
    assert sum(item.bytes for item in items) == items[0].of_bytes
    for item in items:
        assert item.resident_low is None or item.resident_high is not None
        assert item.resident_high is None or 0 <= (item.resident_low or 0) <= item.resident_high <= item.bytes
    # Below the sum of what the core says of all writable private memory, and no part of it twice.
    mappings = report.mappings
    assert mappings is not None
    assert sum(item.resident_low or 0 for item in items) <= int(mappings.resident_high.sum())


@pytest.mark.parametrize("case", EXPECTED)
def test_the_json_document_is_valid(case: str) -> None:
    document = json.loads(json_text(report_on(core_or_skip(case).core)))
    jsonschema.validate(document, json.loads(schema_text(SchemaName.REPORT)))


def finding_of(report: Report, code: str) -> Finding:
    (finding,) = [finding for finding in report.findings if finding.code == code]
    return finding


@pytest.mark.parametrize("case", ["bloat", "threads_kept"])
def test_arena_bloat_in_numbers(analysed: Analysed, case: str) -> None:
    report, truth = analysed(case)
    finding = finding_of(report, BLOAT)
    assert truth.malloc_info is not None
    others = truth.malloc_info.heaps[1:]
    assert finding.quantity("arenas") == len(others)
    assert finding.quantity("sub_heaps") == sum(heap.subheaps or 0 for heap in others)
    assert finding.quantity("reserved_bytes") == sum(heap.subheaps or 0 for heap in others) * 64 * MIB
    assert finding.quantity("committed_bytes") == sum(heap.aspace_total for heap in others)
    assert finding.quantity("threads") == len(truth.live_threads)
    # Gibibytes of address space, and less than 64 MiB of memory
    assert finding.severity is Severity.INFO
    assert finding.confidence is Confidence.CERTAIN


def test_the_arena_limit_is_known_where_it_was_set(analysed: Analysed) -> None:
    report, _ = analysed("one_arena")
    assert report.heap is not None
    assert report.heap.narenas_limit == 1
    report, _ = analysed("threads_kept")
    assert report.heap is not None
    assert report.heap.narenas_limit is None


@pytest.mark.parametrize(("case", "code"), [("one_arena", RETAINED), ("retained", PINNED), ("retained_small", PINNED)])
def test_free_bytes_are_those_of_malloc_info(analysed: Analysed, case: str, code: str) -> None:
    report, truth = analysed(case)
    finding = finding_of(report, code)
    assert truth.malloc_info is not None
    rest, fast = truth.malloc_info.rest, truth.malloc_info.fast
    binned = rest.count - len(truth.malloc_info.heaps)
    cached = report.totals[ChunkState.TCACHE].chunk_bytes if code == RETAINED else 0
    # Binned chunks are counted with their PREV_INUSE bit by malloc_info (comparison.compare_arena).
    assert finding.quantity("free_bytes") == rest.bytes - binned + fast.bytes + cached
    assert finding.confidence is Confidence.CERTAIN


def test_few_arenas_by_setting_are_no_bloat(analysed: Analysed) -> None:
    """What the threads retain in two arenas differs from run to run; arena bloat it never is, and no two findings say the same."""
    report, truth = analysed("bloat_arena_max")
    assert report.heap is not None
    assert truth.malloc_info is not None
    assert report.heap.narenas_limit == len(truth.malloc_info.heaps) == 2
    found = [finding.code for finding in report.findings]
    assert len(found) <= 1
    assert set(found) <= {RETAINED, PINNED}


OF_RELEASES = {
    "pinned_sub_heaps": {PINNED},
    "fragmented": {FRAGMENTED},
    "tcache_hoards": {HOARD},
    "retained": {PINNED},
    "retained_trimmed": set(),
    "trim": {RETAINED},
}


@pytest.mark.parametrize(
    "name", [name for name in MATRIX if name.split("/")[1] in OF_RELEASES and not name.split("/")[0].endswith("-arm64")]
)
def test_free_memory_of_every_release(name: str) -> None:
    report = report_on(core_or_skip(name).core)
    assert {finding.code for finding in report.findings} == OF_RELEASES[name.split("/")[1]]


def test_pins_in_numbers(analysed: Analysed) -> None:
    """One block at the end of each sub-heap is what keeps it; the program knows no other live block there."""
    report, truth = analysed("pinned_sub_heaps")
    finding = finding_of(report, PINNED)
    blocks = truth.live_requested_bytes == 64 * MIB // 2000
    addresses = truth.live_payload_address[blocks].tolist()
    sizes = (truth.live_size_word[blocks] & np.uint64(0xFFFFFFF8)).tolist()
    # The newest sub-heap of each of the two threads has hardly more than its one block.
    newest = {max(same) for same in in_newest_sub_heaps(report, addresses)}
    kept = {address: size for address, size in zip(addresses, sizes, strict=True) if address not in newest}
    assert finding.quantity("heaps") == finding.quantity("pin_count") == len(kept) == 6
    assert finding.quantity("pin_bytes") == sum(kept.values())
    assert report.free_memory is not None
    pinned = {pin.header_address + 16 for pin in report.free_memory.pins if pin.pages_below_bytes > MIB}
    assert pinned == set(kept)
    assert finding.quantity("trim_resident_low_bytes") == finding.quantity("trim_resident_high_bytes")
    assert finding.confidence is Confidence.CERTAIN


def in_newest_sub_heaps(report: Report, addresses: list[int]) -> list[list[int]]:
    """The blocks of each arena's newest sub-heap, of the arenas that have any."""
    assert report.heap is not None
    tops = [arena.top_address or 0 for arena in report.heap.arenas if not arena.is_main]
    of_heap = [[address for address in addresses if address // (64 * MIB) == top // (64 * MIB)] for top in tops]
    return [found for found in of_heap if found]


def test_the_pin_of_the_main_heap_is_its_last_block(analysed: Analysed) -> None:
    report, truth = analysed("retained")
    finding = finding_of(report, PINNED)
    assert report.heap is not None
    main = report.heap.arenas[0]
    last = max(address for address in truth.live_payload_address.tolist() if address < (main.top_address or 0))
    assert finding.quantity("largest_pin") == last - 16
    assert finding.quantity("pin_count") == 1


def test_fragments_in_numbers(analysed: Analysed) -> None:
    report, truth = analysed("fragmented")
    finding = finding_of(report, FRAGMENTED)
    assert truth.malloc_info is not None
    # No page of the blocks is free as a whole: what is, lies in top.
    top = report.totals[ChunkState.TOP].chunk_bytes
    assert 0 <= int(finding.quantity("free_bytes") or 0) - int(finding.quantity("shared_page_bytes") or 0) <= top
    assert int(finding.quantity("shared_page_bytes") or 0) > 23 * MIB
    assert finding.quantity("trim_resident_high_bytes") == 0


def test_hoards_in_numbers(analysed: Analysed) -> None:
    report, truth = analysed("tcache_hoards")
    finding = finding_of(report, HOARD)
    assert finding.quantity("blocks") == len(truth.cached_payload_address)
    assert finding.quantity("caches") == len(set(truth.cached_owner_tid.tolist()))
    assert finding.quantity("tcache_bytes") == report.totals[ChunkState.TCACHE].chunk_bytes
    assert finding.quantity("tcache_count") == 2000


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
