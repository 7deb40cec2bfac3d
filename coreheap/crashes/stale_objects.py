"""Objects that were used after they were freed: the pointer that failed was read from a block that is free, or another's by now.

Knows: how to follow a failed pointer back to the word that it was read from, and what tells a freed object from one that is there. Does
not know: how instructions are followed (``register_history``), or what damaged a heap (``forensics``).

A block that is free proves the use of freed memory. One that is in use may always have held what it holds: then the program read it as
something that it never was, or somebody wrote over it. So that is never more than plausible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from coreheap.corefile import Core
from coreheap.corefile.register_history import Load, RegisterHistory, accessed_at
from coreheap.corefile.unwinding import ModuleMap
from coreheap.crash import FaultKind, FrameSource, PlaceNote, StaleUse, StaleUseKind
from coreheap.crashes.backtrace import Backtrace
from coreheap.crashes.places import NULL_BYTES, Places
from coreheap.damage import ChunkPlace, Damage
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength, confidence_from
from coreheap.heap import LISTED_FREE_STATES, ChunkState
from coreheap.leaks import Holder

NEAR_WORDS = 48
"""Words of the stack that may lead to the object where the code does not tell it: those of the innermost frames."""
BLOCK_WORDS = 512
"""Words of one block that are looked at."""
FARTHEST_MEMBER = 4096
"""So far behind a pointer a member of what it leads to may lie."""
SIBLING_WORDS = 32
"""Words before and behind the one that holds the object's address: others of its kind are there."""
LEAST_SIBLINGS = 2
HOLDERS_ASKED = 16
CALLED = (StaleUseKind.FUNCTION_POINTER, StaleUseKind.VIRTUAL_TABLE, StaleUseKind.POINTER)
"""What the words are that the target of a call comes from, the last one that was read first."""

Holders = Callable[[int], Sequence[Holder]]
"""For the address of a block who refers to it."""


@dataclass(frozen=True, slots=True)
class _Read:
    """A word of a block that the failed pointer came from."""

    kind: StaleUseKind
    chunk: ChunkPlace
    offset: int
    word: int
    register: str
    is_by_code: bool
    slot: int | None = None
    """The word that the block's address was read from."""


