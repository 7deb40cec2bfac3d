"""What tests need of a machine, and what they tell where it is missing.

Knows scripts/packages, the one table of Debian packages, and how reasons for skipping name a remedy. Knows no test.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[1] / "scripts" / "packages"
REASONS_SHOWN = 8
_INSTALLING = re.compile(r"\bapt(?:-get)? install ((?:[a-z0-9][a-z0-9.+-]+ ?)+)")
_CORES = "scripts/make_cores --matrix"


class Missing(Exception):
    """This machine lacks what a test takes; the text says what, and how to get it. The test is skipped, in CI it fails."""


@cache
def packages_of_commands() -> dict[str, str]:
    """program -> the Debian package that brings it, of scripts/packages."""
    rows = [line.split() for line in PACKAGES.read_text(encoding="utf-8").splitlines()]
    commands = {row[2]: row[0] for row in rows if len(row) == 3 and row[1] == "command"}
    files = {Path(row[2]).name: row[0] for row in rows if len(row) == 3 and row[1] == "file"}
    return {**files, **commands}


def missing_program(error: FileNotFoundError) -> str | None:
    """What to tell of a program of scripts/packages that a test started and that is not there; None for any other file."""
    name = error.filename
    if not isinstance(name, str) or name not in packages_of_commands() or shutil.which(name) is not None:
        return None
    return f"{name} is missing; to run this test: apt-get install {packages_of_commands()[name]}"


def packages_in(reason: str) -> list[str]:
    """The packages that a reason for skipping says to install."""
    return [package for names in _INSTALLING.findall(reason) for package in names.split()]


def told(reasons: Iterable[str], tests: int) -> list[str]:
    """What was skipped and what would run it, in lines; none where nothing was."""
    reasons = list(reasons)
    if not reasons:
        return []
    packages: Counter[str] = Counter()
    others: Counter[str] = Counter()
    cores = for_packages = 0
    for reason in reasons:
        names = packages_in(reason)
        if names:
            packages.update(names)
            for_packages += 1
        elif _CORES in reason:
            cores += 1
        else:
            others[" ".join(reason.split())] += 1
    lines = [f"{len(reasons):,} of {tests:,} tests were skipped:"]
    if for_packages:
        named = ", ".join(f"{name} ({count:,})" for name, count in packages.most_common())
        lines.append(f"{for_packages:7,}  need packages: {named}")
    if cores:
        lines.append(f"{cores:7,}  need cores of other glibc releases (some 1 GB of downloads): {_CORES}")
    for reason, count in others.most_common(REASONS_SHOWN):
        lines.append(f"{count:7,}  {reason}")
    rest = sum(count for _, count in others.most_common()[REASONS_SHOWN:])
    if rest:
        lines.append(f"{rest:7,}  for other reasons; pytest -ra tells them")
    return lines
