"""Which release's layout a core has, decided by how well each fits all arenas.

Every generation is scored by invariants; a version string, where there is one, is only evidence beside it. The result
names the winner, the runner-up, and every fact that spoke for or against.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from coreheap.allocators.glibc import locate
from coreheap.allocators.glibc.layouts import GENERATIONS, WORD_CLASS_OF_MACHINE, WORD_CLASSES
from coreheap.allocators.glibc.locate import ArenaRing, Sighting, heap_behind_program
from coreheap.allocators.glibc.parameters import (
    Parameters,
    find_parameters,
    parameters_evidence,
)
from coreheap.allocators.glibc.records import (
    ArenaState,
    HeapInfo,
    Layout,
    read_arena,
    read_tcache,
)
from coreheap.allocators.glibc.tcache import (
    counts_agree,
    is_tcache,
    links_of_tcache,
    may_stand_for_tcache,
)
from coreheap.allocators.glibc.threads import ThreadWords, find_thread_words
from coreheap.allocators.glibc.version import LibcVersion, libc_version
from coreheap.allocators.glibc.ways import Globals, evidence_for, evidence_for_layout, find_globals
from coreheap.corefile import AddressSpace, Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import format_address

ARENA_ACCEPTED = 0.9
"""Share of an arena's invariants that must hold before a place counts as an arena at all."""

FIRST_CHUNK_TRUST = 0.5
"""What a tcache structure in a heap's first chunk is worth beside one that a thread's storage leads to."""

ARENAS_SAMPLED = 64
TCACHES_SAMPLED = 16
# Weights of the parts of a generation's score; each part's share is between 0 and 1.
WEIGHTS = {"arenas": 8.0, "sub-heaps": 4.0, "parameters": 4.0, "tcache": 4.0, "links": 2.0}


@dataclass(frozen=True, slots=True)
class Identification:
    """The layout that was chosen and what it rests on."""

    layout: Layout
    heap_max: int
    ring: ArenaRing
    headers: tuple[HeapInfo, ...]
    parameters: Parameters | None
    thread_words: ThreadWords
    score: float
    parts: dict[str, float]
    alternatives: tuple[str, ...]
    runner_up: str | None
    evidence: tuple[Evidence, ...]
    libc_version: LibcVersion | None = None
    other_copies: tuple[int, ...] = ()


def layouts_for(core: Core) -> tuple[Layout, ...]:
    """Every layout that the core's machine may have, newest first."""
    return tuple(
        Layout(
            generation,
            WORD_CLASSES[WORD_CLASS_OF_MACHINE.get(core.machine, generation.i386_word_class)],
        )
        for generation in reversed(GENERATIONS)
    )


def arena_score(memory: AddressSpace, state: ArenaState, layout: Layout) -> float:
    """Share of the invariants of one malloc_state that hold under a layout, between 0 and 1.

    Source: malloc_init_state, sysmalloc, arena_get2 (glibc 2.12-2.44). Half of it are the 127 bins.
    """
    word_class = layout.word_class
    generation = layout.generation
    flags_allowed = 0b111 if generation.flags_hold_fastchunks else 0b010
    if state.is_unused:
        checks = [state.next == state.address, not state.bins.any(), not state.fastbins.any()]
        return sum(checks) / len(checks) if all(checks) else 0.0
    number = np.arange(1, 128, dtype=np.uint64)
    header = np.uint64(layout.bin_header(state.address, 1)) + (number - np.uint64(1)) * np.uint64(
        word_class.header_bytes
    )
    fd, bk = state.bins[0::2], state.bins[1::2]
    empty = (fd == header) & (bk == header)
    phase = np.uint64(word_class.granule_phase)
    mask = np.uint64(word_class.alignment - 1)
    linked = (
        (fd != header)
        & (bk != header)
        & ((fd & mask) == phase)
        & ((bk & mask) == phase)
        & locate.mapped_writable(memory, fd)
        & locate.mapped_writable(memory, bk)
    )
    bins_share = float((empty | linked).mean())
    fast = state.fastbins[state.fastbins != 0]
    top = np.array([state.top], dtype=np.uint64)
    checks = [
        state.mutex in (0, 1, 2),
        state.flags & ~flags_allowed == 0,
        state.system_mem <= state.max_system_mem,
        state.top == layout.bin_header(state.address, 1)
        or (
            (state.top & (word_class.alignment - 1)) == word_class.granule_phase
            and bool(locate.mapped_writable(memory, top)[0])
        ),
        state.system_mem > 0 or state.top == layout.bin_header(state.address, 1),
        state.attached_threads is None or state.attached_threads < 1 << 20,
        bool((((fast & mask) == phase) & locate.mapped_writable(memory, fast)).all()),
        state.next != 0 and bool(locate.mapped_writable(memory, np.array([state.next], np.uint64))[0]),
    ]
    return 0.5 * bins_share + 0.5 * sum(checks) / len(checks)


