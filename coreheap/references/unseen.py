"""Holders of lost blocks that a search along pointers cannot see: other forms of addresses, the kernel, memory that is missing.

Knows: in which forms programs keep addresses, sizes of signal stacks. Does not know: findings.

Whatever is found here makes a lost block possibly lost, and says why. Nothing here makes anything lost that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.heap import ChunkState
from coreheap.kernels import (
    ChunkIndex,
    Edges,
    EncodedPointers,
    LostChunks,
    MemoryMap,
    PointerForm,
    chunk_extents,
    find_chunks,
    find_encoded,
    find_leaders,
)
from coreheap.leaks import Heuristic
from coreheap.references.bits import bits_of, positions_of
from coreheap.references.followed import (
    both,
    bytes_at,
    edges_from,
    edges_within,
    marked_from,
    payload_ranges,
    size_classes,
)

UInt64s = npt.NDArray[np.uint64]
UInt32s = npt.NDArray[np.uint32]
UInt8s = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

SMALLEST_BYTES = 1 << 10
"""Lost bytes below which nothing is looked up: below them nothing is said of a leak either."""
FORM_OF = {form: Heuristic[form.name] for form in PointerForm}
BY_CHANCE_BELOW = 1 << 36
"""Numbers of other meaning often equal so low an address in one form or another: there a group counts as kept in another form
only where half of it is found."""
AT_MINSIGSTKSZ = 51
"""include/uapi/linux/auxvec.h, since Linux 5.14 on x86."""
LEAST_SIGNAL_STACK = {"x86_64": 2048, "i386": 2048, "aarch64": 5120, "arm": 2048}
USUAL_SIGNAL_STACK = {"x86_64": 8192, "i386": 8192, "aarch64": 16384, "arm": 8192}
"""MINSIGSTKSZ and SIGSTKSZ of glibc's headers (bits/sigstack.h)."""
KIB = 1 << 10
MOST_LOOKED_INTO = 1 << 14
DATA_OF_LISTS_BYTES, UNTOUCHED_BYTES = 64, 1024
"""A stack is used from its end downwards. Behind the links that malloc leaves in a block that was free, its beginning stays
as it was."""


@dataclass(frozen=True, slots=True)
class Unseen:
    """What is lost along plain pointers. ``lost``: bits. ``root_start`` and ``root_end``: all memory outside of chunks."""

    core: Core
    index: ChunkIndex
    memory: MemoryMap
    root_start: UInt64s
    root_end: UInt64s
    lost: UInt64s
    edges: Callable[[], Edges]
    """References in which at least those of the lost chunks are."""
    missing_shared_bytes: int


@dataclass(frozen=True, slots=True)
class MayBeHeld:
    """Lost chunks that may be held. ``chunks``: uint32, ascending; ``heuristic``: uint8 each, NONE for what only hangs from
    another. ``lost``: who leads all of the lost, with leaders of their own for those that may be held."""

    chunks: UInt32s
    heuristic: UInt8s
    lost: LostChunks


def may_be_held(unseen: Unseen, lost: LostChunks, wanted: Collection[Heuristic]) -> MayBeHeld:
    """Which of the lost something may hold that no pointer shows."""
    index = unseen.index
    chunks = positions_of(unseen.lost)
    heuristic = np.zeros(len(chunks), np.uint8)
    held = np.zeros(len(chunks), np.bool_)
    sizes = _sizes(index, chunks)
    if int(sizes.sum()) >= SMALLEST_BYTES:
        forms = {form: name for form, name in FORM_OF.items() if name in wanted}
        if forms:
            held = _kept_in_other_forms(unseen, chunks, heuristic, forms)
        if held.any():
            lost = _with_own_leaders(unseen, chunks, held, lost)
    leads = np.zeros(len(chunks), np.bool_)
    leads[np.searchsorted(chunks, lost.leader)] = True
    open_leaders = np.flatnonzero(leads & ~held)
    for name, found in (
        (Heuristic.SIGNAL_STACK, _of_a_signal_stack),
        (Heuristic.MISSING_SHARED_MEMORY, _of_missing_memory),
    ):
        if name is Heuristic.SIGNAL_STACK and name not in wanted:
            continue
        rows = open_leaders[found(unseen, chunks[open_leaders].astype(np.int64), sizes[open_leaders])]
        heuristic[rows] = name
        held[rows] = True
        open_leaders = np.flatnonzero(leads & ~held)
    # What only they lead to is as sure as they are.
    leader = lost.leader_of[chunks].astype(np.int64) - 1
    held |= held[np.searchsorted(chunks, lost.leader[leader])]
    return MayBeHeld(chunks[held], heuristic[held], lost)


