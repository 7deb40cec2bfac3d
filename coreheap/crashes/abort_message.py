"""glibc's own last words: where __abort_msg leads, what kind of message it is, which pointer it names.

Knows: the forms of the message, 2.12-2.44. Does not know: whether the heap agrees.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np

from coreheap.corefile import Core, Module
from coreheap.crash import AbortKind, AbortMessage
from coreheap.errors import MemoryFault
from coreheap.evidence import Confidence

WRITE = 2
MESSAGE_LIMIT = 1024
LARGEST_MAPPING = 1 << 20
"""glibc rounds the message up to pages; its longest texts hold a file name and an expression."""
DATA_LIMIT = 4 << 20
"""Bytes of one module's writable data that are searched; libc's are some 100 KiB, a large static program's a few MiB."""
CANDIDATE_LIMIT = 1 << 15
"""Places that are looked at, for all modules together; some 0.2 s. A process has a few hundred such pointers."""

MALLOC_MESSAGE = re.compile(
    r"free\(\):|malloc\(\):|malloc\(\) |realloc\(\):|double free or corruption|corrupted (size|double-linked)"
    r"|munmap_chunk\(\)|mremap_chunk\(\)|invalid fastbin|malloc_consolidate\(\)|tcache_thread_shutdown\(\)"
    r"|break adjusted to free malloc space|malloc: top chunk is corrupt|malloc_check_get_size"
    r"|_int_memalign\(\)|malloc assertion|malloc\.c:[0-9]+|arena\.c:[0-9]+|max tcache size|int_mallinfo\(\)"
)
"""Beginnings of the messages of malloc.c and arena.c, 2.12-2.44."""
_STACK_SMASHING = re.compile(r"stack smashing detected")
_FORTIFY = re.compile(
    r"buffer overflow detected|%n in writable segments? detected|longjmp causes uninitialized stack frame"
)
_ASSERTION = re.compile(r"Assertion `.*' failed|assertion failed: |assertion failure in ", re.DOTALL)
_FRAME = re.compile(
    r"\*\*\* (?:glibc detected \*\*\* (?P<old>.*?)|Error in `(?P<new>.*?)'): (?P<message>.*?) ?\*\*\*$", re.DOTALL
)
"""2.12-2.16, and 2.17 up to the tag of 2.26: the program's name and the message, with the pointer at its end."""
_POINTER = re.compile(r": 0x(?P<digits>[0-9a-f]{1,16})$")


def find_abort_message(core: Core) -> AbortMessage | None:
    """The message that __abort_msg points to; None where there is none, or the core does not hold it.

    It points to a private mapping: uint32 mapping length, then the text (glibc 2.14-2.44); up to 2.13 to the text itself. The
    variable is exported, so any libc file with the right build-id tells its address: certain. Without a file the pointer is found
    by that shape, and only malloc's own words count: strong.
    """
    for module in core.modules:
        place = module.symbol_address("__abort_msg")
        if place is None:
            continue
        try:
            target = core.memory.read_word(place)
        except MemoryFault:
            continue
        text = _text_at(core, target) or _bare_text_at(core, target)
        if text:
            source = f"symbol __abort_msg of {module.name}"
            return _message(text, target, source, Confidence.CERTAIN)
    # libc first: it is where the pointer is, unless the program is a static one.
    likely = sorted(core.modules, key=lambda module: not module.name.startswith(("libc.so", "libc-2")))
    targets = itertools.islice((target for module in likely for target in _targets_in(core, module)), CANDIDATE_LIMIT)
    return next((message for target, source in targets if (message := _message_by_shape(core, target, source))), None)


def kind_of(text: str) -> AbortKind:
    """Who wrote a message. Assertions of malloc are malloc's."""
    for kind, pattern in (
        (AbortKind.STACK_SMASHING, _STACK_SMASHING),
        (AbortKind.FORTIFY, _FORTIFY),
        (AbortKind.MALLOC, MALLOC_MESSAGE),
        (AbortKind.ASSERTION, _ASSERTION),
    ):
        if pattern.search(text):
            return kind
    return AbortKind.OTHER


def pointer_in(text: str) -> int | None:
    """The address that a message of glibc 2.12-2.26 names; None where it names none."""
    framed = _FRAME.match(text)
    found = _POINTER.search(framed["message"]) if framed is not None else None
    return int(found["digits"], 16) if found is not None else None


def plain_message(text: str) -> str:
    """A message without the program's name and addresses: what it says, the same for each run."""
    framed = _FRAME.match(text)
    message = _POINTER.sub("", framed["message"]) if framed is not None else text
    if framed is None and _ASSERTION.search(message):
        # "PROGRAM: FILE:LINE: FUNCTION: Assertion ..." up to 2.35.
        named = re.match(r"[^:]*: (?=[^:]+:[0-9]+: )", message)
        message = message[named.end() :] if named is not None else message
    return message.strip()


def _message(text: str, target: int, source: str, confidence: Confidence) -> AbortMessage:
    return AbortMessage(text, kind_of(text), target, source, confidence, pointer_in(text))


def _targets_in(core: Core, module: Module) -> Iterator[tuple[int, str]]:
    """The different starts of pages of anonymous memory that words of a module's writable data lead to, and whose data it is."""
    memory, source = core.memory, f"data of {module.name}"
    inside = (memory.region_start >= np.uint64(module.start)) & (memory.region_start < np.uint64(module.end))
    writable = np.flatnonzero(inside & ((memory.region_flags & WRITE) != 0))
    left = DATA_LIMIT
    for region in writable.tolist():
        start, end = int(memory.region_start[region]), int(memory.region_end[region])
        for run_start, run_end in memory.saved_runs_within(start, min(end, start + left)):
            left -= run_end - run_start
            words = memory.read_words(run_start, (run_end - run_start) // core.word_bytes)
            targets = np.unique(words[(words != 0) & (words % np.uint64(core.page_bytes) == 0)])
            place = np.searchsorted(memory.region_start, targets, side="right").astype(np.int64) - 1
            is_inside = (place >= 0) & (targets < memory.region_end[place])
            for target in targets[is_inside & (memory.region_file_index[place] < 0)].tolist():
                yield target, source


def _message_by_shape(core: Core, target: int, source: str) -> AbortMessage | None:
    text = _text_at(core, target)
    return _message(text, target, source, Confidence.STRONG) if MALLOC_MESSAGE.search(text) else None


def _text_at(core: Core, target: int) -> str:
    """The message that a mapping holds; empty where it does not have the shape of one."""
    memory = core.memory
    index = memory.region_index(target)
    if index is None or target % core.page_bytes or int(memory.region_file_index[index]) >= 0:
        return ""
    try:
        length = int.from_bytes(memory.read(target, 4), "little")
        if not 0 < length <= LARGEST_MAPPING or length % core.page_bytes:
            return ""
        raw = memory.read_text(target + 4, MESSAGE_LIMIT)
    except MemoryFault:
        return ""
    return _printable(raw)


def _bare_text_at(core: Core, target: int) -> str:
    """The message of 2.12 and 2.13, a string of its own; only the words that these releases frame theirs with count."""
    try:
        text = _printable(core.memory.read_text(target, MESSAGE_LIMIT)) if target else ""
    except MemoryFault:
        return ""
    return text if text.startswith("*** glibc detected ***") or _ASSERTION.search(text) else ""


def _printable(raw: bytes) -> str:
    text = raw.decode("utf-8", "replace").strip()
    return text if text.isprintable() else ""
