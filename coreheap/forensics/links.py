"""What happened to a list of free chunks, or to malloc's own data: written after free, freed twice, never given out.

Knows: how each of these looks in the links of a list. Does not know: headers (``culprits``).
"""

from __future__ import annotations

from dataclasses import replace

from coreheap.damage import DamagedPlace, DamageKind, Pattern, PatternKind, Repair
from coreheap.evidence import Anomaly, Strength
from coreheap.forensics.culprits import Told, differing
from coreheap.forensics.patterns import Foreign, PatternReader
from coreheap.forensics.places import FLAGS, Places
from coreheap.forensics.suspicion import Suspicion
from coreheap.heap import BINNED_STATES, LISTED_FREE_STATES, ChunkState, FreeList
from coreheap.quantities import AddressRange, format_address

TWO_SIDED = frozenset(
    {
        "tcache_entry_without_count",
        "tcache_count_too_high",
        "list_count_mismatch",
        "system_mem_damaged",
        "more_than_system_mem",
        "mmapped_count_mismatch",
        "top_not_at_end_of_brk",
    }
)
"""Codes of contradictions that either of two values can be the cause of."""

SUMS = frozenset({"system_mem_damaged", "more_than_system_mem", "mmapped_bytes_mismatch"})
"""Codes of amounts of memory."""

CANDIDATES_NAMED = 4
MOST_SEARCHES = 8

PAGE_SHIFT = 12
"""glibc's, of safe linking (malloc.c, PROTECT_PTR, 2.32 on)."""

LEADS_NOWHERE = frozenset({"list_not_a_chunk_start", "list_misaligned", "list_wrong_state", "list_already_listed"})

LEADS_WRONG = ("list_not_a_chunk_start", "list_wrong_state")


