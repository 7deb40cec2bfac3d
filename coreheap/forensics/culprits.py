"""Who wrote over a header, and how far: an overflow from before, an underflow from behind, a flipped bit.

Knows: how a write that is too long or too early looks from the header that it hit. Does not know: lists, or malloc's globals.

What the bytes cannot tell apart is said as counter-evidence: a word just behind a block is also the word just before
the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from coreheap.damage import DamagedPlace, DamageKind, Pattern, PatternKind, Repair
from coreheap.evidence import Evidence, Strength
from coreheap.forensics.patterns import Foreign, PatternReader
from coreheap.forensics.places import FLAGS, PREV_INUSE, Places
from coreheap.forensics.suspicion import Suspicion
from coreheap.heap import ChunkState
from coreheap.quantities import AddressRange

FREED_STATES = (
    ChunkState.TCACHE,
    ChunkState.FASTBIN,
    ChunkState.UNSORTED_BIN,
    ChunkState.SMALL_BIN,
    ChunkState.LARGE_BIN,
    ChunkState.FREE_UNLISTED,
)
SOURCE = "bytes around the header"


@dataclass(slots=True)
class Told:
    """What is told of one damage before chunks get their holders. ``victim`` and ``culprit`` are chunk numbers."""

    kind: DamageKind
    place: DamagedPlace
    extent: AddressRange
    victim: int | None = None
    culprit: int | None = None
    pattern: Pattern | None = None
    repair: Repair | None = None
    evidence: list[Evidence] = field(default_factory=list)
    weakened_by: list[str] = field(default_factory=list)

    def hold(self, statement: str, strength: Strength, address: int | None = None) -> None:
        self.evidence.append(Evidence(statement, SOURCE, strength, address))

    def doubt(self, statement: str, strength: Strength = Strength.HINT) -> None:
        """Something else could explain the bytes as well."""
        self.evidence.append(Evidence(statement, SOURCE, strength, speaks_against=True))
        self.weakened_by.append(statement)


def differing(observed: bytes, expected: bytes) -> tuple[int, int]:
    """The first differing byte, and one behind the last one; (0, 0) where they are the same."""
    places = [place for place, (one, other) in enumerate(zip(observed, expected, strict=True)) if one != other]
    return (places[0], places[-1] + 1) if places else (0, 0)


class HeaderReader:
    """Reads the damaged headers of one heap."""

    def __init__(self, places: Places, patterns: PatternReader) -> None:
        self.places = places
        self.patterns = patterns
        self.word = places.word_bytes

    def read(self, suspicion: Suspicion) -> Told | None:
        """What happened to the header of a suspicion; None where its words are as they should be."""
        places, header = self.places, suspicion.header
        assert header is not None
        chunk = places.chunk_at(header)
        observed = places.word(header + self.word)
        if observed is None:
            return None
        expected = self._expected(suspicion, chunk)
        before = places.before(chunk) if chunk is not None else places.chunk_holding(header - 1)
        footer = self._expected_footer(before)
        found_footer = places.word(header)
        footer_differs = footer is not None and found_footer is not None and footer != found_footer
        if observed == expected and not footer_differs:
            return None
        if observed == expected and footer is not None and found_footer is not None:
            return self._of_footer(suspicion, header, chunk, before, found_footer, footer)
        return self._of_size(suspicion, header, chunk, before, observed, expected, footer_differs)

    def is_right(self, suspicion: Suspicion) -> bool:
        """Whether the header of a suspicion says what the chunks around and the lists say."""
        header = suspicion.header
        chunk = self.places.chunk_at(header) if header is not None else None
        if header is None or chunk is None:
            return False
        return self.places.expected_size_word(chunk) == self.places.word(header + self.word)

    def _expected(self, suspicion: Suspicion, chunk: int | None) -> int | None:
        """The size word as it should be; None where nothing tells its size."""
        for anomaly in suspicion.anomalies:
            is_word = anomaly.word_address in (None, (suspicion.header or 0) + self.word)
            known = anomaly.code == "broken_chunk" or anomaly.expected_word is not None
            if anomaly.code in ("broken_chunk", "top_size_mismatch", "top_damaged") and is_word and known:
                return anomaly.expected_word
        if suspicion.place is DamagedPlace.TOP and suspicion.header is not None:
            end = self.places.end_of_top(suspicion.header)
            if end is not None:
                return (end - suspicion.header) | PREV_INUSE
        if chunk is None:
            return None
        expected = self.places.expected_size_word(chunk)
        observed = self.places.word((suspicion.header or 0) + self.word)
        if expected is not None and self.places.state(chunk) is ChunkState.TOP and observed is not None:
            # Its size is said to be right here: only the flags can be wrong.
            return (observed & ~FLAGS) | (expected & FLAGS)
        return expected

    def _expected_footer(self, before: int | None) -> int | None:
        """What prev_size should be: the size of a free chunk before; None where it is that chunk's own memory."""
        if before is None or not self.places.is_binned(before):
            return None
        return self.places.extent(before)[1]

    def _of_footer(
        self, suspicion: Suspicion, header: int, chunk: int | None, before: int | None, observed: int, expected: int
    ) -> Told:
        """A wrong prev_size behind a free chunk, whose own size and lists are sound."""
        low, high = self._bytes_that_differ(observed, expected)
        around = self.patterns.around(header + low, high - low)
        bit = _one_bit(observed ^ expected)
        told = Told(
            DamageKind.BIT_FLIP if bit is not None else DamageKind.OVERWRITE,
            DamagedPlace.PREV_SIZE,
            AddressRange(header + low, header + high),
            victim=chunk,
            pattern=Pattern(PatternKind.ONE_BIT, 1) if bit is not None else around.pattern(high - low),
            repair=Repair(header, observed, expected, bit),
        )
        told.hold(
            "prev_size is not the size of the free chunk before it, whose header says its size", Strength.SOLID, header
        )
        if bit is not None:
            return told
        if around.before > self.word and before is not None:
            told.kind, told.culprit = DamageKind.USE_AFTER_FREE, before
            told.doubt("the foreign bytes go on before it in a free chunk: old content may look the same")
        return told

    def _of_size(
        self,
        suspicion: Suspicion,
        header: int,
        chunk: int | None,
        before: int | None,
        observed: int,
        expected: int | None,
        footer_differs: bool,
    ) -> Told:
        place = header + self.word
        low, high = (0, self.word) if expected is None else self._bytes_that_differ(observed, expected)
        at_top = suspicion.place is DamagedPlace.TOP
        around = self.patterns.around(place + low, high - low)
        whole = self.patterns.around(place, self.word)
        is_small = expected is not None and expected >> 8 == 0
        goes_through = (
            high == self.word and whole.kind in (PatternKind.TEXT, PatternKind.FILL_BYTE) and whole.before > 0
        )
        if (low == 0 and (high > 1 or is_small)) or goes_through:
            # Bytes that happen to be right are foreign as well.
            around = whole
        told = Told(
            DamageKind.OVERWRITE,
            DamagedPlace.TOP if at_top else DamagedPlace.CHUNK_HEADER,
            AddressRange(place + low, place + high),
            victim=chunk,
        )
        if expected is not None:
            told.repair = Repair(place, observed, expected, _one_bit(observed ^ expected))
        one_bit = told.repair is not None and told.repair.bit is not None
        low_byte_is_zero = low == 0 and high == 1 and observed & 0xFF == 0
        told.pattern = around.pattern(high - low)
        if one_bit and not low_byte_is_zero and not footer_differs:
            told.kind, told.pattern = DamageKind.BIT_FLIP, Pattern(PatternKind.ONE_BIT, 1)
            told.hold("one bit apart from the only value that fits the chunks around", Strength.SOLID, place)
            if observed & 0xFF != (expected or 0) & 0xFF:
                self._doubt_one_byte(told, around)
            return told
        reach = high
        if around.behind and high == self.word:
            reach += around.behind
            told.extent = AddressRange(place + low, place + reach)
            told.pattern = around.pattern(reach - low)
        begins = place - around.before if around is whole or low == 0 else place + low
        first = 0 if around is whole else low
        self._attribute(told, around, header, chunk, before, first, high, footer_differs, begins)
        if told.kind is DamageKind.OVERFLOW and low == 0 and high == 1 and is_small and around.before <= self.word:
            told.doubt("the size is so small that a whole word may have been written, from either side")
        return told

    def _doubt_one_byte(self, told: Told, around: Foreign) -> None:
        """A bit of the lowest byte: a byte behind a block that is written too long may happen to differ in one bit."""
        if around.before >= self.word and around.kind is not PatternKind.OTHER:
            told.doubt("a block before it that was written one byte too far may change one bit as well")

    def _attribute(
        self,
        told: Told,
        around: Foreign,
        header: int,
        chunk: int | None,
        before: int | None,
        low: int,
        high: int,
        footer_differs: bool,
        begins: int,
    ) -> None:
        """Say who wrote, by where the same kind of bytes begins and ends; ``begins`` is the first of them."""
        place, word = header + self.word, self.word
        state = self.places.state(before) if before is not None else None
        from_before = around.before if low == 0 else 0
        told.hold("the size word cannot be what malloc wrote there", Strength.SOLID, place)
        if before is None:
            self._without_a_chunk_before(told, chunk)
            return
        links_end = self._end_of_whole_links(before) if state is ChunkState.TCACHE else None
        if links_end is not None and begins <= links_end and around.kind is not PatternKind.ZEROS:
            # free keeps its links at the start of a block: over these bytes, so it came later.
            told.kind, told.culprit = DamageKind.OVERFLOW, before
            told.hold(
                "the foreign bytes begin just behind the links that free wrote into the block: it was written past its end"
                " before it was freed",
                Strength.SOLID,
                links_end,
            )
            return
        if links_end is not None:
            told.doubt(
                "the block before it is free by now: it may have been written to after that, behind malloc's links"
            )
        elif state in FREED_STATES:
            if footer_differs or from_before > word:
                told.kind, told.culprit = DamageKind.USE_AFTER_FREE, before
                told.doubt("the block before it is free: it may have been written to while it was in use")
            elif chunk is not None and self.places.state(chunk) not in FREED_STATES and not _is_top(self.places, chunk):
                told.kind, told.culprit = DamageKind.UNDERFLOW, chunk
                told.doubt("the block before it is free, and a write past its end would look the same")
            return
        if state in (ChunkState.DAMAGED, ChunkState.FENCEPOST, ChunkState.ALLOCATOR_OWN):
            told.doubt("what lies before it is no block that could be named")
            return
        is_high_part = low >= word // 2
        single_byte = low == 0 and high == 1
        number = around.kind in (PatternKind.SMALL_NUMBER, PatternKind.POINTER)
        like_behind = number and self.patterns.is_alike(place + word, around.kind)
        if is_high_part and chunk is not None:
            told.kind, told.culprit = DamageKind.UNDERFLOW, chunk
            told.doubt("nothing but its place in the header tells this write from others")
        elif from_before == word and around.kind in (PatternKind.SMALL_NUMBER, PatternKind.TEXT, PatternKind.FILL_BYTE):
            # They begin exactly where the header does, which is in the middle of the block before.
            told.kind, told.culprit = DamageKind.UNDERFLOW, chunk
            told.hold("the foreign bytes begin exactly where the header does", Strength.HINT, header)
            told.doubt("a block before it whose last word happens to look alike")
        elif from_before > word or single_byte:
            told.kind, told.culprit = DamageKind.OVERFLOW, before
            if single_byte:
                told.hold("only the first byte behind the block is wrong", Strength.HINT, place)
            elif around.kind is PatternKind.ZEROS:
                told.hold("zeros go on without a break from inside the block before", Strength.HINT, place)
                told.doubt("memory that was never written is zero as well: only the header itself may have been hit")
            else:
                told.hold(
                    "the same kind of bytes goes on without a break from inside the block before", Strength.SOLID, place
                )
        elif around.kind is PatternKind.SMALL_NUMBER and not like_behind:
            told.kind, told.culprit = DamageKind.UNDERFLOW, chunk
            told.hold("a number, where the block before ends with no numbers", Strength.HINT, place)
            told.doubt("an element written just past the end of the block before would look the same")
        else:
            told.kind, told.culprit = DamageKind.OVERFLOW, before
            told.hold("the word behind the block is wrong from its first byte on", Strength.HINT, place)
            is_free = chunk is not None and self.places.state(chunk) in FREED_STATES
            if not (is_free and around.behind):
                told.doubt("a write that began just before the start of the damaged block would look the same")

    def _end_of_whole_links(self, chunk: int) -> int | None:
        """Where the words end that free wrote into a cached block; None where one of them was written over since.

        A tcache takes a block without a look at the next header (tcache_put, 2.26-2.44): so that may have been damaged before.
        """
        payload = self.places.extent(chunk)[0] + self.places.header_bytes
        # From 2.34 on the key is a random word; with few cached blocks nothing else tells it.
        second = self.patterns.around(payload + self.word, self.word)
        has_key = self.places.word(payload + self.word) in self.patterns.keys or second.kind is PatternKind.OTHER
        end = payload + (2 if has_key else 1) * self.word
        return None if any(payload <= word < end for word in self._wrong_words) else end

    @cached_property
    def _wrong_words(self) -> frozenset[int]:
        """Words that some contradiction is about."""
        words = (anomaly.word_address for anomaly in self.places.heap.anomalies)
        return frozenset(word for word in words if word is not None)

    def _without_a_chunk_before(self, told: Told, chunk: int | None) -> None:
        if chunk is None or _is_top(self.places, chunk):
            return
        told.kind, told.culprit = DamageKind.UNDERFLOW, chunk
        told.doubt("no chunk lies before it; what does may have been written past its end")

    def _bytes_that_differ(self, observed: int, expected: int) -> tuple[int, int]:
        return differing(observed.to_bytes(self.word, "little"), expected.to_bytes(self.word, "little"))


def _is_top(places: Places, chunk: int) -> bool:
    return places.state(chunk) is ChunkState.TOP


def _one_bit(difference: int) -> int | None:
    return difference.bit_length() - 1 if difference.bit_count() == 1 else None
