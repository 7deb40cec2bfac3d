"""Files for a core's modules: where to look, and which to refuse.

Knows: --exe, sysroot, debug directories, .build-id trees, .gnu_debuglink, and the debuginfod servers where the user
allowed them. Paths that come from the core are text of an unknown process: they are looked up below the sysroot
without leaving it, or (without a sysroot) at their own place, and never used before the build-id is equal. Does not
know: modules.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coreheap.corefile.symbols import ElfFile

if TYPE_CHECKING:
    from coreheap.corefile.debuginfod import DebuginfodClient

LINK_LIMIT: Final = 40
PATH_BYTES: Final = 4096
ASKED_LIMIT: Final = 4
"""Build-ids that servers are asked for: a core may claim any number of libcs, each may cost the whole time limit."""
DEBUG_FOLDER: Final = b"usr/lib/debug"
"""Where distributions install debug files, below the root of what they belong to."""
_DELETED: Final = b" (deleted)"


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that was not used because it is of another build."""

    path: str
    build_id: bytes


@dataclass(frozen=True, slots=True)
class FoundFile:
    """The outcome of a search: ``status`` as in ``Module.file_status``."""

    status: str
    file: ElfFile | None = None
    refused: Refused | None = None
    """The first file whose build-id differs, None for none."""
    debug_file: ElfFile | None = None
    """A file in the module's place that has the build-id and only its debug sections."""


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """What servers gave: ``file`` None with the ``problem`` in one sentence."""

    file: ElfFile | None
    problem: str = ""


