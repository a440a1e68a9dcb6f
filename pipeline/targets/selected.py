"""What selection hands on: SparseTargets, and beside them what their rounded weights no longer tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddk_pipe.pipeline.targets.sparse import SparseTargets, stack


@dataclass(frozen=True)
class Kept:
    """What is kept of N distributions at one temperature: targets [N, K], and how each weight came about.

    head bool [N, K]: the id has a weight of its own; False: it is a draw, one of those that share `mass` equally (or
    padding). mass float64 [N]: what those draws weigh together, 0 without any; of the weights, which sum to 1.
    """

    targets: SparseTargets
    head: Tensor
    mass: Tensor

    @classmethod
    def exact(cls, targets: SparseTargets) -> Kept:
        """Targets whose every id has a weight of its own."""
        mass = torch.zeros(targets.positions, dtype=torch.float64, device=targets.ids.device)
        return cls(targets, targets.ids >= 0, mass)

    def rows(self, index: slice | Tensor) -> Kept:
        """The positions that `index` selects, in its order."""
        return Kept(self.targets.rows(index), self.head[index], self.mass[index])

    def to(self, device: torch.device | str) -> Kept:
        """The same on another device."""
        return Kept(self.targets.to(device), self.head.to(device), self.mass.to(device))


def stack_kept(parts: list[Kept]) -> Kept:
    """All positions in order; rows are padded to the widest K."""
    targets = stack([part.targets for part in parts])
    width = targets.ids.shape[1]
    heads = [torch.nn.functional.pad(part.head, (0, width - part.head.shape[1])) for part in parts]
    return Kept(targets, torch.cat(heads), torch.cat([part.mass for part in parts]))


@dataclass(frozen=True)
class Selected:
    """What the cache keeps of N positions: label_logprobs float32 [N] in nats at T = 1 (NaN without a label),
    and what is kept at each temperature of the plan."""

    label_logprobs: Tensor
    kept: tuple[Kept, ...]

    @property
    def targets(self) -> tuple[SparseTargets, ...]:
        """One for each temperature."""
        return tuple(kept.targets for kept in self.kept)

    def rows(self, index: slice) -> Selected:
        return Selected(self.label_logprobs[index], tuple(kept.rows(index) for kept in self.kept))

    def to(self, device: torch.device | str) -> Selected:
        """The same on another device."""
        return Selected(self.label_logprobs.to(device), tuple(kept.to(device) for kept in self.kept))


def join(parts: list[Selected]) -> Selected:
    """Selections of consecutive positions as one."""
    return Selected(
        torch.cat([part.label_logprobs for part in parts]),
        tuple(stack_kept(list(column)) for column in zip(*(part.kept for part in parts), strict=True)),
    )
