"""The truth about a fixture's heap: what the process itself knew when it died.

Knows the recorder's log (`fixtures/programs/recorder.c`), how to condense it into a truth file, and
how to read that file. Knows nothing of core files and nothing of the product: a test that compares
the product with this truth compares two independent accounts.
"""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

TRUTH_FORMAT = 1

Addresses = NDArray[np.uint64]
Words = NDArray[np.uint64]


class RecordError(Exception):
    """The record contradicts itself or is incomplete: the run is worth nothing."""


# ---------------------------------------------------------------------------------- truth values


@dataclass(frozen=True, slots=True)
class SizeRow:
    """One `<size>` or `<unsorted>` line: `count` free chunks in one bin.

    For fastbins the bytes are chunk sizes, as they are. For all other bins glibc prints and sums
    the raw size words, flag bits included: each chunk adds 1 (PREV_INUSE) to `total_bytes`, and
    `from_bytes`, `to_bytes` (smallest and largest) are odd.
    """

    from_bytes: int
    to_bytes: int
    total_bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class CountAndBytes:
    """One `<total>` line."""

    count: int
    bytes: int


@dataclass(frozen=True, slots=True)
class HeapInfo:
    """One `<heap>` of malloc_info: an arena, numbered along the arena ring (0: main arena).

    `sizes` holds fastbins first, then small and large bins. `rest` is everything free that is not
    in a fastbin: unsorted, small and large bins and, from glibc 2.31, the top chunk, which adds one
    to the count even when it is tiny. Its bytes are the chunk sizes plus 1 for each binned chunk
    (see SizeRow; top's flag is masked): real bytes = rest.bytes - (rest.count - 1). Blocks cached
    in a tcache count as in use and appear nowhere.
    `system_current` is the arena's system_mem. `subheaps` is None for the main arena.
    """

    nr: int
    sizes: tuple[SizeRow, ...]
    unsorted: SizeRow | None
    fast: CountAndBytes
    rest: CountAndBytes
    system_current: int
    system_max: int
    aspace_total: int
    aspace_mprotect: int
    subheaps: int | None


@dataclass(frozen=True, slots=True)
class MallocInfo:
    """malloc_info(3) as the process wrote it at the seal, parsed; `overall` sums the heaps."""

    heaps: tuple[HeapInfo, ...]
    fast: CountAndBytes
    rest: CountAndBytes
    mmap: CountAndBytes
    system_current: int
    system_max: int
    xml: str


@dataclass(frozen=True, slots=True)
class ThreadTruth:
    """One thread that named itself.

    `arena_address` is 0 for the main arena, None when it was not known. `tcache_address` is the
    payload of its tcache structure, None when there is none or it was not found. A thread that
    exited, or that a fork left behind, is not alive.
    """

    number: int
    tid: int
    alive: bool
    arena_address: int | None
    tcache_address: int | None


@dataclass(frozen=True, slots=True)
class Damage:
    """A word the scenario overwrote: `address` held `original`, at the seal it held `current`."""

    address: int
    original: int
    current: int


