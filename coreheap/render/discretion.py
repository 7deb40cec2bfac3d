"""What a process wrote is its own: words that may be text or other content are left out of what is shown.

Knows: which numbers malloc has no use for: more than an address, or bytes that are all printable. Does not know: where a number came
from. Addresses, sizes and flags of malloc's own stay. A word of text that looks like an address of few bytes cannot be told from one.
"""

from __future__ import annotations

import re

from coreheap.evidence import Anomaly

ADDRESS_BITS = 48
"""User addresses of x86-64 and aarch64 have no more; a size or a count in malloc's data has no reason to."""
SHORTEST_TEXT = 4
"""Printable bytes that are taken for text: fewer are as likely a size."""
LEFT_OUT = "(not shown: it may be the process's own data)"

_NUMBER = re.compile(r"\b(?:0x[0-9a-f]+|[0-9]{10,})\b")


def may_be_content(word: int) -> bool:
    """Whether a word that was found in malloc's data is no address, size or flag, and so may be what the process wrote."""
    if word < 0 or word >> ADDRESS_BITS:
        return True
    letters = word.to_bytes(8, "little").rstrip(b"\0")
    return len(letters) >= SHORTEST_TEXT and all(0x20 <= letter < 0x7F for letter in letters)


def discreet_word(word: int | None) -> int | None:
    """The word, or None where it may be content."""
    return None if word is None or may_be_content(word) else word


def discreet_address(address: int) -> int | None:
    """The address, or None where the number is none on any machine: what a program took for a pointer, and wrote."""
    return None if address < 0 or address >> ADDRESS_BITS else address


def place_of(anomaly: Anomaly) -> int:
    """Where a contradiction is; for one at the end of a pointer that is no address, the word that holds the pointer."""
    is_address = anomaly.address >> ADDRESS_BITS == 0
    return anomaly.address if is_address or anomaly.word_address is None else anomaly.word_address


def without_content(text: str) -> str:
    """A statement with the numbers left out that may be content."""
    return _NUMBER.sub(_discreet, text)


def _discreet(match: re.Match[str]) -> str:
    number = match.group()
    word = int(number, 0) if number.startswith("0x") else int(number) >> ADDRESS_BITS << ADDRESS_BITS
    return LEFT_OUT if may_be_content(word) else number
