"""One trial: everything that coreheap can do with one core, and what may never happen meanwhile.

Works inside the process that calls it; ``runner`` puts limits of time and memory around it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pkgutil
import random
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema

import coreheap
from coreheap import analysis
from coreheap.analysis import AnalysisOptions, analyze_with_references
from coreheap.cli import main, pipeline
from coreheap.cli.arguments import parse_arguments
from coreheap.errors import CoreheapError, InputNotUsable
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.report import Report

UNPACKED_LIMIT = 64 << 20
EXIT_CODES = frozenset({0, 1, 2, 3, 4})
"""What the contract allows; 70 is a defect."""
TABLES = ("arenas", "heaps", "bins", "threads", "maps", "maps --flat", "chunks", "leaks", "leaks --list", "top")
FORMATS = ("", " --json", " --csv")
OPENED_OUTSIDE: list[str] = []
"""Files that were opened although nothing led there; filled by ``watch_opened_files``."""


# All of it, before children are made: they share what is loaded, and sources may change meanwhile.
for _module in pkgutil.walk_packages(coreheap.__path__, "coreheap."):
    if _module.name not in ("coreheap.__main__", "coreheap.kernels._compiled", "coreheap.corefile._bus_guard"):
        importlib.import_module(_module.name)


class Failure(Exception):
    """What may not happen. ``signature`` is the same for failures of one cause."""

    def __init__(self, kind: str, signature: str, detail: str) -> None:
        super().__init__(signature)
        self.kind = kind
        self.signature = signature
        self.detail = detail


def failure_of(error: BaseException, kind: str = "traceback") -> Failure:
    """The failure that an exception is: its signature is the innermost place in coreheap."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/coreheap/" in frame.filename]
    place = f"{frames[-1].filename.rpartition('/coreheap/')[2]}:{frames[-1].name}" if frames else "outside"
    text = "".join(traceback.format_exception(error))
    return Failure(kind, f"{kind} {type(error).__name__} {place}", text[-6000:])


def try_core(path: Path, sysroot: Path | None, source: random.Random) -> str:
    """Open, analyse, show, ask about addresses. Returns what came out: refused, no heap, whole or partial.

    Raises Failure.
    """
    OPENED_OUTSIDE.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            outcome = _analysed(path, sysroot, source)
        except InputNotUsable as error:
            outcome = "refused"
            _check_error(error, path)
        except Failure:
            raise
        except BaseException as error:
            raise failure_of(error) from error
    if OPENED_OUTSIDE:
        raise Failure("outside", "a file was opened that nothing allows", "\n".join(OPENED_OUTSIDE[:20]))
    return outcome


def _analysed(path: Path, sysroot: Path | None, source: random.Random) -> str:
    with coreheap.open(path, sysroot=sysroot, unpacked_limit=UNPACKED_LIMIT) as core:
        report, references = analyze_with_references(core, AnalysisOptions(retained=source.random() < 1 / 4))
        if report.defects:
            raise Failure("defect", f"defect {report.defects[0][:80]}", "\n".join(report.defects))
        memory_gaps = [gap.consequence for gap in report.gaps if "enough memory" in gap.consequence]
        if memory_gaps:
            raise Failure("memory", "memory: a search was given up", "\n".join(memory_gaps))
        explorer = pipeline.Explorer(core, references)
        with _answering(report, explorer):
            _show(report, path, source)
    if report.heap is None:
        return "no heap"
    return "partial" if report.is_partial else "whole"


def _show(report: Report, path: Path, source: random.Random) -> None:
    if source.random() < 1 / 4:
        document = json.loads(_shown(path, "analyze", " --json", report))
        if source.random() < 1 / 8:
            _validate(document, SchemaName.REPORT)
    if source.random() < 1 / 8:
        _shown(path, "analyze", source.choice(("", " -v")), report)
    if source.random() < 1 / 8:
        _shown(path, "check", source.choice(("", " -v", " --json")), report)
    if source.random() < 1 / 2:
        form = source.choice(FORMATS)
        text = _shown(path, source.choice(TABLES), form, report)
        if form == " --json":
            rows = text.splitlines()
            for row in rows[:20] + rows[-20:]:
                json.loads(row)
    if source.random() < 3 / 4:
        return
    addresses = " ".join(hex(address) for address in _addresses(report, source))
    command = source.choice(("explain", "explain", "owners", "explain --retained"))
    words = command.split()
    _shown(path, words[0], f" {addresses} {' '.join(words[1:])} {source.choice(('', '--json'))}", report)


