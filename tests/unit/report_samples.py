"""Reports built by hand, for tests of renderings and of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from coreheap.crash import (
    AbortKind,
    AbortMessage,
    CrashContext,
    FaultKind,
    Frame,
    FrameSource,
    PlaceNote,
    RegisterNote,
    StaleUse,
    StaleUseKind,
    WrongFree,
    WrongFreeKind,
)
from coreheap.damage import ChunkPlace, Damage, DamagedPlace, DamageKind, Pattern, PatternKind, Repair
from coreheap.evidence import Anomaly, Confidence, Evidence, Gap, Strength
from coreheap.heap import (
    NO_INDEX,
    AllocatorIdentity,
    Arena,
    ChunkBatch,
    ChunkRegion,
    ChunkState,
    ChunkTable,
    FreeList,
    HeapSnapshot,
    MallocParameters,
    RegionKind,
    StateTotal,
    StateTotals,
    SubHeap,
    ThreadCache,
    UnattributedRange,
    sum_of_totals,
)
from coreheap.leaks import (
    VERDICTS,
    Accumulation,
    ChunkView,
    Explanation,
    LeakGroup,
    LeakReport,
    OwnerNode,
    Place,
    Reference,
    RetainedChunk,
    RetainedReport,
    RootKind,
    RootSummary,
    Verdict,
    VerdictTotal,
)
from coreheap.mappings import KINDS, UNKNOWN_FLAGS, MappingKind, MappingTable, ResidencyBasis
from coreheap.quantities import GIB, KIB, MIB, AddressRange
from coreheap.report import (
    CoreSummary,
    Finding,
    LedgerNode,
    Phase,
    ProcessSummary,
    Quantity,
    Report,
    Severity,
    ThreadSummary,
    Unit,
    VerdictItem,
)

HOSTILE = "\x1b[31mred\x1b[0m [bold]x[/bold] \u202eevil\u202c\nnext\rline\x00\udc80 ]0;t\x07 {a} %s"
"""Text as a hostile core may hold it: colours, markup, bidirectional overrides, newlines, undecodable bytes."""


@dataclass(frozen=True, slots=True)
class SampleChunks:
    """Stands in for ``ChunkTable``: gives the batches it was made of."""

    parts: tuple[ChunkBatch, ...]
    regions: tuple[ChunkRegion, ...] = ()

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def batches(self) -> Iterator[ChunkBatch]:
        return iter(self.parts)


def batch(
    start: int,
    sizes: list[int],
    states: list[int],
    *,
    arena: int = 0,
    sub_heap: int = NO_INDEX,
    is_mmapped: bool = False,
    first_chunk: int = 0,
    verdicts: list[int] | None = None,
) -> ChunkBatch:
    """A batch of chunks that tile the memory from ``start`` on."""
    chunk_bytes = np.array(sizes, dtype=np.uint64)
    header = np.uint64(start) + np.concatenate((np.zeros(1, np.uint64), np.cumsum(chunk_bytes)[:-1]))
    return ChunkBatch(
        first_chunk,
        header,
        header + np.uint64(16),
        chunk_bytes,
        chunk_bytes - np.uint64(16 if is_mmapped else 8),
        np.array(states, dtype=np.uint8),
        arena,
        sub_heap,
        is_mmapped,
        None if verdicts is None else np.array(verdicts, dtype=np.uint8),
    )


def totals(**parts: tuple[int, int]) -> StateTotals:
    """Totals by state label, each (count, chunk_bytes); usable is what the size words leave."""
    made = {state: StateTotal() for state in ChunkState}
    for label, (count, chunk_bytes) in parts.items():
        usable = 0 if label == "fencepost" else chunk_bytes - 8 * count
        made[ChunkState[label.upper()]] = StateTotal(count, chunk_bytes, usable)
    return made


def sub_heap(address: int, committed: int, *, is_first: bool) -> SubHeap:
    return SubHeap(address, committed, committed, 64 * MIB, 2232 if is_first else 48, is_first, committed, None)


def main_arena() -> Arena:
    return Arena(
        index=0,
        address=0x7F3A5BFF1C80,
        is_main=True,
        is_contiguous=True,
        locked=False,
        attached_threads=1,
        threads=(0,),
        on_free_list=False,
        system_mem=12 * MIB,
        max_system_mem=14 * MIB,
        top_address=0x5599E0A1F000,
        top_bytes=132 * KIB,
        sub_heaps=(),
        regions=(0,),
        totals=totals(
            in_use=(40_000, 8 * MIB),
            tcache=(120, 20 * KIB),
            fastbin=(300, 24 * KIB),
            unsorted_bin=(1, 64 * KIB),
            small_bin=(900, 1 * MIB),
            large_bin=(12, 2 * MIB),
            top=(1, 132 * KIB),
            allocator_own=(1, 656),
        ),
        unattributed=(),
        brk_range=None,
        foreign_bytes=0,
        saved_bytes=12 * MIB,
        coverage=1.0,
    )


def thread_arena(index: int, threads: tuple[int, ...] = (), **changes: Any) -> Arena:
    address = 0x7F3A10000000 + index * 64 * MIB
    arena = Arena(
        index=index,
        address=address + 48,
        is_main=False,
        is_contiguous=False,
        locked=index == 2,
        attached_threads=len(threads),
        threads=threads,
        on_free_list=not threads,
        system_mem=(40 - index) * MIB,
        max_system_mem=60 * MIB,
        top_address=address + 39 * MIB,
        top_bytes=1 * MIB - index * 16,
        sub_heaps=(sub_heap(address, (40 - index) * MIB, is_first=True),),
        regions=(index,),
        totals=totals(
            in_use=(1_000 * index, index * MIB),
            tcache=(7, 560),
            large_bin=(3, (36 - index) * MIB),
            top=(1, 1 * MIB - index * 16),
        ),
        unattributed=(),
        brk_range=None,
        foreign_bytes=0,
        saved_bytes=(40 - index) * MIB,
        coverage=1.0,
    )
    return dataclasses.replace(arena, **changes)


def identity() -> AllocatorIdentity:
    return AllocatorIdentity(
        name="glibc ptmalloc2",
        libc_version="2.36",
        layout="glibc-2.27..2.42 64-bit",
        runner_up="glibc-2.23..2.26 64-bit (score 0.12 against 0.99)",
        main_arena=0x7F3A5BFF1C80,
        mp=0x7F3A5BFF1700,
        evidence=(
            Evidence("symbol main_arena", "symbol table of libc.so.6", Strength.PROOF, 0x7F3A5BFF1C80),
            Evidence("12 of 12 sub-heaps lead into the ring", "sub-heap headers", Strength.SOLID),
            Evidence("the version banner was not saved", "libc data", Strength.HINT, speaks_against=True),
        ),
        confidence=Confidence.STRONG,
    )


def heap(arenas: tuple[Arena, ...], parts: tuple[ChunkBatch, ...] = ()) -> HeapSnapshot:
    regions = []
    for arena in arenas:
        kind = RegionKind.BRK if arena.is_main else RegionKind.ARENA_HEAP
        start = 0x5599E0000000 if arena.is_main else arena.sub_heaps[0].address
        end = start + (arena.system_mem or 0)
        sub = NO_INDEX if arena.is_main else 0
        regions.append(ChunkRegion(arena.index, kind, arena.index, sub, AddressRange(start, end), 0, 10, arena.totals))
    return HeapSnapshot(
        identity=identity(),
        parameters=MallocParameters(
            0x7F3A5BFF1700, "2.35", {"trim_threshold": 131072, "mmap_threshold": 4 * MIB, "sbrk_base": 0x5599E0000000}
        ),
        arenas=arenas,
        chunks=cast(ChunkTable, SampleChunks(parts, tuple(regions))),
        free_lists=(
            FreeList(ChunkState.TCACHE, 0, None, 0, 32, 32, 7, 224, 7),
            FreeList(ChunkState.FASTBIN, 1, 0, None, 48, 48, 0, 0),
            FreeList(ChunkState.UNSORTED_BIN, 1, 0, None, 32, 1 << 27, 1, 65536),
            FreeList(ChunkState.LARGE_BIN, 64, 1, None, 1024, 1087, 3, 3072, None, "cycle", 0x7F3A14000010),
        ),
        thread_caches=(ThreadCache(0, 0x5599E0000010, 0, 0, 120, 20 * KIB),),
        narenas_limit=64,
        limit_reason="8 CPUs",
        anomalies=(),
        anomaly_count=0,
        gaps=(),
        totals=sum_of_totals(arena.totals for arena in arenas),
        mmapped_totals=totals(in_use=(3, 24 * MIB)),
        mmapped_count=3,
        mmapped_bytes=24 * MIB,
    )


def ledger() -> LedgerNode:
    arenas = LedgerNode.of(
        "malloc_arenas",
        LedgerNode.of(
            "chunks",
            LedgerNode("in_use", 60 * MIB),
            LedgerNode("tcache", 12 * KIB),
            LedgerNode("large_bin", 390 * MIB),
            LedgerNode("top", 11 * MIB),
        ),
        LedgerNode("sub_heap_reserve", 300 * MIB),
        LedgerNode("unexplained", 0),
    )
    modules = LedgerNode.of(
        "modules", *(LedgerNode(f"lib{number}.so", (number + 1) * 100 * KIB) for number in range(16))
    )
    return LedgerNode.of(
        "address_space",
        arenas,
        LedgerNode("mmapped_chunks", 24 * MIB),
        LedgerNode("thread_stacks", 96 * MIB, (), 95 * MIB, 95 * MIB, 1 * MIB, 2 * MIB),
        modules,
        LedgerNode("other_anonymous", 1 * GIB),
    )


def finding(code: str = "ARENA-BLOAT", severity: Severity = Severity.WARNING) -> Finding:
    return Finding(
        code=code,
        severity=severity,
        confidence=Confidence.STRONG,
        subject="12 non-main arenas",
        quantities=(
            Quantity("arenas", 12, Unit.COUNT),
            Quantity("reserved_bytes", 768 * MIB, Unit.BYTES),
            Quantity("committed_bytes", 402 * MIB, Unit.BYTES),
            Quantity("in_use_bytes", 78 * MIB, Unit.BYTES),
            Quantity("free_bytes", 323 * MIB, Unit.BYTES),
            Quantity("free_share", 0.8034, Unit.SHARE),
            Quantity("largest_arena_address", 0x7F3A14000030, Unit.ADDRESS),
            Quantity("arena_limit", None, Unit.COUNT),
            Quantity("arena_limit_reason", "MALLOC_ARENA_MAX is not set", Unit.TEXT),
        ),
        evidence=(
            Evidence("12 sub-heaps of 12 arenas commit 402 MiB", "sub-heap headers", Strength.PROOF, 0x7F3A14000000),
            Evidence("not every sub-heap could be walked to its end", "chunk walk", Strength.HINT, None, True),
        ),
        next_steps=(
            "set MALLOC_ARENA_MAX=2 and restart; threads then share arenas and may wait for each other's locks",
            "call malloc_trim(0) in the process",
        ),
        weakened_by=("reserved address space costs no memory by itself",),
    )


def group(number: int = 0, verdict: Verdict = Verdict.DEFINITELY_LOST, **changes: Any) -> LeakGroup:
    """4,000 chunks of 72 bytes that lead to 8,000 more; ``changes`` replace fields."""
    made = LeakGroup(
        number=number,
        verdict=verdict,
        type=None,
        smallest_bytes=72,
        largest_bytes=72,
        count=4_000,
        usable_bytes=288_000,
        indirect_count=8_000,
        indirect_bytes=896_000,
        arenas=((3, 3_990), (None, 10)),
        samples=(0x7F3A140008D0, 0x7F3A14000CE0),
        holder=None,
    )
    return dataclasses.replace(made, **changes)


def leaks(*groups: LeakGroup, **changes: Any) -> LeakReport:
    """Verdicts whose sums are those of the groups, and 100 MiB still reachable; ``changes`` replace fields."""
    sums = {verdict: VerdictTotal() for verdict in VERDICTS}

    def add(verdict: Verdict, count: int, usable_bytes: int) -> None:
        before = sums[verdict]
        sums[verdict] = VerdictTotal(before.count + count, before.usable_bytes + usable_bytes)

    add(Verdict.STILL_REACHABLE, 100_000, 100 * MIB)
    for part in groups:
        add(part.verdict, part.count, part.usable_bytes)
        add(Verdict.INDIRECTLY_LOST, part.indirect_count, part.indirect_bytes)
    lost = (sums[Verdict.DEFINITELY_LOST], sums[Verdict.INDIRECTLY_LOST])
    made = LeakReport(
        totals=sums,
        groups=groups,
        group_count=len(groups),
        roots=(RootSummary(RootKind.MODULE_DATA, 283_432, 52), RootSummary(RootKind.REGISTER, 0, 3)),
        edge_count=250_000,
        missing_root_bytes=0,
        missing_shared_bytes=0,
        unreachable=VerdictTotal(sum(part.count for part in lost), sum(part.usable_bytes for part in lost)),
    )
    return dataclasses.replace(made, **changes)


def suspects() -> LeakReport:
    """Groups of every kind of suspect."""
    possible = group(
        1,
        Verdict.POSSIBLY_LOST,
        type="std::string",
        smallest_bytes=16 * KIB,
        largest_bytes=32 * KIB - 8,
        count=12,
        usable_bytes=300 * KIB,
        indirect_count=0,
        indirect_bytes=0,
        holder="libfoo.so cache+0x10",
    )
    weak = group(2, Verdict.WEAKLY_HELD, count=1, usable_bytes=72, indirect_count=0, indirect_bytes=0, samples=())
    return leaks(group(), possible, weak, missing_shared_bytes=4 * MIB)


def chunk_view(payload: int = 0x7F3A140008D0, usable: int = 72, **changes: Any) -> ChunkView:
    made = ChunkView(
        7, payload - 16, payload, usable + 8, usable, "in_use", False, 3, Verdict.STILL_REACHABLE, "struct node"
    )
    return dataclasses.replace(made, **changes)


def explanation() -> Explanation:
    """A chunk that a table holds, which a variable holds."""
    table = chunk_view(0x7F3A14010010, 32_776, type=None)
    node = chunk_view()
    variable = Place(RootKind.MODULE_DATA, 0x7F3A5BFF1C80, "libfoo.so cache", None)
    register = Place(RootKind.REGISTER, None, "thread 0 rdi", 0)
    return Explanation(
        address=node.payload_address + 8,
        region="arena 3",
        permissions="rw-",
        is_saved=True,
        chunk=node,
        offset=8,
        before=chunk_view(0x7F3A14000880, 56, state="tcache", verdict=Verdict.NONE, type=None),
        holders=(Reference(register, 0, node, 16), Reference(table, 24, node, 0)),
        holder_count=40,
        targets=(Reference(node, 0, table, 32),),
        target_count=1,
        path=(Reference(variable, 0, table, 0), Reference(table, 24, node, 0)),
        retained_bytes=72,
        retained_count=1,
    )


def owner_nodes() -> tuple[OwnerNode, ...]:
    """A table above a node, and a variable above the table, which the node holds as well."""
    told = explanation()
    table = told.path[1]
    return (
        OwnerNode(told.holders[0]),
        OwnerNode(table, (OwnerNode(told.path[0]), OwnerNode(told.targets[0], seen_before=True)), omitted=2),
    )


def retained() -> RetainedReport:
    return RetainedReport(
        top=(
            RetainedChunk(chunk_view(0x7F3A14010010, 32_776), 60 * MIB, 120_001, "libfoo.so cache"),
            RetainedChunk(chunk_view(), 72, 1, None),
        ),
        accumulations=(
            Accumulation(
                chunk_view(0x7F3A14010010, 32_776), 60 * MIB, 60_000, 56, 59 * MIB, (0x7F3A140008D0, 0x7F3A140009D0)
            ),
            Accumulation("libfoo.so cache", 5 * MIB, 100, 72, 4 * MIB, (0x7F3A140008D0,)),
        ),
        reachable_bytes=100 * MIB,
    )


def mappings(basis: ResidencyBasis = ResidencyBasis.HOLES) -> MappingTable:
    """Mappings of several kinds and owners; one name is hostile, one mapping is told by NT_FILE alone."""
    rows = (
        # start, size, kind, flags, thread, arena, name, committed, saved, resident: at least and at most, in pages
        (0x5599DF000000, 40, MappingKind.MODULE_TEXT, 5, -1, -1, 0, 40, 0, 0, 40),
        (0x5599E0000000, 33, MappingKind.MAIN_ARENA, 6, -1, 0, -1, 33, 33, 30, 30),
        (0x7F3A14000000, 20_000, MappingKind.ARENA_HEAP, 6, -1, 1, -1, 20_000, 20_000, 19_000, 19_000),
        (0x7F3A18E20000, 96_000, MappingKind.ARENA_RESERVE, 0, -1, 1, -1, 0, 0, 0, 0),
        (0x7F3A60000000, 40, MappingKind.MMAPPED_CHUNK, 6, -1, -1, -1, 40, 40, 2, 2),
        (0x7F3A60028000, 1_025, MappingKind.MMAPPED_CHUNK, 6, -1, -1, -1, 1_025, 1_025, 1_025, 1_025),
        (0x7F3A70000000, 1, MappingKind.STACK_GUARD, 0, 3, -1, -1, 0, 0, 0, 0),
        (0x7F3A70001000, 2_048, MappingKind.THREAD_STACK, 6, 3, -1, -1, 2_048, 2_048, 4, 4),
        (0x7F3A80000000, 16, MappingKind.MAPPED_FILE, UNKNOWN_FLAGS, -1, -1, 1, 16, 0, 0, 16),
        (0x7FFC00000000, 34, MappingKind.MAIN_STACK, 6, 0, -1, -1, 34, 34, 5, 5),
    )
    columns = list(zip(*rows, strict=True))
    start = np.array(columns[0], np.uint64)
    committed, saved, low, high = (np.array(column, np.uint64) * np.uint64(4096) for column in columns[7:])
    return MappingTable(
        start=start,
        end=start + np.array(columns[1], np.uint64) * np.uint64(4096),
        kind=np.array([KINDS.index(kind) for kind in columns[2]], np.uint8),
        flags=np.array(columns[3], np.uint8),
        thread=np.array(columns[4], np.int32),
        arena=np.array(columns[5], np.int32),
        name=np.array(columns[6], np.int32),
        committed_bytes=committed,
        saved_bytes=saved,
        resident_low=low,
        resident_high=high,
        names=("/usr/sbin/serviced", "/tmp/\x1b[31m,red\n\u202efile"),
        basis=basis,
    )


def report(**changes: Any) -> Report:
    """A process with 13 arenas, of which most is retained; ``changes`` replace fields."""
    arenas = (main_arena(), *(thread_arena(index, (index,) if index % 2 else ()) for index in range(1, 13)))
    parts = (
        batch(0x5599E0000290, [32, 48, 64, 4096], [0, 1, 0, 5], verdicts=[1, 0, 5, 0]),
        batch(0x7F3A140008C0, [1040, 80, 32], [0, 2, 6], arena=1, sub_heap=0, first_chunk=4, verdicts=[4, 0, 0]),
        batch(
            0x7F3A60000000,
            [135168, 4198400],
            [0, 0],
            arena=NO_INDEX,
            is_mmapped=True,
            first_chunk=7,
            verdicts=[3, 2],
        ),
    )
    snapshot = heap(arenas, parts)
    made = Report(
        tool_version="0.1.0",
        kernels="compiled",
        core=CoreSummary("core.4242", 700 * MIB, 650 * MIB, False, 1.0, None, "kernel", 321, 50 * MIB),
        process=ProcessSummary(
            4242, "/usr/sbin/serviced --workers 12", "/usr/sbin/serviced", "x86_64", 8, 4096, 6, "SIGABRT", None, 13
        ),
        threads=tuple(
            ThreadSummary(
                number,
                4242 + number,
                0,
                0x7FFC00000000 - number * MIB,
                0x7F3A5BE00000,
                0x7F3A5BD00000,
                number if number % 2 or not number else None,
                number or None,
                7,
                560,
                name=None if number else "serviced",
                name_source=None if number else "comm",
                start_routine="worker_main in serviced" if number else None,
                is_main=number == 0,
                stack_start=0x7FFC00000000 - number * MIB - (8 * MIB if number else 132 * KIB),
                stack_end=0x7FFC00000000 - number * MIB + 4 * KIB,
                stack_source="descriptor" if number else "initial_stack",
                guard_bytes=4 * KIB if number else None,
                stack_used_bytes=None if number == 5 else 4 * KIB,
                stack_resident_bytes=None if number == 6 else 32 * KIB,
                stack_peak_bytes=None if number == 6 else 40 * KIB,
                on_signal_stack=number == 7,
            )
            for number in range(13)
        ),
        heap=snapshot,
        totals=sum_of_totals(iter((snapshot.totals, snapshot.mmapped_totals))),
        ledger=ledger(),
        findings=(finding("RETAINED-FREE", Severity.INFO), finding()),
        verdict=(
            VerdictItem("retained_free", 402 * MIB, 480 * MIB, "malloc_memory", Confidence.CERTAIN),
            VerdictItem(
                "not_malloc",
                1 * GIB,
                2 * GIB,
                "address_space",
                Confidence.PLAUSIBLE,
                ("1 contradictions in the heap's own data: the borders and states of chunks around them are not sure",),
            ),
        ),
        anomalies=(Anomaly("size_not_aligned", 0x7F3A14001230, "a multiple of 16", "0x4141414141414141", 1),),
        anomaly_count=1,
        gaps=(
            Gap("not_saved", "chunks of arena 3 behind it are unknown", AddressRange(0x7F3A1C400000, 0x7F3A1C600000)),
            Gap("no_executable", "types cannot be named"),
        ),
        phases=(Phase("read the core", 0.013, 0.02, 24 * MIB), Phase("walk the heap", 0.2, 0.21, None)),
        is_partial=True,
        leaks=suspects(),
        retained=retained(),
        mappings=mappings(),
    )
    return dataclasses.replace(made, **changes)


def small_report() -> Report:
    """One thread, one arena, nothing to complain about."""
    arenas = (main_arena(),)
    return report(
        heap=dataclasses.replace(heap(arenas), mmapped_count=0, mmapped_bytes=0, mmapped_totals={}),
        totals=main_arena().totals,
        threads=(),
        findings=(),
        verdict=(VerdictItem("in_use", 8 * MIB, 12 * MIB, "malloc_memory", Confidence.CERTAIN),),
        anomalies=(),
        anomaly_count=0,
        gaps=(),
        is_partial=False,
        leaks=leaks(),
        retained=None,
    )


def heapless_report() -> Report:
    """A core without any glibc heap that could be read."""
    return report(
        heap=None,
        totals={},
        threads=(),
        findings=(
            dataclasses.replace(
                finding("OTHER-ALLOCATOR"),
                subject="jemalloc",
                quantities=(
                    Quantity("allocator", "jemalloc", Unit.TEXT),
                    Quantity("glibc_in_use_bytes", 0, Unit.BYTES),
                    Quantity("glibc_heap_nearly_empty", "true", Unit.TEXT),
                ),
            ),
        ),
        verdict=(),
        anomalies=(),
        anomaly_count=0,
        other_allocators=("jemalloc",),
        leaks=None,
        retained=None,
    )


def damaged_report() -> Report:
    """Unknown values everywhere they are allowed, and hostile text everywhere text can stand."""
    arena = thread_arena(
        1,
        address=None,
        is_contiguous=None,
        locked=None,
        attached_threads=None,
        on_free_list=None,
        system_mem=None,
        max_system_mem=None,
        top_address=None,
        top_bytes=None,
        coverage=None,
        unattributed=(UnattributedRange(AddressRange(0x7F3A14100000, 0x7F3A14200000), "not_saved"),),
    )
    bad = dataclasses.replace(
        identity(), name=HOSTILE, libc_version=HOSTILE, layout=HOSTILE, runner_up=None, main_arena=None, mp=None
    )
    return report(
        tool_version="0.1.0",
        core=CoreSummary(HOSTILE, 1, 1, True, 0.25, "zstd", "unknown", 1, 3),
        process=ProcessSummary(None, HOSTILE, HOSTILE, "x86_64", 8, 4096, None, None, 0xDEAD0000, 0),
        threads=(ThreadSummary(0, 1, None, None, None, None, None, None, None, None),),
        heap=dataclasses.replace(heap((arena,)), identity=bad, parameters=None, narenas_limit=None),
        totals=arena.totals,
        ledger=LedgerNode.of(HOSTILE, LedgerNode(HOSTILE, 5), LedgerNode("rest", 7)),
        findings=(
            Finding(
                "UNHEARD-OF",
                Severity.ERROR,
                Confidence.WEAK,
                HOSTILE,
                (Quantity("text", HOSTILE, Unit.TEXT), Quantity("nan", float("nan"), Unit.SHARE)),
                (Evidence(HOSTILE, HOSTILE, Strength.HINT),),
                (HOSTILE,),
                (HOSTILE,),
            ),
        ),
        verdict=(VerdictItem("unheard_of", 5, 0, HOSTILE, Confidence.WEAK, (HOSTILE, HOSTILE)),),
        anomalies=tuple(Anomaly("bad_" + str(number), number, HOSTILE, HOSTILE) for number in range(25)),
        anomaly_count=90_000,
        gaps=(Gap("cut", HOSTILE),),
        phases=(Phase(HOSTILE, float("inf"), 0.0, None),),
        defects=(HOSTILE,),
        leaks=leaks(
            *(group(number, type=HOSTILE, holder=HOSTILE, arenas=(), samples=()) for number in range(9)),
            group_count=1_000_000,
            roots=(),
            missing_root_bytes=1 << 62,
        ),
        retained=RetainedReport(
            (RetainedChunk(chunk_view(type=HOSTILE), 1 << 62, 1, HOSTILE),),
            (Accumulation(HOSTILE, 0, 0, 0, 0, ()),),
            0,
        ),
        damages=hostile_damages(),
        crash=hostile_crash(),
    )


def hostile_damages() -> tuple[Damage, ...]:
    """More damages than a page has room for, hostile text wherever text can stand, and numbers at their limits."""
    chunk = chunk_place(0xFFFFFFFFFFFFFFF0, (1 << 64) - 1, holder=HOSTILE, arena=None, state=ChunkState.DAMAGED)
    damage = overflow(
        bytes=AddressRange(0, (1 << 64) - 1),
        victim=dataclasses.replace(chunk, is_mmapped=True),
        culprit=chunk,
        pattern=Pattern(PatternKind.SHIFTED_POINTER, 1 << 40, HOSTILE),
        repair=Repair(0xFFFFFFFFFFFFFFF8, SECRET, 0, None),
        anomalies=(1 << 30,),
        lost_bytes=1 << 62,
        arena=1 << 30,
        message=HOSTILE,
        evidence=(Evidence(HOSTILE, HOSTILE, Strength.HINT, None, True),) * 20,
        confidence=Confidence.WEAK,
        weakened_by=(HOSTILE,),
    )
    bare = overflow(
        bytes=AddressRange(0, 0), victim=None, culprit=None, pattern=None, repair=None, evidence=(), message=None
    )
    kinds = tuple(dataclasses.replace(bare, kind=kind, confidence=Confidence.WEAK) for kind in DamageKind)
    places = tuple(dataclasses.replace(damage, place=place) for place in DamagedPlace)
    return (damage, *kinds, *places)


def hostile_crash() -> CrashContext:
    """Hostile text wherever a crash has text, and every kind of place in a register."""
    place = PlaceNote(0xFFFFFFFFFFFFFFFF, FaultKind.NON_CANONICAL, HOSTILE, chunk_place(holder=HOSTILE), -(1 << 62))
    return crash(
        signal=None,
        signal_name=None,
        signal_code=None,
        signal_code_name=HOSTILE,
        sender_pid=None,
        fault=place,
        registers=tuple(
            RegisterNote(HOSTILE, dataclasses.replace(place, kind=kind, description="")) for kind in FaultKind
        ),
        frames=tuple(
            frame(number, HOSTILE * 9, HOSTILE * 9, symbol_offset=1 << 63, module_offset=1 << 63, source=source)
            for number, source in enumerate(FrameSource)
        ),
        frames_end="unheard_of",
        abort_message=AbortMessage(HOSTILE * 99, AbortKind.OTHER, 0, HOSTILE, Confidence.WEAK, 0),
        inside_malloc=None,
        signature=HOSTILE,
        signature_parts=(HOSTILE,),
    )


def chunk_place(payload: int = 0x7F3A140008D0, usable: int = 104, **changes: Any) -> ChunkPlace:
    """A live block of arena 1; ``changes`` replace fields."""
    made = ChunkPlace(payload - 16, payload, usable + 8, usable, ChunkState.IN_USE, 1, False)
    return dataclasses.replace(made, **changes)


def overflow(**changes: Any) -> Damage:
    """Text that a live block of 104 bytes wrote over the size of the free chunk behind it; ``changes`` replace fields."""
    made = Damage(
        kind=DamageKind.OVERFLOW,
        place=DamagedPlace.CHUNK_HEADER,
        bytes=AddressRange(0x7F3A14000938, 0x7F3A14000943),
        victim=chunk_place(0x7F3A14000940, 56, state=ChunkState.UNSORTED_BIN),
        culprit=chunk_place(holder="libfoo.so session_table+0x18"),
        pattern=Pattern(PatternKind.TEXT, 11),
        repair=Repair(0x7F3A14000938, SECRET, 0x45),
        anomalies=(0,),
        lost_bytes=64,
        arena=1,
        message="free(): invalid next size (normal)",
        evidence=(
            Evidence("the size word is 7 bytes of text and no size", "chunk walk", Strength.PROOF, 0x7F3A14000938),
            Evidence(
                "the chunk behind it says how long it was (prev_size)", "prev_size", Strength.SOLID, 0x7F3A14000970
            ),
        ),
        confidence=Confidence.CERTAIN,
    )
    return dataclasses.replace(made, **changes)


SECRET = int.from_bytes(b"hunter2!", "little")
"""A word of a process's text, which no view may show."""


