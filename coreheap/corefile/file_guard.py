"""Files that are cut, replaced in place or lost to a bad disk while they are mapped and read.

Knows: which mappings of files are open, and how to say that one of them lost pages. Does not know: what is in them.

Reading a mapped page that its file does not have any more ends a process with SIGBUS. Where the compiled guard could be
built, such pages become zeros instead, and ``FileGuard.check`` turns that into one clear error. Where it could not,
the process ends with SIGBUS; what has the name given with -o is then what it was before.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from types import ModuleType

from coreheap.errors import InputNotUsable
from coreheap.quantities import format_bytes

_compiled: ModuleType | None
try:
    from coreheap.corefile import _bus_guard as _compiled
except ImportError:  # no C compiler where coreheap was installed
    _compiled = None

is_guarding = _compiled is not None
"""Whether lost pages become an error; else they end the process."""


class FileGuard:
    """Watches one mapping of a whole file, from now until it is unmapped or ``release`` is called."""

    def __init__(self, mapping: mmap.mmap, descriptor: int, where: str) -> None:
        """``descriptor`` is of the mapped file and stays the caller's."""
        self.where = where
        self._byte_count = len(mapping)
        self._state = _FileState.of(descriptor)
        self._row: int | None = None
        if _compiled is not None:
            row = self._row = _compiled.guard(mapping)
            if row is not None:
                self._finalizer = weakref.finalize(mapping, _compiled.release, row)
        _guards.add(self)

    def release(self) -> None:
        """Watch no longer. Before the mapping goes."""
        _guards.discard(self)
        if self._row is not None:
            self._finalizer()
            self._row = None

    def check(self) -> None:
        """Raises InputNotUsable where pages of the file were gone when they were read."""
        lost = None if self._row is None or _compiled is None else _compiled.first_lost(self._row)
        if lost is not None:
            raise InputNotUsable(
                "the file changed while it was read",
                where=self.where,
                expected=f"{format_bytes(self._byte_count)}, as when it was opened",
                found=f"nothing to read from byte {lost} on: it was cut, or the disk failed",
                next_step="copy the file to where nothing writes to it, and analyse the copy",
            )

    def change_since(self, descriptor: int) -> str:
        """In words, how size or time of the last change differ from when the guard began; "" when they do not."""
        now = _FileState.of(descriptor)
        if now.byte_count != self._state.byte_count:
            return f"its size went from {self._state.byte_count} to {now.byte_count} bytes"
        return "it was written to" if now.changed_ns != self._state.changed_ns else ""


@dataclass(frozen=True, slots=True)
class _FileState:
    byte_count: int
    changed_ns: int

    @classmethod
    def of(cls, descriptor: int) -> _FileState:
        status = os.fstat(descriptor)
        return cls(status.st_size, status.st_mtime_ns)


_guards: weakref.WeakSet[FileGuard] = weakref.WeakSet()


def check_all_files() -> None:
    """``FileGuard.check`` for every file that this process has mapped: cores, modules, debug files."""
    for guard in tuple(_guards):
        guard.check()
