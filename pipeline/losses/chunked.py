"""Cross-entropy plus a KL to sparse teacher targets, on any device, without ever holding [N, V].

N positions, d hidden size, V student vocabulary, K kept ids of a position, T temperature.
With student logits z, q = softmax(z), s = softmax(z / T), teacher weights w on the ids and w_tail
on "every other token" (SparseTargets), DESIGN section 4 reads, at a position with label y:

    CE      = -log q[y]
    forward = sum_K w (log w - log s) + w_tail (log w_tail - log s_tail)      KL(teacher || student)
    reverse = sum_K s (log s - log w) + s_tail (log s_tail - log w_tail)      KL(student || teacher)
    total   = sum over labelled positions of CE + gamma T^2 KL

With a soft cap c (Gemma), z = c tanh(raw / c) of the output layer's raw logits; T divides what comes out.
All is a sum over labelled positions and never a mean; divide by `SparseKdLoss.positions`.
`sparse_kd_reference` writes this down densely in float64, `linear_sparse_kd` avoids the [N, V].
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip
from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

Direction = Literal["forward", "reverse"]
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

_NEG_INF = float("-inf")


class SparseKdLoss(NamedTuple):
    """Sums over the labelled positions, in nats: divide by `positions` for means.

    A named tuple and no dataclass: wrappers look for tensors in a forward's output, and DDP with
    static_graph=True passes over a dataclass and then reduces no gradient, without an error.

    total  [] = ce + gamma T^2 kl; differentiable
    ce     [] cross-entropy to the labels
    kl     [] KL at the temperature, without the factor gamma T^2. For sampled targets it has the
              draw's own entropy in it, so it is no distance (DESIGN section 4)
    positions  number of labelled positions
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    positions: int


