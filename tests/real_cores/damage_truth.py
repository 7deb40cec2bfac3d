"""What a report has to say of each kind of damage, and the account that the damaging program gave of itself.

Data and values. Knows the kinds of fixtures/programs/damage and the words of coreheap's findings. Does not know how a report is
held against them: test_damage_kinds.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from coreheap.damage import DamageKind
from coreheap.report import Severity
from tests.real_cores.truth import Truth

OVERFLOW, HEADER, FREE_LIST, ALLOCATOR_DATA, MMAPPED, INVALID_FREE, DOUBLE_FREE, USE_AFTER_FREE, LOCKED = (
    "CORRUPTION-OVERFLOW",
    "CORRUPTION-HEADER",
    "CORRUPTION-FREE-LIST",
    "CORRUPTION-ALLOCATOR-DATA",
    "CORRUPTION-MMAPPED",
    "CORRUPTION-INVALID-FREE",
    "DOUBLE-FREE",
    "USE-AFTER-FREE",
    "ALLOCATOR-LOCKED",
)
CORRUPTION = frozenset(
    (OVERFLOW, HEADER, FREE_LIST, ALLOCATOR_DATA, MMAPPED, INVALID_FREE, DOUBLE_FREE, USE_AFTER_FREE, LOCKED)
)
"""The findings that only a damaged heap has; ALLOCATOR-LOCKED only one that a thread was inside of."""

ERROR = frozenset((Severity.ERROR,))
WARNING = frozenset((Severity.WARNING,))
GRAVE = frozenset((Severity.ERROR, Severity.WARNING))


@dataclass(frozen=True, slots=True)
class Expected:
    """What is true of one kind of damage, and what else may be said of it because the bytes would be the same.

    ``codes`` and ``kinds``: the true one first. The others are what the core cannot tell from it; then confidence must be
    plausible at the most. ``names_culprit``: whether the bytes or lists tell who did it. ``severities`` where malloc's next
    operation, as the program tried it, says nothing; where it dies of the damage, that is an error. ``cuts``: so many
    free blocks may lie behind a broken link, on no list any more. ``moves_figures``: the damaged words are what malloc_info adds up.
    """

    codes: tuple[str, ...]
    kinds: tuple[DamageKind, ...]
    names_culprit: bool = True
    severities: frozenset[Severity] = ERROR
    cuts: int = 0
    moves_figures: bool = False
    may_be_elsewhere: bool = False
    """Two of malloc's words contradict each other, and nothing tells which is wrong: the other may be said to be, in doubt."""


_O, _U, _F, _D, _I, _B, _W = (
    DamageKind.OVERFLOW,
    DamageKind.UNDERFLOW,
    DamageKind.USE_AFTER_FREE,
    DamageKind.DOUBLE_FREE,
    DamageKind.INVALID_FREE,
    DamageKind.BIT_FLIP,
    DamageKind.OVERWRITE,
)

_overflow = Expected((OVERFLOW,), (_O,))
# One word in place of the size: the block before may have been written past, the block itself before its start.
_word = Expected((OVERFLOW, HEADER), (_O, _U, _W))
_word_before = Expected((HEADER, OVERFLOW), (_U, _O, _W))
_flip = Expected((HEADER,), (_B,), names_culprit=False)
_footer = Expected((HEADER, USE_AFTER_FREE), (_W, _U, _F), names_culprit=False)
_freed = Expected((USE_AFTER_FREE,), (_F,))
_freed_cached = Expected((USE_AFTER_FREE,), (_F,), cuts=1)
_freed_quietly = Expected((USE_AFTER_FREE,), (_F,), severities=WARNING)
# A list in a circle is also what freeing a block twice leaves.
_circle = Expected((USE_AFTER_FREE, DOUBLE_FREE, FREE_LIST), (_F, _D, _W))
_twice = Expected((DOUBLE_FREE,), (_D,))
_never_given = Expected((INVALID_FREE,), (_I,), names_culprit=False)
# Both codes are true of heads and counts, which are of malloc's structures and of lists.
_list_data = Expected((ALLOCATOR_DATA, FREE_LIST), (_W, _B), names_culprit=False)
_cut_at_head = Expected((ALLOCATOR_DATA, FREE_LIST), (_W, _B), names_culprit=False, cuts=4)
_state = Expected((ALLOCATOR_DATA,), (_W, _B), names_culprit=False, moves_figures=True)
_quiet_state = Expected((ALLOCATOR_DATA,), (_W, _B), names_culprit=False, severities=WARNING, moves_figures=True)
_mmapped = Expected((MMAPPED,), (_W, _U), names_culprit=False)
_mmapped_flip = Expected((MMAPPED,), (_B,), names_culprit=False)

