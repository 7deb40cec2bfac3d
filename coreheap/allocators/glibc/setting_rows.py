"""The settings of glibc's malloc from 2.12 to 2.44: their names everywhere, and what each release starts with. Data.

Sources: mallopt(3); malloc/malloc.c (the static mp_, do_set_*), malloc/arena.c (ptmalloc_init) and
elf/dl-tunables.list of the release tags; the static values also from 15 libraries of Debian (2.31 to 2.44).
tests/real_cores/test_settings.py holds the rows against processes that were started with these settings.
"""

from __future__ import annotations

from dataclasses import dataclass

from coreheap.settings import SettingUnit

BYTES, COUNT = SettingUnit.BYTES, SettingUnit.COUNT


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One field of ``mp_`` that can be set, and the ways to set it; None where there is no such way."""

    field: str
    unit: SettingUnit
    mallopt: str | None = None
    variable: str | None = None
    tunable: str | None = None


SETTING_ROWS = (
    SettingRow("trim_threshold", BYTES, "M_TRIM_THRESHOLD", "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold"),
    SettingRow("top_pad", BYTES, "M_TOP_PAD", "MALLOC_TOP_PAD_", "glibc.malloc.top_pad"),
    SettingRow("mmap_threshold", BYTES, "M_MMAP_THRESHOLD", "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold"),
    SettingRow("n_mmaps_max", COUNT, "M_MMAP_MAX", "MALLOC_MMAP_MAX_", "glibc.malloc.mmap_max"),
    # Whoever sets one of the four above fixes the thresholds by it.
    SettingRow("no_dyn_threshold", COUNT, "mallopt"),
    SettingRow("arena_test", COUNT, "M_ARENA_TEST", "MALLOC_ARENA_TEST", "glibc.malloc.arena_test"),
    SettingRow("arena_max", COUNT, "M_ARENA_MAX", "MALLOC_ARENA_MAX", "glibc.malloc.arena_max"),
    SettingRow("thp_pagesize", BYTES, tunable="glibc.malloc.hugetlb"),
    SettingRow("hp_pagesize", BYTES, tunable="glibc.malloc.hugetlb"),
    SettingRow("tcache_max_bytes", BYTES, tunable="glibc.malloc.tcache_max"),
    SettingRow("tcache_count", COUNT, tunable="glibc.malloc.tcache_count"),
    SettingRow("tcache_unsorted_limit", COUNT, tunable="glibc.malloc.tcache_unsorted_limit"),
)

FIXES_THRESHOLDS = ("trim_threshold", "top_pad", "mmap_threshold", "n_mmaps_max")
"""Settings that set no_dyn_threshold as well."""

NOT_IN_MP = {
    "MALLOC_PERTURB_": "glibc.malloc.perturb",
    "MALLOC_CHECK_": "glibc.malloc.check",
    "": "glibc.malloc.mxfast",
}
"""Variable to tunable, for settings that live outside of ``mp_``; "" where there is no variable."""

Values = dict[str, tuple[int, ...]]

_THRESHOLDS: Values = {"trim_threshold": (0x20000,), "top_pad": (0x20000,), "mmap_threshold": (0x20000,)}
_COMMON: Values = _THRESHOLDS | {"n_mmaps_max": (0x10000,), "no_dyn_threshold": (0,), "arena_max": (0,)}
# With more than one value: what the releases of one layout start with.
_TCACHE: Values = {"tcache_count": (7,), "tcache_unsorted_limit": (0,)}
_TAG, _BRANCH = {8: 0x408, 4: 0x3FC}, {8: 0x411, 4: 0x401}
_NO_HUGE_PAGES: Values = {"thp_pagesize": (0,), "hp_pagesize": (0,)}


def _defaults(word_bytes: int) -> dict[str, Values]:
    common: Values = _COMMON | {"arena_test": (8 if word_bytes == 8 else 2,)}
    tag, branch = _TAG[word_bytes], _BRANCH[word_bytes]
    newest: Values = {"hp_pagesize": (0,), "tcache_count": (16,), "tcache_max_bytes": (branch,)}
    return {
        "2.12 stock": _COMMON,
        "2.12 PER_THREAD": common,
        "2.15": common,
        "2.24": common,
        "2.26": common | _TCACHE | {"tcache_max_bytes": (tag,)},
        # The branch of 2.42 has another one than its tag and all before.
        "2.35": common | _TCACHE | _NO_HUGE_PAGES | {"tcache_max_bytes": (tag, branch)},
        # Whether huge pages are used without being asked for depends on machine and kernel: thp_pagesize has no default.
        "2.43": common | {"tcache_unsorted_limit": (0,)} | newest,
        "2.44": common | newest,
    }


DEFAULTS = {word_bytes: _defaults(word_bytes) for word_bytes in (4, 8)}
"""By word size and row of ``layouts.MALLOC_PAR`` (without " without tcache"): field to the values a release may start with."""

_EVERYWHERE = ("check", "top_pad", "perturb", "mmap_max", "mmap_threshold", "trim_threshold", "arena_max", "arena_test")
_CACHES = ("tcache_max", "tcache_count", "tcache_unsorted_limit")


def _tunables(*names: str) -> frozenset[str]:
    return frozenset(f"glibc.malloc.{name}" for name in names)


TUNABLES = {
    "2.12 stock": _tunables(),
    "2.12 PER_THREAD": _tunables(),
    "2.15": _tunables(),
    "2.24": _tunables(*_EVERYWHERE),
    "2.26": _tunables(*_EVERYWHERE, *_CACHES, "mxfast"),
    "2.35": _tunables(*_EVERYWHERE, *_CACHES, "mxfast", "hugetlb"),
    "2.43": _tunables(*_EVERYWHERE, *_CACHES, "mxfast", "hugetlb"),
    "2.44": _tunables(*_EVERYWHERE, "tcache_max", "tcache_count", "mxfast", "hugetlb"),
}
"""By row of ``layouts.MALLOC_PAR``: the tunables that at least one of its releases knows (2.25 is the first with any)."""

WITHOUT_EFFECT = {"2.43": _tunables("mxfast"), "2.44": _tunables("mxfast")}
"""Tunables that a release takes and does nothing with: fastbins are gone from 2.43 on."""

ALL_TUNABLES = frozenset().union(*TUNABLES.values())

OTHER_VARIABLES = (
    "LD_PRELOAD",
    "MALLOC_CONF",  # jemalloc
    "_RJEM_MALLOC_CONF",
    "JE_MALLOC_CONF",
)
"""Variables that decide about memory and are no settings of glibc's malloc."""

OTHER_PREFIXES = ("TCMALLOC_", "MIMALLOC_")
"""What such variables of other allocators begin with."""


def threshold_maximum(word_bytes: int) -> int:
    """DEFAULT_MMAP_THRESHOLD_MAX: no higher does free() raise mmap_threshold by itself."""
    return 32 << 20 if word_bytes == 8 else 512 << 10
