"""All damages of a heap: anomalies of one cause together, the gravest first, culprits with their holders.

Knows: the order of the steps. Does not know: how a header or a list is read (``culprits``, ``links``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from coreheap.corefile import Core
from coreheap.damage import ChunkPlace, Damage, DamagedPlace, DamageKind, PatternKind
from coreheap.evidence import Confidence, Evidence, Strength, confidence_from
from coreheap.forensics.culprits import HeaderReader, Told
from coreheap.forensics.links import LinkReader
from coreheap.forensics.patterns import PatternReader
from coreheap.forensics.places import Places
from coreheap.forensics.suspicion import OF_THE_NEXT_HEADER, Suspicion, suspicions_from
from coreheap.heap import ChunkState, HeapSnapshot
from coreheap.quantities import AddressRange

Holders = Callable[[Sequence[npt.NDArray[np.int64]]], list[str | None]]
"""For each group of chunks what holds the first that is held, in words."""

DAMAGES_KEPT = 100
HEADERS_APART = 9
"""Fenceposts have headers and nothing else: what hits one hits the next."""
SUSPICIONS_READ = 1000
"""Causes that are looked into; a heap in ruins has no culprit."""

GRAVITY = {
    DamageKind.OVERFLOW: 7,
    DamageKind.USE_AFTER_FREE: 6,
    DamageKind.DOUBLE_FREE: 6,
    DamageKind.INVALID_FREE: 6,
    DamageKind.UNDERFLOW: 5,
    DamageKind.OVERWRITE: 4,
    DamageKind.BIT_FLIP: 4,
    DamageKind.IN_TRANSITION: 0,
}

FLAGS_OF_A_STATE = frozenset({"arena_flag_mismatch"})
"""Codes that a chunk gets by its state; where a list says that the state is another one, nothing is wrong with the chunk."""

FREED_WRONGLY = (DamageKind.DOUBLE_FREE, DamageKind.INVALID_FREE)
"""What no operation of malloc leaves by itself."""

MALLOCS_OWN_VALUES = (PatternKind.POINTER, PatternKind.ZEROS, PatternKind.ONE_BIT)
"""What malloc itself stores: only these can be a moment's state."""


@dataclass(frozen=True, slots=True)
class DamageSurvey:
    """The gravest damages, and how many there are."""

    damages: tuple[Damage, ...]
    damage_count: int


def find_damages(core: Core, heap: HeapSnapshot, holders: Holders | None = None) -> DamageSurvey:
    """Everything that the heap's anomalies come to; at most DAMAGES_KEPT are told.

    ``holders`` names who holds chunks; None where references were not searched.
    """
    if not heap.anomalies:
        return DamageSurvey((), 0)
    places = Places(core, heap)
    patterns = PatternReader(core, heap)
    headers, links = HeaderReader(places, patterns), LinkReader(places, patterns)
    found: list[tuple[Told, Suspicion]] = []
    suspicions = suspicions_from(places, heap.anomalies)
    for suspicion in suspicions[:SUSPICIONS_READ]:
        told = _told(suspicion, headers, links)
        if told is not None:
            found.append((told, suspicion))
    found = _joined(found)
    damages = [_damage(places, told, suspicion) for told, suspicion in found]
    damages.sort(key=_gravity, reverse=True)
    named = _with_holders(places, damages[:DAMAGES_KEPT], holders)
    return DamageSurvey(tuple(named), len(damages) + max(0, len(suspicions) - SUSPICIONS_READ))


def _told(suspicion: Suspicion, headers: HeaderReader, links: LinkReader) -> Told | None:
    told = headers.read(suspicion) if suspicion.header is not None else None
    if told is None:
        if suspicion.codes <= FLAGS_OF_A_STATE and headers.is_right(suspicion):
            return None
        told = links.read(suspicion)
        if told is not None and suspicion.is_unwalked:
            told.doubt("heap memory that these lists lead to was not walked: the lists may be sound", Strength.SOLID)
        return told
    _over_links(told, suspicion, links)
    return told


def _over_links(told: Told, suspicion: Suspicion, links: LinkReader) -> None:
    """The foreign bytes of a header go on over links that are wrong as well."""
    for word in sorted(suspicion.words):
        if told.extent.start < word <= told.extent.end + links.word and word + links.word > told.extent.end:
            told.extent = AddressRange(told.extent.start, word + links.word)
            told.hold("the links behind the header are wrong as well", Strength.HINT, word)
    if told.pattern is not None:
        told.pattern = replace(told.pattern, byte_count=max(told.pattern.byte_count, 1))


def _joined(found: list[tuple[Told, Suspicion]]) -> list[tuple[Told, Suspicion]]:
    """Damages whose foreign bytes overlap are one; the one that begins first stays."""
    freed_twice = {told.victim: suspicion for told, suspicion in found if told.kind is DamageKind.DOUBLE_FREE}
    kept: list[tuple[Told, Suspicion]] = []
    for told, suspicion in found:
        if told.kind is DamageKind.USE_AFTER_FREE and told.victim in freed_twice:
            # The second free wrote its own links over the first one's.
            freed_twice[told.victim].take_in(suspicion)
        else:
            kept.append((told, suspicion))
    found = sorted(kept, key=lambda item: item[0].extent.start)
    joined: list[tuple[Told, Suspicion]] = []
    for told, suspicion in found:
        if joined and told.extent.start < joined[-1][0].extent.end + _reach(told, joined[-1][0]):
            before, cause = joined[-1]
            cause.take_in(suspicion)
            before.extent = AddressRange(before.extent.start, max(before.extent.end, told.extent.end))
            continue
        joined.append((told, suspicion))
    return joined