def damages() -> tuple[Damage, ...]:
    """An overflow, a block in two lists, a write after free, a flipped bit, and a moment's state."""
    return (
        overflow(),
        overflow(
            kind=DamageKind.DOUBLE_FREE,
            place=DamagedPlace.TCACHE_LINK,
            bytes=AddressRange(0x5599E00012A0, 0x5599E00012A8),
            victim=chunk_place(0x5599E00012A0, 24, state=ChunkState.TCACHE, arena=0),
            culprit=None,
            pattern=None,
            repair=None,
            anomalies=(),
            lost_bytes=0,
            arena=0,
            message="free(): double free detected in tcache 2",
            confidence=Confidence.STRONG,
        ),
        overflow(
            kind=DamageKind.USE_AFTER_FREE,
            place=DamagedPlace.FREE_CONTENT,
            bytes=AddressRange(0x5599E0002020, 0x5599E0002028),
            victim=chunk_place(0x5599E0002010, 4088, state=ChunkState.LARGE_BIN, arena=0),
            culprit=chunk_place(0x5599E0002010, 4088, state=ChunkState.LARGE_BIN, arena=0),
            pattern=Pattern(PatternKind.POINTER, 8, "the stack of thread 3"),
            repair=None,
            anomalies=(),
            lost_bytes=0,
            arena=0,
            message=None,
            confidence=Confidence.PLAUSIBLE,
            weakened_by=("the program may set M_PERTURB while it runs",),
        ),
        overflow(
            kind=DamageKind.BIT_FLIP,
            place=DamagedPlace.MMAPPED_HEADER,
            bytes=AddressRange(0x7F3A60021008, 0x7F3A60021009),
            victim=chunk_place(0x7F3A60021010, 4_198_384, arena=None, is_mmapped=True),
            culprit=None,
            pattern=Pattern(PatternKind.ONE_BIT, 1),
            repair=Repair(0x7F3A60021008, 0x401002, 0x401003, 0),
            anomalies=(),
            lost_bytes=0,
            arena=None,
            message="munmap_chunk(): invalid pointer",
            evidence=(),
            confidence=Confidence.STRONG,
        ),
        overflow(
            kind=DamageKind.IN_TRANSITION,
            place=DamagedPlace.BIN_LINK,
            bytes=AddressRange(0x7F3A18000070, 0x7F3A18000078),
            victim=None,
            culprit=None,
            pattern=None,
            repair=None,
            anomalies=(),
            lost_bytes=0,
            arena=2,
            message=None,
            evidence=(Evidence("the arena is locked", "malloc_state", Strength.HINT, None, True),),
            confidence=Confidence.WEAK,
        ),
    )


