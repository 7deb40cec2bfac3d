"""Cores that qemu-user wrote (aarch64): no NT_FILE, no ELF headers, an auxiliary vector that begins late; 64 KiB pages.

The truth is the process's own /proc/self/maps and its recorded blocks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import coreheap
from coreheap.corefile import open_core
from coreheap.evidence import Confidence
from tests.real_cores import cores, targets
from tests.real_cores.cases import MATRIX
from tests.real_cores.comparison import compare_all
from tests.real_cores.conftest import core_or_skip, report_on
from tests.real_cores.truth import Truth, load_truth

EMULATED = [name for name, target in targets.MATRIX_TARGETS.items() if target.is_emulated]
NO_OBJECTS = (".cache", ".events", ".notes", ".xml", ".maps", ".smaps")
RELEASES_ALONE = {"forky": "glibc 2.43", "experimental": "glibc 2.44"}


def mapped_objects(truth: Truth) -> dict[str, tuple[int, int]]:
    """path -> first and last address of the mappings of each ELF object, as the process saw them."""
    found: dict[str, tuple[int, int]] = {}
    for line in truth.maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) < 6 or not fields[5].startswith("/") or fields[5].endswith(NO_OBJECTS):
            continue
        start, end = (int(part, 16) for part in fields[0].split("-"))
        before = found.get(fields[5], (start, end))
        found[fields[5]] = (min(before[0], start), max(before[1], end))
    return found


@pytest.mark.parametrize("case", ["threads_kept", "non_pie", "plain_small"])
@pytest.mark.parametrize("target", EMULATED)
def test_modules_are_those_that_the_process_saw(target: str, case: str, tmp_path: Path) -> None:
    paths = core_or_skip(f"{target}/{case}")
    truth = load_truth(paths.truth)
    assert truth.made_by == "qemu"
    with open_core(paths.core, sysroot=tmp_path) as core:
        found = {str(Path(module.path).resolve()): module for module in core.modules}
        wanted = mapped_objects(truth)
        assert set(found) == {str(Path(path).resolve()) for path in wanted}
        for path, (start, end) in wanted.items():
            module = found[str(Path(path).resolve())]
            assert module.start == start
            # Behind the file's last mapping comes .bss.
            assert end <= module.end <= end + (1 << 20)
            assert module.build_id is None
            assert module.dynamic
        assert [Path(module.path).name for module in core.modules if module.is_executable] == [
            MATRIX[f"{target}/{case}"].program
        ]
        assert core.page_bytes == 4096
        assert "page_size_unknown" not in {gap.cause for gap in core.gaps}


@pytest.mark.parametrize("target", EMULATED)
def test_files_that_cannot_be_proven_are_not_used(target: str) -> None:
    """qemu-user saves no program text and so no build-id; the right file at the right place stays unproven."""
    paths = core_or_skip(f"{target}/threads_kept")
    files = targets.files_of(MATRIX[f"{target}/threads_kept"].target, cores.default_directory())
    with open_core(paths.core, executable=paths.executable, sysroot=files.sysroot) as core:
        statuses = {Path(module.path).name: module.file_status for module in core.modules}
        assert statuses[Path(paths.executable).name] == "not_verifiable"
        (libc,) = (name for name in statuses if name.startswith("libc"))
        assert statuses[libc] == "not_verifiable"
        assert all(module.elf_file is None for module in core.modules)
        assert "modules_not_verifiable" in {gap.cause for gap in core.gaps}


@pytest.mark.parametrize("target", EMULATED)
def test_the_environment_is_read(target: str, tmp_path: Path) -> None:
    with open_core(core_or_skip(f"{target}/one_arena").core, sysroot=tmp_path) as core:
        assert core.initial_stack is not None
        assert core.initial_stack.environment["MALLOC_ARENA_MAX"] == "1"
        assert Path(core.initial_stack.arguments[0]).name == "threads"


@pytest.mark.parametrize("case", ["threads_kept", "static_exe", "every_list", "plain_small"])
@pytest.mark.parametrize("target", [name for name in targets.MATRIX_TARGETS if name.split("-")[0] in RELEASES_ALONE])
def test_releases_whose_heaps_are_alike_are_told_apart(target: str, case: str, tmp_path: Path) -> None:
    """2.43 and 2.44 differ in malloc_par alone: mp_.thp_mode is numbered anew."""
    report = report_on(core_or_skip(f"{target}/{case}").core, sysroot=tmp_path)
    assert report.heap is not None
    assert report.heap.identity.layout == RELEASES_ALONE[target.split("-")[0]]


@pytest.mark.parametrize("case", ["static_exe", "static_pie"])
@pytest.mark.parametrize("target", EMULATED)
def test_pages_of_64_kib(target: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """qemu-user's -p makes pages as large as kernels for large machines have them.

    Static programs: the recorder does not find its tcache in others then.
    """
    core_or_skip(f"{target}/{case}")
    usual = cores.runner
    monkeypatch.setattr(cores, "runner", lambda case, folder: [*usual(case, folder), "-p", "65536"])
    (tmp_path / "packages").symlink_to(cores.default_directory() / "packages")
    paths = cores.core_for(f"{target}/{case}", tmp_path)
    with coreheap.open(paths.core, sysroot=tmp_path) as core:
        assert core.page_bytes == 65536
        report = coreheap.analyze(core)
    assert report.heap is not None
    assert report.heap.identity.confidence is Confidence.CERTAIN
    assert compare_all(report, load_truth(paths.truth)) == []
