"""The pointer that free or realloc was given wrongly, where glibc noticed or the call failed at once.

Knows: where such a pointer is left: in the registers of malloc's frames and of their caller, in the caller's code, on the stack; and how
sure each of these makes it. Does not know: what glibc tests (``refusals``), or what lies at an address (``places``).

A message says which test failed, so few addresses can be meant; but blocks that were freed rightly a moment before meet some of the
tests as well. So a word that merely stands near never makes more than plausible, and more than one candidate lowers each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from coreheap.corefile import Core
from coreheap.corefile.register_history import first_argument
from coreheap.corefile.unwinding import ModuleMap
from coreheap.crash import AbortKind, AbortMessage, FaultKind, PlaceNote, WrongFree, WrongFreeKind
from coreheap.crashes.abort_message import plain_message
from coreheap.crashes.backtrace import Backtrace, frames_of_malloc
from coreheap.crashes.places import Places, is_canonical
from coreheap.crashes.refusals import REFUSALS, Refusal, Refusals
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.heap import ChunkState, HeapSnapshot

STACK_WORDS = 160
"""Words above the stack pointer that are looked at where frames are not known: free's frame was at most 126 words above (2.12-2.44)."""
OTHERS_TOLD = 8
OF_MALLOC = 3
"""The rank from which on malloc's own frames say it, see ``_Sightings.rank``."""
MAPPED_BLOCK_OFFSET = 16
"""Where a block of its own mapping begins in its first page, but for aligned ones: behind a header of two words, 16-aligned."""
_EXECUTE, _READ = 1, 4
_FAULTING = frozenset(("free", "cfree", "realloc", "__libc_free", "__libc_realloc", "__free", "__realloc"))


@dataclass(slots=True)
class _Sightings:
    """Where a candidate was seen: by the caller's code or glibc's message (``is_told``); in registers that malloc itself set, or that
    it left as its caller had them, as the pointer or as its header's address; in words of the stack."""

    is_told: str | None = None
    set_by_malloc: bool = False
    as_block: bool = False
    as_header: bool = False
    by_caller: bool = False
    on_stack: bool = False
    on_stack_as_header: bool = False
    registers: list[str] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """The surest sighting: 5 the caller's code, 4 registers hold pointer and header, 3 malloc's register, 2 the caller's, 1 the
        stack holds both, 0 the stack."""
        if self.is_told:
            return 5
        if self.set_by_malloc:
            return 4 if self.as_block and self.as_header else 3
        return 2 if self.by_caller else int(self.on_stack and self.on_stack_as_header)


@dataclass(frozen=True, slots=True)
class _Words:
    """What may be the pointer or its header: registers that malloc set, registers of its caller, words of the stack between."""

    of_malloc: tuple[tuple[str, int], ...]
    of_caller: tuple[tuple[str, int], ...]
    of_stack: tuple[int, ...]
    argument: int | None
    are_frames_known: bool


def find_wrong_free(
    core: Core,
    heap: HeapSnapshot | None,
    places: Places,
    thread: int,
    trace: Backtrace,
    message: AbortMessage | None,
    fault: PlaceNote | None,
) -> WrongFree | None:
    """What was freed wrongly; None where glibc did not say so, or where the pointer is a live block's, which was damaged."""
    if heap is None:
        return None
    malloc = frames_of_malloc(core, trace, is_refusal=message is not None and message.kind is AbortKind.MALLOC)
    if fault is not None:
        return _failed_at_once(core, trace, malloc, fault)
    if message is None or message.kind is not AbortKind.MALLOC:
        return None
    refusal = REFUSALS.get(plain_message(message.text))
    if refusal is None:
        return None
    refusals = Refusals(core, heap, thread)
    finder = _Finder(core, places, refusals, refusal, trace, message.address)
    words = _words(core, trace, malloc)
    caller = malloc[-1] + 1 if malloc and malloc[-1] + 1 < len(trace.frames) else None
    return finder.answer(words, message, caller)


