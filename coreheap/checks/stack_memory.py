"""STACK-MEMORY: thread stacks take much of the memory, one is used deeply, or there are very many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from coreheap.checks.protocol import Case
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.quantities import GIB, MIB, format_bytes
from coreheap.report import Finding, Quantity, Severity, ThreadSummary, Unit

LARGE_BYTES = 16 * MIB
LARGE_SHARE = 0.25
"""Of the writable memory that was there: from both on, stacks are a part of the answer to "where did the memory go".

Reserved address space is free on 64-bit: a thread that waits has touched 8 to 32 KiB of its 8 MiB. So only pages count.
"""
WARNING_BYTES = 64 * MIB
WARNING_SHARE = 0.5
DEEP_BYTES = 1 * MIB
"""Frames of ordinary code take some 100 bytes each, 100 of them a few pages: a MiB is recursion or large local arrays."""
NEARLY_FULL_SHARE = 0.9
"""Of a stack: the next deeper call may be the one that meets the guard."""
MANY_THREADS = 1000
"""Each costs 2 pages of stack at least, 16 KiB in the kernel (THREAD_SIZE), and often an arena and a tcache."""
RESERVED_32_BIT = 1 * GIB
"""A third or a quarter of all address space that a 32-bit process has."""
GAP_BELOW_MAIN_STACK = 1 * MIB
"""stack_guard_gap: 256 pages that the kernel keeps free below a stack that grows (mm/mmap.c)."""
SEGMENTATION_FAULT = 11
NEAR_THE_END = 64 << 10
"""How far above its stack's end a stack pointer may be when the next frame meets the guard."""