def frame(number: int, symbol: str | None, module: str | None = "/usr/lib/libc.so.6", **changes: Any) -> Frame:
    """A frame that unwind information gave; ``changes`` replace fields."""
    counter = 0x7F3A5BE00000 + number * 0x1010
    made = Frame(
        number=number,
        program_counter=counter,
        module=module,
        module_offset=None if module is None else 0x26000 + number * 0x1010,
        symbol=symbol,
        symbol_offset=None if symbol is None else 0x10 + number,
        source=FrameSource.CALL_FRAME_INFORMATION if number else FrameSource.REGISTERS,
        is_certain=True,
    )
    return dataclasses.replace(made, **changes)


def crash(**changes: Any) -> CrashContext:
    """free() found a broken size and stopped the process; ``changes`` replace fields."""
    guessed: Any = {"source": FrameSource.STACK_SCAN, "is_certain": False}
    made = CrashContext(
        thread=3,
        lwp=4245,
        signal=6,
        signal_name="SIGABRT",
        signal_code=-6,
        signal_code_name="SI_TKILL",
        sender_pid=4242,
        fault=None,
        registers=(
            RegisterNote(
                "rbx",
                PlaceNote(0x7F3A14000940, FaultKind.DAMAGED_CHUNK, "damaged chunk", chunk_place(0x7F3A14000940), 0),
            ),
            RegisterNote("r12", PlaceNote(0x7F3A14000030, FaultKind.ALLOCATOR_DATA, "malloc_state of arena 1")),
        ),
        frames=(
            frame(0, "__pthread_kill_implementation"),
            frame(1, "raise"),
            frame(2, "abort"),
            frame(3, "malloc_printerr"),
            frame(4, "_int_free"),
            frame(5, "free"),
            frame(
                6, "session_close(session_table&, unsigned long)", "/opt/serviced/lib/libsession-with-a-long-name.so.1"
            ),
            frame(7, None, "/usr/sbin/serviced", **guessed),
            *(frame(number, None, None, **guessed) for number in range(8, 30)),
        ),
        frames_end="no_unwind_information",
        abort_message=AbortMessage(
            "free(): invalid next size (normal)\n",
            AbortKind.MALLOC,
            0x7F3A5C000004,
            "__abort_msg of libc.so.6",
            Confidence.CERTAIN,
        ),
        inside_malloc=True,
        signature="0123456789abcdef",
        signature_parts=("SIGABRT", "malloc: free(): invalid next size (normal)", "overflow", "libc.so.6 free"),
    )
    return dataclasses.replace(made, **changes)


