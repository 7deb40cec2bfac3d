"""Another allocator, as a value: which, how it was recognised, and which memory is its own.

Knows: the shape of the answer. Does not know: any allocator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.evidence import Confidence, Evidence, confidence_from

UInt64s = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Ranges:
    """Memory of an allocator: sorted, disjoint columns, and why it is believed to be. None of the ranges is empty.

    ``is_estimate``: they come from habits of the allocator, not from its own structures. ``is_reserve``: what a tool that watches
    the program keeps beside its allocator, of which most is address space alone.
    """

    start: UInt64s
    end: UInt64s
    evidence: tuple[Evidence, ...]
    is_estimate: bool = False
    is_reserve: bool = False

    @property
    def bytes(self) -> int:
        return int((self.end - self.start).sum())


@dataclass(frozen=True, slots=True)
class OtherAllocator:
    """An allocator beside glibc's, or in its place.

    ``module``: the file name of what brings it; ``address``: where that is. ``replaces_malloc``: whether it serves malloc
    itself, False for one that a language's run time has of its own. ``evidence``: that it is there, without its memory.
    """

    name: str
    module: str
    address: int
    replaces_malloc: bool
    evidence: tuple[Evidence, ...]
    ranges: tuple[Ranges, ...] = ()
    is_searched: bool = False
    """Whether its memory was looked for in a core that holds all that it could be in: then no ranges speak against it."""

    @property
    def bytes(self) -> int:
        """Bytes that look like its own, without reserves."""
        return sum(ranges.bytes for ranges in self.ranges if not ranges.is_reserve)

    @property
    def is_tool(self) -> bool:
        """Whether it is a tool that watches the program."""
        return any(ranges.is_reserve for ranges in self.ranges)

    @property
    def is_estimate(self) -> bool:
        return any(ranges.is_estimate for ranges in self.ranges)

    @property
    def confidence(self) -> Confidence:
        """That it is there."""
        return confidence_from(self.evidence)
