"""How malloc was set, and by whom: ``mp_`` held against what each release starts with and against the environment.

Knows: glibc's settings (``setting_rows``), which of them the environment can ask for, and the options of a JVM. Does not
know: how ``mp_`` was found. Of the environment nothing is looked at but the variables that are named here: the rest is
the process's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from coreheap.allocators.glibc.setting_rows import (
    ALL_TUNABLES,
    DEFAULTS,
    FIXES_THRESHOLDS,
    NOT_IN_MP,
    OTHER_PREFIXES,
    OTHER_VARIABLES,
    SETTING_ROWS,
    TUNABLES,
    WITHOUT_EFFECT,
    SettingRow,
    threshold_maximum,
)
from coreheap.corefile import Core
from coreheap.evidence import Gap
from coreheap.heap import HeapSnapshot, MallocCopy, MallocParameters
from coreheap.knobs.java_options import java_settings
from coreheap.settings import (
    Effect,
    EnvironmentSetting,
    MallocSettings,
    Reason,
    SetBy,
    Setting,
    Settings,
)

AT_PAGESZ, AT_SECURE = 6, 23

TUNABLES_VARIABLE = "GLIBC_TUNABLES"
LONGEST_VALUE = 4096
"""Characters of a value that are kept."""
MOST_ENTRIES = 256
"""Wishes that are told of; an environment can have any number."""

RATCHETED = ("mmap_threshold", "trim_threshold")
"""What free() raises by itself."""

_NUMBER = re.compile(r"\s*([+-]?)(0[xX][0-9a-fA-F]{1,40}|[0-9]{1,40})")

_VARIABLE_ROWS = {row.variable: row for row in SETTING_ROWS if row.variable}
_TUNABLE_ROWS: dict[str, SettingRow] = {}
for _row in SETTING_ROWS:
    if _row.tunable:
        # hugetlb sets two fields: the last counts, and ``_is_shown`` looks at both.
        _TUNABLE_ROWS[_row.tunable] = _row
_VARIABLES = frozenset(_VARIABLE_ROWS) | {name for name in NOT_IN_MP if name}
_UNCLEAR = {re.sub(r"_+$", "", name): name for name in _VARIABLES}
"""A variable's name without the underscore that it ends in, or not: it is easily forgotten or added."""


def read_settings(core: Core, heap: HeapSnapshot | None) -> Settings:
    """Everything that the core says about how malloc was set. What it does not hold stays unknown, never a default."""
    stack = core.initial_stack
    secure = core.auxv.get(AT_SECURE)
    gaps = []
    copies = heap.copies if heap is not None else ()
    own = copies[0].parameters if copies else (heap.parameters if heap is not None else None)
    word_bytes = heap.chunks.word_bytes if heap is not None else core.word_bytes
    wishes: tuple[EnvironmentSetting, ...] | None = None
    if stack is None:
        gaps.append(
            Gap("initial_stack_missing", "what the environment and the arguments asked of malloc and a JVM is unknown")
        )
    elif not stack.is_intact:
        gaps.append(
            Gap(
                "environment_overwritten",
                "the program has written over its environment, as changing its title does; what that asked of malloc is unknown",
            )
        )
    else:
        wishes = tuple(_judged(_wishes(stack.environment), own, word_bytes, bool(secure)))
    return Settings(
        malloc=tuple(_malloc_settings(copy, heap, wishes, word_bytes) for copy in copies) if heap is not None else (),
        environment=wishes,
        at_secure=None if secure is None else bool(secure),
        page_bytes=core.auxv.get(AT_PAGESZ),
        java=java_settings(
            [module.path for module in core.modules],
            None if stack is None else stack.arguments,
            None if stack is None or not stack.is_intact else stack.environment,
        ),
        gaps=tuple(gaps),
    )


# --- Wishes of the environment ------------------------------------------------------------------------------------


def _wishes(environment: Mapping[str, str]) -> Iterator[EnvironmentSetting]:
    """The variables that matter, in the environment's order, and each entry of GLIBC_TUNABLES by itself."""
    count = 0
    for variable, text in environment.items():
        for wish in _wishes_of(variable, text[:LONGEST_VALUE]):
            yield wish
            count += 1
            if count == MOST_ENTRIES:
                return


def _wishes_of(variable: str, text: str) -> Iterator[EnvironmentSetting]:
    if variable == TUNABLES_VARIABLE:
        for entry in text.split(":"):
            name, equals, value = entry.partition("=")
            if equals and (name in ALL_TUNABLES or name.startswith("glibc.malloc.") or _meant_tunable(name)):
                row = _TUNABLE_ROWS.get(name)
                yield EnvironmentSetting(variable, name, value, row.field if row else None, number_of(value))
    elif variable in _VARIABLES:
        row = _VARIABLE_ROWS.get(variable)
        yield EnvironmentSetting(variable, variable, text, row.field if row else None, number_of(text))
    elif re.sub(r"_+$", "", variable) in _UNCLEAR:
        yield EnvironmentSetting(variable, variable, text, requested=number_of(text))
    elif variable in OTHER_VARIABLES or variable.startswith(OTHER_PREFIXES):
        yield EnvironmentSetting(variable, variable, text)


