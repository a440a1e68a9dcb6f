"""CE plus KL to the teacher's whole distribution: what online distillation pays at every step.

The baseline beside `losses.linear_sparse_kd`, same equations with every token kept. Logits of student and teacher
exist for one chunk of positions at a time and are formed again in the backward pass (activation checkpointing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ddk_pipe.pipeline.losses.terms import Direction, SparseKdLoss
from ddk_pipe.pipeline.targets import NO_LABEL

CHUNK_BYTES = 32 * 2**20  # of one model's logits on a CPU
DEVICE_CHUNK_BYTES = 2**29


@dataclass(frozen=True)
class DenseTargets:
    """A teacher's last hidden states [N, d_T] and its way from rows of them to logits [rows, V_T].

    V_T may be smaller than the student's vocabulary: the teacher gives the rest no mass.
    """

    states: Tensor
    logits: Callable[[Tensor], Tensor]
    vocab_size: int


def linear_dense_kd(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: DenseTargets,
    *,
    gamma: float,
    temperature: float = 1.0,
    direction: Direction = "forward",
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> SparseKdLoss:
    """Sums over labelled positions of CE + gamma T^2 KL, as `linear_sparse_kd`; `kl` here is a true KL, nats.

    hidden [N, d], weight [V, d], bias [V] or None, labels int64 [N] (-100: none). Reverse KL compares over the
    teacher's vocabulary only, where it has mass.
    """
    live = (labels != NO_LABEL).nonzero()[:, 0]
    ce, kl = hidden.new_zeros(2, dtype=torch.float32)
    most = CHUNK_BYTES if hidden.device.type == "cpu" else DEVICE_CHUNK_BYTES
    rows = max(1, most // (4 * weight.shape[0]))

    def chunk(h: Tensor, w: Tensor, b: Tensor | None, states: Tensor, wanted: Tensor) -> Tensor:
        z = torch.nn.functional.linear(h.to(w.dtype), w, b).float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        with torch.no_grad():
            log_p = (targets.logits(states).float() / temperature).log_softmax(1)
        log_q = z.log_softmax(1)
        own_ce = -log_q.gather(1, wanted[:, None]).sum()
        log_s = log_q if temperature == 1 else (z / temperature).log_softmax(1)
        log_s = log_s[:, : log_p.shape[1]]
        if direction == "forward":
            own_kl = torch.nn.functional.kl_div(log_s, log_p, reduction="sum", log_target=True)
        else:
            own_kl = torch.nn.functional.kl_div(log_p, log_s, reduction="sum", log_target=True)
        return torch.stack([own_ce, own_kl])

    for part in torch.split(live, rows):
        both = checkpoint(
            chunk, hidden[part], weight, bias, targets.states[part], labels[part], use_reentrant=False
        )
        ce, kl = ce + both[0], kl + both[1]
    total = ce + gamma * temperature**2 * kl if gamma else ce + 0
    return SparseKdLoss(total, ce.detach(), kl.detach(), len(live))
