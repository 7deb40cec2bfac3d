"""What damages are made of while they are put together: anomalies of one cause, with what they are about.

Knows: which anomalies of a heap speak of headers, of links, or of malloc's own structures. Does not know: who did it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from coreheap.damage import DamagedPlace
from coreheap.evidence import Anomaly
from coreheap.forensics.places import Places
from coreheap.heap import BINNED_STATES, ChunkState

OF_THE_NEXT_HEADER = frozenset(
    {"prev_size_mismatch", "free_unlisted", "list_looks_in_use", "list_looks_free", "free_before_top"}
)
"""Codes about a chunk that the header behind it contradicts."""

OF_A_HEADER = frozenset(
    {
        "broken_chunk",
        "size_leads_into_a_chunk",
        "mmapped_flag_inside",
        "arena_flag_mismatch",
        "first_chunk_previous_free",
        "adjacent_free",
        "marker_without_fencepost",
        "top_size_mismatch",
        "top_damaged",
        "fencepost_damaged",
        "list_wrong_size",
        "list_wrong_state",
    }
)

OF_A_STRUCTURE = {
    "top_not_at_end_of_brk": DamagedPlace.TOP,
    "top_not_reached": DamagedPlace.MALLOC_STATE,
    "more_than_system_mem": DamagedPlace.MALLOC_STATE,
    "system_mem_damaged": DamagedPlace.MALLOC_STATE,
    "last_remainder_damaged": DamagedPlace.MALLOC_STATE,
    "binmap_bit_missing": DamagedPlace.MALLOC_STATE,
    "bin_head_damaged": DamagedPlace.MALLOC_STATE,
    "malloc_state_damaged": DamagedPlace.MALLOC_STATE,
    "arena_ring_damaged": DamagedPlace.MALLOC_STATE,
    "sub_heap_header_damaged": DamagedPlace.HEAP_INFO,
    "sub_heap_not_linked": DamagedPlace.HEAP_INFO,
    "heap_info_damaged": DamagedPlace.HEAP_INFO,
    "malloc_par_damaged": DamagedPlace.MALLOC_PAR,
    "mmapped_count_mismatch": DamagedPlace.MALLOC_PAR,
    "mmapped_header_damaged": DamagedPlace.MMAPPED_HEADER,
    "tcache_entry_without_count": DamagedPlace.TCACHE_STRUCTURE,
    "tcache_count_too_high": DamagedPlace.TCACHE_STRUCTURE,
    "list_count_mismatch": DamagedPlace.TCACHE_STRUCTURE,
}

LEADS_SOMEWHERE = frozenset({"list_not_a_chunk_start", "list_broken_back_link", "list_broken_forward_link"})

CONTENT = frozenset({"fastbin_content_changed", "bin_content_changed"})

CONSEQUENCES = frozenset(
    {
        "list_count_mismatch",
        "tcache_count_too_high",
        "free_unlisted",
        "more_than_system_mem",
        "list_not_sorted",
        "top_not_reached",
    }
)
"""Codes that follow from another damage of the same list or arena, where there is one."""

LINK_PLACES = {
    ChunkState.TCACHE: DamagedPlace.TCACHE_LINK,
    ChunkState.FASTBIN: DamagedPlace.FASTBIN_LINK,
    **dict.fromkeys(BINNED_STATES, DamagedPlace.BIN_LINK),
}


@dataclass(slots=True, eq=False)
class Suspicion:
    """Anomalies that seem to have one cause. ``header``: the chunk header that is in doubt; ``words``: single wrong words.

    ``place`` is where the first anomaly was, ``listed`` the chunk that a list leads to.
    """

    place: DamagedPlace
    header: int | None
    words: list[int]
    numbers: list[int]
    anomalies: list[Anomaly] = field(default_factory=list)
    listed: int | None = None
    is_unwalked: bool = False
    """Its lists lead into memory that should be heap and was not walked."""

    def take_in(self, other: Suspicion) -> None:
        """Make another suspicion part of this one."""
        self.numbers += other.numbers
        self.anomalies += other.anomalies
        self.words += [word for word in other.words if word not in self.words]
        self.listed = self.listed if self.listed is not None else other.listed

    @property
    def codes(self) -> set[str]:
        return {anomaly.code for anomaly in self.anomalies}

    @property
    def arena(self) -> int | None:
        return next((anomaly.arena for anomaly in self.anomalies if anomaly.arena is not None), None)


def suspicions_from(places: Places, anomalies: Iterable[Anomaly]) -> list[Suspicion]:
    """One suspicion for each cause, in the order of the anomalies."""
    by_key: dict[tuple[str, int], Suspicion] = {}
    late: list[tuple[int, Anomaly]] = []
    for number, anomaly in enumerate(anomalies):
        if anomaly.code in CONSEQUENCES:
            late.append((number, anomaly))
            continue
        suspicion = _suspicion(places, anomaly, number)
        _add(by_key, suspicion)
    found = _without_unwalked(places, list(by_key.values()))
    by_key = {_key(suspicion): suspicion for suspicion in found}
    for number, anomaly in late:
        cause = next((other for other in found if _explains(other, anomaly)), None)
        if cause is not None:
            cause.numbers.append(number)
            cause.anomalies.append(anomaly)
        else:
            suspicion = _suspicion(places, anomaly, number)
            _add(by_key, suspicion)
            found = list(by_key.values())
    return found


def _without_unwalked(places: Places, found: list[Suspicion]) -> list[Suspicion]:
    """Lists that lead into heap memory that could not be walked follow from what kept it from being walked.

    Where nothing else tells what that was, the first of them stands for it.
    """
    found = _without_lists_into_damage(places, found)
    own = (DamagedPlace.TOP, DamagedPlace.MALLOC_STATE, DamagedPlace.HEAP_INFO)
    unwalked = [one for one in found if _leads_into_the_unwalked(places, one)]
    others = [one for one in found if one not in unwalked]
    cause = next((one for one in others if one.place in own), unwalked[0] if unwalked else None)
    if cause is None:
        return found
    for one in unwalked:
        if one is not cause:
            cause.numbers += one.numbers
            cause.anomalies += one.anomalies
    cause.is_unwalked = cause in unwalked
    return [one for one in found if one is cause or one not in unwalked]


def _without_lists_into_damage(places: Places, found: list[Suspicion]) -> list[Suspicion]:
    """Lists that lead into a stretch that a damaged header hides follow from that header."""
    by_header = {one.header: one for one in found if "broken_chunk" in one.codes}
    left = []
    for one in found:
        hidden = {_hiding(places, target) for target in _targets(one)} if one.codes <= LEADS_SOMEWHERE else {None}
        cause = by_header.get(next(iter(hidden))) if len(hidden) == 1 else None
        if cause is not None and cause is not one:
            cause.numbers += one.numbers
            cause.anomalies += one.anomalies
        else:
            left.append(one)
    return left


def _hiding(places: Places, address: int | None) -> int | None:
    """The header of the damaged chunk that an address lies in; None where it lies in none."""
    chunk = places.chunk_holding(address) if address is not None else None
    is_damaged = chunk is not None and places.state(chunk) is ChunkState.DAMAGED
    return places.extent(chunk)[0] if chunk is not None and is_damaged else None


def _targets(suspicion: Suspicion) -> list[int | None]:
    """Where the links of a suspicion lead."""
    return [
        anomaly.observed_word if anomaly.code != "list_not_a_chunk_start" else anomaly.address
        for anomaly in suspicion.anomalies
    ]


def _leads_into_the_unwalked(places: Places, suspicion: Suspicion) -> bool:
    """Whether all that is wrong with a list is that it leads to memory like a heap's that belongs to no chunk."""
    if not suspicion.codes <= LEADS_SOMEWHERE:
        return False
    targets = [
        anomaly.observed_word if anomaly.code != "list_not_a_chunk_start" else anomaly.address
        for anomaly in suspicion.anomalies
    ]
    return all(
        target is not None and places.chunk_holding(target) is None and places.is_heap_like(target)
        for target in targets
    )


