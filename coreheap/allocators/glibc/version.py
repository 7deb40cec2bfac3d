"""What libc says of its own version: a hint beside the structures, which decide.

Knows: the banner that every libc carries in its read-only data (csu/version.c, all releases). Does not know: layouts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from coreheap.corefile import Core, Module

BANNER = re.compile(rb"GNU C Library (\([^()\n]{0,200}\))[^\n]{0,40}release version ([0-9]{1,3}\.[0-9]{1,3})")
LIBC_NAME = re.compile(r"libc(-[0-9.]+)?\.so")


@dataclass(frozen=True, slots=True)
class LibcVersion:
    """``release`` such as 2.36, ``vendor`` what the builder added, ``source`` where the banner was read."""

    release: str
    vendor: str
    source: str

    def __str__(self) -> str:
        return f"{self.release} {self.vendor}"


def libc_version(core: Core) -> LibcVersion | None:
    """The version in libc's banner, or in the program's when it is linked statically; None where it is not at hand."""
    for module in core.modules:
        if not (LIBC_NAME.match(module.name) or module.is_executable):
            continue
        for content, source in _read_only_data(core, module):
            match = BANNER.search(content)
            if match is not None:
                vendor, release = (group.decode("ascii", "replace") for group in match.groups())
                return LibcVersion(release, vendor, source)
    return None


def _read_only_data(core: Core, module: Module) -> Iterator[tuple[memoryview | bytes, str]]:
    """The module's memory as far as it was saved, then its file when that is proven to be the right one."""
    for start, end in module.mapped_ranges:
        for run_start, run_end in core.memory.saved_runs_within(start, end):
            yield core.memory.view(run_start, run_end).data, f"memory of {module.name}"
    if module.file is not None:
        yield module.file.read_bytes(), f"file of {module.file_title} with the same build-id"
