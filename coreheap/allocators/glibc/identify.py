"""Which release's layout a core has, decided by how well each fits all arenas.

Every generation is scored by invariants; a version string, where there is one, is only evidence beside it. The result
names the winner, the runner-up, and every fact that spoke for or against.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc import locate
from coreheap.allocators.glibc.layouts import GENERATIONS, HUGE_PAGE_BYTES, WORD_CLASS_OF_MACHINE, WORD_CLASSES
from coreheap.allocators.glibc.locate import ArenaRing, Sighting
from coreheap.allocators.glibc.parameters import (
    Parameters,
    find_parameters,
    parameters_evidence,
)
from coreheap.allocators.glibc.records import FREE_LIST_LIMIT, HeapInfo, Layout, read_arena
from coreheap.allocators.glibc.scoring import (
    ARENA_ACCEPTED,
    arena_score,
    arena_scores,
    fastbin_heads,
    sampled,
    sub_heap_score,
    tcache_score,
)
from coreheap.allocators.glibc.tcache import are_tcaches, tcache_kind, wanted_tcache
from coreheap.allocators.glibc.thread_storage import ThreadStorage
from coreheap.allocators.glibc.threads import ThreadWords, copy_of, find_thread_words, wanted_arena
from coreheap.allocators.glibc.version import LibcVersion, libc_version
from coreheap.allocators.glibc.ways import Globals, evidence_for, evidence_for_layout, find_globals
from coreheap.corefile import Core
from coreheap.corefile.regions import LAST_ADDRESS
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength
from coreheap.quantities import format_address

FIRST_CHUNK_TRUST = 0.5
"""What a tcache structure in a heap's first chunk is worth beside one that a thread's storage leads to."""

RING_STEPS_LIMIT = 2 * FREE_LIST_LIMIT
"""Members of all rings that are tried, together: thousands of arenas may lead into one ring that none of them is in."""

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


def layouts_for(core: Core) -> tuple[Layout, ...]:
    """Every layout that the core's machine may have, newest first."""
    return tuple(
        Layout(
            generation,
            WORD_CLASSES[WORD_CLASS_OF_MACHINE.get(core.machine, generation.i386_word_class)],
        )
        for generation in reversed(GENERATIONS)
    )


def _heap_max_candidates(layout: Layout) -> tuple[int, ...]:
    """Heap maxima to try: the default, and 4 x each huge page size that hugetlb settings allow (2.35-2.41)."""
    default = layout.word_class.default_heap_max
    if not layout.generation.heap_max_follows_hugetlb:
        return (default,)
    return (default, *(4 * page_bytes for page_bytes in HUGE_PAGE_BYTES))


ARENAS_AT_ONCE = 256
"""Arenas of a ring that are looked at together, 2 KiB each."""


@dataclass(frozen=True, slots=True)
class FoundRing:
    """The best ring of arenas under one kind of malloc_state, the parts of the score that follow from it, and why."""

    ring: ArenaRing
    heap_max: int
    headers: tuple[HeapInfo, ...]
    parts: dict[str, float]
    main_is_saved: bool
    fastbin_heads: npt.NDArray[np.uint64]
    evidence: tuple[Evidence, ...]


