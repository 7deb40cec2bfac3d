"""The facts file: what compilers and Debian's debug information say of glibc's malloc, by release and machine.

``fixtures/facts/glibc-malloc-layouts.json.xz``. Knows how it is arranged; knows nothing of coreheap.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FACTS = Path(__file__).parents[1] / "fixtures" / "facts" / "glibc-malloc-layouts.json.xz"
SUFFIX_OF_VARIANT = {"default": "", "no-PER_THREAD": "-stock", "release-branch": "-branch"}
MACHINES = ("amd64", "arm64", "i386", "x32", "ilp32-align8")
"""As the facts name them. The last two are kinds of 32-bit ports; coreheap opens cores of the first three."""
STRUCTURES = ("malloc_state", "malloc_par", "heap_info", "tcache_perthread_struct", "tcache_entry", "malloc_chunk")
UNTUNED = ("2.35", "2.36", "2.37")
"""Releases that could be built with --disable-tunables and then have the malloc_par of 2.34 (fact sheet, section 2)."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of one release (``2.27-branch``, ``2.12-stock``, ``2.36-no-tunables``) on one machine."""

    release: str
    machine: str
    structs: Mapping[str, Any]
    constants: Mapping[str, Any]
    source: str

    @property
    def word_class(self) -> str:
        """``64``, ``32a8`` or ``32a16``: SIZE_SZ and MALLOC_ALIGNMENT."""
        return "64" if self.constants["SIZE_SZ"] == 8 else f"32a{self.constants['MALLOC_ALIGNMENT']}"

    def offsets(self, structure: str) -> dict[str, int]:
        """Offset of each field of a structure, padding left out."""
        return {name: row["offset"] for name, row in self.structs[structure]["fields"].items() if name != "pad"}


@cache
def document() -> dict[str, Any]:
    """The whole file."""
    facts: dict[str, Any] = json.loads(lzma.decompress(FACTS.read_bytes()))
    return facts


def entries() -> Iterator[Entry]:
    """Every release and variant on every machine, oldest release first."""
    for number, machines in document()["versions"].items():
        for machine, variants in machines.items():
            for variant, entry in variants.items():
                yield _entry(number + SUFFIX_OF_VARIANT[variant], machine, entry)
                if variant == "default" and number in UNTUNED:
                    older = document()["versions"]["2.34"][machine]["default"]["structs"]["malloc_par"]
                    # hugetlb is a tunable.
                    constants = {**entry["constants"], "heap_max_follows_hugetlb": False}
                    structs = {**entry["structs"], "malloc_par": older}
                    changed = {**entry, "structs": structs, "constants": constants}
                    yield _entry(f"{number}-no-tunables", machine, changed)


def _entry(release: str, machine: str, entry: Mapping[str, Any]) -> Entry:
    return Entry(release, machine, entry["structs"], entry["constants"], entry["source"])
