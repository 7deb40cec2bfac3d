"""Where malloc_par (``mp_``) is and what it says.

Knows: the invariants of its fields, of which the strongest ties it to the main arena. Does not know: which release the
core has; it is asked for one layout at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.allocators.glibc.locate import ArenaRing, Sighting, mapped_for_data, mappings_up_to
from coreheap.allocators.glibc.records import Layout, read_arena, read_parameters
from coreheap.corefile import AddressSpace, Core
from coreheap.errors import MemoryFault
from coreheap.evidence import Evidence, Strength
from coreheap.kernels import StopReason, chain_reaches

PARAMETERS_ACCEPTED = 0.8
PARAMETERS_REACH = 1 << 16
"""mp_ lies in the same data section as main_arena; in fifteen libraries at most 0x960 bytes away."""

CHUNKS_AT_THE_START = 16
"""Chunks in a row, or up to top, that prove the start of a heap which nothing else tells."""
STARTS_TRIED = 64


@dataclass(frozen=True, slots=True)
class Parameters:
    """Where malloc_par is and what it says; ``score`` is the share of its invariants that hold."""

    address: int
    values: dict[str, int]
    score: float
    by_symbol: bool


def find_parameters(core: Core, layout: Layout, ring: ArenaRing, symbols: Iterable[Sighting]) -> Parameters | None:
    """malloc_par by symbol, else by the values that fit best near main_arena."""
    memory = core.memory
    for sighting in symbols:
        try:
            values = read_parameters(memory, sighting.address, layout)
        except MemoryFault:
            continue
        score = _parameter_scores(core, layout, ring, sighting.address, sighting.address + 1)
        return Parameters(sighting.address, values, score[1] if score else 0.0, True)
    if ring.main is None:
        return None
    best = _parameter_scores(core, layout, ring, ring.main - PARAMETERS_REACH, ring.main + PARAMETERS_REACH)
    if best is None or best[1] < PARAMETERS_ACCEPTED:
        return None
    return Parameters(best[0], read_parameters(memory, best[0], layout), best[1], False)


def _parameter_scores(core: Core, layout: Layout, ring: ArenaRing, first: int, last: int) -> tuple[int, float] | None:
    """The best place for malloc_par among word addresses in [first, last) and its share of invariants that hold.

    Source: the static initialiser of mp_, do_set_* and sysmalloc_mmap (malloc.c, 2.12-2.44).
    """
    memory, fields = core.memory, layout.parameters
    word = layout.word_class.word_bytes
    starts_of_brk: list[int] = []
    top = 0
    if ring.main is not None:
        try:
            state = read_arena(memory, ring.main, layout)
            size_word = memory.read_word(state.top + word) if state.top else 0
            top_end = state.top + (size_word & ~7)
            top = state.top
            if state.is_contiguous:
                # A damaged top or system_mem says nothing of where the break began; a mapping up to the one that top lies in still does.
                starts_of_brk = [top_end - state.system_mem, *mappings_up_to(memory, state.top)]
        except MemoryFault:
            starts_of_brk = []
    best: tuple[int, float] | None = None
    for run_start, run_end in memory.saved_runs_within(max(first, 0), last - 1 + fields.byte_count):
        begin = run_start + -run_start % word
        count = (run_end - begin - fields.byte_count) // word + 1
        if count <= 0:
            continue
        raw = memory.view(begin, run_end)
        score, places = _score_places(core, layout, raw, count, begin, starts_of_brk, top)
        place = int(score.argmax())
        if best is None or float(score[place]) > best[1]:
            best = (int(places[place]), float(score[place]))
    return best


def _score_places(
    core: Core,
    layout: Layout,
    raw: npt.NDArray[np.uint8],
    count: int,
    begin: int,
    starts_of_brk: list[int],
    top: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    fields, word = layout.parameters, layout.word_class.word_bytes

    def values(name: str) -> npt.NDArray[np.uint64]:
        field = fields.fields[name]
        packed = np.ascontiguousarray(
            np.lib.stride_tricks.as_strided(
                raw[field.offset :],
                shape=(count, field.element_bytes),
                strides=(word, 1),
                writeable=False,
            )
        )
        return packed.view(f"<u{field.element_bytes}")[:, 0].astype(np.uint64)

    page = np.uint64(core.page_bytes)
    n_mmaps, max_n_mmaps = values("n_mmaps"), values("max_n_mmaps")
    mapped, max_mapped = values("mmapped_mem"), values("max_mmapped_mem")
    sbrk_base = values("sbrk_base")
    heap_max = np.uint64(layout.word_class.default_heap_max)
    checks: list[tuple[float, npt.NDArray[np.bool_]]] = [
        (1, n_mmaps <= max_n_mmaps),
        (1, mapped <= max_mapped),
        (1, ((mapped % page) == 0) | layout.generation.mmapped_mem_drifts),
        (1, (mapped >= n_mmaps * page) & ((n_mmaps > 0) | (mapped < page))),
        (1, values("no_dyn_threshold") <= 1),
        (2, values("n_mmaps_max") == 65536),
        (1, values("mmap_threshold") <= heap_max),
        (1, (values("trim_threshold") >= page) & (values("top_pad") <= heap_max)),
    ]
    if starts_of_brk:
        expected = np.array([start & (2**64 - 1) for start in starts_of_brk], np.uint64)
        begun = _where_heaps_begin(core, layout, sbrk_base, min(starts_of_brk[1:], default=top), top)
        checks.append((3, np.isin(sbrk_base, np.concatenate([expected, begun]))))
        checks.append((1, sbrk_base == expected[0]))
    else:
        # Set at the arena's first growth, by brk or by mmap.
        checks.append((2, mapped_for_data(core.memory, sbrk_base)))
        checks.append((1, mapped_for_data(core.memory, sbrk_base) | (sbrk_base == 0)))
    if "arena_test" in fields:
        checks.append((1, values("arena_test") == layout.word_class.default_arena_test))
        checks.append((1, values("arena_max") <= 65536))
    if "tcache_bins" in fields:
        checks.append((2, values("tcache_bins") == 64))
        checks.append((1, values("tcache_count") <= 65535))
        checks.append((1, values("tcache_max_bytes") <= 4 << 20))
    if "hp_pagesize" in fields:
        for name in ("thp_pagesize", "hp_pagesize"):
            size = values(name)
            checks.append((1, (size & (size - np.uint64(1)) * (size > 0)) == 0))
    if "thp_mode" in fields:
        # Tells 2.43 from 2.44, whose heaps are alike otherwise.
        mode, generation = values("thp_mode"), layout.generation
        with_pages = np.isin(mode, np.array(generation.thp_modes_with_pagesize, np.uint64))
        without_pages = np.isin(mode, np.array(generation.thp_modes_without_pagesize, np.uint64))
        checks.append((2, np.where(values("thp_pagesize") > 0, with_pages, without_pages)))
    if "pagesize" in fields:
        checks.append((2, values("pagesize") == page))
    total = sum(weight for weight, _ in checks)
    score = np.zeros(count, dtype=np.float64)
    for weight, holds in checks:
        score += weight * holds
    places = begin + word * np.arange(count, dtype=np.int64)
    return score / total, places


def _where_heaps_begin(
    core: Core, layout: Layout, values: npt.NDArray[np.uint64], first: int, top: int
) -> npt.NDArray[np.uint64]:
    """Which values are a page in [first, top) of one saved stretch with top, from whose start on one chunk follows the other.

    The break begins inside of a mapping in qemu-user, where .bss and it are one, and behind what a program took by sbrk before.
    """
    memory, geometry, page = core.memory, layout.geometry, np.uint64(core.page_bytes)
    inside = (values >= np.uint64(first)) & (values < np.uint64(top)) & (values % page == 0)
    found = []
    for value in np.unique(values[inside])[:STARTS_TRIED].tolist():
        start = layout.aligned_header(value)
        if start >= top or not memory.is_saved(start, top) or len(memory.saved_runs_within(start, top)) != 1:
            continue
        chain = chain_reaches(memory.view(start, top), geometry, 0, top - start, CHUNKS_AT_THE_START)
        if chain.stop_reason in (StopReason.LIMIT, StopReason.TOP):
            found.append(value)
    return np.array(found, np.uint64)


def parameters_evidence(
    memory: AddressSpace, layout: Layout, ring: ArenaRing, parameters: Parameters | None
) -> list[Evidence]:
    if parameters is None:
        return [
            Evidence(
                "no place near main_arena fits malloc_par",
                "data section of libc",
                Strength.HINT,
                speaks_against=True,
            )
        ]
    facts = [
        Evidence(
            f"malloc_par with {parameters.score:.0%} of its invariants",
            "symbol table" if parameters.by_symbol else "data section of libc",
            Strength.PROOF if parameters.by_symbol else Strength.SOLID,
            parameters.address,
        )
    ]
    assert ring.main is not None
    state = read_arena(memory, ring.main, layout)
    try:
        size_word = memory.read_word(state.top + layout.word_class.word_bytes)
    except MemoryFault:
        return facts
    end = state.top + (size_word & ~7)
    if state.is_contiguous and parameters.values["sbrk_base"] + state.system_mem == end:
        facts.append(
            Evidence(
                "sbrk_base + system_mem of the main arena is the end of top, to the byte",
                "malloc_par and malloc_state",
                Strength.PROOF,
                ring.main,
            )
        )
    return facts
