"""Whole training steps of one student by ddk-pipe's loop and by transformers' own, on the same windows.

    ours*, online_dense   ddk-pipe's loop, as the manifest has it
    ce_only               transformers' own step: model(input_ids, labels).loss, the same AdamW and clipping
    online_hf             the same with a teacher beside it: both models' logits whole, torch's kl_div

The last two read windows without targets out of memory: they must not pay for decoding what they do not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ddk_pipe.pipeline.cache import CachedWindow
from ddk_pipe.pipeline.manifest import Project
from ddk_pipe.pipeline.targets import NO_LABEL
from ddk_pipe.pipeline.text import TRAIN, open_split
from ddk_pipe.stages.common import pick_dtype
from ddk_pipe.stages.distill import Batch
from ddk_pipe.stages.distill.parts import Parts
from ddk_pipe.stages.distill.position import Position
from ddk_pipe.stages.distill.sources import _bare
from ddk_pipe.stages.distill.windows import steps_of_windows

BY_TRANSFORMERS = ("ce_only", "online_hf")
GAMMA = 1.0


class Steps:
    """One variant's steps; each call of `step` trains on the next windows of the same order."""

    def __init__(self, project: Project, variant: str) -> None:
        self.parts, self.variant = Parts(project), variant
        if variant in BY_TRANSFORMERS:
            self.parts.source.read = _in_memory(project)  # type: ignore[method-assign, assignment]
        shares = [1 / len(self.parts.domains)] * len(self.parts.domains)
        self.position = Position(0, 0.0, shares, shares, self.parts.sampler.state_dict(), "")
        self.data = steps_of_windows(self.parts, self.position)
        self.teacher = _hf_teacher(project, self.parts.device) if variant == "online_hf" else None
        self.waited = 0.0

    def step(self) -> None:
        """Queue one step, its data included."""
        data = next(self.data)
        self.waited += data.waited_seconds
        if self.variant in BY_TRANSFORMERS:
            self._transformers_step(data.batches)
        else:
            self.parts.stepper.step(self.position.step, data)

    def settle(self) -> None:
        """Read what the steps found, as the loop does every `log_steps` steps; transformers' variants only wait."""
        if self.variant in BY_TRANSFORMERS:
            if self.parts.device.type == "cuda":
                torch.cuda.synchronize(self.parts.device)
        else:
            list(self.parts.stepper.settle())

    def _transformers_step(self, batches: list[Batch]) -> None:
        lm, optimizer = self.parts.student.lm.train(), self.parts.optimizer
        for batch in batches:
            (self._transformers_loss(lm, batch) / len(batches)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _transformers_loss(self, lm: Any, batch: Batch) -> torch.Tensor:
        """Of one micro batch, per label."""
        tokens, labels = (x.to(self.parts.device, non_blocking=True) for x in (batch.tokens, batch.labels))
        # transformers shifts by itself: the label of position t is token t + 1
        shifted = torch.full_like(labels, NO_LABEL)
        shifted[:, 1:] = labels[:, :-1]
        with self.parts._autocast():
            found = lm(input_ids=tokens, labels=shifted, use_cache=False)
            loss: torch.Tensor = found.loss
            if self.teacher is not None:
                loss = loss + GAMMA * self._kl(found.logits, tokens, labels)
        return loss

    def _kl(self, logits: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert self.teacher is not None
        with torch.no_grad():
            wanted = self.teacher(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        live = labels != NO_LABEL
        q = logits.log_softmax(-1)[live]
        kl = torch.nn.functional.kl_div(q, wanted[live], reduction="sum", log_target=True)
        return kl / live.sum()


def _in_memory(project: Project) -> Callable[[int, int], CachedWindow]:
    """Training windows without targets, read before."""
    names = list(project.manifest.domains)
    splits = [open_split(project.tokens / name / TRAIN) for name in names]
    windows = [[_bare(split, window) for window in range(split.facts.windows)] for split in splits]
    return lambda domain, window: windows[domain][window]


def _hf_teacher(project: Project, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = pick_dtype(project.manifest.teacher.dtype, device)
    return AutoModelForCausalLM.from_pretrained(project.teacher_model, dtype=dtype).to(device).eval()
