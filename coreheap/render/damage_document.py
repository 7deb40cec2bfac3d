"""Damages, the crash and the answer of ``check`` as JSON values (``docs/report.md``, the shipped schema).

Knows: their keys, which are only ever added. Does not know: how any of it was found. Of foreign bytes it writes where they are
and what they look like, never the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from coreheap.crash import AbortMessage, CrashContext, Frame, PlaceNote, StaleUse, WrongFree
from coreheap.damage import ChunkPlace, Damage, Pattern
from coreheap.render.damage_wording import observed_word
from coreheap.render.discretion import discreet_address, discreet_word, without_content
from coreheap.render.integrity import integrity_of
from coreheap.render.json_values import Json, address_value, evidence_value, text_or_null, text_value
from coreheap.report import Report


def integrity_value(report: Report) -> Json:
    """The key ``integrity``: the answer in one word, and what was looked at."""
    integrity = integrity_of(report)
    return {
        "verdict": integrity.verdict.value,
        "confidence": None if integrity.confidence is None else integrity.confidence.value,
        "reasons": [text_value(reason) for reason in integrity.reasons],
        "chunks_checked": integrity.chunks_checked,
        "lists_checked": integrity.lists_checked,
        "arenas_checked": integrity.arenas_checked,
        "anomaly_count": integrity.anomaly_count,
    }


def damages_value(damages: Iterable[Damage]) -> Json:
    """The key ``damages``, in the report's order: the gravest first."""
    return [
        {
            "kind": damage.kind.value,
            "place": damage.place.value,
            "confidence": damage.confidence.value,
            "arena": damage.arena,
            "range": {"start": address_value(damage.bytes.start), "end": address_value(damage.bytes.end)},
            "byte_count": damage.bytes.byte_count,
            "pattern": _pattern(damage.pattern),
            "victim": _chunk(damage.victim),
            "culprit": _chunk(damage.culprit),
            "repair": _repair(damage),
            "message": text_or_null(damage.message),
            "lost_bytes": damage.lost_bytes,
            "listed_blocks": [address_value(block) for block in damage.listed_blocks],
            "anomalies": list(damage.anomalies),
            "evidence": evidence_value(damage.evidence, discreet=True),
            "weakened_by": [text_value(reason) for reason in damage.weakened_by],
        }
        for damage in damages
    ]


def crash_value(crash: CrashContext | None) -> Json:
    """The key ``crash``; null in a core of a process that was alive."""
    if crash is None:
        return None
    return {
        "thread": crash.thread,
        "lwp": crash.lwp,
        "signal": crash.signal,
        "signal_name": text_or_null(crash.signal_name),
        "signal_code": crash.signal_code,
        "signal_code_name": text_or_null(crash.signal_code_name),
        "sender_pid": crash.sender_pid,
        "handled_signal": crash.handled_signal,
        "handled_signal_name": text_or_null(crash.handled_signal_name),
        "fault": _place(crash.fault),
        "registers": [{"name": text_value(note.name), "place": _place(note.place)} for note in crash.registers],
        "frames": [_frame(frame) for frame in crash.frames],
        "frames_end": text_value(crash.frames_end),
        "abort_message": _abort_message(crash.abort_message),
        "inside_malloc": crash.inside_malloc,
        "wrong_free": _wrong_free(crash.wrong_free),
        "stale_use": _stale_use(crash.stale_use),
        "signature": text_value(crash.signature),
        "signature_parts": [text_value(part) for part in crash.signature_parts],
    }


def _wrong_free(wrong: WrongFree | None) -> Json:
    if wrong is None:
        return None
    return {
        "kind": wrong.kind.value,
        "function": wrong.function,
        "address": address_value(None if wrong.address is None else discreet_address(wrong.address)),
        "place": _place(wrong.place),
        "listed_in": None if wrong.listed_in is None else wrong.listed_in.label,
        "listed_thread": wrong.listed_thread,
        "caller": wrong.caller,
        "message": text_or_null(wrong.message),
        "other_addresses": [address_value(discreet_address(other)) for other in wrong.others],
        "holders": [text_value(holder) for holder in wrong.holders],
        "confidence": wrong.confidence.value,
        "evidence": evidence_value(wrong.evidence, discreet=True),
        "weakened_by": [text_value(reason) for reason in wrong.weakened_by],
    }


def _stale_use(stale: StaleUse | None) -> Json:
    if stale is None:
        return None
    return {
        "kind": stale.kind.value,
        "chunk": _chunk(stale.chunk),
        "offset": stale.offset,
        "register": text_value(stale.register),
        "is_given_again": stale.is_given_again,
        "slot": address_value(stale.slot),
        "holders": [text_value(holder) for holder in stale.holders],
        "confidence": stale.confidence.value,
        "evidence": evidence_value(stale.evidence, discreet=True),
        "weakened_by": [text_value(reason) for reason in stale.weakened_by],
    }


def _pattern(pattern: Pattern | None) -> Json:
    if pattern is None:
        return None
    return {
        "kind": pattern.kind.value,
        "byte_count": pattern.byte_count,
        "target": text_or_null(pattern.target),
    }


def _repair(damage: Damage) -> Json:
    repair = damage.repair
    if repair is None:
        return None
    return {
        "address": address_value(repair.address),
        "expected": address_value(discreet_word(repair.expected)),
        "observed": address_value(observed_word(repair, damage.pattern)),
        "bit": repair.bit,
    }


def _chunk(chunk: ChunkPlace | None) -> Json:
    if chunk is None:
        return None
    return {
        "header_address": address_value(chunk.header_address),
        "payload_address": address_value(chunk.payload_address),
        "chunk_bytes": chunk.chunk_bytes,
        "usable_bytes": chunk.usable_bytes,
        "state": chunk.state.label,
        "is_mmapped": chunk.is_mmapped,
        "arena": chunk.arena,
        "holder": text_or_null(chunk.holder),
    }


def _place(note: PlaceNote | None) -> Json:
    if note is None:
        return None
    return {
        "address": address_value(discreet_address(note.address)),
        "kind": note.kind.value,
        "description": text_value(without_content(note.description)),
        "chunk": _chunk(note.chunk),
        "offset": note.offset,
    }


def _frame(frame: Frame) -> Json:
    return {
        "number": frame.number,
        "program_counter": address_value(frame.program_counter),
        "module": text_or_null(frame.module),
        "module_offset": frame.module_offset,
        "symbol": text_or_null(frame.symbol),
        "symbol_offset": frame.symbol_offset,
        "source": frame.source.value,
        "is_certain": frame.is_certain,
        "is_interrupted": frame.is_interrupted,
    }


def _abort_message(message: AbortMessage | None) -> Json:
    if message is None:
        return None
    return {
        "text": text_value(message.text),
        "kind": message.kind.value,
        "address": address_value(message.address),
        "found_by": text_value(message.found_by),
        "confidence": message.confidence.value,
        "pointer": address_value(message.pointer),
    }
