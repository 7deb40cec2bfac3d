"""The command from its arguments to its exit code: what is printed where, and what callers are told."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import coreheap
from coreheap.cli import main, pipeline
from coreheap.cli.arguments import CHUNK_STATES, HEURISTICS, SEVERITIES, VERDICTS, Request
from coreheap.errors import CoreheapError, FailedHere, InputNotUsable, MemoryFault, UnsupportedCore, UsageError
from coreheap.heap import ChunkState
from coreheap.leaks import OPTIONAL_HEURISTICS, Verdict
from coreheap.render.json_document import SchemaName, schema_text
from coreheap.report import Report, Severity
from tests.core_builder import CoreBuilder, elf_image
from tests.unit import report_samples

TABLES = ("arenas", "heaps", "chunks", "bins", "threads")
REFERENCE_COMMANDS = ("leaks", "explain", "owners", "top")
Answer = Callable[[Report | BaseException], None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Answer:
    """``answer(report)``: what the analysis will give; an exception will be raised."""

    def prepare(result: Report | BaseException) -> None:
        @contextmanager
        def analyzed(request: Request, progress: pipeline.Progress) -> Iterator[Report]:
            progress("reading", 1, None)
            if isinstance(result, BaseException):
                raise result
            yield result

        monkeypatch.setattr(pipeline, "analyzed", analyzed)

    return prepare


@pytest.mark.parametrize(
    ("report", "options", "code"),
    [
        (report_samples.small_report(), [], 0),
        (report_samples.small_report(), ["--strict", "--fail-on", "info"], 0),
        (report_samples.report(), [], 0),
        (report_samples.report(), ["--fail-on", "error"], 0),
        (report_samples.report(), ["--fail-on", "warning"], 1),
        (report_samples.report(), ["--fail-on", "info"], 1),
        (report_samples.report(), ["--strict"], 4),
        (report_samples.report(), ["--strict", "--fail-on", "info"], 4),
        (report_samples.heapless_report(), [], 0),
        (report_samples.damaged_report(), [], 70),
        (report_samples.damaged_report(), ["--strict", "--fail-on", "info"], 70),
        (InputNotUsable("not a core", where="x", expected="ELF", found="text", next_step="look"), [], 3),
        (UnsupportedCore("a machine that nobody knows"), [], 3),
        (MemoryFault(0x1000, "not_saved"), [], 3),
        (UsageError("no such folder"), [], 2),
        (FailedHere("no room", where="/tmp", expected="more", found="less", next_step="TMPDIR"), [], 75),
        (MemoryError(), [], 75),
        (OSError(errno.EMFILE, "Too many open files"), ["-q"], 75),
        (KeyboardInterrupt(), [], 130),
        (ValueError("surprise"), [], 70),
        (RecursionError(), ["-q"], 70),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_exit_codes(
    answer: Answer,
    capsys: pytest.CaptureFixture[str],
    report: Report | BaseException,
    options: list[str],
    code: int,
    form: list[str],
) -> None:
    answer(report)
    assert main(["analyze", "core", *form, *options]) == code
    written = capsys.readouterr()
    assert "Traceback" not in written.err
    if isinstance(report, BaseException):
        assert not written.out
        assert written.err.startswith("coreheap: ")
    elif form:
        json.loads(written.out)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["analyse", "core"],
        ["analyze"],
        ["analyze", "core", "--csv"],
        ["analyze", "core", "--format", "markdown"],
        ["analyze", "core", "--fail-on", "fatal"],
        ["analyze", "core", "--state", "in_use"],
        ["analyze", "core", "--str"],
        ["arenas", "core", "--json", "--csv"],
        ["arenas", "core", "--top", "0"],
        ["arenas", "core", "--top", "many"],
        ["arenas", "core", "--fail-on", "info"],
        ["check", "core", "--csv"],
        ["check", "core", "--top", "3"],
        ["check", "core", "--retained"],
        ["check", "core", "--fail-on", "none"],
        ["chunks", "core", "--state", "lost"],
        ["chunks", "core", "--min-bytes", "12 parsecs"],
        ["chunks", "core", "--arena", "-1"],
        ["analyze", "core", "-o", "/no/such/folder/report"],
        ["analyze", "core", "-o", "/"],
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_error(
    answer: Answer, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    answer(AssertionError("must not get this far"))
    assert main(words) == 2
    written = capsys.readouterr()
    assert not written.out
    assert written.err.startswith("coreheap: error: ")
    assert "next step: " in written.err


def test_a_file_without_a_command_gets_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    core = tmp_path / "core.1"
    core.touch()
    assert main([str(core)]) == 2
    assert f"next step: coreheap analyze {core}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "analyze", "check", *TABLES, *REFERENCE_COMMANDS])
def test_help_teaches_by_examples(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([*filter(None, [command]), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count(f"  coreheap {command or 'analyze'} core.1234") >= (2 if command else 1)
    assert "exit codes" in text
    assert "markdown" not in text


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("coreheap ")


def test_an_error_says_what_where_and_what_to_do(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(
        InputNotUsable(
            "is no\x1b[2J core file", where="a\nb", expected="an ELF file", found="gzip", next_step="unpack it"
        )
    )
    assert main(["analyze", "a\nb"]) == 3
    assert capsys.readouterr().err.splitlines() == [
        "coreheap: error: a\\nb: is no\\x1b[2J core file",
        "  expected: an ELF file",
        "  found: gzip",
        "  next step: unpack it",
    ]


def test_a_defect_is_one_line_and_v_shows_the_traceback(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(ZeroDivisionError("a\nb"))
    assert main(["analyze", "core"]) == 70
    assert capsys.readouterr().err == (
        "coreheap: defect: ZeroDivisionError: a\\nb; -v shows the traceback; please report it\n"
    )
    answer(ZeroDivisionError("a\nb"))
    assert main(["analyze", "core", "-v"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_one_line(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(KeyboardInterrupt())
    assert main(["chunks", "core", "--csv"]) == 130
    assert capsys.readouterr() == ("", "coreheap: interrupted\n")


@pytest.mark.parametrize("sample", ["report", "small_report", "heapless_report", "damaged_report", "corrupt_report"])
def test_json_documents_validate(answer: Answer, capsys: pytest.CaptureFixture[str], sample: str) -> None:
    answer(getattr(report_samples, sample)())
    main(["analyze", "core", "--json"])
    Draft202012Validator(json.loads(schema_text(SchemaName.REPORT))).validate(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("sample", ["report", "small_report", "heapless_report", "damaged_report"])
@pytest.mark.parametrize("command", TABLES)
def test_rows_validate_and_csv_has_the_same_names(
    answer: Answer, capsys: pytest.CaptureFixture[str], command: str, sample: str
) -> None:
    answer(getattr(report_samples, sample)())
    main([command, "core", "--json", "-q"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    validator = Draft202012Validator(json.loads(schema_text(SchemaName.ROW)))
    for row in rows:
        validator.validate(row)
    main([command, "core", "--csv", "-q"])
    lines = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert len(lines) == len(rows) + 1
    for row in rows:
        assert lines[0] == list(row)


@pytest.mark.parametrize("command", ["analyze", *TABLES])
def test_text_that_goes_to_no_terminal_is_plain(
    answer: Answer, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    answer(report_samples.report())
    assert main([command, "core"]) == 0
    written = capsys.readouterr()
    assert written.out
    assert "\x1b" not in written.out
    assert "\x1b" not in written.err


@pytest.mark.parametrize("command", TABLES)
def test_a_table_of_a_partial_result_is_not_silent_about_it(
    answer: Answer, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    answer(report_samples.report())
    assert main([command, "core", "--json"]) == 0
    assert "coreheap: warning: partial result, 2 gaps" in capsys.readouterr().err
    assert main([command, "core", "--json", "-q", "--strict"]) == 4
    assert capsys.readouterr().err == ""
    answer(report_samples.heapless_report())
    assert main([command, "core", "--json"]) == 0
    assert "no glibc heap" in capsys.readouterr().err


def test_chunk_filters_reach_the_rows(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    answer(report_samples.report())

    def sizes(*options: str) -> list[int]:
        assert main(["chunks", "core", "--json", "-q", *options]) == 0
        return [json.loads(line)["chunk_bytes"] for line in capsys.readouterr().out.splitlines()]

    assert sizes() == [32, 48, 64, 4096, 1040, 80, 32, 135168, 4198400]
    assert sizes("--state", "in-use,TCACHE", "--state", "top") == [32, 48, 64, 1040, 32, 135168, 4198400]
    assert sizes("--arena", "1") == [1040, 80, 32]
    assert sizes("--min-bytes", "1KiB", "--max-bytes", "4k") == [4096, 1040]
    assert sizes("--top", "2") == [4198400, 135168]
    assert sizes("--leaks") == sizes()
    assert main(["chunks", "core", "--arena", "99"]) == 2
    assert "expected: one of 0 to 12" in capsys.readouterr().err


def test_names_known_to_the_parser_are_those_of_the_heap_and_the_report() -> None:
    assert tuple(state.label for state in ChunkState) == CHUNK_STATES
    assert tuple(severity.value for severity in Severity) == SEVERITIES
    assert {verdict.label for verdict in Verdict if verdict is not Verdict.NONE} == set(VERDICTS)
    assert {heuristic.label for heuristic in OPTIONAL_HEURISTICS} == set(HEURISTICS)


def test_the_users_words_reach_the_analysis(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    seen: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e").write_bytes(elf_image())
    for folder in ("s", "a", "b"):
        (tmp_path / folder).mkdir()

    @contextmanager
    def opened(path: str, **words: object) -> Iterator[str]:
        seen.update(words, path=path)
        yield "the core"

    def analyzed(core: str, options: coreheap.AnalysisOptions) -> Report:
        assert core == "the core"
        options.progress("walking", 1, 2)
        return report_samples.small_report()

    monkeypatch.setattr(coreheap, "open", opened)
    monkeypatch.setattr(coreheap, "analyze", analyzed)
    words = ["arenas", "c", "--exe", "e", "--sysroot", "s", "--debug-dir", "a", "--debug-dir", "b"]
    words += ["--max-unpacked", "3MiB"]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 arena"
    del seen["progress"]
    assert seen == {
        "path": "c",
        "executable": Path("e"),
        "sysroot": Path("s"),
        "debug_directories": [Path("a"), Path("b")],
        "debuginfod": False,
        "unpacked_limit": 3 << 20,
    }
    assert main([*words, "--debuginfod"]) == 0
    assert seen["debuginfod"] is True


@pytest.mark.parametrize("command", ["analyze", *TABLES])
@pytest.mark.parametrize(
    ("option", "name", "problem"),
    [
        ("--sysroot", "missing", "--sysroot names no folder"),
        ("--sysroot", "file", "--sysroot names no folder"),
        ("--debug-dir", "missing", "--debug-dir names no folder"),
        ("--exe", "missing", "--exe names no file"),
        ("--exe", ".", "--exe names no file"),
        ("--exe", "file", "--exe names no program"),
        ("--exe", "script", "found: a script"),
        ("--exe", "core", "found: a core"),
    ],
)
def test_a_misspelt_folder_is_no_empty_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, option: str, name: str, problem: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "script").write_text("#!/bin/sh\nexec program\n")
    (tmp_path / "core").write_bytes(CoreBuilder().build())
    assert main([command, "core", option, str(tmp_path / name)]) == 2
    written = capsys.readouterr()
    assert not written.out
    assert problem in written.err
    assert str(tmp_path / name) in written.err
    assert "next step: " in written.err


@pytest.mark.parametrize("command", ["analyze", *TABLES])
@pytest.mark.parametrize("urls", [None, "", "ima:enforcing"])
def test_debuginfod_without_servers_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, urls: str | None
) -> None:
    monkeypatch.delenv("DEBUGINFOD_URLS", raising=False)
    if urls is not None:
        monkeypatch.setenv("DEBUGINFOD_URLS", urls)
    assert main([command, "core", "--debuginfod"]) == 2
    written = capsys.readouterr()
    assert not written.out
    assert "DEBUGINFOD_URLS names no server" in written.err
    assert "next step: export DEBUGINFOD_URLS=" in written.err


def run_python(program: str, *, stdout: int | io.BufferedWriter, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with this interpreter, where the samples can be imported."""
    tests = Path(report_samples.__file__).parents[1]
    head = f"""
import sys, types
package = types.ModuleType("tests"); package.__path__ = [{str(tests)!r}]; sys.modules["tests"] = package
from contextlib import contextmanager
from coreheap.cli import main, pipeline
from tests.unit import report_samples
@contextmanager
def analyzed(request, progress):
    yield report
"""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **variables}
    return subprocess.run(
        [sys.executable, "-c", head + program],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        env=environment,
        cwd=tests.parent,
    )


