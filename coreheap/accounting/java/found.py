"""What is known of a Java VM's memory, as values.

Knows: the shape of the answer. Does not know: how any of it was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coreheap.evidence import Confidence, Evidence, confidence_from
from coreheap.mappings import MappingKind
from coreheap.quantities import AddressRange


@dataclass(frozen=True, slots=True)
class JavaPart:
    """A stretch that the VM reserved for one purpose: its kind, and a finer word for it (``class_space``, ``card_table``, ...)."""

    kind: MappingKind
    part: str
    range: AddressRange
    evidence: tuple[Evidence, ...]

    @property
    def confidence(self) -> Confidence:
        return confidence_from(self.evidence)


@dataclass(frozen=True, slots=True)
class JavaThread:
    """A thread that the VM runs Java code in.

    ``stack`` is all of it, without a guard of the C library's. The lowest ``guard_bytes`` are protected by the VM: its red,
    yellow and reserved zones; 0 where unknown.
    """

    lwp: int
    stack: AddressRange
    guard_bytes: int
    name: str | None = None
    """As the program gave it, not escaped; None where it is not in the core."""


@dataclass(frozen=True, slots=True)
class JavaMemory:
    """All that was recognised. ``flags``: values of the VM's options in bytes, those that could be read.

    ``from_tables``: whether the VM's own tables told, which takes libjvm's file; otherwise what looks like a VM's memory.
    """

    library: str
    from_tables: bool
    parts: tuple[JavaPart, ...]
    threads: tuple[JavaThread, ...]
    flags: Mapping[str, int]
