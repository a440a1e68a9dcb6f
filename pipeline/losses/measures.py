"""How well a student predicts: CE, CE to the targets, agreement with the teacher, calibration; no gradients.

All are sums over the labelled positions of a batch, so that batches and ranks can be added up. Logits exist for one
chunk of positions at a time, [rows, V] float32.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets

CHUNK_BYTES = 32 * 2**20  # of logits
BINS = 15  # of confidence, equally wide: the usual number (Guo et al., arXiv 1706.04599)
SUMS = ("positions", "ce", "target_ce", "entropy", "agreement", "compared")
N_SUMS = len(SUMS) + 3 * BINS  # then per bin: positions, confidence, hits


@torch.no_grad()
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
    positions that have any.
    """
    total = torch.zeros(N_SUMS, dtype=torch.float64, device=hidden.device)
    live = (labels != NO_LABEL).nonzero()[:, 0]
    rows = max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    for part in torch.split(live, rows):
        logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        total += _chunk(logits, labels[part], targets.rows(part), temperature)
    return total


def _chunk(logits: Tensor, labels: Tensor, targets: SparseTargets, temperature: float) -> Tensor:
    log_q = logits.log_softmax(1)
    ce = -log_q.gather(1, labels[:, None]).sum()
    confidence, best = log_q.max(1)
    confidence, hit = confidence.exp().double(), (best == labels).double()
    log_t = log_q if temperature == 1 else (logits / temperature).log_softmax(1)
    target_ce = _target_ce(log_t, targets)
    speaks = (targets.ids >= 0).any(1) | (targets.tail > float("-inf"))
    agreement = 0.0
    if targets.ids.shape[1] and len(labels):
        heaviest = targets.ids.gather(1, targets.logprobs.argmax(1, keepdim=True))[:, 0]
        agreement = float((heaviest == best).sum())  # padding is -1: no token
    per_bin = sums_by_confidence(confidence, hit)
    sums = [
        float(len(labels)),
        float(ce),
        float(target_ce),
        target_entropy(targets),
        agreement,
        float(speaks.sum()),
    ]
    return torch.cat([torch.tensor(sums, dtype=torch.float64, device=logits.device), per_bin.flatten()])


def sums_by_confidence(confidence: Tensor, hit: Tensor) -> Tensor:
    """Positions, confidence and hits added up in bins of confidence, float64 [3, BINS]; both inputs float64 [N]."""
    # from below too: NaN, of a diverged student, becomes a negative number
    bins = (confidence * BINS).long().clamp_(0, BINS - 1)
    return torch.stack(
        [
            torch.zeros(BINS, dtype=torch.float64, device=confidence.device).index_add_(0, bins, values)
            for values in (torch.ones_like(confidence), confidence, hit)
        ]
    )


def target_entropy(targets: SparseTargets) -> float:
    """Sum over positions of -sum w log w, nats. KL plus this is the cross-entropy to the targets, which under a
    sampled scheme is what has a meaning: the KL's value contains the entropy of the draws."""
    entropy = torch.special.entr(targets.logprobs.double().exp()).sum()
    return float(entropy + torch.special.entr(targets.tail.double().exp()).sum())


def _target_ce(log_q: Tensor, targets: SparseTargets) -> Tensor:
    """Sum of the cross-entropy to the targets, nats: -sum w log q, the tail's term included."""
    kept = targets.ids >= 0
    at = targets.ids.long().clamp_min(0)
    picked = log_q.gather(1, at)
    weighted = torch.where(kept, targets.logprobs.double().exp() * picked.double(), 0.0)
    has_tail = targets.tail > float("-inf")
    total = -weighted.sum()
    if bool(has_tail.any()):
        row, slot = kept.nonzero(as_tuple=True)
        unkept = log_q.clone()
        unkept[row, at[row, slot]] = float("-inf")  # never 1 - sum: it cancels (DESIGN section 4)
        outside = unkept[has_tail].logsumexp(1)
        total = total - (targets.tail[has_tail].double().exp() * outside.double()).sum()
    return total


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
