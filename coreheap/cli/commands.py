"""What each command does with a report, and which exit code follows from it.

Knows: the order analyze -> render -> write. Does not know: how any of these is done.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

from coreheap.cli import pipeline
from coreheap.cli.arguments import FAIL_ON_COMMANDS, REFERENCE_COMMANDS, OutputFormat, Request
from coreheap.cli.exit_codes import ExitCode
from coreheap.cli.messages import say_warning
from coreheap.cli.output import Output, check_output, opened_output
from coreheap.cli.progress import ProgressReporter, is_wanted
from coreheap.errors import UsageError
from coreheap.heap import ChunkState
from coreheap.leaks import Explanation, OwnerNode, Verdict
from coreheap.render import tables
from coreheap.report import Finding, Report, Severity

if TYPE_CHECKING:
    from coreheap.render import rows
    from coreheap.render.page import PageStyle

ROWS_SHOWN = 50
"""Rows of a table command's text, unless --top says otherwise."""
ARENAS_SHOWN = 10
"""Arenas in the report's text, unless --top says otherwise."""
REFERENCES_SHOWN = 20
"""Holders and targets of ``explain``, unless --limit says otherwise."""
OWNER_LEVELS, OWNERS_SHOWN = 3, 10
"""Levels of ``owners`` and owners of each chunk, unless --depth and --limit say otherwise."""
PLAIN_WIDTH = 80
"""Columns of text that goes to no terminal."""

SUSPECT_VERDICTS = frozenset(
    {Verdict.DEFINITELY_LOST, Verdict.INDIRECTLY_LOST, Verdict.POSSIBLY_LOST, Verdict.WEAKLY_HELD}
)
"""What ``leaks --list`` lists, unless --verdict says otherwise."""

_LARGEST_BY = {"arenas": "system_mem", "heaps": "committed_bytes", "bins": "chunk_bytes", "threads": "tcache_bytes"}


def run(request: Request) -> ExitCode:
    """Do what was asked for. Raises CoreheapError."""
    check_output(request.output, request.core)
    with ProgressReporter(is_wanted(request.verbosity)) as progress:
        if request.command in REFERENCE_COMMANDS:
            with pipeline.explored(request, progress) as (report, explorer):
                return _finish(report, request, progress, explorer)
        with pipeline.analyzed(request, progress) as report:
            return _finish(report, request, progress, None)


def _finish(
    report: Report, request: Request, progress: ProgressReporter, explorer: pipeline.Explorer | None
) -> ExitCode:
    progress.close()
    with opened_output(request.output) as output:
        for piece in _document(report, request, output, explorer):
            output.write(piece)
        pipeline.check_files()
    if request.verbosity >= 0:
        _warn(report, request)
    return exit_code_of(report, request)


def exit_code_of(report: Report, request: Request) -> ExitCode:
    """What the caller is told. A defect weighs most, then a partial result under --strict, then findings."""
    if report.defects:
        return ExitCode.DEFECT
    if request.strict and report.is_partial:
        return ExitCode.PARTIAL
    if request.fail_on is not None:
        limit = Severity(request.fail_on).rank
        if any(finding.severity.rank >= limit for finding in _findings_of(report, request)):
            return ExitCode.FINDINGS
    return ExitCode.DONE


def _findings_of(report: Report, request: Request) -> tuple[Finding, ...]:
    """The findings that the command's document gives."""
    if request.command != "check":
        return report.findings
    from coreheap.render.integrity import is_about_integrity

    return tuple(finding for finding in report.findings if is_about_integrity(finding))


def _warn(report: Report, request: Request) -> None:
    """Say on standard error what the document itself does not show."""
    for defect in report.defects:
        say_warning(f"a part of the analysis failed, a defect of coreheap: {defect}")
    if request.command in FAIL_ON_COMMANDS:
        return
    if report.heap is None:
        say_warning("no glibc heap could be read from this core; coreheap analyze says why")
    elif report.is_partial:
        say_warning(f"partial result, {len(report.gaps)} gaps; coreheap analyze lists them")