def number_of(text: str) -> int | None:
    """The number that a value begins with, as strtoul with base 0 reads it; None where it begins with none."""
    match = _NUMBER.match(text)
    if match is None:
        return None
    digits = match.group(2)
    if digits[:2] in ("0x", "0X"):
        number = int(digits, 16)
    elif digits[0] == "0":
        octal = re.match(r"[0-7]+", digits)
        number = int(octal.group(), 8) if octal else 0
    else:
        number = int(digits)
    return -number if match.group(1) == "-" else number


def _is_plain_number(text: str) -> bool:
    match = _NUMBER.match(text)
    return match is not None and match.end() == len(text)


def _meant_tunable(name: str) -> str | None:
    """The tunable of malloc's that a name which does not exist probably means; None where nothing is near."""
    last = name.rpartition(".")[2].lower().strip("_")
    found = f"glibc.malloc.{last}"
    if found in ALL_TUNABLES:
        return found
    return next((known for known in sorted(ALL_TUNABLES) if _one_edit_apart(known, name)), None)


def _one_edit_apart(known: str, name: str) -> bool:
    """Whether one letter more, less, other, or two swapped make one name the other."""
    if abs(len(known) - len(name)) > 1:
        return False
    common = 0
    while common < min(len(known), len(name)) and known[common] == name[common]:
        common += 1
    one, other = known[common:], name[common:]
    is_swapped = one[:2] == other[1::-1] and one[2:] == other[2:]
    return is_swapped or one[1:] == other[1:] or one[1:] == other or one == other[1:]


def _judged(
    wishes: Iterable[EnvironmentSetting], own: MallocParameters | None, word_bytes: int, is_secure: bool
) -> list[EnvironmentSetting]:
    """The wishes with what became of each; the program's own malloc (``own``) is what they are held against."""
    all_wishes = list(wishes)
    shown = {wish.field for wish in all_wishes if wish.field and own and _is_shown(wish, own, word_bytes)}
    return [_with_effect(wish, own, word_bytes, is_secure, wish.field in shown) for wish in all_wishes]


def _with_effect(
    wish: EnvironmentSetting, own: MallocParameters | None, word_bytes: int, is_secure: bool, other_is_shown: bool
) -> EnvironmentSetting:
    is_tunable = wish.variable == TUNABLES_VARIABLE
    if not is_tunable and wish.variable not in _VARIABLES:
        meant = _UNCLEAR.get(re.sub(r"_+$", "", wish.variable))
        return wish if meant is None else replace(wish, effect=Effect.IGNORED, reason=Reason.UNKNOWN_NAME, meant=meant)
    if is_tunable and wish.name not in ALL_TUNABLES:
        return replace(wish, effect=Effect.IGNORED, reason=Reason.UNKNOWN_NAME, meant=_meant_tunable(wish.name))
    if is_secure:
        return replace(wish, effect=Effect.IGNORED, reason=Reason.AT_SECURE)
    layout = own.layout.removesuffix(" without tcache") if own is not None else None
    if own is None or layout not in TUNABLES:
        return replace(wish, effect=Effect.UNKNOWN)
    if is_tunable and wish.name in WITHOUT_EFFECT.get(layout, ()):
        return replace(wish, effect=Effect.IGNORED, reason=Reason.NO_EFFECT)
    if is_tunable and wish.name not in TUNABLES[layout]:
        return replace(wish, effect=Effect.IGNORED, reason=Reason.OTHER_RELEASE)
    if wish.field is None:
        return replace(wish, effect=Effect.NOT_VISIBLE)
    if own.value(wish.field) is None:
        # libc_malloc_debug's malloc has no tcache; releases before PER_THREAD have no limit of arenas.
        return replace(wish, effect=Effect.IGNORED, reason=Reason.OTHER_RELEASE)
    if _is_shown(wish, own, word_bytes):
        return replace(wish, effect=Effect.OBEYED)
    return replace(wish, effect=Effect.DIFFERS, reason=_why_not(wish, own, word_bytes, other_is_shown))


def _why_not(wish: EnvironmentSetting, own: MallocParameters, word_bytes: int, other_is_shown: bool) -> Reason:
    assert wish.field is not None
    if not _is_plain_number(wish.value):
        return Reason.NOT_A_NUMBER
    if other_is_shown:
        return Reason.OVERRIDDEN
    if own.value(wish.field) in _defaults(own, word_bytes).get(wish.field, ()):
        return Reason.REFUSED
    row = next(row for row in SETTING_ROWS if row.field == wish.field)
    return Reason.CHANGED_LATER if row.mallopt else Reason.REFUSED


