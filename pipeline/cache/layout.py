"""Which arrays a shard has, one row for each window (`spec` shows the picture)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ddk_pipe.pipeline.cache.arrays import Expected
from ddk_pipe.pipeline.cache.spec import CacheSpec
from ddk_pipe.pipeline.targets import (
    MOST_ENTRIES,
    Codec,
)

STAMP_WORDS = 4  # u16 words that hold the window number


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


def input_arrays(spec: CacheSpec) -> dict[str, Expected]:
    """The arrays of a shard that do not depend on a temperature."""
    tokens, labels = spec.seq_len, STAMP_WORDS + spec.seq_len
    return {
        "tokens": Expected(token_dtype(spec.vocab_size), tokens, tokens),
        "labels": Expected(np.dtype("u2"), labels, labels),
    }


def target_arrays(spec: CacheSpec, codec: Codec, slot: int) -> dict[str, Expected]:
    """The codec's planes of the slot-th temperature."""
    most = max(min(spec.seq_len * spec.vocab_size, MOST_ENTRIES), spec.seq_len)
    return {f"t{slot}/{name}": Expected(dtype, 1, most) for name, dtype in codec.planes.items()}
