"""The windows of one shard, read from its arrays.

They may come from a stranger. Whatever is wrong with them is a DdkError that names the file and the repair; nothing in
them can make code run, or ask for more memory than the cache's own vocabulary and seq_len justify.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache.arrays import Arrays, ShardReader, array_files, learnt_of
from ddk_pipe.pipeline.cache.damage import RESTORE, damage
from ddk_pipe.pipeline.cache.layout import STAMP_WORDS, input_arrays, target_arrays
from ddk_pipe.pipeline.cache.ranks import Codecs, ranks_name
from ddk_pipe.pipeline.cache.record import (
    FileFacts,
    ShardRecord,
    checks_text,
    group_of,
    parse_checks,
    parse_values,
)
from ddk_pipe.pipeline.cache.shards import Shard
from ddk_pipe.pipeline.cache.spec import CacheSpec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import Starts, check_starts
from ddk_pipe.pipeline.storage import Folder, durable
from ddk_pipe.pipeline.targets import (
    NO_LABEL,
    NO_LOG,
    Codec,
    Context,
    Planes,
    SparseTargets,
    decode_log,
)

MOST_METADATA_BYTES = 1 << 16  # of a zarr.json


@dataclass(frozen=True)
class CachedWindow:
    """One window as a student needs it: tokens, labels int64 [seq_len] (-100: none), label_logprobs float32
    [seq_len] in nats (NaN without a label), targets of seq_len positions at one temperature; starts bool [seq_len]:
    true where a document begins (none: attention goes over the whole window)."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    label_logprobs: NDArray[np.float32]
    targets: SparseTargets
    starts: Starts | None = None


class ShardWindows:
    """Reads the windows of one shard at one temperature (the slot-th); raises ValueError, FileNotFoundError.

    From `sizes`, `checks` and `metadata` or from what was `learnt` before, as ShardReader has them.
    """

    def __init__(
        self,
        folder: Folder,
        group: str,
        shard: Shard,
        spec: CacheSpec,
        codec: Codec,
        slot: int,
        sizes: Mapping[str, int] | None = None,
        checks: Mapping[str, NDArray[np.uint32]] | None = None,
        metadata: Mapping[str, bytes] | None = None,
        learnt: bytes | None = None,
    ) -> None:
        self.shard, self._spec, self._codec, self._slot = shard, spec, codec, slot
        self.arrays = ShardReader(
            folder,
            group,
            windows=shard.windows,
            files=sizes,
            expected={**input_arrays(spec), **target_arrays(spec, codec, slot)},
            checks=checks,
            metadata=metadata,
            learnt=learnt,
        )

    def read(self, window: int) -> CachedWindow:
        """`window` counts within the split."""
        arrays = self.arrays.read(window - self.shard.first_window)
        if int(arrays["labels"][:STAMP_WORDS].astype("<u2").view("<u8")[0]) != window:
            raise ValueError(f"window {window} holds another window")
        tokens, codes = arrays["tokens"].astype(np.int64), arrays["labels"][STAMP_WORDS:]
        if int(tokens.max()) >= self._spec.vocab_size:
            raise ValueError(f"window {window} holds a token outside the vocabulary")
        labels = _labels(tokens, codes)
        return CachedWindow(
            tokens=tokens,
            labels=labels,
            label_logprobs=decode_log(codes, none=np.nan),
            targets=self._targets(arrays, Context(labels, codes, self.shard.key(window))),
            starts=_starts(arrays, labels),
        )

    def _targets(self, arrays: Arrays, context: Context) -> SparseTargets:
        prefix = f"t{self._slot}/"
        planes: Planes = {
            name.removeprefix(prefix): values for name, values in arrays.items() if name.startswith(prefix)
        }
        targets = self._codec.decode(planes, context)
        if targets.positions != self._spec.seq_len:
            raise ValueError(f"targets of {targets.positions} positions")
        return targets


def _starts(arrays: Arrays, labels: NDArray[np.int64]) -> Starts | None:
    if "starts" not in arrays:
        return None
    if int(arrays["starts"].max()) > 1:
        raise ValueError("starts that are neither 0 nor 1")
    starts = arrays["starts"].astype(bool)
    check_starts(starts, labels, no_label=NO_LABEL)
    return starts


def _labels(tokens: NDArray[np.int64], codes: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Position t is to predict token t+1 where its log-probability was stored."""
    if codes[-1] != NO_LOG:
        raise ValueError("a label behind the last token")
    return np.where(codes == NO_LOG, NO_LABEL, np.roll(tokens, -1))


def open_windows(
    folder: Folder, shard: Shard, record: ShardRecord, spec: CacheSpec, codecs: Codecs, slot: int
) -> ShardWindows:
    """A committed shard at one temperature, its metadata files compared with the record; raises DdkError."""
    group = group_of(shard, record)
    codec, digest = codecs.of(shard.domain, slot)
    if digest != record.ranks_digest:
        raise DdkError(
            f"{folder.name}/{ranks_name(shard.domain)}: not the table that {shard.name} was coded with",
            hint=RESTORE,
        )
    with damage(folder, group):
        names = [*input_arrays(spec), *target_arrays(spec, codec, slot)]
        small = ["zarr.json", f"t{slot}/zarr.json", *(array_files(array)[0] for array in names)]
        contents = folder.each(lambda name: _read_small(folder, f"{group}/{name}", record.files[name]), small)
        checks = {name: parse_checks(record.checks[name], shard.windows) for name in names}
        metadata = dict(zip(small, contents, strict=True))
        opened = ShardWindows(folder, group, shard, spec, codec, slot, record.sizes, checks, metadata)
        found = {name: checks_text(values) for name, values in opened.arrays.places().items()}
        if record.places and found != {name: record.places[name] for name in names}:
            raise ValueError("commit record with other places than its files have")
        return opened


def learnt_from(content: bytes, spec: CacheSpec, codec: Codec, slot: int) -> tuple[str, bytes]:
    """Name of a shard's group, and what its opening found, from the file of its commit record alone: one that has
    places, and with which it was opened before."""
    values = json.loads(content)
    names = [*input_arrays(spec), *target_arrays(spec, codec, slot)]
    places, checks = ([parse_values(values[field][name]) for name in names] for field in ("places", "checks"))
    return values["group"], learnt_of(places, checks)


def _read_small(folder: Folder, name: str, facts: FileFacts) -> bytes:
    content = folder.read(name, most=MOST_METADATA_BYTES)
    if durable.digest(content) != facts.blake2b:
        raise ValueError(f"{folder.name}/{name}: not what was committed")
    return content