class FileFinder:
    """Finds and verifies files: on this machine, and on servers where there is a ``debuginfod`` client."""

    def __init__(
        self,
        executable: Path | None = None,
        sysroot: Path | None = None,
        debug_directories: Sequence[Path] = (),
        debuginfod: DebuginfodClient | None = None,
        before_fetch: Callable[[], None] = lambda: None,
    ) -> None:
        """``before_fetch`` is called before servers are asked, which may take minutes."""
        self._executable = executable
        self._sysroot = sysroot
        self._debug_directories = tuple(debug_directories)
        self._debuginfod = debuginfod
        self._before_fetch = before_fetch
        self._found: dict[tuple[bytes, bytes | None, bool], FoundFile] = {}
        self._fetched: dict[tuple[bytes, str], FetchedFile] = {}
        self._used: list[ElfFile] = []

    def check_files(self) -> None:
        """Raises InputNotUsable where a file that was found lost bytes since it was opened."""
        for file in self._used:
            if file.guard is not None:
                file.guard.check()

    @property
    def may_fetch(self) -> bool:
        """Whether the user allowed servers to be asked."""
        return self._debuginfod is not None

    def find(self, raw_path: bytes, build_id: bytes | None, *, is_executable: bool) -> FoundFile:
        """The local file of the module with this path and build-id.

        A file counts only with an equal build-id; a module whose build-id is not in the core has
        none.
        """
        key = (raw_path, build_id, is_executable)
        if key not in self._found:
            self._found[key] = self._search(raw_path, build_id, is_executable)
        return self._found[key]

    def _search(self, raw_path: bytes, build_id: bytes | None, is_executable: bool) -> FoundFile:
        status = "no_file"
        refused: Refused | None = None
        debug_file: ElfFile | None = None
        for candidate in self._candidates(raw_path, is_executable):
            if build_id is None:
                # Path.is_file raises for folders that may not be read, and for names that are too long.
                if os.path.isfile(candidate):
                    status = "not_verifiable"
                continue
            file = ElfFile.open(candidate)
            if file is None:
                continue
            if file.build_id == build_id and file.is_debug_file:
                debug_file = debug_file or file
                self._used.append(file)
            elif file.build_id == build_id:
                self._used.append(file)
                return FoundFile("matched", file, refused, debug_file)
            elif file.build_id is not None:
                status, refused = "build_id_differs", refused or Refused(str(candidate), file.build_id)
            elif status == "no_file":
                status = "not_verifiable"
        return FoundFile(status, None, refused, debug_file)

    def find_debug_file(self, raw_path: bytes, build_id: bytes, module_file: ElfFile | None) -> FoundFile:
        """A local debug file with this build-id: .build-id/xx/yyyy.debug, then the name in the module file's
        .gnu_debuglink, in the places where gdb looks."""
        refused: Refused | None = None
        for candidate in self._debug_candidates(_usable(raw_path), build_id.hex(), module_file):
            file = ElfFile.open(candidate)
            if file is None or file.build_id is None:
                continue
            if file.build_id == build_id:
                self._used.append(file)
                return FoundFile("matched", file, refused)
            refused = refused or Refused(str(candidate), file.build_id)
        return FoundFile("no_file" if refused is None else "build_id_differs", None, refused)

    def fetch(self, build_id: bytes, kind: str) -> FetchedFile:
        """The file of one of ``debuginfod.KINDS`` from the servers; each is asked for once."""
        key = (build_id, kind)
        if key not in self._fetched:
            self._fetched[key] = self._fetch(build_id, kind)
        return self._fetched[key]

    def _fetch(self, build_id: bytes, kind: str) -> FetchedFile:
        asked = {known for known, _ in self._fetched}
        if self._debuginfod is None:
            return FetchedFile(None, "no server may be asked")
        if build_id not in asked and len(asked) >= ASKED_LIMIT:
            return FetchedFile(None, f"files of {ASKED_LIMIT} modules were asked for already, the limit")
        self._before_fetch()
        answer = self._debuginfod.fetch(build_id, kind)
        if answer.path is None:
            return FetchedFile(None, answer.problem)
        file = ElfFile.open(answer.path, origin=f"debuginfod ({answer.server or 'kept from an earlier request'})")
        # Read again, because another process may have replaced what was verified.
        if file is None or file.build_id != build_id:
            return FetchedFile(None, f"{answer.path} was changed while it was opened")
        if kind == "executable" and file.is_debug_file:
            return FetchedFile(None, f"{answer.server or answer.path}: a debug file, without the code; refused")
        self._used.append(file)
        return FetchedFile(file)

    def _debug_candidates(self, raw_path: bytes, digits: str, module_file: ElfFile | None) -> Iterator[Path]:
        by_build_id = os.fsencode(f".build-id/{digits[:2]}/{digits[2:]}.debug")
        for directory in self._debug_directories:
            yield directory / os.fsdecode(by_build_id)
            yield directory / os.fsdecode(DEBUG_FOLDER + b"/" + by_build_id)
        yield from self._below_sysroot(DEBUG_FOLDER + b"/" + by_build_id)
        link = os.fsencode(module_file.debug_link) if module_file is not None else b""
        if module_file is None or not link:
            return
        folder = os.path.dirname(raw_path).lstrip(b"/")
        for directory in self._debug_directories:
            yield directory / os.fsdecode(link)
            for below in (folder, DEBUG_FOLDER + b"/" + folder):
                inside = resolve_inside(directory, below + b"/" + link)
                if inside is not None:
                    yield inside
        for name in (link, b".debug/" + link):
            yield from self._beside_module(raw_path, module_file, name)
        yield from self._below_sysroot(DEBUG_FOLDER + b"/" + folder + b"/" + link)

    def _beside_module(self, raw_path: bytes, module_file: ElfFile, name: bytes) -> Iterator[Path]:
        """A file in the module's folder: as the core names it, and as the links to the module's file lead to it."""
        folder = os.path.dirname(raw_path)
        own_folder = os.fsencode(module_file.path.parent)
        if self._sysroot is None:
            if folder:
                yield Path(os.fsdecode(folder + b"/" + name))
            yield Path(os.fsdecode(own_folder + b"/" + name))
            return
        if folder:
            yield from self._below_sysroot(folder + b"/" + name)
        top = os.fsencode(os.path.realpath(self._sysroot))
        if own_folder == top or own_folder.startswith(top + b"/"):
            yield from self._below_sysroot(own_folder[len(top) :] + b"/" + name)
        else:  # the executable that the user named
            yield Path(os.fsdecode(own_folder + b"/" + name))

    def _below_sysroot(self, raw_path: bytes) -> Iterator[Path]:
        inside = None if self._sysroot is None else resolve_inside(self._sysroot, raw_path)
        if inside is not None:
            yield inside

    def _candidates(self, raw_path: bytes, is_executable: bool) -> Iterator[Path]:
        if is_executable and self._executable is not None:
            yield self._executable
        raw_path = _usable(raw_path)
        if not raw_path:
            return
        if self._sysroot is None:
            yield Path(os.fsdecode(raw_path))
            return
        # Who names a sysroot means the files of another machine: those of this one are not looked at.
        yield from self._below_sysroot(raw_path)


def _usable(raw_path: bytes) -> bytes:
    """A path of the core without what the kernel adds to it; empty when it is none to look up."""
    raw_path = raw_path.removesuffix(_DELETED)
    if not raw_path.startswith(b"/") or len(raw_path) > PATH_BYTES or b"\0" in raw_path:
        return b""
    return raw_path


def resolve_inside(root: Path, raw_path: bytes) -> Path | None:
    """The path below ``root``, its symbolic links followed as if ``root`` were the root directory.

    None when nothing is there or the links go round in a circle. The result never lies outside of
    ``root``.
    """
    top = os.fsencode(os.path.realpath(root))
    place: list[bytes] = []
    waiting = [part for part in reversed(raw_path.split(b"/")) if part not in (b"", b".")]
    links = 0
    try:
        while waiting:
            part = waiting.pop()
            if part == b"..":
                place = place[:-1]
                continue
            here = b"/".join([top, *place, part])
            if not os.path.islink(here):
                place.append(part)
                continue
            links += 1
            if links > LINK_LIMIT:
                return None
            target = os.readlink(here)
            if target.startswith(b"/"):
                place = []
            waiting += [step for step in reversed(target.split(b"/")) if step not in (b"", b".")]
        resolved = b"/".join([top, *place])
        return Path(os.fsdecode(resolved)) if os.path.lexists(resolved) else None
    except (OSError, ValueError):
        return None