def wrong_free(**changes: Any) -> WrongFree:
    """A block of thread 3's tcache that was freed again; ``changes`` replace fields."""
    freed = chunk_place(0x7F3A14002010, 104, state=ChunkState.TCACHE)
    made = WrongFree(
        kind=WrongFreeKind.FREED_TWICE,
        function="free",
        address=freed.payload_address,
        place=PlaceNote(freed.payload_address, FaultKind.FREED_CHUNK, "freed chunk (in a tcache)", freed, 0),
        listed_in=ChunkState.TCACHE,
        listed_thread=3,
        caller=6,
        message="free(): double free detected in tcache 2",
        others=(0x7F3A14002100,),
        evidence=(
            Evidence("the code of the caller passed it", "the call of free", Strength.SOLID, freed.payload_address),
            Evidence("glibc refuses such a pointer", "glibc's message and memory", Strength.HINT),
        ),
        confidence=Confidence.STRONG,
        weakened_by=("one more address stands as near",),
        holders=("libfoo.so session_table+0x18", HOSTILE),
    )
    return dataclasses.replace(made, **changes)


def stale_use(**changes: Any) -> StaleUse:
    """The table of functions of an object whose block is free; ``changes`` replace fields."""
    made = StaleUse(
        kind=StaleUseKind.VIRTUAL_TABLE,
        chunk=chunk_place(0x7F3A14003010, 56, state=ChunkState.TCACHE),
        offset=0,
        register="rax",
        is_given_again=False,
        slot=None,
        evidence=(Evidence("the instructions before it read it from there", "machine code", Strength.SOLID),),
        confidence=Confidence.STRONG,
        holders=(HOSTILE,),
    )
    return dataclasses.replace(made, **changes)


