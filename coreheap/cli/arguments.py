"""From the words of a command line to a ``Request``.

Knows: commands, options and their help. Does not know: what a command does. Nothing heavy is imported here, so that
``--help`` and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import functools
import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NoReturn

from rich_argparse import RawDescriptionRichHelpFormatter

from coreheap.cli.command_texts import COMMANDS
from coreheap.errors import UsageError
from coreheap.quantities import parse_address, parse_bytes

SEVERITIES = ("info", "warning", "error")
"""Equal to ``report.Severity``, which is not imported for the sake of speed; a test compares them."""

CHUNK_STATES = (
    "in_use",
    "tcache",
    "fastbin",
    "unsorted_bin",
    "small_bin",
    "large_bin",
    "top",
    "fencepost",
    "allocator_own",
    "free_unlisted",
    "damaged",
)
"""Equal to the labels of ``heap.ChunkState``; a test compares them."""

VERDICTS = ("definitely_lost", "indirectly_lost", "possibly_lost", "weakly_held", "still_reachable")
"""Equal to the labels of ``leaks.Verdict``; a test compares them."""

HEURISTICS = (
    "new_array",
    "second_base",
    "constant_offset",
    "length_prefix",
    "exception_pointer",
    "high_tag",
    "low_tag",
    "shifted",
    "byte_swapped",
    "unaligned",
    "compressed",
    "halves",
    "signal_stack",
)
"""Equal to the labels of ``leaks.OPTIONAL_HEURISTICS``; a test compares them."""

TABLE_COMMANDS = ("arenas", "heaps", "chunks", "bins", "threads", "maps", "leaks", "top")
"""Commands that write rows: text, JSON lines or CSV."""
ADDRESS_COMMANDS = ("explain", "owners")
"""Commands that answer for addresses: text, or a JSON line for each."""

FAIL_ON_COMMANDS = ("analyze", "check")
"""Commands with findings, whose exit code --fail-on decides."""

REFERENCE_COMMANDS = ("leaks", "explain", "owners", "top")
"""Commands that need the reference graph."""

RESIDENCY_COMMANDS = ("analyze", "maps", "threads")
"""Commands that show what was in memory: for some cores all saved memory is read to know."""

MAPPING_KINDS = (
    "main_arena",
    "arena_heap",
    "arena_reserve",
    "mmapped_chunk",
    "foreign_sbrk",
    "main_stack",
    "thread_stack",
    "stack_guard",
    "signal_stack",
    "ended_stack",
    "unjoined_stack",
    "tls",
    "module_text",
    "module_rodata",
    "module_data",
    "module_bss",
    "mapped_file",
    "shared_memory",
    "kernel_pages",
    "java_heap",
    "java_metaspace",
    "java_code_cache",
    "java_gc",
    "other_allocator",
    "tool_memory",
    "no_access",
    "unexplained",
)
"""Equal to the values of ``mappings.MappingKind``; a test compares them."""

KIND_COLUMNS = (
    "kind",
    "count",
    "reserved_bytes",
    "committed_bytes",
    "saved_bytes",
    "resident_low_bytes",
    "resident_high_bytes",
)
MAPPING_COLUMNS = (
    "address",
    "end_address",
    "permissions",
    "kind",
    "thread",
    "lwp",
    "arena",
    "name",
    *KIND_COLUMNS[2:],
)
"""The columns of ``maps``, grouped and with --flat, equal to those of ``render.maps``; a test compares them."""

DEEPEST = 16
WIDEST = 1000
"""Limits of ``owners``: a tree of more is no answer."""


class OutputFormat(Enum):
    """How the result is written."""

    TEXT = "text"
    JSON = "json"
    CSV = "csv"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. None means: not said.

    ``verbosity`` is 0, more with -v, less with -q. ``states`` are labels of chunk states; byte limits apply to
    chunk_bytes and are inclusive. ``verdicts`` are labels of verdicts, ``lists_chunks`` asks for rows of single chunks.
    """

    command: str
    core: str
    output: str | None = None
    format: OutputFormat = OutputFormat.TEXT
    color: bool = True
    verbosity: int = 0
    executable: str | None = None
    sysroot: str | None = None
    debug_directories: tuple[str, ...] = ()
    debuginfod: bool = False
    max_unpacked: int | None = None
    top: int | None = None
    fail_on: str | None = None
    strict: bool = False
    states: tuple[str, ...] = ()
    arena: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    leaks: bool = False
    retained: bool = False
    low_memory: bool = False
    heuristics: tuple[str, ...] | None = None
    verdicts: tuple[str, ...] = ()
    lists_chunks: bool = False
    addresses: tuple[int, ...] = ()
    depth: int | None = None
    limit: int | None = None
    kinds: tuple[str, ...] = ()
    sort: str | None = None
    descending: bool = False
    flat: bool = False


