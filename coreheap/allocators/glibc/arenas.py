"""The arenas of a process with their sub-heaps and the main arena's brk range, as far as the core holds them.

Knows: the ring, the chain of heap_info, the free list of arenas, sbrk_base. Does not know: chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

from coreheap.allocators.glibc.identify import Identification
from coreheap.allocators.glibc.locate import mapping_end
from coreheap.allocators.glibc.records import (
    ArenaState,
    HeapInfo,
    Layout,
    read_arena,
)
from coreheap.allocators.glibc.sub_heaps import age_in, chain_of, heap_of_another_size, size_at, wrong_size
from coreheap.corefile import Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Anomaly, Gap
from coreheap.quantities import AddressRange, format_address


@dataclass(frozen=True, slots=True)
class ArenaFacts:
    """One arena before its chunks are known.

    ``address`` is None for a main arena whose place nothing tells, ``state`` None where malloc_state was not saved.
    ``sub_heaps`` are oldest first. ``brk_range`` is the main arena's memory from sbrk_base to the end of top, for a
    contiguous arena.
    """

    index: int
    copy: int
    """Which copy of malloc it belongs to; 0 is the program's own."""
    address: int | None
    is_main: bool
    state: ArenaState | None
    sub_heaps: tuple[HeapInfo, ...]
    heap_max: int
    brk_range: AddressRange | None
    top_bytes: int | None
    on_free_list: bool | None
    sbrk_base: int = 0
    """Where the main arena's first memory began (mp_), 0 where unknown."""


@dataclass(frozen=True, slots=True)
class ArenaSurvey:
    """All arenas, main first where it is known, and what was contradictory or missing."""

    arenas: tuple[ArenaFacts, ...]
    anomalies: tuple[Anomaly, ...]
    gaps: tuple[Gap, ...]
    open_rings: frozenset[int] = frozenset()
    """Copies whose ring of arenas could not be followed to its end."""


def survey_arenas(core: Core, copies: tuple[Identification, ...]) -> ArenaSurvey:
    """Read every arena of every copy's ring, and arenas that only their saved sub-heaps still name.

    Arenas are numbered through: those of the first copy in the order of their ring, then the next copy's.
    """
    arenas: list[ArenaFacts] = []
    anomalies: list[Anomaly] = []
    gaps: list[Gap] = []
    claimed = {member for found in copies for member in found.ring.members}
    for copy, found in enumerate(copies):
        survey = _Survey(core, found, copy, anomalies, gaps)
        survey.add_to(arenas, claimed)
    open_rings = frozenset(copy for copy, found in enumerate(copies) if not found.ring.is_closed)
    return ArenaSurvey(tuple(arenas), tuple(anomalies), tuple(dict.fromkeys(gaps)), open_rings)


