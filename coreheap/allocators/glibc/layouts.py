"""glibc's malloc structures from 2.12 to 2.44, as data and nothing else.

A structure is a row of fields in C order; ``structures`` turns a row into offsets for a word size by C's own
alignment rules. A generation is a set of releases whose heaps look alike in every respect that a core shows;
release branches are named like ``2.27-branch`` where they differ from their tag.

Sources: struct definitions in malloc/malloc.c and malloc/arena.c of each release tag and of the heads of
release/X/master, compiled and read back from DWARF; 2.31, 2.36, 2.41, 2.43 and 2.44 also against the DWARF of
Debian's libc6-dbg (amd64, i386, arm64). tests/unit/allocators/test_layouts.py holds every row against those facts.
"""

from __future__ import annotations

from coreheap.allocators.glibc.structures import (
    BinRule,
    Generation,
    LargeBinStep,
    TcacheKey,
    WordClass,
)

# --- Word classes: what SIZE_SZ and MALLOC_ALIGNMENT decide -----------------------------------------------------

_LARGE_STEPS = (
    LargeBinStep(shift=9, limit=20, first=91),
    LargeBinStep(shift=12, limit=10, first=110),
    LargeBinStep(shift=15, limit=4, first=119),
    LargeBinStep(shift=18, limit=2, first=124),
)

WORD_CLASSES = {
    "64": WordClass(
        name="64",
        word_bytes=8,
        alignment=16,
        minimum_chunk_bytes=32,
        granule_phase=0,
        default_heap_max=64 << 20,
        default_arena_test=8,
        arenas_per_cpu=8,
        bins=BinRule(
            small_limit=1024,
            small_shift=4,
            small_correction=0,
            large=(LargeBinStep(6, 48, 48), *_LARGE_STEPS),
            last=126,
        ),
    ),
    # i386 up to 2.25; arm and other ports whose long double needs at most 8 bytes alignment, all releases.
    "32a8": WordClass(
        name="32a8",
        word_bytes=4,
        alignment=8,
        minimum_chunk_bytes=16,
        granule_phase=0,
        default_heap_max=1 << 20,
        default_arena_test=2,
        arenas_per_cpu=2,
        bins=BinRule(
            small_limit=512,
            small_shift=3,
            small_correction=0,
            large=(LargeBinStep(6, 38, 56), *_LARGE_STEPS),
            last=126,
        ),
    ),
    # i386 from 2.26; x32 from its first release, 2.16. The payload is 16-aligned, so headers are at 8 mod 16.
    "32a16": WordClass(
        name="32a16",
        word_bytes=4,
        alignment=16,
        minimum_chunk_bytes=16,
        granule_phase=8,
        default_heap_max=1 << 20,
        default_arena_test=2,
        arenas_per_cpu=2,
        bins=BinRule(
            small_limit=1008,
            small_shift=4,
            small_correction=1,
            large=(LargeBinStep(6, 45, 49), *_LARGE_STEPS),
            last=126,
        ),
    ),
}

HUGE_PAGE_BYTES = (2 << 20, 4 << 20, 32 << 20, 512 << 20, 1 << 30)
"""What glibc.malloc.hugetlb can make heaps of: x86-64 has pages of 2 MiB and 1 GiB, i386 of 2 or 4 MiB, aarch64 by its page
size of 2 MiB, 32 MiB and 1 GiB, or of 2 MiB and 512 MiB."""

WORD_CLASS_OF_MACHINE = {"x86_64": "64", "aarch64": "64"}
"""Machines whose word class is the same in all releases; i386's is the generation's."""

# --- Structures: fields in C order; int is 4 bytes, word is SIZE_SZ ---------------------------------------------

_STATE_HEAD = "mutex:int flags:int"
_STATE_BINS = "top:word last_remainder:word bins:word*254 binmap:int*4 next:word"
_STATE_TAIL = "system_mem:word max_system_mem:word"

MALLOC_STATE = {
    "2.12 stock": f"{_STATE_HEAD} fastbinsY:word*FAST {_STATE_BINS} {_STATE_TAIL}",
    "2.12 PER_THREAD": f"{_STATE_HEAD} fastbinsY:word*FAST {_STATE_BINS} next_free:word {_STATE_TAIL}",
    "2.23": (f"{_STATE_HEAD} fastbinsY:word*FAST {_STATE_BINS} next_free:word attached_threads:word {_STATE_TAIL}"),
    "2.27": (
        f"{_STATE_HEAD} have_fastchunks:int fastbinsY:word*FAST {_STATE_BINS}"
        f" next_free:word attached_threads:word {_STATE_TAIL}"
    ),
    "2.43": f"{_STATE_HEAD} {_STATE_BINS} next_free:word attached_threads:word {_STATE_TAIL}",
}

