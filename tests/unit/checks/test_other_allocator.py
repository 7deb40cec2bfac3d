"""OTHER-ALLOCATOR names allocators that are loaded, and says how much glibc's own heap holds beside them."""

from __future__ import annotations

import pytest

from coreheap.checks.other_allocator import findings
from coreheap.evidence import Confidence
from coreheap.report import Severity
from tests.core_builder import elf_image
from tests.heap_builder import PAGE
from tests.unit.allocators.built_process import BuiltProcess, build_process, release
from tests.unit.checks.cases import without_heap
from tests.unit.checks.conftest import CaseOf

LIBRARY = 0x7FFF_F7A0_0000
OTHER_MEMORY = 0x7FFF_E000_0000


def with_library(path: str, other_bytes: int = 0) -> BuiltProcess:
    """A process with one more library, and so much anonymous memory more."""
    process = build_process(release("2.36"))
    image = elf_image(build_id=b"\x33" * 20, total_bytes=2 * PAGE, data_bytes=PAGE)
    process.builder.memory.add(LIBRARY, 2 * PAGE)[:] = image[: 2 * PAGE]
    process.flags[LIBRARY] = "r-x"
    process.files.append((LIBRARY, LIBRARY + 2 * PAGE, 0, path))
    if other_bytes:
        process.builder.memory.add(OTHER_MEMORY, other_bytes)
    return process


@pytest.mark.parametrize(
    ("file_name", "allocator"),
    [
        ("libjemalloc.so.2", "jemalloc"),
        ("libtcmalloc_minimal.so.4", "tcmalloc"),
        ("libtcmalloc.so.4.5.16", "tcmalloc"),
        ("libmimalloc.so.2.1", "mimalloc"),
        ("libmimalloc-secure.so", "mimalloc"),
        ("libjemalloc.so", "jemalloc"),
        ("libjemalloc_pic.so.2", "jemalloc"),
        ("ld-musl-x86_64.so.1", "musl"),
        ("libsnmallocshim.so", "snmalloc"),
        ("libhoard.so", "Hoard"),
        ("libtbbmalloc_proxy.so.2", "TBB malloc"),
    ],
)
def test_allocator_beside_a_nearly_empty_heap_is_the_real_one(case_of: CaseOf, file_name: str, allocator: str) -> None:
    case = case_of(with_library(f"/opt/built/lib/{file_name}", 8 << 20))
    (finding,) = findings(case)
    assert finding.code == "OTHER-ALLOCATOR"
    assert finding.subject == allocator
    assert finding.severity is Severity.WARNING
    # What a release leaves in memory is looked for where it is known, and here it is not there.
    is_searched = allocator in ("jemalloc", "tcmalloc", "mimalloc", "musl")
    assert finding.confidence is (Confidence.PLAUSIBLE if is_searched else Confidence.STRONG)
    assert finding.quantity("allocator_bytes") is None
    assert finding.quantity("glibc_heap_nearly_empty") == "true"
    other = finding.quantity("other_anonymous_bytes")
    assert isinstance(other, int)
    assert other >= 8 << 20


def test_allocator_beside_a_heap_in_use_is_a_remark(case_of: CaseOf) -> None:
    (finding,) = findings(case_of(with_library("/opt/built/lib/libhoard.so")))
    assert finding.severity is Severity.INFO
    assert finding.confidence is Confidence.PLAUSIBLE
    (finding,) = findings(case_of(with_library("/opt/built/lib/libjemalloc.so.2")))
    assert finding.severity is Severity.INFO
    assert finding.confidence is Confidence.WEAK
    assert finding.quantity("glibc_heap_nearly_empty") == "false"


@pytest.mark.parametrize(
    "path",
    [
        "/opt/jemalloc/libc.so",
        "/opt/lib/libmyjemalloc.so.2",
        "/opt/lib/libjemallocator.so.1",
        "/opt/lib/libmimallocator.so",
        "/opt/lib/libtbbmalloc.so.2",
    ],
)
def test_other_libraries_are_no_allocators(case_of: CaseOf, path: str) -> None:
    assert findings(case_of(with_library(path, 8 << 20))) == ()


def test_no_heap_at_all_is_no_other_allocator(case_of: CaseOf) -> None:
    assert findings(without_heap(case_of(build_process(release("2.36"))))) == ()


def test_allocator_beside_next_to_nothing_is_a_remark(case_of: CaseOf) -> None:
    case = without_heap(case_of(with_library("/opt/built/lib/libhoard.so")))
    (finding,) = findings(case)
    other = finding.quantity("other_anonymous_bytes")
    assert isinstance(other, int)
    assert other < 1 << 20
    assert (finding.severity, finding.quantity("glibc_heap_nearly_empty")) == (Severity.INFO, "false")


def test_a_run_time_that_left_nothing_in_memory_was_never_started(case_of: CaseOf) -> None:
    process = with_library("/usr/lib/x86_64-linux-gnu/libpython3.11.so.1.0", 8 << 20)
    assert findings(case_of(process)) == ()
    # Where the memory is not in the core, it may have been.
    left_out = [start for start in process.builder.memory.blocks if process.flags.get(start, "rw-") == "rw-"]
    (finding,) = findings(case_of(process, left_out))
    assert (finding.subject, finding.severity, finding.confidence.rank) == ("pymalloc", Severity.INFO, 1)
    (reason,) = [fact.statement for fact in finding.evidence if fact.speaks_against]
    assert "whether it was ever started is not known" in reason


def test_no_heap_in_a_core_without_its_memory_says_nothing(case_of: CaseOf) -> None:
    process = build_process(release("2.36"))
    assert findings(without_heap(case_of(process, (process.threads[0].mapping[0],)))) == ()
    # A library that is mapped says something all the same.
    process = with_library("/opt/built/lib/libjemalloc.so.2")
    (finding,) = findings(without_heap(case_of(process, (process.threads[0].mapping[0],))))
    assert finding.subject == "jemalloc"
