"""From the registers of a thread to its callers: one step a frame, each with how it was found.

Knows: DWARF register numbers of the machines, what the kernel writes for a signal handler, frame pointers, what a call looks
like. Does not know: symbols, or what a frame means.

The surest way comes first: call frame information (of the core's memory, else of the module's verified file), the kernel's signal
frame where the code is its known trampoline, the return address where the program counter is no code, the chain of frame pointers,
words on the stack that lie behind a call. From the first frame on that one of the latter three gave, nothing is certain.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from coreheap.corefile import elf
from coreheap.corefile.call_frames import (
    PROGRAM_BYTES_LIMIT,
    PT_GNU_EH_FRAME,
    CallFrameError,
    CallFrames,
    Expression,
    FrameRules,
    ListedCallFrames,
    Rule,
    RuleKind,
)
from coreheap.corefile.core import Core
from coreheap.corefile.expressions import evaluated
from coreheap.corefile.machines import MACHINES, TRAMPOLINES, Trampoline, is_indirect_call
from coreheap.corefile.modules import Module
from coreheap.corefile.relocations import FileImage
from coreheap.corefile.symbols import ElfFile
from coreheap.corefile.threads import Thread
from coreheap.crash import FrameSource
from coreheap.errors import MemoryFault

FRAME_LIMIT: Final = 128
SIGNAL_FRAME_LIMIT: Final = 8
SCAN_BYTES: Final = 1 << 14
"""So far above a stack pointer the next return address is looked for."""
SCANNED_WORDS: Final = 1 << 15
"""Words of stacks that one trace looks at; some 0.1 s."""
SCANNED_FRAMES_WITHOUT_CODE: Final = 16
"""Where no code can be read, any word that leads into code may be a return address: there are no more of these."""
PAGE_FAULT: Final = 14
"""X86_TRAP_PF."""
SIGSEGV: Final = 11
LARGEST_ACCESS: Final = 64
"""Bytes of one access, an AVX-512 register's: so far from its operand's address it may fail."""
_EXECUTE: Final = 1
_UNSIGNED_ADDRESS: Final = (1 << 48) - 1
"""aarch64's user addresses without the signature of pointer authentication (arch/arm64, "Pointer authentication")."""


@dataclass(frozen=True, slots=True)
class HandledSignal:
    """The signal that interrupted a frame; ``code`` and ``address`` (si_addr) None where the kernel's frame does not say."""

    number: int
    code: int | None
    address: int | None


@dataclass(frozen=True, slots=True)
class Step:
    """One frame. ``is_exact``: the program counter is that of an instruction to be run, not one behind a call.

    ``interrupted_by``: the signal whose handler the frames before this one are. ``registers``: what is known of them, by DWARF
    number; behind a call those that it preserves.
    """

    program_counter: int
    stack_pointer: int
    source: FrameSource
    is_certain: bool
    is_exact: bool
    interrupted_by: HandledSignal | None = None
    registers: Mapping[int, int] = field(default_factory=dict)

    @property
    def code_address(self) -> int:
        """An address inside the instruction that the frame is at: what tables are asked for."""
        return self.program_counter if self.is_exact else self.program_counter - 1


@dataclass(slots=True)
class _State:
    """Registers of a frame as far as they are known, by DWARF number."""

    registers: dict[int, int]
    program_counter: int
    is_exact: bool


class _EndOfTrace(Exception):
    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ModuleMap:
    """The module of an address, for many questions."""

    def __init__(self, core: Core) -> None:
        self._modules = core.modules
        self._starts = [module.start for module in self._modules]

    def at(self, address: int) -> Module | None:
        """The module whose range holds an address."""
        row = bisect_right(self._starts, address) - 1
        return self._modules[row] if row >= 0 and address < self._modules[row].end else None


def unwind(core: Core, thread: Thread, stack_end: int | None = None) -> tuple[tuple[Step, ...], str]:
    """The frames of a thread, innermost first, and why they end where they end.

    ``stack_end`` bounds the search for return addresses; None: the mapping's end does. The reason is a lower snake case word:
    ``complete`` (the code that starts a thread or program says that it has no caller), ``limit``, ``stack_does_not_grow``,
    ``return_address_not_code``, ``stack_not_in_core``, ``frame_pointers_end`` (their chain ends with 0, as where a thread starts), ``no_unwind_information`` (nothing led further), or what was wrong with
    call frame information.
    """
    return _Unwinder(core, stack_end).steps(thread)


