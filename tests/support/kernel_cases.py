"""What the files of kernel cases share: rows of every kind, the float64 truth, and the run in Triton's interpreter.

The interpreter must be chosen before triton is imported and rules out compiling in the same process, so the
tests run a file of cases once, as `TRITON_INTERPRET=1 python -P FILE [NAME ...]` with this folder on PYTHONPATH,
and read the JSON it prints: {name: [[what, error, bound], ...]} or {name: traceback}. The names can be listed
without triton.

What this cannot show: races, missing barriers, and anything a GPU's own exp or rounding does.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddk_pipe.pipeline.losses import sparse_kd_reference
from ddk_pipe.pipeline.targets import NO_LABEL, PADDING_ID, SparseTargets

GAMMA = 0.7
INF = float("inf")

Findings = list[tuple[str, float, float]]  # (what, error, bound)
Case = Callable[[], Findings]


class Cases(dict[str, Case]):
    """Cases by name. `small` shrinks the launches, except where a name begins with "shipped"."""

    def __init__(self, small: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.small = small

    def __call__(self, name: str) -> Callable[[Case], Case]:
        """Decorator that adds a case."""

        def register(function: Case) -> Case:
            assert name not in self, name
            self[name] = function
            return function

        return register

    def run(self, name: str, seed: int) -> Findings | str:
        torch.manual_seed(zlib.crc32(name.encode()) + seed)
        launches = nullcontext() if name.startswith("shipped") else self.small()
        try:
            with launches:
                return self[name]()
        except Exception:  # noqa: BLE001 - whatever it is, the test of that name shows it
            return traceback.format_exc()

    def main(self) -> None:
        """Runs those named on the command line, or all, and prints the JSON. DDK_TEST_SEED=n draws other
        inputs."""
        if os.environ.get("TRITON_INTERPRET") != "1":
            sys.exit("set TRITON_INTERPRET=1")
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy: log(0) and -inf - x are meant
        seed = int(os.environ.get("DDK_TEST_SEED", "0"))
        json.dump({name: self.run(name, seed) for name in sys.argv[1:] or self}, sys.stdout)


@dataclass(frozen=True)
class Rows:
    """N rows; logits float64 [N, V], rounded when a kernel is given them."""

    logits: Tensor
    labels: Tensor
    targets: SparseTargets

    @property
    def labelled(self) -> Tensor:
        return self.labels != NO_LABEL

    def with_targets(self, **parts: Tensor) -> Rows:
        return replace(self, targets=replace(self.targets, **parts))


def six_rows(vocab: int = 301, kept: int = 12) -> Rows:
    """Six random rows of every kind.

    0 tail, label among the ids     1 no tail, label not among them    2 neither ids nor tail
    3 tail, label not among them    4 no tail, label among the ids     5 ignored, its logits NaN
    """
    logits = 3 * torch.randn(6, vocab, dtype=torch.float64)
    teacher = (logits + torch.randn_like(logits)).log_softmax(1)
    order = (teacher - torch.empty_like(teacher).exponential_().log()).argsort(1, descending=True)
    ids = order[:, :kept].sort(1).values  # drawn from the teacher, without replacement
    logprobs = teacher.gather(1, ids)
    rest = teacher.scatter(1, ids, -INF).logsumexp(1)
    tail = torch.tensor([True, False, False, True, False, True]) & (rest > -INF)
    logprobs = torch.where(tail[:, None], logprobs, logprobs.log_softmax(1)) if kept else logprobs
    ids[2], logprobs[2] = PADDING_ID, -INF
    labels = order[:, -1].clone()
    if kept:
        labels[0], labels[4] = ids[0, kept // 2], ids[4, 0]
    labels[5] = NO_LABEL
    logits[5] = math.nan
    targets = SparseTargets(ids.int(), logprobs.float(), rest.where(tail, torch.tensor(-INF)).float())
    return Rows(logits, labels, targets)


def truth(p: Rows, dtype: torch.dtype, temperature: float, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """CE [N], KL [N] and the gradient [N, V] in float64, at the logits as `dtype` stores them."""
    logits = p.logits.to(dtype).double().requires_grad_()
    losses = [
        sparse_kd_reference(
            logits[n : n + 1],
            p.labels[n : n + 1],
            p.targets.rows(slice(n, n + 1)),
            gamma=gamma,
            temperature=temperature,
        )
        for n in range(len(logits))
    ]
    (gradient,) = torch.autograd.grad(torch.stack([loss.total for loss in losses]).sum(), logits)
    ce, kl = (torch.stack([getattr(loss, part) for loss in losses]).detach() for part in ("ce", "kl"))
    return ce, kl, gradient


def relative(got: Tensor, want: Tensor, least: float = 0.0) -> float:
    """|got - want| / |want|, NaN if either is not finite: no bound holds then.

    Elements of `want` count for at least `least`. KL is a difference of two sums of about a nat each, so
    below a nat its error is that of the sums: absolute.
    """
    scale = want.double().abs().clamp_min(least).norm().item()
    return float((got.double() - want.double()).norm().item() / (scale or 1.0))


def wrong(holds: bool) -> float:
    return float(not holds)


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN: an element that a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    assert torch.empty(4).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def refusals(
    call: Callable[..., object], changes: dict[str, tuple[dict[str, object], type[Exception], str]]
) -> Findings:
    """One finding a change of the arguments: the call raises that exception and says that fragment."""
    findings: Findings = []
    for name, (changed, kind, fragment) in changes.items():
        try:
            call(**changed)
        except kind as error:
            said = fragment in str(error)
        else:
            said = False
        findings.append((name, wrong(said), 0.0))
    return findings
