"""Encoded documents -> packed windows per domain and split.

Packing: documents follow one another and are cut into windows of `seq_len` tokens; the last window is filled up with
EOS, which is no label. Attention runs over whole windows, as in ordinary pre-training: teacher and student see the same
context, so cached targets stay exact. `loss_mask[t]` says whether token t is a label.

On disk `tokens/<domain>/<split>/` is a Zarr v3 group: `tokens` [windows, seq_len] u16 (u32 from 65,537 token
ids up) and `loss_mask` u8 of the same shape, with a record of where they came from in its attributes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.storage import durable, settle_writes
from ddk_pipe.pipeline.text.encoding import Encoded, Encoder, batches
from ddk_pipe.pipeline.text.sources import Document

TOKENS_VERSION = 2  # raise when encoding or packing changes: tokens of another version are made again
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)
BLOCK_WINDOWS = 64  # windows held in memory, and in one Zarr chunk


@dataclass
class SplitFacts:
    """What one split holds; goes into the attributes and the prepare record."""

    windows: int = 0
    documents: int = 0
    tokens: int = 0  # filling left out
    labels: int = 0
    text_bytes: int = 0
    chats: int = 0  # of the documents
    left_out: int = 0  # documents of the training text that are validation text too
    unused_tokens: int = 0  # of documents that are set aside, beyond what their windows hold
    seconds: float = 0.0  # spent on the whole domain
    digest: str = ""


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
        self.facts.chats += document.is_chat
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


@dataclass(frozen=True)
class Piece:
    """A document with its tokens, and the bytes of its text."""

    document: Document
    encoded: Encoded
    text_bytes: int


def encode(documents: Iterable[Document], encoder: Encoder) -> Iterator[list[Piece]]:
    """The documents in order, a batch at a time; those without text are left out."""
    for batch in batches(documents):
        yield [
            Piece(document, encoded, len((document.text or json.dumps(document.messages)).encode()))
            for document, encoded in zip(batch, encoder.encode(batch), strict=True)
            if len(encoded.ids) > 1  # more than the closing EOS
        ]
