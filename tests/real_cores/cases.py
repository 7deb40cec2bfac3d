"""The table of cases: which programs die how, linked how, with what arguments; and the same for the matrix of releases.

Data. Knows nothing of how a case is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from tests.real_cores.targets import MATRIX_TARGETS, MUSL, NATIVE, Target

LOG_BYTES = 1 << 28  # sparse: room for 8 million events
MATRIX_LOG_BYTES = 1 << 24
WRAPPED = (
    "malloc",
    "free",
    "calloc",
    "realloc",
    "memalign",
    "aligned_alloc",
    "posix_memalign",
    "valloc",
    "pvalloc",
)


@dataclass(frozen=True, slots=True)
class Linking:
    """How a program is compiled and linked: a name and the flags; `libraries` stand last, and are built for this machine's libc."""

    name: str
    flags: tuple[str, ...]
    is_static: bool = False
    standard: tuple[str, ...] = ("-std=gnu11",)
    libraries: tuple[str, ...] = ()


RECORDED = ("recorder", "record_files", "scenario")
SHAPED = (*RECORDED, "shapes")
UNRECORDED = ("no_recorder", "record_files", "scenario")
RECORDS_ITSELF = ("record_files", "scenario")  # the program has the recorder inside

_WRAP = ("-DRECORDER_WRAP", *(f"-Wl,--wrap={name}" for name in WRAPPED))
PIE = Linking("pie", ("-fPIE", "-pie"))
NO_PIE = Linking("no-pie", ("-fno-pie", "-no-pie"))
STATIC = Linking("static", ("-fno-pie", "-no-pie", "-static", *_WRAP), is_static=True)
# C++'s own library inside the program, so that it runs with another libc.
CPLUSPLUS = Linking(
    "c++",
    ("-fPIE", "-pie"),
    standard=(),
    libraries=("-static-libgcc", "-Wl,-Bstatic", "-lstdc++", "-Wl,-Bdynamic"),
)
STATIC_PIE = Linking("static-pie", ("-fPIE", "-static-pie", *_WRAP), is_static=True)


@dataclass(frozen=True, slots=True)
class Case:
    """One core to make: a program, how it is linked, started, ended and dumped.

    `dies_of` is the signal the program ends with; with `made_by` "gcore" it parks itself and gdb
    dumps the living process. `coredump_filter` is what the kernel is told to dump (core(5)).
    `preload` names a library that must be installed (`packages` says how). `log_bytes` 0 turns the
    event log off. `support` is what the program is linked with: the recorder; "no_recorder", which
    leaves malloc alone; or nothing. `libraries` are built beside the program, which loads them.
    `attempts`: how often it is tried to die of the right signal, where that depends on the addresses.
    """

    name: str
    program: str
    arguments: tuple[str, ...] = ()
    linking: Linking = PIE
    environment: Mapping[str, str] = field(default_factory=dict)
    dies_of: str = "SIGABRT"
    coredump_filter: int = 0x33  # the kernel's own default
    made_by: str = "kernel"
    preload: str | None = None
    packages: tuple[str, ...] = ()
    log_bytes: int = LOG_BYTES
    support: tuple[str, ...] = RECORDED
    libraries: tuple[str, ...] = ()
    slow: bool = False
    attempts: int = 1
    target: Target = NATIVE

    def variant(self, suffix: str, **changes: Any) -> Case:
        """The same case dumped another way, named `case@suffix`; ``changes`` are fields of Case."""
        return replace(self, name=f"{self.name}@{suffix}", **changes)


def _all_cases() -> Iterator[Case]:
    yield from _thread_cases()
    yield from _arena_cases()
    yield from _damage_cases()
    yield from _other_allocator_cases()
    yield from _copies_cases()
    yield from _verdict_cases()
    yield from _split_cases()


