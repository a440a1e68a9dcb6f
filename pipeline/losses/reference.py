"""Cross-entropy plus a KL to sparse teacher targets, dense and in float64: the truth the kernels are tested against.

K kept ids of a position, T temperature. With student logits z, q = softmax(z), s = softmax(z / T), teacher weights w
on the ids and w_tail on "every other token" (SparseTargets), DESIGN section 4 reads, at a position with label y:

    CE      = -log q[y]
    forward = sum_K w (log w - log s) + w_tail (log w_tail - log s_tail)      KL(teacher || student)
    reverse = sum_K s (log s - log w) + s_tail (log s_tail - log w_tail)      KL(student || teacher)
    total   = sum over labelled positions of CE + gamma T^2 KL

All is a sum over labelled positions and never a mean; divide by `SparseKdLoss.positions`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses.checks import check_shapes
from ddk_pipe.pipeline.losses.rows import LabelledRows, labelled_rows
from ddk_pipe.pipeline.losses.terms import NEG_INF, Direction, SparseKdLoss, Terms
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets


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
    terms = Terms(gamma, temperature, direction)
    check_shapes(logits, "logits", "V", labels, targets)
    rows = labelled_rows(
        labels,
        targets,
        vocab=logits.shape[1],
        gamma=gamma,
        direction=direction,
        ignore_index=ignore_index,
        dtype=torch.float64,
    )
    z = logits.double()[rows.live]
    ce = -torch.log_softmax(z, 1).gather(1, rows.labels[:, None]).sum()
    kl = _reference_kl(torch.log_softmax(z / temperature, 1), rows, direction)
    return SparseKdLoss(terms.total(ce, kl), ce, kl, len(rows))


def _reference_kl(log_student: Tensor, rows: LabelledRows, direction: Direction) -> Tensor:
    """log_student [n, V] float64 -> the KL over the classes "each id" and "the tail", summed."""
    row, slot = (rows.ids >= 0).nonzero(as_tuple=True)
    token = rows.ids[row, slot].long()
    kept = torch.zeros_like(log_student, dtype=torch.bool)
    kept[row, token] = True
    log_tail = rows.log_weights[:, -1]
    has_tail = (log_tail > NEG_INF) & ~kept.all(1)
    outside = log_student[has_tail].masked_fill(kept[has_tail], NEG_INF).logsumexp(1)
    student = torch.cat([log_student[row, token], outside])
    teacher = torch.cat([rows.log_weights[row, slot], log_tail[has_tail]])
    if direction == "forward":
        return _relative_entropy(teacher, student)
    return _relative_entropy(student, teacher)


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q), where 0 log 0 = 0."""
    some = log_p > NEG_INF
    return (log_p[some].exp() * (log_p[some] - log_q[some])).sum()
