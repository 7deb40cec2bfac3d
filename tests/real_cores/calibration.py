"""How often each finding was given on real cores, by confidence, and how often it was not true.

The cores are those of fixtures/programs that lie in the cache, each with what its process wrote down (truth.py), and of
damaged heaps what was damaged (damage_truth.py). A finding is *wrong* where that refutes it, *right* where it says the same, and *not judged*
where no record tells: the code then counts as given alone. docs/proven.md has the table, with the campaign's counts in it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import Enum

import numpy as np

import coreheap
from coreheap.errors import InputNotUsable
from coreheap.evidence import Confidence
from coreheap.heap import HeapSnapshot
from coreheap.leaks import Verdict
from coreheap.report import Finding, Report
from tests.real_cores import cores
from tests.real_cores.cases import CASES, MATRIX, Case
from tests.real_cores.comparison import copies_of, falsely_lost, verdicts_at
from tests.real_cores.damage_cases import DAMAGE
from tests.real_cores.damage_truth import CORRUPTION, EXPECTED, EXPECTED_MET, Account, Expected, account_of
from tests.real_cores.truth import MEANT, Truth, load_truth

DEFAULT_FILTER = 0x33


class Judgement(Enum):
    RIGHT = "right"
    WRONG = "wrong"
    NOT_JUDGED = "not judged"


@dataclass(frozen=True, slots=True)
class Statement:
    """One finding on one core."""

    core: str
    code: str
    confidence: str
    judgement: Judgement
    why: str = ""


@dataclass(frozen=True, slots=True)
class Calibration:
    cores: int
    statements: tuple[Statement, ...]

    @property
    def wrong(self) -> tuple[Statement, ...]:
        """What was certain or strong and is not true. There must be none."""
        sure = {confidence.value for confidence in Confidence if confidence.rank > Confidence.PLAUSIBLE.rank}
        return tuple(s for s in self.statements if s.judgement is Judgement.WRONG and s.confidence in sure)


def cached() -> list[str]:
    """Every case of the tables whose core is in the cache; those that are only measured are left out."""
    directory = cores.default_directory()
    tables = (CASES, DAMAGE, MATRIX)
    return [
        name
        for table in tables
        for name, case in table.items()
        if not case.slow and (directory / f"{name}.core").exists()
    ]


def count() -> Calibration:
    """Analyses every cached core, on all processors."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = [statements for statements in pool.map(_statements_of, cached()) if statements is not None]
    return Calibration(len(found), tuple(statement for statements in found for statement in statements))


def _statements_of(name: str) -> list[Statement] | None:
    """The findings on a core as it lies in the cache; None where it is being made anew."""
    directory = cores.default_directory()
    core, key = directory / f"{name}.core", directory / f"{name}.key"
    try:
        made = key.read_text()
        truth = load_truth(directory / f"{name}.truth.json.gz")
        with coreheap.open(core) as opened:
            report = coreheap.analyze(opened)
        if key.read_text() != made:
            return None
    except (FileNotFoundError, InputNotUsable):
        return None
    case = cores.case_named(name)
    judgements = [(finding, *judged(finding, report, truth, case)) for finding in report.findings]
    return [Statement(name, f.code, f.confidence.value, judgement, why) for f, judgement, why in judgements]


# ---------------------------------------------------------------------------------- judgements


def judged(finding: Finding, report: Report, truth: Truth, case: Case) -> tuple[Judgement, str]:
    """Whether what the process wrote down refutes the finding, and how."""
    if finding.code in CORRUPTION:
        return _damage(finding, truth, case)
    if finding.code == "ALLOCATOR-ABORT":
        return _abort(finding, truth, case)
    if finding.code == "OTHER-ALLOCATOR":
        return _of(_other_allocator(finding, case))
    if finding.code == "PARTIAL-CORE":
        taken_away = case.program == "splits" and {"how=file", "how=unmap"} & {*case.arguments}
        return _of("the core is complete" if is_complete(truth) and not taken_away else "")
    if finding.code == "UNJOINED-THREADS" and case.program == "unjoined":
        return _of(_unjoined(finding, truth, case))
    if report.heap is not None and truth.events_recorded:
        if finding.code == "LEAK":
            of_emulator = (
                "; qemu writes no memory that the program made inaccessible" if truth.made_by == "qemu" else ""
            )
            wrongly = ", ".join(falsely_lost(report.heap, truth)[:3])
            return _of(wrongly and wrongly + of_emulator)
        if finding.code == "POSSIBLE-LEAK":
            return _of(_possible(report.heap, truth))
    if finding.code in FIGURES and truth.malloc_info is not None and report.heap is not None:
        return _of(_figures(finding, report.heap, truth))
    return Judgement.NOT_JUDGED, ""


