"""What selection hands on: SparseTargets, and beside them what their rounded weights no longer tell."""

from __future__ import annotations

from collections.abc import Callable
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

    def trimmed(self, width: int) -> Kept:
        """The first `width` columns: the others are padding."""
        targets = self.targets
        cut = SparseTargets(
            ids=targets.ids[:, :width], logprobs=targets.logprobs[:, :width], tail=targets.tail
        )
        return Kept(cut, self.head[:, :width], self.mass)


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

    def tensors(self) -> list[Tensor]:
        """All there is, in the order of `of_tensors`."""
        kept = [
            tensor
            for each in self.kept
            for tensor in (each.targets.ids, each.targets.logprobs, each.targets.tail, each.head, each.mass)
        ]
        return [self.label_logprobs, *kept]

    @classmethod
    def of_tensors(cls, tensors: list[Tensor]) -> Selected:
        """Inverse of tensors()."""
        label, *rest = tensors
        columns = zip(*(rest[part::5] for part in range(5)), strict=True)
        kept = (
            Kept(SparseTargets(ids=ids, logprobs=logprobs, tail=tail), head, mass)
            for ids, logprobs, tail, head, mass in columns
        )
        return cls(label, tuple(kept))

    def on_host(self) -> Selected:
        """The same in the host's memory, copied as one piece: each copy makes the host wait for the device."""
        if self.label_logprobs.device.type == "cpu":
            return self
        return Selected.of_tensors(as_one_piece(self.tensors(), lambda piece: piece.cpu()))


def join(parts: list[Selected]) -> Selected:
    """Selections of consecutive positions as one."""
    return Selected(
        torch.cat([part.label_logprobs for part in parts]),
        tuple(stack_kept(list(column)) for column in zip(*(part.kept for part in parts), strict=True)),
    )


def as_one_piece(tensors: list[Tensor], moved: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What `moved` makes of tensors whose bytes are handed to it as one, uint8 [bytes of all of them]."""
    # the widest types first: a view of bytes as numbers must begin at a multiple of their size
    order = sorted(range(len(tensors)), key=lambda index: -tensors[index].itemsize)
    pieces = [tensors[index].contiguous().view(-1).view(torch.uint8) for index in order]
    parts = torch.split(moved(torch.cat(pieces)), [len(piece) for piece in pieces])
    out = dict(zip(order, parts, strict=True))
    return [out[index].view(tensor.dtype).view(tensor.shape) for index, tensor in enumerate(tensors)]
