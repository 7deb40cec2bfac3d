"""What a JVM was told about memory, from its arguments and its environment.

Knows: HotSpot's options about memory, how the java launcher tells its options from the program's, and the order in which
they override each other. Does not know: cores. Only the options named here are looked at: the others, and a Java
program's own arguments, may hold secrets.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from coreheap.settings import JavaOption, JavaSettings

COMMAND_LINE = "command_line"
MOST_OPTIONS = 256
LONGEST_VALUE = 200

_PREFIXED = {"-Xmx": "-Xmx", "-Xms": "-Xms", "-Xmn": "-Xmn", "-Xss": "-Xss"}
_SIZES = (
    "MaxHeapSize",
    "InitialHeapSize",
    "MaxDirectMemorySize",
    "MaxMetaspaceSize",
    "CompressedClassSpaceSize",
    "ReservedCodeCacheSize",
    "ThreadStackSize",
)
_OTHERS = ("MaxRAMPercentage", "InitialRAMPercentage", "MaxRAM", "NativeMemoryTracking")
_SAME = {"-XX:MaxHeapSize": "-Xmx", "-XX:InitialHeapSize": "-Xms", "-XX:ThreadStackSize": "-Xss"}
"""Options that say what another says; the later one of both counts."""
_KIBIBYTES = ("ThreadStackSize",)
"""Sizes that HotSpot counts in KiB."""
_FLAGS = re.compile(r"-XX:([+-])((?:Use[A-Za-z0-9]{1,30}GC)|AlwaysPreTouch|UseLargePages|UseTransparentHugePages)\Z")
_SIZE = re.compile(r"([0-9]{1,20})([kKmMgGtT]?)\Z")
_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}

# Launcher options whose value is the next argument (java(1)).
_TAKE_A_VALUE = frozenset(
    (
        *("-cp", "-classpath", "--class-path", "-p", "--module-path", "--upgrade-module-path", "--add-modules"),
        *("--add-exports", "--add-opens", "--add-reads", "--limit-modules", "--patch-module"),
        *("--enable-native-access", "--source"),
    )
)
_BEGIN_THE_PROGRAM = frozenset(("-jar", "-m", "--module"))

# In the order in which they are read: what comes later counts. Only the launcher reads the second one.
_BEFORE, _OF_LAUNCHER, _AFTER = "JAVA_TOOL_OPTIONS", "JDK_JAVA_OPTIONS", "_JAVA_OPTIONS"


def java_settings(
    module_paths: Iterable[str], arguments: Sequence[str] | None, environment: Mapping[str, str] | None
) -> JavaSettings | None:
    """The options about memory of a process with libjvm.so or of the java launcher; None for any other process.

    ``arguments`` and ``environment`` are None where the core does not hold them.
    """
    launched = bool(arguments) and _file_name(arguments[0]) == "java" if arguments else False
    if not launched and not any(_file_name(path).startswith("libjvm.so") for path in module_paths):
        return None
    if arguments is None or environment is None:
        return JavaSettings(None)
    found: list[JavaOption] = []
    elsewhere: list[str] = []
    _collect(environment.get(_BEFORE, "").split(), _BEFORE, found, elsewhere)
    if launched:
        _collect(environment.get(_OF_LAUNCHER, "").split(), _OF_LAUNCHER, found, elsewhere)
        _collect(_launcher_options(arguments[1:]), COMMAND_LINE, found, elsewhere)
    else:
        # A program with a JVM inside gives it options in its own way.
        elsewhere.append(_file_name(arguments[0])[:LONGEST_VALUE] if arguments else "")
    _collect(environment.get(_AFTER, "").split(), _AFTER, found, elsewhere)
    return JavaSettings(tuple(_marked(found[:MOST_OPTIONS])), tuple(elsewhere[:MOST_OPTIONS]))


def _file_name(path: str) -> str:
    return path.rpartition("/")[2]


def _launcher_options(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments that are the JVM's: those before the main class or the jar file."""
    is_value = False
    for argument in arguments:
        if is_value:
            is_value = False
        elif argument in _BEGIN_THE_PROGRAM or not argument.startswith(("-", "@")):
            return
        else:
            is_value = argument in _TAKE_A_VALUE
            yield argument


def _collect(arguments: Iterable[str], source: str, found: list[JavaOption], elsewhere: list[str]) -> None:
    for argument in arguments:
        if argument.startswith(("@", "-XX:Flags=", "-XX:VMOptionsFile=")):
            elsewhere.append(argument[:LONGEST_VALUE])
        elif (option := _option(argument, source)) is not None:
            found.append(option)


def _option(argument: str, source: str) -> JavaOption | None:
    for prefix, name in _PREFIXED.items():
        if argument.startswith(prefix):
            value = argument[len(prefix) :][:LONGEST_VALUE]
            return JavaOption(name, value, _size(value), source, True)
    flag = _FLAGS.match(argument)
    if flag is not None:
        return JavaOption(f"-XX:{flag.group(2)}", flag.group(1), None, source, True)
    if not argument.startswith("-XX:"):
        return None
    name, equals, value = argument[4:].partition("=")
    value = value[:LONGEST_VALUE]
    if not equals or name not in (*_SIZES, *_OTHERS):
        return None
    size = _size(value) if name in _SIZES or name == "MaxRAM" else None
    if size is not None and name in _KIBIBYTES:
        size <<= 10
    return JavaOption(f"-XX:{name}", value, size, source, True)


def _size(text: str) -> int | None:
    """A size as HotSpot reads it: a number and at most one letter, k, m, g or t."""
    match = _SIZE.match(text)
    return None if match is None else int(match.group(1)) << _SHIFTS[match.group(2).lower()]


def _marked(options: Sequence[JavaOption]) -> list[JavaOption]:
    """The options with the overridden ones marked."""
    last = {_SAME.get(option.name, option.name): number for number, option in enumerate(options)}
    return [
        replace(option, is_effective=last[_SAME.get(option.name, option.name)] == number)
        for number, option in enumerate(options)
    ]
