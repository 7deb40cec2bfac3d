"""THRESHOLD-RATCHET: malloc raised its own thresholds, and large blocks that were freed stay in its heaps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from coreheap.checks.protocol import Case
from coreheap.doubts import heap_doubts
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.heap import LISTED_FREE_STATES, Arena, ChunkState, HeapSnapshot
from coreheap.kernels.large import large_chunks
from coreheap.quantities import MIB, format_bytes, format_count
from coreheap.report import Finding, Quantity, Severity, Unit
from coreheap.settings import MallocSettings

SMALLEST_BYTES = 8 * MIB
"""Less is not worth a system call for each large block."""
SMALLEST_SHARE = 0.1
"""Share of what the arenas hold that stays because of the thresholds, from which it is worth a word."""
WARNING_BYTES = 64 * MIB
WARNING_SHARE = 0.25

MERGED_FOR_EACH = 16
"""Bytes that grew together for each byte of a block that is seen to be large: at a peak there were more of these."""
MANY_MAPPINGS = 30_000
"""Half of vm.max_map_count's default, 65530, and of mp_.n_mmaps_max, 65536."""

_FREE = np.array([*LISTED_FREE_STATES, ChunkState.FREE_UNLISTED], np.uint8)


@dataclass(frozen=True, slots=True)
class _Ratchet:
    """The thresholds of one copy of malloc: as they are, and as they were at the start."""

    copy: int
    mmap_threshold: int
    first_mmap_threshold: int
    trim_threshold: int
    first_trim_threshold: int
    top_pad: int | None


@dataclass(slots=True)
class _Consequence:
    """What the raised thresholds of one copy of malloc keep."""

    live_count: int = 0
    live_bytes: int = 0
    free_count: int = 0
    free_bytes: int = 0
    merged_bytes: int = 0
    top_bytes: int = 0
    held_bytes: int = 0

    @property
    def kept_bytes(self) -> int:
        return self.free_bytes + self.merged_bytes + self.top_bytes


def findings(case: Case) -> tuple[Finding, ...]:
    """A finding for each copy of malloc whose thresholds were ratcheted and now keep much."""
    heap, settings = case.heap, case.settings
    if heap is None or settings is None:
        return ()
    ratchets = (_ratchet_of(malloc) for malloc in settings.malloc)
    found = (_finding(heap, ratchet, _consequence(heap, ratchet)) for ratchet in ratchets if ratchet is not None)
    return tuple(finding for finding in found if finding is not None)


def _ratchet_of(malloc: MallocSettings) -> _Ratchet | None:
    """The thresholds; None where malloc did not raise them by itself."""
    threshold, trim = malloc.setting("mmap_threshold"), malloc.setting("trim_threshold")
    if not malloc.is_ratcheted or threshold is None or trim is None:
        return None
    if threshold.value is None or threshold.default is None or trim.value is None or trim.default is None:
        return None
    return _Ratchet(malloc.copy, threshold.value, threshold.default, trim.value, trim.default, malloc.value("top_pad"))


def _consequence(heap: HeapSnapshot, ratchet: _Ratchet) -> _Consequence:
    """Blocks that would have had mappings of their own with the first threshold, and tops that free() would have cut."""
    result = _Consequence()
    for arena in heap.arenas:
        if arena.copy == ratchet.copy:
            result.held_bytes += sum(total.chunk_bytes for total in arena.totals.values())
            _count_blocks(heap, arena, ratchet, result)
            _count_top(arena, ratchet, result)
    return result


def _count_blocks(heap: HeapSnapshot, arena: Arena, ratchet: _Ratchet, result: _Consequence) -> None:
    index = heap.chunks.index
    parts = [large_chunks(index, region, ratchet.first_mmap_threshold) for region in arena.regions]
    if not parts:
        return
    chunk_bytes = np.concatenate([part.chunk_bytes for part in parts])
    state = np.concatenate([part.state for part in parts])
    is_below = chunk_bytes < np.uint64(ratchet.mmap_threshold)
    is_free = np.isin(state, _FREE)
    is_live = (state == ChunkState.IN_USE) & is_below
    result.live_count += int(np.count_nonzero(is_live))
    result.live_bytes += int(chunk_bytes[is_live].sum())
    result.free_count += int(np.count_nonzero(is_free & is_below))
    result.free_bytes += int(chunk_bytes[is_free & is_below].sum())
    # Larger than any block that malloc takes from a heap: neighbours that grew together. Small ones do so as well, so they count
    # in proportion to the large blocks that are seen to come from this heap.
    large_bytes = int(chunk_bytes[is_live].sum()) + int(chunk_bytes[is_free & is_below].sum())
    if np.any(is_live):
        result.merged_bytes += min(int(chunk_bytes[is_free & ~is_below].sum()), MERGED_FOR_EACH * large_bytes)


