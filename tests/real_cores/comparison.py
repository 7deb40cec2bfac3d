"""Holds a report against the truth of the process it is about, to the block and to the byte.

Every function returns a list of differences in words, empty when there is none, so that a test shows all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import coreheap
from coreheap.evidence import Confidence
from coreheap.heap import BINNED_STATES, Arena, ChunkState, HeapSnapshot
from coreheap.kernels import chunk_extents
from coreheap.leaks import Verdict
from coreheap.report import LedgerNode, Report
from tests.real_cores.truth import MEANT, HeapInfo, Truth

Addresses = NDArray[np.uint64]
SHOWN = 5


def payloads(heap: HeapSnapshot, *states: ChunkState) -> Addresses:
    """Payload addresses of all chunks in the given states, mmapped ones included, sorted."""
    wanted = np.array([int(state) for state in states], np.uint8)
    parts = [batch.payload_address[np.isin(batch.state, wanted)] for batch in heap.chunks.batches()]
    return np.sort(np.concatenate([np.zeros(0, np.uint64), *parts]))


def usable_bytes_at(heap: HeapSnapshot, addresses: Addresses) -> NDArray[np.uint64]:
    """Usable bytes of the chunks with these sorted payload addresses; 0 where there is no such chunk."""
    usable = np.zeros(len(addresses), np.uint64)
    for batch in heap.chunks.batches():
        position = np.searchsorted(addresses, batch.payload_address)
        position = np.minimum(position, max(len(addresses) - 1, 0))
        if len(addresses):
            hit = addresses[position] == batch.payload_address
            usable[position[hit]] = batch.usable_bytes[hit]
    return usable


def set_difference(name: str, found: Addresses, truth: Addresses) -> list[str]:
    """Blocks that only one side has, a few of them named."""
    result = []
    for who, addresses in (
        ("only coreheap has", np.setdiff1d(found, truth)),
        ("only the process had", np.setdiff1d(truth, found)),
    ):
        if len(addresses):
            shown = ", ".join(hex(address) for address in addresses[:SHOWN].tolist())
            result.append(f"{name}: {who} {len(addresses)} blocks: {shown}")
    return result


def compare_sets(heap: HeapSnapshot, truth: Truth) -> list[str]:
    """In use, cached and allocator-own blocks against what the process knew."""
    own = np.concatenate([truth.tcache_payload_address, truth.orphan_tcache_payload_address])
    cached = np.concatenate([truth.cached_payload_address, truth.orphan_cached_payload_address])
    differences = [
        *set_difference("in use", payloads(heap, ChunkState.IN_USE), truth.live_payload_address),
        *set_difference("allocator's own", payloads(heap, ChunkState.ALLOCATOR_OWN), np.sort(own)),
        *set_difference("tcache", payloads(heap, ChunkState.TCACHE), np.sort(cached)),
    ]
    usable = usable_bytes_at(heap, truth.live_payload_address)
    short = truth.live_requested_bytes > usable
    if short.any():
        address = int(truth.live_payload_address[short][0])
        differences.append(f"{int(short.sum())} live blocks are larger than usable_bytes: {address:#x}")
    return differences


def compare_arena(arena: Arena, truth: HeapInfo) -> list[str]:
    """One arena against malloc_info.

    malloc_info adds up raw size words for binned chunks: each counts one byte more, its PREV_INUSE bit (which is always
    set there); the top chunk is added without flags (malloc.c, __malloc_info, 2.31-2.44).
    """
    free = [*BINNED_STATES, ChunkState.TOP]
    binned_count = sum(arena.totals[state].count for state in BINNED_STATES)
    pairs = {
        "system_mem": (arena.system_mem, truth.system_current),
        "max_system_mem": (arena.max_system_mem, truth.system_max),
        "fast count": (arena.totals[ChunkState.FASTBIN].count, truth.fast.count),
        "fast bytes": (arena.totals[ChunkState.FASTBIN].chunk_bytes, truth.fast.bytes),
        "rest count": (sum(arena.totals[state].count for state in free), truth.rest.count),
        "rest bytes": (arena.bytes_in(*free) + binned_count, truth.rest.bytes),
        "unsorted count": (
            arena.totals[ChunkState.UNSORTED_BIN].count,
            truth.unsorted.count if truth.unsorted else 0,
        ),
    }
    if not arena.is_main:
        pairs["sub-heaps"] = (len(arena.sub_heaps), truth.subheaps)
        committed = sum(heap.committed_bytes for heap in arena.sub_heaps)
        mprotect = sum(heap.mprotect_bytes for heap in arena.sub_heaps)
        pairs["aspace total"] = (committed, truth.aspace_total)
        pairs["aspace mprotect"] = (mprotect, truth.aspace_mprotect)
    return [
        f"arena {arena.index}: {name} is {found}, the process said {said}"
        for name, (found, said) in pairs.items()
        if found != said
    ]


def compare_malloc_info(heap: HeapSnapshot, truth: Truth) -> list[str]:
    """Every arena and the mmapped chunks against malloc_info; arenas are numbered along the ring on both sides."""
    info = truth.malloc_info
    if info is None:
        return ["the truth has no malloc_info"]
    differences = []
    # One malloc wrote it; what other copies have, if there are any, they noted (copies.c).
    writer = int(truth.notes.get("malloc_info_of", ("0",))[0])
    own = [arena for arena in heap.arenas if arena.copy == writer]
    if len(own) != len(info.heaps):
        differences.append(f"{len(own)} arenas, the process had {len(info.heaps)}")
    for arena, said in zip(own, info.heaps, strict=False):
        differences += compare_arena(arena, said)
    mmapped = [(info.mmap.count, info.mmap.bytes)]
    mmapped += [(said.mmapped_count, said.mmapped_bytes) for said in copies_of(truth) if said.number != writer]
    said_count = sum(count for count, _ in mmapped)
    # From 2.43 every mremap leaves mmapped_mem two words too high (fact sheet, 4.1): whole pages are what is mapped.
    drifts = truth.glibc_version is not None and int(truth.glibc_version.split(".")[1]) >= 43
    said_bytes = sum(size // 4096 * 4096 if drifts else size for _, size in mmapped)
    if (heap.mmapped_count, heap.mmapped_bytes) != (said_count, said_bytes):
        differences.append(
            f"mmapped: {heap.mmapped_count} of {heap.mmapped_bytes} bytes, the process had {said_count} of {said_bytes}"
        )
    return differences


@dataclass(frozen=True, slots=True)
class CopyTruth:
    """What one copy of malloc said of itself (mallinfo), and the blocks that the program took from it and still had."""

    number: int
    system_mem: int
    mmapped_count: int
    mmapped_bytes: int
    free_bytes: int
    live_payload_address: Addresses


def copies_of(truth: Truth) -> list[CopyTruth]:
    """The copies of malloc by their number in the program (copies.c); empty for programs that have but one."""
    return [
        CopyTruth(*numbers, np.sort(np.array(truth.note_numbers(f"live_in_copy_{numbers[0]}"), np.uint64)))
        for numbers in ([int(word) for word in line.split()] for line in truth.notes.get("mallinfo", ()))
    ]


def ledger_errors(node: LedgerNode) -> list[str]:
    """Nodes that are not the sum of their children, negative bytes, and anything unexplained."""
    errors = []
    if node.children and node.bytes != sum(child.bytes for child in node.children):
        errors.append(f"{node.name}: {node.bytes} is not the sum of its children")
    if node.bytes < 0:
        errors.append(f"{node.name}: {node.bytes}")
    if node.name == "unexplained" and node.bytes:
        errors.append(f"unexplained: {node.bytes}")
    for child in node.children:
        errors += ledger_errors(child)
    return errors


LOST = frozenset((Verdict.DEFINITELY_LOST, Verdict.INDIRECTLY_LOST))
ALLOWED = {
    "reachable": frozenset((Verdict.STILL_REACHABLE,)),
    "weak": frozenset((Verdict.WEAKLY_HELD,)),
    "possible": frozenset((Verdict.POSSIBLY_LOST,)),
    "indirect": frozenset((Verdict.INDIRECTLY_LOST,)),
    "definite": frozenset((Verdict.DEFINITELY_LOST,)),
    "ring": LOST,
}
"""What coreheap may say of a block for which a word of MEANT stands."""

Allowed = Callable[[str, str], frozenset[Verdict]]


def verdicts_at(heap: HeapSnapshot, addresses: Addresses) -> NDArray[np.uint8]:
    """The verdict on each chunk with these sorted payload addresses; NONE where there is no such chunk."""
    verdicts = np.zeros(len(addresses), np.uint8)
    for batch in heap.chunks.batches():
        position = np.minimum(np.searchsorted(addresses, batch.payload_address), max(len(addresses) - 1, 0))
        if len(addresses) and batch.verdict is not None:
            hit = addresses[position] == batch.payload_address
            verdicts[position[hit]] = batch.verdict[hit]
    return verdicts


def meant_otherwise(
    heap: HeapSnapshot, truth: Truth, allowed: Allowed, but: NDArray[np.bool_] | None = None
) -> Counter[tuple[str, str, Verdict]]:
    """How many blocks have a verdict that ``allowed(group, meant)`` does not hold: (group, meant, verdict) -> count.

    ``but``: blocks that are not counted, bool[blocks that were meant].
    """
    verdicts = verdicts_at(heap, truth.meant_payload_address)
    groups = truth.groups
    kinds = np.stack([truth.meant_group, truth.meant_verdict, verdicts.astype(np.uint64)])
    kinds = kinds[:, ~but] if but is not None else kinds
    found: Counter[tuple[str, str, Verdict]] = Counter()
    for (group, meant, verdict), count in zip(*_counted(kinds), strict=True):
        if Verdict(verdict) not in allowed(groups[group], MEANT[meant]):
            found[groups[group], MEANT[meant], Verdict(verdict)] += count
    return found


def _counted(rows: NDArray[np.uint64]) -> tuple[list[list[int]], list[int]]:
    kinds, counts = np.unique(rows, axis=1, return_counts=True)
    return kinds.T.tolist(), counts.tolist()


def led_to_from_outside(core: Path, heap: HeapSnapshot, payloads: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Whether any word of the file that is no chunk's lies in each of these blocks: of a register, a stack, a module; bool[n].

    The words of the file as it is: no list of roots, and nothing of what coreheap found but where the chunks are.
    """
    if not len(payloads):
        return np.zeros(0, np.bool_)
    with coreheap.open(core) as opened:
        memory, word_bytes = opened.memory, opened.word_bytes
        content = np.fromfile(core, "<u4")
        is_outside = np.ones(len(content), np.bool_)
        mmapped = heap.chunks.index.mmapped
        ends = mmapped.mapping_start + mmapped.mapping_bytes
        ranges = [(region.range.start, region.range.end) for region in heap.chunks.regions]
        ranges += zip(mmapped.mapping_start.tolist(), ends.tolist(), strict=True)
        runs = list(
            zip(memory.run_start.tolist(), memory.run_end.tolist(), memory.run_file_offset.tolist(), strict=True)
        )
        for start, end in ranges:
            for low, high, offset in runs:
                first, last = max(start, low), min(end, high)
                if first < last:
                    is_outside[(offset + first - low) // 4 : (offset + last - low) // 4] = False
    words = content.astype(np.uint64)
    if word_bytes == 8:
        words, is_outside = words[:-1] | words[1:] << np.uint64(32), is_outside[:-1] & is_outside[1:]
    words = np.unique(words[is_outside])
    index = heap.chunks.index
    header, chunk_bytes = chunk_extents(
        index, np.array([index.chunk_containing(at) for at in payloads.tolist()], np.int64)
    )
    # A block ends one word into the next chunk, or before its mapping does.
    end = header + chunk_bytes + np.uint64(word_bytes)
    found: NDArray[np.bool_] = np.searchsorted(words, payloads) < np.searchsorted(words, end)
    return found


def words_in(core: Path, heap: HeapSnapshot, payloads: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """All words of these blocks."""
    index = heap.chunks.index
    with coreheap.open(core) as opened:
        found = [np.zeros(0, np.uint64)]
        for payload in payloads.tolist():
            _, chunk_bytes = chunk_extents(index, np.array([index.chunk_containing(payload)], np.int64))
            count = int(chunk_bytes[0]) // opened.word_bytes - 2
            found.append(np.asarray(opened.memory.read_words(payload, count), np.uint64))
    return np.concatenate(found)


def rings_without_one_leader(heap: HeapSnapshot, truth: Truth) -> list[str]:
    """Groups of lost rings that have not exactly one leader; those that something holds are left out."""
    verdicts = verdicts_at(heap, truth.meant_payload_address)
    result = []
    for group in np.unique(truth.meant_group[truth.meant_verdict == RING]).tolist():
        of_ring = verdicts[(truth.meant_group == group) & (truth.meant_verdict == RING)]
        leaders = int((of_ring == Verdict.DEFINITELY_LOST).sum())
        if leaders != 1 and np.isin(of_ring, list(LOST)).all():
            result.append(f"{truth.groups[group]}: {leaders} of {len(of_ring)} blocks lead")
    return result


RING = next(number for number, word in MEANT.items() if word == "ring")


def falsely_lost(heap: HeapSnapshot, truth: Truth) -> list[str]:
    """Live blocks that are called lost though the program did not lose them. There must never be one."""
    lost_ones = truth.meant_payload_address[np.isin(truth.meant_verdict, LOST_ON_PURPOSE)]
    kept = np.setdiff1d(truth.live_payload_address, np.union1d(lost_ones, truth.leak_payload_address))
    verdicts = verdicts_at(heap, kept)
    wrong = kept[np.isin(verdicts, list(LOST))]
    group_of = dict(zip(truth.meant_payload_address.tolist(), truth.meant_group.tolist(), strict=True))
    return [f"{address:#x} ({truth.groups.get(group_of.get(address, 0), 'not marked')})" for address in wrong.tolist()]


LOST_ON_PURPOSE = [number for number, word in MEANT.items() if word in ("indirect", "definite", "ring")]


def mapped_bytes(truth: Truth) -> int:
    """Bytes of all mappings in the process's own /proc/self/maps."""
    total = 0
    for line in truth.maps.splitlines():
        start, _, end = line.split()[0].partition("-")
        total += int(end, 16) - int(start, 16)
    return total


DAMAGE_CODES = ("CORRUPTION-", "DOUBLE-FREE", "USE-AFTER-FREE", "ALLOCATOR-LOCKED")


def damage_of_a_sound_heap(report: Report) -> list[str]:
    """Everything that the report says is damaged. A free that glibc refused damages nothing, and is found where it said so."""
    codes = [finding.code for finding in report.findings if finding.code.startswith(DAMAGE_CODES)]
    if any(finding.code == "ALLOCATOR-ABORT" for finding in report.findings) and "DOUBLE-FREE" in codes:
        codes.remove("DOUBLE-FREE")
    return [*(f"damage {damage}" for damage in report.damages), *(f"finding {code}" for code in codes)]


def sure_damage(report: Report) -> list[str]:
    """What the report is sure of, wrongly: damage that is certain or strong."""
    found = [
        f"{finding.code} {finding.confidence.value}"
        for finding in report.findings
        if finding.code.startswith(DAMAGE_CODES)
        and finding.code != "ALLOCATOR-LOCKED"
        and finding.confidence.rank > Confidence.PLAUSIBLE.rank
    ]
    found += [
        f"{damage.kind.value} {damage.place.value} at {damage.bytes.start:#x} {damage.confidence.value}"
        for damage in report.damages
        if damage.confidence.rank > Confidence.PLAUSIBLE.rank
    ]
    return found


def compare_all(report: Report, truth: Truth) -> list[str]:
    """Everything that must hold on an intact core."""
    heap = report.heap
    if heap is None:
        return ["no heap was found"]
    differences = [
        *compare_sets(heap, truth),
        *compare_malloc_info(heap, truth),
        *ledger_errors(report.ledger),
    ]
    differences += [f"anomaly {anomaly}" for anomaly in report.anomalies]
    differences += damage_of_a_sound_heap(report)
    differences += [f"gap {gap}" for gap in heap.gaps]
    differences += [f"defect {defect}" for defect in report.defects]
    return differences
