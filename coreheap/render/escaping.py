"""Text that came out of a core, made safe to show.

Knows: which characters a terminal, a log or a JSON reader would obey instead of show.
Does not know: where a text came from; everything that is shown passes through here.
"""

from __future__ import annotations

import unicodedata

_SHOWN_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

# Control characters, format characters (bidirectional overrides, zero-width joiners), surrogates, private use,
# unassigned, line and paragraph separators, and spaces that are not the space: each can make a line lie.
_UNSHOWN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def printable(text: str) -> str:
    """``text`` on one line, with everything that is not plainly visible written as a backslash escape.

    Escape sequences, newlines and bidirectional overrides come out as text; ordinary letters of any script stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def shortened(text: str, limit: int) -> str:
    """``printable(text)`` in at most about ``limit`` characters; what was left out is counted, never silent."""
    shown = printable(text)
    if len(shown) <= limit:
        return shown
    return f"{shown[:limit]}… (+{len(shown) - limit} characters)"


def without_surrogates(text: str) -> str:
    """``text`` with lone surrogates (undecodable bytes of the core) written as escapes.

    JSON readers reject lone surrogates; everything else JSON escapes by itself.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _shown(character: str) -> str:
    if character == " ":
        return character
    if character in _SHOWN_ESCAPES:
        return _SHOWN_ESCAPES[character]
    category = unicodedata.category(character)
    if category in _UNSHOWN_CATEGORIES or category == "Zs":
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character