def sparse_kd_reference(
    logits: Tensor,
    labels: Tensor,
    targets: SparseTargets | None,
    *,
    gamma: float,
    temperature: float = 1.0,
    direction: Direction = "forward",
    ignore_index: int = NO_LABEL,
) -> SparseKdLoss:
    """The equations of this module in dense float64: the truth the kernels are tested against.

    logits  [N, V] any float dtype, computed on in float64; all three sums are differentiable. Of a student
            that soft-caps its logits: the capped ones
    labels  int [N], `ignore_index` where a position has none
    targets of the same N positions; None only with gamma = 0

    Raises ValueError as `linear_sparse_kd` does.
    """
    terms = _Terms(gamma, temperature, direction)
    _check_shapes(logits, "logits", "V", labels, targets)
    batch = _labelled(labels, targets, logits.shape[1], terms, ignore_index, torch.float64)
    z = logits.double()[batch.live]
    ce = -torch.log_softmax(z, 1).gather(1, batch.labels[:, None]).sum()
    kl = _reference_kl(torch.log_softmax(z / temperature, 1), batch, direction)
    return SparseKdLoss(terms.total(ce, kl), ce, kl, len(batch.live))


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

    The logits exist for one chunk of positions at a time (`CPU_LOGIT_BYTES`, `DEVICE_LOGIT_BYTES`)
    and their gradient takes their place at once, so backward only multiplies what forward saved:
    dhidden [labelled, d], dweight [V, d] and dbias [V], each only if its input wants it. Without
    grad mode, or if nothing requires a gradient, none of that work is done.

    hidden  [N, d] the student's last hidden states. Rows whose label is `ignore_index` cost nothing
            and may hold anything, NaN included
    weight  [V, d], bias [V] or None: the student's output layer. V may exceed the teacher's vocabulary
            (padding): no label or id names the rest, which has its softmax mass like any other token
    labels  int [N], `ignore_index` where a position has none
    targets of the same N positions; a row without entries and without tail contributes CE alone.
            None only with gamma = 0, which is then plain cross-entropy; with targets, gamma = 0
            still reports `kl`
    gamma   >= 0; temperature T > 0. gamma T^2 scales the loss and its gradient alike
    direction  "reverse" needs a tail in every row with ids: elsewhere the teacher's weight is 0
    implementation  how a chunk's logits become loss and gradient: "chunked" in torch, "triton" by
            `triton_kernels.sparse_kl` (CUDA, forward KL, no float64). "auto" takes "chunked" until
            the kernel has been run on a GPU
    softcap > 0: logits become softcap * tanh(logits / softcap), bias included (Gemma's
            `final_logit_softcapping`). A bias of -inf then closes no token: its logit is -softcap
    gradient_skip  tau > 0: the gradients of hidden and weight become unbiased estimates, for a fraction
            of the time of their products; total, ce, kl and dbias stay exact. `pipeline.gradient_skip` states
            method, error and what tau to choose. A chunk whose gradient is too flat to gain gets exact
            products. CPU, "auto" or "chunked"
    generator  of the CPU: what gradient_skip draws from, torch's default generator if None. Nothing is
            drawn where no gradient is formed. Activation checkpointing rewinds the default generator
            for its recomputation, not this one; either way the estimate is unbiased. Ranks that train
            together need different seeds, or their errors may add up

    Dtypes: hidden and bias are cast to the weight's dtype or, inside torch.autocast, all three to
    the autocast dtype (a float64 weight stays float64). Softmax, sums and the accumulation of the
    gradients are float32, or float64 for a float64 weight; so are the results. 16-bit operands are
    multiplied in float32 on `WIDENING_DEVICES`; elsewhere each chunk's products are 16-bit too.
    ce and kl are detached.

    Raises ValueError for shapes, devices or options that do not fit, a label or an id outside
    [0, V), a duplicate id in a row, a tail although the ids cover all V tokens (forward), and a row
    whose reverse KL is infinite; each names the first such position. NotImplementedError for
    what "triton" does not do, gradient_skip on another device than the CPU, and in a backward with
    create_graph=True.
    """
    skip = None if gradient_skip is None else GradientSkip(gradient_skip, generator)
    by_triton = _check_implementation(implementation, direction, skip, hidden.device)
    terms = _Terms(gamma, temperature, direction, by_triton, softcap, skip)
    _check_shapes(hidden, "hidden", "d", labels, targets)
    _check_layer(hidden, weight, bias)
    operand = _operand_dtype(weight)
    accumulator = torch.float64 if operand == torch.float64 else torch.float32
    batch = _labelled(labels, targets, weight.shape[0], terms, ignore_index, accumulator)
    layer = (hidden, weight, bias)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in layer)
    with torch.autocast(hidden.device.type, enabled=False):
        if wanted:
            apply = _LinearSparseKd.apply
            total, ce, kl = apply(*layer, batch, terms, operand)  # type: ignore[no-untyped-call]
        else:
            ce, kl, _ = _chunked(*layer, batch, terms, operand, (False, False, False))
            total = terms.total(ce, kl)
    return SparseKdLoss(total, ce, kl, len(batch.live))


@dataclass(frozen=True)
class _Terms:
    """What is summed: the options that change the mathematics. Raises ValueError if impossible."""

    gamma: float
    temperature: float
    direction: Direction
    by_triton: bool = False
    softcap: float | None = None
    skip: GradientSkip | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma {self.gamma}: expected a finite number >= 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature {self.temperature}: expected a finite number > 0")
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f'direction {self.direction!r}: expected "forward" or "reverse"')
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap {self.softcap}: expected a finite number > 0, or None")

    def total(self, ce: Tensor, kl: Tensor) -> Tensor:
        """ce + gamma T^2 kl; an infinite kl does not matter where gamma is 0."""
        return ce + self.gamma * self.temperature**2 * kl if self.gamma else ce + 0


@dataclass(frozen=True)
class _Batch:
    """The n labelled positions, checked: every label and id is a token of the vocabulary.

    live        int64 [n]       their places among the N positions
    labels      int64 [n]
    ids         int   [n, K]    unique in a row; padding is -1. The caller's own where all are labelled
    log_weights       [n, K+1]  nats; the tail comes last; -inf at padding and for no tail
    """

    live: Tensor
    labels: Tensor
    ids: Tensor
    log_weights: Tensor

    def rows(self, part: slice) -> _Batch:
        return _Batch(self.live[part], self.labels[part], self.ids[part], self.log_weights[part])


# ---------------------------------------------------------------- the reference


def _reference_kl(log_student: Tensor, batch: _Batch, direction: Direction) -> Tensor:
    """log_student [n, V] float64 -> the KL over the classes "each id" and "the tail", summed."""
    row, slot = (batch.ids >= 0).nonzero(as_tuple=True)
    token = batch.ids[row, slot].long()
    kept = torch.zeros_like(log_student, dtype=torch.bool)
    kept[row, token] = True
    log_tail = batch.log_weights[:, -1]
    has_tail = (log_tail > _NEG_INF) & ~kept.all(1)
    outside = log_student[has_tail].masked_fill(kept[has_tail], _NEG_INF).logsumexp(1)
    student = torch.cat([log_student[row, token], outside])
    teacher = torch.cat([batch.log_weights[row, slot], log_tail[has_tail]])
    if direction == "forward":
        return _relative_entropy(teacher, student)
    return _relative_entropy(student, teacher)


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q), where 0 log 0 = 0."""
    some = log_p > _NEG_INF
    return (log_p[some].exp() * (log_p[some] - log_q[some])).sum()