@dataclass(frozen=True, slots=True)
class Truth:
    """What one process knew about its heap. All arrays are sorted by address and aligned in groups.

    live_*: every block handed out and not freed, libc's own included, tcache structures excluded.
    `live_requested_bytes` is what the caller asked for, `live_size_word` the raw word before the
    payload (chunk size and flag bits; possibly damaged by the scenario).
    cached_*: every block in the tcache of a live thread, with its owner's tid. Also those that no
    free() of the program put there: remainders that realloc and memalign cut off.
    orphan_cached_*: the same for the tcaches of threads a fork left behind; no TLS leads to them.
    tcache_payload_address / orphan_tcache_payload_address: the structures themselves.
    stale_key_payload_address: freed blocks that carry the tcache key and are in no tcache (their
    thread exited, and glibc does not clear the key then).
    freed_payload_address: addresses last seen freed, cached ones included. They may lie inside a
    larger free or live chunk by now, or in memory given back.
    leak_*: intended leaks; kinds: 1 definite, 2 indirect, 3 possible, 4 cycle (see LEAK_KINDS).
    meant_*: blocks of which the scenario knows what is to be said (see MEANT); `meant_group` numbers blocks that are held or
    lost in the same way, which `groups` names.
    place_*: where the scenario put a block (see PLACES).
    double_freed_payload_address: freed after the seal though not live.
    With `events_recorded` False (big_heap, other allocators) all of these are empty and only
    malloc_info (if the program could write it), maps and notes count.
    """

    case: str
    target: str
    machine: str
    glibc_version: str | None
    made_by: str
    signal: str | None
    coredump_filter: int
    build_flags: tuple[str, ...]
    events_recorded: bool
    live_payload_address: Addresses
    live_requested_bytes: Words
    live_size_word: Words
    cached_payload_address: Addresses
    cached_owner_tid: Words
    orphan_cached_payload_address: Addresses
    orphan_cached_owner_tid: Words
    tcache_payload_address: Addresses
    orphan_tcache_payload_address: Addresses
    stale_key_payload_address: Addresses
    freed_payload_address: Addresses
    leak_payload_address: Addresses
    leak_kind: Words
    meant_payload_address: Addresses
    meant_verdict: Words
    meant_group: Words
    place_payload_address: Addresses
    place_kind: Words
    double_freed_payload_address: Addresses
    damage: tuple[Damage, ...]
    threads: tuple[ThreadTruth, ...]
    malloc_info: MallocInfo | None
    maps: str
    smaps: str
    notes: dict[str, tuple[str, ...]]

    def note(self, name: str) -> str:
        """The one value the program noted under `name`."""
        (value,) = self.notes[name]
        return value

    def note_numbers(self, name: str) -> list[int]:
        """All numbers (decimal or 0x hex) noted under `name`, in order; empty if there are none."""
        return [int(word, 0) for line in self.notes.get(name, ()) for word in line.split()]

    @property
    def groups(self) -> dict[int, str]:
        """What the groups of meant blocks are, by number."""
        lines = (line.split(" ", 1) for line in self.notes.get("group", ()))
        return {int(number): what for number, what in lines}

    def leaks_of(self, kind: str) -> Addresses:
        """Payload addresses of the intended leaks of one kind, a value of LEAK_KINDS."""
        found: Addresses = self.leak_payload_address[self.leak_kind == _key(LEAK_KINDS, kind)]
        return found

    def blocks_meant_for(self, place: str) -> Addresses:
        """Payload addresses the scenario put into one place, a value of PLACES."""
        found: Addresses = self.place_payload_address[self.place_kind == _key(PLACES, place)]
        return found

    @property
    def live_threads(self) -> tuple[ThreadTruth, ...]:
        """The threads that are in the core."""
        return tuple(thread for thread in self.threads if thread.alive)


LEAK_KINDS = {1: "definite", 2: "indirect", 3: "possible", 4: "cycle"}
MEANT = {1: "reachable", 2: "weak", 3: "possible", 4: "indirect", 5: "definite", 6: "ring"}
PLACES = {
    1: "tcache",
    2: "fastbin",
    3: "unsorted",
    4: "small_bin",
    5: "large_bin",
    6: "last_remainder",
    7: "top",
    8: "live",
}


MEANT_COLUMNS = ("meant_payload_address", "meant_verdict", "meant_group")


def _key(names: dict[int, str], wanted: str) -> int:
    return next(number for number, name in names.items() if name == wanted)


# ------------------------------------------------------------------------------ reading the truth


def load_truth(path: Path) -> Truth:
    """Read a truth file, `.truth.json` or `.truth.json.gz`."""
    raw = path.read_bytes()
    document = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
    if document["format"] != TRUTH_FORMAT:
        raise RecordError(f"{path}: truth format {document['format']}, expected {TRUTH_FORMAT}")
    columns = {name: _unpack(packed) for name, packed in document["columns"].items()}
    for name in MEANT_COLUMNS:  # younger than the committed fixtures
        columns.setdefault(name, np.zeros(0, np.uint64))
    xml = _unzip(document["malloc_info_xml"])
    return Truth(
        case=document["case"],
        target=document["target"],
        machine=document["machine"],
        glibc_version=document["glibc_version"],
        made_by=document["made_by"],
        signal=document["signal"],
        coredump_filter=document["coredump_filter"],
        build_flags=tuple(document["build_flags"]),
        events_recorded=document["events_recorded"],
        damage=tuple(Damage(**entry) for entry in document["damage"]),
        threads=tuple(ThreadTruth(**entry) for entry in document["threads"]),
        malloc_info=parse_malloc_info(xml) if xml else None,
        maps=_unzip(document["maps"]),
        smaps=_unzip(document["smaps"]),
        notes={name: tuple(values) for name, values in document["notes"].items()},
        **columns,
    )