def _thread_cases() -> Iterator[Case]:
    kept = Case("threads_kept", "threads", ("threads=12", "seed=11"))
    yield kept
    yield kept.variant("filter_all", coredump_filter=0x7F)
    yield kept.variant("filter_no_files", coredump_filter=0x21)
    yield kept.variant("filter_anonymous", coredump_filter=0x01)
    yield kept.variant("filter_nothing", coredump_filter=0x00)
    yield kept.variant("segv", arguments=("threads=12", "seed=12", "end=segv"), dies_of="SIGSEGV")
    # gdb writes the whole reserve of every arena, 64 MiB each: few threads.
    yield kept.variant("gcore", arguments=("threads=2", "seed=13"), made_by="gcore")
    yield Case("threads_gone", "threads", ("threads=3", "gone=60", "steps=3000", "seed=21"))
    yield Case(
        "one_arena",
        "threads",
        ("threads=10", "gone=10", "steps=6000", "seed=31"),
        environment={"MALLOC_ARENA_MAX": "1"},
    )
    mix = ("threads=5", "gone=6", "steps=5000", "seed=41")
    yield Case("static_exe", "threads", mix, linking=STATIC)
    yield Case("static_pie", "threads", mix, linking=STATIC_PIE)
    yield Case("non_pie", "threads", mix, linking=NO_PIE)
    small = ("threads=4", "steps=1500", "slots=60", "limit=2000", "stack=64", "seed=51")
    yield Case("threads_small", "threads", small)
    yield Case("plain_small", "plain", ("seed=61",))
    yield Case("retitled", "plain", ("seed=62", "title=1"), environment={"MALLOC_ARENA_MAX": "2"})
    yield Case("mapped_memory", "mapped_memory", ("seed=211",))
    yield Case("mapped_memory@filter_all", "mapped_memory", ("seed=212",), coredump_filter=0x7F)
    yield Case("neighbours", "neighbours", ("seed=213",))
    yield Case("fork_child", "fork_child", ("threads=6", "seed=71"))
    yield Case("fork_child_grows", "fork_child", ("threads=3", "grow=600", "seed=72"))


def _arena_cases() -> Iterator[Case]:
    yield Case("many_sub_heaps", "sub_heaps", ("threads=2", "heaps=10", "seed=81"))
    yield Case("every_list", "every_list", ("threads=4", "seed=91"))
    yield Case("brk_blocked", "main_arena", ("how=blocked", "seed=101"))
    yield Case("foreign_sbrk", "main_arena", ("how=foreign", "seed=102"))
    yield Case("foreign_sbrk@around", "main_arena", ("how=around", "first=3000", "last=24000", "seed=103"))
    yield Case("mmapped", "mmapped", ("threads=6", "seed=111"))
    yield Case("remapped", "remapped", ("seed=112",), environment={"MALLOC_MMAP_THRESHOLD_": "131072"})
    filled = {"MALLOC_PERTURB_": "255"}
    yield Case("refilled", "threads", ("threads=2", "gone=12", "steps=9000", "seed=113"), environment=filled)
    for place in ("libc", "call", "program"):
        yield Case(f"interrupted_{place}", "interrupted", (f"in={place}", "seed=114"))
    yield Case("io_workers", "io_workers", ("threads=2", "rings=3", "seed=115"))
    yield Case("bloat", "bloat", ("threads=40", "peak=1500", "seed=121"))
    yield Case("bloat_small", "bloat", ("threads=40", "peak=200", "stack=64", "seed=122"))
    yield Case("retained", "bloat", ("main=65536", "seed=123"))
    yield Case("retained_small", "bloat", ("main=3000", "seed=124"))
    yield Case("retained_trimmed", "bloat", ("main=65536", "trim=1", "seed=125"))
    few = {"MALLOC_ARENA_MAX": "2"}
    yield Case("bloat_arena_max", "bloat", ("threads=40", "peak=1500", "seed=126"), environment=few)
    yield from _threshold_cases()
    # Five deep stacks: no more than the check of stacks asks for, and no heap to speak of.
    stacks = Case(
        "stacks",
        "stacks",
        ("shallow=20", "deep=4", "depth=6144", "gone=3", "seed=194"),
        environment={"MALLOC_ARENA_MAX": "1"},
    )
    yield stacks
    few = ("shallow=3", "deep=2", "depth=1536", "stack=2048", "gone=3", "seed=195")
    yield stacks.variant("gcore", arguments=few, made_by="gcore")
    yield stacks.variant("static_pie", arguments=few, linking=STATIC_PIE)
    yield from _unjoined_cases()
    # Each core of these is from a process that looked what malloc_trim(0) gave back of the same heap.
    yield Case("trim", "trim", ("threads=3", "blocks=2000", "seed=201"))
    yield Case("trim@before", "trim", ("threads=2", "blocks=2000", "before=1", "seed=202"))
    yield Case("trim@behind", "trim", ("threads=1", "blocks=1500", "behind=1", "seed=203"))
    huge = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    yield Case("trim@huge", "trim", ("threads=1", "blocks=1500", "seed=207"), environment=huge)
    yield Case("trim@trimmed", "trim", ("threads=3", "blocks=2000", "trimmed=1", "seed=201"))
    yield Case("pinned_sub_heaps", "retention", ("how=sub_heaps", "threads=2", "heaps=3", "seed=204"))
    yield Case("fragmented", "retention", ("how=pages", "mib=24", "seed=205"))
    hoard = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=2000"}
    yield Case("tcache_hoards", "retention", ("how=tcache", "threads=12", "blocks=1500"), environment=hoard)
    big = ("chunks=10000000", "threads=4", "seed=131")
    yield Case("big_heap", "big_heap", big, log_bytes=0, slow=True)
    # 4.3 GB each, what looking for malloc is measured on: one thread, the main arena alone, no page empty.
    for content in ("random", "pointers"):
        arguments = (f"content={content}", "main=1024", "big=1024", "plain=2048", "seed=132")
        yield Case(f"full_{content}", "full_memory", arguments, log_bytes=0, slow=True)
    for shape in ("one", "list", "shuffled", "star", "none"):
        arguments = (f"shape={shape}", "chunks=10000000", "threads=4", "seed=133")
        yield Case(f"graph_{shape}", "graph_heap", arguments, log_bytes=0, slow=True)
    giant = ("shape=one", "chunks=60000000", "threads=4", "seed=134")
    yield Case("graph_one_giant", "graph_heap", giant, log_bytes=0, slow=True)


