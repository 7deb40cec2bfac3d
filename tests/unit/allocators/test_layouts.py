"""Every layout row against what compilers and Debian's debug information say (fixtures/facts)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from coreheap.allocators.glibc import layouts
from coreheap.allocators.glibc.layouts import GENERATIONS, WORD_CLASSES
from coreheap.allocators.glibc.structures import bin_numbers, tcache_bin_sizes
from tests import proven
from tests.glibc_facts import Entry, entries
from tests.layout_checks import differences_from_dwarf, differences_from_facts, layout_of, layout_of_debian
from tests.real_cores import targets
from tests.real_cores.cores import default_directory
from tests.unit.allocators.ways.libraries import library

ROOT = Path(__file__).parents[3]
COMMAND = ROOT / "scripts" / "verify_layouts"
ENTRIES = tuple(pytest.param(entry, id=f"{entry.release}-{entry.machine}") for entry in entries())


@pytest.mark.parametrize("entry", ENTRIES)
def test_rows_are_those_of_the_release(entry: Entry) -> None:
    """Structures and constants."""
    assert differences_from_facts(entry) == []


@pytest.mark.parametrize("name", targets.MATRIX_TARGETS)
def test_rows_are_those_of_debians_debug_information(name: str) -> None:
    real = library(name)  # skips with the remedy, fails under CI=true
    target = targets.MATRIX_TARGETS[name]
    assert target.platform is not None
    files = targets.files_of(target, default_directory())
    release, layout = layout_of_debian(files.glibc, target.platform.debian)
    assert layout is not None, f"no generation has release {release}: add a row to layouts.py"
    assert differences_from_dwarf(real.file, files.debug, target.platform.debian, layout) == []


# The command


@pytest.fixture(name="command")
def _command() -> ModuleType:
    loader = SourceFileLoader("verify_layouts", str(COMMAND))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_command_passes(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """With the packages of this machine's cache; CI has all of them after the tests above."""
    assert command.main(["--offline"]) == 0
    said = capsys.readouterr().out
    assert f"{len(ENTRIES)} entries, 0 differ" in said
    assert re.search(r"\d+ packages, 0 differ", said)
    if os.environ.get("CI") == "true":
        assert f"{len(targets.MATRIX_TARGETS)} packages, 0 differ" in said


def test_command_names_what_differs(
    command: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field moved in the row of 2.23 must show, with where it belongs; 2.24-2.26 share that row."""
    row = layouts.MALLOC_STATE["2.23"].replace(
        "next_free:word attached_threads:word", "attached_threads:word next_free:word"
    )
    monkeypatch.setitem(layouts.MALLOC_STATE, "2.23", row)
    assert command.main(["--offline"]) == 1
    said = capsys.readouterr().out
    for release in ("2.22-branch", "2.23", "2.24", "2.25", "2.26"):
        assert f"{release} amd64: malloc_state.next_free: expected 0x870, found 0x878" in said
    assert "2.22 amd64" not in said
    assert "2.26-branch amd64" not in said


def test_command_says_which_package_is_missing(
    command: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main(["--offline", "--target", "forky-i386"]) == 0
    said = capsys.readouterr().out
    assert "no package" in said
    assert "forky-i386: not in the cache, and --offline downloads nothing" in said
    assert "0 packages, 0 differ" in said


def test_command_teaches() -> None:
    answer = subprocess.run([sys.executable, COMMAND, "--help"], capture_output=True, text=True, check=True)
    for word in ("--offline", "--target", "--table", "Exit code", "no package"):
        assert word in answer.stdout


def test_page_is_what_the_tests_say() -> None:
    """docs/proven.md cannot fall behind; to write it anew: scripts/verify_layouts --table > docs/proven.md"""
    assert (ROOT / "docs" / "proven.md").read_text(encoding="utf-8") == proven.page()


# Rows and formulas that no structure shows


def test_each_release_belongs_to_one_generation() -> None:
    releases = [release for generation in GENERATIONS for release in generation.releases]
    assert len(releases) == len(set(releases))


# Bins as malloc.c's macros give them, written out by hand for a few sizes on both sides of each border
# (glibc-malloc fact sheet, section 5).
BIN_OF_SIZE = {
    "64": {32: 2, 48: 3, 1008: 63, 1024: 64, 1072: 64, 1088: 65, 3072: 96, 3120: 96, 3136: 97,
           3568: 97, 3584: 98, 10736: 111, 10752: 112, 45040: 120, 65536: 121, 131072: 123,
           163840: 124, 524288: 126, 1 << 20: 126},
    "32a8": {16: 2, 24: 3, 504: 63, 512: 64, 2480: 94, 2496: 95, 2552: 95, 2560: 96},
    "32a16": {16: 2, 32: 3, 992: 63, 1008: 64, 1023 // 16 * 16: 64, 1024: 65, 2928: 94},
}  # fmt: skip


@pytest.mark.parametrize("name", BIN_OF_SIZE)
def test_bins_hold_the_sizes_that_glibc_puts_there(name: str) -> None:
    lowest, highest = bin_numbers(WORD_CLASSES[name])
    for size, number in BIN_OF_SIZE[name].items():
        assert lowest[number] <= size <= highest[number], size


@pytest.mark.parametrize("name", sorted(WORD_CLASSES))
def test_bins_are_disjoint_and_without_holes(name: str) -> None:
    word_class = WORD_CLASSES[name]
    lowest, highest = bin_numbers(word_class)
    expected = word_class.minimum_chunk_bytes
    for number in range(2, 127):
        if lowest[number] > highest[number]:
            continue
        assert lowest[number] == expected, number
        expected = int(highest[number]) + word_class.alignment
    assert highest[126] == 1 << 62


def test_tcache_bins_hold_one_size_each_up_to_64() -> None:
    lowest, highest = tcache_bin_sizes(64, WORD_CLASSES["64"])
    assert lowest.tolist() == highest.tolist() == list(range(32, 1041, 16))


@pytest.mark.parametrize("entry", [param for param in ENTRIES if param.values[0].constants["TCACHE_MAX_BINS"] == 76])
def test_large_tcache_bins_hold_what_glibc_puts_there(entry: Entry) -> None:
    """The 2.42 tag takes another power of two for its first large bin than its branch: only 32a16 shows it."""
    facts = entry.constants
    layout = layout_of(entry.release, entry.word_class)
    assert layout is not None
    one_less = entry.release == "2.42"
    assert layout.generation.tcache_may_count_from_one_less or not one_less
    lowest, highest = tcache_bin_sizes(76, layout.word_class, one_less)
    base = int(facts["tcache_large_index_base"].removeprefix("64 + bitlen(chunk_size) - "))
    for number in range(64, 76):
        sizes = [size for size in range(int(lowest[63]) + 16, 1 << 13, 16) if 64 + size.bit_length() - base == number]
        held = [size for size in range(int(lowest[63]) + 16, 1 << 13, 16) if lowest[number] <= size <= highest[number]]
        assert held == sizes, number
    used = [number for number in range(64, 76) if lowest[number] <= highest[number]]
    assert used == list(range(facts["tcache_large_first_index"], 76))
    assert highest[75] + 1 == facts["tcache_large_max_chunk_exclusive"]