def rewrite(source: Path, destination: Path) -> None:
    """Copy a truth file, compressed or not as the suffix of each says."""
    raw = source.read_bytes()
    text = gzip.decompress(raw) if source.suffix == ".gz" else raw
    destination.write_bytes(gzip.compress(text, mtime=0) if destination.suffix == ".gz" else text)


def parse_malloc_info(xml: str) -> MallocInfo:
    """Parse what malloc_info(0, stream) wrote."""
    root = ElementTree.fromstring(xml)
    totals = {total.get("type"): _count_and_bytes(total) for total in root.findall("total")}
    systems = {node.get("type"): int(node.get("size", "0")) for node in root.findall("system")}
    nothing = CountAndBytes(0, 0)
    return MallocInfo(
        heaps=tuple(_heap_info(heap) for heap in root.findall("heap")),
        fast=totals.get("fast", nothing),
        rest=totals.get("rest", nothing),
        mmap=totals.get("mmap", nothing),
        system_current=systems["current"],
        system_max=systems["max"],
        xml=xml,
    )


def _heap_info(heap: ElementTree.Element) -> HeapInfo:
    totals = {total.get("type"): _count_and_bytes(total) for total in heap.findall("total")}
    systems = {node.get("type"): int(node.get("size", "0")) for node in heap.findall("system")}
    spaces = {node.get("type"): int(node.get("size", "0")) for node in heap.findall("aspace")}
    unsorted = heap.find("sizes/unsorted")
    return HeapInfo(
        nr=int(heap.get("nr", "-1")),
        sizes=tuple(_size_row(row) for row in heap.findall("sizes/size")),
        unsorted=_size_row(unsorted) if unsorted is not None else None,
        fast=totals.get("fast", CountAndBytes(0, 0)),
        rest=totals["rest"],
        system_current=systems["current"],
        system_max=systems["max"],
        aspace_total=spaces["total"],
        aspace_mprotect=spaces["mprotect"],
        subheaps=spaces.get("subheaps"),
    )


def _count_and_bytes(node: ElementTree.Element) -> CountAndBytes:
    return CountAndBytes(int(node.get("count", "0")), int(node.get("size", "0")))


def _size_row(node: ElementTree.Element) -> SizeRow:
    return SizeRow(*(int(node.get(name, "0")) for name in ("from", "to", "total", "count")))


# ------------------------------------------------------------------------- condensing the record

_LOG_MAGIC = int.from_bytes(b"CORELOG1", "little")
_LOG_HEADER_BYTES = 32
_EVENT = np.dtype(
    [
        ("pointer", "<u8"),
        ("size", "<u8"),
        ("word", "<u8"),
        ("thread", "<u4"),
        ("kind", "<u4"),
    ]
)
_ALLOCATE, _FREE, _REALLOC_FAILED = 1, 2, 3
_THREAD_START, _THREAD_END, _FORKED = 4, 5, 6
_LEAK, _PLACE, _DAMAGE, _SEAL, _CACHED, _MEANT = 7, 8, 9, 10, 11, 12


def condense(record: Path, destination: Path, facts: dict[str, Any]) -> None:
    """Turn the raw record in directory `record` into a truth file.

    `facts` holds what the maker knows: case, target, machine, made_by, signal, coredump_filter,
    build_flags. Raises RecordError when the log overflowed or contradicts itself.
    """
    notes: dict[str, list[str]] = {}
    for line in (record / "record.notes").read_text().splitlines():
        name, _, value = line.partition(" ")
        notes.setdefault(name, []).append(value)
    events = _read_events(record / "record.events")
    account = _account_of(events)
    document = {
        "format": TRUTH_FORMAT,
        **facts,
        "glibc_version": notes.get("glibc", [None])[0],
        "events_recorded": len(events) > 0,
        "columns": {name: _pack(column) for name, column in account.columns.items()},
        "damage": account.damage,
        "threads": account.threads,
        "malloc_info_xml": _zip((record / "record.malloc_info.xml").read_text()),
        "maps": _zip((record / "record.maps").read_text()),
        "smaps": _zip((record / "record.smaps").read_text()),
        "notes": notes,
    }
    text = json.dumps(document, indent=1, sort_keys=True).encode()
    if destination.suffix == ".gz":
        text = gzip.compress(text, mtime=0)
    destination.write_bytes(text)


