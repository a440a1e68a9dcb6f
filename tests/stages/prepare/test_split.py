"""Who is set aside for validation: the lowest marks, as many documents as fill the windows, each a little."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.text import Document, Encoded, Piece
from ddk_pipe.stages.prepare.split import MARKS, Candidates, DefaultSplit, cut, mark_of

SEQ_LEN = 8


def piece(text: str, tokens: int) -> Piece:
    encoded = Encoded(np.arange(tokens), np.ones(tokens, np.uint8))
    return Piece(text, Document(text, text).digest, encoded, len(text))


def split_of(
    lengths: list[tuple[int, int]], *, windows: int, fraction: float
) -> tuple[list[Piece], list[tuple[Piece, int]]]:
    """Documents (content, tokens) -> training text, and validation text with the tokens it gives."""
    candidates = Candidates(windows=windows, seq_len=SEQ_LEN)
    split = DefaultSplit(candidates, fraction=fraction)
    train = [freed for name, tokens in lengths for freed in split.offer(piece(str(name), tokens))]
    chosen = split.close()
    assert len(train) + len(chosen.handed_back) + len(chosen.given) + chosen.equal == len(lengths)
    return [*train, *chosen.handed_back], chosen.given


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(2, 40)), min_size=1, max_size=80),
    st.integers(1, 6),
    st.sampled_from([0.001, 0.05, 0.3, 0.9]),
)
@settings(max_examples=300, deadline=None)
def test_every_document_is_on_one_side(named: list[tuple[int, int]], windows: int, fraction: float) -> None:
    lengths = [(name, 2 + name % 30) for name, _ in named]  # equal documents are equally long
    train, held = split_of(lengths, windows=windows, fraction=fraction)
    names, chosen = [one.where for one in train], [one.where for one, _ in held]
    assert not set(names) & set(chosen)
    assert {*names, *chosen} == {str(name) for name, _ in lengths}  # none is lost
    assert len(chosen) == len(set(chosen)) >= 1
    given_times = Counter(str(name) for name, _ in lengths)
    assert Counter(names) == {name: given_times[name] for name in names}
    marks = [mark_of(one) for one, _ in held]
    assert marks == sorted(marks)
    below = [
        mark_of(piece(str(name), 2)) for name, _ in lengths if mark_of(piece(str(name), 2)) < fraction * MARKS
    ]
    assert max(marks) < fraction * MARKS if below else len(marks) == 1
    assert all(mark not in below or mark > max(marks) for mark in map(mark_of, train))  # the lowest marks win
    used = sum(tokens for _, tokens in held)
    assert used <= windows * SEQ_LEN


def test_windows_show_as_many_documents_as_they_can() -> None:
    """Eight windows were two documents, and what they had no room for was in neither split."""
    lengths = [(number, 6 * SEQ_LEN) for number in range(2000)]
    train, held = split_of(lengths, windows=8, fraction=0.05)
    assert [tokens for _, tokens in held] == [SEQ_LEN] * 8
    assert len(train) == 2000 - 8


@pytest.mark.parametrize(("documents", "each"), [(1, 8), (2, 4), (3, 3), (8, 1)])
def test_documents_give_more_where_there_are_few(documents: int, each: int) -> None:
    candidates = Candidates(windows=8, seq_len=SEQ_LEN)
    for number in range(documents):
        assert candidates.offer(piece(str(number), 1000)) == []
    given_tokens = [tokens for _, tokens in candidates.close().given]
    assert (
        sum(given_tokens) == 8 * SEQ_LEN
        and max(given_tokens) == each * SEQ_LEN
        and len(given_tokens) == documents
    )


def test_order_of_the_text_does_not_matter() -> None:
    lengths = [(number, 3 + number % 20) for number in range(500)]
    one, other = (split_of(order, windows=4, fraction=0.1)[1] for order in (lengths, lengths[::-1]))
    assert [(item.where, tokens) for item, tokens in one] == [(item.where, tokens) for item, tokens in other]


def test_text_sampled_by_a_plain_hash_is_split_all_the_same() -> None:
    """All of it fell into one split where the split was by the first bits of the very same hash."""
    sampled = [
        text
        for text in map(str, range(20_000))
        if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < 0.05 * (1 << 32)
    ]
    marks = np.array([mark_of(piece(text, 2)) / MARKS for text in sampled])
    assert len(marks) > 900 and abs((marks < 0.05).mean() - 0.05) < 0.03


def test_cut() -> None:
    whole = Encoded(np.arange(5), np.array([0, 1, 1, 0, 1], np.uint8), is_chat=True)
    part = cut(whole, 3)
    assert part.ids.tolist() == [0, 1, 2] and part.is_label.tolist() == [0, 1, 1] and part.is_chat
