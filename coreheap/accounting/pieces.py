"""The address space cut at every border of a region or a claim: each piece lies in one region and has one claim at most.

Knows: arithmetic on columns of ranges. Does not know: what a kind means.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coreheap.accounting.claims import ClaimColumns
from coreheap.corefile.regions import first_covering, row_holding

UInt64s = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.intp]

NO_CLAIM = -1


@dataclass(frozen=True, slots=True)
class Pieces:
    """Columns of equal length, by address, without overlap; together they are the regions, to the byte.

    ``start``, ``end``: uint64; ``region``: the row of the region that holds the piece; ``claim``: the row of the claim that was
    made first of those that hold it, NO_CLAIM for none.
    """

    start: UInt64s
    end: UInt64s
    region: Rows
    claim: Rows


def cut_into_pieces(region_start: UInt64s, region_end: UInt64s, claims: ClaimColumns) -> Pieces:
    """The pieces of regions that are sorted and do not overlap."""
    # np.unique of numpy 2.3 and later takes several times as long as sorting; the columns here are sorted runs.
    cuts = np.sort(np.concatenate([region_start, region_end, claims.start, claims.end]), kind="stable")
    cuts = cuts[np.concatenate(([True], cuts[1:] != cuts[:-1]))] if len(cuts) else cuts
    claim = first_covering(cuts, claims.start, claims.end)
    start, end = cuts[:-1], cuts[1:]
    region, is_mapped = row_holding(start, region_start, region_end)
    return Pieces(start[is_mapped], end[is_mapped], region[is_mapped], claim[: len(start)][is_mapped])
