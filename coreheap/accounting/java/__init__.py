"""A Java VM's memory in the address space: `java_memory` says what was recognised and why, `java_claims` claims it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Final
from weakref import WeakKeyDictionary

from coreheap.accounting.claims import Claims
from coreheap.accounting.java.found import JavaMemory as JavaMemory
from coreheap.accounting.java.found import JavaPart as JavaPart
from coreheap.accounting.java.found import JavaThread as JavaThread
from coreheap.accounting.java.tables import vm_tables
from coreheap.accounting.java.told import ToldMemory
from coreheap.accounting.java.untold import UntoldMemory
from coreheap.corefile import Core, Module
from coreheap.evidence import Evidence, Strength
from coreheap.mappings import MappingKind
from coreheap.quantities import AddressRange
from coreheap.report import ThreadSummary

LIBJVM: Final = re.compile(r"(^|/)libjvm\.so(\.debug)?$")
HEAP_FILE: Final = re.compile(rb"^/memfd:java_heap\b")
"""ZGC maps its heap several times, from a memory file of this name."""


def libjvm_of(core: Core) -> Module | None:
    """The Java VM's library; None where none is loaded."""
    return next((module for module in core.modules if LIBJVM.search(module.path) or module.soname == "libjvm.so"), None)


# Claims and names of threads ask for the same; an open core does not change.
_known: WeakKeyDictionary[Core, JavaMemory | None] = WeakKeyDictionary()


def java_memory(core: Core) -> JavaMemory | None:
    """What a Java VM in this process reserved, as far as it can be told; None without a VM.

    Where its own tables can be read they alone speak; without them, what looks like a VM's reservations.
    """
    if core not in _known:
        _known[core] = _java_memory(core)
    return _known[core]


def named_by_java(core: Core, threads: Sequence[ThreadSummary]) -> tuple[ThreadSummary, ...]:
    """The threads, those that the VM has a name for under that name: a core has only the first thread's otherwise."""
    found = java_memory(core)
    names = {thread.lwp: thread.name for thread in found.threads if thread.name} if found is not None else {}
    return tuple(
        replace(thread, name=names[thread.lwp], name_source="java") if thread.lwp in names else thread
        for thread in threads
    )


def _java_memory(core: Core) -> JavaMemory | None:
    libjvm = libjvm_of(core)
    if libjvm is None:
        return None
    from_files = tuple(_heap_files(core))
    tables = vm_tables(core, libjvm)
    if tables is not None:
        told = ToldMemory(core, libjvm, tables)
        parts = told.parts()
        if parts:
            return JavaMemory(libjvm.name, True, (*from_files, *parts), told.threads(), told.flags)
    untold = UntoldMemory(core)
    return JavaMemory(libjvm.name, False, (*from_files, *untold.parts()), (), untold.flags)


def java_claims(core: Core, claims: Claims) -> None:
    """Claim what `java_memory` finds, each part under its finer word, and the zones that the VM protects in its threads' stacks."""
    found = java_memory(core)
    if found is None:
        return
    for part in found.parts:
        claims.add(part.kind, part.range.start, part.range.end, name=part.part)
    index = {thread.lwp: thread.index for thread in core.threads}
    guarded = [thread for thread in found.threads if thread.guard_bytes]
    start = [thread.stack.start for thread in guarded]
    claims.add(
        MappingKind.STACK_GUARD,
        start,
        [low + thread.guard_bytes for low, thread in zip(start, guarded, strict=True)],
        thread=[index[thread.lwp] for thread in guarded],
        name="java_zones",
    )


def _heap_files(core: Core) -> list[JavaPart]:
    files = core.memory.mapped_files
    parts = []
    for row, path in enumerate(files.raw_paths):
        if HEAP_FILE.match(path):
            start, end = int(files.start[row]), int(files.end[row])
            fact = Evidence("mapped from memfd:java_heap", "NT_FILE", Strength.SOLID, start)
            if start < end:
                parts.append(JavaPart(MappingKind.JAVA_HEAP, "committed", AddressRange(start, end), (fact,)))
    return parts
