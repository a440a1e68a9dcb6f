"""Encoded documents -> rows of seq_len tokens.

`Stream`: documents follow one another and are cut where a row ends. `Whole`: a document that fits in a row is never
cut; those at hand are laid together best-fit decreasing, and only longer ones are cut, at rows of their own. What is
left of a row is filled up with EOS, which is no label.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.text.encoding import Encoded

BLOCK_WINDOWS = 64  # rows that are handed on together
HELD_BLOCKS = (
    4  # rows' worth of whole documents to choose from, in blocks; half of them are handed on, the fullest
)


@dataclass(frozen=True)
class Rows:
    """Rows of seq_len tokens.

    tokens int64, is_label u8, starts bool, all [rows, seq_len]; used int64 [rows]: tokens of a row that are no filling.
    `starts` is true where a document or a piece of one begins, and where filling does.
    """

    tokens: NDArray[np.int64]
    is_label: NDArray[np.uint8]
    starts: NDArray[np.bool_]
    used: NDArray[np.int64]

    def first(self, most: int | None) -> Rows:
        """At most so many of them; none: all."""
        return Rows(self.tokens[:most], self.is_label[:most], self.starts[:most], self.used[:most])


class Stream:
    """Documents one after the other."""

    def __init__(self, *, seq_len: int, eos: int) -> None:
        self.seq_len, self.eos = seq_len, eos
        self.pending = 0  # tokens not yet handed on
        self._documents: list[Encoded] = []

    def add(self, document: Encoded) -> Rows | None:
        """Append a document; returns full rows once there is a block of them."""
        self._append(document)
        blocks = self.pending // (BLOCK_WINDOWS * self.seq_len)
        return self._cut(blocks * BLOCK_WINDOWS) if blocks else None

    def rest(self, most: int | None = None) -> Rows | None:
        """What is left, its last row filled up, the first `most` rows of it; None if there is nothing."""
        if not self.pending:
            return None
        filling = -self.pending % self.seq_len
        if filling:
            self._append(Encoded(np.full(filling, self.eos, np.int64), np.zeros(filling, np.uint8)))
        rows = self._cut(self.pending // self.seq_len)
        rows.used[-1] -= filling
        return rows.first(most)

    def _append(self, document: Encoded) -> None:
        self._documents.append(document)
        self.pending += len(document.ids)

    def _cut(self, rows: int) -> Rows:
        ids = np.concatenate([document.ids for document in self._documents])
        is_label = np.concatenate([document.is_label for document in self._documents])
        starts = np.zeros(len(ids), bool)
        starts[np.cumsum([0, *(len(document.ids) for document in self._documents[:-1])])] = True
        cut, shape = rows * self.seq_len, (rows, self.seq_len)
        starts[: cut : self.seq_len] = True
        self._documents = [Encoded(ids[cut:], is_label[cut:])] if cut < len(ids) else []
        self.pending -= cut
        used = np.full(rows, self.seq_len, np.int64)
        return Rows(
            ids[:cut].reshape(shape), is_label[:cut].reshape(shape), starts[:cut].reshape(shape), used
        )


class Whole:
    """Documents that fit in a row in one piece each."""

    def __init__(self, *, seq_len: int, eos: int) -> None:
        self.seq_len, self.eos = seq_len, eos
        self.pending = 0  # tokens not yet handed on
        self._pieces: list[Encoded] = []

    def add(self, document: Encoded) -> Rows | None:
        """Take a document in; returns rows once there are enough documents to choose from."""
        for start in range(0, len(document.ids), self.seq_len):
            part = slice(start, start + self.seq_len)
            is_label = document.is_label[part].copy()
            is_label[0] = 0  # what stands before it now may be another document
            self._pieces.append(Encoded(document.ids[part], is_label))
        self.pending += len(document.ids)
        if self.pending < HELD_BLOCKS * BLOCK_WINDOWS * self.seq_len:
            return None
        return self._hand_on(HELD_BLOCKS // 2 * BLOCK_WINDOWS)

    def rest(self, most: int | None = None) -> Rows | None:
        """What is left, the fullest `most` rows of it; None if there is nothing."""
        return self._hand_on(len(self._pieces) if most is None else most) if self.pending else None

    def _hand_on(self, most: int) -> Rows:
        """The fullest rows, `most` of them if there are so many, in the order of their first documents: sorted by
        fullness, the first windows of a split would be those of its longest documents."""
        together = best_fit([len(piece.ids) for piece in self._pieces], self.seq_len)
        used = [sum(len(self._pieces[number].ids) for number in numbers) for numbers in together]
        fullest = sorted(range(len(together)), key=lambda row: -used[row])[:most]
        chosen = sorted((together[row] for row in fullest), key=lambda numbers: numbers[0])
        rows = self._laid(chosen)
        gone = {number for numbers in chosen for number in numbers}
        self._pieces = [piece for number, piece in enumerate(self._pieces) if number not in gone]
        self.pending -= int(rows.used.sum())
        return rows

    def _laid(self, chosen: list[list[int]]) -> Rows:
        shape = (len(chosen), self.seq_len)
        rows = Rows(
            np.full(shape, self.eos, np.int64),
            np.zeros(shape, np.uint8),
            np.zeros(shape, bool),
            np.zeros(len(chosen), np.int64),
        )
        for row, numbers in enumerate(chosen):
            pieces = [self._pieces[number] for number in numbers]
            ends = np.cumsum([len(piece.ids) for piece in pieces])
            rows.tokens[row, : ends[-1]] = np.concatenate([piece.ids for piece in pieces])
            rows.is_label[row, : ends[-1]] = np.concatenate([piece.is_label for piece in pieces])
            rows.starts[row, [0, *ends[ends < self.seq_len]]] = True
            rows.used[row] = ends[-1]
        return rows


def best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Numbers of `lengths`, each at most `room`, by bin and rising in each: the longest first, each into the bin that it
    fills best."""
    bins: list[list[int]] = []
    left: list[tuple[int, int]] = []  # of bins that are not full: room left, number; rising
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect_left(left, (lengths[number], 0))
        if at < len(left):
            free, chosen = left.pop(at)
            bins[chosen].append(number)
        else:
            free, chosen = room, len(bins)
            bins.append([number])
        if free > lengths[number]:
            insort(left, (free - lengths[number], chosen))
    return [sorted(numbers) for numbers in bins]
