"""Documents with their tokens, and files of them: what tokenising a part of a corpus leaves on disk until it is packed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddk_pipe.pipeline.storage import durable
from ddk_pipe.pipeline.text.encoding import Encoded, Encoder, batches
from ddk_pipe.pipeline.text.sources import Document


@dataclass(frozen=True)
class Piece:
    """A document's tokens; where it stands, the 16 bytes that name its content, and the bytes of its text."""

    where: str
    digest: bytes
    encoded: Encoded
    text_bytes: int


def encode(documents: Iterable[Document], encoder: Encoder) -> Iterator[list[Piece]]:
    """The documents in order, a batch at a time; those without text are left out."""
    for batch in batches(documents):
        yield [
            Piece(document.where, document.digest, encoded, _text_bytes(document))
            for document, encoded in zip(batch, encoder.encode(batch), strict=True)
            if len(encoded.ids) > 1  # more than the closing EOS
        ]


def _text_bytes(document: Document) -> int:
    return len((document.text or json.dumps(document.messages)).encode())


def write_pieces(path: Path, pieces: Iterable[list[Piece]]) -> None:
    """Write an Arrow file, whole or not at all; a record batch for each list."""
    import pyarrow as pa

    durable.make_folder(path.parent)
    partial = durable.partial_name(path)
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    try:
        with durable.naming(path):
            with (
                pa.OSFile(str(partial), "wb") as file,
                pa.ipc.new_file(file, _schema(), options=options) as out,
            ):
                for batch in pieces:
                    out.write_batch(_as_arrow(batch))
            durable.publish_file(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_pieces(path: Path) -> Iterator[list[Piece]]:
    """The lists that `write_pieces` wrote. Raises OSError or pyarrow.ArrowException for a file that is damaged."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_file(file) as content:
        for number in range(content.num_record_batches):
            yield _from_arrow(content.get_batch(number))


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        {
            "where": pa.string(),
            "digest": pa.binary(16),
            "ids": pa.large_list(pa.uint32()),
            "is_label": pa.large_list(pa.uint8()),
            "is_chat": pa.bool_(),
            "text_bytes": pa.int64(),
        }
    )


def _as_arrow(batch: list[Piece]) -> Any:
    import pyarrow as pa

    ends = np.cumsum([0, *(len(piece.encoded.ids) for piece in batch)])

    def lists(rows: list[Any], dtype: type) -> Any:
        flat = np.concatenate([np.zeros(0, dtype), *(row.astype(dtype) for row in rows)])
        return pa.LargeListArray.from_arrays(ends, flat)

    columns = [
        pa.array([piece.where for piece in batch], pa.string()),
        pa.array([piece.digest for piece in batch], pa.binary(16)),
        lists([piece.encoded.ids for piece in batch], np.uint32),
        lists([piece.encoded.is_label for piece in batch], np.uint8),
        pa.array([piece.encoded.is_chat for piece in batch], pa.bool_()),
        pa.array([piece.text_bytes for piece in batch], pa.int64()),
    ]
    return pa.record_batch(columns, schema=_schema())


def _from_arrow(batch: Any) -> list[Piece]:
    ends = batch["ids"].offsets.to_numpy()
    ids, is_label = batch["ids"].values.to_numpy(), batch["is_label"].values.to_numpy()
    facts = (batch[name].to_pylist() for name in ("where", "digest", "is_chat", "text_bytes"))
    return [
        # copies: one that is held long must not hold all the others
        Piece(
            where,
            digest,
            Encoded(ids[first:last].astype(np.int64), is_label[first:last].copy(), is_chat),
            text_bytes,
        )
        for first, last, where, digest, is_chat, text_bytes in zip(ends[:-1], ends[1:], *facts, strict=True)
    ]