def _key(suspicion: Suspicion) -> tuple[str, int]:
    """What two anomalies of one cause have in common."""
    about = suspicion.header if suspicion.header is not None else suspicion.words[0] if suspicion.words else -1
    if about == -1:
        return suspicion.place.value, -suspicion.numbers[0] - 1
    return "header" if suspicion.header is not None else suspicion.place.value, about


def _add(by_key: dict[tuple[str, int], Suspicion], suspicion: Suspicion) -> None:
    key = _key(suspicion)
    known = by_key.get(key)
    if known is None:
        by_key[key] = suspicion
    else:
        known.take_in(suspicion)


def _suspicion(places: Places, anomaly: Anomaly, number: int) -> Suspicion:
    header = anomaly.header_address if anomaly.header_address is not None else anomaly.address
    chunk = places.chunk_at(header)
    words = [anomaly.word_address] if anomaly.word_address is not None else []
    made = Suspicion(DamagedPlace.FREE_LIST, None, words, [number], [anomaly])
    if anomaly.code in OF_THE_NEXT_HEADER and chunk is not None:
        behind = places.behind(chunk)
        made.header = places.extent(behind)[0] if behind is not None else header
        made.place = DamagedPlace.CHUNK_HEADER
        made.words = []
    elif anomaly.code == "list_wrong_state" and chunk is not None and places.state(chunk) is not ChunkState.DAMAGED:
        _of_link(places, made, anomaly)
        made.listed = chunk
    elif anomaly.code in OF_A_HEADER and chunk is None and words:
        # The word that should lead to a header does not.
        made.place = DamagedPlace.MALLOC_STATE
    elif anomaly.code in OF_A_HEADER:
        made.header, made.place, made.words = header, DamagedPlace.CHUNK_HEADER, []
    elif anomaly.code in CONTENT:
        made.place, made.listed = DamagedPlace.FREE_CONTENT, chunk
        made.words = [anomaly.word_address if anomaly.word_address is not None else anomaly.address]
    elif anomaly.code in OF_A_STRUCTURE:
        made.place = OF_A_STRUCTURE[anomaly.code]
        if not made.words:
            made.words = [anomaly.address]
        if made.place is DamagedPlace.TOP:
            made.header, made.words = _top_of(places, anomaly), []
        elif made.place is DamagedPlace.MMAPPED_HEADER:
            made.listed = chunk
    elif anomaly.code.startswith("list_"):
        _of_link(places, made, anomaly)
        made.listed = chunk
    if made.header is not None:
        top = places.chunk_at(made.header)
        if top is not None and places.state(top) is ChunkState.TOP:
            made.place = DamagedPlace.TOP
    return made


