"""How far the student is behind the teacher: every domain's validation windows, shared among the processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import N_SUMS, summary
from ddk_pipe.pipeline.manifest import Project, windows_per_domain
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.stages.distill.batches import BatchMaker
from ddk_pipe.stages.distill.sources import Source, teacher_ce
from ddk_pipe.stages.distill.world import Wrapped

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What one validation found: a dictionary of means per domain (`pipeline.losses.summary`)."""

    domains: list[dict[str, float | None]]

    @property
    def student_ce(self) -> FloatArray:
        """Nats per token, float64 [domains]."""
        return np.array([domain["student_ce"] for domain in self.domains], dtype=np.float64)


class Validation:
    """The validation windows of every domain, and the teacher's CE on them (float64 [domains], nats per token)."""

    def __init__(
        self, project: Project, source: Source, wrapped: Wrapped, autocast: Callable[[], Any]
    ) -> None:
        self.options, self.wrapped, self.autocast = project.manifest.distill, wrapped, autocast
        self.domains, self.exact = list(project.manifest.domains), source.exact
        self.make_batch = BatchMaker.of(wrapped.student)
        self.device = next(wrapped.student.parameters()).device
        most = windows_per_domain(self.options, project.manifest.seq_len, len(self.domains))
        self.windows = [source.validation(index, most) for index in range(len(self.domains))]
        for domain, windows in zip(self.domains, self.windows, strict=True):
            if not any((window.labels != NO_LABEL).any() for window in windows):
                raise DdkError(
                    f"{domain}/validation: no window with a label, so there is no gap to weigh the domain by",
                    hint="give the domain more text, or name validation files for it",
                )
        self.teacher_ce = np.array([teacher_ce(windows) for windows in self.windows])

    @torch.no_grad()
    def run(self) -> Outcome:
        """Measure the student as it is now. Raises DdkError if its CE on a domain is not finite."""
        self.wrapped.module.eval()
        sums = np.stack([self._domain(windows) for windows in self.windows])
        self.wrapped.reshard()
        self.wrapped.module.train()
        outcome = Outcome([summary(row, exact=self.exact) for row in self.wrapped.world.sum(sums)])
        for domain, value in zip(self.domains, outcome.student_ce, strict=True):
            if not math.isfinite(value):
                raise DdkError(
                    f"distill: the student's validation loss on domain {domain} is {value}",
                    hint="lower distill.optimizer.learning_rate; the last checkpoint is kept",
                )
        return outcome

    def _domain(self, windows: list[CachedWindow]) -> FloatArray:
        """This process's share of the sums, float64 [N_SUMS]."""
        world, micro = self.wrapped.world, self.options.micro_batch_windows
        # the module's own forward: under FSDP2 its hooks have the weights whole; DDP's would synchronise in vain
        module = self.wrapped.module if self.wrapped.sharded else self.wrapped.student
        total = torch.zeros(N_SUMS, dtype=torch.float64, device=self.device)
        for start in range(0, len(windows), micro * world.size):
            everyone = windows[start : start + micro * world.size]
            mine = everyone[world.rank :: world.size] or [
                _silent(everyone[0])
            ]  # shards need everyone's forward
            batch = self.make_batch(mine).to(self.device)
            with self.autocast():
                total += module(
                    batch.tokens,
                    batch.labels,
                    batch.rows,
                    measuring=True,
                    temperature=self.options.temperature,
                )
        return total.cpu().numpy()


def _silent(window: CachedWindow) -> CachedWindow:
    return replace(window, labels=np.full_like(window.labels, NO_LABEL))
