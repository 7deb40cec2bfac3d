"""The words for damages and crashes: kinds, places, patterns, chunks, frames.

Knows: one phrase for each value of ``damage`` and ``crash``. Does not know: terminals, nor findings (``wording``). Text out of the
core is made printable here. What the process's memory holds is never among the words: of foreign bytes only their kind and number.
"""

from __future__ import annotations

from coreheap.crash import CrashContext, FaultKind, Frame, FrameSource, PlaceNote
from coreheap.damage import ChunkPlace, Damage, DamagedPlace, DamageKind, Pattern, PatternKind, Repair
from coreheap.heap import ChunkState
from coreheap.quantities import format_address, format_bytes, format_count
from coreheap.render.discretion import discreet_address, discreet_word, without_content
from coreheap.render.escaping import printable, shortened
from coreheap.render.wording import LONGEST_TEXT, PLACES, humanized

_KINDS = {
    DamageKind.OVERFLOW: "A block was written past its end, over",
    DamageKind.UNDERFLOW: "A live block was written before its start, over",
    DamageKind.USE_AFTER_FREE: "A block was written to after it was freed, over",
    DamageKind.DOUBLE_FREE: "One block is free twice, as is seen from",
    DamageKind.INVALID_FREE: "What malloc never gave out was freed, as is seen from",
    DamageKind.BIT_FLIP: "One bit is wrong in",
    DamageKind.OVERWRITE: "Something wrote, nothing says from where, over",
    DamageKind.IN_TRANSITION: "A thread was inside malloc and had not finished with",
}

_BY_LISTS = {
    DamageKind.DOUBLE_FREE: "One block is free twice: a list of free chunks holds it a second time.",
    DamageKind.INVALID_FREE: "What malloc never gave out was freed: a list of free chunks holds it.",
}

_PATTERNS = {
    PatternKind.TEXT: "text",
    PatternKind.FILL_BYTE: "one byte repeated",
    PatternKind.ZEROS: "zeros",
    PatternKind.POINTER: "a pointer",
    PatternKind.SHIFTED_POINTER: "a pointer that is not aligned",
    PatternKind.SMALL_NUMBER: "a small number",
    PatternKind.ONE_BIT: "one bit",
    PatternKind.OTHER: "bytes of no known pattern",
}

_SAFE_PATTERNS = frozenset({PatternKind.ZEROS, PatternKind.ONE_BIT})
"""Patterns whose word may be shown as it stands: zeros, and malloc's own word but for a bit."""

_SOURCES = {
    FrameSource.REGISTERS: "registers",
    FrameSource.CALL_FRAME_INFORMATION: "unwind information",
    FrameSource.RETURN_ADDRESS: "return address",
    FrameSource.FRAME_POINTER: "frame pointer",
    FrameSource.STACK_SCAN: "stack scan",
}

_ENDS = {
    "complete": "the backtrace is complete",
    "limit": "more frames than are looked for",
    "no_unwind_information": "no unwind information goes on from here",
    "frame_pointers_end": "the chain of frame pointers ends",
    "return_address_not_code": "the next return address leads to no code",
    "stack_does_not_grow": "the next frame would lie below this one",
    "stack_not_in_core": "the stack is not in the core any further",
    "stack_pointer_unknown": "the stack pointer is not known from here on",
}

_FAULTS = {
    FaultKind.NULL: "null pointer",
    FaultKind.NON_CANONICAL: "no address on this machine",
    FaultKind.LIVE_CHUNK: "live block",
    FaultKind.FREED_CHUNK: "freed block",
    FaultKind.DAMAGED_CHUNK: "damaged chunk",
    FaultKind.ALLOCATOR_DATA: "malloc's own data",
    FaultKind.PAST_CHUNK_END: "past the end of a block",
    FaultKind.STACK: "stack",
    FaultKind.STACK_GUARD: "stack overflow",
    FaultKind.READ_ONLY: "read-only memory",
    FaultKind.MODULE: "module",
    FaultKind.OTHER_MEMORY: "other memory",
    FaultKind.UNMAPPED: "nothing is mapped there",
}


def damage_sentence(damage: Damage) -> str:
    """What happened, in one sentence without addresses."""
    place = PLACES[damage.place.value]
    if damage.kind is DamageKind.USE_AFTER_FREE and damage.place is DamagedPlace.FREE_CONTENT:
        return "A block was written to after it was freed; the fill that malloc gave it has changed."
    if damage.kind in _BY_LISTS and damage.place is DamagedPlace.FREE_LIST:
        return _BY_LISTS[damage.kind]
    if damage.kind is DamageKind.OVERFLOW and damage.culprit is not None and damage.culprit.state is ChunkState.TCACHE:
        return f"A block was written past its end before it was freed, over {place}."
    return f"{_KINDS[damage.kind]} {place}."


def damage_title(damage: Damage) -> str:
    """A few words for a heading: the kind, and where."""
    arena = "" if damage.arena is None else f", arena {damage.arena}"
    return f"{humanized(damage.kind.value)}{arena}"


def bytes_text(damage: Damage) -> str:
    """Where the foreign bytes are, how many, and what they look like."""
    extent = damage.bytes
    text = f"{format_address(extent.start)} to {format_address(extent.end)}, {format_bytes(extent.byte_count)}"
    return text if damage.pattern is None else f"{text}: {pattern_text(damage.pattern)}"


