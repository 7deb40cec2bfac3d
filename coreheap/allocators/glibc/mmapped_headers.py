"""Headers of chunks with a mapping of their own, wherever in memory they are and whatever the kernel made of the mapping.

Knows: where in a page such a header can be, and that a mapping may be split, joined, covered or cut since malloc made it. Does not
know: which of the headers are real; ``mmapped`` holds them against mp_'s counters.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import numpy as np

from coreheap.allocators.glibc.gathering import words_at
from coreheap.allocators.glibc.locate import anonymous_ranges, joined
from coreheap.allocators.glibc.records import Layout
from coreheap.allocators.glibc.structures import FLAGS, IS_MMAPPED
from coreheap.corefile import Core
from coreheap.kernels import MmappedChunks, find_mmapped_chunks, no_mmapped_chunks


def headers_that_fit(core: Core, layout: Layout, ranges: list[tuple[int, int]]) -> MmappedChunks:
    """The chunks whose header is in a range (sorted, without overlap) and whose mapping ends in it, by address."""
    memory = core.memory
    tables = []
    for start, end in ranges:
        position = start
        # Runs as they are in the file: joined ones would be copied once for each extent.
        for saved_start, saved_end in memory.saved_runs_within(start, end):
            for extent_start, extent_end in joined(memory.populated_extents(saved_start, saved_end)):
                first = max(position, extent_start)
                if first >= extent_end:
                    continue
                table = find_mmapped_chunks(
                    memory.view(first, saved_end),
                    first,
                    layout.geometry,
                    core.page_bytes,
                    layout.mmapped_trailer_bytes,
                    region_bytes=end - first,
                    scan_bytes=extent_end - first,
                )
                if len(table):
                    tables.append(table)
                    position = int(table.mapping_start[-1] + table.mapping_bytes[-1])
    return merged(tables)


def with_remapped(
    core: Core,
    layout: Layout,
    excluded: list[tuple[int, int]],
    found: MmappedChunks,
    n_mmaps: int | None,
    mmapped_mem: int | None,
) -> MmappedChunks:
    """The table with chunks of memalign that realloc changed, where mp_ counts other chunks than were found.

    The header that memalign left at the start of such a mapping has its old size, and once mremap has moved it, the payload is
    aligned to a page only. The real header leads over whole pages back to the start. Taken only where all then adds up.
    """
    if n_mmaps is None or mmapped_mem is None or (len(found) == n_mmaps and bytes_of(found) == mmapped_mem):
        return found
    deep = _headers_deep_in_mappings(core, layout, excluded)
    if not len(deep):
        return found
    taken = zip(deep.mapping_start.tolist(), (deep.mapping_start + deep.mapping_bytes).tolist(), strict=True)
    others = headers_that_fit(core, layout, anonymous_ranges(core, [*excluded, *taken]))
    table = merged([deep, others])
    # Where mremap lets mmapped_mem drift, it is some words too high for each: then the count decides.
    adds_up = bytes_of(table) == mmapped_mem or (layout.generation.mmapped_mem_drifts and bytes_of(table) < mmapped_mem)
    return table if len(table) == n_mmaps and adds_up else found


def merged(tables: list[MmappedChunks]) -> MmappedChunks:
    """All chunks of several tables, by address."""
    if not tables:
        return no_mmapped_chunks()
    order = np.argsort(np.concatenate([table.mapping_start for table in tables]), kind="stable")
    return MmappedChunks(
        np.concatenate([table.header_address for table in tables])[order],
        np.concatenate([table.mapping_start for table in tables])[order],
        np.concatenate([table.mapping_bytes for table in tables])[order],
        np.concatenate([table.chunk_bytes for table in tables])[order],
    )


def with_torn(
    core: Core,
    layout: Layout,
    excluded: list[tuple[int, int]],
    found: MmappedChunks,
    n_mmaps: int | None,
    mmapped_mem: int | None,
) -> MmappedChunks:
    """The table with chunks whose mapping has a hole by now or shows something else in part, where mp_ counts more than was found.

    A mapping may lead over memory that is not anonymous or not mapped, as far as mmapped_mem leaves bytes for it.
    """
    if n_mmaps is None or mmapped_mem is None:
        return found
    missing_count, missing_bytes = n_mmaps - len(found), mmapped_mem - bytes_of(found)
    if missing_count <= 0 or not 0 < missing_bytes < 1 << 62:
        return found
    taken = zip(found.mapping_start.tolist(), (found.mapping_start + found.mapping_bytes).tolist(), strict=True)
    barriers = sorted([*excluded, *taken, *((module.start, module.end) for module in core.modules)])
    more = headers_that_fit(core, layout, _bridged(anonymous_ranges(core, barriers), barriers, missing_bytes))
    if not 0 < len(more) <= missing_count or bytes_of(more) > missing_bytes:
        return found
    return merged([found, more])


def _bridged(ranges: list[tuple[int, int]], barriers: list[tuple[int, int]], most_bytes: int) -> list[tuple[int, int]]:
    """Ranges with what lies between them, where that is at most ``most_bytes`` and no barrier; each goes on behind its end."""
    starts = [barrier[0] for barrier in barriers]
    bridged: list[tuple[int, int]] = []
    for (start, end), (following, _) in pairwise([*ranges, (1 << 62, 1 << 62)]):
        row = bisect_left(starts, end)
        limit = min(end + most_bytes, starts[row] if row < len(starts) else following)
        end = following if following <= limit else max(end, limit)
        if bridged and bridged[-1][1] >= start:
            bridged[-1] = bridged[-1][0], end
        else:
            bridged.append((start, end))
    return bridged


def bytes_of(table: MmappedChunks) -> int:
    return int(table.mapping_bytes.sum())


def _headers_deep_in_mappings(core: Core, layout: Layout, excluded: list[tuple[int, int]]) -> MmappedChunks:
    """Headers whose payload begins at a page and that lead one page or more back to the start of their mapping.

    Sorted by mapping; of those that overlap the first.
    """
    memory, geometry = core.memory, layout.geometry
    page, word, trailer = np.uint64(core.page_bytes), core.word_bytes, np.uint64(layout.mmapped_trailer_bytes)
    parts = [np.zeros((0, 4), np.uint64)]
    for start, end in anonymous_ranges(core, excluded):
        for first, last in joined(memory.populated_extents(start, end)):
            begin = first - first % core.page_bytes
            headers = np.arange(begin + core.page_bytes, last + 1, core.page_bytes, dtype=np.uint64)
            headers -= np.uint64(geometry.header_bytes)
            lead, lead_saved = words_at(memory, headers)
            size_word, size_saved = words_at(memory, headers + np.uint64(word))
            fits = lead_saved & size_saved & (size_word & np.uint64(FLAGS) == np.uint64(IS_MMAPPED))
            headers, lead, size = headers[fits], lead[fits], size_word[fits] & np.uint64(~FLAGS & (1 << 64) - 1)
            if trailer:
                lead &= np.uint64(~1 & (1 << 64) - 1)  # whether the mapping is of huge pages
            room = np.uint64(end) - headers
            inside = (lead >= page) & (lead <= headers - np.uint64(start)) & (size <= room) & (size + trailer <= room)
            inside &= ((headers - lead) % page == 0) & ((lead + size + trailer) % page == 0)
            inside &= size >= np.uint64(geometry.minimum_chunk_bytes)
            headers, lead, size = headers[inside], lead[inside], size[inside]
            parts.append(np.stack([headers, headers - lead, lead + size + trailer, size], axis=1))
    table = np.concatenate(parts)
    table = table[np.argsort(table[:, 1], kind="stable")]
    reach = np.maximum.accumulate(np.concatenate([np.zeros(1, np.uint64), table[:, 1] + table[:, 2]]))[:-1]
    header, start_of_mapping, mapping_bytes, size = np.ascontiguousarray(table[table[:, 1] >= reach].T)
    return MmappedChunks(header, start_of_mapping, mapping_bytes, size)
