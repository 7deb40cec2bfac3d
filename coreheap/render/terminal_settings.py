"""How malloc and a JVM were set, as a short part of the page for people.

Knows: what of the settings is worth a line: what is not the default, and what was asked for in vain. Does not know: how any of it
was read. Text out of the core is made printable here.
"""

from __future__ import annotations

from rich.text import Text

from coreheap.quantities import format_bytes, format_count
from coreheap.render.escaping import printable, shortened
from coreheap.render.page import Page, plain_table
from coreheap.settings import (
    Effect,
    EnvironmentSetting,
    JavaSettings,
    MallocSettings,
    Reason,
    SetBy,
    Setting,
    Settings,
    SettingUnit,
)

LONGEST_VALUE = 100
"""Characters of one value of the environment that the page shows."""
LIST_LENGTH = 16
"""Wishes of the environment and options of a JVM that the page shows; all of them with -v."""

_SET_BY = {
    SetBy.DEFAULT: "default",
    SetBy.ENVIRONMENT: "environment",
    SetBy.TUNABLE: "tunable",
    SetBy.RATCHET: "malloc: free() of large mmapped chunks",
    SetBy.MALLOPT: "the program",
    SetBy.UNKNOWN: "unknown",
}

_REASONS = {
    Reason.AT_SECURE: "the process has more rights than its caller (AT_SECURE)",
    Reason.UNKNOWN_NAME: "there is no such setting",
    Reason.OTHER_RELEASE: "this release of glibc has no such setting",
    Reason.NO_EFFECT: "this release of glibc does nothing with it",
    Reason.NOT_A_NUMBER: "it is not a plain number",
    Reason.OVERRIDDEN: "another entry of the environment overrides it",
    Reason.CHANGED_LATER: "the program set it again by mallopt",
    Reason.REFUSED: "malloc did not take it",
}


def add_settings(page: Page, settings: Settings) -> None:
    """What is not as the release has it, the arena limit, and what the environment asked for."""
    page.heading("Settings", _summary(settings))
    for malloc in settings.malloc:
        _add_malloc(page, malloc, len(settings.malloc) > 1)
    wishes = settings.environment or ()
    shown = wishes if page.style.verbose else wishes[:LIST_LENGTH]
    for wish in shown:
        _add_wish(page, wish, settings)
    if len(shown) < len(wishes):
        page.add(Text(f"+{len(wishes) - len(shown):,} more entries of the environment (-v)", style="dim"), indent=2)
    if settings.environment is None:
        page.bullet(
            "The environment at the program's start is not in the core: what it asked for is unknown.", sign="?"
        )
    if settings.java is not None:
        _add_java(page, settings.java)


def _summary(settings: Settings) -> str:
    if not settings.malloc or not settings.malloc[0].values:
        return "unknown: mp_ is not in the core"
    changed = sum(_is_worth_a_line(setting) for malloc in settings.malloc for setting in malloc.values)
    return f"{changed} of malloc's not as the release has them" if changed else "malloc's are as the release has them"


def _is_worth_a_line(setting: Setting) -> bool:
    if setting.is_default is None:
        return bool(setting.value) or setting.value is None
    return not setting.is_default or setting.set_by is not SetBy.DEFAULT


def _add_malloc(page: Page, malloc: MallocSettings, is_one_of_several: bool) -> None:
    rows = [setting for setting in malloc.values if page.style.verbose or _is_worth_a_line(setting)]
    if is_one_of_several and rows:
        page.add(f"copy {malloc.copy}:", indent=2)
    if rows:
        table = plain_table((("setting", False), ("value", True), ("default", True), ("set by", False)), wide_column=3)
        for setting in rows:
            source = f" ({printable(setting.source)})" if setting.source else ""
            table.add_row(
                printable(setting.name),
                _number(setting.value, setting.unit),
                _number(setting.default, setting.unit),
                _SET_BY[setting.set_by] + source,
            )
        page.add(table, indent=2)
    if malloc.arena_limit is not None or malloc.arena_limit_reason:
        limit = "?" if malloc.arena_limit is None else format_count(malloc.arena_limit)
        reason = f" ({printable(malloc.arena_limit_reason)})" if malloc.arena_limit_reason else ""
        page.bullet(f"arena limit {limit}{reason}")


def _number(value: int | None, unit: SettingUnit) -> str:
    if value is None:
        return "?"
    return format_bytes(value) if unit is SettingUnit.BYTES else format_count(value)


def _add_wish(page: Page, wish: EnvironmentSetting, settings: Settings) -> None:
    """A line for each variable; what malloc does not obey stands out."""
    inside = "" if wish.name == wish.variable else f"{printable(wish.variable)} "
    text = f"{inside}{shortened(wish.name, LONGEST_VALUE)}={shortened(wish.value, LONGEST_VALUE)}"
    if wish.effect in (Effect.DIFFERS, Effect.IGNORED):
        reason = _REASONS[wish.reason] if wish.reason is not None else "why is unknown"
        meant = f"; {printable(wish.meant)} is near to it" if wish.meant else ""
        word = (
            "has no effect" if wish.effect is Effect.IGNORED else f"is not what mp_ says{_what_mp_says(wish, settings)}"
        )
        page.bullet(f"{text} {word}: {reason}{meant}", sign="!", style="yellow")
    elif wish.effect is Effect.OBEYED:
        page.bullet(f"{text} is obeyed", sign="+")
    elif wish.effect is Effect.NOT_VISIBLE:
        page.bullet(f"{text}; nothing in mp_ shows whether it is obeyed")
    else:
        page.bullet(text)


def _what_mp_says(wish: EnvironmentSetting, settings: Settings) -> str:
    setting = settings.malloc[0].setting(wish.field) if settings.malloc and wish.field else None
    return "" if setting is None else f" ({setting.text})"


def _add_java(page: Page, java: JavaSettings) -> None:
    if java.options is None:
        page.bullet("The JVM's arguments are not in the core.", sign="?")
        return
    options = [option for option in java.options if option.is_effective]
    for option in options if page.style.verbose else options[:LIST_LENGTH]:
        is_short = option.name.startswith("-X") and not option.name.startswith("-XX:")
        is_flag = option.value in ("+", "-")
        value = shortened(option.value, LONGEST_VALUE)
        text = (
            f"-XX:{value}{printable(option.name.removeprefix('-XX:'))}"
            if is_flag
            else f"{printable(option.name)}{'' if is_short else '='}{value}"
        )
        size = "" if option.byte_count is None else f": {format_bytes(option.byte_count)}"
        source = option.source.replace("_", " ") if option.source.islower() else option.source
        page.bullet(f"JVM {text}{size} ({printable(source)})")
    if len(options) > LIST_LENGTH and not page.style.verbose:
        page.add(Text(f"+{len(options) - LIST_LENGTH:,} more options of the JVM (-v)", style="dim"), indent=2)
    for argument in java.options_elsewhere[:LIST_LENGTH]:
        is_file = argument.startswith(("@", "-"))
        unknown = "more options in a file, which is not in the core" if is_file else "what it gave the JVM is not known"
        page.bullet(f"JVM {'' if is_file else 'started by '}{shortened(argument, LONGEST_VALUE)}: {unknown}", sign="?")