@dataclass(frozen=True, slots=True)
class _Account:
    columns: dict[str, Words]
    damage: list[dict[str, int]]
    threads: list[dict[str, Any]]


def _read_events(path: Path) -> NDArray[Any]:
    if path.stat().st_size <= _LOG_HEADER_BYTES:
        return np.zeros(0, _EVENT)
    with path.open("rb") as log:
        header = np.frombuffer(log.read(_LOG_HEADER_BYTES), "<u8")
        capacity = (path.stat().st_size - _LOG_HEADER_BYTES) // _EVENT.itemsize
        count = int(header[1])
        if header[0] != _LOG_MAGIC:
            raise RecordError(f"{path}: not a recorder's log, or the program never started")
        if count > capacity:
            raise RecordError(f"{path}: {count} events, room for {capacity}: enlarge the log")
        events = np.fromfile(log, _EVENT, count)
    if np.any(events["kind"] == 0):
        raise RecordError(f"{path}: an event was reserved and never written")
    events["pointer"] = ~events["pointer"]
    events["word"] = ~events["word"]
    return events


def _account_of(events: NDArray[Any]) -> _Account:
    seals = np.flatnonzero(events["kind"] == _SEAL)
    if len(events) and len(seals) != 1:
        raise RecordError(f"{len(seals)} seals, expected 1: the program did not get to its end")
    seal = int(seals[0]) if len(events) else 0
    before, after = events[:seal], events[seal:]

    live, freed = _live_and_freed(before)
    cached = np.sort(after[after["kind"] == _CACHED], order="pointer")
    after_end = after[np.isin(after["kind"], (_ALLOCATE, _FREE))]
    threads, vanished = _threads(events)
    orphan = np.isin(cached["thread"], list(vanished))
    tid_of = {thread["number"]: thread["tid"] for thread in threads}
    owner_tid = np.array([tid_of[int(number)] for number in cached["thread"]], np.uint64)

    keys = np.unique(cached["word"])
    carries_key = np.isin(freed["word"], keys)
    is_cached = np.isin(freed["pointer"], cached["pointer"])
    _check(live, cached, after_end, seal, after)
    unknown = [thread["tid"] for thread in threads if thread["alive"] and not thread["tcache_address"]]
    if unknown and any(thread["tcache_address"] for thread in threads):
        raise RecordError(f"threads {unknown} did not find their tcache: their blocks are missing")

    meant = _last_by_address(before[before["kind"] == _MEANT])
    meant = meant[meant["size"] != 0]
    if not np.all(np.isin(meant["pointer"], live["pointer"])):
        raise RecordError("something is meant to be said of a block that is not live")
    marks = {kind: np.sort(before[before["kind"] == kind], order="pointer") for kind in (_LEAK, _PLACE)}
    return _Account(
        columns={
            "live_payload_address": live["pointer"],
            "live_requested_bytes": live["size"],
            "live_size_word": live["word"],
            "cached_payload_address": cached["pointer"][~orphan],
            "cached_owner_tid": owner_tid[~orphan],
            "orphan_cached_payload_address": cached["pointer"][orphan],
            "orphan_cached_owner_tid": owner_tid[orphan],
            "tcache_payload_address": _tcaches(threads, vanished, vanished_ones=False),
            "orphan_tcache_payload_address": _tcaches(threads, vanished, vanished_ones=True),
            "stale_key_payload_address": freed["pointer"][carries_key & ~is_cached],
            "freed_payload_address": freed["pointer"],
            "leak_payload_address": marks[_LEAK]["pointer"],
            "leak_kind": marks[_LEAK]["size"],
            "meant_payload_address": meant["pointer"],
            "meant_verdict": meant["size"],
            "meant_group": meant["word"],
            "place_payload_address": marks[_PLACE]["pointer"],
            "place_kind": marks[_PLACE]["size"],
            "double_freed_payload_address": np.unique(
                after_end["pointer"][~np.isin(after_end["pointer"], live["pointer"])]
            ),
        },
        damage=[
            {"address": int(e["pointer"]), "original": int(e["size"]), "current": int(e["word"])}
            for e in events[events["kind"] == _DAMAGE]
        ],
        threads=threads,
    )