def _unjoined_cases() -> Iterator[Case]:
    """Threads that ended: 60 stacks of 8 MiB where nobody joins them, and what looks nearly the same."""
    few = {"MALLOC_ARENA_MAX": "1"}
    unjoined = Case("unjoined", "unjoined", ("how=lost", "seed=221"), environment=few)
    yield unjoined
    yield unjoined.variant("live", arguments=("how=lost", "live=2", "seed=222"))
    yield unjoined.variant("small_stacks", arguments=("how=lost", "threads=400", "stack=256", "live=1", "seed=223"))
    yield unjoined.variant("kept", arguments=("how=kept", "seed=224"))
    yield unjoined.variant("many_kept", arguments=("how=kept", "threads=120", "stack=1024", "seed=225"))
    yield unjoined.variant("static_pie", arguments=("how=lost", "seed=226"), linking=STATIC_PIE)
    yield unjoined.variant("thread_forks", arguments=("how=joined", "fork=2", "seed=232"))
    # Nothing to say of these.
    yield unjoined.variant("four", arguments=("how=lost", "threads=4", "seed=227"))
    yield unjoined.variant("joining", arguments=("how=joining", "live=1", "seed=228"))
    yield unjoined.variant("joined", arguments=("how=joined", "seed=229"))
    yield unjoined.variant("detached", arguments=("how=detached", "live=1", "seed=230"))
    yield unjoined.variant("fork", arguments=("how=lost", "live=2", "fork=1", "seed=231"))


def _threshold_cases() -> Iterator[Case]:
    """Settings of malloc, by whom they can be set."""
    # 400,000 bytes: below 512 KiB, the most that 32-bit malloc raises its threshold to.
    ratchet = Case("ratchet", "ratchet", ("ratchet=400000", "blocks=60", "seed=191"))
    yield ratchet
    # All three ways at once, and names and values that malloc does not take.
    given = {
        "MALLOC_ARENA_MAX": "4",
        "MALLOC_MMAP_THRESHOLD_": "0x20000",
        "MALLOC_TOP_PAD": "1234",
        "MALLOC_PERTURB_": "0",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=5:glibc.malloc.trim_treshold=4096:glibc.malloc.arena_test=3",
    }
    yield ratchet.variant(
        "given", arguments=("ratchet=400000", "blocks=60", "n_mmaps_max=70", "seed=192"), environment=given
    )
    # The program thinks otherwise than its environment; the end of the heap is free and stays.
    yield ratchet.variant(
        "late",
        arguments=("arena_max=2", "ratchet=30000000", "block=20000000", "blocks=5", "tail=2", "keep=1", "seed=193"),
        environment={"MALLOC_ARENA_MAX": "7"},
    )


