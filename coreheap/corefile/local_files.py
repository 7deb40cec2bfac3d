"""Local files for a core's modules: where to look, and which to refuse.

Knows: --exe, sysroot, debug directories, .build-id trees. Paths that come from the core are text of
an unknown process: they are looked up below the sysroot without leaving it, or (without a sysroot) at their own place,
and never used before the build-id is equal. Does not know: modules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from coreheap.corefile.symbols import ElfFile

LINK_LIMIT: Final = 40
PATH_BYTES: Final = 4096
_DELETED: Final = b" (deleted)"


@dataclass(frozen=True, slots=True)
class FoundFile:
    """The outcome of a search: ``status`` as in ``Module.file_status``."""

    status: str
    file: ElfFile | None = None
    rejected: str = ""
    """The first file that was refused because its build-id differs, "" for none."""


class FileFinder:
    """Finds and verifies local files."""

    def __init__(
        self,
        executable: Path | None = None,
        sysroot: Path | None = None,
        debug_directories: Sequence[Path] = (),
    ) -> None:
        self._executable = executable
        self._sysroot = sysroot
        self._debug_directories = tuple(debug_directories)
        self._found: dict[tuple[bytes, bytes | None, bool], FoundFile] = {}

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
        status, rejected = "no_file", ""
        for candidate in self._candidates(raw_path, is_executable):
            if build_id is None:
                if candidate.is_file():
                    status = "not_verifiable"
                continue
            file = ElfFile.open(candidate)
            if file is None:
                continue
            if file.build_id == build_id:
                return FoundFile("matched", file, rejected)
            if file.build_id is not None:
                status, rejected = "build_id_differs", rejected or str(candidate)
            elif status == "no_file":
                status = "not_verifiable"
        return FoundFile(status, None, rejected)

    def find_debug_file(self, raw_path: bytes, build_id: bytes, module_file: ElfFile | None) -> ElfFile | None:
        """A separate debug file with this build-id: .build-id/xx/yyyy.debug, then the name in the
        module file's .gnu_debuglink."""
        for candidate in self._debug_candidates(raw_path, build_id.hex(), module_file):
            file = ElfFile.open(candidate)
            if file is not None and file.build_id == build_id:
                return file
        return None

    def _debug_candidates(self, raw_path: bytes, digits: str, module_file: ElfFile | None) -> Iterator[Path]:
        for directory in self._debug_directories:
            yield directory / ".build-id" / digits[:2] / f"{digits[2:]}.debug"
        # Only now: reading .gnu_debuglink imports pyelftools.
        link_name = module_file.debug_link if module_file and self._debug_directories else ""
        if not link_name:
            return
        folder = os.path.dirname(raw_path).lstrip(b"/")
        for directory in self._debug_directories:
            yield directory / link_name
            inside = resolve_inside(directory, folder + b"/" + os.fsencode(link_name))
            if inside is not None:
                yield inside

    def _candidates(self, raw_path: bytes, is_executable: bool) -> Iterator[Path]:
        if is_executable and self._executable is not None:
            yield self._executable
        raw_path = raw_path.removesuffix(_DELETED)
        if not raw_path.startswith(b"/") or len(raw_path) > PATH_BYTES or b"\0" in raw_path:
            return
        if self._sysroot is None:
            yield Path(os.fsdecode(raw_path))
            return
        # Who names a sysroot means the files of another machine: those of this one are not looked at.
        inside = resolve_inside(self._sysroot, raw_path)
        if inside is not None:
            yield inside


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
