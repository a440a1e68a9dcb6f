"""What the cases of the fused kernels share: problems, their float64 truth, and the comparison.

The truth is `ddk_pipe.pipeline.losses.chunked.sparse_kd_reference` on the logits of the very operands that the
kernels were given, row by row. Errors are relative norms over the batch. bfloat16 is tried as storage
alone: the interpreter multiplies it wrongly. No GPU is used, and these kernels have not run on one.
kernel_cases.py says how this is run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import kernel_cases as common
import torch
from kernel_cases import GAMMA, Findings
from torch import Tensor

from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

LOSS_BOUND = 2e-6  # given the same rounded operands, in every dtype
# float16: the logit gradients are rounded before the last two products.
GRADIENT_BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3}
DTYPES = {"float32": torch.float32, "float16": torch.float16}


@contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles of 16 x 64 in place of 128 x 128, so that small problems take several, and ragged ones."""
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import launches as module

    tile = module.Launch(rows=16, columns=64, depth=16, warps=4, stages=2)
    with (
        mock.patch.dict(module.LAUNCHES, dict.fromkeys(module.LAUNCHES, (tile,))),
        mock.patch.object(module, "PUTS", (module.Put(block=8, warps=4),)),  # fewer than the ids of a row
    ):
        yield


@dataclass(frozen=True)
class Problem:
    """N rows for the kernels; hidden [N, d] and weight [V, d] in float64, to be rounded for them."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    targets: SparseTargets

    def rounded(self, dtype: torch.dtype) -> Problem:
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype))

    def rows(self, index: Tensor) -> Problem:
        return replace(
            self, hidden=self.hidden[index], labels=self.labels[index], targets=self.targets.rows(index)
        )

    def with_targets(self, **parts: Tensor) -> Problem:
        return replace(self, targets=replace(self.targets, **parts))


def problem(vocab: int = 301, kept: int = 12, width: int = 24, grid: bool = False) -> Problem:
    """The six kinds of rows of kernel_cases.six_rows, the ignored one with NaN hidden states.

    With `grid` all numbers are multiples of 1/8, so that float32 logits are exact however the sum is split.
    """
    p = common.six_rows(vocab, kept)
    hidden = torch.randn(len(p.labels), width, dtype=torch.float64)
    weight = 2 * torch.randn(vocab, width, dtype=torch.float64) / math.sqrt(width)
    if grid:
        hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    hidden[p.labels == NO_LABEL] = math.nan
    return Problem(hidden, weight, p.labels, p.targets)


def lifted(p: Problem, gap: float) -> Problem:
    """All rows keep the first row's ids, whose logits `gap` is added to: exactly so, if p is on a grid."""
    ids = p.targets.ids[:1].expand_as(p.targets.ids).contiguous()
    ids[2] = PADDING_ID
    hidden, weight = p.hidden.clone(), p.weight.clone()
    hidden[:5, 0] = 1.0
    weight[:, 0] = 0.0
    weight[ids[0].long(), 0] = gap
    return replace(p, hidden=hidden, weight=weight).with_targets(ids=ids)


def truth(p: Problem, temperature: float, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE [N], KL [N], d_hidden [N, d], d_weight [V, d] in float64."""
    hidden, weight = p.hidden.double(), p.weight.double()
    rows = common.Rows(hidden @ weight.t(), p.labels, p.targets)
    ce, kl, gradient = common.truth(rows, torch.float64, temperature, gamma)
    clean = hidden.masked_fill((p.labels == NO_LABEL)[:, None], 0.0)
    return ce, kl, gradient @ weight, gradient.t() @ clean


def fused(
    p: Problem, temperature: float = 1.0, gamma: float = GAMMA, chunk: int = 112, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is tested, torch.empty filled with NaN. A chunk is no multiple of a tile and ends before V."""
    from ddk_pipe.triton_kernels.fused_linear_sparse_kl import fused_linear_sparse_kl

    t = p.targets
    operands = (p.hidden, p.weight, p.labels, t.ids, t.logprobs, t.tail)
    with common.poisoned_outputs():
        return fused_linear_sparse_kl(
            *operands, gamma=gamma, temperature=temperature, vocab_chunk=chunk, **options
        )


def compare(
    p: Problem,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    gamma: float = GAMMA,
    chunk: int = 112,
) -> Findings:
    """The kernels against the truth, and all that must hold for any input."""
    p = p.rounded(dtype)
    got = fused(p, temperature, gamma, chunk)
    want = truth(p, temperature, gamma)
    ignored = p.labels == NO_LABEL
    idle = torch.cat([got[0][ignored], got[1][ignored], got[2][ignored].flatten()])
    bound = GRADIENT_BOUNDS[dtype]
    return [
        ("ce", common.relative(got[0], want[0]), LOSS_BOUND),
        ("kl", common.relative(got[1], want[1], least=1.0), LOSS_BOUND),
        ("d_hidden", common.relative(got[2], want[2]), bound),
        ("d_weight", common.relative(got[3], want[3]), bound),
        ("float32", common.wrong(all(x.dtype == torch.float32 for x in got)), 0.0),
        ("ignored rows give zeros", common.wrong(bool((idle == 0).all())), 0.0),
    ]
