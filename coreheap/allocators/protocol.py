"""What coreheap asks of an allocator.

An allocator is one package that can say whether a process used it, and can turn its heap into a ``HeapSnapshot``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from coreheap.corefile import Core
from coreheap.heap import HeapSnapshot

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how far it is, and the total where it is known."""


class Allocator(Protocol):
    """One implementation of malloc."""

    @property
    def name(self) -> str:
        """The word for it in reports: ``glibc``."""
        ...

    def snapshot(self, core: Core, progress: Progress) -> HeapSnapshot | None:
        """The heap of this allocator; None when the core holds nothing that is recognisably its own.

        Damaged and missing data end up in the snapshot's anomalies and gaps; nothing is raised for them.
        """
        ...