_EXIT_CODES = (
    "  0   done",
    "  1   findings at or above --fail-on",
    "  2   usage, or the output cannot be written",
    "  3   the input is not usable",
    "  4   a partial result, under --strict",
    "  70  a defect of coreheap",
    "  75  this machine lacks room, memory or files: try again elsewhere",
)


class _HelpFormatter(RawDescriptionRichHelpFormatter):
    """Help whose texts are shown as they stand: brackets in them are not markup."""

    text_markup = False
    help_markup = False
    group_name_formatter = str.capitalize


class _Parser(argparse.ArgumentParser):
    """A parser that raises ``UsageError`` instead of printing and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, next_step=f"see {self.prog} --help")


class _ShowVersion(argparse.Action):
    """Prints the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from coreheap.version import VERSION

        print(f"coreheap {VERSION}")
        parser.exit()


def parse_arguments(words: Sequence[str]) -> Request:
    """The request that a command line says.

    Raises UsageError where it makes no sense, and SystemExit after ``--help`` and ``--version``.
    """
    parser = _parser()
    if words and not words[0].startswith("-") and words[0] not in COMMANDS and os.path.isfile(words[0]):
        raise UsageError(
            f"{words[0]!r} is a file, not a command",
            expected=f"one of {', '.join(COMMANDS)}",
            next_step=f"coreheap analyze {words[0]}",
        )
    spoken = parser.parse_args(words)
    if spoken.command is None:
        raise UsageError("no command was given", next_step="coreheap analyze CORE, or coreheap --help")
    return Request(
        command=spoken.command,
        core=spoken.core,
        output=None if spoken.output in (None, "-") else spoken.output,
        format=OutputFormat(spoken.format),
        color=spoken.color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
        verbosity=spoken.verbose - spoken.quiet,
        executable=spoken.exe,
        sysroot=spoken.sysroot,
        debug_directories=tuple(spoken.debug_dir),
        debuginfod=spoken.debuginfod,
        max_unpacked=spoken.max_unpacked,
        top=spoken.top,
        fail_on=getattr(spoken, "fail_on", None),
        strict=spoken.strict,
        states=_words(getattr(spoken, "state", ()), CHUNK_STATES, "chunk state", "chunks"),
        arena=getattr(spoken, "arena", None),
        min_bytes=getattr(spoken, "min_bytes", None),
        max_bytes=getattr(spoken, "max_bytes", None),
        leaks=getattr(spoken, "leaks", spoken.command in REFERENCE_COMMANDS),
        retained=getattr(spoken, "retained", False),
        low_memory=getattr(spoken, "low_memory", False),
        heuristics=_heuristics(spoken),
        verdicts=_words(getattr(spoken, "verdict", ()), VERDICTS, "verdict", "leaks"),
        lists_chunks=getattr(spoken, "list", False),
        addresses=tuple(getattr(spoken, "addresses", ())),
        depth=getattr(spoken, "depth", None),
        limit=getattr(spoken, "limit", None),
        kinds=_words(getattr(spoken, "kind", ()), MAPPING_KINDS, "kind of mapping", "maps"),
        sort=_sort_column(spoken),
        descending=getattr(spoken, "descending", False),
        flat=getattr(spoken, "flat", False),
    )


def _heuristics(spoken: argparse.Namespace) -> tuple[str, ...] | None:
    """The heuristics that were asked for, None where nothing was said of them."""
    if getattr(spoken, "strict_pointers", False):
        return ()
    wanted = getattr(spoken, "heuristics", None)
    return None if wanted is None else _words(wanted, HEURISTICS, "heuristic", "leaks")


def _sort_column(spoken: argparse.Namespace) -> str | None:
    """The column to sort by. Raises UsageError for one that the rows do not have."""
    column = getattr(spoken, "sort", None)
    if column is None:
        if getattr(spoken, "descending", False):
            raise UsageError("--descending says nothing without --sort", next_step="--sort COLUMN --descending")
        return None
    (word,) = _words([column.replace(",", " ")], MAPPING_COLUMNS if spoken.flat else KIND_COLUMNS, "column", "maps")
    return word


