"""Who set what: ``mp_`` against the releases' defaults and the environment, by small processes made by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from coreheap.corefile.process import InitialStack
from coreheap.evidence import Confidence
from coreheap.heap import MallocCopy, MallocParameters
from coreheap.knobs import read_settings
from coreheap.knobs.malloc import number_of
from coreheap.settings import Effect, EnvironmentSetting, Reason, SetBy, Settings

# glibc 2.36 on 64-bit, from mallopt(3) and the library's own static data.
DEFAULTS = {
    "trim_threshold": 131072,
    "top_pad": 131072,
    "mmap_threshold": 131072,
    "arena_test": 8,
    "arena_max": 0,
    "thp_pagesize": 0,
    "hp_pagesize": 0,
    "n_mmaps_max": 65536,
    "no_dyn_threshold": 0,
    "tcache_max_bytes": 1032,
    "tcache_count": 7,
    "tcache_unsorted_limit": 0,
}


def process(
    environment: dict[str, str] | None,
    *,
    layout: str | None = "2.35",
    secure: int | None = 0,
    arguments: tuple[str, ...] = ("/bin/prog",),
    modules: tuple[str, ...] = ("/bin/prog",),
    word_bytes: int = 8,
    **changed: int,
) -> Settings:
    """The settings of a process with this ``mp_`` (layout None: not found) and environment (None: not in the core)."""
    core = SimpleNamespace(
        initial_stack=None if environment is None else InitialStack(arguments, environment),
        auxv={} if secure is None else {23: secure, 6: 4096},
        modules=[SimpleNamespace(path=path) for path in modules],
        word_bytes=word_bytes,
    )
    parameters = None if layout is None else MallocParameters(0x1000, layout, DEFAULTS | changed)
    copy = MallocCopy(0, 0x2000, "libc.so.6", parameters, 1, 0, (), Confidence.CERTAIN)
    heap = SimpleNamespace(
        copies=(copy,),
        parameters=parameters,
        chunks=SimpleNamespace(word_bytes=word_bytes),
        narenas_limit=None,
        limit_reason="",
    )
    return read_settings(cast(Any, core), cast(Any, heap))


def set_by(settings: Settings, name: str) -> tuple[SetBy, str]:
    setting = settings.malloc[0].setting(name)
    assert setting is not None
    return setting.set_by, setting.source


def wish(settings: Settings, name: str) -> EnvironmentSetting:
    assert settings.environment is not None
    (found,) = [wish for wish in settings.environment if wish.name == name]
    return found


def effect(settings: Settings, name: str) -> tuple[Effect | None, Reason | None]:
    return wish(settings, name).effect, wish(settings, name).reason


def test_defaults_are_nobodys_doing() -> None:
    settings = process({"PATH": "/bin", "SECRET": "x"})
    assert settings.environment == ()
    assert all(setting.set_by is SetBy.DEFAULT and setting.is_default for setting in settings.malloc[0].values)
    assert settings.at_secure is False
    assert settings.page_bytes == 4096
    assert settings.java is None


def test_nothing_else_of_the_environment_is_shown() -> None:
    settings = process(
        {
            "AWS_SECRET": "hunter2",
            "GLIBC_TUNABLES": "glibc.pthread.rseq=hunter2:glibc.malloc.arena_max=2:token=hunter2",
            "JAVA_TOOL_OPTIONS": "-Dpassword=hunter2 -Xmx1g",
            "LD_PRELOAD": "/usr/lib/libjemalloc.so.2",
        },
        modules=("/usr/lib/jvm/lib/server/libjvm.so",),
        arguments=("/bin/service", "--password", "hunter2", "-Xmx9g"),
    )
    assert "hunter2" not in repr(settings)
    assert settings.environment is not None
    assert [entry.name for entry in settings.environment] == ["glibc.malloc.arena_max", "LD_PRELOAD"]
    assert wish(settings, "LD_PRELOAD").effect is None
    assert settings.java is not None
    (option,) = settings.java.options or ()
    # The program is not the java launcher: its arguments are its own.
    assert (option.name, option.byte_count, option.source) == ("-Xmx", 1 << 30, "JAVA_TOOL_OPTIONS")


def test_the_environment_set_it() -> None:
    asked = {"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.tcache_count=3:glibc.malloc.top_pad=0x1000"}
    settings = process(asked, arena_max=2, tcache_count=3, top_pad=4096, no_dyn_threshold=1)
    assert set_by(settings, "arena_max") == (SetBy.ENVIRONMENT, "MALLOC_ARENA_MAX")
    assert set_by(settings, "tcache_count") == (SetBy.TUNABLE, "glibc.malloc.tcache_count")
    assert set_by(settings, "no_dyn_threshold") == (SetBy.TUNABLE, "glibc.malloc.top_pad")
    assert settings.environment is not None
    assert {entry.effect for entry in settings.environment} == {Effect.OBEYED}


def test_a_wish_for_the_default_is_a_wish() -> None:
    settings = process({"MALLOC_MMAP_THRESHOLD_": "131072"}, no_dyn_threshold=1)
    assert set_by(settings, "mmap_threshold") == (SetBy.ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_")


def test_what_nobody_asked_for_was_mallopt_or_is_unknown() -> None:
    assert set_by(process({}, arena_max=3), "arena_max") == (SetBy.MALLOPT, "M_ARENA_MAX")
    # There is no mallopt for tcaches, and without the environment anything is possible.
    assert set_by(process({}, tcache_count=3), "tcache_count") == (SetBy.UNKNOWN, "")
    assert set_by(process(None, arena_max=3), "arena_max") == (SetBy.UNKNOWN, "")


def test_the_ratchet() -> None:
    raised = {"mmap_threshold": 401408, "trim_threshold": 802816}
    settings = process({}, **raised)
    assert settings.malloc[0].is_ratcheted
    assert set_by(settings, "trim_threshold") == (SetBy.RATCHET, "")
    assert process(None, **raised).malloc[0].is_ratcheted
    assert not process({}, mmap_threshold=401408, trim_threshold=802815).malloc[0].is_ratcheted
    assert not process({}, mmap_threshold=(32 << 20) + 4096, trim_threshold=(64 << 20) + 8192).malloc[0].is_ratcheted
    # Fixed by something that came later: who raised them cannot be told any more.
    fixed = process({}, **raised, n_mmaps_max=70, no_dyn_threshold=1)
    assert set_by(fixed, "mmap_threshold") == (SetBy.UNKNOWN, "")
    assert set_by(fixed, "no_dyn_threshold") == (SetBy.MALLOPT, "M_MMAP_MAX")


@pytest.mark.parametrize(
    ("environment", "name", "changed", "expected"),
    [
        ({"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX", {"arena_max": 5}, (Effect.DIFFERS, Reason.CHANGED_LATER)),
        ({"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX", {}, (Effect.DIFFERS, Reason.REFUSED)),
        ({"MALLOC_TOP_PAD_": "64K"}, "MALLOC_TOP_PAD_", {}, (Effect.DIFFERS, Reason.NOT_A_NUMBER)),
        ({"MALLOC_ARENA_MAX_": "2"}, "MALLOC_ARENA_MAX_", {}, (Effect.IGNORED, Reason.UNKNOWN_NAME)),
        ({"MALLOC_PERTURB_": "165"}, "MALLOC_PERTURB_", {}, (Effect.NOT_VISIBLE, None)),
        (
            {"GLIBC_TUNABLES": "malloc.arena_max=2"},
            "malloc.arena_max",
            {},
            (Effect.IGNORED, Reason.UNKNOWN_NAME),
        ),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2", "MALLOC_ARENA_MAX": "9"},
            "MALLOC_ARENA_MAX",
            {"arena_max": 2},
            (Effect.DIFFERS, Reason.OVERRIDDEN),
        ),
        (
            {"MALLOC_TRIM_THRESHOLD_": "-1"},
            "MALLOC_TRIM_THRESHOLD_",
            {"trim_threshold": 2**64 - 1},
            (Effect.OBEYED, None),
        ),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"},
            "glibc.malloc.hugetlb",
            {"hp_pagesize": 2 << 20},
            (Effect.OBEYED, None),
        ),
    ],
)
def test_what_became_of_a_wish(
    environment: dict[str, str], name: str, changed: dict[str, int], expected: tuple[Effect, Reason | None]
) -> None:
    assert effect(process(environment, **changed), name) == expected


def test_the_name_that_was_meant() -> None:
    assert wish(process({"MALLOC_TRIM_THRESHOLD": "1"}), "MALLOC_TRIM_THRESHOLD").meant == "MALLOC_TRIM_THRESHOLD_"
    for wrong, meant in (
        ("glibc.malloc.trim_treshold", "glibc.malloc.trim_threshold"),
        ("glibc.malloc.aerna_max", "glibc.malloc.arena_max"),
        ("glibc.mallok.arena_max", "glibc.malloc.arena_max"),
        ("glibc.malloc.something_else", None),
    ):
        assert wish(process({"GLIBC_TUNABLES": f"{wrong}=1"}), wrong).meant == meant


def test_other_releases_have_other_tunables() -> None:
    asked = {"GLIBC_TUNABLES": "glibc.malloc.mxfast=0:glibc.malloc.tcache_unsorted_limit=4:glibc.malloc.hugetlb=1"}
    assert effect(process(asked, layout="2.44"), "glibc.malloc.mxfast") == (Effect.IGNORED, Reason.NO_EFFECT)
    unsorted = "glibc.malloc.tcache_unsorted_limit"
    assert effect(process(asked, layout="2.44"), unsorted) == (Effect.IGNORED, Reason.OTHER_RELEASE)
    assert effect(process(asked, layout="2.26"), "glibc.malloc.hugetlb") == (Effect.IGNORED, Reason.OTHER_RELEASE)
    assert effect(process(asked, layout="2.15"), "glibc.malloc.mxfast") == (Effect.IGNORED, Reason.OTHER_RELEASE)


def test_more_rights_than_the_caller() -> None:
    settings = process({"MALLOC_ARENA_MAX": "0"}, secure=1)
    assert settings.at_secure is True
    assert effect(settings, "MALLOC_ARENA_MAX") == (Effect.IGNORED, Reason.AT_SECURE)
    assert set_by(settings, "arena_max") == (SetBy.DEFAULT, "")


def test_what_is_missing_stays_unknown() -> None:
    settings = process(None, secure=None)
    assert settings.environment is None
    assert settings.at_secure is None
    assert [gap.cause for gap in settings.gaps] == ["initial_stack_missing"]
    settings = process({"MALLOC_ARENA_MAX": "2"}, layout=None)
    assert settings.malloc[0].values == ()
    assert effect(settings, "MALLOC_ARENA_MAX") == (Effect.UNKNOWN, None)
    settings = process({"MALLOC_ARENA_MAX": "2"}, layout="9.99", arena_max=2)
    setting = settings.malloc[0].setting("top_pad")
    assert setting is not None
    assert (setting.default, setting.is_default, setting.set_by) == (None, None, SetBy.UNKNOWN)


def test_numbers_are_read_as_glibc_reads_them() -> None:
    for text, number in (
        ("12", 12),
        ("0x20", 32),
        ("010", 8),
        ("-1", -1),
        (" 7", 7),
        ("64K", 64),
        ("", None),
        ("k", None),
    ):
        assert number_of(text) == number


def test_a_hostile_environment_is_bounded() -> None:
    many = {f"TCMALLOC_{number}": "x" * 100_000 for number in range(1000)}
    many["GLIBC_TUNABLES"] = ":".join(f"glibc.malloc.arena_max={number}" for number in range(100_000))
    settings = process(many)
    assert settings.environment is not None
    assert len(settings.environment) == 256
    assert all(len(entry.value) <= 4096 for entry in settings.environment)


JAVA = "/usr/lib/jvm/jdk/bin/java"


def test_the_options_of_a_jvm() -> None:
    arguments = (
        *(JAVA, "-cp", "-Xmx9g", "-Xms512m", "-XX:MaxHeapSize=3g", "-Xmx2g", "-Xss1024k", "-XX:ThreadStackSize=2048"),
        *(
            "-XX:MaxDirectMemorySize=64M",
            "-XX:+UseG1GC",
            "-XX:NativeMemoryTracking=summary",
            "-Dsecret=hunter2",
            "@more",
        ),
        *("-XX:MaxMetaspaceSize=lots", "com.example.Main", "-Xmx77g"),
    )
    settings = process({"_JAVA_OPTIONS": "-XX:ReservedCodeCacheSize=240m"}, arguments=arguments)
    java = settings.java
    assert java is not None
    assert java.options is not None
    sizes = {option.name: option.byte_count for option in java.options if option.is_effective}
    assert sizes == {
        "-Xmx": 2 << 30,
        "-Xms": 512 << 20,
        "-XX:ThreadStackSize": 2 << 20,
        "-XX:MaxDirectMemorySize": 64 << 20,
        "-XX:UseG1GC": None,
        "-XX:NativeMemoryTracking": None,
        "-XX:MaxMetaspaceSize": None,
        "-XX:ReservedCodeCacheSize": 240 << 20,
    }
    overridden = [(option.name, option.value) for option in java.options if not option.is_effective]
    assert overridden == [("-XX:MaxHeapSize", "3g"), ("-Xss", "1024k")]
    assert java.options_elsewhere == ("@more",)
    assert "hunter2" not in repr(java)


def test_a_jvm_whose_arguments_are_missing() -> None:
    java = process(None, modules=("/opt/jdk/lib/server/libjvm.so",)).java
    assert java is not None
    assert java.options is None
