"""Relocations of libraries that gcc built, witnessed by readelf and lief; of the same in memory; of damaged ones."""

from __future__ import annotations

import random
import re
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from coreheap.corefile import ElfFile, open_core
from coreheap.corefile.relocations import FileImage, MemoryImage, Relocations, relocations_of
from tests.conftest import require_tool
from tests.core_builder import CoreBuilder

Tool = Callable[[str, str], str]

SOURCE = """
__thread int first = 1, second = 2;
static int table[64];
int *pointers[64] = { table, table + 1, 0, table + 3, [20] = table + 20, [63] = table + 63 };
int sum(void) { return first + second + *pointers[3]; }
"""
# Large enough that no test meets it by chance; a multiple of the page, as every load bias.
BIAS = 0x7F0000000000


@pytest.fixture(scope="module", params=["rela", "relr"])
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("relocations")
    gcc = require_tool("gcc", "apt install gcc libc6-dev")
    packing = ["-Wl,-z,pack-relative-relocs"] if request.param == "relr" else []
    (tmp_path / "sample.c").write_text(SOURCE)
    command = [gcc, "-shared", "-fPIC", "-O1", "-nostdlib", "-ftls-model=initial-exec", "-Wl,--build-id", *packing]
    subprocess.run([*command, "sample.c", "-o", "sample.so"], cwd=tmp_path, check=True)
    return tmp_path / "sample.so"


def image_of(path: Path) -> FileImage:
    file = ElfFile.open(path)
    assert file is not None
    return FileImage(file)


def of_file(path: Path, machine: str = "x86_64") -> Relocations:
    found = relocations_of(image_of(path), machine)
    assert found is not None
    return found


def pairs(relocations: Relocations) -> set[tuple[int, int]]:
    known = relocations.relative_known
    return set(
        zip(relocations.relative_place[known].tolist(), relocations.relative_target[known].tolist(), strict=True)
    )


def core_of(library: Path, folder: Path, changed: dict[int, int] | None = None, left_out: int | None = None) -> Path:
    """A core of a process that has the library at BIAS, all of its memory saved, relocated as ld.so does it.

    ``changed`` are words (by address in the file) that the program wrote later; the load segment with the number
    ``left_out`` was not saved.
    """
    image = bytearray(library.read_bytes())
    offset, count = struct.unpack_from("<Q", image, 32)[0], struct.unpack_from("<H", image, 56)[0]
    headers = [struct.unpack_from("<2I6Q", image, offset + 56 * number) for number in range(count)]
    loads = [(row[2], row[3], row[5], row[6], row[1]) for row in headers if row[0] == 1]
    relocations = of_file(library)
    words = {place: target + BIAS for place, target in pairs(relocations)} | (changed or {})
    slots = zip(relocations.thread_place.tolist(), relocations.thread_addend.tolist(), strict=True)
    words |= {place: addend - 0x40 & (1 << 64) - 1 for place, addend in slots}
    builder = CoreBuilder().add_thread()
    for number, (at, address, file_bytes, memory_bytes, flags) in enumerate(loads):
        start, end = address & ~0xFFF, address + memory_bytes + 0xFFF & ~0xFFF
        content = bytearray(end - start)
        content[address - start : address - start + file_bytes] = image[at : at + file_bytes]
        for place, word in words.items():
            if start <= place < end:
                struct.pack_into("<Q", content, place - start, word)
        letters = "".join(letter if flags & bit else "-" for letter, bit in (("r", 4), ("w", 2), ("x", 1)))
        if number == left_out:
            builder.add_segment(BIAS + start, None, memory_bytes=end - start, flags=letters)
        else:
            builder.add_segment(BIAS + start, content, flags=letters)
        builder.add_file_mapping(BIAS + start, BIAS + end, at & ~0xFFF, "/nowhere/sample.so")
    return builder.write(folder / "core")