def _live_and_freed(events: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The last of the events that say whether an address is live, divided into allocations and frees."""
    heap = events[np.isin(events["kind"], (_ALLOCATE, _FREE, _REALLOC_FAILED))]
    failed = np.flatnonzero(heap["kind"] == _REALLOC_FAILED)
    for index in failed:
        # The block is live again, with what its last allocation said.
        earlier = np.flatnonzero(
            (heap["pointer"][:index] == heap["pointer"][index]) & (heap["kind"][:index] == _ALLOCATE)
        )
        heap[index] = heap[earlier[-1]]
    last = _last_by_address(heap)
    return last[last["kind"] == _ALLOCATE], last[last["kind"] == _FREE]


def _last_by_address(events: NDArray[Any]) -> NDArray[Any]:
    """The last event of every address, by address."""
    _, last_from_end = np.unique(events["pointer"][::-1], return_index=True)
    return events[len(events) - 1 - last_from_end]


def _threads(events: NDArray[Any]) -> tuple[list[dict[str, Any]], set[int]]:
    """Every named thread, and the numbers of those a fork left behind."""
    ended = set(events["thread"][events["kind"] == _THREAD_END].tolist())
    threads: dict[int, dict[str, Any]] = {}
    for event in events[events["kind"] == _THREAD_START]:
        number = int(event["thread"])
        threads[number] = {
            "number": number,
            "tid": int(event["size"]),
            "alive": number not in ended,
            "arena_address": int(event["pointer"]),
            "tcache_address": int(event["word"]) or None,
        }
    vanished: set[int] = set()
    for event in events[events["kind"] == _FORKED]:
        survivor = int(event["thread"])
        vanished = {n for n in threads if n != survivor and threads[n]["alive"]}
        threads[survivor]["tid"] = int(event["size"])
        for number in vanished:
            threads[number]["alive"] = False
    return list(threads.values()), vanished


def _tcaches(threads: list[dict[str, Any]], vanished: set[int], *, vanished_ones: bool) -> Addresses:
    addresses = [
        thread["tcache_address"]
        for thread in threads
        if thread["tcache_address"] is not None and (thread["number"] in vanished if vanished_ones else thread["alive"])
    ]
    return np.sort(np.array(addresses, np.uint64))


def _check(live: NDArray[Any], cached: NDArray[Any], late: NDArray[Any], seal: int, after: NDArray[Any]) -> None:
    """Refuse a record that contradicts itself."""
    if np.any(np.isin(cached["pointer"], live["pointer"])):
        raise RecordError("a block is cached and live at once")
    if len(np.unique(cached["pointer"])) != len(cached):
        raise RecordError("a block is cached twice: a list ran in a circle, or heaps changed")
    if np.any(late["kind"] == _ALLOCATE):
        raise RecordError(f"something was allocated after the seal (event {seal} and later)")
    position = np.flatnonzero(after["kind"] == _CACHED)
    frees = np.flatnonzero(after["kind"] == _FREE)
    if len(position) and len(frees) and frees[0] < position[-1]:
        raise RecordError("something was freed while the record was being sealed")
    ends = live["pointer"] + live["size"]
    if np.any(ends[:-1] > live["pointer"][1:]):
        raise RecordError("two live blocks overlap")
    inside = np.searchsorted(live["pointer"], cached["pointer"], "right") - 1
    valid = inside >= 0
    if np.any(ends[inside[valid]] > cached["pointer"][valid]):
        raise RecordError("a cached block lies inside a live one")


# ----------------------------------------------------------------------------------- file format


def _pack(column: NDArray[Any]) -> dict[str, Any]:
    """Sorted addresses have small differences: they compress tenfold."""
    values = column.astype("<u8")
    differences = np.diff(values, prepend=np.zeros(1, "<u8")).astype("<u8")
    data = base64.b64encode(zlib.compress(differences.tobytes(), 9)).decode()
    return {"encoding": "base64 zlib difference u64", "count": len(values), "data": data}


def _unpack(packed: dict[str, Any]) -> Words:
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    values = np.cumsum(np.frombuffer(raw, "<u8"), dtype=np.uint64)
    if len(values) != packed["count"]:
        raise RecordError(f"a column has {len(values)} values, expected {packed['count']}")
    values.flags.writeable = False
    return values


def _zip(text: str) -> str:
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _unzip(text: str) -> str:
    return zlib.decompress(base64.b64decode(text)).decode()