def _top_of(places: Places, anomaly: Anomaly) -> int | None:
    if anomaly.header_address is not None:
        return anomaly.header_address
    return places.heap.arenas[anomaly.arena].top_address if anomaly.arena is not None else None


def _of_link(places: Places, made: Suspicion, anomaly: Anomaly) -> None:
    """An anomaly of a list: the word that leads wrong lies in a free chunk, or in malloc's own structure."""
    word = anomaly.word_address
    if word is None:
        return
    holder = places.chunk_using(word)
    if holder is None:
        made.place = DamagedPlace.MALLOC_STATE
        return
    state = places.state(holder)
    if state is ChunkState.ALLOCATOR_OWN:
        made.place = DamagedPlace.TCACHE_STRUCTURE
    elif state in LINK_PLACES or state in (ChunkState.FREE_UNLISTED, ChunkState.DAMAGED, ChunkState.IN_USE):
        is_cached = anomaly.expected.startswith(ChunkState.TCACHE.label)
        is_fast = anomaly.expected.startswith(ChunkState.FASTBIN.label)
        of_its_state = DamagedPlace.FASTBIN_LINK if is_fast else LINK_PLACES.get(state, DamagedPlace.BIN_LINK)
        made.place = DamagedPlace.TCACHE_LINK if is_cached else of_its_state
        made.header = places.extent(holder)[0]


def _explains(cause: Suspicion, anomaly: Anomaly) -> bool:
    """Whether a consequence follows from a damage: of the same list, or, for a chunk on no list, of the arena's lists."""
    if anomaly.code in ("free_unlisted", "more_than_system_mem", "list_not_sorted", "top_not_reached"):
        if cause.arena != anomaly.arena:
            return False
        if anomaly.code == "free_unlisted":
            about_lists = any(code.startswith(("list_", "bin_head")) for code in cause.codes)
            return about_lists or (cause.header is not None and cause.header == anomaly.header_address)
        return True
    label = anomaly.expected.partition(":")[0]
    return any(
        other.code.startswith("list_") and other.expected.partition(":")[0] == label for other in cause.anomalies
    )
