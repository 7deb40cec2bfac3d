"""The sentences: what a verdict item and a finding say to people.

Knows: one sentence for each topic and each finding code, from its quantities alone. A code or topic that is not
known here, or one whose quantities are other than expected, gets a plain generic sentence instead of an error.
Does not know: terminals; the sentences serve every rendering. Text out of the core is made printable here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from coreheap.evidence import Anomaly, Gap
from coreheap.quantities import format_address, format_bytes, format_count, format_share
from coreheap.render.discretion import place_of, without_content
from coreheap.render.escaping import printable, shortened
from coreheap.report import Finding, Quantity, Severity, Unit, VerdictItem

LONGEST_TEXT = 160
"""Characters of one text from the core that are shown."""


def humanized(word: str) -> str:
    """A lower snake case word as people write it."""
    return printable(word).replace("_", " ")


def bytes_or_unknown(byte_count: int | None) -> str:
    """A byte count for people; a question mark where it is unknown."""
    return "?" if byte_count is None else format_bytes(byte_count)


def address_or_unknown(address: int | None) -> str:
    """An address; a question mark where it is unknown."""
    return "?" if address is None else format_address(address)


def share_text(share: float) -> str:
    """A share between 0 and 1 in per cent; what is not quite all never reads as all."""
    whole = 10**12
    part = round(share * whole)
    if 0 < share < 1:
        part = min(max(part, 1), whole - 1)
    return format_share(part, whole)


def quantity_label(quantity: Quantity) -> str:
    """A quantity's name for people; its value says that it is bytes."""
    name = quantity.name.removesuffix("_bytes") if quantity.unit is Unit.BYTES else quantity.name
    return humanized(name)


def quantity_text(quantity: Quantity) -> str:
    """A quantity with its unit; ``unknown`` where there is no value."""
    value = quantity.value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "unknown"
    if isinstance(value, str):
        return shortened(value, LONGEST_TEXT)
    if quantity.unit is Unit.SHARE:
        return share_text(value)
    if isinstance(value, float):
        return f"{value:g}"
    if quantity.unit is Unit.BYTES:
        return format_bytes(value)
    if quantity.unit is Unit.ADDRESS:
        return format_address(value)
    return format_count(value)


_VERDICTS = {
    "in_use": "live chunks: asked for and not freed",
    "retained_free": "free inside malloc: freed, kept by malloc",
    "arena_bloat": "free inside malloc, in arenas beside the main one",
    "mmapped_chunks": "large live blocks, each in a mapping of its own",
    "foreign_sbrk": "taken from the break (sbrk) beside malloc",
    "not_malloc": "other anonymous memory, not glibc malloc's",
    "other_allocator": "outside glibc's heap: the other allocator's place",
    "java": "the Java VM's: heap, code, classes, its collector's tables",
    "thread_stacks": "thread stacks",
    "unjoined_threads": "stacks of ended threads that nobody joined",
    "module_data": "variables of the program and its libraries",
    "written_files": "mapped files that the core holds: written pages are copies",
    "shared_memory": "shared memory: memfd, shm, System V, anonymous",
    "lost": "lost: nothing in the process points to them",
    "possibly_lost": "possibly lost: only loose ends lead to them",
    "unknown": "unknown: missing from the core, or damaged",
}

_WHOLES = {
    "writable_private": "writable private memory",
    "malloc": "memory that malloc holds",
    "live_chunks": "live chunks",
    "writable_shared": "writable memory that other processes may share",
}


def verdict_whole(item: VerdictItem) -> str:
    """What an item is a part of: a line above all items of one whole."""
    return f"Of {format_bytes(item.of_bytes)} of {_WHOLES.get(item.whole, humanized(item.whole))}:"


def verdict_text(item: VerdictItem) -> str:
    """What an item's bytes are."""
    return _VERDICTS.get(item.topic, humanized(item.topic))


PLACES = {
    "chunk_header": "the header of a chunk",
    "prev_size": "the prev_size of a chunk",
    "top": "the size of top, the free end of the arena",
    "tcache_link": "the links of a block in a tcache",
    "fastbin_link": "the link of a chunk in a fastbin",
    "bin_link": "the links of a chunk in a bin",
    "free_content": "the content of a free block",
    "tcache_structure": "a thread's tcache structure",
    "malloc_state": "the arena's own structure (malloc_state)",
    "heap_info": "the header of a sub-heap (heap_info)",
    "malloc_par": "malloc's parameters (mp_)",
    "mmapped_header": "the header of an mmapped chunk",
    "free_list": "a list of free chunks",
}
"""Which of malloc's data a damage is in, by the words that ``damage.DamagedPlace`` and findings use."""