def _damage_cases() -> Iterator[Case]:
    for how, signal_name in (("top", "SIGABRT"), ("unsorted", "SIGSEGV"), ("next_size", "SIGABRT")):
        arguments = (f"how={how}", "threads=3", "seed=141")
        yield Case(f"crash_in_malloc_{how}", "crash_in_malloc", arguments, dies_of=signal_name)
    yield Case("abort_double_free", "double_free", ("seed=151",))


def _other_allocator_cases() -> Iterator[Case]:
    yield Case("no_glibc_heap", "no_heap", log_bytes=0, support=())
    for mib in (0, 30):
        flags = ("-static", "-nostdlib", "-fno-stack-protector", f"-DMIB={mib}")
        yield Case(
            f"no_libc@{mib}",
            "no_libc",
            linking=Linking(f"no-libc-{mib}", flags, is_static=True),
            log_bytes=0,
            support=(),
        )
    mix = ("threads=5", "gone=6", "steps=5000", "seed=161")
    for name, library, package in (
        ("jemalloc", "libjemalloc.so.2", "libjemalloc2"),
        ("tcmalloc", "libtcmalloc_minimal.so.4", "libtcmalloc-minimal4"),
        ("mimalloc", "libmimalloc.so.2", "libmimalloc2.0"),
    ):
        yield Case(
            f"other_allocator_{name}",
            "threads",
            mix,
            preload=library,
            packages=(package,),
            log_bytes=0,
            support=UNRECORDED,
        )
    yield Case("other_allocator_musl", "threads", mix, target=MUSL, log_bytes=0, support=UNRECORDED)


def _copies_cases() -> Iterator[Case]:
    """More than one malloc in a process."""

    def case(name: str, *arguments: str, **more: Any) -> Case:
        return Case(name, "copies", arguments, support=RECORDS_ITSELF, **more)

    yield case("namespace", "namespaces=1", "threads=3", "seed=171")
    yield case("namespaces", "namespaces=2", "threads=4", "seed=172")
    # Only their main arenas: nothing but these tells of the copies.
    yield case("namespaces_main_only", "namespaces=2", "threads=0", "pieces=250", "seed=173")
    yield case("namespaces_gone", "namespaces=2", "threads=2", "gone=5", "seed=174")
    checked = {"MALLOC_CHECK_": "3", "GLIBC_TUNABLES": "glibc.malloc.check=3"}
    debug = "libc_malloc_debug.so.0"
    yield case(
        "malloc_debug", "debug=1", "threads=3", "seed=175", environment=checked, preload=debug, packages=("libc6",)
    )
    yield case(
        "side_by_side",
        "namespaces=1",
        "library=libjemalloc.so.2",
        "threads=3",
        "seed=176",
        preload="libjemalloc.so.2",
        packages=("libjemalloc2",),
    )


def _verdict_cases() -> Iterator[Case]:
    """Processes that know what is to be said of each of their blocks."""
    verdicts = Case("verdicts", "verdicts", ("threads=4", "seed=181"), support=SHAPED, libraries=("held_library",))
    yield verdicts
    yield verdicts.variant("altstack", arguments=("threads=2", "seed=182", "end=altstack"))
    yield verdicts.variant("gcore", arguments=("threads=1", "seed=183"), made_by="gcore")
    yield verdicts.variant("hidden", arguments=("threads=2", "seed=184", "hidden=1"))
    yield verdicts.variant("one_arena", arguments=("threads=3", "seed=185"), environment={"MALLOC_ARENA_MAX": "1"})
    # Not the one without PIE: numbers and text look like its low addresses.
    static = ("threads=2", "library=0", "seed=186")
    yield verdicts.variant("static_pie", arguments=static, linking=STATIC_PIE, libraries=())
    yield Case("long_lists", "long_lists", ("nodes=1000000", "seed=187"))
    many = ("nodes=10000000", "mark=0", "seed=188")
    yield Case("long_lists@slow", "long_lists", many, log_bytes=0, slow=True)
    yield Case("containers", "containers", ("seed=189",), linking=CPLUSPLUS)
    yield Case("like_nodes", "like_nodes", ("levels=14", "seed=190"), log_bytes=0)
    yield from _hidden_cases()
    for how in ("queue", "sessions", "holders", "local"):
        yield Case(f"growing_{how}", "growing", (f"how={how}", "seed=231"), linking=CPLUSPLUS, log_bytes=0)


