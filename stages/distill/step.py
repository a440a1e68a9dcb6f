"""One optimizer step: micro batches of this process's windows, one denominator for all of them on all processes."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.errors import DdkError
from ddk_pipe.pipeline.losses import target_entropy
from ddk_pipe.pipeline.manifest import Distill
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets
from ddk_pipe.stages.distill.schedules import gamma_at, learning_rate
from ddk_pipe.stages.distill.sources import Batch, Source
from ddk_pipe.stages.distill.world import Wrapped


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what is drawn at random within a step: a pure function, so that a run that is continued draws the same."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes 63 bits


class Stepper:
    """Takes optimizer steps; equal on one process and on several, up to the order of summation."""

    def __init__(
        self,
        options: Distill,
        source: Source,
        wrapped: Wrapped,
        optimizer: torch.optim.Optimizer,
        autocast: Callable[[], Any],
        domains: list[str],
    ) -> None:
        self.options, self.source, self.wrapped, self.optimizer = options, source, wrapped, optimizer
        self.autocast, self.domains, self.world = autocast, domains, wrapped.world
        self.device = next(wrapped.student.parameters()).device

    def step(self, done: int, windows: list[CachedWindow], names: NDArray[np.int64]) -> dict[str, Any]:
        """The step after `done` done ones, on this process's windows; returns the whole step's row of the record.

        `names` int64 [windows, 2]: (domain, window), to say which one made the loss NaN.
        Raises DdkError, before the weights are touched, if loss or gradient norm is not finite.
        """
        began = time.monotonic()
        self.wrapped.module.train()
        # dropout and its like draw from torch's own generators, of the CPU and of every device
        torch.manual_seed(step_seed(self.options.seed, done, self.world.rank))
        rate, gamma = learning_rate(self.options, done), gamma_at(self.options, done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        own_labels = sum(int((window.labels != NO_LABEL).sum()) for window in windows)
        labels = max(float(self.world.sum(np.array([float(own_labels)]))[0]), 1.0)
        sums = self.world.sum(self._backward(done, windows, labels, gamma))
        total, ce, kl, target_ce = sums / labels
        norm = self.wrapped.clip(self.options.optimizer.clip_norm)
        if not math.isfinite(total) or not math.isfinite(norm):
            raise self._not_finite(done, total, norm, windows, names, gamma)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        sparse = not math.isnan(target_ce)
        return {
            "step": done + 1,
            "loss": float(total),
            "ce": float(ce),
            "kl": float(kl) if self.source.exact else None,
            "target_ce": float(target_ce) if sparse else None,
            "gamma": gamma,
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds": time.monotonic() - began,
        }

    def _backward(
        self, done: int, windows: list[CachedWindow], labels: float, gamma: float
    ) -> NDArray[np.float64]:
        """Gradients of the loss over all processes' labels; this process's sums of loss, CE, KL and CE to targets."""
        sums = np.zeros(4)
        # of gradient_skip: a pure function of seed, step and rank, so that a resumed run draws the same
        seed = (self.options.seed * 1_000_003 + done) * self.world.size + self.world.rank
        generator = torch.Generator().manual_seed(seed)
        size = self.options.micro_batch_windows
        parts = [windows[start : start + size] for start in range(0, len(windows), size)]
        for index, part in enumerate(parts):
            batch = self.source.batch(part, self.device)
            with self.wrapped.last_of(len(parts), index):
                loss = self._loss(batch, generator, gamma)
                (loss.total / labels * self.world.size).backward()  # DDP and FSDP2 average; we want the sum
            sparse = isinstance(batch.targets, SparseTargets)
            entropy = target_entropy(batch.targets) if isinstance(batch.targets, SparseTargets) else 0.0
            kl = float(loss.kl)
            sums += [
                float(loss.total.detach()),
                float(loss.ce),
                kl,
                kl + entropy if sparse else math.nan,
            ]
        return sums

    def _loss(self, batch: Batch, generator: torch.Generator, gamma: float) -> Any:
        options = self.options
        squared = 1.0 if options.temperature_squared else options.temperature**-2
        extra = {}
        if isinstance(batch.targets, SparseTargets):
            extra = {"gradient_skip": options.gradient_skip, "generator": generator}
        with self.autocast():
            return self.wrapped.module(
                batch.tokens,
                batch.labels,
                batch.targets,
                gamma=gamma * squared,
                temperature=options.temperature,
                direction=options.direction,
                **extra,
            )

    def _not_finite(
        self,
        done: int,
        total: float,
        norm: float,
        windows: list[CachedWindow],
        names: NDArray[np.int64],
        gamma: float,
    ) -> DdkError:
        """The error that names a window whose own loss or gradient is not finite, or else the one of the largest."""
        own = [
            (self._badness(window, gamma), self.domains[domain], number)
            for window, (domain, number) in zip(windows, names.tolist(), strict=True)
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
            f"distill: the loss is {total:.4g} (gradient norm {norm:.4g}) at step {done + 1}; the window {blame}"
            f" is {domain}/train/{number}",
            hint="lower distill.optimizer.learning_rate, or look at that window; the last checkpoint is kept",
        )

    def _badness(self, window: CachedWindow, gamma: float) -> float:
        """The window's own loss per label, infinity if that, its targets or its gradient are not finite.

        Its gradient is looked at where it is this process's alone: other ranks' windows would be added to it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(not self.world.distributed):
            loss = self._loss(self.source.batch([window], self.device), torch.Generator(), gamma)
        value = float(loss.total.detach()) / max(loss.positions, 1)
        bad = not math.isfinite(value) or bool(window.targets.logprobs.isnan().any())
        if not bad and not self.world.distributed:
            loss.total.backward()
            bad = not math.isfinite(self.wrapped.clip(None))
        return math.inf if bad else value
