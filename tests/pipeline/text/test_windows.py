from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddk_pipe.pipeline.text import Document, Encoder, SplitWriter, encode, labels_of, open_split


def write(
    folder: Path,
    documents: list[Document],
    encoder: Encoder,
    *,
    seq_len: int = 8,
    most: int | None = None,
    **options: Any,
) -> Any:
    writer = SplitWriter(
        folder, seq_len=seq_len, vocab_size=400, eos=encoder.eos, max_windows=most, **options
    )
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
    monkeypatch.setattr("ddk_pipe.pipeline.text.packing.BLOCK_WINDOWS", 3)
    other = write(tmp_path / "b", documents, encoder)
    assert one.facts.digest == other.facts.digest and one.facts.windows > 64
    assert np.array_equal(one.window(slice(None))[0], other.window(slice(None))[0])


def test_labels_look_one_ahead() -> None:
    tokens = np.array([[5, 6, 7, 8]])
    mask = np.array([[0, 1, 0, 1]], np.uint8)
    assert labels_of(tokens, mask, no_label=-100).tolist() == [[6, -100, 8, -100]]


def digest_before_there_was_a_choice(tokens: Any, mask: Any) -> str:
    """As splits had it from the start: of the digests of both arrays."""
    parts = (
        hashlib.blake2b(each, digest_size=16) for each in (tokens.astype("<u4").tobytes(), mask.tobytes())
    )
    return hashlib.blake2b(b"".join(part.digest() for part in parts), digest_size=16).hexdigest()


def test_where_documents_begin_is_recorded_and_part_of_the_digest(encoder: Encoder, tmp_path: Path) -> None:
    documents = [Document(str(i), f"some words {i} " * (i % 7 + 1)) for i in range(20)]
    islands = write(tmp_path / "a", documents, encoder, attention="document")
    windows = write(tmp_path / "b", documents, encoder, attention="window")
    (tokens, mask), starts = islands.window(slice(None)), islands.starts(slice(None))
    assert all(
        np.array_equal(one, other)
        for one, other in zip((tokens, mask), windows.window(slice(None)), strict=True)
    )
    lengths = [len(encoded.ids) for encoded in encoder.encode(documents)]
    begins = {0, *np.cumsum(lengths).tolist(), *range(0, tokens.size, tokens.shape[1])} - {tokens.size}
    assert np.flatnonzero(starts).tolist() == sorted(begins)
    assert not mask[:, 1:][starts[:, 1:]].any(), "no document predicts another one's first token"
    assert np.array_equal(islands.starts(3), starts[3])
    assert windows.starts(0) is None and not (windows.folder / "starts").exists()
    assert windows.facts.digest == digest_before_there_was_a_choice(tokens, mask)
    assert islands.facts.digest != windows.facts.digest


def test_chats_are_kept_whole_and_text_is_a_stream_unless_it_is_said(
    encoder: Encoder, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "how deep?"}, {"role": "assistant", "content": "ten metres"}]
    chats = [Document(f"c{i}", messages=chat) for i in range(9)]
    texts = [Document(f"t{i}", "how deep? " * 3) for i in range(9)]

    def whole(documents: list[Document], **options: Any) -> bool:
        """True if each of them has a window of its own, of which it leaves a little less than half."""
        (length,) = {len(encoded.ids) for encoded in encoder.encode(documents)}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        facts = write(folder, documents, encoder, seq_len=2 * length - 1, **options).facts
        assert facts.tokens == 9 * length
        return bool(facts.windows == 9)

    assert whole(chats) and not whole(texts)
    assert whole(texts, packing="whole") and not whole(chats, packing="stream")
    assert not whole(chats, attention="window") and whole(chats, attention="window", packing="whole")
