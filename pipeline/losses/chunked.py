"""Cross-entropy plus a KL to sparse teacher targets, on any device, without ever holding [N, V].

N positions, d hidden size, V student vocabulary, K kept ids of a position, T temperature; the equations are in
`losses/reference.py`. With a soft cap c (Gemma), z = c tanh(raw / c) of the output layer's raw logits; T divides what
comes out.

The logits exist for one chunk of positions at a time (`CPU_LOGIT_BYTES`, `DEVICE_LOGIT_BYTES`) and their gradient
takes their place at once, so backward only multiplies what forward saved: dhidden [labelled, d], dweight [V, d] and
dbias [V], each only if its input wants it. Without grad mode, or if nothing requires a gradient, none of that work is
done.

Dtypes: hidden and bias are cast to the weight's dtype or, inside torch.autocast, all three to the autocast dtype (a
float64 weight stays float64). Softmax, sums and the accumulation of the gradients are float32, or float64 for a
float64 weight. 16-bit operands are multiplied in float32 on `WIDENING_DEVICES`; elsewhere each chunk's products are
16-bit too.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.checks import check_implementation, check_layer, check_shapes, check_states
from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip
from ddk_pipe.pipeline.losses.logit_gradient import loss_and_gradient_, soft_cap_, triton_loss_and_gradient_
from ddk_pipe.pipeline.losses.rows import LabelledRows, labelled_rows
from ddk_pipe.pipeline.losses.terms import Direction, SparseKdLoss, Terms
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets

Implementation = Literal["auto", "chunked", "triton"]

# The logits of one chunk take at most this much, as much again when T != 1, and with a softcap. On a CPU
# (N = 2048, V = 49152, d = 576, one thread) 32, 44, 48 MiB take 4.1, 3.9, 3.9 s (the product that forms the
# logits runs at 79, 83, 85 GFLOP/s), and peak memory is 0.130, 0.140, 0.144 of full cross-entropy's: dweight and
# dhidden alone are 0.097. With gradient_skip that product is most of the time: 32, 64 MiB take 1.85, 1.73 s.
# A GPU needs more, or reading and writing dweight once a chunk dominates.
CPU_LOGIT_BYTES, CPU_SKIP_LOGIT_BYTES = 44 * 2**20, 64 * 2**20
DEVICE_LOGIT_BYTES = 2**30
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 64, 4096

# Devices that may multiply 16-bit matrices more slowly than float32: 8.7, not 49 GFLOP/s on AVX2.
WIDENING_DEVICES = frozenset({"cpu"})


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
            (CUDA, forward KL, no float64). "auto" takes "chunked" until the kernel has been run on a GPU
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
    terms = _terms(
        hidden.device, implementation, gamma, temperature, direction, softcap, gradient_skip, generator
    )
    check_shapes(hidden, "hidden", "d", labels, targets)
    check_layer(hidden, weight, bias)
    rows = labelled_rows(
        labels,
        targets,
        vocab=weight.shape[0],
        gamma=gamma,
        direction=direction,
        ignore_index=ignore_index,
        dtype=_accumulator(weight.dtype),
    )
    return _checked(hidden, weight, bias, rows, terms)


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
    terms = _terms(
        hidden.device, implementation, gamma, temperature, direction, softcap, gradient_skip, generator
    )
    check_states(hidden, rows.positions, rows.labels)
    check_layer(hidden, weight, bias)
    return _checked(hidden, weight, bias, rows, terms)


def _terms(
    device: torch.device,
    implementation: Implementation,
    gamma: float,
    temperature: float,
    direction: Direction,
    softcap: float | None,
    gradient_skip: float | None,
    generator: torch.Generator | None,
) -> Terms:
    skip = None if gradient_skip is None else GradientSkip(gradient_skip, generator)
    by_triton = check_implementation(implementation, direction, skip, device)
    return Terms(gamma, temperature, direction, by_triton, softcap, skip)


def _checked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: LabelledRows, terms: Terms
) -> SparseKdLoss:
    """The loss of what fits together; autocast decides the operands and is then out of the way."""
    operand = _operand_dtype(weight)
    found, expected = rows.log_weights.dtype, _accumulator(operand)
    if found != expected:
        raise ValueError(f"rows with weights in {found}: expected {expected} for {operand} operands")
    with torch.autocast(hidden.device.type, enabled=False):
        return _loss(hidden, weight, bias, rows, terms, operand)


def _accumulator(operand: torch.dtype) -> torch.dtype:
    """Of softmax, sums and gradients."""
    return torch.float64 if operand == torch.float64 else torch.float32


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: LabelledRows,
    terms: Terms,
    operand: torch.dtype,
) -> SparseKdLoss:
    """The sums, differentiable where a gradient is wanted."""
    layer = (hidden, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in layer):
        apply = _LinearSparseKd.apply
        total, ce, kl = apply(*layer, batch, terms, operand)  # type: ignore[no-untyped-call]
    else:
        ce, kl, _ = _chunked(*layer, batch, terms, operand, (False, False, False))
        total = terms.total(ce, kl)
    return SparseKdLoss(total, ce, kl, len(batch.live))


class _LinearSparseKd(torch.autograd.Function):
    """(hidden, weight, bias) -> (total, ce, kl). Forward forms gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: LabelledRows,
        terms: Terms,
        operand: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        ce, kl, gradients = _chunked(hidden, weight, bias, batch, terms, operand, wanted)
        ctx.save_for_backward(batch.live, *gradients)
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