def is_complete(truth: Truth) -> bool:
    """Whether the core holds what the process could write: by its filter, and by the mappings that it kept out (VmFlags: dd)."""
    flags = [line.split()[1:] for line in truth.smaps.splitlines() if line.startswith("VmFlags:")]
    left_out = any({"dd", "wr"} <= {*of_mapping} and "sh" not in of_mapping for of_mapping in flags)
    return truth.coredump_filter & DEFAULT_FILTER == DEFAULT_FILTER and not left_out


def _of(why_wrong: str) -> tuple[Judgement, str]:
    return (Judgement.WRONG, why_wrong) if why_wrong else (Judgement.RIGHT, "")


def _damage(finding: Finding, truth: Truth, case: Case) -> tuple[Judgement, str]:
    bare = case.name.rpartition("/")[2]
    how, _, kind = bare.partition("_")
    kind = kind.partition("@")[0]
    if true_code := DONE_WRONG.get(bare):
        return _of("" if finding.code in (true_code, "ALLOCATOR-LOCKED") else f"it is {true_code}")
    if how in ("damaged", "met") and kind in EXPECTED:
        expected = EXPECTED[kind] if how == "damaged" else EXPECTED_MET[kind]
        return _known_damage(finding, expected, account_of(truth), met=how == "met")
    if how == "undamaged" or not is_damaged(truth):
        return Judgement.WRONG, "the heap is sound"
    return Judgement.NOT_JUDGED, ""


DONE_WRONG = {
    "crash_in_malloc_top": "CORRUPTION-OVERFLOW",
    "crash_in_malloc_next_size": "CORRUPTION-OVERFLOW",
    "crash_in_malloc_unsorted": "USE-AFTER-FREE",
    "early_free_chunk": "CORRUPTION-INVALID-FREE",
    "early_free_global": "CORRUPTION-INVALID-FREE",
    "early_free_stack": "CORRUPTION-INVALID-FREE",
    "abort_double_free": "DOUBLE-FREE",
}
"""What these programs did to their heap, where their truth does not say it as the others' does."""


def _abort(finding: Finding, truth: Truth, case: Case) -> tuple[Judgement, str]:
    """The message against what malloc said in the program's own trial of the same operation."""
    bare = case.name.rpartition("/")[2]
    said = account_of(truth).said if bare.startswith("met_") else ""
    if not said or "assertion" in said:
        return Judgement.NOT_JUDGED, ""
    return _of("" if finding.quantity("message") == said else f"malloc said {said!r}")


def is_damaged(truth: Truth) -> bool:
    """Whether the process says that it did anything wrong to its heap."""
    told = {"victim", "culprit", "changed", "overflow", "freed_twice", "wrong_free"} & truth.notes.keys()
    return bool(truth.damage or len(truth.double_freed_payload_address) or told)


def _known_damage(finding: Finding, expected: Expected, account: Account, *, met: bool) -> tuple[Judgement, str]:
    """The code has to be the true one, and a culprit that is named the true culprit."""
    if finding.code == "ALLOCATOR-LOCKED":
        return _of("" if met else "no thread is inside malloc")
    true_codes = set(expected.codes[:1])
    if expected.codes[:2] == ("CORRUPTION-ALLOCATOR-DATA", "CORRUPTION-FREE-LIST"):
        true_codes = set(expected.codes[:2])  # both are true of heads and counts
    if finding.code not in true_codes:
        return Judgement.WRONG, f"it is {expected.codes[0]}"
    culprit = finding.quantity("culprit_address")
    if culprit is not None and culprit != account.culprit:
        return Judgement.WRONG, f"culprit {culprit}, not {account.culprit}"
    return Judgement.RIGHT, ""


def _other_allocator(finding: Finding, case: Case) -> str:
    name = case.name.rpartition("/")[2]
    has = {name.removeprefix("other_allocator_").partition("@")[0]} if name.startswith("other_allocator_") else set()
    has |= {"jemalloc"} if "libjemalloc.so.2" in " ".join(case.arguments) else set()
    return "" if finding.subject in has else f"it has no {finding.subject}"


