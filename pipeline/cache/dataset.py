"""The cache for a training loop of one's own: a map-style dataset, its batches by domain weights, and a collate.

data = CachedWindows("out/cache")
order = DomainBatches(data, batch_windows=8, steps=100, seed=0)
for interval in range(10):
    for batch in DataLoader(data, batch_sampler=order, collate_fn=collate):
        ...                                                       # 100 steps
    order.weights = rule(order.weights, student_ce, teacher_ce)   # pipeline.mixing
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ddk_pipe.pipeline.cache.reader import CacheReader
from ddk_pipe.pipeline.cache.windows import CachedWindow
from ddk_pipe.pipeline.mixing import DomainSampler, FloatArray, check_weights
from ddk_pipe.pipeline.models import positions_from
from ddk_pipe.pipeline.storage import open_folder
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets, stack
from ddk_pipe.pipeline.text import TRAIN


class Example(TypedDict):
    """One window. `labels` are aligned with the logits: position t is to predict `labels[t]`, which is token t+1."""

    input_ids: Tensor  # int64 [seq_len]
    # int64 [seq_len]: with them and use_cache=False a model keeps documents apart where the teacher did
    position_ids: Tensor
    labels: Tensor  # int64 [seq_len], -100 where there is none
    targets: SparseTargets  # of seq_len positions
    teacher_logprobs: Tensor  # float32 [seq_len], nats, of the label; NaN where there is none
    domain: int  # place in CachedWindows.domains


class Batch(TypedDict):
    """Windows together: [windows, seq_len], and the targets of windows * seq_len positions in that order."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    targets: SparseTargets
    teacher_logprobs: Tensor
    domain: Tensor  # int64 [windows]


class CachedWindows(Dataset[Example]):
    """All windows of one split of a cache, domain after domain; may be read from many workers.

    `cache` is a folder or a URL, `domains` a choice of its domains (all, if none is given), `temperature` one of the
    cache's. Raises DdkError if there is no such cache, domain or temperature, or if shards are missing; reading
    raises DdkError for damage.
    """

    def __init__(
        self,
        cache: str | Path,
        split: str = TRAIN,
        *,
        domains: Sequence[str] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.split = split
        self._place, self._temperature = (str(cache) if "://" in str(cache) else Path(cache)), temperature
        self._reader = CacheReader(open_folder(self._place), temperature)
        self.domains = list(domains if domains is not None else self._reader.spec.domains)
        self._reader.require_complete(self.domains)
        self.sizes = [self._reader.size(domain, split).windows for domain in self.domains]
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Example:
        domain, window = self.place(index)
        read = self._reader.read(self.domains[domain], self.split, window)
        return {
            "input_ids": torch.from_numpy(read.tokens),
            "position_ids": torch.from_numpy(_positions(read)),
            "labels": torch.from_numpy(read.labels),
            "targets": read.targets,
            "teacher_logprobs": torch.from_numpy(read.label_logprobs),
            "domain": domain,
        }

    def place(self, index: int) -> tuple[int, int]:
        """(domain, window in the domain) of an index; raises IndexError outside 0 .. len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.split} has {len(self)} windows, asked for {index}")
        domain = bisect.bisect_right(self._ends, index)
        return domain, index - (self._ends[domain] - self.sizes[domain])

    def index(self, domain: int, window: int) -> int:
        """The inverse of `place`."""
        return self._ends[domain] - self.sizes[domain] + window

    def teacher_ce(self, windows: int | None = None) -> FloatArray:
        """The teacher's CE of each domain, float64 [domains], nats per token, over its first `windows` (none: all)."""
        means = []
        for domain, size in enumerate(self.sizes):
            count = size if windows is None else min(size, windows)
            values = [self[self.index(domain, window)]["teacher_logprobs"] for window in range(count)]
            logprobs = torch.cat(values).double()
            means.append(-float(logprobs[~logprobs.isnan()].mean()))
        return np.array(means)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reader = CacheReader(open_folder(self._place), self._temperature)


class DomainBatches(Sampler[list[int]]):
    """Batches of indices, drawn by domain weights: each pass over it is the next interval of `steps` batches.

    `weights` (float64 [domains], uniform at first) are those of the next pass; set them between passes. The order is a
    pure function of (seed, weights of all passes), as in `ddk-pipe distill`. Raises ValueError as DomainSampler does.
    """

    def __init__(self, data: CachedWindows, *, batch_windows: int, steps: int, seed: int = 0) -> None:
        if batch_windows < 1 or steps < 1:
            raise ValueError(f"batch_windows {batch_windows}, steps {steps}: both must be at least 1")
        self._data, self._batch_windows, self._steps = data, batch_windows, steps
        self._sampler = DomainSampler(data.sizes, seed=seed)
        self._weights: FloatArray = np.full(len(data.sizes), 1 / len(data.sizes))

    @property
    def weights(self) -> FloatArray:
        return self._weights

    @weights.setter
    def weights(self, values: FloatArray) -> None:
        self._weights = check_weights(values, domains=len(self._data.sizes))

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        # A generator, which draws at its first batch: a DataLoader with workers asks for two and uses one.
        windows = self._steps * self._batch_windows
        order: NDArray[np.int64] = self._sampler.draw_interval(self._weights, windows)
        flat = [self._data.index(int(domain), int(window)) for domain, window in order]
        for start in range(0, windows, self._batch_windows):
            yield flat[start : start + self._batch_windows]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; between passes, with the weights."""
        return {**self._sampler.state_dict(), "weights": self._weights.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another stood; raises DdkError for other data or another seed."""
        self._sampler.load_state_dict(state)
        self.weights = np.array(state["weights"])


def _positions(window: CachedWindow) -> NDArray[np.int64]:
    """Of each token in its document, or in the window."""
    return np.arange(len(window.tokens)) if window.starts is None else positions_from(window.starts)


def collate(examples: list[Example]) -> Batch:
    """Windows as one batch; for DataLoader's `collate_fn`."""
    return {
        "input_ids": torch.stack([example["input_ids"] for example in examples]),
        "position_ids": torch.stack([example["position_ids"] for example in examples]),
        "labels": torch.stack([example["labels"] for example in examples]),
        "targets": stack([example["targets"] for example in examples]),
        "teacher_logprobs": torch.stack([example["teacher_logprobs"] for example in examples]),
        "domain": torch.tensor([example["domain"] for example in examples]),
    }


__all__ = ["NO_LABEL", "Batch", "CachedWindows", "DomainBatches", "Example", "collate"]
