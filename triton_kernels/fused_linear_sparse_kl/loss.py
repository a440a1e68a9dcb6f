"""The loss and its gradients: arguments checked, rows without a label taken out and put back, the passes in order."""

from __future__ import annotations

import torch
from torch import Tensor

from ddk_pipe.triton_kernels import arguments
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.kernels import tail_lse
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.launches import ALIGNED
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.layer import Layer, operand
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.passes import gradients, tail_sums
from ddk_pipe.triton_kernels.fused_linear_sparse_kl.rows import finish_rows, in_order


def fused_linear_sparse_kl(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    tail: Tensor,
    *,
    gamma: float,
    temperature: float = 1.0,
    ignore_index: int = -100,
    bias: Tensor | None = None,
    vocab_chunk: int = 8192,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CE [N], KL [N], d_hidden [N, d], d_weight [V, d], all float32.

    CE and KL are in nats and without the factor gamma T^2; the gradients are those of
    sum(CE + gamma T^2 KL), a sum and not a mean. Equals `sparse_kl` on hidden @ weight.T and the two
    products that follow it, for a third more operations but without [N, V].

    hidden    float32, float16 or bfloat16 [N, d] the student's last hidden states. Rows at `ignore_index`
              cost nothing but a copy of the others, give zeros everywhere, and may hold NaN
    weight    of hidden's dtype [V, d]. Either is copied if it is not contiguous along d, and padded if d is
              no multiple of 16
    labels    int64 [N], `ignore_index` where a position has none
    ids       int32 [N, K] in any order, padding -1 in any slot. No id twice in a row: not checked, but then
              KL is inf unless a weight is 0
    logprobs  float32 [N, K], natural log of the teacher's weights; padding is -inf, and not looked at
    tail      float32 [N], natural log of the weight of "every other token"; -inf: none.
              Rows with and without one may be mixed. A row without ids and tail gives CE alone, KL = 0
    bias      None: not written yet
    vocab_chunk  tokens whose logit gradients exist at a time, at least 16. Each chunk reads and writes
              d_hidden once: keep it in the thousands

    16-bit operands are multiplied as they are and summed in float32; the logit gradients in between are
    rounded to the operands' dtype. float32 is multiplied as tf32x3 on NVIDIA and plainly on AMD; torch's own
    `allow_tf32` rules the two products that follow.

    A tail where the ids cover the vocabulary gives KL = inf, as it should. So do ids outside [0, V);
    labels outside it give CE = NaN. Nothing is recorded for autograd. One transfer from the device: the
    number of labelled rows. On a GPU nothing of this has run.

    Raises ValueError for shapes, dtypes, devices or numbers that do not fit, and for CPU tensors, unless
    TRITON_INTERPRET=1 was set before triton was imported; NotImplementedError for a bias.
    """
    _check(hidden, weight, labels, ids, logprobs, tail)
    _check_options(gamma, temperature, bias, vocab_chunk)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False), torch.cuda.device_of(hidden):
        live = (labels != ignore_index).nonzero()[:, 0]
        # Rows without a label go first: 0 * NaN is NaN, so a product would carry them into d_weight.
        some = len(live) < len(labels)
        hidden, *targets = (x[live] if some else x for x in (hidden, labels, ids, logprobs, tail))
        *of_rows, d_weight = _labelled(hidden, weight, targets, gamma, temperature, vocab_chunk)
        ce, kl, d_hidden = (_put_back(x, live, labels) if some else x for x in of_rows)
        return ce, kl, d_hidden, d_weight


def _labelled(
    hidden: Tensor, weight: Tensor, targets: list[Tensor], gamma: float, temperature: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, where every row has a label; `targets` are labels, ids, logprobs and tail."""
    if not len(hidden):
        nothing = hidden.new_zeros(0, dtype=torch.float32)
        return nothing, nothing.clone(), nothing.new_zeros(hidden.shape), nothing.new_zeros(weight.shape)
    inv_t = 1.0 / temperature
    layer = Layer(operand(hidden), operand(weight), hidden.shape[1], inv_t, chunk)
    ordered = in_order(len(weight), *targets)
    rows = finish_rows(tail_sums(layer, ordered), ordered, gamma * temperature, inv_t)
    return rows.ce, rows.kl, *gradients(layer, ordered, rows)


def _put_back(x: Tensor, live: Tensor, labels: Tensor) -> Tensor:
    """x [n, ...] at its places among the N rows, zeros between."""
    return x.new_zeros(len(labels), *x.shape[1:]).index_copy_(0, live, x)


def _check(
    hidden: Tensor, weight: Tensor, labels: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor
) -> None:
    arguments.check_matrix("hidden", hidden, "[N, d]", "d")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: shape {list(weight.shape)}, expected [V, d] with V > 0")
    layer = ("weight", weight, hidden.dtype, (weight.shape[0], hidden.shape[1]))
    arguments.check_rows("hidden", hidden, labels, ids, logprobs, tail, layer)
    arguments.check_device("hidden", hidden, tail_lse)


def _check_options(gamma: float, temperature: float, bias: Tensor | None, vocab_chunk: int) -> None:
    arguments.check_numbers(gamma, temperature)
    if vocab_chunk < ALIGNED:
        raise ValueError(f"vocab_chunk {vocab_chunk}: expected at least {ALIGNED}, better thousands")
    if bias is not None:
        raise NotImplementedError(
            "a bias: use pipeline.losses.linear_sparse_kd, or a column of weight and one of ones in hidden"
        )