@dataclass(slots=True)
class Search:
    """What is found once and shared by all candidate layouts and copies of malloc."""

    core: Core
    layouts: tuple[Layout, ...]
    libcs: tuple[Globals, ...]
    storage: ThreadStorage
    headers: dict[int, tuple[HeapInfo, ...]]
    behind: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    scores: dict[Hashable, dict[int, float]] = field(default_factory=dict)
    rings: dict[Hashable, FoundRing | None] = field(default_factory=dict)
    words: dict[Hashable, ThreadWords] = field(default_factory=dict)

    @property
    def symbols(self) -> tuple[Sighting, ...]:
        """Every place that some libc names main_arena."""
        return tuple(sighting for libc in self.libcs for sighting in libc.main_arena)

    def libc_of(self, main_arena: int | None) -> Globals | None:
        """The libc that names a place main_arena; None where none or several do."""
        own = [libc for libc in self.libcs if any(sighting.address == main_arena for sighting in libc.main_arena)]
        return own[0] if len(own) == 1 else None

    def mp_symbols(self, main_arena: int | None) -> tuple[Sighting, ...]:
        """Where symbols say that mp_ of an arena's own libc is; another copy's mp_ says nothing of it."""
        libc = self.libc_of(main_arena)
        if libc is None and len(self.libcs) == 1:
            libc = self.libcs[0]
        if libc is None:
            return ()
        return tuple(sighting for sighting in libc.parameters if sighting.evidence.strength is Strength.PROOF)

    def headers_for(self, layout: Layout, heap_max: int) -> tuple[HeapInfo, ...]:
        if heap_max not in self.headers:
            self.headers[heap_max] = locate.sub_heap_headers(self.core, layout, heap_max)
        return self.headers[heap_max]

    def heap_behind_program(self, layout: Layout) -> list[tuple[int, int]]:
        """As ``locate.heap_behind_program``, which walks the heap: all layouts of a word class have the same."""
        name = layout.word_class.name
        if name not in self.behind:
            self.behind[name] = locate.heap_behind_program(self.core, layout)
        return self.behind[name]

    def ring_by_symbol_or_sub_heaps(self, layout: Layout, heap_max: int) -> FoundRing | None:
        """The best ring that symbols and sub-heaps lead to: layouts with the same malloc_state and heap_info have the same."""
        kind = (ring_kind(layout), heap_max)
        if kind not in self.rings:
            headers = self.headers_for(layout, heap_max)
            # A sub-heap's own arena lies right behind heap_info: the layout's sizeof decides whether it is one.
            own = {
                header.ar_ptr
                for header in headers
                if header.ar_ptr == header.address + layout.heap_info_bytes and header.prev == 0
            }
            found_by = "a heap_info at an aligned address leads to this arena"
            sightings = [
                *self.symbols,
                *(
                    Sighting(address, Evidence(found_by, "sub-heap headers", Strength.SOLID, address))
                    for address in sorted(own)
                ),
            ]
            self.rings[kind] = self.find_ring(layout, heap_max, headers, sightings)
        return self.rings[kind]

    def find_ring(
        self,
        layout: Layout,
        heap_max: int,
        headers: tuple[HeapInfo, ...],
        sightings: list[Sighting],
    ) -> FoundRing | None:
        """The best ring of arenas that the sightings lead to; None where none is accepted."""
        memory = self.core.memory
        score_of = partial(self.score_of_arena, layout)
        best_ring: ArenaRing | None = None
        best_key = (-1, False, 0.0)
        best_evidence: list[Evidence] = []
        covered: set[int] = set()
        steps, ahead = 0, 1
        for number, sighting in enumerate(sightings):
            if sighting.address in covered:
                continue
            if sighting.address not in self.scores.get(ring_kind(layout), {}):
                # Under the layout of another release all of them fail: so more and more are looked at together.
                self.score_arenas(layout, [other.address for other in sightings[number : number + ahead]])
                ahead = min(2 * ahead, ARENAS_AT_ONCE)
            if score_of(sighting.address) < ARENA_ACCEPTED:
                continue
            if steps > RING_STEPS_LIMIT:
                break
            ring = locate.ring_from(memory, sighting.address, layout, heap_max, self.ring_test(layout))
            covered.update(ring.members)
            steps += len(ring.members)
            members = sampled(ring.members)
            self.score_arenas(layout, members)
            known = [score for member in members if (score := score_of(member)) >= 0]
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
        sub_heap_share, sub_heap_evidence = sub_heap_score(memory, layout, best_ring, headers)
        if sub_heap_share is not None:
            parts["sub-heaps"] = sub_heap_share
            evidence.append(sub_heap_evidence)
        main_is_saved = best_ring.main is not None and score_of(best_ring.main) >= 0
        heads = fastbin_heads(memory, layout, sampled(best_ring.members))
        return FoundRing(best_ring, heap_max, headers, parts, main_is_saved, heads, tuple(evidence))

    def ring_test(self, layout: Layout) -> Callable[[int], bool]:
        """Whether a place may be an arena; to be asked of the members of one ring in their order.

        Under a layout with another heap_info every arena is asked for. So it looks ahead along the ring, twice as far each time.
        """
        scores = self.scores.setdefault(ring_kind(layout), {})
        ahead = 1

        def may_be_arena(address: int) -> bool:
            nonlocal ahead
            if address not in scores:
                self.score_arenas(layout, locate.next_arenas(self.core.memory, address, layout, ahead))
                ahead = min(2 * ahead, ARENAS_AT_ONCE)
            return not 0 <= self.score_of_arena(layout, address) < ARENA_ACCEPTED

        return may_be_arena

    def score_arenas(self, layout: Layout, addresses: Sequence[int]) -> None:
        """Look at several places at once that ``score_of_arena`` will be asked for."""
        scores = self.scores.setdefault(ring_kind(layout), {})
        new = [address for address in addresses if address not in scores]
        scores.update(arena_scores(self.core.memory, new, layout))

    def score_of_arena(self, layout: Layout, address: int) -> float:
        """As ``arena_score``, -1 where the malloc_state was not saved. Layouts of the same kind have the same."""
        scores = self.scores.setdefault(ring_kind(layout), {})
        if address not in scores:
            memory = self.core.memory
            try:
                scores[address] = arena_score(memory, read_arena(memory, address, layout), layout)
            except MemoryFault:
                scores[address] = -1.0
        return scores[address]

    def thread_words(self, layout: Layout, ring: ArenaRing, headers: tuple[HeapInfo, ...]) -> ThreadWords:
        """What the threads' storage says: layouts with the same arenas and the same tcache structure have the same."""
        owners = frozenset(header.ar_ptr for header in headers)
        kind = (ring.main, frozenset(ring.members), owners, tcache_kind(layout))
        if kind not in self.words:
            self.words[kind] = find_thread_words(
                self.storage,
                wanted_arena(ring.members, headers),
                wanted_tcache(self.core.memory, layout),
                copy_of(self.core, self.libcs, ring.main),
            )
        return self.words[kind]


