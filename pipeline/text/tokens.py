"""Documents -> packed windows per domain and split.

Packing: documents follow one another, each closed by the tokenizer's EOS token, and are cut into windows of
`seq_len` tokens; the last window is filled up with EOS. Attention runs over whole windows, as in ordinary
pre-training: teacher and student see the same context, so cached targets stay exact. Loss: a token is a label
if it is text or the EOS that closes it; the first token of a document is not (nothing before it announces
it), nor is filling. In chats only the assistant's turns are labels. `loss_mask[t]` says whether token t is one.

On disk `tokens/<domain>/<split>/` is a Zarr v3 group: `tokens` [windows, seq_len] u16 (u32 from 65,537 token
ids up) and `loss_mask` u8 of the same shape, with a record of where they came from in its attributes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable, settle_writes
from ddk_pipe.pipeline.text.sources import Document

TOKENS_VERSION = 1  # raise when packing changes: tokens of another version are made again
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
BLOCK_WINDOWS = 64  # windows held in memory, and in one Zarr chunk
BATCH_DOCUMENTS = 64  # documents per tokenizer call


@dataclass(frozen=True)
class Encoded:
    """Token ids of one document, its closing EOS included, and which of them are labels."""

    ids: NDArray[np.int64]
    is_label: NDArray[np.uint8]


@dataclass
class SplitFacts:
    """What one split holds; goes into the attributes and the prepare record."""

    windows: int = 0
    documents: int = 0
    tokens: int = 0  # filling left out
    labels: int = 0
    text_bytes: int = 0
    seconds: float = 0.0  # spent on the whole domain
    digest: str = ""


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


class SplitWriter:
    """Packs encoded documents of one split into windows, and writes them block by block."""

    def __init__(
        self, folder: Path, *, seq_len: int, vocab_size: int, eos: int, max_windows: int | None
    ) -> None:
        import zarr

        self.final, self.seq_len, self.eos = folder, seq_len, eos
        self.max_windows: int | None = max_windows
        self.folder = durable.partial_name(folder)
        durable.make_folder(folder.parent)
        dtype = "u2" if vocab_size <= 1 << 16 else "u4"
        self.group = zarr.open_group(self.folder, mode="w-", zarr_format=3)
        shape, chunks = (0, seq_len), (BLOCK_WINDOWS, seq_len)
        self.tokens = self.group.create_array("tokens", shape=shape, chunks=chunks, dtype=dtype)
        self.loss_mask = self.group.create_array("loss_mask", shape=shape, chunks=chunks, dtype="u1")
        self.counts = np.zeros(vocab_size, np.int64)
        self._began = time.monotonic()
        self.facts = SplitFacts()
        self._hashes = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._ids: list[NDArray[np.int64]] = []
        self._labels: list[NDArray[np.uint8]] = []
        self._pending = 0  # tokens not yet in a window

    @property
    def full(self) -> bool:
        if self.max_windows is None:
            return False
        return self.facts.windows * self.seq_len + self._pending >= self.max_windows * self.seq_len

    def add(self, document: Encoded, text_bytes: int) -> None:
        """Append a document; nothing happens once the split is full."""
        if self.full:
            return
        self.facts.documents += 1
        self.facts.text_bytes += text_bytes
        self._ids.append(document.ids)
        self._labels.append(document.is_label)
        self._pending += len(document.ids)
        if self._pending >= BLOCK_WINDOWS * self.seq_len:
            self._flush(self._pending // (BLOCK_WINDOWS * self.seq_len) * BLOCK_WINDOWS)

    def _flush(self, windows: int) -> None:
        ids, labels = np.concatenate(self._ids), np.concatenate(self._labels)
        if self.max_windows is not None:
            windows = min(windows, self.max_windows - self.facts.windows)
        cut = windows * self.seq_len
        self._ids, self._labels, self._pending = [ids[cut:]], [labels[cut:]], len(ids) - cut
        if not windows:
            return
        tokens = ids[:cut].reshape(windows, self.seq_len).astype(self.tokens.dtype)
        mask = labels[:cut].reshape(windows, self.seq_len)
        self.tokens.append(tokens)
        self.loss_mask.append(mask)
        self._hashes[0].update(tokens.astype("<u4").tobytes())
        self._hashes[1].update(mask.tobytes())
        self.counts += np.bincount(ids[:cut], minlength=len(self.counts))
        self.facts.windows += windows
        self.facts.labels += int(mask[:, 1:].sum())

    def finish(self, record: dict[str, Any]) -> SplitFacts:
        """Fill up the last window, record the facts, and put the split in its place."""
        if not self.full and self._pending:
            filling = -self._pending % self.seq_len
            self._ids.append(np.full(filling, self.eos, np.int64))
            self._labels.append(np.zeros(filling, np.uint8))
            self._pending += filling
            self.facts.tokens -= filling
        if self._pending:
            self._flush(self._pending // self.seq_len)
        self.facts.tokens += self.facts.windows * self.seq_len
        self.facts.digest = durable.digest(b"".join(part.digest() for part in self._hashes))
        self.facts.seconds = round(time.monotonic() - self._began, 3)
        counts = self.group.create_array("token_counts", shape=self.counts.shape, dtype="i8")
        counts[:] = self.counts
        self.group.attrs.update({"record": record, "facts": asdict(self.facts)})
        shutil.rmtree(self.final, ignore_errors=True)
        durable.publish_folder(self.folder, self.final)
        return self.facts

    def discard(self) -> None:
        """Remove what was written so far."""
        settle_writes()
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class Split:
    """Prepared windows of one domain and split, opened for reading."""

    folder: Path
    tokens: Any  # zarr array [windows, seq_len]
    loss_mask: Any
    token_counts: NDArray[np.int64]
    facts: SplitFacts
    record: dict[str, Any] = field(default_factory=dict)

    def window(self, index: int | slice) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Tokens and loss mask of one window [seq_len], or of a slice of windows [n, seq_len]."""
        return np.asarray(self.tokens[index]).astype(np.int64), np.asarray(self.loss_mask[index])


