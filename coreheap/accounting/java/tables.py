"""HotSpot's own description of its structures: the tables that it exports for the serviceability agent.

Knows: gHotSpotVMStructs and gHotSpotVMTypes, whose rows give the offset of a field or the place of a static one by name
(src/hotspot/share/runtime/vmStructs.hpp says what a row means, and exports the row's own layout beside it). Does not know:
what any field is for.

The tables lie in libjvm's writable data, so every core has them; their names and the symbols that lead there are in its file.
Without a file of the same build-id there are no tables. Fields come and go between releases: each is asked for by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from coreheap.corefile import AddressSpace, Core, Module
from coreheap.errors import MemoryFault

ROW_LIMIT: Final = 1 << 14
"""Rows of a table; JDK 8 to 24 have 700 to 3,000."""
ROW_BYTES_LIMIT: Final = 1 << 10
NAME_LIMIT: Final = 256
FLAG_LIMIT: Final = 1 << 13


@dataclass(frozen=True, slots=True)
class Field:
    """Where a field is: at ``offset`` of its structure, or ``address`` of the process for a static one (else 0)."""

    offset: int
    address: int


class VmTables:
    """The rows of the tables, by name."""

    def __init__(self, memory: AddressSpace, fields: Mapping[tuple[str, str], Field], sizes: Mapping[str, int]) -> None:
        self._memory = memory
        self._fields = fields
        self._sizes = sizes

    def __len__(self) -> int:
        return len(self._fields)

    def offset(self, *names: tuple[str, str]) -> int | None:
        """The offset of the first of these fields, (structure, field), that this JVM has; None when it has none."""
        for name in names:
            field = self._fields.get(name)
            if field is not None and not field.address:
                return field.offset
        return None

    def size(self, structure: str) -> int | None:
        """sizeof a structure; None where the JVM does not tell."""
        return self._sizes.get(structure)

    def static_word(self, *names: tuple[str, str]) -> int | None:
        """The value of the first of these static fields that this JVM has; None when it has none, or its memory is missing."""
        for name in names:
            field = self._fields.get(name)
            if field is not None and field.address:
                return self.word(field.address)
        return None

    def static_word_of(self, fragment: str) -> int | None:
        """The value of the static field whose name has this part, such as the class of a number that differs by release."""
        for (_, name), field in self._fields.items():
            if fragment in name and field.address:
                return self.word(field.address)
        return None

    def member(self, structure: int | None, *names: tuple[str, str]) -> int | None:
        """The word of a field of the structure at an address; None without one."""
        place = self.place(structure, *names)
        return None if place is None else self.word(place)

    def place(self, structure: int | None, *names: tuple[str, str]) -> int | None:
        """The address of a field of the structure at an address."""
        offset = self.offset(*names)
        return None if not structure or offset is None else structure + offset

    def word(self, address: int | None) -> int | None:
        """The word at an address; None where it was not saved."""
        if not address:
            return None
        try:
            return self._memory.read_word(address)
        except MemoryFault:
            return None

    def flags(self, *names: str) -> dict[str, int]:
        """The values of options of the JVM's (-XX:NAME) as words; those that it does not have are missing.

        An option narrower than a word has its neighbours in the upper bytes: the caller masks.
        """
        wanted, found = set(names), {}
        for kind in ("JVMFlag", "Flag"):
            first = self.static_word((kind, "flags"))
            count = self.static_word((kind, "numFlags"))
            row_bytes = self.size(kind)
            name_at, place_at = self.offset((kind, "_name")), self.offset((kind, "_addr"))
            if not first or not count or not row_bytes or name_at is None or place_at is None:
                continue
            for row in range(first, first + min(count, FLAG_LIMIT) * row_bytes, row_bytes):
                name = _text(self._memory, self.word(row + name_at))
                value = self.word(self.word(row + place_at)) if name in wanted else None
                if value is not None:
                    found[name] = value
        return found


def vm_tables(core: Core, libjvm: Module) -> VmTables | None:
    """The tables of a libjvm; None where its file is not at hand or its data is not in the core."""
    memory = core.memory
    fields: dict[tuple[str, str], Field] = {}
    for row in _rows(core, libjvm, "gHotSpotVMStructs", "gHotSpotVMStructEntry", "TypeName"):
        structure, field = _text(memory, row.get("TypeName")), _text(memory, row.get("FieldName"))
        offset, address = row.get("Offset"), row.get("Address")
        if structure and field and offset is not None and address is not None:
            is_static = (row.get("IsStatic") or 0) & 0xFFFFFFFF
            fields.setdefault((structure, field), Field(0 if is_static else offset, address if is_static else 0))
    sizes: dict[str, int] = {}
    for row in _rows(core, libjvm, "gHotSpotVMTypes", "gHotSpotVMTypeEntry", "TypeName"):
        name, size = _text(memory, row.get("TypeName")), row.get("Size")
        if name and size:
            sizes[name] = size
    return VmTables(memory, fields, sizes) if fields else None


def _rows(core: Core, libjvm: Module, table: str, prefix: str, key: str) -> Iterator[dict[str, int]]:
    """The rows of a table, each as words by the name of their column, up to the row whose ``key`` is 0."""

    def exported(name: str) -> int | None:
        address = libjvm.symbol_address(name)
        try:
            return None if address is None else core.memory.read_word(address)
        except MemoryFault:
            return None

    columns = {
        column: at
        for column in ("TypeName", "FieldName", "IsStatic", "Offset", "Address", "Size")
        if (at := exported(f"{prefix}{column}Offset")) is not None and at < ROW_BYTES_LIMIT
    }
    start, stride = exported(table), exported(f"{prefix}ArrayStride")
    if not start or not stride or stride > ROW_BYTES_LIMIT or key not in columns:
        return
    for number in range(ROW_LIMIT):
        try:
            row = {column: core.memory.read_word(start + number * stride + at) for column, at in columns.items()}
        except MemoryFault:
            return
        if not row[key]:
            return
        yield row


def _text(memory: AddressSpace, address: int | None) -> str:
    if not address:
        return ""
    try:
        return memory.read_text(address, NAME_LIMIT).decode("utf-8", "replace")
    except MemoryFault:
        return ""