@dataclass(frozen=True, slots=True)
class _Survey:
    """One copy's arenas on their way into the survey of all."""

    core: Core
    found: Identification
    copy: int
    anomalies: list[Anomaly]
    gaps: list[Gap]

    def add_to(self, arenas: list[ArenaFacts], claimed: set[int]) -> None:
        """Append this copy's arenas; ``claimed`` are all that some ring leads to."""
        found = self.found
        addresses = list(found.ring.members)
        if not found.ring.is_closed:
            self.gaps.append(
                Gap(
                    "arena_ring_open",
                    "the ring of arenas could not be followed to its end; arenas may be missing",
                )
            )
            self._note_broken_ring(addresses, len(arenas))
            # Only then do sub-heaps that lead to unknown arenas say something: stale heap_info may lie anywhere.
            for header in found.headers:
                if header.ar_ptr not in claimed:
                    claimed.add(header.ar_ptr)
                    addresses.append(header.ar_ptr)
        states = {address: _state(self.core, address, found.layout, self.gaps) for address in addresses}
        headers: dict[int, dict[int, HeapInfo]] = {}
        for header in found.headers:
            headers.setdefault(header.ar_ptr, {})[header.address] = header
        free_list = _free_list(states, found)
        if found.ring.main is None:
            arenas.append(self._main_without_state(None, len(arenas)))
        for address in addresses:
            state, index = states[address], len(arenas)
            if address != found.ring.main:
                arenas.append(self._other_arena(address, state, index, headers.get(address, {}), free_list))
            elif state is None:
                arenas.append(self._main_without_state(address, index))
            else:
                arenas.append(self._main_arena(state, index, free_list))

    def _note_broken_ring(self, members: list[int], first_index: int) -> None:
        """An anomaly where the last arena's next is saved and cannot lead on: into memory that holds no arena, or none at all."""
        memory, offset = self.core.memory, self.found.layout.state.offset("next")
        if not members:
            return
        reached = members[0]  # main_arena where the ring led to it, else where it was entered
        unseen = set(members[1:])
        while True:
            try:
                following = memory.read_word(reached + offset)
            except MemoryFault:
                return
            if following not in unseen:
                break
            unseen.remove(following)
            reached = following
        is_mapped = memory.region_index(following) is not None
        if is_mapped and not memory.is_saved(following, following + self.found.layout.state.byte_count):
            return  # an arena may well be there
        self.anomalies.append(
            Anomaly(
                "arena_ring_damaged",
                reached,
                "next of the ring of arenas: another arena, at last main_arena",
                format_address(following),
                first_index + members.index(reached) + (self.found.ring.main is None),
                word_address=reached + offset,
                observed_word=following,
                expected_word=self.found.ring.main if len(members) == 1 else None,
            )
        )

    def _main_arena(self, state: ArenaState, index: int, free_list: dict[int, bool]) -> ArenaFacts:
        core, parameters = self.core, self.found.parameters
        top_bytes = size_at(core, state.top) if state.top else 0
        sbrk_base = parameters.values["sbrk_base"] if parameters else 0
        brk_range: AddressRange | None = None
        if state.system_mem and state.is_contiguous:
            if top_bytes is None:
                self.gaps.append(
                    Gap(
                        "top_not_saved",
                        "the main arena's top chunk is not in the core; its memory is taken from sbrk_base and system_mem",
                        AddressRange(state.top, state.top),
                    )
                )
            brk_range = _brk_range(core, self.found.layout, state, top_bytes, sbrk_base, index, self.anomalies)
        return ArenaFacts(
            index,
            self.copy,
            state.address,
            True,
            state,
            (),
            self.found.heap_max,
            brk_range,
            top_bytes,
            free_list.get(state.address),
            sbrk_base,
        )

    def _main_without_state(self, address: int | None, index: int) -> ArenaFacts:
        """The main arena when its malloc_state is missing: only its brk memory can still be recognised (``stretches``)."""
        if address is None:
            self.gaps.append(
                Gap(
                    "main_arena_unknown",
                    "no saved pointer leads to main_arena: its free lists are unknown, blocks in its fastbins count as in"
                    " use",
                )
            )
        return ArenaFacts(index, self.copy, address, True, None, (), self.found.heap_max, None, None, None)

    def _other_arena(
        self,
        address: int,
        state: ArenaState | None,
        index: int,
        by_header: dict[int, HeapInfo],
        free_list: dict[int, bool],
    ) -> ArenaFacts:
        core, found = self.core, self.found
        chain = chain_of(core, found, state, index, by_header, self.anomalies, self.gaps) if state is not None else {}
        complete = state is not None and sum(heap.size for heap in chain.values()) == state.system_mem
        is_whole = any(heap.address + found.layout.heap_info_bytes == address for heap in chain.values())
        if state is not None and not complete and is_whole and not set(by_header) - set(chain):
            total = sum(heap.size for heap in chain.values())
            wrong = heap_of_another_size(core, found.layout, state, chain, state.system_mem - total)
            if wrong is None:
                self.anomalies.append(_wrong_system_mem(found.layout, state, total, index))
            else:
                self.anomalies.append(wrong_size(found.layout, chain[wrong.address], wrong.size, index))
                chain[wrong.address] = wrong
        elif not complete:
            chain = {**by_header, **chain}
        elif extra := sorted(set(by_header) - set(chain)):
            self.anomalies.append(
                Anomaly(
                    "sub_heap_not_linked",
                    extra[0],
                    "a sub-heap that names this arena in the chain from its top",
                    f"{len(extra)} sub-heaps outside the chain",
                    index,
                )
            )
        sub_heaps = tuple(sorted(chain.values(), key=lambda heap: age_in(heap, chain)))
        total = sum(heap.size for heap in sub_heaps)
        if state is not None and total != state.system_mem:
            self.gaps.append(
                Gap(
                    "sub_heaps_missing",
                    f"arena {index} has {state.system_mem} bytes of system_mem, its sub-heaps in the core {total}",
                )
            )
        return ArenaFacts(
            index,
            self.copy,
            address,
            False,
            state,
            sub_heaps,
            found.heap_max,
            None,
            size_at(core, state.top) if state is not None else None,
            free_list.get(address),
        )