_THRESHOLDS = "trim_threshold:word top_pad:word mmap_threshold:word"
_ARENA_LIMITS = "arena_test:word arena_max:word"
_MMAP_COUNTS = "n_mmaps:int n_mmaps_max:int max_n_mmaps:int no_dyn_threshold:int"
_MMAPPED = "mmapped_mem:word max_mmapped_mem:word"
_HUGE_PAGES = "thp_pagesize:word hp_pagesize:word hp_flags:int"
_TCACHE = "tcache_bins:word tcache_max_bytes:word tcache_count:word"

MALLOC_PAR = {
    "2.12 stock": f"{_THRESHOLDS} {_MMAP_COUNTS} pagesize:int {_MMAPPED} max_total_mem:word sbrk_base:word",
    "2.12 PER_THREAD": (
        f"{_THRESHOLDS} {_ARENA_LIMITS} {_MMAP_COUNTS} pagesize:int {_MMAPPED} max_total_mem:word sbrk_base:word"
    ),
    "2.15": f"{_THRESHOLDS} {_ARENA_LIMITS} {_MMAP_COUNTS} {_MMAPPED} max_total_mem:word sbrk_base:word",
    "2.24": f"{_THRESHOLDS} {_ARENA_LIMITS} {_MMAP_COUNTS} {_MMAPPED} sbrk_base:word",
    "2.26": (
        f"{_THRESHOLDS} {_ARENA_LIMITS} {_MMAP_COUNTS} {_MMAPPED} sbrk_base:word {_TCACHE} tcache_unsorted_limit:word"
    ),
    "2.35": (
        f"{_THRESHOLDS} {_ARENA_LIMITS} {_HUGE_PAGES} {_MMAP_COUNTS} {_MMAPPED} sbrk_base:word"
        f" {_TCACHE} tcache_unsorted_limit:word"
    ),
    "2.43": (
        f"{_THRESHOLDS} {_ARENA_LIMITS} thp_mode:int {_HUGE_PAGES} {_MMAP_COUNTS} {_MMAPPED} sbrk_base:word"
        f" {_TCACHE} tcache_unsorted_limit:word"
    ),
    "2.44": (
        f"{_THRESHOLDS} {_ARENA_LIMITS} thp_mode:int {_HUGE_PAGES} {_MMAP_COUNTS} {_MMAPPED} sbrk_base:word {_TCACHE}"
    ),
}

# libc_malloc_debug.so (2.34+) has its own malloc, built without tcache: its mp_ ends before the tcache's fields.
MALLOC_PAR |= {
    f"{name} without tcache": row.partition(f" {_TCACHE}")[0] for name, row in MALLOC_PAR.items() if _TCACHE in row
}

# The pad keeps the first chunk of a sub-heap aligned; its size follows from sizeof (``structures``).
HEAP_INFO = {
    "2.12": "ar_ptr:word prev:word size:word mprotect_size:word",
    "2.35": "ar_ptr:word prev:word size:word mprotect_size:word pagesize:word",
}

TCACHE_PERTHREAD = {
    "2.26": "counts:byte*64 entries:word*64",
    "2.30": "counts:half*64 entries:word*64",
    "2.42": "counts:half*76 entries:word*76",
}

# --- Generations, oldest first ------------------------------------------------------------------------------------

