from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.text import Document, Encoder, SplitWriter, encode, labels_of, open_split


def write(
    folder: Path, documents: list[Document], encoder: Encoder, *, seq_len: int = 8, most: int | None = None
) -> Any:
    writer = SplitWriter(folder, seq_len=seq_len, vocab_size=400, eos=encoder.eos, max_windows=most)
    for batch in encode(documents, encoder):
        for piece in batch:
            writer.add(piece.encoded, piece.text_bytes)
        if writer.full:
            break
    writer.finish({})
    return open_split(folder)


@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=12),
    seq_len=st.integers(2, 40),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows_hold_every_token_once_and_in_order(
    texts: list[str], seq_len: int, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    split = write(tmp_path_factory.mktemp("t") / "train", documents, encoder, seq_len=seq_len)
    tokens, mask = split.window(slice(None))
    expected = [id_ for e in encoder.encode(documents) if len(e.ids) > 1 for id_ in e.ids.tolist()]
    labels = [m for e in encoder.encode(documents) if len(e.ids) > 1 for m in e.is_label.tolist()]
    filling = tokens.size - len(expected)
    assert 0 <= filling < seq_len
    assert tokens.ravel().tolist() == expected + [encoder.eos] * filling
    assert mask.ravel().tolist() == labels + [0] * filling
    assert split.facts.tokens == len(expected)
    assert split.token_counts.sum() == tokens.size


def test_limit_of_windows_stops_reading(encoder: Encoder, tmp_path: Path) -> None:
    read: list[int] = []

    def endless() -> Any:
        for number in range(10**9):
            read.append(number)
            yield Document(str(number), f"document number {number}")

    split = write(tmp_path / "train", endless(), encoder, most=5)
    assert split.facts.windows == 5 and len(read) < 1000


def test_blocks_do_not_change_the_result(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(str(i), f"some words {i} " * (i % 7 + 1)) for i in range(50)]
    one = write(tmp_path / "a", documents, encoder)
    monkeypatch.setattr("ddk_pipe.pipeline.text.windows.BLOCK_WINDOWS", 3)
    other = write(tmp_path / "b", documents, encoder)
    assert one.facts.digest == other.facts.digest and one.facts.windows > 64
    assert np.array_equal(one.window(slice(None))[0], other.window(slice(None))[0])


def test_labels_look_one_ahead() -> None:
    tokens = np.array([[5, 6, 7, 8]])
    mask = np.array([[0, 1, 0, 1]], np.uint8)
    assert labels_of(tokens, mask, no_label=-100).tolist() == [[6, -100, 8, -100]]
