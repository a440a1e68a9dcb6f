"""What a loss over sparse targets computes on, checked, and what it gives: of the reference and the chunked loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ddk_pipe.pipeline.losses.gradient_skip import GradientSkip

Direction = Literal["forward", "reverse"]
NEG_INF = float("-inf")


class SparseKdLoss(NamedTuple):
    """Sums over the labelled positions, in nats: divide by `positions` for means.

    A named tuple and no dataclass: wrappers look for tensors in a forward's output, and DDP with
    static_graph=True passes over a dataclass and then reduces no gradient, without an error.

    total  [] = ce + gamma T^2 kl; differentiable
    ce     [] cross-entropy to the labels
    kl     [] KL at the temperature, without the factor gamma T^2. For sampled targets it has the
              draw's own entropy in it, so it is no distance (DESIGN section 4)
    positions  number of labelled positions
    """

    total: Tensor
    ce: Tensor
    kl: Tensor
    positions: int


@dataclass(frozen=True)
class Terms:
    """What is summed: the options that change the mathematics. Raises ValueError if impossible."""

    gamma: float
    temperature: float
    direction: Direction
    by_triton: bool = False
    softcap: float | None = None
    skip: GradientSkip | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma {self.gamma}: expected a finite number >= 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature {self.temperature}: expected a finite number > 0")
        if self.direction not in ("forward", "reverse"):
            raise ValueError(f'direction {self.direction!r}: expected "forward" or "reverse"')
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap {self.softcap}: expected a finite number > 0, or None")

    def total(self, ce: Tensor, kl: Tensor) -> Tensor:
        """ce + gamma T^2 kl; an infinite kl does not matter where gamma is 0."""
        return ce + self.gamma * self.temperature**2 * kl if self.gamma else ce + 0
