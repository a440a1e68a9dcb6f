"""Rows: every document lies in them once, begins where `starts` says, and whole ones are cut nowhere."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.models import spans_from
from ddk_pipe.pipeline.text import Encoded
from ddk_pipe.pipeline.text import packing as packing_module
from ddk_pipe.pipeline.text.packing import Rows, Stream, Whole, best_fit

EOS = 7
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def documents(lengths: list[int]) -> list[Encoded]:
    """Of tokens that tell them apart: number * 1000 + place."""
    return [
        Encoded(1000 * (number + 1) + np.arange(length), (np.arange(length) > 0).astype(np.uint8))
        for number, length in enumerate(lengths)
    ]


def packed(packer: Stream | Whole, lengths: list[int]) -> Rows:
    """All rows that it hands on, in order."""
    parts = [packer.add(document) for document in documents(lengths)] + [packer.rest()]
    assert packer.pending == 0
    rows = [part for part in parts if part is not None]
    return Rows(
        *(np.concatenate([getattr(part, name) for part in rows]) for name in Rows.__dataclass_fields__)
    )


def pieces(rows: Rows) -> list[list[int]]:
    """The tokens between starts, row by row; filling is checked and left out."""
    out = []
    for tokens, is_label, starts, used in zip(
        rows.tokens, rows.is_label, rows.starts, rows.used, strict=True
    ):
        spans = spans_from(starts)
        if used < len(tokens):
            assert spans[-1].start == used, "filling is a document of its own"
            assert set(tokens[used:].tolist()) == {EOS} and not is_label[used:].any()
            spans = spans[:-1]
        out += [tokens[span].tolist() for span in spans]
    return out


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "BLOCK_WINDOWS", 2)


@given(LENGTHS, st.integers(2, 20))
@settings(deadline=None)
def test_a_stream_is_the_documents_in_order_cut_where_rows_end(lengths: list[int], seq_len: int) -> None:
    found = pieces(packed(Stream(seq_len=seq_len, eos=EOS), lengths))
    expected, column = [], 0
    for document in documents(lengths):
        ids = document.ids.tolist()
        while ids:
            expected.append(ids[: seq_len - column])
            ids = ids[seq_len - column :]
            column = (column + len(expected[-1])) % seq_len
    assert found == expected


@given(LENGTHS, st.integers(2, 50))
@settings(deadline=None)
def test_whole_documents_are_cut_only_where_they_are_longer_than_a_row(
    lengths: list[int], seq_len: int
) -> None:
    found = pieces(packed(Whole(seq_len=seq_len, eos=EOS), lengths))
    expected = [
        document.ids[start : start + seq_len].tolist()
        for document in documents(lengths)
        for start in range(0, len(document.ids), seq_len)
    ]
    assert sorted(found) == sorted(expected)


@given(LENGTHS, st.integers(2, 50))
@settings(deadline=None)
def test_every_token_is_a_label_but_the_first_of_a_piece(lengths: list[int], seq_len: int) -> None:
    """All tokens of these documents are labels but their first; before a window's first token there is nothing, and before
    that of a piece in its middle another document."""
    for packer in (Stream(seq_len=seq_len, eos=EOS), Whole(seq_len=seq_len, eos=EOS)):
        rows = packed(packer, lengths)
        filling = np.arange(seq_len) >= rows.used[:, None]
        assert np.array_equal(rows.is_label[:, 1:] > 0, ~(rows.starts | filling)[:, 1:])


@given(st.lists(st.integers(1, 30), max_size=50), st.integers(30, 60))
def test_bins_hold_every_length_once_and_no_two_of_them_would_fit_in_one(
    lengths: list[int], room: int
) -> None:
    bins = best_fit(lengths, room)
    assert Counter(number for numbers in bins for number in numbers) == Counter(range(len(lengths)))
    sizes = sorted(sum(lengths[number] for number in numbers) for numbers in bins)
    assert all(size <= room for size in sizes)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > room
    assert all(numbers == sorted(numbers) for numbers in bins)


def test_the_longest_come_first_and_each_fills_the_fullest_bin() -> None:
    assert best_fit([5, 4, 6, 3, 2], 10) == [[1, 2], [0, 3, 4]]


def test_of_too_many_rows_the_fullest_are_taken() -> None:
    packer = Whole(seq_len=10, eos=EOS)
    for document in documents([6, 3, 5, 4]):
        packer.add(document)
    rows = packer.rest(1)
    assert rows is not None and rows.used.tolist() == [10] and packer.pending == 8


def test_chats_of_20_to_2000_tokens_fill_windows_of_2048(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    lengths = np.random.default_rng(0).integers(20, 2001, 4000).tolist()
    rows = packed(Whole(seq_len=2048, eos=EOS), lengths)
    filling = 1 - rows.used.sum() / rows.tokens.size
    assert rows.used.sum() == sum(lengths)
    assert filling <= 0.03, f"{filling:.2%}"
