"""Which documents are set aside for validation, and how much of each.

A document's mark, the first 8 bytes of its digest, decides: the lowest marks win. So the choice does not depend on the
order of the text, equal documents fall on the same side, and what is chosen is a random sample of all of it.
Validation holds some windows only (`prepare.max_validation_windows`), and they are to show as many documents as they
can: a document gives at most one window's worth of tokens, more only where there are too few to fill the windows.
As soon as lower marks fill them, a document with a higher one has no place any more and is handed back. What is held
in memory is about one document for each window.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from ddk_pipe.pipeline.text import Encoded, Piece

MARKS = 1 << 64


def mark_of(piece: Piece) -> int:
    """0 to MARKS - 1, uniform over documents."""
    return int.from_bytes(piece.digest[:8])


@dataclass(frozen=True)
class Chosen:
    """Validation text, each document once with the tokens it gives; those that were not needed in the end; and how
    many documents are equal to a chosen one, and so belong nowhere else."""

    given: list[tuple[Piece, int]]
    handed_back: list[Piece]
    equal: int


class Candidates:
    """Those of the documents offered so far that fill `windows` windows of `seq_len` tokens, the lowest marks first."""

    def __init__(self, *, windows: int, seq_len: int) -> None:
        self._windows, self._seq_len = windows, seq_len
        self._equal: dict[int, list[Piece]] = {}  # by mark
        self._highest: list[int] = []  # heap of -mark
        self._held = 0  # tokens that all of them give, at most a window's worth each

    def __bool__(self) -> bool:
        return bool(self._equal)

    @property
    def filled(self) -> bool:
        return self._held >= self._windows * self._seq_len

    def offer(self, piece: Piece) -> list[Piece]:
        """Keep it as long as it is needed; returns those that are no longer, itself perhaps among them."""
        mark = mark_of(piece)
        if mark in self._equal:
            self._equal[mark].append(piece)
            return []
        self._equal[mark] = [piece]
        heapq.heappush(self._highest, -mark)
        self._held += self._given(piece, 1)
        handed_back: list[Piece] = []
        while (spare := self._spare()) is not None:
            heapq.heappop(self._highest)
            self._held -= self._given(self._equal[spare][0], 1)
            handed_back += self._equal.pop(spare)
        return handed_back

    def close(self) -> Chosen:
        """No document follows: what each gives, in order of their marks, which is a random order of the text."""
        each, room = 1, self._windows * self._seq_len  # windows' worth that a document gives; tokens
        firsts = [(mark, self._equal[mark][0]) for mark in sorted(self._equal)]
        while each < self._windows and sum(self._given(piece, each) for _, piece in firsts) < room:
            each += 1
        given: list[tuple[Piece, int]] = []
        for mark, piece in firsts:
            tokens = min(self._given(piece, each), room)
            room -= tokens
            if tokens:
                given.append((piece, tokens))
                self._equal[mark] = self._equal[mark][1:]
        taken = {mark for mark, _ in firsts[: len(given)]}
        return Chosen(
            given=given,
            handed_back=[piece for mark, _ in firsts[len(given) :] for piece in self._equal[mark]],
            equal=sum(len(self._equal[mark]) for mark in taken),
        )

    def _given(self, piece: Piece, windows: int) -> int:
        return min(len(piece.encoded.ids), windows * self._seq_len)

    def _spare(self) -> int | None:
        """The highest mark, if all others fill the windows."""
        highest = -self._highest[0] if self._highest else None
        if highest is None:
            return None
        without = self._held - self._given(self._equal[highest][0], 1)
        return highest if without >= self._windows * self._seq_len else None


class DefaultSplit:
    """Training and validation text from one stream: marks below `fraction` are candidates, and so is the lowest mark
    of all where none is below. All that is not chosen is training text, in the order in which it turned out to be."""

    def __init__(self, candidates: Candidates, *, fraction: float) -> None:
        self.candidates = candidates
        self._threshold = int(fraction * MARKS)
        self._lowest: list[Piece] = []  # equal ones, while no mark is below the threshold

    def offer(self, piece: Piece) -> list[Piece]:
        """What is training text now that this document is known."""
        mark = mark_of(piece)
        if mark < self._threshold:
            freed, self._lowest = self._lowest, []
            return [*freed, *self.candidates.offer(piece)]
        if self.candidates:
            return [piece]
        known = mark_of(self._lowest[0]) if self._lowest else MARKS
        if mark > known:
            return [piece]
        freed, self._lowest = ([], [*self._lowest, piece]) if mark == known else (self._lowest, [piece])
        return freed

    def close(self) -> Chosen:
        """No document follows."""
        for piece in self._lowest:
            self.candidates.offer(piece)
        return self.candidates.close()


def cut(encoded: Encoded, tokens: int) -> Encoded:
    """Its first `tokens` tokens."""
    return Encoded(encoded.ids[:tokens], encoded.is_label[:tokens], encoded.is_chat)
