"""The positions: their targets in order, and all that is [N, K] and no more, in torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddk_pipe.triton_kernels.fused_linear_sparse_kl.kernels import NO_TOKEN


class Targets(NamedTuple):
    """What `fused_linear_sparse_kl` was given, put in order; n rows."""

    labels: Tensor  # int32 [n], -1 outside the vocabulary
    ids: Tensor  # int32 [n, K], K > 0, ascending, NO_TOKEN last
    log_w: Tensor  # float32 [n, K], -inf at padding
    log_tail: Tensor  # float32 [n]


def in_order(vocab: int, labels: Tensor, ids: Tensor, logprobs: Tensor, tail: Tensor) -> Targets:
    """The targets as the kernels want them: what is outside the vocabulary marked, ids sorted, K > 0."""
    inside = (labels >= 0) & (labels < vocab)
    log_w = logprobs.masked_fill(ids == -1, float("-inf"))
    if not ids.shape[1]:
        ids, log_w = ids.new_full((len(ids), 1), -1), log_w.new_full((len(ids), 1), float("-inf"))
    ids, order = ids.masked_fill((ids < 0) | (ids >= vocab), NO_TOKEN.value).sort(1)
    return Targets(labels.where(inside, -1).int(), ids, log_w.gather(1, order), tail.contiguous())


class TailSums(NamedTuple):
    """What the first pass found; C chunks of the vocabulary, n rows, float32."""

    top: Tensor  # [C, n], the maximum of the logits off the ids
    total: Tensor  # [C, n], sum of exp(z - top) over them
    total_t: Tensor  # [C, n], sum of exp((z - top) / T)
    z_ids: Tensor  # [n, K], the logits of the ids, -inf at NO_TOKEN
    z_label: Tensor  # [n], NaN where there is no label


class Rows(NamedTuple):
    """What the second pass needs to know of each row, float32 [n] but for `at_ids` and `lone_label`."""

    ce: Tensor
    kl: Tensor
    top: Tensor  # the tail's maximum
    ce_scale: Tensor  # times exp(z - top): softmax, off the ids
    kl_scale: Tensor  # times exp((z - top) / T): the gradient of gamma T^2 KL, off the ids
    at_ids: Tensor  # [n, K], the gradient there
    at_label: Tensor  # the gradient there, unless the label is among the ids
    lone_label: Tensor  # int32, the label, -1 if it is among the ids


def finish_rows(sums: TailSums, targets: Targets, kl_slope: float, inv_t: float) -> Rows:
    """The middle of `sparse_kl_rows`, and as there all is relative to a maximum: the tail to its own, so that
    it may lie hundreds of nats below the ids, the rest to the row's. kl_slope = gamma T: T^2 over T."""
    top = sums.top.amax(0)
    row_top = torch.maximum(top, sums.z_ids.amax(1))
    fall = top - row_top
    below = sums.z_ids - row_top[:, None]
    tail_sum = (sums.total * (sums.top - top).exp()).sum(0)
    tail_sum_t = (sums.total_t * ((sums.top - top) * inv_t).exp()).sum(0)
    log_sum = (tail_sum * fall.exp() + below.exp().sum(1)).log()
    log_sum_t = (tail_sum_t * (fall * inv_t).exp() + (below * inv_t).exp().sum(1)).log()
    log_s = below * inv_t - log_sum_t[:, None]
    log_s_tail = tail_sum_t.log() + fall * inv_t - log_sum_t

    w, w_tail = targets.log_w.exp(), targets.log_tail.exp()
    kl = torch.where(w != 0, w * (targets.log_w - log_s), 0.0).sum(1)  # != and not >: NaN must not pass for 0
    kl += torch.where(w_tail != 0, w_tail * (targets.log_tail - log_s_tail), 0.0)
    ce = log_sum - (sums.z_label - row_top)

    mass = w.sum(1) + w_tail
    ce_scale = (fall - log_sum).exp()
    kl_scale = kl_slope * (mass * log_s_tail.exp() - w_tail) / tail_sum_t
    kl_scale = torch.where(tail_sum_t == 0, 0.0, kl_scale)  # the ids cover the vocabulary
    is_label = targets.ids == targets.labels[:, None]
    at_ids = (
        (below - log_sum[:, None]).exp() + kl_slope * (mass[:, None] * log_s.exp() - w) - is_label.float()
    )
    z = sums.z_label - top
    at_label = ce_scale * z.exp() + kl_scale * (z * inv_t).exp() - 1.0
    lone_label = targets.labels.masked_fill(is_label.any(1), -1)
    return Rows(ce, kl, top, ce_scale, kl_scale, at_ids, at_label, lone_label)
