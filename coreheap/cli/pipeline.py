"""The two calls by which the command line gets a report.

Knows: which of the user's words concern the analysis. Does not know: any command. Tests replace the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import coreheap
from coreheap.cli.arguments import Request
from coreheap.errors import UsageError
from coreheap.report import Report

Progress = Callable[[str, int, int | None], None]


@contextmanager
def analyzed(request: Request, progress: Progress) -> Iterator[Report]:
    """The report of the core that was asked for; valid inside the block, while the core is open.

    Raises CoreheapError where the core cannot be used, or a file or folder that was named is not there.
    """
    _check_names(request)
    with coreheap.open(
        request.core,
        executable=_path(request.executable),
        sysroot=_path(request.sysroot),
        debug_directories=[Path(directory) for directory in request.debug_directories],
        debuginfod=request.debuginfod,
        progress=progress,
    ) as core:
        yield coreheap.analyze(core, coreheap.AnalysisOptions(progress=progress))


def _check_names(request: Request) -> None:
    """A folder that is misspelt would only look like one without the right files."""
    folders = [("--debug-dir", directory) for directory in request.debug_directories]
    folders += [("--sysroot", request.sysroot)] if request.sysroot is not None else []
    for option, folder in folders:
        if not Path(folder).is_dir():
            found = "something else" if Path(folder).exists() else "nothing"
            raise UsageError(
                f"{option} names no folder",
                where=folder,
                expected="a folder",
                found=found,
                next_step="check the path; it counts from the working directory unless it begins with /",
            )
    if request.executable is not None and not Path(request.executable).is_file():
        raise UsageError(
            "--exe names no file",
            where=request.executable,
            expected="the executable that was running",
            found="something else" if Path(request.executable).exists() else "nothing",
            next_step="check the path; it counts from the working directory unless it begins with /",
        )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
