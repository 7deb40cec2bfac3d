"""How JSON is written: as Python's own encoder does."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.render.json_values import Json, indented_text

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
VALUES = st.recursive(SCALARS, lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts), max_leaves=40)


@given(VALUES)
def test_indented_text_is_what_the_library_writes(value: Json) -> None:
    assert indented_text(value) == json.dumps(value, indent=2, allow_nan=False)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_json_does_not_know_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        indented_text({"share": [number]})