GENERATIONS = (
    Generation(
        name="glibc 2.12-2.14",
        releases=("2.12-stock", "2.13-stock", "2.14-stock"),
        malloc_state="2.12 stock",
        malloc_par="2.12 stock",
        heap_info="2.12",
        i386_word_class="32a8",
        arena_limit="none",
        flags_hold_fastchunks=True,
    ),
    Generation(
        name="glibc 2.12-2.14 with PER_THREAD",
        releases=("2.12", "2.13", "2.14"),
        malloc_state="2.12 PER_THREAD",
        malloc_par="2.12 PER_THREAD",
        heap_info="2.12",
        i386_word_class="32a8",
        flags_hold_fastchunks=True,
    ),
    Generation(
        name="glibc 2.15-2.22",
        releases=("2.15", "2.16", "2.17", "2.18", "2.19", "2.20", "2.21", "2.22"),
        malloc_state="2.12 PER_THREAD",
        malloc_par="2.15",
        heap_info="2.12",
        i386_word_class="32a8",
        flags_hold_fastchunks=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.22 branch and 2.23",
        releases=("2.22-branch", "2.23"),
        malloc_state="2.23",
        malloc_par="2.15",
        heap_info="2.12",
        i386_word_class="32a8",
        flags_hold_fastchunks=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.24-2.25",
        releases=("2.24", "2.25"),
        malloc_state="2.23",
        malloc_par="2.24",
        heap_info="2.12",
        i386_word_class="32a8",
        flags_hold_fastchunks=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.26",
        releases=("2.26",),
        malloc_state="2.23",
        malloc_par="2.26",
        heap_info="2.12",
        tcache="2.26",
        flags_hold_fastchunks=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.26 branch, 2.27 and 2.28",
        releases=("2.26-branch", "2.27", "2.28"),
        malloc_state="2.27",
        malloc_par="2.26",
        heap_info="2.12",
        tcache="2.26",
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.27 branch and 2.29",
        releases=("2.27-branch", "2.29"),
        malloc_state="2.27",
        malloc_par="2.26",
        heap_info="2.12",
        tcache="2.26",
        tcache_key=TcacheKey.STRUCT_ADDRESS,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.28 branch, 2.29 branch, 2.30 and 2.31",
        releases=("2.28-branch", "2.29-branch", "2.30", "2.31"),
        malloc_state="2.27",
        malloc_par="2.26",
        heap_info="2.12",
        tcache="2.30",
        tcache_key=TcacheKey.STRUCT_ADDRESS,
        tcache_follows_counts=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.32-2.33",
        releases=("2.32", "2.33"),
        malloc_state="2.27",
        malloc_par="2.26",
        heap_info="2.12",
        tcache="2.30",
        tcache_key=TcacheKey.STRUCT_ADDRESS,
        tcache_follows_counts=True,
        safe_linking=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.34",
        releases=("2.34",),
        malloc_state="2.27",
        malloc_par="2.26",
        heap_info="2.12",
        tcache="2.30",
        tcache_key=TcacheKey.RANDOM_WORD,
        tcache_follows_counts=True,
        safe_linking=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.35-2.41",
        releases=("2.35", "2.36", "2.37", "2.38", "2.39", "2.40", "2.41"),
        malloc_state="2.27",
        malloc_par="2.35",
        heap_info="2.35",
        tcache="2.30",
        tcache_key=TcacheKey.RANDOM_WORD,
        tcache_follows_counts=True,
        safe_linking=True,
        next_is_static=True,
        heap_max_follows_hugetlb=True,
    ),
    Generation(
        name="glibc 2.35-2.37 without tunables",
        releases=("2.35-no-tunables", "2.36-no-tunables", "2.37-no-tunables"),
        malloc_state="2.27",
        malloc_par="2.26",
        heap_info="2.35",
        tcache="2.30",
        tcache_key=TcacheKey.RANDOM_WORD,
        tcache_follows_counts=True,
        safe_linking=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.42",
        releases=("2.42", "2.42-branch"),
        malloc_state="2.27",
        malloc_par="2.35",
        heap_info="2.35",
        tcache="2.42",
        tcache_key=TcacheKey.RANDOM_WORD,
        tcache_counts_free_slots=True,
        tcache_may_count_from_one_less=True,  # the tag
        safe_linking=True,
        next_is_static=True,
    ),
    Generation(
        name="glibc 2.43",
        releases=("2.43",),
        malloc_state="2.43",
        malloc_par="2.43",
        heap_info="2.35",
        tcache="2.42",
        tcache_key=TcacheKey.RANDOM_WORD,
        tcache_counts_free_slots=True,
        tcache_may_be_padded_twice=True,
        tcache_is_never_null=True,
        safe_linking=True,
        next_is_static=True,
        mmapped_trailer_words=2,
        mmapped_mem_drifts=True,
        # Measured with 2.43 and 2.44 on x86-64 under every mode of the kernel and every value of glibc.malloc.hugetlb.
        thp_modes_with_pagesize=(0, 1),
        thp_modes_without_pagesize=(2, 3),
    ),
    Generation(
        name="glibc 2.44",
        releases=("2.44",),
        malloc_state="2.43",
        malloc_par="2.44",
        heap_info="2.35",
        tcache="2.42",
        tcache_key=TcacheKey.RANDOM_WORD,
        tcache_counts_free_slots=True,
        tcache_is_never_null=True,
        safe_linking=True,
        next_is_static=True,
        mmapped_trailer_words=2,
        mmapped_mem_drifts=True,
        arena_limit="cpus",
        thp_modes_with_pagesize=(2, 3),
        thp_modes_without_pagesize=(0, 1, 4),
    ),
)
