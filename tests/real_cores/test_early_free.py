"""free before malloc was ever called: the ring of arenas is sound, and what was freed is told as far as glibc took it."""

from __future__ import annotations

import pytest

import coreheap
from coreheap.damage import DamageKind
from coreheap.report import Severity
from tests.real_cores import cores, targets
from tests.real_cores.conftest import core_or_skip
from tests.real_cores.damage_cases import DAMAGE

CASES = [name for name in DAMAGE if "early_free_" in name]
INITIALISED_EARLY = ("forky", "experimental")
"""From 2.42 on malloc is ready before main; before that free makes its tcache in an arena of its own, whose ring leads on to a
main_arena that was never initialised (arena.c, arena_get2)."""


@pytest.mark.parametrize("name", CASES)
def test_a_free_before_any_malloc_leaves_a_sound_ring(name: str) -> None:
    target = DAMAGE[name].target
    paths = core_or_skip(name)
    sysroot = None
    if target.release is not None:
        sysroot = targets.files_of(target, cores.default_directory()).sysroot
    with coreheap.open(paths.core, sysroot=sysroot) as core:
        report = coreheap.analyze(core)
    is_early = target.release is not None and target.release.name in INITIALISED_EARLY
    assert report.heap is not None
    assert sorted(arena.is_main for arena in report.heap.arenas) == ([True] if is_early else [False, True])
    assert report.heap.gaps == ()
    codes = {finding.code for finding in report.findings if finding.severity is Severity.ERROR}
    if name.endswith("chunk"):
        assert [damage.kind for damage in report.damages] == [DamageKind.INVALID_FREE]
        assert codes == {"CORRUPTION-INVALID-FREE"}
    else:
        assert report.anomalies == ()
        assert report.damages == ()
        # Where the pointer is known, it is an invalid free; where the core tells too little, glibc's message alone.
        assert codes - {"CORRUPTION-INVALID-FREE"} == {"ALLOCATOR-ABORT"}
        assert "CORRUPTION-INVALID-FREE" in codes or target.release is not None