def _unjoined(finding: Finding, truth: Truth, case: Case) -> str:
    """Against the threads that unjoined.c ended and left: none of its parent's in a fork's child, half as many where the child has some."""
    arguments = dict(word.split("=") for word in case.arguments)
    left = len(truth.notes["ended_stack"]) if arguments["how"] in ("lost", "kept") else 0
    if "fork" in arguments:
        left = int(arguments.get("threads", 60)) // 2 if arguments["fork"] == "2" else 0
    said = finding.quantity("threads")
    return "" if said == left else f"{said} threads, the process left {left}"


def _possible(heap: HeapSnapshot, truth: Truth) -> str:
    """Wrong where every block that may be lost is known to be held."""
    held = [number for number, word in MEANT.items() if word in ("reachable", "weak")]
    kept = truth.meant_payload_address[np.isin(truth.meant_verdict, held)]
    count = int((verdicts_at(heap, truth.live_payload_address) == Verdict.POSSIBLY_LOST).sum())
    known = int((verdicts_at(heap, kept) == Verdict.POSSIBLY_LOST).sum())
    return f"all {count} blocks are held" if count and count == known else ""


FIGURES = ("RETAINED-FREE", "PINNED-HEAP", "FRAGMENTATION", "ARENA-BLOAT", "TCACHE-HOARD")


def _figures(finding: Finding, heap: HeapSnapshot, truth: Truth) -> str:
    """Numbers of free memory and arenas against malloc_info and the tcaches as the process had them."""
    info = truth.malloc_info
    assert info is not None
    if finding.code == "TCACHE-HOARD":
        cached = len(truth.cached_payload_address) + len(truth.orphan_cached_payload_address)
        said = finding.quantity("blocks")
        return "" if said == cached else f"{said} cached blocks, the process had {cached}"
    if finding.code == "ARENA-BLOAT":
        said, others = finding.quantity("arenas"), len(info.heaps) - 1
        return "" if len(heap.copies) > 1 or said == others else f"{said} arenas, the process had {others}"
    free = finding.quantity("free_bytes")
    # malloc_info is one copy's word; the others gave theirs by mallinfo.
    writer = int(truth.notes.get("malloc_info_of", ("0",))[0])
    of_others = sum(copy.free_bytes for copy in copies_of(truth) if copy.number != writer)
    most = of_others + info.rest.bytes + info.fast.bytes + sum(cache.chunk_bytes for cache in heap.thread_caches)
    return f"{free} bytes free, at most {most} are" if isinstance(free, int) and free > most else ""


# ------------------------------------------------------------------------------------ the counts


def rows(statements: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, int, int, int]]:
    """(code, confidence, given, wrong, not judged) of (code, confidence, judgement), the surest first."""
    order = {confidence.value: -confidence.rank for confidence in Confidence}
    counts = Counter(statements)
    kinds = sorted({(code, confidence) for code, confidence, _ in counts}, key=lambda kind: (kind[0], order[kind[1]]))
    result = []
    for code, confidence in kinds:
        of = {judgement: counts[code, confidence, judgement.value] for judgement in Judgement}
        result.append((code, confidence, sum(of.values()), of[Judgement.WRONG], of[Judgement.NOT_JUDGED]))
    return result


def show(found: Calibration) -> None:
    print(f"{found.cores} cores")
    for code, confidence, given, wrong, not_judged in rows(
        [(s.code, s.confidence, s.judgement.value) for s in found.statements]
    ):
        print(f"{code:28} {confidence:10} given {given:5}, wrong {wrong:4}, not judged {not_judged:4}")
    for statement in found.statements:
        if statement.judgement is Judgement.WRONG:
            print(f"  {statement.core}: {statement.code} {statement.confidence}: {statement.why}")


def document(found: Calibration, revision: str) -> dict[str, object]:
    """What is kept: fixtures/facts/calibration.json."""
    counted = rows([(s.code, s.confidence, s.judgement.value) for s in found.statements])
    wrong = [{**asdict(s), "judgement": s.judgement.value} for s in found.wrong]
    return {"revision": revision, "cores": found.cores, "rows": counted, "wrong": wrong}
