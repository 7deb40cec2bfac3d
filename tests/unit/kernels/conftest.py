"""Every kernel test runs on the reference and on the compiled implementation."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import pytest


@pytest.fixture(params=["reference", "compiled"])
def kernels(request: pytest.FixtureRequest) -> ModuleType:
    """One implementation. Where the extension was not built its tests are skipped, but fail under CI=true."""
    return implementation(request.param)


@pytest.fixture
def compiled() -> ModuleType:
    """The compiled implementation, for tests that compare it with the reference."""
    return implementation("compiled")


def implementation(name: str) -> ModuleType:
    if name == "compiled" and importlib.util.find_spec("coreheap.kernels._compiled") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("coreheap.kernels._compiled is not built")
        pytest.skip("coreheap.kernels._compiled is not built; pip install . where a C compiler is")
    # A module that is there and cannot be imported is an error, not a reason to skip.
    return importlib.import_module("coreheap.kernels._compiled" if name == "compiled" else "coreheap.kernels.reference")
