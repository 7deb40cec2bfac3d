"""What a program asked of malloc, as the preloaded fixtures/programs/witness.c wrote it down while it ran.

Knows the layout of its file and what can be told of a process that died, or was stopped, at any moment of it. Knows nothing of
core files and nothing of the product.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.real_cores.targets import CannotMake, locked

SOURCE = Path(__file__).resolve().parents[2] / "fixtures" / "programs" / "witness.c"
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-fPIC", "-shared", "-pthread")
_EVENT = np.dtype(
    [
        ("pointer", "<u8"),
        ("bytes", "<u8"),
        ("process", "<u4"),
        ("thread", "<u4"),
        ("kind", "<u4"),
        ("number", "<u4"),
    ]
)
EVENT_BYTES = _EVENT.itemsize
_ALLOCATE, _FREE, _REALLOC_FAILED, _HELD = 1, 2, 3, 4

Addresses = NDArray[np.uint64]


class WitnessError(Exception):
    """The file does not say enough: events are missing or there are none."""


@dataclass(frozen=True, slots=True)
class Account:
    """What is true of a process at one moment. Arrays are sorted by address.

    ``live``: blocks that surely are in use, with what was asked for. ``freeing``: blocks whose free was under way, at most one for
    each thread: in use or not. Each thread may also have been given one block more that is not written down yet.
    """

    live: Addresses
    requested: NDArray[np.uint64]
    freeing: Addresses
    calls: int


def build(directory: Path) -> Path:
    """The library to preload. Raises CannotMake without a compiler."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise CannotMake("no gcc: apt-get install gcc libc6-dev")
    digest = hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode()).hexdigest()[:12]
    library = directory / "bin" / digest / "witness.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with locked(library.parent / "lock"):
        if not library.exists():
            unfinished = library.with_suffix(".part")
            subprocess.run([compiler, *FLAGS, "-o", str(unfinished), str(SOURCE)], check=True)
            unfinished.rename(library)
    return library


class Events:
    """The events of one process, in order. ``stopped_at``: bytes of the file when it was looked at; later events are its fate."""

    def __init__(self, path: Path, process: int, stopped_at: int | None = None) -> None:
        events = np.fromfile(path, _EVENT)
        before = len(events) if stopped_at is None else stopped_at // EVENT_BYTES
        of_process = events["process"] == process
        mine = _readable(events[of_process])
        # The process may have been other programs before, a shell's say: what it runs now counts from 0.
        starts = np.flatnonzero(mine["number"] == 0)
        begin = int(starts[-1]) if len(starts) else 0
        now = int(of_process[:before].sum())
        self._before, self._after = mine[begin:now], mine[now:]

    def account(self) -> Account:
        """What was live. Raises WitnessError where the file does not hold all events."""
        events = self._before
        if not len(events):
            raise WitnessError("the program called no malloc that the witness saw")
        last_of_thread = _last_of_each(events, "thread")
        # A thread takes its number before it writes: as many may be missing at the end as there are threads.
        missing = int(events["number"].max()) + 1 - len(events) - int(events["number"].min())
        if missing > len(last_of_thread):
            raise WitnessError(f"{missing} events are missing")
        calls = events[np.isin(events["kind"], (_ALLOCATE, _FREE, _REALLOC_FAILED))]
        for index in np.flatnonzero(calls["kind"] == _REALLOC_FAILED).tolist():
            earlier = (calls["pointer"][:index] == calls["pointer"][index]) & (calls["kind"][:index] == _ALLOCATE)
            calls[index] = calls[np.flatnonzero(earlier)[-1]]
        last = _last_of_each(calls, "pointer")
        live = last[last["kind"] == _ALLOCATE]
        freeing = last_of_thread["pointer"][last_of_thread["kind"] == _FREE]
        return Account(live["pointer"], live["bytes"], np.setdiff1d(freeing, live["pointer"]), len(events))

    def freed_later(self, payloads: Addresses) -> Addresses:
        """Those of these live blocks that the program freed after it had been looked at: it had not lost them."""
        first = self._after[np.unique(self._after["pointer"], return_index=True)[1]]
        freed: Addresses = np.intersect1d(payloads, first["pointer"][first["kind"] == _FREE])
        return freed

    def held_by_the_kernel(self, payloads: Addresses) -> Addresses:
        """Those of these sorted live blocks of which the kernel was given an address since they were allocated."""
        events = self._before[np.isin(self._before["kind"], (_ALLOCATE, _HELD))]
        last = _last_of_each(events, "pointer")
        held: Addresses = np.intersect1d(payloads, last["pointer"][last["kind"] == _HELD])
        return held


def _readable(events: NDArray[Any]) -> NDArray[Any]:
    events = events.copy()
    events["pointer"] = ~events["pointer"]
    return events


def _last_of_each(events: NDArray[Any], column: str) -> NDArray[Any]:
    """The last event of every value of a column, by value."""
    _, last_from_end = np.unique(events[column][::-1], return_index=True)
    return events[len(events) - 1 - last_from_end]
