"""SparseTargets: the one value that flows from the teacher to the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING_ID = -1  # never 0: id 0 is a real token
NO_LABEL = -100  # the ignore_index of torch's own cross-entropy


@dataclass(frozen=True)
class SparseTargets:
    """Teacher distributions of N positions, each thinned to at most K tokens and an optional tail bucket.

    ids      int32   [N, K]  teacher token ids, ascending, unique in a row; padding is -1, last in a row
    logprobs float32 [N, K]  natural log of the weight of each id; padding is -inf
    tail     float32 [N]     natural log of the residual weight given to "every other token"; -inf: none

    The weights of a row and its tail sum to 1. A row without any entry and without a tail says nothing
    (a position without loss). The tail is kept in log space because 1 - sum(weights) cancels when the
    kept mass is close to 1.
    """

    ids: Tensor
    logprobs: Tensor
    tail: Tensor

    @property
    def positions(self) -> int:
        """N, the number of positions."""
        return int(self.ids.shape[0])

    def rows(self, index: slice | Tensor) -> SparseTargets:
        """The positions that `index` selects, in its order."""
        return SparseTargets(ids=self.ids[index], logprobs=self.logprobs[index], tail=self.tail[index])

    def renormalised(self) -> SparseTargets:
        """Without the tail: the weights of a row scaled to sum 1. Says that all other tokens have probability 0.

        What MaxText and ms-swift do with a top-k cache (docs/peers.md). A row without an entry stays silent.
        """
        scaled = self.logprobs - self.logprobs.logsumexp(1, keepdim=True)
        return SparseTargets(
            ids=self.ids,
            logprobs=torch.where(self.ids >= 0, scaled, float("-inf")),
            tail=torch.full_like(self.tail, float("-inf")),
        )

    def to(self, device: torch.device | str) -> SparseTargets:
        """The same targets on another device."""
        return SparseTargets(
            ids=self.ids.to(device), logprobs=self.logprobs.to(device), tail=self.tail.to(device)
        )

    def validate(self, vocab_size: int | None = None) -> None:
        """Check the invariants above; raises ValueError naming the one that fails and its first position."""
        if (
            self.ids.ndim != 2
            or self.ids.shape != self.logprobs.shape
            or self.tail.shape != self.ids.shape[:1]
        ):
            raise ValueError(
                f"shapes {tuple(self.ids.shape)}, {tuple(self.logprobs.shape)}, {tuple(self.tail.shape)}:"
                " expected [N, K], [N, K], [N]"
            )
        kept = self.ids >= 0
        _check(self.ids < PADDING_ID, "an id below -1")
        if vocab_size is not None:
            _check(self.ids >= vocab_size, f"an id outside the vocabulary of {vocab_size}")
        both = kept[:, 1:] & kept[:, :-1]
        _check(both & (self.ids[:, 1:] == self.ids[:, :-1]), "a duplicate id")
        _check(both & (self.ids[:, 1:] < self.ids[:, :-1]), "ids that do not ascend")
        _check(kept[:, 1:] & ~kept[:, :-1], "padding before an id")
        _check(~kept & (self.logprobs != float("-inf")), "padding whose log-weight is not -inf")
        _check(
            torch.isnan(self.logprobs) | (self.logprobs == float("inf")), "a log-weight that is not a number"
        )
        total = self.logprobs.double().exp().sum(1) + self.tail.double().exp()
        speaks = kept.any(1) | (self.tail > float("-inf"))
        _check((speaks & ((total - 1).abs() > 1e-4))[:, None], "weights and tail that do not sum to 1")


def _check(bad: Tensor, what: str) -> None:
    if bad.any():
        position = int(bad.any(1).nonzero()[0, 0])
        raise ValueError(f"position {position} holds {what}")


def stack(parts: list[SparseTargets]) -> SparseTargets:
    """One SparseTargets of all positions in order; rows are padded to the widest K."""
    width = max((part.ids.shape[1] for part in parts), default=0)

    def padded(values: Tensor, fill: float) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    return SparseTargets(
        ids=torch.cat([padded(part.ids, PADDING_ID) for part in parts]),
        logprobs=torch.cat([padded(part.logprobs, float("-inf")) for part in parts]),
        tail=torch.cat([part.tail for part in parts]),
    )