def open_split(folder: Path) -> Split:
    """Raises DdkError if `folder` holds no prepared split."""
    import zarr

    if not (folder / "zarr.json").is_file():
        raise DdkError(f"{folder}: no prepared tokens", hint="run `ddk-pipe prepare`")
    group = zarr.open_group(folder, mode="r")
    return Split(
        folder=folder,
        tokens=group["tokens"],
        loss_mask=group["loss_mask"],
        token_counts=np.asarray(group["token_counts"][:]),
        facts=SplitFacts(**group.attrs["facts"]),
        record=dict(group.attrs["record"]),
    )


def labels_of(tokens: NDArray[np.int64], loss_mask: NDArray[np.uint8], *, no_label: int) -> NDArray[np.int64]:
    """Labels [..., seq_len]: position t is to predict token t+1 where that is a label; the last has none."""
    labels = np.full(tokens.shape, no_label, np.int64)
    labels[..., :-1] = np.where(loss_mask[..., 1:] > 0, tokens[..., 1:], no_label)
    return labels


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


def pack(
    documents: Iterable[Document],
    encoder: Encoder,
    writers: Callable[[Document], SplitWriter],
    *,
    max_tokens: int,
    finished: Callable[[], bool],
    progress: Callable[[int], None],
) -> None:
    """Encode `documents` and hand each to the writer of its split, until all have what they want.

    Raises DdkError for a document of more than `max_tokens` tokens (a shard): it names file and line.
    """
    for batch in batches(documents):
        for document, encoded in zip(batch, encoder.encode(batch), strict=True):
            if len(encoded.ids) == 1:  # no text, only the closing EOS
                continue
            if len(encoded.ids) > max_tokens:
                raise DdkError(
                    f"{document.where}: a document of {len(encoded.ids):,} tokens is longer than a shard of {max_tokens:,}",
                    hint=f"split the document, or make cache.shard_windows {-(-len(encoded.ids) // max_tokens)} times as large",
                )
            size = len((document.text or json.dumps(document.messages)).encode())
            writers(document).add(encoded, size)
            progress(len(encoded.ids))
        if finished():
            return
