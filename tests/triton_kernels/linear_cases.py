"""The Triton path of linear_sparse_kd in Triton's interpreter: prints {case: {quantity: relative error}}.

Run by test_linear_sparse_kd.py as `TRITON_INTERPRET=1 python -P linear_cases.py`.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch

from ddk_pipe.pipeline.losses import chunks, linear_sparse_kd, sparse_kd_reference
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets


def problem(
    tail: bool, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, SparseTargets]:
    """hidden [11, 6], weight [301, 6], bias [301], labels and targets with padding, ignored and silent rows."""
    generator = torch.Generator().manual_seed(seed)
    rows, vocab, width, kept = 11, 301, 6, 7
    hidden, weight = (torch.randn(n, width, generator=generator) for n in (rows, vocab))
    bias = torch.randn(vocab, generator=generator)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    labels[::4] = NO_LABEL
    ids = torch.stack([torch.randperm(vocab, generator=generator)[:kept].sort().values for _ in range(rows)])
    weights = torch.rand(rows, kept, generator=generator)
    ids[2, 4:], weights[2, 4:] = -1, 0.0
    ids[3], weights[3] = -1, 0.0
    rest = torch.full((rows, 1), 0.8 if tail else 0.0)
    total = (weights.sum(1, keepdim=True) + rest).clamp_min(1e-9)
    tails = (rest / total)[:, 0].log()
    tails[3] = float("-inf")
    labels[5] = ids[5, 1]
    return (
        hidden,
        weight,
        bias,
        labels,
        SparseTargets(ids=ids.int(), logprobs=(weights / total).log(), tail=tails),
    )


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm().clamp_min(1e-12))


def errors(tail: bool, temperature: float, chunked: bool, softcap: float | None) -> dict[str, float]:
    hidden, weight, bias, labels, targets = problem(tail, seed=int(temperature * 10) + tail)
    single = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    double = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    options: dict[str, Any] = {"gamma": 0.7, "temperature": temperature, "implementation": "triton"}
    options["softcap"] = softcap
    chunks.MIN_CHUNK_ROWS = chunks.MAX_CHUNK_ROWS = 3 if chunked else 4096
    found = linear_sparse_kd(single[0], single[1], labels, targets, bias=single[2], **options)
    logits = double[0] @ double[1].t() + double[2]
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    truth = sparse_kd_reference(logits, labels, targets, gamma=0.7, temperature=temperature)
    torch.autograd.backward([3 * found.total, 3 * truth.total])
    silent = linear_sparse_kd(hidden, weight, labels, targets, bias=bias, **options)
    out = {
        "total": relative(found.total.detach(), truth.total.detach()),
        "total without gradient": relative(silent.total, truth.total.detach()),
        "ce": relative(found.ce, truth.ce.detach()),
        "kl": relative(found.kl, truth.kl.detach()),
    }
    for name, one, other in zip(("hidden", "weight", "bias"), single, double, strict=True):
        assert one.grad is not None and other.grad is not None
        out[f"d{name}"] = relative(one.grad, other.grad)
    return out


if __name__ == "__main__":
    cases = itertools.product((False, True), (1.0, 2.0), (False, True), (None, 3.0))
    print(json.dumps({f"tail={a} T={t} chunks={b} softcap={c}": errors(a, t, b, c) for a, t, b, c in cases}))
