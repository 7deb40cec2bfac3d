"""How a process ended, as plain values: the fault, what lies there, registers, the backtrace, a signature.

Knows: the shape of a crash. Does not know: how any of it was found (``crashes``) or how it is shown (``render``).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from coreheap.damage import ChunkPlace
from coreheap.evidence import Confidence, Evidence
from coreheap.heap import ChunkState


class FaultKind(Enum):
    """What lies at an address that could not be accessed, or that a register holds."""

    NULL = "null"
    """Within the first pages: a null pointer and an offset."""
    NON_CANONICAL = "non_canonical"
    """No address at all on this machine; the kernel does not say which."""
    LIVE_CHUNK = "live_chunk"
    FREED_CHUNK = "freed_chunk"
    DAMAGED_CHUNK = "damaged_chunk"
    ALLOCATOR_DATA = "allocator_data"
    PAST_CHUNK_END = "past_chunk_end"
    """Not mapped, or a guard, shortly behind a chunk that ends at the end of its mapping."""
    STACK = "stack"
    STACK_GUARD = "stack_guard"
    """Below a thread's stack: it overflowed, as far as the stack pointer says."""
    READ_ONLY = "read_only"
    MODULE = "module"
    OTHER_MEMORY = "other_memory"
    UNMAPPED = "unmapped"


@dataclass(frozen=True, slots=True)
class PlaceNote:
    """What an address is: its kind, in words what lies there, and the chunk with the offset into its payload (it may be negative)."""

    address: int
    kind: FaultKind
    description: str
    chunk: ChunkPlace | None = None
    offset: int | None = None


@dataclass(frozen=True, slots=True)
class RegisterNote:
    """A register of the crashed thread that leads into a freed or damaged chunk or malloc's own data."""

    name: str
    place: PlaceNote


class FrameSource(Enum):
    """How a frame was found, the surest first."""

    REGISTERS = "registers"
    CALL_FRAME_INFORMATION = "call_frame_information"
    RETURN_ADDRESS = "return_address"
    """The frame before is no code: something was called through a pointer that leads nowhere, and this is where it returns to."""
    FRAME_POINTER = "frame_pointer"
    STACK_SCAN = "stack_scan"


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a backtrace. ``module_offset`` counts from the start of the module's file image.

    ``is_certain``: everything up to here followed from registers and call frame information, nothing was guessed.
    """

    number: int
    program_counter: int
    module: str | None
    module_offset: int | None
    symbol: str | None
    symbol_offset: int | None
    source: FrameSource
    is_certain: bool
    is_interrupted: bool = False
    """A signal came here: the frames before this one are those of its handler."""


class AbortKind(Enum):
    """Who wrote the last words that glibc keeps (__abort_msg)."""

    MALLOC = "malloc"
    STACK_SMASHING = "stack_smashing"
    FORTIFY = "fortify"
    ASSERTION = "assertion"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class AbortMessage:
    """glibc's own last words. ``pointer`` is the address that releases up to 2.26 name in it."""

    text: str
    kind: AbortKind
    address: int
    found_by: str
    confidence: Confidence
    pointer: int | None = None


class WrongFreeKind(Enum):
    """What was wrong with the pointer that free or realloc was given."""

    FREED_TWICE = "freed_twice"
    """A block that is free already."""
    INSIDE_LIVE_BLOCK = "inside_live_block"
    INSIDE_FREED_BLOCK = "inside_freed_block"
    """Free memory, not at the start of what is free now: a part of a block that was freed, or one that was joined with others."""
    NOT_FROM_MALLOC = "not_from_malloc"
    """A stack, a variable, a mapping of somebody else."""
    NOT_MAPPED = "not_mapped"
    """Nothing is there: a large block that was given back to the system, or no address at all."""
    UNKNOWN_BLOCK = "unknown_block"
    """A block that is free already; which of several was not found."""


@dataclass(frozen=True, slots=True)
class WrongFree:
    """A call of free or realloc that glibc refused, or that failed at once, while malloc's own data is as it should be.

    ``address`` is what the function was given, None where that was not found. ``listed_in``: the state of the free block; its tcache's
    thread is ``listed_thread``. ``others``: further addresses for which glibc would have said the same and that stand near; the
    pointer may be one of these. ``holders``: who points to the block, in words, at most some. ``message``: glibc's, None for a fault.
    """

    kind: WrongFreeKind
    function: str
    address: int | None
    place: PlaceNote | None
    listed_in: ChunkState | None
    listed_thread: int | None
    caller: int | None
    message: str | None
    others: tuple[int, ...]
    evidence: tuple[Evidence, ...]
    confidence: Confidence
    weakened_by: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()


class StaleUseKind(Enum):
    """What was read from a freed block and then used."""

    VIRTUAL_TABLE = "virtual_table"
    """Its first word, as the address of a table of functions."""
    FUNCTION_POINTER = "function_pointer"
    POINTER = "pointer"


@dataclass(frozen=True, slots=True)
class StaleUse:
    """A word of a freed block that the program took for a pointer and followed when it failed.

    ``offset``: of the word in the block ``chunk``, which is free, or which is another's by now (``is_given_again``). ``register``: what
    held the word, or leads to the block. ``slot``: the word that still has the block's address where others of its kind are held; None
    where that was not found.
    """

    kind: StaleUseKind
    chunk: ChunkPlace
    offset: int
    register: str
    is_given_again: bool
    slot: int | None
    evidence: tuple[Evidence, ...]
    confidence: Confidence
    weakened_by: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CrashContext:
    """How the process ended. Fields are None where the core does not say.

    ``signature`` is the same for crashes of the same kind at the same place, whatever the addresses; ``signature_parts`` are what it
    is made of, in order. ``inside_malloc``: whether a frame of the crashed thread is in one of malloc's functions.
    ``handled_signal``: the fault (SIGSEGV, SIGBUS, ...) in whose handler the process ended, as programs do that write a report of
    their own first; ``fault`` is then that signal's.
    """

    thread: int
    lwp: int
    signal: int | None
    signal_name: str | None
    signal_code: int | None
    signal_code_name: str | None
    sender_pid: int | None
    fault: PlaceNote | None
    registers: tuple[RegisterNote, ...]
    frames: tuple[Frame, ...]
    frames_end: str
    """Why the backtrace ends where it ends, a lower snake case word (``complete``, ``limit``, ``no_unwind_information``, ...)."""
    abort_message: AbortMessage | None
    inside_malloc: bool | None
    signature: str
    signature_parts: tuple[str, ...]
    handled_signal: int | None = None
    handled_signal_name: str | None = None
    wrong_free: WrongFree | None = None
    stale_use: StaleUse | None = None
