"""Cases of losses over sparse targets, the truth of them written separately, and what equals what.

Errors are relative norms. Bounds: 1e-12 in float64, 2e-6 in float32 (facts/kernels.md section 7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddk_pipe.pipeline.losses import SparseKdLoss, linear_sparse_kd, sparse_kd_reference
from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

NEG_INF = float("-inf")
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}
BUCKETS = ("threshold", "topk")  # the schemes whose rest is one bucket
SCHEMES = ("pps", *BUCKETS, "random")


@dataclass(frozen=True)
class Case:
    """hidden [N, d], weight [V, d], bias [V], labels [N] and targets of N positions."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    targets: SparseTargets

    @property
    def logits(self) -> Tensor:
        return F.linear(self.hidden, self.weight, self.bias)


def draw_targets(scheme: str, teacher: Tensor, k: int, gen: torch.Generator) -> SparseTargets:
    """Targets of the shape of each scheme, from dense teacher probabilities [N, V] in float64."""
    rows = [_draw_row(scheme, p, k, gen) for p in teacher]
    return targets_of(rows)


def targets_of(rows: list[tuple[dict[int, float], float]]) -> SparseTargets:
    """Rows of ({id: weight}, tail weight)."""
    width = max((len(weights) for weights, _ in rows), default=0)
    ids = torch.full((len(rows), width), PADDING_ID, dtype=torch.int32)
    log_weights = torch.full((len(rows), width), NEG_INF)
    for i, (weights, _) in enumerate(rows):
        for j, (token, weight) in enumerate(sorted(weights.items())):
            ids[i, j], log_weights[i, j] = token, math.log(weight) if weight else NEG_INF
    tail = torch.tensor([math.log(t) if t else NEG_INF for _, t in rows], dtype=torch.float32)
    return SparseTargets(ids=ids, logprobs=log_weights, tail=tail)


def _draw_row(scheme: str, p: Tensor, k: int, gen: torch.Generator) -> tuple[dict[int, float], float]:
    if scheme == "random":
        draws = torch.multinomial(p, k, replacement=True, generator=gen)
        return {i: draws.tolist().count(i) / k for i in draws.tolist()}, 0.0
    if scheme == "topk":
        head = p.topk(k).indices
    else:
        head = (p >= 0.05).nonzero()[: len(p) - 1, 0]  # ragged; never all, a bucket needs the rest
    weights = {int(i): float(p[i]) for i in head}
    rest = max(1 - sum(weights.values()), 0.0)
    if scheme in BUCKETS:
        return weights, rest
    others = [i for i in range(len(p)) if i not in weights]
    chosen = torch.randperm(len(others), generator=gen)[:3]
    return weights | {others[int(i)]: rest / len(chosen) for i in chosen}, 0.0


def make_case(
    scheme: str = "topk",
    *,
    n: int = 23,
    vocab: int = 97,
    d: int = 13,
    k: int = 5,
    seed: int = 0,
    scale: float = 1.0,
) -> Case:
    """Ragged in every size: 23 positions in chunks of 5, labels missing, inside and outside the ids."""
    gen = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(r, d, dtype=torch.float64, generator=gen) for r in (n, vocab))
    bias = torch.randn(vocab, dtype=torch.float64, generator=gen)
    teacher = torch.randn(n, vocab, dtype=torch.float64, generator=gen).mul_(2).softmax(1)
    targets = draw_targets(scheme, teacher, k, gen)
    labels = torch.randint(0, vocab, (n,), generator=gen)
    for i in range(0, n, 2):
        if targets.ids[i].numel() and targets.ids[i, 0] >= 0:
            labels[i] = int(targets.ids[i, 0])  # inside the ids
    labels[1::5] = NO_LABEL
    return Case(hidden, weight * scale, bias, labels, targets)


def one_hot_loss(
    logits: Tensor, case: Case, gamma: float, temperature: float, direction: str
) -> tuple[Tensor, Tensor]:
    """CE and KL sums with plain loops over positions: no gather, no padding, no log-sum-exp trick."""
    ce = kl = logits.new_zeros(())
    for i, y in enumerate(case.labels.tolist()):
        if y == NO_LABEL:
            continue
        ce = ce - torch.log(torch.exp(logits[i]) / torch.exp(logits[i]).sum())[y]
        s = torch.exp(logits[i] / temperature) / torch.exp(logits[i] / temperature).sum()
        classes: list[tuple[Tensor, float]] = []  # (student, teacher)
        outside = torch.ones_like(s)
        for token, log_w in zip(case.targets.ids[i], case.targets.logprobs[i], strict=True):
            if int(token) != PADDING_ID:
                classes.append((s[int(token)], math.exp(float(log_w))))
                outside = outside * (1 - F.one_hot(token.long(), len(s)))
        if float(case.targets.tail[i]) > NEG_INF:
            classes.append(((s * outside).sum(), math.exp(float(case.targets.tail[i]))))
        for student, teacher in classes:
            if direction == "forward":
                kl = kl + (teacher * (math.log(teacher) - student.log()) if teacher else 0)
            else:
                kl = kl + student * (student.log() - math.log(teacher))
    return ce, kl


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm()) / max(float(want.norm()), 1e-300)


def logit_gradient(case: Case, **options: Any) -> tuple[SparseKdLoss, Tensor]:
    z = case.logits.clone().requires_grad_()
    loss = sparse_kd_reference(z, case.labels, case.targets, **options)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    return loss, z.grad


def linear(
    case: Case, dtype: torch.dtype = torch.float64, upstream: float = 1.0, **options: Any
) -> tuple[SparseKdLoss, list[Tensor]]:
    """The chunked loss in dtype and the gradients of hidden, weight and bias."""
    inputs = [x.detach().to(dtype).clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = linear_sparse_kd(inputs[0], inputs[1], case.labels, case.targets, bias=inputs[2], **options)
    return loss, list(torch.autograd.grad(loss.total * upstream, inputs))


def dense(case: Case, upstream: float = 1.0, **options: Any) -> tuple[SparseKdLoss, list[Tensor]]:
    """What `linear` must equal: the reference on dense float64 logits."""
    inputs = [x.detach().double().clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = sparse_kd_reference(F.linear(*inputs), case.labels, case.targets, **options)
    return loss, list(torch.autograd.grad(loss.total * upstream, inputs))


def assert_equals_reference(
    case: Case,
    dtype: torch.dtype = torch.float64,
    bound: float | None = None,
    **options: Any,
) -> None:
    bound = BOUND[dtype] if bound is None else bound
    want, want_gradients = dense(replaced(case, dtype), **options)
    got, got_gradients = linear(case, dtype, **options)
    assert got.positions == want.positions
    for name in ("total", "ce", "kl"):
        assert relative(getattr(got, name), getattr(want, name)) <= bound, name
    for name, mine, true in zip(("hidden", "weight", "bias"), got_gradients, want_gradients, strict=True):
        assert mine.isfinite().all(), name
        assert relative(mine, true) <= bound, name


def replaced(case: Case, dtype: torch.dtype) -> Case:
    """The numbers that a computation in dtype is given, so that only its own error is measured."""
    rounded = {f: getattr(case, f).to(dtype).double() for f in ("hidden", "weight", "bias")}
    return replace(case, **rounded)


def ignored(case: Case) -> Case:
    return replace(case, labels=torch.full_like(case.labels, NO_LABEL))
