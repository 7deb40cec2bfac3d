"""DWARF of one unit among others: built by gcc in several formats, then damaged."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from coreheap.corefile import ElfFile, dwarf
from coreheap.corefile.dwarf import DwarfUnit, unit_at
from tests.conftest import require_tool

SOURCE = """
struct inner { char tag; long words[4]; };
typedef struct { int mutex; struct inner inner; char *end; } arena_type;
static volatile arena_type wanted;
extern int declared;
int declared = 5;
static __thread volatile int *volatile per_thread;
int entry(void) { per_thread = &wanted.mutex; return *per_thread + wanted.mutex + declared; }
"""
OTHER = (
    "struct inner { int nothing; }; static volatile struct inner wanted; int other(void) { return wanted.nothing; }\n"
)
STRUCTURES = {"inner": (40, {"tag": 0, "words": 8}), "arena_type": (56, {"mutex": 0, "inner": 8, "end": 48})}
VARIABLES = ("wanted", "declared", "per_thread", "missing")


class Workshop:
    """A folder with gcc and binutils in it."""

    def __init__(self, folder: Path, tool: Callable[[str, str], str]) -> None:
        self.folder = folder
        self.gcc = tool("gcc", "apt install gcc libc6-dev")
        self.objcopy, self.nm = (tool(name, "apt install binutils") for name in ("objcopy", "nm"))

    @cache  # noqa: B019 - one workshop, for the module's life
    def library(self, *options: str) -> Path:
        """A library that is built once for each set of options."""
        (self.folder / "sample.c").write_text(SOURCE)
        (self.folder / "other.c").write_text(OTHER)
        command = [self.gcc, "-shared", "-fPIC", "-O1", "-g", *options, "other.c", "sample.c", "-o"]
        library = self.folder / f"sample{''.join(options)}.so"
        subprocess.run([*command, library], cwd=self.folder, check=True)
        return library

    def symbols(self, library: Path) -> dict[str, int]:
        lines = subprocess.run([self.nm, library], capture_output=True, text=True, check=True).stdout.splitlines()
        rows = [line.split() for line in lines]
        return {row[2]: int(row[0], 16) for row in rows if len(row) == 3}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("dwarf"), require_tool)


def unit_of(path: Path, address: int) -> DwarfUnit | None:
    file = ElfFile.open(path)
    return None if file is None else unit_at(file, address, VARIABLES, STRUCTURES.keys())


@pytest.mark.parametrize(
    "options",
    [(), ("-gdwarf-4",), ("-gdwarf-3",), ("-gz",), ("-O0",), ("-Wl,-z,norelro",)],
    ids=["default", "dwarf-4", "dwarf-3", "compressed", "O0", "norelro"],
)
def test_variables_and_structures(workshop: Workshop, options: tuple[str, ...]) -> None:
    library = workshop.library(*options)
    symbols = workshop.symbols(library)
    unit = unit_of(library, symbols["entry"])
    assert unit is not None
    assert unit.name == "sample.c"
    # nm says nothing of which of two variables with one name is whose: the other unit's lies apart from this one's.
    assert unit.variables["declared"].address == symbols["declared"]
    assert unit.variables["per_thread"].address is None
    assert unit.variables["per_thread"].thread_offset == symbols["per_thread"]
    assert "missing" not in unit.variables
    found = {name: (structure.byte_count, structure.offsets) for name, structure in unit.structures.items()}
    assert found == STRUCTURES


def test_units_do_not_mix(workshop: Workshop) -> None:
    library = workshop.library()
    symbols = workshop.symbols(library)
    unit, other = (unit_of(library, symbols[name]) for name in ("entry", "other"))
    assert unit is not None
    assert other is not None
    assert other.name == "other.c"
    assert other.structures["inner"].byte_count == 4
    assert other.variables.keys() == {"wanted"}
    assert other.variables["wanted"].address != unit.variables["wanted"].address


def test_a_debug_file_of_its_own(workshop: Workshop) -> None:
    library = workshop.library()
    subprocess.run([workshop.objcopy, "--only-keep-debug", library, "sample.debug"], cwd=workshop.folder, check=True)
    address = workshop.symbols(library)["entry"]
    assert unit_of(workshop.folder / "sample.debug", address) == unit_of(library, address)


def test_without_dwarf_or_without_the_address(workshop: Workshop) -> None:
    library = workshop.library()
    assert unit_of(library, 1) is None
    assert unit_of(library, (1 << 64) - 1) is None
    subprocess.run([workshop.objcopy, "--strip-debug", library, "bare.so"], cwd=workshop.folder, check=True)
    assert unit_of(workshop.folder / "bare.so", workshop.symbols(library)["entry"]) is None
    subprocess.run(
        [workshop.objcopy, "--remove-section", ".debug_aranges", library, "no_aranges.so"],
        cwd=workshop.folder,
        check=True,
    )
    assert unit_of(workshop.folder / "no_aranges.so", workshop.symbols(library)["entry"]) is None


def test_a_section_that_unpacks_to_more_than_the_limit(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    library = workshop.library("-gz")
    address = workshop.symbols(library)["entry"]
    monkeypatch.setattr(dwarf, "SECTION_BYTES_LIMIT", 16)
    assert unit_of(library, address) is None


def test_a_file_cut_anywhere(workshop: Workshop) -> None:
    library = workshop.library()
    address, content = workshop.symbols(library)["entry"], library.read_bytes()
    for size in range(64, len(content), 509):
        (workshop.folder / "cut").write_bytes(content[:size])
        unit_of(workshop.folder / "cut", address)


@pytest.mark.parametrize("packing", [(), ("-gz",)], ids=["plain", "compressed"])
@pytest.mark.parametrize("seed", range(60))
def test_bytes_changed_anywhere_behind_the_code(workshop: Workshop, seed: int, packing: tuple[str, ...]) -> None:
    library = workshop.library(*packing)
    address, content = workshop.symbols(library)["entry"], bytearray(library.read_bytes())
    rng = random.Random(seed)
    start = content.find(b"GCC: (") if seed % 2 else len(content) - 3000
    for _ in range(1 + seed % 7):
        content[rng.randrange(start, len(content))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    (workshop.folder / "damaged").write_bytes(content)
    unit_of(workshop.folder / "damaged", address)