def _is_shown(wish: EnvironmentSetting, own: MallocParameters, word_bytes: int) -> bool:
    """Whether ``mp_`` has what a wish asks for."""
    value, requested = own.value(wish.field or ""), wish.requested
    if value is None or requested is None:
        return False
    if wish.name == "glibc.malloc.hugetlb":
        sizes = own.value("thp_pagesize"), own.value("hp_pagesize")
        # 1: transparent huge pages; 2: the default size of MAP_HUGETLB; more: that size.
        return bool(sizes[0]) if requested == 1 else bool(sizes[1]) if requested >= 2 else not sizes[1]
    if wish.field == "tcache_max_bytes":
        # From 2.42 on it is the size of a chunk plus one and not what was asked for.
        chunk = (requested + word_bytes + 15) & ~15
        return value in (requested, chunk, chunk + 1)
    width = 32 if wish.field == "n_mmaps_max" else 8 * word_bytes
    return value == requested & ((1 << width) - 1)


# --- mp_ ----------------------------------------------------------------------------------------------------------


def _defaults(parameters: MallocParameters, word_bytes: int) -> Mapping[str, tuple[int, ...]]:
    """What this release may start with by field; empty where the release is not known."""
    return DEFAULTS[word_bytes].get(parameters.layout.removesuffix(" without tcache"), {})


def _malloc_settings(
    copy: MallocCopy, heap: HeapSnapshot, wishes: tuple[EnvironmentSetting, ...] | None, word_bytes: int
) -> MallocSettings:
    parameters = copy.parameters
    limit, reason = (heap.narenas_limit, heap.limit_reason) if copy.number == 0 else (None, "")
    if parameters is None:
        return MallocSettings(copy.number, copy.module, (), limit, reason)
    defaults = _defaults(parameters, word_bytes)
    values = [
        _setting(row, parameters, defaults.get(row.field, ()), wishes, word_bytes)
        for row in SETTING_ROWS
        if row.field in parameters.values
    ]
    if is_ratcheted(parameters, defaults, word_bytes):
        values = [
            replace(setting, set_by=SetBy.RATCHET, source="") if setting.name in RATCHETED else setting
            for setting in values
        ]
    elif _may_have_been_ratcheted(parameters, defaults):
        values = [
            replace(setting, set_by=SetBy.UNKNOWN, source="")
            if setting.name in RATCHETED and setting.set_by is SetBy.MALLOPT
            else setting
            for setting in values
        ]
    return MallocSettings(copy.number, copy.module, tuple(_with_fixed_thresholds(values)), limit, reason)


def is_ratcheted(parameters: MallocParameters, defaults: Mapping[str, tuple[int, ...]], word_bytes: int) -> bool:
    """Whether free() has raised the thresholds: it sets trim_threshold to twice the other, and is stopped by
    no_dyn_threshold, which every other way to set them also sets."""
    threshold, trim = parameters.value("mmap_threshold"), parameters.value("trim_threshold")
    default = defaults.get("mmap_threshold")
    if threshold is None or trim is None or default is None or parameters.value("no_dyn_threshold") != 0:
        return False
    return max(default) < threshold <= threshold_maximum(word_bytes) and trim == 2 * threshold


def _may_have_been_ratcheted(parameters: MallocParameters, defaults: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the thresholds look ratcheted although they are fixed by now: another setting may have been made later."""
    threshold, trim = parameters.value("mmap_threshold"), parameters.value("trim_threshold")
    default = defaults.get("mmap_threshold")
    return threshold is not None and default is not None and threshold > max(default) and trim == 2 * threshold


def _setting(
    row: SettingRow,
    parameters: MallocParameters,
    defaults: tuple[int, ...],
    wishes: tuple[EnvironmentSetting, ...] | None,
    word_bytes: int,
) -> Setting:
    value = parameters.value(row.field)
    is_default = None if value is None or not defaults else value in defaults
    default = value if is_default else defaults[0] if len(defaults) == 1 else None
    set_by, source = SetBy.UNKNOWN, ""
    # Only a wish that malloc listened to can have set it: a variable of a set-user-id process has not.
    asked = next(
        (
            wish
            for wish in wishes or ()
            if _asks_for(wish, row) and wish.effect is not Effect.IGNORED and _is_shown(wish, parameters, word_bytes)
        ),
        None,
    )
    if asked is not None and value is not None:
        is_tunable = asked.variable == TUNABLES_VARIABLE
        set_by, source = (SetBy.TUNABLE if is_tunable else SetBy.ENVIRONMENT), asked.name
    elif is_default:
        set_by = SetBy.DEFAULT
    elif is_default is False and wishes is not None and row.mallopt:
        set_by, source = SetBy.MALLOPT, row.mallopt
    return Setting(row.field, row.unit, value, default, is_default, set_by, source)


def _asks_for(wish: EnvironmentSetting, row: SettingRow) -> bool:
    return wish.field is not None and (
        wish.field == row.field or (row.tunable is not None and wish.name == row.tunable)
    )


def _with_fixed_thresholds(values: list[Setting]) -> Iterator[Setting]:
    """no_dyn_threshold is nobody's wish: it follows from one of the settings that were made."""
    by_name = {setting.name: setting for setting in values}
    for setting in values:
        if setting.name == "no_dyn_threshold" and setting.value:
            makers = (by_name[name] for name in FIXES_THRESHOLDS if name in by_name)
            maker = next((made for made in makers if made.source), None)
            if maker is not None:
                yield replace(setting, set_by=maker.set_by, source=maker.source)
                continue
        yield setting