def ring_kind(layout: Layout) -> Hashable:
    """Equal for layouts under which the same places are arenas: what ``arena_score`` and ``Search.find_ring`` ask of one.

    An unused main_arena is told by the heap_info that its next arena lies behind.
    """
    generation = layout.generation
    return layout.word_class.name, generation.malloc_state, generation.flags_hold_fastchunks, layout.heap_info_bytes


def search_of(core: Core) -> Search:
    """What libc itself says in a core, for all layouts that its machine may have."""
    layouts = layouts_for(core)
    return Search(core, layouts, find_globals(core, layouts, arena_score), ThreadStorage(core), {})


def identify(core: Core) -> Identification | None:
    """Find the arenas and the layout that fits them best; None when nothing in the core is an arena."""
    return best_identification(search_of(core))


def best_identification(search: Search) -> Identification | None:
    """As ``identify``: of several copies of malloc the one with the most arenas (``copies`` finds the others)."""
    core, layouts = search.core, search.layouts
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
            -candidate.thread_words.tcache_damaged,
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
    return with_words_of_libc(
        search,
        replace(
            best,
            alternatives=tuple(other.layout.generation.name for other in tied),
            libc_version=version,
            runner_up=(
                f"{behind.layout.generation.name} ({behind.score:.2f} against {best.score:.2f})" if behind else None
            ),
        ),
    )


def with_words_of_libc(search: Search, found: Identification) -> Identification:
    """The identification with what its libc and the version banner say of it beside its own evidence."""
    facts = (*found.evidence, *_word_of_libc(search, found), *_version_evidence(found, found.libc_version))
    return replace(found, evidence=tuple(dict.fromkeys(facts)))


def _names(candidate: Identification, version: LibcVersion | None) -> bool:
    """Whether a generation has the banner's release, as a tag or as a branch."""
    if version is None:
        return False
    return any(release.partition("-")[0] == version.release for release in candidate.layout.generation.releases)


def _word_of_libc(search: Search, best: Identification) -> tuple[Evidence, ...]:
    """What libc's own symbols, DWARF, relocations, initial values and code say of the places that were chosen.

    A way that names another place speaks against the choice, and says which place.
    """
    libc = search.libc_of(best.ring.main)
    if best.ring.main is None or libc is None:
        return ()
    facts = list(evidence_for(libc.main_arena, best.ring.main))
    if best.parameters is not None:
        facts += evidence_for(libc.parameters, best.parameters.address)
    # A malloc without tcache has every other structure of its release.
    described = next((layout for layout in search.layouts if layout.without_tcache == best.layout), best.layout)
    return (*facts, *evidence_for_layout(libc.layouts, described))


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


def _by_symbol_or_sub_heaps(search: Search, layout: Layout) -> Identification | None:
    """The best reading of the core under one layout from its symbols and sub-heaps, None where no arena fits it."""
    best: Identification | None = None
    for heap_max in _heap_max_candidates(layout):
        found = search.ring_by_symbol_or_sub_heaps(layout, heap_max)
        candidate = None if found is None else _reading(search, layout, found)
        if candidate is not None and (best is None or _heap_max_rank(candidate) > _heap_max_rank(best)):
            best = candidate
    return best