def segfault() -> CrashContext:
    """A read through a block that was freed; nothing names functions."""
    freed = chunk_place(0x5599E0002010, 4088, state=ChunkState.LARGE_BIN, arena=0)
    return crash(
        thread=0,
        lwp=4242,
        signal=11,
        signal_name="SIGSEGV",
        signal_code=1,
        signal_code_name="SEGV_MAPERR",
        sender_pid=None,
        fault=PlaceNote(0x5599E0002028, FaultKind.FREED_CHUNK, "freed block", freed, 24),
        registers=(),
        frames=(frame(0, None, None),),
        frames_end="limit",
        abort_message=None,
        inside_malloc=None,
    )


def corruption_finding(**changes: Any) -> Finding:
    """What the overflow of ``overflow()`` is as a finding; ``changes`` replace fields."""
    made = Finding(
        code="CORRUPTION-OVERFLOW",
        severity=Severity.ERROR,
        confidence=Confidence.CERTAIN,
        subject="a chunk of arena 1",
        quantities=(
            Quantity("address", 0x7F3A14000938, Unit.ADDRESS),
            Quantity("byte_count", 11, Unit.BYTES),
            Quantity("place", "chunk_header", Unit.TEXT),
            Quantity("victim_address", 0x7F3A14000940, Unit.ADDRESS),
            Quantity("culprit_address", 0x7F3A140008D0, Unit.ADDRESS),
            Quantity("lost_bytes", 64, Unit.BYTES),
            Quantity("message", "free(): invalid next size (normal)", Unit.TEXT),
            Quantity("pattern", "text", Unit.TEXT),
        ),
        evidence=overflow().evidence,
        next_steps=(
            "coreheap owners CORE 0x7f3a140008d0 names who holds the block that was written past",
            "run the workload with -fsanitize=address to catch the write itself",
        ),
        weakened_by=("the header itself may have been hit by a stray write",),
    )
    return dataclasses.replace(made, **changes)