EXPECTED: Mapping[str, Expected] = {
    "overflow_byte_zero": _overflow,
    "overflow_byte": _overflow,
    "overflow_flag_zero": Expected((OVERFLOW, HEADER), (_O, _B)),
    "overflow_word": _word,
    "overflow_text": _overflow,
    "overflow_string": _overflow,
    "overflow_fill": _overflow,
    "overflow_zeros": Expected((OVERFLOW, HEADER), (_O, _U, _W)),
    "overflow_integers": _overflow,
    "overflow_pointer": _word,
    "overflow_far": _overflow,
    "overflow_then_freed": _overflow,
    "overflow_fill_then_freed": _overflow,
    "overflow_letters": _overflow,
    "overflow_same_letter": _overflow,
    "overflow_nul": _overflow,
    "overflow_into_free": _overflow,
    "overflow_into_cached": Expected((OVERFLOW,), (_O,), cuts=1),
    "overflow_into_fast": Expected((OVERFLOW,), (_O,), cuts=1, moves_figures=True),
    "overflow_into_top": Expected((OVERFLOW, HEADER), (_O, _W), moves_figures=True),
    "overflow_text_into_top": Expected((OVERFLOW,), (_O,), moves_figures=True),
    "overflow_into_fencepost": Expected((OVERFLOW,), (_O,), severities=GRAVE),
    "underflow_word": _word_before,
    "underflow_two_words": _word_before,
    "footer_number": _footer,
    "footer_bit": Expected((HEADER, USE_AFTER_FREE), (_B, _F, _W, _U), names_culprit=False),
    "flip_prev_inuse": _flip,
    "flip_prev_inuse_behind_free": _flip,
    "flip_is_mmapped": _flip,
    "flip_non_main_arena": _flip,
    "flip_low": _flip,
    "flip_middle": _flip,
    "flip_high": _flip,
    "flip_of_free": _flip,
    "flip_of_cached": Expected((HEADER,), (_B,), names_culprit=False, severities=GRAVE),
    "flip_in_top": Expected((HEADER,), (_B,), names_culprit=False, moves_figures=True),
    "flip_tops_prev_inuse": _flip,
    "uaf_tcache_next": _freed_cached,
    "uaf_tcache_next_zero": _freed_cached,
    "uaf_tcache_next_elsewhere": Expected((USE_AFTER_FREE, INVALID_FREE), (_F, _I), cuts=1),
    "uaf_tcache_key": _freed_quietly,
    "uaf_tcache_both": _freed_cached,
    "tcache_cycle": _circle,
    "uaf_fastbin_fd": Expected((USE_AFTER_FREE,), (_F,), cuts=1, moves_figures=True),
    "fastbin_cycle": Expected((USE_AFTER_FREE, DOUBLE_FREE, FREE_LIST), (_F, _D, _W), moves_figures=True),
    "uaf_unsorted_fd": _freed,
    "uaf_unsorted_fd_pointer": _freed,
    "uaf_unsorted_bk": _freed,
    "uaf_small_fd": _freed,
    "uaf_small_bk": _freed,
    "uaf_large_fd": _freed,
    "uaf_large_bk": _freed,
    "uaf_large_fd_nextsize": _freed,
    "uaf_large_bk_nextsize": _freed,
    "uaf_perturbed_unsorted": _freed_quietly,
    "uaf_perturbed_byte": _freed_quietly,
    "double_tcache": _twice,
    "double_tcache_between": _twice,
    # The owner has filled it since: as if it had been written to after one free.
    "double_given_again": Expected((DOUBLE_FREE, USE_AFTER_FREE), (_D, _F)),
    "double_fastbin": Expected((DOUBLE_FREE,), (_D,), moves_figures=True),
    "double_tcache_fastbin": Expected((DOUBLE_FREE,), (_D,), moves_figures=True),
    "double_tcache_bin": Expected((DOUBLE_FREE,), (_D,), cuts=15, moves_figures=True),
    "invalid_interior": _never_given,
    "invalid_bss": _never_given,
    "invalid_stack": _never_given,
    "tcache_count": replace(_list_data, severities=GRAVE),
    "tcache_count_absurd": replace(_list_data, severities=GRAVE),
    "tcache_head_misaligned": _cut_at_head,
    "tcache_head_foreign": Expected((ALLOCATOR_DATA, FREE_LIST, INVALID_FREE), (_W, _I), names_culprit=False, cuts=4),
    "tcache_head_zero": replace(_cut_at_head, may_be_elsewhere=True),
    "fastbin_head": Expected((ALLOCATOR_DATA, FREE_LIST), (_W, _B), names_culprit=False, cuts=2, moves_figures=True),
    "unsorted_head_fd": _list_data,
    "unsorted_head_bk": _list_data,
    "small_head_fd": _list_data,
    "empty_head_bk": _list_data,
    "binmap_bit": Expected((ALLOCATOR_DATA, FREE_LIST), (_W, _B), names_culprit=False, severities=WARNING),
    "top_pointer_moved": _state,
    "top_pointer_rubbish": _state,
    "system_mem": _state,
    "arena_next": _state,
    "last_remainder": _quiet_state,
    "heap_ar_ptr": _state,
    "heap_prev": _state,
    "heap_size": Expected((ALLOCATOR_DATA,), (_W, _B), names_culprit=False, severities=GRAVE, moves_figures=True),
    "mmapped_size": _mmapped,
    "mmapped_size_bit": _mmapped_flip,
    "mmapped_flag": _mmapped_flip,
    "mmapped_prev_size": _mmapped,
    "mmapped_overflow": Expected((MMAPPED, OVERFLOW), (_O,)),
    # Its link is the list's head now, or gone; who has the block by now wrote what its owner may write.
    "popped_fastbin_twice": Expected(
        (DOUBLE_FREE, USE_AFTER_FREE), (_D, _F), cuts=12, moves_figures=True, may_be_elsewhere=True
    ),
    "popped_taken_along": Expected((USE_AFTER_FREE,), (_F,), cuts=12, moves_figures=True, may_be_elsewhere=True),
    "popped_cached_written": Expected((USE_AFTER_FREE,), (_F,), cuts=2, may_be_elsewhere=True),
    "top_cut_short": Expected((HEADER, OVERFLOW), (_W, _O), names_culprit=False, moves_figures=True),
    "mp_n_mmaps": _quiet_state,
    "mp_n_mmaps_absurd": _quiet_state,
    "mp_mmap_threshold": _quiet_state,
}
"""By kind."""
EXPECTED_MET: Mapping[str, Expected] = {
    **EXPECTED,
    # malloc has taken the written block off the list: its bad link is the list's head now, and nothing says whose it was.
    "uaf_tcache_next": Expected((USE_AFTER_FREE, FREE_LIST, ALLOCATOR_DATA), (_F, _W), cuts=1, may_be_elsewhere=True),
}
"""By kind, where malloc met the damage."""