class _Unwinder:
    def __init__(self, core: Core, stack_end: int | None) -> None:
        self._core = core
        self._memory = core.memory
        self._machine = MACHINES[core.machine]
        self._word = core.word_bytes
        self._mask = (1 << 8 * self._word) - 1
        self._modules = ModuleMap(core)
        self._frames_of: dict[int, CallFrames | None] = {}
        self._budget = [PROGRAM_BYTES_LIMIT]
        self._stack_end = stack_end
        self._scanned_without_code = 0
        self._words_left = SCANNED_WORDS

    def steps(self, thread: Thread) -> tuple[tuple[Step, ...], str]:
        names = self._machine.numbers
        registers = {names[name]: value for name, value in thread.registers.items() if name in names}
        state = _State(registers, thread.program_counter, True)
        found = [
            Step(state.program_counter, thread.stack_pointer, FrameSource.REGISTERS, True, True, registers=registers)
        ]
        signal_frames = 0
        while True:
            if len(found) >= FRAME_LIMIT:
                return tuple(found), "limit"
            try:
                caller, source, is_signal = self._caller(state, len(found) == 1)
            except _EndOfTrace as end:
                return tuple(found), end.reason
            except CallFrameError as error:
                return tuple(found), error.reason
            sp = self._machine.stack_pointer
            grew = caller.registers[sp] - state.registers[sp]
            # A handler may run on another stack. On aarch64 a function without a frame of its own has its caller's.
            may_stay = (
                self._core.machine == "aarch64" and state.is_exact and caller.program_counter != state.program_counter
            )
            signal_frames += is_signal
            if (grew < 0 or (grew == 0 and not may_stay)) and not is_signal:
                return tuple(found), "stack_does_not_grow"
            if signal_frames > SIGNAL_FRAME_LIMIT:
                return tuple(found), "limit"
            is_certain = found[-1].is_certain and source in (FrameSource.REGISTERS, FrameSource.CALL_FRAME_INFORMATION)
            signal = self._signal_of(state, caller) if is_signal else None
            found.append(
                Step(
                    caller.program_counter,
                    caller.registers[sp],
                    source,
                    is_certain,
                    caller.is_exact,
                    signal,
                    caller.registers,
                )
            )
            state = caller

    def _caller(self, state: _State, is_first: bool) -> tuple[_State, FrameSource, bool]:
        """The caller of a frame, how it was found, and whether it was interrupted by a signal."""
        if self._machine.stack_pointer not in state.registers:
            raise _EndOfTrace("stack_pointer_unknown")
        code_address = state.program_counter if state.is_exact else state.program_counter - 1
        rules = self._rules_at(code_address)
        if rules is not None:
            caller = self._by_rules(state, rules)
            if caller is not None:
                return caller, FrameSource.CALL_FRAME_INFORMATION, rules.is_signal_frame
        caller = self._by_trampoline(state)
        if caller is not None:
            return caller, FrameSource.REGISTERS, True
        # AAPCS64 ends the chain with 0; on x86 the register is a general one, unless the chain itself led here.
        is_chained = self._core.machine == "aarch64" or len(state.registers) == 2
        if is_chained and state.registers.get(self._machine.frame_pointer) == 0 and not is_first:
            raise _EndOfTrace("frame_pointers_end")
        is_code = self._is_code(code_address)
        if is_code:
            caller = self._by_frame_pointer(state)
            if caller is not None:
                return caller, FrameSource.FRAME_POINTER, False
        elif state.is_exact:
            caller = self._by_return_address(state)
            if caller is not None:
                return caller, FrameSource.RETURN_ADDRESS, False
        return self._by_scan(state), FrameSource.STACK_SCAN, False

    # Call frame information

    def _rules_at(self, address: int) -> FrameRules | None:
        module = self._modules.at(address)
        if module is None:
            return None
        if module.start not in self._frames_of:
            self._frames_of[module.start] = self._call_frames(module)
        frames = self._frames_of[module.start]
        return frames.rules_at(address, self._budget) if frames is not None else None

    def _call_frames(self, module: Module) -> CallFrames | None:
        """A module's call frame information, where its program headers tell of any."""
        bias = module.load_bias
        headers = module.program_headers or (module.elf_file.segments if module.elf_file is not None else None)
        if bias is None or headers is None:
            return None
        image = FileImage(module.elf_file) if module.elf_file is not None else None

        def read(address: int, byte_count: int) -> bytes | None:
            try:
                return self._memory.read(address, byte_count)
            except MemoryFault:
                return image.read(address - bias & self._mask, byte_count) if image is not None else None

        rows = headers.rows_of_kind(PT_GNU_EH_FRAME)
        if len(rows):
            return CallFrames(read, bias + int(headers.address[rows[0]]) & self._mask, self._word)
        section = _section_address(module.elf_file, b".eh_frame") if module.elf_file is not None else None
        if section is None:
            return None
        return ListedCallFrames(read, bias + section[0] & self._mask, section[1], self._word)

    def _by_rules(self, state: _State, rules: FrameRules) -> _State | None:
        """The caller by call frame information; None where that asks for a register that is not known."""
        known = state.registers
        try:
            if rules.cfa_register is None:
                cfa = self._evaluated(rules.cfa_expression, state, None)
            else:
                cfa = known[rules.cfa_register] + rules.cfa_offset & self._mask
            # What no rule names is taken to be as it was: of registers that a call preserves, the ABI says so.
            registers = (
                dict(known) if rules.is_signal_frame else {n: known[n] for n in self._machine.preserved if n in known}
            )
            registers[self._machine.stack_pointer] = cfa
            return_address: int | None = known.get(30) if self._core.machine == "aarch64" else None
            for number, rule in rules.registers.items():
                value = self._ruled(rule, number, cfa, state)
                if number == rules.return_register:
                    if rule.kind is RuleKind.UNDEFINED:
                        raise _EndOfTrace("complete")
                    return_address = value
                if value is None:
                    registers.pop(number, None)
                else:
                    registers[number] = value
        except KeyError:
            return None
        if return_address is None:
            return None
        if not rules.is_signal_frame:
            return_address = self._code_pointer(return_address)
            if return_address == 0:
                raise _EndOfTrace("complete")
        if not self._is_code(return_address) and not rules.is_signal_frame:
            raise _EndOfTrace("return_address_not_code")
        return _State(registers, return_address, rules.is_signal_frame)

    def _ruled(self, rule: Rule, number: int, cfa: int, state: _State) -> int | None:
        """A register of the caller; None where it is not known. Raises KeyError where the rule needs an unknown one."""
        if rule.kind is RuleKind.SAVED:
            return self._stack_word(cfa + rule.number)
        if rule.kind is RuleKind.SAME:
            return state.registers.get(number)
        if rule.kind is RuleKind.VALUE:
            return cfa + rule.number & self._mask
        if rule.kind is RuleKind.REGISTER:
            return state.registers.get(rule.number)
        if rule.kind is RuleKind.SAVED_AT_EXPRESSION:
            return self._stack_word(self._evaluated(rule.expression, state, cfa))
        if rule.kind is RuleKind.VALUE_OF_EXPRESSION:
            return self._evaluated(rule.expression, state, cfa)
        return None

    def _evaluated(self, expression: Expression, state: _State, cfa: int | None) -> int:
        def register(number: int) -> int:
            # x86's program counter has a number of its own, and no saved value in a frame.
            is_counter = number == self._machine.program_counter and self._core.machine != "aarch64"
            return state.program_counter if is_counter else state.registers[number]

        return evaluated(expression, cfa, register, self._stack_word, 8 * self._word)

    # The kernel's signal frame

    def _by_trampoline(self, state: _State) -> _State | None:
        """The interrupted frame where the code is what a signal handler returns to."""
        trampoline = self._trampoline_at(state.program_counter)
        if trampoline is None:
            return None
        context = state.registers[self._machine.stack_pointer] + trampoline.context & self._mask
        if trampoline.is_pointer:
            context = self._stack_word(context)
        registers = {number: self._stack_word(context + offset) for number, offset in trampoline.registers}
        return _State(registers, self._stack_word(context + trampoline.program_counter), True)

    def _signal_of(self, state: _State, interrupted: _State) -> HandledSignal | None:
        """The signal of the kernel's frame that a trampoline has above its stack pointer; None where it cannot be read."""
        trampoline = self._trampoline_at(state.program_counter)
        if trampoline is None:
            return None
        pointer = state.registers[self._machine.stack_pointer]
        try:
            if trampoline.signal_info is None:
                number = self._memory.read_word(pointer + trampoline.signal_number & self._mask)
                return HandledSignal(
                    number, None, self._memory.read_word(pointer + trampoline.fault_address & self._mask)
                )
            info = pointer + trampoline.signal_info & self._mask
            if trampoline.is_pointer:
                info = self._memory.read_word(info)
            number, _, code = struct.unpack("<iii", self._memory.read(info, 12))
            if number == 0 and self._core.machine == "x86_64":
                return self._fault_without_info(pointer, interrupted)
            return HandledSignal(number, code, self._memory.read_word(info + (16 if self._word == 8 else 12)))
        except MemoryFault:
            return None

    def _fault_without_info(self, context: int, interrupted: _State) -> HandledSignal | None:
        """The page fault that a handler without SA_SIGINFO was called for: the kernel leaves siginfo_t out on x86-64.

        The context has trapno and cr2 (arch/x86/include/uapi/asm/sigcontext.h), but of the thread's last fault, whatever the
        signal is: it counts where the interrupted instruction accesses that very place.
        """
        trap, _, address = self._memory.read_words(context + 200, 3).tolist()
        names = {number: name for name, number in self._machine.numbers.items()}
        registers = {names[number]: value for number, value in interrupted.registers.items() if number in names}
        if trap != PAGE_FAULT or "rsp" not in registers:
            return None
        from coreheap.corefile.operands import INSTRUCTION_BYTES, x86_64_operands

        code = self._memory.read(interrupted.program_counter, INSTRUCTION_BYTES)
        operands = x86_64_operands(code, interrupted.program_counter, registers) or ()
        if any(abs(operand.address - address) <= LARGEST_ACCESS for operand in operands):
            return HandledSignal(SIGSEGV, None, address)
        return None

    def _trampoline_at(self, address: int) -> Trampoline | None:
        for trampoline in TRAMPOLINES[self._core.machine]:
            try:
                if self._memory.read(address, len(trampoline.code)) == trampoline.code:
                    return trampoline
            except MemoryFault:
                continue
        return None

    # Guesses

    def _by_frame_pointer(self, state: _State) -> _State | None:
        """The caller by the pair of words that a frame pointer leads to; None where they are no such pair."""
        pointer = state.registers.get(self._machine.frame_pointer, 0)
        stack_pointer = state.registers[self._machine.stack_pointer]
        if pointer % self._word or not stack_pointer <= pointer < self._end_of_stack(stack_pointer) - self._word:
            return None
        try:
            saved, link = self._memory.read_words(pointer, 2).tolist()
        except MemoryFault:
            return None
        link = self._code_pointer(link)
        if not (self._may_return_to(link) or self._trampoline_at(link)) or (saved and saved <= pointer):
            return None
        registers = {self._machine.frame_pointer: saved, self._machine.stack_pointer: pointer + 2 * self._word}
        return _State(registers, link, False)

    def _by_return_address(self, state: _State) -> _State | None:
        """Who called through a pointer that leads to no code: nothing ran since, so its registers are still there, and what the
        call wrote is on top of the stack, on aarch64 in x30. None where that is not behind a call."""
        pointer = state.registers[self._machine.stack_pointer]
        is_on_stack = self._core.machine != "aarch64"
        try:
            word = self._memory.read_word(pointer) if is_on_stack else state.registers.get(30, 0)
        except MemoryFault:
            return None
        link = self._code_pointer(word)
        if not self._may_return_to(link) or (is_on_stack and self._code_before(link) is None):
            return None
        kept = self._machine.preserved
        registers = {number: value for number, value in state.registers.items() if number in kept}
        registers[self._machine.stack_pointer] = pointer + self._word * is_on_stack
        return _State(registers, link, False)

    def _by_scan(self, state: _State) -> _State:
        """The caller by the next word on the stack that lies behind a call, or is where a signal handler returns to."""
        stack_pointer = state.registers[self._machine.stack_pointer]
        for place, word in self._stack_words(stack_pointer):
            link = self._code_pointer(word)
            if self._is_code(link) and self._trampoline_at(link):
                return _State({self._machine.stack_pointer: place + self._word}, link, False)
            if not self._may_return_to(link):
                continue
            if self._code_before(link) is None:
                self._scanned_without_code += 1
                if self._scanned_without_code > SCANNED_FRAMES_WITHOUT_CODE:
                    raise _EndOfTrace("no_unwind_information")
            registers = {self._machine.stack_pointer: place + self._word}
            pointer = state.registers.get(self._machine.frame_pointer, 0)
            if pointer > place:
                registers[self._machine.frame_pointer] = pointer
            return _State(registers, link, False)
        raise _EndOfTrace("no_unwind_information")

    def _stack_words(self, stack_pointer: int) -> Iterator[tuple[int, int]]:
        start = stack_pointer + -stack_pointer % self._word
        end = min(self._end_of_stack(stack_pointer), start + min(SCAN_BYTES, self._words_left * self._word))
        for low, high in self._memory.saved_runs_within(start, end):
            if low != start:
                return
            words = self._memory.read_words(low, (high - low) // self._word).tolist()
            for row, word in enumerate(words):
                self._words_left -= 1
                yield low + row * self._word, word
            start = high

    def _end_of_stack(self, stack_pointer: int) -> int:
        region = self._memory.region_index(stack_pointer)
        end = 0 if region is None else int(self._memory.region_end[region])
        return min(end, self._stack_end) if self._stack_end is not None and stack_pointer < self._stack_end else end

    def _stack_word(self, address: int) -> int:
        try:
            return self._memory.read_word(address & self._mask)
        except MemoryFault as error:
            raise _EndOfTrace("stack_not_in_core") from error

    def _code_pointer(self, value: int) -> int:
        """An address of code without aarch64's signature, which leaves bit 55 as it was: 0 for a process's own addresses."""
        if self._core.machine != "aarch64" or value <= _UNSIGNED_ADDRESS or self._is_code(value):
            return value
        return value & _UNSIGNED_ADDRESS

    def _is_code(self, address: int) -> bool:
        """Whether the process could execute what lies there; gdb does not say it of what it leaves to files."""
        region = self._memory.region_index(address)
        if region is None:
            return False
        flags = int(self._memory.region_flags[region])
        return bool(flags & _EXECUTE) or (flags == 0 and int(self._memory.region_file_index[region]) >= 0)

    def _may_return_to(self, address: int) -> bool:
        """Whether an address is code behind a call, or behind code that is not in the core."""
        if not self._is_code(address - 1):
            return False
        before = self._code_before(address)
        if before is None:
            return self._modules.at(address) is not None
        if self._core.machine == "aarch64":
            word = int.from_bytes(before[-4:], "little")
            # bl; blr, and its forms that authenticate (blraa and others).
            return address % 4 == 0 and (
                word >> 26 == 0b100101 or word & 0xFEFFF800 == 0xD63F0800 or word & 0xFFFFFC1F == 0xD63F0000
            )
        if before[-5] == 0xE8:
            target = address + int.from_bytes(before[-4:], "little", signed=True) & self._mask
            if self._is_code(target):
                return True
        # ff /2 with a register or a memory operand, whose length the ModRM byte tells.
        return any(is_indirect_call(before[-length:], self._core.machine == "i386") for length in (2, 3, 4, 6, 7))

    def _code_before(self, address: int) -> bytes | None:
        try:
            return self._memory.read(address - 8, 8)
        except MemoryFault:
            return None


def _section_address(file: ElfFile, name: bytes) -> tuple[int, int] | None:
    """Address before relocation, and bytes, of a section that is loaded; None where the file has none of that name."""
    header = elf.header_of(file.data[:64].tobytes())
    place = elf.section_place(file.data, header, name) if header is not None else None
    if place is None:
        return None
    segments = file.segments
    for row in segments.rows_of_kind(elf.PT_LOAD).tolist():
        inside = place[0] - int(segments.file_offset[row])
        if 0 <= inside < int(segments.file_bytes[row]):
            return int(segments.address[row]) + inside, place[1]
    return None
