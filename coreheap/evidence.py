"""Why a fact is believed, and what could not be known.

Knows: kinds of evidence, how confidence follows from them, gaps and anomalies.
Does not know: any allocator, and no prose beyond one sentence a fact.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, IntEnum

from coreheap.quantities import AddressRange


class Strength(IntEnum):
    """How much one piece of evidence says when it stands alone."""

    HINT = 1
    """Fits, and would often fit by chance or by habit (a version string, a default value)."""
    SOLID = 2
    """Would rarely fit by chance (a structure whose pointers lead back to it)."""
    PROOF = 3
    """Cannot fit by chance (a symbol of the matching file; sums that come out to the byte)."""


class Confidence(Enum):
    """How sure a statement is; a pure function of its evidence, see ``confidence_from``."""

    CERTAIN = "certain"
    STRONG = "strong"
    PLAUSIBLE = "plausible"
    WEAK = "weak"

    @property
    def rank(self) -> int:
        """3 for certain down to 0 for weak, for comparisons."""
        return {"certain": 3, "strong": 2, "plausible": 1, "weak": 0}[self.value]


@dataclass(frozen=True, slots=True)
class Evidence:
    """One observed fact that speaks for a statement, or against it.

    ``statement`` is one sentence, ``source`` names where it was seen (a symbol table, the arena ring),
    ``address`` the place in the process, None where it has none.
    """

    statement: str
    source: str
    strength: Strength
    address: int | None = None
    speaks_against: bool = False


@dataclass(frozen=True, slots=True)
class Gap:
    """Something that cannot be known from this core, and what follows from that.

    ``range`` is None where no address range can be named. ``cause`` is a lower snake case word.
    """

    cause: str
    consequence: str
    range: AddressRange | None = None


@dataclass(frozen=True, slots=True)
class Anomaly:
    """A place where the heap's own data contradicts itself.

    ``code`` is a lower snake case word; ``address`` the place of the contradiction; ``arena`` the index of
    the arena it was found in, None where it belongs to none. ``message`` is what glibc of this release says when it meets
    it, None where it would not notice. ``arena_locked``: whether a thread was inside malloc with that arena's lock, which may
    leave such a state for a moment; ``confidence``: how sure it is that this is damage. ``may_be_of_the_moment``: malloc itself
    may have left it, as far as locks and threads tell.

    ``word_address`` is the exact word that is wrong (for a list the one that holds the bad pointer, be it in a chunk or the
    list's head), ``observed_word`` what it holds as a number, ``expected_word`` the one value that would be right; None where the
    contradiction lies in no single word, where it was not saved, and where several values would do. ``header_address`` is the
    chunk that the contradiction is about, None where it is about none. ``foreign_bytes``: how many bytes from ``address`` on are
    not what malloc left there, None where words tell it.
    """

    code: str
    address: int
    expected: str
    observed: str
    arena: int | None = None
    message: str | None = None
    arena_locked: bool | None = None
    confidence: Confidence = Confidence.CERTAIN
    word_address: int | None = None
    observed_word: int | None = None
    expected_word: int | None = None
    header_address: int | None = None
    foreign_bytes: int | None = None
    may_be_of_the_moment: bool = False
    messages: tuple[str, ...] = ()
    """All that glibc may say of it, by which operation meets it first; ``message`` is the likeliest."""


def confidence_from(evidence: Iterable[Evidence]) -> Confidence:
    """Confidence of a statement from all its evidence, counter-evidence included.

    One proof makes certain, one solid fact strong, two hints plausible, less is weak. Counter-evidence takes
    away as many levels as its strength. So no "certain" outlives a contradiction.
    """
    facts = tuple(evidence)
    supporting = [fact.strength for fact in facts if not fact.speaks_against]
    if Strength.PROOF in supporting:
        supported = Confidence.CERTAIN
    elif Strength.SOLID in supporting:
        supported = Confidence.STRONG
    elif len(supporting) >= 2:
        supported = Confidence.PLAUSIBLE
    else:
        supported = Confidence.WEAK
    return lowered(supported, facts)


def lowered(confidence: Confidence, evidence: Iterable[Evidence]) -> Confidence:
    """What is left of a confidence when the counter-evidence among ``evidence`` is held against it.

    For statements that rest on another one: they are at best as sure as it is, and weakened by what weakens them alone.
    """
    opposing = sum(fact.strength for fact in evidence if fact.speaks_against)
    levels = (Confidence.WEAK, Confidence.PLAUSIBLE, Confidence.STRONG, Confidence.CERTAIN)
    return levels[max(0, confidence.rank - opposing)]