class LinkReader:
    """Reads damaged links, list heads and structures of one heap."""

    def __init__(self, places: Places, patterns: PatternReader) -> None:
        self.places = places
        self.patterns = patterns
        self.word = places.word_bytes
        self.page_bytes = places.page_bytes
        self._searches = 0

    def read(self, suspicion: Suspicion) -> Told | None:
        """What a suspicion comes to that names no damaged header; None where it names no word that can be read."""
        twice = next((anomaly for anomaly in suspicion.anomalies if anomaly.code == "list_already_listed"), None)
        if twice is not None:
            told = self._freed_twice(suspicion, twice)
            if told is not None:
                return told
        for anomaly in suspicion.anomalies:
            if anomaly.code in LEADS_WRONG:
                told = self._never_given_out(suspicion, anomaly)
                if told is not None:
                    return told
        if suspicion.place is DamagedPlace.FREE_CONTENT:
            return self._content(suspicion)
        if suspicion.place is DamagedPlace.MMAPPED_HEADER:
            return self._mmapped(suspicion)
        if suspicion.header is not None and suspicion.words:
            return self._written_after_free(suspicion, suspicion.header)
        return self._structure(suspicion)

    # Freed twice

    def _freed_twice(self, suspicion: Suspicion, anomaly: Anomaly) -> Told | None:
        """A block that is met on a list a second time; None where its link was overwritten to lead back."""
        header = anomaly.header_address if anomaly.header_address is not None else anomaly.address
        block, word = self.places.chunk_at(header), anomaly.word_address
        free_list = self._list_of(anomaly)
        if block is None:
            return None
        place = word if word is not None else header + self.places.header_bytes
        told = Told(
            DamageKind.DOUBLE_FREE,
            DamagedPlace.FREE_LIST,
            AddressRange(place, place + self.word),
            victim=block,
            culprit=block,
        )
        told.hold("a list leads to a block that is on a free list already", Strength.SOLID, word)
        if free_list is not None and self.places.state(block) is not free_list.kind:
            told.hold("the two lists are of different kinds: each of two frees put it on one", Strength.HINT)
            return told
        recorded = free_list.recorded_count if free_list is not None else None
        if recorded is None:
            told.doubt("a link that was overwritten with the address of that block leads there as well")
        elif free_list is not None and recorded > free_list.count:
            told.hold("malloc's counter has one block more than there are", Strength.SOLID)
        else:
            return None
        return told

    # Never given out

    def _never_given_out(self, suspicion: Suspicion, anomaly: Anomaly) -> Told | None:
        """A list that leads to no chunk, where memory looks as if free had been called with that address."""
        free_list = self._list_of(anomaly)
        if free_list is None or free_list.kind not in (ChunkState.TCACHE, ChunkState.FASTBIN):
            return None
        target = anomaly.address
        payload = target if free_list.kind is ChunkState.TCACHE else target + self.places.header_bytes
        if anomaly.code == "list_wrong_state":
            return None
        size_word, key = self.places.word(payload - self.word), self.places.word(payload + self.word)
        if size_word is None or not free_list.chunk_bytes_low <= size_word & ~FLAGS <= free_list.chunk_bytes_high:
            return None
        if not self._is_known_otherwise(payload):
            return None
        has_key = free_list.kind is ChunkState.TCACHE and key is not None and key in self.patterns.keys
        inside = self.places.chunk_using(payload)
        told = Told(
            DamageKind.INVALID_FREE,
            DamagedPlace.FREE_LIST,
            AddressRange(payload, payload + (2 if has_key else 1) * self.word),
            victim=None,
            culprit=inside,
        )
        told.hold("before the address lies a size of exactly this list", Strength.SOLID, payload - self.word)
        if has_key:
            told.hold("free's key lies in it", Strength.SOLID, payload + self.word)
        else:
            told.doubt("a link that was overwritten may lead to such a place by intent")
        return told

    def _is_known_otherwise(self, address: int) -> bool:
        """Whether an address is known to be no chunk's start: within a live block, a module's data, a thread's stack."""
        chunk = self.places.chunk_using(address)
        if chunk is not None:
            return self.places.state(chunk) is ChunkState.IN_USE
        target = self.patterns.target_of(address)
        return target is not None and target not in ("a chunk", "other memory")

    # Written after free

    def _written_after_free(self, suspicion: Suspicion, header: int) -> Told | None:
        block = self.places.chunk_at(header)
        if block is None:
            return None
        start, chunk_bytes = self.places.extent(block)
        words = sorted(word for word in suspicion.words if start <= word < start + chunk_bytes)
        if not words:
            return None
        extent, repair, whole = self._foreign(suspicion, words)
        around = self._look(words[0], extent)
        reach = extent.end + (around.behind if whole else 0)
        payload = start + self.places.header_bytes
        if around.kind in (PatternKind.TEXT, PatternKind.FILL_BYTE) and around.before >= extent.start - payload:
            extent = AddressRange(payload, extent.end)
        told = Told(
            DamageKind.USE_AFTER_FREE,
            suspicion.place,
            AddressRange(extent.start, min(reach, start + chunk_bytes)),
            victim=block,
            culprit=block,
            pattern=around.pattern(min(reach, start + chunk_bytes) - extent.start),
            repair=repair,
        )
        told.hold(
            "a free block's links lead where no free chunk of its list is; its header is sound",
            Strength.SOLID,
            words[0],
        )
        if told.extent.start == payload and told.extent.end >= start + chunk_bytes:
            told.doubt("all of the block is foreign: it may have been given out again after it was freed twice")
        if around.kind is PatternKind.ZEROS and self.places.state(block) not in LISTED_FREE_STATES:
            told.doubt("the block may have been given out again")
        if around.kind is PatternKind.POINTER and self.places.state(block) in BINNED_STATES:
            told.doubt("malloc's own links of another moment are pointers as well")
        if repair is not None and repair.bit is not None:
            told.doubt("one bit that flipped would look the same")
        if self.places.state(block) not in LISTED_FREE_STATES:
            told.doubt(
                "malloc has given the block out since: had it been freed twice, its owner's content would look the same"
            )
        return told

    def _look(self, word: int, extent: AddressRange) -> Foreign:
        """What foreign bytes look like; from the whole word where they begin with it: bytes that happen to be right count."""
        if extent.start == word and 1 < extent.byte_count < self.word:
            return self.patterns.around(word, self.word)
        return self.patterns.around(extent.start, extent.byte_count)

    def _foreign(self, suspicion: Suspicion, words: list[int]) -> tuple[AddressRange, Repair | None, bool]:
        """The foreign bytes of wrong words that lie side by side, the repair of the first, and whether the last is foreign to
        its end."""
        first, end = words[0], words[0] + self.word
        for word in words[1:]:
            if word <= end:
                end = max(end, word + self.word)
        expected, observed = self._expected(suspicion, first)
        if expected is None or observed is None or expected == observed:
            return AddressRange(first, end), None, True
        low, high = differing(observed.to_bytes(self.word, "little"), expected.to_bytes(self.word, "little"))
        difference = observed ^ expected
        bit = difference.bit_length() - 1 if difference.bit_count() == 1 else None
        whole = end > first + self.word
        return (
            AddressRange(first + low, end if whole else first + high),
            Repair(first, observed, expected, bit),
            whole or high == self.word,
        )

    def _expected(self, suspicion: Suspicion, word: int) -> tuple[int | None, int | None]:
        """What a word should hold and what it holds; None where that is not known."""
        for anomaly in suspicion.anomalies:
            if anomaly.word_address == word and anomaly.expected_word is not None:
                return anomaly.expected_word, anomaly.observed_word
        return None, self.places.word(word)

    def _content(self, suspicion: Suspicion) -> Told | None:
        """The fill of M_PERTURB that is not there any more."""
        anomaly, block = suspicion.anomalies[0], suspicion.listed
        first = suspicion.words[0]
        if block is None:
            block = self.places.chunk_using(first)
        if block is None:
            return None
        around = self.patterns.around(first, 1)
        told = Told(
            DamageKind.USE_AFTER_FREE,
            DamagedPlace.FREE_CONTENT,
            AddressRange(first, first + 1),
            victim=block,
            culprit=block,
            pattern=around.pattern(1),
        )
        if anomaly.observed_word is not None and anomaly.word_address is not None and anomaly.expected_word is not None:
            low, high = differing(
                anomaly.observed_word.to_bytes(self.word, "little"), anomaly.expected_word.to_bytes(self.word, "little")
            )
            if high:
                told.extent = AddressRange(first + low, first + high)
        told.hold("a free block's content is not what free filled it with", Strength.SOLID, first)
        return told

    # malloc's own data

    def _structure(self, suspicion: Suspicion) -> Told | None:
        along = self._taken_along(suspicion) if suspicion.codes & LEADS_NOWHERE else None
        if along is not None:
            return along
        words = sorted(suspicion.words)
        if not words and suspicion.header is not None:
            words = [suspicion.header + self.word]
        if not words:
            return None
        expected, observed = self._expected(suspicion, words[0])
        extent, repair, _ = self._foreign(suspicion, words)
        bit = repair.bit if repair is not None else None
        if (
            repair is not None
            and suspicion.codes <= SUMS
            and (repair.observed ^ repair.expected) % self.page_bytes == 0
        ):
            # Memory grows and shrinks by pages: one bit of a page's number is a difference like any other.
            bit = None
            repair = replace(repair, bit=None)
        kind = DamageKind.OVERWRITE
        if bit is not None and suspicion.place in (
            DamagedPlace.TOP,
            DamagedPlace.MMAPPED_HEADER,
            DamagedPlace.MALLOC_STATE,
        ):
            kind = DamageKind.BIT_FLIP
        pattern = Pattern(PatternKind.ONE_BIT, 1) if kind is DamageKind.BIT_FLIP else None
        if pattern is None and observed is not None:
            pattern = self._look(words[0], extent).pattern(extent.byte_count)
        told = Told(kind, suspicion.place, extent, victim=suspicion.listed, pattern=pattern, repair=repair)
        statement = "malloc's own data contradict each other"
        if suspicion.codes & {"system_mem_damaged"} and self._of_short_top(told, suspicion):
            return told
        if suspicion.codes <= TWO_SIDED:
            told.doubt("two of malloc's values contradict each other, and which of them is wrong is not known")
        if suspicion.codes & LEADS_NOWHERE:
            self._doubt_head(told, suspicion)
        told.hold(statement if expected is None else f"{statement}; one value would be right", Strength.SOLID, words[0])
        return told

    def _taken_along(self, suspicion: Suspicion) -> Told | None:
        """A head that leads to memory which malloc itself put on a tcache: a fastbin's link led there.

        malloc moves what is left of a fastbin to the tcache (_int_malloc, 2.26-2.41), so behind such memory lies the block
        whose link led to it. Of what it took last the fastbin's head is left: 0 as safe linking reads it, the page's number.
        """
        for anomaly in self.places.heap.anomalies:
            node, is_cached = anomaly.address, anomaly.expected.startswith(ChunkState.TCACHE.label)
            if anomaly.code != "list_not_a_chunk_start" or not is_cached or node % self.places.header_bytes:
                continue
            of_fastbin = any(other.observed_word == node >> PAGE_SHIFT for other in suspicion.anomalies)
            link, key = self.places.word(node), self.places.word(node + self.word)
            if not (of_fastbin or anomaly in suspicion.anomalies) or link is None or key not in self.patterns.keys:
                continue
            pointers = (link ^ node >> PAGE_SHIFT, link)
            blocks = [self.places.chunk_at(pointer - self.places.header_bytes) for pointer in pointers]
            block = next((one for one in blocks if one is not None), None)
            if block is None or self.places.state(block) is not ChunkState.TCACHE:
                continue
            told = Told(
                DamageKind.USE_AFTER_FREE,
                DamagedPlace.FREE_LIST,
                AddressRange(node, node + 2 * self.word),
                victim=None,
                culprit=block,
            )
            told.hold(
                "free's key lies in memory that is no chunk of the list's size: malloc put it there itself",
                Strength.SOLID,
                node,
            )
            told.doubt(
                "malloc has written over the link since: an overflow of the block before it may have changed it as well"
            )
            return told
        return None

    def _doubt_head(self, told: Told, suspicion: Suspicion) -> None:
        """A list's head that leads nowhere: malloc stores there what the block that it gave out last held as its link."""
        anomaly = next(anomaly for anomaly in suspicion.anomalies if anomaly.code in LEADS_NOWHERE)
        free_list = self._list_of(anomaly)
        if free_list is None or free_list.kind not in (ChunkState.TCACHE, ChunkState.FASTBIN):
            return
        told.doubt(
            "the head may be the link of a block that was written to after it was freed, or freed twice, and was given out since"
        )
        count, first = self._given_out_of(free_list)
        if count:
            names = ", ".join(format_address(address) for address in first)
            more = "" if count <= len(first) else f" and {count - len(first)} more"
            told.hold(f"{count} blocks of this list's sizes are given out: {names}{more}", Strength.HINT)

    def _given_out_of(self, free_list: FreeList) -> tuple[int, list[int]]:
        """How many blocks in use have sizes of a list, in its arena where it has one; and the first of them.

        Nothing for more than MOST_SEARCHES lists: with so many heads that lead nowhere it is the structure that was written over.
        """
        self._searches += 1
        if self._searches > MOST_SEARCHES:
            return 0, []
        count, first = 0, list[int]()
        for batch in self.places.heap.chunks.batches():
            if batch.is_mmapped or free_list.arena not in (None, batch.arena):
                continue
            fits = (batch.state == ChunkState.IN_USE) & (batch.chunk_bytes >= free_list.chunk_bytes_low)
            fits &= batch.chunk_bytes <= free_list.chunk_bytes_high
            count += int(fits.sum())
            first += batch.payload_address[fits][: CANDIDATES_NAMED - len(first)].tolist()
        return count, first

    def _of_short_top(self, told: Told, suspicion: Suspicion) -> bool:
        """Whether system_mem counts a part of the heap twice that begins at the marks of an earlier end.

        Where the break is not at top's end, sysmalloc takes what lies between for somebody else's, and adds it (2.12-2.44). A
        top whose size was written too small makes such a gap out of malloc's own memory, which was counted before.
        """
        (anomaly,) = [anomaly for anomaly in suspicion.anomalies if anomaly.code == "system_mem_damaged"][:1]
        observed, expected = anomaly.observed_word, anomaly.expected_word
        if anomaly.arena is None or observed is None or expected is None or observed <= expected:
            return False
        gaps = [part.range for part in self.places.heap.arenas[anomaly.arena].unattributed]
        # What alignment leaves out before and behind it is in the gap, and was not counted (i386: 8 bytes each).
        twice = range(observed - expected, observed - expected + 4 * self.word + 1)
        gap = next((gap for gap in gaps if gap.byte_count in twice), None)
        ends = self.places.chunk_holding(gap.start - 1) if gap is not None else None
        if gap is None or ends is None or self.places.state(ends) is not ChunkState.FENCEPOST:
            return False
        victim: int | None = ends
        while victim is not None and self.places.state(victim) is ChunkState.FENCEPOST:
            victim = self.places.before(victim)
        if victim is None:
            return False
        place = self.places.extent(victim)[0] + self.word
        told.kind, told.place, told.victim = DamageKind.OVERWRITE, DamagedPlace.TOP, victim
        told.extent, told.pattern, told.repair = AddressRange(place, place + self.word), None, None
        told.hold(
            "system_mem counts the memory behind the marks of an earlier end twice: top's size was too small when the heap grew",
            Strength.SOLID,
            gap.start,
        )
        return True

    def _mmapped(self, suspicion: Suspicion) -> Told | None:
        """The header of an mmapped chunk; what was written before it may have gone on from the mapping before."""
        told = self._structure(suspicion)
        if told is None or suspicion.listed is None:
            return told
        header = self.places.extent(suspicion.listed)[0]
        prev_size, place = self.places.word(header), told.extent.start
        if prev_size is not None and place >= header + self.word and header % self.page_bytes == 0 and prev_size & ~1:
            # At the start of its mapping, where prev_size is the offset: 0, but for the bit of huge pages (2.43).
            low, _ = differing(prev_size.to_bytes(self.word, "little"), bytes(self.word))
            told.extent = AddressRange(header + low, told.extent.end)
            told.kind = DamageKind.OVERWRITE
        around = self.patterns.around(told.extent.start, told.extent.byte_count)
        before = self.places.mapped_before(suspicion.listed)
        if (
            before is not None
            and around.before
            and told.extent.start == header
            and around.kind is not PatternKind.ZEROS
        ):
            told.kind, told.culprit = DamageKind.OVERFLOW, before
            told.hold("the same kind of bytes goes on without a break from the mapping before", Strength.HINT, header)
        told.pattern = around.pattern(told.extent.byte_count) if told.kind is not DamageKind.BIT_FLIP else told.pattern
        return told

    def _list_of(self, anomaly: Anomaly) -> FreeList | None:
        """The list that an anomaly is about; its words begin with the list's kind and number."""
        label = anomaly.expected.partition(":")[0]
        for free_list in self.places.heap.free_lists:
            is_it = label == f"{free_list.kind.label} {free_list.number}" and free_list.arena == anomaly.arena
            if is_it and free_list.error:
                return free_list
        return None
