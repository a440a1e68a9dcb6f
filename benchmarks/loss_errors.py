"""Errors of the loss against float64 on the very operands it was given, beside eager PyTorch's in the same
dtype."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Row, goal, report
from loss_problem import RealProblem
from torch import Tensor

from ddk_pipe.pipeline.losses import linear_sparse_kd, sparse_kd_reference
from ddk_pipe.pipeline.targets import SparseTargets

POSITIONS = 256
# Of the gradient's relative norm, and of the sums. bfloat16's own rounding is 2^-9 = 2e-3 of a number.
BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3}
FLOOR = "float64 on logits"
SLACK = 0.01  # of the bound: by how much eager PyTorch may be better
Loss = Callable[[Tensor, Tensor, Tensor, SparseTargets], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> Tensor:
    return linear_sparse_kd(hidden, weight, labels, targets, gamma=1.0).total


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> Tensor:
    return sparse_kd_reference(hidden.double() @ weight.double().t(), labels, targets, gamma=1.0).total


def eager(hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> Tensor:
    """The equations in the operands' dtype, the tail by a masked log-sum-exp, which 1 - sum would spoil."""
    log_q = F.log_softmax(hidden @ weight.t(), 1)
    ids = targets.ids.long()
    kept = log_q.gather(1, ids)
    rest = log_q.scatter(1, ids, float("-inf")).logsumexp(1)
    log_w, log_tail = targets.logprobs.to(log_q.dtype), targets.tail.to(log_q.dtype)
    kl = (log_w.exp() * (log_w - kept)).sum() + (log_tail.exp() * (log_tail - rest)).sum()
    return kl - log_q.gather(1, labels[:, None]).sum()


def rounded_logits(hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> Tensor:
    """The truth on logits that a product in the operands' dtype gave: no method that forms those has less
    error."""
    return sparse_kd_reference(hidden @ weight.t(), labels, targets, gamma=1.0).total


def evaluate(loss: Loss, problem: RealProblem, dtype: torch.dtype) -> list[Tensor]:
    """total, dhidden, dweight on operands of dtype."""
    operands = [x.detach().to(dtype).requires_grad_() for x in (problem.hidden, problem.weight)]
    total = loss(operands[0], operands[1], problem.labels, problem.targets)
    return [total.detach(), *torch.autograd.grad(total, operands)]


def truth_of(problem: RealProblem, dtype: torch.dtype) -> list[Tensor]:
    """The same in float64, on the operands as dtype rounds them."""
    operands = [x.detach().to(dtype).double().requires_grad_() for x in (problem.hidden, problem.weight)]
    total = truth(operands[0], operands[1], problem.labels, problem.targets)
    return [total.detach(), *torch.autograd.grad(total, operands)]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def errors_part(arguments: argparse.Namespace) -> None:
    problem = RealProblem(POSITIONS)
    rows: list[Row] = []
    goals: list[Row] = []
    for dtype, bound in BOUNDS.items():
        want = truth_of(problem, dtype)
        name = str(dtype).removeprefix("torch.")
        worst = {}
        for method, loss in (("ours", ours), ("eager PyTorch", eager), (FLOOR, rounded_logits)):
            errors = [relative(a, b) for a, b in zip(evaluate(loss, problem, dtype), want, strict=True)]
            what = ("total_error", "dhidden_error", "dweight_error")
            rows.append({"name": f"{method}, {name}", **dict(zip(what, errors, strict=True))})
            worst[method] = errors
        goals += error_goals(name, worst["ours"], worst["eager PyTorch"], bound)
    shape = {"rows": POSITIONS, "vocab": len(problem.weight), "width": problem.weight.shape[1]}
    report(rows, goals, arguments.json, part="errors", shape=shape, inputs="SmolLM2-135M on Python sources")


def error_goals(name: str, mine: list[float], eager: list[float], bound: float) -> list[Row]:
    slack = SLACK * bound
    excess = max(a - b for a, b in zip(mine, eager, strict=True))
    return [
        goal(
            f"{name}: largest relative error against float64", f"<= {bound:g}", max(mine), max(mine) <= bound
        ),
        goal(f"{name}: error less eager PyTorch's", f"<= {slack:g}", excess, excess <= slack),
    ]
