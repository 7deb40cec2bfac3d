"""Every layout row against what compilers and Debian's debug information say (fixtures/facts)."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coreheap.allocators.glibc.layouts import GENERATIONS, WORD_CLASSES
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import (
    Structure,
    TcacheKey,
    bin_numbers,
    tcache_bin_sizes,
)

FACTS = Path(__file__).parents[3] / "fixtures" / "facts" / "glibc-malloc-layouts.json.xz"
VARIANT_SUFFIX = {"default": "", "no-PER_THREAD": "-stock", "release-branch": "-branch"}
OUR_NAME = {"tcache_small_bins": "tcache_bins", "num_slots": "counts"}
KEY_BEGINS = {
    TcacheKey.NONE: None,
    TcacheKey.STRUCT_ADDRESS: "pointer to the tcache_perthread_struct",
    TcacheKey.RANDOM_WORD: "process-wide random word tcache_key",
}


def read_entries() -> Iterator[Any]:
    document = json.loads(lzma.decompress(FACTS.read_bytes()))
    for release, machines in document["versions"].items():
        for machine, variants in machines.items():
            for variant, entry in variants.items():
                name = f"{release}{VARIANT_SUFFIX[variant]}"
                yield pytest.param(name, machine, entry, id=f"{name}-{machine}")


ENTRIES = tuple(read_entries())


def layout_for(release: str, entry: dict[str, Any]) -> Layout:
    constants = entry["constants"]
    word_class = "64" if constants["SIZE_SZ"] == 8 else f"32a{constants['MALLOC_ALIGNMENT']}"
    (generation,) = [known for known in GENERATIONS if release in known.releases]
    return Layout(generation, WORD_CLASSES[word_class])


def assert_fields(ours: Structure, fact: dict[str, Any]) -> None:
    expected = {OUR_NAME.get(name, name): field["offset"] for name, field in fact["fields"].items() if name != "pad"}
    assert {name: field.offset for name, field in ours.fields.items()} == expected


@pytest.mark.parametrize(("release", "machine", "entry"), ENTRIES)
def test_structures_are_those_of_the_release(release: str, machine: str, entry: dict[str, Any]) -> None:
    layout = layout_for(release, entry)
    structs = entry["structs"]
    assert_fields(layout.state, structs["malloc_state"])
    assert layout.state.byte_count == structs["malloc_state"]["size"]
    assert_fields(layout.parameters, structs["malloc_par"])
    assert layout.parameters.byte_count == structs["malloc_par"]["size"]
    assert_fields(layout.heap_info, structs["heap_info"])
    assert layout.heap_info_bytes == structs["heap_info"]["size"]
    tcache = layout.tcache
    fact = structs.get("tcache_perthread_struct")
    assert (tcache is None) == (fact is None)
    if tcache is not None:
        assert_fields(tcache, fact)
        assert tcache.byte_count == fact["size"]


@pytest.mark.parametrize(("release", "machine", "entry"), ENTRIES)
def test_constants_are_those_of_the_release(release: str, machine: str, entry: dict[str, Any]) -> None:
    layout, facts = layout_for(release, entry), entry["constants"]
    word_class, generation = layout.word_class, layout.generation
    assert word_class.word_bytes == facts["SIZE_SZ"]
    assert word_class.alignment == facts["MALLOC_ALIGNMENT"]
    assert word_class.minimum_chunk_bytes == facts["MINSIZE"]
    assert word_class.header_bytes == facts["CHUNK_HDR_SZ"]
    assert word_class.granule_phase == facts["first_chunk_offset_at_brk_start"]
    assert word_class.default_heap_max == facts["HEAP_MAX_SIZE"]
    assert word_class.bins.small_limit == facts["MIN_LARGE_SIZE"]
    assert word_class.bins.small_correction == facts["SMALLBIN_CORRECTION"]
    assert layout.first_chunk_in_arena_heap == facts["first_chunk_offset_in_arena_heap"]
    assert layout.heap_info_bytes == facts["first_chunk_offset_in_sub_heap"]
    assert generation.safe_linking == facts["safe_linking"]
    assert KEY_BEGINS[generation.tcache_key] == facts["tcache_key"]
    assert generation.heap_max_follows_hugetlb == facts["heap_max_follows_hugetlb"]
    assert generation.flags_hold_fastchunks == facts["fastbin_flag_bit0_in_flags"]
    assert generation.tcache_counts_free_slots == ((facts["tcache_count_direction"] or "").startswith("down"))
    assert (generation.mmapped_trailer_words > 0) == facts["mmapped_chunk_layout"].startswith("new")
    if "fastbinsY" in layout.state:
        assert word_class.fastbin_count == facts["NFASTBINS"]
    else:
        assert facts["NFASTBINS"] == 0
    if generation.tcache is not None:
        assert facts["tcache_struct_chunk_size"] in layout.tcache_chunk_bytes
        if facts["tcache_struct_chunk_size_alt"] is not None:
            assert facts["tcache_struct_chunk_size_alt"] in layout.tcache_chunk_bytes
    limit = {"per_cpu": "*cores", "cpus": "max(cores", "none": "none"}[generation.arena_limit]
    assert limit in facts["NARENAS_rule"]


def test_each_release_belongs_to_one_generation() -> None:
    releases = [release for generation in GENERATIONS for release in generation.releases]
    assert len(releases) == len(set(releases))


# Bins as malloc.c's macros give them, written out by hand for a few sizes on both sides of each border
# (glibc-malloc fact sheet, section 5).
BIN_OF_SIZE = {
    "64": {32: 2, 48: 3, 1008: 63, 1024: 64, 1072: 64, 1088: 65, 3072: 96, 3120: 96, 3136: 97,
           3568: 97, 3584: 98, 10736: 111, 10752: 112, 45040: 120, 65536: 121, 131072: 123,
           163840: 124, 524288: 126, 1 << 20: 126},
    "32a8": {16: 2, 24: 3, 504: 63, 512: 64, 2480: 94, 2496: 95, 2552: 95, 2560: 96},
    "32a16": {16: 2, 32: 3, 992: 63, 1008: 64, 1023 // 16 * 16: 64, 1024: 65, 2928: 94},
}  # fmt: skip


@pytest.mark.parametrize("name", BIN_OF_SIZE)
def test_bins_hold_the_sizes_that_glibc_puts_there(name: str) -> None:
    lowest, highest = bin_numbers(WORD_CLASSES[name])
    for size, number in BIN_OF_SIZE[name].items():
        assert lowest[number] <= size <= highest[number], size


@pytest.mark.parametrize("name", sorted(WORD_CLASSES))
def test_bins_are_disjoint_and_without_holes(name: str) -> None:
    word_class = WORD_CLASSES[name]
    lowest, highest = bin_numbers(word_class)
    expected = word_class.minimum_chunk_bytes
    for number in range(2, 127):
        if lowest[number] > highest[number]:
            continue
        assert lowest[number] == expected, number
        expected = int(highest[number]) + word_class.alignment
    assert highest[126] == 1 << 62


def test_tcache_bins_hold_one_size_each_up_to_64() -> None:
    lowest, highest = tcache_bin_sizes(64, WORD_CLASSES["64"])
    assert lowest.tolist() == highest.tolist() == list(range(32, 1041, 16))


@pytest.mark.parametrize(
    ("name", "first", "last"), [("64", (1056, 2047), 4 << 20), ("32a16", (1040, 2047), 4 << 20),
                                ("32a8", (528, 1023), 2 << 20)],
)  # fmt: skip
def test_large_tcache_bins_hold_one_power_of_two(name: str, first: tuple[int, int], last: int) -> None:
    lowest, highest = tcache_bin_sizes(76, WORD_CLASSES[name])
    assert (lowest[64], highest[64]) == first
    assert highest[75] == last - 1
