"""Confidence is a pure function of the evidence, and no contradiction leaves anything certain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.evidence import Confidence, Evidence, Strength, confidence_from

HINT, SOLID, PROOF = Strength.HINT, Strength.SOLID, Strength.PROOF
CERTAIN, STRONG, PLAUSIBLE, WEAK = Confidence.CERTAIN, Confidence.STRONG, Confidence.PLAUSIBLE, Confidence.WEAK


def fact(strength: Strength, speaks_against: bool = False) -> Evidence:
    return Evidence("a fact", "somewhere", strength, speaks_against=speaks_against)


@pytest.mark.parametrize(
    ("supporting", "opposing", "expected"),
    [
        ((), (), WEAK),
        ((HINT,), (), WEAK),
        ((HINT, HINT), (), PLAUSIBLE),
        ((HINT,) * 9, (), PLAUSIBLE),
        ((SOLID,), (), STRONG),
        ((SOLID, SOLID, HINT), (), STRONG),
        ((PROOF,), (), CERTAIN),
        ((PROOF, SOLID, HINT), (), CERTAIN),
        ((PROOF,), (HINT,), STRONG),
        ((PROOF,), (SOLID,), PLAUSIBLE),
        ((PROOF,), (PROOF,), WEAK),
        ((PROOF,), (HINT, HINT), PLAUSIBLE),
        ((PROOF, PROOF), (HINT,), STRONG),
        ((SOLID,), (HINT,), PLAUSIBLE),
        ((SOLID,), (SOLID,), WEAK),
        ((HINT, HINT), (HINT,), WEAK),
        ((), (PROOF, PROOF), WEAK),
        ((PROOF,), (PROOF, PROOF, PROOF), WEAK),
    ],
)
def test_table(supporting: tuple[Strength, ...], opposing: tuple[Strength, ...], expected: Confidence) -> None:
    facts = [fact(strength) for strength in supporting] + [fact(strength, True) for strength in opposing]
    assert confidence_from(facts) is expected
    assert confidence_from(reversed(facts)) is expected
    assert confidence_from(iter(facts)) is expected


def test_ranks_are_in_order() -> None:
    assert [level.rank for level in (WEAK, PLAUSIBLE, STRONG, CERTAIN)] == [0, 1, 2, 3]
    assert {level.rank for level in Confidence} == {0, 1, 2, 3}


facts_strategy = st.lists(st.builds(fact, st.sampled_from(list(Strength)), st.booleans()), max_size=8)


@given(facts_strategy)
def test_counter_evidence_always_costs_something(facts: list[Evidence]) -> None:
    level = confidence_from(facts)
    for strength in Strength:
        less = confidence_from([*facts, fact(strength, True)])
        assert less.rank <= max(0, level.rank - strength)
        assert less is not CERTAIN


@given(facts_strategy)
def test_support_never_costs_anything(facts: list[Evidence]) -> None:
    level = confidence_from(facts)
    for strength in Strength:
        assert confidence_from([*facts, fact(strength)]).rank >= level.rank