def _sizes(index: ChunkIndex, chunks: UInt32s) -> Int64s:
    """Usable bytes."""
    start, end = payload_ranges(index, chunks.astype(np.int64))
    sizes: Int64s = (end - start).astype(np.int64)
    return sizes


# Other forms


def _kept_in_other_forms(
    unseen: Unseen, chunks: UInt32s, heuristic: UInt8s, forms: dict[PointerForm, Heuristic]
) -> Bools:
    """Which chunks roots or chunks that are not lost lead to, where other forms count as pointers; ``heuristic`` gets those that
    are kept so themselves."""
    index = unseen.index
    header, _ = chunk_extents(index, chunks.astype(np.int64))
    addresses = header + np.uint64(index.geometry.header_bytes)
    # Chunks of regions and mappings may not ascend together.
    order = np.argsort(addresses, kind="stable")
    wanted = addresses[order]
    of_roots = find_encoded(index, unseen.memory, unseen.root_start, unseen.root_end, wanted)
    of_heap = find_encoded(index, unseen.memory, *_heap_ranges(index), wanted)
    source = _sources(index, of_heap)
    keeps = source >= 0
    row_of = np.full(index.chunk_count, -1, np.int64)
    row_of[chunks] = np.arange(len(chunks))
    source_row = np.concatenate([np.full(len(of_roots.form), -1, np.int64), row_of[source[keeps]]])
    target_row = order[np.concatenate([of_roots.number, of_heap.number[keeps]]).astype(np.int64)]
    form = np.concatenate([of_roots.form, of_heap.form[keeps]])
    counts = np.isin(form, list(forms)) & (source_row != target_row)
    counts &= _is_no_chance(addresses, target_row, source_row, chunks, index)
    source_row, target_row, form = source_row[counts], target_row[counts], form[counts]
    is_start = source_row < 0
    along = edges_within(unseen.edges(), chunks, row_of, exact_only=False)
    in_other_form = edges_from(source_row[~is_start], target_row[~is_start], len(chunks))
    held = marked_from(both(along, in_other_form), target_row[is_start])
    names = np.zeros(max(PointerForm) + 1, np.uint8)
    for each, name in forms.items():
        names[each] = name
    reached = np.flatnonzero(is_start | held[source_row])[::-1]
    heuristic[target_row[reached]] = names[form[reached]]
    return held


def _heap_ranges(index: ChunkIndex) -> tuple[UInt64s, UInt64s]:
    mapped = index.mmapped
    return (
        np.concatenate([index.region_start, mapped.mapping_start]),
        np.concatenate([index.region_end, mapped.mapping_start + mapped.mapping_bytes]),
    )


def _sources(index: ChunkIndex, found: EncodedPointers) -> Int64s:
    """The chunk in use whose payload holds each; -1 where it is in none."""
    source = find_chunks(index, found.holder_address - np.uint64(index.geometry.header_bytes), False)
    source[index.state[np.maximum(source, 0)] != ChunkState.IN_USE] = -1
    return source