# ---------------------------------------------------------------- the chunked implementation


class _LinearSparseKd(torch.autograd.Function):
    """(hidden, weight, bias) -> (total, ce, kl). Forward forms gradients, backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: _Batch,
        terms: _Terms,
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
    batch: _Batch,
    terms: _Terms,
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
            _soft_cap_(z, terms.softcap, slope)
        rows_of = batch.rows(part)
        if terms.by_triton:
            ce[part], kl[part] = _triton_loss_and_gradient_(z, rows_of, terms, any(wanted))
        else:
            ce[part], kl[part] = _loss_and_gradient_(z, rows_of, terms, softened, any(wanted))
        if slope is not None:
            z.mul_(slope)
        _add_gradients_(gradients, part, z, h[part], w, terms.skip)
    return ce.sum(), kl.sum(), gradients


def _soft_cap_(z: Tensor, cap: float, slope: Tensor | None) -> None:
    """In place z = cap tanh(z / cap); `slope`, if given, becomes dz_out / dz_in = 1 / cosh(z_in / cap)^2.

    Not 1 - tanh^2, whose digits are gone where the cap holds a logit down: 1 % off at 6 to 7 caps in
    float32. cosh overflows to inf and the slope to 0, as it should.
    """
    z.div_(cap)
    if slope is not None:
        torch.cosh(z, out=slope).square_().reciprocal_()
    z.tanh_().mul_(cap)


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


def _loss_and_gradient_(
    z: Tensor, batch: _Batch, terms: _Terms, softened: Tensor | None, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """z [n, V]: logits in, d(CE + gamma T^2 KL)/dz out. Returns CE [n] and KL [n].

    A position has K + 1 classes, its ids and the tail. The gradient at an id is that of its class;
    off the ids it is that of the tail class times the softmax over the tail alone, so each
    temperature costs one softmax, T = 1 a single one (facts/kernels.md section 1). Without
    `want_gradient` z is left undefined.
    """
    n, vocab = z.shape
    first = torch.arange(0, n * vocab, vocab, device=z.device)  # of each row in the flat view
    flat, kept, label_at = z.view(-1), batch.ids >= 0, first + batch.labels
    kept_at = (first[:, None] + batch.ids)[kept]  # padding has no place, least of all token 0's
    top = z.amax(1, keepdim=True)  # taken off first: rounding grows with the distance from 0
    below = z.new_full(batch.ids.shape, _NEG_INF)
    below[kept] = flat[kept_at]
    below -= top
    label_below = flat[label_at] - top[:, 0]

    if softened is not None:
        softened = torch.sub(z, top, out=softened[:n]).div_(terms.temperature)
        tail_T = _tail_softmax_(softened, kept_at)
    tail = _tail_softmax_(z.sub_(top), kept_at)
    classes = torch.cat([below, tail[:, None]], 1)
    log_q = log_s = classes.log_softmax(1)
    if softened is not None:
        log_s = torch.cat([below / terms.temperature, tail_T[:, None]], 1).log_softmax(1)
    kl, slope = _divergence(log_s, batch.log_weights, terms.direction)

    if want_gradient:
        ce_slope = log_q.exp()
        kl_slope = slope * (terms.gamma * terms.temperature)  # T^2 of the loss, d(z/T)/dz = 1/T
        both = ce_slope + kl_slope
        if softened is None:
            z.mul_(both[:, -1:])
        else:
            z.mul_(ce_slope[:, -1:]).addcmul_(softened, kl_slope[:, -1:])
        flat[kept_at] = both[:, :-1][kept]
        flat[label_at] -= 1
    return classes.logsumexp(1) - label_below, kl


def _triton_loss_and_gradient_(
    z: Tensor, batch: _Batch, terms: _Terms, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The same by the row kernel: two readings and one writing of z, no scratch."""
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl  # only here: it imports triton

    return sparse_kl(
        z,
        batch.labels,
        batch.ids.int(),
        batch.log_weights[:, :-1],
        batch.log_weights[:, -1],
        gamma=terms.gamma,
        temperature=terms.temperature,
        gradient=want_gradient,
    )


def _tail_softmax_(x: Tensor, kept_at: Tensor) -> Tensor:
    """In place: each row of x [n, V] becomes the softmax over its entries outside `kept_at` (flat).

    Returns the log-sum-exp of those entries [n], -inf where there is none. Masking first keeps it
    exact however little mass is left: 1 - sum(kept) would cancel. softmax into its own input spares
    a buffer; torch reads a row's maximum and sum before it writes the row (a test watches that).
    """
    x.view(-1).index_fill_(0, kept_at, _NEG_INF)
    peak = x.amax(1)
    torch.softmax(x, 1, out=x)
    lse = peak - x.amax(1).log()
    empty = peak == _NEG_INF  # the ids cover the vocabulary, or all other logits are -inf
    if empty.any():
        x[empty] = 0.0
        lse = lse.masked_fill(empty, _NEG_INF)
    return lse


def _divergence(log_s: Tensor, log_w: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """Student and teacher log-weights of the classes [n, K+1] -> KL [n], T d(KL)/d(class logit).

    A class of weight 0 on the side that KL averages over contributes 0. The mass of a teacher row
    enters as it is: 1 up to rounding, or 0 for a row without targets, whose KL and slope are 0.
    """
    s, w = log_s.exp(), log_w.exp()
    mass = w.sum(1, keepdim=True)
    if direction == "forward":
        kl = torch.where(w > 0, w * (log_w - log_s), 0.0).sum(1)
        return kl, mass * s - w
    gap = torch.where((s > 0) & (mass > 0), log_s - log_w, 0.0)
    kl = (s * gap).sum(1)
    return kl, s * (gap - kl[:, None])


def _logit_bytes(device: torch.device, terms: _Terms) -> int:
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


# ---------------------------------------------------------------- what is refused


def _labelled(
    labels: Tensor,
    targets: SparseTargets | None,
    vocab: int,
    terms: _Terms,
    ignore_index: int,
    dtype: torch.dtype,
) -> _Batch:
    """The positions that have a label, with weights in `dtype`; the others are not looked at.

    Raises ValueError naming the first position that is wrong.
    """
    if targets is None and terms.gamma:
        raise ValueError(f"no targets, gamma {terms.gamma}: pass targets, or gamma=0 for CE alone")
    live = (labels != ignore_index).nonzero()[:, 0]
    n = len(live)
    if targets is None:
        ids, log_weights = live.new_empty(n, 0), live.new_full((n, 1), _NEG_INF, dtype=dtype)
    else:
        chosen = targets if n == len(labels) else targets.rows(live)
        ids, k = chosen.ids, chosen.ids.shape[1]
        log_weights = chosen.tail.new_empty(n, k + 1, dtype=dtype)
        log_weights[:, :k].copy_(chosen.logprobs).masked_fill_(ids == PADDING_ID, _NEG_INF)
        log_weights[:, k].copy_(chosen.tail)
    batch = _Batch(live, labels[live].long(), ids, log_weights)
    _check_labels_and_ids(batch, vocab)
    _check_divergence_is_finite(batch, vocab, terms.direction)
    return batch


def _check_labels_and_ids(batch: _Batch, vocab: int) -> None:
    labels, ids = batch.labels, batch.ids
    ordered = _padding_last(ids)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != _after_any_id(ids))

    def outside(row: int) -> str:
        bad = ids[row][(ids[row] >= vocab) | (ids[row] < PADDING_ID)]
        return f"id {int(bad[0])}, outside the student's vocabulary of {vocab} tokens"

    _refuse(
        batch.live,
        [
            (
                (labels < 0) | (labels >= vocab),
                lambda row: f"label {int(labels[row])}, outside the vocabulary of {vocab} tokens",
            ),
            (((ids >= vocab) | (ids < PADDING_ID)).any(1), outside),
            (
                twice.any(1),
                lambda row: f"id {int(ordered[row, 1:][twice[row]][0])} twice; merge its weights",
            ),
        ],
    )


def _check_divergence_is_finite(batch: _Batch, vocab: int, direction: Direction) -> None:
    """Forward KL needs a token for the tail to lie on, reverse KL teacher weight on every token."""
    log_kept, log_tail = batch.log_weights[:, :-1], batch.log_weights[:, -1]
    kept = batch.ids >= 0
    if direction == "forward":
        covered = kept.sum(1) == vocab
        reason = f"ids for all {vocab} tokens and yet a tail; make its log-weight -inf"
        _refuse(batch.live, [(covered & (log_tail > _NEG_INF), lambda _: reason)])
        return
    no_tail = "no tail, which reverse KL needs; use a scheme with a bucket, or forward KL"
    weightless = "an id of weight 0, for which reverse KL is infinite; drop the id"
    _refuse(
        batch.live,
        [
            (kept.any(1) & (log_tail == _NEG_INF), lambda _: no_tail),
            ((kept & (log_kept == _NEG_INF)).any(1), lambda _: weightless),
        ],
    )


def _after_any_id(ids: Tensor) -> int:
    return torch.iinfo(ids.dtype).max


def _padding_last(ids: Tensor) -> Tensor:
    """ids [n, K] ascending in each row, padding as `_after_any_id`; sorts only if need be."""
    key = ids.masked_fill(ids == PADDING_ID, _after_any_id(ids))
    return key if bool((key[:, 1:] >= key[:, :-1]).all()) else key.sort(1).values


def _refuse(live: Tensor, findings: list[tuple[Tensor, Callable[[int], str]]]) -> None:
    """Raise ValueError for the first finding (bad [n], reason of a row) that holds anywhere.

    One transfer from the device for all of them.
    """
    holds = torch.stack([bad.any() for bad, _ in findings]).tolist()
    for found, (bad, reason) in zip(holds, findings, strict=True):
        if found:
            row = int(bad.nonzero()[0, 0])
            raise ValueError(f"position {int(live[row])} has {reason(row)}")


def _check_implementation(
    implementation: str, direction: Direction, skip: GradientSkip | None, device: torch.device
) -> bool:
    """True for the Triton kernel."""
    if implementation not in ("auto", "chunked", "triton"):
        raise ValueError(f'implementation {implementation!r}: expected "auto", "chunked" or "triton"')
    if skip is not None and (implementation == "triton" or device.type != "cpu"):
        raise NotImplementedError(
            f'gradient_skip with implementation "{implementation}" on {device.type}: use "chunked" on a CPU'
        )
    if implementation != "triton":
        return False
    if direction != "forward":
        raise NotImplementedError('implementation "triton" has forward KL only; use "chunked" for reverse')
    if importlib.util.find_spec("triton") is None:
        raise NotImplementedError('implementation "triton": triton is not installed; use "chunked"')
    return True


def _check_shapes(
    rows: Tensor,
    name: str,
    width: str,
    labels: Tensor,
    targets: SparseTargets | None,
) -> None:
    """rows [N, width], labels [N] and targets of N positions must agree, and lie on one device."""
    if rows.ndim != 2:
        raise ValueError(f"{name} has shape {list(rows.shape)}: expected [N, {width}]")
    n, given = rows.shape[0], f"{name} has shape {list(rows.shape)}"
    _check_shape("labels", labels, (n,), given)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels are {labels.dtype}: expected integers")
    parts = {"labels": labels}
    if targets is not None:
        if targets.ids.ndim != 2:
            raise ValueError(f"targets.ids has shape {list(targets.ids.shape)}: expected [{n}, K]")
        _check_shape("targets.ids", targets.ids, (n, targets.ids.shape[1]), given)
        _check_shape("targets.logprobs", targets.logprobs, tuple(targets.ids.shape), "ids alike")
        _check_shape("targets.tail", targets.tail, (n,), given)
        parts |= {"ids": targets.ids, "logprobs": targets.logprobs, "tail": targets.tail}
    for part, tensor in parts.items():
        _check_device(part, tensor, name, rows)


def _check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """weight [V, d] and bias [V] must fit hidden [N, d]."""
    given = f"hidden has shape {list(hidden.shape)}"
    _check_shape("weight", weight, (*weight.shape[:1], hidden.shape[1]), given)
    if not weight.shape[0]:
        raise ValueError("weight has no rows: expected [V, d] with V > 0")
    _check_device("weight", weight, "hidden", hidden)
    if bias is not None:
        _check_shape("bias", bias, (weight.shape[0],), f"weight has shape {list(weight.shape)}")
        _check_device("bias", bias, "hidden", hidden)


def _check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], because: str) -> None:
    if tensor.shape != expected:
        found = list(tensor.shape)
        raise ValueError(f"{name} has shape {found}: expected {list(expected)} ({because})")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        here, there = tensor.device, other.device
        raise ValueError(f"{name} on {here}, {other_name} on {there}: move one with .to()")
