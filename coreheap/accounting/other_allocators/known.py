"""The allocators that are recognised: by the path of a module, by symbols that it defines, by the structures they leave in memory.

Data only; each row names the function that finds the allocator's memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from coreheap.accounting.other_allocators.found import Ranges
from coreheap.accounting.other_allocators.golang import go_ranges
from coreheap.accounting.other_allocators.jemalloc import jemalloc_ranges
from coreheap.accounting.other_allocators.memory import AnonymousMemory
from coreheap.accounting.other_allocators.mimalloc import mimalloc_ranges
from coreheap.accounting.other_allocators.musl import musl_ranges
from coreheap.accounting.other_allocators.pymalloc import pymalloc_ranges
from coreheap.accounting.other_allocators.sanitizers import ASAN, LSAN, MSAN, TSAN, ranges_of, valgrind_ranges
from coreheap.accounting.other_allocators.tcmalloc import tcmalloc_ranges
from coreheap.corefile import Module


@dataclass(frozen=True, slots=True)
class KnownAllocator:
    """One allocator.

    ``path`` is searched in modules' paths, None where no path tells. ``symbols``: any of these defined in a module says that it
    is inside. ``note``: the owner of a note in the program, "" for none. ``ranges`` finds its memory, None where nobody knows how.
    ``by_structure``: what ``ranges`` finds is so much its own that it is looked for in programs that nothing else tells of;
    with ``static_only`` in those that are linked to no library. ``symbols_suffice``: False where programs have it inside and
    do not use it: then symbols count only beside its structures.
    """

    name: str
    path: re.Pattern[str] | None
    symbols: tuple[str, ...] = ()
    note: str = ""
    ranges: Callable[[AnonymousMemory, Module], tuple[Ranges, ...]] | None = None
    by_structure: bool = False
    static_only: bool = False
    symbols_suffice: bool = True
    replaces_malloc: bool = True


# Debian's musl is libc.so in a folder of musl's; a libc.so elsewhere may as well be Android's.
KNOWN_ALLOCATORS = (
    # Tools first: they serve malloc whatever else is linked in. Of several that share a run time the first one counts.
    KnownAllocator(
        "AddressSanitizer",
        re.compile(r"/lib(asan|clang_rt\.asan)[.\-_0-9a-z]*\.so[^/]*$"),
        ("__asan_init",),
        ranges=ranges_of(ASAN),
        by_structure=True,
    ),
    KnownAllocator(
        "ThreadSanitizer",
        re.compile(r"/lib(tsan|clang_rt\.tsan)[.\-_0-9a-z]*\.so[^/]*$"),
        ("__tsan_init",),
        ranges=ranges_of(TSAN),
    ),
    KnownAllocator("MemorySanitizer", None, ("__msan_init",), ranges=ranges_of(MSAN)),
    KnownAllocator(
        "LeakSanitizer", re.compile(r"/liblsan[.\-_0-9a-z]*\.so[^/]*$"), ("__lsan_init",), ranges=ranges_of(LSAN)
    ),
    KnownAllocator(
        "valgrind",
        re.compile(r"/vgpreload_(memcheck|drd|helgrind|massif|dhat|exp-[a-z]+)-[^/]*\.so$"),
        ranges=valgrind_ranges,
    ),
    KnownAllocator(
        "jemalloc",
        re.compile(r"/libjemalloc([.\-_][.\-_0-9a-z]*)?\.so[^/]*$"),
        ("mallctl", "je_mallctl", "_rjem_mallctl"),
        ranges=jemalloc_ranges,
        by_structure=True,
    ),
    KnownAllocator(
        "tcmalloc",
        re.compile(r"/libtcmalloc[_a-z]*[.\-_0-9]*\.so[^/]*$"),
        ("TCMalloc_SystemTaken", "tc_malloc", "MallocExtension_GetNumericProperty", "TCMallocInternalMalloc"),
        ranges=tcmalloc_ranges,
    ),
    KnownAllocator(
        "mimalloc",
        re.compile(r"/libmimalloc([.\-_][.\-_0-9a-z]*)?\.so[^/]*$"),
        ("mi_version", "mi_malloc", "_mi_heap_main"),
        ranges=mimalloc_ranges,
        by_structure=True,
        # CPython has it inside from 3.13 on, and uses it in its free-threaded build only.
        symbols_suffice=False,
    ),
    KnownAllocator(
        "musl",
        re.compile(r"/(ld-musl-[^/]+|libc\.musl-[^/]+)\.so[^/]*$|musl[^/]*/libc\.so$"),
        ("__malloc_context", "__malloc_allzerop"),
        ranges=musl_ranges,
        by_structure=True,
        static_only=True,
    ),
    KnownAllocator("snmalloc", re.compile(r"/libsnmallocshim[.\-_0-9a-z]*\.so[^/]*$")),
    KnownAllocator("Hoard", re.compile(r"/libhoard[.\-_0-9a-z]*\.so[^/]*$")),
    KnownAllocator("TBB malloc", re.compile(r"/libtbbmalloc_proxy[.\-_0-9a-z]*\.so[^/]*$")),
    KnownAllocator(
        "Go", None, ("runtime.mheap_", "runtime.mallocgc"), note="Go", ranges=go_ranges, replaces_malloc=False
    ),
    KnownAllocator(
        "pymalloc",
        re.compile(r"/libpython[0-9.]+[a-z]*\.so[^/]*$|/python[0-9](\.[0-9]+)?[a-z]*$"),
        ("PyObject_Malloc",),
        ranges=pymalloc_ranges,
        replaces_malloc=False,
    ),
)
