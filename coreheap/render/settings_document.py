"""How malloc and a JVM were set, as the JSON key ``settings``.

Knows: the keys, which are only ever added. Does not know: how any of it was read.
"""

from __future__ import annotations

from coreheap.render.json_values import Json, text_or_null, text_value
from coreheap.settings import EnvironmentSetting, JavaSettings, MallocSettings, Settings


def settings_value(settings: Settings | None) -> Json:
    """The key ``settings`` of the report."""
    if settings is None:
        return None
    return {
        "malloc": [_malloc(malloc) for malloc in settings.malloc],
        "environment": None if settings.environment is None else [_wish(wish) for wish in settings.environment],
        "at_secure": settings.at_secure,
        "page_bytes": settings.page_bytes,
        "java": None if settings.java is None else _java(settings.java),
    }


def _malloc(malloc: MallocSettings) -> Json:
    return {
        "copy": malloc.copy,
        "module": text_or_null(malloc.module),
        "values": [
            {
                "name": setting.name,
                "unit": setting.unit.value,
                "value": setting.value,
                "default": setting.default,
                "is_default": setting.is_default,
                "set_by": setting.set_by.value,
                "source": text_value(setting.source) or None,
            }
            for setting in malloc.values
        ],
        "arena_limit": malloc.arena_limit,
        "arena_limit_reason": text_value(malloc.arena_limit_reason) or None,
    }


def _wish(wish: EnvironmentSetting) -> Json:
    return {
        "variable": text_value(wish.variable),
        "name": text_value(wish.name),
        "value": text_value(wish.value),
        "field": wish.field,
        "requested": wish.requested,
        "effect": None if wish.effect is None else wish.effect.value,
        "reason": None if wish.reason is None else wish.reason.value,
        "meant": text_or_null(wish.meant),
    }


def _java(java: JavaSettings) -> Json:
    return {
        "options": None
        if java.options is None
        else [
            {
                "name": text_value(option.name),
                "value": text_value(option.value),
                "bytes": option.byte_count,
                "source": option.source,
                "is_effective": option.is_effective,
            }
            for option in java.options
        ],
        "options_elsewhere": [text_value(argument) for argument in java.options_elsewhere],
    }
