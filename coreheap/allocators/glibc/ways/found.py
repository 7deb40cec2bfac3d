"""What the ways to malloc's globals find: addresses, offsets from the thread pointer, layouts, each with its evidence.

Knows: how sightings of different ways become evidence for one place and against it. Does not know: how any of them was
found, nor which of them is right (``identify`` decides).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from coreheap.allocators.glibc.locate import Sighting
from coreheap.allocators.glibc.records import Layout
from coreheap.corefile import Module
from coreheap.evidence import Evidence
from coreheap.quantities import format_address


@dataclass(frozen=True, slots=True)
class ThreadLocal:
    """Where a thread-local variable lies in every thread, and what says so.

    ``offset`` is relative to the thread pointer: negative on x86, positive on aarch64.
    """

    offset: int
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class ThreadSlot:
    """An offset from the thread pointer at which the module has some thread-local variable, and who says so.

    ``ways`` is how many ways name it: relocations name all variables, the code of malloc's functions few.
    """

    offset: int
    source: str
    ways: int = 1


@dataclass(frozen=True, slots=True)
class ThreadBlock:
    """Where the module's whole TLS block begins relative to the thread pointer, and who says so.

    ``byte_count`` is None where the block's size is unknown.
    """

    start: int
    byte_count: int | None
    source: str

    def holds(self, offset: int) -> bool | None:
        """Whether a variable at an offset from the thread pointer belongs to the module; None where that is unknown."""
        return None if self.byte_count is None else self.start <= offset < self.start + self.byte_count


@dataclass(frozen=True, slots=True)
class LayoutSighting:
    """The layouts that one fact leaves; ``layouts`` is empty where the fact fits none that is known."""

    layouts: tuple[Layout, ...]
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Found:
    """What one way found in one module."""

    main_arena: tuple[Sighting, ...] = ()
    parameters: tuple[Sighting, ...] = ()
    tcache: tuple[ThreadLocal, ...] = ()
    thread_arena: tuple[ThreadLocal, ...] = ()
    thread_slots: tuple[ThreadSlot, ...] = ()
    thread_blocks: tuple[ThreadBlock, ...] = ()
    layouts: tuple[LayoutSighting, ...] = ()


NOTHING = Found()


@dataclass(frozen=True, slots=True)
class Globals:
    """What all ways found in one module: one copy of malloc, or none. Strongest ways first in every tuple."""

    module: Module
    main_arena: tuple[Sighting, ...]
    parameters: tuple[Sighting, ...]
    """Sightings of ``mp_``."""
    tcache: tuple[ThreadLocal, ...]
    thread_arena: tuple[ThreadLocal, ...]
    thread_slots: tuple[ThreadSlot, ...]
    """Where to look for tcache and thread_arena when nothing names them (``find_thread_locals``), by offset; empty
    where unknown."""
    thread_blocks: tuple[ThreadBlock, ...]
    """The module's TLS block, by each source that tells."""
    layouts: tuple[LayoutSighting, ...]

    @property
    def found_anything(self) -> bool:
        return bool(self.main_arena or self.parameters or self.tcache or self.thread_arena or self.layouts)


def merged(module: Module, parts: Iterable[Found]) -> Globals:
    """The findings of several ways in their order."""
    found = tuple(parts)
    return Globals(
        module=module,
        main_arena=tuple(sighting for part in found for sighting in part.main_arena),
        parameters=tuple(sighting for part in found for sighting in part.parameters),
        tcache=tuple(sighting for part in found for sighting in part.tcache),
        thread_arena=tuple(sighting for part in found for sighting in part.thread_arena),
        thread_slots=_slots_by_offset(slot for part in found for slot in part.thread_slots),
        thread_blocks=tuple(block for part in found for block in part.thread_blocks),
        layouts=tuple(sighting for part in found for sighting in part.layouts),
    )


def _slots_by_offset(slots: Iterable[ThreadSlot]) -> tuple[ThreadSlot, ...]:
    """One slot an offset, with all that name it."""
    sources: dict[int, list[str]] = {}
    for slot in slots:
        named = sources.setdefault(slot.offset, [])
        if slot.source not in named:
            named.append(slot.source)
    return tuple(ThreadSlot(offset, ", ".join(named), len(named)) for offset, named in sorted(sources.items()))


def evidence_for(sightings: Iterable[Sighting], address: int) -> tuple[Evidence, ...]:
    """Every way's word on an address that was chosen: those that name it support it, all others speak against it.

    The statement of an opposing way says which address it names, so that a report shows both.
    """
    return tuple(
        sighting.evidence
        if sighting.address == address
        else _against(sighting.evidence, f"{sighting.evidence.statement} (at {format_address(sighting.address)})")
        for sighting in sightings
    )


def evidence_for_offset(variables: Iterable[ThreadLocal], offset: int) -> tuple[Evidence, ...]:
    """As ``evidence_for``, for a thread-local variable's offset from the thread pointer."""
    return tuple(
        variable.evidence
        if variable.offset == offset
        else _against(variable.evidence, f"{variable.evidence.statement} (at thread pointer {variable.offset:+#x})")
        for variable in variables
    )


def evidence_for_layout(sightings: Iterable[LayoutSighting], layout: Layout) -> tuple[Evidence, ...]:
    """Every fact's word on a layout that was chosen."""
    return tuple(
        sighting.evidence if layout in sighting.layouts else _against(sighting.evidence, sighting.evidence.statement)
        for sighting in sightings
    )


def _against(evidence: Evidence, statement: str) -> Evidence:
    return replace(evidence, statement=statement, speaks_against=True)
