"""How single values are written in JSON: addresses as hex strings, unknown as null, text without lone surrogates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from json.encoder import encode_basestring_ascii

from coreheap.evidence import Evidence
from coreheap.quantities import format_address
from coreheap.render.discretion import without_content
from coreheap.render.escaping import without_surrogates

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def address_value(address: int | None) -> str | None:
    """An address; null where it is unknown."""
    return None if address is None else format_address(address)


def text_value(text: str) -> str:
    """Text that every JSON reader takes."""
    return without_surrogates(text)


def text_or_null(text: str | None) -> str | None:
    """Text that every JSON reader takes; null where there is none."""
    return None if text is None else text_value(text)


def number_value(value: int | float | None) -> int | float | None:
    """A number JSON can say; what is not finite is unknown."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def evidence_value(evidence: Iterable[Evidence], *, discreet: bool = False) -> Json:
    """Pieces of evidence, in their order; ``discreet`` leaves out numbers that may be the process's own data."""
    return [
        {
            "statement": text_value(without_content(fact.statement) if discreet else fact.statement),
            "source": text_value(fact.source),
            "strength": fact.strength.name.lower(),
            "address": address_value(fact.address),
            "speaks_against": fact.speaks_against,
        }
        for fact in evidence
    ]


def indented_text(document: Json) -> str:
    """The text that ``json.dumps(document, indent=2, allow_nan=False)`` gives.

    json's encoder in C knows no indentation, and the one in Python hands each value through a generator for each level
    above it: a tenth of all time for a report of many threads.
    """
    encode = json.JSONEncoder(allow_nan=False).encode
    names: dict[str, str] = {}

    def written(value: Json, margin: str) -> str:
        kind = type(value)
        if isinstance(value, str):
            return encode_basestring_ascii(value)
        if kind is int:
            return repr(value)
        if value is None:
            return "null"
        if kind is bool:
            return "true" if value else "false"
        inside = margin + "  "
        if isinstance(value, dict) and value:
            parts = []
            for key, part in value.items():
                if key not in names:
                    names[key] = encode_basestring_ascii(key) + ": "
                # Most values are plain numbers: they are spared the call.
                parts.append(names[key] + (repr(part) if type(part) is int else written(part, inside)))
            return f"{{{inside}{f',{inside}'.join(parts)}{margin}}}"
        if isinstance(value, list) and value:
            return f"[{inside}{f',{inside}'.join([written(part, inside) for part in value])}{margin}]"
        return encode(value)

    return written(document, "\n")