def _heap_max_rank(candidate: Identification) -> tuple[bool, float]:
    """Whether mp_ says the same of the heap maximum; then the score. A multiple of a heap maximum is one of its parts, too."""
    values = candidate.parameters.values if candidate.parameters else {}
    default = candidate.layout.word_class.default_heap_max
    return (4 * values.get("hp_pagesize", 0) or default) == candidate.heap_max, candidate.score


def _by_scan(search: Search, layouts: tuple[Layout, ...]) -> list[Identification]:
    """Readings from the first stretch of writable memory that an arena is found in, libc's own data first."""
    for hits in locate.scan(search.core, layouts):
        for arenas_of in (locate.arenas_of_next_hits, locate.arenas_of_empty_bins):
            candidates = []
            for layout in layouts:
                heap_max = layout.word_class.default_heap_max
                headers = search.headers_for(layout, heap_max)
                sightings = list(arenas_of(search.core, hits, layout))
                candidate = identification(search, layout, heap_max, headers, sightings)
                if candidate is not None:
                    candidates.append(candidate)
            if candidates:
                return candidates
    return []


def identification(
    search: Search,
    layout: Layout,
    heap_max: int,
    headers: tuple[HeapInfo, ...],
    sightings: list[Sighting],
) -> Identification | None:
    """The reading of the core from the best ring of arenas that the sightings lead to; None where none is accepted."""
    found = search.find_ring(layout, heap_max, headers, sightings)
    return None if found is None else _reading(search, layout, found)


def _reading(search: Search, layout: Layout, found: FoundRing) -> Identification:
    """The reading of the core under one layout, from the ring that its malloc_state gives."""
    ring, parts, evidence = found.ring, dict(found.parts), list(found.evidence)
    parameters = find_parameters(search.core, layout, ring, search.mp_symbols(ring.main))
    if found.main_is_saved:
        parts["parameters"] = parameters.score if parameters else 0.0
        evidence.extend(parameters_evidence(search.core.memory, layout, ring, parameters))
    sbrk_base = parameters.values["sbrk_base"] if parameters else 0
    first_chunks = [layout.aligned_header(sbrk_base)] if sbrk_base else []
    first_chunks += [member - layout.heap_info_bytes + layout.first_chunk_in_arena_heap for member in ring.others]
    first_payloads = [chunk + layout.word_class.header_bytes for chunk in first_chunks]
    return _with_threads(
        search, layout, found.heap_max, ring, found.headers, parameters, parts, evidence, first_payloads,
        found.fastbin_heads,
    )  # fmt: skip


def _without_arenas(search: Search, layout: Layout) -> Identification | None:
    """A heap of which only the main arena's chunks are in the core: its malloc_state was not saved."""
    places = search.heap_behind_program(layout)
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
        search,
        layout,
        layout.word_class.default_heap_max,
        ArenaRing(None, (), False),
        (),
        None,
        {},
        evidence,
        [start + layout.word_class.header_bytes],
        np.zeros(0, np.uint64),
    )


def _with_threads(
    search: Search,
    layout: Layout,
    heap_max: int,
    ring: ArenaRing,
    headers: tuple[HeapInfo, ...],
    parameters: Parameters | None,
    parts: dict[str, float],
    evidence: list[Evidence],
    first_payloads: list[int],
    heads: npt.NDArray[np.uint64],
) -> Identification:
    """Adds what the threads' storage says, and the score over all parts.

    Where no thread's storage leads to a tcache, the first chunks of heaps are looked at: up to 2.41 a thread's first
    allocation makes its tcache there.
    """
    memory = search.core.memory
    words = search.thread_words(layout, ring, headers)
    # A place that libc names and no thread's structure bears out says nothing of the layout.
    addresses = [int(address) for address in words.tcache.tolist() if address and words.tcache_hits]
    trust = 1.0
    if not addresses:
        trust = FIRST_CHUNK_TRUST
        # sbrk_base may be any number in a damaged mp_: behind the last address there is no chunk.
        payloads = np.array([address for address in first_payloads if address <= LAST_ADDRESS], np.uint64)
        addresses = payloads[are_tcaches(memory, layout, payloads)].tolist()
    tcache_share, link_share = tcache_score(memory, layout, addresses[:TCACHES_SAMPLED], heads)
    if tcache_share is not None:
        parts["tcache"] = trust * tcache_share
    if link_share is not None:
        parts["links"] = link_share
    evidence.extend(words.evidence)
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
