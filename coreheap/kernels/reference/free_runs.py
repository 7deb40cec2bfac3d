"""Free chunks that lie side by side, as far as they hold a whole page.

Knows: start bits and states. Does not know: which states an allocator would join, or what a page of free memory is worth.
"""

from __future__ import annotations

import numpy as np

from coreheap.kernels.codes import STATE_SLOTS, ChunkState
from coreheap.kernels.index import ChunkIndex
from coreheap.kernels.reference.columns import _region_chunks
from coreheap.kernels.values import FreeRuns

SMALLEST_PAGE, LARGEST_PAGE = 1 << 9, 1 << 30


def find_free_runs(index: ChunkIndex, region: int, state_mask: int, page_bytes: int) -> FreeRuns:
    """The maximal runs of consecutive chunks of a region whose states have their bits in ``state_mask``.

    Only runs that hold a page from its start to its end are listed, and the one with the top chunk that ends the region,
    however small; all count in the sums. Raises
    IndexError for a region that is none, ValueError for pages that are no power of two between 512 bytes and 1 GiB.
    """
    if not SMALLEST_PAGE <= page_bytes <= LARGEST_PAGE or page_bytes & (page_bytes - 1):
        raise ValueError(f"a page cannot have {page_bytes} bytes")
    rows: list[tuple[int, int, int, int, int, int, bool]] = []
    free_bytes = free_count = run_count = largest = 0
    run: tuple[int, int, int, int] | None = None  # start, first chunk, free bytes and free chunks before it
    has_top = False

    region_end = int(index.region_end[region]) if 0 <= region < index.region_count else 0

    def close(end: int, end_chunk: int) -> None:
        if run is None:
            return
        if -(-run[0] // page_bytes) * page_bytes + page_bytes <= end or (has_top and end == region_end):
            rows.append((run[0], end, run[1], end_chunk, run[2], run[3], has_top))

    for chunk, header, chunk_bytes in _region_chunks(index, region, 0, _words_of(index, region)):
        state = int(index.state[chunk]) % STATE_SLOTS
        if not state_mask >> state & 1:
            close(header, chunk)
            run = None
            continue
        if run is None:
            run, has_top = (header, chunk, free_bytes, free_count), False
            run_count += 1
        free_bytes += chunk_bytes
        free_count += 1
        if state == ChunkState.TOP:
            has_top = True
        else:
            largest = max(largest, chunk_bytes)
    first_chunk = int(index.region_first_chunk[region])
    close(int(index.region_end[region]), first_chunk + int(index.region_chunk_count[region]))
    columns = list(zip(*rows, strict=True)) or [()] * 7
    return FreeRuns(
        start=np.array(columns[0], np.uint64),
        end=np.array(columns[1], np.uint64),
        first_chunk=np.array(columns[2], np.int64),
        end_chunk=np.array(columns[3], np.int64),
        free_bytes_before=np.array(columns[4], np.uint64),
        free_count_before=np.array(columns[5], np.int64),
        has_top=np.array(columns[6], np.bool_),
        run_count=run_count,
        free_count=free_count,
        free_bytes=free_bytes,
        largest_bytes=largest,
    )


def _words_of(index: ChunkIndex, region: int) -> int:
    if not 0 <= region < index.region_count:
        raise IndexError(f"there is no region {region}")
    return index.word_count(region)