def _reach(told: Told, before: Told) -> int:
    """How far behind the foreign bytes of one header those of the next one may begin to be of the same write."""
    both = told.place is before.place is DamagedPlace.CHUNK_HEADER
    return HEADERS_APART if both and before.kind is DamageKind.OVERFLOW else 0


def _damage(places: Places, told: Told, suspicion: Suspicion) -> Damage:
    evidence = list(told.evidence)
    weakened = list(told.weakened_by)
    surest = max((anomaly.confidence for anomaly in suspicion.anomalies), key=lambda level: level.rank)
    locked = any(anomaly.arena_locked for anomaly in suspicion.anomalies)
    is_of_the_moment = all(anomaly.may_be_of_the_moment for anomaly in suspicion.anomalies)
    kind = told.kind
    if surest.rank <= Confidence.PLAUSIBLE.rank:
        reason = "malloc itself may leave such a state, or it has another explanation"
        if locked:
            reason = (
                "a thread was inside malloc with this arena locked, and malloc itself leaves such states for a moment"
            )
        elif is_of_the_moment:
            reason = (
                "a thread was inside malloc, or had been when a signal or fork came, and malloc itself leaves such states"
                " for a moment"
            )
        weight = Strength.HINT if surest is Confidence.PLAUSIBLE else Strength.SOLID
        evidence.append(Evidence(reason, "state of the threads", weight, speaks_against=True))
        weakened.append(reason)
        is_malloc_like = told.pattern is None or told.pattern.kind in MALLOCS_OWN_VALUES
        left_by_the_dead = locked and is_malloc_like and kind in (DamageKind.OVERWRITE, DamageKind.USE_AFTER_FREE)
        # What a word holds that malloc is about to write is of no meaning: old content of whatever kind.
        if left_by_the_dead or (is_of_the_moment and kind not in FREED_WRONGLY):
            kind = DamageKind.IN_TRANSITION
    victim = places.place(told.victim) if told.victim is not None else None
    culprit = places.place(told.culprit) if told.culprit is not None else None
    message, messages = _messages(suspicion)
    lost = victim.chunk_bytes if victim is not None and victim.state is ChunkState.DAMAGED else 0
    confidence = confidence_from(evidence)
    return Damage(
        kind=kind,
        place=told.place,
        bytes=told.extent,
        victim=victim,
        culprit=culprit if kind is not DamageKind.IN_TRANSITION else None,
        pattern=told.pattern,
        repair=told.repair,
        anomalies=tuple(sorted(set(suspicion.numbers))),
        lost_bytes=lost,
        arena=suspicion.arena if suspicion.arena is not None else (victim.arena if victim is not None else None),
        message=message,
        messages=messages,
        evidence=tuple(evidence),
        confidence=confidence,
        weakened_by=tuple(dict.fromkeys(weakened)),
    )


def _messages(suspicion: Suspicion) -> tuple[str | None, tuple[str, ...]]:
    """What glibc says, and all that it may say: of the damaged place itself before what it says of its neighbours."""
    said = sorted(suspicion.anomalies, key=lambda anomaly: anomaly.code in OF_THE_NEXT_HEADER)
    texts = [*(anomaly.message for anomaly in said), *(text for anomaly in said for text in anomaly.messages)]
    first = next((anomaly.message for anomaly in said if anomaly.message), None)
    return first, tuple(dict.fromkeys(text for text in texts if text))


def held_against(damages: tuple[Damage, ...], said: str) -> tuple[Damage, ...]:
    """The same damages; of what glibc may say of each, the words that it did say come first."""
    return tuple(replace(damage, message=said) if said in damage.messages else damage for damage in damages)


def _gravity(damage: Damage) -> tuple[int, bool, int, int]:
    in_structure = damage.place not in (DamagedPlace.FREE_LIST, DamagedPlace.FREE_CONTENT)
    return GRAVITY[damage.kind], damage.message is not None, damage.confidence.rank, int(in_structure)


def _with_holders(places: Places, damages: list[Damage], holders: Holders | None) -> list[Damage]:
    """The same damages, culprits and victims with who holds them."""
    if holders is None:
        return damages
    wanted = [place for damage in damages for place in (damage.victim, damage.culprit) if place is not None]
    numbers = list(dict.fromkeys(_number(places, place) for place in wanted))
    names = holders([np.array([number], np.int64) for number in numbers])
    by_number = dict(zip(numbers, names, strict=True))

    def named(place: ChunkPlace | None) -> ChunkPlace | None:
        return None if place is None else replace(place, holder=by_number[_number(places, place)])

    return [replace(damage, victim=named(damage.victim), culprit=named(damage.culprit)) for damage in damages]


def _number(places: Places, place: ChunkPlace) -> int:
    chunk = places.chunk_at(place.header_address)
    assert chunk is not None
    return chunk