def _hidden_cases() -> Iterator[Case]:
    """Holders that pointers to starts do not show, with leaks beside them."""
    hidden = Case("hidden_pointers", "hidden_pointers", ("how=tag", "seed=221"))
    yield hidden
    for how in ("nan", "low", "shift", "swap", "packed", "halves"):
        yield hidden.variant(how, arguments=(f"how={how}", "seed=222"))
    # Only low addresses fit.
    yield hidden.variant("short", arguments=("how=short", "seed=223"), linking=NO_PIE)
    yield hidden.variant("lost", arguments=("how=tag", "lost=1", "seed=224"))
    yield hidden.variant("static_pie", arguments=("how=tag", "seed=225"), linking=STATIC_PIE)
    yield Case("held_inside", "held_inside", ("seed=226",), linking=CPLUSPLUS)
    yield Case("held_inside@gcore", "held_inside", ("seed=227", "end=pause"), linking=CPLUSPLUS, made_by="gcore")
    sight = Case("out_of_sight", "out_of_sight", ("how=stacks", "threads=12", "seed=228"))
    yield sight
    yield sight.variant("file", arguments=("how=file", "seed=229"))
    yield sight.variant("memfd", arguments=("how=memfd", "seed=230"))


SPLIT_HOWS = (
    "none", "read", "exec", "huge", "dump", "fork", "lock", "name", "free", "need", "shared", "file", "private", "unmap", "remap"
)  # fmt: skip
SPLIT_PLACES = (
    ("main", ()),
    ("thread", ()),
    ("mmapped", ()),
    ("aligned", ()),
    ("guards", ("where=main", "at=guard", "holes=8")),
    ("large_guards", ("where=aligned", "at=guard", "holes=4")),
    ("pieces", ("where=pieces", "holes=2")),
)
"""Name and arguments of a place in malloc's memory whose pages are changed; ``where`` is the name where it is not said."""
SPLIT_ON_MATRIX = (
    "main_none", "main_unmap", "thread_shared", "guards_none", "pieces_private", "mmapped_huge", "aligned_unmap"
)  # fmt: skip


def _split_cases() -> Iterator[Case]:
    """Pages of malloc's memory that the program protected, advised, covered or unmapped (splits.c)."""
    for place, given in SPLIT_PLACES:
        for number, how in enumerate(SPLIT_HOWS):
            arguments = (*(given or (f"where={place}",)), f"how={how}", f"seed={220 + number}")
            name = f"{place}_{how}"
            case = Case(f"split_{name}" if name in SPLIT_ON_MATRIX else f"split_{name}@native", "splits", arguments)
            yield case
            if how in ("none", "unmap", "private", "huge"):
                yield replace(case, name=f"split_{name}@gcore", made_by="gcore")
    for where in ("main", "thread"):
        for how in ("none", "file", "unmap"):
            arguments = (f"where={where}", "at=headers", f"how={how}", "holes=3", "seed=240")
            yield Case(f"split_{where}_headers_{how}", "splits", arguments)
    for how in ("none", "read", "dump", "unmap"):
        yield Case(f"split_top_{how}@native", "splits", ("where=main", "at=top", f"how={how}", "seed=241"))
    for how in ("none", "read"):
        arguments = ("where=main", "at=barred", f"how={how}", "seed=243")
        yield Case(f"split_barred_{how}", "splits", arguments, dies_of="SIGSEGV")
    lost = Case("split_lost", "splits", ("where=lost", "seed=242"))
    yield lost
    yield lost.variant("gcore", made_by="gcore")


CASES: Mapping[str, Case] = {case.name: case for case in _all_cases()}
# Committed as fixtures/cores/NAME.core.zst: small enough, and tests then need no compiler.
FIXTURE_CASES = (
    "abort_double_free",
    "bloat_small",
    "plain_small",
    "retained_small",
    "threads_small",
)


# ---------------------------------------------------------------------------------------- the matrix

