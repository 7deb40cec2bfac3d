"""What tests need, and what is told where it is missing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import needs

SCRIPTS = Path(__file__).parents[2] / "scripts"


def test_each_row_has_a_way_to_tell() -> None:
    rows = [line.split() for line in needs.PACKAGES.read_text().splitlines() if line and line[0] != "#"]
    assert all(row[1] in ("command", "file", "package", "python") for row in rows)
    assert all((len(row) == 2) == (row[1] == "package") for row in rows)


def test_what_is_missing_is_one_line_of_packages(tmp_path: Path) -> None:
    """With a table of its own: of what is here and of what is nowhere."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "missing_packages").write_text((SCRIPTS / "missing_packages").read_text())
    (folder / "packages").write_text(
        "# a comment\n\n"
        "a command no-such-program\nb command sh\nc file /no/such/*\nd file /bin/s?\n"
        "e python import no_such_module\nf python import os, sys\nno-such-package-of-debian package"
    )

    def missing() -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", folder / "missing_packages"], capture_output=True, text=True, check=False)

    assert missing().stdout == "a c e no-such-package-of-debian\n"
    (folder / "packages").write_text("b command sh\n")
    assert missing().stdout == ""
    (folder / "packages").write_text("b guess sh\n")
    assert missing().returncode == 1
    assert "no way to tell that is called guess" in missing().stderr


def test_a_program_of_the_table_that_is_not_there_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name, package in (("lz4", "lz4"), ("objcopy", "binutils"), ("xz", "xz-utils"), ("nginx", "nginx-light")):
        with pytest.raises(FileNotFoundError) as caught:
            subprocess.run([name], check=False)
        assert needs.missing_program(caught.value) == f"{name} is missing; to run this test: apt-get install {package}"
    for name in ("/no/such/file", "no-such-program"):
        assert needs.missing_program(FileNotFoundError(2, os.strerror(2), name)) is None
    monkeypatch.undo()
    assert needs.missing_program(FileNotFoundError(2, os.strerror(2), "objcopy")) is None


def test_what_was_skipped_is_told_by_its_remedy() -> None:
    reasons = [
        "no zstd: apt-get install zstd",
        "gdb is missing; to run this test: apt-get install gdb",
        "gdb is missing; to run this test: apt install gdb",
        "no x: apt-get install gcc-i686-linux-gnu libc6-dev",
        "not downloaded yet; to run this test: scripts/make_cores --matrix --target trixie-amd64",
        "core_pattern sends cores elsewhere;\n as root: echo core > /proc/sys/kernel/core_pattern",
        *[f"reason {number}" for number in range(needs.REASONS_SHOWN)],
    ]
    lines = needs.told(reasons, 1000)
    assert lines[0] == f"{len(reasons)} of 1,000 tests were skipped:"
    assert "      4  need packages: gdb (2), zstd (1), gcc-i686-linux-gnu (1), libc6-dev (1)" in lines
    assert any(line.startswith("      1  need cores of other glibc releases") for line in lines)
    assert any("core_pattern sends cores elsewhere; as root" in line for line in lines)
    assert lines[-1] == "      1  for other reasons; pytest -ra tells them"
    assert needs.told([], 1000) == []
