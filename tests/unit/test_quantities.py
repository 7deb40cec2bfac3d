"""Addresses, byte counts and shares as text and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.quantities import (
    GIB,
    KIB,
    MIB,
    AddressRange,
    format_address,
    format_bounds,
    format_bytes,
    format_count,
    format_share,
    parse_address,
    parse_bytes,
)

TIB, PIB, EIB = GIB << 10, GIB << 20, GIB << 30
words = st.integers(0, (1 << 64) - 1)


# Ranges


def test_range_is_half_open() -> None:
    found = AddressRange(0x1000, 0x2000)
    assert found.byte_count == 0x1000
    assert 0x1000 in found
    assert 0x1FFF in found
    assert 0x2000 not in found
    assert 0xFFF not in found
    assert str(found) == "0x1000-0x2000"
    assert 5 not in AddressRange(5, 5)


def test_range_that_ends_before_it_starts_is_refused() -> None:
    with pytest.raises(ValueError, match="0x2000-0x1fff"):
        AddressRange(0x2000, 0x1FFF)


@given(st.tuples(words, words, words, words))
def test_ranges_overlap_when_they_share_an_address(edges: tuple[int, int, int, int]) -> None:
    one, other = AddressRange(*sorted(edges[:2])), AddressRange(*sorted(edges[2:]))
    assert one.overlaps(other) == other.overlaps(one)
    if one.byte_count and other.byte_count:
        assert one.overlaps(other) == (max(one.start, other.start) in one and max(one.start, other.start) in other)
    touching = AddressRange(one.end, one.end + 1)
    assert not one.overlaps(touching)


# Addresses


@given(words)
def test_address_round_trip(address: int) -> None:
    text = format_address(address)
    assert parse_address(text) == address
    assert parse_address(text.upper()) == address
    assert parse_address(f"  {address:x}\n") == address
    assert parse_address(f"{address:016x}") == address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0", 0),
        ("7f3a`10000020", 0x7F3A10000020),
        ("0x7f3a_1000_0020", 0x7F3A10000020),
        ("0XFFFFFFFFFFFFFFFF", (1 << 64) - 1),
        ("10", 16),
    ],
)
def test_addresses_as_people_paste_them(text: str, address: int) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", " ", "0x", "main", "0x1g", "-1", "+1", "1 2", "0x0x1", "1" * 17, "0.5", "１２", "0x1\n2", "\x1b[1m"]
)
def test_what_is_no_address_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="is not an address; write it in hex"):
        parse_address(text)


# Byte counts


@pytest.mark.parametrize(
    ("byte_count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (-1023, "-1023 B"),
        (KIB, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (-1536, "-1.50 KiB"),
        (10 * KIB, "10.0 KiB"),
        (100 * KIB, "100 KiB"),
        (999 * KIB, "999 KiB"),
        (1000 * KIB, "0.98 MiB"),
        (MIB - 1, "1.00 MiB"),
        (MIB, "1.00 MiB"),
        (64 * MIB, "64.0 MiB"),
        (GIB - 1, "1.00 GiB"),
        (1568 * MIB, "1.53 GiB"),
        (TIB, "1.00 TiB"),
        (PIB, "1.00 PiB"),
        (EIB, "1.00 EiB"),
        ((1 << 64) - 1, "16.0 EiB"),
        (1 << 80, "1048576 EiB"),
    ],
)
def test_bytes_for_people(byte_count: int, text: str) -> None:
    assert format_bytes(byte_count) == text


@given(st.integers(-(1 << 64), 1 << 64))
def test_bytes_for_people_are_near_and_short(byte_count: int) -> None:
    text = format_bytes(byte_count)
    number, unit = text.split(" ")
    assert len(number.lstrip("-").replace(".", "")) <= 4
    back = parse_bytes(text.lstrip("-"))
    assert abs(back - abs(byte_count)) <= max(abs(byte_count) * 0.006, 0)
    assert (unit == "B") == (abs(byte_count) < KIB)


@given(st.integers(0, 1 << 70))
def test_byte_counts_without_unit_are_exact(byte_count: int) -> None:
    assert parse_bytes(str(byte_count)) == byte_count
    assert parse_bytes(f"{byte_count:#x}") == byte_count
    assert parse_bytes(f" {byte_count} KiB ") == byte_count * KIB


@pytest.mark.parametrize(
    ("text", "byte_count"),
    [
        ("64k", 64 * KIB),
        ("64K", 64 * KIB),
        ("64kb", 64 * KIB),
        ("64KiB", 64 * KIB),
        ("1.5 MiB", 1536 * KIB),
        ("0.5g", GIB // 2),
        ("2t", 2 * TIB),
        ("1p", PIB),
        ("1EiB", EIB),
        ("12b", 12),
        ("0x1000", 4096),
        ("0x10 MiB", 16 * MIB),
        ("0x1b", 27),
        ("007", 7),
        ("9" * 40, 10**40 - 1),
        ("0x" + "f" * 40, (1 << 160) - 1),
    ],
)
def test_sizes_with_units(text: str, byte_count: int) -> None:
    assert parse_bytes(text) == byte_count


@pytest.mark.parametrize(
    "text",
    [
        *("", "k", "-1", "+1", "1.", ".5", "1e3", "1 k b", "64kk", "1iB", "0x", "0xg", "1,024", "１k", "1.5.5", "nan"),
        *("9" * 41, "9" * 400 + ".5", "9" * 5000, "0." + "9" * 41, "0x" + "f" * 41),
    ],
)
def test_what_is_no_size_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size; write bytes or a unit"):
        parse_bytes(text)


# Counts and shares


def test_counts_for_people() -> None:
    assert [format_count(count) for count in (0, 999, 1000, 12_345_678, -1000)] == [
        "0", "999", "1,000", "12,345,678", "-1,000",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "–"),
        (5, 0, "–"),
        (0, 10, "0.0 %"),
        (1, 3, "33.3 %"),
        (1, 1000, "0.1 %"),
        (1, 1001, "<0.1 %"),
        (1, 1 << 60, "<0.1 %"),
        (999, 1000, "99.9 %"),
        (9991, 10000, ">99.9 %"),
        ((1 << 40) - 1, 1 << 40, ">99.9 %"),
        (10, 10, "100.0 %"),
        (15, 10, "150.0 %"),
    ],
)
def test_shares_for_people(part: int, whole: int, text: str) -> None:
    assert format_share(part, whole) == text


@given(st.integers(0, 1 << 64), st.integers(1, 1 << 64))
def test_share_is_0_or_100_only_when_it_is(part: int, whole: int) -> None:
    part = min(part, whole)
    text = format_share(part, whole)
    assert (text == "0.0 %") == (part == 0)
    if text == "100.0 %":
        assert part / whole == 1.0  # as far as a float tells


def test_bounds_that_read_the_same_are_one_number() -> None:
    assert format_bounds(5 * MIB, 5 * MIB + 1) == "5.00 MiB"
    assert format_bounds(0, 5 * MIB) == "at most 5.00 MiB"
    assert format_bounds(MIB, 2 * MIB) == "1.00 MiB to 2.00 MiB"
