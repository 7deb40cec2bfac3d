"""What a JVM's command line asks for, where its own tables do not tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coreheap.accounting.java.untold import sizes_asked_for
from coreheap.corefile.process import InitialStack


def asked(*arguments: str, **environment: str) -> dict[str, int]:
    core: Any = SimpleNamespace(initial_stack=InitialStack(("java", *arguments), environment))
    return sizes_asked_for(core)


@pytest.mark.parametrize(
    ("option", "name", "size"),
    [
        ("-Xmx2g", "MaxHeapSize", 2 << 30),
        ("-Xmx512M", "MaxHeapSize", 512 << 20),
        ("-Xmx1048576", "MaxHeapSize", 1 << 20),
        ("-XX:MaxHeapSize=64k", "MaxHeapSize", 64 << 10),
        ("-XX:ReservedCodeCacheSize=48m", "ReservedCodeCacheSize", 48 << 20),
        ("-XX:CompressedClassSpaceSize=1G", "CompressedClassSpaceSize", 1 << 30),
        ("-XX:MaxDirectMemorySize=1t", "MaxDirectMemorySize", 1 << 40),
    ],
)
def test_sizes_are_read_as_the_vm_reads_them(option: str, name: str, size: int) -> None:
    assert asked(option, "Main") == {name: size}


def test_the_last_word_counts_and_the_environment_has_its_place() -> None:
    assert asked("-Xmx1g", "-Xmx2g") == {"MaxHeapSize": 2 << 30}
    assert asked("-Xmx1g", JAVA_TOOL_OPTIONS="-Xmx3g -Dx=y") == {"MaxHeapSize": 1 << 30}
    assert asked("-jar", "x.jar", JDK_JAVA_OPTIONS="-Xmx5g") == {"MaxHeapSize": 5 << 30}
    assert asked("-Xmx1g", _JAVA_OPTIONS="-Xmx4g") == {"MaxHeapSize": 4 << 30}


@pytest.mark.parametrize("option", ["-Xmx", "-Xmxlarge", "-Xmx-1", "-Xmx1.5g", "-Xmx1gb", "-Xmx" + "9" * 40])
def test_what_is_no_size_is_left_out(option: str) -> None:
    assert asked(option) == {}


def test_no_stack_in_the_core_asks_for_nothing() -> None:
    core: Any = SimpleNamespace(initial_stack=None)
    assert sizes_asked_for(core) == {}