class TestFile:
    def test_relative_relocations_are_those_of_readelf(self, library: Path, require_tool: Tool) -> None:
        readelf = require_tool("readelf", "apt install binutils")
        answer = subprocess.run([readelf, "-rW", library], capture_output=True, text=True, check=True).stdout
        plain = re.findall(r"^([0-9a-f]{16}) +[0-9a-f]+ R_X86_64_RELATIVE +([0-9a-f]+)$", answer, re.MULTILINE)
        found = pairs(of_file(library))
        assert {(int(place, 16), int(target, 16)) for place, target in plain} <= found
        # pointers has five entries that are not null.
        assert len(found) >= 5
        assert (".relr.dyn" in answer) == (len(plain) < 5)

    def test_lief_finds_the_same(self, library: Path) -> None:
        lief = pytest.importorskip("lief", reason="lief is missing; to run this test: pip install lief")
        binary = lief.ELF.parse(str(library))
        theirs = {
            row.address for row in binary.relocations if row.type in (lief.ELF.Relocation.TYPE.X86_64_RELATIVE,)
        } | {row.address for row in binary.relocations if row.encoding == lief.ELF.Relocation.ENCODING.RELR}
        assert set(of_file(library).relative_place.tolist()) == theirs

    def test_thread_local_slots(self, library: Path) -> None:
        found = of_file(library)
        # Each may count from its own symbol or from the block's start.
        assert len(found.thread_place) == 2
        assert found.thread_known.all()
        assert not found.thread_is_negated.any()

    def test_another_machine_knows_other_numbers(self, library: Path) -> None:
        found = relocations_of(image_of(library), "aarch64")
        assert found is not None
        assert len(found.thread_place) == 0
        assert relocations_of(image_of(library), "vax") is None


class TestMemory:
    def test_the_same_as_in_the_file(self, library: Path, tmp_path: Path) -> None:
        with open_core(core_of(library, tmp_path)) as core:
            (module,) = [module for module in core.modules if module.path.endswith("sample.so")]
            found = relocations_of(MemoryImage(core.memory, module), core.machine)
            assert found is not None
            assert pairs(found) == pairs(of_file(library))
            assert set(found.thread_place.tolist()) == set(of_file(library).thread_place.tolist())

    def test_a_word_that_the_program_changed(self, library: Path, tmp_path: Path) -> None:
        place, _ = min(pairs(of_file(library)))
        with open_core(core_of(library, tmp_path, {place: 0x1234})) as core:
            (module,) = [module for module in core.modules if module.path.endswith("sample.so")]
            found = relocations_of(MemoryImage(core.memory, module), core.machine)
            assert found is not None
            assert place in found.relative_place.tolist()
            # RELA tells the target still, RELR had it in the word alone.
            assert place not in {row[0] for row in pairs(found)} or pairs(found) == pairs(of_file(library))

    def test_tables_that_were_not_dumped(self, library: Path, tmp_path: Path) -> None:
        with open_core(core_of(library, tmp_path, left_out=0)) as core:
            for module in core.modules:
                assert relocations_of(MemoryImage(core.memory, module), core.machine) is None


class TestDamage:
    """Nothing raises, nothing takes long, whatever a file says."""

    def use(self, path: Path) -> None:
        file = ElfFile.open(path)
        if file is None:
            return
        image = FileImage(file)
        for machine in ("x86_64", "i386", "aarch64"):
            found = relocations_of(image, machine)
            if found is not None:
                assert len(found.relative_place) == len(found.relative_target) == len(found.relative_known)

    def test_a_file_cut_anywhere(self, library: Path, tmp_path: Path) -> None:
        content = library.read_bytes()
        for size in range(64, len(content), 331):
            (tmp_path / "cut").write_bytes(content[:size])
            self.use(tmp_path / "cut")

    @pytest.mark.parametrize("seed", range(40))
    def test_words_of_the_headers_and_the_dynamic_section(self, library: Path, tmp_path: Path, seed: int) -> None:
        rng = random.Random(seed)
        content = bytearray(library.read_bytes())
        for header in range(8):
            offset = 64 + 56 * header
            if rng.random() < 0.3:
                field = offset + 8 * rng.randrange(1, 7)
                struct.pack_into("<Q", content, field, rng.choice((0, 1, 0xFFF, 1 << 63, (1 << 64) - 1)))
        kinds = [struct.unpack_from("<I", content, 64 + 56 * number)[0] for number in range(8)]
        if 2 in kinds:
            at = struct.unpack_from("<Q", content, 64 + 56 * kinds.index(2) + 8)[0]
            for _ in range(3):
                place = at + 8 * rng.randrange(60)
                if place + 8 <= len(content):
                    struct.pack_into("<Q", content, place, rng.choice((0, 7, 8, 36, 1 << 40, (1 << 64) - 8)))
        (tmp_path / "damaged").write_bytes(content)
        self.use(tmp_path / "damaged")

    def test_a_bitmap_that_leads_past_the_end_of_addresses(self) -> None:
        from coreheap.corefile.relocations import _places_of_relr

        packed = np.array([(1 << 64) - 16, (1 << 64) - 1, (1 << 64) - 1], np.uint64)
        assert len(_places_of_relr(packed, 8)) == 1 + 2 * 63