def _state(core: Core, address: int, layout: Layout, gaps: list[Gap]) -> ArenaState | None:
    try:
        return read_arena(core.memory, address, layout)
    except MemoryFault as fault:
        gaps.append(
            Gap(
                "arena_not_saved",
                f"the malloc_state at {format_address(address)} is not in the core ({fault.cause}): its free lists are"
                " unknown, blocks in its fastbins count as in use",
                AddressRange(address, address + layout.state.byte_count),
            )
        )
        return None


def _free_list(states: dict[int, ArenaState | None], found: Identification) -> dict[int, bool]:
    """Which arenas are on free_list: those that no thread is attached to (arena.c since 2.23); empty where unknown."""
    return {
        address: state.attached_threads == 0
        for address, state in states.items()
        if state is not None and state.attached_threads is not None
    }


def _brk_range(
    core: Core,
    layout: Layout,
    state: ArenaState,
    top_bytes: int | None,
    sbrk_base: int,
    index: int,
    anomalies: list[Anomaly],
) -> AddressRange | None:
    """The contiguous main arena's memory, which is [sbrk_base, end of top) and system_mem long; None where nothing fits.

    Where top ends there, or where its header was not saved, that holds whatever the kernel has there by now: the program may have
    protected pages, mapped over or unmapped them. Where top lies in [sbrk_base, sbrk_base + system_mem) and all of that is
    mapped, it is top's size that is wrong: the walk reports it. Where the three contradict each other otherwise, the range stays
    inside the memory of whichever is mapped, sbrk_base first.
    """
    end = state.top + top_bytes if state.top and top_bytes else 0
    start = sbrk_base or end - state.system_mem
    expected = start + state.system_mem
    mapped_end = mapping_end(core.memory, start)
    holds_top = sbrk_base and start <= state.top < expected
    if holds_top and (end == expected or top_bytes is None or expected <= mapped_end):
        return AddressRange(start, expected)
    if end == expected <= mapped_end:
        return AddressRange(start, expected)
    if top_bytes and sbrk_base and start <= state.top < end == mapped_end:
        # top ends where the break does: it is system_mem that is wrong.
        anomalies.append(_wrong_system_mem(layout, state, end - start, index))
        return AddressRange(start, end)
    if top_bytes is not None:
        anomalies.append(
            Anomaly(
                "top_not_at_end_of_brk",
                state.address,
                f"top to end {state.system_mem:#x} bytes (system_mem) behind sbrk_base {format_address(start)}",
                f"top at {format_address(state.top)} of {top_bytes:#x} bytes",
                index,
                word_address=state.address + layout.state.offset("top"),
                observed_word=state.top,
            )
        )
    if mapped_end <= start:
        return None
    return AddressRange(start, min(expected, mapped_end))


def _wrong_system_mem(layout: Layout, state: ArenaState, expected: int, index: int) -> Anomaly:
    place = state.address + layout.state.offset("system_mem")
    return Anomaly(
        "system_mem_damaged",
        state.address,
        f"system_mem: {expected:#x}, what the arena's memory adds up to",
        f"{state.system_mem:#x}",
        index,
        word_address=place,
        observed_word=state.system_mem,
        expected_word=expected,
    )