def _failed_at_once(core: Core, trace: Backtrace, malloc: range, fault: PlaceNote) -> WrongFree | None:
    """free or realloc itself could not read the size before what it was given."""
    first, word = trace.frames[0], core.word_bytes
    if not malloc or malloc[0] != 0 or (first.symbol or "").partition(".")[0] not in _FAULTING:
        return None
    holding = [name for name, value in trace.registers[0].items() if value - word == fault.address]
    if not holding or fault.kind in (FaultKind.LIVE_CHUNK, FaultKind.ALLOCATOR_DATA):
        return None
    address = fault.address + word
    in_page = address % core.page_bytes
    function = "realloc" if "realloc" in (first.symbol or "") else "free"
    evidence = [
        Evidence(
            f"{function} failed when it read the size before what {holding[0]} leads to",
            "fault address and registers",
            Strength.SOLID,
            None if fault.kind is FaultKind.NON_CANONICAL else address,
        )
    ]
    if fault.kind is FaultKind.UNMAPPED and in_page == MAPPED_BLOCK_OFFSET:
        like = "its place in the page is that of a large block with a mapping of its own, which free gives back to the system"
        evidence.append(Evidence(like, "address", Strength.HINT, address))
    place = PlaceNote(address, fault.kind, fault.description)
    caller = malloc[-1] + 1 if malloc[-1] + 1 < len(trace.frames) else None
    return WrongFree(
        WrongFreeKind.NOT_MAPPED,
        function,
        address,
        place,
        None,
        None,
        caller,
        None,
        (),
        tuple(evidence),
        confidence_from(evidence),
    )


def _words(core: Core, trace: Backtrace, malloc: range) -> _Words:
    """The words near a refusal: between abort and the function that called malloc, or above the stack pointer."""
    if not malloc or malloc[-1] + 1 >= len(trace.frames) or not trace.frames[malloc[-1] + 1].is_certain:
        pointer = trace.stack_pointers[0]
        return _Words((), (), _stack(core, pointer, pointer + STACK_WORDS * core.word_bytes), None, False)
    caller = malloc[-1] + 1
    names = [frame.symbol for frame in trace.frames[: malloc[0] + 1]]
    # Behind abort comes the message's writer: what it has in registers is its own.
    first = min(max((row for row, name in enumerate(names) if name == "abort"), default=-1) + 2, malloc[-1])
    inherited = set(trace.registers[caller].items())
    own = {
        (name, value): None
        for registers in trace.registers[first:caller]
        for name, value in registers.items()
        if (name, value) not in inherited
    }
    end = trace.stack_pointers[caller + 1] if caller + 1 < len(trace.frames) else trace.stack_pointers[caller]
    argument = first_argument(
        core, trace.frames[caller].program_counter, trace.stack_pointers[caller], trace.registers[caller]
    )
    stack = _stack(core, trace.stack_pointers[first], end)
    return _Words(tuple(own), tuple(trace.registers[caller].items()), stack, argument, True)


