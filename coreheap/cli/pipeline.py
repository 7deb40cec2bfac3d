"""The two calls by which the command line gets a report.

Knows: which of the user's words concern the analysis. Does not know: any command. Tests replace the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import coreheap
from coreheap.cli.arguments import Request
from coreheap.report import Report

Progress = Callable[[str, int, int | None], None]


@contextmanager
def analyzed(request: Request, progress: Progress) -> Iterator[Report]:
    """The report of the core that was asked for; valid inside the block, while the core is open.

    Raises CoreheapError where the core cannot be used.
    """
    with coreheap.open(
        request.core,
        executable=_path(request.executable),
        sysroot=_path(request.sysroot),
        debug_directories=[Path(directory) for directory in request.debug_directories],
        progress=progress,
    ) as core:
        yield coreheap.analyze(core, coreheap.AnalysisOptions(progress=progress))


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