def _chunked(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: LabelledRows,
    terms: Terms,
    operand: torch.dtype,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The sums of CE and KL, and the gradients [n, d], [V, d], [V] of total that are `wanted`."""
    accumulator, n, vocab = batch.log_weights.dtype, len(batch.live), weight.shape[0]
    # Rows without a label go first: 0 * NaN is NaN, so a product would carry them into dweight.
    h = _operand(hidden if n == len(hidden) else hidden[batch.live], operand)
    w = _operand(weight, operand)
    b = None if bias is None else _operand(bias, operand).to(accumulator)
    shapes = (h.shape, w.shape, w.shape[:1])
    gradients = [
        h.new_zeros(shape, dtype=accumulator) if want else None
        for shape, want in zip(shapes, wanted, strict=True)
    ]
    rows = _chunk_rows(n, vocab * accumulator.itemsize, _logit_bytes(h.device, terms))
    logits = h.new_empty(rows, vocab, dtype=accumulator)
    one_softmax = terms.temperature == 1 or not batch.ids.numel() or terms.by_triton
    softened = None if one_softmax else torch.empty_like(logits)
    slopes = torch.empty_like(logits) if terms.softcap is not None and any(wanted) else None
    ce, kl = h.new_empty(2, n, dtype=accumulator)
    for start in range(0, n, max(rows, 1)):
        part = slice(start, min(start + rows, n))
        z = _matmul_(logits[: part.stop - start], h[part], w.t())
        if b is not None:
            z.add_(b)
        slope = None if slopes is None else slopes[: len(z)]
        if terms.softcap is not None:
            soft_cap_(z, terms.softcap, slope)
        rows_of = batch.rows(part)
        if terms.by_triton:
            ce[part], kl[part] = triton_loss_and_gradient_(z, rows_of, terms, any(wanted))
        else:
            ce[part], kl[part] = loss_and_gradient_(z, rows_of, terms, softened, any(wanted))
        if slope is not None:
            z.mul_(slope)
        _add_gradients_(gradients, part, z, h[part], w, terms.skip)
    return ce.sum(), kl.sum(), gradients


def _add_gradients_(
    gradients: list[Tensor | None],
    part: slice,
    dz: Tensor,
    h: Tensor,
    w: Tensor,
    skip: GradientSkip | None,
) -> None:
    """The share of one chunk: dz [n, V] is d total / d logits, h [n, d] its hidden states."""
    d_hidden, d_weight, d_bias = gradients
    if d_bias is not None:
        d_bias.add_(dz.sum(0))
    dz = dz.to(h.dtype)
    if skip is not None and (d_hidden is not None or d_weight is not None) and skip.pays(dz):
        survivors = skip.draw(dz)
        if d_hidden is not None:
            d_hidden[part] = survivors.times(w)
        if d_weight is not None:
            survivors.add_transposed_times_(d_weight, h)
        return
    if d_hidden is not None:
        _matmul_(d_hidden[part], dz, w)
    if d_weight is not None:
        _matmul_(d_weight, dz.t(), h, add=True)


def _logit_bytes(device: torch.device, terms: Terms) -> int:
    """The memory bound of one chunk's logits."""
    if device.type != "cpu":
        return DEVICE_LOGIT_BYTES
    return CPU_LOGIT_BYTES if terms.skip is None else CPU_SKIP_LOGIT_BYTES


def _chunk_rows(n: int, row_bytes: int, bound: int) -> int:
    """Rows of a chunk: as many as the memory bound allows, evened out so that no rest is small."""
    most = min(max(bound // row_bytes, MIN_CHUNK_ROWS), MAX_CHUNK_ROWS)
    chunks = math.ceil(n / most)
    return math.ceil(n / chunks) if chunks else 0


def _operand_dtype(weight: Tensor) -> torch.dtype:
    """What the products' operands are rounded to: the weight's dtype, or autocast's if it is on."""
    device = weight.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to dtype, then widened where 16-bit products are worth avoiding."""
    x = x.to(dtype)
    return x.float() if dtype.itemsize < 4 and x.device.type in WIDENING_DEVICES else x


def _matmul_(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> Tensor:
    """out = a @ b, or out += a @ b; out may be wider than the operands."""
    if a.dtype != out.dtype:
        product = torch.mm(a, b)
        return out.add_(product) if add else out.copy_(product)
    return out.addmm_(a, b) if add else torch.mm(a, b, out=out)
