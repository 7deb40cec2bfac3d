"""ALLOCATOR-ABORT: glibc itself stopped the process and left its message in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from coreheap.checks.protocol import Case
from coreheap.corefile import Core, Module
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.report import Finding, Quantity, Severity, Unit

SIGABRT = 6
WRITE = 2
MESSAGE_LIMIT = 1024
LARGEST_MAPPING = 1 << 20
"""glibc rounds the message up to pages; its longest texts hold a file name and an expression."""

MALLOC_MESSAGE = re.compile(
    r"free\(\):|malloc\(\):|malloc\(\) |realloc\(\):|double free or corruption|corrupted (size|double-linked)"
    r"|munmap_chunk\(\)|mremap_chunk\(\)|invalid fastbin|malloc_consolidate\(\)|tcache_thread_shutdown\(\)"
    r"|break adjusted to free malloc space|malloc: top chunk is corrupt|malloc_check_get_size"
    r"|_int_memalign\(\)|malloc assertion|malloc\.c:[0-9]+|arena\.c:[0-9]+|max tcache size|int_mallinfo\(\)"
)
"""Beginnings of the messages of malloc.c and arena.c, 2.12-2.44."""


def findings(case: Case) -> tuple[Finding, ...]:
    """One finding when an abort message of glibc is in the core."""
    if case.core.process.signal not in (SIGABRT, None):
        return ()
    for text, address, evidence in _messages(case.core):
        from_malloc = MALLOC_MESSAGE.search(text) is not None
        locked = tuple(arena.index for arena in (case.heap.arenas if case.heap else ()) if arena.locked)
        return (
            Finding(
                code="ALLOCATOR-ABORT",
                severity=Severity.ERROR if from_malloc else Severity.WARNING,
                confidence=confidence_from([evidence]),
                subject="malloc" if from_malloc else "glibc",
                quantities=(
                    Quantity("message", text, Unit.TEXT),
                    Quantity("from_malloc", str(from_malloc).lower(), Unit.TEXT),
                    Quantity("message_address", address, Unit.ADDRESS),
                    Quantity("locked_arenas", len(locked), Unit.COUNT),
                ),
                evidence=(evidence,),
                next_steps=(
                    "the damage happened before the abort: run the workload under valgrind or with"
                    " -fsanitize=address to catch the write itself",
                    "look at the chunk before the damaged one: its owner is the usual culprit",
                )
                if from_malloc
                else ("read the message: it is from assert, fortify or the stack protector",),
                weakened_by=(
                    "an earlier message stays in memory when the process survived it (a handler for SIGABRT)",
                ),
            ),
        )
    return ()


def _messages(core: Core) -> Iterator[tuple[str, int, Evidence]]:
    """Abort messages, the surest source first.

    __abort_msg points to a private mapping: uint32 mapping length, then the text (glibc 2.14-2.44); it is exported, so
    any libc file with the right build-id tells its address. Without a file the pointer is found by that shape.
    """
    for module in core.modules:
        place = module.symbol_address("__abort_msg")
        if place is None:
            continue
        try:
            target = core.memory.read_word(place)
        except MemoryFault:
            continue
        text = _text_at(core, target)
        if text:
            source = f"symbol __abort_msg of {module.path.rpartition('/')[2]}"
            yield text, target, Evidence("__abort_msg points to a message", source, Strength.PROOF, place)
            return
    for module in core.modules:
        yield from _messages_by_shape(core, module)


def _messages_by_shape(core: Core, module: Module) -> Iterator[tuple[str, int, Evidence]]:
    memory = core.memory
    inside = (memory.region_start >= np.uint64(module.start)) & (memory.region_start < np.uint64(module.end))
    writable = np.flatnonzero(inside & ((memory.region_flags & WRITE) != 0))
    for region in writable.tolist():
        start, end = int(memory.region_start[region]), int(memory.region_end[region])
        for run_start, run_end in memory.saved_runs_within(start, end):
            words = memory.read_words(run_start, (run_end - run_start) // core.word_bytes)
            aligned = (words != 0) & (words % np.uint64(core.page_bytes) == 0)
            for position in np.flatnonzero(aligned).tolist():
                target = int(words[position])
                text = _text_at(core, target)
                if text and MALLOC_MESSAGE.search(text):
                    place = run_start + position * core.word_bytes
                    fact = Evidence(
                        "a pointer in writable module data leads to a mapping shaped like an abort message",
                        f"data of {module.path.rpartition('/')[2]}",
                        Strength.SOLID,
                        place,
                    )
                    yield text, target, fact


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
    text = raw.decode("utf-8", "replace").strip()
    return text if text.isprintable() else ""