MANY_CHUNKS = """
import dataclasses
parts = tuple(report_samples.batch(0x1000 * i, [32] * 1000, [0] * 1000) for i in range(1000))
report = dataclasses.replace(report_samples.report(), heap=report_samples.heap((report_samples.main_arena(),), parts))
pipeline.analyzed = analyzed
sys.exit(main(["chunks", "core", "--csv", *OPTIONS]))
"""


@pytest.mark.parametrize(("options", "code"), [("[]", 0), ("['--strict']", 4)])
def test_a_reader_that_has_seen_enough_ends_it_quietly(options: str, code: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        ended = run_python(MANY_CHUNKS.replace("OPTIONS", options), stdout=closed)
    assert ended.returncode == code
    assert [line for line in ended.stderr.splitlines() if "warning: partial" not in line] == []


def test_a_full_disk_is_an_error_and_no_traceback() -> None:
    with open("/dev/full", "wb") as full:
        ended = run_python(MANY_CHUNKS.replace("OPTIONS", "[]"), stdout=full)
    assert ended.returncode == 2
    assert ended.stderr == (
        "coreheap: error: standard output: the result could not be written: No space left on device\n"
    )


@pytest.mark.parametrize("form", ["--json", "--csv"])
def test_documents_for_programs_need_no_rich(form: str) -> None:
    command = "analyze" if form == "--json" else "arenas"
    program = f"""
report = report_samples.report()
pipeline.analyzed = analyzed
assert main([{command!r}, "core", {form!r}]) == 0
loaded = [name for name in sys.modules if name.split(".")[0] == "rich"]
assert not loaded, loaded
"""
    ended = run_python(program, stdout=subprocess.DEVNULL)
    assert ended.stderr.replace("coreheap: warning: partial result, 2 gaps; coreheap analyze lists them\n", "") == ""
    assert ended.returncode == 0


def test_every_error_kind_has_its_exit_code(answer: Answer) -> None:
    answer(CoreheapError("of no special kind"))
    assert main(["analyze", "core"]) == 3


@pytest.mark.parametrize(
    ("report", "options", "code"),
    [
        (report_samples.corrupt_report(), [], 0),
        (report_samples.corrupt_report(), ["--fail-on", "error"], 1),
        (report_samples.corrupt_report(), ["--fail-on", "error", "--strict"], 1),
        (report_samples.corrupt_report(is_partial=True), ["--fail-on", "error", "--strict"], 4),
        (report_samples.sound_report(), ["--fail-on", "info", "--strict"], 0),
        (report_samples.report(), ["--fail-on", "info"], 0),
        (report_samples.heapless_report(), ["--fail-on", "warning"], 1),
        (report_samples.damaged_report(), ["--fail-on", "error"], 70),
        (InputNotUsable("not a core", where="x", expected="ELF", found="text", next_step="look"), [], 3),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_check_fails_on_findings_about_damage_alone(
    answer: Answer,
    capsys: pytest.CaptureFixture[str],
    report: Report | BaseException,
    options: list[str],
    code: int,
    form: list[str],
) -> None:
    answer(report)
    assert main(["check", "core", *form, *options]) == code
    written = capsys.readouterr()
    assert "Traceback" not in written.err
    if form and isinstance(report, Report):
        document = json.loads(written.out)
        Draft202012Validator(json.loads(schema_text(SchemaName.REPORT))).validate(document)
        assert (1 if document["findings"] else 0) >= code or code > 1


@pytest.mark.parametrize(("options", "leaks"), [([], False), (["--leaks"], True)])
def test_check_looks_for_leaks_only_when_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], leaks: bool
) -> None:
    asked: list[coreheap.AnalysisOptions] = []

    @contextmanager
    def opened(path: str, **words: object) -> Iterator[str]:
        yield path

    def analyzed(core: str, options: coreheap.AnalysisOptions) -> Report:
        asked.append(options)
        return report_samples.sound_report()

    monkeypatch.setattr(coreheap, "open", opened)
    monkeypatch.setattr(coreheap, "analyze", analyzed)
    assert main(["check", "core", *options]) == 0
    assert "The heap is sound" in capsys.readouterr().out
    assert [(option.leaks, option.residency, option.retained) for option in asked] == [(leaks, False, False)]


def test_check_writes_to_a_file_and_says_of_partial_results_in_its_document(
    answer: Answer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer(report_samples.report())
    assert main(["check", "core", "-o", str(tmp_path / "page"), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    text = (tmp_path / "page").read_text(encoding="utf-8")
    assert "Partial: not all that this rests on is known" in text
    assert "\x1b" not in text
