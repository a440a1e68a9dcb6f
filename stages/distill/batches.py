"""Micro batches: windows stacked and checked on the host, where nothing waits for it, then copied beside the step before.

Checks belong here: on the device each would make the host wait for all the work it has queued there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.losses import DenseTargets, Direction, LabelledRows, labelled_rows
from ddk_pipe.pipeline.models import Documents, stack_starts
from ddk_pipe.pipeline.targets import stack
from ddk_pipe.stages.distill.students import DistillStudent


@dataclass(frozen=True)
class Batch:
    """Some windows.

    tokens, labels  int64 [windows, seq_len]
    rows     the labelled positions with their sparse targets
    entropy  of those targets, nats, summed over the rows; NaN where there are none. KL plus this is the cross-entropy
             to the targets
    documents  where they lie in the windows; None where each window is seen whole
    dense    the whole distribution of a teacher in memory, in place of the rows' targets
    """

    tokens: Tensor
    labels: Tensor
    rows: LabelledRows
    entropy: float
    documents: Documents | None = None
    dense: DenseTargets | None = None

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """The same on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            labels=self.labels.to(device, non_blocking=non_blocking),
            rows=self.rows.to(device, non_blocking=non_blocking),
            documents=self.documents and self.documents.to(device, non_blocking=non_blocking),
        )

    def pinned(self) -> Batch:
        """The same in memory that a GPU reads by itself."""
        return replace(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            rows=self.rows.pin_memory(),
            documents=self.documents and self.documents.pin_memory(),
        )

    def tensors(self) -> list[Tensor]:
        """All that lies on the device."""
        of_rows: list[Any] = [getattr(self.rows, field.name) for field in fields(self.rows)]
        if self.documents is not None:
            of_rows += [self.documents.positions, self.documents.numbers]
        return [self.tokens, self.labels, *(value for value in of_rows if isinstance(value, Tensor))]


@dataclass(frozen=True)
class StepData:
    """What one step trains on."""

    batches: list[Batch]  # this process's, on the host
    names: NDArray[np.int64]  # their windows: (domain, window), int64 [windows, 2]
    digest: str  # of the (domain, window) list of all processes: the record shows that the order was the same
    waited_seconds: float


@dataclass(frozen=True)
class BatchMaker:
    """Makes batches for a student whose output layer has `vocab` rows of `dtype`.

    direction  of the KL that the targets are for: what they must not lack depends on it
    sparse     False leaves the windows' targets out, where a teacher in memory gives the whole distribution
    pin        for a student on a GPU
    """

    vocab: int
    dtype: torch.dtype
    direction: Direction = "forward"
    sparse: bool = True
    pin: bool = False

    @classmethod
    def of(cls, student: DistillStudent, **options: Any) -> BatchMaker:
        """For this student."""
        head = student.lm.get_output_embeddings().weight
        return cls(head.shape[0], head.dtype, **options)

    def __call__(self, windows: Sequence[CachedWindow]) -> Batch:
        """On the host; called from several threads. Raises ValueError for labels or ids the student does not have."""
        labels = torch.from_numpy(np.stack([window.labels for window in windows]))
        rows = labelled_rows(
            labels.flatten(),
            stack([window.targets for window in windows]) if self.sparse else None,
            vocab=self.vocab,
            gamma=0.0,
            direction=self.direction,
            dtype=torch.float64 if self.dtype == torch.float64 else torch.float32,
        )
        tokens = torch.from_numpy(np.stack([window.tokens for window in windows]))
        documents = Documents.of(stack_starts([window.starts for window in windows], tokens.shape[1]))
        batch = Batch(tokens, labels, rows, float(rows.entropy()) if self.sparse else math.nan, documents)
        return batch.pinned() if self.pin else batch


class Copier:
    """Copies batches to the device, on a GPU by a stream of its own: the copy runs beside the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """Returns at once; work queued on the current stream from here on waits for the copy."""
        if self._stream is None:
            return batch.to(self.device)
        with self._stream:
            copied = batch.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in copied.tensors():
            tensor.record_stream(current)  # else the copying stream could reuse their memory too early
        return copied
