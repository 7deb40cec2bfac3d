"""The table of damaged cores: each kind of damage in the main and in a thread's arena, the same undamaged, the same met by malloc.

Data. Knows which kinds the program `damage` has and where each is possible; what a report has to say of them is in
test_damage_kinds.py. Names: `damaged_KIND@WHERE`, `undamaged_KIND@WHERE`, `met_KIND@WHERE` (the next operation of malloc met
the damage, and the process died there), `early_free_WHAT`; those of the matrix with `TARGET/` before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from tests.real_cores.cases import MATRIX_LOG_BYTES, RECORDED, Case
from tests.real_cores.targets import MATRIX_TARGETS

PARTS = ("scene", "overflow", "headers", "lists", "double_free", "arenas", "mapped")
SUPPORT = (*RECORDED, *(f"damage/{part}" for part in PARTS))
ARGUMENTS = ("threads=3", "steps=500", "slots=60")
# Where glibc asks for a terminal to write its last words to; the program reads them from a child's standard error.
ENVIRONMENT = {"LIBC_FATAL_STDERR_": "1"}
FILLED = {"MALLOC_PERTURB_": "92"}

KINDS = (
    "overflow_byte_zero",
    "overflow_byte",
    "overflow_flag_zero",
    "overflow_word",
    "overflow_text",
    "overflow_string",
    "overflow_fill",
    "overflow_zeros",
    "overflow_integers",
    "overflow_pointer",
    "overflow_far",
    "overflow_into_free",
    "overflow_into_cached",
    "overflow_into_fast",
    "overflow_into_top",
    "overflow_text_into_top",
    "overflow_into_fencepost",
    "underflow_word",
    "underflow_two_words",
    "footer_number",
    "footer_bit",
    "flip_prev_inuse",
    "flip_prev_inuse_behind_free",
    "flip_is_mmapped",
    "flip_non_main_arena",
    "flip_low",
    "flip_middle",
    "flip_high",
    "flip_of_free",
    "flip_of_cached",
    "flip_in_top",
    "flip_tops_prev_inuse",
    "uaf_tcache_next",
    "uaf_tcache_next_zero",
    "uaf_tcache_next_elsewhere",
    "uaf_tcache_key",
    "uaf_tcache_both",
    "tcache_cycle",
    "uaf_fastbin_fd",
    "fastbin_cycle",
    "uaf_unsorted_fd",
    "uaf_unsorted_fd_pointer",
    "uaf_unsorted_bk",
    "uaf_small_fd",
    "uaf_small_bk",
    "uaf_large_fd",
    "uaf_large_bk",
    "uaf_large_fd_nextsize",
    "uaf_large_bk_nextsize",
    "uaf_perturbed_unsorted",
    "uaf_perturbed_byte",
    "double_tcache",
    "double_tcache_between",
    "double_given_again",
    "double_fastbin",
    "double_tcache_fastbin",
    "double_tcache_bin",
    "invalid_interior",
    "invalid_bss",
    "invalid_stack",
    "tcache_count",
    "tcache_count_absurd",
    "tcache_head_misaligned",
    "tcache_head_foreign",
    "tcache_head_zero",
    "fastbin_head",
    "unsorted_head_fd",
    "unsorted_head_bk",
    "small_head_fd",
    "empty_head_bk",
    "binmap_bit",
    "top_pointer_moved",
    "top_pointer_rubbish",
    "system_mem",
    "arena_next",
    "last_remainder",
    "heap_ar_ptr",
    "heap_prev",
    "heap_size",
    "mmapped_size",
    "mmapped_size_bit",
    "mmapped_flag",
    "mmapped_prev_size",
    "mmapped_overflow",
    "mp_n_mmaps",
    "mp_n_mmaps_absurd",
    "mp_mmap_threshold",
    "overflow_then_freed",
    "overflow_fill_then_freed",
    "overflow_letters",
    "overflow_same_letter",
    "overflow_nul",
    "popped_fastbin_twice",
    "popped_taken_along",
    "popped_cached_written",
    "top_cut_short",
)
ONLY_MAIN = frozenset(("mp_n_mmaps", "mp_n_mmaps_absurd", "mp_mmap_threshold", "top_cut_short"))
"""There is one mp_, and a sub-heap knows its end without top."""
ONLY_THREAD = frozenset(("heap_ar_ptr", "heap_prev", "heap_size"))
"""The main arena has no heap_info."""
NEEDS_FASTBINS = frozenset(
    (
        "overflow_into_fast",
        "uaf_fastbin_fd",
        "fastbin_cycle",
        "double_fastbin",
        "double_tcache_fastbin",
        "fastbin_head",
        "popped_fastbin_twice",
        "popped_taken_along",
    )
)
"""Gone with glibc 2.43."""

# (Of fastbin_cycle malloc_consolidate leaves nothing behind but its message: it takes the list first.)
# What malloc meets next, by how the process dies of it on x86-64 with glibc 2.36, in both arenas.
MET: Mapping[str, str] = {
    "overflow_word": "SIGABRT",
    "overflow_text": "SIGABRT",
    "overflow_fill": "SIGABRT",
    "overflow_then_freed": "SIGABRT",
    "overflow_letters": "SIGSEGV",
    "overflow_nul": "SIGSEGV",
    "overflow_into_free": "SIGABRT",
    "overflow_into_cached": "SIGABRT",
    "overflow_into_top": "SIGABRT",
    "underflow_word": "SIGABRT",
    "footer_bit": "SIGABRT",
    "flip_is_mmapped": "SIGABRT",
    "flip_low": "SIGABRT",
    "flip_of_free": "SIGABRT",
    "uaf_tcache_next": "SIGABRT",
    "uaf_fastbin_fd": "SIGABRT",
    "uaf_unsorted_fd": "SIGABRT",
    "uaf_unsorted_bk": "SIGSEGV",
    "uaf_small_fd": "SIGABRT",
    "uaf_large_fd": "SIGABRT",
    "uaf_large_fd_nextsize": "SIGABRT",
    "tcache_head_misaligned": "SIGABRT",
    "fastbin_head": "SIGABRT",
    "unsorted_head_fd": "SIGABRT",
    "top_pointer_moved": "SIGABRT",
    "mmapped_prev_size": "SIGABRT",
    "mmapped_overflow": "SIGABRT",
}

MET_IN_MAIN = frozenset(("overflow_nul",))
"""In a thread's arena the size word lost its flag as well: free says something else there."""

