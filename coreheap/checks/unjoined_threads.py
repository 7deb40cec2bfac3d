"""UNJOINED-THREADS: threads have ended and nobody joined or detached them; their stacks stay."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coreheap.checks.protocol import Case
from coreheap.corefile import Core
from coreheap.corefile.thread_lists import ListedStacks, listed_stacks
from coreheap.corefile.thread_stacks import with_start_routines
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.mappings import KINDS, MappingKind, MappingTable, ResidencyBasis
from coreheap.quantities import MIB, format_count
from coreheap.report import Finding, Quantity, Severity, Unit
from coreheap.thread_summaries import code_name

UInt64s = npt.NDArray[np.uint64]

LEAST_BYTES = 40 * MIB
"""What glibc itself keeps of ended threads' stacks at most (stack_cache_maxsize, nptl/allocatestack.c): up to that a process without
the mistake has as much."""
LEAST_THREADS = 4
MANY_THREADS = 100
"""So many that ended and wait to be joined at one time are no phase of an ordinary program."""
WORDS_AT_ONCE = 1 << 20
SEARCHED_BYTES = 1 << 32
"""Of the core's content, searched for the ids of ended threads."""


def findings(case: Case) -> tuple[Finding, ...]:
    """At most one finding over all threads that ended and were not joined."""
    listed = listed_stacks(case.core)
    if listed is None:
        return ()
    count, stack_bytes = len(listed.unjoined), sum(stack.end - stack.start for stack in listed.unjoined)
    if count < LEAST_THREADS or stack_bytes <= LEAST_BYTES:
        return ()
    held = _held_ids(case.core, listed)
    # Who holds the ids may join the threads in a moment: one who waits for the first of several does.
    is_waiting = held is None or (count - held < LEAST_THREADS)
    if is_waiting and listed.someone_joins:
        return ()
    evidence = _evidence(case.core, listed, held)
    return (
        Finding(
            code="UNJOINED-THREADS",
            severity=Severity.INFO if is_waiting and count < MANY_THREADS else Severity.WARNING,
            confidence=confidence_from(evidence),
            subject=f"{format_count(count)} threads that ended",
            quantities=(
                Quantity("threads", count, Unit.COUNT),
                Quantity("stack_bytes", stack_bytes, Unit.BYTES),
                Quantity("resident_bytes", _resident_bytes(case.mappings), Unit.BYTES),
                Quantity("ids_in_memory", held, Unit.COUNT),
                Quantity("start_routine", _start_routine(case.core, listed), Unit.TEXT),
                Quantity("cached_stack_bytes", sum(stack.end - stack.start for stack in listed.cached), Unit.BYTES),
            ),
            evidence=evidence,
            next_steps=(
                "look for the pthread_create (std::thread, a library's own) of these threads: each thread has to be joined"
                " (pthread_join) or detached (pthread_detach, PTHREAD_CREATE_DETACHED) once",
                "on a live process: VmSize of /proc/PID/status grows by a stack with each thread that ends, Threads does not",
            ),
            weakened_by=_weakened_by(held),
        ),
    )


def _evidence(core: Core, listed: ListedStacks, held: int | None) -> tuple[Evidence, ...]:
    facts = [
        Evidence(
            f"{format_count(len(listed.unjoined))} descriptors in libc's list of stacks in use are of threads that ended: tid is 0,"
            " no thread of the core runs there",
            "the thread library's lists of stacks",
            listed.strength,
            listed.descriptors[0],
        )
    ]
    if held == 0:
        facts.append(Evidence("nothing in memory holds their ids (pthread_t)", "all words of the core", Strength.SOLID))
    elif held is not None and len(listed.unjoined) - held < LEAST_THREADS:
        facts.append(
            Evidence(
                f"the ids (pthread_t) of {format_count(held)} of them are in memory",
                "all words of the core",
                Strength.HINT,
                speaks_against=True,
            )
        )
    if any(gap.cause == "threads_missing" for gap in core.gaps):
        facts.append(
            Evidence("threads are missing in the core", "notes", Strength.HINT, speaks_against=True),
        )
    return tuple(facts)


def _weakened_by(held: int | None) -> tuple[str, ...]:
    if held is None:
        return ("the core is too large to look for their ids: the program may still mean to join them",)
    if held:
        return (f"the ids of {format_count(held)} of them are still in memory: the program may mean to join these",)
    return ()


def _start_routine(core: Core, listed: ListedStacks) -> str | None:
    """The function that most of these threads began with, and its module."""
    known = with_start_routines(core.memory, dict(enumerate(listed.unjoined)))
    routines = [stack.start_routine for stack in known.values() if stack.start_routine is not None]
    if not routines:
        return None
    values, counts = np.unique(np.array(routines, np.uint64), return_counts=True)
    return code_name(core, int(values[counts.argmax()]))


def _resident_bytes(mappings: MappingTable | None) -> int | None:
    """Of these stacks at least so many bytes were in memory."""
    if mappings is None or mappings.basis is ResidencyBasis.UNKNOWN:
        return None
    return int(mappings.resident_low[mappings.kind == KINDS.index(MappingKind.UNJOINED_STACK)].sum())


def _held_ids(core: Core, listed: ListedStacks) -> int | None:
    """How many of the ended threads' ids any word outside of the stacks of ended threads holds; None for a core too large for that."""
    memory, word = core.memory, core.word_bytes
    ids = np.unique(np.array(listed.descriptors, np.uint64))
    blocks = sorted((stack.start, stack.end) for stack in listed.ended)
    starts, ends = (np.array(column, np.uint64) for column in zip(*blocks, strict=True))
    run_start, run_end, _ = memory.populated_runs()
    if int((run_end - run_start).sum()) > SEARCHED_BYTES:
        return None
    found = np.zeros(len(ids), np.bool_)
    for low, high in zip(run_start.tolist(), run_end.tolist(), strict=True):
        low += -low % word
        for place in range(low, high - word + 1, WORDS_AT_ONCE * word):
            count = min(WORDS_AT_ONCE, (high - place) // word)
            words = memory.view(place, place + count * word).view(f"<u{word}")
            rows = np.flatnonzero((words >= ids[0]) & (words <= ids[-1]))
            if not len(rows):
                continue
            at = np.uint64(place) + rows.astype(np.uint64) * np.uint64(word)
            row = np.maximum(np.searchsorted(starts, at, side="right") - 1, 0)
            outside = ~((at >= starts[row]) & (at < ends[row]))
            values = words[rows[outside]].astype(np.uint64)
            index = np.minimum(np.searchsorted(ids, values), len(ids) - 1)
            found[index[ids[index] == values]] = True
    return int(found.sum())