# The cases that every release is held against, with arguments small enough for 15 targets and an emulator.
# (Thread stacks below 128 KiB are refused on arm64.)
_MIX = ("threads=3", "gone=3", "steps=800", "slots=100", "limit=200000")
MATRIX_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "threads_kept": ("threads=4", "steps=1200", "slots=120", "limit=200000", "seed=11"),
    "threads_kept@filter_all": ("threads=2", "steps=600", "slots=100", "limit=50000", "seed=14"),
    "threads_kept@filter_no_files": ("threads=2", "steps=600", "slots=100", "limit=50000", "seed=15"),
    "threads_kept@filter_anonymous": ("threads=2", "steps=600", "slots=100", "limit=50000", "seed=16"),
    "threads_kept@segv": ("threads=3", "steps=800", "slots=100", "limit=200000", "seed=12", "end=segv"),
    "threads_kept@gcore": ("threads=1", "steps=800", "slots=100", "limit=50000", "seed=13"),
    "threads_gone": ("threads=2", "gone=20", "steps=400", "slots=80", "limit=50000", "seed=21"),
    "one_arena": ("threads=4", "gone=4", "steps=600", "slots=100", "limit=50000", "seed=31"),
    "static_exe": (*_MIX, "seed=41"),
    "static_pie": (*_MIX, "seed=42"),
    "non_pie": (*_MIX, "seed=43"),
    "plain_small": ("seed=61",),
    "mapped_memory": ("seed=211",),
    "mapped_memory@filter_all": ("seed=212",),
    "fork_child": ("threads=3", "seed=71"),
    "fork_child_grows": ("threads=2", "grow=300", "seed=72"),
    "many_sub_heaps": ("threads=2", "heaps=4", "seed=81"),
    "every_list": ("threads=3", "seed=91"),
    "brk_blocked": ("how=blocked", "seed=101"),
    "foreign_sbrk": ("how=foreign", "seed=102"),
    "foreign_sbrk@around": ("how=around", "first=3000", "last=8000", "seed=103"),
    "mmapped": ("threads=3", "seed=111"),
    "remapped": ("reallocs=250", "seed=112"),
    "bloat": ("threads=12", "peak=300", "seed=121"),
    "retained": ("main=3000", "seed=123"),
    "retained_trimmed": ("main=3000", "trim=1", "seed=125"),
    "bloat_arena_max": ("threads=12", "peak=300", "seed=126"),
    "ratchet": ("ratchet=400000", "blocks=60", "seed=191"),
    "stacks": ("shallow=3", "deep=2", "depth=1536", "stack=2048", "gone=3", "seed=194"),
    "stacks@gcore": ("shallow=3", "deep=2", "depth=1536", "stack=2048", "gone=3", "seed=195"),
    "stacks@static_pie": ("shallow=3", "deep=2", "depth=1536", "stack=2048", "gone=3", "seed=195"),
    **{
        name: (f"how={how}", *more, "seed=221")
        for name, how, *more in (
            ("unjoined", "lost"),
            ("unjoined@live", "lost", "live=2"),
            ("unjoined@kept", "kept"),
            ("unjoined@thread_forks", "joined", "fork=2"),
            ("unjoined@static_pie", "lost"),
            ("unjoined@joined", "joined"),
            ("unjoined@detached", "detached", "live=1"),
            ("unjoined@fork", "lost", "live=2", "fork=1"),
        )
    },
    "ratchet@given": ("ratchet=400000", "blocks=60", "n_mmaps_max=70", "seed=192"),
    "trim": ("threads=2", "blocks=800", "seed=201"),
    "trim@before": ("threads=1", "blocks=800", "before=1", "seed=202"),
    "trim@behind": ("threads=1", "blocks=600", "behind=1", "seed=203"),
    "trim@huge": ("threads=1", "blocks=600", "seed=207"),
    "trim@trimmed": ("threads=2", "blocks=800", "trimmed=1", "seed=201"),
    "pinned_sub_heaps": ("how=sub_heaps", "threads=2", "heaps=2", "seed=204"),
    "fragmented": ("how=pages", "mib=4", "seed=205"),
    "tcache_hoards": ("how=tcache", "threads=4", "blocks=1500"),
    "big_heap": ("chunks=20000", "threads=4", "seed=131"),
    "crash_in_malloc_top": ("how=top", "threads=3", "seed=141"),
    "crash_in_malloc_unsorted": ("how=unsorted", "threads=3", "seed=141"),
    "crash_in_malloc_next_size": ("how=next_size", "threads=3", "seed=141"),
    "abort_double_free": ("seed=151",),
    "namespace": ("namespaces=1", "threads=2", "steps=600", "seed=171"),
    "namespaces": ("namespaces=2", "threads=3", "steps=600", "seed=172"),
    "namespaces_main_only": ("namespaces=2", "threads=0", "pieces=120", "steps=600", "seed=173"),
    "namespaces_gone": ("namespaces=2", "threads=2", "gone=3", "steps=600", "seed=174"),
    "malloc_debug": ("debug=1", "threads=2", "steps=600", "seed=175"),
    "verdicts": ("threads=2", "seed=181"),
    "verdicts@altstack": ("threads=1", "seed=182", "end=altstack"),
    "verdicts@gcore": ("threads=1", "seed=183"),
    "verdicts@hidden": ("threads=1", "seed=184", "hidden=1"),
    "verdicts@one_arena": ("threads=1", "seed=185"),
    "verdicts@static_pie": ("threads=1", "library=0", "seed=186"),
    "long_lists": ("nodes=20000", "seed=187"),
    "containers": ("seed=189",),
    "held_inside": ("seed=226",),
    "hidden_pointers": ("how=tag", "blocks=1500", "seed=221"),
    "hidden_pointers@nan": ("how=nan", "blocks=1500", "seed=222"),
    "hidden_pointers@low": ("how=low", "blocks=1500", "seed=222"),
    "hidden_pointers@shift": ("how=shift", "blocks=1500", "seed=222"),
    "hidden_pointers@swap": ("how=swap", "blocks=1500", "seed=222"),
    "hidden_pointers@packed": ("how=packed", "blocks=1500", "seed=222"),
    "hidden_pointers@halves": ("how=halves", "blocks=1500", "seed=222"),
    "hidden_pointers@static_pie": ("how=tag", "blocks=1500", "seed=225"),
    "out_of_sight": ("how=stacks", "threads=3", "seed=228"),
    "out_of_sight@file": ("how=file", "seed=229"),
}


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Cases that are not made for some targets, both by pattern (fnmatch), and the reason."""

    case: str
    target: str
    reason: str


EXCLUSIONS = (
    Exclusion("threads_kept@filter_nothing", "*", "its core has no memory of any heap: nothing differs by release"),
    Exclusion("threads_small", "*", "the committed twin of threads_kept"),
    Exclusion("bloat_small", "*", "the committed twin of bloat"),
    Exclusion("retained_small", "*", "the committed twin of retained, whose matrix arguments are as small"),
    Exclusion("full_*", "*", "for measurements alone, 4 GB each"),
    Exclusion("graph_*", "*", "for measurements alone, 1 GB and more each"),
    Exclusion("ratchet@late", "*", "on 32-bit no threshold grows that far; nothing of it differs by release"),
    Exclusion("trim*", "*-arm64", "qemu-user does not tell which pages of the program are in memory"),
    Exclusion("unjoined*", "*-arm64", "qemu-user's cores tell no thread pointers, and so none of the library's lists"),
    Exclusion("unjoined@small_stacks", "*", "the same as unjoined, of other sizes"),
    Exclusion("unjoined@many_kept", "*", "the same as unjoined@kept, of another number"),
    Exclusion("unjoined@four", "*", "the same as unjoined, of another number"),
    Exclusion("unjoined@joining", "*", "about registers of a system call: nothing differs by release"),
    Exclusion("retitled", "*", "about the kernel's stack: nothing differs by release"),
    Exclusion("interrupted_*", "*", "about the kernel's signal frames: nothing differs by release"),
    Exclusion("io_workers", "*", "about the kernel's own threads: nothing differs by release"),
    Exclusion("refilled", "*", "about what malloc leaves in free chunks, which is alike in all releases"),
    Exclusion("neighbours", "*", "about the kernel's mappings: nothing differs by release"),
    Exclusion("like_nodes", "*", "about references alone: nothing differs by release"),
    Exclusion("no_libc*", "*", "no libc: nothing differs by release"),
    Exclusion("split_*@native", "*", "about the kernel's mappings: a few of them are held against every release"),
    Exclusion("split_*@gcore", "*", "as with split_*@native"),
    Exclusion("split_*", "*-arm64", "qemu-user tells nothing of the mappings of the program inside it"),
    Exclusion("no_glibc_heap", "*", "malloc is never called: no heap to compare"),
    Exclusion("long_lists@slow", "*", "for measurements alone; nothing of it differs by release"),
    Exclusion("containers", "bullseye-*", "libstdc++ is this machine's and needs a newer libc"),
    Exclusion("containers", "*-i386", "built by this machine's own C++ compiler"),
    Exclusion("containers", "*-arm64", "built by this machine's own C++ compiler"),
    Exclusion("growing_*", "*", "about references alone: nothing differs by release"),
    Exclusion("held_inside", "bullseye-*", "as with containers"),
    Exclusion("held_inside", "*-i386", "as with containers"),
    Exclusion("held_inside", "*-arm64", "as with containers"),
    Exclusion("held_inside@gcore", "*", "about the search alone: nothing differs by release"),
    Exclusion("hidden_pointers", "*-i386", "no bits of a pointer are free there"),
    Exclusion("hidden_pointers@nan", "*-i386", "no bits of a pointer are free there"),
    Exclusion("hidden_pointers@low", "*-i386", "no bits of a pointer are free there"),
    Exclusion("hidden_pointers@halves", "*-i386", "a pointer has no halves there"),
    Exclusion("hidden_pointers@static_pie", "*-i386", "no bits of a pointer are free there"),
    Exclusion("hidden_pointers@short", "*", "about low addresses: nothing differs by release"),
    Exclusion("hidden_pointers@lost", "*", "about the search alone: nothing differs by release"),
    Exclusion("out_of_sight*", "*-arm64", "qemu-user writes all readable memory, and stacks have another size there"),
    Exclusion("out_of_sight@memfd", "*", "about the kernel's core: nothing differs by release"),
    Exclusion("verdicts@hidden", "*-arm64", "qemu-user writes all readable memory, whatever madvise said of it"),
    Exclusion("other_allocator_*", "*", "not glibc's malloc; the libraries are this machine's and need its libc"),
    Exclusion("side_by_side", "*", "the other allocator's library is this machine's and needs its libc"),
    Exclusion("malloc_debug", "bullseye-*", "libc_malloc_debug.so came with glibc 2.34"),
    Exclusion("namespaces", "bullseye-i386", "a thread that uses the second namespace's libc crashes inside it"),
    Exclusion("namespaces_gone", "bullseye-i386", "as with namespaces"),
    Exclusion("threads_kept@filter_*", "*-arm64", "qemu-user writes its core by itself, without coredump_filter"),
    Exclusion("*@gcore", "*-arm64", "gdb would dump the emulator, not the program inside it"),
    Exclusion(
        "*@gcore",
        "forky-*",
        "from glibc 2.42 on, with a kernel from 6.13 on, gdb's gcore loses the blocks with thread stacks and TLS",
    ),
    Exclusion("*@gcore", "experimental-*", "as with forky: gcore loses thread stacks and TLS"),
)


def exclusion_for(case: str, target: str) -> Exclusion | None:
    """Why a case is not made for a target, None if it is."""
    for exclusion in EXCLUSIONS:
        if fnmatchcase(case, exclusion.case) and fnmatchcase(target, exclusion.target):
            return exclusion
    return None


def _matrix_cases() -> Iterator[Case]:
    for target in MATRIX_TARGETS.values():
        for name, case in CASES.items():
            if exclusion_for(name, target.name) is None:
                yield replace(
                    case,
                    name=f"{target.name}/{name}",
                    arguments=MATRIX_ARGUMENTS.get(name, case.arguments),
                    log_bytes=MATRIX_LOG_BYTES,
                    slow=False,
                    support=_support(case, target),
                    target=target,
                )


def _support(case: Case, target: Target) -> tuple[str, ...]:
    is_old = target.release is not None and target.release.name == "bullseye"
    return (*case.support, "no_unwinder") if case.linking.is_static and is_old else case.support


# By "TARGET/CASE".
MATRIX: Mapping[str, Case] = {case.name: case for case in _matrix_cases()}


def _alone_cases() -> Iterator[Case]:
    """Programs without the recorder, which would allocate first: blocks like a tcache in size, of its neighbours' size, of pages."""
    for name, arguments in (
        ("aligned_only", ("50", "64", "100")),
        ("aligned_only@tcache_sized", ("50", "64", "640")),
        ("aligned_only@tcache_sized_32", ("50", "32", "384")),
        ("aligned_only@pages", ("40", "4096", "5000")),
        ("aligned_only@mmapped", ("3", "65536", "300000")),
        ("aligned_only@one", ("1", "64", "24")),
    ):
        case = Case(name, "aligned_only", arguments, log_bytes=0, support=())
        yield case
        # glibc 2.31's mp_ is not found where nothing of the brk heap tells it.
        for target in MATRIX_TARGETS.values() if name != "aligned_only@mmapped" else ():
            yield replace(case, name=f"{target.name}/{name}", target=target)


ALONE: Mapping[str, Case] = {case.name: case for case in _alone_cases()}
"""By name; those of the matrix by "TARGET/NAME"."""
