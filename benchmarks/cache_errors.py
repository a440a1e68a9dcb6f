"""How far decoded targets are from the distribution they stand for, without a student.

Under a forward KL the gradient of the logits is s - w, so w - p is the error that targets w make in it, whatever the
student s. A bucket's gradient depends on the student inside the bucket; here the bucket's mass is spread as the
domain's token frequencies have it, which is what a student that knows no more would do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ddk_pipe.pipeline.targets import SparseTargets

RARE = 1e-12  # p below counts as this in the weights


@dataclass
class Errors:
    """Sums over dense positions, several independent draws of each.

    squares[name]: per position, the mean over the draws of the (weighted) squared error; common[name]: per position,
    the mean over pairs of draws of the product of their errors, an unbiased estimate of the square of the bias.
    """

    squares: dict[str, list[Tensor]] = field(default_factory=dict)
    common: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, p: Tensor, draws: list[SparseTargets], head: Tensor | None, spread: Tensor) -> None:
        """p float32 [n, V]; draws: decoded targets of the same n positions; head [V, d]; spread [V], of a bucket."""
        total = torch.zeros_like(p)
        each = []
        for targets in draws:
            error = dense(targets, spread).sub_(p)
            total += error
            each.append(_energies(error, p, head))
        pairs = max(len(draws) * (len(draws) - 1), 1)
        for name, whole in _energies(total, p, head).items():
            squares = torch.stack([energies[name] for energies in each]).sum(0)
            self.squares.setdefault(name, []).append(squares / len(draws))
            self.common.setdefault(name, []).append((whole - squares) / pairs if len(draws) > 1 else squares)

    def mean(self, name: str) -> float:
        """Mean squared error."""
        return float(torch.cat(self.squares[name]).mean())

    def bias(self, name: str) -> tuple[float, float]:
        """Mean squared bias of a position, and its standard error."""
        values = torch.cat(self.common[name])
        return float(values.mean()), float(values.std() / len(values) ** 0.5)


def _energies(error: Tensor, p: Tensor, head: Tensor | None) -> dict[str, Tensor]:
    """Of each row of `error`: its square, plain and weighted by p^-0.25 and p^-0.5, and the square
    of what reaches the hidden states, after multiplication with the output layer."""
    square = error.square()
    root = p.clamp_min(RARE).sqrt_()
    found = {"variance": square.sum(1), "variance_p50": (square / root).sum(1)}
    found["variance_p25"] = square.div_(root.sqrt_()).sum(1)
    if head is not None:
        found["variance_head"] = (error @ head).square().sum(1)
    return {name: value.double() for name, value in found.items()}


def dense(targets: SparseTargets, spread: Tensor) -> Tensor:
    """Weights [n, V]; the tail is spread over the tokens that are not kept in proportion to `spread`."""
    row, slot = (targets.ids >= 0).nonzero(as_tuple=True)
    ids = targets.ids[row, slot].long()
    out = torch.zeros(targets.positions, len(spread))
    tail = targets.tail.exp()
    if bool((tail > 0).any()):
        kept = torch.zeros(targets.positions).index_add_(0, row, spread[ids])
        out += spread * (tail / (1 - kept))[:, None]
    out[row, ids] = targets.logprobs[row, slot].exp()
    return out


def coding_kl(before: SparseTargets, after: SparseTargets) -> np.ndarray:
    """KL(kept + tail || decoded kept + tail) of each position, nats, float64 [n]; the same ids on both sides."""
    if not torch.equal(before.ids, after.ids):
        raise ValueError("decoded ids differ")

    def part(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        return torch.where(a > float("-inf"), a.exp() * (a - b), 0.0)

    kl = part(before.logprobs, after.logprobs).sum(1) + part(before.tail, after.tail)
    result: np.ndarray = kl.numpy()
    return result
