"""The rows that a loss over sparse targets is taken over: checked once, on the host, where batches are built.

`labelled_rows` refuses what has no finite loss and names the first position where it is; with its result losses and
measures run without waiting for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.checks import check_targets
from ddk_pipe.pipeline.losses.terms import NEG_INF, Direction
from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets


@dataclass(frozen=True)
class LabelledRows:
    """The n labelled positions of N, checked: every label and id is a token of the vocabulary.

    positions   N, of the batch they were taken from
    live        int64 [n]       their places among the N positions, ascending
    labels      int64 [n]
    ids         int32 [n, K]    unique in a row; padding is -1. The caller's own where all are labelled
    log_weights float [n, K+1]  nats; the tail comes last; -inf at padding and for no tail
    """

    positions: int
    live: Tensor
    labels: Tensor
    ids: Tensor
    log_weights: Tensor

    def __len__(self) -> int:
        return len(self.live)

    def rows(self, part: slice) -> LabelledRows:
        """Some of the labelled positions, of the same N."""
        return self._each(lambda tensor: tensor[part])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LabelledRows:
        """The same on another device; `non_blocking` copies from pinned memory do not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> LabelledRows:
        """The same in page-locked memory of the host."""
        return self._each(lambda tensor: tensor.pin_memory())

    def entropy(self) -> Tensor:
        """Sum over the rows of -sum w log w with the tail's share, nats: float64 [], on the rows' device."""
        total: Tensor = torch.special.entr(self.log_weights.double().exp()).sum()
        return total

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelledRows:
        tensors = (self.live, self.labels, self.ids, self.log_weights)
        return LabelledRows(self.positions, *map(change, tensors))


def labelled_rows(
    labels: Tensor,
    targets: SparseTargets | None,
    *,
    vocab: int,
    gamma: float,
    direction: Direction = "forward",
    ignore_index: int = NO_LABEL,
    dtype: torch.dtype = torch.float32,
) -> LabelledRows:
    """The positions that have a label, with weights in `dtype`; the others are not looked at.

    labels  int [N], `ignore_index` where a position has none
    targets of the same N positions; None only with gamma = 0
    vocab   V of the student that will be given the rows
    dtype   float32, or float64 for a student whose output layer is float64

    Waits for the device of `labels`, once or twice: meant for tensors on the host. Raises ValueError for shapes that
    do not fit, a label or id outside [0, V), a duplicate id in a row, a tail although the ids cover all V tokens
    (forward), and a row whose reverse KL is infinite; each names the first such position.
    """
    if targets is None and gamma:
        raise ValueError(f"no targets, gamma {gamma}: pass targets, or gamma=0 for CE alone")
    check_targets(labels, targets, labels, "labels")
    live = (labels != ignore_index).nonzero()[:, 0]
    n = len(live)
    if targets is None:
        ids, log_weights = live.new_empty(n, 0), live.new_full((n, 1), NEG_INF, dtype=dtype)
    else:
        chosen = targets if n == len(labels) else targets.rows(live)
        ids, k = chosen.ids, chosen.ids.shape[1]
        log_weights = chosen.tail.new_empty(n, k + 1, dtype=dtype)
        log_weights[:, :k].copy_(chosen.logprobs).masked_fill_(ids == PADDING_ID, NEG_INF)
        log_weights[:, k].copy_(chosen.tail)
    found = LabelledRows(len(labels), live, labels[live].long(), ids, log_weights)
    _check_labels_and_ids(found, vocab)
    _check_divergence_is_finite(found, vocab, direction)
    return replace(found, ids=ids.int())


def _check_labels_and_ids(rows: LabelledRows, vocab: int) -> None:
    labels, ids = rows.labels, rows.ids
    ordered = _padding_last(ids)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != _after_any_id(ids))

    def outside(row: int) -> str:
        bad = ids[row][(ids[row] >= vocab) | (ids[row] < PADDING_ID)]
        return f"id {int(bad[0])}, outside the student's vocabulary of {vocab} tokens"

    _refuse(
        rows.live,
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


def _check_divergence_is_finite(rows: LabelledRows, vocab: int, direction: Direction) -> None:
    """Forward KL needs a token for the tail to lie on, reverse KL teacher weight on every token: where ids cover the
    vocabulary, there is nothing for a tail to stand for."""
    log_kept, log_tail = rows.log_weights[:, :-1], rows.log_weights[:, -1]
    kept = rows.ids >= 0
    covered = kept.sum(1) == vocab
    if direction == "forward":
        reason = f"ids for all {vocab} tokens and yet a tail; make its log-weight -inf"
        _refuse(rows.live, [(covered & (log_tail > NEG_INF), lambda _: reason)])
        return
    no_tail = "no tail, which reverse KL needs; use a scheme with a bucket, or forward KL"
    weightless = "an id of weight 0, for which reverse KL is infinite; drop the id"
    _refuse(
        rows.live,
        [
            (kept.any(1) & ~covered & (log_tail == NEG_INF), lambda _: no_tail),
            ((kept & (log_kept == NEG_INF)).any(1), lambda _: weightless),
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