@dataclass(frozen=True, slots=True)
class _Sums:
    """Stacks of all threads: address space, and pages that were there, None where these are not known."""

    reserved_bytes: int
    resident_bytes: int | None
    ended_bytes: int | None
    ended_resident_bytes: int | None
    cached_bytes: int | None
    """Of ended stacks those that glibc keeps; nobody joined the threads of the others."""
    whole_bytes: int | None
    """All writable memory that was there."""

    @property
    def share(self) -> float | None:
        if self.resident_bytes is None or not self.whole_bytes:
            return None
        return min(self.resident_bytes / self.whole_bytes, 1.0)


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all stacks."""
    threads = [thread for thread in case.threads if thread.stack_reserved_bytes is not None]
    if not threads:
        return ()
    sums = _sums(threads, case.mappings)
    # What lies above a stack pointer in a mapping of anyone's need not be its stack.
    described = [thread for thread in threads if thread.stack_source != "mapping"]
    deepest = max(described or threads, key=lambda thread: thread.stack_used_bytes or 0)
    deepest_bytes = deepest.stack_used_bytes or 0 if described else 0
    overflowed = _overflowed(case, threads)
    share, resident = sums.share, sums.resident_bytes or 0
    is_large = share is not None and resident >= LARGE_BYTES and share >= LARGE_SHARE
    is_crowded = case.core.word_bytes == 4 and sums.reserved_bytes >= RESERVED_32_BIT
    is_deep = deepest_bytes > DEEP_BYTES
    if not (is_large or is_deep or is_crowded or len(case.threads) >= MANY_THREADS or overflowed is not None):
        return ()
    nearly_full = is_deep and deepest_bytes >= NEARLY_FULL_SHARE * (deepest.stack_reserved_bytes or 0)
    # The kernel's own stack grows: its mapping is always nearly full.
    nearly_full = nearly_full and deepest.stack_source == "descriptor"
    severe = is_large and resident >= WARNING_BYTES and (share or 0) >= WARNING_SHARE
    warns = severe or nearly_full or is_crowded or overflowed is not None
    evidence = _evidence(case, threads, sums, overflowed, rests_on_pages=is_large and not is_deep)
    return (
        Finding(
            code="STACK-MEMORY",
            severity=Severity.WARNING if warns else Severity.INFO,
            confidence=confidence_from(evidence),
            subject=f"the stacks of {len(case.threads)} threads",
            quantities=(
                Quantity("threads", len(case.threads), Unit.COUNT),
                Quantity("resident_bytes", sums.resident_bytes, Unit.BYTES),
                Quantity("resident_share", share, Unit.SHARE),
                Quantity("reserved_bytes", sums.reserved_bytes, Unit.BYTES),
                Quantity(
                    "largest_stack_bytes", max(thread.stack_reserved_bytes or 0 for thread in threads), Unit.BYTES
                ),
                Quantity("deepest_thread", deepest.index, Unit.COUNT),
                Quantity("deepest_used_bytes", deepest.stack_used_bytes, Unit.BYTES),
                Quantity("deepest_start", deepest.start_routine or deepest.name, Unit.TEXT),
                Quantity(
                    "deep_threads", sum((one.stack_used_bytes or 0) > DEEP_BYTES for one in described), Unit.COUNT
                ),
                *(() if overflowed is None else (Quantity("overflowed_thread", overflowed, Unit.COUNT),)),
                Quantity("ended_stack_bytes", sums.ended_bytes, Unit.BYTES),
                Quantity("ended_stack_resident_bytes", sums.ended_resident_bytes, Unit.BYTES),
            ),
            evidence=evidence,
            next_steps=_next_steps(is_deep or overflowed is not None, sums),
            weakened_by=_weakened_by(case, threads, sums),
        ),
    )


def _sums(threads: Sequence[ThreadSummary], mappings: MappingTable | None) -> _Sums:
    reserved = sum(thread.stack_reserved_bytes or 0 for thread in threads)
    pages = [thread.stack_resident_bytes for thread in threads if thread.stack_resident_bytes is not None]
    if mappings is None or mappings.basis is ResidencyBasis.UNKNOWN:
        return _Sums(reserved, sum(pages) if pages else None, None, None, None, None)
    ended = np.isin(
        mappings.kind, [KINDS.index(kind) for kind in (MappingKind.ENDED_STACK, MappingKind.UNJOINED_STACK)]
    )
    writable = (mappings.flags & 2) != 0
    ended_resident = int(mappings.resident_low[ended].sum())
    return _Sums(
        reserved_bytes=reserved,
        resident_bytes=sum(pages) + ended_resident if pages else None,
        ended_bytes=int((mappings.end[ended] - mappings.start[ended]).sum(dtype=np.uint64)),
        ended_resident_bytes=ended_resident,
        cached_bytes=mappings.bytes_of(MappingKind.ENDED_STACK),
        whole_bytes=int(mappings.resident_low[writable].sum()),
    )


def _overflowed(case: Case, threads: Sequence[ThreadSummary]) -> int | None:
    """The thread that ran out of its stack: it took the fault, in its own guard, with its stack pointer at the stack's end.

    A fault in another thread's guard is a stray write, and says nothing of that thread.
    """
    process = case.core.process
    crashed = next((thread for thread in threads if thread.index == 0), None)
    if process.signal != SEGMENTATION_FAULT or process.fault_address is None or crashed is None:
        return None
    start = crashed.stack_start or 0
    guard = GAP_BELOW_MAIN_STACK if crashed.stack_source == "initial_stack" else crashed.guard_bytes or 0
    is_at_end = crashed.stack_pointer is not None and crashed.stack_pointer < start + NEAR_THE_END
    return crashed.index if is_at_end and start - guard <= process.fault_address < start else None


def _evidence(
    case: Case, threads: Sequence[ThreadSummary], sums: _Sums, overflowed: int | None, *, rests_on_pages: bool
) -> tuple[Evidence, ...]:
    described = sum(thread.stack_source != "mapping" for thread in threads)
    facts = [
        Evidence(
            f"{described} of {len(case.threads)} threads have a stack whose bounds the thread library or the kernel tells",
            "stackblock in struct pthread, auxiliary vector, stack pointers",
            Strength.PROOF if described else Strength.HINT,
        )
    ]
    if overflowed is not None:
        facts.append(
            Evidence(
                f"the fault lies in the guard of the stack of thread {overflowed}, which took it with its stack pointer there",
                "signal information and registers",
                Strength.SOLID,
                case.core.process.fault_address,
            )
        )
    if sums.resident_bytes is not None:
        facts.append(
            Evidence(
                f"{format_bytes(sums.resident_bytes)} of stacks are pages that the core has content for",
                "blocks and holes of the core file",
                Strength.SOLID,
            )
        )
    if rests_on_pages and (case.mappings is None or case.mappings.basis is not ResidencyBasis.HOLES):
        facts.append(
            Evidence(
                "pages of zeros are not in this core, so that shares of what was in memory are not exact",
                "blocks and holes of the core file",
                Strength.HINT,
                speaks_against=True,
            )
        )
    if described < len(case.threads):
        facts.append(
            Evidence(
                f"of {len(case.threads) - described} threads the stack's bounds are those of a mapping, or unknown",
                "struct pthread",
                Strength.HINT,
                speaks_against=True,
            )
        )
    return tuple(facts)


def _next_steps(is_deep: bool, sums: _Sums) -> tuple[str, ...]:
    steps = [
        "look at RSS, not the mapped size, of the stacks: coreheap threads, or pmap -x PID on a live process",
        "fewer threads: limit thread pools; each idle thread keeps the pages that it ever used",
    ]
    if is_deep:
        steps.append(
            "gdb -p PID or gdb PROGRAM CORE: `thread apply all backtrace -20` shows the outermost frames of recursion and"
            " `info frame` large local arrays: move these to the heap, or bound the depth"
        )
    steps += [
        "smaller stacks: pthread_attr_setstacksize, ulimit -s before the start (glibc's default for new threads), -Xss or"
        " -XX:ThreadStackSize of a JVM; saves address space, and pages only where stacks are used deeply; too small"
        " a stack crashes: take twice the largest peak of coreheap threads",
        "with transparent huge pages a first touch may bring in 2 MiB: GLIBC_TUNABLES=glibc.pthread.stack_hugetlb=0"
        " (glibc 2.38 and later) turns them off for stacks; compare AnonHugePages in /proc/PID/smaps",
    ]
    if sums.cached_bytes:
        steps.append(
            "glibc keeps stacks of ended threads, up to 40 MiB: GLIBC_TUNABLES=glibc.pthread.stack_cache_size=0 (glibc"
            " 2.34 and later) gives them back, and each new thread then maps its stack anew"
        )
    return tuple(steps)


def _weakened_by(case: Case, threads: Sequence[ThreadSummary], sums: _Sums) -> tuple[str, ...]:
    reasons = ["a stack grows to its peak once and keeps these pages: depth now and memory now are two numbers"]
    if sums.resident_bytes is None:
        reasons.append("which pages were in memory this core does not tell; reserved bytes cost nothing by themselves")
    elif case.mappings is not None and case.mappings.basis is not ResidencyBasis.HOLES:
        reasons.append("pages of zeros are not in this core: at least as much was in memory as is said")
    if any(thread.on_signal_stack for thread in threads):
        reasons.append("a thread runs a signal handler on another stack; its depth is where it was interrupted")
    return tuple(reasons)
