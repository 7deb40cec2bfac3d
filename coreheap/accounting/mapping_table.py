"""The table of all mapped bytes: pieces of the address space with kind, owner, and what is saved and was in memory.

Knows: how claims and regions come together, and what the holes of a core file say of which memory. Does not know: who claims, nor sums (``ledger``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from coreheap.accounting.claims import NOBODY, ClaimColumns, Claims
from coreheap.accounting.pieces import NO_CLAIM, Pieces, cut_into_pieces
from coreheap.accounting.region_owners import RegionOwners, region_owners
from coreheap.corefile import Core
from coreheap.corefile.kinds import WRITE
from coreheap.corefile.regions import Backing
from coreheap.corefile.residency import (
    ByteRuns,
    kernels_holes,
    pages_with_content,
    saved_runs,
    stored_pieces,
)
from coreheap.evidence import Confidence, Strength
from coreheap.mappings import KINDS, UNKNOWN_FLAGS, MappingKind, MappingTable, ResidencyBasis

UInt64s = npt.NDArray[np.uint64]
Number = TypeVar("Number", bound=np.generic)
Bools = npt.NDArray[np.bool_]

MALLOC_KINDS = (
    MappingKind.MAIN_ARENA,
    MappingKind.ARENA_HEAP,
    MappingKind.ARENA_RESERVE,
    MappingKind.MMAPPED_CHUNK,
)

HEAP_KINDS = (*MALLOC_KINDS, MappingKind.FOREIGN_SBRK)
"""Kinds that are never a file's."""

NEVER_HIDDEN_KINDS = (
    *MALLOC_KINDS,
    MappingKind.STACK_GUARD,
    MappingKind.JAVA_HEAP,
    MappingKind.JAVA_METASPACE,
    MappingKind.JAVA_CODE_CACHE,
    MappingKind.JAVA_GC,
)
"""Whose owner asks for no MADV_DONTDUMP: of others (secure heaps do) memory without access may hold something."""


HOLES_SURE = {Strength.PROOF: Confidence.CERTAIN, Strength.SOLID: Confidence.PLAUSIBLE}
"""A solid fact, and what else would look like it: a copy in large blocks that kept the holes of the original."""


@dataclass(frozen=True, slots=True)
class LabelledPieces:
    """Pieces with all that is known of them: columns as in MappingTable, and ``part`` (int32, a row of ``parts``, or NOBODY)."""

    pieces: Pieces
    kind: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    thread: npt.NDArray[np.int32]
    arena: npt.NDArray[np.int32]
    name: npt.NDArray[np.int32]
    part: npt.NDArray[np.int32]
    committed_bytes: UInt64s
    saved_bytes: UInt64s
    resident_low: UInt64s
    resident_high: UInt64s
    names: tuple[str, ...]
    parts: tuple[str, ...]
    basis: ResidencyBasis
    residency_confidence: Confidence
    is_supposed: Bools


def labelled_pieces(core: Core, claims: Claims, *, residency: bool = True) -> LabelledPieces:
    """The whole address space in pieces, each with one kind and one owner.

    Without ``residency`` nothing is read for it: what was in memory then is known of no byte.
    """
    columns = claims.columns()
    memory = core.memory
    pieces = cut_into_pieces(memory.region_start, memory.region_end, columns)
    owners = region_owners(core, claims)
    kind = _claimed_or(columns.kind, owners.kind[pieces.region], pieces)
    nobody = np.full(len(pieces.region), NOBODY, np.int32)
    saved = saved_runs(memory).bytes_within(pieces.start, pieces.end)
    basis, sure, low, high = _resident(core, pieces, kind, saved, residency)
    size = pieces.end - pieces.start
    own = memory.region_flags[pieces.region]
    flags = np.where((memory.region_segment[pieces.region] < 0) & (own == 0), np.uint8(UNKNOWN_FLAGS), own)
    return LabelledPieces(
        pieces=pieces,
        kind=kind,
        flags=flags,
        thread=_claimed_or(columns.thread, nobody, pieces),
        arena=_claimed_or(columns.arena, nobody, pieces),
        name=_names(columns, owners, pieces),
        part=_claimed_or(columns.part, nobody, pieces),
        committed_bytes=np.where(flags != 0, size, low),
        saved_bytes=saved,
        resident_low=low,
        resident_high=high,
        names=tuple(claims.names),
        parts=tuple(claims.parts),
        basis=basis,
        residency_confidence=sure,
        is_supposed=_claimed_or(columns.is_supposed, np.zeros(len(pieces.region), np.bool_), pieces),
    )


