"""What is changed in a core: drawn from a random source, kept as plain writes that can be repeated and made fewer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzzing.structures import SoundCore, Structure

TEXTS = (
    b"\x1b]0;title\x07\x1b[2J\x1b[31m",
    b"<script>alert(1)</script><img src=x onerror=alert(2)>",
    b"/../../../../../../etc/passwd",
    b"/proc/self/mem",
    b"/dev/zero",
    b"/proc/kmsg",
    b"\xff\xfe\xc0\x80\xed\xa0\x80",
    b"=cmd|'/c calc'!A1,\"x\"\r\n@SUM(1)",
    "\u202egnp.exe\u2066\u200b".encode(),
    b"[bold red]markup[/bold red][link=http://x]y[/link]",
    b"a\nb\rc\td",
    b"%s%n%x{0}{x!r}$(id)`id`",
    b"A" * 4000,
    b"/" + b"n" * 300,
)
FILLS = (b"\x00", b"\xff", b"A", b"\xa5", b"\x7fELF", b"\xde\xad\xbe\xef")

EXTREMES = (0, -1, -8, -16, -4096, 1 << 47, 1 << 63, (1 << 63) - 1, (1 << 63) - 16)
"""Where 64-bit numbers overflow when little is added to them, and the first address that is none of a process."""
EXTREMES_32 = (0, -1, -8, -16, -4096, 0xC000_0000, 1 << 31, (1 << 31) - 1, (1 << 31) - 16)
FIRST_FIELDS, SPREAD_FIELDS = 32, 32
"""Of each group: those of its first structures, and others evenly."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """``writes`` are (offset, bytes) in order; then the file is cut to ``size`` bytes, None for not."""

    writes: tuple[tuple[int, bytes], ...]
    size: int | None = None

    def applied_to(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for offset, data in self.writes:
            kept = data[: max(0, len(changed) - offset)]
            changed[offset : offset + len(kept)] = kept
        return bytes(changed if self.size is None else changed[: self.size])

    def as_json(self) -> dict[str, object]:
        return {"writes": [[offset, data.hex()] for offset, data in self.writes], "size": self.size}

    @classmethod
    def from_json(cls, value: dict[str, object]) -> Mutation:
        writes, size = value["writes"], value["size"]
        assert isinstance(writes, list)
        assert size is None or isinstance(size, int)
        return cls(tuple((offset, bytes.fromhex(text)) for offset, text in writes), size)


Writes = list[tuple[int, bytes]]


def mutation_of(core: SoundCore, source: random.Random) -> Mutation:
    """One mutation of a core: mostly one or few changes, sometimes very many."""
    writes: Writes = []
    count = source.choice((1, 1, 1, 1, 2, 2, 3, 4, 6, 12, 30))
    # Changes that belong together (all in one group) reach further than changes all over the place.
    group = source.choice(sorted(core.groups)) if source.random() < 0.5 else None
    for _ in range(count):
        chosen = group or source.choice(sorted(core.groups))
        structure = source.choice(core.groups[chosen])
        how = source.choices(_MUTATORS, _WEIGHTS)[0]
        if chosen == "text" and source.random() < 0.7:
            how = _write_text
        writes += how(core, core.groups[chosen], structure, source)
    size = None
    if source.random() < 0.06:
        size = source.choice(core.boundaries) + source.choice((0, 0, 0, -1, 1, 4, 8))
        if source.random() < 0.3:
            size = source.randrange(len(core.content))
        writes = [] if source.random() < 0.6 else writes
    return Mutation(tuple(writes), None if size is None else max(0, size))


def extreme_mutations(core: SoundCore) -> list[Mutation]:
    """Each of many fields with each extreme value, in an order that is always the same."""
    found = []
    for name in sorted(core.groups):
        fields = [field for structure in core.groups[name] for field in structure.fields]
        spread = fields[FIRST_FIELDS :: max(1, len(fields) // SPREAD_FIELDS)]
        for offset, byte_count in (*fields[:FIRST_FIELDS], *spread):
            for value in EXTREMES if byte_count == 8 else EXTREMES_32:
                data = (value % (1 << 8 * byte_count)).to_bytes(byte_count, "little")
                found.append(Mutation(((offset, data),)))
    random.Random(core.name).shuffle(found)
    return found


def interesting_value(core: SoundCore, old: int, byte_count: int, source: random.Random) -> int:
    """A number that code which trusts it would stumble over."""
    bits = 8 * byte_count
    kind = source.randrange(12)
    if kind < 3 and core.addresses:
        return source.choice(core.addresses) + source.choice((0, 0, 0, 1, 8, 16, -8, -16, 4096, 2 * core.word_bytes))
    if kind == 3:
        return old ^ 1 << source.randrange(bits)
    if kind == 4:
        return old + source.choice((1, -1, 2, 4, 8, 16, -16, 32, 4096, -4096, 1 << 20))
    if kind == 5:
        return source.choice(
            (0, 1, (1 << bits) - 1, 1 << bits - 1, (1 << bits - 1) - 1, (1 << bits) - 16, 1 << bits // 2)
        )
    if kind == 6:
        return source.getrandbits(bits)
    if kind == 7:
        return source.randrange(256)
    if kind == 8:
        return old * source.choice((2, 3, 16, 256, 1 << 16))
    if kind == 9:
        return 1 << source.randrange(bits)
    if kind == 10:
        return old >> source.choice((1, 4, 8, 16))
    # A mangled link (glibc 2.32) has the place's address, shifted, in it.
    address = source.choice(core.addresses) if core.addresses else old
    return address ^ source.choice(core.addresses or [old]) >> 12


def _set_field(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    offset, byte_count = source.choice(structure.fields)
    old = int.from_bytes(core.content[offset : offset + byte_count], "little")
    value = interesting_value(core, old, byte_count, source) % (1 << 8 * byte_count)
    return [(offset, value.to_bytes(byte_count, "little"))]


def _link(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    """A field gets the address of a structure of the same kind: lists that cross, and cycles."""
    offset, byte_count = source.choice(structure.fields)
    target = source.choice(group).address
    if target is None:
        return _set_field(core, group, structure, source)
    target += source.choice((0, 0, 2 * core.word_bytes))
    if source.random() < 0.4 and structure.address is not None:
        target ^= structure.address + offset - structure.offset >> 12
    return [(offset, (target % (1 << 8 * byte_count)).to_bytes(byte_count, "little"))]


def _flip(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    offset = structure.offset + source.randrange(structure.byte_count)
    return [(offset, bytes((core.content[offset] ^ 1 << source.randrange(8),)))]


def _fill(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    start = source.randrange(structure.byte_count)
    length = min(source.choice((1, 2, 4, 8, 16, 24, 64, 256, 4096)), len(core.content) - structure.offset - start)
    pattern = source.choice(FILLS) if source.random() < 0.7 else source.randbytes(8)
    return [(structure.offset + start, (pattern * length)[:length])]


def _copy(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    other = source.choice(group)
    length = min(structure.byte_count, other.byte_count)
    return [(structure.offset, core.content[other.offset : other.offset + length])]


def _shift(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    by = source.choice((1, 4, 8, 16))
    end = min(structure.offset + structure.byte_count + by, len(core.content))
    return [(structure.offset + by, core.content[structure.offset : end - by])]


def _anywhere(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    offset = source.randrange(len(core.content))
    if source.random() < 0.5:
        return [(offset, bytes((core.content[offset] ^ 1 << source.randrange(8),)))]
    return [(offset, source.randbytes(source.choice((1, 2, 8, 64))))]


def _write_text(core: SoundCore, group: list[Structure], structure: Structure, source: random.Random) -> Writes:
    text = source.choice(TEXTS)
    if source.random() < 0.7:
        text = text[: structure.byte_count]
    return [(structure.offset, text)]


_Mutator = Callable[[SoundCore, list[Structure], Structure, random.Random], Writes]
_MUTATORS: tuple[_Mutator, ...] = (_set_field, _link, _flip, _fill, _copy, _shift, _anywhere, _write_text)
_WEIGHTS = (40, 15, 12, 10, 6, 4, 8, 2)
