"""Measures and the dense loss against their definitions, written out densely in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from ddk_pipe.pipeline.losses import DenseTargets, linear_dense_kd, measures, sparse_kd_reference
from ddk_pipe.pipeline.losses import dense as dense_kd
from ddk_pipe.pipeline.losses.terms import Direction
from ddk_pipe.pipeline.targets import NO_LABEL, SparseTargets

N, D, V, K = 41, 8, 101, 5


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D], labels [N] with gaps, teacher log-probabilities [N, V]."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (N,), generator=gen)
    labels[::4] = NO_LABEL
    teacher = torch.randn(N, V, generator=gen).mul_(3).log_softmax(1)
    return torch.randn(N, D, generator=gen), torch.randn(V, D, generator=gen), labels, teacher


def topk(teacher: Tensor) -> SparseTargets:
    ids = teacher.topk(K).indices.sort(1).values
    kept = teacher.gather(1, ids)
    return SparseTargets(ids.int(), kept, torch.log1p(-kept.exp().sum(1)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_measures_are_their_definitions(
    problem: tuple[Tensor, ...], temperature: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels, teacher = problem
    monkeypatch.setattr(measures, "CHUNK_BYTES", 4 * V * 7)  # seven rows a chunk: several, and a ragged last
    targets = topk((teacher / temperature).log_softmax(1))
    sums = measures.measure(hidden, weight, labels, targets, temperature=temperature, softcap=softcap).numpy()
    found = measures.summary(sums, exact=True)
    logits = (hidden @ weight.T).double()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    live = labels != NO_LABEL
    truth = sparse_kd_reference(logits, labels, targets, gamma=1.0, temperature=temperature)
    count = int(live.sum())
    assert found["student_ce"] == pytest.approx(float(truth.ce) / count, rel=1e-5)
    assert found["kl"] == pytest.approx(float(truth.kl) / count, rel=1e-4)
    q = logits.softmax(1)[live]
    best = q.argmax(1)
    assert found["teacher_agreement"] == float((best == teacher[live].argmax(1)).double().mean())
    confidence, hit = q.max(1).values.numpy(), (best == labels[live]).numpy()
    edges = np.linspace(0, 1, 16)
    error = 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & ((confidence < high) | (high == 1))
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    assert found["calibration_error"] == pytest.approx(error, abs=1e-6)


def test_drawn_targets_have_no_kl_and_missing_ones_no_comparison(problem: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, teacher = problem
    drawn = topk(teacher)
    drawn = SparseTargets(drawn.ids, drawn.logprobs.log_softmax(1), torch.full((N,), float("-inf")))
    found = measures.summary(measures.measure(hidden, weight, labels, drawn).numpy(), exact=False)
    assert found["kl"] is None
    q = (hidden @ weight.T).double().log_softmax(1)
    expected = (
        -(drawn.logprobs.double().exp() * q.gather(1, drawn.ids.long())).sum(1)[labels != NO_LABEL].mean()
    )
    assert found["target_ce"] == pytest.approx(float(expected), rel=1e-5)
    nothing = SparseTargets(drawn.ids[:, :0], drawn.logprobs[:, :0], drawn.tail)
    found = measures.summary(measures.measure(hidden, weight, labels, nothing).numpy(), exact=False)
    assert (found["target_ce"], found["teacher_agreement"]) == (None, None)
    silent = measures.measure(hidden, weight, torch.full((N,), NO_LABEL), drawn)
    assert not silent.any()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dense_loss_and_gradients_are_the_definition(
    problem: tuple[Tensor, ...],
    temperature: float,
    direction: Direction,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden, weight, labels, teacher = (
        part.double() if part.is_floating_point() else part for part in problem
    )
    monkeypatch.setattr(dense_kd, "CHUNK_BYTES", 4 * V * 7)
    h, w = hidden.float().requires_grad_(), weight.float().requires_grad_()
    targets = DenseTargets(teacher.float(), lambda states: states, V)
    loss = linear_dense_kd(
        h, w, labels, targets, gamma=0.7, temperature=temperature, direction=direction, softcap=4.0
    )
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    live = labels != NO_LABEL
    z = (4.0 * torch.tanh(exact[0] @ exact[1].T / 4.0))[live]
    log_p = (teacher[live] / temperature).log_softmax(1)
    log_s = (z / temperature).log_softmax(1)
    ce = -z.log_softmax(1).gather(1, labels[live][:, None]).sum()
    p, q = (log_p, log_s) if direction == "forward" else (log_s, log_p)
    kl = (p.exp() * (p - q)).sum()
    total = ce + 0.7 * temperature**2 * kl
    assert float(loss.kl) == pytest.approx(float(kl.detach()), rel=1e-5)
    assert float(loss.total.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    assert loss.positions == int(live.sum())
    found = torch.autograd.grad(loss.total, (h, w))
    for mine, true in zip(found, torch.autograd.grad(total, exact), strict=True):
        assert float((mine - true).norm() / true.norm()) < 1e-5


def test_a_smaller_teacher_vocabulary_gives_the_rest_no_mass(problem: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, teacher = problem
    small = teacher[:, : V - 10].log_softmax(1)
    labels = labels.clamp(max=V - 11)
    targets = DenseTargets(small, lambda states: states, V - 10)
    loss = linear_dense_kd(hidden, weight, labels, targets, gamma=1.0)
    live = labels != NO_LABEL
    log_q = (hidden @ weight.T).double().log_softmax(1)[live, : V - 10]
    p = small[live].double()
    assert float(loss.kl) == pytest.approx(float((p.exp() * (p - log_q)).sum()), rel=1e-5)