def mapping_table(labelled: LabelledPieces) -> MappingTable:
    """The pieces with neighbours of the same kind, owner and flags joined; each mmapped chunk stays a row."""
    pieces = labelled.pieces
    new = np.ones(len(pieces.start), np.bool_)
    new[1:] = pieces.start[1:] != pieces.end[:-1]
    for column in (labelled.kind, labelled.flags, labelled.thread, labelled.arena, labelled.name):
        new[1:] |= column[1:] != column[:-1]
    chunk = labelled.kind == KINDS.index(MappingKind.MMAPPED_CHUNK)
    new[1:] |= chunk[1:] & (pieces.claim[1:] != pieces.claim[:-1])
    first = np.flatnonzero(new)

    def total(column: UInt64s) -> UInt64s:
        sums: UInt64s = np.add.reduceat(column, first) if len(first) else column[:0]
        return sums

    return MappingTable(
        start=pieces.start[first],
        end=np.append(pieces.end[first[1:] - 1], pieces.end[-1:]),
        kind=labelled.kind[first],
        flags=labelled.flags[first],
        thread=labelled.thread[first],
        arena=labelled.arena[first],
        name=labelled.name[first],
        committed_bytes=total(labelled.committed_bytes),
        saved_bytes=total(labelled.saved_bytes),
        resident_low=total(labelled.resident_low),
        resident_high=total(labelled.resident_high),
        names=labelled.names,
        basis=labelled.basis,
        residency_confidence=labelled.residency_confidence,
        supposed_bytes=_supposed_bytes(labelled),
    )


def _supposed_bytes(labelled: LabelledPieces) -> dict[MappingKind, int]:
    """By kind how many committed bytes are told by their place alone."""
    kinds = np.unique(labelled.kind[labelled.is_supposed]).tolist()
    return {
        KINDS[kind]: int(labelled.committed_bytes[labelled.is_supposed & (labelled.kind == kind)].sum())
        for kind in kinds
    }


def _claimed_or(claimed: npt.NDArray[Number], otherwise: npt.NDArray[Number], pieces: Pieces) -> npt.NDArray[Number]:
    """The column of the claims where a claim holds the piece, else the other."""
    if not len(claimed):
        return otherwise
    return np.where(pieces.claim == NO_CLAIM, otherwise, claimed[pieces.claim])


def _names(columns: ClaimColumns, owners: RegionOwners, pieces: Pieces) -> npt.NDArray[np.int32]:
    """The claim's name, none included, else the region's."""
    return _claimed_or(columns.name, owners.name[pieces.region], pieces)


def _resident(
    core: Core, pieces: Pieces, kind: npt.NDArray[np.uint8], saved: UInt64s, look: bool
) -> tuple[ResidencyBasis, Confidence, UInt64s, UInt64s]:
    """What is known of which pages were in memory: on what it rests, how sure that is, and at least and at most how many bytes
    of each piece.

    Only private anonymous memory is told by the core: pages of files and of shared memory are read in by the dump itself.
    """
    memory = core.memory
    size = pieces.end - pieces.start
    low, high = np.zeros(len(size), np.uint64), size.copy()
    if not look:
        return ResidencyBasis.UNKNOWN, Confidence.CERTAIN, low, high
    region = pieces.region
    anonymous = memory.region_file_index[region] < 0
    if not len(memory.mapped_files):
        # Without NT_FILE files cannot be told from anonymous memory; the heap has none of them.
        anonymous &= np.isin(kind, [KINDS.index(own) for own in HEAP_KINDS])
    anonymous &= kind != KINDS.index(MappingKind.KERNEL_PAGES)
    rows = np.flatnonzero(anonymous & (saved > 0))
    if not len(rows):
        return ResidencyBasis.UNKNOWN, Confidence.CERTAIN, low, high
    stored = stored_pieces(memory, pieces.start[rows], pieces.end[rows])
    stored_bytes = ByteRuns(stored.start, stored.end).bytes_within(pieces.start[rows], pieces.end[rows])
    missing = size[rows] - saved[rows]
    basis = ResidencyBasis.ZERO_PAGES
    holes = kernels_holes(memory)
    if holes is not None:
        high[rows] = stored_bytes + missing
        if memory.hole_granularity <= memory.page_bytes:
            basis = ResidencyBasis.HOLES
    if basis is ResidencyBasis.HOLES:
        low[rows] = stored_bytes
    else:
        low[rows] = pages_with_content(memory, stored).bytes_within(pieces.start[rows], pieces.end[rows])
    if core.made_by == "kernel" and (memory.region_flags[region[rows]] & WRITE).any():
        # What was ever written has an anon_vma, and the kernel saves it whatever its permissions are (vma_dump_size), at least
        # where it saves other memory of this kind; MADV_DONTDUMP would hide it, which these owners do not ask for.
        never_written = (
            anonymous
            & np.isin(kind, [KINDS.index(own) for own in NEVER_HIDDEN_KINDS])
            & (memory.region_flags[region] == 0)
            & (memory.region_segment[region] >= 0)
            & (memory.region_backing[region] == Backing.NOT_SAVED)
        )
        high[never_written] = 0
    return basis, Confidence.CERTAIN if holes is None else HOLES_SURE[holes], low, high
