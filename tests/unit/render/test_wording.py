"""Sentences: one for every code that the checks know, and a plain one for those that are new."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from coreheap.crash import WrongFreeKind
from coreheap.damage import DamagedPlace
from coreheap.evidence import Confidence
from coreheap.quantities import GIB, MIB
from coreheap.render.wording import PLACES, finding_sentence, quantity_text, verdict_text, verdict_whole
from coreheap.report import Finding, Quantity, Unit, VerdictItem
from tests.unit.report_samples import corruption_finding, finding


def said(code: str, *quantities: Quantity) -> str:
    return finding_sentence(dataclasses.replace(finding(code), quantities=quantities))


def test_known_codes_have_sentences_of_their_own() -> None:
    message = Quantity("message", "free(): invalid pointer\x1b[2J", Unit.TEXT)
    assert said("ALLOCATOR-ABORT", message) == "glibc itself stopped the process: free(): invalid pointer\\x1b[2J"
    assert "323 MiB (80.3 %)" in finding_sentence(finding("RETAINED-FREE"))
    assert finding_sentence(finding("ARENA-BLOAT")).startswith("12 arenas beside the main one reserve 768 MiB")


@pytest.mark.parametrize("code", ["NEVER-HEARD-OF", "ALLOCATOR-ABORT", "PARTIAL-CORE"])
def test_unknown_codes_and_quantities_get_a_plain_sentence(code: str) -> None:
    nameless: Finding = finding(code)
    assert finding_sentence(nameless) == "Look at: 12 non-main arenas."


@pytest.mark.parametrize(
    ("quantity", "text"),
    [
        (Quantity("x", None, Unit.BYTES), "unknown"),
        (Quantity("x", 1536, Unit.BYTES), "1.50 KiB"),
        (Quantity("x", 1234567, Unit.COUNT), "1,234,567"),
        (Quantity("x", 0.5, Unit.SHARE), "50.0 %"),
        (Quantity("x", 1, Unit.SHARE), "100.0 %"),
        (Quantity("x", 1 - 1e-16, Unit.SHARE), ">99.9 %"),
        (Quantity("x", 1e-300, Unit.SHARE), "<0.1 %"),
        (Quantity("x", 0.0, Unit.SHARE), "0.0 %"),
        (Quantity("x", float("inf"), Unit.SHARE), "unknown"),
        (Quantity("x", 0x7F00, Unit.ADDRESS), "0x7f00"),
        (Quantity("x", 2.5, Unit.COUNT), "2.5"),
        (Quantity("x", "a\nb", Unit.TEXT), "a\\nb"),
    ],
)
def test_quantities_carry_their_unit(quantity: Quantity, text: str) -> None:
    assert quantity_text(quantity) == text


def test_verdicts_name_part_and_whole() -> None:
    item = VerdictItem("retained_free", 512 * MIB, GIB, "malloc", Confidence.CERTAIN)
    assert verdict_whole(item) == "Of 1.00 GiB of memory that malloc holds:"
    assert verdict_text(item) == "free inside malloc: freed, kept by malloc"
    unknown = VerdictItem("page_cache", 1, 0, "whole {0} %s", Confidence.WEAK)
    assert verdict_whole(unknown) == "Of 0 B of whole {0} %s:"
    assert verdict_text(unknown) == "page cache"


CODES = [
    "CORRUPTION-OVERFLOW",
    "CORRUPTION-HEADER",
    "CORRUPTION-FREE-LIST",
    "CORRUPTION-ALLOCATOR-DATA",
    "CORRUPTION-MMAPPED",
    "CORRUPTION-INVALID-FREE",
    "DOUBLE-FREE",
    "USE-AFTER-FREE",
    "ALLOCATOR-LOCKED",
]


@pytest.mark.parametrize("code", CODES)
def test_a_damage_is_told_from_whatever_is_known_of_it(code: str) -> None:
    """Every quantity of a damage may be missing or unknown; the sentence stays one."""
    whole = corruption_finding(code=code)
    unknown = dataclasses.replace(
        whole, quantities=tuple(dataclasses.replace(quantity, value=None) for quantity in whole.quantities)
    )
    for case in (whole, unknown, dataclasses.replace(whole, quantities=())):
        sentence = finding_sentence(case)
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert "unknown" not in sentence
        assert "  " not in sentence
        assert "_" not in sentence
    assert finding_sentence(whole) != "Serious: a chunk of arena 1."


@pytest.mark.parametrize("kind", WrongFreeKind)
def test_a_wrong_free_is_told_from_whatever_is_known_of_it(kind: WrongFreeKind) -> None:
    code = (
        "DOUBLE-FREE" if kind in (WrongFreeKind.FREED_TWICE, WrongFreeKind.UNKNOWN_BLOCK) else "CORRUPTION-INVALID-FREE"
    )
    known = (
        Quantity("place", "call", Unit.TEXT),
        Quantity("kind", kind.value, Unit.TEXT),
        Quantity("function", "free", Unit.TEXT),
        Quantity("offset_bytes", 24, Unit.BYTES),
    )
    more = (
        Quantity("address", 0x7F3A14002028, Unit.ADDRESS),
        Quantity("victim_address", 0x7F3A14002010, Unit.ADDRESS),
        Quantity("victim_usable_bytes", 104, Unit.BYTES),
        Quantity("what", "libfoo.so+0x4220", Unit.TEXT),
        Quantity("listed_in", "tcache", Unit.TEXT),
        Quantity("caller", "session_close", Unit.TEXT),
        Quantity("message", "free(): invalid pointer", Unit.TEXT),
    )
    for quantities in (known, known + more):
        sentence = said(code, *quantities)
        assert sentence.startswith("free was ")
        assert sentence.endswith(".")
        assert "unknown" not in sentence
        assert "damaged" not in sentence
    assert "called from session_close" in sentence


def test_a_place_that_is_new_is_named_plainly() -> None:
    place = Quantity("place", "bin_map", Unit.TEXT)
    assert said("CORRUPTION-ALLOCATOR-DATA", place) == "Bin map holds what malloc never writes there."


def test_every_place_of_a_damage_has_words() -> None:
    assert set(PLACES) == {place.value for place in DamagedPlace}


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_its_page(code: str) -> None:
    page = Path(__file__).parents[3] / "docs" / "findings" / f"{code}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {code}\n")
    for section in ("## What it means", "## What would refute it", "## What to do"):
        assert section in text
