"""How a process ended: from the registers, the stack and the last words of the crashed thread to one value.

Knows: how the parts of this package fit together. Does not know: whether the heap is damaged (``forensics`` says so), or how a
crash is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import PurePosixPath

from coreheap.corefile import Core, Thread
from coreheap.corefile.stacks import Stacks
from coreheap.corefile.unwinding import HandledSignal
from coreheap.crash import CrashContext, FaultKind, PlaceNote, RegisterNote
from coreheap.crashes.abort_message import find_abort_message
from coreheap.crashes.backtrace import Backtrace, FunctionNames, backtrace, is_inside_malloc
from coreheap.crashes.places import Places, is_canonical
from coreheap.crashes.signals import (
    BUS_ADRERR,
    SEGV_ACCERR,
    SI_KERNEL,
    SIGABRT,
    SIGBUS,
    SIGFPE,
    SIGILL,
    SIGSEGV,
    SIGTRAP,
    code_name,
    signal_name,
)
from coreheap.crashes.signature import signature_of, signature_parts
from coreheap.crashes.stale_objects import Holders, StaleObjects
from coreheap.crashes.wrong_free import find_wrong_free
from coreheap.damage import ChunkPlace, Damage
from coreheap.errors import MemoryFault
from coreheap.heap import ChunkState, HeapSnapshot

__all__ = ["Holders", "find_crash"]

HOLDERS_NAMED = 4

_FAULTS = (SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP)
_NOTED = (FaultKind.FREED_CHUNK, FaultKind.DAMAGED_CHUNK, FaultKind.ALLOCATOR_DATA)
_NO_POINTERS = (
    *("rip", "rsp", "eip", "esp", "sp", "pc"),
    *("orig_rax", "orig_eax", "eflags", "pstate"),
    *("cs", "ss", "ds", "es", "fs", "gs"),
)
"""Registers that hold no pointers of the program, or that have a part of the report of their own."""


def find_crash(
    core: Core,
    heap: HeapSnapshot | None,
    stacks: Stacks,
    damages: Sequence[Damage] = (),
    holders: Holders | None = None,
) -> CrashContext | None:
    """How the process ended; None for one that was dumped while it lived, without a signal or an abort message.

    The thread that the core was written for is the first one. ``holders`` names who points to the block at an address; None where
    references were not searched.
    """
    process = core.process
    message = find_abort_message(core) if process.signal in (SIGABRT, None) else None
    if not core.threads or (process.signal is None and message is None):
        return None
    thread = core.threads[0]
    places = Places(core, heap, stacks, damages, thread.index)
    names = FunctionNames(core)
    trace = backtrace(core, thread, stacks, names)
    fault = _fault(core, thread, places, _certain_pointers(trace, 0))
    number, handled = _handled_fault(trace)
    telling = trace.frames
    if handled is not None and fault is None:
        # The handler is the same for all of a program's crashes; what it was called for is what happened.
        fault, telling = _handled_place(handled, places, _certain_pointers(trace, number)), trace.frames[number:]
    build_ids = {module.name: module.build_id.hex() for module in core.modules if module.build_id is not None}
    name = signal_name(process.signal)
    handled_name = signal_name(handled.number) if handled is not None else None
    program = PurePosixPath(process.executable).name
    parts = signature_parts(name, fault, message, damages, telling, build_ids, handled_name, program)
    wrong = find_wrong_free(core, heap, places, thread.index, trace, message, fault if handled is None else None)
    stale = None
    inside = is_inside_malloc(core, trace, names)
    if heap is not None and fault is not None and wrong is None and not inside and not _is_of_libc(trace, number):
        stale = StaleObjects(core, places, trace, number, damages, holders).find(fault)
    return CrashContext(
        thread=thread.index,
        lwp=thread.lwp,
        signal=process.signal,
        signal_name=name,
        signal_code=process.signal_code,
        signal_code_name=code_name(process.signal, process.signal_code),
        sender_pid=process.sender_pid,
        fault=fault,
        registers=tuple(_register_notes(thread.registers, places)),
        frames=trace.frames,
        frames_end=trace.end,
        abort_message=message,
        inside_malloc=inside,
        signature=signature_of(parts),
        signature_parts=parts,
        handled_signal=handled.number if handled is not None else None,
        handled_signal_name=handled_name,
        wrong_free=replace(wrong, holders=_names(holders, wrong.place.chunk if wrong.place else None))
        if wrong
        else None,
        stale_use=replace(stale, holders=_names(holders, stale.chunk, stale.slot)) if stale else None,
    )


def _names(holders: Holders | None, chunk: ChunkPlace | None, slot: int | None = None) -> tuple[str, ...]:
    """Who points to a block, in words, the word at ``slot`` first; nobody to top, which no program has."""
    if holders is None or chunk is None or chunk.state is ChunkState.TOP:
        return ()
    found = sorted(holders(chunk.payload_address), key=lambda holder: holder.address != slot or slot is None)
    return tuple(dict.fromkeys(holder.name for holder in found))[:HOLDERS_NAMED]


def _is_of_libc(trace: Backtrace, row: int) -> bool:
    """Whether a frame without a name is libc's, and so may be malloc's: what that follows into nothing is a link of its lists."""
    frame = trace.frames[row]
    return frame.symbol is None and frame.module is not None and frame.module.startswith(("libc.so", "libc-2"))


def _handled_fault(trace: Backtrace) -> tuple[int, HandledSignal | None]:
    """The innermost fault that a handler was called for, with the number of the frame that it interrupted; only where every frame
    up to there is certain."""
    for number, handled in trace.handled.items():
        if handled.number in _FAULTS and trace.frames[number].is_certain:
            return number, handled
    return 0, None


def _certain_pointers(trace: Backtrace, first: int) -> tuple[int, ...]:
    """The stack pointers of a frame and its callers, as far as these are certain."""
    rows = zip(trace.frames[first:], trace.stack_pointers[first:], strict=True)
    return tuple(pointer for _, pointer in takewhile(lambda row: row[0].is_certain, rows))


def _handled_place(handled: HandledSignal, places: Places, stack_pointers: tuple[int, ...]) -> PlaceNote | None:
    """What lies where the access failed that a handler was called for."""
    is_known = handled.code is None or 0 < handled.code < SI_KERNEL
    if handled.address is None or not is_known or handled.number not in (SIGSEGV, SIGBUS):
        return None
    return _place(places, handled.address, handled.number, handled.code, stack_pointers)


def _place(places: Places, address: int, signal: int, code: int | None, stack_pointers: tuple[int, ...]) -> PlaceNote:
    return places.fault(
        address,
        was_denied=signal == SIGSEGV and code == SEGV_ACCERR,
        stack_pointers=stack_pointers,
        was_past_file=signal == SIGBUS and code == BUS_ADRERR,
    )


def _register_notes(registers: Mapping[str, int], places: Places) -> Iterator[RegisterNote]:
    """Registers that lead into freed or damaged chunks or malloc's own data; what they lead to may be long out of use."""
    for name, value in registers.items():
        place = places.in_heap(value) if name not in _NO_POINTERS else None
        if place is not None and place.kind in _NOTED:
            yield RegisterNote(name, place)


