"""How single values are written in JSON: addresses as hex strings, unknown as null, text without lone surrogates."""

from __future__ import annotations

import math
from collections.abc import Iterable

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
