"""What a loss over sparse targets refuses: shapes and devices that do not fit, and rows that have no finite loss.

What is wrong with a row is said with the first position where it is. What the options may be, `Terms` knows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip
from ddk_pipe.pipeline.losses.terms import NEG_INF, Batch, Direction, Terms
from ddk_pipe.pipeline.targets import PADDING_ID, SparseTargets


def labelled(
    labels: Tensor,
    targets: SparseTargets | None,
    vocab: int,
    terms: Terms,
    ignore_index: int,
    dtype: torch.dtype,
) -> Batch:
    """The positions that have a label, with weights in `dtype`; the others are not looked at.

    Raises ValueError naming the first position that is wrong.
    """
    if targets is None and terms.gamma:
        raise ValueError(f"no targets, gamma {terms.gamma}: pass targets, or gamma=0 for CE alone")
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
    batch = Batch(live, labels[live].long(), ids, log_weights)
    _check_labels_and_ids(batch, vocab)
    _check_divergence_is_finite(batch, vocab, terms.direction)
    return batch


def _check_labels_and_ids(batch: Batch, vocab: int) -> None:
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


def _check_divergence_is_finite(batch: Batch, vocab: int, direction: Direction) -> None:
    """Forward KL needs a token for the tail to lie on, reverse KL teacher weight on every token: where ids cover the
    vocabulary, there is nothing for a tail to stand for."""
    log_kept, log_tail = batch.log_weights[:, :-1], batch.log_weights[:, -1]
    kept = batch.ids >= 0
    covered = kept.sum(1) == vocab
    if direction == "forward":
        reason = f"ids for all {vocab} tokens and yet a tail; make its log-weight -inf"
        _refuse(batch.live, [(covered & (log_tail > NEG_INF), lambda _: reason)])
        return
    no_tail = "no tail, which reverse KL needs; use a scheme with a bucket, or forward KL"
    weightless = "an id of weight 0, for which reverse KL is infinite; drop the id"
    _refuse(
        batch.live,
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


def check_implementation(
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


def check_shapes(
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


def check_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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
