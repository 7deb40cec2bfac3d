"""Chunks that have a mapping of their own: found by their headers, reconciled with mp_'s counters.

Knows: nothing links mmapped chunks; n_mmaps and mmapped_mem are the only global facts about them (malloc.c,
sysmalloc_mmap and munmap_chunk, 2.12-2.44). Does not know: arenas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.holes import holes_within
from coreheap.allocators.glibc.locate import anonymous_ranges
from coreheap.allocators.glibc.mmapped_headers import bytes_of, headers_that_fit, with_remapped, with_torn
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import IS_MMAPPED
from coreheap.corefile import AddressSpace, Core
from coreheap.evidence import Anomaly, Evidence, Gap, Strength
from coreheap.kernels import MmappedChunks
from coreheap.quantities import AddressRange, format_bytes

MOST_SURPLUS = 3
"""Headers too many that are told from real ones by the bytes they add; more are only reported."""

MOST_COMBINED = 64
MOST_RANGES = 1 << 12
"""Stretches of anonymous memory in which the mapping of a damaged header is looked for."""
GAPS_KEPT = 100
REFERENCE_SCAN_LIMIT = 2 << 30
REFERENCE_BLOCK_WORDS = 1 << 20


@dataclass(frozen=True, slots=True)
class MmappedFindings:
    """The chunks, and how sure it is that they are all and no others."""

    chunks: MmappedChunks
    anomalies: tuple[Anomaly, ...]
    evidence: tuple[Evidence, ...]
    gaps: tuple[Gap, ...]


def find_mmapped(
    core: Core,
    layout: Layout,
    excluded: list[tuple[int, int]],
    n_mmaps: int | None,
    mmapped_mem: int | None,
    counter_places: tuple[int, int] | None = None,
) -> MmappedFindings:
    """Chunks with mappings of their own in anonymous memory outside ``excluded``.

    Looks only at pages that the core file has content for. Where more headers fit than n_mmaps counts, the surplus is
    dropped when mp_'s counters leave one choice only; otherwise all are kept and the contradiction is a gap, or an anomaly that
    names the counter at ``counter_places`` (of n_mmaps and mmapped_mem, None where there are several copies of malloc). A
    mapping that was not saved to its end is left out with a gap where memalign may have put the chunk's header further in.
    """
    findings = _held_against_counters(core, layout, excluded, n_mmaps, mmapped_mem, counter_places)
    return replace(findings, gaps=(*findings.gaps, *_holes_of(core.memory, findings.chunks)))


def _held_against_counters(
    core: Core,
    layout: Layout,
    excluded: list[tuple[int, int]],
    n_mmaps: int | None,
    mmapped_mem: int | None,
    counter_places: tuple[int, int] | None,
) -> MmappedFindings:
    found = headers_that_fit(core, layout, anonymous_ranges(core, excluded))
    found = with_remapped(core, layout, excluded, found, n_mmaps, mmapped_mem)
    found = with_torn(core, layout, excluded, found, n_mmaps, mmapped_mem)
    is_saved = _is_saved_to_its_end(core.memory, found)
    whole = is_saved | _begins_where_it_says(core, layout, found, ~is_saved)
    gaps = tuple(
        Gap(
            "mmapped_chunk_cut",
            "a mapping that begins like an mmapped chunk is not in the core to its end: where its block begins is unknown",
            AddressRange(int(start), int(start) + int(size)),
        )
        for start, size in zip(
            found.mapping_start[~whole][:GAPS_KEPT], found.mapping_bytes[~whole][:GAPS_KEPT], strict=True
        )
    )
    found = _rows(found, whole)
    exact = not layout.generation.mmapped_mem_drifts
    evidence: list[Evidence] = []
    if n_mmaps is not None and mmapped_mem is not None and len(found) > n_mmaps:
        surplus_bytes = bytes_of(found) - mmapped_mem
        if not exact:
            # mremap leaves mmapped_mem some words too high (2.43, 2.44); mappings are whole pages.
            surplus_bytes += -surplus_bytes % core.page_bytes
        found, evidence = _without_surplus(core, found, len(found) - n_mmaps, surplus_bytes)
    total = bytes_of(found)
    if n_mmaps == len(found) and mmapped_mem == total and n_mmaps:
        evidence.append(
            Evidence(
                f"{n_mmaps} mmapped chunks of {format_bytes(total)} are what mp_ counts, to the byte",
                "mp_.n_mmaps and mmapped_mem",
                Strength.PROOF,
            )
        )
    if n_mmaps is not None and mmapped_mem is not None and len(found) + 1 == n_mmaps and not gaps:
        missing = _damaged_header(core, layout, excluded, found, mmapped_mem - total)
        if missing is not None:
            return MmappedFindings(_with_row(found, missing, layout), (missing.anomaly,), tuple(evidence), gaps)
    if n_mmaps == len(found) and mmapped_mem is not None and not gaps:
        missing_bytes = mmapped_mem - total
        repaired = _with_one_bit_repaired(core, excluded, found, missing_bytes - missing_bytes % core.page_bytes)
        if repaired is not None:
            return MmappedFindings(repaired[0], (repaired[1],), tuple(evidence), gaps)
    if gaps or n_mmaps is None or mmapped_mem is None:
        return MmappedFindings(found, (), tuple(evidence), gaps)
    # Where mremap lets mmapped_mem drift, it is some words too high: whole pages are what is mapped.
    counted = mmapped_mem if exact else mmapped_mem - mmapped_mem % core.page_bytes
    anomalies, doubts = _contradictions(found, n_mmaps, counted, exact, counter_places)
    return MmappedFindings(found, anomalies, tuple(evidence), doubts)


@dataclass(frozen=True, slots=True)
class _Missing:
    """The mapping of a chunk whose header is damaged."""

    start: int
    byte_count: int
    anomaly: Anomaly


def _damaged_header(
    core: Core, layout: Layout, excluded: list[tuple[int, int]], found: MmappedChunks, missing_bytes: int
) -> _Missing | None:
    """The one mapping that mp_ counts and no header shows, where all else proves which it is.

    It must be as long as mmapped_mem says, at one end of memory that nothing else has (the kernel places each new mapping
    against another), and the only such place where the size word is still what sysmalloc_mmap wrote, or where a pointer leads to
    the payload and the first word or the room fits. A chunk of memalign is not looked for.
    """
    page = core.page_bytes
    missing_bytes -= missing_bytes % page  # 2.43 and 2.44 count some words too many
    if missing_bytes <= 0 or core.memory.saved_bytes > REFERENCE_SCAN_LIMIT:
        return None
    taken = zip(found.mapping_start.tolist(), (found.mapping_start + found.mapping_bytes).tolist(), strict=True)
    free = anonymous_ranges(core, [*excluded, *taken])
    phase = layout.aligned_header(0)
    size_word = missing_bytes - phase - layout.mmapped_trailer_bytes | IS_MMAPPED
    candidates: dict[int, tuple[int, int, bool]] = {}
    for start, end in free[:MOST_RANGES]:
        start += -start % page
        for at in {start, end - missing_bytes}:
            if start <= at and at + missing_bytes <= end and core.memory.is_saved(at, at + missing_bytes):
                words = core.memory.read_words(at + phase, 2).tolist()
                candidates[at] = (words[0], words[1], end - start == missing_bytes)
    if not candidates:
        return None
    starts = np.array(sorted(candidates), np.uint64)
    pointed = ~_unpointed(core.memory, starts + np.uint64(phase + 2 * core.word_bytes))
    chosen = []
    for at, is_pointed_to in zip(starts.tolist(), pointed.tolist(), strict=True):
        first, second, fills_the_gap = candidates[at]
        if second == size_word or (is_pointed_to and (first == phase or fills_the_gap)):
            chosen.append(at)
    if len(chosen) != 1:
        return None
    header, (first, second, _) = chosen[0] + phase, candidates[chosen[0]]
    is_size = second != size_word
    anomaly = Anomaly(
        "mmapped_header_damaged",
        header,
        f"the header of an mmapped chunk of {format_bytes(missing_bytes)}, which mp_ counts and no other header shows",
        f"prev_size {first:#x}, size word {second:#x}",
        word_address=header + (core.word_bytes if is_size else 0),
        observed_word=second if is_size else first,
        expected_word=size_word if is_size else phase,
        header_address=header,
    )
    return _Missing(chosen[0], missing_bytes, anomaly)


def _with_one_bit_repaired(
    core: Core, excluded: list[tuple[int, int]], found: MmappedChunks, missing_bytes: int
) -> tuple[MmappedChunks, Anomaly] | None:
    """The table with the one size word mended of which one bit keeps the mappings from what mmapped_mem counts.

    None where it is not one bit, or where not exactly one chunk ends with that bit at the end of memory that nothing else
    has. A bit too many is not looked for: mremap_chunk writes the larger size before it counts it.
    """
    if missing_bytes <= 0 or missing_bytes.bit_count() != 1 or missing_bytes % core.page_bytes:
        return None
    taken = zip(found.mapping_start.tolist(), (found.mapping_start + found.mapping_bytes).tolist(), strict=True)
    free = np.array(anonymous_ranges(core, [*excluded, *taken]), np.uint64).reshape(-1, 2)
    ends = found.mapping_start + found.mapping_bytes
    gap = np.searchsorted(free[:, 0], ends)
    inside = gap < len(free)
    inside[inside] = (free[gap[inside], 0] == ends[inside]) & (
        free[gap[inside], 1] == ends[inside] + np.uint64(missing_bytes)
    )
    rows = np.flatnonzero(inside & (found.chunk_bytes & np.uint64(missing_bytes) == 0)).tolist()
    rows = [row for row in rows if core.memory.is_saved(int(ends[row]), int(ends[row]) + missing_bytes)]
    if len(rows) != 1:
        return None
    header = int(found.header_address[rows[0]])
    observed = int(core.memory.read_word(header + core.word_bytes))
    added = np.zeros(len(found), np.uint64)
    added[rows[0]] = missing_bytes
    table = MmappedChunks(
        found.header_address, found.mapping_start, found.mapping_bytes + added, found.chunk_bytes + added
    )
    return table, Anomaly(
        "mmapped_header_damaged",
        header,
        f"the header of an mmapped chunk that fills its mapping of {format_bytes(int(table.mapping_bytes[rows[0]]))}, as"
        " mp_.mmapped_mem counts it",
        f"size word {observed:#x}",
        word_address=header + core.word_bytes,
        observed_word=observed,
        expected_word=observed | missing_bytes,
        header_address=header,
    )


def _with_row(found: MmappedChunks, missing: _Missing, layout: Layout) -> MmappedChunks:
    """The table with the chunk whose header is damaged, as malloc made it."""
    row = int(np.searchsorted(found.mapping_start, missing.start))
    header = layout.aligned_header(missing.start)
    chunk_bytes = missing.byte_count - (header - missing.start) - layout.mmapped_trailer_bytes
    return MmappedChunks(
        np.insert(found.header_address, row, np.uint64(header)),
        np.insert(found.mapping_start, row, np.uint64(missing.start)),
        np.insert(found.mapping_bytes, row, np.uint64(missing.byte_count)),
        np.insert(found.chunk_bytes, row, np.uint64(chunk_bytes)),
    )


def _is_saved_to_its_end(memory: AddressSpace, found: MmappedChunks) -> npt.NDArray[np.bool_]:
    """For each mapping whether the core holds every byte of it; bool[n]."""
    if not len(found) or not len(memory.run_start):
        return np.zeros(len(found), bool)
    before = np.cumsum(memory.run_end - memory.run_start) - (memory.run_end - memory.run_start)

    def saved_below(address: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        # Every mapping that was found begins in a run, so one starts at or before each of these addresses.
        run = np.maximum(np.searchsorted(memory.run_start, address, side="right") - 1, 0)
        held: npt.NDArray[np.uint64] = before[run] + np.minimum(address, memory.run_end[run]) - memory.run_start[run]
        return held

    end = found.mapping_start + found.mapping_bytes
    whole: npt.NDArray[np.bool_] = saved_below(end) - saved_below(found.mapping_start) == found.mapping_bytes
    return whole


def _holes_of(memory: AddressSpace, found: MmappedChunks) -> list[Gap]:
    """What of the chunks' mappings is not in the core or not theirs any more; of the first GAPS_KEPT chunks with such."""
    start, end = found.mapping_start, found.mapping_start + found.mapping_bytes
    shows_file = np.concatenate([[0], np.cumsum(~memory.region_is_anonymous)])
    first = np.searchsorted(memory.region_end, start, side="right")
    is_covered = shows_file[np.searchsorted(memory.region_start, end)] > shows_file[first]
    torn = np.flatnonzero(~_is_saved_to_its_end(memory, found) | is_covered)[:GAPS_KEPT]
    holes = (holes_within(memory, *place) for place in zip(start[torn].tolist(), end[torn].tolist(), strict=True))
    return [hole.gap for hole in islice(chain.from_iterable(holes), GAPS_KEPT)]


