"""Names of Java threads, from their objects in the Java heap.

Knows: how an object tells its class, and that java.lang.Thread and java.lang.String have one field each that matters: the only
String of a Thread, the only array of a String. Where these fields are is found by looking at several threads at once, because
HotSpot's tables do not tell. Does not know: any other object; nothing but names of threads is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from coreheap.accounting.java.tables import VmTables
from coreheap.corefile import AddressSpace
from coreheap.errors import MemoryFault

FLAGS: Final = ("UseCompressedOops", "UseCompressedClassPointers", "CompactStrings")
SAMPLE: Final = 64
"""Threads that are asked where their name is."""
OBJECT_LIMIT: Final = 256
"""Bytes of an object that are looked at."""
NAME_LIMIT: Final = 256
CONTROL_END: Final = 32


class ThreadNames:
    """Reads names through one VM's tables."""

    def __init__(self, memory: AddressSpace, tables: VmTables) -> None:
        self._memory = memory
        flags = tables.flags(*FLAGS)
        self._reference_bytes = 4 if flags.get("UseCompressedOops", 0) & 0xFF else 8
        self._class_bytes = 4 if flags.get("UseCompressedClassPointers", 0) & 0xFF else 8
        # Before JEP 254 (JDK 9) strings were arrays of char, and the option did not exist.
        self._is_compact = "CompactStrings" in flags
        self._oop_base = tables.static_word(*_either("CompressedOops", "Universe", "_narrow_oop._base")) or 0
        self._oop_shift = (tables.static_word(*_either("CompressedOops", "Universe", "_narrow_oop._shift")) or 0) & 0x3F
        self._class_base = (
            tables.static_word(*_either("CompressedKlassPointers", "Universe", "_narrow_klass._base")) or 0
        )
        self._class_shift = (
            tables.static_word(*_either("CompressedKlassPointers", "Universe", "_narrow_klass._shift")) or 0
        ) & 0x3F
        self._class_at = tables.offset(("oopDesc", "_metadata._compressed_klass"), ("oopDesc", "_metadata._klass")) or 8
        self._string_class = tables.static_word_of("String_klass_knum")

    def of_objects(self, objects: Mapping[int, int]) -> dict[int, str]:
        """The names of threads by what ``objects`` has for each: the word of JavaThread::_threadObj.

        That is a handle since JDK 16, and was the object itself before. Threads whose name is not in the core are missing.
        """
        if not self._string_class:
            return {}
        handles = {key: self._number(word, self._memory.word_bytes) or 0 for key, word in objects.items()}
        found = [self._names(each) for each in (handles, dict(objects))]
        return max(found, key=len)

    def _names(self, objects: Mapping[int, int]) -> dict[int, str]:
        sample = list(objects.values())[:SAMPLE]
        name_at = self._field(sample, lambda target: self._class_of(target) == self._string_class)
        if name_at is None:
            return {}
        strings = {key: self._reference(thread + name_at) for key, thread in objects.items()}
        array_class = Counter(
            self._class_of(target)
            for string in list(strings.values())[:SAMPLE]
            for target in self._targets(string)
            if self._length(target) is not None
        )
        array_class.pop(0, None)
        if not array_class:
            return {}
        ((expected, _),) = array_class.most_common(1)
        value_at = self._field(list(strings.values())[:SAMPLE], lambda target: self._class_of(target) == expected)
        if value_at is None:
            return {}
        texts = {key: self._text(self._reference(string + value_at)) for key, string in strings.items() if string}
        return {key: text for key, text in texts.items() if text}

    def _field(self, objects: Sequence[int], fits: object) -> int | None:
        """The first offset at which the most objects have a reference that fits, and at least half of them."""
        assert callable(fits)
        votes: Counter[int] = Counter()
        for start in objects:
            for at in self._offsets():
                target = self._reference(start + at) if start else 0
                if target and fits(target):
                    votes[at] += 1
        if not votes:
            return None
        at, count = min(votes.items(), key=lambda item: (-item[1], item[0]))
        return at if 2 * count >= len(objects) else None

    def _offsets(self) -> Iterable[int]:
        start = self._class_at + self._class_bytes
        return range(start + -start % self._reference_bytes, OBJECT_LIMIT, self._reference_bytes)

    def _targets(self, start: int) -> Iterable[int]:
        # A String is small: its value, its hash and two bytes.
        for at in list(self._offsets())[:3]:
            target = self._reference(start + at) if start else 0
            if target:
                yield target

    def _class_of(self, target: int) -> int:
        number = self._number(target + self._class_at, self._class_bytes) or 0
        return self._class_base + (number << self._class_shift) if number and self._class_bytes == 4 else number

    def _reference(self, place: int) -> int:
        number = self._number(place, self._reference_bytes) or 0
        return self._oop_base + (number << self._oop_shift) if number and self._reference_bytes == 4 else number

    def _length(self, array: int) -> int | None:
        """The length of an array, None where it cannot be a name's."""
        length = self._number(array + self._class_at + self._class_bytes, 4)
        return length if length is not None and 0 < length <= NAME_LIMIT * 4 else None

    def _text(self, array: int) -> str:
        length = self._length(array) if array else None
        if length is None:
            return ""
        data_at = self._class_at + self._class_bytes + 4
        data_at += -data_at % (8 if self._class_bytes == 8 else 4)
        try:
            content = self._memory.read(array + data_at, min(length * (1 if self._is_compact else 2), 2 * NAME_LIMIT))
        except MemoryFault:
            return ""
        # Latin-1 where all characters allow it; names have no NULs, and most of UTF-16's second bytes are some.
        is_wide = not self._is_compact or (len(content) % 2 == 0 and b"\0" in content)
        text = content.decode("utf-16-le" if is_wide else "latin-1", "replace")
        return text[:NAME_LIMIT] if all(ord(character) >= CONTROL_END for character in text) else ""

    def _number(self, place: int, byte_count: int) -> int | None:
        if not 0 < place < 1 << 64:
            return None
        try:
            return int.from_bytes(self._memory.read(place, byte_count), "little")
        except MemoryFault:
            return None


def _either(structure: str, older: str, field: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """A static field by the structure that has it now, and by the one that had it."""
    return (structure, field), (older, field)
