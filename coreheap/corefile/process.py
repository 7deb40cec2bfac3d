"""What a core says about its process as a whole: ids, name, signal, auxiliary vector, environment.

Knows: elf_prpsinfo (include/linux/elfcore.h), siginfo_t (man 2 sigaction), auxv
(include/uapi/linux/auxvec.h), and the initial stack of the System V ABI. Does not know: threads
beyond the signal of the first, or modules.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from coreheap.corefile.elf import Bytes, Words, words_in
from coreheap.corefile.memory import AddressSpace
from coreheap.corefile.notes import NT_AUXV, NT_PRPSINFO, NT_SIGINFO, NoteTable, text_of
from coreheap.corefile.threads import ThreadTable
from coreheap.errors import MemoryFault
from coreheap.evidence import Gap

AT_PHDR, AT_PAGESZ, AT_BASE, AT_ENTRY = 3, 6, 7, 9
AT_RANDOM, AT_EXECFN, AT_SYSINFO_EHDR = 25, 31, 33

AUXV_NAMES: Final[Mapping[int, str]] = {
    3: "AT_PHDR",
    4: "AT_PHENT",
    5: "AT_PHNUM",
    6: "AT_PAGESZ",
    7: "AT_BASE",
    8: "AT_FLAGS",
    9: "AT_ENTRY",
    11: "AT_UID",
    12: "AT_EUID",
    13: "AT_GID",
    14: "AT_EGID",
    15: "AT_PLATFORM",
    16: "AT_HWCAP",
    17: "AT_CLKTCK",
    23: "AT_SECURE",
    24: "AT_BASE_PLATFORM",
    25: "AT_RANDOM",
    26: "AT_HWCAP2",
    27: "AT_RSEQ_FEATURE_SIZE",
    28: "AT_RSEQ_ALIGN",
    31: "AT_EXECFN",
    32: "AT_SYSINFO",
    33: "AT_SYSINFO_EHDR",
    51: "AT_MINSIGSTKSZ",
}
"""include/uapi/linux/auxvec.h and arch/*/include/uapi/asm/auxvec.h."""

_SIGNALS_WITH_ADDRESS: Final = frozenset((4, 5, 7, 8, 11))
"""SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV: their siginfo has si_addr."""
_SI_KERNEL: Final = 0x80
_CODES_OF_SENDERS: Final = frozenset((0, -1, -6))
"""SI_USER, SI_QUEUE, SI_TKILL: their siginfo has si_pid (include/uapi/asm-generic/siginfo.h)."""
_STACK_WORDS: Final = 1 << 20
_VECTOR_LIMIT: Final = 64
"""Places on the stack that may be the auxiliary vector; a debugger or a loader may have copied it."""
_ENVIRONMENT_BYTES: Final = 6 << 20
"""Arguments and environment together have no more (fs/exec.c)."""
_STRING_BYTES: Final = 1 << 17
"""MAX_ARG_STRLEN, 32 pages: no argument is longer (include/uapi/linux/binfmts.h)."""


@dataclass(frozen=True, slots=True)
class _InfoLayout:
    """Where elf_prpsinfo of a machine keeps its fields; offsets in bytes."""

    uid_offset: int
    uid_bytes: int
    pid_offset: int
    name_offset: int


_INFO_LAYOUTS: Final[dict[str, _InfoLayout]] = {
    "x86_64": _InfoLayout(16, 4, 24, 40),
    "i386": _InfoLayout(8, 2, 12, 28),
    "aarch64": _InfoLayout(16, 4, 24, 40),
}


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """What the core says about the process; None and "" where it does not say it.

    Text is the process's own and not escaped.
    """

    pid: int | None = None
    parent_pid: int | None = None
    uid: int | None = None
    name: str = ""
    """pr_fname: the first 15 bytes of the executable's file name."""
    command_line: str = ""
    """pr_psargs: the first 79 bytes of the arguments, joined with spaces."""
    executable: str = ""
    """Path of the program; the one that ld.so loaded where ld.so was run by name."""
    signal: int | None = None
    """The signal that the core was written for; None when there was none, as with gdb's gcore."""
    signal_code: int | None = None
    fault_address: int | None = None
    """si_addr, only where the signal and its code give one."""
    sender_pid: int | None = None
    """si_pid: the process that sent the signal with kill, tgkill or sigqueue; None for signals of the kernel."""


@dataclass(frozen=True, slots=True)
class InitialStack:
    """Arguments and environment as the kernel laid them out when the program was started.

    What the program did to its environment later is not in it; glibc reads its tunables from here. ``is_intact``: nothing
    speaks for the strings having been overwritten, as programs do that change their title in ps (setproctitle).
    """

    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    is_intact: bool = True


def read_auxv(data: Bytes, notes: NoteTable, word_bytes: int, gaps: list[Gap]) -> dict[int, int]:
    """type -> value of the auxiliary vector, empty when the core has none."""
    content = notes.first(data, NT_AUXV)
    if content is None:
        gaps.append(Gap("auxiliary_vector_missing", "page size, program and vDSO are found otherwise"))
        return {}
    words = words_in(content, word_bytes).tolist()
    whole, shifted = _pairs(words), _pairs(words[1:])
    # qemu-user copies the vector from the stack as it is at the end. ld.so, run by name, has moved it down there by its
    # own arguments, an odd number mostly: the copy begins in the middle of a pair.
    return shifted if _known_tags(shifted) > _known_tags(whole) else whole


def complete_auxv(memory: AddressSpace, auxv: Mapping[int, int], gaps: list[Gap]) -> dict[int, int]:
    """The auxiliary vector with the entries that NT_AUXV lacks at its beginning, from the process's stack.

    AT_PHDR is the first that every writer has; where it is there, nothing is added. The vector on the stack counts
    only where it has all that the note has.
    """
    if AT_PHDR in auxv or not auxv:
        return dict(auxv)
    for words, start in _vectors_on_stack(memory, auxv):
        entries = _pairs(words[start:].tolist())
        if all(entries.get(tag) == value for tag, value in auxv.items()):
            return entries
    gaps.append(Gap("auxiliary_vector_cut", "it does not tell where the program is; modules are found otherwise"))
    return dict(auxv)


def _pairs(words: Sequence[int]) -> dict[int, int]:
    """tag -> value up to AT_NULL; of tags that occur more often the first."""
    entries: dict[int, int] = {}
    for tag, value in zip(words[::2], words[1::2], strict=False):
        if tag == 0:
            break
        entries.setdefault(tag, value)
    return entries


def _known_tags(entries: Mapping[int, int]) -> int:
    return sum(tag in AUXV_NAMES for tag in entries)


def read_process(data: Bytes, machine: str, notes: NoteTable, threads: ThreadTable, gaps: list[Gap]) -> ProcessFacts:
    """What NT_PRPSINFO, NT_SIGINFO and the first NT_PRSTATUS say, without the executable's path."""
    number, code, fault_address, sender_pid = _signal(data, notes, threads)
    pid = int(threads.lwp[0]) if len(threads) else None
    layout = _INFO_LAYOUTS[machine]
    info = notes.first(data, NT_PRPSINFO)
    if info is None or len(info) < layout.name_offset + 96:
        gaps.append(Gap("process_note_missing", "the process's name and arguments are unknown"))
        return ProcessFacts(
            pid=pid, signal=number, signal_code=code, fault_address=fault_address, sender_pid=sender_pid
        )
    pid, parent_pid = struct.unpack_from("<ii", info, layout.pid_offset)
    name_at = layout.name_offset
    return ProcessFacts(
        pid=pid,
        parent_pid=parent_pid,
        uid=int.from_bytes(info[layout.uid_offset : layout.uid_offset + layout.uid_bytes], "little"),
        name=text_of(info[name_at : name_at + 16]),
        command_line=text_of(info[name_at + 16 : name_at + 96]).rstrip(" "),
        signal=number,
        signal_code=code,
        fault_address=fault_address,
        sender_pid=sender_pid,
    )


def read_initial_stack(memory: AddressSpace, auxv: Mapping[int, int]) -> InitialStack | None:
    """Arguments and environment from the top of the main thread's stack; None when not found.

    The stack holds argc, argv[], NULL, envp[], NULL, auxv[] (System V ABI, "Initial Process
    Stack"). The auxiliary vector is found by its entry AT_RANDOM, whose value is in NT_AUXV too.
    """
    for words, place in _vectors_on_stack(memory, auxv):
        zeros = np.flatnonzero(words[:place] == 0)
        if len(zeros) < 2 or int(zeros[-1]) != place - 1:
            continue
        first_variable = int(zeros[-2]) + 1
        counts = words[: first_variable - 1][::-1]
        argument_count = np.flatnonzero(counts[:_STACK_WORDS] == np.arange(len(counts)))
        if len(argument_count):
            first_argument = first_variable - 1 - int(argument_count[0])
        else:
            first_argument = _first_adjoining_string(memory, words, first_variable - 1)
        arguments = words[first_argument : first_variable - 1].tolist()
        variables = _strings_between(memory, arguments, auxv.get(AT_EXECFN))
        if variables is None:
            variables = [_string(memory, at) for at in words[first_variable : place - 1].tolist()]
        environment: dict[str, str] = {}
        for variable in variables:
            name, _, value = variable.partition("=")
            environment.setdefault(name, value)
        return InitialStack(
            tuple(_string(memory, at) for at in arguments),
            environment,
            is_intact=all("=" in variable for variable in variables),
        )
    return None


def _strings_between(memory: AddressSpace, arguments: Sequence[int], file_name: int | None) -> list[str] | None:
    """The environment's strings as they were at the start: between those of the arguments and AT_EXECFN's.

    The kernel lays all of them out without gaps (fs/exec.c). unsetenv and setenv change pointers alone, and so does glibc up to
    2.38 for GLIBC_TUNABLES, whose entries it cuts apart where they lie (elf/dl-tunables.c). None where the strings lie otherwise
    (qemu), or are not in the core.
    """
    if not arguments or file_name is None:
        return None
    try:
        start = arguments[-1] + len(memory.read_text(arguments[-1], _STRING_BYTES)) + 1
        if not start <= file_name <= start + _ENVIRONMENT_BYTES:
            return None
        content = memory.read(start, file_name - start)
    except MemoryFault:
        return None
    variables: list[str] = []
    for variable in map(text_of, content.split(b"\0")[:-1]):
        if variable.startswith("glibc.") and variables and variables[-1].startswith("GLIBC_TUNABLES="):
            variables[-1] += f":{variable}"
        else:
            variables.append(variable)
    return variables


def _vectors_on_stack(memory: AddressSpace, auxv: Mapping[int, int]) -> Iterator[tuple[Words, int]]:
    """Words of the stack, and the row at which an auxiliary vector with the note's AT_RANDOM begins; the last first."""
    random = auxv.get(AT_RANDOM)
    index = memory.region_index(random) if random is not None else None
    if random is None or index is None:
        return
    word = memory.word_bytes
    end = random & ~(word - 1)
    start = max(int(memory.region_start[index]), end - _STACK_WORDS * word)
    start += -start % word
    try:
        words = memory.read_words(start, (end - start) // word)
    except MemoryFault:
        return
    places = np.flatnonzero((words[:-1] == AT_RANDOM) & (words[1:] == np.uint64(random)))
    for place in reversed(places[-_VECTOR_LIMIT:].tolist()):
        while place >= 2 and (int(words[place - 2]) in auxv or int(words[place - 2]) in AUXV_NAMES):
            place -= 2
        yield words, place


def _first_adjoining_string(memory: AddressSpace, words: Words, end: int) -> int:
    """The first row before ``end`` from which on each word points to a string that ends where the next one begins.

    ld.so, run by name, hands the program a stack without its own arguments; on x86 up to glibc 2.34 the place of argc is not
    a multiple of 16 then, and the program's start overwrites it. The kernel lays the strings out one after the other.
    """
    row = end
    following: int | None = None
    while row > max(0, end - _STACK_WORDS):
        address = int(words[row - 1])
        try:
            length = len(memory.read_text(address, _STRING_BYTES))
        except MemoryFault:
            return row
        if following is not None and address + length + 1 != following:
            return row
        following = address
        row -= 1
    return row


def _string(memory: AddressSpace, address: int) -> str:
    try:
        return text_of(memory.read_text(address, _STRING_BYTES))
    except MemoryFault:
        return ""


def _signal(
    data: Bytes, notes: NoteTable, threads: ThreadTable
) -> tuple[int | None, int | None, int | None, int | None]:
    """Signal, its code, its address, its sender.

    gdb writes the NT_SIGINFO of its own SIGSTOP into the core of a process that got no signal: only
    the siginfo of the signal in NT_PRSTATUS counts.
    """
    number = int(threads.signal[0]) if len(threads) else 0
    word_bytes = threads.layout.word_bytes
    fields_at = 16 if word_bytes == 8 else 12
    info = notes.first(data, NT_SIGINFO)
    if not number or info is None or len(info) < fields_at + word_bytes:
        return number or None, None, None, None
    signal_number, _, code = struct.unpack_from("<iii", info)
    if signal_number != number:
        return number, None, None, None
    if number in _SIGNALS_WITH_ADDRESS and 0 < code != _SI_KERNEL:
        address = int.from_bytes(info[fields_at : fields_at + word_bytes], "little")
        return number, code, address, None
    (sender,) = struct.unpack_from("<i", info, fields_at)
    return number, code, None, sender if code in _CODES_OF_SENDERS and sender > 0 else None