@dataclass(frozen=True, slots=True)
class Account:
    """What the program noted of its damage.

    ``start`` and ``end`` hold the bytes of malloc's own that differ, first and last exactly; None where malloc itself wrote
    (frees that should not have been). ``culprit`` None: none. ``signal`` and ``said`` are what malloc's next operation died of
    and said in a child of the program; 0 and "" where it noticed nothing. ``one_bit``: no more than that differs.
    """

    start: int | None
    end: int | None
    victims: tuple[int, ...]
    culprit: int | None
    signal: int
    said: str
    arena_address: int
    one_bit: bool


def account_of(truth: Truth) -> Account:
    """The account in a truth's notes."""
    changed = [truth.note_numbers("changed")[i : i + 2] for i in range(0, len(truth.note_numbers("changed")), 2)]
    start = min((address for address, _ in changed), default=None)
    end = max((address + length for address, length in changed), default=None)
    (foreign_from,) = truth.note_numbers("foreign_from") or [0]
    if foreign_from and start is not None:
        start = max(start, first_changed(truth, foreign_from))
    (culprit,) = truth.note_numbers("culprit")
    said = truth.note("use_says").split("|")[0]
    return Account(
        start,
        end,
        tuple(truth.note_numbers("victim")),
        culprit or None,
        int(truth.note("use_signal")),
        "" if said.startswith("qemu: ") else said,
        int(truth.note("arena"), 0),
        changed_bits(truth) == 1,
    )


def changed_bits(truth: Truth) -> int:
    """How many bits differ."""
    pairs = zip(truth.notes.get("before", ()), truth.notes.get("after", ()), strict=True)
    return sum((int(before.split()[1], 16) ^ int(after.split()[1], 16)).bit_count() for before, after in pairs)


def first_changed(truth: Truth, limit: int) -> int:
    """The first address from ``limit`` on whose byte differs."""
    for before, after in zip(truth.notes["before"], truth.notes["after"], strict=True):
        address = int(before.split()[0], 16)
        pairs = zip(bytes.fromhex(before.split()[1]), bytes.fromhex(after.split()[1]), strict=True)
        for offset, (old, new) in enumerate(pairs):
            if address + offset >= limit and old != new:
                return address + offset
    raise ValueError(f"no byte differs from {limit:#x} on")
