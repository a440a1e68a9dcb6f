from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import make_tokenizer

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text import Document, Encoder, tokenizer_digest
from ddk_pipe.pipeline.text.encoding import batches

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "It is 2."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4"},
]


def test_text_is_closed_by_eos_and_its_first_token_is_no_label(encoder: Encoder, tokenizer: Any) -> None:
    (encoded,) = encoder.encode([Document("x", "hello world")])
    assert encoded.ids[-1] == encoder.eos
    assert tokenizer.decode(encoded.ids[:-1]) == "hello world"
    assert encoded.is_label.tolist() == [0] + [1] * (len(encoded.ids) - 1)


def test_chat_labels_are_exactly_the_assistants_turns(encoder: Encoder, tokenizer: Any) -> None:
    (encoded,) = encoder.encode([Document("x", messages=CHAT)])
    labelled = tokenizer.decode(encoded.ids[encoded.is_label == 1])
    assert labelled == "It is 2.<eos>4<eos>"
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