class _Shown:
    """A finding's quantities as texts by name; a missing one raises KeyError, and the generic sentence takes over."""

    def __init__(self, finding: Finding) -> None:
        self._by_name = {quantity.name: quantity for quantity in finding.quantities}

    def __getitem__(self, name: str) -> str:
        return quantity_text(self._by_name[name])

    def has(self, name: str) -> bool:
        """Whether the finding has a quantity of that name that is known and not 0."""
        return name in self._by_name and bool(self._by_name[name].value)

    def raw(self, name: str) -> object:
        """The quantity as it is; None where it is missing."""
        return self._by_name[name].value if name in self._by_name else None

    def is_about(self, place: str) -> bool:
        """Whether the finding is about a call of free (``call``) or the use of an object (``use``), not about malloc's data."""
        return self.raw("place") == place

    def if_known(self, before: str, name: str, behind: str = "") -> str:
        """The quantity between two texts; nothing at all where it is missing, unknown or 0."""
        return f"{before}{self[name]}{behind}" if self.has(name) else ""

    def place(self, otherwise: str) -> str:
        """Which of malloc's data is meant."""
        word = self._by_name["place"].value if self.has("place") else None
        return PLACES.get(word, humanized(word)) if isinstance(word, str) else otherwise


def _arena_bloat(shown: _Shown) -> str:
    return (
        f"{shown['arenas']} arenas beside the main one reserve {shown['reserved_bytes']} of address space and took "
        f"{shown['committed_bytes']} of it, of which {shown['in_use_bytes']} is in use and {shown['free_bytes']} free."
    )


def _retained_free(shown: _Shown) -> str:
    return (
        f"{shown['free_bytes']} ({shown['free_share']}) of what malloc's arenas hold is free: the program gave it "
        "back to malloc, malloc did not give it back to the system."
    )


def _pinned_heap(shown: _Shown) -> str:
    return (
        f"Few live chunks ({shown['pin_count']}, {shown['pin_bytes']}) at the ends of heaps ({shown['heaps']}) keep"
        f" {shown['pinned_bytes']} of whole free pages from going back by themselves."
    )


def _fragmentation(shown: _Shown) -> str:
    return (
        f"{shown['shared_page_bytes']} ({shown['shared_page_share']}) of {shown['free_bytes']} free memory share their pages"
        " with live chunks: nothing but freeing these can give it back."
    )


def _tcache_hoard(shown: _Shown) -> str:
    return (
        f"{shown['tcache_bytes']} ({shown['tcache_share']}) of what malloc's arenas hold are {shown['blocks']} freed blocks that"
        f" {shown['caches']} threads keep in their tcaches."
    )


def _threshold_ratchet(shown: _Shown) -> str:
    return (
        f"malloc raised its mmap_threshold from {shown['default_mmap_threshold']} to {shown['mmap_threshold']} by itself: "
        f"large blocks come from its heaps now, and {shown['kept_bytes']} ({shown['kept_share']}) of what these hold is "
        "free and stays."
    )


def _stack_memory(shown: _Shown) -> str:
    return (
        f"{shown['resident_bytes']} ({shown['resident_share']}) of writable memory are stacks of {shown['threads']} threads, "
        f"{shown['reserved_bytes']} of address space; the deepest, of thread {shown['deepest_thread']}, uses "
        f"{shown['deepest_used_bytes']}."
    )


def _unjoined_threads(shown: _Shown) -> str:
    return (
        f"{shown['threads']} threads{shown.if_known(' that began in ', 'start_routine')} have ended and nobody joined or detached"
        f" them: their stacks keep {shown['stack_bytes']} of address space"
        f"{shown.if_known(', of which ', 'resident_bytes', ' were in memory')}."
    )


def _partial_core(shown: _Shown) -> str:
    return (
        f"The file holds {shown['file_coverage']} of what its headers promise, and {shown['heap_bytes_not_attributed']} "
        "of heap could not be walked: the numbers cover what was saved."
    )


def _allocator_abort(shown: _Shown) -> str:
    return f"glibc itself stopped the process: {shown['message']}"


def _overflow(shown: _Shown) -> str:
    foreign = (
        f"{shown['byte_count']} behind it are foreign" if shown.has("byte_count") else "what is behind it is foreign"
    )
    return (
        f"A block{shown.if_known(' at ', 'culprit_address')}{shown.if_known(', held by ', 'culprit_holder', ',')} was written past its end, over "
        f"{shown.place('the header of the next chunk')}: {foreign}{shown.if_known(', from ', 'address', ' on')}."
    )


def _corruption_header(shown: _Shown) -> str:
    return (
        f"{_capital(shown.place('the header of a chunk'))}{shown.if_known(' at ', 'victim_address')} is damaged"
        f"{shown.if_known(': the wrong bytes begin at ', 'address')}{_lost(shown)}."
    )


