"""One optimizer step: micro batches of this process's windows, one denominator for all of them on all processes.

A step only queues work on the device. What it found (losses, norm) stays there until `settle` reads it, so the host
never waits in between; a step that is not finite is skipped on the device, with all that follow.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import SparseKdLoss
from ddk_pipe.pipeline.manifest import Distill
from ddk_pipe.stages.distill.batches import Batch, BatchMaker, Copier, StepData
from ddk_pipe.stages.distill.schedules import gamma_at, learning_rate
from ddk_pipe.stages.distill.sources import Source
from ddk_pipe.stages.distill.world import Wrapped


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what is drawn at random within a step: a pure function, so that a run that is continued draws the same."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits


@dataclass(frozen=True)
class Taken:
    """A step that was queued. `found` float64 [5], on the device: loss, CE, KL, CE to the targets, all per label, and the
    gradient's norm."""

    done: int
    rate: float
    gamma: float
    data: StepData
    found: Tensor


class Stepper:
    """Takes optimizer steps; equal on one process and on several, up to the order of summation."""

    def __init__(
        self,
        options: Distill,
        source: Source,
        make_batch: BatchMaker,
        wrapped: Wrapped,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], Any],
        domains: list[str],
    ) -> None:
        self.options, self.source, self.make_batch = options, source, make_batch
        self.wrapped, self.optimizer, self.autocast = wrapped, optimizer, autocast
        self.domains, self.world = domains, wrapped.world
        self.device = next(wrapped.student.parameters()).device
        self._copy = Copier(self.device)
        self._taken: list[Taken] = []
        self._began = 0.0
        # 1 from the first step on that is not finite: a fused optimizer then leaves weights and moments as they are
        self._broken = torch.zeros((), device=self.device)
        self.optimizer.found_inf = self._broken  # type: ignore[attr-defined]

    def step(self, done: int, data: StepData) -> None:
        """Queue the step after `done` done ones, on this process's windows."""
        if not self._taken:
            self._began = time.monotonic()
        self.wrapped.module.train()
        # dropout and its like draw from torch's own generators, of the CPU and of every device
        torch.manual_seed(step_seed(self.options.seed, done, self.world.rank))
        rate, gamma = learning_rate(self.options, done), gamma_at(self.options, done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        labels = self._labels(data.batches)
        sums = self.world.sum_on_device(self._backward(done, data.batches, labels, gamma))
        norm = self.wrapped.clip(self.options.optimizer.clip_norm)
        self._broken.logical_or_((sums[0] - sums[0] + norm - norm) != 0)  # infinity less itself is NaN
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        found = torch.cat([sums / labels, norm.double().reshape(1)])
        self._taken.append(Taken(done, rate, gamma, data, found))

    def settle(self) -> Iterator[dict[str, Any]]:
        """Rows for the record of the steps since the last call; waits for the device once.

        Raises DdkError, naming the window, at the first step whose loss or gradient norm was not finite; the weights
        are still those before it.
        """
        if not self._taken:
            return
        taken, self._taken = self._taken, []
        every = torch.stack([step.found for step in taken]).tolist()
        waited = sum(step.data.waited_seconds for step in taken[1:])
        seconds = (time.monotonic() - self._began - waited) / len(taken)
        for step, (total, ce, kl, target_ce, norm) in zip(taken, every, strict=True):
            if not math.isfinite(total) or not math.isfinite(norm):
                raise self._not_finite(step, total, norm)
            yield {
                "step": step.done + 1,
                "loss": total,
                "ce": ce,
                "kl": kl if self.source.exact else None,
                "target_ce": None if math.isnan(target_ce) else target_ce,
                "gamma": step.gamma,
                "learning_rate": step.rate,
                "gradient_norm": norm,
                "seconds": seconds,
                "data_wait_seconds": step.data.waited_seconds,
                "data_order": step.data.digest,
            }

    def _labels(self, batches: list[Batch]) -> float | Tensor:
        """Labels of all processes' windows, at least 1: a number, or float64 [] on the device where others have some."""
        own = sum(len(batch.rows.live) for batch in batches)
        if not self.world.distributed:
            return max(float(own), 1.0)
        labels = torch.full((), float(own), dtype=torch.float64, device=self.device)
        return self.world.sum_on_device(labels).clamp_(min=1.0)

    def _backward(self, done: int, batches: list[Batch], labels: float | Tensor, gamma: float) -> Tensor:
        """Gradients of the loss over all processes' labels; this process's sums of loss, CE, KL and CE to targets, float64
        [4] on the device."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        # of gradient_skip: a pure function of seed, step and rank, so that a resumed run draws the same
        seed = (self.options.seed * 1_000_003 + done) * self.world.size + self.world.rank
        generator = torch.Generator().manual_seed(seed)
        for index, batch in enumerate(batches):
            batch = self.source.complete(self._copy(batch))
            with self.wrapped.last_of(len(batches), index):
                loss = self._loss(batch, generator, gamma)
                mean = loss.total / (labels.to(loss.total.dtype) if isinstance(labels, Tensor) else labels)
                (mean * self.world.size).backward()  # type: ignore[no-untyped-call]  # DDP and FSDP2 average; we want the sum
            total, ce, kl = loss.total.detach().double(), loss.ce.double(), loss.kl.double()
            sums += torch.stack([total, ce, kl, kl + batch.entropy])
        return sums

    def _loss(self, batch: Batch, generator: torch.Generator, gamma: float) -> SparseKdLoss:
        options = self.options
        squared = 1.0 if options.temperature_squared else options.temperature**-2
        extra = {}
        if batch.dense is None:
            extra = {"gradient_skip": options.gradient_skip, "generator": generator}
        with self.autocast():
            loss: SparseKdLoss = self.wrapped.module(
                batch.tokens,
                batch.labels,
                batch.rows if batch.dense is None else batch.dense,
                gamma=gamma * squared,
                temperature=options.temperature,
                direction=options.direction,
                documents=batch.documents,
                **extra,
            )
        return loss

    def _not_finite(self, step: Taken, total: float, norm: float) -> DdkError:
        """The error that names a window whose own loss or gradient is not finite, or else the one of the largest."""
        own = [
            (self._badness(self.source.read(domain, number), step.gamma), self.domains[domain], number)
            for domain, number in step.data.names.tolist()
        ]
        worst, domain, number = max(
            (found for rank in self.world.gather(own) for found in rank), key=lambda f: f[0]
        )
        self.optimizer.zero_grad(set_to_none=True)
        blame = (
            "whose loss or gradient is not finite"
            if math.isinf(worst)
            else f"of the largest loss, {worst:.3g},"
        )
        return DdkError(
            f"distill: the loss is {total:.4g} (gradient norm {norm:.4g}) at step {step.done + 1}; the window {blame}"
            f" is {domain}/train/{number}",
            hint="lower distill.optimizer.learning_rate, or look at that window; the last checkpoint is kept",
        )

    def _badness(self, window: CachedWindow, gamma: float) -> float:
        """The window's own loss per label, infinity if that, its targets or its gradient are not finite.

        Its gradient is looked at where it is this process's alone: other ranks' windows would be added to it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(not self.world.distributed):
            batch = self.source.complete(self._copy(self.make_batch([window])))
            loss = self._loss(batch, torch.Generator(), gamma)
        value = float(loss.total.detach()) / max(loss.positions, 1)
        bad = not math.isfinite(value) or bool(window.targets.logprobs.isnan().any())
        if not bad and not self.world.distributed:
            loss.total.backward()  # type: ignore[no-untyped-call]
            bad = not math.isfinite(float(self.wrapped.clip(None)))
        return math.inf if bad else value