def _count_top(arena: Arena, ratchet: _Ratchet, result: _Consequence) -> None:
    """What free() would have given back of a top above the first trim_threshold: all but top_pad."""
    if arena.top_bytes is None or ratchet.top_pad is None:
        return
    if ratchet.first_trim_threshold <= arena.top_bytes < ratchet.trim_threshold:
        result.top_bytes += max(0, arena.top_bytes - ratchet.top_pad)


def _finding(heap: HeapSnapshot, ratchet: _Ratchet, kept: _Consequence) -> Finding | None:
    if kept.kept_bytes < SMALLEST_BYTES or kept.kept_bytes < SMALLEST_SHARE * kept.held_bytes:
        return None
    first = ratchet.first_mmap_threshold
    severe = kept.kept_bytes >= WARNING_BYTES and kept.kept_bytes >= WARNING_SHARE * kept.held_bytes
    doubts = heap_doubts(heap)
    evidence = (*_evidence(heap, ratchet, kept), *(doubt.fact for doubt in doubts))
    return Finding(
        code="THRESHOLD-RATCHET",
        severity=Severity.WARNING if severe else Severity.INFO,
        confidence=confidence_from(evidence),
        subject="malloc's thresholds" if ratchet.copy == 0 else f"thresholds of malloc's copy {ratchet.copy}",
        quantities=(
            Quantity("mmap_threshold", ratchet.mmap_threshold, Unit.BYTES),
            Quantity("default_mmap_threshold", ratchet.first_mmap_threshold, Unit.BYTES),
            Quantity("trim_threshold", ratchet.trim_threshold, Unit.BYTES),
            Quantity("kept_bytes", kept.kept_bytes, Unit.BYTES),
            Quantity("kept_share", kept.kept_bytes / kept.held_bytes if kept.held_bytes else None, Unit.SHARE),
            Quantity("large_free_chunks", kept.free_count, Unit.COUNT),
            Quantity("large_free_bytes", kept.free_bytes, Unit.BYTES),
            Quantity("merged_free_bytes", kept.merged_bytes, Unit.BYTES),
            Quantity("top_bytes", kept.top_bytes, Unit.BYTES),
            Quantity("large_live_chunks", kept.live_count, Unit.COUNT),
            Quantity("large_live_bytes", kept.live_bytes, Unit.BYTES),
        ),
        evidence=evidence,
        next_steps=(
            *_fixing(first, kept),
            "to see what that costs: strace -c -f -e trace=mmap,munmap,brk -p PID, perf stat -e page-faults -p PID",
            "to see that it helps: malloc_stats() or malloc_info(0, stdout) in the process, system bytes against in use"
            " bytes, before and after; malloc_trim(0) shows at once what can go back",
        ),
        weakened_by=(
            "large free chunks can have grown together from small ones; those would stay with any threshold",
            "a large block is also taken from free memory or from top where there is enough, whatever the threshold",
            "a core taken right after a peak shows memory that the next peak would use again; what was given back by"
            " MADV_DONTNEED counts here and costs nothing",
            *(doubt.text for doubt in doubts),
        ),
    )


def _fixing(first: int, kept: _Consequence) -> Iterator[str]:
    """How to fix the thresholds."""
    if kept.live_count < MANY_MAPPINGS:
        yield (
            f"MALLOC_MMAP_THRESHOLD_={first} in the environment (or mallopt(M_MMAP_THRESHOLD,"
            f" {first}), or from glibc 2.25 on GLIBC_TUNABLES=glibc.malloc.mmap_threshold={first}),"
            " then restart: it fixes the thresholds, so that large blocks go back when they are freed; each of them then"
            " costs an mmap, an munmap and its page faults"
        )
    else:
        yield (
            f"MALLOC_MMAP_THRESHOLD_=BYTES with some more than {first} and a restart fixes the thresholds; not {first} itself: of"
            f" {format_count(kept.live_count)} live large blocks each would be a mapping, and a process has at most"
            " vm.max_map_count of these (65530), malloc at most 65536 (M_MMAP_MAX); new thread stacks would fail then"
        )


def _evidence(heap: HeapSnapshot, ratchet: _Ratchet, kept: _Consequence) -> tuple[Evidence, ...]:
    parameters = next((copy.parameters for copy in heap.copies if copy.number == ratchet.copy), None)
    facts = [
        Evidence(
            f"mmap_threshold is {format_bytes(ratchet.mmap_threshold)} and not"
            f" {format_bytes(ratchet.first_mmap_threshold)}, trim_threshold twice that, and no_dyn_threshold is 0: only free() of a mmapped chunk sets them so",
            "malloc_par",
            Strength.SOLID,
            None if parameters is None else parameters.address,
        )
    ]
    if kept.live_count:
        facts.append(
            Evidence(
                f"{format_count(kept.live_count)} live blocks between the two thresholds lie in the heaps, not in mappings",
                "chunk walk",
                Strength.SOLID,
            )
        )
    elif kept.free_bytes > kept.top_bytes:
        facts.append(
            Evidence(
                "no live block between the two thresholds lies in the heaps: small blocks may be what was freed there",
                "chunk walk",
                Strength.HINT,
                speaks_against=True,
            )
        )
    return tuple(facts)