def _corruption_free_list(shown: _Shown) -> str:
    return (
        f"{_capital(shown.place('a list of free chunks'))} is damaged{shown.if_known(' at ', 'address')}: the next malloc or "
        "free that uses the list takes a wrong block, or stops the process."
    )


def _corruption_allocator_data(shown: _Shown) -> str:
    return (
        f"{_capital(shown.place('data of malloc itself'))}{shown.if_known(' at ', 'address')} holds what malloc never "
        f"writes there{_lost(shown)}."
    )


def _corruption_mmapped(shown: _Shown) -> str:
    return (
        f"The header of the mmapped block{shown.if_known(' at ', 'victim_address')} is damaged: free or realloc of it would "
        "stop the process or unmap other memory."
    )


def _invalid_free(shown: _Shown) -> str:
    if shown.is_about("call"):
        return _refused(shown, f"was given{shown.if_known(' ', 'address', ',')} {_what_was_given(shown)}")
    return (
        f"A list of free chunks holds{shown.if_known(' ', 'address', ',')} what malloc never gave out: free was called with a "
        "wrong pointer, or the list's link was overwritten."
    )


def _refused(shown: _Shown, what: str) -> str:
    """What was wrong with a call that glibc refused, and who made it."""
    caller = shown.if_known(", called from ", "caller")
    said = shown.if_known('; glibc says "', "message", '"')
    return f"{shown['function']} {what}{caller}{said}."


def _what_was_given(shown: _Shown) -> str:
    """What a pointer is that free should not have been given."""
    kind = shown.raw("kind")
    block = f"block{shown.if_known(' ', 'victim_address')}{shown.if_known(' of ', 'victim_usable_bytes')}"
    if kind == "inside_live_block":
        return f"a place {shown['offset_bytes']} into the live {block}"
    if kind == "inside_freed_block":
        return f"a place {shown['offset_bytes']} into the free {block}"
    if kind == "not_mapped":
        return "where nothing is mapped: freed before, or never a block"
    return f"which malloc never gave out{shown.if_known(': ', 'what')}"


def _double_free(shown: _Shown) -> str:
    if shown.is_about("call"):
        listed = shown.if_known(", which is free already (", "listed_in", f"{shown.if_known(' of thread ', 'thread')})")
        what = f"was called again for the block{_victim(shown)}{shown.if_known(', ', 'victim_usable_bytes')}{listed}"
        if not shown.has("victim_address"):
            what = (
                f"was called again for a block that is free already; which one is not known{listed.partition(',')[0]}"
            )
        return _refused(shown, what)
    return (
        f"The block{_victim(shown)} is free twice: two later calls of malloc would both be given it, and two owners "
        "would write over each other."
    )


def _use_after_free(shown: _Shown) -> str:
    if shown.is_about("use"):
        return _stale_use(shown)
    return (
        f"The free block{_victim(shown)} was written to after it was freed: {shown.place('its content')} changed"
        f"{shown.if_known(' at ', 'address')}."
    )


def _stale_use(shown: _Shown) -> str:
    block = f"block{_victim(shown)}{shown.if_known(' of ', 'victim_usable_bytes')}"
    used = _USES.get(str(shown.raw("kind")), "a pointer")
    if shown.raw("given_again") == "true":
        return (
            f"The program used {used} of an object in the {block}, which holds something else: it was probably freed and given"
            f" out again{shown.if_known('; ', 'holder', ' still leads to it')}."
        )
    return f"The program used {used} of an object in the {block}, which is free{shown.if_known('; ', 'holder', ' still leads to it')}."


_USES = {
    "virtual_table": "the table of virtual functions",
    "function_pointer": "a function pointer",
    "pointer": "a pointer",
}


def _allocator_locked(shown: _Shown) -> str:
    count = shown["locked_arenas"] if shown.has("locked_arenas") else ""
    which = f"{count} arena{'' if count == '1' else 's'}" if count.isdigit() else "an arena"
    return f"A thread was inside malloc with {which} locked: what looks damaged there may be what malloc leaves for a moment."


def _victim(shown: _Shown) -> str:
    for name in ("victim_address", "culprit_address", "address"):
        if shown.has(name):
            return f" at {shown[name]}"
    return ""