@functools.cache
def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="coreheap",
        description="Reads an ELF core file and says what the native heap looked like when it was dumped.",
        epilog="examples:\n  coreheap analyze core.1234\n  coreheap COMMAND --help\n\n" + _exit_codes("analyze"),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands", prog="coreheap", parser_class=_Parser
    )
    for name, command in COMMANDS.items():
        examples = "".join(f"\n  {line}\n      {meaning}" for line, meaning in command.examples)
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=textwrap.fill(command.description, 78),
            epilog=f"examples:{examples}\n\n{_exit_codes(name)}",
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        _add_options(sub, name)
    return parser


def _exit_codes(command: str) -> str:
    """The exit codes that a command can give, as its help says them."""
    lines = (line for line in _EXIT_CODES if command in FAIL_ON_COMMANDS or "--fail-on" not in line)
    return "\n".join(("exit codes:", *lines))


def _add_options(parser: argparse.ArgumentParser, command: str) -> None:
    parser.add_argument("core", metavar="CORE", help="the core file; .zst, .lz4, .xz and .gz are unpacked")
    is_table, is_asked = command in TABLE_COMMANDS, command in ADDRESS_COMMANDS
    if is_asked:
        address_help = "an address: 0x7f3a10000020, or decimal digits"
        parser.add_argument("addresses", metavar="ADDRESS", nargs="+", type=_worded(_address), help=address_help)
    if command == "chunks":
        _add_chunk_filters(parser)
    elif command == "maps":
        _add_map_options(parser)
    elif command in ("leaks", "analyze", "check", *ADDRESS_COMMANDS):
        _add_reference_options(parser, command)
    result = parser.add_argument_group("result")
    formats = ("text", "json", "csv") if is_table else ("text", "json")
    form = result.add_mutually_exclusive_group()
    form.add_argument("--format", choices=formats, default="text", help="how to write the result (text)")
    json_help = "all rows as JSON lines" if is_table else "the whole report as one JSON document"
    if command == "check":
        json_help = "the result as one JSON document"
    if is_asked:
        json_help = "a JSON line for each address"
    form.add_argument("--json", action="store_const", dest="format", const="json", help=json_help)
    if is_table:
        csv_help = "all rows as CSV with a header line"
        form.add_argument("--csv", action="store_const", dest="format", const="csv", help=csv_help)
    result.add_argument(
        "-o", dest="output", metavar="FILE", help="write to FILE, whole or not at all (standard output)"
    )
    top_help = "rows to show, largest first (50)" if is_table else "arenas to show, largest first (10)"
    if is_asked or command == "check":
        result.set_defaults(top=None)
    else:
        result.add_argument("--top", metavar="N", type=_worded(_positive), help=top_help)
    result.add_argument("--no-color", dest="color", action="store_false", help="no colours; NO_COLOR=1 says the same")
    if command in FAIL_ON_COMMANDS:
        result.add_argument("--fail-on", choices=SEVERITIES, help="exit with 1 when a finding is at least this severe")
    result.add_argument("--strict", action="store_true", help="exit with 4 when the result is partial")
    files = parser.add_argument_group("files of the dumped process")
    files.add_argument(
        "--max-unpacked",
        metavar="SIZE",
        type=_worded(parse_bytes),
        help="bytes that a compressed core may unpack to: 500M, 20GiB (1 GiB and 256 times its own size, pages of zeros"
        " not counted, 1 TiB with them)",
    )
    files.add_argument("--exe", metavar="FILE", help="the executable that was running")
    files.add_argument("--sysroot", metavar="DIR", help="where the process's libraries are, by their own paths")
    files.add_argument(
        "--debug-dir",
        metavar="DIR",
        action="append",
        default=[],
        help="where separate debug files are; may be given several times",
    )
    files.add_argument(
        "--debuginfod",
        action="store_true",
        help="ask the servers in DEBUGINFOD_URLS for libc's symbols where no file here has them",
    )
    talk = parser.add_argument_group("messages")
    talk.add_argument("-v", "--verbose", action="count", default=0, help="more: all lists, costs, tracebacks")
    talk.add_argument("-q", "--quiet", action="count", default=0, help="no progress and no warnings")


def _add_chunk_filters(parser: argparse.ArgumentParser) -> None:
    filters = parser.add_argument_group("filters (all must hold)")
    filters.add_argument(
        "--state",
        metavar="STATE",
        action="append",
        default=[],
        help="only chunks of these states, separated by commas or given repeatedly: " + ", ".join(CHUNK_STATES),
    )
    filters.add_argument(
        "--arena", metavar="N", type=_worded(_natural), help="only chunks of the arena with this index"
    )
    for option, meaning in (("--min-bytes", "at least"), ("--max-bytes", "at most")):
        filters.add_argument(
            option,
            metavar="SIZE",
            type=_worded(parse_bytes),
            help=f"only chunks of {meaning} this many bytes, header included: 4096, 64K, 1.5MiB",
        )
    group = parser.add_argument_group("leaks")
    group.add_argument("--leaks", action="store_true", help="look for leaks; rows then have a verdict")
    _add_low_memory(group)


