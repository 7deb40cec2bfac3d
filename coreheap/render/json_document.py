"""A report as the JSON document that pipelines hold on to (``docs/report.md``, ``report.schema.json``).

Knows: the document's keys, which are only ever added, and how each kind of value is written: addresses as lower-case
hex strings, bytes and counts as integers, shares between 0 and 1, unknown as null.
Does not know: sentences; the document has no prose of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from importlib import resources

from coreheap.evidence import Anomaly, Gap
from coreheap.heap import (
    BINNED_STATES,
    AllocatorIdentity,
    Arena,
    ChunkState,
    HeapSnapshot,
    MallocCopy,
    MallocParameters,
    StateTotal,
    StateTotals,
    SubHeap,
)
from coreheap.quantities import AddressRange
from coreheap.render.damage_document import crash_value, damages_value, integrity_value
from coreheap.render.discretion import discreet_word, place_of, without_content
from coreheap.render.free_memory_document import free_memory_value
from coreheap.render.integrity import is_about_integrity
from coreheap.render.json_values import (
    Json,
    address_value,
    evidence_value,
    indented_text,
    number_value,
    text_or_null,
    text_value,
)
from coreheap.render.leak_documents import leaks_value, retained_value
from coreheap.render.maps import mappings_value
from coreheap.render.settings_document import settings_value
from coreheap.render.tables import json_rows, threads_table
from coreheap.report import CoreSummary, Finding, LedgerNode, Phase, ProcessSummary, Quantity, Report, Unit

SCHEMA_VERSION = "1.4"
"""Grows in its second number when keys are added; the first would change only if a key changed its meaning."""

ADDRESS_PARAMETERS = frozenset({"sbrk_base"})
"""The fields of ``mp_`` that hold an address; all others are counts or bytes."""


NOTHING = StateTotal()
STATE_LABELS = tuple((state, state.label) for state in ChunkState)


class SchemaName(Enum):
    """The schemas that ship with coreheap."""

    REPORT = "report.schema.json"
    ROW = "row.schema.json"


def schema_text(name: SchemaName) -> str:
    """The text of a shipped JSON Schema (2020-12)."""
    return resources.files("coreheap.render").joinpath(name.value).read_text(encoding="utf-8")


def json_text(report: Report) -> str:
    """The document as text, indented, ASCII only, with a newline at its end."""
    return _text(json_document(report))


def check_json_text(report: Report) -> str:
    """The document of ``check`` as text, like that of ``json_text``."""
    return _text(check_document(report))


def _text(document: dict[str, Json]) -> str:
    return indented_text(document) + "\n"


def json_document(report: Report) -> dict[str, Json]:
    """The report as plain JSON values; the same report gives the same document."""
    heap = report.heap
    return {
        **_opening(report),
        "is_partial": report.is_partial,
        "verdict": [
            {
                "topic": item.topic,
                "bytes": item.bytes,
                "of_bytes": item.of_bytes,
                "whole": text_value(item.whole),
                "confidence": item.confidence.value,
                "weakened_by": [text_value(reason) for reason in item.weakened_by],
                "resident_low_bytes": item.resident_low,
                "resident_high_bytes": item.resident_high,
                "of_resident_low_bytes": item.of_resident_low,
                "of_resident_high_bytes": item.of_resident_high,
            }
            for item in report.verdict
        ],
        "totals": _totals(report),
        "arenas": [_arena(arena) for arena in heap.arenas] if heap else [],
        "threads": [dict(row) for row in json_rows(threads_table(report))],
        "leaks": None if report.leaks is None else leaks_value(report.leaks),
        "retained": None if report.retained is None else retained_value(report.retained),
        "settings": settings_value(report.settings),
        "free_memory": free_memory_value(report.free_memory),
        "mappings": mappings_value(report),
        "ledger": _ledger(report.ledger),
        "integrity": integrity_value(report),
        "crash": crash_value(report.crash),
        "damages": damages_value(report.damages),
        "findings": [_finding(finding) for finding in report.findings],
        "anomalies": [_anomaly(anomaly) for anomaly in report.anomalies],
        "anomaly_count": report.anomaly_count,
        "gaps": [_gap(gap) for gap in report.gaps],
        "other_allocators": [text_value(name) for name in report.other_allocators],
        "defects": [text_value(defect) for defect in report.defects],
        "phases": [_phase(phase) for phase in report.phases],
    }


CHECK_KEYS = (
    "schema_version",
    "tool",
    "core",
    "process",
    "allocator",
    "integrity",
    "crash",
    "damages",
    "findings",
    "anomalies",
    "anomaly_count",
    "is_partial",
    "gaps",
    "defects",
    "phases",
)
"""The keys of the document that ``check`` writes, each as in the report's."""


