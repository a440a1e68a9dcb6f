"""Encoded documents -> packed windows per domain and split.

Documents are laid into windows of `seq_len` tokens (`packing`). `loss_mask[t]` says whether token t is a label.

On disk `tokens/<domain>/<split>/` is a Zarr v3 group: `tokens` [windows, seq_len] u16 (u32 from 65,537 token
ids up) and `loss_mask` u8 of the same shape, with a record of where they came from in its attributes. Where documents do
not see each other (`attention: document`) there is also `starts`, u8 of the same shape: 1 where a document begins.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.manifest import Attention, Packing
from ddk_pipe.pipeline.models import Starts
from ddk_pipe.pipeline.storage import durable, settle_writes
from ddk_pipe.pipeline.text.encoding import Encoded
from ddk_pipe.pipeline.text.packing import BLOCK_WINDOWS, Rows, Stream, Whole

TOKENS_VERSION = 2  # raise when encoding or packing changes: tokens of another version are made again
TRAIN, VALIDATION = "train", "validation"
SPLITS = (TRAIN, VALIDATION)


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
    unused_tokens: int = 0  # of documents that were set aside or kept whole, beyond what the windows hold
    seconds: float = 0.0  # spent on the whole domain
    digest: str = ""


class SplitWriter:
    """Packs encoded documents of one split into windows, and writes them block by block.

    `attention`: document (where documents begin is written too) or window. `packing`: stream or whole; none: whole for
    chats whose documents do not see each other, stream for all else.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seq_len: int,
        vocab_size: int,
        eos: int,
        max_windows: int | None,
        attention: Attention = "document",
        packing: Packing | None = None,
    ) -> None:
        import zarr

        self.final, self.seq_len = folder, seq_len
        self.max_windows: int | None = max_windows
        self.attention, self.packing = attention, packing
        self.folder = durable.partial_name(folder)
        durable.make_folder(folder.parent)
        dtype = "u2" if vocab_size <= 1 << 16 else "u4"
        self.group = zarr.open_group(self.folder, mode="w-", zarr_format=3)
        arrays = {"tokens": dtype, "loss_mask": "u1", **({"starts": "u1"} if self._islands else {})}
        shape, chunks = (0, seq_len), (BLOCK_WINDOWS, seq_len)
        self.arrays = {
            name: self.group.create_array(name, shape=shape, chunks=chunks, dtype=of)
            for name, of in arrays.items()
        }
        self.counts = np.zeros(vocab_size, np.int64)
        self._began = time.monotonic()
        self.facts = SplitFacts()
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in arrays}
        self._stream, self._whole = Stream(seq_len=seq_len, eos=eos), Whole(seq_len=seq_len, eos=eos)

    @property
    def full(self) -> bool:
        if self.max_windows is None:
            return False
        pending = self._stream.pending + self._whole.pending
        return self.facts.windows * self.seq_len + pending >= self.max_windows * self.seq_len

    @property
    def _room(self) -> int | None:
        """Windows that may still be written; none: any number."""
        return None if self.max_windows is None else self.max_windows - self.facts.windows

    @property
    def _islands(self) -> bool:
        return self.attention == "document"

    def add(self, document: Encoded, text_bytes: int) -> None:
        """Take in a document; nothing happens once the split is full."""
        if self.full:
            return
        self.facts.documents += 1
        self.facts.text_bytes += text_bytes
        self.facts.chats += document.is_chat
        packing = self.packing or ("whole" if document.is_chat and self._islands else "stream")
        self._write((self._whole if packing == "whole" else self._stream).add(document))

    def _write(self, rows: Rows | None) -> None:
        if rows is None:
            return
        rows = rows.first(self._room)
        tokens, mask = rows.tokens, rows.is_label
        if not len(tokens):
            return
        content = {"tokens": tokens.astype(self.arrays["tokens"].dtype), "loss_mask": mask}
        if self._islands:
            content["starts"] = rows.starts.astype(np.uint8)
        for name, values in content.items():
            self.arrays[name].append(values)
            self._hashes[name].update(values.astype("<u4" if name == "tokens" else "u1").tobytes())
        self.counts += np.bincount(tokens.ravel(), minlength=len(self.counts))
        self.facts.windows += len(tokens)
        self.facts.tokens += int(rows.used.sum())
        self.facts.labels += int(mask[:, 1:].sum())

    def finish(self, record: dict[str, Any]) -> SplitFacts:
        """Fill up the last windows, record the facts, and put the split in its place."""
        for packer in (self._stream, self._whole):
            self._write(packer.rest(self._room))
        self.facts.unused_tokens += self._whole.pending
        self.facts.digest = durable.digest(b"".join(part.digest() for part in self._hashes.values()))
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
    begins: Any | None = None  # zarr array, where documents do not see each other

    def window(self, index: int | slice) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Tokens and loss mask of one window [seq_len], or of a slice of windows [n, seq_len]."""
        return np.asarray(self.tokens[index]).astype(np.int64), np.asarray(self.loss_mask[index])

    def starts(self, index: int | slice) -> Starts | None:
        """Where documents begin in them, of the same shape; None where attention goes over whole windows."""
        return None if self.begins is None else np.asarray(self.begins[index]).astype(bool)


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
        begins=group.get("starts"),
        token_counts=np.asarray(group["token_counts"][:]),
        facts=SplitFacts(**group.attrs["facts"]),
        record=dict(group.attrs["record"]),
    )


def labels_of(tokens: NDArray[np.int64], loss_mask: NDArray[np.uint8], *, no_label: int) -> NDArray[np.int64]:
    """Labels [..., seq_len]: position t is to predict token t+1 where that is a label; the last has none."""
    labels = np.full(tokens.shape, no_label, np.int64)
    labels[..., :-1] = np.where(loss_mask[..., 1:] > 0, tokens[..., 1:], no_label)
    return labels
