"""What is known of each thread, as the report has it.

Knows: how to put together what the core, the heap and the stacks say of one thread. Does not know: how any of it was found.

Names: the kernel writes only the name of the first thread (comm of the thread group's leader) into a core, and
pthread_setname_np leaves no copy in struct pthread; so all other threads have none. What they began with says as much.
"""

from __future__ import annotations

from coreheap.corefile import Core
from coreheap.corefile.stacks import Stack, Stacks, stack_residency
from coreheap.heap import HeapSnapshot
from coreheap.mappings import ResidencyBasis
from coreheap.report import ThreadSummary

COMM, EXECUTABLE = "comm", "executable"
"""Sources of names: the kernel's own name of the thread; the program's file, which gdb and qemu write in its place."""


def thread_summaries(
    core: Core, heap: HeapSnapshot | None, stacks: Stacks, basis: ResidencyBasis
) -> tuple[ThreadSummary, ...]:
    """One summary a thread, in the order of the core. ``basis``: what is known of pages of this core that were in memory."""
    is_known = basis is not ResidencyBasis.UNKNOWN
    residency = stack_residency(core.memory, stacks, basis is ResidencyBasis.HOLES) if is_known else {}
    # Of several copies of malloc these are the program's own; what threads have of the others is in those (MallocCopy).
    arenas = [arena for arena in (heap.arenas if heap else ()) if arena.copy == 0]
    caches = [cache for cache in (heap.thread_caches if heap else ()) if cache.copy == 0]
    arena_of = {thread: arena.index for arena in arenas for thread in arena.threads}
    cache_of = {cache.thread: cache for cache in caches if cache.thread is not None}
    routines: dict[int, str] = {}
    summaries = []
    for thread in core.threads:
        cache = cache_of.get(thread.index)
        stack = stacks.by_thread.get(thread.index)
        pages = residency.get(thread.index)
        is_main = thread.lwp == core.process.pid
        name, name_source = _name(core) if is_main else (None, None)
        summaries.append(
            ThreadSummary(
                index=thread.index,
                lwp=thread.lwp,
                signal=thread.signal,
                stack_pointer=thread.stack_pointer,
                program_counter=thread.program_counter,
                thread_pointer=thread.thread_pointer,
                arena=arena_of.get(thread.index),
                thread_cache=cache.address if cache else None,
                tcache_count=cache.count if cache else None,
                tcache_bytes=cache.chunk_bytes if cache else None,
                name=name,
                name_source=name_source,
                start_routine=_start_routine(core, stack, routines),
                is_main=is_main,
                stack_start=stack.start if stack else None,
                stack_end=stack.end if stack else None,
                stack_source=stack.source.value if stack else None,
                guard_bytes=stack.guard_bytes if stack else None,
                stack_used_bytes=stack.used_bytes if stack else None,
                stack_resident_bytes=pages.resident_bytes if pages else None,
                stack_peak_bytes=pages.peak_bytes if pages else None,
                on_signal_stack=stack is not None and stack.signal_stack is not None,
            )
        )
    return tuple(summaries)


def _name(core: Core) -> tuple[str, str] | tuple[None, None]:
    """The first thread's name, and what it is."""
    if not core.process.name:
        return None, None
    return core.process.name, COMM if core.made_by == "kernel" else EXECUTABLE


def _start_routine(core: Core, stack: Stack | None, known: dict[int, str]) -> str | None:
    """``worker in app``, ``app+0x1234`` without a symbol; None where it is not known. Many threads share a few of them."""
    address = stack.start_routine if stack else None
    if address is None:
        return None
    if address not in known:
        known[address] = code_name(core, address)
    return known[address]


def code_name(core: Core, address: int) -> str:
    """A place in code: a function and its module, a module and a distance, or the address alone."""
    module = core.module_at(address)
    if module is None:
        return f"{address:#x}"
    found = module.symbol_containing(address)
    if found is None:
        return f"{module.name}+{address - module.start:#x}"
    symbol, distance = found
    return f"{symbol.name}{f'+{distance:#x}' if distance else ''} in {module.name}"
