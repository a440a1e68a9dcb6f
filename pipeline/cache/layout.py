"""Which arrays a shard has, and what is written into their rows, one for each window (`spec` shows the picture)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache.arrays import Arrays, Expected
from ddk_pipe.pipeline.cache.ranks import Codecs
from ddk_pipe.pipeline.cache.shards import Shard
from ddk_pipe.pipeline.cache.spec import CacheSpec
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.models import Starts, check_starts
from ddk_pipe.pipeline.targets import (
    MOST_ENTRIES,
    MOST_PADDED,
    NO_LABEL,
    Codec,
    Context,
    Selected,
    SparseTargets,
    label_codes,
)
from ddk_pipe.pipeline.text import labels_of

STAMP_WORDS = 4  # u16 words that hold the window number


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def input_arrays(spec: CacheSpec) -> dict[str, Expected]:
    """The arrays of a shard that do not depend on a temperature."""
    tokens, labels = spec.seq_len, STAMP_WORDS + spec.seq_len
    starts = {"starts": Expected(np.dtype("u1"), tokens, tokens)} if spec.attention == "document" else {}
    return {
        "tokens": Expected(token_dtype(spec.vocab_size), tokens, tokens),
        "labels": Expected(np.dtype("u2"), labels, labels),
        **starts,
    }


def target_arrays(spec: CacheSpec, codec: Codec, slot: int) -> dict[str, Expected]:
    """The codec's planes of the slot-th temperature."""
    most = max(min(spec.seq_len * spec.vocab_size, MOST_ENTRIES), spec.seq_len)
    return {f"t{slot}/{name}": Expected(dtype, 1, most) for name, dtype in codec.planes.items()}


def content(
    shard: Shard,
    spec: CacheSpec,
    codecs: Codecs,
    tokens: NDArray[np.int64],
    loss_mask: NDArray[np.uint8],
    selected: list[Selected],
    starts: Starts | None,
) -> tuple[dict[str, dict[str, Any]], Arrays]:
    """Attributes of the shard's groups, and its arrays [windows, width].

    Raises DdkError for a window that no reader would accept, ValueError for targets or labels that contradict each other.
    """
    whole = {"domain": shard.domain, "split": shard.split, "shard": shard.number}
    attributes: dict[str, dict[str, Any]] = {"": {**whole, "fingerprint": spec.fingerprint}}
    labels = labels_of(tokens, loss_mask, no_label=NO_LABEL)
    arrays: Arrays = {
        "tokens": tokens.astype(token_dtype(spec.vocab_size)),
        "labels": _labels(shard, spec, labels, selected),
        **_starts(shard, spec, starts, labels),
    }
    contexts = [
        Context(labels[row], codes, shard.key(shard.first_window + row))
        for row, codes in enumerate(arrays["labels"][:, STAMP_WORDS:])
    ]
    for slot, temperature in enumerate(spec.plan.temperatures):
        attributes[f"t{slot}"] = {"temperature": temperature}
        codec, _ = codecs.of(shard.domain, slot)
        _check_sizes(shard, [window.targets[slot] for window in selected])
        planes = [
            codec.encode(window.kept[slot], context)
            for window, context in zip(selected, contexts, strict=True)
        ]
        for name, dtype in codec.planes.items():
            arrays[f"t{slot}/{name}"] = _rectangle([window[name] for window in planes], dtype)
    return attributes, arrays


def _starts(shard: Shard, spec: CacheSpec, starts: Starts | None, labels: NDArray[np.int64]) -> Arrays:
    """Where documents begin, u8 [windows, seq_len]; nothing where attention goes over whole windows."""
    if (starts is None) != (spec.attention == "window"):
        raise ValueError(f"{shard.name}: starts of documents, or none, and attention: {spec.attention}")
    if starts is None:
        return {}
    for row, marked in zip(starts, labels, strict=True):
        check_starts(row, marked, no_label=NO_LABEL)
    return {"starts": starts.astype(np.uint8)}


def _check_sizes(shard: Shard, targets: list[SparseTargets]) -> None:
    """Raises DdkError for a window that no reader would accept."""
    for window in targets:
        entries, padded = int((window.ids >= 0).sum()), window.positions * (window.ids.shape[1] + 1)
        if entries > MOST_ENTRIES or padded > MOST_PADDED:
            raise DdkError(
                f"{shard.name}: a window of {entries:,} entries, {padded:,} when padded; at most"
                f" {MOST_ENTRIES:,} and {MOST_PADDED:,} can be",
                hint="lower seq_len, cache.k or cache.cap, or raise cache.tau",
            )


def _labels(
    shard: Shard, spec: CacheSpec, labels: NDArray[np.int64], selected: list[Selected]
) -> NDArray[np.uint16]:
    """Window number, then the code of each label's log-probability: u16 [windows, 4 + seq_len]."""
    numbers = np.arange(shard.first_window, shard.first_window + shard.windows, dtype="<u8")
    stamps = numbers.view("<u2").reshape(-1, STAMP_WORDS)
    logprobs = np.stack([window.label_logprobs.cpu().numpy() for window in selected])
    if not np.array_equal(np.isnan(logprobs), labels == NO_LABEL):
        raise ValueError(f"{shard.name}: the teacher's log-probabilities are not those of the labels")
    codes = [
        label_codes(row, spec.plan.seed, shard.key(shard.first_window + number))
        for number, row in enumerate(logprobs)
    ]
    return np.concatenate([stamps, np.stack(codes)], axis=1)


def _rectangle(rows: list[NDArray[Any]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Ragged rows side by side, filled up with zeros (which compress to nothing); at least one column."""
    width = max(1, *(len(row) for row in rows))
    out = np.zeros((len(rows), width), dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return out