def _document(
    report: Report, request: Request, output: Output, explorer: pipeline.Explorer | None
) -> Iterator[bytes | bytearray]:
    """The document, piece by piece."""
    if explorer is not None:
        yield from _about_references(report, request, output, explorer)
    elif request.command == "chunks":
        yield from _chunks(report, request, output)
    elif request.command == "maps":
        yield from _maps(report, request, output)
    elif request.command == "analyze":
        yield _analysis(report, request, output)
    elif request.command == "check":
        yield _check(report, request, output)
    else:
        yield _table(report, request, output)


def _analysis(report: Report, request: Request, output: Output) -> bytes:
    if request.format is OutputFormat.JSON:
        from coreheap.render.json_document import json_text

        return json_text(report).encode()
    from coreheap.render.terminal import report_text

    return _encoded(report_text(report, _style(request, output, ARENAS_SHOWN)), output)


def _check(report: Report, request: Request, output: Output) -> bytes:
    if request.format is OutputFormat.JSON:
        from coreheap.render.json_document import check_json_text

        return check_json_text(report).encode()
    from coreheap.render.terminal_check import check_text

    return _encoded(check_text(report, _style(request, output, ARENAS_SHOWN)), output)


def _table(report: Report, request: Request, output: Output) -> bytes:
    table = tables.table_named(request.command, report)
    if request.format is OutputFormat.TEXT:
        from coreheap.render.terminal_tables import table_notes, table_text

        notes = table_notes(request.command, report)
        return _encoded(table_text(request.command, table, _style(request, output, ROWS_SHOWN), notes), output)
    if request.top is not None:
        table = table.largest(_LARGEST_BY[request.command], request.top)
    text = tables.csv_text(table) if request.format is OutputFormat.CSV else tables.json_lines(table)
    return text.encode()


def _maps(report: Report, request: Request, output: Output) -> Iterator[bytes]:
    from coreheap.render import maps

    order = maps.MapsOrder(request.kinds, request.sort, request.descending, request.top)
    if request.format is OutputFormat.TEXT:
        from coreheap.render.terminal_maps import kinds_text, mappings_text

        style = _style(request, output, ROWS_SHOWN)
        yield _encoded((mappings_text if request.flat else kinds_text)(report, order, style), output)
        return
    is_csv = request.format is OutputFormat.CSV
    found = (
        maps.mapping_tables(report, order, is_text=is_csv) if request.flat else iter([maps.kinds_table(report, order)])
    )
    for number, table in enumerate(found):
        if is_csv:
            yield (tables.csv_rows(table) if number else tables.csv_text(table)).encode()
        else:
            yield tables.json_lines(table).encode()


def _chunks(report: Report, request: Request, output: Output) -> Iterator[bytes | bytearray]:
    from coreheap.render import rows

    heap = report.heap
    arenas = heap.arenas if heap else ()
    if heap is not None and request.arena is not None and request.arena not in {arena.index for arena in arenas}:
        raise UsageError(
            f"there is no arena {request.arena}",
            expected=f"one of 0 to {len(arenas) - 1}",
            next_step="coreheap arenas lists them",
        )
    states = frozenset(ChunkState[state.upper()] for state in request.states) or None
    wanted = rows.ChunkFilter(states, request.arena, request.min_bytes, request.max_bytes)
    found = rows.wanted_rows(heap.chunks.batches() if heap else (), arenas, wanted)
    columns = (*rows.CHUNK_COLUMNS, rows.VERDICT_COLUMN) if request.leaks else rows.CHUNK_COLUMNS
    yield from _chunk_rows(found, columns, request, output)


