"""How well a student predicts: CE, CE to the targets, agreement with the teacher, calibration; no gradients.

All are sums over the labelled positions of a batch, so that batches and ranks can be added up. Logits exist for one
chunk of positions at a time, [rows, V] float32.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_pipe.pipeline.losses.checks import check_layer, check_states
from ddk_pipe.pipeline.losses.rows import LabelledRows, labelled_rows
from ddk_pipe.pipeline.losses.terms import NEG_INF
from ddk_pipe.pipeline.targets import SparseTargets

# Of a chunk's logits, float32: on a CPU what stays in its cache, elsewhere enough that reading the output layer anew
# for each chunk does not count.
CHUNK_BYTES, DEVICE_CHUNK_BYTES = 32 * 2**20, 2**30
BINS = 15  # of confidence, equally wide: the usual number (Guo et al., arXiv 1706.04599)
SUMS = ("positions", "ce", "target_ce", "entropy", "agreement", "compared")
N_SUMS = len(SUMS) + 3 * BINS  # then per bin: positions, confidence, hits


def measure(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: SparseTargets,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """float64 [N_SUMS] of sums, to be added up and read by `summary`.

    hidden [N, d], weight [V, d], bias [V] or None, labels int64 [N] (-100: none), targets of the N positions at
    `temperature`. Agreement compares the student's most likely token with the heaviest id of the targets, at the
    positions that have any. Raises ValueError as `labelled_rows` does.
    """
    rows = labelled_rows(labels, targets, vocab=weight.shape[0], gamma=1.0)
    return measure_rows(hidden, weight, rows, bias=bias, softcap=softcap, temperature=temperature)


@torch.no_grad()
def measure_rows(
    hidden: Tensor,
    weight: Tensor,
    rows: LabelledRows,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`measure` of rows that were checked before, on the device of `hidden`, for which the host never waits.

    rows  `labelled_rows` of the N positions of `hidden`, on its device. Raises ValueError for shapes or devices that
          do not fit
    """
    check_states(hidden, rows.positions, rows.labels)
    check_layer(hidden, weight, bias)
    total = torch.zeros(N_SUMS, dtype=torch.float64, device=hidden.device)
    most = CHUNK_BYTES if hidden.device.type == "cpu" else DEVICE_CHUNK_BYTES
    size = max(1, most // (4 * weight.shape[0]))
    for start in range(0, len(rows), size):
        part = rows.rows(slice(start, start + size))
        states = hidden.index_select(0, part.live).to(weight.dtype)
        logits = torch.nn.functional.linear(states, weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        total += _chunk(logits, part, temperature)
    return total


def _chunk(logits: Tensor, rows: LabelledRows, temperature: float) -> Tensor:
    """The sums of one chunk, float64 [N_SUMS]; logits float32 [n, V], which are written over."""
    labels, ids = rows.labels, rows.ids
    log_q = logits.log_softmax(1)
    ce = -log_q.gather(1, labels[:, None]).sum()
    confidence, best = log_q.max(1)
    confidence, hit = confidence.exp().double(), (best == labels).double()
    log_t = log_q if temperature == 1 else logits.div_(temperature).log_softmax(1)
    log_kept, log_tail = rows.log_weights[:, :-1], rows.log_weights[:, -1]
    speaks = (ids >= 0).any(1) | (log_tail > NEG_INF)
    agreement = best.new_zeros(())
    if ids.shape[1]:
        heaviest = ids.gather(1, log_kept.argmax(1, keepdim=True))[:, 0]
        agreement = (heaviest == best).sum()  # padding is -1: no token
    sums = [
        torch.ones_like(labels).sum(),
        ce,
        _target_ce(log_t, rows),
        rows.entropy(),
        agreement,
        speaks.sum(),
    ]
    return torch.cat([torch.stack([x.double() for x in sums]), sums_by_confidence(confidence, hit).flatten()])


def sums_by_confidence(confidence: Tensor, hit: Tensor) -> Tensor:
    """Positions, confidence and hits added up in bins of confidence, float64 [3, BINS]; both inputs float64 [N]."""
    # from below too: NaN, of a diverged student, becomes a negative number
    bins = (confidence * BINS).long().clamp_(0, BINS - 1)
    here = bins[:, None] == torch.arange(BINS, device=bins.device)
    # Not index_add_, which adds up in any order on a GPU, nor a product, which would carry a NaN into all bins.
    values = (torch.ones_like(confidence), confidence, hit)
    return torch.stack([torch.where(here, x[:, None], 0.0).sum(0) for x in values])


def target_entropy(targets: SparseTargets) -> float:
    """Sum over positions of -sum w log w, nats. KL plus this is the cross-entropy to the targets, which under a
    sampled scheme is what has a meaning: the KL's value contains the entropy of the draws."""
    entropy = torch.special.entr(targets.logprobs.double().exp()).sum()
    return float(entropy + torch.special.entr(targets.tail.double().exp()).sum())


def _target_ce(log_q: Tensor, rows: LabelledRows) -> Tensor:
    """Sum of the cross-entropy to the targets, nats: -sum w log q, the tail's term included. log_q is written over."""
    kept, at = rows.ids >= 0, rows.ids.long().clamp_min(0)
    weights = rows.log_weights.double().exp()
    weighted = torch.where(kept, weights[:, :-1] * log_q.gather(1, at).double(), 0.0)
    # Never 1 - sum: it cancels (DESIGN section 4). The least of what is there and -inf is -inf, of what is there and
    # +inf what is there: padding leaves token 0 alone.
    gone = torch.where(kept, NEG_INF, -NEG_INF).to(log_q.dtype)
    outside = log_q.scatter_reduce_(1, at, gone, "amin").logsumexp(1).double()
    tail = weights[:, -1]
    return -weighted.sum() - torch.where(tail > 0, tail * outside, 0.0).sum()


def summary(sums: NDArray[np.float64], *, exact: bool) -> dict[str, float | None]:
    """Means of the sums [N_SUMS] that `measure` gave: student_ce, target_ce, kl (nats per token), teacher_agreement
    (share), calibration_error (ECE, share).

    `exact`: the targets are exact or have a bucket, so CE to them less their entropy is a KL; for drawn targets it
    is not (the draw's entropy is in it), and kl is None.
    """
    named = dict(zip(SUMS, sums[: len(SUMS)].tolist(), strict=True))
    positions = max(named["positions"], 1.0)
    compared = named["compared"]
    _, confidence, hits = sums[len(SUMS) :].reshape(3, BINS)
    return {
        "student_ce": named["ce"] / positions,
        "target_ce": named["target_ce"] / compared if compared else None,
        "kl": (named["target_ce"] - named["entropy"]) / compared if exact and compared else None,
        "teacher_agreement": named["agreement"] / compared if compared else None,
        "calibration_error": float(np.abs(confidence - hits).sum() / positions),
    }
