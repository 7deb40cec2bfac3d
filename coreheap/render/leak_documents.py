"""Leaks, retained sizes, explanations and owners as JSON values (``docs/report.md``, the shipped schemas).

Knows: their keys, which are only ever added. Does not know: how any of it was found.
"""

from __future__ import annotations

import json

from coreheap.leaks import (
    VERDICTS,
    Accumulation,
    ChunkView,
    Explanation,
    LeakGroup,
    LeakReport,
    OwnerNode,
    Place,
    Reference,
    RetainedChunk,
    RetainedReport,
    VerdictTotal,
)
from coreheap.render.json_values import Json, address_value, text_or_null, text_value


def leaks_value(leaks: LeakReport) -> Json:
    """The key ``leaks`` of the report: totals of each verdict, groups, and what the verdicts rest on."""
    return {
        **{verdict.name.lower(): _total(leaks.totals[verdict]) for verdict in reversed(VERDICTS)},
        "unreachable": _total(leaks.unreachable),
        "unreachable_possible": _total(leaks.unreachable_possible),
        "held_inside": None if leaks.held_inside is None else _total(leaks.held_inside),
        "heuristics": [
            {"heuristic": heuristic.label, "count": total.count, "usable_bytes": total.usable_bytes}
            for heuristic, total in leaks.heuristics
        ],
        "groups": [group_value(group) for group in leaks.groups],
        "group_count": leaks.group_count,
        "roots": [
            {"kind": root.kind.value, "bytes": root.byte_count, "held_chunks": root.held_chunks} for root in leaks.roots
        ],
        "edge_count": leaks.edge_count,
        "missing_root_bytes": leaks.missing_root_bytes,
        "missing_shared_bytes": leaks.missing_shared_bytes,
    }


def group_value(group: LeakGroup) -> dict[str, Json]:
    """One group of suspects."""
    return {
        "number": group.number,
        "verdict": group.verdict.label,
        "type": text_or_null(group.type),
        "smallest_bytes": group.smallest_bytes,
        "largest_bytes": group.largest_bytes,
        "count": group.count,
        "usable_bytes": group.usable_bytes,
        "indirect_count": group.indirect_count,
        "indirect_bytes": group.indirect_bytes,
        "arenas": [{"arena": arena, "count": count} for arena, count in group.arenas],
        "samples": [address_value(address) for address in group.samples],
        "holder": text_or_null(group.holder),
        "heuristic": group.heuristic.label,
    }


def retained_value(retained: RetainedReport) -> Json:
    """The key ``retained`` of the report: the largest retained chunks and the accumulation points."""
    return {
        "reachable_bytes": retained.reachable_bytes,
        "top": [_retained_chunk(chunk) for chunk in retained.top],
        "accumulations": [_accumulation(point) for point in retained.accumulations],
    }


def explanation_line(explanation: Explanation) -> str:
    """An explanation as one line of JSON."""
    chunk = explanation.chunk
    return _line(
        {
            "address": address_value(explanation.address),
            "region": text_value(explanation.region),
            "permissions": explanation.permissions,
            "is_saved": explanation.is_saved,
            "symbol": text_or_null(explanation.symbol),
            "thread": explanation.thread,
            "chunk": _chunk(chunk),
            "offset": None if chunk is None else explanation.offset,
            "before": _chunk(explanation.before),
            "behind": _chunk(explanation.behind),
            "holders": [_reference(reference) for reference in explanation.holders],
            "holder_count": explanation.holder_count,
            "targets": [_reference(reference) for reference in explanation.targets],
            "target_count": explanation.target_count,
            "path": [_reference(reference) for reference in explanation.path],
            "path_omitted": explanation.path_omitted,
            "retained_bytes": explanation.retained_bytes,
            "retained_count": explanation.retained_count,
            "notes": [text_value(note) for note in explanation.notes],
        }
    )


def owners_line(explanation: Explanation, nodes: tuple[OwnerNode, ...]) -> str:
    """The owners of the chunk that an explanation is of, as one line of JSON."""
    return _line(
        {
            "address": address_value(explanation.address),
            "region": text_value(explanation.region),
            "chunk": _chunk(explanation.chunk),
            "owners": [_owner(node) for node in nodes],
            "omitted": explanation.holder_count - len(nodes),
        }
    )


def _line(document: Json) -> str:
    return json.dumps(document, allow_nan=False) + "\n"


def _total(total: VerdictTotal) -> Json:
    return {"count": total.count, "usable_bytes": total.usable_bytes}


def _retained_chunk(retained: RetainedChunk) -> Json:
    return {
        "chunk": _chunk(retained.chunk),
        "retained_bytes": retained.retained_bytes,
        "retained_count": retained.retained_count,
        "holder": text_or_null(retained.holder),
    }


def _accumulation(point: Accumulation) -> Json:
    holder = point.holder
    return {
        "chunk": _chunk(holder) if isinstance(holder, ChunkView) else None,
        "place": None if isinstance(holder, ChunkView) else text_value(holder),
        "retained_bytes": point.retained_bytes,
        "children": point.children,
        "child_bytes": point.child_bytes,
        "child_retained_bytes": point.child_retained_bytes,
        "below_count": point.below,
        "holder_count": point.holders,
        "root": text_or_null(point.root),
        "samples": [address_value(address) for address in point.samples],
    }


def _owner(node: OwnerNode) -> Json:
    return {
        "reference": _reference(node.reference),
        "owners": [_owner(above) for above in node.owners],
        "omitted": node.omitted,
        "seen_before": node.seen_before,
    }


def _reference(reference: Reference) -> Json:
    source = reference.source
    return {
        "source_chunk": _chunk(source) if isinstance(source, ChunkView) else None,
        "source_place": _place(source) if isinstance(source, Place) else None,
        "source_offset": reference.source_offset,
        "target_chunk": _chunk(reference.target),
        "target_offset": reference.target_offset,
    }


def _place(place: Place) -> Json:
    return {
        "kind": place.kind.value,
        "address": address_value(place.address),
        "name": text_value(place.name),
        "thread": place.thread,
    }


def _chunk(chunk: ChunkView | None) -> Json:
    if chunk is None:
        return None
    return {
        "header_address": address_value(chunk.header_address),
        "payload_address": address_value(chunk.payload_address),
        "chunk_bytes": chunk.chunk_bytes,
        "usable_bytes": chunk.usable_bytes,
        "state": chunk.state,
        "is_mmapped": chunk.is_mmapped,
        "arena": chunk.arena,
        "verdict": chunk.verdict.label,
        "type": text_or_null(chunk.type),
    }
