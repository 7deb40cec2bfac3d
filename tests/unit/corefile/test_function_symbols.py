"""Functions by address, against pyelftools on this interpreter's own libraries, and of tables that lie."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from coreheap.corefile.function_symbols import FunctionTable, tables_of
from coreheap.corefile.operands import x86_64_operands
from tests.core_builder import elf_image


def libc() -> Path:
    for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines():
        path = line.split()[-1]
        if "/libc.so" in path or "/libc-2" in path:
            return Path(path)
    pytest.skip("this interpreter has no libc of its own")


def test_every_exported_function_is_found_at_its_start_and_inside() -> None:
    path = libc()
    (table, *_) = reversed(tables_of(np.fromfile(path, np.uint8)))
    with path.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".dynsym")
        rows = [
            (symbol.name, symbol["st_value"], symbol["st_size"])
            for symbol in section.iter_symbols()
            if symbol["st_info"]["type"] in ("STT_FUNC", "STT_LOOS") and symbol["st_shndx"] != "SHN_UNDEF"
        ]
    names: dict[int, set[str]] = {}
    for name, value, _ in rows:
        names.setdefault(value, set()).add(name)
    assert len(rows) > 1000
    for _, value, size in rows:
        for inside in (0, size - 1):
            if size == 0:
                continue
            found = table.at(value + inside)
            assert found is not None
            # Functions may lie in one another (aliases of their ends): then the inner one counts.
            assert found[1] in names
            assert found[0] in names[found[1]]
            assert value <= found[1] <= value + inside


def test_the_plainest_of_several_names_counts() -> None:
    image = elf_image(symbols={"__libc_free": 0x900, "free": 0x900, "cfree": 0x900, "other": 0x940})
    (table,) = tables_of(np.frombuffer(image, np.uint8))
    assert table.at(0x90F) == ("free", 0x900)
    assert table.at(0x910) is None
    assert table.at(0x940) == ("other", 0x940)
    assert table.at(0x8FF) is None


@pytest.mark.parametrize("value", [-1, 1 << 64, 0, (1 << 64) - 1])
def test_no_address_is_too_large(value: int) -> None:
    row = struct.pack("<IBBHQQ", 1, 0x12, 0, 1, (1 << 64) - 8, 1 << 63)
    table = FunctionTable(np.frombuffer(row, np.uint8), np.frombuffer(b"\0f\0", np.uint8), 8)
    found = table.at(value)
    assert found == (("f", (1 << 64) - 8) if value == (1 << 64) - 1 else None)


def test_damaged_tables_end_in_nothing() -> None:
    image = elf_image(symbols={"first": 0x900, "second": 0x920})
    numbers = random.Random(7)
    for _ in range(2000):
        changed = bytearray(image)
        for _ in range(numbers.choice((1, 3, 9))):
            place = numbers.choice((numbers.randrange(64), numbers.randrange(0x2000, len(changed))))
            changed[place] = numbers.choice((0, 0xFF, numbers.randrange(256)))
        for table in tables_of(np.frombuffer(bytes(changed), np.uint8)):
            table.at(0x908)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("488b00", [(0x1000, ("rax",))]),  # mov rax, [rax]
        ("488b44cb08", [(0x2008 + 8 * 3, ("rbx", "rcx"))]),  # mov rax, [rbx + rcx * 8 + 8]
        ("ffd0", [(0x1000, ("rax",)), (0x7000, ("rsp",))]),  # call rax
        ("64488b0425100000000000", []),  # mov rax, fs:[0x10]
        ("488b0510000000", []),  # mov rax, [rip + 16]
        ("f3aa", [(0x3000, ("rdi",))]),  # rep stosb
    ],
)
def test_operands_of_one_instruction(code: str, expected: list[tuple[int, tuple[str, ...]]]) -> None:
    registers = {"rax": 0x1000, "rbx": 0x2000, "rcx": 3, "rdi": 0x3000, "rsp": 0x7000}
    operands = x86_64_operands(bytes.fromhex(code), 0x400000, registers)
    assert operands is not None
    assert [(operand.address, operand.registers) for operand in operands] == expected


def test_bytes_that_are_no_instruction() -> None:
    assert x86_64_operands(b"\x06\x06", 0x400000, {"rsp": 0}) is None