def _addresses(report: Report, source: random.Random) -> list[int]:
    """Some addresses to ask about: of chunks, of arenas, and any."""
    found = [source.getrandbits(8 * report.process.word_bytes), 0, (1 << 8 * report.process.word_bytes) - 1]
    if report.heap is not None:
        found += [arena.address for arena in report.heap.arenas[:2] if arena.address is not None]
        for batch in report.heap.chunks.batches():
            found += source.sample(batch.payload_address.tolist(), min(4, len(batch.payload_address)))
            break
    if report.mappings is not None and len(report.mappings):
        found.append(int(report.mappings.start[source.randrange(len(report.mappings))]))
    return source.sample(found, min(4, len(found)))


@contextlib.contextmanager
def _answering(report: Report, explorer: pipeline.Explorer) -> Iterator[None]:
    """Commands get this report instead of making their own."""

    @contextlib.contextmanager
    def analyzed(request: object, progress: object) -> Iterator[Report]:
        yield report

    @contextlib.contextmanager
    def explored(request: object, progress: object) -> Iterator[tuple[Report, pipeline.Explorer]]:
        yield report, explorer

    with mock.patch.multiple(pipeline, analyzed=analyzed, explored=explored):
        yield


class _Captured(io.TextIOWrapper):
    """A standard output that is kept."""

    def __init__(self) -> None:
        self.content = io.BytesIO()
        super().__init__(self.content, encoding="utf-8", errors="strict", write_through=True)


def _shown(path: Path, command: str, words: str, report: Report) -> str:
    """What a command writes; its exit code and its characters are checked."""
    from coreheap.cli.commands import run

    name, *options = command.split()
    arguments = [name, str(path), *options, *words.split()]
    stdout, stderr = _Captured(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = run(parse_arguments(arguments))
    if code not in EXIT_CODES:
        raise Failure("exit code", f"exit code {code} of {name}", f"{arguments}: {code}; {stderr.getvalue()[-2000:]}")
    text = stdout.content.getvalue().decode()
    _check_characters(text, " ".join(arguments[:1] + arguments[2:]))
    _check_characters(stderr.getvalue(), f"standard error of {name}")
    return text


def _check_characters(text: str, where: str) -> None:
    """No character that a terminal would obey, whatever the core's texts are."""
    if text.isascii():
        bad = {character for character in set(text) if not character.isprintable() and character != "\n"}
    else:
        bad = {c for c in set(text) if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    if bad:
        place = text.index(next(iter(bad)))
        raise Failure("characters", f"characters in {where.split()[0]}", f"{where}: {text[place - 80 : place + 80]!r}")


def _check_error(error: CoreheapError, path: Path) -> None:
    """A refusal says what was expected, what was found, and what to do; and the command ends with code 3."""
    if not (error.message and error.where and error.expected and error.found and error.next_step):
        raise failure_of(error, "unclear error")
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = main(["analyze", str(path), "--no-leaks", "--max-unpacked", str(UNPACKED_LIMIT)])
    if code != 3 or "Traceback" in stderr.getvalue() or "defect" in stderr.getvalue():
        raise Failure("exit code", f"exit code {code} for {error.message}", stderr.getvalue())
    _check_characters(stderr.getvalue(), "standard error")


@cache
def _validator(name: SchemaName) -> Any:
    schema = json.loads(schema_text(name))
    return jsonschema.validators.validator_for(schema)(schema)


def _validate(document: object, name: SchemaName) -> None:
    for problem in _validator(name).iter_errors(document):
        raise Failure("schema", f"schema {problem.schema_path}", f"{problem.json_path}: {problem.message[:500]}")


def let_defects_through() -> None:
    """Parts of the analysis raise what goes wrong in them, so that a failure has its traceback."""

    def answer(name: str, question: Any, defects: list[str]) -> Any:
        return question()

    mock.patch.object(analysis, "_answer", answer).start()


def watch_opened_files(allowed: tuple[str, ...]) -> None:
    """From here on, note each file that is opened outside of the folders in ``allowed``."""

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            name = arguments[0] if isinstance(arguments[0], str) else arguments[0].decode(errors="replace")
            if not name.startswith(allowed):
                OPENED_OUTSIDE.append(name)

    sys.addaudithook(note)
