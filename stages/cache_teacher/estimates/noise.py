"""How much noise drawn targets add to the gradient, estimated from draws alone, without the dense distribution.

A cached target w is a random draw with E[w] = p, the teacher's distribution, so the gradient at the
logits (q - w) has the variance sum_j Var(w_j) more than the dense teacher's. The unit is what training on text has
anyway: a label drawn from p has the variance sum_j p_j (1 - p_j) = 1 - sum_j p_j^2. Reported is the ratio of the two
means over positions; Random Sampling KD with N draws has exactly 1/N, 2% at its usual N = 50. It is estimated without
bias and without the dense distribution. Targets u, v, w of one position that are drawn independently, under any
unbiased settings, have E|v - w|^2 = Var(v) + Var(w) and E[v.w] = sum_j p_j^2, hence Var(w) is the mean of
(|w - u|^2 + |w - v|^2 - |u - v|^2) / 2, and u and v are those of two other rows of the table. The rounding of the
codec is part of w and is counted. Schemes with a tail bucket add no noise but a bias, which this does not show.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ddk_pipe.pipeline.targets import SparseTargets


def added_noise(targets: SparseTargets, second: SparseTargets, third: SparseTargets) -> float:
    """Variance of `targets` at the logits over that of a one-hot label drawn from the teacher (module docstring).

    All three describe the same positions, are unbiased and independent of each other; the less the other two leave
    to chance, the smaller the error of the estimate.
    """
    apart = squared_distances(targets, second) + squared_distances(targets, third)
    variance = np.sum(apart - squared_distances(second, third)) / 2
    return float(max(variance, 0.0) / max(np.sum(1.0 - row_products(second, third)), 1e-12))


def squared_distances(one: SparseTargets, other: SparseTargets) -> NDArray[np.float64]:
    """sum_j (w_j - v_j)^2 of each position, float64 [N]."""
    squares = [targets.logprobs.double().mul(2).exp().sum(1).numpy() for targets in (one, other)]
    return np.asarray(squares[0] + squares[1] - 2 * row_products(one, other))


def row_products(one: SparseTargets, other: SparseTargets) -> NDArray[np.float64]:
    """sum_j w_j v_j of each position, float64 [N]."""
    (keys, weights), (other_keys, other_weights) = _entries(one), _entries(other)
    shared, at, at_other = np.intersect1d(keys, other_keys, assume_unique=True, return_indices=True)
    shares: NDArray[np.float64] = weights[at] * other_weights[at_other]
    return np.bincount(shared >> 32, shares, one.positions).astype(np.float64)


def _entries(targets: SparseTargets) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A number for each (position, id), and the weights."""
    ids = targets.ids.numpy()
    rows, columns = np.nonzero(ids >= 0)
    keys = (rows.astype(np.int64) << 32) | ids[rows, columns]
    return keys, np.exp(targets.logprobs.numpy()[rows, columns].astype(np.float64))
