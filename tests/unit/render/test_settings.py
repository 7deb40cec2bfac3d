"""The settings as JSON, by the schema, and on the page."""

from __future__ import annotations

import json

import jsonschema

from coreheap.render.json_document import SchemaName, json_document, json_text, schema_text
from coreheap.render.page import PageStyle
from coreheap.render.terminal import report_text
from coreheap.settings import (
    Effect,
    EnvironmentSetting,
    JavaOption,
    JavaSettings,
    MallocSettings,
    Reason,
    SetBy,
    Setting,
    Settings,
    SettingUnit,
)
from tests.unit.report_samples import HOSTILE, report

BYTES, COUNT = SettingUnit.BYTES, SettingUnit.COUNT


def settings(**changes: object) -> Settings:
    fields: dict[str, object] = {
        "malloc": (
            MallocSettings(
                0,
                "/lib/libc.so.6",
                (
                    Setting("trim_threshold", BYTES, 802816, 131072, False, SetBy.RATCHET),
                    Setting("top_pad", BYTES, 131072, 131072, True, SetBy.DEFAULT),
                    Setting("arena_max", COUNT, 2, 0, False, SetBy.ENVIRONMENT, "MALLOC_ARENA_MAX"),
                    Setting("thp_pagesize", BYTES, 0, None, None, SetBy.UNKNOWN),
                ),
                2,
                "arena_max is set",
            ),
        ),
        "environment": (
            EnvironmentSetting("MALLOC_ARENA_MAX", "MALLOC_ARENA_MAX", "2", "arena_max", 2, Effect.OBEYED),
            EnvironmentSetting(
                *("GLIBC_TUNABLES", "glibc.malloc.arena_mx", "7", None, 7, Effect.IGNORED, Reason.UNKNOWN_NAME),
                "glibc.malloc.arena_max",
            ),
            EnvironmentSetting("LD_PRELOAD", "LD_PRELOAD", HOSTILE),
        ),
        "at_secure": False,
        "page_bytes": 4096,
        "java": JavaSettings(
            (
                JavaOption("-Xmx", "2g", 2 << 30, "command_line", True),
                JavaOption("-XX:UseG1GC", "+", None, "JAVA_TOOL_OPTIONS", True),
            ),
            (f"@{HOSTILE}",),
        ),
    }
    return Settings(**(fields | changes))  # type: ignore[arg-type]


def section(made: Settings, *, verbose: bool = False) -> str:
    """The settings' part of the page."""
    page = report_text(report(settings=made), PageStyle(width=100, verbose=verbose))
    _, _, rest = page.partition("\nSettings  ")
    return rest.partition("\n\n")[0]


def test_the_document_says_all_and_is_valid() -> None:
    document = json.loads(json_text(report(settings=settings())))
    jsonschema.validate(document, json.loads(schema_text(SchemaName.REPORT)))
    shown = document["settings"]
    assert shown["malloc"][0]["values"][0] == {
        "name": "trim_threshold",
        "unit": "bytes",
        "value": 802816,
        "default": 131072,
        "is_default": False,
        "set_by": "ratchet",
        "source": None,
    }
    assert shown["environment"][1]["meant"] == "glibc.malloc.arena_max"
    assert shown["environment"][1]["reason"] == "unknown_name"
    assert shown["java"]["options"][0]["bytes"] == 2 << 30


def test_unknown_is_null() -> None:
    made = settings(malloc=(), environment=None, at_secure=None, page_bytes=None, java=JavaSettings(None))
    document = json.loads(json_text(report(settings=made)))
    jsonschema.validate(document, json.loads(schema_text(SchemaName.REPORT)))
    assert document["settings"] == {
        "malloc": [],
        "environment": None,
        "at_secure": None,
        "page_bytes": None,
        "java": {"options": None, "options_elsewhere": []},
    }
    assert json_document(report(settings=None))["settings"] is None
    text = section(made)
    assert text.startswith("unknown: mp_ is not in the core")
    assert "is not in the core: what it asked for is unknown" in text


def test_the_page_tells_what_is_not_default() -> None:
    text = section(settings())
    assert text.startswith("2 of malloc's not as the release has them")
    assert "top_pad" not in text
    assert "thp_pagesize" not in text
    assert "environment (MALLOC_ARENA_MAX)" in text
    assert "arena limit 2 (arena_max is set)" in text
    assert "MALLOC_ARENA_MAX=2 is obeyed" in text
    assert "glibc.malloc.arena_mx=7 has no effect: there is no such setting" in text
    assert "JVM -Xmx2g: 2.00 GiB (command line)" in text
    assert "JVM -XX:+UseG1GC (JAVA_TOOL_OPTIONS)" in text
    assert "top_pad" in section(settings(), verbose=True)


def test_text_of_the_process_is_not_obeyed() -> None:
    text = section(settings())
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "evil" in text
