"""Which threads are inside malloc, between which of its stores, and which addresses they hold while they work.

Knows: where a thread's program counter is, what its registers and its frames inside of malloc's module hold. Does not know:
what contradicts itself in a heap (``walk``, ``overlay``, ``integrity``) or what that means (``judgement``).

malloc changes a chunk only through an address of it or of its neighbour, so a thread that is about to write one holds such an
address in a register or in a frame of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from coreheap.allocators.glibc.gathering import UInt64s
from coreheap.allocators.glibc.messages import Moment
from coreheap.corefile import Core, Module
from coreheap.corefile.interruptions import MOST_FRAMES, Interruption, interruptions
from coreheap.corefile.threads import Thread
from coreheap.errors import MemoryFault

SIGABRT = 6
SIGNALS_OF_FAULTS = frozenset((4, SIGABRT, 7, 8, 11))
"""SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV."""

SYSCALLS_OF_MALLOC = {
    "x86_64": ("orig_rax", frozenset((9, 10, 11, 12, 25, 28))),
    "i386": ("orig_eax", frozenset((45, 90, 91, 125, 163, 192, 219))),
}
"""Where the number of the system call is that a thread is in, and those that malloc makes in the middle of an operation: brk,
mmap, munmap, mremap, mprotect, madvise (arch/x86/entry/syscalls). aarch64's core does not say which call it is."""

CALLS_THAT_SIGNAL = {"x86_64": frozenset((62, 200, 234)), "i386": frozenset((37, 238, 270))}
"""kill, tkill, tgkill: a thread that is not in one of them did not send the signal itself."""

AT_SYSINFO = 32
"""Where __kernel_vsyscall is, by which i386 programs enter the kernel (include/uapi/linux/auxvec.h; none on other machines)."""

SYSCALL_BYTES = 2
"""The length of the instruction ``syscall``, which leaves the address behind it in rcx (x86_64)."""

MOST_THREADS = 1 << 12
"""Threads that are asked where they stand; with more, every moment is possible."""

MOST_FRAME_WORDS = 1 << 12
"""Words of a stack that are read from its pointer on; malloc's frames and those of abort take some hundred."""

RED_ZONE_BYTES = 128
"""What a function may use below the stack pointer (x86-64 psABI)."""

EXECUTABLE = 1

_MOST_UNFINISHED_FIRST = (Moment.BETWEEN_STORES, Moment.BETWEEN_STEPS)


@dataclass(frozen=True, slots=True)
class Standing:
    """One thread that is inside malloc: where between malloc's stores, and the words that it holds.

    ``hands`` None: its stack was not saved, so it may hold anything. ``died_here``: what it met ended the process.
    """

    thread: int
    moment: Moment
    hands: frozenset[int] | None
    died_here: bool

    def covers(self, moment: Moment) -> bool:
        """Whether a contradiction of a moment may be this thread's."""
        return self.moment is Moment.BETWEEN_STORES or self.moment is moment