def _is_no_chance(
    addresses: UInt64s, target_row: Int64s, source_row: Int64s, chunks: UInt32s, index: ChunkIndex
) -> Bools:
    """Of each that was found: whether numbers of another meaning can hardly equal it."""
    if not len(target_row):
        return np.zeros(0, np.bool_)
    _, chunk_bytes = chunk_extents(index, chunks.astype(np.int64))
    group = size_classes((chunk_bytes // np.uint64(index.geometry.alignment)).astype(np.uint32))
    width = int(group.max()) + 1
    whole = np.bincount(group, minlength=width)
    found = np.bincount(group[np.unique(target_row)], minlength=width)
    likely: Bools = (2 * found >= whole)[group[target_row]] | (addresses[target_row] >= BY_CHANCE_BELOW)
    return likely


def _with_own_leaders(unseen: Unseen, chunks: UInt32s, held: Bools, lost: LostChunks) -> LostChunks:
    """Who leads the lost, where chunks that may be held lead only one another, and are led by no others."""
    edges, count = unseen.edges(), unseen.index.chunk_count
    parts = []
    for part in (chunks[held], chunks[~held]):
        wanted = np.zeros(count, np.bool_)
        wanted[part] = True
        parts.append(find_leaders(edges, bits_of(wanted)))
    leader = np.concatenate([part.leader for part in parts])
    order = np.argsort(leader, kind="stable")
    number = np.empty(len(leader) + 1, np.uint32)
    number[0] = 0
    number[order + 1] = np.arange(1, len(leader) + 1)
    leader_of = number[parts[0].leader_of]
    of_rest = parts[1].leader_of != 0
    leader_of[of_rest] = number[parts[1].leader_of[of_rest].astype(np.int64) + len(parts[0].leader)]
    return LostChunks(leader[order], leader_of)


# The kernel, and what is missing


def _of_a_signal_stack(unseen: Unseen, leaders: Int64s, sizes: Int64s) -> Bools:
    """Blocks of the size of a signal stack whose beginning was never written: at most one for each thread."""
    core, index = unseen.core, unseen.index
    least = LEAST_SIGNAL_STACK.get(core.machine, 2048)
    usual = USUAL_SIGNAL_STACK.get(core.machine, 8192)
    told = core.auxv.get(AT_MINSIGSTKSZ, 0)
    told = told if told < 1 << 20 else 0
    page = core.page_bytes
    # sysconf (_SC_SIGSTKSZ) is four times the kernel's minimum (sysdeps/unix/sysv/linux/sysconf-sigstksz.h); programs take one of
    # these, the sum of both (CPython), twice, or what is left of whole pages.
    wished = {least, usual, 2 * usual, told, 4 * max(told, least), usual + told, 2 * max(told, least)}
    wished |= {-(-size // page) * page for size in wished}
    fits = np.zeros(len(leaders), np.bool_)
    for size in sorted(wished - {0}):
        spare = index.geometry.alignment + index.geometry.word_bytes
        rows = np.flatnonzero((sizes >= size) & (sizes < size + spare) & ~fits)
        begins = bytes_at(unseen.memory, payload_ranges(index, leaders[rows[:MOST_LOOKED_INTO]])[0], UNTOUCHED_BYTES)
        untouched = rows[:MOST_LOOKED_INTO][~begins[:, DATA_OF_LISTS_BYTES:].any(axis=1)]
        # A size that only sysconf gives, or most of them as a stack is: then the others held something else before.
        is_plain = len(rows) <= len(core.threads) and (size % KIB or 2 * len(untouched) >= len(rows))
        taken = rows if is_plain else untouched
        fits[taken] |= len(taken) <= len(core.threads)
    return fits


def _of_missing_memory(unseen: Unseen, leaders: Int64s, sizes: Int64s) -> Bools:
    """Groups of one size that the shared memory that the core lacks has room to point to."""
    room = unseen.missing_shared_bytes // unseen.core.word_bytes
    if not room or not len(leaders):
        return np.zeros(len(leaders), np.bool_)
    _, chunk_bytes = chunk_extents(unseen.index, leaders)
    group = size_classes((chunk_bytes // np.uint64(unseen.index.geometry.alignment)).astype(np.uint32))
    fits: Bools = np.bincount(group)[group] <= room
    return fits
