"""What a JVM's command line asks for, and what its memory looks like, where its own tables do not tell."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import coreheap
from coreheap.accounting.java.untold import UntoldMemory, sizes_asked_for
from coreheap.corefile.process import InitialStack
from coreheap.evidence import Confidence
from coreheap.mappings import MappingKind
from tests.core_builder import CoreBuilder


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


GIB, MIB, PAGE = 1 << 30, 1 << 20, 4096
CODE = 0x7F0000000000


def code_parts(builder: CoreBuilder, path: Path) -> list[tuple[int, int, Confidence]]:
    with coreheap.open(builder.add_thread().write(path / "core")) as core:
        return [
            (part.range.start, part.range.byte_count, part.confidence)
            for part in UntoldMemory(core).parts()
            if part.kind is MappingKind.JAVA_CODE_CACHE
        ]


def with_code_heaps(builder: CoreBuilder, start: int, whole: int) -> CoreBuilder:
    """Three code heaps side by side, each with its reserve behind what is committed."""
    third = whole // 3
    for place in (start, start + third, start + 2 * third):
        builder.add_segment(place, b"code", 2 * MIB, "rwx")
        builder.add_segment(place + 2 * MIB, memory_bytes=third - 2 * MIB, flags="---")
    return builder


def test_the_stretch_of_the_code_caches_size_is_the_code_cache(tmp_path: Path) -> None:
    """LuaJIT's, V8's or libffi's memory is writable and executable as well; what is reserved behind it is not the VM's."""
    builder = with_code_heaps(CoreBuilder(), CODE, 240 * MIB)
    other = CODE + GIB
    builder.add_segment(other, b"code", MIB, "rwx").add_segment(other + MIB, memory_bytes=128 * MIB, flags="---")
    third = CODE + 2 * GIB
    builder.add_segment(third, b"code", PAGE, "rwx")
    assert code_parts(builder, tmp_path) == [
        (CODE, 240 * MIB, Confidence.STRONG),
        (other, MIB, Confidence.WEAK),
        (third, PAGE, Confidence.WEAK),
    ]


def test_of_a_larger_stretch_only_the_code_caches_size_is_believed(tmp_path: Path) -> None:
    builder = with_code_heaps(CoreBuilder(), CODE, 240 * MIB)
    builder.add_segment(CODE + 240 * MIB, memory_bytes=64 * MIB, flags="---")
    assert code_parts(builder, tmp_path) == [(CODE, 240 * MIB, Confidence.STRONG)]


def test_where_two_stretches_fit_neither_is_believed(tmp_path: Path) -> None:
    builder = with_code_heaps(with_code_heaps(CoreBuilder(), CODE, 240 * MIB), CODE + GIB, 240 * MIB)
    found = code_parts(builder, tmp_path)
    assert {size for _, size, _ in found} == {2 * MIB}
    assert {confidence for *_, confidence in found} == {Confidence.WEAK}