class Standings:
    """Asks the threads of one core; ``inside`` are those that may be inside of malloc."""

    def __init__(
        self, core: Core, mallocs: list[Module | None], glibc_stopped_itself: bool, heap_was_barred: bool
    ) -> None:
        """``heap_was_barred``: the fault is in pages of the heap itself that the program protected or took away."""
        self._core = core
        self._heap_was_barred = heap_was_barred
        self._mallocs = [module for module in mallocs if module is not None]
        self._glibc_stopped_itself = glibc_stopped_itself
        self.are_all_known = len(core.threads) <= MOST_THREADS
        found = (self._standing(thread) for thread in core.threads[:MOST_THREADS])
        self.inside = tuple(standing for standing in found if standing is not None)

    def _standing(self, thread: Thread) -> Standing | None:
        frames = interruptions(self._core, thread)
        if len(frames) >= MOST_FRAMES:
            # Handlers that interrupted handlers: what the first of them interrupted was not looked for any more.
            return Standing(thread.index, Moment.BETWEEN_STORES, None, False)
        moments = [self._stood(frame) for frame in frames]
        moments.append(self._stands_now(thread))
        died = thread.index == 0 and self._died_of_itself(thread)
        moment = next((moment for moment in _MOST_UNFINISHED_FIRST if moment in moments), Moment.NEVER)
        if died and self._glibc_stopped_itself and not frames:
            moment = Moment.BETWEEN_STEPS
        if moment is Moment.NEVER:
            return None
        return Standing(thread.index, moment, self._hands(thread, frames), died and not frames)

    def _died_of_itself(self, thread: Thread) -> bool:
        """Whether what the first thread met ended the process, not a signal of somebody else."""
        process = self._core.process
        if self._heap_was_barred:
            return False  # malloc followed no wrong pointer: wherever it was, it would have stopped at that page
        if process.signal not in SIGNALS_OF_FAULTS or process.sender_pid not in (None, process.pid):
            return False
        number = thread.registers.get(SYSCALLS_OF_MALLOC.get(self._core.machine, ("", None))[0])
        calls = CALLS_THAT_SIGNAL.get(self._core.machine)
        # Another thread of the same process may have sent it (pthread_kill).
        return process.sender_pid is None or number is None or calls is None or number in calls

    def _is_in_malloc(self, program_counter: int) -> bool:
        module = self._core.module_at(program_counter)
        return module is not None and any(module is other for other in self._mallocs)

    def _stood(self, frame: Interruption) -> Moment:
        """Where a thread was in malloc when a signal interrupted it."""
        if self._enters_the_kernel(frame.program_counter):
            return Moment.BETWEEN_STEPS
        if not self._is_in_malloc(frame.program_counter):
            return Moment.NEVER
        behind = frame.registers.get("rcx", 0) - frame.program_counter
        if behind not in (0, SYSCALL_BYTES):
            return Moment.BETWEEN_STORES
        # In a system call. Those of malloc are not restarted, and work on pages: the first argument, or what mmap returned.
        page = self._core.page_bytes
        place = frame.registers.get("rdi") or frame.registers.get("rax", 0)
        is_call_of_malloc = behind == 0 and place >= page and place % page == 0
        return Moment.BETWEEN_STEPS if is_call_of_malloc else Moment.NEVER

    def _stands_now(self, thread: Thread) -> Moment:
        is_entry = self._enters_the_kernel(thread.program_counter)
        if not is_entry and not self._is_in_malloc(thread.program_counter):
            return Moment.NEVER
        name, calls = SYSCALLS_OF_MALLOC.get(self._core.machine, ("", frozenset()))
        number = thread.registers.get(name)
        if number is None or number >= 1 << 31:
            # Back from a call, or about to make one: only its number says whose.
            return Moment.BETWEEN_STEPS if is_entry else Moment.BETWEEN_STORES
        return Moment.BETWEEN_STEPS if number in calls else Moment.NEVER

    def _enters_the_kernel(self, program_counter: int) -> bool:
        """Whether code is the kernel's own page of system calls, which lies outside of libc (i386)."""
        entry = self._core.auxv.get(AT_SYSINFO, 0)
        return entry != 0 and program_counter // self._core.page_bytes == entry // self._core.page_bytes

    # What they hold

    def _hands(self, thread: Thread, frames: tuple[Interruption, ...]) -> frozenset[int] | None:
        """Words in registers and in the frames above the stack pointer that are malloc's; also where handlers interrupted."""
        words = set(thread.registers.values())
        for frame in frames:
            words.update(frame.words)
        pointers = (thread.stack_pointer, *(frame.stack_pointer for frame in frames))
        for pointer in pointers:
            part = self._frame_words(pointer)
            if part is None:
                return None
            words.update(part.tolist())
        return frozenset(words)

    def _frame_words(self, stack_pointer: int) -> UInt64s | None:
        """The words of a stack up to the first that leads back into code of another module; None where they were not saved."""
        memory, word = self._core.memory, self._core.word_bytes
        low = (stack_pointer - RED_ZONE_BYTES) // word * word
        runs = memory.saved_runs_within(low, low + RED_ZONE_BYTES + MOST_FRAME_WORDS * word)
        run = next(((start, end) for start, end in runs if start <= stack_pointer < end), None)
        if run is None:
            return None
        try:
            words = memory.read_words(run[0], (run[1] - run[0]) // word).astype(np.uint64)
        except MemoryFault:
            return None
        first = (stack_pointer - run[0]) // word
        returns = np.flatnonzero(self._lead_back(words[first:]))
        return words[: first + int(returns[0])] if len(returns) else words

    def _lead_back(self, words: UInt64s) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Which words lead into code of modules that are not malloc's."""
        memory = self._core.memory
        region = np.searchsorted(memory.region_start, words, side="right") - 1
        inside = (region >= 0) & (words < memory.region_end[np.maximum(region, 0)])
        inside &= memory.region_flags[np.maximum(region, 0)] & EXECUTABLE != 0
        for module in self._mallocs:
            inside &= (words < np.uint64(module.start)) | (words >= np.uint64(module.end))
        return inside


def touched(standing: Standing, places: Iterable[int]) -> bool:
    """Whether a thread holds one of some addresses."""
    return standing.hands is None or not standing.hands.isdisjoint(places)
