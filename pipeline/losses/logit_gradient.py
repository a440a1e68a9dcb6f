"""From a chunk's logits z [n, V] to its losses and, in z's place, their gradient: in torch or by the Triton kernel.

The host never waits for the device here: no number is fetched, no shape depends on one.
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
    flat: Tensor, rows: LabelledRows, terms: Terms, softened: Tensor | None, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """flat [n V + 1]: logits in, d(CE + gamma T^2 KL)/dz out, row by row. Returns CE [n] and KL [n].

    A position has K + 1 classes, its ids and the tail. The gradient at an id is that of its class; off the ids it is
    that of the tail class times the softmax over the tail alone, so each temperature costs one softmax, T = 1 a
    single one. The last cell of `flat` is where padding slots read and write: it means nothing.

    softened  scratch for the logits over T, at least [n, V]; None where one softmax will do
    Without `want_gradient` `flat` is left undefined.
    """
    n, temperature = len(rows), terms.temperature
    z = flat[:-1].view(n, -1)
    kept = rows.ids >= 0
    first = torch.arange(0, z.numel(), z.shape[1], device=z.device)  # of each row in the flat view
    kept_at = torch.where(kept, first[:, None] + rows.ids, z.numel())
    label_at = first + rows.labels
    found, label = torch.where(kept, flat[kept_at], NEG_INF), flat[label_at]

    # Low and not -inf, nor -inf over T: where the ids cover the vocabulary, a softmax over nothing stays finite.
    gone = torch.finfo(z.dtype).min / 2 * min(temperature, 1.0)
    flat.index_fill_(0, kept_at.view(-1), gone)
    peak = z.amax(1, keepdim=True)
    empty = peak <= gone  # the ids cover the vocabulary, or all other logits are -inf
    # All is taken relative to the row's maximum: rounding grows with the distance from 0.
    top = torch.cat([found, peak], 1).amax(1, keepdim=True)
    below, fall = found - top, torch.where(empty, NEG_INF, peak - top)
    if softened is not None:
        softened = torch.sub(z, peak, out=softened[:n]).div_(temperature)
        tail_T = fall / temperature + _softmax_(softened)
    classes = torch.cat([below, fall + _softmax_(z)], 1)
    log_q = log_s = classes.log_softmax(1)
    if softened is not None:
        log_s = torch.cat([below / temperature, tail_T], 1).log_softmax(1)
    kl, slope = _divergence(log_s, rows.log_weights, terms.direction)

    if want_gradient:
        ce_slope = log_q.exp()
        kl_slope = slope * (terms.gamma * temperature)  # T^2 of the loss, d(z/T)/dz = 1/T
        both = ce_slope + kl_slope
        if softened is None:
            z.mul_(both[:, -1:])
        else:
            z.mul_(ce_slope[:, -1:]).addcmul_(softened, kl_slope[:, -1:])
        flat[kept_at] = both[:, :-1]
        flat[label_at] -= 1
    return classes.logsumexp(1) - (label - top[:, 0]), kl


def triton_loss_and_gradient_(
    z: Tensor, rows: LabelledRows, terms: Terms, want_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The same by the row kernel, z [n, V] float32 or 16-bit: two readings and one writing of z, no scratch."""
    from ddk_pipe.triton_kernels.sparse_kl import sparse_kl  # only here: it imports triton

    return sparse_kl(
        z,
        rows.labels,
        rows.ids,
        rows.log_weights[:, :-1],
        rows.log_weights[:, -1],
        gamma=terms.gamma,
        temperature=terms.temperature,
        gradient=want_gradient,
    )


def _softmax_(x: Tensor) -> Tensor:
    """In place: each row of x [n, V] becomes its softmax. Returns the log-sum-exp less the row's maximum [n, 1].

    With the kept ids masked out before, this is exact for the tail however little mass is left: 1 - sum(kept) would
    cancel. softmax into its own input spares a buffer; torch reads a row's maximum and sum before it writes the row
    (a test watches that). The largest of the softmax is 1 over the sum: quicker to find again than to look up.
    """
    torch.softmax(x, 1, out=x)
    return -x.amax(1, keepdim=True).log()


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