def corrupt_report(**changes: Any) -> Report:
    """A process whose heap was damaged in several ways and that glibc stopped; ``changes`` replace fields."""
    double = corruption_finding(
        code="DOUBLE-FREE",
        confidence=Confidence.STRONG,
        subject="a block of arena 0",
        quantities=(Quantity("address", 0x5599E00012A0, Unit.ADDRESS),),
    )
    found = (
        Anomaly(
            "broken_chunk",
            0x7F3A14000930,
            "the size of a chunk",
            "no size",
            1,
            "free(): invalid next size (normal)",
            False,
            Confidence.CERTAIN,
        ),
        *(
            Anomaly(
                "bin_link_wrong", 0x7F3A18000070 + 16 * number, "a chunk", "no chunk", 2, None, True, Confidence.WEAK
            )
            for number in range(5)
        ),
    )
    made = report(
        findings=(corruption_finding(), double, finding()),
        damages=damages(),
        crash=crash(),
        anomalies=found,
        anomaly_count=1_000,
        is_partial=False,
        gaps=(),
    )
    return dataclasses.replace(made, **changes)


def wrong_free_report() -> Report:
    """A sound process that glibc stopped for a double free."""
    message = AbortMessage(
        "free(): double free detected in tcache 2", AbortKind.MALLOC, 0x7F3A5C000004, "__abort_msg", Confidence.CERTAIN
    )
    stopped = crash(abort_message=message, registers=(), wrong_free=wrong_free())
    return dataclasses.replace(small_report(), crash=stopped)


def stale_report() -> Report:
    """A sound process that used an object after it was freed."""
    return dataclasses.replace(small_report(), crash=dataclasses.replace(segfault(), stale_use=stale_use()))


def sound_report() -> Report:
    """A process that crashed for another reason than its heap."""
    return dataclasses.replace(small_report(), crash=segfault())


def hostile_explanation() -> Explanation:
    """Hostile text everywhere text can stand, a way of many steps, and a pointer before its own chunk."""
    place = Place(RootKind.MAPPED_FILE, 5, HOSTILE, 1 << 30)
    chunk = chunk_view(type=HOSTILE)
    step = Reference(chunk, 1 << 40, chunk, 1 << 40)
    return Explanation(
        address=(1 << 64) - 1,
        region=HOSTILE,
        permissions="rwx",
        is_saved=False,
        symbol=HOSTILE,
        thread=3,
        chunk=chunk,
        offset=-16,
        holders=(Reference(place, 0, chunk, 0),),
        holder_count=1 << 40,
        path=(Reference(place, 0, chunk, 0), *(step,) * 200),
        notes=(HOSTILE,),
    )
