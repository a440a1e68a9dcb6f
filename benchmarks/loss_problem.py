"""Inputs of the loss benchmark, and the ways to compute a loss on them, forward and backward."""

from __future__ import annotations

import argparse
import inspect
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from common import TEACHER
from torch import Tensor

from ddk_pipe.pipeline.losses import linear_sparse_kd
from ddk_pipe.pipeline.targets import SparseTargets, stack, top_with_tail

K = 64
CHUNK = 128
PRODUCT_ROWS = 512


class Problem:
    """hidden [N, d], weight [V, d], labels [N], targets of K ids and a bucket, and the losses to compare.

    Every loss is a sum over the N positions, with gamma = T = 1 unless said otherwise, and leaves its gradients
    in hidden.grad and weight.grad.
    """

    teacher: Tensor  # log-probabilities [N, V], for dense KD alone

    def __init__(self, hidden: Tensor, weight: Tensor, labels: Tensor, targets: SparseTargets) -> None:
        self.hidden, self.weight = hidden.requires_grad_(), weight.requires_grad_()
        self.labels, self.targets = labels, targets

    def backward(self, loss: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        loss.backward()  # type: ignore[no-untyped-call]

    def gradients(self) -> list[Tensor]:
        """What the last loss left: dhidden and dweight."""
        return [x.grad for x in (self.hidden, self.weight) if x.grad is not None]

    def ce(self) -> None:
        """Cross-entropy on full logits: what ordinary training does."""
        self.backward(F.cross_entropy(self.hidden @ self.weight.t(), self.labels, reduction="sum"))

    def dense_kd(self) -> None:
        """CE + KL against the teacher's full logits (their computation not counted)."""
        logits = self.hidden @ self.weight.t()
        kl = F.kl_div(F.log_softmax(logits, 1), self.teacher, log_target=True, reduction="sum")
        self.backward(F.cross_entropy(logits, self.labels, reduction="sum") + kl)

    def naive_sparse(self) -> None:
        """CE + KL that gathers the kept ids from a full log-softmax, tail by 1 - sum."""
        log_q = F.log_softmax(self.hidden @ self.weight.t(), 1)
        kept = log_q.gather(1, self.targets.ids.long())
        w, tail = self.targets.logprobs.exp(), self.targets.tail.exp()
        rest = torch.log1p(-kept.exp().sum(1).clamp_max(1 - 1e-6))
        kl = (w * (self.targets.logprobs - kept)).sum() + (tail * (self.targets.tail - rest)).sum()
        self.backward(-log_q.gather(1, self.labels[:, None]).sum() + kl)

    def ours(self, **options: Any) -> None:
        loss = linear_sparse_kd(self.hidden, self.weight, self.labels, self.targets, gamma=1.0, **options)
        self.backward(loss.total)

    def products(self, rows: int = PRODUCT_ROWS) -> None:
        """The three matrix products alone, in chunks of `rows`: the floor of any exact method."""
        d_weight = torch.zeros_like(self.weight)
        with torch.no_grad():
            for start in range(0, len(self.hidden), rows):
                part = self.hidden[start : start + rows]
                z = part @ self.weight.t()
                _ = z @ self.weight
                d_weight.addmm_(z.t(), part)


class RealProblem(Problem):
    """Hidden states, output weight and next tokens of SmolLM2-135M on Python's own sources, float32.

    The student's hidden states are the teacher's + 15% noise; the targets are the teacher's top K with a bucket.
    """

    def __init__(self, positions: int) -> None:
        self.teacher_hidden, self.teacher_weight, labels = real_states(positions)
        noise = torch.randn(self.teacher_hidden.shape, generator=torch.Generator().manual_seed(0))
        hidden = self.teacher_hidden + 0.15 * self.teacher_hidden.std() * noise
        targets = stack([self._targets(start) for start in range(0, positions, CHUNK)])
        super().__init__(hidden, self.teacher_weight.clone(), labels, targets)

    def _targets(self, start: int) -> SparseTargets:
        logits = self.teacher_hidden[start : start + CHUNK] @ self.teacher_weight.t()
        return top_with_tail(torch.softmax(logits, 1), K, floor=0.0)

    def with_dense_teacher(self) -> RealProblem:
        """The same, `teacher` filled."""
        with torch.no_grad():
            self.teacher = F.log_softmax(self.teacher_hidden @ self.teacher_weight.t(), 1)
        return self


class DrawnProblem(Problem):
    """The same shapes with drawn numbers, for sizes that no model at hand has: the exact loss takes the same
    time."""

    def __init__(self, positions: int, vocab: int, width: int, device: str = "cpu", **kind: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(positions, width, generator=generator)
        weight = torch.randn(vocab, width, generator=generator).mul_(2 * width**-0.5)
        labels = torch.randint(vocab, (positions,), generator=generator)
        first = torch.randint(vocab, (positions, 1), generator=generator)
        ids = ((first + torch.arange(K) * (vocab // K)) % vocab).sort(1).values
        logprobs = torch.randn(positions, K + 1, generator=generator).mul_(2).log_softmax(1)
        targets = SparseTargets(ids=ids.int(), logprobs=logprobs[:, :K].clone(), tail=logprobs[:, K].clone())
        kind = {"device": device, **kind}
        super().__init__(hidden.to(**kind), weight.to(**kind), labels.to(device), targets.to(device))


def real_states(positions: int) -> tuple[Tensor, Tensor, Tensor]:
    """The model's last hidden states [N, 576], its output weight [49152, 576], and the next tokens [N]."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ddk_pipe.stages.demo.material import write_teacher

    write_teacher(TEACHER)
    text = inspect.getsource(argparse) + inspect.getsource(subprocess)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokens = tokenizer(text, verbose=False, return_tensors="pt").input_ids[:, : positions + 1]
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    with torch.inference_mode():
        parts = [model.model(part).last_hidden_state[0] for part in tokens[:, :positions].split(512, 1)]
    return torch.cat(parts).clone(), model.lm_head.weight.detach().clone(), tokens[0, 1:].clone()
