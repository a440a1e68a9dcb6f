"""Weights and log-probabilities <-> small integers.

A weight code covers [lowest, 1] in LEVELS equal steps of p^(1/4). A log code has a step of 1/2048 nat and reaches down to
-31.99 nats. Where counts depend on the values, they come from multiplications only: equal on every machine.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 63  # steps of a weight code: finer ones cost bytes and win nothing beside the noise of the draws
LOG_STEPS = 2048  # codes per nat
NO_LOG = 65535  # the log code of "none": -inf for a tail, NaN for a label
ONE = 1 << 40  # a weight of 1 in the integers that counts are predicted with
STEP_RATIO = 0.9995118379398893512  # exp(-1 / LOG_STEPS), a literal: libraries may differ in the last bit


def cells(lowest: float) -> NDArray[np.float64]:
    """Ends of the quantiser's cells, float64 [LEVELS + 1], by multiplication only: equal on every machine."""
    floor = float(np.sqrt(np.sqrt(lowest)))
    root = floor + (1.0 - floor) / LEVELS * np.arange(LEVELS + 1)
    root[-1] = 1.0
    return root * root * (root * root)


def cell_of(
    ends: NDArray[np.float64], values: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The cell each value lies in, and where inside it, 0 to 1."""
    low = np.clip(np.searchsorted(ends, values, side="right") - 1, 0, LEVELS - 1)
    return low, (values - ends[low]) / (ends[low + 1] - ends[low])


def label_units() -> NDArray[np.int64]:
    """exp(-code / LOG_STEPS) in units of 1 / ONE, int64 [65536], by multiplication only; 0 for NO_LOG."""
    weights = np.multiply.accumulate(np.concatenate([[1.0], np.full(NO_LOG - 1, STEP_RATIO)]))
    return np.append(np.rint(weights * ONE).astype(np.int64), 0)


def encode_log(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Natural log of a probability -> u16, step 1/2048 nat; -inf and NaN -> 65535, below -31.99 nats -> 65534."""
    finite = np.isfinite(values)
    codes = np.rint(np.where(finite, values, 0.0).astype(np.float64) * -LOG_STEPS)
    return np.where(finite, np.clip(codes, 0, NO_LOG - 1), NO_LOG).astype(np.uint16)


def decode_log(codes: NDArray[np.uint16], *, none: float) -> NDArray[np.float32]:
    """Inverse of encode_log; 65535 becomes `none`."""
    values = codes.astype(np.float32) / -LOG_STEPS
    return np.where(codes == NO_LOG, np.float32(none), values)