def pattern_text(pattern: Pattern) -> str:
    """What foreign bytes look like; never the bytes."""
    target = f" to {shortened(pattern.target, LONGEST_TEXT)}" if pattern.target else ""
    return f"{_PATTERNS[pattern.kind]}{target}"


def reach_text(damage: Damage) -> str:
    """How far the foreign bytes reach from the block that was written past; empty where that says nothing."""
    culprit = damage.culprit
    if culprit is None:
        return ""
    end = culprit.payload_address + culprit.usable_bytes
    if damage.kind is DamageKind.OVERFLOW and damage.bytes.end > end:
        return f"its usable bytes end at {format_address(end)}; the write reached at least {format_bytes(damage.bytes.end - end)} past that"
    if damage.kind is DamageKind.UNDERFLOW and damage.bytes.start < culprit.payload_address:
        return f"the write began at least {format_bytes(culprit.payload_address - damage.bytes.start)} before the block"
    if damage.kind is DamageKind.USE_AFTER_FREE and damage.bytes.start >= culprit.payload_address:
        offset = damage.bytes.start - culprit.payload_address
        return f"written {format_bytes(offset)} into the block" if offset else "written at the start of the block"
    return ""


def chunk_text(chunk: ChunkPlace) -> str:
    """A chunk: its block's address, size, state, arena and holder."""
    where = "mmapped" if chunk.is_mmapped else "" if chunk.arena is None else f"arena {chunk.arena}"
    size = f"{format_bytes(chunk.usable_bytes)} usable"
    if not chunk.usable_bytes:
        size = f"a chunk of {format_bytes(chunk.chunk_bytes)}"
    parts = (size, humanized(chunk.state.label), where)
    text = f"block {format_address(chunk.payload_address)} ({', '.join(part for part in parts if part)})"
    return f"{text}, held by {shortened(chunk.holder, LONGEST_TEXT)}" if chunk.holder else text


def observed_word(repair: Repair, pattern: Pattern | None) -> int | None:
    """The wrong word of a repair where it is malloc's own but for a bit, or zeros; else it is content of the process: None."""
    if repair.bit is not None:
        return repair.observed
    return repair.observed if pattern is not None and pattern.kind in _SAFE_PATTERNS else None


def repair_text(repair: Repair, pattern: Pattern | None) -> str:
    """The word that would make the heap right again."""
    if discreet_word(repair.expected) is None:
        return f"the word at {format_address(repair.address)} is wrong"
    observed = observed_word(repair, pattern)
    instead = "" if observed is None else f" instead of {format_address(observed)}"
    bit = "" if repair.bit is None else f" (bit {repair.bit} differs)"
    return f"the word at {format_address(repair.address)} should be {format_address(repair.expected)}{instead}{bit}"


def place_text(note: PlaceNote) -> str:
    """An address and what it is, with who holds the chunk that it is in; no number where it is none, but what the process wrote."""
    address = discreet_address(note.address)
    where = "a number that is not shown" if address is None else format_address(address)
    if note.description:
        words = shortened(without_content(note.description), 2 * LONGEST_TEXT)
        holder = note.chunk.holder if note.chunk is not None else None
        return f"{where}: {words}{f', held by {shortened(holder, LONGEST_TEXT)}' if holder else ''}"
    if note.chunk is None:
        return f"{where}: {_FAULTS[note.kind]}"
    offset = "" if note.offset is None else f"offset {note.offset:,} of "
    return f"{where}: {_FAULTS[note.kind]}, {offset}{chunk_text(note.chunk)}"


def signal_text(crash: CrashContext, pid: int | None) -> str:
    """How the process with that id was ended: the signal, its code, and who sent it."""
    if crash.signal_name is not None:
        name = printable(crash.signal_name)
    else:
        name = "an unknown signal" if crash.signal is None else f"signal {crash.signal}"
    code = crash.signal_code_name or (None if crash.signal_code is None else f"code {crash.signal_code}")
    text = name if code is None else f"{name} ({printable(code)})"
    by_whom = "itself" if crash.sender_pid == pid else f"process {crash.sender_pid}"
    sender = "" if crash.sender_pid is None else f", sent by {by_whom}"
    return f"{text} in thread {format_count(crash.thread)} (lwp {crash.lwp}){sender}"


def function_text(frame: Frame) -> str:
    """The function of a frame; question marks where nothing names it."""
    if frame.symbol is None:
        return "??"
    offset = "" if frame.symbol_offset is None else f"+{frame.symbol_offset:#x}"
    return f"{shortened(frame.symbol, LONGEST_TEXT)}{offset}"


def module_text(frame: Frame) -> str:
    """The file of a frame without its folders, and the offset in it."""
    if frame.module is None:
        return ""
    name = printable(frame.module.rstrip("/").rpartition("/")[2] or frame.module)
    return name if frame.module_offset is None else f"{name}+{frame.module_offset:#x}"


def source_text(frame: Frame) -> str:
    """How a frame was found."""
    return _SOURCES[frame.source]


def frames_end_text(crash: CrashContext) -> str:
    """Why the backtrace ends where it ends."""
    return _ENDS.get(crash.frames_end, humanized(crash.frames_end))
