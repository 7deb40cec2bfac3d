"""Which implementation runs, and what is said when the fast one cannot."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from types import ModuleType

import pytest

from coreheap.kernels import _active, reference


def test_compiled_is_taken_when_it_is_there(compiled: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _active.choose_implementation(None) == ("compiled", compiled)
        assert _active.choose_implementation("compiled") == ("compiled", compiled)


def test_reference_can_be_forced() -> None:
    assert _active.choose_implementation("reference") == ("reference", reference)


def test_missing_extension_is_said_once_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = importlib.import_module

    def without_extension(name: str) -> ModuleType:
        if name.endswith("_compiled"):
            raise ImportError("no such extension")
        return real_import(name)

    monkeypatch.setattr(importlib, "import_module", without_extension)
    with pytest.warns(RuntimeWarning, match="Reinstall coreheap where a C compiler is") as caught:
        assert _active.choose_implementation(None) == ("reference", reference)
    assert len(caught) == 1
    with pytest.raises(ImportError, match="no such extension"):
        _active.choose_implementation("compiled")


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="COREHEAP_KERNELS is 'fast'"):
        _active.choose_implementation("fast")


def test_environment_chooses() -> None:
    script = "import coreheap.kernels as k; print(k.active_name, k.walk_region.__module__)"
    environment = {**os.environ, "COREHEAP_KERNELS": "reference", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["reference", "coreheap.kernels.reference.walking"]
    assert result.stderr == ""