def check_document(report: Report) -> dict[str, Json]:
    """What ``check`` says: the part of the report's document that is about damage and the crash, and the findings about these."""
    return {
        **_opening(report),
        "integrity": integrity_value(report),
        "crash": crash_value(report.crash),
        "damages": damages_value(report.damages),
        "findings": [_finding(finding) for finding in report.findings if is_about_integrity(finding)],
        "anomalies": [_anomaly(anomaly) for anomaly in report.anomalies],
        "anomaly_count": report.anomaly_count,
        "is_partial": report.is_partial,
        "gaps": [_gap(gap) for gap in report.gaps],
        "defects": [text_value(defect) for defect in report.defects],
        "phases": [_phase(phase) for phase in report.phases],
    }


def _opening(report: Report) -> dict[str, Json]:
    heap = report.heap
    return {
        "schema_version": SCHEMA_VERSION,
        "tool": {"name": "coreheap", "version": report.tool_version, "kernels": report.kernels},
        "core": _core(report.core),
        "process": _process(report.process),
        "allocator": None if heap is None else _allocator(heap.identity, heap.parameters, heap),
    }


def _core(core: CoreSummary) -> Json:
    return {
        "path": text_value(core.path),
        "file_bytes": core.file_bytes,
        "saved_bytes": core.saved_bytes,
        "not_saved_bytes": core.not_saved_bytes,
        "truncated": core.truncated,
        "coverage": number_value(core.coverage),
        "compression": core.compression,
        "made_by": core.made_by,
        "segments": core.segment_count,
    }


def _process(process: ProcessSummary) -> Json:
    return {
        "pid": process.pid,
        "command_line": text_or_null(process.command_line),
        "executable": text_or_null(process.executable),
        "architecture": process.architecture,
        "word_bytes": process.word_bytes,
        "page_bytes": process.page_bytes,
        "signal": process.signal,
        "signal_name": process.signal_name,
        "fault_address": address_value(process.fault_address),
        "threads": process.thread_count,
    }


def _allocator(identity: AllocatorIdentity, parameters: MallocParameters | None, heap: HeapSnapshot) -> Json:
    return {
        "name": text_value(identity.name),
        "libc_version": text_or_null(identity.libc_version),
        "layout": text_value(identity.layout),
        "runner_up": text_or_null(identity.runner_up),
        "main_arena": address_value(identity.main_arena),
        "mp": address_value(identity.mp),
        "parameters": None if parameters is None else _parameters(parameters),
        "narenas_limit": heap.narenas_limit,
        "limit_reason": text_value(heap.limit_reason) or None,
        "evidence": evidence_value(identity.evidence),
        "confidence": identity.confidence.value,
        "copies": [_copy(copy, heap) for copy in heap.copies],
    }


def _copy(copy: MallocCopy, heap: HeapSnapshot) -> Json:
    return {
        "copy": copy.number,
        "module": text_or_null(copy.module),
        "main_arena": address_value(copy.main_arena),
        "mp": None if copy.parameters is None else address_value(copy.parameters.address),
        "parameters": None if copy.parameters is None else _parameters(copy.parameters),
        "arenas": copy.arena_count,
        "system_mem": copy.system_mem,
        "threads": _threads_of_copy(copy.number, heap) if copy.number else None,
        "evidence": evidence_value(copy.evidence),
        "confidence": copy.confidence.value,
    }


def _threads_of_copy(copy: int, heap: HeapSnapshot) -> Json:
    """What each thread has of a copy of malloc, for threads that have anything."""
    arena_of = {thread: arena.index for arena in heap.arenas if arena.copy == copy for thread in arena.threads}
    cache_of = {cache.thread: cache for cache in heap.thread_caches if cache.copy == copy and cache.thread is not None}
    rows: list[Json] = []
    for thread in sorted(arena_of.keys() | cache_of.keys()):
        cache = cache_of.get(thread)
        rows.append(
            {
                "index": thread,
                "arena": arena_of.get(thread),
                "thread_cache_address": None if cache is None else address_value(cache.address),
                "tcache_count": None if cache is None else cache.count,
                "tcache_bytes": None if cache is None else cache.chunk_bytes,
            }
        )
    return rows


def _parameters(parameters: MallocParameters) -> Json:
    return {
        name: address_value(value) if name in ADDRESS_PARAMETERS else value for name, value in parameters.values.items()
    }


def _totals(report: Report) -> Json:
    heap = report.heap
    if heap is None:
        return {
            **{state.label: None for state in ChunkState},
            "binned": None,
            "mmapped": None,
            "system_mem": None,
        }
    return {
        **_states(report.totals),
        "binned": _total(_sum(report.totals, BINNED_STATES)),
        "mmapped": {
            "count": heap.mmapped_count,
            "mapping_bytes": heap.mmapped_bytes,
            "states": _states(heap.mmapped_totals),
        },
        "system_mem": _sum_if_known(arena.system_mem for arena in heap.arenas),
    }


