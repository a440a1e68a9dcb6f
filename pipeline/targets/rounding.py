"""Rounding at random, so that the mean of what is decoded is what was encoded: a pure function of seed and window."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets.quantisers import LOG_STEPS, NO_LOG


def uniforms(seed: int, key: str, purpose: str, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 [count], for one purpose in the window that `key` names."""
    digest = hashlib.blake2b(f"{seed}/{key}/{purpose}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(count)


def label_codes(logprobs: NDArray[np.floating], seed: int, key: str) -> NDArray[np.uint16]:
    """Log codes of a window's labels, u16 [L]: E[exp(-code / LOG_STEPS)] = p, from log p in nats, float [L].

    A code is either end of the step that log p lies in; NaN (no label) becomes NO_LOG, below -31.99 nats the last code.
    The mean of the decoded log p is lower than log p by at most 1 / (8 LOG_STEPS^2), 3e-8 nats: what a variance of p
    costs under a concave function.
    """
    known = ~np.isnan(logprobs)
    steps = np.clip(np.where(known, logprobs, 0.0).astype(np.float64) * -LOG_STEPS, 0, NO_LOG - 1)
    low = np.floor(steps)
    chance = np.expm1((low - steps) / LOG_STEPS) / np.expm1(-1 / LOG_STEPS)
    codes = low + (uniforms(seed, key, "labels", len(steps)) < chance)
    return np.where(known, codes, NO_LOG).astype(np.uint16)


def rounded_up(
    rows: NDArray[np.int64],
    shares: NDArray[np.float64],
    widths: NDArray[np.float64],
    offsets: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which values are rounded up, bool [n]: each with the probability `shares`, 0 to 1 of the way through its cell,
    and so that the errors of a row add up to no more than its widest cell.

    Systematic, as the draws are: a row's shares are cumulated by rising width from its offset (uniform, [rows]), and a
    value is rounded up where the sum passes a whole number. So sums of shares err by less than 1, and those of the
    errors, each a cell wide, by less than the widest.
    """
    order = np.lexsort((widths, rows))
    rows, shares = rows[order], shares[order]
    is_first = np.diff(rows, prepend=-1) != 0
    ends = np.cumsum(shares)
    starts = (ends - shares)[is_first]
    passed = np.floor(ends - starts[np.cumsum(is_first) - 1] + offsets[rows])
    before = np.where(is_first, 0.0, np.roll(passed, 1))
    up = np.zeros(len(rows), bool)
    up[order] = passed > before
    return up
