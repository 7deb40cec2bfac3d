"""How malloc was set, and by whom, as values: the fields of ``mp_`` that are settings, the environment's wishes, a JVM's options.

Knows: the words and the shape. Does not know: how any of it was read (``knobs``), nor how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coreheap.evidence import Gap
from coreheap.quantities import format_bytes, format_count


class SettingUnit(Enum):
    """What a setting counts."""

    BYTES = "bytes"
    COUNT = "count"


class SetBy(Enum):
    """What gave a setting its value. New ones may be added; none changes its meaning."""

    DEFAULT = "default"
    """Nothing: it is the release's own value, and nothing in the environment asked for one."""
    ENVIRONMENT = "environment"
    """A variable such as MALLOC_ARENA_MAX asked for this value."""
    TUNABLE = "tunable"
    """An entry of GLIBC_TUNABLES asked for this value."""
    RATCHET = "ratchet"
    """malloc itself: free() of a larger mmapped chunk raised the threshold."""
    MALLOPT = "mallopt"
    """A call of mallopt, by exclusion: not the default, and the environment at the start did not ask for it."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Setting:
    """One field of ``mp_`` that is a setting. ``name`` is glibc's own.

    ``value`` is None where it was not saved. ``default`` is what the release starts with, None where that is not known
    or depends on the system; ``is_default`` follows, None where either is unknown. ``source`` names what set it
    (``MALLOC_ARENA_MAX``, ``glibc.malloc.arena_max``, ``M_ARENA_MAX``), "" where nothing can be named.
    """

    name: str
    unit: SettingUnit
    value: int | None
    default: int | None
    is_default: bool | None
    set_by: SetBy
    source: str = ""

    @property
    def text(self) -> str:
        """The value for people; ``unknown`` where it is."""
        if self.value is None:
            return "unknown"
        return format_bytes(self.value) if self.unit is SettingUnit.BYTES else format_count(self.value)


@dataclass(frozen=True, slots=True)
class MallocSettings:
    """The settings of one copy of malloc (``HeapSnapshot.copies``); ``values`` is empty where its ``mp_`` is unknown.

    ``arena_limit`` is how many arenas it would make, None where the core does not tell; ``arena_limit_reason`` says why.
    """

    copy: int
    module: str | None
    values: tuple[Setting, ...]
    arena_limit: int | None
    arena_limit_reason: str

    def setting(self, name: str) -> Setting | None:
        """The setting of this name; None where the release has none, or ``mp_`` is unknown."""
        return next((setting for setting in self.values if setting.name == name), None)

    def value(self, name: str) -> int | None:
        """The value of a setting; None where it is unknown or the release has none."""
        setting = self.setting(name)
        return None if setting is None else setting.value

    @property
    def is_ratcheted(self) -> bool:
        """Whether malloc itself has raised its mmap_threshold."""
        setting = self.setting("mmap_threshold")
        return setting is not None and setting.set_by is SetBy.RATCHET


class Effect(Enum):
    """What became of a wish in the environment. New ones may be added; none changes its meaning."""

    OBEYED = "obeyed"
    """``mp_`` has this value."""
    DIFFERS = "differs"
    """``mp_`` has another value; ``reason`` says what is likely."""
    IGNORED = "ignored"
    """This release, or this process, does not listen to it; ``reason`` says why."""
    NOT_VISIBLE = "not_visible"
    """Nothing in ``mp_`` would show it."""
    UNKNOWN = "unknown"
    """``mp_`` is not in the core, or of a release that is not known."""


class Reason(Enum):
    """Why a wish has no effect."""

    AT_SECURE = "at_secure"
    """The process runs with more rights than its caller (set-user-id and the like): glibc ignores these variables then."""
    UNKNOWN_NAME = "unknown_name"
    """No release has a setting of this name; ``EnvironmentSetting.meant`` is the one that was meant."""
    OTHER_RELEASE = "other_release"
    """Other releases have this setting, this one has not."""
    NO_EFFECT = "no_effect"
    """This release takes it and does nothing with it."""
    NOT_A_NUMBER = "not_a_number"
    """The value is not a plain number: units are not understood by glibc."""
    OVERRIDDEN = "overridden"
    """Another entry of the environment asks for another value, and ``mp_`` has that."""
    CHANGED_LATER = "changed_later"
    """The program set it again, by mallopt."""
    REFUSED = "refused"
    """``mp_`` still has the default: malloc did not take it, or never saw it."""


@dataclass(frozen=True, slots=True)
class EnvironmentSetting:
    """One wish in the environment that the program was started with. Text is the process's own and not escaped.

    ``variable`` is the environment's variable, ``name`` the same or the tunable inside GLIBC_TUNABLES. ``field`` is the
    setting of ``mp_`` it asks for (None: none), ``requested`` the number it asks for (None: not a number). ``effect``
    is None for variables that are no settings of glibc's malloc (LD_PRELOAD, another allocator's).
    """

    variable: str
    name: str
    value: str
    field: str | None = None
    requested: int | None = None
    effect: Effect | None = None
    reason: Reason | None = None
    meant: str | None = None


@dataclass(frozen=True, slots=True)
class JavaOption:
    """An option of a JVM that decides about memory. ``source`` is ``command_line`` or an environment variable.

    ``name`` is as the JVM has it (``-Xmx``, ``-XX:MaxDirectMemorySize``), ``value`` the text after it, ``byte_count``
    what it comes to (None: not a size, or not readable). ``is_effective`` is False where a later one overrides it.
    """

    name: str
    value: str
    byte_count: int | None
    source: str
    is_effective: bool


@dataclass(frozen=True, slots=True)
class JavaSettings:
    """What a JVM was told about memory. ``options`` is None where the arguments are not in the core.

    ``options_elsewhere`` are arguments that name files with more options, which the core does not hold, and the program that
    started the JVM where that is not java itself.
    """

    options: tuple[JavaOption, ...] | None
    options_elsewhere: tuple[str, ...] = ()

    def effective(self, name: str) -> JavaOption | None:
        """The option of this name that counts; None where it was not given or is not known."""
        found = (option for option in self.options or () if option.name == name and option.is_effective)
        return next(found, None)


@dataclass(frozen=True, slots=True)
class Settings:
    """All of it. ``malloc`` has an entry for each copy of malloc, the program's own first.

    ``environment`` holds those variables of the start that matter to memory, and nothing else of the environment; None where
    the initial stack is not in the core. ``at_secure`` and ``page_bytes`` are AT_SECURE and AT_PAGESZ, None where the core
    does not have them. ``java`` is None for a process without a JVM.
    """

    malloc: tuple[MallocSettings, ...]
    environment: tuple[EnvironmentSetting, ...] | None
    at_secure: bool | None
    page_bytes: int | None
    java: JavaSettings | None
    gaps: tuple[Gap, ...] = ()
