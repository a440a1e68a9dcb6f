from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import make_tokenizer
from transformers import AutoTokenizer

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text import (
    Document,
    Encoder,
    SplitWriter,
    labels_of,
    open_split,
    pack,
    tokenizer_digest,
)
from ddk_pipe.pipeline.text.tokens import batches

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_teacher)


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, name="tiny")


def write(
    folder: Path, documents: list[Document], encoder: Encoder, *, seq_len: int = 8, most: int | None = None
) -> Any:
    writer = SplitWriter(folder, seq_len=seq_len, vocab_size=400, eos=encoder.eos, max_windows=most)
    pack(
        documents,
        encoder,
        lambda _: writer,
        max_tokens=10_000,
        finished=lambda: writer.full,
        progress=lambda _: None,
    )
    writer.finish({})
    return open_split(folder)


def test_text_is_closed_by_eos_and_its_first_token_is_no_label(encoder: Encoder, tokenizer: Any) -> None:
    (encoded,) = encoder.encode([Document("x", "hello world")])
    assert encoded.ids[-1] == encoder.eos
    assert tokenizer.decode(encoded.ids[:-1]) == "hello world"
    assert encoded.is_label.tolist() == [0] + [1] * (len(encoded.ids) - 1)


def test_chat_labels_are_exactly_the_assistants_turns(encoder: Encoder, tokenizer: Any) -> None:
    (encoded,) = encoder.encode([Document("x", messages=CHAT)])
    labelled = tokenizer.decode(encoded.ids[encoded.is_label == 1])
    assert labelled == "It is 2.<eos>\n4<eos>\n"
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(encoded.ids[:-1]) == whole


def test_chat_that_starts_with_the_assistant(encoder: Encoder, tokenizer: Any) -> None:
    (encoded,) = encoder.encode([Document("x", messages=[{"role": "assistant", "content": "Hello"}])])
    assert "Hello" in tokenizer.decode(encoded.ids[encoded.is_label == 1])


def test_templates_that_rewrite_history_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(DdkError, match="rewrites earlier turns"):
        Encoder(tokenizer, name="t").encode([Document("f:3", messages=CHAT)])
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(DdkError, match="f:3: the chat template refuses it"):
        Encoder(tokenizer, name="t").encode([Document("f:3", messages=CHAT)])
    tokenizer.chat_template = None
    with pytest.raises(DdkError, match="no chat template"):
        Encoder(tokenizer, name="t").encode([Document("f:3", messages=CHAT)])


def test_tokenizer_without_eos(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.eos_token = None
    with pytest.raises(DdkError, match="no EOS"):
        Encoder(tokenizer, name="t")


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
    monkeypatch.setattr("ddk_pipe.pipeline.text.tokens.BLOCK_WINDOWS", 3)
    other = write(tmp_path / "b", documents, encoder)
    assert one.facts.digest == other.facts.digest and one.facts.windows > 64
    assert np.array_equal(one.window(slice(None))[0], other.window(slice(None))[0])


def test_labels_look_one_ahead() -> None:
    tokens = np.array([[5, 6, 7, 8]])
    mask = np.array([[0, 1, 0, 1]], np.uint8)
    assert labels_of(tokens, mask, no_label=-100).tolist() == [[6, -100, 8, -100]]


def test_chats_and_text_are_not_mixed_in_a_batch() -> None:
    documents = [
        Document("a", "x"),
        Document("b", messages=CHAT),
        Document("c", messages=CHAT),
        Document("d", "y"),
    ]
    assert [len(batch) for batch in batches(documents)] == [1, 2, 1]


def test_digest_tells_tokenizers_apart(tokenizer: Any, tmp_path: Path) -> None:
    assert tokenizer_digest(tokenizer) == tokenizer_digest(make_tokenizer(tmp_path / "same"))
    assert tokenizer_digest(tokenizer) != tokenizer_digest(make_tokenizer(tmp_path / "other", vocab_size=380))
