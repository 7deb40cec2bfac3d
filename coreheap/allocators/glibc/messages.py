"""What glibc itself says when it meets a contradiction, and which contradictions malloc makes for a moment itself: data.

Knows: the texts of every release's checks (searched in all sources from 2.12 to 2.44), and the order of stores inside
malloc. Does not know: how a contradiction is found (``integrity``, ``overlay``, ``walk``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from coreheap.allocators.glibc.structures import Generation
from coreheap.evidence import Confidence

RELEASES = tuple(f"2.{number}" for number in range(12, 45))
"""Every release, oldest first; release branches say what their tags say unless a row of theirs stands here."""

FIRST, LAST = RELEASES[0], RELEASES[-1]


@dataclass(frozen=True, slots=True)
class Said:
    """A text and the first and last release in which it stands.

    ``is_later``: not the place itself is noticed, only, if at all, what malloc comes to behind it.
    """

    text: str
    first: str = FIRST
    last: str = LAST
    is_later: bool = False

    def is_said_in(self, release: str) -> bool:
        position = RELEASES.index(release)
        return RELEASES.index(self.first) <= position <= RELEASES.index(self.last)


_UNLINK = (Said("corrupted double-linked list"),)
_NEXTSIZE = (Said("corrupted double-linked list (not small)", "2.21"),)
_UNSORTED = (
    Said("malloc(): unsorted double linked list corrupted", "2.29"),
    Said("malloc(): corrupted unsorted chunks 3", "2.28", "2.28"),
    Said("corrupted double-linked list", last="2.27"),
)
_SMALL = (Said("malloc(): smallbin double linked list corrupted"),)
_TCACHE_UNALIGNED = (Said("malloc(): unaligned tcache chunk detected", "2.32"),)
_FAST_UNALIGNED = (
    Said("malloc(): unaligned fastbin chunk detected", "2.32", "2.42"),
    Said("malloc(): unaligned fastbin chunk detected 2", "2.32", "2.42"),
    Said("malloc(): unaligned fastbin chunk detected 3", "2.32", "2.42"),
    Said("malloc(): memory corruption (fast)", last="2.31"),
    Said("malloc_consolidate(): unaligned fastbin chunk detected", "2.32", "2.42"),
    Said("malloc_consolidate(): invalid chunk size", "2.27", "2.42"),
)
_FAST_INDEX = (Said("malloc(): memory corruption (fast)", last="2.42"),)
_INVALID_NEXT = (Said("free(): invalid next size (normal)"),)
_OF_UNSORTED = (
    Said("malloc(): invalid size (unsorted)", "2.29"),
    Said("malloc(): invalid next size (unsorted)", "2.29"),
    Said("malloc(): mismatching next->prev_size (unsorted)", "2.29"),
    Said("malloc(): memory corruption", last="2.28"),
)
_NOT_PREVIOUS = (Said("double free or corruption (!prev)"),)
_PREV_SIZE_MERGING = (
    Said("corrupted size vs. prev_size while consolidating", "2.29"),
    Said("corrupted size vs. prev_size", "2.26", "2.28"),
)
_PREV_SIZE = (Said("corrupted size vs. prev_size", "2.26"), *_PREV_SIZE_MERGING)
_MUNMAP = (Said("munmap_chunk(): invalid pointer"),)
_TOP_ASSERTION = (Said("assertion failed in sysmalloc"),)


def _later(texts: tuple[Said, ...]) -> tuple[Said, ...]:
    return tuple(replace(said, is_later=True) for said in texts)


_BIN_LINKS = {"unsorted_bin": _UNSORTED, "small_bin": _SMALL, "large_bin": _UNLINK}

MESSAGES: dict[str, dict[str, tuple[Said, ...]]] = {
    # The walk. The place is the state of the chunk, or what is wrong with a size.
    "prev_size_mismatch": {
        "unsorted_bin": (
            Said("malloc(): mismatching next->prev_size (unsorted)", "2.29"),
            *_PREV_SIZE,
        ),
        "small_bin": _PREV_SIZE,
        "large_bin": _PREV_SIZE,
        "": _PREV_SIZE_MERGING,
    },
    "mmapped_flag_inside": {"": _MUNMAP},
    "first_chunk_previous_free": {"": _PREV_SIZE_MERGING},
    "broken_chunk": {
        "too_small": (Said("free(): invalid size"), *_OF_UNSORTED),
        "misaligned": (Said("free(): invalid size", last="2.41"), *_INVALID_NEXT, *_OF_UNSORTED),
        "": (*_INVALID_NEXT, *_OF_UNSORTED),
    },
    "size_leads_into_a_chunk": {"": _INVALID_NEXT},
    "marker_without_fencepost": {"": (Said("assertion failed in heap_trim"),)},
    "free_before_top": {"top_says_so": _TOP_ASSERTION},
    "top_size_mismatch": {
        "too_large": (Said("malloc(): corrupted top size", "2.29"), *_TOP_ASSERTION),
        "": _TOP_ASSERTION,
    },
    "top_not_reached": {"": _TOP_ASSERTION},
    "top_not_at_end_of_brk": {
        "too_large": (Said("malloc(): corrupted top size", "2.29"), *_TOP_ASSERTION),
        "": _TOP_ASSERTION,
    },
    "top_damaged": {
        "too_large": (Said("malloc(): corrupted top size", "2.29"), *_TOP_ASSERTION),
        "": _TOP_ASSERTION,
    },
    # Lists. The place is the kind of list.
    "list_wrong_size": {"fastbin": _FAST_INDEX},
    "list_broken_back_link": _BIN_LINKS,
    "list_broken_forward_link": _BIN_LINKS,
    "list_misaligned": {"tcache": _TCACHE_UNALIGNED, "fastbin": _FAST_UNALIGNED, **_BIN_LINKS},
    "list_not_a_chunk_start": {
        "tcache": _later(_TCACHE_UNALIGNED),
        "fastbin": (*_FAST_INDEX, *_FAST_UNALIGNED),
        **_BIN_LINKS,
    },
    "list_wrong_state": _BIN_LINKS,
    "list_already_listed": {
        "tcache": (Said("free(): too many chunks detected in tcache", "2.33"), *_TCACHE_UNALIGNED),
        "fastbin": _later((Said("double free or corruption (fasttop)", last="2.42"), *_FAST_UNALIGNED)),
        **_BIN_LINKS,
    },
    "list_looks_in_use": {
        "unsorted_bin": (Said("malloc(): invalid next->prev_inuse (unsorted)", "2.29"),),
    },
    "list_looks_free": {"": _PREV_SIZE_MERGING},
    "list_broken_size_ring": {"large_bin": _NEXTSIZE},
    "list_stray_size_link": {"large_bin": _NEXTSIZE},
    "bin_head_damaged": {
        "unsorted_bin": (Said("free(): corrupted unsorted chunks"),),
        "small_bin": (
            Said("free(): chunks in smallbin corrupted", "2.41"),
            Said("malloc(): smallbin double linked list corrupted", last="2.40"),
        ),
        "large_bin": (Said("malloc(): largebin double linked list corrupted (bk)", "2.30"),),
    },
    "free_unlisted": {"": _NOT_PREVIOUS},
    # malloc's own structures.
    "sub_heap_header_damaged": {"": (Said("assertion failed in heap_trim"),)},
    "fencepost_damaged": {"": (Said("assertion failed in heap_trim"),)},
    "mmapped_header_damaged": {
        "": (
            *_MUNMAP,
            Said("double free or corruption (out)"),
            Said("free(): invalid pointer"),
            Said("free(): invalid size"),
        )
    },
    "system_mem_damaged": {"too_small": (Said("malloc(): corrupted top size", "2.29"), *_INVALID_NEXT)},
}
"""By code and place; the place "" stands for all that have no row of their own. A code without a row: no release checks it."""


def messages_for(code: str, place: str, generation: Generation, release: str | None) -> tuple[Said, ...]:
    """What glibc may say when it meets an anomaly, in this order; nothing where it would not notice.

    ``place`` is the kind of list or the state of the chunk, see MESSAGES. ``release`` is such as 2.36, None where the core
    does not tell: then the generation's releases are asked, newest first.
    """
    places = MESSAGES.get(code, {})
    texts = places.get(place, places.get("", ()))
    for candidate in releases_of(generation, release):
        said = tuple(said for said in texts if said.is_said_in(candidate))
        if said:
            return said
    return ()


def releases_of(generation: Generation, release: str | None) -> tuple[str, ...]:
    """The release, or the generation's where the core does not tell it, newest first."""
    own = tuple(dict.fromkeys(name.partition("-")[0] for name in reversed(generation.releases)))
    return (release,) if release in own else own


