"""How far the work has come, shown on a terminal and nowhere else.

Knows: rich's progress bar, which is imported only for work that takes long enough to wonder about.
Does not know: what the phases are.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from coreheap.cli import signals
from coreheap.render.escaping import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PATIENCE_SECONDS = 0.5
"""Work that ends sooner shows nothing; importing rich for it would be most of what the user waits for."""


LINE_AWAY_CURSOR_BACK = b"\r\x1b[2K\x1b[?25h"
"""What undoes a progress line: back to its start, erase it, show the cursor that rich hides (ECMA-48, DECTCEM)."""


class ProgressReporter:
    """Takes ``(phase, done, total)`` and shows one line for the current phase; it disappears at the end."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._started = time.monotonic()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the line away and show nothing more; what follows has the screen for itself."""
        self._is_shown = False
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            signals.note_screen(b"")

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """Called by the analysis as it goes on; cheap when nothing is shown."""
        if not self._is_shown or time.monotonic() - self._started < PATIENCE_SECONDS:
            return
        if self._progress is None:
            self._progress = _bar()
            signals.note_screen(LINE_AWAY_CURSOR_BACK)
            self._progress.start()
        if self._task is None or phase != self._phase:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(printable(phase), total=total)
            self._phase = phase
        self._progress.update(self._task, completed=done, total=total)


def is_wanted(verbosity: int) -> bool:
    """Whether somebody can see progress and did not ask for silence."""
    return verbosity >= 0 and sys.stderr is not None and sys.stderr.isatty()


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