def _fault(core: Core, thread: Thread, places: Places, stack_pointers: tuple[int, ...]) -> PlaceNote | None:
    """What lies where memory could not be accessed; None for signals that do not come of that, or do not say where."""
    process = core.process
    if process.signal not in (SIGSEGV, SIGBUS):
        return None
    if process.fault_address is not None:
        return _place(places, process.fault_address, process.signal, process.signal_code, stack_pointers)
    if process.signal_code == SI_KERNEL and core.machine == "x86_64":
        return _non_canonical(core, thread)
    return None


def _non_canonical(core: Core, thread: Thread) -> PlaceNote | None:
    """The address of a general protection fault, which the kernel does not tell: by the instruction and its registers.

    Where the instruction is not in the core, the one register that holds no address, if it is one.
    """
    registers, counter = thread.registers, thread.program_counter
    if not is_canonical(counter, core.machine):
        return PlaceNote(counter, FaultKind.NON_CANONICAL, "rip itself is no address on x86-64")
    code = _code_at(core, counter)
    if code:
        from coreheap.corefile.operands import x86_64_operands

        for operand in x86_64_operands(code, counter, registers) or ():
            if not is_canonical(operand.address, core.machine):
                wrong = [name for name in operand.registers if not is_canonical(registers[name], core.machine)]
                cause = f"{' and '.join(wrong or operand.registers)} of the instruction that failed"
                return PlaceNote(operand.address, FaultKind.NON_CANONICAL, f"no address on x86-64: {cause}")
        target = _target_of_call(core, counter, registers)
        if target is not None:
            return PlaceNote(
                target, FaultKind.NON_CANONICAL, "no address on x86-64: where the instruction that failed goes"
            )
        if code[0] in (0xC3, 0xC2) or code[:2] == b"\xf3\xc3":
            return _returned_to(core, thread)
        return None
    wrong = [
        name
        for name, value in registers.items()
        if name not in _NO_POINTERS and not name.endswith("_base") and not is_canonical(value, core.machine)
    ]
    if len(wrong) != 1:
        return None
    text = f"no address on x86-64: {wrong[0]}, the only such register (the instruction is not in the core)"
    return PlaceNote(registers[wrong[0]], FaultKind.NON_CANONICAL, text)


def _target_of_call(core: Core, counter: int, registers: Mapping[str, int]) -> int | None:
    """Where a call or jump through memory would have gone, when that is no address."""
    from coreheap.corefile.register_history import accessed_at

    accessed = accessed_at(core, counter, registers)
    target = accessed.target.word if accessed is not None and accessed.target is not None else None
    return target if target is not None and not is_canonical(target, core.machine) else None


def _returned_to(core: Core, thread: Thread) -> PlaceNote | None:
    """Where a return instruction would have gone, when that is no address: the stack was overwritten."""
    try:
        target = core.memory.read_word(thread.stack_pointer)
    except MemoryFault:
        return None
    if is_canonical(target, core.machine):
        return None
    return PlaceNote(target, FaultKind.NON_CANONICAL, "no address on x86-64: the return address on the stack")


def _code_at(core: Core, address: int) -> bytes:
    """Up to 15 bytes of code, the longest instruction of x86."""
    for byte_count in (15, 4, 1):
        try:
            return core.memory.read(address, byte_count)
        except MemoryFault:
            continue
    return b""