class StaleObjects:
    """Looks for the freed object behind one fault. ``row``: the frame that failed."""

    def __init__(
        self,
        core: Core,
        places: Places,
        trace: Backtrace,
        row: int,
        damages: Sequence[Damage],
        holders: Holders | None,
    ) -> None:
        self._core = core
        self._places = places
        self._trace = trace
        self._row = row
        self._damages = damages
        self._holders = holders
        self._modules = ModuleMap(core)

    def find(self, fault: PlaceNote) -> StaleUse | None:
        """The use of a freed object that explains a fault; None where nothing does."""
        reads = list(self._by_code())
        freed = [read for read in reads if read.chunk.state in LISTED_FREE_STATES]
        if freed:
            # The first one that was read: what came after it was read from freed memory as well.
            return self._of_free_block(freed[-1])
        if fault.kind is FaultKind.NULL:
            return None
        if reads:
            return next((use for read in reads if (use := self._of_other_block(read)) is not None), None)
        near = list(self._by_words(fault))
        freed = [read for read in near if read.chunk.state in LISTED_FREE_STATES]
        if freed:
            return self._of_free_block(freed[0])
        return next((use for read in near if (use := self._of_other_block(read)) is not None), None)

    # Where the pointer was read

    def _by_code(self) -> Iterator[_Read]:
        """By the instructions before: words of blocks that the pointer was read from, the last read first."""
        registers = self._trace.registers[self._row]
        frame = self._trace.frames[self._row]
        called = self._trace.frames[self._row + 1] if self._row + 1 < len(self._trace.frames) else None
        if called is not None and called.source is FrameSource.RETURN_ADDRESS:
            pointers = {self._core_stack_name(): self._trace.stack_pointers[self._row + 1]}
            history = RegisterHistory(self._core, called.program_counter, {**registers, **pointers}, behind_call=True)
            target = history.call_target()
            if target is not None and target[0] == frame.program_counter:
                yield from self._of_loads(target[1], CALLED, "the target of the call")
            return
        accessed = accessed_at(self._core, frame.program_counter, registers)
        if accessed is None:
            return
        history = RegisterHistory(self._core, frame.program_counter, registers, behind_call=False)
        kinds = CALLED if accessed.is_call else (StaleUseKind.POINTER,)
        is_of_target = accessed.target is not None or accessed.goes_to_register
        for name in accessed.registers:
            loads = history.way(name)
            # What a call goes to is read first, the table of functions or the structure that it is read from before that.
            loads = (accessed.target, *loads) if accessed.target is not None else loads
            yield from self._of_loads(loads, kinds if is_of_target else kinds[1:] or kinds, name)

    def _core_stack_name(self) -> str:
        return "rsp" if self._core.word_bytes == 8 else "esp"

    def _of_loads(self, loads: Iterable[Load], kinds: Sequence[StaleUseKind], register: str) -> Iterator[_Read]:
        found = list(loads)
        for number, load in enumerate(found):
            read = self._read(load.address, load.word, kinds[min(number, len(kinds) - 1)], register, is_by_code=True)
            if read is not None:
                yield replace(read, slot=found[number + 1].address) if number + 1 < len(found) else read

    def _by_words(self, fault: PlaceNote) -> Iterator[_Read]:
        """Without code: blocks that a register or a word of the innermost frames leads to, and that hold the pointer."""
        pointer = self._trace.stack_pointers[self._row]
        end = pointer + NEAR_WORDS * self._core.word_bytes
        stack = [
            word for low, high in self._core.memory.saved_runs_within(pointer, end) for word in self._words(low, high)
        ]
        named = [*self._trace.registers[self._row].items(), *(("a word of the stack", word) for word in stack)]
        seen = set[int]()
        for name, value in named:
            place = self._places.in_heap(value) if value not in seen else None
            seen.add(value)
            if place is None or place.chunk is None or place.offset != 0:
                continue
            start = place.chunk.payload_address
            words = self._words(start, start + min(place.chunk.usable_bytes, BLOCK_WORDS * self._core.word_bytes))
            for row, word in enumerate(words):
                if word >= NULL_BYTES and 0 <= fault.address - word < FARTHEST_MEMBER:
                    address = start + row * self._core.word_bytes
                    read = self._read(address, word, StaleUseKind.POINTER, name, is_by_code=False)
                    if read is not None:
                        yield read

    def _words(self, start: int, end: int) -> list[int]:
        count = (end - start) // self._core.word_bytes
        try:
            words: list[int] = self._core.memory.read_words(start, count).tolist() if count > 0 else []
        except MemoryFault:
            return []
        return words

    def _read(self, address: int, word: int, kind: StaleUseKind, register: str, *, is_by_code: bool) -> _Read | None:
        place = self._places.in_heap(address)
        chunk = place.chunk if place is not None else None
        if place is None or chunk is None or place.offset is None or not 0 <= place.offset < chunk.usable_bytes:
            return None
        if chunk.state is not ChunkState.IN_USE and chunk.state not in LISTED_FREE_STATES:
            return None
        return _Read(kind, chunk, place.offset, word, register, is_by_code)

    # What that says

    def _of_free_block(self, read: _Read) -> StaleUse:
        chunk = read.chunk
        is_telling = read.is_by_code and read.word >= NULL_BYTES
        how = "the instructions before it read the pointer" if read.is_by_code else "the pointer that failed stands"
        where = (
            f"{how} {'from' if read.is_by_code else 'in'} a block that is free ({chunk.state.label.replace('_', ' ')})"
        )
        source = "machine code and registers" if read.is_by_code else "registers and stack"
        address = chunk.payload_address + read.offset
        evidence = [Evidence(where, source, Strength.SOLID if is_telling else Strength.HINT, address)]
        leads = (
            f"{read.register} leads to it"
            if not read.is_by_code
            else "its word there is what the failed pointer came from"
        )
        evidence.append(Evidence(leads, source, Strength.HINT, chunk.payload_address))
        if read.offset < 2 * self._core.word_bytes:
            evidence.append(
                Evidence("malloc keeps its own words there while the block is free", "chunk state", Strength.HINT)
            )
        weakened = (
            ()
            if read.is_by_code
            else ("the code was not at hand: which word the program read is inferred from its value",)
        )
        return self._use(read, evidence, weakened, is_given_again=False)

    def _of_other_block(self, read: _Read) -> StaleUse | None:
        """A block in use, where it is not what the program took it for."""
        if read.chunk.state is not ChunkState.IN_USE or self._modules.at(read.word) is not None:
            return None
        siblings, slot = self._siblings(read)
        is_object = read.is_by_code and read.kind is StaleUseKind.VIRTUAL_TABLE and read.offset == 0
        if not siblings and not is_object:
            return None
        address = read.chunk.payload_address
        evidence = []
        if is_object:
            evidence.append(
                Evidence("its first word leads to no module, so to no table of functions", "memory", Strength.HINT)
            )
        if siblings:
            words = (
                f"{siblings} blocks of its size that are held beside it hold one and the same address of a module there"
            )
            evidence.append(Evidence(words, "words around the one that holds its address", Strength.HINT))
            if not read.is_by_code:
                evidence.append(Evidence(f"{read.register} leads to it", "registers and stack", Strength.HINT, address))
        reach = address - 2 * self._core.word_bytes
        if any(reach < damage.bytes.end and damage.bytes.start < address + read.offset + 1 for damage in self._damages):
            against = "what lies before it is damaged: it may have been written over while it was in use"
            evidence.append(Evidence(against, "damage of the heap", Strength.HINT, speaks_against=True))
        weakened = ("the block may never have been such an object, or somebody wrote over it while it was in use",)
        return self._use(replace(read, slot=slot), evidence, weakened, is_given_again=True)

    def _siblings(self, read: _Read) -> tuple[int, int | None]:
        """How many blocks of the same size have one address of a module at that offset and are held beside it, and by which word it
        is held there."""
        word, most, of_most = self._core.word_bytes, 0, None
        holders = self._holders(read.chunk.payload_address) if self._holders is not None else ()
        slots = {holder.address for holder in holders[:HOLDERS_ASKED]} | {read.slot}
        for slot in slots:
            if slot is None:
                continue
            start, reach = slot - slot % word, SIBLING_WORDS * word
            near: list[int] = []
            for low, high in self._core.memory.saved_runs_within(max(start - reach, 0), start + reach):
                near += self._words(low + -low % word, high)
            held = np.unique(np.array([value for value in near if value % word == 0], np.uint64)).tolist()
            of_slot: Counter[int] = Counter()
            for value in held:
                place = self._places.in_heap(value) if value != read.chunk.payload_address else None
                chunk = place.chunk if place is not None and place.offset == 0 else None
                if chunk is None or chunk.chunk_bytes != read.chunk.chunk_bytes or chunk.state is not ChunkState.IN_USE:
                    continue
                there = self._words(value + read.offset, value + read.offset + word)
                if there and self._modules.at(there[0]) is not None:
                    of_slot[there[0]] += 1
            count = max(of_slot.values(), default=0)
            if count > most:
                most, of_most = count, slot
        return (most, of_most) if most >= LEAST_SIBLINGS else (0, None)

    def _use(
        self, read: _Read, evidence: list[Evidence], weakened: tuple[str, ...], *, is_given_again: bool
    ) -> StaleUse:
        return StaleUse(
            kind=read.kind,
            chunk=read.chunk,
            offset=read.offset,
            register=read.register,
            is_given_again=is_given_again,
            slot=read.slot,
            evidence=tuple(evidence),
            confidence=confidence_from(evidence),
            weakened_by=weakened,
        )
