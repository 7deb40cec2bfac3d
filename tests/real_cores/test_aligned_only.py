"""A process that asked for aligned blocks alone has no tcache to miss: its heap is read whole."""

from __future__ import annotations

from collections import Counter

import pytest

from coreheap.heap import ChunkState
from tests.real_cores import cores, targets
from tests.real_cores.cases import ALONE
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.cores import case_named


@pytest.mark.parametrize("name", [name for name in ALONE if "aligned_only" in name])
def test_nothing_is_missing(name: str) -> None:
    target = case_named(name).target
    core = core_or_skip(name).core
    sysroot = None if target.release is None else targets.files_of(target, cores.default_directory()).sysroot
    report = report_on(core, sysroot)
    assert report.heap is not None
    # An emulator's core tells no thread pointers: that no tcache is in thread-local storage cannot be seen there.
    assert [gap.cause for gap in report.heap.gaps] == (["thread_storage_not_saved"] if target.is_emulated else [])
    assert report.is_partial == target.is_emulated
    assert report.anomalies == ()
    count, _, byte_count = (int(argument) for argument in case_named(name).arguments)
    sizes: Counter[int] = Counter()
    for batch in report.heap.chunks.batches():
        sizes.update(batch.usable_bytes[batch.state == ChunkState.IN_USE].tolist())
    assert sum(sizes.values()) == count
    assert min(sizes) >= byte_count
