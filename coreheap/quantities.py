"""Addresses, byte counts and shares, and the only place that turns them into text and back.

Knows: units and notations. Does not know: what an address belongs to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NewType

Address = NewType("Address", int)
"""A virtual address of the dumped process."""

ByteCount = NewType("ByteCount", int)
"""A number of bytes."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_BINARY_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_FACTORS = {
    "": 1,
    "b": 1,
    **{
        f"{letter}{suffix}": 1 << (10 * power)
        for power, letter in enumerate("kmgtpe", start=1)
        for suffix in ("", "b", "ib")
    },
}
_SIZE = re.compile(r"\s*(0x[0-9a-fA-F]{1,40}|[0-9]{1,40}(?:\.[0-9]{1,40})?)\s*([A-Za-z]*)\s*\Z")


@dataclass(frozen=True, slots=True, order=True)
class AddressRange:
    """The half-open range of addresses [start, end)."""

    start: int
    end: int

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise ValueError(f"range ends before it starts: {self}")

    @property
    def byte_count(self) -> int:
        return self.end - self.start

    def __contains__(self, address: int) -> bool:
        return self.start <= address < self.end

    def overlaps(self, other: AddressRange) -> bool:
        return self.start < other.end and other.start < self.end

    def __str__(self) -> str:
        return f"{format_address(self.start)}-{format_address(self.end)}"


def format_address(address: int) -> str:
    """Lower-case hexadecimal with 0x, as in every report: ``0x7f3a10000020``."""
    return f"{address:#x}"


def format_bytes(byte_count: int) -> str:
    """A byte count for people, three significant digits and a binary unit: ``1.46 GiB``."""
    magnitude = abs(byte_count)
    if magnitude < KIB:
        return f"{byte_count} B"
    value = float(byte_count)
    for unit in _BINARY_UNITS:
        value /= 1024.0
        # Compare what would be printed: 1023.9996 KiB must not come out as "1024 KiB".
        if abs(value) < 999.5 or unit == _BINARY_UNITS[-1]:
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_bounds(low: int, high: int) -> str:
    """Bytes that are known exactly, or by their bounds where these do not read the same: ``1.00 MiB to 2.00 MiB``."""
    least, most = format_bytes(low), format_bytes(high)
    if least == most:
        return least
    return f"{least} to {most}" if low else f"at most {most}"


def format_count(count: int) -> str:
    """A count for people, with thousands separated by commas."""
    return f"{count:,}"


def format_share(part: int, whole: int) -> str:
    """``part`` of ``whole`` in per cent; an en dash where there is no whole."""
    if whole <= 0:
        return "–"
    share = 100.0 * part / whole
    if 0 < share < 0.1:
        return "<0.1 %"
    if 99.9 < share < 100:
        return ">99.9 %"
    return f"{share:.1f} %"


def parse_address(text: str) -> int:
    """An address as people paste it: hex with or without 0x, upper or lower case.

    Raises ValueError with a message for people.
    """
    digits = text.strip().lower().removeprefix("0x").replace("_", "").replace("`", "")
    if not re.fullmatch(r"[0-9a-f]{1,16}", digits):
        raise ValueError(f"{text!r} is not an address; write it in hex, such as 0x7f3a10000020")
    return int(digits, 16)


def parse_bytes(text: str) -> int:
    """A byte count with an optional unit: ``4096``, ``64k``, ``1.5 MiB``, ``0x1000``.

    Units are binary: k, KB and KiB all mean 1024 bytes. Raises ValueError with a message for people.
    """
    match = _SIZE.match(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a unit, such as 4096, 64K, 1.5MiB")
    number = match.group(1)
    if number.startswith("0x"):
        return int(number, 16) * factor
    return int(float(number) * factor) if "." in number else int(number) * factor