def sampled(members: tuple[int, ...]) -> tuple[int, ...]:
    """Members of a ring, evenly spread and no more than twice ARENAS_SAMPLED: enough to judge a layout by."""
    return members[:: max(1, len(members) // ARENAS_SAMPLED)]


def _heap_max_candidates(layout: Layout) -> tuple[int, ...]:
    """Heap maxima to try: the default, and 4 x each huge page size that hugetlb settings allow (2.35-2.41)."""
    default = layout.word_class.default_heap_max
    if not layout.generation.heap_max_follows_hugetlb:
        return (default,)
    return (default, 8 << 20, 4 << 30)


@dataclass(slots=True)
class _Search:
    """What is found once and shared by all candidate layouts."""

    core: Core
    headers: dict[int, tuple[HeapInfo, ...]]
    symbols: tuple[Sighting, ...]
    mp_symbols: tuple[Sighting, ...]

    def headers_for(self, layout: Layout, heap_max: int) -> tuple[HeapInfo, ...]:
        if heap_max not in self.headers:
            self.headers[heap_max] = locate.sub_heap_headers(self.core, layout, heap_max)
        return self.headers[heap_max]


def identify(core: Core) -> Identification | None:
    """Find the arenas and the layout that fits them best; None when nothing in the core is an arena."""
    layouts = layouts_for(core)
    copies = find_globals(core, layouts, arena_score)
    search = _Search(
        core,
        {},
        tuple(sighting for copy in copies for sighting in copy.main_arena),
        tuple(
            sighting for copy in copies for sighting in copy.parameters if sighting.evidence.strength is Strength.PROOF
        ),
    )
    candidates = [candidate for layout in layouts if (candidate := _by_symbol_or_sub_heaps(search, layout))]
    if not candidates:
        candidates = _by_scan(search, layouts)
    if not candidates:
        candidates = [candidate for layout in layouts if (candidate := _without_arenas(search, layout)) is not None]
    if not candidates:
        return None
    version = libc_version(core)
    # Of equal scores the one that the banner names comes first; a banner never beats a better score.
    # Then comes the one that more threads' tcaches fit, and of these the one that allows for more of them.
    candidates.sort(
        key=lambda candidate: (
            -candidate.score,
            not _names(candidate, version),
            -candidate.thread_words.tcache_hits,
            -len(candidate.layout.tcache_chunk_bytes),
        )
    )
    best = candidates[0]
    # Generations whose differences leave no trace in this core score alike; the report names them all.
    tied = [
        other
        for other in candidates[1:]
        if other.score > best.score - 1e-9 and _names(other, version) == _names(best, version)
    ]
    behind = next((other for other in candidates if other.score <= best.score - 1e-9), None)
    return replace(
        best,
        alternatives=tuple(other.layout.generation.name for other in tied),
        libc_version=version,
        evidence=tuple(
            dict.fromkeys((*best.evidence, *_word_of_libc(best, copies), *_version_evidence(best, version)))
        ),
        other_copies=_other_copies(core, best, copies),
        runner_up=(
            f"{behind.layout.generation.name} ({behind.score:.2f} against {best.score:.2f})" if behind else None
        ),
    )


def _names(candidate: Identification, version: LibcVersion | None) -> bool:
    """Whether a generation has the banner's release, as a tag or as a branch."""
    if version is None:
        return False
    return any(release.partition("-")[0] == version.release for release in candidate.layout.generation.releases)


def _word_of_libc(best: Identification, copies: tuple[Globals, ...]) -> tuple[Evidence, ...]:
    """What libc's own symbols, DWARF, relocations, initial values and code say of the places that were chosen.

    A way that names another place speaks against the choice, and says which place.
    """
    own = [copy for copy in copies if any(sighting.address == best.ring.main for sighting in copy.main_arena)]
    if best.ring.main is None or len(own) != 1:
        return ()
    copy = own[0]
    facts = list(evidence_for(copy.main_arena, best.ring.main))
    if best.parameters is not None:
        facts += evidence_for(copy.parameters, best.parameters.address)
    return (*facts, *evidence_for_layout(copy.layouts, best.layout))


def _other_copies(core: Core, best: Identification, copies: tuple[Globals, ...]) -> tuple[int, ...]:
    """main_arena of other copies of malloc that hold memory: libc in a dlmopen namespace, libc_malloc_debug."""
    others = []
    for copy in copies:
        addresses = {sighting.address for sighting in copy.main_arena}
        if best.ring.main in addresses:
            continue
        for address in sorted(addresses):
            try:
                state = read_arena(core.memory, address, best.layout)
            except MemoryFault:
                continue
            if state.system_mem and arena_score(core.memory, state, best.layout) >= ARENA_ACCEPTED:
                others.append(address)
    return tuple(others)


def _version_evidence(best: Identification, version: LibcVersion | None) -> tuple[Evidence, ...]:
    if version is None:
        return ()
    agrees = _names(best, version)
    return (
        Evidence(
            f"libc calls itself {version}" + ("" if agrees else ", whose tag has another layout"),
            version.source,
            Strength.HINT,
            speaks_against=not agrees,
        ),
    )


def _by_symbol_or_sub_heaps(search: _Search, layout: Layout) -> Identification | None:
    """The best reading of the core under one layout from its symbols and sub-heaps, None where no arena fits it."""
    best: Identification | None = None
    for heap_max in _heap_max_candidates(layout):
        headers = search.headers_for(layout, heap_max)
        # A sub-heap's own arena lies right behind heap_info: the layout's sizeof decides whether it is one.
        own = {
            header.ar_ptr
            for header in headers
            if header.ar_ptr == header.address + layout.heap_info_bytes and header.prev == 0
        }
        found_by = "a heap_info at an aligned address leads to this arena"
        sightings = [
            *search.symbols,
            *(
                Sighting(address, Evidence(found_by, "sub-heap headers", Strength.SOLID, address))
                for address in sorted(own)
            ),
        ]
        candidate = _identification(search, layout, heap_max, headers, sightings)
        if candidate is not None and (best is None or candidate.score > best.score):
            best = candidate
    return best


def _by_scan(search: _Search, layouts: tuple[Layout, ...]) -> list[Identification]:
    """Readings from the first stretch of writable memory that an arena is found in, libc's own data first."""
    for hits in locate.scan(search.core, layouts):
        for arenas_of in (locate.arenas_of_next_hits, locate.arenas_of_empty_bins):
            candidates = []
            for layout in layouts:
                heap_max = layout.word_class.default_heap_max
                headers = search.headers_for(layout, heap_max)
                sightings = list(arenas_of(search.core, hits, layout))
                candidate = _identification(search, layout, heap_max, headers, sightings)
                if candidate is not None:
                    candidates.append(candidate)
            if candidates:
                return candidates
    return []


def _identification(
    search: _Search,
    layout: Layout,
    heap_max: int,
    headers: tuple[HeapInfo, ...],
    sightings: list[Sighting],
) -> Identification | None:
    core, memory = search.core, search.core.memory
    header_bytes = layout.word_class.header_bytes
    best_ring: ArenaRing | None = None
    best_key = (-1, False, 0.0)
    best_evidence: list[Evidence] = []
    states: dict[int, float] = {}
    covered: set[int] = set()

    def score_of(address: int) -> float:
        if address not in states:
            try:
                states[address] = arena_score(memory, read_arena(memory, address, layout), layout)
            except MemoryFault:
                states[address] = -1.0
        return states[address]

    for sighting in sightings:
        if sighting.address in covered or score_of(sighting.address) < ARENA_ACCEPTED:
            continue
        ring = locate.ring_from(
            memory,
            sighting.address,
            layout,
            heap_max,
            lambda address: not 0 <= score_of(address) < ARENA_ACCEPTED,
        )
        covered.update(ring.members)
        known = [score for member in sampled(ring.members) if (score := score_of(member)) >= 0]
        # Damage in some arenas must not hide the others; a ring of mostly something else is not one.
        if 2 * sum(score >= ARENA_ACCEPTED for score in known) <= len(known):
            continue
        key = (len(ring.members), ring.is_closed, sum(known) / len(known))
        if key > best_key:
            best_ring, best_key, best_evidence = ring, key, [sighting.evidence]
    if best_ring is None:
        return None
    parts = {"arenas": best_key[2]}
    evidence = [*best_evidence, locate.describe_ring(best_ring)]
    sub_heap_share, sub_heap_evidence = _sub_heap_score(memory, layout, best_ring, headers)
    if sub_heap_share is not None:
        parts["sub-heaps"] = sub_heap_share
        evidence.append(sub_heap_evidence)
    parameters = find_parameters(search.core, layout, best_ring, search.mp_symbols)
    if best_ring.main is not None and score_of(best_ring.main) >= 0:
        parts["parameters"] = parameters.score if parameters else 0.0
        evidence.extend(parameters_evidence(memory, layout, best_ring, parameters))
    first_payloads = [
        layout.aligned_header(base) + header_bytes
        for base in ([parameters.values["sbrk_base"]] if parameters else [])
        if base
    ]
    first_payloads += [
        member - layout.heap_info_bytes + layout.first_chunk_in_arena_heap + header_bytes for member in best_ring.others
    ]
    return _with_threads(core, layout, heap_max, best_ring, headers, parameters, parts, evidence, first_payloads)


def _without_arenas(search: _Search, layout: Layout) -> Identification | None:
    """A heap of which only the main arena's chunks are in the core: its malloc_state was not saved."""
    core = search.core
    places = heap_behind_program(core, layout)
    if not places:
        return None
    start, end = places[0]
    evidence = [
        Evidence(
            f"chunks from the first byte of the mapping behind the program, up to {format_address(end)} or the file's end",
            "chunk walk",
            Strength.SOLID,
            start,
        ),
        Evidence("no malloc_state is in the core", "all saved memory", Strength.HINT, speaks_against=True),
    ]
    return _with_threads(
        core,
        layout,
        layout.word_class.default_heap_max,
        ArenaRing(None, (), False),
        (),
        None,
        {},
        evidence,
        [start + layout.word_class.header_bytes],
    )


def _with_threads(
    core: Core,
    layout: Layout,
    heap_max: int,
    ring: ArenaRing,
    headers: tuple[HeapInfo, ...],
    parameters: Parameters | None,
    parts: dict[str, float],
    evidence: list[Evidence],
    first_payloads: list[int],
) -> Identification:
    """Adds what the threads' storage says, and the score over all parts.

    Where no thread's storage leads to a tcache, the first chunks of heaps are looked at: up to 2.41 a thread's first
    allocation makes its tcache there.
    """
    memory = core.memory
    words = find_thread_words(
        core,
        ring.members,
        lambda address: is_tcache(memory, layout, address),
        lambda address: may_stand_for_tcache(memory, layout, address),
    )
    addresses = [int(address) for address in words.tcache.tolist() if address]
    trust = 1.0
    if not addresses:
        trust = FIRST_CHUNK_TRUST
        addresses = [address for address in first_payloads if is_tcache(memory, layout, address)]
    tcache_share, link_share = _tcache_score(memory, layout, addresses[:TCACHES_SAMPLED])
    if tcache_share is not None:
        parts["tcache"] = trust * tcache_share
    if link_share is not None:
        parts["links"] = link_share
    if words.arena_hits:
        evidence.append(
            Evidence(
                f"the word at thread pointer {words.arena_offset:+#x} is an arena in {words.arena_hits} of"
                f" {int(words.known.sum())} threads and 0 in the others",
                "thread-local storage",
                Strength.SOLID,
            )
        )
    # A part that a layout lacks counts nothing: a newer layout that finds a tcache gains over one that knows none.
    return Identification(
        layout=layout,
        heap_max=heap_max,
        ring=ring,
        headers=headers,
        parameters=parameters,
        thread_words=words,
        score=sum(WEIGHTS[name] * share for name, share in parts.items()),
        parts=parts,
        alternatives=(),
        runner_up=None,
        evidence=tuple(evidence),
    )


def _sub_heap_score(
    memory: AddressSpace, layout: Layout, ring: ArenaRing, headers: tuple[HeapInfo, ...]
) -> tuple[float | None, Evidence]:
    """Share of non-main arenas that lie right behind a heap_info and whose sub-heaps add up to system_mem, to the byte.

    None without such arenas.
    """
    committed: dict[int, int] = {}
    for header in headers:
        committed[header.ar_ptr] = committed.get(header.ar_ptr, 0) + header.size
    places = {header.address + layout.heap_info_bytes for header in headers}
    system_mem_offset = layout.state.offset("system_mem")
    held = asked = 0
    for address in ring.others:
        try:
            system_mem = memory.read_word(address + system_mem_offset)
        except MemoryFault:
            continue
        asked += 1
        held += address in places and committed.get(address) == system_mem
    evidence = Evidence(
        f"sub-heap sizes add up to system_mem, to the byte, in {held} of {asked} arenas",
        "sub-heap headers",
        Strength.PROOF if held == asked else Strength.HINT,
        speaks_against=held < asked,
    )
    return (held / asked if asked else None), evidence


def _tcache_score(memory: AddressSpace, layout: Layout, addresses: list[int]) -> tuple[float | None, float | None]:
    """How well tcache structures fit (counts against lists) and how well links decode; None where there is nothing to ask."""
    if layout.tcache is None or not addresses:
        return None, None
    held = asked = link_held = link_asked = 0
    for address in addresses:
        try:
            state = read_tcache(memory, address, layout)
        except MemoryFault:
            continue
        asked += 1
        held += counts_agree(layout, state)
        good, seen = links_of_tcache(memory, layout, state.entries, address)
        link_held += good
        link_asked += seen
    return (
        held / asked if asked else None,
        link_held / link_asked if link_asked else None,
    )
