"""Painted ranges against a kind for each byte, and the steps that many chunks take."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import groupby
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from coreheap.corefile.regions import without_overlap
from coreheap.leaks import RootKind
from coreheap.references.ranges import KINDS, Painter, RootRanges

if TYPE_CHECKING:
    from _typeshed import TraceFunction

UInt64s = npt.NDArray[np.uint64]
Columns = tuple[UInt64s, UInt64s]
Told = list[tuple[int, int, RootKind, int]]

SIZE = 48
places = st.integers(0, SIZE)
pieces = st.lists(st.tuples(places, places), max_size=8)
paint = st.lists(st.tuples(places, places, st.none() | st.sampled_from(KINDS), st.integers(-1, 2)), max_size=12)


def columns(ranges: list[tuple[int, int]]) -> Columns:
    column = np.array(ranges, np.uint64).reshape(-1, 2)
    return column[:, 0], column[:, 1]


def told(ranges: RootRanges) -> Told:
    kinds = [KINDS[code] for code in ranges.kind.tolist()]
    assert ranges.start.dtype == ranges.end.dtype == np.uint64
    assert ranges.kind.dtype == np.uint8
    assert ranges.thread.dtype == np.int32
    return list(zip(ranges.start.tolist(), ranges.end.tolist(), kinds, ranges.thread.tolist(), strict=True))


def runs(painted: list[tuple[RootKind, int] | None]) -> Told:
    """Equal neighbours as one range."""
    found, place = [], 0
    for what, run in groupby(painted):
        length = len(list(run))
        if what is not None:
            found.append((place, place + length, *what))
        place += length
    return found


@settings(max_examples=400, deadline=None)
@given(paint, pieces, pieces)
def test_every_byte_is_of_the_kind_that_was_painted_last(
    strokes: list[tuple[int, int, RootKind | None, int]], heap: list[tuple[int, int]], remainder: list[tuple[int, int]]
) -> None:
    painter = Painter()
    expected: list[tuple[RootKind, int] | None] = [None] * SIZE
    painter.add(0, 4, RootKind.TLS, 1)
    expected[0:4] = [(RootKind.TLS, 1)] * 4
    for start, end, kind, thread in strokes:
        painter.add(start, end, kind, thread)
        expected[start:end] = [None if kind is None else (kind, thread)] * max(end - start, 0)
    ranges = painter.ranges()
    assert told(ranges) == runs(expected)
    for start, end in heap:
        expected[start:end] = [None] * max(end - start, 0)
    ranges = ranges.without(*without_overlap(*columns(heap)))
    assert told(ranges) == runs(expected)
    for start, end in remainder:
        expected[start:end] = [(RootKind.HEAP_REMAINDER, -1)] * max(end - start, 0)
    above = RootRanges.of_one_kind(*without_overlap(*columns(remainder)), RootKind.HEAP_REMAINDER)
    ranges = ranges.painted_over(above)
    assert told(ranges) == runs(expected)
    for place, what in enumerate(expected):
        assert ranges.at(place) == (None if what is None else (what[0], what[1] if what[1] >= 0 else None))
    for kind in KINDS:
        assert ranges.bytes_of(kind) == sum(what is not None and what[0] is kind for what in expected)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(places, st.integers(0, 12)), max_size=12))
def test_of_overlapping_ranges_the_first_keeps_the_bytes(parts: list[tuple[int, int]]) -> None:
    ranges = [(start, start + length) for start, length in parts]
    start, end = without_overlap(*columns(ranges))
    owner: list[int | None] = [None] * (SIZE + 12)
    order = sorted(range(len(ranges)), key=lambda row: ranges[row][0])
    for row in order:
        for place in range(*ranges[row]):
            owner[place] = row if owner[place] is None else owner[place]
    expected: dict[int, list[int]] = {}
    for place, keeper in enumerate(owner):
        if keeper is not None:
            expected.setdefault(keeper, []).append(place)
    assert list(zip(start.tolist(), end.tolist(), strict=True)) == [
        (expected[row][0], expected[row][-1] + 1) for row in order if row in expected
    ]


def python_steps(work: Callable[[], object]) -> int:
    """Lines of Python that are executed, those of comprehensions included."""
    steps = 0

    def trace(frame: FrameType, event: str, argument: object) -> TraceFunction:
        nonlocal steps
        steps += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


def test_ranges_of_many_chunks_take_no_more_steps_than_those_of_few() -> None:
    """mmapped chunks with a gap of a page behind each, and as many damaged chunks."""

    def paint_all(count: int) -> None:
        base, stride = np.uint64(0x7000_0000_0000), np.uint64(0x22000)
        start = base + np.arange(count, dtype=np.uint64) * stride
        end = start + np.uint64(0x21000)
        damaged = start + np.uint64(0x100), start + np.uint64(0x180)
        painter = Painter()
        painter.add(int(base), int(base + np.uint64(count) * stride), RootKind.ANONYMOUS)
        remainder = RootRanges.of_one_kind(*without_overlap(*damaged), RootKind.HEAP_REMAINDER)
        ranges = painter.ranges().without(*without_overlap(start, end)).painted_over(remainder)
        gaps, left = ranges.of(RootKind.ANONYMOUS), ranges.of(RootKind.HEAP_REMAINDER)
        assert np.array_equal(gaps, (end, start + stride))
        assert np.array_equal(left, damaged)

    assert python_steps(lambda: paint_all(300_000)) == python_steps(lambda: paint_all(300))