def _states(totals: StateTotals) -> dict[str, Json]:
    return {label: _total(totals.get(state, NOTHING)) for state, label in STATE_LABELS}


def _total(total: StateTotal) -> Json:
    return {"count": total.count, "chunk_bytes": total.chunk_bytes, "usable_bytes": total.usable_bytes}


def _sum(totals: StateTotals, states: Iterable[ChunkState]) -> StateTotal:
    present = [total for state in states if (total := totals.get(state, NOTHING)) != NOTHING]
    return sum(present, NOTHING)


def _sum_if_known(parts: Iterable[int | None]) -> int | None:
    """The sum, or None where a part of it is unknown."""
    known = list(parts)
    return None if None in known else sum(part for part in known if part is not None)


def _arena(arena: Arena) -> Json:
    return {
        "index": arena.index,
        "address": address_value(arena.address),
        "copy": arena.copy,
        "is_main": arena.is_main,
        "is_contiguous": arena.is_contiguous,
        "system_mem": arena.system_mem,
        "max_system_mem": arena.max_system_mem,
        "attached_threads": arena.attached_threads,
        "threads": list(arena.threads),
        "locked": arena.locked,
        "on_free_list": arena.on_free_list,
        "top_address": address_value(arena.top_address),
        "top_bytes": arena.top_bytes,
        "reserved_bytes": arena.reserved_bytes,
        "saved_bytes": arena.saved_bytes,
        "coverage": number_value(arena.coverage),
        "foreign_bytes": arena.foreign_bytes,
        "sub_heaps": [_sub_heap(sub_heap) for sub_heap in arena.sub_heaps],
        "states": {
            **_states(arena.totals),
            "binned": _total(_sum(arena.totals, BINNED_STATES)),
        },
        "unattributed": [{"range": _range(stretch.range), "cause": stretch.cause} for stretch in arena.unattributed],
    }


def _sub_heap(sub_heap: SubHeap) -> Json:
    return {
        "address": address_value(sub_heap.address),
        "committed_bytes": sub_heap.committed_bytes,
        "mprotect_bytes": sub_heap.mprotect_bytes,
        "reserved_bytes": sub_heap.reserved_bytes,
        "overhead_bytes": sub_heap.overhead_bytes,
        "is_first": sub_heap.is_first,
        "saved_bytes": sub_heap.saved_bytes,
        "populated_bytes": sub_heap.populated_bytes,
    }


def _ledger(node: LedgerNode) -> Json:
    return {
        "name": text_value(node.name),
        "bytes": node.bytes,
        "committed_bytes": node.committed_bytes,
        "saved_bytes": node.saved_bytes,
        "resident_low_bytes": node.resident_low,
        "resident_high_bytes": node.resident_high,
        "children": [_ledger(child) for child in node.children],
    }


def _finding(finding: Finding) -> Json:
    return {
        "code": finding.code,
        "severity": finding.severity.value,
        "confidence": finding.confidence.value,
        "subject": text_value(finding.subject),
        "quantities": {quantity.name: _quantity(quantity) for quantity in finding.quantities},
        "units": {quantity.name: quantity.unit.value for quantity in finding.quantities},
        "evidence": evidence_value(finding.evidence, discreet=is_about_integrity(finding)),
        "next_steps": [text_value(step) for step in finding.next_steps],
        "weakened_by": [text_value(reason) for reason in finding.weakened_by],
    }


def _quantity(quantity: Quantity) -> Json:
    value = quantity.value
    if isinstance(value, str):
        return text_value(value)
    if isinstance(value, int) and quantity.unit is Unit.ADDRESS:
        return address_value(value)
    return number_value(value)


def _anomaly(anomaly: Anomaly) -> Json:
    return {
        "code": anomaly.code,
        "address": address_value(place_of(anomaly)),
        "expected": text_value(without_content(anomaly.expected)),
        "observed": text_value(without_content(anomaly.observed)),
        "arena": anomaly.arena,
        "message": text_or_null(anomaly.message),
        "arena_locked": anomaly.arena_locked,
        "confidence": anomaly.confidence.value,
        "word_address": address_value(anomaly.word_address),
        "expected_word": address_value(discreet_word(anomaly.expected_word)),
        "observed_word": address_value(discreet_word(anomaly.observed_word)),
        "header_address": address_value(anomaly.header_address),
    }


def _gap(gap: Gap) -> Json:
    return {
        "cause": gap.cause,
        "range": None if gap.range is None else _range(gap.range),
        "consequence": text_value(gap.consequence),
    }


def _phase(phase: Phase) -> Json:
    return {
        "name": text_value(phase.name),
        "cpu_seconds": number_value(phase.cpu_seconds),
        "wall_seconds": number_value(phase.wall_seconds),
        "peak_anonymous_bytes": phase.peak_anonymous_bytes,
    }


def _range(addresses: AddressRange) -> Json:
    return {"start": address_value(addresses.start), "end": address_value(addresses.end)}