MATRIX_KINDS = (
    "overflow_byte_zero@main",
    "overflow_text@thread",
    "overflow_then_freed@main",
    "overflow_letters@thread",
    "overflow_same_letter@main",
    "overflow_nul@main",
    "popped_fastbin_twice@main",
    "popped_taken_along@thread",
    "popped_cached_written@main",
    "top_cut_short@main",
    "overflow_into_top@main",
    "overflow_into_cached@thread",
    "underflow_word@main",
    "flip_is_mmapped@thread",
    "flip_middle@main",
    "uaf_tcache_next@main",
    "uaf_fastbin_fd@thread",
    "uaf_unsorted_fd@thread",
    "uaf_large_fd_nextsize@main",
    "double_tcache@thread",
    "invalid_bss@main",
    "tcache_count_absurd@thread",
    "small_head_fd@main",
    "heap_ar_ptr@thread",
    "mmapped_prev_size@main",
)


def wheres(kind: str) -> tuple[str, ...]:
    """The arenas that a kind is made in."""
    if kind in ONLY_MAIN:
        return ("main",)
    return ("thread",) if kind in ONLY_THREAD else ("main", "thread")


def _case(kind: str, where: str, how: str) -> Case:
    more = {"damaged": (), "undamaged": ("sound=1",), "met": ("use=1",)}[how]
    seed = 300 + KINDS.index(kind)
    return Case(
        f"{how}_{kind}@{where}",
        "damage",
        (f"kind={kind}", f"where={where}", *ARGUMENTS, f"seed={seed}", *more),
        environment=ENVIRONMENT | (FILLED if "perturbed" in kind else {}),
        dies_of=MET[kind] if how == "met" else "SIGABRT",
        log_bytes=MATRIX_LOG_BYTES,
        support=SUPPORT,
        # A link that was written over leads, as safe linking decodes it, to no chunk or, now and then, to an aligned address.
        attempts=8 if how == "met" else 1,
    )


def _all_cases() -> Iterator[Case]:
    # M_PERTURB set late: what was freed before is not filled, and not damaged.
    late = _case("uaf_perturbed_unsorted", "main", "undamaged")
    yield replace(
        late, name="undamaged_filled_late@main", arguments=(*late.arguments, "fill_late=92"), environment=ENVIRONMENT
    )
    for kind in KINDS:
        for where in wheres(kind):
            yield _case(kind, where, "damaged")
            yield _case(kind, where, "undamaged")
            if kind in MET and (where == "main" or kind not in MET_IN_MAIN):
                yield _case(kind, where, "met")


EARLY = ("global", "stack", "chunk")
"""What early_free frees before malloc was called. The recorder would allocate first, so there is none."""


def _early_cases() -> Iterator[Case]:
    for what in EARLY:
        case = Case(f"early_free_{what}", "early_free", (f"what={what}",), log_bytes=0, support=())
        yield case
        for target in MATRIX_TARGETS.values():
            yield replace(case, name=f"{target.name}/{case.name}", target=target)


def _matrix_cases() -> Iterator[Case]:
    for target in MATRIX_TARGETS.values():
        for name in MATRIX_KINDS:
            kind, _, where = name.partition("@")
            if kind in NEEDS_FASTBINS and target.release is not None and target.release.name in WITHOUT_FASTBINS:
                continue
            for how in ("damaged", "undamaged"):
                yield replace(_case(kind, where, how), name=f"{target.name}/{how}_{name}", target=target)


WITHOUT_FASTBINS = ("forky", "experimental")
DAMAGE: Mapping[str, Case] = {case.name: case for case in (*_all_cases(), *_early_cases(), *_matrix_cases())}
"""By name; those of the matrix by "TARGET/NAME"."""
