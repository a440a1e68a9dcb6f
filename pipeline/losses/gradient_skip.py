"""Unbiased skipping in the backward of the output layer: most of its two products, left out at random.

Stage two's gradient G [n, V] of the summed loss with respect to a chunk's logits is mostly tiny numbers: a
softmax over a vocabulary. dhidden = G W and dweight = G^T h cost two thirds of the step whatever is in G, so
G is replaced by a sparse G' with the same expectation (facts/kernels.md section 6 of the design notes):

    g' = g                with probability 1                if |g| >= tau
    g' = sign(g) tau      with probability |g| / tau, else 0    if |g| <  tau

so E[g'] = g for every element, hence E[G' W] = G W and E[G'^T h] = G^T h, exactly. Setting small elements to
zero instead would be as fast and biased for ever. Only elements below tau have variance,
Var[g'] = |g| (tau - |g|) <= tau^2 / 4, and so

    E ||dhidden' - dhidden||^2 = sum of |g| (tau - |g|) ||W_v||^2       over the elements g of token n, id v
    E ||dweight' - dweight||^2 = sum of |g| (tau - |g|) ||h_n||^2       that are below tau

tau is per token, in the unit of G: the gradient of a *sum* over tokens, whose entries lie within about
[-1 - gamma T, 1 + gamma T]. It is independent of the batch size; dividing the loss by the number of tokens
afterwards divides all of it. The error falls with the root of tau, the share of survivors rises.

Measured (SmolLM2-135M: V = 49152, d = 576, 2048 tokens of text, student = its hidden states + 15 % noise,
64 ids with a bucket, gamma = T = 1, float32, one thread of an AVX-512 CPU with other load); errors relative
to the exact gradient of the same tokens, time relative to cross-entropy on full logits and to the exact loss:

    tau     survivors   error dhidden   error dweight   of CE   of exact
    exact   100 %       0               0               0.91    1
    3e-4    0.71 %      0.5 %           0.3 %           0.43    0.47
    1e-3    0.32 %      1.1 %           0.7 %           0.41    0.45
    2e-3    0.20 %      1.8 %           1.1 %           0.40    0.45
    3e-3    0.15 %      2.4 %           1.5 %           0.39    0.43
    forward only                                        0.35    0.39

(CPU time, medians of 5; cross-entropy itself took 4.7 to 6.7 s from run to run.) 1e-3 is a good first choice:
the forward pass is most of what is left. At T = 2, which takes a second softmax, 1e-3 saves less: 0.67 of the
exact time. On drawn hidden states with an entropy of 6 nats 2e-3 keeps
0.35 %, errs by 1.8 % in both and takes 0.53 of the exact time.

In training (AdamW, clipping, 60 steps of 256 tokens, four orders of the data) tau = 1e-3 ends at the loss of the exact
gradient within noise (-0.006 +- 0.008 nats of 8.9) and a step takes 0.65 of its time: benchmarks/gradient_skip.py.
Not studied: what Adam's second moment makes of the noise over thousands of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Expected survivors per element below which a chunk gains. Measured (341 rows of 49152, d = 576, one thread):
# at 0.4, 1.5, 5.0, 8.5 % drawing and both sparse products take 0.1, 0.2, 0.5 to 0.7, 1.0 to 1.3 of the exact
# products' time.
BREAK_EVEN_SHARE = 0.05

_SAMPLED_ROW = 16  # the share is taken from every 16th row of a chunk
_BLOCK_ELEMENTS = 2**19  # what is compared at a time, so that it stays in the cache
_BLOCK_ROWS = 2048  # of dweight, likewise: one [V, d] at a time costs four times as much, in page faults
_ROW_SHIFT = 64  # a row's uniforms start this far behind those of the row before


@dataclass(frozen=True)
class GradientSkip:
    """The random threshold `tau` > 0, and where its randomness comes from.

    generator  of the CPU; None: torch's default one. The same state gives the same survivors. Nothing is drawn
               where no gradient is formed. Activation checkpointing rewinds the default generator for its
               recomputation, not this one; either way the estimate is unbiased. Ranks that train together need
               different seeds, or their errors may add up

    Raises ValueError unless tau is finite and positive.
    """

    tau: float
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ValueError(f"gradient_skip {self.tau}: expected a finite number > 0, or None")

    def pays(self, gradient: Tensor) -> bool:
        """Whether `gradient` [n, V] is concentrated enough: expected survivors below `BREAK_EVEN_SHARE`.

        It looks at the gradient and never at the draw: dropping the draws that turn out dense would bias
        those that remain. A NaN does not pay.
        """
        return expected_share(gradient[::_SAMPLED_ROW], self.tau) < BREAK_EVEN_SHARE

    def draw(self, gradient: Tensor) -> Survivors:
        """A sparse matrix whose expectation is `gradient` [n, V], n > 0. NaN and infinity survive."""
        n, vocab = gradient.shape
        flat = _positions_that_reach(gradient, _thresholds(gradient, self.tau, self.generator))
        value = gradient.reshape(-1)[flat]
        first_of_row = torch.arange(0, (n + 1) * vocab, vocab)
        return Survivors(
            starts=torch.searchsorted(flat, first_of_row),
            rows=flat // vocab,
            columns=flat % vocab,
            values=value.sign() * value.abs().clamp_min(self.tau),
        )


class Survivors(NamedTuple):
    """m elements of a matrix [n, V], row by row.

    starts   int64 [n+1]  place of each row's first element; the last entry is m
    rows     int64 [m], columns int64 [m], values [m]
    """

    starts: Tensor
    rows: Tensor
    columns: Tensor
    values: Tensor

    def times(self, weight: Tensor) -> Tensor:
        """This [n, V] times weight [V, d] -> [n, d]."""
        return _weighted_row_sums(weight, self.columns, self.values, self.starts)

    def add_transposed_times_(self, out: Tensor, hidden: Tensor) -> None:
        """out [V, d] += this [n, V] transposed times hidden [n, d]; only the rows that occur are touched."""
        columns, order = self.columns.sort()
        touched, counts = torch.unique_consecutive(columns, return_counts=True)
        starts = F.pad(counts.cumsum(0), (1, 0))
        rows, values = self.rows[order], self.values[order]
        for first in range(0, len(touched), _BLOCK_ROWS):
            ids = touched[first : first + _BLOCK_ROWS]
            bounds = starts[first : first + len(ids) + 1]
            part = slice(int(bounds[0]), int(bounds[-1]))
            share = _weighted_row_sums(hidden, rows[part], values[part], bounds - bounds[0])
            out.index_add_(0, ids, share)


def expected_share(gradient: Tensor, tau: float) -> float:
    """Expected survivors per element of `gradient` [n, V]: the mean of min(1, |g| / tau)."""
    return float((gradient.abs() / tau).clamp_(max=1).mean())


def _weighted_row_sums(table: Tensor, index: Tensor, factors: Tensor, starts: Tensor) -> Tensor:
    """Row i of the result: sum of factors[j] * table[index[j]] over j in [starts[i], starts[i+1])."""
    return F.embedding_bag(
        index, table, starts, mode="sum", per_sample_weights=factors, include_last_offset=True
    )


def _thresholds(gradient: Tensor, tau: float, generator: torch.Generator | None) -> Tensor:
    """What |g| has to reach: uniform on [0, tau) for every element of `gradient` [n, V].

    Rows share one short table, each shifted against the one before, so elements share a draw only along
    diagonals. Within a row and within a column all draws are independent, which is what the products sum
    over: their variance is that of n V draws at the price of V + 64 n. Drawn in float64: float32's
    steps of 2^-24 would let elements far below tau / 2^24 survive too often.
    """
    n, vocab = gradient.shape
    table = torch.rand(vocab + _ROW_SHIFT * (n - 1), dtype=torch.float64, generator=generator)
    return table.mul_(tau).to(gradient.dtype).as_strided((n, vocab), (_ROW_SHIFT, 1))


def _positions_that_reach(gradient: Tensor, thresholds: Tensor) -> Tensor:
    """int64 [m], ascending: where in the flat `gradient` [n, V] |g| is not below its threshold."""
    n, vocab = gradient.shape
    rows = min(max(_BLOCK_ELEMENTS // vocab, 1), n)
    magnitude = gradient.new_empty(rows, vocab)
    reached = torch.zeros(8 * math.ceil(rows * vocab / 8), dtype=torch.bool)
    found = []
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        count = part.stop - start
        size = torch.abs(gradient[part], out=magnitude[:count])
        reached[count * vocab :] = False
        here = reached[: count * vocab].view(count, vocab)
        torch.lt(size, thresholds[part], out=here).logical_not_()  # not ge: NaN must survive
        found.append(_true_positions(reached).add_(start * vocab))
    return torch.cat(found)


def _true_positions(mask: Tensor) -> Tensor:
    """nonzero() of a bool [8 m] that is mostly False: eight at a time first, four times as fast."""
    words = mask.view(torch.int64).nonzero()[:, 0]
    word, byte = mask.view(-1, 8)[words].nonzero(as_tuple=True)
    return words[word] * 8 + byte