class Moment(Enum):
    """When malloc itself leaves a contradiction in the heap for a moment."""

    NEVER = "never"
    BETWEEN_STORES = "between_stores"
    """Between two stores of one step: not where glibc has stopped itself, which it does between steps."""
    BETWEEN_STEPS = "between_steps"
    """Between two steps of one operation, where glibc checks and may stop itself as well."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How sure a contradiction is damage in a heap at rest, and when malloc makes it itself."""

    confidence: Confidence
    moment: Moment


RULES: dict[str, Rule] = {
    # free writes prev_size and size of a joined chunk last; splitting writes the remainder's header behind the other's.
    "prev_size_mismatch": Rule(Confidence.CERTAIN, Moment.BETWEEN_STEPS),
    "mmapped_flag_inside": Rule(Confidence.CERTAIN, Moment.NEVER),
    "arena_flag_mismatch": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "first_chunk_previous_free": Rule(Confidence.CERTAIN, Moment.NEVER),
    "adjacent_free": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "free_before_top": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "top_size_mismatch": Rule(Confidence.CERTAIN, Moment.BETWEEN_STEPS),
    "marker_without_fencepost": Rule(Confidence.CERTAIN, Moment.BETWEEN_STEPS),
    "broken_chunk": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "size_leads_into_a_chunk": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "top_not_reached": Rule(Confidence.CERTAIN, Moment.BETWEEN_STEPS),
    "top_not_at_end_of_brk": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "top_damaged": Rule(Confidence.CERTAIN, Moment.BETWEEN_STEPS),
    "more_than_system_mem": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "sub_heap_header_damaged": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "fencepost_damaged": Rule(Confidence.CERTAIN, Moment.BETWEEN_STEPS),
    "sub_heap_not_linked": Rule(Confidence.PLAUSIBLE, Moment.BETWEEN_STEPS),
    # Taking a chunk out of a list and putting one in are four stores; nothing is checked between them.
    "list_wrong_size": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "list_broken_back_link": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "list_broken_forward_link": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "list_count_mismatch": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "list_misaligned": Rule(Confidence.CERTAIN, Moment.NEVER),
    "list_not_a_chunk_start": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "list_wrong_state": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "list_already_listed": Rule(Confidence.CERTAIN, Moment.NEVER),
    "list_looks_in_use": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "list_looks_free": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "list_not_sorted": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "list_broken_size_ring": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    "list_stray_size_link": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "list_wrong_key": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "bin_head_damaged": Rule(Confidence.CERTAIN, Moment.BETWEEN_STORES),
    # A merged neighbour has left its list before the joined chunk is put on one, and unlinking may stop between.
    "free_unlisted": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "binmap_bit_missing": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "last_remainder_damaged": Rule(Confidence.PLAUSIBLE, Moment.BETWEEN_STEPS),
    "system_mem_damaged": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "malloc_state_damaged": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "arena_ring_damaged": Rule(Confidence.STRONG, Moment.NEVER),
    "heap_info_damaged": Rule(Confidence.STRONG, Moment.BETWEEN_STEPS),
    "malloc_par_damaged": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    # sysmalloc_mmap counts a chunk after its header is written, munmap_chunk before it is unmapped.
    "mmapped_header_damaged": Rule(Confidence.STRONG, Moment.NEVER),
    "mmapped_count_mismatch": Rule(Confidence.PLAUSIBLE, Moment.BETWEEN_STEPS),
    "tcache_count_too_high": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "tcache_entry_without_count": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "fastbin_content_changed": Rule(Confidence.STRONG, Moment.BETWEEN_STORES),
    "bin_content_changed": Rule(Confidence.PLAUSIBLE, Moment.BETWEEN_STEPS),
}

UNKNOWN_RULE = Rule(Confidence.PLAUSIBLE, Moment.BETWEEN_STEPS)
"""For a code without a row."""
