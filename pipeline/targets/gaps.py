"""Token ids <-> sorted gaps of ranks.

A run is the entries of one position and kind, in rising order of rank. A gap g >= 1 is cut into its octave
floor(log2 g), one byte that compresses, and the bits below, packed raw.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets.ranks import Ranks
from ddk_pipe.pipeline.targets.window import Planes, used

ID_BITS = 24  # ids and ranks are below 2^24


def rank_gaps(
    table: Ranks, rows: NDArray[np.int64], ids: NDArray[np.int32], head: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of the entries (heads by position, then rests; by rank in each) and their rank gaps, from 1."""
    run = (~head).astype(np.int64) * (int(rows.max(initial=0)) + 1) + rows
    key = (run << ID_BITS) | table.rank_of[ids]
    order = np.argsort(key, kind="stable")
    key = key[order]
    run, rank = key >> ID_BITS, key & ((1 << ID_BITS) - 1)
    gaps = np.diff(rank, prepend=0)
    first = np.diff(run, prepend=-1) != 0
    gaps[first] = rank[first] + 1
    return order, gaps


def octaves_and_bits(gaps: NDArray[np.int64]) -> tuple[NDArray[np.integer], NDArray[np.uint8]]:
    """Octave of every gap, and the bits below it, packed."""
    octaves = np.frexp(gaps.astype(np.float64))[1] - 1
    return octaves, _pack(gaps - (1 << octaves.astype(np.int64)), octaves)


def ids_of(table: Ranks, planes: Planes, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Token ids of all runs, int64 [counts.sum()]. Raises ValueError for planes that are too short or lead outside."""
    octaves = used(planes["octaves"], int(counts.sum())).astype(np.int64)
    if octaves.max(initial=0) > ID_BITS:
        raise ValueError("a gap leads outside the vocabulary")
    reached = np.concatenate([[0], np.cumsum(_unpack(planes["bits"], octaves), dtype=np.int64)])
    before = reached[np.cumsum(counts) - counts]
    ranks = reached[1:] - np.repeat(before + 1, counts)
    if ranks.max(initial=0) >= len(table.id_of):
        raise ValueError("a gap leads outside the vocabulary")
    ids: NDArray[np.int64] = table.id_of.take(ranks).astype(np.int64)
    return ids


def _pack(values: NDArray[np.int64], widths: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The low `widths` bits of each value one after the other, lowest first."""
    ends = np.cumsum(widths)
    bit = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - widths, widths)
    return np.packbits(((np.repeat(values, widths) >> bit) & 1).astype(np.uint8), bitorder="little")


def _unpack(bits: NDArray[np.unsignedinteger], octaves: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Gaps from their octaves and the packed bits below them. Raises ValueError if bits are missing."""
    ends = np.cumsum(octaves)
    starts = ends - octaves
    if len(ends) and ends[-1] > 8 * len(bits):
        raise ValueError("a plane is too short")
    buffer = np.zeros(len(bits) + 4, np.uint8)
    buffer[: len(bits)] = bits
    # the 32 bits that start at each byte; a copy, for aligned words are read faster
    words = np.ndarray((len(bits) + 1,), np.dtype("<u4"), buffer, 0, (1,)).copy()
    top = np.uint32(1) << octaves.astype(np.uint32)
    shifts = (starts & 7).astype(np.uint32)
    gaps: NDArray[np.unsignedinteger] = ((words.take(starts >> 3) >> shifts) & (top - np.uint32(1))) | top
    return gaps