def _begins_where_it_says(
    core: Core, layout: Layout, found: MmappedChunks, rows: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Which chunks of the rows have no header further in, though not all of their mapping is saved; bool[n].

    memalign's header names what it left before it, so that there is no other; a header at the start of a mapping is the chunk's
    where a word of the core leads to its payload.
    """
    phase = np.uint64(layout.aligned_header(0))
    is_memaligned = rows & (found.header_address - found.mapping_start > phase)
    asked = np.flatnonzero(rows & ~is_memaligned)
    proven = is_memaligned
    if len(asked) and core.memory.saved_bytes <= REFERENCE_SCAN_LIMIT:
        proven[asked] = ~_unpointed(core.memory, found.header_address[asked] + np.uint64(2 * core.word_bytes))
    return proven


def _rows(table: MmappedChunks, keep: npt.NDArray[np.bool_]) -> MmappedChunks:
    return MmappedChunks(
        table.header_address[keep], table.mapping_start[keep], table.mapping_bytes[keep], table.chunk_bytes[keep]
    )


def _without_surplus(
    core: Core, found: MmappedChunks, surplus_count: int, surplus_bytes: int
) -> tuple[MmappedChunks, list[Evidence]]:
    """The table without headers that only look like chunks, as far as the counters decide which those are.

    A thread's stack pointer does not lie in a block of malloc; a header to whose payload nothing points is rather a
    mapping of the program's own. The first rule that leaves exactly one choice is taken.
    """
    rules: tuple[tuple[str, Callable[[], npt.NDArray[np.bool_]]], ...] = (
        ("no other choice adds up", lambda: np.ones(len(found), bool)),
        ("they hold thread stacks", lambda: _holds_stack(core, found)),
        ("nothing points to their payload", lambda: _unreferenced(core.memory, found)),
    )
    if not 0 < surplus_count <= MOST_SURPLUS:
        return found, []
    for reason, suspects in rules:
        drop = _only_choice(found, np.flatnonzero(suspects()), surplus_count, surplus_bytes)
        if drop is not None:
            keep = np.ones(len(found), bool)
            keep[list(drop)] = False
            fact = Evidence(
                f"{surplus_count} headers that look like mmapped chunks are left out: mp_ counts fewer, and {reason}",
                "mp_.n_mmaps and mmapped_mem",
                Strength.HINT,
                int(found.header_address[drop[0]]),
            )
            return _rows(found, keep), [fact]
    return found, []


def _only_choice(
    found: MmappedChunks, suspects: npt.NDArray[np.intp], count: int, byte_count: int
) -> tuple[int, ...] | None:
    """The one set of ``count`` suspects whose mappings have exactly so many bytes; None where there is none or several."""
    if not len(suspects) or (count > 1 and len(suspects) > MOST_COMBINED):
        return None
    sizes = dict(zip(suspects.tolist(), found.mapping_bytes[suspects].tolist(), strict=True))
    matches = [choice for choice in combinations(sizes, count) if sum(sizes[row] for row in choice) == byte_count]
    return matches[0] if len(matches) == 1 else None


def _holds_stack(core: Core, found: MmappedChunks) -> npt.NDArray[np.bool_]:
    stacks = np.sort(np.array([thread.stack_pointer or 0 for thread in core.threads], dtype=np.uint64))
    first = np.searchsorted(stacks, found.mapping_start)
    return np.searchsorted(stacks, found.mapping_start + found.mapping_bytes) > first


def _unreferenced(memory: AddressSpace, found: MmappedChunks) -> npt.NDArray[np.bool_]:
    """Which chunks no word of saved memory points to, payload start taken; all False when that is too much to read."""
    if memory.saved_bytes > REFERENCE_SCAN_LIMIT:
        return np.zeros(len(found), bool)
    return _unpointed(memory, found.header_address + np.uint64(2 * memory.word_bytes))


def _unpointed(memory: AddressSpace, payload: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of the addresses, ascending, no word of saved memory holds; bool[n]."""
    seen = np.zeros(len(payload), bool)
    for start, end in zip(memory.run_start.tolist(), memory.run_end.tolist(), strict=True):
        for block in range(start, end, REFERENCE_BLOCK_WORDS * memory.word_bytes):
            count = min(end - block, REFERENCE_BLOCK_WORDS * memory.word_bytes) // memory.word_bytes
            words = memory.read_words(block, count)
            inside = words[(words >= payload[0]) & (words <= payload[-1])]
            seen |= np.isin(payload, inside)
    return ~seen


def _contradictions(
    found: MmappedChunks, n_mmaps: int, mmapped_mem: int, is_exact: bool, places: tuple[int, int] | None
) -> tuple[tuple[Anomaly, ...], tuple[Gap, ...]]:
    """What does not agree with mp_.

    Only where the bytes agree and the count does not is it the count that is wrong. Else chunks may be hidden from the search, or
    what was found be none: that is a gap, and no word against mp_.
    """
    total = bytes_of(found)
    if n_mmaps == len(found) and (mmapped_mem == total or not is_exact):
        return (), ()
    if mmapped_mem == total:
        anomaly = Anomaly(
            "mmapped_count_mismatch",
            int(found.header_address[0]) if len(found) else 0,
            f"{n_mmaps} mmapped chunks (mp_.n_mmaps)",
            f"{len(found)} headers that fit",
            word_address=places[0] if places is not None else None,
            observed_word=n_mmaps,
            expected_word=len(found),
        )
        return (anomaly,), ()
    gap = Gap(
        "mmapped_chunks_differ",
        f"mp_ counts {n_mmaps} mmapped chunks of {format_bytes(mmapped_mem)}, {len(found)} of {format_bytes(total)} were found:"
        " chunks may be missing, or be something else",
    )
    return (), (gap,)