def _chunk_rows(
    found: Iterator[rows.ChunkRows], columns: tuple[str, ...], request: Request, output: Output
) -> Iterator[bytes | bytearray]:
    from coreheap.render import rows

    if request.format is OutputFormat.TEXT:
        from coreheap.render.terminal_tables import chunks_text

        largest = rows.largest_chunks(found, request.top or ROWS_SHOWN)
        yield _encoded(chunks_text(largest, _style(request, output, ROWS_SHOWN)), output)
        return
    row_format = rows.RowFormat(request.format.value)
    yield rows.header_line(row_format, columns)
    shown = found if request.top is None else rows.largest_chunks(found, request.top).rows
    yield from rows.row_texts(shown, row_format, columns)


def _about_references(
    report: Report, request: Request, output: Output, explorer: pipeline.Explorer
) -> Iterator[bytes | bytearray]:
    if request.command == "leaks" and request.lists_chunks:
        from coreheap.render import rows

        heap = report.heap
        wanted = rows.ChunkFilter(verdicts=_verdicts(request) or SUSPECT_VERDICTS)
        batches, arenas = (heap.chunks.batches(), heap.arenas) if heap else (iter(()), ())
        found = rows.wanted_rows(batches, arenas, wanted, explorer.group_numbers())
        yield from _chunk_rows(found, rows.LEAK_COLUMNS, request, output)
    elif request.format is OutputFormat.TEXT:
        yield _encoded(_references_text(report, request, _style(request, output, ROWS_SHOWN), explorer), output)
    elif request.command in ("leaks", "top"):
        from coreheap.render.leak_tables import leak_groups_table, retained_table

        if request.command == "leaks":
            table = leak_groups_table(report.leaks, _verdicts(request))
        else:
            table = retained_table(explorer.retained(request.top or ROWS_SHOWN))
        if request.top is not None:
            table = tables.Table(table.columns, table.rows[: request.top])
        yield (tables.csv_text(table) if request.format is OutputFormat.CSV else tables.json_lines(table)).encode()
    else:
        from coreheap.render.leak_documents import explanation_line, owners_line

        for address in request.addresses:
            if request.command == "explain":
                yield explanation_line(_explained(address, request, explorer)).encode()
            else:
                yield owners_line(explorer.explain(address, limit=1), _owners(address, request, explorer)).encode()


def _references_text(report: Report, request: Request, style: PageStyle, explorer: pipeline.Explorer) -> str:
    from coreheap.render import terminal_leaks

    if request.command == "leaks":
        return terminal_leaks.leaks_text(report.leaks, style, _verdicts(request))
    if request.command == "top":
        return terminal_leaks.retained_text(explorer.retained(style.top), style)
    if request.command == "explain":
        return terminal_leaks.explanations_text(
            [_explained(address, request, explorer) for address in request.addresses], style
        )
    return terminal_leaks.owners_text(
        [(explorer.explain(address, limit=1), _owners(address, request, explorer)) for address in request.addresses],
        style,
    )


def _explained(address: int, request: Request, explorer: pipeline.Explorer) -> Explanation:
    return explorer.explain(address, limit=request.limit or REFERENCES_SHOWN, retained=request.retained)


def _owners(address: int, request: Request, explorer: pipeline.Explorer) -> tuple[OwnerNode, ...]:
    return explorer.owners(address, depth=request.depth or OWNER_LEVELS, limit=request.limit or OWNERS_SHOWN)


def _verdicts(request: Request) -> frozenset[Verdict]:
    return frozenset(Verdict[verdict.upper()] for verdict in request.verdicts)


def _style(request: Request, output: Output, top: int) -> PageStyle:
    from coreheap.render.page import PageStyle

    width = shutil.get_terminal_size((PLAIN_WIDTH, 24)).columns if output.is_terminal else PLAIN_WIDTH
    return PageStyle(
        width=width,
        color=request.color and output.is_terminal,
        encoding=output.encoding,
        verbose=request.verbosity > 0,
        top=request.top or top,
    )


def _encoded(text: str, output: Output) -> bytes:
    return text.encode(output.encoding, "backslashreplace")