def _add_map_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rows")
    group.add_argument("--flat", action="store_true", help="a row for each mapping, with its owner, not for each kind")
    group.add_argument(
        "--kind",
        metavar="KIND",
        action="append",
        default=[],
        help="only these kinds, separated by commas or given repeatedly: " + ", ".join(MAPPING_KINDS),
    )
    group.add_argument(
        "--sort",
        metavar="COLUMN",
        help="sort by a column: " + ", ".join(KIND_COLUMNS) + "; with --flat " + ", ".join(MAPPING_COLUMNS),
    )
    group.add_argument("--descending", action="store_true", help="the other way round: the largest first")


def _add_low_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--low-memory",
        action="store_true",
        help="look for leaks without holding all references in memory: about a third of it, in two to four times the time",
    )
    _add_heuristics(group)


def _add_heuristics(group: argparse._ArgumentGroup) -> None:
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--strict-pointers",
        action="store_true",
        help="only plain pointers to starts hold blocks: no known patterns (new[], second bases, wrappers' headers), no encoded"
        " addresses",
    )
    choice.add_argument(
        "--heuristics",
        metavar="NAME",
        action="append",
        help="only these patterns and forms of pointers, separated by commas or given repeatedly (all): "
        + ", ".join(HEURISTICS),
    )


def _add_reference_options(parser: argparse.ArgumentParser, command: str) -> None:
    group = parser.add_argument_group("leaks" if command in ("leaks", "analyze", "check") else "references")
    if command == "check":
        group.add_argument(
            "--leaks", action="store_true", help="look for leaks as well: slower, and names who holds damaged blocks"
        )
        _add_low_memory(group)
    elif command == "analyze":
        group.add_argument(
            "--no-leaks", dest="leaks", action="store_false", help="do not look for leaks; that saves time and memory"
        )
        group.add_argument(
            "--retained",
            action="store_true",
            help="compute what each chunk keeps alive, and find containers that grew, also where that takes long",
        )
        group.set_defaults(leaks=True)
        _add_low_memory(group)
    elif command == "leaks":
        group.add_argument("--list", action="store_true", help="a row for each chunk, not for each group")
        _add_low_memory(group)
        group.add_argument(
            "--verdict",
            metavar="VERDICT",
            action="append",
            default=[],
            help="only these verdicts, separated by commas or given repeatedly: " + ", ".join(VERDICTS),
        )
    elif command == "explain":
        group.add_argument(
            "--limit", metavar="N", type=_worded(_up_to(WIDEST)), help="holders and targets to tell of each (20)"
        )
        group.add_argument("--retained", action="store_true", help="compute what would go with each chunk")
        _add_heuristics(group)
    else:
        group.add_argument("--depth", metavar="N", type=_worded(_up_to(DEEPEST)), help="levels of owners (3)")
        group.add_argument("--limit", metavar="N", type=_worded(_up_to(WIDEST)), help="owners of each chunk (10)")
        _add_heuristics(group)


def _worded(convert: Callable[[str], int]) -> Callable[[str], int]:
    """``convert`` for argparse, with the message of its ValueError kept."""

    def converted(text: str) -> int:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converted


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a number from 0 on")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise ValueError(f"{text!r} is not a number from 1 on")
    return int(text)


def _up_to(limit: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= limit and len(text) < 9):
            raise ValueError(f"{text!r} is not a number from 1 to {limit}")
        return int(text)

    return number


def _address(text: str) -> int:
    """An address: decimal digits alone, else hex with 0x, or hex digits of which one is a letter."""
    if text.isascii() and text.isdigit() and len(text) <= 20 and int(text) < 1 << 64:
        return int(text)
    return parse_address(text)


def _words(spoken: Sequence[str], known: Sequence[str], what: str, command: str) -> tuple[str, ...]:
    """Words of a list, separated by commas or given repeatedly. Raises UsageError for one that is not known."""
    said = [word.strip().lower().replace("-", "_") for words in spoken for word in words.split(",")]
    for word in said:
        if word not in known:
            raise UsageError(
                f"there is no {what} {word!r}",
                expected=f"one of {', '.join(known)}",
                next_step=f"see coreheap {command} --help",
            )
    return tuple(dict.fromkeys(said))
