"""Cross-entropy plus a KL to sparse teacher targets, on any device, without ever holding [N, V].

N positions, d hidden size, V student vocabulary, K kept ids of a position, T temperature; the equations are in
`losses/reference.py`. With a soft cap c (Gemma), z = c tanh(raw / c) of the output layer's raw logits; T divides what
comes out.

The logits exist for one chunk of positions at a time (`losses/chunks.py`) and their gradient takes their place at
once, so backward only multiplies what forward saved: dhidden [labelled, d], dweight [V, d] and dbias [V], each only
if its input wants it. Without grad mode, or if nothing requires a gradient, none of that work is done.

Dtypes: hidden and bias are cast to the weight's dtype or, inside torch.autocast, all three to the autocast dtype (a
float64 weight stays float64). Softmax, sums and the accumulation of the gradients are float32, or float64 for a
float64 weight. `losses/products.py` says how 16-bit operands are multiplied, `losses/chunks.py` what the logits are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.checks import check_implementation, check_layer, check_shapes, check_states
from ddk_pipe.pipeline.losses.choice import Implementation, takes_triton
from ddk_pipe.pipeline.losses.chunks import sums_and_gradients
from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip
from ddk_pipe.pipeline.losses.products import accumulator, operand_dtype
from ddk_pipe.pipeline.losses.rows import LabelledRows, labelled_rows
from ddk_pipe.pipeline.losses.terms import Direction, SparseKdLoss, Terms
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets


def linear_sparse_kd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: SparseTargets | None,
    *,
    gamma: float,
    temperature: float = 1.0,
    direction: Direction = "forward",
    bias: Tensor | None = None,
    ignore_index: int = NO_LABEL,
    implementation: Implementation = "auto",
    softcap: float | None = None,
    gradient_skip: float | None = None,
    generator: torch.Generator | None = None,
) -> SparseKdLoss:
    """Equals `sparse_kd_reference(F.linear(hidden, weight, bias), ...)` without holding [N, V].

    hidden  [N, d] the student's last hidden states. Rows whose label is `ignore_index` cost nothing
            and may hold anything, NaN included
    weight  [V, d], bias [V] or None: the student's output layer. V may exceed the teacher's vocabulary
            (padding): no label or id names the rest, which has its softmax mass like any other token
    labels  int [N], `ignore_index` where a position has none
    targets of the same N positions; a row without entries and without tail contributes CE alone. None
            only with gamma = 0, which is then plain cross-entropy; with targets, gamma = 0 still reports `kl`
    gamma   >= 0; temperature T > 0. gamma T^2 scales the loss and its gradient alike
    direction  "reverse" needs a tail in every row with ids that do not cover the vocabulary: elsewhere the
               teacher's weight is 0
    implementation  of a chunk's loss and gradient: "chunked" in torch, "triton" by `triton_kernels.sparse_kl`
            (CUDA, forward KL, no float64), "auto" by `chosen_implementation`
    softcap > 0: logits become softcap * tanh(logits / softcap), bias included (Gemma's
            `final_logit_softcapping`). A bias of -inf then closes no token: its logit is -softcap
    gradient_skip  tau > 0: the gradients of hidden and weight become unbiased estimates, for a fraction of
            the time of their products; total, ce, kl and dbias stay exact. CPU, "auto" or "chunked".
            `losses/gradient_skip.py` states method, error and what tau to choose
    generator  of the CPU: what gradient_skip draws from (`GradientSkip`), torch's default one if None

    hidden and bias are cast to the weight's dtype or, inside torch.autocast, all three to the autocast
    dtype. Results are float32, or float64 for a float64 weight; ce and kl are detached.
    Raises ValueError for shapes, devices or options that do not fit, a label or an id outside
    [0, V), a duplicate id in a row, a tail although the ids cover all V tokens (forward), and a row
    whose reverse KL is infinite; each names the first such position. NotImplementedError for
    what "triton" does not do, gradient_skip on another device than the CPU, and in a backward with
    create_graph=True.
    """
    skip = None if gradient_skip is None else GradientSkip(gradient_skip, generator)
    terms = Terms(gamma, temperature, direction, softcap=softcap, skip=skip)
    check_implementation(implementation, direction, skip, hidden.device)
    check_shapes(hidden, "hidden", "d", labels, targets)
    check_layer(hidden, weight, bias)
    rows = labelled_rows(
        labels,
        targets,
        vocab=weight.shape[0],
        gamma=gamma,
        direction=direction,
        ignore_index=ignore_index,
        dtype=accumulator(weight.dtype),
    )
    return _checked(hidden, weight, bias, rows, terms, implementation)


def rows_sparse_kd(
    hidden: Tensor,
    weight: Tensor,
    rows: LabelledRows,
    *,
    gamma: float,
    temperature: float = 1.0,
    direction: Direction = "forward",
    bias: Tensor | None = None,
    implementation: Implementation = "auto",
    softcap: float | None = None,
    gradient_skip: float | None = None,
    generator: torch.Generator | None = None,
) -> SparseKdLoss:
    """`linear_sparse_kd` of rows that were checked before: the host never waits for the device.

    rows  `labelled_rows` of the N positions of `hidden`, for this vocabulary, gamma and direction, on the device of
          `hidden`; with float64 weights for a float64 output layer. What they hold is not looked at again
    The rest is as in `linear_sparse_kd`. Raises ValueError for shapes, devices, dtypes or options that do not fit,
    NotImplementedError as there.
    """
    skip = None if gradient_skip is None else GradientSkip(gradient_skip, generator)
    terms = Terms(gamma, temperature, direction, softcap=softcap, skip=skip)
    check_implementation(implementation, direction, skip, hidden.device)
    check_states(hidden, rows.positions, rows.labels)
    check_layer(hidden, weight, bias)
    return _checked(hidden, weight, bias, rows, terms, implementation)


def _checked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: LabelledRows,
    terms: Terms,
    implementation: Implementation,
) -> SparseKdLoss:
    """The loss of what fits together; autocast decides the operands and is then out of the way."""
    operand = operand_dtype(weight)
    found, expected = rows.log_weights.dtype, accumulator(operand)
    if found != expected:
        raise ValueError(f"rows with weights in {found}: expected {expected} for {operand} operands")
    with torch.autocast(hidden.device.type, enabled=False):
        by_triton = takes_triton(implementation, hidden.device, operand, terms, rows.ids.shape[1])
        return _loss(hidden, weight, bias, rows, replace(terms, by_triton=by_triton), operand)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: LabelledRows,
    terms: Terms,
    operand: torch.dtype,
) -> SparseKdLoss:
    """The sums, differentiable where a gradient is wanted."""
    layer = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in layer):
        apply = _LinearSparseKd.apply
        total, ce, kl = apply(*layer, rows, terms, operand)  # type: ignore[no-untyped-call]
    else:
        ce, kl, _ = sums_and_gradients(*layer, rows, terms, operand, (False, False, False))
        total = terms.total(ce, kl)
    return SparseKdLoss(total, ce, kl, len(rows))


class _LinearSparseKd(torch.autograd.Function):
    """(hidden, weight, bias) -> (total, ce, kl). Forward forms gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: LabelledRows,
        terms: Terms,
        operand: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        ce, kl, gradients = sums_and_gradients(hidden, weight, bias, rows, terms, operand, wanted)
        ctx.save_for_backward(rows.live, *gradients)
        ctx.positions = hidden.shape[0]
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(ce, kl)
        return terms.total(ce, kl), ce, kl

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # once_differentiable lets a constant upstream pass and loses the second derivative silently.
        if torch.is_grad_enabled():
            raise NotImplementedError("second derivatives (create_graph=True): use the reference")
        live, *gradients = ctx.saved_tensors
        # In place only where this was the last use of what forward saved: dweight is the largest thing here.
        scale = torch.mul if _graph_is_kept() else Tensor.mul_
        scaled = [
            None if gradient is None else scale(gradient, upstream).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        if scaled[0] is not None and len(live) < ctx.positions:
            everywhere = scaled[0].new_zeros(ctx.positions, scaled[0].shape[1])
            scaled[0] = everywhere.index_copy_(0, live, scaled[0])
        return (*scaled, None, None, None)


def _graph_is_kept() -> bool:
    """Whether the backward that runs may run again (retain_graph); True if torch does not say.

    If not, autograd drops the saved tensors after this node and refuses to come back to it, so they may be
    written over. If so, a second backward needs them, and the first one's result may be the caller's.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())
