"""Documents -> token ids, and which of them are labels.

Each document is closed by the tokenizer's EOS token. A token is a label if it is text or the EOS that closes it; the
first token of a document is not (nothing before it announces it). In chats only the assistant's turns are labels, with
what ends them. Only the tokenizer and the chat template write control tokens: text that mentions one is its letters.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import DEFAULT_DATE
from ddk_pipe.pipeline.text.encoding.chats import Rendered, render_chat
from ddk_pipe.pipeline.text.encoding.controls import Controls
from ddk_pipe.pipeline.text.encoding.spans import Span
from ddk_pipe.pipeline.text.encoding.template import Template, sources, turn_marks
from ddk_pipe.pipeline.text.sources import Document

BATCH_DOCUMENTS = 64  # documents per tokenizer call
Ids = NDArray[np.int64]
Offsets = list[tuple[int, int]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document, its closing EOS included, and which of them are labels. Without text: EOS alone."""

    ids: Ids
    is_label: NDArray[np.uint8]
    is_chat: bool = False


class Encoder:
    """Documents -> token ids and label masks, with one Hugging Face tokenizer; chats are rendered as on `date`."""

    def __init__(self, tokenizer: Any, *, name: str, date: str = DEFAULT_DATE) -> None:
        if tokenizer.eos_token_id is None:
            raise DdkError(
                f"{name}: the tokenizer has no EOS token", hint="set eos_token in its configuration"
            )
        self.tokenizer = tokenizer
        self.name, self.date = name, date
        self.eos = int(tokenizer.eos_token_id)
        self.template = Template(tokenizer, datetime.date.fromisoformat(date))
        self.controls = Controls(tokenizer, turn_marks(tokenizer, self.template))
        empty = np.array(tokenizer("", verbose=False)["input_ids"], np.int64)
        self._added = len(empty)  # tokens that the tokenizer puts around every text
        self._around = self.controls.found(empty)

    def encode(self, batch: list[Document]) -> list[Encoded]:
        """Encode documents in order; raises DdkError for a chat the template cannot show."""
        chats = iter(self._chats([document for document in batch if document.messages is not None]))
        plain = iter(self._plain([document for document in batch if document.messages is None]))
        return [next(plain if document.messages is None else chats) for document in batch]

    def _plain(self, documents: list[Document]) -> list[Encoded]:
        if not documents:
            return []
        texts = [document.text or "" for document in documents]
        encoding = self.tokenizer(
            texts, split_special_tokens=True, return_attention_mask=False, verbose=False
        )
        return [
            self._close_text(np.array(ids, np.int64), text, document.where)
            for ids, text, document in zip(encoding["input_ids"], texts, documents, strict=True)
        ]

    def _close_text(self, ids: Ids, text: str, where: str) -> Encoded:
        if self.controls.may_mention(ids, text, self._around):  # splitting is not enough for every tokenizer
            ids = np.array(self.controls.letters.encode(text).ids, np.int64)
            self._check(ids, self._around, where)
        if len(ids) == self._added:
            ids = ids[:0]
        elif ids[-1] == self.eos:
            ids = ids[:-1]  # some tokenizers close by themselves
        is_label = np.ones(len(ids) + 1, np.uint8)
        is_label[0] = 0
        return Encoded(np.append(ids, self.eos), is_label)

    def _check(self, ids: Ids, expected: list[int], where: str) -> None:
        if self.controls.found(ids) != self.controls.found(np.array(expected, np.int64)):
            raise DdkError(
                f"{where}: {self.name} reads control tokens in text that only mentions them",
                hint="leave the document out",
            )

    def _chats(self, documents: list[Document]) -> list[Encoded]:
        if not documents:
            return []
        if not any(sources(self.tokenizer)):
            raise DdkError(
                f"{documents[0].where}: a chat, but {self.name} has no chat template",
                hint="use a chat model's tokenizer, name a template (prepare.chat_template), or give plain text",
            )
        rendered = [render_chat(document, self.template, self.controls) for document in documents]
        read = iter(self._read([chat.text for chat in rendered if chat.spelt is None]))
        out = []
        for document, chat in zip(documents, rendered, strict=True):
            ids, offsets = next(read) if chat.spelt is None else self._spelt(chat, chat.spelt, document.where)
            out.append(self._close_chat(ids, offsets, chat.spans))
        return out

    def _read(self, texts: list[str]) -> Iterator[tuple[Ids, Offsets]]:
        """Rendered chats as the tokenizer itself reads them; templates write their own BOS."""
        if not texts:
            return
        encoding = self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for ids, offsets in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
            yield np.array(ids, np.int64), offsets

    def _spelt(self, chat: Rendered, expected: list[int], where: str) -> tuple[Ids, Offsets]:
        encoding = self.controls.letters.encode(chat.text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int64)
        self._check(ids, expected, where)
        return ids, encoding.offsets

    def _close_chat(self, ids: Ids, offsets: Offsets, spans: list[Span]) -> Encoded:
        is_label = np.zeros(len(ids) + 1, np.uint8)
        starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
        for span in spans:
            inside = (starts < span.last) & (ends > span.first)
            inside |= (starts == ends) & (starts >= span.first) & (starts < span.last)
            is_label[:-1] |= inside
            if not span.closed and not (inside & (ends > span.last)).any():
                is_label[np.searchsorted(starts, span.last)] = 1  # the next turn's opening, or our EOS
        is_label[0] = 0
        return Encoded(np.append(ids, self.eos), is_label, is_chat=True)


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
