"""Ways to store one window's sparse targets as bytes: this package's planes, and what else is in use.

Each is `encode(kept, context) -> {part: bytes}` and its inverse. Tokens are left out everywhere. The label's
log-probability is the part `labels` of ours, and no part of the others, which do not store it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numcodecs import Zstd, blosc
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets import PADDING_ID, Codec, Context, Kept, SparseTargets, decode_log, encode_log

blosc.set_nthreads(1)
Record = dict[str, bytes]


class Format(Protocol):
    """How targets lie on disk."""

    def encode(self, kept: Kept, context: Context) -> Record: ...

    def decode(self, record: Record, context: Context) -> SparseTargets: ...


def shuffled(array: NDArray[Any]) -> bytes:
    """What the cache stores of a plane: blosc, zstd level 1, bytes shuffled."""
    packed: bytes = blosc.compress(np.ascontiguousarray(array), b"zstd", 1, 1)
    return packed


@dataclass(frozen=True)
class Planes:
    """The cache's own record."""

    codec: Codec

    def encode(self, kept: Kept, context: Context) -> Record:
        planes = {**self.codec.encode(kept, context), "labels": context.label_codes}
        return {name: shuffled(plane) for name, plane in planes.items()}

    def decode(self, record: Record, context: Context) -> SparseTargets:
        types = {**self.codec.planes, "labels": np.dtype("u2")}
        planes = {name: np.frombuffer(blosc.decompress(part), types[name]) for name, part in record.items()}
        codes = planes.pop("labels")
        return self.codec.decode(planes, Context(context.labels, codes, context.key))


@dataclass(frozen=True)
class Packed24:
    """Random Sampling KD's 24 bits an entry, id above count (17 + 7; V > 2^17: 18 + 6); and a byte a position, how many."""

    draws: int
    count_bits: int = 7

    def encode(self, kept: Kept, context: Context) -> Record:
        ids, logs = kept.targets.ids.numpy(), kept.targets.logprobs.numpy().astype(np.float64)
        filled = ids >= 0
        counts = np.rint(np.exp(logs[filled]) * self.draws).astype(np.uint32)
        words = (ids[filled].astype(np.uint32) << self.count_bits | counts).astype("<u4")
        return {
            "entries": words.view(np.uint8).reshape(-1, 4)[:, :3].tobytes(),
            "lengths": filled.sum(1).astype(np.uint8).tobytes(),
        }

    def decode(self, record: Record, context: Context) -> SparseTargets:
        lengths = np.frombuffer(record["lengths"], np.uint8)
        bytes_ = np.frombuffer(record["entries"], np.uint8).reshape(-1, 3).astype(np.int64)
        words = bytes_ @ np.array([1, 1 << 8, 1 << 16])
        here = np.arange(int(lengths.max(initial=0))) < lengths[:, None]
        ids = np.full(here.shape, PADDING_ID, np.int32)
        weights = np.zeros(here.shape, np.float32)
        ids[here], weights[here] = (
            words >> self.count_bits,
            (words & ((1 << self.count_bits) - 1)) / self.draws,
        )
        return _targets(ids, weights, np.zeros(len(ids), np.float32))


@dataclass(frozen=True)
class ZarrDefault:
    """int32 ids and float16 log-probabilities, most probable first, as zarr compresses by default (zstd 0)."""

    def encode(self, kept: Kept, context: Context) -> Record:
        targets = kept.targets
        ids, logs = _by_weight(targets)
        arrays = {
            "ids": ids,
            "logprobs": logs.astype(np.float16),
            "tails": targets.tail.numpy().astype(np.float16),
        }
        return {name: Zstd(0).encode(array) for name, array in arrays.items()}

    def decode(self, record: Record, context: Context) -> SparseTargets:
        length = len(context.labels)
        ids, logs, tails = (np.frombuffer(Zstd(0).decode(record[n]), t) for n, t in _ZARR_TYPES.items())
        weights = np.exp(logs.astype(np.float32)).reshape(length, -1)
        return _targets(ids.reshape(length, -1), weights, np.exp(tails.astype(np.float32)))


_ZARR_TYPES = {"ids": np.int32, "logprobs": np.float16, "tails": np.float16}


@dataclass(frozen=True)
class FixedWidth:
    """u16 ids and u8 codes uniform in p^(1/4), a u16 log code of the tail; usable where it lies, nothing compressed."""

    def encode(self, kept: Kept, context: Context) -> Record:
        targets = kept.targets
        ids, logs = _by_weight(targets)
        arrays = {
            "ids": ids.astype(np.uint16),
            "codes": np.rint(np.exp(logs / 4) * 255).astype(np.uint8),
            "tails": encode_log(targets.tail.numpy()),
        }
        return {name: array.tobytes() for name, array in arrays.items()}

    def decode(self, record: Record, context: Context) -> SparseTargets:
        length = len(context.labels)
        ids = np.frombuffer(record["ids"], np.uint16).reshape(length, -1).astype(np.int32)
        codes = np.frombuffer(record["codes"], np.uint8).reshape(length, -1)
        tails = np.exp(decode_log(np.frombuffer(record["tails"], np.uint16), none=-np.inf))
        return _targets(ids, _FOURTH_POWERS[codes], tails)


_FOURTH_POWERS = (np.maximum(np.arange(256), 0.25).astype(np.float32) / 255) ** 4  # code 0: not nothing


def _by_weight(targets: SparseTargets) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    order = (-targets.logprobs).argsort(dim=1, stable=True)
    return targets.ids.gather(1, order).numpy(), targets.logprobs.gather(1, order).numpy()


def _targets(
    ids: NDArray[np.int32], weights: NDArray[np.float32], tail: NDArray[np.float32]
) -> SparseTargets:
    """Targets as a loss takes them: ids ascending, weights and tail summing to 1."""
    order = np.where(ids < 0, np.iinfo(np.int32).max, ids).argsort(1, kind="stable")
    ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
    total = weights.sum(1) + tail
    with np.errstate(divide="ignore"):
        logs, log_tail = np.log(weights / total[:, None]), np.log(tail / total)
    return SparseTargets(
        ids=torch.from_numpy(ids), logprobs=torch.from_numpy(logs), tail=torch.from_numpy(log_tail)
    )
