"""The calls by which the command line gets a report, and answers about addresses.

Knows: which of the user's words concern the analysis. Does not know: any command. Tests replace the functions here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import coreheap
from coreheap.cli.arguments import RESIDENCY_COMMANDS, Request
from coreheap.errors import UsageError
from coreheap.leaks import OPTIONAL_HEURISTICS, Explanation, Heuristic, OwnerNode, RetainedReport
from coreheap.report import Report

if TYPE_CHECKING:
    from coreheap.corefile import Core
    from coreheap.leak_search import GroupNumbers, References

Progress = Callable[[str, int, int | None], None]


@contextmanager
def analyzed(request: Request, progress: Progress) -> Iterator[Report]:
    """The report of the core that was asked for; valid inside the block, while the core is open.

    Raises CoreheapError where the core cannot be used, or a file or folder that was named is not there.
    """
    with _opened(request, progress) as core:
        yield coreheap.analyze(core, _options(request, progress))


@contextmanager
def explored(request: Request, progress: Progress) -> Iterator[tuple[Report, Explorer]]:
    """The report, and an object to ask about addresses; both are valid inside the block.

    Raises CoreheapError where the core cannot be used.
    """
    with _opened(request, progress) as core:
        report, references = coreheap.analyze_with_references(core, _options(request, progress))
        yield report, Explorer(core, references)


def check_files() -> None:
    """Raises InputNotUsable where a file that is open lost bytes since then: what was shown of it may be wrong."""
    # Imported here: what has no file open needs none of it.
    from coreheap.corefile.file_guard import check_all_files

    check_all_files()


class Explorer:
    """Answers about addresses, also where there is no heap to ask about."""

    def __init__(self, core: Core, references: References | None) -> None:
        self._core = core
        self._references = references

    def explain(self, address: int, *, limit: int, retained: bool = False) -> Explanation:
        if self._references is None:
            from coreheap.leak_search import explain_place

            return explain_place(self._core, address)
        return self._references.explain(address, limit=limit, retained=retained)

    def owners(self, address: int, *, depth: int, limit: int) -> tuple[OwnerNode, ...]:
        return () if self._references is None else self._references.owners(address, depth=depth, limit=limit)

    def retained(self, count: int) -> RetainedReport | None:
        return None if self._references is None else self._references.retained(count)

    def group_numbers(self) -> GroupNumbers | None:
        return None if self._references is None else self._references.group_numbers()


def _opened(request: Request, progress: Progress) -> AbstractContextManager[Core]:
    _check_names(request)
    return coreheap.open(
        request.core,
        executable=_path(request.executable),
        sysroot=_path(request.sysroot),
        debug_directories=[Path(directory) for directory in request.debug_directories],
        debuginfod=request.debuginfod,
        progress=progress,
        unpacked_limit=request.max_unpacked,
    )


def _options(request: Request, progress: Progress) -> coreheap.AnalysisOptions:
    return coreheap.AnalysisOptions(
        progress=progress,
        leaks=request.leaks,
        # Other commands show none of it, or ask for it themselves.
        retained=(request.retained or None) if request.command == "analyze" else False,
        low_memory=request.low_memory,
        residency=request.command in RESIDENCY_COMMANDS,
        heuristics=OPTIONAL_HEURISTICS
        if request.heuristics is None
        else frozenset(Heuristic[name.upper()] for name in request.heuristics),
    )


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
    if request.executable is not None and (found := _instead_of_program(request.executable)):
        raise UsageError(
            "--exe names no program",
            where=request.executable,
            expected="the ELF executable that was running",
            found=found,
            next_step="of a script name its interpreter, of a wrapper the program that it starts",
        )


def _instead_of_program(path: str) -> str:
    """What a file is that cannot have been running; empty for an ELF executable, and for a file that cannot be read."""
    from coreheap.corefile import elf

    try:
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError:
        return ""
    header = elf.header_of(head)
    if header is None:
        return "a script" if head[:2] == b"#!" else "something else"
    return (
        "" if header.kind in (elf.ET_EXEC, elf.ET_DYN) else "a core" if header.kind == elf.ET_CORE else "an object file"
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
