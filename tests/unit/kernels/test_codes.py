"""The numbers that two implementations and two enums share."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest

from coreheap import kernels as package
from coreheap.kernels import codes, reference
from tests.heap_builder import STATE_NUMBERS


def test_compiled_numbers_are_those_of_the_enums(compiled: ModuleType) -> None:
    for enum_name, numbers in compiled.CODES.items():
        enum = getattr(codes, enum_name)
        for name, number in numbers.items():
            assert enum[name] == number
        if enum_name != "ChunkState":
            assert len(numbers) == len(enum)


def test_states_have_the_numbers_that_the_builder_knows() -> None:
    for name, number in STATE_NUMBERS.items():
        assert codes.ChunkState[name.upper()] == number
    assert max(codes.ChunkState) < codes.STATE_SLOTS


def test_both_implementations_have_the_same_functions(compiled: ModuleType) -> None:
    for name in reference.__all__:
        wanted = inspect.signature(getattr(reference, name))
        found = inspect.signature(getattr(compiled, name))
        assert list(found.parameters) == list(wanted.parameters), name
        for parameter in wanted.parameters.values():
            assert found.parameters[parameter.name].default == parameter.default, (name, parameter.name)
    public = {
        name
        for name, value in vars(compiled).items()
        if callable(value) and getattr(value, "__module__", "") == compiled.__name__
    }
    assert {name for name in public if not name.startswith("_")} == set(reference.__all__)


def test_package_offers_every_kernel() -> None:
    assert set(reference.__all__) <= set(package.__all__)
    assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize(
    ("word_bytes", "alignment", "minimum", "phase"),
    [(2, 16, 32, 0), (8, 8, 32, 0), (8, 32, 32, 0), (8, 16, 16, 0), (8, 16, 24, 0), (4, 16, 16, 16), (4, 16, 16, 2)],
)
def test_impossible_geometry_is_refused(word_bytes: int, alignment: int, minimum: int, phase: int) -> None:
    with pytest.raises(ValueError, match=r"cannot|, not"):
        package.ChunkGeometry(word_bytes, alignment, minimum, phase)