def _stack(core: Core, start: int, end: int) -> tuple[int, ...]:
    end = min(end, start + STACK_WORDS * core.word_bytes)
    runs = core.memory.saved_runs_within(start, end)
    if not runs or runs[0][0] != start:
        return ()
    return tuple(core.memory.read_words(start, (runs[0][1] - start) // core.word_bytes).tolist())


class _Finder:
    """Looks for the pointer that one message is about. ``of_message``: where glibc keeps the message, in a mapping of its own."""

    def __init__(
        self, core: Core, places: Places, refusals: Refusals, refusal: Refusal, trace: Backtrace, of_message: int
    ) -> None:
        self._core = core
        self._places = places
        self._refusals = refusals
        self._refusal = refusal
        self._header = 2 * core.word_bytes
        self._mask = (1 << 8 * core.word_bytes) - 1
        self._modules = ModuleMap(core)
        # Frame pointers stand in registers as well; what they lead to is no variable.
        self._frames = {pointer - back * core.word_bytes for pointer in trace.stack_pointers for back in range(3)}
        self._page_of_message = of_message // core.page_bytes
        self._known: dict[int, bool] = {}

    def answer(self, words: _Words, message: AbortMessage, caller: int | None) -> WrongFree | None:
        """The pointer with what it is; where it is not found what the message alone says."""
        seen = self._sightings(words, message)
        argument = words.argument
        is_of_malloc = any(sightings.rank >= OF_MALLOC for sightings in seen.values())
        if argument is not None and self._is_live_block(argument) and not is_of_malloc:
            return None  # free was right: what lies around the block is damaged.
        possible = self._refusals.all_that_meet(self._refusal.test)
        if possible is not None and len(possible) == 1:
            seen = {only: seen.get(only, _Sightings()) for only in possible}
        if not seen:
            return self._unknown(possible, message, caller) if possible else None
        ranked = sorted(seen, key=lambda address: seen[address].rank, reverse=True)
        address, first = ranked[0], seen[ranked[0]]
        evidence = [*self._evidence(address, first, message)]
        if possible is not None and len(possible) == 1:
            evidence.append(Evidence("no other block meets that test", "lists of free chunks", Strength.SOLID))
        rivals = [other for other in ranked[1:] if seen[other].rank == first.rank and not first.is_told]
        # A header's address alone may be a pointer as well: the same place, a header apart.
        apart = [
            other for other in rivals if abs(other - address) != self._header or (first.as_block and first.as_header)
        ]
        weakened = []
        if apart:
            places = "one more address, as near" if len(apart) == 1 else f"{len(apart)} more addresses, as near"
            weakened.append(f"glibc would have said the same of {places}")
            evidence.append(Evidence(weakened[0], "registers and stack", Strength.HINT, speaks_against=True))
        if not words.are_frames_known and not first.is_told:
            weakened.append("the frames of free are not known without libc's file: words near it may be left over")
        return self._made(address, message, caller, tuple(rivals[:OTHERS_TOLD]), evidence, weakened)

    def _unknown(self, possible: frozenset[int], message: AbortMessage, caller: int | None) -> WrongFree:
        """What the message proves by itself: one of the blocks that meet its test was freed twice."""
        statement = f"one of {len(possible)} blocks that meet glibc's test was freed again"
        evidence = (Evidence(statement, "glibc's message and lists of free chunks", Strength.SOLID),)
        state = self._refusals.state_at(next(iter(possible)))
        return WrongFree(
            kind=WrongFreeKind.UNKNOWN_BLOCK,
            function=self._refusal.function,
            address=None,
            place=None,
            listed_in=state,
            listed_thread=self._refusals.thread if state is ChunkState.TCACHE else None,
            caller=caller,
            message=plain_message(message.text),
            others=tuple(sorted(possible)[:OTHERS_TOLD]),
            evidence=evidence,
            confidence=confidence_from(evidence),
            weakened_by=("which of the blocks it was is not known: no register or word of the stack leads to one",),
        )

    def _made(
        self,
        address: int,
        message: AbortMessage,
        caller: int | None,
        others: tuple[int, ...],
        evidence: list[Evidence],
        weakened: list[str],
    ) -> WrongFree:
        place = self._places.in_heap(address) or self._places.fault(address, was_denied=False)
        kind = self._kind(address, place)
        chunk = place.chunk if kind in (WrongFreeKind.FREED_TWICE, WrongFreeKind.INSIDE_FREED_BLOCK) else None
        state = chunk.state if chunk is not None else None
        is_own = state is ChunkState.TCACHE and address in self._refusals.cached_blocks()
        return WrongFree(
            kind=kind,
            function=self._refusal.function,
            address=address,
            place=place,
            listed_in=state,
            listed_thread=self._refusals.thread if is_own else None,
            caller=caller,
            message=plain_message(message.text),
            others=others,
            evidence=tuple(evidence),
            confidence=confidence_from(evidence),
            weakened_by=tuple(weakened),
        )

    def _kind(self, address: int, place: PlaceNote) -> WrongFreeKind:
        chunk = place.chunk
        if place.kind in (FaultKind.UNMAPPED, FaultKind.NON_CANONICAL, FaultKind.NULL):
            return WrongFreeKind.NOT_MAPPED
        if chunk is None or place.kind is FaultKind.PAST_CHUNK_END:
            return WrongFreeKind.NOT_FROM_MALLOC
        if chunk.state is ChunkState.IN_USE:
            return WrongFreeKind.INSIDE_LIVE_BLOCK
        # A block that was joined with free ones before it begins inside of them; its header is still there.
        was_block = address == chunk.payload_address or (
            self._refusal.is_selective and not self._refusals.is_invalid_size(address)
        )
        return WrongFreeKind.FREED_TWICE if was_block else WrongFreeKind.INSIDE_FREED_BLOCK

    def _sightings(self, words: _Words, message: AbortMessage) -> dict[int, _Sightings]:
        seen: dict[int, _Sightings] = {}
        if message.pointer is not None and self._is_refused_as_told(message.pointer):
            seen.setdefault(message.pointer, _Sightings()).is_told = "glibc's message names it"
        if words.argument is not None and self._is_refused_as_told(words.argument):
            seen.setdefault(words.argument, _Sightings()).is_told = "the caller passed it"
        for is_own, registers in ((True, words.of_malloc), (False, words.of_caller)):
            for name, value in registers:
                for address, is_header in self._candidates(value, may_be_header=is_own):
                    sightings = seen.setdefault(address, _Sightings())
                    sightings.set_by_malloc |= is_own
                    sightings.by_caller |= not is_own
                    sightings.as_header |= is_header
                    sightings.as_block |= not is_header
                    sightings.registers.append(name)
        # A word of the stack alone says little: it counts beside the header's, and for tests that few addresses meet.
        present = set(words.of_stack)
        for value in words.of_stack:
            for address, is_header in self._candidates(value, may_be_header=True):
                header = address - self._header
                is_pair = address in present and header in present and not self._is_live_block(header)
                is_telling = is_pair or (self._refusal.is_selective and not words.are_frames_known)
                # Stacks are full of addresses of themselves.
                if address not in seen and (not is_telling or self._is_on_stack(address)):
                    continue
                sightings = seen.setdefault(address, _Sightings())
                sightings.on_stack |= not is_header
                sightings.on_stack_as_header |= is_header
        return {address: sightings for address, sightings in seen.items() if self._is_credible(address, sightings)}

    def _is_credible(self, address: int, sightings: _Sightings) -> bool:
        """Whether more than an address of some variable was seen, which stand in malloc's registers and its callers' as well."""
        is_pair = sightings.as_block and sightings.as_header
        return bool(sightings.is_told) or is_pair or self._refusal.is_selective or not self._is_on_stack(address)

    def _candidates(self, value: int, *, may_be_header: bool) -> Iterator[tuple[int, bool]]:
        """What a word may mean: the pointer, or its header, each where glibc would have refused it.

        What is the one of a chunk of the heap is not the other of something else.
        """
        behind = value + self._header & self._mask
        if value and self._refused(value) and self._refusals.state_at(behind) is None:
            yield value, False
        if value and may_be_header and not self._is_live_block(value) and self._refused(behind):
            yield behind, True

    def _is_refused_as_told(self, address: int) -> bool:
        """As ``_refused``, of what was surely given: it may lead nowhere, or to memory that the core does not have."""
        # free takes no null pointer for wrong: what was passed as 0 was overwritten since.
        if self._is_live_block(address) or address == 0:
            return False
        size_is_missing = not self._core.memory.is_saved(address - self._core.word_bytes, address)
        return size_is_missing or self._refusal.test(self._refusals, address)

    def _refused(self, address: int) -> bool:
        if address not in self._known:
            self._known[address] = self._may_be_given(address) and self._refusal.test(self._refusals, address)
        return self._known[address]

    def _may_be_given(self, address: int) -> bool:
        """Whether a program may have given an address to free: no live block, which would be right, no code, nothing of libc's own."""
        memory = self._core.memory
        region = memory.region_index(address - self._core.word_bytes)
        if region is None or address in self._frames or self._is_live_block(address):
            return False
        if address // self._core.page_bytes == self._page_of_message:
            return False
        flags = int(memory.region_flags[region])
        if flags & _EXECUTE or (flags and not flags & _READ):
            return False
        module = self._modules.at(address)
        if module is not None and module.name.startswith(("libc.so", "libc-2", "ld-", "[vdso]")):
            return False
        place = self._places.in_heap(address)
        return (
            place is None
            or place.kind is not FaultKind.ALLOCATOR_DATA
            or self._refusals.is_top(address)
            or (place.chunk is not None and place.chunk.state is ChunkState.TOP)
        )

    def _is_live_block(self, address: int) -> bool:
        """A block in use; and what may be one: heap memory that a damaged header hides, or that was not walked."""
        if self._refusals.state_at(address) is ChunkState.IN_USE or self._refusals.is_unwalked(address):
            return True
        place = self._places.in_heap(address)
        return place is not None and place.chunk is not None and place.chunk.state is ChunkState.DAMAGED

    def _is_on_stack(self, address: int) -> bool:
        return self._places.fault(address, was_denied=False).kind is FaultKind.STACK

    def _evidence(self, address: int, sightings: _Sightings, message: AbortMessage) -> Iterator[Evidence]:
        refusal = self._refusal
        shown = address if is_canonical(address, self._core.machine) else None
        source = f"glibc's message and memory, {message.confidence.value}"
        yield Evidence(f"glibc refuses such a pointer: {refusal.statement}", source, Strength.HINT, shown)
        if sightings.is_told:
            yield Evidence(sightings.is_told, f"the call of {refusal.function}", Strength.SOLID, shown)
        names = ", ".join(dict.fromkeys(sightings.registers))
        if sightings.set_by_malloc:
            both = sightings.as_block and sightings.as_header
            held = "it and its header's address" if both else "it" if sightings.as_block else "its header's address"
            statement = f"malloc's own frames hold {held} in registers ({names})"
            yield Evidence(statement, "call frame information", Strength.SOLID)
        elif sightings.by_caller:
            yield Evidence(f"the caller has it in a register ({names})", "call frame information", Strength.HINT)
            if not refusal.is_selective and not sightings.is_told:
                many = "a caller has other pointers in registers, and many addresses meet the test"
                yield Evidence(many, "glibc's message and its test", Strength.HINT, speaks_against=True)
        elif sightings.on_stack or sightings.on_stack_as_header:
            held = "it and its header's address" if sightings.on_stack and sightings.on_stack_as_header else "it"
            held = held if sightings.on_stack else "its header's address"
            yield Evidence(f"the stack near the call holds {held}", "stack", Strength.HINT)
