"""What may be the process's own data is left out; what is malloc's stays."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coreheap.damage import Repair
from coreheap.evidence import Anomaly
from coreheap.render.discretion import LEFT_OUT, discreet_word, may_be_content, place_of, without_content
from coreheap.render.json_document import check_json_text, json_text
from coreheap.render.page import PageStyle
from coreheap.render.terminal_check import check_text
from coreheap.render.wording import anomaly_sentence
from tests.unit import report_samples


@pytest.mark.parametrize(
    "text", [b"hunter2!", b"pass", b"secret\0\0", b"AAAAAAAA", b"user:pwd", b"\x01\x02\x03\x04\x05\x06\x07\x08"]
)
def test_text_and_what_is_no_address_is_left_out(text: bytes) -> None:
    word = int.from_bytes(text.ljust(8, b"\0"), "little")
    assert may_be_content(word)
    assert discreet_word(word) is None
    assert without_content(f"found size word {word:#x}") == f"found size word {LEFT_OUT}"
    if word >> 48:
        assert without_content(f"found size word {word}") == f"found size word {LEFT_OUT}"


@pytest.mark.parametrize(
    "word", [0, 1, 0x21, 0x20D51, 0x401002, 0x7F3A14000030, 0x5599E00012A0, 0xFFFFA0000010, 1 << 32]
)
def test_sizes_and_addresses_stay(word: int) -> None:
    assert discreet_word(word) == word
    assert without_content(f"leads to {word:#x}, {word:,} bytes") == f"leads to {word:#x}, {word:,} bytes"


def test_unknown_stays_unknown() -> None:
    assert discreet_word(None) is None


def test_parts_of_words_are_no_numbers() -> None:
    assert without_content("libfoo-0x4141414141414141x.so at x12345678901234567890") == (
        "libfoo-0x4141414141414141x.so at x12345678901234567890"
    )


def test_a_pointer_that_is_no_address_is_told_by_the_word_that_holds_it() -> None:
    pointer = int.from_bytes(b"\xec\xe4secret", "little")
    anomaly = Anomaly("list_misaligned", pointer, "an aligned pointer", "a misaligned one", word_address=0x5599E00012A0)
    assert place_of(anomaly) == 0x5599E00012A0
    assert place_of(replace(anomaly, address=0x5599E00012B8)) == 0x5599E00012B8
    assert f"{pointer:x}" not in anomaly_sentence(anomaly)


def test_a_right_value_that_was_told_from_content_is_left_out_too() -> None:
    secret = report_samples.SECRET
    anomaly = Anomaly("prev_size_mismatch", 0x1000, f"prev_size {secret:#x}", "another", expected_word=secret)
    assert f"{secret:x}" not in anomaly_sentence(anomaly)
    damage = report_samples.overflow(repair=Repair(0x1000, 0x21, secret))
    report = report_samples.report(anomalies=(anomaly,), damages=(damage,))
    for text in (json_text(report), check_json_text(report), check_text(report, PageStyle(verbose=True))):
        assert f"{secret:x}" not in text