def _lost(shown: _Shown) -> str:
    return shown.if_known("; ", "lost_bytes", " of heap could not be given to any chunk")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _other_allocator(shown: _Shown) -> str:
    name = shown["allocator"]
    if shown["glibc_heap_nearly_empty"] == "true":
        if shown.has("allocator_bytes"):
            return (
                f"{shown['allocator_bytes']} are {name}'s and glibc's heap is nearly empty ({shown['glibc_in_use_bytes']} in "
                f"use): look for the memory in {name}, not here."
            )
        return (
            f"{name} is loaded and glibc's heap is nearly empty ({shown['glibc_in_use_bytes']} in use): "
            f"look for the memory in {name}, not here."
        )
    if shown.has("allocator_bytes"):
        return (
            f"{name} has {shown['allocator_bytes']} of its own beside glibc's heap; its blocks are not in these tables."
        )
    return f"{name} is loaded beside a glibc heap that is in use; its blocks are not in these tables."


def _leak(shown: _Shown) -> str:
    return (
        f"{shown['lost_bytes']} ({shown['lost_share']}) of the live chunks can no longer be freed: nothing points to "
        f"{shown['definite_count']} of them, and only these lead to {shown['indirect_count']} more."
    )


def _possible_leak(shown: _Shown) -> str:
    part = f"{shown['possible_bytes']} ({shown['possible_share']}) of the live chunks may be lost"
    if shown["unreachable_bytes"] == "0 B":
        if shown.has("encoded_bytes"):
            return f"{part}: their addresses are kept in another form, or only pointers to their inside lead to them."
        return f"{part}: only pointers to their inside lead to them."
    return f"{part}: nothing in this core leads to {shown['unreachable_bytes']} of it, but not all is in this core."


def _accumulation(shown: _Shown) -> str:
    where = shown["root"] if shown.has("root") else "the roots"
    if shown.has("holder_address"):
        many = shown.has("holder_count") and shown["holder_count"] != "1"
        where = f"{shown['holder_count']} like chunks" if many else f"the chunk at {shown['holder_address']}"
        where += f" ({shown['root']})" if shown.has("root") else ""
    return (
        f"{shown['children']} like chunks hang below {where}; they keep {shown['child_retained_bytes']},"
        f" {shown['reachable_share']} of all that anything leads to (an estimate)."
    )


_FINDINGS: dict[str, Callable[[_Shown], str]] = {
    "ARENA-BLOAT": _arena_bloat,
    "RETAINED-FREE": _retained_free,
    "PINNED-HEAP": _pinned_heap,
    "FRAGMENTATION": _fragmentation,
    "TCACHE-HOARD": _tcache_hoard,
    "THRESHOLD-RATCHET": _threshold_ratchet,
    "STACK-MEMORY": _stack_memory,
    "UNJOINED-THREADS": _unjoined_threads,
    "PARTIAL-CORE": _partial_core,
    "ALLOCATOR-ABORT": _allocator_abort,
    "OTHER-ALLOCATOR": _other_allocator,
    "LEAK": _leak,
    "POSSIBLE-LEAK": _possible_leak,
    "ACCUMULATION": _accumulation,
    "CORRUPTION-OVERFLOW": _overflow,
    "CORRUPTION-HEADER": _corruption_header,
    "CORRUPTION-FREE-LIST": _corruption_free_list,
    "CORRUPTION-ALLOCATOR-DATA": _corruption_allocator_data,
    "CORRUPTION-MMAPPED": _corruption_mmapped,
    "CORRUPTION-INVALID-FREE": _invalid_free,
    "DOUBLE-FREE": _double_free,
    "USE-AFTER-FREE": _use_after_free,
    "ALLOCATOR-LOCKED": _allocator_locked,
}

_SEVERITY_WORDS = {Severity.INFO: "Noted", Severity.WARNING: "Look at", Severity.ERROR: "Serious"}


def finding_sentence(finding: Finding) -> str:
    """What a finding says, in one sentence."""
    maker = _FINDINGS.get(finding.code)
    if maker is not None:
        try:
            return maker(_Shown(finding))
        except KeyError:
            pass  # The check names its quantities otherwise: the generic sentence still says what it is about.
    return f"{_SEVERITY_WORDS[finding.severity]}: {shortened(finding.subject, LONGEST_TEXT)}."


def gap_sentence(gap: Gap) -> str:
    """What cannot be known, and what follows."""
    place = "" if gap.range is None else f" at {gap.range} ({format_bytes(gap.range.byte_count)})"
    return f"{humanized(gap.cause)}{place}: {shortened(gap.consequence, 2 * LONGEST_TEXT)}"


def anomaly_sentence(anomaly: Anomaly) -> str:
    """Where the heap's own data contradicts itself."""
    arena = "" if anomaly.arena is None else f" (arena {anomaly.arena})"
    return (
        f"{humanized(anomaly.code)} at {format_address(place_of(anomaly))}{arena}: "
        f"expected {shortened(without_content(anomaly.expected), LONGEST_TEXT)}, found {shortened(without_content(anomaly.observed), LONGEST_TEXT)}"
    )
