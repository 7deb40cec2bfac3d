"""Text from a core: nothing in it is obeyed, everything in it is seen."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coreheap.render.escaping import printable, shortened, without_surrogates


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/usr/lib/libc.so.6", "/usr/lib/libc.so.6"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("one\ntwo\r\tthree", "one\\ntwo\\r\\tthree"),
        ("nul\x00del\x7fcsi\x9b", "nul\\x00del\\x7fcsi\\x9b"),
        ("abc\u202edef\u202c", "abc\\u202edef\\u202c"),
        ("zero\u200bwidth\ufeff", "zero\\u200bwidth\\ufeff"),
        ("line\u2028paragraph\u2029", "line\\u2028paragraph\\u2029"),
        ("no-break\u00a0space", "no-break\\xa0space"),
        ("undecodable\udc80", "undecodable\\udc80"),
        ("private\ue000 tag\U000e0041", "private\\ue000 tag\\U000e0041"),
        ("Grüße, 日本語", "Grüße, 日本語"),
        ("[bold]markup[/bold]", "[bold]markup[/bold]"),
    ],
)
def test_what_is_not_plainly_visible_is_written_as_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_printable_text_is_one_line_without_controls(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(unicodedata.category(character) in {"Cc", "Cf", "Cs"} for character in shown)
    assert printable(shown) == shown


def test_shortened_text_says_how_much_is_missing() -> None:
    assert shortened("x" * 20, 20) == "x" * 20
    assert shortened("x" * 25, 20) == "x" * 20 + "… (+5 characters)"
    assert shortened("\n" * 20, 20) == "\\n" * 10 + "… (+20 characters)"


@given(st.text(st.characters(exclude_categories=())))
def test_strict_readers_accept_every_json_text(text: str) -> None:
    written = json.dumps(without_surrogates(text))
    assert "\\ud" not in written.lower() or json.loads(written).encode("utf-8")
