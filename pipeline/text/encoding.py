"""Documents -> token ids, and which of them are labels.

Each document is closed by the tokenizer's EOS token. A token is a label if it is text or the EOS that closes it; the
first token of a document is not (nothing before it announces it). In chats only the assistant's turns are labels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.text.sources import Document

BATCH_DOCUMENTS = 64  # documents per tokenizer call


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document, its closing EOS included, and which of them are labels."""

    ids: NDArray[np.int64]
    is_label: NDArray[np.uint8]


class Encoder:
    """Documents -> token ids and label masks, with one Hugging Face tokenizer."""

    def __init__(self, tokenizer: Any, *, name: str) -> None:
        if tokenizer.eos_token_id is None:
            raise DdkError(
                f"{name}: the tokenizer has no EOS token", hint="set eos_token in its configuration"
            )
        self.tokenizer = tokenizer
        self.name = name
        self.eos = int(tokenizer.eos_token_id)

    def encode(self, batch: list[Document]) -> list[Encoded]:
        """Encode documents in order; raises DdkError for a chat the template cannot show."""
        rendered = [self._render(document) for document in batch]
        texts = [text for text, _ in rendered]
        with_offsets = any(spans is not None for _, spans in rendered)
        encoding = self.tokenizer(
            texts,
            add_special_tokens=not with_offsets,  # chat templates write their own
            return_attention_mask=False,
            return_offsets_mapping=with_offsets,
            verbose=False,
        )
        offsets = encoding["offset_mapping"] if with_offsets else [None] * len(batch)
        return [
            self._close(ids, spans, where)
            for ids, (_, spans), where in zip(encoding["input_ids"], rendered, offsets, strict=True)
        ]

    def _close(
        self, ids: list[int], spans: list[tuple[int, int]] | None, offsets: list[tuple[int, int]] | None
    ) -> Encoded:
        if ids and ids[-1] == self.eos and spans is None:
            ids = ids[:-1]  # some tokenizers close by themselves
        is_label = np.ones(len(ids) + 1, np.uint8)
        if spans is not None and offsets is not None:
            starts = np.array([start for start, _ in offsets], np.int64)
            ends = np.array([end for _, end in offsets], np.int64)
            inside = np.zeros(len(ids), bool)
            for first, last in spans:
                inside |= (starts >= first) & (ends <= last) & (ends > starts)
            is_label[:-1] = inside
            is_label[-1] = 0  # the template ends the last turn itself
        is_label[0] = 0
        return Encoded(np.array([*ids, self.eos], np.int64), is_label)

    def _render(self, document: Document) -> tuple[str, list[tuple[int, int]] | None]:
        """Text and, for a chat, the character spans of the assistant's turns (their end marks included)."""
        if document.messages is None:
            return document.text or "", None
        if not getattr(self.tokenizer, "chat_template", None):
            raise DdkError(
                f"{document.where}: a chat, but {self.name} has no chat template",
                hint="use a chat model's tokenizer, or give plain text",
            )
        whole = self._template(document, document.messages, False)
        spans = []
        for turn, message in enumerate(document.messages):
            if message["role"] != "assistant":
                continue
            before = self._template(document, document.messages[:turn], True) if turn else ""
            after = self._template(document, document.messages[: turn + 1], False)
            if not (after.startswith(before) and whole.startswith(after)):
                raise DdkError(
                    f"{document.where}: the chat template rewrites earlier turns, so turn {turn + 1} cannot be found",
                    hint="use a template that only appends",
                )
            spans.append((len(before), len(after)))
        return whole, spans

    def _template(self, document: Document, messages: list[dict[str, Any]], prompt: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            )
        except Exception as problem:  # noqa: BLE001 - whatever the template's author raises in Jinja
            raise DdkError(
                f"{document.where}: the chat template refuses it ({problem})", hint="mend the messages"
            ) from None


def tokenizer_digest(tokenizer: Any) -> str:
    """Fingerprint of what token ids mean: every id with its token, and the special ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()[:32]


def tokenizer_size(tokenizer: Any) -> int:
    """Smallest vocabulary that holds every id of the tokenizer."""
    return int(max(tokenizer.get_vocab().values())) + 1


def batches(documents: Iterable[Document], size: int = BATCH_DOCUMENTS) -> Iterator[list[Document]]:
    """Lists of up to `size` documents, chats and plain text apart (they are tokenised differently)."""
    batch: list[Document] = []
    for document in documents:
        if batch and (len(batch) == size or (document.messages is None) != (batch[0].messages is None)):
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch
