"""From a chunk's logits z [n, V] to its losses and, in z's place, their gradient: in torch or by the Triton kernel.

A trailing underscore in a name: works in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.rows import LabelledRows
from ddk_pipe.pipeline.losses.terms import NEG_INF, Direction, Terms


def soft_cap_(z: Tensor, cap: float, slope: Tensor | None) -> None:
    """In place z = cap tanh(z / cap); `slope`, if given, becomes dz_out / dz_in = 1 / cosh(z_in / cap)^2.

    Not 1 - tanh^2, whose digits are gone where the cap holds a logit down: 1 % off at 6 to 7 caps in
    float32. cosh overflows to inf and the slope to 0, as it should.
    """
    z.div_(cap)
    if slope is not None:
        torch.cosh(z, out=slope).square_().reciprocal_()
    z.tanh_().mul_(cap)


def loss_and_gradient_(
    z: Tensor, batch: LabelledRows, terms: Terms, softened: Tensor | None, want_gradient: bool
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
    below = z.new_full(batch.ids.shape, NEG_INF)
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


def triton_loss_and_gradient_(
    z: Tensor, batch: LabelledRows, terms: Terms, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The same by the row kernel: two readings and one writing of z, no scratch."""
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl  # only here: it imports triton

    return sparse_kl(
        z,
        batch.labels,
        batch.ids,
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
    x.view(-1).index_fill_(0, kept_at, NEG_INF)
    peak = x.amax(1)
    torch.softmax(x, 1, out=x)
    lse = peak - x.amax(1).log()
    empty = peak == NEG_INF  # the ids cover the vocabulary, or all other logits are -inf
    if empty.any():
        x[empty] = 0.0
        lse = lse.masked_fill(empty, NEG_INF)
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
