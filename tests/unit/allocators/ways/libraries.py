"""Real libcs: this machine's own, and Debian's of five releases on three platforms, stripped and with debug files.

The truth about each is what readelf says of the debug file's symbol table. Knows nothing of coreheap.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import require_tool
from tests.real_cores import cores, targets

NATIVE = "native"
NAMES = (NATIVE, *targets.MATRIX_TARGETS)
GLOBALS = ("main_arena", "mp_", "tcache", "thread_arena")

# Link-time addresses and TLS offsets as facts/glibc-malloc.md has them, section 7.2, by build-id.
KNOWN = {
    "f3654f4d": (0x1CEB80, 0x1CE280, 0x40, 0x50),
    "35ede6d6": (0x1E4740, 0x1E4120, 0x20, 0x28),
    "74dff097": (0x16FA68, 0x16F108, 0x40, 0x48),
    "93ac61ec": (0x1D3C60, 0x1D3340, 0x48, 0x58),
    "ae102d63": (0x21D7C0, 0x21D1C0, 0x24, 0x2C),
    "6f268ff5": (0x1A0AF0, 0x1A01B0, 0x50, 0x48),
    "5e5b51f4": (0x1E5AC0, 0x1E5180, 0x48, 0x58),
    "4fc64cf6": (0x232760, 0x232160, 0x24, 0x2C),
    "5f3926d9": (0x1B0A40, 0x1B0110, 0x50, 0x58),
    "a226e0f1": (0x1E7AC0, 0x1E7180, 0x20, 0x50),
    "2c56a54c": (0x233740, 0x233140, 0x10, 0x28),
    "405d95c1": (0x1B0A30, 0x1B0110, 0x20, 0x50),
    "f6a1e452": (0x1F0AC0, 0x1F0180, 0x20, 0x50),
    "7da4c377": (0x23E740, 0x23E140, 0x10, 0x28),
    "d421ccc3": (0x1C0A10, 0x1C0110, 0x20, 0x50),
}


@dataclass(frozen=True, slots=True)
class Library:
    """One libc: its file, its debug file, and where malloc's globals are (TLS variables: offset in the TLS block)."""

    name: str
    machine: str
    release: str
    file: Path
    debug_file: Path
    truth: dict[str, int]

    @property
    def word_bytes(self) -> int:
        return 4 if self.machine == "i386" else 8


@cache
def library(name: str) -> Library:
    """A library by name; skips with the remedy where it is not at hand, fails under CI=true."""
    readelf = require_tool("readelf", "apt install binutils")
    if name == NATIVE:
        machine = platform.machine()
        found = sorted(Path("/").glob(f"lib/{machine}-linux-gnu/libc.so.6"))
        debug_root = Path("/usr/lib/debug")
    else:
        target = targets.MATRIX_TARGETS[name]
        machine = target.machine
        directory = cores.default_directory()
        if os.environ.get("CI") != "true" and not (directory / "packages" / name / "unpacked").exists():
            pytest.skip(
                f"no libc6 and libc6-dbg of {name}; to run this test: scripts/make_cores --matrix --target {name}"
            )
        try:
            files = targets.files_of(target, directory)
        except targets.CannotMake as problem:
            if os.environ.get("CI") == "true":
                pytest.fail(str(problem))
            pytest.skip(str(problem))
        found = [files.libraries / "libc.so.6"]
        debug_root = files.debug
    build_id = _read(readelf, "-n", found[0], r"Build ID: ([0-9a-f]+)") if found else ""
    debug_file = debug_root / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    if not found or not debug_file.exists():
        reason = f"no debug file of {name}'s libc6; to run this test: apt install libc6-dbg"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    truth = _globals(readelf, debug_file)
    if build_id[:8] in KNOWN:
        assert tuple(truth[name] for name in GLOBALS) == KNOWN[build_id[:8]]
    banner = re.search(rb"GNU C Library [^\n]* release version ([0-9.]+[0-9])", found[0].read_bytes())
    assert banner is not None
    return Library(name, machine, banner.group(1).decode(), found[0], debug_file, truth)


def _read(readelf: str, option: str, file: Path, pattern: str) -> str:
    answer = subprocess.run([readelf, option, file], capture_output=True, text=True, check=True).stdout
    match = re.search(pattern, answer)
    return match.group(1) if match else ""


def _globals(readelf: str, debug_file: Path) -> dict[str, int]:
    answer = subprocess.run([readelf, "-sW", debug_file], capture_output=True, text=True, check=True).stdout
    rows = (line.split() for line in answer.splitlines())
    return {row[7]: int(row[1], 16) for row in rows if len(row) == 8 and row[7] in GLOBALS}
